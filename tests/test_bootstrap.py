"""Intervals: the draw, the percentiles, and whether they cover a truth that is known."""

import numpy as np
import pytest
from scipy.stats import norm
from scipy.stats import t as student

from benchmarks.coverage import coverage, main
from evaluation_fvlm.binary_metrics import Ranking
from evaluation_fvlm.bootstrap import (
    auc_figure,
    auc_interval,
    degrees_of_freedom,
    draw_patients,
    figure,
    mean_over,
    percentile_interval,
    two_sided_p,
)


def test_a_resample_draws_as_many_patients_as_there_are():
    weights = draw_patients(30, 200, seed=1)
    assert weights.shape == (200, 30) and (weights.sum(axis=1) == 30).all()
    assert np.array_equal(weights, draw_patients(30, 200, seed=1))
    assert not np.array_equal(weights, draw_patients(30, 200, seed=2))
    # Binomial(30, 1/30): mean 1, variance 29/30.
    assert weights.var() == pytest.approx(29 / 30, abs=0.05)


def test_interval_is_between_percentiles_of_what_has_a_value():
    resamples = np.append(np.arange(1001) / 1000, [np.nan] * 100)
    assert percentile_interval(resamples) == pytest.approx((0.025, 0.975))
    assert percentile_interval(np.array([0.5, np.nan, np.nan])) == (None, None)  # too few have one
    assert figure(0.5, resamples) == {"value": 0.5, "low": pytest.approx(0.025), "high": pytest.approx(0.975)}
    assert figure(0.5) == {"value": 0.5, "low": None, "high": None}
    assert figure(None, resamples) == figure(float("nan")) == {"value": None, "low": None, "high": None}


def test_the_interval_of_a_mean_is_that_of_theory():
    """A mean of many values is normal with a known standard error; a wrong draw or percentile would show."""
    values = np.random.default_rng(0).normal(size=400)
    resamples = draw_patients(400, 4000, seed=0) @ values / 400
    low, high = percentile_interval(resamples)
    error = values.std() / 20
    assert (low, high) == pytest.approx((values.mean() - 1.96 * error, values.mean() + 1.96 * error), abs=0.006)


def test_p_of_a_difference():
    assert two_sided_p(np.array([1.0] * 99)) == pytest.approx(2 / 100)
    assert two_sided_p(np.zeros(99)) == 1.0
    assert two_sided_p(np.array([-1.0, 1, 1, 1, np.nan])) == pytest.approx(2 * 2 / 5)
    assert two_sided_p(np.array([np.nan])) is None


def test_mean_over_findings_leaves_out_what_was_not_drawn():
    first, second = np.array([0.5, np.nan, np.nan]), np.array([0.7, 0.9, np.nan])
    assert mean_over([first, second]).tolist() == pytest.approx([0.6, 0.9, np.nan], nan_ok=True)


@pytest.mark.parametrize("auc", [0.7, 0.85])
def test_intervals_cover_a_known_auc(auc):
    """Standard error of the coverage: 1.1 %. Three of them around 95 %, and 1 % for the percentile interval's lag."""
    ours, between_percentiles = coverage(400, 150, 2, auc, 400, seed=3)
    assert 0.91 < between_percentiles <= ours < 0.985


def test_where_the_auc_is_high_and_positives_are_few_percentiles_do_not_cover():
    """Some ten patients with the finding. Standard error: 1.1 % of ours, 1.8 % of the other."""
    ours, between_percentiles = coverage(400, 100, 2, 0.95, 200, seed=6, prevalence=0.1)
    assert between_percentiles < 0.89 and 0.915 < ours < 0.985


def test_the_interval_of_an_auc_in_closed_form():
    rng = np.random.default_rng(0)
    drawn = np.append(rng.normal(0.8, 0.05, 999), np.nan)
    low, high = auc_interval(0.8, [drawn], [np.arange(12)])
    reach = student.ppf(0.975, 11) * drawn[:999].std(ddof=1) / 0.16
    for end, sign in ((low, -1), (high, 1)):
        assert np.log(end / (1 - end)) == pytest.approx(np.log(4) + sign * reach)
    # Of a mean over findings: one of them alone, alike ones, and one whose spread is next to nothing.
    others = 100 + np.arange(12)
    assert auc_interval(0.8, [drawn, drawn], [np.arange(12), others])[0] > low, "twice the degrees of freedom"
    assert auc_interval(0.8, [drawn, drawn], [np.arange(12), np.arange(12)])[0] == pytest.approx(low), (
        "but of the same patients"
    )
    still = np.append(np.full(999, 0.8) + 1e-9 * rng.normal(size=999), np.nan)
    halved = student.ppf(0.975, 11) * 0.5 * drawn[:999].std(ddof=1) / 0.16
    end = auc_interval(0.8, [drawn, still], [np.arange(12), 100 + np.arange(300)])[1]
    assert np.log(end / (1 - end)) == pytest.approx(np.log(4) + halved, rel=1e-5)


def test_degrees_of_freedom_of_a_mean():
    """Satterthwaite's rule where no patient has two findings; where all have all, those of one of them."""
    variances, apart = np.array([1.0, 2.0, 0.5]), [np.arange(5), 10 + np.arange(9), 20 + np.arange(30)]
    assert degrees_of_freedom(variances, apart) == pytest.approx(3.5**2 / (1 / 4 + 4 / 8 + 0.25 / 29))
    assert degrees_of_freedom(variances, [np.arange(9)] * 3) == pytest.approx(8)
    assert degrees_of_freedom(np.ones(2), [np.arange(10), 5 + np.arange(10)]) == pytest.approx(4 / (10 + 4 * 5) * 90)
    assert degrees_of_freedom(np.zeros(2), apart[:2]) == np.inf


def test_perfect_separation_has_the_interval_of_its_pairs():
    """Of m pairs of different patients all are right: 0.025 = AUC ** m at the lower end."""
    ones = [np.ones(100)]
    assert auc_interval(1.0, ones, [np.arange(30)]) == (pytest.approx(0.025 ** (1 / 30)), 1.0)
    assert auc_interval(0.0, ones, [np.arange(30)]) == (0.0, pytest.approx(1 - 0.025 ** (1 / 30)))
    low, _ = auc_interval(1.0, ones * 2, [np.arange(30), np.arange(5)])
    assert low == pytest.approx((0.025 ** (1 / 30) + 0.025 ** (1 / 5)) / 2)
    one = [np.arange(1)]
    assert auc_interval(1.0, ones, one) == auc_interval(0.7, ones, one) == (None, None), "one patient tells no spread"
    drawn = np.random.default_rng(0).normal(0.7, 0.05, 100)
    assert auc_interval(0.7, [drawn, drawn], [np.arange(1), np.arange(9)])[1] < 1, "but a mean over findings has others"
    alone = auc_interval(0.7, [drawn], [np.arange(9)])
    assert auc_interval(0.7, [drawn, np.full(100, np.nan)], [np.arange(9), np.arange(9)]) == alone
    assert auc_figure(None, ones, [np.arange(3)]) == figure(None) and auc_figure(0.7, [], []) == figure(0.7)


def test_resampling_scans_as_if_they_were_patients_would_not_cover():
    """The same scans, each a patient of its own: intervals too narrow by half."""
    rng = np.random.default_rng(4)
    distance, inside = np.sqrt(2) * norm.ppf(0.7), 0
    patients, scans = np.repeat(np.arange(100), 4), np.arange(400)
    weights = draw_patients(400, 200, seed=4)
    for _ in range(200):
        labels = np.repeat((rng.random(100) < 0.3).astype(int), 4)
        noise = np.sqrt(0.75) * rng.normal(size=100)[patients] + 0.5 * rng.normal(size=400)
        low, high = percentile_interval(Ranking(noise + distance * labels, labels, scans).resampled(weights)["auc"])
        inside += low <= 0.7 <= high
    assert inside / 200 < 0.85


def test_the_table_of_coverages(capsys):
    assert main(["--patients", "12", "--shares", "0.5", "--aucs", "0.6", "0.8", "--simulations", "4"]) == 0
    header, line, row = capsys.readouterr().out.splitlines()
    assert header.endswith("| AUC 0.60 | AUC 0.80 |") and line == "| --- | --- | --- |"
    ours, between_percentiles = coverage(4, 12, 2, 0.8, 1000, seed=17, prevalence=0.5)
    assert row.startswith("| 12, 0.5 | ") and row.endswith(
        f" | {100 * between_percentiles:.1f}, **{100 * ours:.1f}** |"
    )


@pytest.mark.slow
@pytest.mark.parametrize("auc", [0.6, 0.75, 0.9, 0.97])
def test_coverage_over_many_simulations(auc):
    """Standard error 0.5 %."""
    ours, between_percentiles = coverage(2000, 300, 2, auc, 1000, seed=5)
    assert 0.93 < ours < 0.965 and between_percentiles < ours + 0.01
