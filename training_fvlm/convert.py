"""Published fVLM checkpoints to the names of `FVLMModel`, and back.

The published code (alibaba-damo-academy/fvlm, commit d768ec1) saves one state dict. What its names become:

    temp                                            temperature.value
    query_tokens                                    organ_pooling.query_tokens
    attention.{in_proj_*, out_proj.*}               organ_pooling.*
    vision_projs.N.{weight, bias}                   organ_projection.{weight, bias}_N
    text_proj.*                                     text_projection.*
    visual_encoder.patch_embedding.patch_embeddings.*     vision_model.embeddings.projection.*
    visual_encoder.patch_embedding.position_embeddings    vision_model.embeddings.position_embeddings, batch axis off
    visual_encoder.blocks.N.attn.*                  vision_model.blocks.N.attention.*
    visual_encoder.{blocks.N.*, norm.*}             vision_model.{blocks.N.*, norm.*}
    text_encoder.{embeddings, encoder}.*            text_model.{embeddings, encoder}.*

Left behind: the masked-language head `text_encoder.cls.*` and `text_encoder.pooler.*`, which no embedding reads, and
the constant `text_encoder.embeddings.position_ids`, and the token-type table, which the published text encoder never
adds. A model with `config.text_token_types` False has no such table either; with True it starts from zeros.
"""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

# (published pattern, our replacement); each pair is also read from right to left.
RENAMINGS = [
    ("temp", "temperature.value"),
    ("query_tokens", "organ_pooling.query_tokens"),
    ("attention.", "organ_pooling."),
    ("text_proj.", "text_projection."),
    ("visual_encoder.patch_embedding.patch_embeddings.", "vision_model.embeddings.projection."),
    ("visual_encoder.patch_embedding.position_embeddings", "vision_model.embeddings.position_embeddings"),
    ("visual_encoder.", "vision_model."),
    ("text_encoder.", "text_model."),
]
TOKEN_TYPES = "text_model.embeddings.token_type_embeddings.weight"
POSITIONS = "vision_model.embeddings.position_embeddings"
UNREAD = re.compile(r"text_encoder\.(cls\.|pooler\.|embeddings\.(position_ids|token_type_ids|token_type_embeddings))")
ORGAN_PROJECTION = re.compile(r"vision_projs\.(\d+)\.(weight|bias)")


def converted_name(name: str) -> str:
    """Our name of a published parameter that is neither unread nor a per-organ projection."""
    for published, ours in RENAMINGS:
        if name == published or (name.startswith(published) and published.endswith(".")):
            return ours + name.removeprefix(published).replace(".attn.", ".attention.")
    raise ValueError(f"{name!r} is no parameter of a published fVLM checkpoint; nothing is known to map it to.")


def published_name(name: str) -> str:
    """The published name of one of our parameters that is not stacked over organs."""
    for published, ours in RENAMINGS:
        if name == ours or (name.startswith(ours) and ours.endswith(".")):
            rest = name.removeprefix(ours)
            return published + (rest.replace(".attention.", ".attn.") if ours == "vision_model." else rest)
    raise ValueError(f"{name!r} is no parameter of FVLMModel with a published counterpart.")


def convert_published_state_dict(state_dict: Mapping[str, Tensor], config) -> dict[str, Tensor]:
    """Bring a published state dict to the names and shapes of `FVLMModel(config)`.

    Args:
        state_dict: Tensors under published names, organs in the order of `config.organs`.
        config: `FVLMConfig` of the model to fill.

    Returns:
        Tensors for `FVLMModel.load_state_dict(..., strict=True)`.

    Raises:
        ValueError: If a name is unknown or the number of organ projections is not that of `config.organs`.
    """
    converted, per_organ = {}, {"weight": {}, "bias": {}}
    for name, tensor in state_dict.items():
        if UNREAD.match(name):
            continue
        if match := ORGAN_PROJECTION.fullmatch(name):
            per_organ[match[2]][int(match[1])] = tensor
        else:
            converted[converted_name(name)] = tensor
    for kind, tensors in per_organ.items():
        if sorted(tensors) != list(range(len(config.organs))):
            raise ValueError(
                f"the checkpoint has vision_projs.N.{kind} for N in {sorted(tensors)}, but config.organs names "
                f"{len(config.organs)}: {config.organs}. Give the organs the checkpoint was trained on, in order."
            )
        converted |= {f"organ_projection.{kind}_{index}": tensor for index, tensor in tensors.items()}
    converted[POSITIONS] = converted[POSITIONS].squeeze(0)
    if config.text_token_types:
        words = converted["text_model.embeddings.word_embeddings.weight"]
        converted[TOKEN_TYPES] = words.new_zeros(config.text_config.type_vocab_size, words.shape[1])
    return converted


def to_published_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Bring a state dict of `FVLMModel` (or its gradients) back to published names and shapes.

    The inverse of `convert_published_state_dict`, but for what that leaves behind.
    """
    published = {}
    for name, tensor in state_dict.items():
        if name == TOKEN_TYPES:
            continue
        if match := re.fullmatch(r"organ_projection\.(weight|bias)_(\d+)", name):
            published[f"vision_projs.{match[2]}.{match[1]}"] = tensor
        else:
            published[published_name(name)] = tensor[None] if name == POSITIONS else tensor
    return published
