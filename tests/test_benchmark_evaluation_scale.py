"""The benchmarks of retrieval and of resampled scores: their baselines give our figures, and a broken way is seen."""

import json

import numpy as np
import pytest

from benchmarks import retrieval, score_bootstrap
from benchmarks.measure import Peak
from evaluation_fvlm.binary_metrics import METRICS
from evaluation_fvlm.bootstrap import draw_patients


@pytest.fixture
def no_measuring(monkeypatch):
    """No matrix products to find the machine's rate by, and no fresh processes: their figures are the machine's."""
    monkeypatch.setattr(retrieval, "measure_peak", lambda: Peak(1e9))
    for module in (retrieval, score_bootstrap):
        monkeypatch.setattr(module, "in_fresh_process", lambda function, *arguments: (0.1, 0.2))


def test_retrieval_is_compared_with_sorted_candidates(no_measuring, tmp_path, capsys):
    options = ["--pairs", "300", "--baseline_queries", "250", "--json", str(tmp_path / "r.json")]
    assert retrieval.main(options) == 0
    different, repeated = json.loads((tmp_path / "r.json").read_text())
    assert different["name"] == "retrieval/300/different" and repeated["name"] == "retrieval/300/repeated"
    assert different["max_rel_diff"] == repeated["max_rel_diff"] == 0
    assert (different["num_texts"], repeated["num_texts"]) == (300, 200)
    assert different["bound_s"] == pytest.approx(2 * 256 * 300**2 / 1e9)
    assert repeated["bound_s"] == pytest.approx(2 * 256 * (300 * 200 + 200**2) / 1e9)
    assert "ranks compared on these" in capsys.readouterr().out


def test_a_wrong_rank_shows_in_the_difference(no_measuring, monkeypatch, tmp_path):
    counted = retrieval.pair_ranks

    def off_by_one(*pairs):
        by_report, by_volume = counted(*pairs)
        by_volume.num_nearer[-1] += 1
        return by_report, by_volume

    monkeypatch.setattr(retrieval, "pair_ranks", off_by_one)
    retrieval.main(["--pairs", "100", "--json", str(tmp_path / "r.json")])
    assert json.loads((tmp_path / "r.json").read_text())[0]["max_rel_diff"] > 0


def test_sorted_ranks_are_those_of_the_first_correct_one():
    candidates = np.eye(4, dtype=np.float32)
    query = np.array([[0.4, 0.3, 0.2, 0.1]], np.float32)
    is_correct = np.array([[False, False, True, True]])
    assert retrieval.sorted_ranks(query, candidates, is_correct).tolist() == [3]


def test_the_made_up_pairs_are_neither_trivial_nor_hopeless():
    volumes, texts, index, patients = retrieval.make_pairs(200, 1 / 3)
    assert len(texts) == 134 and set(index) == set(range(134)) and len(set(patients)) == 100
    own = (volumes * texts[index]).sum(axis=1)
    assert 0.1 < own.mean() < 0.5 and np.allclose(np.linalg.norm(volumes, axis=1), 1, atol=1e-5)


def test_resamples_as_weights_equal_copied_rows(no_measuring, tmp_path):
    options = ["--patients", "300", "--findings", "2", "--bootstraps", "4", "--baseline_resamples", "3"]
    assert score_bootstrap.main([*options, "--json", str(tmp_path / "s.json")]) == 0
    (written,) = json.loads((tmp_path / "s.json").read_text())
    assert written["name"] == "score_bootstrap/300/2/4" and written["max_rel_diff"] < 1e-12
    assert written["ours_peak_gb"] == 0.2


def test_the_two_ways_tell_resamples_and_findings_apart():
    frame = score_bootstrap.make_frame(300, 2)
    findings = []
    for _, rows in frame.groupby("finding", sort=False):
        scores, labels = rows["score"].to_numpy(), rows["label"].to_numpy()
        findings.append((scores, labels, scores > 0.4))
    weights = draw_patients(300, 2, 1)
    ours, theirs = (
        way(findings, weights) for way in (score_bootstrap.weighted_resamples, score_bootstrap.copied_resamples)
    )
    assert ours.shape == theirs.shape == (2, 2, len(METRICS))
    np.testing.assert_allclose(ours, theirs, atol=1e-12)
    assert np.ptp(theirs, axis=0).min() > 0 and np.ptp(theirs, axis=1).min() > 0
