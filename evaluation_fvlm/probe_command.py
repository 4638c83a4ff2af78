"""Learn findings from frozen embeddings: a linear probe and nearest neighbours, by folds of patients.

Of a run of eval_fvlm.py with --save_embeddings, every finding on the embedding of its organ:
    python -m evaluation_fvlm probe --embeddings runs/eval/embeddings --task synthetic --json probe.json

Every finding of the labels on the embedding of the whole volume:
    python -m evaluation_fvlm probe --embeddings runs/eval/embeddings

No patient is in training and test; how strongly the regression is held back is chosen on a training fold. The AUC is of
the scores of all folds together, with a 95 % interval over patients; "folds" is the mean of the AUCs within each.
Embeddings come from Parquet files: neither a model nor a scan is needed. Research only, not for diagnosis.

--json FILE, keys:
    linear, knn         each as `python -m evaluation_fvlm score --help` lists (macro_auc, per_finding, ...), and
                        auc_within_folds: finding -> mean, sd, values
    strengths           finding -> C of each fold
    reasons             finding -> why it was not probed
    settings            what was learned from, folds, both probes in words
    embeddings          model, data and settings, as embeddings.json has them
"""

import argparse

from rich.markup import escape
from rich.table import Table

from evaluation_fvlm.errors import EvaluationError
from evaluation_fvlm.probes import KINDS, NUM_NEIGHBOURS, STRENGTHS, mean_pooled, probe
from evaluation_fvlm.protocols import Protocol
from evaluation_fvlm.retrieval_command import add_common_arguments, open_embeddings
from evaluation_fvlm.score_command import interval, make_console, number, write_json
from evaluation_fvlm.tasks import available_tasks, load_task


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_common_arguments(parser)
    parser.add_argument(
        "--task",
        help=f"Prompt set that names the findings and their organs: {', '.join(available_tasks())}, or a YAML file "
        "(default: every finding of the labels, on the whole volume).",
    )
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="Probes (default: both).")
    parser.add_argument("--folds", type=int, default=5, metavar="N", help="Folds of patients (default: %(default)s).")
    parser.add_argument(
        "--strengths",
        type=float,
        nargs="+",
        default=list(STRENGTHS),
        metavar="C",
        help="Inverse regularisation to choose from; one is taken as it is (default: "
        f"{' '.join(f'{strength:g}' for strength in STRENGTHS)}).",
    )
    parser.add_argument(
        "--neighbours", type=int, default=NUM_NEIGHBOURS, metavar="K", help="Of knn (default: %(default)s)."
    )
    parser.add_argument(
        "--mean_pooled", action="store_true", help="Probe the organs pooled by the mean of their tokens."
    )


def run(args: argparse.Namespace) -> int:
    task = None if args.task is None else load_task(args.task)
    if args.mean_pooled and task is None:
        raise EvaluationError("--mean_pooled is of organs: name a --task.")
    stored = open_embeddings(args)
    embeddings = mean_pooled(stored.embeddings) if args.mean_pooled else stored.embeddings
    result = probe(
        embeddings,
        task,
        kinds=args.kinds,
        num_folds=args.folds,
        seed=args.seed,
        strengths=args.strengths,
        num_neighbours=args.neighbours,
        protocol=Protocol(level="reconstruction", num_folds=args.folds, seed=args.seed, num_bootstraps=args.bootstraps),
    )
    if args.mean_pooled:
        result["settings"]["features"] += ", mean of its tokens"
    result["embeddings"] = stored.info
    if not args.quiet:
        print_probe(result, args.kinds)
    write_json(result, args.json)
    return 0


def print_probe(result: dict, kinds: list[str]) -> None:
    """A table of the findings, then what was learned from and how."""
    console = make_console()
    first = result[kinds[0]]
    table = Table(title=f"probes: {first['num_patients']} patients, {first['num_reconstructions']} volumes")
    table.add_column("finding", overflow="fold")
    table.add_column("organ", overflow="fold")
    for kind in kinds:
        table.add_column(f"{kind} AUC [95 % interval]", justify="right", no_wrap=True)
        table.add_column("folds", justify="right", no_wrap=True)
    for heading in ("pos", "neg"):
        table.add_column(heading, justify="right", no_wrap=True)
    for finding, entry in first["per_finding"].items():
        if finding in result["reasons"] or "reason" in entry:
            continue
        cells = []
        for kind in kinds:
            within = result[kind]["auc_within_folds"][finding]["mean"]
            cells += [interval(result[kind]["per_finding"][finding]["auc"]), number(within)]
        table.add_row(escape(finding), escape(entry["organ"]), *cells, str(entry["positives"]), str(entry["negatives"]))
    table.add_section()
    macro = [cell for kind in kinds for cell in (interval(result[kind]["macro"]["auc"]), "")]
    table.add_row(f"macro ({first['num_findings']} findings)", "", *macro, "", "", style="bold")
    console.print(table)
    for finding, entry in first["per_finding"].items():
        if reason := result["reasons"].get(finding) or entry.get("reason"):
            console.print(f"{finding}: not measured, {reason}", markup=False, highlight=False, soft_wrap=True)
    for name, words in result["settings"].items():
        console.print(f"{name}: {words}", markup=False, highlight=False, soft_wrap=True)
