"""Where cases are prepared makes no difference: this process, workers beside it, a dask cluster."""

import sys
from pathlib import Path

import pytest
from tiny_release import contents, ct_rate_release

from data_builders import run_cases
from data_builders.__main__ import main
from data_builders.run_cases import in_order

NAMES = tuple(f"train_{number}_a_1" for number in range(1, 6))
OPTIONS = ["--spacing", "3", "4", "4", "--margin", "2", "3", "3", "--rows_per_shard", "2", "--previews", "0"]


def build(release: Path, out: Path, *more: str) -> int:
    return main(["ct_rate", "--source", str(release), "--out", str(out), "--splits", "train", *OPTIONS, *more])


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    """With a case that turns out broken in the middle."""
    release = ct_rate_release(tmp_path_factory.mktemp("release"), NAMES)
    broken = release / "dataset" / "train_fixed" / "train_3" / "train_3_a" / "train_3_a_1.nii.gz"
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
    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, processes=False, protocol="tcp://", host="127.0.0.1", dashboard_address=None
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
        rows = in_order(submit, cases, most_pending)
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
