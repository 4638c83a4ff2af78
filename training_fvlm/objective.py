"""The objective of a training: what is contrasted, against which targets, and how organs become one loss.

`Objective` is called with what one contrast holds of all ranks (embed.py says what) and gives the loss, in steps:

(1) targets: the published ones, with soft positives between abnormal patients added by a teacher's texts ("momentum")
    and by labels ("labels"); rows are divided by their sums; a peer then decides a share of the abnormal patients' rows
    ("co_teaching"); label smoothing comes last. Each of the four may be left out, and all are by default
(2) weights of the organs: those the curriculum has let in, times the weights of "dwa"
(3) the contrast of the organs (modeling_fvlm/loss.py)
(4) with a global branch, the contrast of volumes with reports, weighed by its schedule

Every rank computes the same. A call changes nothing; `observe` and `end_step` do, and what they gather is in
`state_dict`, so that a resumed run goes on to the digit.

`Terms` gathers what a loss says beside the organs' losses until the next log line.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from modeling_fvlm.configuration_fvlm import FVLMConfig
from modeling_fvlm.loss import (
    OrganLoss,
    contrastive_targets,
    dynamic_weights,
    global_contrastive_loss,
    label_soft_positives,
    mix,
    organ_contrastive_loss,
    peer_distributions,
    rows_to_one,
    smooth,
    text_soft_positives,
)

from .curriculum import Curriculum
from .objective_settings import ObjectiveSettings, organ_numbers


class Objective:
    """The loss of a contrast.

    Args:
        config: The model's config: organs, their reduction, the global branch.
        settings: Those of the training.
        num_abnormal: Abnormal training captions of each organ, for a curriculum by frequency.
        finding_of_organ: `(organs, findings)` bool, for targets by labels: columns as in `fixed["labels"]`.
    """

    def __init__(
        self,
        config: FVLMConfig,
        settings: ObjectiveSettings,
        *,
        num_abnormal: Sequence[int] | None = None,
        finding_of_organ: Tensor | None = None,
    ):
        self.organs, self.reduction = list(config.organs), config.organ_reduction
        self.has_global_branch = config.volume_pooling != "none"
        self.settings, self.finding_of_organ = settings, finding_of_organ
        if settings.uses("labels") and finding_of_organ is None:
            raise ValueError("targets by labels need finding_of_organ (label_task.py).")
        smoothing = organ_numbers(settings.organ_label_smoothing, self.organs, "--organ_label_smoothing")
        self.smoothing = torch.tensor(smoothing) if any(smoothing) else None
        self.curriculum = None
        if settings.curriculum != "none":
            self.curriculum = Curriculum(
                len(self.organs),
                settings.curriculum,
                start=settings.curriculum_start,
                end=settings.curriculum_end,
                probe=settings.curriculum_probe,
                num_abnormal=num_abnormal,
            )
        self.window = _DynamicWeights(len(self.organs), settings) if self.reduction == "dwa" else None

    def __call__(
        self,
        live: dict[str, Tensor],
        fixed: dict[str, Tensor],
        logit_scale: Tensor,
        organ_log_variances: Tensor | None = None,
        *,
        step: int,
        progress: float,
    ) -> OrganLoss:
        """Contrast the patients of all ranks.

        Args:
            live: `image_embeds`, `text_embeds` (patients, organs, dim); with a global branch `volume_embeds`,
                `report_embeds` (patients, dim).
            fixed: `caption_hash`, `is_abnormal`, `is_valid` (patients, organs); where asked for, `report_hash`
                (patients,), `labels` (patients, findings), and of teachers what teacher.py says.
            logit_scale: Scalar, 1 / temperature.
            organ_log_variances: `(organs,)` of the model, for "uncertainty".
            step: Optimizer steps done.
            progress: Share of the run that is done, in [0, 1].

        Returns:
            `OrganLoss`, whose `terms` hold the global contrast's numbers and the organs' weights, if there are any.
        """
        image_embeds, text_embeds = live["image_embeds"], live["text_embeds"]
        identity = fixed["caption_hash"], fixed["is_abnormal"].bool(), fixed["is_valid"].bool()
        organ_weights = self.organ_weights(progress)
        if organ_weights is not None:
            organ_weights = organ_weights.to(image_embeds.device)
        # (1), (2), (3)
        result = organ_contrastive_loss(
            image_embeds,
            text_embeds,
            *identity,
            logit_scale,
            self.reduction,
            targets=self.targets(fixed, logit_scale),
            organ_weights=organ_weights,
            log_variances=organ_log_variances,
        )
        terms = self.weights_to_log(organ_weights, organ_log_variances)
        loss = result.loss
        # (4)
        if self.has_global_branch:
            organs_weight, whole_weight = self.global_weights(step, progress)
            # A crop without any organ has no embedding.
            has_volume = (live["volume_embeds"].detach() != 0).any(-1)
            whole = global_contrastive_loss(
                live["volume_embeds"],
                live["report_embeds"],
                fixed["report_hash"],
                has_volume & (fixed["report_hash"] != 0),
                logit_scale,
            )
            # Also with a weight of 0: every weight of the model must get a gradient in every step.
            loss = organs_weight * loss + whole_weight * whole.loss
            terms["global_loss"] = whole.loss.detach()
            terms["global_chance"] = whole.num_contrasted[0].clamp(min=1).log()
        return result._replace(loss=loss, terms=terms)

    def targets(self, fixed: dict[str, Tensor], logit_scale: Tensor) -> tuple[Tensor, Tensor] | None:
        """(1) Targets of images over captions and of captions over images; None: the published ones."""
        settings = self.settings
        if self.smoothing is None and not any(map(settings.uses, ("momentum", "labels", "co_teaching"))):
            return None
        with torch.no_grad():
            is_abnormal, is_valid = fixed["is_abnormal"].bool(), fixed["is_valid"].bool()
            targets = contrastive_targets(fixed["caption_hash"], is_abnormal, is_valid).float()
            teacher_texts = fixed.get("teacher_text_embeds")
            if settings.uses("momentum"):
                dim = teacher_texts.shape[-1] // (2 if settings.uses("co_teaching") else 1)
                soft = text_soft_positives(teacher_texts[..., :dim], is_abnormal, is_valid, logit_scale)
                targets = targets + settings.momentum_alpha * soft
            if settings.uses("labels"):
                of_organ = self.finding_of_organ.to(targets.device)
                soft = label_soft_positives(fixed["labels"], of_organ, is_abnormal, is_valid)
                targets = targets + settings.label_alpha * soft
            both = (rows_to_one(targets),) * 2
            if settings.uses("co_teaching"):
                images = fixed["teacher_image_embeds"]
                peer = peer_distributions(
                    images,
                    teacher_texts[..., -images.shape[-1] :],
                    is_abnormal,
                    is_valid,
                    fixed["teacher_logit_scale"].flatten()[0],
                )
                both = tuple(mix(each, soft, settings.co_teaching_alpha) for each, soft in zip(both, peer))
            if self.smoothing is not None:
                amount = self.smoothing.to(targets.device)
                smoothed = smooth(both[0], is_valid, amount)
                both = (smoothed, smoothed if both[1] is both[0] else smooth(both[1], is_valid, amount))
        return both

    def organ_weights(self, progress: float) -> Tensor | None:
        """(2) Factors of the organs' losses `(organs,)`; None: all 1."""
        weights = None if self.window is None else self.window.weights
        if self.curriculum is not None:
            has_entered = self.curriculum.has_entered(progress).float()
            weights = has_entered if weights is None else weights * has_entered
        return weights

    def global_weights(self, step: int, progress: float) -> tuple[float, float]:
        """(4) What the organs' loss and the global one count."""
        settings = self.settings
        if settings.global_schedule == "alternate":
            return (0.0, settings.global_weight) if step % 2 == 0 else (1.0, 0.0)
        if settings.global_schedule == "warmup" and progress < settings.global_warmup:
            return 1.0, settings.global_weight * progress / settings.global_warmup
        return 1.0, settings.global_weight

    def weights_to_log(self, organ_weights: Tensor | None, log_variances: Tensor | None) -> dict[str, Tensor]:
        """What an organ's loss counts, where it is not the same for all and always."""
        weights = organ_weights
        if self.reduction == "uncertainty" and log_variances is not None:
            learned = (-log_variances.detach()).exp()
            weights = learned if weights is None else weights * learned
        if weights is None:
            return {}
        return {f"weight/{organ}": weight for organ, weight in zip(self.organs, weights.float().unbind())}

    @property
    def has_state(self) -> bool:
        """Whether the steps to come hang on those that were done."""
        return self.window is not None or self.curriculum is not None

    def observe(self, organ_loss: OrganLoss) -> None:
        """Take note of a contrast of the training."""
        if self.window is not None:
            self.window.observe(organ_loss)
        if self.curriculum is not None:
            self.curriculum.observe(organ_loss)

    def end_step(self, step: int, progress: float) -> None:
        """After an optimizer step.

        Args:
            step: Optimizer steps done.
            progress: Share of the run that is done now.
        """
        if self.window is not None and step % self.settings.dwa_window == 0:
            self.window.shift()
        if self.curriculum is not None:
            self.curriculum.end_step(progress)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs, as JSON holds it to the digit."""
        state: dict[str, Any] = {}
        if self.window is not None:
            state["window"] = self.window.state_dict()
        if self.curriculum is not None:
            state["curriculum"] = self.curriculum.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`."""
        if self.window is not None:
            self.window.load_state_dict(state["window"])
        if self.curriculum is not None:
            self.curriculum.load_state_dict(state["curriculum"])


class _DynamicWeights:
    """Mean losses over windows of steps, and the weights that follow from the last two (`dynamic_weights`)."""

    NAMES = ("sums", "counts", "last", "before")

    def __init__(self, num_organs: int, settings: ObjectiveSettings):
        self.temperature = settings.dwa_temperature
        for name in self.NAMES:
            setattr(self, name, torch.zeros(num_organs, dtype=torch.float64))

    @property
    def weights(self) -> Tensor:
        """`(organs,)` of mean 1; all 1 until two windows are full."""
        return dynamic_weights(self.last, self.before, self.temperature).float()

    @torch.no_grad()
    def observe(self, organ_loss: OrganLoss) -> None:
        """Add a contrast to the window."""
        self.sums += organ_loss.organ_losses.detach().cpu().double()
        self.counts += organ_loss.organ_is_active.cpu()

    def shift(self) -> None:
        """The window is full: begin the next one."""
        self.before, self.last = self.last, self.sums / self.counts.clamp(min=1)
        self.sums, self.counts = torch.zeros_like(self.sums), torch.zeros_like(self.counts)

    def state_dict(self) -> dict[str, list[float]]:
        return {name: getattr(self, name).tolist() for name in self.NAMES}

    def load_state_dict(self, state: dict[str, list[float]]) -> None:
        for name in self.NAMES:
            setattr(self, name, torch.tensor(state[name], dtype=torch.float64))


class Terms:
    """Means of what the losses between two log lines say beside the organs' losses."""

    def __init__(self):
        self.clear()

    def clear(self) -> None:
        """Begin a new line."""
        self.sums: dict[str, Tensor] = {}
        self.count = 0

    @torch.no_grad()
    def add(self, organ_loss: OrganLoss) -> None:
        """Add the terms of one contrast."""
        for name, value in (organ_loss.terms or {}).items():
            self.sums[name] = value.double() + self.sums[name].to(value.device) if name in self.sums else value.double()
        self.count += 1

    def means(self) -> dict[str, float]:
        """Name -> mean; empty where there is nothing to say."""
        return {name: float(total) / self.count for name, total in self.sums.items()}

    def state_dict(self) -> dict[str, Any]:
        """A line that is not full yet, for a checkpoint."""
        return {"sums": dict(self.sums), "count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with a line."""
        self.sums, self.count = state["sums"], state["count"]
