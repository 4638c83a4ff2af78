"""The card of a trained model says what the config says, and what the model is not for."""

import math
import time

import pytest
import yaml
from huggingface_hub import ModelCard

from modeling_fvlm import FVLMConfig
from training_fvlm.card_facts import TrainingClock, data_licence, measured_energy
from training_fvlm.model_card import ANY_PLACE, CITATION, LIMITS, render_card
from training_fvlm.organ_losses import OrganLossRow

RUN = {
    "num_parameters": 1234567,
    "recipe": {"name": "my_recipe", "version": 3},
    "data": {
        "data": "/somewhere/private/ct",
        "eval_split": "validation",
        "shuffle_captions": False,
        "flip_axes": [],
        "flip_probability": 0.2,
    },
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
    assert front["license"] == "unknown" and front["library_name"] == "transformers" and "ct" in front["tags"]
    assert "model-index" not in front and "base_model" not in front and "co2_eq_emissions" not in front


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


def test_organs_that_did_not_learn_are_told():
    alarm = {"step": 200, "cause": "cut off", "is_alarm": True, "organs": ["lung"], "learned_since": {"lung": 1400}}
    note = {"step": 200, "cause": "never abnormal", "is_alarm": False, "organs": ["femur"], "learned_since": {}}
    card = card_of(run=RUN | {"alarms": [alarm | {"text": "why lung"}, note | {"text": "why femur"}]})
    assert "## Organs that did not learn" in card
    assert "- Alarm: why lung Below chance since: lung (step 1,400).\n- Note: why femur\n" in card
    assert "did not learn" not in card_of() and "did not learn" not in card_of(run=RUN | {"alarms": []})


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


# What the Hub and a reader look for


def evaluated(loss: float = 1.5, **more) -> OrganLossRow:
    return OrganLossRow(1000, 3.3, "lung", loss, 2.0794, 0.5, 1.0, **more)


def test_measured_numbers_are_read_back_from_the_header():
    rows = {"lung": evaluated(retrieval=0.75, retrieval_chance=0.3), "left kidney": evaluated(math.nan)}
    card = ModelCard(card_of(evaluated=rows, metrics={"eval_loss": 1.0, "eval_mine_macro_auc": 0.87654}))
    results = {result.metric_name: result for result in card.data.eval_results}
    assert {name: result.metric_value for name, result in results.items()} == {
        "mine: macro AUC, zero-shot": 0.87654,
        "lung: loss in nats (chance 2.079)": 1.5,
        "lung: nearest caption is right (guess 0.300)": 0.75,
    }
    assert {result.metric_type for result in results.values()} == {"roc_auc", "contrastive_loss", "retrieval_at_1"}
    for result in results.values():
        assert (result.dataset_name, result.task_type) == ("ct", "zero-shot-image-classification")
        assert result.dataset_split == "validation"
    assert ModelCard(str(card)).data.to_dict() == card.data.to_dict()
    assert "| 0.75 (0.30) |" in card.text and "retrieval@1 (guess)" in card.text
    assert "retrieval@1" not in card_of(evaluated={"lung": evaluated()})


@pytest.mark.parametrize(
    ("terms", "source", "header", "words"),
    [
        ({}, None, "unknown", "None was stated for the weights."),
        ({"license": "cc-by-nc-4.0"}, None, "cc-by-nc-4.0", "Weights: cc-by-nc-4.0. The code beside them is Apache"),
        ({"license": "cc-by-nc-4.0"}, "their-weights", "cc-by-nc-4.0", "keep their licence, and it applies"),
        ({}, "their-weights", "other", "keep their licence, and it applies"),
    ],
)
def test_the_licence_is_the_one_that_was_given(terms, source, header, words):
    card = card_of(run={**RUN, "model_terms": terms, "started_from": {"model": source, "text encoder": None}})
    assert ModelCard(card).data.license == header and words in card


def test_terms_of_ones_own_stand_with_their_address():
    link = "https://example.org/terms"
    terms = {"license": "other", "license_name": "our-terms", "license_link": link}
    card = card_of(run={**RUN, "model_terms": terms})
    data = ModelCard(card).data
    assert (data.license, data.license_name, data.license_link) == ("other", "our-terms", link)
    assert f"Weights: our-terms ({link})." in card


def test_what_lies_on_the_hub_is_linked_and_folders_are_not():
    assert not {"datasets", "base_model"} & ModelCard(card_of()).data.to_dict().keys()
    sources = {"model": "my-folder", "text encoder": "microsoft/CXR-BERT"}
    data = ModelCard(card_of(run={**RUN, "data_name": "someone/ct", "started_from": sources})).data.to_dict()
    assert data["datasets"] == ["someone/ct"] and data["base_model"] == ["microsoft/CXR-BERT"]
    card = card_of(run={**RUN, "repository": "someone/fvlm"})
    assert 'from_pretrained("someone/fvlm"' in card and ANY_PLACE not in card and ANY_PLACE in card_of()


def test_data_patients_and_their_licence_are_counted_and_named():
    assert "| licence of the data | not stated in their card |" in card_of()
    run = {**RUN, "data_patients": {"train": 1900}, "data_licence": "cc-by-nc-sa-4.0"}
    card = card_of(run=run)
    assert "2,400 train (of 1,900 patients), 300 validation |" in card
    assert "| licence of the data | cc-by-nc-sa-4.0 |" in card


def test_a_run_that_goes_on_says_so():
    card = card_of(run={**RUN, "is_finished": False, "steps": 500, "max_steps": 1000})
    assert "**Training goes on**: these are the weights after 500 of 1,000 steps." in card
    assert "Training goes on" not in card_of(run={**RUN, "is_finished": True})


def test_the_objective_is_told_as_far_as_it_is_not_the_published_one():
    assert "| objective | targets: published; loss over organs: sum |" in card_of()
    objective = {"targets": ["published", "momentum"], "momentum_alpha": 0.5, "label_alpha": 1.0}
    objective |= {"organ_token_dropout": ["0.1", "lung=0.2"], "label_task": None}
    card = card_of(config_of(organ_reduction="mean", volume_pooling="mean"), {**RUN, "objective": objective})
    assert (
        "| objective | targets: published, momentum; loss over organs: mean; whole volume against whole report, pooled "
        "by mean; momentum_alpha 0.5; organ_token_dropout 0.1 lung=0.2 |"
    ) in card
    cached = {"contrastive_batch_size": 64, "micro_batch_size": 2, "gradient_accumulation_steps": 4}
    card = card_of(run={**RUN, "group_size": 64, "training": RUN["training"] | cached})
    assert "1,000 of 64 patients, the mean of 4 contrasts, in chunks of 2 (gradient cache) |" in card


def test_energy_is_told_where_it_was_measured_and_nowhere_else():
    run = {**RUN, "train_seconds": 7200.0, "processes": 4, "device": "NVIDIA H100"}
    card = card_of(run=run)
    assert "| hardware | 4 x NVIDIA H100 |" in card and "| training time | 2.0 h |" in card
    assert "| device-hours | 8 |" in card and "Energy was not measured" in card and "kWh |" not in card
    card = card_of(run={**run, "energy": {"kwh": 5.4321, "co2_kg": 1.2345}})
    assert "5.43 kWh" in card and "1.23 kg CO2e" in card and "not measured" not in card
    emissions = ModelCard(card).data.to_dict()["co2_eq_emissions"]
    assert emissions["emissions"] == 1234.5 and emissions["source"] == "codecarbon"
    assert emissions["training_type"] == "pre-training" and "Time and energy" not in card_of()


def test_the_card_ends_with_what_to_cite():
    assert card_of().rstrip().endswith(CITATION)


# Facts from outside


def test_the_clock_goes_on_where_the_run_was_stopped(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    first, second = TrainingClock(), TrainingClock()
    first.on_train_begin(None, None, None)
    now[0] += 30
    state = first.state_dict()
    now[0] += 1000  # the job waits in the queue
    second.on_train_begin(None, None, None)
    second.load_state_dict(state)
    now[0] += 12
    second.on_train_end(None, None, None)
    now[0] += 500
    assert state == {"seconds": 30} and second.seconds == 42


def test_energy_of_all_sessions_is_summed(tmp_path):
    assert measured_energy(tmp_path) is None
    header = "timestamp,duration,emissions,energy_consumed,country_name\n"
    (tmp_path / "emissions.csv").write_text(header + "t,1,0.25,1.5,X\nt,1,0.5,2.5,X\n")
    assert measured_energy(tmp_path) == {"kwh": 4.0, "co2_kg": 0.75}
    (tmp_path / "emissions.csv").write_text("timestamp,other\nt,1\n")
    assert measured_energy(tmp_path) is None
    (tmp_path / "emissions.csv").write_text(header)
    assert measured_energy(tmp_path) is None


@pytest.mark.parametrize(
    ("header", "licence"),
    [
        ("license: cc-by-4.0", "cc-by-4.0"),
        ("license: [mit, cc0-1.0]", "mit, cc0-1.0"),
        ("license: other\nlicense_name: our-terms\nlicense_link: https://a.b/c", "our-terms (https://a.b/c)"),
        ("configs: []", None),
    ],
)
def test_the_licence_of_the_data_is_that_of_their_card(tmp_path, header, licence):
    assert data_licence(str(tmp_path)) is None
    (tmp_path / "README.md").write_text(f"---\n{header}\n---\n# Data\n")
    assert data_licence(str(tmp_path)) == licence
    assert data_licence("memory://not/there") is None
