"""Labels from text: which findings a report states, denies or only suspects, by rules from a YAML file.

    hub_configs/labels/ct_rate_18.yaml says what each list means; `--labels` takes its name, or a file of the user's.

(1) a finding is looked for by its terms, in the words of each sentence as the lexicon reads them
(2) each place where it is named is present, absent or uncertain by its clause (assertion): denied or resolved is absent
(3) over the report, present comes before uncertain before absent; what is not spoken of has no label
"""

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from .lexicon import Lexicon

if TYPE_CHECKING:
    from .decompose import Analysis, Placed

LABELS = Path(__file__).resolve().parent.parent / "hub_configs" / "labels"
PRESENT, UNCERTAIN, ABSENT = "present", "uncertain", "absent"
RANKS = {PRESENT: 2, UNCERTAIN: 1, ABSENT: 0}
VALUES = {PRESENT: 1, ABSENT: 0, UNCERTAIN: -1}  # as a case carries them
KEYS = ("terms", "together", "weak", "organs", "except", "normal")
Words = tuple[str, ...]


@dataclass(frozen=True)
class Rule:
    """How one finding is found; the lists as the file has them, their phrases as words."""

    terms: frozenset[Words]
    together: tuple[frozenset[Words], ...]
    weak: frozenset[Words]
    organs: frozenset[str]
    excepted: frozenset[Words]
    normal: re.Pattern | None


@dataclass(frozen=True)
class FindingRules:
    """The rules of a file.

    Attributes:
        name, version, sha256: Of the file, for the manifest.
        rules: finding -> its rule, in the order of the file.
    """

    name: str
    version: int
    sha256: str
    rules: dict[str, Rule]

    @property
    def findings(self) -> tuple[str, ...]:
        return tuple(self.rules)

    def label(self, sentences: Iterable["Placed"]) -> dict[str, str]:
        """finding -> present, uncertain or absent, for the findings that the sentences speak of."""
        found: dict[str, str] = {}
        for placed in sentences:
            for finding, status in self.label_sentence(placed.analysis, placed.organs):
                if finding not in found or RANKS[status] > RANKS[found[finding]]:
                    found[finding] = status
        return {finding: found[finding] for finding in self.rules if finding in found}

    def label_sentence(self, analysis: "Analysis", organs: frozenset[str]) -> Iterator[tuple[str, str]]:
        """(finding, status) for every place of one sentence where a finding is named (steps 1 and 2)."""
        words = analysis.words
        if not words:
            return
        for finding, rule in self.rules.items():
            for first, last in places_of(rule, words, analysis, organs):
                status = status_at(analysis, analysis.located[first][1], analysis.located[last - 1][2])
                if status:
                    yield finding, status
            if rule.normal is not None and rule.normal.search(analysis.text):
                yield finding, ABSENT


def status_at(analysis: "Analysis", start: int, end: int) -> str | None:
    """How a sentence speaks of what stands there; None where it is history."""
    assertions = analysis.assertions
    if start >= len(assertions.text):
        return None
    if assertions.is_historical(start):
        return None
    if assertions.is_denied(start, end):
        return ABSENT
    return UNCERTAIN if assertions.is_uncertain(start, end) else PRESENT


def places_of(
    rule: Rule, words: Sequence[str], analysis: "Analysis", organs: frozenset[str]
) -> Iterator[tuple[int, int]]:
    """Spans of words that name a finding."""
    excepted = {place for first, last in spans(words, rule.excepted) for place in range(first, last)}

    def free(phrases: frozenset[Words]) -> list[tuple[int, int]]:
        return [(first, last) for first, last in spans(words, phrases) if not excepted.intersection(range(first, last))]

    yield from free(rule.terms)
    if rule.weak and organs & rule.organs:
        yield from free(rule.weak)
    if rule.together:
        groups = [free(phrases) for phrases in rule.together]
        if all(groups):
            parts = [{part_of(analysis, first) for first, _ in group} for group in groups[1:]]
            for first, last in groups[0]:
                part = part_of(analysis, first)
                if all(part in others for others in parts):
                    yield first, last


def part_of(analysis: "Analysis", place: int) -> int:
    """Which of the parts between firm boundaries holds a word."""
    assertions = analysis.assertions
    number = assertions.piece_at(analysis.located[place][1])
    return sum(piece.is_firm for piece in assertions.pieces[:number])


def spans(words: Sequence[str], phrases: frozenset[Words]) -> Iterator[tuple[int, int]]:
    """Where phrases stand among the words."""
    if not phrases:
        return
    longest = max(map(len, phrases))
    for first in range(len(words)):
        for size in range(min(longest, len(words) - first), 0, -1):
            if tuple(words[first : first + size]) in phrases:
                yield first, first + size
                break


def load_finding_rules(name_or_path: str, lexicon: Lexicon) -> FindingRules:
    """Read rules of findings: `ct_rate_18`, or a YAML file of the user's in the same form.

    Raises:
        ValueError: If there is no such file, or it is not of that form.
    """
    path = Path(name_or_path)
    if path.suffix not in (".yaml", ".yml"):
        path = LABELS / f"{name_or_path}.yaml"
    if not path.is_file():
        known = sorted(
            file.stem for file in LABELS.glob("*.yaml") if "\n    terms:" in file.read_text(encoding="utf-8")
        )
        raise ValueError(f"--labels {name_or_path!r} is neither a YAML file nor one of {known}.")
    raw = path.read_bytes()
    try:
        content = yaml.safe_load(raw)
        rules = {
            str(finding): read_rule(entry, f"{path.name}: findings.{finding}", lexicon)
            for finding, entry in content["findings"].items()
        }
        return FindingRules(str(content["name"]), content["version"], hashlib.sha256(raw).hexdigest(), rules)
    except (KeyError, TypeError, AttributeError, yaml.YAMLError) as error:
        raise ValueError(f"{path.name} is not in the form of hub_configs/labels/ct_rate_18.yaml: {error!r}.") from None


def read_rule(entry: object, place: str, lexicon: Lexicon) -> Rule:
    """One finding of the file.

    Raises:
        ValueError: If a key is unknown, a list is no list of texts, or there is nothing to find it by.
    """
    if not isinstance(entry, Mapping) or not ({"terms", "together", "weak"} & set(entry)):
        raise ValueError(f"{place} needs `terms`, `together` or `weak` with lists of phrases.")
    unknown = sorted(set(entry) - set(KEYS))
    if unknown:
        raise ValueError(f"{place}: {unknown[0]!r} is none of {list(KEYS)}.")

    def texts(value: object, key: str) -> list[str]:
        if not isinstance(value, list) or not all(isinstance(text, str) and text.strip() for text in value):
            raise ValueError(f"{place}.{key} must be a list of texts (put bare numbers and yes/no into quotes).")
        return value

    def phrases(key: str) -> frozenset[Words]:
        return frozenset(tuple(lexicon.words(text)) for text in texts(entry.get(key, []), key))

    groups = entry.get("together", [])
    if not isinstance(groups, list):
        raise ValueError(f"{place}.together must be a list of lists of texts.")
    together = tuple(frozenset(tuple(lexicon.words(text)) for text in texts(group, "together")) for group in groups)
    if "weak" in entry and not entry.get("organs"):
        raise ValueError(f"{place}: `weak` terms need `organs`, the organs a sentence with them must be about.")
    organs = frozenset(texts(entry.get("organs", []), "organs"))
    lexicon.check_covers(sorted(organs))
    cues = texts(entry.get("normal", []), "normal")
    try:
        normal = re.compile("|".join(f"(?:{cue})" for cue in cues)) if cues else None
    except re.error as error:
        raise ValueError(f"{place}.normal: {error}.") from None
    return Rule(phrases("terms"), together, phrases("weak"), organs, phrases("except"), normal)


def label_values(
    labels: Mapping[str, str], findings: Sequence[str], unmentioned: int = -1
) -> tuple[tuple[str, int], ...]:
    """Labels as a case carries them: 1 present, 0 absent, -1 uncertain or unknown.

    Args:
        unmentioned: Value of findings that are not spoken of; CT-RATE's own files take 0.
    """
    return tuple((finding, VALUES[labels[finding]] if finding in labels else unmentioned) for finding in findings)
