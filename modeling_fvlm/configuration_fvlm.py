"""Configuration of fVLM: the one home of every size, HU window, spacing and organ order (defaults: defaults.py).

`FVLMVisionConfig` describes the 3D ViT, `FVLMConfig` the whole model and the preprocessing its weights expect. Both
are written to `config.json`, so the processor, the data builders and the model card read the same numbers.
"""

import math
from typing import Literal

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig

from .defaults import DEFAULT_MARGIN_VOXELS, DEFAULT_SPACING, DEFAULT_VOLUME_SIZE, DEFAULT_WINDOW
from .organs import MAX_ORGANS, load_organ_set

AXES = ("depth", "height", "width")
# What the towers can attend by, by transformers' names.
ATTENTIONS = ("sdpa", "eager", "flash_attention_2", "flash_attention_3")
WINDOW_KEYS = {"hu_min", "hu_max", "mean", "std"}


@strict
class FVLMVisionConfig(PreTrainedConfig):
    """The 3D ViT that turns a crop into tokens. Defaults: ViT-B over the published crop, 7 x 16 x 11 = 1,232 tokens.

    Args:
        volume_size: Crop in voxels along (depth, height, width); other sizes run with interpolated positions.
        patch_size: Patch edges in voxels along (depth, height, width).
        num_channels: Channels of `pixel_values`: one per HU window.
        hidden_size, num_hidden_layers, num_attention_heads, intermediate_size, hidden_act: As in any ViT.
        layer_norm_eps: Epsilon of every layer norm (the published model: 1e-5; MAE's own ViT: 1e-6).
        hidden_dropout: Dropout after the embeddings, the attention output and both layers of the MLP.
        attention_dropout: Dropout on attention probabilities (published: 0.1). At 0 a CPU runs PyTorch's fused kernel,
            above 0 our own, slower one (dropout.py); the fused kernels of GPUs know dropout. 0 regularises a little
            less, and a run's numbers differ from the published setting.
        feature_levels: Blocks (index from 0) whose raw output the organ pooling reads beside the normed last output.
        token_selection: "all" sends every patch through the tower (published). "organs" sends only patches that
            hold a voxel of some organ: several times less work, but no token sees the background.
        initializer_range: Standard deviation of fresh weights.
    """

    model_type = "fvlm_vision_model"
    base_config_key = "vision_config"

    volume_size: tuple[int, int, int] | list[int] = DEFAULT_VOLUME_SIZE
    patch_size: tuple[int, int, int] | list[int] = (16, 16, 32)
    num_channels: int = 1
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-5
    hidden_dropout: float | int = 0.1
    attention_dropout: float | int = 0.1
    feature_levels: tuple[int, ...] | list[int] = (3, 6, 9)
    token_selection: Literal["all", "organs"] = "all"
    initializer_range: float = 0.02

    @property
    def position_grid(self) -> tuple[int, int, int]:
        """Patches along (depth, height, width) of a crop of `volume_size`: the grid positions are learned on."""
        depth, height, width = (size // patch for size, patch in zip(self.volume_size, self.patch_size))
        return depth, height, width

    def validate_architecture(self):
        """Refuse sizes that do not fit each other."""
        for name, edges in (("volume_size", self.volume_size), ("patch_size", self.patch_size)):
            if len(edges) != 3 or min(edges) < 1:
                raise ValueError(f"{name} must be three positive edges (depth, height, width), got {edges}.")
        for axis, size, patch in zip(AXES, self.volume_size, self.patch_size):
            if size % patch:
                raise ValueError(f"volume_size {axis} {size} is no multiple of patch_size {axis} {patch}.")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is no multiple of num_attention_heads {self.num_attention_heads}."
            )
        levels = list(self.feature_levels)
        if levels != sorted(set(levels)) or any(not 0 <= level < self.num_hidden_layers for level in levels):
            raise ValueError(
                f"feature_levels {levels} must be increasing block indices in [0, {self.num_hidden_layers - 1}] "
                f"(num_hidden_layers is {self.num_hidden_layers}); the normed last output is always added to them."
            )


@strict
class FVLMConfig(PreTrainedConfig):
    """Vision tower, text encoder, organ pooling and loss, with the organs and the preprocessing they were trained on.

    Args:
        vision_config: `FVLMVisionConfig` or its fields.
        text_config: Any text encoder's config; by default BERT in the size of CXR-BERT.
        organ_set: Name of the organ set the organs come from. When `organs` is not given, the set is read from
            `hub_configs/organs` ("chest_4" unless named); with `organs` and no name it is "custom".
        organs: Organ names in the order of every organ axis; a label map holds `index in this list + 1`.
        organ_classes: For each organ the TotalSegmentator classes it is made of, per numbering.
        windows: HU windows, one per channel: {hu_min, hu_max, mean, std}. Each gives
            `(clip((hu - hu_min) / (hu_max - hu_min), 0, 1) - mean) / std`.
        spacing: mm between voxel centres along (depth, height, width).
        margin_voxels: Margin around the box of all organs, voxels along (depth, height, width) of that spacing.
        preprocessing: How a scan is brought there. "standard": by its affine, with the same margin on both sides.
            "published": as the published weights saw their scans, faults included (published_preparation.py).
        projection_dim: Size of `image_embeds` and `text_embeds`.
        pooling_num_heads, pooling_dropout: Of the attention that pools an organ's tokens.
        text_pooling: "cls" takes the first token's last hidden state, "mean" the mean over a caption's tokens.
        text_token_types: Whether a text encoder that has a token-type table (BERT) adds its row 0 to every token. The
            published encoder has none: False, also for its converted weights.
        max_text_length: Longest caption in tokens.
        volume_pooling: "none" (published), or a second, global branch that embeds the whole volume for its whole
            report: "mean" or "attention" (a learned query) over the tokens of the last level that hold some organ.
        max_report_length: Longest whole report in tokens; None: `max_text_length`.
        temperature_init, temperature_min, temperature_max: Similarities are divided by a learned temperature, kept
            within these limits during training.
        organ_reduction: How the losses of the organs that enter become one. "sum" (published); "mean"; "uncertainty"
            weighs each by a variance that is learned with the model; "dwa" by how fast it falls in training (the
            model's own forward, which knows no past, then sums).
        completeness: When the organ of a crop may enter the loss. "border": no voxel of it on a face of the crop
            (published). "min_voxels": whatever the faces say.
        min_organ_voxels: Fewest voxels a complete organ has, under either rule.
        initializer_range: Standard deviation of fresh projection weights.
    """

    model_type = "fvlm"
    sub_configs = {"vision_config": FVLMVisionConfig, "text_config": AutoConfig}

    # No class of ours in these annotations: a config from a local folder's own code is another class of this name.
    vision_config: dict | PreTrainedConfig | None = None
    text_config: dict | PreTrainedConfig | None = None
    organ_set: str | None = None
    organs: list[str] | tuple[str, ...] | None = None
    organ_classes: dict | None = None
    windows: list[dict] | tuple[dict, ...] | None = None
    spacing: tuple[float | int, ...] | list[float | int] = DEFAULT_SPACING
    margin_voxels: tuple[int, ...] | list[int] = DEFAULT_MARGIN_VOXELS
    preprocessing: Literal["standard", "published"] = "standard"
    projection_dim: int = 256
    pooling_num_heads: int = 4
    pooling_dropout: float | int = 0.1
    text_pooling: Literal["cls", "mean"] = "cls"
    text_token_types: bool = True
    max_text_length: int = 384
    volume_pooling: Literal["none", "mean", "attention"] = "none"
    max_report_length: int | None = None
    temperature_init: float = 0.07
    temperature_min: float = 0.001
    temperature_max: float = 0.5
    organ_reduction: Literal["sum", "mean", "uncertainty", "dwa"] = "sum"
    completeness: Literal["border", "min_voxels"] = "border"
    min_organ_voxels: int = 1
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs):
        if self.organs is None:
            organ_set = load_organ_set(self.organ_set or "chest_4")
            self.organ_set = organ_set.name
            self.organs = organ_set.organs
            if self.organ_classes is None:
                self.organ_classes = organ_set.classes
        # Filled in here: the library's own defaults for sub-configs are newer than our oldest supported release.
        if not isinstance(self.vision_config, PreTrainedConfig):
            self.vision_config = FVLMVisionConfig(**(self.vision_config or {}))
        if not isinstance(self.text_config, PreTrainedConfig):
            self.text_config = AutoConfig.for_model(**{"model_type": "bert", **(self.text_config or {})})
        # Lists, as they come back from config.json: a config equals its reloaded self.
        self.organs = list(self.organs)
        self.organ_set = self.organ_set or "custom"
        self.organ_classes = self.organ_classes or {}
        self.windows = [dict(window) for window in (self.windows or (DEFAULT_WINDOW,))]
        super().__post_init__(**kwargs)

    def validate_architecture(self):
        """Refuse organs, windows, geometry and towers that do not fit each other."""
        if not self.organs or len(set(self.organs)) != len(self.organs):
            raise ValueError(f"organs must be different names and at least one, got {self.organs}.")
        if len(self.organs) > MAX_ORGANS:
            raise ValueError(f"{len(self.organs)} organs: at most {MAX_ORGANS} are told apart in one pass over a mask.")
        if unknown := sorted(set(self.organ_classes) - set(self.organs)):
            raise ValueError(f"organ_classes names {unknown}, which are not in config.organs {self.organs}.")
        for channel, window in enumerate(self.windows):
            if set(window) != WINDOW_KEYS:
                raise ValueError(f"window {channel} must have the keys {sorted(WINDOW_KEYS)}, got {sorted(window)}.")
            if not window["hu_min"] < window["hu_max"] or not window["std"] > 0:
                raise ValueError(f"window {channel} needs hu_min < hu_max and std > 0, got {window}.")
        if len(self.windows) != self.vision_config.num_channels:
            raise ValueError(
                f"{len(self.windows)} windows make {len(self.windows)} channels, but vision_config.num_channels is "
                f"{self.vision_config.num_channels}."
            )
        if len(self.spacing) != 3 or not all(0 < edge < math.inf for edge in self.spacing):
            raise ValueError(f"spacing must be three positive mm (depth, height, width), got {self.spacing}.")
        if len(self.margin_voxels) != 3 or min(self.margin_voxels) < 0:
            raise ValueError(
                f"margin_voxels must be three counts >= 0 (depth, height, width), got {self.margin_voxels}."
            )
        if self.vision_config.hidden_size % self.pooling_num_heads:
            raise ValueError(
                f"vision hidden_size {self.vision_config.hidden_size} is no multiple of pooling_num_heads "
                f"{self.pooling_num_heads}."
            )
        if self.max_text_length < 1 or (self.max_report_length is not None and self.max_report_length < 1):
            raise ValueError(
                f"max_text_length {self.max_text_length} and max_report_length {self.max_report_length} must be at "
                "least 1 token."
            )
        if not 0 < self.temperature_min <= self.temperature_init <= self.temperature_max:
            raise ValueError(
                f"temperatures must satisfy 0 < temperature_min <= temperature_init <= temperature_max, got "
                f"{self.temperature_min}, {self.temperature_init}, {self.temperature_max}."
            )


# Saving then writes `auto_map` and this code beside the weights.
FVLMConfig.register_for_auto_class()
