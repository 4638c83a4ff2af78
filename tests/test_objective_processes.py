"""The objective on two processes (gloo): losses, teachers and peers of one process, the same on both ranks."""

import json
from pathlib import Path

import pytest
import torch
from launching import launch
from objective_worker import CASES, run_case
from safetensors.torch import load_file
from test_objective_training import losses, states_of

WORKER = Path(__file__).with_name("objective_worker.py")


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> Path:
    """Folder with what two processes held after each case."""
    folder = tmp_path_factory.mktemp("two")
    launch("cpu_two", 2, WORKER, folder, ACCELERATE_USE_CPU="true")
    return folder


@pytest.mark.parametrize("name", CASES)
def test_two_processes_train_as_one(two, tmp_path, name):
    facts = json.loads((two / f"{name}.json").read_text())
    assert facts["world_size"] == 2
    trainer = run_case(name, tmp_path, processes=1)
    for one, both in zip(losses(trainer), facts["log"], strict=True):
        assert both == pytest.approx(one, rel=1e-3, abs=1e-4)
    ranks = [load_file(two / f"{name} {rank}.safetensors") for rank in (0, 1)]
    expected = states_of(trainer)
    assert ranks[0].keys() == ranks[1].keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(ranks[0][key], ranks[1][key]), f"{key} differs between the ranks"
        torch.testing.assert_close(ranks[0][key], value, rtol=1e-2, atol=2e-4)
    kinds = {"uncertainty": {"model"}, "co-teaching": {"model", "peer"}}
    assert {key.split(".")[0] for key in expected} == kinds.get(name, {"model", "teacher", "peer"})


def test_two_processes_resume_to_the_digit(two):
    whole, resumed = json.loads((two / "resume.json").read_text())
    assert len(whole) == 4 and resumed == whole
