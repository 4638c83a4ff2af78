"""Report -> captions by organ, by rules: a sentence goes to every organ it says something about.

(1) the report is cut into sentences of findings and of impression (report_sentences)
(2) the words of a sentence are compared with the terms of a lexicon (hub_configs/lexicon), the longest term first, so
    that "aortic valve" is the heart's and "subcutaneous emphysema" nobody's; an organ named for orientation only
    ("adjacent to the aorta"), or as the place of a lymph node, does not count
(3) terms that say little by themselves ("nodule") count where the sentence names no other place, and some of them
    ("hemorrhage", the brain's) only in reports that speak of the organ
(4) a sentence that names nothing speaks of the heading it stands under ("LIVER:"), of what it refers back to ("it",
    "the effusion", "on the left"), or of what the one before spoke of, if only that can be meant ("no focal lesion")
(5) an organ is abnormal if a clause about it states a finding (assertion)
Sentences that name no organ of the set are left out of the captions (the whole report stays in the row).
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from modeling_fvlm.captions import compose_caption, is_abnormal_caption

from .assertion import LONGEST, ONLY_SHOWN, Assertions, Status, judge_sentence
from .cases import OrganText
from .decomposition import Decomposition, Labels
from .lexicon import WORD, Entry, Lexicon, Part, american, fold, load_lexicon, plain_words, singular, starts_with
from .report_sentences import Sentence, clean, report_sentences, split_sentences

__all__ = [
    "Lexicon",
    "caption_rows",
    "decompose",
    "decompose_report",
    "is_abnormal_sentence",
    "load_lexicon",
    "split_sentences",
]

DETERMINERS = frozenset(
    WORD.findall(
        "the a an left right both its his her their this proximal distal mid middle upper lower medial lateral anterior"
        " posterior superior inferior visceral parietal outer inner unopacified adjacent"
    )
)
ARTICLES = frozenset(["the", "a", "an", "it", "his", "her", "their", "this"])
SIDES = {
    **dict.fromkeys(("left", "lt", "lul", "lll", "lingula", "lingular"), "left"),
    **dict.fromkeys(("right", "rt", "rul", "rml", "rll"), "right"),
    **dict.fromkeys(("both", "bilateral", "bilaterally", "bibasilar", "biapical", "bibasal"), "both"),
}
MAX_HEADING = 60  # characters
MAX_REACH = 6  # words between an adjective and the noun it shares
LEVELS = re.compile(r"\b(c|t|th|d|l|s)\s?(\d{1,2})(?:\s?(?:-|/|to|through|and)\s?(?:(?:c|t|th|d|l|s)\s?)?(\d{1,2}))?\b")
NUMBERS = re.compile(r"(\d{1,2})(?:st|nd|rd|th|\.)?(?:\s?(?:-|to|through)\s?(\d{1,2})(?:st|nd|rd|th|\.)?)?")
NEAR_RIB = re.compile(
    r"((?:\d{1,2}(?:st|nd|rd|th|\.)?[\s,\-]*(?:and|to|through|&)?\s*)+)(?:\w+\s){0,2}ribs?\b"
    r"|\bribs?\s(?:#\s?)?((?:\d{1,2}(?!\s?[mc]m)[\s,\-]*(?:and|to|through)?\s*)+)"
)
POINTERS = tuple(
    plain_words(f"{pronoun} {verb}")
    for pronoun in ("this", "these")
    for verb in WORD.findall(
        "is are has have may does do did extends extend invades involves involve reaches reach abuts abut displaces"
        " displace compresses compress crosses cross contacts contact causes cause breaches measures measure"
    )
)
PRONOUNS = frozenset(["it", "its", "they", "their", "them", "these", "this", "both", "those"])
MIN_ENGLISH_WORDS, MIN_ENGLISH = 12, 0.47  # of so many words at least this share; English reports have 0.6 and more
FUNCTION_WORDS = frozenset(
    WORD.findall(
        "the of and in is are no with was were for not to on or by at as be has have been there this that it an without"
        " within both left right normal seen"
    )
)
CACHED_SENTENCES = 4_000
NODE_WORDS = frozenset(
    ["and", "or", "nor", "enlarged", "pathological", "level", "region", "station", "chain", "perihilar", "hilum"]
)
PLACE_WORD = re.compile(r"\b(?:in|at|of|around|along|near|within|between|on|to|from|adjacent|surrounding)\b")
HEADING = re.compile(rf"(?P<head>[^:.;!?\n]{{2,{MAX_HEADING}}}?)(?P<mark>:(?!\d)|\s[-–—]\s)")
# In a text of several lines, a heading that names a region and no organ is no part of the sentence behind it.
REGION = (
    r"^(?:ct (?:of )?)?(?:the )?(?:head|neck|head and neck|chest|thorax|(?:upper |lower )?abdomen|pelvis"
    r"|abdomen (?:and|&) pelvis|abdomen/pelvis|chest/abdomen/pelvis|whole body|skeleton|extracardiac)"
)
BELOW_HEAD = re.compile(r"chest|thorax|abdomen|pelvis|extracardiac", re.IGNORECASE)
ORGANS_OF_THE_HEAD = frozenset(["brain", "face", "skull"])
REGION_HEADING = re.compile(rf"{REGION}\s*:\s*(?=\S)", re.IGNORECASE)
REGION_LINE = re.compile(rf"{REGION}\W*$", re.IGNORECASE)
SUBJECT = re.compile(
    r"(?:the|this|these|those)\s(?:(?:\w|-)+\s){0,4}?(?P<noun>\w+)\s"
    r"(?P<verb>(?:also |again |now |further )?(?:is|are|was|were|has|have|extend|invad|abut|compress|displac|reach|lie"
    r"|encas|involv|contact|infiltrat|measur|appear|show|contain|caus|cross|demonstrat|arise|protrud|obstruct|remain"
    r"|surround|exert|propagat|start|begin|originat|terminat|project|herniat|track|communicat|occup|fill|replac"
    r"|distort|narrow|enhanc|exhibit|expand|destroy|erod|penetrat|continu|course|drain|open)\w*)"
)
RELATION = re.compile(
    r"(?:also |again |now |further )?(?:extend|invad|abut|compress|displac|reach|encas|involv|contact|infiltrat|cross"
    r"|protrud|obstruct|surround|exert|caus)"
)
NOT_INVADED = re.compile(r"\b(?:without|no) (?:\w+ ){0,3}(?:inva|infiltrat|involv)")
SPARED = re.compile(
    r"\bnot (?:\w+ly )?(?:inva|infiltrat|involv|contact|abut|encas|compress|reach|cross|touch|extend|affect)"
)
RESETTING = re.compile(
    r"\b(?:other|others|misc|miscellaneous|additional|incidental|note|comment|addendum|findings?|impression|extra\w+"
    r"|vascular|vasculature|vessels?|arteries|veins|lines|tubes|devices)\b"
)
POINTING_BACK = re.compile(
    r"\b(?:within|in|of|around|behind|into|from|through|to|with|inside|along|by|on) (?:it|them)\b"
    r"|\b(?:this|these) (?:segment|region|area|level|location|organ|lesion|mass|finding|structure|lobe|vessel|loop)"
)
HEADING_WORDS = frozenset(
    WORD.findall("the and or of a other left right both large great system structure organ tract gland area region")
)
PARTS_OF_ORGANS = frozenset(
    WORD.findall(
        "tail head body wall margin dome pole border lobe apex base surface aspect edge origin region part portion tip"
        " contour third end fundus side segment neck hilum"
    )
)
LOBE_WORDS = frozenset(["left", "right", "upper", "middle", "lower", "lobe", "both"])
VESSELS = frozenset(["artery", "vein", "venous", "arterial", "vessel", "branch"])


class Mention(NamedTuple):
    """A term in a sentence: words [first, last), places in the text, organs, and how it is meant."""

    first: int
    last: int
    start: int
    end: int
    organs: frozenset[str]
    kind: str  # "named", "weak", "landmark", "soft", "elsewhere", "ignored"
    in_context: frozenset[str] = frozenset()


class Analysis:
    """One sentence by itself: its words, what they name, and what its clauses state.

    Attributes:
        organs: Organs it names.
        weak: Organs by weak terms.
        in_context: Organs by weak terms that count in reports which speak of them.
        landmarks: Organs named for orientation.
        soft: Organs at whose level something is: its place, if nothing else is named.
        is_elsewhere: Whether it names a place of no organ.
    """

    def __init__(self, sentence: str, lexicon: Lexicon) -> None:
        self.lexicon = lexicon
        self.text = lexicon.spelled(fold(" ".join(sentence[:LONGEST].split())))
        self.located = lexicon.located_words(self.text)
        self.words = [word for word, _, _ in self.located]
        self.mentions = find_mentions(self.located, self.text, lexicon)
        if NOT_INVADED.search(self.text):  # that is said of the neighbour
            self.mentions = [
                m._replace(kind="named") if m.kind == "landmark" and m.organs else m for m in self.mentions
            ]
        self.organs = self.of_kind("named")
        self.weak = self.of_kind("weak")
        self.in_context = frozenset(organ for mention in self.mentions for organ in mention.in_context)
        self.landmarks = self.of_kind("landmark")
        self.soft = self.of_kind("soft")
        self.is_elsewhere = any(mention.kind == "elsewhere" for mention in self.mentions)

    def of_kind(self, kind: str) -> frozenset[str]:
        return frozenset(organ for mention in self.mentions if mention.kind == kind for organ in mention.organs)

    @cached_property
    def assertions(self) -> Assertions:
        places = [(mention.start, mention.end) for mention in self.mentions if mention.kind in ("named", "elsewhere")]
        return Assertions(self.text, places, self.lexicon)

    @cached_property
    def nouns(self) -> frozenset[str]:
        """Nouns of findings in it, by which later sentences refer to it."""
        return frozenset(word for word in self.words if (word,) in self.lexicon.phrases["finding_nouns"])

    def organs_near(self, noun: str, organs: frozenset[str]) -> frozenset[str]:
        """Those of a sentence's organs that the piece with a noun names; all of them where it names no place."""
        start = next(start for word, start, _ in self.located if word == noun)
        number = self.assertions.piece_at(start)
        beside = [
            mention
            for mention in self.mentions
            if mention.kind in ("named", "elsewhere")
            and number in self.assertions.pieces_at(mention.start, mention.end)
        ]
        return organs & frozenset(organ for mention in beside for organ in mention.organs) if beside else organs

    @cached_property
    def definite_nouns(self) -> list[str]:
        """Nouns of findings behind "the", "this" or "described": what was spoken of before."""
        found = []
        for place, word in enumerate(self.words):
            if word in self.nouns:
                before = self.words[max(0, place - 4) : place]
                if any(
                    one
                    in ("the", "this", "these", "those", "described", "mentioned", "known", "aforementioned", "said")
                    for one in before
                ):
                    found.append(word)
        return found

    @cached_property
    def subject_spoken_of(self) -> str | None:
        """The noun of "The mass extends ...": what was spoken of before and is the subject here."""
        match = SUBJECT.match(self.text)
        if match is None:
            return None
        noun = american(singular(match["noun"]))
        return noun if noun in self.nouns else None

    @cached_property
    def relates(self) -> bool:
        """Whether that subject is brought into relation with what else is named: "invades the liver"."""
        match = SUBJECT.match(self.text)
        return bool(match and RELATION.match(match["verb"]))

    @cached_property
    def is_general(self) -> bool:
        return bool(self.lexicon.general.search(self.text))

    @cached_property
    def weak_beside_general(self) -> bool:
        """Whether a weak term stands in a piece of its own, beside a general remark: "nodule, follow-up in a year"."""
        return any(
            not self.lexicon.general.search(self.assertions.text, piece.start, piece.end)
            for mention in self.mentions
            if mention.kind == "weak"
            for piece in [self.assertions.pieces[self.assertions.piece_at(mention.start)]]
        )

    @cached_property
    def refers_back(self) -> bool:
        return starts_with(self.words, self.lexicon.phrases["references"])

    @cached_property
    def refers_inside(self) -> bool:
        """Whether it points back further on: "an accessory one is seen at its hilum", "within it"."""
        return any(word in ("its", "one") for word in self.words[1:]) or bool(POINTING_BACK.search(self.text))

    @cached_property
    def begins_with_pronoun(self) -> bool:
        return bool(self.words) and self.words[0] in PRONOUNS

    @cached_property
    def says_attribute(self) -> bool:
        """Whether it speaks of what every organ has, or of a side: only the organ before can be meant."""
        joined = f" {' '.join(self.words)} "
        return any(f" {' '.join(phrase)} " in joined for phrase in self.lexicon.phrases["attributes"]) or bool(
            re.search(r" (?:on|in|at) (?:the |both )?(?:left|right|side|contralateral|opposite)", joined)
        )

    @cached_property
    def has_finding(self) -> bool:
        return Status.FINDING in self.assertions.statuses

    @cached_property
    def piece_sides(self) -> list[frozenset[str]]:
        """Sides that each piece names."""
        sides: list[set[str]] = [set() for _ in self.assertions.pieces]
        for word, start, _ in self.located:
            if word in SIDES:
                sides[self.assertions.piece_at(start)].add(SIDES[word])
        return [frozenset(found) for found in sides]

    @cached_property
    def levels(self) -> frozenset[tuple[str, int]]:
        """Vertebrae by letter and number, spans filled."""
        found = set()
        for match in LEVELS.finditer(self.text):
            letter = {"th": "t", "d": "t"}.get(match[1], match[1]).upper()
            first, last = int(match[2]), int(match[3] or match[2])
            found |= {(letter, number) for number in range(first, last + 1)} or {(letter, first), (letter, last)}
        return frozenset(found)

    @cached_property
    def rib_numbers(self) -> frozenset[int]:
        found: set[int] = set()
        for match in NEAR_RIB.finditer(self.text):
            for one in NUMBERS.finditer(match[1] or match[2]):
                first, last = int(one[1]), int(one[2] or one[1])
                if 1 <= first <= last <= 12:
                    found |= set(range(first, last + 1))
        return frozenset(found)

    def pieces_about(self, organ: str) -> list[int]:
        """Pieces that speak of an organ: those that name it, and those beside them that name no place of their own.

        Without any such place every piece does.
        """
        naming = {
            number
            for mention in self.mentions
            if organ in mention.organs and mention.kind in ("named", "soft")
            for number in self.assertions.pieces_at(mention.start, mention.end)
        }
        if not naming:
            return [number for number, owner in enumerate(self.owners) if owner is None or not self.organs] or list(
                range(len(self.assertions.pieces))
            )
        return [
            number
            for number, owner in enumerate(self.owners)
            if number in naming or (owner is not None and owner in naming)
        ]

    @cached_property
    def owners(self) -> list[int | None]:
        """For each piece the piece whose place it speaks of: itself, else the one before, else the next."""
        has_place = [False] * len(self.assertions.pieces)
        for mention in self.mentions:
            if mention.kind in ("named", "elsewhere"):
                for number in self.assertions.pieces_at(mention.start, mention.end):
                    has_place[number] = True
        owners: list[int | None] = []
        for number, placed in enumerate(has_place):
            if placed:
                owners.append(number)
            else:
                earlier = [other for other in range(number) if has_place[other]]
                later = [other for other in range(number + 1, len(has_place)) if has_place[other]]
                owners.append(earlier[-1] if earlier else later[0] if later else None)
        return owners

    def pieces_of_side(self, numbers: Sequence[int], side: str) -> list[int]:
        """Those of the pieces that speak of a side: a piece that names none goes on with the last one named."""
        named: frozenset[str] = frozenset()
        kept = []
        for number in numbers:
            named = self.piece_sides[number] or named
            if not named or side in named or "both" in named:
                kept.append(number)
        return kept or list(numbers)

    def is_abnormal(self, organ: str, side: str = "") -> bool:
        """Whether a clause about the organ, or about its part on one side, states a finding (step 5)."""
        if self.is_spared(organ):
            return False
        numbers = self.pieces_about(organ)
        if side:
            numbers = self.pieces_of_side(numbers, side)
        statuses = [self.assertions.statuses[number] for number in numbers]
        if Status.FINDING in statuses:
            return True
        for number, status in zip(numbers, statuses):
            if status is Status.MEASURED and self.exceeds_limit(organ, number):
                return True
        if any(status in (Status.NORMAL, Status.DENIED, Status.NOT_EVALUATED, Status.MEASURED) for status in statuses):
            return False
        first = numbers[0] if numbers else 0
        for status in reversed(self.assertions.statuses[:first]):  # "... and its tip is in the stomach"
            if status not in (Status.NONE, Status.STATEMENT):
                return status is Status.FINDING
        return self.states_something

    def is_spared(self, organ: str) -> bool:
        """Whether it is named only as what something does not reach: "the mass does not invade the aorta"."""
        named = [mention for mention in self.mentions if organ in mention.organs and mention.kind == "named"]
        return bool(named) and all(
            any(
                low <= mention.start and mention.end <= high and SPARED.search(self.text, low, mention.start)
                for low, high in self.assertions.denied
            )
            for mention in named
        )

    @cached_property
    def states_something(self) -> bool:
        """What a sentence without any cue says: something, unless the organ is only named or shown."""
        return len(self.words) > 1 and not ONLY_SHOWN.search(self.text)

    def exceeds_limit(self, organ: str, number: int) -> bool:
        """Whether a piece gives a size above the organ's limit; the first limit whose words it holds counts."""
        sizes = self.assertions.sizes_mm(number)
        for limit in self.lexicon.limits:
            if limit.organ == organ and all(word in self.text for word in limit.words) and sizes:
                return max(sizes) > limit.above_mm
        return False

    def fits(self, part: Part) -> bool:
        """Whether it speaks of a side, a part or a number of an organ, or of all of them."""
        if part.side:
            about = self.pieces_about(part.organ)
            sides = frozenset().union(*(self.piece_sides[number] for number in about))
            if sides and part.side not in sides and "both" not in sides:
                return False
        if part.part:
            _, only, _ = self.lexicon.parts[part.part]
            names = any(self.names_part(name) for name in (part.part,))
            siblings = [
                name for name, (organ, _, _) in self.lexicon.parts.items() if organ == part.organ and name != part.part
            ]
            if not names and (only or any(self.names_part(name) for name in siblings)):
                return False
        if part.number:
            letters = [letter for letter, organ in self.lexicon.levels.items() if organ == part.organ]
            if letters:
                return not self.levels or (letters[0], part.number) in self.levels
            return not self.rib_numbers or part.number in self.rib_numbers
        return True

    def names_part(self, name: str) -> bool:
        joined = f" {' '.join(self.words)} "
        return any(f" {' '.join(words)} " in joined for words in self.lexicon.part_words[name])


def find_mentions(located: Sequence[tuple[str, int, int]], text: str, lexicon: Lexicon) -> list[Mention]:
    """Compare the words of a sentence with the lexicon, the longest term first (steps 2 and 3)."""
    words = [word for word, _, _ in located]
    mentions: list[Mention] = []
    place = 0
    landmark_end, landmark_kind = -1, "landmark"  # where a list of landmarks would go on
    while place < len(words):
        entry = longest_entry(words, place, lexicon)
        if entry is None:
            place += 1
            continue
        last = place + len(entry.words)
        if entry.organs and not entry.is_weak:
            entry = with_shared_head(words, place, last, entry, lexicon)
        kind = "ignored" if entry.is_ignored else "weak" if entry.is_weak else "named" if entry.organs else "elsewhere"
        if kind in ("named", "weak") and names_vessel(words, last, entry):
            kind = "elsewhere"
        if kind == "elsewhere" and words[place - 1 : place] == ["its"]:  # "at its hilum": of what was spoken of
            kind = "ignored"
        if kind in ("named", "elsewhere"):
            between = [word for word in words[landmark_end:place] if word not in DETERMINERS]
            goes_on = landmark_end >= 0 and (
                between in ([], ["of"])
                or (between[-1:] in (["and"], ["or"]) and len(between) <= 2 and not between[0].endswith(("ing", "ed")))
            )
            if goes_on or ends_a_span(words[:place]) or is_landmark(words[:place], lexicon, "landmarks"):
                kind = landmark_kind if goes_on else "landmark"
                landmark_kind, landmark_end = kind, last
            elif is_landmark(words[:place], lexicon, "soft_landmarks"):
                kind = landmark_kind = "soft"
                landmark_end = last
            else:
                landmark_end = -1
        context = entry.in_context if kind == "weak" else frozenset()
        mentions.append(Mention(place, last, located[place][1], located[last - 1][2], entry.organs, kind, context))
        place = last
    return narrowed(places_of_nodes(words, mentions, text, lexicon), lexicon)


def narrowed(mentions: list[Mention], lexicon: Lexicon) -> list[Mention]:
    """What is said of vertebrae at large ("spondylosis") is of the part of the spine that is named, if any is."""
    spine = lexicon.spine
    named = frozenset(
        organ
        for mention in mentions
        if len(mention.organs) == 1 and mention.kind != "weak"
        for organ in mention.organs & spine
    )
    if not named:
        return mentions
    return [
        mention._replace(organs=(mention.organs - spine) | named) if len(mention.organs & spine) > 1 else mention
        for mention in mentions
    ]


def longest_entry(words: Sequence[str], place: int, lexicon: Lexicon) -> Entry | None:
    for entry in lexicon.entries.get(words[place], ()):
        if tuple(words[place : place + len(entry.words)]) == entry.words:
            return entry
    return None


def with_shared_head(words: Sequence[str], place: int, last: int, entry: Entry, lexicon: Lexicon) -> Entry:
    """The entry of an adjective with the noun it shares: "aortic" in "aortic and mitral valves" is the aortic valve."""
    if last - place != 1 or last >= len(words):
        return entry
    heads = lexicon.phrases["shared_heads"]
    has_conjunction = False
    for other in range(last, min(len(words), last + MAX_REACH)):
        word = words[other]
        if (word,) in heads:
            if has_conjunction:
                found = longest_entry([words[place], word], 0, lexicon)
                if found is not None and len(found.words) == 2:
                    return found
            return entry
        if word in ("and", "or"):
            has_conjunction = True
        elif not (
            word in DETERMINERS or word.endswith(("ic", "al", "ar", "ary", "id", "an")) or word in ("common", "main")
        ):
            return entry
    return entry


def names_vessel(words: Sequence[str], last: int, entry: Entry) -> bool:
    """Whether an organ's name only tells which vessel is meant: "lower lobe segmental arteries"."""
    if entry.organs & {"heart", "aorta"} or entry.words[0].startswith("bronch"):
        return False
    if not (is_adjective(words[last - 1]) or words[last - 1] == "lobe"):
        return False
    if words[last - 1] in VESSELS or any(word in VESSELS for word in entry.words):
        return False
    of_segments = words[last : last + 1] in (["segmental"], ["subsegmental"])  # "... and left lower lobe branches"
    for word in words[last : last + (MAX_REACH + 2 if of_segments else MAX_REACH)]:
        if word in VESSELS:
            return True
        if not (word.endswith(("ic", "al", "ar", "ary", "main", "and", "or")) or of_segments and word in LOBE_WORDS):
            return False
    return False


def ends_a_span(before: Sequence[str]) -> bool:
    """Whether an organ tells only how far something reaches: "from T10 to the" sacrum."""
    words = [word for word in before[-8:] if word not in DETERMINERS]
    return words[-1:] == ["to"] and "from" in words[:-1]


def is_landmark(before: Sequence[str], lexicon: Lexicon, name: str) -> bool:
    """Whether the words in front of an organ make it a landmark of this list: "adjacent to the left" kidney."""
    end = len(before)
    while end and (before[end - 1] in DETERMINERS or before[end - 1] == "of" or joins_determiners(before[:end])):
        if before[end - 1] == "of":  # "adjacent to the tail of the" pancreas
            if end < 2 or before[end - 2] not in PARTS_OF_ORGANS:
                break
            end -= 1
        end -= 1
    for size in range(lexicon.longest_phrase[name], 0, -1):
        if size <= end and tuple(before[end - size : end]) in lexicon.phrases[name]:
            earlier = before[max(0, end - size - 5) : end]
            return not any((word,) in lexicon.phrases["landmark_exceptions"] for word in earlier)
    return False


def joins_determiners(before: Sequence[str]) -> bool:
    """Whether these words end in the "and" of "the right upper and middle"."""
    return before[-1] in ("and", "or") and len(before) > 1 and before[-2] in DETERMINERS - ARTICLES


def places_of_nodes(words: Sequence[str], mentions: list[Mention], text: str, lexicon: Lexicon) -> list[Mention]:
    """Organs that only say where a lymph node lies are landmarks: "perigastric nodes", "nodes in the hepatic hilum"."""
    heads = lexicon.phrases["node_heads"]
    nodes = [mention for mention in mentions if tuple(words[mention.first : mention.last]) in heads]
    if not nodes:
        return mentions
    result = list(mentions)
    for node in nodes:
        for number, mention in enumerate(mentions):
            if mention.kind not in ("named", "weak"):
                continue
            if mention.last <= node.first:
                lies_there = all(is_adjective(word) for word in words[mention.last - 1 : node.first])
            else:
                lies_there = is_place_of_node(text[node.end : mention.start], text[mention.end : mention.end + 30])
            if lies_there:
                result[number] = mention._replace(kind="landmark")
    return result


def is_adjective(word: str) -> bool:
    return word in DETERMINERS or word in NODE_WORDS or word.endswith(("ic", "al", "ar", "id", "ary", "illa"))


def is_place_of_node(between: str, after: str) -> bool:
    """Whether an organ behind a lymph node says where it lies, by the words between and after."""
    if re.search(r"[;:(]|\b(?:but|while|with|however|although)\b", between) or not PLACE_WORD.search(between):
        return False
    separated = re.search(r",|\band\b", between)
    if not separated:
        return True
    has_verb = re.search(r"\b(?:is|are|was|were|has|have)\b", between)
    begins_clause = re.match(
        r"\W*(?:\w+\W+){0,2}?(?:is|are|was|were|appears?|has|have|shows?|normal|unremarkable|clear)\b", after
    )
    return not (begins_clause and (has_verb or "," in between))


@dataclass(frozen=True)
class Placed:
    """A sentence, the organs it speaks of, and how sure that is.

    Attributes:
        is_sure: It names them; or it says nothing that an organ could miss.
    """

    text: str
    organs: frozenset[str]
    is_sure: bool
    analysis: Analysis


class Context:
    """What has been said so far in a report: the ground on which sentences without a place are understood (step 4)."""

    def __init__(self, lexicon: Lexicon, analyse) -> None:
        self.lexicon, self.analyse = lexicon, analyse
        self.has_lines = False
        self.last: frozenset[str] = frozenset()
        self.named_first: frozenset[str] = frozenset()
        self.named_last: frozenset[str] = frozenset()
        self.heading: frozenset[str] | None = None
        self.said_with: dict[str, list[frozenset[str]]] = {}
        self.spoken_of: Counter[str] = Counter()  # organ -> sentences of the report that name it
        self.is_below_head = False  # under "CHEST"

    def take_note(self, sentences: Sequence[Sentence]) -> None:
        """Count what the sentences of the report name, those to come as well."""
        for sentence in sentences:
            self.spoken_of.update(self.analyse(sentence.text).organs)

    def by_weak_terms(self, analysis: Analysis) -> frozenset[str]:
        """Organs of a sentence that only weak terms name, by what the report is about."""
        if not self.spoken_of:
            return analysis.weak
        in_context = analysis.in_context - ORGANS_OF_THE_HEAD if self.is_below_head else analysis.in_context
        if not in_context:
            return self.known_of(analysis)
        either = (analysis.weak | in_context) & self.last
        if either:
            return either
        most = max(self.spoken_of, key=lambda organ: (self.spoken_of[organ], organ))
        if most in in_context:
            return frozenset([most])
        if analysis.weak and not any(organ in self.spoken_of for organ in analysis.weak):
            return frozenset(organ for organ in in_context if organ in self.spoken_of) or analysis.weak
        return analysis.weak

    def known_of(self, analysis: Analysis) -> frozenset[str]:
        """Where two weak terms mean different organs ("basal infarct"), those that the report speaks of."""
        named = {mention.organs for mention in analysis.mentions if mention.kind == "weak" and mention.organs}
        known = [organs for organs in named if any(organ in self.spoken_of for organ in organs)]
        return frozenset().union(*known) if known and len(named) > 1 else analysis.weak

    def begin_section(self, sentences: Sequence[Sentence]) -> None:
        self.last, self.heading, self.is_below_head = frozenset(), None, False
        self.has_lines = sum(sentence.begins_line for sentence in sentences) > 1

    def begin_region(self, name: str) -> None:
        self.heading, self.last = None, frozenset()
        self.is_below_head = BELOW_HEAD.search(name) is not None

    def place(self, sentence: Sentence) -> Placed | None:
        """The organs of the next sentence; None for a heading, which says nothing by itself."""
        if sentence.begins_block:
            self.heading = None
        text = body = sentence.text
        if self.is_heading_line(sentence):
            return None
        if (region := REGION_HEADING.match(text)) is not None:  # "ABDOMEN: the liver is normal"
            self.begin_region(region[0])
            body = text[region.end() :]
            if self.has_lines and sentence.begins_line:
                text = body
        analysis = self.analyse(body)
        if self.lexicon.remarks.search(analysis.text):
            return Placed(text, frozenset(), True, analysis)
        own: frozenset[str] = frozenset()
        if (head := heading_of(body)) is not None and not self.says_finding(named := self.analyse(head)):
            behind = self.analyse(body[len(head) + 1 :])
            if behind.organs < named.organs and behind.organs and self.names_only(named) and body.count(":") == 1:
                own = behind.organs  # "LUNGS AND AIRWAYS: the central airways are patent"
            if named.organs or named.is_elsewhere or named.weak:
                self.heading = named.organs or (frozenset() if named.is_elsewhere else self.by_weak_terms(named))
            elif not named.words or RESETTING.search(named.text):
                self.heading = None
        organs, is_sure = (own, True) if own else self.organs_of(analysis)
        if not (self.last and analysis.words[:1] == ["it"]) and (
            organs or not (analysis.is_general or analysis.begins_with_pronoun)
        ):
            self.last = organs  # "It invades the liver. It measures 5 cm.": of what the first "it" was
        named = [mention.organs for mention in analysis.mentions if mention.organs and mention.kind != "weak"]
        if named:
            self.named_first, self.named_last = named[0], named[-1]
        for noun in analysis.nouns:
            if organs or analysis.is_elsewhere:
                self.said_with.setdefault(noun, []).append(analysis.organs_near(noun, organs))
        return Placed(text, organs, is_sure and len(text) <= LONGEST, analysis)

    def is_heading_line(self, sentence: Sentence) -> bool:
        """Take note of a line that is a heading: "LIVER:", "Lungs and pleura"."""
        text = sentence.text
        is_alone = text.endswith((":", " -", " –")) and len(text) <= MAX_HEADING
        if not is_alone and not (sentence.is_line and len(text.split()) <= 8 and len(text) <= MAX_HEADING):
            return False
        if REGION_LINE.match(text):  # what stands under "ABDOMEN" is of any organ there
            self.begin_region(text)
            return True
        named = self.analyse(text.rstrip(" :-–"))
        if self.says_finding(named) or not (is_alone or (named.mentions and self.names_only(named))):
            return is_alone and not named.mentions
        if named.organs or named.is_elsewhere or named.weak:
            self.heading = named.organs or (frozenset() if named.is_elsewhere else self.by_weak_terms(named))
        else:
            self.heading = None
        self.last = self.heading or frozenset()
        return True

    def says_finding(self, analysis: Analysis) -> bool:
        """Whether words that might be a heading state something: "Coronary calcium: moderate"."""
        return any(self.lexicon.patterns[cue].search(analysis.text) for cue in ("abnormal", "definite"))

    def names_only(self, analysis: Analysis) -> bool:
        """Whether it consists of places and the words between them."""
        names = {
            place
            for mention in analysis.mentions
            if mention.organs or mention.kind != "weak"
            for place in range(mention.first, mention.last)
        }
        return all(place in names or word in HEADING_WORDS for place, word in enumerate(analysis.words))

    def organs_of(self, analysis: Analysis) -> tuple[frozenset[str], bool]:
        """Organs of a sentence, and whether they are sure."""
        subject = analysis.subject_spoken_of
        referred = self.lookup(subject, analysis) if subject else None
        if not analysis.organs and analysis.words[:1] == ["the"] and analysis.words[1:2] in (["latter"], ["former"]):
            return (self.named_last if analysis.words[1] == "latter" else self.named_first), False
        if analysis.organs:
            if referred and analysis.relates:
                return analysis.organs | referred, True
            if analysis.begins_with_pronoun and not analysis.is_general and self.last:
                refers = analysis.words[0] in ("it", "its", "they") or starts_with(analysis.words, POINTERS)
                return analysis.organs | (self.last if refers else frozenset()), True
            return analysis.organs, True
        if analysis.is_elsewhere:
            if referred:
                return referred, False
            refers = (
                analysis.words[:1] in (["it"], ["its"], ["they"]) or starts_with(analysis.words, POINTERS)
            ) and not analysis.is_general
            return (self.last, False) if refers else (frozenset(), True)
        weak = self.by_weak_terms(analysis)
        if analysis.soft and (not weak or analysis.weak & analysis.soft):
            return (analysis.weak & analysis.soft) or analysis.soft, False
        if analysis.is_general and not analysis.weak_beside_general:
            return frozenset(), True
        if self.heading is not None:
            return (weak & self.heading) or self.heading, True
        for noun in analysis.definite_nouns:
            if (said := self.lookup(noun, analysis)) is not None:
                return said, False
        if analysis.refers_back and not analysis.is_general and (self.last or not weak):
            paired = self.last & self.lexicon.paired
            return (paired if paired and any(analysis.piece_sides) else self.last), not analysis.has_finding
        if analysis.refers_inside and not analysis.is_general and self.last:
            return self.last, False
        if weak:
            shared = weak & self.last
            return shared or weak, bool(shared)
        if analysis.says_attribute and self.last and not analysis.is_general:
            return self.last, False
        return frozenset(), not (analysis.has_finding or analysis.landmarks)

    def lookup(self, noun: str, analysis: Analysis) -> frozenset[str] | None:
        """Organs of the last sentence with this noun; with a side, of the last one about a paired organ."""
        said = self.said_with.get(noun)
        if not said:
            return None
        if any(analysis.piece_sides):
            paired = [organs for organs in said if organs & self.lexicon.paired]
            if paired:
                return paired[-1]
        return said[-1]

    def recall(self, placed: Placed) -> Placed:
        """An impression's sentence without a place has that of the findings' sentences with the same nouns."""
        analysis = placed.analysis
        if (
            analysis.is_general
            or analysis.organs
            or analysis.is_elsewhere
            or (placed.organs and not placed.organs <= analysis.weak)
        ):
            return placed
        said = [organs for noun in sorted(analysis.nouns) for organs in self.said_with.get(noun, [])]
        if not said:
            return placed
        different = set(said)
        if placed.organs:  # by a weak term alone: kept where the findings agree
            return (
                placed
                if any(placed.organs & organs for organs in different)
                else Placed(placed.text, frozenset(), False, analysis)
            )
        organs = different.pop() if len(different) == 1 else frozenset()
        return Placed(placed.text, organs, False, analysis)


def heading_of(sentence: str) -> str | None:
    """What stands before the colon of "LIVER: normal." or the dash of "Lungs - clear.", if it is short."""
    match = HEADING.match(sentence)
    if match is None or match["head"].count("(") > match["head"].count(")"):  # "heart size (CTR: 0.5) is normal"
        return None
    if match["mark"].strip() != ":" and (not match["head"][:1].isupper() or len(match["head"].split()) > 5):
        return None
    return match["head"]


def place_sentences(
    findings: Sequence[Sentence], impression: Sequence[Sentence], lexicon: Lexicon
) -> tuple[list[Placed], list[Placed]]:
    """The sentences of both sections with their organs (steps 2 to 4). The impression refers to the findings."""
    context = Context(lexicon, cached_analysis(lexicon))
    context.take_note([*findings, *impression])
    context.begin_section(findings)
    of_findings = [placed for sentence in findings if (placed := context.place(sentence))]
    told = {noun: list(said) for noun, said in context.said_with.items()}
    context.begin_section(impression)
    context.said_with = {}
    of_impression = []
    for sentence in impression:
        placed = context.place(sentence)
        if placed is not None:
            earlier, context.said_with = context.said_with, told
            placed = context.recall(placed)
            context.said_with = earlier
            of_impression.append(placed)
    return of_findings, of_impression


def cached_analysis(lexicon: Lexicon):
    """`Analysis` of a sentence, kept for the sentences that reports repeat."""
    kept = lexicon.kept_analyses

    def analyse(text: str) -> Analysis:
        found = kept.get(text)
        if found is None:
            if len(kept) >= CACHED_SENTENCES:
                kept.clear()
            found = Analysis(text, lexicon)
            if len(text) < 300:
                kept[text] = found
        return found

    return analyse


def organs_of_sentences(sentences: Sequence[str], lexicon: Lexicon) -> list[frozenset[str]]:
    """For every sentence of one section the organs it speaks of (steps 2 to 4); none for a heading."""
    context = Context(lexicon, cached_analysis(lexicon))
    all_sentences = [Sentence(text, False, False, True) for text in sentences]
    context.take_note(all_sentences)
    found = []
    for sentence in all_sentences:
        placed = context.place(sentence)
        found.append(frozenset() if placed is None else placed.organs)
    return found


def is_abnormal_sentence(sentence: str, lexicon: Lexicon) -> bool:
    """Whether a sentence states a finding, whatever it is about (step 5)."""
    assertions = judge_sentence(sentence, lexicon)
    if Status.FINDING in assertions.statuses:
        return True
    said = (Status.NORMAL, Status.DENIED, Status.NOT_EVALUATED, Status.MEASURED)
    return not any(status in said for status in assertions.statuses) and bool(WORD.search(assertions.text))


def is_english(text: str, lexicon: Lexicon) -> bool:
    """Whether a text of some length holds enough words that English reports are made of."""
    words = [word for word in WORD.findall(fold(text[:5000])) if len(word) > 1 and word.isalpha()]
    if len(words) < MIN_ENGLISH_WORDS:
        return True
    known = sum(word in FUNCTION_WORDS or american(singular(word)) in lexicon.vocabulary for word in words)
    return known >= MIN_ENGLISH * len(words)


def decompose_report(
    findings: str,
    impression: str,
    organs: Sequence[str],
    lexicon: Lexicon,
    report_id: str = "",
    rules=None,
) -> Decomposition:
    """Split a report by organ, and tell what is uncertain and what was wrong with the text.

    Args:
        organs: Organs wanted. Only those that the report speaks of appear, in that order.
        rules: Rules of findings (`report_labels.load_finding_rules`), for the labels; None: no labels.
    """
    findings, notes = clean(findings)
    impression, more = clean(impression)
    notes.update(more)
    if not (findings.strip() or impression.strip()):
        notes["empty"] = 1
        return Decomposition(report_id, {}, notes=dict(notes))
    if not is_english(f"{findings} {impression}", lexicon):
        notes["not_english"] = 1
        unread = tuple(sentence.text for section in report_sentences(findings, impression) for sentence in section)
        return Decomposition(report_id, {}, uncertain_sentences=unread, notes=dict(notes))
    sentences = report_sentences(findings, impression)
    if num_long := sum(len(sentence.text) > LONGEST for section in sentences for sentence in section):
        notes["long_sentences"] = num_long
    of_findings, of_impression = place_sentences(sentences.findings, sentences.impression, lexicon)
    texts = {}
    for organ in organs:
        parts = lexicon.resolve(organ)
        said, is_abnormal = [], False
        for section in (of_impression, of_findings):
            spoken = [
                (placed, about)
                for placed in section
                if (about := [part for part in parts if part.organ in placed.organs and placed.analysis.fits(part)])
            ]
            said.append(tuple(placed.text for placed, _ in spoken))
            is_abnormal = is_abnormal or any(
                placed.analysis.is_abnormal(part.organ, part.side) for placed, about in spoken for part in about
            )
        if any(said):
            texts[organ] = OrganText(said[0], said[1], is_abnormal)
    uncertain = tuple(placed.text for placed in (*of_findings, *of_impression) if not placed.is_sure)
    labels: Labels | None = None
    if rules is not None:
        labels = rules.label([*of_impression, *of_findings])
    return Decomposition(report_id, texts, labels=labels, uncertain_sentences=uncertain, notes=dict(notes))


def decompose(findings: str, impression: str, organs: Sequence[str], lexicon: Lexicon) -> dict[str, OrganText]:
    """Split a report by organ. Only organs of `organs` that the report speaks of appear, in that order."""
    return decompose_report(findings, impression, organs, lexicon).organs


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
