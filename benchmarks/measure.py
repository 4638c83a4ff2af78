"""Several ways of one job, timed in turns (A, B, C, A, B, C ...) in one process, so that a busy machine hits all alike.

Times are medians of CPU seconds (all threads of the process); wall seconds stand beside them. A ratio means little
without equal results: every benchmark compares those too, and prints the largest relative difference.

How far a time is from what the hardware allows: the floating-point operations of our way's matrix products, counted as
they run, over the rate at which this machine multiplies large float32 matrices, measured in the same run.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from modeling_fvlm.gemm import onednn_is_available, onednn_matmul

console = Console(width=max(Console().width, 110))

# PyTorch 2.13 counts the attention kernels of GPUs, not that of the CPU. Their first arguments are the shapes.
CPU_ATTENTION_FLOP = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda *shapes, **_: sdpa_flop_count(*shapes[:3]),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda *shapes, **_: sdpa_backward_flop_count(
        *shapes[:4]
    ),
}


@dataclass(frozen=True)
class Times:
    """Seconds of one way: CPU time of all threads, and wall time."""

    cpu: float
    wall: float

    def __mul__(self, factor: float) -> "Times":
        return Times(self.cpu * factor, self.wall * factor)

    def __add__(self, other: "Times") -> "Times":
        return Times(self.cpu + other.cpu, self.wall + other.wall)


@dataclass(frozen=True)
class Result:
    """One comparison.

    Attributes:
        name: Stable name, `benchmark/case/variant`.
        baseline, ours: Medians of the two ways.
        max_rel_diff: Largest difference of their results over the largest value of the baseline's; None: not compared.
        note: What a reader must know: what was timed in part and multiplied, what was not compared.
        bound_s: CPU seconds below which ours cannot go (`Peak.seconds`); None: not counted.
        extra: More figures for the JSON file.
    """

    name: str
    baseline: Times
    ours: Times
    max_rel_diff: float | None
    note: str = ""
    bound_s: float | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def ratio(self) -> float:
        return self.baseline.cpu / self.ours.cpu

    @property
    def distance(self) -> float | None:
        """How many times the bound ours takes."""
        return None if self.bound_s is None else self.ours.cpu / self.bound_s

    def as_json(self) -> dict[str, Any]:
        """What --json writes."""
        return {
            "name": self.name,
            "baseline_s": self.baseline.cpu,
            "ours_s": self.ours.cpu,
            "ratio": self.ratio,
            "max_rel_diff": self.max_rel_diff,
            "baseline_wall_s": self.baseline.wall,
            "ours_wall_s": self.ours.wall,
            "bound_s": self.bound_s,
            "distance": self.distance,
            "note": self.note,
            "machine": machine(),
            "date": date.today().isoformat(),
            **self.extra,
        }


def add_arguments(parser: argparse.ArgumentParser, repeats: int) -> None:
    """The options that every benchmark has."""
    parser.add_argument("--repeats", type=int, default=repeats, help="Turns of each way (default: %(default)s).")
    parser.add_argument("--threads", type=int, default=None, help="Threads of torch (default: torch's own choice).")
    parser.add_argument("--json", type=Path, help="Write the results there as a list of objects.")


def parse_arguments(parser: argparse.ArgumentParser, arguments: list[str] | None) -> argparse.Namespace:
    """Parse, refuse impossible numbers, and set the threads."""
    options = parser.parse_args(arguments)
    for name, numbers in vars(options).items():
        numbers = numbers if isinstance(numbers, list) else [numbers]
        if any(isinstance(number, int) and not isinstance(number, bool) and number < 1 for number in numbers):
            parser.error(f"--{name} must be at least 1.")
    if options.threads:
        torch.set_num_threads(options.threads)
    return options


def in_turns(ways: Mapping[str, Callable[[], object]], repeats: int, warm_ups: int = 1) -> dict[str, Times]:
    """Median seconds of each way.

    In each turn a way runs `warm_ups` times untimed and then timed, as in the middle of a run of its own: what another
    way leaves behind, memory given back to the kernel above all, is not its to pay for.
    """
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            for _ in range(warm_ups):
                way()
            cpu, wall = time.process_time(), time.perf_counter()
            way()
            times[name].append((time.process_time() - cpu, time.perf_counter() - wall))
    return {name: Times(*(statistics.median(column) for column in zip(*rows))) for name, rows in times.items()}


def count_flop(way: Callable[[], object]) -> int:
    """Floating-point operations of the matrix products, convolutions and attention that `way` runs."""
    with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION_FLOP) as counter:
        way()
    return counter.get_total_flops()


@dataclass(frozen=True)
class Peak:
    """The machine's rate at large float32 matrix products, of the faster GEMM backend: operations per CPU second."""

    flop_per_cpu_s: float

    def seconds(self, flop: int) -> float:
        """CPU seconds that so many operations take at least."""
        return flop / self.flop_per_cpu_s


def measure_peak(edge: int = 2048, multiply: Sequence[Callable[[Tensor, Tensor], Tensor]] | None = None) -> Peak:
    """Best of eight products of `edge` x `edge` matrices, by the fastest of the given functions (the GEMM backends)."""
    if multiply is None:
        multiply = (torch.mm, onednn_matmul) if onednn_is_available() else (torch.mm,)
    one, other = torch.randn(2, edge, edge, generator=torch.Generator().manual_seed(0))
    best = float("inf")
    for function in multiply:
        for _ in range(8):
            cpu = time.process_time()
            function(one, other)
            best = min(best, time.process_time() - cpu)
    return Peak(2 * edge**3 / best)


def relative_difference(ours: Iterable[Tensor], baseline: Iterable[Tensor]) -> float:
    """Largest |ours - baseline| of all pairs, each over the largest |baseline| of its pair.

    Pairs whose baseline is zero in theory (attention key biases and the like) would divide noise by noise: where the
    baseline stays below 1e-7, the difference itself counts. What is not finite is infinitely far.
    """
    pairs = list(zip(ours, baseline, strict=True))
    if not pairs:
        raise ValueError("there is nothing to compare.")
    worst = 0.0
    for one, other in pairs:
        if one.shape != other.shape:
            raise ValueError(f"results of different shapes cannot be compared: {one.shape}, {other.shape}.")
        one, other = one.detach().double(), other.detach().double()
        if not (one.isfinite().all() and other.isfinite().all()):
            return float("inf")
        difference, scale = float((one - other).abs().max()), float(other.abs().max())
        worst = max(worst, difference / scale if scale > 1e-7 else difference)
    return worst


def report(results: list[Result], path: Path | None) -> None:
    """Print the results as a table, and write them as JSON where asked to."""
    table = Table(
        title="medians in seconds of CPU time (wall time)",
        caption="difference: largest, relative; bound: FLOP of ours at this machine's GEMM rate; / bound: ours over it",
    )
    for column in ("name", "baseline", "ours", "ratio", "difference", "bound", "/ bound"):
        table.add_column(column, justify="left" if column == "name" else "right", no_wrap=column == "name")
    for result in results:
        table.add_row(
            result.name,
            f"{result.baseline.cpu:.4g} ({result.baseline.wall:.4g})",
            f"{result.ours.cpu:.4g} ({result.ours.wall:.4g})",
            f"{result.ratio:.2f}",
            "not compared" if result.max_rel_diff is None else f"{result.max_rel_diff:.1e}",
            "" if result.bound_s is None else f"{result.bound_s:.4g}",
            "" if result.distance is None else f"{result.distance:.2f}",
        )
    console.print(table)
    for result in results:
        if result.note:
            console.print(f"{result.name}: {result.note}")
    console.print(machine())
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        content = [result.as_json() for result in results]
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
