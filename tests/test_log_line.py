"""The log's line for a person is short; trackers, trainer_state.json and the CSV file get every figure."""

import math
import re
from types import SimpleNamespace

import pytest
from tiny_split import ORGANS
from tiny_training import tiny_rows, tiny_trainer
from transformers import TrainerCallback

from training_fvlm.arguments import FVLMTrainingArguments
from training_fvlm.log_line import StepClock, in_short
from training_fvlm.organ_losses import TRAIN_FILE, OrganLossFile, OrganLossRow

NUMBER = re.compile(r"(?<![a-z@])-?\d+(?:\.\d+)?(?:e[+-]?\d+)?")


class Tracker(TrainerCallback):
    """Keeps what a tracker is given."""

    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append(dict(logs))


@pytest.mark.parametrize("with_bar", [False, True])
def test_a_line_is_short_and_a_tracker_gets_all(tmp_path, capsys, with_bar):
    tracker = Tracker()
    settings = {
        "eval_strategy": "steps",
        "eval_steps": 4,
        "eval_rows": tiny_rows(7, seed=5),
        "disable_tqdm": not with_bar,
        "logging_first_step": FVLMTrainingArguments.logging_first_step,
    }
    trainer = tiny_trainer(tmp_path, tiny_rows(12), max_steps=4, logging_steps=2, callbacks=[tracker], **settings)
    trainer.train()
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step")]
    assert [line.split()[1] for line in said] == ["1/4", "2/4", "4/4", "4", "4/4"]
    assert all(len(line) < 160 and len(NUMBER.findall(line)) <= 12 for line in said)
    for part in (r"loss \d\.\d{3}  ", r"\d of \d organs below chance, best \w+ -?\d+ %, worst \w+ -?\d+ %"):
        assert re.search(part, said[2]) and re.search(part, said[3])
    assert re.search(r"temperature 0\.\d+  lr \d\.\de-\d\d  \d\S* s/step$", said[2])
    assert re.search(r"held out: .* retrieval@1 \d\.\d{3} \(guess \d\.\d{3}\)", said[3])
    losses = [logs for logs in tracker.logs if "loss" in logs]
    assert len(losses) == 3 and {f"loss/{organ}" for organ in ORGANS} < set(losses[0])
    assert {"grad_norm/vision", "chance", "text_cosine"} < set(losses[-1])
    kept = [line for line in trainer.state.log_history if "loss" in line]
    assert all(logs.items() <= line.items() for logs, line in zip(losses, kept, strict=True))


def test_a_run_shorter_than_its_log_lines_leaves_its_losses(tmp_path):
    tiny_trainer(tmp_path, tiny_rows(12), max_steps=3, logging_steps=20, logging_first_step=True).train()
    rows = OrganLossFile(tmp_path / TRAIN_FILE).read()
    assert [(row.step, row.batches) for row in rows if row.organ == "lung"] == [(1, 1), (3, 2)]
    silent = tiny_trainer(
        tmp_path / "silent", tiny_rows(12), max_steps=2, logging_strategy="no", logging_first_step=True
    )
    silent.train()
    assert not any("loss" in line for line in silent.state.log_history)


def row(organ: str, loss: float, floor: float = 1.0) -> OrganLossRow:
    return OrganLossRow(20, 1.0, organ, loss, 2.0, floor, 1.0)


def test_organs_in_short():
    rows = [
        row("lung", 1.25),
        row("heart", 1.96),
        row("aorta", 2.1),
        row("brain", math.nan),
        row("hip", 2.0, floor=2.0),
    ]
    assert in_short(rows) == "1 of 3 organs below chance, best lung 75 %, worst aorta -10 %"
    assert in_short(rows[:1]) == "1 of 1 organs below chance, lung 75 %"
    assert in_short(rows[3:]) == "no organ in the loss"


def test_a_step_is_timed_without_what_comes_between(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("training_fvlm.log_line.time", SimpleNamespace(monotonic=lambda: now[0]))
    clock = StepClock()

    def after(seconds, event):
        now[0] += seconds
        getattr(clock, event)(None, None, None)

    after(5, "on_train_begin")
    after(2, "on_step_end")
    after(50, "on_evaluate")
    after(70, "on_save")
    after(4, "on_step_end")
    assert clock.take_mean() == 3 and math.isnan(clock.take_mean())
