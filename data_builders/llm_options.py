"""The options of a language model on the command line, and the model that they name.

with open_llm(args, organs, out) as model:
    if model.begin(reports, rules):                       # tells what it will cost
        for decomposition in model.decompose(reports, rules):
            ...
        model.tell()                                      # what came of it
"""

import argparse
import contextlib
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from .cases import counted
from .decomposition import Decomposition
from .llm_answers import CUT, FORMS, Report, load_prompt
from .llm_calls import Limits
from .llm_client import ChatClient, HTTPClient, choose_model, is_this_machine, key_from
from .llm_decompose import Rules, Settings, Tally, decompose_with_llm, duration, estimate, money
from .llm_ledger import Ledger
from .llm_local import TransformersClient
from .summary import console

FOR_GOOD = ("no usable answer", "more than")  # so begin the reasons that another run would meet again
SECONDS_BETWEEN_LINES = 60.0  # that tell how far a run is
NEEDED = ("llm_url", "llm_local")
POSITIVE = (
    *("llm_concurrency", "llm_requests_per_minute", "llm_tokens_per_minute", "llm_timeout", "llm_tries", "llm_answers"),
    *("llm_max_tokens", "llm_tokens_per_second", "llm_budget"),
)


def add_llm_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of --method llm and hybrid."""
    group = parser.add_argument_group(
        "language model (--method llm, hybrid)",
        "A server with OpenAI's chat completions, or a model in this process. One call a report; its answer is\n"
        "checked against the report, and where it fails the rules' result stands, counted with its reason. How to\n"
        "start a server, what it costs and what leaves this machine: docs/reports.md.",
    )
    group.add_argument(
        "--llm_url",
        metavar="URL",
        help="Address of the server: http://localhost:8000/v1 (vLLM), http://localhost:8080/v1 (llama.cpp), "
        "http://localhost:11434/v1 (Ollama), https://... (a cloud).",
    )
    group.add_argument(
        "--llm_local",
        metavar="MODEL",
        help="In place of a server: folder or Hub name of a causal language model for transformers. One call at a "
        "time, and nothing holds it to the form of an answer: a server is faster and better.",
    )
    group.add_argument(
        "--llm_model", metavar="NAME", help="As the server names it (default: the one it offers, if it is one)."
    )
    group.add_argument(
        "--send_reports_to_host",
        metavar="HOST",
        help="The host of --llm_url, named once more, if it is not this machine: with it you say that reports may be "
        "sent there. Their ids are not. Without it nothing is sent to another machine.",
    )
    group.add_argument(
        "--llm_key_variable",
        metavar="NAME",
        default="LLM_API_KEY",
        help="Environment variable that holds the key of the server; none is sent if it is not set. A key is neither "
        "written nor told (default: LLM_API_KEY).",
    )
    group.add_argument(
        "--llm_answer",
        choices=FORMS,
        default="numbers",
        help="How the model answers: with the numbers of sentences, or with the sentences, which takes two to three "
        "times the tokens and is compared with the report word by word (default: numbers).",
    )
    group.add_argument(
        "--llm_price",
        type=float,
        nargs=2,
        metavar=("IN", "OUT"),
        help="Price of a million tokens of questions, and of answers, in any currency; for estimate and budget.",
    )
    group.add_argument(
        "--llm_budget",
        type=float,
        metavar="COST",
        help="The most that all calls of the cache may cost together, former runs included. What a call may cost at "
        "most is set aside before it is sent; reports that the rest does not pay for are left to the rules.",
    )
    group.add_argument(
        "--llm_estimate", action="store_true", help="Tell how many calls, tokens and what cost to expect, and stop."
    )
    group.add_argument(
        "--llm_cache",
        type=Path,
        metavar="FILE",
        help="Answers and costs, one line each; a run that was killed, or another one, asks for none of them again "
        "(default: OUT.llm_cache.jsonl). With --llm_answer quotes it holds sentences of reports.",
    )
    group.add_argument(
        "--llm_prompt",
        metavar="FILE",
        default="decompose",
        help="What the model is told: a YAML file in the form of the default (default: decompose, "
        "hub_configs/llm/decompose.yaml).",
    )
    group.add_argument(
        "--llm_concurrency", type=int, metavar="N", default=8, help="Calls under way at once (default: 8)."
    )
    group.add_argument(
        "--llm_requests_per_minute", type=int, metavar="N", help="Limit of the server, kept to (default: none)."
    )
    group.add_argument(
        "--llm_tokens_per_minute",
        type=int,
        metavar="N",
        help="Limit of the server; the longest possible answers count (default: none).",
    )
    group.add_argument(
        "--llm_timeout",
        type=float,
        metavar="SECONDS",
        help="For one call as a whole (default: 120, with --llm_local 600).",
    )
    group.add_argument(
        "--llm_tries",
        type=int,
        metavar="N",
        default=6,
        help="Requests for one answer while the server fails or breaks off, with growing pauses (default: 6).",
    )
    group.add_argument(
        "--llm_most_wait",
        type=float,
        metavar="SECONDS",
        default=600.0,
        help="The longest pause that a busy server may ask for; where it asks for more, the rules do what is left "
        "(default: 600).",
    )
    group.add_argument(
        "--llm_answers",
        type=int,
        metavar="N",
        default=2,
        help="Answers to one report that are looked at before the rules' result stands (default: 2).",
    )
    group.add_argument(
        "--llm_max_tokens",
        type=int,
        metavar="N",
        help="Longest answer. A model that thinks before it speaks needs some thousands (default: by the number of "
        "sentences).",
    )
    group.add_argument(
        "--llm_tokens_per_second",
        type=float,
        metavar="N",
        default=40.0,
        help="Speed of one call's answer, for the estimate of the time alone (default: 40).",
    )


def check_llm_arguments(args: argparse.Namespace) -> None:
    """Raise a ValueError where the options do not fit together."""
    given = [name for name in NEEDED if getattr(args, name) is not None]
    if args.method == "rules":
        if given:
            raise ValueError(f"--{given[0]} is for --method llm or hybrid; with rules nothing is asked.")
        return
    if len(given) != 1:
        raise ValueError(f"--method {args.method} needs either --llm_url or --llm_local; see docs/reports.md.")
    for name in POSITIVE:
        value = getattr(args, name)
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"--{name} {value} must be above 0.")
    if args.llm_price is not None and not all(0 <= price < math.inf for price in args.llm_price):
        raise ValueError(f"--llm_price {args.llm_price} must not be negative.")


@dataclass
class LanguageModel:
    """A model that is ready to be asked, and what became of the reports."""

    client: ChatClient
    organs: Sequence[str]
    ledger: Ledger
    settings: Settings
    is_estimate_only: bool = False
    tally: Tally = field(default_factory=Tally)
    num_reports: int = 0

    def begin(self, reports: Iterable[Report], rules: Rules) -> bool:
        """Tell what to expect; whether to go on."""
        host = getattr(self.client, "host", None)
        is_elsewhere = host is not None and not is_this_machine(host)
        expected = estimate(
            reports, self.organs, self.client, rules, self.ledger, self.settings, look_for_persons=is_elsewhere
        )
        self.num_reports = expected.reports
        for line in expected.lines(self.ledger, self.settings):
            tell(line)
        if is_elsewhere:
            text = f"warning: sentences of {counted(expected.to_ask, 'report')} go to {host}, without their ids."
            if not self.client.is_https:
                text += " The address is http: whoever is on the way can read them, and the key."
            if expected.personal:
                text += f" A name, a date or a number of a person seems to stand in {expected.personal} of them."
            tell(text)
        return not self.is_estimate_only

    def decompose(self, reports: Iterable[Report], rules: Rules) -> Iterator[Decomposition]:
        """As `decompose_with_llm`; tells now and then how far it is."""
        done = decompose_with_llm(reports, self.organs, self.client, rules, self.ledger, self.settings, self.tally)
        begin, told = time.monotonic(), time.monotonic()
        with contextlib.closing(done):
            for number, decomposition in enumerate(done, 1):
                now = time.monotonic()
                if now - told >= SECONDS_BETWEEN_LINES:
                    told = now
                    tell(self.progress(number, now - begin))
                yield decomposition

    def progress(self, number: int, seconds: float) -> str:
        """How far it is after so many reports and seconds."""
        left = duration(seconds / number * max(0, self.num_reports - number))
        ledger = self.ledger
        cost = "" if ledger.prices is None else f", cost {money(ledger.spent - ledger.spent_before)}"
        reports = f"{number:,} of {self.num_reports:,}, about {left} left"
        return f"  {reports}; {ledger.calls:,} calls, {self.tally.fallen_back.total():,} fell back{cost}"

    def to_json(self) -> dict:
        """For a manifest: who was asked, with what words, and what came of it."""
        prompt, ledger = self.settings.prompt, self.ledger
        return {
            "model": self.client.model,
            "prompt": f"{prompt.name} {prompt.version}",
            "answer": self.settings.form,
            **self.tally.to_json(),
            "calls": ledger.calls,
            "tokens_in": ledger.tokens_in,
            "tokens_out": ledger.tokens_out,
            "cost": None if ledger.prices is None else round(ledger.spent - ledger.spent_before, 6),
        }

    def tell(self) -> None:
        """What came of it, for the user."""
        ledger = self.ledger
        lines = self.tally.lines()
        cost = "" if ledger.prices is None else f", cost {money(ledger.spent - ledger.spent_before)}"
        lines.insert(
            1, f"  {counted(ledger.calls, 'call')}: {ledger.tokens_in:,} tokens in, {ledger.tokens_out:,} out{cost}"
        )
        if ledger.uncounted:
            answers = counted(ledger.uncounted, "answer")
            lines.insert(2, f"  {answers} came without a count of tokens, for which the most was taken")
        if self.tally.refused[CUT] > 0.1 * ledger.calls:
            lines.append("  Many answers were cut: a model that thinks first, or writes much, needs --llm_max_tokens.")
        if any(not reason.startswith(FOR_GOOD) for reason in self.tally.fallen_back):
            lines.append(
                "  The same command asks again for what a server's failure or the budget has left to the rules, and "
                "for nothing else."
            )
        for line in lines:
            tell(line)


@contextlib.contextmanager
def open_llm(args: argparse.Namespace, organs: Sequence[str], out: Path) -> Iterator[LanguageModel]:
    """The model that the options name, with its cache beside `out`.

    Raises:
        ValueError: If the options do not fit together, or no model is to be had.
    """
    check_llm_arguments(args)
    settings = Settings(
        prompt=load_prompt(args.llm_prompt),
        form=args.llm_answer,
        is_hybrid=args.method == "hybrid",
        answers=args.llm_answers,
        max_tokens=args.llm_max_tokens,
        limits=Limits(
            concurrency=args.llm_concurrency,
            requests_per_minute=args.llm_requests_per_minute,
            tokens_per_minute=args.llm_tokens_per_minute,
            tries=args.llm_tries,
            most_wait_s=args.llm_most_wait,
        ),
        tokens_per_second=args.llm_tokens_per_second,
    )
    prices = None if args.llm_price is None else tuple(args.llm_price)
    cache = args.llm_cache or out.with_name(f"{out.name}.llm_cache.jsonl")
    if args.llm_local is not None:
        client = TransformersClient(args.llm_local, timeout_s=args.llm_timeout or 600.0)
    else:
        client = HTTPClient(
            args.llm_url,
            args.llm_model or "",
            key_from(args.llm_key_variable),
            args.send_reports_to_host,
            args.llm_timeout or 120.0,
        )
        if not (args.llm_estimate and args.llm_model):  # an estimate needs no server
            client.model = choose_model(client, args.llm_model)
    with Ledger(cache, prices, args.llm_budget) as ledger:
        try:
            yield LanguageModel(client, organs, ledger, settings, args.llm_estimate)
        except KeyboardInterrupt:
            raise ValueError(
                f"stopped by a signal. The answers that came stay in {cache}; run the same command again to continue."
            ) from None


def tell(text: str) -> None:
    console.print(text, markup=False, soft_wrap=True)
