"""Describe saved embeddings: alignment, uniformity, effective rank, modality gap, text collapse, the two poolings.

Of a run of eval_fvlm.py with --save_embeddings:
    python -m evaluation_fvlm diagnostics --embeddings runs/eval/embeddings --json diagnostics.json

With the AUCs of attention pooling and of mean pooling on the same frozen tokens, for the findings of a prompt set:
    python -m evaluation_fvlm diagnostics --embeddings runs/eval/embeddings --task synthetic

alignment is the mean squared distance of a pair (2: pairs have nothing to do with each other), uniformity the log mean
of exp(-2 d^2) over points at distance d (0: all at one point), effective rank the number of directions in use, gap the
distance of the mean image from the mean text. Different texts with a mean cosine near 1 have collapsed: nothing can be
learned from them. Research only, not for diagnosis.

--json FILE, keys (each a number, or null where there are too few points):
    global          of whole volumes and reports, or null; volume_embeds: how volumes were pooled
    per_organ       organ -> num_scans, num_pairs, num_texts, alignment, modality_gap, image_uniformity,
                    text_uniformity, image_effective_rank, text_effective_rank (each also ..._centred), image_cosine,
                    text_cosine, text_cosine_distinct
    macro           means over the organs
    pooling         with --task: zero_shot, linear_probe -> macro and per_finding: AUCs `attention` and `mean`, and
                    difference {value, low, high, p}; else null
    settings        what was drawn, how many texts were longer than the encoder reads
    embeddings      model, data and settings, as embeddings.json has them
"""

import argparse

from rich.markup import escape
from rich.table import Table

from evaluation_fvlm.diagnostics import MAX_POINTS, diagnose
from evaluation_fvlm.errors import EvaluationError
from evaluation_fvlm.retrieval_command import add_common_arguments, open_embeddings
from evaluation_fvlm.score_command import interval, make_console, number, write_json
from evaluation_fvlm.tasks import available_tasks, load_task

COLUMNS = {
    "alignment": "alignment",
    "image_uniformity": "unif. image",
    "text_uniformity": "text",
    "image_effective_rank": "rank image",
    "text_effective_rank": "text",
    "modality_gap": "gap",
    "text_cosine": "text cosine",
}
POOLINGS = {"zero_shot": "zero-shot", "linear_probe": "linear probe"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_common_arguments(parser)
    parser.add_argument(
        "--task",
        help=f"Prompt set by whose findings the two poolings are compared: {', '.join(available_tasks())}, or a YAML "
        "file (default: they are not).",
    )
    parser.add_argument("--no_probe", action="store_true", help="Compare them zero-shot alone.")
    parser.add_argument(
        "--max_points",
        type=int,
        default=MAX_POINTS,
        metavar="N",
        help="Uniformity looks at every pair of so many scans or texts, drawn with the seed (default: %(default)s).",
    )


def run(args: argparse.Namespace) -> int:
    if args.max_points < 2:
        raise EvaluationError(f"--max_points {args.max_points} must be at least 2.")
    task = None if args.task is None else load_task(args.task)
    stored = open_embeddings(args)
    if task is not None and stored.embeddings.mean_pooled_embeds is None:
        raise EvaluationError(
            f"--task {args.task} compares two poolings, but {args.embeddings} holds one: embed the split with both."
        )
    result = diagnose(
        stored,
        task=task,
        max_points=args.max_points,
        num_bootstraps=args.bootstraps,
        seed=args.seed,
        with_probe=not args.no_probe,
    )
    result["embeddings"] = stored.info
    if not args.quiet:
        print_diagnostics(result)
    write_json(result, args.json)
    return 0


def print_diagnostics(result: dict) -> None:
    """A table of the parts, and one of the poolings."""
    console = make_console()
    table = Table(title="embeddings: images and their texts")
    table.add_column("part", overflow="fold")
    for heading in ("scans", "texts", *COLUMNS.values()):
        table.add_column(heading, justify="right", no_wrap=True)
    parts = ({} if result["global"] is None else {"whole volume": result["global"]}) | result["per_organ"]
    for name, figures in parts.items():
        cells = [_figure(figures, column) for column in COLUMNS]
        table.add_row(escape(name), str(figures["num_scans"]), str(figures["num_texts"]), *cells)
    table.add_section()
    table.add_row("mean of organs", "", "", *(_figure(result["macro"], column) for column in COLUMNS), style="bold")
    console.print(table)

    def say(text: str) -> None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    if result["global"] is not None:
        say(f"whole volume: {result['global']['volume_embeds']}")
    say(f"uniformity: {result['settings']['uniformity']}")
    for kind in ("captions", "reports"):
        if count := result["settings"][f"num_cut_{kind}"]:
            say(f"{count} {kind} are longer than the text encoder reads: their ends are not embedded")
    for name, words in POOLINGS.items() if result["pooling"] is not None else ():
        compared = result["pooling"][name]
        if compared is None:
            if reason := result["pooling"].get(f"{name}_reason"):
                say(f"{words}: not compared, {reason}")
            continue
        table = Table(title=f"AUC on the same frozen tokens, {words}")
        table.add_column("finding", overflow="fold")
        for heading in ("attention", "mean", "mean - attention"):
            table.add_column(heading, justify="right", no_wrap=True)
        for finding, entry in {**compared["per_finding"], "macro": compared["macro"]}.items():
            cells = (number(entry["attention"]), number(entry["mean"]), interval(entry["difference"]))
            table.add_row(escape(finding), *cells, style="bold" if finding == "macro" else None)
        console.print(table)


def _figure(figures: dict, name: str) -> str:
    return number(figures.get(name), 1 if "rank" in name else 3)
