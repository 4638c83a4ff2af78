"""F1 of many findings at once, from scores, at a threshold whose rule is stated in the results.

    metric = evaluate.load("hub_configs/metrics/finding_f1")
    metric.compute(predictions=scores, references=labels, findings=names, patient_ids=ids, threshold="cross_validation")

"Present" is a score strictly above the threshold. Two figures go by the name of F1, and differ widely where findings
are rare; both are given:

    f1           of the finding: 2 tp / (2 tp + fp + fn)
    weighted_f1  the mean of that and of the F1 of its absence, weighted by their size, as published CT papers report it

The threshold of a finding is, by `threshold`:

    a number             the same for all
    "cross_validation"   per fold of patients the one with the highest recall + specificity - 1 on the other folds: no
                         patient is judged by a threshold that has seen his labels
    "test_labels"        as published: of 100 thresholds evenly spaced over [0, 1] the one nearest to the corner (0, 1)
                         of the ROC plane on the very labels that it is judged by. Both figures come out too high

Cases without a score (NaN, None) or label (NaN, None, -1) are counted and left out. Intervals are those of patients
drawn with replacement (2.5th to 97.5th percentile), thresholds held as chosen.

This file stands alone: it needs evaluate, datasets and numpy, and nothing beside it.
"""

import datasets
import evaluate
import numpy as np

NO_SCORE, NO_LABEL = "no score", "label unknown"
RULES = {
    "cross_validation": "chosen by cross-validation: for every fold of patients, on the other folds",
    "test_labels": "chosen on the test labels (as published): decision metrics look better than on new patients",
}
FIGURES = ("f1", "weighted_f1")

_DESCRIPTION = "F1 of many findings, of the finding and weighted over both classes, at a stated threshold rule."
_CITATION = ""
_KWARGS_DESCRIPTION = """
Args:
    predictions: `(cases, findings)` scores, higher for present; NaN or None: not scored.
    references: `(cases, findings)` labels, 1 or 0; NaN, None or -1: unknown.
    findings: Name of every column; numbers unless given.
    patient_ids: Patient of every case; each case is one of its own unless given.
    threshold: A number, "cross_validation" or "test_labels".
    num_folds: Of the cross-validation.
    num_bootstraps: Resamples of the patients; 0, or one patient alone: no intervals.
    seed: Of resamples and folds.

Returns:
    threshold_rule in words; macro_f1 and macro_weighted_f1, each with _low and _high; num_findings (with a figure);
    per_finding: {f1, f1_low, f1_high, likewise weighted_f1, threshold (mean over folds), positives, negatives,
    excluded: {reason: cases}, reason if it has none}.
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class FindingF1(evaluate.Metric):
    """F1 of many findings at once, at a stated threshold rule."""

    def _info(self):
        row = datasets.Sequence(datasets.Value("float64"))
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
        findings=None,
        patient_ids=None,
        threshold="cross_validation",
        num_folds=5,
        num_bootstraps=1000,
        seed=0,
    ):
        scores, labels = np.array(predictions, float), np.array(references, float)
        findings, patient_ids = _checked(scores, labels, findings, patient_ids, threshold)
        labels[labels == -1] = np.nan
        is_scored, is_known = ~np.isnan(scores), ~np.isnan(labels)
        is_counted = is_scored & is_known
        taken = is_counted.any(axis=1)
        names, place = np.unique(patient_ids[taken], return_inverse=True)
        patients, num_patients = np.full(len(scores), -1), len(names)
        patients[taken] = place
        is_positive = is_counted & (labels == 1)
        is_measured = is_positive.any(axis=0) & (is_counted & (labels == 0)).any(axis=0)
        folds = None
        if threshold == "cross_validation" and is_measured.any():
            has = np.zeros((num_patients, int(is_measured.sum())), bool)
            np.logical_or.at(has, patients[taken], is_positive[taken][:, is_measured])
            folds = _folds(has, num_folds, seed)
        if num_patients < 2:
            num_bootstraps = 0  # resamples of one patient are all alike
        weights = _draw(num_patients, num_bootstraps, seed)

        per_finding, resamples = {}, {}
        for column, finding in enumerate(findings):
            rows = is_counted[:, column]
            score, label, patient = scores[rows, column], labels[rows, column] == 1, patients[rows]
            excluded = {
                NO_SCORE: int((~is_scored[:, column]).sum()),
                NO_LABEL: int((is_scored & ~is_known)[:, column].sum()),
            }
            result = {
                **{f"{name}{end}": None for name in FIGURES for end in ("", "_low", "_high")},
                "threshold": None,
                "positives": int(label.sum()),
                "negatives": int((~label).sum()),
                "excluded": {reason: count for reason, count in excluded.items() if count},
            }
            per_finding[finding] = result
            if not is_measured[column]:
                missing = "no case" if not rows.any() else "no positive case" if not label.any() else "no negative case"
                result["reason"] = f"{missing} among the {rows.sum()} scored and labelled"
                continue
            chosen = _thresholds(score, label, threshold, None if folds is None else folds[patient], num_folds)
            if chosen is None:
                result["reason"] = "one class only outside a fold, so no threshold for it; too few patients have both"
                continue
            of_case, result["threshold"] = chosen
            counts = _counts(score > of_case, label, patient, num_patients)
            values = _f1(counts.sum(axis=0))
            drawn = _f1(weights.astype(float) @ counts) if num_bootstraps else {}
            for name in FIGURES:
                result[name] = float(values[name])
                if num_bootstraps:
                    result[f"{name}_low"], result[f"{name}_high"] = _interval(drawn[name])
            resamples[finding] = drawn

        measured = [finding for finding in findings if per_finding[finding]["f1"] is not None]
        results = {"threshold_rule": RULES.get(threshold, f"fixed at {threshold}"), "num_findings": len(measured)}
        for name in FIGURES:
            values = [per_finding[finding][name] for finding in measured]
            results[f"macro_{name}"] = float(np.mean(values)) if values else None
            ends = _mean_interval([resamples[f][name] for f in measured]) if num_bootstraps else (None, None)
            results[f"macro_{name}_low"], results[f"macro_{name}_high"] = ends
        return results | {"num_patients": num_patients, "per_finding": per_finding}


def _checked(scores, labels, findings, patient_ids, threshold):
    """Names of the columns and patients of the rows, once everything fits together."""
    if scores.ndim != 2 or scores.shape != labels.shape:
        raise ValueError(
            f"predictions {scores.shape} and references {labels.shape} must both be (cases, findings); for one finding "
            "give lists of one number."
        )
    if np.isinf(scores).any():
        raise ValueError(
            f"{np.isinf(scores).sum()} scores are infinite; a score is a number, or NaN where there is none."
        )
    wrong = ~np.isnan(labels) & ~np.isin(labels, (-1, 0, 1))
    if wrong.any():
        raise ValueError(f"a label is 1, 0, or NaN, None or -1 where unknown; got {labels[wrong][0]:g}.")
    if isinstance(threshold, str) and threshold not in RULES:
        raise ValueError(f"threshold {threshold!r} is neither a number nor one of {list(RULES)}.")
    if not isinstance(threshold, str) and not np.isfinite(threshold):
        raise ValueError(f"threshold {threshold} is no finite number.")
    if threshold == "test_labels" and ((scores < 0) | (scores > 1)).any():
        raise ValueError("threshold 'test_labels' tries thresholds within [0, 1]: give probabilities.")
    findings = [str(n) for n in range(scores.shape[1])] if findings is None else [str(name) for name in findings]
    for name, values, axis in (("findings", findings, 1), ("patient_ids", patient_ids, 0)):
        if values is not None and len(values) != scores.shape[axis]:
            raise ValueError(f"{len(values)} {name} for {scores.shape[axis]} {'columns' if axis else 'cases'}.")
    if len(set(findings)) < len(findings):
        raise ValueError(f"findings holds a name twice: {findings}.")
    ids = np.arange(len(scores)).astype(str) if patient_ids is None else np.array([str(name) for name in patient_ids])
    return findings, ids


def _thresholds(scores, labels, rule, folds, num_folds):
    """Threshold of every case, and the one to report; None where a fold leaves nothing to choose by."""
    if rule == "test_labels":
        best = _published_threshold(scores, labels)
        return np.full(len(scores), best), best
    if rule != "cross_validation":
        return np.full(len(scores), float(rule)), float(rule)
    by_fold = np.full(num_folds, np.nan)
    for fold in range(num_folds):
        others = folds != fold
        if 0 < labels[others].sum() < others.sum():
            by_fold[fold] = _youden_threshold(scores[others], labels[others])
        elif not others.all():
            return None
    return by_fold[folds], float(np.nanmean(by_fold))


def _youden_threshold(scores, labels):
    """The threshold with the highest recall + specificity - 1, the highest of equals; between two scores the middle."""
    distinct, place = np.unique(scores, return_inverse=True)
    hits = np.cumsum(np.bincount(place, labels, len(distinct))[::-1])[::-1]
    alarms = np.cumsum(np.bincount(place, ~labels, len(distinct))[::-1])[::-1]
    quality = hits / labels.sum() - alarms / (~labels).sum()
    best = np.flatnonzero(quality >= quality.max() - 1e-12)[-1]
    if best == 0:  # below all scores
        return float(np.nextafter(distinct[0], -np.inf))
    middle = (distinct[best - 1] + distinct[best]) / 2
    return float(middle if middle < distinct[best] else distinct[best - 1])


def _published_threshold(scores, labels):
    """Of 100 in [0, 1] the one nearest to the perfect corner of the ROC plane, the last of equals."""
    thresholds = np.linspace(0, 1, 100)
    is_called = scores[:, None] > thresholds
    distance = np.sqrt((1 - is_called[labels].mean(axis=0)) ** 2 + is_called[~labels].mean(axis=0) ** 2)
    return float(thresholds[np.flatnonzero(distance == distance.min())[-1]])


def _folds(has, num_folds, seed):
    """Fold of every patient, the positives of the rarest finding dealt first (after Sechidis et al., ECML 2011).

    Args:
        has: `(patients, findings)`, whether the patient has the finding in any case.
    """
    num_patients, num_findings = has.shape
    if not 2 <= num_folds <= num_patients:
        raise ValueError(f"{num_folds} folds of {num_patients} patients: at least 2, and a patient for each.")
    fold, sizes, positives = (
        np.full(num_patients, -1),
        np.zeros(num_folds, int),
        np.zeros((num_folds, num_findings), int),
    )
    order = np.random.default_rng(seed).permutation(num_patients)
    for finding in [*np.argsort(has.sum(axis=0), kind="stable"), None]:
        for patient in order:
            if fold[patient] >= 0 or (finding is not None and not has[patient, finding]):
                continue
            dealt = np.zeros(num_folds, int) if finding is None else positives[:, finding]
            chosen = np.lexsort((sizes, dealt))[0]
            fold[patient] = chosen
            sizes[chosen] += 1
            positives[chosen] += has[patient]
    return fold


def _counts(is_called, labels, patients, num_patients):
    """True positives, false positives, false negatives and true negatives of every patient: `(patients, 4)`."""
    cell = np.where(labels, np.where(is_called, 0, 2), np.where(is_called, 1, 3))
    return np.bincount(cell + 4 * patients, minlength=4 * num_patients).reshape(num_patients, 4).astype(float)


def _f1(counts):
    """Both figures from counts `(..., 4)`; NaN where a class is missing."""
    tp, fp, fn, tn = np.moveaxis(counts, -1, 0)
    positives, negatives = tp + fn, fp + tn
    with np.errstate(divide="ignore", invalid="ignore"):
        f1, of_absence = 2 * tp / (2 * tp + fp + fn), 2 * tn / (2 * tn + fp + fn)
        weighted = (positives * f1 + negatives * of_absence) / (positives + negatives)
    has_both = (positives > 0) & (negatives > 0)
    return {"f1": np.where(has_both, f1, np.nan), "weighted_f1": np.where(has_both, weighted, np.nan)}


def _draw(num_patients, num_bootstraps, seed):
    """How often each patient comes in each resample: `(resamples, patients)`."""
    rng = np.random.default_rng(seed)
    weights = np.zeros((num_bootstraps, num_patients), np.uint16)
    for row in weights if num_patients else ():
        row[:] = np.bincount(rng.integers(0, num_patients, num_patients), minlength=num_patients)
    return weights


def _interval(resamples):
    """The 95 % interval; None twice where fewer than half of the resamples have a value."""
    known = resamples[np.isfinite(resamples)]
    if len(known) < 2 or 2 * len(known) < len(resamples):
        return None, None
    low, high = np.quantile(known, [0.025, 0.975])
    return float(low), float(high)


def _mean_interval(resamples):
    """Interval of the mean over findings; within a resample over those that have a value there."""
    if not resamples:
        return None, None
    known = np.isfinite(resamples)
    count = known.sum(axis=0)
    return _interval(np.where(count > 0, np.where(known, resamples, 0).sum(axis=0) / np.maximum(count, 1), np.nan))
