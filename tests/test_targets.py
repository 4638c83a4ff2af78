"""Targets: each kind against a loop over pairs, closed forms, and what they leave alone."""

import math

import pytest
import torch
from test_loss import random_batch
from torch.nn import functional as F

from modeling_fvlm.loss import (
    contrastive_targets,
    dynamic_weights,
    global_contrastive_loss,
    label_soft_positives,
    mix,
    organ_contrastive_loss,
    peer_distributions,
    published_targets,
    rows_to_one,
    smooth,
    text_soft_positives,
    uncertainty_weighted_sum,
)

SEEDS = range(3)


def fixed_of(seed):
    image, text, caption_id, is_abnormal, is_valid = random_batch(seed)
    assert (is_abnormal & is_valid).sum(0).max() > 1, "no two abnormal patients meet"
    return image, text, caption_id, is_abnormal, is_valid


@pytest.mark.parametrize("seed", SEEDS)
def test_text_soft_positives_equal_a_loop(seed):
    _, text, _, is_abnormal, is_valid = fixed_of(seed)
    soft = text_soft_positives(text, is_abnormal, is_valid, 5.0)
    expected = torch.zeros_like(soft)
    for organ in range(text.shape[1]):
        valid = [patient for patient in range(len(text)) if is_valid[patient, organ]]
        for i in valid:
            weights = {j: math.exp(5.0 * float(text[i, organ] @ text[j, organ])) for j in valid}
            for j in valid:
                if i != j and is_abnormal[i, organ] and is_abnormal[j, organ]:
                    expected[organ, i, j] = weights[j] / sum(weights.values())
    assert expected.any()
    torch.testing.assert_close(soft, expected)


@pytest.mark.parametrize("seed", SEEDS)
def test_label_soft_positives_equal_sets(seed):
    *_, is_abnormal, is_valid = fixed_of(seed)
    generator = torch.Generator().manual_seed(seed)
    num_findings = 20
    labels = torch.randint(-1, 3, (len(is_valid), num_findings), generator=generator).clamp(max=1)
    finding_of_organ = torch.rand(is_valid.shape[1], num_findings, generator=generator) < 0.6
    soft = label_soft_positives(labels, finding_of_organ, is_abnormal, is_valid)
    expected = torch.zeros_like(soft)
    for organ in range(is_valid.shape[1]):
        for i in range(len(labels)):
            for j in range(len(labels)):
                usable = is_valid[[i, j], organ].all() and is_abnormal[[i, j], organ].all() and i != j
                of_organ = finding_of_organ[organ].nonzero()[:, 0].tolist()
                known = {f for f in of_organ if labels[i, f] >= 0 and labels[j, f] >= 0}
                mine, theirs = ({f for f in known if labels[row, f] == 1} for row in (i, j))
                if usable and mine | theirs:
                    expected[organ, i, j] = len(mine & theirs) / len(mine | theirs)
    assert 0 < expected[expected > 0].min() < 1
    torch.testing.assert_close(soft, expected)


def test_jaccard_by_hand():
    yes = torch.ones(4, 1, dtype=torch.bool)
    labels = torch.tensor([[1, 1, 0, 1], [1, 0, -1, 0], [0, 0, 0, 1], [-1, -1, -1, 1]])
    of_organ = torch.tensor([[True, True, True, False]])  # the last finding belongs to another organ
    soft = label_soft_positives(labels, of_organ, yes, yes)[0]
    # 0 and 1 share the first of two; 2 has none; of 3 nothing is known.
    expected = [[0, 0.5, 0, 0], [0.5, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    assert soft.tolist() == expected


def test_autocast_rounds_no_label_target():
    yes = torch.ones(2, 1, dtype=torch.bool)
    labels, of_organ = torch.tensor([[1, 0, 0], [1, 1, 1]]), torch.ones(1, 3, dtype=torch.bool)
    with torch.autocast("cpu", torch.bfloat16):
        soft = label_soft_positives(labels, of_organ, yes, yes)
    assert soft.dtype == torch.float32 and float(soft[0, 0, 1]) == pytest.approx(1 / 3, abs=1e-7)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_peer_speaks_of_abnormal_patients_alone(seed):
    image, text, _, is_abnormal, is_valid = fixed_of(seed)
    to_text, to_image = peer_distributions(image, text, is_abnormal, is_valid, 4.0)
    for organ in range(image.shape[1]):
        rows = [p for p in range(len(image)) if is_valid[p, organ] and is_abnormal[p, organ]]
        expected = torch.zeros(2, len(image), len(image), dtype=image.dtype)
        for i in rows:
            expected[0, i, rows] = (4.0 * image[i, organ] @ text[rows, organ].T).softmax(-1)
            expected[1, i, rows] = (4.0 * text[i, organ] @ image[rows, organ].T).softmax(-1)
        torch.testing.assert_close(to_text[organ], expected[0])
        torch.testing.assert_close(to_image[organ], expected[1])
    assert not torch.allclose(to_text, to_image), "each direction has its own"


@pytest.mark.parametrize("seed", SEEDS)
def test_mixed_and_smoothed_rows_still_sum_to_one(seed):
    image, text, caption_id, is_abnormal, is_valid = fixed_of(seed)
    hard = published_targets(contrastive_targets(caption_id, is_abnormal, is_valid), image.dtype)
    peer, _ = peer_distributions(image, text, is_abnormal, is_valid, 4.0)
    mixed = mix(hard, peer, 0.5)
    amount = torch.linspace(0, 0.3, image.shape[1])
    smoothed = smooth(mixed, is_valid, amount)
    for targets in (hard, mixed, smoothed):
        torch.testing.assert_close(targets.sum(-1), is_valid.T.to(targets.dtype))
    is_taught = (is_abnormal & is_valid).T
    torch.testing.assert_close(mixed[is_taught], 0.5 * hard[is_taught] + 0.5 * peer[is_taught])
    assert torch.equal(mixed[~is_taught], hard[~is_taught])
    for organ, share in enumerate(amount.tolist()):
        count = int(is_valid[:, organ].sum())
        pairs = is_valid[:, organ, None] & is_valid[None, :, organ]
        expected = torch.where(pairs, (1 - share) * mixed[organ] + share / max(count, 1), 0.0)
        torch.testing.assert_close(smoothed[organ], expected)
    assert torch.equal(smooth(mixed, is_valid, torch.zeros(image.shape[1])), mixed)


def test_published_targets_given_are_published_targets_left_out():
    image, text, caption_id, is_abnormal, is_valid = random_batch(1, dtype=torch.float32)
    hard = published_targets(contrastive_targets(caption_id, is_abnormal, is_valid), torch.float32)
    plain = organ_contrastive_loss(image, text, caption_id, is_abnormal, is_valid, 9.0)
    given = organ_contrastive_loss(image, text, caption_id, is_abnormal, is_valid, 9.0, targets=(hard, hard))
    apart = organ_contrastive_loss(image, text, caption_id, is_abnormal, is_valid, 9.0, targets=(hard, hard.clone()))
    assert all(torch.equal(one, other) for one, other in zip(plain[:5], given[:5]))
    torch.testing.assert_close(apart.organ_losses, plain.organ_losses)


@pytest.mark.parametrize("seed", SEEDS)
def test_any_targets_equal_cross_entropy_of_each_direction(seed):
    image, text, caption_id, is_abnormal, is_valid = fixed_of(seed)
    generator = torch.Generator().manual_seed(seed)
    pairs = (is_valid.T[:, :, None] & is_valid.T[:, None, :]).double()
    size = (image.shape[1], len(image), len(image))
    to_text, to_image = (pairs * torch.rand(size, generator=generator, dtype=torch.float64) for _ in range(2))
    to_text, to_image = (each / each.sum(-1, keepdim=True).clamp(min=1e-9) for each in (to_text, to_image))
    leaves = image.requires_grad_(), text.requires_grad_()
    result = organ_contrastive_loss(*leaves, caption_id, is_abnormal, is_valid, 9.0, targets=(to_text, to_image))
    expected = torch.zeros((), dtype=torch.float64)
    floors = torch.zeros(image.shape[1], dtype=torch.float64)
    for organ in result.organ_is_active.nonzero()[:, 0].tolist():
        rows = is_valid[:, organ].nonzero()[:, 0]
        logits = 9.0 * image[rows, organ] @ text[rows, organ].T
        both = [each[organ][rows][:, rows] for each in (to_text, to_image)]
        expected = expected + (F.cross_entropy(logits, both[0]) + F.cross_entropy(logits.T, both[1])) / 2
        entropies = [-(row * row.log()).nan_to_num().sum() for each in both for row in each]
        floors[organ] = sum(entropies) / len(entropies)
    assert result.organ_is_active.any()
    torch.testing.assert_close(result.loss, expected)
    torch.testing.assert_close(result.organ_floors, floors)
    for ours, theirs in zip(torch.autograd.grad(result.loss, leaves), torch.autograd.grad(expected, leaves)):
        assert theirs.any()
        torch.testing.assert_close(ours, theirs)


def test_floor_of_published_targets_is_the_entropy_of_equal_shares():
    # Three normal patients share, one abnormal patient stands alone: (3 ln 3 + 0) / 4.
    is_abnormal = torch.tensor([[False], [False], [False], [True]])
    embeds = F.normalize(torch.randn(4, 1, 5, generator=torch.Generator().manual_seed(0)), dim=-1)
    ids = torch.arange(4)[:, None]
    result = organ_contrastive_loss(embeds, embeds, ids, is_abnormal, torch.ones(4, 1, dtype=torch.bool), 3.0)
    assert result.organ_floors.tolist() == pytest.approx([3 * math.log(3) / 4])


def test_what_invalid_patients_say_reaches_no_target():
    image, text, caption_id, is_abnormal, is_valid = random_batch(0, dtype=torch.float32)
    labels = torch.randint(-1, 2, (len(image), 4), generator=torch.Generator().manual_seed(0))
    of_organ = torch.ones(image.shape[1], 4, dtype=torch.bool)
    for call in (
        lambda abnormal, scale: text_soft_positives(text * scale, abnormal, is_valid, 5.0),
        lambda abnormal, scale: label_soft_positives(labels, of_organ, abnormal, is_valid),
        lambda abnormal, scale: peer_distributions(image * scale, text, abnormal, is_valid, 5.0)[0],
        lambda abnormal, scale: peer_distributions(image * scale, text, abnormal, is_valid, 5.0)[1],
    ):
        scale = torch.where(is_valid, 1.0, 1e4)[..., None]
        torch.testing.assert_close(call(is_abnormal | ~is_valid, scale), call(is_abnormal, torch.ones(())))


def test_an_organ_without_a_valid_patient_is_never_nan():
    image, text, caption_id, is_abnormal, is_valid = random_batch(0, dtype=torch.float32)
    is_valid = torch.zeros_like(is_valid)
    targets = contrastive_targets(caption_id, is_abnormal, is_valid).float()
    targets = rows_to_one(targets + text_soft_positives(text, is_abnormal, is_valid, 5.0))
    both = [mix(targets, peer, 0.5) for peer in peer_distributions(image, text, is_abnormal, is_valid, 5.0)]
    both = tuple(smooth(each, is_valid, torch.full((image.shape[1],), 0.1)) for each in both)
    leaves = image.requires_grad_(), text.requires_grad_()
    variances = torch.zeros(image.shape[1], requires_grad=True)
    identity = caption_id, is_abnormal, is_valid
    for reduction in ("sum", "mean", "uncertainty"):
        result = organ_contrastive_loss(
            *leaves, *identity, 9.0, reduction, targets=both, log_variances=variances,
            organ_weights=torch.full((image.shape[1],), 2.0),
        )  # fmt: skip
        assert result.loss == 0 and not result.organ_floors.any()
        for gradient in torch.autograd.grad(result.loss, leaves):
            assert torch.equal(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize("seed", SEEDS)
def test_organ_weights_and_who_stays_out(seed):
    image, text, caption_id, is_abnormal, is_valid = fixed_of(seed)
    identity = caption_id, is_abnormal, is_valid
    plain = organ_contrastive_loss(image, text, *identity, 9.0)
    weights = torch.linspace(0.5, 2, image.shape[1], dtype=torch.float64)
    out = int(plain.organ_is_active.nonzero()[0, 0])
    weights[out] = 0
    result = organ_contrastive_loss(image, text, *identity, 9.0, organ_weights=weights)
    assert plain.organ_is_active[out] and not result.organ_is_active[out]
    assert result.organ_losses[out] == result.num_contrasted[out] == result.organ_floors[out] == 0
    torch.testing.assert_close(result.loss, (plain.organ_losses * weights).sum())
    mean = organ_contrastive_loss(image, text, *identity, 9.0, "mean", organ_weights=(weights > 0).double())
    torch.testing.assert_close(mean.loss, mean.organ_losses.sum() / (plain.organ_is_active.sum() - 1))


def test_uncertainty_weighting_written_out_and_its_optimum():
    losses = torch.tensor([0.5, 2.0, 0.0], dtype=torch.float64)
    active = torch.tensor([True, True, False])
    variances = torch.tensor([0.3, -0.2, 0.7], dtype=torch.float64, requires_grad=True)
    value = uncertainty_weighted_sum(losses, variances, active)
    expected = math.exp(-0.3) * 0.5 + 0.15 + math.exp(0.2) * 2.0 - 0.1
    assert value.item() == pytest.approx(expected)
    gradient = torch.autograd.grad(value, variances)[0]
    assert gradient[2] == 0 and gradient[:2].all()
    # -exp(-s) L + 1/2 = 0: at the optimum the variance is twice the loss.
    best = torch.tensor([1.0, 4.0, 1.0], dtype=torch.float64).log().requires_grad_()
    at_best = torch.autograd.grad(uncertainty_weighted_sum(losses, best, active), best)[0]
    torch.testing.assert_close(at_best, torch.zeros(3, dtype=torch.float64))
    assert torch.autograd.gradcheck(
        lambda l, s: uncertainty_weighted_sum(l, s, active), (losses.requires_grad_(), best)
    )


def test_dynamic_weights_favour_organs_that_fall_slowest():
    last, before = torch.tensor([0.5, 1.0, 0.0]), torch.tensor([1.0, 1.0, 3.0])
    weights = dynamic_weights(last, before)
    powers = [math.exp(rate / 2) for rate in (0.5, 1.0, 1.0)]  # the third was not there in the last window
    assert weights.tolist() == pytest.approx([3 * power / sum(powers) for power in powers])
    assert dynamic_weights(torch.zeros(4), torch.zeros(4)).tolist() == [1.0] * 4
    hot = dynamic_weights(last, before, temperature=1e6)
    assert hot.tolist() == pytest.approx([1.0] * 3, abs=1e-5)


@pytest.mark.parametrize("patients", [2, 5])
def test_identical_embeddings_leave_the_global_contrast_at_chance(patients):
    same = F.normalize(torch.ones(patients, 4), dim=-1)
    yes = torch.ones(patients, dtype=torch.bool)
    result = global_contrastive_loss(same, same, torch.arange(patients), yes, 14.0)
    assert float(result.loss) == pytest.approx(math.log(patients)) and result.num_contrasted.tolist() == [patients]


def test_global_contrast_written_out_with_equal_reports_and_without_a_report():
    generator = torch.Generator().manual_seed(0)
    volume, report = (F.normalize(torch.randn(4, 6, generator=generator), dim=-1) for _ in range(2))
    report[2] = report[0]
    ids, is_valid = torch.tensor([7, 8, 7, 0]), torch.tensor([True, True, True, False])
    logits = 5.0 * volume[:3] @ report[:3].T
    targets = torch.tensor([[0.5, 0, 0.5], [0, 1, 0], [0.5, 0, 0.5]])
    expected = (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2
    torch.testing.assert_close(global_contrastive_loss(volume, report, ids, is_valid, 5.0).loss, expected)
    alone = global_contrastive_loss(volume, report, torch.full((4,), 7), is_valid, 5.0)
    assert alone.loss == 0, "all reports equal: nothing to tell apart"
