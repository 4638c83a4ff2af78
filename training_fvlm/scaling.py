"""Many processes: what was started, told in a line, and what must be done to the model before its weights are sharded.

Launchers start fewer processes than they were asked for without a word (`accelerate launch --cpu`, a configuration for
GPUs where there are none, `srun` without a launcher); each would then train alone, with a contrast of its own patients,
and write into the folder of the others. That is refused here.

FSDP2 and DeepSpeed ZeRO-3 shard the weights themselves, so every rank must call every part of the model equally often.
"""

import contextlib
import functools
import os
from collections.abc import Iterator, Mapping
from typing import Any

from accelerate.utils import DistributedType
from torch import nn
from transformers import PreTrainedModel

from modeling_fvlm.text_batches import PACKABLE_MODELS

from .arguments import DataArguments, FVLMTrainingArguments, SettingsError

# Who says in the environment how many processes were started.
COUNTS = {
    "WORLD_SIZE": "the launcher",
    "SLURM_STEP_NUM_TASKS": "srun",
    "OMPI_COMM_WORLD_SIZE": "mpirun",
    "PMI_SIZE": "mpirun",
}


def describe_launch(args: FVLMTrainingArguments) -> str:
    """How many processes contrast how many patients, as the first line of a run's log says it."""
    one_of = "1 process" if args.world_size == 1 else f"{args.world_size} processes{_strategy(args)}"
    group = f"{args.group_size} patients"
    if args.world_size > 1:
        group += f", {args.group_size // args.world_size} of each process"
    if args.is_cached:
        group += f", in chunks of {args.micro_batch_size}"
    steps = args.gradient_accumulation_steps
    number = f"averages {steps} contrasts, each of" if steps > 1 else "contrasts"
    return f"{one_of} on {args.device.type}, {args.computed_precision}: a step {number} {group}."


def _strategy(args: FVLMTrainingArguments) -> str:
    if uses_fsdp(args):
        return " under FSDP2"
    if args.deepspeed_plugin is not None:
        return f" under DeepSpeed ZeRO-{args.deepspeed_plugin.zero_stage}"
    return ""


def uses_fsdp(args: FVLMTrainingArguments, environment: Mapping[str, str] = os.environ) -> bool:
    """Whether FSDP was asked for, by the launcher or by an argument."""
    return args.fsdp_plugin_args is not None or environment.get("ACCELERATE_USE_FSDP", "").lower() == "true"


def shards_weights(args: FVLMTrainingArguments) -> bool:
    """Whether a process holds a part of the weights only."""
    return uses_fsdp(args) or (args.deepspeed_plugin is not None and args.deepspeed_plugin.zero_stage == 3)


def check_launch(args: FVLMTrainingArguments, environment: Mapping[str, str] = os.environ) -> None:
    """Refuse a process that trains alone, or without sharding, although the launcher was asked for something else.

    Raises:
        SettingsError: If the launcher has started it otherwise than it was told to.
    """
    alone = (
        "would train by itself, contrast its own patients only, and write into the --output_dir of the others. See "
        "that every process sees its GPU (CUDA_VISIBLE_DEVICES). On CPUs: ACCELERATE_USE_CPU=true accelerate launch "
        "--config_file hub_configs/accelerate/cpu_two.yaml train_fvlm.py ..."
    )
    if args.world_size == 1:
        for name, launcher in COUNTS.items():
            if int(environment.get(name) or 1) > 1:
                by_slurm = " srun starts no launcher by itself: hub_configs/slurm/train_many_nodes.sh." * (
                    launcher == "srun"
                )
                raise SettingsError(
                    f"{launcher} started {environment[name]} processes ({name}), but this one found no other: each "
                    f"{alone}{by_slurm}"
                )
        # `accelerate launch` names the meeting point of several processes, and then starts one alone.
        if "ACCELERATE_MIXED_PRECISION" in environment and "MASTER_PORT" in environment and "RANK" not in environment:
            raise SettingsError(
                "accelerate launch was asked for several processes and started this one alone, as it does with --cpu, "
                "use_cpu: true, the type MULTI_CPU, and without a GPU. Two processes on CPUs: ACCELERATE_USE_CPU=true "
                "accelerate launch --config_file hub_configs/accelerate/cpu_two.yaml train_fvlm.py ... If one process "
                "is what you want: --num_processes 1, and no MASTER_PORT in the environment."
            )
    if args.distributed_state.distributed_type == DistributedType.MULTI_CPU:
        for asked, name in ((uses_fsdp(args, environment), "FSDP"), (args.deepspeed_plugin is not None, "DeepSpeed")):
            if asked:
                raise SettingsError(
                    f"{name} was asked for, but with --use_cpu or ACCELERATE_USE_CPU accelerate leaves it out without "
                    "a word. On CPUs take hub_configs/accelerate/cpu_two.yaml."
                )


def check_sharding(
    data: DataArguments, args: FVLMTrainingArguments, environment: Mapping[str, str] = os.environ
) -> None:
    """Refuse what cannot work under FSDP2 or DeepSpeed, before any data is read.

    Raises:
        SettingsError: If something was asked for that cannot.
    """
    name = _strategy(args).removeprefix(" under ")
    if args.lora and name:
        raise SettingsError(
            f"--lora and {name} exclude each other: an adapter is small, and its frozen base needs no optimizer state. "
            "Train under DDP."
        )
    if not shards_weights(args):
        return
    if data.eval_tasks:
        raise SettingsError(
            f"--eval_tasks and {name} exclude each other: the first process scores alone, with a part of the weights. "
            "Leave it out and run eval_fvlm.py on the folder, or train under DDP or ZeRO-1."
        )
    if not uses_fsdp(args, environment):
        return
    version = (args.fsdp_plugin_args or {}).get("fsdp_version") or int(environment.get("FSDP_VERSION", "1"))
    if version != 2:
        raise SettingsError(
            f"FSDP version {version} is not for this model: fsdp_version: 2, as in hub_configs/accelerate/fsdp2.yaml."
        )
    if environment.get("FSDP_CPU_RAM_EFFICIENT_LOADING", "").lower() == "true":
        raise SettingsError(
            "fsdp_cpu_ram_efficient_loading must be false (accelerate launch sets true unless told otherwise): the "
            "other processes would build their model from empty weights."
        )


@contextlib.contextmanager
def built_whole(args: FVLMTrainingArguments) -> Iterator[None]:
    """Build models whole while the block lasts: under ZeRO-3 transformers would make them of empty weights.

    The first steps of a run read weights (--init_from), change them (the centred start) and need all of them.
    """
    if args.deepspeed_plugin is None:
        yield
        return
    from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config

    config = args.hf_deepspeed_config if args.deepspeed else args.deepspeed_plugin.dschf
    unset_hf_deepspeed_config()
    try:
        yield
    finally:
        set_hf_deepspeed_config(config)


def prepare_for_sharding(trainer: Any) -> None:
    """Fit model and plugin to each other; before the optimizer is made.

    FSDP2 and DeepSpeed take no parameter without an axis, such as the temperature. FSDP2 is told to leave it whole on
    every rank; its gradient needs no exchange, since all ranks compute the same loss of the same gathered batch. For
    DeepSpeed it gets an axis, which is taken away again where a model is saved.

    Raises:
        SettingsError: If the text encoder would be called more often on one rank than on another.
    """
    model = trainer.accelerator.unwrap_model(trainer.model)
    if shards_weights(trainer.args):
        _check_text_encoder(model)
    without_axis = [
        module for module in model.modules() if any(parameter.ndim == 0 for parameter in module.parameters(False))
    ]
    if trainer.is_fsdp_enabled:
        from torch.distributed.fsdp import MixedPrecisionPolicy

        plugin = trainer.accelerator.state.fsdp_plugin
        plugin.ignored_modules = without_axis
        plugin.transformer_cls_names_to_wrap = wrapped_classes(model)
        # Weights that are gathered whole leave a file that others can read.
        plugin.state_dict_config = plugin.optim_state_dict_config = None
        plugin.set_state_dict_type("FULL_STATE_DICT")
        if trainer.args.mixed_precision != "no":
            # FSDP2 would round weights, residual stream and embeddings. Autocast computes as it does under DDP.
            plugin.mixed_precision_policy = MixedPrecisionPolicy()
            model.forward = _autocasting(model.forward, trainer.accelerator)
    elif trainer.is_deepspeed_enabled:
        for module in without_axis:
            for name, parameter in module.named_parameters(recurse=False):
                if parameter.ndim == 0:
                    value = nn.Parameter(parameter.detach().reshape(1), requires_grad=parameter.requires_grad)
                    setattr(module, name, value)


def wrapped_classes(model: PreTrainedModel) -> list[str]:
    """Classes whose modules FSDP2 gathers one by one: the blocks of both towers.

    Not what holds the word embeddings: accelerate wraps those by themselves.
    """
    words = model.get_input_embeddings()
    holders = {type(module).__name__ for module in model.modules() if any(part is words for part in module.modules())}
    return sorted(set(model._no_split_modules) - holders)


def _check_text_encoder(model: PreTrainedModel) -> None:
    text_config, implementation = model.config.text_config, model.text_model.config._attn_implementation
    if text_config.model_type in PACKABLE_MODELS and implementation in ("sdpa", "eager"):
        return
    raise SettingsError(
        f"a text encoder of type {text_config.model_type} with --attn_implementation {implementation} runs as often as "
        "the lengths of a rank's captions ask for, and under FSDP2 or ZeRO-3 the other ranks would wait for it for "
        "ever. Train under DDP or ZeRO-1, or with a BERT and sdpa."
    )


def _autocasting(forward: Any, accelerator: Any) -> Any:
    @functools.wraps(forward)
    def autocast(*args: Any, **kwargs: Any) -> Any:
        with accelerator.autocast():
            return forward(*args, **kwargs)

    return autocast
