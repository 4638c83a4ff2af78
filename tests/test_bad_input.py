"""Broken and missing input: a clear error, or a skip that is counted and listed. Never a silent replacement.

What the user sees of each kind stands in docs/bad_input.md: every row of its tables is brought about here, and the
message that comes is compared with the one in the row.
"""

import errno
import gzip
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import nibabel
import numpy as np
import pyarrow.parquet as pq
import pytest
from dicom_series import write_colour_capture, write_series
from phantom_split import build_split, render_scans
from tiny_release import REPORT, arrays, save_nifti, write_csv

from data_builders import run_cases
from data_builders.__main__ import main
from data_builders.cases import resolve_inside
from modeling_fvlm.image_files import MAX_EXTRA_BYTES
from modeling_fvlm.organs import TOTALSEGMENTATOR_V1, TOTALSEGMENTATOR_V2
from modeling_fvlm.processed_split import decode_volume

PAGE = Path(__file__).resolve().parents[1] / "docs" / "bad_input.md"
GOOD = ("ok_1", "ok_2")
# (slice, row, column) of `arrays` to mm in RAS+, as `save_nifti` writes it.
AFFINE = np.array([[0, 0, -4.0, 60], [0, -4.0, 0, 50], [3.0, 0, 0, -100], [0, 0, 0, 1]])


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


def row_of(source, name: str) -> dict:
    (row,) = [
        row
        for file in (source / "out" / "volumes").glob("*.parquet")
        for row in pq.read_table(file).to_pylist()
        if row["recon_id"] == name
    ]
    return row


# What goes wrong with the files of the case `bad`; each changes a source that was in order


def no_mask(source):
    (source / "seg" / "bad.nii.gz").unlink()


def no_volume(source):
    (source / "ct" / "bad.nii.gz").unlink()


def other_shape(source):
    save_nifti(arrays()[1][:, :, :-2], source / "seg" / "bad.nii.gz")


def other_place(source):
    save_nifti(arrays()[1], source / "seg" / "bad.nii.gz", spacing=(3.0, 4.0, 3.5))


def other_orientation(source):
    save_nifti(arrays(2)[1], source / "seg" / "bad.nii.gz", orientation="ASL")


def truncated(source):
    path = source / "ct" / "bad.nii.gz"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def truncated_mask(source):
    path = source / "seg" / "bad.nii.gz"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def bomb(source):
    path = source / "ct" / "bad.nii.gz"
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes()) + bytes(MAX_EXTRA_BYTES + (1 << 21)), 1))


def nan_voxels(source):
    volume = arrays()[0].astype(np.float32)
    volume[0, 0, :3] = np.nan
    save_nifti(volume, source / "ct" / "bad.nii.gz")


def two_dimensional(source):
    nibabel.save(nibabel.Nifti1Image(np.zeros((8, 8), np.int16), np.eye(4)), source / "ct" / "bad.nii.gz")


def four_dimensional(source):
    nibabel.save(nibabel.Nifti1Image(np.zeros((8, 8, 8, 3), np.int16), np.eye(4)), source / "ct" / "bad.nii.gz")


def no_nifti(source):
    (source / "ct" / "bad.nii.gz").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(100))


def wrong_magic(source):
    path = source / "ct" / "bad.nii.gz"
    content = bytearray(gzip.decompress(path.read_bytes()))
    content[344:348] = b"n+9\0"
    path.write_bytes(gzip.compress(bytes(content)))


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
    blank = nibabel.Nifti1Image(np.asarray(image.dataobj), None)
    blank.header["sform_code"] = blank.header["qform_code"] = 0
    nibabel.save(blank, source / "ct" / "bad.nii.gz")


def huge_header(source):
    """A header that tells of more voxels than any memory holds."""
    path = source / "ct" / "bad.nii.gz"
    content = bytearray(gzip.decompress(path.read_bytes()))
    content[42:48] = np.array([32767] * 3, dtype="<i2").tobytes()
    path.write_bytes(gzip.compress(bytes(content)))


def with_affine(affine) -> Callable:
    """Writes that affine into the header of the volume, as no library would."""

    def breaking(source):
        path = source / "ct" / "bad.nii.gz"
        content = bytearray(gzip.decompress(path.read_bytes()))
        content[252:256] = np.array([0, 1], "<i2").tobytes()  # no qform, an sform
        content[280:328] = np.array(affine, "<f4").tobytes()
        path.write_bytes(gzip.compress(bytes(content)))

    return breaking


zero_spacing = with_affine([[-4, 0, 0, 60], [0, 0, 0, 50], [0, 0, 3, -100]])
nan_affine = with_affine([[-4, 0, 0, 60], [0, np.nan, 0, 50], [0, 0, 3, -100]])
sheared = with_affine([[-4, 0, 0, 60], [0, -4, 1, 50], [0, 0, 3, -100]])
in_metres = with_affine([[-0.004, 0, 0, 0.06], [0, -0.004, 0, 0.05], [0, 0, 0.003, -0.1]])
in_micrometres = with_affine([[-4000, 0, 0, 60], [0, -4000, 0, 50], [0, 0, 3000, -100]])


def aslant(source):
    angle = np.radians(30)
    turn = np.eye(4)
    turn[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    for folder in ("ct", "seg"):
        image = nibabel.load(source / folder / "bad.nii.gz")
        nibabel.save(
            nibabel.Nifti1Image(np.asarray(image.dataobj), turn @ image.affine), source / folder / "bad.nii.gz"
        )


def mirrored(source):
    save_nifti(arrays(2)[0], source / "ct" / "bad.nii.gz", orientation="RPI")


def with_volume(change) -> Callable:
    def breaking(source):
        save_nifti(change(arrays(2)[0]), source / "ct" / "bad.nii.gz")

    return breaking


all_zero = with_volume(np.zeros_like)
doubled = with_volume(lambda hu: 2 * hu)
rescaled_twice = with_volume(lambda hu: hu - np.int16(1024))
never_rescaled = with_volume(lambda hu: hu + np.int16(1024))
half_rescaled = with_volume(lambda hu: (hu * 0.1).astype(np.int16))


def rescale_still_declared(source):
    image = nibabel.load(source / "ct" / "bad.nii.gz")
    image = nibabel.Nifti1Image(np.asarray(image.dataobj).astype(np.int16), image.affine)
    image.header.set_slope_inter(1, -1024)
    nibabel.save(image, source / "ct" / "bad.nii.gz")


def padding(source):
    volume = arrays(2)[0]
    volume[:, :, :2] = volume[:, :, -2:] = -3024
    save_nifti(volume, source / "ct" / "bad.nii.gz")


def metal(source):
    volume = arrays(2)[0]
    volume[0, 0, 0] = 30000
    save_nifti(volume, source / "ct" / "bad.nii.gz")


def other_numbering(source):
    """Masks of v1, and the table says so."""
    mask = arrays(2)[1]
    for label in np.unique(mask[mask > 0]):
        mask[arrays(2)[1] == label] = TOTALSEGMENTATOR_V1.index(TOTALSEGMENTATOR_V2[label - 1]) + 1
    save_nifti(mask, source / "seg" / "bad.nii.gz")
    write_reports(
        source, [{"id": n, "numbering": ""} for n in GOOD] + [{"id": "bad", "numbering": "totalsegmentator_v1"}]
    )


def as_dicom(write) -> Callable:
    def breaking(source):
        (source / "ct" / "bad.nii.gz").unlink()
        write(source / "ct" / "bad")

    return breaking


def places(without=()) -> np.ndarray:
    heights = np.delete(-100 + 3.0 * np.arange(20), without)
    return np.stack([np.full(len(heights), -60.0), np.full(len(heights), -50.0), heights], axis=1)


@as_dicom
def missing_slices(folder):
    write_series(folder, np.delete(arrays(2)[0], (7, 8), axis=0), AFFINE, positions=places(without=(7, 8)))


@as_dicom
def mixed_series(folder):
    for number in (3, 5):
        write_series(folder / str(number), arrays(2)[0], AFFINE, number=number)


@as_dicom
def colour_capture(folder):
    write_colour_capture(folder, count=6)


@as_dicom
def cut_slice(folder):
    write_series(folder, arrays(2)[0], AFFINE)
    path = sorted(folder.iterdir())[3]
    path.write_bytes(path.read_bytes()[:-300])


def empty_report(source):
    write_reports(source, [*({"id": name} for name in GOOD), {"id": "bad", "findings": " ", "impression": ""}])


# What is told


@dataclass(frozen=True)
class Told:
    """Second and third cell of a row of the page."""

    outcome: str
    message: str

    def check(self, text: str) -> None:
        """The message of the page stands in a text; "…" is for what differs from case to case."""
        pieces = self.message.strip("`").split("…")
        assert sum(map(len, pieces)) >= 15, "a message of a few letters fits everything"
        assert re.search(".*".join(map(re.escape, pieces)), " ".join(text.split())), f"not as on the page: {text}"


def read_page() -> dict[str, Told]:
    """First cell -> the next two, of every row of the page's tables."""
    rows: dict[str, Told] = {}
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        if not cells or cells[0] == "what is wrong" or set(cells[0]) <= {"-"}:
            continue
        assert len(cells) == 4 and all(cells), f"{cells[0]}: a row has four cells"
        assert cells[0] not in rows, f"{cells[0]} stands on the page twice"
        rows[cells[0]] = Told(*cells[1:3])
    return rows


TOLD = read_page()

SKIPPED = {
    "file cut short (.nii.gz)": truncated,
    "mask cut short": truncated_mask,
    "gzip bomb: far more behind the last voxel": bomb,
    "header tells of more voxels than the file holds": huge_header,
    "wrong magic in the header": wrong_magic,
    "another format under the name .nii.gz": no_nifti,
    "empty file": empty_file,
    "one slice (2-D)": two_dimensional,
    "a series of volumes (4-D)": four_dimensional,
    "NaN among the voxels": nan_voxels,
    "volume is missing": no_volume,
    "no orientation in the header": blank_header,
    "spacing of 0": zero_spacing,
    "spacing in metres": in_metres,
    "spacing in micrometres": in_micrometres,
    "NaN in the affine": nan_affine,
    "sheared affine": sheared,
    "every voxel is 0": all_zero,
    "slope applied twice (HU doubled)": doubled,
    "rescaled twice": rescaled_twice,
    "never rescaled": never_rescaled,
    "mask is missing": no_mask,
    "mask of another shape": other_shape,
    "mask of another grid": other_place,
    "mask without an organ of the set": empty_mask,
    "label that the numbering does not have": unknown_label,
    "DICOM with missing slices": missing_slices,
    "several series in one folder": mixed_series,
    "colour pictures (RGB secondary capture)": colour_capture,
    "a slice cut short": cut_slice,
    "report is empty": empty_report,
}
READ_RIGHT = {
    "axes in another order or mirrored, and the affine says so": mirrored,
    "mask stored in another orientation": other_orientation,
    "masks of another numbering, named in --numbering or the table": other_numbering,
}
WARNED = {
    "scan turned by more than 20 degrees": aslant,
    "padding of -3024 around the scan": padding,
    "values far outside of HU (metal)": metal,
    "rescaled already, and the header still declares it": rescale_still_declared,
    "HU scaled down (a slope that was cast to an integer)": half_rescaled,
}
# Rows of the table of reports, and options
STOPPED = {
    "a column of the table is missing": ([{"name": "ok_1"}], []),
    "a column that --columns names is missing": ([{"id": "ok_1"}], ["--columns", "findings=Findnigs"]),
    "an id comes twice": ([{"id": "ok_1"}, {"id": "ok_1"}], []),
    "one scan under two patients": ([{"id": i, "scan_id": "s", "patient_id": i} for i in GOOD], []),
    "one patient in two splits": (
        [{"id": i, "patient_id": "p", "split": s} for i, s in zip(GOOD, ("train", "val"))],
        [],
    ),
    "a path that leaves its folder": ([{"id": "ok_1", "volume": "../ct/ok_1.nii.gz"}], []),
    "an organ that the set does not have": ([{"id": "ok_1", "caption:lnug": "Clear."}], []),
    "an organ set with a class that does not exist": ([{"id": "ok_1"}], ["--organs", "broken.yaml"]),
    "a numbering that does not exist": ([{"id": "ok_1", "numbering": "totalsegmentator_v3"}], []),
    "a label that is none of 1, 0, -1": ([{"id": "ok_1", "label:Nodule": "perhaps"}], []),
    "half a rescale, or none": ([{"id": "ok_1", "rescale_slope": "1"}], []),
}
STOPPED_BY_THE_FILE = {
    "reports that are not UTF-8": "id,findings\nok_1,Gro\xdfe Leber\n".encode("latin-1"),
    "a workbook for a CSV": b"PK\x03\x04 and so on",
}
DURING = {
    "one file vanishes during the build": "skipped",
    "the source vanishes during the build": "stopped",
    "the disk of --out is full": "stopped",
    "the disk for temporary files is full": "stopped",
}
INSPECTED = {
    "axes mirrored, and the affine does not say so": "mirrored",
    "masks of another numbering, not named": "v1",
}


def test_the_page_tells_of_what_is_tested_here_and_of_nothing_else():
    outcomes = {
        **dict.fromkeys(SKIPPED, "skipped"),
        **dict.fromkeys(READ_RIGHT, "read right"),
        **dict.fromkeys(WARNED, "read, with a warning"),
        **dict.fromkeys((*STOPPED, *STOPPED_BY_THE_FILE), "stopped"),
        **DURING,
        **dict.fromkeys(INSPECTED, "read; `inspect` tells"),
    }
    assert {kind: told.outcome for kind, told in TOLD.items()} == outcomes
    assert {told.message for kind, told in TOLD.items() if kind in READ_RIGHT} == {"nothing"}


@pytest.mark.parametrize("kind", SKIPPED)
def test_a_broken_case_is_skipped_counted_and_listed(source, capsys, kind):
    SKIPPED[kind](source)
    assert build(source) == 0
    rows, skipped = read_back(source)
    assert rows == list(GOOD), "the others are written, and nothing in place of the broken one"
    assert list(skipped) == ["bad"], skipped
    TOLD[kind].check(skipped["bad"])
    assert str(source) not in skipped["bad"], "no folder of this machine in the manifest"
    printed = " ".join(capsys.readouterr().out.split())
    assert "1 skipped" in printed and "skipped bad:" in printed


@pytest.mark.parametrize("kind", [*READ_RIGHT, *WARNED])
def test_what_can_be_read_is_read_with_what_is_odd_about_it(source, capsys, kind):
    (READ_RIGHT | WARNED)[kind](source)
    assert build(source) == 0
    rows, skipped = read_back(source)
    assert rows == ["bad", *GOOD] and skipped == {}
    warnings = json.loads((source / "out" / "manifest.json").read_text())["warnings"]
    told = [entry["warning"] for entry in warnings if entry["case"] == "bad"]
    if kind in WARNED:
        TOLD[kind].check(" / ".join(told))
        assert "check bad:" in capsys.readouterr().out
    else:
        assert told == []
    if kind in READ_RIGHT or kind == "rescaled already, and the header still declares it":
        found = decode_volume(row_of(source, "bad"))
        for folder in ("ct", "seg", "out"):
            for path in sorted((source / folder).rglob("*"), reverse=True):
                path.unlink() if path.is_file() else path.rmdir()
        for seed, name in enumerate((*GOOD, "bad")):
            save_nifti(arrays(seed)[0], source / "ct" / f"{name}.nii.gz")
            save_nifti(arrays(seed)[1], source / "seg" / f"{name}.nii.gz")
        write_reports(source, [{"id": name} for name in (*GOOD, "bad")])
        assert build(source) == 0
        for array, expected in zip(found, decode_volume(row_of(source, "bad"))):
            assert np.array_equal(array, expected) and array.any()


@pytest.mark.parametrize("kind", [*STOPPED, *STOPPED_BY_THE_FILE])
def test_a_wrong_table_stops_the_build_before_anything_is_written(source, capsys, monkeypatch, kind):
    (source / "broken.yaml").write_text("name: broken\norgans: {oesophagus: {totalsegmentator_v2: [oesophagus]}}\n")
    monkeypatch.chdir(source)
    if kind in STOPPED:
        rows, arguments = STOPPED[kind]
        write_reports(source, rows)
    else:
        arguments = []
        (source / "reports.csv").write_bytes(STOPPED_BY_THE_FILE[kind])
    assert build(source, *arguments) == 2
    TOLD[kind].check(capsys.readouterr().err)
    assert not (source / "out").exists()


def no_space(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("kind", DURING)
def test_what_happens_during_a_build_is_told(source, capsys, monkeypatch, kind):
    copy, seen = run_cases.local_copy, []

    def disturbed(file):
        seen.append(file)
        if kind.startswith("one file") and file.parent.name == "ct" and file.name == "bad.nii.gz":
            file.unlink()
        if kind.startswith("the source") and len(seen) == 1:
            (source / "ct").rename(source / "taken")
        if kind.startswith("the disk for temporary"):
            no_space()
        return copy(file)

    monkeypatch.setattr(run_cases, "local_copy", disturbed)
    if kind.startswith("the disk of --out"):
        monkeypatch.setattr(pq.ParquetWriter, "write_table", no_space)
    if DURING[kind] == "skipped":
        assert build(source) == 0
        rows, skipped = read_back(source)
        assert rows == list(GOOD) and list(skipped) == ["bad"]
        TOLD[kind].check(skipped["bad"])
        return
    assert build(source) == 2
    message = capsys.readouterr().err
    TOLD[kind].check(message)
    assert "What is finished stays; run the same command again to continue." in message
    assert not (source / "out" / "manifest.json").exists()


@pytest.fixture(scope="module")
def bodies(tmp_path_factory):
    """Three bodies that are in order, but for what a test makes of them: a look at the organs needs organs."""
    return render_scans(tmp_path_factory.mktemp("bodies"), 2, 1)


@pytest.mark.parametrize("kind", INSPECTED)
def test_what_no_header_tells_is_told_by_inspect(bodies, tmp_path, capsys, kind):
    masks = "v2"
    if INSPECTED[kind] == "mirrored":
        scans = tmp_path / "scans"
        for folder in ("ct", "v2"):
            (scans / folder).mkdir(parents=True)
            for path in (bodies / folder).iterdir():
                image = nibabel.load(path)
                nibabel.save(
                    nibabel.Nifti1Image(np.asarray(image.dataobj)[::-1], image.affine), scans / folder / path.name
                )
        for name in ("cases.csv", "organs.yaml"):
            (scans / name).write_bytes((bodies / name).read_bytes())
    else:
        scans, masks = bodies, INSPECTED[kind]
    out = build_split(scans, tmp_path / "out", masks=masks)
    assert len(read_back(tmp_path)[0]) == 3
    capsys.readouterr()
    assert main(["inspect", str(out), "--cases", "0", "--workers", "1", "--strict"]) == 1
    TOLD[kind].check(capsys.readouterr().out)


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
