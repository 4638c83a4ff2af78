"""Put the results of an evaluation into a model's card: the header's `model-index`, and a section of the text.

    python -m evaluation_fvlm card --results runs/demo/eval --model runs/demo/model

--results is a folder that eval_fvlm.py wrote (metrics.json, and retrieval.json where it is), or one JSON file: a
metrics.json, or what `python -m evaluation_fvlm score --json` wrote. The latter names no data: say --dataset.

The header gets the macro figures of every prompt set and the AUC of every finding, each named with its prompt set, how
thresholds were chosen where any were, and its 95 % interval. The text gets a table of the same, with counts, what was
left out, the protocol and its warnings. What stands in the card already stays, except for results of the same prompt
set on the same data, split and revision: these are replaced. The card is written whole or not at all.

Nothing is sent anywhere: `python -m training_fvlm.push MODEL --repo owner/name` uploads the folder.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml
from huggingface_hub import EvalResult, ModelCard

from evaluation_fvlm.errors import EvaluationError
from evaluation_fvlm.places import entry_name, weights_digest

CARD = "README.md"
TASK = "zero-shot-image-classification"
RETRIEVAL = "retrieval"
# name in the results -> (metric id of the Hub, what it is called)
RANKING = {"auc": ("roc_auc", "AUC"), "average_precision": ("average_precision", "average precision")}
DECISIONS = {
    "f1": ("f1", "F1 of the finding"),
    "weighted_f1": ("f1", "F1 weighted over both classes"),
    "balanced_accuracy": ("balanced_accuracy", "balanced accuracy"),
}
THRESHOLDS = {
    "cross_validation": "thresholds by cross-validation",
    "development": "thresholds from a development split",
    "test_labels": "thresholds on the test labels",
}
DIRECTIONS = {"report_to_volume": "report to volume", "volume_to_report": "volume to report"}
SECTION = "## Evaluation"
DIGITS = 4


@dataclass(frozen=True)
class Data:
    """What was evaluated on, as the card names it.

    Attributes:
        name: Id on the Hub, or the name of a folder without the path to it.
        split: Name of the split, if there is one.
        revision: Commit, tag or branch, if the data are on the Hub.
    """

    name: str
    split: str | None = None
    revision: str | None = None

    @property
    def described(self) -> str:
        split = "" if self.split is None else f", split {self.split}"
        return f"{self.name}{split}" + ("" if self.revision is None else f", revision {self.revision}")


def data_of(results: Mapping) -> Data | None:
    """The data that the protocol of a metrics.json names; None where it names none."""
    data = (results.get("protocol") or {}).get("data")
    if not isinstance(data, Mapping):
        return None
    return Data(entry_name(data), data.get("split"), data.get("revision"))


def evaluations_of(results: Mapping) -> dict[str, Mapping]:
    """Prompt set -> figures of `protocols.evaluate_frame`, of a metrics.json or of what it returns itself.

    A metrics.json of a run without `evaluation` has figures without intervals.
    """
    summaries = {str(results["task"]): results} | dict(results.get("other_tasks") or {})
    return {name: summary.get("evaluation") or summary for name, summary in summaries.items()}


def eval_results(results: Mapping, data: Data, retrieval: Mapping | None = None) -> list[EvalResult]:
    """The results as the header has them.

    Args:
        results: Content of metrics.json, or what `protocols.evaluate_frame` returns.
        data: What they were measured on.
        retrieval: What `retrieval.retrieve` returns.
    """
    entries: list[tuple[str, str, float | None]] = []  # metric id, name, value
    for task, evaluation in evaluations_of(results).items():
        threshold = _threshold(evaluation)
        for name, (kind, words) in RANKING.items():
            entries.append((kind, f"{task}: macro {words}, zero-shot", _macro(evaluation, name)))
        for name, (kind, words) in DECISIONS.items():
            figure = _macro(evaluation, name)
            entries.append((kind, f"{task}: macro {words}, zero-shot, {threshold}", figure))
        for finding, entry in evaluation["per_finding"].items():
            entries.append(("roc_auc", f"{task}: {finding}, AUC, zero-shot", _figure(entry.get("auc"))))
    for name, figure in _retrieval_figures(retrieval):
        entries.append((name.split(",")[0].replace("@", "_at_"), f"{RETRIEVAL}: {name}", figure))
    return [
        EvalResult(
            task_type=TASK,
            dataset_type=data.name,
            dataset_name=data.name,
            dataset_split=data.split,
            dataset_revision=data.revision,
            metric_type=kind,
            metric_name=name + _interval_words(figure),
            metric_value=round(figure["value"], DIGITS),
        )
        for kind, name, figure in entries
        if _is_known(figure)
    ]


def section_blocks(results: Mapping, data: Data, retrieval: Mapping | None = None) -> dict[str, list[str]]:
    """The results as the text has them: lines of Markdown by prompt set, and `retrieval`."""
    protocol = results.get("protocol") or {}
    versions = {task["name"]: task["version"] for task in protocol.get("tasks") or () if isinstance(task, Mapping)}
    blocks = {}
    for task, evaluation in evaluations_of(results).items():
        version = f", version {versions[task]}" if task in versions else ""
        rows = [
            (words.capitalize() if words.islower() else words, *_cells(_macro(evaluation, name)))
            for name, (_, words) in {**RANKING, **DECISIONS}.items()
            if _is_known(_macro(evaluation, name))
        ]
        lines = [
            f"### Zero-shot, prompt set {_cell(task)}{version}, on {_cell(data.described)}",
            "",
            f"{evaluation['num_findings']} of {evaluation['num_findings_asked']} findings measured, "
            f"{evaluation['num_patients']:,} patients, {evaluation['num_reconstructions']:,} volumes. The first table "
            "holds means over findings.",
            "",
            *_table(("figure", "value", "95 % interval"), rows),
            "",
            *_table(
                ("finding", "organ", "AUC", "95 % interval", "with", "without", "left out"),
                [
                    (
                        finding,
                        entry["organ"],
                        *_cells(_figure(entry.get("auc"))),
                        str(entry["positives"]),
                        str(entry["negatives"]),
                        str(sum(entry["excluded"].values())),
                    )
                    for finding, entry in evaluation["per_finding"].items()
                ],
            ),
            "",
            *_protocol_lines(evaluation),
        ]
        blocks[task] = lines
    rows = [(name, *_cells(figure), _number(figure.get("chance"))) for name, figure in _retrieval_figures(retrieval)]
    if rows:
        blocks[RETRIEVAL] = [
            f"### Retrieval on {_cell(data.described)}",
            "",
            "Of equal texts the first pair is kept; chance is that of candidates in random order.",
            "",
            *_table(("figure", "value", "95 % interval", "chance"), rows),
        ]
    return blocks


def write_model_index(
    folder: Path | str, results: Mapping, data: Data | None = None, retrieval: Mapping | None = None
) -> Path:
    """Put results into the card of a model's folder, in place of earlier ones of the same prompt set and data.

    Args:
        folder: Of the model; a card is made if there is none.
        results, retrieval: As for `eval_results`.
        data: What they were measured on; None: what the protocol of the results names.

    Returns:
        The card's path.

    Raises:
        EvaluationError: If the data have no name, the results are of a part of the split or hold no figure, or the
            card's header cannot be read.
    """
    path = Path(folder) / CARD
    limit = (results.get("protocol") or {}).get("limit")
    if limit is not None:
        raise EvaluationError(
            f"these are results of the first {limit} cases alone (--limit): in the card they would take the place of "
            "those of the whole split. Evaluate it without --limit."
        )
    data = data or data_of(results)
    if data is None:
        raise EvaluationError("the results do not say what they were measured on; name it with --dataset.")
    measured = eval_results(results, data, retrieval)
    if not measured:
        raise EvaluationError("the results hold no figure: no finding was measured.")
    card = _read_card(path)
    blocks = section_blocks(results, data, retrieval)
    kept = [old for old in card.data.eval_results or () if not _is_replaced(old, measured[0], blocks)]
    title = re.search(r"^# (.+?)\s*$", card.text, flags=re.MULTILINE)
    card.data.model_name = card.data.model_name or (title[1] if title else path.resolve().parent.name)
    card.data.eval_results = kept + measured
    for name, lines in blocks.items():
        card.text = _with_block(card.text, f"{name} on {data.described}", lines)
    content = str(card)
    _check(content, kept + measured)
    unfinished = path.with_name(path.name + ".part")
    with open(unfinished, "w", encoding="utf-8", newline="") as file:
        file.write(content)
    os.replace(unfinished, path)
    return path


def _read_card(path: Path) -> ModelCard:
    if not path.parent.is_dir():
        raise EvaluationError(f"{path.parent} is no folder: give the one that holds the model.")
    if not path.is_file():
        return ModelCard(f"---\npipeline_tag: {TASK}\n---\n\n# {path.resolve().parent.name}\n")
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            return ModelCard(file.read())
    except (ValueError, KeyError, TypeError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise EvaluationError(
            f"{path}: the header cannot be read ({error}). Mend it, or remove its model-index."
        ) from error


def _is_replaced(old: EvalResult, new: EvalResult, blocks: Mapping[str, Sequence[str]]) -> bool:
    """Whether an entry of the card is of a prompt set and of data that are measured anew."""
    return old.unique_identifier == new.unique_identifier and any(
        str(old.metric_name).startswith(f"{name}: ") for name in blocks
    )


def _check(content: str, expected: Sequence[EvalResult]) -> None:
    """Read the card back as the Hub will; the figures that come must be those that went in."""

    def figures(entries: Sequence[EvalResult]) -> list[str]:
        # Not the pretty names: entries of one task and data share those of the first.
        return sorted(repr((e.unique_identifier, e.metric_type, e.metric_name, e.metric_value)) for e in entries)

    assert figures(ModelCard(content).data.eval_results) == figures(expected), "the card does not say what it was given"


# Figures


def _figure(entry: Mapping | float | None) -> Mapping:
    """{value, low, high} of a figure, or of a plain number without interval."""
    return entry if isinstance(entry, Mapping) else {"value": entry, "low": None, "high": None}


def _macro(evaluation: Mapping, name: str) -> Mapping:
    macro = evaluation.get("macro")
    return _figure(macro.get(name) if macro else evaluation.get(f"macro_{name}"))


def _is_known(figure: Mapping) -> bool:
    return figure.get("value") is not None and math.isfinite(figure["value"])


def _threshold(evaluation: Mapping) -> str:
    source = (evaluation.get("protocol") or {}).get("threshold")
    return THRESHOLDS.get(source, f"threshold {source}")


def _retrieval_figures(retrieval: Mapping | None) -> list[tuple[str, Mapping]]:
    """(name, figure) of the means over organs, and of whole volumes and reports, in the deduplicated pool."""
    if not retrieval:
        return []
    figures = []
    pools = (retrieval.get("global") or {}).get("pools")
    for direction, words in DIRECTIONS.items():
        if pools:
            found = pools["deduplicated"][direction]
            named = {f"recall@{k}": figure for k, figure in found["recall"].items()} | {"mrr": found["mrr"]}
            figures += [(f"{name}, {words}, whole volumes", figure) for name, figure in named.items()]
        for name, figure in ((retrieval.get("macro") or {}).get(direction) or {}).items():
            figures.append((f"{name}, {words}, mean over organs", _figure(figure)))
    return [(name, figure) for name, figure in figures if _is_known(figure)]


def _interval_words(figure: Mapping) -> str:
    words = []
    if figure.get("low") is not None:
        words.append(f"95 % interval {_number(figure['low'])} to {_number(figure['high'])}")
    if figure.get("chance") is not None:
        words.append(f"chance {_number(figure['chance'])}")
    return f" ({'; '.join(words)})" if words else ""


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _cells(figure: Mapping) -> tuple[str, str]:
    if not _is_known(figure):
        return "not measured", "-"
    interval = "-" if figure.get("low") is None else f"{_number(figure['low'])} to {_number(figure['high'])}"
    return _number(figure["value"]), interval


# Text


def _cell(text: str) -> str:
    """A text from outside, as a cell or heading takes it."""
    return " ".join(str(text).replace("|", "\\|").replace("<", "&lt;").split())


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [header, ["---"] * len(header), *([_cell(cell) for cell in row] for row in rows)]
    return ["| " + " | ".join(line) + " |" for line in lines]


def _protocol_lines(evaluation: Mapping) -> list[str]:
    """How the figures came about, what was left out, and what keeps them from being what they seem."""
    words = (evaluation.get("protocol") or {}).get("in_words") or {}
    lines = [
        f"- {title}: {_cell(words[key])}"
        for key, title in (
            ("level", "counted"),
            ("duplicates", "equal reports"),
            ("absent_organs", "absent organs"),
            ("threshold", "threshold"),
            ("intervals", "intervals"),
        )
        if key in words
    ]
    lines += [f"- left out: {count:,} pairs of case and finding, {_cell(reason)}"
              for reason, count in evaluation["excluded"].items()]  # fmt: skip
    lines += [f"- left out: {entry['count']:,} cases, {_cell(reason)}"
              for reason, entry in (evaluation.get("dropped_cases") or {}).items()]  # fmt: skip
    return lines + [f"- **{_cell(warning)}**" for warning in evaluation.get("warnings") or ()]


def _with_block(text: str, name: str, lines: Sequence[str]) -> str:
    """The text of a card with a block of the evaluation's section replaced, or added."""
    name = name.replace("--", "- -")  # would end the comment
    start, end = f"<!-- evaluation: {name} -->", "<!-- end of evaluation -->"
    line_break = "\r\n" if "\r\n" in text else "\n"
    block = line_break.join([start, "", *lines, "", end])
    old = re.search(f"{re.escape(start)}.*?{re.escape(end)}", text, flags=re.DOTALL)
    if old:
        return text[: old.start()] + block + text[old.end() :]
    heading = re.search(rf"^{SECTION}[ \t]*\r?$", text, flags=re.MULTILINE)
    if heading is None:
        limits = re.search(r"^## Limits", text, flags=re.MULTILINE)
        place = limits.start() if limits else len(text)
        before = text[:place].rstrip("\r\n")
        new = [*([before, ""] if before else []), SECTION, "", block, "", text[place:]]
        return line_break.join(new)
    # Behind the last block of the section.
    after = text[heading.end() :]
    following = re.search(r"^## ", after, flags=re.MULTILINE)
    own = after[: following.start()] if following else after
    rest = after[len(own) :]
    return text[: heading.end()] + line_break.join([own.rstrip("\r\n"), "", block, "", rest])


# Command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--results", type=Path, required=True, metavar="PATH", help="Folder of results, or a JSON file."
    )
    parser.add_argument(
        "--model", type=Path, required=True, metavar="DIR", help="Folder of the model, whose README.md is its card."
    )
    parser.add_argument("--dataset", metavar="NAME", help="Data as the card names it (default: as the results do).")
    parser.add_argument("--split", metavar="NAME", help="Split of the data (default: as the results say).")
    parser.add_argument("--data_revision", metavar="NAME", help="Commit or tag of data on the Hub (default: likewise).")


def run(args: argparse.Namespace) -> int:
    path = args.results / "metrics.json" if args.results.is_dir() else args.results
    results = _read_json(path)
    if "task" not in results or "per_finding" not in results:
        raise EvaluationError(f"{path} is no metrics.json and no result of `score`: it has {list(results)[:5]}.")
    beside = path.with_name("retrieval.json")
    retrieval = _read_json(beside) if args.results.is_dir() and beside.is_file() else None
    data = data_of(results)
    if args.dataset or args.split or args.data_revision:
        if args.dataset is None and data is None:
            raise EvaluationError(f"{path} does not say what was measured on; name it with --dataset.")
        data = data or Data(args.dataset)
        split, revision = args.split or data.split, args.data_revision or data.revision
        data = Data(args.dataset or data.name, split, revision)
    model = (results.get("protocol") or {}).get("model") or {}
    # Results of earlier versions hold the path.
    measured = model.get("weights") or (weights_digest(model["path"]) if model.get("path") else None)
    if measured and measured != weights_digest(args.model):
        print(
            f"WARNING: these are results of {entry_name(model)}, of other weights than {args.model}.", file=sys.stderr
        )
    card = write_model_index(args.model, results, data, retrieval)
    print(f"{card}: results written. To upload: python -m training_fvlm.push {args.model} --repo owner/name")
    return 0


def _read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise EvaluationError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise EvaluationError(f"{path} holds no results: expected the content of a metrics.json.")
    return content
