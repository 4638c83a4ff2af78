"""The loss against a loop over organs and patients, and against closed forms."""

import math

import pytest
import torch
from torch.nn import functional as F

from modeling_fvlm import contrastive_targets, organ_contrastive_loss


def slow_loss(image_embeds, text_embeds, caption_id, is_abnormal, is_valid, logit_scale):
    """One organ at a time on its valid patients only, targets filled pair by pair."""
    losses = {}
    for organ in range(image_embeds.shape[1]):
        patients = [patient for patient in range(len(image_embeds)) if is_valid[patient, organ]]
        if not any(is_abnormal[patient, organ] for patient in patients):
            continue
        targets = torch.zeros(len(patients), len(patients), dtype=image_embeds.dtype)
        for row, patient in enumerate(patients):
            for column, other in enumerate(patients):
                is_same = caption_id[patient, organ] == caption_id[other, organ]
                are_normal = not is_abnormal[patient, organ] and not is_abnormal[other, organ]
                targets[row, column] = 1.0 if is_same or are_normal else 0.0
            targets[row] /= targets[row].sum()
        if len(targets.unique()) == 1:
            continue
        image, text = image_embeds[patients, organ], text_embeds[patients, organ]
        image_to_text = F.cross_entropy(logit_scale * image @ text.T, targets)
        text_to_image = F.cross_entropy(logit_scale * text @ image.T, targets)
        losses[organ] = (image_to_text + text_to_image) / 2
    return losses


def random_batch(seed, patients=7, organs=6, dim=5, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    image = F.normalize(torch.randn(patients, organs, dim, generator=generator, dtype=dtype), dim=-1)
    text = F.normalize(torch.randn(patients, organs, dim, generator=generator, dtype=dtype), dim=-1)
    caption_id = torch.randint(-(2**62), 2**62, (4,), generator=generator)[
        torch.randint(0, 4, (patients, organs), generator=generator)
    ]
    is_abnormal = torch.rand(patients, organs, generator=generator) < 0.5
    is_valid = torch.rand(patients, organs, generator=generator) < 0.7
    is_valid[:, 0] = True
    is_abnormal[:, 1] = False  # nobody abnormal: never enters
    is_valid[:, 2] = False
    is_valid[3, 2] = is_abnormal[3, 2] = True  # a single patient: enters, nothing to contrast
    is_abnormal[:, 3], caption_id[:, 3] = True, 7  # all captions equal
    is_abnormal[:, 4] &= ~is_valid[:, 4]  # abnormal ones are all invalid
    return image, text, caption_id, is_abnormal, is_valid


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("seed", range(5))
def test_loss_and_gradients_equal_a_loop_over_organs(seed, reduction):
    image, text, caption_id, is_abnormal, is_valid = random_batch(seed)
    leaves = [image.requires_grad_(), text.requires_grad_(), torch.tensor(9.0, dtype=torch.float64).requires_grad_()]
    result = organ_contrastive_loss(*leaves[:2], caption_id, is_abnormal, is_valid, leaves[2], reduction)
    slow = slow_loss(*leaves[:2], caption_id, is_abnormal, is_valid, leaves[2])
    assert {0, 5} & set(slow) and not {1, 2, 3, 4} & set(slow), "the batch must hold organs that enter and that do not"

    for organ in range(image.shape[1]):
        assert bool(result.organ_is_active[organ]) == (organ in slow)
        if organ in slow:
            torch.testing.assert_close(result.organ_losses[organ], slow[organ])
            assert result.num_contrasted[organ] == is_valid[:, organ].sum()
        else:
            assert result.organ_losses[organ] == 0 and result.num_contrasted[organ] == 0
    expected = sum(slow.values()) / (len(slow) if reduction == "mean" else 1)
    torch.testing.assert_close(result.loss, expected)
    for ours, theirs in zip(torch.autograd.grad(result.loss, leaves), torch.autograd.grad(expected, leaves)):
        assert theirs.any()
        torch.testing.assert_close(ours, theirs)


def test_targets_are_own_equal_and_normal_with_normal():
    caption_id = torch.tensor([[5], [5], [6], [7], [8]])
    is_abnormal = torch.tensor([[True], [True], [False], [False], [True]])
    is_valid = torch.tensor([[True], [True], [True], [True], [False]])
    expected = [
        [True, True, False, False, False],
        [True, True, False, False, False],
        [False, False, True, True, False],
        [False, False, True, True, False],
        [False, False, False, False, False],
    ]
    assert contrastive_targets(caption_id, is_abnormal, is_valid).tolist() == [expected]


@pytest.mark.parametrize("patients", [2, 3, 8])
def test_identical_embeddings_are_at_chance(patients):
    """The loss of a collapsed model: log(patients), 0.693 at two. It must be told from a healthy one."""
    same = F.normalize(torch.ones(patients, 2, 4), dim=-1)
    result = organ_contrastive_loss(
        same,
        same,
        torch.arange(patients)[:, None].expand(-1, 2),
        torch.ones(patients, 2, dtype=torch.bool),
        torch.ones(patients, 2, dtype=torch.bool),
        14.0,
    )
    torch.testing.assert_close(result.organ_losses, torch.full((2,), math.log(patients)))
    torch.testing.assert_close(result.loss, torch.tensor(2 * math.log(patients)))


def test_two_orthogonal_pairs_have_the_closed_form():
    scale = 3.0
    embeds = torch.eye(2)[:, None]
    yes = torch.ones(2, 1, dtype=torch.bool)
    loss = organ_contrastive_loss(embeds, embeds, torch.tensor([[0], [1]]), yes, yes, scale).loss
    torch.testing.assert_close(loss, torch.tensor(math.log1p(math.exp(-scale))))


def test_invalid_patients_have_no_influence_and_no_gradient():
    image, text, caption_id, is_abnormal, is_valid = random_batch(0)
    image.requires_grad_(), text.requires_grad_()
    loss = organ_contrastive_loss(image, text, caption_id, is_abnormal, is_valid, 9.0).loss
    for grad in torch.autograd.grad(loss, [image, text]):
        assert grad[is_valid].any() and not grad[~is_valid].any()
    garbage = torch.where(is_valid[..., None], image.detach(), 1e3)
    other_id = torch.where(is_valid, caption_id, 7)
    other = organ_contrastive_loss(garbage, text, other_id, is_abnormal | ~is_valid, is_valid, 9.0).loss
    torch.testing.assert_close(other, loss)


def test_nothing_to_contrast_gives_a_zero_that_backpropagates_zeros():
    image, text, caption_id, is_abnormal, is_valid = random_batch(1)
    leaves = [image.requires_grad_(), text.requires_grad_(), torch.tensor(9.0, dtype=torch.float64).requires_grad_()]
    for nothing in (torch.zeros_like(is_valid), is_valid):
        abnormal = torch.zeros_like(is_abnormal) if nothing is is_valid else is_abnormal
        for reduction in ("sum", "mean"):
            result = organ_contrastive_loss(*leaves[:2], caption_id, abnormal, nothing, leaves[2], reduction)
            assert result.loss == 0 and not result.organ_is_active.any()
            for grad in torch.autograd.grad(result.loss, leaves):
                assert torch.equal(grad, torch.zeros_like(grad))


def test_half_precision_embeddings_and_autocast_are_scored_in_float32():
    image, text, caption_id, is_abnormal, is_valid = random_batch(2, dtype=torch.float32)
    image, text = image.bfloat16(), text.bfloat16()
    expected = organ_contrastive_loss(image.float(), text.float(), caption_id, is_abnormal, is_valid, 9.0).loss
    with torch.autocast("cpu", torch.bfloat16):
        loss = organ_contrastive_loss(image, text, caption_id, is_abnormal, is_valid, 9.0).loss
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=0, atol=0)


def test_errors_name_what_was_given():
    batch = random_batch(0)
    with pytest.raises(ValueError, match="reduction must be one of sum, mean, uncertainty, dwa, got 'max'"):
        organ_contrastive_loss(*batch, 1.0, "max")
    with pytest.raises(ValueError, match=r"\(7, 6, 5\), \(7, 5, 5\)"):
        organ_contrastive_loss(batch[0], batch[1][:, :5], *batch[2:], 1.0)
