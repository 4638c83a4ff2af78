"""Pictures of cases in a processed split: three planes, organs over the CT, captions beside it.

Drawn from the written shards, not from what was about to be written: what the picture shows is what training reads.
Orientation on the page is the radiologist's: head up, the patient's left on the viewer's right; on the sagittal plane
the patient looks to the left. A picture that does not show it so tells of a wrong axis, sign or numbering.
"""

import os
import re
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from modeling_fvlm.processed_split import decode_volume

PLANES = ("axial", "coronal", "sagittal")
SOFT_TISSUE, LUNG, WIDE = (-160, 240), (-1350, 150), (-1000, 500)  # display windows, HU; the model's are in its config
NUM_ORGAN_ROWS = 3  # organs drawn by themselves under the overview
# A colour of its own for each organ of body_36, whatever set it stands in: 36 colours as far apart as they can be on
# grey (farthest points in OKLab, hue and chroma 1.6 times as heavy as lightness, chroma at least 0.11), dealt out so
# that organs within 8 mm of one another, then any two of body_24, are least alike. By custom the aorta is red, the vena
# cava blue.
COLORS = {
    "face": "#ff69d2", "brain": "#966900", "esophagus": "#b40fa5", "trachea": "#2d4bc3", "lung": "#ffb4ff",
    "heart": "#f0e100", "kidney": "#ff872d", "stomach": "#0096ff", "liver": "#006900", "gallbladder": "#8778ff",
    "pancreas": "#b4f0a5", "spleen": "#a500ff", "colon": "#00ff00", "aorta": "#ff2d00", "rib": "#ff0078",
    "humerus": "#b4a500", "scapula": "#4bd2ff", "clavicula": "#783c78", "femur": "#4bc378", "hip": "#0078a5",
    "sacrum": "#a50000", "gluteus": "#ff96a5", "iliopsoas": "#f000ff", "autochthon": "#6900c3",
    "adrenal_gland": "#00ff96", "duodenum": "#a5005a", "iliac_artery": "#4b9600", "iliac_vein": "#ffc378",
    "inferior_vena_cava": "#0000ff", "portal_and_splenic_vein": "#c36978", "pulmonary_artery": "#00a5a5",
    "small_bowel": "#00ffe1", "urinary_bladder": "#b469c3", "cervical_vertebrae": "#5a2dff",
    "thoracic_vertebrae": "#96d200", "lumbar_vertebrae": "#b4a5ff",
}  # fmt: skip


def shard_rows(folder: Path, split: str) -> Iterator[dict]:
    """The rows of a split in their order, one in memory at a time."""
    for path in sorted((folder / "volumes").glob(f"{split}-*.parquet")):
        with pq.ParquetFile(path) as file:
            for index in range(file.num_row_groups):
                yield from file.read_row_group(index).to_pylist()


def write_previews(folder: Path, split: str, num_cases: int, out: Path) -> list[Path]:
    """Draw the first cases of a split; pictures that are there already stay as they are."""
    if num_cases < 1:
        return []
    return [draw_missing(row, split, index, out) for index, row in zip(range(num_cases), shard_rows(folder, split))]


def draw_missing(row: dict, split: str, index: int, out: Path) -> Path:
    """Draw the row at that place of the split into the folder `out`, unless its picture is there; returns the file."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / picture_name(split, index, row["recon_id"])
    if not path.is_file():
        draw_case(row, path)
    return path


def picture_name(split: str, index: int, recon_id: str) -> str:
    """File name of the picture of the row at that place of the split."""
    # The place in front: two ids that differ in a forbidden character alone would share a file.
    return f"{split}-{index:03d}-{re.sub(r'[^A-Za-z0-9._-]', '_', recon_id)}.png"


def draw_case(row: dict, path: Path) -> None:
    """One picture: an overview with all organs, then the organs that the report has most to say of."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure  # not pyplot: it would keep the figure, and ask for a display

    volume, mask = decode_volume(row)
    organs = [caption["organ"] for caption in row["captions"]]
    present = [index for index, count in enumerate(np.bincount(mask.ravel(), minlength=len(organs) + 1)[1:]) if count]
    shown = organs_to_show(row["captions"], present, mask)
    colors = organ_colors(organs)

    size_mm = np.array(volume.shape) * np.array(row["spacing"])  # depth, height, width
    widths = [size_mm[2], size_mm[2], size_mm[1]]
    heights = max(size_mm[1], size_mm[0])
    scale = 3.2 / max(max(widths), heights)
    num_rows = 1 + len(shown)
    text_width = 4.2
    figure = Figure(figsize=(sum(widths) * scale + text_width + 0.6, num_rows * (heights * scale + 0.3) + 0.5))
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(num_rows, 4, width_ratios=[*(width * scale for width in widths), text_width])
    center = [int(np.median(positions)) for positions in np.nonzero(mask)]
    for line, organ_index in enumerate([None, *shown]):
        if organ_index is None:
            labels, at, window, heading = mask, center, WIDE, overview_text(row)
        else:
            labels = np.where(mask == organ_index + 1, mask, 0)
            at = fullest_voxel(labels)
            is_air = np.median(volume[labels > 0]) < -400
            window, heading = (LUNG if is_air else SOFT_TISSUE), caption_text(row["captions"][organ_index])
        for column, plane in enumerate(PLANES):
            axes = figure.add_subplot(grid[line, column])
            draw_plane(axes, volume, labels, row["spacing"], plane, at, window, colors)
            if line == 0:
                axes.set_title(f"{plane}   R | L" if plane != "sagittal" else f"{plane}   front | back", fontsize=9)
        axes = figure.add_subplot(grid[line, 3])
        axes.set_axis_off()
        axes.text(0, 1, heading, va="top", fontsize=8, transform=axes.transAxes)
        if organ_index is None:
            draw_legend(axes, organs, present, colors)
    top = 1 - 0.6 / figure.get_figheight()
    figure.text(0.01, 1 - 0.1 / figure.get_figheight(), row["recon_id"], va="top", fontsize=10)
    figure.subplots_adjust(left=0.01, right=0.99, bottom=0.01, top=top, wspace=0.03, hspace=0.06)
    # No date and no version in the file: the same split gives the same picture.
    # Under another name first: a build that is killed here must not leave half a picture that the next one keeps.
    unfinished = path.with_name(f"{path.name}.tmp")
    figure.savefig(unfinished, format="png", dpi=80, metadata={"Software": None})
    os.replace(unfinished, path)


def organs_to_show(captions: Sequence[dict], present: Sequence[int], mask: np.ndarray) -> list[int]:
    """Indices of the organs to draw by themselves: abnormal before mentioned before large."""
    voxels = np.bincount(mask.ravel(), minlength=len(captions) + 1)[1:]
    return sorted(
        present,
        key=lambda index: (-captions[index]["is_abnormal"], -captions[index]["is_mentioned"], -voxels[index]),
    )[:NUM_ORGAN_ROWS]


def fullest_voxel(labels: np.ndarray) -> list[int]:
    """Along each axis the plane that cuts most of the organ."""
    return [int(np.argmax((labels > 0).sum(axis=tuple({0, 1, 2} - {axis})))) for axis in range(3)]


def plane_of(array: np.ndarray, plane: str, at: Sequence[int]) -> np.ndarray:
    """The plane through voxel `at`, rows from top to bottom and columns from left to right as on the page.

    From `(depth, height, width)` LPS: width grows to the patient's left, which is the viewer's right, and height to the
    back, which is down on the axial plane: both as they are. Depth grows to the head, so it is turned to have it up.
    """
    depth, height, width = at
    if plane == "axial":
        return array[depth]
    if plane == "coronal":
        return array[::-1, height]
    return array[::-1, :, width]


def organ_colors(organs: Sequence[str]) -> np.ndarray:
    """A full colour per organ, `(organs, 4)`: an organ of body_36 has its own, any other the first that is left.

    Beyond as many organs as there are colours, the same come again, darker each time.
    """
    from matplotlib.colors import to_rgba

    left = [color for organ, color in COLORS.items() if organ not in organs]
    others = [organ for organ in organs if organ not in COLORS]
    names = COLORS | dict(zip(others, left))
    colors = np.array([to_rgba(names.get(organ, "#000000")) for organ in organs])
    for place, organ in enumerate(others[len(left) :]):
        turn, place = divmod(place, len(COLORS))
        rgb = to_rgba(list(COLORS.values())[place])[:3]
        colors[organs.index(organ), :3] = np.array(rgb) * 0.6 ** (turn + 1)
    return colors


def draw_plane(axes, volume, labels, spacing, plane, at, window, colors) -> None:
    """One plane: the CT in grey, organs in colour with their outline."""
    row_mm, column_mm = {
        "axial": (spacing[1], spacing[2]),
        "coronal": (spacing[0], spacing[2]),
        "sagittal": (spacing[0], spacing[1]),
    }[plane]
    picture, labelled = plane_of(volume, plane, at), plane_of(labels, plane, at)
    aspect = row_mm / column_mm
    axes.imshow(picture, cmap="gray", vmin=window[0], vmax=window[1], aspect=aspect, interpolation="nearest")
    overlay = np.zeros((*labelled.shape, 4))
    overlay[labelled > 0] = colors[labelled[labelled > 0] - 1]
    # The outline: voxels one of whose four neighbours has another label.
    around = np.pad(labelled, 1, mode="edge")
    neighbours = (around[2:, 1:-1], around[:-2, 1:-1], around[1:-1, 2:], around[1:-1, :-2])
    is_inside = np.all([neighbour == labelled for neighbour in neighbours], axis=0)
    overlay[..., 3] = np.where(labelled > 0, np.where(is_inside, 0.3, 0.9), 0)
    axes.imshow(overlay, aspect=aspect, interpolation="nearest")
    axes.set_axis_off()


def draw_legend(axes, organs: Sequence[str], present: Sequence[int], colors: np.ndarray) -> None:
    from matplotlib.patches import Patch

    patches = [Patch(color=colors[index], label=organs[index]) for index in present]
    axes.legend(handles=patches, loc="lower left", ncols=3, fontsize=6, frameon=False, borderpad=0, handlelength=1)


def overview_text(row: dict) -> str:
    spacing = " x ".join(f"{edge:.3g}" for edge in row["spacing"])
    text = row["impression"] or row["findings"]
    shape = " x ".join(map(str, row["shape"]))
    return f"{shape} voxels of {spacing} mm\n\n" + wrap(
        f"{'Impression' if row['impression'] else 'Findings'}: {text}", 420
    )


def caption_text(caption: dict) -> str:
    state = "abnormal" if caption["is_abnormal"] else "normal" if caption["is_mentioned"] else "not mentioned"
    return f"{caption['organ'].upper()} ({state})\n\n" + wrap(caption["caption"], 800)


def wrap(text: str, longest: int) -> str:
    """Lines that fit beside the planes; `$` would start a formula in matplotlib."""
    return textwrap.fill(textwrap.shorten(text, longest, placeholder=" ..."), 62).replace("$", r"\$")
