"""Settings of a training run: a recipe file first, the command line on top of it.

A recipe is YAML with the sections `model`, `data` and `training` (and `name`, `version`, `description`):

    model:     fields of FVLMConfig, with `vision_config` nested and `text_encoder` in place of `text_config`
    data:      fields of DataArguments
    training:  fields of FVLMTrainingArguments, the Trainer's hundred among them

(1) the recipe's values become the defaults of the command line, (2) the command line overrides them, (3) a name that no
section knows is refused with the nearest one that exists, (4) what cannot work together is refused, all before any
data is read. `--model.a.b VALUE` reaches into the model section; `--training.x` and `--data.x` are the same as `--x`.
"""

import argparse
import copy
import difflib
import inspect
import json
import os
import re
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import yaml
from transformers import CONFIG_MAPPING, AutoConfig, HfArgumentParser, TrainingArguments
from transformers.utils import logging

from modeling_fvlm.configuration_fvlm import ATTENTIONS, AXES, FVLMConfig, FVLMVisionConfig
from modeling_fvlm.gemm import BACKENDS
from modeling_fvlm.licences import licence_fields

from .checkpoints import LAST_FILE, is_complete, newest_checkpoint
from .objective_settings import ObjectiveSettings, organ_words
from .overfit import DATA_SETTINGS as OVERFIT_DATA
from .overfit import LOG_EVERY as OVERFIT_LOG_EVERY
from .overfit import TRAINING_SETTINGS as OVERFIT_TRAINING

logger = logging.get_logger(__name__)

RECIPES = Path(__file__).resolve().parent.parent / "hub_configs" / "recipes"
RECIPE_KEYS = ("name", "version", "description", "model", "data", "training")
TEXT_ENCODER_KEYS = ("from_scratch", "vocab_size", "pretrained", "revision", "attention_dropout")
TOWERS = {"vision": "vision_model", "text": "text_model"}
# Written by the run itself: organs and their classes come with the organ set, text_config with the text encoder.
DERIVED_MODEL_KEYS = ("organs", "organ_classes", "text_config")


class SettingsError(ValueError):
    """A recipe or command line that cannot run: the command shows the message and not a traceback."""


class _YamlLoader(yaml.SafeLoader):
    """Safe YAML that reads `2e-3` as the number it is (YAML 1.1 wants `2.0e-3` and gives a string otherwise)."""


_YamlLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def load_yaml(text: str) -> Any:
    """Parse YAML text safely, `2e-3` being a number."""
    return yaml.load(text, Loader=_YamlLoader)  # noqa: S506 - a subclass of SafeLoader


@dataclass
class DataArguments:
    """Where the volumes come from and what becomes of them before the network."""

    _argument_group_name = "recipe and data"

    recipe: str | None = field(
        default=None,
        metadata={"help": "YAML file, or the name of one in hub_configs/recipes, e.g. synthetic_demo."},
    )
    data: str | None = field(
        default=None,
        metadata={"help": "Processed split to train on: folder written by `python -m data_builders`, or a Hub id."},
    )
    data_revision: str | None = field(
        default=None, metadata={"help": "Branch, tag or commit of the data set, when --data is a Hub id."}
    )
    streaming: bool = field(
        default=False,
        metadata={
            "help": "Read --data where it lies, a Hub id or any address that fsspec reads (s3://...), one volume at a "
            "time when its turn comes, instead of downloading the split. Order, crops and resumed runs are those of a "
            "local split. Every epoch fetches every volume again: use --dataloader_num_workers."
        },
    )
    init_from: str | None = field(
        default=None,
        metadata={
            "help": "Start from a folder that `python -m training_fvlm.convert` or an earlier training wrote: its "
            "architecture, weights, text encoder and tokenizer. Organs are found by name and keep their query and "
            "projection; one that the model does not know takes those of its nearest (same TotalSegmentator classes, "
            "else the nearest centre in the split's masks), and those the split lacks are dropped: the log, run.json "
            "and the card say which took which. Spacing, margin and preprocessing must be the split's. The model "
            "section may then change only what holds no weights: dropouts, limits of the temperature, "
            "organ_reduction, completeness, windows and the like. With --resume_from_checkpoint the folder must still "
            "be there: the architecture is read from it."
        },
    )
    train_split: str = field(default="train", metadata={"help": "Name of the split to train on."})
    eval_split: str = field(
        default="validation", metadata={"help": "Name of the split to evaluate on (see --eval_strategy)."}
    )
    max_train_rows: int | None = field(
        default=None, metadata={"help": "Use only the first so many rows (reconstructions) of the training split."}
    )
    max_eval_rows: int | None = field(
        default=None, metadata={"help": "Use only the first so many rows of the evaluation split."}
    )
    random_crop: bool = field(
        default=True,
        metadata={
            "help": "Crop training volumes at a random place, another one each epoch. Off: always the centre. "
            "Evaluation is always centred."
        },
    )
    flip_axes: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Axes (depth, height, width) along which a training volume may be flipped. None by default: a flip "
            "along width makes every `left` in the captions wrong."
        },
    )
    flip_probability: float = field(
        default=0.2, metadata={"help": "Chance of a flip, for each of --flip_axes on its own (published: 0.2)."}
    )
    shuffle_captions: bool = field(
        default=False,
        metadata={
            "help": "The control: give every training patient the captions of another patient. Losses then fall no "
            "lower than what organ and prevalence explain, and zero-shot AUC stays near 0.5."
        },
    )
    window_volumes: int = field(
        default=64,
        metadata={"help": "Training volumes measured for windows whose mean and std are `auto` in the recipe."},
    )
    centring_rows: int = field(
        default=0,
        metadata={
            "help": "Training rows on which the fresh projections are centred before the first step (0: off). "
            "Embeddings of fresh weights share one large component: all cosines start near 1, and organs may sit at "
            "chance for hundreds of steps. Has no effect on a run that is resumed."
        },
    )
    eval_tasks: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Prompt sets (hub_configs/prompts) whose zero-shot macro AUC on the evaluation split is logged at "
            "each evaluation. The first process scores them alone and the others wait for it: with several, keep it "
            "below --ddp_timeout seconds (1800) with --max_eval_rows, or raise that."
        },
    )

    def __post_init__(self) -> None:
        if self.data is None:
            raise SettingsError("--data is missing: a folder written by `python -m data_builders ...`, or a Hub id.")
        if "://" in self.data and not self.streaming:
            raise SettingsError(f"--data {self.data} is an address: add --streaming, or copy the split to a folder.")
        if self.streaming and self.eval_tasks and not os.path.isdir(self.data):
            raise SettingsError(
                "--eval_tasks would download the data set that --streaming is to leave where it is: score the model "
                "with eval_fvlm.py instead."
            )
        for axis in self.flip_axes:
            if axis not in AXES:
                raise SettingsError(f"--flip_axes {axis!r} is no axis; choose from {', '.join(AXES)}.")
        if not 0 <= self.flip_probability <= 1:
            raise SettingsError(f"--flip_probability {self.flip_probability} must lie in [0, 1].")
        for name in ("max_train_rows", "max_eval_rows", "window_volumes"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise SettingsError(f"--{name} {getattr(self, name)} must be at least 1.")
        if self.centring_rows < 0 or self.centring_rows == 1:
            raise SettingsError(f"--centring_rows {self.centring_rows} must be 0 (off) or at least 2.")
        if self.init_from is not None and self.centring_rows:
            raise SettingsError(
                f"--centring_rows {self.centring_rows} is for fresh projections and would undo those of --init_from "
                f"{self.init_from}: add --centring_rows 0."
            )
        if "width" in self.flip_axes:
            logger.warning("--flip_axes width mirrors patients: captions that say left or right become wrong.")


@dataclass
class FVLMTrainingArguments(ObjectiveSettings, TrainingArguments):
    """The Trainer's arguments with the defaults this model needs; each help text names the departure."""

    _argument_group_name = "training (transformers.TrainingArguments)"

    contrastive_batch_size: int | None = field(
        default=None,
        metadata={
            "help": "Patients contrasted with each other, over all processes: what an organ can learn hangs on it, and "
            "at 2 it may be nothing. Those that do not fit into memory together are computed --micro_batch_size at a "
            "time by a gradient cache, with the gradients of the whole for about a third more time. Default: "
            "--per_device_train_batch_size times processes."
        },
    )
    micro_batch_size: int | None = field(
        default=None,
        metadata={
            "help": "Patients per process that are computed at a time, for --contrastive_batch_size: memory hangs on "
            "it, gradients do not. Default: --per_device_train_batch_size."
        },
    )
    held_volumes_gb: float = field(
        default=2.0,
        metadata={
            "help": "Memory per process in which the gradient cache holds volumes between its two passes over a "
            "contrast (a full-size one takes 0.02 GB); what does not fit is read a second time."
        },
    )
    lora: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Towers (vision, text) that keep their weights and learn a low-rank addition to their linear "
            "layers instead: a few hundredths of the weights, of the optimizer's memory and of a checkpoint's size, "
            "and with few patients less is forgotten. For towers that were trained before (--init_from). Pooling, "
            "projections and temperature are trained in full. A tower that is not named is trained in full too, "
            "unless --freeze names it. The finished folder holds the merged weights; `adapter/` in it holds the "
            "addition alone, for peft."
        },
    )
    lora_rank: int = field(
        default=16, metadata={"help": "Rank of --lora's addition: what it can learn grows with it, and its files do."}
    )
    lora_alpha: int = field(
        default=32, metadata={"help": "--lora's addition is multiplied by lora_alpha / lora_rank: its learning rate."}
    )
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout on what --lora's addition reads."})
    lora_targets: Literal["attention", "all"] = field(
        default="attention",
        metadata={
            "help": "Linear layers of the blocks that --lora adds to: those of the attention (queries, keys, values, "
            "output), or `all`, the MLP's as well: about three times the size."
        },
    )
    freeze: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Parts of the model that stay as they are, by name: `text_model`, `vision_model.embeddings "
            "vision_model.blocks.0-5` (a range of blocks), `*.bias` (a glob). A tower that is frozen whole, or from "
            "the bottom up, keeps no activations. To let fresh organs settle first, freeze both towers in a short run "
            "and go on from its folder with --init_from. Dropout goes on in frozen parts."
        },
    )
    layer_lr_decay: float = field(
        default=1.0,
        metadata={
            "help": "Learning rate of a block over that of the block above it, in each tower by itself (0.65 to 0.9 "
            "is usual for a trained ViT): the top block has decay times --learning_rate, embeddings the least, pooling "
            "and projections the full rate. 1: the same rate everywhere. Every schedule is multiplied by it."
        },
    )
    vision_lr_scale: float = field(
        default=1.0, metadata={"help": "Factor of the learning rate in the image tower, beside --layer_lr_decay."}
    )
    text_lr_scale: float = field(
        default=1.0,
        metadata={
            "help": "Factor of the learning rate in the text encoder, beside --layer_lr_decay; 0.1 keeps a pretrained "
            "one near its start. Not 0: that is --freeze text_model."
        },
    )
    weight_decay_everywhere: bool = field(
        default=False,
        metadata={
            "help": "Decay every parameter, as the published run did. Off: norms, biases, position embeddings and the "
            "temperature are left alone."
        },
    )
    skip_inactive_organs: bool = field(
        default=False,
        metadata={
            "help": "Leave the projections of organs that did not enter an optimizer step untouched by it, and "
            "everything if no organ did, as the published run (but for a global branch, which learns in any case). "
            "Off: weight decay and momentum move them all the same."
        },
    )
    published_gradient_scale: bool = field(
        default=False,
        metadata={
            "help": "With W processes divide every gradient by W, but not the temperature's, as the published run: it "
            "gathered without a gradient. Off: the gradient of one process with the whole batch. One process: no "
            "difference."
        },
    )
    attn_implementation: Literal["sdpa", "eager", "flash_attention_2", "flash_attention_3"] = field(
        default="sdpa",
        metadata={
            "help": "Attention of both towers: `sdpa` (PyTorch's fused kernels; with dropout on a CPU our own), "
            "`eager` (written out, slow), or flash attention, which needs a GPU, --bf16 or --fp16 and the flash-attn "
            "package, and has not been run yet. Flash attention 3 drops nothing: set both attention dropouts to 0."
        },
    )
    gemm_backend: Literal["auto", "blas", "onednn"] = field(
        default="auto",
        metadata={
            "help": "Library of the linear layers, in float32 on a CPU only: PyTorch's own `blas`, or `onednn`, which "
            "is faster on some processors. `auto` measures both at the start of a large model (some seconds) and takes "
            "oneDNN if it is faster and rounds as float32 must; the log and run.json tell. A resumed run keeps its own."
        },
    )
    lr_schedule: Literal["trainer", "published"] = field(
        default="trainer",
        metadata={
            "help": "`trainer` takes --lr_scheduler_type; `published` rises linearly from --warmup_start_lr over "
            "--warmup_steps within the first epoch, then falls to --min_lr by a cosine that is constant within an "
            "epoch, over --num_train_epochs (also if --max_steps ends the run earlier)."
        },
    )
    warmup_start_lr: float = field(default=1e-6, metadata={"help": "First learning rate of --lr_schedule published."})
    min_lr: float = field(default=1e-6, metadata={"help": "Where the cosine of --lr_schedule published ends."})
    logging_steps: float = field(
        default=20,
        metadata={
            "help": "Optimizer steps per log line and per row of organ_losses.csv; the last step has one in any case. "
            "Trainer: 500."
        },
    )
    logging_first_step: bool = field(
        default=True, metadata={"help": "A log line after the first step: chance, before anything was learned."}
    )
    alarm_steps: int = field(
        default=200,
        metadata={
            "help": "Optimizer steps after the warm-up from which on the log says which organs are not learning, and "
            "the likely cause (training_fvlm/alarm.py tells by what rule); also in run.json and on the card. 0: never."
        },
    )
    overfit: int | None = field(
        default=None,
        metadata={
            "help": "Sanity check: train on this many patients alone, in one batch, without dropout, flips and random "
            "crops, until they are known by heart or --max_steps are over. 2, 4 and 8 patients of the synthetic set "
            "take 20, 30 and 40 steps of recipe synthetic_demo: leave it some hundred. The last line says `passed`, or "
            "`NOT passed` with the likely cause and where to look; the exit status is 0 or 1. No model is saved."
        },
    )
    logging_nan_inf_filter: bool = field(
        default=False,
        metadata={"help": "Replace a NaN loss by an average in the log. Trainer: True; here such a run stops."},
    )
    save_total_limit: int | None = field(
        default=2, metadata={"help": "Checkpoints kept, the oldest goes first. Trainer: all of them."}
    )
    dataloader_drop_last: bool = field(
        default=True,
        metadata={"help": "Drop the last, smaller batch of an epoch: it contrasts fewer patients. Trainer: False."},
    )
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Must stay off: the collator reads columns that the model does not."}
    )
    ddp_find_unused_parameters: bool | None = field(
        default=False,
        metadata={
            "help": "Let DDP look for parameters a step did not use; needed for a text encoder with weights no caption "
            "reads. Trainer: on, unless activations are checkpointed."
        },
    )
    resume_from_checkpoint: str | None = field(
        default=None,
        metadata={
            "help": "Continue from a checkpoint: `true` for the newest in --output_dir, `auto` for the same but start "
            "afresh if there is none, or a folder. Weights and log lines become those of a run that was never "
            "stopped; another --learning_rate holds from there on, most other settings must stay."
        },
    )
    hub_strategy: str = field(
        default="every_save",
        metadata={
            "help": "When --push_to_hub pushes, and what: `end` the finished model; `every_save` at each checkpoint as "
            "well, each time a whole folder with code, processor, card and curves; `checkpoint` also the checkpoint "
            "with its optimizer state, as last-checkpoint/; `all_checkpoints` each as checkpoint-N/. A Hub that cannot "
            "be reached stops nothing: the next save tries again, and by hand it is python -m training_fvlm.push."
        },
    )
    hub_private_repo: bool | None = field(
        default=True,
        metadata={
            "help": "Keep the repository of --push_to_hub private: one that is public is refused. false publishes the "
            "model, and needs --model_license. Trainer: your account's default."
        },
    )
    model_license: str | None = field(
        default=None,
        metadata={
            "help": "Licence of the weights for the card: an id of the Hub's list, such as cc-by-nc-4.0, or `other` "
            "with a name and a link. Mind those of the data and of the weights it started from."
        },
    )
    model_license_name: str | None = field(
        default=None, metadata={"help": "With --model_license other: a short name, such as hospital-research-terms."}
    )
    model_license_link: str | None = field(
        default=None, metadata={"help": "With --model_license other: web address of the terms."}
    )

    def __post_init__(self) -> None:
        if not self.output_dir:
            raise SettingsError("--output_dir is missing: the folder for checkpoints, losses and the final model.")
        if self.overfit is not None:
            self._set_up_overfit()
        try:
            super().__post_init__()
        except ValueError as error:  # bf16 without a GPU, a strategy without its steps ...
            raise SettingsError(str(error)) from error
        if self.logging_strategy == "no":
            self.logging_first_step = False
        self._settle_contrast()
        if self.remove_unused_columns or not self.dataloader_drop_last:
            raise SettingsError(
                "--remove_unused_columns must be off and --dataloader_drop_last on: the collator reads every column, "
                "and ranks gather batches of one size."
            )
        if self.enable_jit_checkpoint:
            raise SettingsError(
                "--enable_jit_checkpoint is not needed: SIGTERM and SIGUSR1 write a checkpoint in any case."
            )
        if self.train_sampling_strategy not in ("random", "sequential"):
            raise SettingsError(f"--train_sampling_strategy {self.train_sampling_strategy} is not for volumes: random.")
        if self.lr_schedule not in ("trainer", "published"):  # a recipe's value passes by the choices
            raise SettingsError(f"--lr_schedule {self.lr_schedule!r} must be trainer or published.")
        if self.lr_schedule == "published" and not (
            0 <= self.warmup_start_lr <= self.learning_rate and 0 <= self.min_lr <= self.learning_rate
        ):
            raise SettingsError(
                f"--warmup_start_lr {self.warmup_start_lr} and --min_lr {self.min_lr} must lie in [0, --learning_rate "
                f"{self.learning_rate}]."
            )
        if self.lr_schedule == "published" and self.learning_rate == 0:
            raise SettingsError("--learning_rate 0 leaves --lr_schedule published nothing to rise to.")
        if self.skip_inactive_organs and self.mixed_precision == "fp16":
            raise SettingsError(
                "--skip_inactive_organs and --fp16 exclude each other: where no organ enters a step there is no "
                "gradient, and the loss scaler of fp16 has nothing to check. Use --bf16, or leave one of them out."
            )
        if self.skip_inactive_organs and self.deepspeed_plugin is not None:
            raise SettingsError(
                "--skip_inactive_organs has no effect under DeepSpeed, which steps within the backward pass: leave it "
                "out, or train without DeepSpeed."
            )
        if self.gemm_backend not in ("auto", *BACKENDS):
            raise SettingsError(f"--gemm_backend {self.gemm_backend!r} must be auto, {' or '.join(BACKENDS)}.")
        self._check_attention()
        self._check_licence()
        self._check_adapting()
        self._check_objective()
        if self.device.type == "cpu" and self.torch_compile:
            raise SettingsError(
                "--torch_compile on a CPU compiles for minutes again and again, since captions and organs give every "
                "batch another shape, and a compiled step is no faster there: leave it out. --gemm_backend and --bf16 "
                "are what helps. (On a GPU it is passed on to the Trainer, and has not been run yet.)"
            )
        if self.device.type == "cpu" and self.mixed_precision == "fp16":
            logger.warning("--fp16 has no effect on a CPU: accelerate computes in float32 there. Use --bf16.")
        if self.group_size < 2:
            raise SettingsError(
                "--per_device_train_batch_size 1 on one process contrasts a patient with nobody: use at least 2, or "
                "name a larger --contrastive_batch_size beside it."
            )
        if self.gradient_accumulation_steps > 1:
            logger.warning(
                "--gradient_accumulation_steps %d averages gradients; each micro-batch still contrasts only its own %d "
                "patients. A larger contrast takes a larger --contrastive_batch_size.",
                self.gradient_accumulation_steps,
                self.group_size,
            )
        if self.device.type == "cpu":
            self.dataloader_pin_memory = False  # pinned memory serves copies to a GPU only

    def _check_licence(self) -> None:
        """Refuse a licence that says nothing, and a public model without one."""
        if self.model_license is None:
            if self.model_license_name or self.model_license_link:
                raise SettingsError("--model_license_name and --model_license_link go with --model_license other.")
            if self.push_to_hub and self.hub_private_repo is False:
                raise SettingsError(
                    "--hub_private_repo false publishes the model: say under which licence (--model_license ID)."
                )
            return
        try:
            self.model_terms  # noqa: B018 - raises
        except ValueError as error:
            raise SettingsError(str(error)) from error

    @property
    def model_terms(self) -> dict[str, str]:
        """The licence of the weights as a card's header has it; empty where nothing was said."""
        if self.model_license is None:
            return {}
        return licence_fields(
            self.model_license, self.model_license_name, self.model_license_link, option="--model_license"
        )

    def _check_attention(self) -> None:
        """Refuse flash attention where it cannot run."""
        if self.attn_implementation not in ATTENTIONS:  # a recipe's value passes by the choices
            known = ", ".join(ATTENTIONS)
            raise SettingsError(f"--attn_implementation {self.attn_implementation!r} is none of {known}.")
        if not self.attn_implementation.startswith("flash"):
            return
        if self.device.type == "cpu":
            raise SettingsError(f"--attn_implementation {self.attn_implementation} needs a GPU: on a CPU take sdpa.")
        if self.mixed_precision == "no":
            raise SettingsError(
                f"--attn_implementation {self.attn_implementation} does not compute in float32: add --bf16 or --fp16."
            )

    def _check_adapting(self) -> None:
        """Refuse what --lora, --freeze and the scales of learning rates cannot mean."""
        for tower in self.lora:
            if tower not in TOWERS:
                raise SettingsError(f"--lora {tower!r} is no tower; choose from {', '.join(TOWERS)}, or both.")
        self.lora = [tower for tower in TOWERS if tower in self.lora]  # in one order, each once
        if self.lora_rank < 1 or self.lora_alpha < 1 or not 0 <= self.lora_dropout < 1:
            raise SettingsError(
                f"--lora_rank {self.lora_rank} and --lora_alpha {self.lora_alpha} must be at least 1, --lora_dropout "
                f"{self.lora_dropout} in [0, 1)."
            )
        if self.lora_targets not in ("attention", "all"):  # a recipe's value passes by the choices
            raise SettingsError(f"--lora_targets {self.lora_targets!r} must be attention or all.")
        if not 0 < self.layer_lr_decay <= 1:
            raise SettingsError(f"--layer_lr_decay {self.layer_lr_decay} must lie in (0, 1].")
        for tower, module in TOWERS.items():
            if not (scale := getattr(self, f"{tower}_lr_scale")) > 0:
                raise SettingsError(
                    f"--{tower}_lr_scale {scale} must be positive; to keep the tower as it is, --freeze {module}."
                )

    def _check_objective(self) -> None:
        """Refuse an objective that cannot be meant, or not here."""
        self.targets = [self.targets] if isinstance(self.targets, str) else list(self.targets)  # of a recipe
        self.organ_label_smoothing = organ_words(self.organ_label_smoothing)
        self.organ_token_dropout = organ_words(self.organ_token_dropout)
        if faults := self.objective_faults():
            raise SettingsError(faults[0])
        if self.organ_sampling == "balanced" and self.train_sampling_strategy != "random":
            raise SettingsError(
                f"--organ_sampling balanced makes an order of its own: leave out --train_sampling_strategy "
                f"{self.train_sampling_strategy}."
            )
        teachers = [target for target in ("momentum", "co_teaching") if self.uses(target)]
        is_fsdp = bool(self.fsdp) or os.environ.get("ACCELERATE_USE_FSDP", "false") == "true"
        is_sharded = is_fsdp or self.deepspeed_plugin is not None
        if teachers and is_sharded:
            raise SettingsError(
                f"--targets {' '.join(teachers)} needs whole weights on every process: not with FSDP or DeepSpeed. One "
                "GPU or DDP holds them."
            )

    @property
    def adapts(self) -> bool:
        """True if not every weight is trained alike."""
        scales = (self.layer_lr_decay, self.vision_lr_scale, self.text_lr_scale)
        return bool(self.lora or self.freeze) or any(scale != 1 for scale in scales)

    @property
    def computed_precision(self) -> str:
        """fp32, bf16 or fp16: what the towers compute in. Weights are float32 in any case."""
        precision = {"no": "fp32"}.get(self.mixed_precision, self.mixed_precision)
        # accelerate accepts fp16 on a CPU, but autocasts there for bf16 alone.
        return "fp32" if precision == "fp16" and self.device.type == "cpu" else precision

    def _set_up_overfit(self) -> None:
        """Set aside whatever makes learning by heart harder, and evaluation, checkpoints and the push."""
        if self.overfit < 2:
            raise SettingsError(f"--overfit {self.overfit} contrasts a patient with nobody: use at least 2.")
        for name, value in OVERFIT_TRAINING.items():
            setattr(self, name, copy.copy(value))
        self.contrastive_batch_size = self.overfit
        self.logging_steps = (
            min(self.logging_steps, OVERFIT_LOG_EVERY) if self.logging_steps >= 1 else OVERFIT_LOG_EVERY
        )

    def _settle_contrast(self) -> None:
        """Make contrast, chunks and the Trainer's batch one story."""
        if self.contrastive_batch_size is None:
            if self.micro_batch_size is not None:
                raise SettingsError(
                    f"--micro_batch_size {self.micro_batch_size} is for a --contrastive_batch_size: name that as well, "
                    "or use --per_device_train_batch_size alone."
                )
            return
        for name in ("contrastive_batch_size", "micro_batch_size"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise SettingsError(f"--{name} {getattr(self, name)} must be at least 1.")
        if self.held_volumes_gb < 0:
            raise SettingsError(f"--held_volumes_gb {self.held_volumes_gb} must not be negative.")
        if self.contrastive_batch_size % self.world_size:
            smaller = self.contrastive_batch_size // self.world_size * self.world_size
            raise SettingsError(
                f"--contrastive_batch_size {self.contrastive_batch_size} cannot be shared out evenly over "
                f"{self.world_size} processes: take {smaller or self.world_size} or {smaller + self.world_size}."
            )
        default = type(self).per_device_train_batch_size
        if self.micro_batch_size and self.per_device_train_batch_size not in (default, self.micro_batch_size):
            logger.warning(
                "--per_device_train_batch_size %d is not used: --contrastive_batch_size %d patients are contrasted, "
                "--micro_batch_size %d of them computed at a time.",
                self.per_device_train_batch_size,
                self.contrastive_batch_size,
                self.micro_batch_size,
            )
        asked = self.micro_batch_size or self.per_device_train_batch_size
        self.micro_batch_size = min(asked, self.contrastive_batch_size // self.world_size)
        self.per_device_train_batch_size = self.micro_batch_size

    @property
    def group_size(self) -> int:
        """Patients contrasted with each other, over all processes."""
        return self.contrastive_batch_size or self.per_device_train_batch_size * self.world_size

    @property
    def rank_size(self) -> int:
        """This process's share of them."""
        return self.group_size // self.world_size

    @property
    def is_cached(self) -> bool:
        """True if a process's share is more than it computes at a time."""
        return self.rank_size > self.per_device_train_batch_size


@dataclass
class Settings:
    """A run's resolved settings; `recipe` holds its name and version, `model` the section to build a model from.

    `argv` holds the words they were read from, secrets among them: written nowhere as they are.
    """

    recipe: dict[str, Any]
    model: dict[str, Any]
    data: DataArguments
    training: FVLMTrainingArguments
    argv: tuple[str, ...] = ()


class _HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Keeps the line breaks of the description and adds each default to its help."""


def parse_settings(argv: Sequence[str], description: str) -> Settings:
    """Read the recipe and the command line into settings, or say what is wrong with them.

    Args:
        argv: Command-line words without the program's name.
        description: Text that opens `--help`.

    Raises:
        SettingsError: If a name is unknown, a value does not fit, or two of them exclude each other.
    """
    words, model_overrides = _split_off_model(argv)
    parser = HfArgumentParser(
        [DataArguments, FVLMTrainingArguments],
        usage="train_fvlm.py --recipe NAME --data DIR --output_dir DIR [--NAME VALUE ...] [--model.NAME VALUE ...]",
        description=description,
        epilog=_model_help(),
        formatter_class=_HelpFormatter,
        allow_abbrev=False,
    )
    recipe = _read_recipe(_recipe_argument(words))

    # (1)
    data_names = [entry.name for entry in fields(DataArguments) if entry.name != "recipe"]
    training_names = [entry.name for entry in fields(FVLMTrainingArguments) if entry.init]
    refuse_unknown(recipe["data"], data_names, "the recipe's data section")
    refuse_unknown(recipe["training"], training_names, "the recipe's training section")
    parser.set_defaults(**recipe["data"], **recipe["training"])

    # (2)
    data, training, unknown = parser.parse_args_into_dataclasses(
        words, return_remaining_strings=True, look_for_args_file=False
    )
    if unknown:
        flags = [word.split("=")[0].lstrip("-") for word in unknown if word.startswith("-")]
        refuse_unknown(flags, ["recipe", *data_names, *training_names], "the command line")
        raise SettingsError(f"the command line holds words that belong to no argument: {' '.join(unknown)}")
    model = recipe["model"]
    for path, value in model_overrides:
        _set_nested(model, path, value)
    if training.overfit is not None:
        data.max_train_rows = training.overfit
        for name, value in OVERFIT_DATA.items():
            setattr(data, name, copy.copy(value))
    # (3)
    _check_model_names(model, needs_text_encoder=data.init_from is None)
    training.resume_from_checkpoint = _checkpoint_to_resume(training)
    # (4)
    _check_combinations(data, training, model)
    identity = {key: recipe[key] for key in ("name", "version") if recipe.get(key) is not None}
    return Settings(identity, model, data, training, tuple(argv))


def refuse_unknown(names: Iterable[str], known: Iterable[str], where: str) -> None:
    """Raise for the first of `names` that is not among `known`, and name the nearest that is."""
    known = list(known)
    for name in names:
        if name not in known:
            nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
            raise SettingsError(f"{where}: unknown name {name!r}; nearest: {nearest[0]!r}.")


def _split_off_model(argv: Sequence[str]) -> tuple[list[str], list[tuple[list[str], Any]]]:
    """Separate `--model.a.b VALUE [VALUE ...]` from the words argparse reads; values are YAML."""
    words: list[str] = []
    overrides: list[tuple[list[str], Any]] = []
    position = 0
    while position < len(argv):
        word = argv[position]
        position += 1
        if not word.startswith("--model."):
            words.append(re.sub(r"^--(?:training|data)\.", "--", word))
            continue
        flag, is_joined, joined = word.partition("=")
        values = [joined] if is_joined else []
        while not is_joined and position < len(argv) and not argv[position].startswith("--"):
            values.append(argv[position])
            position += 1
        if not values:
            raise SettingsError(f"{flag} needs a value, e.g. `--model.projection_dim 128`.")
        parsed = [load_yaml(value) for value in values]
        overrides.append((flag.removeprefix("--model.").split("."), parsed[0] if len(parsed) == 1 else parsed))
    return words, overrides


def _recipe_argument(words: Sequence[str]) -> str | None:
    """The recipe must be known before the others are parsed: its values are their defaults."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--recipe")
    return parser.parse_known_args(list(words))[0].recipe


def _read_recipe(name_or_path: str | None) -> dict[str, Any]:
    """Read a recipe file; every section is there afterwards, empty where the file has none."""
    recipe: dict[str, Any] = {}
    if name_or_path is not None:
        path = Path(name_or_path)
        if not path.is_file():
            path = RECIPES / f"{name_or_path.removesuffix('.yaml')}.yaml"
        if not path.is_file():
            known = sorted(entry.stem for entry in RECIPES.glob("*.yaml"))
            raise SettingsError(f"--recipe {name_or_path} is neither a file nor one of {', '.join(known)}.")
        try:
            recipe = load_yaml(path.read_text(encoding="utf-8")) or {}
        except yaml.YAMLError as error:
            raise SettingsError(f"{path} is no YAML: {error}") from error
        if not isinstance(recipe, dict):
            raise SettingsError(f"{path} must be a mapping with the sections model, data and training.")
        refuse_unknown(recipe, RECIPE_KEYS, str(path))
    for section in ("model", "data", "training"):
        recipe[section] = recipe.get(section) or {}
        if not isinstance(recipe[section], dict):
            raise SettingsError(f"{name_or_path}: section {section} must be a mapping of names to values.")
    return recipe


def _set_nested(section: dict[str, Any], path: list[str], value: Any) -> None:
    """Set `section[a][b] = value` for the path [a, b], making the mappings on the way."""
    for key in path[:-1]:
        section = section.setdefault(key, {})
        if not isinstance(section, dict):
            raise SettingsError(f"--model.{'.'.join(path)}: {key!r} holds a value and no names of its own.")
    section[path[-1]] = value


def own_fields(config_class: type) -> list[str]:
    """Names a config class declares itself, without the many every PreTrainedConfig inherits."""
    return list(inspect.get_annotations(config_class))


def model_fields() -> list[str]:
    """Names the model section may hold."""
    own = [name for name in own_fields(FVLMConfig) if name not in DERIVED_MODEL_KEYS]
    return [*own, "text_encoder"]


def _check_model_names(model: dict[str, Any], needs_text_encoder: bool = True) -> None:
    """Refuse names the configs do not have: they would be taken as silent extra attributes."""
    for name in DERIVED_MODEL_KEYS:
        if name in model:
            raise SettingsError(
                f"model.{name} is not set by hand: organs come from `organ_set` and the data, text_config from "
                "`text_encoder`."
            )
    refuse_unknown(model, model_fields(), "the model section")
    vision = model.setdefault("vision_config", {})
    refuse_unknown(vision, own_fields(FVLMVisionConfig), "model.vision_config")
    text = model.setdefault("text_encoder", {}) if needs_text_encoder else model.get("text_encoder") or {}
    refuse_unknown(text, TEXT_ENCODER_KEYS, "model.text_encoder")
    rate = text.get("attention_dropout", 0.0)
    if not isinstance(rate, (int, float)) or not 0 <= rate < 1:
        raise SettingsError(f"model.text_encoder.attention_dropout {rate!r} must lie in [0, 1).")
    if not needs_text_encoder and not set(text) - {"attention_dropout"}:
        return
    if ("from_scratch" in text) == ("pretrained" in text):
        raise SettingsError(
            "model.text_encoder needs exactly one of from_scratch (config fields; set vocab_size beside it) and "
            f"pretrained (a folder or Hub id), got {sorted(text)}."
        )
    if "from_scratch" in text:
        model_type = text["from_scratch"].get("model_type", "bert")
        if model_type not in CONFIG_MAPPING:
            raise SettingsError(
                f"model.text_encoder.from_scratch.model_type {model_type!r} is unknown to transformers."
            )
        known = [name for name in AutoConfig.for_model(model_type).to_dict() if name != "vocab_size"]
        refuse_unknown(text["from_scratch"], [*known, "model_type"], "model.text_encoder.from_scratch")
        if not isinstance(text.get("vocab_size"), int) or text["vocab_size"] < 100:
            raise SettingsError(
                f"model.text_encoder.vocab_size {text.get('vocab_size')} must be a count of at least 100 word pieces."
            )
    elif "vocab_size" in text:
        raise SettingsError("model.text_encoder.vocab_size is for from_scratch; a pretrained encoder brings its own.")


def _check_combinations(data: DataArguments, training: FVLMTrainingArguments, model: dict[str, Any]) -> None:
    """Refuse what could only fail after the data has been read."""
    if data.max_train_rows is not None and data.max_train_rows < training.group_size:
        raise SettingsError(
            f"--max_train_rows {data.max_train_rows} is less than one batch of {training.group_size} patients "
            f"({training.world_size} processes of {training.per_device_train_batch_size})."
        )
    if training.global_schedule != "constant" and model.get("volume_pooling", "none") == "none" and not data.init_from:
        raise SettingsError(
            f"--global_schedule {training.global_schedule} is for a model with a global branch: add "
            "--model.volume_pooling attention (or mean)."
        )
    if data.eval_tasks and training.eval_strategy == "no":
        raise SettingsError("--eval_tasks without --eval_strategy steps or epoch would never be scored.")
    if data.init_from is None:
        if training.freeze:
            logger.warning(
                "--freeze %s without --init_from: fresh weights stay as random as they are; only a pretrained text "
                "encoder has others.",
                " ".join(training.freeze),
            )
        for tower in training.lora:
            if tower == "vision" or "pretrained" not in model["text_encoder"]:
                raise SettingsError(
                    f"--lora {tower} adds to weights that were trained before, but those of {TOWERS[tower]} would be "
                    "random: name a model with --init_from, or leave it out."
                )
    if data.init_from is not None:
        return  # the folder's config and the model section make the model together (start.py)
    # The config checks every size by itself; organs and text stand in here for those the data and the encoder bring.
    build_config(model, organs=["organ"], organ_classes={}, text_config={"model_type": "bert"})


def build_config(model: dict[str, Any], **given: Any) -> FVLMConfig:
    """Make the model's config from a model section; `given` are the fields the data and the text encoder decide.

    Windows may still read `mean: auto`: they are checked with 0 and 1 in its place.
    """
    known = {key: value for key, value in model.items() if key != "text_encoder"} | given
    windows = known.get("windows")
    if windows is not None:
        filled = [
            dict(window, mean=_number(window, "mean", 0.0), std=_number(window, "std", 1.0)) for window in windows
        ]
        known["windows"] = filled
        known["vision_config"] = {"num_channels": len(filled), **known["vision_config"]}
    try:
        return FVLMConfig(**known)
    except Exception as error:  # strict dataclasses raise errors of their own that are no ValueError
        raise SettingsError(f"the model section does not make a model: {error}") from error


def _number(window: dict[str, Any], key: str, when_auto: float) -> Any:
    value = window.get(key, when_auto)
    return when_auto if value == "auto" else value


def read_folder_config(folder: str | Path, option: str) -> FVLMConfig:
    """Read the config of an fVLM's folder.

    Args:
        folder: What the user gave.
        option: The option it was given with, for messages.

    Raises:
        SettingsError: If there is none, it cannot be read, or it is another model's.
    """
    file = Path(folder) / "config.json"
    if not file.is_file():
        raise SettingsError(
            f"{option} {folder}: no config.json there. Give a folder that `python -m training_fvlm.convert` or "
            "train_fvlm.py wrote."
        )
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SettingsError(f"{option} {folder}: config.json cannot be read: {error}") from error
    model_type = content.get("model_type") if isinstance(content, dict) else None
    if model_type != FVLMConfig.model_type:
        raise SettingsError(
            f"{option} {folder} holds a model of type {model_type!r}, not fvlm. A text encoder alone goes into "
            "model.text_encoder.pretrained."
        )
    try:
        return FVLMConfig.from_pretrained(folder)
    except Exception as error:  # strict dataclasses raise errors of their own that are no ValueError
        raise SettingsError(f"{option} {folder}: config.json makes no model: {error}") from error


def has_auto_windows(model: dict[str, Any]) -> bool:
    """True if the mean or std of some window is to be measured on the training volumes."""
    return any("auto" in (window.get("mean"), window.get("std")) for window in model.get("windows") or ())


def _checkpoint_to_resume(training: FVLMTrainingArguments) -> str | None:
    """Turn `--resume_from_checkpoint true` into the newest checkpoint of the output folder, and check a named one."""
    named = training.resume_from_checkpoint
    newest = newest_checkpoint(training.output_dir)
    if named is None or str(named).lower() in ("false", "none", "no"):
        if newest is not None:
            raise SettingsError(
                f"{training.output_dir} holds {Path(newest).name} of an earlier run. Continue it with "
                "--resume_from_checkpoint true, or choose another --output_dir."
            )
        return None
    if str(named).lower() in ("true", "auto"):
        if newest is None and str(named).lower() == "true":
            raise SettingsError(
                f"--resume_from_checkpoint {named}: there is no checkpoint in {training.output_dir} (--save_steps says "
                "when there will be one). `auto` starts afresh in that case."
            )
        return newest
    if not is_complete(named):
        raise SettingsError(
            f"--resume_from_checkpoint {named} is no checkpoint, or half of one: it holds no {LAST_FILE}, or its name "
            "says that it was being written."
        )
    return str(named)


def _model_help() -> str:
    """Tell which names `--model.NAME VALUE` takes, from the configs themselves."""
    entries = {
        "--model.NAME VALUE": ", ".join(model_fields()),
        "--model.vision_config.NAME VALUE": ", ".join(own_fields(FVLMVisionConfig)),
        "--model.text_encoder.from_scratch.NAME VALUE": "fields of the text config, BERT by default",
        "--model.text_encoder.pretrained NAME": "folder or Hub id of a text encoder whose weights are kept",
        "--model.vision_config.attention_dropout RATE, --model.text_encoder.attention_dropout RATE": "share of the "
        "attention probabilities dropped in training (published: 0.1, in both towers), also with --init_from and with "
        "a pretrained encoder. At 0 a CPU takes PyTorch's fused attention; above 0 the image tower takes our own, "
        "slower one, and the text encoder keeps its probabilities. The fused kernels of GPUs know dropout. 0 "
        "regularises a little less, and losses and weights of a run are no longer those of the published setting; "
        "evaluation drops nothing either way",
    }
    lines = ["model (any name of the recipe's model section; values in YAML):"]
    for flag, text in entries.items():
        lines += [f"  {flag}", *textwrap.wrap(text, 110, initial_indent=" " * 8, subsequent_indent=" " * 8)]
    return "\n".join([*lines, "  example: --model.windows '[{hu_min: -1150, hu_max: 350, mean: auto, std: auto}]'"])
