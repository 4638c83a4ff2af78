"""The RAD-ChestCT builder: npz volumes by an assumed geometry, labels collapsed over locations, no reports."""

import errno
import json
import os
import signal

import fsspec
import nibabel
import numpy as np
import pyarrow.parquet as pq
import pytest
from tiny_release import arrays, write_csv

from data_builders import rad_chest_ct
from data_builders.__main__ import main
from data_builders.rad_chest_ct import (
    LABEL_MAP,
    SETS,
    affine_of,
    load_label_map,
    read_label_table,
    table_side,
)
from modeling_fvlm.geometry import organ_box
from modeling_fvlm.organs import TOTALSEGMENTATOR_V2, load_organ_set
from modeling_fvlm.processed_split import decode_volume
from modeling_fvlm.reading import read_nifti, volume_from_array

LPS = np.diag([-1.0, -1.0, 1.0, 1.0])[:, [2, 1, 0, 3]]  # (depth, height, width) to mm in RAS+
SPACING = (3.0, 4.0, 4.0)  # of the stored axes, and of the split: nothing is resampled
STORED = ["--stored_spacing", *map(str, SPACING)]
GRID = ["--spacing", *map(str, SPACING), "--margin", "1", "1", "1", "--previews", "0", "--workers", "1", *STORED]
IDS = {"imgtrain": ("trn00001", "trn00002"), "imgvalid": ("val00001",), "imgtest": ("tst00001",)}
PATIENTS = {"trn00001": "7001", "trn00002": "7001", "val00001": "7002", "tst00001": "7003"}
MAP = load_label_map()
# What is 1 in which scan; everything else is 0.
FINDINGS = {
    "trn00001": ("nodulegr1cm*right_lung", "emphysema*lung"),
    "val00001": ("hernia*other_location",),
    "tst00001": ("calcification*heart", "scarring*lung", "scarring*other_location"),
}


def scan(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Volume and mask of the tiny release, LPS, with square slices and a table behind the body."""
    volume, mask = (np.pad(a, ((0, 0), (2, 6), (0, 0)), constant_values=v) for a, v in zip(arrays(seed), (-1000, 0)))
    assert volume.shape[1] == volume.shape[2]
    volume[:, 29:31, 3:29] = 100
    return np.clip(volume, -1000, 1000), mask


def stored(array: np.ndarray) -> np.ndarray:
    """As the release stores it: slices from the head down."""
    return array[::-1]


def save_mask(mask: np.ndarray, path, orientation="RAS", affine=None):
    """A mask made on the NIfTI of a stored volume, in whatever order the tool wrote it."""
    image = nibabel.Nifti1Image(np.ascontiguousarray(mask), np.array(affine or affine_of("IPL", SPACING)))
    turn = nibabel.orientations.ornt_transform(
        nibabel.io_orientation(image.affine), nibabel.orientations.axcodes2ornt(tuple(orientation))
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(image.as_reoriented(turn), path)


def write_labels(path, names, locations=("lung", "right_lung", "heart", "other_location")):
    columns = [f"{abnormality}*{location}" for location in locations for abnormality in MAP.abnormalities]
    rows = []
    for name in names:
        present = FINDINGS.get(name, ())
        assert set(present) <= set(columns)
        rows.append({"NoteAcc_DEID": name, **{column: int(column in present) for column in columns}})
    return write_csv(path, rows)


@pytest.fixture
def release(tmp_path):
    """A release and its masks."""
    root = tmp_path / "RAD-ChestCT"
    for name_of_set, names in IDS.items():
        write_labels(root / "tables" / f"{name_of_set}_Abnormality_and_Location_Labels.csv", names)
        for name in names:
            volume, mask = scan(list(PATIENTS).index(name))
            (root / "images").mkdir(exist_ok=True)
            np.savez_compressed(root / "images" / f"{name}.npz", ct=stored(volume))
            save_mask(stored(mask), tmp_path / "masks" / f"{name}.nii.gz", "RAS" if "t" in name else "LPI")
    rows = [
        {"MRN_DEID": mrn, "NoteAcc_DEID": name, "Set_Assigned": name[:3], "Subset_Assigned": ""}
        for name, mrn in PATIENTS.items()
    ]
    write_csv(root / "tables" / "Summary_3630.csv", rows)
    return root


def run(release, out, *more) -> int:
    masks = [] if "--nifti" in more else ["--masks", str(release.parent / "masks")]
    return main(["rad_chest_ct", "--source", str(release), "--out", str(out), *masks, *GRID, *map(str, more)])


def rows_of(out, split="validation") -> dict[str, dict]:
    files = sorted((out / "volumes").glob(f"{split}-*.parquet"))
    return {row["recon_id"]: row for file in files for row in pq.read_table(file).to_pylist()}


def manifest_of(out) -> dict:
    return json.loads((out / "manifest.json").read_text())


def labels_of(row) -> dict[str, int]:
    return {label["finding"]: label["value"] for label in row["labels"]}


def test_sets_become_splits_and_patients_come_from_the_summary(release, tmp_path):
    assert run(release, tmp_path / "out") == 0
    found = {split: rows_of(tmp_path / "out", split) for split in ("train", "validation")}
    assert {split: list(rows) for split, rows in found.items()} == {
        "train": ["trn00001", "trn00002"],
        "validation": ["tst00001", "val00001"],
    }
    for rows in found.values():
        assert all(row["patient_id"] == PATIENTS[name] and row["scan_id"] == name for name, row in rows.items())
    manifest = manifest_of(tmp_path / "out")
    assert manifest["splits"]["train"]["patients"] == 1
    assert "splits_by" not in manifest["settings"]["options"]
    assert manifest["settings"]["options"]["stored_orientation"] == "IPL"


def test_all_sets_as_one_test_split(release, tmp_path):
    assert run(release, tmp_path / "out", "--train_sets", "--validation_sets", *SETS) == 0
    assert set(rows_of(tmp_path / "out")) == set(PATIENTS)
    assert not rows_of(tmp_path / "out", "train")


def test_arrays_are_those_of_the_patient(release, tmp_path):
    """Depth to the head, height to the back, width to the left, whatever the npz and the masks store."""
    assert run(release, tmp_path / "out") == 0
    organs = load_organ_set("chest_4").organs
    for split, names in (("train", ("trn00001", "trn00002")), ("validation", ("tst00001", "val00001"))):
        for name in names:
            row = rows_of(tmp_path / "out", split)[name]
            volume, mask = scan(list(PATIENTS).index(name))
            lung = np.isin(
                mask, [TOTALSEGMENTATOR_V2.index(f"lung_upper_lobe_{side}") + 1 for side in ("left", "right")]
            )
            aorta = mask == TOTALSEGMENTATOR_V2.index("aorta") + 1
            box = organ_box((lung | aorta).astype(np.uint8), (1, 1, 1))
            found, labels = decode_volume(row)
            assert np.array_equal(found, volume[box])
            assert np.array_equal(labels == organs.index("lung") + 1, lung[box])
            assert np.array_equal(labels == organs.index("aorta") + 1, aorta[box])
            assert row["spacing"] == list(SPACING)


def test_labels_are_collapsed_over_locations_and_mapped(release, tmp_path):
    assert run(release, tmp_path / "out") == 0
    rows = rows_of(tmp_path / "out") | rows_of(tmp_path / "out", "train")
    present = {name: {finding for finding, value in labels_of(row).items() if value} for name, row in rows.items()}
    assert present == {
        "trn00001": {"nodulegr1cm", "emphysema", "Lung nodule", "Emphysema"},
        "trn00002": set(),
        "val00001": {"hernia", "Hiatal hernia"},
        "tst00001": {"calcification", "scarring", "Pulmonary fibrotic sequela"},
    }
    for row in rows.values():
        assert list(labels_of(row)) == [*MAP.abnormalities, *MAP.findings]
        assert set(labels_of(row).values()) <= {0, 1}


def test_without_reports_every_organ_is_not_mentioned(release, tmp_path):
    assert run(release, tmp_path / "out") == 0
    for row in rows_of(tmp_path / "out").values():
        assert row["findings"] == row["impression"] == ""
        assert [caption["organ"] for caption in row["captions"]] == list(load_organ_set("chest_4").organs)
        assert not any(caption["is_mentioned"] or caption["is_abnormal"] for caption in row["captions"])
        assert all(caption["caption"] for caption in row["captions"])


def test_the_map_is_that_of_the_release(shared_dir):
    formats = (shared_dir / "FORMATS.md").read_text()
    assert len(MAP.abnormalities) == 84 and f"`{','.join(MAP.abnormalities)}`" in formats
    assert len(MAP.findings) == 16
    labels = formats.split("labels (18): `VolumeName,")[1].split("`")[0].split(",")
    assert len(labels) == 18 and set(labels) - set(MAP.findings) == {"Medical material", "Mosaic attenuation pattern"}


def test_a_map_of_unknown_abnormalities_is_told(tmp_path):
    path = tmp_path / "map.yaml"
    path.write_text(LABEL_MAP.read_text().replace("Emphysema: [emphysema]", "Emphysema: [emphisema]"))
    with pytest.raises(ValueError, match="'Emphysema' is made of 'emphisema', no abnormality; nearest: 'emphysema'"):
        load_label_map(path)


# Geometry


@pytest.mark.parametrize("orientation", ["IPL", "SPL", "LPS", "RAS", "PIR", "als"])
def test_the_affine_of_letters(orientation):
    affine = np.array(affine_of(orientation, (1.0, 2.0, 3.0)))
    assert nibabel.aff2axcodes(affine) == tuple(orientation.upper())
    assert np.linalg.norm(affine[:3, :3], axis=0).tolist() == [1.0, 2.0, 3.0]
    assert not affine[:3, 3].any()


@pytest.mark.parametrize("orientation", ["IP", "IPLS", "IPP", "ISL", "XPL", ""])
def test_letters_that_name_no_three_axes_are_told(orientation):
    with pytest.raises(ValueError, match="must have one letter of each of R/L, A/P and S/I"):
        affine_of(orientation, SPACING)


@pytest.mark.parametrize("spacing", [(0.8, 0.8, 0.0), (-0.8, 0.8, 0.8), (0.8, float("nan"), 0.8)])
def test_a_spacing_that_is_none_is_told(spacing):
    with pytest.raises(ValueError, match="every step must be above 0 mm"):
        affine_of("IPL", spacing)


def test_a_table_on_the_wrong_side_stops_the_build(release, tmp_path, capsys):
    assert run(release, tmp_path / "out", "--stored_orientation", "IAL") == 2
    told = " ".join(capsys.readouterr().err.split())
    assert "in 3 of 3 volumes the table lies before the patient" in told
    assert not (tmp_path / "out").exists()


def test_slices_that_are_not_square_stop_the_build(release, tmp_path, capsys):
    assert run(release, tmp_path / "out", "--stored_orientation", "PIL") == 2
    assert "the slices are 20 x 32 voxels, but the release's are square" in " ".join(capsys.readouterr().err.split())


def test_left_and_right_are_said_to_be_assumed(release, tmp_path, capsys):
    """Exchanged, they pass the look at the voxels; a mask with a header of its own does not fit then."""
    assert run(release, tmp_path / "out", "--stored_orientation", "IPR") == 1
    assert "Left and right cannot be told from voxels" in " ".join(capsys.readouterr().out.split())
    reasons = [entry["reason"] for entry in manifest_of(tmp_path / "out")["skipped"]]
    assert len(reasons) == 4 and all("are not on one grid" in reason for reason in reasons)


def test_the_look_can_be_left_out(release, tmp_path, capsys):
    assert run(release, tmp_path / "out", "--check", "0") == 0
    assert "No volume was looked at." in capsys.readouterr().out
    assert run(release, tmp_path / "none", "--check", "-1") == 2


@pytest.mark.parametrize(("name", "side"), [("abdomen_pelvis", 1), ("abdomen_slab", 1), ("chest_cta", 0)])
def test_the_table_of_real_patients(shared_dir, name, side):
    """The third is cut out around the heart: no table is in it."""
    volume = read_nifti(shared_dir / "ct_samples" / f"{name}_ct.nii.gz")
    assert table_side(volume) == side
    assert table_side(volume_from_array(volume.array[:, ::-1], LPS)) == -side


def test_where_nothing_is_seen_no_side_is_taken():
    array = np.full((6, 32, 32), -1000, np.int16)
    assert table_side(volume_from_array(array, LPS)) == 0
    array[:, 8:24, 8:24] = 40
    assert table_side(volume_from_array(array, LPS)) == 0, "a body without a table"
    array[0, 2, :] = 40
    assert table_side(volume_from_array(array, LPS)) == 0, "something in one plane of six"
    array[:3, 2, :] = 40
    assert table_side(volume_from_array(array, LPS)) == -1


# Masks


def test_a_folder_of_structures_gives_the_same_split(release, tmp_path):
    assert run(release, tmp_path / "out") == 0
    for name in PATIENTS:
        mask = stored(scan(list(PATIENTS).index(name))[1])
        (tmp_path / "masks" / f"{name}.nii.gz").unlink()
        for label in np.unique(mask[mask > 0]):
            path = tmp_path / "masks" / name / f"{TOTALSEGMENTATOR_V2[label - 1]}.nii.gz"
            save_mask((mask == label).astype(np.uint8), path, "LPI")
    assert run(release, tmp_path / "again") == 0
    for split in ("train", "validation"):
        assert rows_of(tmp_path / "again", split) == rows_of(tmp_path / "out", split)


def test_a_mask_without_a_header_lies_on_the_voxels_of_its_volume(release, tmp_path):
    assert run(release, tmp_path / "out") == 0
    for name in PATIENTS:
        mask = stored(scan(list(PATIENTS).index(name))[1])
        nibabel.save(nibabel.Nifti1Image(np.ascontiguousarray(mask), None), tmp_path / "masks" / f"{name}.nii.gz")
    assert run(release, tmp_path / "again") == 0
    assert rows_of(tmp_path / "again") == rows_of(tmp_path / "out")


def test_volumes_are_written_as_nifti_for_segmentation(release, tmp_path, capsys):
    scans = tmp_path / "scans"
    assert run(release, scans, "--nifti") == 0
    assert sorted(path.name for path in scans.iterdir()) == sorted(f"{name}.nii.gz" for name in PATIENTS)
    for number, name in enumerate(PATIENTS):
        written = read_nifti(scans / f"{name}.nii.gz")
        assert np.array_equal(written.array, scan(number)[0])
        image = nibabel.load(scans / f"{name}.nii.gz")
        # A mask made on it fits: the build takes one that is written with the same header.
        mask = scan(number)[1].T
        nibabel.save(
            nibabel.Nifti1Image(np.ascontiguousarray(mask), image.affine), tmp_path / "masks" / f"{name}.nii.gz"
        )
    assert run(release, tmp_path / "out") == 0
    assert len(rows_of(tmp_path / "out")) == 2
    before = {path: path.stat().st_mtime_ns for path in scans.iterdir()}
    (scans / "tst00001.nii.gz").unlink()
    assert run(release, scans, "--nifti") == 0
    assert "1 volume written" in capsys.readouterr().out
    changed = [path.name for path in scans.iterdir() if path.stat().st_mtime_ns != before[path]]
    assert changed == ["tst00001.nii.gz"]


def writing_stops(release, scans, capsys, monkeypatch, action) -> str:
    """--nifti during which something happens before the second volume: status 2, the first stays; what it says."""
    read, seen = rad_chest_ct.read_for_nifti, []

    def disturbed(case):
        if seen:
            action(patch)
        seen.append(case)
        return read(case)

    with monkeypatch.context() as patch:
        patch.setattr(rad_chest_ct, "read_for_nifti", disturbed)
        assert run(release, scans, "--nifti") == 2
    assert [path.name for path in scans.iterdir()] == ["trn00001.nii.gz"], "nothing half written"
    message = capsys.readouterr().err
    assert "What is finished stays; run the same command again to continue." in message
    return message


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_writing_nifti_stops_cleanly_at_a_signal(release, tmp_path, capsys, monkeypatch, number):
    handler, scans = signal.getsignal(signal.SIGTERM), tmp_path / "scans"
    message = writing_stops(release, scans, capsys, monkeypatch, lambda patch: os.kill(os.getpid(), number))
    assert message.startswith("error: stopped by a signal.") and signal.getsignal(signal.SIGTERM) == handler
    assert run(release, scans, "--nifti") == 0
    assert len(list(scans.iterdir())) == 4 and "3 volumes written" in capsys.readouterr().out


def no_space(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_writing_nifti_stops_cleanly_on_a_full_disk(release, tmp_path, capsys, monkeypatch):
    def half(image, path):
        path.write_bytes(b"half")
        no_space()

    scans = tmp_path / "scans"
    message = writing_stops(release, scans, capsys, monkeypatch, lambda patch: patch.setattr(nibabel, "save", half))
    assert f"the disk of --out {scans} is full" in message and "Free some space there first" in message


def test_writing_nifti_tells_where_copies_of_a_remote_source_have_no_space(release, tmp_path, capsys, monkeypatch):
    action = lambda patch: patch.setattr(rad_chest_ct, "local_copy", no_space)  # noqa: E731
    message = writing_stops(release, tmp_path / "scans", capsys, monkeypatch, action)
    assert "let TMPDIR name a folder on another disk" in message


def test_writing_nifti_stops_when_the_source_goes(release, tmp_path, capsys, monkeypatch):
    images = release / "images"
    action = lambda patch: images.rename(tmp_path / "taken")  # noqa: E731
    assert f"the source {images} is gone" in writing_stops(release, tmp_path / "scans", capsys, monkeypatch, action)


def test_one_volume_that_goes_or_is_broken_is_skipped(release, tmp_path, capsys, monkeypatch):
    read, images = rad_chest_ct.read_for_nifti, release / "images"

    def disturbed(case):
        if case.recon_id == "tst00001":
            case.volume.unlink()
        return read(case)

    monkeypatch.setattr(rad_chest_ct, "read_for_nifti", disturbed)
    (images / "val00001.npz").write_bytes(b"PK\x03\x04 cut short")
    (images / "trn00001.npz").unlink()
    assert run(release, tmp_path / "scans", "--nifti") == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "skipped tst00001: the volume file was there when the build began, and is gone" in printed
    assert "skipped val00001: val00001.npz: cut short or damaged" in printed and str(images) not in printed
    assert "skipped trn00001: volume file is missing" in printed and "1 volume written" in printed
    assert [path.name for path in (tmp_path / "scans").iterdir()] == ["trn00002.nii.gz"]


@pytest.mark.parametrize("is_relative", [False, True])
def test_a_remote_volume_that_goes_is_skipped_though_its_mask_is_there(release, tmp_path, monkeypatch, is_relative):
    """A local mask does not tell that the remote volume is there again: every other build would stop at this case."""
    fs = fsspec.filesystem("memory")
    fs.put(str(release), "/RAD", recursive=True)
    check = rad_chest_ct.check_geometry

    def disturbed(*arguments):
        fs.rm("/RAD/images/tst00001.npz")
        return check(*arguments)

    monkeypatch.setattr(rad_chest_ct, "check_geometry", disturbed)
    monkeypatch.chdir(tmp_path)
    masks = "masks" if is_relative else str(tmp_path / "masks")
    try:
        command = ["rad_chest_ct", "--source", "memory://RAD", "--masks", masks, "--out", str(tmp_path / "out"), *GRID]
        assert main(command) == 0
    finally:
        fs.rm("/RAD", recursive=True)
    reasons = {entry["case"]: entry["reason"] for entry in manifest_of(tmp_path / "out")["skipped"]}
    assert reasons == {"tst00001": "the volume file was there when the build began, and is gone"}


# What is missing or broken


def test_what_is_missing_is_skipped_with_its_reason(release, tmp_path):
    (release / "images" / "trn00001.npz").unlink()
    (tmp_path / "masks" / "trn00002.nii.gz").unlink()
    (release / "more").mkdir()
    (release / "more" / "val00001.npz").write_bytes((release / "images" / "val00001.npz").read_bytes())
    np.savez_compressed(release / "images" / "tst00001.npz", ct=np.zeros((4, 5), np.int16))
    assert run(release, tmp_path / "out") == 1
    reasons = {entry["case"]: entry["reason"] for entry in manifest_of(tmp_path / "out")["skipped"]}
    assert reasons["trn00001"] == "volume file is missing: no .npz file is named as its id"
    assert reasons["trn00002"].startswith("mask file is missing: no file or folder is named 'trn00002'")
    assert reasons["val00001"] == "2 .npz files are named as its id; leave one"
    assert "tst00001.npz" in reasons["tst00001"] and "3-D" in reasons["tst00001"]


def test_a_scan_of_an_unknown_patient_is_skipped(release, tmp_path):
    table = release / "tables" / "Summary_3630.csv"
    table.write_text("".join(line for line in table.read_text().splitlines(True) if "tst00001" not in line))
    assert run(release, tmp_path / "out") == 0
    (entry,) = manifest_of(tmp_path / "out")["skipped"]
    assert (entry["case"], entry["reason"]) == ("tst00001", "Summary_3630.csv does not say whose scan it is")


def test_without_a_summary_the_split_says_that_it_is_by_id(release, tmp_path):
    (release / "tables" / "Summary_3630.csv").unlink()
    assert run(release, tmp_path / "out") == 0
    manifest = manifest_of(tmp_path / "out")
    assert manifest["settings"]["options"]["splits_by"] == "id"
    assert any("splits are by id" in entry["warning"] for entry in manifest["warnings"])


TRAIN_TABLE = "imgtrain_Abnormality_and_Location_Labels.csv"


@pytest.mark.parametrize(
    ("file", "old", "new", "told"),
    [
        (TRAIN_TABLE, "NoteAcc_DEID", "NoteAcc", "has no column 'NoteAcc_DEID'; it has"),
        (TRAIN_TABLE, "emphysema*lung", "emphisema*lung", "column 'emphisema*lung' is not <abnormality>*<location>"),
        (TRAIN_TABLE, "emphysema*lung", "emphisema*lung", "nearest: 'emphysema'"),
        (TRAIN_TABLE, "hernia*heart", "hernia", "column 'hernia' is not <abnormality>*<location>"),
        (TRAIN_TABLE, "trn00002", "trn00001", "line 3: the NoteAcc_DEID 'trn00001' comes twice"),
        (TRAIN_TABLE, "trn00002", "../trn00002", "NoteAcc_DEID '../trn00002' is no plain name"),
        (TRAIN_TABLE, "trn00002", "val00001", "'val00001' stands in another set, too"),
        (TRAIN_TABLE, "trn00002,0", "trn00002,maybe", "line 3, column 'air_trapping*lung': label 'maybe' is none of"),
        (TRAIN_TABLE, "trn00002,0", "trn00002", "336 cells under 337 columns"),
        ("Summary_3630.csv", "MRN_DEID", "MRN", "Summary_3630.csv has no column 'MRN_DEID'"),
        ("Summary_3630.csv", "7002", "7001", "patient '7001' stands in"),
        ("Summary_3630.csv", "7003,tst00001", "7003,val00001", "the scan 'val00001' belongs to two patients"),
        ("Summary_3630.csv", "7003", "", "MRN_DEID is empty"),
    ],
)
def test_broken_tables_are_told(release, tmp_path, capsys, file, old, new, told):
    path = release / "tables" / file
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    assert run(release, tmp_path / "out") == 2
    assert told in " ".join(capsys.readouterr().err.split())


def test_missing_abnormalities_are_counted(tmp_path):
    path = write_labels(tmp_path / "labels.csv", ["trn00002"], locations=("lung",))
    read_label_table(path, MAP)
    header, row = path.read_text().splitlines()
    columns = header.split(",")
    keep = [number for number, name in enumerate(columns) if name not in ("stent*lung", "suture*lung")]
    path.write_text("\n".join(",".join(line.split(",")[number] for number in keep) for line in (header, row)) + "\n")
    with pytest.raises(ValueError, match=r"no column 'stent\*<location>' \(2 of 84 abnormalities are missing\)"):
        read_label_table(path, MAP)


def test_an_unknown_label_is_known_where_another_location_is(tmp_path):
    path = write_labels(tmp_path / "labels.csv", ["trn00002"], locations=("lung", "heart"))
    header, row = path.read_text().splitlines()
    cells = dict(zip(header.split(","), row.split(",")))
    cells |= {
        "stent*lung": "",
        "stent*heart": "-1",
        "clip*lung": "",
        "clip*heart": "0",
        "cyst*lung": "",
        "cyst*heart": "1",
    }
    write_csv(path, [cells])
    labels = dict(read_label_table(path, MAP)["trn00002"])
    assert (labels["stent"], labels["clip"], labels["cyst"]) == (-1, 0, 1)


def test_tables_and_options_that_do_not_fit_are_told(release, tmp_path, capsys):
    def told(*more):
        assert run(release, tmp_path / "out", *more) == 2
        return " ".join(capsys.readouterr().err.split())

    assert "imgtest stands in --train_sets and in --validation_sets" in told("--train_sets", "imgtest")
    copy = release / "more" / TRAIN_TABLE
    copy.parent.mkdir()
    copy.write_text((release / "tables" / TRAIN_TABLE).read_text())
    assert f"holds {TRAIN_TABLE} 2 times" in told()
    copy.unlink()
    (release / "tables" / TRAIN_TABLE).rename(release / "tables" / "imgtrain_Abnormality_Labels.csv")
    assert f"there is no file {TRAIN_TABLE}; nearest: 'imgtrain_Abnormality_Labels.csv'" in told()
    (release / "tables" / "imgtrain_Abnormality_Labels.csv").write_bytes(b"NoteAcc_DEID\xff")
    arguments = ["rad_chest_ct", "--source", str(release), "--out", str(tmp_path / "out")]
    assert main(arguments) == 2
    assert "give --masks" in capsys.readouterr().err
    assert main([*arguments, "--masks", str(tmp_path / "nowhere")]) == 2
    assert "--masks: there is no folder" in capsys.readouterr().err


def test_hashed_ids_leave_no_id_of_the_source(release, tmp_path):
    (release / "images" / "trn00001.npz").unlink()
    (tmp_path / "masks" / "tst00001.nii.gz").unlink()
    (release / "more").mkdir()
    (release / "more" / "val00001.npz").write_bytes((release / "images" / "val00001.npz").read_bytes())
    assert run(release, tmp_path / "out", "--ids", "hashed") == 0
    told = (tmp_path / "out" / "manifest.json").read_text() + (tmp_path / "out" / "README.md").read_text()
    # What was looked for is the id that the user knows, not its hash.
    assert {entry["reason"] for entry in manifest_of(tmp_path / "out")["skipped"]} == {
        "volume file is missing: no .npz file is named as its id",
        "mask file is missing: no file or folder is named as its id or begins with it",
        "2 .npz files are named as its id; leave one",
    }
    assert not any(name in told for name in (*PATIENTS, *PATIENTS.values()))
    for place in ("first", "second"):
        save_mask(stored(scan(1)[1]), tmp_path / "masks" / f"trn00002_{place}.nii.gz")
    (tmp_path / "masks" / "trn00002.nii.gz").unlink()
    assert run(release, tmp_path / "without", "--ids", "hashed") == 1
    reasons = [entry["reason"] for entry in manifest_of(tmp_path / "without")["skipped"]]
    assert "several files fit as mask: ['...', '...']; leave one, named as the scan" in reasons, "there is no table"
