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
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .checkpoint_file import CheckpointError, listed, refuse_non_finite

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
UNREAD = re.compile(
    r"text_encoder\.(cls\.(predictions|seq_relationship)\..+|pooler\..+"
    r"|embeddings\.(position_ids|token_type_ids|token_type_embeddings\.weight))"
)
ORGAN_PROJECTION = re.compile(r"vision_projs\.(\d+)\.(weight|bias)")
OUR_ORGAN_PROJECTION = re.compile(r"organ_projection\.(weight|bias)_(\d+)")

PATCH_WEIGHT = "visual_encoder.patch_embedding.patch_embeddings.weight"
PATCH_POSITIONS = "visual_encoder.patch_embedding.position_embeddings"
WORDS = "text_encoder.embeddings.word_embeddings.weight"
TOKEN_TYPE_TABLE = "text_encoder.embeddings.token_type_embeddings.weight"  # may be missing
# Tensors that sizes are read from, and their number of axes.
SIZE_TENSORS = {
    "query_tokens": 2,
    "text_proj.weight": 2,
    PATCH_WEIGHT: 5,
    PATCH_POSITIONS: 3,
    "visual_encoder.blocks.0.mlp.linear1.weight": 2,
    WORDS: 2,
    "text_encoder.embeddings.position_embeddings.weight": 2,
    "text_encoder.encoder.layer.0.intermediate.dense.weight": 2,
}


@dataclass(frozen=True)
class PublishedSizes:
    """What the tensors of a published checkpoint say of the model they belong to.

    Attributes:
        num_organs: Organ queries.
        num_positions: Position embeddings of the ViT: patches of the crop it was trained on.
        projection_dim: Size of the embeddings.
        vision: Fields of `FVLMVisionConfig`, `volume_size` and heads excepted.
        text: Fields of `BertConfig`, heads excepted.
    """

    num_organs: int
    num_positions: int
    projection_dim: int
    vision: dict[str, Any]
    text: dict[str, Any]


def left_behind(names: Iterable[str]) -> list[str]:
    """Those of some published names that no embedding reads: the known leftovers."""
    return [name for name in names if UNREAD.fullmatch(name)]


def converted_name(name: str) -> str | None:
    """Our name of a published parameter that is neither unread nor a per-organ projection; None: not known."""
    for published, ours in RENAMINGS:
        if name == published or (name.startswith(published) and published.endswith(".")):
            return ours + name.removeprefix(published).replace(".attn.", ".attention.")
    return None


def published_name(name: str) -> str:
    """The published name of one of our parameters.

    Raises:
        CheckpointError: If the published model has no such parameter.
    """
    if match := OUR_ORGAN_PROJECTION.fullmatch(name):
        return f"vision_projs.{match[2]}.{match[1]}"
    for published, ours in RENAMINGS:
        if name == ours or (name.startswith(ours) and ours.endswith(".")):
            rest = name.removeprefix(ours)
            return published + (rest.replace(".attention.", ".attn.") if ours == "vision_model." else rest)
    raise CheckpointError(f"{name!r} is no parameter of FVLMModel with a published counterpart.")


def infer_sizes(state_dict: Mapping[str, Tensor]) -> PublishedSizes:
    """Read every size that tensors can tell.

    Raises:
        CheckpointError: If the tensors are not those of a published fVLM.
    """
    if missing := [name for name in SIZE_TENSORS if name not in state_dict]:
        raise CheckpointError(
            f"this is no published fVLM checkpoint: it has no {listed(missing)}. What it has: {len(state_dict)} "
            f"tensors, {listed(list(state_dict))}."
        )
    for name, num_axes in {**SIZE_TENSORS, TOKEN_TYPE_TABLE: 2}.items():
        if name in state_dict and state_dict[name].ndim != num_axes:
            raise CheckpointError(
                f"{name} has the shape {tuple(state_dict[name].shape)}; the published architecture has {num_axes} axes "
                "there."
            )
    shape = {name: tuple(state_dict[name].shape) for name in SIZE_TENSORS}
    hidden, channels, *patch = shape[PATCH_WEIGHT]
    vocabulary, text_hidden = shape[WORDS]
    return PublishedSizes(
        num_organs=shape["query_tokens"][0],
        num_positions=shape[PATCH_POSITIONS][1],
        projection_dim=shape["text_proj.weight"][0],
        vision={
            "hidden_size": hidden,
            "num_channels": channels,
            "patch_size": patch,
            "num_hidden_layers": _count(state_dict, r"visual_encoder\.blocks\.(\d+)\."),
            "intermediate_size": shape["visual_encoder.blocks.0.mlp.linear1.weight"][0],
            "layer_norm_eps": 1e-5,
        },
        text={
            "model_type": "bert",
            "vocab_size": vocabulary,
            "hidden_size": text_hidden,
            "num_hidden_layers": _count(state_dict, r"text_encoder\.encoder\.layer\.(\d+)\."),
            "intermediate_size": shape["text_encoder.encoder.layer.0.intermediate.dense.weight"][0],
            "max_position_embeddings": shape["text_encoder.embeddings.position_embeddings.weight"][0],
            "type_vocab_size": state_dict[TOKEN_TYPE_TABLE].shape[0] if TOKEN_TYPE_TABLE in state_dict else 2,
            "hidden_act": "gelu",
            "layer_norm_eps": 1e-12,
        },
    )


def _count(names: Iterable[str], pattern: str) -> int:
    return 1 + max(int(match[1]) for name in names if (match := re.match(pattern, name)))


def convert_published_state_dict(state_dict: Mapping[str, Tensor], config) -> dict[str, Tensor]:
    """Bring a published state dict to the names and shapes of `FVLMModel(config)`; tensors are views, not copies.

    Args:
        state_dict: Tensors under published names, organs in the order of `config.organs`.
        config: `FVLMConfig` of the model to fill.

    Returns:
        Tensors for `FVLMModel.load_state_dict(..., strict=True)`.

    Raises:
        CheckpointError: If a name is unknown or the number of organ projections is not that of `config.organs`.
    """
    converted, unknown = {}, []
    organs_of: dict[str, list[int]] = {"weight": [], "bias": []}
    for name, tensor in state_dict.items():
        if UNREAD.fullmatch(name):
            continue
        if match := ORGAN_PROJECTION.fullmatch(name):
            organs_of[match[2]].append(int(match[1]))
            converted[f"organ_projection.{match[2]}_{match[1]}"] = tensor
        # A name that does not come back as itself is not published: it may be ours, beside the published one.
        elif (ours := converted_name(name)) is None or published_name(ours) != name:
            unknown.append(name)
        else:
            converted[ours] = tensor
    if unknown:
        raise CheckpointError(
            f"{listed(unknown)}: no parameter of a published fVLM checkpoint, and no known leftover. Nothing is "
            "converted, since what such a tensor did would be lost."
        )
    for kind, indices in organs_of.items():
        if sorted(indices) != list(range(len(config.organs))):
            raise CheckpointError(
                f"the checkpoint has vision_projs.N.{kind} for N in {sorted(indices)}, but config.organs names "
                f"{len(config.organs)}: {config.organs}. Give the organs the checkpoint was trained on, in order."
            )
    converted[POSITIONS] = converted[POSITIONS].squeeze(0)
    if config.text_token_types:
        words = converted["text_model.embeddings.word_embeddings.weight"]
        converted[TOKEN_TYPES] = words.new_zeros(config.text_config.type_vocab_size, words.shape[1])
    return converted


def check_against_model(converted: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Refuse tensors that are not exactly those of the model, and name them as the checkpoint does.

    Args:
        converted: Tensors under our names.
        expected: The model's state dict; tensors without data will do.

    Raises:
        CheckpointError: If a tensor is missing, left over, of another shape, of another number type than the rest, or
            not finite.
    """
    faults = []
    if missing := [published_name(name) for name in expected if name not in converted]:
        faults.append(f"missing: {listed(missing)}")
    if extra := [published_name(name) for name in converted if name not in expected]:
        faults.append(f"not of this architecture: {listed(extra)}")
    misshapen = [
        f"{published_name(name)} is {tuple(converted[name].shape)}, expected {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in converted and converted[name].shape != tensor.shape
    ]
    if misshapen:
        faults.append(listed(misshapen))
    types = {tensor.dtype: published_name(name) for name, tensor in converted.items()}
    if len(types) > 1 or not all(dtype.is_floating_point for dtype in types):
        faults.append(f"number types differ: {', '.join(f'{name} is {dtype}' for dtype, name in types.items())}")
    if faults:
        raise CheckpointError(f"the tensors are not those of the model. {'; '.join(faults)}.")
    refuse_non_finite({published_name(name): tensor for name, tensor in converted.items()})


def to_published_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Bring a state dict of `FVLMModel` (or its gradients) back to published names and shapes.

    The inverse of `convert_published_state_dict`, but for what that leaves behind.
    """
    return {
        published_name(name): tensor[None] if name == POSITIONS else tensor
        for name, tensor in state_dict.items()
        if name != TOKEN_TYPES
    }
