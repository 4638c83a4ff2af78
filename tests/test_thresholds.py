"""Choosing a threshold against trying every one."""

import numpy as np
import pytest
from sklearn.metrics import f1_score, roc_curve

from evaluation_fvlm.published_metrics import published_threshold
from evaluation_fvlm.thresholds import choose_threshold


def sample(seed):
    rng = np.random.default_rng(seed)
    labels = np.array([0, 1, *rng.integers(0, 2, 28)])
    return np.round(0.3 * labels + 0.7 * rng.random(30), 1), labels


def rates(scores, labels, threshold):
    called = scores > threshold
    return called[labels == 1].mean(), called[labels == 0].mean()


@pytest.mark.parametrize("seed", range(6))
def test_no_threshold_serves_better(seed):
    scores, labels = sample(seed)
    false_positive_rate, true_positive_rate, _ = roc_curve(labels, scores, drop_intermediate=False)
    recall, alarms = rates(scores, labels, choose_threshold(scores, labels))
    assert recall - alarms == pytest.approx((true_positive_rate - false_positive_rate).max(), abs=1e-12)
    recall, alarms = rates(scores, labels, choose_threshold(scores, labels, "corner"))
    assert np.hypot(1 - recall, alarms) == pytest.approx(np.hypot(1 - true_positive_rate, false_positive_rate).min())
    called = scores > choose_threshold(scores, labels, "f1")
    assert f1_score(labels, called) == pytest.approx(max(f1_score(labels, scores >= score) for score in scores))
    assert choose_threshold(scores, labels, "published") == published_threshold(scores, labels)


def test_known_values():
    assert choose_threshold(np.array([0.2, 0.4, 0.8]), np.array([0, 0, 1])) == pytest.approx(0.6)
    # Two equally good ones, below 0.4 and below 0.8: the higher.
    assert choose_threshold(np.array([0.2, 0.4, 0.6, 0.8]), np.array([0, 1, 0, 1])) == pytest.approx(0.7)
    # Nearly all are positive: F1 is best with all called present, so the threshold lies below the lowest, 0 included.
    below = choose_threshold(np.array([0.0, 0.1, 0.2]), np.array([1, 0, 1]), "f1")
    assert below < 0 and (np.array([0.0, 0.1, 0.2]) > below).all()


def test_neighbouring_floats_are_parted():
    high = 0.5
    low = np.nextafter(high, 0)
    threshold = choose_threshold(np.array([low, high]), np.array([0, 1]))
    assert low <= threshold < high


def test_one_class_gives_none_and_an_unknown_criterion_is_refused():
    assert choose_threshold(np.array([0.1, 0.2]), np.array([1, 1])) is None
    with pytest.raises(ValueError, match="'best' is not one of"):
        choose_threshold(np.array([0.1, 0.2]), np.array([0, 1]), "best")
