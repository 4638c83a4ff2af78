"""The columns of a processed split, and Parquet shards that a killed build can continue.

A shard is written under a temporary name and renamed when complete; beside it, while the build lasts, lies a record of
what went in and what was left out. Which case goes to which shard is fixed before the first volume is opened, and no
time or path is written, so a build that was killed and continued ends in the same bytes as one that was not.

Files reach the disk before the name under which they count as complete: after a power cut there is a whole shard or
none, as after a kill.
"""

import contextlib
import hashlib
import json
import os
import uuid
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from .cases import Case, has_changed_since

PROGRESS_FOLDER = ".building"  # records of finished shards; gone when the manifest is written
CONFIGS = ("volumes", "organ_crops")  # each is a folder of Parquet shards

# Why a case was skipped whose file was taken away during the build. A build that is run again tries it again, as it
# does a case one of whose files has been replaced: every other reason would come back the same.
VANISHED = "was there when the build began, and is gone"

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
    """What became of one case: a row with what to count of it, or the reason why there is none.

    Attributes:
        row: A row of config `volumes`.
        organ_crops: Its rows of config `organ_crops`, where that is written.
        warnings: What looks odd about the case, which is written nevertheless.
        is_vanished: Whether it is skipped because a file was taken away since the build began.
        machine: Name of the machine on which that was seen.
        stop_reason: Why nothing can be built at present: the source does not answer, or a disk is full.
    """

    recon_id: str
    row: dict | None = None
    organs_present: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    skip_reason: str | None = None
    organ_crops: list[dict] = field(default_factory=list)
    is_vanished: bool = False
    machine: str = ""
    stop_reason: str | None = None


@dataclass(frozen=True)
class Shard:
    """A place in the split: file name relative to the split's folder, and the cases that belong there.

    `file` is that of config `volumes`, and names the shard whatever configs are written.
    """

    split: str
    file: str
    cases: tuple[Case, ...]

    @property
    def digests(self) -> dict[str, str]:
        """recon_id -> digest of its cases."""
        return {case.recon_id: case.digest for case in self.cases}


@dataclass
class ShardRecord:
    """What lies in a finished shard. Where `sha256` is None there is no file: all cases were skipped, or config
    `volumes` is not written.

    Attributes:
        split, file: As of the shard.
        rows: Cases that were written.
        bytes, sha256: Of the file of config `volumes`.
        organ_crops: `file`, `rows`, `bytes` and `sha256` of config `organ_crops`, where that is written.
        cases: recon_id -> digest of every case, also of those that were skipped; None in splits from before there was
            such a thing.
        skipped, warnings: Entries of the manifest.
        counts: organ -> in how many cases it is present, mentioned, abnormal.
    """

    split: str
    file: str
    rows: int = 0
    bytes: int = 0
    sha256: str | None = None
    skipped: list[dict] = field(default_factory=list)
    warnings: list[dict] = field(default_factory=list)
    counts: dict[str, dict[str, int]] = field(default_factory=dict)
    organ_crops: dict | None = None
    cases: dict[str, str] | None = None

    def as_json(self) -> dict:
        """The record as it stands in the manifest."""
        later = ("organ_crops", "cases")
        return {name: value for name, value in vars(self).items() if name not in later or value is not None}

    def files(self) -> list[dict]:
        """`file`, `bytes` and `sha256` of every file of the shard."""
        volumes = [{"file": self.file, "bytes": self.bytes, "sha256": self.sha256}] if self.sha256 else []
        return [*volumes, *([self.organ_crops] if self.organ_crops else [])]

    def is_whole(self, folder: Path) -> bool:
        """Whether all its files lie in `folder`, at their size."""
        return all(_size(folder / entry["file"]) == entry["bytes"] for entry in self.files())

    def renamed(self, file: str) -> "ShardRecord":
        """The record of the same shard under another name."""
        crops = self.organ_crops and {**self.organ_crops, "file": file_of(file, "organ_crops")}
        return replace(self, file=file, organ_crops=crops)

    def is_of(self, shard: Shard) -> bool:
        """Whether it tells of the same cases in the same state; one from before there were digests is believed."""
        return self.cases is None or self.cases == shard.digests

    def is_to_be_tried_again(self, shard: Shard, written: float) -> bool:
        """Whether a case that was skipped may do now: its file had vanished, or was replaced after `written`."""
        skipped = {entry["case"]: entry["reason"] for entry in self.skipped}
        return any(
            VANISHED in skipped[case.recon_id] or has_changed_since(case, written)
            for case in shard.cases
            if case.recon_id in skipped
        )


def libraries() -> dict[str, str]:
    """What writes the bytes of a shard, with versions: another version may write the same values in other bytes."""
    import zstandard

    library = ".".join(map(str, zstandard.ZSTD_VERSION))
    return {"pyarrow": pa.__version__, "zstandard": zstandard.__version__, "libzstd": library}


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


def schema_of(config: str) -> pa.Schema:
    """Columns of a config."""
    if config == "volumes":
        return SCHEMA
    from .organ_crops import ORGAN_CROPS_SCHEMA

    return ORGAN_CROPS_SCHEMA


def file_of(shard_file: str, config: str) -> str:
    """The file of a config for the shard that `shard_file` names."""
    return f"{config}/{Path(shard_file).name}"


def write_shard(
    folder: Path, shard: Shard, built: Iterable[BuiltRow], configs: Sequence[str] = ("volumes",)
) -> ShardRecord:
    """Write one shard of each config and its record. A shard of skipped cases alone gets a record, no file."""
    record = ShardRecord(shard.split, shard.file, cases=shard.digests)
    counts: dict[str, Counter] = {}
    files = {config: RowFile(folder / file_of(shard.file, config), schema_of(config)) for config in configs}
    try:
        for item in built:
            if item.skip_reason is not None:
                record.skipped.append({"split": shard.split, "case": item.recon_id, "reason": item.skip_reason})
                continue
            for warning in item.warnings:
                record.warnings.append({"split": shard.split, "case": item.recon_id, "warning": warning})
            for config, file in files.items():
                for row in [item.row] if config == "volumes" else item.organ_crops:
                    file.write(row)
            record.rows += 1
            for caption in item.row["captions"]:
                count = counts.setdefault(caption["organ"], Counter(present=0, mentioned=0, abnormal=0))
                count["present"] += caption["organ"] in item.organs_present
                count["mentioned"] += caption["is_mentioned"]
                count["abnormal"] += caption["is_abnormal"]
        written = {config: file.finish() for config, file in files.items()}
    except BaseException:
        for file in files.values():
            file.abandon()
        raise
    record.counts = {organ: dict(count) for organ, count in counts.items()}
    if written.get("volumes"):
        record.bytes, record.sha256 = written["volumes"]["bytes"], written["volumes"]["sha256"]
    if written.get("organ_crops"):
        record.organ_crops = {"file": file_of(shard.file, "organ_crops"), **written["organ_crops"]}
    write_record(folder, record)
    return record


class RowFile:
    """A Parquet file that appears under its name when it is complete, one row per row group, and not without a row."""

    def __init__(self, target: Path, schema: pa.Schema) -> None:
        self.target, self.schema, self.rows = target, schema, 0
        # A name of its own: a task that was started twice must not take the other's half file for its whole one.
        self.unfinished = target.with_name(f"{target.name}.{uuid.uuid4().hex[:8]}.tmp")
        self.writer: pq.ParquetWriter | None = None

    def write(self, row: dict) -> None:
        if self.writer is None:
            self.target.parent.mkdir(parents=True, exist_ok=True)
            # The blobs are compressed already. Statistics of a blob would copy it into the file's footer. One row
            # per row group: a reader that streams holds one volume, not a shard of them.
            self.writer = pq.ParquetWriter(
                self.unfinished, self.schema, compression="none", use_dictionary=False, write_statistics=False
            )
        self.writer.write_table(pa.Table.from_pylist([row], schema=self.schema))
        self.rows += 1

    def finish(self) -> dict | None:
        """Put the file in its place; its rows, bytes and sha256, or None where there was no row."""
        if self.writer is None:
            # From a build that was killed before its record was written, and whose cases have vanished since.
            self.target.unlink(missing_ok=True)
            return None
        self.writer.close()
        digest = sha256_of(self.unfinished)
        size = self.unfinished.stat().st_size
        replace_durably(self.unfinished, self.target)
        return {"rows": self.rows, "bytes": size, "sha256": digest}

    def abandon(self) -> None:
        """Leave no unfinished file behind; a disk that is full cannot take the footer either."""
        with contextlib.suppress(OSError, pa.ArrowException):
            if self.writer is not None:
                self.writer.close()
        with contextlib.suppress(OSError):
            self.unfinished.unlink(missing_ok=True)


def write_record(folder: Path, record: ShardRecord) -> None:
    """Note that a shard is finished. After the shard itself: a shard without its record is built again."""
    write_json(record_path(folder, record.file), record.as_json())


def known_records(folder: Path) -> dict[str, tuple[ShardRecord, float]]:
    """Every record of a folder by its shard's file, and when it was written, in seconds since 1970.

    Those of a finished split stand in its manifest; what was noted since goes before them.
    """
    known = {}
    for path in (folder / "manifest.json", *sorted((folder / PROGRESS_FOLDER).glob("*-of-*.json"))):
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):  # of no build, or removed by another process
            written = path.stat().st_mtime
            content = json.loads(path.read_text(encoding="utf-8"))
            for entry in content.get("shards", [content]):
                known[entry["file"]] = (ShardRecord(**entry), written)
    return known


def complete_records(folder: Path, shards: Sequence[Shard], again: bool = True) -> dict[str, ShardRecord]:
    """The records of those shards that are complete in a folder, by their file; the others have to be built (again).

    Args:
        folder: Folder of the split.
        shards: The shards.
        again: Whether a shard counts as incomplete one of whose skipped cases may do now.
    """
    known, complete = known_records(folder), {}
    for shard in shards:
        record, written = known.get(shard.file, (None, 0.0))
        if record is None or not record.is_of(shard) or not record.is_whole(folder):
            continue
        if not (again and record.is_to_be_tried_again(shard, written)):
            record.cases = shard.digests  # not known to one from before there were digests
            complete[shard.file] = record
    return complete


def write_json(path: Path, content: dict) -> None:
    """Write JSON under a temporary name, then rename: nobody ever reads half of it."""
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # A name of its own: the machines of an array job write the same file, with the same content, at the same time.
    unfinished = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        unfinished.write_text(text, encoding="utf-8", newline="\n")
        replace_durably(unfinished, path)
    except BaseException:
        with contextlib.suppress(OSError):
            unfinished.unlink(missing_ok=True)
        raise


def replace_durably(unfinished: Path, target: Path) -> None:
    """Rename a complete file into its place, once its bytes are on the disk; then put the name there, too."""
    with unfinished.open("rb+") as file:
        os.fsync(file.fileno())
    os.replace(unfinished, target)
    if os.name == "posix":  # elsewhere a folder cannot be opened
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def sha256_of(path: Path) -> str:
    """Checksum of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None


def record_path(folder: Path, file: str) -> Path:
    """Where the record of a shard lies."""
    return folder / PROGRESS_FOLDER / f"{Path(file).stem}.json"
