"""What an embedding space looks like: whether pairs are close, points are spread, dimensions are used, texts collapsed.

Of unit-length image embeddings v and text embeddings t, per organ (its scans and captions) and for whole volumes:

    alignment       mean |v - t|^2 over pairs; 0 where every pair coincides, 2 where they have nothing to do with each
                    other (Wang and Isola, ICML 2020, with their exponent 2)
    uniformity      log mean exp(-2 |x - y|^2) over different points x, y; 0 where all are one point, about -4 + 8 / dim
                    where they fill the sphere (ibid., with their t = 2); of images, and of the different texts
    effective_rank  exp of the entropy of the singular values over their sum: how many directions are in use, between 1
                    and the dimension (Roy and Vetterli, EUSIPCO 2007); and the same of the centred points
    modality_gap    distance of the mean image embedding from the mean text embedding of the pairs (Liang et al.,
                    NeurIPS 2022)
    text_cosine     mean cosine of the texts of two scans whose texts DIFFER: near 1 they have collapsed to a point, and
                    nothing can be learned from them. The name is that of the training's own log
    text_cosine_distinct   the same with every different text once
    image_cosine    mean cosine of two scans

Alignment low and uniformity low (far below 0) together are what contrastive training is for; either alone is easy.

(1) Points are drawn with a seed where there are more than `max_points`, for what takes a look at every pair.
(2) Everything else is exact over all of them: mean cosines follow from the sums of the points.

POOLING: the same frozen tokens, pooled by the model's attention and by their mean, through the same layers behind. Both
are scored zero-shot, where the prompts lie with the embeddings, and by a linear probe (probes.py), whose attention was
not trained for the prompts' sake. What differs is only how the tokens are weighted.
"""

from __future__ import annotations

import numpy as np

from evaluation_fvlm.embedding_files import StoredEmbeddings
from evaluation_fvlm.errors import EvaluationError
from evaluation_fvlm.probes import finding_organs, mean_pooled, probe_frames
from evaluation_fvlm.protocols import Protocol, compare_frames
from evaluation_fvlm.tasks import Task
from evaluation_fvlm.zero_shot import score_task

MAX_POINTS = 4000
BLOCK = 1000  # rows of distances held at a time


def diagnose(
    stored: StoredEmbeddings,
    *,
    task: Task | None = None,
    max_points: int = MAX_POINTS,
    num_bootstraps: int = 1000,
    seed: int = 0,
    with_probe: bool = True,
) -> dict:
    """Diagnostics of a split's embeddings.

    Args:
        stored: From `load_embeddings`; with texts, else only images are described.
        task: Prompt set by whose findings the two poolings are compared; None: they are not.
        max_points: Draw so many points where all pairs of points are looked at.
        num_bootstraps: Resamples of patients for the intervals of the two poolings' differences.
        seed: Of the draws and the folds.
        with_probe: Compare the poolings by linear probes as well, which takes seconds per finding.

    Returns:
        JSON-ready: `global` (None without `volume_embeds`) and `per_organ`, each the figures above (None where there
        are too few points), `num_scans`, `num_pairs`, `num_texts`; `macro`: means over the organs; `pooling`: None, or
        `zero_shot` and `linear_probe`, see `compare_poolings`; `settings`.

    Raises:
        EvaluationError: If an embedding is not finite, or the task does not fit the embeddings.
    """
    embeddings, texts = stored.embeddings, stored.texts
    rng = np.random.default_rng(seed)
    whole = None
    if embeddings.volume_embeds is not None:
        report_index = None if texts is None else texts.report_index
        whole = {"volume_embeds": embeddings.volume_pooling} | describe(
            embeddings.volume_embeds,
            embeddings.volume_embeds.any(axis=1),
            None if texts is None else texts.report_embeds,
            report_index,
            max_points=max_points,
            rng=rng,
        )
    per_organ = {}
    for organ in embeddings.asked_organs or embeddings.organs:
        place = embeddings.organs.index(organ)
        per_organ[organ] = describe(
            embeddings.image_embeds[:, place],
            embeddings.is_present[:, place],
            None if texts is None else texts.caption_embeds,
            None if texts is None else texts.caption_index[:, place],
            max_points=max_points,
            rng=rng,
        )
    pooling = None
    if task is not None and embeddings.mean_pooled_embeds is not None:
        pooling = compare_poolings(stored, task, num_bootstraps=num_bootstraps, seed=seed, with_probe=with_probe)
    return {
        "global": whole,
        "per_organ": per_organ,
        "macro": _macro(per_organ),
        "pooling": pooling,
        "settings": {
            "uniformity": f"over all pairs of at most {max_points} points drawn with seed {seed}; texts once each",
            "num_cut_captions": None if texts is None else texts.num_cut_captions,
            "num_cut_reports": None if texts is None else texts.num_cut_reports,
        },
    }


def describe(
    image_embeds: np.ndarray,
    is_present: np.ndarray,
    text_embeds: np.ndarray | None,
    text_index: np.ndarray | None,
    *,
    max_points: int = MAX_POINTS,
    rng: np.random.Generator | None = None,
) -> dict:
    """The figures of one organ, or of whole volumes.

    Args:
        image_embeds: `(scans, dim)`, unit length where `is_present`.
        is_present: `(scans,)` bool.
        text_embeds: `(texts, dim)`, every text once; None: no texts.
        text_index: `(scans,)` into `text_embeds`, -1: none.
        max_points, rng: As in `diagnose`.

    Raises:
        EvaluationError: If an embedding is not finite.
    """
    rng = rng or np.random.default_rng(0)
    images = image_embeds[is_present].astype(np.float64)
    _check_finite(images, "image")
    figures: dict = {
        "num_scans": len(images),
        "num_pairs": 0,
        "num_texts": 0,
        "image_uniformity": uniformity(_drawn(images, max_points, rng)),
        "image_effective_rank": effective_rank(images),
        "image_effective_rank_centred": effective_rank(_centred(images)),
        "image_cosine": mean_cosine(images),
    }
    if text_embeds is None or text_index is None:
        return figures
    is_pair = is_present & (text_index >= 0)
    images, index = image_embeds[is_pair].astype(np.float64), text_index[is_pair]
    used, place = np.unique(index, return_inverse=True)
    distinct = text_embeds[used].astype(np.float64)
    _check_finite(distinct, "text")
    texts = distinct[place]  # (pairs, dim)
    return figures | {
        "num_pairs": len(images),
        "num_texts": len(distinct),
        "alignment": alignment(images, texts),
        "modality_gap": modality_gap(images, texts),
        "text_uniformity": uniformity(_drawn(distinct, max_points, rng)),
        "text_effective_rank": effective_rank(distinct),
        "text_effective_rank_centred": effective_rank(_centred(distinct)),
        "text_cosine": mean_cosine(texts, place),
        "text_cosine_distinct": mean_cosine(distinct),
    }


def alignment(images: np.ndarray, texts: np.ndarray) -> float | None:
    """Mean squared distance of the pairs `(pairs, dim)`; None without a pair."""
    return float(np.square(images - texts).sum(axis=1).mean()) if len(images) else None


def uniformity(points: np.ndarray) -> float | None:
    """log mean exp(-2 |x - y|^2) over different points `(points, dim)`; None for fewer than two."""
    count = len(points)
    if count < 2:
        return None
    squares = np.square(points).sum(axis=1)
    total = -float(count)  # every point's distance from itself, 0, is summed with the others
    for start in range(0, count, BLOCK):
        part = slice(start, start + BLOCK)
        distances = squares[part, None] + squares - 2 * points[part] @ points.T  # (block, points), squared
        total += np.exp(-2 * np.clip(distances, 0, None)).sum()
    return float(np.log(total / (count * (count - 1))))


def effective_rank(points: np.ndarray) -> float | None:
    """exp of the entropy of the singular values of `(points, dim)` over their sum; None where all are zero.

    The singular values come from the eigenvalues of the smaller of the two products of the matrix with itself: those
    below 1e-7 of the largest are rounding, and count as zero.
    """
    if not points.any():
        return None
    gram = points.T @ points if points.shape[0] >= points.shape[1] else points @ points.T
    values = np.sqrt(np.clip(np.linalg.eigvalsh(gram), 0, None))
    values = values[values > 1e-7 * values.max()]
    shares = values / values.sum()
    return float(np.exp(-(shares * np.log(shares)).sum()))


def modality_gap(images: np.ndarray, texts: np.ndarray) -> float | None:
    """Distance between the means of the pairs' images and texts `(pairs, dim)`; None without a pair."""
    return float(np.linalg.norm(images.mean(axis=0) - texts.mean(axis=0))) if len(images) else None


def mean_cosine(points: np.ndarray, kinds: np.ndarray | None = None) -> float | None:
    """Mean cosine of two different points of unit length, or of two of different kinds; None without such a pair.

    From sums: |sum of all|^2 holds every ordered pair, |sum of a kind|^2 those within it.

    Args:
        points: `(points, dim)`.
        kinds: `(points,)` int, 0 ... ; points of one kind are equal. None: every point is of its own.
    """
    kinds = np.arange(len(points)) if kinds is None else kinds
    counts = np.bincount(kinds).astype(np.float64) if len(points) else np.zeros(0)
    num_pairs = len(points) ** 2 - np.square(counts).sum()
    if num_pairs <= 0:
        return None
    sums = np.zeros((len(counts), points.shape[1]))
    np.add.at(sums, kinds, points)
    return float((np.square(points.sum(axis=0)).sum() - np.square(sums).sum()) / num_pairs)


def compare_poolings(
    stored: StoredEmbeddings, task: Task, *, num_bootstraps: int = 1000, seed: int = 0, with_probe: bool = True
) -> dict:
    """AUC of attention pooling and of mean pooling, on the same frozen tokens.

    Returns:
        `zero_shot` (None with `zero_shot_reason` where the task's prompts do not lie with the embeddings) and
        `linear_probe`: each `per_finding`: finding -> {organ, positives, negatives, attention, mean, difference} and
        `macro`: {attention, mean, difference}; AUCs, difference mean - attention as {value, low, high, p}.

    Raises:
        EvaluationError: If mean-pooled embeddings were not stored, or the task asks for an organ that was not embedded.
    """
    embeddings = stored.embeddings
    both = [embeddings, mean_pooled(embeddings)]
    finding_organs(task, embeddings)  # refuses organs that were not embedded
    protocol = Protocol(level="reconstruction", threshold=0.5, num_bootstraps=num_bootstraps, seed=seed)
    result: dict = {"zero_shot": None, "linear_probe": None}
    prompts = [prompt for item in task.items for prompt in (*item.positive, *item.negative)]
    missing = [prompt for prompt in prompts if prompt not in stored.prompt_embeds]
    logit_scale = stored.info.get("logit_scale")
    if missing or logit_scale is None:
        what = f"the embedding of {missing[0]!r}" if missing else "logit_scale"
        result["zero_shot_reason"] = f"{what} does not lie with the embeddings: save them by a run of task {task.name}"
    else:
        frames = [score_task(task, each, stored.prompt_embeds, logit_scale) for each in both]
        result["zero_shot"] = _compared(frames, protocol)
    if with_probe:
        frames = [probe_frames(each, task, kinds=("linear",), seed=seed).frames["linear"] for each in both]
        result["linear_probe"] = _compared(frames, protocol)
    return result


def _compared(frames: list, protocol: Protocol) -> dict:
    """The AUCs out of `compare_frames`, under the names of the poolings."""
    compared = compare_frames(*frames, protocol)

    def auc(entry: dict) -> dict:
        return {"attention": entry["a"], "mean": entry["b"], "difference": entry["difference"]}

    per_finding = {
        finding: {name: entry[name] for name in ("organ", "positives", "negatives")}
        | auc(entry["auc"])
        | ({"reason": entry["reason"]} if "reason" in entry else {})
        for finding, entry in compared["per_finding"].items()
    }
    return {"macro": auc(compared["macro"]["auc"]), "per_finding": per_finding}


def _macro(per_organ: dict[str, dict]) -> dict:
    """Mean of each figure over the organs that have it."""
    names = dict.fromkeys(name for figures in per_organ.values() for name in figures if not name.startswith("num_"))
    macro = {}
    for name in names:
        values = [value for figures in per_organ.values() if (value := figures.get(name)) is not None]
        macro[name] = float(np.mean(values)) if values else None
    return macro | {"num_organs": len(per_organ)}


def _centred(points: np.ndarray) -> np.ndarray:
    # What rounding leaves of equal points is no direction.
    centred = points - points.mean(axis=0) if len(points) else points
    return np.zeros_like(centred) if np.abs(centred).max(initial=0) < 1e-6 else centred


def _drawn(points: np.ndarray, max_points: int, rng: np.random.Generator) -> np.ndarray:
    """(1)"""
    if len(points) <= max_points:
        return points
    return points[np.sort(rng.choice(len(points), max_points, replace=False))]


def _check_finite(embeds: np.ndarray, what: str) -> None:
    if broken := int((~np.isfinite(embeds).all(axis=1)).sum()):
        raise EvaluationError(f"{broken} of {len(embeds)} {what} embeddings are not finite: embed the split again.")
