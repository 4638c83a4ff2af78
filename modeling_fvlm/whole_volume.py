"""A scan without a mask: all its patches, pooled by the query of every organ.

Where nothing tells which patches an organ owns, each query attends over the whole scan and has to find its organ by
itself. It was trained on its organ's patches alone, so this is a makeshift, and who answers from it says so. What is
lost, `python -m benchmarks.without_mask` measures: nearly everything, of a tower that reads organs' patches alone.

(1) The scan, on the model's spacing and uncut, is covered by tiles of the size trained on, all on one grid of patches.
    Along an axis on which it is shorter it stands in the middle of the tile; where it is longer tiles overlap.
(2) Every patch that holds a voxel of the scan is kept once, from the tile whose middle is nearest.
(3) Each tile goes through the tower; the kept patches of all tiles are pooled together, level by level.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Tile:
    """One tile: its first voxel in the scan (negative where padding lies before), and which of its patches are kept.

    `token_mask` is bool `(tokens,)`, width fastest.
    """

    start: tuple[int, int, int]
    token_mask: np.ndarray


def cover_with_tiles(shape: Sequence[int], size: Sequence[int], patch_size: Sequence[int]) -> list[Tile]:
    """(1), (2) Tiles that cover a scan.

    Args:
        shape: Voxels of the scan along (depth, height, width).
        size: Voxels of a tile; every edge is a multiple of its patch.
        patch_size: Edges of a patch.
    """
    along = [_tiles_along(*edges) for edges in zip(shape, size, patch_size)]
    return [
        Tile(
            tuple(start for start, _ in parts),
            (parts[0][1][:, None, None] & parts[1][1][:, None] & parts[2][1]).ravel(),
        )
        for parts in product(*along)
    ]


def _tiles_along(extent: int, edge: int, patch: int) -> list[tuple[int, np.ndarray]]:
    """First voxel of every tile along one axis, and which of its patches are kept: bool `(edge // patch,)`."""
    if extent <= edge:
        start = -((edge - extent) // 2)
        first = start + patch * np.arange(edge // patch)
        return [(start, (first + patch > 0) & (first < extent))]
    num_patches = -(-extent // patch)
    start, tile_patches = -((num_patches * patch - extent) // 2), edge // patch
    num_tiles = -(-num_patches // tile_patches)
    firsts = np.rint(np.linspace(0, num_patches - tile_patches, num_tiles)).astype(int)
    # Of equal tiles that cover a patch, the one whose middle is nearest holds it too.
    distance = np.abs(np.arange(num_patches) - (firsts[:, None] + (tile_patches - 1) / 2))
    owner = distance.argmin(axis=0)
    return [
        (start + patch * int(first), owner[first : first + tile_patches] == number)
        for number, first in enumerate(firsts)
    ]


def embed_whole_volume(model, tiles: Tensor, token_masks: Tensor, batch_size: int = 1) -> Tensor:
    """(3) Embed a scan by every organ's query over all its patches.

    Args:
        model: An `FVLMModel`.
        tiles: HU `(tiles, depth, height, width)`; the model applies its windows.
        token_masks: `(tiles, tokens)` bool, the patches that are kept.
        batch_size: Tiles per forward.

    Returns:
        `(organs, projection_dim)`, unit length.
    """
    parts = []
    for start in range(0, len(tiles), batch_size):
        token_mask = token_masks[start : start + batch_size]
        output = model.vision_model(
            tiles[start : start + batch_size, None], organ_token_mask=token_mask[:, None], windows=model.config.windows
        )
        is_kept = token_mask
        if output.token_index is not None:  # the tower has read these patches alone
            is_kept = token_mask.gather(1, output.token_index)
            if output.token_is_real is not None:
                is_kept = is_kept & output.token_is_real
        parts.append([level[is_kept] for level in output.feature_levels])  # each (kept tokens, hidden)
    levels = tuple(torch.cat(level)[None] for level in zip(*parts))
    everything = torch.ones(1, len(model.config.organs), levels[0].shape[1], dtype=torch.bool, device=levels[0].device)
    pooled, _ = model.organ_pooling(levels, everything)
    return F.normalize(model.organ_projection(pooled).float(), dim=-1)[0]
