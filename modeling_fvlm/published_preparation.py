"""The published preparation of a scan with its faults: the preset `preprocessing: published`.

It exists to repeat published numbers; the default ("standard", preparation.py) is the right one. The steps:

    (1) `repair_header`            stored values and a metadata row -> HU and an affine
    (2) the segmentation's labels become organs
    (3) `resized_shape`, `resize_volume`, `nearest_indices`   onto the model's spacing
    (4) `box_of_organs`            the box of all organs with its margins
    (5) padding, evenly on both sides, to at least the crop

What is at fault, and kept here:

    (1) Slope and intercept are cast to int16: a slope of 0.5 becomes 0, and the whole volume the intercept. Sums and
        products wrap around.
    (1) The two in-plane directions of the metadata become rows of the affine where columns are meant: a scan that lies
        turned on the table is turned the other way.
    (3) Axes are taken as they are stored; nothing turns them by the affine. Files stored as LPS (CT-RATE's) come out as
        in the standard preparation, others mirrored or with exchanged axes.
    (3) Spacing is the absolute value of the affine's diagonal: too small for a scan that lies turned. x gets the
        spacing of y, and y that of x. The number of voxels is cut off without tolerance for a header's float32.
    (3) The mask's nearest voxel is the one at or below `index * size / new_size`, not the one whose cell holds the
        centre: the mask lies up to half a voxel off the volume.
    (4) The margin is one voxel smaller above than below: 5 / 20 / 20 below, 4 / 19 / 19 above.
    (5) The padding belongs to the scan from then on. So an organ that the scanner's own edge cuts counts as whole
        where padding lies behind it.

Steps (1) to (5) are compared with the published outputs; these hold no box that ends inside the scan along depth, no
turned scan with unequal spacings in the plane, no sum beyond int16 and no scan larger than the crop. What the code does
there is the plain continuation. A larger scan stays whole here, and the trainer draws a crop from it at random.

Three departures remain. The prepared volume is int16 HU, so it differs from the published float32 by at most 0.5 HU
(1/3000 of the window). Padding is HU of the window's lower edge, which the model maps to the published 0. And a mask
that does not lie on its volume's grid is refused; the published code would take its labels from wherever they fall.
The trainer's random crop and flips are those of its own settings.

Source: Shui et al., ICLR 2025, https://openreview.net/forum?id=nYpPAT4L3D, and the outputs of the authors' release.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from .geometry import AXES, BadVolumeError, crop_or_pad, crop_start, organ_box
from .preparation import PreparedScan, organs_of_labels, padding_hu
from .reading import Volume, check_same_grid

# For arrays that are to keep their stored order (x, y, z): with it, reading only reverses them to (z, y, x).
AS_STORED = np.diag([-1.0, -1.0, 1.0, 1.0])


def repair_header(
    stored: np.ndarray,
    rescale_slope: float,
    rescale_intercept: float,
    xy_spacing: Sequence[float],
    z_spacing: float,
    orientation: Sequence[float],
    position: Sequence[float],
) -> tuple[np.ndarray, np.ndarray]:
    """(1) HU and affine of a volume whose header is blank, from its row of CT-RATE's metadata.

    For volumes of `train/` and `valid/`; those of `*_fixed/` have been through it.

    Args:
        stored: int16 `(x, y, z)`, as stored.
        rescale_slope, rescale_intercept: Columns RescaleSlope and RescaleIntercept.
        xy_spacing, z_spacing: Columns XYSpacing, in the order (x, y), and ZSpacing, in mm.
        orientation: Column ImageOrientationPatient: direction of x, then of y, in LPS.
        position: Column ImagePositionPatient: the first voxel in mm, LPS.

    Returns:
        int16 `(x, y, z)`, and the affine from stored indices to mm in RAS+, rounded to the float32 of a header: with
        2.9999999 mm instead of 3 the number of voxels in (3) would be another.

    Raises:
        BadVolumeError: If `stored` is not int16 (with other types nothing would be cut off), or a value of the metadata
            is missing or not finite.
    """
    if stored.dtype.newbyteorder("=") != np.int16:
        raise BadVolumeError(
            f"stored is {stored.dtype}, not int16: give the voxels as they are in the file (nibabel: "
            "`np.asarray(image.dataobj)` of a file without a scale)."
        )
    row = {
        "rescale_slope": ([rescale_slope], 1),
        "rescale_intercept": ([rescale_intercept], 1),
        "xy_spacing": (xy_spacing, 2),
        "z_spacing": ([z_spacing], 1),
        "orientation": (orientation, 6),
        "position": (position, 3),
    }
    for name, (values, count) in row.items():
        if len(values) != count or not np.isfinite(np.asarray(values, dtype=np.float64)).all():
            raise BadVolumeError(f"{name} must be {count} finite, got {list(values)}; repair this row of the metadata.")
    hu = stored * np.int16(rescale_slope) + np.int16(rescale_intercept)
    along_x, along_y = np.asarray(orientation[:3], dtype=np.float64), np.asarray(orientation[3:], dtype=np.float64)
    affine = np.eye(4)
    affine[:3, :3] = np.stack([along_x, along_y, np.cross(along_x, along_y)]) * [*xy_spacing, z_spacing]
    affine[:3, 3] = position
    affine[:2] *= -1  # LPS -> RAS+
    return hu, affine.astype(np.float32).astype(np.float64)


def as_stored(read: Callable[..., Volume], source, affine: np.ndarray) -> Volume:
    """A `Volume` whose axes are the stored ones, only reversed to (z, y, x).

    Args:
        read: `read_nifti` or `read_nifti_mask`; for arrays `volume_from_array` or `mask_from_array`.
        source: Path or array.
        affine: Stored indices to mm, RAS+.
    """
    volume = read(source, affine=AS_STORED)
    affine = np.asarray(affine, dtype=np.float64)
    if affine.shape != (4, 4) or not np.isfinite(affine).all() or abs(np.linalg.det(affine)) < 1e-9:
        raise BadVolumeError(f"{volume.name}: the affine {affine.tolist()} spans no grid; repair the header.")
    columns = affine[:, [2, 1, 0, 3]]
    spacing = tuple(float(edge) for edge in np.linalg.norm(columns[:3, :3], axis=0))
    return replace(volume, affine=columns, spacing=spacing)


def prepare_published_scan(
    volume: Volume,
    mask: Volume,
    table: np.ndarray,
    spacing: Sequence[float],
    margin_voxels: Sequence[int],
    volume_size: Sequence[int],
    windows: Sequence[Mapping[str, float]],
) -> PreparedScan:
    """Prepare a scan as published: the counterpart of `prepare_scan`.

    Args:
        volume: int16 HU from `as_stored`. A `Volume` of `read_nifti` has been turned to LPS and will not do.
        mask: Labels of the segmentation, likewise.
        table: From `organ_label_table`.
        spacing: The model's voxel size in mm along (depth, height, width).
        margin_voxels: Margin below the box of all organs; above it is one voxel smaller.
        volume_size: The crop in voxels, to which smaller scans are padded.
        windows: The model's HU windows; the lowest `hu_min` is the padding.

    Returns:
        The padded scan. Its `spacing` is the true one, its `box` the part without padding.

    Raises:
        BadVolumeError: If the two are not on one grid, a label is outside the numbering, or no organ is present.
    """
    check_same_grid(volume, mask)
    shape = volume.array.shape
    new_shape = resized_shape(shape, volume.affine, spacing, volume.name)
    labels = mask.array[np.ix_(*(nearest_indices(size, new_size) for size, new_size in zip(shape, new_shape)))]
    organs = organs_of_labels(
        labels, int(mask.array.max()), table, volume.name, mask.name
    )  # (2) after (3): fewer voxels, the same result
    box = box_of_organs(organs, margin_voxels)  # (4)
    hu = np.rint(resize_volume(volume.array, new_shape)[box]).astype(np.int16)  # (3)
    size = tuple(max(part.stop - part.start, edge) for part, edge in zip(box, volume_size))
    start = crop_start(hu.shape, size)
    return PreparedScan(
        volume=crop_or_pad(hu, start, size, padding_hu(windows, is_published=True)),  # (5)
        mask=crop_or_pad(organs[box], start, size, 0),
        spacing=tuple(float(old * edge / new) for old, edge, new in zip(shape, volume.spacing, new_shape)),
        box=box,
    )


def resized_shape(
    shape: Sequence[int], affine: np.ndarray, new_spacing: Sequence[float], name: str = "volume"
) -> tuple[int, int, int]:
    """(3) Voxels on the new spacing, by the absolute values of the affine's diagonal with x and y exchanged.

    Args:
        shape: Stored shape, reversed to (z, y, x).
        affine: (z, y, x) indices to mm, as of a `Volume` from `as_stored`.
        new_spacing: mm along (z, y, x).
    """
    x, y, z = (abs(float(affine[axis, 2 - axis])) for axis in range(3))
    new_shape = []
    for axis, size, old, new in zip(AXES, shape, (z, x, y), new_spacing):
        new_shape.append(int(size * old / new))
        if new_shape[-1] < 1:
            raise BadVolumeError(
                f"{name}: the published preparation reads spacing off the affine's diagonal, which leaves no voxel "
                f"along {axis} (spacing {old:g} mm). Bring the file to LPS axes, or take preprocessing 'standard'."
            )
    return tuple(new_shape)


def resize_volume(volume: np.ndarray, new_shape: Sequence[int]) -> np.ndarray:
    """(3) Trilinear interpolation that keeps the extent; float32."""
    import torch  # here and below: only builds with this preset load PyTorch in their workers

    # In the stored order (x, y, z): in another one sums round differently.
    stored = torch.from_numpy(volume.transpose(2, 1, 0).astype(np.float32))
    resized = torch.nn.functional.interpolate(stored[None, None], size=tuple(new_shape)[::-1], mode="trilinear")
    return resized[0, 0].numpy().transpose(2, 1, 0)


def nearest_indices(size: int, new_size: int) -> np.ndarray:
    """(3) For every voxel of a resized mask the voxel its label is from, along one axis."""
    import torch

    indices = torch.arange(size, dtype=torch.float32)[None, None]  # exact in float32
    return torch.nn.functional.interpolate(indices, size=new_size, mode="nearest")[0, 0].numpy().astype(np.intp)


def box_of_organs(organs: np.ndarray, margin_voxels: Sequence[int]) -> tuple[slice, slice, slice]:
    """(4) The box of all organs, wider by the margin below and by one voxel less above, clipped to the array."""
    return tuple(
        # The margin is added to the last voxel, and this then is taken for the end that no longer belongs to the box.
        slice(max(0, tight.start - margin), min(size, tight.stop - 1 + margin))
        for tight, size, margin in zip(organ_box(organs), organs.shape, margin_voxels)
    )
