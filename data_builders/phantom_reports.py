"""Reports of the procedural body: findings and impression sections, and which organ every sentence speaks of.

The words are in hub_configs/synthetic/findings.yaml. A report says what was painted: side, size and number of a finding
are those of the patient. An organ may be described, negated, named together with another one, or not mentioned at all;
an organ that the scan cuts is never spoken of (but for the femur, which every scan cuts).

(1) state the patient's findings, in the impression, in the findings section, or in both
(2) negate findings that the patient does not have, one by one or two organs in a sentence
(3) call organs without a finding normal, one by one or in pairs
(4) put the sentences into the order of the body, with sentences of no organ in between
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import yaml

from .phantom import FINDINGS_FILE, ORGAN_RANGE_MM, Detail, Finding, Patient, load_findings

NUMBER_WORDS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")

STATED_IN_IMPRESSION = 0.85  # chance that a finding reaches the impression
STATED_IN_FINDINGS = 0.85  # chance that one that did is in the findings section too
DESCRIBED = 0.5  # chance that the findings section describes it instead of naming it
JOINED = 0.35  # chance that two findings share a sentence where there is a phrase for them
MENTIONED = 0.5  # chance that an organ without a finding is spoken of
NEGATED = 0.35  # chance that a finding which a mentioned organ does not have is denied


@dataclass(frozen=True)
class Sentence:
    text: str
    organs: tuple[str, ...] = ()  # the organs that it says something about
    is_abnormal: bool = False  # whether it states a finding


@dataclass(frozen=True)
class Report:
    findings: str
    impression: str
    findings_sentences: tuple[Sentence, ...]
    impression_sentences: tuple[Sentence, ...]

    def by_organ(self) -> dict[str, dict]:
        """The wanted split, as in reports with gold splits: organ -> {findings, impression, abnormal}.

        Only organs that are spoken of appear; sentences are verbatim, without the list marks of the impression.
        """
        organs: dict[str, dict] = {}
        for section, sentences in (("findings", self.findings_sentences), ("impression", self.impression_sentences)):
            for sentence in sentences:
                for organ in sentence.organs:
                    entry = organs.setdefault(organ, {"findings": [], "impression": [], "abnormal": False})
                    entry[section].append(sentence.text)
                    entry["abnormal"] |= sentence.is_abnormal
        return {organ: organs[organ] for organ in ORGAN_RANGE_MM if organ in organs}


@cache
def load_phrases() -> dict:
    """Sentence patterns and stock sentences beside the findings."""
    return yaml.safe_load(FINDINGS_FILE.read_text(encoding="utf-8"))


def capital(text: str) -> str:
    return text[:1].upper() + text[1:]


class ReportWriter:
    """Writes one patient's report; every choice comes from the patient's stream "report"."""

    def __init__(self, patient: Patient):
        self.patient = patient
        self.rng = patient.stream("report")
        self.phrases = load_phrases()
        self.rows = {row.finding: row for row in load_findings()}
        self.negated: set[str] = set()  # findings and organs are denied, or called normal, once
        self.called_normal: set[str] = set()

    def chance(self, probability: float) -> bool:
        return bool(self.rng.random() < probability)

    def pick(self, options):
        return options[int(self.rng.integers(len(options)))]

    def noun(self, row: Finding) -> str:
        return row.nouns[0] if self.chance(0.7) else self.pick(row.nouns[1:])

    def fill(self, pattern: str, row: Finding, noun: str, detail: Detail | None = None, second: str = "") -> str:
        count = detail.count if detail and detail.count else 0
        return capital(
            pattern.format(
                n=noun,
                N=capital(noun),
                n2=second,
                be="are" if noun in row.plural else "is",
                side=detail.side if detail else "",
                mm=detail.size_mm if detail else "",
                count=NUMBER_WORDS[count] if count < len(NUMBER_WORDS) else count,
            )
        )

    def sentence(self, row: Finding, text: str) -> Sentence:
        return Sentence(text, (row.organ, *row.also), True)

    def named(self, row: Finding) -> Sentence:
        """A sentence that names the finding."""
        detail = self.patient.findings[row.finding]
        patterns = self.phrases["positive"]
        if detail.side and self.chance(0.35):
            patterns = self.phrases["positive_both_sides" if detail.side == "both" else "positive_one_side"]
        return self.sentence(row, self.fill(self.pick(patterns), row, self.noun(row), detail))

    def described(self, row: Finding) -> Sentence:
        """A sentence that describes the finding; one with {side} is no use where both sides are affected."""
        detail = self.patient.findings[row.finding]
        patterns = [text for text in row.described if detail.side != "both" or "{side}" not in text]
        return self.sentence(row, self.fill(self.pick(patterns), row, self.noun(row), detail))

    def joint(self, present: bool) -> list[tuple[tuple[str, ...], Sentence]]:
        """Sentences over findings of two organs that are both there, or both not."""
        sentences = []
        for entry in self.phrases["joint"]:
            rows = [self.rows[name] for name in entry["findings"]]
            if not all(row.organ in self.patient.covered_organs for row in rows):
                continue
            states = [row.finding in self.patient.findings for row in rows]
            if all(states) if present else not any(states):
                organs = tuple(row.organ for row in rows)
                text = self.pick(entry["positive" if present else "negative"])
                if self.chance(JOINED if present else 0.5 * JOINED):
                    sentences.append((tuple(entry["findings"]), Sentence(text, organs, present)))
        return sentences

    def impression(self) -> list[Sentence]:
        """(1) What the patient has, most of it; findings of one organ, or of two, may share a sentence."""
        pending = [self.rows[name] for name in self.patient.findings if self.chance(STATED_IN_IMPRESSION)]
        sentences = []
        for names, sentence in self.joint(present=True):
            if all(self.rows[name] in pending for name in names):
                sentences.append(sentence)
                pending = [row for row in pending if row.finding not in names]
        while pending:
            row = pending.pop(0)
            partners = [other for other in pending if other.organ == row.organ and other.also == row.also]
            if partners and self.chance(JOINED):
                partner = self.pick(partners)
                pending.remove(partner)
                noun, second = self.noun(row), self.noun(partner)
                pattern = self.pick(self.phrases["combined"])
                sentences.append(self.sentence(row, self.fill(pattern, row, noun, second=second)))
            else:
                sentences.append(self.named(row))
        sentences = [sentences[i] for i in self.rng.permutation(len(sentences))]
        if not sentences and not self.patient.findings:
            sentences.append(Sentence(self.pick(self.phrases["impression_normal"])))
        if self.chance(0.12):
            sentences += self.negations(self.pick(self.patient.covered_organs), 0.5)
        if not sentences or self.chance(0.2):
            sentences.append(Sentence(self.pick(self.phrases["impression_fillers"])))
        return sentences

    def negations(self, organ: str, probability: float) -> list[Sentence]:
        """(2) Findings of an organ that the patient does not have."""
        sentences = []
        for row in self.rows.values():
            if row.organ == organ and row.finding not in self.patient.findings and row.finding not in self.negated:
                if not self.chance(probability):
                    continue
                self.negated.add(row.finding)
                text = self.fill(self.pick(self.phrases["negative"]), row, self.noun(row))
                sentences.append(Sentence(text, (row.organ, *row.also)))
        return sentences

    def findings(self, in_impression: str) -> list[Sentence]:
        """The findings section, organ by organ from head to thigh."""
        patient = self.patient
        abnormal = {organ for name in patient.findings for organ in (self.rows[name].organ, *self.rows[name].also)}
        spoken_of = [organ for organ in ORGAN_RANGE_MM if organ in patient.covered_organs or self.shows_femur(organ)]
        of_organ: dict[str, list[Sentence]] = {organ: [] for organ in spoken_of}
        for name in patient.findings:
            row = self.rows[name]
            is_repeated = any(noun in in_impression.lower() for noun in row.nouns)
            if not is_repeated or self.chance(STATED_IN_FINDINGS):
                of_organ[row.organ].append(self.described(row) if self.chance(DESCRIBED) else self.named(row))
        for names, sentence in self.joint(present=False):
            if not self.negated.intersection(names):
                self.negated.update(names)
                of_organ[sentence.organs[0]].append(sentence)
        for entry in self.phrases["normal_pairs"]:
            organs = entry["organs"]
            is_free = not self.called_normal.union(abnormal).intersection(organs)
            if is_free and all(organ in of_organ for organ in organs) and self.chance(0.22):
                self.called_normal.update(organs)
                of_organ[organs[0]].append(Sentence(self.pick(entry["sentences"]), tuple(organs)))
        for organ in spoken_of:
            if organ in abnormal:
                of_organ[organ] += self.negations(organ, NEGATED)
            elif self.chance(MENTIONED):
                negations = self.negations(organ, NEGATED)
                if organ not in self.called_normal and (not negations or self.chance(0.5)):
                    of_organ[organ].append(Sentence(self.pick(self.phrases["normal"][organ]), (organ,)))
                of_organ[organ] += negations
        sentences = []
        for organ in spoken_of:
            sentences += [of_organ[organ][i] for i in self.rng.permutation(len(of_organ[organ]))]
        fillers = self.rng.permutation(len(self.phrases["fillers"]))[: int(self.rng.integers(1, 5))]
        for index in fillers:
            place = int(self.rng.integers(len(sentences) + 1))
            sentences.insert(place, Sentence(self.phrases["fillers"][index]))
        return sentences

    def shows_femur(self, organ: str) -> bool:
        """The femur is always cut, yet its head and neck are described where the scan reaches them."""
        return organ == "femur" and self.patient.range_mm[0] < 0

    def write(self) -> Report:
        impression = self.impression()
        impression_text = self.listed([sentence.text for sentence in impression])
        findings = self.findings(impression_text)
        findings_text = " ".join(sentence.text for sentence in findings)
        return Report(findings_text, impression_text, tuple(findings), tuple(impression))

    def listed(self, sentences: list[str]) -> str:
        """An impression is numbered, a list with dashes, or plain text."""
        style = self.rng.random()
        if style < 0.4 and len(sentences) > 1:
            return " ".join(f"{number}. {text}" for number, text in enumerate(sentences, start=1))
        if style < 0.6:
            return "\n".join(f"- {text}" for text in sentences)
        return " ".join(sentences)


def write_report(patient: Patient) -> Report:
    """The report of a patient: same patient, same words."""
    return ReportWriter(patient).write()
