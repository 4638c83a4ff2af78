"""Config `organ_crops`: written in the same pass, beside config `volumes` or alone."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from tiny_release import GEOMETRY, REPORT, command, contents

from data_builders import build as build_module
from data_builders.__main__ import main
from data_builders.organ_crops import ORGAN_CROPS_SCHEMA
from modeling_fvlm.organs import load_organ_set
from modeling_fvlm.processed_split import decode_volume

NAMES = ("train_1_a_1", "train_2_a_1", "train_3_a_1", "valid_1_a_1")
MARGIN = tuple(map(int, GEOMETRY[-3:]))
ORGANS = load_organ_set("body_24").organs
PRESENT = ["lung", "liver", "aorta"]  # in the order of body_24


def build(release: Path, out: Path, *configs: str, more: tuple[str, ...] = ()) -> int:
    return main(command(release, out, *(["--configs", *configs] if configs else []), *more))


def rows_of(out: Path, config: str, split: str = "train") -> list[dict]:
    return [row for path in sorted(out.glob(f"{config}/{split}-*")) for row in pq.read_table(path).to_pylist()]


@pytest.fixture(scope="module")
def both(release, tmp_path_factory):
    out = tmp_path_factory.mktemp("both") / "split"
    assert build(release, out, "organ_crops", "volumes") == 0
    return out


def test_a_row_is_one_organ_of_one_scan(both):
    """Compared with cutting the rows of `volumes` by hand: slow, and hard to get wrong."""
    compared = 0
    crops = {(row["recon_id"], row["organ"]): row for row in rows_of(both, "organ_crops")}
    for row in rows_of(both, "volumes"):
        volume, mask = decode_volume(row)
        captions = {caption["organ"]: caption for caption in row["captions"]}
        for label, organ in enumerate(ORGANS, start=1):
            places = np.argwhere(mask == label)
            if not len(places):
                assert (row["recon_id"], organ) not in crops
                continue
            low = np.maximum(places.min(axis=0) - MARGIN, 0)
            high = np.minimum(places.max(axis=0) + 1 + MARGIN, mask.shape)
            box = tuple(slice(*ends) for ends in zip(low, high))
            crop = crops[row["recon_id"], organ]
            crop_volume, crop_mask = decode_volume(crop)
            assert np.array_equal(crop_volume, volume[box])
            assert np.array_equal(crop_mask, mask[box] == label)
            assert {crop[key] == captions[organ][key] for key in ("caption", "is_abnormal", "is_mentioned")} == {True}
            assert (crop["patient_id"], crop["spacing"], crop["labels"]) == (
                row["patient_id"],
                row["spacing"],
                row["labels"],
            )
            compared += 1
    assert compared == 3 * 3 == len(crops)


def test_one_shard_lies_beside_each_of_volumes(both):
    names = sorted(path.name for path in both.glob("volumes/*"))
    assert names == sorted(path.name for path in both.glob("organ_crops/*")) and len(names) == 3
    for config, per_case in (("volumes", 1), ("organ_crops", 3)):
        file = pq.ParquetFile(both / config / names[0])
        assert file.num_row_groups == file.metadata.num_rows == 2 * per_case, "one row per row group"
    assert pq.read_schema(both / "organ_crops" / names[0]).remove_metadata().equals(ORGAN_CROPS_SCHEMA)
    manifest = json.loads((both / "manifest.json").read_text())
    assert manifest["settings"]["configs"] == ["volumes", "organ_crops"], "volumes first, in whatever order they come"
    assert manifest["splits"]["train"]["rows"] == 3, "rows of a split are reconstructions"
    for entry in manifest["shards"]:
        file = both / entry["organ_crops"]["file"]
        assert (entry["organ_crops"]["rows"], entry["organ_crops"]["bytes"]) == (3 * entry["rows"], file.stat().st_size)


def test_datasets_loads_both(both, hub_cache):
    from datasets import load_dataset

    crops = load_dataset(str(both), "organ_crops", split="train", cache_dir=hub_cache)
    assert crops["organ"][:] == PRESENT * 3
    volumes = load_dataset(str(both), split="train", cache_dir=hub_cache)
    assert volumes["recon_id"][:] == list(NAMES[:3]), "volumes is the default"


def test_the_card_tells_datasets_the_features_that_datasets_would_write(both):
    from datasets import Features

    header = yaml.safe_load((both / "README.md").read_text().split("---")[1])
    assert [(entry["config_name"], entry.get("default")) for entry in header["configs"]] == [
        ("volumes", True),
        ("organ_crops", None),
    ]
    told = {entry["config_name"]: entry["features"] for entry in header["dataset_info"]}
    assert told["organ_crops"] == Features.from_arrow_schema(ORGAN_CROPS_SCHEMA)._to_yaml_list()


def test_volumes_are_the_same_with_and_without_crops(release, both, tmp_path):
    assert build(release, tmp_path / "split") == 0
    assert contents(tmp_path / "split" / "volumes") == contents(both / "volumes")


def test_organ_crops_alone(release, both, tmp_path, hub_cache):
    from datasets import load_dataset

    out = tmp_path / "split"
    assert build(release, out, "organ_crops", more=("--splits", "train")) == 0
    assert not (out / "volumes").exists() and not (out / "previews").exists()
    for path in out.glob("organ_crops/*"):
        assert path.read_bytes() == (both / "organ_crops" / path.name).read_bytes()
    assert load_dataset(str(out), split="train", cache_dir=hub_cache)["organ"][:] == PRESENT * 3
    times = [path.stat().st_mtime_ns for path in out.glob("organ_crops/*")]
    assert build(release, out, "organ_crops", more=("--splits", "train")) == 0
    assert [path.stat().st_mtime_ns for path in out.glob("organ_crops/*")] == times, "a second run finds it complete"


def test_the_code_in_the_card_of_organ_crops_runs_with_nothing_of_ours(release, tmp_path):
    out = tmp_path / "split"
    assert build(release, out, "organ_crops", more=("--splits", "train")) == 0
    code = (out / "README.md").read_text().split("```python\n")[1].split("```")[0]
    environment = {"HOME": str(tmp_path), "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "USE_TORCH": "0"}
    run = subprocess.run(
        [sys.executable, "-I", "-c", code], cwd=out, env=environment, capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr
    lines = run.stdout.splitlines()
    assert [line.split()[:2] for line in lines[:3]] == [["train_1_a_1", organ] for organ in PRESENT]
    assert len(lines) == 9 and all(line.endswith("[0, 1]") for line in lines)


class Killed(BaseException):
    pass


def test_a_shard_one_of_whose_files_is_missing_is_built_again(release, both, tmp_path, monkeypatch):
    """Killed between the two files of a shard, and later one file lost."""
    out, record = tmp_path / "split", build_module.write_shard.__globals__["write_record"]

    def killed(folder, content):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setitem(build_module.write_shard.__globals__, "write_record", killed)
        with pytest.raises(Killed):
            build(release, out, "volumes", "organ_crops")
    assert build_module.write_shard.__globals__["write_record"] is record
    assert build(release, out, "volumes", "organ_crops") == 0
    assert contents(out) == contents(both)
    (out / "organ_crops" / "train-00000-of-00002.parquet").unlink()
    assert build(release, out, "volumes", "organ_crops") == 0
    assert contents(out) == contents(both)


def test_tasks_and_merge_bring_both(release, both, tmp_path):
    parts = [tmp_path / "part1", tmp_path / "part2"]
    for number, part in enumerate(parts, start=1):
        assert build(release, part, "volumes", "organ_crops", more=("--shard", f"{number}/2")) == 0
    assert main(["merge", "--out", str(tmp_path / "split"), *map(str, parts), "--previews", "0"]) == 0
    assert contents(tmp_path / "split") == contents(both)


def test_a_report_goes_to_its_organ(both):
    crops = {row["organ"]: row for row in rows_of(both, "organ_crops") if row["recon_id"] == "train_2_a_1"}
    assert crops["liver"]["caption"] == "The liver is normal." and "liver is normal" in REPORT["findings"]
    assert crops["aorta"]["is_abnormal"] and not crops["liver"]["is_abnormal"]
