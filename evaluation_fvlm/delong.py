"""DeLong's test: do two runs differ in AUC on the same cases, and what is the standard error of one AUC.

(1) The AUC is the mean over positives of the share of negatives that lie below (a placement), ties counting half, and
    as well the mean over negatives of the share of positives above. Both come from ranks in one sort (Sun and Xu, IEEE
    Signal Processing Letters 2014), without visiting every pair.
(2) The covariance of the AUCs of several runs is that of the placements of positives and of negatives (DeLong, DeLong
    and Clarke-Pearson, Biometrics 1988).
(3) Scans of one patient are not independent. With `patients` their placements are summed first (Obuchowski, Biometrics
    1997), with the covariance between a patient's positives and negatives; with one scan each, (3) is (2).

The test assumes a normal distribution: with a handful of positives look at the bootstrap instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
from scipy.stats import norm, rankdata


@dataclass(frozen=True)
class DeLongTest:
    """`difference` is b - a with its 95 % interval; z and p are None where the standard error is 0."""

    auc_a: float
    auc_b: float
    difference: float
    standard_error: float
    low: float
    high: float
    z: float | None
    p: float | None

    def to_dict(self) -> dict:
        return asdict(self)


def placements(scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """For every positive the share of negatives below it, for every negative the share of positives above it (1).

    Args:
        scores: `(rows,)`.
        labels: `(rows,)`, 1 or 0; both must occur.

    Returns:
        `(rows,)`; the mean over either class is the AUC.
    """
    is_positive = labels == 1
    overall = rankdata(scores)
    shares = np.empty(len(scores))
    shares[is_positive] = (overall[is_positive] - rankdata(scores[is_positive])) / (~is_positive).sum()
    shares[~is_positive] = 1 - (overall[~is_positive] - rankdata(scores[~is_positive])) / is_positive.sum()
    return shares


def auc_covariance(
    scores: Sequence[np.ndarray], labels: np.ndarray, patients: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """AUCs of several runs on the same rows, and their covariance.

    Args:
        scores: Per run, `(rows,)`.
        labels: `(rows,)`, 1 or 0; both must occur.
        patients: `(rows,)` of any type, equal for rows of one patient; None: every row is a patient of its own.

    Returns:
        `(runs,)` and `(runs, runs)`; the covariance is NaN where a class comes from one patient only.
    """
    labels = np.asarray(labels)
    is_positive = labels == 1
    shares = np.stack([placements(np.asarray(run, float), labels) for run in scores])  # (runs, rows)
    aucs = shares[:, is_positive].mean(axis=1)
    groups = np.arange(len(labels)) if patients is None else np.unique(patients, return_inverse=True)[1]
    num_groups = groups.max() + 1
    deviation = shares - aucs[:, None]
    sums = [  # per class, (runs, patients): sum of a patient's deviations
        np.stack([np.bincount(groups, np.where(rows, run, 0.0), num_groups) for run in deviation])
        for rows in (is_positive, ~is_positive)
    ]
    sizes = [rows.sum() for rows in (is_positive, ~is_positive)]
    members = [len(np.unique(groups[rows])) for rows in (is_positive, ~is_positive)]
    if min(members) < 2:
        return aucs, np.full((len(aucs), len(aucs)), np.nan)
    covariance = sum(
        member / (member - 1) * class_sums @ class_sums.T / size**2
        for class_sums, size, member in zip(sums, sizes, members)
    )
    mixed = num_groups / (num_groups - 1) * sums[0] @ sums[1].T / (sizes[0] * sizes[1])
    return aucs, covariance + mixed + mixed.T


def delong_test(
    scores_a: np.ndarray, scores_b: np.ndarray, labels: np.ndarray, patients: np.ndarray | None = None
) -> DeLongTest | None:
    """Test that two runs have the same AUC; None where a class comes from fewer than two patients."""
    aucs, covariance = auc_covariance([scores_a, scores_b], labels, patients)
    variance = covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1]
    if np.isnan(variance):
        return None
    difference = float(aucs[1] - aucs[0])
    # Rounding leaves a runs' difference with itself at a variance of 1e-19 or so, of either sign.
    error = float(np.sqrt(variance)) if variance > 1e-15 else 0.0
    z = difference / error if error else None
    return DeLongTest(
        auc_a=float(aucs[0]),
        auc_b=float(aucs[1]),
        difference=difference,
        standard_error=error,
        low=float(difference - norm.ppf(0.975) * error),
        high=float(difference + norm.ppf(0.975) * error),
        z=z,
        p=None if z is None else float(2 * norm.sf(abs(z))),
    )


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """p values of several tests, adjusted so that none is wrongly called in 95 of 100 families (Holm 1979)."""
    known = sorted((p, n) for n, p in enumerate(p_values) if p is not None)
    adjusted: list[float | None] = [None] * len(p_values)
    highest = 0.0
    for place, (p, n) in enumerate(known):
        highest = max(highest, min(1.0, (len(known) - place) * p))
        adjusted[n] = highest
    return adjusted
