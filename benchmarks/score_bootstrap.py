"""Evaluation of a table of scores with intervals: resamples as weights, against copying rows and calling scikit-learn.

    python -m benchmarks.score_bootstrap
    python -m benchmarks.score_bootstrap --patients 1000 --findings 4 --json score_bootstrap.json

`score_bootstrap/P/F/B`: P patients of one volume each, F findings of 2 to 40 per cent, B resamples of patients. Ours is
`evaluate_frame` as `python -m evaluation_fvlm score` calls it: ten metrics, thresholds by cross-validation,
calibration, per finding, organ, macro and micro, each with its interval. The baseline takes the rows of a resample and
asks scikit-learn for the same ten metrics at a threshold that is given to it, finding by finding; no calibration, no
folds, no micro average. It is timed on --baseline_resamples resamples of all findings and multiplied.

Compared are the ten metrics of every finding in those resamples, at the thresholds that ours chose, and the ends of the
intervals of average precision with the percentiles of resamples drawn alike.
"""

import argparse
from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from sklearn import metrics

from benchmarks.measure import Result, add_arguments, in_turns, parse_arguments, relative_difference, report
from benchmarks.memory import in_fresh_process, memory_gb
from evaluation_fvlm.binary_metrics import METRICS, Ranking, decision_counts, decision_metrics
from evaluation_fvlm.bootstrap import draw_patients
from evaluation_fvlm.protocols import Protocol, evaluate_frame

SEED = 0


def make_frame(num_patients: int, num_findings: int) -> pd.DataFrame:
    """A table of scores that are better than chance, from 2 per cent of positives to 40."""
    rng = np.random.default_rng(SEED)
    names = [f"patient_{n:05d}" for n in range(num_patients)]
    parts = []
    for number, share in enumerate(np.linspace(0.02, 0.4, num_findings)):
        labels = rng.random(num_patients) < share
        labels[:2] = True, False
        scores = 1 / (1 + np.exp(-(rng.standard_normal(num_patients) + 1.2 * labels - 1)))
        columns = {"task": "made up", "patient_id": names, "scan_id": names, "recon_id": names}
        columns |= {"finding": f"finding {number}", "organ": f"organ {number % 6}", "score": scores}
        parts.append(pd.DataFrame(columns | {"label": labels.astype(float), "is_complete": True}))
    return pd.concat(parts, ignore_index=True)


def scikit_learn(scores: np.ndarray, labels: np.ndarray, is_called: np.ndarray) -> dict[str, float]:
    """The ten metrics of one finding in one resample."""
    recall = metrics.recall_score(labels, is_called, zero_division=0)
    specificity = metrics.recall_score(labels, is_called, pos_label=0, zero_division=0)
    return {
        "auc": metrics.roc_auc_score(labels, scores),
        "average_precision": metrics.average_precision_score(labels, scores),
        "accuracy": metrics.accuracy_score(labels, is_called),
        "balanced_accuracy": metrics.balanced_accuracy_score(labels, is_called),
        "f1": metrics.f1_score(labels, is_called, zero_division=0),
        "weighted_f1": metrics.f1_score(labels, is_called, average="weighted", zero_division=0),
        "precision": metrics.precision_score(labels, is_called, zero_division=0),
        "recall": recall,
        "specificity": specificity,
        "youden": recall + specificity - 1,
    }


def copied_resamples(findings: Sequence[tuple], weights: np.ndarray) -> np.ndarray:
    """The baseline: `(resamples, findings, metrics)`, every resample's rows copied."""
    values = np.empty((len(weights), len(findings), len(METRICS)))
    for resample, drawn in enumerate(weights):
        rows = np.repeat(np.arange(len(drawn)), drawn)
        for number, (scores, labels, is_called) in enumerate(findings):
            found = scikit_learn(scores[rows], labels[rows], is_called[rows])
            values[resample, number] = [found[name] for name in METRICS]
    return values


def weighted_resamples(findings: Sequence[tuple], weights: np.ndarray) -> np.ndarray:
    """The same from ours."""
    patients = np.arange(weights.shape[1])
    values = []
    for scores, labels, is_called in findings:
        counts = decision_counts(is_called, labels, patients, len(patients))
        found = Ranking(scores, labels, patients).resampled(weights) | decision_metrics(weights.astype(float) @ counts)
        values.append(np.stack([found[name] for name in METRICS], axis=-1))
    return np.stack(values, axis=1)


def memory_of_an_evaluation(num_patients: int, num_findings: int, protocol: Protocol) -> tuple[float, float]:
    """GB resident before an evaluation of this process, and the most that ever were."""
    frame = make_frame(num_patients, num_findings)
    before = memory_gb("VmRSS")
    evaluate_frame(frame, protocol)
    return before, memory_gb("VmHWM")


def compare(num_patients: int, num_findings: int, num_bootstraps: int, baseline_resamples: int, repeats: int) -> Result:
    """Time and compare one table."""
    frame, protocol = make_frame(num_patients, num_findings), Protocol(num_bootstraps=num_bootstraps, seed=SEED)
    result = evaluate_frame(frame, protocol)
    findings = []
    for finding, rows in frame.groupby("finding", sort=False):
        scores, labels = rows["score"].to_numpy(), rows["label"].to_numpy()
        findings.append((scores, labels, scores > result["per_finding"][finding]["threshold"]["value"]))
    weights = draw_patients(num_patients, num_bootstraps, SEED)
    few = weights[: min(baseline_resamples, num_bootstraps)]
    ours, theirs = (torch.from_numpy(way(findings, few)) for way in (weighted_resamples, copied_resamples))
    drawn = weighted_resamples(findings[:1], weights)[:, 0, METRICS.index("average_precision")]
    ends = result["per_finding"]["finding 0"]["average_precision"]
    interval = torch.tensor([ends["low"], ends["high"]], dtype=torch.float64)
    expected = torch.from_numpy(np.quantile(drawn, [0.025, 0.975]))
    difference = relative_difference([*ours.unbind(-1), interval], [*theirs.unbind(-1), expected])

    ways = {"baseline": lambda: copied_resamples(findings, few), "ours": lambda: evaluate_frame(frame, protocol)}
    times = in_turns(ways, repeats)
    before, most = in_fresh_process(memory_of_an_evaluation, num_patients, num_findings, protocol)
    note = (
        f"peak {most:.2f} GB ({before:.2f} before); baseline timed on {len(few)} of {num_bootstraps} resamples, "
        "compared on these"
    )
    name = f"score_bootstrap/{num_patients}/{num_findings}/{num_bootstraps}"
    extra = {"ours_peak_gb": most, "ours_start_gb": before}
    return Result(name, times["baseline"] * (num_bootstraps / len(few)), times["ours"], difference, note, extra=extra)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--patients", type=int, default=3000, help="Default: %(default)s.")
    parser.add_argument("--findings", type=int, default=18, help="Default: %(default)s.")
    parser.add_argument("--bootstraps", type=int, default=1000, help="Resamples of ours (default: %(default)s).")
    parser.add_argument("--baseline_resamples", type=int, default=5, help="Of the baseline (default: %(default)s).")
    add_arguments(parser, repeats=1)
    options = parse_arguments(parser, arguments)
    sizes = (options.patients, options.findings, options.bootstraps, options.baseline_resamples)
    report([compare(*sizes, options.repeats)], options.json)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
