"""LoRA and freezing on two processes (gloo, started by `accelerate launch`): the weights of one process."""

from pathlib import Path

import pytest
import torch
from adapt_worker import CASES, run_case, trained_weights
from launching import launch
from safetensors.torch import load_file

WORKER = Path(__file__).with_name("adapt_worker.py")


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> Path:
    """Folder with what two processes had at the end of each case."""
    folder = tmp_path_factory.mktemp("two")
    launch("cpu_two", 2, WORKER, folder, ACCELERATE_USE_CPU="true")
    return folder


@pytest.mark.parametrize("name", CASES)
def test_two_processes_come_to_the_weights_of_one(two, tmp_path, name):
    of_two = load_file(two / f"{name}.safetensors")
    trainer = run_case(name, tmp_path, world_size=1)
    assert trainer.args.world_size == 1
    of_one = trained_weights(trainer)
    assert of_one.keys() == of_two.keys() and len(of_one) > 10
    for parameter, weight in of_one.items():
        torch.testing.assert_close(of_two[parameter], weight, rtol=1e-3, atol=2e-5, msg=f"{name}: {parameter}")
    files = {path.name for path in (two / name / "checkpoint-4").iterdir()}
    assert ("adapter" in files) == name.startswith("lora")
    assert ("model.safetensors" in files) == (name == "frozen")
