"""Many calls of a language model within limits: a rate, a budget, pauses that a server asks for, and an end to trying.

(1) a call waits for its turn: so many requests and tokens in any minute, and none before the time a server named
(2) its largest possible cost is set aside in the ledger, and it is sent
(3) a failure that may pass is tried again after a pause that doubles, with some chance in it so that calls do not
    come back together; with Retry-After all calls wait so long. A busy server (status 429) uses up no try
(4) after many failures in a row, or one that will not pass, nothing is sent any more: those who ask are told why at
    once, and the same command goes on another time
"""

import logging
import random
import threading
import time
from collections import deque
from dataclasses import dataclass

from .llm_client import Answer, CallFailedError, ChatClient, Messages
from .llm_ledger import Ledger

logger = logging.getLogger(__name__)

MINUTE = 61.0  # a second more: a request may reach the server later than it was counted here
MOST_BUSY = 40  # answers of status 429 to one call before it is given up
LONG_PAUSE_S = 20.0  # of which the user is told
MOST_PAUSE_S = 60.0  # between two tries, where the server names no time


@dataclass(frozen=True)
class Limits:
    """What calls keep to.

    Attributes:
        concurrency: Calls under way at once.
        requests_per_minute, tokens_per_minute: None: no limit. Tokens are the estimated ones of the question and the
            most that may be answered, as servers reckon.
        tries: Requests for one answer, those to a busy server not counted.
        pause_s: Before the second one; doubled from one to the next.
        most_wait_s: The longest Retry-After that is waited for.
        failures_in_a_row: Calls given up one after the other before nothing is sent any more.
    """

    concurrency: int = 8
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    tries: int = 6
    pause_s: float = 1.0
    most_wait_s: float = 600.0
    failures_in_a_row: int = 20


class RateLimit:
    """At most so much in any minute."""

    def __init__(self, per_minute: float | None) -> None:
        self.per_minute = per_minute
        self._taken: deque[tuple[float, float]] = deque()  # when, how much
        self._sum = 0.0

    def wait(self, amount: float, now: float) -> float:
        """Seconds until so much may be taken. More than a whole minute's worth goes when nothing else does."""
        if self.per_minute is None:
            return 0.0
        while self._taken and self._taken[0][0] <= now - MINUTE:
            self._sum -= self._taken.popleft()[1]
        total = self._sum
        if not self._taken or total + amount <= self.per_minute:
            return 0.0
        for when, taken in self._taken:
            total -= taken
            if total + amount <= self.per_minute:
                return when + MINUTE - now
        return self._taken[-1][0] + MINUTE - now

    def take(self, amount: float, now: float) -> None:
        if self.per_minute is not None:
            self._taken.append((now, amount))
            self._sum += amount


class Calls:
    """Calls of one client within limits. Safe to be used from several threads."""

    def __init__(self, client: ChatClient, ledger: Ledger, limits: Limits) -> None:
        self.client, self.ledger, self.limits = client, ledger, limits
        self.closed_because: str | None = None
        self.answered = 0
        self.seconds = 0.0  # that answered calls took together
        self._requests = RateLimit(limits.requests_per_minute)
        self._tokens = RateLimit(limits.tokens_per_minute)
        self._lock, self._stopped = threading.Lock(), threading.Event()
        self._not_before = 0.0
        self._in_a_row = 0
        self._told: set[str] = set()
        self._tell_after = 0.0

    def stop(self) -> None:
        """End all calls: those that wait at once, those under way by ending their connections."""
        self._close("the run was stopped")
        self._stopped.set()
        self.client.close()

    def ask(self, key: str, attempt: int, messages: Messages, schema: dict, tokens: tuple[int, int, int]) -> Answer:
        """One answer, written into the ledger.

        Args:
            key, attempt: What it is kept under.
            tokens: Of the question as estimated, of the question at most, of the answer at most.

        Raises:
            CallFailedError: If there is none.
            BudgetSpentError: If the budget does not pay for it.
        """
        estimated, most_in, most_out = tokens
        tries = times_busy = 0
        while True:
            self._wait_for_turn(estimated + most_out)
            reservation = self.ledger.reserve(key, attempt, most_in, most_out)
            begin = time.monotonic()
            try:
                answer = self.client.ask(messages, schema, most_out)
            except CallFailedError as failure:
                self.ledger.enter_failure(reservation, failure.reason, failure.may_be_charged)
                tries, times_busy = tries + (not failure.is_busy), times_busy + failure.is_busy
                self._look_at(failure)
                if failure.kind != "passing" or tries >= self.limits.tries or times_busy >= MOST_BUSY:
                    self._count_failure(failure)
                    raise
                self._pause(failure, (times_busy if failure.is_busy else tries) - 1)
            except BaseException as error:  # our own fault, or Ctrl-C: the money may be gone all the same
                self.ledger.enter_failure(reservation, type(error).__name__, may_be_charged=True)
                raise
            else:
                self.ledger.enter_answer(reservation, answer)
                with self._lock:
                    self._in_a_row = 0
                    self.answered += 1
                    self.seconds += time.monotonic() - begin
                return answer

    def _check_open(self) -> None:
        if self.closed_because is not None:
            raise CallFailedError(self.closed_because, "fatal")

    def _close(self, reason: str) -> None:
        with self._lock:
            if self.closed_because is None:
                self.closed_because = reason

    def _wait_for_turn(self, tokens: int) -> None:
        """Wait until limits and pauses let a call through, and count it (step 1)."""
        while True:
            self._check_open()
            with self._lock:
                now = time.monotonic()
                wait = max(self._not_before - now, self._requests.wait(1, now), self._tokens.wait(tokens, now))
                if wait <= 0:
                    self._requests.take(1, now)
                    self._tokens.take(tokens, now)
                    return
            # In short pieces: another call may have ended the waiting, and a little apart from the others.
            self._stopped.wait(min(wait, 1.0) * random.uniform(1.0, 1.1))

    def _look_at(self, failure: CallFailedError) -> None:
        """Stop everything for what will not pass (step 4)."""
        if failure.kind == "fatal":
            if self.closed_because is None:
                logger.warning(f"{failure}. Nothing is sent any more.")
            self._close(failure.reason)
        wait = failure.retry_after or 0.0
        if wait > self.limits.most_wait_s:
            logger.warning(f"the server asks to wait {wait:.0f} s ({failure}). Nothing is sent any more.")
            self._close("the server asks for a longer wait than --llm_most_wait")

    def _count_failure(self, failure: CallFailedError) -> None:
        with self._lock:
            is_new = failure.kind != "fatal" and failure.reason not in self._told
            self._told.add(failure.reason)
            if failure.kind == "passing" or not self.answered:
                self._in_a_row += 1
            is_over = self._in_a_row >= self.limits.failures_in_a_row and self.closed_because is None
        if is_new:  # what the server said stands nowhere else
            logger.warning(f"a call was given up: {failure}. Others like it are counted at the end.")
        if is_over:
            logger.warning(f"{self._in_a_row} calls failed one after the other: {failure}. Nothing is sent any more.")
            self._close("the server has stopped answering")

    def _pause(self, failure: CallFailedError, number: int) -> None:
        """Wait before the next try (step 3)."""
        wait = min(self.limits.pause_s * 2**number, MOST_PAUSE_S) * random.uniform(0.5, 1.5)
        if failure.retry_after is not None:
            wait = failure.retry_after + wait * random.uniform(0.0, 0.2)
        if failure.is_busy:  # the limit is that of all calls
            with self._lock:
                now = time.monotonic()
                self._not_before = max(self._not_before, now + wait)
                is_news = wait >= LONG_PAUSE_S and now >= self._tell_after
                self._tell_after = now + wait + LONG_PAUSE_S if is_news else self._tell_after
            if is_news:  # nothing else is to be seen meanwhile
                logger.warning(f"{failure}: all calls wait for {wait:.0f} s.")
        else:
            self._stopped.wait(wait)
            self._check_open()
