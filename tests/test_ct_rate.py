"""The CT-RATE builder: which files belong to a row of the reports, and what is skipped with which reason."""

import json
import shutil

import nibabel
import numpy as np
import pyarrow.parquet as pq
import pytest
from tiny_release import ct_rate_release, write_csv

from data_builders.__main__ import main
from modeling_fvlm.organs import load_organ_set
from modeling_fvlm.processed_split import decode_volume

NAMES = ("train_1_a_1", "train_1_a_2", "train_1_b_1", "train_2_a_1", "valid_1_a_1")


def run(source, out, *more) -> int:
    options = ["--spacing", "3", "4", "4", "--margin", "2", "3", "3", "--previews", "0", "--workers", "1"]
    return main(["ct_rate", "--source", str(source), "--out", str(out), *options, *more])


def rows_of(out, split="train", columns=None) -> list[dict]:
    files = sorted((out / "volumes").glob(f"{split}-*.parquet"))
    return [row for file in files for row in pq.read_table(file, columns=columns).to_pylist()]


def skipped(out) -> dict[str, str]:
    return {entry["case"]: entry["reason"] for entry in json.loads((out / "manifest.json").read_text())["skipped"]}


@pytest.fixture
def release(tmp_path):
    return ct_rate_release(tmp_path / "release", NAMES)


def place(release, name: str, kind: str = "volume"):
    split, number, scan, _ = name.split("_")
    root = release / "dataset" if kind == "volume" else release / "dataset" / "ts_seg" / "ts_total"
    return root / f"{split}_fixed" / f"{split}_{number}" / f"{split}_{number}_{scan}" / f"{name}.nii.gz"


@pytest.mark.parametrize(
    ("choice", "expected"),
    [("first", ["train_1_a_1", "train_1_b_1", "train_2_a_1"]), ("all", [name for name in NAMES if "train" in name])],
)
def test_ids_and_reconstructions(release, tmp_path, choice, expected):
    assert run(release, tmp_path / "out", "--reconstructions", choice) == 0
    rows = rows_of(tmp_path / "out", columns=["patient_id", "scan_id", "recon_id"])
    assert [row["recon_id"] for row in rows] == expected
    assert all(row["scan_id"] == row["recon_id"].rsplit("_", 1)[0] for row in rows)
    assert all(row["patient_id"] == row["recon_id"].rsplit("_", 2)[0] for row in rows)
    counts = json.loads((tmp_path / "out" / "manifest.json").read_text())["splits"]["train"]
    assert (counts["rows"], counts["scans"], counts["patients"]) == (len(expected), 3, 2)
    assert [row["recon_id"] for row in rows_of(tmp_path / "out", "validation")] == ["valid_1_a_1"]


def test_the_folder_dataset_itself_is_a_source_too(release, tmp_path):
    assert run(release / "dataset", tmp_path / "out", "--splits", "validation") == 0
    assert len(rows_of(tmp_path / "out", "validation")) == 1
    assert not list((tmp_path / "out" / "volumes").glob("train*"))


def test_not_given_stands_for_empty(release, tmp_path):
    assert run(release, tmp_path / "out") == 0
    impressions = {row["recon_id"]: row["impression"] for row in rows_of(tmp_path / "out")}
    assert impressions["train_1_a_1"] == ""  # written "Not given." in the release
    assert impressions["train_2_a_1"].startswith("1. Pulmonary nodule.")


def test_left_and_right_survive_any_orientation(tmp_path):
    """The larger lung is the right one, at small width; the liver lies under it, the aorta left of it and behind."""
    release = ct_rate_release(tmp_path / "release", ("train_1_a_1",))
    for kind, orientation in (("volume", "PIR"), ("mask", "SLA")):
        path = place(release, "train_1_a_1", kind)
        image = nibabel.load(path)
        codes = nibabel.orientations.axcodes2ornt(tuple(orientation))
        turn = nibabel.orientations.ornt_transform(nibabel.io_orientation(image.affine), codes)
        nibabel.save(image.as_reoriented(turn), path)
    assert run(release, tmp_path / "out", "--splits", "train") == 0
    volume, mask = decode_volume(rows_of(tmp_path / "out")[0])
    organs = load_organ_set("body_24").organs
    center = {organ: np.argwhere(mask == organs.index(organ) + 1).mean(axis=0) for organ in ("lung", "liver", "aorta")}
    assert center["lung"][0] > center["liver"][0]  # depth grows to the head
    assert center["aorta"][1] > center["lung"][1]  # height grows to the back
    assert center["liver"][2] < center["aorta"][2]  # width grows to the left
    widths = np.nonzero((mask == organs.index("lung") + 1).any(axis=(0, 1)))[0]
    right_lung = np.split(widths, np.nonzero(np.diff(widths) > 1)[0] + 1)[0]
    assert len(right_lung) == 10, "of the two lungs, 10 and 8 voxels wide, the right one comes first"
    assert np.median(volume[mask == organs.index("lung") + 1]) < -800


def test_what_is_missing_is_skipped_with_its_reason(release, tmp_path):
    place(release, "train_1_b_1").unlink()
    place(release, "train_2_a_1", "mask").unlink()
    (release / "dataset" / "metadata").mkdir()
    (release / "dataset" / "metadata" / "no_chest_train.txt").write_text("train_1_a_2.nii.gz\n")
    assert run(release, tmp_path / "out", "--reconstructions", "all") == 0
    assert skipped(tmp_path / "out") == {
        "train_1_b_1": "volume file is missing",
        "train_2_a_1": "mask file is missing",
        "train_1_a_2": "shows no chest (listed in the release)",
    }
    assert [row["recon_id"] for row in rows_of(tmp_path / "out")] == ["train_1_a_1"]


def test_the_second_reconstruction_serves_where_the_first_is_missing(release, tmp_path):
    place(release, "train_1_a_1", "mask").unlink()
    assert run(release, tmp_path / "out") == 0
    assert [row["recon_id"] for row in rows_of(tmp_path / "out")] == ["train_1_a_2", "train_1_b_1", "train_2_a_1"]
    assert skipped(tmp_path / "out") == {"train_1_a_1": "mask file is missing"}


def test_an_empty_report_is_skipped(release, tmp_path):
    path = release / "dataset" / "radiology_text_reports" / "validation_reports.csv"
    row = {"VolumeName": "valid_1_a_1.nii.gz", "Findings_EN": "Not given.", "Impressions_EN": " not given "}
    write_csv(path, [row])
    assert run(release, tmp_path / "out") == 0
    assert skipped(tmp_path / "out") == {"valid_1_a_1": "report is empty"}


def test_labels_may_be_absent(release, tmp_path):
    shutil.rmtree(release / "dataset" / "multi_abnormality_labels")
    assert run(release, tmp_path / "out") == 0
    assert all(row["labels"] == [] for row in rows_of(tmp_path / "out"))


@pytest.mark.parametrize(
    ("file", "old", "new", "told"),
    [
        ("radiology_text_reports/train_reports.csv", "Findings_EN", "Finding_EN", "no column 'Findings_EN'; it has"),
        ("radiology_text_reports/train_reports.csv", "Findings_EN", "Finding_EN", "nearest: 'Finding_EN'"),
        ("radiology_text_reports/train_reports.csv", "train_2_a_1.nii", "../../x.nii", "not of the form train_1_a_1"),
        ("radiology_text_reports/train_reports.csv", "train_1_a_2", "train_1_a_1", "comes twice"),
        ("multi_abnormality_labels/train_predicted_labels.csv", ",1,", ",maybe,", "label 'maybe' is none of 1, 0, -1"),
    ],
)
def test_broken_tables_are_told(release, tmp_path, capsys, file, old, new, told):
    path = release / "dataset" / file
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    assert run(release, tmp_path / "out", "--reconstructions", "all") == 2
    assert told in capsys.readouterr().err


def test_volumes_with_blank_headers_are_not_taken(release, tmp_path, capsys):
    (release / "dataset" / "train_fixed").rename(release / "dataset" / "train")
    assert run(release, tmp_path / "out") == 2
    assert "blank headers" in capsys.readouterr().err
