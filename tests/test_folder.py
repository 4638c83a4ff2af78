"""The folder builder: real CTs, and the many ways in which volumes, masks and reports are told to belong together."""

import csv
import json
import re

import numpy as np
import pyarrow.parquet as pq
import pytest
from tiny_release import REPORT, arrays, save_nifti, write_csv

from data_builders.__main__ import main
from modeling_fvlm.organs import load_organ_set
from modeling_fvlm.processed_split import decode_volume

GRID = ["--spacing", "3", "4", "4", "--margin", "2", "3", "3", "--previews", "0", "--workers", "1"]
REPORT_CELLS = {"findings": REPORT["findings"], "impression": REPORT["impression"]}


def build(out, *arguments) -> int:
    """With the ids of the source, or the tests could not tell one row from another."""
    return main(["folder", "--out", str(out), "--ids", "kept", *map(str, arguments)])


def rows_of(out, split="train") -> dict[str, dict]:
    files = sorted((out / "volumes").glob(f"{split}-*.parquet"))
    return {row["recon_id"]: row for file in files for row in pq.read_table(file).to_pylist()}


def captions_of(row) -> dict[str, tuple[str, bool, bool]]:
    return {c["organ"]: (c["caption"], c["is_abnormal"], c["is_mentioned"]) for c in row["captions"]}


@pytest.fixture(scope="module")
def scans(tmp_path_factory):
    """Four volumes with masks beside them; p_1 and p_10 begin alike."""
    folder = tmp_path_factory.mktemp("scans")
    for seed, name in enumerate(("p_1", "p_2", "p_3", "p_10")):
        volume, mask = arrays(seed)
        save_nifti(volume, folder / "ct" / f"{name}.nii.gz", "RAS")
        save_nifti(mask, folder / "seg" / f"{name}_seg.nii.gz", "LPS")
    return folder


@pytest.fixture
def source(scans):
    return ["--volumes", scans / "ct", "--masks", scans / "seg", *GRID]


@pytest.fixture(scope="module")
def real_split(shared_dir, tmp_path_factory):
    """The three real CTs: RAS and LPS, 3 mm and 1.5 mm, both TotalSegmentator numberings, captions split by hand."""
    folder = tmp_path_factory.mktemp("real")
    cases = []
    for sample, report in zip(json.loads((shared_dir / "ct_samples" / "samples.json").read_text()), (5, 8, 3)):
        for mask in sample["masks"]:
            version = 1 if "v1" in mask["class_numbering"] else 2
            cases.append(
                {
                    "id": f"{sample['id']}_v{version}",
                    "patient_id": sample["id"].split("_")[0],
                    "volume": sample["image"],
                    "mask": mask["file"],
                    "numbering": f"totalsegmentator_v{version}",
                    "report": f"syn_{report:02d}",
                }
            )
    write_csv(folder / "cases.csv", cases)
    arguments = ["--volumes", shared_dir / "ct_samples", "--reports", shared_dir / "reports_samples.json"]
    arguments += ["--table", folder / "cases.csv", "--validation_fraction", 0, "--previews", 0, "--workers", 1]
    assert build(folder / "out", *arguments) == 0
    return rows_of(folder / "out")


def test_real_organ_volumes(real_split, shared_dir):
    """Every organ's volume in ml as the samples' list has it, whatever numbering, orientation and spacing."""
    organs = load_organ_set("body_24").organs
    compared = 0
    for sample in json.loads((shared_dir / "ct_samples" / "samples.json").read_text()):
        for mask in sample["masks"]:
            version = 1 if "v1" in mask["class_numbering"] else 2
            row = real_split[f"{sample['id']}_v{version}"]
            labels = decode_volume(row)[1]
            ml = np.bincount(labels.ravel(), minlength=len(organs) + 1)[1:] * np.prod(row["spacing"]) / 1000
            expected = dict(mask["organ_voxels"])
            if version == 2 and "sacrum" in expected:  # the list has the class, our organ has S1 as well
                expected["sacrum"] += mask["class_voxels"]["vertebrae_S1"]
            for organ, volume in zip(organs, ml):
                listed = expected.get(organ, 0) * np.prod(mask["spacing_mm"]) / 1000
                assert volume == pytest.approx(listed, rel=0.05), f"{row['recon_id']}: {organ}"
                compared += listed > 0
    assert compared > 40
    assert {row["recon_id"] for row in real_split.values()} == set(real_split) and len(real_split) == 4


def test_real_anatomy_lies_where_it_belongs(real_split):
    """In LPS the liver lies at smaller width than the spleen, the stomach before the back muscles, the hip lowest."""
    organs = load_organ_set("body_24").organs

    def center(name, organ):
        return np.argwhere(decode_volume(real_split[name])[1] == organs.index(organ) + 1).mean(axis=0)

    for name in ("abdomen_pelvis_v2", "abdomen_pelvis_v1", "abdomen_slab_v2"):
        assert center(name, "liver")[2] < center(name, "spleen")[2]  # width grows to the left
        assert center(name, "stomach")[1] < center(name, "autochthon")[1]  # height grows to the back
    assert center("abdomen_pelvis_v2", "liver")[0] > center("abdomen_pelvis_v2", "hip")[0]  # depth grows to the head
    chest, lung = "chest_cta_v2", center("chest_cta_v2", "lung")
    assert center(chest, "heart")[2] > lung[2] and center(chest, "trachea")[0] > center(chest, "heart")[0]


def test_real_volumes_stay_in_hu(real_split):
    organs = load_organ_set("body_24").organs
    for name, organ, low, high in (
        ("abdomen_pelvis_v2", "liver", 30, 80),  # native phase
        ("abdomen_pelvis_v1", "kidney", 10, 60),
        ("chest_cta_v2", "lung", -950, -700),
        ("chest_cta_v2", "aorta", 150, 600),  # arterial phase
    ):
        volume, mask = decode_volume(real_split[name])
        assert low < np.median(volume[mask == organs.index(organ) + 1]) < high, (name, organ)


def test_captions_out_of_the_json(real_split, shared_dir):
    gold = {entry["id"]: entry["organs"] for entry in json.loads((shared_dir / "reports_samples.json").read_text())}
    captions = captions_of(real_split["abdomen_pelvis_v2"])
    for organ, (caption, is_abnormal, is_mentioned) in captions.items():
        said = gold["syn_05"].get(organ)
        assert is_mentioned == (said is not None)
        if said:
            assert caption == " ".join(said["impression"] + said["findings"]) and is_abnormal == said["abnormal"]


def test_files_are_found_by_the_id(source, tmp_path):
    """The id p_1 takes p_1_seg and not p_10_seg; a mask beside it is found by its beginning."""
    reports = write_csv(tmp_path / "r.csv", [{"id": f"p_{n}", **REPORT_CELLS} for n in (10, 2, 1, 3)])
    assert build(tmp_path / "out", *source, "--reports", reports, "--validation_fraction", 0) == 0
    rows = rows_of(tmp_path / "out")
    assert list(rows) == ["p_1", "p_2", "p_3", "p_10"]
    for seed, name in enumerate(rows):
        inside = decode_volume(rows[name])[0]
        assert np.array_equal(inside, arrays(seed)[0][1:19, 3:23, 2:30]), name
    assert captions_of(rows["p_1"])["aorta"] == ("Dilated aorta. The aorta measures 5.2 cm.", True, True)


def test_columns_of_other_names(source, tmp_path):
    table = [
        {"Accession": "p_1", "Text": REPORT["findings"], "Conclusion": "", "Person": "x", "label:Nodule": n}
        for n in "1"
    ]
    reports = write_csv(tmp_path / "r.csv", table)
    columns = ["--columns", "id=Accession,findings=Text", "impression=Conclusion", "patient_id=Person"]
    assert build(tmp_path / "out", *source, "--reports", reports, *columns) == 0
    (row,) = rows_of(tmp_path / "out").values()
    assert (row["patient_id"], row["findings"], row["impression"]) == ("x", REPORT["findings"], "")
    assert row["labels"] == [{"finding": "Nodule", "value": 1}]


def values_of(row) -> dict[str, int]:
    return {label["finding"]: label["value"] for label in row["labels"]}


@pytest.mark.parametrize(("unmentioned", "value"), [("unknown", -1), ("absent", 0)])
def test_labels_by_the_words_of_the_report(source, tmp_path, unmentioned, value):
    """All findings of the rules, in the column that a table of labels fills; what the table says stays."""
    english = "A 4 mm nodule in the right lung. No pleural effusion. Possible consolidation."
    german = "Die Lunge ist frei und das Herz ist nicht vergrößert, kein Pleuraerguss und keine Infiltrate."
    own = {"label:Lung nodule": "0", "label:Fracture": "1"}
    rows = [{"id": "p_1", "findings": english, **own}, {"id": "p_2", "findings": german, **own}]
    reports = write_csv(tmp_path / "r.csv", rows)
    options = ["--labels", "ct_rate_18", "--unmentioned", unmentioned, "--validation_fraction", 0]
    assert build(tmp_path / "out", *source, "--reports", reports, *options) == 0
    first, second = (values_of(row) for row in rows_of(tmp_path / "out").values())
    assert len(first) == 19 and first.keys() == second.keys()
    assert (first["Lung nodule"], first["Fracture"]) == (0, 1), "the table's"
    assert (first["Pleural effusion"], first["Consolidation"], first["Emphysema"]) == (0, -1, value)
    assert list(second.values()) == [0, 1, *[-1] * 17], "what cannot be read says nothing by what it leaves out"
    assert "labelled by the words of the report (rules `ct_rate_18`" in (tmp_path / "out" / "README.md").read_text()
    assert build(tmp_path / "out", *source, "--reports", reports, "--validation_fraction", 0) == 2, "another setting"


def test_a_column_that_labels_would_double_is_refused(source, tmp_path, capsys):
    reports = write_csv(tmp_path / "r.csv", [{"id": "p_1", **REPORT_CELLS, "label:lung nodule": "0"}])
    assert build(tmp_path / "out", *source, "--reports", reports, "--labels", "ct_rate_18") == 2
    assert "name the column 'label:lung nodule' as --labels does: 'label:Lung nodule'" in capsys.readouterr().err


def test_labels_of_a_json_are_taken_as_they_are(source, tmp_path, capsys):
    """As `decompose --labels` writes them, or as numbers; what is labelled anywhere is a column of every row."""
    said = {
        "p_1": {**REPORT_CELLS, "labels": {"Lung nodule": "uncertain"}},
        "p_2": {**REPORT_CELLS, "labels": {"Gout": 1}},
    }
    path = tmp_path / "r.json"
    path.write_text(json.dumps(said))
    assert build(tmp_path / "out", *source, "--reports", path, "--validation_fraction", 0) == 0
    assert values_of(rows_of(tmp_path / "out")["p_1"]) == {"Lung nodule": -1, "Gout": -1}
    assert values_of(rows_of(tmp_path / "out")["p_2"]) == {"Lung nodule": -1, "Gout": 1}
    options = ["--labels", "ct_rate_18", "--unmentioned", "absent", "--validation_fraction", 0]
    assert build(tmp_path / "both", *source, "--reports", path, *options) == 0
    first, second = (values_of(rows_of(tmp_path / "both")[name]) for name in ("p_1", "p_2"))
    assert (first["Lung nodule"], first["Gout"], first["Emphysema"], second["Lung nodule"]) == (-1, 0, 0, 1)
    path.write_text(json.dumps({"p_1": {**REPORT_CELLS, "labels": {"Gout": "perhaps"}}}))
    assert build(tmp_path / "no", *source, "--reports", path) == 2
    assert "r.json, p_1: the label 'Gout' is 'perhaps', which is none of ['present'," in capsys.readouterr().err
    assert build(tmp_path / "no", *source, "--reports", path, "--unmentioned", "absent") == 2
    assert "--unmentioned absent is for --labels: give that as well" in capsys.readouterr().err


def test_ready_captions_in_columns(source, tmp_path):
    cells = {
        "caption:lung": "Clear lungs.",
        "caption:liver": "Steatosis.",
        "caption:aorta": "Wide.",
        "abnormal:aorta": "0",
    }
    reports = write_csv(tmp_path / "r.csv", [{"id": "p_1", **cells}])
    assert build(tmp_path / "out", *source, "--reports", reports) == 0
    captions = captions_of(rows_of(tmp_path / "out")["p_1"])
    assert captions["lung"] == ("Clear lungs.", False, True)  # by its words
    assert captions["liver"] == ("Steatosis.", True, True)
    assert captions["aorta"] == ("Wide.", False, True)  # as the table says
    assert captions["heart"] == ("heart shows no significant abnormalities.", False, False)


def test_json_without_a_table(source, tmp_path):
    (tmp_path / "r.json").write_text(json.dumps({"p_2": {"findings": "The liver is enlarged."}}))
    assert build(tmp_path / "out", *source, "--reports", tmp_path / "r.json") == 0
    assert captions_of(rows_of(tmp_path / "out")["p_2"])["liver"] == ("The liver is enlarged.", True, True)


def test_one_text_in_the_json_is_one_sentence(source, tmp_path):
    said = {"organs": {"liver": {"findings": "The liver is enlarged.", "abnormal": True}}}
    (tmp_path / "r.json").write_text(json.dumps({"p_2": said}))
    assert build(tmp_path / "out", *source, "--reports", tmp_path / "r.json") == 0
    assert captions_of(rows_of(tmp_path / "out")["p_2"])["liver"] == ("The liver is enlarged.", True, True)


def test_ids_may_be_names_of_files_wherever_they_stand(source, tmp_path):
    """In a table, a CSV of reports, JSONs of reports and of captions: with or without the ending."""
    said = {"p_2.nii.gz": {"lung": "Clear.", "Findings": "Clear lungs."}, "sub/p_3.nii": {"lung": "Nodule."}}
    (tmp_path / "desc.json").write_text(json.dumps(said))
    (tmp_path / "conc.json").write_text(json.dumps({"p_2": {"lung": "Clear."}, "p_3": {"lung": "Nodule."}}))
    (tmp_path / "all.json").write_text(json.dumps({"p_2.nii.gz": {"lung": "Wide."}}))
    (tmp_path / "r.json").write_text(json.dumps([{"id": "p_2.nii.gz", "findings": "Clear."}]))
    write_csv(tmp_path / "r.csv", [{"id": "p_2.nii.gz", "findings": "Clear."}])
    both = ["--desc_info", tmp_path / "desc.json", "--conc_info", tmp_path / "conc.json"]
    alone = (["--all_info", tmp_path / "all.json"], ["--reports", tmp_path / "r.json"])
    for name in ("p_2", "p_2.nii.gz"):
        table = write_csv(tmp_path / f"{name}.csv", [{"id": name}])
        for number, options in enumerate((both, *alone, ["--reports", tmp_path / "r.csv"])):
            out = tmp_path / f"{name}_{number}"
            assert build(out, *source, "--table", table, *options) == 0
            assert list(rows_of(out)) == ["p_2"], options
    # Without a table, the JSON's own ids are the cases'; a place before the name is the volume's.
    for number, options in enumerate(alone):
        assert build(tmp_path / f"alone_{number}", *source, *options) == 0
        assert list(rows_of(tmp_path / f"alone_{number}")) == ["p_2"]
    table = write_csv(tmp_path / "table.csv", [{"id": "p_1", "report": "p_2.nii.gz"}, {"id": "sub/p_3.nii"}])
    assert build(tmp_path / "out", *source, "--table", table, *both, "--validation_fraction", 0) == 0
    assert list(rows_of(tmp_path / "out")) == ["p_1", "p_3"]


def test_an_id_with_and_without_its_ending_comes_twice(source, tmp_path, capsys):
    (tmp_path / "r.json").write_text(json.dumps({"p_1": {"findings": "A."}, "p_1.nii.gz": {"findings": "B."}}))
    assert build(tmp_path / "out", *source, "--reports", tmp_path / "r.json") == 2
    assert "r.json: the id 'p_1' comes twice" in capsys.readouterr().err


def test_a_rescale_out_of_the_table(scans, source, tmp_path):
    """What a message asks for can be given, and gives the scan as it is."""
    for seed, (name, shift) in enumerate((("raw", 1024), ("twice", -1024))):
        save_nifti(arrays(seed)[0] + np.int16(shift), tmp_path / "ct" / f"{name}.nii.gz")
        save_nifti(arrays(seed)[1], tmp_path / "seg" / f"{name}.nii.gz")
    folders = ["--volumes", tmp_path / "ct", "--masks", tmp_path / "seg", *GRID, "--validation_fraction", 0]
    rows = [{"id": name, **REPORT_CELLS} for name in ("raw", "twice")]
    assert build(tmp_path / "bad", *folders, "--reports", write_csv(tmp_path / "r.csv", rows)) == 1
    manifest = json.loads((tmp_path / "bad" / "manifest.json").read_text())
    columns = {}
    for entry in manifest["skipped"]:
        told = re.search(r"Give rescale_slope (\S+) and rescale_intercept (\S+) \(columns", entry["reason"])
        columns[entry["case"]] = {"rescale_slope": told[1], "rescale_intercept": told[2]}
    assert columns == {
        "raw": {"rescale_slope": "1", "rescale_intercept": "-1024"},
        "twice": {"rescale_slope": "1", "rescale_intercept": "1024"},
    }
    table = write_csv(tmp_path / "mended.csv", [row | columns[row["id"]] for row in rows])
    assert build(tmp_path / "out", *folders, "--reports", table) == 0
    for seed, name in enumerate(columns):
        volume, _ = decode_volume(rows_of(tmp_path / "out")[name])
        assert np.array_equal(volume, arrays(seed)[0][1:19, 3:23, 2:30]), name


def test_a_numbering_of_the_users_own(scans, source, tmp_path):
    """Label 10 is the left upper lobe, 12 the right one; here they are called lung, and the liver is left out."""
    (tmp_path / "mine.yaml").write_text("10: lung\n12: lung\n5: null\n52: aorta\n")
    reports = write_csv(tmp_path / "r.csv", [{"id": "p_1", **REPORT_CELLS}])
    assert build(tmp_path / "out", *source, "--reports", reports, "--numbering", tmp_path / "mine.yaml") == 0
    organs = load_organ_set("body_24").organs
    mask = decode_volume(rows_of(tmp_path / "out")["p_1"])[1]
    assert set(np.unique(mask)) == {0, organs.index("lung") + 1, organs.index("aorta") + 1}


@pytest.mark.parametrize("seed", [0, 1])
def test_splits_are_by_patient_and_hang_on_the_seed(scans, source, tmp_path, seed):
    rows = [
        {"id": name, "patient_id": patient, **REPORT_CELLS}
        for name, patient in zip(("p_1", "p_2", "p_3", "p_10"), "aabc")
    ]
    drawn = []
    for number, table in enumerate((rows, rows[::-1])):  # the order of the table must not matter
        out = tmp_path / f"out{number}"
        reports = write_csv(tmp_path / f"r{number}.csv", table)
        assert build(out, *source, "--reports", reports, "--validation_fraction", 0.34, "--seed", seed) == 0
        train, validation = rows_of(out), rows_of(out, "validation")
        people = [{row["patient_id"] for row in part.values()} for part in (train, validation)]
        assert len(train) + len(validation) == 4 and len(people[1]) == 1 and not people[0] & people[1]
        drawn.append(people[1])
    assert drawn[0] == drawn[1]


def test_splits_named_in_the_table(source, tmp_path):
    rows = [{"id": name, "split": split, **REPORT_CELLS} for name, split in (("p_1", "valid"), ("p_2", "train"))]
    assert build(tmp_path / "out", *source, "--reports", write_csv(tmp_path / "r.csv", rows)) == 0
    assert list(rows_of(tmp_path / "out")) == ["p_2"] and list(rows_of(tmp_path / "out", "validation")) == ["p_1"]


def test_the_csv_reader_takes_what_spreadsheets_write(source, tmp_path):
    """A byte-order mark, semicolons inside quotes, a line break inside a cell, spaces around the names."""
    path = tmp_path / "r.csv"
    with path.open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.writer(file)
        writer.writerows([["id ", " findings"], ["p_1", "The liver is normal;\nthe lungs are clear, too."]])
    assert build(tmp_path / "out", *source, "--reports", path) == 0
    assert rows_of(tmp_path / "out")["p_1"]["findings"] == "The liver is normal;\nthe lungs are clear, too."


@pytest.mark.parametrize(("separator", "name"), [(";", "semicolons"), ("\t", "tabs")])
def test_other_separators_are_seen_and_told(source, tmp_path, capsys, separator, name):
    """The first line decides: a comma in a name or in a text is part of it then."""
    path = tmp_path / "r.csv"
    lines = [["id", "findings", "label:Nodule, solid"], ["p_1", 'The liver, "large", is seen.', "1"]]
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, delimiter=separator).writerows(lines)
    assert build(tmp_path / "out", *source, "--reports", path) == 0
    assert f"r.csv: columns are separated by {name}." in capsys.readouterr().out
    row = rows_of(tmp_path / "out")["p_1"]
    assert row["findings"] == 'The liver, "large", is seen.'
    assert row["labels"] == [{"finding": "Nodule, solid", "value": 1}]


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("id,findings\np_1,Gro\xdfe Leber\n".encode("latin-1"), "line 2 holds the byte 0xdf"),
        (b"\xef\xbb\xbfid,findings\np_1,ok\np_2,\xe9\n", "is not UTF-8: line 3 holds the byte 0xe9"),
        ("id,findings\n".encode("utf-16"), "r.csv is not UTF-8: line 1"),
        (b"PK\x03\x04 and so on", "is a workbook, not a CSV"),
        (b"id,findings,findings\np_1,a,b\n", "r.csv has two columns named 'findings'"),
        (b"id,findings\np_1,Large, and dense.\n", "line 2: 3 cells under 2 columns; put texts that hold commas"),
        (b"id;findings\np_1;Large; and dense.\n", "line 2: 3 cells under 2 columns; put texts that hold semicolons"),
        (b"\n", "r.csv is empty"),
    ],
)
def test_tables_that_cannot_be_read(source, tmp_path, capsys, content, told):
    (tmp_path / "r.csv").write_bytes(content)
    assert build(tmp_path / "out", *source, "--reports", tmp_path / "r.csv") == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("option", ["--reports", "--table"])
def test_a_workbook_is_refused_with_what_to_save(source, tmp_path, capsys, option):
    (tmp_path / "r.xlsx").write_bytes(b"PK\x03\x04")
    assert build(tmp_path / "out", *source, option, tmp_path / "r.xlsx") == 2
    assert "save the sheet as 'CSV UTF-8 (comma delimited)'" in capsys.readouterr().err


def test_an_id_that_comes_twice_in_a_json_is_seen(source, tmp_path, capsys):
    """Python's reader would take the second and say nothing."""
    (tmp_path / "r.json").write_text(
        '{"p_1": {"findings": "A."}, "p_2": {"findings": "B."}, "p_1": {"findings": "C."}}'
    )
    assert build(tmp_path / "out", *source, "--reports", tmp_path / "r.json") == 2
    assert "r.json: the id 'p_1' comes twice" in capsys.readouterr().err


def test_ids_are_hashed_unless_told_otherwise(source, tmp_path, capsys):
    """Neither the split nor what is printed tells an id: not of a row, a skipped case or a file that is not used."""
    rows = [{"id": name, "patient_id": f"Doe_{name}", **REPORT_CELLS} for name in ("p_1", "p_2", "gone_9")]
    arguments = ["--reports", write_csv(tmp_path / "r.csv", rows), "--validation_fraction", 0]
    assert main(["folder", "--out", str(tmp_path / "out"), *map(str, [*source, *arguments])]) == 0
    out = capsys.readouterr().out
    assert "2 files and folders in --volumes belong to no row of r.csv" in " ".join(out.split())
    told = f"before training, look at `python -m data_builders inspect {tmp_path / 'out'}`"
    assert told in out, "no picture was drawn"
    for path in (path for path in (tmp_path / "out").rglob("*") if path.is_file()):
        out += path.read_bytes().decode("latin-1")
    for name in ("p_1", "p_2", "p_3", "p_10", "gone_9", "Doe"):
        assert name not in out
    rows, manifest = rows_of(tmp_path / "out"), json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert len(rows) == 2 and all(row["patient_id"] != row["recon_id"] for row in rows.values())
    (skipped,) = manifest["skipped"]
    assert "volume file is missing" in skipped["reason"] and skipped["case"] not in rows


def test_a_row_without_ready_captions_has_its_report_decomposed(source, tmp_path):
    rows = [{"id": "p_1", "caption:lung": "Clear."}, {"id": "p_2", "caption:lung": "", **REPORT_CELLS}]
    reports = write_csv(tmp_path / "r.csv", rows)
    assert build(tmp_path / "out", *source, "--reports", reports, "--validation_fraction", 0) == 0
    assert captions_of(rows_of(tmp_path / "out")["p_2"])["aorta"][1:] == (True, True)


@pytest.mark.parametrize("has_patients", [True, False])
def test_splits_by_id_and_a_missing_margin_are_told(source, tmp_path, capsys, has_patients):
    """One tenth of two patients is still one; without patient_id, or a margin, the whole split carries a warning."""
    rows = [{"id": name, **({"patient_id": name} if has_patients else {}), **REPORT_CELLS} for name in ("p_1", "p_2")]
    reports = write_csv(tmp_path / "r.csv", rows)
    margin = ["--margin", 2, 3, 3] if has_patients else ["--margin", 0, 3, 3]
    assert build(tmp_path / "out", *source, *margin, "--reports", reports) == 0
    assert len(rows_of(tmp_path / "out")) == len(rows_of(tmp_path / "out", "validation")) == 1
    told = [entry["warning"] for entry in json.loads((tmp_path / "out" / "manifest.json").read_text())["warnings"]]
    card = (tmp_path / "out" / "README.md").read_text()
    assert ("Splits are by patient." in card, "Splits are by id" in card) == (has_patients, not has_patients)
    assert ("splits are by id" in " ".join(capsys.readouterr().out.split())) != has_patients
    if has_patients:
        assert told == []
    else:
        assert "no column patient_id" in told[0] and "the margin is 0 along depth:" in told[1] and len(told) == 2


def test_numberings_of_one_file_name(source, tmp_path):
    """Two files of one name in two folders stay apart."""
    rows = [{"id": f"p_{n}", "numbering": f"{n}/mine.yaml", **REPORT_CELLS} for n in (1, 2)]
    for number, organ in ((1, "aorta"), (2, "heart")):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "mine.yaml").write_text(f"10: lung\n12: lung\n5: null\n52: {organ}\n")
    reports = write_csv(tmp_path / "r.csv", rows)
    assert build(tmp_path / "out", *source, "--reports", reports, "--validation_fraction", 0) == 0
    organs = load_organ_set("body_24").organs
    for name, organ in (("p_1", "aorta"), ("p_2", "heart")):
        assert organs.index(organ) + 1 in decode_volume(rows_of(tmp_path / "out")[name])[1]
