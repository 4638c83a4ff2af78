"""The 3D ViT of fVLM: a crop in, its tokens after several blocks out.

From Shui et al., ICLR 2025, https://openreview.net/forum?id=nYpPAT4L3D; blocks are pre-norm as in MONAI's ViT. Steps:

(1) choose tokens: every patch, or only patches that hold an organ, packed and padded to the longest sample;
(2) cut those patches out, window them when they come as HU, and embed them (a patch convolution as one matmul);
(3) add position embeddings, interpolated when the crop is not of the trained size;
(4) run the blocks, keep the raw outputs of `feature_levels` and the normed last output. Nobody reads the last output
    but the organs: where they are known, the last block computes their tokens alone, from keys and values of all.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import ModelOutput

from .configuration_fvlm import FVLMVisionConfig
from .dropout import Dropout, attention_with_dropout, runs_here

# Above this share of tokens in organs, picking them out costs as much as it saves.
MOST_ASKED = 0.9


@dataclass
class FVLMVisionOutput(ModelOutput):
    """Tokens of the vision tower.

    Attributes:
        feature_levels: For every entry of `config.feature_levels` its block's raw output, then the normed last
            output; each `(batch, tokens, hidden_size)`. Where the organs' tokens were given, the last one may be zero
            at tokens that hold none.
        token_index: `(batch, tokens)` int64, the patch (width fastest) behind each token; None: every patch in order.
        token_is_real: `(batch, tokens)` bool, False where a sample is padded to the longest; None: no padding.
        hidden_states: With `output_hidden_states`: embeddings, then every block's output, the last one normed.
    """

    feature_levels: tuple[Tensor, ...] | None = None
    token_index: Tensor | None = None
    token_is_real: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None


def token_grid(volume_shape: tuple[int, ...] | torch.Size, patch_size: tuple[int, ...] | list[int]) -> tuple[int, ...]:
    """Patches along (depth, height, width).

    Raises:
        ValueError: If an edge is no multiple of its patch edge.
    """
    for axis, size, patch in zip(("depth", "height", "width"), volume_shape, patch_size):
        if size % patch or size == 0:
            raise ValueError(
                f"{axis} {size} is no positive multiple of patch {patch}; pad it to {max(size + -size % patch, patch)}."
            )
    return tuple(size // patch for size, patch in zip(volume_shape, patch_size))


def all_patches(volume: Tensor, patch_size: tuple[int, ...] | list[int]) -> Tensor:
    """Cut a volume into all its patches.

    Args:
        volume: `(batch, channels, depth, height, width)`.
        patch_size: Patch edges in voxels.

    Returns:
        `(batch * tokens, channels, voxels of a patch)`, tokens and voxels width fastest.
    """
    grid = token_grid(volume.shape[2:], patch_size)
    batch, channels = volume.shape[:2]
    blocks = volume.reshape(batch, channels, grid[0], patch_size[0], grid[1], patch_size[1], grid[2], patch_size[2])
    # to (batch, grid depth, grid height, grid width, channels, patch depth, patch height, patch width)
    return blocks.permute(0, 2, 4, 6, 1, 3, 5, 7).reshape(batch * grid[0] * grid[1] * grid[2], channels, -1)


def chosen_patches(volume: Tensor, patch_size: tuple[int, ...] | list[int], token_index: Tensor) -> Tensor:
    """Cut only some patches out of a volume: what `all_patches` gives at those tokens.

    Rows of `patch width` voxels lie together in memory; gathering them one by one is 6 times faster than indexing
    patches (0.7 against 4.6 ms for 8 crops of 48 x 96 x 128), and the rest of the volume is never touched.

    Args:
        volume: `(batch, channels, depth, height, width)`.
        patch_size: Patch edges in voxels.
        token_index: `(batch, tokens)` int64, patches to cut out.

    Returns:
        `(batch * tokens, channels, voxels of a patch)`.
    """
    grid = token_grid(volume.shape[2:], patch_size)
    batch, channels, depth, height, _ = volume.shape
    device = token_index.device
    depth_index = token_index // (grid[1] * grid[2])
    height_index = token_index // grid[2] % grid[1]
    width_index = token_index % grid[2]
    sample_index = torch.arange(batch, device=device)[:, None]
    first_row = (sample_index * channels * depth + depth_index * patch_size[0]) * height + height_index * patch_size[1]
    first_row = first_row * grid[2] + width_index  # (batch, tokens): a patch's first row, in its first channel
    row_of_channel = torch.arange(channels, device=device)[:, None, None] * depth * height * grid[2]
    row_of_depth = torch.arange(patch_size[0], device=device)[:, None] * height * grid[2]
    row_of_height = torch.arange(patch_size[1], device=device) * grid[2]
    rows = first_row.flatten()[:, None] + (row_of_channel + row_of_depth + row_of_height).flatten()
    return volume.reshape(-1, patch_size[2]).index_select(0, rows.flatten()).view(token_index.numel(), channels, -1)


def select_tokens(organ_token_mask: Tensor) -> tuple[Tensor, Tensor | None]:
    """Pack the tokens that hold an organ, sample by sample.

    Args:
        organ_token_mask: `(batch, organs, tokens)` bool.

    Returns:
        `token_index` `(batch, longest)`: indices of the kept tokens in rising order, then padding; and
        `token_is_real` of the same shape, or None when no sample is padded. A sample without any organ keeps its
        first token, since attention over nothing is undefined.
    """
    is_kept = organ_token_mask.any(1)  # (batch, tokens)
    is_kept[:, 0] |= ~is_kept.any(1)
    num_kept = is_kept.sum(1)
    longest = int(num_kept.max())
    # A stable descending sort of the flags brings the kept tokens to the front in their own order.
    token_index = is_kept.to(torch.uint8).sort(dim=1, descending=True, stable=True).indices[:, :longest]
    token_is_real = torch.arange(longest, device=is_kept.device) < num_kept[:, None]
    return token_index, None if bool(token_is_real.all()) else token_is_real


def gather_tokens(tokens: Tensor, token_index: Tensor) -> Tensor:
    """Tokens `(batch, asked, hidden)` of `(batch, tokens, hidden)` at `token_index` `(batch, asked)`."""
    return tokens.gather(1, token_index[..., None].expand(-1, -1, tokens.shape[2]))


def window_patches(patches: Tensor, windows: list[dict], dtype: torch.dtype) -> Tensor:
    """Map HU to network channels: `(clip((hu - hu_min) / (hu_max - hu_min), 0, 1) - mean) / std` for each window.

    Args:
        patches: `(tokens, 1, voxels)` HU, any number type.
        windows: The config's windows, one per channel.
        dtype: Float type of the result.

    Returns:
        `(tokens, channels, voxels)`.
    """
    hu = patches[:, 0].to(torch.float32)
    channels = torch.empty(len(hu), len(windows), hu.shape[1], dtype=torch.float32, device=hu.device)
    for channel, window in enumerate(windows):
        hu_min, hu_max = window["hu_min"], window["hu_max"]
        torch.clamp(hu, hu_min, hu_max, out=channels[:, channel])
        channels[:, channel].sub_(hu_min).div_(hu_max - hu_min).sub_(window["mean"]).div_(window["std"])
    return channels.to(dtype)


class FVLMPatchEmbedding(nn.Module):
    """Patches to tokens: a non-overlapping 3D convolution plus learned positions."""

    def __init__(self, config: FVLMVisionConfig):
        super().__init__()
        self.patch_size = tuple(config.patch_size)
        self.position_grid = tuple(config.position_grid)
        num_positions = self.position_grid[0] * self.position_grid[1] * self.position_grid[2]
        self.projection = nn.Conv3d(config.num_channels, config.hidden_size, self.patch_size, self.patch_size)
        self.position_embeddings = nn.Parameter(torch.zeros(num_positions, config.hidden_size))
        self.dropout = Dropout(config.hidden_dropout)

    def interpolated_positions(self, grid: tuple[int, ...]) -> Tensor:
        """Position embeddings `(tokens, hidden)` of a grid: as learned, or trilinear when the grid is another one."""
        if grid == self.position_grid:
            return self.position_embeddings
        positions = self.position_embeddings.view(1, *self.position_grid, -1).permute(0, 4, 1, 2, 3)
        positions = F.interpolate(positions, size=grid, mode="trilinear", align_corners=False)
        return positions.flatten(2).squeeze(0).T

    def forward(self, volume: Tensor, windows: list[dict] | None, token_index: Tensor | None) -> Tensor:
        """Embed all patches, or those of `token_index` `(batch, tokens)`.

        Args:
            volume: `(batch, channels, depth, height, width)`; with `windows`, HU in one channel.
            windows: HU windows to apply to the chosen patches, None for a volume that is windowed already.
            token_index: Patches to embed, None for all.

        Returns:
            `(batch, tokens, hidden)`.
        """
        if token_index is None:
            patches = all_patches(volume, self.patch_size)
        else:
            patches = chosen_patches(volume, self.patch_size, token_index)
        weight, bias = self.projection.weight, self.projection.bias
        patches = patches.to(weight.dtype) if windows is None else window_patches(patches, windows, weight.dtype)
        # The convolution of stride = kernel as one matmul: faster than conv3d, and it takes any choice of patches.
        tokens = F.linear(patches.flatten(1), weight.flatten(1), bias).view(len(volume), -1, len(weight))

        positions = self.interpolated_positions(token_grid(volume.shape[2:], self.patch_size))
        # F.embedding, not plain indexing: the backward of indexing is serial on CPU.
        tokens = tokens + (positions if token_index is None else F.embedding(token_index, positions))
        return self.dropout(tokens)


def eager_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[Tensor, Tensor]:
    """Attention written out; `query`, `key`, `value` are `(batch, heads, tokens, head size)`, a True mask is seen."""
    logits = query @ key.transpose(-1, -2) * scaling
    if attention_mask is not None:
        logits = logits.masked_fill(~attention_mask, torch.finfo(logits.dtype).min)
    probabilities = logits.softmax(-1, dtype=torch.float32).to(query.dtype)
    probabilities = F.dropout(probabilities, dropout, module.training)
    return (probabilities @ value).transpose(1, 2).contiguous(), probabilities


class FVLMVisionAttention(nn.Module):
    """Multi-head self-attention with one linear layer for queries, keys and values, in that order."""

    def __init__(self, config: FVLMVisionConfig):
        super().__init__()
        self.config = config
        self.num_heads = config.num_attention_heads
        self.head_size = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_size**-0.5
        self.attention_dropout = config.attention_dropout
        self.is_causal = False
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.dropout = Dropout(config.hidden_dropout)

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None, asked_index: Tensor | None = None
    ) -> Tensor:
        batch, num_tokens, _ = hidden_states.shape
        qkv = self.qkv(hidden_states).view(batch, num_tokens, 3, self.num_heads, self.head_size)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)  # each (batch, heads, tokens, head size)
        if asked_index is not None:
            query = query.gather(2, asked_index[:, None, :, None].expand(-1, self.num_heads, -1, self.head_size))
        dropout = self.attention_dropout if self.training else 0.0
        implementation = self.config._attn_implementation
        # On the CPU the SDPA of PyTorch has no fused kernel with dropout, and a slow one without fusion.
        if 0 < dropout < 1 and implementation == "sdpa" and runs_here(query) and query.dtype.itemsize >= 4:
            key_is_real = None if attention_mask is None else attention_mask[:, 0, 0]
            context = attention_with_dropout(query, key, value, key_is_real, dropout, self.scaling)
        else:
            attention_function = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
            context, _ = attention_function(
                self, query, key, value, attention_mask, scaling=self.scaling, dropout=dropout
            )
        return self.dropout(self.out_proj(context.flatten(2)))


class FVLMVisionMLP(nn.Module):
    """Two linear layers with an activation between them, dropout after each."""

    def __init__(self, config: FVLMVisionConfig):
        super().__init__()
        self.linear1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.activation = ACT2FN[config.hidden_act]
        self.linear2 = nn.Linear(config.intermediate_size, config.hidden_size)
        self.dropout = Dropout(config.hidden_dropout)

    def forward(self, hidden_states: Tensor) -> Tensor:
        hidden_states = self.dropout(self.activation(self.linear1(hidden_states)))
        return self.dropout(self.linear2(hidden_states))


class FVLMVisionBlock(GradientCheckpointingLayer):
    """Pre-norm transformer block."""

    def __init__(self, config: FVLMVisionConfig):
        super().__init__()
        self.norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention = FVLMVisionAttention(config)
        self.norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = FVLMVisionMLP(config)

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None, asked_index: Tensor | None = None
    ) -> Tensor:
        """All tokens `(batch, tokens, hidden)`; with `asked_index` `(batch, asked)` only these, which see all."""
        context = self.attention(self.norm1(hidden_states), attention_mask, asked_index)
        hidden_states = (hidden_states if asked_index is None else gather_tokens(hidden_states, asked_index)) + context
        return hidden_states + self.mlp(self.norm2(hidden_states))


class FVLMVisionModel(PreTrainedModel):
    """The 3D ViT over all patches of a crop, or over the patches that hold an organ."""

    config_class = FVLMVisionConfig
    base_model_prefix = "vision_model"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _no_split_modules = ["FVLMPatchEmbedding", "FVLMVisionBlock"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True

    def __init__(self, config: FVLMVisionConfig):
        super().__init__(config)
        self.embeddings = FVLMPatchEmbedding(config)
        self.blocks = nn.ModuleList(FVLMVisionBlock(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, FVLMPatchEmbedding):
            init.trunc_normal_(module.position_embeddings, std=self.config.initializer_range)

    def forward(
        self,
        pixel_values: Tensor,
        organ_token_mask: Tensor | None = None,
        windows: list[dict] | None = None,
        output_hidden_states: bool = False,
    ) -> FVLMVisionOutput:
        """Run the tower.

        Args:
            pixel_values: `(batch, channels, depth, height, width)`; with `windows` a volume in HU, one channel.
            organ_token_mask: `(batch, organs, tokens)` bool; needed when `config.token_selection` is "organs".
            windows: HU windows to apply, None when `pixel_values` are windowed already.
            output_hidden_states: Return the output of every block.
        """
        # (1)
        token_index = token_is_real = attention_mask = asked_index = None
        last = len(self.blocks) - 1
        if self.config.token_selection == "organs":
            if organ_token_mask is None:
                raise ValueError("token_selection='organs' needs organ_token_mask: it says which patches to read.")
            token_index, token_is_real = select_tokens(organ_token_mask)
            attention_mask = self.key_mask(token_is_real)
        elif self.may_ask_for_few(organ_token_mask, output_hidden_states):
            asked_index, _ = select_tokens(organ_token_mask)
            if asked_index.shape[1] > MOST_ASKED * organ_token_mask.shape[2]:
                asked_index = None
        # (2), (3)
        hidden_states = self.embeddings(pixel_values, windows, token_index)
        # (4)
        levels, levels_shape = [], hidden_states.shape
        all_hidden_states = [hidden_states] if output_hidden_states else None
        for index, block in enumerate(self.blocks):
            hidden_states = block(hidden_states, attention_mask, asked_index if index == last else None)
            if index in self.config.feature_levels:
                levels.append(hidden_states)
            if output_hidden_states and index + 1 < len(self.blocks):
                all_hidden_states.append(hidden_states)
        hidden_states = self.norm(hidden_states)
        if asked_index is not None:
            index = asked_index[..., None].expand_as(hidden_states)
            hidden_states = hidden_states.new_zeros(levels_shape).scatter(1, index, hidden_states)
        levels.append(hidden_states)
        if output_hidden_states:
            all_hidden_states.append(levels[-1])
        return FVLMVisionOutput(
            feature_levels=tuple(levels),
            token_index=token_index,
            token_is_real=token_is_real,
            hidden_states=tuple(all_hidden_states) if output_hidden_states else None,
        )

    def may_ask_for_few(self, organ_token_mask: Tensor | None, output_hidden_states: bool) -> bool:
        """Whether the last block may compute the organs' tokens alone.

        On the CPU only: on a GPU the host would have to wait for the number of tokens, step by step. Not in a graph,
        which cannot hang on that number.
        """
        if torch.compiler.is_compiling():
            return False
        is_read_whole = output_hidden_states or len(self.blocks) - 1 in self.config.feature_levels
        return organ_token_mask is not None and organ_token_mask.device.type == "cpu" and not is_read_whole

    def key_mask(self, token_is_real: Tensor | None) -> Tensor | None:
        """The padding mask in the form the attention implementation in force reads."""
        if token_is_real is None or "flash" in self.config._attn_implementation:
            return token_is_real  # flash attention unpads by a (batch, tokens) mask
        return token_is_real[:, None, None, :]
