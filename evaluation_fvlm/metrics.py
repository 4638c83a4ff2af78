"""Metrics of a score table: per finding, per organ and over all, with what was left out and why.

The area under the ROC curve is the probability that a random positive scan scores above a random negative one, ties
counting half; average precision is the mean precision over the positives in order of score. Neither needs a threshold.
A finding with one class only has neither: its value is None with the reason beside it, and the macro average runs over
the findings that have one. Scans without the organ or without a label are counted, not scored.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from sklearn.metrics import average_precision_score, roc_auc_score

ORGAN_ABSENT = "organ absent from the mask"
LABEL_UNKNOWN = "label unknown"
RECONSTRUCTION = ["patient_id", "scan_id", "recon_id"]


def finding_metrics(scores: np.ndarray, labels: np.ndarray) -> dict:
    """AUC and average precision of one finding.

    Args:
        scores: `(scans,)`, higher for present; NaN where not scored.
        labels: `(scans,)`, 1 or 0; NaN where unknown.

    Returns:
        auc, average_precision (None where a class is missing, with `reason`), positives, negatives, and `excluded`:
        scans by reason, every scan under one reason only.
    """
    scores, labels = np.asarray(scores, float), np.asarray(labels, float)
    absent = np.isnan(scores)
    unknown = np.isnan(labels) & ~absent
    counted = ~absent & ~unknown
    excluded = {ORGAN_ABSENT: int(absent.sum()), LABEL_UNKNOWN: int(unknown.sum())}
    scores, labels = scores[counted], labels[counted]
    positives = int(labels.sum())
    metrics = {
        "auc": None,
        "average_precision": None,
        "positives": positives,
        "negatives": len(labels) - positives,
        "excluded": {reason: count for reason, count in excluded.items() if count},
    }
    if positives == 0 or positives == len(labels):
        missing = "no scan" if not len(labels) else "no positive scan" if positives == 0 else "no negative scan"
        return metrics | {"reason": f"{missing} among the {len(labels)} scored and labelled"}
    return metrics | {
        "auc": float(roc_auc_score(labels, scores)),
        "average_precision": float(average_precision_score(labels, scores)),
    }


def summarize(frame: pd.DataFrame) -> dict:
    """Metrics of one task from its rows of `ZeroShotScores.frame`.

    Returns:
        macro_auc and macro_average_precision (None if no finding has one), num_findings (with an AUC),
        num_findings_asked, num_patients, num_scans and num_reconstructions (with at least one score), per_finding,
        per_organ (mean AUC over its findings), num_incomplete_organs (organs of a scan that were scored though they
        touch the border) and excluded (finding of a scan, by reason).

    Raises:
        ValueError: If the rows belong to more than one task: a finding could stand there twice.
    """
    if frame["task"].nunique() > 1:
        raise ValueError(f"summarize takes the rows of one task, got those of {sorted(frame['task'].unique())}.")
    per_finding: dict[str, dict] = {}
    for finding, rows in frame.groupby("finding", sort=False):
        per_finding[finding] = {"organ": rows["organ"].iloc[0]} | finding_metrics(
            rows["score"].to_numpy(), rows["label"].to_numpy()
        )
    measured = {finding: metrics for finding, metrics in per_finding.items() if metrics["auc"] is not None}
    per_organ = {}
    for organ in dict.fromkeys(metrics["organ"] for metrics in per_finding.values()):
        aucs = [metrics["auc"] for metrics in measured.values() if metrics["organ"] == organ]
        per_organ[organ] = {"auc": _mean(aucs), "num_findings": len(aucs)}
    excluded: dict[str, int] = {}
    for metrics in per_finding.values():
        for reason, count in metrics["excluded"].items():
            excluded[reason] = excluded.get(reason, 0) + count
    scored = frame[frame["score"].notna()]
    cut = scored[~scored["is_complete"].astype(bool)]
    return {
        "macro_auc": _mean([metrics["auc"] for metrics in measured.values()]),
        "macro_average_precision": _mean([metrics["average_precision"] for metrics in measured.values()]),
        "num_findings": len(measured),
        "num_findings_asked": len(per_finding),
        "num_patients": int(scored["patient_id"].nunique()),
        # Two patients may call their visits alike.
        "num_scans": len(scored.drop_duplicates(["patient_id", "scan_id"])),
        "num_reconstructions": len(scored.drop_duplicates(RECONSTRUCTION)),
        "per_finding": per_finding,
        "per_organ": per_organ,
        "num_incomplete_organs": len(cut.drop_duplicates([*RECONSTRUCTION, "organ"])),
        "excluded": excluded,
    }


def _mean(values: list[float]) -> float | None:
    return float(np.mean(values)) if values else None
