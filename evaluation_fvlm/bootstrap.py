"""Intervals by resampling patients: what the figures would be if other patients of the same kind had come.

All scans of a patient are drawn together, since they are no independent evidence. One draw serves every finding, metric
and model, so means and differences over them are resampled as a whole. A resample that draws no positive or no negative
patient of a finding says nothing of it.

An interval is that between the 2.5th and the 97.5th percentile of the resamples (Efron and Tibshirani 1993, chapter
13). Of an AUC that is too short where the AUC is high or positives are few, so for AUCs

(1) the resamples give the standard error, which is carried to the logit scale: divided by AUC (1 - AUC) (Pepe 2003,
    chapter 5);
(2) Student's t has one degree of freedom less than the class that fewer patients have has patients. For a mean over
    findings those of the findings are joined by Satterthwaite's rule (1946), a patient of several findings being one:
    findings of the same patients have no more degrees of freedom than one of them;
(3) where all positives score above all negatives no resample differs. With m patients in the rarer class, and none in
    both, there are m pairs of a positive and a negative that share no patient; all are in the right order with a
    probability of AUC ** m. The lower end is where that is 2.5 %.

Coverage of both is measured by simulation: benchmarks/coverage.py makes the table of docs/evaluation.md.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.special import expit, logit
from scipy.stats import t as student

LEVEL = 0.95
TAIL = (1 - LEVEL) / 2


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
    low, high = np.quantile(known, [TAIL, 1 - TAIL])
    return float(low), float(high)


def auc_interval(
    value: float, resamples: Sequence[np.ndarray], rarer: Sequence[np.ndarray]
) -> tuple[float, float] | tuple[None, None]:
    """The 95 % interval of an AUC, or of the mean of the AUCs of several findings.

    Args:
        value: The AUC, or the mean.
        resamples: Of every finding, `(num_bootstraps,)`; at least one.
        rarer: Of every finding, the patients of the class that fewer have, each once.

    Returns:
        Lower and upper end, or None twice where a class of every finding comes from one patient alone, or fewer than
        half of the resamples have a value.
    """
    means = mean_over(list(resamples))
    known = means[np.isfinite(means)]
    sizes = np.array([len(patients) for patients in rarer])
    if max(sizes) < 2 or len(known) < 2 or 2 * len(known) < len(means):
        return None, None
    if value in (0, 1):  # (3)
        reach = float(np.mean(TAIL ** (1 / sizes)))
        return (reach, 1.0) if value == 1 else (0.0, 1 - reach)
    finite = [one[np.isfinite(one)] for one in resamples]
    variances = np.array([one.var(ddof=1) if len(one) > 1 else 0.0 for one in finite])
    freedom = degrees_of_freedom(variances, rarer)
    reach = student.ppf(1 - TAIL, freedom) * known.std(ddof=1) / (value * (1 - value))  # (1), (2)
    return float(expit(logit(value) - reach)), float(expit(logit(value) + reach))


def degrees_of_freedom(variances: np.ndarray, rarer: Sequence[np.ndarray]) -> float:
    """Those of the mean of figures with these variances: m - 1 of one alone, and of several of the same m patients.

    Args:
        variances: Of every finding.
        rarer: As of `auc_interval`. One patient among several findings counts as two.
    """
    sizes = np.array([len(patients) for patients in rarer])
    _, place = np.unique(np.concatenate(list(rarer)), return_inverse=True)
    by_patient = np.bincount(place, np.repeat(variances / np.sqrt(sizes * np.maximum(sizes - 1, 1)), sizes))
    return variances.sum() ** 2 / (by_patient**2).sum() if variances.any() else np.inf


def figure(value: float | None, resamples: np.ndarray | None = None) -> dict[str, float | None]:
    """A figure as it stands in the results: value, low, high; None where there is none."""
    if value is None or not np.isfinite(value):
        return {"value": None, "low": None, "high": None}
    low, high = (None, None) if resamples is None else percentile_interval(resamples)
    return {"value": float(value), "low": low, "high": high}


def auc_figure(
    value: float | None, resamples: Sequence[np.ndarray], rarer: Sequence[np.ndarray]
) -> dict[str, float | None]:
    """`figure` of an AUC, or of the mean of several; arguments as of `auc_interval`, no resamples: no interval."""
    if value is None or not resamples:
        return figure(value)
    low, high = auc_interval(value, resamples, rarer)
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
