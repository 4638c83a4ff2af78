"""A page of reports in which the sentences of every organ have its colour: one HTML file, to look at a split by organ.

    python -m data_builders report-page --split split.json --page out/reports.html
    python -m data_builders report-page --split split.json --reports reports.csv --page out/reports.html --most 50

The file stands alone: no script, no font, no address outside. A sentence of several organs is striped in their colours,
and behind each stands whose it is, for readers who do not tell colours apart. Above the reports one organ can be
chosen, whose sentences then stand out. What a split says but the report does not is listed below its section.
"""

import argparse
import colorsys
import re
from collections import Counter
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, StrictUndefined

from .cases import counted
from .decomposition_files import SECTIONS, organs_of, read_decompositions, sentences_of, with_texts
from .report_files import add_columns_argument
from .shards import write_text
from .summary import console

MOST_REPORTS = 200
LIGHTNESS, SATURATION = 0.85, 0.9  # pale enough for dark text (6 : 1 and more), and still told apart

STYLE = """\
:root { color: #1b1b1b; background: #fff; font: 16px/1.5 system-ui, sans-serif; }
body { margin: 0 auto; max-width: 70rem; padding: 1rem; overflow-wrap: anywhere; }
h1, h2, h3 { line-height: 1.2; }
h2 { border-bottom: 2px solid #1b1b1b; margin-top: 2.5rem; }
a { color: #0b4f8a; }
.aside { font-size: .9rem; color: #404040; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; margin: 1rem 0; font-size: .9rem; overflow-wrap: normal; }
caption { text-align: left; font-weight: 600; padding: .3rem 0; white-space: nowrap; }
th, td { border: 1px solid #767676; padding: .2rem .5rem; text-align: right; vertical-align: top; white-space: nowrap; }
thead th { background: #eef1f4; text-align: left; }
tbody th { text-align: left; font-weight: 400; }
td.text { text-align: left; white-space: normal; min-width: 12rem; overflow-wrap: anywhere; }
.loud { color: #9b1c1c; font-weight: 600; }
@media print { :root { font-size: 10pt; } body { max-width: none; padding: 0; } .wide { overflow: visible; } }
"""

TEMPLATE = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Reports by organ: {{ name }}</title>
<style>
{{ style }}
.choice { display: flex; flex-wrap: wrap; gap: .3rem .6rem; border: 1px solid #767676; padding: .5rem; }
.choice label, .whose { padding: 0 .3rem; border-radius: .2rem; }
.text { white-space: pre-line; line-height: 2; }
.said { padding: .15rem .1rem; border-radius: .2rem; -webkit-box-decoration-break: clone; box-decoration-break: clone; }
.said.uncertain { border-bottom: 2px dashed #9b1c1c; }
.said sup { font-size: .65rem; line-height: 1; margin-left: .2rem; }
.said sup b { text-decoration: underline; }
article { break-inside: avoid; border-left: .3rem solid #d5dde6; padding-left: 1rem; margin: 1.5rem 0; }
{% for organ in organs %}
.o{{ loop.index0 }} { background: {{ colors[loop.index0] }}; }
{% endfor %}
{% for stripes in striped %}
.{{ stripes.name }} { background: {{ stripes.background }}; }
{% endfor %}
{% for organ in organs %}
body:has(#c{{ loop.index0 }}:checked) .said:not(.h{{ loop.index0 }}) { background: none; color: #595959; }
{% endfor %}
</style>
</head>
<body>
<header>
<h1>Reports by organ: {{ name }}</h1>
<p>{{ shown }}</p>
<p class="aside">For research only, not for diagnosis. This page holds the reports: their terms hold for the page as well.
Underlined: the organ is abnormal in this report.{% if has_uncertain %} A dashed line: the split was not sure.{% endif %}</p>
<form><fieldset class="choice"><legend>Organ that stands out</legend>
<label><input type="radio" name="organ" id="all" checked> all</label>
{% for organ in organs %}
<label class="o{{ loop.index0 }}"><input type="radio" name="organ" id="c{{ loop.index0 }}"> {{ organ }} ({{ counts[organ] }})</label>
{% endfor %}
</fieldset></form>
</header>
<main>
{% for report in reports %}
<article aria-labelledby="r{{ loop.index0 }}">
<h2 id="r{{ loop.index0 }}">{{ report.id }}</h2>
{% for section in report.sections %}
<h3>{{ section.heading }}</h3>
<p class="text">
{%- for piece in section.pieces -%}
{% if piece.organs or piece.is_uncertain %}<span class="{{ piece.classes }}">{{ piece.text }}
{%- if piece.is_end %}<sup>{% for organ in piece.organs %}{{ ", " if not loop.first }}{% if organ in report.abnormal %}<b>{{ organ }}</b>{% else %}{{ organ }}{% endif %}{% endfor %}</sup>{% endif %}</span>
{%- else %}{{ piece.text }}{% endif %}
{%- endfor -%}
</p>
{% if section.invented %}
<p class="loud">Not in this section:</p>
<ul>{% for organ, sentence in section.invented %}<li><span class="whose o{{ organs.index(organ) }}">{{ organ }}</span> {{ sentence }}</li>
{% endfor %}</ul>
{% endif %}
{% endfor %}
<p class="aside">Abnormal: {{ report.abnormal | join(", ") or "no organ" }}. Normal: {{ report.normal | join(", ") or "no organ" }}.</p>
</article>
{% endfor %}
</main>
</body>
</html>
"""  # noqa: E501


@dataclass(frozen=True)
class Piece:
    """A run of characters of a section that the same organs have; `is_end` where a sentence of theirs ends."""

    text: str
    organs: tuple[str, ...]
    is_uncertain: bool
    is_end: bool
    classes: str = ""


@dataclass(frozen=True)
class Section:
    """A section in pieces, and what the split says but the section does not: (organ, sentence)."""

    heading: str
    pieces: list[Piece]
    invented: list[tuple[str, str]]


def page_colors(organs: Sequence[str]) -> list[str]:
    """A pale colour per organ, of hues as far apart as may be in the order of the set: neighbours differ most."""
    colors = []
    for place in range(len(organs)):
        hue = place * 0.618034 % 1  # the golden angle
        red, green, blue = colorsys.hls_to_rgb(hue, LIGHTNESS - 0.05 * (place % 3 == 1), SATURATION)
        colors.append(f"#{round(red * 255):02x}{round(green * 255):02x}{round(blue * 255):02x}")
    return colors


def place_of_sentence(sentence: str, text: str, start: int, used: Container[tuple[int, int]]) -> tuple[int, int] | None:
    """A place of a sentence in a text that is not used, whatever the white space: from `start` on, else from the front.

    Sentences mostly come in the text's order, so each is found where the one before ended.
    """
    words = sentence.split()
    if not words:
        return None
    pattern = re.compile(r"\s+".join(map(re.escape, words)))
    for first in dict.fromkeys((start, 0)):
        match = pattern.search(text, first)
        while match and match.span() in used:
            match = pattern.search(text, match.end())
        if match:
            return match.span()
    return None


def pieces_of(entry: Mapping, section: str, organs: Sequence[str]) -> Section:
    """Cut a section where the organs change."""
    text = entry.get(section, "")
    marked: list[tuple[int, int, str | None]] = []  # start, stop, organ; None: uncertain
    invented = []
    for organ in organs:
        used: set[tuple[int, int]] = set()
        start = 0
        for sentence in sentences_of(entry, section, organ):
            if span := place_of_sentence(sentence, text, start, used):
                used.add(span)
                marked.append((*span, organ))
                start = span[1]
            elif sentence.strip():
                invented.append((organ, sentence))
    start = 0
    for sentence in entry.get("uncertain", ()):
        if isinstance(sentence, str) and (span := place_of_sentence(sentence, text, start, ())):
            marked.append((*span, None))
            start = span[1]
    ends = {stop for _, stop, _ in marked}
    edges = sorted({0, len(text), *(start for start, _, _ in marked), *ends})
    changes: dict[int, Counter] = {edge: Counter() for edge in edges}
    for first, last, organ in marked:
        changes[first][organ] += 1
        changes[last][organ] -= 1
    pieces = []
    open_now: Counter = Counter()  # organ -> its sentences that hold this place
    for start, stop in zip(edges, edges[1:]):
        open_now.update(changes[start])
        kept = tuple(organ for organ in organs if open_now[organ] > 0)
        pieces.append(Piece(text[start:stop], kept, open_now[None] > 0, bool(kept) and stop in ends))
    return Section(section.capitalize(), pieces, invented)


def report_page(name: str, entries: Sequence[Mapping], organs: Sequence[str], num_all: int | None = None) -> str:
    """The page of entries with their texts; `num_all` says of how many reports they are the first."""
    colors = page_colors(organs)
    place_of = {organ: place for place, organ in enumerate(organs)}
    striped: dict[tuple[str, ...], dict] = {}
    reports = []
    for entry in entries:
        sections = []
        for section in SECTIONS:
            if not entry.get(section, "").strip() and not any(sentences_of(entry, section, organ) for organ in organs):
                continue
            found = pieces_of(entry, section, organs)
            pieces = []
            for piece in found.pieces:
                classes = ["said", *(f"h{place_of[organ]}" for organ in piece.organs)]
                classes += ["uncertain"] if piece.is_uncertain else []
                if len(piece.organs) == 1:
                    classes.append(f"o{place_of[piece.organs[0]]}")
                elif piece.organs:
                    stripes = [colors[place_of[organ]] for organ in piece.organs]
                    background = stripes_of(stripes)
                    one = striped.setdefault(piece.organs, {"name": f"s{len(striped)}", "background": background})
                    classes.append(one["name"])
                pieces.append(Piece(piece.text, piece.organs, piece.is_uncertain, piece.is_end, " ".join(classes)))
            sections.append(Section(found.heading, pieces, found.invented))
        abnormal = [organ for organ in organs if entry["organs"].get(organ, {}).get("abnormal")]
        normal = [organ for organ in organs if organ in entry["organs"] and organ not in abnormal]
        reports.append({"id": entry["id"], "sections": sections, "abnormal": abnormal, "normal": normal})
    counts = {organ: sum(organ in entry["organs"] for entry in entries) for organ in organs}
    num_all = len(entries) if num_all is None else num_all
    shown = f"{counted(len(entries), 'report')}. Behind an organ: the reports that speak of it."
    if num_all > len(entries):
        shown = f"The first {len(entries):,} of {num_all:,} reports. Behind an organ: those of them that speak of it."
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(TEMPLATE).render(
        name=name,
        style=STYLE,
        shown=shown,
        organs=list(organs),
        colors=colors,
        striped=list(striped.values()),
        counts=counts,
        reports=reports,
        has_uncertain=any(entry.get("uncertain") for entry in entries),
    )


def stripes_of(colors: Sequence[str]) -> str:
    """CSS of bands of one height, the first on top."""
    share = 100 / len(colors)
    stops = (f"{color} {place * share:.1f}% {(place + 1) * share:.1f}%" for place, color in enumerate(colors))
    return f"linear-gradient({', '.join(stops)})"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--split", type=Path, required=True, metavar="FILE", help="the split: JSON, JSON lines or a folder")
    help_text = "texts of the reports, where the split does not carry them: CSV or JSON with id, findings, impression"
    add("--reports", type=Path, metavar="FILE", help=help_text)
    add_columns_argument(parser)
    add("--page", type=Path, required=True, metavar="HTML", help="where the page is written")
    help_text = "organ set; default: the smallest of ours that holds all organs of the split"
    add("--organs", metavar="SET|FILE", help=help_text)
    help_text = "reports on the page at most, the first of the split; default: %(default)s"
    add("--most", type=int, default=MOST_REPORTS, metavar="N", help=help_text)


def run(args: argparse.Namespace) -> int:
    if args.most < 1:
        raise ValueError(f"--most {args.most} must be at least 1.")
    entries = read_decompositions(args.split)
    _, organs = organs_of(entries, args.organs)
    shown = with_texts(entries[: args.most], args.reports, args.split, args.columns)
    write_text(args.page, report_page(args.split.name, shown, organs, len(entries)))
    console.print(f"{args.page}: {len(shown):,} of {counted(len(entries), 'report')}", markup=False, soft_wrap=True)
    return 0
