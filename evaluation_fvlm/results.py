"""Writing a zero-shot evaluation: the table of scores, the metrics with the protocol they follow, the pictures."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import pandas as pd

from evaluation_fvlm.json_files import write_json
from evaluation_fvlm.metrics import LABEL_UNKNOWN, ORGAN_ABSENT, summarize
from evaluation_fvlm.plots import plot_auc_bars, plot_roc_curves
from evaluation_fvlm.protocols import Protocol, compare_frames, evaluate_frame
from evaluation_fvlm.published_metrics import published_scores, summarize_published
from evaluation_fvlm.tasks import Task
from evaluation_fvlm.windows import WindowRule
from evaluation_fvlm.wording import summarize_wording, wording_spread
from evaluation_fvlm.zero_shot import ZeroShotScores

COMPARISON = "comparison.json"
NO_LABEL_AT_ALL = "no row of the split has a label for this finding"
DROPPED_COLUMNS = ["patient_id", "scan_id", "recon_id", "task", "finding", "reason"]
FEW_FINDINGS = 4  # lines of a table that say the same
LIBRARIES = ("torch", "transformers", "datasets", "numpy", "scikit-learn", "scipy", "pandas")


def task_protocol(task: Task) -> dict:
    """What must be said of a prompt set for its score to be read: name, version, digest, size."""
    return {
        "name": task.name,
        "version": task.version,
        "digest": task.digest,
        "source": task.source,
        "num_findings": len(task.items),
        "num_prompts": len(task.prompts),
        "num_pairs": sum(len(item.positive) for item in task.items),
        "num_paraphrases": sum(len(item.paraphrases) for item in task.items),
    }


def window_protocol(rule: WindowRule, scores: ZeroShotScores) -> dict:
    """How organs were shown to the network, and how many forwards that took."""
    context = "centred: every organ in the middle of its window, as far as the scan reaches"
    if rule.shared:
        embeddings = scores.embeddings
        is_all = len(embeddings.asked_organs) == len(embeddings.organs)
        context = (
            "shared: organs that fit into one window are seen in one, so scores differ from those of centred windows. "
            f"How they fit hangs on which are embedded, here {'all' if is_all else 'those that prompts ask for'} "
            f"({len(embeddings.asked_organs)} of {len(embeddings.organs)}): --retrieval, --diagnostics or "
            "--save_embeddings embed all, and scores with and without them differ"
        )
    return {
        "size": list(rule.size),
        "rule": "published" if rule.published else "padded to size",
        "context": context,
        "num_windows": scores.embeddings.num_windows,
        "num_batches": scores.embeddings.num_batches,
    }


def library_versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for library in LIBRARIES:
        try:
            versions[library] = version(library)
        except PackageNotFoundError:
            versions[library] = "unknown"
    return versions


def add_wording(summary: dict, scores: ZeroShotScores, task: Task) -> None:
    """Put `wording` into every finding of a task's summary, and over all beside them (wording.py)."""
    spreads = {}
    for item in task.items:
        labels = scores.frame["label"][(scores.frame["task"] == task.name) & (scores.frame["finding"] == item.finding)]
        by_wording = scores.by_wording[task.name, item.finding]
        spreads[item.finding] = wording_spread(by_wording, labels.to_numpy(), item.wordings, len(item.positive))
        summary["per_finding"][item.finding]["wording"] = spreads[item.finding]
    summary["wording"] = summarize_wording(spreads)


def dropped_cases(scores: ZeroShotScores, rows: pd.DataFrame | None = None) -> pd.DataFrame:
    """Every case that is not measured, with the reason: rows that were not scored, then findings of scored ones.

    A finding that no row has a label for is named once, not once a row.

    Args:
        rows: Of the split, left out by `split.choose_scans`.
    """
    frame = scores.frame
    is_absent, is_unknown = frame["score"].isna(), frame["label"].isna()
    never = {(task, finding) for task, findings in scores.unlabelled.items() for finding in findings}
    is_never = pd.Series([pair in never for pair in zip(frame["task"], frame["finding"])], index=frame.index)
    parts = [rows] if rows is not None else []
    parts.append(frame[is_absent & ~is_never].assign(reason=ORGAN_ABSENT))
    parts.append(frame[~is_absent & is_unknown & ~is_never].assign(reason=LABEL_UNKNOWN))
    parts.append(pd.DataFrame(sorted(never), columns=["task", "finding"]).assign(reason=NO_LABEL_AT_ALL))
    return pd.concat(parts, ignore_index=True).reindex(columns=DROPPED_COLUMNS)


def task_rows(frame: pd.DataFrame, task: Task) -> pd.DataFrame:
    """The rows of one task. Rows of equal reports are gone before scoring (`split.choose_scans`): no row has one."""
    return frame[frame["task"] == task.name].assign(report=np.nan)


def compare_runs(
    runs: Sequence[tuple[str, ZeroShotScores, ZeroShotScores | None]], protocol: Protocol, folder: Path
) -> tuple[list[dict], Path]:
    """Compare every run with the first, task by task, and write comparison.json.

    Args:
        runs: Name, scores, and scores of the development split, each of the same tasks on the same rows.
        folder: Of the file; it exists.

    Returns:
        For every other run and task what `protocols.compare_frames` says, with `task`, `a` and `b`; and the file.
    """
    (first, scores, development), *others = runs
    comparisons = []
    for name, other_scores, other_development in others:
        for task in scores.tasks:
            tables = [task_rows(one.frame, task) for one in (scores, other_scores)]
            chosen_on = [task_rows(one.frame, task) for one in (development, other_development) if one is not None]
            result = compare_frames(*tables, protocol, chosen_on)
            comparisons.append({"task": task.name, "a": first, "b": name} | result)
    path = folder / COMPARISON
    write_json({"comparisons": comparisons}, path)
    return comparisons, path


def dropped_rows(rows: pd.DataFrame | None) -> dict[str, dict]:
    """Reason -> count and cases of the rows that `split.choose_scans` left out."""
    groups = () if rows is None else rows.groupby("reason", sort=False)
    return {reason: {"count": len(part), "cases": part["recon_id"].tolist()} for reason, part in groups}


def write_results(
    scores: ZeroShotScores,
    protocol: dict,
    folder: Path,
    *,
    published: bool = False,
    dropped: pd.DataFrame | None = None,
    evaluation: Protocol | None = None,
    development: ZeroShotScores | None = None,
    parts: Mapping[str, dict] | None = None,
) -> tuple[dict, list[Path]]:
    """Write scores.csv, dropped.csv, metrics.json and, for every task, published_scores.csv, roc.png and auc_bars.png.

    The figures of `metrics.json` are those of the first task; those of further tasks stand under `other_tasks` by
    name, and their files carry the name (`roc_NAME.png`).

    Args:
        protocol: Written as it is beside the figures; everything that a reader needs to get the same numbers.
        folder: Made if missing; files of an earlier run are replaced, and those that this one does not make removed.
        published: Add to every task's figures the published ones under `published`.
        dropped: Rows of the split that were not scored (`split.choose_scans`), for dropped.csv.
        evaluation: Add to every task's figures under `evaluation` those of `protocols.evaluate_frame`.
        development: Scores of other patients, for its thresholds.
        parts: What else was measured, each written as NAME.json.

    Returns:
        The content of metrics.json, and the paths written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    remove_earlier_results(folder)
    paths = [folder / "scores.csv", folder / "dropped.csv"]
    scores.frame.to_csv(paths[0], index=False, float_format="%.9g")
    dropped_cases(scores, dropped).to_csv(paths[1], index=False)
    metrics: dict = {}
    for n, task in enumerate(scores.tasks):
        frame = scores.frame[scores.frame["task"] == task.name]
        summary = {"task": task.name} | summarize(frame) | {"findings_without_labels": scores.unlabelled[task.name]}
        add_wording(summary, scores, task)
        if evaluation is not None:
            others = None if development is None else task_rows(development.frame, task)
            summary["evaluation"] = evaluate_frame(task_rows(scores.frame, task), evaluation, others)
            summary["evaluation"]["dropped_cases"] |= dropped_rows(dropped)
            summary["evaluation"]["warnings"] += protocol.get("warnings", ())
        if published:
            summary["published"] = summarize_published(frame)
        paths.append(folder / ("published_scores.csv" if n == 0 else f"published_scores_{task.name}.csv"))
        published_scores(frame, task).to_csv(paths[-1], index=False)
        if n == 0:
            metrics = summary | {"other_tasks": {}}
        else:
            metrics["other_tasks"][task.name] = summary
        for stem, plot in (("roc", plot_roc_curves), ("auc_bars", plot_auc_bars)):
            paths.append(folder / (f"{stem}.png" if n == 0 else f"{stem}_{task.name}.png"))
            plot(frame, summary, paths[-1])
    for name, content in (parts or {}).items():
        paths.append(folder / f"{name}.json")
        write_json(content, paths[-1])
    metrics["protocol"] = protocol
    metrics["seconds"] = round(scores.seconds, 2)

    # metrics.json comes last and at once: where it stands, the run behind it was finished.
    path = folder / "metrics.json"
    write_json(metrics, path)
    return metrics, [*paths, path]


def remove_earlier_results(folder: Path) -> None:
    """Take away what an earlier run wrote, metrics.json first: a run that is killed leaves none that is not its own.

    Embeddings stay: they say themselves what made them. Files of these names are left alone where no scores.csv says
    that there was a run: every run writes that first.
    """
    (folder / "metrics.json").unlink(missing_ok=True)
    (folder / COMPARISON).unlink(missing_ok=True)
    if (folder / "scores.csv").is_file():
        for name in ("dropped.csv", "report.html", "retrieval.json", "diagnostics.json", "examples/examples.json"):
            (folder / name).unlink(missing_ok=True)
        for path in folder.glob("examples/[0-9][0-9][0-9]-*.png"):
            path.unlink()
        for stem, ending in (("published_scores", "csv"), ("roc", "png"), ("auc_bars", "png")):
            for path in [folder / f"{stem}.{ending}", *folder.glob(f"{stem}_*.{ending}")]:
                path.unlink(missing_ok=True)


def format_table(metrics: dict) -> str:
    """The figures of one task as text for a terminal, best finding first, with what could not be measured below."""
    per_finding = metrics["per_finding"]
    measured = sorted((f for f, m in per_finding.items() if m["auc"] is not None), key=lambda f: -per_finding[f]["auc"])
    width = max([len("finding"), *(len(finding) for finding in per_finding)])
    evaluation, wording = metrics.get("evaluation"), metrics.get("wording")
    lines = [f"{'finding':<{width}}  {'organ':<18} {'AUC':>6} {'AP':>6} {'pos':>5} {'neg':>5} {'left out':>8}"]
    lines[0] += f"  {'AUC, 95 %':<14} {'F1':>6} {'wF1':>6}" if evaluation else ""
    lines[0] += "  AUC by wording" if wording else ""
    for finding in measured:
        m = per_finding[finding]
        line = (
            f"{finding:<{width}}  {m['organ']:<18} {m['auc']:6.3f} {m['average_precision']:6.3f} {m['positives']:5d} "
            f"{m['negatives']:5d} {sum(m['excluded'].values()):8d}"
        )
        if evaluation:
            known = evaluation["per_finding"][finding]
            line += f"  {_interval(known['auc']):<14} {_number(known['f1']):>6} {_number(known['weighted_f1']):>6}"
        if spread := m.get("wording"):
            line += f"  {spread['min']:.3f}-{spread['max']:.3f}, SD {spread['std']:.3f}"
        lines.append(line)
    reasons = {finding: m["reason"] for finding, m in per_finding.items() if m["auc"] is None}
    lines += _not_measured(reasons, width + 21)
    macro = "none" if metrics["macro_auc"] is None else f"{metrics['macro_auc']:.4f}"
    lines.append(
        f"macro AUC {macro} over {metrics['num_findings']} findings, {metrics['num_patients']} patients, "
        f"{metrics['num_reconstructions']} volumes"
    )
    if evaluation:
        macro, in_words = evaluation["macro"], evaluation["protocol"]["in_words"]
        lines.append(
            f"by protocol: macro AUC {_number(macro['auc'])} ({_interval(macro['auc'])}), F1 {_number(macro['f1'])}, "
            f"weighted F1 {_number(macro['weighted_f1'])}; {in_words['intervals']}; threshold {in_words['threshold']}"
        )
    if wording:
        lines.append(
            f"wording: best and worst sentences of a finding lie {wording['mean_range']:.3f} apart in AUC on average "
            f"(SD {wording['mean_std']:.3f}), most for {wording['largest']['finding']} "
            f"({wording['largest']['range']:.3f})"
        )
    return "\n".join(lines)


def format_comparison(comparison: dict) -> str:
    """What `protocols.compare_frames` says of two runs, as text for a terminal, largest difference first."""
    per_finding = comparison["per_finding"]
    measured = [finding for finding, m in per_finding.items() if m["auc"]["difference"]["value"] is not None]
    measured.sort(key=lambda finding: -abs(per_finding[finding]["auc"]["difference"]["value"]))
    width = max([len("finding"), *(len(finding) for finding in per_finding)])
    lines = [
        f"{'finding':<{width}}  {'AUC a':>6} {'AUC b':>6} {'b - a':>6}  {'95 %':<16} {'p DeLong':>8} {'p Holm':>8}"
    ]
    for finding in measured:
        auc, test = per_finding[finding]["auc"], per_finding[finding]["delong"] or {}
        difference = auc["difference"]
        lines.append(
            f"{finding:<{width}}  {auc['a']:6.3f} {auc['b']:6.3f} {difference['value']:+6.3f}  "
            f"{_interval(difference, '+.3f'):<16} {_p(test.get('p')):>8} {_p(test.get('p_holm')):>8}"
        )
    reasons = {finding: m.get("reason", "no figure") for finding, m in per_finding.items() if finding not in measured}
    lines += _not_measured(reasons, width + 2)
    macro = comparison["macro"]["auc"]
    if macro["difference"]["value"] is not None:
        lines.append(
            f"macro AUC {macro['a']:.4f} against {macro['b']:.4f}: {macro['difference']['value']:+.4f} "
            f"({_interval(macro['difference'], '+.4f')}), p by bootstrap "
            f"{_p(macro['difference']['p'])}"
        )
    return "\n".join(lines)


def _not_measured(reasons: dict[str, str], width: int) -> list[str]:
    """A line for each finding; of many with one reason a line for all."""
    lines = []
    for reason in dict.fromkeys(reasons.values()):
        findings = [finding for finding, one in reasons.items() if one == reason]
        if len(findings) <= FEW_FINDINGS:
            lines += [f"{finding:<{width}}not measured: {reason}" for finding in findings]
        else:
            some = ", ".join(findings[:FEW_FINDINGS])
            lines.append(f"not measured: {reason}: {len(findings)} findings, as {some}; metrics.json names all")
    return lines


def _number(figure: dict) -> str:
    return "none" if figure["value"] is None else f"{figure['value']:.3f}"


def _interval(figure: dict, form: str = ".3f") -> str:
    return "none" if figure["low"] is None else f"{figure['low']:{form}} to {figure['high']:{form}}"


def _p(value: float | None) -> str:
    return "none" if value is None else f"{value:.4f}"
