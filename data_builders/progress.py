"""A build that is under way: what it began with, what it may continue, and how it stops when it has to.

While a build lasts, the folder `.building` in the split holds
    identity.json    settings and hash of the source: another build is not continued
    cases.json       the cases, without their files: what `merge` needs to finish the split without the source
    <shard>.json     what went into a finished shard
It is removed when the manifest is written, and comes back out of the manifest when a build is run again. Unfinished
files end in `.tmp`; a build that is continued removes those that a killed one has left.

The source may have changed since, as long as no case has that was written: a file that was broken or missing, and was
mended as the message asked. Shards whose cases are the same stay; the others are built as the source is now.
"""

import contextlib
import errno
import json
import os
import signal
import textwrap
import threading
import uuid
from collections.abc import Container, Iterable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import pyarrow as pa

from .cases import Case, counted
from .shards import (
    CONFIGS,
    PROGRESS_FOLDER,
    Shard,
    ShardRecord,
    complete_records,
    file_of,
    known_records,
    record_path,
    write_json,
    write_record,
)
from .sources import HUB_ADDRESS, Source
from .summary import console

# Settings that came after the first builds, and what these were built with.
LATER_SETTINGS = {
    "preprocessing": "standard",
    "rescale_mode": "auto",
    "zstd_level": 3,
    "configs": ["volumes"],
    "ids": "kept",
}
PACKAGES = ("pyarrow", "zstandard")  # of the libraries that decide the bytes of a shard, those that pip installs

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


def continue_or_begin(
    folder: Path,
    identity: dict,
    plan: dict,
    shards: Sequence[Shard],
    mine: Sequence[Shard] | None = None,
    is_part: bool = False,
    again: bool = True,
    id_key: Path | None = None,
) -> dict:
    """Make the folder ready for a new build, or for what is missing of one that was begun there.

    Args:
        folder: `--out`.
        identity: Settings and hash of the source.
        plan: From `plan_of`.
        shards: All shards of the split.
        mine: Those that this process will build (default: all).
        is_part: Whether other processes build the other shards of this folder at the same time.
        again: Whether cases that were skipped are tried again where they may do now; False in a merge.
        id_key: `--id_key` of this build, already written.

    Returns:
        The identity of the split: of libraries it names those that wrote its shards.

    Raises:
        ValueError: If something else lies in the folder, or a build with other settings or of another source.
    """
    mine = shards if mine is None else mine
    finished = folder / "manifest.json"
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--out {folder} is a file; name a folder.")
    # Looked up before the identity is: of several processes that begin at once, the first writes its identity first.
    holds_something = folder.is_dir() and any(entry.name != PROGRESS_FOLDER for entry in folder.iterdir())
    before = read_identity(folder)
    to_build = mine
    if before is None:
        if holds_something:
            raise ValueError(f"--out {folder} is not empty and holds no processed split; name a new folder.")
        if is_part and not is_first(folder, identity):  # another task has begun since, perhaps with other settings
            return continue_or_begin(folder, identity, plan, shards, mine, is_part, again, id_key)
    else:
        check_may_continue(before["settings"], identity["settings"], f"--out {folder}")
        if before["source_sha256"] != identity["source_sha256"]:
            is_hashed = identity["settings"]["ids"] == "hashed"
            tell_mended(check_only_mended(folder, plan["cases"], is_hashed, id_key), is_merge=not again)
        kept = kept_records(folder, shards, again)
        to_build = [shard for shard in mine if shard.file not in kept]
        identity = with_libraries_of(before, identity, folder, bool(to_build), is_part or bool(kept))
        if not is_part:  # other tasks may be writing; what a killed one left is removed by the merge
            remove_unfinished(folder)
    # Before anything else: a folder that holds more than this and is killed would be taken for a stranger's.
    write_json(folder / PROGRESS_FOLDER / "identity.json", identity)
    write_json(folder / PROGRESS_FOLDER / "cases.json", plan)
    for config in identity["settings"].get("configs", CONFIGS[:1]):
        (folder / config).mkdir(parents=True, exist_ok=True)
    if finished.is_file():
        records_from_manifest(folder, without={shard.file for shard in to_build})
        finished.unlink(missing_ok=True)  # it comes back when every shard is there
    if before is not None:
        for shard in mine:
            if shard.file in kept and kept[shard.file].file != shard.file:
                rename_shard(folder, kept[shard.file], shard.file)
        if not is_part:
            remove_shards(folder, known_records(folder).keys() - {shard.file for shard in shards})
    return identity


def is_first(folder: Path, identity: dict) -> bool:
    """Note the identity of a new build; False where another task has done so, whose identity stays."""
    path = folder / PROGRESS_FOLDER / "identity.json"
    own = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    write_json(own, identity)
    try:
        os.link(own, path)  # unlike a rename, it fails where the name is taken
    except FileExistsError:
        return False
    except OSError:  # a file system without links: the caller writes it, and the last one of several stays
        return True
    finally:
        own.unlink(missing_ok=True)
    return True


def is_finished(folder: Path, identity: dict, shards: Sequence[Shard]) -> bool:
    """Whether a folder holds the finished split of this very build, with these shards whole and nothing in them to be
    tried again: a task that a batch system starts a second time has nothing to do then.
    """
    manifest = read_json(folder / "manifest.json")
    if manifest is None or manifest.get("source_sha256") != identity["source_sha256"]:
        return False
    here = {name: value for name, value in identity["settings"].items() if name != "libraries"}
    there = {name: value for name, value in manifest.get("settings", {}).items() if name != "libraries"}
    return here == there and len(complete_records(folder, shards)) == len(shards)


def open_source(where: str, folder: Path) -> Source:
    """The source of a build. A repository on the Hub stays at the commit with which the build in `folder` began, unless
    `where` names one.
    """
    before = read_identity(folder)
    options = before["settings"].get("options", {}) if before else {}
    commit, place = options.get("revision"), HUB_ADDRESS.fullmatch(where.rstrip("/"))
    is_pinned = place is None or place["revision"] is not None
    if commit is None or is_pinned or repository_of(options) != where.rstrip("/"):
        return Source(where)
    console.print(
        f"--out {folder} was begun with commit {commit} of the source and goes on with it; for another one, name it: "
        f"--source {with_commit(where, 'COMMIT')}.",
        soft_wrap=True,
        markup=False,
    )
    try:
        return Source(where, revision=commit)
    except ValueError as error:
        raise ValueError(f"{error} It is the commit with which --out {folder} was begun. {MEND}") from None


def repository_of(options: dict) -> str | None:
    """The source in the settings of a build without its commit; None where it has none."""
    source, commit = options.get("source"), options.get("revision")
    return source.replace(f"@{commit}", "", 1) if source and commit else None


def with_commit(where: str, commit: str) -> str:
    """The address of a repository on the Hub at a commit."""
    place = HUB_ADDRESS.fullmatch(where.rstrip("/"))
    return f"{where[: place.end('repo')]}@{commit}{where.rstrip('/')[place.end('repo') :]}"


def read_json(path: Path) -> dict | None:
    """The content of a JSON file, or None where there is none (any more: another process may have removed it)."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None


def read_identity(folder: Path) -> dict | None:
    """Settings and hash of the source of a build that was begun or finished in a folder, or None."""
    before = read_json(folder / PROGRESS_FOLDER / "identity.json") or read_json(folder / "manifest.json")
    return before and identity_of(before)


def identity_of(content: dict) -> dict:
    """Settings and hash of the source, out of a manifest as well."""
    return {"settings": content.get("settings", {}), "source_sha256": content.get("source_sha256")}


def check_may_continue(before: dict, now: dict, place: str) -> None:
    """Raise a ValueError that names every setting of a build that forbids to continue it with others.

    Libraries are looked at where something has to be written (`with_libraries_of`); another commit of the same
    repository is a change of the source, of which `check_only_mended` judges.
    """
    before = {**before, "libraries": now.get("libraries")}
    there, here = (dict(settings.get("options", {})) for settings in (before, now))
    if repository_of(there) is not None and repository_of(there) == repository_of(here):
        before["options"] = {**there, "source": here["source"], "revision": here["revision"]}
    check_same_settings(before, now, place)


def with_libraries_of(before: dict, identity: dict, folder: Path, is_to_build: bool, is_kept: bool) -> dict:
    """The identity with the libraries that wrote what is kept of a build.

    Args:
        before, identity: Of the build that was begun, and now.
        folder: Its folder.
        is_to_build: Whether shards have to be written.
        is_kept: Whether others stay beside them.

    Raises:
        ValueError: If the libraries here would write other bytes than those that are there.
    """
    there, here = before["settings"].get("libraries"), identity["settings"]["libraries"]
    if there is None or there == here or not is_kept:
        return identity
    if is_to_build:
        wanted, found = (", ".join(f"{name} {version}" for name, version in names.items()) for names in (there, here))
        packages = " ".join(f"{name}=={version}" for name, version in there.items() if name in PACKAGES)
        raise ValueError(
            f"--out {folder} was begun with {wanted}; here are {found}, which write the same values in other bytes. "
            f"`pip install {packages}` goes on with it. {MEND}"
        )
    return {**identity, "settings": {**identity["settings"], "libraries": there}}


def check_only_mended(folder: Path, cases: Sequence[dict], is_hashed: bool, id_key: Path | None = None) -> list[str]:
    """The cases that have changed since a build began in a folder.

    Args:
        folder: `--out`.
        cases: As the plan tells them (`plan_of`), from the source as it is now.
        is_hashed: Whether their ids are hashes, of which no user knows whose they are.
        id_key: The table that says it, where this build has written one.

    Raises:
        ValueError: If one of them was written, or could be built then and cannot be built any more.
    """
    place = f"--out {folder} was begun from another state of the source"
    mend = MEND
    if is_hashed and id_key is not None:
        mend += f" Which case of yours that is was written to {id_key}."
    elif is_hashed:
        mend += " The same build with --id_key FILE writes which case of yours that is."
    now = {case["recon_id"]: case for case in cases}
    plan = read_json(folder / PROGRESS_FOLDER / "cases.json") or {"cases": []}  # a finished split has none
    before = {case["recon_id"]: case for case in plan["cases"]}
    known = {name: case.get("digest") for name, case in before.items()}
    could_be_built = {name for name, case in before.items() if case["skip_reason"] is None}
    written: dict[str, str] = {}
    for record, _ in known_records(folder).values():
        if record.cases is None:
            raise ValueError(
                f"{place}: reports, labels, or names and sizes of its files have changed since, or a file is gone. "
                f"Bring the source back as it was. {MEND}"
            )
        could_be_built |= record.cases.keys()
        if record.is_whole(folder):
            skipped = {entry["case"] for entry in record.skipped}
            written |= {name: digest for name, digest in record.cases.items() if name not in skipped}
        known |= record.cases
    for name in (*now, *sorted(could_be_built - now.keys())):
        reason = now[name]["skip_reason"] if name in now else "it is not in the tables"
        if name in could_be_built and reason is not None and name in now and now[name]["is_excluded"]:
            raise ValueError(
                f"{place}: {name} was chosen then, and now it is left out ({reason}): a file, or a line of a table, "
                f"has come since. Take it away again. {mend}"
            )
        if name in could_be_built and reason is not None:
            raise ValueError(
                f"{place}: {name} could be built then, and now it cannot ({reason}); a file is gone, or a row of a "
                f"table. Bring it back. {mend}"
            )
        if name in written and now[name]["digest"] != written[name]:
            raise ValueError(
                f"{place}: {name} was written, and its report, its labels, or name or size of a file have changed "
                f"since. Only what was skipped or not yet written may change. Bring it back as it was. {mend}"
            )
    return [name for name, case in now.items() if case["skip_reason"] is None and case["digest"] != known.get(name)]


def tell_mended(changed: Sequence[str], is_merge: bool) -> None:
    if changed:
        told = counted(len(changed), "case that was not written has", "cases that were not written have")
        console.print(
            f"{told} changed since this build began ({changed[0]} first); shards with other cases than then are "
            + ("taken from the parts." if is_merge else "built again, as the source is now."),
            soft_wrap=True,
            markup=False,
        )


def kept_records(folder: Path, shards: Sequence[Shard], again: bool = True) -> dict[str, ShardRecord]:
    """The records of shards that are complete in a folder, by the file of the shard, also of those that lie there under
    another name: names tell how many shards there are, and there may be more now.
    """
    kept = complete_records(folder, shards, again)
    by_cases = {
        frozenset(record.cases.items()): (record, written)
        for record, written in known_records(folder).values()
        if record.cases is not None and record.file not in kept
    }
    for shard in shards:
        record, written = by_cases.get(frozenset(shard.digests.items()), (None, 0.0))
        if shard.file in kept or record is None or not record.is_whole(folder):
            continue
        is_free = not any((folder / file_of(shard.file, config)).exists() for config in CONFIGS)
        if is_free and not (again and record.is_to_be_tried_again(shard, written)):
            kept[shard.file] = record
    return kept


def rename_shard(folder: Path, record: ShardRecord, file: str) -> None:
    """Give a shard and its record another name."""
    old, entries = record.file, record.files()
    record = record.renamed(file)
    for before, now in zip(entries, record.files(), strict=True):
        os.replace(folder / before["file"], folder / now["file"])
    write_record(folder, record)
    remove_shards(folder, [old])


def records_from_manifest(folder: Path, without: Container[str]) -> None:
    """Write the records of a finished split again, with the time of its manifest: what was replaced since is seen."""
    for record, written in known_records(folder).values():
        path = record_path(folder, record.file)
        if record.file not in without and not path.is_file():
            write_record(folder, record)
            os.utime(path, (written, written))


def remove_shards(folder: Path, files: Iterable[str]) -> None:
    """Remove shards that do not belong to the split any more, and their records."""
    for file in sorted(files):
        for config in CONFIGS:
            (folder / file_of(file, config)).unlink(missing_ok=True)
        record_path(folder, file).unlink(missing_ok=True)


def check_same_settings(before: dict, now: dict, place: str, mend: str = MEND) -> None:
    """Raise a ValueError that names every setting in which two manifests differ."""
    changed = differences({**LATER_SETTINGS, **before}, {**LATER_SETTINGS, **now})
    if changed:
        raise ValueError(f"{place} was begun with other settings ({'; '.join(changed)}). {mend}")


def check_same_build(before: dict, now: dict, place: str) -> None:
    """Raise a ValueError that says in what two parts of a split differ."""
    there, here = before["settings"], now["settings"]
    mend = "Build the part anew, with the options of the others."
    if there.get("id_salt_check") != here.get("id_salt_check") and there.get("ids") == here.get("ids"):
        mend = (
            "Ids under different salts do not fit together, and neither do the shards. Give all tasks one "
            "--id_salt FILE (the first one writes it), and build the part anew."
        )
    elif repository_of(there.get("options", {})) == repository_of(here.get("options", {})) is not None:
        mend = f"The tasks took different commits: give all of them --source {there['options']['source']}."
    check_same_settings(there, here, place, mend)
    if before["source_sha256"] != now["source_sha256"]:
        raise ValueError(
            f"{place} was begun from another state of the source: reports, labels, or names and sizes of its files "
            "have changed in between, or a file is gone. Run all tasks again on the source as it is now: what has not "
            "changed stays. Then merge again."
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
    names = ("split", "patient_id", "scan_id", "recon_id", "skip_reason", "is_excluded", "duplicate_of", "digest")
    return {"cases": [{name: getattr(case, name) for name in names} for case in cases], "concerns": concerns}


def read_plan(folder: Path) -> tuple[list[Case], dict[str, int]] | None:
    """What `plan_of` wrote, or None where no build is under way."""
    plan = read_json(folder / PROGRESS_FOLDER / "cases.json")
    return plan and ([Case(**entry) for entry in plan["cases"]], plan["concerns"])
