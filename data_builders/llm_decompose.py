"""Report -> sentences by organ, by a language model that may choose sentences and cannot write any.

(1) organs, the numbered sentences of a report and what to do go into ONE question (`llm_answers`)
(2) it is sent within the limits of rate and budget, many at once (`llm_calls`); what was answered before, by a run
    that was killed too, is read from the file of answers (`llm_ledger`)
(3) an answer that fails the check is asked for again, with what was wrong, then given up
(4) the result of the rules stands wherever there is no checked answer, and its reason is counted
"""

import hashlib
import json
import math
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace

from .cases import OrganText, counted
from .decomposition import Decomposition
from .llm_answers import AnswerRefusedError, Numbered, Prompt, Report, answer_schema, numbered, read_answer
from .llm_calls import Calls, Limits
from .llm_client import CallFailedError, ChatClient, HTTPClient
from .llm_ledger import BudgetSpentError, Ledger
from .personal_text import kinds_in_text

BYTES_PER_TOKEN = 3.5  # of English reports and JSON, about; servers that count tokens correct it afterwards
TOKENS_AROUND = 128  # what a server puts around the messages of a question, at most
TOKENS_PER_SENTENCE = {"expected": 22, "most": 64}  # of an answer in numbers; with blanks and line ends, the latter
MOST_SENTENCES = 400  # of a report that is asked for: more is no report of one scan
MOST_SENTENCE_BYTES = 60_000  # all of them together
LOW_AGREEMENT = 0.6  # of a model with the rules, which are right far more often than that
NOT_BY_MODEL = "not by the model: "  # in the notes of a decomposition, before the reason
REFUSED_SHOWN = 2_000  # characters of a refused answer that are shown to the model again
SAMPLED = 300  # reports of which the rules are run, before only every second one is, to estimate how many are uncertain

Rules = Callable[[Report], Decomposition]


@dataclass(frozen=True)
class Settings:
    """How a model is asked.

    Attributes:
        prompt: What it is told.
        form: "numbers" or "quotes".
        is_hybrid: Whether reports that the rules are certain of are left to them.
        answers: Answers to one report that are looked at before it is left to the rules.
        max_tokens: Of an answer; None: by the number of sentences.
        limits: Of the calls.
        tokens_per_second: Of one call's answer, to estimate the time.
    """

    prompt: Prompt
    form: str = "numbers"
    is_hybrid: bool = False
    answers: int = 2
    max_tokens: int | None = None
    limits: Limits = Limits()
    tokens_per_second: float = 40.0


@dataclass
class Tally:
    """What became of the reports.

    Attributes:
        asked, remembered: Reports with a checked answer, from the model and from the cache.
        certain: Left to the rules on purpose: they are certain of them (hybrid), or there is nothing to split.
        fallen_back: Reason -> reports that the model should have answered and the rules did.
        refused: Reason -> answers that failed the check, also where a later one passed.
        by_model, by_rules, by_both: Sentences of organs in the reports that the model has split, by whom.
    """

    asked: int = 0
    remembered: int = 0
    certain: int = 0
    fallen_back: Counter = field(default_factory=Counter)
    refused: Counter = field(default_factory=Counter)
    by_model: int = 0
    by_rules: int = 0
    by_both: int = 0

    def compare(self, by_model: Mapping[str, OrganText], by_rules: Mapping[str, OrganText]) -> None:
        """Count what two splits of one report have in common."""
        ours, theirs = (
            Counter((organ, text) for organ, said in texts.items() for text in (*said.findings, *said.impression))
            for texts in (by_model, by_rules)
        )
        self.by_model += ours.total()
        self.by_rules += theirs.total()
        self.by_both += (ours & theirs).total()

    @property
    def agreement(self) -> float | None:
        """F1 of the model's sentences by organ against the rules'; None where there is nothing to compare."""
        both = self.by_model + self.by_rules
        return 2 * self.by_both / both if both else None

    def to_json(self) -> dict:
        return {
            "asked": self.asked,
            "from_cache": self.remembered,
            "left_to_rules": self.certain,
            "fell_back_to_rules": dict(self.fallen_back.most_common()),
            "refused_answers": dict(self.refused.most_common()),
            "agreement_with_rules": None if self.agreement is None else round(self.agreement, 4),
        }

    def lines(self) -> list[str]:
        """What to tell the user at the end."""
        told = [
            f"language model: {counted(self.asked, 'report')} answered, {self.remembered} more from the cache, "
            f"{self.certain} left to the rules, {self.fallen_back.total()} fell back to the rules"
        ]
        told += [f"  {number} fell back: {reason}" for reason, number in self.fallen_back.most_common()]
        told += [f"  {counted(number, 'answer')} refused: {kind}" for kind, number in self.refused.most_common()]
        if self.agreement is not None:
            line = f"  sentences by organ agree with the rules' at F1 {self.agreement:.2f} in the reports it has split"
            is_low = self.agreement < LOW_AGREEMENT and self.by_rules >= 50
            told.append(f"{line}: LOW. Look at both (report-page) before you use them" if is_low else line)
        return told


def estimated_tokens(text: str) -> int:
    return math.ceil(len(text.encode()) / BYTES_PER_TOKEN)


@dataclass(frozen=True)
class Question:
    """What is asked of one report.

    Attributes:
        key: Hash of all that decides the answer: the model, its words, the schema; with them report, organs and prompt.
        tokens: Of the question as estimated, of the question at most, of the answer at most.
    """

    messages: tuple[dict[str, str], ...]
    schema: dict
    key: str
    tokens: tuple[int, int, int]


class Asker:
    """Asks one model of reports, by the same settings. Safe to be used from several threads."""

    def __init__(self, client: ChatClient, organs: Sequence[str], ledger: Ledger, settings: Settings) -> None:
        self.client, self.organs, self.ledger, self.settings = client, tuple(organs), ledger, settings
        self.schema = answer_schema(self.organs, settings.form)
        self.system = settings.prompt.system(self.organs, settings.form)
        self.calls = Calls(client, ledger, settings.limits)
        self.tally, self._lock = Tally(), threading.Lock()

    def question(self, report: Numbered) -> Question:
        """The first question of a report (step 1)."""
        messages = ({"role": "system", "content": self.system}, {"role": "user", "content": report.text()})
        asked = json.dumps([self.client.model, messages, self.schema], sort_keys=True)
        key = hashlib.sha256(asked.encode()).hexdigest()
        return Question(messages, self.schema, key, self.tokens(messages, report))

    def tokens(self, messages: Sequence[dict[str, str]], report: Numbered) -> tuple[int, int, int]:
        text = "".join(message["content"] for message in messages)
        # No tokenizer makes more tokens than there are bytes. The schema is part of the question on some servers.
        size = len(json.dumps(self.schema)) if isinstance(self.client, HTTPClient) else 0
        return estimated_tokens(text), len(text.encode()) + size + TOKENS_AROUND, self.most_tokens(report)

    def most_tokens(self, report: Numbered) -> int:
        """The most that an answer may have."""
        if self.settings.max_tokens is not None:
            return self.settings.max_tokens
        if self.settings.form == "numbers":
            return 128 + TOKENS_PER_SENTENCE["most"] * len(report.sentences)
        return 256 + 30 * len(self.organs) + 4 * estimated_tokens(report.text())

    def expected_tokens(self, report: Numbered) -> int:
        if self.settings.form == "numbers":
            return 16 + TOKENS_PER_SENTENCE["expected"] * len(report.sentences)
        return 16 + 25 * min(len(self.organs), len(report.sentences)) + math.ceil(1.3 * estimated_tokens(report.text()))

    def why_not(self, report: Numbered) -> str | None:
        """Why a report cannot be asked for, or None."""
        if len(report.sentences) > MOST_SENTENCES:
            return f"more than {MOST_SENTENCES} sentences"
        if len(report.text().encode()) > MOST_SENTENCE_BYTES:
            return f"more than {MOST_SENTENCE_BYTES // 1000} kB of text"
        return None

    def ask(self, report: Numbered, question: Question) -> tuple[dict[str, OrganText] | None, str, bool]:
        """(texts by organ, why there are none, whether all came from the cache)."""
        messages, room = list(question.messages), 1
        is_remembered, reason = True, ""
        for attempt in range(self.settings.answers):
            answer = self.ledger.answer(question.key, attempt)
            if answer is None:
                is_remembered = False
                try:
                    *tokens_in, tokens_out = self.tokens(messages, report)
                    tokens = (*tokens_in, tokens_out * room)
                    answer = self.calls.ask(question.key, attempt, messages, question.schema, tokens)
                except CallFailedError as failure:
                    return None, failure.reason, False
                except BudgetSpentError:
                    return None, "the budget is spent", False
            try:
                return read_answer(answer, report, self.organs, self.settings.form), "", is_remembered
            except AnswerRefusedError as refused:
                with self._lock:
                    self.tally.refused[refused.kind] += 1
                reason = f"no usable answer ({refused.kind})"
                if answer.is_cut and self.settings.max_tokens is None:
                    room *= 2
                # The same question would have the same answer: the model is told what was wrong.
                again = f"{self.settings.prompt.again} {refused}"
                messages = [
                    *question.messages,
                    {"role": "assistant", "content": answer.text[:REFUSED_SHOWN] or "-"},
                    {"role": "user", "content": again},
                ]
        return None, reason, is_remembered


def decompose_with_llm(
    reports: Iterable[Report],
    organs: Sequence[str],
    client: ChatClient,
    rules: Rules,
    ledger: Ledger,
    settings: Settings,
    tally: Tally | None = None,
) -> Iterator[Decomposition]:
    """Decompositions in the order of the reports: the model's where its answer passes the check, else the rules'.

    Args:
        reports: Read as they are needed: a few times `settings.limits.concurrency` are held at once.
        organs: Of the set.
        client: Who is asked.
        rules: Their result for a report, with `uncertain_sentences` for `is_hybrid`.
        ledger: Open; what it holds is not asked again.
        tally: Counted into.

    Raises:
        ValueError: If the ledger cannot be written, or the first call fails in a way that all would: no key, no such
            model.
    """
    asker = Asker(client, organs, ledger, settings)
    asker.tally = tally = Tally() if tally is None else tally
    most_pending = 4 * settings.limits.concurrency
    under_way: dict[str, Future] = {}
    pending: deque[tuple[Decomposition, str | None, Future | None]] = deque()
    workers = 1 if client.is_serial else settings.limits.concurrency
    pool = ThreadPoolExecutor(workers, thread_name_prefix="llm")

    def done() -> Decomposition:
        by_rules, key, future = pending.popleft()
        if future is None:
            return by_rules
        texts, reason, is_remembered = future.result()
        if all(other is not future for _, _, other in pending):
            under_way.pop(key, None)
        if texts is not None and not texts and by_rules.organs:
            texts, reason = None, "no usable answer (no sentence is given to any organ)"
        if texts is None:
            tally.fallen_back[reason] += 1
            return replace(by_rules, notes={**by_rules.notes, f"{NOT_BY_MODEL}{reason}": 1})
        tally.compare(texts, by_rules.organs)
        tally.remembered += is_remembered
        tally.asked += not is_remembered
        return replace(by_rules, organs=texts, method="llm", uncertain_sentences=())

    try:
        for report in reports:
            by_rules = rules(report)
            sentences = numbered(report)
            if not sentences.sentences or (settings.is_hybrid and not is_uncertain(by_rules)):
                tally.certain += 1
                pending.append((by_rules, None, None))
            elif (why_not := asker.why_not(sentences)) is not None:
                refused = Future()
                refused.set_result((None, why_not, False))
                pending.append((by_rules, "", refused))
            else:
                question = asker.question(sentences)
                future = under_way.get(question.key)  # reconstructions of one scan have one report
                if future is None:
                    is_first = ledger.calls == 0  # no other is under way: each before it was waited for
                    future = under_way[question.key] = pool.submit(asker.ask, sentences, question)
                    if is_first:
                        future.result()  # alone: it finds out what the server takes, and whether it lets us in
                        check_first(asker.calls)
                pending.append((by_rules, question.key, future))
            if len(pending) > most_pending:
                yield done()
        while pending:
            yield done()
    except BaseException:  # also where the caller takes no more of them
        asker.calls.stop()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def is_uncertain(by_rules: Decomposition) -> bool:
    """Whether a hybrid run asks: a sentence has no sure place, or the rules do not know the language."""
    return bool(by_rules.uncertain_sentences) or "not_english" in by_rules.notes


def check_first(calls: Calls) -> None:
    """Raise a ValueError where the first call failed as all others would."""
    if calls.answered == 0 and calls.closed_because is not None:
        raise ValueError(
            f"the language model cannot be asked: {calls.closed_because}. Look at --llm_url, --llm_model and the key "
            "in the variable that --llm_key_variable names."
        )


@dataclass(frozen=True)
class Estimate:
    """What a run will ask and cost, about.

    Attributes:
        reports: All of them.
        to_ask: Those that would be asked now.
        remembered: Those whose answer is in the cache.
        cost: None without prices.
        seconds: By the speed that was given and the limits.
        concurrency: Calls at once.
        personal: Reports that seem to hold a name, a date or a number of a person, where that was looked for.
    """

    reports: int
    to_ask: int
    remembered: int
    tokens_in: int
    tokens_out: int
    cost: float | None
    seconds: float
    concurrency: int
    personal: int = 0

    def lines(self, ledger: Ledger, settings: Settings) -> list[str]:
        told = [
            f"estimate: {self.to_ask} of {counted(self.reports, 'report')} to ask, {self.remembered} in the cache; "
            f"about {self.tokens_in:,} tokens in and {self.tokens_out:,} out, {duration(self.seconds)} at "
            f"{counted(self.concurrency, 'call')} at a time and {settings.tokens_per_second:g} tokens a second each"
        ]
        if self.cost is None:
            told.append("  cost: unknown without --llm_price IN OUT (of a million tokens)")
            return told
        line = f"  cost: about {money(self.cost)} at your prices, refused answers not counted"
        if ledger.budget is not None:
            left = max(0.0, ledger.budget - ledger.spent)
            line += f"; budget {ledger.budget:g}, of which {money(ledger.spent)} is spent"
            if self.cost > left:
                line += f": it will do for about {int(self.to_ask * left / self.cost)} reports, the rules do the others"
        return [*told, line]


def estimate(
    reports: Iterable[Report],
    organs: Sequence[str],
    client: ChatClient,
    rules: Rules,
    ledger: Ledger,
    settings: Settings,
    look_for_persons: bool = False,
) -> Estimate:
    """What `decompose_with_llm` will ask and cost. Nothing is asked.

    In a hybrid run the rules are run on a part of the reports, ever more thinly spread, which stands for all.

    Args:
        look_for_persons: Whether to count the reports that seem to name a person.
    """
    asker = Asker(client, organs, ledger, settings)
    seen: set[str] = set()
    number = to_ask = remembered = tokens_in = tokens_out = personal = 0
    stride, runs, sampled, uncertain = 1, 0, 0, 0
    for report in reports:
        number += 1
        sentences = numbered(report)
        if not sentences.sentences or asker.why_not(sentences) is not None:
            continue
        if look_for_persons:
            personal += bool(kinds_in_text(sentences.text()))
        if settings.is_hybrid and number % stride == 0:
            runs, sampled = runs + 1, sampled + stride
            uncertain += stride * is_uncertain(rules(report))
            stride *= 2 if runs % SAMPLED == 0 else 1
        question = asker.question(sentences)
        if question.key in seen:
            continue
        seen.add(question.key)
        if ledger.answer(question.key, 0) is not None:
            remembered += 1
            continue
        to_ask += 1
        tokens_in += question.tokens[0]
        tokens_out += asker.expected_tokens(sentences)
    share = uncertain / sampled if sampled else 1.0
    to_ask, tokens_in, tokens_out = (round(share * value) for value in (to_ask, tokens_in, tokens_out))
    limits = settings.limits
    workers = 1 if client.is_serial else limits.concurrency
    seconds = tokens_out / settings.tokens_per_second / workers
    if limits.requests_per_minute is not None:
        seconds = max(seconds, 60 * to_ask / limits.requests_per_minute)
    if limits.tokens_per_minute is not None:
        seconds = max(seconds, 60 * (tokens_in + tokens_out) / limits.tokens_per_minute)
    cost = None if ledger.prices is None else ledger.cost(tokens_in, tokens_out)
    return Estimate(number, to_ask, remembered, tokens_in, tokens_out, cost, seconds, workers, personal)


def money(amount: float) -> str:
    """Two decimals, or two digits of what is less than one."""
    return f"{amount:,.2f}" if amount >= 1 or amount == 0 else f"{amount:.2g}"


def duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    if minutes < 2:
        return f"{max(1, round(seconds))} s"
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"
