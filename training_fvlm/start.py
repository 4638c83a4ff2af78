"""A training that starts from a model's folder instead of fresh weights: `--init_from DIR`.

The folder is one that `python -m training_fvlm.convert` or an earlier training wrote. Steps:

(1) read its config and tokenizer, (2) refuse what does not fit the split (spacing, margin, preparation) or its weights
(the recipe's model section), before any volume is read, (3) load the weights, (4) give every organ of the split its
query and projection: its own, or those of the nearest organ that the model knows (organ_origins.py).
"""

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass, field
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
from .organ_origins import Origin, class_names, organ_origins
from .text import check_vocabulary

logger = logging.get_logger(__name__)

# Config fields behind which no weight stands and that may be other than the folder's. All the rest is architecture.
FREE_FIELDS = (
    "windows",
    "pooling_dropout",
    "max_text_length",
    "max_report_length",
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
        origins: Once loaded: where each organ of the split starts from.
    """

    folder: Path
    config: FVLMConfig
    tokenizer: PreTrainedTokenizerBase
    model: dict[str, Any]
    origins: list[Origin] = field(default_factory=list)

    @property
    def dropped(self) -> list[str]:
        """Organs of the folder that the split lacks."""
        return [organ for organ in self.config.organs if organ not in {origin.organ for origin in self.origins}]

    def load(self, config: FVLMConfig, measure: Callable[[], np.ndarray] | None = None) -> FVLMModel:
        """(3) and (4): the folder's weights in a model of `config`, whose organs may be others, in another order.

        Args:
            config: Of the model to make.
            measure: Gives the centres of the split's organs (`measure_centres`), if it comes to that.

        Raises:
            SettingsError: If the weights cannot be read or are not those of the folder's config.
        """
        has_new_branch = config.volume_pooling != self.config.volume_pooling
        same_weights = set(config.organs) == set(self.config.organs) and not has_new_branch
        try:
            # Strictly, by a config whose weights they must be: the folder's own where the other has more or fewer.
            strict_config = config if same_weights else copy.deepcopy(self.config)
            source = load_whole_model(self.folder, config=strict_config, use_safetensors=True)
            model = source if same_weights else _load_what_fits(self.folder, config)
        except OSError as error:
            raise SettingsError(f"--init_from {self.folder}: the weights cannot be loaded: {error}") from error
        except ValueError as error:
            raise SettingsError(f"--init_from {self.folder}: {error}") from error
        old, new = ({organ: each.organ_classes.get(organ) for organ in each.organs} for each in (self.config, config))
        self.origins[:] = organ_origins(old, new, measure)
        if has_new_branch:
            logger.warning("--init_from %s has no global branch: model.volume_pooling starts afresh.", self.folder)
        if config.organs != self.config.organs:
            self._say_origins(old, new)
            sources = [origin.source for origin in self.origins]
            places = [None if source is None else self.config.organs.index(source) for source in sources]
            _take_organs(model, source, places)
        return model

    def describe_organs(self) -> dict[str, Any] | None:
        """What run.json and the card say of the organs; None where they are the folder's."""
        if set(self.config.organs) == {origin.organ for origin in self.origins}:
            return None
        new = [origin for origin in self.origins if not origin.is_kept]
        return {
            "kept": [origin.organ for origin in self.origins if origin.is_kept],
            "new": {origin.organ: {"from": origin.source, "because": origin.reason} for origin in new},
            "dropped": self.dropped,
        }

    def _say_origins(self, old: dict[str, Any], new: dict[str, Any]) -> None:
        """Tell which organ took which; `old` and `new` are the classes of each organ."""
        kept = [origin.organ for origin in self.origins if origin.is_kept]
        logger.warning(
            "--init_from: %d of the model's %d organs are of the split and keep query and projection: %s",
            len(kept), len(self.config.organs), ", ".join(kept) or "none",
        )  # fmt: skip
        for organ in kept:
            if old[organ] and new[organ] and not class_names(organ, old[organ]) & class_names(organ, new[organ]):
                logger.warning(
                    "--init_from: %s is made of other structures in the split (%s) than in the model (%s): is it the "
                    "same organ? Give it another name in the organ set if not.",
                    organ, ", ".join(sorted(class_names(organ, new[organ]))),
                    ", ".join(sorted(class_names(organ, old[organ]))),
                )  # fmt: skip
        for origin in self.origins:
            if not origin.is_kept:
                logger.warning("--init_from: new organ: %s", origin)
        if self.dropped:
            logger.warning("--init_from: organs that the split lacks are dropped: %s", ", ".join(self.dropped))


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
    """Refuse a split of another geometry."""
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
            if name == "volume_pooling" and there[name] == "none":  # a branch more: its weights start afresh
                continue
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


def _load_what_fits(folder: Path, config: FVLMConfig) -> FVLMModel:
    """The folder's weights in a model of `config`; those it lacks, or has in another shape, are fresh.

    The folder was read strictly before: what differs are the organs and the global branch.
    """
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # or a table of every organ's fresh weights, most of which are not fresh for long
    try:
        return FVLMModel.from_pretrained(
            folder, config=config, dtype=torch.float32, use_safetensors=True, ignore_mismatched_sizes=True
        )
    finally:
        logging.set_verbosity(verbosity)


@torch.no_grad()
def _take_organs(model: FVLMModel, source: FVLMModel, places: list[int | None]) -> None:
    """Give every organ the query and the projection that stand at its place in `source`; None: leave it as it is."""
    # Copied first: source and model may be one.
    given = {index: [value.clone() for value in _of_organ(source, place)] for index, place in enumerate(places)
             if place is not None}  # fmt: skip
    for index, values in given.items():
        for parameter, value in zip(_of_organ(model, index), values):
            parameter.copy_(value)


def _of_organ(model: FVLMModel, index: int) -> list[torch.Tensor]:
    """What a model holds for one organ: query, projection, and the variance of its loss where there is one."""
    of_organ = [model.organ_pooling.query_tokens[index], *model.organ_projection.organ_parameters()[index]]
    if hasattr(model, "organ_variances"):
        of_organ.append(model.organ_variances.log_variances[index])
    return of_organ
