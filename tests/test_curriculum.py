"""The curriculum of organs: when each enters, in which order, and that it is resumed where it stood."""

import json
import math

import pytest
import torch

from modeling_fvlm.loss import OrganLoss
from training_fvlm.curriculum import Curriculum


def organ_loss(losses, patients=4):
    """A contrast whose organs have these losses; None: the organ did not enter."""
    active = torch.tensor([loss is not None for loss in losses])
    values = torch.tensor([loss or 0.0 for loss in losses])
    return OrganLoss(values.sum(), values, active, active * patients)


def test_frequent_organs_come_first_and_all_are_in_at_the_end():
    curriculum = Curriculum(4, "frequency", start=0.25, end=0.75, num_abnormal=[3, 9, 0, 9])
    entered = {p: curriculum.has_entered(p).tolist() for p in (0.0, 0.2, 0.25, 0.26, 0.5, 0.51, 0.75, 1.0)}
    assert entered[0.0] == [False, True, False, False], "of two equally frequent ones the first"
    assert entered[0.2] == entered[0.25] == [False, True, False, True]
    assert entered[0.26] == entered[0.5] == [True, True, False, True]
    assert entered[0.51] == entered[0.75] == entered[1.0] == [True] * 4


@pytest.mark.parametrize("kind", ["frequency", "difficulty"])
@pytest.mark.parametrize("num_organs, start, end", [(4, 0.25, 0.5), (24, 0.1, 1.0), (5, 0.0, 0.3), (3, 1.0, 0.5)])
def test_who_is_in_stays_in(kind, num_organs, start, end):
    curriculum = Curriculum(num_organs, kind, start=start, end=end, probe=0.1, num_abnormal=list(range(num_organs)))
    curriculum.end_step(0.1)
    before = torch.zeros(num_organs, dtype=torch.bool)
    for step in range(10, 101):
        now = curriculum.has_entered(step / 100)
        assert (now | ~before).all() and now.any()
        before = now
    assert before.all()
    # The count is the formula's, also where a sum of floats lies a hair above a whole number.
    if kind == "frequency" and num_organs == 4:
        assert [curriculum.num_entered(end * third / 3) for third in range(4)] == [1, 2, 3, 4]


def test_the_probe_measures_loss_against_chance():
    curriculum = Curriculum(4, "difficulty", start=0.25, end=0.6, probe=0.2)
    for progress, losses in ((0.05, [1.2, 0.3, None, 0.9]), (0.1, [1.0, 0.9, None, None])):
        assert curriculum.has_entered(progress).all(), "all train while it is measured"
        curriculum.observe(organ_loss(losses))
        curriculum.end_step(progress)
    # The same losses in a larger contrast are farther below chance.
    curriculum.observe(organ_loss([None, None, None, 0.5], patients=64))
    curriculum.end_step(0.2)
    chance = math.log(4)
    means = [1.1 / chance, 0.6 / chance, math.inf, (0.9 / chance + 0.5 / math.log(64)) / 2]
    assert curriculum.order == sorted(range(4), key=means.__getitem__) == [3, 1, 0, 2]
    assert curriculum.has_entered(0.2).tolist() == [False, False, False, True]
    curriculum.observe(organ_loss([0.0] * 4))
    curriculum.end_step(0.3)
    assert curriculum.order == [3, 1, 0, 2], "what comes after the probe changes nothing"


def test_it_is_resumed_in_the_probe_and_after_it():
    def run(curriculum, steps):
        seen = []
        for step in steps:
            seen.append(curriculum.has_entered(step / 20).tolist())
            generator = torch.Generator().manual_seed(step)
            curriculum.observe(organ_loss(torch.rand(5, generator=generator).tolist()))
            curriculum.end_step((step + 1) / 20)
        return seen

    def fresh():
        return Curriculum(5, "difficulty", start=0.2, end=0.9, probe=0.3)

    whole = run(fresh(), range(20))
    for stop in (3, 6, 12):
        stopped, resumed = fresh(), fresh()
        before = run(stopped, range(stop))
        resumed.load_state_dict(json.loads(json.dumps(stopped.state_dict())))
        assert before + run(resumed, range(stop, 20)) == whole


def test_frequency_needs_the_numbers():
    with pytest.raises(ValueError, match="number of abnormal captions"):
        Curriculum(3, "frequency", start=0.5, end=0.5)
