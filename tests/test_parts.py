"""A split built by several tasks: the bytes of one process, and nothing finished while anything is missing."""

import json
import multiprocessing
import os
import sys
from pathlib import Path

import pytest
from tiny_release import REPORT, arrays, contents, ct_rate_release, save_nifti, write_csv

from data_builders.__main__ import main
from data_builders.build import part_of
from data_builders.shards import PROGRESS_FOLDER

NAMES = ("train_1_a_1", "train_2_a_1", "train_3_a_1", "train_4_a_1", "train_5_a_1", "valid_1_a_1", "valid_2_a_1")
OPTIONS = ["--spacing", "3", "4", "4", "--margin", "2", "3", "3", "--rows_per_shard", "2", "--workers", "1"]
SHARDS = [f"train-{index:05d}-of-00003.parquet" for index in range(3)] + ["validation-00000-of-00001.parquet"]


def build(release: Path, out: Path, *more: str) -> int:
    return main(["ct_rate", "--source", str(release), "--out", str(out), *OPTIONS, "--previews", "0", *more])


def merge(out: Path, *parts: Path) -> int:
    return main(["merge", "--out", str(out), *map(str, parts), "--previews", "0"])


def shards_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("volumes/*.parquet"))


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    """With a case that is skipped by the tables, and one that turns out broken."""
    release = ct_rate_release(tmp_path_factory.mktemp("release"), NAMES)
    (release / "dataset" / "metadata").mkdir()
    (release / "dataset" / "metadata" / "no_chest_valid.txt").write_text("valid_2_a_1.nii.gz\n")
    broken = release / "dataset" / "train_fixed" / "train_4" / "train_4_a" / "train_4_a_1.nii.gz"
    broken.write_bytes(broken.read_bytes()[:300])
    return release


@pytest.fixture(scope="module")
def whole(release, tmp_path_factory):
    """Every file of a build in one process."""
    out = tmp_path_factory.mktemp("whole") / "split"
    assert build(release, out) == 0
    assert shards_in(out) == SHARDS
    assert len(json.loads((out / "manifest.json").read_text())["skipped"]) == 2
    return contents(out)


@pytest.mark.parametrize("order", [("1/3", "2/3", "3/3"), ("2/2", "1/2"), ("7/7", "3/7", "1/7", "2/7", "4/7")])
def test_tasks_that_share_a_folder(release, whole, tmp_path, order):
    out = tmp_path / "split"
    for shard in order:
        assert build(release, out, "--shard", shard) == 0
        assert not (out / "manifest.json").exists() and not (out / "README.md").exists()
    assert merge(out) == 0
    assert contents(out) == whole


def test_tasks_that_begin_at_the_same_time(release, whole, tmp_path):
    """Three processes on one new folder: none takes what another has just written for a stranger's."""
    out = tmp_path / "split"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["data_builders.build", "data_builders.ct_rate"])
    tasks = [context.Process(target=run_task, args=(release, out, f"{number}/3")) for number in (1, 2, 3)]
    for task in tasks:
        task.start()
    for task in tasks:
        task.join()
    assert [task.exitcode for task in tasks] == [0, 0, 0]
    assert merge(out) == 0
    assert contents(out) == whole


def run_task(release: Path, out: Path, shard: str) -> None:
    sys.exit(build(release, out, "--shard", shard))


def test_tasks_with_folders_of_their_own(release, whole, tmp_path):
    parts = [tmp_path / f"part{number}" for number in (1, 2)]
    for number, part in enumerate(parts, start=1):
        assert build(release, part, "--shard", f"{number}/2") == 0
    assert [shards_in(part) for part in parts] == [[SHARDS[0], SHARDS[2]], [SHARDS[1], SHARDS[3]]]
    before = [contents(part) for part in parts]
    assert merge(tmp_path / "split", *parts) == 0
    assert contents(tmp_path / "split") == whole
    assert [contents(part) for part in parts] == before, "the parts stay as they are"


def test_parts_on_another_disk_are_copied_and_compared(release, whole, tmp_path, capsys, monkeypatch):
    def no_link(source, target):
        raise OSError("Invalid cross-device link")

    monkeypatch.setattr(os, "link", no_link)
    assert build(release, tmp_path / "part1", "--shard", "1/1") == 0
    assert merge(tmp_path / "split", tmp_path / "part1") == 0
    assert contents(tmp_path / "split") == whole
    damaged = tmp_path / "part1" / "volumes" / SHARDS[1]
    content = bytearray(damaged.read_bytes())
    content[1000] ^= 1
    damaged.write_bytes(content)
    assert merge(tmp_path / "again", tmp_path / "part1") == 2
    assert "does not have the checksum of its record" in capsys.readouterr().err
    assert not (tmp_path / "again" / "manifest.json").exists()


def test_what_is_missing_is_named_with_the_task_that_makes_it(release, whole, tmp_path, capsys):
    out = tmp_path / "split"
    assert build(release, out, "--shard", "1/3") == 0  # shards 1 and 4
    before = contents(out)
    assert merge(out) == 2
    told = " ".join(capsys.readouterr().err.split())
    assert "2 of 4 shards are missing" in told
    assert f"volumes/{SHARDS[1]} (--shard 2/4), volumes/{SHARDS[2]} (--shard 3/4)" in told
    assert contents(out) == before
    for shard in ("2/4", "3/4"):
        assert build(release, out, "--shard", shard) == 0
    assert merge(out) == 0
    assert contents(out) == whole


def test_a_shard_that_was_cut_short_counts_as_missing(release, tmp_path, capsys):
    out = tmp_path / "split"
    assert build(release, out, "--shard", "1/1") == 0
    (out / "volumes" / SHARDS[3]).write_bytes(b"half")
    assert merge(out) == 2
    assert "1 of 4 shards are missing" in capsys.readouterr().err


def test_a_plain_build_finishes_what_tasks_began(release, whole, tmp_path):
    out = tmp_path / "split"
    assert build(release, out, "--shard", "2/3") == 0
    times = [path.stat().st_mtime_ns for path in out.glob("volumes/*.parquet")]
    assert build(release, out) == 0
    assert contents(out) == whole
    assert times[0] in [path.stat().st_mtime_ns for path in out.glob("volumes/*.parquet")], "it was not built again"


def test_a_task_that_is_started_again_leaves_a_finished_split_alone(release, whole, tmp_path):
    out = tmp_path / "split"
    assert build(release, out) == 0
    times = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert build(release, out, "--shard", "2/3") == 0
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == times
    assert merge(out) == 0, "and a second merge finds it finished"
    assert contents(out) == whole


def test_a_task_builds_a_shard_that_a_finished_split_has_lost(release, whole, tmp_path):
    out = tmp_path / "split"
    assert build(release, out) == 0
    (out / "volumes" / SHARDS[1]).unlink()
    assert build(release, out, "--shard", "2/4") == 0
    assert not (out / "manifest.json").exists() and (out / PROGRESS_FOLDER).exists()
    assert merge(out) == 0
    assert contents(out) == whole


def test_a_task_does_not_touch_what_another_one_is_writing(release, tmp_path):
    out = tmp_path / "split"
    assert build(release, out, "--shard", "1/4") == 0
    unfinished = out / "volumes" / f"{SHARDS[2]}.1a2b3c4d.tmp"
    unfinished.write_bytes(b"being written")
    assert build(release, out, "--shard", "2/4") == 0
    assert unfinished.read_bytes() == b"being written"
    assert build(release, out, "--shard", "3/4") == 0
    assert unfinished.read_bytes() == b"being written", "the same task may run twice"
    assert build(release, out, "--shard", "4/4") == 0 and merge(out) == 0
    assert not unfinished.exists()


@pytest.mark.parametrize(
    ("changed", "told"),
    [(["--rows_per_shard", "3"], "rows_per_shard: 2 there, 3 here"), (["--splits", "train"], "options.splits")],
)
def test_parts_of_other_builds_are_refused(release, tmp_path, capsys, changed, told):
    assert build(release, tmp_path / "part1", "--shard", "1/2") == 0
    assert build(release, tmp_path / "part2", "--shard", "2/2", *changed) == 0
    assert merge(tmp_path / "split", tmp_path / "part1", tmp_path / "part2") == 2
    assert told in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "split").exists()


def test_parts_of_another_source_are_refused(release, tmp_path, capsys):
    other = ct_rate_release(tmp_path / "other", NAMES[:4])
    assert build(other, tmp_path / "part2", "--shard", "2/2", "--splits", "train") == 0
    assert build(release, tmp_path / "part3", "--shard", "2/2", "--splits", "train") == 0
    assert merge(tmp_path / "split", tmp_path / "part2", tmp_path / "part3") == 2
    assert "another state of the source" in capsys.readouterr().err


def test_folders_that_hold_no_build_are_refused(release, tmp_path, capsys):
    assert merge(tmp_path / "split") == 2
    assert "holds no build that was begun" in capsys.readouterr().err
    assert build(release, tmp_path / "part1", "--shard", "1/2") == 0
    (tmp_path / "empty").mkdir()
    assert merge(tmp_path / "split", tmp_path / "part1", tmp_path / "empty") == 2
    assert f"{tmp_path / 'empty'} holds no build that was begun" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("shard", ["0/3", "4/3", "1", "a/b", "1/0", "-1/3", "1/3/5"])
def test_a_shard_that_is_none_of_the_tasks(release, tmp_path, capsys, shard):
    assert build(release, tmp_path / "split", f"--shard={shard}") == 2
    assert "is not of the form I/N" in capsys.readouterr().err
    assert not (tmp_path / "split").exists()


def test_the_tasks_take_every_shard_once():
    for step in range(1, 8):
        taken = []
        for number in range(1, step + 1):
            first, by = part_of(f"{number}/{step}")
            taken += range(20)[first::by]
        assert sorted(taken) == list(range(20))


def test_tasks_with_hashed_ids_share_a_salt(tmp_path):
    """Each makes the same pseudonyms, so each knows which shards are its own."""
    for seed, name in enumerate(("anna_1", "berta_2", "clara_3")):
        volume, mask = arrays(seed)
        save_nifti(volume, tmp_path / "ct" / f"{name}.nii.gz")
        save_nifti(mask, tmp_path / "seg" / f"{name}.nii.gz")
    reports = write_csv(tmp_path / "r.csv", [{"id": name, **REPORT} for name in ("anna_1", "berta_2", "clara_3")])

    def run(out: str, *more: str) -> int:
        source = ["--volumes", tmp_path / "ct", "--masks", tmp_path / "seg", "--reports", reports]
        options = [*OPTIONS, "--rows_per_shard", "1", "--previews", "0", "--id_salt", tmp_path / "salt", *more]
        return main(["folder", "--out", str(tmp_path / out), *map(str, [*source, *options])])

    assert run("whole") == 0
    for number in (1, 2):
        assert run(f"part{number}", "--shard", f"{number}/2") == 0
    assert main(["merge", "--out", str(tmp_path / "split"), *(str(tmp_path / f"part{n}") for n in (1, 2))]) == 0
    assert contents(tmp_path / "split" / "volumes") == contents(tmp_path / "whole" / "volumes")
    assert not any(b"berta" in content for content in contents(tmp_path / "part1").values())
    (tmp_path / "salt").write_text("ab" * 32)
    assert run("part3", "--shard", "2/2") == 0
    assert main(["merge", "--out", str(tmp_path / "no"), str(tmp_path / "part1"), str(tmp_path / "part3")]) == 2
