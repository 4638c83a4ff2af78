"""One HTML file of sections, tables, charts and pictures that needs nothing beside itself.

No address outside, no font, no library: charts are SVG, pictures are inside the file, and a content security policy
lets a browser load nothing else. The one script sorts tables; without it the page reads the same. Every text comes out
of files of others and is escaped.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

MOST_COLUMNS = 8  # of a table that has room for figures and their intervals on one line
NUMBER = r"[-−+]?\d[\d,.]*%?"
# Nothing, or a number as the tables have them: `0.91`, `14 of 30`, `0.91 (0.85 to 0.95)`.
NUMBERS = re.compile(rf"({NUMBER}(( / | to | of ){NUMBER})*( \([^()]*\))?)?")
FIGURE = re.compile(rf"({NUMBER}) (\({NUMBER} to {NUMBER}\))")


@dataclass(frozen=True)
class Table:
    """The first cell of each row is its heading."""

    caption: str
    columns: tuple[str, ...]
    rows: Sequence[tuple]
    note: str = ""
    is_sortable: bool = False


@dataclass(frozen=True)
class Chart:
    """An SVG and what stands below it."""

    svg: Markup
    caption: str


@dataclass(frozen=True)
class Picture:
    """A PNG with its heading, what stands below it, and perhaps a sentence of a report.

    `png` is None where the pictures before it have used up the page's size.
    """

    heading: str
    alt: str
    png: bytes | None
    facts: str = ""
    quote: str = ""
    size: tuple[int, int] = (0, 0)

    @property
    def source(self) -> str:
        return f"data:image/png;base64,{base64.b64encode(self.png or b'').decode()}"


@dataclass(frozen=True)
class Section:
    """A part of the page; one that has nothing to show is left out."""

    heading: str
    anchor: str
    texts: tuple[str, ...] = ()
    headlines: tuple[tuple[str, str, str], ...] = ()  # name, value, interval
    tables: tuple[Table, ...] = ()
    wide_charts: tuple[Chart, ...] = ()
    charts: tuple[Chart, ...] = ()
    pictures: tuple[Picture, ...] = ()

    @property
    def is_empty(self) -> bool:
        return not (self.headlines or self.tables or self.wide_charts or self.charts or self.pictures)


SCRIPT = """
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  const numberOf = text => parseFloat(text.replace(/,/g, "").replace("\\u2212", "-"));
  heads.forEach((head, place) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = head.textContent;
    head.replaceChildren(button);
    button.addEventListener("click", () => {
      const isFalling = head.getAttribute("aria-sort") !== "descending";
      heads.forEach(other => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", isFalling ? "descending" : "ascending");
      const rows = [...table.tBodies[0].rows].map(row => [row.cells[place].textContent.trim(), row]);
      const areNumbers = rows.every(([text]) => !text || !isNaN(numberOf(text)));
      const compare = areNumbers ? (a, b) => numberOf(a) - numberOf(b) : (a, b) => a.localeCompare(b);
      rows.sort(([a], [b]) => !a || !b ? !a - !b : (isFalling ? -1 : 1) * compare(a, b));
      table.tBodies[0].append(...rows.map(([, row]) => row));
    });
  });
}
"""

TEMPLATE = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{{ policy }}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
:root { color: #1b1b1b; background: #fff; font: 16px/1.5 system-ui, sans-serif; }
body { margin: 0 auto; max-width: 78rem; padding: 1rem; overflow-wrap: anywhere; }
h1, h2, h3 { line-height: 1.2; }
h2 { border-bottom: 2px solid #1b1b1b; margin-top: 2.5rem; }
a { color: #0b4f8a; }
nav ul { list-style: none; padding: 0; display: flex; flex-wrap: wrap; gap: .3rem 1.2rem; }
.headlines { display: flex; flex-wrap: wrap; gap: .8rem; margin: 1rem 0; }
.headlines div { background: #eef1f4; border-radius: .3rem; padding: .5rem .9rem; min-width: 8rem; }
.headlines dt { font-size: .9rem; }
.headlines dd { margin: 0; font-size: .9rem; color: #404040; }
.headlines dd.value { font-size: 1.6rem; font-weight: 600; line-height: 1.2; color: #1b1b1b; }
.warning { border-left: .5rem solid #8a5a00; padding: .1rem 0 .1rem 1rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; margin: 1rem 0; font-size: .9rem; overflow-wrap: normal; }
caption { text-align: left; font-weight: 600; padding: .3rem 0; white-space: nowrap; }
th, td { border: 1px solid #767676; padding: .2rem .4rem; text-align: right; vertical-align: top; }
thead th { background: #eef1f4; text-align: left; }
.range { font-size: .8rem; color: #404040; }
.many { font-size: .85rem; }
.many .range { display: block; font-size: .75rem; }
thead button { font: inherit; font-weight: 700; color: inherit; text-align: left; background: none; border: 0;
  padding: 0; cursor: pointer; }
[aria-sort=descending] button::after { content: " \\2193"; }
[aria-sort=ascending] button::after { content: " \\2191"; }
tbody th { text-align: left; font-weight: 400; background: #fff; }
tr > th:first-child { position: sticky; left: 0; z-index: 1; box-shadow: 1px 0 #767676, -1px 0 #767676; }
td { white-space: nowrap; }
td.text { text-align: left; }
td.long { text-align: left; white-space: normal; min-width: 16rem; overflow-wrap: anywhere; }
.aside { font-size: .9rem; color: #404040; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(18rem, 1fr)); gap: 1rem; }
figure { margin: 1rem 0; break-inside: avoid; }
.charts figure { margin: 0; }
figcaption { font-size: .9rem; }
blockquote { margin: .4rem 0; padding-left: .8rem; border-left: .25rem solid #767676; }
svg, img { max-width: 100%; height: auto; display: block; }
.wide svg { min-width: 40rem; max-width: 60rem; }
@media (max-width: 40rem) {
  table, .many { font-size: .8rem; }
  .range, .many .range { display: block; font-size: .7rem; }
  th, td { padding: .15rem .3rem; }
  tr > th:first-child { min-width: 7.2rem; overflow-wrap: anywhere; }
  caption { white-space: normal; }
  td.text, td.long { white-space: normal; min-width: 4.5rem; }
  td.long { min-width: 11rem; }
  .wide svg { min-width: 34rem; }
  .headlines { display: grid; grid-template-columns: 1fr 1fr; gap: .4rem; }
  .headlines div { min-width: 0; padding: .4rem .6rem; }
  .headlines dd.value { font-size: 1.3rem; }
}
@media print {
  :root { font-size: 10pt; }
  nav { display: none; }
  body { max-width: none; padding: 0; }
  .wide { overflow: visible; }
  .wide svg { min-width: 0; }
  thead { display: table-header-group; }
  tr { break-inside: avoid; }
}
</style>
</head>
<body>
{% macro show(table) %}
<div class="wide" role="region" aria-label="{{ table.caption }}" tabindex="0">
<table class="{{ 'sortable' if table.is_sortable }}{{ ' many' if table.columns|length > MOST_COLUMNS }}">
<caption>{{ table.caption }}</caption>
<thead><tr>{% for column in table.columns %}<th scope="col">{{ column }}</th>{% endfor %}</tr></thead>
<tbody>
{% for row in table.rows %}
<tr><th scope="row">{{ row[0] }}</th>
{%- for cell in row[1:] %}<td class="{{ kind_of_cell(cell) }}">{{ cell_content(cell) }}</td>
{%- endfor %}</tr>
{% endfor %}
</tbody>
</table>
</div>
{% if table.note %}<p class="aside">{{ table.note }}</p>{% endif %}
{% endmacro %}
<header>
<h1>{{ title }}</h1>
<p>{{ lead }}</p>
{% for warning in warnings %}<p class="warning">{{ warning }}</p>
{% endfor %}
<p class="aside">For research only, not for diagnosis. {{ terms }}</p>
<nav aria-label="Sections"><ul>
{% for section in sections %}<li><a href="#{{ section.anchor }}">{{ section.heading }}</a></li>
{% endfor %}
</ul></nav>
</header>
<main>
{% for section in sections %}
<section aria-labelledby="{{ section.anchor }}">
<h2 id="{{ section.anchor }}">{{ section.heading }}</h2>
{% for text in section.texts %}<p>{{ text }}</p>
{% endfor %}
{% if section.headlines %}
<dl class="headlines">
{% for name, value, interval in section.headlines %}
<div><dt>{{ name }}</dt><dd class="value">{{ value }}</dd>{% if interval %}<dd>{{ interval }}</dd>{% endif %}</div>
{% endfor %}
</dl>
{% endif %}
{% for chart in section.wide_charts %}
<figure><div class="wide" role="region" aria-label="{{ chart.caption }}" tabindex="0">{{ chart.svg }}</div>
<figcaption>{{ chart.caption }}</figcaption></figure>
{% endfor %}
{% for table in section.tables %}{{ show(table) }}{% endfor %}
{% if section.charts %}
<div class="charts">
{% for chart in section.charts %}
<figure>{{ chart.svg }}<figcaption>{{ chart.caption }}</figcaption></figure>
{% endfor %}
</div>
{% endif %}
{% for picture in section.pictures %}
<figure>
<h3>{{ picture.heading }}</h3>
{% if picture.png %}
<img src="{{ picture.source }}" alt="{{ picture.alt }}" width="{{ picture.size[0] }}" height="{{ picture.size[1] }}">
{% else %}<p class="aside">Left out to keep this file small; it lies beside it.</p>{% endif %}
<figcaption>{{ picture.facts }}</figcaption>
{% if picture.quote %}<blockquote>{{ picture.quote }}</blockquote>{% endif %}
</figure>
{% endfor %}
</section>
{% endfor %}
</main>
<script>{{ script }}</script>
</body>
</html>
"""


def render_page(title: str, lead: str, terms: str, sections: Sequence[Section], warnings: Sequence[str] = ()) -> str:
    """The whole page as a text; empty sections are left out."""
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(TEMPLATE).render(
        title=title,
        lead=lead,
        terms=terms,
        warnings=warnings,
        sections=[section for section in sections if not section.is_empty],
        kind_of_cell=kind_of_cell,
        cell_content=cell_content,
        MOST_COLUMNS=MOST_COLUMNS,
        policy=policy,
        script=Markup(SCRIPT),
    )


def kind_of_cell(cell: str | float) -> str:
    """How a cell is set: numbers to the right, words to the left, long ones on several lines."""
    if not isinstance(cell, str) or NUMBERS.fullmatch(cell):
        return "number"
    return "long" if len(cell) > 40 else "text"


def cell_content(cell: str | float) -> str | float:
    """A cell as it is; the interval of a figure may go onto a line of its own, which halves its column."""
    figure = FIGURE.fullmatch(cell) if isinstance(cell, str) else None
    return Markup('{} <span class="range">{}</span>').format(*figure.groups()) if figure else cell
