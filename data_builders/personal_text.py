"""What in a text or an id seems to name a person: dates, names, numbers of records, ways to reach somebody.

Made to be right where it speaks, in English and German: a measurement, a vertebra, a fraction, a section number or a
year alone is none. It finds what is obvious. A text in which it finds nothing may still name somebody.
"""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache, lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import yaml

GIVEN_NAMES = Path(__file__).resolve().parent.parent / "hub_configs" / "privacy" / "given_names.yaml"
UID = re.compile(r"(?<![\w.])[0-2](?:\.\d+){5,}(?![\w.]*\d)")  # as DICOM writes them

# Pieces of dates. Day and month of two digits, with their zero, are asked for where one digit would fit too much else.
_DAY, _MONTH, _YEAR = r"(?:0?[1-9]|[12]\d|3[01])", r"(?:0?[1-9]|1[0-2])", r"(?:19|20)\d\d"
_DAY_2, _MONTH_2 = r"(?:0[1-9]|[12]\d|3[01])", r"(?:0[1-9]|1[0-2])"
_NTH = r"(?:st|nd|rd|th)?"
_NO_UNIT = r"(?!\s*(?:mm|cm|ml|HU|%|x\b|×))"
_MONTH_NAME = (
    r"(?i:January|February|April|June|July|August|September|October|November|December|"
    r"Januar|Jänner|Februar|März|Maerz|Juni|Juli|Oktober|Dezember)"
)
# May and March are words as well ("2 may be cysts", "march fracture"): with a capital, and only beside a year.
_MONTH_WORD = r"(?:May|MAY|March|MARCH|Mai|MAI)"
_MONTH_SHORT = r"(?i:Jan|Feb|Mar|Mrz|Apr|Jun|Jul|Aug|Sept|Sep|Oct|Okt|Nov|Dec|Dez)\.?"
_ANY_MONTH = rf"(?:{_MONTH_NAME}|{_MONTH_WORD}|{_MONTH_SHORT})"

# Pieces of names.
_CAPITAL = r"[A-ZÄÖÜÇŞİ][\w'’-]*"
_NAME = r"[A-ZÄÖÜÇŞİ][a-zäöüßçşğı][\w'’-]*"  # no abbreviation: "verified by PET" names nobody
_NO_NAME = r"(?!(?i:male|female|supine|prone|unknown|not|none|anonym\w*)\b)"  # what a blinded header says


@cache
def given_names(is_for_text: bool) -> frozenset[str]:
    """Frequent given names, lower case; for texts without those that stand in terms of medicine."""
    content = yaml.safe_load(GIVEN_NAMES.read_text(encoding="utf-8"))
    names = frozenset(content["names"].split())
    return names - frozenset(content["only_in_ids"].split()) if is_for_text else names


class Group(NamedTuple):
    """Patterns that are looked for only where the text in lower case holds something that all of them need.

    Most reports hold nothing of the kind, and there may be tens of thousands of them: the patterns alone take four
    times as long.
    """

    kind: str
    may_be_in: Callable[[str], object]
    patterns: tuple[re.Pattern, ...]


@lru_cache(maxsize=4096)  # all reconstructions of a scan have one report
def kinds_in_text(text: str) -> tuple[tuple[str, int], ...]:
    """(kind, how many) of what seems to name a person: "date", "name", "number" or "contact", sorted."""
    counts: Counter[str] = Counter()
    taken: list[tuple[int, int]] = []
    lowered = text.lower()
    for group in text_groups():
        for pattern in group.patterns if group.may_be_in(lowered) else ():
            for match in pattern.finditer(text):
                # What two patterns find counts once, under the first of them.
                if all(match.end() <= start or end <= match.start() for start, end in taken):
                    taken.append(match.span())
                    counts[group.kind] += 1
    return tuple(sorted(counts.items()))


def kinds_in_id(name: str) -> tuple[str, ...]:
    """Kinds of what an id seems to tell: a day (19700101), a name (DOE^JOHN, john_doe) or a DICOM UID."""
    kinds = []
    if any(pattern.search(name) for pattern in _id_dates()):
        kinds.append("date")
    has_given_name = any(word.lower() in given_names(False) for word in re.findall(r"[^\W\d_]+", name))
    has_form_of_name = re.search(rf"[^\W\d_]\^|\^[^\W\d_]|^{_NAME},\s?{_NAME}", name)
    if has_given_name or has_form_of_name:
        kinds.append("name")
    if UID.search(name):
        kinds.append("number")
    return tuple(kinds)


def without_dates(text: str) -> str:
    """A text with dots in the place of its dates and UIDs."""
    for group in text_groups():
        for pattern in group.patterns if group.kind == "date" else ():
            text = pattern.sub("...", text)
    return UID.sub("...", text)


@cache
def text_groups() -> tuple[Group, ...]:
    """All patterns, in the order in which they count: the day in a date of birth belongs to that."""
    return (*_names(), *_numbers(), *_contacts(), *_dates())


def _group(kind: str, needed: Sequence[str] | str, *patterns: str) -> Group:
    """`needed` is words in lower case, one of which has to be there, or a regular expression ("": always)."""
    if isinstance(needed, str):
        may_be_in = re.compile(needed).search
    else:
        may_be_in = partial(_holds_one_of, tuple(needed))
    return Group(kind, may_be_in, tuple(re.compile(pattern) for pattern in patterns))


def _holds_one_of(words: tuple[str, ...], text: str) -> bool:
    return any(word in text for word in words)


def _names() -> list[Group]:
    given = "|".join(sorted(name.capitalize() for name in given_names(True)))
    signed = (
        "signed",
        "dictated",
        "transcribed",
        "verified",
        "finalised",
        "finalized",
        "approved",
        "interpreted",
        "read",
    )
    signed_in_german = ("befundet", "diktiert", "freigegeben", "vidiert", "signiert", "unterzeichnet")
    readers = ("radiologist", "physician", "weiser", "arzt")
    by = rf"(?:\s+{_NAME}|\s*:\s*{_CAPITAL})"
    return [
        _group(
            *("name", ("dr", "prof", "mr", "ms", "herr", "frau")),
            # The titles as they are written when they are none: MR, MS and DR stand for other things in a report.
            rf"\b(?:Dr|Drs|Prof|Mr|Mrs|Ms|Herrn?|Frau)\b\.?(?:\s+(?:med|Dr|Prof|h\.\s?c)\b\.?)*\s+{_CAPITAL}",
            rf"\b(?:DR|PROF|MRS)\.\s+{_CAPITAL}",
        ),
        _group("name", ("^",), r"\b[A-ZÄÖÜ][A-Za-zÄÖÜäöüß'-]+\^[A-Za-zÄÖÜäöüß'-]+"),  # as DICOM writes them
        _group(
            *("name", ("patient", "pat.", "name")),
            rf"\b(?i:patient(?:en)?(?:'s)?[ -]?name|name des patienten|pat\. ?name)\s*[:=]\s*{_NO_NAME}{_CAPITAL}",
            rf"\b(?:[Pp]atient(?:in)?|PATIENT)\s*:\s*{_NO_NAME}{_CAPITAL}(?:,\s*|\s+){_CAPITAL}",
            rf"(?<![A-Za-z] )\b(?i:(?:first |last )?name|surname|nachname|vorname)\s*:\s*{_NO_NAME}{_CAPITAL}",
        ),
        _group(
            *("name", ("electronic", "digital", "elektronisch")),
            r"\b(?i:(?:electronically|digitally) (?:signed|approved)|elektronisch (?:signiert|unterzeichnet))\b",
        ),
        _group("name", tuple(f"{word} by" for word in signed), rf"\b(?i:{'|'.join(signed)}) (?i:by){by}"),
        _group("name", signed_in_german, rf"\b(?i:{'|'.join(signed_in_german)}) (?i:von|durch){by}"),
        _group(
            *("name", readers),
            r"\b(?i:(?:attending |reporting )?radiologist|(?:referring |attending )?physician|zuweiser|überweiser|"
            rf"oberarzt|assistenzarzt|facharzt)\s*:\s*{_NO_NAME}{_CAPITAL}",
        ),
        _group(
            *("name", ("md", "m.d.", "frcr", "phd", "ph.d")),
            rf"\b{_NAME}(?:\s+[A-Z]\.)?\s+{_NAME},?\s+(?:MD\b|M\.D\.|FRCR\b|Ph\.?D\b)",
        ),
        _group("name", "", rf"(?<![\w-])(?:{given})\s+(?:[A-Z]\.\s+)?{_NAME}"),
        _group(
            *("date", ("dob", "d.o.b.", "birth", "born", "geb")),
            r"\b(?i:DOB|D\.O\.B\.|date of birth|born on|geb\.(?: am)?|geboren am|geburtsdatum)\s*:?\s*\d[\d./-]*",
        ),
    ]


def _numbers() -> list[Group]:
    what = (
        r"MRN|medical record(?: number| no\.?)?|patient(?:en)?[ -]?(?:id|no\.|nr\.?|number|nummer)|ssn|"
        r"accession(?: number| no\.?)?|acc(?:ession)? ?#|fall(?:nummer|-nr\.?)|nhs(?: number| no\.?)|"
        r"(?:case|order|insurance) (?:number|no\.)"
    )
    needed = ("mrn", "medical record", "patient", "ssn", "acc", "fall", "nhs", "case ", "order ", "insurance ")
    return [
        _group("number", needed, rf"\b(?i:{what})\s*[:#]*\s*[A-Z]{{0,6}}[-_]?\d[\d-]{{2,}}\w*"),
        _group("number", r"\d-\d\d-\d", r"(?<![\d-])\d{3}-\d{2}-\d{4}(?![\d-])"),
        _group("number", r"[0-2]\.\d+\.\d+\.", UID.pattern),
    ]


def _contacts() -> list[Group]:
    what = ("tel", "telephone", "telefon", "phone", "fax", "pager", "mobile", "mobil", "durchwahl")
    return [
        _group("contact", ("@",), r"[\w.+-]+@[\w-]+(?:\.[\w-]+)*\.[A-Za-z]{2,}"),
        _group(
            *("contact", what),
            rf"\b(?i:{'|'.join(what)})\b\.?(?:\s*(?i:number|no\.?|nr\.?))?\s*[:.]?\s*\+?\(?\d[\d ()/-]{{4,}}\d",
        ),
        _group("contact", ("+",), r"(?<![\w.,])\+\d{1,3}[ /-]?\(?\d{1,5}\)?(?:[ /-]?\d{2,5}){2,4}(?!\d)"),
        _group("contact", r"[-.]\d{4}", r"(?<![\w.,(-])(?:\(\d{3}\) ?|\d{3}[-.])\d{3}[-.]\d{4}(?![\d-])"),
    ]


def _dates() -> list[Group]:
    before, after = r"(?<![\w./-])", r"(?!\d|[./-]\d)"
    day_month = rf"(?:{_DAY}(?P<dot>\. ?|/|-){_MONTH}(?P=dot)|{_MONTH}(?P<slash>[./-]){_DAY}(?P=slash))"
    months = "(?:jan|jän|feb|mar|mrz|mär|mae|apr|may|mai|jun|jul|aug|sep|oct|okt|nov|dec|dez)"
    return [
        _group(
            *("date", rf"{_YEAR}|\d[./]\d\d?[./]\d\d"),
            rf"{before}{_YEAR}(?P<line>[-/.]){_MONTH}(?P=line){_DAY}{after}",
            rf"{before}{_YEAR}{_MONTH_2}{_DAY_2}(?!\w|\.\d)",
            rf"{before}{day_month}{_YEAR}{after}{_NO_UNIT}",
            # A year of two digits after slashes, or after day and month with their zeros; ribs 10/11/12 are no date.
            rf"{before}(?!8/9/10|9/10/11|10/11/12)(?:{_DAY}/{_MONTH}/|{_MONTH}/{_DAY}/|{_DAY_2}\.{_MONTH_2}\.)\d\d"
            rf"{after}{_NO_UNIT}",
            rf"{before}(?:{_MONTH}/|{_MONTH_2}\.){_YEAR}{after}{_NO_UNIT}",
        ),
        _group("date", ("vom ", "am "), rf"\b(?:vom|am) {_DAY}\. ?{_MONTH}\.(?!\d)"),
        _group(
            *("date", rf"\d(?:st|nd|rd|th)?[. -]{{1,2}}(?:of )?{months}|{months}[a-zäöü.]*,?[ -](?:of )?\d"),
            rf"{before}{_DAY}{_NTH}[. -]{{1,2}}(?:of )?{_ANY_MONTH}[ ,-]+{_YEAR}(?!\d)",
            rf"{before}{_DAY_2}-{_MONTH_SHORT}-\d\d(?!\d)",
            rf"\b{_ANY_MONTH} {_DAY}{_NTH},? {_YEAR}(?!\d)",
            rf"{before}{_DAY}{_NTH}\.? (?:of )?{_MONTH_NAME}\b",
            rf"\b{_MONTH_NAME} {_DAY}{_NTH}(?![\w/]|[.,]\d){_NO_UNIT}",
            rf"\b{_ANY_MONTH},?[ -](?:of )?{_YEAR}(?!\d)",
        ),
    ]


@cache
def _id_dates() -> tuple[re.Pattern, ...]:
    forms = (
        rf"{_YEAR}([-_.]?){_MONTH_2}\1{_DAY_2}",
        rf"{_DAY_2}([-_.]?){_MONTH_2}\1{_YEAR}",
        rf"{_MONTH_2}([-_.]?){_DAY_2}\1{_YEAR}",
    )
    return tuple(re.compile(rf"(?<!\d){form}(?!\d)") for form in forms)
