"""What is said of the scans in a folder: tables and reports as CSV or JSON, and captions that are ready by organ.

A CSV may be separated by commas, semicolons or tabs. Ready captions come in columns `caption:ORGAN`, in a JSON of
reports, or in the files of the published release, which are read as they are:
    desc_info.json   {scan: {"Findings": the whole text, organ: what the findings say of it}}
    conc_info.json   {scan: {"Conclusion": the whole text, organ: what the impression says of it}}
    all_info.json    {scan: {organ: impression and findings in one, or the normal sentence}}
An organ without entry is not spoken of. Whether a caption is abnormal follows the published rule: it is, if the
impression speaks of the organ. Organs outside of the set are left out and counted.
"""

import argparse
import codecs
import csv
import io
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from modeling_fvlm.captions import compose_caption, is_abnormal_caption, normal_caption

from .build import Settings
from .cases import OrganText, Row, check_columns, counted, nearest, read_cells
from .decompose import is_abnormal_sentence, split_sentences
from .folder_files import without_ending
from .report_labels import VALUES
from .summary import console

OWN_COLUMNS = (
    *("id", "volume", "mask", "series", "patient_id", "scan_id", "split", "numbering", "findings", "impression"),
    *("rescale_slope", "rescale_intercept", "report"),
)
PREFIXES = ("caption:", "abnormal:", "label:")
TRUE_FALSE = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}
LABEL_VALUES = VALUES | {value: value for value in VALUES.values()}
SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs"}
WORKBOOK_ENDINGS = (".xlsx", ".xlsm", ".xls", ".ods")
WORKBOOK_BEGINNINGS = (b"PK\x03\x04", b"\xd0\xcf\x11\xe0")
Entry = TypeVar("Entry")
WHOLE_TEXTS = ("Findings", "Conclusion")  # keys beside the organs in the files of the published release


@dataclass(frozen=True)
class Report:
    """What is said of one scan: the whole text, and captions and labels where the source brings them.

    Attributes:
        labels: finding -> 1, 0 or -1, and all findings that the source has labels of anywhere.
    """

    findings: str
    impression: str
    organ_texts: dict[str, OrganText] | None = None
    labels: tuple[dict[str, int], tuple[str, ...]] | None = None


def read_sheet(path: Path, required: Sequence[str] = ()) -> tuple[list[str], list[Row]]:
    """Columns and rows of a CSV that somebody saved from a spreadsheet; cells are stripped strings.

    Raises:
        ValueError: If the file is missing, empty, a workbook or not UTF-8 (naming the line), names a column twice,
            lacks a required column, or has a row with too many cells.
    """
    if not path.is_file():
        raise ValueError(f"there is no file {path}.")
    raw = path.read_bytes()
    check_is_no_workbook(path, raw)
    raw = raw.removeprefix(codecs.BOM_UTF8)
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise not_utf_8(path, raw.count(b"\n", 0, error.start) + 1, raw[error.start]) from None
    separator = separator_of(text)
    if separator != ",":
        console.print(f"{path.name}: columns are separated by {SEPARATORS[separator]}.", markup=False, soft_wrap=True)
    csv.field_size_limit(2**27)  # a report may be longer than the 131,072 characters csv allows
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=separator)
    columns = [name.strip() for name in reader.fieldnames or ()]
    if not any(columns):
        raise ValueError(f"{path.name} is empty; its first line should name the columns.")
    check_named_once(path, columns)
    check_columns(path, columns, required)
    return columns, read_cells(reader, path, columns, SEPARATORS[separator])


def check_is_no_workbook(path: Path, beginning: bytes) -> None:
    if path.suffix.lower() in WORKBOOK_ENDINGS or beginning.startswith(WORKBOOK_BEGINNINGS):
        raise ValueError(
            f"{path.name} is a workbook, not a CSV. Open it in the spreadsheet program, save the sheet as "
            "'CSV UTF-8 (comma delimited)', and give that file."
        )


def not_utf_8(path: Path, line: int, byte: int) -> ValueError:
    return ValueError(
        f"{path.name} is not UTF-8: line {line} holds the byte 0x{byte:02x}. Save it as UTF-8 (in a spreadsheet "
        "program: 'CSV UTF-8')."
    )


def check_named_once(path: Path, columns: Sequence[str]) -> None:
    twice = [name for name, count in Counter(columns).items() if name and count > 1]
    if twice:
        raise ValueError(f"{path.name} has two columns named {twice[0]!r}; rename one of them.")


def separator_of(text: str) -> str:
    """The separator under which the first line has the most columns; a comma where none has more than one."""
    start = text[: 1 << 16]
    return max(
        SEPARATORS,
        key=lambda separator: len(next(csv.reader(io.StringIO(start, newline=None), delimiter=separator), ())),
    )


def read_table(path: Path, columns: Sequence[str]) -> tuple[list[str], list[Row]]:
    """Columns and rows under our names; from a JSON of reports one row per entry."""
    if path.suffix.lower() == ".json":
        if columns:
            raise ValueError("--columns renames the columns of a CSV; the keys of a JSON are fixed.")
        return rows_of_names(read_json(path))
    renamed = {theirs: ours for ours, theirs in renamings(columns, OWN_COLUMNS, PREFIXES)}
    present, rows = read_sheet(path)
    check_columns(path, present, renamed)
    names = [renamed.get(name, name) for name in present]
    if len(set(names)) < len(names):
        raise ValueError(f"--columns gives one name to two columns of {path.name}: {names}.")
    if "id" not in names and "volume" not in names:
        raise ValueError(
            f"{path.name} has neither a column 'id' nor 'volume'; it has {present}{nearest('id', present)}. "
            "Say which it is with --columns id=..."
        )
    return names, [Row({renamed.get(name, name): cell for name, cell in row.items()}, row.line) for row in rows]


def renamings(columns: Sequence[str], names: Iterable[str], prefixes: tuple[str, ...] = ()) -> list[tuple[str, str]]:
    """(OURS, YOURS) of `--columns OURS=YOURS`, where OURS is one of the names or begins with a prefix."""
    known = [*names, *(f"{prefix}..." for prefix in prefixes)]
    pairs = []
    for pair in (pair for argument in columns for pair in argument.split(",")):
        ours, equals, theirs = pair.partition("=")
        if not equals or not theirs or not (ours in names or ours.startswith(prefixes)):
            raise ValueError(f"--columns {pair!r} is not OURS=YOURS with OURS one of {known}{nearest(ours, known)}.")
        pairs.append((ours, theirs))
    return pairs


def rows_of_names(names: Sequence[str]) -> tuple[list[str], list[Row]]:
    """A table that holds ids alone."""
    return ["id"], [Row({"id": name}, place) for place, name in enumerate(names, start=1)]


def load_json(path: Path, option: str):
    """The content of a JSON file in which no key comes twice."""

    def without_repeats(pairs: list[tuple[str, object]]) -> dict[str, object]:
        repeated = [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]
        if repeated:  # json would take the last and say nothing
            raise ValueError(f"{path.name}: the id {repeated[0]!r} comes twice.")
        return dict(pairs)

    try:
        return json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=without_repeats)
    except FileNotFoundError:
        raise ValueError(f"{option}: there is no file {path}.") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path.name} is not UTF-8 ({error}); save it as UTF-8.") from None
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path.name} is no JSON: {error}.") from None


def json_entries(path: Path) -> list:
    """What stands in the list of a JSON of reports, or in its {id: entry}; of what form is not looked at."""
    content = load_json(path, "--reports")
    if isinstance(content, dict):
        return [{"id": name, **entry} if isinstance(entry, dict) else entry for name, entry in content.items()]
    return content if isinstance(content, list) else [content]


def read_json(path: Path) -> dict[str, dict]:
    """Entries of a JSON of reports by their id."""
    entries = []
    for place, entry in enumerate(json_entries(path)):
        if not isinstance(entry, dict) or "id" not in entry:
            raise ValueError(f'{path.name}: entry {place} is not of the form {{"id", "findings", "impression"}}.')
        entries.append((str(entry["id"]), entry))
    return by_id(entries, path)


def by_id(entries: Iterable[tuple[str, Entry]], path: Path) -> dict[str, Entry]:
    """Entries by their id without the ending of a file, as the ids of the table are.

    Raises:
        ValueError: If an id comes twice.
    """
    found: dict[str, Entry] = {}
    for name, entry in entries:
        short = without_ending(name)
        if short in found:
            raise ValueError(f"{path.name}: the id {short!r} comes twice.")
        found[short] = entry
    return found


def read_reports(path: Path, settings: Settings) -> dict[str, Report]:
    """Reports by their id, from CSV or JSON."""
    reports: dict[str, Report] = {}
    if path.suffix.lower() != ".json":
        columns, rows = read_sheet(path, ["id"])
        check_texts(columns, path, "rename them in that file (--columns is for the table)")
        check_caption_columns(columns, path, settings)
        for row in rows:
            name = without_ending(row["id"])
            if name in reports:
                raise ValueError(f"{path.name}, line {row.line}: the id {name!r} comes twice.")
            texts = captions_of_row(row, path, settings)
            reports[name] = Report(row.get("findings", ""), row.get("impression", ""), texts)
        return reports
    entries = read_json(path)
    labels = {name: labels_of_entry(entry, f"{path.name}, {name}") for name, entry in entries.items()}
    findings = tuple(dict.fromkeys(finding for values in labels.values() for finding in values or ()))
    for name, entry in entries.items():
        texts = None
        if "organs" in entry:
            texts = {}
            for organ, said in entry["organs"].items():
                if is_in_set(organ, f"{path.name}, {name}", settings):
                    impression, findings = (as_sentences(said.get(key)) for key in ("impression", "findings"))
                    abnormal = said.get("abnormal")
                    texts[organ] = organ_text(impression, findings, abnormal, settings)
        labelled = None if labels[name] is None else (labels[name], findings)
        reports[name] = Report(str(entry.get("findings") or ""), str(entry.get("impression") or ""), texts, labelled)
    return reports


def labels_of_entry(entry: dict, place: str) -> dict[str, int] | None:
    """The labels of an entry of a JSON, finding -> 1, 0 or -1; None where it was not labelled.

    Raises:
        ValueError: If a label is no label.
    """
    labels = entry.get("labels")
    if labels is None:
        return None
    values = {}
    for finding, label in labels.items() if isinstance(labels, dict) else [("labels", labels)]:
        if not isinstance(label, str | int) or label not in LABEL_VALUES:
            raise ValueError(f"{place}: the label {finding!r} is {label!r}, which is none of {list(LABEL_VALUES)}.")
        values[finding] = LABEL_VALUES[label]
    return values


def as_sentences(said: str | Sequence[str] | None) -> tuple[str, ...]:
    """What a report's JSON says of an organ: a list of sentences, or one text."""
    return (said,) if isinstance(said, str) else tuple(said or ())


def organ_text(
    impression: Sequence[str], findings: Sequence[str], abnormal: bool | None, settings: Settings
) -> OrganText:
    """Ready sentences of one organ; judged by the lexicon's cues where the source does not say."""
    if abnormal is None:
        sentences = [sentence for text in (*impression, *findings) for sentence in split_sentences(text)]
        abnormal = any(is_abnormal_sentence(sentence, settings.lexicon) for sentence in sentences)
    return OrganText(tuple(impression), tuple(findings), bool(abnormal))


def is_in_set(organ: str, place: str, settings: Settings) -> bool:
    """Whether captions of this organ are wanted. Organs of other sets are left out; a name nobody knows is an error."""
    if organ in settings.organ_set.organs:
        return True
    if organ in settings.lexicon.terms:
        return False
    organs = list(settings.organ_set.organs)
    raise ValueError(f"{place}: organ {organ!r} is not in the organ set {organs}{nearest(organ, organs)}.")


def check_texts(
    columns: Sequence[str],
    path: Path,
    mend: str = "say which it is with --columns findings=..., or give --reports",
) -> None:
    """Raise a ValueError where a table holds nothing to make captions of; `mend` is what to do then."""
    if not ({"findings", "impression"} & set(columns) or any(name.startswith("caption:") for name in columns)):
        raise ValueError(
            f"{path.name} has no column findings, impression or caption:ORGAN; it has {list(columns)}"
            f"{nearest('findings', columns)}. To mend it, {mend}."
        )


def check_caption_columns(columns: Sequence[str], path: Path, settings: Settings) -> None:
    for name in columns:
        prefix, colon, organ = name.partition(":")
        if colon and f"{prefix}:" in ("caption:", "abnormal:"):
            is_in_set(organ, f"{path.name}, column {name!r}", settings)


def captions_of_row(row: Row, path: Path, settings: Settings) -> dict[str, OrganText] | None:
    """Ready captions out of the columns caption:ORGAN and abnormal:ORGAN, or None where the row has none.

    Raises:
        ValueError: If abnormal:ORGAN is none of 1 and 0, or set for an organ without a caption.
    """
    for name, cell in row.items():
        prefix, _, organ = name.partition(":")
        if prefix == "abnormal" and cell and not row.get(f"caption:{organ}"):
            raise ValueError(f"{path.name}, line {row.line}: {name} is {cell!r}, but there is no caption:{organ}.")
    if not any(cell for name, cell in row.items() if name.startswith("caption:")):
        return None  # the report is decomposed
    texts = {}
    for organ in settings.organ_set.organs:
        caption = row.get(f"caption:{organ}", "")
        if caption:
            cell = row.get(f"abnormal:{organ}", "").lower()
            if cell and cell not in TRUE_FALSE:
                raise ValueError(f"{path.name}, line {row.line}: abnormal:{organ} is {cell!r}; write 1 or 0.")
            texts[organ] = organ_text((), (caption,), TRUE_FALSE.get(cell), settings)
    return texts


def check_ready_captions(args: argparse.Namespace) -> None:
    """Raise a ValueError where one of --desc_info and --conc_info is missing."""
    if (args.desc_info is None) != (args.conc_info is None):
        missing = "--conc_info" if args.conc_info is None else "--desc_info"
        raise ValueError(f"--desc_info and --conc_info belong together: give {missing} as well.")


def read_ready_captions(desc: Path, conc: Path, organs: Sequence[str]) -> dict[str, dict[str, OrganText]]:
    """Captions of the `organs` by scan, for a builder that has the whole reports from elsewhere; as
    `read_ready_reports`. An organ that is not spoken of has no entry.
    """
    return {scan: report.organ_texts or {} for scan, report in read_ready_reports(desc, conc, organs).items()}


def read_ready_reports(desc: Path, conc: Path, organs: Sequence[str]) -> dict[str, Report]:
    """Whole texts, and captions of the `organs`, out of the files of the published release, by scan.

    Raises:
        ValueError: If a file is missing or of another form, or no organ of it is in the set.
    """
    said_in_findings, said_in_impression = read_by_organ(desc, "--desc_info"), read_by_organ(conc, "--conc_info")
    tell_organs_left_out([desc, conc], [said_in_findings, said_in_impression], organs)
    reports = {}
    for scan in dict.fromkeys([*said_in_findings, *said_in_impression]):
        findings, impression = said_in_findings.get(scan, {}), said_in_impression.get(scan, {})
        texts = {
            organ: published_text(organ, impression.get(organ), findings.get(organ))
            for organ in organs
            if organ in findings or organ in impression
        }
        reports[scan] = Report(findings.get("Findings", ""), impression.get("Conclusion", ""), texts)
    return reports


def read_all_info(path: Path, organs: Sequence[str]) -> dict[str, Report]:
    """Captions of the `organs` out of `all_info.json`, by scan.

    The normal sentence stands there for an organ that is not spoken of, and in front of findings that have no
    impression: what begins with it is normal. A lone full stop is what the published rule makes of an empty entry.

    Raises:
        ValueError: If the file is missing or of another form, or no organ of it is in the set.
    """
    said = read_by_organ(path, "--all_info")
    tell_organs_left_out([path], [said], organs)
    reports = {}
    for scan, by_organ in said.items():
        texts = {}
        for organ in organs:
            caption = by_organ.get(organ, "")
            if caption.startswith(normal_caption(organ)):
                findings = caption.removeprefix(normal_caption(organ))
                if findings.strip():
                    texts[organ] = OrganText((), (findings,), False)
            elif caption.strip():
                says_something = any(character.isalnum() for character in caption)
                texts[organ] = OrganText((caption if says_something else "",), (), says_something)
        reports[scan] = Report("", "", texts)
    return reports


def read_by_organ(path: Path, option: str) -> dict[str, dict[str, str]]:
    """A JSON of the form {scan: {organ: text}}; an organ whose text is null has no entry.

    Raises:
        ValueError: If the file is missing or not of that form.
    """
    content = load_json(path, option)
    form = 'is not of the form {"scan": {"organ": "text"}}'
    if not isinstance(content, dict) or not content:
        raise ValueError(f"{path.name} {form}.")
    for scan, by_organ in content.items():
        if not isinstance(by_organ, dict):
            raise ValueError(f"{path.name}, {scan}: {form}.")
        for organ, text in by_organ.items():
            if not isinstance(text, str | None):
                kind = type(text).__name__
                raise ValueError(f"{path.name}, {scan}: what is said of {organ!r} is no text, but a {kind}.")
    return by_id(
        ((scan, {organ: text for organ, text in said.items() if text is not None}) for scan, said in content.items()),
        path,
    )


def published_text(organ: str, impression: str | None, findings: str | None) -> OrganText:
    """What the two files say of an organ; None where one has no entry.

    Abnormal by the published rule, but for one fault of it: an entry that holds nothing counts as none here. The
    published preparation judges by the caption again, and keeps the fault.
    """
    judged = compose_caption(organ, impression if (impression or "").strip() else None, findings, published=True)
    return OrganText(
        () if impression is None else (impression,),
        () if findings is None else (findings,),
        is_abnormal_caption(judged, organ),
    )


def tell_organs_left_out(
    paths: Sequence[Path], files: Sequence[dict[str, dict[str, str]]], organs: Sequence[str]
) -> None:
    """Print which organs of the files are not among `organs`, the set, and of how many scans.

    Raises:
        ValueError: If none is in the set.
    """
    scans_of: dict[str, set[str]] = {}
    for content in files:
        for scan, by_organ in content.items():
            for organ in by_organ.keys() - set(WHOLE_TEXTS):
                scans_of.setdefault(organ, set()).add(scan)
    left_out = sorted(scans_of.keys() - set(organs), key=lambda organ: (-len(scans_of[organ]), organ))
    names = ", ".join(path.name for path in paths)
    if left_out and len(left_out) == len(scans_of):
        raise ValueError(
            f"{names}: not one of the organs {left_out[:12]} is in the organ set {list(organs)}"
            f"{nearest(left_out[0], organs)}. Give the set they were made for with --organs."
        )
    if left_out:
        told = ", ".join(f"{organ} in {counted(len(scans_of[organ]), 'scan')}" for organ in left_out[:12])
        more = f" and {len(left_out) - 12} more" if len(left_out) > 12 else ""
        near = {organ: nearest(organ, organs) for organ in left_out}
        spelt = next((f" (is {organ!r} spelt as in the set?{near[organ]})" for organ in left_out if near[organ]), "")
        text = f"{names}: left out what is said of organs outside of the set: {told}{more}{spelt}"
        console.print(text, markup=False, soft_wrap=True)
