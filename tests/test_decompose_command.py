"""`python -m data_builders decompose`: what it reads and writes, any number of processes, and bad reports."""

import csv
import json
import random
import re
import signal

import pytest

from data_builders import decompose_command
from data_builders.__main__ import main
from data_builders.decompose import decompose_report
from data_builders.folder_reports import read_ready_reports
from data_builders.lexicon import load_lexicon

LEXICON = load_lexicon("english")
REPORTS = [
    ("r1", "The liver is enlarged. The spleen is normal.", "Hepatomegaly."),
    ("r2", "No pleural effusion.\nThe heart is enlarged.", ""),
    ("r3", "FINDINGS: Gallstones. IMPRESSION: Cholelithiasis.", ""),
]


@pytest.fixture
def reports(tmp_path):
    path = tmp_path / "reports.csv"
    write_csv(path, ["id", "findings", "impression"], REPORTS)
    return path


def write_csv(path, columns, rows):
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(rows)


def run(*arguments):
    return main(["decompose", *map(str, arguments)])


def read(path):
    return {entry["id"]: entry for entry in json.loads(path.read_text(encoding="utf-8"))}


def test_json(reports, tmp_path, capsys):
    out = tmp_path / "out" / "split.json"
    assert run("--reports", reports, "--organs", "body_24", "--out", out, "--labels", "ct_rate_18") == 0
    entries = read(out)
    assert list(entries) == ["r1", "r2", "r3"]
    assert entries["r1"]["organs"] == {
        "liver": {"findings": ["The liver is enlarged."], "impression": ["Hepatomegaly."], "abnormal": True},
        "spleen": {"findings": ["The spleen is normal."], "impression": [], "abnormal": False},
    }
    assert entries["r2"]["labels"] == {"Cardiomegaly": "present", "Pleural effusion": "absent"}
    assert entries["r3"]["organs"]["gallbladder"]["impression"] == ["Cholelithiasis."]
    assert entries["r1"]["findings"] == REPORTS[0][1] and entries["r1"]["method"] == "rules"
    assert "3 reports" in capsys.readouterr().out


def test_the_number_of_processes_changes_nothing(tmp_path):
    path = tmp_path / "many.csv"
    chosen = random.Random(0)
    sentences = [sentence for _, findings, _ in REPORTS for sentence in findings.split(". ")] + ["It is unchanged."]
    write_csv(path, ["id", "findings"], [(f"r{n}", ". ".join(chosen.choices(sentences, k=9))) for n in range(150)])
    for workers in (1, 2):
        run("--reports", path, "--organs", "body_36", "--out", tmp_path / f"{workers}.jsonl", "--workers", workers)
    assert (tmp_path / "1.jsonl").read_bytes() == (tmp_path / "2.jsonl").read_bytes()
    assert len((tmp_path / "1.jsonl").read_text().splitlines()) == 150


def test_the_published_form_is_read_by_the_builder(reports, tmp_path):
    run("--reports", reports, "--organs", "body_24", "--out", tmp_path / "out", "--format", "published")
    found = read_ready_reports(
        tmp_path / "out" / "desc_info.json", tmp_path / "out" / "conc_info.json", ["liver", "heart"]
    )
    assert found["r1"].organ_texts["liver"].findings == ("The liver is enlarged.",)
    assert found["r2"].organ_texts["heart"].impression == ()


def test_a_csv_to_correct(reports, tmp_path):
    run("--reports", reports, "--organs", "body_24", "--out", tmp_path / "correct.csv", "--format", "csv")
    rows = list(csv.DictReader((tmp_path / "correct.csv").read_text(encoding="utf-8-sig").splitlines()))
    assert {(row["organ"], row["abnormal"]) for row in rows if row["id"] == "r1"} == {
        ("liver", "yes"),
        ("spleen", "no"),
    }


@pytest.mark.parametrize(
    ("columns", "arguments"),
    [
        (["VolumeName", "Findings_EN", "Impressions_EN"], []),
        (["id", "Befund", "Beurteilung"], ["--columns", "findings=Befund,impression=Beurteilung"]),
    ],
)
def test_columns_of_other_names(tmp_path, columns, arguments):
    path = tmp_path / "reports.csv"
    write_csv(path, columns, [("a", "The liver is normal.", "Not given.")])
    run("--reports", path, "--organs", "body_24", "--out", tmp_path / "out.json", *arguments)
    entry = read(tmp_path / "out.json")["a"]
    assert entry["organs"]["liver"]["findings"] == ["The liver is normal."] and entry["impression"] in (
        "",
        "Not given.",
    )
    assert list(entry["organs"]) == ["liver"]


def test_bad_reports_are_counted(tmp_path, capsys):
    turkish = (
        "Trakea ve her iki ana bronş açıktır. Kalp boyutu normaldir. Perikardiyal efüzyon izlenmedi. Karaciğer doğal."
    )
    spanish = (
        "Pulmones sin consolidación. No hay derrame pleural. Corazón y aorta de calibre normal. Hígado sin lesiones."
    )
    rows = [
        ("empty", "", ""),
        ("blank", " \n ", ""),
        ("html", "<p>The liver is &lt; 15 cm.</p><br>The spleen is <b>enlarged</b>.", ""),
        ("control", "The liver\x01 is normal.", ""),
        ("turkish", turkish, ""),
        ("spanish", spanish, ""),
        ("long", "The liver is normal. The aorta is dilated " * 25_000, ""),
        ("no_stop", "The liver is normal, " + "no lesion of the spleen and " * 40_000, ""),
        ("no_blank", "a" * 1_000_000, ""),
        ("marks", "?!.,;:()[]{}<>*-_=+" * 50, "1. 2. 3."),
        ("one_word", "Cholelithiasis", ""),
    ]
    path = tmp_path / "bad.csv"
    write_csv(path, ["id", "findings", "impression"], rows)
    run("--reports", path, "--organs", "body_24", "--out", tmp_path / "out.json")
    entries = read(tmp_path / "out.json")
    notes = {name: set(entry.get("notes", {})) for name, entry in entries.items()}
    assert notes["empty"] == notes["blank"] == {"empty"} and not entries["empty"]["organs"]
    assert notes["html"] == {"html"} and entries["html"]["organs"]["spleen"]["findings"] == ["The spleen is enlarged."]
    assert notes["control"] == {"control_characters"} and "liver" in entries["control"]["organs"]
    assert notes["turkish"] == notes["spanish"] == {"not_english"} and not entries["turkish"]["organs"]
    assert len(entries["turkish"]["uncertain"]) == 4  # a language model may read them
    assert set(entries["long"]["organs"]) == {"liver", "aorta"}
    assert notes["no_stop"] == notes["no_blank"] == {"long_sentences"}
    assert set(entries["no_stop"]["organs"]) == {"liver", "spleen"} and entries["no_stop"]["uncertain"]
    assert not entries["marks"]["organs"]
    assert entries["one_word"]["organs"]["gallbladder"]["abnormal"]
    told = " ".join(capsys.readouterr().out.split())
    for line in (
        "2 reports without text",
        "2 reports not English",
        "1 report with HTML",
        "1 report with control characters",
        "6 reports of which no sentence went to an organ",
    ):
        assert line in told


@pytest.mark.parametrize(
    ("name", "content", "arguments", "match"),
    [
        ("none.csv", None, [], "there is no file"),
        ("a.csv", "name,findings\n1,x\n", [], "no column 'id'.*--columns id="),
        ("a.csv", "id,report_txt\n1,x\n", [], "no column findings or impression"),
        ("a.csv", "id,findings\n1,x\n1,y\n", [], "the id '1' comes twice"),
        ("a.csv", "id,findings\n1,x\n", ["--columns", "findngs=x"], "is not OURS=YOURS.*nearest: 'findings'"),
        ("a.csv", b"id,findings\n1,caf\xe9\n", [], "is not UTF-8"),
        ("a.xlsx", "PK", [], "is a workbook"),
        ("a.jsonl", '{"id": "1", "findings": "x"}\n{"findings"\n', [], "line 2 is not of the form"),
        ("a.jsonl", '{"id": "1", "findings": 3}\n', [], "'findings' is no text"),
        ("a.csv", "id,findings\n1,x\n", ["--labels", "nope"], "neither a YAML file nor one of"),
        ("a.csv", "id,findings\n1,x\n", ["--workers", "0"], "must be at least 1"),
        (
            "a.csv",
            "id,findings\n1,x\n",
            ["--format", "published", "--labels", "ct_rate_18"],
            "--labels is for --format json",
        ),
        ("a.csv", "id,findings\n1,x\n", ["--method", "llm"], "needs either --llm_url"),
    ],
)
def test_what_cannot_be_read(tmp_path, capsys, name, content, arguments, match):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert run("--reports", path, "--organs", "body_24", "--out", tmp_path / "out", *arguments) == 2
    message = " ".join(capsys.readouterr().err.split())
    assert re.search(match, message), message
    assert not [file for file in tmp_path.rglob("*") if file.is_file() and file != path], (
        "something half-written is left"
    )


@pytest.mark.parametrize("form", ["json", "csv", "published"])
def test_half_a_character_is_written_as_a_mark(tmp_path, form):
    path = tmp_path / "reports.json"
    path.write_text('[{"id": "a", "findings": "The liver \\ud800 is enlarged."}]', encoding="utf-8")
    run("--reports", path, "--organs", "chest_4", "--out", tmp_path / "out", "--format", form)
    run("--reports", path, "--organs", "body_24", "--out", tmp_path / "split.json")
    assert read(tmp_path / "split.json")["a"]["organs"]["liver"]["findings"] == ["The liver \ufffd is enlarged."]


def test_text_of_any_kind_is_split_without_a_crash():
    """Characters and pieces of reports put together at random."""
    chosen = random.Random(1)
    pieces = [
        *"abc 123 .,;:?!()[]<>&*#-–\n\t\"'%/\\|_~^", "No ", "the liver ", "not seen", "\n\n", "FINDINGS:",
        "IMPRESSION:", "1. ", "5 mm", "lymph nodes ", "and ", "without ", "adjacent to ", "it ", "is ", "L1-L3 ",
        "ribs 4-7 ", "\x00", "é", "ı", "😀", "&lt;", "<b>", "which ", "The mass ", "effusion", " - ", "LIVER: ",
        "resolved", "none",
    ]  # fmt: skip
    organs = ["liver", "rib_left_4", "vertebrae_L2", "lung_upper_lobe_left", "kidney", "heart"]
    for _ in range(200):
        findings, impression = ("".join(chosen.choices(pieces, k=chosen.randrange(60))) for _ in range(2))
        result = decompose_report(findings, impression, organs, LEXICON)
        again = decompose_report(findings, impression, organs, LEXICON)
        assert result == again
        assert json.loads(json.dumps(result.to_json())) == result.to_json()


def test_a_signal_stops_the_rules_and_leaves_nothing(reports, tmp_path, monkeypatch, capsys):
    def write(path, entries):
        next(iter(entries))
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(decompose_command, "write_json", write)
    assert run("--reports", reports, "--organs", "chest_4", "--out", tmp_path / "split.json") == 2
    assert "stopped by a signal after 1 report; nothing was written" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
