"""What a language model has answered and what that cost, in one file that only grows: a killed run pays nothing twice.

A line is JSON, and is on the disk before anything is done with what it says:
    {"call": 7, "run": "5f3a", "key": "9c1e...", "attempt": 0, "most": 0.0031}              before a request is sent
    {"end": 7, "run": "5f3a", "cost": 0.0008, "tokens": [812, 140], "key": ..., "text": ...}   the model answered
    {"end": 7, "run": "5f3a", "cost": 0.0031, "failed": "the connection broke off"}            it did not

(1) an answer is kept under a hash of everything that was asked, and found again by it, whatever run asked
(2) a budget holds for the whole file. Before a request its largest possible cost is set aside, so that requests that
    are under way together cannot pass the budget; afterwards what it did cost takes its place
(3) where nobody knows what a request cost (it broke off, or the process was killed), the largest possible cost counts
"""

import json
import logging
import os
import threading
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .llm_client import Answer

try:
    import fcntl
except ImportError:  # not on Windows: two runs with one file are not told apart there
    fcntl = None

logger = logging.getLogger(__name__)

PRICES_ARE_FOR = 1_000_000  # tokens
FIRST = b'{"call": '  # so every file begins; the process may have been killed in the midst of it


class BudgetSpentError(Exception):
    """What is left of the budget does not pay for a request."""


@dataclass(frozen=True)
class Reservation:
    """A request that may be sent: its number in this run, what was asked, and the most that it may cost."""

    number: int
    key: str
    attempt: int
    tokens_in: int
    tokens_out: int
    most: float


class Ledger:
    """The file of answers and costs. Safe to be used from several threads; one process at a time.

    Args:
        path: Made where it is not there, readable by its owner alone: answers may quote reports.
        prices: Of a million tokens in, and out, in any currency; None: nothing is reckoned.
        budget: The most that all calls in the file may cost together, in the same currency.

    Attributes:
        calls, tokens_in, tokens_out: Of this run.
        uncounted: Answers of this run whose tokens the server did not count.
        spent: Of all runs, with (3).

    Raises:
        ValueError: If the file cannot be written, belongs to a run that lasts, or is no such file; or if there is a
            budget and no price.
    """

    def __init__(self, path: Path, prices: tuple[float, float] | None = None, budget: float | None = None) -> None:
        if budget is not None and prices is None:
            raise ValueError("--llm_budget needs --llm_price IN OUT, what a million tokens cost.")
        self.path, self.prices, self.budget = path, prices, budget
        self.run = uuid.uuid4().hex[:12]
        self.calls = self.tokens_in = self.tokens_out = self.uncounted = 0
        self.spent = self.spent_before = 0.0
        self._reserved: dict[int, float] = {}
        self._number = 0
        self._excess = 1.0
        self._places: dict[tuple[bytes, int], tuple[int, int]] = {}
        self._changed = threading.Condition()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        except OSError as error:
            raise ValueError(f"--llm_cache {path} cannot be written: {error.strerror}.") from None
        try:
            self._lock_file()
            self._read()
        except BaseException:
            os.close(self._file)
            raise
        self._reader = path.open("rb")

    def __enter__(self) -> "Ledger":
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def close(self) -> None:
        self._reader.close()
        os.close(self._file)

    def answer(self, key: str, attempt: int) -> Answer | None:
        """What was answered to this question the `attempt`-th time (from 0), or None."""
        with self._changed:
            place = self._places.get((bytes.fromhex(key), attempt))
            if place is None:
                return None
            self._reader.seek(place[0])
            entry = json.loads(self._reader.read(place[1]))
        return Answer(entry["text"], *entry["tokens"], is_cut=entry.get("is_cut", False))

    def cost(self, tokens_in: int, tokens_out: int) -> float:
        """What so many tokens cost; 0 without prices."""
        if self.prices is None:
            return 0.0
        return (tokens_in * self.prices[0] + tokens_out * self.prices[1]) / PRICES_ARE_FOR

    def reserve(self, key: str, attempt: int, tokens_in: int, tokens_out: int) -> Reservation:
        """Set aside what a request may cost at most, before it is sent (step 2).

        While others are under way that may cost less than was set aside for them, this waits for them.

        Args:
            tokens_in, tokens_out: The most that it may have.

        Raises:
            BudgetSpentError: If the budget does not pay for it.
        """
        with self._changed:
            most = self.cost(tokens_in, tokens_out) * self._excess
            while self.budget is not None and self.spent + sum(self._reserved.values()) + most > self.budget:
                if not self._reserved:
                    raise BudgetSpentError
                self._changed.wait()
                most = self.cost(tokens_in, tokens_out) * self._excess
            self._number += 1
            reservation = Reservation(self._number, key, attempt, tokens_in, tokens_out, most)
            self._write({"call": self._number, "run": self.run, "key": key, "attempt": attempt, "most": most})
            self._reserved[self._number] = most
            self.calls += 1
            return reservation

    def enter_answer(self, reservation: Reservation, answer: Answer) -> None:
        """Write what was answered, and what it cost, to the disk."""
        with self._changed:
            # A count that a server does not give is taken for the largest one.
            self.uncounted += answer.tokens_in is None or answer.tokens_out is None
            tokens_in = reservation.tokens_in if answer.tokens_in is None else answer.tokens_in
            tokens_out = reservation.tokens_out if answer.tokens_out is None else answer.tokens_out
            cost = self.cost(tokens_in, tokens_out)
            self._look_for_excess(reservation, cost)
            self.tokens_in += tokens_in
            self.tokens_out += tokens_out
            entry = {"end": reservation.number, "run": self.run, "cost": cost, "tokens": [tokens_in, tokens_out]}
            entry |= {"key": reservation.key, "attempt": reservation.attempt, "text": answer.text}
            self._settle(reservation, cost, entry | ({"is_cut": True} if answer.is_cut else {}))

    def enter_failure(self, reservation: Reservation, reason: str, may_be_charged: bool) -> None:
        """Write that a request has failed; it costs the most it may, or nothing."""
        with self._changed:
            cost = reservation.most if may_be_charged else 0.0
            entry = {"end": reservation.number, "run": self.run, "cost": cost, "failed": reason}
            self._settle(reservation, cost, entry)

    def _settle(self, reservation: Reservation, cost: float, entry: dict) -> None:
        try:
            self._write(entry)
        finally:
            self._reserved.pop(reservation.number)
            self.spent += cost
            self._changed.notify_all()

    def _look_for_excess(self, reservation: Reservation, cost: float) -> None:
        """Set more aside for the next requests where a server counts more tokens than it was allowed to make."""
        if cost > reservation.most * (1 + 1e-9):
            if self._excess == 1.0:
                logger.warning(
                    f"the server counted more tokens than a request allowed: {cost:.6g} instead of at most "
                    f"{reservation.most:.6g}. From now on more is set aside; look whether it keeps to max_tokens."
                )
            self._excess = max(self._excess, self._excess * cost / reservation.most if reservation.most else 1.0)

    def _write(self, entry: dict) -> None:
        line = json.dumps(entry).encode() + b"\n"
        try:
            start = os.lseek(self._file, 0, os.SEEK_END)
            rest = memoryview(line)
            while rest:
                rest = rest[os.write(self._file, rest) :]
            os.fsync(self._file)
        except OSError as error:
            # Nothing may be asked that could not be written down.
            raise ValueError(
                f"--llm_cache {self.path} cannot be written: {error.strerror}. What is in it stays; mend that and run "
                "the same command again."
            ) from None
        self._note(entry, start, len(line))

    def _note(self, entry: dict, start: int, length: int) -> None:
        if "text" in entry:
            self._places.setdefault((bytes.fromhex(entry["key"]), entry["attempt"]), (start, length))

    def _lock_file(self) -> None:
        """The system gives the lock up when the process ends, however it ends."""
        if fcntl is None:
            return
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"--llm_cache {self.path} is in use by another run; wait for it, or name another file."
            ) from None
        except OSError:
            pass  # a file system without locks

    def _read(self) -> None:
        """Find the answers, and add up what was spent."""
        under_way: dict[tuple[str, int], float] = {}
        start = 0
        for line in self._lines():
            beginning = line.rstrip(b"\n")[: len(FIRST)]
            if not start and not FIRST.startswith(beginning):
                raise ValueError(f"--llm_cache {self.path} is no file of answers; name another one.")
            try:
                entry = json.loads(line)
                if "call" in entry:
                    under_way[entry["run"], entry["call"]] = float(entry["most"])
                else:
                    under_way.pop((entry["run"], entry["end"]), None)
                    self.spent += float(entry["cost"])
                    self._note(entry, start, len(line))
            except (ValueError, KeyError, TypeError):
                pass  # the end of a line that was being written when its run was killed
            start += len(line)
        self.spent += sum(under_way.values())
        self.spent_before = self.spent

    def _lines(self) -> Iterator[bytes]:
        """Whole lines; one that a killed run left without its end is ended."""
        last = b"\n"
        with self.path.open("rb") as file:
            for line in file:
                last = line
                yield line
        if not last.endswith(b"\n"):
            os.write(self._file, b"\n")
