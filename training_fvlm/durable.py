"""A Trainer whose runs can be stopped at any moment, by whatever, and go on as if they had not been.

- Checkpoints are whole or not there (checkpoints.py); they also keep what `extra_state` names, and how far the next log
  line has got, so that a run stopped between two of them writes the same lines.
- SIGTERM and SIGUSR1 end a run at the next step boundary, with a checkpoint, on all ranks (signals.py).
- A row that cannot be read, a loss or a gradient that is not finite ends it on all ranks, with the batch named and
  before a checkpoint of the broken state is written.
"""

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import SaveStrategy
from transformers.utils import logging

from . import checkpoints
from .agreement import all_of, largest
from .broken_steps import BrokenStep, StepWatch
from .checkpoints import CheckpointError, Stateful
from .data import RowError
from .signals import ShieldedWorker, StopRequested, StopSignals

logger = logging.get_logger(__name__)
PROGRESS = "progress"
# States on which nothing hangs but the first log line: older checkpoints do not have them.
LOG_STATES = (PROGRESS, "organ_losses", "gradient_norms", "terms", "clock")


class DurableTrainer(Trainer):
    """Trainer with checkpoints that are whole, a way to stop, and steps that are watched.

    Attributes:
        extra_state: name -> what is saved in every checkpoint beside the model, and taken back when a run goes on.
            Whoever has a state puts itself here before `train`.
        signals: Asks the run to stop; the same on every rank, None: nobody does.
        watch: Where a subclass notes what tells a broken step from a whole one.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        self.extra_state: dict[str, Stateful] = {}
        self.signals: StopSignals | None = None
        self.watch = StepWatch()
        self.saved_step: int | None = None  # of the checkpoint that this process wrote last
        self.resumed_from: str | None = None
        self.evaluation_is_due = False
        self._is_epoch_end = False
        super().__init__(*args, **kwargs)
        self.extra_state[PROGRESS] = _Progress(self)

    # Stopping

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any):
        run = self._get_output_dir(trial=None)
        if self.args.local_process_index == 0:
            if names := checkpoints.clear_away(run):
                logger.warning("cleared away what a run that was killed left in %s: %s.", run, ", ".join(names))
            step = checkpoints.step_of(resume_from_checkpoint) if isinstance(resume_from_checkpoint, str) else None
            is_of_run = step is not None and os.path.realpath(os.path.dirname(resume_from_checkpoint)) == (
                os.path.realpath(run)
            )
            if is_of_run and (names := checkpoints.put_later_ones_aside(run, step)):
                logger.warning("the run goes on from step %d: put aside as _superseded-*: %s.", step, ", ".join(names))
        self.resumed_from = None
        self.remove_callback(_Survival)
        self.add_callback(_Survival(self))  # the last one: others set up anew what it takes back
        output = super().train(resume_from_checkpoint, *args, **kwargs)
        self._raise_if_broken(is_last=True)
        return output

    def asked_to_stop(self) -> str:
        """The name of the signal that some rank got, "" without one; every rank must ask at the same place."""
        if self.signals is None:
            return ""
        if agreed := largest(self.signals.number, self.args.ddp_timeout):
            self.signals.number = agreed
        return self.signals.name if agreed else ""

    def on_main_alone(self, function: Callable[[], Any]) -> Any:
        """Call a function on the main process while the others wait; a signal breaks it off.

        Returns:
            Its result on the main process, None on the others.

        Raises:
            StopRequested: If it was broken off; on all ranks.
        """
        result, error = None, None
        if self.is_world_process_zero():
            try:
                with _interruptible(self.signals):
                    result = function()
            except Exception as raised:
                error = raised
        end = largest(0 if error is None else 1 if isinstance(error, StopRequested) else 2, self.args.ddp_timeout)
        if end == 1:
            raise StopRequested(self.asked_to_stop())
        if end == 2:
            raise error or RuntimeError("the main process has failed, and said why.")
        return result

    def stop(self, name: str) -> None:
        """Write the checkpoint of a run that was asked to stop, and end it."""
        step = self.state.global_step
        is_saved = self.saved_step == step and not self.args.save_only_model
        if not is_saved or self.evaluation_is_due:
            self._save_checkpoint(self.model, None, is_last=True)
            self.control = self.callback_handler.on_save(self.args, self.state, self.control)
        folder = checkpoints.checkpoint_folder(self._get_output_dir(trial=None), step)
        raise StopRequested(f"{name}: stopped after step {step} with {folder}.")

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        if self.control.should_log or self.control.should_evaluate or self.control.should_save:
            self._raise_if_broken(is_last=True)
        try:
            super()._maybe_log_save_evaluate(*args, **kwargs)
        except StopRequested as stop:  # in the evaluation, on all ranks
            self.evaluation_is_due = True
            self._raise_if_broken(is_last=True)
            self.stop(str(stop))
        # What is due at the end of an epoch, is due after its last step; a run that has come to its end, ends.
        is_within = self._is_epoch_end or self.state.epoch != int(self.state.epoch)
        if is_within and not self.control.should_training_stop and (name := self.asked_to_stop()):
            self._raise_if_broken(is_last=True)
            self.stop(name)

    # Batches

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[Any, Tensor | int | None]:
        """The batches of an optimizer step; a row that one rank cannot read ends the run on all of them."""
        if self.state.global_step >= self.state.max_steps:  # a run that had come to its end was started again
            self.control.should_training_stop = True
            return [], None
        return self.take_batches(self._agreed(epoch_iterator), num_batches, device)

    def take_batches(
        self, iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[Any, Tensor | int | None]:
        """So many batches, as `get_batch_samples` returns them."""
        return super().get_batch_samples(iterator, num_batches, device)

    def _agreed(self, batches: Iterator) -> Iterator:
        """The batches, read by all ranks at the same time or by none."""
        timeout = self.args.ddp_timeout
        while True:
            batch, error, is_over = None, None, False
            try:
                batch = next(batches)
            except StopIteration:
                is_over = True
            except RowError as raised:
                error = raised
            if largest(int(error is not None), timeout):
                self._raise_if_broken(is_last=True)  # the older fault first
                told = [message for message in all_of(error and plain_message(error), timeout) if message]
                step = self.state.global_step
                raise RowError(
                    # Data loaders read one batch ahead.
                    f"{'; '.join(told)} (Read for step {step + 1} or the one after it.) {self._last_checkpoint()}"
                ) from error
            if is_over:
                return
            yield batch

    def get_train_dataloader(self) -> DataLoader:
        return shielded(super().get_train_dataloader())

    # Broken steps

    def _clip_grad_norm(self, model: torch.nn.Module) -> Tensor:
        self.watch.note_gradients(model)
        return super()._clip_grad_norm(model)

    def _get_grad_norm(self, model: torch.nn.Module, grad_norm: Tensor | float | None = None) -> Tensor | float:
        if grad_norm is None:
            self.watch.note_gradients(model)
        grad_norm = super()._get_grad_norm(model, grad_norm)
        # A loss scaler finds gradients that are not finite by itself, passes over the step and lowers the scale.
        is_scaled = self.accelerator.scaler is not None or (self.args.fp16 and self.is_deepspeed_enabled)
        self.watch.end_step(self.state.global_step + 1, self._tr_loss, None if is_scaled else grad_norm)
        self._raise_if_broken()
        return grad_norm

    def _raise_if_broken(self, is_last: bool = False) -> None:
        """Every rank comes to the same answer: the loss and the norm of all gradients are the same on all of them."""
        if (broken := self.watch.first_broken(is_last)) is not None:
            report = broken.report(self.train_dataset)
            where = os.path.join(self.args.output_dir, "broken_step.json")
            if self.is_world_process_zero():
                with contextlib.suppress(OSError):
                    report.write(where)
            raise BrokenStep(f"{report.text} (all of it: {where}) {self._last_checkpoint()} {report.advice}")

    def _last_checkpoint(self) -> str:
        newest = checkpoints.newest_checkpoint(self._get_output_dir(trial=None))
        return f"The last checkpoint is {newest}." if newest else "No checkpoint had been written yet."

    # Checkpoints

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any, is_last: bool = False) -> None:
        """Write a checkpoint as the Trainer does, but under its name only when it is whole.

        The steps are those of `Trainer._save_checkpoint` (transformers, Apache-2.0). After each the ranks agree whether
        it went well everywhere; what ranks do together in a step (FSDP, DeepSpeed) they must get through together.

        Args:
            model, trial: As there.
            is_last: Whether the run is stopping: then everything is saved, also under `--save_only_model`.
        """
        args, state = self.args, self.state
        step, run = state.global_step, self._get_output_dir(trial=trial)
        partial = str(checkpoints.remnant(run, step, checkpoints.PARTIAL))
        if trial is None:
            self.store_flos()

        is_main, is_local_main = self.is_world_process_zero(), args.local_process_index == 0
        has_all = is_last or not args.save_only_model
        for part in (
            lambda: checkpoints.begin_checkpoint(run, step) if is_main else None,
            lambda: os.makedirs(partial, exist_ok=True),  # nodes that share no disk have a folder each
            lambda: self.save_model(partial, _internal_call=True),
            lambda: self._save_optimizer_and_scheduler(partial) if has_all else None,
            lambda: self._save_scaler(partial) if has_all else None,
            lambda: self._save_rng_state(partial) if has_all else None,
            lambda: self._save_extra_state(partial),
            lambda: self._save_trainer_state(run, partial),  # the last file
            lambda: checkpoints.sync_files(partial) if is_local_main else None,
            lambda: checkpoints.finish_checkpoint(run, step) if is_main else None,
            lambda: self._finish_on_own_disk(run, step) if is_local_main and not is_main else None,
        ):
            self._attempt(part, run, step)

        self.saved_step = step
        if args.push_to_hub and not is_last:  # an upload may take longer than there is time
            self._push_from_checkpoint(str(checkpoints.checkpoint_folder(run, step)))
        if args.should_save:
            try:
                checkpoints.keep_newest(run, args.save_total_limit, state.best_model_checkpoint)
            except OSError as error:  # no reason to stop: the new one is there
                logger.warning("an old checkpoint could not be deleted: %s", error)

    def _attempt(self, function: Callable[[], Any], run: str, step: int) -> None:
        """Do one step of writing a checkpoint, and take all back if it fails on any rank."""
        error: Exception | None = None
        try:
            function()
        except Exception as raised:
            error = raised
        is_full = error is not None and checkpoints.is_disk_full(error)
        failed = largest(0 if error is None else 2 if is_full else 1, self.args.ddp_timeout)
        if not failed:
            return
        if self.args.local_process_index == 0:
            checkpoints.abandon_checkpoint(run, step)
        if error is not None and not is_full and not isinstance(error, (OSError, SafetensorError)):
            raise error  # a fault of the program: its traceback says more
        mine = None if error is None else f"{type(error).__name__}: {error}"
        told = [text for text in all_of(mine, self.args.ddp_timeout) if text]
        raise CheckpointError(checkpoints.why_not_written(run, step, told, is_full=failed == 2)) from error

    def _save_extra_state(self, folder: str) -> None:
        if self.args.should_save:
            for name, thing in self.extra_state.items():
                checkpoints.save_state(folder, name, thing.state_dict())

    def _save_trainer_state(self, run: str, folder: str) -> None:
        state = self.state
        if self.args.save_strategy != SaveStrategy.NO and state.best_global_step:
            best = checkpoints.checkpoint_folder(run, state.best_global_step)
            if state.best_global_step == state.global_step or best.exists():
                state.best_model_checkpoint = str(best)
        if not self.args.should_save:
            return
        for thing in [*self.callback_handler.callbacks, self.control]:
            if isinstance(thing, ExportableState):
                name = type(thing).__name__
                if isinstance(state.stateful_callbacks[name], list):
                    state.stateful_callbacks[name].append(thing.state())
                else:
                    state.stateful_callbacks[name] = thing.state()
        state.save_to_json(os.path.join(folder, checkpoints.LAST_FILE))

    def _finish_on_own_disk(self, run: str, step: int) -> None:
        """Where the nodes share no disk, each gives its own folder its name."""
        with contextlib.suppress(FileNotFoundError):  # the main process has renamed it
            if checkpoints.remnant(run, step, checkpoints.PARTIAL).exists():
                checkpoints.finish_checkpoint(run, step)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        asked = [group.get("initial_lr") for group in self.optimizer.param_groups]  # as the scheduler set them
        super()._load_optimizer_and_scheduler(checkpoint)
        self.resumed_from = checkpoint
        if checkpoint is not None:
            self._take_rates(asked)

    def _take_rates(self, asked: list[float | None]) -> None:
        """Go on with the learning rates of the arguments, if they are not those of the checkpoint.

        Args:
            asked: Highest rate of each group of parameters.
        """
        scheduler, groups = self.lr_scheduler, self.optimizer.param_groups
        if not isinstance(scheduler, LambdaLR) or None in asked or scheduler.base_lrs == asked:
            return
        logger.warning("the learning rate is %g from here on, not %g as before.", asked[0], scheduler.base_lrs[0])
        scheduler.base_lrs = asked
        for group, rate, share in zip(groups, asked, scheduler.lr_lambdas, strict=True):
            group["initial_lr"], group["lr"] = rate, rate * share(scheduler.last_epoch)
        scheduler._last_lr = [group["lr"] for group in groups]

    def redo_evaluation(self) -> None:
        """Do the evaluation that a signal broke off, as if it had not."""
        metrics = self._evaluate(None, None)
        self.evaluation_is_due = False
        is_best = self._determine_best_metric(metrics=metrics, trial=None)
        if is_best and self.args.save_strategy == SaveStrategy.BEST:
            self._save_checkpoint(self.model, None)

    def load_extra_state(self) -> None:
        """Take back what `extra_state` names, after everything has been set up for the first step."""
        for name, thing in self.extra_state.items():
            state = checkpoints.load_state(self.resumed_from, name)
            if state is not None:
                thing.load_state_dict(state)
            elif name not in LOG_STATES:
                raise CheckpointError(
                    f"{self.resumed_from} holds no state of '{name}': it was written by a run without it. Resume with "
                    "the settings of that run, or start anew in another --output_dir."
                )


class _Progress:
    """How far a run has got between two log lines, and whether an evaluation was broken off."""

    def __init__(self, trainer: DurableTrainer):
        self.trainer = trainer

    def state_dict(self) -> dict[str, Any]:
        trainer = self.trainer
        return {
            "loss_sum": trainer._tr_loss,
            "last_logged_step": trainer._globalstep_last_logged,
            "evaluation_is_due": trainer.evaluation_is_due,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        trainer = self.trainer
        trainer._tr_loss.copy_(state["loss_sum"])
        trainer._total_loss_scalar = -float(state["loss_sum"])  # the mean at the end is over this process's steps
        trainer._globalstep_last_logged = state["last_logged_step"]
        trainer.evaluation_is_due = state["evaluation_is_due"]


class _Survival(TrainerCallback):
    """The moments at which a run takes its state back, or may stop."""

    def __init__(self, trainer: DurableTrainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        trainer = self.trainer
        trainer.watch.clear()
        trainer.saved_step, trainer.evaluation_is_due = None, False
        if trainer.resumed_from is not None:
            trainer.load_extra_state()
        if name := trainer.asked_to_stop():
            raise StopRequested(f"{name}: stopped before the first step; nothing was to be saved.")
        if trainer.evaluation_is_due:
            trainer.redo_evaluation()

    def on_step_end(self, args, state, control, **kwargs):
        self.trainer._is_epoch_end = False

    def on_epoch_end(self, args, state, control, **kwargs):
        self.trainer._is_epoch_end = True

    def on_prediction_step(self, args, state, control, **kwargs):
        if name := self.trainer.asked_to_stop():
            if not self.trainer.is_in_train:  # the evaluation after the last step
                self.trainer.stop(name)
            raise StopRequested(name)


@contextlib.contextmanager
def _interruptible(signals: StopSignals | None) -> Iterator[None]:
    """A block that a signal tears the main thread out of."""
    if signals is None:
        yield
        return
    if signals.number:
        raise StopRequested(signals.name)
    signals.may_interrupt = True
    try:
        yield
    finally:
        signals.may_interrupt = False


def shielded(loader: DataLoader) -> DataLoader:
    """A data loader whose workers do not die of the signals that stop the run."""
    if loader.num_workers and not isinstance(loader.worker_init_fn, ShieldedWorker):
        inner = getattr(loader, "base_dataloader", loader)
        inner.worker_init_fn = ShieldedWorker(inner.worker_init_fn)
    return loader


def plain_message(error: BaseException) -> str:
    """What an error says, without the traceback that a data loader's worker puts in front of it."""
    return str(error).rsplit(f"{type(error).__name__}: ", 1)[-1].strip()
