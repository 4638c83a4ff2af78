"""The whole model: its parts by slower roads, saving and loading, precision, training steps."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, BertConfig, BertModel

from modeling_fvlm import FVLMConfig, FVLMModel, modeling_fvlm, text_batches
from modeling_fvlm.modeling_fvlm import build_text_model, organ_occupancy

PATIENTS, ORGANS, TEXTS, TOKENS = 3, ["lung", "heart", "aorta"], 5, 7
VOLUME_SIZE, PATCH_SIZE = (4, 12, 32), (2, 4, 8)  # token grid (2, 3, 4): no two edges alike
WINDOWS = [
    {"hu_min": -1150.0, "hu_max": 350.0, "mean": 0.3, "std": 0.25},
    {"hu_min": -60.0, "hu_max": 140.0, "mean": 0.5, "std": 0.4},
]


def make_config(token_selection="all", dropout=0.0, text_config=None, **fields):
    text_config = text_config or {
        "model_type": "bert",
        "vocab_size": 40,
        "hidden_size": 12,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "max_position_embeddings": 16,
        "hidden_dropout_prob": dropout,
        "attention_probs_dropout_prob": dropout,
    }
    return FVLMConfig(
        vision_config={
            "volume_size": VOLUME_SIZE,
            "patch_size": PATCH_SIZE,
            "num_channels": 2,
            "hidden_size": 16,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "intermediate_size": 24,
            "feature_levels": (0, 1),
            "hidden_dropout": dropout,
            "attention_dropout": dropout,
            "token_selection": token_selection,
        },
        text_config=text_config,
        organs=ORGANS,
        windows=WINDOWS,
        projection_dim=8,
        pooling_num_heads=4,
        pooling_dropout=dropout,
        **fields,
    )


def make_model(token_selection="all", **fields):
    torch.manual_seed(0)
    model = FVLMModel(make_config(token_selection, **fields))
    with torch.no_grad():  # weights of a size at which every part shows in the output
        for name, parameter in model.named_parameters():
            if name != "temperature.value" and parameter.requires_grad:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model


@pytest.fixture
def batch():
    """Patient 0: all organs whole. Patient 1: the heart is cut by a face. Patient 2: no aorta, no heart caption."""
    generator = torch.Generator().manual_seed(1)
    mask = torch.zeros(PATIENTS, *VOLUME_SIZE, dtype=torch.uint8)
    mask[0, 1:3, 2:6, 3:17], mask[0, 1, 7:11, 5:9], mask[0, 2, 8:10, 20:30] = 1, 2, 3
    mask[1, 1:3, 1:4, 9:31], mask[1, 0, 5:8, 2:7], mask[1, 1:3, 9:11, 1:5] = 1, 2, 3
    mask[2, 1:3, 3:9, 1:12], mask[2, 2, 4:7, 20:28] = 1, 2
    lengths = torch.tensor([7, 3, 5, 4, 6])
    attention_mask = (torch.arange(TOKENS) < lengths[:, None]).long()
    return {
        "volume": torch.randint(-1200, 1500, (PATIENTS, *VOLUME_SIZE), generator=generator, dtype=torch.int16),
        "organ_mask": mask,
        "input_ids": torch.randint(5, 40, (TEXTS, TOKENS), generator=generator) * attention_mask,
        "attention_mask": attention_mask,
        "caption_index": torch.tensor([[0, 1, 2], [3, 1, 4], [4, -1, 0]]),
        "organ_is_abnormal": torch.tensor([[True, True, True], [False, True, False], [True, False, False]]),
    }


def gradients(model, loss):
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    return dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values()), allow_unused=False)))


def assert_same_gradients(ours, theirs, tolerance=1e-5):
    assert ours.keys() == theirs.keys() and sum(bool(grad.any()) for grad in theirs.values()) > 50
    for name, grad in theirs.items():
        error = (ours[name] - grad).abs().max()
        assert error <= tolerance * grad.norm() + 1e-7, f"{name}: {error} off, norm {grad.norm()}"


# --- organs -------------------------------------------------------------------------------------------------------


def slow_occupancy(mask, organ, patch_size):
    """Count an organ's voxels patch by patch, and look at every face."""
    zs, ys, xs = (range(0, size, patch) for size, patch in zip(mask.shape, patch_size))
    depth, height, width = patch_size
    counts = [
        int((mask[z : z + depth, y : y + height, x : x + width] == organ + 1).sum()) for z in zs for y in ys for x in xs
    ]
    faces = [mask[0], mask[-1], mask[:, 0], mask[:, -1], mask[:, :, 0], mask[:, :, -1]]
    return counts, any(bool((face == organ + 1).any()) for face in faces)


@pytest.mark.parametrize("patch_size", [(1, 1, 1), (2, 4, 8), (4, 2, 2)])
@pytest.mark.parametrize("seed", range(2))
def test_occupancy_equals_a_walk_over_patches_and_faces(seed, patch_size):
    generator = torch.Generator().manual_seed(seed)
    mask = torch.randint(1, 6, (2, *VOLUME_SIZE), generator=generator, dtype=torch.uint8)
    mask[torch.rand(mask.shape, generator=generator) < 0.995] = 0
    counts, is_cut = organ_occupancy(mask, 5, patch_size)
    slow = [[slow_occupancy(patient, organ, patch_size) for organ in range(5)] for patient in mask]
    assert counts.tolist() == [[entry[0] for entry in row] for row in slow]
    assert is_cut.tolist() == [[entry[1] for entry in row] for row in slow]
    assert counts.any() and is_cut.any() and not is_cut.all()


def test_completeness_follows_the_config(batch):
    model = make_model().eval()
    features = model.get_organ_features(volume=batch["volume"], organ_mask=batch["organ_mask"])
    assert features.organ_is_complete.tolist() == [[True, True, True], [True, False, True], [True, True, False]]
    assert features.organ_is_present.tolist() == [[True, True, True], [True, True, True], [True, True, False]]
    model.config.completeness = "min_voxels"
    model.config.min_organ_voxels = 16  # the aorta of patient 1 has exactly 16 voxels, its heart 15, that of 0 has 16
    features = model.get_organ_features(volume=batch["volume"], organ_mask=batch["organ_mask"])
    assert features.organ_is_complete.tolist() == [[True, True, True], [True, False, True], [True, True, False]]
    model.config.min_organ_voxels = 15
    features = model.get_organ_features(volume=batch["volume"], organ_mask=batch["organ_mask"])
    assert features.organ_is_complete[1].tolist() == [True, True, True]


@pytest.mark.parametrize("token_selection", ["all", "organs"])
def test_precomputed_occupancy_and_windowed_input_give_the_same(batch, token_selection):
    model = make_model(token_selection).eval()
    expected = model(**batch)
    counts, is_cut = organ_occupancy(batch["organ_mask"], len(ORGANS), PATCH_SIZE)
    volume = batch.pop("volume").double()[:, None]
    channels = [((volume - w["hu_min"]) / (w["hu_max"] - w["hu_min"])).clamp(0, 1) for w in WINDOWS]
    channels = [(channel - w["mean"]) / w["std"] for channel, w in zip(channels, WINDOWS)]
    del batch["organ_mask"]
    output = model(
        torch.cat(channels, 1).float(),
        organ_token_mask=counts > 0,
        organ_is_complete=(counts.sum(-1) > 0) & ~is_cut,
        **batch,
    )
    torch.testing.assert_close(output.image_embeds, expected.image_embeds, rtol=0, atol=1e-5)
    torch.testing.assert_close(output.loss, expected.loss)


@pytest.mark.parametrize("token_selection", ["all", "organs"])
def test_a_batch_equals_its_patients_one_by_one(batch, token_selection):
    model = make_model(token_selection).eval()
    together = model.get_organ_features(volume=batch["volume"], organ_mask=batch["organ_mask"], output_attentions=True)
    for patient in range(PATIENTS):
        part = slice(patient, patient + 1)
        alone = model.get_organ_features(
            volume=batch["volume"][part], organ_mask=batch["organ_mask"][part], output_attentions=True
        )
        torch.testing.assert_close(together.image_embeds[part], alone.image_embeds, rtol=0, atol=1e-5)
        torch.testing.assert_close(together.attentions[part], alone.attentions, rtol=0, atol=1e-6)


@pytest.mark.parametrize("token_selection", ["all", "organs"])
def test_embeddings_have_unit_length_and_absent_organs_are_zero(batch, token_selection):
    features = (
        make_model(token_selection).eval().get_organ_features(volume=batch["volume"], organ_mask=batch["organ_mask"])
    )
    norms = features.image_embeds.norm(dim=-1)
    torch.testing.assert_close(norms, features.organ_is_present.float())
    assert not features.organ_is_present.all()


@pytest.mark.parametrize("token_selection", ["all", "organs"])
def test_attentions_lie_on_the_organs_own_patches(batch, token_selection):
    model = make_model(token_selection).eval()
    features = model.get_organ_features(
        volume=batch["volume"], organ_mask=batch["organ_mask"], output_attentions=True, output_hidden_states=True
    )
    counts, _ = organ_occupancy(batch["organ_mask"], len(ORGANS), PATCH_SIZE)
    attentions = features.attentions.unflatten(-1, (3, 24))  # (batch, organs, heads, levels, patches)
    assert attentions.shape[:3] == (PATIENTS, len(ORGANS), 4)
    inside = (counts > 0)[:, :, None, None].expand_as(attentions)
    assert (attentions[inside] > 0).all() and not attentions[~inside].any()
    torch.testing.assert_close(attentions.sum((-1, -2)), features.organ_is_present[..., None].float().expand(-1, -1, 4))
    assert len(features.hidden_states) == 4
    assert model.get_organ_features(volume=batch["volume"], organ_mask=batch["organ_mask"]).attentions is None


# --- captions -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("text_pooling", ["cls", "mean"])
@pytest.mark.parametrize("padding_side", ["right", "left"])
def test_packing_buckets_and_padding_do_not_change_a_caption(monkeypatch, text_pooling, padding_side, attention):
    """Twelve captions in shared rows, in buckets, in one padded batch, and one by one without padding."""
    model = make_model(text_pooling=text_pooling).eval()
    model.set_attn_implementation(attention)
    generator = torch.Generator().manual_seed(2)
    lengths = torch.randint(1, 10, (12,), generator=generator)
    attention_mask = (torch.arange(13) < lengths[:, None]).long()
    input_ids = torch.randint(5, 40, (12, 13), generator=generator) * attention_mask
    if padding_side == "left":
        input_ids, attention_mask = input_ids.flip(1), attention_mask.flip(1)
    calls = []
    model.text_model.register_forward_hook(
        lambda module, args, output: calls.append(tuple(output.last_hidden_state.shape[:2]))
    )
    monkeypatch.setattr(text_batches, "SHORTEST_ROW", 20)
    packed = model.get_text_features(input_ids, attention_mask)
    ((rows, row_length),) = calls
    assert int(lengths.sum()) <= rows * row_length < 12 * int(lengths.max()) and rows > 1
    torch.testing.assert_close(packed.norm(dim=-1), torch.ones(12))

    monkeypatch.setattr(modeling_fvlm, "PACKABLE_MODELS", ())
    monkeypatch.setattr(text_batches, "BUCKET_COST_CPU", 10**9)
    calls.clear()
    whole = model.get_text_features(input_ids, attention_mask)
    assert calls == [(12, 13 if padding_side == "left" else int(lengths.max()))]
    monkeypatch.setattr(text_batches, "BUCKET_COST_CPU", 0)
    calls.clear()
    bucketed = model.get_text_features(input_ids, attention_mask)
    if padding_side == "right":
        assert [end for _, end in calls] == sorted(set(lengths.tolist())), "for nothing: one for each length"
        # BERT counts positions from the left, padding included: only texts padded on the right can stand alone.
        alone = [model.get_text_features(row[None, :end]) for row, end in zip(input_ids, lengths.tolist())]
        torch.testing.assert_close(whole, torch.cat(alone), rtol=0, atol=1e-5)
    for other in (bucketed, packed):
        torch.testing.assert_close(other, whole, rtol=0, atol=1e-5)
        for ours, theirs in zip(
            torch.autograd.grad(other[:, 0].sum(), list(model.text_model.parameters()), retain_graph=True),
            torch.autograd.grad(whole[:, 0].sum(), list(model.text_model.parameters()), retain_graph=True),
        ):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_graphs_are_captured_whole(batch):
    """Where a graph is exported nothing may hang on lengths and numbers of tokens, and the numbers stay the same."""
    model = make_model().eval()
    ids, mask = batch["input_ids"], batch["attention_mask"]

    class Text(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, input_ids, attention_mask):
            return self.model.get_text_features(input_ids, attention_mask)

    with torch.no_grad():
        exported = torch.export.export(Text(), (ids, mask), strict=False).module()
        torch.testing.assert_close(exported(ids, mask), model.get_text_features(ids, mask), rtol=0, atol=1e-5)


def test_every_dropout_is_ours_and_a_decoder_is_not_packed():
    model = make_model(dropout=0.1)
    assert not [name for name, module in model.named_modules() if type(module) is torch.nn.Dropout]
    causal = make_config().text_config.to_dict() | {"is_decoder": True}
    decoder = make_model(text_config=causal).eval()
    ids = torch.tensor([[7, 8, 9], [5, 6, 0]])
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    torch.testing.assert_close(decoder.get_text_features(ids, mask)[1:], decoder.get_text_features(ids[1:, :2]))


def test_a_text_without_tokens_is_read_as_its_first_and_harms_nobody():
    model = make_model().eval()
    input_ids = torch.tensor([[7, 8, 9], [5, 0, 0], [6, 7, 0]])
    attention_mask = torch.tensor([[1, 1, 1], [0, 0, 0], [1, 1, 0]])
    embeds = model.get_text_features(input_ids, attention_mask)
    torch.testing.assert_close(embeds[[0, 2]], model.get_text_features(input_ids[[0, 2]], attention_mask[[0, 2]]))
    torch.testing.assert_close(embeds[1:2], model.get_text_features(input_ids[1:2, :1]))


def test_text_pooling_and_projection_written_out(batch):
    for text_pooling in ("cls", "mean"):
        model = make_model(text_pooling=text_pooling).eval()
        ids, mask = batch["input_ids"], batch["attention_mask"]
        hidden = model.text_model(ids, mask).last_hidden_state
        pooled = [
            row[0] if text_pooling == "cls" else row[: int(real.sum())].mean(0) for row, real in zip(hidden, mask)
        ]
        expected = torch.stack([model.text_projection(row) for row in pooled])
        expected = expected / expected.norm(dim=-1, keepdim=True)
        torch.testing.assert_close(model.get_text_features(ids, mask), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("model_type", ["bert", "roberta", "distilbert", "clip_text_model"])
def test_any_text_encoder_trains_every_parameter(model_type, batch):
    sizes = {"vocab_size": 40, "max_position_embeddings": 16, "hidden_size": 12, "intermediate_size": 16}
    sizes |= {"num_hidden_layers": 1, "num_attention_heads": 2, "pad_token_id": 1, "eos_token_id": 2, "bos_token_id": 0}
    if model_type == "distilbert":
        sizes = {
            "vocab_size": 40,
            "max_position_embeddings": 16,
            "dim": 12,
            "hidden_dim": 16,
            "n_layers": 1,
            "n_heads": 2,
        }
    model = make_model(text_config={"model_type": model_type, **sizes})
    assert all(grad is not None for grad in gradients(model, model(**batch).loss).values())


def test_text_encoder_has_no_pooling_layer_and_token_types_only_if_asked(batch):
    config = make_config()
    text_model = build_text_model(config.text_config)
    assert isinstance(text_model, BertModel) and text_model.pooler is None
    without = build_text_model(config.text_config, token_types=False)
    names = set(text_model.state_dict()) - set(without.state_dict())
    assert names == {"embeddings.token_type_embeddings.weight"}
    without.load_state_dict(text_model.state_dict(), strict=False)
    captions = batch["input_ids"], batch["attention_mask"]
    with torch.no_grad():
        with_types = text_model.eval()(*captions).last_hidden_state
        assert not torch.allclose(without.eval()(*captions).last_hidden_state, with_types)
        text_model.embeddings.token_type_embeddings.weight.zero_()
        zeroed = text_model(*captions).last_hidden_state
    torch.testing.assert_close(without(*captions).last_hidden_state, zeroed)


# --- the loss and the step ----------------------------------------------------------------------------------------


def test_loss_contrasts_complete_captioned_organs(batch):
    """Lung: three patients. Heart: one of patient 0 alone (1 cut, 2 without caption). Aorta: 0 and 1 (2 has none)."""
    model = make_model().eval()
    output = model(**batch)
    assert output.organ_is_active.tolist() == [True, False, True] and output.num_contrasted.tolist() == [3, 0, 2]
    torch.testing.assert_close(output.loss, output.organ_losses.sum())
    torch.testing.assert_close(output.logit_scale, torch.tensor(1 / 0.07))

    # The aorta by hand: patients 0 and 1, captions 2 and 4, nothing shared.
    logits = output.image_embeds[:2, 2] @ output.text_embeds[[2, 4]].T / 0.07
    expected = -(logits.log_softmax(0).diagonal() + logits.log_softmax(1).diagonal()).mean() / 2
    torch.testing.assert_close(output.organ_losses[2], expected)

    model.config.organ_reduction = "mean"
    torch.testing.assert_close(model(**batch).loss, output.loss / 2)


def test_caption_hash_decides_which_captions_are_equal(batch):
    model = make_model().eval()
    by_index = model(**batch)
    hashes = torch.tensor([[10, 11, 12], [13, 11, 14], [14, 0, 10]])
    torch.testing.assert_close(model(**batch, caption_hash=hashes).loss, by_index.loss, rtol=0, atol=0)
    hashes[1, 2] = hashes[0, 2]  # the two aortas now have one caption: nothing to contrast
    assert model(**batch, caption_hash=hashes).organ_is_active.tolist() == [True, False, False]


def test_return_loss_false_leaves_the_loss_to_the_caller(batch):
    model = make_model().eval()
    output = model(**batch, return_loss=False)
    assert output.loss is None and output.organ_losses is None
    assert output.image_embeds.shape == (PATIENTS, 3, 8) and output.text_embeds.shape == (TEXTS, 8)
    assert output.logit_scale.requires_grad, "under DDP the temperature reaches the loss through this output alone"
    images_only = model(volume=batch["volume"], organ_mask=batch["organ_mask"])
    assert images_only.loss is None and images_only.text_embeds is None


def test_texts_alone_and_images_alone_are_what_they_are_together(batch):
    model = make_model().eval()
    both = model(**batch, return_loss=False)
    texts = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    assert torch.equal(texts.text_embeds, both.text_embeds) and torch.equal(texts.logit_scale, both.logit_scale)
    assert texts.image_embeds is texts.organ_is_complete is texts.organ_is_present is texts.loss is None
    images = model(volume=batch["volume"], organ_mask=batch["organ_mask"])
    assert torch.equal(images.image_embeds, both.image_embeds) and images.text_embeds is None
    assert torch.equal(images.organ_is_complete, both.organ_is_complete) and images.logit_scale is not None


# --- the global branch --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("token_selection", ["all", "organs"])
@pytest.mark.parametrize("volume_pooling", ["mean", "attention"])
def test_volume_embeds_are_the_pooled_tokens_of_all_organs(batch, volume_pooling, token_selection):
    model = make_model(token_selection, volume_pooling=volume_pooling).eval()
    batch["organ_mask"][2] = 0
    output = model(**batch, return_loss=False)
    counts, _ = organ_occupancy(batch["organ_mask"], len(ORGANS), PATCH_SIZE)
    tower = model.vision_model(batch["volume"][:, None], counts > 0, model.config.windows)
    last, index = tower.feature_levels[-1], tower.token_index
    for patient in range(2):
        kept = (counts[patient] > 0).any(0)
        rows = last[patient][kept] if index is None else last[patient][: int(kept.sum())]
        if index is not None:
            assert index[patient][: int(kept.sum())].tolist() == kept.nonzero()[:, 0].tolist()
        pooled = rows.mean(0)
        if volume_pooling == "attention":
            one = torch.nn.MultiheadAttention(16, 4, batch_first=True)
            own = model.volume_pooling
            state = {"in_proj_weight": own.in_proj_weight, "in_proj_bias": own.in_proj_bias}
            one.load_state_dict(state | {f"out_proj.{n}": p for n, p in own.out_proj.named_parameters()})
            pooled = one(own.query_tokens[None], rows[None], rows[None])[0][0, 0]
        expected = torch.nn.functional.normalize(model.volume_projection(pooled), dim=-1)
        torch.testing.assert_close(output.volume_embeds[patient], expected, rtol=0, atol=1e-5)
    assert not output.volume_embeds[2].any(), "no organ, no embedding"
    assert torch.equal(model.get_organ_features(**images_of(batch)).volume_embeds, output.volume_embeds)


def images_of(batch):
    return {"volume": batch["volume"], "organ_mask": batch["organ_mask"]}


@pytest.mark.parametrize("fields", [{"volume_pooling": "attention"}, {"organ_reduction": "uncertainty"}])
def test_what_is_off_leaves_no_trace_and_what_is_on_changes_no_other_weight(batch, fields, tmp_path):
    torch.manual_seed(0)
    plain = FVLMModel(make_config())
    torch.manual_seed(0)
    more = FVLMModel(make_config(**fields))
    names, added = set(plain.state_dict()), set(more.state_dict()) - set(plain.state_dict())
    prefixes = ("volume_pooling.", "volume_projection.", "organ_variances.")
    assert added and all(name.startswith(prefixes) for name in added)
    assert not any(name.startswith(prefixes) for name in names)
    assert all(torch.equal(more.state_dict()[name], tensor) for name, tensor in plain.state_dict().items())
    output = plain(**batch)
    assert output.volume_embeds is output.organ_log_variances is None
    more.save_pretrained(tmp_path)
    loaded = FVLMModel.from_pretrained(tmp_path).eval()
    for name in ("volume_embeds", "organ_log_variances", "loss"):
        ours, theirs = getattr(more.eval()(**batch), name), getattr(loaded(**batch), name)
        assert (ours is None) == (theirs is None) and (ours is None or torch.equal(ours, theirs))


@pytest.mark.parametrize("there", ["sum", "uncertainty"])
def test_learned_variances_are_no_part_of_a_model_that_is_started_from(tmp_path, there):
    here = {"sum": "uncertainty", "uncertainty": "sum"}[there]
    model = FVLMModel(make_config(organ_reduction=there))
    model.save_pretrained(tmp_path)
    loaded = modeling_fvlm.load_whole_model(tmp_path, config=make_config(organ_reduction=here))
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in model.state_dict().items()
               if not name.startswith("organ_variances."))  # fmt: skip
    if here == "uncertainty":
        assert loaded.organ_variances.log_variances.tolist() == [0.0] * 3


def test_uncertainty_in_the_models_own_loss(batch):
    model = make_model(organ_reduction="uncertainty")
    output = model(**batch)
    variances = output.organ_log_variances.detach()
    assert variances.any() and output.organ_is_active.tolist() == [True, False, True]
    expected = sum((-variances[o]).exp() * output.organ_losses[o] + variances[o] / 2 for o in (0, 2))
    torch.testing.assert_close(output.loss, expected)
    gradient = gradients(model, output.loss)["organ_variances.log_variances"]
    assert gradient[0] and gradient[2] and not gradient[1]


def test_temperature_is_clamped_in_training_alone(batch):
    model = make_model()
    with torch.no_grad():
        model.temperature.value.fill_(2.0)
    assert model.eval()(**batch).logit_scale == 0.5 and model.temperature.value == 2.0
    assert model.train()(**batch).logit_scale == 2.0 and model.temperature.value == 0.5
    with torch.no_grad():
        model.temperature.value.fill_(-1.0)
    model(**batch)
    assert model.temperature.value.item() == pytest.approx(0.001)


@pytest.mark.parametrize("token_selection", ["all", "organs"])
def test_one_step_moves_every_trainable_parameter(batch, token_selection):
    torch.manual_seed(0)
    model = FVLMModel(make_config(token_selection, dropout=0.1, text_token_types=False)).train()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.0)
    model(**batch).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad), "DDP waits for every gradient"
    optimizer.step()
    for name, parameter in model.named_parameters():
        moved = parameter.detach() != before[name]
        assert parameter.isfinite().all(), name
        # Lung and aorta entered the loss, the heart did not.
        if name.startswith("organ_projection."):
            assert moved.any() == (not name.endswith("_1")), name
        elif name == "organ_pooling.query_tokens":
            assert moved[0].any() and moved[2].any() and not moved[1].any(), name
        elif not name.endswith("key.bias"):  # a bias of all keys cancels in the softmax
            assert moved.any(), name


def test_a_batch_with_nothing_to_contrast_still_gives_every_gradient(batch):
    model = make_model(token_selection="organs").train()
    batch["organ_mask"].zero_()
    output = model(**batch)
    assert output.loss == 0 and not output.organ_is_present.any()
    for name, grad in gradients(model, output.loss).items():
        assert grad.isfinite().all() and not grad.any(), name


@pytest.mark.parametrize("token_selection", ["all", "organs"])
def test_activation_checkpointing_gives_the_same_gradients(batch, token_selection):
    model = make_model(token_selection).train()
    plain = gradients(model, model(**batch).loss)
    model.activation_checkpointing_enable()
    calls = []
    model.vision_model.blocks[0].norm1.register_forward_hook(lambda *_: calls.append("vision"))
    model.text_model.encoder.layer[0].register_forward_pre_hook(lambda *_: calls.append("text"))
    checkpointed = gradients(model, model(**batch).loss)
    assert calls.count("vision") == 2, "nothing was checkpointed"
    assert_same_gradients(checkpointed, plain)


@pytest.mark.parametrize("token_selection", ["all", "organs"])
def test_eager_equals_sdpa(batch, token_selection):
    model = make_model(token_selection).train()
    assert model.vision_model.config._attn_implementation == "sdpa"
    fused = model(**batch)
    fused_gradients = gradients(model, fused.loss)
    model.set_attn_implementation("eager")
    assert model.vision_model.config._attn_implementation == "eager"
    eager = model(**batch)
    torch.testing.assert_close(eager.image_embeds, fused.image_embeds, rtol=0, atol=1e-5)
    assert_same_gradients(gradients(model, eager.loss), fused_gradients, tolerance=1e-4)


# --- saving and loading -------------------------------------------------------------------------------------------

LOAD_ELSEWHERE = """
import sys, torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel
folder = sys.argv[1]
config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
model = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
assert type(model).__module__.startswith("transformers_modules"), type(model).__module__
assert "modeling_fvlm" not in sys.modules, "the repository's own package was imported"
assert config.organs == model.config.organs
with torch.no_grad():
    output = model(**load_file(folder + "/batch.safetensors"))
kept = {name: getattr(output, name) for name in ("image_embeds", "text_embeds", "loss")}
save_file(kept, folder + "/out.safetensors")
model.save_pretrained(folder + "/again")
"""


def test_saved_folder_loads_in_a_fresh_process_elsewhere(batch, tmp_path):
    model = make_model(token_selection="organs").eval()
    model.save_pretrained(tmp_path / "saved")
    save_file(batch, tmp_path / "saved" / "batch.safetensors")
    (tmp_path / "elsewhere").mkdir()
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    subprocess.run(
        [sys.executable, "-c", LOAD_ELSEWHERE, str(tmp_path / "saved")],
        check=True,
        cwd=tmp_path / "elsewhere",
        env=environment,
    )
    saved, again = (load_file(tmp_path / path / "model.safetensors") for path in ("saved", "saved/again"))
    assert saved.keys() == again.keys() == model.state_dict().keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in model.state_dict().items())
    with torch.no_grad():
        expected = model(**batch)
    # To rounding, not to the bit: the same matmul may sum in another order when its weights lie elsewhere in memory.
    for name, tensor in load_file(tmp_path / "saved" / "out.safetensors").items():
        torch.testing.assert_close(tensor, getattr(expected, name), rtol=1e-6, atol=1e-6)
    code = {path.name for path in (tmp_path / "saved").glob("*.py")}
    needed = {f"{name}.py" for name in ("configuration_fvlm", "modeling_fvlm", "vision", "pooling", "loss", "organs")}
    assert needed <= code
    assert needed <= {path.name for path in (tmp_path / "saved" / "again").glob("*.py")}


def test_weights_load_exactly_and_in_bfloat16(batch, tmp_path):
    model = make_model().eval()
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = model(**batch)
        loaded = AutoModel.from_pretrained(tmp_path)
        assert type(loaded) is FVLMModel
        assert all(
            torch.equal(ours, saved) for ours, saved in zip(loaded.parameters(), model.parameters(), strict=True)
        )
        torch.testing.assert_close(loaded.eval()(**batch).loss, expected.loss, rtol=1e-6, atol=0)
        half = FVLMModel.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
        assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
        output = half(**batch)
    assert output.image_embeds.dtype == output.loss.dtype == torch.float32
    assert (output.image_embeds * expected.image_embeds).sum(-1)[expected.organ_is_present].min() > 0.99
    assert output.loss.item() == pytest.approx(expected.loss.item(), rel=0.1)


def test_bfloat16_autocast_trains(batch):
    model = make_model(token_selection="organs").train()
    expected = model(**batch)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(**batch)
    assert output.loss.dtype == torch.float32
    assert (output.image_embeds * expected.image_embeds).sum(-1)[expected.organ_is_present].min() > 0.99
    assert all(grad.isfinite().all() for grad in gradients(model, output.loss).values())


def test_weights_missing_from_a_checkpoint_are_initialised(tmp_path):
    """The model is built without memory and filled: what no branch initialises would be whatever memory held."""
    torch.manual_seed(0)
    model = FVLMModel(make_config())
    model.save_pretrained(tmp_path)
    kept = {"text_model.encoder.layer.0.output.dense.weight", "vision_model.blocks.1.mlp.linear1.weight"}
    state_dict = load_file(tmp_path / "model.safetensors")
    assert kept < state_dict.keys()
    save_file({name: state_dict[name] for name in kept}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded, report = FVLMModel.from_pretrained(tmp_path, output_loading_info=True)
    assert set(report["missing_keys"]) == state_dict.keys() - kept
    for name, tensor in loaded.state_dict().items():
        fresh = state_dict[name]
        if name in kept or fresh.unique().numel() == 1:  # loaded, or zeros, ones and the temperature
            assert torch.equal(tensor, fresh), name
        else:
            assert tensor.isfinite().all() and tensor.std() == pytest.approx(fresh.std().item(), rel=0.5), name
    assert not loaded.organ_pooling.query_tokens.any(), "attention must start uniform"
    assert loaded.temperature.value.item() == pytest.approx(0.07)


def test_config_file_of_a_saved_model_names_its_classes(tmp_path):
    make_model().save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["auto_map"] == {"AutoConfig": "configuration_fvlm.FVLMConfig", "AutoModel": "modeling_fvlm.FVLMModel"}
    assert saved["model_type"] == "fvlm" and saved["organs"] == ORGANS


# --- refusals -----------------------------------------------------------------------------------------------------


def test_wrong_inputs_are_refused_with_a_remedy(batch):
    model = make_model().eval()
    volume, mask = batch["volume"], batch["organ_mask"]
    with pytest.raises(ValueError, match="either pixel_values"):
        model(organ_mask=mask)
    with pytest.raises(ValueError, match="either pixel_values"):
        model(input_ids=batch["input_ids"], organ_mask=mask)
    with pytest.raises(ValueError, match="either pixel_values"):
        captions = {name: batch[name] for name in ("input_ids", "caption_index", "organ_is_abnormal")}
        model(**captions)
    with pytest.raises(ValueError, match="organ_mask is missing"):
        model(volume=volume)
    with pytest.raises(ValueError, match="organ_mask is missing"):
        model(volume=volume, organ_token_mask=torch.ones(PATIENTS, 3, 24, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"\(4, 12, 24\) and crop \(4, 12, 32\) are not on one grid"):
        model(volume=volume, organ_mask=mask[..., :24])
    with pytest.raises(ValueError, match="labels 0..4, but there are 3 organs"):
        model(volume=volume, organ_mask=mask + (mask == 3).byte())
    with pytest.raises(ValueError, match="must be integers"):
        model(volume=volume, organ_mask=mask.float())
    with pytest.raises(ValueError, match="carries one empty text"):
        model.get_text_features(batch["input_ids"][:0])
    with pytest.raises(ValueError, match="the loss needs input_ids"):
        model(volume=volume, organ_mask=mask, return_loss=True)


def test_own_text_model_can_be_put_in(batch):
    """How a pre-trained encoder enters: built and loaded outside, then assigned."""
    torch.manual_seed(5)
    text_model = BertModel(BertConfig(**make_config().text_config.to_diff_dict()), add_pooling_layer=False)
    model = make_model().eval()
    before = model.get_text_features(batch["input_ids"], batch["attention_mask"])
    model.text_model = text_model.eval()
    after = model.get_text_features(batch["input_ids"], batch["attention_mask"])
    hidden = text_model(batch["input_ids"], batch["attention_mask"]).last_hidden_state[:, 0]
    expected = torch.nn.functional.normalize(model.text_projection(hidden), dim=-1)
    torch.testing.assert_close(after, expected, rtol=0, atol=1e-6)
    assert not torch.allclose(before, after)
