"""The folder builder: one scan in every format gives the same rows, and what belongs to a case is found by its name."""

import json

import numpy as np
import pytest
import SimpleITK
from dicom_series import SECRETS, write_colour_capture, write_series, zip_folder
from test_folder import rows_of
from tiny_release import BOXES, REPORT, SPACING, arrays, save_nifti, write_csv

from data_builders.__main__ import main
from data_builders.folder_files import find_mask, find_volume, list_archive
from modeling_fvlm.organs import TOTALSEGMENTATOR_V1, TOTALSEGMENTATOR_V2, load_organ_set
from modeling_fvlm.processed_split import decode_volume

GRID = ["--spacing", "3", "4", "4", "--margin", "2", "3", "3", "--previews", "0", "--workers", "1"]
# The same voxels to mm in RAS+ as `save_nifti` writes them, for the axes (depth, height, width).
AFFINE = np.array([[0, 0, -4.0, 60], [0, -4.0, 0, 50], [3.0, 0, 0, -100], [0, 0, 0, 1]])


def build(out, *arguments) -> int:
    more = ["--ids", "kept", "--validation_fraction", "0", *GRID]
    return main(["folder", "--out", str(out), *map(str, arguments), *more])


def skipped(out) -> dict[str, str]:
    return {entry["case"]: entry["reason"] for entry in json.loads((out / "manifest.json").read_text())["skipped"]}


def save_itk(array: np.ndarray, path) -> None:
    """NRRD or MetaImage, by the ending of the path."""
    image = SimpleITK.GetImageFromArray(array)
    image.SetSpacing(SPACING[::-1])
    image.SetOrigin((-60.0, -50.0, -100.0))  # LPS
    path.parent.mkdir(parents=True, exist_ok=True)
    SimpleITK.WriteImage(image, str(path), useCompression=path.suffix in (".nrrd", ".mha"))


def save_structures(mask: np.ndarray, folder, ending: str = ".nii.gz") -> None:
    """One file per structure, as TotalSegmentator writes them; those of absent structures are empty."""
    for name in (*BOXES, "spleen"):
        structure = (mask == TOTALSEGMENTATOR_V2.index(name) + 1).astype(np.uint8)
        if ending == ".nii.gz":
            save_nifti(structure, folder / f"{name}{ending}", "PIR")
        else:
            save_itk(structure, folder / f"{name}{ending}")


def in_v1(mask: np.ndarray) -> np.ndarray:
    relabelled = np.zeros_like(mask)
    for name in BOXES:
        relabelled[mask == TOTALSEGMENTATOR_V2.index(name) + 1] = TOTALSEGMENTATOR_V1.index(name) + 1
    return relabelled


def table_of(path, names, **columns):
    return write_csv(path, [{"id": name, **columns.get(name, {}), **REPORT} for name in names])


KINDS = {
    "nifti": {},
    "plain": {},
    "nrrd": {},
    "nhdr": {},
    "mha": {"numbering": "totalsegmentator_v1"},
    "mhd": {},
    "dicom": {},
    "deep": {"series": "3"},
    "zipped": {},
}


@pytest.fixture(scope="module")
def every_format(tmp_path_factory):
    """One scan in nine formats, with masks of five kinds, and the rows they become."""
    root = tmp_path_factory.mktemp("formats")
    volume, mask = arrays(4)
    ct, seg = root / "ct", root / "seg"
    save_nifti(volume, ct / "nifti.nii.gz", "RAS")
    save_nifti(mask, seg / "nifti.nii.gz", "ASL")
    save_nifti(volume, ct / "plain" / "ct.nii", "PIL")
    save_nifti(mask, seg / "plain" / "seg.nii", "LPS")
    save_itk(volume, ct / "nrrd.nrrd")
    save_itk(mask, seg / "nrrd_seg.nrrd")
    save_itk(volume, ct / "nhdr.nhdr")
    save_structures(mask, seg / "nhdr", ".nrrd")
    save_itk(volume, ct / "mha.mha")
    save_itk(in_v1(mask), seg / "mha.mha")
    save_itk(volume, ct / "mhd.mhd")
    save_nifti(mask.astype(np.float32), seg / "mhd.nii.gz", "RAS")
    write_series(ct / "dicom", volume, AFFINE)
    save_structures(mask, seg / "dicom")
    save_nifti(mask, seg / "dicom" / "my_lesion.nii.gz")
    write_series(ct / "deep" / "study" / "3", volume, AFFINE, number=3)
    write_series(ct / "deep" / "study" / "7", volume[::2] + 100, AFFINE, number=7)
    save_structures(mask, seg / "deep" / "segmentations")
    write_series(root / "unpacked", volume, AFFINE, rescale=(0.5, -1100))
    zip_folder(root / "unpacked", ct / "zipped.zip")
    save_nifti(mask, seg / "zipped.nii.gz", "LAS")
    table = table_of(root / "reports.csv", KINDS, **KINDS)
    assert build(root / "out", "--volumes", ct, "--masks", seg, "--reports", table) == 0
    return root, rows_of(root / "out")


@pytest.mark.parametrize("kind", KINDS)
def test_every_format_gives_the_same_row(every_format, kind):
    root, rows = every_format
    assert skipped(root / "out") == {}
    volume, mask = decode_volume(rows["nifti"])
    assert np.array_equal(volume, arrays(4)[0][1:19, 3:23, 2:30]), "the box of the organs and its margin"
    organs = load_organ_set("body_24").organs
    assert set(np.unique(mask)) == {0, *(organs.index(name) + 1 for name in ("lung", "liver", "aorta"))}
    other_volume, other_mask = decode_volume(rows[kind])
    assert np.array_equal(other_volume, volume) and np.array_equal(other_mask, mask)
    assert rows[kind]["spacing"] == pytest.approx(rows["nifti"]["spacing"], abs=1e-6)


def test_what_is_left_out_and_turned_is_told(every_format, tmp_path, capsys):
    root, _ = every_format
    table = table_of(tmp_path / "r.csv", ("nifti", "dicom"))
    arguments = ["--volumes", root / "ct", "--masks", root / "seg", "--reports", table]
    assert build(tmp_path / "out", *arguments) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "as no structure of TotalSegmentator has that name: my_lesion in 1 case" in printed
    assert "in 1 of 1 case looked at, volume and mask store their axes in different orders" in printed
    assert "7 files and folders in --volumes belong to no row of r.csv, e.g. mha.mha" in printed


def test_structures_stand_in_the_manifest_as_a_numbering(every_format):
    numberings = json.loads((every_format[0] / "out" / "manifest.json").read_text())["settings"]["numberings"]
    assert numberings["totalsegmentator_v1"] == "totalsegmentator_v1" and "liver" in numberings["structures"].values()


# Which of several DICOM series


@pytest.fixture(scope="module")
def two_series(tmp_path_factory):
    root = tmp_path_factory.mktemp("series")
    volume, mask = arrays(2)
    uids = [
        write_series(root / "ct" / "two" / str(number), volume + shift, AFFINE, number=number)
        for number, shift in ((3, 0), (5, 11))
    ]
    save_nifti(mask, root / "seg" / "two.nii.gz")
    return root, uids


@pytest.mark.parametrize("choice", ["number", "uid"])
def test_the_column_series_chooses(two_series, tmp_path, choice):
    root, uids = two_series
    table = table_of(tmp_path / "r.csv", ["two"], two={"series": "5" if choice == "number" else uids[1]})
    assert build(tmp_path / "out", "--volumes", root / "ct", "--masks", root / "seg", "--reports", table) == 0
    volume, _ = decode_volume(rows_of(tmp_path / "out")["two"])
    assert np.array_equal(volume, arrays(2)[0][1:19, 3:23, 2:30] + 11)


@pytest.mark.parametrize(
    ("series", "told"),
    [
        ("", "it holds 2 CT volumes: series 3 (CT, 20 slices of 24 x 32, 3 x 4 x 4 mm), series 5 (CT"),
        ("4", "no series has the number 4 in 'two'; it holds series 3 (CT, 20 slices"),
        ("1.2.3", "no series has the series_uid that was asked for"),
        ("thin", "holds 'thin', which is neither a SeriesInstanceUID nor a series number"),
    ],
)
def test_mixed_series_are_skipped_with_the_choices(two_series, tmp_path, series, told):
    root, _ = two_series
    table = table_of(tmp_path / "r.csv", ["two"], two={"series": series})
    assert build(tmp_path / "out", "--volumes", root / "ct", "--masks", root / "seg", "--reports", table) == 1
    assert told in skipped(tmp_path / "out")["two"]


@pytest.mark.parametrize("ids", ["kept", "hashed"])
@pytest.mark.parametrize(
    ("series", "told"),
    [("", "Name one (by its SeriesInstanceUID in the column"), ("3", "2 series have the number 3 in ")],
)
def test_series_of_one_number_are_chosen_by_their_uid(tmp_path, series, told, ids):
    """No message tells the UIDs, which lead to a patient; it tells what lists them."""
    volume, mask = arrays(2)
    uids = [write_series(tmp_path / "ct" / "two" / part, volume + len(part), AFFINE, number=3) for part in "ab"]
    save_nifti(mask, tmp_path / "seg" / "two.nii.gz")
    table = table_of(tmp_path / "r.csv", ["two"], two={"series": series})
    places = ["--volumes", tmp_path / "ct", "--masks", tmp_path / "seg", "--reports", table]
    assert main(["folder", "--out", str(tmp_path / "out"), *map(str, places), *GRID, "--ids", ids]) == 1
    (reason,) = skipped(tmp_path / "out").values()
    assert told in reason and "SeriesInstanceUID" in reason and "find_series of modeling_fvlm tells" in reason
    assert not any(uid in reason for uid in uids)


def test_a_rescale_for_dicom_is_refused(every_format, tmp_path):
    root, _ = every_format
    rescale = {"rescale_slope": "1", "rescale_intercept": "-1024"}
    table = table_of(tmp_path / "r.csv", ["dicom", "zipped", "nrrd"], dicom=rescale, zipped=rescale, nrrd={})
    assert build(tmp_path / "out", "--volumes", root / "ct", "--masks", root / "seg", "--reports", table) == 0
    assert list(rows_of(tmp_path / "out")) == ["nrrd"]
    assert all("is DICOM, whose files have their own; leave them empty" in skipped(tmp_path / "out")[name]
               for name in ("dicom", "zipped"))  # fmt: skip


def test_a_series_of_a_nifti_file(every_format, tmp_path):
    root, _ = every_format
    table = table_of(tmp_path / "r.csv", ["nifti"], nifti={"series": "3"})
    assert build(tmp_path / "out", "--volumes", root / "ct", "--masks", root / "seg", "--reports", table) == 1
    assert "the volume 'nifti.nii.gz' is no DICOM folder or zip" in skipped(tmp_path / "out")["nifti"]


def a_hole(folder):
    write_series(folder, np.delete(arrays()[0], (7, 8), axis=0), np.copy(AFFINE), positions=places(without=(7, 8)))


def places(without=()) -> np.ndarray:
    heights = np.delete(-100 + 3.0 * np.arange(20), without)
    return np.stack([np.full(len(heights), -60.0), np.full(len(heights), -50.0), heights], axis=1)


def colours_alone(folder):
    write_colour_capture(folder, count=6)


def text_alone(folder):
    folder.mkdir(parents=True)
    (folder / "notes.txt").write_text("Erika Mustermann, 4711")


def damaged_zip(folder):
    write_series(folder.with_name("unpacked"), arrays()[0], AFFINE)
    path = zip_folder(folder.with_name("unpacked"), folder.with_name("bad.zip"))
    path.write_bytes(path.read_bytes()[:2000])


@pytest.mark.parametrize(
    ("breaking", "told"),
    [
        (a_hole, "missing"),
        (colours_alone, "colour pictures (secondary capture), not HU"),
        (text_alone, "no DICOM image"),
        (damaged_zip, "damaged"),
    ],
)
def test_dicom_that_is_no_scan_is_skipped_with_its_reason(tmp_path, breaking, told):
    breaking(tmp_path / "ct" / "bad")
    save_nifti(arrays()[1], tmp_path / "seg" / "bad.nii.gz")
    table = table_of(tmp_path / "r.csv", ["bad"])
    assert build(tmp_path / "out", "--volumes", tmp_path / "ct", "--masks", tmp_path / "seg", "--reports", table) == 1
    reason = skipped(tmp_path / "out")["bad"]
    assert told in reason
    assert str(tmp_path) not in reason and not any(word in reason.lower() for word in SECRETS)


def test_dicom_beside_its_mask_in_one_folder(tmp_path):
    """The only NIfTI in the case's folder is a mask here: it must not pass for the volume."""
    volume, mask = arrays(1)
    write_series(tmp_path / "all" / "flat", volume, AFFINE)
    save_nifti(mask, tmp_path / "all" / "flat" / "seg.nii.gz")
    write_series(tmp_path / "all" / "apart" / "dicom", volume, AFFINE)
    save_structures(mask, tmp_path / "all" / "apart" / "segmentations")
    write_series(tmp_path / "all" / "both" / "dicom", volume, AFFINE)
    save_nifti(volume, tmp_path / "all" / "both" / "converted.nii.gz")
    table = table_of(tmp_path / "r.csv", ["flat", "apart", "both"])
    assert build(tmp_path / "out", "--volumes", tmp_path / "all", "--reports", table) == 0
    rows = rows_of(tmp_path / "out")
    assert list(rows) == ["apart", "flat"]
    for row in rows.values():
        assert np.array_equal(decode_volume(row)[0], volume[1:19, 3:23, 2:30])
    assert skipped(tmp_path / "out")["both"].startswith("several files fit as volume: ['converted.nii.gz', 'dicom']")
    save_nifti(volume, tmp_path / "all" / "flat.nii.gz")
    found = find_volume(None, "flat", list_archive(tmp_path / "all"))
    assert found.place == tmp_path / "all" / "flat.nii.gz", "a file of that very name comes before what a folder holds"


@pytest.mark.parametrize("broken", ["ct", "liver"])
def test_a_broken_file_among_the_structures_beside_their_volume(tmp_path, broken):
    """The mask is the folder, and its name begins that of the volume, too: which of them is broken must be told."""
    volume, mask = arrays(1)
    folder = tmp_path / "all" / "p_1"
    save_nifti(volume, folder / "ct.nii.gz")
    save_structures(mask, folder)
    (folder / f"{broken}.nii.gz").write_bytes(b"")
    table = table_of(tmp_path / "r.csv", ["p_1"])
    assert build(tmp_path / "out", "--volumes", tmp_path / "all", "--reports", table) == 1
    told = {"ct": "ct.nii.gz: the file is empty", "liver": "mask liver.nii.gz: the file is empty"}[broken]
    assert skipped(tmp_path / "out")["p_1"].startswith(told)


# What is found by name alone. The files are empty: who opened one would fail.


@pytest.mark.parametrize(
    ("layout", "volume", "mask"),
    [
        (["p_1.nii.gz", "p_10.nii.gz"], "p_1.nii.gz", "mask file is missing"),
        (["p_1.mha", "p_1_seg.nrrd"], "p_1.mha", "p_1_seg.nrrd"),
        (["a/p_1.nii", "b/p_1_mask.nii.gz"], "a/p_1.nii", "b/p_1_mask.nii.gz"),
        (["p_1/p_1.nii.gz", "p_1/p_1_seg.nii.gz"], "p_1/p_1.nii.gz", "p_1/p_1_seg.nii.gz"),
        (["p_1/ct.nii.gz", "p_1/seg.nii.gz"], "p_1/ct.nii.gz", "p_1/seg.nii.gz"),
        (["p_1/ct.mhd", "p_1/ct.raw", "p_1/Segmentation.nrrd"], "p_1/ct.mhd", "p_1/Segmentation.nrrd"),
        (["p_1/ct.nrrd", "p_1/segmentations/liver.nii.gz"], "p_1/ct.nrrd", "p_1/segmentations"),
        (["p_1/ct.nrrd", "p_1/segmentations/liver.nii.gz", "p_1/segmentations/tumour.nii.gz"], "p_1/ct.nrrd",
         "p_1/segmentations"),
        (["p_1/ct.nrrd", "p_1/organs/aorta.mha"], "p_1/ct.nrrd", "p_1/organs"),
        (["p_1/ct.nii.gz", "p_1/liver.nii.gz", "p_1/aorta.nii.gz"], "p_1/ct.nii.gz", "p_1"),
        (["p_1/s/1", "p_1/s/2", "p_1_seg.nii.gz"], "p_1", "p_1_seg.nii.gz"),
        (["2019/p_1/1.dcm", "2019/p_1/2.dcm", "m/p_1/liver.nii.gz"], "2019/p_1", "m/p_1"),
        (["p_1.zip", "p_1_seg.nii.gz"], "p_1.zip", "p_1_seg.nii.gz"),
        (["p_1.zip", "p_1.nii.gz"], "several files fit as volume: ['p_1.nii.gz', 'p_1.zip']", None),
        (["p_1.nii.gz", "p_1/1", "p_1/2"], "p_1.nii.gz", "mask file is missing"),
        (["p_1_ct.nii.gz", "p_1_notes/text.txt"], "p_1_ct.nii.gz", "mask file is missing"),
        (["p_1_a/1", "p_1_b/1"], "several files fit as volume: ['p_1_a', 'p_1_b']", None),
        (["p_1_a/1", "p_10/1", "p_1x/1"], "p_1_a", "mask file is missing"),
        (["p_1.nii.gz", "._p_1.nii.gz", ".cache/p_1.nii.gz", "out/p_1.nii.gz"], "p_1.nii.gz", "mask file is missing"),
        (["p_1.nii.gz", "m/p_1/lever.nii.gz"], "p_1.nii.gz", "but ['lever']; nearest: 'liver'"),
        (["p_1.nii.gz", "m/p_1/Herz.nii.gz", "m/p_1/Leber.nii.gz"], "p_1.nii.gz", "but ['Herz', 'Leber']"),
        (["p_1/a.nii.gz", "p_1/b.nii.gz"], "several files fit as volume: ['a.nii.gz', 'b.nii.gz']", None),
        (["p_2.nii.gz"], "volume file is missing: no file, zip or folder is named 'p_1'", None),
    ],
)  # fmt: skip
def test_what_belongs_to_a_case_is_told_by_names(tmp_path, layout, volume, mask):
    for name in layout:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    archive = list_archive(tmp_path, without=[tmp_path / "out"])
    found = find_volume(None, "p_1", archive)
    check_found(found, volume, tmp_path)
    if mask is not None:
        check_found(find_mask(None, "p_1", archive, found.place), mask, tmp_path)


def test_an_id_that_no_file_has_is_not_told_by_its_hash(tmp_path):
    save_nifti(arrays()[0], tmp_path / "data" / "other.nii.gz")
    table = table_of(tmp_path / "r.csv", ["anna"])
    places = ["--volumes", tmp_path / "data", "--masks", tmp_path / "data", "--reports", table]
    assert main(["folder", "--out", str(tmp_path / "out"), *map(str, places), *GRID, "--ids", "hashed"]) == 1
    (reason,) = skipped(tmp_path / "out").values()
    assert reason == "volume file is missing: no file, zip or folder is named as its id or begins with it"


def check_found(found, expected, root):
    if found.place is None:
        assert expected in found.reason
        assert found.is_absent == ("is missing" in expected)
    else:
        assert (found.place, found.reason) == (root / expected, None)


def test_places_that_a_row_names(tmp_path):
    for name in ("ct/p_1/1", "ct/x.nii.gz", "seg/p_1/segmentations/liver.nii.gz", "seg/y/lever.nii.gz"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    volumes, masks = list_archive(tmp_path / "ct"), list_archive(tmp_path / "seg")
    assert find_volume("p_1", "any", volumes).place == tmp_path / "ct" / "p_1"
    assert find_volume("p_2", "any", volumes).reason == "volume file p_2 is missing"
    assert find_mask("p_1", "any", masks, None).place == tmp_path / "seg" / "p_1" / "segmentations"
    assert find_mask("p_1/segmentations", "any", masks, None).place == tmp_path / "seg" / "p_1" / "segmentations"
    assert "nearest: 'liver'" in find_mask("y", "any", masks, None).reason
    for find in (lambda: find_volume("../seg", "any", volumes), lambda: find_mask("/", "any", masks, None)):
        with pytest.raises(ValueError, match="must be relative and stay inside its folder"):
            find()


def test_a_large_archive_is_searched_in_no_time(tmp_path):
    """20,000 cases: looking through all files for each of them would take minutes."""
    from data_builders.folder_files import Archive

    names = [f"s_{number}" for number in range(20000)]
    files = tuple(sorted(tmp_path / f"{name}_ct.nii.gz" for name in names))
    archive = Archive(tmp_path, files, {}, frozenset(), frozenset(), frozenset())
    assert all(find_volume(None, name, archive).place == tmp_path / f"{name}_ct.nii.gz" for name in names)


def test_an_archive_without_volumes(tmp_path, capsys):
    (tmp_path / "ct").mkdir()
    (tmp_path / "ct" / "IM0001").touch()  # slices need a folder of their own
    table = table_of(tmp_path / "r.csv", ["ct"])
    assert build(tmp_path / "out", "--volumes", tmp_path / "ct", "--reports", table) == 2
    assert "slices need a folder of their own inside it" in capsys.readouterr().err
