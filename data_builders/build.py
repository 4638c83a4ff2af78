"""Turn cases into a processed split: the part that every builder shares.

(1) the cases are sorted, and those known to be unusable set aside with their reason; with hashed ids they are renamed
(2) the settings and a hash of the source are compared with those of a build begun in the same folder
(3) volumes are read, turned, resampled and cropped in parallel, and written shard by shard in the sorted order
(4) dataset card, previews and manifest are written, and the summary is printed
A broken case is skipped, counted and listed; with --strict the first one stops the build. None is ever replaced.

A build that is killed at whatever moment is continued by the same command. So is one whose broken or missing files were
mended: their shards are built again, the others stay. With --shard i/n it does its part of (3), on a machine of many,
and `python -m data_builders merge` does (4). However it came about, a split has the same bytes.
"""

import argparse
import dataclasses
import json
import re
import shutil
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn

from modeling_fvlm.defaults import DEFAULT_MARGIN_VOXELS, DEFAULT_SPACING
from modeling_fvlm.organs import OrganSet, load_organ_set
from modeling_fvlm.preparation import padding_hu
from modeling_fvlm.processed_split import ZSTD_LEVEL
from modeling_fvlm.reading import RESCALE_MODES

from .card import write_card
from .cases import Case, counted, sort_cases, with_digests
from .decompose import Lexicon, load_lexicon
from .previews import write_previews
from .privacy import concern_lines, default_salt_file, pseudonymise, read_salt, salt_check, scan_reports, write_key
from .progress import check_may_continue, continue_or_begin, is_finished, plan_of, read_identity, stopping_cleanly
from .report_labels import FindingRules, load_finding_rules
from .run_cases import (
    PADDED_TO,
    PADDING_WINDOWS,
    SourceWatch,
    built_rows,
    check_executor,
    label_tables,
    num_cores,
)
from .run_cases import prepare_case as prepare_case  # the streaming builder takes both from here
from .shards import (
    CONFIGS,
    PROGRESS_FOLDER,
    BuiltRow,
    Shard,
    ShardRecord,
    complete_records,
    libraries,
    plan_shards,
    write_json,
    write_shard,
)
from .summary import FORMAT_VERSION, console, make_manifest, print_summary

IDS = ("kept", "hashed")
UNMENTIONED = {"unknown": -1, "absent": 0}


@dataclass(frozen=True)
class Settings:
    """What decides the bytes of a processed split, besides its source.

    Attributes:
        builder: Name of the subcommand.
        organ_set: Organs in the order of the labels in the masks, and their classes.
        numberings: numbering as it stands in the cases -> a key of NUMBERINGS, or {label: class name}.
        spacing: Voxel size in mm along (depth, height, width).
        margin_voxels: Voxels of that size kept around the organs.
        preprocessing: "standard" or "published", as in the model's config.
        rows_per_shard: Rows of a full shard.
        lexicon: Terms by which sentences find their organs.
        options: The builder's own settings, as they go into the manifest.
        rescale_mode: What is done with a declared slope and intercept: "auto", "apply" or "skip".
        configs: "volumes", "organ_crops" or both.
        ids: "kept" as the source has them, or "hashed".
        finding_rules: By which findings are labelled from the report, those that the source has no label of; None: not.
        unmentioned: Value of a finding that a report does not speak of: -1 unknown, or 0 absent.
    """

    builder: str
    organ_set: OrganSet
    numberings: dict[str, str | dict[int, str | None]]
    spacing: tuple[float, float, float]
    margin_voxels: tuple[int, int, int]
    preprocessing: str
    rows_per_shard: int
    lexicon: Lexicon
    options: dict
    rescale_mode: str = "auto"
    configs: tuple[str, ...] = ("volumes",)
    ids: str = "kept"
    finding_rules: FindingRules | None = None
    unmentioned: int = UNMENTIONED["unknown"]

    def as_json(self) -> dict:
        """The settings as the manifest tells them."""
        content = {
            "format_version": FORMAT_VERSION,
            "builder": self.builder,
            "organ_set": dataclasses.asdict(self.organ_set),
            "numberings": self.numberings,
            "spacing": self.spacing,
            "margin_voxels": self.margin_voxels,
            "preprocessing": self.preprocessing,
            "rescale_mode": self.rescale_mode,
            "rows_per_shard": self.rows_per_shard,
            "zstd_level": ZSTD_LEVEL,
            "libraries": libraries(),
            "configs": self.configs,
            "ids": self.ids,
            "lexicon": {"name": self.lexicon.name, "version": self.lexicon.version, "sha256": self.lexicon.sha256},
            "options": self.options,
        }
        if self.preprocessing == "published":
            content |= {"padded_to": PADDED_TO, "padding_hu": padding_hu(PADDING_WINDOWS, is_published=True)}
        if self.finding_rules is not None:
            rules = self.finding_rules
            named = {"name": rules.name, "version": rules.version, "sha256": rules.sha256}
            content["labels"] = {**named, "unmentioned": self.unmentioned}
        return json.loads(json.dumps(content))


def add_build_arguments(parser: argparse.ArgumentParser, organs: str, ids: str = "kept") -> None:
    """The options that every builder has.

    Args:
        parser: Of the builder's command.
        organs: The builder's default organ set.
        ids: Default of --ids: "kept" for releases whose ids are public, "hashed" for anyone's own data.
    """
    group = parser.add_argument_group("processed split")
    group.add_argument(
        "--out",
        type=Path,
        required=True,
        help="Folder to write. A build that was killed continues there, and one whose broken or missing files were "
        "mended; other settings or another source are refused.",
    )
    group.add_argument(
        "--organs", default=organs, help="Organ set: chest_4, body_24, body_36 or a YAML file (default: %(default)s)."
    )
    group.add_argument(
        "--spacing",
        type=float,
        nargs=3,
        default=DEFAULT_SPACING,
        metavar=("DEPTH", "HEIGHT", "WIDTH"),
        help="Voxel size in mm to resample to (default: 3 1 1).",
    )
    group.add_argument(
        "--margin",
        type=int,
        nargs=3,
        default=DEFAULT_MARGIN_VOXELS,
        metavar=("DEPTH", "HEIGHT", "WIDTH"),
        help="Voxels kept around the box of all organs; what lies outside is cut off (default: 5 20 20).",
    )
    group.add_argument(
        "--preprocessing",
        choices=["standard", "published"],
        default="standard",
        help="published: scans and captions as the published weights saw them, faults included, padded to the "
        "published crop; for models whose config says so (default: standard).",
    )
    group.add_argument(
        "--rescale",
        choices=RESCALE_MODES,
        default="auto",
        help="What to do with slope and intercept that a volume or its table declares. auto: apply them unless the "
        "voxels are HU already, and say so; apply: always; skip: never (default: auto).",
    )
    group.add_argument(
        "--configs",
        nargs="+",
        choices=CONFIGS,
        default=list(CONFIGS[:1]),
        help="volumes: a row is one reconstruction; organ_crops: a row is one organ of it, cut out. One pass writes "
        "both (default: volumes).",
    )
    group.add_argument(
        "--lexicon",
        default="english",
        help="Terms for report -> organ captions: english, or a YAML file (default: english).",
    )
    group.add_argument(
        "--rows_per_shard",
        type=int,
        default=64,
        help="Rows of a Parquet shard (default: 64). Ranks times loader workers should not outnumber the shards.",
    )
    group.add_argument("--previews", type=int, default=6, help="Cases drawn per split into previews/ (default: 6).")
    group.add_argument(
        "--workers",
        type=int,
        default=None,
        help="Processes that prepare volumes; each holds one scan in memory (default: one per core).",
    )
    group.add_argument(
        "--executor",
        default="processes",
        help="processes of this machine, or dask://host:port, the workers of that cluster (default: processes).",
    )
    group.add_argument(
        "--shard",
        metavar="I/N",
        help="Build every N-th Parquet shard from the I-th on and nothing else, as one task of N; all may write into "
        "one --out on a shared disk. `python -m data_builders merge` then finishes the split.",
    )
    group.add_argument(
        "--ids",
        choices=IDS,
        default=ids,
        help="hashed: ids of patients, scans and reconstructions become hashes under a secret salt; kept: they stay as "
        f"they are (default: {ids}).",
    )
    group.add_argument(
        "--id_salt",
        type=Path,
        metavar="FILE",
        help="File of the salt, written where it is missing; keep it secret. Tasks that do not share one --out need it "
        "(default: OUT.salt, beside --out).",
    )
    group.add_argument(
        "--id_key", type=Path, metavar="FILE", help="CSV to write, outside --out: your ids and their hashes."
    )
    group.add_argument("--strict", action="store_true", help="Stop at the first broken case instead of skipping it.")


def add_label_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of builders whose source has reports."""
    group = parser.add_argument_group("labels of findings")
    group.add_argument(
        "--labels",
        metavar="NAME",
        help="Label findings by the words of the report, those that the source itself has no label of: ct_rate_18, or "
        "a YAML file in its form. 1 stated, 0 denied, -1 only suspected (default: none).",
    )
    group.add_argument(
        "--unmentioned",
        choices=list(UNMENTIONED),
        default="unknown",
        help="What a finding of --labels is where the report does not speak of it: unknown (-1), or absent (0), as the "
        "label files of CT-RATE have it. A report in another language than English leaves all unknown (default: "
        "unknown).",
    )


def settings_from_args(
    args: argparse.Namespace,
    builder: str,
    numberings: dict[str, str | dict[int, str | None]] | None = None,
    **options,
) -> Settings:
    """Check the common options and resolve organ set and lexicon, before any data is touched.

    Raises:
        ValueError: If a value is out of range or a name unknown.
    """
    if min(args.spacing) <= 0:
        raise ValueError(f"--spacing {list(args.spacing)}: every edge must be above 0 mm.")
    if min(args.margin) < 0:
        raise ValueError(f"--margin {list(args.margin)}: no margin can be negative.")
    for name in ("rows_per_shard", "workers"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name} {value} must be at least 1.")
    for name in ("id_salt", "id_key"):
        if args.ids == "kept" and getattr(args, name) is not None:
            raise ValueError(f"--{name} is for hashed ids, and these are kept as they are: give --ids hashed as well.")
    check_executor(args.executor)
    part_of(args.shard)
    organ_set = load_organ_set(args.organs)
    settings = Settings(
        builder=builder,
        organ_set=organ_set,
        numberings=numberings or {"totalsegmentator_v2": "totalsegmentator_v2"},
        spacing=tuple(float(edge) for edge in args.spacing),
        margin_voxels=tuple(args.margin),
        preprocessing=args.preprocessing,
        rows_per_shard=args.rows_per_shard,
        lexicon=load_lexicon(args.lexicon).for_organ_set(organ_set),
        options=options,
        rescale_mode=args.rescale,
        configs=tuple(config for config in CONFIGS if config in args.configs),
        ids=args.ids,
    )
    settings.lexicon.check_covers(settings.organ_set.organs)
    label_tables(settings)  # an unknown organ, class or numbering fails here, not in a worker
    return with_finding_rules(settings, args)


def with_finding_rules(settings: Settings, args: argparse.Namespace) -> Settings:
    """The settings with what --labels and --unmentioned say; not every builder has them."""
    labels, unmentioned = getattr(args, "labels", None), getattr(args, "unmentioned", "unknown")
    if labels is None and unmentioned != "unknown":
        raise ValueError(f"--unmentioned {unmentioned} is for --labels: give that as well.")
    if labels is None:
        return settings
    rules = load_finding_rules(labels, settings.lexicon)
    return dataclasses.replace(settings, finding_rules=rules, unmentioned=UNMENTIONED[unmentioned])


def part_of(shard: str | None) -> tuple[int, int]:
    """`--shard I/N` as (place from 0, step); all of them without it.

    Raises:
        ValueError: If it is not of that form, or I is not within 1..N.
    """
    if shard is None:
        return 0, 1
    match = re.fullmatch(r"(\d+)/(\d+)", shard)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise ValueError(f"--shard {shard!r} is not of the form I/N with I from 1 to N, such as 1/8.")
    return int(match[1]) - 1, int(match[2])


def build(cases: Iterable[Case], settings: Settings, args: argparse.Namespace) -> int:
    """Write the processed split into `args.out`; returns the exit status (1 if not one row was written).

    Raises:
        ValueError: If there are no cases, the folder holds something else, or another build was begun there; if a
            case that was written has changed since.
        BuildStopped: If the disk is full, the source is gone, or a signal came; the same command continues.
    """
    folder, is_part = args.out, args.shard is not None
    cases = sort_cases(cases)  # (1)
    if not cases:
        raise ValueError("the source holds no case: no row of its table could be matched with a volume.")
    identity, salt = {"settings": settings.as_json()}, ""
    if settings.ids == "hashed":
        cases, salt = with_hashed_ids(cases, identity["settings"], args)
        identity["settings"]["id_salt_check"] = salt_check(salt)
    for case in cases if args.strict else ():
        if case.skip_reason is not None and not case.is_excluded:
            raise ValueError(f"{case.recon_id}: {case.skip_reason}")
    cases, identity["source_sha256"] = with_digests(cases, salt)
    shards = plan_shards(cases, settings.rows_per_shard)
    first, step = part_of(args.shard)
    mine = shards[first::step]
    with stopping_cleanly(folder):
        concerns = count_concerns(cases)
        if is_part and is_finished(folder, identity, mine):
            console.print("the split is finished, and these shards are there.")
            return 0
        plan = plan_of(cases, concerns)
        identity = continue_or_begin(folder, identity, plan, shards, mine, is_part, id_key=args.id_key)  # (2)
        records = write_shards(folder, mine, settings, args)  # (3)
        if is_part:
            tell_part(folder, shards, mine, is_own_salt=bool(salt) and args.id_salt is None)
            return 0
        return finish_split(folder, cases, identity, records, concerns, args.previews)  # (4)


def with_hashed_ids(cases: Sequence[Case], settings: dict, args: argparse.Namespace) -> tuple[list[Case], str]:
    """The cases under pseudonyms, in their order, and the salt."""
    before = read_identity(args.out)
    if before is not None:  # a folder whose ids were kept has no salt: say that, not that the salt is missing
        of_salt = {key: value for key, value in before["settings"].items() if key == "id_salt_check"}
        check_may_continue(before["settings"], settings | of_salt, f"--out {args.out}")
    if args.shard is not None and args.id_salt is None:  # before anything is built: it would be for nothing
        console.print(
            f"Ids are hashed under the salt {default_salt_file(args.out)}, which belongs to this --out. Tasks with an "
            "--out of their own get other ids and other shards, and cannot be merged: give all of them one "
            "--id_salt FILE, on a disk that they share.",
            style="yellow",
            soft_wrap=True,
            markup=False,
        )
    salt = read_salt(args.id_salt or default_salt_file(args.out), args.out)
    hashed = pseudonymise(cases, salt)
    if args.id_key is not None:
        write_key(args.id_key, args.out, cases, hashed)
    return sort_cases(hashed), salt


def tell_part(folder: Path, shards: Sequence[Shard], mine: Sequence[Shard], is_own_salt: bool) -> None:
    """Say what a task has built, how much of the split is there, and how it is finished."""
    there = len(complete_records(folder, shards, again=False))
    console.print(
        f"{counted(len(mine), 'shard of this task is', 'shards of this task are')} built; of the split, {there} of "
        f"{counted(len(shards), 'shard')} lie in {folder}. When all tasks are done: "
        f"python -m data_builders merge --out {folder}",
        soft_wrap=True,
        markup=False,
    )
    if there < len(shards):
        salt = ", if all of them had this task's --id_salt FILE" if is_own_salt else ""
        console.print(
            f"Tasks with folders of their own: python -m data_builders merge --out SPLIT FOLDER FOLDER ...{salt}",
            soft_wrap=True,
            markup=False,
        )


def count_concerns(cases: Sequence[Case]) -> dict[str, int]:
    """Print where reports seem to name a person or a day; returns how often, by kind."""
    concerns = scan_reports(cases)
    for line in concern_lines(concerns):
        console.print(line, style="yellow", markup=False)
    counts: Counter = Counter()
    for concern in concerns:
        counts[concern.kind] += concern.count
    return dict(sorted(counts.items()))


def write_shards(
    folder: Path, shards: Sequence[Shard], settings: Settings, args: argparse.Namespace
) -> list[ShardRecord]:
    """Build what is missing of some shards; returns the records of all of them."""
    done = complete_records(folder, shards)
    todo = [shard for shard in shards if shard.file not in done]
    waiting = [case for shard in todo for case in shard.cases]
    if len(todo) < len(shards):
        then = "building the rest" if todo else "nothing is left to build"
        console.print(f"{len(shards) - len(todo)} of {len(shards)} shards are complete; {then}.")
    workers = min(args.workers or num_cores(), max(1, len(waiting)))
    watch = SourceWatch([case for shard in shards for case in shard.cases])
    rows = built_rows(waiting, settings, workers, args.executor)
    columns = (*Progress.get_default_columns()[:-1], MofNCompleteColumn(), TimeRemainingColumn())
    place = f"{workers} workers" if args.executor == "processes" else args.executor
    try:
        with Progress(*columns, console=console, transient=True) as progress:
            task = progress.add_task(f"preparing volumes ({place})", total=len(waiting))
            for shard in todo:
                members = (stop_or_pass(watch.check(next(rows)), args.strict) for _ in shard.cases)
                tracked = (progress.advance(task) or item for item in members)
                done[shard.file] = write_shard(folder, shard, tracked, settings.configs)
    finally:
        rows.close()
    return [done[shard.file] for shard in shards]


def stop_or_pass(item: BuiltRow, strict: bool) -> BuiltRow:
    if strict and item.skip_reason is not None:
        raise ValueError(f"{item.recon_id}: {item.skip_reason}")
    return item


def finish_split(
    folder: Path,
    cases: Sequence[Case],
    identity: dict,
    records: Sequence[ShardRecord],
    concerns: dict[str, int],
    num_previews: int,
) -> int:
    """Write card, previews and, last, the manifest that says that the split is complete; returns the exit status."""
    manifest = make_manifest(cases, identity, records, concerns)
    has_rows = any(split["rows"] for split in manifest["splits"].values())
    if has_rows:
        write_card(folder, manifest)
        for split, content in manifest["splits"].items():
            if content["rows"] and "volumes" in identity["settings"]["configs"]:
                drawn = write_previews(folder, split, num_previews, folder / "previews")
                remove_other_pictures(drawn, split)
    write_json(folder / "manifest.json", manifest)
    shutil.rmtree(folder / PROGRESS_FOLDER, ignore_errors=True)
    print_summary(manifest)
    if not has_rows:
        console.print("[red]Nothing was written: every case was skipped.[/red]")
        return 1
    pictures = f"{folder / 'previews'} and " if (folder / "previews").is_dir() else ""
    console.print(
        f"written to {folder}; before training, look at {pictures}`python -m data_builders inspect {folder}`",
        soft_wrap=True,
        markup=False,
    )
    return 0


def remove_other_pictures(drawn: Sequence[Path], split: str) -> None:
    """Remove pictures of other cases at the same places: from a run in which an earlier case was not there."""
    for index, picture in enumerate(drawn):
        for other in picture.parent.glob(f"{split}-{index:03d}-*.png"):
            if other != picture:
                other.unlink()
