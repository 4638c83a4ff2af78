"""Answers and costs in one file that only grows, and the limits that calls keep to."""

import json
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest

from data_builders import llm_calls
from data_builders.llm_calls import MINUTE, Calls, Limits, RateLimit
from data_builders.llm_client import Answer, CallFailedError
from data_builders.llm_ledger import BudgetSpentError, Ledger

KEYS = [f"{number:064x}" for number in range(40)]
PRICES = (1.0, 4.0)


class Scripted:
    """A client that gives what a list says, in order."""

    model, is_serial = "scripted", False

    def __init__(self, *script) -> None:
        self.script, self.count = list(script), 0

    def ask(self, messages, schema, max_tokens):
        self.count += 1
        step = self.script.pop(0) if self.script else Answer("{}", 10, 10)
        if isinstance(step, BaseException):
            raise step
        return step

    def close(self) -> None:
        pass


def failure(kind="passing", **fields) -> CallFailedError:
    made = CallFailedError("out of order", kind, **{k: v for k, v in fields.items() if k != "is_busy"})
    made.is_busy = fields.get("is_busy", False)
    return made


def test_an_answer_is_found_again_by_another_run(tmp_path):
    path = tmp_path / "new" / "cache.jsonl"
    answers = [Answer("ünïcode\n{}", 7, 3), Answer("cut", 5, 9, is_cut=True)]
    with Ledger(path, PRICES) as ledger:
        for attempt, answer in enumerate(answers):
            ledger.enter_answer(ledger.reserve(KEYS[0], attempt, 100, 100), answer)
        assert (ledger.calls, ledger.tokens_in, ledger.tokens_out) == (2, 12, 12)
        spent = ledger.spent
        assert spent == pytest.approx((12 * 1.0 + 12 * 4.0) / 1e6)
    assert path.stat().st_mode & 0o077 == 0, "answers may quote reports"
    with Ledger(path, PRICES) as ledger:
        assert [ledger.answer(KEYS[0], attempt) for attempt in range(3)] == [*answers, None]
        assert ledger.answer(KEYS[1], 0) is None
        assert ledger.calls == 0 and ledger.spent == ledger.spent_before == pytest.approx(spent)


def test_a_file_cut_anywhere_keeps_every_whole_answer_and_loses_no_cost(tmp_path):
    """Whatever moment a process is killed at: what was sent counts, what was answered is there."""
    whole = tmp_path / "whole"
    with Ledger(whole, PRICES) as ledger:
        for number in range(3):
            ledger.enter_answer(ledger.reserve(KEYS[number], 0, 1000, 500), Answer(f"text {number}", 900, 20))
        most = ledger.reserve(KEYS[3], 0, 1000, 500).most
        ledger.enter_failure(ledger.reserve(KEYS[4], 0, 1000, 500), "broke off", may_be_charged=True)
        ledger.enter_failure(ledger.reserve(KEYS[5], 0, 1000, 500), "busy", may_be_charged=False)
    content = whole.read_bytes()
    real = (900 * 1.0 + 20 * 4.0) / 1e6
    lines = content.split(b"\n")
    seen = set()
    ends = [place for place, byte in enumerate(content) if byte == ord("\n")]
    for cut in sorted({*range(0, len(content), 41), *(end + step for end in ends for step in (-1, 0, 1))}):
        place = tmp_path / "cut"
        place.write_bytes(content[:cut])
        with Ledger(place, PRICES) as ledger:
            found = [ledger.answer(KEYS[number], 0) for number in range(3)]
            complete = 0  # lines that are there but for their end
            size = 0
            for line in lines[:-1]:
                size += len(line) + 1
                complete += size - 1 <= cut
            entries = [json.loads(line) for line in lines[:complete]]
            answered = [entry["key"] for entry in entries if "text" in entry]
            assert [answer is not None for answer in found] == [key in answered for key in KEYS[:3]]
            ended = {entry["end"] for entry in entries if "end" in entry}
            expected = sum(entry.get("cost", 0.0) for entry in entries)
            expected += sum(most for entry in entries if "call" in entry and entry["call"] not in ended)
            assert ledger.spent == pytest.approx(expected)
            seen.add(len(answered))
            # It goes on, and what it adds is found by the next run.
            ledger.enter_answer(ledger.reserve(KEYS[9], 0, 10, 10), Answer("later", 1, 1))
        with Ledger(place, PRICES) as ledger:
            assert ledger.answer(KEYS[9], 0) == Answer("later", 1, 1)
            assert ledger.spent == pytest.approx(expected + 5e-6)
    assert seen == {0, 1, 2, 3} and real > 0


def test_what_is_no_ledger_is_left_alone(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("my notes")
    with pytest.raises(ValueError, match="notes.txt is no file of answers; name another one"):
        Ledger(path)
    assert path.read_text() == "my notes"
    with pytest.raises(ValueError, match="cannot be written: Is a directory"):
        Ledger(tmp_path)


def test_two_runs_do_not_share_a_file(tmp_path):
    with Ledger(tmp_path / "cache") as first:
        with pytest.raises(ValueError, match="is in use by another run"):
            Ledger(tmp_path / "cache")
        first.enter_answer(first.reserve(KEYS[0], 0, 1, 1), Answer("a", 1, 1))
    Ledger(tmp_path / "cache").close()


def test_a_full_disk_stops_what_would_be_paid_and_forgotten(tmp_path, monkeypatch):
    import os

    with Ledger(tmp_path / "cache") as ledger:
        monkeypatch.setattr(os, "fsync", lambda file: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        client = Scripted()
        with pytest.raises(ValueError, match="cannot be written: No space left on device.*run the same command again"):
            Calls(client, ledger, Limits()).ask(KEYS[0], 0, [], {}, (1, 1, 1))
        assert client.count == 0, "nothing is asked that could not be written down"


@pytest.mark.parametrize("seed", range(5))
def test_the_budget_holds_with_many_calls_under_way(tmp_path, seed):
    """Every order in which calls end: what is set aside and spent together never passes the budget."""
    dice, budget = random.Random(seed), 0.05
    highest = 0.0
    with Ledger(tmp_path / "cache", PRICES, budget) as ledger:
        lock = threading.Lock()

        def call(number: int) -> bool:
            nonlocal highest
            try:
                reservation = ledger.reserve(KEYS[number % 40], number, 2000, 500)
            except BudgetSpentError:
                return False
            with lock:
                share, kind = dice.random(), dice.random()
                highest = max(highest, ledger.spent + sum(ledger._reserved.values()))
            if kind < 0.3:
                ledger.enter_failure(reservation, "broke off", may_be_charged=kind < 0.15)
            else:
                ledger.enter_answer(reservation, Answer("{}", int(2000 * share), int(500 * share)))
            return True

        with ThreadPoolExecutor(8) as pool:
            paid = list(pool.map(call, range(200)))
        assert ledger.spent <= budget + 1e-12 and highest <= budget + 1e-12
        assert budget - ledger.spent < ledger.cost(2000, 500), "it is used until it does not pay for a call"
        assert 5 < sum(paid) < 200
    with Ledger(tmp_path / "cache", PRICES, budget) as ledger, pytest.raises(BudgetSpentError):
        ledger.reserve(KEYS[0], 0, 2000, 500)


def test_a_call_waits_for_those_that_may_leave_something_over(tmp_path):
    with Ledger(tmp_path / "cache", PRICES, budget=0.0045) as ledger:
        first = ledger.reserve(KEYS[0], 0, 1000, 500)  # sets 0.003 aside
        with ThreadPoolExecutor(1) as pool:
            second = pool.submit(ledger.reserve, KEYS[1], 0, 1000, 500)
            with pytest.raises(TimeoutError):
                second.result(0.1)
            ledger.enter_answer(first, Answer("{}", 100, 100))  # 0.0005
            assert second.result(60).most == pytest.approx(0.003)


def test_a_server_that_counts_more_than_was_allowed_is_given_more_room(tmp_path, caplog):
    with Ledger(tmp_path / "cache", PRICES, budget=1.0) as ledger:
        ledger.enter_answer(ledger.reserve(KEYS[0], 0, 100, 100), Answer("{}", 100, 300))
        assert "counted more tokens than a request allowed" in caplog.text
        again = ledger.reserve(KEYS[1], 0, 100, 100)
        assert again.most >= ledger.cost(100, 300)


def test_a_budget_needs_prices(tmp_path):
    with pytest.raises(ValueError, match="--llm_budget needs --llm_price"):
        Ledger(tmp_path / "cache", None, 1.0)


@pytest.mark.parametrize("seed", range(5))
def test_no_minute_has_more_than_its_limit(seed):
    dice, limit, now, taken = random.Random(seed), RateLimit(100), 0.0, []
    for _ in range(300):
        amount = dice.choice((1, 7, 40, 99))
        while (wait := limit.wait(amount, now)) > 0:
            assert wait <= MINUTE
            now += wait
        limit.take(amount, now)
        taken.append((now, amount))
        now += dice.random() * 3
    for start, _ in taken:  # every window of a minute, by hand
        assert sum(amount for when, amount in taken if start <= when < start + 60) <= 100
    assert sum(amount for _, amount in taken) / now * 60 > 50, "it is no slower than it has to be"
    assert RateLimit(100).wait(1000, 0.0) == 0.0, "what never fits goes when nothing else does"
    assert RateLimit(None).wait(1e9, 0.0) == 0.0


def test_a_failure_that_passes_is_tried_again_and_its_cost_counts(tmp_path):
    broke, refused = failure(may_be_charged=True), failure(may_be_charged=False)
    client = Scripted(broke, refused, Answer("{}", 10, 10))
    with Ledger(tmp_path / "cache", PRICES) as ledger:
        answer = Calls(client, ledger, Limits(pause_s=0.001)).ask(KEYS[0], 0, [], {}, (100, 1000, 50))
        assert answer.text == "{}" and ledger.calls == 3
        assert ledger.spent == pytest.approx(ledger.cost(1000, 50) + ledger.cost(10, 10))


def test_pauses_grow_and_tries_end(tmp_path, monkeypatch):
    pauses = []
    client = Scripted(*[failure() for _ in range(9)])
    with Ledger(tmp_path / "cache") as ledger:
        calls = Calls(client, ledger, Limits(tries=6, pause_s=1.0))
        monkeypatch.setattr(calls._stopped, "wait", pauses.append)
        with pytest.raises(CallFailedError, match="out of order"):
            calls.ask(KEYS[0], 0, [], {}, (1, 1, 1))
    assert client.count == 6
    assert all(0.5 * 2**number <= pause <= 1.5 * 2**number for number, pause in enumerate(pauses)) and len(pauses) == 5


def test_a_busy_server_uses_up_no_try_and_holds_all_calls_back(tmp_path):
    client = Scripted(*[failure(is_busy=True, retry_after=0.02) for _ in range(10)], Answer("{}", 1, 1))
    with Ledger(tmp_path / "cache") as ledger:
        calls = Calls(client, ledger, Limits(tries=2, pause_s=0.001))
        assert calls.ask(KEYS[0], 0, [], {}, (1, 1, 1)).text == "{}"
        assert client.count == 11


def test_what_will_not_pass_ends_all_calls(tmp_path):
    for first in (failure("fatal"), failure(is_busy=True, retry_after=9999.0)):
        client = Scripted(first)
        with Ledger(tmp_path / "cache") as ledger:
            calls = Calls(client, ledger, Limits(pause_s=0.001))
            for _ in range(2):
                with pytest.raises(CallFailedError):
                    calls.ask(KEYS[0], 0, [], {}, (1, 1, 1))
            assert client.count == 1 and calls.closed_because


def test_a_long_wait_for_a_busy_server_is_told_once(tmp_path, monkeypatch, caplog):
    now = [0.0]
    monkeypatch.setattr(llm_calls, "time", SimpleNamespace(monotonic=lambda: now[0]))
    client = Scripted(*[failure(is_busy=True, retry_after=30.0) for _ in range(3)])
    with Ledger(tmp_path / "cache") as ledger:
        calls = Calls(client, ledger, Limits())
        monkeypatch.setattr(calls._stopped, "wait", lambda seconds: now.__setitem__(0, now[0] + seconds))
        assert calls.ask(KEYS[0], 0, [], {}, (1, 1, 1)).text == "{}"
    assert now[0] > 90
    assert caplog.text.count("all calls wait for 3") == 2, "the second one came right behind the first"


def test_many_failures_in_a_row_end_all_calls_and_an_answer_between_them_does_not(tmp_path):
    script = [step for _ in range(10) for step in (failure(), failure(), Answer("{}", 1, 1))]
    client = Scripted(*script, *[failure() for _ in range(99)])
    with Ledger(tmp_path / "cache") as ledger:
        calls = Calls(client, ledger, Limits(tries=1, failures_in_a_row=3))
        for number in range(40):
            try:
                calls.ask(KEYS[0], number, [], {}, (1, 1, 1))
            except CallFailedError as failed:
                reason = failed.reason
        assert client.count == 33 and reason == "the server has stopped answering"
