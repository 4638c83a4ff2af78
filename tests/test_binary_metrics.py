"""Metrics of one finding against scikit-learn, on the rows as they are and on rows that were really drawn."""

import numpy as np
import pytest
from sklearn import metrics as sklearn_metrics

from evaluation_fvlm import binary_metrics
from evaluation_fvlm.binary_metrics import METRICS, Ranking, decision_counts, decision_metrics, ranking_metrics
from evaluation_fvlm.bootstrap import draw_patients

SKLEARN = {
    "accuracy": sklearn_metrics.accuracy_score,
    "balanced_accuracy": sklearn_metrics.balanced_accuracy_score,
    "f1": sklearn_metrics.f1_score,
    "weighted_f1": lambda labels, called: sklearn_metrics.f1_score(labels, called, average="weighted"),
    "precision": lambda labels, called: sklearn_metrics.precision_score(labels, called, zero_division=0),
    "recall": sklearn_metrics.recall_score,
    "specificity": lambda labels, called: sklearn_metrics.recall_score(labels, called, pos_label=0),
    "youden": lambda labels, called: sklearn_metrics.balanced_accuracy_score(labels, called, adjusted=True),
}


def sample(seed, num_rows=40, num_patients=17, levels=8):
    """Scores with many ties, rare positives, several rows per patient."""
    rng = np.random.default_rng(seed)
    labels = (rng.random(num_rows) < 0.3).astype(int)
    labels[:2] = 0, 1
    scores = np.round((rng.random(num_rows) + 0.4 * labels) * levels) / levels
    return scores, labels, rng.integers(0, num_patients, num_rows)


@pytest.mark.parametrize("seed", range(6))
def test_decision_metrics_are_scikit_learns(seed):
    scores, labels, _ = sample(seed)
    called = scores > 0.5
    ours = decision_metrics(decision_counts(called, labels))
    assert set(ours) == set(SKLEARN)
    assert 0 < called.sum() < len(called)
    for name, theirs in SKLEARN.items():
        assert ours[name][0] == pytest.approx(theirs(labels, called.astype(int)), abs=1e-12), name


def test_nothing_called_present_has_precision_0_and_one_class_has_no_figure():
    labels = np.array([0, 0, 1])
    silent = decision_metrics(decision_counts(np.zeros(3, bool), labels)[0])
    assert (silent["precision"], silent["f1"], silent["recall"], silent["specificity"]) == (0, 0, 0, 1)
    assert silent["weighted_f1"] == pytest.approx(2 / 3 * 0.8)
    for one_class in ([0, 0], [1, 1]):
        known = decision_metrics(decision_counts(np.array([True, False]), np.array(one_class))[0])
        assert all(np.isnan(value) for value in known.values())


@pytest.mark.parametrize("levels", [2, 8, 10_000])  # nearly all tied, some, none
@pytest.mark.parametrize("seed", range(3))
def test_every_resample_has_the_figures_of_the_rows_drawn(seed, levels, monkeypatch):
    scores, labels, patients = sample(seed, levels=levels)
    monkeypatch.setattr(binary_metrics, "BLOCK", 7 * len(scores))  # 50 resamples in blocks of 7, the last one short
    weights = draw_patients(17, 50, seed)
    ranking = Ranking(scores, labels, patients).resampled(weights)
    called = scores > 0.5
    decisions = decision_metrics(weights.astype(float) @ decision_counts(called, labels, patients, 17))
    drawn_figures = ranking | decisions
    assert set(drawn_figures) == set(METRICS)
    num_compared = 0
    for n, drawn in enumerate(weights):
        rows = np.repeat(np.arange(len(scores)), drawn[patients])
        if len(np.unique(labels[rows])) < 2:
            assert all(np.isnan(values[n]) for values in drawn_figures.values())
            continue
        expected = ranking_metrics(scores[rows], labels[rows])
        expected |= {name: theirs(labels[rows], called[rows].astype(int)) for name, theirs in SKLEARN.items()}
        for name, value in expected.items():
            assert drawn_figures[name][n] == pytest.approx(value, abs=1e-12), name
        num_compared += 1
    assert num_compared > 30


def test_a_resample_without_a_class_has_no_figure():
    scores, labels, patients = np.array([0.1, 0.2, 0.9]), np.array([0, 0, 1]), np.arange(3)
    weights = np.array([[1, 2, 0], [0, 0, 3], [1, 1, 1]], np.uint16)
    figures = Ranking(scores, labels, patients).resampled(weights)
    for values in figures.values():
        assert np.isnan(values[:2]).all() and values[2] == 1.0


def test_every_patient_drawn_once_is_the_sample_itself():
    scores, labels, patients = sample(9, num_rows=300, num_patients=100)
    whole = Ranking(scores, labels, patients).resampled(np.ones((1, 100), np.uint16))
    for name, value in ranking_metrics(scores, labels).items():
        assert whole[name][0] == pytest.approx(value, abs=1e-12)
