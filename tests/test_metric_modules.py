"""The `evaluate` modules load from their folder without a network, copied alone, and give the evaluation's numbers."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import evaluate
import numpy as np
import pandas as pd
import pytest
from scipy.stats import t as student
from sklearn.metrics import f1_score, roc_auc_score

from evaluation_fvlm.protocols import Protocol, evaluate_frame
from evaluation_fvlm.retrieval import retrieve_pairs

FOLDER = Path(__file__).resolve().parent.parent / "hub_configs" / "metrics"
NAMES = sorted(path.name for path in FOLDER.iterdir() if path.is_dir())
FINDINGS, ORGANS = (
    ["Emphysema", "Nodule", "Big heart", "Never", "Unlabelled"],
    ["lung", "lung", "heart", "heart", "heart"],
)


@pytest.fixture(autouse=True, scope="module")
def own_cache(tmp_path_factory):
    """One for all tests: Python keeps the package of the copied modules, and its place, for the whole process."""
    folder = tmp_path_factory.mktemp("evaluate")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("evaluate.config.HF_MODULES_CACHE", str(folder / "modules"))
        patch.setattr("evaluate.config.HF_METRICS_CACHE", str(folder / "metrics"))
        yield


def loaded(name):
    return evaluate.load(str(FOLDER / name))


def sample(seed=0, num_cases=90):
    """Scores with ties and holes, labels with unknowns, patients of one to four cases."""
    rng = np.random.default_rng(seed)
    labels = (rng.random((num_cases, 5)) < (0.3, 0.5, 0.15, 0.0, 0.4)).astype(float)
    scores = np.round(np.clip(0.35 * labels + rng.normal(0.4, 0.2, labels.shape), 0, 1), 2)
    scores[rng.random(scores.shape) < 0.1] = np.nan
    labels[rng.random(labels.shape) < 0.1] = np.nan
    labels[:, 4] = np.nan
    patients = np.sort(rng.integers(0, num_cases // 2, num_cases))
    return scores, labels, [f"p{patient}" for patient in patients]


def frame_of(scores, labels, patients):
    rows = [
        ("t", patient, f"{patient}_{case}", f"{patient}_{case}", finding, organ, scores[case, n], labels[case, n], True)
        for n, (finding, organ) in enumerate(zip(FINDINGS, ORGANS))
        for case, patient in enumerate(patients)
    ]
    names = ["task", "patient_id", "scan_id", "recon_id", "finding", "organ", "score", "label", "is_complete"]
    return pd.DataFrame(rows, columns=names)


def test_there_are_the_three():
    assert NAMES == ["finding_f1", "organ_auc", "retrieval_recall"]
    for name in NAMES:
        assert (FOLDER / name / f"{name}.py").is_file() and (FOLDER / name / "README.md").is_file()


@pytest.mark.parametrize("name", NAMES)
def test_the_readmes_lines_print_what_they_say(name, monkeypatch, capsys):
    monkeypatch.chdir(FOLDER.parent.parent)
    code, printed = re.findall(r"```(?:python)?\n(.*?)```", (FOLDER / name / "README.md").read_text(), flags=re.DOTALL)
    exec(code, {})
    assert capsys.readouterr().out == printed


def test_weighted_f1_of_a_silent_model_is_high():
    """The figure of the README: one case in twenty, nothing called present."""
    labels = [[1.0]] + [[0.0]] * 19
    found = loaded("finding_f1").compute(predictions=[[0.1]] * 20, references=labels, threshold=0.5, num_bootstraps=0)
    assert found["macro_f1"] == 0 and round(found["macro_weighted_f1"], 2) == 0.93


@pytest.mark.parametrize("seed", [0, 1])
def test_auc_is_the_evaluations(seed):
    scores, labels, patients = sample(seed)
    expected = evaluate_frame(
        frame_of(scores, labels, patients), Protocol(level="reconstruction", threshold=0.5, num_bootstraps=200, seed=3)
    )
    given = {"findings": FINDINGS, "organs": ORGANS, "patient_ids": patients, "num_bootstraps": 200, "seed": 3}
    found = loaded("organ_auc").compute(predictions=scores, references=labels, **given)
    wanted = expected["macro"]["auc"]
    assert wanted["low"] < wanted["value"] < wanted["high"]
    for end, name in (("", "value"), ("_low", "low"), ("_high", "high")):
        assert found[f"macro_auc{end}"] == pytest.approx(wanted[name], abs=1e-12)
    assert found["num_findings"] == expected["num_findings"] == 3
    for finding in FINDINGS:
        ours, theirs = found["per_finding"][finding], expected["per_finding"][finding]
        assert [ours["auc"], ours["low"], ours["high"]] == pytest.approx(list(theirs["auc"].values()), abs=1e-12)
        assert (ours["positives"], ours["negatives"]) == (theirs["positives"], theirs["negatives"])
        assert sorted(ours["excluded"].values()) == sorted(theirs["excluded"].values())
    assert "no positive case" in found["per_finding"]["Never"]["reason"]
    assert "no case" in found["per_finding"]["Unlabelled"]["reason"]
    for organ in ("lung", "heart"):
        theirs = expected["per_organ"][organ]["auc"]
        ours = found["per_organ"][organ]
        assert [ours["auc"], ours["low"], ours["high"]] == pytest.approx(list(theirs.values()), abs=1e-12)
    json.dumps(found)


def test_auc_and_its_interval_in_the_slow_way():
    scores, labels, patients = sample(5, num_cases=40)
    metric = loaded("organ_auc")
    found = metric.compute(
        predictions=scores[:, :1], references=labels[:, :1], patient_ids=patients, num_bootstraps=50, seed=1
    )
    rows = ~np.isnan(scores[:, 0]) & ~np.isnan(labels[:, 0])
    score, label, patient = scores[rows, 0], labels[rows, 0], np.array(patients)[rows]
    assert found["per_finding"]["0"]["auc"] == roc_auc_score(label, score) == found["macro_auc"]
    rng, names, drawn = np.random.default_rng(1), np.unique(patient), []
    for _ in range(50):
        chosen = [
            n for place in rng.integers(0, len(names), len(names)) for n in np.flatnonzero(patient == names[place])
        ]
        if 0 < label[chosen].sum() < len(chosen):
            drawn.append(roc_auc_score(label[chosen], score[chosen]))
    auc, rarer = roc_auc_score(label, score), min(len(set(patient[label == value])) for value in (0, 1))
    reach = student.ppf(0.975, rarer - 1) * np.std(drawn, ddof=1) / (auc * (1 - auc))
    for end, sign in (("low", -1), ("high", 1)):
        ours = found["per_finding"]["0"][end]
        assert np.log(ours / (1 - ours)) == pytest.approx(np.log(auc / (1 - auc)) + sign * reach, abs=1e-9)
    perfect = metric.compute(predictions=[[0.9], [0.8], [0.7], [0.1], [0.2]], references=[[1], [1], [0], [0], [0]])
    assert perfect["per_finding"]["0"]["low"] == pytest.approx(0.025 ** (1 / 2)) and perfect["macro_auc_high"] == 1


@pytest.mark.parametrize("threshold", [0.5, "cross_validation", "test_labels"])
def test_f1_is_the_evaluations(threshold):
    scores, labels, patients = sample(2)
    protocol = Protocol(level="reconstruction", threshold=threshold, num_bootstraps=100, seed=4, num_folds=4)
    expected = evaluate_frame(frame_of(scores, labels, patients), protocol)
    given = {"findings": FINDINGS, "patient_ids": patients, "num_bootstraps": 100, "seed": 4, "num_folds": 4}
    found = loaded("finding_f1").compute(predictions=scores, references=labels, threshold=threshold, **given)
    assert found["threshold_rule"] == protocol.described()["in_words"]["threshold"]
    for name in ("f1", "weighted_f1"):
        ours = [found[f"macro_{name}{end}"] for end in ("", "_low", "_high")]
        assert None not in ours
        assert ours == pytest.approx([expected["macro"][name][key] for key in ("value", "low", "high")], abs=1e-12)
        for finding in FINDINGS:
            ours = [found["per_finding"][finding][f"{name}{end}"] for end in ("", "_low", "_high")]
            assert ours == pytest.approx(list(expected["per_finding"][finding][name].values()), abs=1e-12)
    for finding in FINDINGS:
        theirs = expected["per_finding"][finding]["threshold"]["value"]
        assert found["per_finding"][finding]["threshold"] == pytest.approx(theirs, abs=1e-12)
    if threshold == "test_labels":
        assert "on the test labels" in found["threshold_rule"]


def test_f1_is_scikit_learns():
    scores, labels, _ = sample(6)
    found = loaded("finding_f1").compute(
        predictions=scores, references=labels, findings=FINDINGS, threshold=0.45, num_bootstraps=0
    )
    for n, finding in enumerate(FINDINGS[:3]):
        rows = ~np.isnan(scores[:, n]) & ~np.isnan(labels[:, n])
        truth, called = labels[rows, n], scores[rows, n] > 0.45
        assert found["per_finding"][finding]["f1"] == pytest.approx(f1_score(truth, called))
        weighted = f1_score(truth, called, average="weighted")
        assert found["per_finding"][finding]["weighted_f1"] == pytest.approx(weighted)
        assert found["per_finding"][finding]["f1_low"] is None
    assert found["macro_f1_low"] is None


@pytest.mark.parametrize("pool", ["whole", "deduplicated"])
@pytest.mark.parametrize("collapsed", [False, True])
def test_retrieval_is_the_evaluations(pool, collapsed):
    rng = np.random.default_rng(3)
    text_of, patients = rng.integers(0, 25, 60), rng.integers(0, 20, 60).astype(str)
    texts = rng.normal(size=(25, 16)).astype(np.float32)
    images = texts[text_of] + rng.normal(0, 2, (60, 16)).astype(np.float32)
    if collapsed:
        texts[:] = images[:] = 1.0
    texts, images = (array / np.linalg.norm(array, axis=1, keepdims=True) for array in (texts, images))
    options = {"num_bootstraps": 60, "seed": 2}
    expected = retrieve_pairs(images, texts, text_of, patients, recall_at=(1, 5), **options)["pools"][pool]
    given = {"texts": text_of.tolist(), "patient_ids": patients, "k": (1, 5), "pool": pool} | options
    found = loaded("retrieval_recall").compute(predictions=images, references=texts[text_of], **given)
    assert found["num_candidates"] == expected["num_candidates"]
    for ours, theirs in (("image_to_text", "volume_to_report"), ("text_to_image", "report_to_volume")):
        wanted = {f"recall@{k}": figure for k, figure in expected[theirs]["recall"].items()}
        wanted |= {name: expected[theirs][name] for name in ("mrr", "median_rank")}
        for name, figure in wanted.items():
            got = [found[ours][f"{name}{end}"] for end in ("", "_low", "_high", "_chance")]
            # retrieval.py's cosines are float32: a median between two ranks may round.
            assert got == pytest.approx([figure[key] for key in ("value", "low", "high", "chance")], abs=1e-9), name
        if collapsed:
            assert found[ours]["recall@1"] == pytest.approx(found[ours]["recall@1_chance"])
        else:
            assert found[ours]["recall@1"] > 2 * found[ours]["recall@1_chance"]
    json.dumps(found)


@pytest.mark.parametrize("name", ["organ_auc", "finding_f1", "retrieval_recall"])
def test_one_patient_has_no_interval(name):
    if name == "retrieval_recall":
        given = {"predictions": [[1.0, 0.0], [0.0, 1.0]], "references": [[1.0, 0.1], [0.2, 1.0]]}
    else:
        given = {"predictions": [[0.9], [0.1]], "references": [[1.0], [0.0]]}
    options = {"threshold": 0.5} if name == "finding_f1" else {}
    found = loaded(name).compute(**given, patient_ids=["p", "p"], num_bootstraps=20, **options)
    figures = found["image_to_text"] if name == "retrieval_recall" else found
    ends = {key: value for key, value in figures.items() if key.endswith(("_low", "_high"))}
    assert ends and set(ends.values()) == {None}


def test_batches_add_up():
    scores, labels, patients = sample(7, num_cases=20)
    metric = loaded("organ_auc")
    whole = metric.compute(predictions=scores, references=labels, patient_ids=patients, num_bootstraps=20)
    for part in (slice(0, 7), slice(7, 20)):
        as_lists = [
            [[None if np.isnan(value) else value for value in row] for row in array[part]] for array in (scores, labels)
        ]
        metric.add_batch(predictions=as_lists[0], references=as_lists[1])
    assert metric.compute(patient_ids=patients, num_bootstraps=20) == whole


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("organ_auc", {"references": [[2.0], [0.0]]}, "a label is 1, 0, or NaN.*got 2"),
        ("organ_auc", {"predictions": [[np.inf], [0.1]]}, "1 scores are infinite"),
        ("organ_auc", {"findings": ["a", "b"]}, "2 findings for 1 columns"),
        ("organ_auc", {"patient_ids": ["a"]}, "1 patient_ids for 2 cases"),
        ("finding_f1", {"threshold": "best"}, "threshold 'best' is neither a number nor one of"),
        ("finding_f1", {"threshold": float("nan")}, "threshold nan is no finite number"),
        ("finding_f1", {"threshold": "test_labels", "predictions": [[3.0], [0.1]]}, "give probabilities"),
        ("finding_f1", {"num_folds": 3}, "3 folds of 2 patients"),
        ("retrieval_recall", {"pool": "half"}, "pool 'half' is not one of"),
        ("retrieval_recall", {"predictions": [[0.0], [1.0]]}, "predictions: 1 embeddings are zero"),
        ("retrieval_recall", {"texts": ["a", "a"]}, "fewer than two different texts"),
    ],
)
def test_what_does_not_fit_is_refused(name, change, message):
    given = {"predictions": [[0.9], [0.1]], "references": [[1.0], [0.0]]}
    if name == "retrieval_recall":
        given["references"] = [[1.0], [-1.0]]
    with pytest.raises(ValueError, match=message):
        loaded(name).compute(**(given | change))


ALONE = """
import json, socket, sys
def refuse(*arguments, **options):
    raise OSError("a network call")
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
import evaluate
found = {name: evaluate.load(name).compute(predictions=[[0.9, 0.1], [0.2, 0.8], [0.7, 0.9]],
    references=[[1, 0.5], [0.1, 1], [1, 1]] if name == "retrieval_recall" else [[1, 0], [0, 1], [1, 1]], **options)
    for name, options in json.loads(sys.argv[1]).items()}
assert not {"evaluation_fvlm", "modeling_fvlm"} & set(sys.modules), "nothing of ours may be imported"
print(json.dumps([found["organ_auc"]["macro_auc"], found["finding_f1"]["macro_f1"],
    found["retrieval_recall"]["num_candidates"]]))
"""


def test_each_loads_alone_without_a_network(tmp_path):
    """Copied to a bare folder, in a fresh process that may open no connection and imports nothing of ours."""
    for name in NAMES:
        (tmp_path / name).mkdir()
        shutil.copy(FOLDER / name / f"{name}.py", tmp_path / name)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
    options = {"organ_auc": {}, "finding_f1": {"threshold": 0.5}, "retrieval_recall": {"k": [1]}}
    run = subprocess.run(
        [sys.executable, "-P", "-c", ALONE, json.dumps(options)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert json.loads(run.stdout.splitlines()[-1]) == [1.0, 1.0, 3]
