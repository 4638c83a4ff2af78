"""Where cases are prepared makes no difference: this process, workers beside it, a dask cluster."""

import dataclasses
import sys
from contextlib import closing
from pathlib import Path

import pytest
from tiny_release import command, contents, ct_rate_release, volume_of

from data_builders import run_cases
from data_builders.__main__ import main
from data_builders.run_cases import in_order
from data_builders.sources import SourceGoneError

NAMES = tuple(f"train_{number}_a_1" for number in range(1, 6))


def build(release: Path, out: Path, *more: str) -> int:
    return main(command(release, out, "--splits", "train", *more))


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    """With a case that turns out broken in the middle."""
    release = ct_rate_release(tmp_path_factory.mktemp("release"), NAMES)
    broken = volume_of(release, "train_3_a_1")
    broken.write_bytes(broken.read_bytes()[:300])
    return release


@pytest.fixture(scope="module")
def alone(release, tmp_path_factory):
    out = tmp_path_factory.mktemp("alone") / "split"
    assert build(release, out, "--workers", "1") == 0
    return contents(out)


def test_worker_processes_give_the_same_bytes(release, alone, tmp_path):
    assert build(release, tmp_path / "split", "--workers", "3") == 0
    assert contents(tmp_path / "split") == alone


class Later:
    """A future that is ready when it is asked for; `asked` and `cancelled` keep what happened to it."""

    def __init__(self, value, log):
        self.value, self.log = value, log

    def result(self):
        self.log.append(("result", self.value))
        return self.value

    def cancel(self):
        self.log.append(("cancel", self.value))


def test_results_come_in_order_and_few_wait():
    log, submitted = [], []

    def submit(case):
        submitted.append(case)
        return Later(case, log)

    rows = in_order(submit, range(10), most_pending=3)
    assert next(rows) == 0 and submitted == [0, 1, 2, 3], "no more than three wait behind the one that is asked for"
    assert [next(rows), next(rows)] == [1, 2] and len(submitted) == 6
    rows.close()
    assert log[3:] == [("cancel", case) for case in (3, 4, 5)], "what nobody will ask for is not prepared"
    assert list(in_order(submit, range(10), most_pending=3)) == list(range(10))


@pytest.fixture
def cluster():
    """A scheduler and two workers in threads of this process, over TCP as on a cluster."""
    distributed = pytest.importorskip(
        "distributed", reason="dask.distributed is not installed (pip install fvlm[dask])"
    )
    # No limit: the memory of this process is that of all tests before, and for it a worker would pause for ever.
    with distributed.LocalCluster(
        n_workers=2,
        threads_per_worker=1,
        memory_limit=0,
        processes=False,
        protocol="tcp://",
        host="127.0.0.1",
        dashboard_address=None,
    ) as cluster:
        yield cluster.scheduler_address.replace("tcp://", "dask://")


def test_a_dask_cluster_gives_the_same_bytes(release, alone, tmp_path, cluster):
    assert build(release, tmp_path / "split", "--executor", cluster) == 0
    assert contents(tmp_path / "split") == alone


@pytest.mark.slow
def test_dask_workers_in_processes_of_their_own_give_the_same_bytes(release, alone, tmp_path):
    distributed = pytest.importorskip(
        "distributed", reason="dask.distributed is not installed (pip install fvlm[dask])"
    )
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster:
        address = cluster.scheduler_address.replace("tcp://", "dask://")
        assert build(release, tmp_path / "split", "--executor", address) == 0
    assert contents(tmp_path / "split") == alone


def test_a_scheduler_that_does_not_answer(release, tmp_path, capsys, monkeypatch):
    pytest.importorskip("distributed", reason="dask.distributed is not installed (pip install fvlm[dask])")
    monkeypatch.setattr(run_cases, "SECONDS_TO_CONNECT", 1)
    assert build(release, tmp_path / "split", "--executor", "dask://127.0.0.1:1") == 2
    assert "no dask scheduler answers there" in capsys.readouterr().err


def test_a_cluster_that_breaks_off_stops_cleanly(release, alone, tmp_path, capsys, monkeypatch, cluster):
    from distributed.comm import CommClosedError

    def breaking(submit, cases, most_pending):
        with closing(in_order(submit, cases, most_pending)) as rows:
            yield from (next(rows) for _ in range(3))
        raise CommClosedError("in <TCP> tcp://127.0.0.1: Stream is closed")

    with monkeypatch.context() as patch:
        patch.setattr(run_cases, "in_order", breaking)
        assert build(release, tmp_path / "split", "--executor", cluster) == 2
    message = capsys.readouterr().err
    assert "the dask cluster broke off (CommClosedError" in message and "run the same command again" in message
    assert len(list((tmp_path / "split").glob("volumes/*"))) == 1
    assert build(release, tmp_path / "split", "--executor", cluster) == 0
    assert contents(tmp_path / "split") == alone


def unseen_by_a_worker(monkeypatch, name: str) -> None:
    """Let the volume of a case be out of sight for those that prepare it."""
    copy = run_cases.local_copy

    def unseen(file):
        if file.name.startswith(name):
            raise SourceGoneError(f"{file.name}: the file is not there (any more).")
        return copy(file)

    monkeypatch.setattr(run_cases, "local_copy", unseen)


def test_a_worker_that_does_not_see_the_source_stops_the_build(release, alone, tmp_path, capsys, monkeypatch, cluster):
    """Its cases would be skipped as if somebody had taken their files away, one by one between those of the others."""
    vanished = run_cases.vanished
    with monkeypatch.context() as patch:
        unseen_by_a_worker(patch, "train_2")
        patch.setattr(run_cases, "vanished", lambda *case: dataclasses.replace(vanished(*case), machine="node7"))
        assert build(release, tmp_path / "split", "--executor", cluster) == 2
    message = capsys.readouterr().err
    assert "a worker on node7 does not see the files of train_2_a_1, which are there on" in message
    assert "mount the source under the same path" in message and "run the same command again" in message
    assert not (tmp_path / "split" / "manifest.json").exists()
    assert build(release, tmp_path / "split", "--executor", cluster) == 0
    assert contents(tmp_path / "split") == alone


def test_a_file_that_is_away_for_a_moment_stops_the_build(release, alone, tmp_path, capsys, monkeypatch):
    with monkeypatch.context() as patch:
        unseen_by_a_worker(patch, "train_2")
        assert build(release, tmp_path / "split") == 2
    assert "the files of train_2_a_1 were gone and are there again" in capsys.readouterr().err
    assert build(release, tmp_path / "split") == 0
    assert contents(tmp_path / "split") == alone


@pytest.mark.slow
def test_a_path_that_means_another_folder_to_the_workers(release, tmp_path, capsys, monkeypatch):
    """The real thing: processes in which the source is not there."""
    distributed = pytest.importorskip(
        "distributed", reason="dask.distributed is not installed (pip install fvlm[dask])"
    )
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster:
        address = cluster.scheduler_address.replace("tcp://", "dask://")
        monkeypatch.chdir(release.parent)
        assert build(Path(release.name), tmp_path / "split", "--executor", address) == 2
    assert "does not see the files of train_1_a_1" in (message := capsys.readouterr().err)
    assert "give an absolute path" in message
    assert not list((tmp_path / "split").rglob("*.parquet"))


def test_without_dask_the_message_says_what_to_install(release, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "distributed", None)
    assert build(release, tmp_path / "split", "--executor", "dask://localhost:8786") == 2
    assert "pip install 'fvlm[dask]'" in capsys.readouterr().err
    assert not (tmp_path / "split").exists()


@pytest.mark.parametrize("executor", ["dask", "dask://", "dask://host", "tcp://host:8786", "threads", "dask://a b:1"])
def test_an_executor_that_nobody_knows(release, tmp_path, capsys, executor):
    assert build(release, tmp_path / "split", "--executor", executor) == 2
    assert "is neither 'processes' nor of the form dask://host:port" in capsys.readouterr().err
    assert not (tmp_path / "split").exists()
