"""`python -m evaluation_fvlm score` and `compare`: the command, its table, its JSON."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from test_published_metrics import GOLDEN_KEYS

from evaluation_fvlm.__main__ import COMMANDS, main
from evaluation_fvlm.binary_metrics import METRICS

ROOT = Path(__file__).resolve().parent.parent
HEAVY = {"torch", "transformers", "datasets", "matplotlib"}


@pytest.fixture
def files(tmp_path):
    """Two runs on 40 patients in published form, the second better; labels; the option of few resamples."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, (40, 2))
    noise = rng.normal(size=(40, 2))
    names = [f"valid_{n}_a_1" for n in range(40)]
    head = "VolumeName,Nodule,Big heart\n"
    text = "".join(f"{name}.nii.gz,{a},{b}\n" for name, (a, b) in zip(names, labels))
    (tmp_path / "labels.csv").write_text(head + text)
    for run, signal in (("a", 0.5), ("b", 3.0)):
        scores = 1 / (1 + np.exp(-(noise + signal * (labels - 0.5))))
        text = "".join(f"{name},{a},{b}\n" for name, (a, b) in zip(names, scores))
        head = "file_name,lung_Nodule_Not nodule._Nodule.,heart_Big heart_Not big._Big.\n"
        (tmp_path / f"{run}.csv").write_text(head + text)
    return tmp_path


def run(*arguments):
    return main([*map(str, arguments), "--bootstraps", "40"])


def test_score_prints_a_table_and_writes_json(files, capsys):
    out = files / "new" / "out.json"
    assert run("score", "--scores", files / "a.csv", "--labels", files / "labels.csv", "--json", out) == 0
    printed = capsys.readouterr().out
    result = json.loads(out.read_text())
    for name in METRICS:
        assert isinstance(result[f"macro_{name}"], float) and isinstance(result[f"micro_{name}"], float)
        figure = result["macro"][name]
        assert figure["low"] <= figure["value"] == result[f"macro_{name}"] <= figure["high"]
    for key in ("per_finding", "per_organ", "protocol", "excluded", "dropped_cases", "warnings", "files", "versions"):
        assert key in result
    auc = result["per_finding"]["Nodule"]["auc"]
    assert f"{auc['value']:.3f} [{auc['low']:.3f}, {auc['high']:.3f}]" in printed
    assert "macro (2 findings)" in printed and "chosen by cross-validation" in printed and "40 patients" in printed
    assert run("score", "--scores", files / "a.csv", "--labels", files / "labels.csv", "--quiet") == 0
    assert capsys.readouterr().out == ""


def test_the_authors_figures_come_out_of_the_command(shared_dir, tmp_path, capsys):
    """With the findings named in the task, more of which have no scores here, and without."""
    folder = shared_dir / "golden" / "metrics"
    golden = json.loads((folder / "outputs.json").read_text())
    places = ["--scores", folder / "res.csv", "--labels", folder / "valid_predicted_labels.csv"]
    for task in ([], ["--task", "ct_rate_16"]):
        assert run("score", *places, *task, "--protocol", "published", "--json", tmp_path / "out.json") == 0
        result = json.loads((tmp_path / "out.json").read_text())
        compared = 0
        for name, key in GOLDEN_KEYS.items():
            for finding, value in golden[key].items():
                entry = result["per_finding"][finding]["recall" if name == "sensitivity" else name]
                assert entry["value"] == pytest.approx(value, abs=1e-12), (finding, name)
                compared += 1
        assert compared == 35
        for name in ("auc", "accuracy", "weighted_f1"):
            mean = np.mean(list(golden[GOLDEN_KEYS[name]].values()))
            assert result[f"macro_{name}"] == pytest.approx(mean, abs=1e-12)
        printed = capsys.readouterr().out
        assert "on the test labels (as published)" in printed
        assert "2 pairs of case and finding without a score were counted as 0 (as published)" in printed
    assert result["num_findings_asked"] == 16 and result["num_findings"] == 5
    assert "Atelectasis: not measured, no case among the 0 scored and labelled" in printed
    assert "Atelectasis" in result["files"]["findings_without_scores"]


def test_development_files_give_the_thresholds(files, tmp_path, capsys):
    places = ["--scores", files / "a.csv", "--labels", files / "labels.csv"]
    for name in ("b", "labels"):
        (files / f"dev_{name}.csv").write_text((files / f"{name}.csv").read_text().replace("valid_", "train_"))
    development = ["--development_scores", files / "dev_b.csv", "--development_labels", files / "dev_labels.csv"]
    assert run("score", *places, "--threshold", "development", *development, "--json", tmp_path / "out.json") == 0
    assert run("score", *places, "--threshold", "0.5", "--json", tmp_path / "fixed.json") == 0
    result, fixed = (json.loads((tmp_path / name).read_text()) for name in ("out.json", "fixed.json"))
    assert result["per_finding"]["Nodule"]["threshold"]["value"] != 0.5
    assert fixed["per_finding"]["Nodule"]["threshold"] == {"value": 0.5, "by_fold": None}
    assert "development split of other patients" in result["protocol"]["in_words"]["threshold"]
    capsys.readouterr()
    assert run("score", *places, "--threshold", "development") == 2
    assert "belong together" in capsys.readouterr().err
    same = ["--development_scores", files / "b.csv"]
    assert run("score", *places, "--threshold", "development", *same) == 2
    assert "40 patients are in the development split" in capsys.readouterr().err


def test_equal_reports_count_once(files, tmp_path, capsys):
    reports = "VolumeName,Findings_EN,Impressions_EN\n" + "".join(f"valid_{n}_a_1,F{n // 2},I\n" for n in range(40))
    (files / "reports.csv").write_text(reports)
    places = ["--scores", files / "a.csv", "--labels", files / "labels.csv", "--duplicates"]
    reports = ["--reports", files / "reports.csv", "--json", tmp_path / "out.json"]
    for duplicates, num_patients in (("within_patients", 40), ("everywhere", 20)):
        assert run("score", *places, duplicates, *reports) == 0
        result = json.loads((tmp_path / "out.json").read_text())
        assert result["num_patients"] == num_patients
    assert result["dropped_cases"]["report equal to that of an earlier scan"]["count"] == 20
    assert run("score", *places, "everywhere") == 2
    assert "needs --reports" in capsys.readouterr().err


def test_left_out_cases_and_columns_are_told(files, tmp_path, capsys):
    lines = (files / "a.csv").read_text().splitlines()
    lines[0] += ",Age"
    lines[1:] = [line + ",50" for line in lines[1:]]
    (files / "odd.csv").write_text("\n".join([*lines, lines[5], "case_x,0.5,0.5,9"]) + "\n")
    places = ["--scores", files / "odd.csv", "--labels", files / "labels.csv"]
    assert run("score", *places, "--json", tmp_path / "out.json") == 0
    printed = capsys.readouterr().out
    assert "left out: 1 cases: no row in the label file (case_x)" in printed
    assert "1 identical rows dropped" in printed and "columns ignored: Age" in printed
    result = json.loads((tmp_path / "out.json").read_text())
    assert result["dropped_cases"] == {"no row in the label file": {"count": 1, "cases": ["case_x"]}}


def test_a_part_that_was_not_measured_is_said_at_the_end(files, tmp_path, capsys):
    """A finding with one class, a finding and cases without scores: warnings, lines on stderr, and status 0."""
    lines = [line.split(",") for line in (files / "labels.csv").read_text().splitlines()]
    assert lines[0][1:] == ["Nodule", "Big heart"]
    lines = [[line[0], line[1], "1", "1"] for line in lines]
    lines[0][2:] = ["Big heart", "Emphysema"]
    (files / "more.csv").write_text("\n".join(",".join(line) for line in [*lines, ["valid_99_a_1", "1", "1", "1"]]))
    given = ["--scores", files / "a.csv", "--labels", files / "more.csv", "--quiet", "--json", tmp_path / "out.json"]
    assert run("score", *given) == 0
    told = capsys.readouterr()
    warnings = json.loads((tmp_path / "out.json").read_text())["warnings"]
    parts = [warning.removeprefix("ONLY A PART WAS MEASURED: ") for warning in warnings if "ONLY A PART" in warning]
    assert parts == [
        "1 of the 2 findings of a have no figure (no negative case among the 40 scored and labelled: Big heart).",
        "1 cases: labelled, but no row in the score file.",
        "1 findings of the labels have no scores: Emphysema.",
    ]
    assert told.err.count("WARNING: ONLY A PART WAS MEASURED") == 3 and not told.out


def test_cases_that_name_no_patient_are_told(files, capsys):
    for name in ("a", "labels"):
        (files / f"own_{name}.csv").write_text((files / f"{name}.csv").read_text().replace("valid_", "case"))
    assert run("score", "--scores", files / "own_a.csv", "--labels", files / "own_labels.csv") == 0
    assert "WARNING: 40 cases name no patient and count as one each" in capsys.readouterr().out


@pytest.mark.parametrize(
    "options, message",
    [
        (["--task", "no_such"], "no prompt set named 'no_such'"),
        (["--labels", "none.csv"], "none.csv cannot be read as CSV"),
        (["--json", "."], "is a folder; name a file in it"),
        (["--folds", "99"], "99 folds of 40 patients"),
        (["--protocol", "published", "--absent", "excluded", "--folds", "1"], "num_folds 1 must be at least 2"),
    ],
)
def test_errors_are_told_without_a_traceback(files, capsys, options, message):
    assert run("score", "--scores", files / "a.csv", "--labels", files / "labels.csv", *options) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: ") and message in told


def test_an_unknown_threshold_is_told_by_the_parser(files, capsys):
    with pytest.raises(SystemExit):
        run("score", "--scores", files / "a.csv", "--labels", files / "labels.csv", "--threshold", "best")
    assert "'best' is neither a number nor one of" in capsys.readouterr().err


def test_compare(files, tmp_path, capsys):
    scores = ["--scores", files / "a.csv", files / "b.csv", "--labels", files / "labels.csv"]
    assert run("compare", *scores, "--names", "old", "new", "--json", tmp_path / "out.json") == 0
    printed = capsys.readouterr().out
    result = json.loads((tmp_path / "out.json").read_text())
    assert "new - old" in printed and "DeLong p" in printed
    assert result["runs"] == ["old", "new"]
    entry = result["per_finding"]["Nodule"]
    assert entry["delong"]["p"] < 0.05 and entry["delong"]["difference"] > 0.1
    difference = result["macro"]["auc"]["difference"]
    assert (
        result["macro_auc_difference"]
        == difference["value"]
        == result["macro"]["auc"]["b"] - result["macro"]["auc"]["a"]
    )
    assert 0 < difference["low"] < difference["value"] < difference["high"]
    assert f"{difference['value']:.3f} [{difference['low']:.3f}, {difference['high']:.3f}]" in printed
    assert len(result["files"]) == 2


def test_compare_counts_what_one_run_lacks(files, tmp_path, capsys):
    text = (files / "b.csv").read_text().splitlines()
    (files / "b.csv").write_text("\n".join([*text[:-3], "case_y,0.5,0.5"]) + "\n")
    (files / "a.csv").write_text((files / "a.csv").read_text() + "case_x,0.5,0.5\n")
    scores = ["--scores", files / "a.csv", files / "b.csv", "--labels", files / "labels.csv"]
    assert run("compare", *scores, "--json", tmp_path / "out.json") == 0
    result = json.loads((tmp_path / "out.json").read_text())
    assert result["excluded"] == {"case and finding of run a alone": 6} and result["num_patients"] == 37
    assert result["dropped_cases"]["no row in the label file"] == {"count": 2, "cases": ["case_x", "case_y"]}
    capsys.readouterr()
    # Thresholds of every run from its own development scores.
    for name in ("a", "b", "labels"):
        (files / f"dev_{name}.csv").write_text((files / f"{name}.csv").read_text().replace("valid_", "train_"))
    development = ["--development_scores", files / "dev_a.csv", files / "dev_b.csv"]
    development += ["--development_labels", files / "dev_labels.csv", "--threshold", "development"]
    assert run("compare", *scores, *development, "--json", tmp_path / "out.json") == 0
    assert json.loads((tmp_path / "out.json").read_text())["macro"]["f1"]["difference"]["value"] > 0


@pytest.mark.parametrize("command", ["score", "compare"])
def test_help_is_quick_and_teaches(command):
    """Neither PyTorch nor transformers is loaded, and what --help promises of the JSON is there."""
    arguments = [sys.executable, "-X", "importtime", "-m", "evaluation_fvlm", command, "--help"]
    done = subprocess.run(arguments, capture_output=True, text=True, cwd=ROOT, timeout=250)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "python -m evaluation_fvlm" in done.stdout and "macro_auc" in done.stdout
    loaded = {line.rsplit("|", 1)[1].strip().split(".")[0] for line in done.stderr.splitlines() if "|" in line}
    assert "evaluation_fvlm" in loaded and not HEAVY & loaded


def test_scoring_loads_no_network(files):
    code = "import sys; from evaluation_fvlm.__main__ import main; assert main(sys.argv[1:]) == 0; "
    code += "print(*{name.split('.')[0] for name in sys.modules})"
    arguments = ["score", "--scores", files / "a.csv", "--labels", files / "labels.csv", "--quiet"]
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, cwd=ROOT, timeout=250
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "sklearn" in done.stdout.split() and not HEAVY & set(done.stdout.split())


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_tells_its_options(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0 and f"python -m evaluation_fvlm {command}" in capsys.readouterr().out


def test_the_list_of_commands(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    told = capsys.readouterr().out
    assert all(f"    {name}" in told for name in COMMANDS)
    with pytest.raises(SystemExit):
        main([])
