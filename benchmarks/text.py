"""The text encoder on the captions of a batch, forward and backward: shared rows against padding to 384.

    python -m benchmarks.text
    python -m benchmarks.text --organs 24 --json text.json

`text/N`: BERT-base, batch 2, N organs, captions of 26 tokens in the mean. The baseline encodes organ by organ, every
caption padded to 384 tokens, attention materialised; above --baseline_organs it is timed on so many organs and
multiplied. Results and gradients are compared without dropout on those organs.
"""

import argparse

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.inputs import LONGEST_PUBLISHED, Batch, make_batch, make_model
from benchmarks.measure import (
    Result,
    add_arguments,
    count_flop,
    in_turns,
    measure_peak,
    parse_arguments,
    relative_difference,
    report,
)
from benchmarks.published import embed_captions, in_published_manner
from modeling_fvlm import FVLMModel


def padded_captions(batch: Batch, organs: int) -> tuple[Tensor, Tensor]:
    """Ids and mask `(organs, patients, 384)` of the first organs."""
    rows = batch.token_ids[:organs]
    ids = torch.zeros(len(rows), len(rows[0]), LONGEST_PUBLISHED, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for organ, captions in enumerate(rows):
        for patient, caption in enumerate(captions):
            ids[organ, patient, : len(caption)] = torch.tensor(caption)
            mask[organ, patient, : len(caption)] = 1
    return ids, mask


def unique_captions(batch: Batch, organs: int) -> tuple[Tensor, Tensor, Tensor]:
    """As the collator hands them over: different captions once, padded to the longest; places `(patients, organs)`."""
    places: dict[tuple[int, ...], int] = {}
    index = torch.tensor(
        [[places.setdefault(tuple(caption), len(places)) for caption in rows] for rows in batch.token_ids[:organs]]
    )
    longest = max(map(len, places))
    ids = torch.zeros(len(places), longest, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for caption, place in places.items():
        ids[place, : len(caption)] = torch.tensor(caption)
        mask[place, : len(caption)] = 1
    return ids, mask, index.T


def compare(num_organs: int, baseline_organs: int, repeats: int) -> Result:
    """Time and compare one number of organs."""
    batch = make_batch(num_organs)
    part = min(num_organs, baseline_organs)

    def baseline(model: FVLMModel) -> Tensor:
        return embed_captions(model, *padded_captions(batch, part))

    def ours(model: FVLMModel, organs: int) -> Tensor:
        ids, mask, index = unique_captions(batch, organs)
        return F.embedding(index, model.get_text_features(ids, mask))

    exact = make_model(num_organs, published_dropout=False)
    weights = [*exact.text_model.parameters(), *exact.text_projection.parameters()]
    direction = torch.randn(2, part, exact.config.projection_dim, generator=torch.Generator().manual_seed(1))
    one, other = ours(exact, part), baseline(in_published_manner(exact))
    results = [
        [embeds, *torch.autograd.grad((embeds * direction).sum(), weights, allow_unused=True)]
        for embeds in (one, other)
    ]
    names = ["embeds", *(name for name, _ in exact.text_model.named_parameters())]
    # The bias of the keys has no influence on a softmax: its gradient is noise in both.
    kept = [
        number
        for number, tensor in enumerate(results[1])
        if tensor is not None and not (number < len(names) and names[number].endswith("key.bias"))
    ]
    difference = relative_difference(
        [results[0][number].detach() for number in kept], [results[1][number].detach() for number in kept]
    )
    del exact, one, other, results, weights

    model = make_model(num_organs)

    def step(embeds: Tensor) -> None:
        embeds.sum().backward()
        model.zero_grad(set_to_none=True)

    published_model = in_published_manner(model)
    ways = {"baseline": lambda: step(baseline(published_model)), "ours": lambda: step(ours(model, num_organs))}
    times = in_turns(ways, repeats)
    theirs = times["baseline"] * (num_organs / part)
    bound_s = measure_peak().seconds(count_flop(ways["ours"]))
    note = "" if part == num_organs else f"baseline timed on {part} organs and multiplied by {num_organs / part:g}"
    return Result(f"text/{num_organs}", theirs, times["ours"], difference, note, bound_s)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--organs", type=int, nargs="+", default=[4, 24], help="Numbers of organs (default: 4 24).")
    parser.add_argument("--baseline_organs", type=int, default=2, help="Organs of the baseline (default: %(default)s).")
    add_arguments(parser, repeats=2)
    options = parse_arguments(parser, arguments)
    report([compare(number, options.baseline_organs, options.repeats) for number in options.organs], options.json)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
