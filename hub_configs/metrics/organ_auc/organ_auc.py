"""Area under the ROC curve of many findings at once: what was counted, and 95 % intervals by patients.

    metric = evaluate.load("hub_configs/metrics/organ_auc")
    metric.compute(predictions=scores, references=labels, findings=names, organs=organs, patient_ids=ids)

(1) Per finding, cases without a score (NaN, None) or without a label (NaN, None, -1) are counted and left out.
(2) The AUC is scikit-learn's: the probability that a positive case scores above a negative one, ties counting half. A
    finding with one class alone has none, and says why. Means over organs and over all run over those that have one.
(3) Patients are drawn with replacement, all cases of one together; one draw serves every finding. The spread of the
    resamples that hold both classes is the standard error.
(4) The interval is Student's t on the logit scale, its degrees of freedom those of the class that fewer patients have,
    joined by Satterthwaite's rule for means, a patient of several findings being one. Where all positives score above
    all negatives no resample differs: then the lower end is where m pairs of different patients, m being in the rarer
    class, are all right by 2.5 %.

This file stands alone: it needs evaluate, datasets, numpy, scipy and scikit-learn, and nothing beside it.
"""

import datasets
import evaluate
import numpy as np
from scipy.special import expit, logit
from scipy.stats import t as student
from sklearn.metrics import roc_auc_score

NO_SCORE, NO_LABEL = "no score", "label unknown"
BLOCK = 4_000_000  # counts (resamples x cases) held at a time

_DESCRIPTION = "AUC of many findings, macro, per organ and per finding, with exclusions and patient-level intervals."
_CITATION = """@inproceedings{shui2025fvlm,
  title     = {Large-scale and Fine-grained Vision-language Pre-training for Enhanced {CT} Image Understanding},
  author    = {Shui, Zhongyi and others},
  booktitle = {International Conference on Learning Representations},
  year      = {2025}
}"""
_KWARGS_DESCRIPTION = """
Args:
    predictions: `(cases, findings)` scores, higher for present; NaN or None: not scored.
    references: `(cases, findings)` labels, 1 or 0; NaN, None or -1: unknown.
    findings: Name of every column; numbers unless given.
    organs: Organ of every column, for `per_organ`.
    patient_ids: Patient of every case; each case is one of its own unless given.
    num_bootstraps: Resamples of the patients; 0, or one patient alone: no intervals.
    seed: Of the resamples.

Returns:
    macro_auc, macro_auc_low, macro_auc_high (None where no finding has an AUC), num_findings (with an AUC),
    num_patients, per_finding: {auc, low, high, positives, negatives, excluded: {reason: cases}, reason if it has none},
    and with `organs` per_organ: {auc, low, high, num_findings}.
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class OrganAUC(evaluate.Metric):
    """AUC of many findings at once."""

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
        organs=None,
        patient_ids=None,
        num_bootstraps=1000,
        seed=0,
    ):
        scores, labels = np.array(predictions, float), np.array(references, float)
        findings, patient_ids = _checked(scores, labels, findings, organs, patient_ids)
        labels[labels == -1] = np.nan
        is_scored, is_known = ~np.isnan(scores), ~np.isnan(labels)
        is_counted = is_scored & is_known
        # Patients that nothing is counted of take no part in the draws.
        patients, num_patients = np.full(len(scores), -1), 0
        if is_counted.any():
            taken = is_counted.any(axis=1)
            names, patients[taken] = np.unique(patient_ids[taken], return_inverse=True)
            num_patients = len(names)
        if num_patients < 2:
            num_bootstraps = 0  # resamples of one patient are all alike
        weights = _draw(num_patients, num_bootstraps, seed)

        per_finding, resamples, rarer = {}, {}, {}
        for column, finding in enumerate(findings):
            rows = is_counted[:, column]
            excluded = {
                NO_SCORE: int((~is_scored[:, column]).sum()),
                NO_LABEL: int((is_scored & ~is_known)[:, column].sum()),
            }
            positives = int(labels[rows, column].sum())
            result = {
                "auc": None,
                "low": None,
                "high": None,
                "positives": positives,
                "negatives": int(rows.sum()) - positives,
                "excluded": {reason: count for reason, count in excluded.items() if count},
            }
            if positives in (0, rows.sum()):
                missing = "no case" if not rows.any() else "no positive case" if not positives else "no negative case"
                result["reason"] = f"{missing} among the {rows.sum()} scored and labelled"
            else:
                counted = (scores[rows, column], labels[rows, column], patients[rows])
                result["auc"] = float(roc_auc_score(counted[1], counted[0]))
                if num_bootstraps:
                    resamples[finding] = _resampled_auc(*counted, weights)
                    rarer[finding] = min((np.unique(counted[2][counted[1] == label]) for label in (1, 0)), key=len)
                    drawn = [resamples[finding]]
                    result["low"], result["high"] = _interval(result["auc"], drawn, [rarer[finding]])
            per_finding[finding] = result

        measured = [finding for finding in findings if per_finding[finding]["auc"] is not None]
        value, low, high = _mean(measured, per_finding, resamples, rarer)
        results = {
            "macro_auc": value,
            "macro_auc_low": low,
            "macro_auc_high": high,
            "num_findings": len(measured),
            "num_patients": num_patients,
            "per_finding": per_finding,
        }
        if organs is not None:
            results["per_organ"] = {}
            for organ in dict.fromkeys(organs):
                members = [f for f, its_organ in zip(findings, organs) if its_organ == organ and f in measured]
                value, low, high = _mean(members, per_finding, resamples, rarer)
                results["per_organ"][organ] = {"auc": value, "low": low, "high": high, "num_findings": len(members)}
        return results


def _checked(scores, labels, findings, organs, patient_ids):
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
    findings = [str(n) for n in range(scores.shape[1])] if findings is None else [str(name) for name in findings]
    for name, values, axis in (("findings", findings, 1), ("organs", organs, 1), ("patient_ids", patient_ids, 0)):
        if values is not None and len(values) != scores.shape[axis]:
            raise ValueError(f"{len(values)} {name} for {scores.shape[axis]} {'columns' if axis else 'cases'}.")
    if len(set(findings)) < len(findings):
        raise ValueError(f"findings holds a name twice: {findings}.")
    ids = np.arange(len(scores)).astype(str) if patient_ids is None else np.array([str(name) for name in patient_ids])
    return findings, ids


def _draw(num_patients, num_bootstraps, seed):
    """How often each patient comes in each resample: `(resamples, patients)`."""
    rng = np.random.default_rng(seed)
    weights = np.zeros((num_bootstraps, num_patients), np.uint16)
    for row in weights if num_patients else ():
        row[:] = np.bincount(rng.integers(0, num_patients, num_patients), minlength=num_patients)
    return weights


def _resampled_auc(scores, labels, patients, weights):
    """AUC of every resample, NaN where it lacks a class. Cases are sorted once; equal scores form a group."""
    order = np.argsort(scores, kind="stable")
    first = np.flatnonzero(np.append(True, np.diff(scores[order]) > 0))
    is_positive = labels[order] == 1
    step = max(1, BLOCK // len(scores))
    aucs = []
    for start in range(0, len(weights), step):
        drawn = weights[start : start + step, patients[order]].astype(float)
        positives = np.add.reduceat(drawn * is_positive, first, axis=1)  # (resamples, groups)
        negatives = np.add.reduceat(drawn * ~is_positive, first, axis=1)
        below = np.cumsum(negatives, axis=1) - negatives / 2
        with np.errstate(divide="ignore", invalid="ignore"):
            aucs.append((positives * below).sum(axis=1) / (positives.sum(axis=1) * negatives.sum(axis=1)))
    return np.concatenate(aucs)


def _interval(value, resamples, rarer):
    """The 95 % interval of an AUC or a mean of several: `value`, resamples and patients of the rarer class of each.

    None twice where a class of each comes from one patient alone, or fewer than half of the resamples have a value.
    """
    is_known = np.isfinite(resamples)
    count = is_known.sum(axis=0)
    means = np.where(is_known, resamples, 0).sum(axis=0)[count > 0] / count[count > 0]
    sizes = np.array([len(patients) for patients in rarer])
    if max(sizes) < 2 or len(means) < 2 or 2 * len(means) < len(count):
        return None, None
    if value in (0, 1):
        reach = float(np.mean(0.025 ** (1 / sizes)))
        return (reach, 1.0) if value == 1 else (0.0, 1 - reach)
    finite = [drawn[np.isfinite(drawn)] for drawn in resamples]
    variances = np.array([drawn.var(ddof=1) if len(drawn) > 1 else 0.0 for drawn in finite])
    _, place = np.unique(np.concatenate(rarer), return_inverse=True)
    by_patient = np.bincount(place, np.repeat(variances / np.sqrt(sizes * np.maximum(sizes - 1, 1)), sizes))
    freedom = variances.sum() ** 2 / (by_patient**2).sum() if variances.any() else np.inf
    reach = student.ppf(0.975, freedom) * means.std(ddof=1) / (value * (1 - value))
    return float(expit(logit(value) - reach)), float(expit(logit(value) + reach))


def _mean(findings, per_finding, resamples, rarer):
    """Mean AUC over findings and its interval; within a resample over those that have a value there."""
    if not findings:
        return None, None, None
    value = float(np.mean([per_finding[finding]["auc"] for finding in findings]))
    drawn = [finding for finding in findings if finding in resamples]
    if not drawn:
        return value, None, None
    return value, *_interval(value, [resamples[f] for f in drawn], [rarer[f] for f in drawn])
