"""Splits by organ in the form of the published release, `desc_info.json` and `conc_info.json`: written, and read back.

desc_info.json   {id: {"Findings": the whole text, organ: what the findings say of it}}
conc_info.json   {id: {"Conclusion": the whole text, organ: what the impression says of it}}

An organ has an entry where the section speaks of it. The form holds one text per organ and section, the sentences
joined by a space, and no flag: there an organ is abnormal if the impression speaks of it. So texts come back as they
were, and sentences where they can be told from the whole text; `write_published` counts the flags that come back
otherwise.
`folder --desc_info --conc_info` reads the files as well.
"""

import contextlib
import json
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from .decompose import split_sentences
from .decomposition_files import SECTIONS
from .folder_reports import WHOLE_TEXTS, read_by_organ, read_ready_reports
from .shards import replace_durably

FILES = dict(zip(SECTIONS, ("desc_info.json", "conc_info.json")))
WHOLE_TEXT = dict(zip(SECTIONS, WHOLE_TEXTS))


@dataclass
class Written:
    """How many reports were written, and how many of their flags the form cannot carry."""

    num_reports: int = 0
    num_flags_lost: int = 0


def write_published(folder: Path, entries: Iterable[Mapping]) -> Written:
    """Write both files, entry by entry: no more than one is in memory. They appear when both are complete.

    Raises:
        ValueError: If an id comes twice, an entry has no text to be written, or an organ has the name of a whole text.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written, seen = Written(), set()
    unfinished = {section: folder / f"{name}.{uuid.uuid4().hex[:8]}.tmp" for section, name in FILES.items()}
    try:
        with contextlib.ExitStack() as stack:
            files = {
                section: stack.enter_context(path.open("w", encoding="utf-8", newline="\n"))
                for section, path in unfinished.items()
            }
            for entry in entries:
                name = entry["id"]
                if name in seen:
                    raise ValueError(f"the id {name!r} comes twice; a report needs its own.")
                seen.add(name)
                for section, file in files.items():
                    file.write(",\n" if written.num_reports else "{\n")
                    said = {WHOLE_TEXT[section]: entry.get(section, "")} | texts_of(entry, section)
                    file.write(f"{json.dumps(name, ensure_ascii=False)}: {json.dumps(said, ensure_ascii=False)}")
                written.num_reports += 1
                written.num_flags_lost += sum(
                    said["abnormal"] != bool(" ".join(said.get("impression", ())).strip())
                    for said in entry["organs"].values()
                    if any(" ".join(said.get(section, ())).strip() for section in SECTIONS)
                )
            for file in files.values():
                file.write("\n}\n" if written.num_reports else "{}\n")
        for section, path in unfinished.items():
            replace_durably(path, folder / FILES[section])
    finally:
        for path in unfinished.values():
            path.unlink(missing_ok=True)
    return written


def texts_of(entry: Mapping, section: str) -> dict[str, str]:
    """Organ -> its sentences of a section as one text; organs that it does not speak of are left out."""
    texts = {}
    for organ, said in entry["organs"].items():
        if organ in WHOLE_TEXTS:
            raise ValueError(f"{entry['id']}: {organ!r} is no organ but the key of a whole text in the published form.")
        text = " ".join(said.get(section, ())).strip()
        if text:
            texts[organ] = text
    return texts


def read_published(desc: Path, conc: Path, organs: Iterable[str] | None = None) -> list[dict]:
    """Entries out of both files, of `organs` or of every organ that is in them, abnormal by the published rule.

    Raises:
        ValueError: If a file is missing or of another form, or no organ of it is among `organs`.
    """
    if organs is None:
        by_organ = [*read_by_organ(desc, "desc_info.json").values(), *read_by_organ(conc, "conc_info.json").values()]
        organs = list(dict.fromkeys(organ for said in by_organ for organ in said if organ not in WHOLE_TEXTS))
    entries = []
    for name, report in read_ready_reports(desc, conc, tuple(organs)).items():
        whole = {section: getattr(report, section) for section in SECTIONS}
        said = {
            organ: {
                **{section: cut_as(" ".join(getattr(text, section)), whole[section]) for section in SECTIONS},
                "abnormal": text.is_abnormal,
            }
            for organ, text in (report.organ_texts or {}).items()
        }
        spoken = {organ: one for organ, one in said.items() if one["findings"] or one["impression"]}
        entries.append({"id": name, **whole, "organs": spoken})
    return entries


def cut_as(text: str, whole: str) -> list[str]:
    """Sentences of a text, cut as the sentences of the whole text are where it is made of them."""
    sentences, rest = [], text.strip()
    for sentence in split_sentences(whole):
        if rest == sentence or rest.startswith(f"{sentence} "):
            sentences.append(sentence)
            rest = rest[len(sentence) :].lstrip()
    return split_sentences(text) if rest else sentences
