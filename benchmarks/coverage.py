"""How often the 95 % interval of an AUC holds the truth: the table in docs/evaluation.md.

    python -m benchmarks.coverage --patients 50 100
    python -m benchmarks.coverage --patients 300 --simulations 500 --aucs 0.75 0.9 0.97

A row for each number of patients and share of them with the finding, a column for each true AUC: the share of simulated
sets whose interval holds it, in per cent, first between percentiles, then as it is (`evaluation_fvlm.bootstrap`). Sets
are binormal, with two scans of each patient, three quarters of the variance lying between patients. Minutes a row.
"""

import argparse

import numpy as np
from scipy.stats import norm
from sklearn.metrics import roc_auc_score

from evaluation_fvlm.binary_metrics import Ranking
from evaluation_fvlm.bootstrap import auc_interval, draw_patients, percentile_interval

NUM_BOOTSTRAPS = 1000
SCANS_PER_PATIENT = 2
BETWEEN_PATIENTS = 0.75  # of the variance


def coverage(
    num_simulations: int,
    num_patients: int,
    scans_per_patient: int,
    auc: float,
    num_bootstraps: int,
    seed: int,
    prevalence: float = 0.3,
) -> np.ndarray:
    """Share of 95 % intervals that hold the true AUC: of `auc_interval`, and of the interval between percentiles.

    Args:
        num_simulations: Sets to simulate; at least two patients of each have the finding, and two have not.
        num_patients: Of each set.
        scans_per_patient: Correlated, and with one label.
        auc: The truth.
        num_bootstraps: Resamples for each interval.
        seed: Of sets and resamples.
        prevalence: Share of patients with the finding, in expectation.
    """
    rng = np.random.default_rng(seed)
    distance = np.sqrt(2) * norm.ppf(auc)
    patients = np.repeat(np.arange(num_patients), scans_per_patient)
    weights = draw_patients(num_patients, num_bootstraps, seed)
    inside = np.zeros(2)
    for _ in range(num_simulations):
        is_positive = np.zeros(num_patients, bool)
        while not 2 <= is_positive.sum() <= num_patients - 2:
            is_positive = rng.random(num_patients) < prevalence
        labels = np.repeat(is_positive.astype(int), scans_per_patient)
        own, of_scan = np.sqrt(BETWEEN_PATIENTS), np.sqrt(1 - BETWEEN_PATIENTS)
        noise = own * rng.normal(size=num_patients)[patients] + of_scan * rng.normal(size=len(patients))
        scores = noise + distance * labels
        drawn = Ranking(scores, labels, patients).resampled(weights)["auc"]
        rarer = min(np.flatnonzero(is_positive), np.flatnonzero(~is_positive), key=len)
        ends = (auc_interval(roc_auc_score(labels, scores), [drawn], [rarer]), percentile_interval(drawn))
        inside += [low <= auc <= high for low, high in ends]
    return inside / num_simulations


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--patients", type=int, nargs="+", default=[50, 100], metavar="N", help="Default: 50 100.")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.1, 0.3], help="Default: 0.1 0.3.")
    parser.add_argument("--aucs", type=float, nargs="+", default=[0.6, 0.75, 0.9, 0.97], help="Default: 0.6 ... 0.97.")
    parser.add_argument("--simulations", type=int, default=1000, metavar="N", help="Of a cell (default: %(default)s).")
    options = parser.parse_args(arguments)
    print("| " + " | ".join(["patients, share with the finding", *(f"AUC {auc:.2f}" for auc in options.aucs)]) + " |")
    print("| --- " * (1 + len(options.aucs)) + "|")
    for num_patients in options.patients:
        for share in options.shares:
            cells = [f"{num_patients}, {share:g}"]
            for auc in options.aucs:
                sizes = (options.simulations, num_patients, SCANS_PER_PATIENT, auc, NUM_BOOTSTRAPS)
                ours, between_percentiles = coverage(*sizes, seed=5 + num_patients, prevalence=share)
                cells.append(f"{100 * between_percentiles:.1f}, **{100 * ours:.1f}**")
            print("| " + " | ".join(cells) + " |", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
