"""The gradient cache: memory against the size of the contrast, and the time it takes over one graph of the whole.

    python -m benchmarks.gradient_cache
    python -m benchmarks.gradient_cache --parts memory --contrasts 2 32 256
    python -m benchmarks.gradient_cache --parts full --micro_batch_size 1

Steps of training with AdamW, float32, dropout as published, 4 organs. Every figure of memory is the largest resident
size (VmHWM, Linux) of a fresh process that makes one step, after forward and backward of a first chunk; nothing is
subtracted. GB are 10^9 bytes.

    memory  a small model (crop 48 x 96 x 128, two blocks of width 96), contrasts of 2 to 256 patients. Volumes are read
            again for the second pass (--held_volumes_gb 0 of the training command). Baseline: the same at the smallest
            contrast, so a ratio of 1 is a flat line; beside it one graph of the whole contrast, while it is small.
    time    the same model, chunks of several sizes: cached against one graph of the whole, with the gradients of both
            compared, without dropout.
    full    the published size: one step of --full_contrast patients, volumes held. Its baseline in time is one graph of
            --full_whole patients, multiplied to the contrast.
"""

import argparse
import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial

import torch
from rich.table import Table
from torch import Tensor

from benchmarks.inputs import PATCH_SIZE, VOCABULARY, VOLUME_SIZE, make_batch, make_model
from benchmarks.measure import (
    Result,
    Times,
    add_arguments,
    console,
    in_turns,
    parse_arguments,
    relative_difference,
    report,
)
from benchmarks.memory import in_fresh_process, memory_gb
from benchmarks.pooling import our_flags
from benchmarks.text import unique_captions
from modeling_fvlm import FVLMConfig, FVLMModel
from modeling_fvlm.loss import organ_contrastive_loss
from training_fvlm.embed import Embedded, embed
from training_fvlm.gradient_cache import GradientCache

NUM_ORGANS = 4
SMALL_SIZE, SMALL_PATCH = (48, 96, 128), (4, 8, 8)
PARTS = ("memory", "time", "full")
MOST_IN_ONE_GRAPH = 32  # patients of the small model; some 3 GB


def small_model(dropout: float = 0.1) -> FVLMModel:
    """A model that a CPU trains: two blocks in each tower."""
    vision = {"volume_size": SMALL_SIZE, "patch_size": SMALL_PATCH, "hidden_size": 96, "num_hidden_layers": 2}
    vision |= {"num_attention_heads": 2, "intermediate_size": 384, "feature_levels": [0]}
    vision |= {"hidden_dropout": dropout, "attention_dropout": dropout}
    text = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 512}
    text |= {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout, "vocab_size": VOCABULARY}
    config = FVLMConfig(
        organs=[f"organ_{number}" for number in range(NUM_ORGANS)],
        vision_config=vision,
        text_config={"model_type": "bert", **text},
        pooling_dropout=dropout,
        projection_dim=128,
    )
    torch.manual_seed(0)
    model = FVLMModel(config).train()
    torch.nn.init.normal_(model.organ_pooling.query_tokens, std=0.02)
    return model


def model_of(size: str, dropout: bool = True) -> FVLMModel:
    """The small model, or the published architecture."""
    return small_model(0.1 if dropout else 0.0) if size == "small" else make_model(NUM_ORGANS, dropout)


def read(size: str, first: int, count: int) -> dict[str, Tensor]:
    """Patients from `first` on, as the collator hands them over; the same ones at every call."""
    volume_size, patch_size = (SMALL_SIZE, SMALL_PATCH) if size == "small" else (VOLUME_SIZE, PATCH_SIZE)
    parts = [make_batch(NUM_ORGANS, 1, seed=number, volume_size=volume_size) for number in range(first, first + count)]
    batch = parts[0]
    batch.volume = torch.cat([part.volume for part in parts])
    batch.token_ids = [sum((part.token_ids[organ] for part in parts), []) for organ in range(NUM_ORGANS)]
    flags = [our_flags(part.mask, NUM_ORGANS, patch_size) for part in parts]
    input_ids, attention_mask, caption_index = unique_captions(batch, NUM_ORGANS)
    # Of the real tokens: another call may pad otherwise.
    text_hash = torch.tensor([hash(tuple(row[:end])) for row, end in zip(input_ids.tolist(), attention_mask.sum(1))])
    return {
        "volume": batch.volume,
        "organ_token_mask": torch.cat([tokens for tokens, _ in flags]),
        "organ_is_complete": torch.cat([complete for _, complete in flags]),
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "text_hash": text_hash,
        "caption_index": caption_index,
        "caption_hash": text_hash[caption_index],
        "organ_is_abnormal": torch.cat([part.is_abnormal for part in parts]),
        "row": torch.arange(first, first + count),
    }


class CachedStep:
    """A step of `FVLMTrainer` with the gradient cache, on one process.

    Args:
        size: "small" or "full".
        model: The model.
        contrast, micro: Patients of a contrast, and of a chunk.
        is_held: Hold all volumes between the passes; off: read them again.
    """

    def __init__(self, size: str, model: FVLMModel, contrast: int, micro: int, is_held: bool):
        self.size, self.model, self.contrast_size, self.micro = size, model, contrast, micro
        self.starts = range(0, contrast, micro)
        num_held = len(self.starts) if is_held else 0
        self.cache = GradientCache(self, num_chunks=len(self.starts), num_held=num_held, first_patient=0, seed=0)

    def gradients(self, chunks: Iterator[dict[str, Tensor]] | None = None) -> None:
        """Forward and backward; `chunks` where they are at hand, in the order of the passes."""
        for inputs in self.chunks() if chunks is None else chunks:
            self.cache.take(self.model, inputs, contrast_number=0)

    def chunks(self) -> Iterator[dict[str, Tensor]]:
        """The chunks of the first pass, then those that are read a second time."""
        for start in (*self.starts, *self.starts[self.cache.num_held :]):
            yield read(self.size, start, min(self.micro, self.contrast_size - start))

    # What the cache asks of its host
    def to_device(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return inputs

    def contrast(self, embedded: Embedded) -> Tensor:
        return loss_of(embedded)

    def backward(self, scalar: Tensor) -> None:
        scalar.backward()

    def without_sync(self) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext()

    def teach_images(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {}

    def teach_texts(self, inputs: dict[str, Tensor]) -> None:
        return None


def loss_of(embedded: Embedded) -> Tensor:
    """The published loss."""
    fixed = embedded.fixed
    return organ_contrastive_loss(
        embedded.live["image_embeds"],
        embedded.live["text_embeds"],
        fixed["caption_hash"],
        fixed["is_abnormal"].bool(),
        fixed["is_valid"].bool(),
        embedded.parameters["logit_scale"],
    ).loss


def one_graph(model: FVLMModel, inputs: dict[str, Tensor]) -> None:
    """Forward and backward of the whole contrast at once."""
    loss_of(embed(model, inputs)).backward()


def peak_of_step(size: str, contrast: int, micro: int | None, threads: int | None) -> tuple[float, Times]:
    """Peak memory in GB of this process after one step with AdamW, and its seconds without the reading.

    Args:
        micro: Patients of a chunk; None: one graph of all.
    """
    if threads:
        torch.set_num_threads(threads)
    model = model_of(size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    first = read(size, 0, min(contrast, micro or contrast))
    if micro is None:
        inputs = first
        run: Callable[[], None] = partial(one_graph, model, inputs)
    else:
        run = CachedStep(size, model, contrast, micro, is_held=size == "full").gradients
    # Warm: a small step would otherwise pay for what the first step of a process takes, a large one would not.
    one_graph(model, first)
    del first
    model.zero_grad(set_to_none=True)
    cpu, wall = time.process_time(), time.perf_counter()
    run()
    optimizer.step()
    return memory_gb("VmHWM"), Times(time.process_time() - cpu, time.perf_counter() - wall)


def gradient_difference(contrast: int, micro: int, threads: int | None) -> float:
    """Largest relative difference of the gradients of both ways, without dropout."""
    if threads:
        torch.set_num_threads(threads)
    model = model_of("small", dropout=False)

    def taken() -> list[Tensor]:
        gradients = [
            weight.grad
            for name, weight in model.named_parameters()
            # Without influence on a softmax: noise.
            if weight.grad is not None and not name.endswith("attention.self.key.bias")
        ]
        model.zero_grad(set_to_none=True)
        return gradients

    one_graph(model, read("small", 0, contrast))
    whole = taken()
    CachedStep("small", model, contrast, micro, is_held=False).gradients()
    return relative_difference(taken(), whole)


def memory_part(options: argparse.Namespace) -> list[Result]:
    """Peaks of the small model."""
    results: list[Result] = []
    micro, threads = options.micro_batch_size, options.threads
    smallest: tuple[float, Times] | None = None
    for contrast in sorted(options.contrasts):
        peak, seconds = in_fresh_process(peak_of_step, "small", contrast, micro, threads)
        smallest = smallest or (peak, seconds)
        whole = None
        if contrast <= MOST_IN_ONE_GRAPH:
            whole = in_fresh_process(peak_of_step, "small", contrast, None, threads)[0]
        note = f"peak memory; baseline: the cache at a contrast of {min(options.contrasts)}; chunks of {micro}"
        extra = {"baseline_gb": smallest[0], "ours_gb": peak, "ratio": smallest[0] / peak, "one_graph_gb": whole}
        name = f"gradient_cache/memory/{contrast}"
        results.append(Result(name, smallest[1], seconds, None, note, extra=extra))
    return results


def time_part(options: argparse.Namespace) -> list[Result]:
    """Time of the small model, cached in chunks of several sizes and in one graph."""
    contrast = options.time_contrast
    model = model_of("small")
    inputs = read("small", 0, contrast)
    ways: dict[str, Callable[[], None]] = {"whole": lambda: one_graph(model, inputs)}
    for micro in options.time_chunks:
        step = CachedStep("small", model, contrast, micro, is_held=False)
        chunks = list(step.chunks())
        ways[f"chunks of {micro}"] = lambda step=step, chunks=chunks: step.gradients(iter(chunks))
    times = in_turns(ways, options.repeats)
    results = []
    for micro in options.time_chunks:
        cached = times[f"chunks of {micro}"]
        overhead = cached.cpu / times["whole"].cpu
        difference = in_fresh_process(gradient_difference, contrast, micro, options.threads)
        note = (
            f"baseline: one graph of the whole contrast of {contrast}; ours in chunks of {micro}: {overhead:.2f} times "
            "its time (4/3 if a backward pass takes twice a forward pass)"
        )
        name = f"gradient_cache/time/{contrast}/{micro}"
        results.append(Result(name, times["whole"], cached, difference, note, extra={"overhead": overhead}))
    return results


def full_part(options: argparse.Namespace) -> list[Result]:
    """One step of the published size."""
    contrast, few, micro = options.full_contrast, options.full_whole, options.micro_batch_size
    whole_gb, whole = in_fresh_process(peak_of_step, "full", few, None, options.threads)
    peak, seconds = in_fresh_process(peak_of_step, "full", contrast, micro, options.threads)
    whole = whole * (contrast / few)
    overhead = seconds.cpu / whole.cpu
    note = (
        f"peak memory of a step of {contrast} patients in chunks of {micro}, AdamW and all volumes included; "
        f"baseline: one graph of {few} patients, its peak as it is; the cache takes {overhead:.2f} times its time, "
        f"multiplied from {few} to {contrast}: {seconds.cpu:.0f} against {whole.cpu:.0f} CPU seconds; gradients are "
        "compared in gradient_cache/time"
    )
    extra = {"baseline_gb": whole_gb, "ours_gb": peak, "ratio": whole_gb / peak, "overhead": overhead}
    return [Result(f"gradient_cache/full/{contrast}", whole, seconds, None, note, extra=extra)]


def print_memory(results: list[Result]) -> None:
    """Peaks as a table."""
    table = Table(title="largest resident size of a process in GB (10^9 bytes)")
    for column in ("name", "cached", "one graph"):
        table.add_column(column, justify="left" if column == "name" else "right")
    for result in results:
        if "ours_gb" in result.extra:
            whole = result.extra.get("one_graph_gb", result.extra["baseline_gb"])
            table.add_row(result.name, f"{result.extra['ours_gb']:.2f}", "" if whole is None else f"{whole:.2f}")
    console.print(table)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="Default: all.")
    parser.add_argument(
        "--contrasts", type=int, nargs="+", default=[2, 8, 32, 128, 256], help="Of part memory (default: %(default)s)."
    )
    parser.add_argument("--time_contrast", type=int, default=32, help="Of part time (default: %(default)s).")
    parser.add_argument(
        "--time_chunks", type=int, nargs="+", default=[1, 2, 4, 8], help="Of part time (default: %(default)s)."
    )
    parser.add_argument(
        "--micro_batch_size", type=int, default=2, help="Patients of a chunk, but in part time (default: %(default)s)."
    )
    parser.add_argument("--full_contrast", type=int, default=32, help="Of part full (default: %(default)s).")
    parser.add_argument(
        "--full_whole", type=int, default=4, help="Patients in one graph in part full (default: %(default)s)."
    )
    add_arguments(parser, repeats=3)
    options = parse_arguments(parser, arguments)
    parts = {"memory": memory_part, "time": time_part, "full": full_part}
    results, status = [], 0
    for part in options.parts:
        try:
            results += parts[part](options)
        except MemoryError as error:
            print(f"error: {error}", file=sys.stderr)
            status = 2
    print_memory(results)
    report(results, options.json)
    return status


if __name__ == "__main__":
    raise SystemExit(main())
