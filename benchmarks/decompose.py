"""Reports into sentences by organ, by rules: 50,000 reports of 200 words by the command itself, and the index of terms.

    python -m benchmarks.decompose
    python -m benchmarks.decompose --reports 5000 --workers 1 --json decompose.json

`decompose/N`: `python -m data_builders decompose` in a process of its own, body_24, on N made-up reports; its time from
start to end, start-up and writing included, and the largest resident size of its processes, for N reports and for a
tenth of them. The reports are put together from the sentences of the synthetic set and of a few styles, with numbers,
sides and beginnings of their own: few sentences come twice.

Ours against the baseline: the same rules without index and memory. There every term of the lexicon is tried, the
longest first, at every word, and no sentence is remembered; on --part reports, multiplied. Both must give the same
decompositions: `max_rel_diff` is the share of reports in which they do not.
"""

import argparse
import csv
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from unittest import mock

import yaml

from benchmarks.measure import Result, Times, add_arguments, in_turns, parse_arguments, report
from data_builders import decompose
from data_builders.lexicon import Entry, Lexicon, load_lexicon
from modeling_fvlm.organs import load_organ_set

SYNTHETIC = Path(__file__).resolve().parent.parent / "hub_configs" / "synthetic" / "findings.yaml"
WORDS = 200
LIMIT_S = 600.0  # 50,000 reports on two cores
STYLES = (
    "The {organ} is normal in size and contour, measuring {mm} mm.",
    "No focal lesion was detected in the {organ}, and its density is homogeneous.",
    "{organ}: unremarkable, {mm} mm.",
    "A hypodense lesion of {mm}x{other} mm is observed in the {organ}, previously {other} mm.",
    "It measures {mm} mm in its longest diameter (series {mm}, image {other}).",
    "A lymph node of {mm} mm lies adjacent to the {organ}; unchanged since {other} weeks ago.",
    "The {organ} and the {second} are without evidence of injury.",
    "There is a {mm} mm calcification in the {organ}, while the {second} is intact.",
    "The {organ} could not be evaluated because of motion at the level of section {mm}.",
)
BEGINNINGS = ("", "Incidentally, ", "In series {mm}, ", "Again, ", "On the {side}, ", "As before, ", "In addition, ")


def make_reports(number: int, seed: int = 0) -> list[tuple[str, str, str]]:
    """(id, findings, impression) of made-up reports of at least 200 words."""
    chosen = random.Random(seed)
    content = yaml.safe_load(SYNTHETIC.read_text(encoding="utf-8"))
    described = [text for finding in content["findings"] for text in finding["described"]]
    nouns = [noun for finding in content["findings"] for noun in finding["nouns"]]
    organs = [organ.replace("_", " ") for organ in load_organ_set("body_36").organs]

    def sentence() -> str:
        pattern = chosen.choice([*described, *STYLES * 4, f"No {chosen.choice(nouns)} is seen."])
        text = chosen.choice(BEGINNINGS) + pattern
        filled = text.format(
            organ=chosen.choice(organs),
            second=chosen.choice(organs),
            side=chosen.choice(["left", "right"]),
            mm=chosen.randint(2, 199),
            other=chosen.randint(2, 199),
            count=chosen.randint(2, 9),
        )
        return filled[0].upper() + filled[1:]

    reports = []
    for place in range(number):
        sentences, words = [], 0
        while words < WORDS:
            sentences.append(sentence())
            words += len(sentences[-1].split())
        reports.append((f"report_{place}", " ".join(sentences[:-2]), " ".join(sentences[-2:])))
    return reports


def write_reports(path: Path, reports: Sequence[tuple[str, str, str]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "findings", "impression"])
        writer.writerows(reports)


def run_command(reports: Path, out: Path, workers: int) -> tuple[float, float, float]:
    """Wall seconds, CPU seconds of all its processes, and the largest resident size of one of them in MB."""
    command = [sys.executable, "-m", "data_builders", "decompose", "--reports", str(reports), "--organs", "body_24"]
    command += ["--out", str(out), "--workers", str(workers)]
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, cwd=Path(__file__).resolve().parent.parent)
    peak_mb, ended = 0.0, 0
    while not ended:
        peak_mb = max([peak_mb, *map(largest_resident_mb, family_of(process.pid))])
        time.sleep(0.05)
        ended, status, usage = os.wait4(process.pid, os.WNOHANG)
    wall = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}.")
    return wall, usage.ru_utime + usage.ru_stime, peak_mb


def family_of(pid: int) -> list[int]:
    """A process and those it started, as Linux lists them; what has ended is left out."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii").split()
    except OSError:
        return []
    return [pid, *(other for child in children for other in family_of(int(child)))]


def largest_resident_mb(pid: int) -> float:
    """Largest resident size of a process since its program began. (rusage would count that of its parent as well.)"""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM:")), 0.0)


def try_every_term(words: Sequence[str], place: int, lexicon: Lexicon) -> Entry | None:
    """The obvious way to the longest term that begins at a word."""
    for entry in all_entries(lexicon):
        if tuple(words[place : place + len(entry.words)]) == entry.words:
            return entry
    return None


def all_entries(lexicon: Lexicon) -> list[Entry]:
    if "all_entries" not in vars(lexicon):
        entries = [entry for entries in lexicon.entries.values() for entry in entries]
        vars(lexicon)["all_entries"] = sorted(entries, key=lambda entry: (-len(entry.words), entry.is_weak))
    return vars(lexicon)["all_entries"]


def compare(number: int, part: int, workers: int, repeats: int, folder: Path) -> Result:
    """Time the command on all reports, and both ways on a part of them."""
    reports = make_reports(number)
    words = sum(len(re.findall(r"\S+", f"{findings} {impression}")) for _, findings, impression in reports) / number
    write_reports(folder / "all.csv", reports)
    write_reports(folder / "tenth.csv", reports[: max(1, number // 10)])
    _, _, tenth_mb = run_command(folder / "tenth.csv", folder / "tenth.jsonl", workers)
    wall, cpu, peak_mb = run_command(folder / "all.csv", folder / "all.jsonl", workers)

    organs, lexicon = load_organ_set("body_24").organs, load_lexicon("english")
    some = reports[:part]

    def ours() -> list:
        lexicon.kept_analyses.clear()
        return [
            decompose.decompose_report(findings, impression, organs, lexicon, name)
            for name, findings, impression in some
        ]

    def baseline() -> list:
        with mock.patch.multiple(decompose, longest_entry=try_every_term, CACHED_SENTENCES=0):
            return ours()

    different = sum(one != other for one, other in zip(ours(), baseline(), strict=True))
    with (folder / "all.jsonl").open(encoding="utf-8") as file:
        written = [json.loads(line)["organs"] for line, _ in zip(file, some)]
    different += sum(one.to_json()["organs"] != other for one, other in zip(ours(), written, strict=True))
    times = in_turns({"baseline": baseline, "ours": ours}, repeats)
    factor = number / len(some)
    return Result(
        f"decompose/{number}",
        times["baseline"] * factor,
        Times(cpu, wall),
        different / len(some),
        f"{number:,} reports of {words:.0f} words in {wall:.0f} s with {workers} processes; largest process "
        f"{peak_mb:.0f} MB, with a tenth of the reports {tenth_mb:.0f} MB; baseline timed on {len(some)} reports",
        extra={
            "reports": number,
            "words": words,
            "workers": workers,
            "peak_mb": peak_mb,
            "peak_mb_of_a_tenth": tenth_mb,
            "ours_ms_a_report": 1000 * times["ours"].cpu / len(some),
            "in_time": wall <= LIMIT_S * number / 50_000,
        },
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reports", type=int, default=50_000, help="Number of reports (default: %(default)s).")
    parser.add_argument("--part", type=int, default=200, help="Reports of the baseline (default: %(default)s).")
    parser.add_argument("--workers", type=int, default=2, help="Processes of the command (default: %(default)s).")
    add_arguments(parser, repeats=1)
    options = parse_arguments(parser, arguments)
    with tempfile.TemporaryDirectory() as folder:
        part = min(options.part, options.reports)
        results = [compare(options.reports, part, options.workers, options.repeats, Path(folder))]
    report(results, options.json)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
