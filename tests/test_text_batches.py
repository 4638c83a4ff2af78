"""Rows and buckets of texts: every text in its place, the cheapest of all cuts."""

import itertools
import random

import pytest
import torch

from modeling_fvlm.text_batches import PackedTexts, best_row_length, length_buckets, pack_rows, real_tokens


def test_buckets_are_the_cheapest_of_all_cuts():
    """Against every cut of the sorted lengths, tried one by one."""
    generator = random.Random(0)
    for _ in range(30):
        lengths = sorted(generator.choices(range(0, 30), k=generator.randint(1, 9)))
        cost = generator.choice([0, 5, 20, 1000])
        sizes, longest = length_buckets(lengths, cost)
        assert sum(sizes) == len(lengths) and min(sizes) > 0 and min(longest) >= 1
        starts = [0, *itertools.accumulate(sizes)]
        assert all(max(lengths[a:b]) <= end for a, b, end in zip(starts, starts[1:], longest))

        def price(cuts, lengths=lengths, cost=cost):
            return sum((b - a) * lengths[b - 1] + cost for a, b in itertools.pairwise(cuts))

        places = range(1, len(lengths))
        all_cuts = [c for n in range(len(lengths)) for c in itertools.combinations(places, n)]
        assert price(starts) == min(price([0, *cuts, len(lengths)]) for cuts in all_cuts)


@pytest.mark.parametrize("count", [1, 8, 48, 700])
def test_packed_texts_never_overlap_and_waste_little(count):
    generator = random.Random(count)
    lengths = [min(120, max(3, int(generator.lognormvariate(3.1, 0.6)))) for _ in range(count)]
    row_length = best_row_length(lengths)
    starts, num_rows = pack_rows(lengths, row_length)
    taken = sorted((start, start + length) for start, length in zip(starts, lengths))
    assert all(stop <= start for (_, stop), (start, _) in itertools.pairwise(taken))
    assert all(start // row_length == (stop - 1) // row_length for start, stop in taken), "within one row"
    assert taken[-1][1] <= num_rows * row_length
    if count > 8:
        assert num_rows * row_length < 1.1 * sum(lengths)


def test_every_token_is_found_in_its_row():
    attention_mask = torch.tensor([[1, 1, 1, 0], [0, 0, 1, 1], [1, 0, 0, 0], [0, 0, 0, 0]])
    input_ids = torch.arange(10, 26).view(4, 4)
    texts = PackedTexts(input_ids, real_tokens(attention_mask))
    found = {}
    rows = zip(texts.input_ids.flatten().tolist(), texts.position_ids.flatten().tolist(), texts.text_of_token.flatten())
    for token, position, text in rows:
        if text >= 0:
            found.setdefault(int(text), []).append((token, position))
    assert found == {
        0: [(10, 0), (11, 1), (12, 2)],
        1: [(16, 2), (17, 3)],
        2: [(18, 0)],
        3: [(22, 0)],
    }
    is_seen = texts.attention_mask(None)[:, 0]
    additive = texts.attention_mask(torch.float32)[:, 0]
    assert torch.equal(is_seen, additive == 0) and additive.min() < -1e30
    assert is_seen.diagonal(dim1=1, dim2=2).all()
    # 3 + 2 + 1 + 1 tokens see their own text, padding sees padding
    padding = (texts.text_of_token < 0).sum(1)
    assert int(is_seen.sum()) == 9 + 4 + 1 + 1 + int((padding**2).sum())
