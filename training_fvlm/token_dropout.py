"""Dropout of an organ's tokens: a small organ is not learned by heart from the few patches it has.

In a training crop every token of an organ is left out of the organ with the chance `rate min(1, size / tokens)`, tokens
being those the organ has in this crop: `rate` for organs of up to `size` tokens, and ever less for larger ones, which
have enough of them. At least one is kept. A patch that is left out of all its organs is not seen by the tower either
where `token_selection` is "organs".
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class TokenDropout:
    """The dropout of a training.

    Attributes:
        rates: Of each organ, in [0, 1).
        size: Tokens up to which an organ's rate holds in full.
    """

    rates: tuple[float, ...]
    size: int

    def __call__(self, token_mask: np.ndarray, key: tuple[int, int, int]) -> np.ndarray:
        """Leave tokens out of a crop's organs; which ones hangs on (seed, epoch, row) alone."""
        # A stream of its own: `default_rng(key)` is that of the crop.
        generator = np.random.default_rng(np.random.SeedSequence(key, spawn_key=(1,)))
        return drop_organ_tokens(token_mask, self.rates, self.size, generator)


def drop_organ_tokens(
    token_mask: np.ndarray, rates: Sequence[float], size: int, generator: np.random.Generator
) -> np.ndarray:
    """Leave tokens out of a crop's organs.

    Args:
        token_mask: `(organs, tokens)` bool: the patches that hold each organ.
        rates: Of each organ, in [0, 1).
        size: Tokens up to which an organ's rate holds in full.
        generator: Fixes which ones.

    Returns:
        `(organs, tokens)` bool, part of `token_mask`; an organ that had tokens has at least one.
    """
    kept = token_mask.copy()
    for organ, rate in enumerate(rates):
        places = np.flatnonzero(token_mask[organ])
        if rate == 0 or len(places) < 2:
            continue
        draws = generator.random(len(places))
        is_dropped = draws < rate * min(1.0, size / len(places))
        if is_dropped.all():
            is_dropped[np.argmax(draws)] = False
        kept[organ, places[is_dropped]] = False
    return kept
