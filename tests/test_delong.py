"""DeLong's test against its definition, the example of its authors, and simulation."""

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from evaluation_fvlm.delong import auc_covariance, delong_test, holm, placements

# DeLong, DeLong and Clarke-Pearson (1988): 43 patients with ovarian cancer and a bowel obstruction, as printed with the
# example of SAS/STAT's LOGISTIC procedure: albumin, total protein, K-G score, surgery of benefit (1).
OVARIAN = """
3.0 5.8 10 0  3.2 6.3 5 1  3.9 6.8 3 1  2.8 4.8 6 0  3.2 5.8 3 1  0.9 4.0 5 0  2.5 5.7 8 0  1.6 5.6 5 1
3.8 5.7 5 1  3.7 6.7 6 1  3.2 5.4 4 1  3.8 6.6 6 1  4.1 6.6 5 1  3.6 5.7 5 1  4.3 7.0 4 1  3.6 6.7 4 0
2.3 4.4 6 1  4.2 7.6 4 0  4.0 6.6 6 0  3.5 5.8 6 1  3.8 6.8 7 1  3.0 4.7 8 0  4.5 7.4 5 1  3.7 7.4 5 1
3.1 6.6 6 1  4.1 8.2 6 1  4.3 7.0 5 1  4.3 6.5 4 1  3.2 5.1 5 1  2.6 4.7 6 1  3.3 6.8 6 0  1.7 4.0 7 0
3.7 6.1 5 1  3.3 6.3 7 1  4.2 7.7 6 1  3.5 6.2 5 1  2.9 5.7 9 0  2.1 4.8 7 1  2.8 6.2 8 0  4.0 7.0 7 1
3.3 5.7 6 1  3.7 6.9 5 1  3.6 6.6 5 1
"""


def test_the_authors_example():
    """Areas, standard errors, chi-square and p as SAS prints them, to its four digits."""
    table = np.array(OVARIAN.split(), float).reshape(-1, 4)
    albumin, protein, score, labels = table[:, 0], table[:, 1], 10 - table[:, 2], table[:, 3]
    assert len(table) == 43
    aucs, covariance = auc_covariance([albumin, score, protein], labels)
    assert aucs == pytest.approx([0.7366, 0.7258, 0.6478], abs=5e-5)
    assert np.sqrt(np.diag(covariance)) == pytest.approx([0.0927, 0.1028, 0.1000], abs=5e-5)
    for other, difference, error, chi_square, p in (
        (albumin, 0.0108, 0.0953, 0.0127, 0.9102),
        (protein, -0.0780, 0.1046, 0.5554, 0.4561),
    ):
        test = delong_test(score, other, labels)
        assert (test.difference, test.standard_error) == pytest.approx((difference, error), abs=5e-5)
        assert (test.z**2, test.p) == pytest.approx((chi_square, p), abs=5e-5)
        assert (test.low, test.high) == pytest.approx((difference - 1.96 * error, difference + 1.96 * error), abs=2e-4)


def slow_covariance(runs, labels):
    """Every pair of positive and negative, then the covariances of the means over either (the definition)."""
    pairs = []
    for scores in runs:
        above = [[(p > n) + 0.5 * (p == n) for n in scores[labels == 0]] for p in scores[labels == 1]]
        pairs.append(np.array(above, float))
    by_positive, by_negative = ([np.mean(pair, axis=axis) for pair in pairs] for axis in (1, 0))
    return np.cov(by_positive) / (labels == 1).sum() + np.cov(by_negative) / (labels == 0).sum()


@pytest.mark.parametrize("seed", range(5))
def test_covariance_is_that_of_the_definition(seed):
    rng = np.random.default_rng(seed)
    labels = np.array([0, 0, 1, 1, *rng.integers(0, 2, 40)])
    runs = [np.round(labels * 0.4 + rng.random(44), 1) for _ in range(3)]  # ties
    aucs, covariance = auc_covariance(runs, labels)
    assert aucs == pytest.approx([roc_auc_score(labels, run) for run in runs], abs=1e-12)
    assert covariance == pytest.approx(slow_covariance(runs, labels), abs=1e-14)
    shares = placements(runs[0], labels)
    assert shares[labels == 1].mean() == pytest.approx(aucs[0]) == shares[labels == 0].mean()


def slow_clustered_variance(scores, labels, patients):
    """Obuchowski (1997), equations written out patient by patient."""
    positives, negatives = scores[labels == 1], scores[labels == 0]
    auc = roc_auc_score(labels, scores)
    sums = {}
    for score, label, patient in zip(scores, labels, patients):
        entry = sums.setdefault(patient, [0.0, 0, 0.0, 0])
        if label == 1:
            entry[0] += np.mean((score > negatives) + 0.5 * (score == negatives))
            entry[1] += 1
        else:
            entry[2] += np.mean((positives > score) + 0.5 * (positives == score))
            entry[3] += 1
    m, n, count = len(positives), len(negatives), len(sums)
    with_positive = sum(e[1] > 0 for e in sums.values())
    with_negative = sum(e[3] > 0 for e in sums.values())
    s10 = with_positive / ((with_positive - 1) * m) * sum((e[0] - e[1] * auc) ** 2 for e in sums.values())
    s01 = with_negative / ((with_negative - 1) * n) * sum((e[2] - e[3] * auc) ** 2 for e in sums.values())
    s11 = count / (count - 1) * sum((e[0] - e[1] * auc) * (e[2] - e[3] * auc) for e in sums.values())
    return s10 / m + s01 / n + 2 * s11 / (m * n)


@pytest.mark.parametrize("seed", range(5))
def test_scans_of_a_patient_are_taken_together(seed):
    rng = np.random.default_rng(seed)
    patients = rng.integers(0, 25, 80)
    labels = np.where(rng.random(80) < 0.8, (patients % 3 == 0), rng.random(80) < 0.5).astype(int)
    scores = np.round(0.4 * labels + rng.random(80), 1)
    names = np.array([f"p{patient}" for patient in patients])
    _, covariance = auc_covariance([scores], labels, names)
    assert covariance[0, 0] == pytest.approx(slow_clustered_variance(scores, labels, patients), rel=1e-10)
    alone = auc_covariance([scores], labels, np.arange(80))[1]
    assert alone == pytest.approx(auc_covariance([scores], labels)[1]) and alone != pytest.approx(covariance)


def test_copies_of_every_scan_add_no_evidence():
    rng = np.random.default_rng(1)
    labels = (np.arange(60) % 3 == 0).astype(int)
    a, b = labels + rng.normal(size=60), labels + rng.normal(size=60)
    once = delong_test(a, b, labels)
    copied = [np.repeat(values, 4) for values in (a, b, labels, np.arange(60))]
    together, apart = delong_test(*copied), delong_test(*copied[:3])
    assert together.standard_error == pytest.approx(once.standard_error, rel=0.03)
    assert apart.standard_error < 0.6 * once.standard_error


def test_runs_that_do_not_differ():
    scores, labels = np.array([0.1, 0.4, 0.3, 0.9]), np.array([0, 0, 1, 1])
    test = delong_test(scores, scores**2, labels)  # the same order
    assert (test.difference, test.standard_error, test.z, test.p) == (0.0, 0.0, None, None)
    assert delong_test(scores[:3], scores[:3], labels[:3]) is None  # one positive has no variance


def test_size_of_the_test_is_its_level():
    """Two equally good, correlated runs: p below 0.05 in 5 % of simulations; standard error 0.7 %."""
    rng = np.random.default_rng(2)
    labels = np.repeat([1, 0], [40, 80])
    called = 0
    for _ in range(1000):
        common = rng.normal(size=120)
        a, b = (labels + common + rng.normal(size=120) for _ in range(2))
        called += delong_test(a, b, labels).p < 0.05
    assert 0.03 < called / 1000 < 0.07


def test_holm():
    """Smallest times 3, next times 2, and never below an earlier one (Holm 1979)."""
    assert holm([0.04, 0.01, None, 0.03]) == [pytest.approx(0.06), pytest.approx(0.03), None, pytest.approx(0.06)]
    assert holm([0.9, 0.8]) == [1.0, 1.0] and holm([]) == []
