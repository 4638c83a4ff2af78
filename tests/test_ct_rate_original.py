"""CT-RATE's original volumes: blank headers, shifted values, and yet the corrected release's arrays, bit for bit.

An original release is made from a corrected one (the synthetic set): every volume is turned to some stored order, its
values are shifted, its header is blanked, and what the header said goes into the metadata as the scanner writes it.
"""

import argparse
import csv
import itertools
import json
import re
import shutil

import nibabel
import numpy as np
import pyarrow.parquet as pq
import pytest
from tiny_release import write_csv

from data_builders import ct_rate, synthetic
from data_builders.__main__ import main
from data_builders.ct_rate import find_cases, header_of
from data_builders.sources import Source
from modeling_fvlm.geometry import BadVolumeError
from modeling_fvlm.reading import read_nifti, read_volume, volume_from_array

SPACING = (24.0, 8.0, 9.0)  # depth, height, width: coarse, and no two alike
GRID = ["--spacing", "20", "8", "8", "--margin", "1", "2", "2", "--previews", "0", "--workers", "1"]
COLUMNS = (*synthetic.METADATA_COLUMNS,)


def directions(orientation: str) -> np.ndarray:
    """Where the stored axes grow to, as columns in LPS."""
    columns = {"L": (1, 0, 0), "R": (-1, 0, 0), "P": (0, 1, 0), "A": (0, -1, 0), "S": (0, 0, 1), "I": (0, 0, -1)}
    return np.array([columns[letter] for letter in orientation]).T


def proper(orientation: str) -> bool:
    """Whether the third stored axis goes where the cross product of the first two says: all that metadata can tell."""
    return np.linalg.det(directions(orientation)) > 0


ORIENTATIONS = [
    "".join(letters)
    for axes in itertools.permutations(("LR", "PA", "SI"))
    for letters in itertools.product(*axes)
    if proper("".join(letters))
]
FLIPS = ("LPS", "LAI", "RPI", "RAS")  # x, y, z in this order, whatever their signs


@pytest.fixture(scope="module")
def corrected(tmp_path_factory):
    """A corrected release of four scans, one of which shows no chest or is like the others, as the seed has it."""
    out = tmp_path_factory.mktemp("corrected")
    arguments = argparse.Namespace(out=out, patients=3, validation=1, seed=3, workers=1, spacing=SPACING)
    assert synthetic.run(arguments) == 0
    return out


def make_original(corrected, root, orientation="LPS", shift=1024, told=None):
    """The original release of a corrected one.

    Args:
        orientation: Directions in which the stored axes of the volumes grow.
        shift: What the stored values lie above HU; the metadata declare it.
        told: Changes to the cells of the metadata: column -> function of the cell.
    """
    shutil.copytree(corrected, root)
    dataset = root / "dataset"
    for split, folder in ct_rate.FOLDER_OF_SPLIT.items():
        table = dataset / "metadata" / f"{split}_metadata.csv"
        with table.open(newline="") as file:
            rows = {row["VolumeName"]: row for row in csv.DictReader(file)}
        for path in sorted((dataset / f"{folder}_fixed").rglob("*.nii.gz")):
            image = nibabel.load(path)
            codes = nibabel.orientations.axcodes2ornt(tuple(orientation))
            image = image.as_reoriented(
                nibabel.orientations.ornt_transform(nibabel.io_orientation(image.affine), codes)
            )
            lps = np.diag([-1, -1, 1, 1]) @ image.affine
            spacing = [round(float(step), 4) for step in np.linalg.norm(lps[:3, :3], axis=0)]
            directions = np.rint(lps[:3, :2] / spacing[:2]).T  # of x and of y, rows
            cells = {
                "XYSpacing": str(spacing[:2]),
                "ZSpacing": str(spacing[2]),
                "ImageOrientationPatient": str([float(value) for value in directions.ravel()]),
                "ImagePositionPatient": str([round(float(value), 2) for value in lps[:3, 3]]),
                "RescaleSlope": "1",
                "RescaleIntercept": str(-shift),
                "NumberofSlices": str(image.shape[2]),
            }
            for column, change in (told or {}).items():
                cells[column] = change(cells[column])
            rows[path.name].update(cells)
            place = dataset / folder / path.relative_to(dataset / f"{folder}_fixed")
            place.parent.mkdir(parents=True)
            stored = np.asarray(image.dataobj) + np.int16(shift)
            blank = nibabel.Nifti1Image(stored, None)
            assert not blank.header["sform_code"] and not blank.header["qform_code"]
            nibabel.save(blank, place)
        shutil.rmtree(dataset / f"{folder}_fixed")
        write_csv(table, list(rows.values()))
    return root


def build(source, out, *more) -> list[dict]:
    """The rows of both splits."""
    assert main(["ct_rate", "--source", str(source), "--out", str(out), *GRID, *more]) == 0
    return [row for file in sorted((out / "volumes").glob("*.parquet")) for row in pq.read_table(file).to_pylist()]


def skipped(out) -> dict[str, str]:
    return {entry["case"]: entry["reason"] for entry in json.loads((out / "manifest.json").read_text())["skipped"]}


@pytest.fixture(scope="module")
def expected(corrected, tmp_path_factory):
    rows = build(corrected, tmp_path_factory.mktemp("expected") / "out")
    assert len(rows) >= 3 and all(np.prod(row["shape"]) > 1000 for row in rows)
    return rows


@pytest.mark.parametrize(("orientation", "shift"), [*zip(FLIPS, (1024, 8192, 1024, 8192))])
def test_the_split_is_that_of_the_corrected_release(corrected, expected, tmp_path, orientation, shift):
    source = make_original(corrected, tmp_path / "original", orientation, shift)
    rows = build(source, tmp_path / "out", "--volumes", "original")
    assert rows == expected, "bit for bit: volumes, masks, spacing, captions and labels"
    options = json.loads((tmp_path / "out" / "manifest.json").read_text())["settings"]["options"]
    assert options["volumes"] == "original"


def opened(case):
    return read_volume(case.volume, np.array(case.affine), case.rescale)


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_every_stored_order_that_the_metadata_can_tell(corrected, tmp_path, orientation):
    """Of 24 orders the corrected release has ten right, as it writes directions in rows; the others are not guessed."""
    source = make_original(corrected, tmp_path / "original", orientation, 1024)
    cases = find_cases(Source(source), ["train"], volumes="original")
    is_right = np.array_equal(directions(orientation), directions(orientation).T)
    assert len(cases) == 3
    for case in cases:
        if case.is_excluded:
            continue
        if not is_right:
            assert "the scan is turned by more than 30 degrees" in case.skip_reason
            continue
        assert case.skip_reason is None
        volume = opened(case)
        inside = case.volume.relative_to(source / "dataset" / "train")
        true = read_nifti(corrected / "dataset" / "train_fixed" / inside)
        assert np.array_equal(volume.array, true.array) and volume.spacing == true.spacing
        np.testing.assert_allclose(volume.affine, true.affine, atol=0.02)  # positions are written with two decimals


def test_ten_of_twenty_four_orders_are_right():
    turns = [directions(orientation) for orientation in ORIENTATIONS]
    assert len(turns) == 24 and sum(np.array_equal(turn, turn.T) for turn in turns) == 10
    assert all(np.array_equal(directions(orientation), directions(orientation).T) for orientation in FLIPS)


def negated(axis: int):
    def change(cell: str) -> str:
        values = json.loads(cell)
        values[3 * axis : 3 * axis + 3] = [-value for value in values[3 * axis : 3 * axis + 3]]
        return str(values)

    return change


@pytest.mark.parametrize("axis", [0, 1])
def test_a_wrong_sign_is_seen_by_the_grid_of_the_mask(corrected, tmp_path, axis):
    source = make_original(corrected, tmp_path / "original", told={"ImageOrientationPatient": negated(axis)})
    assert (
        main(["ct_rate", "--source", str(source), "--out", str(tmp_path / "out"), *GRID, "--volumes", "original"]) == 1
    )
    reasons = [reason for reason in skipped(tmp_path / "out").values() if "shows no chest" not in reason]
    assert reasons and all("are not on one grid" in reason for reason in reasons)


@pytest.mark.parametrize(
    "wrong",
    [
        np.diag([1.0, 1.0, 1.0, 1.0]),  # LPS taken for RAS
        np.diag([-1.0, 1.0, 1.0, 1.0]),
        np.diag([1.0, -1.0, 1.0, 1.0]),
        np.diag([-1.0, -1.0, -1.0, 1.0]),
    ],
)
def test_a_wrong_sign_in_our_code_would_be_seen(corrected, tmp_path, monkeypatch, wrong):
    """The comparison above can fail: with any axis of the affine the other way the arrays are no longer equal."""
    plain = ct_rate.repair_header

    def turned(*args, **kwargs):
        hu, affine = plain(*args, **kwargs)
        return hu, np.diag([-1.0, -1.0, 1.0, 1.0]) @ wrong @ affine

    source = make_original(corrected, tmp_path / "original", "LPS", 1024)
    monkeypatch.setattr(ct_rate, "repair_header", turned)
    compared = 0
    for case in find_cases(Source(source), ["train"], volumes="original"):
        if case.skip_reason is None:
            inside = case.volume.relative_to(source / "dataset" / "train")
            true = read_nifti(corrected / "dataset" / "train_fixed" / inside)
            assert not np.array_equal(opened(case).array, true.array)
            compared += 1
    assert compared


def test_an_order_that_the_metadata_cannot_tell_is_skipped(corrected, tmp_path):
    """Slices from head to feet over directions that say feet to head: the mask's own header tells."""
    source = make_original(corrected, tmp_path / "original", "LPI", 1024)
    status = main(["ct_rate", "--source", str(source), "--out", str(tmp_path / "out"), *GRID, "--volumes", "original"])
    assert status == 1
    assert any("are not on one grid" in reason for reason in skipped(tmp_path / "out").values())


def test_spacing_goes_with_its_axis(corrected, tmp_path):
    """XYSpacing is (x, y); exchanged it would put the spacing of the width on the height."""
    source = make_original(
        corrected, tmp_path / "original", told={"XYSpacing": lambda cell: str(json.loads(cell)[::-1])}
    )
    case = next(case for case in find_cases(Source(source), ["train"], volumes="original") if case.skip_reason is None)
    inside = case.volume.relative_to(source / "dataset" / "train")
    true = read_nifti(corrected / "dataset" / "train_fixed" / inside)
    volume = opened(case)
    assert volume.spacing == (true.spacing[0], true.spacing[2], true.spacing[1]) != true.spacing


def test_values_that_are_hu_already_are_not_rescaled_again(corrected, expected, tmp_path):
    """The metadata of some originals declare an intercept that is in the values already."""
    source = make_original(corrected, tmp_path / "original", "LPS", 0, {"RescaleIntercept": lambda cell: "-1024"})
    assert build(source, tmp_path / "auto", "--volumes", "original") == expected
    assert build(source, tmp_path / "skip", "--volumes", "original", "--rescale", "skip") == expected
    applied = build(source, tmp_path / "apply", "--volumes", "original", "--rescale", "apply")
    shifted = [np.array_equal(row["volume"], other["volume"]) for row, other in zip(applied, expected)]
    assert len(shifted) == len(expected) and not any(shifted)


# Metadata that cannot be used

ROW = {
    "XYSpacing": "[0.7, 0.8]",
    "ZSpacing": "1.5",
    "ImageOrientationPatient": "[1.0, 0.0, 0.0, 0.0, 1.0, 0.0]",
    "ImagePositionPatient": "['-170.5', '-160.0', '20.25']",
    "RescaleSlope": "1",
    "RescaleIntercept": "-8192",
}


def test_the_header_of_a_row_in_closed_form():
    affine, rescale = header_of(ROW)
    expected = [[-0.7, 0, 0, 170.5], [0, -0.8, 0, 160.0], [0, 0, 1.5, 20.25], [0, 0, 0, 1]]
    np.testing.assert_allclose(affine, expected, rtol=1e-7)
    assert rescale == (1.0, -8192.0)
    assert affine == tuple(tuple(float(np.float32(value)) for value in line) for line in affine), "as a header keeps it"


@pytest.mark.parametrize(
    ("cells", "told"),
    [
        ({"XYSpacing": "[0.7]"}, r"XYSpacing is '\[0.7\]', not 2 finite numbers"),
        ({"XYSpacing": "0.7 0.7"}, "XYSpacing is '0.7 0.7', not 2 finite numbers"),
        ({"XYSpacing": "[0.7, 0]"}, r"XYSpacing is \[0.7, 0\]; it must be above 0 mm"),
        ({"ZSpacing": ""}, "ZSpacing is '', not a finite number"),
        ({"ZSpacing": "-1.5"}, "ZSpacing is -1.5; it must be above 0 mm"),
        ({"ImagePositionPatient": "[0, 0, nan]"}, "ImagePositionPatient is .* not 3 finite numbers"),
        ({"ImageOrientationPatient": "[1, 0, 0]"}, "ImageOrientationPatient is .* not 6 finite numbers"),
        ({"ImageOrientationPatient": "[1, 0, 0, 0.1, 1, 0]"}, "not two directions at right angles"),
        ({"ImageOrientationPatient": "[2, 0, 0, 0, 1, 0]"}, "not two directions at right angles"),
        ({"ImageOrientationPatient": "[0, 0, 0, 0, 0, 0]"}, "not two directions at right angles"),
        ({"ImageOrientationPatient": "[0, 1, 0, -1, 0, 0]"}, "turned by more than 30 degrees"),
        ({"RescaleSlope": "0"}, "RescaleSlope is 0"),
        ({"RescaleIntercept": "none"}, "RescaleIntercept is 'none', not a finite number"),
    ],
)
def test_a_row_that_cannot_be_used_says_why(cells, told):
    with pytest.raises(BadVolumeError, match=told):
        header_of({**ROW, **cells})


def test_such_a_volume_is_skipped_with_its_reason(corrected, tmp_path):
    source = make_original(corrected, tmp_path / "original")
    table = source / "dataset" / "metadata" / "train_metadata.csv"
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    rows[0]["ZSpacing"] = "nan"
    rows[1:2] = []  # no row
    rows.append({**rows[1], "RescaleIntercept": "-8192"})  # train_3 once more, and otherwise
    rows.append(rows[0])  # the same words twice say nothing new
    write_csv(table, rows)
    reasons = {case.recon_id: case.skip_reason for case in find_cases(Source(source), ["train"], volumes="original")}
    no_chest = (source / "dataset" / "metadata" / "no_chest_train.txt").read_text()
    told = {
        "train_1_a_1": "train_metadata.csv: ZSpacing is 'nan', not a finite number",
        "train_2_a_1": "train_metadata.csv: there is no row of this volume",
        "train_3_a_1": "train_metadata.csv: two rows of this volume contradict each other",
    }
    assert reasons == {
        name: "shows no chest (listed in the release)" if name in no_chest else reason for name, reason in told.items()
    }


def test_without_metadata_there_are_no_originals(corrected, tmp_path, capsys):
    source = make_original(corrected, tmp_path / "original")
    arguments = ["ct_rate", "--source", str(source), "--out", str(tmp_path / "out"), *GRID, "--volumes", "original"]
    table = source / "dataset" / "metadata" / "train_metadata.csv"
    table.write_text(table.read_text().replace("ImagePositionPatient", "Position"))
    assert main(arguments) == 2
    assert "train_metadata.csv has no column 'ImagePositionPatient'" in capsys.readouterr().err
    table.unlink()
    assert main(arguments) == 2
    assert "there is no file dataset/metadata/train_metadata.csv" in capsys.readouterr().err
    assert main(arguments[:-2]) == 2
    assert "blank headers: give --volumes original" in capsys.readouterr().err


# The published correction of three small volumes


@pytest.fixture
def golden(shared_dir, tmp_path):
    """The published inputs in CT-RATE's layout: original volumes, and masks under the corrected header."""
    source, root = shared_dir / "golden" / "preprocess", tmp_path / "golden" / "dataset"
    shutil.copytree(source / "train", root / "train")
    shutil.copytree(source / "train_mask", root / "ts_seg" / "ts_total" / "train_fixed")
    shutil.copytree(source / "metadata", root / "metadata")
    names = [f"train_{number}_a_1.nii.gz" for number in (1, 2, 3)]
    reports = [{"VolumeName": name, "Findings_EN": f"Of {name}.", "Impressions_EN": ""} for name in names]
    write_csv(root / "radiology_text_reports" / "train_reports.csv", reports)
    return root, source / "train_fixed"


def test_the_header_is_the_published_one(golden):
    """Also that of a scan turned by 8.6 degrees, and with unequal spacings in the plane."""
    root, fixed = golden
    cases = find_cases(Source(root), ["train"], volumes="original")
    assert [case.skip_reason for case in cases] == [None] * 3
    for case in cases:
        path = fixed / case.volume.relative_to(root / "train")
        assert np.array_equal(np.array(case.affine), nibabel.load(path).affine)
    assert [case.rescale for case in cases] == [(1.0, -1024.0), (2.0, -1000.0), (0.5, -512.0)]


def test_the_published_volumes_come_out(golden):
    root, fixed = golden
    for case in find_cases(Source(root), ["train"], volumes="original")[:2]:
        true = read_nifti(fixed / case.volume.relative_to(root / "train"))
        volume = read_volume(case.volume, np.array(case.affine), case.rescale, "apply")
        assert np.array_equal(volume.array, true.array) and volume.spacing == true.spacing
    # The third was collapsed to its intercept by the published code; ours keeps its slope of one half.
    case = find_cases(Source(root), ["train"], volumes="original")[2]
    stored = np.asarray(nibabel.load(case.volume).dataobj)
    halved = volume_from_array(stored, np.array(case.affine), rescale=(0.5, -512.0))
    assert np.array_equal(read_volume(case.volume, np.array(case.affine), case.rescale, "apply").array, halved.array)


@pytest.mark.parametrize("preprocessing", ["standard", "published"])
def test_the_golden_release_is_built(golden, tmp_path, preprocessing):
    root, fixed = golden
    arguments = ["--organs", "chest_4", "--splits", "train", "--rescale", "apply", "--preprocessing", preprocessing]
    rows = build(root, tmp_path / "out", *arguments, "--volumes", "original")
    assert [row["recon_id"] for row in rows] == ["train_1_a_1", "train_2_a_1", "train_3_a_1"]
    shutil.copytree(fixed, root / "train_fixed")
    expected = build(root, tmp_path / "fixed", *arguments)
    assert rows[:2] == expected[:2]
    assert rows[2]["mask"] == expected[2]["mask"] and rows[2]["volume"] != expected[2]["volume"]


def test_hashed_ids_leave_no_id_of_the_source(corrected, tmp_path):
    """Reasons and marks of duplicates name other cases."""
    source = make_original(corrected, tmp_path / "original", "LPS", 1024)
    dataset = source / "dataset"
    for table in ("radiology_text_reports/train_reports.csv", "metadata/train_metadata.csv"):
        with (dataset / table).open(newline="") as file:
            rows = list(csv.DictReader(file))
        write_csv(
            dataset / table, [*rows, *({**row, "VolumeName": row["VolumeName"].replace("a_1", "a_2")} for row in rows)]
        )
    for path in sorted(dataset.rglob("train_*_a_1.nii.gz")):
        shutil.copy(path, path.with_name(path.name.replace("a_1.", "a_2.")))
    more = ["--volumes", "original", "--reconstructions", "best", "--ids", "hashed"]
    assert len(build(source, tmp_path / "out", *more)) >= 3
    told = (tmp_path / "out" / "manifest.json").read_text()
    assert "another reconstruction of this scan" in told
    assert not re.search(r"(train|valid)_\d+_a", told)
