"""The lexicon: terms by which sentences find their organs, and cues by which they are judged, read from a YAML file.

(1) words: lower case, plural off, British spelling made American, misprints mended, the same way for terms and for text
(2) terms lead to organs; an organ of a user's set is an entry of the lexicon, one side or part of an entry, or what the
    TotalSegmentator classes of the set say it is made of
(3) cues are regular expressions, put together once

The file says in its comments what each list means.
"""

import hashlib
import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import NamedTuple

import yaml

from modeling_fvlm.organs import OrganSet

from .cases import nearest

LEXICONS = Path(__file__).resolve().parent.parent / "hub_configs" / "lexicon"

WORD = re.compile(r"[a-z0-9]+")
BRITISH = re.compile(r"ae|oe|our\b|calibre\b|centre\b|fibre\b|litre\b")
AMERICAN = {
    "ae": "e", "oe": "e", "our": "or", "calibre": "caliber", "centre": "center", "fibre": "fiber",
    "litre": "liter",
}  # fmt: skip
# What scanned text takes for another: each is tried by itself.
MISREAD = (
    ("rn", "m"), ("m", "rn"), ("cl", "d"), ("d", "cl"), ("vv", "w"), ("ii", "u"), ("li", "h"), ("1", "l"), ("1", "i"),
    ("0", "o"), ("5", "s"), ("8", "b"), ("6", "b"), ("ri", "n"), ("tl", "d"), ("c", "e"), ("nn", "m"), ("f", "ph"),
)  # fmt: skip
MIN_MENDED = 6  # letters of the shortest word whose misprints are mended
MAX_MENDED = 40  # and of the longest: a run of letters is no word
PREFIXES = frozenset(
    WORD.findall(
        "peri para sub hydro pneumo hemo retro intra inter extra endo trans cardio hepato spleno costo fibro pleuro"
        " supra infra gastro broncho pelvi uretero sacro ilio coxo cholecysto pan poly hyper hypo post pre bi tracheo"
    )
)
FOLDED = {
    "œ": "e", "æ": "e", "ß": "s", "ı": "i", "ø": "o", "ł": "l", "’": "'", "‘": "'",
    "–": "-", "—": "-", "−": "-", "×": "x",
}  # fmt: skip
IRREGULAR = {
    "calculi": "calculus", "thrombi": "thrombus", "emboli": "embolus", "foci": "focus", "sulci": "sulcus",
    "gyri": "gyrus", "diverticula": "diverticulum", "metastases": "metastasis", "atelectases": "atelectasis",
    "stenoses": "stenosis", "bronchi": "bronchus", "septa": "septum", "hila": "hilum", "acetabula": "acetabulum",
    "humeri": "humerus", "femora": "femur", "varices": "varix", "apices": "apex", "calices": "calyx",
    "calyces": "calyx", "ganglia": "ganglion", "lenses": "len", "pneumothoraces": "pneumothorax",
    "hemithoraces": "hemithorax", "rami": "ramus", "crura": "crus", "atria": "atrium", "thalami": "thalamus",
    "clavicles": "clavicle", "lymphadenopathies": "lymphadenopathy", "prostheses": "prosthesis", "pelves": "pelvis",
    "aneurysmata": "aneurysm", "hematomata": "hematoma", "bases": "base",
}  # fmt: skip
SIDED = re.compile(r"(?P<base>.+?)_(?P<side>left|right)(?:_(?P<number>\d{1,2}))?")
LEVEL = re.compile(r"vertebrae_(?P<part>[CTLS])(?P<number>\d{1,2})")


class Entry(NamedTuple):
    """A term: its words, the organs it leads to (none: a place elsewhere), whether it is weak, or means no place.

    `in_context` are the organs that a weak one leads to in reports which speak of them.
    """

    words: tuple[str, ...]
    organs: frozenset[str]
    is_weak: bool
    is_ignored: bool = False
    in_context: frozenset[str] = frozenset()


class Part(NamedTuple):
    """What narrows an organ of the set: the entry whose sentences it takes, and which of them.

    Attributes:
        organ: Entry of the lexicon.
        side: "left", "right" or "".
        part: Name under `parts`, or "".
        number: Of a rib or a vertebra; 0: any.
    """

    organ: str
    side: str = ""
    part: str = ""
    number: int = 0


@dataclass(frozen=True)
class Limit:
    """A size in mm above which an organ is enlarged, for sentences that hold all of the words."""

    organ: str
    words: tuple[str, ...]
    above_mm: float


@dataclass(frozen=True)
class Lexicon:
    """Terms by which sentences find their organs, and cues by which they are judged normal; data from a YAML file.

    Attributes:
        name, version: As the file says; they go into the manifest.
        sha256: Of the file's bytes.
        terms: organ -> terms that name it wherever they stand.
        weak_terms: organ -> terms that mean it only where the sentence names nothing else.
        context_terms: organ -> weak terms that mean it only in reports which speak of it.
        lists: The lists of words beside the terms, by their names in the file.
        parts: Part of an organ -> (organ, must be named, its terms).
        levels: Letter of a vertebra -> organ.
        synonyms: Another name of an organ -> its entry.
        paired: Organs of which there is a left and a right one.
        limits: Sizes above which an organ is enlarged.
        cues: Regular expressions; the file says in what order they act.
        classes: organ of the set in force -> classes it is made of, for organs that have no entry.
    """

    name: str
    version: int
    sha256: str
    terms: dict[str, tuple[str, ...]]
    weak_terms: dict[str, tuple[str, ...]]
    context_terms: dict[str, tuple[str, ...]]
    lists: dict[str, tuple[str, ...]]
    parts: dict[str, tuple[str, bool, tuple[str, ...]]]
    levels: dict[str, str]
    synonyms: dict[str, str]
    paired: frozenset[str]
    limits: tuple[Limit, ...]
    cues: dict[str, tuple[str, ...]]
    classes: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def __getstate__(self) -> dict:
        """What was read, without what was made of it since."""
        return {each.name: getattr(self, each.name) for each in fields(self)}

    def for_organ_set(self, organ_set: OrganSet) -> "Lexicon":
        """The same lexicon, in which organs without an entry are known by the classes they are made of."""
        classes = {
            organ: tuple(dict.fromkeys(name for names in by_numbering.values() for name in names))
            for organ, by_numbering in organ_set.classes.items()
            if not self.resolve(organ)
        }
        return replace(self, classes=classes) if classes else self

    def check_covers(self, organs: Iterable[str]) -> None:
        """Raise a ValueError for an organ that no term names: its captions would all be the normal one."""
        for organ in organs:
            if not self.resolve(organ):
                raise ValueError(
                    f"the lexicon {self.name!r} has no terms for organ {organ!r}{nearest(organ, self.terms)}. Copy "
                    f"hub_configs/lexicon/english.yaml, add the organ's terms, and give the file as --lexicon."
                )

    def resolve(self, organ: str) -> tuple[Part, ...]:
        """Which sentences an organ takes: those of an entry, or of a side, part or number of it; () if none."""
        if organ in self._resolved:
            return self._resolved[organ]
        found = self._resolve_name(organ)
        if not found:
            found = tuple(part for name in self.classes.get(organ, ()) for part in self._resolve_name(name))
        self._resolved[organ] = found
        return found

    @cached_property
    def _resolved(self) -> dict[str, tuple[Part, ...]]:
        return {}

    def _resolve_name(self, name: str) -> tuple[Part, ...]:
        if name in self.terms:
            return (Part(name),)
        if name in self.parts:
            return (Part(self.parts[name][0], part=name),)
        if name in self.synonyms:
            return self._resolve_name(self.synonyms[name])
        if level := LEVEL.fullmatch(name):
            entry = self._resolve_name(self.levels.get(level["part"], ""))
            # S1 lies in the sacrum: its part says so, and the number adds nothing.
            return tuple(part if part.part else part._replace(number=int(level["number"])) for part in entry)
        if sided := SIDED.fullmatch(name):
            number = int(sided["number"] or 0)
            return tuple(part._replace(side=sided["side"], number=number) for part in self._resolve_name(sided["base"]))
        return ()

    @cached_property
    def vocabulary(self) -> frozenset[str]:
        """Every word of every term, and the other words of reports."""
        words = {word for phrase in self._phrases for word in plain_words(phrase)}
        return frozenset(words | set(self.common_words))

    @cached_property
    def common_words(self) -> frozenset[str]:
        return frozenset(word for phrase in self.lists["vocabulary"] for word in plain_words(phrase))

    @cached_property
    def _phrases(self) -> list[str]:
        of_organs = [
            phrase
            for terms in (self.terms, self.weak_terms, self.context_terms)
            for phrases in terms.values()
            for phrase in phrases
        ]
        of_parts = [phrase for _, _, phrases in self.parts.values() for phrase in phrases]
        beside = [
            phrase for name in ("elsewhere", "ignored", "node_heads", "shared_heads") for phrase in self.lists[name]
        ]
        return of_organs + of_parts + beside

    @cached_property
    def kept_analyses(self) -> dict[str, object]:
        """Sentences that were taken apart with this lexicon, for those that come again."""
        return {}

    @cached_property
    def _mended(self) -> dict[str, str]:
        return {}

    @cached_property
    def _kept(self) -> frozenset[str]:
        """Words that are taken as they are, though a term is one letter away."""
        return frozenset(word for phrase in self.lists["not_misprints"] for word in plain_words(phrase))

    @cached_property
    def _deletions(self) -> dict[str, set[str]]:
        """Every word of single-word terms with one letter left out -> these words."""
        words = {word for phrase in self._phrases if len(plain_words(phrase)) == 1 for word in plain_words(phrase)}
        table: dict[str, set[str]] = {}
        for word in sorted(words | self.common_words):
            if len(word) >= MIN_MENDED and word.isalpha():
                for place in range(len(word)):
                    table.setdefault(word[:place] + word[place + 1 :], set()).add(word)
        return table

    def mend(self, word: str) -> str:
        """The word of a term that this one is a misprint of, or the word itself."""
        if word in self.vocabulary or word in self._kept or not 4 <= len(word) <= MAX_MENDED or word.isdigit():
            return word
        mended = self._mended.get(word)
        if mended is None:
            if len(self._mended) > 50_000:  # what a run reads is without end
                self._mended.clear()
            mended = self._mended[word] = self._mend(word)
        return mended

    def _mend(self, word: str) -> str:
        for wrong, right in MISREAD:
            if wrong in word:
                for tried in {word.replace(wrong, right), word.replace(wrong, right, 1)}:
                    if tried in self.vocabulary and (not wrong.isalpha() or len(tried) >= MIN_MENDED):
                        return tried
        if any(map(str.isdigit, word)):
            tried = word.translate(str.maketrans("01586", "olsbb"))
            return tried if tried in self.vocabulary else word
        if len(word) < MIN_MENDED:  # of short ones a letter lost from an organ's own name: "kidny", "speen"
            lost = sorted(self._deletions.get(word, set()) & self.terms.keys())
            return lost[0] if lost and len(word) == MIN_MENDED - 1 else word
        near = set(self._deletions.get(word, ()))  # a letter was lost
        for place in range(len(word)):
            shorter = word[:place] + word[place + 1 :]
            if shorter in self.vocabulary and len(shorter) >= MIN_MENDED:
                near.add(shorter)  # one too many
            near.update(
                other for other in self._deletions.get(shorter, ()) if len(other) == len(word) and is_near(word, other)
            )
        # Beginnings are rarely misprinted, and "infusion" is no misprint of "effusion".
        near = {other for other in near if other[:2] == word[:2] or other[2:] == word[2:]}
        return min(near, key=lambda other: (other[:2] != word[:2], other[-2:] != word[-2:], other)) if near else word

    def words(self, text: str) -> list[str]:
        """The words of a text as terms have them: mended, and put together where they were torn apart."""
        return [word for word, _, _ in self.located_words(self.spelled(fold(text)))]

    def located_words(self, text: str) -> list[tuple[str, int, int]]:
        """Words of a text with the places where they begin and end; the text as `spelled` gives it."""
        return [(self.mend(american(singular(match[0]))), *match.span()) for match in WORD.finditer(text)]

    def spelled(self, text: str) -> str:
        """A folded text with its misprints mended, and its words put together where they were torn apart."""
        parts: list[str] = []
        before, end = "", 0  # the word before as terms have it, and where it ends
        for match in WORD.finditer(text):
            word, gap = match[0], text[end : match.start()]
            plain = american(singular(word))
            torn = before in PREFIXES or (len(before) > 2 and before not in self.vocabulary)
            if torn and gap in (" ", "-", "- ") and before + plain in self.vocabulary:
                parts[-1] += word
                before = before + plain
            else:
                right = self.mend(plain)
                if right == plain and plain != word:  # a misprint at the end is no plural
                    right = self.mend(american(word))
                    right = plain if right == american(word) else right
                parts += [gap, word if right == plain else right]
                before = plain
            end = match.end()
        return "".join([*parts, text[end:]])

    @cached_property
    def entries(self) -> dict[str, list[Entry]]:
        """First word -> terms that begin with it, the longest first."""
        organs_of: dict[tuple[tuple[str, ...], bool], set[str]] = {}
        for terms, is_weak in ((self.terms, False), (self.weak_terms, True)):
            for organ, phrases in terms.items():
                for phrase in phrases:
                    organs_of.setdefault((tuple(self.words(phrase)), is_weak), set()).add(organ)
        for phrase in self.lists["elsewhere"]:
            organs_of.setdefault((tuple(self.words(phrase)), False), set())
        in_context: dict[tuple[str, ...], set[str]] = {}
        for organ, phrases in self.context_terms.items():
            for phrase in phrases:
                in_context.setdefault(tuple(self.words(phrase)), set()).add(organ)
                organs_of.setdefault((tuple(self.words(phrase)), True), set())
        table: dict[str, list[Entry]] = {}
        for (words, is_weak), organs in organs_of.items():
            context = frozenset(in_context.get(words, ())) if is_weak else frozenset()
            table.setdefault(words[0], []).append(Entry(words, frozenset(organs), is_weak, in_context=context))
        for phrase in self.lists["ignored"]:
            words = tuple(self.words(phrase))
            table.setdefault(words[0], []).append(Entry(words, frozenset(), False, is_ignored=True))
        for entries in table.values():
            entries.sort(key=lambda entry: (-len(entry.words), entry.is_weak))
        return table

    @cached_property
    def phrases(self) -> dict[str, frozenset[tuple[str, ...]]]:
        """The lists of phrases, as words."""
        names = (
            *(
                "landmarks",
                "soft_landmarks",
                "landmark_exceptions",
                "references",
                "node_heads",
                "shared_heads",
                "finding_nouns",
            ),
            *("attributes",),
        )
        return {name: frozenset(tuple(self.words(phrase)) for phrase in self.lists[name]) for name in names}

    @cached_property
    def longest_phrase(self) -> dict[str, int]:
        """Words of the longest phrase of each list."""
        return {name: max(map(len, phrases), default=0) for name, phrases in self.phrases.items()}

    @cached_property
    def spine(self) -> frozenset[str]:
        """Organs that vertebrae belong to."""
        return frozenset(self.levels.values()) & self.terms.keys()

    @cached_property
    def part_words(self) -> dict[str, tuple[tuple[str, ...], ...]]:
        return {name: tuple(tuple(self.words(term)) for term in terms) for name, (_, _, terms) in self.parts.items()}

    @cached_property
    def remarks(self) -> re.Pattern:
        return re.compile("|".join(f"(?:{cue})" for cue in self.lists["remarks"]))

    @cached_property
    def general(self) -> re.Pattern:
        return re.compile("|".join(f"(?:{cue})" for cue in self.lists["general"]))

    @cached_property
    def patterns(self) -> dict[str, re.Pattern]:
        """The cues as regular expressions over folded text."""
        either = {name: "|".join(f"(?:{cue})" for cue in cues) for name, cues in self.cues.items()}
        open_ended = {"abnormal", "definite", "strong_boundaries"}
        return {
            name: re.compile(
                cue if name == "strong_boundaries" else rf"\b(?:{cue})" + ("" if name in open_ended else r"(?!\w)")
            )
            for name, cue in either.items()
        }


def is_near(word: str, other: str) -> bool:
    """Whether two words of one length differ in one letter, or by two neighbours that changed places."""
    places = [place for place, (one, two) in enumerate(zip(word, other)) if one != two]
    if len(places) == 2 and places[1] == places[0] + 1:
        return word[places[0]] == other[places[1]] and word[places[1]] == other[places[0]]
    return len(places) == 1


def fold(text: str) -> str:
    """Lower case without accents, one character for each, so that places stay what they are."""
    if text.isascii():
        return text.lower()
    return "".join(map(_fold, text))


def _fold(character: str) -> str:
    if character < "\x80":
        return character.lower()
    lowered = character.lower()[:1]
    if lowered in FOLDED:
        return FOLDED[lowered]
    base = unicodedata.normalize("NFKD", character)[:1].lower()
    return base[:1] or character


def american(word: str) -> str:
    """American spelling by rule; a rough one is enough, for both sides are treated alike."""
    return BRITISH.sub(lambda match: AMERICAN[match[0]], word) if BRITISH.search(word) else word


@lru_cache(maxsize=50_000)  # the words of reports come again
def singular(word: str) -> str:
    """Undo the regular English plural and the Latin -ae. A rough stem is enough: both sides are treated alike."""
    if word in IRREGULAR:
        return IRREGULAR[word]
    if len(word) < 4 or word.endswith(("ss", "us", "is")):
        return word
    for plural, ending in (("ies", "y"), ("sses", "ss"), ("ches", "ch"), ("uses", "us"), ("ae", "a"), ("s", "")):
        if word.endswith(plural):
            return word.removesuffix(plural) + ending
    return word


def plain_words(text: str) -> tuple[str, ...]:
    """Words without plural and British spelling, their misprints as they are."""
    return tuple(american(singular(word)) for word in WORD.findall(fold(text)))


LISTS = (
    *("elsewhere", "ignored", "node_heads", "shared_heads", "landmarks", "soft_landmarks", "landmark_exceptions"),
    *("references", "finding_nouns", "attributes", "general", "remarks", "vocabulary", "not_misprints"),
)


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
        lexicon = Lexicon(
            name=content["name"],
            version=content["version"],
            sha256=hashlib.sha256(raw).hexdigest(),
            terms={organ: texts(entry["terms"], f"organs.{organ}.terms") for organ, entry in organs.items()},
            weak_terms={
                organ: texts(entry["weak"], f"organs.{organ}.weak")
                for organ, entry in organs.items()
                if "weak" in entry
            },
            context_terms={
                organ: texts(entry["in_context"], f"organs.{organ}.in_context")
                for organ, entry in organs.items()
                if "in_context" in entry
            },
            lists={name: texts(content[name], name) for name in LISTS},
            parts={
                name: (entry["of"], bool(entry.get("only")), texts(entry["terms"], f"parts.{name}.terms"))
                for name, entry in content["parts"].items()
            },
            levels=dict(content["levels"]),
            synonyms=dict(content["synonyms"]),
            paired=frozenset(organ for organ, entry in organs.items() if entry.get("paired")),
            limits=tuple(
                Limit(entry["organ"], tuple(entry["words"]), float(entry["above_mm"])) for entry in content["limits"]
            ),
            cues={name: texts(cues, f"cues.{name}") for name, cues in content["cues"].items()},
        )
        lexicon.patterns  # noqa: B018  (a cue that is no regular expression should fail here)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path.name} is not in the form of hub_configs/lexicon/english.yaml: {error!r}.") from None
    except re.error as error:
        raise ValueError(f"{path.name}: a cue is no regular expression: {error}.") from None
    for name, (organ, _, _) in lexicon.parts.items():
        if organ not in lexicon.terms:
            raise ValueError(f"{path.name}: parts.{name} is of {organ!r}, which has no entry{nearest(organ, organs)}.")
    return lexicon


def starts_with(words: Sequence[str], phrases: Iterable[tuple[str, ...]]) -> bool:
    return any(tuple(words[: len(phrase)]) == phrase for phrase in phrases)


def contains(words: Sequence[str], phrase: tuple[str, ...]) -> bool:
    """Whether a phrase stands among the words."""
    size = len(phrase)
    return any(tuple(words[place : place + size]) == phrase for place in range(len(words) - size + 1))
