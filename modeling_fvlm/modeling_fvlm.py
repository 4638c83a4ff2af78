"""fVLM: contrast each organ of a CT with the sentences a report says about it.

From Shui et al., "Large-scale and Fine-grained Vision-language Pre-training for Enhanced CT Image Understanding",
ICLR 2025, https://openreview.net/forum?id=nYpPAT4L3D. One forward:

(1) window the volume, cut it into patches, run the 3D ViT (vision.py);
(2) pool the tokens of every organ with that organ's learned query (pooling.py), project, normalise;
(3) encode every different caption of the batch once, project, normalise;
(4) per organ, contrast the patients whose organ is complete in the crop with their captions (loss.py).

A global branch, off by default (`config.volume_pooling`), embeds the whole volume beside its organs in step (2). The
whole report it is contrasted with is one more text of step (3); that contrast is the trainer's.

Arrays are (depth, height, width); a label map holds `organ index + 1` and 0 for background.
"""

import inspect
from dataclasses import dataclass

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModel, PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput

from .configuration_fvlm import FVLMConfig
from .dropout import Dropout
from .loss import organ_contrastive_loss
from .pooling import OrganPooling, OrganProjection
from .text_batches import PACKABLE_MODELS, PackedTexts, bucket_cost, length_buckets, real_tokens
from .vision import FVLMVisionModel, token_grid


@dataclass
class FVLMOrganFeatures(ModelOutput):
    """Organ embeddings of a batch of crops.

    Attributes:
        image_embeds: `(batch, organs, projection_dim)`, unit length; zeros where the organ is absent.
        organ_is_complete: `(batch, organs)` bool by the config's completeness rule.
        organ_is_present: `(batch, organs)` bool: at least one token holds the organ.
        volume_embeds: With a global branch: `(batch, projection_dim)`, unit length; zeros for a crop without any organ.
        hidden_states: With `output_hidden_states`: embeddings and every block's output, the last one normed, each
            `(batch, tokens, hidden)`; with `token_selection="organs"` the kept tokens only, padded to the longest.
        attentions: With `output_attentions`: `(batch, organs, heads, levels * patches)`, the organ queries' attention
            over all patches of every level, patches width fastest.
    """

    image_embeds: Tensor | None = None
    organ_is_complete: Tensor | None = None
    organ_is_present: Tensor | None = None
    volume_embeds: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: Tensor | None = None


@dataclass
class FVLMOutput(ModelOutput):
    """What a forward of fVLM gives: of images, of texts, or of both.

    Attributes:
        loss: Scalar; `organ_losses` of the active organs by `config.organ_reduction`.
        organ_losses: `(organs,)`, 0 where inactive.
        organ_is_active: `(organs,)` bool: the organ entered the loss.
        num_contrasted: `(organs,)` int64: patients contrasted in each active organ.
        image_embeds: `(batch, organs, projection_dim)`, unit length; zeros where the organ is absent.
        organ_is_complete: `(batch, organs)` bool.
        organ_is_present: `(batch, organs)` bool.
        volume_embeds: As in `FVLMOrganFeatures`.
        text_embeds: `(texts, projection_dim)`, unit length.
        logit_scale: Scalar, 1 / temperature.
        organ_log_variances: With `config.organ_reduction` "uncertainty": `(organs,)`, what it has learned.
        hidden_states, attentions: As in `FVLMOrganFeatures`.
    """

    loss: Tensor | None = None
    organ_losses: Tensor | None = None
    organ_is_active: Tensor | None = None
    num_contrasted: Tensor | None = None
    image_embeds: Tensor | None = None
    organ_is_complete: Tensor | None = None
    organ_is_present: Tensor | None = None
    volume_embeds: Tensor | None = None
    text_embeds: Tensor | None = None
    logit_scale: Tensor | None = None
    organ_log_variances: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: Tensor | None = None


def organ_occupancy(mask: Tensor, num_organs: int, patch_size: tuple[int, ...] | list[int]) -> tuple[Tensor, Tensor]:
    """Count the voxels of every organ in every patch, and tell which organs the crop cuts.

    Args:
        mask: Label map `(batch, depth, height, width)`, `organ index + 1`, 0 is background.
        num_organs: Length of the organ axis.
        patch_size: Patch edges in voxels.

    Returns:
        Voxel counts `(batch, organs, tokens)` int64, tokens width fastest, and `is_cut` `(batch, organs)` bool: some
        voxel of the organ lies on one of the six faces.

    Raises:
        ValueError: If the mask is not 4-D, not of integers, or holds a label beyond the organs.
    """
    if mask.ndim != 4 or mask.is_floating_point():
        raise ValueError(
            f"organ_mask must be integers (batch, depth, height, width), got {mask.dtype} {tuple(mask.shape)}."
        )
    if int(mask.max()) > num_organs or int(mask.min()) < 0:
        raise ValueError(
            f"organ_mask holds labels {int(mask.min())}..{int(mask.max())}, but there are {num_organs} organs: map the "
            "mask's labels to organ index + 1 first (FVLMImageProcessor does)."
        )
    batch, depth, height, width = mask.shape
    grid = token_grid(mask.shape[1:], patch_size)
    labels = num_organs + 1
    # Number every patch of the batch, and count the pairs (patch, label) in one pass.
    along = [torch.arange(size, device=mask.device) // patch for size, patch in zip((depth, height, width), patch_size)]
    patch_index = (along[0][:, None, None] * grid[1] + along[1][:, None]) * grid[2] + along[2]  # (D, H, W)
    num_tokens = grid[0] * grid[1] * grid[2]
    sample_index = torch.arange(batch, device=mask.device)[:, None, None, None]
    pairs = (sample_index * num_tokens + patch_index) * labels + mask
    counts = torch.bincount(pairs.flatten(), minlength=batch * num_tokens * labels).view(batch, num_tokens, labels)

    faces = [face for axis in (1, 2, 3) for face in (mask.select(axis, 0), mask.select(axis, -1))]
    on_faces = torch.cat([face.flatten(1) for face in faces], dim=1).long()
    is_cut = torch.zeros(batch, labels, dtype=torch.bool, device=mask.device).scatter_(1, on_faces, True)
    return counts[..., 1:].transpose(1, 2), is_cut[:, 1:]


class NoTokenTypes(nn.Module):
    """Stands in the place of BERT's token-type table and adds nothing, as the published text encoder does."""

    def forward(self, token_type_ids: Tensor) -> Tensor:
        return torch.zeros((), device=token_type_ids.device)


def build_text_model(text_config, token_types: bool = True) -> PreTrainedModel:
    """Build the text encoder with fresh weights.

    BERT's pooling layer is left out: no caption embedding reads it, and a layer without gradients stops
    DistributedDataParallel.

    Args:
        text_config: Config of any text encoder `AutoModel` knows.
        token_types: Keep the token-type table, where the encoder has one.
    """
    model_class = AutoModel._model_mapping.get(type(text_config), None)
    has_pooler = inspect.isclass(model_class) and "add_pooling_layer" in inspect.signature(model_class).parameters
    text_model = AutoModel.from_config(text_config, **({"add_pooling_layer": False} if has_pooler else {}))
    if not token_types:
        tables = [name for name, _ in text_model.named_modules() if name.endswith("token_type_embeddings")]
        for name in tables:
            text_model.set_submodule(name, NoTokenTypes())
    for name, module in list(text_model.named_modules()):
        if type(module) is nn.Dropout:
            text_model.set_submodule(name, Dropout(module.p))
    return text_model


class Temperature(nn.Module):
    """The learned temperature of the loss.

    A module, not a bare parameter: PEFT's `modules_to_save` finds modules only.
    """

    def __init__(self, initial: float, minimum: float, maximum: float):
        super().__init__()
        self.initial, self.minimum, self.maximum = initial, minimum, maximum
        self.value = nn.Parameter(torch.tensor(float(initial)))

    def forward(self) -> Tensor:
        """Return the logit scale, 1 / temperature; in training the parameter itself is first put into its limits."""
        if self.training:
            with torch.no_grad():
                self.value.clamp_(self.minimum, self.maximum)
        return 1 / self.value.float().reshape(())  # DeepSpeed gives it an axis


class OrganVariances(nn.Module):
    """A learned log variance for each organ, by which its loss is weighed (`uncertainty_weighted_sum` in loss.py)."""

    def __init__(self, num_organs: int):
        super().__init__()
        self.log_variances = nn.Parameter(torch.zeros(num_organs))

    def forward(self) -> Tensor:
        """Return them `(organs,)`, in float32."""
        return self.log_variances.float()


class FVLMPreTrainedModel(PreTrainedModel):
    """Weights initialisation and what the library may do with fVLM."""

    config_class = FVLMConfig
    base_model_prefix = "fvlm"
    main_input_name = "pixel_values"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = ["FVLMPatchEmbedding", "FVLMVisionBlock"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    # The loss does not know `num_items_in_batch`: without this the Trainer would scale it wrongly when accumulating.
    accepts_loss_kwargs = False
    # Weights of a loss, not of a model: one that was trained with them loads into one without, and the other way round.
    _keys_to_ignore_on_load_missing = [r"^organ_variances\."]
    _keys_to_ignore_on_load_unexpected = [r"^organ_variances\."]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, OrganPooling):
            init.zeros_(module.query_tokens)  # attention starts uniform over the organ's tokens
            init.xavier_uniform_(module.in_proj_weight)
            init.zeros_(module.in_proj_bias)
        elif isinstance(module, OrganProjection):
            for weight, bias in module.organ_parameters():
                init.normal_(weight, std=self.config.initializer_range)
                init.zeros_(bias)
        elif isinstance(module, Temperature):
            init.constant_(module.value, module.initial)
        elif isinstance(module, OrganVariances):
            init.zeros_(module.log_variances)


class FVLMModel(FVLMPreTrainedModel):
    """Vision tower, organ pooling, text encoder and the per-organ contrastive loss."""

    def __init__(self, config: FVLMConfig):
        super().__init__(config)
        num_organs, vision_width = len(config.organs), config.vision_config.hidden_size
        self.vision_model = FVLMVisionModel._from_config(config.vision_config)
        self.text_model = build_text_model(config.text_config, config.text_token_types)
        self.organ_pooling = OrganPooling(num_organs, vision_width, config.pooling_num_heads, config.pooling_dropout)
        self.organ_projection = OrganProjection(num_organs, vision_width, config.projection_dim)
        self.text_projection = nn.Linear(config.text_config.hidden_size, config.projection_dim)
        self.temperature = Temperature(config.temperature_init, config.temperature_min, config.temperature_max)
        # Last, and without a trace in the generator: the fresh weights of all above are the same with and without it.
        with torch.random.fork_rng(devices=[]):
            if config.volume_pooling == "attention":
                self.volume_pooling = OrganPooling(1, vision_width, config.pooling_num_heads, config.pooling_dropout)
            if config.volume_pooling != "none":
                self.volume_projection = nn.Linear(vision_width, config.projection_dim)
        if config.organ_reduction == "uncertainty":
            self.organ_variances = OrganVariances(num_organs)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The text encoder's word embeddings."""
        return self.text_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the text encoder's word embeddings."""
        self.text_model.set_input_embeddings(value)

    def get_organ_features(
        self,
        pixel_values: Tensor | None = None,
        organ_mask: Tensor | None = None,
        *,
        volume: Tensor | None = None,
        organ_token_mask: Tensor | None = None,
        organ_is_complete: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
    ) -> FVLMOrganFeatures:
        """Embed every organ of every crop.

        Args:
            pixel_values: Windowed crops `(batch, channels, depth, height, width)`; or give `volume`.
            organ_mask: Label maps `(batch, depth, height, width)` of `organ index + 1`. Needed unless both of the
                next two are given.
            volume: Crops in HU `(batch, depth, height, width)`, any number type; windowed here by `config.windows`.
            organ_token_mask: `(batch, organs, tokens)` bool, the patches that hold each organ, if known already.
            organ_is_complete: `(batch, organs)` bool, if known already.
            output_hidden_states, output_attentions: Return them (see `FVLMOrganFeatures`).
        """
        if (pixel_values is None) == (volume is None):
            raise ValueError("give either pixel_values (windowed) or volume (HU), not both and not neither.")
        if organ_token_mask is None or organ_is_complete is None:
            if organ_mask is None:
                raise ValueError(
                    "organ_mask is missing: give the label map, or both organ_token_mask and organ_is_complete."
                )
            if organ_mask.shape[1:] != (crop := pixel_values if volume is None else volume).shape[-3:]:
                raise ValueError(
                    f"organ_mask {tuple(organ_mask.shape[1:])} and crop {tuple(crop.shape[-3:])} are not on one grid."
                )
            counts, is_cut = organ_occupancy(organ_mask, len(self.config.organs), self.config.vision_config.patch_size)
            if organ_token_mask is None:
                organ_token_mask = counts > 0
            if organ_is_complete is None:
                organ_is_complete = counts.sum(-1) >= self.config.min_organ_voxels
                if self.config.completeness == "border":
                    organ_is_complete &= ~is_cut
        organ_token_mask, organ_is_complete = organ_token_mask.bool(), organ_is_complete.bool()
        organ_is_present = organ_token_mask.any(-1)

        # (1)
        vision_output = self.vision_model(
            pixel_values if volume is None else volume[:, None],
            organ_token_mask=organ_token_mask,
            windows=None if volume is None else self.config.windows,
            output_hidden_states=bool(output_hidden_states),
        )
        # (2)
        token_index, token_is_real = vision_output.token_index, vision_output.token_is_real
        kept_token_mask = organ_token_mask
        if token_index is not None:
            index = token_index[:, None].expand(-1, organ_token_mask.shape[1], -1)
            kept_token_mask = organ_token_mask.gather(2, index)  # (batch, organs, kept tokens)
            if token_is_real is not None:
                kept_token_mask = kept_token_mask & token_is_real[:, None]
        pooled, attentions = self.organ_pooling(vision_output.feature_levels, kept_token_mask, bool(output_attentions))
        # Unit length in float32: under bf16 the rounding of the norm alone would cost two digits.
        image_embeds = F.normalize(self.organ_projection(pooled).float(), dim=-1)
        image_embeds = image_embeds.masked_fill(~organ_is_present[..., None], 0)
        if attentions is not None:
            attentions = attentions.masked_fill(~organ_is_present[..., None, None], 0)
            if token_index is not None:
                attentions = self.spread_attentions(attentions, token_index, organ_token_mask.shape[2])
        return FVLMOrganFeatures(
            image_embeds=image_embeds,
            organ_is_complete=organ_is_complete,
            organ_is_present=organ_is_present,
            volume_embeds=self.embed_volume(vision_output.feature_levels[-1], kept_token_mask.any(1)),
            hidden_states=vision_output.hidden_states,
            attentions=attentions,
        )

    def embed_volume(self, tokens: Tensor, token_is_kept: Tensor) -> Tensor | None:
        """The global branch: pool the last level of a whole volume into one vector; None without such a branch.

        Args:
            tokens: Last level `(batch, tokens, hidden)`.
            token_is_kept: `(batch, tokens)` bool: tokens that hold some organ. Background says nothing that a report
                speaks of, and on some devices its last level is not computed at all.

        Returns:
            `(batch, projection_dim)`, unit length; zeros where no token is kept.
        """
        if self.config.volume_pooling == "none":
            return None
        if self.config.volume_pooling == "attention":
            pooled = self.volume_pooling((tokens,), token_is_kept[:, None])[0][:, 0]
        else:
            weights = token_is_kept[..., None].float()
            pooled = ((tokens.float() * weights).sum(1) / weights.sum(1).clamp(min=1)).to(tokens.dtype)
        volume_embeds = F.normalize(self.volume_projection(pooled).float(), dim=-1)
        return volume_embeds.masked_fill(~token_is_kept.any(1, keepdim=True), 0)

    @staticmethod
    def spread_attentions(attentions: Tensor, token_index: Tensor, num_tokens: int) -> Tensor:
        """Bring attention over the kept tokens back to all patches; the patches left out get 0."""
        batch, num_organs, num_heads, _ = attentions.shape
        per_level = attentions.unflatten(3, (-1, token_index.shape[1]))  # (batch, organs, heads, levels, kept tokens)
        index = token_index[:, None, None, None].expand_as(per_level)
        spread = per_level.new_zeros(*per_level.shape[:4], num_tokens)
        return spread.scatter_add(4, index, per_level).flatten(3)

    def get_text_features(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Embed captions or prompts.

        Padding is left out: several texts share a row where the encoder allows it, and otherwise run in buckets of
        similar length (text_batches.py). The result is that of one padded batch.

        Args:
            input_ids: `(texts, tokens)`.
            attention_mask: `(texts, tokens)`, 1 at real tokens; None: all are real.

        Returns:
            `(texts, projection_dim)`, unit length.
        """
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        if len(input_ids) == 0:
            raise ValueError(
                "input_ids holds no text; a batch without captions carries one empty text (encode_captions)."
            )
        is_real = real_tokens(attention_mask)
        text_config, implementation = self.config.text_config, self.text_model.config._attn_implementation
        is_packable = text_config.model_type in PACKABLE_MODELS and not getattr(text_config, "is_decoder", False)
        if torch.compiler.is_compiling():  # a graph cannot hang on the lengths
            pooled = self.pool_text(input_ids, is_real.long())
        elif is_packable and implementation in ("sdpa", "eager"):
            pooled = self.pool_packed_texts(PackedTexts(input_ids, is_real), is_additive=implementation == "eager")
        else:
            pooled = self.pool_bucketed_texts(input_ids, is_real)
        return F.normalize(self.text_projection(pooled).float(), dim=-1)

    def pool_packed_texts(self, texts: PackedTexts, is_additive: bool) -> Tensor:
        """Encode texts that share rows and pool each into one vector `(texts, text hidden size)`."""
        dtype = self.text_model.dtype
        if torch.is_autocast_enabled(texts.input_ids.device.type):
            dtype = torch.get_autocast_dtype(texts.input_ids.device.type)
        hidden_states = self.text_model(
            input_ids=texts.input_ids,
            attention_mask=texts.attention_mask(dtype if is_additive else None),
            position_ids=texts.position_ids,
        ).last_hidden_state
        return texts.first_tokens(hidden_states) if self.config.text_pooling == "cls" else texts.means(hidden_states)

    def pool_bucketed_texts(self, input_ids: Tensor, is_real: Tensor) -> Tensor:
        """Encode texts in buckets of similar length, each cut to its longest, and pool each into one vector."""
        # Position after the last real token: cutting there is safe for left padding too (it cuts nothing).
        ends = (is_real * torch.arange(1, input_ids.shape[1] + 1, device=input_ids.device)).amax(1)
        ends, order = ends.sort()
        sizes, longest = length_buckets(ends.tolist(), bucket_cost(input_ids.device))
        pooled = [
            self.pool_text(input_ids[bucket, :end], is_real[bucket, :end].long())
            for bucket, end in zip(order.split(sizes), longest)
        ]
        return torch.cat(pooled).index_select(0, order.argsort())

    def pool_text(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Encode texts and pool each into one vector `(texts, text hidden size)` by `config.text_pooling`."""
        hidden_states = self.text_model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        if self.config.text_pooling == "cls":
            first = attention_mask.argmax(1)  # not column 0, should the padding stand in front
            return hidden_states[torch.arange(len(first), device=first.device), first]
        weights = attention_mask[..., None].to(hidden_states.dtype)
        return (hidden_states * weights).sum(1) / weights.sum(1).clamp(min=1)

    def forward(
        self,
        pixel_values: Tensor | None = None,
        organ_mask: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        caption_index: Tensor | None = None,
        organ_is_abnormal: Tensor | None = None,
        *,
        volume: Tensor | None = None,
        organ_token_mask: Tensor | None = None,
        organ_is_complete: Tensor | None = None,
        caption_hash: Tensor | None = None,
        text_hash: Tensor | None = None,
        report_index: Tensor | None = None,
        report_hash: Tensor | None = None,
        return_loss: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
    ) -> FVLMOutput:
        """Embed organs and captions, and contrast them. Images alone or texts alone are embedded.

        Args:
            pixel_values, organ_mask, volume, organ_token_mask, organ_is_complete: As in `get_organ_features`.
            input_ids, attention_mask: `(texts, tokens)`: every different caption of the batch, once.
            caption_index: `(batch, organs)` int64: row of `input_ids` with the organ's caption, -1 for none.
            organ_is_abnormal: `(batch, organs)` bool: the caption describes a finding.
            caption_hash: `(batch, organs)` int64: equal numbers are equal captions; by default `caption_index`.
            text_hash, report_index, report_hash: Of `encode_captions`, for a trainer; not read here.
            return_loss: True asks for the loss, False leaves it out; by default it comes when the captions do.
            output_hidden_states, output_attentions: Of the vision tower and of the organ queries.
        """
        if return_loss is None:
            return_loss = caption_index is not None and organ_is_abnormal is not None
        if return_loss and (input_ids is None or caption_index is None or organ_is_abnormal is None):
            raise ValueError(
                "the loss needs input_ids, caption_index and organ_is_abnormal: give them or return_loss=False."
            )
        has_image = not (pixel_values is None and volume is None)
        if not has_image and (input_ids is None or return_loss or organ_mask is not None):
            raise ValueError("give either pixel_values (windowed) or volume (HU), or input_ids alone for texts.")

        organs = FVLMOrganFeatures()
        if has_image:
            organs = self.get_organ_features(
                pixel_values,
                organ_mask,
                volume=volume,
                organ_token_mask=organ_token_mask,
                organ_is_complete=organ_is_complete,
                output_hidden_states=output_hidden_states,
                output_attentions=output_attentions,
            )
        # (3)
        text_embeds = None if input_ids is None else self.get_text_features(input_ids, attention_mask)
        logit_scale = self.temperature()
        log_variances = self.organ_variances() if self.config.organ_reduction == "uncertainty" else None
        output = FVLMOutput(
            image_embeds=organs.image_embeds,
            organ_is_complete=organs.organ_is_complete,
            organ_is_present=organs.organ_is_present,
            volume_embeds=organs.volume_embeds,
            text_embeds=text_embeds,
            logit_scale=logit_scale,
            organ_log_variances=log_variances,
            hidden_states=organs.hidden_states,
            attentions=organs.attentions,
        )
        # (4)
        if return_loss:
            result = organ_contrastive_loss(
                organs.image_embeds,
                F.embedding(caption_index.clamp(min=0), text_embeds),  # (batch, organs, dim)
                caption_id=caption_index if caption_hash is None else caption_hash,
                is_abnormal=organ_is_abnormal,
                is_valid=organs.organ_is_complete & (caption_index >= 0),
                logit_scale=logit_scale,
                reduction=self.config.organ_reduction,
                log_variances=log_variances,
            )
            output.loss, output.organ_losses = result.loss, result.organ_losses
            output.organ_is_active, output.num_contrasted = result.organ_is_active, result.num_contrasted
        return output


# Saving then writes `auto_map` and this code beside the weights.
FVLMModel.register_for_auto_class("AutoModel")


def set_attention(model: FVLMModel, name: str) -> None:
    """Let both towers attend by an implementation of `ATTENTIONS`.

    "sdpa" changes nothing: transformers chose it already, where the text encoder has it.

    Raises:
        ValueError: If it is not installed, or a tower does not know it.
    """
    if name == "sdpa":
        return
    try:
        model.set_attn_implementation(name)
    except Exception as error:  # ImportError, ValueError, and whatever a package that is half there raises
        raise ValueError(str(error)) from error
    for tower in (model.vision_model, model.text_model):  # some only warn
        if tower.config._attn_implementation != name:
            raise ValueError(f"{type(tower).__name__} does not know it.")


def load_whole_model(path, **kwargs) -> FVLMModel:
    """`FVLMModel.from_pretrained` in float32, for which every weight must be there: none is filled with random numbers.

    Args:
        path: Folder or Hub id.
        **kwargs: As for `from_pretrained`.

    Raises:
        ValueError: If weights are missing, left over or of another shape, or the file of weights is damaged.
        OSError: If there is no such model.
    """
    try:
        model, info = FVLMModel.from_pretrained(
            path,
            dtype=torch.float32,
            ignore_mismatched_sizes=True,  # refused below, by name
            output_loading_info=True,
            **kwargs,
        )
    except (SafetensorError, RuntimeError) as error:
        raise ValueError(f"the weights cannot be loaded: {error}") from error
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if names := sorted(str(name) for name in info[kind]):
            raise ValueError(
                f"its weights are not those of its config.json: {kind.replace('_', ' ')} {names[:5]}"
                f"{' ...' if len(names) > 5 else ''}. Convert or save it again."
            )
    return model
