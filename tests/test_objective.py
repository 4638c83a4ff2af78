"""The objective of a training: nothing changes while all is off, and every part against its formula written out."""

import json
import math

import pytest
import torch
from test_loss import random_batch
from torch.nn import functional as F

from modeling_fvlm import FVLMConfig
from modeling_fvlm.loss import (
    contrastive_targets,
    dynamic_weights,
    global_contrastive_loss,
    label_soft_positives,
    mix,
    organ_contrastive_loss,
    peer_distributions,
    smooth,
    text_soft_positives,
)
from training_fvlm.objective import Objective, Terms
from training_fvlm.objective_settings import ObjectiveSettings, organ_numbers

ORGANS = [f"organ{number}" for number in range(6)]
SCALE = torch.tensor(9.0)
START = {"step": 0, "progress": 0.0}


def make_config(**fields):
    return FVLMConfig(organs=ORGANS, **fields)


def make_batch(seed=0, patients=7, dtype=torch.float32):
    """All that a contrast can hold."""
    generator = torch.Generator().manual_seed(100 + seed)
    image, text, caption_id, is_abnormal, is_valid = random_batch(seed, patients, dtype=dtype)

    def unit(*size):
        return F.normalize(torch.randn(*size, generator=generator, dtype=dtype), dim=-1)

    live = {"image_embeds": image, "text_embeds": text}
    live |= {"volume_embeds": unit(patients, 5), "report_embeds": unit(patients, 5)}
    fixed = {"caption_hash": caption_id, "is_abnormal": is_abnormal.long(), "is_valid": is_valid.long()}
    fixed |= {"report_hash": torch.arange(1, patients + 1)}
    fixed |= {"labels": torch.randint(-1, 2, (patients, 8), generator=generator)}
    fixed |= {"teacher_text_embeds": torch.cat([unit(patients, 6, 5), unit(patients, 6, 5)], -1)}
    fixed |= {"teacher_image_embeds": unit(patients, 6, 5), "teacher_logit_scale": torch.full((patients,), 4.0)}
    return live, fixed


def identity_of(fixed):
    return fixed["caption_hash"], fixed["is_abnormal"].bool(), fixed["is_valid"].bool()


FINDINGS = torch.rand(6, 8, generator=torch.Generator().manual_seed(3)) < 0.5
# All that can be asked for at once, and the config it needs.
EVERYTHING = {
    "targets": ["momentum", "labels", "co_teaching"],
    "label_task": "given",
    "organ_label_smoothing": ["0.05", "organ2=0.2"],
    "curriculum": "frequency",
    "global_weight": 0.5,
}
EVERYTHING_CONFIG = {"organ_reduction": "uncertainty", "volume_pooling": "mean"}


def everything(**changes):
    settings = ObjectiveSettings(**(EVERYTHING | changes))
    return Objective(
        make_config(**EVERYTHING_CONFIG), settings, num_abnormal=[5, 1, 4, 2, 3, 0], finding_of_organ=FINDINGS
    )


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("seed", range(3))
def test_with_everything_off_it_is_the_published_loss_bit_for_bit(seed, reduction):
    live, fixed = make_batch(seed)
    leaves = [live["image_embeds"].requires_grad_(), live["text_embeds"].requires_grad_()]
    scale = SCALE.clone().requires_grad_()
    ours = Objective(make_config(organ_reduction=reduction), ObjectiveSettings())(
        live, fixed, scale, step=2, progress=0.3
    )
    theirs = organ_contrastive_loss(*leaves, *identity_of(fixed), scale, reduction)
    assert ours.loss > 0 and ours.terms == {}
    for name in ("loss", "organ_losses", "organ_is_active", "num_contrasted", "organ_floors"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
    gradients = [torch.autograd.grad(result.loss, [*leaves, scale]) for result in (ours, theirs)]
    assert all(torch.equal(one, other) and one.any() for one, other in zip(*gradients))
    assert not ObjectiveSettings().objective_faults()


@pytest.mark.parametrize(
    "targets", [["momentum"], ["labels"], ["co_teaching"], ["published", "momentum", "labels"], EVERYTHING["targets"]]
)
@pytest.mark.parametrize("smoothing", [[], ["0.1", "organ1=0.3"]])
def test_targets_are_put_together_in_the_stated_order(targets, smoothing):
    live, fixed = make_batch()
    settings = ObjectiveSettings(
        targets=targets, momentum_alpha=0.7, label_alpha=1.5, co_teaching_alpha=0.4, organ_label_smoothing=smoothing
    )
    objective = Objective(make_config(), settings, finding_of_organ=FINDINGS)
    texts = fixed["teacher_text_embeds"]
    if not {"momentum", "co_teaching"} <= set(targets):  # one teacher speaks: half as wide
        fixed["teacher_text_embeds"] = texts[..., 5:] if "co_teaching" in targets else texts[..., :5]
    is_abnormal, is_valid = identity_of(fixed)[1:]
    expected = contrastive_targets(*identity_of(fixed)).float()
    if "momentum" in targets:
        expected = expected + 0.7 * text_soft_positives(texts[..., :5], is_abnormal, is_valid, SCALE)
    if "labels" in targets:
        expected = expected + 1.5 * label_soft_positives(fixed["labels"], FINDINGS, is_abnormal, is_valid)
    both = [expected / expected.sum(-1, keepdim=True).clamp(min=1e-9)] * 2
    if "co_teaching" in targets:
        peer = peer_distributions(fixed["teacher_image_embeds"], texts[..., 5:], is_abnormal, is_valid, 4.0)
        both = [mix(each, soft, 0.4) for each, soft in zip(both, peer)]
    if smoothing:
        both = [smooth(each, is_valid, torch.tensor([0.1, 0.3, 0.1, 0.1, 0.1, 0.1])) for each in both]
    for ours, theirs in zip(objective.targets(fixed, SCALE), both, strict=True):
        torch.testing.assert_close(ours, theirs)
    loss = objective(live, fixed, SCALE, **START).loss
    published = Objective(make_config(), ObjectiveSettings())(live, fixed, SCALE, **START).loss
    assert loss.isfinite() and not torch.isclose(loss, published)


def test_targets_reach_no_gradient():
    live, fixed = make_batch()
    fixed["teacher_image_embeds"].requires_grad_(), fixed["teacher_text_embeds"].requires_grad_()
    scale = SCALE.clone().requires_grad_()
    objective = everything()
    assert all(not target.requires_grad for target in objective.targets(fixed, scale))


def test_order_of_the_patients_does_not_matter():
    live, fixed = make_batch()
    order = torch.tensor([3, 0, 6, 1, 5, 2, 4])
    variances = torch.linspace(-0.5, 0.5, 6)
    for objective in (everything(), Objective(make_config(), ObjectiveSettings())):
        given = {name: tensor[order] for name, tensor in live.items()}
        again = {name: tensor[order] for name, tensor in fixed.items()}
        when = {"step": 3, "progress": 0.4}
        one, other = objective(live, fixed, SCALE, variances, **when), objective(given, again, SCALE, variances, **when)
        torch.testing.assert_close(other.loss, one.loss)
        torch.testing.assert_close(other.organ_losses, one.organ_losses)
        assert set(other.terms) == set(one.terms)


def test_gradients_of_everything_at_once_in_float64():
    live, fixed = make_batch(dtype=torch.float64)
    names = ("image_embeds", "text_embeds", "volume_embeds", "report_embeds")
    inputs = [live[name].requires_grad_() for name in names]
    inputs += [torch.tensor(3.0, dtype=torch.float64).requires_grad_()]
    inputs += [torch.linspace(-0.5, 0.5, 6, dtype=torch.float64).requires_grad_()]
    objective = everything()
    targets = objective.targets(fixed, torch.tensor(3.0))
    objective.targets = lambda fixed, scale: targets  # the teacher's sharpness is the model's: not differentiated

    def loss(*given):
        return objective(dict(zip(names, given)), fixed, given[4], given[5].double(), step=1, progress=0.2).loss

    assert torch.autograd.gradcheck(loss, inputs)


def test_nothing_to_contrast_is_a_zero_with_zero_gradients():
    live, fixed = make_batch()
    nothing = fixed | {"is_valid": torch.zeros_like(fixed["is_valid"]), "report_hash": torch.zeros(7).long()}
    leaves = [tensor.requires_grad_() for tensor in live.values()]
    scale, variances = SCALE.clone().requires_grad_(), torch.zeros(6, requires_grad=True)
    result = everything()(live, nothing, scale, variances, step=1, progress=0.3)
    assert result.loss == 0 and not result.organ_is_active.any()
    for gradient in torch.autograd.grad(result.loss, [*leaves, scale, variances]):
        assert torch.equal(gradient, torch.zeros_like(gradient))


# --- the global contrast ------------------------------------------------------------------------------------------


def test_the_global_contrast_is_added_and_leaves_out_who_has_none():
    live, fixed = make_batch()
    fixed["report_hash"][2] = 0
    live["volume_embeds"][4] = 0
    objective = Objective(make_config(volume_pooling="mean"), ObjectiveSettings(global_weight=0.25))
    result = objective(live, fixed, SCALE, **START)
    plain = Objective(make_config(), ObjectiveSettings())(live, fixed, SCALE, **START)
    rows = [0, 1, 3, 5, 6]
    yes = torch.ones(5, dtype=torch.bool)
    whole = global_contrastive_loss(
        live["volume_embeds"][rows], live["report_embeds"][rows], torch.arange(5), yes, SCALE
    )
    torch.testing.assert_close(result.loss, plain.loss + 0.25 * whole.loss)
    torch.testing.assert_close(result.terms["global_loss"], whole.loss)
    assert result.terms["global_chance"].item() == pytest.approx(math.log(5))


@pytest.mark.parametrize(
    "schedule, step, progress, organs, whole",
    [
        ("constant", 3, 0.0, 1.0, 2.0),
        ("warmup", 0, 0.0, 1.0, 0.0),
        ("warmup", 0, 0.05, 1.0, 0.5),
        ("warmup", 0, 0.2, 1.0, 2.0),
        ("alternate", 0, 0.0, 0.0, 2.0),
        ("alternate", 1, 0.0, 1.0, 0.0),
        ("alternate", 2, 0.0, 0.0, 2.0),
    ],
)
def test_schedules_of_the_global_contrast(schedule, step, progress, organs, whole):
    live, fixed = make_batch()
    settings = ObjectiveSettings(global_weight=2.0, global_schedule=schedule, global_warmup=0.2)
    objective = Objective(make_config(volume_pooling="attention"), settings)
    leaves = [tensor.requires_grad_() for tensor in live.values()]
    result = objective(live, fixed, SCALE, step=step, progress=progress)
    plain = Objective(make_config(), ObjectiveSettings())(live, fixed, SCALE, step=step, progress=progress)
    torch.testing.assert_close(result.loss, organs * plain.loss + whole * result.terms["global_loss"])
    # What has no weight in a step has a gradient all the same, of zeros: DDP waits for it.
    gradients = torch.autograd.grad(result.loss, leaves)
    assert [bool(gradient.any()) for gradient in gradients] == [organs > 0] * 2 + [whole > 0] * 2


# --- balance ------------------------------------------------------------------------------------------------------


def test_dwa_compares_windows_of_steps():
    live, fixed = make_batch()
    objective = Objective(make_config(organ_reduction="dwa"), ObjectiveSettings(dwa_window=2, dwa_temperature=1.5))
    plain = organ_contrastive_loss(live["image_embeds"], live["text_embeds"], *identity_of(fixed), SCALE)
    is_active = plain.organ_is_active
    torch.testing.assert_close(objective(live, fixed, SCALE, **START).loss, plain.loss)
    # Two windows of two steps; organ 0 falls from 2 to 1, the others stand.
    for step, first in enumerate((1.5, 2.5, 0.5, 1.5)):
        losses = torch.ones(6)
        losses[0] = first
        objective.observe(plain._replace(organ_losses=losses * is_active))
        objective.end_step(step + 1, 0.0)
        weights = objective(live, fixed, SCALE, **START).terms["weight/organ0"]
        assert (weights == 1) == (step < 3)
    last, before = torch.ones(6) * is_active, torch.ones(6) * is_active
    before[0] = 2
    expected = dynamic_weights(last, before, 1.5)
    result = objective(live, fixed, SCALE, **START)
    torch.testing.assert_close(torch.stack([result.terms[f"weight/{organ}"] for organ in ORGANS]), expected)
    torch.testing.assert_close(result.loss, (expected * plain.organ_losses).sum())
    assert expected[0] < 1 and float(expected.mean()) == pytest.approx(1)


def test_uncertainty_reads_the_models_variances_and_logs_what_they_weigh():
    live, fixed = make_batch()
    objective = Objective(make_config(organ_reduction="uncertainty"), ObjectiveSettings())
    variances = torch.linspace(-1, 1, 6)
    result = objective(live, fixed, SCALE, variances, **START)
    active = result.organ_is_active
    expected = ((-variances).exp() * result.organ_losses + variances / 2)[active].sum()
    torch.testing.assert_close(result.loss, expected)
    assert result.terms["weight/organ0"].item() == pytest.approx(math.e)


def test_organs_that_the_curriculum_has_not_let_in_are_not_in_the_loss():
    live, fixed = make_batch()
    settings = ObjectiveSettings(curriculum="frequency", curriculum_start=0.3, curriculum_end=0.5)
    objective = Objective(make_config(organ_reduction="mean"), settings, num_abnormal=[1, 9, 8, 7, 6, 5])
    early, late = (
        objective(live, fixed, SCALE, **START),
        objective(live, fixed, SCALE, step=0, progress=0.5),
    )
    plain = Objective(make_config(organ_reduction="mean"), ObjectiveSettings())(
        live, fixed, SCALE, step=0, progress=0.0
    )
    assert plain.organ_is_active[0] and not early.organ_is_active[0]
    torch.testing.assert_close(late.loss, plain.loss)
    assert early.terms["weight/organ0"] == 0 and late.terms["weight/organ0"] == 1


# --- state --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", [1, 3, 7, 11])
def test_a_resumed_objective_goes_on_to_the_digit(stop):
    config = make_config(organ_reduction="dwa", volume_pooling="mean")
    settings = ObjectiveSettings(
        dwa_window=2, global_schedule="alternate", curriculum="difficulty", curriculum_probe=0.3, curriculum_end=0.9
    )

    def run(objective, first, last):
        losses = []
        for step in range(first, last):
            result = objective(*make_batch(seed=step), SCALE, step=step, progress=step / 12)
            objective.observe(result)
            objective.end_step(step + 1, (step + 1) / 12)
            losses.append(result.loss.item())
        return losses

    whole = run(Objective(config, settings), 0, 12)
    stopped = Objective(config, settings)
    before = run(stopped, 0, stop)
    resumed = Objective(config, settings)
    assert resumed.has_state and not Objective(make_config(volume_pooling="mean"), ObjectiveSettings()).has_state
    resumed.load_state_dict(json.loads(json.dumps(stopped.state_dict())))
    assert before + run(resumed, stop, 12) == whole
    assert len(set(whole)) == 12


def test_terms_are_means_over_the_contrasts_of_a_line():
    live, fixed = make_batch()
    objective = Objective(make_config(volume_pooling="mean"), ObjectiveSettings())
    result = objective(live, fixed, SCALE, **START)
    terms, resumed = Terms(), Terms()
    assert terms.means() == {}
    terms.add(result)
    resumed.load_state_dict(terms.state_dict())
    for each in (terms, resumed):
        each.add(result._replace(terms={"global_loss": torch.tensor(1.0), "global_chance": torch.tensor(0.0)}))
        loss, chance = result.terms["global_loss"].item(), math.log(7)
        assert each.means() == pytest.approx({"global_loss": (loss + 1) / 2, "global_chance": chance / 2})
        each.clear()
        assert each.means() == {}


# --- settings -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"targets": ["momentum", "labls"]}, "--targets 'labls' is none of published, momentum, co_teaching, labels"),
        ({"targets": ["labels"]}, "--targets labels needs --label_task"),
        ({"label_task": "synthetic"}, "without --targets labels would never be read"),
        ({"co_teaching_alpha": 1.5}, "--co_teaching_alpha 1.5 must lie in [0, 1]"),
        ({"teacher_momentum": -0.1}, "--teacher_momentum -0.1 must lie in [0, 1]"),
        ({"global_weight": -1.0}, "--global_weight -1.0 must lie in [0, inf]"),
        ({"global_schedule": "always"}, "--global_schedule 'always' is none of constant, warmup, alternate"),
        ({"dwa_window": 0}, "--dwa_window 0 must be at least 1"),
        ({"dwa_temperature": 0.0}, "--dwa_temperature 0.0 must be above 0"),
        ({"organ_sampling": "even"}, "--organ_sampling 'even' is none of uniform, balanced"),
        ({"curriculum": "length"}, "--curriculum 'length' is none of none, frequency, difficulty"),
        ({"curriculum": "difficulty", "curriculum_probe": 0.5}, "--curriculum_probe 0.5 must end before"),
        ({"organ_label_smoothing": ["lung=1"]}, "--organ_label_smoothing lung=1: give a number in [0, 1)"),
        ({"organ_token_dropout": ["half"]}, "--organ_token_dropout half: give a number in [0, 1)"),
    ],
)
def test_impossible_settings_are_named(fields, message):
    assert any(message in fault for fault in ObjectiveSettings(**fields).objective_faults())


def test_numbers_of_organs():
    assert organ_numbers([], ["lung", "heart"], "--x") == [0.0, 0.0]
    assert organ_numbers(["heart=0.2", 0.1], ["lung", "heart"], "--x") == [0.1, 0.2]
    assert organ_numbers(["big lung=0.2"], ["big lung", "heart"], "--x") == [0.2, 0.0]
    assert organ_numbers({"heart": 0.2}, ["lung", "heart"], "--x") == [0.0, 0.2]
    assert organ_numbers(0.3, ["lung", "heart"], "--x") == organ_numbers("0.3", ["a", "b"], "--x") == [0.3, 0.3]
    with pytest.raises(ValueError, match=r"--x: \['liver'\] are none of the model's organs"):
        organ_numbers(["liver=0.1"], ["lung"], "--x")
    with pytest.raises(ValueError, match="need finding_of_organ"):
        Objective(make_config(), ObjectiveSettings(targets=["labels"], label_task="synthetic"))
