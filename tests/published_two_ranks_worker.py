"""Runs on every rank: the golden's patients, three on each of two ranks, and saves what rank 0 saw.

    ACCELERATE_USE_CPU=true accelerate launch --config_file hub_configs/accelerate/cpu_two.yaml \\
        tests/published_two_ranks_worker.py SHARED_DIR OUT_DIR
"""

import json
import sys
from pathlib import Path

from safetensors.torch import save_file

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]

from golden_training import golden_trainer, load_tiny_train, losses  # noqa: E402
from launching import leave  # noqa: E402

from training_fvlm.published_weights import to_published_state_dict  # noqa: E402

# name -> what differs from the published run
CASES = {
    "single-process gradient": {"max_steps": 3},
    "published gradient": {"published_gradient_scale": True, "max_steps": 1},
}


def main(shared_dir: Path, folder: Path) -> None:
    golden = load_tiny_train(shared_dir)
    for name, arguments in CASES.items():
        trainer, recorder = golden_trainer(golden, folder / name, batch_size=3, **arguments)
        trainer.train()
        if trainer.is_world_process_zero():
            weights = to_published_state_dict(trainer.accelerator.unwrap_model(trainer.model).state_dict())
            save_file(recorder.gradients[0], folder / f"{name}.gradients.safetensors")
            save_file({key: value.contiguous() for key, value in weights.items()}, folder / f"{name}.safetensors")
            facts = {"world_size": trainer.args.world_size, "losses": losses(trainer)}
            (folder / f"{name}.json").write_text(json.dumps(facts | {"temperatures": recorder.temperatures}))
    leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
