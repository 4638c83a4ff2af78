"""Time of our training step against the number of organs, patients and caption tokens, at the published size.

    python -m benchmarks.scaling --plot scaling.png
    python -m benchmarks.scaling --organs 1 24 --batches 2 --lengths 26 --json scaling.json

The step of benchmarks/step.py (bookkeeping, forward, backward, AdamW) without dropout on attention probabilities. There
is no published way here; `baseline` is what the step may cost:

    scaling/organs/N    batch 2: the step of the fewest organs, and what the added captions cost the text encoder alone
                        (forward and backward, timed in turns with the step)
    scaling/batch/N     4 organs: the step of the smallest batch times the patients
    scaling/length/N    24 organs, batch 2, captions of N tokens in the mean: the step of the shortest captions, and
                        what their part of it grows by with the tokens

A ratio of 1 or more says that the step costs no more than that. Before it is timed, step and captions each run once
untimed, right before; operations are counted in one more run. More organs fill more tokens, and the image tower's last
block computes only tokens that hold an organ: the notes of organs/N give what its operations grow by.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.inputs import MEAN_TOKENS, Batch, make_batch, make_model
from benchmarks.measure import (
    Peak,
    Result,
    Times,
    add_arguments,
    count_flop,
    in_turns,
    machine,
    measure_peak,
    parse_arguments,
    report,
)
from benchmarks.memory import require_memory
from benchmarks.step import OurStep
from benchmarks.text import unique_captions
from modeling_fvlm import FVLMModel

BATCH_SIZE, ORGANS_OF_BATCHES, ORGANS_OF_LENGTHS = 2, 4, 24
# To refuse a run that would be killed: weights and AdamW, and what each patient and each caption token adds.
NEEDS_GB, NEEDS_GB_PER_PATIENT, NEEDS_GB_PER_TOKEN = 5.0, 1.2, 1e-3
MEASURED, ALLOWED, CAPTIONS = "#1f6fb4", "#b03030", "#9a9a9a"


@dataclass(frozen=True)
class Point:
    """One size of the step.

    Attributes:
        step, captions: Times of the whole step, and of the text encoder's forward and backward alone.
        tokens: Caption tokens of the batch, padding not counted.
        bound_s, captions_bound_s: CPU seconds below which the two cannot go.
    """

    step: Times
    captions: Times
    tokens: int
    bound_s: float
    captions_bound_s: float

    @property
    def image_bound_s(self) -> float:
        """What is not captions."""
        return self.bound_s - self.captions_bound_s


def measure_point(model: FVLMModel, batch: Batch, repeats: int, peak: Peak) -> Point:
    """Time the step and its captions alone, in turns."""
    ours, num_organs = OurStep(model, batch), len(batch.token_ids)
    input_ids, attention_mask, _ = unique_captions(batch, num_organs)

    def encode_captions() -> None:
        model.get_text_features(input_ids, attention_mask).sum().backward()
        model.zero_grad(set_to_none=True)

    ways: dict[str, Callable[[], None]] = {
        "step": lambda: ours.step(attention_dropout=False),
        "captions": encode_captions,
    }
    bounds = {name: peak.seconds(count_flop(way)) for name, way in ways.items()}
    times = in_turns(ways, repeats)
    tokens = int(attention_mask.sum())
    return Point(times["step"], times["captions"], tokens, bounds["step"], bounds["captions"])


class Points:
    """Points by size, each measured once.

    Args:
        make: Model of a number of organs, and batch as `inputs.make_batch` makes it.
    """

    def __init__(self, repeats: int, peak: Peak, make: tuple[Callable, Callable] = (make_model, make_batch)):
        self.repeats, self.peak = repeats, peak
        self.make_model, self.make_batch = make
        self.points: dict[tuple[int, int, int], Point] = {}

    def at(self, num_organs: int, batch_size: int = BATCH_SIZE, mean_tokens: int = MEAN_TOKENS) -> Point:
        """The point of one size."""
        size = (num_organs, batch_size, mean_tokens)
        if size not in self.points:
            tokens = num_organs * batch_size * mean_tokens
            needs_gb = NEEDS_GB + batch_size * NEEDS_GB_PER_PATIENT + tokens * NEEDS_GB_PER_TOKEN
            require_memory(needs_gb, f"a step of {num_organs} organs, batch {batch_size}, {tokens} caption tokens")
            batch = self.make_batch(num_organs, batch_size=batch_size, mean_tokens=mean_tokens)
            self.points[size] = measure_point(self.make_model(num_organs), batch, self.repeats, self.peak)
        return self.points[size]


def against_organs(points: Points, organs: list[int]) -> list[Result]:
    """The step, against that of the fewest organs and the added captions."""
    first = points.at(organs[0])
    results = []
    for number in organs:
        point = points.at(number)
        allowed = first.step + point.captions + first.captions * -1
        grown, captions = point.step.cpu - first.step.cpu, point.captions.cpu - first.captions.cpu
        note = ""
        if number > organs[0]:
            image = point.image_bound_s - first.image_bound_s
            note = f"{grown:+.2f} CPU seconds over {organs[0]} organs, the captions alone {captions:+.2f}; "
            note += f"operations of the image side {image:+.2f} at this machine's GEMM rate"
        results.append(as_result(f"scaling/organs/{number}", allowed, point, note))
    return results


def against_batch(points: Points, sizes: list[int]) -> list[Result]:
    """The step, against that of the smallest batch times the patients."""
    first = points.at(ORGANS_OF_BATCHES, sizes[0])
    return [
        as_result(f"scaling/batch/{size}", first.step * (size / sizes[0]), points.at(ORGANS_OF_BATCHES, size))
        for size in sizes
    ]


def against_length(points: Points, lengths: list[int]) -> list[Result]:
    """The step, against that of the shortest captions and those captions' time times the added tokens."""
    first = points.at(ORGANS_OF_LENGTHS, mean_tokens=lengths[0])
    results = []
    for length in lengths:
        point = points.at(ORGANS_OF_LENGTHS, mean_tokens=length)
        note = f"{point.tokens} caption tokens"
        allowed = first.step + first.captions * (point.tokens / first.tokens - 1)
        results.append(as_result(f"scaling/length/{length}", allowed, point, note))
    return results


def as_result(name: str, allowed: Times, point: Point, note: str = "") -> Result:
    """A point beside what it may cost."""
    extra = {"captions_s": point.captions.cpu, "captions_wall_s": point.captions.wall, "caption_tokens": point.tokens}
    return Result(name, allowed, point.step, None, note, point.bound_s, extra)


def plot_scaling(panels: dict[str, tuple[str, str, list[Result]]], path: Path) -> None:
    """CPU seconds of the step, one panel for each size.

    Args:
        panels: By title: label of the size, label of the line of what the step may cost, and results, whose names end
            with the size.
        path: PNG file to write.
    """
    # Figure and canvas are made directly, not through pyplot: no global state, no display, no figure left open.
    figure = Figure(figsize=(4.1 * len(panels), 3.9), layout="constrained")
    for axes, (title, (label, allowed, results)) in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], panels.items()
    ):
        sizes = [int(result.name.rsplit("/", 1)[1]) for result in results]
        seconds = [result.ours.cpu for result in results]
        axes.plot(sizes, [result.baseline.cpu for result in results], color=ALLOWED, linestyle="--", label=allowed)
        axes.plot(sizes, seconds, color=MEASURED, marker="o", markersize=4, label="step")
        captions = [result.extra["captions_s"] for result in results]
        axes.plot(sizes, captions, color=CAPTIONS, marker=".", linewidth=0.9, label="its captions alone")
        for size, second in zip(sizes, seconds):
            axes.annotate(
                f"{second:.1f}", (size, second), (0, -9), textcoords="offset points", ha="center", va="top", fontsize=7
            )
        axes.set_title(title, fontsize=9)
        axes.set_xlabel(label, fontsize=8)
        axes.set_xlim(left=0)
        # What the step may cost can lie far above it: the panel shows the step.
        axes.set_ylim(0, 1.5 * max(seconds))
        axes.set_xticks(sizes)
        axes.tick_params(labelsize=7)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(fontsize=7, frameon=False, loc="upper left")
    figure.supylabel("CPU seconds of a step", fontsize=9)
    figure.suptitle(machine(), fontsize=7)
    FigureCanvasAgg(figure).print_figure(path, dpi=130, format="png")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, sizes, what in (
        ("organs", [1, 4, 12, 24, 36], "Numbers of organs"),
        ("batches", [2, 4, 8], "Patients of a step; 2 at least, or nothing is contrasted"),
        ("lengths", [13, 26, 52, 104], "Mean tokens of a caption"),
    ):
        default = " ".join(map(str, sizes))
        parser.add_argument(f"--{name}", type=int, nargs="+", default=sizes, help=f"{what} (default: {default}).")
    parser.add_argument("--plot", type=Path, help="Write a picture there (PNG).")
    add_arguments(parser, repeats=1)
    options = parse_arguments(parser, arguments)
    if min(options.batches) < 2:
        parser.error("--batches must be at least 2: one patient has nobody to be contrasted with.")
    points = Points(options.repeats, measure_peak())
    organs = against_organs(points, sorted(options.organs))
    batches = against_batch(points, sorted(options.batches))
    lengths = against_length(points, sorted(options.lengths))
    report(organs + batches + lengths, options.json)
    if options.plot is not None:
        options.plot.parent.mkdir(parents=True, exist_ok=True)
        plot_scaling(
            {
                f"batch {BATCH_SIZE}, captions of {MEAN_TOKENS} tokens": (
                    "organs",
                    "step of the fewest organs + added captions",
                    organs,
                ),
                f"{ORGANS_OF_BATCHES} organs": ("patients", "step of the smallest batch x patients", batches),
                f"{ORGANS_OF_LENGTHS} organs, batch {BATCH_SIZE}": (
                    "mean tokens of a caption",
                    "step of the shortest captions + captions x tokens",
                    lengths,
                ),
            },
            options.plot,
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
