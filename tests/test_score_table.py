"""Anybody's CSV files: what is read is what stands there, what is left out is counted, what is wrong is named."""

import numpy as np
import pandas as pd
import pytest

from evaluation_fvlm.errors import EvaluationError
from evaluation_fvlm.protocols import COLUMNS, Protocol, evaluate_frame
from evaluation_fvlm.published_metrics import published_scores, read_published_files
from evaluation_fvlm.score_table import NO_LABELS, NO_SCORES, case_name, matching_findings, read_score_table
from evaluation_fvlm.tasks import Item, Task

TASK = Task(
    name="tiny",
    version=1,
    source="made up",
    items=(
        Item("Nodule", "lung", ("Nodule.",), ("Not nodule.",)),
        Item("Big heart", "heart", ("Big.", "Large."), ("Not big.", "Not large.")),
    ),
)
LABELS = (
    "VolumeName,Nodule,Big heart,Never scored\nvalid_1_a_1.nii.gz,1,0,0\nvalid_1_a_2.nii.gz,1,0,0\nvalid_2_a_1,0,1,1\n"
)
PUBLISHED = "file_name,lung_Nodule_Not nodule._Nodule.,heart_Big heart_Not big._Big.\n"
PLAIN = "file_name,Nodule,big_heart\n"
ROWS = "valid_1_a_1.nii.gz,0.75,0.25\nvalid_1_a_2,0.5,\nvalid_2_a_1.nii.gz,0.125,nan\n"


@pytest.fixture
def read(tmp_path):
    """Write files of these texts and read them as a table."""

    def read(scores, labels=LABELS, task=None, reports=None, **options):
        paths = {}
        for name, text in (("scores", scores), ("labels", labels), ("reports", reports)):
            paths[name] = None if text is None else tmp_path / f"{name}.csv"
            if text is not None:
                paths[name].write_text(text, encoding="utf-8")
        return read_score_table(paths["scores"], paths["labels"], task, reports=paths["reports"], **options)

    return read


def values(table, column):
    """finding -> recon_id -> value."""
    return {
        finding: {row.recon_id: getattr(row, column) for row in rows.itertuples()}
        for finding, rows in table.frame.groupby("finding", sort=False)
    }


@pytest.mark.parametrize("task", [None, TASK])
@pytest.mark.parametrize("head", [PUBLISHED, PLAIN])
def test_published_and_plain_columns_are_read_alike(read, head, task):
    table = read(head + ROWS, task=task)
    assert list(table.frame.columns) == COLUMNS
    nan = pytest.approx(np.nan, nan_ok=True)
    assert values(table, "score") == {
        "Nodule": {"valid_1_a_1": 0.75, "valid_1_a_2": 0.5, "valid_2_a_1": 0.125},
        "Big heart": {"valid_1_a_1": 0.25, "valid_1_a_2": nan, "valid_2_a_1": nan},
    }
    assert values(table, "label") == {
        "Nodule": {"valid_1_a_1": 1, "valid_1_a_2": 1, "valid_2_a_1": 0},
        "Big heart": {"valid_1_a_1": 0, "valid_1_a_2": 0, "valid_2_a_1": 1},
    }
    organs = {"Nodule": "lung", "Big heart": "heart"}
    if head == PLAIN and task is None:
        organs = dict.fromkeys(organs, "not stated")
    assert {finding: set(known.values()) for finding, known in values(table, "organ").items()} == {
        finding: {organ} for finding, organ in organs.items()
    }
    assert table.frame[["patient_id", "scan_id"]].drop_duplicates().to_numpy().tolist() == [
        ["valid_1", "valid_1_a"],
        ["valid_2", "valid_2_a"],
    ]
    assert table.dropped_cases == {} and table.notes["cases_taken_as_patients"] == 0
    assert table.notes["findings_without_scores"] == ([] if task else ["Never scored"])


def test_what_we_write_is_what_we_read(read, tmp_path):
    """A prompt ensemble's heading, and findings of which one begins as the other goes on."""
    items = (
        *TASK.items,
        Item("Big", "heart", ("heart big",), ("heart_No",)),
        Item("Big_heart", "heart", ("x",), ("y",)),
    )
    task = Task(name="four", version=1, source="made up", items=items)
    rng = np.random.default_rng(0)
    names = [f"valid_{n}_a_1" for n in range(4)]
    rows = [
        (
            "four",
            name[:-4],
            name[:-2],
            name,
            item.finding,
            item.organ,
            round(rng.random(), 6),
            float(rng.integers(2)),
            True,
        )
        for item in items
        for name in names
    ]
    frame = pd.DataFrame(rows, columns=COLUMNS)
    frame.loc[3, "score"] = np.nan
    labels = frame.pivot(index="recon_id", columns="finding", values="label").rename_axis("VolumeName").reset_index()
    table = read(published_scores(frame, task).to_csv(index=False), labels.to_csv(index=False), task)
    pd.testing.assert_frame_equal(table.frame, frame, check_dtype=False)
    # The long form holds everything, and needs no labels.
    long = read(frame.to_csv(index=False), None)
    pd.testing.assert_frame_equal(long.frame.assign(task="four"), frame, check_dtype=False)
    apart = read(
        frame.drop(columns="label").to_csv(index=False), frame[["recon_id", "finding", "label"]].to_csv(index=False)
    )
    pd.testing.assert_frame_equal(apart.frame.assign(task="four"), frame, check_dtype=False)


def test_several_tasks_in_one_file(read):
    frame = pd.DataFrame(
        [
            (task, "p", "s", "r", "Nodule", "lung", score, 1.0, True)
            for task, score in (("tiny", 0.25), ("other", 0.75))
        ],
        columns=COLUMNS,
    )
    assert values(read(frame.to_csv(index=False), None, TASK), "score")["Nodule"] == {"r": 0.25}
    with pytest.raises(EvaluationError, match=r"holds the tasks \['other', 'tiny'\]; name one"):
        read(frame.to_csv(index=False), None)


def test_rad_chest_ct_labels_are_made_into_findings(read):
    labels = "NoteAcc_DEID,emphysema*left_lung,emphysema*right_lung,nodule*lung,nodulegr1cm*lung,cabg*heart\n"
    labels += "trn1,0,1,0,0,1\ntrn2,0,0,0,1,0\ntrn3,0,0,,0,0\n"
    table = read("NoteAcc_DEID,Emphysema,Lung nodule\ntrn1.npz,0.5,0.5\ntrn2,0.5,0.5\ntrn3,0.5,0.5\n", labels)
    assert values(table, "label") == {
        "Emphysema": {"trn1": 1, "trn2": 0, "trn3": 0},
        # A location that is not known leaves open what no other location asserts.
        "Lung nodule": {"trn1": 0, "trn2": 1, "trn3": pytest.approx(np.nan, nan_ok=True)},
    }
    assert table.notes["cases_taken_as_patients"] == 3
    with pytest.raises(EvaluationError, match="none of RAD-ChestCT's abnormalities"):
        read("NoteAcc_DEID,Emphysema\ntrn1,0.5\n", "NoteAcc_DEID,other*lung\ntrn1,0\n")
    # Mapped to CT-RATE's names by somebody else: as it stands.
    mapped = read("NoteAcc_DEID,Emphysema\ntrn1,0.5\n", "NoteAcc_DEID,Emphysema\ntrn1,1\n")
    assert values(mapped, "label") == {"Emphysema": {"trn1": 1}}


@pytest.mark.parametrize(
    "cell, name",
    [
        ("valid_1_a_1.nii.gz", "valid_1_a_1"),
        ("valid_1_a_1", "valid_1_a_1"),
        ("dataset/valid_fixed/valid_1/valid_1_a_1.NII.GZ", "valid_1_a_1"),
        ("C:\\data\\case.2.npz", "case.2"),
        (" x.mha ", "x"),
    ],
)
def test_names_match_without_folder_and_ending(cell, name):
    assert case_name(cell) == name


def test_cases_of_one_file_alone_are_named(read):
    table = read(PLAIN + ROWS + "valid_9_a_1,0.5,0.5\n", LABELS + "valid_3_a_1,0,0,0\nvalid_4_a_1,0,0,0\n")
    assert table.dropped_cases == {NO_LABELS: ["valid_9_a_1"], NO_SCORES: ["valid_3_a_1", "valid_4_a_1"]}
    assert set(table.frame["recon_id"]) == {"valid_1_a_1", "valid_1_a_2", "valid_2_a_1"}
    with pytest.raises(EvaluationError, match="no case of .*scores.csv is in .*labels.csv: 'a' there, 'b' here"):
        read("file_name,Nodule\na,0.5\n", "VolumeName,Nodule\nb,1\n")


def test_unknown_labels_and_findings_stay_in_the_count(read):
    labels = LABELS.replace("valid_2_a_1,0,1,1", "valid_2_a_1,-1,,1").replace("Big heart", "Other name")
    table = read(PUBLISHED + ROWS, labels, TASK)
    assert table.notes["findings_without_labels"] == ["Big heart"]
    result = evaluate_frame(table.frame, Protocol(level="reconstruction", threshold=0.5, num_bootstraps=0))
    assert result["excluded"] == {"label unknown": 2, "no score: organ absent, or not scored": 2}
    assert result["per_finding"]["Big heart"]["reason"] == "no case among the 0 scored and labelled"
    with pytest.raises(EvaluationError, match="none of the task's findings has labels"):
        read(PUBLISHED + ROWS, "VolumeName,A,B\nvalid_1_a_1,0,0\n", TASK)
    # A column that the task asks for and the scores lack.
    short = read("file_name,Nodule\nvalid_1_a_1,0.5\n", task=TASK)
    assert short.notes["findings_without_scores"] == ["Big heart"]
    assert np.isnan(values(short, "score")["Big heart"]["valid_1_a_1"])


def test_logits_are_put_through_the_logistic_function(read):
    table = read("file_name,Nodule\nvalid_1_a_1,-2.5\nvalid_1_a_2,800\nvalid_2_a_1,\n", logits=True)
    scores = values(table, "score")["Nodule"]
    assert scores["valid_1_a_1"] == pytest.approx(1 / (1 + np.exp(2.5))) and scores["valid_1_a_2"] == 1.0
    assert np.isnan(scores["valid_2_a_1"])


@pytest.mark.parametrize("text", ["1.0000001", "-0.1", "7"])
def test_a_score_that_is_no_probability_is_refused(read, text):
    with pytest.raises(EvaluationError, match=r"scores.csv, row 3 \(valid_1_a_2\), 'Nodule': .*--logits"):
        read(f"file_name,Nodule\nvalid_1_a_1,0.5\nvalid_1_a_2,{text}\n")


@pytest.mark.parametrize(
    "labels",
    [
        "VolumeName,nodule,Big_heart\nvalid_1_a_1,1,0\nvalid_2_a_1,0,1\n",
        "recon_id,finding,label\n"
        "valid_1_a_1,NODULE,1\nvalid_2_a_1,NODULE,0\nvalid_1_a_1,big_heart,0\nvalid_2_a_1,big_heart,1\n",
    ],
)
def test_labels_of_a_task_may_be_spelt_otherwise(read, labels):
    scores = "recon_id,finding,score\nvalid_1_a_1,nodule,0.75\nvalid_2_a_1,nodule,0.5\nvalid_2_a_1,Big_Heart,0.25\n"
    table = read(scores, labels, task=TASK)
    assert values(table, "label") == {
        "Nodule": {"valid_1_a_1": 1, "valid_2_a_1": 0},
        "Big heart": {"valid_1_a_1": 0, "valid_2_a_1": 1},
    }
    nan = pytest.approx(np.nan, nan_ok=True)
    assert values(table, "score") == {
        "Nodule": {"valid_1_a_1": 0.75, "valid_2_a_1": 0.5},
        "Big heart": {"valid_1_a_1": nan, "valid_2_a_1": 0.25},
    }
    assert not table.notes["findings_without_labels"] and not table.notes["columns_ignored"]


def test_two_label_columns_of_one_finding_are_refused(read):
    labels = "VolumeName,Nodule,nodule\nvalid_1_a_1,1,0\n"
    with pytest.raises(EvaluationError, match="labels.csv: 'Nodule' and 'nodule' both match the finding 'Nodule'"):
        read(PLAIN + ROWS, labels, task=TASK)


@pytest.mark.parametrize(
    "scores, labels, message",
    [
        ("file_name,Nodule\nvalid_1_a_1,high\n", LABELS, "row 2 .*'high' is no number"),
        ("file_name,Nodule\nvalid_1_a_1,1_0\n", LABELS, "'1_0' is no number"),
        ("file_name,Nodule\nvalid_1_a_1,inf\n", LABELS, "inf' is not finite"),
        (f"file_name,Nodule\nvalid_1_a_1,{'9' * 400}\n", LABELS, "score '9{50,57}[^9]+' is not finite"),
        ("file_name,Nodule\nvalid_1_a_1,0.5\n", "VolumeName,Nodule\nvalid_1_a_1,2\n", "label '2' is neither 0 nor 1"),
        ("file_name,Nodule\nvalid_1_a_1,0.5,1\n", LABELS, "row 2: 3 cells, where the header has 2"),
        ("file_name,Nodule\nvalid_1_a_1\n", LABELS, "row 2: 1 cells"),
        ("file_name,Nodule\n,0.5\n", LABELS, "row 2: the cell of column 'file_name' is empty"),
        ("file_name,Nodule,Nodule\na,0,0\n", LABELS, "'Nodule' comes twice"),
        ("file_name,Nodule\n", LABELS, "has no rows"),
        ("", LABELS, "no column names the cases"),
        ("file_name;Nodule\na;0.5\n", LABELS, "parted by semicolons"),
        ("who,Nodule\na,0.5\n", LABELS, "no column names the cases; .* got .'who', 'Nodule'.. Name it with --name_col"),
        ("file_name,Lump\nvalid_1_a_1,0.5\n", LABELS, "no column matches a finding; the columns are .'Lump'"),
        ("file_name,Nodule\nvalid_1_a_1,0.5\n", None, "has no column `label`: give a file of labels"),
        ("recon_id,finding,label\nvalid_1_a_1,Nodule,1\n", LABELS, "and no column `score`"),
        ("file_name,Nodule\nvalid_1_a_1,0.5\n", "recon_id,finding,score\nr,Nodule,1\n", "neither `label` nor `value`"),
    ],
)
def test_what_is_wrong_is_named(read, scores, labels, message):
    with pytest.raises(EvaluationError, match=message):
        read(scores, labels)


def test_a_file_that_is_not_there_or_no_text(tmp_path):
    with pytest.raises(EvaluationError, match="none.csv cannot be read as CSV"):
        read_score_table(tmp_path / "none.csv", tmp_path / "none.csv")
    (tmp_path / "picture.csv").write_bytes(b"\x89PNG\xff\xfe\x00")
    with pytest.raises(EvaluationError, match="picture.csv cannot be read as CSV"):
        read_score_table(tmp_path / "picture.csv", tmp_path / "none.csv")


def test_identical_rows_are_dropped_and_counted(read):
    twice = PLAIN + ROWS + "valid_1_a_2.nii.gz,0.5,\n"  # the same case and cells, spelt with its ending
    table = read(twice, LABELS + "valid_2_a_1,0,1,1\n")
    assert table.notes["identical_rows_dropped"] == 2
    assert len(table.frame) == 6
    pd.testing.assert_frame_equal(table.frame, read(PLAIN + ROWS).frame)
    # As pandas writes it with its index.
    numbered = pd.DataFrame({"file_name": ["valid_1_a_1"] * 2, "Nodule": [0.5, 0.5]}).to_csv()
    assert read(numbered).notes["identical_rows_dropped"] == 1


def test_rows_that_contradict_each_other_are_refused(read):
    with pytest.raises(
        EvaluationError, match=r"scores.csv, row 5 \(valid_1_a_2\): .* row 3, .*'Nodule' is '0.6' here, '0.5'"
    ):
        read(PLAIN + ROWS + "valid_1_a_2.nii.gz,0.6,\n")
    with pytest.raises(EvaluationError, match=r"labels.csv, row 5 .*'Big heart' is '0' here, '1' there"):
        read(PLAIN + ROWS, LABELS + "valid_2_a_1.nii.gz,0,0,1\n")
    long = "recon_id,finding,score,label\nr,A,0.5,1\nr,B,0.5,1\n"
    assert len(read(long, None).frame) == 2
    with pytest.raises(EvaluationError, match=r"row 4 \(r\): this case has a row already, row 2"):
        read(long + "r,A,0.25,1\n", None)


def test_columns_and_findings_must_match_one_to_one(read):
    with pytest.raises(EvaluationError, match=r"'lung_nodule' matches the findings \['Lung nodule', 'Lung_Nodule'\]"):
        read("file_name,lung_nodule\na,0.5\n", "VolumeName,Lung nodule,Lung_Nodule\na,0,1\n")
    exact = read("file_name,Lung_Nodule\na,0.5\n", "VolumeName,Lung nodule,Lung_Nodule\na,0,1\n")
    assert exact.frame["finding"].tolist() == ["Lung_Nodule"]
    with pytest.raises(EvaluationError, match=r"'Nodule' and 'lung_Nodule_No._Yes.' both match the finding 'Nodule'"):
        read("file_name,Nodule,lung_Nodule_No._Yes.\nvalid_1_a_1,0.5,0.5\n")
    with pytest.raises(EvaluationError, match=r"matches the findings \['b', 'b_c'\]"):
        read("file_name,a_b_c_d_e\nx,0.5\n", "VolumeName,b,b_c\nx,0,1\n")
    table = read("file_name,Nodule,Age,patient_id\nvalid_1_a_1,0.5,70,p\n")
    assert table.notes["columns_ignored"] == ["Age"] and table.notes["columns"] == {"Nodule": "Nodule"}


@pytest.mark.parametrize(
    "column, findings",
    [
        ("lung_Lung nodule_Not Nodule._Nodule.", ["Lung nodule"]),
        ("lung_Nodule_No Effusion_Effusion", ["Nodule"]),  # a prompt that is a finding's name
        ("adrenal_gland_Nodule_No._Yes.", ["Nodule"]),
        ("lung_Effusion", ["Effusion"]),
        ("lung nodule", ["Lung nodule"]),
        ("LUNG_NODULE", ["Lung nodule"]),
        ("lung_Nodules_No._Yes.", []),
        ("Nodule_No._Yes.", []),  # no organ before it
    ],
)
def test_matching_a_column(column, findings):
    assert matching_findings(column, ["Nodule", "Lung nodule", "Effusion"], {}) == findings


def test_a_task_tells_the_organ_and_so_the_place_of_the_finding():
    findings, organs = ["Nodule", "gland"], {"Nodule": "adrenal_gland", "gland": "lung"}
    assert matching_findings("adrenal_gland_Nodule_No._Yes.", findings, organs) == ["Nodule"]
    assert matching_findings("adrenal_gland_Nodule_No._Yes.", findings, {}) == ["gland"]


def test_patients_come_from_a_column_or_the_name(read):
    scores = "file_name,Nodule,person\nvalid_1_a_1,0.5,x\nvalid_1_a_2,0.5,x\nvalid_2_a_1,0.5,\n"
    named = read(scores, patient_column="person")
    assert named.frame["patient_id"].tolist() == ["x", "x", "valid_2"]  # none told: from the name
    assert read(scores).frame["patient_id"].tolist() == ["valid_1", "valid_1", "valid_2"]
    labels = LABELS.replace("VolumeName", "patient_id,VolumeName").replace("\nvalid", "\np7,valid")
    assert set(read(scores, labels).frame["patient_id"]) == {"p7"}
    own = read("case,Nodule\na,0.5\nb,0.5\n", "case,Nodule\na,0\nb,1\n")
    assert own.frame["patient_id"].tolist() == own.frame["scan_id"].tolist() == ["a", "b"]
    assert own.notes["cases_taken_as_patients"] == 2
    with pytest.raises(EvaluationError, match="--patient_column persn: neither file has it; nearest: 'person'"):
        read(scores, patient_column="persn")
    other = read("who,Nodule\na,0.5\n", "who,Nodule\na,1\n", name_column="who")
    assert other.frame["recon_id"].tolist() == ["a"]


def test_reports_tell_which_scans_are_alike(read):
    reports = "VolumeName,Findings_EN,Impressions_EN\n"
    reports += "valid_1_a_1,Clear  lungs.,Normal\nvalid_1_a_2,clear lungs.,normal\nvalid_2_a_1,Not given.,Not given.\n"
    table = read(
        "file_name,Nodule\n" + "".join(f"valid_{n},0.5\n" for n in ("1_a_1", "1_a_2", "2_a_1")), reports=reports
    )
    first, second, third = table.frame["report"]
    assert first == second and pd.isna(third)
    assert table.notes["cases_without_report"] == 1 and "lungs" not in first
    with pytest.raises(EvaluationError, match="expected the columns"):
        read(PLAIN + ROWS, reports="VolumeName,text\na,b\n")


def test_the_authors_files_are_read_as_before(shared_dir):
    folder = shared_dir / "golden" / "metrics"
    paths = folder / "res.csv", folder / "valid_predicted_labels.csv"
    ours, theirs = read_score_table(*paths).frame, read_published_files(*paths)
    assert len(ours) == len(theirs) == 300
    key = ["recon_id", "finding"]
    theirs = theirs.assign(recon_id=theirs["file_name"].str.removesuffix(".nii.gz"))
    columns = [*key, "organ", "score", "label"]
    pd.testing.assert_frame_equal(
        ours[columns].sort_values(key, ignore_index=True), theirs[columns].sort_values(key, ignore_index=True)
    )
