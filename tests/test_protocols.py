"""A whole table by a protocol: scikit-learn's figures, the authors' own, and what is left out counted."""

import json

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import average_precision_score, f1_score, precision_score, recall_score, roc_auc_score
from test_published_metrics import GOLDEN_KEYS

from evaluation_fvlm.binary_metrics import METRICS
from evaluation_fvlm.equal_reports import REASONS
from evaluation_fvlm.errors import EvaluationError
from evaluation_fvlm.folds import patient_folds
from evaluation_fvlm.metrics import LABEL_UNKNOWN, summarize
from evaluation_fvlm.protocols import (
    COLUMNS,
    NO_SCORE,
    OTHER_RECONSTRUCTION,
    Protocol,
    compare_frames,
    evaluate_frame,
)
from evaluation_fvlm.published_metrics import published_threshold, read_published_files

FINDINGS = {"Nodule": "lung", "Effusion": "lung", "Big heart": "heart"}
QUICK = {"num_bootstraps": 50}


def table(num_patients=60, seed=0, scans=2, reconstructions=2, signal=1.5, findings=FINDINGS):
    """Patients with several scans and reconstructions each; the scores of a patient go together."""
    rng = np.random.default_rng(seed)
    rows = []
    for patient in range(num_patients):
        labels = {finding: float(rng.random() < 0.35) for finding in findings}
        leaning = rng.normal()
        for scan in range(scans):
            for recon in range(1, reconstructions + 1):
                scan_id = f"valid_{patient}_{'abc'[scan]}"
                for finding, organ in findings.items():
                    logit = signal * (labels[finding] - 0.5) + leaning + 0.5 * rng.normal()
                    score = round(1 / (1 + np.exp(-logit)), 3)
                    who = (f"valid_{patient}", scan_id, f"{scan_id}_{recon}")
                    rows.append(("t", *who, finding, organ, score, labels[finding], True))
    frame = pd.DataFrame(rows, columns=COLUMNS)
    return frame.sample(frac=1, random_state=seed).reset_index(drop=True)  # no order to lean on


def with_holes(frame):
    frame = frame.copy()
    for row, column in ((0, "score"), (1, "label"), (2, "score")):
        frame.loc[row, column] = np.nan
    frame.loc[2, "label"] = np.nan  # without either: counted once, as not scored
    return frame


def test_the_table_is_that_of_the_zero_shot_scores():
    from evaluation_fvlm.zero_shot import SCORE_COLUMNS  # takes transformers with it

    assert COLUMNS == SCORE_COLUMNS


def test_figures_are_scikit_learns():
    frame = with_holes(table())
    result = evaluate_frame(frame, Protocol(level="reconstruction", threshold=0.5, **QUICK))
    counted = frame.dropna(subset=["score", "label"])
    expected = {}
    for finding, rows in counted.groupby("finding", sort=False):
        called = rows["score"] > 0.5
        expected[finding] = {
            "auc": roc_auc_score(rows["label"], rows["score"]),
            "average_precision": average_precision_score(rows["label"], rows["score"]),
            "f1": f1_score(rows["label"], called),
            "weighted_f1": f1_score(rows["label"], called, average="weighted"),
            "precision": precision_score(rows["label"], called),
            "recall": recall_score(rows["label"], called),
        }
    assert len(expected) == 3
    for finding, figures in expected.items():
        for name, value in figures.items():
            figure = result["per_finding"][finding][name]
            assert figure["value"] == pytest.approx(value, abs=1e-12), (finding, name)
            assert figure["low"] < value < figure["high"]
    for name in ("auc", "f1", "weighted_f1"):
        macro = np.mean([figures[name] for figures in expected.values()])
        assert result[f"macro_{name}"] == result["macro"][name]["value"] == pytest.approx(macro, abs=1e-12)
        lung = np.mean([expected[finding][name] for finding in ("Nodule", "Effusion")])
        assert result["per_organ"]["lung"][name]["value"] == pytest.approx(lung, abs=1e-12)
    assert result["micro_auc"] == pytest.approx(roc_auc_score(counted["label"], counted["score"]))
    assert result["micro_f1"] == pytest.approx(f1_score(counted["label"], counted["score"] > 0.5))
    assert result["excluded"] == {NO_SCORE: 2, LABEL_UNKNOWN: 1}
    assert sum(len(names) for e in result["per_finding"].values() for names in e["excluded_cases"].values()) == 3
    json.dumps(result, allow_nan=False)


def test_a_score_on_the_threshold_is_not_above_it():
    frame = table(num_patients=10, scans=1, reconstructions=1)
    frame["score"] = 0.25 + 0.5 * frame["label"]
    entry = evaluate_frame(frame, Protocol(threshold=0.75, **QUICK))["per_finding"]["Nodule"]
    assert entry["recall"]["value"] == 0.0 and entry["specificity"]["value"] == 1.0


def test_what_summarize_tells_is_told_alike():
    frame = with_holes(table())
    frame.loc[5:9, "is_complete"] = False
    ours = evaluate_frame(frame, Protocol(level="reconstruction", threshold=0.5, num_bootstraps=0))
    theirs = summarize(frame)
    assert ours["macro_auc"] == theirs["macro_auc"]
    for name in ("num_findings", "num_patients", "num_scans", "num_reconstructions", "num_incomplete_organs"):
        assert ours[name] == theirs[name], name
    assert ours["per_organ"]["lung"]["auc"]["value"] == theirs["per_organ"]["lung"]["auc"]
    assert ours["macro"]["auc"]["low"] is None and ours["protocol"]["in_words"]["intervals"] == "none"


def test_a_scan_is_its_first_reconstruction():
    frame = table(reconstructions=1)
    second = frame.assign(recon_id=frame["recon_id"].str[:-1] + "10", score=0.5)
    frame = frame.assign(recon_id=frame["recon_id"].str[:-1] + "2")  # 2 comes before 10
    both = pd.concat([second, frame]).sample(frac=1, random_state=1)
    protocol = Protocol(threshold=0.5, num_bootstraps=0)
    result = evaluate_frame(both, protocol)
    alone = evaluate_frame(frame, protocol)
    assert result["num_reconstructions"] == alone["num_reconstructions"] == 120
    for name, figure in alone["macro"].items():
        assert result["macro"][name]["value"] == pytest.approx(figure["value"]), name
    dropped = result["dropped_cases"][OTHER_RECONSTRUCTION]
    assert dropped["count"] == 120 and all(name.endswith("_10") for name in dropped["cases"])
    every = evaluate_frame(both, Protocol(level="reconstruction", threshold=0.5, num_bootstraps=0))
    assert every["num_reconstructions"] == 240 and every["dropped_cases"] == {}


def test_scans_with_equal_reports_count_once():
    frame = table(num_patients=4, scans=1)
    # Patients 1 and 3 have the report of patient 0; 2 has none of its own, and none is no equal report.
    reports = {"valid_0": "same", "valid_1": "same", "valid_2": np.nan, "valid_3": "same"}
    frame = frame.sort_values("recon_id").assign(report=lambda rows: rows["patient_id"].map(reports))
    another = frame[frame["patient_id"] == "valid_2"].assign(patient_id="v5", scan_id="v5", report=np.nan)
    frame = pd.concat([frame, another], ignore_index=True)
    frame.loc[frame["patient_id"] == "v5", "recon_id"] += "x"
    for level, dropped in (("scan", 2), ("reconstruction", 4)):
        result = evaluate_frame(frame, Protocol(level, threshold=0.5, duplicates="everywhere", num_bootstraps=0))
        assert result["num_patients"] == 3
        assert result["dropped_cases"][REASONS["everywhere"]]["count"] == dropped
        assert {name[:7] for name in result["dropped_cases"][REASONS["everywhere"]]["cases"]} == {"valid_1", "valid_3"}
    with pytest.raises(EvaluationError, match="a column `report`"):
        evaluate_frame(frame.drop(columns="report"), Protocol(duplicates="everywhere"))


def test_cross_validated_thresholds_never_saw_the_patient():
    """By hand: for every fold the published choice on all other patients' cases, judged on the fold's."""
    frame = table(num_patients=50)
    protocol = Protocol(criterion="published", num_bootstraps=0, level="reconstruction")
    result = evaluate_frame(frame, protocol)
    rows = frame[frame["finding"] == "Nodule"]
    entry = result["per_finding"]["Nodule"]
    by_fold = entry["threshold"]["by_fold"]
    assert len(by_fold) == 5 and len(set(by_fold)) > 1
    patients = np.unique(frame["patient_id"])
    positive = frame[frame["label"] == 1].groupby("patient_id")["finding"].unique()
    is_positive = np.array([[f in positive.get(p, []) for f in result["per_finding"]] for p in patients])
    fold = dict(zip(patients, patient_folds(is_positive, 5, 0)))
    folds = rows["patient_id"].map(fold)
    called = np.zeros(len(rows), bool)
    for n in range(5):
        others, own = rows[folds != n], (folds == n).to_numpy()
        threshold = published_threshold(others["score"].to_numpy(), others["label"].to_numpy())
        assert threshold == by_fold[n]
        called[own] = rows["score"][own] > threshold
        labels, scores = rows["label"][own], rows["score"][own]
        assert entry["folds"]["auc"]["values"][n] == pytest.approx(roc_auc_score(labels, scores))
        assert entry["folds"]["f1"]["values"][n] == pytest.approx(f1_score(rows["label"][own], called[own]))
    assert entry["f1"]["value"] == pytest.approx(f1_score(rows["label"], called))
    assert entry["folds"]["auc"]["mean"] == pytest.approx(np.mean(entry["folds"]["auc"]["values"]))
    assert entry["folds"]["auc"]["sd"] == pytest.approx(np.std(entry["folds"]["auc"]["values"], ddof=1))
    macro = [np.mean([e["folds"]["auc"]["values"][n] for e in result["per_finding"].values()]) for n in range(5)]
    assert result["folds"]["macro"]["auc"]["values"] == pytest.approx(macro)
    assert sum(result["folds"]["num_patients"]) == 50


def test_choosing_on_the_test_labels_flatters_and_is_said():
    """Scores that know nothing: cross-validation finds a balanced accuracy of a half, the test labels more."""
    flattered, honest = [], []
    for seed in range(8):
        frame = table(num_patients=40, seed=seed, scans=1, reconstructions=1, signal=0.0)
        protocols = [Protocol(threshold=t, num_bootstraps=0) for t in ("test_labels", "cross_validation")]
        results = [evaluate_frame(frame, protocol) for protocol in protocols]
        assert results[0]["macro_auc"] == results[1]["macro_auc"]
        flattered.append(results[0]["macro_balanced_accuracy"])
        honest.append(results[1]["macro_balanced_accuracy"])
        assert "on the test labels (as published)" in results[0]["warnings"][0]
        assert "on the test labels (as published)" in results[0]["protocol"]["in_words"]["threshold"]
        assert results[0]["protocol"]["criterion"] == "published" and results[0]["folds"] is None
        assert not any("test labels" in warning for warning in results[1]["warnings"])
    assert np.mean(flattered) > 0.55 and abs(np.mean(honest) - 0.5) < 0.04


def test_development_thresholds_come_from_other_patients():
    frame, development = table(seed=1), table(seed=2)
    development["patient_id"] = "d" + development["patient_id"]
    development = development[development["finding"] != "Effusion"]
    protocol = Protocol(level="reconstruction", threshold="development", criterion="published", **QUICK)
    result = evaluate_frame(frame, protocol, development)
    rows = development[development["finding"] == "Nodule"]
    expected = published_threshold(rows["score"].to_numpy(), rows["label"].to_numpy())
    entry = result["per_finding"]["Nodule"]
    assert entry["threshold"] == {"value": expected, "by_fold": None}
    own = frame[frame["finding"] == "Nodule"]
    assert entry["f1"]["value"] == pytest.approx(f1_score(own["label"], own["score"] > expected))
    missing = result["per_finding"]["Effusion"]
    assert missing["f1"]["value"] is None and missing["auc"]["value"] > 0.5
    assert "has not both classes" in missing["threshold_reason"]
    assert result["macro"]["f1"]["num_findings"] == 2 and result["macro"]["auc"]["num_findings"] == 3
    assert any("no threshold, so no decision metric: Effusion" in warning for warning in result["warnings"])

    with pytest.raises(EvaluationError, match="60 patients are in the development split and in the one"):
        evaluate_frame(frame, protocol, frame)
    with pytest.raises(EvaluationError, match="no development table was given"):
        evaluate_frame(frame, protocol)
    with pytest.raises(EvaluationError, match="the two belong together"):
        evaluate_frame(frame, Protocol(), development)
    with pytest.raises(EvaluationError, match="none of the findings"):
        evaluate_frame(frame, protocol, development.assign(finding="Other " + development["finding"]))


def golden_frame(folder):
    frame = read_published_files(folder / "res.csv", folder / "valid_predicted_labels.csv")
    name = frame["file_name"].str.removesuffix(".nii.gz")
    ids = {"task": "golden", "patient_id": name, "scan_id": name, "recon_id": name, "is_complete": True}
    return frame.assign(**ids)[COLUMNS]


def test_the_published_protocol_gives_the_authors_figures(shared_dir):
    folder = shared_dir / "golden" / "metrics"
    golden = json.loads((folder / "outputs.json").read_text())
    result = evaluate_frame(golden_frame(folder), Protocol.published(**QUICK))
    names = {"sensitivity": "recall"}
    compared = 0
    for name, key in GOLDEN_KEYS.items():
        for finding, value in golden[key].items():
            entry = result["per_finding"][finding][names.get(name, name)]
            assert entry["value"] == pytest.approx(value, abs=1e-12), (finding, name)
            compared += 1
    assert compared == 35
    assert any("2 pairs of case and finding without a score were counted as 0" in w for w in result["warnings"])
    assert result["excluded"] == {}
    # Ours leaves the two absent organs out, and counts them.
    ours = evaluate_frame(golden_frame(folder), Protocol(**QUICK))
    assert ours["excluded"] == {NO_SCORE: 2}
    assert ours["per_finding"]["Cardiomegaly"]["auc"]["value"] > golden["auc_scores"]["Cardiomegaly"] + 0.1


def test_what_cannot_be_measured_has_a_reason_and_no_zero():
    frame = table(num_patients=30)
    frame.loc[frame["finding"] == "Effusion", "label"] = 0.0
    frame.loc[frame["finding"] == "Big heart", "score"] = np.nan
    for protocol in (Protocol(**QUICK), Protocol.published(**QUICK)):
        result = evaluate_frame(frame, protocol)
        effusion, heart = result["per_finding"]["Effusion"], result["per_finding"]["Big heart"]
        assert "no positive case among the" in effusion["reason"]
        assert heart["reason"] == "no case among the 0 scored and labelled"
        for entry in (effusion, heart):
            assert all(entry[name] == {"value": None, "low": None, "high": None} for name in METRICS)
            assert entry["calibration"] is None and entry["curves"] is None
        assert result["macro"]["auc"] == result["per_finding"]["Nodule"]["auc"] | {"num_findings": 1}
        heart = result["per_organ"]["heart"]
        assert heart["auc"]["value"] is None and heart["num_findings"] == 0
        assert (result["num_findings"], result["num_findings_asked"]) == (1, 3)
    nothing = evaluate_frame(frame[frame["finding"] != "Nodule"], Protocol())
    assert nothing["macro_auc"] is None and nothing["micro_auc"] is None and nothing["folds"] is None
    json.dumps(nothing, allow_nan=False)


def test_too_few_positive_patients_for_a_threshold():
    frame = table(num_patients=20)
    rows = frame["finding"] == "Nodule"
    frame.loc[rows, "label"] = (frame["patient_id"] == "valid_3").astype(float)
    result = evaluate_frame(frame, Protocol(**QUICK))
    entry = result["per_finding"]["Nodule"]
    assert entry["positive_patients"] == 1 and entry["auc"]["value"] is not None
    assert entry["f1"]["value"] is None and "too few patients" in entry["threshold_reason"]
    (few,) = [warning for warning in result["warnings"] if "fewer than 10 patients" in warning]
    assert "Nodule" in few


def test_one_patient_has_no_interval():
    frame = table(num_patients=1, scans=2, findings={"Nodule": "lung"}).sort_values("recon_id", ignore_index=True)
    frame["label"] = [1.0, 1.0, 0.0, 0.0]
    result = evaluate_frame(frame, Protocol(threshold=0.5, **QUICK))
    figures = [result["macro"]["auc"], result["micro"]["f1"], result["per_finding"]["Nodule"]["auc"]]
    assert all(known["value"] is not None and known["low"] is known["high"] is None for known in figures)


def test_warnings_name_scores_that_say_nothing_or_all():
    frame = table(num_patients=30)
    frame.loc[frame["finding"] == "Nodule", "score"] = 0.5
    rows = frame["finding"] == "Effusion"
    frame.loc[rows, "score"] = 0.1 + 0.2 * frame["label"]
    result = evaluate_frame(frame, Protocol(threshold=0.9, **QUICK))
    told = {start: [w for w in result["warnings"] if w.startswith(start)] for start in ("all scores", "perfectly")}
    assert told["all scores"][0].endswith(": Nodule.") and told["perfectly"][0].endswith(": Effusion.")
    in_order = evaluate_frame(frame.sort_values("label"), Protocol(threshold=0.9, **QUICK))["warnings"]
    assert told["perfectly"][0] in in_order  # equal scores separate nothing, in whatever order they come
    (silent,) = [w for w in result["warnings"] if w.startswith("nothing is called present")]
    assert "Nodule, Effusion" in silent or "Effusion, Nodule" in silent
    assert result["per_finding"]["Effusion"]["precision"]["value"] == 0.0


def test_calibration_and_curves_are_there_to_draw():
    result = evaluate_frame(table(), Protocol(**QUICK))
    for entry in (*result["per_finding"].values(), result["micro"]):
        roc, pr = (np.array(entry["curves"][name]) for name in ("roc", "pr"))
        assert roc[0].tolist() == [0, 0] and roc[-1].tolist() == [1, 1] and len(roc) <= 101
        assert (np.diff(roc, axis=0) >= 0).all()
        assert np.trapezoid(roc[:, 1], roc[:, 0]) == pytest.approx(entry["auc"]["value"], abs=0.01)
        assert pr[0, 0] == 0 and pr[-1, 0] == 1 and len(pr) <= 101
        counts = [b["count"] for b in entry["calibration"]["bins"]]
        assert sum(counts) == entry["positives"] + entry["negatives"]
    assert result["macro_ece"] == result["macro"]["ece"]["value"] > 0
    brier = result["per_finding"]["Nodule"]["calibration"]["brier"]
    assert brier["low"] < brier["value"] < brier["high"]


def test_the_seed_says_it_all():
    frame = table()
    first, again = (evaluate_frame(frame, Protocol(**QUICK)) for _ in range(2))
    assert first == again
    shuffled = evaluate_frame(frame.sample(frac=1, random_state=3), Protocol(**QUICK))
    assert shuffled["macro"]["auc"] == pytest.approx(first["macro"]["auc"])
    other = evaluate_frame(frame, Protocol(seed=1, **QUICK))
    assert other["macro_auc"] == first["macro_auc"] and other["macro"]["auc"]["low"] != first["macro"]["auc"]["low"]


def test_more_scans_of_the_same_patients_do_not_narrow_the_interval():
    once = table(num_patients=60, scans=1, reconstructions=1, signal=1.0)
    copies = [once.assign(scan_id=once["scan_id"] + str(n), recon_id=once["recon_id"] + str(n)) for n in range(5)]
    protocol = Protocol(threshold=0.5, num_bootstraps=300)
    widths = []
    for frame in (once, pd.concat(copies)):
        auc = evaluate_frame(frame, protocol)["macro"]["auc"]
        widths.append(auc["high"] - auc["low"])
    assert widths[1] == pytest.approx(widths[0], rel=1e-9)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda f: f.drop(columns="organ"), r"lacks the columns \['organ'\]"),
        (lambda f: pd.concat([f, f.head(2)]), "2 rows come again"),
        (lambda f: f.assign(task=["t", "u"] * (len(f) // 2)), r"holds the tasks \['t', 'u'\]"),
        (lambda f: f.assign(score=f["score"] + 1), "a score is a probability"),
        (lambda f: f.assign(score=np.inf), "a score is a probability"),
        (lambda f: f.assign(label=2.0), "a label is 1, 0 or NaN"),
        (lambda f: f.head(0), "holds the tasks"),
    ],
)
def test_a_broken_table_is_refused(change, message):
    with pytest.raises(EvaluationError, match=message):
        evaluate_frame(change(table(num_patients=6)), Protocol())


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"level": "patient"}, "level 'patient' is not one of"),
        ({"threshold": "best"}, "threshold 'best' is neither a number"),
        ({"threshold": float("nan")}, "no finite number"),
        ({"criterion": "mcc"}, "criterion 'mcc'"),
        ({"absent": "half"}, "absent 'half'"),
        ({"duplicates": "merge"}, "duplicates 'merge'"),
        ({"num_bootstraps": -1}, "num_bootstraps -1 must be at least 0"),
        ({"num_folds": 1}, "num_folds 1 must be at least 2"),
        ({"seed": -1}, "seed -1 must be at least 0"),
    ],
)
def test_a_protocol_that_cannot_be_is_refused(settings, message):
    with pytest.raises(EvaluationError, match=message):
        Protocol(**settings)


# comparing two runs


def runs(seed=0, better=1.0):
    """Two runs on the same cases, with common noise; the second knows more by `better`."""
    first = table(seed=seed, signal=1.0)
    second = first.sample(frac=1, random_state=seed).reset_index(drop=True)
    logit = np.log(second["score"] / (1 - second["score"])) + better * (second["label"] - 0.5)
    return first, second.assign(score=1 / (1 + np.exp(-logit)))


def test_differences_are_those_of_the_two_evaluations():
    first, second = runs()
    protocol = Protocol(threshold=0.5, **QUICK)
    result = compare_frames(first, second, protocol)
    alone = [evaluate_frame(frame, protocol) for frame in (first, second)]
    for name in METRICS:
        a, b = (known["macro"][name]["value"] for known in alone)
        assert (result["macro"][name]["a"], result["macro"][name]["b"]) == pytest.approx((a, b))
        assert result[f"macro_{name}_difference"] == pytest.approx(b - a)
        for finding in FINDINGS:
            a, b = (known["per_finding"][finding][name]["value"] for known in alone)
            assert result["per_finding"][finding][name]["difference"]["value"] == pytest.approx(b - a)
    auc = result["macro"]["auc"]["difference"]
    assert 0 < auc["low"] < auc["value"] < auc["high"] and auc["p"] < 0.05
    # The runs go together: the interval of the difference is narrower than those of the AUCs themselves.
    whole = alone[0]["macro"]["auc"]
    assert auc["high"] - auc["low"] < whole["high"] - whole["low"]
    for finding in FINDINGS:
        test = result["per_finding"][finding]["delong"]
        assert test["difference"] == pytest.approx(result["per_finding"][finding]["auc"]["difference"]["value"])
        assert test["p"] <= test["p_holm"]
    json.dumps(result, allow_nan=False)


def test_bootstrap_and_delong_agree():
    first, second = runs(better=0.4)
    result = compare_frames(first, second, Protocol(threshold=0.5, num_bootstraps=2000, level="reconstruction"))
    for finding in FINDINGS:
        bootstrap, test = result["per_finding"][finding]["auc"]["difference"], result["per_finding"][finding]["delong"]
        assert (bootstrap["low"], bootstrap["high"]) == pytest.approx((test["low"], test["high"]), abs=0.02)
        # Four scans of a patient taken as four patients would halve it.
        width = bootstrap["high"] - bootstrap["low"]
        assert width == pytest.approx(test["high"] - test["low"], rel=0.2) and width > 0.03


def test_only_cases_that_both_scored_are_compared():
    first, second = runs()
    first.loc[0, "score"] = np.nan
    second = second.drop(index=second.index[:3])
    second.loc[second.index[5], "label"] = np.nan  # known from the other run
    result = compare_frames(first, second, Protocol(level="reconstruction", threshold=0.5, **QUICK))
    assert result["excluded"] == {NO_SCORE: 1, "case and finding of run a alone": 3}
    perfect = [run.assign(score=0.1 + 0.8 * run["label"].fillna(0)) for run in (first, first)]
    same = compare_frames(*perfect, Protocol(threshold=0.5, **QUICK))
    # Of differences all intervals are between percentiles, and those of perfect separation all too narrow.
    assert "AUCs by Student" not in same["protocol"]["in_words"]["intervals"]
    assert any("intervals are too narrow: " in warning for warning in same["warnings"])
    same = compare_frames(first, first, Protocol(threshold=0.5, **QUICK))
    assert same["macro_auc_difference"] == 0 and same["macro"]["auc"]["difference"]["p"] == 1.0
    assert same["per_finding"]["Nodule"]["delong"]["p"] is None
    wrong = second.assign(label=1 - second["label"])
    with pytest.raises(EvaluationError, match="in run a, . in run b, and .* compared on the same labels"):
        compare_frames(first, wrong, Protocol())
    with pytest.raises(EvaluationError, match="share no case and finding"):
        compare_frames(first, second.assign(finding="Other " + second["finding"]), Protocol())


def test_a_finding_that_one_run_never_scored_is_not_compared():
    """Even where absent scores count as 0: of one run it would be nothing but zeros."""
    first, second = runs()
    rows = second["finding"] == "Nodule"
    second.loc[rows, "score"] = np.nan
    second.loc[second.index[~rows][:5], "score"] = np.nan
    for protocol, reason_count in ((Protocol(**QUICK), 120 + 5), (Protocol.published(**QUICK), 240)):
        result = compare_frames(first, second, protocol)
        assert result["per_finding"]["Nodule"]["reason"] == "no case among the 0 scored and labelled"
        assert result["per_finding"]["Nodule"]["auc"]["difference"]["value"] is None
        assert result["per_finding"]["Effusion"]["auc"]["difference"]["value"] > 0
        assert result["num_findings"] == 2
        assert 120 <= result["excluded"][NO_SCORE] <= reason_count
