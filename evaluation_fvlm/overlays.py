"""Attention over a CT as a picture: three planes through one voxel, the organ's outline, and the map as heat.

Orientation on the page is the radiologist's: head up, the patient's left on the viewer's right; on the sagittal plane
the patient looks to the left. Patches are drawn as they are, unsmoothed: their edges are the resolution of the map.
"""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np

PLANES = ("axial", "coronal", "sagittal")
SOFT_TISSUE, LUNG, BONE = (-160, 240), (-1350, 150), (-200, 1000)  # display windows, HU; the model's are in its config
ORGAN_COLOR, LESION_COLOR = "#00e6ff", "#33ff33"
HEAT_OPACITY = 0.7
WIDTH_INCHES, TALLEST_INCHES, DPI = 8.6, 4.2, 100  # of the three planes together
MARGIN_MM = 50  # around the organ


def display_window(volume: np.ndarray, is_organ: np.ndarray) -> tuple[int, int]:
    """HU to show black and white, by what the organ is made of."""
    median = float(np.median(volume[is_organ])) if is_organ.any() else 0.0
    return LUNG if median < -400 else BONE if median > 150 else SOFT_TISSUE


def plane_of(array: np.ndarray, plane: str, at: Sequence[int]) -> np.ndarray:
    """The plane through voxel `at`, rows from top to bottom and columns from left to right as on the page.

    From `(depth, height, width)` LPS: width grows to the patient's left and height to the back, as they are drawn;
    depth grows to the head and is turned to have it up.
    """
    depth, height, width = at
    if plane == "axial":
        return array[depth]
    return array[::-1, height] if plane == "coronal" else array[::-1, :, width]


def outline(region: np.ndarray) -> np.ndarray:
    """The edges between the pixels of a region and those beside it.

    Args:
        region: `(rows, columns)` bool.

    Returns:
        `(edges, 2, 2)`: both ends of each as (column, row), in pixels whose centres are whole numbers.
    """
    around = np.pad(region, 1)
    beside = np.argwhere(around[1:-1, 1:] != around[1:-1, :-1])  # (row, column) of the pixel right of an edge
    above = np.argwhere(around[1:, 1:-1] != around[:-1, 1:-1])  # of the pixel below an edge
    ends = [
        np.stack([beside[:, ::-1] + (-0.5, -0.5), beside[:, ::-1] + (-0.5, 0.5)], axis=1),
        np.stack([above[:, ::-1] + (-0.5, -0.5), above[:, ::-1] + (0.5, -0.5)], axis=1),
    ]
    return np.concatenate(ends)


def region_around(is_organ: np.ndarray, spacing: Sequence[float], at: Sequence[int]) -> tuple[slice, ...]:
    """The box of an organ and of voxel `at`, wider by `MARGIN_MM` on every side; all where there is no organ."""
    if not is_organ.any():
        return tuple(slice(0, size) for size in is_organ.shape)
    box = []
    for axis, (size, edge, middle) in enumerate(zip(is_organ.shape, spacing, at)):
        places = np.flatnonzero(is_organ.any(axis=tuple({0, 1, 2} - {axis})))
        margin = round(MARGIN_MM / edge)
        first, last = min(places[0], middle), max(places[-1], middle)
        box.append(slice(max(0, int(first) - margin), min(size, int(last) + 1 + margin)))
    return tuple(box)


def overlay_png(
    volume: np.ndarray,
    heat: np.ndarray,
    is_organ: np.ndarray,
    spacing: Sequence[float],
    at: Sequence[int],
    *,
    is_lesion: np.ndarray | None = None,
    hu_window: tuple[float, float] | None = None,
    title: str = "",
) -> bytes:
    """Draw three planes, cut to the organ and what is around it.

    Args:
        volume: HU `(depth, height, width)` LPS.
        heat: The map on the same grid; its largest value is drawn hottest, 0 not at all.
        is_organ: Voxels to outline, likewise.
        spacing: mm along (depth, height, width).
        at: The voxel that all three planes pass through.
        is_lesion: A second outline.
        hu_window: HU to show black and white; None: by the organ.
        title: Stands above.

    Returns:
        A PNG of at most 256 colours; the same arguments give the same bytes.
    """
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.collections import LineCollection
    from matplotlib.figure import Figure  # not pyplot: it would keep the figure, and ask for a display
    from PIL import Image

    low, high = hu_window or display_window(volume, is_organ)
    region = region_around(is_organ, spacing, at)
    at = [place - part.start for place, part in zip(at, region)]
    volume, heat, is_organ = volume[region], heat[region], is_organ[region]
    is_lesion = None if is_lesion is None else is_lesion[region]
    size_mm = np.array(volume.shape) * np.asarray(spacing)
    widths = (size_mm[2], size_mm[2], size_mm[1])
    tallest = max(size_mm[1], size_mm[0])
    scale = min(WIDTH_INCHES / sum(widths), TALLEST_INCHES / tallest)
    # At least as wide as a title, should the planes be narrow.
    figure = Figure(figsize=(max(sum(widths) * scale + 0.2, 5.0), tallest * scale + 0.5), dpi=DPI)
    canvas = FigureCanvasAgg(figure)
    grid = figure.add_gridspec(1, 3, width_ratios=widths)
    hottest = float(heat.max()) or 1.0
    for column, plane in enumerate(PLANES):
        axes = figure.add_subplot(grid[0, column])
        row_mm, column_mm = {"axial": spacing[1:], "coronal": (spacing[0], spacing[2])}.get(plane, spacing[:2])
        shown = {"aspect": row_mm / column_mm, "interpolation": "nearest"}
        axes.imshow(plane_of(volume, plane, at), cmap="gray", vmin=low, vmax=high, **shown)
        share = plane_of(heat, plane, at) / hottest
        layer = colormaps["inferno"](0.25 + 0.75 * share)  # its black would look like air
        layer[..., 3] = HEAT_OPACITY * np.sqrt(share)  # so that a patch of a tenth of the maximum still shows
        axes.imshow(layer, **shown)
        for region, color in ((is_organ, ORGAN_COLOR), (is_lesion, LESION_COLOR)):
            if region is not None:
                axes.add_collection(LineCollection(outline(plane_of(region, plane, at)), colors=color, linewidths=1.2))
        axes.set_title(f"{plane}   {'front | back' if plane == 'sagittal' else 'R | L'}", fontsize=8)
        axes.set_axis_off()
    if title:
        figure.suptitle(title.replace("$", r"\$"), fontsize=9)  # a `$` would start a formula
    figure.subplots_adjust(left=0.02, right=0.97, bottom=0.01, top=1 - 0.45 / figure.get_figheight(), wspace=0.03)
    canvas.draw()
    picture = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
    buffer = io.BytesIO()
    # The usual median cut gives nearly all its colours to the greys, and is slow where there are many.
    picture.quantize(256, Image.Quantize.FASTOCTREE).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()
