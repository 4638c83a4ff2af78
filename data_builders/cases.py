"""What a builder finds in its source: one `Case` per reconstruction, before any volume is opened.

Also the small readers every builder needs: CSV files whose missing columns are named, and file names out of a table
that may not leave the folder they belong to.
"""

from __future__ import annotations

import contextlib
import csv
import difflib
import hashlib
import hmac
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING

from modeling_fvlm.processed_split import natural_key

if TYPE_CHECKING:
    from .sources import RemoteFile

SPLITS = ("train", "validation")


@dataclass(frozen=True)
class OrganText:
    """What a report says of one organ: its sentences in their order, and whether one of them is a finding."""

    impression: tuple[str, ...]
    findings: tuple[str, ...]
    is_abnormal: bool


@dataclass(frozen=True)
class Case:
    """One reconstruction: where its files are and what is said of it.

    `organ_texts` is given where the source brings the captions by organ; otherwise the report is decomposed. A case
    that cannot be built, as is known before its volume is opened, carries the reason in `skip_reason`; if it is left
    out on purpose, by the release or by choice, `is_excluded` says that nothing is wrong with it.

    Attributes:
        volume: A file, or the folder or archive of a DICOM series.
        mask: A file of labels, or (numbering "structures") a folder with one file per structure.
        affine: 4 x 4, stored indices to mm in RAS+, for a volume whose header is blank. A mask keeps its own header,
            and takes this affine where that is blank, too.
        rescale: (slope, intercept) that the source declares for the volume's stored values; None: the file's own.
        series_uid: Which series of a DICOM place that holds several.
        duplicate_of: recon_id of the case whose report has the same words.
        digest: Of all that goes into its row, from `with_digests`.
    """

    split: str
    patient_id: str
    scan_id: str
    recon_id: str
    volume: Path | RemoteFile | None = None
    mask: Path | RemoteFile | None = None
    numbering: str = "totalsegmentator_v2"
    findings: str = ""
    impression: str = ""
    organ_texts: dict[str, OrganText] | None = None
    labels: tuple[tuple[str, int], ...] = ()
    skip_reason: str | None = None
    is_excluded: bool = False
    affine: tuple[tuple[float, ...], ...] | None = None
    rescale: tuple[float, float] | None = None
    series_uid: str | None = None
    duplicate_of: str | None = None
    digest: str | None = None


class Row(dict):
    """One row of a table, cell by column, and where it stands: the line of the file on which it ends."""

    def __init__(self, cells: dict[str, str], line: int) -> None:
        super().__init__(cells)
        self.line = line


def sort_cases(cases: Iterable[Case]) -> list[Case]:
    """Cases in the one order that fixes which shard each goes to.

    Raises:
        ValueError: If a recon_id comes twice, a patient stands in two splits, or a scan belongs to two patients.
    """
    ordered = sorted(cases, key=lambda case: (SPLITS.index(case.split), natural_key(case.recon_id)))
    seen: set[str] = set()
    split_of: dict[str, str] = {}
    patient_of: dict[str, str] = {}
    for case in ordered:
        if case.recon_id in seen:
            raise ValueError(f"the id {case.recon_id!r} comes twice; every reconstruction needs its own id.")
        seen.add(case.recon_id)
        if split_of.setdefault(case.patient_id, case.split) != case.split:
            raise ValueError(
                f"patient {case.patient_id!r} stands in {split_of[case.patient_id]!r} and in {case.split!r}; "
                "splits are by patient: move all of a patient's scans to one split."
            )
        if patient_of.setdefault(case.scan_id, case.patient_id) != case.patient_id:
            raise ValueError(
                f"scan {case.scan_id!r} stands under the patients {patient_of[case.scan_id]!r} and "
                f"{case.patient_id!r}; a scan is one visit of one patient: mend patient_id or scan_id (without a "
                "column patient_id every id is its own patient)."
            )
    return ordered


def source_fingerprint(cases: Sequence[Case]) -> str:
    """One hash over what will be read: ids, texts, labels, name and size of each file (no folder of this machine)."""
    return with_digests(cases)[1]


def with_digests(cases: Sequence[Case], salt: str = "") -> tuple[list[Case], str]:
    """The cases with their digests, and one hash over the whole source: the files are looked at once for both.

    A shard is kept while the digests of its cases stay the same. All of them stand in the manifest: with hashed ids the
    salt goes in, or ids and names of files could be tried out until one fits, and who holds the source could tell that
    it is this one. Without a salt the hash of the source is plain, and the same for everybody who has that source.
    """
    key = salt.encode()
    whole, marked = hmac.new(key, digestmod=hashlib.sha256) if salt else hashlib.sha256(), []
    for case in cases:
        row = content_of(case)
        digest = hmac.new(key, json_line(row), hashlib.sha256).hexdigest()[:16]
        marked.append(replace(case, digest=digest))
        # Not in the digest of a case: it hangs on other cases, and its row is the same.
        duplicate = [] if case.duplicate_of is None else [{"duplicate_of": case.duplicate_of}]
        whole.update(json_line([*row, *duplicate]))
    return marked, whole.hexdigest()


def content_of(case: Case) -> list:
    """What decides the row of a case."""
    files = [entry for file in (case.volume, case.mask) if file is not None for entry in names_and_sizes(file)]
    texts = {
        organ: [text.impression, text.findings, text.is_abnormal] for organ, text in (case.organ_texts or {}).items()
    }
    row = [case.split, case.patient_id, case.scan_id, case.recon_id, files, case.numbering, case.findings]
    row += [case.impression, texts, case.labels, case.skip_reason]
    # Only what is given: the hash of a source that has none of it stays what it was before these fields came.
    given = {name: getattr(case, name) for name in ("affine", "rescale", "series_uid")}
    return row + [{name: value} for name, value in given.items() if value is not None]


def json_line(row: list) -> bytes:
    return json.dumps(row, sort_keys=True).encode() + b"\n"


def names_and_sizes(file: Path | RemoteFile) -> list[list]:
    """Name and size of a file, of every file in a folder, or of a remote file with its version where that is known."""
    if not isinstance(file, Path):
        return [[file.name, file.size, *([file.etag] if file.etag is not None else [])]]
    if file.is_file():
        return [[file.name, file.stat().st_size]]
    return sorted(
        [(Path(folder) / name).relative_to(file.parent).as_posix(), (Path(folder) / name).stat().st_size]
        for folder, _, names in os.walk(file)
        for name in names
    )


def has_changed_since(case: Case, moment: float) -> bool:
    """Whether a local file of a case has come or been replaced since a moment, in seconds since 1970.

    The clock of a file system ticks in milliseconds: what happened at the moment itself counts as after it. The entry
    in its folder counts, too: what was moved or unpacked into its place brings an old time along.
    """
    places = [file for file in (case.volume, case.mask) if isinstance(file, Path)]
    places += [Path(folder, name) for place in places for folder, *inside in os.walk(place) for name in chain(*inside)]
    for path in places:
        with contextlib.suppress(OSError):  # gone, or a link to nowhere
            for status in (path.lstat(), path.stat()):
                if max(status.st_mtime, status.st_ctime) >= moment:
                    return True
    return False


def counted(count: int, what: str, plural: str | None = None) -> str:
    """`1 patient`, `2 patients`; with a plural of its own `1 case is`, `2 cases are`."""
    return f"{count:,} {what if count == 1 else plural or what + 's'}"


def nearest(name: str, known: Iterable[str]) -> str:
    """`; nearest: 'x'` for an error message, or nothing where no known name comes near."""
    by_lower = {other.lower(): other for other in known}
    close = difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=0.5)
    return f"; nearest: {by_lower[close[0]]!r}" if close else ""


def check_columns(path: Path, columns: Sequence[str], required: Iterable[str]) -> None:
    """Raise a ValueError that names the first missing column, those present, and the nearest of them."""
    for name in required:
        if name not in columns:
            raise ValueError(f"{path.name} has no column {name!r}; it has {list(columns)}{nearest(name, columns)}.")


def read_csv(path: Path, required: Sequence[str] = ()) -> tuple[list[str], list[Row]]:
    """Columns and rows of a CSV file; cells are stripped strings.

    Raises:
        ValueError: If the file is missing, empty, not UTF-8, lacks a required column, or has a row with too many cells.
    """
    if not path.is_file():
        raise ValueError(f"there is no file {path}.")
    csv.field_size_limit(2**27)  # a report may be longer than the 131,072 characters csv allows
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            columns = [name.strip() for name in reader.fieldnames or ()]
            if not columns:
                raise ValueError(f"{path.name} is empty; its first line should name the columns.")
            check_columns(path, columns, required)
            return columns, read_cells(reader, path, columns)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path.name} is not UTF-8 ({error}); save it as UTF-8.") from None


def read_cells(reader: csv.DictReader, path: Path, columns: Sequence[str], separators: str = "commas") -> list[Row]:
    """The rows behind the first line, under `columns`; a row with too many cells is a ValueError."""
    reader.fieldnames = columns
    rows = []
    for row in reader:
        if None in row:
            raise ValueError(
                f"{path.name}, line {reader.line_num}: {len(columns) + len(row[None])} cells under {len(columns)} "
                f'columns; put texts that hold {separators} into "quotes".'
            )
        rows.append(Row({name: (cell or "").strip() for name, cell in row.items()}, reader.line_num))
    return rows


def resolve_inside(root: Path, name: str) -> Path:
    """`root / name` for a file name that came out of a table.

    The check is on the name alone and follows no link: folders cached from the Hub are links to a store beside them.

    Raises:
        ValueError: If the name is absolute or steps out of `root` with `..`.
    """
    posix, windows = PurePosixPath(name), PureWindowsPath(name)
    if not name or posix.is_absolute() or windows.drive or windows.root or ".." in windows.parts:
        raise ValueError(f"the file name {name!r} must be relative and stay inside its folder; '..' is not allowed.")
    return root / name


def read_label(cell: str, place: str) -> int:
    """A label cell as 1, 0 or -1 (unknown, also for an empty cell).

    Raises:
        ValueError: For any other value, naming `place`.
    """
    try:
        value = float(cell) if cell else -1.0
    except ValueError:
        value = float("nan")
    if value not in (1.0, 0.0, -1.0):
        raise ValueError(f"{place}: label {cell!r} is none of 1, 0, -1 (unknown) or empty.")
    return int(value)
