"""Normal or abnormal, clause by clause: what a sentence states, denies, could not see, or only suspects.

(1) a sentence is cut into pieces: firmly at "but", ";", "(" and the like, loosely at commas, "and" and "with"
(2) what counts for nothing is blanked ("no change"), then what could not be evaluated
(3) a negation ("no", "without") reaches forward until a new statement begins; a negated verb ("was not observed", "has
    resolved") reaches back to where its statement began
(4) each piece is judged by what is left of it: a finding, normal, denied, not evaluated, or no statement of its own; a
    piece without one ("the liver" in "the liver, the spleen and the pancreas are normal") shares its neighbour's

The cues are data of the lexicon. Cues with a scope are the idea of NegEx and ConText (Chapman et al., J Biomed Inform
2001; Harkema et al., 2009); the scopes here follow the grammar of reports. Measured against medspacy's ConText with its
own rules, on the cues of this lexicon: see docs/reports.md.
"""

import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from .lexicon import Lexicon, fold

LOOSE = re.compile(
    r",\s+(?:(?:and|or|with|as well as)\s+)?|\s(?:and|as well as|plus|&|and/or)\s+|\s(?:with|along with)\s"
    r"|\s(?=without\s)"
)
# "consistent with", "compared with": no new statement.
BOUND_WITH = re.compile(
    r"(?:consistent|compatible|associated|accordance|keeping|compared|comparison|together|filled|continuity|contact|replaced"
    r"|correlat\w*|in line|agreement|concordant|relation|surrounded|covered|patient|seen|contiguous"
    r"|continuous|neighborhood)$"
)
# "the right and left lobe", "small and large bowel": two modifiers of one noun.
MODIFIER = (
    r"(?:right|left|upper|middle|lower|small|large|proximal|mid|distal|anterior|posterior|medial|lateral|superior|inferior"
    r"|central|peripheral|solid|cystic|deep|superficial|ascending|transverse|descending|internal|external|intra|extra)"
)
ENDS_IN_MODIFIER = re.compile(rf"\b{MODIFIER}$")
MODIFIER_AHEAD = re.compile(rf"{MODIFIER}\b")
BARE_VERB = re.compile(r"\b(?:is|are|was|were|remains?)$")
RELATIVE = re.compile(r"\b(?:that|which|who|whose|where)\s(?:\w+\s)?$")
# A piece that begins so is a statement of its own behind a denied one: "no effusion, mild atelectasis".
ANEW = re.compile(
    r"(?:there|this|these|it|its|a|an|the|few|several|multiple|numerous|mild|mildly|moderate|moderately|minimal|minimally"
    r"|minor|small|tiny|large|severe|marked|slight|slightly|trace|new|stable|unchanged|chronic|old|diffuse|scattered|patchy"
    r"|status|post|s/p|known|both|bilateral|left|right|possible|probable|likely|increased|decreased|old|healed|subtle|one|two"
    r"|three|prior|prominent|previous|otherwise|normal|\d)\b"
)
# Unless the list goes on to an "or": these are also said of what is denied, "no nodule, large mass or cavity".
ANEW_IN_OPEN_LIST = re.compile(
    r"(?:multiple|numerous|large|severe|marked|new|chronic|diffuse|discrete|possible|probable|increased|decreased|prominent)\b"
)
CLOSES_LIST = re.compile(r"\b(?:or|nor)\b")
NEXT_NEGATION = re.compile(r"\b(?:no|without|not)\b")
OWN_PLACE = re.compile(r"\s(?:in|at|on|within|along|throughout|around|over|involving|adjacent to|up to)\s(?!either\b)")
# One of these without an article goes on with the "no" of the first: "no nodule, mass in the lungs".
BARE_SINGULAR = re.compile(
    r"\b(?:nodule|mass|lesion|cyst|fracture|stone|calculus|focus|tumou?r|aneurysm|collection|abscess|polyp|hernia"
    r"|lymph node|dissection|dislocation|laceration|thrombus|defect|injury)"
    r"(?= (?:in|at|on|within|along|throughout|around|over|involving|adjacent)\b|$)"
)
# So does what is said of a subject named before: "the lungs, which show no nodule, are hyperinflated".
ANEW_OF_SUBJECT = re.compile(r"(?:which |that )?(?:is|are|was|were|has|have|shows?|contains?|demonstrates?|appears?)\b")
STATE_AT_END = re.compile(
    r"(?:enlarged|dilated|thickened|atrophic|fatty|tortuous|distended|contracted|prominent|calcified|ectatic|displaced"
    r"|collapsed|heterogeneous|increased|decreased|small)\W*$"
)
PREPOSITION = re.compile(r"\b(?:in|at|on|within|along|throughout)\b")
# A negated verb that denies what it speaks of, and one whose subject was named before: "... but is not visible".
EXISTS = re.compile(
    r"(?:seen|observed|detected|identified|found|demonstrated|noted|present|shown|appreciated|visuali[sz]ed|evident|apparent|visible"
    r"|resolved|disappeared|cleared|vanished|existing|no longer \w+)$"
)
ELIDED = re.compile(r"\s*(?:which|that)?\s*(?:(?:is|are|was|were|has|have|had|been|be|now|today|currently|also)\s*)*$")
NONE_BEHIND_COLON = re.compile(
    r":\s*(?:none|absent|nil|negative|no|0(?![.,]\d)|zero|not (?:seen|present|identified|observed|detected))"
    r"(?: (?:seen|present|identified|enlarged))?\s*(?=[.;,]|$)"
)
DEVICE = re.compile(
    r"\b(?:tube|catheter|drain|line|stent|cannula|lead|pacemaker|wire|port|device|filter|clip|pigtail)s?\b"
)
SIZE = re.compile(
    r"(\d+(?:[.,]\d+)?)\s?(?:x\s?(\d+(?:[.,]\d+)?)\s?)?(?:x\s?(\d+(?:[.,]\d+)?)\s?)?(mm|cm|millimet|centimet|hu\b)"
)
# What has one of these before the "or" is a statement of its own: "large effusion with atelectasis or consolidation".
OF_ONE_ITEM = re.compile(rf"{OWN_PLACE.pattern}|{SIZE.pattern}|\b(?:with|right|left|bilateral|both)\b")
MEASURE = re.compile(
    r"\b(?:measur|diamet|size|length|span|axis|dimension|thickness|calib|width|height|ratio|index|long)"
)
ONLY_SHOWN = re.compile(r"\b(?:visuali[sz]ed|included|imaged|scanned|evaluated|assessed|examined|stable|unchanged)\b")
WORDS = re.compile(r"[a-z]{3,}")
MOST_BARE_WORDS = 3  # beside a size, in a piece that says no more: "spleen 11 cm"
# Doubt about what comes behind it alone: the opacities of "opacities, suspicious for pneumonia" are there.
DOUBTS_WHAT_FOLLOWS = re.compile(
    r"(?:possibly|perhaps|maybe|may|might|could|can be|possible|suspicious|suspicion|concern|concerning|worrisome)"
    r" (?!in\b|be (?:present|seen|there)\b)\w"
)
REASON = re.compile(r"\b(?:because|due to|owing to|secondary to|as a result|by)\b.*")
LONGEST = 5_000  # characters of a sentence that are read; what is longer is no sentence


class Status(Enum):
    """What a piece of a sentence says."""

    FINDING = "finding"
    NORMAL = "normal"
    DENIED = "denied"
    NOT_EVALUATED = "not evaluated"
    MEASURED = "measured"  # a size and nothing else
    STATEMENT = "statement"  # something without a cue
    NONE = "none"


@dataclass
class Piece:
    """Part of a sentence between two boundaries.

    Attributes:
        start, end: Places in the text.
        is_firm: Whether the boundary behind it is a firm one.
        status: What it says.
        predicate: Where its statement begins, or None.
    """

    start: int
    end: int
    is_firm: bool
    status: Status = Status.NONE
    predicate: int | None = None


class Assertions:
    """The pieces of one sentence and what each says.

    Args:
        text: The sentence, folded and with its misprints mended (`Lexicon.spelled`).
        places: Where the sentence names organs or other places.
    """

    def __init__(self, text: str, places: Sequence[tuple[int, int]], lexicon: Lexicon) -> None:
        self.text = text[:LONGEST]
        self.places = [place for place in places if place[1] <= LONGEST]
        self.patterns = lexicon.patterns
        self.denied: list[tuple[int, int]] = []
        work, hidden = self.text, self.patterns["not_evaluated"]
        self.not_evaluated = [match.span() for match in hidden.finditer(work)]
        work = self.patterns["neutral"].sub(blank, hidden.sub(blank, work))
        still = [match.span() for match in self.patterns["still_there"].finditer(work)]
        for start, end in still:
            work = work[:start] + " " * (end - start) + work[end:]
        self.work = work
        self.still_there = still
        self.pieces = self.cut()
        self._starts = [piece.start for piece in self.pieces]
        self.find_verbs()
        self.find_denied()
        for piece in self.pieces:
            self.judge(piece)
        self.statuses = self.share()

    def cut(self) -> list[Piece]:
        """Step (1)."""
        firm = [match.span() for match in self.patterns["strong_boundaries"].finditer(self.work)]
        cuts = [(start, end, True) for start, end in firm]
        for match in LOOSE.finditer(self.work):
            start, end = match.span()
            if match[0].strip() == "with" and BOUND_WITH.search(self.work[max(0, start - 20) : start]):
                continue
            if match[0].isspace() and BARE_VERB.search(self.work[max(0, start - 10) : start]):
                continue  # "are without injury" is one statement
            if (
                match[0].strip() == "and"
                and MODIFIER_AHEAD.match(self.work, end)
                and ENDS_IN_MODIFIER.search(self.work[max(0, start - 12) : start])
            ):
                continue
            cuts.append((start, end, False))
        cuts.sort()
        pieces, begin = [], 0
        for start, end, is_firm in cuts:
            if start < begin:
                continue
            if self.text[begin:start].strip():
                pieces.append(Piece(begin, start, is_firm))
            elif pieces and is_firm:
                pieces[-1].is_firm = True
            begin = end
        if self.text[begin:].strip() or not pieces:
            pieces.append(Piece(begin, len(self.text), True))
        return pieces

    def first_place(self, piece: Piece) -> int | None:
        """Where a piece first names an organ or another place."""
        return next(
            (max(low, piece.start) for low, high in self.places if low < piece.end and high > piece.start), None
        )

    def pieces_at(self, start: int, end: int) -> range:
        """Indices of the pieces that hold a part of the text."""
        return range(self.piece_at(start), self.piece_at(max(start, end - 1)) + 1)

    def piece_at(self, place: int) -> int:
        """Index of the piece that holds a place of the text."""
        return max(0, bisect_right(self._starts, place) - 1)

    def find_verbs(self) -> None:
        """Verbs of main clauses, and which of them only say that something is there ("is seen")."""
        seen = [match.span() for match in self.patterns["seen"].finditer(self.work)]
        self.seen = seen
        self.verbs = []
        for match in self.patterns["verbs"].finditer(self.work):
            if RELATIVE.search(self.work[max(0, match.start() - 25) : match.start()]):
                continue
            self.verbs.append(match.start())

    def has_verb(self, start: int, end: int) -> bool:
        place = bisect_right(self.verbs, start - 1)
        return place < len(self.verbs) and self.verbs[place] < end

    def find_denied(self) -> None:
        """Step (3)."""
        for match in self.patterns["negations"].finditer(self.work):
            self.denied.append((match.start(), self.reach_forward(match)))
        for match in self.patterns["negated_verbs"].finditer(self.work):
            start = self.reach_back(match)
            said = self.work[start : match.start()]
            if match[0].endswith("absent") and not self.patterns["abnormal"].search(said):
                continue  # "the left kidney is absent" denies nothing
            if match[0].endswith("removed") and not DEVICE.search(said):
                continue  # nor does "the right lung has been removed"
            self.denied.append((start, match.end()))
        for match in NONE_BEHIND_COLON.finditer(self.work):  # "Pericardial effusion: none"
            number = self.piece_at(match.start() - 1)
            while number and not self.pieces[number - 1].is_firm:
                number -= 1
            self.denied.append((self.pieces[number].start, match.end()))
        self.denied.sort()

    def reach_forward(self, match: re.Match) -> int:
        number = self.piece_at(match.start())
        piece = self.pieces[number]
        has_verb = self.has_verb(match.end(), piece.end)
        if match[0].startswith("without") and has_verb:
            return self.verbs[bisect_right(self.verbs, match.end() - 1)]
        end = piece.end
        while not piece.is_firm and number + 1 < len(self.pieces):
            number += 1
            piece = self.pieces[number]
            if self.begins_anew(piece, has_verb):
                break
            end = piece.end
            has_verb = has_verb or self.has_verb(piece.start, piece.end)
        return end

    def begins_anew(self, piece: Piece, has_verb: bool) -> bool:
        """Whether a piece behind a denied one is a statement of its own."""
        text = self.work[piece.start : piece.end].strip()
        if ANEW.match(text) and not (ANEW_IN_OPEN_LIST.match(text) and self.goes_on_to_or(piece, OF_ONE_ITEM)):
            return True
        if has_verb and self.has_verb(piece.start, piece.end):
            return True
        if self.is_open_item(piece, text):
            return True
        if self.patterns["normal"].match(text):
            return True
        if not self.patterns["seen"].search(text) and (
            ANEW_OF_SUBJECT.match(text)
            or self.has_verb(piece.start, piece.end)
            and self.work[: piece.start].endswith(", ")  # and no "or"
        ):
            return True
        place = self.first_place(piece)
        if place is None:
            return False
        rest = self.work[place : piece.end]
        return bool(self.patterns["normal"].search(rest)) or bool(STATE_AT_END.search(rest) and not has_verb_seen(rest))

    def is_open_item(self, piece: Piece, text: str) -> bool:
        """Whether an item of a list without an "or" has its own place or size: "no effusion, scars in the apex"."""
        return bool(
            (OWN_PLACE.search(text) or SIZE.search(text))
            and self.work[: piece.start].endswith(", ")
            and self.patterns["abnormal"].search(text)
            and not BARE_SINGULAR.search(text)
            and not self.patterns["seen"].search(text)
            and not self.goes_on_to_or(piece)
        )

    def goes_on_to_or(self, piece: Piece, ending: re.Pattern | None = None) -> bool:
        """Whether the list with this piece ends in "or", and nothing stands between that is `ending` it: all of it is
        denied.
        """
        number = self.piece_at(piece.start)
        while not self.pieces[number].is_firm and number + 1 < len(self.pieces):
            number += 1
        rest = self.work[piece.start : self.pieces[number].end]
        rest = NEXT_NEGATION.split(rest, maxsplit=1)[0]
        closed = CLOSES_LIST.search(rest)
        return closed is not None and (ending is None or not ending.search(rest, 0, closed.start()))

    def reach_back(self, match: re.Match) -> int:
        number = self.piece_at(match.start())
        piece = self.pieces[number]
        earlier = [verb for verb in self.verbs if piece.start <= verb < match.start() - 12]
        if earlier and not self.is_elided(piece.start, match.start()):
            return earlier[-1]
        start = piece.start
        if number and EXISTS.search(match[0]) and self.is_elided(piece.start, match.start()):
            number -= 1
            start = self.pieces[number].start
        while number and not self.pieces[number - 1].is_firm:
            number -= 1
            before = self.pieces[number]
            text = self.work[before.start : before.end].strip()
            if (
                self.has_verb(before.start, before.end)
                or ANEW.match(text)
                and not text.startswith(("the ", "left", "right", "both", "bilateral"))
            ):
                break
            if PREPOSITION.search(text) and self.patterns["abnormal"].search(text):
                break
            if self.patterns["normal"].search(text) or self.patterns["negations"].search(text):
                break
            start = before.start
        return start

    def is_elided(self, start: int, end: int) -> bool:
        """Whether nothing but "which is" stands there: the subject was named before."""
        return bool(ELIDED.fullmatch(self.work[start:end]))

    def is_denied(self, start: int, end: int) -> bool:
        return any(low <= start and end <= high for low, high in self.denied)

    def left_of(self, piece: Piece) -> str:
        """A piece without what is denied in it."""
        characters = list(self.work[piece.start : piece.end])
        for low, high in self.denied:
            for place in range(max(low, piece.start), min(high, piece.end)):
                characters[place - piece.start] = " "
        return "".join(characters)

    def judge(self, piece: Piece) -> None:
        """Step (4) for one piece by itself."""
        left = self.left_of(piece)
        if any(piece.start <= low < piece.end for low, _ in self.not_evaluated):
            left = REASON.sub(blank, left)  # what hides an organ is not its finding
        without_normal = self.patterns["normal"].sub(blank, left)
        finding = self.patterns["definite"].search(left) or self.patterns["abnormal"].search(without_normal)
        normal = self.patterns["normal"].search(left)
        still = next((low for low, high in self.still_there if piece.start <= low < piece.end), None)
        denied = next(
            (max(low, piece.start) for low, high in self.denied if low < piece.end and high > piece.start), None
        )
        hidden = next((low for low, high in self.not_evaluated if piece.start <= low < piece.end), None)
        verb = next((verb for verb in self.verbs if piece.start <= verb < piece.end), None)
        if finding or still is not None:
            piece.status = Status.FINDING
            piece.predicate = piece.start + finding.start() if finding else still
        elif normal:
            piece.status, piece.predicate = Status.NORMAL, piece.start + normal.start()
        elif denied is not None:
            piece.status, piece.predicate = Status.DENIED, denied
        elif hidden is not None:
            piece.status, piece.predicate = Status.NOT_EVALUATED, hidden
        elif SIZE.search(left) and (MEASURE.search(left) or len(WORDS.findall(SIZE.sub(" ", left))) <= MOST_BARE_WORDS):
            piece.status, piece.predicate = Status.MEASURED, piece.start + SIZE.search(left).start()
        elif verb is not None and not any(low <= verb < high for low, high in self.seen):
            piece.status, piece.predicate = Status.STATEMENT, verb
        if verb is not None and piece.predicate is not None:
            piece.predicate = min(piece.predicate, verb)

    def share(self) -> list[Status]:
        """Statuses in which a piece without a statement has that of its neighbour."""
        statuses = [piece.status for piece in self.pieces]
        for number in reversed(range(len(statuses) - 1)):
            piece, following = self.pieces[number], self.pieces[number + 1]
            if statuses[number] is not Status.NONE or piece.is_firm:
                continue
            place = self.first_place(following)
            says = following.predicate if following.status is not Status.NONE else None
            is_list = following.status is Status.NONE and statuses[number + 1] is not Status.NONE
            relative = re.match(r"(?:which|that|who|without)\b", self.text[following.start : following.end])
            if is_list or relative or (says is not None and place is not None and place < says):
                statuses[number] = statuses[number + 1]
        for number, piece in enumerate(self.pieces[:-1]):  # "the liver and the spleen have not changed and are normal"
            following = self.pieces[number + 1]
            if (
                statuses[number] is Status.STATEMENT
                and statuses[number + 1] is Status.NORMAL
                and not piece.is_firm
                and ANEW_OF_SUBJECT.match(self.work, following.start)
            ):
                first = number
                while first and not self.pieces[first - 1].is_firm and statuses[first - 1] is Status.STATEMENT:
                    first -= 1
                statuses[first : number + 1] = [Status.NORMAL] * (number + 1 - first)
        for number, piece in enumerate(self.pieces[:-1]):  # "liver, spleen, pancreas: normal"
            if statuses[number] is Status.NONE and self.text[piece.end : piece.end + 1] == ":":
                first = number
                while first and not self.pieces[first - 1].is_firm and statuses[first - 1] is Status.NONE:
                    first -= 1
                statuses[first : number + 1] = [statuses[number + 1]] * (number + 1 - first)
        for number in range(1, len(statuses)):
            if statuses[number] is Status.NONE and not self.pieces[number - 1].is_firm:
                statuses[number] = statuses[number - 1]
        return statuses

    def sizes_mm(self, number: int) -> list[float]:
        """Every size that a piece gives, in mm."""
        piece = self.pieces[number]
        found = []
        for match in SIZE.finditer(self.text, piece.start, piece.end):
            if match[4] == "hu":
                continue
            factor = 10.0 if match[4].startswith("c") else 1.0
            found += [float(value.replace(",", ".")) * factor for value in match.groups()[:3] if value]
        return found

    def is_uncertain(self, start: int, end: int) -> bool:
        """Whether what stands there is only suspected: a cue in the same part of the sentence."""
        number = self.piece_at(start)
        low = number
        while low and not self.pieces[low - 1].is_firm:
            low -= 1
        high = number
        while high + 1 < len(self.pieces) and not self.pieces[high].is_firm:
            high += 1
        limit = self.pieces[high].end
        limit += self.text[limit : limit + 2].count("?")  # a mark behind the last word
        cues = self.patterns["uncertain"].finditer(self.text, self.pieces[low].start, limit + 1)
        return any(cue.start() < end or not DOUBTS_WHAT_FOLLOWS.match(self.text, cue.start()) for cue in cues)

    def is_historical(self, start: int) -> bool:
        piece = self.pieces[self.piece_at(start)]
        return bool(self.patterns["historical"].search(self.text, piece.start, start))


def blank(match: re.Match) -> str:
    return " " * len(match[0])


def has_verb_seen(text: str) -> bool:
    """Whether a piece ends in "is seen" with a verb: then it is no bare state of an organ."""
    return bool(re.search(r"\b(?:is|are|was|were)\b", text))


def judge_sentence(sentence: str, lexicon: Lexicon) -> Assertions:
    """The assertions of a sentence whose places are not looked for."""
    return Assertions(lexicon.spelled(fold(" ".join(sentence.split()))), (), lexicon)
