"""Report -> captions by organ, with a plain rule: a sentence goes to every organ it names.

(1) findings and impression are cut into sentences; list marks go, decimals and abbreviations stay whole
(2) the words of a sentence are compared with the terms of a lexicon (hub_configs/lexicon), the longest term first, so
    that "aortic valve" is the heart's and "subcutaneous emphysema" nobody's
(3) terms that say little by themselves ("nodule") count where the sentence names no other place
(4) a sentence that names nothing and begins with "It" or "The lesion" speaks of what the sentence before spoke of
(5) a sentence is normal if what is left of it after the negated parts are blanked is no finding; an organ is abnormal
    if one of its sentences is not normal
Sentences that name no organ of the set are left out of the captions (the whole report stays in the row).
"""

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import yaml

from modeling_fvlm.captions import compose_caption, is_abnormal_caption

from .cases import OrganText, nearest

LEXICONS = Path(__file__).resolve().parent.parent / "hub_configs" / "lexicon"

# (1) An abbreviation's full stop ends no sentence. Units are not among them: "measuring 5 mm. The ..." does end there.
ABBREVIATION = re.compile(r"\b(?:dr|prof|vs|approx|ca|fig|e\.g|i\.e|resp|incl|max|min|[A-Z])\.$", re.IGNORECASE)
SENTENCE_END = re.compile(r"(?<=[.?!])[\"')\]]*\s+(?=[^\sa-z])")
LIST_MARK = re.compile(r"^(?:\(?\d{1,2}\s?[.)]\s*(?=[A-Z])|\(?\d{1,2}\s?[.)]\s+|\d{1,2}\s?-\s?(?=[A-Z])|[-*•–‣]\s*)")
WORD = re.compile(r"[a-z0-9]+")


@dataclass(frozen=True)
class Lexicon:
    """Terms by which sentences find their organs, and cues by which they are judged normal; data from a YAML file.

    Attributes:
        name, version: As the file says; they go into the manifest.
        sha256: Of the file's bytes.
        terms: organ -> terms that name it wherever they stand.
        weak_terms: organ -> terms that mean it only where the sentence names nothing else.
        elsewhere: Terms that name a place of no organ; they keep weak terms silent.
        landmarks: Words in front of an organ that is named for orientation only ("adjacent to").
        references: First words of a sentence that speaks of the one before.
        cues: Regular expressions `unchanged`, `negations`, `negated_verbs`, `boundaries`, `normal`, `abnormal` and
            `definite`; the file says in what order they act.
    """

    name: str
    version: int
    sha256: str
    terms: dict[str, tuple[str, ...]]
    weak_terms: dict[str, tuple[str, ...]]
    elsewhere: tuple[str, ...]
    landmarks: tuple[str, ...]
    references: tuple[str, ...]
    cues: dict[str, tuple[str, ...]]

    def check_covers(self, organs: Iterable[str]) -> None:
        """Raise a ValueError for an organ that no term names: its captions would all be the normal one."""
        for organ in organs:
            if organ not in self.terms:
                raise ValueError(
                    f"the lexicon {self.name!r} has no terms for organ {organ!r}{nearest(organ, self.terms)}. Copy "
                    f"hub_configs/lexicon/english.yaml, add the organ's terms, and give the file as --lexicon."
                )

    @cached_property
    def entries(self) -> dict[str, list[tuple[tuple[str, ...], frozenset[str], bool]]]:
        """First word -> [(words of a term, its organs, is_weak)], longest term first. No organ: a place elsewhere."""
        organs_of: dict[tuple[tuple[str, ...], bool], set[str]] = {}
        for terms, is_weak in ((self.terms, False), (self.weak_terms, True)):
            for organ, phrases in terms.items():
                for phrase in phrases:
                    organs_of.setdefault((words_of(phrase), is_weak), set()).add(organ)
        for phrase in self.elsewhere:
            organs_of.setdefault((words_of(phrase), False), set())
        table: dict[str, list[tuple[tuple[str, ...], frozenset[str], bool]]] = {}
        for (words, is_weak), organs in organs_of.items():
            table.setdefault(words[0], []).append((words, frozenset(organs), is_weak))
        for entries in table.values():
            entries.sort(key=lambda entry: (-len(entry[0]), entry[2]))
        return table

    @cached_property
    def landmark_words(self) -> tuple[tuple[str, ...], ...]:
        return tuple(words_of(phrase) for phrase in self.landmarks)

    @cached_property
    def reference_words(self) -> tuple[tuple[str, ...], ...]:
        return tuple(words_of(phrase) for phrase in self.references)

    @cached_property
    def patterns(self) -> dict[str, re.Pattern]:
        """The cues as regular expressions over lower-case text.

        A negation reaches to the next boundary; a negated verb reaches back to the one before.
        """
        either = {name: "|".join(f"(?:{cue})" for cue in cues) for name, cues in self.cues.items()}
        boundary = either["boundaries"]
        before_boundary = rf"(?:(?!{boundary}).)*"
        return {
            "unchanged": re.compile(rf"\b(?:{either['unchanged']})\b"),
            "negation": re.compile(rf"\b(?:{either['negations']})\b{before_boundary}"),
            "negated_verb": re.compile(rf"^.*\b(?:{either['negated_verbs']})\b"),
            "boundary": re.compile(boundary),
            "normal": re.compile(rf"\b(?:{either['normal']})\b"),
            "abnormal": re.compile(rf"\b(?:{either['abnormal']})"),
            "definite": re.compile(rf"\b(?:{either['definite']})"),
        }


def load_lexicon(name_or_path: str) -> Lexicon:
    """Read a lexicon: `english`, or a YAML file of the user's in the same form.

    Raises:
        ValueError: If there is no such file, or a part of it is missing or no list of texts.
    """
    path = Path(name_or_path)
    if path.suffix not in (".yaml", ".yml"):
        path = LEXICONS / f"{name_or_path}.yaml"
    if not path.is_file():
        known = sorted(file.stem for file in LEXICONS.glob("*.yaml"))
        raise ValueError(f"--lexicon {name_or_path!r} is neither a YAML file nor one of {known}.")
    raw = path.read_bytes()
    content = yaml.safe_load(raw)

    def texts(value, place: str) -> tuple[str, ...]:
        if not isinstance(value, list) or not all(isinstance(text, str) and text.strip() for text in value):
            raise ValueError(f"{path.name}: {place} must be a list of texts (put bare numbers and yes/no into quotes).")
        return tuple(value)

    try:
        organs = content["organs"]
        return Lexicon(
            name=content["name"],
            version=content["version"],
            sha256=hashlib.sha256(raw).hexdigest(),
            terms={organ: texts(entry["terms"], f"organs.{organ}.terms") for organ, entry in organs.items()},
            weak_terms={
                organ: texts(entry["weak"], f"organs.{organ}.weak")
                for organ, entry in organs.items()
                if "weak" in entry
            },
            elsewhere=texts(content["elsewhere"], "elsewhere"),
            landmarks=texts(content["landmarks"], "landmarks"),
            references=texts(content["references"], "references"),
            cues={name: texts(cues, f"cues.{name}") for name, cues in content["cues"].items()},
        )
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path.name} is not in the form of hub_configs/lexicon/english.yaml: {error!r}.") from None


def split_sentences(text: str) -> list[str]:
    """Cut a section of a report into sentences, without list marks (step 1)."""
    sentences = []
    for line in list_items(text):
        start = 0
        for match in SENTENCE_END.finditer(line):
            if ABBREVIATION.search(line[start : match.start()]):
                continue
            sentences.append(line[start : match.end()].strip())
            start = match.end()
        sentences.append(line[start:].strip())
    return [sentence for sentence in sentences if WORD.search(sentence.lower())]


def list_items(text: str) -> list[str]:
    """Cut at lines and at the numbers of an enumeration, and take the list marks off."""
    # A line that goes on in lower case was wrapped by an editor; it ends no sentence.
    lines = re.split(r"\s*\n\s*(?=[^a-z\s])", text.strip())
    items = []
    for line in lines:
        line = " ".join(line.split())
        number = 1
        # "1. ... 2. ..." on one line. Only while the numbers go up by one from the line's beginning: "is seen in
        # segment 7. A second lesion" is no enumeration.
        while (mark := LIST_MARK.match(line)) and mark[0].strip("(). -") == str(number):
            number += 1
            following = re.search(rf"(?<=[\s.;,?])\(?{number}\s?(?:[.)]\s*|-\s?)(?=[A-Z])", line[mark.end() :])
            if following is None:
                break
            cut = mark.end() + following.start()
            items.append(line[mark.end() : cut])
            line = line[cut:]
        items.append(LIST_MARK.sub("", line))
    return items


def words_of(text: str) -> tuple[str, ...]:
    """Lower-case words with the plural taken off, the same way for terms and for text."""
    return tuple(singular(word) for word in WORD.findall(text.lower()))


def singular(word: str) -> str:
    """Undo the regular English plural and the Latin -ae. A rough stem is enough: both sides are treated alike."""
    if len(word) < 4 or word.endswith(("ss", "us", "is")):
        return word
    for plural, ending in (("ies", "y"), ("sses", "ss"), ("ches", "ch"), ("uses", "us"), ("ae", "a"), ("s", "")):
        if word.endswith(plural):
            return word.removesuffix(plural) + ending
    return word


@dataclass(frozen=True)
class Mentions:
    """What one sentence names: organs for certain, organs by weak terms, places of no organ."""

    organs: frozenset[str]
    weak: frozenset[str]
    is_elsewhere: bool


def find_mentions(words: Sequence[str], lexicon: Lexicon) -> Mentions:
    """Compare the words of a sentence with the lexicon, the longest term first (steps 2 and 3)."""
    named, landmarks, weak = set(), set(), set()
    is_elsewhere = False
    position = 0
    while position < len(words):
        for term, organs, is_weak in lexicon.entries.get(words[position], ()):
            if tuple(words[position : position + len(term)]) == term:
                if is_weak:
                    weak |= organs
                elif is_landmark(words[:position], lexicon):
                    landmarks |= organs
                else:
                    named |= organs
                    is_elsewhere = is_elsewhere or not organs
                position += len(term)
                break
        else:
            position += 1
    # An organ named for orientation still counts where nothing else is named: better than to lose the sentence.
    organs = named or (landmarks if not weak else named)
    return Mentions(frozenset(organs), frozenset(weak), is_elsewhere)


def is_landmark(before: Sequence[str], lexicon: Lexicon) -> bool:
    """Whether the words in front of an organ make it a landmark: "adjacent to the left" kidney."""
    end = len(before)
    while end and before[end - 1] in ("the", "a", "an", "left", "right", "both"):
        end -= 1
    return any(
        len(phrase) <= end and tuple(before[end - len(phrase) : end]) == phrase for phrase in lexicon.landmark_words
    )


def organs_of_sentences(sentences: Sequence[str], lexicon: Lexicon) -> list[frozenset[str]]:
    """For every sentence of one section the organs it speaks of (steps 2 to 4)."""
    result: list[frozenset[str]] = []
    heading: frozenset[str] = frozenset()
    for sentence in sentences:
        words = words_of(sentence)
        mentions = find_mentions(words, lexicon)
        head, colon, _ = sentence.partition(":")
        if colon and len(head) <= 40:  # "Liver: normal size. No focal lesion."
            heading = find_mentions(words_of(head), lexicon).organs
        refers_back = any(words[: len(phrase)] == phrase for phrase in lexicon.reference_words)
        organs = mentions.organs
        if not organs and not mentions.is_elsewhere:
            organs = heading or (result[-1] if refers_back and result else frozenset()) or mentions.weak
        result.append(organs)
    return result


def is_abnormal_sentence(sentence: str, lexicon: Lexicon) -> bool:
    """Whether a sentence states a finding (step 5)."""
    patterns = lexicon.patterns
    text = patterns["unchanged"].sub(" ", " ".join(sentence.lower().split()))  # "no change" denies no finding
    remaining, num_negated = patterns["negation"].subn(" ", text)
    # A negated verb speaks for its own clause alone.
    clauses, kept = patterns["boundary"].split(remaining), []
    for clause in clauses:
        rest, count = patterns["negated_verb"].subn(" ", clause or "")
        num_negated += count
        kept.append(rest)
    remaining = " ; ".join(kept)
    if patterns["definite"].search(remaining):
        return True
    if patterns["abnormal"].search(patterns["normal"].sub(" ", remaining)):
        return True
    return not (num_negated or patterns["normal"].search(text))


def decompose(findings: str, impression: str, organs: Sequence[str], lexicon: Lexicon) -> dict[str, OrganText]:
    """Split a report by organ. Only organs of `organs` that the report speaks of appear, in that order."""
    by_section = []
    for text in (impression, findings):
        sentences = split_sentences(text)
        by_section.append(list(zip(sentences, organs_of_sentences(sentences, lexicon))))
    result = {}
    for organ in organs:
        impression_sentences, findings_sentences = (
            tuple(sentence for sentence, named in section if organ in named) for section in by_section
        )
        spoken = impression_sentences + findings_sentences
        if spoken:
            is_abnormal = any(is_abnormal_sentence(sentence, lexicon) for sentence in spoken)
            result[organ] = OrganText(impression_sentences, findings_sentences, is_abnormal)
    return result


def caption_rows(
    findings: str,
    impression: str,
    organs: Sequence[str],
    lexicon: Lexicon,
    organ_texts: Mapping[str, OrganText] | None = None,
    published: bool = False,
) -> list[dict]:
    """The column `captions`: one entry for every organ of the set, in its order.

    An organ that is not spoken of, or in blanks alone, has the normal caption, `is_mentioned` False and `is_abnormal`
    False.

    Args:
        organ_texts: Captions that the source brings itself; the report is then not decomposed.
        published: Captions in the published form, abnormal by their beginning alone (so the "." of an empty entry is
            abnormal, though nothing is said). Which sentences an organ gets is
            still this file's rule; the published ones come in as `organ_texts`, where `("",)` is an empty entry.
    """
    texts = decompose(findings, impression, organs, lexicon) if organ_texts is None else organ_texts
    rows = []
    for organ in organs:
        text = texts.get(organ, OrganText((), (), False))
        is_mentioned = any(sentence.strip() for sentence in (*text.impression, *text.findings))
        if published:  # no sentence is no entry there
            caption = compose_caption(organ, text.impression or None, text.findings or None, published=True)
        else:
            caption = compose_caption(organ, text.impression, text.findings)
        rows.append(
            {
                "organ": organ,
                "caption": caption,
                "is_abnormal": is_abnormal_caption(caption, organ) if published else text.is_abnormal and is_mentioned,
                "is_mentioned": is_mentioned,
            }
        )
    return rows
