"""The text of a report -> sections -> sentences, as radiologists write them.

(1) `clean` takes out what no reader sees: HTML, Markdown marks, control characters; it counts what it took
(2) `report_sentences` finds the headers of sections ("FINDINGS:", "IMPRESSION:", "TECHNIQUE:") inside either text, and
    gives each sentence to findings or impression; history, technique and comparison are left out
(3) `split_sentences` cuts at full stops that end a sentence: not behind "approx.", "Dr.", in "5.2 mm", "4.-7. rib" or
    "L1-2."; at list marks ("1.", "2)", "-"), lines and missing blanks ("normal.The liver"). A line that only an editor
    wrapped does not end a sentence; semicolons end clauses, which is not done here.

What comes out is verbatim but for white space: list marks and section headers are left out, nothing is rewritten.
"""

import html
import re
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

# A tag, and no "<5 mm" or "a<b".
TAG = re.compile(r"<(?:/?[a-zA-Z][a-zA-Z0-9:]*(?:\s[^<>]{0,1000})?/?|!--.{0,200}?--|![a-zA-Z][^<>]{0,200})>", re.DOTALL)
BLOCK_TAG = re.compile(r"</?(?:br|p|div|li|ul|ol|tr|table|h[1-6]|section)\b", re.IGNORECASE)
INLINE_TAG = re.compile(r"</?(?:b|i|u|em|strong|span|font|small|mark|a|sup|sub)\b", re.IGNORECASE)
SCRIPT = re.compile(r"<(/?)(script|style)\b[^<>]{0,1000}>", re.IGNORECASE)
CONTROL = re.compile(
    r"[\x00-\x08\x0b\x0e-\x1f\x7f-\x84\x86-\x9f\u200b-\u200f\u202a-\u202e\u2060-\u2064\ufeff\ufffe\uffff]"
)
NEW_LINE = re.compile(r"\r\n?|\x0b|\x0c|\x85|\u2028|\u2029|_x000[dD]_\n?|\\\.br\\|\\r\\n|\\n(?=[A-Z\s\d*-])")
EMPHASIS = re.compile(r"(?<![\w*])\*\*(?=\S)|(?<=\S)\*\*(?![\w*])|(?<!\w)__(?=\S)|(?<=\S)__(?!\w)")
MARKDOWN_HEADING = re.compile(r"(?m)^[ \t]*#{1,6}[ \t]+(.*?)[ \t]*#*$")

# A full stop behind these ends no sentence. Units are not among them: "measuring 5 mm. The ..." does end there.
ABBREVIATION = re.compile(
    r"(?:\b(?:dr|prof|mr|mrs|ms|st|vs|prev|approx|ca|cf|fig|figs|e\.?g|i\.?e|resp|incl|max|min|rt|lt|bilat|ant|post|sup|inf"
    r"|lat|med|art|lig|seg|segm|ser|im|img|avg|diam|resp|temp|a\.p|i\.v|p\.o|w\.?r\.?t|st\. ?p|z\. ?n|s\. ?p|dept|vol"
    r"|susp|poss|prob|hx|h/o|r/o|c/w|w/o|inc|para|dd|ddx|cont|eval"
    r"|(?:after|with|without|no|via|by|heart|vessels|structures) iv)"  # not "segments II, IV."
    r"|\b(?:dr|prof)\.? [A-Z]|(?<=[A-Z]\. )[A-Z]|^[A-Z])\.$",
    re.IGNORECASE,
)
LONGEST_ABBREVIATION = 16  # characters, with what has to stand before it
NUMBERED = re.compile(r"\b(?:no|nr|image|im|series|se|grade|type|stage|figure|fig|slice|level)\.$", re.IGNORECASE)
WHOLE_WORD = re.compile(r"\b[a-z]{3,}(?:ed|al|ng|es|ion|um|ss|ht|ft|en|ly|us|as|ys|nd|nt|ts)[.?!]$")  # no abbreviation
ORDINAL = re.compile(r"(?:^|[\s(])\d{1,2}\.$")
STOP = re.compile(
    r"(?<=[.?!])[\"')\]]*\s+"  # a blank behind the stop
    r"|(?<=[a-z)\]%]\.)(?=[A-Z][a-z])"  # "is normal.The liver"
    r"|(?<=[a-z0-9]{2}\.)(?=(?:No|The|There|A|An|Both|Right|Left|It)\b)"  # "5 mm.No effusion"
    r"|(?<=[A-Z]{3}\.)(?=[A-Z]{3,}\b)"  # "IS NORMAL.THE LIVER"
    r"|(?<=\d [mc]m\.)(?=[A-Z])"
)
LIST_MARK = re.compile(
    r"^(?:#\s?\d{1,2}[.):]?\s*|\(?\d{1,2}\s?[.)]\s*(?=[A-Z])|\(?\d{1,2}\s?[.)]\s+(?!(?:rib|vertebra|costa)\b)"
    r"|\d{1,2}\s?[-–:]\s?(?=[A-Z])|\(?[a-hA-H]\)\s*(?=[A-Z])|[ivx]{1,4}[.)]\s+(?=[A-Z])|[lI|][.)]\s+(?=[A-Z])|(?:[-*•–—‣●▪◦·+>→■□]|=>|->|o(?=\s+[A-Z]))+\s*)"
)
BARE_MARK = re.compile(r"[\s(#]*(?:\d{1,2}|[a-hA-H]|[ivx]{1,4})\s?[.):]?|[\W_]*")
LETTER = re.compile(r"[^\W\d_]")
# The last word of a line that goes on in the next, whatever letter that begins with.
OPEN_END = re.compile(
    r"(?:[,(/-]|\b(?:the|a|an|and|or|nor|of|in|on|at|to|with|without|no|from|by|for|is|are|was|were|be|as|than|both|this"
    r"|that|which|into|near|within|between|through|measuring|measures|left|right|upper|lower|approximately|about|up))$",
    re.IGNORECASE,
)

CAPITAL_HEADING = re.compile(r"[A-Z][A-Z /&,()-]{2,40}:(?!\d)")  # "BONES:" ends even a line that was cut off

# Items that stand on one line with a wide gap between them, and no stop.
WIDE_GAP = re.compile(r"(?<=[a-z0-9)\]?%])(?: {2,}|\t+ *)(?=[A-Z])")

SECTIONS = {
    "findings": r"f[il1]nd[il1]ngs?"  # and as scanned
    r"|(?:ct |radiolog(?:y|ical) |imaging |positive |other |additional |incidental )findings"
    r"|(?:ct )?report|description|narrative|observations?|results?|body of report|findings and comments?",
    "impression": r"[il1]mpress[il1]ons?|conclusions?|comments?|opinion|summary|assessment|interpretation"
    r"|(?:final |radiological |ct )?(?:diagnosis|impression)|(?:impression|conclusion) and (?:plan|recommendations?)"
    r"|overall impression|findings/impression|imp|key findings",
    "other": r"technique|procedure|protocol"
    r"|(?:clinical |relevant |medical |patient |past |brief )*"
    r"(?:history|information|indications?|data|details|context|question|background|presentation)"
    r"|indications?(?: for (?:exam(?:ination)?|study))?"
    r"|reasons? for (?:the )?(?:exam(?:ination)?|study|visit|referral)"
    r"|comparisons?(?: stud(?:y|ies))?|prior(?:s| stud(?:y|ies))?"
    r"|exam(?:ination)?(?: (?:date|type|performed))?|study(?: (?:date|type))?|modality"
    r"|dose|radiation(?: dose)?|dlp|ctdi(?:vol)?|contrast(?: (?:media|agent|material))?|scan range|method(?:s|ology)?"
    r"|electronically signed(?: by)?|signed(?: by)?|dictated(?: by)?|(?:attending |reporting )?radiologist"
    r"|patient(?: (?:id|name|age|sex))?|age|sex|name|mrn|accession(?: (?:no|number))?"
    r"|date(?: of (?:exam(?:ination)?|birth|study))?|referring physician|critical results?|disclaimer",
}
SECTION_OF = [(kind, re.compile(rf"(?:{names})(?: section)?", re.IGNORECASE)) for kind, names in SECTIONS.items()]
ANY_SECTION = "|".join(f"(?:{names})(?: section)?" for names in SECTIONS.values())
# At the beginning of a line or a sentence, up to a colon; alone on its line; in capitals before a dash.
SECTION_HEADER = re.compile(
    rf"(?:(?<=\n)|\A|(?<=[.?!:;\])])[ \t]+|(?<=[a-z]\.))[ \t]*(?:\d{{1,2}}[.)]\s*)?(?P<name>{ANY_SECTION})"
    rf"(?:[ \t]*:(?!\d)[ \t]*-?|[ \t]*(?=\n|\Z)|[ \t]+[-–—][ \t]+)",
    re.IGNORECASE,
)
FURTHER = re.compile(r"other|additional|incidental", re.IGNORECASE)  # "Other findings:" come behind the findings
OTHERS_END = re.compile(r"(?<=\S)[ \t]*\n\s*(?=[^\sa-z])")
SENTENCE_END = re.compile(r"(?<=[a-z\d]{2}\.)\s+(?=[A-Z])")
DASHED_HEADER = re.compile(r"[-–—]\s*$")


class Sentence(NamedTuple):
    """One sentence and how it stands in its text.

    Attributes:
        text: The sentence.
        begins_block: First after a blank line or a section header: what a heading before it said has ended.
        is_line: It is a line of its own that no full stop ends, as a heading is.
        begins_line: It begins a line or a list item.
    """

    text: str
    begins_block: bool
    is_line: bool
    begins_line: bool


class ReportSentences(NamedTuple):
    findings: list[Sentence]
    impression: list[Sentence]


def clean(text: str) -> tuple[str, Counter]:
    """The text without what is not language, and how often what was found: `html`, `control_characters`."""
    found: Counter = Counter()
    if "<" in text or "&" in text:
        stripped = without_scripts(text)
        stripped, num_tags = TAG.subn(in_place_of_tag, stripped)
        unescaped = html.unescape(stripped) if "&" in stripped else stripped
        if num_tags or unescaped != stripped:
            found["html"] = num_tags + (unescaped != stripped)
        text = unescaped
    text = NEW_LINE.sub("\n", text)
    text, num_control = CONTROL.subn(" ", text)
    if num_control:
        found["control_characters"] = num_control
    if "**" in text or "__" in text:
        text = EMPHASIS.sub("", text)
    if "#" in text:
        text = MARKDOWN_HEADING.sub(lambda line: line[1] if line[1].endswith((":", ".")) else f"{line[1]}:", text)
    return text.replace("\xa0", " ").replace("\xad", ""), found


def in_place_of_tag(tag: re.Match) -> str:
    return "\n" if BLOCK_TAG.match(tag[0]) else "" if INLINE_TAG.match(tag[0]) else " "


def without_scripts(text: str) -> str:
    """Without what stands between <script> or <style> and its end."""
    kept, start, is_inside = [], 0, False
    for tag in SCRIPT.finditer(text):
        if not is_inside:
            kept.append(text[start : tag.start()])
        is_inside, start = not tag[1], tag.end()
    return "".join([*kept, text[start:]]) if kept else text


def section_of(name: str) -> str:
    return next(kind for kind, pattern in SECTION_OF if pattern.fullmatch(name.strip()))


def split_sections(text: str, default: str) -> Iterator[tuple[str, str]]:
    """(section, its text) in the order of the text; what stands before the first header belongs to `default`."""
    kind, start = default, 0
    headers = list(SECTION_HEADER.finditer(text))
    names_findings = any(
        section_of(header["name"]) == "findings" and not FURTHER.match(header["name"]) for header in headers
    )
    for header in headers:
        if DASHED_HEADER.search(header[0]) and ":" not in header[0] and not header["name"].isupper():
            continue  # "No findings - stable" and the like
        yield kind, text[start : header.start()]
        kind, start = section_of(header["name"]), header.end()
        if kind == "other" and not names_findings:
            # Nothing says where the findings begin: with the next line that does not go on with the header's own text.
            end = OTHERS_END.search(text, start) or SENTENCE_END.search(text, start)
            if end and end.start() > start and end.end() < len(text):
                yield kind, text[start : end.start()]
                kind, start = default, end.end()
    yield kind, text[start:]


def report_sentences(findings: str, impression: str) -> ReportSentences:
    """The sentences of a cleaned report by section, wherever its headers put them (step 2)."""
    found: dict[str, list[Sentence]] = {"findings": [], "impression": [], "other": []}
    for text, default in ((findings, "findings"), (impression, "impression")):
        for kind, part in split_sections(text, default):
            found[kind] += find_sentences(part)
    return ReportSentences(found["findings"], found["impression"])


def split_sentences(text: str) -> list[str]:
    """Cut a section of a report into sentences, without list marks (step 3)."""
    return [sentence.text for sentence in find_sentences(text)]


def find_sentences(text: str) -> list[Sentence]:
    """Cut a section into sentences and say how each stands."""
    sentences = []
    starts_small = begins_small(text)
    for item, begins_block in list_items(text):
        pieces, start = [], 0
        for match in STOP.finditer(item):
            if goes_on(
                item[max(start, match.start() - 40) : match.start()], item[match.end() : match.end() + 1], starts_small
            ):
                continue
            pieces.append(item[start : match.end()])
            start = match.end()
        pieces.append(item[start:])
        kept = [piece for piece in map(str.strip, pieces) if LETTER.search(piece) and not BARE_MARK.fullmatch(piece)]
        kept = [LIST_MARK.sub("", piece) or piece for piece in kept]
        for number, piece in enumerate(kept):
            is_line = len(kept) == 1 and piece[-1] not in ".?!"
            sentences.append(Sentence(piece, begins_block and number == 0, is_line, number == 0))
    return sentences


def begins_small(text: str) -> bool:
    """Whether sentences of this text begin with small letters, as in some dictations."""
    ends = re.findall(r"[a-z0-9)]\s?[.?!]\s+([^\W\d_])", text)
    return len(ends) >= (1 if text.lstrip()[:1].islower() else 2) and sum(
        letter.islower() for letter in ends
    ) > 0.5 * len(ends)


def goes_on(before: str, after: str, starts_small: bool) -> bool:
    """Whether a stop between these words and this character ends no sentence."""
    if not after:
        return False
    end = before[-LONGEST_ABBREVIATION:]  # a search from further back finds nothing else, and takes its time
    if not end[-2:-1].isdigit() and ABBREVIATION.search(end) or (after.isdigit() and NUMBERED.search(end)):
        return True
    if after.islower() and not (starts_small or WHOLE_WORD.search(before)):
        return True
    return not after.isupper() and bool(ORDINAL.search(before[-4:]))  # "the 4. and 5. rib"


def list_items(text: str) -> Iterator[tuple[str, bool]]:
    """Lines put together again where they were wrapped, cut at the marks of lists; and whether a block begins there."""
    text = WIDE_GAP.sub("\n", text)
    begins_block = True
    for block in re.split(r"\n[ \t]*\n\s*", text.strip()):
        for line in unwrap(block):
            for item in enumerated(" ".join(line.split())):
                yield item, begins_block
                begins_block = False
        begins_block = True


def unwrap(block: str) -> Iterator[str]:
    """The lines of a block as they were before an editor wrapped them."""
    lines = [line.strip() for line in block.split("\n") if line.strip()]
    if not lines:
        return
    letters = [character for character in block if character.isalpha()]
    is_capitals = sum(map(str.isupper, letters)) > 0.7 * len(letters)
    longest = max(map(len, lines))
    current = lines[0]
    for previous, line in zip(lines, lines[1:]):
        if joins(previous, line, is_capitals, longest):
            current += " " + line
        else:
            yield current
            current = line
    yield current


def joins(line: str, following: str, is_capitals: bool, longest: int) -> bool:
    """Whether a line goes on in the next one."""
    if LIST_MARK.match(following) or CAPITAL_HEADING.match(following):
        return False
    if line[-1] in ".?!:":
        return following[0].islower() and line[-1] != ":"
    if following[0].islower() or OPEN_END.search(line):
        return True
    if ":" in following[:60] and following[0].isupper():
        return False
    is_full = longest >= 50 and len(line) + len(following.split()[0]) >= longest - 2
    return is_full and (is_capitals or following[0].isdigit() or following[:3].isupper() or following[0] == "(")


def enumerated(line: str) -> Iterator[str]:
    """Cut "1. ... 2. ..." on one line, and take the list marks off."""
    first = re.search(r"(?:(?<=[:.;] )|(?<=:))\(?1\s?[.)]\s*(?=[A-Z])", line)
    if first and not LIST_MARK.match(line):  # "Impression of the study: 1. ..."
        yield line[: first.start()].strip()
        line = line[first.start() :]
    number = 1
    # Only while the numbers go up by one from the beginning: "is seen in segment 7. A second lesion" is no enumeration.
    while (mark := LIST_MARK.match(line)) and mark[0].strip("(). -–#:") == str(number):
        number += 1
        following = re.search(rf"(?<=[\s.;,?])[(#]?{number}\s?(?:[.)]\s*|[-–]\s?)(?=[A-Z])", line[mark.end() :])
        if following is None:
            break
        cut = mark.end() + following.start()
        yield line[mark.end() : cut].strip()
        line = line[cut:]
    yield LIST_MARK.sub("", line)
