"""Reports out of the files that people have: nothing is lost without a word, and what is wrong is named by its line."""

import json
import re
from pathlib import Path

import pytest

from data_builders.report_files import open_reports

LIVER = {"findings": "The liver is enlarged.", "impression": "Hepatomegaly."}


def read(path: Path, content: str | bytes, *columns: str) -> list[tuple]:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return [tuple(report) for report in open_reports(path, columns)]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", "id,findings,impression\n1,The liver is enlarged.,Hepatomegaly.\n"),
        ("a.csv", "\ufeffid;findings;impression\r\n1;The liver is enlarged.;Hepatomegaly.\r\n;;\r\n\r\n"),
        ("a.csv", "id,findings,impression\r1,The liver is enlarged.,Hepatomegaly.\r"),  # of old spreadsheet programs
        ("a.csv", ",id,findings,impression,\n0,1,The liver is enlarged.,Hepatomegaly.,,\n"),  # an index, empty cells
        ("a.tsv", "VolumeName\tFindings_EN\tImpressions_EN\n1\tThe liver is enlarged.\tHepatomegaly.\n"),
        ("a.json", json.dumps([{"id": 1, **LIVER}])),
        ("a.json", json.dumps({"1": LIVER})),
        ("a.json", json.dumps([{"VolumeName": "1", "Findings_EN": LIVER["findings"], "Conclusion": "Hepatomegaly."}])),
        ("a.jsonl", "\n" + json.dumps({"id": "1", **LIVER}) + "\n\n"),
        ("a.jsonl", json.dumps({"report_id": "1", "Findings": LIVER["findings"], "Impression": "Hepatomegaly."})),
    ],
)
def test_forms_and_names(tmp_path, name, content):
    assert read(tmp_path / name, content) == [("1", *LIVER.values(), True)]


@pytest.mark.parametrize("ending", ["csv", "json", "jsonl"])
def test_a_column_of_no_name_is_no_impression(tmp_path, ending):
    contents = {"csv": ",id,findings\n7,1,Liver.\n", "json": '[{"": "7", "id": "1", "findings": "Liver."}]'}
    contents["jsonl"] = contents["json"][1:-1]
    assert read(tmp_path / f"a.{ending}", contents[ending]) == [("1", "Liver.", "", True)]


def test_a_report_without_an_id_is_named_by_its_place(tmp_path):
    rows = read(tmp_path / "a.csv", 'id,findings\n ,"Liver\nlarge."\n,nan\n')
    assert rows == [("line 3", "Liver\nlarge.", "", False), ("line 4", "", "", False)]
    assert [row[0] for row in read(tmp_path / "a.json", '[{"id": null, "findings": "x"}]')] == ["entry 0"]


def test_a_folder_of_text_files(tmp_path):
    for name, text in (("b.txt", "FINDINGS: Liver."), ("a.TXT", "\ufeffSpleen."), ("notes.md", "mine")):
        (tmp_path / name).write_text(text, encoding="utf-8")
    assert [tuple(report) for report in open_reports(tmp_path)] == [
        ("a", "Spleen.", "", True),
        ("b", "FINDINGS: Liver.", "", True),
    ]
    (tmp_path / "c.txt").write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match="c.txt is not UTF-8"):
        list(open_reports(tmp_path))
    (tmp_path / "c.txt").write_bytes("Aorta.".encode("utf-16-le"))
    with pytest.raises(ValueError, match="c.txt is no text in UTF-8 but in UTF-16"):
        list(open_reports(tmp_path))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no .txt"):
        open_reports(tmp_path / "empty")


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("a.csv", "", "the first line of a.csv is empty"),
        ("a.csv", "id,findings,findings\n1,x,y\n", "two columns named 'findings'"),
        ("a.csv", "id,findings\n1,no mass, no node\n", 'line 2: 3 cells under 2 columns.*"quotes"'),
        ("a.csv", 'id,findings\n1,"x"\n2,"Liver\n3,"" y\n4,z\n', "opens in line 3 and never closes"),
        ("a.csv", "id,findings\n1,x\n2,caf\xe9\n".encode("latin-1"), "line 3 holds the byte 0xe9"),
        ("a.csv", "id,findings\n1,x\n".encode("utf-16"), "no text in UTF-8"),
        ("a.csv", "id,findings\n1,x\n".encode("utf-16-le"), "no text in UTF-8"),
        ("a.csv.gz", b"\x1f\x8b\x08\x00rest", "no text in UTF-8.*Unpack it"),
        ("a.jsonl", b'{"id": "1", "findings": "x"}\n{"id": "2", "findings": "\xe9"}\n', "line 2 holds the byte 0xe9"),
        ("a.jsonl", '{"id": 1, "findings": "x"}\n[1]\n', "line 2 is not of the form"),
        ("a.jsonl", '{"id": 1, "a": ' + "[" * 100_000, "line 1 is not of the form"),
        ("a.json", "[" * 100_000, "a.json is no JSON"),
        ("a.json", b'[{"id": 1, "findings": "\xe9"}]', "a.json is not UTF-8.*save it as UTF-8"),
        ("a.json", '{"id": "1", "findings": "x"}', "the file holds a list of such"),
        ("a.json", '[{"id": 1, "Befund": "x"}]', "no column findings or impression"),
        ("a.json", '{"a": {"findings": "x"}, "a": {"findings": "y"}}', "'a' comes twice"),
        ("a.jsonl", '{"id": 1, "findings": "x"}\n{"id": "1", "findings": "y"}\n', "line 2: the id '1' comes twice"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, name, content, match):
    with pytest.raises(ValueError) as error:
        read(tmp_path / name, content)
    assert re.search(match, str(error.value)), error.value


def test_a_quotation_mark_in_a_last_line_is_none_that_opens(tmp_path):
    assert [row[1] for row in read(tmp_path / "a.csv", 'id,findings\n1,"a\nb"\n2,Mass of 5" in size.\n')] == [
        "a\nb",
        'Mass of 5" in size.',
    ]
