"""From a file's grid to a prepared scan, on made-up scans and on real CTs; and the blobs of a processed split."""

import json
from itertools import permutations

import numpy as np
import pytest

from modeling_fvlm.geometry import organ_box, resample_mask, resample_volume
from modeling_fvlm.organs import load_organ_set, organ_label_table
from modeling_fvlm.preparation import prepare_scan
from modeling_fvlm.processed_split import decode_volume, encode_array
from modeling_fvlm.reading import (
    BadVolumeError,
    mask_from_array,
    read_nifti,
    read_nifti_mask,
    volume_from_array,
)

V1, V2 = "totalsegmentator_v1", "totalsegmentator_v2"
SPACING, MARGIN = (3.0, 1.0, 1.0), (1, 3, 2)


def made_up_scan(label=52, seed=0):
    """HU and labels (x, y, z) with an affine of unequal spacings; the aorta of v2 (52) and a bone of no organ (116)."""
    generator = np.random.default_rng(seed)
    hu = generator.integers(-1000, 1000, (20, 17, 11)).astype(np.int16)
    labels = np.zeros(hu.shape, dtype=np.uint8)
    labels[8:12, 6:9, 3:7] = label
    labels[0, 0, 0] = 116
    return hu, labels, np.diag([1.3, 0.9, 2.0, 1.0])


def chest_table(numbering=V2):
    organ_set = load_organ_set("chest_4")
    return organ_label_table(organ_set, organ_set.organs, numbering)


def test_equals_resampling_everything_and_then_cropping():
    hu, labels, affine = made_up_scan()
    volume, mask = volume_from_array(hu, affine), mask_from_array(labels, affine)
    scan = prepare_scan(volume, mask, chest_table(), SPACING, MARGIN)
    whole_mask = (resample_mask(mask.array, mask.spacing, SPACING) == 52) * np.uint8(4)  # aorta: index 3
    whole = resample_volume(volume.array, volume.spacing, SPACING)
    box = organ_box(whole_mask, MARGIN)
    assert scan.box == box and whole[box].size < whole.size
    assert np.array_equal(scan.mask, whole_mask[box]) and np.array_equal(scan.volume, whole[box])
    assert scan.volume.dtype == np.int16 and scan.mask.dtype == np.uint8
    assert scan.volume.flags.c_contiguous and scan.mask.flags.c_contiguous
    for exact, size, old, new in zip(scan.spacing, mask.array.shape, mask.spacing, whole.shape):
        assert exact == pytest.approx(size * old / new)


def test_storage_orientation_does_not_matter():
    hu, labels, affine = made_up_scan()
    expected = prepare_scan(
        volume_from_array(hu, affine), mask_from_array(labels, affine), chest_table(), SPACING, MARGIN
    )
    for order in permutations(range(3)):
        matrix = affine[:, [*order, 3]].copy()
        flipped = np.flip(hu.transpose(order), 1)
        matrix[:3, 3] += matrix[:3, 1] * (flipped.shape[1] - 1)
        matrix[:3, 1] *= -1
        # The mask stays as it was stored: each array is turned by its own affine.
        scan = prepare_scan(
            volume_from_array(flipped, matrix), mask_from_array(labels, affine), chest_table(), SPACING, MARGIN
        )
        assert np.array_equal(scan.volume, expected.volume) and np.array_equal(scan.mask, expected.mask)


def test_bad_masks_are_refused():
    hu, labels, affine = made_up_scan()
    volume = volume_from_array(hu, affine, "case_7")

    def prepare(labels, affine=affine, numbering=V2):
        prepare_scan(volume, mask_from_array(labels, affine, "organs_7"), chest_table(numbering), SPACING, MARGIN)

    with pytest.raises(BadVolumeError, match=r"case_7: volume .* and mask .*organs_7.*not on one grid"):
        prepare(labels[:-1])
    with pytest.raises(BadVolumeError, match="case_7: volume and mask .*not on one grid.*width.*2.0 voxels apart"):
        moved = affine.copy()
        moved[0, 3] = 2.6
        prepare(labels, moved)
    with pytest.raises(BadVolumeError, match="organs_7: label 116 is outside the numbering, whose labels end at 104"):
        prepare(labels, numbering=V1)
    for empty in (np.zeros_like(labels), np.where(labels == 52, 0, labels)):
        with pytest.raises(BadVolumeError, match=r"case_7: the mask \(organs_7\) holds no organ of the set"):
            prepare(empty)
    with pytest.raises(BadVolumeError, match="label 3 is outside the numbering, whose labels end at 52"):
        own = organ_label_table({}, ["aorta"], {52: "aorta", 2: None})  # a gap below the highest label
        odd = np.where(labels == 116, 2, labels)
        odd[10:12, 6:9, 3:7] = 3
        prepare_scan(volume, mask_from_array(odd, affine), own, SPACING, MARGIN)


def test_a_wrong_label_is_found_even_where_resampling_steps_over_it():
    hu, labels, affine = made_up_scan()
    labels[13, 9, 2] = 200
    volume, mask = volume_from_array(hu, affine), mask_from_array(labels, affine)
    coarse = (6.0, 4.5, 6.5)
    assert 200 not in resample_mask(mask.array, mask.spacing, coarse)
    with pytest.raises(BadVolumeError, match="label 200 is outside the numbering, whose labels end at 117"):
        prepare_scan(volume, mask, chest_table(), coarse, MARGIN)


def test_organ_volumes_of_real_scans_are_kept(shared_dir):
    """Millilitres after resampling to the model's grid, against voxel counts of samples.json on the original grid."""
    organ_set = load_organ_set("body_24")
    samples = json.loads((shared_dir / "ct_samples" / "samples.json").read_text())
    compared = 0
    for sample in samples:
        volume = read_nifti(shared_dir / "ct_samples" / sample["image"])
        for entry in sample["masks"]:
            numbering = V1 if "v1" in entry["class_numbering"] else V2
            mask = read_nifti_mask(shared_dir / "ct_samples" / entry["file"])
            table = organ_label_table(organ_set, organ_set.organs, numbering)
            scan = prepare_scan(volume, mask, table, (3.0, 1.0, 1.0), (5, 20, 20))
            millilitres = np.bincount(scan.mask.ravel(), minlength=25)[1:] * np.prod(scan.spacing) / 1000
            voxel_ml = np.prod(sample["spacing_mm"]) / 1000
            for organ, found in zip(organ_set.organs, millilitres):
                expected = entry["organ_voxels"].get(organ, 0) * voxel_ml
                if organ == "sacrum":  # the organ takes S1 as well
                    expected += entry["class_voxels"].get("vertebrae_S1", 0) * voxel_ml
                assert found == pytest.approx(expected, rel=0.05), (sample["id"], numbering, organ)
                compared += expected > 0
    assert compared >= 45


def test_volume_and_mask_of_a_real_scan_stay_together(shared_dir):
    """Organs keep their HU, and the hip bones are brightest under their own mask, not under a shifted one."""
    folder = shared_dir / "ct_samples"
    volume = read_nifti(folder / "abdomen_pelvis_ct.nii.gz")
    mask = read_nifti_mask(folder / "abdomen_pelvis_seg_v2.nii.gz")
    organ_set = load_organ_set("body_24")
    table = organ_label_table(organ_set, organ_set.organs, V2)
    scan = prepare_scan(volume, mask, table, (3.0, 1.0, 1.0), (5, 20, 20))
    organ_ids = {organ: organ_set.organs.index(organ) + 1 for organ in ("liver", "spleen", "hip", "lung")}
    for organ, organ_id in organ_ids.items():
        before = volume.array[table[mask.array] == organ_id].mean()
        after = scan.volume[scan.mask == organ_id].mean()
        # Interpolation mixes a voxel's border with its surroundings: least in the liver, most in thin bone.
        assert abs(after - before) < {"liver": 3, "spleen": 5, "hip": 25, "lung": 60}[organ], (organ, before, after)
    hip = scan.mask == organ_ids["hip"]
    brightness = scan.volume[hip].mean()
    for axis, voxels in ((0, 1), (1, 3), (2, 3)):  # 3 mm each
        for step in (-voxels, voxels):
            assert scan.volume[np.roll(hip, step, axis)].mean() < brightness - 10, (axis, step)


# Blobs of a processed split


def test_blobs_come_back_equal():
    generator = np.random.default_rng(0)
    volume = generator.integers(-32768, 32767, (5, 6, 7), endpoint=True).astype(np.int16)
    mask = generator.integers(0, 25, (5, 6, 7)).astype(np.uint8)
    row = {
        "volume": encode_array(np.flip(volume, 1)),  # a view with a negative stride
        "mask": encode_array(mask.astype(np.uint8)),
        "shape": [5, 6, 7],
    }
    decoded_volume, decoded_mask = decode_volume(row)
    assert decoded_volume.dtype == np.int16 and decoded_mask.dtype == np.uint8
    assert np.array_equal(decoded_volume, np.flip(volume, 1)) and np.array_equal(decoded_mask, mask)
    assert encode_array(mask) == row["mask"], "equal arrays give equal bytes"
    assert encode_array(volume.astype(">i2")) == encode_array(volume)


def test_wrong_blobs_are_refused():
    with pytest.raises(ValueError, match="stores int16 volumes and uint8 masks, got float32"):
        encode_array(np.zeros((2, 2, 2), dtype=np.float32))
    row = {"volume": encode_array(np.zeros((2, 2, 2), np.int16)), "mask": b"", "shape": [2, 2, 3]}
    with pytest.raises(ValueError, match=r"holds 8 values, but its shape is \(2, 2, 3\)"):
        decode_volume(row)
