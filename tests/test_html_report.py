"""The report of an evaluation: well-formed, alone in its file, deaf to what its texts would like to be, laid out."""

import argparse
import io
import json
import re
import shutil
import subprocess

import numpy as np
import pandas as pd
import pytest
import yaml
from html_page import Page, browser_command, in_browser
from markupsafe import Markup
from PIL import Image

from evaluation_fvlm import html_report, report_sections
from evaluation_fvlm.bootstrap import figure
from evaluation_fvlm.chosen_cases import SYNTHETIC_FINDINGS, is_synthetic, surest_hits, worst_errors
from evaluation_fvlm.diagnostics import describe
from evaluation_fvlm.errors import EvaluationError
from evaluation_fvlm.html_charts import interval_chart, reliability_chart
from evaluation_fvlm.html_report import page_html, read_results, write_report
from evaluation_fvlm.html_template import SCRIPT, Section, cell_content, kind_of_cell, render_page
from evaluation_fvlm.protocols import Protocol, compare_frames, evaluate_frame
from evaluation_fvlm.report_sections import Pictures, errors_section
from evaluation_fvlm.wording import wording_spread

EVIL = "<script>alert('x')</script><b>&\"'"
SENTENCE = "A cyst of 31 mm lies in the right lobe."
FINDINGS = {"Liver cyst": "liver", "Hepatic steatosis": "liver", "Kidney stone": "kidney", EVIL: "spleen"}


def score_frame(seed: int, strength: float, task: str = "own") -> pd.DataFrame:
    """60 patients, scores that know something of the labels; the spleen is absent in some, a label unknown in some."""
    labels = np.random.default_rng(0)
    rng = np.random.default_rng(seed)
    rows = []
    for number in range(60):
        for place, (finding, organ) in enumerate(FINDINGS.items()):
            label = float(labels.random() < 0.35)
            score = 1 / (1 + np.exp(-(strength * (label - 0.5) + rng.normal())))
            rows.append(
                {
                    **{
                        "task": task,
                        "patient_id": f"p{number}",
                        "scan_id": f"p{number}_a",
                        "recon_id": f"p{number}_a_1",
                    },
                    **{"finding": finding, "organ": organ, "is_complete": number % 7 > 0},
                    "score": np.nan if organ == "spleen" and number % 9 == 0 else score,
                    "label": np.nan if place == 2 and number % 11 == 0 else label,
                }
            )
    return pd.DataFrame(rows)


def picture(path, color=(200, 30, 30)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (300, 120), color).save(path)


def retrieval_of(organs) -> dict:
    entry = figure(0.4, np.array([0.3, 0.4, 0.5])) | {"chance": 0.02}
    direction = {"num_queries": 50, "recall": {"1": entry, "5": entry}, "median_rank": entry, "mrr": entry}
    pool = {"num_candidates": 50, "report_to_volume": direction, "volume_to_report": direction}
    part = {"num_pairs": 50, "pools": {"whole": pool, "deduplicated": pool}}
    near = [{"text": SENTENCE, "cosine": 0.7, "is_own": True}]
    example = {"recon_id": "p1_a_1", "organ": EVIL, "text": SENTENCE, "cosine": 0.7, "rank": 1, "nearest": near}
    return {
        "convention": {"ties": "in random order"},
        "global": None,
        "per_organ": dict.fromkeys(organs, part) | {"pancreas": {"num_pairs": 0, "pools": None}},
        "examples": [example],
    }


def diagnostics_of() -> dict:
    rng = np.random.default_rng(0)
    images, texts = (values / np.linalg.norm(values, axis=1)[:, None] for values in rng.normal(size=(2, 20, 8)))
    figures = describe(images, np.ones(20, bool), texts, np.arange(20))
    entry = {
        "attention": 0.8125,
        "mean": 0.75,
        "difference": figure(-0.0625, rng.normal(-0.06, 0.01, 50)) | {"p": 0.001},
    }
    pooling = {"zero_shot": {"macro": entry, "per_finding": {EVIL: entry}}, "linear_probe": None}
    return {"global": None, "per_organ": {"liver": figures, EVIL: figures}, "macro": None, "pooling": pooling}


def lesions_of() -> dict:
    figures = {"mass": figure(0.5, np.array([0.4, 0.6, 0.5])), "volume_share": figure(0.1), "patch_share": figure(0.3)}
    example = {"picture": "cyst.png", "patient_id": EVIL, "finding": "Liver cyst", "organ": "liver", "mass": 0.5}
    example |= {"volume_share": 0.1, "patch_share": 0.3, "patches": 4}
    per_finding = {"Liver cyst": {"organ": "liver", "cases": 9} | figures}
    left_out = {"the mask does not hold the organ": 2}
    return {"counted": 9, "patients": 7, "left_out": left_out, "figures": figures, "per_finding": per_finding,
            "examples": [example], "folder": "lesion_attention"}  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A folder as eval_fvlm.py writes it, with every part: results, scores, examples."""
    folder = tmp_path_factory.mktemp("run")
    frame, other = score_frame(1, 2.5), score_frame(2, 1.0)
    protocol = Protocol(num_bootstraps=100)
    evaluation = evaluate_frame(frame, protocol)
    per_finding = {}
    for finding in FINDINGS:
        rows = frame[frame["finding"] == finding]
        noise = np.random.default_rng(5).normal(0, 0.1, (len(rows), 3))
        scores = np.clip(rows["score"].to_numpy()[:, None] + noise, 0, 1)
        spread = wording_spread(scores, rows["label"].to_numpy(), [("Yes.", "No."), (EVIL, "No."), ("Y.", "N.")], 1)
        per_finding[finding] = {"organ": FINDINGS[finding], "auc": 0.5, "wording": spread}
    results = {
        **{"task": "own", "per_finding": per_finding, "macro_auc": 0.5, "evaluation": evaluation, "other_tasks": {}},
        "protocol": {
            "name": "standard",
            "model": {"path": f"models/{EVIL}", "revision": None},
            "data": {"path": "data/split"},
            "tasks": [{"name": "own", "version": 1}],
            "warnings": [f"a warning of {EVIL}"],
            "versions": {"torch": "2.13.0"},
        },
        "comparisons": [{"task": "own", "a": "first", "b": EVIL} | compare_frames(frame, other, protocol)],
        "retrieval": retrieval_of(["liver", EVIL]),
        "diagnostics": diagnostics_of(),
        "probe": {
            "settings": {"features": f"of {EVIL}"},
            "reasons": {"Kidney stone": "one class alone"},
            "linear": evaluate_frame(score_frame(7, 4.0), protocol),
            "knn": None,
        },
        "lesion_attention": lesions_of(),
    }
    picture(folder / "lesion_attention" / "cyst.png", (20, 200, 20))
    examples = []
    cases = pd.concat([worst_errors(frame, 4), surest_hits(frame, 2)]).to_dict("records")
    for number, case in enumerate(cases):
        picture(folder / "examples" / f"{number}.png", (10 * number, 50, 90))
        keys = ("task", "patient_id", "scan_id", "recon_id", "finding", "organ", "kind", "score")
        examples.append({key: case[key] for key in keys} | {"picture": f"examples/{number}.png", "text": SENTENCE})
        examples[-1] |= {"peak_weight": 0.25, "patches": 12, "effective_patches": 6.5}
    frame.to_csv(folder / "scores.csv", index=False)
    (folder / "metrics.json").write_text(json.dumps(results))
    (folder / "examples" / "examples.json").write_text(json.dumps(examples))
    return folder, results, frame, examples


@pytest.fixture(scope="module")
def page(run):
    folder, results, frame, examples = run
    path = write_report(folder, results, frame=frame, examples=examples, show_text=True)
    assert path == folder / "report.html" and not list(folder.glob("*.part"))
    return path.read_text(encoding="utf-8")


def test_the_page_is_well_formed_and_stands_alone(page):
    parsed = Page(page)
    assert page.startswith("<!DOCTYPE html>") and parsed.of("html") == [{"lang": "en"}]
    assert len(parsed.of("script")) == 1 and not parsed.of("link") and not parsed.of("iframe")
    addresses = [a[name] for _, a in parsed.tags for name in ("src", "href", "action", "data", "srcset") if name in a]
    assert addresses and all(address.startswith(("#", "data:image/png;base64,")) for address in addresses)
    assert "url(" not in page and "@import" not in page
    anchors = {a["id"] for _, a in parsed.tags if "id" in a}
    assert {address[1:] for address in addresses if address.startswith("#")} <= anchors
    assert len(anchors) == sum("id" in a for _, a in parsed.tags), "an id twice"
    assert not any(name.startswith("on") for _, a in parsed.tags for name in a)


def test_a_browser_may_load_nothing(page):
    """The policy lets through the page's own script by its hash, styles and inlined pictures, and nothing else."""
    (policy,) = (a["content"] for a in Page(page).of("meta") if "http-equiv" in a)
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert (
        rules["default-src"] == "'none'" and rules["img-src"] == "data:" and rules["script-src"].startswith("'sha256-")
    )
    assert "'unsafe-inline'" not in rules["script-src"] and SCRIPT in page


def test_the_page_can_be_read_without_seeing_it(page):
    parsed = Page(page)
    levels = [int(tag[1]) for tag, _ in parsed.tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(later - earlier <= 1 for earlier, later in zip(levels, levels[1:])), "no level of headings is left out"
    images, drawings = parsed.of("img"), parsed.of("svg")
    assert len(images) == 7 and all(len(image["alt"]) > 40 and int(image["width"]) > 0 for image in images)
    assert len(drawings) >= 8 and all(d["role"] == "img" and d["aria-label"] for d in drawings)
    assert len(parsed.text["caption"]) == len(parsed.of("table")) >= 12
    assert all(cell["scope"] in ("col", "row") for cell in parsed.of("th"))


def test_every_text_is_escaped(page):
    parsed = Page(page)
    assert not parsed.of("b") and "alert(" in page
    for tag in ("th", "td", "p", "text", "figcaption", "h3"):
        assert any(EVIL in text or EVIL[:20] in text for text in parsed.text[tag]), tag


def test_figures_stand_on_the_page(page, run):
    _, results, frame, _ = run
    evaluation = results["evaluation"]
    macro = evaluation["macro"]["auc"]
    parsed = Page(page)
    page = page.replace('<span class="range">', "").replace("</span>", "")
    assert f"{macro['value']:.3f}" in parsed.text["dd"] and f"{macro['low']:.3f} to {macro['high']:.3f}" in page
    for finding, metrics in evaluation["per_finding"].items():
        auc, f1 = metrics["auc"], metrics["f1"]
        for entry in (auc, f1):
            assert f"{entry['value']:.3f} ({entry['low']:.3f} to {entry['high']:.3f})" in page, finding
    delong = results["comparisons"][0]["per_finding"]["Liver cyst"]["delong"]
    assert f"{results['comparisons'][0]['per_finding']['Liver cyst']['auc']['a']:.3f}" in page
    assert ("&lt; 0.001" if delong["p"] < 0.001 else f"{delong['p']:.3f}") in page
    assert "0.400 / 0.020" in page, "retrieval with chance beside it"
    alignment = results["diagnostics"]["per_organ"]["liver"]["alignment"]
    assert f"{alignment:.3f}" in parsed.text["td"] and "0.812" in page and "mean minus attention" in page
    probed = results["probe"]["linear"]["macro"]["auc"]
    assert f"{probed['value']:.3f} ({probed['low']:.3f} to {probed['high']:.3f})" in page and "one class alone" in page
    assert "0.500 (0.405 to 0.595)" in page, "attention in lesions"
    assert "no score: organ absent" in page and "2.13.0" in page and "chosen by cross-validation" in page
    worst = worst_errors(frame, 24)
    assert all(name in page for name in worst["recon_id"])


def test_sentences_of_reports_come_only_when_asked_for(run, page):
    folder, results, frame, examples = run
    without = page_html(folder, results, frame, examples, show_text=False)
    assert SENTENCE in page and "sentences of its reports: its terms hold" in page
    assert SENTENCE not in without and "were left out; --show_text" in without
    assert "rank of its own text" in without


def test_no_path_of_this_machine_stands_on_the_page(run):
    """Results of earlier versions hold paths; the page names their last part, and a Hub id as it is."""
    folder, results, frame, examples = run
    places = {
        "model": {"path": "/home/jane_doe/model_7", "commit": None},
        "data": {"path": "owner/ct", "split": "test"},
    }
    comparison = results["comparisons"][0] | {"a": "/home/jane_doe/model_7", "b": "jane_doe/runs/model_8"}
    lesions = results["lesion_attention"] | {"model": "/home/jane_doe/model_7"}
    told = results | {"protocol": places, "comparisons": [comparison], "lesion_attention": lesions}
    html = page_html(folder, told, frame, examples, show_text=True)
    assert "jane_doe" not in html and "model_7 on owner/ct" in html and "A is model_7; B is model_8." in html
    assert "looked at by model_7" in html and "model: name" in html and "data: split" in html


def test_the_synthetic_set_is_known_by_its_labels(run):
    """The set's prompts may be asked of patients: their labels do not know all that the set paints."""
    folder, results, frame, examples = run
    rows = yaml.safe_load(SYNTHETIC_FINDINGS.read_text())["findings"]
    painted = pd.concat([frame[frame["finding"] == "Liver cyst"].assign(finding=row["finding"]) for row in rows])
    assert is_synthetic(painted) and not is_synthetic(frame) and not is_synthetic(painted.iloc[:0])
    assert not is_synthetic(painted[painted["finding"].isin(["Emphysema", "Lung nodule"])])
    assert not is_synthetic(painted.assign(label=painted["label"].where(painted["finding"] != "Psoas abscess")))
    assert SENTENCE in page_html(folder, results, painted, examples, show_text=False)


@pytest.mark.parametrize("part", ["comparisons", "retrieval", "diagnostics", "probe", "lesion_attention", "protocol"])
def test_a_part_that_is_not_there_has_no_section(run, part):
    folder, results, frame, examples = run
    anchors = {"comparisons": "comparison-1", "lesion_attention": "lesions", "probe": "probes"}
    full = page_html(folder, results, frame, examples, True)
    for missing in ({key: value for key, value in results.items() if key != part}, results | {part: None}):
        html = page_html(folder, missing, frame, examples, True)
        anchor = f'id="{anchors.get(part, part)}"'
        assert anchor in full
        assert anchor not in html or part == "protocol", "how figures were made is told all the same"
        assert ("2.13.0" in html) == (part != "protocol")
        Page(html)


def test_bare_results_of_evaluate_frame_have_a_page(run, tmp_path):
    """No comparison, no retrieval, no pictures, two tasks: what `python -m evaluation_fvlm score` knows."""
    _, _, frame, _ = run
    first = evaluate_frame(frame, Protocol(num_bootstraps=0))
    second = evaluate_frame(score_frame(3, 0.5, "second"), Protocol(num_bootstraps=0, threshold=0.5))
    path = write_report(tmp_path, first | {"other_tasks": {"second": second}}, frame=frame)
    parsed = Page(path.read_text())
    headings = parsed.text["h2"]
    assert "Findings of own" in headings and "Findings of second" in headings and "Retrieval" not in headings
    assert not parsed.of("img") and "own: macro AUC" in parsed.text["dt"]


def test_results_where_nothing_can_be_measured_have_a_page(tmp_path):
    frame = score_frame(1, 1.0)
    frame["label"] = 0.0
    results = evaluate_frame(frame, Protocol(num_bootstraps=10))
    html = write_report(tmp_path, results, frame=frame).read_text()
    assert "no positive case" in html and Page(html).of("table")


# Which cases are shown


def test_worst_errors_are_the_surest_mistakes():
    frame = pd.DataFrame(
        [
            ("t", "a", "r1", 0.02, 1), ("t", "a", "r2", 0.03, 1), ("t", "a", "r3", 0.04, 1),  # a weak finding
            ("t", "b", "r4", 0.30, 1), ("t", "b", "r5", 0.70, 1), ("t", "b", "r6", 0.95, 0),
            ("t", "c", "r7", 0.60, 0), ("t", "c", "r8", np.nan, 1), ("t", "c", "r9", 0.9, np.nan),
        ],
        columns=["task", "finding", "recon_id", "score", "label"],
    )  # fmt: skip
    worst = worst_errors(frame)
    assert worst["recon_id"].tolist() == ["r1", "r2", "r6", "r4", "r7"]
    assert worst["kind"].tolist() == ["missed", "missed", "false alarm", "missed", "false alarm"]
    np.testing.assert_allclose(worst["error"], [0.98, 0.97, 0.95, 0.7, 0.6])
    assert worst_errors(frame, 2)["recon_id"].tolist() == ["r1", "r6"], "one of each kind"
    assert worst_errors(frame.assign(label=np.nan)).empty


def test_of_each_organ_the_surest_hit_is_shown():
    frame = score_frame(1, 2.5)
    hits = surest_hits(frame, 3)
    assert len(hits) == 3 == hits["organ"].nunique() and (hits["label"] == 1).all()
    for _, hit in hits.iterrows():
        assert hit["score"] == frame["score"][(frame["organ"] == hit["organ"]) & (frame["label"] == 1)].max()
    assert hits["score"].is_monotonic_decreasing


# Pictures


def test_pictures_come_from_the_folder_alone(run, tmp_path):
    """A name in a file of results must not bring a file of elsewhere into a page that is handed on."""
    folder, results, frame, examples = run
    picture(tmp_path / "secret.png")
    (folder / "broken.png").write_bytes(b"no picture")
    for name in (str(tmp_path / "secret.png"), f"../{tmp_path.name}/secret.png", "broken.png", "none.png", "", None):
        html = page_html(folder, results | {"lesion_attention": None}, frame, [examples[0] | {"picture": name}], True)
        assert not Page(html).of("img") and "Left out" in html, name


def test_large_pictures_are_shrunk_and_the_page_is_bounded(run, monkeypatch):
    folder, results, frame, examples = run
    noise = np.random.default_rng(0).integers(0, 255, (500, 2000, 3)).astype(np.uint8)
    Image.fromarray(noise).save(folder / "noise.png")
    (first,) = errors_section(
        frame, [examples[0] | {"picture": "noise.png", "kind": "missed"}], Pictures(folder, True)
    ).pictures
    assert first.size == (900, 225) and Image.open(io.BytesIO(first.png)).size == (900, 225)
    monkeypatch.setattr(report_sections, "ALL_PICTURES_BYTES", len(first.png) + 10)
    twice = [examples[0] | {"picture": "noise.png", "kind": "missed"}] * 2
    shown = errors_section(frame, twice, Pictures(folder, True)).pictures
    assert shown[0].png and shown[1].png is None


# Charts and cells


def test_bars_stand_where_their_numbers_are():
    rows = [
        ("a", {"value": 0.75, "low": 0.7, "high": 0.8}, [0.6]),
        ("b", {"value": None, "low": None, "high": None}, ()),
    ]
    chart = interval_chart("x", rows, (0.5, 1.0), 0.5, "AUC", [0.5, 1.0])
    (ticks, ends) = re.findall(r'<text x="([\d.]+)"[^>]*>(?:0\.5|1)</text>', chart)
    left, right = float(ticks), float(ends)
    ring, dot = (float(x) for x in re.findall(r'<circle cx="([\d.]+)"', chart))
    assert dot == pytest.approx((left + right) / 2) and ring == pytest.approx(left + 0.2 * (right - left), abs=0.1)
    whisker = re.search(r'<line x1="([\d.]+)" y1="19.0" x2="([\d.]+)"', chart)
    assert float(whisker[1]) == pytest.approx(left + 0.4 * (right - left), abs=0.1)
    assert float(whisker[2]) == pytest.approx(left + 0.6 * (right - left), abs=0.1)
    assert "not measured" in chart


def test_reliability_is_drawn_as_it_is():
    bins = [
        {"low": 0.0, "high": 0.5, "count": 30, "mean_score": 0.2, "share_positive": 0.1},
        {"low": 0.5, "high": 1.0, "count": 10, "mean_score": 0.7, "share_positive": 0.9},
    ]
    chart = reliability_chart("x", bins)
    points = [(float(x), float(y)) for x, y in re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)"', chart)]
    np.testing.assert_allclose(
        points, [(34 + 230 * 0.2, 250 - 230 * 0.1), (34 + 230 * 0.7, 250 - 230 * 0.9)], atol=0.06
    )
    heights = [float(tall) for tall in re.findall(r'<rect [^>]*height="([\d.]+)"', chart)]
    assert heights[0] == pytest.approx(3 * heights[1], rel=0.02)


@pytest.mark.parametrize(
    ("text", "kind"),
    [(3, "number"), ("0.912 (0.871 to 0.948)", "number"), ("0.400 / 0.020", "number"), ("-0.031", "number")]
    + [("< 0.001", "text"), ("liver", "text"), ("", "number"), ("x" * 50, "long"), ("14 of 30", "number")],
)
def test_numbers_stand_to_the_right_and_words_to_the_left(text, kind):
    assert kind_of_cell(text) == kind


def test_an_interval_may_go_onto_a_line_of_its_own():
    assert cell_content("0.912 (0.871 to 0.948)") == '0.912 <span class="range">(0.871 to 0.948)</span>'
    assert cell_content("-0.031 (-0.071 to 0.048)").endswith('<span class="range">(-0.071 to 0.048)</span>')
    for cell in (3, "", "0.400 / 0.020", "lung (left)", "0.9 (<b> to 1)"):
        assert cell_content(cell) == cell and not isinstance(cell_content(cell), Markup), "left to the template"


def test_a_column_of_notes_is_there_where_one_stands_in_it(run):
    _, results, frame, _ = run
    evaluation = results["evaluation"] | {"spreads": {}}
    ranking, decisions = report_sections.finding_section(evaluation, "", "").tables
    assert ranking.columns[:3] == ("finding", "AUC", "average precision") and ranking.columns[-1] == "left out"
    assert decisions.columns[:2] == ("finding", "threshold") and decisions.columns[-1] == "Youden"
    one_class = frame.assign(label=frame["label"].where(frame["finding"] != "Kidney stone", 0.0))
    evaluation = evaluate_frame(one_class, Protocol(num_bootstraps=0)) | {"spreads": {}}
    (ranking, _) = report_sections.finding_section(evaluation, "", "").tables
    assert ranking.columns[-1] == "note" and ranking.rows[2][-1].startswith("no positive case")


def test_an_empty_section_is_left_out():
    html = render_page("t", "l", "", [Section("Nothing", "nothing", ("a text alone",))])
    assert "Nothing" not in html


# The command


def arguments_of(folder, *more):
    parser = argparse.ArgumentParser()
    html_report.add_arguments(parser)
    return parser.parse_args(["--results", str(folder), *more])


def test_the_command_draws_the_same_page_from_the_files(run, page):
    folder, results, frame, examples = run
    (folder / "report.html").unlink(missing_ok=True)
    assert html_report.run(arguments_of(folder, "--show_text")) == 0
    assert (folder / "report.html").read_text(encoding="utf-8") == page
    _, again, _ = read_results(folder)
    assert again["score"].isna().sum() == frame["score"].isna().sum() > 0


def test_parts_in_files_of_their_own_are_found(run, tmp_path):
    """retrieval.json beside the results, lesion_attention in its folder, comparison.json one folder up."""
    source, results, frame, _ = run
    folder = tmp_path / "a"
    (folder / "lesion_attention").mkdir(parents=True)
    parts = {name: results[name] for name in ("comparisons", "retrieval", "lesion_attention")}
    bare = {key: value for key, value in results.items() if key not in parts}
    (folder / "metrics.json").write_text(json.dumps(bare))
    (folder / "retrieval.json").write_text(json.dumps(parts["retrieval"]))
    lesions = {key: value for key, value in parts["lesion_attention"].items() if key != "folder"}
    (folder / "lesion_attention" / "lesion_attention.json").write_text(json.dumps(lesions))
    shutil.copy(source / "lesion_attention" / "cyst.png", folder / "lesion_attention")
    (tmp_path / "comparison.json").write_text(json.dumps({"comparisons": parts["comparisons"]}))
    frame.to_csv(folder / "scores.csv", index=False)
    assert html_report.run(arguments_of(tmp_path)) == 0, "a folder of runs"
    parsed = Page((folder / "report.html").read_text())
    assert {"Run A against run B (own)", "Retrieval", "Attention and lesions"} <= set(parsed.text["h2"])
    assert len(parsed.of("img")) == 1


def test_a_folder_without_results_is_refused(tmp_path):
    with pytest.raises(EvaluationError, match="no metrics.json beside a scores.csv"):
        html_report.run(arguments_of(tmp_path))
    (tmp_path / "scores.csv").write_text("task\n")
    (tmp_path / "metrics.json").write_text("{}")
    with pytest.raises(EvaluationError, match="holds no figures"):
        html_report.run(arguments_of(tmp_path))
    (tmp_path / "metrics.json").write_text("{")
    with pytest.raises(EvaluationError, match="cannot be read"):
        html_report.run(arguments_of(tmp_path))


# In a browser

PROBE = """
<script>addEventListener('load', () => {
  const table = document.querySelector('table.sortable');
  const heads = [...table.tHead.rows[0].cells];
  const place = heads.findIndex(head => head.textContent === 'AUC');
  const values = () => [...table.tBodies[0].rows].map(row => parseFloat(row.cells[place].textContent));
  heads[place].querySelector('button').click();
  const falling = values();
  heads[place].querySelector('button').click();
  document.body.setAttribute('data-seen', JSON.stringify({
    wide: document.documentElement.scrollWidth, inner: innerWidth,
    pictures: [...document.images].filter(image => image.naturalWidth > 0 && image.clientWidth > 0).length,
    charts: [...document.querySelectorAll('svg')].filter(svg => svg.clientHeight > 20).length,
    falling: falling, rising: values(), sort: heads[place].getAttribute('aria-sort'),
    injected: document.querySelectorAll('b').length,
  }));
})</script></body>"""


@pytest.mark.slow
@pytest.mark.parametrize("width", [500, 1400])
def test_a_browser_lays_the_page_out(page, tmp_path, width):
    """Only tables and charts may be wider than the page, and scroll in their boxes; pictures are drawn, tables sort."""
    # The policy would keep the probe out as it keeps out any other script.
    open_page = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page)
    (tmp_path / "page.html").write_text(open_page.replace("</body>", PROBE), encoding="utf-8")
    command = [*browser_command(tmp_path), "--hide-scrollbars", f"--window-size={width},900", "--dump-dom"]
    told = subprocess.run(
        [*command, (tmp_path / "page.html").as_uri()], capture_output=True, text=True, timeout=120, check=True
    ).stdout
    attributes = Page(told).of("body")[0]
    seen = json.loads(attributes["data-seen"])
    assert seen["inner"] == pytest.approx(width, abs=20) and seen["wide"] <= seen["inner"]
    assert seen["pictures"] == len(Page(page).of("img")) > 0 and seen["charts"] == len(Page(page).of("svg")) > 0
    assert seen["falling"] == sorted(seen["falling"], reverse=True) and seen["rising"] == sorted(seen["rising"])
    assert seen["falling"] != seen["rising"] and seen["sort"] == "ascending" and seen["injected"] == 0


@pytest.mark.slow
def test_a_wide_table_keeps_its_first_column_in_sight(page, tmp_path):
    """Scrolled to its end, on a narrow page: the finding's name stays at the left edge."""
    open_page = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page)
    probe = """(() => {
      const box = [...document.querySelectorAll('.wide')].find(b => b.querySelector('table.many'));
      box.scrollLeft = 9999;
      const first = box.querySelector('tbody th').getBoundingClientRect(), edge = box.getBoundingClientRect();
      return [box.scrollLeft > 50, Math.abs(first.left - edge.left) < 2, first.width < 0.5 * edge.width].join();
    })()"""
    assert in_browser(open_page, tmp_path, 500, probe) == "true,true,true"


@pytest.mark.slow
def test_a_browser_runs_the_page_s_script_and_no_other(page, tmp_path):
    """With the policy in force: headings became buttons, and a script that was smuggled in did nothing."""
    smuggled = "<script>document.body.setAttribute('data-smuggled', 'yes')</script></body>"
    (tmp_path / "page.html").write_text(page.replace("</body>", smuggled), encoding="utf-8")
    command = [*browser_command(tmp_path), "--hide-scrollbars", "--dump-dom", (tmp_path / "page.html").as_uri()]
    told = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    parsed = Page(told)
    assert parsed.of("button") and "data-smuggled" not in parsed.of("body")[0]


@pytest.mark.slow
def test_a_screenshot_shows_charts_and_pictures(page, tmp_path):
    (tmp_path / "page.html").write_text(page, encoding="utf-8")
    shot = tmp_path / "page.png"
    command = [*browser_command(tmp_path), "--hide-scrollbars", "--window-size=1300,9700", f"--screenshot={shot}"]
    subprocess.run([*command, (tmp_path / "page.html").as_uri()], capture_output=True, timeout=120, check=True)
    with Image.open(shot) as picture:
        pixels = np.asarray(picture.convert("RGB"))

    def count_of(*color):
        return int((pixels == np.array(color, np.uint8)).all(axis=2).sum())

    assert count_of(0xB9, 0xCF, 0xE3) > 5000, "bars"
    assert count_of(0x1F, 0x5F, 0x9A) > 500, "curves"
    assert count_of(20, 200, 20) > 20_000, "a picture of 300 x 120"
    assert count_of(255, 255, 255) > 0.5 * pixels[..., 0].size
