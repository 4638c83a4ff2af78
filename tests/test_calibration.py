"""Calibration against scikit-learn, and on scores whose calibration is known."""

import numpy as np
import pytest
from sklearn.calibration import calibration_curve
from sklearn.metrics import brier_score_loss

from evaluation_fvlm.calibration import calibration, calibration_error, reliability_bins


def sample(seed, num_rows=500):
    rng = np.random.default_rng(seed)
    scores = np.round(rng.beta(1, 3, num_rows), 2)  # ties, and scores on edges
    scores[:3] = 0, 1, 0.2
    return scores, (rng.random(num_rows) < scores**1.3).astype(int)


@pytest.mark.parametrize("equal_mass", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_bins_are_scikit_learns(seed, equal_mass):
    scores, labels = sample(seed)
    bins = reliability_bins(scores, labels, 10, equal_mass)
    share, mean = calibration_curve(labels, scores, n_bins=10, strategy="quantile" if equal_mass else "uniform")
    assert [b["share_positive"] for b in bins] == pytest.approx(share, abs=1e-12)
    assert [b["mean_score"] for b in bins] == pytest.approx(mean, abs=1e-12)
    assert sum(b["count"] for b in bins) == len(scores)
    assert all(b["low"] <= b["mean_score"] <= b["high"] for b in bins)


def slow_error(scores, labels, num_bins):
    """Every bin of equal width in turn; 0 belongs to the first."""
    total = 0.0
    for n in range(num_bins):
        inside = (scores <= (n + 1) / num_bins) & ((scores > n / num_bins) | (n == 0))
        if inside.any():
            total += inside.sum() * abs(scores[inside].mean() - labels[inside].mean())
    return total / len(scores)


@pytest.mark.parametrize("seed", range(3))
def test_error_and_brier_score(seed):
    scores, labels = sample(seed)
    known = calibration(scores, labels, 8)  # edges that floats hold exactly
    assert known["ece"] == pytest.approx(slow_error(scores, labels, 8), abs=1e-12)
    assert known["ece"] == calibration_error(known["bins"]) > 0
    assert known["brier"] == pytest.approx(brier_score_loss(labels, scores), abs=1e-12)


def test_known_calibration():
    labels = np.array([1, 0, 0, 0] * 50)
    assert calibration(np.full(200, 0.25), labels)["ece"] == pytest.approx(0.0, abs=1e-12)
    sure = calibration(np.full(200, 1.0), labels)
    assert sure["ece"] == sure["ece_equal_mass"] == sure["brier"] == pytest.approx(0.75)


def test_bins_of_equal_mass_find_what_is_crowded_into_one_of_equal_width():
    """Half the scores 0.01 and never present, half 0.05 and present in 6 of 100: of equal width, one bin has both."""
    scores = np.repeat([0.01, 0.05], 100)
    labels = np.repeat([0, 1, 0], [100, 6, 94])
    known = calibration(scores, labels)
    assert known["ece"] == pytest.approx(0.0, abs=1e-12)
    assert known["ece_equal_mass"] == pytest.approx(0.01)
