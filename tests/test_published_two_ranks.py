"""Two ranks on the golden's patients: the single-process gradient, and under its switch the published one.

The published code gathers without a gradient: under DDP every gradient is half the single-process one, but for the
temperature's, which every rank computes whole.
"""

import json
from pathlib import Path

import pytest
from launching import launch
from safetensors.torch import load_file

WORKER = Path(__file__).with_name("published_two_ranks_worker.py")


@pytest.fixture(scope="module")
def two(tmp_path_factory, shared_dir) -> Path:
    """Folder with what two ranks saw."""
    folder = tmp_path_factory.mktemp("published_two")
    launch("cpu_two", 2, WORKER, shared_dir, folder, ACCELERATE_USE_CPU="true")
    return folder


@pytest.mark.parametrize(("name", "scale"), [("single-process gradient", 1.0), ("published gradient", 0.5)])
def test_first_gradients_are_those_of_one_process_times(two, shared_dir, name, scale):
    golden = shared_dir / "golden"
    facts = json.loads((two / f"{name}.json").read_text())
    published = json.loads((golden / "ddp-2rank" / "outputs.json").read_text())
    assert facts["world_size"] == 2
    assert facts["losses"][0] == pytest.approx(published["single_process_loss"], rel=1e-5)
    assert facts["losses"][0] == pytest.approx(published["per_rank"][1]["loss"], rel=1e-5)
    ours = load_file(two / f"{name}.gradients.safetensors")
    compared = 0
    for parameter, gradient in load_file(golden / "tiny-train" / "grads.safetensors").items():
        if gradient.norm() < 1e-4:  # attention key biases: zero in theory
            continue
        expected = gradient if parameter == "temp" else gradient * scale
        error = (ours[parameter] - expected).abs().max() / expected.norm()
        assert error < 1e-4, f"{parameter}: {error:.1e} of the gradient's norm"
        compared += 1
    assert compared > 150 and ours["temp"].abs() > 1e-3


def test_the_published_gradients_are_those_saved_of_two_ranks(two, shared_dir):
    folder = shared_dir / "golden" / "ddp-2rank"
    ours = load_file(two / "published gradient.gradients.safetensors")
    saved = load_file(folder / "outputs.safetensors")
    assert len(saved) == 8 and "temp" in saved
    for parameter, gradient in saved.items():
        assert (ours[parameter] - gradient).abs().max() < 1e-4 * gradient.norm(), parameter
    scales = json.loads((folder / "outputs.json").read_text())["ddp_grad_over_single_process_grad"]
    whole = load_file(two / "single-process gradient.gradients.safetensors")
    assert len(scales) > 150
    for parameter, fit in scales.items():
        ratio = float((ours[parameter] * whole[parameter]).sum() / whole[parameter].square().sum())
        assert ratio == pytest.approx(fit["scale"], rel=1e-4), parameter


def test_steps_on_two_ranks_are_the_published_single_process_ones(two, shared_dir):
    published = json.loads((shared_dir / "golden" / "optim" / "outputs.json").read_text())
    facts = json.loads((two / "single-process gradient.json").read_text())
    assert len(facts["losses"]) == len(facts["temperatures"]) == 3
    assert facts["losses"] == pytest.approx(published["losses_before_each_step"][:3], rel=1e-5)
    assert facts["temperatures"] == pytest.approx(published["temp_after_each_step"][:3], abs=1e-5)
    weights = load_file(two / "single-process gradient.safetensors")
    start = load_file(shared_dir / "golden" / "tiny-train" / "weights.safetensors")
    for organ, is_active in enumerate((True, True, False, False)):
        name = f"vision_projs.{organ}.weight"
        assert bool((weights[name] != start[name]).any()) == is_active, "inactive organs are skipped on every rank"
