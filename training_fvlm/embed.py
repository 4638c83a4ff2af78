"""A batch of the collator through the model, up to the embeddings: what the trainer and the centred start both need."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

# Read by the loss and not by the model.
LOSS_INPUTS = ("caption_index", "caption_hash", "organ_is_abnormal")


def embed(model: torch.nn.Module, inputs: dict[str, Tensor]) -> tuple[Any, Tensor, Tensor]:
    """Run the model on a batch of the collator, without a loss.

    Returns:
        The model's output; the embedding of each patient's caption of each organ `(batch, organs, dim)`; and
        `(batch, organs)` bool, True where an organ is whole and has a caption.
    """
    model_inputs = {name: value for name, value in inputs.items() if name not in LOSS_INPUTS}
    outputs = model(**model_inputs, return_loss=False)
    caption_index = inputs["caption_index"]
    # F.embedding, not plain indexing: the backward of indexing is serial on CPU.
    caption_embeds = F.embedding(caption_index.clamp(min=0), outputs.text_embeds)
    return outputs, caption_embeds, outputs.organ_is_complete & (caption_index >= 0)
