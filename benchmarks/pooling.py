"""Organ bookkeeping and organ pooling, forward and backward, against the published loops over organs and patients.

    python -m benchmarks.pooling
    python -m benchmarks.pooling --organs 24 --json pooling.json

`bookkeeping/N`: which patches hold which organ, and which organs are whole; ours runs in the collator, on numpy.
`pooling/N`: every organ's query over that organ's tokens of four levels of 1,232 tokens, width 768, dropout 0.1.
"""

import argparse

import numpy as np
import torch
from torch import Tensor

from benchmarks.inputs import PATCH_SIZE, make_batch, make_model
from benchmarks.measure import (
    Peak,
    Result,
    add_arguments,
    count_flop,
    in_turns,
    measure_peak,
    parse_arguments,
    relative_difference,
    report,
)
from benchmarks.published import organ_flags, pool_organs, pooling_attention
from modeling_fvlm.geometry import organ_bookkeeping

NUM_LEVELS = 4


def our_flags(mask: Tensor, num_organs: int, patch_size: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """As `FVLMCollator.prepare` finds them."""
    start, size = (0, 0, 0), mask.shape[1:]
    flags = [organ_bookkeeping(patient, start, size, num_organs, patch_size) for patient in mask.numpy()]
    tokens, complete = (torch.from_numpy(np.stack(column)) for column in zip(*flags))
    return tokens, complete


def bookkeeping(num_organs: int, repeats: int) -> Result:
    """Time and compare the flags of a batch of two."""
    mask = make_batch(num_organs).mask
    theirs, ours = organ_flags(mask, num_organs, PATCH_SIZE), our_flags(mask, num_organs, PATCH_SIZE)
    difference = relative_difference([flag.float() for flag in ours], [flag.float() for flag in theirs])
    times = in_turns(
        {
            "baseline": lambda: organ_flags(mask, num_organs, PATCH_SIZE),
            "ours": lambda: our_flags(mask, num_organs, PATCH_SIZE),
        },
        repeats,
    )
    return Result(f"bookkeeping/{num_organs}", times["baseline"], times["ours"], difference)


def pooling(num_organs: int, repeats: int, peak: Peak) -> Result:
    """Time forward and backward of the pooling with dropout; compare outputs and gradients without."""
    model = make_model(num_organs)
    organ_tokens, _ = our_flags(make_batch(num_organs).mask, num_organs, PATCH_SIZE)
    generator = torch.Generator().manual_seed(1)
    tokens = organ_tokens.shape[2]
    levels = [torch.randn(len(organ_tokens), tokens, 768, generator=generator) for _ in range(NUM_LEVELS)]
    levels = [level.requires_grad_() for level in levels]
    weights = list(model.organ_pooling.parameters())
    # What flows back into the pooling: any fixed direction will do.
    direction = torch.randn(*organ_tokens.shape[:2], 768, generator=generator)
    direction = direction * organ_tokens.any(-1)[..., None]

    def baseline() -> list[Tensor]:
        pooled = pool_organs(model, pooling_attention(model), levels, organ_tokens)
        return [pooled, *torch.autograd.grad((pooled * direction).sum(), [*levels, *weights])]

    def ours() -> list[Tensor]:
        pooled = model.organ_pooling(tuple(levels), organ_tokens)[0]
        return [pooled, *torch.autograd.grad((pooled * direction).sum(), [*levels, *weights])]

    rate, model.organ_pooling.dropout = model.organ_pooling.dropout, 0.0
    is_present = organ_tokens.any(-1)
    one, other = ours(), baseline()
    one[0], other[0] = one[0][is_present], other[0][is_present]
    difference = relative_difference(_without_key_bias(one), _without_key_bias(other))
    model.organ_pooling.dropout = rate
    times = in_turns({"baseline": baseline, "ours": ours}, repeats)
    note = "forward and backward, batch 2"
    # By `backward`: the counter's module hooks refuse `autograd.grad`.
    flop = count_flop(lambda: (model.organ_pooling(tuple(levels), organ_tokens)[0] * direction).sum().backward())
    return Result(f"pooling/{num_organs}", times["baseline"], times["ours"], difference, note, peak.seconds(flop))


def _without_key_bias(results: list[Tensor]) -> list[Tensor]:
    """The gradient of the keys' bias is zero in theory and noise in the baseline: left out of the comparison."""
    kept = []
    for tensor in results:
        if tensor.ndim == 1 and len(tensor) == 3 * 768:
            kept += [tensor[:768], tensor[2 * 768 :]]
        else:
            kept.append(tensor)
    return kept


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--organs", type=int, nargs="+", default=[4, 24], help="Numbers of organs (default: 4 24).")
    add_arguments(parser, repeats=5)
    options = parse_arguments(parser, arguments)
    results = [bookkeeping(number, options.repeats) for number in options.organs]
    peak = measure_peak()
    results += [pooling(number, options.repeats, peak) for number in options.organs]
    report(results, options.json)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
