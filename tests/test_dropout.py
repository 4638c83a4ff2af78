"""Dropout made for the CPU: the rate it promises, the same mask backward, replayed by checkpoints, exact gradients."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from modeling_fvlm import dropout as dropout_module
from modeling_fvlm.dropout import Dropout, KeptElements, _SeededDropout, attention_with_dropout, rounded_rate

SHAPE = (2, 3, 7, 4)  # (batch, heads, tokens, head size): no two edges alike


@pytest.fixture
def small_chunks(monkeypatch):
    """Several chunks even for small tensors, the last one shorter."""
    monkeypatch.setattr(dropout_module, "ELEMENTS_AT_ONCE", 16)
    monkeypatch.setattr(dropout_module, "LOGITS_AT_ONCE", 4 * 7 * 7)


def test_the_rate_is_kept_and_the_mean_too():
    torch.manual_seed(0)
    values = torch.full((1500, 1001), 3.0)
    for rate in (0.1, 0.5, 0.9):
        dropped = Dropout(rate).train()(values)
        is_kept = dropped != 0
        # five standard deviations of a binomial share
        assert abs(float((~is_kept).float().mean()) - rate) < 5 * (rate * (1 - rate) / values.numel()) ** 0.5 + 2**-17
        torch.testing.assert_close(dropped[is_kept], torch.full_like(dropped[is_kept], 3 / (1 - rounded_rate(rate))))
        # neighbours are dropped independently of each other, also across the four elements of one random word
        for shift in (1, 2, 4):
            both = (~is_kept.flatten()[shift:] & ~is_kept.flatten()[:-shift]).float().mean()
            assert abs(float(both) - rate**2) < 0.003


def test_what_is_dropped_hangs_on_the_seed_alone():
    one, same, other = (KeptElements(seed, 0.3, 100).draw(torch.empty(100)) for seed in (1, 1, 2))
    assert torch.equal(one, same) and not torch.equal(one, other)
    layer, values = Dropout(0.3).train(), torch.ones(50)
    torch.manual_seed(4)
    first, second = layer(values), layer(values)
    torch.manual_seed(4)
    assert torch.equal(layer(values), first) and not torch.equal(first, second)


def test_gradients_are_those_of_the_mask_of_the_forward_pass(small_chunks):
    def run(values):
        torch.manual_seed(3)
        return _SeededDropout.apply(values, 0.3)

    values = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(run, (values,))
    assert torch.autograd.gradcheck(run, (values.detach().T.requires_grad_(),)), "not contiguous"


def test_fewer_queries_than_keys(small_chunks):
    generator = torch.Generator().manual_seed(2)
    query = torch.randn(2, 3, 5, 4, dtype=torch.float64, generator=generator).requires_grad_()
    key, value = (torch.randn(SHAPE, dtype=torch.float64, generator=generator).requires_grad_() for _ in range(2))

    def run(*tensors):
        torch.manual_seed(3)
        return attention_with_dropout(*tensors, None, 0.3, 0.5)

    assert run(query, key, value).shape == (2, 5, 3, 4)
    assert torch.autograd.gradcheck(run, (query, key, value))


@pytest.mark.parametrize("hides_keys", [False, True])
def test_attention_has_the_gradients_of_its_dropped_probabilities(small_chunks, hides_keys):
    key_is_real = torch.rand(2, 7, generator=torch.Generator().manual_seed(1)) > 0.3 if hides_keys else None
    generator = torch.Generator().manual_seed(2)
    tensors = [torch.randn(SHAPE, dtype=torch.float64, generator=generator).requires_grad_() for _ in range(3)]

    def run(query, key, value):
        torch.manual_seed(3)
        return attention_with_dropout(query, key, value, key_is_real, 0.3, 0.5)

    assert torch.autograd.gradcheck(run, tensors)

    # The same written out, with the mask drawn in the same chunks of heads.
    torch.manual_seed(3)
    kept = KeptElements(dropout_module.new_seed(), 0.3, 4 * 49)
    masks = torch.cat([kept.draw(torch.empty(heads, 7, 7, dtype=torch.float64)) for heads in (4, 2)]).view(2, 3, 7, 7)
    assert 0 < int((masks == 0).sum()) < masks.numel()
    query, key, value = tensors
    logits = query @ key.transpose(2, 3) * 0.5
    if hides_keys:
        logits = logits.masked_fill(~key_is_real[:, None, None], -torch.inf)
    context = (logits.softmax(-1) * masks / (1 - rounded_rate(0.3))) @ value
    torch.testing.assert_close(run(*tensors), context.transpose(1, 2), rtol=1e-12, atol=1e-12)


def test_without_dropout_it_is_ordinary_attention():
    query, key, value = torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(5))
    expected = F.scaled_dot_product_attention(query, key, value, scale=0.5).transpose(1, 2)
    torch.testing.assert_close(attention_with_dropout(query, key, value, None, 0.0, 0.5), expected)


def test_checkpointing_replays_both():
    layer = Dropout(0.4).train()

    def run(values):
        context = attention_with_dropout(values, values, values, None, 0.4, 0.5)
        return layer(context)

    gradients = []
    for is_checkpointed in (False, True):
        values = torch.randn(SHAPE, generator=torch.Generator().manual_seed(6)).requires_grad_()
        torch.manual_seed(7)
        output = checkpoint(run, values, use_reentrant=False) if is_checkpointed else run(values)
        gradients.append(torch.autograd.grad(output.square().sum(), values)[0])
    assert gradients[0].any() and torch.equal(*gradients)


def test_it_stands_aside_where_it_should():
    values = torch.randn(9, 5, requires_grad=True)
    assert torch.equal(Dropout(0.5).eval()(values), values)
    assert torch.equal(Dropout(0.0).train()(values), values)
    assert not Dropout(1.0).train()(values).any()
    assert isinstance(Dropout(0.1), nn.Dropout), "libraries look for it by its class"
    torch.manual_seed(0)
    compiled = torch.compile(Dropout(0.5).train(), backend="eager")(values)
    torch.manual_seed(0)
    assert torch.equal(compiled, F.dropout(values, 0.5)), "in a compiled graph it is PyTorch's own"


def test_bfloat16_is_dropped_too():
    dropped = Dropout(0.5).train()(torch.ones(1000, dtype=torch.bfloat16))
    assert dropped.dtype == torch.bfloat16 and set(dropped.tolist()) == {0.0, 2.0}
