"""Pictures of a zero-shot evaluation: one small ROC curve per finding, and the AUCs as bars grouped by organ."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from sklearn.metrics import roc_curve

# Figure and canvas are made directly, not through pyplot: no global state, no display, no figure left open.
CURVE = "#1f6fb4"
CHANCE = "#9a9a9a"
COLUMNS = 6


def plot_roc_curves(frame: pd.DataFrame, summary: dict, path: Path) -> None:
    """A grid of ROC curves, best AUC first.

    Args:
        frame: Rows of one task of `ZeroShotScores.frame`.
        summary: What `metrics.summarize` said of these rows.
        path: PNG file to write.
    """
    measured = _measured(summary)
    columns = min(COLUMNS, max(1, len(measured)))
    rows = max(1, math.ceil(len(measured) / columns))
    figure = Figure(figsize=(2.15 * columns + 0.4, 2.45 * rows + 0.7), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    for axes in grid.flat[len(measured) :]:
        axes.set_axis_off()
    for n, (axes, (finding, metrics)) in enumerate(zip(grid.flat, measured)):
        counted = frame[(frame["finding"] == finding) & frame["score"].notna() & frame["label"].notna()]
        false_positive_rate, true_positive_rate, _ = roc_curve(counted["label"], counted["score"])
        axes.plot([0, 1], [0, 1], color=CHANCE, linewidth=0.8, linestyle="--")
        axes.plot(false_positive_rate, true_positive_rate, color=CURVE, linewidth=1.4)
        axes.fill_between(false_positive_rate, true_positive_rate, color=CURVE, alpha=0.12)
        axes.set_title(_wrap(finding), fontsize=8)
        axes.text(
            0.97,
            0.05,
            f"AUC {metrics['auc']:.3f}\n{metrics['organ']}\n{metrics['positives']} of "
            f"{metrics['positives'] + metrics['negatives']}",
            transform=axes.transAxes,
            ha="right",
            va="bottom",
            fontsize=7,
        )
        axes.set_xlim(-0.02, 1.02)
        axes.set_ylim(-0.02, 1.02)
        axes.set_xticks([0, 0.5, 1], ["0", "", "1"])
        axes.set_yticks([0, 0.5, 1], ["0", "", "1"])
        axes.set_aspect("equal")
        axes.tick_params(labelsize=7, labelbottom=n + columns >= len(measured))
    figure.supxlabel("false positive rate", fontsize=9)
    figure.supylabel("true positive rate", fontsize=9)
    figure.suptitle(_title(frame, summary), fontsize=11)
    _save(figure, path)


def plot_auc_bars(frame: pd.DataFrame, summary: dict, path: Path) -> None:
    """AUC per finding as horizontal bars, grouped by organ (best organ first), with the line of chance.

    Args: as `plot_roc_curves`.
    """
    by_organ: dict[str, list[tuple[str, dict]]] = {}
    for finding, metrics in _measured(summary):
        by_organ.setdefault(metrics["organ"], []).append((finding, metrics))
    organs = sorted(by_organ, key=lambda organ: -float(np.mean([m["auc"] for _, m in by_organ[organ]])))

    gap = 0.6  # between organs, in bar heights
    num_findings = sum(len(findings) for findings in by_organ.values())
    height = 0.22 * (num_findings + gap * len(organs)) + 1.3
    figure = Figure(figsize=(8.5, max(2.5, height)), layout="constrained")
    axes = figure.subplots()
    place, places, names = 0.0, [], []
    for n, organ in enumerate(organs):
        top = place
        for finding, metrics in by_organ[organ]:
            axes.barh(place, metrics["auc"], height=0.8, color=CURVE if n % 2 == 0 else "#6aa5d6")
            box = {"facecolor": "white", "edgecolor": "none", "pad": 0.8}  # else the line of the mean runs through it
            axes.text(metrics["auc"] + 0.008, place, f"{metrics['auc']:.3f}", va="center", fontsize=7, bbox=box)
            places.append(place)
            names.append(f"{finding} ({metrics['positives']})")
            place += 1.0
        axes.text(1.075, (top + place - 1.0) / 2, organ, va="center", fontsize=8)
        place += gap
    if summary["macro_auc"] is not None:
        axes.axvline(summary["macro_auc"], color="#222222", linewidth=0.9, label=f"mean {summary['macro_auc']:.3f}")
    axes.axvline(0.5, color="#b03030", linewidth=1.0, linestyle="--", label="chance 0.500")
    axes.set_yticks(places, names, fontsize=7.5)
    axes.set_ylim(place - gap - 0.4, -0.6)
    axes.set_xlim(0, 1.07)
    axes.set_xticks(np.arange(0, 1.01, 0.1))
    axes.tick_params(axis="x", labelsize=8)
    axes.set_xlabel("AUC (scans with the finding in brackets)", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(_title(frame, summary), fontsize=11)
    figure.legend(loc="outside lower right", ncols=2, fontsize=8, frameon=False)
    _save(figure, path)


def _measured(summary: dict) -> list[tuple[str, dict]]:
    """Findings that have an AUC, best first."""
    measured = [(finding, m) for finding, m in summary["per_finding"].items() if m["auc"] is not None]
    return sorted(measured, key=lambda pair: -pair[1]["auc"])


def _title(frame: pd.DataFrame, summary: dict) -> str:
    macro = "none measurable" if summary["macro_auc"] is None else f"macro AUC {summary['macro_auc']:.3f}"
    return (
        f"{frame['task'].iloc[0]}: {macro} over {summary['num_findings']} findings, {summary['num_patients']} patients"
    )


def _wrap(finding: str, width: int = 24) -> str:
    """Two lines at most, broken at the space nearest to the middle."""
    spaces = [n for n, letter in enumerate(finding) if letter == " "]
    if len(finding) <= width or not spaces:
        return finding
    middle = min(spaces, key=lambda n: abs(n - len(finding) / 2))
    return f"{finding[:middle]}\n{finding[middle + 1 :]}"


def _save(figure: Figure, path: Path) -> None:
    FigureCanvasAgg(figure).print_figure(path, dpi=130, format="png")
