"""--overfit N: can the model learn N patients by heart? Who cannot do that will learn nothing from more of them.

(1) One batch: the first N training rows, cropped at the centre, no flips, contrasted with each other at every step, and
    nothing that makes it harder: no dropout of any kind, no label smoothing, no curriculum. (2) The run stops as soon
    as every organ that enters has gone FITTED of the way from chance to the floor (organ_losses.py), or at --max_steps.
(3) It says passed or not, and if some organ did not get there, the likely cause and where to look; the command's exit
    status is 0 or 1. No model is saved.

On the synthetic set with recipe synthetic_demo 2, 4 and 8 patients took 20, 30 and 40 steps; NOT passed after some
hundred says something of the model or the data.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback
from transformers.utils import logging

from .alarm import NEAR
from .organ_losses import OrganLossRow, mean_over_rows

logger = logging.get_logger(__name__)
FITTED = 0.9  # of the way from chance to the floor
STUCK = 0.05  # of it: what counts as not having left chance
LOG_EVERY = 10  # steps at most: it stops at a log line
# What is set aside, by the argument's name; the rows, the crop and the dropouts of the model come on top.
TRAINING_SETTINGS = {
    **{"gradient_accumulation_steps": 1, "eval_strategy": "no", "save_strategy": "no", "load_best_model_at_end": False},
    **{"push_to_hub": False, "alarm_steps": 0, "organ_label_smoothing": [], "organ_token_dropout": []},
    **{"logging_strategy": "steps", "organ_sampling": "uniform", "curriculum": "none", "lora_dropout": 0.0},
}
DATA_SETTINGS = {"random_crop": False, "flip_axes": [], "eval_tasks": []}


def without_dropout(model: torch.nn.Module) -> None:
    """Switch off every dropout of a model, whether it is a module or a number that a module keeps."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, 0.0)


class Overfit(TrainerCallback):
    """Stops the run of an `FVLMTrainer` when its patients are known by heart, and judges it."""

    def __init__(self, trainer: Any):
        self.trainer = trainer
        trainer.add_callback(self)
        self.learned: list[float] = []  # mean share of the way to the floor, line by line
        self.gradient_norms: dict[str, float] = {}

    def on_train_begin(self, args, state, control, **kwargs):
        self.learned, self.gradient_norms = [], {}

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" not in (logs or {}):
            return
        shares = learned(self.trainer.logged_rows)
        self.gradient_norms = {
            name.removeprefix("grad_norm/"): value for name, value in logs.items() if name.startswith("grad_norm/")
        }
        if shares:
            self.learned.append(sum(shares.values()) / len(shares))
            control.should_training_stop |= min(shares.values()) >= FITTED

    def verdict(self) -> tuple[bool, str]:
        """Whether all organs were learned by heart, and a sentence about it."""
        rows = self.trainer.logged_rows
        shares, steps = learned(rows), self.trainer.state.global_step
        patients = f"{self.trainer.args.group_size} patients"
        if not shares:
            why = "none of these patients is abnormal in an organ that is whole in the crop: take a larger N"
            return False, f"--overfit NOT passed: nothing to learn from {patients}: {why}."
        missing = {organ: share for organ, share in shares.items() if not share >= FITTED}
        entered = [row for row in rows if row.organ in shares]
        means = (mean_over_rows(entered, name) for name in ("loss", "floor", "chance"))
        numbers = "mean loss {:.3f}, floor {:.3f}, chance {:.3f}".format(*means)
        if not missing:
            return True, (
                f"--overfit passed: {patients} learned by heart in {steps} steps, all {len(shares)} organs; {numbers}. "
                "Go on with all patients, without --overfit and in another --output_dir."
            )
        worst_first = sorted(missing, key=missing.__getitem__)
        named = ", ".join(f"{organ} {round(100 * missing[organ])} %" for organ in worst_first)
        text = (
            f"--overfit NOT passed: {patients} not learned by heart in {steps} steps. Of {len(shares)} organs "
            f"{len(missing)} have gone less than {round(100 * FITTED)} % of the way to their floor: {named}; {numbers}."
        )
        return False, f"{text} Likely cause: {self.cause(missing, rows)}."

    def cause(self, missing: dict[str, float], rows: Sequence[OrganLossRow]) -> str:
        """Why, as far as it shows."""
        twins = indistinct_captions(self.trainer)
        if told := [organ for organ in missing if organ in twins]:
            return (
                f"different captions of {', '.join(told)} are the same to the text encoder: what differs lies beyond "
                "model.max_text_length tokens, or in words it does not know"
            )
        if _is_rising(self.learned):
            return "too few steps, for the loss is still falling: a larger --max_steps"
        norms = {tower: value for tower, value in self.gradient_norms.items() if value > 0}
        if still := [tower for tower in ("vision", "text", "pooling", "projections") if tower not in norms]:
            return f"no gradient reaches {', '.join(still)}: see --freeze and --lora"
        cosines = [row.text_cosine for row in rows if row.organ in missing and not math.isnan(row.text_cosine)]
        cosine = sum(cosines) / len(cosines) if cosines else math.nan
        if cosine > NEAR:
            return (
                f"the text side has collapsed (mean cosine between different captions {cosine:.3f}): take a lower "
                "--learning_rate, windows with `mean: auto`, --centring_rows, a shallower or a pretrained text encoder"
            )
        if max(missing.values()) < STUCK:
            return "--learning_rate, too high or too low by far, or volumes that are not standardised (HU windows)"
        return (
            "these organs' images cannot be told apart: HU windows that clip what the captions speak of, patches too "
            "large, or one volume twice under different captions"
        )


def _is_rising(shares: Sequence[float]) -> bool:
    """Whether at the pace of the last quarter of the lines the goal would be reached within ten more of them."""
    quarter = len(shares) // 4
    if not quarter:
        return True
    last, before = shares[-quarter:], shares[-2 * quarter : -quarter]
    return 10 * (sum(last) - sum(before)) / quarter > FITTED - shares[-1]


def learned(rows: Sequence[OrganLossRow]) -> dict[str, float]:
    """Organ -> share of the way from chance to the floor, of those that entered."""
    return {row.organ: row.learned for row in rows if row.active and row.chance > row.floor}


def indistinct_captions(trainer: Any) -> list[str]:
    """Organs in which two of the training patients have different captions that are the same tokens."""
    rows = trainer.train_dataset
    batch = trainer.data_collator([rows[number] for number in range(len(rows))])
    texts = [tuple(ids[mask.bool()].tolist()) for ids, mask in zip(batch["input_ids"], batch["attention_mask"])]
    return [
        organ
        for place, organ in enumerate(trainer.window.organs)
        if _has_twins(batch["caption_index"][:, place], texts)
    ]


def _has_twins(index: Tensor, texts: Sequence[tuple[int, ...]]) -> bool:
    different = {place for place in index.tolist() if place >= 0}
    return len({texts[place] for place in different}) < len(different)
