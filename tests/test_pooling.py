"""Organ pooling against one nn.MultiheadAttention called per patient and organ, as the published model does."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from modeling_fvlm import OrganPooling, OrganProjection, pooling

PATIENTS, ORGANS, TOKENS, HIDDEN, HEADS = 3, 4, 10, 12, 3


def make_pooling(dropout=0.0):
    torch.manual_seed(0)
    module = OrganPooling(ORGANS, HIDDEN, HEADS, dropout)
    with torch.no_grad():
        for parameter in module.parameters():
            nn.init.normal_(parameter, std=0.7)
    return module


@pytest.fixture
def levels():
    generator = torch.Generator().manual_seed(1)
    return tuple(torch.randn(PATIENTS, TOKENS, HIDDEN, generator=generator, requires_grad=True) for _ in range(3))


@pytest.fixture
def mask():
    mask = torch.rand(PATIENTS, ORGANS, TOKENS, generator=torch.Generator().manual_seed(2)) < 0.4
    mask[0, 0], mask[1, 1] = False, False  # absent organs
    mask[2, 2], mask[0, 1] = True, False
    mask[0, 1, 4] = True  # an organ of one token
    return mask


def slow_pooling(module, levels, mask):
    """One call for each patient and organ over that organ's tokens of all levels; None where there are none."""
    attention = nn.MultiheadAttention(HIDDEN, HEADS, batch_first=True)
    own = {"in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias"}
    parameters = {name: parameter for name, parameter in module.named_parameters() if name in own}
    pooled, weights = {}, {}
    for patient in range(PATIENTS):
        for organ in range(ORGANS):
            if mask[patient, organ].any():
                tokens = torch.cat([level[patient, mask[patient, organ]] for level in levels])
                inputs = (module.query_tokens[organ : organ + 1], tokens, tokens)
                output, attended = torch.func.functional_call(
                    attention, parameters, inputs, {"average_attn_weights": False}
                )
                pooled[patient, organ], weights[patient, organ] = output[0], attended[:, 0]
    return pooled, weights


def test_pooling_and_gradients_equal_one_attention_per_patient_and_organ(levels, mask):
    module = make_pooling()
    slow, slow_weights = slow_pooling(module, levels, mask)
    assert 5 < len(slow) < PATIENTS * ORGANS, "some organs must be absent"
    output, attentions = module(levels, mask, output_attentions=True)
    every_level = mask.repeat(1, 1, len(levels))
    assert attentions.shape == (PATIENTS, ORGANS, HEADS, len(levels) * TOKENS) and output.isfinite().all()
    for (patient, organ), expected in slow.items():
        torch.testing.assert_close(output[patient, organ], expected, rtol=1e-5, atol=1e-5)
        seen = attentions[patient, organ][:, every_level[patient, organ]]
        torch.testing.assert_close(seen, slow_weights[patient, organ], rtol=1e-5, atol=1e-6)
        assert not attentions[patient, organ][:, ~every_level[patient, organ]].any()
    assert not attentions[~mask.any(-1)].any() and torch.equal(output[0, 0], module.out_proj.bias), "absent: nothing"

    weights = torch.randn(PATIENTS, ORGANS, HIDDEN, generator=torch.Generator().manual_seed(3))
    present = mask.any(-1)
    ours = (output * weights)[present].sum()
    theirs = sum((slow[key] * weights[key]).sum() for key in slow)
    leaves = [*levels, *module.parameters()]
    for ours_grad, their_grad in zip(torch.autograd.grad(ours, leaves), torch.autograd.grad(theirs, leaves)):
        assert their_grad.any()
        torch.testing.assert_close(ours_grad, their_grad, rtol=1e-4, atol=1e-5)


def test_key_bias_has_no_influence_but_a_zero_gradient(levels, mask):
    """It is in the published weights; a parameter without any gradient would stop DistributedDataParallel."""
    module = make_pooling()
    before = module(levels, mask)[0]
    before.sum().backward()
    with torch.no_grad():
        module.in_proj_bias[HIDDEN : 2 * HIDDEN] += 5
    assert torch.equal(module(levels, mask)[0], before)
    assert not module.in_proj_bias.grad[HIDDEN : 2 * HIDDEN].any() and module.in_proj_bias.grad[:HIDDEN].any()


def test_dropout_weighs_values_and_their_bias_as_multihead_attention_does(levels, mask, monkeypatch):
    """Written out with keys and values, under one fixed dropout mask."""
    module = make_pooling(dropout=0.5).train()
    kept = 2.0 * (torch.rand(PATIENTS, ORGANS, HEADS, 3 * TOKENS, generator=torch.Generator().manual_seed(4)) < 0.5)
    seen = {}

    def fixed_dropout(probabilities, p, training):
        seen.update(p=p, training=training)
        return probabilities * kept

    monkeypatch.setattr(pooling.F, "dropout", fixed_dropout)
    output = module(levels, mask)[0]
    assert seen == {"p": 0.5, "training": True}

    tokens, size = torch.cat(levels, 1), HIDDEN // HEADS
    weight, bias = module.in_proj_weight.view(3, HIDDEN, HIDDEN), module.in_proj_bias.view(3, HIDDEN)
    queries = module.query_tokens @ weight[0].T + bias[0]
    keys, values = tokens @ weight[1].T + bias[1], tokens @ weight[2].T + bias[2]
    for patient, organ in mask.any(-1).nonzero().tolist():
        heads = []
        for head in range(HEADS):
            part = slice(head * size, (head + 1) * size)
            logits = keys[patient, :, part] @ queries[organ, part] / size**0.5
            probabilities = logits.masked_fill(~mask[patient, organ].repeat(3), -torch.inf).softmax(0)
            heads.append((probabilities * kept[patient, organ, head]) @ values[patient, :, part])
        expected = module.out_proj(torch.cat(heads))
        torch.testing.assert_close(output[patient, organ], expected, rtol=1e-4, atol=1e-5)


def attend(queries, mask, keep, *levels):
    return pooling._AttendToLevels.apply(queries, mask, keep, *levels)


@pytest.mark.parametrize("has_dropout", [False, True])
def test_the_attention_has_the_gradient_of_its_definition(mask, has_dropout):
    generator = torch.Generator().manual_seed(6)
    shape = (PATIENTS, ORGANS * HEADS, 3 * TOKENS)
    levels = [torch.randn(PATIENTS, TOKENS, HIDDEN, generator=generator, dtype=torch.double) for _ in range(3)]
    levels = [level.requires_grad_() for level in levels]
    queries = torch.randn(ORGANS * HEADS, HIDDEN, generator=generator, dtype=torch.double, requires_grad=True)
    keep = 2.0 * (torch.rand(shape, generator=generator) < 0.5).double() if has_dropout else None
    # All three outputs: the sum, the sum of the weights, and the probabilities that `output_attentions` hands out.
    # `mask` has absent organs, which must move nothing.
    check = partial(torch.autograd.gradcheck, fast_mode=True)
    assert check(lambda *leaves: attend(leaves[0], mask, keep, *leaves[1:]), (queries, *levels))
    # Frozen levels, as under a frozen tower; one output alone.
    frozen = [level.detach() for level in levels]
    for number in range(3):
        assert check(lambda leaf, number=number: attend(leaf, mask, keep, *frozen)[number], (queries,))
        assert check(lambda *leaves, number=number: attend(queries.detach(), mask, keep, *leaves)[number], (*levels,))


def test_backward_keeps_the_levels_and_no_copy_of_them(levels, mask):
    module = make_pooling(dropout=0.5).train()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        module(levels, mask)
    tokens = [tensor for tensor in saved if tensor.numel() >= levels[0].numel() and tensor.shape[-1] == HIDDEN]
    assert {tensor.data_ptr() for tensor in tokens if tensor.shape == levels[0].shape} == {
        level.data_ptr() for level in levels
    }
    assert not any(tensor.shape == (PATIENTS, len(levels) * TOKENS, HIDDEN) for tensor in saved)


def test_checkpointing_draws_the_same_dropout_again(levels, mask):
    module = make_pooling(dropout=0.5).train()
    leaves = [*levels, *module.parameters()]
    results = []
    for is_checkpointed in (False, True):
        torch.manual_seed(7)
        if is_checkpointed:
            output = checkpoint(lambda: module(levels, mask)[0], use_reentrant=False)
        else:
            output = module(levels, mask)[0]
        torch.rand(3)  # backward must not go on from here
        results.append([output, *torch.autograd.grad(output.square().sum(), leaves)])
    assert not torch.equal(results[0][0], module(levels, mask)[0]), "without dropout nothing would be tested"
    for plain, replayed in zip(*results):
        assert torch.equal(plain, replayed)


@pytest.mark.parametrize("is_backward_inside", [False, True])
def test_bf16_autocast_stays_close_and_gives_gradients_of_each_input_s_type(levels, mask, is_backward_inside):
    module = make_pooling()
    leaves = [*levels, *module.parameters()]
    present = mask.any(-1)
    exact, exact_attentions = module(levels, mask, output_attentions=True)
    exact_grads = torch.autograd.grad(exact[present].sum(), leaves)
    with torch.autocast("cpu", torch.bfloat16):
        output, attentions = module(levels, mask, output_attentions=True)
        if is_backward_inside:
            grads = torch.autograd.grad(output[present].float().sum(), leaves)
    if not is_backward_inside:
        grads = torch.autograd.grad(output[present].float().sum(), leaves)
    assert output.dtype == torch.bfloat16 and attentions.dtype == torch.float32
    torch.testing.assert_close(attentions, exact_attentions, rtol=0, atol=0.05)
    for value, expected in zip([output, *grads], [exact, *exact_grads]):
        assert value is output or value.dtype == torch.float32
        assert (value - expected).norm() < 0.03 * expected.norm()


def test_projection_is_one_linear_layer_per_organ():
    module = OrganProjection(ORGANS, HIDDEN, 5)
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    hidden = torch.randn(PATIENTS, ORGANS, HIDDEN, generator=torch.Generator().manual_seed(5))
    output = module(hidden)
    assert output.shape == (PATIENTS, ORGANS, 5)
    for organ, (weight, bias) in enumerate(module.organ_parameters()):
        expected = nn.functional.linear(hidden[:, organ], weight, bias)
        torch.testing.assert_close(output[:, organ], expected, rtol=1e-5, atol=1e-5)
