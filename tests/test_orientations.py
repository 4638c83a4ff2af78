"""Real CTs stored with their axes in any of the 48 orders and directions give the same prepared arrays, bit for bit."""

import shutil

import nibabel
import numpy as np
import pytest
from dicom_series import write_series
from oriented_files import ORIENTATIONS, turned, write_itk, write_nifti

from modeling_fvlm.organs import load_organ_set, organ_label_table
from modeling_fvlm.preparation import prepare_scan
from modeling_fvlm.reading import read_mask, read_volume

ORGANS = load_organ_set("body_24")
MARGIN = (1, 3, 2)


def write_dicom(folder, array, affine):
    """One file a slice, the last axis being the one from slice to slice."""
    write_series(folder, array.transpose(2, 1, 0), affine[:, [2, 1, 0, 3]])
    return folder


# Of volumes; a mask comes as NIfTI where the volume is DICOM.
WRITERS = {"nii": write_nifti, "nii.gz": write_nifti, "nrrd": write_itk, "mha": write_itk, "dicom": write_dicom}
# volume, mask, numbering: RAS and LPS, int16 and int32, both numberings
SCANS = [
    ("abdomen_pelvis_ct", "abdomen_pelvis_seg_v1", "totalsegmentator_v1"),
    ("abdomen_pelvis_ct", "abdomen_pelvis_seg_v2", "totalsegmentator_v2"),
    ("abdomen_slab_ct", "abdomen_slab_seg_v2", "totalsegmentator_v2"),
    ("chest_cta_ct", "chest_cta_seg_v2", "totalsegmentator_v2"),
]


def stored(path, step: int):
    """Every `step`-th voxel of a file, as stored, and its affine."""
    image = nibabel.load(path)
    affine = image.affine.copy()
    affine[:3, :3] *= step
    return np.asarray(image.dataobj.get_unscaled())[::step, ::step, ::step], affine


def prepared(paths, numbering, spacing):
    table = organ_label_table(ORGANS, ORGANS.organs, numbering)
    return prepare_scan(read_volume(paths[0]), read_mask(paths[1]), table, spacing, MARGIN)


def check_equal(found, expected):
    assert np.array_equal(found.volume, expected.volume) and np.array_equal(found.mask, expected.mask)
    assert found.box == expected.box and found.spacing == pytest.approx(expected.spacing)


def check_orientations(shared_dir, folder, names, ending, orientations, step, spacing):
    """Prepare a scan from each orientation and compare with the file as it came; the mask is stored in another one."""
    volume, mask = (stored(shared_dir / "ct_samples" / f"{name}.nii.gz", step) for name in names[:2])
    originals = [
        write_nifti(folder / f"{part}.nii", *arrays) for part, arrays in (("ct", volume), ("seg", mask))
    ]  # fmt: skip
    expected = prepared(originals, names[2], spacing)
    assert expected.volume.std() > 50 and len(np.unique(expected.mask)) >= 4, "an empty scan would compare nothing"
    seen = set()
    for number in orientations:
        order, flips = ORIENTATIONS[number]
        other = ORIENTATIONS[(7 * number + 5) % len(ORIENTATIONS)]
        array, affine = turned(*volume, order, flips)
        seen.add((nibabel.aff2axcodes(affine), array.shape))
        of_mask = "nii" if ending == "dicom" else ending
        paths = (
            WRITERS[ending](folder / f"{number}_ct.{ending}", array, affine),
            WRITERS[of_mask](folder / f"{number}_seg.{of_mask}", *turned(*mask, *other)),
        )
        check_equal(prepared(paths, names[2], spacing), expected)
        for path in paths:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert len(seen) == len(orientations), "every orientation is another"
    assert array.dtype == volume[0].dtype


@pytest.mark.parametrize("ending", ["nii", "nrrd"])
@pytest.mark.parametrize("names", SCANS, ids=lambda names: names[1])
def test_all_48_orientations_of_a_coarse_copy(shared_dir, tmp_path, names, ending):
    # No two edges of the model's voxel alike, and none a multiple of the file's: every axis is interpolated.
    check_orientations(shared_dir, tmp_path, names, ending, range(48), step=3, spacing=(7.0, 5.0, 4.0))


@pytest.mark.parametrize("ending", ["nii.gz", "mha"])
def test_some_orientations_at_full_size(shared_dir, tmp_path, ending):
    check_orientations(shared_dir, tmp_path, SCANS[2], ending, (13, 34), step=1, spacing=(3.0, 1.0, 1.0))


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("ending", ["nii", "nrrd", "dicom"])
@pytest.mark.parametrize("names", SCANS, ids=lambda names: names[1])
def test_all_48_orientations_at_full_size(shared_dir, tmp_path, names, ending):
    check_orientations(shared_dir, tmp_path, names, ending, range(48), step=1, spacing=(3.0, 1.0, 1.0))


@pytest.mark.parametrize("ending", ["nii", "nrrd"])
def test_an_oblique_scan_is_read_along_its_closest_axes(shared_dir, tmp_path, ending):
    """Turned by 9 degrees in space, as a head may lie: the voxels stay, whatever their order in the file."""
    (volume, affine), (mask, _) = (
        stored(shared_dir / "ct_samples" / f"{name}.nii.gz", 3) for name in SCANS[2][:2]
    )  # fmt: skip
    angle = np.radians(9)
    rotation = np.eye(4)
    rotation[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    results = []
    for number in (0, 13, 29, 46):
        paths = [
            WRITERS[ending](tmp_path / f"{number}_{part}.{ending}", *turned(array, place, *ORIENTATIONS[number]))
            for part, array, place in (("ct", volume, rotation @ affine), ("seg", mask, rotation @ affine))
        ]
        results.append(prepared(paths, SCANS[2][2], (7.0, 5.0, 4.0)))
    straight = [write_nifti(tmp_path / f"{name}.nii", array, affine) for name, array in (("a", volume), ("b", mask))]
    for result in results:
        check_equal(result, prepared(straight, SCANS[2][2], (7.0, 5.0, 4.0)))
