"""Where "present" begins: the criterion that picks a threshold, and the data that it may look at.

"Present" is a score strictly above the threshold, as in the published evaluation.

Sources, by name of `Protocol.threshold`:
    cross_validation    chosen for every fold of patients on the other folds: no patient is judged by its own labels
    development         chosen on another set of patients
    test_labels         chosen on the very labels that it is then judged by, as published; flatters decision metrics
    a number            the same for all findings

Criteria:
    youden      recall + specificity as high as possible
    corner      nearest to the corner (0, 1) of the ROC plane
    f1          the finding's own F1 as high as possible
    published   as corner, but of 100 thresholds evenly spaced over [0, 1] (published_metrics.py)
"""

from __future__ import annotations

import numpy as np

from evaluation_fvlm.published_metrics import published_threshold

SOURCES = {  # name -> what the results say
    "cross_validation": "chosen by cross-validation: for every fold of patients, on the other folds",
    "development": "chosen on a development split of other patients",
    "test_labels": "chosen on the test labels (as published): decision metrics look better than on new patients",
}
CRITERIA = ("youden", "corner", "f1", "published")


def choose_threshold(scores: np.ndarray, labels: np.ndarray, criterion: str = "youden") -> float | None:
    """The threshold that serves a criterion best, the highest of equals.

    Thresholds are midpoints between neighbouring scores, and one just below the lowest, with which all are present.

    Args:
        scores: `(rows,)`, finite; for `published` probabilities.
        labels: `(rows,)`, 1 or 0.

    Returns:
        None where a class is missing: nothing can be chosen.
    """
    if criterion not in CRITERIA:
        raise ValueError(f"criterion {criterion!r} is not one of {list(CRITERIA)}.")
    labels = np.asarray(labels) == 1
    num_positives, num_negatives = labels.sum(), (~labels).sum()
    if num_positives == 0 or num_negatives == 0:
        return None
    if criterion == "published":
        return published_threshold(scores, labels.astype(int))
    distinct, place = np.unique(scores, return_inverse=True)
    # Counts of scores above threshold k, which lies just below distinct[k].
    hits = np.cumsum(np.bincount(place, labels, len(distinct))[::-1])[::-1]
    alarms = np.cumsum(np.bincount(place, ~labels, len(distinct))[::-1])[::-1]
    recall, alarm_rate = hits / num_positives, alarms / num_negatives
    quality = {
        "youden": recall - alarm_rate,
        "corner": -np.hypot(1 - recall, alarm_rate),
        "f1": 2 * hits / (hits + alarms + num_positives),
    }[criterion]
    best = np.flatnonzero(quality >= quality.max() - 1e-12)[-1]
    if best == 0:
        return float(np.nextafter(distinct[0], -np.inf))
    middle = (distinct[best - 1] + distinct[best]) / 2
    # Between neighbouring floats there is no middle, and it may round up to the score that is to lie above.
    return float(middle if middle < distinct[best] else distinct[best - 1])
