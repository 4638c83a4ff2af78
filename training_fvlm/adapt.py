"""Adapting a model that was trained before: which weights move, by what, and at what rate.

(1) `--freeze` leaves parts as they are, by name, glob or range of blocks;
(2) `--lora` leaves a tower as it is and trains a low-rank addition to its linear layers (Hu et al., ICLR 2022,
    https://arxiv.org/abs/2106.09685, by peft). All that stands outside the towers is trained in full: organ pooling,
    projections, temperature, and what a model may have besides;
(3) `--layer_lr_decay`, `--vision_lr_scale` and `--text_lr_scale` give every block a learning rate of its own.

A plan reads names alone, so it can be made of a model without weights (device "meta"), before any data is read. The
adapter is put into the model (`inject_adapter_in_model`), not around it: the trainer, the gradient cache and DDP see
the model they know, with more parameters.
"""

import copy
import difflib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import logging

from modeling_fvlm.dropout import Dropout

from .arguments import TOWERS, FVLMTrainingArguments, SettingsError
from .checkpoint_file import listed

logger = logging.get_logger(__name__)
ADAPTER = "default"  # peft's own name for the only adapter of a model
ADAPTER_FOLDER = "adapter"  # within that of a model or a checkpoint
ADAPTER_FILE = "adapter_model.safetensors"  # as peft names it
PEFT_PREFIX = "base_model.model."  # of every tensor in that file
ATTENTION = re.compile("attention|attn", re.IGNORECASE)
RANGE = re.compile(r"(\d+)-(\d+)")

ADAPTER_CARD = """# What the training added

The low-rank addition, and the parts that were trained in full, without the weights of `{base}` they belong to. Where
the folder above is a finished model, it holds all of it merged and needs none of this. To put it on the base:

```python
from peft import PeftModel
from transformers import AutoConfig, AutoModel

config = AutoConfig.from_pretrained("FOLDER_ABOVE", trust_remote_code=True)  # the organs of this model
base = AutoModel.from_pretrained("BASE", config=config, ignore_mismatched_sizes=True, trust_remote_code=True)
model = PeftModel.from_pretrained(base, "FOLDER_ABOVE/adapter")
```
"""


@dataclass(frozen=True)
class Plan:
    """What is to become of a model's weights, by name.

    Attributes:
        trained: Parameters that are trained in full.
        lora_modules: Linear layers that get an addition; their own weights are not trained.
    """

    trained: frozenset[str]
    lora_modules: tuple[str, ...]


@dataclass(frozen=True)
class Adaptation:
    """What became of a model.

    Attributes:
        is_lora: True if it carries an adapter.
        base: What it is to be called that the adapter belongs to.
        digest: Hash of the weights that are not trained: an adapter is worth nothing on others. None without one.
        num_parameters: Without the adapter, which is merged at the end.
        num_trained: Of the adapter and of all that is trained in full.
        trained_by_part: part of the model -> the same.
        parameters_by_part: part of the model -> its parameters without the adapter.
    """

    is_lora: bool
    base: str
    digest: str | None
    num_parameters: int
    num_trained: int
    trained_by_part: dict[str, int]
    parameters_by_part: dict[str, int]

    @property
    def is_whole(self) -> bool:
        """True if every weight is trained, as without any of these options."""
        return not self.is_lora and self.num_trained == self.num_parameters

    def describe(self, args: FVLMTrainingArguments) -> dict[str, Any] | None:
        """What run.json says of it, beside the settings; None if every weight is trained."""
        if self.is_whole:
            return None
        lora = None
        if self.is_lora:
            lora = {"towers": args.lora, "targets": args.lora_targets, "rank": args.lora_rank, "alpha": args.lora_alpha}
            lora |= {"dropout": args.lora_dropout, "base": self.base, "base_digest": self.digest}
        return {"trained_parameters": self.num_trained, "by_part": self.trained_by_part, "lora": lora}

    def __str__(self) -> str:
        parts = [
            f"{part} {trained:,} of {self.parameters_by_part[part]:,}" for part, trained in self.trained_by_part.items()
        ]
        share = 100 * self.num_trained / self.num_parameters
        return (
            f"{self.num_trained:,} parameters are trained, {share:.2f} % of {self.num_parameters:,}: {'; '.join(parts)}"
        )


# Plans


def plan_adapting(model: PreTrainedModel, args: FVLMTrainingArguments) -> Plan:
    """Find what the options ask for in a model, which need not have weights (device "meta").

    Raises:
        SettingsError: If a name is not there, nothing is left to train, or an option has no effect.
    """
    names = [name for name, _ in model.named_parameters()]
    frozen = set()
    for pattern in args.freeze:
        frozen |= set(matching_names(pattern, names))
    lora_modules: list[str] = []
    for tower in args.lora:
        found = [
            name
            for name in _linear_layers_of_blocks(model, TOWERS[tower])
            if args.lora_targets == "all" or ATTENTION.search(name.removeprefix(f"{TOWERS[tower]}."))
        ]
        left = [name for name in found if f"{name}.weight" not in frozen]
        if not left:
            reason = f"--freeze leaves none of its {len(found)} layers" if found else "no layer of it is known to peft"
            raise SettingsError(f"--lora {tower}: nothing of {TOWERS[tower]} is left to adapt: {reason}.")
        lora_modules += left
    adapted = tuple(f"{TOWERS[tower]}." for tower in args.lora)
    trained = frozenset(name for name in names if name not in frozen and not name.startswith(adapted))
    if not trained and not lora_modules:
        raise SettingsError(f"--freeze {' '.join(args.freeze)} leaves nothing to train.")

    moving = {tower for tower, module in TOWERS.items()
              if tower in args.lora or any(name.startswith(f"{module}.") for name in trained)}  # fmt: skip
    for tower, scale in (("vision", args.vision_lr_scale), ("text", args.text_lr_scale)):
        if scale != 1 and tower not in moving:
            raise SettingsError(f"--{tower}_lr_scale {scale} has no effect: all of {TOWERS[tower]} is frozen.")
    if args.layer_lr_decay != 1 and not moving:
        raise SettingsError(f"--layer_lr_decay {args.layer_lr_decay} has no effect: both towers are frozen.")
    if args.layer_lr_decay != 1:
        for tower in moving:
            _name_of_blocks(model.get_submodule(TOWERS[tower]), TOWERS[tower])
    return Plan(trained, tuple(lora_modules))


def matching_names(pattern: str, names: Iterable[str]) -> list[str]:
    """Parameters that a word of `--freeze` means: `text_model`, `*.bias`, `vision_model.blocks.0-5`.

    A word means what it names and all below it; `*` stands for any letters, dots too; `0-5` for each of these numbers.

    Raises:
        SettingsError: If it, or one of its numbers, names nothing.
    """
    names = list(names)
    found: dict[str, None] = {}
    for single in _without_ranges(pattern):
        expression = re.escape(single).replace(r"\*", ".*").replace(r"\?", ".")
        of_single = [name for name in names if re.fullmatch(rf"{expression}(\..*)?", name)]
        if not of_single:
            raise SettingsError(f"--freeze {pattern}: the model has no {single!r}{_nearest(single, names)}.")
        found |= dict.fromkeys(of_single)
    return list(found)


def _without_ranges(pattern: str) -> Iterator[str]:
    """`a.0-2.b` -> `a.0.b`, `a.1.b`, `a.2.b`."""
    parts = pattern.split(".")
    for place, part in enumerate(parts):
        if bounds := RANGE.fullmatch(part):
            first, last = int(bounds[1]), int(bounds[2])
            if first > last:
                raise SettingsError(f"--freeze {pattern}: the range {part} is empty; the lower number comes first.")
            for number in range(first, last + 1):
                yield from _without_ranges(".".join([*parts[:place], str(number), *parts[place + 1 :]]))
            return
    yield pattern


def _nearest(pattern: str, names: list[str]) -> str:
    """The hint of an error message: how many blocks there are, or the name that is nearest."""
    parts = pattern.split(".")
    for place, part in enumerate(parts):
        if part.isdecimal():
            above = ".".join([*parts[:place], ""])
            numbers = {int(rest[0]) for name in names if name.startswith(above)
                       and (rest := name.removeprefix(above).split("."))[0].isdecimal()}  # fmt: skip
            if numbers and int(part) not in numbers:
                return f"; {above[:-1]} has {min(numbers)}-{max(numbers)}"
    known = dict.fromkeys(
        ".".join(name.split(".")[:depth]) for name in names for depth in range(1, name.count(".") + 2)
    )
    matches = difflib.get_close_matches(pattern, list(known), n=1, cutoff=0.0)
    return f"; nearest: {matches[0]!r}"


def _name_of_blocks(tower: nn.Module, where: str) -> str:
    """Name of the list of a tower's blocks within it: the longest list of modules, of equal ones the outermost."""
    lists = {name: len(module) for name, module in tower.named_modules() if isinstance(module, nn.ModuleList)}
    if not lists:
        raise SettingsError(
            f"{where} ({type(tower).__name__}) has no list of blocks: --lora and --layer_lr_decay cannot be used on it."
        )
    return max(lists, key=lists.get)


def _linear_layers_of_blocks(model: nn.Module, tower: str) -> list[str]:
    """Names of the linear layers in a tower's blocks."""
    prefix = f"{tower}.{_name_of_blocks(model.get_submodule(tower), tower)}."
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name.startswith(prefix)]


# Models


def adapt_model(model: PreTrainedModel, args: FVLMTrainingArguments, base: str = "") -> Adaptation:
    """Freeze what is to be frozen, and put the adapter in.

    Fresh adapters come from torch's global generator: seed it first. They add zero until they are trained.

    Args:
        model: An `FVLMModel`, changed in place.
        args: The options.
        base: What the model may be called, for the adapter's files.

    Raises:
        SettingsError: As `plan_adapting`.
    """
    plan = plan_adapting(model, args)
    parameters = [
        (parameter, parameter.requires_grad and name in plan.trained) for name, parameter in model.named_parameters()
    ]
    if plan.lora_modules:
        _put_adapter(model, plan.lora_modules, args)
    for parameter, is_trained in parameters:  # peft froze them all
        parameter.requires_grad_(is_trained)
    _warn_of_graphs_below(model)

    own = {name: parameter for name, parameter in model.named_parameters() if not is_of_adapter(name)}
    trained_by_part = dict.fromkeys((name for name, _ in model.named_children()), 0)
    parameters_by_part = dict(trained_by_part)
    for name, parameter in model.named_parameters():
        part = name.split(".")[0]
        trained_by_part[part] += parameter.numel() * parameter.requires_grad
        parameters_by_part[part] += parameter.numel() * (name in own)
    is_lora = bool(plan.lora_modules)
    return Adaptation(
        is_lora=is_lora,
        base=base,
        digest=_digest(own) if is_lora else None,
        num_parameters=sum(parameters_by_part.values()),
        num_trained=sum(trained_by_part.values()),
        trained_by_part=trained_by_part,
        parameters_by_part=parameters_by_part,
    )


def is_of_adapter(name: str) -> bool:
    """True for the name of a parameter that `--lora` added."""
    return ".lora_" in name


def has_adapter(model: nn.Module) -> bool:
    """True if `--lora` added something to the model and it has not been merged."""
    return any(is_of_adapter(name) for name, _ in model.named_parameters())


def _put_adapter(model: PreTrainedModel, modules: tuple[str, ...], args: FVLMTrainingArguments) -> None:
    """Put low-rank additions beside linear layers, and freeze all other weights."""
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise SettingsError(f"--lora needs the package peft, which cannot be imported: {error}.") from error
    config = LoraConfig(
        r=args.lora_rank,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        target_modules=list(modules),
    )
    inject_adapter_in_model(config, model, adapter_name=ADAPTER)
    for name, module in list(model.named_modules()):
        if ".lora_dropout." in name and type(module) is nn.Dropout:
            model.set_submodule(name, Dropout(module.p))  # the model's own: faster on a CPU


def _warn_of_graphs_below(model: PreTrainedModel) -> None:
    """Tell of frozen blocks that cost memory all the same, because something below them is trained.

    A tower without a trained weight runs without a graph, and so do frozen blocks at its bottom.
    """
    for tower in TOWERS.values():
        parameters = dict(model.get_submodule(tower).named_parameters())
        trained = {name for name, parameter in parameters.items() if parameter.requires_grad}
        if len(trained) in (0, len(parameters)) or has_adapter(model.get_submodule(tower)):
            continue
        depths, num_blocks = _depths(model, tower)
        lowest = next(name for name in parameters if name in trained)
        moving = {depths[f"{tower}.{name}"] for name in trained}
        still = [depth - 1 for depth in range(depths[f"{tower}.{lowest}"] + 1, num_blocks + 1) if depth not in moving]
        if still:
            logger.warning(
                "--freeze: blocks %s of %s are frozen, but %s below them is trained: their activations are kept for "
                "its gradient. Freeze what lies below as well, and they cost no memory.",
                ", ".join(map(str, still)), tower, lowest,
            )  # fmt: skip


def _digest(parameters: dict[str, Tensor]) -> str:
    """Hash of the towers' weights that are not trained."""
    digest = xxhash.xxh3_64()
    for name in sorted(parameters):
        if name.split(".")[0] in TOWERS.values() and not parameters[name].requires_grad:
            digest.update(name.replace(".base_layer.", ".").encode())
            digest.update(parameters[name].detach().float().cpu().reshape(-1).numpy())
    return digest.hexdigest()


# Adapters in files


def adapter_state(model: PreTrainedModel) -> dict[str, Tensor]:
    """The tensors that make the base model this one, under the names that peft gives them.

    Beside the additions: all that stands outside the towers, whether trained or not (organs may have been added), and a
    tower without additions that is trained. They are the model's own, not copies.
    """
    whole = modules_in_full(model)
    return {
        # DeepSpeed gives the temperature an axis (scaling.py); the base has none.
        PEFT_PREFIX + name.replace(f".{ADAPTER}.", "."): tensor.view(()) if name == "temperature.value" else tensor
        for name, tensor in model.state_dict().items()
        if is_of_adapter(name) or name.split(".")[0] in whole
    }


def modules_in_full(model: PreTrainedModel) -> list[str]:
    """Parts of the model that an adapter's file holds whole."""
    return [
        name
        for name, module in model.named_children()
        if not has_adapter(module)
        and (name not in TOWERS.values() or any(parameter.requires_grad for parameter in module.parameters()))
    ]


def save_adapter(model: PreTrainedModel, adaptation: Adaptation, folder: str | Path) -> None:
    """Write what `PeftModel.from_pretrained` puts on the base, and a README.md that says how.

    Args:
        model: With an adapter.
        adaptation: From `adapt_model`.
        folder: Made if it does not exist.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in adapter_state(model).items()}
    # One entry: of several safetensors writes the order at random, and the same adapter would be other bytes.
    save_file(tensors, folder / ADAPTER_FILE, metadata={"base_digest": adaptation.digest})
    config = copy.copy(model.peft_config[ADAPTER])
    config.base_model_name_or_path = adaptation.base
    config.target_modules = sorted(config.target_modules)  # a set: every run would write another order
    config.modules_to_save = modules_in_full(model)
    config.inference_mode = True
    config.save_pretrained(folder)
    text = ADAPTER_CARD.format(base=adaptation.base or "what the training started from")
    (folder / "README.md").write_text(text, encoding="utf-8")


@torch.no_grad()
def load_adapter(model: PreTrainedModel, adaptation: Adaptation, folder: str | Path) -> None:
    """Take the tensors that `save_adapter` wrote into a model that was adapted by the same settings.

    Raises:
        SettingsError: If there are none, they are another adapter's, or belong to another base.
    """
    file = Path(folder) / ADAPTER_FILE
    if not file.is_file():
        raise SettingsError(f"{folder} holds no adapter ({ADAPTER_FILE}): it is of a run without --lora.")
    there = adapter_state(model)
    with safe_open(file, "pt") as opened:
        names = set(opened.keys())
        digest = (opened.metadata() or {}).get("base_digest")
        if digest != adaptation.digest:
            raise SettingsError(
                f"{folder}: the adapter was trained on other weights than those here ({digest} there, "
                f"{adaptation.digest} here). Give the same --init_from, unchanged."
            )
        if differing := sorted(name.removeprefix(PEFT_PREFIX) for name in names ^ set(there)):
            raise SettingsError(
                f"{folder}: the adapter is of another model or other --lora settings: {listed(differing, most=3)}."
            )
        for name, tensor in there.items():
            tensor.copy_(opened.get_tensor(name))


@torch.no_grad()
def merged_state_dict(model: PreTrainedModel) -> dict[str, Tensor]:
    """The weights of a plain model that does what this one does with its adapter, which stays where it is.

    Raises:
        ValueError: If an addition is not finite.
    """
    merged = {}
    for name, tensor in model.state_dict().items():
        layer, of_base, parameter = name.partition(".base_layer.")
        if of_base and parameter == "weight":
            addition = model.get_submodule(layer).get_delta_weight(ADAPTER)
            if not bool(addition.isfinite().all()):
                raise ValueError(f"what --lora added to {layer} is not finite: continue from an earlier checkpoint.")
            tensor = tensor + addition.to(tensor.dtype)
        if not is_of_adapter(name):
            merged[f"{layer}.{parameter}" if of_base else name] = tensor
    return merged


# Learning rates


def learning_rate_scales(model: PreTrainedModel, args: FVLMTrainingArguments) -> dict[str, float]:
    """By what each parameter's learning rate is multiplied: 1 outside the towers.

    Of a tower of N blocks, block i (from 0) has `scale * decay ** (N - i)`, what stands below the blocks
    `scale * decay ** (N + 1)`, and what stands above them (the last norm) `scale`.

    Source:
        He et al., "Masked autoencoders are scalable vision learners", CVPR 2022, as in
        https://github.com/facebookresearch/mae/blob/be47fef7a727943547afb0c670cf1b26034c3c89/util/lr_decay.py
    """
    scales = {name: 1.0 for name, _ in model.named_parameters()}
    for tower, of_tower in (("vision", args.vision_lr_scale), ("text", args.text_lr_scale)):
        if args.layer_lr_decay == 1:
            scales |= {name: of_tower for name in scales if name.startswith(f"{TOWERS[tower]}.")}
        else:
            depths, num_blocks = _depths(model, TOWERS[tower])
            scales |= {
                name: of_tower * args.layer_lr_decay ** (num_blocks + 1 - depth) for name, depth in depths.items()
            }
    return scales


def _depths(model: PreTrainedModel, tower: str) -> tuple[dict[str, int], int]:
    """How high each parameter of a tower stands, and the number N of its blocks: 0 below them, i + 1 in block i, N + 1
    above. Below and above is what is registered before the first block and after the last.
    """
    blocks = f"{tower}.{_name_of_blocks(model.get_submodule(tower), tower)}"
    num_blocks = len(model.get_submodule(blocks))
    depths, depth = {}, 0
    for name, _ in model.named_parameters():
        if name.startswith(f"{blocks}."):
            depth = int(name.removeprefix(f"{blocks}.").split(".")[0]) + 1
        elif depth:
            depth = num_blocks + 1
        if name.startswith(f"{tower}."):
            depths[name] = depth
    return depths, num_blocks


def parameter_groups(
    model: PreTrainedModel, args: FVLMTrainingArguments, decayed: Iterable[str]
) -> list[dict[str, Any]] | None:
    """Groups for the optimizer, each of one learning rate and one weight decay; None where all rates are the same.

    Every schedule multiplies the rate of each group. The groups of the highest rate come first: the log shows that of
    the first.

    Args:
        model: Whose parameters that need a gradient are grouped.
        args: Learning rate, weight decay and the scales.
        decayed: Names of the parameters under weight decay.
    """
    decayed = set(decayed)
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    scales = learning_rate_scales(model, args)
    if all(scales[name] == 1 for name, _ in trained):
        return None
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in trained:
        groups.setdefault((scales[name], name in decayed), []).append(parameter)
    return [
        {
            "params": groups[scale, is_decayed],
            "lr": args.learning_rate * scale,
            "weight_decay": args.weight_decay if is_decayed else 0.0,
        }
        for scale, is_decayed in sorted(groups, reverse=True)
    ]
