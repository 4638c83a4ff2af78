"""Inflation of a MAE ViT against the published code's, and a start made of it by the command."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_text import save_cxr_bert
from transformers import BertModel

from modeling_fvlm import FVLMModel, FVLMProcessor, FVLMVisionConfig
from training_fvlm import convert
from training_fvlm.checkpoint_file import CheckpointError
from training_fvlm.mae import inflate_mae, inflate_positions, mae_left_behind, mae_vision_fields
from training_fvlm.published_weights import published_name

START = ["--organs", "body_24", "--vision_heads", "4", "--max_text_length", "32"]


@pytest.fixture(scope="module")
def golden(shared_dir):
    folder = shared_dir / "golden" / "mae-inflate"
    return load_file(folder / "inputs.safetensors"), load_file(folder / "outputs.safetensors"), folder


def test_inflation_is_the_published(golden):
    mae, expected, folder = golden
    fields = mae_vision_fields(mae)
    assert fields == {"hidden_size": 48, "num_hidden_layers": 12, "intermediate_size": 192}
    inflated = inflate_mae(mae, FVLMVisionConfig(**fields, num_attention_heads=4))
    ours = {published_name(f"vision_model.{name}").removeprefix("visual_encoder."): t for name, t in inflated.items()}
    positions = "patch_embedding.position_embeddings"
    assert ours.keys() == expected.keys() and len(ours) == 147
    torch.testing.assert_close(ours.pop(positions)[None], expected[positions], rtol=0, atol=1e-6)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in ours.items())
    left = json.loads((folder / "config.json").read_text())["ignored_mae_keys"]
    assert sorted(mae_left_behind(mae)) == sorted(left)


def slow_positions(positions, grid):
    """Bilinear by its definition, one token at a time: centres of cells meet, edges repeat."""
    side = int((positions.shape[1] - 1) ** 0.5)
    plane = positions[0, 1:].view(side, side, -1)
    rows = []
    for row in range(grid[1]):
        for column in range(grid[2]):
            y = min(max((row + 0.5) * side / grid[1] - 0.5, 0), side - 1)
            x = min(max((column + 0.5) * side / grid[2] - 0.5, 0), side - 1)
            top, left = int(y), int(x)
            bottom, right, dy, dx = min(top + 1, side - 1), min(left + 1, side - 1), y - top, x - left
            upper = plane[top, left] * (1 - dx) + plane[top, right] * dx
            lower = plane[bottom, left] * (1 - dx) + plane[bottom, right] * dx
            rows.append(upper * (1 - dy) + lower * dy)
    return torch.stack(rows * grid[0])


@pytest.mark.parametrize(("side", "grid"), [(14, (7, 16, 11)), (3, (2, 5, 4)), (4, (3, 4, 4))])
def test_positions_equal_bilinear_by_its_definition(side, grid):
    positions = torch.randn(1, side * side + 1, 3, generator=torch.Generator().manual_seed(side))
    torch.testing.assert_close(inflate_positions(positions, grid), slow_positions(positions, grid), rtol=0, atol=1e-5)


def test_what_is_no_mae_is_refused(golden):
    mae, _, _ = golden
    config = FVLMVisionConfig(**mae_vision_fields(mae), num_attention_heads=4)
    with pytest.raises(CheckpointError, match="no MAE ViT: it has no pos_embed, .*2 tensors, conv1.weight, fc.bias"):
        mae_vision_fields({"conv1.weight": torch.ones(1), "fc.bias": torch.ones(1)})
    with pytest.raises(CheckpointError, match="rel_pos_bias: no parameter of a MAE ViT"):
        inflate_mae({**mae, "rel_pos_bias": torch.ones(2)}, config)
    for changed, message in (
        (
            {"blocks.0.attention.qkv.weight": torch.ones(144, 48)},
            "blocks.0.attention.qkv.weight: no parameter of a MAE",
        ),
        ({"norm.bias": torch.ones(48, dtype=torch.int64)}, "norm.bias: whole numbers"),
        ({"norm.bias": torch.full((48,), torch.inf)}, "norm.bias: NaN or infinite"),
    ):
        with pytest.raises(CheckpointError, match=message):
            inflate_mae({**mae, **changed}, config)
    for name in ("norm.weight", "blocks.0.mlp.fc1.weight", "pos_embed"):
        with pytest.raises(CheckpointError, match=rf"{name} is \(\); a MAE ViT has"):
            mae_vision_fields({**mae, name: torch.tensor(1.0)})
    with pytest.raises(CheckpointError, match=r"pos_embed is \(1, 196, 48\); expected .* square"):
        inflate_mae({**mae, "pos_embed": mae["pos_embed"][:, 1:]}, config)


@pytest.mark.parametrize("token_types", [False, True])
def test_the_command_makes_a_start_of_mae_and_cxr_bert(golden, tmp_path, capsys, token_types):
    mae, expected, _ = golden
    torch.save({"model": mae}, tmp_path / "mae.pth")
    bert = save_cxr_bert(tmp_path / "cxr")
    given = ["--mae", str(tmp_path / "mae.pth"), "--text_encoder", str(tmp_path / "cxr"), *START]
    given += ["--text_token_types"] if token_types else []
    assert convert.main([*given, "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert "decoder_pos_embed" in printed and "cls_projection_head.dense_to_hidden.weight" in printed

    model = FVLMModel.from_pretrained(tmp_path / "out").eval()
    assert (len(model.config.organs), model.config.text_token_types) == (24, token_types)
    assert model.config.vision_config.layer_norm_eps == 1e-5 and model.config.projection_dim == 256
    block = model.vision_model.blocks[3]
    assert torch.equal(block.attention.out_proj.weight, expected["blocks.3.attn.out_proj.weight"])
    assert torch.equal(model.vision_model.norm.bias, expected["norm.bias"])
    torch.testing.assert_close(
        model.vision_model.embeddings.position_embeddings[None],
        expected["patch_embedding.position_embeddings"],
        rtol=0,
        atol=1e-6,
    )
    patches = model.vision_model.embeddings.projection.weight
    assert patches.detach().std() == pytest.approx(0.02, rel=0.1) and not model.organ_pooling.query_tokens.any()

    if not token_types:  # the published encoder: BERT with a token-type table of zeros
        with torch.no_grad():
            bert.embeddings.token_type_embeddings.weight.zero_()
        assert "embeddings.token_type_embeddings.weight" in printed
    encoded = FVLMProcessor.from_pretrained(tmp_path / "out")(text=["No lung nodule.", "Heart."])
    with torch.no_grad():
        ours = model.pool_text(encoded["input_ids"], encoded["attention_mask"])
        theirs = BertModel.forward(bert, **encoded).last_hidden_state[:, 0]
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)

    card = (tmp_path / "out" / "README.md").read_text()
    assert "**Not trained.**" in card and "| MAE ViT | `mae.pth` |" in card and "| text encoder | `cxr` |" in card
    assert "organ queries" in card and str(tmp_path) not in card
    for path in (tmp_path / "out").iterdir():
        assert str(tmp_path).encode() not in path.read_bytes(), path.name


def test_bad_starts_are_named_and_leave_nothing_behind(golden, tmp_path, monkeypatch, capsys):
    mae, _, _ = golden
    monkeypatch.chdir(tmp_path)
    save_cxr_bert(tmp_path / "cxr")
    short = {name: tensor for name, tensor in mae.items() if name != "blocks.5.mlp.fc1.weight"}
    save_file(mae, "mae.safetensors")
    save_file(short, "short.safetensors")
    save_file({"a": torch.ones(2)}, "other.safetensors")
    (tmp_path / "empty").mkdir()
    before = sorted(map(str, tmp_path.rglob("*")))
    for weights, text, options, message in (
        ("short", "cxr", [], "short.safetensors: its blocks are not those of the ViT: blocks.5.mlp.linear1.weight"),
        ("other", "cxr", [], "other.safetensors: this is no MAE ViT"),
        ("absent", "cxr", [], "absent.safetensors is not there"),
        ("mae", "empty", [], "text encoder empty cannot be loaded: there is no config.json"),
        ("mae", "cxr", ["--max_text_length", "65"], "--max_text_length 65 is more than the text encoder's 64"),
    ):
        given = ["--mae", f"{weights}.safetensors", "--text_encoder", text, *START, *options, "--out", "out"]
        assert convert.main(given) == 2
        error = capsys.readouterr().err
        assert re.search(re.escape(message), error), error
        assert sorted(map(str, tmp_path.rglob("*"))) == before
