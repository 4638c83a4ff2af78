"""Folds of patients: all are dealt, findings evenly, and the same again with the same seed."""

import numpy as np
import pytest

from evaluation_fvlm.errors import EvaluationError
from evaluation_fvlm.folds import patient_folds, spread


@pytest.mark.parametrize("seed", range(4))
def test_rare_findings_are_in_every_fold(seed):
    rng = np.random.default_rng(seed)
    rates = np.array([0.5, 0.2, 0.06, 0.04])
    is_positive = rng.random((203, 4)) < rates
    folds = patient_folds(is_positive, 5, seed)
    assert folds.shape == (203,) and set(folds) == set(range(5))
    sizes = np.bincount(folds)
    assert sizes.max() - sizes.min() <= 3
    for finding in range(4):
        dealt = np.bincount(folds[is_positive[:, finding]], minlength=5)
        # The rarest is dealt first, so evenly; patients of a later one may have come with it.
        assert dealt.max() - dealt.min() <= (1 if finding == is_positive.sum(axis=0).argmin() else 2)
        assert dealt.min() >= min(1, is_positive[:, finding].sum() // 5)
    assert np.array_equal(folds, patient_folds(is_positive, 5, seed))
    assert not np.array_equal(folds, patient_folds(is_positive, 5, seed + 1))


def test_the_order_of_the_findings_makes_no_difference():
    is_positive = np.random.default_rng(3).random((60, 6)) < 0.2
    is_positive[:, 4:] = np.roll(is_positive[:, :2], 7, axis=0)  # as rare as two others
    folds = patient_folds(is_positive, 5, 0)
    for order in ([5, 4, 3, 2, 1, 0], [2, 5, 0, 4, 1, 3]):
        assert np.array_equal(folds, patient_folds(is_positive[:, order], 5, 0))


def test_a_rare_finding_of_those_who_have_a_frequent_one_is_dealt_first():
    is_positive = np.zeros((100, 2), bool)
    is_positive[:50, 0] = is_positive[:5, 1] = True
    folds = patient_folds(is_positive, 5, seed=0)
    assert np.bincount(folds[:5]).tolist() == [1] * 5 and np.bincount(folds[:50]).tolist() == [10] * 5


def test_as_many_folds_as_patients_at_most():
    nothing = np.zeros((3, 1), bool)
    assert sorted(patient_folds(nothing, 3, 0)) == [0, 1, 2]
    for num_folds in (1, 4):
        with pytest.raises(EvaluationError, match=f"{num_folds} folds of 3 patients"):
            patient_folds(nothing, num_folds, 0)


def test_spread():
    known = spread([0.5, np.nan, 0.7])
    assert known == {"mean": pytest.approx(0.6), "sd": pytest.approx(np.sqrt(0.02)), "values": [0.5, None, 0.7]}
    assert spread([np.nan]) == {"mean": None, "sd": None, "values": [None]}
    assert spread([0.5])["sd"] is None
