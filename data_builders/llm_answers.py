"""The question about one report, and what is made of its answer: sentences that stand in the report, or a refusal.

(1) a report is cut into numbered sentences, as the rules cut it
(2) the model answers under a JSON schema: for every sentence the organs of which it states a finding, and those of
    which it states none (`numbers`); or for every organ the sentences, quoted (`quotes`)
(3) the answer is checked: every sentence has its entry, every organ is in the set, every quote stands in the report.
    What goes on is the report's own sentences, chosen by number: a model cannot put a word into them
"""

import json
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import yaml

from .cases import OrganText
from .llm_client import Answer
from .report_sentences import clean, report_sentences

PROMPTS = Path(__file__).resolve().parent.parent / "hub_configs" / "llm"
FORMS = ("numbers", "quotes")
FEWEST_WORDS_OF_A_QUOTE = 3  # a shorter one that is no whole sentence may stand anywhere
MOST_BEGINNINGS = 20  # of a JSON in one answer that are looked at
CUT = "cut off at the limit of its length"
WORD = re.compile(r"\w+")


class Report(Protocol):
    """What is decomposed."""

    findings: str
    impression: str


class AnswerRefusedError(ValueError):
    """An answer that fails the check. `kind` is counted; the text may quote the answer and goes to the model alone."""

    def __init__(self, kind: str, text: str = "") -> None:
        super().__init__(text or kind)
        self.kind = kind


@dataclass(frozen=True)
class Prompt:
    """What a model is told, from a YAML file (hub_configs/llm/decompose.yaml)."""

    name: str
    version: int
    task: str
    answers: dict[str, str]
    again: str
    notes: dict[str, str]

    def system(self, organs: Sequence[str], form: str) -> str:
        """The part of a question that is the same for all reports."""
        listed = [f"- {organ}" + (f": {self.notes[organ]}" if organ in self.notes else "") for organ in organs]
        return "\n".join([self.task, self.answers[form], "Organs:", *listed])


def load_prompt(name_or_path: str = "decompose") -> Prompt:
    """Read a prompt of hub_configs/llm, or a YAML file of the user's in the same form.

    Raises:
        ValueError: If there is no such file, or something is missing in it.
    """
    path = Path(name_or_path)
    if path.suffix not in (".yaml", ".yml"):
        path = PROMPTS / f"{name_or_path}.yaml"
    if not path.is_file():
        known = sorted(file.stem for file in PROMPTS.glob("*.yaml"))
        raise ValueError(f"--llm_prompt {name_or_path!r} is neither a YAML file nor one of {known}.")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        prompt = Prompt(**{name: content[name] for name in ("name", "version", "task", "answers", "again", "notes")})
        texts = [prompt.task, prompt.again, *(prompt.answers[form] for form in FORMS), *prompt.notes.values()]
    except (KeyError, TypeError, AttributeError, yaml.YAMLError) as error:
        raise ValueError(f"{path.name} is not in the form of hub_configs/llm/decompose.yaml: {error!r}.") from None
    if not all(isinstance(text, str) and text.strip() for text in texts):
        raise ValueError(f"{path.name}: every entry of task, answers, again and notes must be a text.")
    return prompt


@dataclass(frozen=True)
class Numbered:
    """The sentences of a report under one numbering from 1: findings, then impression."""

    findings: tuple[str, ...]
    impression: tuple[str, ...]

    @property
    def sentences(self) -> tuple[str, ...]:
        return self.findings + self.impression

    def text(self) -> str:
        """As the model sees them."""
        lines = []
        for heading, sentences, first in (
            ("FINDINGS", self.findings, 1),
            ("IMPRESSION", self.impression, len(self.findings) + 1),
        ):
            if sentences:
                lines += [heading, *(f"{number}: {sentence}" for number, sentence in enumerate(sentences, first))]
        return "\n".join(lines)

    def by_organ(self, chosen: Mapping[str, set[int]], abnormal: set[str], organs: Sequence[str]) -> dict:
        """Organ -> its text, of sentences chosen by number; the words are the report's own."""
        texts = {}
        for organ in organs:
            if chosen.get(organ):
                numbers = sorted(chosen[organ])
                texts[organ] = OrganText(
                    tuple(self.sentences[number - 1] for number in numbers if number > len(self.findings)),
                    tuple(self.sentences[number - 1] for number in numbers if number <= len(self.findings)),
                    organ in abnormal,
                )
        return texts


def numbered(report: Report) -> Numbered:
    """The sentences of findings and impression as the rules cut them; history and technique are not sent."""
    sentences = report_sentences(clean(report.findings)[0], clean(report.impression)[0])
    return Numbered(*(tuple(sentence.text for sentence in section) for section in sentences))


def answer_schema(organs: Sequence[str], form: str) -> dict:
    """JSON schema of an answer (step 2). The same for all reports: servers compile it once."""
    organ = {"type": "string", "enum": list(organs)}
    if form == "numbers":
        name, entry = (
            "sentences",
            {
                "n": {"type": "integer"},
                "abnormal": {"type": "array", "items": organ},
                "normal": {"type": "array", "items": organ},
            },
        )
    else:
        texts = {"type": "array", "items": {"type": "string"}}
        name, entry = (
            "organs",
            {"organ": organ, "findings": texts, "impression": texts, "abnormal": {"type": "boolean"}},
        )
    item = {"type": "object", "properties": entry, "required": list(entry), "additionalProperties": False}
    whole = {name: {"type": "array", "items": item}}
    return {"type": "object", "properties": whole, "required": [name], "additionalProperties": False}


def read_answer(answer: Answer, report: Numbered, organs: Sequence[str], form: str) -> dict[str, OrganText]:
    """Check an answer, and take the report's own sentences for it (step 3).

    Raises:
        AnswerRefusedError: If any part of it fails.
    """
    if answer.is_cut:
        raise AnswerRefusedError(CUT)
    entries = entries_of(answer.text, "sentences" if form == "numbers" else "organs")
    read = read_numbers if form == "numbers" else read_quotes
    chosen, abnormal = read(entries, report, organs)
    is_long = len(report.sentences) >= 4 and len(organs) >= 4
    if is_long and all(len(chosen.get(organ, ())) == len(report.sentences) for organ in organs):
        raise AnswerRefusedError("every sentence is given to every organ")
    return report.by_organ(chosen, abnormal, organs)


def entries_of(text: str, name: str) -> list:
    """The list in a JSON answer, which may stand between thoughts, words or the marks of a code block.

    Of several the last one counts: a model that thinks aloud comes to its answer in the end.
    """
    starts = [match.start() for match in re.finditer(rf'\{{\s*"{name}"\s*:', text)][-MOST_BEGINNINGS:]
    is_json = False
    for start in starts[::-1] or [max(0, text.find("{"))]:
        try:
            content, _ = json.JSONDecoder().raw_decode(text, start)
        except (ValueError, RecursionError):
            continue
        is_json = True
        entries = content.get(name) if isinstance(content, dict) else None
        if isinstance(entries, list) and all(isinstance(entry, dict) for entry in entries):
            return entries
    if is_json:
        raise AnswerRefusedError("not in the form that was asked for", f'there is no list of objects "{name}".')
    raise AnswerRefusedError("no valid JSON")


def read_numbers(entries: list, report: Numbered, organs: Sequence[str]) -> tuple[dict[str, set[int]], set[str]]:
    """Organ -> numbers of its sentences, and the abnormal organs, from an answer in numbers."""
    chosen: dict[str, set[int]] = {}
    abnormal, answered = set(), set()
    last = len(report.sentences)
    for entry in entries:
        number = as_number(entry.get("n"))
        if number is None:
            raise AnswerRefusedError("not in the form that was asked for", f'"n" is {entry.get("n")!r}.')
        if not 1 <= number <= last:
            raise AnswerRefusedError("a sentence that is not there", f"sentence {number}: the last one is {last}.")
        answered.add(number)
        for name in ("abnormal", "normal"):
            for organ in organs_in(entry.get(name), name, organs):
                chosen.setdefault(organ, set()).add(number)
                if name == "abnormal":
                    abnormal.add(organ)
    left_out = [number for number in range(1, last + 1) if number not in answered]
    if left_out:
        raise AnswerRefusedError("sentences left out", f"no entry for the sentences {left_out[:20]}.")
    return chosen, abnormal


def read_quotes(entries: list, report: Numbered, organs: Sequence[str]) -> tuple[dict[str, set[int]], set[str]]:
    """The same from an answer in quotes."""
    chosen: dict[str, set[int]] = {}
    abnormal = set()
    places = Places(report)
    for entry in entries:
        (organ,) = organs_in([entry.get("organ")], "organ", organs)
        taken: set[int] = set()  # the same sentence may stand in a report twice, and be quoted twice
        for section in ("findings", "impression"):
            quotes = entry.get(section)
            if not isinstance(quotes, list) or not all(isinstance(quote, str) for quote in quotes):
                raise AnswerRefusedError("not in the form that was asked for", f'"{section}" is no list of texts.')
            for quote in quotes:
                taken |= places.find(quote, section, taken)
        if not isinstance(entry.get("abnormal"), bool):
            raise AnswerRefusedError("not in the form that was asked for", '"abnormal" is neither true nor false.')
        if taken:
            chosen.setdefault(organ, set()).update(taken)
            if entry["abnormal"]:
                abnormal.add(organ)
    return chosen, abnormal


def as_number(value: object) -> int | None:
    if isinstance(value, str) and re.fullmatch(r"\s*\d{1,6}\s*", value):
        return int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def organs_in(value: object, name: str, organs: Sequence[str]) -> list[str]:
    """A list of organs, as the set spells them; case, blanks and an English plural do not matter."""
    if not isinstance(value, list) or not all(isinstance(organ, str) for organ in value):
        raise AnswerRefusedError("not in the form that was asked for", f'"{name}" is no list of organs.')
    known = {spelling: organ for organ in organs for spelling in (f"{organ}s".lower(), organ.lower())}
    found = []
    for organ in value:
        spelt = "_".join(organ.lower().split())
        if spelt not in known:
            raise AnswerRefusedError("an organ that is not in the set", f"{organ[:60]!r} is not in the list of organs.")
        found.append(known[spelt])
    return found


def words_of(text: str) -> tuple[str, ...]:
    """Words without case, marks and the ways of writing one character."""
    return tuple(WORD.findall(unicodedata.normalize("NFKC", text).lower()))


class Places:
    """Where in a report a quote stands."""

    def __init__(self, report: Numbered) -> None:
        first = len(report.findings)
        self.sections = {"findings": range(1, first + 1), "impression": range(first + 1, len(report.sentences) + 1)}
        self.words = {number: words_of(sentence) for number, sentence in enumerate(report.sentences, 1)}

    def find(self, quote: str, section: str, taken: set[int]) -> set[int]:
        """Numbers of the sentences that a quote stands in: the whole one of a part, so that no negation is lost.

        Args:
            quote: Words of one sentence, or of several that follow each other.
            section: Looked at first.
            taken: Left out while there are others.

        Raises:
            AnswerRefusedError: If it does not stand in the report.
        """
        wanted = words_of(re.sub(r"^\s*\d{1,3}:\s", "", quote))
        orders = [self.sections[section], *(numbers for name, numbers in self.sections.items() if name != section)]
        same = [number for numbers in orders for number in numbers if self.words[number] == wanted and wanted]
        if same:
            return {next((number for number in same if number not in taken), same[0])}
        if len(wanted) >= FEWEST_WORDS_OF_A_QUOTE:
            for numbers in orders:
                flat = [(word, number) for number in numbers for word in self.words[number]]
                for start in range(len(flat) - len(wanted) + 1):
                    if flat[start][0] == wanted[0]:
                        piece = flat[start : start + len(wanted)]
                        if tuple(word for word, _ in piece) == wanted:
                            return {number for _, number in piece}
        raise AnswerRefusedError("text that is not in the report", f"{quote[:200]!r} does not stand in the report.")
