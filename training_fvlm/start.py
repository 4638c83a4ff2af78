"""A training that starts from a model's folder instead of fresh weights: `--init_from DIR`.

The folder is one that `python -m training_fvlm.convert` or an earlier training wrote. Steps:

(1) read its config and tokenizer, (2) refuse what does not fit the split (organs, spacing, margin) or its weights (the
recipe's model section), before any volume is read, (3) load the weights, (4) bring the organs into the split's order.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from modeling_fvlm import FVLMConfig, FVLMModel, FVLMProcessor
from modeling_fvlm.configuration_fvlm import FVLMVisionConfig
from modeling_fvlm.modeling_fvlm import load_whole_model

from .arguments import DERIVED_MODEL_KEYS, SettingsError, own_fields, read_folder_config
from .data import SplitDescription, check_padding
from .text import check_vocabulary

logger = logging.get_logger(__name__)

# Config fields behind which no weight stands and that may be other than the folder's. All the rest is architecture.
FREE_FIELDS = (
    "windows",
    "pooling_dropout",
    "max_text_length",
    "temperature_init",
    "temperature_min",
    "temperature_max",
    "organ_reduction",
    "completeness",
    "min_organ_voxels",
    "initializer_range",
)
FREE_VISION_FIELDS = ("hidden_dropout", "attention_dropout", "token_selection", "initializer_range")
# Of the split, and compared with the folder by themselves.
SPLIT_FIELDS = ("organ_set", "spacing", "margin_voxels", "preprocessing")


@dataclass(frozen=True)
class Start:
    """Where a training starts from.

    Attributes:
        folder: The model's folder.
        config: Its config.
        tokenizer: Its tokenizer.
        model: The model section for `build_config`: the folder's architecture with the recipe's free fields.
    """

    folder: Path
    config: FVLMConfig
    tokenizer: PreTrainedTokenizerBase
    model: dict[str, Any]

    def load(self, config: FVLMConfig) -> FVLMModel:
        """(3) and (4): the folder's weights in a model of `config`, whose organs may stand in another order.

        Raises:
            SettingsError: If the weights cannot be read or are not those of the folder's config.
        """
        try:
            model = load_whole_model(self.folder, config=config, use_safetensors=True)
        except OSError as error:
            raise SettingsError(f"--init_from {self.folder}: the weights cannot be loaded: {error}") from error
        except ValueError as error:
            raise SettingsError(f"--init_from {self.folder}: {error}") from error
        order = [self.config.organs.index(organ) for organ in config.organs]
        if order != sorted(order):
            logger.warning("--init_from: organs brought from %s into the split's order", self.config.organs)
            _permute_organs(model, order)
        return model


def read_start(folder: str, model: dict[str, Any], description: SplitDescription) -> Start:
    """(1) and (2).

    Args:
        folder: The model's folder.
        model: The recipe's model section.
        description: How the split was made.

    Raises:
        SettingsError: If the folder holds no fVLM, or the recipe or the split ask for another one.
    """
    path = Path(folder)
    # (1)
    config = read_folder_config(folder, "--init_from")
    try:
        tokenizer = FVLMProcessor.from_pretrained(path).tokenizer
    except Exception as error:  # tokenizers raises errors of its own
        raise SettingsError(f"--init_from {folder}: the processor cannot be read: {error}") from error
    check_vocabulary(tokenizer, f"--init_from {folder}", config.text_config.vocab_size)
    # (2)
    _check_against_split(config, description, folder)
    merged = _merge(model, config, folder)
    check_padding(
        description, merged["vision_config"]["volume_size"], merged["windows"], f"--init_from {folder}, for the split"
    )
    return Start(path, config, tokenizer, merged)


def _check_against_split(config: FVLMConfig, description: SplitDescription, folder: str) -> None:
    """Refuse a split of other organs or of another geometry."""
    missing = [organ for organ in description.organs if organ not in config.organs]
    extra = [organ for organ in config.organs if organ not in description.organs]
    if missing or extra:
        raise SettingsError(
            f"--init_from {folder} has {len(config.organs)} organs, the split has {len(description.organs)}: the model "
            f"lacks {missing or 'none'} of the split's, the split lacks {extra or 'none'} of the model's. Build the "
            "split with the model's organs."
        )
    for name, unit in (("spacing", "mm"), ("margin_voxels", "voxels")):
        saved, built = getattr(config, name), getattr(description, name)
        if not np.allclose(saved, built, atol=1e-4):
            raise SettingsError(
                f"--init_from {folder} was trained with {name} {tuple(saved)} {unit}, the split has {tuple(built)} "
                f"{unit} (depth, height, width). Build the split again with the model's."
            )
    if config.preprocessing != description.preprocessing:
        raise SettingsError(
            f"--init_from {folder} expects {config.preprocessing} preprocessing, the split's is "
            f"{description.preprocessing}. Build the split again with `--preprocessing {config.preprocessing}`, or, if "
            f"the folder was converted, convert again with `--preprocessing {description.preprocessing}`."
        )


def _merge(model: dict[str, Any], config: FVLMConfig, folder: str) -> dict[str, Any]:
    """The folder's architecture with what the recipe's model section may set; refuse the rest where it differs."""
    names = [name for name in own_fields(FVLMConfig) if name not in (*DERIVED_MODEL_KEYS, *SPLIT_FIELDS)]
    saved = {name: getattr(config, name) for name in names if name != "vision_config"}
    saved_vision = {name: getattr(config.vision_config, name) for name in own_fields(FVLMVisionConfig)}
    asked = {name: value for name, value in model.items() if name in saved}
    asked_vision = dict(model.get("vision_config") or {})
    if "windows" in asked and len(asked["windows"]) != len(config.windows):
        raise SettingsError(
            f"model.windows: {len(asked['windows'])} here, {len(config.windows)} in --init_from {folder}: its patch "
            f"embedding reads {len(config.windows)} channels."
        )
    for section, here, there, free in (
        ("model", asked, saved, FREE_FIELDS),
        ("model.vision_config", asked_vision, saved_vision, FREE_VISION_FIELDS),
    ):
        for name, value in here.items():
            if name not in free and _plain(value) != _plain(there[name]):
                raise SettingsError(
                    f"{section}.{name}: {value!r} here, {there[name]!r} in --init_from {folder}, and its weights hang "
                    f"on it. Leave {section}.{name} out; free are {', '.join(free)}."
                )
    merged = {**saved, **asked, "vision_config": {**saved_vision, **asked_vision}}
    if "temperature_init" not in asked:  # the loaded temperature is put into new limits at the first step as well
        limits = merged["temperature_min"], merged["temperature_max"]
        merged["temperature_init"] = min(max(config.temperature_init, limits[0]), limits[1])
    elif asked["temperature_init"] != config.temperature_init:
        logger.warning("--init_from %s brings its temperature: model.temperature_init has no effect.", folder)
    if set(model.get("text_encoder") or {}) - {"attention_dropout"}:
        logger.warning("--init_from %s brings its text encoder and tokenizer: model.text_encoder is not read.", folder)
    return merged


def _plain(value: Any) -> Any:
    """A value as config.json holds it: tuples are lists."""
    return json.loads(json.dumps(value))


@torch.no_grad()
def _permute_organs(model: FVLMModel, order: list[int]) -> None:
    """Give every organ index the query and the projection that stood at `order[index]`."""
    model.organ_pooling.query_tokens.copy_(model.organ_pooling.query_tokens[order])
    parameters = model.organ_projection.organ_parameters()
    values = [[parameter.clone() for parameter in parameters[index]] for index in order]
    for organ_parameters, organ_values in zip(parameters, values, strict=True):
        for parameter, value in zip(organ_parameters, organ_values, strict=True):
            parameter.copy_(value)
