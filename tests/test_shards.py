"""The processed split on disk: columns, row groups, loading with `datasets`, and continuing a killed build."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from tiny_release import REPORT, arrays, command, contents, ct_rate_release, volume_of

from data_builders import build as build_module
from data_builders.__main__ import main
from data_builders.card import features
from data_builders.shards import PROGRESS_FOLDER, SCHEMA
from modeling_fvlm.organs import load_organ_set
from modeling_fvlm.processed_split import decode_volume

NAMES = ("train_1_a_1", "train_2_a_1", "train_3_a_1", "train_10_a_1", "train_11_a_1", "valid_1_a_1")


@pytest.fixture(scope="module")
def split(release, tmp_path_factory):
    folder = tmp_path_factory.mktemp("built") / "split"
    assert main(command(release, folder)) == 0
    return folder


def test_columns_are_those_of_the_design(split):
    """Names and types written out: a change of either breaks every trainer that reads older splits."""
    caption = "list<element: struct<organ: string, caption: string, is_abnormal: bool, is_mentioned: bool>>"
    expected = {
        **dict.fromkeys(("patient_id", "scan_id", "recon_id", "findings", "impression"), "string"),
        **{"volume": "binary", "mask": "binary", "captions": caption},
        "shape": "fixed_size_list<element: int32>[3]",
        "spacing": "fixed_size_list<element: float>[3]",
        "labels": "list<element: struct<finding: string, value: int8>>",
    }
    files = sorted((split / "volumes").glob("*.parquet"))
    assert [file.name for file in files] == [
        *(f"train-{index:05d}-of-00003.parquet" for index in range(3)),
        "validation-00000-of-00001.parquet",
    ]
    for file in files:
        schema = pq.read_schema(file)
        written = {column.name: str(column.type).replace("<item:", "<element:") for column in schema}
        assert written == expected


def test_one_row_per_row_group_in_the_sorted_order(split):
    rows = []
    for file in sorted((split / "volumes").glob("train-*.parquet")):
        groups = pq.ParquetFile(file)
        assert [groups.metadata.row_group(index).num_rows for index in range(groups.num_row_groups)] == (
            [1] * groups.metadata.num_rows
        )
        rows += groups.read(["recon_id"]).to_pydict()["recon_id"]
    # By number, as a person sorts: 10 comes after 3. Two in a shard, the last one short.
    assert rows == ["train_1_a_1", "train_2_a_1", "train_3_a_1", "train_10_a_1", "train_11_a_1"]


def test_a_row_holds_what_the_release_says(split):
    row = pq.read_table(split / "volumes" / "train-00000-of-00003.parquet").to_pylist()[1]
    volume, mask = decode_volume(row)
    source_volume, source_mask = arrays(seed=1)
    organs = load_organ_set("body_24").organs
    box = (slice(1, 19), slice(3, 23), slice(2, 30))  # boxes 3..17, 6..20, 5..27 and margins 2, 3, 3
    assert np.array_equal(volume, source_volume[box])  # same spacing: nothing is interpolated
    for organ, classes in {"lung": (10, 12), "liver": (5,), "aorta": (52,)}.items():
        assert np.array_equal(mask == organs.index(organ) + 1, np.isin(source_mask[box], classes)), organ
    assert (row["patient_id"], row["scan_id"], row["recon_id"]) == ("train_2", "train_2_a", "train_2_a_1")
    assert (row["shape"], row["spacing"]) == ([18, 20, 28], [3.0, 4.0, 4.0])
    assert (row["findings"], row["impression"]) == (REPORT["findings"], REPORT["impression"])
    assert row["labels"] == [{"finding": "Lung nodule", "value": 1}, {"finding": "Pleural effusion", "value": 0}]
    assert [caption["organ"] for caption in row["captions"]] == list(organs)
    captions = {caption.pop("organ"): caption for caption in row["captions"]}
    assert captions["lung"] == {
        "caption": "Pulmonary nodule. The left lung is clear. A 12 mm nodule is seen in the right lung.",
        "is_abnormal": True,
        "is_mentioned": True,
    }
    assert captions["liver"] == {"caption": "The liver is normal.", "is_abnormal": False, "is_mentioned": True}
    assert captions["brain"]["is_mentioned"] is False and captions["brain"]["is_abnormal"] is False
    assert captions["brain"]["caption"] == "brain shows no significant abnormalities."


@pytest.mark.parametrize("streaming", [False, True])
def test_datasets_loads_it(split, hub_cache, streaming):
    from datasets import load_dataset

    for name, expected in (("train", 5), ("validation", 1)):
        dataset = load_dataset(str(split), "volumes", split=name, streaming=streaming, cache_dir=hub_cache)
        rows = list(dataset)
        assert len(rows) == expected
        assert all(np.isfinite(decode_volume(row)[0]).all() for row in rows)
        assert rows[0]["captions"][4]["organ"] == "lung" and rows[0]["captions"][4]["is_mentioned"] is True


def test_the_card_tells_datasets_the_features_that_datasets_would_write(split):
    from datasets import Features

    header = yaml.safe_load((split / "README.md").read_text().split("---")[1])
    ours = header["dataset_info"][0]["features"]
    assert ours == Features.from_arrow_schema(SCHEMA)._to_yaml_list() == features(SCHEMA)
    assert header["configs"][0]["default"] is True


def test_the_code_in_the_card_runs_with_nothing_of_ours(split, tmp_path):
    """The block as it stands in the card, in a fresh process that cannot import this repository."""
    code = (split / "README.md").read_text().split("```python\n")[1].split("```")[0]
    code += (
        "\nimport sys, json\n"
        # An editable install leaves a finder named after the package: it is the rooms that must not be there.
        "assert not {name.split('.')[0] for name in sys.modules} & {'modeling_fvlm', 'data_builders'}\n"
        "last = {'id': row['recon_id'], 'shape': volume.shape, 'sum': int(volume.sum()), 'organs': int(mask.sum())}\n"
        "print(json.dumps(last))\n"
    )
    environment = {"HOME": str(tmp_path), "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "USE_TORCH": "0"}
    run = subprocess.run(
        [sys.executable, "-I", "-c", code], cwd=split, env=environment, capture_output=True, text=True, timeout=280
    )
    # A process that has streamed may abort while it exits, its work done: https://github.com/apache/arrow/issues/45214.
    is_arrows = run.returncode == -signal.SIGABRT and run.stderr == "terminate called without an active exception\n"
    assert run.returncode == 0 or is_arrows, run.stderr
    volume, mask = decode_volume(pq.read_table(split / "volumes" / "train-00002-of-00003.parquet").to_pylist()[-1])
    assert json.loads(run.stdout.splitlines()[-1]) == {
        "id": "train_11_a_1",
        "shape": list(volume.shape),
        "sum": int(volume.sum()),
        "organs": int(mask.sum()),
    }
    assert len(run.stdout.splitlines()) == 5 + 1, "one line a case, and the one added above"


def test_nothing_of_this_machine_goes_into_the_split(split, release):
    for name, content in contents(split).items():
        for part in (str(release), release.name, str(split.parent)):
            assert part.encode() not in content, f"{name} holds {part!r}"


class Killed(BaseException):
    """Nothing catches it: what a kill leaves, as far as one process can show it (test_kill.py kills for real)."""


def stop_after(monkeypatch, num_shards: int) -> None:
    """Let the build die at the beginning of a later shard, with half of it on disk."""
    write_shard, written = build_module.write_shard, []

    def dying_write_shard(folder, shard, built, configs):
        if len(written) == num_shards:
            (folder / shard.file).with_name(Path(shard.file).name + ".tmp").write_bytes(b"half a shard")
            raise Killed
        written.append(shard.file)
        return write_shard(folder, shard, built, configs)

    monkeypatch.setattr(build_module, "write_shard", dying_write_shard)


@pytest.mark.parametrize("num_shards", [0, 1, 3])
def test_a_killed_build_continues_and_ends_in_the_same_bytes(split, release, tmp_path, monkeypatch, num_shards):
    out = tmp_path / "split"
    with monkeypatch.context() as patch:
        stop_after(patch, num_shards)
        with pytest.raises(Killed):
            main(command(release, out))
    assert not (out / "manifest.json").exists(), "a manifest says that the split is complete"
    finished = sorted((out / "volumes").glob("*.parquet"))
    assert len(finished) == num_shards
    times = [file.stat().st_mtime_ns for file in finished]
    assert main(command(release, out)) == 0
    assert [file.stat().st_mtime_ns for file in finished] == times, "finished shards are not built again"
    assert contents(out) == contents(split)
    assert not (out / PROGRESS_FOLDER).exists()


def test_a_shard_that_was_lost_later_is_built_again(split, release, tmp_path):
    out = tmp_path / "split"
    assert main(command(release, out)) == 0
    (out / "volumes" / "train-00001-of-00003.parquet").unlink()
    truncated = out / "volumes" / "validation-00000-of-00001.parquet"
    truncated.write_bytes(truncated.read_bytes()[:100])
    assert main(command(release, out)) == 0
    assert contents(out) == contents(split)


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        (["--spacing", "3", "4", "5"], "spacing: [3.0, 4.0, 4.0] there, [3.0, 4.0, 5.0] here"),
        (["--organs", "chest_4"], "organ_set.name: body_24 there, chest_4 here"),
        (["--rows_per_shard", "3"], "rows_per_shard: 2 there, 3 here"),
        (["--splits", "train"], "options.splits: ['train', 'validation'] there, ['train'] here"),
        (["--rescale", "skip"], "rescale_mode: auto there, skip here"),
        (["--configs", "volumes", "organ_crops"], "configs: ['volumes'] there, ['volumes', 'organ_crops'] here"),
    ],
)
@pytest.mark.parametrize("is_finished", [True, False])
def test_other_settings_do_not_continue_a_build(release, tmp_path, monkeypatch, capsys, changed, told, is_finished):
    out = tmp_path / "split"
    if is_finished:
        assert main(command(release, out, "--splits", "train", "validation")) == 0
    else:
        with monkeypatch.context() as patch:
            stop_after(patch, 1)
            with pytest.raises(Killed):
                main(command(release, out))
    before = contents(out)
    assert main(command(release, out, *changed)) == 2
    assert told in capsys.readouterr().err
    assert contents(out) == before


def test_a_build_from_before_a_setting_existed_continues(split, release, tmp_path, capsys):
    out = tmp_path / "split"
    assert main(command(release, out)) == 0
    manifest = json.loads((out / "manifest.json").read_text())
    for name, default in {"preprocessing": "standard", "rescale_mode": "auto", "configs": ["volumes"]}.items():
        assert manifest["settings"].pop(name) == default
    assert manifest["settings"].pop("ids") == "kept"
    (out / "manifest.json").write_text(json.dumps(manifest))
    assert main(command(release, out, "--preprocessing", "published")) == 2
    assert "preprocessing: standard there, published here" in " ".join(capsys.readouterr().err.split())
    assert main(command(release, out)) == 0
    assert contents(out) == contents(split)


def test_a_build_of_another_compression_is_not_continued(release, tmp_path, monkeypatch, capsys):
    """Its shards would hold the same values in other bytes."""
    out = tmp_path / "split"
    assert main(command(release, out)) == 0
    manifest = json.loads((out / "manifest.json").read_text())
    del manifest["settings"]["zstd_level"]
    (out / "manifest.json").write_text(json.dumps(manifest))
    assert main(command(release, out)) == 2
    assert "zstd_level: 3 there" in " ".join(capsys.readouterr().err.split())


def test_a_changed_source_does_not_continue_a_build(tmp_path, capsys):
    source, out = ct_rate_release(tmp_path / "release", NAMES[:2]), tmp_path / "split"
    assert main(command(source, out, "--splits", "train")) == 0
    reports = source / "dataset" / "radiology_text_reports" / "train_reports.csv"
    reports.write_text(reports.read_text().replace("12 mm", "13 mm", 1))
    assert main(command(source, out, "--splits", "train")) == 2
    assert "another state of the source" in capsys.readouterr().err


def test_a_folder_with_something_else_is_left_alone(release, tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("precious")
    assert main(command(release, tmp_path)) == 2
    assert "is not empty" in capsys.readouterr().err
    assert contents(tmp_path) == {"thesis.txt": b"precious"}


def test_an_empty_shard_leaves_no_file_and_the_rest_loads(tmp_path, hub_cache):
    """Two of three patients are broken, so the first shard (of two rows) holds nothing."""
    from datasets import load_dataset

    source, out = ct_rate_release(tmp_path / "release", NAMES[:3]), tmp_path / "split"
    for number in (1, 2):
        path = volume_of(source, f"train_{number}_a_1")
        path.write_bytes(path.read_bytes()[:200])
    assert main(command(source, out, "--splits", "train")) == 0
    assert [path.name for path in (out / "volumes").iterdir()] == ["train-00001-of-00002.parquet"]
    manifest = json.loads((out / "manifest.json").read_text())
    assert [entry["case"] for entry in manifest["skipped"]] == ["train_1_a_1", "train_2_a_1"]
    assert manifest["splits"]["train"]["rows"] == 1
    loaded = load_dataset(str(out), "volumes", split="train", cache_dir=hub_cache)
    assert loaded["recon_id"][:] == ["train_3_a_1"]
    assert main(command(source, out, "--splits", "train")) == 0, "and a second run finds it complete"


def test_bytes_are_on_the_disk_before_the_name_and_the_name_before_the_record(release, tmp_path, monkeypatch):
    """Else a power cut could leave a record of a shard that is empty."""
    seen, names = [], {}
    fsync, replace = os.fsync, os.replace

    def watched_fsync(descriptor):
        seen.append(("sync", Path(os.readlink(f"/proc/self/fd/{descriptor}"))))
        fsync(descriptor)

    def watched_replace(source, target):
        seen.append(("name", Path(target)))
        names[Path(source)] = Path(target)
        replace(source, target)

    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(os, "replace", watched_replace)
    out = tmp_path / "split"
    assert main(command(release, out, "--splits", "validation")) == 0
    shard = out / "volumes" / "validation-00000-of-00001.parquet"
    record = out / PROGRESS_FOLDER / "validation-00000-of-00001.json"
    seen = [(what, names.get(path, path)) for what, path in seen]
    places = [seen.index(event) for event in (("sync", shard), ("name", shard), ("sync", shard.parent))]
    places += [seen.index(event) for event in (("sync", record), ("name", record))]
    assert places == sorted(places)
    assert seen.index(("name", out / "manifest.json")) > places[-1]


def test_what_a_killed_build_left_half_written_is_removed(split, release, tmp_path, monkeypatch):
    out = tmp_path / "split"
    with monkeypatch.context() as patch:
        stop_after(patch, 1)
        with pytest.raises(Killed):
            main(command(release, out))
    for place in (".", PROGRESS_FOLDER, "volumes"):
        (out / place / "manifest.json.1a2b3c4d.tmp").write_text("half")
    assert main(command(release, out)) == 0
    assert contents(out) == contents(split)


def test_a_build_that_was_killed_before_it_said_what_it_is_may_begin(split, release, tmp_path):
    out = tmp_path / "split"
    (out / PROGRESS_FOLDER).mkdir(parents=True)
    (out / PROGRESS_FOLDER / "identity.json.1a2b3c4d.tmp").write_text("half")
    assert main(command(release, out)) == 0
    assert contents(out) == contents(split)


def test_duplicates_are_listed_and_counted(release, tmp_path, monkeypatch, capsys):
    """Of the cases that are written; a case that is skipped is no duplicate of anything."""
    sort_cases = build_module.sort_cases

    def marked(cases):
        cases = [dataclasses.replace(case, duplicate_of=None) for case in sort_cases(cases)]
        cases[2] = dataclasses.replace(cases[2], duplicate_of=cases[0].recon_id)
        cases[1] = dataclasses.replace(cases[1], duplicate_of=cases[0].recon_id, skip_reason="of no use")
        return cases

    monkeypatch.setattr(build_module, "sort_cases", marked)
    assert main(command(release, tmp_path / "split")) == 0
    manifest = json.loads((tmp_path / "split" / "manifest.json").read_text())
    assert manifest["duplicates"] == [{"split": "train", "case": "train_3_a_1", "duplicate_of": "train_1_a_1"}]
    assert "1 cases have the report of another case" in " ".join(capsys.readouterr().out.split())
