"""Teachers of a training: models without a gradient that say which captions of abnormal patients are alike.

`MomentumTeacher` is a copy of the text side that follows the model: after each optimizer step
`weight <- m weight + (1 - m) model's weight`. It is the same on every rank, since the model is. It is no part of the
model: it stands in a checkpoint beside it, and in no final folder.

What teachers say of a contrast travels with what is fixed in it (embed.py):

    teacher_text_embeds   (patients, organs, dim) of the momentum teacher, or of the peer; of both, one behind the other
    teacher_image_embeds  (patients, organs, dim) of the peer
    teacher_logit_scale   (patients,) of the peer, the same for all

They compute without dropout, and draw nothing from the generators that the model's dropout draws from.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from modeling_fvlm.modeling_fvlm import FVLMModel

from .gradient_cache import IMAGE_INPUTS


class _TextSide(nn.Module):
    """The text side of an `FVLMModel`, as a copy of its own."""

    get_text_features = FVLMModel.get_text_features
    pool_packed_texts = FVLMModel.pool_packed_texts
    pool_bucketed_texts = FVLMModel.pool_bucketed_texts
    pool_text = FVLMModel.pool_text

    def __init__(self, model: FVLMModel):
        super().__init__()
        self.config = model.config
        self.text_model = copy.deepcopy(model.text_model)
        self.text_projection = copy.deepcopy(model.text_projection)


class MomentumTeacher:
    """A text side that follows the model's by a moving average.

    Args:
        model: The model, not wrapped; the teacher begins as its equal.
        momentum: What it keeps of its own weights at an update.
    """

    def __init__(self, model: FVLMModel, momentum: float):
        self.momentum = momentum
        self.text_side = _TextSide(model).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, model: FVLMModel) -> None:
        """Follow the model, after an optimizer step."""
        for own, followed in ((self.text_side.text_model, model.text_model),
                              (self.text_side.text_projection, model.text_projection)):  # fmt: skip
            for weight, target in zip(own.parameters(), followed.parameters(), strict=True):
                weight.mul_(self.momentum).add_(target.to(weight.dtype), alpha=1 - self.momentum)
            for buffer, target in zip(own.buffers(), followed.buffers(), strict=True):
                buffer.copy_(target)

    @torch.no_grad()
    def embed_texts(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Embeddings `(texts, dim)`, unit length."""
        return self.text_side.get_text_features(input_ids, attention_mask)

    def state_dict(self) -> dict[str, Any]:
        """Its weights, for a checkpoint."""
        return self.text_side.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with the weights of a checkpoint."""
        self.text_side.load_state_dict(state)


class Teachers:
    """All teachers of one model.

    Args:
        momentum: Its momentum teacher, if it has one.
        peer: The model that is trained beside it, not wrapped, if there is one.
    """

    def __init__(self, momentum: MomentumTeacher | None = None, peer: FVLMModel | None = None):
        self.momentum, self.peer = momentum, peer

    @torch.no_grad()
    def teach_images(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """What is said of the images of some patients, for what is fixed in a contrast; empty without a peer.

        Args:
            inputs: What the model reads of the images of a collator's batch, on its device; other tensors are left
                alone.
        """
        if self.peer is None:
            return {}
        with evaluating(self.peer):
            outputs = self.peer(**{name: inputs[name] for name in IMAGE_INPUTS if name in inputs}, return_loss=False)
        image_embeds = outputs.image_embeds.float()
        return {
            "teacher_image_embeds": image_embeds,
            "teacher_logit_scale": outputs.logit_scale.float().expand(len(image_embeds)).contiguous(),
        }

    @torch.no_grad()
    def teach_texts(self, inputs: dict[str, Tensor]) -> Tensor | None:
        """What is said of texts `(texts, dim)`, or `(texts, 2 dim)` of both teachers; None without any.

        Args:
            inputs: With `input_ids` and `attention_mask`.
        """
        texts = inputs["input_ids"], inputs["attention_mask"]
        said = []
        if self.momentum is not None:
            said.append(self.momentum.embed_texts(*texts))
        if self.peer is not None:
            with evaluating(self.peer):
                said.append(self.peer.get_text_features(*texts))
        return torch.cat([each.float() for each in said], dim=-1) if said else None


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """A context in which a model drops nothing; afterwards it is as it was."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
