"""Retrieval against loops over every query and every order of ties, chance against scipy and simulation."""

from fractions import Fraction
from itertools import combinations

import numpy as np
import pandas as pd
import pytest
from scipy.stats import nhypergeom

from evaluation_fvlm import retrieval
from evaluation_fvlm.embedding import SplitEmbeddings, SplitTexts
from evaluation_fvlm.errors import EvaluationError
from evaluation_fvlm.retrieval import (
    DIRECTIONS,
    RECALL_AT,
    TIE,
    chance,
    misses,
    nearest_texts,
    pair_ranks,
    retrieve,
    retrieve_pairs,
    summarize_ranks,
)


def unit(rng: np.random.Generator, *size: int) -> np.ndarray:
    vectors = rng.normal(size=size)
    return (vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)).astype(np.float32)


def corners(rng: np.random.Generator, count: int) -> np.ndarray:
    """Corners of a cube: cosines are -1, -1/2, 0, 1/2, 1, so nearly everything is tied."""
    return (rng.integers(0, 2, (count, 4)) - 0.5).astype(np.float32)


def slow_query(cosines: np.ndarray, is_correct: np.ndarray, recall_at=RECALL_AT) -> tuple[float, list[float], float]:
    """Expected rank, hits and 1 / rank of one query: every place that the correct ones can take among those tied."""
    best = cosines[is_correct].max()
    nearer = int((cosines > best + TIE).sum())
    is_tied = np.abs(cosines - best) <= TIE
    places = list(combinations(range(1, int(is_tied.sum()) + 1), int((is_tied & is_correct).sum())))
    ranks = [Fraction(nearer + min(place)) for place in places]
    mean = float(sum(ranks) / len(ranks))
    hits = [float(np.mean([rank <= k for rank in ranks])) for k in recall_at]
    return mean, hits, float(sum(1 / rank for rank in ranks) / len(ranks))


def slow_figures(images, texts, index, direction) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of every query, one after the other, in float64: expected rank, hits, reciprocal."""
    of_pairs = texts[index].astype(np.float64)
    images = images.astype(np.float64)
    results = []
    for pair in range(len(images)):
        if direction == "report_to_volume":
            cosines = images @ of_pairs[pair]
        else:
            cosines = of_pairs @ images[pair]
        results.append(slow_query(cosines, index == index[pair]))
    ranks, hits, reciprocals = zip(*results)
    return np.array(ranks), np.array(hits), np.array(reciprocals)


def pool_of(kind: str, seed: int):
    """`(images, texts, index)` of 14 pairs with 6 texts, some of them repeated, every text used."""
    rng = np.random.default_rng(seed)
    index = np.concatenate([rng.permutation(6), rng.integers(0, 6, 8)])
    make = corners if kind == "ties" else lambda rng, count: unit(rng, count, 4)
    return make(rng, 14), make(rng, 6), index


@pytest.mark.parametrize("kind", ["ties", "no ties"])
@pytest.mark.parametrize("seed", range(4))
def test_figures_equal_a_loop_over_queries_and_orders_of_ties(kind, seed):
    images, texts, index = pool_of(kind, seed)
    seen = []
    for direction, ranks in zip(DIRECTIONS, pair_ranks(images, texts, index)):
        expected, hits, reciprocals = slow_figures(images, texts, index, direction)
        figures = summarize_ranks(ranks, np.arange(14), num_bootstraps=0)
        np.testing.assert_allclose(retrieval.expected_ranks(ranks), expected, atol=1e-12)
        got = [figures["recall"][str(k)]["value"] for k in RECALL_AT]
        np.testing.assert_allclose(got, hits.mean(axis=0), atol=1e-12)
        assert figures["mrr"]["value"] == pytest.approx(reciprocals.mean(), abs=1e-12)
        assert figures["median_rank"]["value"] == pytest.approx(np.median(expected), abs=1e-12)
        seen.append(expected)
    assert not np.array_equal(*seen), "both directions alike would not tell them apart"


@pytest.mark.parametrize("edges", [(3, 2), (5, 6), (100, 1)])
def test_blocks_do_not_matter(edges, monkeypatch):
    rng = np.random.default_rng(0)
    images, texts, index = (
        unit(rng, 40, 16),
        unit(rng, 13, 16),
        np.concatenate([np.arange(13), rng.integers(0, 13, 27)]),
    )
    whole = pair_ranks(images, texts, index)
    monkeypatch.setattr(retrieval, "ROWS", edges[0])
    monkeypatch.setattr(retrieval, "COLUMNS", edges[1])
    for one, other in zip(whole, pair_ranks(images, texts, index)):
        for name in vars(one):
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
    assert whole[0].num_nearer.max() > 10


def test_collapsed_embeddings_score_exactly_as_chance():
    """The dangerous failure: all embeddings alike, and an argsort that puts each query's own first."""
    rng = np.random.default_rng(0)
    index = np.concatenate([np.arange(700), rng.integers(0, 700, 500)])
    images, texts = np.repeat(unit(rng, 1, 256), 1200, axis=0), np.repeat(unit(rng, 1, 256), 700, axis=0)
    pools = retrieve_pairs(images, texts, index, np.arange(1200), num_bootstraps=0)["pools"]
    for pool in pools.values():
        for direction in DIRECTIONS:
            for figure in (*pool[direction]["recall"].values(), pool[direction]["mrr"]):
                assert figure["value"] == pytest.approx(figure["chance"], rel=1e-9)
                assert 0 < figure["value"] < 1
    assert pools["deduplicated"]["report_to_volume"]["median_rank"]["value"] == 350.5
    assert pools["deduplicated"]["report_to_volume"]["median_rank"]["chance"] == 350.5


def test_noise_scores_about_as_chance_and_a_good_model_far_above():
    rng = np.random.default_rng(1)
    texts, index = unit(rng, 400, 32), np.concatenate([np.arange(400), rng.integers(0, 400, 200)])
    noise = retrieve_pairs(unit(rng, 600, 32), texts, index, np.arange(600), num_bootstraps=0)["pools"]
    good = texts[index] + 0.1 * unit(rng, 600, 32)
    good = retrieve_pairs(good / np.linalg.norm(good, axis=1)[:, None], texts, index, np.arange(600), num_bootstraps=0)
    for pool in ("whole", "deduplicated"):
        for direction in DIRECTIONS:
            recall = noise[pool][direction]["recall"]["50"]
            assert recall["value"] == pytest.approx(recall["chance"], abs=4 * np.sqrt(recall["chance"] / 400))
            assert good["pools"][pool][direction]["recall"]["1"]["value"] == 1.0
            assert good["pools"][pool][direction]["median_rank"]["value"] == 1.0
    assert noise["whole"]["report_to_volume"]["recall"]["50"]["chance"] > 0.1


@pytest.mark.parametrize(("num_candidates", "num_correct"), [(10, 1), (10, 3), (50, 7), (5, 5)])
def test_chance_is_the_negative_hypergeometric_distribution(num_candidates, num_correct):
    """The first correct of random order comes after as many misses as are drawn before the first success."""
    law = nhypergeom(num_candidates, num_candidates - num_correct, 1)  # wrong ones that come before the first correct
    probability = law.pmf(np.arange(num_candidates))
    missed = misses(num_candidates, num_correct)
    np.testing.assert_allclose(missed[:-1] - missed[1:], probability, atol=1e-12)
    recall, _, mrr = chance(num_candidates, np.full(3, num_correct), (1, 2, 100))
    np.testing.assert_allclose(recall, [probability[0], probability[:2].sum(), 1.0], atol=1e-12)
    assert mrr == pytest.approx((probability / np.arange(1, num_candidates + 1)).sum())


def test_chance_of_one_answer_has_closed_forms():
    recall, median, mrr = chance(200, np.ones(9, int), (1, 50, 500))
    np.testing.assert_allclose(recall, [1 / 200, 1 / 4, 1.0])
    assert median == 100.5 and mrr == pytest.approx(sum(1 / n for n in range(1, 201)) / 200)
    assert chance(7, np.ones(1, int), (1,))[1] == 4


def test_chance_equals_simulation_where_queries_differ_in_their_answers():
    answers, rng = np.array([1, 1, 4, 9]), np.random.default_rng(0)
    ranks = np.array([1 + np.sort(rng.permutation(20)[:c])[0] for _ in range(6000) for c in answers])
    recall, median, mrr = chance(20, answers, (1, 5))
    np.testing.assert_allclose(recall, [(ranks <= k).mean() for k in (1, 5)], atol=0.01)
    assert mrr == pytest.approx((1 / ranks).mean(), abs=0.01) and median == np.median(ranks)


def test_own_cosine_lies_within_the_tie_of_the_block_that_holds_it():
    """Counted as nearer than itself, a perfect answer would come second."""
    rng = np.random.default_rng(0)
    texts = unit(rng, 3000, 768)
    by_report, by_volume = pair_ranks(texts, texts, np.arange(3000))
    assert not by_report.num_nearer.any() and not by_volume.num_nearer.any()


def test_rounding_beyond_the_tie_never_loses_the_answer_itself(monkeypatch):
    """Without any tolerance some cosines of the blocks lie just below the same cosine computed alone."""
    monkeypatch.setattr(retrieval, "TIE", 0.0)
    texts = unit(np.random.default_rng(0), 500, 256)
    for ranks in pair_ranks(texts, texts, np.arange(500)):
        assert (ranks.num_tied >= 1).all() and (retrieval.expected_ranks(ranks) >= 1).all()


def test_intervals_resample_patients_with_all_their_queries():
    images, texts, index = pool_of("no ties", 5)
    ranks = pair_ranks(images, texts, index)[1]
    patients = np.array([f"p{n // 3}" for n in range(14)])
    figures = summarize_ranks(ranks, patients, num_bootstraps=400, seed=3)
    weights = retrieval.draw_patients(5, 400, 3)
    expected, hits, reciprocals = slow_figures(images, texts, index, "volume_to_report")
    repeated = [np.repeat(np.arange(14), drawn[np.arange(14) // 3]) for drawn in weights]
    slow = {
        "recall@1": [hits[queries, 0].mean() for queries in repeated],
        "mrr": [reciprocals[queries].mean() for queries in repeated],
        "median": [np.median(expected[queries]) for queries in repeated],
    }
    got = {"recall@1": figures["recall"]["1"], "mrr": figures["mrr"], "median": figures["median_rank"]}
    for name, values in slow.items():
        low, high = np.quantile(values, [0.025, 0.975])
        assert (got[name]["low"], got[name]["high"]) == (pytest.approx(low), pytest.approx(high))
        assert got[name]["low"] < got[name]["high"]
    alone = summarize_ranks(ranks, np.full(14, "p"), num_bootstraps=20)  # its resamples are all alike
    assert (
        alone["mrr"]["value"] == figures["mrr"]["value"] and alone["mrr"]["low"] is alone["median_rank"]["low"] is None
    )


def split_of(seed: int = 0, num_scans: int = 30) -> tuple[SplitEmbeddings, SplitTexts]:
    """Scans of two organs: half of them share one caption of the first organ, some organs are absent or cut."""
    rng = np.random.default_rng(seed)
    is_present = rng.random((num_scans, 2)) > 0.2
    caption_index = np.stack([rng.integers(1, 12, num_scans), rng.integers(12, 30, num_scans)], axis=1)
    caption_index[: num_scans // 2, 0] = 0
    caption_index[-2:, 1] = -1
    report_index = np.minimum(np.arange(num_scans), num_scans - 4).astype(np.int32)
    report_index[3] = -1
    volume_embeds = unit(rng, num_scans, 8)
    volume_embeds[5] = 0
    scans = {"patient_id": [f"p{n // 2}" for n in range(num_scans)], "scan_id": [f"s{n}" for n in range(num_scans)]}
    embeddings = SplitEmbeddings(
        organs=["lung", "heart"],
        scans=pd.DataFrame(scans | {"recon_id": [f"r{n}" for n in range(num_scans)]}),
        labels=[{}] * num_scans,
        image_embeds=unit(rng, num_scans, 2, 8) * is_present[..., None],
        is_present=is_present,
        is_complete=is_present & (rng.random((num_scans, 2)) > 0.3),
        volume_embeds=volume_embeds,
        volume_pooling="made up",
    )
    texts = SplitTexts(
        captions=[f"caption {n}" for n in range(30)],
        caption_embeds=unit(rng, 30, 8),
        caption_index=caption_index.astype(np.int32),
        is_abnormal=np.ones((num_scans, 2), bool),
        is_mentioned=np.ones((num_scans, 2), bool),
        reports=[f"report {n}" for n in range(num_scans - 3)],
        report_embeds=unit(rng, num_scans - 3, 8),
        report_index=report_index,
    )
    return embeddings, texts


def test_a_split_is_searched_per_organ_and_as_a_whole():
    embeddings, texts = split_of()
    result = retrieve(embeddings, texts, num_bootstraps=20)
    used = embeddings.is_present[:, 0]
    first: dict[int, int] = {}
    for row in np.flatnonzero(used):
        first.setdefault(texts.caption_index[row, 0], row)
    for pool, kept in (("whole", np.flatnonzero(used)), ("deduplicated", list(first.values()))):
        images, index = embeddings.image_embeds[kept, 0], texts.caption_index[kept, 0]
        for direction in DIRECTIONS:
            figures = result["per_organ"]["lung"]["pools"][pool]
            expected, hits, _ = slow_figures(images, texts.caption_embeds, index, direction)
            assert figures["num_candidates"] == figures[direction]["num_queries"] == len(kept)
            assert figures[direction]["recall"]["5"]["value"] == pytest.approx(hits[:, 1].mean())
            names, patient = np.unique(embeddings.scans["patient_id"].iloc[kept], return_inverse=True)
            drawn = [np.repeat(np.arange(len(kept)), w[patient]) for w in retrieval.draw_patients(len(names), 20, 0)]
            low = np.quantile([hits[queries, 1].mean() for queries in drawn], 0.025)
            assert figures[direction]["recall"]["5"]["low"] == pytest.approx(low), "these queries' own patients"
            assert figures[direction]["median_rank"]["value"] == pytest.approx(np.median(expected))
    lung, heart = result["per_organ"]["lung"], result["per_organ"]["heart"]
    assert lung["num_texts"] < lung["num_pairs"] == used.sum() and lung["excluded"] == {
        "organ absent from the mask": int((~used).sum())
    }
    assert heart["excluded"]["no caption"] == int(embeddings.is_present[-2:, 1].sum()) > 0
    assert result["global"]["excluded"] == {"no organ in sight": 1, "no report": 1}
    assert result["global"]["num_pairs"] == 28 and result["global"]["volume_embeds"] == "made up"
    macro = np.mean(
        [each["pools"]["deduplicated"]["report_to_volume"]["recall"]["1"]["value"] for each in (lung, heart)]
    )
    assert result["macro"]["report_to_volume"]["recall@1"]["value"] == pytest.approx(macro)


def test_organs_that_the_scan_cuts_can_be_left_out():
    embeddings, texts = split_of()
    is_cut = embeddings.is_present & ~embeddings.is_complete
    result = retrieve(embeddings, texts, num_bootstraps=0, only_complete=True)["per_organ"]["lung"]
    assert result["num_pairs"] == embeddings.is_complete[:, 0].sum() and is_cut[:, 0].sum() > 0
    assert result["excluded"]["organ cut by the scan"] == is_cut[:, 0].sum()


def test_an_organ_whose_captions_are_all_alike_has_no_figures():
    embeddings, texts = split_of()
    texts.caption_index[:, 0] = 4
    result = retrieve(embeddings, texts, num_bootstraps=0)
    assert result["per_organ"]["lung"]["pools"] is None and "1 different" in result["per_organ"]["lung"]["reason"]
    assert result["macro"]["num_organs"] == 1
    embeddings.volume_embeds = None
    assert retrieve(embeddings, texts, num_bootstraps=0)["global"] is None


def test_pools_without_a_repeated_text_are_one():
    rng = np.random.default_rng(0)
    pools = retrieve_pairs(unit(rng, 9, 4), unit(rng, 9, 4), np.arange(9), np.arange(9), num_bootstraps=0)["pools"]
    assert pools["whole"] == pools["deduplicated"] and pools["whole"]["num_candidates"] == 9
    assert pools["whole"]["volume_to_report"]["recall"]["10"] == {
        "value": 1.0, "low": None, "high": None, "chance": 1.0
    }  # fmt: skip


def test_bad_embeddings_are_refused():
    embeddings, texts = split_of()
    embeddings.image_embeds[4, 1, 2] = np.nan
    embeddings.is_present[4, 1] = True
    with pytest.raises(EvaluationError, match="1 of .* image embeddings are not finite"):
        retrieve(embeddings, texts, num_bootstraps=0)
    with pytest.raises(EvaluationError, match="8 dimensions, texts in 5"):
        pair_ranks(np.ones((3, 8), np.float32), np.ones((3, 5), np.float32), np.arange(3))
    texts.report_index = texts.report_index[:-1]
    with pytest.raises(EvaluationError, match="29 scans, the embeddings of 30"):
        retrieve(embeddings, texts)


def test_examples_show_the_nearest_texts_and_the_own_ones_rank():
    embeddings, texts = split_of()
    row = int(np.flatnonzero(embeddings.is_present[:, 0])[-1])
    (lung,) = nearest_texts(embeddings, texts, [row], "lung", num_nearest=3)
    pool = np.unique(texts.caption_index[:, 0])
    cosines = {n: float(texts.caption_embeds[n] @ embeddings.image_embeds[row, 0]) for n in pool}
    by_cosine = sorted(cosines, key=cosines.get, reverse=True)
    assert [entry["text"] for entry in lung["nearest"]] == [f"caption {n}" for n in by_cosine[:3]]
    assert lung["rank"] == by_cosine.index(texts.caption_index[row, 0]) + 1 and lung["recon_id"] == f"r{row}"
    no_report, own = nearest_texts(embeddings, texts, [3, 0])
    assert no_report["text"] is None and no_report["rank"] is None and own["text"] == "report 0"
    with pytest.raises(EvaluationError, match="'liver' is none of"):
        nearest_texts(embeddings, texts, [0], "liver")
