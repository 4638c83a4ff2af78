"""What a run has learned: a table of its organs in the terminal, and a figure of their losses against chance.

    python -m training_fvlm.curves out/run                               # also while the run goes on
    python -m training_fvlm.curves out/run --compare out/run_shuffled    # beside the control with shuffled captions

The table has a line per organ: its loss over the first ten and the last ten epochs (log lines, where there are fewer
than twenty epochs), chance and floor over the last ten, and how much of the way from chance to the floor it has gone;
then the organs that never entered, the best, the worst, and what the alarm said.

The figure's upper part has all organs in one plot. A curve on the chance line, ln(number of contrasted patients), has
learned nothing; one below it has. How far below it CAN go differs: patients with equal or normal captions are positives
of each other, and what that leaves of the loss (its floor) is drawn dotted in the lower part, which has one small plot
per organ. Red lines are alarms.
"""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .organ_losses import EVAL_FILE, TRAIN_FILE, OrganLossFile, OrganLossRow, last_rows, share_learned, weighted_mean

FIGURE_NAME = "loss_curves.png"
RUN_FILE = "run.json"
TEN = 10  # epochs or log lines at either end
NAMED = 5  # best and worst organs


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


def read_run(run: str | Path) -> tuple[list[OrganLossRow], list[OrganLossRow], list[dict[str, Any]]]:
    """Rows of training and of evaluation of a run's folder (no evaluation: an empty list), and its alarms.

    Raises:
        ValueError: If the folder holds no organ losses.
    """
    run = Path(run)
    if not (run / TRAIN_FILE).is_file():
        raise ValueError(f"{run} holds no {TRAIN_FILE}: give the --output_dir of a training run.")
    train = OrganLossFile(run / TRAIN_FILE).read()
    if not train:
        raise ValueError(f"{run / TRAIN_FILE} holds no rows: the run ended before its first log line.")
    evaluated = OrganLossFile(run / EVAL_FILE).read() if (run / EVAL_FILE).is_file() else []
    return train, evaluated, read_alarms(run)


@dataclass
class Progress:
    """How far an organ has come.

    Attributes:
        organ: Its name.
        first, last: Mean loss at the beginning and at the end, NaN where it was not active.
        chance, floor: Means at the end.
        active: Share of the batches at the end.
        text_cosine: Mean at the end, NaN if not known.
        evaluated: Its row of the last evaluation.
    """

    organ: str
    first: float
    last: float
    chance: float
    floor: float
    active: float
    text_cosine: float
    evaluated: OrganLossRow | None = None

    @property
    def learned(self) -> float:
        """Share of the way from chance to the floor."""
        return share_learned(self.last, self.chance, self.floor)


def progress(rows: Sequence[OrganLossRow], evaluated: Sequence[OrganLossRow] = ()) -> tuple[list[Progress], str]:
    """Per organ the first ten epochs or log lines beside the last ten.

    Args:
        rows: Training rows, oldest first.
        evaluated: Rows of evaluations, oldest first.

    Returns:
        The organs, the one that has learned most first, those never active last; and what the ten are ("10 epochs",
        "4 log lines", "log line": of a short run half its lines).
    """
    epochs = {math.ceil(row.epoch) for row in rows}
    by_epoch = len(epochs) >= 2 * TEN
    units = sorted(epochs if by_epoch else {row.step for row in rows})
    count = min(TEN, max(len(units) // 2, 1))
    ends = [set(units[:count]), set(units[-count:])]
    newest = {row.organ: row for row in evaluated}
    found = []
    for organ in dict.fromkeys(row.organ for row in rows):
        of_organ = [(math.ceil(row.epoch) if by_epoch else row.step, row) for row in rows if row.organ == organ]
        first, last = ([row for unit, row in of_organ if unit in end] for end in ends)
        chance, floor = (_mean(last, name) for name in ("chance", "floor"))
        active = sum(row.active for row in last) / len(last) if last else 0.0
        known = (_mean(first, "loss"), _mean(last, "loss"), chance, floor, active, _mean(last, "text_cosine"))
        found.append(Progress(organ, *known, newest.get(organ)))
    found.sort(key=lambda each: math.inf if math.isnan(each.learned) else -each.learned)
    name = "epoch" if by_epoch else "log line"
    return found, f"{count} {name}s" if count > 1 else name


def _mean(rows: Sequence[OrganLossRow], name: str) -> float:
    """Mean of a column over the batches in which the organ was active."""
    weights = [
        row.active * (1 if math.isnan(row.batches) else row.batches) for row in rows
    ]  # older tables lack batches
    return weighted_mean([getattr(row, name) for row in rows], weights)


def summary(run: str | Path) -> list[str]:
    """The table of a run as lines of text.

    Raises:
        ValueError: If the folder holds no organ losses.
    """
    run = Path(run)
    train, evaluated, _ = read_run(run)
    organs, ten = progress(train, evaluated)
    active = [each for each in organs if not math.isnan(each.learned)]
    last = train[-1]
    lines = [f"{run}: {last.step:,} steps, {last.epoch:.1f} epochs; {len(active)} of {len(organs)} organs active"]
    if never := [each.organ for each in organs if math.isnan(each.last)]:
        lines.append(f"not active in the last {ten}: {', '.join(never)}")
    width = max(len("organ"), *(len(each.organ) for each in organs))
    with_evaluation = any(each.evaluated is not None for each in active)
    header = f"{'organ':{width}}  {'first':>6}  {'last':>6}  {'chance':>6}  {'floor':>6}  {'learned':>7}  {'active':>6}"
    header += f"  {'cosine':>6}" + (f"  {'held out':>8}  retrieval@1 (guess)" if with_evaluation else "")
    lines += ["", f"loss over the first and the last {ten} (nats), mean cosine between different captions", "", header]
    for each in active:
        line = f"{each.organ:{width}}  {each.first:6.3f}  {each.last:6.3f}  {each.chance:6.3f}  {each.floor:6.3f}"
        line += f"  {_percent(each.learned):>7}  {100 * each.active:4.0f} %  {each.text_cosine:6.3f}"
        if (row := each.evaluated) is not None:
            line += f"  {row.loss:8.3f}  {row.retrieval:11.3f} ({row.retrieval_chance:.3f})"
        lines.append(line.replace("nan", "  -"))
    if active:
        lines += ["", f"best: {_named(active[:NAMED])}", f"worst: {_named(active[::-1][:NAMED])}"]
    for alarm in read_alarms(run):
        lines += ["", f"step {alarm['step']:,}, {'alarm' if alarm['is_alarm'] else 'note'}: {alarm['text']}"]
    return lines


def _named(organs: Sequence[Progress]) -> str:
    return ", ".join(f"{each.organ} {_percent(each.learned)}" for each in organs)


def _percent(share: float) -> str:
    return f"{round(100 * share)} %"


def read_alarms(run: str | Path) -> list[dict[str, Any]]:
    """What the alarm said, from the run's run.json; nothing where there is none, or an older one."""
    path = Path(run) / RUN_FILE
    return json.loads(path.read_text(encoding="utf-8")).get("alarms") or [] if path.is_file() else []


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
    read = [read_run(folder) for folder in folders]
    runs = [
        (name, series(train), series(evaluated), alarms)
        for name, (train, evaluated, alarms) in zip(run_names(folders), read)
    ]
    organs = list(dict.fromkeys(organ for _, train, _, _ in runs for organ in train))
    final = last_rows(read[0][0], num_windows=5)
    # Legend and small plots from the organ that fell furthest below chance to the one that fell least.
    organs.sort(key=lambda organ: final[organ].loss - final[organ].chance if organ in final else math.inf)
    learned = {each.organ: each.learned for each in progress(read[0][0])[0]}
    style_of = {organ: _style(number, len(organs)) for number, organ in enumerate(organs)}

    columns = 6
    grid_rows = math.ceil(len(organs) / columns)
    heights = (6.4, 1.9 * grid_rows + 0.5)  # inches: all organs in one plot, one plot for each
    figure = Figure(figsize=(17, sum(heights)))
    FigureCanvasAgg(figure)
    top, bottom = figure.subfigures(2, 1, height_ratios=heights)

    axes = top.subplots(1, len(runs), sharey=True, squeeze=False)[0]
    for axis, (name, train, _, _) in zip(axes, runs):
        _draw_overview(axis, name, train, organs, style_of)
    lowest = min((line.get_ydata().min() for axis in axes for line in axis.get_lines()), default=0.0)
    axes[0].set_ylim(bottom=max(0.0, lowest - 0.2))
    for axis, (_, _, _, alarms) in zip(axes, runs):
        _mark_alarms(axis, alarms)
    axes[0].set_ylabel("contrastive loss (nats)")
    handles, labels = axes[0].get_legend_handles_labels()
    top.legend(handles, labels, loc="upper right", fontsize=8, title="furthest below chance first")
    # Margins by hand: matplotlib's own layout takes longer than the drawing.
    top.subplots_adjust(left=0.045, right=0.84, bottom=0.09, top=0.95, wspace=0.04)

    small = bottom.subplots(grid_rows, columns, sharex=True, squeeze=False).ravel()
    for axis, organ in zip(small, organs):
        _draw_organ(axis, organ, runs, style_of[organ], learned.get(organ, math.nan))
    for axis in small[len(organs) :]:
        axis.axis("off")
    named = {label: handle for axis in small for handle, label in zip(*axis.get_legend_handles_labels())}
    labels, handles = list(named), list(named.values())
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
    axis.grid(alpha=0.3)


def _mark_alarms(axis, alarms: Sequence[dict[str, Any]], organ: str | None = None) -> bool:
    """A red line at every alarm (of an organ, if one is named); True if there was one."""
    steps = {alarm["step"] for alarm in alarms if alarm["is_alarm"] and organ in (None, *alarm["organs"])}
    for number, step in enumerate(sorted(steps)):
        axis.axvline(step, color="red", linewidth=1.0, linestyle="--", label="alarm" if number == 0 else None, zorder=0)
    return bool(steps)


def _draw_organ(axis, organ: str, runs: list, style: dict, learned: float) -> None:
    """One organ: training and evaluation loss of each run between its chance line and its floor."""
    lowest = []
    for number, (run_name, train, evaluated, _) in enumerate(runs):
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
            steps, chance, floor = points[:, 0], smooth(points[:, 2], width), smooth(points[:, 3], width)
            lines = {"color": "black", "linewidth": 1.2, "marker": marker}
            axis.plot(steps, chance, label="chance", **lines)
            axis.plot(steps, floor, linestyle=":", label="floor", **lines)
            axis.fill_between(steps, floor, chance, color="0.94", linewidth=0, zorder=0)
        lowest.append(min(points[:, 1].min(), smooth(points[:, 3], width).min()))
    has_alarm = _mark_alarms(axis, runs[0][3], organ)
    share = "" if math.isnan(learned) else f"  {_percent(learned)}"
    axis.set_title(organ + share, fontsize=9, color="red" if has_alarm else "black")
    # From the floor up: what lies below it cannot be reached, and would press the curves together.
    axis.set_ylim(bottom=max(0.0, min(lowest) - 0.1) if lowest else 0.0)
    if not len(runs[0][1].get(organ, ())):
        axis.text(0.5, 0.5, "never in the loss", ha="center", va="center", fontsize=8, transform=axis.transAxes)
    axis.tick_params(labelsize=7)
    axis.locator_params(axis="y", nbins=4)
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
        for run in (arguments.run, arguments.compare):
            if run is not None:
                print(*summary(run), "", sep="\n")
        print(draw(arguments.run, arguments.compare, arguments.out))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
