"""The published form of splits by organ: what is written comes back, and what the form cannot carry is counted."""

import copy
import json
from pathlib import Path

import pytest

from data_builders.decomposition_files import read_decompositions
from data_builders.folder_reports import read_ready_reports
from data_builders.published_form import read_published, write_published
from modeling_fvlm.organs import load_organ_set

GOLD = Path(__file__).parent / "data" / "reports_gold" / "tuning"


@pytest.fixture
def entries():
    return read_decompositions(GOLD)


def written(tmp_path, entries):
    result = write_published(tmp_path, iter(entries))
    return result, tmp_path / "desc_info.json", tmp_path / "conc_info.json"


def test_the_files_are_in_the_published_form(tmp_path, entries):
    result, desc, conc = written(tmp_path, entries)
    said, concluded = (json.loads(path.read_text(encoding="utf-8")) for path in (desc, conc))
    assert list(said) == list(concluded) == [entry["id"] for entry in entries] and result.num_reports == len(entries)
    for entry in entries:
        one = dict(said[entry["id"]])
        assert one.pop("Findings") == entry["findings"]
        spoken = {organ: " ".join(text["findings"]) for organ, text in entry["organs"].items() if text["findings"]}
        assert one == spoken and (spoken or not entry["findings"])
        assert concluded[entry["id"]]["Conclusion"] == entry["impression"]
    assert any("liver" not in one for one in said.values()), "an organ not spoken of has no entry"
    assert not list(tmp_path.glob("*.tmp"))


def test_what_is_written_comes_back(tmp_path, entries):
    result, desc, conc = written(tmp_path, entries)
    back = read_published(desc, conc)
    flags, same_cut, cuts = 0, 0, 0
    for entry, other in zip(entries, back):
        assert {**entry, "organs": 0, "style": 0} == {**other, "organs": 0, "style": 0}
        assert entry["organs"].keys() == other["organs"].keys()
        for organ, said in entry["organs"].items():
            for section in ("findings", "impression"):
                got = other["organs"][organ][section]
                assert " ".join(got) == " ".join(said[section])
                same_cut, cuts = same_cut + (got == said[section]), cuts + 1
            assert other["organs"][organ]["abnormal"] == bool(said["impression"])
            flags += other["organs"][organ]["abnormal"] != said["abnormal"]
    assert flags == result.num_flags_lost > 0
    assert same_cut / cuts > 0.98
    again = tmp_path / "again"
    assert write_published(again, back).num_flags_lost == 0, "the second time there is nothing left to lose"
    for path in (desc, conc):
        assert json.loads((again / path.name).read_text()) == json.loads(path.read_text())


def test_the_folder_is_read_as_a_split_is(tmp_path, entries):
    written(tmp_path, entries)
    assert [entry["id"] for entry in read_decompositions(tmp_path)] == [entry["id"] for entry in entries]


def test_the_builder_reads_the_same_captions(tmp_path, entries):
    _, desc, conc = written(tmp_path, entries)
    organs = load_organ_set("chest_4").organs
    reports = read_ready_reports(desc, conc, organs)
    for entry in entries:
        report = reports[entry["id"]]
        assert (report.findings, report.impression) == (entry["findings"], entry["impression"])
        assert set(report.organ_texts) == set(entry["organs"]) & set(organs)
        for organ, text in report.organ_texts.items():
            assert " ".join(text.findings) == " ".join(entry["organs"][organ]["findings"])
            assert " ".join(text.impression) == " ".join(entry["organs"][organ]["impression"])


def test_sentences_without_a_full_stop_come_back_as_they_were(tmp_path):
    said = {"findings": ["Lungs clear", "No nodule, 3.5 mm or larger"], "impression": [], "abnormal": False}
    entry = {"id": "a", "findings": "Lungs clear\nHeart: normal\nNo nodule, 3.5 mm or larger", "impression": "",
             "organs": {"lung": said}}  # fmt: skip
    _, desc, conc = written(tmp_path, [entry])
    assert read_published(desc, conc) == [entry]


def test_blank_organs_have_no_entry_and_one_organ_can_be_asked_for(tmp_path, entries):
    entries[0]["organs"] = {"lung": {"findings": [" "], "impression": [], "abnormal": False}}
    _, desc, conc = written(tmp_path, entries)
    back = read_published(desc, conc, ["lung"])
    assert back[0]["organs"] == {} and {organ for entry in back for organ in entry["organs"]} == {"lung"}


def test_nothing_is_left_behind_when_an_id_comes_twice(tmp_path, entries):
    with pytest.raises(ValueError, match="'tuning_02' comes twice"):
        write_published(tmp_path, [*entries, copy.deepcopy(entries[0])])
    assert not list(tmp_path.iterdir())
    entries[0]["organs"]["Findings"] = {"findings": ["x"], "impression": [], "abnormal": False}
    with pytest.raises(ValueError, match="'Findings' is no organ"):
        write_published(tmp_path, entries)
    assert not list(tmp_path.iterdir())


def test_an_empty_split_is_an_empty_object(tmp_path):
    assert written(tmp_path, [])[0].num_reports == 0
    assert json.loads((tmp_path / "desc_info.json").read_text()) == {}
