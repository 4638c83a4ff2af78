"""Config `organ_crops`: a row of config `volumes` cut into one row per organ.

A row holds the part of the scan around one organ, that organ's binary mask and what the report says of it: a few
hundred kilobytes where the scan has many megabytes, for whoever trains on single organs or wants to look at them.
Rows carry the columns `volume`, `mask` and `shape` in the same form as those of `volumes` and are decoded alike
(`modeling_fvlm.processed_split.decode_volume`).
"""

from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa

from modeling_fvlm.processed_split import decode_volume, encode_array

ORGAN_CROPS_SCHEMA = pa.schema(
    [
        ("patient_id", pa.string()),
        ("scan_id", pa.string()),
        ("recon_id", pa.string()),
        ("organ", pa.string()),
        ("volume", pa.binary()),  # zstd over int16 HU
        ("mask", pa.binary()),  # zstd over uint8: 1 where the organ is
        ("shape", pa.list_(pa.int32(), 3)),
        ("spacing", pa.list_(pa.float32(), 3)),
        ("caption", pa.string()),
        ("is_abnormal", pa.bool_()),
        ("is_mentioned", pa.bool_()),
        ("labels", pa.list_(pa.struct([("finding", pa.string()), ("value", pa.int8())]))),  # of the whole scan
    ]
)


def organ_crop_rows(row: Mapping, organs: Sequence[str], margin_voxels: Sequence[int]) -> list[dict]:
    """Cut a row of config `volumes` into its organs.

    Args:
        row: With the columns of config `volumes`.
        organs: Names in the order of the labels in the mask.
        margin_voxels: Voxels of the row kept around each organ along (depth, height, width), as far as the row goes.

    Returns:
        Rows of config `organ_crops`, one for each organ that has a voxel in the mask, in the order of `organs`.
    """
    from scipy.ndimage import find_objects

    volume, mask = decode_volume(row)
    captions = {entry["organ"]: entry for entry in row["captions"]}
    rows = []
    # The boxes of all organs in one pass over the mask.
    for label, (organ, tight) in enumerate(zip(organs, find_objects(mask, max_label=len(organs))), start=1):
        if tight is None:
            continue
        box = tuple(
            slice(max(0, part.start - margin), min(size, part.stop + margin))
            for part, margin, size in zip(tight, margin_voxels, mask.shape)
        )
        crop = volume[box]
        caption = captions[organ]
        rows.append(
            {
                "patient_id": row["patient_id"],
                "scan_id": row["scan_id"],
                "recon_id": row["recon_id"],
                "organ": organ,
                "volume": encode_array(crop),
                "mask": encode_array((mask[box] == label).astype(np.uint8)),
                "shape": list(crop.shape),
                "spacing": row["spacing"],
                "caption": caption["caption"],
                "is_abnormal": caption["is_abnormal"],
                "is_mentioned": caption["is_mentioned"],
                "labels": row["labels"],
            }
        )
    return rows
