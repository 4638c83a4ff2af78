"""The published metrics of a zero-shot evaluation, faults included, to set a number beside the published ones.

Score a result file of the published form, or a `published_scores.csv` of ours, without any model:
    python -m evaluation_fvlm.published_metrics --scores res.csv --labels valid_predicted_labels.csv --json out.json

For every finding (Shui et al., ICLR 2025; checked against the authors' figures in tests/test_published_metrics.py):

(1) A volume whose organ is absent has an empty score (NaN). It counts as 0: a sure "no".
(2) The area under the ROC curve is taken over all volumes.
(3) Of 100 thresholds, evenly spaced over [0, 1], the one is taken whose (1 - specificity, sensitivity) lies nearest to
    the corner (0, 1) of the ROC plane; of equally near ones the last. "Present" is a score strictly above it.
(4) Sensitivity, specificity, accuracy, precision, and F1 averaged over both classes by their size, at that threshold.

The averages run over findings. Two faults are kept, and named beside every figure: absent organs are scored (1), and
the threshold is chosen on the very labels that it is then judged by (3), so all of (4) looks better than it would on
new patients. `metrics.py` does neither. "F1" here is far above the F1 of the finding itself where findings are rare.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from sklearn.metrics import f1_score, precision_score, roc_auc_score

from evaluation_fvlm.errors import EvaluationError
from evaluation_fvlm.tasks import Item, Task
from modeling_fvlm.organs import nearest_name

LONGEST_CELL = 60  # characters of a cell that a message shows
FILE_COLUMN = "file_name"  # of a result file
VOLUME_COLUMN = "VolumeName"  # of CT-RATE's label files
METRICS = {  # key -> heading of the table
    "auc": "AUC",
    "accuracy": "ACC",
    "specificity": "Spec",
    "sensitivity": "Sens",
    "weighted_f1": "wF1",
    "precision": "Prec",
}
THRESHOLD_FAULT = "threshold chosen on the test labels, as published"
ABSENT_FAULT = "scores of absent organs (NaN) counted as 0, as published"


def published_threshold(scores: np.ndarray, labels: np.ndarray) -> float:
    """The threshold of 100 in [0, 1] nearest to the perfect corner of the ROC plane, the last of equals (3).

    Args:
        scores: `(volumes,)` probabilities.
        labels: `(volumes,)`, 1 or 0; both must occur.
    """
    thresholds = np.linspace(0, 1, 100)
    predicted = scores[:, None] > thresholds  # (volumes, thresholds)
    sensitivity = predicted[labels == 1].mean(axis=0)
    false_positive_rate = predicted[labels == 0].mean(axis=0)
    distance = np.sqrt((1 - sensitivity) ** 2 + false_positive_rate**2)
    return float(thresholds[np.flatnonzero(distance == distance.min())[-1]])


def published_finding_metrics(scores: np.ndarray, labels: np.ndarray) -> dict:
    """The published figures of one finding.

    Args:
        scores: `(volumes,)` probabilities, NaN where the organ is absent: it counts as 0.
        labels: `(volumes,)`, 1 or 0; NaN where unknown: such a volume is left out (the published labels have none).

    Returns:
        The keys of `METRICS` and threshold (all None where a class is missing or no volume has a score, with `reason`;
        the published code stops at the first and measures zeros at the second), positives, negatives, num_nan_as_zero
        and num_unknown_labels.
    """
    scores, labels = np.asarray(scores, float), np.asarray(labels, float)
    known = ~np.isnan(labels)
    scores, labels = scores[known], labels[known].astype(int)
    absent = np.isnan(scores)
    scores = np.where(absent, 0.0, scores)  # (1)
    positives = int(labels.sum())
    counts = {
        "positives": positives,
        "negatives": len(labels) - positives,
        "num_nan_as_zero": int(absent.sum()),
        "num_unknown_labels": int((~known).sum()),
    }
    if positives == 0 or positives == len(labels) or absent.all():
        missing = "no volume" if not len(labels) else "no positive volume" if positives == 0 else "no negative volume"
        if len(labels) and absent.all():
            missing = "no volume with a score"
        reason = f"{missing} among the {len(labels)} labelled"
        return dict.fromkeys([*METRICS, "threshold"]) | counts | {"reason": reason}
    threshold = published_threshold(scores, labels)
    predicted = (scores > threshold).astype(int)
    return {
        "auc": float(roc_auc_score(labels, scores)),  # (2)
        "accuracy": float((predicted == labels).mean()),  # (4)
        "specificity": float((predicted[labels == 0] == 0).mean()),
        "sensitivity": float((predicted[labels == 1] == 1).mean()),
        "weighted_f1": float(f1_score(labels, predicted, average="weighted")),
        "precision": float(precision_score(labels, predicted, zero_division=0)),
        "threshold": threshold,
    } | counts


def summarize_published(frame: pd.DataFrame) -> dict:
    """The published figures of one task.

    Args:
        frame: One row per volume and finding with columns finding, organ, score, label: rows of one task of
            `ZeroShotScores.frame`, or what `read_published_files` returns.

    Returns:
        faults (in words), num_volumes, num_nan_as_zero, averages (over findings that have figures; None without any)
        and per_finding.
    """
    per_finding = {
        finding: {"organ": rows["organ"].iloc[0]} | published_finding_metrics(rows["score"], rows["label"])
        for finding, rows in frame.groupby("finding", sort=False)
    }
    measured = [metrics for metrics in per_finding.values() if metrics["auc"] is not None]
    return {
        "faults": [THRESHOLD_FAULT, ABSENT_FAULT],
        "num_volumes": max((len(rows) for _, rows in frame.groupby("finding")), default=0),
        "num_nan_as_zero": sum(metrics["num_nan_as_zero"] for metrics in per_finding.values()),
        "averages": {
            name: float(np.mean([metrics[name] for metrics in measured])) if measured else None for name in METRICS
        },
        "per_finding": per_finding,
    }


def format_published_table(summary: dict) -> str:
    """The published figures as text for a terminal, in the task's order, with the faults below."""
    per_finding = summary["per_finding"]
    width = max([len("finding"), *(len(finding) for finding in per_finding)])
    heads = " ".join(f"{head:>6}" for head in METRICS.values())
    lines = [f"{'finding':<{width}}  {heads} {'thresh':>6} {'pos':>5} {'neg':>5} {'NaN':>4}"]
    for finding, m in per_finding.items():
        if m["auc"] is None:
            lines.append(f"{finding:<{width}}  not measured: {m['reason']}")
            continue
        figures = " ".join(f"{m[name]:6.3f}" for name in [*METRICS, "threshold"])
        lines.append(f"{finding:<{width}}  {figures} {m['positives']:5d} {m['negatives']:5d} {m['num_nan_as_zero']:4d}")
    averages = summary["averages"]
    figures = " ".join(" none " if averages[name] is None else f"{averages[name]:6.3f}" for name in METRICS)
    lines.append(f"{'average':<{width}}  {figures}")
    lines.append(f"{summary['num_volumes']} volumes; {summary['num_nan_as_zero']} {ABSENT_FAULT}; {THRESHOLD_FAULT}")
    if left_out := summary.get("labelled_without_scores"):
        lines.append(
            f"labelled, but without scores: {left_out['num_volumes']} volumes, {len(left_out['findings'])} findings "
            f"{[shortened(finding) for finding in left_out['findings'][:3]]}"
        )
    return "\n".join(lines)


def published_scores(frame: pd.DataFrame, task: Task) -> pd.DataFrame:
    """The scores of one task in the published column form, one row per volume in the split's order.

    Columns are `file_name` (the `recon_id` with `.nii.gz`) and `organ_finding_negative_positive` for every finding; an
    absent organ's cell is NaN, so empty in the file. Sentences of an ensemble, of which the published form knows
    nothing, are joined by " | ".

    Args:
        frame: The task's rows of `ZeroShotScores.frame`.
    """
    columns: dict[str, np.ndarray] = {}
    for item in task.items:
        rows = frame[frame["finding"] == item.finding]
        columns.setdefault(FILE_COLUMN, (rows["recon_id"] + ".nii.gz").to_numpy())
        columns[published_column(item)] = rows["score"].to_numpy()
    return pd.DataFrame(columns)


def published_column(item: Item) -> str:
    """The heading of a finding's scores: `organ_finding_negative_positive`."""
    prompts = [" | ".join(dict.fromkeys(texts)) for texts in (item.negative, item.positive)]
    return "_".join([item.organ, item.finding, *prompts])


def read_published_files(scores: Path, labels: Path) -> pd.DataFrame:
    """Scores and labels of published result and label files, matched by volume name.

    Args:
        scores: CSV with `file_name` and columns `organ_finding_negative_positive`; empty = organ absent.
        labels: CSV with `VolumeName` and a column of 0 and 1 for every finding; volumes and findings without scores
            are ignored here, and counted by `labelled_without_scores`.

    Returns:
        One row per volume and finding: file_name, finding, organ, score, label.

    Raises:
        EvaluationError: Naming file, volume and column of what is missing, repeated or no number.
    """
    score_columns, score_rows = _read_table(scores, FILE_COLUMN)
    label_columns, label_rows = _read_table(labels, VOLUME_COLUMN)
    unlabelled = [name for name in score_rows if name not in label_rows]
    if unlabelled:
        raise EvaluationError(
            f"{scores}: {len(unlabelled)} of {len(score_rows)} volumes have no row in {labels}: "
            f"{[shortened(name) for name in unlabelled[:3]]}. Give "
            "the label file of the same split; names must agree, ending included."
        )
    parts = []
    for column in score_columns:
        finding = _finding_of(column, label_columns)
        if finding is None:
            middle = shortened(column.split("_")[1] if "_" in column else column)
            raise EvaluationError(
                f"{scores}: column {shortened(column)!r} names no finding of {labels} ({len(label_columns)} columns)"
                f"{nearest_name(middle, label_columns)}. Columns are spelt organ_finding_negative_positive."
            )
        part = pd.DataFrame({FILE_COLUMN: list(score_rows), "finding": finding})
        part["organ"] = column[: column.index(f"_{finding}_")]
        part["score"] = [
            _probability(row[column], f"{scores}: {shortened(name)}, {shortened(column)!r}")
            for name, row in score_rows.items()
        ]
        part["label"] = [
            _label(label_rows[name][finding], f"{labels}: {shortened(name)}, {shortened(finding)!r}")
            for name in score_rows
        ]
        parts.append(part)
    frame = pd.concat(parts, ignore_index=True)
    repeated = frame[frame.duplicated([FILE_COLUMN, "finding"])]["finding"].unique().tolist()
    if repeated:
        raise EvaluationError(
            f"{scores}: findings {[shortened(name) for name in repeated]} have more than one column; keep one each."
        )
    return frame


def labelled_without_scores(frame: pd.DataFrame, labels: Path) -> dict:
    """What a label file holds and a result file does not: an average over a part should not pass for the whole.

    Args:
        frame: From `read_published_files`.
        labels: The label file given there.

    Returns:
        num_volumes, and findings (names).
    """
    columns, rows = _read_table(labels, VOLUME_COLUMN)
    scored = set(frame["finding"])
    return {
        "num_volumes": len(rows.keys() - set(frame[FILE_COLUMN])),
        "findings": [column for column in columns if column not in scored],
    }


def shortened(text: str) -> str:
    """A cell for a message: a broken file may hold megabytes in one."""
    return text if len(text) <= LONGEST_CELL else f"{text[: LONGEST_CELL - 4]} ..."


def _read_table(path: Path, name_column: str) -> tuple[list[str], dict[str, dict[str, str]]]:
    """Columns beside the name, and rows by name."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            header, rows = list(reader.fieldnames or []), list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise EvaluationError(f"{path} cannot be read as CSV: {error}") from error
    columns = [column for column in header if column != name_column]
    if name_column not in header or not columns or len(set(header)) < len(header):
        raise EvaluationError(
            f"{path}: expected the column {name_column!r} and one column per finding, each once, got "
            f"{[shortened(column) for column in header[:6]]}."
        )
    if not rows:
        raise EvaluationError(f"{path} has no rows below its header.")
    by_name: dict[str, dict[str, str]] = {}
    for line, row in enumerate(rows, start=2):
        name = row[name_column]
        if None in row or None in row.values():  # what DictReader makes of a row of another length
            raise EvaluationError(
                f"{path}, row {line} ({shortened(name or '')}): not {len(header)} cells, as the header has."
            )
        if name in by_name:
            raise EvaluationError(f"{path}, row {line}: {shortened(name)!r} comes twice; every volume has one row.")
        by_name[name] = row
    return columns, by_name


def _finding_of(column: str, findings: Sequence[str]) -> str | None:
    """The finding that stands after the organ in `organ_finding_negative_positive`: the first, of two the longer."""
    found = [finding for finding in findings if finding and column.find(f"_{finding}_") > 0]
    return min(found, key=lambda finding: (column.index(f"_{finding}_"), -len(finding)), default=None)


def _number(text: str) -> float:
    """As `float`, without the underscores of Python's own numbers: 0.2_5 in a table is a slip."""
    if "_" in text:
        raise ValueError(text)
    return float(text)


def _probability(text: str, where: str) -> float:
    if not text.strip():
        return math.nan
    try:
        value = _number(text)
    except ValueError:
        raise EvaluationError(
            f"{where}: {shortened(text)!r} is no number; a score is empty or a probability."
        ) from None
    if not math.isnan(value) and not 0 <= value <= 1:
        raise EvaluationError(
            f"{where}: {shortened(text)!r} is no probability; the published thresholds lie in [0, 1]."
        )
    return value


def _label(text: str, where: str) -> float:
    try:
        value = _number(text)
    except ValueError:
        value = math.nan
    if value not in (0, 1):
        raise EvaluationError(f"{where}: label {shortened(text)!r} is neither 0 nor 1.")
    return value


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m evaluation_fvlm.published_metrics",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--scores", type=Path, required=True, help="Result file: file_name, one column per finding.")
    parser.add_argument("--labels", type=Path, required=True, help="Label file: VolumeName, 0 or 1 per finding.")
    parser.add_argument("--json", type=Path, metavar="OUT", help="Write all figures, unrounded, to this file.")
    options = parser.parse_args(arguments)
    try:
        if options.json:
            check_can_write(options.json)
        frame = read_published_files(options.scores, options.labels)
        summary = summarize_published(frame)
        summary["labelled_without_scores"] = labelled_without_scores(frame, options.labels)
    except EvaluationError as error:
        print(f"published_metrics: error: {error}", file=sys.stderr)
        return 1
    print(format_published_table(summary))
    if options.json:
        options.json.write_text(json.dumps(summary, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return 0


def check_can_write(path: Path) -> None:
    """Make the folder of a file to be, and refuse a place where no file can be."""
    if path.is_dir():
        raise EvaluationError(f"--json {path} is a folder; name a file in it, such as {path / 'published.json'}.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:  # a file stands where a folder is wanted, or nobody may write there
        raise EvaluationError(f"--json {path}: its folder cannot be made: {error}. Name another file.") from error


if __name__ == "__main__":
    raise SystemExit(main())
