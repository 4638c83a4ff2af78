"""Correct a split of reports by organ by hand: a CSV with a row per sentence and organ, and back.

    python -m data_builders correct --split split.json --csv to_correct.csv
    python -m data_builders correct --split split.json --corrected to_correct.csv --out corrected.json

Columns of the CSV, which any spreadsheet program opens and saves (as UTF-8):
    id, section    the report, and `findings` or `impression`
    number         place of the sentence in its section, from 1
    sentence       verbatim; the sentence of a report that went to no organ has a row, too
    organ          one organ of the set, or empty
    abnormal       yes or no: the organ is abnormal in this report (the same in all its rows); empty without an organ
    note           why a row deserves a look; not read back

To correct, change `organ` or `abnormal`, empty `organ` (or delete the row), or copy a row and give the copy another
organ. A sentence may be shortened or cut in two, each in a row of its own; it must stay verbatim. Reading back checks
every cell and names line and column; a report without any row stays as it was, and is counted.

A cell that a spreadsheet program would take for a formula (=, +, -, @ in front) is written with an apostrophe in front,
and read without it.
"""

import argparse
import csv
import io
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from .cases import counted, nearest
from .decompose import split_sentences
from .decompose_score import content_of
from .decomposition_files import SECTIONS, organs_of, read_decompositions, sentences_of, with_texts
from .folder_reports import TRUE_FALSE, read_sheet
from .report_files import add_columns_argument
from .shards import write_text
from .summary import console

COLUMNS = ("id", "section", "number", "sentence", "organ", "abnormal", "note")
# With the full-width signs of East Asian settings. A tab in front runs, too, but no cell here begins with white space.
FORMULA = re.compile(r"'*[=+\-@＝＋－＠]")
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]+")


def guarded(cell: str) -> str:
    """A cell that no spreadsheet program runs. What `'=1` was comes back as well: each gets one apostrophe more."""
    return f"'{cell}" if FORMULA.match(cell) else cell


def unguarded(cell: str) -> str:
    return cell[1:] if cell.startswith("'") and FORMULA.match(cell) else cell


def flat(text: str) -> str:
    """A text on one line, without control characters: as it stands in a cell."""
    return " ".join(CONTROL.sub(" ", text).split())


def write_correction_csv(path: Path, entries: Iterable[Mapping], organs: Sequence[str]) -> int:
    """Write the CSV of entries that carry their texts; returns the number of rows."""
    buffer = io.StringIO(newline="")
    # Everything in quotes: where a spreadsheet program cuts at semicolons, "...; =1" must not become a cell.
    writer = csv.writer(buffer, quoting=csv.QUOTE_ALL)
    writer.writerow(COLUMNS)
    num_rows = 0
    for entry in entries:
        for row in rows_of(entry, organs):
            writer.writerow([guarded(str(cell)) for cell in row])
            num_rows += 1
    write_text(path, "\ufeff" + buffer.getvalue())  # the mark by which Excel knows UTF-8
    return num_rows


def rows_of(entry: Mapping, organs: Sequence[str]) -> Iterator[tuple]:
    """The rows of one report in the order of its text; sentences that are not in it come last, with a note."""
    uncertain = {content_of(sentence) for sentence in entry.get("uncertain", ()) if isinstance(sentence, str)}
    for section in SECTIONS:
        text = flat(entry.get(section, ""))
        sentences = [flat(sentence) for sentence in split_sentences(entry.get(section, ""))]
        organs_of_sentence: dict[tuple[int, str], list[str]] = {(place, s): [] for place, s in enumerate(sentences)}
        for organ in organs:
            used: set[tuple[int, str]] = set()
            for said in map(flat, sentences_of(entry, section, organ)):
                # A sentence that comes twice ("Normal.") goes to the first place that the organ has not used.
                places = [key for key in organs_of_sentence if key[1] == said and key not in used]
                key = places[0] if places else (place_of(said, sentences, text), said)
                used.add(key)
                organs_of_sentence.setdefault(key, []).append(organ)
        for (place, sentence), named in sorted(organs_of_sentence.items(), key=lambda item: item[0][0]):
            if not sentence:
                continue
            note = "" if sentence in text else "not in the report: delete this row, or give a sentence of the report"
            if not note and content_of(sentence) in uncertain:
                note = "uncertain"
            for organ in named or [""]:
                abnormal = "" if not organ else "yes" if entry["organs"][organ]["abnormal"] else "no"
                yield entry["id"], section, place + 1, sentence, organ, abnormal, note


def place_of(said: str, sentences: Sequence[str], text: str) -> int:
    """The place of the sentence in which something said begins; behind them all where it is not in the text."""
    start = text.find(said)
    position = 0
    for place, sentence in enumerate(sentences):
        position = max(position, text.find(sentence, position))
        if 0 <= start < position + len(sentence):
            return place
        position += len(sentence)
    return len(sentences)


def read_correction_csv(path: Path, entries: Sequence[Mapping], organs: Sequence[str]) -> tuple[list[dict], int]:
    """The corrected entries, and how many of them have no row and stayed as they were.

    Args:
        path: A CSV that `write_correction_csv` wrote of these entries, corrected.
        entries: With their texts, against which every sentence is checked.

    Returns:
        Entries in the order of `entries`; one that came out other than it was has `"corrected": true`.

    Raises:
        ValueError: If a cell is not what it may be, a row stands twice, or two rows disagree whether an organ is
            abnormal; the message names line and column.
    """
    entry_of = {entry["id"]: entry for entry in entries}
    _, rows = read_sheet(path, COLUMNS[:-1])
    said: dict[str, dict[str, dict]] = {}
    numbered: dict[tuple[str, str, str], list[tuple[int, str]]] = {}
    flag_line: dict[tuple[str, str], int] = {}
    line_of: dict[tuple, int] = {}
    for row in rows:
        cells = {name: unguarded(row.get(name, "")) for name in COLUMNS}
        if not any(cells.values()):
            continue  # spreadsheet programs leave empty lines behind
        name, section, number, sentence, organ, abnormal = check_cells(cells, f"{path.name}, line {row.line}", entry_of,
                                                                       organs)  # fmt: skip
        of_report = said.setdefault(name, {})
        if not organ:
            continue
        key = (name, section, number, sentence, organ)
        if key in line_of:
            raise ValueError(f"{path.name}, line {row.line}: the same row stands in line {line_of[key]}; delete one.")
        line_of[key] = row.line
        one = of_report.setdefault(organ, {"findings": [], "impression": [], "abnormal": abnormal})
        if one["abnormal"] != abnormal:
            raise ValueError(
                f"{path.name}, line {row.line}, column abnormal: {cells['abnormal']!r} for {organ} of {name!r}, but "
                f"line {flag_line[name, organ]} says otherwise. An organ is abnormal in a report or it is not: make "
                "all its rows one."
            )
        flag_line.setdefault((name, organ), row.line)
        numbered.setdefault((name, organ, section), []).append((number, sentence))
    for (name, organ, section), sentences in numbered.items():
        said[name][organ][section] = [sentence for _, sentence in sorted(sentences, key=lambda pair: pair[0])]
    corrected = []
    for entry in entries:
        organs_said = said.get(entry["id"])
        if organs_said is None:
            corrected.append(dict(entry))
            continue
        in_order = {organ: organs_said[organ] for organ in organs if organ in organs_said}
        is_changed = as_cells({"organs": in_order}, organs) != as_cells(entry, organs)
        corrected.append({**entry, "organs": in_order} | ({"corrected": True} if is_changed else {}))
    return corrected, len(entry_of.keys() - said.keys())


def as_cells(entry: Mapping, organs: Sequence[str]) -> dict[str, dict]:
    """The organs of an entry as a CSV holds them, to compare two: the order of sentences does not count."""
    return {
        organ: {section: sorted(map(flat, sentences_of(entry, section, organ))) for section in SECTIONS}
        | {"abnormal": entry["organs"][organ]["abnormal"]}
        for organ in organs
        if any(flat(s) for section in SECTIONS for s in sentences_of(entry, section, organ))
    }


def check_cells(
    cells: Mapping[str, str], line: str, entry_of: Mapping[str, Mapping], organs: Sequence[str]
) -> tuple[str, str, int, str, str, bool]:
    """The cells of one row as values, or a ValueError that begins with `line` and names the column."""

    def wrong(column: str, why: str) -> ValueError:
        return ValueError(f"{line}, column {column}: {cells[column]!r} {why}")

    name, section = cells["id"], cells["section"].lower()
    organ = {known.lower(): known for known in organs}.get(cells["organ"].lower(), cells["organ"])
    if name not in entry_of:
        raise wrong("id", f"is no report of the split{nearest(name, entry_of)}.")
    if section not in SECTIONS:
        raise wrong("section", f"is neither of {list(SECTIONS)}.")
    number = re.fullmatch(r"(\d{1,6})(?:\.0+)?", cells["number"])
    if number is None or int(number[1]) < 1:
        raise wrong("number", "is no place of a sentence; write 1, 2, ...")
    sentence = flat(cells["sentence"])
    if organ and organ not in organs:
        raise wrong("organ", f"is not in the organ set {list(organs)}{nearest(organ, organs)}.")
    if organ and (not sentence or sentence not in flat(entry_of[name].get(section, ""))):
        raise wrong(
            "sentence", f"does not stand verbatim in the {section} of {name!r}. Take it over as it stands there."
        )
    abnormal = cells["abnormal"].lower()
    if organ and abnormal not in TRUE_FALSE:
        raise wrong("abnormal", "is neither yes nor no.")
    if not organ and abnormal:
        raise wrong("abnormal", "stands in a row without an organ. Name the organ, or empty this cell.")
    return name, section, int(number[1]), sentence, organ, TRUE_FALSE.get(abnormal, False)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--split", type=Path, required=True, metavar="FILE", help="the split: JSON, JSON lines or a folder")
    help_text = "texts of the reports, where the split does not carry them: CSV or JSON with id, findings, impression"
    add("--reports", type=Path, metavar="FILE", help=help_text)
    add_columns_argument(parser)
    add("--csv", type=Path, metavar="CSV", help="write this CSV to be corrected")
    add("--corrected", type=Path, metavar="CSV", help="read this corrected CSV; needs --out")
    add("--out", type=Path, metavar="JSON", help="where the corrected split is written")
    help_text = "organ set; default: the smallest of ours that holds all organs of the split"
    add("--organs", metavar="SET|FILE", help=help_text)


def run(args: argparse.Namespace) -> int:
    if (args.csv is None) == (args.corrected is None):
        raise ValueError("give either --csv, to write a CSV, or --corrected with --out, to read one.")
    if (args.corrected is None) != (args.out is None):
        raise ValueError("--corrected and --out belong together: the corrected CSV, and the JSON to be written.")
    entries = with_texts(read_decompositions(args.split), args.reports, args.split, args.columns)
    _, organs = organs_of(entries, args.organs)
    if args.csv is not None:
        if args.csv.exists():
            raise ValueError(
                f"{args.csv} exists, and may hold corrections. Read it (--corrected), move it, or name another."
            )
        num_rows = write_correction_csv(args.csv, entries, organs)
        text = f"{args.csv}: {counted(num_rows, 'row')} of {counted(len(entries), 'report')}"
    else:
        corrected, num_left = read_correction_csv(args.corrected, entries, organs)
        write_text(args.out, json.dumps(corrected, indent=1, ensure_ascii=False) + "\n")
        num_changed = sum(
            entry != other and entry.get("corrected", False) for entry, other in zip(corrected, entries)
        )  # fmt: skip
        text = f"{args.out}: {counted(num_changed, 'report')} corrected, {num_left} without a row and left as they were"
    console.print(text, markup=False, highlight=False, soft_wrap=True)
    return 0
