"""What a run knows of each organ: collected between two log lines, and kept in a CSV file.

Of the loss three numbers belong together, all in nats: `loss`; `chance` = ln(patients contrasted), what a model that
cannot tell the patients apart gets; and `floor`, what a perfect model gets. The floor is 0 only if every patient has
one positive: equal captions, and normal with normal, share the target's probability, and its entropy stays in the
loss. The other columns tell why an organ may stay at chance (see alarm.py).
"""

import csv
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modeling_fvlm.loss import OrganLoss, contrastive_targets

TRAIN_FILE, EVAL_FILE = "organ_losses.csv", "eval_organ_losses.csv"


@dataclass
class OrganLossRow:
    """One organ over one logging window (or one evaluation). NaN: undefined there, or not in an older file.

    Attributes:
        step, epoch: Optimizer steps and epochs done at the end of the window.
        organ: Its name.
        loss: Mean loss in nats over the window's batches in which the organ was active; NaN if there were none.
        chance, floor: ln(patients contrasted) and the entropy of the targets, over the same batches.
        active: Share of the batches in which the organ entered the loss.
        batches: Batches of the window.
        spread: Standard deviation of `loss - chance` from batch to batch, over the active ones; NaN for fewer than two.
        text_cosine: Mean cosine between the embeddings of different captions of the organ.
        fit: How much more alike the images of patients who are positives of each other are than those of others, in
            standard deviations from pair to pair: mean over the batches that have pairs of both kinds. 0 if images and
            captions have nothing to do with each other, whatever the model makes of either.
        fit_spread, fit_batches: Standard deviation of it from batch to batch, and how many there were.
        present, whole: Share of patients in whose crop the organ has voxels, and in whose crop it is whole.
        captioned: Share of patients who have a caption of it.
        abnormal: Share of those captions that are abnormal, whether or not the organ is whole.
        valid: Share of patients that are contrasted: the organ is whole and has a caption.
        equal: Share of the pairs of valid patients whose captions are the same text.
        retrieval: Share of patients of whose organ's image the nearest caption of the group is a positive, over the
            groups in which the organ was active; evaluation only.
        retrieval_chance: The same for a guess.
    """

    step: int
    epoch: float
    organ: str
    loss: float
    chance: float
    floor: float
    active: float
    batches: float = math.nan
    spread: float = math.nan
    text_cosine: float = math.nan
    fit: float = math.nan
    fit_spread: float = math.nan
    fit_batches: float = math.nan
    present: float = math.nan
    whole: float = math.nan
    captioned: float = math.nan
    abnormal: float = math.nan
    valid: float = math.nan
    equal: float = math.nan
    retrieval: float = math.nan
    retrieval_chance: float = math.nan

    @property
    def learned(self) -> float:
        """Share of the way from chance to the floor; NaN where it was not active, or there is no way to go."""
        return share_learned(self.loss, self.chance, self.floor)


COLUMNS = tuple(entry.name for entry in fields(OrganLossRow))
NUMBERS = COLUMNS[3:]
FIRST_COLUMNS = COLUMNS[:7]  # of files from before there were more
# What is known of an organ of a patient before the model has seen it, as one number: bits, and above them a hash of its
# caption's text.
PRESENT, WHOLE, CAPTIONED, ABNORMAL = 1, 2, 4, 8
TEXT_BITS = 8


class OrganLossWindow:
    """Sums over the batches between two log lines; they stay on the device until the line is written."""

    def __init__(self, organs: list[str]):
        self.organs = organs
        self.clear()

    def clear(self) -> None:
        """Start a new window."""
        self.num_batches = self.num_patients = 0
        self.sums: dict[str, Tensor] = {}

    def _add(self, **sums: Tensor) -> None:
        for name, value in sums.items():
            value = value.double()
            self.sums[name] = value if name not in self.sums else self.sums[name].to(value.device) + value

    def state_dict(self) -> dict[str, Any]:
        """A window that is not full yet, for a checkpoint."""
        return {"num_batches": self.num_batches, "num_patients": self.num_patients, "sums": self.sums}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with a window."""
        self.num_batches, self.num_patients, self.sums = state["num_batches"], state["num_patients"], state["sums"]

    @torch.no_grad()
    def add(
        self,
        organ_loss: OrganLoss,
        text_embeds: Tensor,
        caption_id: Tensor,
        is_abnormal: Tensor,
        is_valid: Tensor,
        *,
        image_embeds: Tensor | None = None,
        organ_state: Tensor | None = None,
        with_retrieval: bool = False,
    ) -> None:
        """Add one batch: its loss, and what it was computed from (shapes as in `organ_contrastive_loss`).

        Args:
            organ_loss: Loss of the batch.
            text_embeds, caption_id, is_abnormal, is_valid: Of all its patients.
            image_embeds: For `fit` and retrieval.
            organ_state: `(patients, organs)` int64, as above. Without it `present` and `whole` are unknown, and two
                captions are the same text only if both or neither are abnormal.
            with_retrieval: Count how often the nearest caption is a positive.
        """
        is_active = organ_loss.organ_is_active
        positives = contrastive_targets(caption_id, is_abnormal, is_valid)  # (organs, patients, patients)
        # Targets of a patient are uniform over its k positives: entropy ln k.
        num_valid = is_valid.sum(0)
        floor = organ_loss.organ_floors
        if floor is None:
            floor = positives.sum(-1).clamp(min=1).log().sum(-1) / num_valid.clamp(min=1)
        chance = organ_loss.num_contrasted.clamp(min=1).log()
        loss = organ_loss.organ_losses.detach()
        excess = loss.double() - chance.double()
        # Captions collapse to one point before a run fails to learn: watch the mean cosine between DIFFERENT ones.
        text_embeds = text_embeds.detach().float()
        with torch.autocast(text_embeds.device.type, enabled=False):  # what matters is how close to 1 they are
            cosines = torch.einsum("iod,jod->oij", text_embeds, text_embeds)
        is_pair = is_valid.T[:, :, None] & is_valid.T[:, None, :]
        state = is_valid.long() * CAPTIONED + is_abnormal.long() * ABNORMAL if organ_state is None else organ_state
        text = caption_id.T if organ_state is None else organ_state.T >> TEXT_BITS
        differs = is_pair & (text[:, :, None] != text[:, None, :])
        num_pairs, num_different = num_valid * (num_valid - 1), differs.sum((1, 2))
        self._add(
            **{"active": is_active, "loss": loss * is_active, "chance": chance * is_active, "floor": floor * is_active},
            **{"excess_squared": excess.square() * is_active, "cosine": (cosines * differs).sum((1, 2))},
            **{"valid": num_valid, "pairs": num_pairs, "different": num_different},
        )
        is_captioned = (state & CAPTIONED) > 0
        self._add(captioned=is_captioned.sum(0), abnormal=(is_captioned & ((state & ABNORMAL) > 0)).sum(0))
        if organ_state is not None:
            self._add(present=((state & PRESENT) > 0).sum(0), whole=((state & WHOLE) > 0).sum(0))
        if image_embeds is not None:
            image_embeds = image_embeds.detach().float()
            # Two reconstructions of one scan are alike, whomever their report belongs to: they have all captions alike.
            is_compared = is_pair & differs.any(0)
            fit, has_fit = image_fit(image_embeds, positives, is_compared)
            self._add(fit=fit, fit_squared=fit.double().square(), fit_batches=has_fit)
            if with_retrieval:
                hits, guesses = retrieval_at_1(image_embeds, text_embeds, positives, is_pair)
                self._add(retrieval=hits * is_active, guesses=guesses * is_active, asked=num_valid * is_active)
        self.num_batches += 1
        self.num_patients += len(is_valid)

    def rows(self, step: int, epoch: float) -> list[OrganLossRow]:
        """The window as table rows, one per organ; nothing before the first batch."""
        if not self.sums:
            return []
        names = list(self.sums)
        values = torch.stack(list(self.sums.values())).tolist()  # once: each look at a device waits for it
        return [
            self._row(step, epoch, organ, dict(zip(names, of_organ)))
            for organ, of_organ in zip(self.organs, zip(*values))
        ]

    def _row(self, step: int, epoch: float, organ: str, sums: dict[str, float]) -> OrganLossRow:
        active, patients = sums["active"], self.num_patients
        loss, chance, floor = (_share(sums[name], active) for name in ("loss", "chance", "floor"))
        fit_batches = sums.get("fit_batches", math.nan)
        fit = _share(sums.get("fit", 0.0), fit_batches)
        return OrganLossRow(
            *(step, epoch, organ, loss, chance, floor, active / self.num_batches, self.num_batches),
            spread=_deviation(active, loss - chance, sums["excess_squared"]),
            text_cosine=_share(sums["cosine"], sums["different"]),
            fit=fit,
            fit_spread=_deviation(fit_batches, fit, sums.get("fit_squared", math.nan)),
            fit_batches=fit_batches,
            present=sums.get("present", math.nan) / patients,
            whole=sums.get("whole", math.nan) / patients,
            captioned=sums["captioned"] / patients,
            abnormal=_share(sums["abnormal"], sums["captioned"]),
            valid=sums["valid"] / patients,
            equal=_share(sums["pairs"] - sums["different"], sums["pairs"]),
            retrieval=_share(sums.get("retrieval", 0.0), sums.get("asked", 0.0)),
            retrieval_chance=_share(sums.get("guesses", 0.0), sums.get("asked", 0.0)),
        )


def _share(part: float, whole: float) -> float:
    return part / whole if whole else math.nan


def _deviation(count: float, mean: float, squares: float) -> float:
    """Standard deviation of `count` numbers from their mean and the sum of their squares; NaN for fewer than two."""
    return math.sqrt(max(squares - count * mean**2, 0.0) / (count - 1)) if count > 1 else math.nan


def share_learned(loss: float, chance: float, floor: float) -> float:
    """Share of the way from chance to the floor; NaN where one of them is, or there is no way to go."""
    return (chance - loss) / (chance - floor) if chance > floor else math.nan


def weighted_mean(values: Sequence[float], weights: Sequence[float]) -> float:
    """Weighted mean of the values that are numbers; NaN if there are none."""
    pairs = [(value, weight) for value, weight in zip(values, weights) if weight > 0 and not math.isnan(value)]
    return sum(value * weight for value, weight in pairs) / sum(weight for _, weight in pairs) if pairs else math.nan


def mean_over_rows(rows: Sequence[OrganLossRow], name: str) -> float:
    """Mean of a column over the rows in which it is defined, each with the same weight; NaN if there is none."""
    values = [value for row in rows if not math.isnan(value := getattr(row, name))]
    return sum(values) / len(values) if values else math.nan


def image_fit(image_embeds: Tensor, is_positive: Tensor, is_compared: Tensor) -> tuple[Tensor, Tensor]:
    """How much more alike the images of positives are than those of other pairs, per organ.

    The inner products of the embeddings, centred over the patients: their mean over pairs of positives minus that over
    the other pairs, divided by their standard deviation over all pairs. If captions say nothing of the images, every
    pair is like every other, and the expectation is 0 for any image encoder, trained or not.

    Args:
        image_embeds: `(patients, organs, dim)`.
        is_positive: `(organs, patients, patients)` bool, from `contrastive_targets`.
        is_compared: `(organs, patients, patients)` bool, chosen without a look at the images. The diagonal is left out.

    Returns:
        The difference `(organs,)`, 0 where it is not defined; and whether it is: there are pairs of both kinds.
    """
    is_pair = is_compared & ~torch.eye(len(image_embeds), dtype=torch.bool, device=image_embeds.device)
    weights = is_pair.any(-1)[:, :, None].to(image_embeds.dtype)  # (organs, patients, 1)
    embeds = image_embeds.transpose(0, 1)
    centre = (embeds * weights).sum(1, keepdim=True) / weights.sum(1, keepdim=True).clamp(min=1)
    embeds = (embeds - centre) * weights
    with torch.autocast(embeds.device.type, enabled=False):
        products = embeds @ embeds.transpose(1, 2)  # (organs, patients, patients)
    means = []
    for kind in (is_pair & is_positive, is_pair & ~is_positive, is_pair):
        means.append((products * kind).sum((1, 2)) / kind.sum((1, 2)).clamp(min=1))
    same, other, mean = means
    variance = ((products - mean[:, None, None]).square() * is_pair).sum((1, 2)) / is_pair.sum((1, 2)).clamp(min=1)
    is_defined = (is_pair & is_positive).any(-1).any(-1) & (is_pair & ~is_positive).any(-1).any(-1) & (variance > 0)
    fit = (same - other) / variance.clamp(min=torch.finfo(variance.dtype).tiny).sqrt()
    return torch.where(is_defined, fit, 0.0), is_defined


def retrieval_at_1(
    image_embeds: Tensor, text_embeds: Tensor, is_positive: Tensor, is_pair: Tensor
) -> tuple[Tensor, Tensor]:
    """Count, per organ, the patients whose nearest caption is a positive of theirs, and what a guess would get.

    Captions that are equally near share the hit: embeddings that have collapsed to a point score as a guess does.

    Args:
        image_embeds, text_embeds: `(patients, organs, dim)`, unit length.
        is_positive: `(organs, patients, patients)` bool, from `contrastive_targets`.
        is_pair: `(organs, patients, patients)` bool: both patients are valid.

    Returns:
        Hits and expected hits of a guess, both `(organs,)`, sums over valid patients.
    """
    cosines = torch.einsum("iod,jod->oij", image_embeds.float(), text_embeds.float()).masked_fill(~is_pair, -2)
    is_nearest = (cosines == cosines.amax(-1, keepdim=True)) & is_pair
    hits = (is_nearest & is_positive).sum(-1) / is_nearest.sum(-1).clamp(min=1)
    guesses = is_positive.sum(-1) / is_pair.sum(-1).clamp(min=1)
    return hits.sum(-1), guesses.sum(-1)


class OrganLossFile:
    """The CSV file of a run's rows; only the main process holds one."""

    def __init__(self, path: str | Path):
        self.path = Path(path)

    def keep_until(self, step: int) -> None:
        """Drop rows after `step`: a run resumed from a checkpoint does those steps again."""
        self._replace([row for row in self.read() if row.step <= step] if step and self.path.is_file() else [])

    def _replace(self, rows: list[OrganLossRow]) -> None:
        # At once: a run killed in the middle must not lose the losses of all earlier steps.
        unfinished = OrganLossFile(self.path.with_name(self.path.name + ".part"))
        unfinished._write(rows, mode="w")
        os.replace(unfinished.path, self.path)

    def append(self, rows: list[OrganLossRow]) -> None:
        """Add rows at the end; a file with fewer columns, of an earlier version, gets the others first."""
        if self.path.is_file() and self._columns() == FIRST_COLUMNS:
            self._replace(self.read())
        self._write(rows, mode="a")

    def _write(self, rows: list[OrganLossRow], mode: str) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        has_header = mode == "a" and self.path.is_file()
        with open(self.path, mode, newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            if not has_header:
                writer.writerow(COLUMNS)
            for row in rows:
                numbers = ["" if math.isnan(value := getattr(row, name)) else f"{value:.6g}" for name in NUMBERS]
                writer.writerow([row.step, f"{row.epoch:.6g}", row.organ, *numbers])

    def _columns(self) -> tuple[str, ...]:
        with open(self.path, newline="", encoding="utf-8") as file:
            return tuple(next(csv.reader(file), ()))

    def read(self) -> list[OrganLossRow]:
        """All rows, oldest first; also those of a file with fewer columns, of an earlier version.

        Raises:
            ValueError: If the file is no table of organ losses.
        """
        columns = self._columns()
        if columns not in (COLUMNS, FIRST_COLUMNS):
            raise ValueError(f"{self.path} must have the columns {','.join(COLUMNS)}, got {','.join(columns)}.")
        with open(self.path, newline="", encoding="utf-8") as file:
            return [
                OrganLossRow(
                    int(row["step"]),
                    float(row["epoch"]),
                    row["organ"],
                    *(float(row[name] or math.nan) for name in columns[3:]),
                )
                # A run that was killed may have left half a line at the end.
                for row in csv.DictReader(line for line in file if line.endswith("\n"))
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
        means = {name: mean_over_rows(tail, name) for name in NUMBERS}
        result[organ] = OrganLossRow(tail[-1].step, tail[-1].epoch, organ, **means)
    return result
