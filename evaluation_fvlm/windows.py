"""Where the network looks when an organ is asked: one window per organ, and one forward per distinct window.

An organ is seen whole, in its surroundings, in a window centred on its box. Three rules make the windows:

(1) Along each axis a window is as long as `size`, or as the organ where that is longer.
(2) A window that would leave the stored volume is moved inside; along an axis on which the volume is shorter than
    `size` it takes the whole volume. So on a scan no larger than `size` all organs have ONE window, and so has any
    group of neighbours that the border pushes together: equal windows are forwarded once, with identical numbers.
(3) What is missing to `size`, and further to whole patches where an organ is longer, is padded with air, evenly on
    both sides, as in training (a model of preprocessing "published": with hu_min, as there).

The published evaluation (Shui et al., ICLR 2025) departs in four points, which `published=True` follows: it pads to
whole patches only, so that nearly every scan has a token grid of its own; all padding comes behind the end; it is zero
after windowing, so `hu_min`, not air; and an organ's box ends one voxel early, which cuts the last layer of an organ
longer than `size`. Checked against the outputs of the authors' code (tests/test_zero_shot.py).

`shared=True` trades the centre for speed: organs that fit together into one window of `size` are seen in one, centred
on the box around them all, and as few such windows as a greedy search finds serve the scan. Every organ is still whole
in its window, but its surroundings are others, and so are the scores. An organ longer than `size` keeps its own.
"""

from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from evaluation_fvlm.errors import EvaluationError
from modeling_fvlm.geometry import crop_or_pad, crop_start, organ_window

Box = tuple[slice, slice, slice]


@dataclass(frozen=True)
class WindowRule:
    """Sizes in voxels along depth, height, width. `published`, `shared`: see above; they exclude each other."""

    size: tuple[int, int, int]
    patch_size: tuple[int, int, int]
    published: bool = False
    shared: bool = False

    def __post_init__(self) -> None:
        if self.published and self.shared:
            raise EvaluationError(
                "windows are made as published, one per organ, or shared between organs: choose one of the two."
            )
        for axis, size, patch in zip(("depth", "height", "width"), self.size, self.patch_size):
            if size < 1 or size % patch:
                raise EvaluationError(
                    f"window {axis} {size} is not a multiple of the model's patch {patch}; take {size + -size % patch}."
                )


@dataclass(frozen=True)
class Window:
    """One window of one scan, as numbers: slices cannot be keys before Python 3.12.

    `crop`: (start, stop) per axis within the stored volume; `size`: what the network sees after padding.
    """

    crop: tuple[tuple[int, int], ...]
    size: tuple[int, int, int]
    padded_behind: bool = False  # else evenly on both sides

    def take(self, array: np.ndarray, value: int | float) -> np.ndarray:
        """Cut the window out of a stored array and pad it to `size` with `value`."""
        part = array[tuple(slice(start, stop) for start, stop in self.crop)]
        # (3)
        start = (0, 0, 0) if self.padded_behind else crop_start(part.shape, self.size)
        return crop_or_pad(part, start, self.size, value)


def organ_boxes(mask: np.ndarray, num_organs: int) -> list[Box | None]:
    """The tight box of every organ of a label map, None where the organ is absent; one pass for all organs."""
    return ndimage.find_objects(mask, max_label=num_organs)


def window_of_organ(box: Box, shape: tuple[int, ...], rule: WindowRule) -> Window:
    """The window of one organ from its tight box in a stored volume of `shape`."""
    if rule.published:
        box = tuple(slice(part.start, part.stop - 1) for part in box)
    crop, size = organ_window(box, shape, rule.size, rule.patch_size)  # (1), (2)
    if rule.published:
        lengths = [part.stop - part.start for part in crop]
        size = tuple(length + -length % patch for length, patch in zip(lengths, rule.patch_size))
    return Window(tuple((part.start, part.stop) for part in crop), size, padded_behind=rule.published)


def organ_windows(boxes: list[Box | None], shape: tuple[int, ...], rule: WindowRule) -> dict[Window, list[int]]:
    """Distinct windows of a scan, each with the indices of the organs that it serves; absent organs have none."""
    windows: dict[Window, list[int]] = {}
    for organ_index, box in enumerate(boxes):
        if box is not None:
            windows.setdefault(window_of_organ(box, shape, rule), []).append(organ_index)
    if rule.shared:
        # Greedy is not always best; where it does not save a forward, every organ keeps the middle of its window.
        windows = min((windows, shared_windows(boxes, shape, rule)), key=len)
    return windows


def shared_windows(boxes: list[Box | None], shape: tuple[int, ...], rule: WindowRule) -> dict[Window, list[int]]:
    """Few windows that hold every organ whole: the one that holds most organs, then most of the rest, and so on.

    A window that holds some organs can be moved up until it starts where the first of them does: only such starts are
    tried. Between equal counts the lowest start along depth, then height, then width wins, so the result does not
    hang on chance.
    """
    lengths = np.minimum(rule.size, shape)
    windows: dict[Window, list[int]] = {}
    present = [organ_index for organ_index, box in enumerate(boxes) if box is not None]
    edges = np.array([[(part.start, part.stop) for part in boxes[n]] for n in present]).reshape(-1, 3, 2)
    fits = (edges[..., 1] - edges[..., 0] <= lengths).all(axis=1)  # (present organs,)
    for organ_index in np.array(present)[~fits].tolist():
        windows.setdefault(window_of_organ(boxes[organ_index], shape, rule), []).append(organ_index)
    left, edges = np.array(present)[fits], edges[fits]
    while len(left):
        starts = [np.unique(edges[:, axis, 0]) for axis in range(3)]
        # holds[axis][start, organ]: a window from there on holds the organ along this axis.
        holds = [
            (edges[:, axis, 0] >= start[:, None]) & (edges[:, axis, 1] <= start[:, None] + lengths[axis])
            for axis, start in enumerate(starts)
        ]
        counts = np.einsum("ao,bo,co->abc", *(held.astype(np.int64) for held in holds))
        best = np.unravel_index(counts.argmax(), counts.shape)
        served = holds[0][best[0]] & holds[1][best[1]] & holds[2][best[2]]
        low, high = edges[served, :, 0].min(axis=0).tolist(), edges[served, :, 1].max(axis=0).tolist()
        box = tuple(slice(*ends) for ends in zip(low, high))
        windows.setdefault(window_of_organ(box, shape, rule), []).extend(left[served].tolist())
        left, edges = left[~served], edges[~served]
    return windows
