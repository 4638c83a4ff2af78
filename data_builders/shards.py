"""The columns of a processed split, and Parquet shards that a killed build can continue.

A shard is written under a temporary name and renamed when complete; beside it, while the build lasts, lies a record of
what went in and what was left out. Which case goes to which shard is fixed before the first volume is opened, and no
time or path is written, so a build that was killed and continued ends in the same bytes as one that was not.
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from .cases import Case

PROGRESS_FOLDER = ".building"  # records of finished shards; gone when the manifest is written

# Config `volumes`: a row is one reconstruction.
SCHEMA = pa.schema(
    [
        ("patient_id", pa.string()),
        ("scan_id", pa.string()),
        ("recon_id", pa.string()),
        ("volume", pa.binary()),  # zstd over int16 HU
        ("mask", pa.binary()),  # zstd over uint8 labels, organ_index + 1
        ("shape", pa.list_(pa.int32(), 3)),
        ("spacing", pa.list_(pa.float32(), 3)),
        (
            "captions",
            pa.list_(
                pa.struct(
                    [
                        ("organ", pa.string()),
                        ("caption", pa.string()),
                        ("is_abnormal", pa.bool_()),
                        ("is_mentioned", pa.bool_()),
                    ]
                )
            ),
        ),
        ("findings", pa.string()),
        ("impression", pa.string()),
        ("labels", pa.list_(pa.struct([("finding", pa.string()), ("value", pa.int8())]))),
    ]
)


@dataclass
class BuiltRow:
    """What became of one case: a row with what to count of it, or the reason why there is none."""

    recon_id: str
    row: dict | None = None
    organs_present: tuple[str, ...] = ()
    warning: str | None = None
    skip_reason: str | None = None


@dataclass(frozen=True)
class Shard:
    """A place in the split: file name relative to the split's folder, and the cases that belong there."""

    split: str
    file: str
    cases: tuple[Case, ...]


@dataclass
class ShardRecord:
    """What lies in a finished shard. `file` is None where every case was skipped: then no file is written."""

    split: str
    file: str
    rows: int = 0
    bytes: int = 0
    sha256: str | None = None
    skipped: list[dict] = field(default_factory=list)
    warnings: list[dict] = field(default_factory=list)
    counts: dict[str, dict[str, int]] = field(default_factory=dict)  # organ -> present, mentioned, abnormal


def plan_shards(cases: Sequence[Case], rows_per_shard: int) -> list[Shard]:
    """Cut the sorted, buildable cases of each split into shards of `rows_per_shard`.

    A case that turns out broken later leaves its shard shorter: moving others up would make a continued build depend
    on where it was killed.
    """
    shards = []
    for split in dict.fromkeys(case.split for case in cases):
        members = [case for case in cases if case.split == split and case.skip_reason is None]
        pieces = [members[start : start + rows_per_shard] for start in range(0, len(members), rows_per_shard)]
        shards += [
            Shard(split, f"volumes/{split}-{index:05d}-of-{len(pieces):05d}.parquet", tuple(piece))
            for index, piece in enumerate(pieces)
        ]
    return shards


def write_shard(folder: Path, shard: Shard, built: Iterable[BuiltRow]) -> ShardRecord:
    """Write one shard, one row per row group, and its record. A shard of skipped cases alone gets a record, no file."""
    record = ShardRecord(shard.split, shard.file)
    target = folder / shard.file
    temporary = target.with_name(target.name + ".tmp")
    counts: dict[str, Counter] = {}
    writer = None
    try:
        for item in built:
            if item.skip_reason is not None:
                record.skipped.append({"split": shard.split, "case": item.recon_id, "reason": item.skip_reason})
                continue
            if item.warning:
                record.warnings.append({"split": shard.split, "case": item.recon_id, "warning": item.warning})
            if writer is None:
                # The blobs are compressed already. Statistics of a blob would copy it into the file's footer. One row
                # per row group: a reader that streams holds one volume, not a shard of them.
                writer = pq.ParquetWriter(
                    temporary, SCHEMA, compression="none", use_dictionary=False, write_statistics=False
                )
            writer.write_table(pa.Table.from_pylist([item.row], schema=SCHEMA))
            record.rows += 1
            for caption in item.row["captions"]:
                count = counts.setdefault(caption["organ"], Counter(present=0, mentioned=0, abnormal=0))
                count["present"] += caption["organ"] in item.organs_present
                count["mentioned"] += caption["is_mentioned"]
                count["abnormal"] += caption["is_abnormal"]
    finally:
        if writer is not None:
            writer.close()
    record.counts = {organ: dict(count) for organ, count in counts.items()}
    if record.rows:
        record.bytes = temporary.stat().st_size
        with temporary.open("rb") as file:
            record.sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        os.replace(temporary, target)
    write_record(folder, record)
    return record


def write_record(folder: Path, record: ShardRecord) -> None:
    """Note that a shard is finished. After the shard itself: a shard without its record is built again."""
    write_json(_record_path(folder, record.file), vars(record))


def read_record(folder: Path, shard: Shard) -> ShardRecord | None:
    """The record of a shard that is complete on disk, or None where it has to be built (again)."""
    path = _record_path(folder, shard.file)
    if not path.is_file():
        return None
    record = ShardRecord(**json.loads(path.read_text(encoding="utf-8")))
    written = folder / record.file
    is_whole = record.rows == 0 or (written.is_file() and written.stat().st_size == record.bytes)
    return record if is_whole else None


def write_json(path: Path, content: dict) -> None:
    """Write JSON under a temporary name, then rename: nobody ever reads half of it."""
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8", newline="\n")
    os.replace(temporary, path)


def _record_path(folder: Path, file: str) -> Path:
    return folder / PROGRESS_FOLDER / f"{Path(file).stem}.json"
