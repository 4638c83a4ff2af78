"""Scans whose reports are equal, and which of them count: the same rule for a split and for a table of scores.

Labels come from reports. Two scans of one patient with one report are one observation of it; equal reports of two
patients are two observations, for "normal" is said of many. Reconstructions of a scan share its report and are no
matter of this rule.
"""

from __future__ import annotations

import pandas as pd

from modeling_fvlm.processed_split import natural_key

DUPLICATES = {
    "keep": "all scans, equal reports or not",
    "within_patients": "of one patient's scans with equal reports the first",
    "everywhere": "of scans with equal reports the first, whosever they are",
}

REASONS = {
    "within_patients": "report equal to that of an earlier scan of the patient",
    "everywhere": "report equal to that of an earlier scan",
}


def report_key(*parts: str | None) -> str:
    """A report's sections as a text that is equal for equal reports: case and white space do not matter; "": none."""
    text = " ".join(" ".join(part or "" for part in parts).casefold().split())
    return text if text.replace("not given.", "").strip() else ""  # CT-RATE's word for a section that is missing


def repeats_a_report(cases: pd.DataFrame, duplicates: str) -> pd.Series:
    """Which cases are of a scan whose report an earlier scan has.

    Args:
        cases: Rows with patient_id, scan_id, recon_id and report: equal for equal reports, NaN or "" for none. A
            scan's report is that of its first reconstruction that has one.
        duplicates: "within_patients" or "everywhere". Earlier is by `recon_id`, x_2 before x_10.

    Returns:
        bool, with the index of `cases`.
    """
    scan = pd.MultiIndex.from_frame(cases[["patient_id", "scan_id"]])
    has_report = cases["report"].notna() & (cases["report"] != "")
    in_order = sorted(cases.index[has_report], key=lambda row: natural_key(str(cases["recon_id"][row])))
    scans = cases.loc[in_order].drop_duplicates(["patient_id", "scan_id"])
    known_by = ["report", "patient_id"] if duplicates == "within_patients" else ["report"]
    repeated = pd.MultiIndex.from_frame(scans[scans.duplicated(known_by)][["patient_id", "scan_id"]])
    return pd.Series(scan.isin(repeated), index=cases.index)
