"""The CSV for correction by hand: what is not touched comes back as it was, and every wrong cell is named."""

import copy
import csv
import io
import json
from pathlib import Path

import pytest

from data_builders.__main__ import main
from data_builders.correction_csv import COLUMNS, guarded, read_correction_csv, unguarded, write_correction_csv
from data_builders.decomposition_files import organs_of, read_decompositions

GOLD = Path(__file__).parent / "data" / "reports_gold" / "tuning"
ORGANS = ("lung", "heart", "liver")
FINDINGS = (
    "- 3 mm nodule on the left.\nHeart normal; no effusion. Normal.\nLiver: normal. =SUM(A1) artefact. Thyroid nodule."
)
ENTRY = {
    "id": "r1",
    "findings": FINDINGS,
    "impression": "Lung nodule.",
    "method": "rules",
    "organs": {
        "lung": {"findings": ["3 mm nodule on the left."], "impression": ["Lung nodule."], "abnormal": True},
        "heart": {"findings": ["Heart normal; no effusion."], "impression": [], "abnormal": False},
        "liver": {"findings": ["Liver: normal.", "=SUM(A1) artefact."], "impression": [], "abnormal": True},
    },
}
OTHER = {"id": "r2", "findings": "Lungs clear.", "impression": "", "organs": {}}


def rows_in(path: Path) -> list[dict]:
    return list(csv.DictReader(io.StringIO(path.read_text(encoding="utf-8-sig"), newline="")))


def save(path: Path, rows: list[dict], separator: str = ",") -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, delimiter=separator)
        writer.writeheader()
        writer.writerows(rows)
    return path


@pytest.fixture
def rows(tmp_path):
    assert write_correction_csv(tmp_path / "c.csv", [ENTRY, OTHER], ORGANS) == 8
    return rows_in(tmp_path / "c.csv")


def test_a_row_for_every_sentence_and_organ(rows):
    seen = [(row["section"], row["number"], row["sentence"], row["organ"], row["abnormal"]) for row in rows]
    assert seen == [
        ("findings", "1", "3 mm nodule on the left.", "lung", "yes"),
        ("findings", "2", "Heart normal; no effusion.", "heart", "no"),
        ("findings", "3", "Normal.", "", ""),
        ("findings", "4", "Liver: normal.", "liver", "yes"),
        ("findings", "5", "'=SUM(A1) artefact.", "liver", "yes"),
        ("findings", "6", "Thyroid nodule.", "", ""),
        ("impression", "1", "Lung nodule.", "lung", "yes"),
        ("findings", "1", "Lungs clear.", "", ""),
    ]
    assert [row["id"] for row in rows] == ["r1"] * 7 + ["r2"] and not any(row["note"] for row in rows)


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_what_nobody_touched_comes_back_as_it_was(tmp_path, rows, separator):
    path = save(tmp_path / "again.csv", [*rows, dict.fromkeys(COLUMNS, "")], separator)
    assert read_correction_csv(path, [ENTRY, OTHER], ORGANS) == ([ENTRY, OTHER], 0)


def test_gold_reports_come_back_as_they_were(tmp_path):
    gold = read_decompositions(GOLD)
    _, organs = organs_of(gold, None)
    assert write_correction_csv(tmp_path / "c.csv", gold, organs) > 500
    back, num_left = read_correction_csv(tmp_path / "c.csv", gold, organs)
    assert back == gold and num_left == 0


def test_corrections_arrive(tmp_path, rows):
    rows[0]["organ"], rows[0]["abnormal"] = "Liver", "TRUE"  # moved
    rows[1]["abnormal"] = "1"  # flag turned
    rows[5] |= {"organ": "heart", "abnormal": "yes"}  # a sentence that went nowhere
    rows.append(rows[3] | {"organ": "lung"})  # copied to a second organ, out of order
    rows[6]["organ"] = rows[6]["abnormal"] = ""  # taken away
    del rows[4]
    rows[-2] |= {"organ": "lung", "abnormal": "no"}  # of r2
    rows.reverse()  # the numbers tell the order, whatever the sheet was sorted by
    corrected, num_left = read_correction_csv(save(tmp_path / "c.csv", rows), [ENTRY, OTHER], ORGANS)
    assert num_left == 0 and [entry["corrected"] for entry in corrected] == [True, True]
    assert corrected[0]["organs"] == {
        "lung": {"findings": ["Liver: normal."], "impression": [], "abnormal": True},
        "heart": {"findings": ["Heart normal; no effusion.", "Thyroid nodule."], "impression": [], "abnormal": True},
        "liver": {"findings": ["3 mm nodule on the left.", "Liver: normal."], "impression": [], "abnormal": True},
    }
    assert corrected[0]["method"] == "rules" and corrected[0]["findings"] == FINDINGS
    assert corrected[1]["organs"]["lung"]["abnormal"] is False


def test_a_sentence_may_be_cut_in_two(tmp_path, rows):
    rows[1:2] = [
        rows[1] | {"sentence": "Heart normal;"},
        rows[1] | {"sentence": "no effusion.", "organ": "lung", "abnormal": "yes"},
    ]
    organs = read_correction_csv(save(tmp_path / "c.csv", rows), [ENTRY, OTHER], ORGANS)[0][0]["organs"]
    assert organs["heart"]["findings"] == ["Heart normal;"]
    assert organs["lung"]["findings"] == ["3 mm nodule on the left.", "no effusion."]


def test_a_report_without_rows_stays_and_one_without_organs_is_empty(tmp_path, rows):
    rows = [row for row in rows if row["id"] == "r1"]
    for row in rows:
        row["organ"] = row["abnormal"] = ""
    corrected, num_left = read_correction_csv(save(tmp_path / "c.csv", rows), [ENTRY, OTHER], ORGANS)
    assert num_left == 1 and corrected[1] == OTHER
    assert corrected[0]["organs"] == {} and corrected[0]["corrected"]


@pytest.mark.parametrize(
    ("place", "change", "message"),
    [
        (0, {"id": "r3"}, "line 2, column id: 'r3' is no report of the split"),
        (1, {"section": "finding"}, "line 3, column section: 'finding' is neither"),
        (1, {"number": "two"}, "line 3, column number: 'two' is no place"),
        (1, {"number": "0"}, "line 3, column number: '0' is no place"),
        (1, {"sentence": "Heart is normal."}, "line 3, column sentence: 'Heart is normal.' does not stand verbatim"),
        (6, {"sentence": "Normal."}, "line 8, column sentence: 'Normal.' does not stand verbatim in the impression"),
        (1, {"sentence": ""}, "line 3, column sentence"),
        (3, {"organ": "lver"}, "line 5, column organ: 'lver' is not in the organ set.*nearest: 'liver'"),
        (3, {"abnormal": "maybe"}, "line 5, column abnormal: 'maybe' is neither yes nor no"),
        (3, {"abnormal": ""}, "line 5, column abnormal: '' is neither yes nor no"),
        (3, {"abnormal": "no"}, "line 6, column abnormal: 'yes' for liver of 'r1', but line 5 says otherwise"),
        (2, {"abnormal": "yes"}, "line 4, column abnormal: 'yes' stands in a row without an organ"),
    ],
)
def test_wrong_cells_are_named(tmp_path, rows, place, change, message):
    rows[place] |= change
    with pytest.raises(ValueError, match=message):
        read_correction_csv(save(tmp_path / "c.csv", rows), [ENTRY, OTHER], ORGANS)


def test_rows_that_stand_twice_and_missing_columns_are_named(tmp_path, rows):
    with pytest.raises(ValueError, match="line 10: the same row stands in line 2; delete one"):
        read_correction_csv(save(tmp_path / "c.csv", [*rows, rows[0]]), [ENTRY, OTHER], ORGANS)
    (tmp_path / "d.csv").write_text("id,section,number,sentence,organs,abnormal\n")
    with pytest.raises(ValueError, match="no column 'organ'.*nearest: 'organs'"):
        read_correction_csv(tmp_path / "d.csv", [ENTRY], ORGANS)


@pytest.mark.parametrize("cell", ["=1+1", "+1", "-1", "@SUM(A1)", "'=1", "''-x", "＝1", "'tis", "plain", "", "=", "'"])
def test_formulas_are_guarded_and_come_back(cell):
    assert guarded(cell)[:1] not in ("=", "+", "-", "@", "＝")
    assert unguarded(guarded(cell)) == cell


def test_no_cell_of_the_file_can_be_run(tmp_path):
    evil = ["=cmd|' /C calc'!A0", "+1", "-2", "@SUM(A1)", "\t=1", "\r=2", "x;=3", 'x",=4', "＝5"]
    entry = {"id": "=6", "findings": "\n".join(f"{text} lung." for text in evil), "impression": "", "organs": {}}
    entry["organs"]["lung"] = {"findings": [f"{text} lung." for text in evil[:4]], "impression": [], "abnormal": True}
    write_correction_csv(tmp_path / "c.csv", [entry], ("lung",))
    text = (tmp_path / "c.csv").read_text(encoding="utf-8-sig")
    cells = [cell for row in csv.reader(io.StringIO(text)) for cell in row]
    assert sum("lung." in cell for cell in cells) >= 8  # the line in lower case is joined to the one before
    assert not any(cell.lstrip()[:1] in ("=", "+", "-", "@", "＝") for cell in cells)
    assert all(line.startswith('"') and line.endswith('"') for line in text.splitlines()), "each cell in quotes"
    back, _ = read_correction_csv(tmp_path / "c.csv", [entry], ("lung",))
    assert back == [entry]


def test_control_characters_do_not_break_the_rows(tmp_path):
    entry = copy.deepcopy(OTHER) | {"findings": "Lungs\x00 clear.\x0b\x0cHeart\u2028 normal.\x85Liver\x1b[31m normal."}
    entry["organs"] = {"lung": {"findings": ["Lungs\x00 clear."], "impression": [], "abnormal": False}}
    write_correction_csv(tmp_path / "c.csv", [entry], ORGANS)
    assert not any(ord(letter) < 32 and letter not in "\r\n" for letter in (tmp_path / "c.csv").read_text())
    organs = read_correction_csv(tmp_path / "c.csv", [entry], ORGANS)[0][0]["organs"]
    assert organs["lung"]["findings"] == ["Lungs clear."]


def test_sentences_that_are_not_in_the_report_have_a_note_and_are_refused(tmp_path):
    entry = copy.deepcopy(ENTRY)
    entry["organs"]["lung"]["findings"].append("Honeycombing.")
    entry["uncertain"] = ["Heart normal; no effusion."]
    write_correction_csv(tmp_path / "c.csv", [entry], ORGANS)
    notes = {row["sentence"]: row["note"] for row in rows_in(tmp_path / "c.csv") if row["note"]}
    assert notes.pop("Honeycombing.").startswith("not in the report") and notes == {
        "Heart normal; no effusion.": "uncertain"
    }
    with pytest.raises(ValueError, match="column sentence: 'Honeycombing.'"):
        read_correction_csv(tmp_path / "c.csv", [entry], ORGANS)


def test_the_command_there_and_back(tmp_path, capsys):
    split, out = tmp_path / "split.json", tmp_path / "out.json"
    bare = [{key: one[key] for key in ("id", "organs")} for one in (ENTRY, OTHER)]
    split.write_text(json.dumps(bare))
    (tmp_path / "reports.json").write_text(json.dumps([ENTRY, OTHER]))
    command = ["correct", "--split", str(split), "--organs", "body_24"]
    assert main([*command, "--csv", str(tmp_path / "c.csv")]) == 2
    assert "'r1' has no text in split.json. Give --reports" in capsys.readouterr().err
    command += ["--reports", str(tmp_path / "reports.json")]
    assert main([*command, "--csv", str(tmp_path / "c.csv")]) == 0
    assert main([*command, "--csv", str(tmp_path / "c.csv")]) == 2, "corrections are not written over"
    assert main([*command, "--corrected", str(tmp_path / "c.csv")]) == 2
    text = (tmp_path / "c.csv").read_text(encoding="utf-8-sig")
    (tmp_path / "c.csv").write_text(text.replace('"heart","no"', '"heart","yes"'), encoding="utf-8-sig")
    assert main([*command, "--corrected", str(tmp_path / "c.csv"), "--out", str(out)]) == 0
    told = capsys.readouterr().out
    assert "1 report corrected, 0 without a row" in told and "8 rows of 2 reports" in told
    assert [one["organs"].get("heart", {}).get("abnormal") for one in json.loads(out.read_text())] == [True, None]
