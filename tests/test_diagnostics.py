"""Diagnostics against loops over every pair, scikit-learn's and SciPy's pieces, and closed forms."""

from itertools import combinations

import numpy as np
import pytest
from test_probes import TASK, split_of, unit

from evaluation_fvlm import diagnostics
from evaluation_fvlm.diagnostics import (
    alignment,
    compare_poolings,
    describe,
    diagnose,
    effective_rank,
    mean_cosine,
    modality_gap,
    uniformity,
)
from evaluation_fvlm.embedding import SplitTexts
from evaluation_fvlm.embedding_files import StoredEmbeddings
from evaluation_fvlm.errors import EvaluationError
from evaluation_fvlm.zero_shot import score_task


def stored_of(num_patients: int = 60, signal: float = 2.0) -> StoredEmbeddings:
    """Scans with captions of two organs, some repeated or missing, reports, prompts along the findings' axes."""
    rng = np.random.default_rng(1)
    embeddings = split_of(num_patients, signal=signal)
    # Mean pooling sees less of the signal.
    embeddings.mean_pooled_embeds = unit(embeddings.image_embeds + 1.5 * unit(rng.normal(size=(num_patients, 2, 12))))
    index = rng.integers(0, 20, (num_patients, 2)).astype(np.int32)
    index[:5, 0] = -1
    texts = SplitTexts(
        captions=[f"caption {n}" for n in range(20)],
        caption_embeds=unit(rng.normal(size=(20, 12)) + 1),
        caption_index=index,
        is_abnormal=np.ones((num_patients, 2), bool),
        is_mentioned=np.ones((num_patients, 2), bool),
        reports=[f"report {n}" for n in range(num_patients)],
        report_embeds=unit(rng.normal(size=(num_patients, 12))),
        report_index=np.arange(num_patients, dtype=np.int32),
    )
    axes = np.eye(12, dtype=np.float32)
    prompts = {"Nodule.": axes[3], "No nodule.": -axes[3], "Big.": axes[7], "Not big.": -axes[7]}
    return StoredEmbeddings(embeddings, texts, prompts, {"logit_scale": 3.0})


def test_figures_of_an_organ_equal_loops_over_every_pair():
    stored = stored_of()
    embeddings, texts = stored.embeddings, stored.texts
    embeddings.is_present[10:14, 0] = False
    figures = diagnose(stored, with_probe=False)["per_organ"]["lung"]
    present = np.flatnonzero(embeddings.is_present[:, 0])
    paired = [n for n in present if texts.caption_index[n, 0] >= 0]
    images = embeddings.image_embeds[:, 0].astype(float)
    captions = {n: texts.caption_embeds[texts.caption_index[n, 0]].astype(float) for n in paired}
    assert (figures["num_scans"], figures["num_pairs"]) == (56, 51) == (len(present), len(paired))

    assert figures["alignment"] == pytest.approx(np.mean([((images[n] - captions[n]) ** 2).sum() for n in paired]))
    gap = np.mean([images[n] for n in paired], axis=0) - np.mean([captions[n] for n in paired], axis=0)
    assert figures["modality_gap"] == pytest.approx(np.sqrt((gap**2).sum()))
    spread = [np.exp(-2 * ((images[n] - images[m]) ** 2).sum()) for n, m in combinations(present, 2)]
    assert figures["image_uniformity"] == pytest.approx(np.log(np.mean(spread)))
    assert figures["image_cosine"] == pytest.approx(
        np.mean([images[n] @ images[m] for n, m in combinations(present, 2)])
    )
    index = texts.caption_index[:, 0]
    of_scans = [captions[n] @ captions[m] for n, m in combinations(paired, 2) if index[n] != index[m]]
    assert figures["text_cosine"] == pytest.approx(np.mean(of_scans))
    used = texts.caption_embeds[sorted({index[n] for n in paired})].astype(float)
    assert figures["text_cosine_distinct"] == pytest.approx(np.mean([a @ b for a, b in combinations(used, 2)]))
    assert figures["text_cosine"] != pytest.approx(figures["text_cosine_distinct"], abs=1e-4)
    spread = [np.exp(-2 * ((a - b) ** 2).sum()) for a, b in combinations(used, 2)]
    assert figures["text_uniformity"] == pytest.approx(np.log(np.mean(spread)))
    for name, points in (("image", images[present]), ("text", used)):
        for ending, matrix in (("", points), ("_centred", points - points.mean(axis=0))):
            shares = np.linalg.svd(matrix, compute_uv=False)
            shares = shares / shares.sum()
            expected = np.exp(-(shares * np.log(shares)).sum())
            assert figures[f"{name}_effective_rank{ending}"] == pytest.approx(expected, rel=1e-6)


def test_blocks_of_distances_do_not_matter(monkeypatch):
    points = unit(np.random.default_rng(0).normal(size=(37, 5))).astype(float)
    whole = uniformity(points)
    monkeypatch.setattr(diagnostics, "BLOCK", 10)
    assert uniformity(points) == pytest.approx(whole, rel=1e-12)


def test_closed_forms():
    axes = np.eye(6)
    assert effective_rank(axes[:4]) == pytest.approx(4)  # four equal singular values
    assert effective_rank(np.repeat(axes[:1], 9, axis=0)) == pytest.approx(1, abs=1e-5)
    values = np.array([3.0, 1.0])
    shares = values / 4
    assert effective_rank(np.diag(values)) == pytest.approx(np.exp(-(shares * np.log(shares)).sum()))
    assert effective_rank(np.zeros((3, 4))) is None
    # One point and its opposite: squared distance 4.
    assert uniformity(np.stack([axes[0], -axes[0]])) == pytest.approx(-8)
    assert uniformity(np.repeat(axes[:1], 5, axis=0)) == pytest.approx(0)
    assert uniformity(axes) == pytest.approx(-4)  # all at squared distance 2
    assert alignment(axes, axes) == 0 and alignment(axes, -axes) == 4
    assert alignment(axes, np.roll(axes, 1, axis=0)) == pytest.approx(2)
    assert modality_gap(axes[:1], -axes[:1]) == 2 and modality_gap(axes, axes[::-1]) == 0
    assert mean_cosine(axes) == pytest.approx(0) and mean_cosine(np.repeat(axes[:1], 3, axis=0)) == pytest.approx(1)
    for function in (uniformity, mean_cosine):
        assert function(axes[:1]) is None and function(axes[:0]) is None
    assert mean_cosine(np.repeat(axes[:1], 3, axis=0), np.zeros(3, int)) is None, "all texts are one text"
    assert alignment(axes[:0], axes[:0]) is None and modality_gap(axes[:0], axes[:0]) is None


@pytest.mark.parametrize("dim", [64, 256])
def test_random_points_fill_the_sphere(dim):
    """E exp(4 cos) of a uniform sphere is about exp(8 / dim)."""
    points = unit(np.random.default_rng(0).normal(size=(3000, dim))).astype(float)
    assert uniformity(points) == pytest.approx(-4 + 8 / dim, abs=0.005)
    assert effective_rank(points) > 0.9 * dim and abs(mean_cosine(points)) < 1e-3


def test_collapsed_texts_and_a_gap_are_seen():
    rng = np.random.default_rng(0)
    images = unit(rng.normal(size=(50, 32)))
    collapsed = unit(1e-3 * rng.normal(size=(50, 32)) + np.eye(32)[0])
    figures = describe(images, np.ones(50, bool), collapsed, np.arange(50))
    assert figures["text_cosine"] > 0.999 and figures["text_uniformity"] > -0.01
    assert figures["text_effective_rank"] < 1.3
    assert figures["text_effective_rank_centred"] > 15, "what little they differ by points everywhere"
    assert 0.9 < figures["modality_gap"] < 1.2 and figures["alignment"] == pytest.approx(2, abs=0.2)
    same = describe(images, np.ones(50, bool), np.repeat(collapsed[:1], 50, axis=0), np.arange(50))
    assert same["text_effective_rank_centred"] is None


def test_large_splits_are_drawn_from_with_a_seed():
    rng = np.random.default_rng(0)
    images = unit(rng.normal(size=(2000, 16)))
    draws = [
        describe(images, np.ones(2000, bool), None, None, max_points=300, rng=np.random.default_rng(seed))
        for seed in (0, 0, 1)
    ]
    assert draws[0] == draws[1] and draws[0]["image_uniformity"] != draws[2]["image_uniformity"]
    assert draws[0]["image_cosine"] == draws[2]["image_cosine"], "exact over all of them"
    assert draws[0]["image_uniformity"] == pytest.approx(uniformity(images.astype(float)), abs=0.05)


def test_organs_without_texts_or_scans_have_what_can_be_said_and_none():
    stored = stored_of()
    stored.texts = None
    result = diagnose(stored)
    assert "text_cosine" not in result["per_organ"]["lung"] and result["per_organ"]["lung"]["image_effective_rank"] > 5
    assert result["pooling"] is None and result["global"]["volume_embeds"] == "made up"
    stored = stored_of()
    stored.embeddings.is_present[:, 1] = False
    empty = diagnose(stored)["per_organ"]["heart"]
    assert empty["num_scans"] == 0
    assert all(value is None for name, value in empty.items() if not name.startswith("num_"))


def test_means_over_the_organs_leave_out_what_is_not_there():
    stored = stored_of()
    result = diagnose(stored)
    values = [result["per_organ"][organ]["alignment"] for organ in ("lung", "heart")]
    assert result["macro"]["alignment"] == pytest.approx(np.mean(values)) and values[0] != values[1]
    stored.embeddings.is_present[:, 1] = False
    assert diagnose(stored)["macro"]["alignment"] == pytest.approx(values[0])


def test_poolings_are_compared_on_the_same_scans():
    stored = stored_of(num_patients=200, signal=4.0)
    result = compare_poolings(stored, TASK, num_bootstraps=100)
    labels = np.array([of_scan["Nodule"] for of_scan in stored.embeddings.labels])
    for name, embeds in (("attention", "image_embeds"), ("mean", "mean_pooled_embeds")):
        scores = getattr(stored.embeddings, embeds)[:, 0, 3]  # cosine with the prompt's axis
        higher = scores[labels == 1][:, None] > scores[labels == 0]
        assert result["zero_shot"]["per_finding"]["Nodule"][name] == pytest.approx(higher.mean())
    for part in ("zero_shot", "linear_probe"):
        macro = result[part]["macro"]
        assert macro["difference"]["value"] == pytest.approx(macro["mean"] - macro["attention"])
        assert macro["attention"] > 0.8
        assert macro["difference"]["low"] < macro["difference"]["value"] < macro["difference"]["high"] < 0
        both = [result[part]["per_finding"][finding]["mean"] for finding in ("Nodule", "Big heart")]
        assert macro["mean"] == pytest.approx(np.mean(both))
    frame = score_task(TASK, stored.embeddings, stored.prompt_embeds, 3.0)
    assert frame["score"].between(0, 1).all()


def test_poolings_need_what_was_stored():
    stored = stored_of()
    del stored.prompt_embeds["Not big."]
    result = compare_poolings(stored, TASK, num_bootstraps=0, with_probe=False)
    assert result["zero_shot"] is None and "'Not big.' does not lie with the embeddings" in result["zero_shot_reason"]
    assert result["linear_probe"] is None
    stored = stored_of()
    stored.info = {}
    assert "logit_scale" in compare_poolings(stored, TASK, num_bootstraps=0, with_probe=False)["zero_shot_reason"]
    stored.embeddings.mean_pooled_embeds = None
    with pytest.raises(EvaluationError, match="hold no mean-pooled organs"):
        compare_poolings(stored, TASK)


def test_embeddings_that_are_not_finite_are_refused():
    stored = stored_of()
    stored.embeddings.image_embeds[3, 1] = np.inf
    with pytest.raises(EvaluationError, match="1 of 60 image embeddings"):
        diagnose(stored)
    stored = stored_of()
    stored.texts.caption_embeds[stored.texts.caption_index[9, 0]] = np.nan
    with pytest.raises(EvaluationError, match="text embeddings are not finite"):
        diagnose(stored)
