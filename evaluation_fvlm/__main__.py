"""Evaluate scores and embeddings that are there already, and look at runs, attention and cards.

Anybody's scores, a CSV with a column per finding, by a stated protocol with 95 % intervals:
    python -m evaluation_fvlm score --scores res.csv --labels labels.csv --task ct_rate_16 --json out.json

The same by the published protocol, its faults named:
    python -m evaluation_fvlm score --scores res.csv --labels labels.csv --protocol published

Two runs on the same cases, with DeLong's test:
    python -m evaluation_fvlm compare --scores a.csv b.csv --labels labels.csv

A model's scores on a processed split come from `python eval_fvlm.py`. Each command tells its options with --help.
Research only, not for diagnosis.
"""

import argparse
import importlib
import sys

from evaluation_fvlm.errors import EvaluationError

# name -> (module with add_arguments and run, one line). A module is imported only for its own command.
COMMANDS = {
    "score": ("score_command", "a CSV of scores and one of labels -> figures with intervals, calibration, thresholds"),
    "compare": ("compare_command", "two CSVs of scores on the same cases -> differences, DeLong's test, bootstrap"),
    "retrieval": ("retrieval_command", "embeddings -> report to volume and back, R@k, median rank, MRR, chance beside"),
    "probe": ("probe_command", "embeddings and labels -> linear probe and nearest neighbours"),
    "diagnostics": (
        "diagnostics_command",
        "embeddings -> alignment, uniformity, effective rank, modality gap, text collapse",
    ),
    "attention": ("attention", "a model and a scan -> where every organ's query looks, as NIfTI and pictures"),
    "lesion_attention": (
        "lesion_attention",
        "a model and lesion masks -> share of the attention that is in the lesion",
    ),
    "report": ("html_report", "a folder of results -> one page to look at, without a network"),
    "card": ("model_index", "results -> the model-index and text of a model's card"),
}


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(
        prog="python -m evaluation_fvlm", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    chosen = next((word for word in argv if word in COMMANDS), None)
    modules = {}
    for name, (module_name, line) in COMMANDS.items():
        if name != chosen:
            commands.add_parser(name, help=line)
            continue
        module = modules[name] = importlib.import_module(f"evaluation_fvlm.{module_name}")
        command = commands.add_parser(
            name, help=line, description=module.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        module.add_arguments(command)
    args = parser.parse_args(argv)
    try:
        return modules[args.command].run(args)
    except EvaluationError as error:  # what a user can mend: the message says how, a traceback would hide it
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
