"""The claim of the chance alarm, on the synthetic set: silent on the good recipe over five seeds, four faults named.

Nine runs of 300 steps, half an hour on one core:
    pytest -m slow tests/test_alarm_synthetic.py
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import train_fvlm
from data_builders.__main__ import main as build
from modeling_fvlm.organs import load_organ_set
from modeling_fvlm.processed_split import decode_volume, encode_array

pytestmark = [pytest.mark.slow, pytest.mark.timeout(7200)]

ORGANS = load_organ_set("body_24").organs
# The synthetic set has no finding in these, and scans end above the knee: nothing can be learned, and that is noted.
WITHOUT_FINDINGS = ["humerus", "scapula", "clavicula", "femur"]
# What made a text side collapse when the demo's recipe was sought: one window that is not standardised, projections
# that do not start centred, and a deeper text encoder.
COLLAPSE = ["--centring_rows", "0", "--model.text_encoder.from_scratch.num_hidden_layers", "4"]
COLLAPSE += ["--model.windows", "[{hu_min: -1150, hu_max: 350, mean: 0, std: 1}]"]


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    """Five hundred synthetic patients, as `make demo` prepares them."""
    folder = tmp_path_factory.mktemp("synthetic")
    words = ["--patients", "500", "--validation", "1", "--seed", "0", "--workers", "1"]
    assert build(["synthetic", *words, "--out", str(folder / "source")]) == 0
    words = ["--organs", "body_24", "--spacing", "20", "4", "4", "--margin", "1", "4", "4", "--workers", "1"]
    words += ["--splits", "train", "--previews", "0"]
    assert build(["ct_rate", "--source", str(folder / "source"), *words, "--out", str(folder / "split")]) == 0
    shutil.rmtree(folder / "source")
    return folder / "split"


def changed(split: Path, out: Path, change) -> Path:
    """A copy of the split with `change` applied to every training row."""
    shutil.copytree(split, out)
    for path in sorted((out / "volumes").glob("train-*.parquet")):
        table = pq.read_table(path)
        rows = [change(row) for row in table.to_pylist()]
        pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), path)
    return out


def cut_off(organ: str):
    """Rows whose organ reaches the first slice of the scan, as if the scan had ended within it."""
    label = ORGANS.index(organ) + 1

    def change(row):
        _, mask = decode_volume(row)
        mask = np.array(mask)
        if len(places := np.argwhere(mask == label)):
            depth, height, width = places[len(places) // 2]
            mask[:depth, height, width] = label
            row["mask"] = encode_array(mask)
        return row

    return change


def with_one_caption(organ: str):
    """Rows whose organ has the same caption in all patients, called abnormal where the patient is."""

    def change(row):
        for entry in row["captions"]:
            if entry["organ"] == organ:
                entry["caption"] = f"The {organ} was examined."
        return row

    return change


def findings(folder: Path, data: Path, *words: str) -> list[dict]:
    """What the alarm says in 300 steps of the demo's recipe."""
    paths = ["--recipe", "synthetic_demo", "--data", str(data), "--output_dir", str(folder / "run")]
    words = ["--max_steps", "300", "--save_strategy", "no", "--dataloader_num_workers", "0", *words]
    assert train_fvlm.main([*paths, "--disable_tqdm", "true", *words]) == 0
    said = json.loads((folder / "run" / "run.json").read_text())["alarms"]
    notes = [finding for finding in said if not finding["is_alarm"]]
    assert [(note["cause"], note["organs"]) for note in notes] == [("never abnormal", WITHOUT_FINDINGS)]
    return [finding for finding in said if finding["is_alarm"]]


@pytest.mark.parametrize("seed", range(5))
def test_silent_on_the_good_recipe(split, tmp_path, seed):
    assert findings(tmp_path, split, "--seed", str(seed)) == []


def test_shuffled_captions_are_named(split, tmp_path):
    (alarm,) = findings(tmp_path, split, "--shuffle_captions")
    assert alarm["cause"] == "captions do not fit" and len(alarm["organs"]) >= 18


def test_a_collapsed_text_side_is_named(split, tmp_path):
    alarms = findings(tmp_path, split, *COLLAPSE)
    assert {alarm["cause"] for alarm in alarms} == {"text collapsed"}
    assert sum(len(alarm["organs"]) for alarm in alarms) >= 18


def test_an_organ_that_is_always_cut_off_is_named(split, tmp_path):
    (alarm,) = findings(tmp_path, changed(split, tmp_path / "split", cut_off("liver")))
    assert (alarm["cause"], alarm["organs"]) == ("cut off", ["liver"])


def test_captions_that_are_all_equal_are_named(split, tmp_path):
    (alarm,) = findings(tmp_path, changed(split, tmp_path / "split", with_one_caption("liver")))
    assert (alarm["cause"], alarm["organs"]) == ("equal captions", ["liver"])
