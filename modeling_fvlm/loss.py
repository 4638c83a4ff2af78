"""The fine-grained contrastive loss of fVLM: pure functions, tensors in, a scalar out.

From Shui et al., "Large-scale and Fine-grained Vision-language Pre-training for Enhanced CT Image Understanding",
ICLR 2025, https://openreview.net/forum?id=nYpPAT4L3D. For every organ, over the patients whose organ is complete in
the crop and has a caption (valid):

(1) scaled cosine similarities between the organ's image embeddings and its captions' embeddings;
(2) targets: the own caption, equal captions, and normal with normal, each row divided by its sum;
(3) cross-entropy of the rows (image to text) and of the columns (text to image), halved and averaged over patients;
(4) the organ enters when some valid patient is abnormal there and the targets are not all equal (such targets ask
    every patient to match every caption: nothing to contrast);
(5) sum (published) or mean over the organs that entered.

All organs are done at once under masks. An organ that does not enter gives an exact zero and zero gradients.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor


class OrganLoss(NamedTuple):
    """Loss of a batch and of its organs.

    Attributes:
        loss: Scalar; 0 (with a graph of zero gradients) when no organ entered.
        organ_losses: `(organs,)`, 0 where the organ did not enter.
        organ_is_active: `(organs,)` bool: the organ entered the loss.
        num_contrasted: `(organs,)` int64: valid patients of an active organ, 0 elsewhere.
    """

    loss: Tensor
    organ_losses: Tensor
    organ_is_active: Tensor
    num_contrasted: Tensor


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


def organ_contrastive_loss(
    image_embeds: Tensor,
    text_embeds: Tensor,
    caption_id: Tensor,
    is_abnormal: Tensor,
    is_valid: Tensor,
    logit_scale: Tensor | float,
    reduction: Literal["sum", "mean"] = "sum",
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
        reduction: "sum" or "mean" over the organs that entered.

    Returns:
        `OrganLoss`, computed in float32 (float64 for float64 embeddings) whatever autocast says.
    """
    if reduction not in ("sum", "mean"):
        raise ValueError(f"reduction must be 'sum' or 'mean', got {reduction!r}.")
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
        targets = is_positive.to(dtype)
        targets = targets / targets.sum(-1, keepdim=True).clamp(min=1)

        # (3) A finite fill, not -inf: rows of invalid patients would turn into NaN, and NaN survives a mask.
        organ_is_valid = is_valid.T  # (organs, patients)
        pair_is_valid = organ_is_valid[:, :, None] & organ_is_valid[:, None, :]
        fill = torch.finfo(dtype).min
        image_to_text = logits.masked_fill(~pair_is_valid, fill).log_softmax(-1)
        text_to_image = logits.transpose(1, 2).masked_fill(~pair_is_valid, fill).log_softmax(-1)
        log_likelihood = (image_to_text + text_to_image).masked_fill(~pair_is_valid, 0)
        num_valid = organ_is_valid.sum(1)
        organ_losses = -0.5 * (targets * log_likelihood).sum((1, 2)) / num_valid.clamp(min=1)

        # (4) Both conditions at once: targets are all equal exactly when every valid pair is a positive one, and where
        # nobody valid is abnormal every pair is (normal with normal).
        organ_is_active = (pair_is_valid & ~is_positive).flatten(1).any(1)
        organ_losses = organ_losses.masked_fill(~organ_is_active, 0)

        # (5)
        loss = organ_losses.sum()
        if reduction == "mean":
            loss = loss / organ_is_active.sum().clamp(min=1)
    return OrganLoss(loss, organ_losses, organ_is_active, num_valid * organ_is_active)
