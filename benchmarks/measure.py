"""Two ways of one job, timed in turns (A, B, A, B ...) in one process, so that a busy machine hits both alike.

Times are medians of CPU seconds (all threads of the process); wall seconds stand beside them. A ratio means little
without equal results: every benchmark compares those too, and prints the largest relative difference.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

console = Console()


@dataclass(frozen=True)
class Result:
    """One comparison.

    Attributes:
        name: Stable name, `benchmark/case/variant`.
        baseline_s, ours_s: Median CPU seconds of the two ways.
        baseline_wall_s, ours_wall_s: Median wall seconds.
        max_rel_diff: Largest difference of their results over the largest value of the baseline's; None: not compared.
        note: What a reader must know: what was timed in part and multiplied, what was not compared.
    """

    name: str
    baseline_s: float
    ours_s: float
    baseline_wall_s: float
    ours_wall_s: float
    max_rel_diff: float | None
    note: str = ""

    @property
    def ratio(self) -> float:
        return self.baseline_s / self.ours_s


def add_arguments(parser: argparse.ArgumentParser, repeats: int) -> None:
    """The options that every benchmark has."""
    parser.add_argument("--repeats", type=int, default=repeats, help="Turns of each way (default: %(default)s).")
    parser.add_argument("--threads", type=int, default=None, help="Threads of torch (default: torch's own choice).")
    parser.add_argument("--json", type=Path, help="Write the results there as a list of objects.")


def in_turns(
    baseline: Callable[[], object], ours: Callable[[], object], repeats: int
) -> tuple[tuple[float, float], tuple[float, float]]:
    """Median (CPU, wall) seconds of both ways; the first turn of each warms up and is not counted."""
    times: dict[int, list[tuple[float, float]]] = {0: [], 1: []}
    for turn in range(repeats + 1):
        for number, way in enumerate((baseline, ours)):
            cpu, wall = time.process_time(), time.perf_counter()
            way()
            if turn:
                times[number].append((time.process_time() - cpu, time.perf_counter() - wall))
    medians = [tuple(statistics.median(column) for column in zip(*times[number])) for number in (0, 1)]
    return medians[0], medians[1]


def relative_difference(ours: Iterable[Tensor], baseline: Iterable[Tensor]) -> float:
    """Largest |ours - baseline| of all pairs, each over the largest |baseline| of its pair.

    Pairs whose baseline is zero in theory (attention key biases and the like) would divide noise by noise: where the
    baseline stays below 1e-7, the difference itself counts.
    """
    worst = 0.0
    for one, other in zip(ours, baseline, strict=True):
        one, other = one.detach().double(), other.detach().double()
        difference, scale = float((one - other).abs().max()), float(other.abs().max())
        worst = max(worst, difference / scale if scale > 1e-7 else difference)
    return worst


def report(results: list[Result], path: Path | None) -> None:
    """Print the results as a table, and write them as JSON where asked to."""
    table = Table(title="medians in seconds of CPU time (wall time in brackets)")
    for column in ("name", "baseline", "ours", "ratio", "largest relative difference"):
        table.add_column(column, justify="left" if column == "name" else "right")
    for result in results:
        difference = "not compared" if result.max_rel_diff is None else f"{result.max_rel_diff:.1e}"
        table.add_row(
            result.name,
            f"{result.baseline_s:.4g} ({result.baseline_wall_s:.4g})",
            f"{result.ours_s:.4g} ({result.ours_wall_s:.4g})",
            f"{result.ratio:.2f}",
            difference,
        )
    console.print(table)
    for result in results:
        if result.note:
            console.print(f"{result.name}: {result.note}")
    console.print(machine())
    if path is not None:
        content = [
            {
                "name": result.name,
                "baseline_s": result.baseline_s,
                "ours_s": result.ours_s,
                "ratio": result.ratio,
                "max_rel_diff": result.max_rel_diff,
                "baseline_wall_s": result.baseline_wall_s,
                "ours_wall_s": result.ours_wall_s,
                "note": result.note,
            }
            for result in results
        ]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def machine() -> str:
    """Processor, threads and versions, for a reader of the figures."""
    names = [line.split(":")[1].strip() for line in _cpu_lines() if line.startswith("model name")]
    return (
        f"{names[0] if names else platform.processor() or 'unknown processor'}, {torch.get_num_threads()} threads, "
        f"{torch.backends.cpu.get_cpu_capability()}; torch {torch.__version__}, transformers {version('transformers')}"
    )


def _cpu_lines() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
