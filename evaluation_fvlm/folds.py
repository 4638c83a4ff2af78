"""Folds of patients in which every finding is about equally frequent, and figures as mean and spread over them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from evaluation_fvlm.errors import EvaluationError


def patient_folds(is_positive: np.ndarray, num_folds: int, seed: int) -> np.ndarray:
    """Deal patients to folds, the positives of the rarest finding first (after Sechidis et al., ECML 2011).

    Every patient goes to the fold with the fewest positives of the finding that is being dealt, of these to the one
    with the fewest patients, then to the first; who comes first is random. Those without any finding fill up.

    Args:
        is_positive: `(patients, findings)`, whether the patient has the finding in any scan.
        num_folds: At least 2, at most the number of patients.
        seed: Of the order in which patients are dealt.

    Returns:
        `(patients,)` index of the fold.
    """
    num_patients, num_findings = is_positive.shape
    if not 2 <= num_folds <= num_patients:
        raise EvaluationError(
            f"{num_folds} folds of {num_patients} patients: there must be 2 folds or more, and a patient for each. "
            "Set the number of folds, or another source of the thresholds."
        )
    fold = np.full(num_patients, -1)
    sizes = np.zeros(num_folds, int)
    positives = np.zeros((num_folds, num_findings), int)
    order = np.random.default_rng(seed).permutation(num_patients)
    # Of equally rare ones whichever: by its patients, so that the order of the columns makes no difference.
    counts = is_positive.sum(axis=0)
    rarest_first = sorted(range(num_findings), key=lambda finding: (counts[finding], is_positive[:, finding].tobytes()))
    for finding in [*rarest_first, None]:
        for patient in order:
            if fold[patient] >= 0 or (finding is not None and not is_positive[patient, finding]):
                continue
            dealt = np.zeros(num_folds, int) if finding is None else positives[:, finding]
            chosen = np.lexsort((sizes, dealt))[0]
            fold[patient] = chosen
            sizes[chosen] += 1
            positives[chosen] += is_positive[patient]
    return fold


def spread(values: Sequence[float]) -> dict:
    """Mean and standard deviation (n - 1) over the folds that have a value, and the values (None where none).

    The folds share their training data, so the deviation tells how much they differ; it is no standard error.
    """
    known = [float(value) for value in values if np.isfinite(value)]
    return {
        "mean": float(np.mean(known)) if known else None,
        "sd": float(np.std(known, ddof=1)) if len(known) > 1 else None,
        "values": [float(value) if np.isfinite(value) else None for value in values],
    }
