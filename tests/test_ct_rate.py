"""The CT-RATE builder: which files belong to a row of the reports, and what is skipped with which reason."""

import json
import re
import shutil
from pathlib import Path

import fsspec
import nibabel
import numpy as np
import pyarrow.parquet as pq
import pytest
from tiny_release import ct_rate_release, write_csv

from data_builders.__main__ import main
from data_builders.ct_rate import find_cases, kernel_kind
from data_builders.sources import Source
from modeling_fvlm.organs import load_organ_set
from modeling_fvlm.processed_split import decode_volume

NAMES = ("train_1_a_1", "train_1_a_2", "train_1_b_1", "train_2_a_1", "valid_1_a_1")


def run(source, out, *more) -> int:
    options = ["--spacing", "3", "4", "4", "--margin", "2", "3", "3", "--previews", "0", "--workers", "1"]
    return main(["ct_rate", "--source", str(source), "--out", str(out), *options, *more])


def rows_of(out, split="train", columns=None) -> list[dict]:
    files = sorted((out / "volumes").glob(f"{split}-*.parquet"))
    return [row for file in files for row in pq.read_table(file, columns=columns).to_pylist()]


def skipped(out, on_purpose: bool = False) -> dict[str, str]:
    """Reason by case of what was not built: for a fault, or because it was left out on purpose."""
    entries = json.loads((out / "manifest.json").read_text())["skipped"]
    return {entry["case"]: entry["reason"] for entry in entries if entry.get("is_excluded", False) == on_purpose}


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
    }
    assert skipped(tmp_path / "out", on_purpose=True) == {"train_1_a_2": "shows no chest (listed in the release)"}
    assert [row["recon_id"] for row in rows_of(tmp_path / "out")] == ["train_1_a_1"]


def test_the_second_reconstruction_serves_where_the_first_is_missing(release, tmp_path):
    place(release, "train_1_a_1", "mask").unlink()
    assert run(release, tmp_path / "out") == 0
    assert [row["recon_id"] for row in rows_of(tmp_path / "out")] == ["train_1_a_2", "train_1_b_1", "train_2_a_1"]
    assert skipped(tmp_path / "out") == {"train_1_a_1": "mask file is missing"}
    assert skipped(tmp_path / "out", on_purpose=True) == {}


def test_reconstructions_that_are_not_the_first_are_listed_and_are_no_fault(release, tmp_path, capsys):
    """Each case without a row stands in the manifest; those left out on purpose do not hide what is broken."""
    for name in ("train_1_a_2", "train_2_a_1"):  # one of them is not asked for, so it is no fault
        place(release, name, "mask").unlink()
    assert run(release, tmp_path / "out") == 0
    assert skipped(tmp_path / "out") == {"train_2_a_1": "mask file is missing"}
    assert skipped(tmp_path / "out", on_purpose=True) == {
        "train_1_a_2": "another reconstruction of this scan, 'train_1_a_1', comes first"
    }
    counts = json.loads((tmp_path / "out" / "manifest.json").read_text())["splits"]["train"]
    assert (counts["cases"], counts["rows"], counts["excluded"]) == (4, 2, 1)
    printed = " ".join(capsys.readouterr().out.split())
    assert "1 skipped" in printed and "skipped train_2_a_1: mask file is missing" in printed
    assert "1 left out on purpose (1 another reconstruction of this scan, .., comes first)" in printed
    assert "skipped train_1_a_2" not in printed
    assert "| train | 2 | 2 | 1 | 1 | 1 |" in (tmp_path / "out" / "README.md").read_text()
    place(release, "train_2_a_1", "mask").write_bytes(place(release, "train_1_a_1", "mask").read_bytes())
    assert run(release, tmp_path / "again", "--strict") == 0, "--strict stops at what is broken alone"


def test_what_was_left_out_on_purpose_is_still_so_after_a_merge(release, tmp_path):
    assert run(release, tmp_path / "out", "--shard", "1/1") == 0
    assert main(["merge", "--out", str(tmp_path / "out"), "--previews", "0"]) == 0
    assert skipped(tmp_path / "out") == {} and list(skipped(tmp_path / "out", on_purpose=True)) == ["train_1_a_2"]


def test_files_of_reconstructions_that_are_left_out_are_not_looked_at(release):
    for choice in ("first", "best"):
        cases = {case.recon_id: case for case in find_cases(Source(release), ["train"], choice)}
        assert cases.keys() == {name for name in NAMES if "train" in name}, "no reconstruction goes without a word"
        assert (cases["train_1_a_2"].volume, cases["train_1_a_2"].mask) == (None, None)


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


def test_labels_that_are_missing_come_from_the_reports(release, tmp_path):
    """The release's own are kept; findings without one, and volumes without a row, are labelled by the report."""
    table = release / "dataset" / "multi_abnormality_labels" / "train_predicted_labels.csv"
    write_csv(table, [{"VolumeName": "train_1_a_1.nii.gz", "Lung nodule": 0}])
    assert run(release, tmp_path / "out", "--labels", "ct_rate_18", "--unmentioned", "absent") == 0
    first, *others = rows_of(tmp_path / "out", columns=["labels"])
    values = [{label["finding"]: label["value"] for label in row["labels"]} for row in (first, *others)]
    assert len(others) == 2 and [len(of_row) for of_row in values] == [18] * 3
    assert [of_row["Lung nodule"] for of_row in values] == [0, 1, 1]
    assert {of_row["Emphysema"] for of_row in values} == {0}


def test_published_captions_in_the_place_of_our_rules(release, tmp_path, capsys):
    desc, conc = tmp_path / "desc_info.json", tmp_path / "conc_info.json"
    desc.write_text(json.dumps({"train_1_a": {"lung": "Quite clear."}, "train_1_b": {}}))
    conc.write_text(json.dumps({"valid_1_a": {"liver": "Large."}}))
    arguments = ["--desc_info", str(desc), "--conc_info", str(conc), "--labels", "ct_rate_18"]
    assert run(release, tmp_path / "out", *arguments, "--reconstructions", "all") == 0
    rows = {row["recon_id"]: row for split in ("train", "validation") for row in rows_of(tmp_path / "out", split)}
    assert rows.keys() == {"train_1_a_1", "train_1_a_2", "train_1_b_1", "valid_1_a_1"}
    said = {name: [c["caption"] for c in row["captions"] if c["is_mentioned"]] for name, row in rows.items()}
    assert said == {
        "train_1_a_1": ["Quite clear."],
        "train_1_a_2": ["Quite clear."],
        "train_1_b_1": [],
        "valid_1_a_1": ["Large."],
    }
    assert "12 mm nodule" in rows["train_1_b_1"]["findings"], "the whole report stays"
    assert len(rows["train_1_b_1"]["labels"]) == 18, "and labels are taken from it"
    told = "there are no captions of its scan in desc_info.json and conc_info.json"
    assert skipped(tmp_path / "out") == {"train_2_a_1": told}
    assert run(release, tmp_path / "no", *arguments[:2]) == 2
    assert "belong together: give --conc_info as well" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("file", "old", "new", "told"),
    [
        ("radiology_text_reports/train_reports.csv", "Findings_EN", "Finding_EN", "no column 'Findings_EN'; it has"),
        ("radiology_text_reports/train_reports.csv", "Findings_EN", "Finding_EN", "nearest: 'Finding_EN'"),
        ("radiology_text_reports/train_reports.csv", "train_2_a_1.nii", "../../x.nii", "not of the form train_1_a_1"),
        ("radiology_text_reports/train_reports.csv", "train_1_a_2", "train_1_a_1", "comes twice"),
        ("multi_abnormality_labels/train_predicted_labels.csv", ",1,", ",maybe,", "label 'maybe' is none of 1, 0, -1"),
        ("multi_abnormality_labels/train_predicted_labels.csv", ",1,", ",9,", "labels.csv, line 2, column 'Lung nod"),
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
    told = "headers: give --volumes original. Fetch it, or leave 'train' out of --splits."
    assert f"there is no folder dataset/train_fixed. dataset/train/ holds the volumes with blank {told}" in (
        " ".join(capsys.readouterr().err.split())
    )


def test_originals_that_were_not_fetched(release, tmp_path, capsys):
    assert run(release, tmp_path / "out", "--volumes", "original") == 2
    told = "headers: give --volumes fixed. Fetch it, or leave 'train' out of --splits."
    assert f"there is no folder dataset/train. dataset/train_fixed/ holds the volumes with corrected {told}" in (
        " ".join(capsys.readouterr().err.split())
    )
    (release / "dataset" / "train_fixed").rename(release / "dataset" / "away")
    assert run(release, tmp_path / "out") == 2
    assert "there is no folder dataset/train_fixed. Fetch it, or leave 'train'" in capsys.readouterr().err


# Anywhere fsspec reaches


@pytest.fixture
def remote(release):
    """The release on fsspec's memory file system; returns its address."""
    memory = fsspec.filesystem("memory")
    memory.put(str(release / "dataset"), "/mirror/CT-RATE/dataset", recursive=True)
    yield "memory://mirror/CT-RATE"
    memory.rm("/mirror", recursive=True)


def test_a_remote_source_gives_the_same_split(release, remote, tmp_path):
    for number, source in enumerate((release, remote, f"{remote}/dataset")):
        assert run(source, tmp_path / str(number), "--reconstructions", "all") == 0
    expected = [row for split in ("train", "validation") for row in rows_of(tmp_path / "0", split)]
    assert len(expected) == len(NAMES)
    for number in (1, 2):
        assert [row for split in ("train", "validation") for row in rows_of(tmp_path / str(number), split)] == expected
    manifest = json.loads((tmp_path / "1" / "manifest.json").read_text())
    assert manifest["settings"]["options"]["source"] == remote
    assert str(tmp_path) not in (tmp_path / "0" / "manifest.json").read_text()


def test_cases_know_names_and_sizes_from_the_listing(release, remote):
    here, there = (find_cases(Source(str(source)), ["train"], "all") for source in (release, remote))
    assert [case.recon_id for case in here] == [case.recon_id for case in there] == list(NAMES[:-1])
    for local, far in zip(here, there):
        for kind in ("volume", "mask"):
            assert getattr(local, kind).name == getattr(far, kind).name == f"{local.recon_id}.nii.gz"
            assert getattr(local, kind).stat().st_size == getattr(far, kind).size > 0


def noting(method, asked):
    """A method of Path that notes which paths it is asked of."""

    def noted(self, *args, **kwargs):
        asked.append(self)
        return method(self, *args, **kwargs)

    return noted


def test_no_file_is_asked_for_by_itself(tmp_path, monkeypatch):
    """Fifty thousand volumes: a listing per folder is minutes, a question for every file is hours."""
    root = tmp_path / "dataset"
    reports = []
    for patient in range(1, 31):
        inside = Path(f"train_{patient}", f"train_{patient}_a", f"train_{patient}_a_1.nii.gz")
        for folder in (root / "train_fixed", root / "ts_seg" / "ts_total" / "train_fixed"):
            (folder / inside).parent.mkdir(parents=True)
            (folder / inside).touch()
        reports.append({"VolumeName": inside.name, "Findings_EN": f"Scan {patient}.", "Impressions_EN": "Normal."})
    write_csv(root / "radiology_text_reports" / "train_reports.csv", reports)
    asked: list[Path] = []
    for name in ("stat", "is_file", "exists"):
        monkeypatch.setattr(Path, name, noting(getattr(Path, name), asked))
    cases = find_cases(Source(tmp_path), ["train"])
    monkeypatch.undo()
    assert len(cases) == 30 and all(case.skip_reason is None for case in cases)
    assert asked and [path.name for path in asked if path.name.endswith(".nii.gz")] == []


# What the release is known to lack, and what it holds twice


def test_masks_that_the_release_never_had_are_told_apart(tmp_path):
    names = ("train_1267_a_4", "train_1267_a_5")
    release = ct_rate_release(tmp_path / "release", names)
    for name in names:
        place(release, name, "mask").unlink()
    cases = find_cases(Source(release), ["train"], "all")
    assert [case.skip_reason for case in cases] == ["mask is missing in the release", "mask file is missing"]
    assert [case.is_excluded for case in cases] == [True, False], "--strict stops at what the user can mend alone"
    released = ct_rate_release(tmp_path / "mended", names[:1])
    assert find_cases(Source(released), ["train"])[0].skip_reason is None, "a mask that came later is taken"


def test_equal_reports_of_other_scans_are_marked(release):
    """All reports of the tiny release have one text, but for the impression of the first."""
    cases = {case.recon_id: case for case in find_cases(Source(release), ["validation", "train"], "all")}
    assert {name: case.duplicate_of for name, case in cases.items()} == {
        "train_1_a_1": None,  # its impression is empty
        "train_1_a_2": None,
        "train_1_b_1": "train_1_a_2",
        "train_2_a_1": "train_1_a_2",
        "valid_1_a_1": "train_1_a_2",  # another split: the same words on both sides
    }


def test_reconstructions_of_one_scan_are_no_duplicates_and_white_space_is_no_difference(release):
    path = release / "dataset" / "radiology_text_reports" / "train_reports.csv"
    texts = {"train_1_a_1": "Clear lungs.", "train_1_a_2": "Clear lungs.", "train_1_b_1": "Clear  lungs. "}
    texts["train_2_a_1"] = "Not so clear lungs."
    write_csv(path, [{"VolumeName": f"{n}.nii.gz", "Findings_EN": t, "Impressions_EN": ""} for n, t in texts.items()])
    marked = {case.recon_id: case.duplicate_of for case in find_cases(Source(release), ["train"], "all")}
    assert marked == {
        "train_1_a_1": None,
        "train_1_a_2": None,
        "train_1_b_1": "train_1_a_1",
        "train_2_a_1": None,
    }
    place(release, "train_1_a_1").unlink()
    marked = {case.recon_id: case.duplicate_of for case in find_cases(Source(release), ["train"], "all")}
    assert marked["train_1_b_1"] == "train_1_a_2", "a case that is not built is nobody's original"


@pytest.mark.parametrize("choice", ["first", "all", "best"])
def test_a_reconstruction_that_comes_twice_is_told(release, choice):
    path = release / "dataset" / "radiology_text_reports" / "train_reports.csv"
    path.write_text(path.read_text().replace("train_1_a_2", "train_1_a_1"))
    with pytest.raises(ValueError, match=r"VolumeName 'train_1_a_1.nii.gz' comes twice"):
        find_cases(Source(release), ["train"], choice)


@pytest.mark.parametrize("file", ["radiology_text_reports/train_reports.csv", "metadata/no_chest_train.txt"])
def test_tables_that_are_not_utf8_are_told(release, tmp_path, capsys, file):
    path = release / "dataset" / file
    path.parent.mkdir(exist_ok=True)
    path.write_bytes((path.read_bytes() if path.exists() else b"") + "Lungenödem".encode("latin-1"))
    assert run(release, tmp_path / "out") == 2
    assert f"{path.name} is not UTF-8" in capsys.readouterr().err


def test_a_table_that_is_missing_is_named(release, tmp_path, capsys):
    (release / "dataset" / "radiology_text_reports" / "train_reports.csv").unlink()
    assert run(release, tmp_path / "out") == 2
    assert "there is no file dataset/radiology_text_reports/train_reports.csv" in capsys.readouterr().err


# The best reconstruction


def chosen_of(tmp_path, rows, slice_mm=3.0, missing=()):
    """Which reconstruction of one scan is taken, and why each other is not."""
    names = [f"train_1_a_{number}" for number in range(1, len(rows) + 1)]
    release = ct_rate_release(tmp_path / "release", names)
    columns = ("ZSpacing", "NumberofSlices", "ConvolutionKernel")
    told = [{"VolumeName": f"{name}.nii.gz", **dict(zip(columns, row))} for name, row in zip(names, rows) if row]
    if told:
        write_csv(release / "dataset" / "metadata" / "train_metadata.csv", told)
    for name in missing:
        place(release, name).unlink()
    cases = find_cases(Source(release), ["train"], "best", slice_mm=slice_mm)
    taken = [case.recon_id for case in cases if case.skip_reason is None]
    return taken, {case.recon_id: case.skip_reason for case in cases if case.skip_reason is not None}


@pytest.mark.parametrize(
    ("rows", "slice_mm", "number", "why"),
    [
        # (1) complete before anything else: 100 of 320 mm, though thin and soft
        ([(1.0, 100, "B30f"), (5.0, 64, "B70f")], 3.0, 2, "5 mm slices, sharp kernel; here 1 mm .* 100 of 320 mm"),
        # nine tenths are complete
        ([(1.0, 290, "B70f"), (1.0, 300, "B70f")], 3.0, 1, "as good and comes first"),
        # (2) slices that fit: not thicker than the voxels, even at the price of the kernel
        ([(5.0, 60, "B30f"), (3.0, 100, "B60f")], 3.0, 2, "3 mm slices, sharp kernel; here 5 mm slices, soft kernel"),
        # and not thinner than a third of them
        ([(0.6, 500, "B30f"), (2.0, 150, "B30f")], 3.0, 2, "2 mm slices"),
        ([(0.6, 500, "B30f"), (2.0, 150, "B30f")], 1.5, 1, "0.6 mm slices"),
        ([(0.6, 500, "B30f"), (5.0, 60, "B30f")], 3.0, 1, "0.6 mm slices"),
        # (3) soft before unknown before sharp
        ([(1.0, 300, "B70f"), (2.0, 150, "Br40d")], 3.0, 2, "soft kernel; here 1 mm slices, sharp kernel"),
        ([(1.0, 300, "Q"), (2.0, 150, "B30f")], 3.0, 2, "soft kernel; here 1 mm slices, unknown kernel"),
        ([(1.0, 300, "LUNG"), (2.0, 150, "Q")], 3.0, 2, "unknown kernel; here 1 mm slices, sharp kernel"),
        # (4) the thinnest that fits; of too thick ones the thinnest, of too thin ones the thickest
        ([(3.0, 100, "B30f"), (1.5, 200, "B30f")], 3.0, 2, "1.5 mm slices, soft kernel; here 3 mm"),
        ([(8.0, 38, "B30f"), (5.0, 60, "B30f")], 3.0, 2, "5 mm slices"),
        ([(0.5, 600, "B30f"), (0.8, 375, "B30f")], 3.0, 2, "0.8 mm slices"),
        # what has metadata before what has none
        ([None, (5.0, 60, "B70f")], 3.0, 2, "of this one there are no metadata"),
        ([("", 60, "B30f"), (5.0, 60, "B70f")], 3.0, 2, "of this one there are no metadata"),
        ([None, None], 3.0, 1, "is the first, and there are no metadata to choose by"),
    ],
)
def test_the_best_reconstruction_by_its_metadata(tmp_path, rows, slice_mm, number, why):
    taken, others = chosen_of(tmp_path, rows, slice_mm)
    assert taken == [f"train_1_a_{number}"]
    (reason,) = others.values()
    assert reason.startswith(f"another reconstruction of this scan, 'train_1_a_{number}', is")
    assert re.search(why, reason), reason


def test_the_best_of_what_can_be_built(tmp_path):
    rows = [(2.0, 150, "B30f"), (5.0, 60, "B70f"), (1.0, 300, "B70f")]
    taken, others = chosen_of(tmp_path, rows, missing=["train_1_a_1"])
    assert taken == ["train_1_a_3"]
    assert others["train_1_a_1"] == "volume file is missing" and "is better" in others["train_1_a_2"]


def test_falling_back_to_the_first_is_said(tmp_path, caplog):
    taken, _ = chosen_of(tmp_path, [None, None])
    assert taken == ["train_1_a_1"]
    assert "no metadata of 1 scan that has several reconstructions" in caplog.text


def test_the_others_stand_in_the_manifest_and_are_no_fault(tmp_path):
    release = ct_rate_release(tmp_path / "release", ("train_1_a_1", "train_1_a_2"))
    cells = {"ZSpacing": 3.0, "NumberofSlices": 20}
    rows = [("train_1_a_1", "B70f"), ("train_1_a_2", "B30f")]
    path = release / "dataset" / "metadata" / "train_metadata.csv"
    write_csv(path, [{"VolumeName": f"{name}.nii.gz", **cells, "ConvolutionKernel": kernel} for name, kernel in rows])
    assert run(release, tmp_path / "out", "--splits", "train", "--reconstructions", "best", "--strict") == 0
    assert [row["recon_id"] for row in rows_of(tmp_path / "out", columns=["recon_id"])] == ["train_1_a_2"]
    assert skipped(tmp_path / "out") == {}
    assert skipped(tmp_path / "out", on_purpose=True) == {
        "train_1_a_1": "another reconstruction of this scan, 'train_1_a_2', is better (3 mm slices, soft kernel; here "
        "3 mm slices, sharp kernel)"
    }
    path.write_text(path.read_text().replace("ConvolutionKernel", "Kernel"))
    with pytest.raises(ValueError, match=r"train_metadata.csv has no column 'ConvolutionKernel'.*nearest: 'Kernel'"):
        find_cases(Source(release), ["train"], "best")


@pytest.mark.parametrize(
    ("kind", "kernels"),
    [
        ("soft", ["B30f", "B31s", "I31f", "Br40d", "Bf37f", "['Br40d', '3']", "Br40d\\3", "STANDARD", "SOFT", "FC08"]),
        ("soft", ["A", "B", "FC18", "CHST"]),
        (
            "sharp",
            ["B60f", "B70s", "I70f", "Br59d", "Bl57d", "Bl49d", "LUNG", "BONEPLUS", "EDGE", "FC51", "FC86", "FC30"],
        ),
        ("sharp", ["L", "YC", "D", "Lung Enhanced", "YB Sharp"]),
        ("unknown", ["", "nan", "Q", "12", "C"]),
    ],
)
def test_kernels_by_their_makers_names(kind, kernels):
    assert [kernel for kernel in kernels if kernel_kind(kernel) != kind] == []


@pytest.mark.parametrize("argument", [{"reconstructions": "second"}, {"volumes": "blank"}])
def test_unknown_choices_are_told(release, argument):
    with pytest.raises(ValueError, match="is none of"):
        find_cases(Source(release), ["train"], **argument)
