"""The Trainer of fVLM: the contrastive loss over the patients of all processes, per-organ losses, evaluation.

(1) each process embeds its patients and its different captions, (2) embeddings and captions' identities are gathered
over all processes, gradients included, (3) every process computes the same loss over the global batch, (4) DDP
averages the gradients, which makes them those of one process with the whole batch (see gather.py).

Where the patients of a contrast do not fit into memory together, (1) and (4) go chunk by chunk (gradient_cache.py). The
Trainer then sees chunks in place of batches, and so many more of them per optimizer step.
"""

import contextlib
import math
import os
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import DistributedType
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader, Sampler
from transformers import PreTrainedModel, ProcessorMixin, TrainerCallback
from transformers.dynamic_module_utils import custom_object_save
from transformers.trainer_utils import IntervalStrategy, speed_metrics

from modeling_fvlm.loss import OrganLoss, organ_contrastive_loss
from modeling_fvlm.pipeline_fvlm import save_for_hub

from .adapt import (
    ADAPTER_FOLDER,
    adapt_model,
    has_adapter,
    load_adapter,
    merged_state_dict,
    parameter_groups,
    save_adapter,
)
from .alarm import ChanceAlarm
from .arguments import FVLMTrainingArguments, SettingsError
from .card_facts import TrainingClock
from .collator import FVLMCollator
from .contrast_batches import ContrastBatches, num_held_chunks
from .data import EpochSampler, SplitRows
from .durable import DurableTrainer, shielded
from .embed import Embedded, embed, text_embeddings
from .gather import gather_dict
from .gradient_cache import GradientCache
from .gradient_norms import GradientNorms
from .hub import PushCallback, PushingTrainer
from .label_task import LabelTask
from .log_line import LogLine
from .objective import Objective, Terms
from .organ_losses import EVAL_FILE, TRAIN_FILE, OrganLossFile, OrganLossRow, OrganLossWindow, mean_over_rows
from .organ_sampling import BalancedSampler, read_abnormal_captions
from .scaling import prepare_for_sharding
from .schedule import published_schedule
from .teacher import MomentumTeacher, Teachers

if TYPE_CHECKING:
    from .co_teaching import PeerTrainer

# Kept from weight decay beside norms and biases: positions, the temperature and the loss's variances are no weights of
# a linear map.
NO_DECAY_NAMES = ("position", "temperature", "variances")
# In a log line: name -> column of the organs' table.
LOGGED_MEANS = {"chance": "chance", "floor": "floor", "text_cosine": "text_cosine"}
LOGGED_MEANS |= {"retrieval_at_1": "retrieval", "retrieval_at_1_chance": "retrieval_chance"}
LOGGED_OF_ORGANS = {"loss": "loss", "text_cosine": "text_cosine", "retrieval_at_1": "retrieval"}


class FVLMTrainer(PushingTrainer, DurableTrainer):
    """Trainer for `FVLMModel`.

    Args:
        model: An `FVLMModel`.
        args: Settings.
        train_dataset, eval_dataset: Rows; the evaluation one may be None.
        train_collator, eval_collator: One crops at random, the other in the centre.
        processor: Saved beside the weights of every checkpoint.
        zero_shot: Called with the model after each evaluation on the main process; returns numbers to log.
        write_card: Called to write README.md into the output folder.
        base: What the model may be called that --lora adapts.
        label_task: Findings of the organs, for --targets labels.
        peer: The second model's trainer, for --targets co_teaching.
        callbacks: As for `Trainer`.
    """

    # The loss is a mean over one micro-batch: the Trainer is to divide it by the number of accumulated ones.
    loss_is_scaled_for_ga = False

    def __init__(
        self,
        model: PreTrainedModel,
        args: FVLMTrainingArguments,
        *,
        train_dataset: SplitRows,
        train_collator: FVLMCollator,
        eval_dataset: SplitRows | None = None,
        eval_collator: FVLMCollator | None = None,
        processor: ProcessorMixin | None = None,
        zero_shot: Callable[[PreTrainedModel], dict[str, float]] | None = None,
        write_card: Callable[[], None] | None = None,
        base: str = "",
        label_task: LabelTask | None = None,
        peer: "PeerTrainer | None" = None,
        callbacks: list[TrainerCallback] | None = None,
    ):
        self.adaptation = adapt_model(model, args, base)
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
        prepare_for_sharding(self)
        of_run = self.accelerator.unwrap_model(self.model)
        organs = list(of_run.config.organs)
        self.window = self.extra_state["organ_losses"] = OrganLossWindow(organs)
        self.gradient_norms = self.extra_state["gradient_norms"] = GradientNorms()
        self.alarm = ChanceAlarm(organs, args.alarm_steps, args.group_size)
        self.logged_rows: list[OrganLossRow] = []  # of the last log line
        self.evaluated_rows: list[OrganLossRow] = []  # of the last evaluation
        self.watch.organs = organs
        self.temperature = math.nan
        self.step_organs: list[Tensor] = []  # of each micro-batch since the last optimizer step: the active organs
        self.cache = self._gradient_cache() if args.is_cached else None
        self.abnormal = read_abnormal_captions(train_dataset, organs) if args.needs_abnormal_captions else None
        self.objective = Objective(
            of_run.config,
            args,
            num_abnormal=None if self.abnormal is None else self.abnormal.num_abnormal,
            finding_of_organ=None if label_task is None else label_task.finding_of_organ,
        )
        if self.objective.has_state:
            self.extra_state["objective"] = self.objective
        self.terms = self.extra_state["terms"] = Terms()
        self.teachers = Teachers()
        if args.uses("momentum"):
            self.teachers.momentum = self.extra_state["teacher"] = MomentumTeacher(of_run, args.teacher_momentum)
        self.peer = peer
        if peer is not None:
            self.teachers.peer, peer.teachers.peer = peer.accelerator.unwrap_model(peer.model), of_run
        self.train_file = OrganLossFile(os.path.join(args.output_dir, TRAIN_FILE))
        self.eval_file = OrganLossFile(os.path.join(args.output_dir, EVAL_FILE))
        self.add_callback(_RunBookkeeping(self))
        LogLine(self)
        self.clock = self.extra_state["clock"] = TrainingClock()
        self.add_callback(self.clock)
        if args.push_to_hub:
            self.add_callback(PushCallback(self))

    # Data

    def _get_train_sampler(self, train_dataset: SplitRows | None = None) -> Sampler:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        is_shuffled = self.args.train_sampling_strategy == "random"
        self.train_sampler = EpochSampler(len(dataset), seed, is_shuffled)
        if self.args.organ_sampling == "balanced":
            self.train_sampler = BalancedSampler(
                self.abnormal, self.args.group_size, seed, self.args.organ_sampling_repeats
            )
        return self.train_sampler

    def get_train_dataloader(self) -> DataLoader:
        """Batches of the whole contrast's patients, or chunks of it in the order of the gradient cache."""
        if self.cache is None:
            return super().get_train_dataloader()
        args = self.args
        order = self._get_train_sampler(self.train_dataset)
        # The order is shared out over the ranks here, so accelerate has nothing to prepare.
        loader = DataLoader(
            self.train_dataset,
            batch_sampler=ContrastBatches(
                order, args.group_size, args.micro_batch_size, self.cache.num_held, args.world_size, args.process_index
            ),
            collate_fn=self.data_collator,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            persistent_workers=args.dataloader_persistent_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
        )
        return shielded(loader)

    def take_batches(
        self, iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[Any, Tensor | int | None]:
        """The batches of an optimizer step; chunks are read when their turn comes, not all of them at once."""
        if self.cache is None:
            return super().take_batches(iterator, num_batches, device)
        return _InTurn(iterator, num_batches), None

    def get_eval_dataloader(self, eval_dataset: SplitRows | None = None) -> DataLoader:
        """Every row once, centred: unlike the training loader it drops no last batch."""
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        loader = DataLoader(
            dataset,
            batch_size=self.args.per_device_eval_batch_size,
            collate_fn=self.eval_collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
        )
        return shielded(self.accelerator.prepare(loader))

    # Training

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, Any]:
        """Contrast this process's patients with those of all processes."""
        embedded = embed(model, inputs)  # (1)
        embedded.fixed.update(self.teach_images(inputs))
        if (taught := self.teach_texts(inputs)) is not None:
            said = text_embeddings(taught, inputs)
            embedded.fixed.update({f"teacher_{name}": embeds for name, embeds in said.items()})
        organ_loss = self.contrast_ranks(embedded, is_training=model.training)
        return (organ_loss.loss, embedded) if return_outputs else organ_loss.loss

    def contrast_ranks(self, embedded: Embedded, is_training: bool) -> OrganLoss:
        """(2) and (3): gather what the loss reads, one collective for each number type, and contrast all patients."""
        live = gather_dict(embedded.live, with_gradient=True, keeps_other_ranks=not self.args.published_gradient_scale)
        fixed = gather_dict(embedded.fixed)
        step = self.state.global_step
        progress = step / max(self.state.max_steps, 1)
        organ_loss = self.objective(live, fixed, **embedded.parameters, step=step, progress=progress)
        if is_training:
            is_abnormal, is_valid = fixed["is_abnormal"].bool(), fixed["is_valid"].bool()
            self.window.add(
                organ_loss,
                live["text_embeds"],
                *(fixed["caption_hash"], is_abnormal, is_valid),
                image_embeds=live["image_embeds"],
                organ_state=fixed.get("organ_state"),
            )
            self.watch.note_contrast(fixed["row"], organ_loss.organ_losses, live["image_embeds"], live["text_embeds"])
            self.objective.observe(organ_loss)
            self.terms.add(organ_loss)
            if self.args.skip_inactive_organs:
                self.step_organs.append(organ_loss.organ_is_active)
            self.temperature = 1 / embedded.parameters["logit_scale"].detach()
        return organ_loss

    def training_step(
        self, model: torch.nn.Module, inputs: dict[str, Tensor], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """A batch, or with the gradient cache the next chunk of a contrast."""
        if self.cache is None:
            return super().training_step(model, inputs, num_items_in_batch)
        model.train()
        if callable(getattr(self.optimizer, "train", None)):
            self.optimizer.train()
        self.contrasts_in_step = self.current_gradient_accumulation_steps // self.cache.loads
        if self.cache.position == 0:
            # Counted from the optimizer steps, so that a resumed run counts on.
            accumulated = self.accumulated_contrasts
            self.contrast_number = self.state.global_step * self.contrasts_per_step + accumulated
            self.accumulated_contrasts = (accumulated + 1) % self.contrasts_in_step
        return self.cache.take(model, inputs, self.contrast_number)

    def _gradient_cache(self) -> GradientCache:
        """The cache for the contrast and the chunks that the arguments ask for."""
        args, config = self.args, self.accelerator.unwrap_model(self.model).config
        voxels = math.prod(config.vision_config.volume_size)
        num_tokens = voxels // math.prod(config.vision_config.patch_size)
        patient_bytes = 2 * voxels + len(config.organs) * (num_tokens + 1)
        num_chunks = -(-args.rank_size // args.micro_batch_size)
        self.contrasts_per_step, self.accumulated_contrasts = args.gradient_accumulation_steps, 0
        return GradientCache(
            self,
            num_chunks=num_chunks,
            num_held=num_held_chunks(num_chunks, patient_bytes * args.micro_batch_size, args.held_volumes_gb * 1e9),
            first_patient=args.process_index * args.rank_size,
            seed=args.seed,
        )

    # What the gradient cache asks of its host

    def to_device(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """The tensors on the model's device."""
        return self._prepare_inputs(inputs)

    def contrast(self, embedded: Embedded) -> Tensor:
        """The loss of a contrast, as its share of the optimizer step's."""
        return self.contrast_ranks(embedded, is_training=True).loss / self.contrasts_in_step

    def backward(self, scalar: Tensor) -> None:
        """Backward pass of a scalar."""
        # DeepSpeed would divide by the number of chunks.
        is_deepspeed = self.accelerator.distributed_type == DistributedType.DEEPSPEED
        self.accelerator.backward(scalar, **({"scale_wrt_gas": False} if is_deepspeed else {}))

    @contextlib.contextmanager
    def without_sync(self) -> Iterator[None]:
        """No exchange of gradients between the ranks, and no step of an engine that steps by itself."""
        state = self.accelerator.gradient_state
        was_last = state.sync_gradients
        state._set_sync_gradients(False)
        with self.accelerator.no_sync(self.model_wrapped):
            yield
        state._set_sync_gradients(was_last)

    def teach_images(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """What a teacher says of the images of a chunk."""
        with self.accelerator.autocast():
            return self.teachers.teach_images(inputs)

    def teach_texts(self, inputs: dict[str, Tensor]) -> Tensor | None:
        """What a teacher says of texts."""
        with self.accelerator.autocast():
            return self.teachers.teach_texts(inputs)

    def end_step(self) -> None:
        """After an optimizer step: what hangs on the steps that were done."""
        self.objective.end_step(self.state.global_step, self.state.global_step / max(self.state.max_steps, 1))
        if self.teachers.momentum is not None:
            self.teachers.momentum.update(self.accelerator.unwrap_model(self.model))
        if self.peer is not None:
            self.peer.take_step()

    # The Trainer counts chunks as batches

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's loop. Of its batches so many make an optimizer step as the chunks of all contrasts in it."""
        if self.cache is None:
            return super()._inner_training_loop(*args, **kwargs)
        self.cache.clear()
        self.accumulated_contrasts = 0
        self.args.gradient_accumulation_steps = self.contrasts_per_step * self.cache.loads
        try:
            return super()._inner_training_loop(*args, **kwargs)
        finally:
            self.args.gradient_accumulation_steps = self.contrasts_per_step

    def get_total_train_batch_size(self, args: FVLMTrainingArguments) -> int:
        """Patients of an optimizer step."""
        if self.cache is None:
            return super().get_total_train_batch_size(args)
        return args.group_size * self.contrasts_per_step

    def get_decay_parameter_names(self, model: torch.nn.Module) -> list[str]:
        """Parameters under weight decay: all of them, or no norm, bias, position embedding and temperature."""
        if self.args.weight_decay_everywhere:
            return [name for name, _ in model.named_parameters()]
        names = super().get_decay_parameter_names(model)
        return [name for name in names if not any(part in name for part in NO_DECAY_NAMES)]

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        """The Trainer's optimizer, with groups of their own for learning rates of their own."""
        of_model = self.model if model is None else model
        groups = None
        if self.optimizer is None and self.optimizer_cls_and_kwargs is None:
            groups = parameter_groups(of_model, self.args, self.get_decay_parameter_names(of_model))
        if groups is None:
            return super().create_optimizer(model)
        optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args, of_model)
        # Others are made from the model.
        takes_groups = isinstance(optimizer_class, type) and issubclass(optimizer_class, torch.optim.Optimizer)
        if not takes_groups or {"params", "model", "optimizer_dict"} & set(options):
            raise SettingsError(
                f"--optim {self.args.optim} groups parameters by itself: leave out --layer_lr_decay, --vision_lr_scale "
                "and --text_lr_scale, or choose another."
            )
        self.optimizer_cls_and_kwargs = optimizer_class, options | {"params": groups}
        try:
            return super().create_optimizer(model)
        finally:
            self.optimizer_cls_and_kwargs = None

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
        contrasts = len(self.train_dataset) // self.args.group_size
        per_step = self.args.gradient_accumulation_steps if self.cache is None else self.contrasts_per_step
        return max(math.ceil(contrasts / per_step), 1)

    def forget_gradients_of_inactive_organs(self) -> None:
        """Before an optimizer step: take from it the projections of organs that entered none of its micro-batches.

        A gradient that is None is passed over by the optimizer; one that is zero is not, and weight decay and the
        momentum of earlier steps go on. The organs are those of the global batch, so all ranks do the same.
        """
        is_active = torch.stack(self.step_organs).any(0).tolist()
        model = self.accelerator.unwrap_model(self.model)
        if not any(is_active) and not self.objective.has_global_branch:
            model.zero_grad(set_to_none=True)
        for is_active_organ, parameters in zip(is_active, model.organ_projection.organ_parameters(), strict=True):
            if not is_active_organ:
                for parameter in parameters:
                    parameter.grad = None

    def _raise_if_broken(self, is_last: bool = False) -> None:
        super()._raise_if_broken(is_last)
        if is_last and self.peer is not None:  # it stands in the checkpoints as well
            self.peer._raise_if_broken(is_last)

    def _get_grad_norm(self, model: torch.nn.Module, grad_norm: Tensor | float | None = None) -> Tensor | float:
        """The norm of all gradients before clipping, which the Trainer logs; those of the towers are noted."""
        total = super()._get_grad_norm(model, grad_norm)
        is_scaled = getattr(self.accelerator, "scaler", None) is not None
        self.gradient_norms.add(*self.watch.last_gradients, total if is_scaled else None)
        return total

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the organs' losses of the window to the Trainer's log line and to the CSV file."""
        if "loss" in logs and self.window.num_batches:
            rows = self.window.rows(self.state.global_step, self.state.epoch or 0.0)
            logs["active_organs"] = sum(row.active for row in rows)
            logs.update(_summary(rows))
            norms = self.gradient_norms.root_mean_squares(self.accelerator.reduce if self.is_fsdp_enabled else None)
            logs.update({f"grad_norm/{tower}": norm for tower, norm in norms.items()})
            logs["temperature"] = float(self.temperature)
            logs["group_size"] = self.args.group_size
            logs.update(self.terms.means())
            if self.peer is not None:
                logs["peer_loss"] = self.peer.take_mean_loss()
            self.terms.clear()
            self.window.clear()
            self.gradient_norms.clear()
            self.logged_rows = rows
            if self.is_world_process_zero():
                self.train_file.append(rows)
                self.alarm.add(rows)
        super().log(logs, start_time)

    # Evaluation

    @torch.no_grad()
    def evaluate(
        self,
        eval_dataset: SplitRows | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Contrastive loss per organ over the whole evaluation split, and what `zero_shot` adds.

        A contrastive loss depends on who is contrasted with whom, so embeddings of all rows are gathered first and
        then contrasted in fixed groups of the training batch's size: the number does not change with the number of
        processes or the evaluation batch, and can be compared with the training loss.

        Returns:
            `eval_loss`, `eval_chance`, `eval_floor`, `eval_text_cosine`, `eval_retrieval_at_1` (how often the caption
            nearest to an organ's image is a positive, in the same groups) beside what a guess gets,
            `eval_retrieval_at_1_chance`; `eval_loss/<organ>` and the like for each organ; and speed.
        """
        self._memory_tracker.start()
        start_time = time.time()
        was_training = self.model.training
        # An evaluation must not change the training around it: a data loader draws from the global generator.
        with torch.random.fork_rng(devices=[]):
            embedded, logit_scale = self._embed_split(self.get_eval_dataloader(eval_dataset))
            scores: dict[str, float] | None = None
            if self.zero_shot is not None:  # first: a signal may break it off, and no half of it is written
                scores = self.on_main_alone(lambda: self.zero_shot(self.accelerator.unwrap_model(self.model)))
            logs = self._contrast_in_groups(*embedded, logit_scale, metric_key_prefix)
            logs.update({f"{metric_key_prefix}_{name}": value for name, value in (scores or {}).items()})
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
                embedded = embed(model, inputs)
            # gather_for_metrics leaves out the rows that only filled up the last batch
            batch = self.accelerator.gather_for_metrics(
                tuple(embedded.live[name] for name in ("image_embeds", "text_embeds"))
                + tuple(embedded.fixed[name] for name in ("caption_hash", "is_abnormal", "is_valid"))
            )
            parts.append([part.cpu() for part in batch])
        image_embeds, caption_embeds, caption_id, is_abnormal, is_valid = (torch.cat(part) for part in zip(*parts))
        tensors = [image_embeds, caption_embeds, caption_id, is_abnormal.bool(), is_valid.bool()]
        return tensors, embedded.parameters["logit_scale"].float().cpu()

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
            window.add(
                organ_loss, caption_embeds[group], *identity, image_embeds=image_embeds[group], with_retrieval=True
            )
            losses.append(float(organ_loss.loss))
        rows = self.evaluated_rows = window.rows(self.state.global_step, self.state.epoch or 0.0)
        if self.is_world_process_zero():
            self.eval_file.append(rows)
        summary = {f"{prefix}_{name}": value for name, value in _summary(rows).items()}
        return {f"{prefix}_loss": sum(losses) / len(losses), **summary}

    # Saving

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if not self.args.should_save:
            return
        model, folder = self.accelerator.unwrap_model(self.model), output_dir or self.args.output_dir
        if has_adapter(model):
            save_adapter(model, self.adaptation, os.path.join(folder, ADAPTER_FOLDER))
            if os.path.realpath(folder) != os.path.realpath(self.args.output_dir):
                # A checkpoint is small: its base lies where it was taken from.
                custom_object_save(model, folder, config=model.config)
                model.config.save_pretrained(folder)
                if self.processing_class is not None:
                    self.processing_class.save_pretrained(folder)
                return
            state_dict = merged_state_dict(model)
        # Not as the Trainer does, which adds a pickle of the arguments and would miss the pipeline's code.
        save_for_hub(model, self.processing_class, folder, state_dict)

    def _save_extra_state(self, folder: str) -> None:
        super()._save_extra_state(folder)
        if self.peer is not None:
            self.peer.save(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        of_run = self.accelerator.unwrap_model(self.model)
        if has_adapter(of_run):
            load_adapter(of_run, self.adaptation, os.path.join(resume_from_checkpoint, ADAPTER_FOLDER))
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        if has_adapter(self.accelerator.unwrap_model(self.model)):
            self._load_from_checkpoint(self.state.best_model_checkpoint)
        else:
            super()._load_best_model()

    def create_model_card(self, **kwargs: Any) -> None:
        """Write our own card in place of the Trainer's draft (the Trainer calls this before every push)."""
        if self.write_card is not None and self.is_world_process_zero():
            self.write_card()


def _summary(rows: list[OrganLossRow]) -> dict[str, float]:
    """What a log line says of a window: means over organs, then organ by organ; what is undefined in it is left out."""
    means = {name: mean_over_rows(rows, column) for name, column in LOGGED_MEANS.items()}
    of_organs = {
        f"{name}/{row.organ}": round(getattr(row, column), 5)
        for name, column in LOGGED_OF_ORGANS.items()
        for row in rows
    }
    return {name: value for name, value in (means | of_organs).items() if not math.isnan(value)}


class _InTurn:
    """So many items of an iterator, each taken when it is asked for."""

    def __init__(self, iterator: Iterator, count: int):
        self.iterator, self.count = iterator, count

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator:
        for _ in range(self.count):
            yield next(self.iterator)


class _RunBookkeeping(TrainerCallback):
    """Keeps sampler and loss files in step with the run."""

    def __init__(self, trainer: FVLMTrainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer.window.clear()
        self.trainer.gradient_norms.clear()
        self.trainer.step_organs.clear()
        self.trainer.terms.clear()
        if self.trainer.peer is not None:
            self.trainer.peer.begin(state.max_steps, state.global_step, self.trainer.resumed_from)
        if state.is_world_process_zero:
            self.trainer.train_file.keep_until(state.global_step)
            self.trainer.eval_file.keep_until(state.global_step)
            self.trainer.alarm.warmup_steps = args.get_warmup_steps(state.max_steps)
            self.trainer.alarm.restart(self.trainer.train_file.read())

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if args.skip_inactive_organs:
            self.trainer.forget_gradients_of_inactive_organs()
            self.trainer.step_organs.clear()

    def on_step_end(self, args, state, control, **kwargs):
        self.trainer.end_step()
        if state.global_step >= state.max_steps and args.logging_strategy != IntervalStrategy.NO:
            control.should_log = True  # a short run has no other line

    def on_epoch_begin(self, args, state, control, **kwargs):
        # Accelerate tells the sampler the epoch itself, but loses sight of it behind two wrappers: in the first epoch
        # after a resume, on several processes.
        if self.trainer.train_sampler is not None:
            self.trainer.train_sampler.set_epoch(int(state.epoch or 0))
