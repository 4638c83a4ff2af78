"""Checkpoints that are whole or not there: files and folders only, no trainer.

A checkpoint is written into `_checkpoint-N.partial` beside the others. When every rank has written its files they are
put on the disk (fsync) and the folder is renamed to `checkpoint-N`; only then does the oldest one go. A run that is
killed at any moment, or runs into a full disk, so keeps the last checkpoint under its name, and what it leaves behind
is cleared away by the next start:

    _checkpoint-N.partial   being written
    _checkpoint-N.old       was replaced by a new one of the same step; taken back if the new one never came
    _checkpoint-N.removed   being deleted

Pushes to the Hub leave out what begins with an underscore.
"""

import contextlib
import errno
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from safetensors.torch import load_file, save_file
from torch import Tensor

LAST_FILE = "trainer_state.json"  # written after all others, also by the Trainer itself
PARTIAL, OLD, REMOVED = "partial", "old", "removed"
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_REMNANT = re.compile(rf"_checkpoint-(\d+)\.({PARTIAL}|{OLD}|{REMOVED})")
_TENSOR = "__tensor__"  # marks in a JSON file the place of a tensor in the safetensors file beside it


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or read. Those written before are untouched."""


class Stateful(Protocol):
    """What a trainer keeps in its checkpoints beside the model: dicts of tensors, JSON values and such dicts."""

    def state_dict(self) -> dict[str, Any]:
        """The state, the same on every rank."""

    def load_state_dict(self, state: dict[str, Any]) -> Any:
        """Take a state back; tensors come on the CPU."""


def checkpoint_folder(run: str | Path, step: int) -> Path:
    """Where the checkpoint of a step lies once it is complete."""
    return Path(run) / f"checkpoint-{step}"


def remnant(run: str | Path, step: int, kind: str) -> Path:
    """Where the checkpoint of a step lies while it is written, replaced or deleted."""
    return Path(run) / f"_checkpoint-{step}.{kind}"


def step_of(checkpoint: str | Path) -> int | None:
    """The step in a checkpoint's name; None for another name."""
    match = _CHECKPOINT.fullmatch(Path(checkpoint).name)
    return int(match[1]) if match else None


def is_complete(checkpoint: str | Path) -> bool:
    """Whether a folder is a whole checkpoint. Half of one, as other programs may leave it, is none."""
    return _REMNANT.fullmatch(Path(checkpoint).name) is None and (Path(checkpoint) / LAST_FILE).is_file()


def complete_checkpoints(run: str | Path) -> list[Path]:
    """The complete checkpoints of a run, by step."""
    folders = [path for path in _entries(run) if step_of(path) is not None and is_complete(path)]
    return sorted(folders, key=step_of)


def newest_checkpoint(run: str | Path) -> str | None:
    """The complete checkpoint of the latest step; None without one."""
    for path in _entries(run):
        match = _REMNANT.fullmatch(path.name)
        if match and match[2] == OLD and not checkpoint_folder(run, int(match[1])).exists():
            with contextlib.suppress(FileNotFoundError):  # another rank was faster
                os.rename(path, checkpoint_folder(run, int(match[1])))
    found = complete_checkpoints(run)
    return str(found[-1]) if found else None


def clear_away(run: str | Path) -> list[str]:
    """Remove what earlier runs left unfinished; returns the names that are gone."""
    newest_checkpoint(run)  # takes back what was to be replaced and was not
    names = [path.name for path in _entries(run) if _REMNANT.fullmatch(path.name)]
    for name in names:
        shutil.rmtree(Path(run) / name, ignore_errors=True)
    return names


def put_later_ones_aside(run: str | Path, step: int) -> list[str]:
    """Rename the checkpoints after `step` to `_superseded-checkpoint-N`; returns their old names.

    A run that goes on from an earlier checkpoint, with a lower learning rate perhaps, and is stopped again would
    otherwise continue from them.
    """
    later = [path for path in complete_checkpoints(run) if step_of(path) > step]
    for path in later:
        target = path.with_name(f"_superseded-{path.name}")
        shutil.rmtree(target, ignore_errors=True)
        os.rename(path, target)
    return [path.name for path in later]


def begin_checkpoint(run: str | Path, step: int) -> Path:
    """Make the empty folder that the files of a checkpoint are written into."""
    folder = remnant(run, step, PARTIAL)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def finish_checkpoint(run: str | Path, step: int) -> Path:
    """Give a checkpoint whose files are on the disk its name."""
    folder, old = checkpoint_folder(run, step), remnant(run, step, OLD)
    if folder.exists():  # a run that does its steps again
        shutil.rmtree(old, ignore_errors=True)
        os.rename(folder, old)
    os.rename(remnant(run, step, PARTIAL), folder)
    sync_folder(Path(run))
    shutil.rmtree(old, ignore_errors=True)
    return folder


def abandon_checkpoint(run: str | Path, step: int) -> None:
    """Give back the room that half a checkpoint takes."""
    shutil.rmtree(remnant(run, step, PARTIAL), ignore_errors=True)


def keep_newest(run: str | Path, limit: int | None, best: str | Path | None = None) -> None:
    """Delete the oldest checkpoints beyond `limit` (None or 0: keep all), never the newest and never the best one."""
    found = complete_checkpoints(run)
    if not limit or limit < 0 or len(found) <= limit:
        return
    kept = {found[-1].name} | ({Path(best).name} if best else set())
    surplus = len(found) - max(limit, len(kept))
    for path in [path for path in found if path.name not in kept][:surplus]:
        doomed = remnant(run, step_of(path), REMOVED)
        shutil.rmtree(doomed, ignore_errors=True)
        os.rename(path, doomed)  # deleting takes its time; half of a checkpoint must not pass for one
        shutil.rmtree(doomed, ignore_errors=True)


def sync_files(folder: str | Path) -> None:
    """Put everything in a folder on the disk, names included."""
    for parent, _, files in os.walk(folder):
        for name in files:
            with open(os.path.join(parent, name), "rb+") as file:
                _fsync(file.fileno())
        sync_folder(Path(parent))


def sync_folder(folder: Path) -> None:
    """Put the names in a folder on the disk."""
    if os.name != "posix":  # elsewhere a folder cannot be opened
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        _fsync(descriptor)
    finally:
        os.close(descriptor)


def save_state(folder: str | Path, name: str, state: dict[str, Any]) -> None:
    """Write a state as `state_NAME.json` and, if it holds tensors, `state_NAME.safetensors`."""
    tensors: dict[str, Tensor] = {}
    content = _without_tensors(state, "", tensors)
    path = Path(folder) / f"state_{name}.json"
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    if tensors:
        save_file(tensors, path.with_suffix(".safetensors"))


def load_state(folder: str | Path, name: str) -> dict[str, Any] | None:
    """Read a state back; None if the checkpoint holds none of that name."""
    path = Path(folder) / f"state_{name}.json"
    if not path.is_file():
        return None
    tensors = path.with_suffix(".safetensors")
    loaded = load_file(tensors) if tensors.is_file() else {}
    return _with_tensors(json.loads(path.read_text(encoding="utf-8")), loaded)


def why_not_written(run: str | Path, step: int, errors: list[str], is_full: bool) -> str:
    """The message of a checkpoint that could not be written.

    Args:
        run: Folder of the run.
        step: Of the checkpoint.
        errors: What went wrong, from each rank that has something to tell.
        is_full: Whether a disk is full.
    """
    before = complete_checkpoints(run)
    last = f"{before[-1]} is whole" if before else "there is none before it"
    with contextlib.suppress(OSError):
        free = f"{shutil.disk_usage(run).free / 1e9:.2f} GB are free there"
        if before:
            size = sum(path.stat().st_size for path in before[-1].rglob("*") if path.is_file())
            free += f", a checkpoint takes some {size / 1e9:.2f} GB"
        last += f" ({free})"
    reason = f"the disk of {run} is full" if is_full else "; ".join(errors)
    advice = (
        "Free some space, or lower --save_total_limit (one more than that lies there while one is written)"
        if is_full
        else "Mend that"
    )
    return (
        f"the checkpoint of step {step} could not be written: {reason}. Half of it was taken away again; {last}. "
        f"{advice}, then go on with --resume_from_checkpoint auto."
    )


def is_disk_full(error: BaseException) -> bool:
    """Whether a disk, a user's share of it or the largest size of a file is used up, as far as the error tells.

    torch says of its files no more than that they could not be written.
    """
    codes = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        text = str(error)
        if getattr(error, "errno", None) in codes or any(f"(os error {code})" in text for code in codes):
            return True
        if "iostream error" in text or "PytorchStreamWriter failed" in text:
            return True
        seen.add(id(error))
        error = error.__cause__ or error.__context__
    return False


def _entries(folder: str | Path) -> Iterator[Path]:
    """What lies in a folder; nothing if there is none."""
    return iter(sorted(Path(folder).iterdir())) if Path(folder).is_dir() else iter(())


def _fsync(descriptor: int) -> None:
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network disks know no fsync; a full one may tell of it only now.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP):
            raise


def _without_tensors(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """A state as JSON takes it, the tensors moved to `tensors`."""
    if isinstance(value, Tensor):
        # A copy of its own: safetensors refuses tensors that share memory, as tied weights do.
        tensors[path] = value.detach().to("cpu", copy=True).contiguous()
        return {_TENSOR: path}
    if isinstance(value, dict):
        if wrong := [key for key in value if not isinstance(key, str)]:
            raise TypeError(f"the keys of a state must be strings, got {wrong[0]!r} at {path or 'its top'}.")
        return {key: _without_tensors(entry, f"{path}/{key}".lstrip("/"), tensors) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_tensors(entry, f"{path}/{place}", tensors) for place, entry in enumerate(value)]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"a state holds tensors, numbers, strings, lists and dicts, got {type(value).__name__} at {path}.")


def _with_tensors(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, dict):
        if set(value) == {_TENSOR}:
            return tensors[value[_TENSOR]]
        return {key: _with_tensors(entry, tensors) for key, entry in value.items()}
    return [_with_tensors(entry, tensors) for entry in value] if isinstance(value, list) else value
