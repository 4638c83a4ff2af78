"""The page of `inspect`: findings, figures and pictures of a processed split in one HTML file.

The file stands alone: no script, no font, no address outside; charts are SVG, pictures are PNG of bounded size inside
the file. It reads on paper and on a narrow screen. Every text comes out of the split or its manifest and is escaped.
"""

import base64
import io
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup, escape

from modeling_fvlm.geometry import AXES

from .cases import counted
from .doctor import HISTOGRAM_EDGES, Examination
from .doctor_findings import (
    ADULT_VOLUME_ML,
    FEWEST_FOR_STATISTICS,
    OUTLIER_Z,
    READINGS,
    Finding,
    best_readings,
    ml_text,
    most_frequent_caption,
    volume_outliers,
)
from .shards import write_text
from .summary import kind_of, skipped_and_excluded

LONGEST_LIST = 50  # rows of a table that could have thousands; manifest.json has them all
PICTURE_WIDTH, PICTURE_BYTES = 1000, 400_000  # pixels and bytes of one picture, at most
ALL_PICTURES_BYTES = 6_000_000
MOST_OUTLIERS_DRAWN = 40
INK, BAND, BAR = "#1b1b1b", "#d5dde6", "#1f5f9a"
NUMBER = r"-?\d[\d,.]*%?"
# Nothing, or numbers as the tables have them: `14 / 10`, `-1024 to -992`, `854 (709 to 985)`, `48.0% (of what)`.
NUMBERS = re.compile(rf"({NUMBER}(( / | to ){NUMBER})*( \([^()]*\))?)?")


@dataclass(frozen=True)
class Table:
    """A table of the page; the first cell of each row is its heading."""

    caption: str
    columns: tuple[str, ...]
    rows: list[tuple]
    note: str = ""


@dataclass(frozen=True)
class Picture:
    """A preview inside the page; `why` holds the findings that it is an example of.

    `source` is None where the pictures before it have used up the page's size.
    """

    recon_id: str
    split: str
    alt: str
    source: str | None
    size: tuple[int, int]
    why: str = ""


@dataclass(frozen=True)
class Chart:
    """An SVG with what stands below it."""

    svg: Markup
    caption: str


TEMPLATE = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Doctor: {{ name }}</title>
<style>
:root { color: #1b1b1b; background: #fff; font: 16px/1.5 system-ui, sans-serif; }
body { margin: 0 auto; max-width: 70rem; padding: 1rem; overflow-wrap: anywhere; }
h1, h2, h3 { line-height: 1.2; }
h2 { border-bottom: 2px solid #1b1b1b; margin-top: 2.5rem; }
a { color: #0b4f8a; }
nav ul { list-style: none; padding: 0; display: flex; flex-wrap: wrap; gap: .3rem 1.2rem; }
.finding { border-left: .5rem solid #595959; padding: .1rem 0 .1rem 1rem; margin: 1.2rem 0; break-inside: avoid; }
.finding.loud { border-color: #9b1c1c; }
.finding.warning { border-color: #8a5a00; }
.finding h3 { margin: .2rem 0; }
.level { color: #fff; background: #595959; border-radius: .2rem; padding: 0 .4rem; font-size: .85rem; }
.loud .level { background: #9b1c1c; }
.warning .level { background: #7a4f00; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem; margin: .4rem 0; }
dt { font-weight: 600; }
dd { margin: 0; min-width: 0; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; margin: 1rem 0; font-size: .9rem; overflow-wrap: normal; }
caption { text-align: left; font-weight: 600; padding: .3rem 0; white-space: nowrap; }
th, td { border: 1px solid #767676; padding: .2rem .5rem; text-align: right; vertical-align: top; }
thead th { background: #eef1f4; text-align: left; }
tbody th { text-align: left; font-weight: 400; }
td { white-space: nowrap; }
td.text { text-align: left; }
td.long { text-align: left; white-space: normal; min-width: 16rem; overflow-wrap: anywhere; }
.aside { font-size: .9rem; color: #404040; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(13rem, 1fr)); gap: .5rem; }
figure { margin: 1rem 0; break-inside: avoid; }
.charts figure { margin: 0; }
figcaption { font-size: .9rem; }
svg, img { max-width: 100%; height: auto; display: block; }
.wide svg { min-width: 38rem; }
@media (max-width: 40rem) { dl { grid-template-columns: 1fr; } dt { margin-top: .4rem; } }
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
<table>
<caption>{{ table.caption }}</caption>
<thead><tr>{% for column in table.columns %}<th scope="col">{{ column }}</th>{% endfor %}</tr></thead>
<tbody>
{% for row in table.rows %}
<tr><th scope="row">{{ row[0] }}</th>
{%- for cell in row[1:] %}<td class="{{ kind_of_cell(cell) }}">{{ cell }}</td>
{%- endfor %}</tr>
{% endfor %}
</tbody>
</table>
</div>
{% if table.note %}<p class="aside">{{ table.note }}</p>{% endif %}
{% endmacro %}
<header>
<h1>Doctor: {{ name }}</h1>
<p>{{ looked_at }}</p>
{% if is_partial %}<p><strong>Only some rows were looked at, evenly spread. What is rare, and what only a comparison of
all rows shows (duplicates, patients in several splits), may be missing here.</strong></p>{% endif %}
<p class="aside">For research only, not for diagnosis. This page holds texts, ids and pictures of the split: its terms
hold for the page as well.</p>
<nav aria-label="Sections"><ul>
<li><a href="#findings">Findings</a></li>
{% for heading, anchor in sections %}<li><a href="#{{ anchor }}">{{ heading }}</a></li>
{% endfor %}
</ul></nav>
</header>
<main>
<section aria-labelledby="findings">
<h2 id="findings">Findings</h2>
<p>{{ verdict }}</p>
{% for finding in findings %}
<article class="finding {{ finding.level }}">
<h3><span class="level">{{ finding.level }}</span> {{ finding.title }}</h3>
<dl>
<dt>how many</dt><dd>{{ finding.how_many }}</dd>
{% if finding.seen %}<dt>seen</dt><dd>{{ finding.seen }}</dd>{% endif %}
{% if finding.examples %}<dt>examples</dt><dd>{{ finding.shown_examples }}</dd>{% endif %}
<dt>in training</dt><dd>{{ finding.effect }}</dd>
<dt>mend</dt><dd>{{ finding.mend }}</dd>
</dl>
</article>
{% endfor %}
</section>
{% for section in contents %}
<section aria-labelledby="{{ section.anchor }}">
<h2 id="{{ section.anchor }}">{{ section.heading }}</h2>
{% for text in section.texts %}<p>{{ text }}</p>
{% endfor %}
{% for table in section.tables %}{{ show(table) }}{% endfor %}
{% for chart in section.wide_charts %}
<figure><div class="wide" role="region" aria-label="{{ chart.caption }}" tabindex="0">{{ chart.svg }}</div>
<figcaption>{{ chart.caption }}</figcaption></figure>
{% endfor %}
{% if section.charts %}
<div class="charts">
{% for chart in section.charts %}
<figure>{{ chart.svg }}<figcaption>{{ chart.caption }}</figcaption></figure>
{% endfor %}
</div>
{% endif %}
{% for picture in section.pictures %}
<figure>
<h3>{{ picture.recon_id }} ({{ picture.split }})</h3>
{% if picture.why %}<p>Finding: {{ picture.why }}.</p>{% endif %}
{% if picture.source %}
<img src="{{ picture.source }}" alt="{{ picture.alt }}" width="{{ picture.size[0] }}" height="{{ picture.size[1] }}">
{% else %}<p class="aside">Left out to keep this file small; it lies beside the others in previews/.</p>{% endif %}
</figure>
{% endfor %}
</section>
{% endfor %}
</main>
</body>
</html>
"""


@dataclass(frozen=True)
class Section:
    heading: str
    anchor: str
    texts: tuple[str, ...] = ()
    tables: tuple[Table, ...] = ()
    wide_charts: tuple[Chart, ...] = ()
    charts: tuple[Chart, ...] = ()
    pictures: tuple[Picture, ...] = ()


def write_page(path: Path, name: str, exam: Examination, findings: Sequence[Finding], pictures: Sequence) -> None:
    """Write the page.

    Args:
        path: The HTML file.
        name: Of the split, for the title.
        exam: What was measured.
        findings: What looks wrong, the loudest first.
        pictures: (row of `exam.rows`, PNG file) of the previews.
    """
    write_text(path, page_html(name, exam, findings, inline_pictures(exam, findings, pictures)))


def page_html(name: str, exam: Examination, findings: Sequence[Finding], pictures: Sequence[Picture]) -> str:
    """The whole page as a text."""
    contents = [section for section in sections_of(exam, pictures) if section.tables or section.pictures]
    levels = Counter(finding.level for finding in findings)
    words = {"loud": ("loud", "loud"), "warning": ("warning", "warnings"), "note": ("note", "notes")}
    told = ", ".join(counted(levels[level], *words[level]) for level in words if levels[level])
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(TEMPLATE).render(
        name=name,
        looked_at=looked_at(exam),
        is_partial=exam.is_partial,
        verdict=f"{told}. The loudest come first." if told else "Nothing looks wrong.",
        findings=findings,
        sections=[(section.heading, section.anchor) for section in contents],
        contents=contents,
        kind_of_cell=kind_of_cell,
    )


def kind_of_cell(cell: str | float) -> str:
    """How a cell is set: numbers to the right, words to the left, long ones on several lines."""
    if not isinstance(cell, str) or NUMBERS.fullmatch(cell):
        return "number"
    return "long" if len(cell) > 40 else "text"


def looked_at(exam: Examination) -> str:
    """`Looked at 120 of 47,149 rows: train 47,149, validation 0.`"""
    of_splits = ", ".join(f"{split} {count:,}" for split, count in exam.num_rows.items())
    return f"Looked at {len(exam.rows):,} of {sum(exam.num_rows.values()):,} rows ({of_splits})."


def sections_of(exam: Examination, pictures: Sequence[Picture]) -> list[Section]:
    """All sections; those that have nothing to show come out empty."""
    sections = [Section("The split", "split", tables=(settings_table(exam), split_table(exam)))]
    if exam.rows:
        sections += [
            Section("Organs", "organs", tables=(organ_table(exam),), wide_charts=(volume_chart(exam),)),
            hu_section(exam),
            Section("Geometry", "geometry", tables=(spacing_table(exam), reading_table(exam))),
            Section("Texts and labels", "texts", tables=tuple(text_tables(exam))),
            Section("Duplicates and patients", "duplicates", tables=(duplicate_table(exam),)),
        ]
    return [
        *sections,
        Section("What the build left out, and what it warned of", "build", tables=tuple(build_tables(exam))),
        Section(
            "Pictures",
            "pictures",
            (
                "Head up; the patient's left on the viewer's right; on the sagittal plane the patient looks to the "
                "left. A picture that does not show it so tells of a wrong axis, sign or numbering.",
            ),
            pictures=tuple(pictures),
        ),
    ]


# Tables


def settings_table(exam: Examination) -> Table:
    settings = exam.manifest["settings"]
    numberings = settings.get("numberings", {})
    rows = [
        ("written by", exam.manifest.get("tool", "unknown")),
        ("builder", settings.get("builder", "unknown")),
        ("organ set", f"{settings['organ_set'].get('name', '')}: {len(exam.organs)} organs"),
        ("numbering of the masks", ", ".join(map(str, numberings)) or "unknown"),
        ("spacing (depth, height, width)", " x ".join(f"{edge:g}" for edge in settings["spacing"]) + " mm"),
        ("margin (depth, height, width)", " x ".join(map(str, settings["margin_voxels"])) + " voxels"),
        ("preprocessing", settings.get("preprocessing", "standard")),
    ]
    if labels := settings.get("labels"):
        rows.append(("labels that the source lacks", f"from the reports, by {labels['name']} {labels['version']}"))
    return Table("How it was built", ("setting", "value"), rows)


def split_table(exam: Examination) -> Table:
    rows = []
    for split, count in exam.num_rows.items():
        members = [row for row in exam.rows if row.place.split == split]
        damaged = sum(damage.place.split == split for damage in exam.damaged)
        patients, scans = ({getattr(row, name) for row in members} for name in ("patient_id", "scan_id"))
        rows.append((split, count, len(members), damaged, len(scans), len(patients)))
    return Table("Rows", ("split", "rows", "looked at", "cannot be read", "scans", "patients"), rows)


def by_split(exam: Examination, is_member: np.ndarray) -> str:
    """Counts of rows per split, `32 / 8`."""
    return " / ".join(f"{is_member[exam.split == split].sum():,}" for split in exam.num_rows)


def organ_table(exam: Examination) -> Table:
    outliers = volume_outliers(exam)
    is_cut = exam.is_present & ~exam.is_whole
    rows = []
    for index, organ in enumerate(exam.organs):
        present, whole = exam.is_present[:, index], exam.is_whole[:, index]
        volumes = exam.volume_ml[whole, index]
        listed = [f"{name} ({ml_text(ml)})" for name, ml in outliers.get(organ, ())]
        shown = ", ".join(listed[:5]) + (f" and {len(listed) - 5} more" if len(listed) > 5 else "")
        shown = shown or ("none" if len(volumes) >= FEWEST_FOR_STATISTICS else "too few to tell")
        rows.append(
            (
                organ,
                *(by_split(exam, member) for member in (present, exam.is_mentioned[:, index])),
                by_split(exam, exam.is_abnormal[:, index]),
                by_split(exam, whole & exam.is_abnormal[:, index]),
                by_split(exam, is_cut[:, index]),
                quantile_text(volumes),
                f"{np.nanmedian(exam.median_hu[present, index]):.0f}" if present.any() else "",
                shown,
            )
        )
    return Table(
        f"Organs ({' / '.join(exam.num_rows)})",
        (
            *("organ", "in the mask", "mentioned", "abnormal", "abnormal and whole", "cut off"),
            *("volume, ml: median (5 to 95 %)", "median HU", "volume outliers (ml)"),
        ),
        rows,
        "Cut off: a voxel of the organ lies on a face of the array; under the rule `completeness: border` it does not "
        "enter the loss there. Only what is abnormal and whole makes the loss of an organ count. Volumes are of whole "
        "organs, both sides together. Median HU: median over the scans. Volume outliers are far from the other scans "
        f"(robust z of the logarithm above {OUTLIER_Z:g}); where fewer than {FEWEST_FOR_STATISTICS} scans hold the "
        "whole organ there are too few to tell.",
    )


def quantile_text(values: np.ndarray) -> str:
    """`1,420 (1,100 to 1,890)`: median, 5th and 95th percentile."""
    if not len(values):
        return ""
    low, middle, high = map(ml_text, np.percentile(values, (5, 50, 95)))
    return f"{middle} ({low} to {high})"


def spacing_table(exam: Examination) -> Table:
    shapes = np.array([row.shape for row in exam.rows])
    spread = lambda values, digits: " / ".join(  # noqa: E731
        f"{value:,.{digits}f}" for value in np.percentile(values, (0, 50, 100))
    )
    wanted = exam.manifest["settings"]["spacing"]
    rows = [
        (
            axis,
            f"{wanted[index]:g}",
            spread(exam.spacing[:, index], 2),
            spread(shapes[:, index], 0),
            spread(shapes[:, index] * exam.spacing[:, index], 0),
        )
        for index, axis in enumerate(AXES)
    ]
    return Table(
        "Spacing and shape, least / median / most",
        ("axis", "spacing asked for, mm", "spacing, mm", "voxels", "extent, mm"),
        rows,
        "Depth grows to the head, height to the back, width to the patient's left. Spacing departs a little from what "
        "was asked for, because the extent of each scan is kept.",
    )


def reading_table(exam: Examination) -> Table:
    readings, is_judged = best_readings(exam)
    counts = Counter(readings[is_judged].tolist())
    rows = [(str(READINGS[place]), count) for place, count in counts.most_common()]
    if (~is_judged).any():
        rows.append(("too few organs to tell", int((~is_judged).sum())))
    return Table(
        "Orientation, as the places of the organs tell it",
        ("reading", "scans"),
        rows,
        "The builder turned every file by its affine to (depth, height, width) of LPS. The orientation of the source "
        "files is not kept in the split; this table asks the organs instead.",
    )


def text_tables(exam: Examination) -> list[Table]:
    words = exam.stacked("caption_words")
    rows = []
    for index, organ in enumerate(exam.organs):
        has_caption = exam.caption_hashes[:, index] != 0
        share, is_normal, count = most_frequent_caption(exam, index, np.ones(len(exam.rows), dtype=bool))
        equal = f"{share:.1%}{' (the normal sentence)' if is_normal else ''}" if count else ""
        distinct = len(set(exam.caption_hashes[has_caption, index].tolist()))
        rows.append((organ, count, quantile_text(words[has_caption, index]), distinct, equal))
    tables = [
        Table(
            "Captions",
            ("organ", "captions", "words: median (5 to 95 %)", "different", "share of the most frequent"),
            rows,
            "Captions are equal that differ in white space and case alone.",
        )
    ]
    counts = exam.label_counts()
    if counts:
        columns = [f"{split}: {kind}" for split in exam.num_rows for kind in ("positive", "negative", "unknown")]
        rows = [
            (finding, *(of_split[split][value] for split in exam.num_rows for value in (1, 0, -1)))
            for finding, of_split in counts.items()
        ]
        tables.append(Table("Labels", ("finding", *columns), rows))
    return tables


def duplicate_table(exam: Examination) -> Table:
    reports = [row.report_hash for row in exam.rows if row.report_hash is not None]
    splits_of: dict[str, set[str]] = {}
    for row in exam.rows:
        splits_of.setdefault(row.patient_id, set()).add(row.place.split)
    words = np.array([row.report_words for row in exam.rows if row.report_hash is not None])
    rows = [
        ("reconstructions", len(exam.rows)),
        ("different reconstruction ids", len({row.recon_id for row in exam.rows})),
        ("different volumes", len({row.volume_hash for row in exam.rows})),
        ("scans", len({row.scan_id for row in exam.rows})),
        ("patients", len(splits_of)),
        ("patients in several splits", sum(len(splits) > 1 for splits in splits_of.values())),
        ("different reports", len(set(reports))),
        ("reports that the builder marked as equal to another's", len(exam.manifest.get("duplicates", ()))),
        ("rows without a report", len(exam.rows) - len(reports)),
        ("words of a report: median (5 to 95 %)", quantile_text(words)),
    ]
    return Table(
        "How many are how many", ("what", "count"), rows, "Reconstructions of one scan share its report by design."
    )


def build_tables(exam: Examination) -> list[Table]:
    tables = []
    for entries, what in zip(skipped_and_excluded(exam.manifest), ("skipped cases", "cases left out on purpose")):
        if entries:
            kinds = Counter(kind_of(entry["reason"]) for entry in entries)
            tables.append(Table(f"{len(entries):,} {what} by reason", ("reason", "cases"), kinds.most_common()))
            rows = [(entry["case"], entry["split"], entry["reason"]) for entry in entries[:LONGEST_LIST]]
            tables.append(Table(what.capitalize(), ("case", "split", "reason"), rows, rest(entries)))
    warnings = exam.manifest.get("warnings", ())
    if warnings:
        rows = [(entry["case"], entry["split"], entry["warning"]) for entry in warnings[:LONGEST_LIST]]
        tables.append(Table("Warnings of the build", ("case", "split", "warning"), rows, rest(warnings)))
    concerns = exam.manifest.get("privacy_concerns", {})
    if concerns:
        tables.append(Table("What reports seem to hold of a person", ("kind", "times"), list(concerns.items())))
    if exam.damaged:
        rows = [(damage.recon_id or "unknown", damage.place.split, str(damage)) for damage in
                exam.damaged[:LONGEST_LIST]]  # fmt: skip
        tables.append(Table("Rows that cannot be read", ("case", "split", "reason"), rows, rest(exam.damaged, False)))
    return tables


def rest(entries: Sequence, is_in_manifest: bool = True) -> str:
    if len(entries) <= LONGEST_LIST:
        return ""
    return f"{len(entries) - LONGEST_LIST:,} more" + (" in manifest.json." if is_in_manifest else ".")


# Charts


def svg(width: int, height: int, label: str, *parts: str) -> Markup:
    """An SVG of parts that are escaped already."""
    return Markup(
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>'
    ).format(width, height, label, Markup("".join(parts)))


def line(x1: float, y1: float, x2: float, y2: float, color: str, width: float = 1) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{color}" stroke-width="{width:g}"/>'


def rect(x: float, y: float, width: float, height: float, color: str) -> str:
    return f'<rect x="{x:.1f}" y="{y:.1f}" width="{max(width, 0.5):.1f}" height="{height:.1f}" fill="{color}"/>'


def label_at(x: float, y: float, text: str, anchor: str = "start", size: int = 12) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}" '
        f'font-family="system-ui, sans-serif" fill="{INK}">{escape(text)}</text>'
    )


def volume_chart(exam: Examination) -> Chart:
    """One line per organ on a logarithmic axis: an adult's range, 5 to 95 %, median, outliers."""
    outliers = volume_outliers(exam)
    left, right, step, top = 190, 790, 20, 8
    bottom = top + step * len(exam.organs)

    def at(ml: float) -> float:
        return left + (right - left) * float(np.clip(np.log10(max(ml, 0.1)) + 1, 0, 5.2)) / 5.2

    parts = []
    for tick in (0.1, 1, 10, 100, 1000, 10_000):
        parts += [
            line(at(tick), top, at(tick), bottom, "#b8b8b8"),
            label_at(at(tick), bottom + 15, f"{tick:g}", "middle"),
        ]
    for index, organ in enumerate(exam.organs):
        middle = top + step * (index + 0.5)
        parts.append(label_at(left - 8, middle + 4, organ, "end"))
        if organ in ADULT_VOLUME_ML:
            low, high = map(at, ADULT_VOLUME_ML[organ])
            parts.append(rect(low, middle - 8, high - low, 16, BAND))
        volumes = exam.volume_ml[exam.is_whole[:, index], index]
        if len(volumes):
            low, median, high = map(at, np.percentile(volumes, (5, 50, 95)))
            parts += [rect(low, middle - 3, high - low, 6, BAR), line(median, middle - 8, median, middle + 8, INK, 2)]
        for _, ml in outliers.get(organ, ())[:MOST_OUTLIERS_DRAWN]:
            parts.append(f'<circle cx="{at(ml):.1f}" cy="{middle:.1f}" r="3" fill="none" stroke="#9b1c1c"/>')
    parts.append(label_at((left + right) / 2, bottom + 32, "ml", "middle"))
    return Chart(
        svg(800, bottom + 40, "Volumes of whole organs; the numbers stand in the table above.", *parts),
        "Volumes of whole organs: bar 5 to 95 %, tick median, rings outliers; grey is what adults have, ill or well.",
    )


def hu_section(exam: Examination) -> Section:
    """HU of all voxels, and of each organ that is there."""
    charts = [Chart(histogram_svg("all voxels", exam.histogram.sum(axis=0)), "all voxels")]
    rows = [hu_row("all voxels", exam.histogram.sum(axis=0))]
    for organ, counts in zip(exam.organs, exam.histogram[1:]):
        if counts.any():
            charts.append(Chart(histogram_svg(organ, counts), organ))
            rows.append(hu_row(organ, counts))
    return Section(
        "HU",
        "hu",
        (
            f"Bins of {HISTOGRAM_EDGES[1] - HISTOGRAM_EDGES[0]} HU; the first and the last hold what lies beyond. "
            "Heights are square roots of the share, so that small peaks show.",
        ),
        (Table("Where most voxels lie", ("organ", "voxels", "most frequent bin, HU"), rows),),
        charts=tuple(charts),
    )


def hu_row(name: str, counts: np.ndarray) -> tuple:
    peak = int(counts.argmax())
    return name, f"{int(counts.sum()):,}", f"{HISTOGRAM_EDGES[peak]} to {HISTOGRAM_EDGES[peak + 1]}"


def histogram_svg(name: str, counts: np.ndarray) -> Markup:
    width, height, foot = 240, 90, 16
    edges = HISTOGRAM_EDGES
    x = (edges - edges[0]) / (edges[-1] - edges[0]) * width
    heights = np.sqrt(counts / max(counts.max(), 1)) * (height - 4)
    points = "".join(
        f"L{start:.1f},{height - tall:.1f}L{stop:.1f},{height - tall:.1f}"
        for start, stop, tall in zip(x, x[1:], heights)
    )
    parts = [f'<path d="M0,{height}{points}L{width},{height}Z" fill="{BAR}"/>', line(0, height, width, height, INK)]
    for tick in (-1000, 0, 1000):
        place = (tick - edges[0]) / (edges[-1] - edges[0]) * width
        parts += [
            line(place, height, place, height + 3, INK),
            label_at(place, height + foot - 2, str(tick), "middle", 11),
        ]
    return svg(width, height + foot, f"Histogram of HU, {name}", *parts)


# Pictures


def inline_pictures(exam: Examination, findings: Sequence[Finding], pictures: Sequence) -> list[Picture]:
    """Previews as PNG of bounded size, in text form; those beyond the size of the page are only named."""
    inlined, used = [], 0
    reasons: dict[int, list[str]] = {}  # by place in `exam.rows`
    for finding in findings:
        for place in finding.rows if finding.level != "note" else ():
            reasons.setdefault(place, []).append(finding.title)
    place_of = {id(row): place for place, row in enumerate(exam.rows)}
    for row, path in pictures:
        data, size = shrunken_png(path)
        is_shown = used + len(data) <= ALL_PICTURES_BYTES
        used += len(data) if is_shown else 0
        present = [organ for organ, voxels in zip(exam.organs, row.voxels) if voxels]
        alt = (
            f"Axial, coronal and sagittal planes of {row.recon_id} with the organs in colour "
            f"({', '.join(present)}), and its captions."
        )
        source = f"data:image/png;base64,{base64.b64encode(data).decode()}" if is_shown else None
        why = "; ".join(reasons.get(place_of[id(row)], ()))
        inlined.append(Picture(row.recon_id, row.place.split, alt, source, size, why))
    return inlined


def shrunken_png(path: Path) -> tuple[bytes, tuple[int, int]]:
    """A PNG file as at most PICTURE_BYTES of PNG with 256 colours, and its width and height."""
    from PIL import Image

    with Image.open(path) as picture:
        picture = picture.convert("RGB")
    width = min(PICTURE_WIDTH, picture.width)
    while True:
        size = (width, max(1, round(picture.height * width / picture.width)))
        buffer = io.BytesIO()
        # The usual median cut gives nearly all its colours to the greys, and makes organs alike that are not.
        colours = picture.resize(size, Image.Resampling.LANCZOS).quantize(256, Image.Quantize.MAXCOVERAGE)
        colours.save(buffer, "PNG", optimize=True)
        if buffer.tell() <= PICTURE_BYTES or width < 200:
            return buffer.getvalue(), size
        width = int(width * 0.8)
