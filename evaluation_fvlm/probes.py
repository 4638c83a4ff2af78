"""How much of a finding the frozen embeddings hold: a linear probe and nearest neighbours, by folds of patients.

Zero-shot asks whether image and text agree; a probe asks what the image embedding alone holds, with labels to learn
from. For every finding, on the embedding of its organ:

(1) Patients are dealt to folds, balanced over the findings (folds.py): no patient is in training and test. Every scan
    is scored by a probe that saw the other folds alone.
(2) "linear": logistic regression on standardised embeddings, scikit-learn's. How strongly it is held back (C) is
    chosen for each fold on one of its training folds, by AUC, and then fitted on all of them: the test fold has no say.
(3) "knn": share of positives among the nearest scans by cosine, each weighing exp(cosine / 0.07) (Wu et al., CVPR 2018;
    Caron et al., ICCV 2021).
(4) The scores of all folds make one table like that of a zero-shot run, evaluated by the same protocol. Since probes of
    different folds need not be on one scale, the AUC within folds stands beside.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from evaluation_fvlm.embedding import SplitEmbeddings
from evaluation_fvlm.errors import EvaluationError
from evaluation_fvlm.folds import patient_folds, spread
from evaluation_fvlm.protocols import Protocol, evaluate_frame
from evaluation_fvlm.tasks import Task, check_task_organs
from evaluation_fvlm.zero_shot import SCORE_COLUMNS

KINDS = ("linear", "knn")
WHOLE = "whole volume"  # stands for the organ where `volume_embeds` are probed
STRENGTHS = (0.0001, 0.001, 0.01, 0.1, 1.0)
NUM_NEIGHBOURS = 20
NEIGHBOUR_TEMPERATURE = 0.07


@dataclass
class ProbeScores:
    """Scores of every scan by probes that did not see its patient.

    `frames`: kind -> table of `SCORE_COLUMNS`, NaN where there is no score. `strengths`: finding -> C of each fold,
    None where nothing could be fitted. `within_folds`: kind -> finding -> AUC of each fold, NaN where it has none.
    `reasons`: finding -> why it has no score at all.
    """

    frames: dict[str, pd.DataFrame]
    strengths: dict[str, list[float | None]]
    within_folds: dict[str, dict[str, list[float]]]
    reasons: dict[str, str]


def probe(
    embeddings: SplitEmbeddings,
    task: Task | None = None,
    *,
    kinds: Sequence[str] = KINDS,
    num_folds: int = 5,
    seed: int = 0,
    strengths: Sequence[float] = STRENGTHS,
    num_neighbours: int = NUM_NEIGHBOURS,
    protocol: Protocol | None = None,
) -> dict:
    """Probe a split's frozen embeddings, and evaluate the scores.

    Args:
        embeddings: Of a split with labels.
        task: Its findings, each on the embedding of its organ; None: every finding of the labels, on `volume_embeds`.
        kinds: "linear", "knn" or both.
        num_folds, seed: Of the patients.
        strengths: Values of C to choose from; one: it is taken.
        num_neighbours: Of "knn".
        protocol: Of the figures; default: every row, thresholds by cross-validation.

    Returns:
        JSON-ready: per kind the content of `evaluate_frame` and `auc_within_folds`: finding -> {mean, sd, values};
        `settings`; `reasons`: finding -> why it was not probed; `strengths`: finding -> C per fold.

    Raises:
        EvaluationError: If nothing can be probed, or the task does not fit the embeddings.
    """
    scores = probe_frames(
        embeddings,
        task,
        kinds=kinds,
        num_folds=num_folds,
        seed=seed,
        strengths=strengths,
        num_neighbours=num_neighbours,
    )
    protocol = protocol or Protocol(level="reconstruction", num_folds=num_folds, seed=seed)
    chosen = f"C = {strengths[0]:g}"
    if len(strengths) > 1:
        chosen = f"C of {list(strengths)} chosen on a training fold by AUC"
    in_words = {
        "linear": f"logistic regression on standardised embeddings, {chosen}",
        "knn": f"{num_neighbours} nearest by cosine, weighing exp(cosine / {NEIGHBOUR_TEMPERATURE})",
    }
    result: dict = {
        "settings": {
            "features": "embedding of the finding's organ" if task is not None else embeddings.volume_pooling,
            "folds": f"{num_folds} folds of patients, seed {seed}",
            **{kind: in_words[kind] for kind in kinds},
        },
        "reasons": scores.reasons,
        "strengths": scores.strengths if "linear" in kinds else None,
    }
    for kind, frame in scores.frames.items():
        result[kind] = evaluate_frame(frame, protocol)
        result[kind]["auc_within_folds"] = {
            finding: spread(values) for finding, values in scores.within_folds[kind].items()
        }
    return result


def finding_organs(task: Task | None, embeddings: SplitEmbeddings) -> dict[str, str]:
    """finding -> organ whose embedding is probed; `WHOLE` where there is no task.

    Raises:
        EvaluationError: If an organ was not embedded, there are no `volume_embeds`, or no labels.
    """
    labelled = {finding for labels in embeddings.labels for finding, value in labels.items() if value in (0, 1)}
    if not labelled:
        raise EvaluationError("the embeddings carry no labels, so nothing can be learned from them.")
    if task is None:
        if embeddings.volume_embeds is None:
            raise EvaluationError("whole volumes were not embedded: name a task, whose findings have organs.")
        return dict.fromkeys(sorted(labelled), WHOLE)
    check_task_organs(task, embeddings.organs)
    organs = {item.finding: item.organ for item in task.items}
    asked = embeddings.asked_organs or embeddings.organs
    if missing := sorted(set(organs.values()) - set(asked)):
        raise EvaluationError(
            f"task '{task.name}' asks for {missing}, which were not embedded; there are {asked}. Embed all organs."
        )
    if not labelled & organs.keys():
        raise EvaluationError(
            f"task '{task.name}': none of its findings is among the labels {sorted(labelled)[:5]}; choose another task."
        )
    return organs


def probe_frames(
    embeddings: SplitEmbeddings,
    task: Task | None = None,
    *,
    kinds: Sequence[str] = KINDS,
    num_folds: int = 5,
    seed: int = 0,
    strengths: Sequence[float] = STRENGTHS,
    num_neighbours: int = NUM_NEIGHBOURS,
) -> ProbeScores:
    """Scores of every scan; arguments and errors as of `probe`."""
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown or not kinds:
        raise EvaluationError(f"probes are {list(KINDS)}, not {list(unknown or kinds)}.")
    if not strengths or min(strengths) <= 0 or num_neighbours < 1:
        raise EvaluationError(
            f"strengths {list(strengths)} must be positive and at least one, neighbours {num_neighbours} at least 1."
        )
    organs = finding_organs(task, embeddings)
    labels = np.array([[of_scan.get(finding, -1) for finding in organs] for of_scan in embeddings.labels])
    patient_ids, patients = np.unique(embeddings.scans["patient_id"].to_numpy(str), return_inverse=True)
    has_finding = np.zeros((len(patient_ids), len(organs)), bool)
    np.logical_or.at(has_finding, patients, labels == 1)
    fold_of_scan = patient_folds(has_finding, num_folds, seed)[patients]  # (1)

    scores = ProbeScores({}, {}, {kind: {} for kind in kinds}, {})
    parts: dict[str, list[pd.DataFrame]] = {kind: [] for kind in kinds}
    for column, (finding, organ) in enumerate(organs.items()):
        features, is_present, is_complete = _features(embeddings, organ)
        known = np.where(np.isin(labels[:, column], (0, 1)), labels[:, column].astype(float), np.nan)
        task_name = "all labels" if task is None else task.name
        part = embeddings.scans.assign(
            task=task_name, finding=finding, organ=organ, score=np.nan, label=known, is_complete=is_complete
        )
        fitted, chosen, reason = _probe_finding(
            features, known, is_present, fold_of_scan, patients, kinds, num_folds, strengths, num_neighbours
        )
        if reason is not None:
            scores.reasons[finding] = reason
        scores.strengths[finding] = chosen
        for kind in kinds:
            parts[kind].append(part.assign(score=fitted[kind])[SCORE_COLUMNS])
            scores.within_folds[kind][finding] = [
                _auc(fitted[kind][rows], known[rows])
                for rows in (is_present & ~np.isnan(known) & (fold_of_scan == fold) for fold in range(num_folds))
            ]
    scores.frames = {kind: pd.concat(frames, ignore_index=True) for kind, frames in parts.items()}
    return scores


def _features(embeddings: SplitEmbeddings, organ: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Embeddings `(scans, dim)`, whether there is one, and whether the organ is complete."""
    if organ == WHOLE:
        features, is_present = embeddings.volume_embeds, embeddings.volume_embeds.any(axis=1)
        is_complete = is_present
    else:
        place = embeddings.organs.index(organ)
        features, is_present = embeddings.image_embeds[:, place], embeddings.is_present[:, place]
        is_complete = embeddings.is_complete[:, place]
    if broken := int((~np.isfinite(features[is_present]).all(axis=1)).sum()):
        raise EvaluationError(f"{organ}: {broken} embeddings are not finite: embed the split again.")
    return features, is_present, is_complete


def _probe_finding(
    features: np.ndarray,
    known: np.ndarray,
    is_present: np.ndarray,
    fold_of_scan: np.ndarray,
    patients: np.ndarray,
    kinds: Sequence[str],
    num_folds: int,
    strengths: Sequence[float],
    num_neighbours: int,
) -> tuple[dict[str, np.ndarray], list[float | None], str | None]:
    """Scores per kind, C per fold, and why there is none."""
    scores = {kind: np.full(len(known), np.nan) for kind in kinds}
    chosen: list[float | None] = [None] * num_folds
    usable = is_present & ~np.isnan(known)
    for value, word in ((1, "positive"), (0, "negative")):
        count = len(np.unique(patients[usable & (known == value)]))
        if count < 2:
            return scores, chosen, f"{count} {word} patient(s) with the organ: none is left to learn from"
    for fold in range(num_folds):
        train, test = usable & (fold_of_scan != fold), is_present & (fold_of_scan == fold)
        if not test.any() or len(np.unique(known[train])) < 2:
            continue
        if "linear" in kinds:
            inner = fold_of_scan == (fold + 1) % num_folds
            chosen[fold] = _choose_strength(features, known, train & ~inner, train & inner, strengths)  # (2)
            scores["linear"][test] = _fit(_linear(chosen[fold]), features[train], known[train], features[test])
        if "knn" in kinds:  # (3)
            neighbours = KNeighborsClassifier(
                min(num_neighbours, int(train.sum())),
                weights=lambda distances: np.exp((1 - distances) / NEIGHBOUR_TEMPERATURE),
                algorithm="brute",
                metric="cosine",
            )
            scores["knn"][test] = _fit(neighbours, features[train], known[train], features[test])
    return scores, chosen, None


def _choose_strength(
    features: np.ndarray, known: np.ndarray, train: np.ndarray, validation: np.ndarray, strengths: Sequence[float]
) -> float:
    """The C with the highest AUC on the validation fold, of equal ones the smallest; the middle one without an AUC."""
    in_order = sorted(strengths)
    has_both = all(len(np.unique(known[rows])) == 2 for rows in (train, validation))
    if len(in_order) == 1 or not has_both:
        return in_order[len(in_order) // 2]
    aucs = [
        _auc(_fit(_linear(strength), features[train], known[train], features[validation]), known[validation])
        for strength in in_order
    ]
    return in_order[int(np.argmax(aucs))]


def _linear(strength: float):
    return make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=2000))


def _fit(model, features: np.ndarray, labels: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Probability of the finding for the other scans."""
    with warnings.catch_warnings():
        # What is left after 2000 iterations is below what C is chosen by.
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(features.astype(np.float64), labels.astype(int))
    return model.predict_proba(others.astype(np.float64))[:, 1]


def _auc(scores: np.ndarray, labels: np.ndarray) -> float:
    is_scored = np.isfinite(scores)
    if len(np.unique(labels[is_scored])) < 2:
        return np.nan
    return float(roc_auc_score(labels[is_scored], scores[is_scored]))


def mean_pooled(embeddings: SplitEmbeddings) -> SplitEmbeddings:
    """The same split with the mean of every organ's tokens in the place of their attention.

    Raises:
        EvaluationError: If that was not embedded.
    """
    if embeddings.mean_pooled_embeds is None:
        raise EvaluationError("the embeddings hold no mean-pooled organs: embed the split with them.")
    return replace(embeddings, image_embeds=embeddings.mean_pooled_embeds)
