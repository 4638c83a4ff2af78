"""`--init_from`: a training that starts from a model's folder; what it takes from there and what it refuses."""

import json
import re
import shutil
from dataclasses import replace

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from tiny_scan import tiny_config, tiny_tokenizer
from tiny_split import MARGIN, ORGANS, SPACING, TINY_RECIPE, write_tiny_split
from tiny_training import dataset_of, tiny_model, tiny_rows

import train_fvlm
from modeling_fvlm import FVLMModel, FVLMProcessor, load_organ_set
from modeling_fvlm.pipeline_fvlm import save_for_hub
from training_fvlm.arguments import RECIPES, SettingsError, parse_settings
from training_fvlm.build import build_model
from training_fvlm.data import SplitDescription, check_against_recipe
from training_fvlm.start import read_start

ROWS = tiny_rows(6)
PERMUTED = (ORGANS[2], ORGANS[0], ORGANS[1])


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A saved model with no two organs alike, and its folder."""
    folder = tmp_path_factory.mktemp("init") / "saved"
    model, processor = tiny_model(ROWS, seed=3)
    with torch.no_grad():
        model.temperature.value.fill_(0.11)
    save_for_hub(model, processor, folder)
    return model, folder


def description(organs=ORGANS, spacing=SPACING, margin=MARGIN, preprocessing="standard"):
    return SplitDescription("tiny", tuple(organs), {organ: {} for organ in organs}, spacing, margin, preprocessing)


def start_from(folder, section=None, split=None):
    """Model and processor that a model section makes from the folder."""
    split = split or description()
    start = read_start(str(folder), section or {}, split)
    return build_model(section or {}, split, dataset_of(ROWS), window_volumes=2, start=start)


def test_a_model_starts_as_the_folders(saved):
    model, folder = saved
    torch.manual_seed(9)
    started, processor = start_from(folder)
    expected = model.state_dict()
    assert started.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in started.state_dict().items())
    assert all(parameter.dtype == torch.float32 and parameter.requires_grad for parameter in started.parameters())
    assert processor.tokenizer.get_vocab() == train_fvlm.AutoTokenizer.from_pretrained(folder).get_vocab()
    for name in ("windows", "projection_dim", "text_pooling", "organ_reduction", "max_text_length"):
        assert getattr(started.config, name) == getattr(model.config, name), name
    assert processor.max_text_length == model.config.max_text_length


def test_organs_in_another_order_are_found_by_name(saved):
    model, folder = saved
    started, processor = start_from(folder, split=description(organs=PERMUTED))
    assert started.config.organs == list(PERMUTED) == processor.organs
    volume = torch.randint(-1000, 1000, (2, 8, 16, 32), generator=torch.Generator().manual_seed(0)).short()
    tokens = torch.rand(2, 3, 64, generator=torch.Generator().manual_seed(1)) < 0.5
    order = [ORGANS.index(organ) for organ in PERMUTED]
    given = {"volume": volume, "organ_is_complete": torch.ones(2, 3, dtype=torch.bool)}
    with torch.no_grad():
        there = model.eval().get_organ_features(organ_token_mask=tokens, **given).image_embeds
        here = started.eval().get_organ_features(organ_token_mask=tokens[:, order], **given).image_embeds
    torch.testing.assert_close(here, there[:, order])
    assert (here[:, 0] - here[:, 1]).abs().max() > 1e-2, "organs that are alike would compare nothing"


def test_what_holds_no_weights_may_change(saved):
    model, folder = saved
    section = {
        "pooling_dropout": 0.3,
        "organ_reduction": "sum",
        "completeness": "min_voxels",
        "min_organ_voxels": 7,
        "temperature_min": 0.1,
        "temperature_max": 0.2,
        "max_text_length": 20,
        "projection_dim": 8,  # as there
        "vision_config": {"hidden_dropout": 0.2, "patch_size": [2, 4, 8]},
        "windows": [{"hu_min": -1000, "hu_max": 0, "mean": "auto", "std": "auto"}, dict(model.config.windows[1])],
        "text_encoder": {"pretrained": "elsewhere"},  # the folder's wins
    }
    started, processor = start_from(folder, section)
    for name in ("organ_reduction", "completeness", "min_organ_voxels", "max_text_length", "pooling_dropout"):
        assert getattr(started.config, name) == section[name]
    assert started.organ_pooling.dropout == 0.3 and started.config.vision_config.hidden_dropout == 0.2
    assert started.config.windows[0]["hu_max"] == 0 and started.config.windows[0]["mean"] > 0
    assert processor.max_text_length == 20 and started.temperature.minimum == 0.1
    assert started.temperature.value == model.temperature.value
    assert torch.equal(started.text_projection.weight, model.text_projection.weight)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"projection_dim": 16}, "model.projection_dim: 16 here, 8 in --init_from"),
        ({"vision_config": {"hidden_size": 32}}, "model.vision_config.hidden_size: 32 here, 16"),
        ({"vision_config": {"patch_size": [2, 4, 4]}}, "model.vision_config.patch_size: [2, 4, 4] here"),
        ({"pooling_num_heads": 4}, "model.pooling_num_heads: 4 here, 2"),
        ({"text_pooling": "cls"}, "model.text_pooling: 'cls' here"),
        ({"windows": [{"hu_min": -1000, "hu_max": 0}]}, "reads 2 channels"),
        ({"max_text_length": 25}, "more than the text encoder's 24 positions"),
    ],
)
def test_what_the_weights_hang_on_is_refused(saved, section, message):
    with pytest.raises(SettingsError) as caught:
        start_from(saved[1], section)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("split", "message"),
    [
        (description(spacing=(3.0, 1.0, 1.5)), "was trained with spacing (3.0, 1.0, 1.0) mm"),
        (description(margin=(1, 2, 3)), "was trained with margin_voxels (1, 2, 2)"),
        (description(preprocessing="published"), "expects standard preprocessing, the split's is published"),
        (replace(description(), padded_to=(112, 256, 352)), "the processor pads to (8, 16, 32) voxels"),
    ],
)
def test_a_split_of_another_kind_is_refused(saved, split, message):
    with pytest.raises(SettingsError) as caught:
        start_from(saved[1], split=split)
    assert message in str(caught.value)


def test_the_documented_way_to_the_published_run_is_open(tmp_path):
    """A folder converted as documented, a split with the published preparation, the recipe's own model section."""
    settings = parse_settings(
        ["--recipe", "published_chest_4", "--data", "d", "--output_dir", str(tmp_path / "run"), "--init_from", "d"], "h"
    )
    manuals = (train_fvlm.__doc__, yaml.safe_load((RECIPES / "published_chest_4.yaml").read_text())["description"])
    commands = [
        re.search(r"training_fvlm\.convert (--[^`]*? --out )", text.replace("\\\n", " "))[1] for text in manuals
    ]
    assert all("--preprocessing published" in command for command in commands)
    organs = load_organ_set("chest_4")
    for preprocessing in ("published", "standard"):
        folder = tmp_path / preprocessing
        config = tiny_config(
            spacing=(3.0, 1.0, 1.0), margin_voxels=(5, 20, 20), text_token_types=False, preprocessing=preprocessing
        )
        save_for_hub(FVLMModel(config), FVLMProcessor.from_config(config, tiny_tokenizer()), folder)
        classes = organs.classes
        split = SplitDescription("chest_4", organs.organs, classes, (3.0, 1.0, 1.0), (5, 20, 20), "published")
        check_against_recipe(split, settings.model, "d")
        if preprocessing == "published":
            assert read_start(str(folder), settings.model, split).config.preprocessing == "published"
        else:
            with pytest.raises(SettingsError, match="convert again with `--preprocessing published`"):
                read_start(str(folder), settings.model, split)


def test_folders_that_hold_no_whole_model_are_refused(saved, tmp_path):
    with pytest.raises(SettingsError, match="no config.json there"):
        start_from(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(SettingsError, match="a model of type 'bert', not fvlm"):
        start_from(tmp_path)
    for words, message in (("{broken", "config.json cannot be read"), ("[]", "a model of type None, not fvlm")):
        (tmp_path / "config.json").write_text(words)
        with pytest.raises(SettingsError, match=message):
            start_from(tmp_path)
    shutil.copytree(saved[1], tmp_path / "wordless")
    (tmp_path / "wordless" / "tokenizer.json").unlink()
    with pytest.raises(SettingsError, match="wordless: there is no vocabulary there, only 5 special tokens"):
        start_from(tmp_path / "wordless")
    for name, message in (
        ("less", r"missing keys \['organ_pooling.query_tokens'\]"),
        ("more", r"unexpected keys \['stranger'\]"),
        ("shape", r"mismatched keys \[.*query_tokens"),
        ("cut", "cannot be loaded"),
        ("none", "cannot be loaded"),
    ):
        shutil.copytree(saved[1], tmp_path / name)
        file = tmp_path / name / "model.safetensors"
        weights = load_file(file)
        if name == "less":
            del weights["organ_pooling.query_tokens"]
        elif name == "more":
            weights["stranger"] = torch.zeros(2)
        elif name == "shape":
            weights["organ_pooling.query_tokens"] = torch.zeros(4, 16)
        save_file(weights, file, metadata={"format": "pt"})
        if name == "cut":
            file.write_bytes(file.read_bytes()[:5000])
        elif name == "none":
            file.unlink()
        with pytest.raises(SettingsError, match=message):
            start_from(tmp_path / name)


def test_the_command_starts_from_a_folder_and_resumes(saved, tmp_path):
    model, folder = saved
    write_tiny_split(tmp_path / "split", train=8, validation=4)
    recipe = yaml.safe_load(TINY_RECIPE)
    recipe["model"] = {"organ_reduction": "sum"}
    recipe["training"] |= {"max_steps": 3, "save_steps": 2, "eval_strategy": "no", "logging_steps": 1}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    command = ["--recipe", str(tmp_path / "recipe.yaml"), "--data", str(tmp_path / "split")]
    command += ["--init_from", str(folder)]
    still = ["--learning_rate", "0", "--max_steps", "1", "--output_dir", str(tmp_path / "still")]
    assert train_fvlm.main([*command, *still]) == 0
    expected = model.state_dict()
    weights = load_file(tmp_path / "still" / "model.safetensors")
    assert weights.keys() == expected.keys() and all(torch.equal(w, expected[name]) for name, w in weights.items())
    assert train_fvlm.main([*command, "--output_dir", str(tmp_path / "run")]) == 0
    weights = load_file(tmp_path / "run" / "model.safetensors")
    assert not all(torch.equal(w, expected[name]) for name, w in weights.items())
    resume = ["--resume_from_checkpoint", str(tmp_path / "run" / "checkpoint-2")]
    assert train_fvlm.main([*command, *resume, "--output_dir", str(tmp_path / "again")]) == 0
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert all(torch.equal(weights[name], again[name]) for name in weights)
    for path in (tmp_path / "run").glob("*.json"):
        assert str(folder.parent) not in path.read_text(encoding="utf-8"), path
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert run["data"]["init_from"] == "saved" and run["started_from"] == {"model": "saved", "text encoder": None}
    assert "| started from | model `saved` |" in (tmp_path / "run" / "README.md").read_text()


def test_projections_that_were_trained_are_not_centred(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(TINY_RECIPE)
    words = ["--recipe", str(recipe), "--data", "d", "--output_dir", str(tmp_path / "o"), "--init_from", "there"]
    with pytest.raises(SettingsError, match="add --centring_rows 0"):
        parse_settings([*words, "--centring_rows", "48"], "help")
    assert parse_settings(words, "help").data.init_from == "there"
