"""Writing a zero-shot evaluation: the table of scores, the metrics with the protocol they follow, the pictures."""

from __future__ import annotations

import json
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from evaluation_fvlm.metrics import summarize
from evaluation_fvlm.plots import plot_auc_bars, plot_roc_curves
from evaluation_fvlm.published_metrics import published_scores, summarize_published
from evaluation_fvlm.tasks import Task
from evaluation_fvlm.windows import WindowRule
from evaluation_fvlm.zero_shot import ZeroShotScores

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
    }


def window_protocol(rule: WindowRule, scores: ZeroShotScores) -> dict:
    """How organs were shown to the network, and how many forwards that took."""
    return {
        "size": list(rule.size),
        "rule": "published" if rule.published else "padded to size",
        "context": "shared: organs that fit into one window are seen in one, so scores differ from those of centred "
        "windows"
        if rule.shared
        else "centred: every organ in the middle of its window, as far as the scan reaches",
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


def write_results(
    scores: ZeroShotScores, protocol: dict, folder: Path, *, published: bool = False
) -> tuple[dict, list[Path]]:
    """Write scores.csv, metrics.json and, for every task, roc.png and auc_bars.png.

    The figures of `metrics.json` are those of the first task; those of further tasks stand under `other_tasks` by
    name, and their pictures carry the name (`roc_NAME.png`).

    Args:
        protocol: Written as it is beside the figures; everything that a reader needs to get the same numbers.
        folder: Made if missing; files of an earlier run are replaced, and those that this one does not make removed.
        published: Add to every task's figures the published ones under `published`, and write its scores in the
            published column form: published_scores.csv, for further tasks `published_scores_NAME.csv`.

    Returns:
        The content of metrics.json, and the paths written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    remove_earlier_results(folder)
    paths = [folder / "scores.csv"]
    scores.frame.to_csv(paths[0], index=False, float_format="%.9g")
    metrics: dict = {}
    for n, task in enumerate(scores.tasks):
        frame = scores.frame[scores.frame["task"] == task.name]
        summary = {"task": task.name} | summarize(frame) | {"findings_without_labels": scores.unlabelled[task.name]}
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
    metrics["protocol"] = protocol
    metrics["seconds"] = round(scores.seconds, 2)

    # metrics.json comes last and at once: where it stands, the run behind it was finished.
    path = folder / "metrics.json"
    unfinished = path.with_name(path.name + ".part")
    unfinished.write_text(json.dumps(metrics, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(unfinished, path)
    return metrics, [*paths, path]


def remove_earlier_results(folder: Path) -> None:
    """Take away what an earlier run wrote, metrics.json first: a run that is killed leaves none that is not its own.

    Files of these names are left alone where no scores.csv says that there was a run: every run writes that first.
    """
    (folder / "metrics.json").unlink(missing_ok=True)
    if (folder / "scores.csv").is_file():
        for stem, ending in (("published_scores", "csv"), ("roc", "png"), ("auc_bars", "png")):
            for path in [folder / f"{stem}.{ending}", *folder.glob(f"{stem}_*.{ending}")]:
                path.unlink(missing_ok=True)


def format_table(metrics: dict) -> str:
    """The figures of one task as text for a terminal, best finding first, with what could not be measured below."""
    per_finding = metrics["per_finding"]
    measured = sorted((f for f, m in per_finding.items() if m["auc"] is not None), key=lambda f: -per_finding[f]["auc"])
    width = max([len("finding"), *(len(finding) for finding in per_finding)])
    lines = [f"{'finding':<{width}}  {'organ':<18} {'AUC':>6} {'AP':>6} {'pos':>5} {'neg':>5} {'left out':>8}"]
    for finding in measured:
        m = per_finding[finding]
        lines.append(
            f"{finding:<{width}}  {m['organ']:<18} {m['auc']:6.3f} {m['average_precision']:6.3f} {m['positives']:5d} "
            f"{m['negatives']:5d} {sum(m['excluded'].values()):8d}"
        )
    for finding, m in per_finding.items():
        if m["auc"] is None:
            lines.append(f"{finding:<{width}}  {m['organ']:<18} not measured: {m['reason']}")
    macro = "none" if metrics["macro_auc"] is None else f"{metrics['macro_auc']:.4f}"
    lines.append(
        f"macro AUC {macro} over {metrics['num_findings']} findings, {metrics['num_patients']} patients, "
        f"{metrics['num_reconstructions']} volumes"
    )
    return "\n".join(lines)
