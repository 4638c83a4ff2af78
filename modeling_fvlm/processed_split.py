"""Volumes and masks as they lie in a processed split: zstd blobs of plain C-order bytes beside their shape.

The same few lines stand in every split's dataset card, so that a split can be read with nothing of ours installed. In
its memory-mapped cache (`python -m data_builders cache`) the same bytes lie uncompressed.
"""

import math
import re
import threading
from collections.abc import Mapping
from pathlib import Path

import numpy as np

# Level 2 against 3 on a procedural chest CT with noise: half the time to write, 0.6 of the time to read, 7 % larger.
ZSTD_LEVEL = 2
ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"  # begins a zstd frame; no volume (-19160 HU) and no mask (a label of 181) does
CACHE_FILE = "cache.json"  # stands in a cache that is complete
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
        # With a checksum: most flipped bits would decode to other HU.
        _local.compressor = zstandard.ZstdCompressor(level=ZSTD_LEVEL, write_checksum=True)
    return _local.compressor.compress(np.ascontiguousarray(array, dtype=dtype))


class Scratch:
    """Memory that rows are decoded into one after the other: fresh memory costs as much as the decoding itself.

    What was decoded into it holds until the next row is. For one thread.
    """

    def __init__(self):
        self._buffers: dict[np.dtype, bytearray] = {}

    def take(self, dtype: np.dtype, num_bytes: int) -> memoryview:
        """So many bytes, not cleared."""
        if len(self._buffers.get(dtype, b"")) < num_bytes:
            self._buffers[dtype] = bytearray(num_bytes)
        return memoryview(self._buffers[dtype])[:num_bytes]


def decode_array(
    blob: bytes, shape: tuple[int, int, int], dtype: np.dtype, scratch: Scratch | None = None
) -> np.ndarray:
    """Undo `encode_array`. The array is read-only where nothing forces a copy: crop it, or copy it, before writing.

    Args:
        blob: From `encode_array`.
        shape, dtype: Of the array.
        scratch: Memory to decode into; None: the array has its own.

    Raises:
        ValueError: If the blob is damaged or holds another number of values than the shape; the size that its header
            tells of is compared before memory is taken.
    """
    import zstandard

    if not hasattr(_local, "decompressor"):
        _local.decompressor = zstandard.ZstdDecompressor()
    shape, dtype = tuple(int(size) for size in shape), np.dtype(dtype)
    num_bytes = math.prod(shape) * dtype.itemsize
    try:
        content_size = zstandard.frame_content_size(blob)  # -1 if the header does not say
        if content_size in (-1, num_bytes) and min(shape) > 0:
            if scratch is None:
                content = _local.decompressor.decompress(blob, max_output_size=num_bytes)
                content_size = len(content)
            else:
                content = scratch.take(dtype, num_bytes)
                content_size = _decompress_into(content, blob)
    except zstandard.ZstdError as error:
        raise ValueError(f"a blob of shape {shape} cannot be decompressed ({error}); the row is damaged.") from error
    if content_size != num_bytes or min(shape) <= 0:
        raise ValueError(
            f"a blob holds {content_size // dtype.itemsize} values, but its shape is {shape}; the row is damaged."
        )
    array = np.frombuffer(content, dtype=dtype).reshape(shape)
    array.flags.writeable = False
    return array


def _decompress_into(buffer: memoryview, blob: bytes) -> int:
    """Fill a buffer; returns how many bytes the blob holds, or one more than the buffer if it holds more."""
    filled = 0
    with _local.decompressor.stream_reader(blob) as reader:
        while filled < len(buffer) and (count := reader.readinto(buffer[filled:])):
            filled += count
        return filled + len(reader.read(1))


def decode_volume(row: Mapping, scratch: Scratch | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Unpack a row of config `volumes`, of a split or of its cache; the latter is not copied.

    Args:
        row: With `volume`, `mask` (bytes, or a buffer of them) and `shape` (depth, height, width).
        scratch: Memory to decode into, for those who copy a part before they decode the next row.

    Returns:
        int16 HU and uint8 organ labels, both `(depth, height, width)` and read-only.
    """
    shape = tuple(int(size) for size in row["shape"])
    return (
        _array_of(row["volume"], shape, VOLUME_DTYPE, scratch),
        _array_of(row["mask"], shape, MASK_DTYPE, scratch),
    )


def _array_of(blob, shape: tuple[int, int, int], dtype: np.dtype, scratch: Scratch | None) -> np.ndarray:
    """The array of a blob, plain or compressed. A frame may be just as long as the array, but begins with its mark."""
    content = memoryview(blob).cast("B")  # Arrow's buffers are of signed bytes, which equal no others
    is_plain = content.nbytes == math.prod(shape) * dtype.itemsize and content[:4] != ZSTD_MAGIC
    if is_plain and min(shape) > 0:
        return np.frombuffer(content, dtype=dtype).reshape(shape)
    return decode_array(content, shape, dtype, scratch)


def row_of_table(table) -> dict:
    """The row in a table of one row, its volume and mask as views of the file that the table is mapped from.

    `rows[index]` copies both into memory first. So in a loop over a cache:
        tables = load_rows(data, split).with_format("arrow")
        volume, mask = decode_volume(row_of_table(tables[index]))

    Args:
        table: `pyarrow.Table` of one row.
    """
    return {
        name: _bytes_of(table[name]) if name in ("volume", "mask") else table[name][0].as_py()
        for name in table.column_names
    }


def _bytes_of(column) -> memoryview:
    """The bytes of the only value in a column of binaries, where they lie; as a scalar Arrow would copy them."""
    (values,) = (chunk for chunk in column.chunks if len(chunk))
    _, offsets, content = values.buffers()
    width = np.int64 if str(values.type).startswith("large") else np.int32
    start, stop = np.frombuffer(offsets, dtype=width)[values.offset : values.offset + 2].tolist()
    return memoryview(content)[start:stop]


def natural_key(text: str) -> list:
    """Sort key under which train_2 comes before train_10."""
    return [(1, int(part), "") if part.isdecimal() else (0, 0, part) for part in re.split(r"(\d+)", text)]


def load_rows(data: str | Path, split: str, revision: str | None = None):
    """Open the config `volumes` of a processed split, or of its cache, as a memory-mapped `datasets.Dataset`.

    A local folder is opened by its Parquet files. By its name (`load_dataset(folder, "volumes")`) `datasets` 5.2 would
    keep one cache for all folders of that NAME, and hand out the rows of another or an earlier build in silence.

    Args:
        data: Folder that a data builder or `python -m data_builders cache` wrote, or a Hub id.
        split: "train", "validation" or what else was built.
        revision: Branch, tag or commit on the Hub.

    Raises:
        ValueError: If the folder has no such split.
    """
    from datasets import load_dataset, load_from_disk

    folder = Path(data)
    if not folder.is_dir():
        return load_dataset(str(data), "volumes", split=split, revision=revision)
    if (folder / CACHE_FILE).is_file():
        known = sorted(path.parent.name for path in folder.glob("*/state.json"))
        if split not in known:
            raise ValueError(f"{folder} has no split '{split}'; it has {known}.")
        return load_from_disk(str(folder / split), keep_in_memory=False)
    if any(folder.glob("*/data-*.arrow")):
        raise ValueError(f"{folder} is a cache that is not complete; run `python -m data_builders cache` again.")
    files = sorted(str(path) for path in folder.glob(f"volumes/{split}-*.parquet"))
    if not files:
        known = sorted({path.name.rsplit("-of-", 1)[0].rsplit("-", 1)[0] for path in folder.glob("volumes/*.parquet")})
        raise ValueError(
            f"{folder} has no split '{split}' (no volumes/{split}-*.parquet); "
            + (f"it has {known}." if known else "build one with `python -m data_builders --help`.")
        )
    return load_dataset("parquet", data_files={split: files}, split=split)
