"""Peak memory of the whole training step at the published size, batch 2, float32, with the state of AdamW.

    python -m benchmarks.memory
    python -m benchmarks.memory --organs 24 --json memory.json

Every way runs in a fresh process of its own, one after the other, for one step that makes the state of AdamW and
--repeats timed ones, dropout as published. The figure is that process's largest resident size ever (VmHWM, Linux).
Nothing is subtracted: Python, the imports, weights, gradients, both moments, activations and what the allocator keeps
all count. What was resident before the first step is printed beside it. GB are 10^9 bytes.

    memory/N/fp32             ours, all activations kept
    memory/N/checkpointing    ours, the blocks of both towers computed again (--activation_checkpointing)

The baseline is that of benchmarks/step.py. With the captions of 24 organs it needs more memory than most machines have:
it runs with the captions of two smaller numbers of organs, --baseline_organs, and its memory and time are continued on
a straight line. Its image side has all organs. `max_rel_diff` of checkpointing compares its gradients with those of
ours without, under the same dropout; the step's equality with the baseline is the matter of benchmarks/step.py.
"""

import argparse
import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from rich.table import Table
from torch import Tensor

from benchmarks.inputs import make_batch, make_model
from benchmarks.measure import Result, Times, add_arguments, console, parse_arguments, relative_difference, report
from benchmarks.step import OurStep, PublishedStep
from modeling_fvlm import FVLMModel

PLAIN, CHECKPOINTING, BASELINE = "fp32", "checkpointing", "baseline"
GB = 1e9
# To refuse a run that would be killed. Rounded up from measured peaks at 24 organs: ours 6.2 GB, the baseline 14.0 and
# 16.3 GB with the captions of 2 and 4 organs.
OURS_NEED_GB = 7.0
BASELINE_NEEDS_GB, BASELINE_NEEDS_GB_PER_ORGAN = 12.0, 1.2
# glibc's settings that keep freed memory; they change what is measured.
ALLOCATOR_SETTINGS = ("MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_")


@dataclass(frozen=True)
class Usage:
    """What the steps of one process took.

    Attributes:
        start_gb: Resident before the first step: imports, weights, inputs.
        peak_gb: Largest resident size of the process.
        time: Median of the timed steps.
    """

    start_gb: float
    peak_gb: float
    time: Times

    def continued(self, other: "Usage", steps: float) -> "Usage":
        """On the straight line through this one and `other`, so many times their distance behind `other`."""
        return Usage(
            other.start_gb,
            other.peak_gb + steps * (other.peak_gb - self.peak_gb),
            other.time * (1 + steps) + self.time * -steps,
        )


def memory_gb(field: str, path: str = "/proc/self/status") -> float:
    """A line of a memory report of Linux: `VmRSS` and `VmHWM` of this process, `MemAvailable` of /proc/meminfo.

    VmHWM, not `ru_maxrss`: the latter begins at the size of the process that started this one.
    """
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024 / GB
    raise RuntimeError(f"{path} has no line {field}: this benchmark needs Linux.")


def require_memory(needed_gb: float, what: str) -> None:
    """Refuse what would not fit.

    Raises:
        MemoryError: If less is free.
    """
    free_gb = memory_gb("MemAvailable", "/proc/meminfo")
    if free_gb < needed_gb:
        raise MemoryError(
            f"{what} needs about {needed_gb:.0f} GB and {free_gb:.1f} GB are free: end other programs, or ask for less "
            "(fewer --baseline_organs here)."
        )


def in_fresh_process(function: Callable, *arguments):
    """The result of a function, run in a new Python process that ends with it.

    Raises:
        MemoryError: If that process was killed.
    """
    context = multiprocessing.get_context("spawn")
    try:
        with ProcessPoolExecutor(max_workers=1, mp_context=context) as pool:
            return pool.submit(function, *arguments).result()
    except BrokenProcessPool as error:
        raise MemoryError(
            f"the process of {function.__name__}{arguments} was killed, as for want of memory."
        ) from error


def measure_steps(step: Callable[[], None], repeats: int) -> Usage:
    """Run a step once and then timed; the peak is that of the whole process until now."""
    start_gb = memory_gb("VmRSS")
    times = []
    for turn in range(1 + repeats):
        cpu, wall = time.process_time(), time.perf_counter()
        step()
        if turn:
            times.append((time.process_time() - cpu, time.perf_counter() - wall))
    return Usage(start_gb, memory_gb("VmHWM"), Times(*(median(column) for column in zip(*times))))


def measure_way(
    way: str,
    num_organs: int,
    text_organs: int,
    repeats: int,
    threads: int | None,
    make: tuple[Callable, Callable] = (make_model, make_batch),
) -> Usage:
    """Measure one way in this process.

    Args:
        text_organs: Organs whose captions the baseline encodes.
        threads: Of torch; None: its own choice.
        make: Model and batch of a number of organs.
    """
    if threads:
        torch.set_num_threads(threads)
    build_model, build_batch = make
    model, batch = build_model(num_organs), build_batch(num_organs)
    if way == BASELINE:
        return measure_steps(PublishedStep(model, batch, text_organs).step, repeats)
    if way == CHECKPOINTING:
        model.activation_checkpointing_enable()  # as the Trainer does for --activation_checkpointing
    ours = OurStep(model, batch)
    return measure_steps(lambda: ours.step(attention_dropout=True), repeats)


def gradients(model: FVLMModel, step: OurStep) -> list[Tensor]:
    """Of one forward with dropout, the same numbers at every call."""
    torch.manual_seed(1)
    step.forward().loss.backward()
    taken = [weight.grad for weight in model.parameters() if weight.grad is not None]
    model.zero_grad(set_to_none=True)
    return taken


def checkpointing_difference(
    num_organs: int, threads: int | None, make: tuple[Callable, Callable] = (make_model, make_batch)
) -> float:
    """Largest relative difference of the gradients with and without activation checkpointing, under dropout."""
    if threads:
        torch.set_num_threads(threads)
    build_model, build_batch = make
    model = build_model(num_organs)
    step = OurStep(model, build_batch(num_organs))
    plain = gradients(model, step)
    model.activation_checkpointing_enable()
    return relative_difference(gradients(model, step), plain)


def measure_baseline(num_organs: int, baseline_organs: tuple[int, int], repeats: int, threads: int | None):
    """Usage of the baseline with the captions of all organs, and what to know of it."""
    parts = [num_organs] if num_organs <= max(baseline_organs) else sorted(baseline_organs)
    usages = []
    for part in parts:
        require_memory(BASELINE_NEEDS_GB + part * BASELINE_NEEDS_GB_PER_ORGAN, f"the baseline on {part} organs")
        usages.append(in_fresh_process(measure_way, BASELINE, num_organs, part, repeats, threads))
    if len(parts) == 1:
        return usages[0], f"baseline resident before the first step: {usages[0].start_gb:.2f} GB"
    few, more = parts
    usage = usages[0].continued(usages[1], (num_organs - more) / (more - few))
    return usage, (
        f"baseline measured with the captions of {few} and {more} organs, {usages[0].peak_gb:.2f} and "
        f"{usages[1].peak_gb:.2f} GB, and continued on a straight line to {num_organs}, its time as well"
    )


def compare(num_organs: int, baseline_organs: tuple[int, int], repeats: int, threads: int | None) -> list[Result]:
    """Measure all ways for one number of organs."""
    baseline, note = measure_baseline(num_organs, baseline_organs, repeats, threads)
    results = []
    for way in (PLAIN, CHECKPOINTING):
        require_memory(OURS_NEED_GB, f"memory/{num_organs}/{way}")
        ours = in_fresh_process(measure_way, way, num_organs, 0, repeats, threads)
        difference, compared = None, "gradients are compared in benchmarks.step"
        if way == CHECKPOINTING:
            difference = in_fresh_process(checkpointing_difference, num_organs, threads)
            compared = "gradients compared with ours without checkpointing, under the same dropout"
        remark = f"{note}; ours resident before the first step: {ours.start_gb:.2f} GB; {compared}"
        if kept := [name for name in ALLOCATOR_SETTINGS if name in os.environ]:
            remark += f"; with {', '.join(kept)} set, which keep freed memory"
        extra = {
            "baseline_gb": baseline.peak_gb,
            "ours_gb": ours.peak_gb,
            "ratio": baseline.peak_gb / ours.peak_gb,  # of memory: it takes the place of the ratio of seconds
            "ours_start_gb": ours.start_gb,
        }
        results.append(Result(f"memory/{num_organs}/{way}", baseline.time, ours.time, difference, remark, extra=extra))
    return results


def print_memory(results: list[Result]) -> None:
    """A table in GB."""
    table = Table(title="largest resident size of a process in GB (10^9 bytes)")
    for column in ("name", "baseline", "ours", "ratio", "ours before the first step"):
        table.add_column(column, justify="left" if column == "name" else "right", no_wrap=column == "name")
    for result in results:
        figures = [result.extra[key] for key in ("baseline_gb", "ours_gb", "ratio", "ours_start_gb")]
        table.add_row(result.name, *(f"{figure:.2f}" for figure in figures))
    console.print(table)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--organs", type=int, nargs="+", default=[24], help="Numbers of organs (default: 24).")
    parser.add_argument(
        "--baseline_organs",
        type=int,
        nargs=2,
        default=[2, 4],
        help="The two numbers of organs whose captions the baseline encodes (default: 2 4).",
    )
    add_arguments(parser, repeats=1)
    options = parse_arguments(parser, arguments)
    if len(set(options.baseline_organs)) < 2:
        parser.error("--baseline_organs must be two different numbers: a line needs two points.")
    results, status = [], 0
    for number in options.organs:
        try:
            results += compare(number, tuple(options.baseline_organs), options.repeats, options.threads)
        except MemoryError as error:
            print(f"error: {error}", file=sys.stderr)
            status = 2
    print_memory(results)
    report(results, options.json)
    return status


if __name__ == "__main__":
    raise SystemExit(main())
