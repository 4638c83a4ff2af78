"""Look at a processed split before training on it: counts, what looks wrong, and pictures.

Every row is read; what was found goes to the terminal and to the page DIR/doctor.html (one file, no network):
    python -m data_builders inspect out/ct_rate

A quick look at 200 rows that lie evenly spread, the page elsewhere:
    python -m data_builders inspect out/ct_rate --limit 200 --out ct_rate.html

In a script: exit status 1 when something loud is found (wrong axes, HU or numbering, damaged rows, leaking patients):
    python -m data_builders inspect out/ct_rate --strict --cases 0
"""

import argparse
import json
from collections.abc import Sequence
from concurrent.futures.process import BrokenProcessPool
from itertools import zip_longest
from pathlib import Path

from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn
from rich.text import Text

from .cases import SPLITS
from .doctor import DAMAGE, Examination, RowMeasures, examine, read_row
from .doctor_findings import Finding, find
from .doctor_page import looked_at, write_page
from .previews import draw_missing
from .run_cases import num_cores
from .summary import console, print_summary

STYLES = {"loud": "bold red", "warning": "yellow", "note": "dim"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, nargs="?", metavar="DIR", help="Folder of a processed split.")
    parser.add_argument("--data", type=Path, help="The same folder, as an option.")
    parser.add_argument("--split", choices=SPLITS, help="The only split to look at (default: each that is there).")
    parser.add_argument(
        "--cases",
        type=int,
        default=4,
        help="Cases to draw: so many per split, and as many that look wrong (default: 4).",
    )
    parser.add_argument(
        "--out",
        type=Path,
        help="The page, where the name ends in .html (default: doctor.html in DIR); any other name is the folder for "
        "the pictures (default: previews/ in DIR).",
    )
    parser.add_argument(
        "--limit",
        type=int,
        help="Look at so many rows only, evenly spread; duplicates and leaks may be missed (default: every row).",
    )
    parser.add_argument(
        "--workers", type=int, help="Processes that read; each holds one volume in memory (default: one per core)."
    )
    parser.add_argument("--strict", action="store_true", help="Exit status 1 when a loud finding stands.")


def run(args: argparse.Namespace) -> int:
    folder = folder_of(args)
    manifest = read_manifest(folder)
    is_page = args.out is not None and args.out.suffix.lower() in (".html", ".htm")
    page = args.out if is_page else folder / "doctor.html"
    pictures = folder / "previews" if is_page or args.out is None else args.out
    print_summary(manifest)
    if "volumes" not in manifest["settings"].get("configs", ("volumes",)):
        raise ValueError(
            f"{folder} holds the config organ_crops alone, and whole volumes are needed to look further than these "
            "counts: build with --configs volumes organ_crops."
        )
    exam = examine_with_progress(folder, manifest, args)
    findings = find(exam)
    print_findings(exam, findings)
    try:
        drawn = draw_cases(folder, exam, findings, args.cases, pictures)
        write_page(page, folder.resolve().name, exam, findings, drawn)
    except PermissionError as error:
        raise ValueError(
            f"cannot write to {error.filename}: name a page elsewhere with --out NAME.html, and draw no pictures with "
            "--cases 0, or name a folder for them."
        ) from None
    for _, path in drawn:
        console.print(str(path), soft_wrap=True, markup=False)
    console.print(f"page: {page}", soft_wrap=True, markup=False)
    return int(args.strict and any(finding.level == "loud" for finding in findings))


def folder_of(args: argparse.Namespace) -> Path:
    """The folder, given by its place or by --data."""
    if (args.folder is None) == (args.data is None):
        raise ValueError("name the folder of one processed split: inspect DIR (or --data DIR).")
    for name in ("limit", "workers"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name} {value} must be at least 1.")
    return args.folder or args.data


def read_manifest(folder: Path) -> dict:
    """manifest.json of a finished split."""
    path = folder / "manifest.json"
    if not path.is_file():
        raise ValueError(
            f"{folder}: there is no manifest.json; the build was not completed, or this is another folder."
        )
    manifest = json.loads(path.read_text(encoding="utf-8"))
    if not {"settings", "splits"} <= manifest.keys():
        raise ValueError(f"{path} has no keys `settings` and `splits`: it was not written by a data builder.")
    return manifest


def examine_with_progress(folder: Path, manifest: dict, args: argparse.Namespace) -> Examination:
    columns = (*Progress.get_default_columns()[:-1], MofNCompleteColumn(), TimeRemainingColumn())
    workers = args.workers or num_cores()
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(f"reading rows ({workers} workers)", total=None)
        try:
            return examine(
                folder,
                manifest,
                args.limit,
                workers,
                args.split,
                lambda done, total: progress.update(task, completed=done, total=total),
            )
        except BrokenProcessPool:
            raise ValueError(
                f"a reading process was killed, probably for its memory; try fewer than {workers} with --workers."
            ) from None


def print_findings(exam: Examination, findings: list[Finding]) -> None:
    """The findings, the loudest first."""
    console.print(looked_at(exam), soft_wrap=True, markup=False)
    if not findings:
        console.print("nothing looks wrong", style="green")
    for finding in findings:
        head = f"{finding.level.upper()}: {finding.title} ({finding.how_many})"
        console.print(Text(head, STYLES[finding.level]), soft_wrap=True)
        for name, text in (
            ("seen", finding.seen),
            ("e.g.", finding.shown_examples),
            ("in training", finding.effect),
            ("mend", finding.mend),
        ):
            if text:
                console.print(Text(f"  {name}: {text}"), soft_wrap=True)


def draw_cases(
    folder: Path, exam: Examination, findings: Sequence[Finding], num_cases: int, out: Path
) -> list[tuple[RowMeasures, Path]]:
    """Draw the first readable cases of each split that were looked at, and as many that a finding speaks of.

    Pictures that are there stay as they are.
    """
    drawn = []
    for place in cases_to_draw(exam, findings, max(0, num_cases)):
        measures = exam.rows[place]
        try:
            picture = draw_missing(read_row(folder, measures.place), measures.place.split, measures.place.index, out)
            drawn.append((measures, picture))
        except PermissionError:
            raise
        except DAMAGE as error:
            console.print(f"no picture of {measures.recon_id}: {error}", soft_wrap=True, markup=False)
    return drawn


def cases_to_draw(exam: Examination, findings: Sequence[Finding], num_cases: int) -> list[int]:
    """Places in `exam.rows`: of each split the first ones, then examples of the findings, one of each in turn."""
    chosen: dict[int, None] = {}
    for split in exam.num_rows:
        members = [place for place, row in enumerate(exam.rows) if row.place.split == split and row.voxels.any()]
        chosen |= dict.fromkeys(members[:num_cases])
    suspects = zip_longest(*(finding.rows for finding in findings if finding.level != "note"))
    others = dict.fromkeys(place for places in suspects for place in places if place is not None)
    return [*chosen, *[place for place in others if place not in chosen][:num_cases]]
