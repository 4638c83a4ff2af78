"""Reports split by a language model: every one ends with sentences of its own or with the rules' result, counted."""

import itertools
import json
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from llm_reports import ORGANS, SmallReport, right_answer, rules, sentences_of, settings, small_reports, truth
from llm_stand_in import llm_stand_in

from data_builders import llm_decompose
from data_builders.llm_answers import AnswerRefusedError, load_prompt, numbered, read_answer
from data_builders.llm_client import Answer, HTTPClient
from data_builders.llm_decompose import Tally, decompose_with_llm, estimate
from data_builders.llm_ledger import Ledger

PRICES = (1.0, 4.0)
TESTS = Path(__file__).resolve().parent


@pytest.fixture
def server():
    with llm_stand_in(right_answer) as server:
        yield server


class CountingClient(HTTPClient):
    """Knows how many calls were under way at once: the server may still be at one that its client has given up."""

    under_way = most_under_way = 0
    counting = threading.Lock()

    def ask(self, *question):
        with self.counting:
            self.under_way += 1
            self.most_under_way = max(self.most_under_way, self.under_way)
        try:
            return super().ask(*question)
        finally:
            with self.counting:
                self.under_way -= 1


def run(server, path, reports, *, prices=PRICES, budget=None, timeout_s=60.0, model="m", **changes):
    """Results, tally, ledger."""
    tally = Tally()
    ours = settings(**changes)
    with Ledger(path / "cache.jsonl", prices, budget) as ledger:
        client = CountingClient(server.url, model, timeout_s=timeout_s)
        results = list(decompose_with_llm(reports, ORGANS, client, rules, ledger, ours, tally))
    assert client.most_under_way <= ours.limits.concurrency
    return results, tally, ledger


def check(reports, results, tally) -> dict[str, int]:
    """Every report once and in order; the model's results are right, the others the rules'; the tally says so."""
    assert [result.name for result in results] == [report.name for report in reports]
    methods = {"llm": 0, "rules": 0}
    for report, result in zip(reports, results):
        methods[result.method] += 1
        sentences = (*numbered(report).findings, *numbered(report).impression)
        assert set(sentences_of(result.organs)) <= set(sentences), "a sentence that is not in the report"
        assert result.organs == (truth(report) if result.method == "llm" else rules(report).organs)
        assert result.method == "rules" or result.uncertain_sentences == ()
        assert not result.notes or result.method == "rules"
    assert methods["llm"] == tally.asked + tally.remembered
    assert methods["rules"] == tally.certain + tally.fallen_back.total()
    noted = Counter(note.removeprefix("not by the model: ") for result in results for note in result.notes)
    assert noted == tally.fallen_back, "each report says why"
    return methods


@pytest.mark.parametrize("form", ["numbers", "quotes"])
def test_a_server_that_is_well_answers_every_report_with_one_call(server, tmp_path, form):
    reports = small_reports(40)
    assert sum(truth(report) != rules(report).organs for report in reports) > 20, "the rules would pass as well"
    server.faults, server.slow_s = (lambda report, number: "slow"), 0.03
    results, tally, ledger = run(server, tmp_path, reports, form=form)
    assert check(reports, results, tally) == {"llm": 40, "rules": 0}
    assert len(server.asked) == len(set(server.asked)) == ledger.calls == 40
    assert 1 < server.most_under_way <= 4
    assert ledger.spent == pytest.approx(server.cost(*PRICES))


@pytest.mark.parametrize("form", ["numbers", "quotes"])
def test_whatever_goes_wrong_every_report_ends_checked_or_by_the_rules(server, tmp_path, form):
    reports = small_reports(60, seed=1)
    faults = ["slow", "drip", "drop", "cut", "invalid", "prose", "invents", "lazy", "truncated", "huge", "busy"]
    faults += ["status 500", "status 400", "no envelope", "no usage", "thinks", None, None]
    faults += ["forgets"] if form == "numbers" else []
    dice = random.Random(3)
    plan = {numbered(report).text(): [dice.choice(faults) for _ in range(12)] for report in reports}
    first = numbered(reports[0]).text()
    plan[first] = [None] * 12
    server.faults = lambda report, number: plan[report][(number - 1) % 12]
    server.retry_after, server.slow_s = "0.01", 0.1
    results, tally, ledger = run(
        server, tmp_path, reports, form=form, timeout_s=1.5, tries=3, failures_in_a_row=99, concurrency=8
    )
    methods = check(reports, results, tally)
    assert methods["llm"] > 15 and methods["rules"] > 3, "both ways have to be gone"
    assert len(tally.fallen_back) >= 2 and len(tally.refused) >= 3
    assert all("liver" not in reason for reason in (*tally.fallen_back, *tally.refused)), "no report in a reason"
    assert ledger.spent >= server.cost(*PRICES) - 1e-9, "what is not known is taken for the most it can be"


@pytest.mark.parametrize(
    ("form", "fault", "kind"),
    [
        ("numbers", "invents", "a sentence that is not there"),
        ("quotes", "invents", "text that is not in the report"),
        ("numbers", "forgets", "sentences left out"),
        ("numbers", "invalid", "no valid JSON"),
        ("numbers", "prose", "no valid JSON"),
        ("numbers", "truncated", "cut off at the limit of its length"),
        ("numbers", "huge", "cut off at the limit of its length"),
    ],
)
def test_a_refused_answer_is_asked_again_with_what_was_wrong(server, tmp_path, form, fault, kind):
    (report,) = reports = small_reports(1, seed=5)
    server.faults = lambda report, number: fault if number == 1 else None
    results, tally, _ = run(server, tmp_path, reports, form=form)
    assert results[0].method == "llm" and tally.refused == {kind: 1} and not tally.fallen_back
    second = server.bodies[1]["messages"]
    assert second[:2] == server.bodies[0]["messages"] and second[2]["role"] == "assistant"
    assert second[3]["content"].startswith(load_prompt().again)
    first, again = (body["max_tokens"] for body in server.bodies[:2])
    assert again == (2 * first if "cut off" in kind else first), "a longer answer gets more room"
    server.faults = lambda report, number: fault
    results, tally, _ = run(server, tmp_path / "always", reports, form=form)
    assert results[0].organs == rules(report).organs and tally.refused == {kind: 2}
    assert tally.fallen_back == {f"no usable answer ({kind})": 1}
    asked = len(server.asked)
    run(server, tmp_path / "always", reports, form=form)
    assert len(server.asked) == asked, "refused answers are paid for as well: they are remembered"


def test_an_answer_that_gives_nothing_to_anyone_leaves_it_to_the_rules(server, tmp_path):
    server.faults = lambda report, number: "lazy"
    reports = small_reports(3)
    results, tally, _ = run(server, tmp_path, reports)
    assert check(reports, results, tally) == {"llm": 0, "rules": 3}
    assert tally.fallen_back == {"no usable answer (no sentence is given to any organ)": 3}


def test_the_cost_cap_holds_at_the_server_with_calls_under_way(server, tmp_path):
    """Not by our own book alone: by what the server would charge, broken connections included."""
    reports = small_reports(120)
    server.faults = lambda report, number: {0: "drop", 1: "slow"}.get(sum(report.encode()) % 6) if number == 1 else None
    server.slow_s = 0.05
    whole = run(server, tmp_path / "whole", reports, concurrency=8)[2].spent
    for share in (0.05, 0.4):
        server.charged.clear()
        server.asked.clear()
        budget = whole * share
        results, tally, ledger = run(server, tmp_path / str(share), reports, budget=budget, concurrency=8)
        methods = check(reports, results, tally)
        assert 0 < server.cost(*PRICES) <= ledger.spent + 1e-12 and ledger.spent <= budget
        if share > 0.1:
            assert server.cost(*PRICES) < ledger.spent * 0.99, "what broke off counts for the most it can be"
        assert methods["rules"] == tally.fallen_back["the budget is spent"] and 0 < methods["llm"] < 120
        # The rest of a budget of the same file pays for the same again: nothing.
        before = len(server.asked)
        again, tally, _ = run(server, tmp_path / str(share), reports, budget=budget, concurrency=8)
        assert len(server.asked) - before <= 2 and tally.remembered >= methods["llm"]
        assert server.cost(*PRICES) <= budget
    results, tally, _ = run(server, tmp_path / "0.4", reports, budget=10 * whole)
    assert check(reports, results, tally)["llm"] == 120 and tally.remembered == methods["llm"]


def test_a_budget_too_small_for_one_call_sends_none(server, tmp_path):
    reports = small_reports(3)
    results, tally, _ = run(server, tmp_path, reports, budget=1e-6)
    assert check(reports, results, tally) == {"llm": 0, "rules": 3} and not server.asked


@pytest.mark.parametrize(("concurrency", "kill_after"), [(1, 5), (1, 12), (6, 14)])
def test_a_killed_run_resumes_without_paying_twice(server, tmp_path, concurrency, kill_after):
    count, path = 40, tmp_path / "cache.jsonl"
    go_on = threading.Event()

    def slow(report: str, number: int) -> str:
        if len(server.asked) >= count - concurrency:
            go_on.wait(60)  # however late the kill comes, the run is not done before
        return "slow"

    server.faults, server.slow_s = slow, 0.05
    command = [sys.executable, str(TESTS / "llm_killed.py"), server.url, str(path), str(count), str(concurrency)]
    process = subprocess.Popen(command, cwd=TESTS, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    while len(server.asked) < kill_after:
        assert process.poll() is None, process.stdout.read().decode()
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=20)
    go_on.set()
    server.settle()
    asked_before = list(server.asked)
    with Ledger(path, PRICES) as ledger:
        spent_before = ledger.spent
    kept = [line for line in path.read_text().splitlines() if '"text"' in line]
    assert kill_after <= len(asked_before) < count
    # All but what was under way at that moment is on the disk.
    assert len(asked_before) - len(kept) <= concurrency
    server.faults = lambda report, number: None
    finished = subprocess.run(command, cwd=TESTS, env=environment(), capture_output=True, text=True, timeout=60)
    assert finished.returncode == 0, finished.stderr
    results = [json.loads(line) for line in finished.stdout.splitlines()]
    assert results == [[report.name, "llm"] for report in small_reports(count)]
    twice = {report for report in server.asked if server.asked.count(report) > 1}
    assert len(twice) <= concurrency and len(server.asked) == count + len(twice) == count + len(asked_before) - len(
        kept
    )
    with Ledger(path, PRICES) as ledger:
        assert ledger.spent >= server.cost(*PRICES) - 1e-12 and ledger.spent > spent_before


def environment() -> dict[str, str]:
    import os

    return {**os.environ, "PYTHONPATH": f"{TESTS.parent}{os.pathsep}{TESTS}"}


def test_only_reports_that_the_rules_are_uncertain_of_are_asked_in_a_hybrid_run(server, tmp_path):
    reports = small_reports(40)
    unsure = [report for report in reports if rules(report).uncertain_sentences]
    assert 5 < len(unsure) < 35
    results, tally, _ = run(server, tmp_path, reports, is_hybrid=True)
    methods = check(reports, results, tally)
    assert methods["llm"] == len(unsure) and tally.certain == 40 - len(unsure)
    assert sorted(server.asked) == sorted(numbered(report).text() for report in unsure)


def test_one_report_of_many_reconstructions_is_asked_once(server, tmp_path):
    reports = small_reports(5)
    copies = [replace(report, name=f"{report.name}_{copy}") for report in reports for copy in range(4)]
    server.faults, server.slow_s = (lambda report, number: "slow"), 0.05
    results, tally, _ = run(server, tmp_path, copies)
    assert check(copies, results, tally)["llm"] == 20 and len(server.asked) == 5


def test_other_models_organs_prompts_and_forms_are_other_questions(server, tmp_path):
    reports = small_reports(2)
    run(server, tmp_path, reports)
    run(server, tmp_path, reports)
    assert len(server.asked) == 2
    run(server, tmp_path, reports, model="another")
    run(server, tmp_path, reports, form="quotes")
    prompt = load_prompt()
    run(server, tmp_path, reports, prompt=replace(prompt, notes={**prompt.notes, "liver": "all of it"}))
    assert len(server.asked) == 8
    with Ledger(tmp_path / "cache.jsonl") as ledger:
        client = HTTPClient(server.url, "m")
        list(decompose_with_llm(reports, ORGANS[:3], client, rules, ledger, settings()))
    assert len(server.asked) > 8


def test_a_server_that_dies_leaves_the_rest_to_the_rules_and_the_next_run_asks_for_the_rest(tmp_path):
    reports = small_reports(60)
    with llm_stand_in(right_answer) as server:
        places = itertools.count()
        server.faults = lambda report, number: "drop" if next(places) >= 20 else None
        results, tally, _ = run(server, tmp_path, reports, tries=2, failures_in_a_row=5)
        methods = check(reports, results, tally)
        # Four at a time: each of three may bring its answer late, and the row of failures begins anew.
        assert methods["llm"] == 20 and tally.fallen_back["the server has stopped answering"] >= 40 - (3 * 4 + 5 + 4)
        assert len(server.asked) <= 20 + 2 * (3 * 4 + 5 + 4), "the others were not even tried"
        server.faults, before = (lambda report, number: None), len(server.asked)
        results, tally, _ = run(server, tmp_path, reports)
        assert check(reports, results, tally)["llm"] == 60 and tally.remembered == 20
        assert len(server.asked) - before == 40


@pytest.mark.parametrize("fault", ["status 401", "empty account", "redirect"])
def test_a_first_call_that_fails_for_good_is_an_error_and_a_later_one_is_not(server, tmp_path, fault):
    reports = small_reports(12)
    server.elsewhere = server.url
    server.faults = lambda report, number: fault
    with pytest.raises(ValueError, match="the language model cannot be asked: .*--llm_key_variable"):
        run(server, tmp_path / "first", reports)
    assert len(server.asked) == 1
    first = numbered(reports[0]).text()
    server.faults = lambda report, number: None if report == first else fault
    results, tally, _ = run(server, tmp_path / "later", reports)
    assert check(reports, results, tally) == {"llm": 1, "rules": 11}


def test_a_busy_server_is_waited_for(server, tmp_path):
    reports = small_reports(6)
    server.faults = lambda report, number: "busy" if number <= 2 else None
    server.retry_after = "0.2"
    results, tally, ledger = run(server, tmp_path, reports, tries=1)
    assert check(reports, results, tally)["llm"] == 6
    for report in set(server.asked):
        first, second, *_ = [when for when, asked in zip(server.times, server.asked) if asked == report]
        assert second - first >= 0.2
    assert ledger.spent == pytest.approx(server.cost(*PRICES)), "a refused call costs nothing"


def test_the_limit_of_requests_is_kept(server, tmp_path, monkeypatch):
    from data_builders import llm_calls

    taken = []
    take = llm_calls.RateLimit.take

    def noted(limit, amount, now):
        taken.extend([now] if limit.per_minute is not None else [])
        take(limit, amount, now)

    monkeypatch.setattr(llm_calls, "MINUTE", 0.5)
    monkeypatch.setattr(llm_calls.RateLimit, "take", noted)
    reports = small_reports(12)
    results, tally, _ = run(server, tmp_path, reports, requests_per_minute=5)
    assert check(reports, results, tally)["llm"] == 12
    sixth = [later - earlier for earlier, later in zip(taken, taken[5:])]
    assert len(taken) == 12 and min(sixth) > 0.4999, "five in half a second"
    assert all(asked >= when for asked, when in zip(server.times, taken)), "none is sent before it is counted"


def test_stopping_in_the_midst_ends_at_once_and_keeps_what_came(server, tmp_path):
    reports = small_reports(30)
    places = itertools.count()
    server.slow_s = 200.0
    server.faults = lambda report, number: "slow" if next(places) >= 3 else None
    begin = time.monotonic()
    with Ledger(tmp_path / "cache.jsonl", PRICES) as ledger:
        client = HTTPClient(server.url, "m", timeout_s=200)
        results = decompose_with_llm(reports, ORGANS, client, rules, ledger, settings(concurrency=2))
        assert next(results).method == "llm"
        while len(server.asked) < 5:  # the fourth and the fifth are under way, and take their time
            time.sleep(0.01)
        results.close()
    assert time.monotonic() - begin < 100
    kept = (tmp_path / "cache.jsonl").read_text().count('"text"')
    assert 1 <= kept <= 3


def test_reports_are_read_as_they_are_needed(server, tmp_path):
    read = []

    def stream():
        for report in small_reports(200):
            read.append(report.name)
            yield report

    with Ledger(tmp_path / "cache.jsonl") as ledger:
        results = decompose_with_llm(stream(), ORGANS, HTTPClient(server.url, "m"), rules, ledger, settings())
        for number, _ in enumerate(results, 1):
            assert len(read) <= number + 4 * 4 + 1


def test_odd_reports_are_not_sent(server, tmp_path, monkeypatch):
    monkeypatch.setattr(llm_decompose, "MOST_SENTENCES", 20)
    long = SmallReport("long", "The lung is unremarkable. " * 30, "")
    wide = SmallReport("wide", "The lung " + "is very " * 20_000 + "unremarkable.", "")
    empty = [SmallReport("empty", "", ""), SmallReport("blank", " \n\t", "..."), SmallReport("control", "\x00\x07", "")]
    reports = [*empty, long, wide, *small_reports(1)]
    results, tally, _ = run(server, tmp_path, reports)
    assert check(reports, results, tally)["llm"] == 1 and len(server.asked) == 1
    assert tally.certain == 3 and sorted(tally.fallen_back.values()) == [1, 1]


def test_the_estimate_asks_nothing_and_is_near_what_comes(server, tmp_path):
    reports = small_reports(50)
    with Ledger(tmp_path / "cache.jsonl", PRICES) as ledger:
        client = HTTPClient(server.url, "m")
        expected = estimate(reports, ORGANS, client, rules, ledger, settings(requests_per_minute=10))
        assert not server.asked and expected.to_ask == expected.reports == 50 and expected.seconds == 300
        ours = settings()
        list(decompose_with_llm(reports, ORGANS, client, rules, ledger, ours))
        assert expected.cost / ledger.spent == pytest.approx(1.0, abs=0.35)
        (line, cost) = estimate([*reports, *small_reports(9, seed=8)], ORGANS, client, rules, ledger, ours).lines(
            ledger, ours
        )
        assert "9 of 59 reports to ask, 50 in the cache" in line and "cost: about 0.0" in cost
        half = estimate(small_reports(400, seed=9), ORGANS, client, rules, ledger, settings(is_hybrid=True))
        unsure = sum(bool(rules(report).uncertain_sentences) for report in small_reports(400, seed=9))
        assert half.to_ask == pytest.approx(unsure, abs=25)
    with Ledger(tmp_path / "cache.jsonl", PRICES, budget=ledger.spent + expected.cost / 5) as ledger:
        more = estimate(small_reports(50, seed=8), ORGANS, client, rules, ledger, ours)
        line = more.lines(ledger, ours)[1]
        assert 8 <= int(line.split("it will do for about ")[1].split()[0]) <= 12


REPORT = SmallReport(
    "r",
    "1. The liver is enlarged (18.5 cm). No focal lesion of the liver, the spleen is normal. Small cyst. Small cyst.",
    "Hepatomegaly – no focal lesion. Small cyst.",
)
NUMBERED = numbered(REPORT)


def quoted(*entries) -> Answer:
    names = ("organ", "findings", "impression", "abnormal")
    return Answer(json.dumps({"organs": [dict(zip(names, entry)) for entry in entries]}))


@pytest.mark.parametrize(
    ("quote", "expected"),
    [
        ("The liver is enlarged (18.5 cm).", (0,)),
        ("1: the liver is  ENLARGED 18.5 cm", (0,)),
        ("focal lesion of the liver", (1,)),  # a part: the whole sentence with its negation is what goes on
        ("The liver is enlarged (18.5 cm). No focal lesion of the liver, the spleen is normal.", (0, 1)),
        ("Hepatomegaly - no focal lesion.", (4,)),  # another dash; and looked for in the other section
        ("Small cyst.", (2,)),
    ],
)
def test_a_quote_becomes_whole_sentences_of_the_report(quote, expected):
    texts = read_answer(quoted(("liver", [quote], [], True)), NUMBERED, ORGANS, "quotes")
    sentences = (*NUMBERED.findings, *NUMBERED.impression)
    found = (*texts["liver"].findings, *texts["liver"].impression)
    assert found == tuple(sentences[place] for place in expected)


@pytest.mark.parametrize(
    "quote",
    [
        "The liver is enlarged (18.6 cm).",
        "The liver is not enlarged (18.5 cm).",
        "Focal lesion of the liver. The spleen is normal. Small cyst of the kidney.",
        "liver",
        "is normal",
        "",
        "...",
        "normal. Small cyst. Small cyst. Hepatomegaly",  # across the sections
    ],
)
def test_a_quote_that_does_not_stand_in_the_report_is_refused(quote):
    with pytest.raises(AnswerRefusedError) as refused:
        read_answer(quoted(("liver", [quote], [], True)), NUMBERED, ORGANS, "quotes")
    assert refused.value.kind == "text that is not in the report"


def test_a_sentence_that_stands_twice_is_quoted_twice():
    texts = read_answer(
        quoted(("liver", ["Small cyst.", "Small cyst."], ["Small cyst."], True)), NUMBERED, ORGANS, "quotes"
    )
    assert texts["liver"].findings == ("Small cyst.",) * 2 and texts["liver"].impression == ("Small cyst.",)


ALL = [{"n": number, "abnormal": [], "normal": []} for number in range(1, 7)]


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("", "no valid JSON"),
        ("{" * 100_000, "no valid JSON"),
        ('{"sentences": {}}', "not in the form that was asked for"),
        ('{"sentences": [1]}', "not in the form that was asked for"),
        (json.dumps({"sentences": [{**ALL[0], "n": True}, *ALL]}), "not in the form that was asked for"),
        (json.dumps({"sentences": [{**ALL[0], "n": 1.5}, *ALL]}), "not in the form that was asked for"),
        (json.dumps({"sentences": [{"n": 1}, *ALL]}), "not in the form that was asked for"),
        (json.dumps({"sentences": [{**ALL[0], "n": 0}, *ALL]}), "a sentence that is not there"),
        (json.dumps({"sentences": [{**ALL[0], "n": 7}, *ALL]}), "a sentence that is not there"),
        (json.dumps({"sentences": ALL[1:]}), "sentences left out"),
        (json.dumps({"sentences": [{**ALL[0], "normal": ["adnexa"]}, *ALL]}), "an organ that is not in the set"),
        (
            json.dumps({"sentences": [{**entry, "normal": list(ORGANS)} for entry in ALL]}),
            "every sentence is given to every organ",
        ),
    ],
)
def test_answers_that_are_refused(text, kind):
    with pytest.raises(AnswerRefusedError) as refused:
        read_answer(Answer(text), NUMBERED, ORGANS, "numbers")
    assert refused.value.kind == kind


@pytest.mark.parametrize("form", ["numbers", "quotes"])
@pytest.mark.parametrize("seed", range(3))
def test_whatever_a_model_writes_nothing_comes_out_that_the_report_does_not_hold(form, seed):
    """Right answers with pieces cut, doubled, swapped and retyped: refused, or sentences of the report."""
    dice, taken, refused = random.Random(seed), 0, 0
    for number, report in enumerate(small_reports(120, seed=seed + 50)):
        sentences = numbered(report)
        text = right_answer(sentences.text(), form)
        if number % 2:  # letters
            start, length = dice.randrange(len(text)), dice.choice((1, 1, 2, 5, 20))
            piece = text[start : start + length]
            new = dice.choice(("", piece * 2, piece[::-1], dice.choice(list('0123456789,"[]{}ae ')), "liver", "null"))
            text = text[:start] + new + text[start + length :]
        else:  # values
            content = json.loads(text)
            (entries,) = content.values()
            entry = dice.choice(entries)
            name = dice.choice(list(entry))
            others = [1, 99, "2", None, True, "liver", ["heart"], ["The heart is enlarged."], [], ["the", 1]]
            entry[name] = dice.choice([*others, *(other[name] for other in entries)])
            text = json.dumps(content)
        try:
            texts = read_answer(Answer(text), sentences, ORGANS, form)
        except AnswerRefusedError:
            refused += 1
            continue
        taken += 1
        assert set(texts) <= set(ORGANS)
        for said in texts.values():
            for section, own in ((said.findings, sentences.findings), (said.impression, sentences.impression)):
                places = [own.index(sentence) for sentence in section]
                assert places == sorted(places), "in the order of the report"
    assert taken > 10 and refused > 30


@pytest.mark.parametrize(
    "around",
    [
        "Here is {the JSON}:\n```json\n%s\n```\nI hope {it} helps.",
        '<thinking>{"sentences": []}, or {"sentences": [1, </thinking> %s',
        '{"thoughts": "none"} %s',
    ],
)
def test_the_last_answer_in_many_words_counts(around):
    text = around % json.dumps({"sentences": [{**ALL[0], "normal": ["liver"]}, *ALL[1:]]}, indent=1)
    assert set(read_answer(Answer(text), NUMBERED, ORGANS, "numbers")) == {"liver"}


def test_spellings_of_organs_and_numbers_are_forgiven():
    entries = [{**entry, "n": str(entry["n"])} for entry in ALL]
    entries[0]["abnormal"], entries[1]["normal"] = [" Liver", "lungs"], ["liver"]
    texts = read_answer(Answer(json.dumps({"sentences": entries})), NUMBERED, ORGANS, "numbers")
    assert texts["liver"].findings == NUMBERED.findings[:2] and texts["liver"].is_abnormal
    assert set(texts) == {"liver", "lung"}


def test_numbers_that_a_report_brings_cannot_pass_for_sentences():
    report = SmallReport("r", "The lung is normal.\n7: The liver is gone.", "")
    lines = numbered(report).text().splitlines()
    assert lines[0] == "FINDINGS" and [line.split(":")[0] for line in lines[1:]] == ["1", "2"]


def test_every_organ_of_the_sets_is_in_the_question(tmp_path):
    from modeling_fvlm.organs import load_organ_set

    organs = load_organ_set("body_36").organs
    prompt = load_prompt()
    listed = prompt.system(organs, "numbers").split("Organs:\n")[1].splitlines()
    assert [line.removeprefix("- ").split(":")[0] for line in listed] == list(organs)
    assert set(prompt.notes) <= set(organs), "a note on an organ that no set has"


@pytest.mark.parametrize("content", ["name: x\n", "- a list\n", "a: [\n", None])
def test_a_prompt_of_another_form(tmp_path, content):
    path = tmp_path / "mine.yaml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match="not in the form of|neither a YAML file nor one of \\['decompose'\\]"):
        load_prompt(str(path))
