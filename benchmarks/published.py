"""The published algorithm, written here in its manner: the baseline of every benchmark.

From Shui et al., ICLR 2025, and the released code's description of itself (alibaba-damo-academy/fvlm, commit d768ec1):
attention is materialised, every caption is padded to the longest length and encoded organ by organ, masks are compared
and pooled organ by organ, and the pooling attention runs once per organ and patient on that organ's tokens. It works on
the weights of an `FVLMModel`, so that results and gradients can be compared parameter by parameter.
"""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from modeling_fvlm import FVLMModel


def organ_flags(mask: Tensor, num_organs: int, patch_size: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Which patches hold which organ, and which organs no face of the crop cuts: one organ of one patient at a time.

    Args:
        mask: Label map `(batch, depth, height, width)`.

    Returns:
        `(batch, organs, tokens)` bool and `(batch, organs)` bool.
    """
    tokens, complete = [], []
    for patient in mask:
        for organ in range(num_organs):
            is_organ = patient == organ + 1
            tokens.append(F.max_pool3d(is_organ[None].float(), tuple(patch_size)).flatten().bool())
            faces = (is_organ[0], is_organ[-1], is_organ[:, 0], is_organ[:, -1], is_organ[..., 0], is_organ[..., -1])
            complete.append(bool(is_organ.any()) and not any(bool(face.any()) for face in faces))
    shape = (len(mask), num_organs)
    return torch.stack(tokens).view(*shape, -1), torch.tensor(complete).view(shape)


def pooling_attention(model: FVLMModel) -> nn.MultiheadAttention:
    """The model's pooling weights in the module that the published code calls; parameters are shared, not copied."""
    pooling = model.organ_pooling
    with torch.device("meta"):  # its own weights are never drawn: that would be time of no published step
        attention = nn.MultiheadAttention(
            pooling.query_tokens.shape[1], pooling.num_heads, dropout=pooling.dropout, batch_first=True
        )
    attention.in_proj_weight, attention.in_proj_bias = pooling.in_proj_weight, pooling.in_proj_bias
    attention.out_proj.weight, attention.out_proj.bias = pooling.out_proj.weight, pooling.out_proj.bias
    return attention.train(model.training)


def pool_organs(
    model: FVLMModel, attention: nn.MultiheadAttention, levels: Sequence[Tensor], organ_tokens: Tensor
) -> Tensor:
    """Pooled vectors `(batch, organs, hidden)`, zeros where an organ has no token."""
    batch, num_organs = organ_tokens.shape[:2]
    rows = []
    for patient in range(batch):
        for organ in range(num_organs):
            flags = organ_tokens[patient, organ]
            if not flags.any():
                rows.append(levels[0].new_zeros(levels[0].shape[-1]))
                continue
            tokens = torch.cat([level[patient, flags] for level in levels])[None]
            query = model.organ_pooling.query_tokens[organ][None, None]
            rows.append(attention(query, tokens, tokens)[0][0, 0])
    return torch.stack(rows).view(batch, num_organs, -1)


def embed_captions(model: FVLMModel, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Captions of every organ, organ by organ, at full padded length.

    Args:
        input_ids, attention_mask: `(organs, batch, max_text_length)`.

    Returns:
        `(batch, organs, dim)`, unit length.
    """
    organs = []
    for ids, mask in zip(input_ids, attention_mask):
        hidden = model.text_model(input_ids=ids, attention_mask=mask).last_hidden_state[:, 0]
        organs.append(F.normalize(model.text_projection(hidden), dim=-1))
    return torch.stack(organs, dim=1)


def organ_losses(
    image_embeds: Tensor,
    text_embeds: Tensor,
    captions: Sequence[Sequence[str]],
    is_abnormal: Tensor,
    is_valid: Tensor,
    temperature: Tensor,
) -> Tensor:
    """Loss of every organ `(organs,)`, 0 where it does not enter: targets filled pair by pair.

    Args:
        image_embeds, text_embeds: `(batch, organs, dim)`.
        captions: `[organ][patient]`.
        is_abnormal, is_valid: `(batch, organs)` bool.
    """
    losses = []
    for organ in range(image_embeds.shape[1]):
        patients = is_valid[:, organ].nonzero().flatten().tolist()
        targets = torch.zeros(len(patients), len(patients))
        for row, one in enumerate(patients):
            for column, other in enumerate(patients):
                both_normal = not is_abnormal[one, organ] and not is_abnormal[other, organ]
                targets[row, column] = float(captions[organ][one] == captions[organ][other] or both_normal)
        if not len(patients) or bool((targets == 1).all()):
            losses.append(image_embeds.sum() * 0)
            continue
        targets = targets / targets.sum(1, keepdim=True)
        logits = image_embeds[patients, organ] @ text_embeds[patients, organ].T / temperature
        rows = -(targets * logits.log_softmax(1)).sum(1).mean()
        columns = -(targets * logits.T.log_softmax(1)).sum(1).mean()
        losses.append((rows + columns) / 2)
    return torch.stack(losses)


def in_published_manner(model: FVLMModel) -> FVLMModel:
    """A model on the same parameters that materialises attention and has PyTorch's own dropout in place of ours.

    A second set of parameters would not leave room for the baseline's activations.
    """
    twin = copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})
    for name, module in list(twin.named_modules()):
        if isinstance(module, nn.Dropout):
            twin.set_submodule(name, nn.Dropout(module.p))
    twin.set_attn_implementation("eager")
    return twin
