"""One scan from its file's grid to what is stored or cropped: the chain that builders and processor share.

This is `preprocessing: standard`; published_preparation.py holds the published one, one_pass.py this one from files.

(1) volume and mask are checked to lie on one grid
(2) the mask is resampled and its labels become organs
(3) the box of all organs, widened by a margin, is found on the resampled grid
(4) the volume is resampled inside that box alone (exactly equal to cropping afterwards)
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from .geometry import AIR_HU, BadVolumeError, organ_box, resample_mask, resample_volume, resampled_spacing
from .organs import UNKNOWN_LABEL
from .reading import Volume, check_same_grid


@dataclass
class PreparedScan:
    """A scan on the model's spacing, cut to the box of its organs.

    Attributes:
        volume: int16 HU `(depth, height, width)`.
        mask: uint8 organ labels on the same grid, `organ_index + 1`.
        spacing: The exact voxel size in mm; differs a little from the wanted one, because the extent is kept.
        box: Where the arrays lie on the resampled grid of the whole scan.
    """

    volume: np.ndarray
    mask: np.ndarray
    spacing: tuple[float, float, float]
    box: tuple[slice, slice, slice]


class ResampledMask(NamedTuple):
    """A mask on the model's grid, and what is still needed of the whole one.

    Attributes:
        labels: Of the segmentation, uint8 `(depth, height, width)`.
        highest: The highest label of the whole mask.
        whole: Geometry, name and notes of the mask; its voxels are gone.
    """

    labels: np.ndarray
    highest: int
    whole: Volume


def resampled_mask(mask: Volume, spacing: Sequence[float]) -> ResampledMask:
    """A mask by itself on the model's grid (step 2), so that it need not be in memory beside its volume."""
    labels = resample_mask(mask.array, mask.spacing, spacing)
    no_voxels = np.broadcast_to(np.uint8(0), mask.array.shape)
    return ResampledMask(labels, int(mask.array.max()), replace(mask, array=no_voxels))


def prepare_scan(
    volume: Volume,
    mask: Volume | ResampledMask,
    table: np.ndarray,
    spacing: Sequence[float],
    margin_voxels: Sequence[int],
) -> PreparedScan:
    """Resample a scan and cut it to its organs.

    Args:
        volume: From `read_nifti` or `volume_from_array`.
        mask: From `read_nifti_mask` or `mask_from_array`, with the labels of the segmentation; or what `resampled_mask`
            has made of it.
        table: From `organ_label_table`.
        spacing: The model's voxel size in mm along (depth, height, width).
        margin_voxels: Voxels of `spacing` kept around the organs on both sides.

    Raises:
        BadVolumeError: If the two are not on one grid, a label is outside the numbering, or no organ is present.
    """
    check_same_grid(volume, mask if isinstance(mask, Volume) else mask.whole)  # (1)
    if isinstance(mask, Volume):
        mask = resampled_mask(mask, spacing)  # (2) fewer voxels first, then the lookup
    organs = organs_of_labels(mask.labels, mask.highest, table, volume.name, mask.whole.name)
    box = organ_box(organs, margin_voxels)  # (3)
    return PreparedScan(
        volume=resample_volume(volume.array, volume.spacing, spacing, box),  # (4)
        mask=np.ascontiguousarray(organs[box]),
        spacing=resampled_spacing(volume.array.shape, volume.spacing, spacing),
        box=box,
    )


def padding_hu(windows: Sequence[Mapping[str, float]], is_published: bool) -> int:
    """HU of what lies outside a scan: air, or as published what every window maps to its lower edge.

    Args:
        windows: The model's HU windows.
        is_published: Whether scans are prepared, or windows made, as published. Air lies above the published window's
            lower edge (-1150 HU) and would become 0.084, not 0.
    """
    return math.floor(min(window["hu_min"] for window in windows)) if is_published else AIR_HU


def organs_of_labels(
    labels: np.ndarray, highest: int, table: np.ndarray, volume_name: str, mask_name: str
) -> np.ndarray:
    """Turn a resampled mask into organ labels.

    Args:
        labels: Labels of the segmentation on the model's grid.
        highest: The highest label on the full grid: resampling may step over a small structure.
        table: From `organ_label_table`.
        volume_name, mask_name: For messages.

    Raises:
        BadVolumeError: If a label is outside the numbering, or no organ is present.
    """
    if table[highest] == UNKNOWN_LABEL:
        raise _unknown_label(mask_name, highest, table)
    look_up = np.asarray(table, dtype=np.uint8).tobytes()
    organs = np.empty(labels.shape, dtype=np.uint8)
    for place, plane in enumerate(labels):  # slice by slice: twice as fast as all at once, and no copy of the scan
        # bytes.translate: numpy would first widen every label to a 64-bit index.
        organs[place] = np.frombuffer(plane.tobytes().translate(look_up), dtype=np.uint8).reshape(plane.shape)
    if organs.max() == UNKNOWN_LABEL:
        raise _unknown_label(mask_name, int(labels[organs == UNKNOWN_LABEL][0]), table)
    if not organs.any():
        raise BadVolumeError(
            f"{volume_name}: the mask ({mask_name}) holds no organ of the set; its labels are "
            f"{np.unique(labels).tolist()[:20]}. Check that it belongs to this scan and was read with its numbering."
        )
    return organs


def _unknown_label(mask_name: str, label: int, table: np.ndarray) -> BadVolumeError:
    known = np.flatnonzero(table != UNKNOWN_LABEL)
    return BadVolumeError(
        f"{mask_name}: label {label} is outside the numbering, whose labels end at {known[-1]}. The mask was made with "
        "another release or task of the segmentation tool: give the numbering it was made with."
    )
