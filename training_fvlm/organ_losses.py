"""Per-organ losses of a run: collected between two log lines, and kept in a CSV file.

For each organ three numbers belong together, all in nats: `loss`; `chance` = ln(patients contrasted), what a model
that cannot tell the patients apart gets; and `floor`, what a perfect model gets. The floor is 0 only if every patient
has one positive: equal captions, and normal with normal, share the target's probability, and its entropy stays in the
loss.
"""

import csv
import math
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from modeling_fvlm.loss import OrganLoss, contrastive_targets

COLUMNS = ("step", "epoch", "organ", "loss", "chance", "floor", "active")
TRAIN_FILE, EVAL_FILE = "organ_losses.csv", "eval_organ_losses.csv"


@dataclass
class OrganLossRow:
    """One organ over one logging window (or one evaluation).

    Attributes:
        step, epoch: Optimizer steps and epochs done at the end of the window.
        organ: Its name.
        loss: Mean loss in nats over the window's batches in which the organ was active; NaN if there were none.
        chance, floor: ln(patients contrasted) and the entropy of the targets, over the same batches.
        active: Share of the batches in which the organ entered the loss.
    """

    step: int
    epoch: float
    organ: str
    loss: float
    chance: float
    floor: float
    active: float


class OrganLossWindow:
    """Sums over the batches between two log lines; they stay on the device until the line is written."""

    def __init__(self, organs: list[str]):
        self.organs = organs
        self.clear()

    def clear(self) -> None:
        """Start a new window."""
        self.num_batches = 0
        self.sums: Tensor | None = None
        self.cosine: Tensor | None = None

    @torch.no_grad()
    def add(
        self, organ_loss: OrganLoss, text_embeds: Tensor, caption_id: Tensor, is_abnormal: Tensor, is_valid: Tensor
    ) -> None:
        """Add one batch: its loss, and what it was computed from (shapes as in `organ_contrastive_loss`)."""
        is_active = organ_loss.organ_is_active
        positives = contrastive_targets(caption_id, is_abnormal, is_valid)  # (organs, patients, patients)
        # Targets of a patient are uniform over its k positives: entropy ln k.
        num_valid = is_valid.sum(0).clamp(min=1)
        floor = positives.sum(-1).clamp(min=1).log().sum(-1) / num_valid
        chance = organ_loss.num_contrasted.clamp(min=1).log()
        sums = torch.stack([is_active.double(), organ_loss.organ_losses.double(), chance.double(), floor.double()])
        sums = sums * is_active
        # Captions collapse to one point before a run fails to learn: watch the mean cosine between DIFFERENT ones.
        cosines = torch.einsum("iod,jod->oij", text_embeds.float(), text_embeds.float())
        differs = caption_id.T[:, :, None] != caption_id.T[:, None, :]
        differs &= is_valid.T[:, :, None] & is_valid.T[:, None, :]
        num_pairs = differs.sum((1, 2))
        mean_cosine = (cosines * differs).sum((1, 2)) / num_pairs.clamp(min=1)
        cosine = torch.stack([mean_cosine.sum(), (num_pairs > 0).sum()]).double()  # organs weigh the same
        self.sums = sums if self.sums is None else self.sums + sums
        self.cosine = cosine if self.cosine is None else self.cosine + cosine
        self.num_batches += 1

    def rows(self, step: int, epoch: float) -> list[OrganLossRow]:
        """The window as table rows, one per organ."""
        rows = []
        for organ, (active, loss, chance, floor) in zip(self.organs, self.sums.T.tolist()):
            means = (value / active if active else math.nan for value in (loss, chance, floor))
            rows.append(OrganLossRow(step, epoch, organ, *means, active=active / self.num_batches))
        return rows

    def text_cosine(self) -> float:
        """Mean cosine between different captions of an organ, NaN if no organ had two."""
        total, count = self.cosine.tolist()
        return total / count if count else math.nan


class OrganLossFile:
    """The CSV file of a run's rows; only the main process holds one."""

    def __init__(self, path: str | Path):
        self.path = Path(path)

    def keep_until(self, step: int) -> None:
        """Drop rows after `step`: a run resumed from a checkpoint does those steps again."""
        rows = [row for row in self.read() if row.step <= step] if step and self.path.is_file() else []
        # At once: a run killed in the middle must not lose the losses of all earlier steps.
        unfinished = OrganLossFile(self.path.with_name(self.path.name + ".part"))
        unfinished._write(rows, mode="w")
        os.replace(unfinished.path, self.path)

    def append(self, rows: list[OrganLossRow]) -> None:
        """Add rows at the end."""
        self._write(rows, mode="a")

    def _write(self, rows: list[OrganLossRow], mode: str) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        has_header = mode == "a" and self.path.is_file()
        with open(self.path, mode, newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            if not has_header:
                writer.writerow(COLUMNS)
            for row in rows:
                numbers = [f"{value:.6g}" for value in (row.loss, row.chance, row.floor, row.active)]
                writer.writerow([row.step, f"{row.epoch:.6g}", row.organ, *numbers])

    def read(self) -> list[OrganLossRow]:
        """All rows, oldest first.

        Raises:
            ValueError: If the file is no table of organ losses.
        """
        with open(self.path, newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            if tuple(reader.fieldnames or ()) != COLUMNS:
                raise ValueError(f"{self.path} must have the columns {','.join(COLUMNS)}, got {reader.fieldnames}.")
            return [
                OrganLossRow(
                    int(row["step"]), float(row["epoch"]), row["organ"], *(float(row[name]) for name in COLUMNS[3:])
                )
                for row in reader
            ]


def last_rows(rows: list[OrganLossRow], num_windows: int = 1) -> dict[str, OrganLossRow]:
    """For each organ the mean over its last `num_windows` windows in which it was active."""
    by_organ: dict[str, list[OrganLossRow]] = {}
    for row in rows:
        if not math.isnan(row.loss):
            by_organ.setdefault(row.organ, []).append(row)
    result = {}
    for organ, found in by_organ.items():
        tail = found[-num_windows:]
        means = {name: sum(getattr(row, name) for row in tail) / len(tail) for name in COLUMNS[3:]}
        result[organ] = OrganLossRow(tail[-1].step, tail[-1].epoch, organ, **means)
    return result
