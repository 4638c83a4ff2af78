"""What lies in a processed split, read back from its shards: the figures that `inspect` shows and judges.

(1) `list_rows`   where every row lies; no volume is opened
(2) `measure_row` one row: voxels, HU and place of each organ, hashes, lengths of texts. A row is decoded, measured and
                  let go, so a process holds one volume
(3) `examine`     all of them, or some that lie evenly spread, gathered in an `Examination`

A row that cannot be read is listed with its reason and does not stop the rest. What the figures mean is judged in
doctor_findings.py; doctor_page.py draws them.
"""

import hashlib
import multiprocessing
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from modeling_fvlm.geometry import organ_is_complete
from modeling_fvlm.processed_split import MASK_DTYPE, VOLUME_DTYPE, decode_volume

from .cases import SPLITS
from .personal_text import kinds_in_text
from .shards import ShardRecord

# A median is exact within these limits (an intercept of -8192 occurs); what lies beyond counts as the limit.
LOWEST_HU, HIGHEST_HU = -10240, 10239
# Histogram of the page: bins of 32 HU; the first and the last also hold what lies beyond.
HISTOGRAM_EDGES = np.arange(-1536, 2049, 32)
SLAB_VOXELS = 2**21  # voxels counted at once: bounds the memory of the counting, whatever the size of the volume

# What a damaged row or shard may raise between the file and the array.
DAMAGE = (
    *(ValueError, TypeError, KeyError, OverflowError, OSError, MemoryError),
    *(pa.ArrowException, zstandard.ZstdError),
)


@dataclass(frozen=True)
class RowPlace:
    """Where a row lies: its place in the split (from 0), the shard, and the row group and row in it."""

    split: str
    index: int
    file: str  # relative to the folder
    group: int
    row: int


@dataclass(frozen=True)
class Damage:
    """A row, or a whole shard (`place.index` -1), that cannot be read."""

    place: RowPlace
    reason: str
    recon_id: str | None = None

    def __str__(self) -> str:
        row = "the file" if self.place.index < 0 else f"row {self.place.index} of the split"
        return f"{self.place.file}, {row}{f' ({self.recon_id})' if self.recon_id else ''}: {self.reason}"


@dataclass
class RowMeasures:
    """One row. Arrays have one entry per organ, in the order of the organ set.

    Attributes:
        voxels: int64, 0 where the organ is absent.
        is_cut: The organ touches a face of the array: the scan, or a missing margin, cuts it off.
        median_hu: float32, NaN where absent.
        center_mm: float32 `(organs, 3)`, mean of the organ's voxels in mm along (depth, height, width) from the first
            voxel of the array; NaN where absent.
        caption_words: int32, 0 where the row has no caption of the organ.
        caption_hashes: int64, equal for equal captions; 0 where there is none.
        volume_hash: Of the HU and the shape.
        report_hash: Of findings and impression; None where both are empty.
        personal_kinds: What its report or captions seem to hold of a person, as of `kinds_in_text`.
        histogram: int64 `(organs + 1, bins)` over `HISTOGRAM_EDGES`, background first. Taken out by `examine`.
    """

    place: RowPlace
    recon_id: str
    scan_id: str
    patient_id: str
    shape: tuple[int, int, int]
    spacing: tuple[float, float, float]
    hu_range: tuple[int, int]
    voxels: np.ndarray
    is_cut: np.ndarray
    median_hu: np.ndarray
    center_mm: np.ndarray
    is_mentioned: np.ndarray
    is_abnormal: np.ndarray
    caption_words: np.ndarray
    caption_hashes: np.ndarray
    labels: dict[str, int]
    volume_hash: int
    report_hash: int | None
    report_words: int
    personal_kinds: tuple[str, ...] = ()
    histogram: np.ndarray | None = None


@dataclass
class Examination:
    """All that was measured. Arrays over the rows stand in the order of `rows`: split by split.

    Attributes:
        manifest: manifest.json of the split.
        organs: In the order of the labels in the masks.
        num_rows: Rows that the shards of each split hold, also those that were not looked at.
        rows: What was measured.
        damaged: Rows and shards that could not be read.
        wrong_shards: Shards that the manifest names and that are missing, or of another size.
        personal_kinds: What its report or captions seem to hold of a person, as of `kinds_in_text`.
        histogram: int64 `(organs + 1, bins)` over `HISTOGRAM_EDGES`, background first, summed over the rows.
    """

    manifest: dict
    organs: tuple[str, ...]
    num_rows: dict[str, int]
    rows: list[RowMeasures]
    damaged: list[Damage] = field(default_factory=list)
    wrong_shards: list[str] = field(default_factory=list)
    histogram: np.ndarray | None = None

    @property
    def is_partial(self) -> bool:
        """Whether only some of the rows were looked at."""
        rows_damaged = sum(damage.place.index >= 0 for damage in self.damaged)
        return len(self.rows) + rows_damaged < sum(self.num_rows.values())

    @cached_property
    def split(self) -> np.ndarray:
        return np.array([row.place.split for row in self.rows], dtype=object)

    @cached_property
    def recon_id(self) -> np.ndarray:
        return np.array([row.recon_id for row in self.rows], dtype=object)

    @cached_property
    def spacing(self) -> np.ndarray:
        """mm, `(rows, 3)`."""
        return np.array([row.spacing for row in self.rows], dtype=np.float64).reshape(-1, 3)

    @cached_property
    def volume_ml(self) -> np.ndarray:
        """`(rows, organs)`, 0 where the organ is absent."""
        return self.stacked("voxels") * self.spacing.prod(axis=1, keepdims=True) / 1000

    @cached_property
    def is_present(self) -> np.ndarray:
        """`(rows, organs)`."""
        return self.stacked("voxels") > 0

    @cached_property
    def is_whole(self) -> np.ndarray:
        """`(rows, organs)`: present, and not cut off by a face of the array."""
        return self.is_present & ~self.stacked("is_cut")

    @cached_property
    def median_hu(self) -> np.ndarray:
        """`(rows, organs)`, NaN where the organ is absent."""
        return self.stacked("median_hu")

    @cached_property
    def is_abnormal(self) -> np.ndarray:
        """`(rows, organs)`."""
        return self.stacked("is_abnormal")

    @cached_property
    def is_mentioned(self) -> np.ndarray:
        """`(rows, organs)`."""
        return self.stacked("is_mentioned")

    @cached_property
    def caption_hashes(self) -> np.ndarray:
        """`(rows, organs)`, 0 where there is no caption."""
        return self.stacked("caption_hashes")

    def stacked(self, name: str) -> np.ndarray:
        """One attribute of all rows, `(rows, organs, ...)`."""
        if not self.rows:
            return np.zeros((0, len(self.organs)))
        return np.stack([getattr(row, name) for row in self.rows])

    def splits(self) -> list[str]:
        return list(self.num_rows)

    def label_counts(self) -> dict[str, dict[str, Counter]]:
        """finding -> split -> how many rows have the value 1, 0 and -1."""
        counts: dict[str, dict[str, Counter]] = {}
        for row in self.rows:
            for finding, value in row.labels.items():
                counts.setdefault(finding, {split: Counter() for split in self.num_rows})[row.place.split][value] += 1
        return counts


# (1)


def list_rows(folder: Path, splits: Sequence[str]) -> tuple[dict[str, list[RowPlace]], list[Damage]]:
    """Every row of the config `volumes`, split by split in the order of the shards, and the shards without a footer."""
    places: dict[str, list[RowPlace]] = {split: [] for split in splits}
    damaged = []
    for split in splits:
        for path in sorted((folder / "volumes").glob(f"{split}-*.parquet")):
            name = path.relative_to(folder).as_posix()
            try:
                with pq.ParquetFile(path) as file:
                    sizes = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
            except DAMAGE as error:
                damaged.append(Damage(RowPlace(split, -1, name, -1, -1), reason_of(error, folder)))
                continue
            for group, size in enumerate(sizes):
                places[split] += [RowPlace(split, len(places[split]) + row, name, group, row) for row in range(size)]
    return places, damaged


def spread(places: Sequence[RowPlace], limit: int | None) -> list[RowPlace]:
    """At most `limit` of the places, evenly spread from the first to the last; all of them without a limit."""
    if limit is None or limit >= len(places):
        return list(places)
    return [places[index] for index in np.unique(np.linspace(0, len(places) - 1, limit).round().astype(int))]


def wrong_shards(folder: Path, manifest: Mapping) -> list[str]:
    """Shards of the manifest that are not there, or not of the size they were written with."""
    wrong = []
    for entry in (entry for shard in manifest.get("shards", ()) for entry in ShardRecord(**shard).files()):
        path = folder / entry["file"]
        size = path.stat().st_size if path.is_file() else None
        if size is None:
            wrong.append(f"{entry['file']} is missing")
        elif size != entry["bytes"]:
            wrong.append(f"{entry['file']} has {size} bytes, written were {entry['bytes']}")
    return wrong


# (2)


def measure_row(row: Mapping, place: RowPlace, organs: Sequence[str]) -> RowMeasures:
    """Measure one row of the config `volumes`.

    Raises:
        One of DAMAGE: If something is missing, a blob is not what its shape says, or a label or a caption belongs to
            no organ of the set.
    """
    shape = tuple(int(size) for size in row["shape"])
    for name, dtype in (("volume", VOLUME_DTYPE), ("mask", MASK_DTYPE)):
        # Before anything is unpacked: a damaged frame may claim to hold more than there is memory.
        held = zstandard.get_frame_parameters(row[name]).content_size
        if len(shape) != 3 or min(shape) < 1 or held != int(np.prod(shape, dtype=object)) * dtype.itemsize:
            raise ValueError(f"the {name} holds {held} bytes, which is not what its shape {shape} needs")
    volume, mask = decode_volume(row)
    if mask.max() > len(organs):
        raise ValueError(f"the mask holds label {mask.max()}, but the organ set ends at {len(organs)}")
    spacing = tuple(float(edge) for edge in row["spacing"])
    if len(spacing) != 3 or not all(0 < edge < float("inf") for edge in spacing):
        raise ValueError(f"the spacing is {spacing}, not three positive mm")
    voxels, median_hu, centers, histogram = measure_organs(volume, mask, len(organs))
    is_mentioned, is_abnormal = np.zeros((2, len(organs)), dtype=bool)
    caption_words, caption_hashes = np.zeros(len(organs), dtype=np.int32), np.zeros(len(organs), dtype=np.int64)
    index_of = {organ: index for index, organ in enumerate(organs)}
    for caption in row["captions"]:
        if caption["organ"] not in index_of:
            raise ValueError(f"a caption belongs to {caption['organ']!r}, which is no organ of the set")
        index = index_of[caption["organ"]]
        is_mentioned[index], is_abnormal[index] = caption["is_mentioned"], caption["is_abnormal"]
        caption_words[index], caption_hashes[index] = len(caption["caption"].split()), text_hash(caption["caption"])
    report = f"{row['findings'] or ''}\0{row['impression'] or ''}"
    return RowMeasures(
        place=place,
        recon_id=str(row["recon_id"]),
        scan_id=str(row["scan_id"]),
        patient_id=str(row["patient_id"]),
        shape=shape,
        spacing=spacing,
        hu_range=(int(volume.min()), int(volume.max())),
        voxels=voxels,
        is_cut=(voxels > 0) & ~organ_is_complete(mask, len(organs)),
        median_hu=median_hu,
        center_mm=centers * np.array(spacing, dtype=np.float32),
        is_mentioned=is_mentioned,
        is_abnormal=is_abnormal,
        caption_words=caption_words,
        caption_hashes=caption_hashes,
        labels={label["finding"]: int(label["value"]) for label in row["labels"] or ()},
        volume_hash=bytes_hash(repr(shape).encode(), volume),
        report_hash=text_hash(report) if report.replace("\0", "").strip() else None,
        report_words=len(report.replace("\0", " ").split()),
        personal_kinds=personal_kinds(row),
        histogram=histogram,
    )


def personal_kinds(row: dict) -> tuple[str, ...]:
    texts = {row["findings"] or "", row["impression"] or "", *(caption["caption"] for caption in row["captions"])}
    return tuple(sorted({kind for text in texts for kind, _ in kinds_in_text(text)}))


def measure_organs(
    volume: np.ndarray, mask: np.ndarray, num_organs: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Count the voxels of each organ, where they lie and what HU they have, slab by slab.

    Args:
        volume: int16 HU `(depth, height, width)`.
        mask: uint8 labels on the same grid, `organ_index + 1`.

    Returns:
        Voxels int64 `(organs,)`; median HU float32 `(organs,)` (the lower one of an even number); mean voxel index
        float32 `(organs, 3)`, both NaN where the organ is absent; histogram int64 `(organs + 1, bins)`.
    """
    num_labels, num_values = num_organs + 1, HIGHEST_HU - LOWEST_HU + 1
    counts = np.zeros((num_labels, num_values), dtype=np.int64)
    sums = np.zeros((3, num_labels))
    slices = max(1, SLAB_VOXELS // (mask.shape[1] * mask.shape[2]))
    for start in range(0, len(mask), slices):
        labels, hu = mask[start : start + slices], volume[start : start + slices]
        codes = labels.astype(np.int32) * np.int32(num_values)
        codes += np.clip(hu.astype(np.int32), LOWEST_HU, HIGHEST_HU) - LOWEST_HU
        counts += np.bincount(codes.ravel(), minlength=counts.size).reshape(counts.shape)
        places = np.nonzero(labels)
        of_organs = labels[places]
        for axis, index in enumerate(places):
            sums[axis] += np.bincount(of_organs, weights=index, minlength=num_labels)
        sums[0] += start * np.bincount(of_organs, minlength=num_labels)
    voxels = counts.sum(axis=1)[1:]
    medians, centers = np.full(num_organs, np.nan, np.float32), np.full((num_organs, 3), np.nan, np.float32)
    for index in np.flatnonzero(voxels):
        medians[index] = LOWEST_HU + np.searchsorted(np.cumsum(counts[index + 1]), (voxels[index] + 1) // 2)
        centers[index] = sums[:, index + 1] / voxels[index]
    starts = HISTOGRAM_EDGES[:-1] - LOWEST_HU
    starts[0] = 0
    return voxels, medians, centers, np.add.reduceat(counts, starts, axis=1)


def text_hash(text: str) -> int:
    """A signed 64-bit number, equal for texts that differ in white space and case alone."""
    return bytes_hash(" ".join(text.lower().split()).encode())


def bytes_hash(*parts: bytes | np.ndarray) -> int:
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        digest.update(part)
    return int.from_bytes(digest.digest(), "little", signed=True)


def reason_of(error: BaseException, folder: Path) -> str:
    """What is wrong, on one line and without the folder of this machine."""
    text = " ".join(str(error).replace(f"{folder}/", "").split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


# (3)


def read_row(folder: Path, place: RowPlace) -> dict:
    """One row with its blobs."""
    with pq.ParquetFile(folder / place.file) as file:
        return file.read_row_group(place.group).slice(place.row, 1).to_pylist()[0]


def measure_group(folder: Path, places: Sequence[RowPlace], organs: Sequence[str]) -> list[RowMeasures | Damage]:
    """Measure the rows of one row group, one after the other."""
    try:
        with pq.ParquetFile(folder / places[0].file) as file:
            group = file.read_row_group(places[0].group)
    except DAMAGE as error:
        return [Damage(place, reason_of(error, folder)) for place in places]
    measured: list[RowMeasures | Damage] = []
    for place in places:
        recon_id = None
        try:
            row = group.slice(place.row, 1).to_pylist()[0]
            recon_id = row.get("recon_id")
            measured.append(measure_row(row, place, organs))
        except DAMAGE as error:
            measured.append(Damage(place, reason_of(error, folder), recon_id))
    return measured


def measure_rows(
    folder: Path, places: Sequence[RowPlace], organs: Sequence[str], workers: int
) -> Iterator[RowMeasures | Damage]:
    """Measure rows in their order, by `workers` processes."""
    groups = [list(group) for _, group in groupby(places, key=lambda place: (place.file, place.group))]
    if workers == 1 or len(groups) < 2:
        for group in groups:
            yield from measure_group(folder, group, organs)
        return
    # As in build.py: not "fork", and an executor that raises when the system kills one of its processes.
    methods = multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
    if context.get_start_method() == "forkserver":
        context.set_forkserver_preload([__name__])
    with ProcessPoolExecutor(workers, context) as pool:
        pending: deque[Future] = deque()
        try:
            for group in groups:
                pending.append(pool.submit(measure_group, folder, group, organs))
                if len(pending) > 4 * workers:
                    yield from pending.popleft().result()
            while pending:
                yield from pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()


def examine(
    folder: Path,
    manifest: dict,
    limit: int | None = None,
    workers: int = 1,
    split: str | None = None,
    advance: Callable[[int, int], None] = lambda done, total: None,
) -> Examination:
    """Read a processed split row by row.

    Args:
        folder: Where manifest.json and volumes/ lie.
        manifest: Content of manifest.json.
        limit: Most rows to look at, evenly spread over all splits (None: every row).
        workers: Processes; each holds one volume.
        split: The only split to look at (None: all that are there).
        advance: Called after each row with the rows done and the rows to do.
    """
    organs = tuple(manifest["settings"]["organ_set"]["organs"])
    splits = [name for name in manifest.get("splits", SPLITS) if split in (None, name)]
    places, damaged = list_rows(folder, splits)
    chosen = spread([place for name in splits for place in places[name]], limit)
    exam = Examination(
        manifest=manifest,
        organs=organs,
        num_rows={name: len(places[name]) for name in splits},
        rows=[],
        damaged=damaged,
        wrong_shards=wrong_shards(folder, manifest),
        histogram=np.zeros((len(organs) + 1, len(HISTOGRAM_EDGES) - 1), dtype=np.int64),
    )
    for done, item in enumerate(measure_rows(folder, chosen, organs, workers), start=1):
        if isinstance(item, Damage):
            exam.damaged.append(item)
        else:
            exam.histogram += item.histogram
            item.histogram = None  # (organs + 1) x bins of each of 50,000 rows would be gigabytes
            exam.rows.append(item)
        advance(done, len(chosen))
    return exam
