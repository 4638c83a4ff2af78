"""Runs on every rank: trains the cases of test_adapt_two_processes.py and saves what rank 0 has at the end.

    ACCELERATE_USE_CPU=true accelerate launch --config_file hub_configs/accelerate/cpu_two.yaml \\
        tests/adapt_worker.py OUT_DIR
"""

import sys
from pathlib import Path

from safetensors.torch import save_file

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]

from launching import leave  # noqa: E402
from tiny_training import tiny_rows, tiny_trainer  # noqa: E402

LORA = {"lora": ["vision", "text"], "lora_rank": 2}
# name -> what is asked for
CASES = {
    "lora": LORA,
    "lora, checkpointed": LORA | {"activation_checkpointing": True},
    "lora, cached": LORA | {"micro_batch_size": 1},
    "frozen": {"freeze": ["text_model", "vision_model.embeddings", "vision_model.blocks.0"], "layer_lr_decay": 0.5},
}


def run_case(name: str, folder: Path, world_size: int):
    """Six steps of a case over contrasts of eight patients, with a checkpoint after four."""
    settings = {"micro_batch_size": 8 // world_size, "max_steps": 6, "save_strategy": "steps", "save_steps": 4}
    settings |= {"contrastive_batch_size": 8, "is_random": False, "learning_rate": 1e-2}
    trainer = tiny_trainer(folder, tiny_rows(16), **(settings | CASES[name]))
    trainer.train()
    return trainer


def trained_weights(trainer) -> dict:
    """The weights that were to move."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    return {name: weight.detach().clone() for name, weight in model.named_parameters() if weight.requires_grad}


def main(folder: Path) -> None:
    for name in CASES:
        trainer = run_case(name, folder / name, world_size=2)
        assert trainer.args.world_size == 2 and type(trainer.model_wrapped).__name__ == "DistributedDataParallel"
        if trainer.is_world_process_zero():
            save_file(trained_weights(trainer), folder / f"{name}.safetensors")
    leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
