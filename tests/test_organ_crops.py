"""Config `organ_crops`: the part of a scan around each organ, against a walk over its voxels."""

import numpy as np
import pyarrow as pa
import pytest

from data_builders.organ_crops import ORGAN_CROPS_SCHEMA, organ_crop_rows
from modeling_fvlm.geometry import organ_box
from modeling_fvlm.processed_split import decode_volume, encode_array

ORGANS = ("lung", "heart", "liver", "aorta")
SHAPE = (9, 14, 11)


def scan_row(seed: int) -> dict:
    """A row of config `volumes`: scattered lung, one voxel of heart in a corner, no liver, a block of aorta."""
    rng = np.random.default_rng(seed)
    volume = rng.integers(-1024, 2000, SHAPE).astype(np.int16)
    mask = np.zeros(SHAPE, np.uint8)
    mask[rng.integers(1, 8, 5), rng.integers(2, 12, 5), rng.integers(3, 9, 5)] = 1
    mask[0, 0, 10] = 2
    mask[3:5, 6:9, 4:5] = 4
    return {
        "patient_id": "p",
        "scan_id": "p_a",
        "recon_id": "p_a_1",
        "volume": encode_array(volume),
        "mask": encode_array(mask),
        "shape": list(SHAPE),
        "spacing": [3.0, 1.0, 1.5],
        "captions": [
            {
                "organ": organ,
                "caption": f"{organ} text",
                "is_abnormal": organ == "heart",
                "is_mentioned": organ != "lung",
            }
            for organ in reversed(ORGANS)  # found by name, not by place
        ],
        "findings": "",
        "impression": "",
        "labels": [{"finding": "Nodule", "value": 1}],
    }


@pytest.mark.parametrize("margin", [(0, 0, 0), (1, 2, 3), (99, 99, 99)])
@pytest.mark.parametrize("seed", range(5))
def test_crops_are_the_scan_around_each_organ(seed, margin):
    row = scan_row(seed)
    volume, mask = decode_volume(row)
    rows = organ_crop_rows(row, ORGANS, margin)
    assert [crop["organ"] for crop in rows] == ["lung", "heart", "aorta"]  # the liver has no voxel
    for crop in rows:
        label = ORGANS.index(crop["organ"]) + 1
        box = organ_box(mask == label, margin)
        crop_volume, crop_mask = decode_volume(crop)
        np.testing.assert_array_equal(crop_volume, volume[box])
        np.testing.assert_array_equal(crop_mask, mask[box] == label)
        assert crop_mask.sum() == (mask == label).sum()
        assert set(np.unique(crop_mask)) <= {0, 1}
        assert crop["shape"] == list(crop_volume.shape) and crop["spacing"] == row["spacing"]


def test_what_is_said_goes_with_its_organ():
    rows = {crop["organ"]: crop for crop in organ_crop_rows(scan_row(0), ORGANS, (0, 0, 0))}
    for organ, crop in rows.items():
        assert crop["caption"] == f"{organ} text"
        assert crop["is_abnormal"] == (organ == "heart") and crop["is_mentioned"] == (organ != "lung")
        assert (crop["patient_id"], crop["scan_id"], crop["recon_id"]) == ("p", "p_a", "p_a_1")
        assert crop["labels"] == [{"finding": "Nodule", "value": 1}]


def test_rows_fit_the_schema():
    rows = organ_crop_rows(scan_row(0), ORGANS, (1, 1, 1))
    assert all(list(crop) == ORGAN_CROPS_SCHEMA.names for crop in rows)
    assert pa.Table.from_pylist(rows, schema=ORGAN_CROPS_SCHEMA).to_pylist() == rows
