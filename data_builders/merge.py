"""Finish a processed split whose shards were built by several tasks (`--shard i/n`).

Tasks that shared one --out, on a shared disk:
    python -m data_builders merge --out out/split

Tasks that wrote into folders of their own; their shards are linked into --out, or copied onto another disk:
    python -m data_builders merge --out out/split part1/split part2/split

All parts must be of one build: equal settings, equal source. Where a shard is missing, the message names the --shard
with which to make it, and nothing is finished. The result has the bytes of a build in one process.
"""

import argparse
import contextlib
import hashlib
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from .build import finish_split
from .progress import (
    check_same_build,
    continue_or_begin,
    plan_of,
    read_identity,
    read_json,
    read_plan,
    stopping_cleanly,
)
from .shards import Shard, ShardRecord, plan_shards, read_record, replace_durably, write_record
from .summary import console, print_summary

NAMES_SHOWN = 8  # missing shards that a message names


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "parts", nargs="*", type=Path, metavar="PART", help="Folders of tasks with an --out of their own."
    )
    parser.add_argument("--out", type=Path, required=True, help="Folder of the split; of the tasks, if they shared it.")
    parser.add_argument("--previews", type=int, default=6, help="Cases drawn per split into previews/ (default: 6).")


def run(args: argparse.Namespace) -> int:
    folders = ([args.out] if read_identity(args.out) is not None else []) + args.parts
    if not folders:
        raise ValueError(
            f"--out {args.out} holds no build that was begun; build with --shard i/n, or name the folders of the parts."
        )
    identities = {}
    for folder in folders:
        identities[folder] = read_identity(folder)
        if identities[folder] is None:
            raise ValueError(f"{folder} holds no build that was begun; name the --out of a task.")
        check_same_build(identities[folders[0]], identities[folder], f"{folder}, compared with {folders[0]},")
    identity = identities[folders[0]]
    plan = next((plan for folder in folders if (plan := read_plan(folder)) is not None), None)
    if plan is None:
        # Finished splits keep no list of cases. One that is finished needs none.
        manifest = read_json(args.out / "manifest.json")
        if manifest is None:
            raise ValueError(f"the parts are finished splits; any of them is the whole: use {folders[0]} as it is.")
        console.print(f"{args.out} is finished already.", soft_wrap=True)
        print_summary(manifest)
        return 0
    cases, concerns = plan
    shards = plan_shards(cases, identity["settings"]["rows_per_shard"])
    with stopping_cleanly(args.out):
        found = {shard.file: find_record(shard, folders) for shard in shards}
        missing = [index for index, shard in enumerate(shards) if found[shard.file] is None]
        if missing:
            raise ValueError(tell_missing(missing, shards))
        continue_or_begin(args.out, identity, plan_of(cases, concerns), shards)
        records = []
        for shard in shards:
            folder, record = found[shard.file]
            if folder != args.out:
                for entry in record.files():
                    bring(folder / entry["file"], args.out / entry["file"], entry["sha256"])
                write_record(args.out, record)
            records.append(record)
        return finish_split(args.out, cases, identity, records, concerns, args.previews)


def find_record(shard: Shard, folders: Sequence[Path]) -> tuple[Path, ShardRecord] | None:
    """The first folder that holds a whole shard, and its record.

    A case whose file vanished while its task ran stays skipped: the tasks are over. Run a task again to try it again.
    """
    for folder in folders:
        record = read_record(folder, shard, retry_vanished=False)
        if record is not None:
            return folder, record
    return None


def tell_missing(missing: Sequence[int], shards: Sequence[Shard]) -> str:
    """Which shards are missing, and how to make each."""
    named = [f"{shards[index].file} (--shard {index + 1}/{len(shards)})" for index in missing[:NAMES_SHOWN]]
    more = f" and {len(missing) - NAMES_SHOWN} more" if len(missing) > NAMES_SHOWN else ""
    return (
        f"{len(missing)} of {len(shards)} shards are missing: {', '.join(named)}{more}. Run the tasks again that "
        "were to build them, or build each with the --shard beside it; nothing is built twice. Then merge again."
    )


def bring(source: Path, target: Path, sha256: str) -> None:
    """Link a shard into its place; onto another disk it is copied, and compared with its checksum."""
    unfinished = target.with_name(target.name + ".tmp")
    unfinished.unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        os.link(source, unfinished)
        os.replace(unfinished, target)
        unfinished.unlink(missing_ok=True)  # where both were one file already, the rename did nothing
        return
    unfinished.unlink(missing_ok=True)
    shutil.copyfile(source, unfinished)
    with unfinished.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != sha256:
            unfinished.unlink()
            raise ValueError(f"{source} does not have the checksum of its record: it is damaged. Build it again.")
    replace_durably(unfinished, target)
