"""Reports that are split by organ, in files: reading them from JSON, JSON lines, a folder or the published form.

An entry is {id, findings, impression, organs: {organ: {findings: [sentences], impression: [sentences], abnormal}}};
other keys ("style", "labels", "method") are kept and not looked at.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from modeling_fvlm.organs import ORGAN_SETS, load_organ_set

from .cases import nearest
from .decomposition import SECTIONS
from .folder_files import without_ending
from .folder_reports import load_json
from .report_files import open_reports


def read_decompositions(path: Path) -> list[dict]:
    """The entries of a file or a folder, in their order.

    Args:
        path: A JSON (a list of entries, or {id: entry}), a .jsonl with an entry a line, a folder with `desc_info.json`
            and `conc_info.json`, or a folder of such JSON and JSON lines.

    Raises:
        ValueError: If there is nothing to read, an entry is not of the form, or an id comes twice; the message names
            file, entry, organ.
    """
    if path.is_dir() and (path / "desc_info.json").is_file():
        from .published_form import read_published

        return read_published(path / "desc_info.json", path / "conc_info.json")
    files = [path]
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix in (".json", ".jsonl"))
        if not files:
            raise ValueError(f"the folder {path} holds no .json and no .jsonl.")
    file_of: dict[str, str] = {}
    entries = []
    for file in files:
        for place, entry in entries_of(file):
            check_entry(entry, place)
            if entry["id"] in file_of:
                raise ValueError(f"{place}: the id comes twice, first in {file_of[entry['id']]}.")
            file_of[entry["id"]] = file.name
            entries.append(entry)
    if not entries:
        raise ValueError(f"{path} holds no report.")
    return entries


def entries_of(path: Path) -> Iterator[tuple[str, dict]]:
    """Entries of one file, each with the words that name its place in a message; ids become texts."""
    if path.suffix == ".jsonl":
        if not path.is_file():
            raise ValueError(f"there is no file {path}.")
        content = []
        for number, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), start=1):
            try:
                content += [(f"line {number}", json.loads(line))] if line.strip() else []
            except json.JSONDecodeError as error:
                raise ValueError(f"{path.name}, line {number} is no JSON: {error}.") from None
    else:
        content = load_json(path, "reports")
        if isinstance(content, dict) and "organs" not in content:
            content = [{"id": name, **entry} if isinstance(entry, dict) else entry for name, entry in content.items()]
        content = content if isinstance(content, list) else [content]
        content = [(f"entry {place}", entry) for place, entry in enumerate(content)]
    for place, entry in content:
        if not isinstance(entry, dict) or not isinstance(entry.get("id"), str | int) or entry["id"] == "":
            raise ValueError(f'{path.name}, {place} is not of the form {{"id", "findings", "impression", "organs"}}.')
        yield f"{path.name}, {entry['id']}", {**entry, "id": str(entry["id"])}


def check_entry(entry: Mapping, place: str) -> None:
    """Raise a ValueError that begins with `place` unless the entry is of the form."""
    for section in SECTIONS:
        if not isinstance(entry.get(section, ""), str):
            raise ValueError(f"{place}: {section!r} is no text, but a {type(entry[section]).__name__}.")
    if not isinstance(entry.get("organs"), dict):
        raise ValueError(f"{place}: 'organs' is missing, or is no object of organs; give {{}} where none is spoken of.")
    for organ, said in entry["organs"].items():
        if not isinstance(said, dict):
            raise ValueError(f"{place}, {organ}: not of the form {{'findings', 'impression', 'abnormal'}}.")
        for section in SECTIONS:
            sentences = said.get(section, [])
            if not isinstance(sentences, list) or not all(isinstance(sentence, str) for sentence in sentences):
                raise ValueError(f"{place}, {organ}: {section!r} must be a list of sentences.")
        if not isinstance(said.get("abnormal"), bool):
            raise ValueError(f"{place}, {organ}: 'abnormal' is {said.get('abnormal')!r}; write true or false.")


def sentences_of(entry: Mapping, section: str, organ: str) -> list[str]:
    """What a section says of an organ; nothing where the entry does not speak of it."""
    return entry["organs"].get(organ, {}).get(section, [])


def with_texts(
    entries: Sequence[Mapping], reports: Path | None, source: Path, columns: Sequence[str] = ()
) -> list[dict]:
    """Entries that carry the texts of their reports, out of `reports` where they do not themselves.

    Args:
        columns: OURS=YOURS of `--columns`, for `reports`.

    Raises:
        ValueError: If a report has a text in neither.
    """
    text_of: dict[str, dict[str, str]] = {}
    if reports is not None:
        text_of = {
            without_ending(report.id): {"findings": report.findings, "impression": report.impression}
            for report in open_reports(reports, columns)
        }
    result = []
    for entry in entries:
        own = text_of.get(without_ending(entry["id"]), {})
        texts = {section: entry.get(section) or own.get(section) or "" for section in SECTIONS}
        if not any(texts.values()) and any(entry["organs"].values()):
            where = f"in {source.name}" if reports is None else f"in {source.name} nor in {reports.name}"
            raise ValueError(f"the report {entry['id']!r} has no text {where}. Give --reports with its findings.")
        result.append({**entry, **texts})
    return result


def organs_of(entries: Sequence[Mapping], name: str | None) -> tuple[str, tuple[str, ...]]:
    """The organ set of entries: the one that is named, or the smallest of ours that holds all their organs.

    Raises:
        ValueError: If the entries speak of an organ that the set does not hold, or no set of ours does.
    """
    spoken = list(dict.fromkeys(organ for entry in entries for organ in entry["organs"]))
    if name is not None:
        organ_set = load_organ_set(name)
        for organ in spoken:
            if organ not in organ_set.organs:
                raise ValueError(
                    f"organ {organ!r} is not in the organ set {organ_set.name!r}{nearest(organ, organ_set.organs)}."
                )
        return organ_set.name, organ_set.organs
    ours = sorted((load_organ_set(path.stem) for path in ORGAN_SETS.glob("*.yaml")), key=lambda one: len(one.organs))
    for organ_set in ours:
        if set(spoken) <= set(organ_set.organs):
            return organ_set.name, organ_set.organs
    lacking = [organ for organ in spoken if organ not in ours[-1].organs]
    raise ValueError(
        f"no organ set of ours holds {lacking or spoken}{nearest((lacking or spoken)[0], ours[-1].organs)}. "
        "Give the file of the set that the reports were split for with --organs."
    )
