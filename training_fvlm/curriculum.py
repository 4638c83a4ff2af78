"""A curriculum of organs: they enter the loss one after the other, and stay.

Of K organs `ceil(K (start + (1 - start) p / end))` are in at progress p, all of them from `end` on. Their order:

- "frequency": by how many training captions of the organ are abnormal, the most first. An organ enters a contrast only
  where some patient is abnormal in it, so these are the organs with the most to learn from.
- "difficulty": all organs train over the first `probe` of the run; then they are put in the order of their mean loss
  over its chance level in that time, the lowest first, and the schedule begins there.

Which organs are in hangs on progress and, for "difficulty", on sums that a checkpoint holds.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from modeling_fvlm.loss import OrganLoss


class Curriculum:
    """Tells which organs are in.

    Args:
        num_organs: Length of the organ axis.
        kind: "frequency" or "difficulty".
        start: Share of the organs that are in at the beginning; at least one is.
        end: Progress from which all are in.
        probe: Progress up to which "difficulty" measures.
        num_abnormal: Abnormal training captions of each organ, for "frequency".
    """

    def __init__(
        self,
        num_organs: int,
        kind: str,
        *,
        start: float,
        end: float,
        probe: float = 0.0,
        num_abnormal: Sequence[int] | None = None,
    ):
        self.num_organs, self.kind, self.start, self.end = num_organs, kind, start, end
        self.probe = probe if kind == "difficulty" else 0.0
        self.order: list[int] | None = None  # None: measuring
        if kind == "frequency":
            if num_abnormal is None:
                raise ValueError("a curriculum by frequency needs the number of abnormal captions of each organ.")
            self.order = sorted(range(num_organs), key=lambda organ: (-num_abnormal[organ], organ))
        self.ratios = torch.zeros(num_organs, dtype=torch.float64)
        self.counts = torch.zeros(num_organs, dtype=torch.float64)

    def num_entered(self, progress: float) -> int:
        """How many organs are in at a progress in [0, 1]."""
        if progress >= self.end or progress < self.probe:
            return self.num_organs
        done = (progress - self.probe) / (self.end - self.probe)
        # Rounded first: 4 x (0.25 + 0.75 x 1/3) is a hair above 2.
        share = round(self.num_organs * (self.start + (1 - self.start) * done), 9)
        return min(max(math.ceil(share), 1), self.num_organs)

    def has_entered(self, progress: float) -> Tensor:
        """Which organs are in, `(organs,)` bool."""
        count = self.num_entered(progress)
        if self.order is None or count == self.num_organs:
            return torch.ones(self.num_organs, dtype=torch.bool)
        has_entered = torch.zeros(self.num_organs, dtype=torch.bool)
        has_entered[self.order[:count]] = True
        return has_entered

    @torch.no_grad()
    def observe(self, organ_loss: OrganLoss) -> None:
        """Take note of a contrast of the probe."""
        if self.order is not None:
            return
        is_active = organ_loss.organ_is_active.cpu()
        chance = organ_loss.num_contrasted.cpu().double().clamp(min=2).log()
        self.ratios += torch.where(is_active, organ_loss.organ_losses.detach().cpu().double() / chance, 0.0)
        self.counts += is_active

    def end_step(self, progress: float) -> None:
        """After an optimizer step, with the progress it has brought: the probe may have ended."""
        if self.order is None and progress >= self.probe:
            means = [
                ratio / count if count else math.inf
                for ratio, count in zip(self.ratios.tolist(), self.counts.tolist(), strict=True)
            ]
            self.order = sorted(range(self.num_organs), key=lambda organ: (means[organ], organ))

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs, as JSON holds it to the digit."""
        return {"order": self.order, "ratios": self.ratios.tolist(), "counts": self.counts.tolist()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`."""
        self.order = state["order"]
        self.ratios = torch.tensor(state["ratios"], dtype=torch.float64)
        self.counts = torch.tensor(state["counts"], dtype=torch.float64)
