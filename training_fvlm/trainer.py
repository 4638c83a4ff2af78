"""The Trainer of fVLM: the contrastive loss over the patients of all processes, per-organ losses, evaluation.

(1) each process embeds its patients and its different captions, (2) embeddings and captions' identities are gathered
over all processes, gradients included, (3) every process computes the same loss over the global batch, (4) DDP
averages the gradients, which makes them those of one process with the whole batch (see gather.py).
"""

import math
import os
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader, Sampler
from transformers import PreTrainedModel, ProcessorMixin, Trainer, TrainerCallback
from transformers.trainer_utils import speed_metrics

from modeling_fvlm.loss import OrganLoss, organ_contrastive_loss

from .arguments import FVLMTrainingArguments
from .collator import FVLMCollator
from .data import EpochSampler, ProcessedSplit
from .embed import embed
from .gather import gather, gather_with_gradient
from .organ_losses import EVAL_FILE, TRAIN_FILE, OrganLossFile, OrganLossRow, OrganLossWindow
from .schedule import published_schedule

# Kept from weight decay beside norms and biases: positions and the temperature are no weights of a linear map.
NO_DECAY_NAMES = ("position", "temperature")


class FVLMTrainer(Trainer):
    """Trainer for `FVLMModel`.

    Args:
        model: An `FVLMModel`.
        args: Settings.
        train_dataset, eval_dataset: Rows; the evaluation one may be None.
        train_collator, eval_collator: One crops at random, the other in the centre.
        processor: Saved beside the weights of every checkpoint.
        zero_shot: Called with the model after each evaluation on the main process; returns numbers to log.
        write_card: Called to write README.md into the output folder.
        callbacks: As for `Trainer`.
    """

    # The loss is a mean over one micro-batch: the Trainer is to divide it by the number of accumulated ones.
    loss_is_scaled_for_ga = False

    def __init__(
        self,
        model: PreTrainedModel,
        args: FVLMTrainingArguments,
        *,
        train_dataset: ProcessedSplit,
        train_collator: FVLMCollator,
        eval_dataset: ProcessedSplit | None = None,
        eval_collator: FVLMCollator | None = None,
        processor: ProcessorMixin | None = None,
        zero_shot: Callable[[PreTrainedModel], dict[str, float]] | None = None,
        write_card: Callable[[], None] | None = None,
        callbacks: list[TrainerCallback] | None = None,
    ):
        self.eval_collator = eval_collator
        self.zero_shot = zero_shot
        self.write_card = write_card
        self.train_sampler: EpochSampler | None = None
        super().__init__(
            model=model,
            args=args,
            data_collator=train_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processor,
            callbacks=callbacks,
        )
        self.model_accepts_loss_kwargs = False
        organs = list(self.accelerator.unwrap_model(self.model).config.organs)
        self.window = OrganLossWindow(organs)
        self.temperature = math.nan
        self.step_organs: list[Tensor] = []  # of each micro-batch since the last optimizer step: the active organs
        self.train_file = OrganLossFile(os.path.join(args.output_dir, TRAIN_FILE))
        self.eval_file = OrganLossFile(os.path.join(args.output_dir, EVAL_FILE))
        self.add_callback(_RunBookkeeping(self))

    # Data

    def _get_train_sampler(self, train_dataset: ProcessedSplit | None = None) -> Sampler:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        is_shuffled = self.args.train_sampling_strategy == "random"
        self.train_sampler = EpochSampler(len(dataset), seed, is_shuffled)
        return self.train_sampler

    def get_eval_dataloader(self, eval_dataset: ProcessedSplit | None = None) -> DataLoader:
        """Every row once, centred: unlike the training loader it drops no last batch."""
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        loader = DataLoader(
            dataset,
            batch_size=self.args.per_device_eval_batch_size,
            collate_fn=self.eval_collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
        )
        return self.accelerator.prepare(loader)

    # Training

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, Any]:
        """Contrast this process's patients with those of all processes."""
        # (1)
        outputs, caption_embeds, is_valid = embed(model, inputs)
        # (2) two collectives: embeddings with gradient, identities without
        embeds = gather_with_gradient(
            torch.stack([outputs.image_embeds.float(), caption_embeds.float()], dim=2),
            keeps_other_ranks=not self.args.published_gradient_scale,
        )
        identities = [inputs["caption_hash"], inputs["organ_is_abnormal"].long(), is_valid.long()]
        identities = gather(torch.stack(identities, dim=-1))
        caption_id, is_abnormal, is_valid = identities[..., 0], identities[..., 1].bool(), identities[..., 2].bool()
        # (3)
        reduction = self.accelerator.unwrap_model(model).config.organ_reduction
        organ_loss = organ_contrastive_loss(
            embeds[:, :, 0], embeds[:, :, 1], caption_id, is_abnormal, is_valid, outputs.logit_scale, reduction
        )
        if model.training:
            self.window.add(organ_loss, embeds[:, :, 1], caption_id, is_abnormal, is_valid)
            if self.args.skip_inactive_organs:
                self.step_organs.append(organ_loss.organ_is_active)
            self.temperature = 1 / outputs.logit_scale.detach()
        return (organ_loss.loss, outputs) if return_outputs else organ_loss.loss

    def get_decay_parameter_names(self, model: torch.nn.Module) -> list[str]:
        """Parameters under weight decay: all of them, or no norm, bias, position embedding and temperature."""
        if self.args.weight_decay_everywhere:
            return [name for name, _ in model.named_parameters()]
        names = super().get_decay_parameter_names(model)
        return [name for name in names if not any(part in name for part in NO_DECAY_NAMES)]

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> LRScheduler:
        """The Trainer's schedule, or the published one."""
        if self.args.lr_schedule == "trainer":
            return super().create_scheduler(num_training_steps, optimizer)
        if self.lr_scheduler is None:
            args = self.args
            self.lr_scheduler = published_schedule(
                self.optimizer if optimizer is None else optimizer,
                steps_per_epoch=self.steps_per_epoch(),
                num_epochs=args.num_train_epochs,
                peak_lr=args.learning_rate,
                min_lr=args.min_lr,
                warmup_start_lr=args.warmup_start_lr,
                warmup_steps=args.get_warmup_steps(num_training_steps),
            )
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def steps_per_epoch(self) -> int:
        """Optimizer steps of an epoch. Its last, smaller batch is dropped; left-over micro-batches make a step."""
        batches = len(self.train_dataset) // self.args.group_size
        return max(math.ceil(batches / self.args.gradient_accumulation_steps), 1)

    def forget_gradients_of_inactive_organs(self) -> None:
        """Before an optimizer step: take from it the projections of organs that entered none of its micro-batches.

        A gradient that is None is passed over by the optimizer; one that is zero is not, and weight decay and the
        momentum of earlier steps go on. The organs are those of the global batch, so all ranks do the same.
        """
        is_active = torch.stack(self.step_organs).any(0).tolist()
        model = self.accelerator.unwrap_model(self.model)
        if not any(is_active):
            model.zero_grad(set_to_none=True)
        for is_active_organ, parameters in zip(is_active, model.organ_projection.organ_parameters(), strict=True):
            if not is_active_organ:
                for parameter in parameters:
                    parameter.grad = None

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the organs' losses of the window to the Trainer's log line and to the CSV file."""
        if "loss" in logs and self.window.num_batches:
            rows = self.window.rows(self.state.global_step, self.state.epoch or 0.0)
            if not math.isfinite(logs["loss"]):
                broken = [row.organ for row in rows if row.active and not math.isfinite(row.loss)]
                raise FloatingPointError(
                    f"the loss is {logs['loss']} at step {self.state.global_step} (organs {broken}). Continue from an "
                    "earlier checkpoint with a lower --learning_rate, a lower --max_grad_norm, or without fp16."
                )
            logs["active_organs"] = sum(row.active for row in rows)
            logs.update(_summary(rows, self.window))
            logs["temperature"] = float(self.temperature)
            logs["group_size"] = self.args.group_size
            self.window.clear()
            if self.is_world_process_zero():
                self.train_file.append(rows)
        super().log(logs, start_time)

    # Evaluation

    @torch.no_grad()
    def evaluate(
        self,
        eval_dataset: ProcessedSplit | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Contrastive loss per organ over the whole evaluation split, and what `zero_shot` adds.

        A contrastive loss depends on who is contrasted with whom, so embeddings of all rows are gathered first and
        then contrasted in fixed groups of the training batch's size: the number does not change with the number of
        processes or the evaluation batch, and can be compared with the training loss.

        Returns:
            `eval_loss`, `eval_chance`, `eval_floor`, `eval_text_cosine`, `eval_loss/<organ>` and speed.
        """
        self._memory_tracker.start()
        start_time = time.time()
        was_training = self.model.training
        # An evaluation must not change the training around it: a data loader draws from the global generator.
        with torch.random.fork_rng(devices=[]):
            embedded, logit_scale = self._embed_split(self.get_eval_dataloader(eval_dataset))
            logs = self._contrast_in_groups(*embedded, logit_scale, metric_key_prefix)
            if self.zero_shot is not None and self.is_world_process_zero():
                scores = self.zero_shot(self.accelerator.unwrap_model(self.model))
                logs.update({f"{metric_key_prefix}_{name}": value for name, value in scores.items()})
        self.model.train(was_training)
        num_rows, num_steps = len(embedded[0]), math.ceil(len(embedded[0]) / self.args.eval_batch_size)
        logs.update(speed_metrics(metric_key_prefix, start_time, num_samples=num_rows, num_steps=num_steps))
        self.log(logs)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, logs)
        self._memory_tracker.stop_and_update_metrics(logs)
        return logs

    def _embed_split(self, loader: DataLoader) -> tuple[list[Tensor], Tensor]:
        """Embed every row, on all processes together.

        Returns:
            On the CPU, each with one entry a row: image embeddings, caption embeddings, caption ids, abnormal, valid;
            and the logit scale.
        """
        self.callback_handler.eval_dataloader = loader  # the progress bar asks for its length
        model = self._wrap_model(self.model, training=False)
        model.eval()
        parts: list[list[Tensor]] = []
        for inputs in loader:
            self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
            inputs = self._prepare_inputs(inputs)
            with self.accelerator.autocast():
                outputs, caption_embeds, is_valid = embed(model, inputs)
            identity = (inputs["caption_hash"], inputs["organ_is_abnormal"].long(), is_valid.long())
            # gather_for_metrics leaves out the rows that only filled up the last batch
            batch = self.accelerator.gather_for_metrics(
                (outputs.image_embeds.float(), caption_embeds.float(), *identity)
            )
            parts.append([part.cpu() for part in batch])
        image_embeds, caption_embeds, caption_id, is_abnormal, is_valid = (torch.cat(part) for part in zip(*parts))
        embedded = [image_embeds, caption_embeds, caption_id, is_abnormal.bool(), is_valid.bool()]
        return embedded, outputs.logit_scale.float().cpu()

    def _contrast_in_groups(
        self,
        image_embeds: Tensor,
        caption_embeds: Tensor,
        caption_id: Tensor,
        is_abnormal: Tensor,
        is_valid: Tensor,
        logit_scale: Tensor,
        prefix: str,
    ) -> dict[str, float]:
        """Mean loss over groups of the training batch's size; a last, smaller group is left out if there is another."""
        config = self.accelerator.unwrap_model(self.model).config
        window = OrganLossWindow(list(config.organs))
        # Neighbouring rows are often reconstructions of one patient: mixed, once and for all.
        order = torch.randperm(len(image_embeds), generator=torch.Generator().manual_seed(0))
        size = min(self.args.group_size, len(order))
        losses = []
        for start in range(0, len(order) - size + 1, size):
            group = order[start : start + size]
            identity = (caption_id[group], is_abnormal[group], is_valid[group])
            organ_loss: OrganLoss = organ_contrastive_loss(
                image_embeds[group], caption_embeds[group], *identity, logit_scale, config.organ_reduction
            )
            window.add(organ_loss, caption_embeds[group], *identity)
            losses.append(float(organ_loss.loss))
        rows = window.rows(self.state.global_step, self.state.epoch or 0.0)
        if self.is_world_process_zero():
            self.eval_file.append(rows)
        summary = {f"{prefix}_{name}": value for name, value in _summary(rows, window).items()}
        return {f"{prefix}_loss": sum(losses) / len(losses), **summary}

    # Saving

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict)
        # A pickle of the arguments that nothing reads back: run.json says the same in plain text.
        pickled = os.path.join(output_dir or self.args.output_dir, "training_args.bin")
        if self.args.should_save and os.path.isfile(pickled):
            os.remove(pickled)

    def create_model_card(self, **kwargs: Any) -> None:
        """Write our own card in place of the Trainer's draft (the Trainer calls this before every push)."""
        if self.write_card is not None and self.is_world_process_zero():
            self.write_card()


def _summary(rows: list[OrganLossRow], window: OrganLossWindow) -> dict[str, float]:
    """What a log line says of a window; what is undefined in it (no organ was active) is left out."""
    active = [row for row in rows if row.active]
    summary = {f"loss/{row.organ}": round(row.loss, 5) for row in active}
    if active:
        summary["chance"] = sum(row.chance for row in active) / len(active)
        summary["floor"] = sum(row.floor for row in active) / len(active)
    if not math.isnan(cosine := window.text_cosine()):
        summary["text_cosine"] = cosine
    return summary


class _RunBookkeeping(TrainerCallback):
    """Keeps sampler and loss files in step with the run."""

    def __init__(self, trainer: FVLMTrainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer.window.clear()
        self.trainer.step_organs.clear()
        if state.is_world_process_zero:
            self.trainer.train_file.keep_until(state.global_step)
            self.trainer.eval_file.keep_until(state.global_step)

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if args.skip_inactive_organs:
            self.trainer.forget_gradients_of_inactive_organs()
            self.trainer.step_organs.clear()

    def on_epoch_begin(self, args, state, control, **kwargs):
        # Accelerate tells the sampler the epoch itself, but loses sight of it behind two wrappers: in the first epoch
        # after a resume, on several processes.
        if self.trainer.train_sampler is not None:
            self.trainer.train_sampler.set_epoch(int(state.epoch or 0))
