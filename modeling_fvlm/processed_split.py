"""Volumes and masks as they lie in a processed split: zstd blobs of plain C-order bytes beside their shape.

The same few lines stand in every split's dataset card, so that a split can be read with nothing of ours installed.
"""

import re
import threading
from collections.abc import Mapping
from pathlib import Path

import numpy as np

# Level 3 against 9: the same decoding time, 5 times faster to write, 14 % larger on a synthetic volume.
ZSTD_LEVEL = 3
VOLUME_DTYPE = np.dtype("<i2")  # int16 HU, little-endian
MASK_DTYPE = np.dtype("u1")  # uint8 labels, organ_index + 1

_local = threading.local()  # a zstd context serves one thread at a time; making one per volume costs memory and time


def encode_array(array: np.ndarray) -> bytes:
    """Compress an int16 volume or a uint8 mask; the bytes depend on nothing but the values (and zstd's version)."""
    import zstandard

    dtype = {"i2": VOLUME_DTYPE, "u1": MASK_DTYPE}.get(array.dtype.str[1:])
    if dtype is None:
        raise ValueError(f"a processed split stores int16 volumes and uint8 masks, got {array.dtype}.")
    if not hasattr(_local, "compressor"):
        _local.compressor = zstandard.ZstdCompressor(level=ZSTD_LEVEL)
    return _local.compressor.compress(np.ascontiguousarray(array, dtype=dtype))


def decode_array(blob: bytes, shape: tuple[int, int, int], dtype: np.dtype) -> np.ndarray:
    """Undo `encode_array`. The array is read-only where nothing forces a copy: crop it, or copy it, before writing."""
    import zstandard

    if not hasattr(_local, "decompressor"):
        _local.decompressor = zstandard.ZstdDecompressor()
    values = np.frombuffer(_local.decompressor.decompress(blob), dtype=dtype)
    if values.size != np.prod(shape):
        raise ValueError(f"a blob holds {values.size} values, but its shape is {tuple(shape)}; the row is damaged.")
    return values.reshape(tuple(shape))


def decode_volume(row: Mapping) -> tuple[np.ndarray, np.ndarray]:
    """Unpack a row of config `volumes`.

    Args:
        row: With `volume`, `mask` (bytes) and `shape` (depth, height, width).

    Returns:
        int16 HU and uint8 organ labels, both `(depth, height, width)` and read-only.
    """
    shape = tuple(int(size) for size in row["shape"])
    return decode_array(row["volume"], shape, VOLUME_DTYPE), decode_array(row["mask"], shape, MASK_DTYPE)


def natural_key(text: str) -> list:
    """Sort key under which train_2 comes before train_10."""
    return [(1, int(part), "") if part.isdigit() else (0, 0, part) for part in re.split(r"(\d+)", text)]


def load_rows(data: str | Path, split: str, revision: str | None = None):
    """Open the config `volumes` of a processed split as a memory-mapped `datasets.Dataset`.

    A local folder is opened by its Parquet files. By its name (`load_dataset(folder, "volumes")`) `datasets` 5.2 would
    keep one cache for all folders of that NAME, and hand out the rows of another or an earlier build in silence.

    Args:
        data: Folder that a data builder wrote, or a Hub id.
        split: "train", "validation" or what else was built.
        revision: Branch, tag or commit on the Hub.

    Raises:
        ValueError: If the folder has no such split.
    """
    from datasets import load_dataset

    folder = Path(data)
    if not folder.is_dir():
        return load_dataset(str(data), "volumes", split=split, revision=revision)
    files = sorted(str(path) for path in folder.glob(f"volumes/{split}-*.parquet"))
    if not files:
        known = sorted({path.name.rsplit("-of-", 1)[0].rsplit("-", 1)[0] for path in folder.glob("volumes/*.parquet")})
        raise ValueError(
            f"{folder} has no split '{split}' (no volumes/{split}-*.parquet); "
            + (f"it has {known}." if known else "build one with `python -m data_builders --help`.")
        )
    return load_dataset("parquet", data_files={split: files}, split=split)
