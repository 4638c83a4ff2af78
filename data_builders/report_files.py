"""Reports as people have them: a CSV, JSON, JSON lines, or a folder of text files, read one report at a time.

    for report in open_reports(Path("reports.csv"), ["findings=Befund"]):
        report.id, report.findings, report.impression

A CSV may be separated by commas, semicolons or tabs. What cannot be read is a ValueError that names file and line.
"""

import argparse
import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from .cases import nearest
from .decomposition import SECTIONS
from .folder_reports import (
    SEPARATORS,
    check_is_no_workbook,
    check_named_once,
    json_entries,
    not_utf_8,
    renamings,
    separator_of,
)

# Ours -> how releases call it.
NAMES = {
    "id": ("id", "VolumeName", "scan_id", "report_id", "study id", "AccessionNo"),
    "findings": ("findings", "Findings_EN", "Findings", "report", "report_text", "text"),
    "impression": ("impression", "Impressions_EN", "Impression", "Conclusion", "conclusion"),
}
NOT_GIVEN = ("not given.", "not given", "none given.", "nan", "none", "null", "n/a", "-")
BEGINNING = 1 << 16
LINES_LOOKED_AT = 100  # of JSON lines, for the names of their keys
# UTF-16, gzip, bzip2, zstd, xz, Parquet, PDF.
NO_UTF_8 = (b"\xff\xfe", b"\xfe\xff", b"\x1f\x8b", b"BZh", b"\x28\xb5\x2f\xfd", b"\xfd7zXZ", b"PAR1", b"%PDF")
JSON_FORM = '{"id", "findings", "impression"}'

Entry = Mapping[str, object]


class TextReport(NamedTuple):
    """A report as it was read; one without an id is named by its place in the file."""

    id: str
    findings: str
    impression: str
    has_id: bool = True


@dataclass(frozen=True)
class Reports:
    """Reports of a file or folder, read anew by each walk over them; all at once are in memory of a JSON alone.

    Attributes:
        columns: Our name -> its column, or "" where there is none.
    """

    path: Path
    columns: Mapping[str, str]

    def __iter__(self) -> Iterator[TextReport]:
        seen: set[str] = set()
        for place, row in rows_of(self.path):
            # A column of no name, as pandas writes for its index, is none that was chosen.
            said, *texts = (row.get(self.columns[key]) if self.columns[key] else None for key in NAMES)
            name = "" if said is None else str(said).strip()
            texts = [as_text(text, f"{self.path.name}, {name or place}", key) for text, key in zip(texts, SECTIONS)]
            if (name or place) in seen:
                raise ValueError(f"{self.path.name}, {place}: the id {name!r} comes twice; a report needs its own.")
            seen.add(name or place)
            yield TextReport(name or place, *texts, has_id=bool(name))


def rows_of(path: Path) -> Iterator[tuple[str, Entry]]:
    """Rows, each with the words for its place."""
    if path.is_dir():
        return rows_of_texts(path)
    rows = {".json": rows_of_json, ".jsonl": rows_of_lines}.get(path.suffix.lower(), rows_of_csv)
    return in_utf_8(path, rows(path))


def in_utf_8(path: Path, rows: Iterator[tuple[str, Entry]]) -> Iterator[tuple[str, Entry]]:
    """The same rows; bytes that are no UTF-8 are an error that names their line."""
    try:
        yield from rows
    except UnicodeDecodeError:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                try:
                    line.decode("utf-8")
                except UnicodeDecodeError as error:
                    raise not_utf_8(path, number, line[error.start]) from None
        raise


def rows_of_texts(folder: Path) -> Iterator[tuple[str, Entry]]:
    """The text files of a folder, each a whole report under its name."""
    for file in text_files(folder):
        try:
            text = file.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError(f"{file.name} is not UTF-8 ({error}); save it as UTF-8.") from None
        if "\0" in text[:8]:
            raise ValueError(f"{file.name} is no text in UTF-8 but in UTF-16, it seems; save it as UTF-8.")
        yield file.name, {"id": file.stem, "findings": text}


def text_files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.iterdir() if file.suffix.lower() == ".txt" and file.is_file())


def rows_of_json(path: Path) -> Iterator[tuple[str, Entry]]:
    """Entries of a list, or of {id: entry}."""
    for number, entry in enumerate(json_entries(path)):
        if not isinstance(entry, dict):
            raise ValueError(
                f"{path.name}: entry {number} is not of the form {JSON_FORM}; the file holds a list of such, or {{id: "
                "such}."
            )
        yield f"entry {number}", entry


def rows_of_lines(path: Path) -> Iterator[tuple[str, Entry]]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                entry = json.loads(line)
            except (ValueError, RecursionError):
                entry = None
            if not isinstance(entry, dict):
                raise ValueError(f"{path.name}, line {number} is not of the form {JSON_FORM}.")
            yield f"line {number}", entry


def rows_of_csv(path: Path) -> Iterator[tuple[str, Entry]]:
    """Rows of a CSV, but for empty ones."""
    csv.field_size_limit(2**27)  # a report may be longer than the 131,072 characters csv allows
    quotes = 0  # since the row before

    def lines(file) -> Iterator[str]:
        nonlocal quotes
        for line in file:
            quotes += line.count('"')
            yield line.replace("\0", " ")

    with path.open(newline="", encoding="utf-8-sig") as file:
        separator = separator_of(file.read(BEGINNING))
        file.seek(0)
        reader = csv.DictReader(lines(file), delimiter=separator)
        try:
            reader.fieldnames = [name.strip() for name in reader.fieldnames or ()]
            is_open, last, quotes = False, reader.line_num, 0
            for row in reader:
                if any(map(str.strip, row.get(None, ()))):
                    raise ValueError(
                        f"{path.name}, line {reader.line_num}: {len(row) - 1 + len(row[None])} cells under "
                        f'{len(row) - 1} columns; put texts that hold {SEPARATORS[separator]} into "quotes".'
                    )
                is_open = quotes % 2 == 1 and reader.line_num > last + 1
                begin, last, quotes = last + 1, reader.line_num, 0
                if any(row.values()):  # spreadsheet programs leave empty lines behind
                    yield f"line {reader.line_num}", row
            if is_open:
                raise ValueError(
                    f"{path.name}: a quotation mark opens in line {begin} and never closes, so that all behind it is "
                    'one text. Where one stands in a text, write two ("").'
                )
        except csv.Error as error:
            raise ValueError(f"{path.name}, line {reader.line_num + 1}: {error}.") from None


def as_text(value: object, place: str, key: str) -> str:
    """A cell as text; the words for an empty one are none."""
    if value is None:
        return ""
    if not isinstance(value, str):
        raise ValueError(f"{place}: {key!r} is no text, but a {type(value).__name__}.")
    # Half a character, as "\\ud800" in JSON may leave, can be written into no file.
    value = value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return "" if value.strip().lower() in NOT_GIVEN else value


def add_columns_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--columns",
        action="append",
        default=[],
        metavar="OURS=YOURS",
        help="Name of a column where it is another: --columns findings=Befund. May be given several times.",
    )


def open_reports(path: Path, columns: Sequence[str] = ()) -> Reports:
    """The reports of a file or folder, under our names.

    Args:
        columns: OURS=YOURS of `--columns`.

    Raises:
        ValueError: If there is no such file, it is no text, or a column is missing.
    """
    if path.is_dir():
        if not text_files(path):
            raise ValueError(f"--reports: the folder {path} holds no .txt. Give a CSV or JSON of reports by its name.")
        return Reports(path, {"id": "id", "findings": "findings", "impression": ""})
    if not path.is_file():
        raise ValueError(f"--reports: there is no file {path}.")
    with path.open("rb") as file:
        beginning = file.read(8)
    check_is_no_workbook(path, beginning)
    if beginning.startswith(NO_UTF_8) or b"\0" in beginning:
        raise ValueError(
            f"{path.name} is no text in UTF-8, it begins with {beginning!r}. Unpack it, or save it as UTF-8 (in a "
            "spreadsheet program: 'CSV UTF-8')."
        )
    renamed = dict(renamings(columns, NAMES))
    return Reports(path, choose_columns(path, columns_of(path), renamed))


def columns_of(path: Path) -> list[str]:
    """Names of the columns of a CSV, or of the keys of entries."""
    ending = path.suffix.lower()
    if ending in (".json", ".jsonl"):
        rows = rows_of(path) if ending == ".json" else islice(rows_of(path), LINES_LOOKED_AT)
        return list(dict.fromkeys(name for _, row in rows for name in row))
    with path.open(newline="", encoding="utf-8-sig", errors="replace") as file:
        text = file.read(BEGINNING)
    first = next(csv.reader(io.StringIO(text, newline=""), delimiter=separator_of(text)), [])
    columns = [name.strip() for name in first]
    if not any(columns):
        raise ValueError(f"the first line of {path.name} is empty; it should name the columns.")
    check_named_once(path, columns)
    return columns


def choose_columns(path: Path, present: Sequence[str], renamed: Mapping[str, str]) -> dict[str, str]:
    """Our name -> the column that holds it; "" for a section that has none."""
    if not present:
        return {ours: renamed.get(ours, ours) for ours in NAMES}  # of a file without entries
    chosen = {}
    for ours, theirs in NAMES.items():
        wanted = (renamed[ours],) if ours in renamed else theirs
        chosen[ours] = next((name for name in wanted if name in present), "")
        if not chosen[ours] and (ours in renamed or ours == "id"):
            raise ValueError(
                f"{path.name} has no column {wanted[0]!r}; it has {present[:20]}{nearest(wanted[0], present)}. "
                f"Say which it is with --columns {ours}=..."
            )
    if not (chosen["findings"] or chosen["impression"]):
        raise ValueError(
            f"{path.name} has no column findings or impression; it has {present[:20]}{nearest('findings', present)}. "
            "Say which it is with --columns findings=..."
        )
    return chosen
