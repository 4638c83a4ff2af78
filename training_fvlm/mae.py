"""The published start of the image tower: a 2D MAE ViT inflated into the 3D ViT.

The published run starts from the ImageNet weights of MAE (He et al., CVPR 2022, https://arxiv.org/abs/2111.06377), as
alibaba-damo-academy/fvlm, commit d768ec1, does:

(1) blocks and final norm are taken as they are;
(2) position embeddings lose the class token's; the square grid that is left is resized to (height, width) of the crop's
    grid, bilinear, corners not aligned, and repeated along depth;
(3) the patch embedding stays fresh: an RGB patch of 16 x 16 says nothing of 16 x 16 x 32 voxels of HU.

The class token, the 2D patch embedding, and the mask token and decoder of pre-training are left behind.
"""

import math
import re
from collections.abc import Iterable, Mapping

from torch import Tensor
from torch.nn import functional as F

from modeling_fvlm import FVLMVisionConfig

from .checkpoint_file import CheckpointError, listed, refuse_non_finite

UNREAD = re.compile(r"cls_token|mask_token|patch_embed\.proj\.(weight|bias)|decoder_.+|head\.(weight|bias)")
POSITIONS = "pos_embed"
RENAMINGS = {".attn.proj.": ".attention.out_proj.", ".attn.qkv.": ".attention.qkv.", ".fc1.": ".linear1."}
RENAMINGS[".fc2."] = ".linear2."


def mae_left_behind(names: Iterable[str]) -> list[str]:
    """Those of a MAE checkpoint's names that the 3D ViT does not take: the known leftovers."""
    return [name for name in names if UNREAD.fullmatch(name)]


def mae_vision_fields(state_dict: Mapping[str, Tensor]) -> dict[str, int]:
    """Width, depth and MLP size of a MAE ViT, as fields of `FVLMVisionConfig`.

    Raises:
        CheckpointError: If the tensors are not those of a MAE ViT.
    """
    blocks = [int(match[1]) for name in state_dict if (match := re.match(r"blocks\.(\d+)\.", name))]
    needed = {POSITIONS: 3, "blocks.0.attn.qkv.weight": 2, "blocks.0.mlp.fc1.weight": 2, "norm.weight": 1}
    if missing := [name for name in needed if name not in state_dict]:
        raise CheckpointError(
            f"this is no MAE ViT: it has no {listed(missing)}. What it has: {len(state_dict)} tensors, "
            f"{listed(list(state_dict))}."
        )
    for name, num_axes in needed.items():
        if state_dict[name].ndim != num_axes:
            raise CheckpointError(f"{name} is {tuple(state_dict[name].shape)}; a MAE ViT has {num_axes} axes there.")
    return {
        "hidden_size": state_dict["norm.weight"].shape[0],
        "num_hidden_layers": 1 + max(blocks),
        "intermediate_size": state_dict["blocks.0.mlp.fc1.weight"].shape[0],
    }


def inflate_mae(state_dict: Mapping[str, Tensor], config: FVLMVisionConfig) -> dict[str, Tensor]:
    """Bring a MAE state dict to names and shapes of `FVLMVisionModel(config)`.

    Args:
        state_dict: Tensors under MAE's names.
        config: Of the ViT to fill; its blocks have the sizes of `mae_vision_fields`.

    Returns:
        Every tensor of the ViT but the patch embedding's `embeddings.projection.*`.

    Raises:
        CheckpointError: If a tensor is unknown or holds no finite floating-point numbers, or the position embeddings
            are no square grid and a class token.
    """
    inflated, unknown = {}, []
    if whole_numbers := [name for name, tensor in state_dict.items() if not tensor.is_floating_point()]:
        raise CheckpointError(f"{listed(whole_numbers)}: whole numbers where weights are expected.")
    refuse_non_finite(state_dict)
    for name, tensor in state_dict.items():
        if UNREAD.fullmatch(name):
            continue
        if name == POSITIONS:
            inflated["embeddings.position_embeddings"] = inflate_positions(tensor, config.position_grid)
        # Under a name of ours, beside MAE's, a tensor would overwrite the other or be overwritten.
        elif name.startswith(("blocks.", "norm.")) and not any(ours in name for ours in RENAMINGS.values()):  # (1)
            for theirs, ours in RENAMINGS.items():
                name = name.replace(theirs, ours)
            inflated[name] = tensor
        else:
            unknown.append(name)
    if unknown:
        raise CheckpointError(f"{listed(unknown)}: no parameter of a MAE ViT, and no known leftover.")
    return inflated


def inflate_positions(positions: Tensor, grid: tuple[int, int, int]) -> Tensor:
    """(2) Position embeddings `(1, 1 + side * side, hidden)` of a 2D ViT to those of a 3D grid.

    Args:
        positions: The class token's first, then row by row.
        grid: Patches along (depth, height, width).

    Returns:
        `(depth * height * width, hidden)`, width fastest, equal at every depth.
    """
    side = math.isqrt(positions.shape[1] - 1) if positions.ndim == 3 else 0
    if side == 0 or positions.shape[:2] != (1, side * side + 1):
        raise CheckpointError(
            f"{POSITIONS} is {tuple(positions.shape)}; expected (1, 1 + side * side, hidden): a class token and a "
            "square grid."
        )
    plane = positions[0, 1:].T.reshape(1, -1, side, side)
    plane = F.interpolate(plane, size=grid[1:], mode="bilinear", align_corners=False)
    return plane.flatten(2).squeeze(0).T.repeat(grid[0], 1)
