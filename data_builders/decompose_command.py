"""Reports -> sentences by organ: rules on this machine, a language model, or both.

A CSV (columns id, findings, impression) or JSON of reports, 24 organs, two processes:
    python -m data_builders decompose --reports reports.csv --organs body_24 --out split.json --workers 2

CT-RATE's reports as they come, with labels of its 18 findings, in the files of the published release:
    python -m data_builders decompose --reports train_reports.csv --organs chest_4 --labels ct_rate_18 --out split
    python -m data_builders decompose --reports train_reports.csv --organs chest_4 --format published --out captions

Only what the rules are not certain of goes to a model on this machine:
    python -m data_builders decompose --reports reports.csv --organs body_24 --out split.json --method hybrid \\
        --llm_url http://localhost:8000/v1

A model elsewhere: what all reports would cost, before any is sent (the key is in the variable LLM_API_KEY):
    python -m data_builders decompose --reports reports.csv --organs body_24 --out split.json --method llm \\
        --llm_url https://llm.example.org/v1 --send_reports_to_host llm.example.org --llm_model NAME \\
        --llm_price 0.25 1.00 --llm_budget 20 --llm_estimate

How good the result is: decompose-score; to look at it: report-page; to correct it by hand: --format csv, then correct.
Rules need no network, give the same result each time, and take some milliseconds a report.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import time
import uuid
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

from modeling_fvlm.organs import load_organ_set

from .cases import counted
from .decompose import decompose_report
from .decomposition import Decomposition
from .lexicon import Lexicon, load_lexicon
from .llm_decompose import NOT_BY_MODEL
from .llm_options import add_llm_arguments, check_llm_arguments, open_llm
from .progress import stopping_cleanly
from .report_files import Reports, TextReport, add_columns_argument, open_reports
from .report_labels import FindingRules, load_finding_rules
from .shards import replace_durably
from .summary import console

CHUNK = 32  # reports that go to a process at once
FORMATS = ("json", "published", "csv")
NOTES = {
    "empty": "without text",
    "no_id": "without an id, named by the place in the file",
    "not_english": "not English, as far as can be told: no sentence of theirs was given to an organ",
    "html": "with HTML, which was taken out",
    "long_sentences": "with a sentence of thousands of characters, of which the beginning was read",
    "control_characters": "with control characters, which were taken out",
}


@dataclass(frozen=True)
class Rules:
    """The rules, ready for a report."""

    organs: tuple[str, ...]
    lexicon: Lexicon
    finding_rules: FindingRules | None

    def __call__(self, report: TextReport) -> Decomposition:
        return decompose_report(
            report.findings, report.impression, self.organs, self.lexicon, report.id, self.finding_rules
        )


_rules: Rules | None = None  # of a worker process


def _begin_worker(rules: Rules) -> None:
    global _rules
    _rules = rules


def _work(reports: list[TextReport]) -> list[Decomposition]:
    assert _rules is not None
    return [_rules(report) for report in reports]


def decompose_reports(
    reports: Iterable[TextReport], rules: Rules, workers: int
) -> Iterator[tuple[TextReport, Decomposition]]:
    """Every report with its decomposition, in their order; a few chunks are in memory."""
    if workers == 1:
        for report in reports:
            yield report, rules(report)
        return
    source = iter(reports)
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, _begin_worker, (rules,))
    try:
        pending: deque = deque()
        while chunk := list(islice(source, CHUNK)):
            pending.append((chunk, pool.submit(_work, chunk)))
            if len(pending) > 3 * workers:
                done, future = pending.popleft()
                yield from zip(done, future.result(), strict=True)
        for done, future in pending:
            yield from zip(done, future.result(), strict=True)
    finally:
        pool.shutdown(cancel_futures=True)  # where the caller stops, nobody wants the rest


@dataclass
class Tally:
    """What came of the reports."""

    reports: int = 0
    sentences: int = 0
    uncertain: int = 0
    without_organ: int = 0
    notes: Counter = None  # type: ignore[assignment]
    spoken: Counter = None  # type: ignore[assignment]
    abnormal: Counter = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        self.notes, self.spoken, self.abnormal = Counter(), Counter(), Counter()

    def add(self, decomposition: Decomposition) -> None:
        self.reports += 1
        self.uncertain += bool(decomposition.uncertain_sentences)
        self.without_organ += not decomposition.organs
        # Why the model did not do it is told by the model's own tally.
        self.notes.update(note for note in decomposition.notes if not note.startswith(NOT_BY_MODEL))
        for organ, text in decomposition.organs.items():
            self.sentences += len(text.findings) + len(text.impression)
            self.spoken[organ] += 1
            self.abnormal[organ] += text.is_abnormal

    def lines(self, organs: Sequence[str], seconds: float) -> Iterator[str]:
        yield (
            f"{counted(self.reports, 'report')} in {seconds:.1f} s: {counted(self.sentences, 'sentence')} for "
            f"{counted(len(organs), 'organ')}; {counted(self.uncertain, 'report')} with a sentence whose place is a "
            "guess"
        )
        if self.without_organ:
            yield f"  {counted(self.without_organ, 'report')} of which no sentence went to an organ"
        for note, number in sorted(self.notes.items()):
            yield f"  {counted(number, 'report')} {NOTES.get(note, note)}"
        if self.reports:
            shown = ", ".join(
                f"{organ} {self.spoken[organ]:,} ({self.abnormal[organ]:,} abnormal)"
                for organ in organs
                if self.spoken[organ]
            )
            yield f"  spoken of: {shown or 'no organ of the set'}"
        silent = [organ for organ in organs if not self.spoken[organ]]
        if silent and self.reports >= 20:
            yield f"  in no report: {', '.join(silent)}"


def entries_of(pairs: Iterable[tuple[TextReport, Decomposition]], tally: Tally) -> Iterator[dict]:
    """As they are written: with the texts, so that the file can be looked at, scored and corrected by itself."""
    for report, decomposition in pairs:
        if not report.has_id:
            decomposition = replace(decomposition, notes={**decomposition.notes, "no_id": 1})
        tally.add(decomposition)
        content = decomposition.to_json()
        yield {"id": content.pop("id"), "findings": report.findings, "impression": report.impression, **content}


def write_json(path: Path, entries: Iterable[Mapping]) -> None:
    """Entry by entry: no more than one is in memory. A list, or one line each where the name ends in .jsonl."""
    is_lines = path.suffix == ".jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with unfinished.open("w", encoding="utf-8", newline="\n", errors="backslashreplace") as file:
            is_first = True
            for entry in entries:
                text = json.dumps(entry, ensure_ascii=False)
                file.write(text + "\n" if is_lines else f"{'[' if is_first else ','}\n{text}")
                is_first = False
            if not is_lines:
                file.write("[]\n" if is_first else "\n]\n")
        replace_durably(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def write(out: Path, form: str, entries: Iterable[Mapping], organs: Sequence[str]) -> str:
    """Write the entries in one of `FORMATS`; what to tell of it."""
    if form == "published":
        from .published_form import write_published

        written = write_published(out, entries)
        lost = f" ({written.num_flags_lost:,} flags this form cannot hold)" if written.num_flags_lost else ""
        return f"written: desc_info.json and conc_info.json in {out}{lost}"
    if form == "csv":
        from .correction_csv import write_correction_csv

        path = out if out.suffix else out / "to_correct.csv"
        return f"written: {counted(write_correction_csv(path, entries, organs), 'row')} in {path}"
    path = out if out.suffix in (".json", ".jsonl") else out / "decomposition.json"
    write_json(path, entries)
    return f"written: {path}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--reports",
        type=Path,
        required=True,
        help="CSV (commas, semicolons or tabs), JSON or JSON lines of reports: columns id, findings, impression, or as "
        "CT-RATE names them; or a folder of .txt, a report each. A whole report in one text is cut at its headers.",
    )
    parser.add_argument(
        "--organs", required=True, help="Organ set: chest_4, body_24, body_36, or a YAML file of yours."
    )
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        help="File (.json, .jsonl, .csv), or folder; a folder for --format published.",
    )
    parser.add_argument(
        "--format",
        choices=FORMATS,
        default="json",
        help="json: {id, findings, impression, organs, ...}; published: desc_info.json and conc_info.json; csv: a row "
        "a sentence, to be corrected by hand (default: json).",
    )
    parser.add_argument(
        "--method",
        choices=("rules", "llm", "hybrid"),
        default="rules",
        help="llm: a language model for every report; hybrid: for those that the rules are not certain of; what fails "
        "falls back to the rules (default: rules).",
    )
    parser.add_argument(
        "--labels",
        help="Also label findings, present, absent or uncertain: ct_rate_18, or a YAML file in its form (json only).",
    )
    parser.add_argument(
        "--lexicon", default="english", help="Terms and cues: english, or a YAML file in its form (default: english)."
    )
    add_columns_argument(parser)
    parser.add_argument(
        "--workers",
        type=int,
        default=1,
        help="Processes for the rules; the result is the same for any number (default: 1).",
    )
    add_llm_arguments(parser)


def run(args: argparse.Namespace) -> int:
    if args.workers < 1:
        raise ValueError(f"--workers {args.workers} must be at least 1.")
    if args.format == "published" and args.out.suffix:
        raise ValueError(f"--out {args.out}: --format published writes two files; give a folder.")
    if args.labels and args.format != "json":
        raise ValueError("--labels is for --format json; the other forms have no place for labels.")
    check_llm_arguments(args)
    organ_set = load_organ_set(args.organs)
    lexicon = load_lexicon(args.lexicon).for_organ_set(organ_set)
    lexicon.check_covers(organ_set.organs)
    rules = Rules(organ_set.organs, lexicon, load_finding_rules(args.labels, lexicon) if args.labels else None)
    reports = open_reports(args.reports, args.columns)
    tally = Tally()
    start = time.perf_counter()
    with stopping_cleanly(args.out):
        done = split(args, reports, rules, tally) if args.method == "rules" else ask(args, reports, rules, tally)
    if done is None:
        return 0
    for line in (*tally.lines(rules.organs, time.perf_counter() - start), done):
        console.print(line, markup=False, soft_wrap=True)
    return 0


def split(args: argparse.Namespace, reports: Reports, rules: Rules, tally: Tally) -> str:
    """--method rules."""
    workers = min(args.workers, os.cpu_count() or 1)
    pairs = decompose_reports(reports, rules, workers)
    try:
        with contextlib.closing(pairs):
            return write(args.out, args.format, entries_of(pairs, tally), rules.organs)
    except KeyboardInterrupt:
        done = counted(tally.reports, "report")
        raise ValueError(f"stopped by a signal after {done}; nothing was written.") from None


def ask(args: argparse.Namespace, reports: Reports, rules: Rules, tally: Tally) -> str | None:
    """--method llm or hybrid; None where only the estimate was wanted."""
    with open_llm(args, rules.organs, args.out) as model:
        if not model.begin(reports, rules):
            return None
        pairs = zip(reports, model.decompose(reports, rules), strict=True)
        done = write(args.out, args.format, entries_of(pairs, tally), rules.organs)
        model.tell()
    return done
