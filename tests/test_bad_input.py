"""Broken and missing input: a clear error, or a skip that is counted and listed. Never a silent replacement."""

import gzip
import json

import nibabel
import numpy as np
import pyarrow.parquet as pq
import pytest
from tiny_release import REPORT, arrays, save_nifti, write_csv

from data_builders.__main__ import main
from data_builders.cases import resolve_inside

GOOD = ("ok_1", "ok_2")


@pytest.fixture
def source(tmp_path):
    """Two good cases and a third, `bad`, that a test breaks."""
    for seed, name in enumerate((*GOOD, "bad")):
        volume, mask = arrays(seed)
        save_nifti(volume, tmp_path / "ct" / f"{name}.nii.gz")
        save_nifti(mask, tmp_path / "seg" / f"{name}.nii.gz")
    write_reports(tmp_path, [{"id": name} for name in (*GOOD, "bad")])
    return tmp_path


def write_reports(source, rows):
    write_csv(
        source / "reports.csv", [{**row, **{key: row.get(key, text) for key, text in REPORT.items()}} for row in rows]
    )


def build(source, *more) -> int:
    options = ["--spacing", "3", "4", "4", "--previews", "0", "--workers", "1", "--validation_fraction", "0"]
    options += ["--ids", "kept"]
    folders = ["--volumes", source / "ct", "--masks", source / "seg", "--reports", source / "reports.csv"]
    return main(["folder", *map(str, [*folders, "--out", source / "out"]), *options, *map(str, more)])


def read_back(source) -> tuple[list[str], dict[str, str]]:
    """Ids of the rows that were written, and reason by id of the cases that were not."""
    manifest = json.loads((source / "out" / "manifest.json").read_text())
    files = sorted((source / "out" / "volumes").glob("*.parquet"))
    rows = [name for file in files for name in pq.read_table(file, columns=["recon_id"]).to_pydict()["recon_id"]]
    return rows, {entry["case"]: entry["reason"] for entry in manifest["skipped"]}


def no_mask(source):
    (source / "seg" / "bad.nii.gz").unlink()


def other_shape(source):
    save_nifti(arrays()[1][:, :, :-2], source / "seg" / "bad.nii.gz")


def other_place(source):
    save_nifti(arrays()[1], source / "seg" / "bad.nii.gz", spacing=(3.0, 4.0, 3.5))


def truncated(source):
    path = source / "ct" / "bad.nii.gz"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def truncated_mask(source):
    path = source / "seg" / "bad.nii.gz"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def nan_voxels(source):
    volume = arrays()[0].astype(np.float32)
    volume[0, 0, :3] = np.nan
    save_nifti(volume, source / "ct" / "bad.nii.gz")


def two_dimensional(source):
    nibabel.save(nibabel.Nifti1Image(np.zeros((8, 8), np.int16), np.eye(4)), source / "ct" / "bad.nii.gz")


def no_nifti(source):
    (source / "ct" / "bad.nii.gz").write_bytes(b"DICM" * 100)


def empty_file(source):
    (source / "ct" / "bad.nii.gz").write_bytes(b"")


def empty_mask(source):
    save_nifti(np.zeros_like(arrays()[1]), source / "seg" / "bad.nii.gz")


def unknown_label(source):
    mask = arrays()[1]
    mask[0, 0, 0] = 118  # TotalSegmentator v2 ends at 117
    save_nifti(mask, source / "seg" / "bad.nii.gz")


def blank_header(source):
    image = nibabel.load(source / "ct" / "bad.nii.gz")
    image.header["sform_code"] = image.header["qform_code"] = 0
    blank = nibabel.Nifti1Image(np.asarray(image.dataobj), None)
    blank.header["sform_code"] = blank.header["qform_code"] = 0
    nibabel.save(blank, source / "ct" / "bad.nii.gz")


def huge_header(source):
    """A header that tells of more voxels than any memory holds."""
    path = source / "ct" / "bad.nii.gz"
    content = bytearray(gzip.decompress(path.read_bytes()))
    content[42:48] = np.array([32767] * 3, dtype="<i2").tobytes()
    path.write_bytes(gzip.compress(bytes(content)))


def empty_report(source):
    write_reports(source, [*({"id": name} for name in GOOD), {"id": "bad", "findings": " ", "impression": ""}])


@pytest.mark.parametrize(
    ("breaking", "told"),
    [
        (no_mask, "mask file is missing"),
        (other_shape, "are not on one grid"),
        (other_place, "voxels apart"),
        (truncated, "Fetch"),
        (truncated_mask, "Fetch"),
        (nan_voxels, "3 of 15360 voxels are NaN"),
        (two_dimensional, "(8, 8)"),
        (no_nifti, "bad.nii.gz"),
        (empty_file, "bad.nii.gz"),
        (empty_mask, "holds no organ of the set"),
        (unknown_label, "label 118 is outside the numbering"),
        (blank_header, "no orientation"),
        (huge_header, "etch the file again"),
        (empty_report, "report is empty"),
    ],
)
def test_a_broken_case_is_skipped_counted_and_listed(source, capsys, breaking, told):
    breaking(source)
    assert build(source) == 0
    rows, skipped = read_back(source)
    assert rows == list(GOOD), "the others are written, and nothing in place of the broken one"
    assert list(skipped) == ["bad"] and told in skipped["bad"], skipped
    assert str(source) not in skipped["bad"], "no folder of this machine in the manifest"
    printed = " ".join(capsys.readouterr().out.split())
    assert "1 skipped" in printed and "skipped bad:" in printed


@pytest.mark.parametrize("breaking", [truncated, nan_voxels, no_mask])
def test_strict_stops_at_the_first_broken_case(source, capsys, breaking):
    breaking(source)
    assert build(source, "--strict") == 2
    assert "bad" in capsys.readouterr().err
    assert not (source / "out" / "manifest.json").exists()


def test_nothing_written_is_a_failure(source, capsys):
    for path in (source / "seg").iterdir():
        path.unlink()
    assert build(source) == 1
    assert read_back(source)[0] == [] and len(read_back(source)[1]) == 3
    assert "Nothing was written" in capsys.readouterr().out


def test_half_rescaled_hu_are_loud(source, capsys):
    """The released code's fault: int16 times a slope of 0.5. The lungs come out far too dense."""
    path = source / "ct" / "bad.nii.gz"
    save_nifti((arrays()[0] * 0.1).astype(np.int16), path)
    assert build(source) == 0
    by_id, no_air, warning = json.loads((source / "out" / "manifest.json").read_text())["warnings"]
    assert by_id["case"] == "all" and "no column patient_id" in by_id["warning"]
    assert no_air["case"] == "bad" and "air is near -1000 HU" in no_air["warning"]
    assert warning["case"] == "bad" and "lung has a median of -8" in warning["warning"]
    assert "check bad: lung" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("rows", "arguments", "told"),
    [
        ([{"id": "ok_1", "volume": "../ct/ok_1.nii.gz"}], [], "must be relative and stay inside its folder"),
        ([{"id": "ok_1", "mask": "/etc/passwd"}], [], "must be relative and stay inside its folder"),
        ([{"id": "ok_1", "split": "training set"}], [], "reports.csv, line 2: split 'training set' is none of"),
        ([{"id": "ok_1", "numbering": "totalsegmentator_v3"}], [], "nearest: 'totalsegmentator_v"),
        ([{"id": "ok_1", "caption:lnug": "Clear."}], [], "organ 'lnug' is not in the organ set"),
        ([{"id": "ok_1", "caption:lnug": "Clear."}], [], "nearest: 'lung'"),
        ([{"id": "ok_1", "label:Nodule": "perhaps"}], [], "csv, line 2, column 'label:Nodule': label 'perhaps' is"),
        ([{"id": "ok_1", "label:Nodule": "perhaps"}], [], "label 'perhaps' is none of 1, 0, -1"),
        ([{"id": "ok_1", "caption:lung": "A.", "abnormal:lung": "x"}], [], "csv, line 2: abnormal:lung is 'x'; write"),
        ([{"id": "ok_1", "rescale_slope": "1"}], [], "line 2: rescale_intercept is ''; write a number, such as"),
        ([{"id": "ok_1", "rescale_slope": "0", "rescale_intercept": "1"}], [], "rescale_slope is '0'; write a number"),
        ([{"id": "ok_1", "rescale_slope": "1", "rescale_intercept": "nan"}], [], "rescale_intercept is 'nan'; write a"),
        ([{"id": "ok_1"}, {"id": "ok_1"}], [], "the id 'ok_1' comes twice"),
        ([{"id": split, "patient_id": "p", "split": split} for split in ("train", "val")], [], "splits are by patient"),
        ([{"id": i, "scan_id": "s", "patient_id": i} for i in ("ok_1", "ok_2")], [], "scan 's' stands under the pat"),
        ([{"id": "ok_1", "patient_id": "p"}, {"id": "ok_2", "patient_id": ""}], [], "line 3: patient_id is empty"),
        ([{"id": "ok_1", "numbering": "../x.yaml"}], [], "must be relative and stay inside its folder"),
        ([{"id": "ok_1", "numbering": "/x.yaml"}], [], "must be relative and stay inside its folder"),
        ([{"id": "ok_1", "caption:lung": "", "abnormal:lung": "1"}], [], "but there is no caption:lung"),
        ([{"id": "ok_1", "abnormal:lung": "0"}], [], "but there is no caption:lung"),
        ([{"id": "ok_1"}, {"id": ""}], [], "line 3: the row has neither id nor volume."),
        ([{"name": "ok_1"}], [], "neither a column 'id' nor 'volume'; it has ['name'"),
        ([{"id": "ok_1"}], ["--columns", "finding=findings"], "nearest: 'findings'"),
        ([{"id": "ok_1"}], ["--columns", "findings=Findnigs"], "no column 'Findnigs'; it has ['id', 'findings',"),
        ([{"id": "ok_1"}], ["--organs", "body_25"], "nearest: 'body_24'"),
        ([{"id": "ok_1"}], ["--organs", "broken.yaml"], "oesophagus"),
        ([{"id": "ok_1"}], ["--spacing", "3", "0", "1"], "above 0 mm"),
        ([{"id": "ok_1"}], ["--margin", "3", "-1", "1"], "no margin can be negative"),
        ([{"id": "ok_1"}], ["--workers", "0"], "--workers 0 must be at least 1"),
        ([{"id": "ok_1"}], ["--validation_fraction", "1.5"], "--validation_fraction 1.5"),
        ([{"id": "ok_1"}], ["--numbering", "nowhere.yaml"], "there is no file"),
        ([{"id": "ok_1"}], ["--masks", "nowhere"], "--masks: there is no folder nowhere"),
        ([{"id": "ok_1"}], ["--reports", "nowhere.csv"], "there is no file nowhere.csv"),
    ],
)  # fmt: skip
def test_wrong_tables_and_options_are_told_before_anything_is_written(
    source, capsys, monkeypatch, rows, arguments, told
):
    write_reports(source, rows)
    (source / "broken.yaml").write_text("name: broken\norgans: {oesophagus: {totalsegmentator_v2: [oesophagus]}}\n")
    monkeypatch.chdir(source)
    assert build(source, *arguments) == 2
    assert told in capsys.readouterr().err
    assert not (source / "out").exists()


def test_a_report_that_is_not_there_and_a_file_that_fits_twice(source):
    (source / "r.json").write_text(json.dumps([{"id": "r1", "findings": "The liver is normal."}]))
    save_nifti(arrays()[1], source / "seg" / "sub" / "ok_2.nii.gz")
    table = [{"id": "ok_1", "report": "r1"}, {"id": "bad", "report": "r2"}, {"id": "ok_2", "report": "r1"}]
    write_csv(source / "cases.csv", [*table, {"id": "gone", "report": "r1", "volume": "bda.nii.gz"}])
    assert build(source, "--table", source / "cases.csv", "--reports", source / "r.json") == 0
    rows, skipped = read_back(source)
    assert rows == ["ok_1"]
    assert skipped["bad"] == "there is no report 'r2' in r.json; nearest: 'r1'"
    assert skipped["ok_2"].startswith("several files fit as mask: ['ok_2.nii.gz', 'ok_2.nii.gz']")
    assert skipped["gone"] == "volume file bda.nii.gz is missing; nearest: 'bad.nii.gz'"


@pytest.mark.parametrize(
    ("reports", "told"),
    [
        ([{"id": "ok_1", "findings": "A."}, {"id": "ok_1", "findings": "B."}], "line 3: the id 'ok_1' comes twice"),
        ([{"id": "ok_1", "Findings_EN": "Clear."}], "rename them in that file"),
    ],
)
def test_reports_in_a_csv_of_their_own(source, capsys, reports, told):
    write_csv(source / "texts.csv", reports)
    write_csv(source / "cases.csv", [{"id": "ok_1"}])
    assert build(source, "--table", source / "cases.csv", "--reports", source / "texts.csv") == 2
    assert told in capsys.readouterr().err


def test_no_text_anywhere(source, capsys):
    write_csv(source / "reports.csv", [{"id": "ok_1", "Findings_EN": "Clear."}])
    assert build(source) == 2
    message = capsys.readouterr().err
    assert "no column findings, impression or caption:ORGAN" in message and "nearest: 'Findings_EN'" in message


@pytest.mark.parametrize("name", ["../x", "a/../../x", "/x", "C:/x", "C:x", "\\\\host\\x", "..\\x", "\\x", ""])
def test_names_that_leave_their_folder(tmp_path, name):
    with pytest.raises(ValueError, match="stay inside its folder"):
        resolve_inside(tmp_path, name)


@pytest.mark.parametrize("name", ["x.nii.gz", "a/b/x.nii.gz", "a..b.nii", "..x/y.nii"])
def test_names_that_stay(tmp_path, name):
    assert resolve_inside(tmp_path, name) == tmp_path / name


def test_a_scan_of_a_longer_name_does_not_stand_in_for_a_missing_one(source):
    """p_1 has no file; p_1_2 is another visit, with a row of its own."""
    for folder in ("ct", "seg"):
        (source / folder / "p_1_2.nii.gz").write_bytes((source / folder / "ok_1.nii.gz").read_bytes())
    write_reports(source, [{"id": "ok_2"}, {"id": "p_1"}, {"id": "p_1_2"}])
    assert build(source) == 0
    names, skipped = read_back(source)
    assert names == ["ok_2", "p_1_2"] and "another case has the same volume file 'p_1_2.nii.gz'" in skipped["p_1"]
