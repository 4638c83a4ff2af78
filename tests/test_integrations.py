"""What a run logs arrives at tensorboard, wandb and trackio under tidy names; skipped for what is not installed."""

import math
import re

import pytest
from tiny_split import ORGANS
from tiny_training import tiny_rows, tiny_trainer

from training_fvlm.organ_losses import EVAL_FILE, TRAIN_FILE, OrganLossFile

SETTINGS = {"max_steps": 4, "logging_steps": 2, "eval_strategy": "steps", "eval_steps": 4}


def run(folder, tracker):
    """Train four steps with an evaluation; returns name -> {step: value} as the organs' tables have them."""
    trainer = tiny_trainer(folder, tiny_rows(16), eval_rows=tiny_rows(8, seed=3), report_to=[tracker], **SETTINGS)
    trainer.train()
    expected: dict[str, dict[int, float]] = {}
    for part, name in (("train", TRAIN_FILE), ("eval", EVAL_FILE)):
        for row in OrganLossFile(folder / name).read():
            if row.active:
                expected.setdefault(f"{part}/loss/{row.organ}", {})[row.step] = row.loss
            if not math.isnan(row.text_cosine):
                expected.setdefault(f"{part}/text_cosine/{row.organ}", {})[row.step] = row.text_cosine
            if part == "eval" and row.active:
                expected.setdefault(f"{part}/retrieval_at_1/{row.organ}", {})[row.step] = row.retrieval
    for name in ("train/loss/", "train/text_cosine/", "eval/loss/", "eval/retrieval_at_1/"):
        assert [organ for organ in ORGANS if name + organ in expected], name
    return expected


def check(arrived, expected):
    """Every number of the tables has arrived, beside those of the whole run, and all names are tidy."""
    for name, values in expected.items():
        for step, value in values.items():
            assert arrived[name][step] == pytest.approx(value, abs=2e-5), name
    means = ("loss", "chance", "floor", "text_cosine", "temperature", "active_organs", "grad_norm", "learning_rate")
    towers = ("vision", "text", "pooling", "projections", "temperature")
    means = {f"train/{name}" for name in means} | {f"train/grad_norm/{tower}" for tower in towers}
    means |= {f"eval/{name}" for name in ("loss", "chance", "retrieval_at_1", "retrieval_at_1_chance")}
    assert means <= set(arrived)
    assert all(re.fullmatch(r"(train|eval)/[a-z0-9_]+(/[a-z0-9_ ]+)?", name) for name in arrived)


def test_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    expected = run(tmp_path, "tensorboard")
    (folder,) = {path.parent for path in tmp_path.rglob("events.out.tfevents.*")}
    events = EventAccumulator(str(folder))
    events.Reload()
    scalars = {tag: {event.step: event.value for event in events.Scalars(tag)} for tag in events.Tags()["scalars"]}
    check(scalars, expected)


def test_wandb_offline(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    for name, value in {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path), "WANDB_SILENT": "true"}.items():
        monkeypatch.setenv(name, value)
    expected = run(tmp_path / "run", "wandb")
    last = {name: value for name, value in dict(wandb.run.summary).items() if name.startswith(("train/", "eval/"))}
    wandb.finish()
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))
    del last["train/global_step"]  # wandb keeps the newest value of each name
    newest = {name: {max(values): values[max(values)]} for name, values in expected.items()}
    check({name: dict.fromkeys(newest.get(name, [0]), value) for name, value in last.items()}, newest)


def test_trackio_offline(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read when it is imported
    pytest.importorskip("trackio")
    from trackio.sqlite_storage import SQLiteStorage

    expected = run(tmp_path / "run", "trackio")
    (name,) = SQLiteStorage.get_runs("huggingface")  # the Trainer's default project
    arrived: dict[str, dict[int, float]] = {}
    for line in SQLiteStorage.get_logs("huggingface", name):
        for key, value in line.items():
            if key.startswith(("train/", "eval/")) and key != "train/global_step":
                arrived.setdefault(key, {})[line["train/global_step"]] = value
    check(arrived, expected)
