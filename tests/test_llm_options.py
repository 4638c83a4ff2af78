"""The language model on the command line: python -m data_builders decompose --method llm, hybrid."""

import csv
import json
import re
from types import SimpleNamespace

import pytest
from llm_reports import ORGANS, SmallReport, right_answer, small_reports, truth
from llm_stand_in import llm_stand_in

from data_builders import decompose_command, llm_options
from data_builders.__main__ import main
from data_builders.folder_reports import read_reports
from data_builders.llm_answers import numbered
from data_builders.llm_local import TransformersClient

KEY = "sk-secret-0123456789"


@pytest.fixture
def server():
    with llm_stand_in(right_answer) as server:
        yield server


def write_reports(path, reports) -> None:
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(("id", "findings", "impression"))
        rows.writerows((report.name, report.findings, report.impression) for report in reports)


@pytest.fixture
def command(tmp_path, server):
    """The command on ten reports, with five organs as the stand-in knows them."""
    reports = small_reports(10)
    write_reports(tmp_path / "reports.csv", reports)
    organs = "lung: [lung_upper_lobe_left], liver: [liver], kidney: [kidney_left], spleen: [spleen], heart: [heart]"
    (tmp_path / "organs.yaml").write_text(f"name: five\nversion: 1\norgans: {{{organs}}}\n")

    def run(*options: str, url: str | None = server.url) -> int:
        words = ["decompose", "--reports", tmp_path / "reports.csv", "--organs", tmp_path / "organs.yaml"]
        words += ["--out", tmp_path / "split.json", *([] if url is None else ["--llm_url", url]), *options]
        return main([str(word) for word in words])

    return run


def written(tmp_path) -> dict[str, dict]:
    return {entry["id"]: entry for entry in json.loads((tmp_path / "split.json").read_text())}


def as_json(texts) -> dict:
    return {
        organ: {"findings": list(text.findings), "impression": list(text.impression), "abnormal": text.is_abnormal}
        for organ, text in texts.items()
    }


def test_a_model_splits_a_file_and_the_second_run_asks_nothing(command, server, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("LLM_API_KEY", KEY)
    server.key = KEY
    options = ("--method", "llm", "--llm_price", "1", "4", "--llm_budget", "1")
    assert command(*options) == 0
    first = capsys.readouterr()
    assert "10 of 10 reports to ask, 0 in the cache" in first.out and "cost: about 0.01" in first.out
    assert "10 reports answered, 0 more from the cache" in first.out and "10 calls:" in first.out
    for report in small_reports(10):
        entry = written(tmp_path)[report.name]
        assert entry["method"] == "llm" and entry["organs"] == as_json(truth(report))
    assert len(server.asked) == 10 and server.bodies[0]["model"] == "stand-in"
    before = (tmp_path / "split.json").read_bytes()
    assert command(*options) == 0
    again = capsys.readouterr()
    assert "0 of 10 reports to ask, 10 in the cache" in again.out and len(server.asked) == 10
    assert (tmp_path / "split.json").read_bytes() == before
    cache = tmp_path / "split.json.llm_cache.jsonl"
    told = first.out + first.err + again.out + again.err
    for text in (told, cache.read_text(), before.decode()):
        assert KEY not in text
    assert not any(sentence in cache.read_text() for sentence in numbered(small_reports(10)[0]).findings)


def test_a_hybrid_run_asks_for_what_the_rules_are_not_certain_of(command, server, tmp_path, capsys):
    reports = small_reports(6)
    reports[2] = SmallReport("unsure", "A nodule of 8 mm is seen. It is not in the liver.", "")
    reports[4] = SmallReport("german", "Die Leber ist normal groß. Kein Nachweis von Metastasen in der Lunge.", "")
    write_reports(tmp_path / "reports.csv", reports)
    assert command("--method", "rules", url=None) == 0
    unsure = [entry["id"] for entry in written(tmp_path).values() if entry.get("uncertain") or entry.get("notes")]
    assert "german" in unsure and 1 <= len(unsure) < 6
    assert command("--method", "hybrid") == 0
    entries = written(tmp_path)
    asked = [report.name for report in reports if numbered(report).text() in server.asked]
    assert asked == unsure and len(server.asked) == len(unsure)
    assert {name for name, entry in entries.items() if entry["method"] == "llm"} <= set(unsure)
    assert f"{6 - len(unsure)} left to the rules" in capsys.readouterr().out


def test_a_long_run_tells_how_far_it_is(command, server, monkeypatch, capsys):
    monkeypatch.setattr(llm_options, "SECONDS_BETWEEN_LINES", 0.0)
    assert command("--method", "llm", "--llm_price", "1", "4") == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if " left; " in line]
    assert len(lines) == 10
    for number, line in enumerate(lines, 1):
        assert re.fullmatch(rf"  {number} of 10, about \d+ s left; \d+ calls, 0 fell back, cost 0\.\d+", line), line


def test_a_run_that_is_stopped_says_how_it_goes_on(command, server, tmp_path, monkeypatch, capsys):
    def stopped(out, form, entries, organs):
        next(entries)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(decompose_command, "write", stopped)
        assert command("--method", "llm", "--llm_concurrency", "1") == 2
    assert "stopped by a signal. The answers that came stay in" in capsys.readouterr().err
    before = len(server.asked)
    assert 1 <= before <= 10
    assert command("--method", "llm") == 0
    assert len(server.asked) <= 10 + 1 and len(set(server.asked)) == 10, "what was under way may come twice"


@pytest.mark.parametrize(("count", "is_bad"), [(40, False), (40, True), (4, True)])
def test_a_model_that_does_not_agree_with_the_rules_is_told_of(command, server, tmp_path, capsys, count, is_bad):
    """Valid answers that are wrong: every sentence goes to the next organ."""
    write_reports(tmp_path / "reports.csv", small_reports(count))
    if is_bad:
        server.right_answer = lambda report, form: re.sub(
            "|".join(ORGANS), lambda organ: ORGANS[ORGANS.index(organ[0]) - 1], right_answer(report, form)
        )
    assert command("--method", "llm") == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "agree with the rules' at F1" in line]
    score = float(line.split("F1 ")[1][:4])
    assert score < 0.5 if is_bad else score > 0.9
    assert ("LOW. Look at both" in line) == (is_bad and count == 40)


def test_a_report_that_fell_back_says_why(command, server, tmp_path, capsys):
    third = numbered(small_reports(10)[3]).text()
    server.faults = lambda report, number: "invents" if report == third else None
    assert command("--method", "llm") == 0
    entries = written(tmp_path)
    assert [entry["id"] for entry in entries.values() if entry["method"] == "rules"] == ["case_3"]
    assert entries["case_3"]["notes"] == {"not by the model: no usable answer (a sentence that is not there)": 1}
    out = capsys.readouterr().out
    assert out.count("no usable answer (a sentence that is not there)") == 1 and "1 fell back to the rules" in out
    assert "asks again" not in out, "the same answer would be refused again"
    server.faults = lambda report, number: "status 500" if report == third else None
    assert command("--method", "llm", "--llm_tries", "1", "--llm_model", "other") == 0
    assert "The same command asks again" in capsys.readouterr().out


def test_what_a_server_does_not_count_or_refuses_is_told(command, server, capsys, caplog):
    first, *_ = (numbered(report).text() for report in small_reports(10))
    server.faults = lambda report, number: "no usage" if report == first else "status 400"
    assert command("--method", "llm", "--llm_price", "1", "4") == 0
    assert "1 answer came without a count of tokens, for which the most was taken" in capsys.readouterr().out
    told = [record.message for record in caplog.records if "a call was given up" in record.message]
    assert len(told) == 1 and "(status 400): out of order, in the midst of: FINDINGS" in told[0]


def test_the_builder_takes_the_split_as_its_reports(command, tmp_path):
    assert command("--method", "llm") == 0
    settings = SimpleNamespace(organ_set=SimpleNamespace(organs=ORGANS))
    reports = read_reports(tmp_path / "split.json", settings)
    for report in small_reports(10):
        assert reports[report.name].organ_texts == truth(report)
        assert (reports[report.name].findings, reports[report.name].impression) == (report.findings, report.impression)


def test_an_estimate_writes_and_asks_nothing(command, server, tmp_path, capsys):
    assert command("--method", "llm", "--llm_estimate", "--llm_model", "m", url="http://localhost:9/v1") == 0
    out = capsys.readouterr().out
    assert "10 of 10 reports to ask" in out and "cost: unknown without --llm_price" in out
    assert not (tmp_path / "split.json").exists() and not server.asked


def test_reports_leave_this_machine_only_for_a_host_that_is_named(command, server, tmp_path, capsys):
    options = ("--method", "llm", "--llm_model", "m", "--llm_estimate")
    for url in ("https://llm.example.org/v1", "http://10.1.2.3:8000/v1"):
        assert command(*options, url=url) == 2
        assert "the reports would leave this one" in capsys.readouterr().err
        assert command(*options, "--send_reports_to_host", "example.org", url=url) == 2
        assert "nothing was sent" in capsys.readouterr().err
    reports = [*small_reports(3), SmallReport("p", "The liver is unremarkable. Seen by Dr. Miller on 03.05.2021.", "")]
    write_reports(tmp_path / "reports.csv", reports)
    assert command(*options, "--send_reports_to_host", "10.1.2.3", url="http://10.1.2.3:8000/v1") == 0
    out = capsys.readouterr().out
    assert "warning: sentences of 4 reports go to 10.1.2.3, without their ids. The address is http" in out
    assert "A name, a date or a number of a person seems to stand in 1 of them." in out
    assert command("--method", "llm", "--llm_estimate", "--llm_model", "m") == 0
    assert "warning" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "url", "message"),
    [
        (["--method", "llm"], None, "--method llm needs either --llm_url or --llm_local"),
        (["--method", "llm", "--llm_local", "m"], "http://localhost/v1", "needs either --llm_url or --llm_local"),
        (["--method", "rules"], "http://localhost/v1", "--llm_url is for --method llm or hybrid"),
        (["--method", "llm", "--llm_budget", "1"], "here", "--llm_budget needs --llm_price"),
        (["--method", "llm", "--llm_budget", "nan", "--llm_price", "1", "1"], "here", "--llm_budget nan must be"),
        (["--method", "llm", "--llm_price", "-1", "1"], "here", "must not be negative"),
        (["--method", "llm", "--llm_concurrency", "0"], "here", "--llm_concurrency 0 must be above 0"),
        (["--method", "llm", "--llm_prompt", "mine"], "here", "neither a YAML file nor one of"),
        (["--method", "llm"], "http://localhost:9/v1", "the server cannot be reached"),
    ],
)
def test_options_that_do_not_fit(command, server, tmp_path, capsys, options, url, message):
    assert command(*options, url=server.url if url == "here" else url) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "split.json").exists() and not server.asked


def test_a_local_model_is_asked_in_the_same_way(command, tmp_path, monkeypatch, capsys):
    from data_builders.llm_client import Answer

    monkeypatch.setattr(TransformersClient, "__post_init__", lambda self: None)
    monkeypatch.setattr(
        TransformersClient,
        "ask",
        lambda self, messages, schema, limit: Answer(right_answer(messages[1]["content"], "numbers"), 9, 9),
    )
    assert command("--method", "llm", "--llm_local", "some/model", url=None) == 0
    assert all(entry["method"] == "llm" for entry in written(tmp_path).values())
    assert "warning" not in capsys.readouterr().out
