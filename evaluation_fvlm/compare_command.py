"""Compare two CSVs of scores on the same cases: differences with 95 % intervals, and DeLong's test per finding.

Two runs on CT-RATE's validation set:
    python -m evaluation_fvlm compare --scores a.csv b.csv --labels valid_predicted_labels.csv --task ct_rate_16

Two runs of eval_fvlm.py, whose scores.csv hold the labels:
    python -m evaluation_fvlm compare --scores runs/a/scores.csv runs/b/scores.csv --task synthetic --json out.json

Differences are second minus first, over the cases that both scored; the others are counted. A bootstrap draws the same
patients for both runs. DeLong's test is on the AUC of one finding, scans of one patient taken together; over many
findings some p lies below 0.05 by chance, so p_holm is beside it. Files and options are those of `score`.

--json FILE, keys (a FIGURE is {value, low, high}):
    macro_auc_difference, macro_f1_difference, ...     number: second minus first, mean over findings
    macro           METRIC -> {a, b, difference: FIGURE and p}; p by bootstrap
    per_finding     finding -> METRIC -> the same; positives, negatives, excluded; delong: {auc_a, auc_b, difference,
                    standard_error, low, high, z, p, p_holm}, null where a class comes from fewer than two patients
    runs            names of a and b
    excluded, dropped_cases, protocol, warnings, files, versions and counts as of `score`
"""

import argparse
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from evaluation_fvlm.protocols import compare_frames
from evaluation_fvlm.score_command import (
    add_file_arguments,
    add_output_arguments,
    add_protocol_arguments,
    checked_options,
    interval,
    make_console,
    number,
    print_protocol,
    read_table,
    say_what_is_missing,
    with_files,
    write_json,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    files = parser.add_argument_group("files")
    files.add_argument("--scores", type=Path, nargs=2, required=True, metavar="CSV", help="Scores of the two runs.")
    files.add_argument("--names", nargs=2, metavar="NAME", help="What to call them (default: a and b).")
    add_file_arguments(files)
    files.add_argument(
        "--development_scores", type=Path, nargs=2, metavar="CSV", help="Of both runs, for --threshold development."
    )
    files.add_argument("--development_labels", type=Path, metavar="CSV", help="Of these scores (default: --labels).")
    add_protocol_arguments(parser)
    add_output_arguments(parser)


def run(args: argparse.Namespace) -> int:
    protocol, task = checked_options(args)
    tables = [read_table(args, scores, args.labels, task) for scores in args.scores]
    development = ()
    if args.development_scores is not None:
        labels = args.development_labels or args.labels
        development = [read_table(args, scores, labels, task).frame for scores in args.development_scores]
    result = compare_frames(*(table.frame for table in tables), protocol, development)
    result = with_files({"runs": list(args.names or ("a", "b"))} | result, tables)
    if not args.quiet:
        print_comparison(result)
    write_json(result, args.json)
    say_what_is_missing(result)
    return 0


def print_comparison(result: dict, console: Console | None = None) -> None:
    """AUC of both runs per finding, their difference and its tests; then the macro figures."""
    console = console or make_console()
    a, b = result["runs"]
    table = Table(title=f"AUC, {result['num_patients']} patients, {result['num_reconstructions']} volumes")
    table.add_column("finding", overflow="fold")
    for heading in (a, b, f"{b} - {a} [95 % interval]", "DeLong p", "p (Holm)"):
        table.add_column(heading, justify="right", no_wrap=True)
    unmeasured = []
    for finding, entry in result["per_finding"].items():
        if "reason" in entry:
            unmeasured.append(f"{finding}: not measured, {entry['reason']}")
            continue
        auc, test = entry["auc"], entry["delong"] or {"p": None, "p_holm": None}
        table.add_row(escape(finding), *_cells(auc), _p(test["p"]), _p(test["p_holm"]))
    console.print(table)
    macro = Table(title="macro, p by bootstrap")
    macro.add_column("metric")
    for heading in (a, b, f"{b} - {a} [95 % interval]", "p"):
        macro.add_column(heading, justify="right", no_wrap=True)
    for name, entry in result["macro"].items():
        macro.add_row(name.replace("_", " "), *_cells(entry), _p(entry["difference"]["p"]))
    console.print(macro)

    def say(text: str, style: str | None = None) -> None:
        console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)

    for line in unmeasured:
        say(line)
    print_protocol(result, say)


def _cells(entry: dict) -> list[str]:
    return [number(entry["a"]), number(entry["b"]), interval(entry["difference"])]


def _p(value: float | None) -> str:
    return "-" if value is None else "<0.001" if value < 0.001 else f"{value:.3f}"
