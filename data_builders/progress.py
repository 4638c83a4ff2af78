"""A build that is under way: what it began with, what it may continue, and how it stops when it has to.

While a build lasts, the folder `.building` in the split holds
    identity.json    settings and hash of the source: another build is not continued
    cases.json       the cases, without their files: what `merge` needs to finish the split without the source
    <shard>.json     what went into a finished shard
It is removed when the manifest is written, and comes back out of the manifest when a build is run again. Unfinished
files end in `.tmp`; a build that is continued removes those that a killed one has left.
"""

import contextlib
import errno
import json
import signal
import textwrap
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import pyarrow as pa

from .cases import Case
from .shards import CONFIGS, PROGRESS_FOLDER, Shard, ShardRecord, write_json, write_record

# Settings that came after the first builds, and what these were built with.
LATER_SETTINGS = {
    "preprocessing": "standard",
    "rescale_mode": "auto",
    "zstd_level": 3,
    "configs": ["volumes"],
    "ids": "kept",
}

AGAIN = "What is finished stays; run the same command again to continue."
MEND = "Name another --out, or delete that folder to build anew."


class BuildStopped(ValueError):
    """What ended a build from outside. Nothing is wrong with what was written so far."""


@contextlib.contextmanager
def stopping_cleanly(folder: Path) -> Iterator[None]:
    """Turn a full disk, a signal and a worker that the system ended into errors that say how to go on.

    SIGTERM, which batch systems send before they take a machine away, stops a build as Ctrl-C does.
    """

    def interrupt(number: int, frame) -> None:
        raise KeyboardInterrupt

    is_main = threading.current_thread() is threading.main_thread()  # no other thread may set handlers
    before = signal.signal(signal.SIGTERM, interrupt) if is_main else None
    try:
        yield
    except KeyboardInterrupt:
        raise BuildStopped(f"stopped by a signal. {AGAIN}") from None
    except BrokenProcessPool as error:
        raise BuildStopped(
            f"the system ended a worker process, most likely because memory ran out. {AGAIN} Fewer --workers need less "
            "memory."
        ) from error
    except (OSError, pa.ArrowException) as error:
        if not is_disk_full(error):
            raise
        raise BuildStopped(f"the disk of --out {folder} is full. {AGAIN} Free some space there first.") from error
    finally:
        if is_main:
            signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)


def is_disk_full(error: BaseException) -> bool:
    """Whether an error says that a disk, or a user's share of it, is full. Arrow may keep the number in its text."""
    codes = (errno.ENOSPC, errno.EDQUOT)
    text = str(error)
    return getattr(error, "errno", None) in codes or any(f"[errno {code}]" in text.lower() for code in codes)


def continue_or_begin(folder: Path, identity: dict, plan: dict, shards: Sequence[Shard], is_part: bool = False) -> None:
    """Make the folder ready for a new build, or for what is missing of one that was begun there.

    Args:
        folder: `--out`.
        identity: Settings and hash of the source.
        plan: From `plan_of`.
        shards: Those that this process will build.
        is_part: Whether other processes build the other shards of this folder at the same time.

    Raises:
        ValueError: If something else lies in the folder, or a build with other settings or of another source.
    """
    begun = folder / PROGRESS_FOLDER / "identity.json"
    finished = folder / "manifest.json"
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--out {folder} is a file; name a folder.")
    # Looked up before the identity is: of several processes that begin at once, the first writes its identity first.
    holds_something = folder.is_dir() and any(entry.name != PROGRESS_FOLDER for entry in folder.iterdir())
    before = read_identity(folder)
    if before is None:
        if holds_something:
            raise ValueError(f"--out {folder} is not empty and holds no processed split; name a new folder.")
    else:
        check_same_build(before, identity, f"--out {folder}")
        if not is_part:  # other tasks may be writing; what a killed one left is removed by the merge
            remove_unfinished(folder)
    # Before anything else: a folder that holds more than this and is killed would be taken for a stranger's.
    write_json(begun, identity)
    write_json(folder / PROGRESS_FOLDER / "cases.json", plan)
    for config in identity["settings"].get("configs", CONFIGS[:1]):
        (folder / config).mkdir(parents=True, exist_ok=True)
    manifest = read_json(finished)
    if manifest is not None:
        for content in manifest["shards"]:
            write_record(folder, ShardRecord(**content))
        finished.unlink(missing_ok=True)  # it comes back when every shard is there


def is_finished(folder: Path, identity: dict, shards: Sequence[Shard]) -> bool:
    """Whether a folder holds the finished split of this very build, with these shards whole: a task that a batch system
    starts a second time has nothing to do then.
    """
    manifest = read_json(folder / "manifest.json")
    if manifest is None or any(manifest.get(key) != value for key, value in identity.items()):
        return False
    records = {content["file"]: ShardRecord(**content) for content in manifest["shards"]}
    return all(shard.file in records and records[shard.file].is_whole(folder) for shard in shards)


def read_json(path: Path) -> dict | None:
    """The content of a JSON file, or None where there is none (any more: another process may have removed it)."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None


def read_identity(folder: Path) -> dict | None:
    """Settings and hash of the source of a build that was begun or finished in a folder, or None."""
    before = read_json(folder / PROGRESS_FOLDER / "identity.json") or read_json(folder / "manifest.json")
    return before and {"settings": before.get("settings", {}), "source_sha256": before.get("source_sha256")}


def check_same_settings(before: dict, now: dict, place: str) -> None:
    """Raise a ValueError that names every setting in which two manifests differ."""
    changed = differences({**LATER_SETTINGS, **before}, {**LATER_SETTINGS, **now})
    if changed:
        raise ValueError(f"{place} was begun with other settings ({'; '.join(changed)}). {MEND}")


def check_same_build(before: dict, now: dict, place: str) -> None:
    """Raise a ValueError that says what differs between two identities."""
    check_same_settings(before["settings"], now["settings"], place)
    if before["source_sha256"] != now["source_sha256"]:
        raise ValueError(
            f"{place} was begun from another state of the source: reports, labels, or names and sizes of its files "
            f"have changed since, or a file is gone. Bring the source back as it was. {MEND}"
        )


def differences(before: dict, now: dict, place: str = "") -> list[str]:
    """`spacing: [3.0, 1.0, 1.0] there, [2.0, 1.0, 1.0] here` for every entry that is not the same."""
    found = []
    for key in sorted(before.keys() | now.keys()):
        there, here = before.get(key), now.get(key)
        if there == here:
            continue
        if isinstance(there, dict) and isinstance(here, dict):
            found += differences(there, here, f"{place}{key}.")
        else:
            found.append(
                f"{place}{key}: {textwrap.shorten(str(there), 80)} there, {textwrap.shorten(str(here), 80)} here"
            )
    return found


def remove_unfinished(folder: Path) -> None:
    """Remove what a killed build has left half written."""
    for place in (".", PROGRESS_FOLDER, *CONFIGS, "previews"):
        for path in (folder / place).glob("*.tmp"):
            path.unlink(missing_ok=True)


def plan_of(cases: Sequence[Case], concerns: dict[str, int]) -> dict:
    """What is known of the cases before their files are opened, without their files."""
    names = ("split", "patient_id", "scan_id", "recon_id", "skip_reason", "is_excluded", "duplicate_of")
    return {"cases": [{name: getattr(case, name) for name in names} for case in cases], "concerns": concerns}


def read_plan(folder: Path) -> tuple[list[Case], dict[str, int]] | None:
    """What `plan_of` wrote, or None where no build is under way."""
    plan = read_json(folder / PROGRESS_FOLDER / "cases.json")
    return plan and ([Case(**entry) for entry in plan["cases"]], plan["concerns"])
