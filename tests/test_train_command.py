"""train_fvlm.py from command line to a folder that loads in a fresh process; its settings and their errors."""

import json
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from tiny_split import ORGANS, TINY_RECIPE, tiny_row, write_tiny_split
from transformers import BertConfig, BertModel, TrainingArguments

import train_fvlm
from modeling_fvlm.organs import load_organ_set
from modeling_fvlm.processed_split import encode_array
from training_fvlm.arguments import RECIPES, SettingsError, build_config, has_auto_windows, load_yaml, parse_settings
from training_fvlm.data import SplitDescription, check_against_recipe, load_split
from training_fvlm.organ_losses import OrganLossFile
from training_fvlm.text import load_text_encoder, train_tokenizer

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A split, a recipe and a finished run of six steps."""
    folder = tmp_path_factory.mktemp("command")
    write_tiny_split(folder / "split")
    (folder / "tiny.yaml").write_text(TINY_RECIPE, encoding="utf-8")
    command = ["--recipe", str(folder / "tiny.yaml"), "--data", str(folder / "split")]
    words = ["--model.projection_dim", "12", "--hub_token", "hf_spoken", "--training.hub_token=hf_joined"]
    assert train_fvlm.main([*command, "--output_dir", str(folder / "run"), *words]) == 0
    return folder


def settings_of(*words, recipe=TINY_RECIPE, tmp_path=None):
    """Parse a command line on a recipe's text."""
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe, encoding="utf-8")
    return parse_settings(["--recipe", str(path), "--data", "d", "--output_dir", str(tmp_path / "out"), *words], "help")


def test_a_run_leaves_model_card_settings_losses_and_curves(work):
    run = work / "run"
    assert {path.name for path in run.glob("checkpoint-*")} == {"checkpoint-3", "checkpoint-6"}
    facts = json.loads((run / "run.json").read_text())
    assert facts["recipe"] == {"name": "tiny", "version": 1} and facts["steps"] == 6 and facts["group_size"] == 4
    assert facts["model"]["projection_dim"] == 12 and facts["training"]["learning_rate"] == 2e-3
    assert facts["data_rows"] == {"train": 24, "validation": 8} and "transformers" in facts["versions"]
    rows = OrganLossFile(run / "organ_losses.csv").read()
    assert sorted({(row.step, row.organ) for row in rows}) == sorted((s, o) for s in (1, 2, 4, 6) for o in ORGANS)
    held_out = OrganLossFile(run / "eval_organ_losses.csv").read()
    assert {row.step for row in held_out} == {3, 6}, "the last step is evaluated once"
    assert (run / "loss_curves.png").read_bytes().startswith(b"\x89PNG")
    assert "Research only, not for diagnosis." in (run / "README.md").read_text()
    assert not list(run.rglob("*.bin")) and not list(run.rglob("*.parquet"))


def test_no_file_of_a_run_names_a_secret_or_a_place(work):
    files = [path for path in (work / "run").rglob("*") if path.suffix in (".json", ".md", ".csv", ".py", ".txt")]
    assert {"run.json", "README.md", "trainer_state.json"} <= {path.name for path in files}
    for path in files:
        text = path.read_text(encoding="utf-8")
        assert not any(word in text for word in ("hf_spoken", "hf_joined", str(work))), path
    facts = json.loads((work / "run" / "run.json").read_text())
    assert facts["command"] == (
        "train_fvlm.py --recipe tiny.yaml --data split --output_dir run --model.projection_dim 12 --hub_token "
        "--training.hub_token"
    )
    assert facts["data"]["data"] == "split" and facts["training"]["output_dir"] == "run"
    assert set(train_fvlm.PACKAGES) < set(facts["versions"])


def test_what_a_command_may_say():
    said = train_fvlm.public_command(
        [
            "--push_to_hub_token",
            "a",
            "--data=/x/y z",
            "--model.token_selection",
            "organs",
            "--eval_tasks",
            "/p/own.yaml",
        ]
        + ["--model.text_encoder", "{pretrained: /srv/bert, revision: a/b}", "--output_dir", "out/run"]
    )
    assert said == (
        "train_fvlm.py --push_to_hub_token --data=y z --model.token_selection organs --eval_tasks own.yaml "
        "--model.text_encoder {pretrained: bert, revision: a/b} --output_dir out/run"
    )
    said = train_fvlm.public_command(["--data", "ftp://ann:secret@host/split", "--streaming"])
    assert said == "train_fvlm.py --data ftp://host/split --streaming"
    assert train_fvlm.package_version("no-such-package-here") == "not installed"


def test_windows_are_standardised_on_what_enters_the_network(work):
    from tiny_split import tiny_row

    from training_fvlm.collator import FVLMCollator

    config = train_fvlm_config(work)
    values = []
    collator = FVLMCollator(None, config, is_random=False)
    for number in range(24):
        volume, tokens, _ = collator.prepare({**tiny_row(number), "row": number, "epoch": 0})
        kept = torch.from_numpy(tokens.any(0)).view(4, 4, 4)
        voxels = torch.from_numpy(volume).float()
        inside = kept.repeat_interleave(2, 0).repeat_interleave(4, 1).repeat_interleave(8, 2)
        values.append(voxels[inside])
    values = torch.cat(values)
    assert len(config.windows) == 2
    for window in config.windows:
        seen = ((values - window["hu_min"]) / (window["hu_max"] - window["hu_min"])).clamp(0, 1)
        seen = (seen - window["mean"]) / window["std"]
        assert abs(float(seen.mean())) < 1e-3 and abs(float(seen.std(correction=0)) - 1) < 1e-3


def train_fvlm_config(work):
    from modeling_fvlm import FVLMConfig

    return FVLMConfig.from_pretrained(work / "run")


def test_the_folder_loads_in_a_fresh_process_without_our_code(work, tmp_path):
    script = tmp_path / "load.py"
    script.write_text(
        "import sys, torch\n"
        "from transformers import AutoModel, AutoProcessor\n"
        "assert not any(name.startswith(('modeling_fvlm', 'training_fvlm')) for name in sys.modules)\n"
        "model = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
        "processor = AutoProcessor.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
        "tokens = processor(text=['lung shows no significant abnormalities.'])\n"
        "embeds = model.get_text_features(tokens['input_ids'], tokens['attention_mask'])\n"
        "print(type(model).__name__, type(processor).__name__, embeds.shape[-1], round(float(embeds.sum()), 5))\n"
    )
    command = [sys.executable, str(script), str(work / "run")]
    environment = {
        "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_OFFLINE": "1",
        "PATH": "/usr/bin:/bin",
        "OMP_NUM_THREADS": "1",
    }
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    from modeling_fvlm import FVLMModel, FVLMProcessor

    model, processor = FVLMModel.from_pretrained(work / "run"), FVLMProcessor.from_pretrained(work / "run")
    tokens = processor(text=["lung shows no significant abnormalities."])
    here = model.get_text_features(tokens["input_ids"], tokens["attention_mask"])
    name, processor_name, dim, total = run.stdout.split()
    assert (name, processor_name, dim) == ("FVLMModel", "FVLMProcessor", "12")
    assert float(total) == pytest.approx(float(here.detach().sum()), abs=1e-4)


def test_a_stopped_run_continues_to_the_same_weights(work, capsys, caplog):
    command = ["--recipe", str(work / "tiny.yaml"), "--data", str(work / "split"), "--model.projection_dim", "12"]
    assert train_fvlm.main([*command, "--output_dir", str(work / "run")]) == 2
    assert "holds checkpoint-6 of an earlier run" in capsys.readouterr().err
    resume = ["--output_dir", str(work / "again"), "--resume_from_checkpoint", str(work / "run" / "checkpoint-3")]
    assert train_fvlm.main([*command, *resume]) == 0
    assert f"goes on from {work / 'run' / 'checkpoint-3'}" in caplog.text
    whole, again = (load_file(work / name / "model.safetensors") for name in ("run", "again"))
    assert whole.keys() == again.keys() and all(torch.equal(whole[name], again[name]) for name in whole)
    other = [*command[:-1], "16", *resume[2:], "--output_dir", str(work / "other")]
    assert train_fvlm.main(other) == 2
    assert "projection_dim: 16 here, 12 there" in capsys.readouterr().err
    newest = [*command, "--output_dir", str(work / "run"), "--resume_from_checkpoint", "true"]
    before = (work / "run" / "run.json").read_text()
    for words, message in (
        (["--seed", "5"], "--seed: 5 here, 0 there"),
        (["--train_split", "validation"], "--train_split: 'validation' here, 'train' there"),
        (["--shuffle_captions"], "--shuffle_captions: True here, False there"),
        (["--per_device_train_batch_size", "2"], "--per_device_train_batch_size: 2 here, 4 there"),
        (["--data_seed", "9"], "--data_seed: 9 here, 'None' there"),
        (["--flip_axes", "depth"], "--flip_axes: ['depth'] here, [] there"),
        (["--gradient_accumulation_steps", "2"], "--gradient_accumulation_steps: 2 here, 1 there"),
    ):
        assert train_fvlm.main([*newest, *words]) == 2
        assert message in capsys.readouterr().err
    assert (work / "run" / "run.json").read_text() == before


def test_every_setting_that_steps_hang_on_is_compared_at_a_resume(tmp_path):
    settings = settings_of(tmp_path=tmp_path)
    checkpoint = tmp_path / "run" / "checkpoint-3"
    checkpoint.mkdir(parents=True)
    saved = json.loads(json.dumps(train_fvlm.resolved_settings(settings), default=str))
    (tmp_path / "run" / "run.json").write_text(json.dumps(saved))
    train_fvlm.check_same_run(settings, str(checkpoint))
    for words in (
        *(["--data", "e"], ["--train_split", "x"], ["--shuffle_captions"], ["--max_train_rows", "50"]),
        *(["--random_crop", "false"], ["--flip_axes", "depth"], ["--flip_probability", "0.9"], ["--seed", "7"]),
        *(["--data_seed", "9"], ["--train_sampling_strategy", "sequential"], ["--per_device_train_batch_size", "2"]),
        *(["--gradient_accumulation_steps", "4"], ["--lr_schedule", "published"], ["--warmup_start_lr", "1e-7"]),
        *(["--min_lr", "1e-7"], ["--weight_decay_everywhere"], ["--skip_inactive_organs"]),
        *(["--published_gradient_scale"], ["--attn_implementation", "eager"]),
        *(["--lr_scheduler_type", "constant"], ["--warmup_steps", "9"], ["--optim", "sgd"], ["--weight_decay", "0.3"]),
        *(["--adam_beta1", "0.8"], ["--adam_beta2", "0.9"], ["--adam_epsilon", "1e-6"]),
    ):
        with pytest.raises(SettingsError, match=rf"other settings \({words[0]}: .* here, .* there\)"):
            train_fvlm.check_same_run(settings_of(*words, tmp_path=tmp_path), str(checkpoint))
    for words in (["--max_steps", "99"], ["--learning_rate", "1e-5"], ["--max_grad_norm", "0.1"], ["--bf16"]):
        train_fvlm.check_same_run(settings_of(*words, tmp_path=tmp_path), str(checkpoint))
    for section in ("data", "training"):  # a run.json from before these were written
        saved[section] = {}
    (tmp_path / "run" / "run.json").write_text(json.dumps(saved))
    train_fvlm.check_same_run(settings_of("--flip_axes", "depth", tmp_path=tmp_path), str(checkpoint))


def test_organs_cannot_be_skipped_where_that_crashes_or_does_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")  # as `accelerate launch` hands it over; or --fp16
    with pytest.raises(SettingsError, match="--skip_inactive_organs and --fp16 exclude each other"):
        settings_of("--skip_inactive_organs", tmp_path=tmp_path)
    settings_of(tmp_path=tmp_path)
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION")
    args = settings_of("--skip_inactive_organs", tmp_path=tmp_path).training
    plain = TrainingArguments.__post_init__

    def under_deepspeed(self):
        plain(self)
        self.deepspeed_plugin = object()  # what `accelerate launch --use_deepspeed` or --deepspeed leave there

    monkeypatch.setattr(TrainingArguments, "__post_init__", under_deepspeed)
    with pytest.raises(SettingsError, match="--skip_inactive_organs has no effect under DeepSpeed"):
        type(args)(output_dir=str(tmp_path), per_device_train_batch_size=4, skip_inactive_organs=True)
    type(args)(output_dir=str(tmp_path), per_device_train_batch_size=4)


def tiny_command(work, name: str) -> list[str]:
    """The words that train the tiny recipe into the folder `name`."""
    words = {"--recipe": work / "tiny.yaml", "--data": work / "split", "--output_dir": work / name}
    return [str(word) for pair in words.items() for word in pair]


def test_the_control_trains_and_says_so_on_its_card(work):
    command = tiny_command(work, "control")
    words = ["--shuffle_captions", "--max_steps", "2", "--eval_strategy", "no", "--save_strategy", "no"]
    assert train_fvlm.main([*command, *words]) == 0
    card = (work / "control" / "README.md").read_text()
    assert "SHUFFLED between patients" in card and "SHUFFLED" not in (work / "run" / "README.md").read_text()
    own, shuffled = (OrganLossFile(work / name / "organ_losses.csv").read()[:3] for name in ("run", "control"))
    assert [row.loss for row in own] != [row.loss for row in shuffled]


def test_organs_that_do_not_learn_are_told_in_log_record_and_card(work, caplog):
    rows = [tiny_row(number) for number in range(24)]
    for row in rows:
        next(entry for entry in row["captions"] if entry["organ"] == "heart")["caption"] = "The heart was examined."
    split = write_tiny_split(work / "equal", rows={"train": rows, "validation": rows[:8]})
    command = ["--recipe", str(work / "tiny.yaml"), "--data", str(split), "--output_dir", str(work / "alarmed")]
    command += ["--max_steps", "24", "--alarm_steps", "16", "--save_steps", "20", "--eval_strategy", "no"]
    assert train_fvlm.main(command) == 0
    facts = json.loads((work / "alarmed" / "run.json").read_text())
    (alarm,) = facts["alarms"]
    assert (alarm["step"], alarm["cause"], alarm["organs"]) == (16, "equal captions", ["heart"]) and alarm["is_alarm"]
    assert f"alarm: {alarm['text']}" in caplog.text
    assert f"- Alarm: {alarm['text']}" in (work / "alarmed" / "README.md").read_text()
    assert json.loads((work / "run" / "run.json").read_text())["alarms"] == []
    caplog.clear()
    assert train_fvlm.main([*command, "--resume_from_checkpoint", str(work / "alarmed" / "checkpoint-20")]) == 0
    assert "alarm:" not in caplog.text, "what was said before the checkpoint is not said again"
    assert json.loads((work / "alarmed" / "run.json").read_text())["alarms"] == [alarm]


def test_a_run_in_which_no_organ_entered_says_so(work, tmp_path, caplog):
    rows = [tiny_row(number) for number in range(8)]
    for row in rows:
        row["captions"] = [{**entry, "is_abnormal": False} for entry in row["captions"]]
    write_tiny_split(tmp_path / "normal", rows={"train": rows, "validation": rows})
    command = [
        "--recipe",
        str(work / "tiny.yaml"),
        "--eval_strategy",
        "no",
        "--save_strategy",
        "no",
        "--max_steps",
        "1",
    ]
    for data, is_told in ((tmp_path / "normal", True), (work / "split", False)):
        caplog.clear()
        output = str(tmp_path / f"run of {data.name}")
        assert train_fvlm.main([*command, "--data", str(data), "--output_dir", output]) == 0
        assert ("NOTHING WAS LEARNED" in caplog.text) == is_told


def test_zero_shot_scores_of_the_users_own_prompts_are_logged(work):
    items = [
        {"finding": f"{organ} {name}", "organ": organ, "positive": f"{name}.", "negative": f"{organ} shows no {name}."}
        for organ, name in (("lung", "Nodule"), ("heart", "Enlarged"))
    ]
    prompts = {"name": "mine", "version": 1, "source": "made up for a test", "changes": {1: "first"}, "items": items}
    (work / "mine.yaml").write_text(yaml.safe_dump(prompts))
    command = tiny_command(work, "scored")
    words = ["--eval_tasks", str(work / "mine.yaml"), "--max_steps", "2", "--eval_steps", "2", "--save_strategy", "no"]
    assert train_fvlm.main([*command, *words]) == 0
    history = json.loads((work / "scored" / "trainer_state.json").read_text())["log_history"]
    (score,) = [line["eval_mine_macro_auc"] for line in history if "eval_loss" in line]
    assert 0 <= score <= 1
    assert f"mine_macro_auc: {score:.3f}" in (work / "scored" / "README.md").read_text()


def test_prompts_that_do_not_fit_stop_before_training(work, capsys):
    item = {"finding": "lung Nodule", "organ": "lung", "positive": "Nodule.", "negative": "No nodule."}
    command = tiny_command(work, "misspelt")
    for change, message in (
        ({"finding": "lung Nodul"}, "none of its findings is among"),
        ({"organ": "lungs"}, "organ 'lungs' is not in config.organs"),
    ):
        prompts = {"name": "mine", "version": 1, "source": "a test", "changes": {1: "first"}, "items": [item | change]}
        (work / "misspelt.yaml").write_text(yaml.safe_dump(prompts))
        assert train_fvlm.main([*command, "--eval_tasks", str(work / "misspelt.yaml")]) == 2
        assert message in capsys.readouterr().err
    assert not (work / "misspelt" / "run.json").exists()


def test_a_pretrained_text_encoder_keeps_its_weights(work, tmp_path):
    from transformers import AutoModel, AutoTokenizer

    encoder = tmp_path / "encoder"
    trained = AutoModel.from_config(train_fvlm_config(work).text_config)  # with a pooler, which the model leaves out
    trained.save_pretrained(encoder)
    AutoTokenizer.from_pretrained(work / "run", trust_remote_code=True).save_pretrained(encoder)
    recipe = yaml.safe_load(TINY_RECIPE)
    recipe["model"]["text_encoder"] = {"pretrained": str(encoder)}
    recipe["training"] |= {"learning_rate": 0.0, "max_steps": 1, "eval_strategy": "no", "save_strategy": "no"}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    command = ["--recipe", str(tmp_path / "recipe.yaml"), "--data", str(work / "split")]
    assert train_fvlm.main([*command, "--output_dir", str(tmp_path / "run")]) == 0
    for path in (tmp_path / "run").glob("*.json"):
        assert str(tmp_path) not in path.read_text(encoding="utf-8"), path
    saved = load_file(tmp_path / "run" / "model.safetensors")
    expected = {name: value for name, value in trained.state_dict().items() if not name.startswith("pooler")}
    assert expected and all(torch.equal(saved[f"text_model.{name}"], value) for name, value in expected.items())
    (encoder / "model.safetensors").unlink()
    torch.save({**trained.state_dict(), "code": print}, encoder / "pytorch_model.bin")
    with pytest.raises(SettingsError, match="cannot be loaded"):  # a pickle may hold tensors only
        load_text_encoder(str(encoder), None)


# Settings


def test_the_command_line_wins_over_the_recipe_and_keeps_the_rest(tmp_path):
    settings = settings_of(
        *("--max_steps", "10", "--training.logging_steps", "5", "--model.projection_dim", "64"),
        *("--model.vision_config.patch_size", "4", "4", "8", "--model.temperature_init=1e-1", "--no_random_crop"),
        tmp_path=tmp_path,
    )
    assert settings.training.max_steps == 10 and settings.training.logging_steps == 5
    assert settings.training.learning_rate == 2e-3 and settings.training.per_device_train_batch_size == 4
    assert settings.model["projection_dim"] == 64 and settings.model["temperature_init"] == 0.1
    assert settings.model["vision_config"]["patch_size"] == [4, 4, 8]
    assert settings.model["vision_config"]["hidden_size"] == 16
    assert settings.data.random_crop is False
    assert settings.training.hub_private_repo is True and settings.training.report_to == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--max_step", "3"], "unknown name 'max_step'; nearest: 'max_steps'"),
        (["--model.projection_dims", "3"], "'projection_dims'; nearest: 'projection_dim'"),
        (["--model.vision_config.hiden_size", "3"], "vision_config: unknown name 'hiden_size'; nearest: 'hidden_size'"),
        (["--model.text_encoder.from_scratch.hiden_size", "3"], "'hiden_size'; nearest: 'hidden_size'"),
        (["--model.text_encoder.pretrained", "x"], "exactly one of from_scratch"),
        (["--model.organs", "[lung]"], "model.organs is not set by hand"),
        (
            ["--model.vision_config.patch_size", "3", "4", "8"],
            "volume_size depth 8 is no multiple of patch_size depth 3",
        ),
        (["--model.vision_config.num_channels", "3"], "2 windows make 2 channels"),
        (["--model.projection_dim"], "--model.projection_dim needs a value"),
        (["--per_device_train_batch_size", "1"], "contrasts a patient with nobody"),
        (["--max_train_rows", "3"], "less than one batch of 4"),
        (["--eval_tasks", "x", "--eval_strategy", "no"], "would never be scored"),
        (["--flip_axes", "left"], "'left' is no axis"),
        (["--resume_from_checkpoint", "true"], "there is no checkpoint in"),
        (["--resume_from_checkpoint", "elsewhere"], "elsewhere is no checkpoint"),
        (["--dataloader_drop_last", "false"], "--dataloader_drop_last on"),
        (["--window_volumes", "0"], "--window_volumes 0 must be at least 1"),
        (["--model.text_encoder.attention_dropout", "much"], "attention_dropout 'much' must lie in [0, 1)"),
        (["stray"], "words that belong to no argument: stray"),
    ],
)
def test_what_cannot_work_is_refused_before_any_data_is_read(tmp_path, words, message):
    with pytest.raises(SettingsError) as caught:
        settings_of(*words, tmp_path=tmp_path)  # the data set `d` does not exist
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"modle": {}}, "unknown name 'modle'; nearest: 'model'"),
        ({"training": {"learnin_rate": 1}}, "training section: unknown name 'learnin_rate'; nearest: 'learning_rate'"),
        ({"data": {"split": "x"}}, "data section: unknown name 'split'"),
        ({"model": 3}, "section model must be a mapping"),
    ],
)
def test_unknown_recipe_keys_are_refused(tmp_path, change, message):
    with pytest.raises(SettingsError) as caught:
        settings_of(recipe=yaml.safe_dump(yaml.safe_load(TINY_RECIPE) | change), tmp_path=tmp_path)
    assert message in str(caught.value)


def test_missing_recipe_data_and_output_folder_are_named(tmp_path):
    with pytest.raises(SettingsError, match="neither a file nor one of .*synthetic_demo"):
        parse_settings(["--recipe", "sinthetic", "--data", "d", "--output_dir", "o"], "help")
    with pytest.raises(SettingsError, match="--data is missing"):
        parse_settings(["--recipe", "synthetic_demo", "--output_dir", str(tmp_path)], "help")
    with pytest.raises(SettingsError, match="--output_dir is missing"):
        parse_settings(["--recipe", "synthetic_demo", "--data", "d"], "help")


def test_auto_resume_starts_afresh_where_there_is_nothing(tmp_path):
    assert settings_of("--resume_from_checkpoint", "auto", tmp_path=tmp_path).training.resume_from_checkpoint is None
    checkpoint = tmp_path / "out" / "checkpoint-5"
    checkpoint.mkdir(parents=True)
    (checkpoint / "trainer_state.json").write_text("{}")  # the last file of a whole one
    settings = settings_of("--resume_from_checkpoint", "auto", tmp_path=tmp_path)
    assert settings.training.resume_from_checkpoint == str(checkpoint)
    half = checkpoint.with_name("checkpoint-7")
    half.mkdir()
    assert settings_of("--resume_from_checkpoint", "true", tmp_path=tmp_path).training == settings.training
    with pytest.raises(SettingsError, match="checkpoint-7 is no checkpoint, or half of one"):
        settings_of("--resume_from_checkpoint", str(half), tmp_path=tmp_path)


def test_addresses_are_streamed_and_not_scored_in_between(tmp_path):
    with pytest.raises(SettingsError, match="is an address: add --streaming"):
        settings_of("--data", "s3://bucket/split", tmp_path=tmp_path)
    streamed = ["--data", "owner/split", "--streaming"]
    assert settings_of(*streamed, tmp_path=tmp_path).data.streaming
    with pytest.raises(SettingsError, match="--eval_tasks would download the data set"):
        settings_of(*streamed, "--eval_tasks", "synthetic", tmp_path=tmp_path)
    with pytest.raises(SettingsError, match="--enable_jit_checkpoint is not needed"):
        settings_of("--enable_jit_checkpoint", tmp_path=tmp_path)


def test_numbers_in_yaml_are_numbers():
    assert load_yaml("{a: 2e-3, b: 1E5, c: .5, d: 3, e: no, f: 1e}") == {
        "a": 0.002, "b": 1e5, "c": 0.5, "d": 3, "e": False, "f": "1e"
    }  # fmt: skip


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_recipes_that_ship_are_whole(path, tmp_path):
    words = ["--recipe", path.stem, "--data", "d", "--output_dir", str(tmp_path), "--use_cpu"]  # or bf16 asks for a GPU
    if path.stem == "adapt_lora":  # for a model that is there
        words += ["--init_from", "d"]
    settings = parse_settings(words, "help")
    assert settings.recipe["name"] == path.stem and settings.recipe["version"] >= 1
    assert settings.training.group_size >= 8, "too few to contrast"
    organs = load_organ_set(settings.model.get("organ_set", "chest_4"))  # a recipe may leave it to the split
    geometry = settings.model.get("spacing", (20.0, 4.0, 4.0)), settings.model.get("margin_voxels", (1, 4, 4))
    preparation = settings.model.get("preprocessing", "standard")
    description = SplitDescription(organs.name, tuple(organs.organs), organs.classes, *geometry, preparation)
    check_against_recipe(description, settings.model, "d")
    assert has_auto_windows(settings.model) or "windows" not in settings.model


def test_a_batch_size_that_is_not_used_is_named(tmp_path, caplog):
    words = ["--recipe", "full_size", "--data", "d", "--output_dir", str(tmp_path), "--use_cpu"]
    args = parse_settings(words, "help").training
    assert (args.group_size, args.micro_batch_size, args.is_cached) == (
        32,
        2,
        True,
    ) and "is not used" not in caplog.text
    assert parse_settings([*words, "--per_device_train_batch_size", "4"], "help").training.micro_batch_size == 2
    assert "--per_device_train_batch_size 4 is not used: --contrastive_batch_size 32" in caplog.text


def test_the_published_recipe_is_the_published_run(tmp_path):
    words = ["--recipe", "published_chest_4", "--data", "d", "--output_dir", str(tmp_path)]
    settings = parse_settings(words, "help")
    args, data = settings.training, settings.data
    assert args.per_device_train_batch_size * 4 == 56 and args.num_train_epochs == 20 and not (args.bf16 or args.fp16)
    assert (args.lr_schedule, args.learning_rate, args.min_lr) == ("published", 1e-4, 1e-6)
    assert (args.warmup_start_lr, args.get_warmup_steps(20_000)) == (1e-6, 377)
    assert args.optim.startswith("adamw_torch") and (args.adam_beta1, args.adam_beta2) == (0.9, 0.999)
    assert args.weight_decay == 0.01 and args.weight_decay_everywhere and args.max_grad_norm == 0
    assert args.skip_inactive_organs and args.published_gradient_scale
    assert data.flip_axes == ["depth", "height", "width"] and data.flip_probability == 0.2
    config = build_config(settings.model, organs=["lung"], text_config={"model_type": "bert"})
    assert not config.text_token_types and config.max_text_length == 384 and config.organ_reduction == "sum"
    assert config.vision_config.hidden_size == 768 and config.vision_config.position_grid == (7, 16, 11)
    assert config.preprocessing == "published" and config.completeness == "border"


def test_the_24_organ_recipe_contrasts_more_than_two(tmp_path):
    words = ["--recipe", "body_24_one_gpu", "--data", "d", "--output_dir", str(tmp_path)]
    settings = parse_settings([*words, "--bf16", "false"], "help")  # a CPU without bf16 refuses it
    args = settings.training
    assert args.group_size >= 16 and args.gradient_accumulation_steps == 1 and args.activation_checkpointing
    assert (args.per_device_eval_batch_size, args.num_train_epochs, args.weight_decay) == (8, 100, 0.05)
    assert args.learning_rate * args.lr_scheduler_kwargs["min_lr_rate"] == pytest.approx(1e-6)
    config = build_config(settings.model, organs=["lung"], text_config={"model_type": "bert"})
    assert (config.completeness, config.min_organ_voxels, config.max_text_length) == ("min_voxels", 100, 200)


def test_help_is_a_manual(capsys):
    with pytest.raises(SystemExit) as caught:
        train_fvlm.main(["--help"])
    text = capsys.readouterr().out
    assert caught.value.code == 0
    for words in ("python train_fvlm.py --recipe synthetic_demo --data", "--shuffle_captions", "token_selection"):
        assert words in text
    assert "Trainer: 500" in text, "a default that departs from the Trainer's says so"


FULL_SIZE = """
name: full_size
model:
  organ_set: chest_4
  text_encoder: {pretrained: ENCODER}
training: {per_device_train_batch_size: 2, per_device_eval_batch_size: 1, max_steps: 3, learning_rate: 1e-4,
  logging_steps: 1, eval_strategy: steps, eval_steps: 3, save_steps: 3, use_cpu: true, activation_checkpointing: true}
"""


def write_full_size_split(folder):
    """Four volumes of the published crop's size with the four organs of chest_4 as boxes."""
    organs = load_organ_set("chest_4")
    rows = []
    for number in range(4):
        generator = np.random.default_rng(number)
        volume, mask = np.full((120, 260, 360), -500, np.int16), np.zeros((120, 260, 360), np.uint8)
        row = tiny_row(number)
        row["captions"] = []
        for organ_index, organ in enumerate(organs.organs):
            box = (slice(20, 90), slice(40, 200), slice(30 + 80 * organ_index, 90 + 80 * organ_index))
            mask[box] = organ_index + 1
            volume[box] = generator.integers(-200, 300)
            text = f"{organ} with finding {number}."
            row["captions"].append({"organ": organ, "caption": text, "is_abnormal": True, "is_mentioned": True})
        row |= {"volume": encode_array(volume), "mask": encode_array(mask), "shape": list(mask.shape)}
        rows.append(row)
    write_tiny_split(folder, rows={"train": rows, "validation": rows[:2]})
    set_of = {"name": organs.name, "organs": list(organs.organs), "classes": organs.classes}
    settings = {"organ_set": set_of, "spacing": [3.0, 1.0, 1.0], "margin_voxels": [5, 20, 20]}
    (folder / "manifest.json").write_text(json.dumps({"tool": "test", "settings": settings}))
    return folder


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_three_steps_of_the_published_architecture_fit_into_20_gb(tmp_path):
    write_full_size_split(tmp_path / "split")
    (tmp_path / "full.yaml").write_text(FULL_SIZE.replace("ENCODER", str(tmp_path / "encoder")))
    BertModel(BertConfig()).save_pretrained(tmp_path / "encoder")  # BERT-base, random weights
    texts = [entry["caption"] for row in load_split(str(tmp_path / "split"), "train") for entry in row["captions"]]
    tokenizer = train_tokenizer(texts, 500, 384)
    tokenizer.add_tokens([f"filler{number}" for number in range(BertConfig().vocab_size - len(tokenizer))])
    tokenizer.save_pretrained(tmp_path / "encoder")
    command = [sys.executable, str(ROOT / "train_fvlm.py"), "--recipe", str(tmp_path / "full.yaml")]
    command += ["--data", str(tmp_path / "split"), "--output_dir", str(tmp_path / "run")]
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stderr[-3000:]
    peak_gb = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e6  # kilobytes on Linux
    facts = json.loads((tmp_path / "run" / "run.json").read_text())
    print(f"peak {peak_gb:.1f} GB, {facts['train_seconds']} s for 3 steps, {facts['num_parameters']:,} parameters")
    assert facts["num_parameters"] > 190e6 and facts["steps"] == 3
    assert peak_gb < 20
    history = json.loads((tmp_path / "run" / "trainer_state.json").read_text())["log_history"]
    assert [line["step"] for line in history if "loss" in line] == [1, 2, 3]
    assert any("eval_loss" in line for line in history)
    script = (
        "import sys; from transformers import AutoModel, AutoProcessor\n"
        "model = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
        "AutoProcessor.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
        "print(sum(parameter.numel() for parameter in model.parameters()))\n"
    )
    fresh = [sys.executable, "-c", script, str(tmp_path / "run")]
    loaded = subprocess.run(fresh, capture_output=True, text=True, cwd=tmp_path)
    assert loaded.returncode == 0, loaded.stderr[-3000:]
    assert int(loaded.stdout) == facts["num_parameters"]
