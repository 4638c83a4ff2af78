"""Probes of frozen embeddings: what they find, what they must not find, and that no patient is on both sides."""

import numpy as np
import pandas as pd
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from evaluation_fvlm import probes
from evaluation_fvlm.embedding import SplitEmbeddings
from evaluation_fvlm.errors import EvaluationError
from evaluation_fvlm.folds import patient_folds
from evaluation_fvlm.probes import probe, probe_frames
from evaluation_fvlm.protocols import Protocol
from evaluation_fvlm.tasks import Item, Task

QUICK = Protocol(level="reconstruction", threshold=0.5, num_bootstraps=50)
TASK = Task(
    "two",
    1,
    "made up",
    (Item("Nodule", "lung", ("Nodule.",), ("No nodule.",)), Item("Big heart", "heart", ("Big.",), ("Not big.",))),
)


def unit(vectors: np.ndarray) -> np.ndarray:
    return (vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)).astype(np.float32)


def split_of(num_patients: int = 120, scans_each: int = 1, signal: float = 2.0, seed: int = 0) -> SplitEmbeddings:
    """A nodule moves the lung's embedding along one axis, a big heart the heart's along another."""
    rng = np.random.default_rng(seed)
    count = num_patients * scans_each
    labels = rng.random((count, 2)) < 0.4
    embeds = rng.normal(size=(count, 2, 12))
    embeds[:, 0, 3] += signal * labels[:, 0]
    embeds[:, 1, 7] += signal * labels[:, 1]
    ids = {"patient_id": [f"p{n // scans_each}" for n in range(count)], "scan_id": [f"s{n}" for n in range(count)]}
    is_present = np.ones((count, 2), bool)
    return SplitEmbeddings(
        organs=["lung", "heart"],
        scans=pd.DataFrame(ids | {"recon_id": [f"r{n}" for n in range(count)]}),
        labels=[{"Nodule": int(nodule), "Big heart": int(big)} for nodule, big in labels],
        image_embeds=unit(embeds),
        is_present=is_present,
        is_complete=is_present.copy(),
        volume_embeds=unit(embeds.sum(axis=1)),
        volume_pooling="made up",
    )


def test_a_linear_probe_is_scikit_learns_on_folds_of_patients():
    embeddings = split_of()
    scores = probe_frames(embeddings, TASK, kinds=("linear",), strengths=(0.1,), num_folds=4, seed=5)
    frame = scores.frames["linear"]
    labels = np.array([list(of_scan.values()) for of_scan in embeddings.labels])
    names, patient = np.unique(embeddings.scans["patient_id"], return_inverse=True)
    by_patient = np.zeros((len(names), 2), bool)
    by_patient[patient] = labels == 1
    fold = patient_folds(by_patient, 4, 5)[patient]
    for column, finding in enumerate(("Nodule", "Big heart")):
        features, expected = embeddings.image_embeds[:, column].astype(float), np.zeros(120)
        for n in range(4):
            train = fold != n
            mean, deviation = features[train].mean(axis=0), features[train].std(axis=0)
            scaled = (features - mean) / deviation
            model = LogisticRegression(C=0.1, max_iter=2000).fit(scaled[train], labels[train, column])
            expected[~train] = model.predict_proba(scaled[~train])[:, 1]
        rows = frame[frame["finding"] == finding]
        np.testing.assert_allclose(rows["score"], expected, atol=1e-9)
        assert rows["label"].tolist() == labels[:, column].tolist()
        for n, auc in enumerate(scores.within_folds["linear"][finding]):
            assert auc == pytest.approx(roc_auc_score(labels[fold == n, column], expected[fold == n]))
    assert scores.strengths["Nodule"] == [0.1] * 4 and not scores.reasons


def test_neighbours_vote_by_their_nearness():
    embeddings = split_of(num_patients=40)
    scores = probe_frames(embeddings, TASK, kinds=("knn",), num_folds=2, num_neighbours=5)
    frame = scores.frames["knn"]
    labels = np.array([of_scan["Nodule"] for of_scan in embeddings.labels])
    features = embeddings.image_embeds[:, 0].astype(float)
    names, patient = np.unique(embeddings.scans["patient_id"], return_inverse=True)
    all_labels = np.array([list(of_scan.values()) for of_scan in embeddings.labels])
    by_patient = np.zeros((len(names), 2), bool)
    by_patient[patient] = all_labels == 1
    fold = patient_folds(by_patient, 2, 0)[patient]
    for row, score in enumerate(frame[frame["finding"] == "Nodule"]["score"]):
        others = np.flatnonzero(fold != fold[row])
        cosines = features[others] @ features[row]
        nearest = np.argsort(-cosines)[:5]
        weights = np.exp(cosines[nearest] / 0.07)
        assert score == pytest.approx((weights * labels[others[nearest]]).sum() / weights.sum(), rel=1e-5)
    assert 0.6 < roc_auc_score(labels, frame[frame["finding"] == "Nodule"]["score"]) < 1


def test_a_test_folds_labels_and_embeddings_have_no_say_in_its_scores(monkeypatch):
    """Neither in the choice of C, nor in the scaling, nor in the fit."""
    monkeypatch.setattr(probes, "patient_folds", lambda has_finding, num_folds, seed: np.arange(len(has_finding)) % 3)
    embeddings, changed = split_of(), split_of()
    fold = np.unique(embeddings.scans["patient_id"], return_inverse=True)[1] % 3
    for n in np.flatnonzero(fold == 0)[1:]:
        changed.labels[n]["Nodule"] = 1 - changed.labels[n]["Nodule"]
        changed.image_embeds[n, 0] *= 50
    options = {"num_folds": 3, "strengths": (0.001, 0.1, 10.0)}
    before, after = (probe_frames(each, TASK, **options) for each in (embeddings, changed))
    row = np.flatnonzero(fold == 0)[0]
    for kind in ("linear", "knn"):
        one, other = (scores.frames[kind]["score"].to_numpy()[:120] for scores in (before, after))
        assert one[row] == pytest.approx(other[row], abs=1e-9)
        assert not np.allclose(one[fold != 0], other[fold != 0]), "else nothing was changed"
    assert before.strengths["Nodule"][0] == after.strengths["Nodule"][0]
    assert set(before.strengths["Nodule"]) <= {0.001, 0.1, 10.0}


def test_the_strength_is_that_with_the_best_auc_on_the_validation_fold():
    rng = np.random.default_rng(0)
    labels = (rng.random(160) < 0.5).astype(float)
    features = rng.normal(size=(160, 50)) + 0.15 * labels[:, None]
    train, validation = np.arange(160) < 80, np.arange(160) >= 80
    strengths = (100.0, 1e-4, 0.01, 1.0)
    scaled = (features - features[train].mean(axis=0)) / features[train].std(axis=0)
    aucs = {rows: {} for rows in ("train", "validation")}
    for strength in strengths:
        model = LogisticRegression(C=strength, max_iter=2000).fit(scaled[train], labels[train])
        for name, rows in (("train", train), ("validation", validation)):
            aucs[name][strength] = roc_auc_score(labels[rows], model.predict_proba(scaled[rows])[:, 1])
    best = max(strengths, key=aucs["validation"].get)
    assert best != max(strengths, key=aucs["train"].get), "a choice on the training rows would be another"
    assert probes._choose_strength(features, labels, train, validation, strengths) == best
    one_class = np.where(validation, 0.0, labels)
    assert probes._choose_strength(features, one_class, train, validation, strengths) == 1.0, "the upper middle one"


def test_the_strength_is_chosen_between_training_folds(monkeypatch):
    monkeypatch.setattr(probes, "patient_folds", lambda has_finding, num_folds, seed: np.arange(len(has_finding)) % 3)
    asked = []
    monkeypatch.setattr(probes, "_choose_strength", lambda *arguments: asked.append(arguments[2:4]) or 0.1)
    embeddings = split_of()
    probe_frames(embeddings, TASK, kinds=("linear",), num_folds=3)
    fold = np.unique(embeddings.scans["patient_id"], return_inverse=True)[1] % 3
    assert len(asked) == 6
    for number, (train, validation) in enumerate(asked):
        test = number % 3
        assert set(fold[validation]) == {(test + 1) % 3} and set(fold[train]) == {(test + 2) % 3}


def test_patients_are_never_on_both_sides():
    """Three equal scans of each patient, labels by patient and by chance: neighbours that leak would know them all."""
    embeddings = split_of(num_patients=60, scans_each=3, signal=0.0)
    rng = np.random.default_rng(1)
    of_patient = rng.random(60) < 0.5
    for n in range(180):
        embeddings.labels[n] = {"Nodule": int(of_patient[n // 3]), "Big heart": int(of_patient[n // 3])}
        embeddings.image_embeds[n] = embeddings.image_embeds[n // 3 * 3]
    result = probe(embeddings, TASK, num_neighbours=3, protocol=QUICK)
    for kind in ("linear", "knn"):
        assert result[kind]["macro_auc"] < 0.7
    assert result["linear"]["num_patients"] == 60


def test_signal_is_found_and_shuffled_labels_are_not():
    found = probe(split_of(num_patients=300, signal=3.0), TASK, protocol=QUICK)
    assert found["linear"]["macro_auc"] > 0.9 and found["knn"]["macro_auc"] > 0.75
    assert found["linear"]["per_finding"]["Nodule"]["auc"]["low"] > 0.85
    assert found["linear"]["auc_within_folds"]["Nodule"]["mean"] > 0.9
    embeddings = split_of(num_patients=300, signal=3.0)
    np.random.default_rng(0).shuffle(embeddings.labels)
    for kind in ("linear", "knn"):
        assert abs(probe(embeddings, TASK, protocol=QUICK)[kind]["macro_auc"] - 0.5) < 0.1


def test_without_a_task_every_label_is_probed_on_the_whole_volume():
    result = probe(split_of(num_patients=200, signal=4.0), kinds=("linear",), protocol=QUICK)
    assert set(result["linear"]["per_finding"]) == {"Nodule", "Big heart"} and result["linear"]["macro_auc"] > 0.8
    assert result["settings"]["features"] == "made up" and "knn" not in result
    assert result["linear"]["per_finding"]["Nodule"]["organ"] == "whole volume"


def test_absent_organs_and_unknown_labels_are_counted_and_not_learned_from():
    embeddings = split_of()
    embeddings.is_present[:30, 0] = False
    embeddings.image_embeds[:30, 0] = 0
    for n in range(30, 50):
        embeddings.labels[n]["Nodule"] = -1
    result = probe(embeddings, TASK, kinds=("knn",), protocol=QUICK)["knn"]["per_finding"]["Nodule"]
    assert result["positives"] + result["negatives"] == 70 and sum(result["excluded"].values()) == 50
    frame = probe_frames(embeddings, TASK, kinds=("knn",)).frames["knn"]
    rows = frame[frame["finding"] == "Nodule"]
    assert rows["score"].isna().tolist() == [True] * 30 + [False] * 90 and rows["label"][30:50].isna().all()


def test_a_finding_of_one_patient_is_named_with_its_reason():
    embeddings = split_of()
    for n in range(120):
        embeddings.labels[n]["Nodule"] = int(n == 5)
    result = probe(embeddings, TASK, protocol=QUICK)
    assert result["reasons"] == {"Nodule": "1 positive patient(s) with the organ: none is left to learn from"}
    assert result["linear"]["per_finding"]["Nodule"]["auc"]["value"] is None
    assert result["linear"]["per_finding"]["Big heart"]["auc"]["value"] > 0.5
    assert result["strengths"]["Nodule"] == [None] * 5


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (lambda e: e.image_embeds.__setitem__((4, 0, 1), np.nan), {}, "lung: 1 embeddings are not finite"),
        (lambda e: [labels.clear() for labels in e.labels], {}, "carry no labels"),
        (lambda e: setattr(e, "labels", [{"Cyst": 1}] * 120), {}, "none of its findings is among the labels"),
        (lambda e: setattr(e, "asked_organs", ["lung"]), {}, r"asks for \['heart'\], which were not embedded"),
        (lambda e: setattr(e, "volume_embeds", None), {"task": None}, "whole volumes were not embedded"),
        (lambda e: None, {"kinds": ("svm",)}, r"probes are \['linear', 'knn'\], not \['svm'\]"),
        (lambda e: None, {"strengths": (0.0,)}, "must be positive"),
        (lambda e: None, {"num_folds": 500}, "500 folds of 120 patients"),
    ],
)  # fmt: skip
def test_what_cannot_be_probed_is_refused(change, options, message):
    embeddings = split_of()
    change(embeddings)
    with pytest.raises(EvaluationError, match=message):
        probe(embeddings, **({"task": TASK, "protocol": QUICK} | options))
