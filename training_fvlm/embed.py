"""A batch of the collator through the model, up to what the loss reads: the trainer and the centred start need it.

What the loss reads of a batch are tensors whose first axis counts its patients, in two dicts:

- live, with a gradient: `image_embeds` and `text_embeds` (batch, organs, dim), the latter of each patient's caption of
  each organ; with a global branch also `volume_embeds` and `report_embeds` (batch, dim);
- fixed: `caption_hash`, `is_abnormal`, `is_valid` (batch, organs) int64, the last 1 where an organ is whole and has a
  caption; with a global branch `report_hash` (batch,); and what the collator adds for other targets.

Beside them stand the parameters of the loss that the model returns, whatever the batch: `logit_scale` and the like.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

# Read by the loss and not by the model.
LOSS_INPUTS = ("caption_index", "caption_hash", "organ_is_abnormal", "report_index", "text_hash")
# Those of them that go into `fixed` as they are, where the collator makes them.
FIXED_INPUTS = ("report_hash", "labels", "row", "organ_state")
# Outputs of the model that are parameters of the loss, where the model has them.
LOSS_PARAMETERS = ("logit_scale", "organ_log_variances")


class Embedded(NamedTuple):
    """What the loss reads of a batch.

    Attributes:
        live: Tensors with a gradient, see above.
        fixed: Tensors without one, see above.
        parameters: name -> parameter of the loss.
    """

    live: dict[str, Tensor]
    fixed: dict[str, Tensor]
    parameters: dict[str, Tensor]


def embed(model: torch.nn.Module, inputs: dict[str, Tensor]) -> Embedded:
    """Run the model on a batch of the collator, without a loss."""
    outputs = model(**model_inputs(inputs), return_loss=False)
    live = image_embeddings(outputs) | text_embeddings(outputs.text_embeds, inputs)
    return Embedded(live, fixed_inputs(outputs, inputs), loss_parameters(outputs))


def model_inputs(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """What the model reads of a batch of the collator."""
    return {name: value for name, value in inputs.items() if name not in (*LOSS_INPUTS, *FIXED_INPUTS)}


def image_embeddings(outputs: Any) -> dict[str, Tensor]:
    """The image side of `live`."""
    live = {"image_embeds": outputs.image_embeds.float()}
    volume_embeds = outputs.get("volume_embeds")
    return live if volume_embeds is None else live | {"volume_embeds": volume_embeds.float()}


def text_embeddings(text_embeds: Tensor, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The text side of `live`: the embeddings of the different texts, handed to the patients they belong to."""
    # F.embedding, not plain indexing: the backward of indexing is serial on CPU.
    live = {"text_embeds": F.embedding(inputs["caption_index"].clamp(min=0), text_embeds.float())}
    if "report_index" in inputs:
        live["report_embeds"] = F.embedding(inputs["report_index"].clamp(min=0), text_embeds.float())
    return live


def fixed_inputs(outputs: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """`fixed`, but for what a teacher adds."""
    fixed = {
        "caption_hash": inputs["caption_hash"],
        "is_abnormal": inputs["organ_is_abnormal"].long(),
        "is_valid": (outputs.organ_is_complete & (inputs["caption_index"] >= 0)).long(),
    }
    return fixed | {name: inputs[name] for name in FIXED_INPUTS if name in inputs}


def loss_parameters(outputs: Any) -> dict[str, Tensor]:
    """The parameters of the loss among the model's outputs."""
    return {name: outputs[name] for name in LOSS_PARAMETERS if outputs.get(name) is not None}
