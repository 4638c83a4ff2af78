"""Search with saved embeddings: does a report find its volume, a volume its report, an organ its own sentences?

Of a run of eval_fvlm.py with --save_embeddings:
    python -m evaluation_fvlm retrieval --embeddings runs/eval/embeddings --json retrieval.json

Only organs that the scan does not cut; and for three scans what was found, to look at:
    python -m evaluation_fvlm retrieval --embeddings runs/eval/embeddings --only_complete --examples 3

Two pools: "whole", all pairs of volume and text, and "deduplicated", where of equal texts the first pair is kept. The
rank is that of the first candidate with the query's text; ties count as in random order. The figure in brackets is
chance: the same for candidates in random order, exactly. Research only, not for diagnosis.

--json FILE, keys (a FIGURE is {value, low, high, chance}; low and high bound the 95 % interval, or are null):
    global          volume_embeds (how volumes were pooled), num_pairs, num_texts, excluded, pools; or null
    per_organ       organ -> num_pairs, num_texts, excluded, pools
                    pools: whole, deduplicated -> num_candidates and report_to_volume, volume_to_report ->
                    num_queries, recall (1, 5, 10, 50, 100 -> FIGURE), median_rank FIGURE, mrr FIGURE;
                    null with a `reason` where there are fewer than two texts
    macro           report_to_volume, volume_to_report -> recall@K, mrr -> {value, chance}: means over organs of the
                    deduplicated pool; num_organs
    examples        with --examples: scan, text, rank and the nearest texts
    convention      what is counted as correct, how ties, chance and intervals come about
    embeddings      model, data and settings, as embeddings.json has them
"""

import argparse
from pathlib import Path
from textwrap import shorten

import numpy as np
from rich.markup import escape
from rich.table import Table

from evaluation_fvlm.embedding_files import StoredEmbeddings, load_embeddings
from evaluation_fvlm.errors import EvaluationError
from evaluation_fvlm.published_metrics import check_can_write
from evaluation_fvlm.retrieval import DIRECTIONS, POOLS, RECALL_AT, nearest_texts, retrieve
from evaluation_fvlm.score_command import make_console, write_json

EXCERPT = 200  # characters of a report in the terminal
WORDS = {"report_to_volume": "text -> volume", "volume_to_report": "volume -> text"}


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """What the commands on saved embeddings share."""
    parser.add_argument(
        "--embeddings",
        type=Path,
        required=True,
        metavar="DIR",
        help="Folder that eval_fvlm.py --save_embeddings wrote: scans.parquet, texts.parquet, embeddings.json.",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="Write everything, unrounded; keys as above.")
    parser.add_argument(
        "--bootstraps", type=int, default=1000, metavar="N", help="Resamples of the patients; 0: none (default: 1000)."
    )
    parser.add_argument("--seed", type=int, default=0, help="Of whatever is drawn (default: 0).")
    parser.add_argument("--quiet", action="store_true", help="Print no table.")


def open_embeddings(args: argparse.Namespace) -> StoredEmbeddings:
    """The folder of the options, read and checked; a file that cannot be written is told of before."""
    for name in ("bootstraps", "seed"):
        if getattr(args, name) < 0:
            raise EvaluationError(f"--{name} {getattr(args, name)} must be 0 or more.")
    if args.json:
        check_can_write(args.json)
    return load_embeddings(args.embeddings)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_common_arguments(parser)
    parser.add_argument("--only_complete", action="store_true", help="Leave out organs that the scan cuts.")
    parser.add_argument(
        "--examples", type=int, default=0, metavar="N", help="Show the nearest reports of N scans, evenly spread."
    )


def run(args: argparse.Namespace) -> int:
    stored = open_embeddings(args)
    if stored.texts is None:
        raise EvaluationError(f"{args.embeddings} holds no texts: embed a split that has captions or reports.")
    result = retrieve(
        stored.embeddings,
        stored.texts,
        num_bootstraps=args.bootstraps,
        seed=args.seed,
        only_complete=args.only_complete,
    )
    if args.examples:
        result["examples"] = _examples(stored, args.examples)
    result["embeddings"] = stored.info
    if not args.quiet:
        print_retrieval(result)
    write_json(result, args.json)
    return 0


def _examples(stored: StoredEmbeddings, count: int) -> list[dict]:
    if stored.embeddings.volume_embeds is None:
        raise EvaluationError("--examples: whole volumes were not embedded.")
    if not stored.info["texts_are_kept"]:
        raise EvaluationError(
            "--examples: the texts were not kept, only their embeddings. Save them again with `eval_fvlm.py "
            "--save_embeddings --show_text`."
        )
    has_report = np.flatnonzero((stored.texts.report_index >= 0) & stored.embeddings.volume_embeds.any(axis=1))
    places = np.unique(np.linspace(0, len(has_report) - 1, min(count, len(has_report))).round().astype(int))
    return nearest_texts(stored.embeddings, stored.texts, has_report[places].tolist())


def print_retrieval(result: dict) -> None:
    """A table for each direction: whole volumes among all pairs too, everything among different texts."""
    console = make_console()
    parts = {} if result["global"] is None else {"volume": result["global"]}
    parts |= result["per_organ"]
    for direction in DIRECTIONS:
        table = Table(title=f"{WORDS[direction]}: per cent found among the first k (by chance), different texts")
        table.add_column("part", overflow="fold")
        table.add_column("of", justify="right", no_wrap=True)
        for k in RECALL_AT:
            table.add_column(f"R@{k}", justify="right", no_wrap=True)
        table.add_column("median", justify="right", no_wrap=True)
        table.add_column("MRR", justify="right", no_wrap=True)
        for name, figures in parts.items():
            for pool in POOLS if name == "volume" else POOLS[1:]:
                if figures["pools"] is None:
                    continue
                of_pool = figures["pools"][pool]
                entry = of_pool[direction]
                cells = [_with_chance(entry["recall"][str(k)], 100) for k in RECALL_AT]
                cells += [_with_chance(entry["median_rank"]), _with_chance(entry["mrr"])]
                part = f"{name}, all pairs" if pool == "whole" else name
                table.add_row(escape(part), str(of_pool["num_candidates"]), *cells)
        if table.row_count:
            console.print(table)

    def say(text: str) -> None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    for name, figures in parts.items():
        if figures["pools"] is None:
            say(f"{name}: not measured, {figures['reason']}")
        for reason, count in figures["excluded"].items():
            say(f"{name}: {count} scans left out: {reason}")
    if result["global"] is None:
        say("volume: not embedded")
    else:
        say(f"volume: {result['global']['volume_embeds']}")
    for name, words in result["convention"].items():
        say(f"{name}: {words}")
    for example in result.get("examples", ()):
        say(f"\n{example['recon_id']}, rank {example['rank']} of its own report: {shorten(example['text'], EXCERPT)}")
        for entry in example["nearest"]:
            say(f"    {entry['cosine']:.3f} {'own: ' if entry['is_own'] else ''}{shorten(entry['text'], EXCERPT)}")


def _with_chance(figure: dict, factor: int = 1) -> str:
    """Three digits of either."""
    return f"{factor * figure['value']:.3g} ({factor * figure['chance']:.3g})"
