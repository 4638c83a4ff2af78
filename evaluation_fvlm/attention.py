"""Where an organ's query looks: the weights by which an organ's tokens are pooled, as a map over the scan.

An organ's embedding is a weighted sum over its own tokens of all feature levels (modeling_fvlm/pooling.py); its map is
these weights, nothing that is fitted or smoothed afterwards:

(1) an organ is shown in the window in which it is scored (windows.py): the weights are those behind its score;
(2) mean over the heads, sum over the levels: one weight for each patch. They sum to 1, and are 0 where a patch holds no
    voxel of the organ;
(3) on a grid of voxels a patch's weight is divided evenly among the voxels whose centres lie in it, so the sum stays 1;
(4) the grid is that of the prepared scan, or that of the file which the scan was read from, in its own orientation.

A map tells what was taken into the embedding, not why a score came out as it did: within the tower a token has seen
all others.

One scan from its files:
    python -m evaluation_fvlm attention --model runs/demo/model --volume scan.nii.gz --mask mask.nii.gz \\
        --organs liver kidney --out out/attention

Written to --out, for each organ: attention_ORGAN.nii.gz (float32, sums to 1, on the grid of the source), and
attention_ORGAN.png (three planes through the heaviest patch). attention.json holds the figures. Research only, not for
diagnosis.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel

from evaluation_fvlm.embedding import inference
from evaluation_fvlm.errors import EvaluationError
from evaluation_fvlm.json_files import write_json
from evaluation_fvlm.loading import load_model
from evaluation_fvlm.places import place_name, weights_digest
from evaluation_fvlm.windows import Window, WindowRule, organ_boxes, organ_windows
from modeling_fvlm.geometry import BadVolumeError, Turn, crop_start, nearest_cells, organ_token_mask, turn_to_lps
from modeling_fvlm.image_files import file_kind
from modeling_fvlm.organs import NUMBERINGS, nearest_name
from modeling_fvlm.preparation import PreparedScan, padding_hu
from modeling_fvlm.published_preparation import as_stored
from modeling_fvlm.reading import Volume, read_affine, read_nifti, read_volume

REVERSED = Turn((2, 1, 0), (False, False, False))  # stored (x, y, z) to (depth, height, width) and nothing else
OUTSIDE = -1  # in place of a patch: the voxel lies in none


@dataclass(frozen=True)
class AttentionMap:
    """The weights of one organ's patches in its window.

    Attributes:
        organ: Its name.
        weights: `(grid depth, grid height, grid width)` float64, sums to 1.
        is_organ: The patches that hold a voxel of the organ, of the same shape; the others have weight 0.
        level_shares: Part of the weight that fell to each feature level, in the model's order.
        window: What the network was shown of the prepared scan.
        patch_size: Patch edges in voxels.
        shape: Of the prepared scan.
    """

    organ: str
    weights: np.ndarray
    is_organ: np.ndarray
    level_shares: np.ndarray
    window: Window
    patch_size: tuple[int, int, int]
    shape: tuple[int, int, int]

    @property
    def effective_patches(self) -> float:
        """Patches that a uniform map of this entropy would have: 1 if all weight lies on one, at most `is_organ`'s."""
        weights = self.weights[self.weights > 0]
        return float(np.exp(-(weights * np.log(weights)).sum()))

    def patch_of_voxel(self) -> list[np.ndarray]:
        """For each axis and each voxel of the prepared scan the place of its patch, `OUTSIDE` beyond the window."""
        places = []
        for axis, (start, stop) in enumerate(self.window.crop):
            length = stop - start
            padding = 0 if self.window.padded_behind else -crop_start((length,), (self.window.size[axis],))[0]
            along = np.full(self.shape[axis], OUTSIDE)
            along[start:stop] = (np.arange(length) + padding) // self.patch_size[axis]
            places.append(along)
        return places

    def on_scan(self) -> np.ndarray:
        """The map on the prepared scan, `(depth, height, width)` float32; sums to 1."""
        return spread(self.weights, self.patch_of_voxel())

    def peak_voxel(self, is_organ: np.ndarray) -> tuple[int, int, int]:
        """The voxel of the prepared scan in the middle of what the heaviest patch holds of the organ.

        Args:
            is_organ: The organ's voxels of the prepared scan.
        """
        heaviest = np.unravel_index(self.weights.argmax(), self.weights.shape)
        inside = [np.flatnonzero(along == place) for along, place in zip(self.patch_of_voxel(), heaviest)]
        voxels = np.argwhere(is_organ[np.ix_(*inside)])
        middle = voxels[np.square(voxels - voxels.mean(0)).sum(1).argmin()]
        return tuple(int(along[place]) for along, place in zip(inside, middle))


def spread(weights: np.ndarray, patch_of_voxel: Sequence[np.ndarray]) -> np.ndarray:
    """Divide every patch's weight evenly among the voxels that lie in it.

    A patch that holds no voxel's centre, on a grid coarser than the patches, gives its weight to the nearest voxel.

    Args:
        weights: `(grid depth, grid height, grid width)`.
        patch_of_voxel: For each axis the place of every voxel's patch, rising, `OUTSIDE` for voxels in none.

    Returns:
        float32, as many voxels along each axis as `patch_of_voxel` tells; the same sum.
    """
    spread_weights = np.asarray(weights, dtype=np.float32)
    for axis, places in enumerate(patch_of_voxel):
        num_patches = weights.shape[axis]
        is_inside = places != OUTSIDE
        shares = (places[:, None] == np.arange(num_patches)).astype(np.float32)  # (voxels, patches)
        counts = shares.sum(0)
        for place in np.flatnonzero(counts == 0):
            voxels = np.flatnonzero(is_inside)
            nearest = min(np.searchsorted(places[voxels], place), len(voxels) - 1)
            shares[voxels[nearest], place] = 1
        shares /= np.maximum(counts, 1)
        spread_weights = np.moveaxis(np.tensordot(shares, spread_weights, (1, axis)), 0, axis)
    return np.ascontiguousarray(spread_weights)


def attention_maps(
    model: PreTrainedModel,
    volume: np.ndarray,
    mask: np.ndarray,
    organs: Sequence[str] | None = None,
    rule: WindowRule | None = None,
    embedded: Sequence[str] | None = None,
) -> dict[str, AttentionMap]:
    """Maps of a prepared scan.

    Args:
        model: An `FVLMModel`; its mode is restored.
        volume: int16 HU `(depth, height, width)`, from `prepare` or a processed split.
        mask: Organ labels on the same grid.
        organs: Those to look at, by default all; absent ones are passed over.
        rule: How windows are made, as in `embed_split`.
        embedded: The organs that were embedded together, by default those to look at. Shared windows hang on them.

    Returns:
        A map for each organ that the mask holds, in the model's order of organs.

    Raises:
        EvaluationError: If the model lacks an organ, or the attention is not finite.
    """
    config = model.config
    num_organs, patch_size = len(config.organs), tuple(config.vision_config.patch_size)
    for organ in organs or ():
        if organ not in config.organs:
            raise EvaluationError(
                f"organ '{organ}' is not in config.organs {list(config.organs)}{nearest_name(organ, config.organs)}."
            )
    rule = rule or WindowRule(tuple(config.vision_config.volume_size), patch_size)
    asked = set(organs or config.organs)
    laid_out = asked | set(embedded or ())
    boxes = [box if name in laid_out else None for name, box in zip(config.organs, organ_boxes(mask, num_organs))]
    outside = padding_hu(config.windows, rule.published or config.preprocessing == "published")
    maps: dict[str, AttentionMap] = {}
    for window, organ_indices in organ_windows(boxes, mask.shape, rule).items():  # (1)
        if not any(config.organs[index] in asked for index in organ_indices):
            continue
        token_mask = organ_token_mask(window.take(mask, 0), num_organs, patch_size)
        if config.vision_config.token_selection == "all":
            token_mask[np.setdiff1d(np.arange(num_organs), organ_indices)] = False  # seen all the same
        shown = torch.from_numpy(token_mask)[None].to(model.device)
        with inference(model):
            attentions = model.get_organ_features(
                volume=torch.from_numpy(window.take(volume, outside))[None].to(model.device),
                organ_token_mask=shown,
                organ_is_complete=shown.any(-1),
                output_attentions=True,
            ).attentions[0]
        grid = tuple(edge // patch for edge, patch in zip(window.size, patch_size))
        for index in (index for index in organ_indices if config.organs[index] in asked):
            # (2) of (heads, levels * patches)
            by_level = attentions[index].double().mean(0).view(-1, *grid).cpu().numpy()
            if not np.isfinite(by_level).all():
                raise EvaluationError(
                    f"the attention of {config.organs[index]} is not finite. The weights may be those of a run that "
                    "diverged."
                )
            by_level = by_level / by_level.sum()  # of the 1 that the model rounds to
            maps[config.organs[index]] = AttentionMap(
                organ=config.organs[index],
                weights=by_level.sum(0),
                is_organ=token_mask[index].reshape(grid),
                level_shares=by_level.sum((1, 2, 3)),
                window=window,
                patch_size=patch_size,
                shape=tuple(mask.shape),
            )
    return {organ: maps[organ] for organ in config.organs if organ in maps}


# The grid of the source


@dataclass(frozen=True)
class SourceGrid:
    """The voxels of a file, in the order in which the scan was read and in the stored one.

    Attributes:
        shape, spacing: Along (depth, height, width) as read.
        turn: From the stored axes to these.
        affine: Stored indices to mm in RAS+.
        affine_as_read: (depth, height, width) indices to mm in RAS+.
    """

    shape: tuple[int, int, int]
    spacing: tuple[float, float, float]
    turn: Turn
    affine: np.ndarray
    affine_as_read: np.ndarray

    def stored(self, array: np.ndarray) -> np.ndarray:
        """Bring an array of `shape` into the file's own orientation."""
        flipped = np.flip(array, [axis for axis in range(3) if self.turn.is_flipped[axis]])
        return flipped.transpose(np.argsort(self.turn.order))

    def voxels_in(self, scan: PreparedScan) -> list[np.ndarray]:
        """For each axis and each voxel of the source the voxel of the prepared scan that holds its centre.

        `OUTSIDE` where the scan was cut off.
        """
        places = []
        for axis, part in enumerate(scan.box):
            resampled, first = self._placed(scan, axis)
            cell = nearest_cells(resampled, self.shape[axis])
            is_inside = (cell >= part.start) & (cell < part.stop)
            places.append(np.where(is_inside, cell - first, OUTSIDE))
        return places

    def _placed(self, scan: PreparedScan, axis: int) -> tuple[int, int]:
        """Voxels of the whole source on the prepared spacing, and which of them is the prepared scan's first."""
        part = scan.box[axis]
        # What the published preparation pads is no part of its box.
        padding = -crop_start((part.stop - part.start,), (scan.mask.shape[axis],))[0]
        return round(self.shape[axis] * self.spacing[axis] / scan.spacing[axis]), part.start - padding

    def patch_of_voxel(self, scan: PreparedScan, organ_map: AttentionMap) -> list[np.ndarray]:
        """For each axis and each voxel of the source the place of its patch, `OUTSIDE` where it has none."""
        return [
            np.where(voxels == OUTSIDE, OUTSIDE, patches[voxels])
            for voxels, patches in zip(self.voxels_in(scan), organ_map.patch_of_voxel())
        ]

    def position_mm(self, scan: PreparedScan, voxel: Sequence[int]) -> list[float]:
        """Where the centre of a voxel of the prepared scan lies, mm in RAS+."""
        index = []
        for axis, at in enumerate(voxel):
            resampled, first = self._placed(scan, axis)
            index.append((at + first + 0.5) * self.shape[axis] / resampled - 0.5)
        return (self.affine_as_read @ [*index, 1])[:3].tolist()


def source_grid(path: str | Path, volume: Volume, is_published: bool = False) -> SourceGrid:
    """The grid of a file that was read as `volume`.

    DICOM slices have no stored order; theirs is made up of straight axes to the left, the back and the head.
    """
    if file_kind(path) == "dicom":
        turn, affine = REVERSED, volume.affine[:, [2, 1, 0, 3]]
    else:
        affine = np.asarray(read_affine(path), dtype=np.float64)
        turn = REVERSED if is_published else turn_to_lps((1, 1, 1), affine)[0]
    return SourceGrid(tuple(volume.array.shape), tuple(volume.spacing), turn, affine, volume.affine)


def write_nifti(array: np.ndarray, grid: SourceGrid, path: Path) -> None:
    """Write an array on the source's grid, `(depth, height, width)` as read, as NIfTI in the source's orientation."""
    import nibabel

    image = nibabel.Nifti1Image(np.asfortranarray(grid.stored(array)), grid.affine)
    image.set_qform(grid.affine, code=1)
    image.set_sform(grid.affine, code=1)
    image.header.set_xyzt_units("mm")
    nibabel.save(image, path)


# The command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="Folder or Hub id of a saved model with its processor.")
    parser.add_argument("--volume", required=True, type=Path, help="CT: NIfTI, NRRD, MetaImage or a DICOM series.")
    parser.add_argument("--mask", required=True, type=Path, help="Its segmentation, one label map.")
    parser.add_argument(
        "--numbering",
        choices=sorted(NUMBERINGS),
        default="totalsegmentator_v2",
        help="What the labels of --mask mean (default: %(default)s).",
    )
    parser.add_argument("--organs", nargs="+", metavar="ORGAN", help="Default: all that the mask holds.")
    parser.add_argument("--out", required=True, type=Path, help="Folder to write; made if missing.")
    parser.add_argument("--device", default="cpu", help="Default: %(default)s.")


def read_source(path: Path, is_published: bool) -> tuple[Volume, SourceGrid]:
    """A CT file as the model's preparation reads it, and its grid."""
    if is_published:
        volume = as_stored(partial(read_nifti, rescale_mode="apply"), path, read_affine(path))
    else:
        volume = read_volume(path)
    return volume, source_grid(path, volume, is_published)


def run(args: argparse.Namespace) -> int:
    """Maps of one scan; raises EvaluationError where the arguments cannot be met."""
    from evaluation_fvlm.overlays import overlay_png

    model, processor = load_model(args.model, device=args.device)
    is_published = model.config.preprocessing == "published"
    try:
        volume, grid = read_source(args.volume, is_published)
        scan = processor.image_processor.prepare(
            args.volume if is_published else volume, args.mask, numbering=args.numbering
        )
    except (BadVolumeError, OSError) as error:
        raise EvaluationError(str(error)) from error
    maps = attention_maps(model, scan.volume, scan.mask, args.organs)
    absent = [organ for organ in args.organs or () if organ not in maps]
    if absent:
        raise EvaluationError(f"{args.mask}: the mask holds no voxel of {absent}; it holds {held_organs(model, scan)}.")
    args.out.mkdir(parents=True, exist_ok=True)
    figures = {}
    for organ, organ_map in maps.items():
        stem = f"attention_{re.sub(r'[^A-Za-z0-9_-]', '_', organ)}"
        write_nifti(spread(organ_map.weights, grid.patch_of_voxel(scan, organ_map)), grid, args.out / f"{stem}.nii.gz")
        is_organ = scan.mask == list(model.config.organs).index(organ) + 1
        peak = organ_map.peak_voxel(is_organ)
        picture = overlay_png(scan.volume, organ_map.on_scan(), is_organ, scan.spacing, peak, title=organ)
        (args.out / f"{stem}.png").write_bytes(picture)
        figures[organ] = {
            "file": f"{stem}.nii.gz",
            "peak_mm_ras": [round(position, 2) for position in grid.position_mm(scan, peak)],
            "peak_weight": float(organ_map.weights.max()),
            "patches": int(organ_map.is_organ.sum()),
            "effective_patches": organ_map.effective_patches,
            "level_shares": organ_map.level_shares.tolist(),
        }
        print(
            f"{organ}: {organ_map.effective_patches:.1f} of {figures[organ]['patches']} patches in effect, the "
            f"heaviest with {organ_map.weights.max():.1%} of the weight"
        )
    content = {"model": place_name(args.model), "weights": weights_digest(args.model)}
    content |= {"volume": args.volume.name, "mask": args.mask.name, "organs": figures}
    write_json(content, args.out / "attention.json")
    return 0


def held_organs(model: PreTrainedModel, scan: PreparedScan) -> list[str]:
    """The organs that a prepared scan holds."""
    return [model.config.organs[index - 1] for index in np.unique(scan.mask).tolist() if index]
