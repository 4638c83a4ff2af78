"""The published figures of a result file: the authors' own, to the last digit, and what tells them from others."""

import json
import math
import re
import types
from pathlib import Path

import numpy as np
import pytest

from evaluation_fvlm import published_metrics
from evaluation_fvlm.published_metrics import main, published_finding_metrics, published_threshold

GOLDEN_KEYS = {
    "auc": "auc_scores",
    "accuracy": "acc_scores",
    "specificity": "spec_scores",
    "sensitivity": "sens_scores",
    "weighted_f1": "f1_scores",
    "precision": "prec_scores",
    "threshold": "thresholds",
}
SCORES = "file_name,lung_Nodule_Not nodule._Nodule.,heart_Big heart_Not big._Big.\n"
LABELS = "VolumeName,Big heart,Nodule\n"


def golden_differences(module, folder: Path) -> list[tuple[str, str]]:
    """(finding, figure) of every number that is not the authors', averages as (mean, figure)."""
    golden = json.loads((folder / "outputs.json").read_text())
    frame = module.read_published_files(folder / "res.csv", folder / "valid_predicted_labels.csv")
    summary = module.summarize_published(frame)
    expected = {(finding, name): golden[key][finding] for name, key in GOLDEN_KEYS.items() for finding in golden[key]}
    ours = {(finding, name): summary["per_finding"].get(finding, {}).get(name, math.nan) for finding, name in expected}
    assert len(expected) == 35 and len(summary["per_finding"]) == 5
    differences = [key for key, value in expected.items() if not abs(ours[key] - value) <= 1e-12]
    printed = re.findall(r"Average (\w+) of Ours: ([\d.]+)", golden["stdout"])
    names = {"AUC": "auc", "ACC": "accuracy", "Spec": "specificity", "Sens": "sensitivity"}
    names |= {"F1": "weighted_f1", "Prec": "precision"}
    assert {head for head, _ in printed} == set(names)
    averages = summary["averages"]
    return differences + [("mean", head) for head, text in printed if round(averages[names[head]], 3) != float(text)]


def mutated(*changes: tuple[str, str]) -> types.ModuleType:
    """The module with pieces of its text replaced, each of which must stand there once."""
    source = Path(published_metrics.__file__).read_text(encoding="utf-8")
    for old, new in changes:
        assert source.count(old) == 1, old
        source = source.replace(old, new)
    module = types.ModuleType("mutant")
    exec(compile(source, "mutant", "exec"), module.__dict__)
    return module


@pytest.fixture
def golden_dir(shared_dir) -> Path:
    return shared_dir / "golden" / "metrics"


def test_every_published_figure_is_ours(golden_dir):
    assert golden_differences(published_metrics, golden_dir) == []


DISTANCE = "np.sqrt((1 - sensitivity) ** 2 + false_positive_rate**2)"


@pytest.mark.parametrize(
    "old, new, moved",
    [
        ("distance.min())[-1]", "distance.min())[0]", ("Cardiomegaly", "threshold")),  # first of equals
        (DISTANCE, "1 - sensitivity + false_positive_rate", ("Emphysema", "threshold")),  # Youden
        (DISTANCE, "-sensitivity * (1 - false_positive_rate)", ("Emphysema", "threshold")),  # geometric mean
        ("linspace(0, 1, 100)", "linspace(0, 1, 101)", ("Hiatal hernia", "threshold")),
        ("linspace(0, 1, 100)", "unique(scores)", ("Emphysema", "threshold")),  # every cut, as of a ROC curve
        ('average="weighted"', 'average="macro"', ("Emphysema", "weighted_f1")),
        ('average="weighted"', 'average="binary"', ("Cardiomegaly", "weighted_f1")),
        ("predicted, zero_division=0)", 'predicted, average="weighted")', ("Cardiomegaly", "precision")),
        ("known = ~np.isnan(labels)", "known = ~np.isnan(labels) & ~np.isnan(scores)", ("Cardiomegaly", "auc")),
        ("np.where(absent, 0.0, scores)", "np.where(absent, 0.5, scores)", ("Cardiomegaly", "auc")),
        ("label_rows[name][finding]", "label_rows[list(label_rows)[list(score_rows).index(name)]][finding]",
         ("Emphysema", "auc")),  # rows matched by place, not by name
    ],
)  # fmt: skip
def test_a_plausible_other_rule_moves_a_published_figure(golden_dir, old, new, moved):
    assert moved in golden_differences(mutated((old, new)), golden_dir)


@pytest.mark.parametrize(
    "old, new", [("scores[:, None] > thresholds", "scores[:, None] >= thresholds"), ("> threshold)", ">= threshold)")]
)
def test_scores_on_a_threshold_are_not_above_it(golden_dir, old, new):
    """No golden score lies on a chosen threshold, so there >= changes nothing; here the negative lies on the one."""
    mutant = mutated((old, new))
    assert golden_differences(mutant, golden_dir) == []
    scores, labels = np.linspace(0, 1, 100)[[50, 51]], np.array([0, 1])
    ours, theirs = (module.published_finding_metrics(scores, labels) for module in (published_metrics, mutant))
    assert ours["threshold"] == scores[0] and ours["accuracy"] == 1.0
    assert theirs["accuracy"] == 0.5


def slow_threshold(scores, labels):
    best, chosen = math.inf, None
    for threshold in np.linspace(0, 1, 100):
        hits = sum(s > threshold for s, y in zip(scores, labels) if y == 1) / sum(labels)
        alarms = sum(s > threshold for s, y in zip(scores, labels) if y == 0) / (len(labels) - sum(labels))
        distance = math.sqrt((1 - hits) ** 2 + alarms**2)
        if distance <= best:
            best, chosen = distance, threshold
    return chosen


@pytest.mark.parametrize("seed", range(10))
def test_threshold_equals_a_walk_over_all(seed):
    rng = np.random.default_rng(seed)
    labels = np.array([0, 1, *rng.integers(0, 2, 20)])
    scores = rng.integers(0, 12, 22) / 11  # ties, some of them on thresholds: 99 = 9 * 11
    assert np.isin(scores, np.linspace(0, 1, 100)).any()
    assert published_threshold(scores, labels) == slow_threshold(scores, labels)


def test_one_class_and_unknown_labels_are_reported():
    nan = math.nan
    metrics = published_finding_metrics([0.2, nan, 0.9, 0.8], [1, 1, nan, nan])
    assert metrics["auc"] is None and metrics["threshold"] is None
    assert metrics["reason"] == "no negative volume among the 2 labelled"
    assert (metrics["num_nan_as_zero"], metrics["num_unknown_labels"]) == (1, 2)
    known = published_finding_metrics([0.2, nan, 0.9, 0.8], [0, 1, nan, 1])
    assert known["auc"] == 0.5  # the absent positive lies below the negative, 0.8 above it
    # Nothing above the last threshold: no positive prediction at all, precision 0 and no warning.
    assert published_finding_metrics([1.0, 0.0, 0.0], [0, 1, 1])["precision"] == 0.0


def test_a_finding_without_any_score_is_not_measured():
    """Zeros for all would be an AUC of 0.5, and look like a model that has learnt nothing."""
    metrics = published_finding_metrics([math.nan] * 3, [0, 1, 1])
    assert metrics["auc"] is None and metrics["reason"] == "no volume with a score among the 3 labelled"
    assert published_finding_metrics([math.nan, math.nan, 0.1], [0, 1, 1])["auc"] is not None


def test_command_prints_the_table_and_writes_every_figure(golden_dir, tmp_path, capsys):
    places = ["--scores", str(golden_dir / "res.csv"), "--labels", str(golden_dir / "valid_predicted_labels.csv")]
    assert main([*places, "--json", str(tmp_path / "new" / "out.json")]) == 0
    printed = capsys.readouterr().out
    (average,) = [line for line in printed.splitlines() if line.startswith("average")]
    assert average.split()[1:] == ["0.833", "0.750", "0.741", "0.782", "0.763", "0.548"]
    assert "threshold chosen on the test labels, as published" in printed
    assert "2 scores of absent organs (NaN) counted as 0, as published" in printed
    written = json.loads((tmp_path / "new" / "out.json").read_text())
    assert written["num_nan_as_zero"] == 2 and written["num_volumes"] == 60
    assert written["per_finding"]["Cardiomegaly"]["organ"] == "heart"


def test_findings_are_found_in_columns_of_any_organ(tmp_path):
    """An organ with _ in its name, a finding that ends like another: both would break a split at every _."""
    (tmp_path / "s.csv").write_text("file_name,adrenal_gland_Big_Not big._Big.,lung_Lung opacity_No._Opacity.\na,0,1\n")
    (tmp_path / "l.csv").write_text("VolumeName,opacity,Lung opacity,Opacity.,Big\na,0,1,0,0\n")
    frame = published_metrics.read_published_files(tmp_path / "s.csv", tmp_path / "l.csv")
    assert frame[["organ", "finding", "label"]].to_numpy().tolist() == [
        ["adrenal_gland", "Big", 0.0],
        ["lung", "Lung opacity", 1.0],
    ]


GOOD = [SCORES + "a,0.5,\nb,0.25,nan\n", LABELS + "b,0,1\na,1,0\nunused,0,0\n"]


def test_good_files_are_read(tmp_path):
    for name, text in zip("sl", GOOD):
        (tmp_path / name).write_text(text)
    frame = published_metrics.read_published_files(tmp_path / "s", tmp_path / "l")
    assert frame["label"].tolist() == [0, 1, 1, 0]
    np.testing.assert_array_equal(frame["score"], [0.5, 0.25, math.nan, math.nan])


@pytest.mark.parametrize(
    "which, old, new, message",
    [
        (0, "file_name", "volume", r"s.csv: expected the column 'file_name' and one column per finding, .* got \['vol"),
        (1, "VolumeName", "volume", r"l.csv: expected the column 'VolumeName'"),
        (0, "heart_Big heart_Not big._Big.", "lung_Nodule_Not nodule._Nodule.", "each once"),
        (0, "heart_Big heart_", "heart_Big hart_", r"names no finding of .*l.csv \(2 columns\).*nearest: 'Big heart'"),
        (1, "Nodule", "Noodle", r"'lung_Nodule_Not nodule._Nodule.' names no finding .*nearest: 'Noodle'"),
        (0, "Nodule_Not nodule._Nodule.,heart_Big heart", "Nodule_N._P.,heart_Nodule", "'Nodule'.* more than one col"),
        (0, "b,0.25", "c,0.25", r"s.csv: 1 of 2 volumes have no row in .*l.csv: \['c'\]. Give the label file"),
        (0, "b,0.25", "a,0.25", "row 3: 'a' comes twice"),
        (0, "b,0.25,nan", "b,0.25", r"row 3 \(b\): not 3 cells"),
        (0, "b,0.25,nan", "b,0.25,nan,1", r"row 3 \(b\): not 3 cells"),
        (0, "0.25", "high", r"s.csv: b, 'lung_Nodule_.*': 'high' is no number; a score is empty or a probability"),
        (0, "0.25", "1.25", "'1.25' is no probability"),
        (0, "0.25", "inf", "'inf' is no probability"),
        (0, "0.25", "0.2_5", "'0.2_5' is no number"),
        (0, "0.25", "x" * 1000, r"'x{56} \.\.\.' is no number"),
        (1, "b,0,1", "b,0,0_1", "label '0_1' is neither"),
        (1, "b,0,1", "b,0,yes", "l.csv: b, 'Nodule': label 'yes' is neither 0 nor 1"),
        (1, "b,0,1", "b,0,", "label '' is neither"),
        (1, "b,0,1", "b,0,-1", "label '-1' is neither"),
        (0, "a,0.5,\nb,0.25,nan\n", "", "s.csv has no rows"),
    ],
)
def test_bad_files_are_named(tmp_path, capsys, which, old, new, message):
    texts = list(GOOD)
    assert texts[which].count(old) == 1
    texts[which] = texts[which].replace(old, new)
    for name, text in zip(("s.csv", "l.csv"), texts):
        (tmp_path / name).write_text(text)
    given = ["--scores", str(tmp_path / "s.csv"), "--labels", str(tmp_path / "l.csv")]
    assert main([*given, "--json", str(tmp_path / "out.json")]) == 1
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "out.json").exists()


def test_unreadable_files_are_named(tmp_path, capsys):
    (tmp_path / "s.csv").write_bytes(b"\x1f\x8b\xff\x00\xfe")
    for scores in ("s.csv", "none.csv"):
        assert main(["--scores", str(tmp_path / scores), "--labels", str(tmp_path / "l.csv")]) == 1
        assert re.search(rf"{scores} cannot be read as CSV", capsys.readouterr().err)


def test_what_is_labelled_but_not_scored_is_counted(tmp_path, capsys):
    texts = (GOOD[0], "VolumeName,Big heart,Nodule,Effusion\nb,0,1,0\na,1,0,0\nunused,0,0,1\n")
    for name, text in zip(("s.csv", "l.csv"), texts):
        (tmp_path / name).write_text(text)
    given = ["--scores", str(tmp_path / "s.csv"), "--labels", str(tmp_path / "l.csv")]
    assert main([*given, "--json", str(tmp_path / "out.json")]) == 0
    expected = {"num_volumes": 1, "findings": ["Effusion"]}
    assert json.loads((tmp_path / "out.json").read_text())["labelled_without_scores"] == expected
    assert "labelled, but without scores: 1 volumes, 1 findings ['Effusion']" in capsys.readouterr().out


def test_a_place_where_no_file_can_be_is_told_first(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for place, message in ((tmp_path, "is a folder; name a file in it"), (tmp_path / "file" / "o", "cannot be made")):
        assert main(["--scores", "none.csv", "--labels", "none.csv", "--json", str(place)]) == 1
        assert message in capsys.readouterr().err
