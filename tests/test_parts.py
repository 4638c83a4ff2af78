"""A split built by several tasks: the bytes of one process, and nothing finished while anything is missing."""

import json
import multiprocessing
import os
import sys
from pathlib import Path

import pytest
from killing import run_killed
from tiny_release import GEOMETRY, REPORT, arrays, command, contents, ct_rate_release, save_nifti, volume_of, write_csv

from data_builders import build as build_module
from data_builders import progress
from data_builders.__main__ import main
from data_builders.build import part_of
from data_builders.shards import PROGRESS_FOLDER

NAMES = ("train_1_a_1", "train_2_a_1", "train_3_a_1", "train_4_a_1", "train_5_a_1", "valid_1_a_1", "valid_2_a_1")
SHARDS = [f"train-{index:05d}-of-00003.parquet" for index in range(3)] + ["validation-00000-of-00001.parquet"]


def build(release: Path, out: Path, *more: str) -> int:
    return main(command(release, out, *more))


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
    broken = volume_of(release, "train_4_a_1")
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


def test_a_task_of_another_build_that_begins_at_the_same_time(release, tmp_path, capsys, monkeypatch):
    """Both have seen a new folder. The second one must not add shards of other settings to those of the first."""
    out, begin, read = tmp_path / "split", build_module.continue_or_begin, progress.read_identity

    def overtaken(folder):
        before = read(folder)
        monkeypatch.setattr(progress, "read_identity", read)
        monkeypatch.setattr(build_module, "continue_or_begin", begin)
        assert build(release, out, "--shard", "1/3") == 0
        return before

    def beginning(*arguments, **options):
        monkeypatch.setattr(progress, "read_identity", overtaken)
        return begin(*arguments, **options)

    monkeypatch.setattr(build_module, "continue_or_begin", beginning)
    assert build(release, out, "--shard", "2/3", "--rows_per_shard", "1") == 2
    assert "begun with other settings (rows_per_shard: 2 there, 1 here)" in " ".join(capsys.readouterr().err.split())
    assert shards_in(out) == [SHARDS[0], SHARDS[3]]


def test_tasks_on_a_file_system_without_links(release, whole, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "link", no_link)
    for shard in ("1/2", "2/2"):
        assert build(release, tmp_path / "split", "--shard", shard) == 0
    assert merge(tmp_path / "split") == 0
    assert contents(tmp_path / "split") == whole


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


def no_link(source, target):
    raise OSError("Invalid cross-device link")


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[1000] ^= 1
    path.write_bytes(content)


def test_parts_on_another_disk_are_copied(release, whole, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "link", no_link)
    assert build(release, tmp_path / "part1", "--shard", "1/1") == 0
    assert merge(tmp_path / "split", tmp_path / "part1") == 0
    assert contents(tmp_path / "split") == whole
    assert not (tmp_path / "split" / "volumes" / SHARDS[0]).samefile(tmp_path / "part1" / "volumes" / SHARDS[0])


@pytest.mark.parametrize("way", ["linked", "copied", "in place"])
def test_damaged_shards_are_named_and_built_again(release, whole, tmp_path, capsys, monkeypatch, way):
    part, out = tmp_path / "part", tmp_path / ("part" if way == "in place" else "split")
    parts = [] if way == "in place" else [part]
    assert build(release, part, "--shard", "1/1") == 0
    for name in (SHARDS[1], SHARDS[3]):
        flip_a_bit(part / "volumes" / name)
    with monkeypatch.context() as patch:
        if way == "copied":
            patch.setattr(os, "link", no_link)
        assert merge(out, *parts) == 2
    told = capsys.readouterr().err
    assert f"volumes/{SHARDS[1]} (--shard 2/4), volumes/{SHARDS[3]} (--shard 4/4) in {part}: damaged" in told
    assert not (out / "manifest.json").exists()
    assert way == "in place" or SHARDS[1] not in shards_in(out), "what is damaged is not handed on"
    for number in (2, 4):
        (part / "volumes" / SHARDS[number - 1]).unlink()
        assert build(release, part, "--shard", f"{number}/4") == 0
    assert merge(out, *parts) == 0
    assert contents(out) == whole


def test_checksums_may_be_left_out(release, whole, tmp_path):
    assert build(release, tmp_path / "part1", "--shard", "1/1") == 0
    flip_a_bit(tmp_path / "part1" / "volumes" / SHARDS[1])
    options = ["--out", str(tmp_path / "split"), str(tmp_path / "part1"), "--previews", "0", "--no_checksums"]
    assert main(["merge", *options]) == 0
    files = contents(tmp_path / "split")
    assert {name for name in files if files[name] != whole[name]} == {f"volumes/{SHARDS[1]}"}


def parts_of(release: Path, tmp_path: Path) -> list[Path]:
    parts = [tmp_path / f"part{number}" for number in (1, 2)]
    for number, part in enumerate(parts, start=1):
        assert build(release, part, "--shard", f"{number}/2") == 0
    return parts


def merge_command(out: Path, parts: list[Path]) -> list[str]:
    return ["merge", "--out", str(out), *map(str, parts), "--previews", "0"]


def num_moments(release: Path, tmp_path: Path, parts: list[Path]) -> int:
    """How many changes of a folder a merge makes."""
    assert not run_killed(merge_command(tmp_path / "counted", parts), 10**9, tmp_path / "told")
    status, count = map(int, (tmp_path / "told").read_text().split())
    assert status == 0 and count > 40
    return count


@pytest.mark.parametrize("names", ["parts", "nothing"])
def test_a_merge_killed_while_it_cleans_up_is_continued(release, whole, tmp_path, names):
    """The manifest is there, and of what was noted a part: no shard is missing, and no task has to run again."""
    parts = parts_of(release, tmp_path)
    count, left = num_moments(release, tmp_path, parts), set()
    for moment in range(count - 6, count + 1):
        out = tmp_path / f"killed_{moment}"
        assert run_killed(merge_command(out, parts), moment)
        assert (out / "manifest.json").exists(), "the manifest comes before the clean-up"
        left.add(len(list((out / PROGRESS_FOLDER).iterdir())))
        assert build(release, out, "--shard", "1/2") == 0, "a task that a batch system starts once more"
        assert main(merge_command(out, parts if names == "parts" else [])) == 0
        assert contents(out) == whole
    assert left == set(range(7)), "there is a moment before each file is removed"


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_merge_killed_at_every_moment_is_continued(release, whole, tmp_path):
    parts = parts_of(release, tmp_path)
    for moment in range(1, num_moments(release, tmp_path, parts) + 1):
        out = tmp_path / f"killed_{moment}"
        assert run_killed(merge_command(out, parts), moment)
        assert main(merge_command(out, parts)) == 0
        assert contents(out) == whole, f"killed at moment {moment}"


def test_a_finished_split_that_has_lost_a_shard_names_it(release, whole, tmp_path, capsys):
    out = tmp_path / "split"
    assert build(release, out) == 0
    (out / "volumes" / SHARDS[2]).unlink()
    assert merge(out) == 2
    assert f"is a finished split, but volumes/{SHARDS[2]} are missing or cut short" in capsys.readouterr().err
    assert build(release, out, "--shard", "3/4") == 0 and merge(out) == 0
    assert contents(out) == whole


def test_a_task_tells_what_is_there_of_the_whole(release, tmp_path, capsys):
    out = tmp_path / "split"
    assert build(release, out, "--shard", "1/3") == 0  # shards 1 and 4
    assert f"2 shards of this task are built; of the split, 2 of 4 shards lie in {out}" in said(capsys)
    assert build(release, out, "--shard", "2/3") == 0
    assert f"1 shard of this task is built; of the split, 3 of 4 shards lie in {out}" in said(capsys)
    assert build(release, out, "--shard", "3/3") == 0
    told = said(capsys)
    assert "4 of 4 shards lie" in told and f"data_builders merge --out {out}" in told
    assert "Tasks with folders of their own" not in told


def said(capsys) -> str:
    return " ".join(capsys.readouterr().out.split())


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


@pytest.fixture
def own_scans(tmp_path):
    """A function that builds three scans with hashed ids into a folder."""
    names = ("anna_1", "berta_2", "clara_3")
    for seed, name in enumerate(names):
        volume, mask = arrays(seed)
        save_nifti(volume, tmp_path / "ct" / f"{name}.nii.gz")
        save_nifti(mask, tmp_path / "seg" / f"{name}.nii.gz")
    reports = write_csv(tmp_path / "r.csv", [{"id": name, **REPORT} for name in names])

    def run(out: str, *more: str) -> int:
        source = ["--volumes", tmp_path / "ct", "--masks", tmp_path / "seg", "--reports", reports]
        options = [*GEOMETRY, "--rows_per_shard", "1", "--workers", "1", "--previews", "0", *more]
        return main(["folder", "--out", str(tmp_path / out), *map(str, [*source, *options])])

    return run


def test_tasks_with_hashed_ids_share_a_salt(own_scans, tmp_path, capsys):
    """Each makes the same pseudonyms, so each knows which shards are its own."""
    salt = ("--id_salt", str(tmp_path / "salt"))
    assert own_scans("whole", *salt) == 0
    for number in (1, 2):
        assert own_scans(f"part{number}", "--shard", f"{number}/2", *salt) == 0
    assert "salt" not in said(capsys), "there is nothing to warn of"
    assert merge(tmp_path / "split", tmp_path / "part1", tmp_path / "part2") == 0
    assert contents(tmp_path / "split" / "volumes") == contents(tmp_path / "whole" / "volumes")
    assert not any(b"berta" in content for content in contents(tmp_path / "part1").values())


def test_tasks_with_salts_of_their_own_are_warned(own_scans, tmp_path, capsys, monkeypatch):
    """Before anything is built, when a task ends, and when the parts do not fit together."""

    def too_late(*arguments):
        assert f"under the salt {tmp_path / 'part1.salt'}" in (told := said(capsys)) and "one --id_salt FILE" in told
        return write_shards(*arguments)

    write_shards = build_module.write_shards
    with monkeypatch.context() as patch:
        patch.setattr(build_module, "write_shards", too_late)
        assert own_scans("part1", "--shard", "1/2") == 0
    assert "merge --out SPLIT FOLDER FOLDER ..., if all of them had this task's --id_salt FILE" in said(capsys)
    assert own_scans("part2", "--shard", "2/2") == 0
    assert merge(tmp_path / "split", tmp_path / "part1", tmp_path / "part2") == 2
    told = " ".join(capsys.readouterr().err.split())
    assert "id_salt_check: " in told and "Give all tasks one --id_salt FILE" in told
    assert not (tmp_path / "split").exists()


@pytest.mark.parametrize("option", ["--id_salt", "--id_key"])
def test_options_of_hashed_ids_are_refused_where_ids_are_kept(release, tmp_path, capsys, option):
    assert build(release, tmp_path / "split", option, str(tmp_path / "file")) == 2
    assert f"{option} is for hashed ids" in capsys.readouterr().err
    assert not (tmp_path / "split").exists() and not (tmp_path / "file").exists()
