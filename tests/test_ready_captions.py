"""Captions that are ready by organ: the files of the published release and its fork, read as they are."""

import argparse
import json

import pytest
from test_folder import captions_of, rows_of
from tiny_release import REPORT, arrays, save_nifti, write_csv

from data_builders.__main__ import main
from data_builders.build import add_build_arguments, settings_from_args
from data_builders.cases import OrganText
from data_builders.decompose import caption_rows
from data_builders.folder_reports import read_all_info, read_ready_captions
from modeling_fvlm.captions import is_abnormal_caption, normal_caption

DESC = {
    "train_1_a": {
        "Findings": "Lungs are clear. Heart is large.",
        "lung": "Lungs are clear.",
        "heart": "Heart is large.",
    },
    "train_2_a": {"Findings": "A 4 mm nodule.", "lung": "A 4 mm nodule.", "bronchie": "Wide.", "aorta": None},
    "train_3_a": {},
}
CONC = {
    "train_1_a": {"Conclusion": "Cardiomegaly.", "heart": "Cardiomegaly."},
    "train_2_a": {"Conclusion": "", "lung": " ", "oesophagus": "Thick."},
}


def settings_of(organs="chest_4", preprocessing="standard"):
    parser = argparse.ArgumentParser()
    add_build_arguments(parser, organs=organs)
    return settings_from_args(parser.parse_args(["--out", "x", "--preprocessing", preprocessing]), "folder")


def write_json(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


@pytest.fixture
def files(tmp_path):
    return write_json(tmp_path / "desc_info.json", DESC), write_json(tmp_path / "conc_info.json", CONC)


def test_an_organ_is_abnormal_if_the_impression_speaks_of_it(files, capsys):
    """By the published rule: the findings' nodule is not, whatever its words; an entry that holds nothing is none."""
    captions = read_ready_captions(*files, settings_of().organ_set.organs)
    assert captions == {
        "train_1_a": {
            "lung": OrganText((), ("Lungs are clear.",), False),
            "heart": OrganText(("Cardiomegaly.",), ("Heart is large.",), True),
        },
        "train_2_a": {"lung": OrganText((" ",), ("A 4 mm nodule.",), False)},
        "train_3_a": {},
    }
    printed = " ".join(capsys.readouterr().out.split())
    assert "left out what is said of organs outside of the set: bronchie in 1 scan, oesophagus in 1 scan" in printed
    assert "is 'oesophagus' spelt as in the set?; nearest: 'esophagus'" in printed


def test_every_published_caption_and_flag(shared_dir, tmp_path):
    """Under the published preparation, from the files of the published code, apostrophes, empty entries and all."""
    golden = json.loads((shared_dir / "golden" / "captions" / "outputs.json").read_text(encoding="utf-8"))
    paths = [write_json(tmp_path / f"{name}.json", golden[name]) for name in ("desc_info", "conc_info")]
    settings = settings_of(preprocessing="published")
    organs = settings.organ_set.organs
    captions = read_ready_captions(*paths, organs)
    assert captions.keys() == golden["annotation"].keys()
    fork = read_all_info(write_json(tmp_path / "all_info.json", golden["annotation"]), organs)
    for scan, published in golden["annotation"].items():
        for texts in (captions[scan], fork[scan].organ_texts):
            rows = caption_rows("", "", organs, settings.lexicon, texts, published=True)
            assert {row["organ"]: row["caption"] for row in rows} == published
            flags = {row["organ"]: row["is_abnormal"] for row in rows}
            assert flags == {organ: is_abnormal_caption(published[organ], organ) for organ in organs}
    assert any(is_abnormal_caption(text, organ) for of in golden["annotation"].values() for organ, text in of.items())


def test_the_fault_of_the_published_rule_is_left_to_the_published_preparation(shared_dir, tmp_path):
    golden = json.loads((shared_dir / "golden" / "captions" / "outputs.json").read_text(encoding="utf-8"))
    paths = [write_json(tmp_path / f"{name}.json", golden[name]) for name in ("desc_info", "conc_info")]
    settings = settings_of()
    organs = settings.organ_set.organs
    fork = read_all_info(write_json(tmp_path / "all_info.json", golden["annotation"]), organs)
    assert golden["annotation"]["train_4_a"]["lung"] == "."
    for texts in (read_ready_captions(*paths, organs)["train_4_a"], fork["train_4_a"].organ_texts):
        lung = caption_rows("", "", organs, settings.lexicon, texts)[organs.index("lung")]
        assert lung["caption"] == normal_caption("lung") and not lung["is_abnormal"] and not lung["is_mentioned"]


def test_the_fork_glues_both_sections(tmp_path):
    said = {
        "heart": "Cardiomegaly. Heart is large.",
        "lung": normal_caption("lung") + "Lungs are clear.",
        "aorta": normal_caption("aorta"),
        "bronchie": "Wide.",
    }
    report = read_all_info(write_json(tmp_path / "all_info.json", {"a": said}), ("lung", "heart", "aorta"))["a"]
    assert (report.findings, report.impression) == ("", "")
    assert report.organ_texts == {
        "lung": OrganText((), ("Lungs are clear.",), False),
        "heart": OrganText(("Cardiomegaly. Heart is large.",), (), True),
    }


@pytest.fixture(scope="module")
def scans(tmp_path_factory):
    """Reconstructions as CT-RATE names them; the captions know scans only."""
    folder = tmp_path_factory.mktemp("scans")
    for seed, name in enumerate(("train_1_a_1", "train_1_a_2", "train_2_a_1", "train_3_a_1", "train_4_a_1")):
        volume, mask = arrays(seed)
        save_nifti(volume, folder / "ct" / f"{name}.nii.gz")
        save_nifti(mask, folder / "seg" / f"{name}.nii.gz")
    return ["--volumes", folder / "ct", "--masks", folder / "seg"]


def build(out, *arguments) -> int:
    more = ["--ids", "kept", "--organs", "chest_4", "--spacing", "3", "4", "4", "--previews", "0", "--workers", "1"]
    return main(["folder", "--out", str(out), "--validation_fraction", "0", *more, *map(str, arguments)])


def test_a_build_from_the_two_files_alone(scans, files, tmp_path):
    assert build(tmp_path / "out", *scans, "--desc_info", files[0], "--conc_info", files[1]) == 0
    rows = rows_of(tmp_path / "out")
    assert list(rows) == ["train_2_a", "train_3_a"]
    assert rows["train_2_a"]["findings"] == "A 4 mm nodule." and rows["train_2_a"]["impression"] == ""
    captions = captions_of(rows["train_2_a"])
    assert captions["lung"] == ("A 4 mm nodule.", False, True)
    assert captions["heart"] == (normal_caption("heart"), False, False)
    assert all(
        caption == (normal_caption(organ), False, False) for organ, caption in captions_of(rows["train_3_a"]).items()
    )
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    (skipped,) = manifest["skipped"]
    assert skipped["case"] == "train_1_a"
    assert skipped["reason"].startswith("several files fit as volume: ['train_1_a_1.nii.gz', 'train_1_a_2.nii.gz']")
    assert manifest["settings"]["options"]["ready_captions"] == ["desc_info.json", "conc_info.json"]


def test_a_table_says_which_scan_a_reconstruction_is_of(scans, files, tmp_path):
    """The whole report may come from the table; the captions are those of the files."""
    table = [
        {"id": "train_1_a_1", "scan_id": "train_1_a", **REPORT},
        {"id": "train_1_a_2", "scan_id": "train_1_a", "findings": "", "impression": ""},
        {"id": "train_2_a_1", "scan_id": "other", "report": "train_2_a", **REPORT},
        {"id": "train_4_a_1", "scan_id": "train_4_a", **REPORT},
    ]
    table = write_csv(tmp_path / "cases.csv", [{"patient_id": row["id"][:7], **row} for row in table])
    ready = ["--desc_info", files[0], "--conc_info", files[1]]
    assert build(tmp_path / "out", *scans, "--table", table, *ready) == 0
    rows = rows_of(tmp_path / "out")
    assert list(rows) == ["train_1_a_1", "train_1_a_2", "train_2_a_1"]
    for name, findings in (("train_1_a_1", REPORT["findings"]), ("train_1_a_2", DESC["train_1_a"]["Findings"])):
        assert rows[name]["findings"] == findings
        assert captions_of(rows[name])["heart"] == ("Cardiomegaly. Heart is large.", True, True)
        assert captions_of(rows[name])["aorta"][1:] == (False, False), "the report's own aorta is not looked at"
    (skipped,) = json.loads((tmp_path / "out" / "manifest.json").read_text())["skipped"]
    assert skipped["reason"].startswith("there are no captions of 'train_4_a_1' in desc_info.json and conc_info.json")


def test_a_build_from_the_fork(scans, tmp_path):
    content = {"train_2_a": {"lung": "Nodule."}, "train_3_a": {"lung": normal_caption("lung")}}
    path = write_json(tmp_path / "all_info.json", content)
    assert build(tmp_path / "out", *scans, "--all_info", path) == 0
    rows = rows_of(tmp_path / "out")
    assert captions_of(rows["train_2_a"])["lung"] == ("Nodule.", True, True)
    assert captions_of(rows["train_3_a"])["lung"] == (normal_caption("lung"), False, False)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ([], 'desc_info.json is not of the form {"scan": {"organ": "text"}}'),
        ({"a": "Clear."}, "desc_info.json, a: is not of the form"),
        ({"a": {"lung": ["Clear."]}}, "a: what is said of 'lung' is no text, but a list"),
        ({"a": {"Findings": "x", "lungs": "Clear."}}, "not one of the organs ['lungs'] is in the organ set"),
        ({"a": {"Findings": "x", "lungs": "Clear."}}, "nearest: 'lung'. Give the set they were made for with --organs"),
    ],
)
def test_files_of_another_form(scans, tmp_path, capsys, content, told):
    desc, conc = write_json(tmp_path / "desc_info.json", content), write_json(tmp_path / "conc_info.json", {"a": {}})
    assert build(tmp_path / "out", *scans, "--desc_info", desc, "--conc_info", conc) == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_impossible_combinations(scans, files, tmp_path, capsys):
    own = write_csv(tmp_path / "r.csv", [{"id": "train_2_a_1", "caption:lung": "Clear."}])
    desc, conc = files
    for arguments, told in (
        (["--desc_info", desc], "--desc_info and --conc_info belong together: give --conc_info as well"),
        (["--conc_info", conc], "belong together: give --desc_info as well"),
        (["--desc_info", desc, "--conc_info", conc, "--all_info", conc], "give the one or the others"),
        (["--desc_info", desc, "--conc_info", tmp_path / "no.json"], "--conc_info: there is no file"),
        (
            ["--desc_info", desc, "--conc_info", conc, "--reports", own],
            "r.csv has columns caption:ORGAN beside desc_in",
        ),
        ([], "give --reports (CSV or JSON), --table (CSV)"),
    ):
        assert build(tmp_path / "out", *scans, *arguments) == 2
        assert told in capsys.readouterr().err
    (tmp_path / "twice.json").write_text('{"a": {"lung": "x"}, "a": {"lung": "y"}}')
    assert build(tmp_path / "out", *scans, "--all_info", tmp_path / "twice.json") == 2
    assert "twice.json: the id 'a' comes twice" in capsys.readouterr().err
