"""The report of an evaluation: figures with intervals, curves, errors and where the model looked, in one HTML file.

    python -m evaluation_fvlm report --results runs/demo/eval

draws report.html of a results folder again, from what lies in it: metrics.json, scores.csv, and, where they are,
examples/examples.json with its pictures, comparison.json (here or one folder up), and what the other commands wrote:
retrieval.json, diagnostics.json, probe.json, lesion_attention.json (or a folder of that name with it). A part that is
not there has no section. Of a folder that compares several runs, each run gets its page.

Sections: headline figures; findings; organs; ROC and precision-recall curves; calibration; sensitivity to wording; run
A against run B; retrieval; the embeddings; probes; worst errors and cases with their attention; attention and lesions;
what was left out; protocol and versions.

The page holds ids and pictures of the split. Sentences of its reports stand there only with `show_text`, which
`--show_text` sets; the synthetic set has no patient's sentence, and is known by its labels.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd

from evaluation_fvlm.chosen_cases import is_synthetic
from evaluation_fvlm.errors import EvaluationError
from evaluation_fvlm.html_template import render_page
from evaluation_fvlm.places import entry_name
from evaluation_fvlm.report_sections import (
    Pictures,
    attention_section,
    comparison_section,
    diagnostics_section,
    errors_section,
    headline_section,
    left_out_section,
    lesion_section,
    probe_section,
    protocol_section,
    retrieval_section,
    task_sections,
)

REPORT = "report.html"
EXAMPLES = Path("examples", "examples.json")
PARTS = ("retrieval", "diagnostics", "probe", "lesion_attention")  # read from NAME.json where metrics.json has none
COMPARISON = "comparison.json"


def write_report(
    folder: Path | str,
    results: Mapping,
    *,
    frame: pd.DataFrame,
    examples: Sequence[Mapping] | None = None,
    show_text: bool = False,
    name: str = REPORT,
) -> Path:
    """Write the report.

    Args:
        folder: Of the results; the pictures of `examples` lie in it.
        results: The content of metrics.json, with `evaluation` of `evaluate_frame` for each task (what `evaluate_frame`
            returns will do as well), and perhaps `comparisons` (list of `compare_frames`), `retrieval` (of `retrieve`,
            with `examples` of `nearest_texts`), `diagnostics`, `probe` and `lesion_attention`.
        frame: The scores, with `zero_shot.SCORE_COLUMNS`.
        examples: Of `examples.collect_examples`.
        show_text: Let sentences of reports into the page.
        name: Of the file.

    Returns:
        The file.
    """
    folder = Path(folder)
    path = folder / name
    unfinished = path.with_name(path.name + ".part")
    unfinished.write_text(page_html(folder, results, frame, examples or (), show_text), encoding="utf-8")
    os.replace(unfinished, path)
    return path


def page_html(folder: Path, results: Mapping, frame: pd.DataFrame, examples: Sequence[Mapping], show_text: bool) -> str:
    """The whole page as a text."""
    tasks = tasks_of(results)
    shows_text = show_text or is_synthetic(frame)
    pictures = Pictures(folder, shows_text)
    sections = [headline_section(tasks)]
    for task, evaluation in tasks.items():
        is_only = len(tasks) == 1
        number_of = list(tasks).index(task) + 1
        sections += task_sections(evaluation, "" if is_only else f" of {task}", "" if is_only else f"{number_of}-")
    sections += [
        *(comparison_section(part, place) for place, part in enumerate(results.get("comparisons") or (), start=1)),
        retrieval_section(results.get("retrieval"), shows_text),
        diagnostics_section(results.get("diagnostics")),
        probe_section(results.get("probe")),
        errors_section(frame, examples, pictures),
        attention_section(examples, pictures),
        lesion_section(results.get("lesion_attention"), pictures),
        left_out_section(tasks),
        protocol_section(results, next(iter(tasks.values()))),
    ]
    first = next(iter(tasks.values()))
    model, data = (entry_name((results.get("protocol") or {}).get(key)) for key in ("model", "data"))
    lead = f"{model} on {data}: " if model and data else ""
    lead += f"{', '.join(tasks)}; {first['num_patients']:,} patients, {first['num_reconstructions']:,} volumes."
    terms = "This page holds ids and pictures of the split"
    terms += (
        ", and sentences of its reports: its terms hold for the page as well."
        if shows_text
        else ": its terms hold for the page as well. Sentences of its reports were left out; --show_text lets them in."
    )
    warnings = dict.fromkeys(warning for evaluation in tasks.values() for warning in evaluation.get("warnings", ()))
    warnings |= dict.fromkeys((results.get("protocol") or {}).get("warnings") or ())
    return render_page(f"Evaluation: {', '.join(tasks)}", lead, terms, sections, list(warnings))


def tasks_of(results: Mapping) -> dict[str, Mapping]:
    """Task -> what `evaluate_frame` says of it, and `spreads`: finding -> spread over its wordings.

    The first task stands at the top of the results, the others under `other_tasks`. Of each, `evaluate_frame` stands
    under `evaluation`, or is all there is.
    """
    summaries = {str(results["task"]): results}
    summaries |= {str(name): summary for name, summary in (results.get("other_tasks") or {}).items()}
    return {
        name: {
            **(summary.get("evaluation") or summary),
            "spreads": {finding: m.get("wording") for finding, m in summary["per_finding"].items()},
        }
        for name, summary in summaries.items()
    }


# The command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--results", required=True, type=Path, help="Folder that eval_fvlm.py wrote.")
    parser.add_argument("--show_text", action="store_true", help="Let sentences of reports into the page.")


def run(args: argparse.Namespace) -> int:
    """Draw the reports of a results folder again; raises EvaluationError where it holds none."""
    folders = [args.results]
    if not (args.results / "metrics.json").is_file():
        folders = sorted(path.parent for path in args.results.glob("*/metrics.json")) or folders
    for folder in folders:
        results, frame, examples = read_results(folder)
        print(write_report(folder, results, frame=frame, examples=examples, show_text=args.show_text))
    return 0


def read_results(folder: Path) -> tuple[dict, pd.DataFrame, list[dict]]:
    """What `write_report` needs, from the files of a results folder.

    Raises:
        EvaluationError: If metrics.json or scores.csv is missing, or a file cannot be read.
    """
    results = _read_json(folder / "metrics.json")
    if results is None or not (folder / "scores.csv").is_file():
        raise EvaluationError(
            f"--results {folder}: there is no metrics.json beside a scores.csv. Give the --out of eval_fvlm.py."
        )
    if "per_finding" not in results or "task" not in results:
        raise EvaluationError(f"{folder / 'metrics.json'} holds no figures of findings: it was not eval_fvlm.py's.")
    try:
        # Ids are text: 007 is not 7. An empty score is one that was not given.
        ids = dict.fromkeys(("task", "patient_id", "scan_id", "recon_id", "finding", "organ"), str)
        frame = pd.read_csv(
            folder / "scores.csv", dtype=ids, keep_default_na=False, na_values={"score": "", "label": ""}
        )
    except ValueError as error:
        raise EvaluationError(f"{folder / 'scores.csv'} cannot be read: {error}") from error
    for name in PARTS:
        for path in (folder / f"{name}.json", folder / name / f"{name}.json"):
            part = None if results.get(name) else _read_json(path)
            if part is not None:
                results[name] = part | {"folder": str(path.parent.relative_to(folder))}
    for path in (folder / COMPARISON, folder.parent / COMPARISON):
        if "comparisons" not in results and (part := _read_json(path)) is not None:
            results["comparisons"] = part["comparisons"]
    examples = _read_json(folder / EXAMPLES)
    return results, frame, examples or []


def _read_json(path: Path):
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise EvaluationError(f"{path} cannot be read: {error}") from error
