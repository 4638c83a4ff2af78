"""Whether a score of 0.8 means "present in 8 of 10": Brier score, expected calibration error, reliability bins.

The expected calibration error is the mean over bins, weighted by their counts, of |mean score - share of positives|
(Naeini et al., AAAI 2015; Guo et al., ICML 2017). Bins are of equal width over [0, 1], or hold equally many scores; an
edge belongs to the bin below it, and equal scores stay together, as in scikit-learn's `calibration_curve`. It has no
interval here: a resample's error is biased upwards, so percentiles of resamples would not cover the truth.
"""

from __future__ import annotations

import numpy as np

NUM_BINS = 15


def brier_score(scores: np.ndarray, labels: np.ndarray) -> float:
    """Mean squared difference of probability and label."""
    return float(np.mean((scores - labels) ** 2))


def bin_edges(scores: np.ndarray, num_bins: int = NUM_BINS, equal_mass: bool = False) -> np.ndarray:
    """`(num_bins + 1,)` edges, of equal width over [0, 1] or at the quantiles of the scores."""
    steps = np.linspace(0, 1, num_bins + 1)
    return np.quantile(scores, steps) if equal_mass else steps


def reliability_bins(
    scores: np.ndarray, labels: np.ndarray, num_bins: int = NUM_BINS, equal_mass: bool = False
) -> list[dict]:
    """What a reliability plot draws: low, high, count, mean_score, share_positive of every bin that is not empty."""
    edges = bin_edges(scores, num_bins, equal_mass)
    place = np.searchsorted(edges[1:-1], scores)
    count = np.bincount(place, minlength=num_bins)
    score_sum, label_sum = (np.bincount(place, values, minlength=num_bins) for values in (scores, labels))
    return [
        {
            "low": float(edges[n]),
            "high": float(edges[n + 1]),
            "count": int(count[n]),
            "mean_score": float(score_sum[n] / count[n]),
            "share_positive": float(label_sum[n] / count[n]),
        }
        for n in np.flatnonzero(count)
    ]


def calibration_error(bins: list[dict]) -> float:
    """Expected calibration error of reliability bins."""
    total = sum(b["count"] for b in bins)
    return float(sum(b["count"] * abs(b["mean_score"] - b["share_positive"]) for b in bins) / total)


def calibration(scores: np.ndarray, labels: np.ndarray, num_bins: int = NUM_BINS) -> dict:
    """brier, ece (equal width), ece_equal_mass, and the bins of equal width.

    Args:
        scores: `(rows,)` probabilities, at least one.
        labels: `(rows,)`, 1 or 0.
    """
    bins = reliability_bins(scores, labels, num_bins)
    return {
        "brier": brier_score(scores, labels),
        "ece": calibration_error(bins),
        "ece_equal_mass": calibration_error(reliability_bins(scores, labels, num_bins, equal_mass=True)),
        "bins": bins,
    }
