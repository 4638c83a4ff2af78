"""The model's start: the centred projections."""

import pytest
import torch
from tiny_training import dataset_of, forward_batch, tiny_model, tiny_rows

from training_fvlm.arguments import SettingsError
from training_fvlm.build import centre_projections
from training_fvlm.collator import FVLMCollator

NUM_ROWS = 12


def projections(model, collator, dataset):
    """Outputs of both projections over the first rows, all in one batch: (rows, organs, dim), whole, (texts, dim)."""
    outputs = {}
    hooks = [
        getattr(model, name).register_forward_hook(lambda _m, _i, out, name=name: outputs.__setitem__(name, out))
        for name in ("organ_projection", "text_projection")
    ]
    batch = collator([dataset[index] for index in range(NUM_ROWS)])
    with torch.no_grad():
        model.eval()(**forward_batch(batch), return_loss=False)
    for hook in hooks:
        hook.remove()
    return outputs["organ_projection"], batch["organ_is_complete"], outputs["text_projection"]


@pytest.mark.parametrize("batch_size", [12, 5])  # 12 = 5 + 5 + 2: the last batch is short
def test_projections_start_centred_with_unit_spread(batch_size):
    rows = tiny_rows(NUM_ROWS)
    dataset = dataset_of(rows)
    model, processor = tiny_model(rows)
    collator = FVLMCollator(processor.tokenizer, model.config, is_random=False)
    before, is_whole, _ = projections(model, collator, dataset)
    assert before[is_whole[:, 0], 0].std() < 0.1, "of unit spread already"
    centre_projections(model.train(), collator, dataset, NUM_ROWS, batch_size=batch_size)
    assert model.training
    organs, is_whole, texts = projections(model, collator, dataset)
    known = [index for index in range(organs.shape[1]) if is_whole[:, index].sum() >= 2]
    assert known, "no organ to look at"
    for index in known:
        seen = organs[is_whole[:, index], index]  # (rows that hold the organ whole, dim)
        torch.testing.assert_close(seen.mean(0), torch.zeros_like(seen[0]), atol=1e-4, rtol=0)
        assert seen.square().mean().sqrt().item() == pytest.approx(1, abs=1e-3)
    if batch_size == NUM_ROWS:  # a text that two batches share counts twice otherwise
        torch.testing.assert_close(texts.mean(0), torch.zeros_like(texts[0]), atol=1e-4, rtol=0)
        assert texts.square().mean().sqrt().item() == pytest.approx(1, abs=1e-3)


def test_an_organ_that_is_never_whole_keeps_its_weights():
    rows = tiny_rows(NUM_ROWS)
    dataset = dataset_of(rows)
    model, processor = tiny_model(rows)

    class NeverWhole(FVLMCollator):
        def __call__(self, rows):
            batch = super().__call__(rows)
            batch["organ_is_complete"][:, 1] = False
            return batch

    before = [model.organ_projection.weight_0.detach().clone(), model.organ_projection.weight_1.detach().clone()]
    collator = NeverWhole(processor.tokenizer, model.config, is_random=False)
    centre_projections(model, collator, dataset, NUM_ROWS)
    assert torch.equal(model.organ_projection.weight_1, before[1])
    assert not torch.equal(model.organ_projection.weight_0, before[0])
    assert all(torch.isfinite(parameter).all() for parameter in model.organ_projection.parameters())


@pytest.mark.parametrize("volume_pooling", ["mean", "attention"])
def test_a_global_branch_starts_centred_as_well(volume_pooling):
    rows = tiny_rows(NUM_ROWS)
    model, processor = tiny_model(rows, volume_pooling=volume_pooling)
    collator = FVLMCollator(processor.tokenizer, model.config, is_random=False)
    dataset = dataset_of(rows)
    centre_projections(model, collator, dataset, NUM_ROWS, batch_size=5)
    outputs = []
    model.volume_projection.register_forward_hook(lambda _module, _inputs, output: outputs.append(output.detach()))
    model.eval()(**forward_batch(collator([dataset[index] for index in range(NUM_ROWS)])), return_loss=False)
    torch.testing.assert_close(outputs[0].mean(0), torch.zeros(8), atol=1e-4, rtol=0)
    assert outputs[0].square().mean().sqrt().item() == pytest.approx(1, abs=1e-3)


def test_one_row_is_refused():
    rows = tiny_rows(NUM_ROWS)
    model, processor = tiny_model(rows)
    collator = FVLMCollator(processor.tokenizer, model.config, is_random=False)
    with pytest.raises(SettingsError, match="needs two rows"):
        centre_projections(model, collator, dataset_of(rows[:1]), 48)
