"""The processed split as a trainer reads it: its description, its rows in a repeatable order, the shuffled control.

Rows come from the config `volumes` of a folder written by `data_builders` (or the same on the Hub). What a random crop
looks like hangs on (seed, epoch, row) alone, never on the state of a worker, so the sampler hands out (epoch, row)
pairs: a resumed run then sees exactly the crops of an undisturbed one, with any number of workers and processes.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from huggingface_hub import hf_hub_download

from modeling_fvlm.configuration_fvlm import DEFAULT_WINDOW, FVLMVisionConfig
from modeling_fvlm.organs import load_organ_set
from modeling_fvlm.preparation import padding_hu
from modeling_fvlm.processed_split import load_rows, row_of_table

from .arguments import SettingsError

COLUMNS = ("patient_id", "scan_id", "volume", "mask", "shape", "captions")
# What a report says of a row, as far as it is read: it goes with the captions in the shuffled control.
SPOKEN = ("captions", "findings", "impression", "labels")


@dataclass(frozen=True)
class SplitDescription:
    """How a processed split was made, from its manifest.json.

    Attributes:
        organ_set: Name of the organ set.
        organs: Organ names; a stored mask holds the index in this tuple + 1.
        organ_classes: For each organ the TotalSegmentator classes it is made of, per numbering.
        spacing: mm between voxel centres along (depth, height, width).
        margin_voxels: Margin left around the organs' box, voxels along (depth, height, width).
        preprocessing: "standard" or "published"; splits from before there was a choice are standard.
        padded_to, padding_hu: The crop in voxels along (depth, height, width) that published scans are padded to, and
            with what HU; None for standard ones, and for published ones that do not tell.
    """

    organ_set: str
    organs: tuple[str, ...]
    organ_classes: dict[str, Any]
    spacing: tuple[float, ...]
    margin_voxels: tuple[int, ...]
    preprocessing: str = "standard"
    padded_to: tuple[int, ...] | None = None
    padding_hu: int | None = None


def read_description(data: str, revision: str | None = None) -> SplitDescription:
    """Read manifest.json of a local folder, of a data set on the Hub or of an address that fsspec reads."""
    path = Path(data) / "manifest.json"
    if "://" in data:
        try:
            with fsspec.open(f"{data.rstrip('/')}/manifest.json", "rt", encoding="utf-8") as file:
                return _description(json.load(file))
        except FileNotFoundError as error:
            raise SettingsError(f"--data {data}: no manifest.json there.") from error
    if not path.is_file():
        if Path(data).exists():
            raise SettingsError(
                f"--data {data}: no manifest.json there. Give the folder that `python -m data_builders ... --out` "
                "wrote, the one that holds README.md and volumes/."
            )
        path = Path(hf_hub_download(data, "manifest.json", repo_type="dataset", revision=revision))
    return _description(json.loads(path.read_text(encoding="utf-8")))


def _description(manifest: dict[str, Any]) -> SplitDescription:
    settings = manifest["settings"]
    organ_set = settings["organ_set"]
    return SplitDescription(
        organ_set=organ_set["name"],
        organs=tuple(organ_set["organs"]),
        organ_classes=organ_set.get("classes", {}),
        spacing=tuple(settings["spacing"]),
        margin_voxels=tuple(settings["margin_voxels"]),
        preprocessing=settings.get("preprocessing", "standard"),
        padded_to=tuple(settings["padded_to"]) if "padded_to" in settings else None,
        padding_hu=settings.get("padding_hu"),
    )


def check_against_recipe(description: SplitDescription, model: dict[str, Any], data: str) -> None:
    """Refuse a recipe that names other organs, spacing, margin or preprocessing than the split was built with.

    All travel with the weights, and a scan at inference is prepared by them: a model that says one thing and was
    trained on another would be wrong in silence.
    """
    if model.get("organ_set") is not None:
        try:
            organs = tuple(load_organ_set(model["organ_set"]).organs)
        except ValueError as error:
            # A set of the user's own, named but not in hub_configs/organs: the split brings it along.
            if model["organ_set"] != description.organ_set:
                raise SettingsError(f"model.organ_set: {error}") from error
            organs = description.organs
        if organs != description.organs:
            missing, extra = set(organs) - set(description.organs), set(description.organs) - set(organs)
            detail = f"missing {sorted(missing)}, unknown {sorted(extra)}" if missing or extra else "in another order"
            raise SettingsError(
                f"the recipe's organ_set {model['organ_set']} ({len(organs)} organs) is not the split's "
                f"{description.organ_set} ({len(description.organs)} organs; {detail}). Build {data} again with "
                f"`--organs {model['organ_set']}`, or train with --model.organ_set {description.organ_set}."
            )
    for name, unit in (("spacing", "mm"), ("margin_voxels", "voxels")):
        asked, built = model.get(name), getattr(description, name)
        if asked is not None and not np.allclose(asked, built, atol=1e-4):
            raise SettingsError(
                f"the recipe's {name} {tuple(asked)} {unit} is not the split's {built} {unit} (depth, height, width). "
                f"Leave model.{name} out to take the split's, or build {data} again."
            )
    # Never taken from the split: who trains on the published faults should have asked for them.
    asked = model.get("preprocessing", "standard")
    if asked != description.preprocessing:
        raise SettingsError(
            f"the recipe's preprocessing is '{asked}', the split's is '{description.preprocessing}'. Train with "
            f"--model.preprocessing {description.preprocessing}, or build {data} again with --preprocessing {asked}."
        )
    volume_size = (model.get("vision_config") or {}).get("volume_size", FVLMVisionConfig.volume_size)
    check_padding(description, volume_size, model.get("windows") or [DEFAULT_WINDOW], f"the recipe, for {data}")


def check_padding(
    description: SplitDescription, volume_size: Sequence[int], windows: Sequence[Mapping[str, float]], where: str
) -> None:
    """Refuse a published split whose scans were padded to another crop, or with other HU, than the model's would be.

    Args:
        description: How the split was made; one that tells of no padding is passed.
        volume_size: The model's crop in voxels.
        windows: The model's HU windows.
        where: What messages call the model.
    """
    if description.padded_to is None and description.padding_hu is None:
        return
    for name, key, built, reads, unit in (
        ("padded_to", "vision_config.volume_size", description.padded_to, tuple(volume_size), "voxels"),
        ("padding_hu", "windows", description.padding_hu, padding_hu(windows, is_published=True), "HU"),
    ):
        if built is not None and built != reads:
            raise SettingsError(
                f"{where}: by model.{key} the processor pads to {reads} {unit}, but the scans of the split have "
                f"{name} {built}. The builders pad as the published weights expect it: leave model.{key} out, or train "
                "on a split of preprocessing 'standard'."
            )


def load_split(
    data: str, split: str, *, revision: str | None = None, max_rows: int | None = None, more: Sequence[str] = ()
) -> datasets.Dataset:
    """Load a split as a memory-mapped table of the columns training reads; `more` names others of `SPOKEN`."""
    try:
        rows = load_rows(data, split, revision)
    except ValueError as error:
        raise SettingsError(str(error)) from error
    columns = [*COLUMNS, *more]
    missing = [name for name in columns if name not in rows.column_names]
    if missing:
        raise SettingsError(f"{data}, split {split}: columns {missing} are missing; it has {rows.column_names}.")
    if len(rows) == 0:
        raise SettingsError(f"{data}, split {split}: there are no rows.")
    if max_rows is not None:
        rows = rows.select(range(min(max_rows, len(rows))))
    return rows.select_columns(columns)


def caption_rows_of_other_patients(patient_ids: list[str], seed: int) -> np.ndarray:
    """For each row, the row whose captions it gets in the shuffled control.

    Patients are put in a random circle and each takes the captions of the next one, so none keeps his own, and all
    captions of a patient move together: how often an organ is abnormal stays as it was.

    Returns:
        `(rows,)` int64.
    """
    rows_of: dict[str, list[int]] = {}
    for row, patient_id in enumerate(patient_ids):
        rows_of.setdefault(patient_id, []).append(row)
    if len(rows_of) < 2:
        raise SettingsError("--shuffle_captions needs at least two patients in the training split.")
    patients = list(rows_of)
    # A stream of its own: `default_rng(seed)` is that of (seed, epoch 0) and gives the order of the first epoch. Giver
    # and taker would meet in one batch, the true caption a negative of its own scan, and the control end below chance.
    order = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(1,))).permutation(len(patients))
    source = np.empty(len(patient_ids), dtype=np.int64)
    for place, patient in enumerate(order):
        giver = rows_of[patients[order[(place + 1) % len(order)]]]
        for number, row in enumerate(rows_of[patients[patient]]):
            source[row] = giver[number % len(giver)]
    return source


class RowError(ValueError):
    """A row that cannot be read or used: it is never replaced by another one, the run stops and names it."""


class SplitRows(torch.utils.data.Dataset, ABC):
    """Rows of a split for the collator, addressed by a row number or by (epoch, row number).

    Attributes:
        caption_rows: Row whose captions each row gets, from `caption_rows_of_other_patients`; None: its own.
        captions: The columns of `SPOKEN` alone: reads no volume when only a caption is wanted.
    """

    caption_rows: np.ndarray | None = None
    captions: datasets.Dataset

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def read(self, row: int) -> dict[str, Any]:
        """A row, its volume and mask as buffers of bytes."""

    @abstractmethod
    def column(self, name: str) -> Sequence[Any]:
        """A column of all rows; not for volumes and masks."""

    @abstractmethod
    def place_of(self, row: int) -> str:
        """Where a row lies, for messages: its file, and its place there."""

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, Any]:
        epoch, index = (int(number) for number in (key if isinstance(key, tuple) else (0, key)))
        try:
            row = self.read(index)
        except (OSError, pa.ArrowException) as error:
            raise RowError(f"{self.name_of(index)} cannot be read: {error}") from error
        if self.caption_rows is not None:
            row |= self.captions[int(self.caption_rows[index])]
        return {**row, "epoch": epoch, "row": index, "name": partial(self.name_of, index)}

    def name_of(self, row: int) -> str:
        """A row as messages name it: its number, its scan, and where it lies."""
        try:
            return f"row {row} (scan {self.scan_id(row)!r}, {self.place_of(row)})"
        except (OSError, pa.ArrowException):  # the whole file is broken
            return f"row {row}"

    def scan_id(self, row: int) -> str:
        """The scan of a row."""
        return self.column("scan_id")[row]

    def patient_ids(self) -> list[str]:
        """Patient of each row."""
        return list(self.column("patient_id"))

    def caption_texts(self) -> Iterator[str]:
        """Every caption of the split, row after row."""
        for row in self.captions:
            for entry in row["captions"]:
                yield entry["caption"]


class ProcessedSplit(SplitRows):
    """Rows of a split that lies here as a memory-mapped table.

    Args:
        rows: Table from `load_split`.
        caption_rows: See `SplitRows`.
        data, split: Where the table comes from, for messages.
    """

    def __init__(
        self, rows: datasets.Dataset, caption_rows: np.ndarray | None = None, data: str = "memory", split: str = "train"
    ):
        self.rows = rows
        self.tables = rows.with_format("arrow")  # volumes as views: `rows[index]` would copy them
        self.caption_rows = caption_rows
        self.captions = rows.select_columns([name for name in SPOKEN if name in rows.column_names])
        self.data, self.split = data, split

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, row: int) -> dict[str, Any]:
        return row_of_table(self.tables[row])

    def column(self, name: str) -> Sequence[Any]:
        return self.rows.select_columns([name])[name]

    def place_of(self, row: int) -> str:
        number = row
        for path in sorted(Path(self.data).glob(f"volumes/{self.split}-*.parquet")):
            num_rows = pq.read_metadata(path).num_rows
            if number < num_rows:
                return f"{path.relative_to(self.data).as_posix()}, row {number}"
            number -= num_rows
        return f"{self.data}, split {self.split}"


class EpochSampler(torch.utils.data.Sampler):
    """(epoch, row) pairs in an order that hangs on (seed, epoch) alone, the same on every rank.

    Accelerate shards the batches of this order over the ranks.
    """

    def __init__(self, num_rows: int, seed: int, is_shuffled: bool = True):
        self.num_rows, self.seed, self.is_shuffled = num_rows, seed, is_shuffled
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the next iteration."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.num_rows

    def __iter__(self) -> Iterator[tuple[int, int]]:
        epoch = self.epoch
        order = np.arange(self.num_rows)
        if self.is_shuffled:
            order = np.random.default_rng((self.seed, epoch)).permutation(self.num_rows)
        return ((epoch, int(row)) for row in order)
