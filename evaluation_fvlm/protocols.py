"""A table of scores and labels, evaluated by a stated protocol: figures with intervals, and what was left out and why.

The table has the columns of `zero_shot.SCORE_COLUMNS`, a row per task, reconstruction and finding, and may have one
more, `report`: any value that is equal for equal reports (NaN: none), wanted where `duplicates` is not "keep".

(1) Cases are chosen: one reconstruction of each scan or all, the scans of equal reports once or all.
(2) Per finding, cases without a score or without a label are counted, not scored.
(3) A threshold is chosen per finding (thresholds.py says by what and on what).
(4) Figures are computed (binary_metrics.py, calibration.py); averages over organs and over all findings are means over
    the findings that have a figure; "micro" pools all pairs of case and finding.
(5) Patients are resampled for the 95 % intervals (bootstrap.py). Thresholds stay as chosen, so an interval of a
    decision metric leaves out that other patients would have led to another threshold.

`evaluate_frame` returns plain numbers, lists and None, ready for JSON. A FIGURE is {"value", "low", "high"}; each may
be None. METRIC is one of `binary_metrics.METRICS`: auc, average_precision, accuracy, balanced_accuracy, f1,
weighted_f1, precision, recall, specificity, youden.

    task
    macro_METRIC        number; likewise macro_brier, macro_ece, macro_ece_equal_mass
    micro_METRIC        number
    macro               METRIC, brier, ece, ece_equal_mass -> FIGURE and num_findings
    micro               METRIC -> FIGURE; calibration, curves as for a finding; positives, negatives
    per_finding         finding ->
        organ, positives, negatives, num_patients, positive_patients
        METRIC          FIGURE
        threshold       value (mean over folds), by_fold (None but for cross-validation)
        calibration     brier FIGURE, ece FIGURE and ece_equal_mass FIGURE (without interval), bins: list of
                        {low, high, count, mean_score, share_positive}
        curves          roc: [[false positive rate, true positive rate], ...], pr: [[recall, precision], ...]; at most
                        101 points each
        folds           METRIC -> {mean, sd, values}; only with cross-validation, else None
        excluded        reason -> count of cases; excluded_cases: reason -> the first names
        num_absent_as_zero
        reason          only where there is no figure: why; threshold_reason likewise where there is no threshold
    per_organ           organ -> METRIC FIGURE, num_findings
    folds               num_folds, num_patients (of each), macro: METRIC -> {mean, sd, values}; or None
    num_findings, num_findings_asked, num_patients, num_scans, num_reconstructions, num_incomplete_organs
    excluded            reason -> count of pairs of case and finding
    dropped_cases       reason -> {count, cases}: whole cases, all named
    warnings            list of sentences: what keeps a figure from being what it seems
    protocol            settings, and each in words

`compare_frames` returns `protocol`, counts, `excluded`, `dropped_cases`, `warnings`, and differences b - a:

    macro_METRIC_difference   number
    macro               METRIC -> {a, b, difference: FIGURE and p}: means over findings; p by bootstrap
    per_finding         finding -> organ, positives, negatives, METRIC -> {a, b, difference: FIGURE and p},
                        delong: {auc_a, auc_b, difference, standard_error, low, high, z, p, p_holm} or None
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace

import numpy as np
import pandas as pd
from sklearn.metrics import precision_recall_curve, roc_curve

from evaluation_fvlm.binary_metrics import (
    DECISION_METRICS,
    METRICS,
    RANKING_METRICS,
    Ranking,
    decision_counts,
    decision_metrics,
    ranking_metrics,
)
from evaluation_fvlm.bootstrap import LEVEL, auc_figure, draw_patients, figure, mean_over, two_sided_p
from evaluation_fvlm.calibration import NUM_BINS, calibration
from evaluation_fvlm.delong import delong_test, holm
from evaluation_fvlm.equal_reports import DUPLICATES, REASONS, repeats_a_report
from evaluation_fvlm.errors import EvaluationError
from evaluation_fvlm.folds import patient_folds, spread
from evaluation_fvlm.metrics import LABEL_UNKNOWN, RECONSTRUCTION
from evaluation_fvlm.thresholds import CRITERIA, SOURCES, choose_threshold
from modeling_fvlm.processed_split import natural_key

COLUMNS = ["task", *RECONSTRUCTION, "finding", "organ", "score", "label", "is_complete"]
CASE = RECONSTRUCTION
NO_SCORE = "no score: organ absent, or not scored"
OTHER_RECONSTRUCTION = "another reconstruction of the scan"
CALIBRATIONS = ("brier", "ece", "ece_equal_mass")
LEVELS = {"scan": "first reconstruction of every scan", "reconstruction": "every reconstruction"}
ABSENT = {
    "excluded": "not scored, counted",
    "zero": "counted as 0 (as published): a sure no",
}
INTERVALS = "of AUCs by Student's t on the logit scale, of other figures between percentiles"
INTERVALS_OF_DIFFERENCES = "of all differences between percentiles, but for DeLong's own"
PARTIAL = "ONLY A PART WAS MEASURED"  # begins the warnings that a command says again on stderr when it ends
CURVE_POINTS = 101
NAMED_CASES = 20  # per finding and reason; scores.csv has them all
FEW_PATIENTS = 10


@dataclass(frozen=True)
class Protocol:
    """How a table is evaluated. Every setting stands in the results.

    Args:
        level: "scan": the first reconstruction of every scan; "reconstruction": all, as the published CT-RATE figures
            count, though they repeat a patient.
        threshold: "cross_validation", "development", "test_labels" or a number, see thresholds.py.
        criterion: What a chosen threshold serves, see thresholds.py; None: published for test_labels, else youden.
        absent: "excluded": a case without a score is counted and left out; "zero": it scores 0, as published.
        duplicates: Which scans with equal reports count: "keep" all, or the first "within_patients" or "everywhere",
            see equal_reports.py.
        num_bootstraps: Resamples of the patients; 0: no intervals.
        num_folds: Of the cross-validation.
        num_bins: Of the calibration.
        seed: Of resamples and folds.
    """

    level: str = "scan"
    threshold: str | float = "cross_validation"
    criterion: str | None = None
    absent: str = "excluded"
    duplicates: str = "keep"
    num_bootstraps: int = 1000
    num_folds: int = 5
    num_bins: int = NUM_BINS
    seed: int = 0

    def __post_init__(self) -> None:
        if self.criterion is None:
            object.__setattr__(self, "criterion", "published" if self.threshold == "test_labels" else "youden")
        for name, known in (
            ("level", LEVELS),
            ("criterion", CRITERIA),
            ("absent", ABSENT),
            ("duplicates", DUPLICATES),
        ):
            if getattr(self, name) not in known:
                raise EvaluationError(f"{name} {getattr(self, name)!r} is not one of {list(known)}.")
        if isinstance(self.threshold, str):
            if self.threshold not in SOURCES:
                raise EvaluationError(f"threshold {self.threshold!r} is neither a number nor one of {list(SOURCES)}.")
        elif not np.isfinite(self.threshold):
            raise EvaluationError(f"threshold {self.threshold} is no finite number.")
        for name, least in (("num_bootstraps", 0), ("num_folds", 2), ("num_bins", 2), ("seed", 0)):
            if getattr(self, name) < least:
                raise EvaluationError(f"{name} {getattr(self, name)} must be at least {least}.")

    @classmethod
    def published(cls, **changes) -> Protocol:
        """The protocol of the published CT-RATE figures, its faults included (published_metrics.py)."""
        return replace(cls(level="reconstruction", threshold="test_labels", absent="zero"), **changes)

    def described(self, intervals: str = INTERVALS) -> dict:
        """The settings, and what they mean in words."""
        is_fixed = not isinstance(self.threshold, str)
        words = {
            "level": LEVELS[self.level],
            "threshold": f"fixed at {self.threshold}" if is_fixed else SOURCES[self.threshold],
            "called_present": "score strictly above the threshold",
            "absent_organs": ABSENT[self.absent],
            "duplicates": DUPLICATES[self.duplicates],
            "intervals": f"{LEVEL:.0%} over {self.num_bootstraps} resamples of patients, thresholds held as chosen: "
            f"{intervals}"
            if self.num_bootstraps
            else "none",
            "f1": "of the finding itself; weighted_f1 averages over presence and absence by their size",
            "macro": "mean over findings that have a figure",
        }
        return asdict(self) | {"criterion": None if is_fixed else self.criterion, "in_words": words}


def partial_warnings(results: Iterable[Mapping]) -> list[str]:
    """The warnings of evaluated tables that say that a part of the task was not measured, each once."""
    warnings = (warning for result in results for warning in result["warnings"])
    return list(dict.fromkeys(warning for warning in warnings if warning.startswith(PARTIAL)))


@dataclass
class FindingCases:
    """The counted cases of one finding, and what became of the others."""

    finding: str
    organ: str
    scores: np.ndarray  # (cases,)
    labels: np.ndarray  # (cases,), 1 or 0
    patients: np.ndarray  # (cases,), index into the evaluation's patients
    excluded: dict[str, list[str]]  # reason -> names
    num_absent_as_zero: int = 0
    reason: str | None = None  # why nothing can be measured
    thresholds: np.ndarray | None = None  # (cases,)
    threshold: dict = field(default_factory=lambda: {"value": None, "by_fold": None})
    threshold_reason: str | None = None

    @property
    def is_called(self) -> np.ndarray:
        return self.scores > self.thresholds

    @property
    def num_positives(self) -> int:
        return int(self.labels.sum())

    @property
    def rarer_patients(self) -> np.ndarray:
        """The patients of the class that fewer have, each once."""
        return rarer_patients(self.patients, self.labels)


def rarer_patients(patients: np.ndarray, labels: np.ndarray) -> np.ndarray:
    return min((np.unique(patients[labels == label]) for label in (1, 0)), key=len)


@dataclass
class Evaluation:
    """A table on its way through the steps of this module."""

    protocol: Protocol
    task: str
    frame: pd.DataFrame  # the chosen cases
    dropped: dict[str, list[str]]
    findings: list[FindingCases]
    patient_ids: np.ndarray
    folds: np.ndarray | None = None  # (patients,)

    @property
    def measured(self) -> list[FindingCases]:
        return [cases for cases in self.findings if cases.reason is None]


def evaluate_frame(frame: pd.DataFrame, protocol: Protocol, development: pd.DataFrame | None = None) -> dict:
    """Evaluate the rows of one task; the module's docstring lists what comes back.

    Args:
        frame: Rows of one task, see the module's docstring.
        development: The same of other patients; with `Protocol(threshold="development")` alone.

    Raises:
        EvaluationError: If the table breaks a rule (columns, repeated rows, scores that are no probabilities, labels
            that are neither 0 nor 1), or does not fit the protocol.
    """
    evaluation = _prepare(frame, protocol)
    _set_thresholds(evaluation, development)
    values, resamples = _figures(evaluation, _draw(evaluation))
    per_finding = {
        cases.finding: _finding_result(evaluation, cases, values.get(cases.finding), resamples.get(cases.finding))
        for cases in evaluation.findings
    }
    names = [cases.finding for cases in evaluation.measured]
    rarer = {cases.finding: cases.rarer_patients for cases in evaluation.measured}
    macro = {
        name: _mean_figure(name, names, values, resamples, rarer) | {"num_findings": _number_known(name, names, values)}
        for name in (*METRICS, *CALIBRATIONS)
    }
    per_organ = {}
    for organ in dict.fromkeys(cases.organ for cases in evaluation.findings):
        members = [cases.finding for cases in evaluation.measured if cases.organ == organ]
        per_organ[organ] = {name: _mean_figure(name, members, values, resamples, rarer) for name in METRICS}
        per_organ[organ]["num_findings"] = len(members)
    micro = _micro(evaluation)
    return {
        "task": evaluation.task,
        **{f"macro_{name}": entry["value"] for name, entry in macro.items()},
        **{f"micro_{name}": micro[name]["value"] for name in METRICS},
        "macro": macro,
        "micro": micro,
        "per_finding": per_finding,
        "per_organ": per_organ,
        "folds": _fold_results(evaluation),
        **_counts(evaluation),
        **_exclusions(evaluation),
        "warnings": _warnings(evaluation),
        "protocol": protocol.described(),
    }


def compare_frames(
    frame_a: pd.DataFrame, frame_b: pd.DataFrame, protocol: Protocol, development: Sequence[pd.DataFrame | None] = ()
) -> dict:
    """Compare two runs on the cases that both scored; the module's docstring lists what comes back.

    Args:
        frame_a, frame_b: Rows of one task each, as for `evaluate_frame`; tasks may differ in name.
        protocol: For both.
        development: Of a and of b, for thresholds from a development split.

    Raises:
        EvaluationError: As `evaluate_frame`; if the runs share no case, or a case has different labels in them.
    """
    frames, unpaired = _paired(frame_a, frame_b, protocol)
    runs = [_prepare(frame, protocol) for frame in frames]
    for run, other in zip(runs, development or (None, None)):
        _set_thresholds(run, other)
    weights = _draw(runs[0])  # the same patients, in the same order, in both
    figures = [_figures(run, weights) for run in runs]
    names = [cases.finding for cases in runs[0].measured]

    per_finding = {}
    for cases_a, cases_b in zip(*(run.findings for run in runs)):
        finding = cases_a.finding
        result = {"organ": cases_a.organ, "positives": cases_a.num_positives}
        result["negatives"] = len(cases_a.labels) - cases_a.num_positives
        result["excluded"] = {reason: len(cases) for reason, cases in cases_a.excluded.items()}
        result |= {
            name: _difference(*((v.get(finding, {}).get(name), r.get(finding, {}).get(name)) for v, r in figures))
            for name in METRICS
        }
        result["delong"] = None
        if cases_a.reason is not None:
            result["reason"] = cases_a.reason
        else:
            test = delong_test(cases_a.scores, cases_b.scores, cases_a.labels, cases_a.patients)
            result["delong"] = test and test.to_dict()
        per_finding[finding] = result
    tested = [result["delong"] for result in per_finding.values() if result["delong"] is not None]
    for test, p in zip(tested, holm([test["p"] for test in tested])):
        test["p_holm"] = p

    macro = {
        name: _difference(*((_mean_value(name, names, v), _mean_resamples(name, names, r)) for v, r in figures))
        for name in METRICS
    }
    exclusions = _exclusions(runs[0])
    for reason, count in unpaired.items():
        exclusions["excluded"][reason] = exclusions["excluded"].get(reason, 0) + count
    return {
        **{f"macro_{name}_difference": entry["difference"]["value"] for name, entry in macro.items()},
        "macro": macro,
        "per_finding": per_finding,
        **_counts(runs[0]),
        **exclusions,
        "warnings": list(dict.fromkeys(warning for run in runs for warning in _warnings(run, of_differences=True))),
        "protocol": protocol.described(INTERVALS_OF_DIFFERENCES)
        | {"difference": "b - a", "delong": "per finding, scans of a patient together; p_holm over findings"},
    }


# (1) and (2): which cases count


def _check(frame: pd.DataFrame) -> None:
    missing = [column for column in COLUMNS if column not in frame.columns]
    if missing:
        raise EvaluationError(f"the table of scores lacks the columns {missing}; it has {list(frame.columns)}.")
    if frame["task"].nunique() != 1:
        raise EvaluationError(
            f"the table holds the tasks {sorted(frame['task'].unique())}; evaluate the rows of one at a time."
        )
    repeated = frame.duplicated([*CASE, "finding"])
    if repeated.any():
        row = frame[repeated].iloc[0]
        raise EvaluationError(
            f"{row['recon_id']}, {row['finding']!r}: {repeated.sum()} rows come again; keep one per case and finding."
        )
    scores, labels = frame["score"].to_numpy(float), frame["label"].to_numpy(float)
    for name, wrong, rule in (
        ("score", ~np.isnan(scores) & ~((scores >= 0) & (scores <= 1)), "a score is a probability, or NaN"),
        ("label", ~np.isnan(labels) & (labels != 0) & (labels != 1), "a label is 1, 0 or NaN"),
    ):
        if wrong.any():
            row = frame[wrong].iloc[0]
            raise EvaluationError(
                f"{row['recon_id']}, {row['finding']!r}: {name} {row[name]}, and {wrong.sum() - 1} more; {rule}."
            )


def _choose_cases(frame: pd.DataFrame, protocol: Protocol) -> tuple[pd.DataFrame, dict[str, list[str]]]:
    """The rows of the cases that the protocol counts, and the names of the others by reason."""
    columns = [*CASE, *(["report"] if protocol.duplicates != "keep" else [])]
    if "report" in columns and "report" not in frame.columns:
        raise EvaluationError(
            f"duplicates {protocol.duplicates!r} needs to know which scans have equal reports: give the table a column "
            "`report`."
        )
    cases = frame[columns].drop_duplicates(CASE, ignore_index=True)
    kept = np.ones(len(cases), bool)
    dropped: dict[str, list[str]] = {}
    if protocol.level == "scan":
        in_order = cases.assign(key=[tuple(natural_key(str(name))) for name in cases["recon_id"]]).sort_values("key")
        is_first = ~in_order.duplicated(["patient_id", "scan_id"])
        kept = is_first.reindex(cases.index).to_numpy()
        dropped[OTHER_RECONSTRUCTION] = cases["recon_id"][~kept].astype(str).tolist()
    if protocol.duplicates != "keep":
        comes_again = kept.copy()
        comes_again[kept] = repeats_a_report(cases[kept], protocol.duplicates)
        dropped[REASONS[protocol.duplicates]] = cases["recon_id"][comes_again].astype(str).tolist()
        kept = kept & ~comes_again
    chosen = pd.MultiIndex.from_frame(cases[CASE][kept])
    rows = pd.MultiIndex.from_frame(frame[CASE]).isin(chosen)
    return frame[rows], {reason: names for reason, names in dropped.items() if names}


def _prepare(frame: pd.DataFrame, protocol: Protocol) -> Evaluation:
    _check(frame)
    chosen, dropped = _choose_cases(frame, protocol)
    if chosen.empty:
        raise EvaluationError("no case is left to evaluate.")
    parts = []
    for finding, rows in chosen.groupby("finding", sort=False):
        scores, labels = rows["score"].to_numpy(float), rows["label"].to_numpy(float)
        names, is_absent = rows["recon_id"].astype(str).to_numpy(), np.isnan(scores)
        is_unmeasurable = is_absent.all()
        as_zero = protocol.absent == "zero" and not is_unmeasurable
        unscored = np.zeros_like(is_absent) if as_zero else is_absent
        unknown = np.isnan(labels) & ~unscored
        counted = ~unscored & ~unknown
        excluded = {NO_SCORE: names[unscored].tolist(), LABEL_UNKNOWN: names[unknown].tolist()}
        cases = FindingCases(
            finding=finding,
            organ=rows["organ"].iloc[0],
            scores=np.where(is_absent, 0.0, scores)[counted],
            labels=labels[counted].astype(int),
            patients=rows["patient_id"].astype(str).to_numpy()[counted],  # an index below
            excluded={reason: names for reason, names in excluded.items() if names},
            num_absent_as_zero=int((is_absent & counted).sum()),
        )
        positives = cases.num_positives
        if positives == 0 or positives == len(cases.labels):
            missing = "no case" if not counted.any() else "no positive case" if not positives else "no negative case"
            cases.reason = f"{missing} among the {counted.sum()} scored and labelled"
        parts.append(cases)
    patient_ids, index = np.unique(np.concatenate([cases.patients for cases in parts]), return_inverse=True)
    for cases, place in zip(parts, np.split(index, np.cumsum([len(cases.patients) for cases in parts])[:-1])):
        cases.patients = place
    return Evaluation(protocol, frame["task"].iloc[0], chosen, dropped, parts, patient_ids)


def _paired(
    frame_a: pd.DataFrame, frame_b: pd.DataFrame, protocol: Protocol
) -> tuple[list[pd.DataFrame], dict[str, int]]:
    """The rows that both runs have, in the order of the first; a score that one run lacks is taken from neither."""
    for frame in (frame_a, frame_b):
        _check(frame)
    keys = [*CASE, "finding"]
    both = frame_a.merge(frame_b[[*keys, "score", "label"]], on=keys, suffixes=("", "_b"))
    if both.empty:
        raise EvaluationError(
            f"the two runs share no case and finding: a has {frame_a['recon_id'].iloc[0]!r}, "
            f"{frame_a['finding'].iloc[0]!r}, b {frame_b['recon_id'].iloc[0]!r}, {frame_b['finding'].iloc[0]!r}."
        )
    differs = (both["label"] != both["label_b"]) & both["label"].notna() & both["label_b"].notna()
    if differs.any():
        row = both[differs].iloc[0]
        raise EvaluationError(
            f"{row['recon_id']}, {row['finding']!r}: label {row['label']:g} in run a, {row['label_b']:g} in run b, and "
            f"{differs.sum() - 1} more; runs are compared on the same labels."
        )
    unpaired = {
        "case and finding of run a alone": len(frame_a) - len(both),
        "case and finding of run b alone": len(frame_b) - len(both),
    }
    label = both["label"].fillna(both["label_b"])
    frames = [both.assign(label=label, score=both[column]) for column in ("score", "score_b")]
    absent = [frame["score"].isna() for frame in frames]
    if protocol.absent == "zero":  # what a run never scored is no zero
        absent = [one.groupby(both["finding"]).transform("all") for one in absent]
    frames = [frame.assign(score=frame["score"].mask(absent[0] | absent[1])) for frame in frames]
    return [frame[frame_a.columns] for frame in frames], {reason: n for reason, n in unpaired.items() if n}


# (3) thresholds


def _set_thresholds(evaluation: Evaluation, development: pd.DataFrame | None) -> None:
    protocol = evaluation.protocol
    if (protocol.threshold == "development") != (development is not None):
        given = "a development table was given" if development is not None else "no development table was given"
        raise EvaluationError(f"threshold {protocol.threshold!r}, and {given}; the two belong together.")
    if protocol.threshold == "cross_validation":
        if evaluation.measured:
            evaluation.folds = _folds(evaluation)
        for cases in evaluation.measured:
            _cross_validate(cases, evaluation.folds, protocol)
        return
    chosen: dict[str, float | None] = {}
    if development is not None:
        chosen = _development_thresholds(evaluation, development)
    for cases in evaluation.measured:
        if development is not None:
            threshold = chosen.get(cases.finding)
            if threshold is None:
                cases.threshold_reason = "the development split has not both classes of the finding"
                continue
        elif protocol.threshold == "test_labels":
            threshold = choose_threshold(cases.scores, cases.labels, protocol.criterion)
        else:
            threshold = float(protocol.threshold)
        cases.thresholds = np.full(len(cases.scores), threshold)
        cases.threshold = {"value": threshold, "by_fold": None}


def _folds(evaluation: Evaluation) -> np.ndarray:
    is_positive = np.zeros((len(evaluation.patient_ids), len(evaluation.measured)), bool)
    for n, cases in enumerate(evaluation.measured):
        is_positive[cases.patients[cases.labels == 1], n] = True
    return patient_folds(is_positive, evaluation.protocol.num_folds, evaluation.protocol.seed)


def _cross_validate(cases: FindingCases, folds: np.ndarray, protocol: Protocol) -> None:
    """Set the threshold of every case to the one chosen on the folds that its patient is not in."""
    fold = folds[cases.patients]
    by_fold = []
    for n in range(protocol.num_folds):
        others = fold != n
        by_fold.append(choose_threshold(cases.scores[others], cases.labels[others], protocol.criterion))
        if by_fold[-1] is None and not others.all():
            cases.threshold_reason = "one class only outside a fold, so no threshold for it; too few patients have both"
            return
    cases.thresholds = np.array([np.nan if threshold is None else threshold for threshold in by_fold])[fold]
    known = [threshold for threshold in by_fold if threshold is not None]
    cases.threshold = {"value": float(np.mean(known)), "by_fold": by_fold}


def _development_thresholds(evaluation: Evaluation, development: pd.DataFrame) -> dict[str, float | None]:
    has_reports = "report" in development.columns and development["report"].notna().any()
    duplicates = evaluation.protocol.duplicates if has_reports else "keep"
    prepared = _prepare(development, replace(evaluation.protocol, duplicates=duplicates))
    shared = np.intersect1d(evaluation.patient_ids, prepared.patient_ids)
    if len(shared):
        raise EvaluationError(
            f"{len(shared)} patients are in the development split and in the one to be judged (first: {shared[0]}); "
            "a threshold may not have seen the patients that it is judged by."
        )
    if not {cases.finding for cases in prepared.findings} & {cases.finding for cases in evaluation.findings}:
        raise EvaluationError(
            f"the development split has none of the findings {[cases.finding for cases in evaluation.findings][:4]}."
        )
    return {
        cases.finding: choose_threshold(cases.scores, cases.labels, evaluation.protocol.criterion)
        for cases in prepared.findings
    }


# (4) and (5): figures and intervals


def _draw(evaluation: Evaluation) -> np.ndarray | None:
    protocol = evaluation.protocol
    # Resamples of one patient are all alike: an interval of no width would say that nothing is uncertain.
    if not protocol.num_bootstraps or not evaluation.measured or len(evaluation.patient_ids) < 2:
        return None
    return draw_patients(len(evaluation.patient_ids), protocol.num_bootstraps, protocol.seed)


def _figures(evaluation: Evaluation, weights: np.ndarray | None) -> tuple[dict, dict]:
    """Values and resamples of every measured finding: finding -> name -> number, finding -> name -> `(resamples,)`."""
    values: dict[str, dict] = {}
    resamples: dict[str, dict] = {}
    num_patients = len(evaluation.patient_ids)
    real_weights = None if weights is None else weights.astype(float)
    for cases in evaluation.measured:
        scores, labels, patients = cases.scores, cases.labels, cases.patients
        known = calibration(scores, labels, evaluation.protocol.num_bins)
        values[cases.finding] = ranking_metrics(scores, labels) | {name: known[name] for name in CALIBRATIONS}
        values[cases.finding]["bins"] = known["bins"]
        counts = None
        if cases.thresholds is not None:
            counts = decision_counts(cases.is_called, labels, patients, num_patients)
            values[cases.finding] |= {k: float(v) for k, v in decision_metrics(counts.sum(axis=0)).items()}
        if weights is None:
            continue
        drawn = Ranking(scores, labels, patients).resampled(weights)
        if counts is not None:
            drawn |= decision_metrics(real_weights @ counts)
        # Sum of squared differences and number of cases of every patient.
        squares = np.bincount(patients, (scores - labels) ** 2, num_patients)
        sizes = real_weights @ np.bincount(patients, minlength=num_patients)
        drawn["brier"] = np.where(sizes > 0, real_weights @ squares / np.maximum(sizes, 1), np.nan)
        resamples[cases.finding] = drawn
    return values, resamples


def _mean_value(name: str, findings: Sequence[str], values: dict) -> float | None:
    known = [values[finding][name] for finding in findings if name in values[finding]]
    return float(np.mean(known)) if known else None


def _mean_resamples(name: str, findings: Sequence[str], resamples: dict) -> np.ndarray | None:
    known = [resamples[f][name] for f in findings if f in resamples and name in resamples[f]]
    return mean_over(known) if known else None


def _mean_figure(name: str, findings: Sequence[str], values: dict, resamples: dict, rarer: dict) -> dict:
    value = _mean_value(name, findings, values)
    if name == "auc":
        known = [finding for finding in findings if finding in resamples]
        return auc_figure(value, [resamples[f][name] for f in known], [rarer[f] for f in known])
    return figure(value, _mean_resamples(name, findings, resamples))


def _number_known(name: str, findings: Sequence[str], values: dict) -> int:
    return sum(name in values[finding] for finding in findings)


def _difference(a: tuple, b: tuple) -> dict:
    """Of two (value, resamples): {a, b, difference}."""
    (value_a, drawn_a), (value_b, drawn_b) = a, b
    if value_a is None or value_b is None:
        return {"a": value_a, "b": value_b, "difference": figure(None) | {"p": None}}
    drawn = None if drawn_a is None or drawn_b is None else drawn_b - drawn_a
    p = None if drawn is None else two_sided_p(drawn)
    return {"a": value_a, "b": value_b, "difference": figure(value_b - value_a, drawn) | {"p": p}}


def _micro(evaluation: Evaluation) -> dict:
    """All pairs of case and finding together."""
    measured = evaluation.measured
    with_threshold = [cases for cases in measured if cases.thresholds is not None]
    result = {name: figure(None) for name in METRICS} | {"calibration": None, "curves": None}
    result |= {"positives": sum(cases.num_positives for cases in measured)}
    result["negatives"] = sum(len(cases.labels) for cases in measured) - result["positives"]
    if not measured:
        return result
    scores, labels, patients = (
        np.concatenate([getattr(cases, name) for cases in measured]) for name in ("scores", "labels", "patients")
    )
    weights = _draw(evaluation)
    drawn = {} if weights is None else Ranking(scores, labels, patients).resampled(weights)
    values = ranking_metrics(scores, labels)
    for name in RANKING_METRICS:
        result[name] = figure(values[name], drawn.get(name))
    result["auc"] = auc_figure(values["auc"], [drawn["auc"]] if drawn else [], [rarer_patients(patients, labels)])
    if with_threshold:
        num_patients = len(evaluation.patient_ids)
        counts = sum(decision_counts(c.is_called, c.labels, c.patients, num_patients) for c in with_threshold)
        values = decision_metrics(counts.sum(axis=0))
        drawn = {} if weights is None else decision_metrics(weights.astype(float) @ counts)
        for name in DECISION_METRICS:
            result[name] = figure(float(values[name]), drawn.get(name))
    known = calibration(scores, labels, evaluation.protocol.num_bins)
    result["calibration"] = {name: figure(known[name]) for name in CALIBRATIONS} | {"bins": known["bins"]}
    result["curves"] = _curves(scores, labels)
    return result


def _curves(scores: np.ndarray, labels: np.ndarray) -> dict[str, list[list[float]]]:
    false_positive_rate, true_positive_rate, _ = roc_curve(labels, scores)
    precision, recall, _ = precision_recall_curve(labels, scores, drop_intermediate=True)
    return {
        "roc": _thinned(false_positive_rate, true_positive_rate),
        "pr": _thinned(recall[::-1], precision[::-1]),
    }


def _thinned(x: np.ndarray, y: np.ndarray) -> list[list[float]]:
    """At most `CURVE_POINTS` points, first and last among them, evenly spaced along the curve."""
    if len(x) > CURVE_POINTS:
        length = np.append(0, np.cumsum(np.hypot(np.diff(x), np.diff(y))))
        kept = np.unique(np.searchsorted(length, np.linspace(0, length[-1], CURVE_POINTS)).clip(0, len(x) - 1))
        x, y = x[kept], y[kept]
    return [[round(float(a), 5), round(float(b), 5)] for a, b in zip(x, y)]


# what is told


def _finding_result(evaluation: Evaluation, cases: FindingCases, values: dict | None, resamples: dict | None) -> dict:
    values, resamples = values or {}, resamples or {}
    result = {
        "organ": cases.organ,
        "positives": cases.num_positives,
        "negatives": len(cases.labels) - cases.num_positives,
        "num_patients": len(np.unique(cases.patients)),
        "positive_patients": len(np.unique(cases.patients[cases.labels == 1])),
        **{name: figure(values.get(name), resamples.get(name)) for name in METRICS},
        "threshold": cases.threshold,
        "calibration": None,
        "curves": None,
        "folds": None,
        "excluded": {reason: len(names) for reason, names in cases.excluded.items()},
        "excluded_cases": {reason: names[:NAMED_CASES] for reason, names in cases.excluded.items()},
        "num_absent_as_zero": cases.num_absent_as_zero,
    }
    if cases.reason is not None:
        return result | {"reason": cases.reason}
    if cases.threshold_reason is not None:
        result["threshold_reason"] = cases.threshold_reason
    result["auc"] = auc_figure(values["auc"], [resamples["auc"]] if resamples else [], [cases.rarer_patients])
    result["calibration"] = {name: figure(values[name], resamples.get(name)) for name in CALIBRATIONS}
    result["calibration"]["bins"] = values["bins"]
    result["curves"] = _curves(cases.scores, cases.labels)
    if evaluation.folds is not None:
        by_fold = _figures_by_fold(evaluation, cases)
        result["folds"] = {name: spread(by_fold[name]) for name in METRICS}
    return result


def _figures_by_fold(evaluation: Evaluation, cases: FindingCases) -> dict[str, np.ndarray]:
    """Every metric within every fold, `(folds,)`; NaN where the fold lacks a class or there is no threshold."""
    num_folds, num_patients = evaluation.protocol.num_folds, len(evaluation.patient_ids)
    # A fold is a sample in which its patients come once and the others not at all.
    weights = (evaluation.folds == np.arange(num_folds)[:, None]).astype(np.uint16)
    figures = Ranking(cases.scores, cases.labels, cases.patients).resampled(weights)
    if cases.thresholds is None:
        return figures | {name: np.full(num_folds, np.nan) for name in DECISION_METRICS}
    counts = decision_counts(cases.is_called, cases.labels, cases.patients, num_patients)
    return figures | decision_metrics(weights.astype(float) @ counts)


def _fold_results(evaluation: Evaluation) -> dict | None:
    if evaluation.folds is None:
        return None
    figures = [_figures_by_fold(evaluation, cases) for cases in evaluation.measured]
    return {
        "num_folds": evaluation.protocol.num_folds,
        "num_patients": np.bincount(evaluation.folds, minlength=evaluation.protocol.num_folds).tolist(),
        "macro": {name: spread(mean_over([known[name] for known in figures])) for name in METRICS},
    }


def _counts(evaluation: Evaluation) -> dict[str, int]:
    frame = evaluation.frame
    scored = frame[frame["score"].notna()]
    cut = scored[~scored["is_complete"].astype(bool)]
    return {
        "num_findings": len(evaluation.measured),
        "num_findings_asked": len(evaluation.findings),
        "num_patients": int(scored["patient_id"].nunique()),
        "num_scans": len(scored.drop_duplicates(["patient_id", "scan_id"])),
        "num_reconstructions": len(scored.drop_duplicates(CASE)),
        "num_incomplete_organs": len(cut.drop_duplicates([*CASE, "organ"])),
    }


def _exclusions(evaluation: Evaluation) -> dict:
    excluded: dict[str, int] = {}
    for cases in evaluation.findings:
        for reason, names in cases.excluded.items():
            excluded[reason] = excluded.get(reason, 0) + len(names)
    dropped = {reason: {"count": len(names), "cases": names} for reason, names in evaluation.dropped.items()}
    return {"excluded": excluded, "dropped_cases": dropped}


def _warnings(evaluation: Evaluation, of_differences: bool = False) -> list[str]:
    measured, protocol = evaluation.measured, evaluation.protocol

    def named(holds: Callable[[FindingCases], bool]) -> str:
        return ", ".join(cases.finding for cases in measured if holds(cases))

    warnings = []
    reasons = {cases.finding: cases.reason for cases in evaluation.findings if cases.reason is not None}
    if reasons:
        groups = {reason: [f for f in reasons if reasons[f] == reason] for reason in reasons.values()}
        told = "; ".join(f"{reason}: {', '.join(findings)}" for reason, findings in groups.items())
        asked = f"{len(reasons)} of the {len(evaluation.findings)} findings of {evaluation.task}"
        warnings.append(f"{PARTIAL}: {asked} have no figure ({told}).")
    if protocol.threshold == "test_labels":
        warnings.append(f"thresholds were {SOURCES['test_labels']}.")
    if as_zero := sum(cases.num_absent_as_zero for cases in measured):
        warnings.append(f"{as_zero} pairs of case and finding without a score were counted as 0 (as published).")
    if few := named(lambda c: len(np.unique(c.patients[c.labels == 1])) < FEW_PATIENTS):
        warnings.append(f"fewer than {FEW_PATIENTS} patients with the finding, so intervals are rough: {few}.")
    if constant := named(lambda c: np.ptp(c.scores) == 0):
        warnings.append(f"all scores are equal, so an AUC of 0.5 says nothing: {constant}.")
    if perfect := named(lambda c: c.scores[c.labels == 1].min() > c.scores[c.labels == 0].max()):
        warnings.append(
            "perfectly separated, so resampling shows no spread, and intervals are too narrow"
            + ("" if of_differences else " but for that of the AUC, which is the bound for so few patients")
            + f": {perfect}."
        )
    if silent := named(lambda c: c.thresholds is not None and not c.is_called.any()):
        warnings.append(f"nothing is called present at the threshold, precision is set to 0: {silent}.")
    if without := named(lambda c: c.thresholds is None):
        warnings.append(f"no threshold, so no decision metric: {without}.")
    return warnings
