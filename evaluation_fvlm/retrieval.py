"""Retrieval: does a report find its volume, a volume its report, and an organ its own sentences?

Pairs are (volume, text), a pool is the pairs among which is searched, candidates are ordered by cosine. Per query:

(1) Its correct answers are ALL candidates with its text: two scans may have the same sentence, and no model could tell
    which of them was meant. The rank is that of the FIRST correct answer.
(2) Candidates that are equally near (within `TIE`, the rounding of a cosine in float32) come in random order, and every
    figure is its expectation over these orders. With g candidates nearer than the first correct answer, and t as near
    of which c are correct, the expected rank is g + (t + 1) / (c + 1). So embeddings that have collapsed to one point
    score as a guess does.
(3) R@k is the share of queries with a correct answer among the first k, MRR the mean of 1 / rank, the median that of
    the expected ranks.
(4) Chance is the same figure for candidates in random order, exactly: a query with c correct among m candidates misses
    the first k with probability C(m - c, k) / C(m, k).

Two pools: "whole", all pairs; and "deduplicated", where of equal texts the first pair of the split is kept, on both
sides, so that each query has one answer. In the whole pool a normal sentence that half of the scans have is found by
any model; the deduplicated one is the harder, and says more.

Queries are resampled by patients for the intervals; the pool they search stays as it is.

The matrix of cosines is never whole: it is made in blocks that fit a processor's cache and serve both directions at
once, since volumes asked by texts and texts asked by volumes need the same products.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from evaluation_fvlm.bootstrap import draw_patients, figure
from evaluation_fvlm.embedding import SplitEmbeddings, SplitTexts
from evaluation_fvlm.errors import EvaluationError

RECALL_AT = (1, 5, 10, 50, 100)
# Products of unit vectors of some hundred dimensions in float32 are off by a few 1e-7, and not alike in every block.
TIE = 2e-6
ROWS, COLUMNS = 512, 2048  # of a block: 4 MB of cosines
POOLS = ("whole", "deduplicated")
DIRECTIONS = ("report_to_volume", "volume_to_report")


@dataclass
class Ranks:
    """What decides the rank of each query: of `num_candidates`, `num_nearer` come before its first correct answer,
    `num_tied` are as near as that answer, itself included, and `num_correct` of these are correct. All `(queries,)`
    but for the first; `num_answers` counts all correct candidates.
    """

    num_candidates: int
    num_nearer: np.ndarray
    num_tied: np.ndarray
    num_correct: np.ndarray
    num_answers: np.ndarray


def retrieve(
    embeddings: SplitEmbeddings,
    texts: SplitTexts,
    *,
    num_bootstraps: int = 1000,
    seed: int = 0,
    recall_at: Sequence[int] = RECALL_AT,
    only_complete: bool = False,
) -> dict:
    """Retrieval of whole volumes by reports and of organs by captions, in both directions.

    Args:
        embeddings: Of a split, with or without `volume_embeds`.
        texts: Of the same rows.
        num_bootstraps: Resamples of patients for the intervals; 0: none.
        seed: Of the resamples.
        recall_at: The k of R@k.
        only_complete: Leave out organs that the scan cuts (their captions may speak of what is not seen).

    Returns:
        JSON-ready: `convention`; `global` (None without `volume_embeds`) and `per_organ`, each with `num_pairs`,
        `excluded` (scans by reason) and `pools`: pool -> direction -> figures, each {"value", "low", "high", "chance"};
        `macro`: means over the organs of the deduplicated pool. None stands where there are fewer than two texts.

    Raises:
        EvaluationError: If embeddings and texts are not of the same rows, or are not finite.
    """
    if len(texts.report_index) != len(embeddings.scans):
        raise EvaluationError(
            f"the texts are those of {len(texts.report_index)} scans, the embeddings of {len(embeddings.scans)}."
        )
    patients = embeddings.scans["patient_id"].to_numpy()
    options = {"num_bootstraps": num_bootstraps, "seed": seed, "recall_at": tuple(recall_at)}

    whole = None
    if embeddings.volume_embeds is not None:
        has_volume, has_report = embeddings.volume_embeds.any(axis=1), texts.report_index >= 0
        whole = {"volume_embeds": embeddings.volume_pooling} | retrieve_pairs(
            embeddings.volume_embeds,
            texts.report_embeds,
            texts.report_index,
            patients,
            is_used=has_volume & has_report,
            **options,
        )
        whole["excluded"] = _counts({"no organ in sight": ~has_volume, "no report": has_volume & ~has_report})
    per_organ = {}
    for organ in embeddings.asked_organs or embeddings.organs:
        place = embeddings.organs.index(organ)
        is_present, has_caption = embeddings.is_present[:, place], texts.caption_index[:, place] >= 0
        is_cut = is_present & has_caption & ~embeddings.is_complete[:, place] & only_complete
        per_organ[organ] = retrieve_pairs(
            embeddings.image_embeds[:, place],
            texts.caption_embeds,
            texts.caption_index[:, place],
            patients,
            is_used=is_present & has_caption & ~is_cut,
            **options,
        )
        excluded = {"organ absent from the mask": ~is_present, "no caption": is_present & ~has_caption}
        per_organ[organ]["excluded"] = _counts(excluded | {"organ cut by the scan": is_cut})
    return {
        "convention": {
            "correct": "every candidate whose text equals the query's; the rank is that of the first of them",
            "ties": f"cosines within {TIE:g} are in random order; figures are expectations over these orders",
            "deduplicated": "of equal texts the first pair of the split is kept, on both sides",
            "chance": "candidates in random order, exact",
            "intervals": f"95 %, percentiles of {num_bootstraps} resamples of the queries' patients; the pool stays",
            "texts": "as the text encoder reads them: captions without their normal sentence, whole reports",
        },
        "global": whole,
        "per_organ": per_organ,
        "macro": _macro(per_organ, recall_at),
    }


def retrieve_pairs(
    image_embeds: np.ndarray,
    text_embeds: np.ndarray,
    text_index: np.ndarray,
    patients: np.ndarray,
    *,
    is_used: np.ndarray | None = None,
    num_bootstraps: int = 1000,
    seed: int = 0,
    recall_at: Sequence[int] = RECALL_AT,
) -> dict:
    """Both directions over both pools of one kind of pairs.

    Args:
        image_embeds: `(scans, dim)`, unit length.
        text_embeds: `(texts, dim)`, unit length, every text once.
        text_index: `(scans,)` into `text_embeds`; read where `is_used`.
        patients: `(scans,)`, whose each scan is.
        is_used: `(scans,)` bool; default all.
        num_bootstraps, seed, recall_at: As in `retrieve`.

    Returns:
        `num_pairs`, `num_texts` (different ones) and `pools`, see `retrieve`.
    """
    rows = np.flatnonzero(np.ones(len(image_embeds), bool) if is_used is None else is_used)
    used_texts, place = np.unique(text_index[rows], return_inverse=True)
    result: dict = {"num_pairs": len(rows), "num_texts": len(used_texts), "pools": None}
    if len(used_texts) < 2:
        return result | {"reason": f"{len(used_texts)} different text(s): there is nothing to search among"}
    images, texts = image_embeds[rows], text_embeds[used_texts]
    _, first = np.unique(place, return_index=True)  # the first pair of each text
    members = {"whole": np.arange(len(rows)), "deduplicated": first}
    result["pools"] = {}
    for pool in POOLS:
        kept = members[pool]
        if pool == "deduplicated" and len(kept) == len(rows):  # no text comes twice
            result["pools"][pool] = result["pools"]["whole"]
            continue
        both = pair_ranks(images[kept], texts, place[kept])
        figures = {"num_candidates": len(kept)}
        for direction, ranks in zip(DIRECTIONS, both):
            figures[direction] = summarize_ranks(
                ranks, patients[rows[kept]], recall_at=recall_at, num_bootstraps=num_bootstraps, seed=seed
            )
        result["pools"][pool] = figures
    return result


def pair_ranks(image_embeds: np.ndarray, text_embeds: np.ndarray, text_index: np.ndarray) -> tuple[Ranks, Ranks]:
    """Ranks of both directions over one pool.

    Args:
        image_embeds: `(pairs, dim)`, unit length.
        text_embeds: `(texts, dim)`, unit length, different texts, each of at least one pair.
        text_index: `(pairs,)`, the text of each pair.

    Returns:
        Of the pairs' texts asking for volumes, and of the pairs' volumes asking for texts (text j stands there as often
        as there are pairs that have it); both in the order of the pairs.

    Raises:
        EvaluationError: If the embeddings are not finite or of two sizes.
    """
    if image_embeds.shape[1] != text_embeds.shape[1]:
        raise EvaluationError(
            f"images are embedded in {image_embeds.shape[1]} dimensions, texts in {text_embeds.shape[1]}: they are not "
            "of one model."
        )
    for what, embeds in (("image", image_embeds), ("text", text_embeds)):
        if broken := int((~np.isfinite(embeds).all(axis=1)).sum()):
            raise EvaluationError(f"{broken} of {len(embeds)} {what} embeddings are not finite: embed the split again.")
    num_pairs, num_texts = len(image_embeds), len(text_embeds)
    counts = np.bincount(text_index, minlength=num_texts)
    own = np.einsum("nd,nd->n", image_embeds, text_embeds[text_index], dtype=np.float64)  # (pairs,)
    best = np.full(num_texts, -np.inf)  # the nearest volume of those that have the text
    np.maximum.at(best, text_index, own)

    images, texts = (
        torch.from_numpy(np.ascontiguousarray(embeds, np.float32)) for embeds in (image_embeds, text_embeds)
    )
    weight = torch.from_numpy(counts.astype(np.float32))
    # (rows: volumes, columns: texts) strictly nearer than, and at least as near as, the correct answer
    row_above, row_below = (torch.from_numpy((own + shift).astype(np.float32))[:, None] for shift in (TIE, -TIE))
    column_above, column_below = (torch.from_numpy((best + shift).astype(np.float32)) for shift in (TIE, -TIE))
    row_nearer, row_near = torch.zeros(2, num_pairs, dtype=torch.float64)
    column_nearer, column_near = torch.zeros(2, num_texts, dtype=torch.float64)
    cosines, flags = torch.empty(2, ROWS * COLUMNS)
    ones = torch.ones(ROWS)
    for start in range(0, num_pairs, ROWS):
        row = slice(start, min(start + ROWS, num_pairs))
        for begin in range(0, num_texts, COLUMNS):
            column = slice(begin, min(begin + COLUMNS, num_texts))
            size = (row.stop - row.start, column.stop - column.start)
            block, flag = (memory[: size[0] * size[1]].view(size) for memory in (cosines, flags))
            torch.mm(images[row], texts[column].T, out=block)
            # Sums of at most 2048 pairs' weights in float32 are exact below 2^24 pairs.
            row_nearer[row] += torch.gt(block, row_above[row], out=flag) @ weight[column]
            row_near[row] += torch.ge(block, row_below[row], out=flag) @ weight[column]
            column_nearer[column] += ones[: size[0]] @ torch.gt(block, column_above[column], out=flag)
            column_near[column] += ones[: size[0]] @ torch.ge(block, column_below[column], out=flag)

    is_best = own >= best[text_index] - TIE
    num_best = np.bincount(text_index[is_best], minlength=num_texts)
    by_volume = _ranks(num_pairs, row_nearer, row_near, counts[text_index], counts[text_index])
    by_text = _ranks(num_pairs, column_nearer, column_near, num_best, counts)
    by_report = Ranks(num_pairs, *(getattr(by_text, name)[text_index] for name in list(vars(by_text))[1:]))
    return by_report, by_volume


def _ranks(num_candidates: int, nearer, near, num_correct: np.ndarray, num_answers: np.ndarray) -> Ranks:
    nearer, near = (values.numpy().astype(np.int64) for values in (nearer, near))
    # The correct answer itself may have been rounded to just outside of what counts as tied with it.
    num_tied = np.maximum(near - nearer, num_correct)
    return Ranks(num_candidates, nearer, num_tied, num_correct.astype(np.int64), num_answers.astype(np.int64))


def misses(num_candidates: int, num_correct: int) -> np.ndarray:
    """Probability that none of the first k = 0 ... `num_candidates` in random order is correct: C(m-c, k) / C(m, k)."""
    k = np.arange(num_candidates)
    factors = np.maximum(num_candidates - num_correct - k, 0) / (num_candidates - k)
    return np.concatenate([[1.0], np.cumprod(factors)])


def expected_ranks(ranks: Ranks) -> np.ndarray:
    """Expected rank of the first correct answer, `(queries,)`."""
    return ranks.num_nearer + (ranks.num_tied + 1) / (ranks.num_correct + 1)


def hits_and_reciprocals(ranks: Ranks, recall_at: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Per query the probability of a hit among the first k `(queries, k)`, and the expectation of 1 / rank."""
    at = np.asarray(recall_at)
    nearer = ranks.num_nearer
    hits = (nearer[:, None] < at).astype(float)
    reciprocals = 1.0 / (nearer + 1)
    # Where all that are tied are correct the rank is sure; of the others every case is worked out once.
    is_open = ranks.num_tied > ranks.num_correct
    cases = np.stack([ranks.num_tied, ranks.num_correct, nearer], axis=1)[is_open]
    cases, of_query = np.unique(cases, axis=0, return_inverse=True)
    case_hits, case_reciprocals = np.zeros((len(cases), len(at))), np.zeros(len(cases))
    kinds, of_case = np.unique(cases[:, :2], axis=0, return_inverse=True)
    for kind, (num_tied, num_correct) in enumerate(kinds):
        missed = misses(num_tied, num_correct)
        is_at = missed[:-1] - missed[1:]  # the first correct one is the 1st, 2nd ... of those tied
        for case in np.flatnonzero(of_case.ravel() == kind):
            before = cases[case, 2]
            case_hits[case] = 1 - missed[np.clip(at - before, 0, num_tied)]
            case_reciprocals[case] = (is_at / (before + np.arange(1, num_tied + 1))).sum()
    hits[is_open], reciprocals[is_open] = case_hits[of_query.ravel()], case_reciprocals[of_query.ravel()]
    return hits, reciprocals


def chance(num_candidates: int, num_answers: np.ndarray, recall_at: Sequence[int]) -> tuple[np.ndarray, float, float]:
    """R@k, median rank and MRR of candidates in random order, over queries with so many answers each."""
    answers, counts = np.unique(num_answers, return_counts=True)
    share = counts / counts.sum()
    missed = np.zeros(num_candidates + 1)
    for number, weight in zip(answers, share):
        missed += weight * misses(num_candidates, number)
    recall = 1 - missed[np.minimum(np.asarray(recall_at), num_candidates)]
    is_at = missed[:-1] - missed[1:]
    mrr = float((is_at / np.arange(1, num_candidates + 1)).sum())
    found = 1 - missed
    # From both sides of one half, as the median of an even number of values is the mean of the two in the middle.
    low, high = np.searchsorted(found, 0.5 - 1e-12), np.searchsorted(found, 0.5 + 1e-12)
    return recall, (low + high) / 2, mrr


def summarize_ranks(
    ranks: Ranks,
    patients: np.ndarray,
    *,
    recall_at: Sequence[int] = RECALL_AT,
    num_bootstraps: int = 1000,
    seed: int = 0,
) -> dict:
    """Figures of one direction over one pool, each with its interval and its chance.

    Args:
        ranks: Of all queries.
        patients: `(queries,)`.
        recall_at, num_bootstraps, seed: As in `retrieve`.
    """
    hits, reciprocals = hits_and_reciprocals(ranks, recall_at)
    expected = expected_ranks(ranks)
    by_chance, median_by_chance, mrr_by_chance = chance(ranks.num_candidates, ranks.num_answers, recall_at)
    per_query = np.column_stack([hits, reciprocals])  # (queries, k + 1)
    means, median = per_query.mean(axis=0), float(np.median(expected))
    resampled, resampled_median = None, None
    _, patient_of = np.unique(patients, return_inverse=True)
    num_patients = int(patient_of.max()) + 1
    if num_bootstraps and num_patients > 1:  # resamples of one patient are all alike
        weights = draw_patients(num_patients, num_bootstraps, seed)  # (resamples, patients)
        sums = np.zeros((num_patients, per_query.shape[1] + 1))
        np.add.at(sums, patient_of, np.column_stack([per_query, np.ones(len(per_query))]))
        resampled, resampled_median = _resample(weights, sums, expected, patient_of)

    def with_interval(column: int, by_chance: float) -> dict:
        return figure(means[column], None if resampled is None else resampled[:, column]) | {"chance": float(by_chance)}

    return {
        "num_queries": len(expected),
        "recall": {str(k): with_interval(column, by_chance[column]) for column, k in enumerate(recall_at)},
        "median_rank": figure(median, resampled_median) | {"chance": float(median_by_chance)},
        "mrr": with_interval(len(recall_at), mrr_by_chance),
    }


def _resample(
    weights: np.ndarray, sums: np.ndarray, expected: np.ndarray, patient_of: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Means `(resamples, columns)` and medians `(resamples,)` of each resample of patients."""
    means, medians = np.zeros((len(weights), sums.shape[1] - 1)), np.zeros(len(weights))
    order = np.argsort(expected, kind="stable")
    in_order, patients_in_order = expected[order], patient_of[order]
    for number, drawn in enumerate(weights):  # one by one: together they would be resamples x queries large
        totals = drawn.astype(float) @ sums
        means[number] = totals[:-1] / totals[-1]
        before = np.cumsum(drawn[patients_in_order], dtype=np.int64)
        middle = np.searchsorted(before, [(before[-1] + 1) // 2, before[-1] // 2 + 1])
        medians[number] = in_order[middle].mean()
    return means, medians


def _macro(per_organ: dict[str, dict], recall_at: Sequence[int]) -> dict:
    """Means over the organs of the deduplicated pool, and of its chance."""
    measured = [figures["pools"]["deduplicated"] for figures in per_organ.values() if figures["pools"] is not None]
    macro: dict = {"pool": "deduplicated", "num_organs": len(measured)}
    for direction in DIRECTIONS if measured else ():
        columns = {f"recall@{k}": [pool[direction]["recall"][str(k)] for pool in measured] for k in recall_at}
        columns["mrr"] = [pool[direction]["mrr"] for pool in measured]
        macro[direction] = {
            name: {key: float(np.mean([entry[key] for entry in entries])) for key in ("value", "chance")}
            for name, entries in columns.items()
        }
    return macro


def _counts(excluded: dict[str, np.ndarray]) -> dict[str, int]:
    return {reason: int(flags.sum()) for reason, flags in excluded.items() if flags.any()}


def nearest_texts(
    embeddings: SplitEmbeddings, texts: SplitTexts, rows: Sequence[int], organ: str | None = None, num_nearest: int = 5
) -> list[dict]:
    """For a few scans the different texts that lie nearest, to look at.

    Args:
        rows: Of the split.
        organ: Captions of this organ; None: whole volumes and reports.
        num_nearest: Texts of each.

    Returns:
        Per row its identity, `text` and `cosine` of its own (None without one), `rank` of its own among the different
        texts, and `nearest`: [{text, cosine, is_own}], nearest first.
    """
    if organ is None:
        if embeddings.volume_embeds is None:
            raise EvaluationError("whole volumes were not embedded: give an organ, or embed with with_volume=True.")
        images, index, embeds, content = (
            embeddings.volume_embeds, texts.report_index, texts.report_embeds, texts.reports
        )  # fmt: skip
    else:
        if organ not in embeddings.organs:
            raise EvaluationError(f"organ '{organ}' is none of {embeddings.organs}.")
        place = embeddings.organs.index(organ)
        images, index = embeddings.image_embeds[:, place], texts.caption_index[:, place]
        embeds, content = texts.caption_embeds, texts.captions
    pool = np.unique(index[index >= 0])
    examples = []
    for row in rows:
        cosines = embeds[pool] @ images[row]
        order = np.argsort(-cosines, kind="stable")
        own = int(np.searchsorted(pool, index[row])) if index[row] >= 0 else None
        examples.append(
            embeddings.scans.iloc[row].to_dict()
            | {
                "organ": organ,
                "text": None if own is None else content[pool[own]],
                "cosine": None if own is None else float(cosines[own]),
                "rank": None if own is None else int((cosines > cosines[own]).sum()) + 1,
                "nearest": [
                    {"text": content[pool[place]], "cosine": float(cosines[place]), "is_own": int(place) == own}
                    for place in order[:num_nearest]
                ],
            }
        )
    return examples
