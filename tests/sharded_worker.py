"""Runs on every rank: trains the cases of test_accelerate_configs.py under FSDP2 or DeepSpeed; saves what rank 0 saw.

    accelerate launch --config_file hub_configs/accelerate/fsdp2.yaml --num_processes 2 \\
        tests/sharded_worker.py OUT_DIR [CASE ...]

accelerate leaves both out on a CPU. Told that gloo is what it found in place of a GPU, it goes its whole way: plugin,
wrapping, optimizer, saving.
"""

import json
import os
import sys
from pathlib import Path

import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from safetensors.torch import save_file
from transformers import TrainerCallback, training_args
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]

from launching import leave  # noqa: E402
from tiny_training import tiny_rows, tiny_trainer  # noqa: E402

# name -> its settings, for one process; no dropout: captions that share a row would get other masks on two.
CASES = {
    "plain": {"per_device_train_batch_size": 4},
    "clipped, accumulated": {
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "max_grad_norm": 1.0,
    },
    "gradient cache": {"contrastive_batch_size": 4, "micro_batch_size": 1},
    "skipped organs, checkpointed": {
        "per_device_train_batch_size": 4,
        "skip_inactive_organs": True,
        "activation_checkpointing": True,
    },
    "bf16": {"per_device_train_batch_size": 4, "bf16": True},
}


class FirstGradients(TrainerCallback):
    """Keeps a copy of the gradients before the first optimizer step, put together where they are sharded."""

    def __init__(self):
        self.of: dict[str, torch.Tensor] = {}

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if state.global_step == 0:
            gradients = ((name, parameter.grad) for name, parameter in model.named_parameters())
            self.of = {
                name: gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient.clone()
                for name, gradient in gradients
                if gradient is not None  # DeepSpeed keeps them elsewhere
            }


def run_case(name: str, folder: Path, world_size: int = 1):
    """Three steps of a case and its saved model: the trainer, the gradients of the first step, the evaluation."""
    settings = {"train_sampling_strategy": "sequential", "is_random": False, "max_grad_norm": 0.0, "max_steps": 3}
    settings |= CASES[name]
    if "per_device_train_batch_size" in settings:
        settings["per_device_train_batch_size"] //= world_size
    gradients = FirstGradients()
    options = {"callbacks": [gradients], "eval_rows": tiny_rows(7, seed=2), "use_cpu": world_size == 1}
    trainer = tiny_trainer(folder, tiny_rows(12), **options, **settings)
    trainer.train()
    metrics = trainer.evaluate()
    trainer.save_model(str(folder / "model"), _internal_call=True)
    return trainer, gradients.of, metrics


def resumed_losses(folder: Path) -> list[list[float]]:
    """Losses of a run with dropout, and of one that goes on from its checkpoint."""
    settings = {"per_device_train_batch_size": 2, "max_steps": 6, "save_strategy": "steps", "save_steps": 4}
    settings |= {"dropout": 0.1, "use_cpu": False}
    whole = tiny_trainer(folder, tiny_rows(12), **settings)
    whole.train()
    resumed = tiny_trainer(folder, tiny_rows(12), **settings)
    resumed.train(resume_from_checkpoint=str(folder / "checkpoint-4"))
    return [[line["loss"] for line in each.state.log_history if "loss" in line] for each in (whole, resumed)]


def main(folder: Path, names: list[str]) -> None:
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    PartialState._prepare_backend = lambda *args, **kwargs: ("gloo", DistributedType.MULTI_GPU)
    training_args.is_torch_bf16_gpu_available = lambda: True
    for name in names or CASES:
        unset_hf_deepspeed_config()  # of the case before: under ZeRO-3 it would empty the next model
        trainer, gradients, metrics = run_case(name, folder / name, world_size=2)
        log = [line for line in trainer.state.log_history if "loss" in line]
        if trainer.is_world_process_zero():
            save_file(gradients, folder / f"{name}.safetensors")
            facts = {"world_size": trainer.args.world_size, "type": str(trainer.accelerator.distributed_type)}
            facts |= {"wrapper": type(trainer.model_wrapped).__name__, "log": log, "eval": metrics}
            sharded = [name for name, parameter in trainer.model.named_parameters() if hasattr(parameter, "placements")]
            facts |= {"sharded": sharded}
            (folder / f"{name}.json").write_text(json.dumps(facts))
    losses = [] if names else resumed_losses(folder / "resumed")
    if trainer.is_world_process_zero():
        (folder / "resumed.json").write_text(json.dumps(losses))
    leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
