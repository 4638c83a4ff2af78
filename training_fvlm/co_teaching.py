"""Co-teaching: two models train side by side, and each corrects what the other is to learn of abnormal patients.

    trainer.peer = PeerTrainer(...)      the second model: weights, optimizer, schedule and order of rows of its own

After each optimizer step of the first model the peer takes one, on its own contrast. What either is to make of abnormal
patients is decided in part by the other, which looks at the same crops without dropout and without a gradient
(`peer_distributions` in modeling_fvlm/loss.py). The first model is the run's: it is evaluated, saved and published; the
peer stands in the folder `peer` of every checkpoint.

A step trains twice and embeds twice more: 2.8 times the time (docs/objective.md). Weights, gradients and optimizer take
twice the memory, activations the same, since one model computes at a time.

Source: Shui et al., ICLR 2025, https://openreview.net/forum?id=nYpPAT4L3D: two models from different seeds that see the
data in different orders and give each other targets for abnormal pairs, mixed in at 0.5. The authors' release has no
code for it. Chosen here: that the peer's distribution is over abnormal patients alone, each direction by its own
similarities, and that the models take turns, so that the second is taught by the first as it is after its step.
"""

import contextlib
import copy
import os
from collections.abc import Iterator
from typing import Any

import torch
from accelerate import skip_first_batches
from torch import Tensor
from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import IntervalStrategy

from .arguments import FVLMTrainingArguments
from .broken_steps import BrokenStep
from .collator import FVLMCollator
from .trainer import FVLMTrainer

PEER_FOLDER = "peer"
# Far from the seeds a user would try one after the other.
SEED_OFFSET = 1_000_003


def peer_arguments(args: FVLMTrainingArguments) -> FVLMTrainingArguments:
    """The peer's arguments: those of the run, with other seeds, and nothing that reports, evaluates or publishes."""
    mine = copy.copy(args)
    mine.seed = args.seed + SEED_OFFSET
    mine.data_seed = None if args.data_seed is None else args.data_seed + SEED_OFFSET
    mine.report_to, mine.push_to_hub, mine.disable_tqdm = [], False, True
    mine.eval_strategy, mine.load_best_model_at_end = IntervalStrategy.NO, False
    return mine


def peer_collator(collator: FVLMCollator, args: FVLMTrainingArguments) -> FVLMCollator:
    """The training collator with the peer's seed: it crops at other places."""
    mine = copy.copy(collator)
    mine.seed = args.seed
    return mine


class PeerTrainer(FVLMTrainer):
    """The second model's trainer. It is not run by `train`: the first one's calls `begin`, and `take_step` every step.

    Args: As of `FVLMTrainer`, with `peer_arguments` and `peer_collator`.
    """

    def begin(self, max_steps: int, step: int, checkpoint: str | None) -> None:
        """Set up for the first step, or for the one after `step`.

        Args:
            max_steps: Optimizer steps of the run.
            step: Those done.
            checkpoint: Of the run, if it goes on.
        """
        folder = None if checkpoint is None else os.path.join(checkpoint, PEER_FOLDER)
        if folder is not None:
            self._load_from_checkpoint(folder)
        self.state = TrainerState(max_steps=max_steps, global_step=step)
        self._tr_loss, self._globalstep_last_logged = torch.tensor(0.0, device=self.args.device), step
        self.is_in_train = True
        if self.args.activation_checkpointing:  # as `train` does
            options = dict(self.args.activation_checkpointing_kwargs or {})
            chosen = {name: options.pop(name) for name in ("every_n_layers", "offload") if name in options}
            self.model.activation_checkpointing_enable(activation_checkpointing_kwargs=options or None, **chosen)
        self.wrapped, self.loader = self._prepare_for_training(max_steps, self.get_train_dataloader(), None)
        self.batches_per_step = self.args.gradient_accumulation_steps * (1 if self.cache is None else self.cache.loads)
        self.batches = self._batches(step)
        if folder is not None:
            self._load_optimizer_and_scheduler(folder)
            self._load_scaler(folder)
            self.load_extra_state()

    def take_step(self) -> None:
        """One optimizer step on the next contrasts of the peer's own order."""
        model, state = self.wrapped, self.accelerator.gradient_state
        batches, _ = self.get_batch_samples(self.batches, self._batches_of_next_step(), self.args.device)
        self.current_gradient_accumulation_steps = len(batches)
        for number, inputs in enumerate(batches, start=1):
            is_last = number == len(batches)
            state._set_sync_gradients(is_last)
            with contextlib.nullcontext() if is_last else self.accelerator.no_sync(model):
                self._tr_loss += self.training_step(model, inputs)
        norm = self._clip_grad_norm(model) if self.args.max_grad_norm > 0 else None
        self._get_grad_norm(model, grad_norm=norm)
        if self.args.skip_inactive_organs:
            self.forget_gradients_of_inactive_organs()
            self.step_organs.clear()
        self.optimizer.step()
        if not self.accelerator.optimizer_step_was_skipped:
            self.lr_scheduler.step()
        model.zero_grad()
        self.state.global_step += 1
        self.end_step()

    def take_mean_loss(self) -> float:
        """Mean loss over the steps since this was asked last."""
        steps = self.state.global_step - self._globalstep_last_logged
        mean = float(self._tr_loss) / max(steps, 1)
        self._tr_loss.zero_()
        self._globalstep_last_logged = self.state.global_step
        self.window.clear(), self.gradient_norms.clear(), self.terms.clear()
        return mean

    def save(self, checkpoint: str) -> None:
        """Write the peer into a checkpoint of the run; every rank calls it."""
        folder = os.path.join(checkpoint, PEER_FOLDER)
        os.makedirs(folder, exist_ok=True)
        self.save_model(folder, _internal_call=True)
        self._save_optimizer_and_scheduler(folder)
        self._save_scaler(folder)
        self._save_extra_state(folder)

    def _raise_if_broken(self, is_last: bool = False) -> None:
        try:
            super()._raise_if_broken(is_last)
        except BrokenStep as broken:
            raise BrokenStep(f"of the second model of --targets co_teaching {broken}") from None

    def _batches_of_next_step(self) -> int:
        """As many as make a step; the last step of an epoch has what is left."""
        per_epoch = len(self.loader)
        steps_per_epoch = -(-per_epoch // self.batches_per_step)
        is_last = (self.state.global_step + 1) % steps_per_epoch == 0
        return per_epoch - (steps_per_epoch - 1) * self.batches_per_step if is_last else self.batches_per_step

    def _batches(self, step: int) -> Iterator[dict[str, Tensor]]:
        """Batches from the one after `step` steps on, epoch after epoch."""
        epoch, steps_done = divmod(step, -(-len(self.loader) // self.batches_per_step))
        while True:
            loader = self.loader
            if steps_done:
                loader = skip_first_batches(loader, steps_done * self.batches_per_step)
            if hasattr(loader, "set_epoch"):  # accelerate's counts epochs by itself, and from 0 after a resume
                loader.set_epoch(epoch)
            self.train_sampler.set_epoch(epoch)
            # A loader draws a number when it begins. The model's dropout must not hang on whether it was begun anew.
            with torch.random.fork_rng(devices=[]):
                batches = iter(loader)
                first = next(batches)
            yield first
            yield from batches
            epoch, steps_done = epoch + 1, 0

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Nothing: the first model's line tells of both."""
