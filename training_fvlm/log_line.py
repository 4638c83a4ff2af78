"""The log as a person reads it: one short line in place of the sixty figures of a log line.

    step 120/1000  loss 1.874  15 of 22 organs below chance, best liver 41 %, worst brain -1 %  temperature 0.055 ...
    step 120  held out: loss 1.93  12 of 22 organs below chance, ...  retrieval@1 0.31 (guess 0.14)  2.1 s

Percentages are shares of the way from chance to the floor (organ_losses.py); an organ counts as below chance from the
share on that the alarm asks for. All figures are in trainer_state.json, organ_losses.csv and the trackers.
"""

import math
import sys
import time
from collections.abc import Sequence
from typing import Any

from tqdm.auto import tqdm
from transformers import PrinterCallback, TrainerCallback
from transformers.trainer_callback import ProgressCallback

from .alarm import PART
from .organ_losses import OrganLossRow


class LogLine(TrainerCallback):
    """Writes the lines of an `FVLMTrainer`, above its progress bar if it has one, in place of the Trainer's own."""

    def __init__(self, trainer: Any):
        self.trainer = trainer
        self.clock = StepClock()
        trainer.remove_callback(PrinterCallback)
        if trainer.pop_callback(ProgressCallback) is not None:
            trainer.add_callback(_Bar)
        trainer.add_callback(self.clock)
        trainer.add_callback(self)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or not logs:
            return
        if "loss" in logs:
            line = training_line(logs, state, self.trainer.logged_rows, self.clock.take_mean())
        elif evaluation := next((name for name in logs if name.endswith("_runtime") and name != "train_runtime"), None):
            line = evaluation_line(logs, state, self.trainer.evaluated_rows, evaluation.removesuffix("runtime"))
        elif "train_runtime" in logs:
            line = f"{_step(state)}  mean loss of the run {logs['train_loss']:.3f}  {logs['train_runtime']:.0f} s"
        else:
            line = "  ".join([_step(state), *_named(logs)])
        tqdm.write(line)
        sys.stdout.flush()  # a log file is read while the run goes on


class _Bar(ProgressCallback):
    """The Trainer's progress bar, without its log."""

    def on_log(self, args, state, control, **kwargs):
        pass


class StepClock(TrainerCallback):
    """Seconds of optimizer steps with the reading of their batches, without evaluations and checkpoints."""

    def __init__(self) -> None:
        self.since, self.seconds, self.steps = time.monotonic(), 0.0, 0

    def take_mean(self) -> float:
        """Mean seconds of the steps since this was asked last; NaN if there was none."""
        mean = self.seconds / self.steps if self.steps else math.nan
        self.seconds, self.steps = 0.0, 0
        return mean

    def on_train_begin(self, args, state, control, **kwargs):
        self.__init__()

    def on_step_end(self, args, state, control, **kwargs):
        now = time.monotonic()
        self.since, self.seconds, self.steps = now, self.seconds + now - self.since, self.steps + 1

    def on_evaluate(self, args, state, control, **kwargs):
        self.since = time.monotonic()

    def on_save(self, args, state, control, **kwargs):
        self.since = time.monotonic()


def training_line(logs: dict[str, Any], state: Any, rows: Sequence[OrganLossRow], seconds: float) -> str:
    """What is to be seen at once of a log line.

    Args:
        logs: All its figures.
        state: The Trainer's.
        rows: The organs'.
        seconds: Of a step.
    """
    parts = [_step(state), f"loss {logs['loss']:.3f}", in_short(rows)]
    parts += [f"{text} {logs[name]:.3f}" for name, text in OF_OBJECTIVE.items() if name in logs]
    if "temperature" in logs:
        parts.append(f"temperature {logs['temperature']:.3g}")
    parts.append(f"lr {logs.get('learning_rate', math.nan):.1e}")
    if not math.isnan(seconds):
        parts.append(f"{seconds:.2g} s/step" if seconds < 10 else f"{seconds:.0f} s/step")
    return "  ".join(parts)


OF_OBJECTIVE = {"global_loss": "whole report", "peer_loss": "second model"}


def evaluation_line(logs: dict[str, Any], state: Any, rows: Sequence[OrganLossRow], prefix: str) -> str:
    """The same of an evaluation, whose figures begin with `prefix`."""
    of_evaluation = {name.removeprefix(prefix): value for name, value in logs.items() if name.startswith(prefix)}
    parts = [f"step {state.global_step}", f"held out: loss {of_evaluation.get('loss', math.nan):.3f}", in_short(rows)]
    if (retrieval := of_evaluation.get("retrieval_at_1")) is not None:
        parts.append(f"retrieval@1 {retrieval:.3f} (guess {of_evaluation['retrieval_at_1_chance']:.3f})")
    parts += _named({name: value for name, value in of_evaluation.items() if name.endswith("_macro_auc")})
    return "  ".join([*parts, f"{of_evaluation['runtime']:.1f} s"])


def in_short(rows: Sequence[OrganLossRow]) -> str:
    """How many organs are below chance, the one that has learned most, and the one that has learned least."""
    learned = {row.organ: row.learned for row in rows if not math.isnan(row.learned)}
    if not learned:
        return "no organ in the loss"
    best, worst = (
        f"{organ} {round(100 * learned[organ])} %"
        for organ in (choose(learned, key=learned.__getitem__) for choose in (max, min))
    )
    count = sum(share > PART for share in learned.values())
    named = best if len(learned) == 1 else f"best {best}, worst {worst}"
    return f"{count} of {len(learned)} organs below chance, {named}"


def _step(state: Any) -> str:
    return f"step {state.global_step}/{state.max_steps}"


def _named(values: dict[str, Any]) -> list[str]:
    return [f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in values.items()]
