"""A build that is stopped at any moment, by whatever: it says what to do, loses nothing, and ends in the same bytes."""

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from hub_stand_in import hub_stand_in
from killing import run_killed
from tiny_release import command, contents, ct_rate_release, mask_of, volume_of

from data_builders import build as build_module
from data_builders import run_cases
from data_builders.__main__ import main
from data_builders.progress import is_disk_full
from data_builders.shards import PROGRESS_FOLDER, SCHEMA, VANISHED, RowFile
from data_builders.sources import SourceError

REPOSITORY = Path(__file__).resolve().parents[1]
NAMES = ("train_1_a_1", "train_2_a_1", "train_3_a_1", "train_4_a_1", "train_5_a_1", "valid_1_a_1")
PICTURES = ("--previews", "1")


@pytest.fixture(scope="module")
def undisturbed(release, tmp_path_factory):
    """Every file of a build that nothing happened to."""
    out = tmp_path_factory.mktemp("undisturbed") / "split"
    assert main(command(release, out)) == 0
    files = contents(out)
    assert {"README.md", "manifest.json"} < files.keys() and len(files) == 6
    return files


@pytest.fixture(scope="module")
def with_pictures(release, undisturbed, tmp_path_factory):
    """The same with a preview for each split, which takes longer than everything else."""
    out = tmp_path_factory.mktemp("with_pictures") / "split"
    assert main(command(release, out, *PICTURES)) == 0
    files = contents(out)
    assert files.keys() - undisturbed.keys() == {
        f"previews/{p}.png" for p in ("train-000-train_1_a_1", "validation-000-valid_1_a_1")
    }
    return files


# ------------------------------------------------------------------------------------------------------------- SIGKILL
def test_killed_again_and_again(release, undisturbed, tmp_path):
    """Five kills in one folder, each run getting a little further; the last of them after most shards are there.

    With some versions of the libraries a shard takes more changes of the folder, and so more kills.
    """
    out = tmp_path / "split"
    for number, moment in enumerate((2, 9, 24, 24, 24, 27, 30, 34)):
        if number >= 5 and len(list(out.glob("volumes/*.parquet"))) >= 2:
            break
        assert run_killed(command(release, out), moment), f"run {number} ended before it was killed"
        assert not (out / "manifest.json").exists(), "a manifest says that the split is complete"
    assert len(list(out.glob("volumes/*.parquet"))) >= 2, "the runs must have come somewhere"
    assert main(command(release, out)) == 0
    assert contents(out) == undisturbed


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_killed_at_every_single_moment(release, with_pictures, tmp_path):
    """Before each rename, sync, removal: also between manifest and clean-up, where a split is complete and busy."""
    assert not run_killed(command(release, tmp_path / "whole", *PICTURES), 10**9, tmp_path / "told")
    status, count = map(int, (tmp_path / "told").read_text().split())
    assert status == 0 and count > 40
    after_manifest = 0
    for moment in range(1, count + 1):
        out = tmp_path / f"killed_{moment}"
        assert run_killed(command(release, out, *PICTURES), moment)
        after_manifest += (out / "manifest.json").exists()
        assert main(command(release, out, *PICTURES)) == 0
        assert contents(out) == with_pictures, f"killed at moment {moment} of {count}"
        shutil.rmtree(out)
    assert after_manifest >= 5


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_finished_split_that_is_built_again_and_killed(release, undisturbed, tmp_path):
    assert main(command(release, tmp_path / "whole")) == 0
    moment, was_killed = 0, True
    while was_killed:
        moment += 1
        out = tmp_path / f"killed_{moment}"
        shutil.copytree(tmp_path / "whole", out)
        was_killed = run_killed(command(release, out), moment)
        assert main(command(release, out)) == 0
        assert contents(out) == undisturbed, f"killed at moment {moment}"
    assert moment > 20


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_thirty_random_kills_of_the_whole_process_group(tmp_path):
    """The command itself with two workers, on a synthetic release; a run that ends begins anew elsewhere."""
    release = tmp_path / "release"
    patients = ["--patients", "36", "--validation", "4", "--seed", "0", "--spacing", "24", "8", "8", "--workers", "1"]
    assert main(["synthetic", "--out", str(release), *patients]) == 0

    def arguments(out: Path) -> list[str]:
        options = ["--spacing", "24", "8", "8", "--rows_per_shard", "2", "--previews", "1", "--workers", "2"]
        return ["ct_rate", "--source", str(release), "--out", str(out), *options]

    assert main(arguments(tmp_path / "undisturbed")) == 0
    undisturbed = contents(tmp_path / "undisturbed")
    assert len(undisturbed) > 15
    seed = random.SystemRandom().randrange(2**32)
    draw, kills, midway, folders = random.Random(seed), 0, 0, [tmp_path / "split_0"]
    while True:
        out = folders[-1]
        before = contents(out) if out.exists() else {}
        line = [sys.executable, "-m", "data_builders", *arguments(out)]
        process = subprocess.Popen(line, cwd=REPOSITORY, start_new_session=True, stdout=subprocess.DEVNULL)
        if kills < 30:
            # Most of a run is the start of Python and of its workers. So the clock is set when something can be seen:
            # one time in three at the first change in the folder, else when a shard (or the whole) has been finished.
            num_shards = 0 if draw.random() < 1 / 3 else len(list(out.glob("volumes/*.parquet"))) + 1
            while process.poll() is None and not has_come_on(out, before, num_shards):
                time.sleep(0.005)
            try:
                process.wait(draw.uniform(0, 0.6))
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                kills += 1
                midway += bool(list(out.glob("volumes/*.parquet"))) and not (out / "manifest.json").exists()
        status = process.wait(600)
        if status == -signal.SIGKILL:
            continue
        assert status == 0, f"seed {seed}: after {kills} kills"
        assert contents(out) == undisturbed, f"seed {seed}: after {kills} kills"
        if kills == 30:
            break
        folders.append(tmp_path / f"split_{len(folders)}")
    assert midway >= 5, f"seed {seed}: the kills came before anything was written"


def has_come_on(out: Path, before: dict[str, bytes], num_shards: int) -> bool:
    """Whether a process at work in a folder has changed it, or (`num_shards` above 0) finished so many shards."""
    if num_shards and not (out / "manifest.json").exists():
        return len(list(out.glob("volumes/*.parquet"))) >= num_shards
    try:
        return contents(out) != before
    except FileNotFoundError:  # gone between two looks
        return True


def test_copies_of_a_killed_build_are_removed_by_the_next(release, undisturbed, tmp_path, monkeypatch):
    """A remote source, and kills on the way: some hit while a volume lies in TMPDIR."""
    out, temporary, left = tmp_path / "split", tmp_path / "temporary", set()
    temporary.mkdir()
    with hub_stand_in() as hub:
        hub.put_all("dataset", "owner/release", contents(release))
        environment = {"HF_ENDPOINT": hub.endpoint, "TMPDIR": str(temporary)}
        arguments = command("hf://datasets/owner/release", out)
        moment = 260  # the tables have been read by then
        while len(left) < 2:
            moment += 30
            assert run_killed(arguments, moment, **environment), "no kill hit a volume in the making"
            left |= {path.name for path in temporary.rglob("*.nii.gz")}
            assert len(list(temporary.iterdir())) <= 2, "what earlier ones left is gone"
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        monkeypatch.setattr(tempfile, "tempdir", str(temporary))
        assert main(arguments) == 0
    assert list(temporary.iterdir()) == []
    assert {name: data for name, data in contents(out).items() if name.endswith(".parquet")} == {
        name: data for name, data in undisturbed.items() if name.endswith(".parquet")
    }


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_workers_do_not_outlive_a_builder_that_is_killed(tmp_path):
    release = ct_rate_release(tmp_path / "release", tuple(f"train_{number}_a_1" for number in range(1, 60)))
    arguments = command(release, tmp_path / "split", "--splits", "train", "--rows_per_shard", "1")
    arguments[arguments.index("--workers") + 1] = "2"
    process = subprocess.Popen(
        [sys.executable, "-m", "data_builders", *arguments],
        cwd=REPOSITORY,
        start_new_session=True,
        stdout=subprocess.DEVNULL,
    )
    while process.poll() is None and not list((tmp_path / "split").glob("volumes/*.parquet")):
        time.sleep(0.01)
    process.kill()  # itself alone, not its group
    process.wait()
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGKILL)
    raise AssertionError("30 seconds later there are still processes of its group")


# ----------------------------------------------------------------------------------------------- what can be told of
def disturb(monkeypatch, action, shard_number: int = 1) -> None:
    """Do something right before the shard of this number (from 0) is built."""
    write_shard, written = build_module.write_shard, []

    def disturbed(folder, shard, built, configs):
        if len(written) == shard_number:
            action()
        written.append(shard)
        return write_shard(folder, shard, built, configs)

    monkeypatch.setattr(build_module, "write_shard", disturbed)


def stops(release, out, capsys, monkeypatch, action, *more: str) -> str:
    """A build during which something happens: status 2, the first shard stays, nothing half written; what it says."""
    with monkeypatch.context() as patch:
        disturb(patch, lambda: action(patch))
        assert main(command(release, out, *more)) == 2
    assert [path.name for path in out.glob("volumes/*")] == ["train-00000-of-00003.parquet"]
    assert not (out / "manifest.json").exists() and (out / PROGRESS_FOLDER / "identity.json").exists()
    message = capsys.readouterr().err
    assert "What is finished stays; run the same command again" in message
    return message


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_cleanly(release, undisturbed, tmp_path, capsys, monkeypatch, number):
    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    out = tmp_path / "split"
    message = stops(release, out, capsys, monkeypatch, lambda patch: os.kill(os.getpid(), number))
    assert message.startswith("error: stopped by a signal.")
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == handlers
    assert main(command(release, out)) == 0
    assert contents(out) == undisturbed


@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOSPC, "No space left on device"), OSError("Detail: [errno 122] Disk quota exceeded")],
)
def test_a_full_disk_stops_cleanly(release, undisturbed, tmp_path, capsys, monkeypatch, error):
    def full(self, table):
        raise error

    out = tmp_path / "split"
    message = stops(
        release, out, capsys, monkeypatch, lambda patch: patch.setattr(pq.ParquetWriter, "write_table", full)
    )
    assert f"the disk of --out {out} is full" in message and "Free some space there first" in message
    assert main(command(release, out)) == 0
    assert contents(out) == undisturbed


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, a disk that is always full")
def test_arrow_on_a_disk_that_is_really_full(tmp_path):
    """What Arrow raises is known for a full disk, and what is half written can be abandoned."""
    file = RowFile(tmp_path / "x.parquet", SCHEMA)
    file.unfinished.symlink_to("/dev/full")
    with pytest.raises(OSError) as caught:
        for _ in range(100):
            file.write({"recon_id": "x", "volume": bytes(1 << 20), "shape": [1, 1, 1], "spacing": [1, 1, 1]})
        file.finish()
    assert is_disk_full(caught.value)
    file.abandon()
    assert list(tmp_path.iterdir()) == []


def test_other_faults_of_a_disk_are_not_called_full():
    assert not is_disk_full(OSError(errno.EIO, "Input/output error"))
    assert not is_disk_full(OSError("nothing but words"))


def test_a_full_disk_for_temporary_files_stops_cleanly(release, undisturbed, tmp_path, capsys, monkeypatch):
    def full(file):
        raise OSError(errno.ENOSPC, "No space left on device")

    out = tmp_path / "split"
    message = stops(release, out, capsys, monkeypatch, lambda patch: patch.setattr(run_cases, "local_copy", full))
    assert "TMPDIR" in message
    assert main(command(release, out)) == 0
    assert contents(out) == undisturbed


def test_a_source_that_stops_answering_stops_cleanly(release, undisturbed, tmp_path, capsys, monkeypatch):
    """Not one case is skipped for it: it would be missing for ever."""

    def silent(file):
        raise SourceError(f"{file.name}: the source does not answer.")

    out = tmp_path / "split"
    message = stops(release, out, capsys, monkeypatch, lambda patch: patch.setattr(run_cases, "local_copy", silent))
    assert "the source does not answer" in message
    assert main(command(release, out)) == 0
    assert contents(out) == undisturbed


def test_a_worker_that_the_system_ends_stops_cleanly(release, undisturbed, tmp_path, capsys, monkeypatch):
    def ended(patch):
        raise BrokenProcessPool("A process in the process pool was terminated abruptly")

    out = tmp_path / "split"
    assert "Fewer --workers" in stops(release, out, capsys, monkeypatch, ended)
    assert main(command(release, out)) == 0
    assert contents(out) == undisturbed


# --------------------------------------------------------------------------------------------------- vanished sources
@pytest.fixture
def own_release(release, tmp_path):
    return Path(shutil.copytree(release, tmp_path / "release"))


@pytest.mark.parametrize(("place", "kind"), [(volume_of, "volume"), (mask_of, "mask")])
def test_one_file_that_vanishes_is_skipped_and_tried_again(
    own_release, undisturbed, tmp_path, monkeypatch, place, kind
):
    out, gone = tmp_path / "split", place(own_release, "train_1_a_1")
    with monkeypatch.context() as patch:
        disturb(patch, lambda: gone.rename(tmp_path / "taken.nii.gz"), shard_number=0)
        assert main(command(own_release, out)) == 0
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["skipped"] == [{"split": "train", "case": "train_1_a_1", "reason": f"the {kind} file {VANISHED}"}]
    (tmp_path / "taken.nii.gz").rename(gone)
    assert main(command(own_release, out)) == 0
    assert contents(out) == undisturbed, "the reason was not remembered"


def test_a_case_that_comes_back_takes_its_place_among_the_pictures(own_release, with_pictures, tmp_path, monkeypatch):
    out, gone = tmp_path / "split", volume_of(own_release, "train_1_a_1")
    with monkeypatch.context() as patch:
        disturb(patch, lambda: gone.rename(tmp_path / "taken.nii.gz"), shard_number=0)
        assert main(command(own_release, out, *PICTURES)) == 0
    assert [path.name for path in out.glob("previews/train*")] == ["train-000-train_2_a_1.png"]
    (tmp_path / "taken.nii.gz").rename(gone)
    assert main(command(own_release, out, *PICTURES)) == 0
    assert contents(out) == with_pictures


def test_a_file_that_stays_away_is_another_source(own_release, tmp_path, capsys, monkeypatch):
    """Its case would come back with another reason: that is not the build that was begun."""
    out = tmp_path / "split"
    with monkeypatch.context() as patch:
        disturb(patch, volume_of(own_release, "train_1_a_1").unlink, shard_number=0)
        assert main(command(own_release, out)) == 0
    before = contents(out)
    assert main(command(own_release, out)) == 2
    assert "a file is gone" in capsys.readouterr().err
    assert contents(out) == before


def test_strict_stops_at_a_file_that_vanishes(own_release, tmp_path, capsys, monkeypatch):
    disturb(monkeypatch, volume_of(own_release, "train_3_a_1").unlink)
    assert main(command(own_release, tmp_path / "split", "--strict")) == 2
    assert f"train_3_a_1: the volume file {VANISHED}" in capsys.readouterr().err


@pytest.mark.parametrize("is_mounted", [False, True])
def test_a_source_that_is_gone_stops_the_build(own_release, undisturbed, tmp_path, capsys, monkeypatch, is_mounted):
    """The folder itself is gone, or what is left of it is the empty folder on which a share was mounted."""
    out, volumes, away = tmp_path / "split", own_release / "dataset" / "train_fixed", tmp_path / "away"

    def take_away(patch):
        volumes.rename(away)
        if is_mounted:
            volumes.mkdir()

    message = stops(own_release, out, capsys, monkeypatch, take_away, "--splits", "train")
    assert f"the source {volumes} is gone. Bring it back." in message
    if is_mounted:
        volumes.rmdir()
    away.rename(volumes)
    assert main(command(own_release, out, "--splits", "train")) == 0
    files = contents(out)
    assert {name: files[name] for name in files if "train-0" in name} == {
        name: undisturbed[name] for name in undisturbed if "train-0" in name
    }


def test_many_files_gone_in_a_row_are_a_source_that_is_gone(own_release, tmp_path, capsys, monkeypatch):
    def take_away(patch):
        patch.setattr(run_cases, "MOST_VANISHED_IN_A_ROW", 2)
        for name in ("train_3_a_1", "train_4_a_1"):
            volume_of(own_release, name).unlink()

    message = stops(own_release, tmp_path / "split", capsys, monkeypatch, take_away)
    assert "2 cases in a row had a file that is gone" in message
