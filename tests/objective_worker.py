"""Runs on every rank: trains the cases of test_objective_processes.py and saves what each rank holds afterwards.

    ACCELERATE_USE_CPU=true accelerate launch --config_file hub_configs/accelerate/cpu_two.yaml \\
        tests/objective_worker.py OUT_DIR
"""

import json
import sys
from pathlib import Path

from safetensors.torch import save_file

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]

from launching import leave  # noqa: E402
from test_objective_training import losses, states_of, trained  # noqa: E402

# name -> kind of objective, and what else is set; both with contrasts of 8
CASES = {
    "everything": ("everything", {}),
    "everything, cached": ("everything", {"contrastive_batch_size": 8, "micro_batch_size": 2}),
    "co-teaching": ("co-teaching", {}),
    "uncertainty": ("uncertainty", {}),
}
RESUME = {"max_steps": 4, "save_strategy": "steps", "save_steps": 3, "save_total_limit": None, "dropout": 0.1}


def run_case(name: str, folder: Path, processes: int):
    """A trainer that has trained a case, the contrast shared out over so many processes."""
    kind, settings = CASES[name]
    if "contrastive_batch_size" not in settings:
        settings = {"per_device_train_batch_size": 8 // processes, **settings}
    return trained(folder, kind, **settings)


def main(folder: Path) -> None:
    for name in CASES:
        trainer = run_case(name, folder / name, processes=2)
        rank = trainer.args.process_index
        save_file(
            {key: value.clone().contiguous() for key, value in states_of(trainer).items()},
            folder / f"{name} {rank}.safetensors",
        )
        if rank == 0:
            facts = {"world_size": trainer.args.world_size, "log": losses(trainer)}
            (folder / f"{name}.json").write_text(json.dumps(facts))
    logs = []
    for checkpoint in (None, str(folder / "run" / "checkpoint-3")):
        trainer = trained(
            folder / "run", "everything", per_device_train_batch_size=4, **RESUME, resume_from_checkpoint=checkpoint
        )
        logs.append(losses(trainer))
    if trainer.is_world_process_zero():
        (folder / "resume.json").write_text(json.dumps(logs))
    leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
