"""The fine-grained contrastive loss of fVLM: pure functions, tensors in, a scalar out.

From Shui et al., "Large-scale and Fine-grained Vision-language Pre-training for Enhanced CT Image Understanding",
ICLR 2025, https://openreview.net/forum?id=nYpPAT4L3D. For every organ, over the patients whose organ is complete in
the crop and has a caption (valid):

(1) scaled cosine similarities between the organ's image embeddings and its captions' embeddings;
(2) targets: the own caption, equal captions, and normal with normal, each row divided by its sum;
(3) cross-entropy of the rows (image to text) and of the columns (text to image), halved and averaged over patients;
(4) the organ enters when some valid patient is abnormal there and the targets are not all equal (such targets ask
    every patient to match every caption: nothing to contrast);
(5) sum (published) or mean over the organs that entered, or a weighted sum (`uncertainty_weighted_sum`, and
    `dynamic_weights` from step to step).

Other targets than (2), which `organ_contrastive_loss` takes ready-made: soft positives between abnormal patients by a
teacher's texts (`text_soft_positives`), by labels of findings (`label_soft_positives`), by a peer
(`peer_distributions`), and label smoothing (`smooth`). `global_contrastive_loss` contrasts volumes with whole reports.

All organs are done at once under masks. An organ that does not enter gives an exact zero and zero gradients.
"""

from typing import NamedTuple

import torch
from torch import Tensor

# "dwa" (dynamic weight average) is a sum under weights that only a training knows.
REDUCTIONS = ("sum", "mean", "uncertainty", "dwa")


class OrganLoss(NamedTuple):
    """Loss of a batch and of its organs.

    Attributes:
        loss: Scalar; 0 (with a graph of zero gradients) when no organ entered.
        organ_losses: `(organs,)`, 0 where the organ did not enter.
        organ_is_active: `(organs,)` bool: the organ entered the loss.
        num_contrasted: `(organs,)` int64: valid patients of an active organ, 0 elsewhere.
        organ_floors: `(organs,)` without a graph: entropy of the targets, which is the loss of a perfect model; 0 where
            the organ did not enter.
        terms: Further scalars of the training that made this loss, by name, without a graph.
    """

    loss: Tensor
    organ_losses: Tensor
    organ_is_active: Tensor
    num_contrasted: Tensor
    organ_floors: Tensor | None = None
    terms: dict[str, Tensor] | None = None


def contrastive_targets(caption_id: Tensor, is_abnormal: Tensor, is_valid: Tensor) -> Tensor:
    """Tell which caption is a positive of which patient, per organ.

    Args:
        caption_id: `(patients, organs)` int64; equal numbers mean equal captions.
        is_abnormal: `(patients, organs)` bool.
        is_valid: `(patients, organs)` bool.

    Returns:
        Boolean tensor `(organs, patients, patients)`, symmetric: valid pairs with equal captions (a patient's own
        among them) or with both captions normal.
    """
    caption_id, is_abnormal, is_valid = caption_id.T, is_abnormal.bool().T, is_valid.bool().T  # (organs, patients)
    is_equal = caption_id[:, :, None] == caption_id[:, None, :]
    is_normal_pair = ~(is_abnormal[:, :, None] | is_abnormal[:, None, :])
    return (is_equal | is_normal_pair) & is_valid[:, :, None] & is_valid[:, None, :]


def published_targets(is_positive: Tensor, dtype: torch.dtype) -> Tensor:
    """`contrastive_targets` as rows that sum to one (or are zero, of patients that are not valid)."""
    return rows_to_one(is_positive.to(dtype))


def rows_to_one(targets: Tensor) -> Tensor:
    """Divide rows by their sums. A patient's own caption counts 1 in its row, so no valid row sums to less."""
    return targets / targets.sum(-1, keepdim=True).clamp(min=1)


def organ_contrastive_loss(
    image_embeds: Tensor,
    text_embeds: Tensor,
    caption_id: Tensor,
    is_abnormal: Tensor,
    is_valid: Tensor,
    logit_scale: Tensor | float,
    reduction: str = "sum",
    *,
    targets: tuple[Tensor, Tensor] | None = None,
    organ_weights: Tensor | None = None,
    log_variances: Tensor | None = None,
) -> OrganLoss:
    """Contrast every organ of every patient with the captions of that organ in the batch.

    Args:
        image_embeds: `(patients, organs, dim)`, unit length; what stands where `is_valid` is False has
            no influence, but must be finite.
        text_embeds: `(patients, organs, dim)`, unit length: the caption of each patient's organ.
        caption_id: `(patients, organs)` int64; equal numbers mean equal captions.
        is_abnormal: `(patients, organs)` bool.
        is_valid: `(patients, organs)` bool: organ complete in the crop and captioned.
        logit_scale: Factor of the cosine similarities, 1 / temperature.
        reduction: One of `REDUCTIONS`.
        targets: In place of the published ones, of images over captions and of captions over images, each
            `(organs, patients, patients)`: rows of valid patients sum to one over valid patients. Which organs enter
            is decided by the published ones in any case.
        organ_weights: `(organs,)` factors of the organs' losses; an organ of weight 0 does not enter.
        log_variances: `(organs,)`, read by "uncertainty"; without them it sums.

    Returns:
        `OrganLoss`, computed in float32 (float64 for float64 embeddings) whatever autocast says.
    """
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}.")
    if image_embeds.shape != text_embeds.shape or image_embeds.shape[:2] != is_valid.shape:
        raise ValueError(
            "image_embeds and text_embeds must both be (patients, organs, dim) and is_valid (patients, organs), got "
            f"{tuple(image_embeds.shape)}, {tuple(text_embeds.shape)}, {tuple(is_valid.shape)}."
        )
    is_valid = is_valid.bool()
    with torch.autocast(image_embeds.device.type, enabled=False):
        dtype = torch.promote_types(image_embeds.dtype, torch.float32)
        image_embeds, text_embeds = image_embeds.to(dtype).transpose(0, 1), text_embeds.to(dtype).transpose(0, 1)
        # (1) (organs, patients of the images, patients of the captions)
        logits = logit_scale * (image_embeds @ text_embeds.transpose(1, 2))

        # (2)
        is_positive = contrastive_targets(caption_id, is_abnormal, is_valid)
        if targets is None:
            targets = (published_targets(is_positive, dtype),) * 2

        # (3) A finite fill, not -inf: rows of invalid patients would turn into NaN, and NaN survives a mask.
        organ_is_valid = is_valid.T  # (organs, patients)
        pair_is_valid = _valid_pairs(is_valid)
        fill = torch.finfo(dtype).min
        image_to_text = logits.masked_fill(~pair_is_valid, fill).log_softmax(-1)
        text_to_image = logits.transpose(1, 2).masked_fill(~pair_is_valid, fill).log_softmax(-1)
        if targets[0] is targets[1]:
            log_likelihood = targets[0] * (image_to_text + text_to_image).masked_fill(~pair_is_valid, 0)
        else:
            log_likelihood = targets[0] * image_to_text.masked_fill(~pair_is_valid, 0)
            log_likelihood = log_likelihood + targets[1] * text_to_image.masked_fill(~pair_is_valid, 0)
        num_valid = organ_is_valid.sum(1)
        organ_losses = -0.5 * log_likelihood.sum((1, 2)) / num_valid.clamp(min=1)
        with torch.no_grad():
            entropy = sum(torch.special.entr(each).sum((1, 2)) for each in targets) / 2 / num_valid.clamp(min=1)

        # (4) Both conditions at once: targets are all equal exactly when every valid pair is a positive one, and where
        # nobody valid is abnormal every pair is (normal with normal).
        organ_is_active = (pair_is_valid & ~is_positive).flatten(1).any(1)
        if organ_weights is not None:
            organ_is_active = organ_is_active & (organ_weights > 0)
        organ_losses = organ_losses.masked_fill(~organ_is_active, 0)

        # (5)
        weighted = organ_losses if organ_weights is None else organ_losses * organ_weights
        if reduction == "uncertainty" and log_variances is not None:
            loss = uncertainty_weighted_sum(weighted, log_variances, organ_is_active)
        else:
            loss = weighted.sum()
        if reduction == "mean":
            loss = loss / organ_is_active.sum().clamp(min=1)
    num_contrasted, floors = num_valid * organ_is_active, entropy.masked_fill(~organ_is_active, 0)
    return OrganLoss(loss, organ_losses, organ_is_active, num_contrasted, floors)


def global_contrastive_loss(
    volume_embeds: Tensor, report_embeds: Tensor, report_id: Tensor, is_valid: Tensor, logit_scale: Tensor | float
) -> OrganLoss:
    """Contrast whole volumes with whole reports: symmetric cross-entropy, equal reports being positives.

    Args:
        volume_embeds, report_embeds: `(patients, dim)`, unit length.
        report_id: `(patients,)` int64; equal numbers mean equal reports.
        is_valid: `(patients,)` bool: with a report, and with some organ in the crop.
        logit_scale: Factor of the cosine similarities, 1 / temperature.

    Returns:
        `OrganLoss` of one organ, the whole.

    Source:
        Radford et al., ICML 2021, https://arxiv.org/abs/2103.00020, over whole reports as in RADAR
        (alibaba-damo-academy/damo-radar, commit eebc1f2), where a patient's own report is the only positive; two
        reconstructions of one scan have the same report here.
    """
    # All captions abnormal: none is a positive of another but an equal one.
    is_abnormal = torch.ones_like(is_valid, dtype=torch.bool)[:, None]
    embeds = volume_embeds[:, None], report_embeds[:, None]
    return organ_contrastive_loss(*embeds, report_id[:, None], is_abnormal, is_valid[:, None], logit_scale)


def text_soft_positives(
    text_embeds: Tensor, is_abnormal: Tensor, is_valid: Tensor, logit_scale: Tensor | float
) -> Tensor:
    """How alike two abnormal patients' captions are to a teacher that reads them, to be added to the positives.

    `[i and j abnormal, i != j] softmax_j(t_i . t_j / temperature)`, the softmax over all valid patients of the organ, a
    patient's own caption among them.

    Args:
        text_embeds: `(patients, organs, dim)`, unit length: the teacher's of each patient's caption.
        is_abnormal, is_valid: `(patients, organs)` bool.
        logit_scale: 1 / temperature.

    Returns:
        `(organs, patients, patients)`, zero on the diagonal.

    Source:
        RADAR (alibaba-damo-academy/damo-radar, commit eebc1f2): a text encoder whose weights follow by a moving average
        of momentum 0.995, and the model's own temperature.
    """
    with torch.autocast(text_embeds.device.type, enabled=False):
        dtype = torch.promote_types(text_embeds.dtype, torch.float32)
        text_embeds = text_embeds.to(dtype).transpose(0, 1)
        logits = logit_scale * (text_embeds @ text_embeds.transpose(1, 2))
        similarity = logits.masked_fill(~_valid_pairs(is_valid.bool()), torch.finfo(dtype).min).softmax(-1)
        return similarity * _other_abnormal_pairs(is_abnormal, is_valid)


def label_soft_positives(labels: Tensor, finding_of_organ: Tensor, is_abnormal: Tensor, is_valid: Tensor) -> Tensor:
    """How alike the findings of two abnormal patients' organs are, to be added to the positives.

    `[i and j abnormal, i != j] |P_i and P_j| / |P_i or P_j|`: Jaccard's index of the sets of findings that are present,
    over those of the organ that are known of both patients; 0 where neither has one.

    Args:
        labels: `(patients, findings)`: 1 present, 0 absent, -1 unknown.
        finding_of_organ: `(organs, findings)` bool: the finding belongs to the organ.
        is_abnormal, is_valid: `(patients, organs)` bool.

    Returns:
        `(organs, patients, patients)` float32, zero on the diagonal.

    Source:
        Jaccard, Bulletin de la Societe vaudoise des sciences naturelles 37, 1901.
    """
    with torch.autocast(labels.device.type, enabled=False):
        is_present, is_known = (labels == 1).float(), (labels >= 0).float()
        of_organ = finding_of_organ.float()[:, None]  # (organs, 1, findings)
        present = is_present * of_organ  # (organs, patients, findings)
        both = present @ is_present.T
        either = present @ is_known.T + (is_known * of_organ) @ is_present.T - both
        return both / either.clamp(min=1) * _other_abnormal_pairs(is_abnormal, is_valid)


def peer_distributions(
    image_embeds: Tensor, text_embeds: Tensor, is_abnormal: Tensor, is_valid: Tensor, logit_scale: Tensor | float
) -> tuple[Tensor, Tensor]:
    """What a peer model takes for the caption of each abnormal patient among those of abnormal patients.

    Rows of abnormal patients: softmax over the organ's abnormal valid patients of the peer's scaled similarities, of
    its images with its captions, and of its captions with its images. Other rows are zero.

    Args:
        image_embeds, text_embeds: `(patients, organs, dim)`, unit length: the peer's.
        is_abnormal, is_valid: `(patients, organs)` bool.
        logit_scale: The peer's 1 / temperature.

    Returns:
        Of images over captions and of captions over images, each `(organs, patients, patients)`.

    Source:
        Two models that give each other targets for abnormal pairs, mixed in at 0.5: Shui et al., ICLR 2025,
        https://openreview.net/forum?id=nYpPAT4L3D, whose release holds no code for it. Similarities between modalities,
        either direction with its own, as where one model follows the other: Li et al., NeurIPS 2021,
        https://arxiv.org/abs/2107.07651. The softmax over abnormal patients alone is our reading: a normal patient is
        no false negative of an abnormal one.
    """
    with torch.autocast(image_embeds.device.type, enabled=False):
        dtype = torch.promote_types(image_embeds.dtype, torch.float32)
        image_embeds, text_embeds = image_embeds.to(dtype).transpose(0, 1), text_embeds.to(dtype).transpose(0, 1)
        logits = logit_scale * (image_embeds @ text_embeds.transpose(1, 2))
        pairs = _valid_pairs(is_abnormal.bool() & is_valid.bool())
        fill = torch.finfo(dtype).min
        to_text, to_image = (
            each.masked_fill(~pairs, fill).softmax(-1) * pairs for each in (logits, logits.transpose(1, 2))
        )
        return to_text, to_image


def mix(targets: Tensor, soft: Tensor, amount: float) -> Tensor:
    """`(1 - amount) targets + amount soft` in the rows that `soft` fills; the others stay.

    Args:
        targets, soft: `(organs, patients, patients)`; rows sum to one, or to zero.
        amount: In [0, 1].
    """
    return torch.where(soft.sum(-1, keepdim=True) > 0, (1 - amount) * targets + amount * soft, targets)


def smooth(targets: Tensor, is_valid: Tensor, amount: Tensor) -> Tensor:
    """Label smoothing: `(1 - amount) targets + amount / valid patients`, organ by organ.

    Args:
        targets: `(organs, patients, patients)`, rows that sum to one over valid patients.
        is_valid: `(patients, organs)` bool.
        amount: `(organs,)` in [0, 1].

    Source:
        Szegedy et al., CVPR 2016, https://arxiv.org/abs/1512.00567, section 7.
    """
    pairs = _valid_pairs(is_valid.bool()).to(targets.dtype)
    amount = amount.to(targets.dtype)[:, None, None]
    return (1 - amount) * targets + amount * pairs / pairs.sum(-1, keepdim=True).clamp(min=1)


def uncertainty_weighted_sum(organ_losses: Tensor, log_variances: Tensor, organ_is_active: Tensor) -> Tensor:
    """Sum over active organs of `exp(-s) L + s / 2`, s being an organ's learned log variance.

    The more uncertain an organ is held to be, the less its loss weighs; s / 2 keeps all from being held so. An organ
    that did not enter leaves its variance as it is.

    Args:
        organ_losses, log_variances: `(organs,)`.
        organ_is_active: `(organs,)` bool.

    Source:
        Kendall et al., CVPR 2018, https://arxiv.org/abs/1705.07115, equation 10 (cross-entropy: L / sigma^2 + log
        sigma), with s = log sigma^2.
    """
    weighed = (-log_variances).exp() * organ_losses + log_variances / 2
    return weighed.masked_fill(~organ_is_active, 0).sum()


def dynamic_weights(last: Tensor, before: Tensor, temperature: float = 2.0) -> Tensor:
    """Weights of organs by how fast their losses fell: `K exp(w / T) / sum exp(w / T)`, w = last / before, K organs.

    Args:
        last, before: `(organs,)`: mean losses over the last window of steps and over the one before. Where either is
            not positive, an organ was not there to compare, and counts as standing still (w = 1).
        temperature: T; the higher, the more alike the weights.

    Returns:
        `(organs,)`, of mean 1.

    Source:
        Liu et al., CVPR 2019, https://arxiv.org/abs/1803.10704, equation 7 (there windows are epochs, and T is 2).
    """
    is_known = (last > 0) & (before > 0)
    rate = torch.where(is_known, last / torch.where(is_known, before, torch.ones_like(before)), torch.ones_like(last))
    return len(rate) * (rate / temperature).softmax(0)


def _valid_pairs(is_valid: Tensor) -> Tensor:
    """`(organs, patients, patients)` bool from `(patients, organs)`: both are valid."""
    organ_is_valid = is_valid.T
    return organ_is_valid[:, :, None] & organ_is_valid[:, None, :]


def _other_abnormal_pairs(is_abnormal: Tensor, is_valid: Tensor) -> Tensor:
    """`(organs, patients, patients)` bool: two different patients, both valid and abnormal."""
    pairs = _valid_pairs(is_abnormal.bool() & is_valid.bool())
    return pairs & ~torch.eye(pairs.shape[-1], dtype=torch.bool, device=pairs.device)
