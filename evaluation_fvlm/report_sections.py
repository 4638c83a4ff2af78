"""The sections of the HTML report: what results say, as tables, charts and pictures. A part that is None has none.

Every figure is text with its 95 % interval in brackets, or nothing where there is no figure. Nothing here is markup:
the template escapes it (html_template.py).
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd

from evaluation_fvlm.binary_metrics import RANKING_METRICS
from evaluation_fvlm.chosen_cases import worst_errors
from evaluation_fvlm.html_charts import curves_chart, interval_chart, reliability_chart
from evaluation_fvlm.html_template import Chart, Picture, Section, Table
from evaluation_fvlm.places import entry_name, place_name

NAMES = {
    "auc": "AUC", "average_precision": "average precision", "accuracy": "accuracy",
    "balanced_accuracy": "balanced accuracy", "f1": "F1 of the finding", "weighted_f1": "weighted F1",
    "precision": "precision", "recall": "recall", "specificity": "specificity", "youden": "Youden",
    "brier": "Brier score", "ece": "calibration error", "ece_equal_mass": "calibration error, equal mass",
}  # fmt: skip
METRICS = tuple(NAMES)[:10]
HEADLINES = ("auc", "average_precision", "balanced_accuracy", "f1", "weighted_f1", "ece")
LONGEST_LIST = 50  # rows of a list that may have thousands
ALL_PICTURES_BYTES = 12_000_000
PICTURE_WIDTH = 900
KINDS = {
    "missed": "Missed: the finding is there, the score is low",
    "false alarm": "False alarm: the finding is not there, the score is high",
    "found": "Found: the finding is there, the score is high",
}
ORIENTATION = (
    "Head up; the patient's left on the viewer's right; on the sagittal plane the patient looks to the left. Heat: the "
    "organ's attention, patch by patch, through its heaviest patch; cyan: outline of the organ; green: of a lesion. "
    "Attention tells what was taken into the embedding, not why the score came out so."
)


# Figures as text


def number(value: float | None, digits: int = 3) -> str:
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return ""
    return f"{value:,.{digits}f}" if isinstance(value, float) else f"{value:,}"


def interval(figure: Mapping | None) -> str:
    """`0.85 to 0.95`, or nothing."""
    if not figure or figure.get("low") is None:
        return ""
    return f"{number(float(figure['low']))} to {number(float(figure['high']))}"


def figure_text(figure: Mapping | float | None, digits: int = 3) -> str:
    """`0.91 (0.85 to 0.95)`, or less where less is known."""
    if figure is None:
        return ""
    if not isinstance(figure, Mapping):
        return number(figure, digits)
    if figure.get("value") is None:
        return ""
    text = number(float(figure["value"]), digits)
    return f"{text} ({interval(figure)})" if interval(figure) else text


def p_text(p: float | None) -> str:
    return "" if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}"


def plain(value: object) -> str:
    """A setting as one line of text."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {plain(item)}" for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(map(plain, value))
    return "" if value is None else str(value)


def figure_of(evaluation: Mapping, metric: str) -> Mapping | None:
    """A figure as {value, low, high}, whatever wrote it: older results hold plain numbers."""
    figure = evaluation.get(metric)
    return figure if figure is None or isinstance(figure, Mapping) else {"value": figure, "low": None, "high": None}


# Sections of figures


def headline_section(tasks: Mapping[str, Mapping]) -> Section:
    headlines, rows = [], []
    for task, evaluation in tasks.items():
        macro = {name: figure_of(evaluation.get("macro") or {}, name) for name in NAMES}
        for name in METRICS:
            macro[name] = macro[name] or figure_of(evaluation, f"macro_{name}")
        prefix = "" if len(tasks) == 1 else f"{task}: "
        headlines += [
            (f"{prefix}macro {NAMES[name]}", number(float(macro[name]["value"])), interval(macro[name]))
            for name in HEADLINES
            if macro[name] and macro[name].get("value") is not None
        ]
        for name in NAMES:
            micro = figure_of(evaluation.get("micro") or {}, name)
            texts = (figure_text(macro[name]), figure_text(micro))
            if any(texts):
                rows.append((f"{prefix}{NAMES[name]}", *texts))
    return Section(
        "Headline figures",
        "headlines",
        (
            "Macro: mean over the findings that have a figure. Micro: all pairs of case and finding in one pool. In "
            "brackets the 95 % interval over resamples of patients. The protocol at the end says how thresholds were "
            "chosen.",
        ),
        headlines=tuple(headlines),
        tables=(Table("All findings together", ("figure", "macro", "micro"), rows),) if rows else (),
    )


def task_sections(evaluation: Mapping, of_task: str, stem: str) -> list[Section]:
    """Of one task; `of_task` ends the headings and `stem` begins the anchors where there are several."""
    return [
        finding_section(evaluation, of_task, stem),
        organ_section(evaluation, of_task, stem),
        curve_section(evaluation, of_task, stem),
        calibration_section(evaluation, of_task, stem),
        wording_section(evaluation, of_task, stem),
    ]


def finding_section(evaluation: Mapping, of_task: str, stem: str) -> Section:
    per_finding = evaluation["per_finding"]
    shown = [name for name in METRICS if any(figure_of(m, name) for m in per_finding.values())]
    ranking, decisions = ([name for name in shown if (name in RANKING_METRICS) == wanted] for wanted in (True, False))
    rows, rows_at_threshold = [], []
    for finding, metrics in per_finding.items():
        left_out = sum(metrics.get("excluded", {}).values())
        counts = (metrics["positives"], metrics["negatives"], left_out)
        figures = (figure_text(figure_of(metrics, name)) for name in ranking)
        rows.append((finding, *figures, metrics["organ"], *counts, metrics.get("reason") or ""))
        threshold = (metrics.get("threshold") or {}).get("value")
        figures = (figure_text(figure_of(metrics, name)) for name in decisions)
        rows_at_threshold.append((finding, number(threshold), *figures, metrics.get("threshold_reason") or ""))
    tables = [
        table_with_notes(
            "Every finding",
            ("finding", *(NAMES[name] for name in ranking), "organ", "with", "without", "left out", "note"),
            rows,
            "With, without: cases that are scored and labelled.",
        )
    ]
    if decisions:
        columns = ("finding", "threshold", *(NAMES[name] for name in decisions), "note")
        note = (
            "Present is a score strictly above the threshold; with cross-validation the mean over the folds is shown."
        )
        tables.append(table_with_notes("Every finding at its threshold", columns, rows_at_threshold, note))
    return Section(f"Findings{of_task}", f"{stem}findings", tables=tuple(tables))


def table_with_notes(caption: str, columns: tuple, rows: list[tuple], note: str) -> Table:
    """A table whose last column is left out where no row has anything in it."""
    if not any(row[-1] for row in rows):
        columns, rows = columns[:-1], [row[:-1] for row in rows]
    return Table(caption, columns, rows, note, is_sortable=True)


def organ_section(evaluation: Mapping, of_task: str, stem: str) -> Section:
    per_organ = {organ: figure_of(metrics, "auc") for organ, metrics in evaluation.get("per_organ", {}).items()}
    per_organ = {organ: figure for organ, figure in per_organ.items() if figure and figure.get("value") is not None}
    rows = []
    for organ, figure in sorted(per_organ.items(), key=lambda item: -item[1]["value"]):
        of_organ = [figure_of(m, "auc") for m in evaluation["per_finding"].values() if m["organ"] == organ]
        values = [entry["value"] for entry in of_organ if entry and entry.get("value") is not None]
        rows.append((f"{organ} ({len(values)})", {"low": None, "high": None} | dict(figure), values))
    if not rows:
        return Section(f"Organs{of_task}", f"{stem}organs")
    lowest = min(min(figure["low"] or figure["value"], *values, 1) for _, figure, values in rows)
    low = max(0.0, min(0.4, math.floor(lowest * 10) / 10))
    chart = interval_chart(
        "Mean AUC of every organ; the numbers stand in the table of findings.",
        rows,
        (low, 1.0),
        0.5,
        "AUC",
        [tick / 10 for tick in range(round(low * 10), 11)],
    )
    caption = "Bars: mean AUC over an organ's findings (their number in brackets), with its 95 % interval; rings: each "
    return Section(
        f"Organs{of_task}", f"{stem}organs", wide_charts=(Chart(chart, f"{caption}finding; dashed: chance."),)
    )


def curve_section(evaluation: Mapping, of_task: str, stem: str) -> Section:
    charts = []
    measured = [(f, m) for f, m in evaluation["per_finding"].items() if m.get("curves")]
    for finding, metrics in sorted(measured, key=lambda item: -((figure_of(item[1], "auc") or {}).get("value") or 0)):
        curves, total = metrics["curves"], metrics["positives"] + metrics["negatives"]
        chart = curves_chart(finding, curves["roc"], curves["pr"], metrics["positives"] / max(total, 1))
        charts.append(
            Chart(
                chart,
                f"{finding} ({metrics['organ']}): AUC {figure_text(figure_of(metrics, 'auc'))}, average precision "
                f"{figure_text(figure_of(metrics, 'average_precision'))}; {metrics['positives']} of {total}",
            )
        )
    return Section(
        f"Curves{of_task}",
        f"{stem}curves",
        ("Best AUC first. Dashed: chance, for precision the share of cases with the finding.",),
        charts=tuple(charts),
    )


def calibration_section(evaluation: Mapping, of_task: str, stem: str) -> Section:
    charts, rows = [], []
    pooled = (evaluation.get("micro") or {}).get("calibration") or {}
    if pooled.get("bins"):
        chart = reliability_chart("all findings", pooled["bins"])
        charts.append(Chart(chart, "All findings in one pool. Bars: how many scores lie in a bin; dashed: perfect."))
    for finding, metrics in evaluation["per_finding"].items():
        of_finding = metrics.get("calibration")
        if of_finding:
            rows.append((finding, *(figure_text(of_finding.get(name)) for name in ("brier", "ece", "ece_equal_mass"))))
    columns = ("finding", NAMES["brier"], NAMES["ece"], NAMES["ece_equal_mass"])
    return Section(
        f"Calibration{of_task}",
        f"{stem}calibration",
        charts=tuple(charts),
        tables=(Table("Calibration of every finding", columns, rows, is_sortable=True),) if rows else (),
    )


def wording_section(evaluation: Mapping, of_task: str, stem: str) -> Section:
    """AUC of each finding over the ways to ask for it."""
    spreads = evaluation["spreads"]
    rows = []
    for finding, spread in sorted(spreads.items(), key=lambda item: -width(item[1])):
        if spread:
            own = (figure_of(evaluation["per_finding"].get(finding, {}), "auc") or {}).get("value")
            figure = {"value": own, "low": spread["min"], "high": spread["max"]}
            rows.append((finding, figure, [pair["auc"] for pair in spread.get("pairs", ())]))
    heading, anchor = f"Sensitivity to wording{of_task}", f"{stem}wording"
    if not rows:
        return Section(heading, anchor)
    chart = interval_chart(
        "AUC of every finding over its wordings.",
        rows[:LONGEST_LIST],
        (0.0, 1.0),
        0.5,
        "AUC",
        [0, 0.25, 0.5, 0.75, 1],
        from_chance=False,
    )
    table = Table(
        "Wordings",
        ("finding", "wordings", "lowest AUC", "highest AUC", "standard deviation"),
        [
            (f, spreads[f]["num_wordings"], *(number(spreads[f][key]) for key in ("min", "max", "std")))
            for f, _, _ in rows
        ],
        is_sortable=True,
    )
    text = "Each finding asked in every wording alone. A difference between two models that is smaller may be one of "
    return Section(
        heading,
        anchor,
        (f"{text}wording.",),
        wide_charts=(
            Chart(
                chart,
                "Dot: the AUC of the score (the mean over its pairs of sentences); rings: each pair alone; line: from "
                f"the lowest to the highest.{cut_note(len(rows))}",
            ),
        ),
        tables=(table,),
    )


def width(spread: Mapping | None) -> float:
    return spread["max"] - spread["min"] if spread else 0.0


def cut_note(count: int) -> str:
    return f" The first {LONGEST_LIST} of {count}." if count > LONGEST_LIST else ""


def comparison_section(comparison: Mapping, place: int) -> Section:
    """Differences b - a of `compare_frames`; `a`, `b` and `task` are their names, where they are told."""
    macro = [
        (NAMES[name], *(number(entry[side]) for side in ("a", "b")), figure_text(entry["difference"]),
         p_text(entry["difference"].get("p")))
        for name, entry in comparison["macro"].items()
        if entry and entry["difference"]["value"] is not None
    ]  # fmt: skip
    rows, table_rows = [], []
    for finding, entry in comparison["per_finding"].items():
        auc, delong = entry.get("auc"), entry.get("delong")
        if not auc or auc["difference"]["value"] is None:
            continue
        figure = {key: auc["difference"][key] for key in ("value", "low", "high")}
        of_delong = ("", "", "")
        if delong:
            figure = {"value": delong["difference"], "low": delong["low"], "high": delong["high"]}
            of_delong = (number(delong["difference"]), p_text(delong["p"]), p_text(delong.get("p_holm")))
        rows.append((finding, figure, ()))
        table_rows.append(
            (finding, number(auc["a"]), number(auc["b"]), figure_text(auc["difference"]),
             p_text(auc["difference"].get("p")), *of_delong[1:])
        )  # fmt: skip
    rows.sort(key=lambda row: -abs(row[1]["value"]))
    told = "; ".join(f"{side.upper()} is {place_name(comparison[side])}" for side in ("a", "b") if comparison.get(side))
    of_task = f" ({comparison['task']})" if comparison.get("task") else ""
    reach = max([0.05, *(abs(end) for _, figure, _ in rows for end in figure.values() if end is not None)])
    reach = min(1.0, math.ceil(reach * 20) / 20)
    charts = ()
    if rows:
        chart = interval_chart(
            "Difference in AUC of every finding.",
            rows[:LONGEST_LIST],
            (-reach, reach),
            0.0,
            "AUC of B minus AUC of A",
            [round(-reach + reach * step / 2, 3) for step in range(5)],
        )
        charts = (Chart(chart, f"Difference with its interval by DeLong.{cut_note(len(rows))}"),)
    return Section(
        f"Run A against run B{of_task}",
        f"comparison-{place}",
        (
            *([f"{told}."] if told else []),
            "B minus A on the cases that both scored. p of a mean by the bootstrap, of a finding's AUC by DeLong's "
            "test; p (Holm) is that for as many findings as were compared.",
            *comparison.get("warnings", ()),
        ),
        wide_charts=charts,
        tables=(
            *([Table("Means over findings", ("figure", "A", "B", "difference", "p"), macro)] if macro else []),
            *(
                [
                    Table(
                        "AUC of every finding",
                        ("finding", "A", "B", "difference", "p (bootstrap)", "p (DeLong)", "p (Holm)"),
                        table_rows,
                        is_sortable=True,
                    )
                ]
                if table_rows
                else []
            ),
        ),
    )


DIRECTIONS = {"report_to_volume": "text to image", "volume_to_report": "image to text"}


def retrieval_section(retrieval: Mapping | None, shows_text: bool) -> Section:
    """Recall, rank and chance of `retrieve`, and the nearest texts of a few scans."""
    if not retrieval:
        return Section("Retrieval", "retrieval")
    tables = []
    for pool in ("whole", "deduplicated"):
        rows, columns = [], None
        parts = {"whole volume": retrieval.get("global"), **retrieval.get("per_organ", {})}
        for name, part in parts.items():
            figures = ((part or {}).get("pools") or {}).get(pool)
            for direction, words in DIRECTIONS.items() if figures else ():
                entry = figures[direction]
                columns = columns or tuple(f"R@{k}" for k in entry["recall"])
                rows.append(
                    (name, words, figures["num_candidates"], *map(with_chance, entry["recall"].values()),
                     with_chance(entry["median_rank"], 1), with_chance(entry["mrr"]))
                )  # fmt: skip
        if rows:
            heads = ("what", "direction", "candidates", *columns, "median rank", "MRR")
            note = "After the slash: the same by chance."
            if pool == "whole":
                note += " Many scans share a normal sentence: ranks say more in the pool of different texts."
            tables.append(Table(f"Pool: {pool}", heads, rows, note, is_sortable=True))
    pictured = retrieval.get("examples") or ()
    if shows_text and pictured:
        rows = [
            (
                f"{example['recon_id']}{', ' + example['organ'] if example.get('organ') else ''}",
                example["text"] or "",
                "" if example["rank"] is None else example["rank"],
                " | ".join(f"{near['cosine']:.2f} {near['text']}" for near in example["nearest"][:3]),
            )
            for example in pictured[:LONGEST_LIST]
        ]
        tables.append(Table("Examples", ("scan", "its own text", "rank of it", "nearest texts"), rows))
    elif pictured:
        rows = [
            (f"{example['recon_id']}{', ' + example['organ'] if example.get('organ') else ''}",
             "" if example["rank"] is None else example["rank"], number(example["cosine"]))
            for example in pictured[:LONGEST_LIST]
        ]  # fmt: skip
        tables.append(Table("Examples", ("scan", "rank of its own text", "cosine"), rows, "Texts were left out."))
    texts = [f"{name}: {plain(value)}." for name, value in (retrieval.get("convention") or {}).items()]
    return Section("Retrieval", "retrieval", tuple(texts), tables=tuple(tables))


def with_chance(figure: Mapping, digits: int = 3) -> str:
    text = number(figure.get("value"), digits)
    return f"{text} / {number(figure['chance'], digits)}" if text and figure.get("chance") is not None else text


DIAGNOSTICS = {
    "num_scans": "scans", "num_pairs": "pairs", "num_texts": "texts", "alignment": "alignment",
    "modality_gap": "modality gap", "image_uniformity": "uniformity, images", "text_uniformity": "uniformity, texts",
    "image_effective_rank": "effective rank, images", "text_effective_rank": "effective rank, texts",
    "image_effective_rank_centred": "centred, images", "text_effective_rank_centred": "centred, texts",
    "image_cosine": "cosine of two images", "text_cosine": "cosine of different texts",
    "text_cosine_distinct": "each text once",
}  # fmt: skip
POOLINGS = {"zero_shot": "zero-shot", "linear_probe": "linear probe"}


def diagnostics_section(diagnostics: Mapping | None) -> Section:
    """The figures of `diagnose`: whole volumes, every organ, their mean; and attention against mean pooling."""
    if not diagnostics:
        return Section("The embeddings", "diagnostics")
    parts = {"whole volume": diagnostics.get("global"), **diagnostics.get("per_organ", {})}
    parts["mean over organs"] = diagnostics.get("macro")
    parts = {name: figures for name, figures in parts.items() if figures}
    columns = [name for name in DIAGNOSTICS if any(figures.get(name) is not None for figures in parts.values())]
    rows = [(name, *(number(figures.get(column)) for column in columns)) for name, figures in parts.items()]
    tables = []
    if columns:
        names = ("", *(DIAGNOSTICS[column] for column in columns))
        note = (
            "Alignment: 0 where every image coincides with its text. Uniformity: 0 where all are one point, lower "
            "where they are spread. Cosine of different texts near 1: they have collapsed, and nothing can be learned "
            "from them."
        )
        tables.append(Table("Organ by organ", names, rows, note, is_sortable=True))
    for name, words_of_it in POOLINGS.items():
        compared = (diagnostics.get("pooling") or {}).get(name)
        if compared:
            entries = {"mean over findings": compared["macro"], **compared["per_finding"]}
            rows = [
                (finding, number(entry["attention"]), number(entry["mean"]), figure_text(entry["difference"]),
                 p_text(entry["difference"].get("p")))
                for finding, entry in entries.items()
            ]  # fmt: skip
            heads = ("finding", "attention", "mean", "mean minus attention", "p")
            tables.append(Table(f"AUC by pooling of the same tokens, {words_of_it}", heads, rows, is_sortable=True))
    return Section("The embeddings", "diagnostics", tables=tuple(tables))


def probe_section(probe: Mapping | None) -> Section:
    """AUC of the probes of `probe`, finding by finding."""
    kinds = {"linear": "linear probe", "knn": "nearest neighbours"}
    kinds = {kind: name for kind, name in kinds.items() if probe and probe.get(kind)}
    if not kinds:
        return Section("Probes of the frozen embeddings", "probes")
    findings = list(dict.fromkeys(finding for kind in kinds for finding in probe[kind]["per_finding"]))
    rows = [("mean over findings", *(figure_text(figure_of(probe[kind]["macro"], "auc")) for kind in kinds), "")]
    for finding in findings:
        figures = (figure_of(probe[kind]["per_finding"].get(finding, {}), "auc") for kind in kinds)
        rows.append((finding, *map(figure_text, figures), (probe.get("reasons") or {}).get(finding, "")))
    texts = tuple(f"{words(name)}: {plain(value)}." for name, value in (probe.get("settings") or {}).items())
    columns = ("finding", *(f"AUC, {name}" for name in kinds.values()), "note")
    return Section(
        "Probes of the frozen embeddings",
        "probes",
        ("Learned from labels, on folds of other patients: what the image embedding alone holds.", *texts),
        tables=(Table("AUC of the probes", columns, rows, is_sortable=True),),
    )


def words(name: str) -> str:
    return str(name).replace("_", " ")


# Pictures


class Pictures:
    """Pictures of a results folder, until the page is full.

    Args:
        folder: Of the results.
        shows_text: Whether sentences of reports may stand below.
    """

    def __init__(self, folder: Path, shows_text: bool):
        self.folder, self.shows_text, self.used = Path(folder), shows_text, 0

    def picture(self, name: object, heading: str, alt: str, facts: str, quote: str = "") -> Picture:
        """A PNG of the folder, shrunk to the page; one that is not there or no picture is named without it."""
        png, size = self._read(str(name or ""))
        if png is not None and self.used + len(png) > ALL_PICTURES_BYTES:
            png = None
        self.used += len(png or b"")
        return Picture(heading, alt, png, facts, quote if self.shows_text else "", size)

    def _read(self, name: str) -> tuple[bytes | None, tuple[int, int]]:
        from PIL import Image

        path = (self.folder / name).resolve()
        # The name comes out of a file of results: it may not bring in what lies elsewhere.
        if not name or not path.is_relative_to(self.folder.resolve()) or not path.is_file():
            return None, (0, 0)
        try:
            with Image.open(path, formats=("PNG",)) as picture:
                if picture.width <= PICTURE_WIDTH:
                    picture.load()
                    buffer, size = io.BytesIO(path.read_bytes()), picture.size
                else:
                    size = (PICTURE_WIDTH, round(picture.height * PICTURE_WIDTH / picture.width))
                    small = picture.convert("RGB").resize(size, Image.Resampling.LANCZOS)
                    buffer = io.BytesIO()
                    small.quantize(256, Image.Quantize.FASTOCTREE).save(buffer, "PNG", optimize=True)
        except (OSError, ValueError):  # damaged
            return None, (0, 0)
        return buffer.getvalue(), size


def errors_section(frame: pd.DataFrame, examples: Sequence[Mapping], pictures: Pictures) -> Section:
    worst = worst_errors(frame, 24)
    rows = [
        (row.recon_id, row.finding, row.organ, row.kind, number(float(row.score)), "yes" if row.is_complete else "no")
        for row in worst.itertuples()
    ]
    if not rows:
        return Section("Worst errors", "errors")
    shown = [example for example in examples if example["kind"] in ("missed", "false alarm")]
    return Section(
        "Worst errors",
        "errors",
        (
            "The surest mistakes: findings that are there with the lowest scores, and findings that are not with the "
            "highest; at most two of a finding and kind. Whole: the scan does not cut the organ.",
            *([ORIENTATION] if shown else []),
        ),
        tables=(
            Table("The surest mistakes", ("scan", "finding", "organ", "kind", "score", "whole"), rows,
                  is_sortable=True),
        ),
        pictures=tuple(example_picture(example, pictures) for example in shown),
    )  # fmt: skip


def attention_section(examples: Sequence[Mapping], pictures: Pictures) -> Section:
    chosen = [example for example in examples if example["kind"] not in ("missed", "false alarm")]
    return Section(
        "Where the model looked",
        "attention",
        (f"Findings that are there and were scored high, one of an organ. {ORIENTATION}",),
        pictures=tuple(example_picture(example, pictures) for example in chosen),
    )


def example_picture(example: Mapping, pictures: Pictures) -> Picture:
    finding, organ, case = example["finding"], example["organ"], example["recon_id"]
    facts = f"{KINDS.get(example['kind'], example['kind'])}. Score {number(example.get('score'))}"
    if example.get("peak_weight") is not None:
        facts += (
            f"; the heaviest patch has {example['peak_weight']:.0%} of the attention, "
            f"{example['effective_patches']:.1f} of {example['patches']} patches in effect"
        )
    return pictures.picture(
        example.get("picture"),
        f"{case}: {finding} ({organ})",
        f"Axial, coronal and sagittal plane of {case} through the patch of the {organ} with most attention.",
        f"{facts}.",
        example.get("text") or "",
    )


def lesion_section(lesions: Mapping | None, pictures: Pictures) -> Section:
    """The figures of lesion_attention.json."""
    if not lesions or not lesions.get("figures"):
        return Section("Attention and lesions", "lesions")
    names = {
        "mass": "attention in the lesion's patches",
        "volume_share": "the lesion's part of the organ's volume",
        "patch_share": "the lesion's part of the organ's patches",
        "twin_mass": "attention there without the lesion",
        "is_hit": "the heaviest patch is one of the lesion's",
        "mass_over_volume_share": "attention / volume",
        "mass_over_patch_share": "attention / patches",
        "mass_over_twin_mass": "attention / attention without the lesion",
    }
    figures = lesions["figures"]
    shown = [key for key in names if key in figures]
    per_finding = [
        (finding, entry["organ"], entry["cases"], *(figure_text(entry.get(key)) for key in shown))
        for finding, entry in lesions["per_finding"].items()
    ]
    left_out = "; ".join(f"{count} left out: {reason}" for reason, count in lesions["left_out"].items())
    return Section(
        "Attention and lesions",
        "lesions",
        (
            f"{lesions['counted']} cases of {lesions['patients']} patients, where the place of the lesion is known"
            f"{', looked at by ' + place_name(lesions['model']) if lesions.get('model') else ''}. "
            "A map without preference has as much attention in the lesion's patches as they are of the organ's patches."
            + (f" {left_out[0].upper()}{left_out[1:]}." if left_out else "")
            + " Pictures show the planes through the middle of the lesion.",
        ),
        headlines=tuple(
            (names[key], number(float(figures[key]["value"])), interval(figures[key]))
            for key in ("mass", "volume_share", "patch_share", "twin_mass")
            if key in figures
        ),
        tables=(
            Table("All cases", ("figure", "mean, 95 % interval"), [(names[k], figure_text(figures[k])) for k in shown]),
            Table("By finding", ("finding", "organ", "cases", *(names[k] for k in shown)), per_finding,
                  is_sortable=True),
        ),
        pictures=tuple(
            pictures.picture(
                Path(str(lesions.get("folder", "")), str(example["picture"])),
                f"{example['patient_id']}: {example['finding']} ({example['organ']})",
                f"Attention of the {example['organ']} of {example['patient_id']} with the outline of the lesion.",
                f"{example['mass']:.0%} of the attention in the lesion's {example['patches']} patches, which are "
                f"{example['patch_share']:.0%} of the organ's; the lesion is {example['volume_share']:.1%} of it.",
            )
            for example in lesions.get("examples", ())
        ),
    )  # fmt: skip


# What was left out, and how it was done


def left_out_section(tasks: Mapping[str, Mapping]) -> Section:
    counts, cases = [], []
    for task, evaluation in tasks.items():
        counts += [(reason, task, count) for reason, count in evaluation.get("excluded", {}).items()]
        for reason, entry in evaluation.get("dropped_cases", {}).items():
            counts.append((f"whole case: {reason}", task, entry["count"]))
            cases += [(name, task, reason) for name in entry["cases"]]
    tables = []
    if counts:
        tables.append(Table("By reason", ("reason", "task", "pairs of case and finding, or cases"), counts))
    if cases:
        rest = f"{len(cases) - LONGEST_LIST:,} more in metrics.json." if len(cases) > LONGEST_LIST else ""
        tables.append(Table("Whole cases", ("case", "task", "reason"), cases[:LONGEST_LIST], rest))
    return Section("What was left out", "left-out", tables=tuple(tables))


def protocol_section(results: Mapping, first: Mapping) -> Section:
    """Every setting of the run, how the figures of its first task were made, and the versions of the libraries."""
    protocol = dict(results.get("protocol") or {})
    versions = protocol.pop("versions", {})
    protocol.pop("warnings", None)
    for key in ("model", "data"):
        if isinstance(protocol.get(key), Mapping):  # results of earlier versions hold paths
            protocol[key] = {"name": entry_name(protocol[key])} | {
                k: v for k, v in protocol[key].items() if k != "path"
            }
    tables = []
    rows = list(setting_rows(protocol))
    if rows:
        tables.append(Table("How it was scored", ("setting", "value"), rows))
    measured = first.get("protocol")
    if measured and measured is not results.get("protocol"):
        tables.append(Table("How figures were made", ("setting", "value"), list(setting_rows(measured))))
    if versions:
        tables.append(Table("Versions", ("library", "version"), [(str(k), str(v)) for k, v in versions.items()]))
    return Section("Protocol and versions", "protocol", tables=tuple(tables))


def setting_rows(settings: Mapping, prefix: str = ""):
    """(name, text) of every setting, nested ones under their path."""
    for key, value in settings.items():
        if isinstance(value, Mapping):
            yield from setting_rows(value, f"{prefix}{words(key)}: ")
        elif isinstance(value, (list, tuple)) and value and all(isinstance(item, Mapping) for item in value):
            for place, item in enumerate(value, start=1):
                yield from setting_rows(item, f"{prefix}{words(key)} {place}: ")
        elif plain(value):
            yield f"{prefix}{words(key)}", plain(value)
