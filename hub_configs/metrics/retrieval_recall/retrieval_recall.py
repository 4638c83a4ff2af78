"""Retrieval between paired embeddings in both directions: recall at k, median rank, mean reciprocal rank, and chance.

    metric = evaluate.load("hub_configs/metrics/retrieval_recall")
    metric.compute(predictions=image_embeds, references=text_embeds, texts=reports, k=(1, 5, 10))

Row i of both is one pair; candidates are ordered by cosine.

(1) All candidates whose text equals the query's are correct, and the rank is that of the first of them: no model could
    tell two scans with the same sentence apart. Without `texts` every pair has a text of its own.
(2) Candidates that are equally near (within 1e-6) come in random order, and every figure is its expectation over these
    orders: embeddings that have collapsed to one point score as a guess does.
(3) Chance is the same figure for candidates in random order, exactly.
(4) pool="deduplicated" keeps the first pair of equal texts, on both sides; pool="whole" keeps all.

Intervals are those of patients (of the queries) drawn with replacement, 2.5th to 97.5th percentile; the pool stays.

This file stands alone: it needs evaluate, datasets and numpy, and nothing beside it.
"""

import datasets
import evaluate
import numpy as np

TIE = 1e-6
ROWS = 256  # queries at a time
POOLS = ("whole", "deduplicated")

_DESCRIPTION = "Recall at k, median rank and MRR between paired embeddings, both directions, with chance and intervals."
_CITATION = ""
_KWARGS_DESCRIPTION = """
Args:
    predictions: `(pairs, dim)` embeddings of the images; brought to unit length.
    references: `(pairs, dim)` embeddings of their texts, likewise.
    texts: Text of every pair, or any name that is equal for equal texts.
    patient_ids: Patient of every pair; each is one of its own unless given.
    k: The k of recall at k.
    pool: "whole" or "deduplicated".
    num_bootstraps: Resamples of the patients; 0, or one patient alone: no intervals.
    seed: Of the resamples.

Returns:
    num_candidates, and for image_to_text and text_to_image: {figure}, {figure}_low, {figure}_high, {figure}_chance of
    the figures recall@K (one each), mrr and median_rank.
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class RetrievalRecall(evaluate.Metric):
    """Retrieval between paired embeddings, both directions."""

    def _info(self):
        row = datasets.Sequence(datasets.Value("float32"))
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features({"predictions": row, "references": row}),
        )

    def _compute(
        self,
        predictions,
        references,
        texts=None,
        patient_ids=None,
        k=(1, 5, 10),
        pool="whole",
        num_bootstraps=1000,
        seed=0,
    ):
        images, sentences = (
            _unit(values, name) for values, name in ((predictions, "predictions"), (references, "references"))
        )
        if images.shape != sentences.shape:
            raise ValueError(f"predictions {images.shape} and references {sentences.shape} must be pairs of one size.")
        if pool not in POOLS:
            raise ValueError(f"pool {pool!r} is not one of {list(POOLS)}.")
        num_pairs = len(images)
        for name, values in (("texts", texts), ("patient_ids", patient_ids)):
            if values is not None and len(values) != num_pairs:
                raise ValueError(f"{len(values)} {name} for {num_pairs} pairs.")
        text = np.unique(np.arange(num_pairs) if texts is None else [str(t) for t in texts], return_inverse=True)[1]
        ids = np.arange(num_pairs) if patient_ids is None else np.array([str(name) for name in patient_ids])
        if pool == "deduplicated":
            kept = np.sort(np.unique(text, return_index=True)[1])
            images, sentences, text, ids = images[kept], sentences[kept], text[kept], ids[kept]
        if len(np.unique(text)) < 2:
            raise ValueError("there are fewer than two different texts: nothing to search among.")
        results = {"num_candidates": len(images)}
        for direction, queries, candidates in (
            ("image_to_text", images, sentences),
            ("text_to_image", sentences, images),
        ):
            ranks = _ranks(queries, candidates, text)
            results[direction] = _figures(*ranks, text, ids, tuple(k), num_bootstraps, seed)
        return results


def _unit(values, name):
    embeds = np.array(values, np.float64)
    if embeds.ndim != 2 or not np.isfinite(embeds).all():
        raise ValueError(f"{name} must be finite embeddings (pairs, dim), got shape {embeds.shape}.")
    length = np.linalg.norm(embeds, axis=1, keepdims=True)
    if (length == 0).any():
        raise ValueError(f"{name}: {(length == 0).sum()} embeddings are zero; leave out pairs without one.")
    return embeds / length


def _ranks(queries, candidates, text):
    """Per query: candidates nearer than its first correct answer, those as near (itself too), the correct of these."""
    nearer, tied, correct = (np.zeros(len(queries), int) for _ in range(3))
    for start in range(0, len(queries), ROWS):
        rows = slice(start, start + ROWS)
        cosines = queries[rows] @ candidates.T
        is_correct = text[rows, None] == text
        best = np.where(is_correct, cosines, -np.inf).max(axis=1, keepdims=True)
        is_near = cosines >= best - TIE
        nearer[rows] = (cosines > best + TIE).sum(axis=1)
        tied[rows] = is_near.sum(axis=1) - nearer[rows]
        correct[rows] = (is_near & is_correct).sum(axis=1)
    return nearer, tied, correct


def _misses(num_candidates, num_correct):
    """Probability that none of the first k = 0 ... `num_candidates` in random order is correct: C(m-c, k) / C(m, k)."""
    k = np.arange(num_candidates)
    factors = np.maximum(num_candidates - num_correct - k, 0) / (num_candidates - k)
    return np.concatenate([[1.0], np.cumprod(factors)])


def _expected(nearer, tied, correct, at):
    """Expectation of a hit among the first k `(len(at),)`, and of 1 / rank, over random orders of what is tied."""
    missed = _misses(tied, correct)
    hits = 1 - missed[np.clip(np.asarray(at) - nearer, 0, tied)]
    return [*hits, ((missed[:-1] - missed[1:]) / (nearer + np.arange(1, tied + 1))).sum()]


def _figures(nearer, tied, correct, text, ids, at, num_bootstraps, seed):
    """The figures of one direction, with intervals and chance."""
    kinds, of_query = np.unique(np.stack([nearer, tied, correct], axis=1), axis=0, return_inverse=True)
    per_query = np.array([_expected(*kind, at) for kind in kinds.tolist()])[of_query.ravel()]  # (queries, k + 1)
    rank = nearer + (tied + 1) / (correct + 1)
    num_answers = np.bincount(text)[text]
    answers, counts = np.unique(num_answers, return_counts=True)
    missed = sum(count / len(text) * _misses(len(text), number) for number, count in zip(answers, counts))
    is_at = missed[:-1] - missed[1:]
    chance = [*(1 - missed[np.minimum(at, len(text))]), (is_at / np.arange(1, len(text) + 1)).sum()]
    # From both sides of one half, as the median of an even number of values is the mean of the two in the middle.
    low, high = np.searchsorted(1 - missed, 0.5 - 1e-12), np.searchsorted(1 - missed, 0.5 + 1e-12)

    patients = np.unique(ids, return_inverse=True)[1]
    if patients.max() == 0:
        num_bootstraps = 0  # resamples of one patient are all alike
    weights = _draw(patients.max() + 1, num_bootstraps, seed)
    means, medians = np.zeros((num_bootstraps, per_query.shape[1])), np.zeros(num_bootstraps)
    for number, drawn in enumerate(weights[:, patients]):
        means[number] = drawn @ per_query / drawn.sum()
        medians[number] = np.median(np.repeat(rank, drawn))
    figures = {}
    names = [*(f"recall@{k}" for k in at), "mrr"]
    for column, name in enumerate(names):
        figures |= _named(name, per_query[:, column].mean(), means[:, column], chance[column])
    return figures | _named("median_rank", np.median(rank), medians, (low + high) / 2)


def _named(name, value, resamples, chance):
    low, high = np.quantile(resamples, [0.025, 0.975]).tolist() if len(resamples) > 1 else (None, None)
    return {name: float(value), f"{name}_low": low, f"{name}_high": high, f"{name}_chance": float(chance)}


def _draw(num_patients, num_bootstraps, seed):
    """How often each patient comes in each resample: `(resamples, patients)`."""
    rng = np.random.default_rng(seed)
    weights = np.zeros((num_bootstraps, num_patients), np.int64)
    for row in weights:
        row[:] = np.bincount(rng.integers(0, num_patients, num_patients), minlength=num_patients)
    return weights
