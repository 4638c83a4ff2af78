"""AUC and its kin against counting pairs, known values, and the authors' own figures."""

import csv
import json

import numpy as np
import pandas as pd
import pytest

from evaluation_fvlm.metrics import LABEL_UNKNOWN, ORGAN_ABSENT, finding_metrics, summarize

NAN = float("nan")


def slow_auc(scores, labels):
    """Every positive against every negative: 1 for above, 1/2 for equal."""
    wins = [
        1.0 if p > n else 0.5 if p == n else 0.0
        for p, y in zip(scores, labels)
        if y == 1
        for n, z in zip(scores, labels)
        if z == 0
    ]
    return sum(wins) / len(wins)


def slow_average_precision(scores, labels):
    """Without ties: at each positive, the share of positives among the scans scored as high; the mean of it."""
    precisions = []
    for score, label in zip(scores, labels):
        if label == 1:
            above = [y for s, y in zip(scores, labels) if s >= score]
            precisions.append(sum(above) / len(above))
    return sum(precisions) / len(precisions)


@pytest.mark.parametrize("seed", range(5))
def test_auc_counts_pairs_with_ties_as_halves(seed):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, 40)
    scores = rng.integers(0, 6, 40) / 5  # many ties
    metrics = finding_metrics(scores, labels)
    assert metrics["auc"] == pytest.approx(slow_auc(scores, labels), abs=1e-12)
    distinct = rng.permutation(40) / 40
    metrics = finding_metrics(distinct, labels)
    assert metrics["average_precision"] == pytest.approx(slow_average_precision(distinct, labels), abs=1e-12)
    assert (metrics["positives"], metrics["negatives"]) == (labels.sum(), 40 - labels.sum())


@pytest.mark.parametrize(
    "scores, labels, auc", [([0.1, 0.9], [0, 1], 1.0), ([0.9, 0.1], [0, 1], 0.0), ([0.3, 0.3, 0.3], [0, 1, 1], 0.5)]
)
def test_known_values(scores, labels, auc):
    metrics = finding_metrics(scores, labels)
    assert metrics["auc"] == auc and metrics["excluded"] == {} and "reason" not in metrics


def test_absent_and_unknown_are_left_out_not_scored_zero():
    scores = [0.2, 0.8, NAN, 0.4, NAN, 0.9]
    labels = [0, 1, 1, NAN, NAN, 0]
    metrics = finding_metrics(scores, labels)
    assert metrics["auc"] == 0.5  # 0.8 against 0.2 and 0.9; the absent positive does not pull it down
    assert (metrics["positives"], metrics["negatives"]) == (1, 2)
    assert metrics["excluded"] == {ORGAN_ABSENT: 2, LABEL_UNKNOWN: 1}


@pytest.mark.parametrize(
    "scores, labels, reason",
    [
        ([0.1, 0.2], [0, 0], "no positive scan among the 2"),
        ([0.1, 0.2, NAN], [1, 1, 0], "no negative scan among the 2"),
        ([NAN], [1], "no scan among the 0"),
    ],
)
def test_one_class_has_no_auc_but_a_reason(scores, labels, reason):
    metrics = finding_metrics(scores, labels)
    assert metrics["auc"] is None and metrics["average_precision"] is None
    assert reason in metrics["reason"]


def frame(rows, task="t"):
    columns = ["patient_id", "scan_id", "recon_id", "finding", "organ", "score", "label", "is_complete"]
    return pd.DataFrame(rows, columns=columns).assign(task=task)


def test_summary_averages_over_findings_that_have_an_auc():
    rows = []
    for n, (perfect, opposed) in enumerate([(0.1, 0.9), (0.2, 0.8), (0.9, 0.1), (0.8, 0.8)]):
        label = float(n >= 2)
        who = (f"p{n // 2}", f"s{n}", f"s{n}_1")
        rows.append((*who, "Perfect", "lung", perfect, label, True))
        rows.append((*who, "Tied", "lung", opposed, label, n != 0))  # 1 of 4 pairs is a tie, 3 are lost
        rows.append((*who, "Never", "heart", 0.5, 0.0, n != 0))
        rows.append((*who, "Gone", "aorta", NAN, label, False))
    summary = summarize(frame(rows))
    assert summary["per_finding"]["Perfect"]["auc"] == 1.0
    assert summary["per_finding"]["Tied"]["auc"] == 0.125
    assert summary["macro_auc"] == pytest.approx((1.0 + 0.125) / 2)
    assert (summary["num_findings"], summary["num_findings_asked"]) == (2, 4)
    assert (summary["num_patients"], summary["num_scans"], summary["num_reconstructions"]) == (2, 4, 4)
    assert summary["per_organ"]["lung"] == {"auc": pytest.approx(0.5625), "num_findings": 2}
    assert summary["per_organ"]["heart"] == {"auc": None, "num_findings": 0}
    assert summary["excluded"] == {ORGAN_ABSENT: 4}
    assert summary["num_incomplete_organs"] == 2  # lung and heart of scan 0; absent aortas are no scored organs
    assert list(summary["per_finding"]) == ["Perfect", "Tied", "Never", "Gone"]
    json.dumps(summary, allow_nan=False)  # plain numbers only, so metrics.json is valid JSON

    nothing = summarize(frame([row for row in rows if row[3] == "Never"]))
    assert nothing["macro_auc"] is None and nothing["num_findings"] == 0
    with pytest.raises(ValueError, match="rows of one task"):
        summarize(pd.concat([frame(rows), frame(rows, task="u")]))


def test_patients_without_any_score_are_not_counted():
    rows = [("p0", "s0", "r0", "F", "lung", 0.5, 1.0, True), ("p1", "s1", "r1", "F", "lung", NAN, 0.0, False)]
    summary = summarize(frame(rows))
    assert (summary["num_patients"], summary["num_scans"]) == (1, 1)


def test_visits_of_two_patients_that_share_a_name_are_two():
    rows = [(p, "s", recon, "F", "lung", 0.5, 1.0, recon == "r2") for p in ("p0", "p1") for recon in ("r1", "r2")]
    summary = summarize(frame(rows))
    assert (summary["num_patients"], summary["num_scans"], summary["num_reconstructions"]) == (2, 2, 4)
    assert summary["num_incomplete_organs"] == 2


def test_auc_equals_the_published_scripts_figure(shared_dir):
    """Same probabilities, same labels; there an absent score counts as 0, so the two are set to 0 here first."""
    folder = shared_dir / "golden" / "metrics"
    golden = json.loads((folder / "outputs.json").read_text())["auc_scores"]
    with open(folder / "res.csv") as file:
        predicted = list(csv.DictReader(file))
    with open(folder / "valid_predicted_labels.csv") as file:
        labels = {row["VolumeName"]: row for row in csv.DictReader(file)}
    assert len(predicted) == 60 and len(golden) == 5
    name_column = next(iter(predicted[0]))
    for finding, auc in golden.items():
        column = next(column for column in predicted[0] if f"_{finding}_" in column)
        scores = [float(row[column] or 0) for row in predicted]
        known = [float(labels[row[name_column]][finding]) for row in predicted]
        assert finding_metrics(np.nan_to_num(scores), known)["auc"] == pytest.approx(auc, abs=1e-12)
