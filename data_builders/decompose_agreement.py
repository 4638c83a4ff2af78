"""Agreement of two splits of the same reports: Cohen's kappa over the cells of sentences and organs.

Rules against a language model, or two readers:
    python -m data_builders decompose-agree --first rules.json --second llm.json --json out/agreement.json

(1) The texts of a report (of whichever side carries them) are cut into sentences; without texts the sentences of both
    sides are taken. Each sentence makes one cell with each organ of the set.
(2) A side says yes to a cell if sentences that it gives to the organ hold at least half of the cell's words, compared
    as in `decompose-score`.
(3) kappa = (observed - expected) / (1 - expected), where `observed` is the share of equal cells and `expected` what two
    sides would share that say yes as often as these, independent of each other. Over all cells at once, and per organ.
    None where both sides say yes (or no) everywhere: nothing can be told then.
(4) `abnormal_kappa`: the same over the flags of the organs of which both sides have a sentence.
"""

import argparse
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from .cases import counted
from .decompose import split_sentences
from .decompose_score import content_of, places_in, rounded, stands_in, words_of
from .decomposition_files import SECTIONS, organs_of, read_decompositions, sentences_of
from .shards import write_text
from .summary import console


def kappa_of(cells: Counter) -> dict:
    """Cohen's kappa of a table {(first, second): count} of booleans (step 3)."""
    total = cells.total()
    yes = [sum(count for cell, count in cells.items() if cell[side]) for side in (0, 1)]
    if not total:
        return {"kappa": None, "observed": None, "cells": 0, "first": 0, "second": 0, "both": 0}
    observed = (cells[True, True] + cells[False, False]) / total
    expected = (yes[0] * yes[1] + (total - yes[0]) * (total - yes[1])) / total**2
    kappa = (observed - expected) / (1 - expected) if expected < 1 else None
    both = cells[True, True]
    return {"kappa": kappa, "observed": observed, "cells": total, "first": yes[0], "second": yes[1], "both": both}


def agreement(first: Sequence[Mapping], second: Sequence[Mapping], organs: Sequence[str]) -> dict:
    """Compare two splits of the same reports, entry by entry of the same id.

    Returns:
        `kappa`, `observed` and counts of the cells, `abnormal_kappa`, and `per_organ` the same of each organ.
    """
    entry_of = {entry["id"]: entry for entry in second}
    cells: dict[str, Counter] = {organ: Counter() for organ in organs}
    flags: Counter = Counter()
    num_reports = 0
    for one in first:
        other = entry_of.get(one["id"])
        if other is None:
            continue
        num_reports += 1
        for section in SECTIONS:
            text = one.get(section) or other.get(section) or ""
            sentences = split_sentences(text) if text else said_by_either(one, other, section, organs)
            of_side = [yes_by_organ(side, section, text, sentences, organs) for side in (one, other)]
            for organ in organs:
                yes_of = [side[organ] for side in of_side]
                cells[organ].update((place in yes_of[0], place in yes_of[1]) for place in range(len(sentences)))
        for organ in organs:
            if all(any(sentences_of(side, section, organ) for section in SECTIONS) for side in (one, other)):
                flags[one["organs"][organ]["abnormal"], other["organs"][organ]["abnormal"]] += 1
    flag_kappa = kappa_of(flags)
    return rounded(
        {
            **kappa_of(sum(cells.values(), Counter())),
            "abnormal_kappa": flag_kappa["kappa"],
            "abnormal_observed": flag_kappa["observed"],
            "num_flags": flag_kappa["cells"],
            "num_reports": num_reports,
            "per_organ": {organ: kappa_of(counts) for organ, counts in cells.items()},
        }
    )


def said_by_either(one: Mapping, other: Mapping, section: str, organs: Sequence[str]) -> list[str]:
    """The different sentences that a section has on either side."""
    said = [sentence for side in (one, other) for organ in organs for sentence in sentences_of(side, section, organ)]
    return list({content_of(sentence): sentence for sentence in said}.values())


def yes_by_organ(
    entry: Mapping, section: str, text: str, sentences: Sequence[str], organs: Sequence[str]
) -> dict[str, frozenset[int]]:
    """For every organ the places of the sentences that the entry gives to it (step 2)."""
    contents = [content_of(sentence) for sentence in sentences]
    result = {}
    for organ in organs:
        said = sentences_of(entry, section, organ)
        equal = set(map(content_of, said))
        yes = {place for place, content in enumerate(contents) if content in equal}
        if len(equal) > len(equal.intersection(contents)):  # cut differently
            words = {word for sentence in said for one in places_in(text, words_of(sentence)) for word in one}
            yes |= {
                place
                for place, sentence in enumerate(sentences)
                if stands_in(places_in(text, words_of(sentence)), words)
            }
        result[organ] = frozenset(yes)
    return result


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--first", type=Path, required=True, metavar="FILE", help="a split: JSON, JSON lines or a folder")
    add("--second", type=Path, required=True, metavar="FILE", help="another of the same reports")
    add("--json", type=Path, required=True, metavar="OUT", help="where the figures are written")
    help_text = "organ set of both; default: the smallest of ours that holds all their organs"
    add("--organs", metavar="SET|FILE", help=help_text)


def run(args: argparse.Namespace) -> int:
    first, second = read_decompositions(args.first), read_decompositions(args.second)
    set_name, organs = organs_of([*first, *second], args.organs)
    ids = [{entry["id"] for entry in side} for side in (first, second)]
    common = ids[0] & ids[1]
    if not common:
        raise ValueError(
            f"{args.first} and {args.second} have no id in common: {sorted(ids[0])[:3]}, {sorted(ids[1])[:3]}."
        )
    result = {"first": str(args.first), "second": str(args.second), "organ_set": set_name}
    result |= agreement(first, second, organs)
    result |= {"only_in_first": sorted(ids[0] - common), "only_in_second": sorted(ids[1] - common)}
    write_text(args.json, json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    told = {
        name: "-" if result[name] is None else f"{result[name]:.4f}" for name in ("kappa", "observed", "abnormal_kappa")
    }
    console.print(
        f"{counted(len(common), 'report')}, organ set {set_name}: kappa {told['kappa']} over {result['cells']:,} cells "
        f"({told['observed']} equal); of the abnormal flags {told['abnormal_kappa']} over {result['num_flags']:,}",
        markup=False, highlight=False, soft_wrap=True,
    )  # fmt: skip
    return 0
