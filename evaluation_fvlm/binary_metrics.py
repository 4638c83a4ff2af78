"""Metrics of one finding against its labels, for the sample as it is and for many resamples of its patients at once.

Ranking metrics need no threshold: the area under the ROC curve and the average precision, both scikit-learn's. Decision
metrics are functions of four counts (hits, false alarms, misses, correct denials). "f1" is that of the finding itself;
"weighted_f1" is the mean of the finding's F1 and that of its absence, weighted by their size, which the CT literature
often calls F1 and which lies far above the other where findings are rare. "youden" is recall + specificity - 1.

A resample of patients is a vector of counts, how often each was drawn. So nothing is copied or sorted again:

(1) A finding is sorted once. For any counts, the sums of them along that order give AUC and average precision.
(2) The four counts of a resample are a product of its vector with the four counts of every patient.

Both give scikit-learn's figures on the resampled rows (tests/test_binary_metrics.py).
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from sklearn.metrics import average_precision_score, roc_auc_score

RANKING_METRICS = ("auc", "average_precision")
DECISION_METRICS = (
    "accuracy", "balanced_accuracy", "f1", "weighted_f1", "precision", "recall", "specificity", "youden"
)  # fmt: skip
METRICS = (*RANKING_METRICS, *DECISION_METRICS)
BLOCK = 4_000_000  # counts (resamples x rows) held at a time: 16 MB of sums


def ranking_metrics(scores: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """AUC and average precision.

    Args:
        scores: `(rows,)`, higher for present.
        labels: `(rows,)`, 1 or 0; both must occur.
    """
    return {
        "auc": float(roc_auc_score(labels, scores)),
        "average_precision": float(average_precision_score(labels, scores)),
    }


def decision_counts(
    is_called: np.ndarray, labels: np.ndarray, patients: np.ndarray | None = None, num_patients: int = 1
) -> np.ndarray:
    """True positives, false positives, false negatives and true negatives of every patient.

    Args:
        is_called: `(rows,)`, whether the finding is called present.
        labels: `(rows,)`, 1 or 0.
        patients: `(rows,)` index of the patient; None: all are one.

    Returns:
        `(num_patients, 4)`.
    """
    cell = np.where(labels == 1, np.where(is_called, 0, 2), np.where(is_called, 1, 3))
    if patients is not None:
        cell = cell + 4 * patients
    return np.bincount(cell, minlength=4 * num_patients).reshape(num_patients, 4).astype(float)


def decision_metrics(counts: np.ndarray) -> dict[str, np.ndarray]:
    """The metrics of `DECISION_METRICS`, elementwise over the leading axes.

    Args:
        counts: `(..., 4)` as from `decision_counts`.

    Returns:
        Arrays `(...)`; NaN where a class is missing. Precision is 0 where nothing is called present, as scikit-learn
        has it.
    """
    tp, fp, fn, tn = np.moveaxis(np.asarray(counts, float), -1, 0)
    positives, negatives = tp + fn, fp + tn
    with np.errstate(divide="ignore", invalid="ignore"):
        recall, specificity = tp / positives, tn / negatives
        f1, f1_of_absence = 2 * tp / (2 * tp + fp + fn), 2 * tn / (2 * tn + fp + fn)
        metrics = {
            "accuracy": (tp + tn) / (positives + negatives),
            "balanced_accuracy": (recall + specificity) / 2,
            "f1": f1,
            "weighted_f1": (positives * f1 + negatives * f1_of_absence) / (positives + negatives),
            "precision": tp / np.maximum(tp + fp, 1),
            "recall": recall,
            "specificity": specificity,
            "youden": recall + specificity - 1,
        }
    has_both = (positives > 0) & (negatives > 0)
    return {name: np.where(has_both, values, np.nan) for name, values in metrics.items()}


class Ranking:
    """The rows of one finding, sorted once by their scores, ready to be weighted (1).

    Args:
        scores: `(rows,)`, finite.
        labels: `(rows,)`, 1 or 0; both must occur.
        patients: `(rows,)` index of the patient.
    """

    def __init__(self, scores: np.ndarray, labels: np.ndarray, patients: np.ndarray):
        order = np.argsort(-scores, kind="stable")  # highest first
        scores, is_positive = scores[order], labels[order] == 1
        self.patients = patients[order]
        self.positives = np.flatnonzero(is_positive)
        # Rows of equal scores form a group; the sums before and behind the group of every positive are needed.
        is_first = np.append(True, scores[1:] != scores[:-1])
        first, last = np.flatnonzero(is_first), np.append(np.flatnonzero(is_first)[1:], len(scores))
        group = np.cumsum(is_first)[self.positives] - 1
        self.starts, self.ends = first[group], last[group]
        hits = np.append(0, np.cumsum(is_positive))
        self.hits_at_start, self.hits_at_end = hits[self.starts], hits[self.ends]

    def resampled(self, weights: np.ndarray) -> dict[str, np.ndarray]:
        """AUC and average precision of every resample; NaN where a class was not drawn.

        Args:
            weights: `(resamples, patients)`, how often each patient was drawn, an integer type.
        """
        parts = [self._resampled(weights[block]) for block in blocks(len(weights), len(self.patients))]
        return {name: np.concatenate([part[name] for part in parts]) for name in RANKING_METRICS}

    def _resampled(self, weights: np.ndarray) -> dict[str, np.ndarray]:
        drawn = weights[:, self.patients]  # (resamples, rows)
        sums = np.zeros((len(drawn), drawn.shape[1] + 1), np.int32)
        np.cumsum(drawn, axis=1, out=sums[:, 1:])
        hits = drawn[:, self.positives].astype(float)  # (resamples, positives)
        hit_sums = np.zeros((len(drawn), hits.shape[1] + 1))
        np.cumsum(hits, axis=1, out=hit_sums[:, 1:])
        called, hits_at_end = sums[:, self.ends], hit_sums[:, self.hits_at_end]
        alarms_at_start = sums[:, self.starts] - hit_sums[:, self.hits_at_start]
        alarms_at_end = called - hits_at_end
        num_positives = hit_sums[:, -1]
        num_negatives = sums[:, -1] - num_positives
        # Of the negatives, those behind a positive's group lie below it, those within count half.
        below = num_negatives[:, None] - (alarms_at_start + alarms_at_end) / 2
        with np.errstate(divide="ignore", invalid="ignore"):
            auc = (hits * below).sum(axis=1) / (num_positives * num_negatives)
            precision = hits_at_end / np.maximum(called, 1)
            average_precision = (hits * precision).sum(axis=1) / num_positives
        average_precision[num_negatives == 0] = np.nan
        return {"auc": auc, "average_precision": average_precision}


def blocks(num_resamples: int, num_rows: int) -> Iterator[slice]:
    """Slices over the resamples that keep the memory of one step small."""
    step = max(1, BLOCK // max(1, num_rows))
    for start in range(0, num_resamples, step):
        yield slice(start, start + step)
