"""The objective from the command line: runs with teachers, labels and reports, and what is refused."""

import json

import pytest
from tiny_split import ORGANS, TINY_RECIPE, tiny_row, write_tiny_split
from transformers import AutoModel

import train_fvlm
from training_fvlm.arguments import SettingsError, parse_settings
from training_fvlm.objective_settings import organ_numbers

TASK = "items:\n" + "".join(
    f'  - {{finding: "{organ} {name}", organ: {organ}}}\n'
    for organ, name in (("lung", "Nodule"), ("heart", "Enlarged"), ("aorta", "Wide"))
)
SHORT = ["--max_steps", "3", "--eval_strategy", "no", "--save_steps", "2", "--save_total_limit", "3"]


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A split, one without labels, one without reports, a recipe and findings of the organs."""
    folder = tmp_path_factory.mktemp("objective")
    write_tiny_split(folder / "split")
    rows = [tiny_row(number) for number in range(8)]
    write_tiny_split(folder / "unlabelled", rows={"train": [row | {"labels": []} for row in rows]})
    write_tiny_split(folder / "unspoken", rows={"train": [row | {"findings": "", "impression": ""} for row in rows]})
    (folder / "tiny.yaml").write_text(TINY_RECIPE, encoding="utf-8")
    (folder / "task.yaml").write_text(TASK, encoding="utf-8")
    return folder


def run(work, name, *words, split="split"):
    recipe, data = ["--recipe", str(work / "tiny.yaml")], ["--data", str(work / split)]
    return train_fvlm.main([*recipe, *data, "--output_dir", str(work / name), *SHORT, *words])


ALL = ["--targets", "momentum", "labels", "co_teaching", "--model.volume_pooling", "attention"]
ALL += ["--model.organ_reduction", "uncertainty", "--model.max_report_length", "40", "--organ_sampling", "balanced"]
ALL += ["--curriculum", "frequency", "--organ_token_dropout", "0.2", "--organ_label_smoothing", "0.02", "aorta=0.1"]


def test_a_run_with_all_of_it_ends_in_a_plain_model_and_goes_on(work, capsys):
    words = [*ALL, "--label_task", str(work / "task.yaml"), "--centring_rows", "8", "--logging_steps", "1"]
    words += ["--eval_strategy", "steps", "--eval_steps", "3"]  # of the first model alone
    assert run(work, "all", *words) == 0
    folder = work / "all"
    state = json.loads((folder / "trainer_state.json").read_text())
    first = [line for line in state["log_history"] if "loss" in line]
    assert len(first) == 3 and all({"global_loss", "peer_loss", "weight/lung"} <= set(line) for line in first)
    model = AutoModel.from_pretrained(folder, trust_remote_code=True)
    assert model.config.volume_pooling == "attention" and model.config.max_report_length == 40
    assert not list(folder.glob("*teacher*")) and not (folder / "peer").exists()
    assert (folder / "checkpoint-2" / "peer" / "model.safetensors").is_file()

    assert run(work, "all", *words, "--resume_from_checkpoint", str(folder / "checkpoint-2")) == 0
    state = json.loads((folder / "trainer_state.json").read_text())
    assert [line for line in state["log_history"] if "loss" in line] == first
    for other in ("--curriculum_end 0.9", "--organ_sampling_repeats 3", "--momentum_alpha 0.5"):
        assert run(work, "all", *words, *other.split(), "--resume_from_checkpoint", "true") == 2
        assert f"{other.split()[0]}: {other.split()[1]} here" in capsys.readouterr().err


@pytest.mark.parametrize(
    "split, words, message",
    [
        ("unlabelled", ["--targets", "labels", "--label_task", "TASK"], "it has no labels at all"),
        ("split", ["--targets", "labels", "--label_task", "synthetic"], "has no label for any finding"),
        ("unspoken", ["--model.volume_pooling", "mean"], "has no report: leave --model.volume_pooling out"),
        ("split", ["--organ_label_smoothing", "liver=0.1"], "['liver'] are none of the model's organs"),
        ("split", ["--label_task", "TASK"], "without --targets labels would never be read"),
        ("split", ["--global_schedule", "alternate"], "add --model.volume_pooling attention"),
        ("split", ["--model.max_report_length", "0"], "must be at least 1 token"),
        ("split", ["--targets", "momentums"], "--targets 'momentums' is none of"),
        ("split", ["--organ_sampling", "balanced", "--train_sampling_strategy", "sequential"], "an order of its own"),
    ],
)
def test_what_cannot_work_is_refused_by_name(work, capsys, split, words, message):
    words = [str(work / "task.yaml") if word == "TASK" else word for word in words]
    assert run(work, "refused", *words, split=split) == 2
    assert message in capsys.readouterr().err
    assert not (work / "refused").exists()


def test_teachers_need_whole_weights(tmp_path, monkeypatch):
    (tmp_path / "tiny.yaml").write_text(TINY_RECIPE)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    words = ["--recipe", str(tmp_path / "tiny.yaml"), "--data", "d", "--output_dir", str(tmp_path / "out")]
    with pytest.raises(SettingsError, match="--targets momentum needs whole weights on every process"):
        parse_settings([*words, "--targets", "momentum"], "help")


def test_a_recipe_may_hold_all_of_it(tmp_path):
    settings = "targets: momentum, organ_label_smoothing: {aorta: 0.2}, curriculum: frequency, "
    recipe = TINY_RECIPE.replace("training: {", "training: {" + settings)
    (tmp_path / "tiny.yaml").write_text(recipe)
    words = ["--recipe", str(tmp_path / "tiny.yaml"), "--data", "d", "--output_dir", str(tmp_path / "out")]
    args = parse_settings(words, "help").training
    assert args.targets == ["momentum"] and args.curriculum == "frequency"
    assert organ_numbers(args.organ_label_smoothing, ORGANS, "--x") == [0, 0, 0.2]


def test_numbers_of_organs_are_compared_when_a_run_goes_on(tmp_path):
    words = ["--recipe", str(tmp_path / "tiny.yaml"), "--data", "d", "--output_dir", str(tmp_path / "out")]

    def settings_of(smoothing):
        (tmp_path / "tiny.yaml").write_text(
            TINY_RECIPE.replace("training: {", f"training: {{organ_label_smoothing: {smoothing}, ")
        )
        return parse_settings(words, "help")

    checkpoint = tmp_path / "out" / "checkpoint-1"
    checkpoint.mkdir(parents=True)
    saved = json.dumps(train_fvlm.resolved_settings(settings_of("{aorta: 0.2}")), default=str)
    (tmp_path / "out" / "run.json").write_text(saved)
    train_fvlm.check_same_run(settings_of("[aorta=0.2]"), str(checkpoint))
    for other in ("{aorta: 0.3}", "0.2", "[aorta=0.2, lung=0.1]"):
        with pytest.raises(SettingsError, match="--organ_label_smoothing: .* here, .* there"):
            train_fvlm.check_same_run(settings_of(other), str(checkpoint))
