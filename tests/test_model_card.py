"""The card of a trained model says what the config says, and what the model is not for."""

import math

import pytest
import yaml

from modeling_fvlm import FVLMConfig
from training_fvlm.model_card import LIMITS, render_card
from training_fvlm.organ_losses import OrganLossRow

RUN = {
    "num_parameters": 1234567,
    "recipe": {"name": "my_recipe", "version": 3},
    "data": {"data": "/somewhere/private/ct", "shuffle_captions": False, "flip_axes": [], "flip_probability": 0.2},
    "started_from": {"model": None, "text encoder": None},
    "data_name": "ct",
    "data_rows": {"train": 2400, "validation": 300},
    "training": {
        "optim": "adamw_torch",
        "learning_rate": 2e-3,
        "weight_decay": 0.05,
        "weight_decay_everywhere": False,
        "lr_schedule": "trainer",
        "lr_scheduler_type": "cosine",
        "warmup_start_lr": 2e-6,
        "min_lr": 3e-6,
        "seed": 7,
    },
    "steps": 1000,
    "group_size": 8,
    "precision": "fp32",
    "gemm_backend": "blas",
    "versions": {"torch": "9.9.9"},
}


def config_of(**changes):
    return FVLMConfig(
        organs=["lung", "left kidney"],
        organ_set="mine",
        spacing=(20.0, 4.5, 3.0),
        windows=[
            {"hu_min": -1150, "hu_max": 350, "mean": 0.4321, "std": 0.25},
            {"hu_min": 100, "hu_max": 1600, "mean": 0, "std": 1},
        ],
        **{"vision_config": {"num_channels": 2, "volume_size": (48, 96, 128), "patch_size": (4, 8, 16)}, **changes},
    )


def card_of(config=None, run=RUN, train=None, evaluated=None, metrics=None):
    train = {"lung": OrganLossRow(1000, 3.3, "lung", 1.2345, 2.0794, 0.5, 0.9)} if train is None else train
    return render_card(config or config_of(), run, train, evaluated or {}, metrics or {})


def test_the_card_names_a_backend_that_is_not_pytorchs_own():
    assert "| precision | fp32 |" in card_of()
    assert "| precision | fp32, linear layers by oneDNN |" in card_of(run=RUN | {"gemm_backend": "onednn"})
    assert "| precision | bf16 |" in card_of(run=RUN | {"gemm_backend": None, "precision": "bf16"})


def test_preprocessing_on_the_card_is_that_of_the_config():
    card = card_of()
    for words in (
        "(depth, height, width), LPS",
        "20 x 4.5 x 3 mm along (depth, height, width)",
        "48 x 96 x 128 voxels, patches of 4 x 8 x 16",
        "[-1150, 350] HU -> [0, 1], then minus 0.4321, divided by 0.25",
        "HU window 2 | [100, 1600] HU",
        "5 x 20 x 20 voxels",
        "Organs (set `mine`): lung, left kidney.",
        "1,234,567 parameters that compares each of 2 organs",
    ):
        assert words in card
    respaced = config_of()
    respaced.spacing = [9.0, 9.0, 9.0]
    assert "9 x 9 x 9 mm" in card_of(respaced)


def test_limits_data_and_settings_are_there_and_the_path_is_not():
    card = card_of()
    assert card.count(LIMITS) == 2
    assert "my_recipe, version 3" in card and "2,400 train, 300 validation" in card and "1,000 of 8 patients" in card
    assert "learning rate 0.002" in card and "torch 9.9.9" in card and "| seed | 7 |" in card
    assert "/somewhere/private" not in card
    assert "SHUFFLED" in card_of(run={**RUN, "data": {**RUN["data"], "shuffle_captions": True}})
    assert "none (command line only)" in card_of(run={**RUN, "recipe": {}})


def test_front_matter_is_what_the_hub_reads():
    front = yaml.safe_load(card_of().split("---")[1])
    assert front["license"] == "apache-2.0" and front["library_name"] == "transformers" and "ct" in front["tags"]


@pytest.mark.parametrize("what", ["model", "text encoder"])
def test_weights_of_others_keep_their_licence(what):
    card = card_of(run={**RUN, "started_from": {**RUN["started_from"], what: "their-weights"}})
    front = yaml.safe_load(card.split("---")[1])
    assert front["license"] == "other" and front["license_name"]
    assert f"| started from | {what} `their-weights` |" in card and "keep their licence" in card
    assert "| started from | random weights |" in card_of() and "keep their licence" not in card_of()


def test_departures_of_a_published_run_are_named():
    run = {**RUN, "data": {**RUN["data"], "flip_axes": ["depth", "width"]}}
    run["training"] = {**RUN["training"], "lr_schedule": "published", "weight_decay_everywhere": True}
    card = card_of(config_of(preprocessing="published"), run)
    assert "weight decay 0.05 on everything, published schedule from 2e-06 to 3e-06 |" in card and "cosine" not in card
    assert "| flips | along depth, width, each with probability 0.2 |" in card
    assert "with the published faults (`preprocessing: published`)" in card
    plain = card_of()
    assert "weight decay 0.05, cosine |" in plain and "| flips | none |" in plain
    assert "by their own geometry (`preprocessing: standard`)" in plain


def test_losses_stand_beside_chance_and_floor():
    card = card_of(evaluated={"lung": OrganLossRow(1000, 3.3, "lung", 1.5, 2.0794, 0.5, 1.0)})
    assert "| lung | 1.234 | 2.079 | 0.500 | 1.500 |" in card or "| lung | 1.235 | 2.079 | 0.500 | 1.500 |" in card
    assert "| left kidney | never active |" in card
    nothing = card_of(train={})
    assert "No log line was written" in nothing and "loss_curves.png" not in nothing


def test_zero_shot_scores_of_the_last_evaluation_are_quoted():
    card = card_of(metrics={"eval_loss": 1.0, "eval_synthetic_macro_auc": 0.87654})
    assert "synthetic_macro_auc: 0.877 on the evaluation split." in card
    assert "Zero-shot" not in card_of(metrics={"eval_loss": math.nan})


@pytest.mark.parametrize(
    ("selection", "words"), [("organs", "those that hold an organ"), ("all", "| patches read | all |")]
)
def test_the_card_says_which_patches_are_read(selection, words):
    config = config_of()
    config.vision_config.token_selection = selection
    assert words in card_of(config)
