"""The spread over wordings equals AUCs that are taken one by one."""

import numpy as np
import pytest
from evaluation_samples import TASK, tiny_dataset, tiny_model, tiny_tokenizer
from sklearn.metrics import roc_auc_score

from evaluation_fvlm.tasks import Item, Task
from evaluation_fvlm.wording import summarize_wording, wording_spread
from evaluation_fvlm.zero_shot import evaluate_split

PAIRS = [("A.", "No a."), ("There is a.", "There is no a."), ("A is seen.", "A is not seen.")]


def test_spread_is_that_of_the_aucs_of_single_pairs():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 40).astype(float)
    scores = rng.random((40, 3)) + labels[:, None] * [0.1, 0.3, 0.6]
    unknown, absent = labels.copy(), scores.copy()
    unknown[:5], absent[5:9] = np.nan, np.nan
    spread = wording_spread(absent, unknown, PAIRS, 2)
    aucs = [roc_auc_score(labels[9:], scores[9:, n]) for n in range(3)]
    assert [pair["auc"] for pair in spread["pairs"]] == pytest.approx(aucs)
    assert (spread["min"], spread["max"]) == (pytest.approx(min(aucs)), pytest.approx(max(aucs)))
    mean = sum(aucs) / 3
    assert spread["std"] == pytest.approx((sum((auc - mean) ** 2 for auc in aucs) / 2) ** 0.5)
    assert [pair["in_score"] for pair in spread["pairs"]] == [True, True, False]
    assert [(pair["positive"], pair["negative"]) for pair in spread["pairs"]] == PAIRS


def test_no_spread_without_two_wordings_or_without_two_classes():
    scores, labels = np.array([[0.1, 0.2], [0.3, 0.1]]), np.array([1.0, 0.0])
    assert wording_spread(scores, labels, PAIRS[:2], 2) is not None
    assert wording_spread(scores[:, :1], labels, PAIRS[:1], 1) is None
    assert wording_spread(scores, np.ones(2), PAIRS[:2], 2) is None
    assert summarize_wording({"a": None, "b": None}) is None


def test_summary_is_over_the_findings_that_have_a_spread():
    known = {
        "a": {"min": 0.5, "max": 0.7, "std": 0.1},
        "b": {"min": 0.6, "max": 1.0, "std": 0.3},
        "c": None,
    }
    summary = summarize_wording(known)
    assert summary["largest"] == {"finding": "b", "range": pytest.approx(0.4)} and summary["num_findings"] == 2
    figures = [summary[key] for key in ("mean_std", "mean_range", "macro_min", "macro_max")]
    assert figures == pytest.approx([0.2, 0.3, 0.55, 0.85])


def test_every_wording_is_scored_alone_and_paraphrases_stay_out_of_the_score():
    first, second, third = ("Big.", "Not big."), ("Big is seen.", "Big is not seen."), ("Small.", "Not small.")
    item = Item("Big heart", "heart", *([pair[side] for pair in (first, second)] for side in (0, 1)), (third,))
    single = [Item("Big heart", "heart", (positive,), (negative,)) for positive, negative in (first, second, third)]
    tasks = [Task("all", 1, "made up", (item,)), *(Task(f"t{n}", 1, "made up", (it,)) for n, it in enumerate(single))]
    scores = evaluate_split(tiny_model(), tiny_tokenizer(), tiny_dataset(), tasks)
    by_wording = scores.by_wording["all", "Big heart"]
    alone = [scores.frame["score"][scores.frame["task"] == f"t{n}"].to_numpy() for n in range(3)]
    np.testing.assert_allclose(by_wording, np.stack(alone, axis=1))
    assert np.isnan(by_wording).any() and np.nanmax(by_wording.max(axis=1) - by_wording.min(axis=1)) > 0.01
    together = scores.frame["score"][scores.frame["task"] == "all"]
    np.testing.assert_allclose(together, (alone[0] + alone[1]) / 2)
    assert TASK["items"][1]["finding"] == item.finding
