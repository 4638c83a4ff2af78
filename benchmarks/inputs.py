"""Inputs of the published size: the model with random weights, label maps of organs in plausible places, captions.

A chest crop of 112 x 256 x 352 voxels for 4 organs; for more, boxes of many sizes spread over the crop, so that some
organs hold hundreds of tokens and some a handful. Captions have 26 tokens in the mean (5 to 120), 15 % are abnormal
and a quarter of the first patient's for certain.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from modeling_fvlm import FVLMConfig, FVLMModel

VOLUME_SIZE, PATCH_SIZE = (112, 256, 352), (16, 16, 32)
MEAN_TOKENS, SHORTEST, LONGEST = 26, 5, 120
LONGEST_PUBLISHED = 384  # the published text encoder cuts there
ABNORMAL_SHARE = 0.15
VOCABULARY = 30522


@dataclass
class Batch:
    """A batch for both ways.

    Attributes:
        volume: `(batch, depth, height, width)` int16 HU.
        mask: Label map of the same shape, uint8.
        token_ids: `[organ][patient]`: the caption's ids without padding.
        is_abnormal: `(batch, organs)` bool.
    """

    volume: Tensor
    mask: Tensor
    token_ids: list[list[list[int]]]
    is_abnormal: Tensor


def make_model(num_organs: int, published_dropout: bool = True, attention_dropout: float | None = None) -> FVLMModel:
    """The published architecture, ViT-B and BERT-base, random weights, in training mode.

    Args:
        num_organs: Organs.
        published_dropout: 0.1 everywhere, as published; False: none, for comparing results.
        attention_dropout: Of the image tower, where it is to be another one.
    """
    rate = 0.1 if published_dropout else 0.0
    vision = {"hidden_dropout": rate, "attention_dropout": rate if attention_dropout is None else attention_dropout}
    text = {"hidden_dropout_prob": rate, "attention_probs_dropout_prob": rate, "vocab_size": VOCABULARY}
    config = FVLMConfig(
        organs=[f"organ_{number}" for number in range(num_organs)],
        vision_config={"volume_size": VOLUME_SIZE, "patch_size": PATCH_SIZE, **vision},
        text_config={"model_type": "bert", **text},
        text_token_types=False,
        pooling_dropout=rate,
    )
    torch.manual_seed(0)
    model = FVLMModel(config).train()
    # Queries start at zero; with distinct ones a mistake in the pooling cannot hide behind a uniform attention.
    torch.nn.init.normal_(model.organ_pooling.query_tokens, std=0.02)
    return model


def make_batch(
    num_organs: int,
    batch_size: int = 2,
    seed: int = 0,
    mean_tokens: int = MEAN_TOKENS,
    volume_size: tuple[int, int, int] = VOLUME_SIZE,
) -> Batch:
    """Volumes of noise, boxes for organs, captions of random words.

    Args:
        num_organs: Organs of every patient.
        batch_size: Patients.
        seed: Of everything.
        mean_tokens: Tokens of a caption in the mean; the longest grow with them, up to the published 384.
        volume_size: Voxels of a crop along (depth, height, width).
    """
    longest = min(LONGEST * mean_tokens // MEAN_TOKENS, LONGEST_PUBLISHED)
    generator = np.random.default_rng(seed)
    volume = generator.integers(-1000, 400, (batch_size, *volume_size), dtype=np.int16)
    mask = np.zeros((batch_size, *volume_size), np.uint8)
    for patient in range(batch_size):
        # Large organs first: small ones lie upon them and stay whole.
        shares = np.sort(generator.uniform(0.08, 0.6, num_organs))[::-1]
        for organ, share in enumerate(shares):
            size = [max(3, int(edge * share * generator.uniform(0.6, 1.0))) for edge in volume_size]
            start = [int(generator.integers(1, edge - length)) for edge, length in zip(volume_size, size)]
            box = tuple(slice(low, low + length) for low, length in zip(start, size))
            mask[patient][box] = organ + 1
    token_ids = []
    for _ in range(num_organs):
        lengths = np.clip(generator.lognormal(np.log(mean_tokens) - 0.18, 0.6, batch_size), SHORTEST, longest)
        token_ids.append([generator.integers(1000, VOCABULARY, int(length)).tolist() for length in lengths])
    is_abnormal = generator.random((batch_size, num_organs)) < ABNORMAL_SHARE
    is_abnormal[0, : max(1, num_organs // 4)] = True  # a quarter of the organs enters the loss for certain
    return Batch(torch.from_numpy(volume), torch.from_numpy(mask), token_ids, torch.from_numpy(is_abnormal))
