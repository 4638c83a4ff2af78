"""Reading files of weights that others wrote: tensors only, no code, and no more memory than the tensors in use."""

import argparse
import hashlib
import pickle
import re
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

# Where trainers keep the state dict in what they save: the published code and MAE say `model`, Lightning `state_dict`.
STATE_DICT_ENTRIES = ("model", "state_dict")
DATA_PARALLEL_PREFIX = "module."


class CheckpointError(ValueError):
    """A file of weights that cannot be used: the command shows the message and not a traceback."""


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """Read the state dict of a checkpoint, memory-mapped where the format allows.

    Args:
        path: `.safetensors`; or what `torch.save` wrote (`.pth`, `.pt`, `.bin`): a state dict, or a dict with one in
            the entry `model` or `state_dict`. What else stands there (optimizer, epoch) is not read.

    Returns:
        Tensors on the CPU by name, without the `module.` that DistributedDataParallel puts before every name.

    Raises:
        CheckpointError: If there is no such file, it is damaged, it holds more than tensors and plain values, or no
            state dict is found in it.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path} is {'a folder' if path.is_dir() else 'not there'}: give a file of weights.")
    state_dict = _read_safetensors(path) if path.suffix == ".safetensors" else _find_state_dict(_read_torch(path), path)
    if not state_dict:
        raise CheckpointError(f"{path} holds no tensors.")
    if sparse := [name for name, tensor in state_dict.items() if tensor.layout != torch.strided]:
        raise CheckpointError(f"{path}: {listed(sparse)}: sparse tensors. Save them dense (`tensor.to_dense()`).")
    if all(name.startswith(DATA_PARALLEL_PREFIX) for name in state_dict):
        state_dict = {name.removeprefix(DATA_PARALLEL_PREFIX): tensor for name, tensor in state_dict.items()}
    return state_dict


def sha256(path: str | Path) -> str:
    """Digest of a file, hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def listed(names: Sequence[str], most: int = 6) -> str:
    """The first few of some names, and how many there are more."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def refuse_non_finite(state_dict: Mapping[str, Tensor]) -> None:
    """Refuse weights with a NaN or an infinity: every embedding would be NaN.

    Raises:
        CheckpointError: With the names of such tensors.
    """
    # The extremes tell, and a mask of every weight would take memory: a NaN is both of them.
    extremes = {name: torch.stack(tensor.aminmax()) for name, tensor in state_dict.items() if tensor.numel()}
    if broken := [name for name, both in extremes.items() if not both.isfinite().all()]:
        raise CheckpointError(f"{listed(broken)}: NaN or infinite weights. The training that saved them had diverged.")


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no dict
    except SafetensorError as error:
        raise CheckpointError(f"{path} is damaged or cut off ({error}): get it again.") from error


def _read_torch(path: Path) -> Any:
    try:
        with open(path, "rb") as file:
            is_zip = file.read(4) == b"PK\x03\x04"  # torch.save since 1.6; older files cannot be mapped
        if is_zip and not zipfile.is_zipfile(path):
            raise CheckpointError(f"{path} is cut off: its table of contents, at the end, is missing. Get it again.")
        if is_zip and _is_torchscript(path):
            raise CheckpointError(
                f"{path} is a TorchScript archive, a program with its weights, and is not opened. Save the weights "
                "alone: `torch.save(model.state_dict(), FILE)`."
            )
        # MAE's trainer saves its command line beside the weights. A Namespace is attributes and nothing else.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", mmap=is_zip, weights_only=True)
    except pickle.UnpicklingError as error:
        # torch's own message advises weights_only=False, which would run the code.
        if found := re.search(r"GLOBAL ([\w.]+)|unrecognized function (\S+)", str(error)):
            raise CheckpointError(
                f"{path} is a pickle that asks for {found[1] or found[2]}, which is no tensor or plain value, so it is "
                "not opened: a pickle may run code. Get the weights as .safetensors, or as a .pth that holds tensors "
                "and plain values only."
            ) from error
        raise CheckpointError(f"{path} is damaged, or a pickle of more than tensors and plain values.") from error
    except CheckpointError:
        raise
    # A damaged file may fail anywhere in the reader.
    except (RuntimeError, EOFError, OSError, LookupError, AttributeError, TypeError, ValueError) as error:
        reason = (str(error) or repr(error)).splitlines()[0]
        raise CheckpointError(f"{path} is damaged, cut off, or no file of weights ({reason}).") from error


def _is_torchscript(path: Path) -> bool:
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def _find_state_dict(content: Any, path: Path) -> dict[str, Tensor]:
    """The state dict itself, or in an entry of the dict the trainer saved."""
    candidates = [content]
    if isinstance(content, Mapping):
        candidates += [content[entry] for entry in STATE_DICT_ENTRIES if entry in content]
    for candidate in candidates:
        if isinstance(candidate, Mapping) and all(
            isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in candidate.items()
        ):
            return dict(candidate)
    if isinstance(content, Mapping):
        found = f"a dict with the entries {listed([str(name) for name in content])}"
    else:
        found = f"a {type(content).__name__}"
    raise CheckpointError(
        f"{path} holds {found}; expected named tensors, by themselves or in the entry "
        f"{' or '.join(STATE_DICT_ENTRIES)}."
    )
