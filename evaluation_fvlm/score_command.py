"""Evaluate a CSV of scores against a CSV of labels, whoever made them, by a stated protocol with 95 % intervals.

A result file of the published evaluator, or published_scores.csv of eval_fvlm.py, with CT-RATE's labels:
    python -m evaluation_fvlm score --scores res.csv --labels labels.csv --task ct_rate_16 --json out.json

The published figures of the same file: threshold chosen on the test labels, absent organs scored 0, all volumes count:
    python -m evaluation_fvlm score --scores res.csv --labels labels.csv --protocol published

Columns named as the findings, logits instead of probabilities, a column that names the patient, a fixed threshold:
    python -m evaluation_fvlm score --scores my.csv --labels labels.csv --logits --patient_column person --threshold 0.5

Thresholds from other patients; and a patient's scans with equal reports counted once:
    python -m evaluation_fvlm score --scores test.csv --labels labels.csv --threshold development \\
        --development_scores valid.csv --development_labels labels_of_valid.csv
    python -m evaluation_fvlm score --scores res.csv --labels labels.csv --duplicates within_patients \\
        --reports reports.csv

scores.csv of eval_fvlm.py has the labels in it:
    python -m evaluation_fvlm score --scores runs/eval/scores.csv

--scores: a column of file names (file_name, VolumeName, NoteAcc_DEID, ...) and a column per finding, spelt as the
    finding or as organ_finding_negative_positive; or columns finding and score, a row per case and finding.
--labels: CT-RATE's form (VolumeName and a column of 0 and 1 per finding), RAD-ChestCT's (NoteAcc_DEID and columns
    abnormality*location), or columns finding and label. Files match by name, with .nii.gz or without.

An empty score is no score, an empty label or -1 is unknown: both are counted, never taken as 0 (but by --absent zero).
Rows that come twice are dropped and counted; if they differ, that is an error. Where a part of the task cannot be
measured (a finding with one class or without scores, cases that one file lacks), `warnings` and the last lines on
stderr name it; the exit status is 0 all the same. Research only, not for diagnosis.

--json FILE, keys (a FIGURE is {value, low, high}, each a number or null; low and high bound the 95 % interval):
    macro_auc, macro_average_precision, macro_accuracy, macro_balanced_accuracy, macro_f1, macro_weighted_f1,
    macro_precision, macro_recall, macro_specificity, macro_youden, macro_brier, macro_ece, macro_ece_equal_mass
                    number: mean over findings; micro_auc and so on: over all pairs of case and finding
    macro, micro    the same names without the prefix -> FIGURE
    per_finding     finding -> the same names -> FIGURE; organ, positives, negatives, num_patients, threshold,
                    calibration (brier, ece, ece_equal_mass, bins), curves (roc, pr), folds (mean, sd, values),
                    excluded, reason (if nothing was measured)
    per_organ       organ -> the same names -> FIGURE, num_findings
    folds           mean, sd and values of the macro figures over the folds of patients
    excluded        reason -> number of pairs of case and finding
    dropped_cases   reason -> {count, cases}: whole cases, named
    protocol        every setting, and in_words what it means
    warnings        sentences
    files           files, columns matched and ignored, findings without scores or labels, identical rows dropped
    num_findings, num_findings_asked, num_patients, num_scans, num_reconstructions, task, versions
"""

import argparse
import json
import platform
import sys
from importlib.metadata import version
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from evaluation_fvlm.equal_reports import DUPLICATES
from evaluation_fvlm.errors import EvaluationError
from evaluation_fvlm.protocols import ABSENT, LEVELS, PARTIAL, Protocol, evaluate_frame, partial_warnings
from evaluation_fvlm.published_metrics import check_can_write
from evaluation_fvlm.score_table import NO_LABELS, NO_SCORES, ScoreTable, read_score_table
from evaluation_fvlm.tasks import Task, available_tasks, load_task
from evaluation_fvlm.thresholds import CRITERIA, SOURCES

PIPE_WIDTH = 128  # characters of a line where there is no terminal
COLUMNS = {  # metric -> heading of the table
    "auc": "AUC [95 % interval]",
    "average_precision": "AP",
    "f1": "F1",
    "weighted_f1": "wF1",
    "balanced_accuracy": "bACC",
    "precision": "prec",
    "recall": "recall",
    "specificity": "spec",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    files = parser.add_argument_group("files")
    files.add_argument("--scores", type=Path, required=True, metavar="CSV", help="Scores, see above.")
    add_file_arguments(files)
    files.add_argument("--development_scores", type=Path, metavar="CSV", help="For --threshold development.")
    files.add_argument("--development_labels", type=Path, metavar="CSV", help="Of these scores (default: --labels).")
    add_protocol_arguments(parser)
    add_output_arguments(parser)


def add_file_arguments(group: argparse._ArgumentGroup) -> None:
    """What `score` and `compare` share."""
    group.add_argument("--labels", type=Path, metavar="CSV", help="Labels, see above.")
    group.add_argument(
        "--task",
        help=f"Prompt set whose findings are asked, and which tells their organs: {', '.join(available_tasks())}, or a "
        "YAML file (default: every finding with scores and labels).",
    )
    group.add_argument("--reports", type=Path, metavar="CSV", help="Reports, to know equal ones (--duplicates).")
    group.add_argument("--logits", action="store_true", help="Scores are log odds: put them through the sigmoid.")
    group.add_argument("--name_column", metavar="NAME", help="Column of the cases (default: one of the usual names).")
    group.add_argument(
        "--patient_column",
        metavar="NAME",
        help="Column of the patients, in either file (default: patient_id, else from CT-RATE's file names, else every "
        "case is a patient of its own).",
    )


def add_protocol_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("protocol")
    group.add_argument(
        "--protocol",
        choices=("standard", "published"),
        default="standard",
        help="published: --level reconstruction --threshold test_labels --absent zero, each unless given (default: "
        "%(default)s).",
    )
    group.add_argument(
        "--level",
        choices=LEVELS,
        help="scan: the first reconstruction of every scan (default); reconstruction: all, which repeats patients.",
    )
    group.add_argument(
        "--threshold",
        type=_threshold,
        metavar="SOURCE",
        help=f"{', '.join(SOURCES)}, or a number: what decision metrics call present lies above it. test_labels "
        "chooses on the labels that it is judged by, as published, and flatters (default: cross_validation).",
    )
    group.add_argument(
        "--criterion",
        choices=CRITERIA,
        help="What a chosen threshold serves: recall + specificity, the corner of the ROC plane, F1, or the published "
        "choice of 100 (default: youden; published for test_labels).",
    )
    group.add_argument(
        "--absent",
        choices=ABSENT,
        help="A case without a score: excluded and counted (default), or zero, as published.",
    )
    group.add_argument(
        "--duplicates",
        choices=DUPLICATES,
        help="Scans with equal reports (--reports). within_patients: of one patient's only the first counts, for their "
        "labels are one observation; everywhere: only the first of all, also of other patients (of normal reports one "
        "is left). As in eval_fvlm.py (default: keep).",
    )
    group.add_argument(
        "--bootstraps", type=int, metavar="N", help="Resamples of the patients; 0: none (default: 1000)."
    )
    group.add_argument("--folds", type=int, metavar="N", help="Folds of the cross-validation (default: 5).")
    group.add_argument("--seed", type=int, help="Of resamples and folds (default: 0).")


def add_output_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("output")
    group.add_argument("--json", type=Path, metavar="FILE", help="Write everything, unrounded; keys as above.")
    group.add_argument("--quiet", action="store_true", help="Print no table.")


def _threshold(text: str) -> str | float:
    try:
        return float(text)
    except ValueError:
        if text not in SOURCES:
            raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor one of {list(SOURCES)}.") from None
        return text


def protocol_of(args: argparse.Namespace) -> Protocol:
    """The protocol that the options name."""
    given = {
        "level": args.level,
        "threshold": args.threshold,
        "criterion": args.criterion,
        "absent": args.absent,
        "duplicates": args.duplicates,
        "num_bootstraps": args.bootstraps,
        "num_folds": args.folds,
        "seed": args.seed,
    }
    given = {name: value for name, value in given.items() if value is not None}
    if args.protocol == "published":
        given = {"level": "reconstruction", "threshold": "test_labels", "absent": "zero"} | given
    if given.get("duplicates", "keep") != "keep" and args.reports is None:
        raise EvaluationError(
            f"--duplicates {args.duplicates} needs --reports: a CSV that tells which scans have equal reports."
        )
    return Protocol(**given)


def task_of(args: argparse.Namespace) -> Task | None:
    return None if args.task is None else load_task(args.task)


def read_table(args: argparse.Namespace, scores: Path, labels: Path | None, task: Task | None) -> ScoreTable:
    """The table of the options' files."""
    return read_score_table(
        scores,
        labels,
        task,
        logits=args.logits,
        name_column=args.name_column,
        patient_column=args.patient_column,
        reports=args.reports,
    )


def checked_options(args: argparse.Namespace) -> tuple[Protocol, Task | None]:
    """Protocol and task of the options, before any file of scores is read."""
    protocol, task = protocol_of(args), task_of(args)
    if (protocol.threshold == "development") != (args.development_scores is not None):
        raise EvaluationError("--threshold development and --development_scores belong together; give both or neither.")
    if args.json:
        check_can_write(args.json)
    return protocol, task


def run(args: argparse.Namespace) -> int:
    protocol, task = checked_options(args)
    table = read_table(args, args.scores, args.labels, task)
    development = None
    if args.development_scores is not None:
        labels = args.development_labels or args.labels
        development = read_table(args, args.development_scores, labels, task).frame
        development["task"] = table.frame["task"].iloc[0]
    result = with_files(evaluate_frame(table.frame, protocol, development), [table])
    if not args.quiet:
        print_scores(result)
    write_json(result, args.json)
    say_what_is_missing(result)
    return 0


def with_files(result: dict, tables: list[ScoreTable]) -> dict:
    """Add what the files left out: dropped cases, notes on columns, warnings, versions."""
    for table in tables:
        for reason, cases in table.dropped_cases.items():
            known = result["dropped_cases"].get(reason, {"cases": []})["cases"]
            cases = list(dict.fromkeys([*known, *cases]))
            result["dropped_cases"][reason] = {"count": len(cases), "cases": cases}
    notes = [table.notes for table in tables]
    warnings = [
        f"{PARTIAL}: {result['dropped_cases'][reason]['count']} cases: {reason}."
        for reason in (NO_SCORES, NO_LABELS)
        if reason in result["dropped_cases"]
    ]
    unasked = [finding for note in notes for finding in note["findings_without_scores"]]
    if unasked := [finding for finding in dict.fromkeys(unasked) if finding not in result["per_finding"]]:
        warnings.append(f"{PARTIAL}: {len(unasked)} findings of the labels have no scores: {', '.join(unasked)}.")
    if own := max(note["cases_taken_as_patients"] for note in notes):
        warnings.append(
            f"{own} cases name no patient and count as one each; if some are of one patient the intervals are too "
            "narrow: name the column with --patient_column."
        )
    result["warnings"] = [*result["warnings"], *warnings]
    result["files"] = notes[0] if len(notes) == 1 else notes
    result["versions"] = {"python": platform.python_version()}
    result["versions"] |= {name: version(name) for name in ("numpy", "pandas", "scikit-learn", "scipy")}
    return result


def write_json(result: dict, path: Path | None) -> None:
    if path is not None:
        path.write_text(json.dumps(result, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")


def make_console() -> Console:
    console = Console()
    return console if console.is_terminal else Console(width=PIPE_WIDTH)


def number(value: float | None, digits: int = 3) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def interval(entry: dict, digits: int = 3) -> str:
    """A figure with its interval."""
    if entry["low"] is None:
        return number(entry["value"], digits)
    return f"{number(entry['value'], digits)} [{number(entry['low'], digits)}, {number(entry['high'], digits)}]"


def print_scores(result: dict, console: Console | None = None) -> None:
    """The figures as a table, then in words what was counted, left out and chosen."""
    console = console or make_console()
    table = Table(title=f"{result['task']}: {result['num_patients']} patients, {result['num_reconstructions']} volumes")
    table.add_column("finding", overflow="fold")
    for heading in COLUMNS.values():
        table.add_column(heading, justify="right", no_wrap=True)
    for heading in ("pos", "neg", "out"):
        table.add_column(heading, justify="right", no_wrap=True)

    def cells(figures: dict) -> list[str]:
        return [interval(figures["auc"]), *(number(figures[name]["value"]) for name in list(COLUMNS)[1:])]

    unmeasured = []
    for finding, entry in result["per_finding"].items():
        if "reason" in entry:
            unmeasured.append(f"{finding}: not measured, {entry['reason']}")
            continue
        left_out = sum(entry["excluded"].values())
        table.add_row(escape(finding), *cells(entry), str(entry["positives"]), str(entry["negatives"]), str(left_out))
    table.add_section()
    table.add_row(f"macro ({result['num_findings']} findings)", *cells(result["macro"]), style="bold")
    micro = result["micro"]
    table.add_row("micro", *cells(micro), str(micro["positives"]), str(micro["negatives"]), "")
    console.print(table)

    def say(text: str, style: str | None = None) -> None:
        console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)

    for line in unmeasured:
        say(line)
    macro = result["macro"]
    error, equal_mass = (number(macro[name]["value"]) for name in ("ece", "ece_equal_mass"))
    say(f"calibration (macro): ECE {error}, with bins of equal mass {equal_mass}; Brier {interval(macro['brier'])}")
    if result["folds"] is not None:
        folds, by_fold = result["folds"]["num_folds"], result["folds"]["macro"]["auc"]
        say(f"macro AUC over {folds} folds: mean {number(by_fold['mean'])}, deviation {number(by_fold['sd'])}")
    print_protocol(result, say)


def print_protocol(result: dict, say) -> None:
    """What was counted and left out, for `score` and `compare`."""
    words = result["protocol"]["in_words"]
    say(f"counted: {words['level']}; {words['duplicates']}")
    say(f"threshold: {words['threshold']}; F1: {words['f1']}")
    say(f"intervals: {words['intervals']}")
    for reason, count in result["excluded"].items():
        say(f"left out: {count} pairs of case and finding: {reason}")
    for reason, entry in result["dropped_cases"].items():
        shown = ", ".join(entry["cases"][:3]) + (", ..." if entry["count"] > 3 else "")
        say(f"left out: {entry['count']} cases: {reason} ({shown})")
    files = result["files"] if isinstance(result["files"], list) else [result["files"]]
    for run, notes in zip(result.get("runs") or [""], files):
        place = f"{run}, {notes['scores']}" if run else notes["scores"]
        if notes["identical_rows_dropped"]:
            say(f"{place}: {notes['identical_rows_dropped']} identical rows dropped")
        for key in ("columns_ignored", "findings_without_scores", "findings_without_labels"):
            if notes[key]:
                say(f"{place}: {key.replace('_', ' ')}: {', '.join(notes[key])}")
    for warning in result["warnings"]:
        if not warning.startswith(PARTIAL):  # those come at the very end, on stderr
            say(f"WARNING: {warning}", style="yellow")


def say_what_is_missing(result: dict) -> None:
    """On stderr, and with --quiet too: a run that measured a part of what was asked ends with status 0 all the same."""
    for warning in partial_warnings([result]):
        print(f"WARNING: {warning}", file=sys.stderr)
