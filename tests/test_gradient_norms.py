"""Gradient norms of the parts of the model, from those of its parameters."""

import math

import pytest
import torch

from training_fvlm.gradient_norms import GradientNorms, places_by_tower

NAMES = [
    "module.vision_model.a",
    "vision_model.b",
    "base_model.text_model.c.lora_A.default.weight",
    "temperature.value",
]
NAMES += ["organ_pooling.query", "text_projection.weight", "organ_projection.weight_0", "organ_log_variances"]


def test_parameters_belong_to_the_part_that_their_name_says():
    assert places_by_tower(NAMES) == {
        **{"vision": [0, 1], "text": [2], "temperature": [3], "pooling": [4], "projections": [5, 6], "other": [7]}
    }


def test_root_mean_squares_over_the_steps():
    norms = GradientNorms()
    assert norms.root_mean_squares() == {}
    steps = torch.rand((5, len(NAMES)), generator=torch.Generator().manual_seed(0))
    for step in steps:
        norms.add(NAMES, step)
    found = norms.root_mean_squares()
    for tower, places in places_by_tower(NAMES).items():
        assert found[tower] == pytest.approx(math.sqrt(float(steps[:, places].square().sum(1).mean())))
    norms.clear()
    norms.add(NAMES[:2], torch.tensor([3.0, 4.0]))  # the others are frozen now
    assert norms.root_mean_squares() == {"vision": pytest.approx(5.0)}
    assert norms.root_mean_squares(lambda squares: 4 * squares) == {"vision": pytest.approx(10.0)}


def test_the_factor_of_a_loss_scaler_is_taken_out_and_an_overflow_passed_over():
    norms = GradientNorms()
    norms.add(NAMES[:4], 1024 * torch.tensor([1.0, 2.0, 2.0, 4.0]), total=5.0)
    norms.add(NAMES[:4], torch.tensor([1.0, math.inf, 2.0, 4.0]), total=math.inf)
    found = norms.root_mean_squares()
    assert found == {name: pytest.approx(value) for name, value in zip(found, (math.sqrt(5), 2.0, 4.0), strict=True)}
    norms.add([], None)  # an engine that keeps its gradients to itself
    assert norms.root_mean_squares() == found


def test_a_window_goes_on_from_a_checkpoint():
    whole, first, second = GradientNorms(), GradientNorms(), GradientNorms()
    steps = torch.rand((4, len(NAMES)), generator=torch.Generator().manual_seed(1))
    for number, step in enumerate(steps):
        whole.add(NAMES, step)
        if number < 2:
            first.add(NAMES, step)
    second.load_state_dict(first.state_dict())
    for step in steps[2:]:
        second.add(NAMES, step)
    assert second.root_mean_squares() == whole.root_mean_squares()
