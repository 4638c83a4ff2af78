"""A source that changes while its split is built, or afterwards: what was mended goes in, what was written stays.

However often and wherever a build was stopped, it ends in the bytes of a fresh build of the source as it is at the end.
"""

import json
import shutil
from pathlib import Path

import pytest
from hub_stand_in import hub_stand_in
from killing import run_killed
from tiny_release import (
    GEOMETRY,
    REPORT,
    arrays,
    command,
    contents,
    ct_rate_release,
    mask_of,
    save_nifti,
    volume_of,
    write_csv,
)

from data_builders import build as build_module
from data_builders.__main__ import main
from data_builders.cases import source_fingerprint, with_digests
from data_builders.progress import open_source, with_commit
from data_builders.shards import PROGRESS_FOLDER, libraries

NAMES = ("train_1_a_1", "train_2_a_1", "train_3_a_1", "train_4_a_1", "train_5_a_1", "valid_1_a_1")
REPO = "owner/release"


@pytest.fixture(scope="module")
def fresh(release, tmp_path_factory):
    """Every file of a build of the mended source."""
    out = tmp_path_factory.mktemp("fresh") / "split"
    assert main(command(release, out)) == 0
    return contents(out)


@pytest.fixture
def own_release(release, tmp_path) -> Path:
    return Path(shutil.copytree(release, tmp_path / "release"))


def cut_short(path: Path) -> bytes:
    """Break a file; returns its sound content."""
    sound = path.read_bytes()
    path.write_bytes(sound[:300])
    return sound


def times(out: Path) -> dict[str, int]:
    """When each shard was written, by its place; which changes when it is built again, and not when it is renamed."""
    return {path.name[: path.name.index("-of")]: path.stat().st_mtime_ns for path in out.glob("*/*.parquet")}


def skipped(out: Path) -> dict[str, str]:
    return {entry["case"]: entry["reason"] for entry in json.loads((out / "manifest.json").read_text())["skipped"]}


def stop_after(monkeypatch, num_shards: int) -> None:
    """Let the next build stop at the beginning of a later shard, as by Ctrl-C."""
    write_shard, written = build_module.write_shard, []

    def stopping(folder, shard, built, configs):
        if len(written) == num_shards:
            raise KeyboardInterrupt
        written.append(shard.file)
        return write_shard(folder, shard, built, configs)

    monkeypatch.setattr(build_module, "write_shard", stopping)


# ------------------------------------------------------------------------------------------------------- what is mended
@pytest.mark.parametrize("place", [volume_of, mask_of])
@pytest.mark.parametrize("configs", [["volumes"], ["volumes", "organ_crops"]])
def test_a_file_that_was_broken(own_release, release, fresh, tmp_path, capsys, place, configs):
    out, broken = tmp_path / "split", place(own_release, "train_3_a_1")
    sound = cut_short(broken)
    assert main(command(own_release, out, "--configs", *configs)) == 0
    assert "Fetch the file again" in skipped(out)["train_3_a_1"]
    before = times(out)
    capsys.readouterr()
    assert main(command(own_release, out, "--configs", *configs)) == 0
    assert times(out) == before, "what comes back the same is not built again"
    assert "4 of 4 shards are complete; nothing is left to build." in capsys.readouterr().out
    broken.write_bytes(sound)
    assert main(command(own_release, out, "--configs", *configs)) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "1 case that was not written has changed since this build began (train_3_a_1 first)" in told
    assert "3 of 4 shards are complete; building the rest." in told
    if len(configs) == 2:
        assert main(command(release, tmp_path / "both", "--configs", *configs)) == 0
        fresh = contents(tmp_path / "both")
    assert contents(out) == fresh
    assert {name for name, time in times(out).items() if time != before[name]} == {"train-00001"}


def test_a_file_that_is_mended_before_the_build_is_through(own_release, fresh, tmp_path, monkeypatch):
    out, broken = tmp_path / "split", volume_of(own_release, "train_1_a_1")
    sound = cut_short(broken)
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        assert main(command(own_release, out)) == 2
    before = times(out)
    broken.write_bytes(sound)
    assert main(command(own_release, out)) == 0
    assert contents(out) == fresh
    assert before["train-00000"] != times(out)["train-00000"] and before["train-00001"] == times(out)["train-00001"]


@pytest.mark.parametrize("is_moved", [False, True])
def test_a_mended_file_of_the_same_size(own_release, fresh, tmp_path, is_moved):
    """Flipped bits: neither name nor size tells that the file is another. A file that was moved there is older."""
    out, broken = tmp_path / "split", volume_of(own_release, "train_5_a_1")
    sound = broken.read_bytes()
    kept = shutil.copy2(broken, tmp_path / "kept.nii.gz")
    broken.write_bytes(sound[:300] + bytes(100) + sound[400:])
    assert main(command(own_release, out)) == 0
    assert list(skipped(out)) == ["train_5_a_1"]
    before = times(out)
    if is_moved:
        Path(kept).replace(broken)
    else:
        broken.write_bytes(sound)
    assert main(command(own_release, out)) == 0
    assert contents(out) == fresh
    assert {name for name in before if times(out)[name] != before[name]} <= {"train-00002"}


@pytest.mark.parametrize(
    ("name", "kept"),
    [
        ("train_1_a_1", {"validation-00000"}),  # all rows of its split move up by one
        ("train_2_a_1", {"validation-00000"}),  # its report is that of later cases, which are duplicates now
        ("train_5_a_1", {"validation-00000", "train-00000", "train-00001"}),
    ],
)
def test_a_file_that_was_missing(own_release, fresh, tmp_path, name, kept):
    """There is a shard more than before, so that all of them have other names."""
    out, missing = tmp_path / "split", volume_of(own_release, name)
    missing.rename(tmp_path / "away.nii.gz")
    assert main(command(own_release, out)) == 0
    assert skipped(out) == {name: "volume file is missing"} and len(list(out.glob("volumes/train*"))) == 2
    before = times(out)
    (tmp_path / "away.nii.gz").rename(missing)
    assert main(command(own_release, out)) == 0
    assert contents(out) == fresh
    after = times(out)
    assert {shard for shard in after if after[shard] == before.get(shard)} == kept


def test_a_report_of_a_case_that_was_not_built_yet(own_release, tmp_path, monkeypatch):
    out = tmp_path / "split"
    with monkeypatch.context() as patch:
        stop_after(patch, 1)
        assert main(command(own_release, out)) == 2
    change_report(own_release, "train_4_a_1", "12 mm", "13 mm")
    assert main(command(own_release, out)) == 0
    assert main(command(own_release, tmp_path / "fresh")) == 0
    assert contents(out) == contents(tmp_path / "fresh")


def test_hashed_ids(tmp_path, capsys, monkeypatch):
    """The same, and what the manifest tells of the cases and of the source hangs on the salt: names of files cannot be
    tried out, and who has the source and the split's ids cannot tell that it was built from that source.
    """
    seen = []
    monkeypatch.setattr(
        build_module, "with_digests", lambda cases, *salt: seen.append(cases) or with_digests(cases, *salt)
    )
    for seed, name in enumerate(("anna_1", "berta_2")):
        volume, mask = arrays(seed)
        save_nifti(volume, tmp_path / "ct" / f"{name}.nii.gz")
        save_nifti(mask, tmp_path / "seg" / f"{name}.nii.gz")
    reports = write_csv(tmp_path / "r.csv", [{"id": name, **REPORT} for name in ("anna_1", "berta_2")])

    def build(out: str, salt: str, *more: str) -> int:
        source = ["--volumes", tmp_path / "ct", "--masks", tmp_path / "seg", "--reports", reports]
        options = [*GEOMETRY, "--rows_per_shard", "1", "--workers", "1", "--previews", "0"]
        options += ["--id_salt", tmp_path / salt, *more]
        return main(["folder", "--out", str(tmp_path / out), *map(str, [*source, *options])])

    def digests(out: str) -> set[str]:
        records = json.loads((tmp_path / out / "manifest.json").read_text())["shards"]
        return {digest for record in records for digest in record["cases"].values()}

    sound = cut_short(tmp_path / "ct" / "berta_2.nii.gz")
    assert build("split", "salt") == 0
    (tmp_path / "ct" / "berta_2.nii.gz").write_bytes(sound)
    assert build("split", "salt") == 0
    assert build("fresh", "salt") == build("other", "other_salt") == 0
    assert contents(tmp_path / "split") == contents(tmp_path / "fresh")
    assert len(digests("fresh")) == len(digests("other")) == 2 and not digests("fresh") & digests("other")
    whole = json.loads((tmp_path / "other" / "manifest.json").read_text())["source_sha256"]
    assert len(whole) == 64 and whole != source_fingerprint(seen[-1])
    # A build from before the hash of the source was salted goes on, and builds nothing again.
    before, manifest = times(tmp_path / "other"), tmp_path / "other" / "manifest.json"
    finished = manifest.read_text()
    manifest.write_text(finished.replace(whole, source_fingerprint(seen[-1])))
    assert build("other", "other_salt") == 0
    assert manifest.read_text() == finished and times(tmp_path / "other") == before
    cut_short(tmp_path / "ct" / "anna_1.nii.gz")
    capsys.readouterr()
    assert build("split", "salt", "--id_key", str(tmp_path / "key.csv")) == 2
    told = capsys.readouterr().err
    named = told[told.index("source: ") :].split()[1]
    assert f"anna_1,{named}\n" in (tmp_path / "key.csv").read_text()
    assert f"was written to {tmp_path / 'key.csv'}" in told and "--id_key FILE" not in told
    assert build("split", "salt") == 2
    assert "The same build with --id_key FILE writes which case of yours that is" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------- what must not change
def change_report(release: Path, name: str, old: str, new: str) -> None:
    path = release / "dataset" / "radiology_text_reports" / "train_reports.csv"
    lines = path.read_text().splitlines(keepends=True)
    place = next(index for index, line in enumerate(lines) if line.startswith(name))
    assert old in lines[place]
    lines[place] = lines[place].replace(old, new)
    path.write_text("".join(lines))


@pytest.mark.parametrize("is_finished", [True, False])
def test_a_case_that_was_written(own_release, tmp_path, capsys, monkeypatch, is_finished):
    """Also beside another one that was mended; the first one is named, and nothing is touched."""
    out, broken = tmp_path / "split", volume_of(own_release, "train_3_a_1")
    sound = cut_short(broken)
    with monkeypatch.context() as patch:
        stop_after(patch, 4 if is_finished else 2)
        assert main(command(own_release, out)) == (0 if is_finished else 2)
    before = contents(out)
    broken.write_bytes(sound)
    for name in ("train_4_a_1", "train_2_a_1"):
        change_report(own_release, name, "12 mm", "13 mm")
    assert main(command(own_release, out)) == 2
    told = capsys.readouterr().err
    assert "another state of the source: train_2_a_1 was written" in told and "Bring it back as it was" in told
    assert contents(out) == before


@pytest.mark.parametrize("name", ["train_1_a_1", "train_3_a_1", "train_5_a_1"])  # written, skipped, not built yet
def test_a_case_that_could_be_built(own_release, tmp_path, capsys, monkeypatch, name):
    """A source that is mounted in part must not make a smaller split of it."""
    out = tmp_path / "split"
    cut_short(volume_of(own_release, "train_3_a_1"))
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        assert main(command(own_release, out)) == 2
    before = contents(out)
    volume_of(own_release, name).unlink()
    assert main(command(own_release, out)) == 2
    assert f"{name} could be built then, and now it cannot (volume file is missing)" in capsys.readouterr().err
    assert contents(out) == before


def test_a_row_that_is_gone_from_the_tables(own_release, tmp_path, capsys):
    assert main(command(own_release, tmp_path / "split")) == 0
    path = own_release / "dataset" / "radiology_text_reports" / "train_reports.csv"
    path.write_text("".join(line for line in path.open() if not line.startswith("train_4_a_1")))
    assert main(command(own_release, tmp_path / "split")) == 2
    assert "train_4_a_1 could be built then, and now it cannot (it is not in the tables)" in capsys.readouterr().err


def test_a_better_choice_that_has_come_since(tmp_path, capsys):
    """Of a scan whose first reconstruction was missing the second was taken. Nothing is gone: that would mislead."""
    release = ct_rate_release(tmp_path / "release", ["train_1_a_1", "train_1_a_2", "valid_1_a_1"])
    first = volume_of(release, "train_1_a_1")
    first.rename(tmp_path / "away.nii.gz")
    assert main(command(release, tmp_path / "split")) == 0
    before = contents(tmp_path / "split")
    (tmp_path / "away.nii.gz").rename(first)
    assert main(command(release, tmp_path / "split")) == 2
    told = " ".join(capsys.readouterr().err.split())
    assert "train_1_a_2 was chosen then, and now it is left out" in told and "'train_1_a_1', comes first" in told
    assert "has come since. Take it away again. Name another --out" in told and "Bring it back" not in told
    first.unlink()
    assert main(command(release, tmp_path / "split")) == 0 and contents(tmp_path / "split") == before


def test_a_split_from_before_there_were_digests(own_release, fresh, tmp_path, capsys):
    """It is continued while its source is the same, and gets them; otherwise nobody knows what has changed."""
    out = tmp_path / "split"
    assert main(command(own_release, out)) == 0
    manifest = json.loads((out / "manifest.json").read_text())
    for record in manifest["shards"]:
        del record["cases"]
    (out / "manifest.json").write_text(json.dumps(manifest))
    change_report(own_release, "train_1_a_1", "12 mm", "13 mm")
    assert main(command(own_release, out)) == 2
    assert "reports, labels, or names and sizes of its files have changed" in " ".join(capsys.readouterr().err.split())
    change_report(own_release, "train_1_a_1", "13 mm", "12 mm")
    before = times(out)
    assert main(command(own_release, out)) == 0
    assert contents(out) == fresh and times(out) == before


# -------------------------------------------------------------------------------------------------------- kills between
@pytest.fixture
def before_mending(own_release, tmp_path) -> Path:
    """A finished split of a source that has been mended since: one file was broken, one was missing."""
    out = tmp_path / "before"
    sound = cut_short(volume_of(own_release, "train_3_a_1"))
    missing = volume_of(own_release, "train_5_a_1").rename(tmp_path / "away.nii.gz")
    assert main(command(own_release, out)) == 0
    assert len(skipped(out)) == 2
    volume_of(own_release, "train_3_a_1").write_bytes(sound)
    missing.rename(volume_of(own_release, "train_5_a_1"))
    return out


def killed_at(moment: int, own_release: Path, before: Path, out: Path) -> bool:
    shutil.copytree(before, out)
    return run_killed(command(own_release, out), moment)


@pytest.mark.parametrize("moment", [3, 8, 12, 16, 20, 24, 30])
def test_killed_while_it_goes_on(own_release, before_mending, fresh, tmp_path, moment):
    assert killed_at(moment, own_release, before_mending, tmp_path / "split")
    assert main(command(own_release, tmp_path / "split")) == 0
    assert contents(tmp_path / "split") == fresh


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_killed_at_every_moment_while_it_goes_on(own_release, before_mending, fresh, tmp_path):
    moment, was_killed = 0, True
    while was_killed:
        moment += 1
        out = tmp_path / f"killed_{moment}"
        was_killed = killed_at(moment, own_release, before_mending, out)
        assert main(command(own_release, out)) == 0
        assert contents(out) == fresh, f"killed at moment {moment}"
        shutil.rmtree(out)
    assert moment > 40


# ---------------------------------------------------------------------------------------------------------- many tasks
def merge(out: Path, *parts: Path) -> int:
    return main(["merge", "--out", str(out), *map(str, parts), "--previews", "0"])


@pytest.mark.parametrize("is_finished", [True, False])
def test_tasks_that_share_a_folder(own_release, fresh, tmp_path, is_finished):
    out, broken = tmp_path / "split", volume_of(own_release, "train_3_a_1")  # in the second of four shards
    sound = cut_short(broken)
    for shard in ("1/2", "2/2"):
        assert main(command(own_release, out, "--shard", shard)) == 0
    assert not is_finished or merge(out) == 0
    before = times(out)
    broken.write_bytes(sound)
    assert main(command(own_release, out, "--shard", "1/2")) == 0
    assert merge(out) == 2, "the second task has not looked at it again"
    assert main(command(own_release, out, "--shard", "2/2")) == 0
    assert merge(out) == 0
    assert contents(out) == fresh
    assert {name for name, time in times(out).items() if time != before[name]} == {"train-00001"}


def test_tasks_and_a_mended_file_of_the_same_size(own_release, fresh, tmp_path):
    """The first task finds nothing of its own to do, and must not make the second one believe that all is well."""
    out, broken = tmp_path / "split", volume_of(own_release, "train_3_a_1")
    sound = broken.read_bytes()
    broken.write_bytes(sound[:300] + bytes(100) + sound[400:])
    assert main(command(own_release, out)) == 0
    (out / "volumes" / "train-00000-of-00003.parquet").unlink()  # so that it has to open the split again
    broken.write_bytes(sound)
    for shard in ("1/2", "2/2"):
        assert main(command(own_release, out, "--shard", shard)) == 0
    assert merge(out) == 0
    assert contents(out) == fresh


def test_tasks_when_there_are_more_shards_than_before(own_release, fresh, tmp_path):
    out, missing = tmp_path / "split", volume_of(own_release, "train_5_a_1")
    missing.rename(tmp_path / "away.nii.gz")
    assert main(command(own_release, out)) == 0
    (tmp_path / "away.nii.gz").rename(missing)
    before = times(out)
    for shard in ("1/3", "2/3", "3/3"):
        assert main(command(own_release, out, "--shard", shard)) == 0
    assert merge(out) == 0
    assert contents(out) == fresh
    assert before == {name: time for name, time in times(out).items() if name != "train-00002"}


def test_parts_from_before_and_after(own_release, fresh, tmp_path, capsys):
    parts, broken = [tmp_path / "part1", tmp_path / "part2"], volume_of(own_release, "train_3_a_1")
    sound = cut_short(broken)
    assert main(command(own_release, parts[0], "--shard", "1/2")) == 0
    broken.write_bytes(sound)
    assert main(command(own_release, parts[1], "--shard", "2/2")) == 0
    assert merge(tmp_path / "split", *parts) == 2
    assert "Run all tasks again on the source as it is now: what has not changed stays" in capsys.readouterr().err
    before = times(parts[0])
    assert main(command(own_release, parts[0], "--shard", "1/2")) == 0
    assert times(parts[0]) == before
    assert merge(tmp_path / "split", *parts) == 0
    assert contents(tmp_path / "split") == fresh


def test_a_task_tries_a_case_again_whose_file_had_vanished(own_release, fresh, tmp_path, monkeypatch):
    """Also where the split is finished: it used to say that there was nothing to do."""
    out, gone = tmp_path / "split", volume_of(own_release, "train_1_a_1")
    write_shard = build_module.write_shard

    def take_away(*arguments):
        if gone.exists():
            gone.rename(tmp_path / "away.nii.gz")
        return write_shard(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(build_module, "write_shard", take_away)
        assert main(command(own_release, out)) == 0
    assert list(skipped(out)) == ["train_1_a_1"]
    (tmp_path / "away.nii.gz").rename(gone)
    assert main(command(own_release, out, "--shard", "1/4")) == 0
    assert merge(out) == 0
    assert contents(out) == fresh


# ------------------------------------------------------------------------------------------------------ other libraries
OTHERS = {"pyarrow": "1.2.3", "zstandard": "0.1.2", "libzstd": "1.0.0"}


@pytest.fixture
def other_libraries(monkeypatch):
    """As if other versions were installed, from the moment when it is called."""
    return lambda: monkeypatch.setattr(build_module, "libraries", lambda: OTHERS)


def test_the_libraries_that_decide_the_bytes_are_noted(fresh):
    assert json.loads(fresh["manifest.json"])["settings"]["libraries"] == libraries()
    assert list(libraries()) == list(OTHERS)


@pytest.mark.parametrize("more", [(), ("--shard", "2/2")])
def test_shards_of_other_libraries_are_not_mixed(release, tmp_path, capsys, monkeypatch, other_libraries, more):
    out = tmp_path / "split"
    with monkeypatch.context() as patch:
        stop_after(patch, 1)
        assert main(command(release, out)) == 2
    before = contents(out)
    other_libraries()
    assert main(command(release, out, *more)) == 2
    there = libraries()
    told = capsys.readouterr().err
    assert f"pip install pyarrow=={there['pyarrow']} zstandard=={there['zstandard']}` goes on" in told
    assert f"was begun with pyarrow {there['pyarrow']}" in told and "here are pyarrow 1.2.3" in told
    assert contents(out) == before


def test_a_build_without_a_shard_goes_on_with_other_libraries(release, tmp_path, monkeypatch, other_libraries):
    out = tmp_path / "split"
    with monkeypatch.context() as patch:
        stop_after(patch, 0)
        assert main(command(release, out)) == 2
    other_libraries()
    assert main(command(release, out)) == 0
    assert json.loads((out / "manifest.json").read_text())["settings"]["libraries"] == OTHERS


def test_a_finished_split_keeps_the_libraries_that_wrote_it(release, fresh, tmp_path, capsys, other_libraries):
    out = tmp_path / "split"
    assert main(command(release, out)) == 0
    other_libraries()
    assert main(command(release, out)) == 0
    assert main(command(release, out, "--shard", "1/2")) == 0
    assert contents(out) == fresh
    (out / "volumes" / "train-00001-of-00003.parquet").unlink()
    for more in ((), ("--shard", "2/2")):
        assert main(command(release, out, *more)) == 2
    assert capsys.readouterr().err.count("pip install pyarrow==") == 2
    assert (out / "manifest.json").exists() and not (out / PROGRESS_FOLDER).exists()


def test_parts_of_other_libraries_are_not_merged(release, tmp_path, capsys, other_libraries):
    assert main(command(release, tmp_path / "part1", "--shard", "1/2")) == 0
    other_libraries()
    assert main(command(release, tmp_path / "part2", "--shard", "2/2")) == 0
    assert merge(tmp_path / "split", tmp_path / "part1", tmp_path / "part2") == 2
    assert "libraries.pyarrow: " in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------ a moving repository
@pytest.fixture
def hub(own_release, monkeypatch):
    """A Hub with the release."""
    with hub_stand_in() as hub:
        hub.put_all("dataset", REPO, contents(own_release))
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        yield hub


def head(hub) -> str:
    return hub.repositories["dataset", REPO].head


@pytest.mark.parametrize("is_finished", [False, True])
def test_a_build_goes_on_with_the_commit_it_began_with(hub, tmp_path, capsys, monkeypatch, is_finished):
    out, begun = tmp_path / "split", head(hub)
    with monkeypatch.context() as patch:
        stop_after(patch, 4 if is_finished else 1)
        assert main(command(f"hf://datasets/{REPO}", out)) == (0 if is_finished else 2)
    hub.put("dataset", REPO, "dataset/radiology_text_reports/train_reports.csv", b"moved on\n")
    assert head(hub) != begun
    assert main(command(f"hf://datasets/{REPO}", out)) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert f"was begun with commit {begun} of the source and goes on with it" in told
    assert f"--source hf://datasets/{REPO}@COMMIT" in told
    assert main(command(f"hf://datasets/{REPO}@{begun}", tmp_path / "fresh")) == 0
    assert contents(out) == contents(tmp_path / "fresh")
    assert main(command(f"hf://datasets/{REPO}@main", out)) == 2, "the newest is taken where it is asked for"
    assert "has no column 'VolumeName'" in capsys.readouterr().err


def test_a_case_that_is_mended_in_a_later_commit(hub, tmp_path, capsys):
    out, name = tmp_path / "split", "dataset/train_fixed/train_3/train_3_a/train_3_a_1.nii.gz"
    sound = hub.files("dataset", REPO)[name]
    hub.put("dataset", REPO, name, sound[:300] + bytes(100) + sound[400:])
    assert main(command(f"hf://datasets/{REPO}", out)) == 0
    assert list(skipped(out)) == ["train_3_a_1"]
    before, begun = times(out), head(hub)
    mended = hub.put("dataset", REPO, name, sound)
    assert main(command(f"hf://datasets/{REPO}@{mended}", out)) == 0
    assert main(command(f"hf://datasets/{REPO}@{mended}", tmp_path / "fresh")) == 0
    assert contents(out) == contents(tmp_path / "fresh")
    assert {shard for shard, time in times(out).items() if time != before[shard]} == {"train-00001"}
    name = name.replace("train_3", "train_1")
    changed = hub.put("dataset", REPO, name, sound)
    assert main(command(f"hf://datasets/{REPO}@{changed}", out)) == 2
    assert "train_1_a_1 was written" in capsys.readouterr().err
    assert main(command(f"hf://datasets/{REPO}", out)) == 0, f"it goes on with {mended}, and no more with {begun}"
    assert contents(out) == contents(tmp_path / "fresh")


def test_a_commit_that_is_gone(hub, tmp_path, capsys):
    assert main(command(f"hf://datasets/{REPO}", tmp_path / "split")) == 0
    del hub.repositories["dataset", REPO].commits[head(hub)]
    assert main(command(f"hf://datasets/{REPO}", tmp_path / "split")) == 2
    told = capsys.readouterr().err
    assert "no such revision" in told and f"the commit with which --out {tmp_path / 'split'} was begun" in told


def test_parts_of_two_commits_are_told_which_to_take(hub, tmp_path, capsys):
    begun = head(hub)
    assert main(command(f"hf://datasets/{REPO}", tmp_path / "part1", "--shard", "1/2")) == 0
    hub.put("dataset", REPO, "README.md", b"moved on")
    assert main(command(f"hf://datasets/{REPO}", tmp_path / "part2", "--shard", "2/2")) == 0
    assert merge(tmp_path / "split", tmp_path / "part1", tmp_path / "part2") == 2
    assert f"give all of them --source hf://datasets/{REPO}@{begun}." in capsys.readouterr().err


@pytest.mark.parametrize(
    "where",
    ["hf://datasets/owner/name", "hf://datasets/owner/name/", "hf://datasets/owner/name/a/b", "hf://owner/name/a"],
)
def test_an_address_with_its_commit(where):
    assert with_commit(where, "abc") == where.rstrip("/").replace("/name", "/name@abc")


def test_sources_that_have_no_commit_are_taken_as_they_are(release, tmp_path):
    assert main(command(release, tmp_path / "split")) == 0
    assert open_source(str(release), tmp_path / "split").is_local
    with pytest.raises(ValueError, match="there is no folder"):
        open_source(str(tmp_path / "nothing"), tmp_path / "split")


def parts_merged(release: Path, tmp_path: Path) -> tuple[Path, list[Path]]:
    """Two tasks with folders of their own, run (again), and the command's arguments that merge them."""
    parts = [tmp_path / f"part{number}" for number in (1, 2)]
    for number, part in enumerate(parts, start=1):
        assert main(command(release, part, "--shard", f"{number}/2")) == 0
    return tmp_path / "merged", parts


@pytest.mark.parametrize("kind", ["broken", "broken, of the same size", "missing"])
def test_an_earlier_merge_follows_its_parts(own_release, fresh, tmp_path, kind):
    """It lags behind the tasks that were run again; what the parts hold stays as it is."""
    wrong = volume_of(own_release, "train_3_a_1")
    sound = wrong.read_bytes()
    if kind == "missing":
        wrong.unlink()
    else:
        wrong.write_bytes(sound[:300] + bytes(100) + sound[400:] if "size" in kind else sound[:300])
    out, parts = parts_merged(own_release, tmp_path)
    assert merge(out, *parts) == 0 and list(skipped(out)) == ["train_3_a_1"]
    wrong.write_bytes(sound)
    parts_merged(own_release, tmp_path)
    before = [contents(part) for part in parts]
    for _ in range(2):
        assert merge(out, *parts) == 0
        assert contents(out) == fresh
    assert [contents(part) for part in parts] == before


def test_an_earlier_merge_that_must_stay(own_release, tmp_path, capsys):
    """A case that was written has changed, a task is behind, or --out is not the merge but the folder of a task."""
    wrong = volume_of(own_release, "train_3_a_1")
    sound = cut_short(wrong)
    out, parts = parts_merged(own_release, tmp_path)
    assert merge(out, *parts) == 0
    wrong.write_bytes(sound)
    before = contents(out)
    assert main(command(own_release, parts[0], "--shard", "1/2")) == 0
    for target in (out, parts[0]):
        assert merge(target, *parts) == 2
        assert "Run all tasks again on the source as it is now" in " ".join(capsys.readouterr().err.split())
    assert merge(parts[0], parts[1]) == 2, "the task that is behind must not take back what was mended"
    assert "Run all tasks again on the source as it is now" in " ".join(capsys.readouterr().err.split())
    for part in parts:
        shutil.rmtree(part)
    change_report(own_release, "train_1_a_1", "12 mm", "13 mm")
    parts_merged(own_release, tmp_path)
    assert merge(out, *parts) == 2
    told = " ".join(capsys.readouterr().err.split())
    assert f"--out {out} was begun from another state of the source: train_1_a_1 was written" in told
    assert "Name another --out, or delete that folder" in told
    assert contents(out) == before
