"""The page of `decompose-score`: figures per organ, where misplaced sentences went, and each of them in its place.

One HTML file that stands alone; every text in it is escaped.
"""

from collections import Counter
from collections.abc import Mapping, Sequence

from jinja2 import Environment, StrictUndefined

from .report_page import STYLE

NOWHERE = "no organ"
CONTEXT = 160  # characters of the report before a misplaced sentence: what "it" refers back to stands there
MOST_LISTED = 500

TEMPLATE = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Score: {{ result.method }}</title>
<style>
{{ style }}
.right { background: #d9f0dc; } .missing { background: #ffe1b0; } .extra { background: #ffd3d3; }
.whose { padding: 0 .3rem; border-radius: .2rem; white-space: nowrap; }
td.zero { color: #595959; }
td.hit { background: #ffe1b0; font-weight: 600; }
</style>
</head>
<body>
{% macro show(caption, columns, rows) %}
<div class="wide" role="region" aria-label="{{ caption }}" tabindex="0">
<table>
<caption>{{ caption }}</caption>
<thead><tr>{% for column in columns %}<th scope="col">{{ column }}</th>{% endfor %}</tr></thead>
<tbody>
{% for row in rows %}
<tr><th scope="row">{{ row[0] }}</th>{% for cell in row[1:] %}<td{{ " class=text" if cell is string and not number(cell) }}>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}
</tbody>
</table>
</div>
{% endmacro %}
<header>
<h1>Split of reports by organ, against gold</h1>
<p>{{ result.num_reports }} reports of {{ result.gold }}, organ set {{ result.organ_set }}; split: {{ result.method }}.</p>
<p class="aside">What the figures mean stands in <code>python -m data_builders decompose-score --help</code>. For research
only, not for diagnosis. This page holds texts of the reports: their terms hold for the page as well.</p>
</header>
<main>
<section aria-labelledby="figures">
<h2 id="figures">Figures</h2>
{{ show("Over all organs", ("figure", "value"), figures) }}
{{ show("By organ", ("organ", "precision", "recall", "F1", "gold sentences", "of the split", "abnormal accuracy", "flags", "kappa"), by_organ) }}
</section>
<section aria-labelledby="confusion">
<h2 id="confusion">Where misplaced sentences went</h2>
{% if confusion %}
<p>Rows: the organ of the gold that lacks a sentence. Columns: the organ that has it instead. A sentence that lacks one
organ and has another too many counts between them.</p>
<div class="wide" role="region" aria-label="Confusion" tabindex="0">
<table>
<caption>Misplaced sentences</caption>
<thead><tr><th scope="col">gold \\ split</th>{% for column in columns %}<th scope="col">{{ column }}</th>{% endfor %}</tr></thead>
<tbody>
{% for organ, counts in confusion %}
<tr><th scope="row">{{ organ }}</th>{% for count in counts %}<td class="{{ "hit" if count else "zero" }}">{{ count or "" }}</td>{% endfor %}</tr>
{% endfor %}
</tbody>
</table>
</div>
{% else %}
<p>No sentence is misplaced.</p>
{% endif %}
</section>
<section aria-labelledby="misplaced">
<h2 id="misplaced">Misplaced sentences</h2>
<p><span class="whose right">has it, rightly</span> <span class="whose missing">should have it</span>
<span class="whose extra">should not have it</span></p>
{{ more(result.misplaced) }}
<div class="wide" role="region" aria-label="Misplaced sentences" tabindex="0">
<table>
<caption>Misplaced sentences in their reports</caption>
<thead><tr><th scope="col">report</th><th scope="col">section</th><th scope="col">sentence, and what stands before it</th><th scope="col">organs</th></tr></thead>
<tbody>
{% for one in misplaced %}
<tr><th scope="row">{{ one.id }}</th><td class="text">{{ one.section }}</td>
<td class="text"><span class="aside">{{ one.before }}</span> <strong>{{ one.sentence }}</strong></td>
<td class="text">{% for kind, organ in one.organs %}<span class="whose {{ kind }}">{{ organ }}{{ " lacks it" if kind == "missing" }}{{ " has it wrongly" if kind == "extra" }}</span> {% endfor %}</td></tr>
{% endfor %}
</tbody>
</table>
</div>
</section>
<section aria-labelledby="flags">
<h2 id="flags">Wrong flags</h2>
{{ more(result.wrong_flags) }}
{{ show("Organs whose flag differs", ("report", "organ", "gold", "split", "sentences of the split"), flags) }}
</section>
<section aria-labelledby="invented">
<h2 id="invented">Sentences that are not in the report</h2>
{{ more(result.invented_sentences) }}
{{ show("Invented, or of the other section", ("report", "section", "kind", "sentence"), invented) }}
</section>
</main>
</body>
</html>
"""  # noqa: E501


def score_page(gold: Sequence[Mapping], result: Mapping) -> str:
    """The page of a `result` of `decompose-score`, with the reports it came from."""
    text_of = {
        (entry["id"], section): entry.get(section, "") for entry in gold for section in ("findings", "impression")
    }
    counts = confusion_counts(result["misplaced"])
    rows = sorted({organ for organ, _ in counts}, key=lambda organ: order_of(organ, result))
    columns = sorted({organ for _, organ in counts}, key=lambda organ: order_of(organ, result))
    figures = [
        (heading_of(name), told(result[name]))
        for name in ("micro_f1", "macro_f1", "abnormal_accuracy", "micro_precision", "micro_recall", "coverage")
    ]
    figures += [(f"{heading_of(name)} of equal sentences", told(value)) for name, value in result["exact"].items()]
    figures += [("abnormal accuracy of all gold", told(result["abnormal_accuracy_of_gold"]))]
    figures += [("kappa", told(result["kappa"])), ("invented sentences", result["invented"])]
    figures += [("sentences of the other section", result["in_other_section"])]
    figures += [("pairs of gold / of the split", f"{result['num_pairs']['gold']} / {result['num_pairs']['predicted']}")]
    by_organ = [
        (organ, *(told(one[name]) for name in ("precision", "recall", "f1")), one["support"], one["predicted"],
         told(one["abnormal_accuracy"]), one["num_flags"], told(one["kappa"]))
        for organ, one in result["per_organ"].items()
    ]  # fmt: skip
    flags = [
        (one["id"], one["organ"], *("abnormal" if one[side] else "normal" for side in ("gold", "predicted")),
         " ".join(one["sentences"]))
        for one in result["wrong_flags"][:MOST_LISTED]
    ]  # fmt: skip
    invented = [
        (one["id"], one["section"], kind, one["sentence"])
        for kind, name in (("invented", "invented_sentences"), ("other section", "sentences_in_other_section"))
        for one in result[name][:MOST_LISTED]
    ]
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(TEMPLATE).render(
        style=STYLE,
        result=result,
        figures=figures,
        by_organ=by_organ,
        confusion=[(organ, [counts[organ, column] for column in columns]) for organ in rows],
        columns=columns,
        misplaced=[with_context(one, text_of) for one in result["misplaced"][:MOST_LISTED]],
        flags=flags,
        invented=invented,
        number=lambda text: text[:1].isdigit() or text == "-",
        more=lambda entries: f"The first {MOST_LISTED} of {len(entries):,}." if len(entries) > MOST_LISTED else "",
    )


def heading_of(name: str) -> str:
    return name.replace("_", " ").replace("f1", "F1")


def confusion_counts(misplaced: Sequence[Mapping]) -> Counter:
    """(organ of gold, organ of the split) -> sentences; NOWHERE where a side names no organ instead."""
    counts: Counter = Counter()
    for one in misplaced:
        for organ in one["missing"] or [NOWHERE]:
            counts.update((organ, other) for other in one["extra"] or [NOWHERE])
    return counts


def order_of(organ: str, result: Mapping) -> int:
    """The place of an organ in its set, NOWHERE behind them all."""
    organs = list(result["per_organ"])
    return organs.index(organ) if organ in organs else len(organs)


def with_context(one: Mapping, text_of: Mapping[tuple[str, str], str]) -> dict:
    """A misplaced sentence with what stands before it, and with the organs of both sides."""
    text = " ".join(text_of[one["id"], one["section"]].split())
    start = max(text.find(" ".join(one["sentence"].split())), 0)
    before = text[max(0, start - CONTEXT) : start].strip()
    right = [organ for organ in one["predicted"] if organ not in one["extra"]]
    kinds = (("right", right), ("missing", one["missing"]), ("extra", one["extra"]))
    return {
        **one,
        "before": f"... {before}" if start > CONTEXT else before,
        "organs": [(kind, organ) for kind, organs in kinds for organ in organs],
    }


def told(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
