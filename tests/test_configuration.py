"""The config: published defaults, a JSON round trip that loses nothing, and refusals that say how to mend."""

import json
import re

import pytest
from transformers import AutoConfig

from modeling_fvlm import FVLMConfig, FVLMVisionConfig, configuration_fvlm, load_organ_set, organs

WINDOWS = [
    {"hu_min": -1150, "hu_max": 350, "mean": 0.3, "std": 0.25},
    {"hu_min": -60.0, "hu_max": 140.0, "mean": 0.5, "std": 0.4},
]


def test_defaults_are_the_published_model():
    config = FVLMConfig()
    vision = config.vision_config
    assert vision.position_grid == (7, 16, 11)
    assert (vision.hidden_size, vision.num_hidden_layers, vision.num_attention_heads) == (768, 12, 12)
    assert tuple(vision.feature_levels) == (3, 6, 9) and vision.token_selection == "all"
    assert config.organs == ["lung", "heart", "esophagus", "aorta"] and config.organ_set == "chest_4"
    assert config.windows == [{"hu_min": -1150.0, "hu_max": 350.0, "mean": 0.0, "std": 1.0}]
    assert tuple(config.spacing) == (3.0, 1.0, 1.0) and tuple(config.margin_voxels) == (5, 20, 20)
    assert (config.temperature_init, config.temperature_min, config.temperature_max) == (0.07, 0.001, 0.5)
    assert (config.organ_reduction, config.completeness, config.min_organ_voxels) == ("sum", "border", 1)
    assert config.volume_pooling == "none" and config.max_report_length is None
    text = config.text_config
    assert (text.model_type, text.hidden_size, text.num_hidden_layers, text.vocab_size) == ("bert", 768, 12, 30522)


def test_named_organ_set_brings_its_organs_and_classes():
    config = FVLMConfig(organ_set="body_24")
    expected = load_organ_set("body_24")
    assert len(config.organs) == 24
    assert config.organs == list(expected.organs) and config.organ_classes == expected.classes


def test_own_organs_are_called_custom_and_need_no_organ_set_file():
    config = FVLMConfig(organs=["lung", "heart"])
    assert config.organ_set == "custom" and config.organs == ["lung", "heart"] and config.organ_classes == {}


def test_json_round_trip_loses_nothing(tmp_path, monkeypatch):
    config = FVLMConfig(
        organ_set="body_24",
        windows=WINDOWS,
        spacing=(20, 4.0, 4.0),
        margin_voxels=(1, 2, 3),
        text_pooling="mean",
        text_token_types=False,
        organ_reduction="mean",
        completeness="min_voxels",
        min_organ_voxels=100,
        vision_config={"num_channels": 2, "token_selection": "organs", "feature_levels": (0, 2), "hidden_size": 96},
        text_config={"model_type": "distilbert", "dim": 64, "n_heads": 4},
    )
    config.save_pretrained(tmp_path)

    def no_organ_set_file(name):
        raise AssertionError(f"{name}: a saved config must not need the organ set files, which are not on the Hub")

    monkeypatch.setattr(organs, "load_organ_set", no_organ_set_file)
    for loaded in (FVLMConfig.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)):
        # By way of JSON: tuples come back as lists.
        ours, theirs = (json.loads(json.dumps(each.to_dict(), default=str)) for each in (config, loaded))
        for own_stamp in ("_name_or_path", "transformers_version"):
            ours.pop(own_stamp, None), theirs.pop(own_stamp, None)
        assert theirs == ours
        assert loaded.vision_config.position_grid == config.vision_config.position_grid
        assert loaded.text_config.model_type == "distilbert" and loaded.text_config.hidden_size == 64


def test_saved_file_states_the_preprocessing_though_it_is_the_default(tmp_path):
    FVLMConfig().save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    for name in ("organs", "organ_classes", "windows", "spacing", "margin_voxels", "completeness", "max_text_length"):
        assert name in saved, f"{name} belongs to the weights and must be readable without this code"
    assert {"volume_size", "patch_size"} <= set(saved["vision_config"])


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"volume_size": (112, 250, 352)}, "volume_size height 250 is no multiple of patch_size height 16"),
        ({"volume_size": [112, 256]}, "three positive edges"),
        ({"patch_size": (16, 0, 32)}, "three positive edges"),
        ({"hidden_size": 100}, "hidden_size 100 is no multiple of num_attention_heads 12"),
        ({"num_hidden_layers": 2}, "feature_levels [3, 6, 9] must be increasing block indices in [0, 1]"),
        ({"feature_levels": (6, 3)}, "must be increasing block indices"),
        ({"feature_levels": (-1,)}, "must be increasing block indices"),
        ({"token_selection": "lungs"}, "token_selection"),
        ({"volume_size": (112.0, 256.0, 352.0)}, "volume_size"),
    ],
)
def test_impossible_towers_are_refused(fields, message):
    with pytest.raises(Exception, match=re.escape(message)):
        FVLMVisionConfig(**fields)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"organs": []}, "at least one"),
        ({"organs": ["lung", "lung"]}, "different names"),
        ({"organs": [f"organ {number}" for number in range(65)]}, "at most 64"),
        ({"organs": ["lung"], "organ_classes": {"liver": {}}}, "['liver'], which are not in config.organs ['lung']"),
        ({"windows": WINDOWS}, "2 windows make 2 channels, but vision_config.num_channels is 1"),
        ({"windows": [{"hu_min": 350, "hu_max": -1150, "mean": 0, "std": 1}]}, "hu_min < hu_max"),
        ({"windows": [{"hu_min": 0, "hu_max": 1, "mean": 0, "std": 0}]}, "std > 0"),
        ({"windows": [{"hu_min": 0, "hu_max": 1}]}, "must have the keys"),
        ({"spacing": (3.0, 1.0)}, "three positive mm"),
        ({"spacing": (3.0, 1.0, 0.0)}, "three positive mm"),
        ({"margin_voxels": (5, -1, 20)}, "three counts >= 0"),
        ({"pooling_num_heads": 5}, "no multiple of pooling_num_heads 5"),
        ({"temperature_init": 0.6}, "temperature_min <= temperature_init <= temperature_max"),
        ({"text_pooling": "max"}, "text_pooling"),
        ({"volume_pooling": "max"}, "volume_pooling"),
        ({"max_report_length": 0}, "max_report_length 0 must be at least 1 token"),
        ({"text_config": {"model_type": "no-such-encoder"}}, "no-such-encoder"),
        ({"organ_set": "body_42"}, "body_42"),
    ],
)
def test_impossible_models_are_refused(fields, message):
    with pytest.raises(Exception, match=re.escape(message)):
        FVLMConfig(**fields)


def test_annotations_name_no_config_class_of_ours():
    """From a local folder, AutoConfig and the model's own import are two different classes of one name."""
    annotations = FVLMConfig.__annotations__
    assert not any("FVLM" in str(annotations[name]) for name in ("vision_config", "text_config"))
    assert set(FVLMConfig().windows[0]) == configuration_fvlm.WINDOW_KEYS
