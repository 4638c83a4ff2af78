"""Dropout of organs' tokens: its rate by the organ's size, and that no organ loses all of them."""

import numpy as np
import pytest

from training_fvlm.token_dropout import drop_organ_tokens


def masks():
    """Organs of 40, 4, 1 and 0 tokens; the first two share some."""
    mask = np.zeros((4, 60), dtype=bool)
    mask[0, :40], mask[1, 38:42], mask[2, 50] = True, True, True
    return mask


def test_shares_that_are_dropped_follow_rate_and_size():
    mask, generator = masks(), np.random.default_rng(0)
    kept = np.mean([drop_organ_tokens(mask, [0.4, 0.4, 0.4, 0.4], 8, generator).sum(1) for _ in range(4000)], 0)
    # 40 tokens: 0.4 x 8 / 40. 4 tokens: 0.4, but if all four were to go, one stays.
    assert kept.tolist() == pytest.approx([40 * (1 - 0.08), 4 * 0.6 + 0.4**4, 1, 0], rel=0.02)


def test_something_is_always_left_and_nothing_is_added():
    mask = masks()
    for seed in range(50):
        kept = drop_organ_tokens(mask, [0.99, 0.99, 0.99, 0.99], 1000, np.random.default_rng(seed))
        assert not (kept & ~mask).any()
        assert (kept.any(1) == mask.any(1)).all()
    assert kept.sum() < mask.sum()


def test_a_rate_of_zero_leaves_an_organ_and_the_draws_of_others_alone():
    mask = masks()
    both = drop_organ_tokens(mask, [0.0, 0.6, 0.6, 0.0], 8, np.random.default_rng(3))
    assert (both[0] == mask[0]).all() and (both[1] != mask[1]).any()
    again = drop_organ_tokens(mask, [0.0, 0.6, 0.6, 0.0], 8, np.random.default_rng(3))
    assert (both == again).all() and mask.sum() == 45, "the given mask stays as it is"
