"""Finish a processed split whose shards were built by several tasks (`--shard i/n`).

Tasks that shared one --out, on a shared disk:
    python -m data_builders merge --out out/split

Tasks that wrote into folders of their own; their shards are linked into --out, or copied onto another disk:
    python -m data_builders merge --out out/split part1/split part2/split

All parts must be of one build: equal settings, equal source and, with hashed ids, one --id_salt FILE. Where a shard is
missing or is not what was written (its sha256 is compared), the message names the --shard with which to make it, and
nothing is finished. A merge that was killed is continued by the same command. One from before cases were mended and the
tasks run again is brought up to date by it, as long as no case of it has changed that was written; else delete it, or
name another --out. The result has the bytes of a build in one process.
"""

import argparse
import os
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from rich.progress import MofNCompleteColumn, Progress

from .build import finish_split
from .progress import (
    check_same_build,
    continue_or_begin,
    identity_of,
    plan_of,
    read_identity,
    read_json,
    read_plan,
    stopping_cleanly,
)
from .run_cases import num_cores
from .shards import (
    PROGRESS_FOLDER,
    Shard,
    ShardRecord,
    complete_records,
    known_records,
    plan_shards,
    replace_durably,
    sha256_of,
    write_record,
)
from .summary import console, print_summary

NAMES_SHOWN = 8  # missing shards that a message names


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "parts", nargs="*", type=Path, metavar="PART", help="Folders of tasks with an --out of their own."
    )
    parser.add_argument("--out", type=Path, required=True, help="Folder of the split; of the tasks, if they shared it.")
    parser.add_argument(
        "--no_checksums",
        action="store_true",
        help="Compare the sizes of the shards alone. Their checksums take as long as reading the split once.",
    )
    parser.add_argument("--previews", type=int, default=6, help="Cases drawn per split into previews/ (default: 6).")


def run(args: argparse.Namespace) -> int:
    begun = read_identity(args.out)
    folders = ([args.out] if begun is not None else []) + args.parts
    if not folders:
        raise ValueError(
            f"--out {args.out} holds no build that was begun; build with --shard i/n, or name the folders of the parts."
        )
    identities = {folder: read_identity(folder) for folder in folders}
    for folder in folders:
        if identities[folder] is None:
            raise ValueError(f"{folder} holds no build that was begun; name the --out of a task.")
    # Parts that agree go before an --out of another state: their earlier merge, if they hold the whole split.
    is_behind = len({identities[part]["source_sha256"] for part in args.parts}) == 1 and (
        begun is not None and begun["source_sha256"] != identities[args.parts[0]]["source_sha256"]
    )
    if is_behind:
        folders = args.parts
    for folder in folders:
        check_same_build(identities[folders[0]], identities[folder], f"{folder}, compared with {folders[0]},")
    identity = identities[folders[0]]
    manifest = read_json(args.out / "manifest.json")
    lost = []
    if manifest is not None and not is_behind and identity_of(manifest) == begun:
        records = [ShardRecord(**content) for content in manifest["shards"]]
        lost = [record.file for record in records if not record.is_whole(args.out)]
        if not lost and not has_built_since(args.parts, args.out, records):
            shutil.rmtree(args.out / PROGRESS_FOLDER, ignore_errors=True)  # a merge was killed while it removed that
            console.print(f"{args.out} is finished already.", soft_wrap=True)
            print_summary(manifest)
            return 0
    plan = next((plan for folder in folders if (plan := read_plan(folder)) is not None), None)
    if plan is None:
        raise ValueError(tell_no_plan(args.out, folders[0], lost))
    cases, concerns = plan
    shards = plan_shards(cases, identity["settings"]["rows_per_shard"])
    with stopping_cleanly(args.out):
        found = newest_records(folders, shards)
        missing = [shard.file for shard in shards if shard.file not in found]
        if missing and is_behind:  # --out is no merge of theirs, but the folder of a task that is ahead or behind
            check_same_build(begun, identity, f"{folders[0]}, compared with {args.out},")
        if missing:
            raise ValueError(
                f"{len(missing)} of {len(shards)} shards are missing: {named(missing, shards)}. Run the tasks again "
                "that were to build them, or build each with the --shard beside it; nothing is built twice. Then merge "
                "again."
            )
        continue_or_begin(args.out, identity, plan_of(cases, concerns), shards, again=False)
        gather(found, args.out, shards, is_compared=not args.no_checksums)
        records = [found[shard.file][1] for shard in shards]
        return finish_split(args.out, cases, identity, records, concerns, args.previews)


def newest_records(folders: Sequence[Path], shards: Sequence[Shard]) -> dict[str, tuple[Path, ShardRecord]]:
    """For every shard that is complete in one of the folders, by its file: the folder and its record. The first folder,
    unless another one holds other content that was built later.
    """
    found: dict[str, tuple[Path, ShardRecord]] = {}
    times: dict[str, float] = {}
    for folder in folders:
        known = known_records(folder)
        # A case whose file vanished while its task ran stays skipped: the tasks are over. Run a task again to try it
        # again.
        for file, record in complete_records(folder, shards, again=False).items():
            written = known[file][1]
            if file not in found or (written > times[file] and record.as_json() != found[file][1].as_json()):
                found[file], times[file] = (folder, record), written
    return found


def has_built_since(parts: Sequence[Path], out: Path, records: Sequence[ShardRecord]) -> bool:
    """Whether a task has built a shard of the finished split `out` again, with other content: a broken file was mended
    without a change of its name and size, by which the state of a source is told.
    """
    merged = {record.file: record.as_json() for record in records}
    since = (out / "manifest.json").stat().st_mtime
    return any(
        written > since and record.as_json() != merged.get(file) and record.is_whole(part)
        for part in parts
        for file, (record, written) in known_records(part).items()
    )


def tell_no_plan(out: Path, folder: Path, lost: Sequence[str]) -> str:
    """What to do where no folder keeps a list of the cases: those of finished splits do not."""
    if lost:
        more = f" and {len(lost) - NAMES_SHOWN} more" if len(lost) > NAMES_SHOWN else ""
        return (
            f"--out {out} is a finished split, but {', '.join(lost[:NAMES_SHOWN])}{more} are missing or cut short. Run "
            "the tasks again that built them, or the build without --shard; the rest stays."
        )
    if (folder / "manifest.json").is_file():
        return f"the parts are finished splits; any of them is the whole: use {folder} as it is."
    return f"no task came so far as to note its cases in {folder}: run the tasks again, then merge."


def gather(found: dict[str, tuple[Path, ShardRecord]], out: Path, shards: Sequence[Shard], is_compared: bool) -> None:
    """Bring every shard into its place and compare it with its checksum.

    Raises:
        ValueError: If the content of a shard is not what was written; names each of them.
    """

    def bring_all(place: tuple[Path, ShardRecord]) -> bool:
        folder, record = place
        return all(bring(folder / entry["file"], out / entry["file"], entry, is_compared) for entry in record.files())

    damaged = []
    columns = (*Progress.get_default_columns()[:-1], MofNCompleteColumn())
    with Progress(*columns, console=console, transient=True) as progress, ThreadPoolExecutor(num_cores()) as pool:
        told = progress.track(pool.map(bring_all, found.values()), len(found), description="gathering shards")
        for (folder, record), is_sound in zip(found.values(), told):
            if not is_sound:
                damaged.append(record.file)
            elif folder != out:
                write_record(out, record)
    if damaged:
        places = ", ".join(sorted({str(found[file][0]) for file in damaged}))
        raise ValueError(
            f"{named(damaged, shards)} in {places}: damaged, the sha256 is not the one with which it was written. "
            "Delete it, and run the task again that built it, or build it with the --shard beside it; nothing else is "
            "built again. Then merge again."
        )


def named(files: Sequence[str], shards: Sequence[Shard]) -> str:
    """Shards by their files, and how to make each."""
    order = [shard.file for shard in shards]
    shown = [f"{file} (--shard {order.index(file) + 1}/{len(order)})" for file in files[:NAMES_SHOWN]]
    return ", ".join(shown) + (f" and {len(files) - NAMES_SHOWN} more" if len(files) > NAMES_SHOWN else "")


def bring(source: Path, target: Path, entry: dict, is_compared: bool) -> bool:
    """Link a file of a shard into its place, or copy it onto another disk; whether it is what its record says.

    Of what lies in its place already nothing is changed.
    """
    if source != target:
        unfinished = target.with_name(target.name + ".tmp")
        unfinished.unlink(missing_ok=True)
        try:
            os.link(source, unfinished)
            os.replace(unfinished, target)
            unfinished.unlink(missing_ok=True)  # where both were one file already, the rename did nothing
        except OSError:
            unfinished.unlink(missing_ok=True)
            shutil.copyfile(source, unfinished)
            if sha256_of(unfinished) != entry["sha256"]:
                unfinished.unlink()
                return False
            replace_durably(unfinished, target)
            return True
    if not is_compared or sha256_of(target) == entry["sha256"]:
        return True
    if source != target:
        target.unlink()
    return False
