"""Each plausible mistake of a port, made on purpose, is seen by the published numbers.

What the goldens cannot tell apart they do not guard (MAE's layer norm epsilon, 1e-6 in place of 1e-5, moves no
embedding by their tolerance). A mistake counts as seen when a loss, an embedding, or which
organ entered leaves the tolerance of golden/README.md. Preparation, metrics and optimizer have theirs beside their own
tests (test_published_preparation.py, test_published_metrics.py, test_published_optimizer.py).
"""

import copy
from collections.abc import Callable

import pytest
import torch
from test_published_model import load_golden

from modeling_fvlm import FVLMModel, modeling_fvlm
from modeling_fvlm import loss as loss_module
from modeling_fvlm.captions import encode_captions, strip_normal_prefix
from modeling_fvlm.modeling_fvlm import organ_occupancy
from training_fvlm.published_weights import convert_published_state_dict


@pytest.fixture(scope="module")
def golden(shared_dir):
    return load_golden(shared_dir / "golden", "tiny-train")


def departures(golden, config=None, change: Callable[[FVLMModel], None] | None = None, inputs=None) -> list[str]:
    """Names of the published numbers that a model with the golden weights does not give."""
    config = config or golden.config
    model = FVLMModel(config).eval()
    weights = convert_published_state_dict(golden.weights, golden.config)
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected and all("token_type" in name for name in missing)
    if change is not None:
        change(model)
    inputs = inputs or golden.inputs
    with torch.no_grad():
        output = model(**inputs)
    found = []
    for index, organ in enumerate(config.organs):
        entry = golden.outputs["per_organ"].get(organ)
        entered = entry is not None and not entry["skipped_at_unique_check"]
        if bool(output.organ_is_active[index]) != entered:
            found.append(f"{organ} enters")
        elif entered and output.organ_losses[index].item() != pytest.approx(entry["loss"], rel=1e-5):
            found.append(f"{organ} loss")
        if entry is not None:
            patients = entry["patient_ids"]
            text_embeds = output.text_embeds[inputs["caption_index"][patients, index]]
            for kind, ours in (("image_feat", output.image_embeds[patients, index]), ("text_feat", text_embeds)):
                if not torch.allclose(ours, golden.tensors[f"{organ}.{kind}"], rtol=0, atol=1e-5):
                    found.append(f"{organ} {kind}")
    if output.loss.item() != pytest.approx(golden.outputs["loss"], rel=1e-5):
        found.append("loss")
    return found


def changed(config, part=None, **values):
    config = copy.deepcopy(config)
    for name, value in values.items():
        setattr(config if part is None else getattr(config, part), name, value)
    return config


def test_the_right_port_departs_nowhere(golden):
    assert departures(golden) == []


@pytest.mark.parametrize(
    "mistake, part, values, seen_in",
    [
        ("tokens of the blocks before", "vision_config", {"feature_levels": [2, 5, 8]}, "image_feat"),
        ("only the last level", "vision_config", {"feature_levels": []}, "image_feat"),
        ("GELU by its tanh approximation", "vision_config", {"hidden_act": "gelu_pytorch_tanh"}, "image_feat"),
        ("one head less in the organ pooling", None, {"pooling_num_heads": 2}, "image_feat"),
        ("mean over organs", None, {"organ_reduction": "mean"}, "loss"),
        ("organs cut by the crop take part", None, {"completeness": "min_voxels"}, "loss"),
        ("mean over the caption's tokens", None, {"text_pooling": "mean"}, "text_feat"),
    ],
)
def test_wrong_settings_are_seen(golden, mistake, part, values, seen_in):
    found = departures(golden, changed(golden.config, part, **values))
    assert any(seen_in in name for name in found), f"{mistake}: {found}"


def test_token_types_that_are_added_are_seen(golden):
    def add_row_0(model):
        table = model.text_model.embeddings.token_type_embeddings.weight
        torch.nn.init.normal_(table, std=0.02)

    found = departures(golden, changed(golden.config, text_token_types=True), add_row_0)
    assert any("text_feat" in name for name in found)


def test_masks_off_by_one_patch_are_seen(golden, monkeypatch):
    def one_patch_further(*args):
        counts, is_cut = organ_occupancy(*args)
        return counts.roll(1, dims=-1), is_cut

    monkeypatch.setattr(modeling_fvlm, "organ_occupancy", one_patch_further)
    assert any("image_feat" in name for name in departures(golden))


def test_positions_numbered_depth_fastest_are_seen(golden):
    def transpose(model):
        embeddings = model.vision_model.embeddings
        grid = embeddings.position_embeddings.detach().view(*embeddings.position_grid, -1)
        embeddings.position_embeddings.data = grid.permute(2, 1, 0, 3).reshape(-1, grid.shape[-1])

    assert any("image_feat" in name for name in departures(golden, change=transpose))


def test_a_temperature_that_multiplies_is_seen(golden):
    def multiply(model):
        model.temperature.value.data = 1 / model.temperature.value.data

    assert any("loss" in name for name in departures(golden, change=multiply))


@pytest.mark.parametrize("mistake", ["no normal pairs", "only the own caption", "abnormal pairs count as equal"])
def test_wrong_targets_are_seen(golden, monkeypatch, mistake):
    right = loss_module.contrastive_targets

    def wrong(caption_id, is_abnormal, is_valid):
        if mistake == "no normal pairs":
            is_abnormal = torch.ones_like(is_abnormal)
        elif mistake == "only the own caption":
            caption_id = torch.arange(len(caption_id))[:, None].expand_as(caption_id)
            is_abnormal = torch.ones_like(is_abnormal)
        else:
            caption_id = torch.where(is_abnormal, -7, caption_id)
        return right(caption_id, is_abnormal, is_valid)

    monkeypatch.setattr(loss_module, "contrastive_targets", wrong)
    assert any("loss" in name or "enters" in name for name in departures(golden))


def test_a_prefix_that_stays_is_seen(golden, shared_dir, monkeypatch):
    """The normal sentence in front of findings never reaches the published text encoder."""
    import modeling_fvlm.captions as captions

    with monkeypatch.context() as patch:
        patch.setattr(captions, "strip_normal_prefix", lambda caption, organ: caption)
        unstripped = load_golden(shared_dir / "golden", "tiny-train").inputs
    assert encode_captions.__module__ == captions.__name__ and strip_normal_prefix is captions.strip_normal_prefix
    assert any("text_feat" in name for name in departures(golden, inputs=unstripped))
