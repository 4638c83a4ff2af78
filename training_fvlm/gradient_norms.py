"""Norm of the gradient of each part of the model, before clipping: shows which tower a run moves, and which not.

Made from the norms of the single parameters, which the watch for broken steps (broken_steps.py) takes in any case.
Squares are summed on the device and read once per log line.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

# Part of a parameter's name -> what it is logged as; the first that fits. Others are `other`.
TOWERS = {
    "vision_model": "vision",
    "text_model": "text",
    "organ_pooling": "pooling",
    "volume_pooling": "pooling",
    "organ_projection": "projections",
    "text_projection": "projections",
    "volume_projection": "projections",
    "report_projection": "projections",
    "temperature": "temperature",
}


class GradientNorms:
    """Sums over the optimizer steps between two log lines."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.towers: list[str] = []
        self.membership = torch.empty(0)
        self.clear()

    def clear(self) -> None:
        """Start a new window."""
        self.sums: dict[str, Tensor] = {}  # per part: squared norms, and steps

    def state_dict(self) -> dict[str, Any]:
        """A window that is not full yet, for a checkpoint."""
        return {"sums": self.sums}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with a window."""
        self.sums = state["sums"]

    @torch.no_grad()
    def add(self, names: Sequence[str], norms: Tensor | None, total: Tensor | float | None = None) -> None:
        """Add the gradients of one optimizer step.

        Args:
            names: Parameters that have one.
            norms: Of each of them, before clipping; None where an engine keeps them to itself (DeepSpeed).
            total: Where a loss scaler has multiplied the gradients: the norm of all of them without its factor.
        """
        if norms is None:
            return
        squares = norms.double().square()
        if total is not None:
            squares = squares * torch.as_tensor(total, device=squares.device).double().square() / squares.sum()
        if self.names != list(names) or self.membership.device != squares.device:
            self._sort(names, squares.device)
        # A step in which fp16 overflowed is passed over by the optimizer, and here.
        is_finite = torch.isfinite(squares).all()
        of_towers = self.membership @ torch.where(is_finite, squares, 0.0)
        for tower, square in zip(self.towers, of_towers.unbind()):
            added = torch.stack([square, is_finite.double()])
            self.sums[tower] = self.sums[tower].to(added.device) + added if tower in self.sums else added

    def _sort(self, names: Sequence[str], device: torch.device) -> None:
        """Which parameter belongs to which part, as a matrix of zeros and ones: made once, not at every step."""
        places = places_by_tower(names)
        self.names, self.towers = list(names), list(places)
        self.membership = torch.zeros((len(places), len(names)), dtype=torch.float64)
        for row, of_tower in enumerate(places.values()):
            self.membership[row, of_tower] = 1.0
        self.membership = self.membership.to(device)

    def root_mean_squares(self, reduce: Callable[[Tensor], Tensor] | None = None) -> dict[str, float]:
        """Per part the root of the mean square over the steps; parts without a gradient are left out.

        Args:
            reduce: Sums a tensor over the ranks, where each holds its own shards only.
        """
        if not self.sums:
            return {}
        squares, steps = torch.stack(list(self.sums.values()), dim=1)
        if reduce is not None:
            squares = reduce(squares)
        means = (squares / steps).sqrt().tolist()  # once: each look at a device waits for it
        return {tower: mean for tower, mean in zip(self.sums, means) if not math.isnan(mean)}


def places_by_tower(names: Sequence[str]) -> dict[str, list[int]]:
    """The places of the parameters that belong to each part of the model."""
    towers: dict[str, list[int]] = {}
    for place, name in enumerate(names):
        tower = next((TOWERS[part] for part in name.split(".") if part in TOWERS), "other")
        towers.setdefault(tower, []).append(place)
    return towers
