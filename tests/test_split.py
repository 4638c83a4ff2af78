"""Which rows of a split are scored, and that every other is named with its reason."""

import pytest
from datasets import Dataset

from evaluation_fvlm.equal_reports import REASONS, report_key
from evaluation_fvlm.errors import EvaluationError
from evaluation_fvlm.protocols import Protocol, evaluate_frame
from evaluation_fvlm.split import BEYOND_LIMIT, NOT_FIRST, SAME_ROW, choose_scans

ROWS = [  # patient, scan, reconstruction, findings, impression
    ("p", "p_a", "p_a_10", "Nodule.", "Nodule."),
    ("p", "p_a", "p_a_2", "Nodule.", "Nodule."),
    ("p", "p_b", "p_b_1", "Nodule.  ", "Nodule."),  # the same report, written anew
    ("p", "p_c", "p_c_1", "Nodule.", None),
    ("q", "q_a", "q_a_1", "Nodule.", "Nodule."),  # another patient
    ("q", "q_b", "q_b_1", "", None),
    ("q", "q_c", "q_c_1", None, ""),  # no report equals none
]


def split() -> Dataset:
    names = ("patient_id", "scan_id", "recon_id", "findings", "impression")
    return Dataset.from_list([dict(zip(names, row)) for row in ROWS])


@pytest.mark.parametrize("duplicates, others", [("within_patients", ["p_b_1"]), ("everywhere", ["p_b_1", "q_a_1"])])
def test_the_first_of_equal_reports_is_kept(duplicates, others):
    """Reconstructions of one scan are no repeated report; other patients' equal ones count unless asked otherwise."""
    chosen, dropped = choose_scans(split(), "reconstruction", duplicates=duplicates)
    assert chosen["recon_id"][:] == [row[2] for row in ROWS if row[2] not in others]
    assert dict(zip(dropped["recon_id"], dropped["reason"])) == dict.fromkeys(others, REASONS[duplicates])


@pytest.mark.parametrize("duplicates", ["within_patients", "everywhere"])
def test_the_second_scan_comes_before_the_tenth(duplicates):
    rows = [dict(zip(split().column_names, ("p", name, f"{name}_1", "Nodule.", ""))) for name in ("p_10", "p_2")]
    chosen, _ = choose_scans(Dataset.from_list(rows), "scan", duplicates=duplicates)
    assert chosen["scan_id"][:] == ["p_2"]


@pytest.mark.parametrize("duplicates", ["within_patients", "everywhere"])
@pytest.mark.parametrize("level", ["scan", "reconstruction"])
def test_a_split_and_a_table_of_scores_leave_out_the_same_scans(level, duplicates):
    """`eval_fvlm.py --duplicates` and `python -m evaluation_fvlm score --duplicates`, on the same reports."""
    table = split().to_pandas().assign(task="t", finding="Nodule", organ="lung", is_complete=True)
    table["score"], table["label"] = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7], [0, 1, 0, 1, 0, 1, 0]
    table["report"] = [report_key(*row[3:]) or None for row in ROWS]
    told = evaluate_frame(table.iloc[::-1], Protocol(level, 0.5, duplicates=duplicates, num_bootstraps=0))
    _, dropped = choose_scans(split(), level, duplicates=duplicates)
    ours = dropped["recon_id"][dropped["reason"] == REASONS[duplicates]].tolist()
    assert told["dropped_cases"][REASONS[duplicates]]["cases"][::-1] == ours and ours


@pytest.mark.parametrize("level", ["scan", "reconstruction"])
@pytest.mark.parametrize("duplicates", ["keep", "within_patients", "everywhere"])
@pytest.mark.parametrize("limit", [None, 1, 3, 100])
def test_every_row_is_scored_or_named(level, duplicates, limit):
    rows = split()
    chosen, dropped = choose_scans(rows, level, duplicates=duplicates, limit=limit)
    assert sorted([*chosen["recon_id"], *dropped["recon_id"]]) == sorted(rows["recon_id"])
    reasons = dropped["reason"].value_counts().to_dict()
    assert reasons.get(NOT_FIRST, 0) == (level == "scan")
    repeated = {"keep": 0, "within_patients": 1, "everywhere": 2}[duplicates]
    assert reasons.get(REASONS.get(duplicates), 0) == repeated
    left = len(rows) - (level == "scan") - repeated
    assert reasons.get(BEYOND_LIMIT, 0) == max(0, left - (limit or left))


@pytest.mark.parametrize("level", ["scan", "reconstruction"])
def test_a_row_that_the_split_holds_twice_is_scored_once(level):
    names = ("patient_id", "scan_id", "recon_id")
    rows = Dataset.from_list([dict(zip(names, row)) for row in [*ROWS, ROWS[1], ROWS[4]]])
    chosen, dropped = choose_scans(rows, level)
    assert sorted(chosen["recon_id"]) == sorted(choose_scans(split(), level)[0]["recon_id"])
    again = dropped[dropped["reason"] == SAME_ROW]
    assert again["recon_id"].tolist() == ["p_a_2", "q_a_1"]


def test_duplicates_cannot_be_told_without_reports():
    rows = split().remove_columns(["findings", "impression"])
    assert len(choose_scans(rows, "scan")[0]) == 6
    with pytest.raises(EvaluationError, match="neither the column 'findings' nor 'impression'"):
        choose_scans(rows, "scan", duplicates="within_patients")
    with pytest.raises(EvaluationError, match="duplicates 'forget' is not one of"):
        choose_scans(rows, "scan", duplicates="forget")
