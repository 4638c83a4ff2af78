"""Small reports for a language model to split, what is right for them, and rules that are easy to tell from it."""

import json
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from data_builders.cases import OrganText
from data_builders.llm_answers import load_prompt, numbered
from data_builders.llm_calls import Limits
from data_builders.llm_decompose import Settings

ORGANS = ("lung", "liver", "kidney", "spleen", "heart")
SIGNS = ("A nodule of 5.5 mm is seen in the", "There is an old scar of the", "Mild enlargement of the", "Cyst of the")


@dataclass(frozen=True)
class SmallReport:
    name: str
    findings: str
    impression: str


@dataclass(frozen=True)
class ByRules:
    """What the rules of a test give: every organ that is named, never abnormal."""

    name: str
    organs: dict[str, OrganText] = field(default_factory=dict)
    method: str = "rules"
    uncertain_sentences: tuple[str, ...] = ()
    notes: dict[str, int] = field(default_factory=dict)


def small_reports(count: int, seed: int = 0) -> list[SmallReport]:
    """Reports of three to eight sentences, no two alike."""
    dice, reports = random.Random(seed), []
    for number in range(count):
        sentences = [f"The examination number {number} is complete."]
        for organ in dice.sample(ORGANS, dice.randint(2, 4)):
            sentences.append(
                f"{dice.choice(SIGNS)} {organ}." if dice.random() < 0.5 else f"The {organ} is unremarkable."
            )
        reports.append(SmallReport(f"case_{number}", " ".join(sentences), f"{sentences[-1]} No free fluid."))
    return reports


def is_about(sentence: str, organ: str) -> bool:
    return re.search(rf"\b{organ}\b", sentence) is not None


def truth(report: SmallReport) -> dict[str, OrganText]:
    """What a right answer comes to."""
    sentences, texts = numbered(report), {}
    for organ in ORGANS:
        findings, impression = (
            tuple(sentence for sentence in section if is_about(sentence, organ))
            for section in (sentences.findings, sentences.impression)
        )
        if findings or impression:
            is_abnormal = any("unremarkable" not in sentence for sentence in findings + impression)
            texts[organ] = OrganText(impression, findings, is_abnormal)
    return texts


def rules(report: SmallReport) -> ByRules:
    texts = {organ: OrganText(text.impression, text.findings, False) for organ, text in truth(report).items()}
    unsure = tuple(sentence for sentence in numbered(report).findings if "scar" in sentence)
    return ByRules(report.name, texts, uncertain_sentences=unsure)


def right_answer(question: str, form: str) -> str:
    """The same, made from what stands in the question."""
    section, lines = "", []
    for line in question.splitlines():
        if re.fullmatch("FINDINGS|IMPRESSION", line):
            section = line.lower()
        else:
            number, _, sentence = line.partition(": ")
            lines.append((int(number), section, sentence))
    if form == "numbers":
        entries = []
        for number, _, sentence in lines:
            named = [organ for organ in ORGANS if is_about(sentence, organ)]
            is_normal = "unremarkable" in sentence
            entries.append({"n": number, "abnormal": [] if is_normal else named, "normal": named if is_normal else []})
        return json.dumps({"sentences": entries})
    entries = []
    for organ in ORGANS:
        said = {
            name: [sentence for _, section, sentence in lines if section == name and is_about(sentence, organ)]
            for name in ("findings", "impression")
        }
        if any(said.values()):
            is_abnormal = any("unremarkable" not in sentence for sentence in said["findings"] + said["impression"])
            entries.append({"organ": organ, **said, "abnormal": is_abnormal})
    return json.dumps({"organs": entries})


def settings(**changes) -> Settings:
    """Quick settings: pauses of milliseconds. Names of `Limits` go there."""
    limits = {name: changes.pop(name) for name in list(changes) if name in Limits.__dataclass_fields__}
    limits = Limits(**{"concurrency": 4, "pause_s": 0.01, **limits})
    return Settings(**{"prompt": load_prompt(), "limits": limits, **changes})


def sentences_of(texts: dict[str, OrganText]) -> Iterator[str]:
    for text in texts.values():
        yield from (*text.findings, *text.impression)
