"""Geometry of volumes and masks: orientation, resampling, boxes, crops, windows, and organs on the patch grid.

Arrays are `(depth, height, width)` in LPS: width grows to the patient's left, height to posterior, depth to superior.
Spacing is in mm in the same axis order. Volumes are int16 HU, masks are uint8 label maps with 0 for background and
`organ_index + 1` for organs. Everything here is numpy and works on one scan; builders, trainer and pipeline all call
it, so that training and inference cannot drift apart. The chain for one scan is

    (1) `orient_to_lps`                                  any NIfTI orientation -> LPS
    (2) `resample_mask`, `organ_box`, `resample_volume`  onto the model's spacing, inside the box of the organs
    (3) `crop_start`, `crop_or_pad`                      the fixed size the network reads
    (4) `window_volume`, `organ_token_mask`, `organs_in_crop`, or both at once: `organ_bookkeeping`

Source of the recipe (box margins, extent-preserving resampling, occupancy by max-pooling, border rule): Shui et al.,
ICLR 2025, https://openreview.net/forum?id=nYpPAT4L3D. Where the released code is at fault it departs: axes and spacing
follow the affine (not the absolute values of its diagonal), margins are the same on both sides.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations

import numpy as np

AIR_HU = -1024  # what lies outside the scan
AXES = ("depth", "height", "width")

# Cosine between two voxel axes from which an affine counts as sheared. Headers keep float32 (errors of 1e-7) and some
# writers three decimals; a gantry tilt of one degree, the smallest in use, gives 0.017.
MAX_AXIS_COSINE = 5e-3
# Above this rotation the closest axes are a poor stand-in for the body's axes.
MAX_QUIET_ROTATION_DEGREES = 20.0
# No scanner's table is longer; micrometres for millimetres come to hundreds of metres, and to terabytes at 1 mm.
MAX_EXTENT_MM, MIN_SPACING_MM = 5000.0, 0.02


class BadVolumeError(ValueError):
    """A volume or mask that cannot be used as it is; the message says what is wrong and how to mend it."""


# (1) Orientation


def orient_to_lps(array: np.ndarray, affine: np.ndarray) -> tuple[np.ndarray, tuple[float, float, float], np.ndarray]:
    """Turn an array with any axis order into `(depth, height, width)` LPS.

    Axes are permuted and flipped, never interpolated: an oblique scan goes to the closest body axes.

    Args:
        array: 3-D array whose voxel (i, j, k) lies at `affine @ (i, j, k, 1)`.
        affine: 4 x 4, voxel indices to mm in RAS+ (x to the right, y to anterior, z to superior), as nibabel gives it.

    Returns:
        The turned array (a view, nothing is copied), its spacing in mm along (depth, height, width), and its affine
        from (depth, height, width) indices to mm, still RAS+.

    Raises:
        BadVolumeError: If the array is not 3-D or empty, or the affine is not finite, has zero spacing or shear.
    """
    array = np.asanyarray(array)
    turn, spacing, new_affine = turn_to_lps(array.shape, affine)
    return turn(array), spacing, new_affine


@dataclass(frozen=True)
class Turn:
    """How stored axes become (depth, height, width) LPS: the `order` to put them in, and which are then flipped."""

    order: tuple[int, int, int]
    is_flipped: tuple[bool, bool, bool]

    def __call__(self, array: np.ndarray) -> np.ndarray:
        """A turned view of an array in its stored axes."""
        return np.flip(array.transpose(self.order), [axis for axis in range(3) if self.is_flipped[axis]])


def turn_to_lps(shape: Sequence[int], affine: np.ndarray) -> tuple[Turn, tuple[float, float, float], np.ndarray]:
    """What `orient_to_lps` does to an array of that shape, for those who read it piece by piece.

    Returns:
        The turn, and spacing and affine as `orient_to_lps` gives them.
    """
    shape, affine = tuple(shape), np.asarray(affine, dtype=np.float64)
    if len(shape) != 3:
        hint = "pick one of its volumes" if len(shape) > 3 else "stack the slices of the series into one volume"
        raise BadVolumeError(f"needs a 3-D array, got {len(shape)}-D with shape {shape}; {hint}.")
    if 0 in shape:
        raise BadVolumeError(f"the array is empty: shape {shape}.")
    if affine.shape != (4, 4) or not np.isfinite(affine).all():
        raise BadVolumeError(f"the affine must be 4 x 4 and finite, got {affine.tolist()}; repair the header.")
    axes = affine[:3, :3]
    voxel_size = np.linalg.norm(axes, axis=0)
    if (voxel_size < 1e-6).any():
        raise BadVolumeError(f"zero spacing: the affine has voxel sizes {voxel_size.tolist()} mm; repair the header.")
    if (voxel_size < MIN_SPACING_MM).any():
        raise BadVolumeError(
            f"voxels of {voxel_size.round(6).tolist()} mm are finer than any CT's. Repair the spacing in the header; "
            "is it in metres?"
        )
    if (voxel_size * shape > MAX_EXTENT_MM).any():
        raise BadVolumeError(
            f"the scan would be {(voxel_size * shape / 1000).max():.1f} m long: {shape} voxels of "
            f"{voxel_size.round(3).tolist()} mm. Repair the spacing in the header; is it in micrometres?"
        )
    direction = axes / voxel_size  # columns are unit vectors in RAS+
    cosines = (direction.T @ direction)[np.triu_indices(3, k=1)]
    if np.abs(cosines).max() > MAX_AXIS_COSINE:
        angle = np.degrees(np.arccos(np.abs(cosines).max()))
        raise BadVolumeError(
            f"the affine is sheared: two voxel axes meet at {angle:.1f} degrees (a tilted gantry does that). Resample "
            "the volume onto a grid with right angles first."
        )

    # The array axis for each world axis (x, y, z): the assignment with the largest total alignment. Taking the largest
    # component of each row could choose one array axis twice.
    axis_of_world = max(permutations(range(3)), key=lambda order: np.abs(direction[range(3), order]).sum())
    order = axis_of_world[::-1]  # depth is z, height is y, width is x
    new_affine = np.eye(4)
    new_affine[:3, :3] = axes[:, order]
    new_affine[:3, 3] = affine[:3, 3]
    # RAS+ wanted signs: z grows with depth, y falls with height, x falls with width.
    is_flipped = tuple(
        bool(direction[world, order[axis]] * sign < 0) for axis, (world, sign) in enumerate(((2, 1), (1, -1), (0, -1)))
    )
    for axis in range(3):
        if is_flipped[axis]:
            new_affine[:3, 3] += new_affine[:3, axis] * (shape[order[axis]] - 1)
            new_affine[:3, axis] *= -1
    spacing = tuple(float(voxel_size[axis]) for axis in order)
    return Turn(order, is_flipped), spacing, new_affine


def oblique_note(affine: np.ndarray) -> str | None:
    """What to tell of a scan that lies far aslant, or None; from its affine after `orient_to_lps`."""
    axes = affine[:3, 2::-1]  # columns along x, y, z
    cosines = np.abs(np.diag(axes)) / np.linalg.norm(axes, axis=0)
    rotation = np.degrees(np.arccos(min(cosines.min(), 1.0)))
    if rotation <= MAX_QUIET_ROTATION_DEGREES:
        return None
    return (
        f"the scan is turned by {rotation:.0f} degrees against the body axes and is read along the closest ones; "
        "resample it onto straight axes if that is not meant."
    )


# (2) Resampling and boxes


def resampled_shape(
    shape: Sequence[int], spacing: Sequence[float], new_spacing: Sequence[float]
) -> tuple[int, int, int]:
    """Shape on the new spacing: the whole voxels that fit into the extent, at least one."""
    for name, values in (("spacing", spacing), ("new_spacing", new_spacing)):
        if len(values) != 3 or not all(np.isfinite(value) and value > 0 for value in values):
            raise BadVolumeError(f"{name} must be three positive numbers in mm, got {tuple(values)}.")
    # Headers hold float32: 120 x 1.4999999 / 1.0 must stay 180.
    return tuple(max(1, int(np.floor(size * old / new + 1e-3))) for size, old, new in zip(shape, spacing, new_spacing))


def resampled_spacing(
    shape: Sequence[int], spacing: Sequence[float], new_spacing: Sequence[float]
) -> tuple[float, float, float]:
    """The exact spacing after resampling: the extent is kept, so it differs a little from `new_spacing`."""
    new_shape = resampled_shape(shape, spacing, new_spacing)
    return tuple(float(size * old / new) for size, old, new in zip(shape, spacing, new_shape))


def resample_volume(
    volume: np.ndarray,
    spacing: Sequence[float],
    new_spacing: Sequence[float],
    box: Sequence[slice] | None = None,
) -> np.ndarray:
    """Resample a volume by trilinear interpolation, keeping its physical extent.

    Voxels are cells: the outer faces of the first and last cell stay where they are, so the centre of output voxel `i`
    lies at `(i + 0.5) * size / new_size - 0.5` of the input (`align_corners=False`). Interpolation runs slice by
    slice and axis by axis in float32, on the rows and columns of the box alone; with and without a box every voxel is
    computed from the same numbers in the same order, so the two are equal bit for bit.

    Args:
        volume: HU `(depth, height, width)`.
        spacing: Its voxel size in mm.
        new_spacing: The wanted voxel size in mm.
        box: Slices on the OUTPUT grid; only this part is computed.

    Returns:
        int16 HU of the output grid (or of the box), rounded to the nearest integer.
    """
    if resampled_shape(volume.shape, spacing, new_spacing) == tuple(volume.shape):
        return _to_int16(volume[_full_box(volume.shape) if box is None else _checked_box(box, volume.shape)])
    resampler = VolumeResampler(volume.shape, spacing, new_spacing, box)
    for index in resampler.slices_read:
        resampler.add(index, volume[index])
    return resampler.output


class VolumeResampler:
    """`resample_volume` for a volume whose slices come one after the other; at most the two of a gap are held.

    Args:
        shape: Shape of the volume.
        spacing, new_spacing, box: As in `resample_volume`.

    Attributes:
        output: int16 HU, complete when every slice of `slices_read` has been added, in whatever order.
        slices_read: Depth indices of the slices that are needed, rising.
    """

    def __init__(
        self,
        shape: Sequence[int],
        spacing: Sequence[float],
        new_spacing: Sequence[float],
        box: Sequence[slice] | None = None,
    ):
        new_shape = resampled_shape(shape, spacing, new_spacing)
        box = _full_box(new_shape) if box is None else _checked_box(box, new_shape)
        depths, (y0, y1, self.y_weight), (x0, x1, self.x_weight) = (
            _linear_taps(size, new_size, part) for size, new_size, part in zip(shape, new_shape, box)
        )
        # Rows and columns that no output voxel reads are left out before anything is computed.
        self.rows, self.columns = slice(y0[0], y1[-1] + 1), slice(x0[0], x1[-1] + 1)
        self.y0, self.y1, self.x0, self.x1 = y0 - y0[0], y1 - y0[0], x0 - x0[0], x1 - x0[0]
        self.output = np.empty(tuple(part.stop - part.start for part in box), dtype=np.int16)
        self.taps = [
            (below, above if weight else below, weight)
            for below, above, weight in zip(depths[0].tolist(), depths[1].tolist(), depths[2])
        ]
        self.readers: dict[int, list[int]] = {}  # input slice -> output slices that wait for it
        for index, (below, above, _) in enumerate(self.taps):
            for depth in {below, above}:
                self.readers.setdefault(depth, []).append(index)
        self.held: dict[int, np.ndarray] = {}  # float32, as long as an output slice waits for them
        self.slices_read = sorted(self.readers)

    def add(self, index: int, plane: np.ndarray) -> None:
        """Take the slice `(height, width)` of depth `index`; it is copied. Each is added once."""
        self.held[index] = plane[self.rows, self.columns].astype(np.float32)
        for reader in list(self.readers[index]):
            below, above, weight = self.taps[reader]
            if below not in self.held or above not in self.held:
                continue
            plane = self.held[below]
            if weight:
                plane = plane + weight * (self.held[above] - plane)
            plane = _interpolate(plane, self.y0, self.y1, self.y_weight[:, None], axis=0)
            plane = _interpolate(plane, self.x0, self.x1, self.x_weight, axis=1)
            self.output[reader] = np.rint(plane)
            for depth in {below, above}:
                self.readers[depth].remove(reader)
                if not self.readers[depth]:
                    del self.held[depth]


def resample_mask(
    mask: np.ndarray,
    spacing: Sequence[float],
    new_spacing: Sequence[float],
    box: Sequence[slice] | None = None,
) -> np.ndarray:
    """Resample a label map to the same grid as `resample_volume`, taking the nearest voxel's label (uint8)."""
    new_shape = resampled_shape(mask.shape, spacing, new_spacing)
    box = _full_box(new_shape) if box is None else _checked_box(box, new_shape)
    depths, rows, columns = (
        nearest_cells(size, new_size)[part] for size, new_size, part in zip(mask.shape, new_shape, box)
    )
    labels = np.empty((len(depths), len(rows), len(columns)), dtype=np.uint8)
    # Slice by slice: take would copy the whole of a view first, as a file in another order of axes is.
    for target, depth in zip(labels, depths):
        target[...] = mask[depth].take(rows, axis=0).take(columns, axis=1)
    return labels


def nearest_cells(size: int, new_size: int) -> np.ndarray:
    """For every output cell along an axis the input cell that holds its centre."""
    centres = (np.arange(new_size) + 0.5) * (size / new_size)
    return np.minimum(centres.astype(np.intp), size - 1)


def _full_box(shape: Sequence[int]) -> tuple[slice, slice, slice]:
    return tuple(slice(0, size) for size in shape)


def _checked_box(box: Sequence[slice], shape: Sequence[int]) -> tuple[slice, slice, slice]:
    for name, part, size in zip(AXES, box, shape):
        if not 0 <= part.start < part.stop <= size or part.step not in (None, 1):
            raise ValueError(f"box {name} {part} does not lie within the {size} voxels of the resampled grid.")
    return tuple(slice(int(part.start), int(part.stop)) for part in box)


def _linear_taps(size: int, new_size: int, part: slice) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Lower index, upper index and float32 weight of the upper one, for each output voxel of `part`."""
    position = (np.arange(part.start, part.stop, dtype=np.float64) + 0.5) * (size / new_size) - 0.5
    position = np.clip(position, 0, size - 1)  # beyond the outer centres the outer voxel goes on
    lower = position.astype(np.intp)
    return lower, np.minimum(lower + 1, size - 1), (position - lower).astype(np.float32)


def _interpolate(plane: np.ndarray, lower: np.ndarray, upper: np.ndarray, weight: np.ndarray, axis: int) -> np.ndarray:
    if not weight.any() and lower.size == plane.shape[axis]:
        return plane  # this axis keeps its grid
    start = plane.take(lower, axis)
    step = plane.take(upper, axis)
    step -= start
    step *= weight
    step += start
    return step


def _to_int16(volume: np.ndarray) -> np.ndarray:
    """A fresh, contiguous int16 copy; other types are rounded and clipped."""
    if volume.dtype == np.int16:
        return np.array(volume, order="C")
    limits = np.iinfo(np.int16)
    return np.clip(np.rint(volume), limits.min, limits.max).astype(np.int16, order="C")


def organ_box(mask: np.ndarray, margin_voxels: Sequence[int] = (0, 0, 0)) -> tuple[slice, slice, slice]:
    """The smallest box with all labels, widened by a margin on both sides and clipped to the array.

    Raises:
        BadVolumeError: If the mask is empty.
    """
    # One pass over the memory, then small reductions: `any` along two axes at a time would read the mask three times.
    rows = mask.any(axis=2)  # (depth, height)
    depths, heights = rows.any(axis=1), rows.any(axis=0)
    if not depths.any():
        raise BadVolumeError("the mask holds no organ: every label is background.")
    z, y = _span(depths), _span(heights)
    x = _span(mask[z, y].any(axis=(0, 1)))
    return tuple(
        slice(max(0, part.start - int(margin)), min(size, part.stop + int(margin)))
        for part, size, margin in zip((z, y, x), mask.shape, margin_voxels)
    )


def _span(occupied: np.ndarray) -> slice:
    indices = np.flatnonzero(occupied)
    return slice(int(indices[0]), int(indices[-1]) + 1)


# (3) Crops


def crop_start(
    shape: Sequence[int],
    size: Sequence[int],
    center: Sequence[int] | None = None,
    generator: np.random.Generator | None = None,
) -> tuple[int, int, int]:
    """The first voxel of a crop of `size`: around `center`, else drawn from `generator`, else in the middle.

    A crop never leaves the array on an axis where the array is large enough; where it is smaller the array stands in
    the middle of the crop and the start is negative.
    """
    starts = []
    for axis, (extent, edge) in enumerate(zip(shape, size)):
        if extent <= edge:
            starts.append(-((edge - extent) // 2))
        elif center is not None:
            starts.append(min(max(int(center[axis]) - edge // 2, 0), extent - edge))
        elif generator is not None:
            starts.append(int(generator.integers(0, extent - edge, endpoint=True)))
        else:
            starts.append((extent - edge) // 2)
    return tuple(starts)


def crop_inside(shape: Sequence[int], start: Sequence[int], size: Sequence[int]) -> tuple[slice, slice, slice]:
    """The part of the array that a crop covers: its slices without the padding."""
    inside = tuple(slice(max(0, low), min(extent, low + edge)) for extent, low, edge in zip(shape, start, size))
    for name, part, extent in zip(AXES, inside, shape):
        if part.start >= part.stop:
            raise ValueError(f"the crop lies outside the array: {name} {part} of {extent} voxels.")
    return inside


def crop_or_pad(array: np.ndarray, start: Sequence[int], size: Sequence[int], value: int) -> np.ndarray:
    """Cut `size` voxels from `start` on out of the last three axes; what lies outside the array becomes `value`."""
    shape = array.shape[-3:]
    inside = crop_inside(shape, start, size)
    if all(part.stop - part.start == edge for part, edge in zip(inside, size)):
        return np.array(array[(..., *inside)], order="C")
    output = np.full((*array.shape[:-3], *size), value, dtype=array.dtype)
    output[(..., *(slice(part.start - low, part.stop - low) for part, low in zip(inside, start)))] = array[
        (..., *inside)
    ]
    return output


def organ_window(
    box: Sequence[slice], shape: Sequence[int], size: Sequence[int], patch_size: Sequence[int]
) -> tuple[tuple[slice, slice, slice], tuple[int, int, int]]:
    """Where the network looks when one organ is asked: a window of `size` centred on the organ's box.

    Along each axis the window is as long as `size`, or as the organ where that is longer. It is moved inside the array
    where it would leave it, and is never longer than the array; so neighbouring organs often share one window.

    Args:
        box: Tight box of the organ (`organ_box` without margin).
        shape: Shape of the prepared scan.
        size: The network's crop in voxels.
        patch_size: Patch edges; the padded size is a multiple of them.

    Returns:
        The window as slices of the array, and the size to which `crop_or_pad` pads it (evenly on both sides).
    """
    window, padded = [], []
    for part, extent, wanted, patch in zip(box, shape, size, patch_size):
        length = min(max(wanted, part.stop - part.start), extent)
        start = min(max((part.start + part.stop - length) // 2, 0), extent - length)
        window.append(slice(start, start + length))
        needed = max(length, wanted)
        padded.append(needed + -needed % patch)
    return tuple(window), tuple(padded)


# (4) What the network reads


def window_volume(volume: np.ndarray, windows: Sequence[Mapping[str, float]]) -> np.ndarray:
    """Map HU to network input, one channel a window: clip (v - hu_min) / (hu_max - hu_min) to [0, 1], (x - mean) / std.

    Args:
        volume: HU `(depth, height, width)`.
        windows: Dicts with `hu_min`, `hu_max`, `mean`, `std`.

    Returns:
        float32 `(channels, depth, height, width)`.
    """
    output = np.empty((len(windows), *volume.shape), dtype=np.float32)
    for channel, window in zip(output, windows):
        low, high = window["hu_min"], window["hu_max"]
        if not low < high or window["std"] == 0:
            raise ValueError(f"window {dict(window)}: hu_min must lie below hu_max, and std must not be 0.")
        np.subtract(volume, np.float32(low), out=channel)
        channel /= np.float32(high - low)
        np.clip(channel, 0, 1, out=channel)
        if window["mean"] != 0:
            channel -= np.float32(window["mean"])
        if window["std"] != 1:
            channel /= np.float32(window["std"])
    return output


def organ_token_mask(mask: np.ndarray, num_organs: int, patch_size: Sequence[int]) -> np.ndarray:
    """Tell, for every organ, which patches hold at least one of its voxels.

    The same as max-pooling each organ's binary mask over the patch grid, so an organ thinner than a patch (the
    esophagus) keeps its tokens and one token may belong to several organs. Done in one pass for all organs: each label
    becomes a word with the organ's bit, and the words are OR-ed over each patch.

    Args:
        mask: Label map `(depth, height, width)`, 0 is background, `organ_index + 1` otherwise.
        num_organs: At most 64.
        patch_size: Patch edges in voxels along (depth, height, width).

    Returns:
        Boolean `(num_organs, num_tokens)`, tokens in patch-embedding order (width fastest).

    Raises:
        ValueError: If an edge is no multiple of its patch, or a label is above `num_organs`.
    """
    mask = _checked_labels(mask, num_organs)
    for name, size, patch in zip(AXES, mask.shape, patch_size):
        if size % patch:
            raise ValueError(
                f"mask {name} {size} is not a multiple of patch {patch}; pad it to {size + -size % patch}."
            )
    grid = tuple(size // patch for size, patch in zip(mask.shape, patch_size))
    _, height, width = patch_size
    words = []
    for slab in mask.reshape(grid[0], patch_size[0], *mask.shape[1:]):  # one row of patches in depth
        # Plane by plane, so that what is computed stays in the cache.
        joined = _organ_words(slab[0], num_organs)
        for plane in slab[1:]:
            joined |= _organ_words(plane, num_organs)
        rows = np.bitwise_or.reduce(joined.reshape(grid[1], height, mask.shape[2]), axis=1)
        words.append(np.bitwise_or.reduce(rows.reshape(grid[1], grid[2], width), axis=2))
    return _organs_of_words(np.stack(words).ravel(), num_organs)


def organ_is_complete(mask: np.ndarray, num_organs: int, min_voxels: int = 1) -> np.ndarray:
    """Tell which organs are present (at least `min_voxels`) and not cut: no voxel on any of the six faces.

    The caption of an organ speaks of the whole organ, so a part of it is no positive example. Give the part of the
    scan that the crop covers WITHOUT its padding (`crop_inside`): padding would hide that the scan itself cuts the
    organ.

    Args:
        mask: Label map `(depth, height, width)`, 0 is background, `organ_index + 1` otherwise.

    Returns:
        Boolean `(num_organs,)`.
    """
    mask = _checked_labels(mask, num_organs)
    return _has_voxels(mask, num_organs, min_voxels) & ~_organs_in(_faces(mask), num_organs)


def organs_in_crop(
    mask: np.ndarray,
    inside: Sequence[slice],
    num_organs: int,
    completeness: str = "border",
    min_voxels: int = 1,
) -> np.ndarray:
    """Tell which organs of a scan a crop shows well enough to be contrasted, by the config's rule.

    Args:
        mask: Label map of the scan as it was prepared.
        inside: The part of it that the crop covers, from `crop_inside`.
        completeness: "border": the organ touches no face of the crop nor of the scan, and none of its voxels lies
            outside the crop (of two kidneys one may be left out without the other touching a face; the caption speaks
            of both). "min_voxels": at least `min_voxels` lie in the crop, whatever the faces say.
        min_voxels: Fewest voxels of an organ that counts, under either rule.

    Returns:
        Boolean `(num_organs,)`.
    """
    mask = _checked_labels(mask, num_organs)
    is_present = _has_voxels(mask[tuple(inside)], num_organs, min_voxels)
    return is_present & _is_allowed(mask, inside, num_organs, completeness)


def organ_bookkeeping(
    mask: np.ndarray,
    start: Sequence[int],
    size: Sequence[int],
    num_organs: int,
    patch_size: Sequence[int],
    completeness: str = "border",
    min_voxels: int = 1,
) -> tuple[np.ndarray, np.ndarray]:
    """What a crop shows of the organs: `organ_token_mask` of the padded crop, and `organs_in_crop`.

    Both from one pass over the crop; beyond it, only the faces and what lies outside the crop are looked at (and the
    voxels are counted where `min_voxels` asks for more than one).

    Args:
        mask: Label map of the scan as it was prepared, `(depth, height, width)`.
        start, size: First voxel and size of the crop, as for `crop_or_pad`.
        num_organs, patch_size: As in `organ_token_mask`.
        completeness, min_voxels: As in `organs_in_crop`.

    Returns:
        Boolean `(num_organs, num_tokens)` and `(num_organs,)`.
    """
    mask = _checked_labels(mask, num_organs)
    inside = crop_inside(mask.shape, start, size)
    part = mask[inside]
    crop = part if part.shape == tuple(size) else crop_or_pad(mask, start, size, 0)
    token_mask = organ_token_mask(crop, num_organs, patch_size)
    is_present = token_mask.any(axis=1) if min_voxels <= 1 else _has_voxels(part, num_organs, min_voxels)
    return token_mask, is_present & _is_allowed(mask, inside, num_organs, completeness)


def organ_voxels(mask: np.ndarray, num_organs: int) -> np.ndarray:
    """Voxels of each organ in a label map, int64 `(num_organs,)`."""
    # Slice by slice: bincount widens its input to 64 bit, which for a whole scan would not stay in the cache.
    return sum(np.bincount(plane.ravel(), minlength=num_organs + 1) for plane in _checked_labels(mask, num_organs))[1:]


def _has_voxels(mask: np.ndarray, num_organs: int, min_voxels: int) -> np.ndarray:
    """Which organs have at least `min_voxels`, and at least one: `(num_organs,)`. Counting takes far longer."""
    return organ_voxels(mask, num_organs) >= min_voxels if min_voxels > 1 else _organs_in(mask, num_organs)


def _is_allowed(mask: np.ndarray, inside: Sequence[slice], num_organs: int, completeness: str) -> np.ndarray:
    """Which organs the rule of `organs_in_crop` admits if the crop shows any of them: `(num_organs,)`."""
    if completeness == "min_voxels":
        return np.ones(num_organs, dtype=bool)
    is_cut = _organs_in(_faces(mask[tuple(inside)]), num_organs)
    for axis, part in enumerate(inside):
        # What lies before and behind the crop along this axis, within the crop along those already done.
        for beyond in (slice(0, part.start), slice(part.stop, None)):
            outside = mask[(*inside[:axis], beyond)]
            if outside.size:
                is_cut |= _organs_in(outside, num_organs)
    return ~is_cut


def _faces(mask: np.ndarray) -> list[np.ndarray]:
    return [mask[(slice(None),) * axis + (face,)] for axis in range(3) for face in (0, -1)]


def _organs_in(planes: Iterable[np.ndarray], num_organs: int) -> np.ndarray:
    """Which organs have a voxel in any of the planes, be they a mask's slices: boolean `(num_organs,)`."""
    words = [np.bitwise_or.reduce(_organ_words(plane, num_organs), axis=None) for plane in planes]
    return _organs_of_words(np.bitwise_or.reduce(words, initial=0, dtype=np.uint64), num_organs)


def _organ_words(labels: np.ndarray, num_organs: int) -> np.ndarray:
    """For each label a word with the bit `organ_index`, none for background: the smallest type that has the bits."""
    word = next(np.dtype(f"uint{bits}") for bits in (8, 16, 32, 64) if bits >= num_organs)
    # Arithmetic, not a table: numpy shifts whole registers of voxels at once, but looks labels up one by one.
    # Background wraps to 255 places, and numpy defines a shift beyond the word as 0.
    return np.left_shift(word.type(1), labels.astype(np.uint8, copy=False) - np.uint8(1))


def _organs_of_words(words: np.ndarray, num_organs: int) -> np.ndarray:
    """Take the bits apart: boolean `(num_organs, *words.shape)`."""
    return np.stack([words & words.dtype.type(1 << organ) for organ in range(num_organs)]) != 0


def _checked_labels(mask: np.ndarray, num_organs: int) -> np.ndarray:
    mask = np.asarray(mask)
    if mask.ndim != 3:
        raise ValueError(f"mask must be (depth, height, width), got shape {mask.shape}; give one scan at a time.")
    if not 1 <= num_organs <= 64:
        raise ValueError(f"num_organs must be within 1..64, got {num_organs}.")
    if mask.dtype.kind not in "iu":
        raise ValueError(f"mask must hold whole numbers, got {mask.dtype}; convert it to uint8.")
    if mask.max() > num_organs or (mask.dtype.kind == "i" and mask.min() < 0):
        raise ValueError(
            f"mask has labels {int(mask.min())}..{int(mask.max())}; with {num_organs} organs they end at {num_organs}. "
            "Map the segmentation's classes to organs with organ_label_table first."
        )
    return mask
