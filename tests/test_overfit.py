"""--overfit N: the sanity run learns its patients by heart, and says so, or says why not."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from tiny_split import ORGANS, TINY_RECIPE, tiny_row, write_tiny_split
from tiny_training import tiny_rows, tiny_trainer

import train_fvlm
from training_fvlm.arguments import SettingsError, parse_settings
from training_fvlm.embed import model_inputs
from training_fvlm.organ_losses import OrganLossFile, OrganLossRow
from training_fvlm.overfit import FITTED, Overfit, indistinct_captions, without_dropout


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("overfit")
    write_tiny_split(folder / "split")
    (folder / "tiny.yaml").write_text(TINY_RECIPE, encoding="utf-8")
    return folder


def command(work, name, *words):
    """The words of a run into the folder `name`."""
    paths = ["--recipe", str(work / "tiny.yaml"), "--data", str(work / "split"), "--output_dir", str(work / name)]
    return [*paths, "--overfit", "6", "--max_steps", "200", "--learning_rate", "1e-2", *words]


def test_patients_are_learned_by_heart_and_the_run_stops(work, caplog):
    assert train_fvlm.main(command(work, "run")) == 0
    facts = json.loads((work / "run" / "run.json").read_text())
    assert facts["overfit"]["is_learned"] and facts["overfit"]["verdict"] in caplog.text
    assert "--overfit passed: 6 patients learned by heart in" in facts["overfit"]["verdict"] and facts["steps"] < 200
    last = [row for row in OrganLossFile(work / "run" / "organ_losses.csv").read() if row.step == facts["steps"]]
    assert len(last) == len(ORGANS)
    assert all(row.loss < row.floor + (1 - FITTED) * (row.chance - row.floor) for row in last if row.active)
    assert (work / "run" / "loss_curves.png").is_file()
    assert not list((work / "run").glob("*.safetensors")) and not list((work / "run").glob("checkpoint-*"))


def test_a_run_that_does_not_learn_fails_with_the_likely_cause(work, caplog):
    assert train_fvlm.main(command(work, "jane doe", "--learning_rate", "0", "--max_steps", "12")) == 1
    facts = json.loads((work / "jane doe" / "run.json").read_text())
    assert not facts["overfit"]["is_learned"] and facts["steps"] == 12
    assert "--overfit NOT passed: 6 patients not learned by heart in 12 steps. Of 3 organs 3 have" in caplog.text
    assert "Likely cause: --learning_rate, too high or too low by far" in caplog.text
    assert f"curves '{work / 'jane doe'}'`" in caplog.text and "jane" not in facts["overfit"]["verdict"]


def test_what_makes_it_harder_is_set_aside(work):
    words = ["--flip_axes", "depth", "--gradient_accumulation_steps", "4", "--organ_label_smoothing", "0.1"]
    words += ["--organ_sampling", "balanced", "--curriculum", "frequency", "--push_to_hub", "--eval_tasks", "synthetic"]
    words += ["--logging_strategy", "no"]
    settings = parse_settings(command(work, "parsed", *words), "help")
    data, args = settings.data, settings.training
    assert (data.max_train_rows, data.random_crop, data.flip_axes, data.eval_tasks) == (6, False, [], [])
    assert (args.group_size, args.gradient_accumulation_steps, args.eval_strategy, args.save_strategy) == (
        6,
        1,
        "no",
        "no",
    )
    assert (args.organ_label_smoothing, args.organ_sampling, args.curriculum) == ([], "uniform", "none")
    assert not args.push_to_hub and args.logging_steps <= 10 and args.logging_strategy == "steps"
    with pytest.raises(SettingsError, match="--overfit 1 contrasts a patient with nobody"):
        parse_settings(command(work, "parsed", "--overfit", "1"), "help")


def test_no_dropout_is_left(tmp_path):
    trainer = tiny_trainer(tmp_path, tiny_rows(4), dropout=0.5, is_random=False)
    model, rows = trainer.model, trainer.train_dataset
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.5
    batch = model_inputs(trainer.data_collator([rows[number] for number in range(4)]))
    model.train()
    before = [model(**batch, return_loss=False) for _ in range(2)]
    without_dropout(model)
    after = [model(**batch, return_loss=False) for _ in range(2)]
    for name in ("image_embeds", "text_embeds"):
        assert not torch.equal(*(output[name] for output in before))
        assert torch.equal(*(output[name] for output in after))
    kept = [vars(module) for module in model.modules() if 0.5 in (getattr(module, "p", 0), vars(module).get("dropout"))]
    assert model.training and kept == []
    assert not any(getattr(module, "attention_dropout", 0) for module in model.modules())


def test_captions_that_the_text_encoder_cannot_tell_apart_are_named(tmp_path):
    rows = [tiny_row(number) for number in range(6)]
    for number, row in enumerate(rows):
        heart = next(entry for entry in row["captions"] if entry["organ"] == "heart")
        heart |= {"caption": "Enlarged. " * 30 + f"{number}.", "is_abnormal": True}  # cut before the number comes
    trainer = tiny_trainer(tmp_path, rows, is_random=False)
    assert indistinct_captions(trainer) == ["heart"]
    trainer.logged_rows = [OrganLossRow(50, 5.0, organ, 1.5, 1.8, 0.1, 1.0) for organ in ORGANS]
    is_learned, sentence = Overfit(trainer).verdict()
    assert not is_learned and "different captions of heart are the same to the text encoder" in sentence


def judged(learned, norms, share, cosine=0.3):
    """The verdict on three organs of which two are learned and the heart has gone `share` of the way."""
    shares = dict.fromkeys(ORGANS, 0.99) | {"heart": share}
    rows = [
        OrganLossRow(100, 9.0, organ, 1.8 - 1.7 * gone, 1.8, 0.1, 1.0, text_cosine=cosine)
        for organ, gone in shares.items()
    ]
    caption_index = torch.arange(6)[:, None].expand(6, 3)
    batch = {"caption_index": caption_index, "input_ids": torch.arange(6)[:, None], "attention_mask": torch.ones(6, 1)}
    trainer = SimpleNamespace(
        logged_rows=rows,
        state=SimpleNamespace(global_step=100),
        args=SimpleNamespace(group_size=6),
        window=SimpleNamespace(organs=ORGANS),
        train_dataset=list(range(6)),
        data_collator=lambda rows: batch,
        add_callback=lambda callback: None,
    )
    overfit = Overfit(trainer)
    overfit.learned, overfit.gradient_norms = learned, norms
    return overfit.verdict()


FLAT, RISING = [0.6] * 40, [0.02 * line for line in range(40)]
NORMS = {"vision": 0.1, "text": 0.1, "pooling": 0.1, "projections": 0.1}


@pytest.mark.parametrize(
    ("case", "cause"),
    [
        ((RISING, NORMS, 0.6), "too few steps"),
        ((FLAT[:2], NORMS, 0.6), "too few steps"),
        ((FLAT, NORMS | {"text": 0.0}, 0.6), "no gradient reaches text: see --freeze"),
        ((FLAT, {"text": 0.1}, 0.6), "no gradient reaches vision, pooling, projections"),
        ((FLAT, NORMS, 0.01, 0.999), "the text side has collapsed (mean cosine between different captions 0.999)"),
        ((FLAT, NORMS, 0.01), "--learning_rate, too high or too low by far"),
        ((FLAT, NORMS, 0.6), "these organs' images cannot be told apart"),
    ],
)
def test_the_likely_cause(case, cause):
    is_learned, sentence = judged(*case)
    assert not is_learned and f"Likely cause: {cause}" in sentence
    assert f"heart {round(100 * case[2])} %" in sentence and "Of 3 organs 1 have" in sentence


def test_nothing_to_learn_is_no_success(tmp_path):
    assert judged(FLAT, NORMS, 0.95)[0]
    trainer = tiny_trainer(tmp_path, tiny_rows(4))
    trainer.logged_rows = [OrganLossRow(10, 1.0, organ, math.nan, math.nan, math.nan, 0.0) for organ in ORGANS]
    is_learned, sentence = Overfit(trainer).verdict()
    assert not is_learned and "none of these patients is abnormal" in sentence
