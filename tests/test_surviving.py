"""Runs that are stopped, broken or short of disk, and go on: the same losses to the digit, and nothing lost."""

import errno
import json
import math
import os
import signal
import subprocess
from pathlib import Path

import pytest
import torch
from tiny_split import ORGANS, tiny_row, write_tiny_split
from tiny_training import tiny_rows, tiny_trainer
from transformers import TrainerCallback

from training_fvlm.broken_steps import BrokenStep
from training_fvlm.checkpoints import CheckpointError, newest_checkpoint
from training_fvlm.data import ProcessedSplit, RowError, load_split
from training_fvlm.durable import plain_message
from training_fvlm.organ_losses import EVAL_FILE, TRAIN_FILE
from training_fvlm.signals import StopRequested, StopSignals

ROWS = tiny_rows(12)
# 12 rows in batches of 4, 3 steps an epoch; log lines of two steps, so that a checkpoint may fall between them
SETTINGS = {"max_steps": 8, "logging_steps": 3, "dropout": 0.1, "warmup_steps": 0.2, "lr_scheduler_type": "cosine"}
SAVING = {**SETTINGS, "save_strategy": "steps", "save_steps": 2, "save_total_limit": 2}


def slow(*values):
    """A case that says little more than those that run every time."""
    return pytest.param(*values, marks=pytest.mark.slow)


def lines(trainer, key: str = "loss") -> list[dict]:
    return [line for line in trainer.state.log_history if key in line]


def timeless(lines: list[dict]) -> list[dict]:
    times = ("_runtime", "_per_second")
    return [{name: value for name, value in line.items() if not name.endswith(times)} for line in lines]


def assert_same_run(resumed, whole) -> None:
    """Same log lines, same tables, same weights, to the last bit."""
    assert timeless(resumed.state.log_history[:-1]) == timeless(whole.state.log_history[:-1])
    weights = resumed.model.state_dict()
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, weights[name]), name
    for name in (TRAIN_FILE, EVAL_FILE):
        tables = [Path(trainer.args.output_dir) / name for trainer in (resumed, whole)]
        assert tables[0].is_file() == tables[1].is_file()
        if tables[0].is_file():
            assert tables[0].read_text() == tables[1].read_text()


def names(run: Path) -> list[str]:
    return sorted(path.name for path in run.iterdir() if "checkpoint" in path.name)


class At(TrainerCallback):
    """Does something at the end of a step."""

    def __init__(self, step: int, action, event: str = "on_step_end"):
        self.step, self.action = step, action
        setattr(self, event, self._call)

    def _call(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.action()


def signalled(number=signal.SIGUSR1) -> None:
    os.kill(os.getpid(), number)


def wait_for(signals) -> None:
    import time

    deadline = time.monotonic() + 10
    while not signals.number and time.monotonic() < deadline:
        time.sleep(0.005)


# --------------------------------------------------------------------------------------------------------------- resume
@pytest.fixture(scope="module")
def whole_runs(tmp_path_factory):
    """Undisturbed runs by their settings, each done once."""
    runs = {}

    def run(**settings):
        key = json.dumps(settings, sort_keys=True)
        if key not in runs:
            runs[key] = tiny_trainer(tmp_path_factory.mktemp("whole"), ROWS, **SAVING | settings)
            runs[key].train()
        return runs[key]

    return run


@pytest.mark.parametrize(
    ("workers", "accumulated", "step"), [(1, 2, 4), (2, 1, 6), slow(0, 1, 4), slow(0, 2, 6), slow(1, 1, 2)]
)
def test_resumed_at_any_step_with_any_loader(tmp_path, whole_runs, workers, accumulated, step):
    settings = {"dataloader_num_workers": workers, "gradient_accumulation_steps": accumulated}
    whole = whole_runs(**settings)
    stopping = tiny_trainer(tmp_path, ROWS, **SAVING | settings, callbacks=[At(step + 1, keyboard_interrupt)])
    with pytest.raises(KeyboardInterrupt):
        stopping.train()
    resumed = tiny_trainer(tmp_path, ROWS, **SAVING | settings)
    disturb(resumed)
    resumed.train(resume_from_checkpoint=newest_checkpoint(tmp_path))
    assert resumed.resumed_from.endswith(f"checkpoint-{step}")
    assert_same_run(resumed, whole)


def keyboard_interrupt() -> None:
    raise KeyboardInterrupt


def disturb(trainer) -> None:
    """What the checkpoint does not bring back would show."""
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.fill_(0.5)
    torch.rand(3)


def test_resumed_with_the_gradient_cache(tmp_path):
    settings = {**SAVING, "contrastive_batch_size": 6, "micro_batch_size": 2, "held_volumes_gb": 0.0}
    whole = tiny_trainer(tmp_path / "whole", ROWS, **settings)
    whole.train()
    resumed = tiny_trainer(tmp_path / "whole", ROWS, **settings)
    disturb(resumed)
    log = timeless(whole.state.log_history[:-1])
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-6"))
    assert timeless(resumed.state.log_history[:-1]) == log


def test_a_finished_run_that_is_started_again_trains_nothing(tmp_path):
    finished = tiny_trainer(tmp_path, ROWS, **SAVING)
    finished.train()
    again = tiny_trainer(tmp_path, ROWS, **SAVING)
    again.train(resume_from_checkpoint=newest_checkpoint(tmp_path))
    assert again.state.global_step == 8 and lines(again) == lines(finished)
    weights = again.model.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in finished.model.state_dict().items())


class Counter:
    """An object with a state, as an objective or a teacher has one."""

    def __init__(self):
        self.seen = torch.zeros(2)

    def state_dict(self):
        return {"seen": self.seen, "text": "x"}

    def load_state_dict(self, state):
        self.seen = state["seen"]


def test_other_states_are_kept_in_every_checkpoint(tmp_path):
    def trainer(counter):
        trainer = tiny_trainer(tmp_path, ROWS, **SAVING)
        if counter is not None:
            trainer.extra_state["counter"] = counter
        return trainer

    counter = Counter()
    counter.seen += 3
    trainer(counter).train()
    assert sorted(path.name for path in (tmp_path / "checkpoint-6").glob("state_counter.*")) == [
        "state_counter.json",
        "state_counter.safetensors",
    ]
    back = Counter()
    trainer(back).train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert back.seen.tolist() == [3, 3]
    with pytest.raises(CheckpointError, match="holds no state of 'other'"):
        without = trainer(Counter())
        without.extra_state["other"] = Counter()
        without.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))


# -------------------------------------------------------------------------------------------------------------- signals
@pytest.mark.parametrize(("number", "step"), [(signal.SIGUSR1, 4), (signal.SIGTERM, 5), (signal.SIGUSR1, 6)])
def test_a_signal_ends_the_step_and_the_run_goes_on_later(tmp_path, whole_runs, number, step):
    """Steps 4 and 5 lie within an epoch and within a log line, step 6 ends an epoch."""
    with StopSignals() as signals:
        stopped = tiny_trainer(tmp_path, ROWS, **SETTINGS, callbacks=[])
        stopped.add_callback(At(step, lambda: (signalled(number), wait_for(signals))))
        stopped.signals = signals
        with pytest.raises(StopRequested, match=f"{number.name}: stopped after step {step} with .*checkpoint-{step}"):
            stopped.train()
    assert names(tmp_path) == [f"checkpoint-{step}"], "also where --save_strategy is no"
    resumed = tiny_trainer(tmp_path, ROWS, **SAVING)
    disturb(resumed)
    resumed.train(resume_from_checkpoint=newest_checkpoint(tmp_path))
    assert_same_run(resumed, whole_runs())


def test_a_signal_at_the_last_step_changes_nothing(tmp_path, whole_runs):
    with StopSignals() as signals:
        trainer = tiny_trainer(tmp_path, ROWS, **SAVING)
        trainer.add_callback(At(8, lambda: (signalled(), wait_for(signals))))
        trainer.signals = signals
        trainer.train()
    assert_same_run(trainer, whole_runs())


def test_a_signal_before_the_first_step_writes_nothing(tmp_path):
    with StopSignals() as signals:
        signalled()
        wait_for(signals)
        trainer = tiny_trainer(tmp_path, ROWS, **SAVING)
        trainer.signals = signals
        with pytest.raises(StopRequested, match="before the first step"):
            trainer.train()
    assert names(tmp_path) == []


@pytest.mark.parametrize("step", [3, 4], ids=["between", "where the model alone was saved"])
def test_a_model_alone_is_not_enough_to_go_on(tmp_path, step):
    with StopSignals() as signals:
        trainer = tiny_trainer(tmp_path, ROWS, **SAVING | {"save_only_model": True})
        trainer.add_callback(At(step, lambda: (signalled(), wait_for(signals))))
        trainer.signals = signals
        with pytest.raises(StopRequested):
            trainer.train()
    assert not (tmp_path / "checkpoint-2" / "optimizer.pt").exists()
    last = tmp_path / f"checkpoint-{step}"
    assert (last / "optimizer.pt").exists() and (last / "rng_state.pth").exists()


@pytest.mark.parametrize(
    ("strategy", "moment"),
    [("steps", "zero_shot"), ("epoch", "batch"), slow("steps", "batch"), slow("epoch", "zero_shot")],
)
def test_an_evaluation_that_is_broken_off_is_done_again(tmp_path, strategy, moment):
    heard = []  # the signals of the run that is stopped

    def zero_shot(model):
        if moment == "zero_shot" and heard:
            signalled()
            wait_for(heard[0])
        return {"tiny_macro_auc": 0.5}

    evaluating = {"eval_strategy": strategy, "eval_steps": 3, "eval_rows": tiny_rows(7, seed=5), "zero_shot": zero_shot}
    evaluating |= {**SETTINGS, "save_strategy": strategy, "save_steps": 3}
    whole = tiny_trainer(tmp_path / "whole", ROWS, **evaluating)
    whole.train()
    with StopSignals() as signals:
        heard.append(signals)
        stopped = tiny_trainer(tmp_path / "run", ROWS, **evaluating)
        if moment == "batch":
            collate, count = stopped.eval_collator, []

            def collate_and_signal(rows):
                count.append(len(rows))
                if len(count) == 2:
                    signalled()
                    wait_for(signals)
                return collate(rows)

            stopped.eval_collator = collate_and_signal
        stopped.signals = signals
        with pytest.raises(StopRequested, match="after step 3"):
            stopped.train()
    assert not lines(stopped, "eval_loss") and names(tmp_path / "run") == ["checkpoint-3"]
    heard.clear()
    resumed = tiny_trainer(tmp_path / "run", ROWS, **evaluating)
    resumed.train(resume_from_checkpoint=newest_checkpoint(tmp_path / "run"))
    assert len(lines(resumed, "eval_loss")) >= 2
    assert_same_run(resumed, whole)


def test_what_is_due_at_the_end_of_an_epoch_is_not_left_out(tmp_path):
    by_epoch = {"eval_strategy": "epoch", "save_strategy": "epoch", "logging_strategy": "epoch"}
    settings = {**SETTINGS, **by_epoch, "eval_rows": tiny_rows(4, seed=5)}
    whole = tiny_trainer(tmp_path / "whole", ROWS, **settings)
    whole.train()
    with StopSignals() as signals:
        stopped = tiny_trainer(tmp_path / "run", ROWS, **settings)
        stopped.add_callback(At(3, lambda: (signalled(), wait_for(signals))))
        stopped.signals = signals
        with pytest.raises(StopRequested, match="after step 3"):
            stopped.train()
    resumed = tiny_trainer(tmp_path / "run", ROWS, **settings)
    resumed.train(resume_from_checkpoint=newest_checkpoint(tmp_path / "run"))
    assert_same_run(resumed, whole)


def test_a_signal_in_the_evaluation_after_the_last_step(tmp_path):
    with StopSignals() as signals:
        trainer = tiny_trainer(tmp_path, ROWS, **SETTINGS, eval_rows=tiny_rows(4, seed=5))
        trainer.signals = signals
        trainer.train()
        signalled()
        wait_for(signals)
        with pytest.raises(StopRequested, match="after step 8"):
            trainer.evaluate()
    assert names(tmp_path) == ["checkpoint-8"]


# --------------------------------------------------------------------------------------------------------- broken steps
def break_weights(trainer, name: str, value: float = math.nan):
    def action():
        with torch.no_grad():
            dict(trainer.model.named_parameters())[name].fill_(value)

    return action


def test_a_loss_that_is_not_finite_names_step_rows_and_organs(tmp_path):
    trainer = tiny_trainer(tmp_path, ROWS, **SAVING | {"save_steps": 1})
    trainer.add_callback(At(3, break_weights(trainer, "organ_projection.weight_0"), "on_step_begin"))
    with pytest.raises(BrokenStep) as caught:
        trainer.train()
    message = str(caught.value)
    assert "the loss is nan at step 4" in message and "checkpoint-3." in message
    assert f"organs: {ORGANS[0]}" in message and "memory, split train" in message
    facts = json.loads((tmp_path / "broken_step.json").read_text())
    order = [row for _, row in list(trainer.train_sampler)[:4]]
    assert [entry["row"] for entry in facts["rows"]] == order
    assert [entry["scan_id"] for entry in facts["rows"]] == [f"train_{row}_a" for row in order]
    assert facts["organs"] == [ORGANS[0]] and facts["step"] == 4 and facts["loss"] == "nan"
    assert names(tmp_path) == ["checkpoint-2", "checkpoint-3"], "no checkpoint of the broken state"
    weights = torch.load(tmp_path / "checkpoint-3" / "optimizer.pt", weights_only=True)
    assert all(state["exp_avg"].isfinite().all() for state in weights["state"].values())


def test_one_row_that_breaks_the_loss_is_told_from_the_others(tmp_path):
    trainer = tiny_trainer(tmp_path, ROWS, **SAVING)
    embed = trainer.model.forward

    def forward(volume=None, **inputs):
        outputs = embed(volume=volume, **inputs)
        spoiled = torch.zeros_like(outputs.image_embeds)
        spoiled[2, 1] = math.nan
        outputs["image_embeds"] = outputs.image_embeds + spoiled
        return outputs

    trainer.model.forward = forward
    with pytest.raises(BrokenStep) as caught:
        trainer.train()
    order = [row for _, row in list(trainer.train_sampler)[:4]]
    named = f"the image embeddings of row {order[2]} (scan 'train_{order[2]}_a', memory, split train) ({ORGANS[1]});"
    assert named in str(caught.value)


@pytest.mark.parametrize("max_grad_norm", [0.0, 1.0])
def test_a_gradient_that_is_not_finite_with_a_finite_loss(tmp_path, max_grad_norm):
    trainer = tiny_trainer(tmp_path, ROWS, **SAVING | {"max_grad_norm": max_grad_norm})
    weights = dict(trainer.model.named_parameters())
    calls = []

    def infinite(gradient):
        calls.append(1)
        return gradient * math.inf if len(calls) == 4 else gradient

    weights["text_projection.weight"].register_hook(infinite)
    before = {}
    trainer.add_callback(At(3, lambda: before.update({name: p.clone() for name, p in weights.items()})))
    with pytest.raises(BrokenStep) as caught:
        trainer.train()
    message = str(caught.value)
    assert "the loss is finite, the gradient" in message and "at step 4" in message
    assert "parameters with such a gradient: text_projection.weight;" in message
    assert all(torch.equal(weights[name], value) for name, value in before.items()), "the step was not taken"


def test_a_gpu_is_not_waited_for(tmp_path):
    """The last step's numbers are left alone until the next one, or until something is logged or saved."""
    from training_fvlm.broken_steps import StepWatch

    watch, waited = StepWatch(), []

    class Event:
        def __init__(self, number):
            self.number = number

        def synchronize(self):
            waited.append(self.number)

    def step(number, loss):
        watch.end_step(number, torch.tensor(loss), 1.0)
        watch._steps[-1].arrived = Event(number)

    step(1, 0.5)
    assert watch.first_broken() is None and waited == []
    step(2, math.nan)
    assert watch.first_broken() is None and waited == [1]
    step(3, 0.5)
    assert watch.first_broken().number == 2 and waited == [1, 2]
    step(4, math.inf)
    assert watch.first_broken(is_last=True).number == 4 and waited == [1, 2, 3, 4]


def test_the_last_step_of_a_run_is_looked_at_on_a_gpu_too(tmp_path, monkeypatch):
    """Where nothing is logged or saved after it, before the final model is."""
    from types import SimpleNamespace

    trainer = tiny_trainer(tmp_path, ROWS, max_steps=4, logging_steps=3)
    end_step = trainer.watch.end_step

    def later(number, loss, gradient_norm):
        end_step(number, loss * math.nan if number == 4 else loss, gradient_norm)
        trainer.watch._steps[-1].arrived = SimpleNamespace(synchronize=lambda: None)

    monkeypatch.setattr(trainer.watch, "end_step", later)
    with pytest.raises(BrokenStep, match="the loss is nan at step 4"):
        trainer.train()


# ---------------------------------------------------------------------------------------------------------- broken rows
@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_row_stops_the_run_and_is_named(tmp_path, workers, monkeypatch):
    rows = [tiny_row(number) for number in range(12)]
    volume = bytearray(rows[7]["volume"])
    volume[len(volume) // 2] ^= 1
    rows[7]["volume"] = bytes(volume)
    write_tiny_split(tmp_path / "split", rows={"train": rows})
    settings = {**SAVING, "save_steps": 1, "dataloader_num_workers": workers, "train_sampling_strategy": "sequential"}
    trainer = tiny_trainer(tmp_path / "run", ROWS, **settings)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    trainer.train_dataset = ProcessedSplit(load_split(str(tmp_path / "split"), "train"), data=str(tmp_path / "split"))
    with pytest.raises(RowError) as caught:
        trainer.train()
    message = plain_message(caught.value)
    assert message.startswith(
        "row 7 (scan 'train_7_a', volumes/train-00000-of-00001.parquet, row 7) cannot be used: a blob"
    )
    assert "Read for step" in message and "data_builders inspect" in message and "Traceback" not in message
    assert not (tmp_path / "run" / "_checkpoint-2.partial").exists()


# ------------------------------------------------------------------------------------------------------------ full disk
@pytest.mark.parametrize(
    "file", ["optimizer.pt", "fsync", *map(slow, ("model.safetensors", "rng_state.pth", "state_progress.json"))]
)
def test_a_full_disk_leaves_the_last_checkpoint(tmp_path, monkeypatch, whole_runs, file):
    """Whichever file it is that does not fit."""
    full = OSError(errno.ENOSPC, "No space left on device")
    trainer = tiny_trainer(tmp_path, ROWS, **SAVING)

    def fill():
        def refuse(function, place):
            def call(*args, **options):
                path = args[place] if place < len(args) else ""
                if file == "fsync" or os.path.basename(str(path)) == file:
                    raise full
                return function(*args, **options)

            return call

        monkeypatch.setattr(torch, "save", refuse(torch.save, 1))
        monkeypatch.setattr(Path, "write_text", refuse(Path.write_text, 0))
        monkeypatch.setattr("transformers.modeling_utils.safe_save_file", refuse(safe_save_file, 1))
        if file == "fsync":
            monkeypatch.setattr(os, "fsync", refuse(os.fsync, 0))

    from transformers.modeling_utils import safe_save_file

    trainer.add_callback(At(5, fill))
    with pytest.raises(CheckpointError) as caught:
        trainer.train()
    message = str(caught.value)
    assert "checkpoint of step 6 could not be written" in message and "is full" in message
    assert "checkpoint-4 is whole" in message and "--save_total_limit" in message
    assert names(tmp_path) == ["checkpoint-2", "checkpoint-4"], "the half was taken away, the oldest stayed"
    monkeypatch.undo()
    resumed = tiny_trainer(tmp_path, ROWS, **SAVING)
    resumed.train(resume_from_checkpoint=newest_checkpoint(tmp_path))
    assert_same_run(resumed, whole_runs())


@pytest.fixture
def small_disk(tmp_path):
    """A disk of its own with room for a checkpoint and a half."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = (
        os.geteuid() == 0 and subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", disk]).returncode == 0
    )
    if not mounted:
        pytest.skip("only root may mount a disk")
    yield disk
    subprocess.run(["umount", disk], check=True)


def test_a_disk_that_is_really_full(small_disk):
    trainer = tiny_trainer(small_disk, ROWS, **SAVING)
    size = []

    def fill():
        checkpoint = small_disk / "checkpoint-2"
        size.append(sum(path.stat().st_size for path in checkpoint.iterdir()))
        free = os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_bsize
        (small_disk / "other").write_bytes(b"x" * (free - size[0] // 2))

    trainer.add_callback(At(3, fill))
    with pytest.raises(CheckpointError, match="step 4 could not be written: the disk .* is full"):
        trainer.train()
    assert names(small_disk) == ["checkpoint-2"] and size[0] > 100_000
    (small_disk / "other").unlink()
    resumed = tiny_trainer(small_disk, ROWS, **SAVING | {"save_total_limit": 1})
    resumed.train(resume_from_checkpoint=newest_checkpoint(small_disk))
    assert names(small_disk) == ["checkpoint-8"]


def test_another_fault_in_writing_is_told_as_it_is(tmp_path, monkeypatch):
    trainer = tiny_trainer(tmp_path, ROWS, **SAVING)
    trainer.extra_state["wrong"] = type("Wrong", (), {"state_dict": lambda self: {"x": object()}})()
    with pytest.raises(TypeError, match="got object at x"):
        trainer.train()
    assert names(tmp_path) == []
    readonly = tiny_trainer(tmp_path, ROWS, **SAVING)

    def refuse(folder):
        raise PermissionError(13, "Permission denied", str(folder))

    monkeypatch.setattr("training_fvlm.checkpoints.sync_files", refuse)
    with pytest.raises(CheckpointError, match="PermissionError: .*Permission denied.*Mend that"):
        readonly.train()


# ---------------------------------------------------------------------------------------------- what the Trainer offers
def test_the_oldest_goes_when_the_new_one_is_complete(tmp_path, monkeypatch):
    trainer = tiny_trainer(tmp_path, ROWS, **SAVING | {"save_total_limit": 1})
    seen = []
    monkeypatch.setattr(
        "training_fvlm.checkpoints.keep_newest", spied("keep_newest", lambda: seen.append(names(tmp_path)))
    )
    trainer.train()
    assert seen == [["checkpoint-2"], ["checkpoint-2", "checkpoint-4"], ["checkpoint-4", "checkpoint-6"]] + [
        ["checkpoint-6", "checkpoint-8"]
    ]
    assert names(tmp_path) == ["checkpoint-8"]


def spied(name: str, before):
    import training_fvlm.checkpoints as module

    function = getattr(module, name)

    def call(*args, **options):
        before()
        return function(*args, **options)

    return call


def test_an_old_checkpoint_that_cannot_be_deleted_stops_nothing(tmp_path, monkeypatch, caplog):
    def refuse(*args):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("training_fvlm.checkpoints.keep_newest", refuse)
    tiny_trainer(tmp_path, ROWS, **SAVING).train()
    assert len(names(tmp_path)) == 4 and "an old checkpoint could not be deleted" in caplog.text


def test_a_scoring_that_fails_is_no_signal(tmp_path):
    def zero_shot(model):
        raise ValueError("no such finding")

    evaluating = {"eval_strategy": "steps", "eval_steps": 2, "eval_rows": tiny_rows(4, seed=5), "zero_shot": zero_shot}
    with StopSignals() as signals:
        trainer = tiny_trainer(tmp_path, ROWS, **SETTINGS, **evaluating)
        trainer.signals = signals
        with pytest.raises(ValueError, match="no such finding"):
            trainer.train()


def test_pushes_see_complete_checkpoints_only(tmp_path, monkeypatch):
    trainer = tiny_trainer(tmp_path, ROWS, **SAVING)
    pushed = []

    def push(folder):
        pushed.append((Path(folder).name, (Path(folder) / "trainer_state.json").is_file(), names(tmp_path)[-1]))

    monkeypatch.setattr(trainer, "_push_from_checkpoint", push)
    monkeypatch.setattr(trainer.args, "push_to_hub", True)
    trainer.train()
    assert pushed == [(f"checkpoint-{step}", True, f"checkpoint-{step}") for step in (2, 4, 6, 8)]


def test_half_a_line_at_the_end_of_a_table(tmp_path, whole_runs):
    settings = SAVING | {"save_steps": 4}
    stopped = tiny_trainer(tmp_path, ROWS, **settings, callbacks=[At(7, keyboard_interrupt)])
    with pytest.raises(KeyboardInterrupt):
        stopped.train()
    table = tmp_path / TRAIN_FILE
    table.write_text(table.read_text()[:-9])
    resumed = tiny_trainer(tmp_path, ROWS, **settings)
    resumed.train(resume_from_checkpoint=newest_checkpoint(tmp_path))
    assert_same_run(resumed, whole_runs())


def test_the_best_checkpoint_is_kept_and_loaded(tmp_path):
    evaluating = {"eval_strategy": "steps", "eval_steps": 2, "eval_rows": tiny_rows(7, seed=5)}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": False}
    trainer = tiny_trainer(tmp_path, ROWS, **SAVING | {"learning_rate": 0.05} | evaluating | best)
    trainer.train()
    evaluated = {line["step"]: line["eval_loss"] for line in lines(trainer, "eval_loss")}
    step = min(evaluated, key=evaluated.get)
    assert trainer.state.best_model_checkpoint == str(tmp_path / f"checkpoint-{step}")
    assert len(names(tmp_path)) == 2 and {f"checkpoint-{step}", "checkpoint-8"} <= set(names(tmp_path))
    saved = json.loads((tmp_path / "checkpoint-8" / "trainer_state.json").read_text())
    assert saved["best_model_checkpoint"] == str(tmp_path / f"checkpoint-{step}")


def test_a_run_that_goes_back_puts_later_checkpoints_aside(tmp_path):
    tiny_trainer(tmp_path, ROWS, **SAVING | {"save_total_limit": None}).train()
    (tmp_path / "_checkpoint-8.partial").mkdir()
    back = tiny_trainer(tmp_path, ROWS, **SAVING | {"save_total_limit": None, "max_steps": 5, "learning_rate": 1e-3})
    back.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    later = ["_superseded-checkpoint-6", "_superseded-checkpoint-8"]
    assert names(tmp_path) == [*later, "checkpoint-2", "checkpoint-4", "checkpoint-5"]


@pytest.mark.parametrize("schedule", [{"lr_scheduler_type": "cosine"}, {"lr_schedule": "published", "min_lr": 1e-5}])
def test_a_run_goes_on_with_another_learning_rate(tmp_path, schedule):
    """As the advice after a broken step is; the optimizer's state would bring the old one back."""

    def rates(run, start, **settings):
        settings = {**SAVING, "warmup_steps": 0, "logging_steps": 1, "layer_lr_decay": 0.5, **schedule, **settings}
        trainer = tiny_trainer(tmp_path / run, ROWS, **settings | {"save_total_limit": None})
        trainer.train(resume_from_checkpoint=start)
        return {line["step"]: line["learning_rate"] for line in lines(trainer) if line["step"] > 4}, trainer

    before, _ = rates("before", None)
    lower, fresh = rates("lower", None, learning_rate=1e-4)
    assert all(before[step] != rate for step, rate in lower.items())
    after, trainer = rates("before", str(tmp_path / "before" / "checkpoint-4"), learning_rate=1e-4)
    assert after == pytest.approx(lower)
    groups = trainer.optimizer.param_groups, fresh.optimizer.param_groups
    assert len(groups[0]) > 2 and [group["lr"] for group in groups[0]] == [group["lr"] for group in groups[1]]
