"""Rows of a processed split -> one batch for the model. Runs in the data loader's worker.

(1) decode volume and mask, (2) crop or pad them to the network's size, at random in training and centred in
evaluation, (3) tell which patches hold which organ and which organs are whole, (4) flip and leave out tokens if asked
to, (5) encode every caption of the batch once, and if asked to its reports and labels. The volume stays int16 HU: the
model windows it, on its own device, and a quarter of the bytes travel from worker to device.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from modeling_fvlm.captions import caption_hash, compose_report, encode_captions
from modeling_fvlm.configuration_fvlm import AXES, FVLMConfig
from modeling_fvlm.geometry import crop_or_pad, crop_start, organ_bookkeeping
from modeling_fvlm.preparation import padding_hu
from modeling_fvlm.processed_split import Scratch, decode_volume

from .data import RowError
from .label_task import LabelTask
from .objective_settings import ObjectiveSettings, organ_numbers
from .organ_losses import ABNORMAL, CAPTIONED, PRESENT, TEXT_BITS, WHOLE
from .token_dropout import TokenDropout


def objective_options(
    settings: ObjectiveSettings, config: FVLMConfig, label_task: LabelTask | None = None
) -> dict[str, Any]:
    """What a training's objective asks of its collator, as arguments of `FVLMCollator`."""
    rates = organ_numbers(settings.organ_token_dropout, config.organs, "--organ_token_dropout")
    return {
        "token_dropout": TokenDropout(tuple(rates), settings.organ_token_dropout_size) if any(rates) else None,
        "with_reports": config.volume_pooling != "none",
        "label_task": label_task,
    }


class FVLMCollator:
    """Make a batch of rows.

    Args:
        tokenizer: Tokenizer of the text encoder.
        config: The model's config: organs, volume and patch size, completeness rule, longest caption.
        is_random: Crop at random (training); off: centred (evaluation).
        flip_axes: Axes that may be flipped when `is_random`.
        flip_probability: Chance of a flip along each of them.
        seed: With the row's epoch and number it fixes the crop, the flips and the tokens that are left out.
        token_dropout: Leaves tokens of organs out when `is_random`.
        with_reports: Encode whole reports, too, for a global branch.
        label_task: Findings whose labels are given along.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        config: FVLMConfig,
        *,
        is_random: bool,
        flip_axes: Sequence[str] = (),
        flip_probability: float = 0.0,
        seed: int = 0,
        token_dropout: TokenDropout | None = None,
        with_reports: bool = False,
        label_task: LabelTask | None = None,
    ):
        self.tokenizer = tokenizer
        self.organs = list(config.organs)
        self.volume_size = tuple(config.vision_config.volume_size)
        self.patch_size = tuple(config.vision_config.patch_size)
        self.padding_hu = padding_hu(config.windows, config.preprocessing == "published")
        self.max_text_length, self.max_report_length = config.max_text_length, config.max_report_length
        self.token_dropout, self.with_reports, self.label_task = token_dropout, with_reports, label_task
        self.completeness = config.completeness
        self.min_organ_voxels = config.min_organ_voxels
        self.is_random = is_random
        self.flip_axes = [AXES.index(axis) for axis in flip_axes]
        self.flip_probability = flip_probability
        self.seed = seed
        self.scratch = Scratch()

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """Collate rows of `ProcessedSplit`.

        Returns:
            `volume` (batch, depth, height, width) int16 HU; `organ_token_mask` (batch, organs, tokens) bool;
            `organ_is_complete` (batch, organs) bool; `organ_state` (batch, organs) int64, as organ_losses.py tells;
            `row` (batch,) int64, the rows' numbers in the split; with a label task `labels` (batch, findings) int64;
            and what `encode_captions` gives of the batch's different captions and, if asked for, reports. An organ
            that is not whole has no caption.

        Raises:
            RowError: If a row cannot be read, with its place and scan. It is never replaced by another one.
        """
        volumes, token_masks, complete = [], [], []
        for row in rows:
            try:
                volume, token_mask, is_complete = self.prepare(row)
            except Exception as error:
                name = row["name"]() if "name" in row else f"row {row.get('row')} (scan {row.get('scan_id')!r})"
                raise RowError(
                    f"{name} cannot be used: {error} Run `python -m data_builders inspect` on the data set, or build "
                    "it again."
                ) from error
            volumes.append(volume)
            token_masks.append(token_mask)
            complete.append(is_complete)
        organ_is_whole = np.stack(complete)
        return {
            "volume": torch.from_numpy(np.stack(volumes)),
            "organ_token_mask": torch.from_numpy(np.stack(token_masks)),
            "organ_is_complete": torch.from_numpy(organ_is_whole),
            "organ_state": torch.from_numpy(self.organ_state(rows, np.stack(token_masks).any(-1), organ_is_whole)),
            "row": torch.tensor([row["row"] for row in rows]),
            **({} if self.label_task is None else {"labels": self.label_task.encode_rows(rows)}),
            **self.encode(rows, organ_is_whole),
        }

    def prepare(self, row: dict[str, Any]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Steps (1) to (4) for one row: volume int16, token mask (organs, tokens), completeness (organs,)."""
        volume, mask = decode_volume(row, self.scratch)  # (1)
        # (2)
        generator = np.random.default_rng((self.seed, row["epoch"], row["row"])) if self.is_random else None
        start = crop_start(mask.shape, self.volume_size, generator=generator)
        volume = crop_or_pad(volume, start, self.volume_size, self.padding_hu)
        # (3)
        token_mask, is_whole = organ_bookkeeping(
            mask,
            start,
            self.volume_size,
            len(self.organs),
            self.patch_size,
            completeness=self.completeness,
            min_voxels=self.min_organ_voxels,
        )
        # (4)
        if self.is_random and self.flip_axes:
            flipped = [axis for axis in self.flip_axes if generator.random() < self.flip_probability]
            volume = np.ascontiguousarray(np.flip(volume, flipped))
            # The crop is a whole number of patches, so its tokens turn with it, at a fraction of the mask's cost.
            grid = [size // patch for size, patch in zip(self.volume_size, self.patch_size)]
            on_grid = token_mask.reshape(-1, *grid)
            token_mask = np.flip(on_grid, [axis + 1 for axis in flipped]).reshape(token_mask.shape)
        if self.is_random and self.token_dropout is not None:
            token_mask = self.token_dropout(token_mask, (self.seed, row["epoch"], row["row"]))
        return volume, token_mask, is_whole

    def organ_state(
        self, rows: Sequence[dict[str, Any]], organ_is_present: np.ndarray, organ_is_whole: np.ndarray
    ) -> np.ndarray:
        """What is known of each organ of each patient (organ_losses.py), also of captions that are left out below."""
        state = organ_is_present * PRESENT + organ_is_whole * WHOLE
        place_of = {organ: place for place, organ in enumerate(self.organs)}
        for number, row in enumerate(rows):
            for organ, entry in {entry["organ"]: entry for entry in row["captions"]}.items():
                if (place := place_of.get(organ)) is not None:
                    text = caption_hash(entry["caption"], is_abnormal=False)  # equal for equal texts, abnormal or not
                    state[number, place] |= CAPTIONED | (ABNORMAL if entry["is_abnormal"] else 0)
                    state[number, place] |= text >> TEXT_BITS << TEXT_BITS
        return state

    def encode(self, rows: Sequence[dict[str, Any]], organ_is_whole: np.ndarray) -> dict[str, Tensor]:
        """(5) The batch's captions. Those of organs that are not whole cannot enter the loss and are not encoded."""
        captions: list[dict[str, tuple[str, bool]]] = []
        for row, is_whole in zip(rows, organ_is_whole):
            known = {entry["organ"]: (entry["caption"], bool(entry["is_abnormal"])) for entry in row["captions"]}
            whole = [organ for organ, flag in zip(self.organs, is_whole) if flag]
            captions.append({organ: known[organ] for organ in whole if organ in known})
        reports = None
        if self.with_reports:
            reports = [compose_report(row["impression"], row["findings"]) for row in rows]
        return encode_captions(
            captions, self.organs, self.tokenizer, self.max_text_length, reports, self.max_report_length
        )
