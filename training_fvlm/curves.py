"""Loss curves of a run: one curve per organ against the chance line ln(number of contrasted patients).

    python -m training_fvlm.curves out/run                               # draws out/run/loss_curves.png again
    python -m training_fvlm.curves out/run --compare out/run_shuffled    # beside the control with shuffled captions

The figure's upper part has all organs in one plot. A curve on the chance line has learned nothing; one below it has.
How far below it CAN go differs: patients with equal or normal captions are positives of each other, and what that
leaves of the loss (its floor) is drawn dotted in the lower part, which has one small plot per organ.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from .organ_losses import EVAL_FILE, TRAIN_FILE, OrganLossFile, OrganLossRow, last_rows

FIGURE_NAME = "loss_curves.png"


def series(rows: Sequence[OrganLossRow]) -> dict[str, np.ndarray]:
    """Per organ an array `(windows, 4)` of step, loss, chance, floor; windows without the organ are left out."""
    by_organ: dict[str, list[tuple[float, float, float, float]]] = {}
    for row in rows:
        points = by_organ.setdefault(row.organ, [])
        if not math.isnan(row.loss):
            points.append((row.step, row.loss, row.chance, row.floor))
    return {organ: np.array(points, dtype=float).reshape(-1, 4) for organ, points in by_organ.items()}


def smooth(values: np.ndarray, width: int) -> np.ndarray:
    """Centred running mean over `width` windows, shorter at both ends."""
    if width <= 1 or len(values) == 0:
        return values
    kernel = np.ones(width)
    return np.convolve(values, kernel, "same") / np.convolve(np.ones(len(values)), kernel, "same")


def read_run(run: str | Path) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Training and evaluation series of a run's folder (no evaluation: an empty mapping).

    Raises:
        ValueError: If the folder holds no organ losses.
    """
    run = Path(run)
    if not (run / TRAIN_FILE).is_file():
        raise ValueError(f"{run} holds no {TRAIN_FILE}: give the --output_dir of a training run.")
    train = series(OrganLossFile(run / TRAIN_FILE).read())
    if not train:
        raise ValueError(f"{run / TRAIN_FILE} holds no rows: the run ended before its first log line.")
    evaluated = series(OrganLossFile(run / EVAL_FILE).read()) if (run / EVAL_FILE).is_file() else {}
    return train, evaluated


def run_names(folders: Sequence[Path]) -> list[str]:
    """What the runs are called in a figure: the last parts of their paths, as many as tell them apart."""
    parts = [folder.resolve().parts for folder in folders]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return names


def draw(run: str | Path, compare: str | Path | None = None, out: str | Path | None = None) -> Path:
    """Draw a run's curves, or two runs side by side.

    Args:
        run: Output folder of a training run.
        compare: Output folder of another run, such as the control with shuffled captions.
        out: PNG to write; `loss_curves.png` in the run's folder unless given.

    Returns:
        The path written.
    """
    # The object interface with its own canvas: no global backend is chosen, and no window opens.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    folders = [Path(folder) for folder in (run, compare) if folder is not None]
    runs = [(name, *read_run(folder)) for name, folder in zip(run_names(folders), folders)]
    organs = list(dict.fromkeys(organ for _, train, _ in runs for organ in train))
    final = last_rows(OrganLossFile(folders[0] / TRAIN_FILE).read(), num_windows=5)
    # Legend and small plots from the organ that fell furthest below chance to the one that fell least.
    organs.sort(key=lambda organ: final[organ].loss - final[organ].chance if organ in final else math.inf)
    style_of = {organ: _style(number, len(organs)) for number, organ in enumerate(organs)}

    columns = 6
    grid_rows = math.ceil(len(organs) / columns)
    heights = (6.4, 1.9 * grid_rows + 0.5)  # inches: all organs in one plot, one plot for each
    figure = Figure(figsize=(17, sum(heights)))
    FigureCanvasAgg(figure)
    top, bottom = figure.subfigures(2, 1, height_ratios=heights)

    axes = top.subplots(1, len(runs), sharey=True, squeeze=False)[0]
    for axis, (name, train, _) in zip(axes, runs):
        _draw_overview(axis, name, train, organs, style_of)
    axes[0].set_ylabel("contrastive loss (nats)")
    handles, labels = axes[0].get_legend_handles_labels()
    top.legend(handles, labels, loc="upper right", fontsize=8, title="furthest below chance first")
    # Margins by hand: matplotlib's own layout takes longer than the drawing.
    top.subplots_adjust(left=0.045, right=0.84, bottom=0.09, top=0.95, wspace=0.04)

    small = bottom.subplots(grid_rows, columns, sharex=True, squeeze=False).ravel()
    for axis, organ in zip(small, organs):
        _draw_organ(axis, organ, runs, style_of[organ])
    for axis in small[len(organs) :]:
        axis.axis("off")
    handles, labels = small[0].get_legend_handles_labels()
    bottom.legend(handles, labels, loc="lower center", ncols=6, fontsize=8)
    margins = {"bottom": 0.65 / heights[1], "top": 1 - 0.3 / heights[1]}
    bottom.subplots_adjust(left=0.03, right=0.99, wspace=0.14, hspace=0.32, **margins)

    path = Path(out) if out is not None else Path(run) / FIGURE_NAME
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    return path


def draw_if_logged(run: str | Path) -> Path | None:
    """Draw a run's curves, or nothing if it ended before its first log line."""
    path = Path(run) / TRAIN_FILE
    return draw(run) if path.is_file() and OrganLossFile(path).read() else None


def _style(number: int, total: int) -> dict:
    """Twelve colours by three line styles: 36 organs can be told apart."""
    from matplotlib import colormaps

    palette = colormaps["tab20"]
    colours = [palette(index) for index in (0, 2, 4, 6, 8, 10, 12, 16, 18, 1, 5, 9)]
    return {"color": colours[number % 12], "linestyle": ("-", "--", "-.")[number // 12 % 3], "linewidth": 1.4}


def _marker(points: np.ndarray) -> str | None:
    """A line through one point is invisible."""
    return "." if len(points) == 1 else None


def _smoothing_width(points: np.ndarray) -> int:
    """Single windows of a small batch are noisy: a twentieth of the run, 1 for short ones."""
    return max(1, len(points) // 20)


def _draw_overview(axis, title: str, train: dict[str, np.ndarray], organs: list[str], style_of: dict) -> None:
    """All organs in one plot, with the chance line, or its band where organs contrast different numbers of patients."""
    chance: dict[float, list[float]] = {}
    for organ in organs:
        points = train.get(organ, np.empty((0, 4)))
        if len(points):
            loss = smooth(points[:, 1], _smoothing_width(points))
            axis.plot(points[:, 0], loss, label=organ, marker=_marker(points), **style_of[organ])
            for step, value in points[:, [0, 2]]:
                chance.setdefault(step, []).append(value)
    if chance:
        steps = np.array(sorted(chance))
        low, mean, high = (np.array([fold(chance[step]) for step in steps]) for fold in (min, np.mean, max))
        width = max(1, len(steps) // 20)
        axis.fill_between(steps, smooth(low, width), smooth(high, width), color="0.88", linewidth=0, zorder=0)
        patients = math.exp(mean.mean())
        axis.plot(
            steps,
            smooth(mean, width),
            color="black",
            linewidth=2.2,
            marker=_marker(steps),
            label=f"chance ln(n), n = {patients:.1f} contrasted",
            zorder=1,
        )
    axis.set_title(title, fontsize=10)
    axis.set_xlabel("optimizer step")
    axis.set_ylim(bottom=0)
    axis.grid(alpha=0.3)


def _draw_organ(axis, organ: str, runs: list, style: dict) -> None:
    """One organ: training and evaluation loss of each run between its chance line and its floor."""
    for number, (run_name, train, evaluated) in enumerate(runs):
        points = train.get(organ, np.empty((0, 4)))
        if not len(points):
            continue
        width = _smoothing_width(points)
        colour = style["color"] if number == 0 else "0.45"
        name = run_name if len(runs) > 1 else "training"
        marker = _marker(points)
        axis.plot(points[:, 0], smooth(points[:, 1], width), color=colour, linewidth=1.5, marker=marker, label=name)
        if len(evaluated.get(organ, ())):
            held_out = evaluated[organ]
            label = f"{name}, evaluation" if len(runs) > 1 else "evaluation"
            axis.plot(
                held_out[:, 0], held_out[:, 1], color=colour, marker="o", markersize=3, linewidth=0.6, label=label
            )
        if number == 0:
            lines = {"color": "black", "linewidth": 1.2, "marker": marker}
            axis.plot(points[:, 0], smooth(points[:, 2], width), label="chance", **lines)
            axis.plot(points[:, 0], smooth(points[:, 3], width), linestyle=":", label="floor", **lines)
    axis.set_title(organ, fontsize=9)
    axis.set_ylim(bottom=0)
    axis.tick_params(labelsize=7)
    axis.grid(alpha=0.3)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m training_fvlm.curves", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", metavar="RUN", help="output folder of a training run")
    parser.add_argument("--compare", metavar="RUN2", help="output folder of a second run, drawn beside the first")
    parser.add_argument("--out", metavar="PNG", help=f"file to write; default RUN/{FIGURE_NAME}")
    arguments = parser.parse_args(argv)
    try:
        print(draw(arguments.run, arguments.compare, arguments.out))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
