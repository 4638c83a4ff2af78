"""How far a finding's AUC hangs on the words it is asked in.

Every (positive, negative) pair of a prompt set, those of the score and its `paraphrases` (tasks.py), is scored alone on
the same scans. The spread is what another choice of prompts of the same meaning would have given: the lowest and the
highest AUC, and the standard deviation (of a sample, so over n - 1). A difference between two models that is smaller
may be one of wording.
"""

from __future__ import annotations

import numpy as np

from evaluation_fvlm.metrics import finding_metrics


def wording_spread(
    scores: np.ndarray, labels: np.ndarray, wordings: list[tuple[str, str]], num_scored: int
) -> dict | None:
    """AUC of every wording of one finding, and its spread.

    Args:
        scores: `(scans, wordings)` probabilities, NaN where not scored.
        labels: `(scans,)`, 1 or 0; NaN where unknown.
        wordings: The (positive, negative) pairs, those of the score first.
        num_scored: How many of them make the score; the rest are paraphrases.

    Returns:
        min, max, std, num_wordings and pairs; None where there is only one wording, or no AUC.
    """
    aucs = [finding_metrics(column, labels)["auc"] for column in np.asarray(scores, float).T]
    if len(aucs) < 2 or None in aucs:
        return None
    return {
        "min": min(aucs),
        "max": max(aucs),
        "std": float(np.std(aucs, ddof=1)),
        "num_wordings": len(aucs),
        "pairs": [
            {"positive": positive, "negative": negative, "in_score": n < num_scored, "auc": auc}
            for n, ((positive, negative), auc) in enumerate(zip(wordings, aucs))
        ],
    }


def summarize_wording(per_finding: dict[str, dict | None]) -> dict | None:
    """The spread over the findings of a task that have one; None if none has.

    Returns:
        num_findings, mean_std, mean_range, largest (finding and range), and macro_min and macro_max: the macro AUC of
        these findings were each asked in its worst and in its best wording, chosen on these very labels.
    """
    known = {finding: spread for finding, spread in per_finding.items() if spread is not None}
    if not known:
        return None
    ranges = {finding: spread["max"] - spread["min"] for finding, spread in known.items()}
    widest = max(ranges, key=ranges.get)
    return {
        "num_findings": len(known),
        "mean_std": _mean(known, "std"),
        "mean_range": float(np.mean(list(ranges.values()))),
        "largest": {"finding": widest, "range": ranges[widest]},
        "macro_min": _mean(known, "min"),
        "macro_max": _mean(known, "max"),
    }


def _mean(spreads: dict[str, dict], key: str) -> float:
    return float(np.mean([spread[key] for spread in spreads.values()]))
