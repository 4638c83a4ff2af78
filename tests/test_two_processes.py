"""Two processes with half the batch each (gloo, started by `accelerate launch`) against one with the whole batch."""

import json
from pathlib import Path

import pytest
import torch
from launching import launch
from safetensors.torch import load_file
from two_process_worker import CASES, RESUMES, run_case

WORKER = Path(__file__).with_name("two_process_worker.py")
OF_FOUR = ("cached", "cached, one rank has no whole organ")


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> Path:
    """What two processes saw in each case."""
    folder = tmp_path_factory.mktemp("two")
    launch("cpu_two", 2, WORKER, folder, ACCELERATE_USE_CPU="true")
    return folder


@pytest.fixture(scope="module")
def four(tmp_path_factory) -> Path:
    """What four processes saw in those cases whose batch they can share."""
    folder = tmp_path_factory.mktemp("four")
    launch("cpu_two", 4, WORKER, folder, *OF_FOUR, ACCELERATE_USE_CPU="true")
    return folder


def read(folder: Path, name: str) -> dict:
    return json.loads((folder / f"{name}.json").read_text())


@pytest.mark.parametrize("name", CASES)
def test_two_processes_have_the_loss_and_the_gradient_of_one(two, tmp_path, name):
    compare_with_one(two, 2, tmp_path, name)


@pytest.mark.parametrize("name", OF_FOUR)
def test_four_processes_have_the_loss_and_the_gradient_of_one(four, tmp_path, name):
    compare_with_one(four, 4, tmp_path, name)


def compare_with_one(folder: Path, num_processes: int, tmp_path: Path, name: str) -> None:
    """Run the case here as well, on one process."""
    facts, gradients = read(folder, name), load_file(folder / f"{name}.safetensors")
    assert facts["world_size"] == num_processes, "two runs of one process agree too"
    assert facts["wrapper"] == "DistributedDataParallel"
    trainer, expected = run_case(name, tmp_path, batch_size=4)
    assert trainer.args.world_size == 1
    log = [line for line in trainer.state.log_history if "loss" in line]
    for one, both in zip(log, facts["log"], strict=True):
        assert both == pytest.approx(one, rel=1e-4, abs=1e-5)
    assert gradients.keys() == expected.keys() and "temperature.value" in gradients
    for parameter, gradient in expected.items():
        torch.testing.assert_close(
            gradients[parameter],
            gradient,
            rtol=1e-4,
            atol=1e-6 + 1e-6 * float(gradient.norm()),
            msg=f"{name}: {parameter}",
        )
    metrics = trainer.evaluate()
    timeless = [key for key in metrics if not key.endswith(("_runtime", "_per_second"))]
    for key in timeless:
        assert facts["eval"][key] == pytest.approx(metrics[key], rel=1e-4, abs=1e-5), key
    if name.endswith("nothing to contrast"):
        assert log[0]["loss"] == 0 and not any(gradient.any() for gradient in gradients.values())
    else:
        assert log[0]["loss"] > 0
        # An organ that did not enter leaves its own projection without a gradient, and nothing else.
        still = [parameter for parameter, gradient in gradients.items() if not gradient.any()]
        assert all(parameter.startswith("organ_projection.") for parameter in still), still


@pytest.mark.parametrize("name", RESUMES)
def test_two_processes_resume_in_the_middle_of_an_epoch(two, name):
    whole, resumed = json.loads((two / f"resume {name}.json").read_text())
    assert [line["step"] for line in whole] == ([1, 2, 3, 4, 5, 6] if name == "plain" else [2, 4, 6])
    assert resumed == whole
    weights = [(two / f"resume {name} {kind}.safetensors").read_bytes() for kind in ("whole", "resumed")]
    assert weights[0] == weights[1]
