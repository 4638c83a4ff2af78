"""Intervals by resampling patients: what the figures would be if other patients of the same kind had come.

All scans of a patient are drawn together, since they are no independent evidence. One draw serves every finding, metric
and model, so means and differences over them are resampled as a whole. The interval is that between the 2.5th and the
97.5th percentile of the resamples (Efron and Tibshirani 1993, chapter 13); its coverage is checked by simulation in
tests/test_bootstrap.py. A resample that draws no positive or no negative patient of a finding says nothing of it.
"""

from __future__ import annotations

import numpy as np

LEVEL = 0.95


def draw_patients(num_patients: int, num_bootstraps: int, seed: int) -> np.ndarray:
    """How often each patient comes in each resample: `(num_bootstraps, num_patients)`, uint16, rows sum to the number.

    uint16 holds any count up to 65,535; one patient is not drawn as often.
    """
    rng = np.random.default_rng(seed)
    weights = np.empty((num_bootstraps, num_patients), np.uint16)
    for row in weights:
        row[:] = np.bincount(rng.integers(0, num_patients, num_patients), minlength=num_patients)
    return weights


def percentile_interval(resamples: np.ndarray) -> tuple[float, float] | tuple[None, None]:
    """The 95 % interval, or None twice where fewer than half of the resamples have a value."""
    known = resamples[np.isfinite(resamples)]
    if len(known) < 2 or 2 * len(known) < len(resamples):
        return None, None
    low, high = np.quantile(known, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def figure(value: float | None, resamples: np.ndarray | None = None) -> dict[str, float | None]:
    """A figure as it stands in the results: value, low, high; None where there is none."""
    if value is None or not np.isfinite(value):
        return {"value": None, "low": None, "high": None}
    low, high = (None, None) if resamples is None else percentile_interval(resamples)
    return {"value": float(value), "low": low, "high": high}


def two_sided_p(differences: np.ndarray) -> float | None:
    """Twice the share of resampled differences on the rarer side of zero, zero included (Davison and Hinkley 1997)."""
    known = differences[np.isfinite(differences)]
    if len(known) < 2:
        return None
    tail = min((known <= 0).sum(), (known >= 0).sum())
    return float(min(1.0, 2 * (1 + tail) / (1 + len(known))))


def mean_over(resamples: list[np.ndarray]) -> np.ndarray:
    """Mean over findings within every resample, of those that have a value there.

    Args:
        resamples: One array `(num_bootstraps,)` per finding; at least one.
    """
    stacked = np.stack(resamples)
    known = np.isfinite(stacked)
    count = known.sum(axis=0)
    total = np.where(known, stacked, 0.0).sum(axis=0)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)
