"""Runs on every rank: trains the cases of test_two_processes.py and saves what rank 0 saw.

    ACCELERATE_USE_CPU=true accelerate launch --config_file hub_configs/accelerate/cpu_two.yaml \\
        tests/two_process_worker.py OUT_DIR [CASE ...]
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import TrainerCallback

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]

from launching import leave  # noqa: E402
from tiny_split import tiny_row  # noqa: E402
from tiny_training import tiny_rows, tiny_trainer  # noqa: E402

# 12 rows in batches of 4. Plain: 3 steps an epoch; accumulated: a step of two batches and one of the third.
RESUME = {"per_device_train_batch_size": 2, "max_steps": 6, "save_strategy": "steps", "save_steps": 4, "dropout": 0.1}
RESUMES = {
    "plain": RESUME,
    "accumulated": RESUME
    | {"gradient_accumulation_steps": 2, "dataloader_num_workers": 1, "save_steps": 3, "logging_steps": 2},
}


def case_rows(name: str) -> list[dict]:
    """Rows of a case, one batch; in their order rank 0 gets the first half of it, rank 1 the second."""
    count = 4 * (1 + name.startswith("cached")) * (1 + name.endswith("accumulated"))
    if name.endswith("one rank has no whole organ"):
        rows = tiny_rows(count)
        for row in rows[count // 2 :]:  # rank 1: captions of an organ that the scan cuts
            cut = tiny_row(1, cut=True)
            row |= {key: cut[key] for key in ("volume", "mask", "shape")}
            row["captions"] = [entry for entry in cut["captions"] if entry["organ"] == "lung"]
        return rows
    if name.endswith("nothing to contrast"):
        rows = tiny_rows(count)
        for row in rows:
            row["captions"] = [{**entry, "is_abnormal": False} for entry in row["captions"]]
        return rows
    return tiny_rows(count)


# A chunk of one patient is the same chunk on any number of processes: the image tower's dropout falls on it as it does
# on one. That of the texts falls on a rank's own different texts together, which are others on another rank.
CACHED = {"contrastive_batch_size": 8, "micro_batch_size": 1, "dropout": 0.2, "text_dropout": 0.0}
# name -> what differs from the plain case
CASES = {
    "plain": {},
    "activation checkpointing": {"activation_checkpointing": True},
    "sum of organs": {"fields": {"organ_reduction": "sum"}},
    "one rank has no whole organ": {},
    "nothing to contrast": {},
    "cached": CACHED,
    "cached, read twice, checkpointing": {**CACHED, "held_volumes_gb": 0, "activation_checkpointing": True},
    "cached, one rank has no whole organ": CACHED,
    "cached, nothing to contrast": CACHED,
    "cached, accumulated": {**CACHED, "gradient_accumulation_steps": 2},
}


class FirstGradients(TrainerCallback):
    """Keeps a copy of the gradients before the first optimizer step."""

    def __init__(self):
        self.of: dict[str, torch.Tensor] = {}

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if state.global_step == 0:
            named = ((name.removeprefix("module."), parameter) for name, parameter in model.named_parameters())
            self.of = {name: parameter.grad.clone() for name, parameter in named}


def run_case(name: str, folder: Path, batch_size: int):
    """Two steps of a case: its trainer, and the gradients of the first step."""
    gradients = FirstGradients()
    settings = {"per_device_train_batch_size": batch_size, "train_sampling_strategy": "sequential"}
    settings |= {"is_random": False, "max_grad_norm": 0.0, "callbacks": [gradients], "eval_rows": tiny_rows(7, seed=2)}
    trainer = tiny_trainer(folder, case_rows(name), **(settings | CASES[name]))
    trainer.train()
    return trainer, gradients.of


def main(folder: Path, names: list[str]) -> None:
    for name in names or CASES:
        trainer, gradients = run_case(name, folder / name, batch_size=2)
        metrics = trainer.evaluate()
        if trainer.is_world_process_zero():
            save_file(gradients, folder / f"{name}.safetensors")
            facts = {"world_size": trainer.args.world_size, "wrapper": type(trainer.model_wrapped).__name__}
            facts |= {"log": [line for line in trainer.state.log_history if "loss" in line], "eval": metrics}
            (folder / f"{name}.json").write_text(json.dumps(facts))
    for name, settings in () if names else RESUMES.items():
        run = folder / f"run {name}"
        whole = tiny_trainer(run, tiny_rows(12), **settings)
        whole.train()
        resumed = tiny_trainer(run, tiny_rows(12), **settings)
        resumed.train(resume_from_checkpoint=str(run / f"checkpoint-{settings['save_steps']}"))
        if whole.is_world_process_zero():
            logs = [[line for line in each.state.log_history if "loss" in line] for each in (whole, resumed)]
            (folder / f"resume {name}.json").write_text(json.dumps(logs))
            for each, kind in ((whole, "whole"), (resumed, "resumed")):
                save_file(each.model.state_dict(), folder / f"resume {name} {kind}.safetensors")
    leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
