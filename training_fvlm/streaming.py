"""A processed split that is read where it lies, on the Hub or at any address fsspec knows, a row at a time.

The builders write one row per Parquet row group. So a row is one range of bytes, which one request fetches, and the
split can be addressed by row number as a local one is: order, crops and a resumed run are the same to the digit.

(1) The footers of the split's shards and all columns but the volumes are read once, some kilobytes per row, and kept in
    the cache folder of the Hub's library; (2) a row's volume and mask are fetched when its turn comes, by whichever
    worker of the data loader needs them; (3) what fails is tried again for some minutes before the run is stopped.
"""

import contextlib
import fnmatch
import hashlib
import io
import json
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

import datasets
import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets.table import InMemoryTable
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, OfflineModeIsEnabled
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_backoff
from transformers.utils import logging

from modeling_fvlm.processed_split import row_of_table

from .arguments import SettingsError
from .data import COLUMNS, SPOKEN, SplitRows

logger = logging.get_logger(__name__)
Result = TypeVar("Result")

BLOBS = ("volume", "mask")  # side by side in a row group
THREADS = 16  # requests at a time while the index is read
TAIL_BYTES = 1 << 16  # read first of a shard: most footers fit
GAP_BYTES = 1 << 15  # ranges that are nearer are fetched as one
RETRY_SECONDS = (1, 2, 4, 8, 16, 32, 60, 60, 60)
HUB_ADDRESS = re.compile(r"hf://datasets/(?P<repo>[^/@]+/[^/@]+)(?:@(?P<commit>[^/]+))?(?P<rest>(?:/.*)?)")
# Errors that the next attempt would meet as well.
LASTING = (
    FileNotFoundError,
    PermissionError,
    IsADirectoryError,
    NotImplementedError,
    OfflineModeIsEnabled,
    ImportError,
    TypeError,
    ValueError,
)
LASTING_STATUS = (400, 401, 403, 404, 410, 416)


class StreamedSplit(SplitRows):
    """Rows of a split that lies elsewhere.

    Args:
        index: What is known of it here.
        caption_rows: Row whose captions each row gets; None: its own.
    """

    def __init__(self, index: "SplitIndex", caption_rows: np.ndarray | None = None):
        self.index = index
        self.caption_rows = caption_rows
        self._open()

    def _open(self) -> None:
        self.light = self.index.rows()
        spoken = [name for name in SPOKEN if name in self.light.column_names]
        self.captions = datasets.Dataset(InMemoryTable(self.light.select(spoken)))

    def __len__(self) -> int:
        return self.light.num_rows

    def column(self, name: str) -> list:
        return self.light[name].to_pylist()

    def scan_id(self, row: int) -> str:
        return self.light["scan_id"][row].as_py()

    def place_of(self, row: int) -> str:
        shard, group = (self.light[name][row].as_py() for name in ("_shard", "_group"))
        return f"{self.index.root}/{self.index.shards[shard][0]}, row group {group}"

    def read(self, row: int) -> dict[str, Any]:
        light = self.light.slice(row, 1).to_pylist()[0]
        place = {name: light.pop(name) for name in ("_shard", "_group", "_start", "_stop")}
        table = self.index.blobs(*place.values())
        return {**light, **row_of_table(table)}

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("light", "captions")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._open()  # a map of a file, which every process has of its own


class SplitIndex:
    """Where each row of a remote split lies, and its columns but the volumes.

    Args:
        root: Address of the split's folder, at a fixed commit if it is on the Hub.
        shards: (file name within the root, bytes) of each shard.
        folder: The folder here that holds `rows.arrow`, `footers.bin` and `footers.json`.
    """

    def __init__(self, root: str, shards: Sequence[tuple[str, int]], folder: Path):
        self.root, self.shards, self.folder = root, list(shards), folder
        self._remote: tuple[int, Remote] | None = None

    def rows(self) -> pa.Table:
        """The light columns, and for each row its shard, row group and the bytes of its volume and mask."""
        return pa.ipc.open_file(pa.memory_map(str(self.folder / "rows.arrow"))).read_all()

    def blobs(self, shard: int, group: int, start: int, stop: int) -> pa.Table:
        """Fetch a row's volume and mask: a table of one row."""
        name, size = self.shards[shard]
        content = self.remote.fetch(name, start, stop)
        file = pq.ParquetFile(_Piece(size, {start: content}), metadata=self._footer(shard))
        return file.read_row_group(group, columns=list(BLOBS))

    @property
    def remote(self) -> "Remote":
        """The connection of this process: workers of a data loader must not share one."""
        if self._remote is None or self._remote[0] != os.getpid():
            self._remote = os.getpid(), Remote(self.root)
        return self._remote[1]

    def _footer(self, shard: int) -> pq.FileMetaData:
        offsets = json.loads((self.folder / "footers.json").read_text(encoding="utf-8"))
        with open(self.folder / "footers.bin", "rb") as file:
            file.seek(offsets[shard])
            return _parse_footer(file.read(offsets[shard + 1] - offsets[shard]))

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_remote": None}


class Remote:
    """Lists and reads the files below an address, patiently; one for each process."""

    def __init__(self, root: str):
        self.root = root
        self.place = HUB_ADDRESS.fullmatch(root)
        self.filesystem, self.path = (None, "") if self.place else fsspec.core.url_to_fs(root)

    def fetch(self, name: str, start: int, stop: int) -> bytes:
        """Bytes `start` to `stop` of a file.

        Raises:
            OSError: If they cannot be had, after some minutes if that may change.
        """
        read = self._from_hub if self.place else self._from_filesystem

        def read_whole() -> bytes:
            content = read(name, start, stop)
            if len(content) != stop - start:
                raise ConnectionError(f"{len(content)} of {stop - start} bytes came")
            return content

        return patiently(read_whole, f"bytes {start} to {stop} of {self.root}/{name}")

    def _from_hub(self, name: str, start: int, stop: int) -> bytes:
        # Not by HfFileSystem: it asks for the file's size and kind at every read.
        path = f"{self.place['rest']}/{name}".lstrip("/")
        url = f"{HfApi().endpoint}/datasets/{self.place['repo']}/resolve/{self.place['commit']}/{quote(path)}"
        headers = {**build_hf_headers(), "Range": f"bytes={start}-{stop - 1}"}
        answer = http_backoff("GET", url, max_retries=0, headers=headers, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT)
        hf_raise_for_status(answer)
        return answer.content

    def _from_filesystem(self, name: str, start: int, stop: int) -> bytes:
        return self.filesystem.cat_file(f"{self.path}/{name}", start=start, end=stop)

    def shards(self, split: str) -> list[tuple[str, int, str]]:
        """(name, bytes, version as far as it is known) of each shard of a split, in order."""
        try:
            listed = patiently(self._list_volumes, f"the listing of {self.root}/volumes")
        except (FileNotFoundError, EntryNotFoundError):
            return []
        return [entry for entry in sorted(listed) if fnmatch.fnmatch(entry[0], f"volumes/{split}-*.parquet")]

    def _list_volumes(self) -> list[tuple[str, int, str]]:
        if self.place:
            where = {"repo_type": "dataset", "revision": self.place["commit"]}
            folder = f"{self.place['rest']}/volumes".lstrip("/")
            entries = HfApi().list_repo_tree(self.place["repo"], folder, **where)
            return [(f"volumes/{Path(entry.path).name}", entry.size, "") for entry in entries if hasattr(entry, "size")]
        entries = self.filesystem.ls(f"{self.path}/volumes", detail=True)
        return [
            (f"volumes/{entry['name'].rsplit('/', 1)[-1]}", entry["size"], _version(entry))
            for entry in entries
            if entry["type"] == "file"
        ]


def open_streamed_split(
    data: str, split: str, *, revision: str | None = None, max_rows: int | None = None, cache: str | Path | None = None
) -> StreamedSplit:
    """Open a split where it lies. Its index is read once and kept; every row is fetched when it is asked for.

    Args:
        data: Hub id, folder, or any address that fsspec reads.
        split: Its name.
        revision: Branch, tag or commit on the Hub.
        max_rows: Use the first so many rows.
        cache: Folder for the index; None: beside the Hub library's other caches.

    Raises:
        SettingsError: If there is no such split, or it cannot be read row by row.
    """
    root = address_of(data, revision)
    remote = Remote(root)
    listed = remote.shards(split)
    if not listed:
        raise SettingsError(f"{data} has no split '{split}' (no volumes/{split}-*.parquet).")
    key = hashlib.sha256(json.dumps([root, listed, max_rows]).encode()).hexdigest()[:16]
    folder = Path(cache or Path(constants.HF_HOME) / "fvlm_streaming") / key
    shards = [(name, size) for name, size, _ in listed]
    if not (folder / "rows.arrow").is_file():
        logger.warning("reading the index of %s, split %s: %d shards, once.", root, split, len(shards))
        _write_index(remote, shards, folder, max_rows, f"{data}, split {split}")
    return StreamedSplit(SplitIndex(root, shards, folder))


def address_of(data: str, revision: str | None) -> str:
    """The address of a split's folder; on the Hub at the commit that the revision is now."""
    if Path(data).is_dir():
        return str(Path(data).resolve())
    address = data.rstrip("/") if "://" in data else f"hf://datasets/{data}"
    place = HUB_ADDRESS.fullmatch(address)
    if place is None:
        return address
    revision = place["commit"] or revision
    try:
        commit = patiently(lambda: HfApi().dataset_info(place["repo"], revision=revision).sha, address)
    except (HfHubHTTPError, OfflineModeIsEnabled) as error:
        raise SettingsError(f"--data {data} cannot be read from the Hub: {error}") from error
    return f"hf://datasets/{place['repo']}@{commit}{place['rest']}"


def commit_of(data: str, revision: str | None = None) -> str | None:
    """The newest commit of a data set on the Hub, or of its branch or tag; None where the Hub does not say."""
    try:
        return HfApi().dataset_info(data, revision=revision).sha
    except (OSError, ValueError):  # offline, or no data set of that name: whoever reads it will say so
        return None


def patiently(read: Callable[[], Result], what: str) -> Result:
    """Read from afar; what fails and may not fail again is tried again, after longer and longer pauses."""
    for attempt in range(len(RETRY_SECONDS) + 1):
        try:
            return read()
        except LASTING:
            raise
        except Exception as error:  # every file system has errors of its own
            status = getattr(getattr(error, "response", None), "status_code", getattr(error, "status", None))
            if status in LASTING_STATUS:
                raise
            if attempt == len(RETRY_SECONDS):
                raise ConnectionError(
                    f"{what} could not be read, {attempt + 1} times in {sum(RETRY_SECONDS)} seconds: {error}"
                ) from error
            pause = RETRY_SECONDS[attempt]
            logger.warning("%s: %s; again in %d s.", what, error, pause)
            time.sleep(pause)
    raise AssertionError("the last attempt returns or raises")


def _version(entry: dict) -> str:
    """What tells one version of a file from another, as far as its file system says."""
    names = ("ETag", "etag", "md5Hash", "content_md5", "mtime", "LastModified", "last_modified", "updated", "created")
    return " ".join(str(entry[name]) for name in names if entry.get(name) is not None)


def _write_index(
    remote: Remote, shards: Sequence[tuple[str, int]], folder: Path, max_rows: int | None, where: str
) -> None:
    """(1) Read footers and light columns of all shards into a folder that appears when it is complete."""
    unfinished = folder.with_name(f"{folder.name}.{uuid.uuid4().hex[:8]}.part")
    unfinished.mkdir(parents=True)
    try:
        with ThreadPoolExecutor(THREADS) as pool:
            read = pool.map(lambda shard: _read_light(remote, *shard, where), shards)
            try:
                num_rows = _write_shards(read, unfinished, max_rows)
            finally:
                pool.shutdown(cancel_futures=True)
        if num_rows == 0:
            raise SettingsError(f"{where}: there are no rows.")
        with contextlib.suppress(OSError):  # another process has written the same
            os.rename(unfinished, folder)
        if not (folder / "rows.arrow").is_file():
            raise OSError(f"{folder} could not be written.")
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _write_shards(read: Iterator[tuple[bytes, pa.Table]], folder: Path, max_rows: int | None) -> int:
    """Write what was read of each shard; returns the number of rows."""
    offsets, num_rows = [0], 0
    with contextlib.ExitStack() as stack:
        footers, writer = stack.enter_context(open(folder / "footers.bin", "wb")), None
        for number, (footer, light) in enumerate(read):
            light = light.append_column("_shard", pa.array([number] * light.num_rows, pa.int32()))
            light = light.slice(0, light.num_rows if max_rows is None else max_rows - num_rows)
            writer = writer or stack.enter_context(pa.ipc.new_file(folder / "rows.arrow", light.schema))
            writer.write_table(light)
            footers.write(footer)
            offsets.append(offsets[-1] + len(footer))
            num_rows += light.num_rows
            if num_rows == max_rows:
                break
    (folder / "footers.json").write_text(json.dumps(offsets), encoding="utf-8")
    return num_rows


def _read_light(remote: Remote, name: str, size: int, where: str) -> tuple[bytes, pa.Table]:
    """A shard's footer, and its rows without the volumes but with the places where these lie."""
    footer = _read_footer(remote, name, size)
    metadata = _parse_footer(footer)
    schema = metadata.schema.to_arrow_schema()
    if missing := [column for column in COLUMNS if column not in schema.names]:
        raise SettingsError(f"{where}: columns {missing} are missing in {name}; it has {schema.names}.")
    light_columns = [column for column in schema.names if column not in BLOBS]
    ranges, starts, stops = [], [], []
    for group in range(metadata.num_row_groups):
        row_group = metadata.row_group(group)
        if row_group.num_rows != 1:
            raise SettingsError(
                f"{where}: row group {group} of {name} holds {row_group.num_rows} rows; a streamed row would fetch "
                "them all. Use a split as `python -m data_builders` writes it, or leave --streaming out."
            )
        chunks = [row_group.column(place) for place in range(row_group.num_columns)]
        spans = [(chunk.path_in_schema.split(".")[0], *_span(chunk)) for chunk in chunks]
        blobs = [(start, stop) for column, start, stop in spans if column in BLOBS]
        starts.append(min(start for start, _ in blobs))
        stops.append(max(stop for _, stop in blobs))
        ranges += [(start, stop) for column, start, stop in spans if column not in BLOBS]
    pieces = {start: remote.fetch(name, start, stop) for start, stop in _merged(ranges)}
    file = pq.ParquetFile(_Piece(size, pieces), metadata=metadata)
    light = file.read_row_groups(list(range(metadata.num_row_groups)), columns=light_columns)
    numbers = {"_group": (range(metadata.num_row_groups), pa.int32()), "_start": (starts, pa.int64())}
    for column, (values, kind) in {**numbers, "_stop": (stops, pa.int64())}.items():
        light = light.append_column(column, pa.array(list(values), kind))
    return footer, light


def _read_footer(remote: Remote, name: str, size: int) -> bytes:
    """The footer of a Parquet file, with the length and the mark that end it."""
    tail = remote.fetch(name, max(size - TAIL_BYTES, 0), size)
    if tail[-4:] != b"PAR1":
        raise SettingsError(f"{remote.root}/{name} is no Parquet file, or only the beginning of one.")
    length = int.from_bytes(tail[-8:-4], "little") + 8
    if length > len(tail):
        tail = remote.fetch(name, size - length, size - len(tail)) + tail
    return tail[-length:]


def _parse_footer(footer: bytes) -> pq.FileMetaData:
    return pq.read_metadata(pa.BufferReader(b"PAR1" + footer))


def _span(chunk: pq.ColumnChunkMetaData) -> tuple[int, int]:
    """First and last byte of a column in a row group."""
    start = chunk.data_page_offset
    if chunk.has_dictionary_page and chunk.dictionary_page_offset:
        start = min(start, chunk.dictionary_page_offset)
    return start, start + chunk.total_compressed_size


def _merged(ranges: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Ranges in order, those that lie near each other as one."""
    current: tuple[int, int] | None = None
    for start, stop in sorted(ranges):
        if current is not None and start - current[1] <= GAP_BYTES:
            current = current[0], max(current[1], stop)
            continue
        if current is not None:
            yield current
        current = start, stop
    if current is not None:
        yield current


class _Piece(io.RawIOBase):
    """A file of which only some pieces are here.

    Args:
        size: Of the whole.
        pieces: First byte -> content.
    """

    def __init__(self, size: int, pieces: dict[int, bytes]):
        self.size, self.position = size, 0
        self.pieces = [(start, memoryview(content)) for start, content in sorted(pieces.items())]

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.position, io.SEEK_END: self.size}[whence]
        return self.position

    def read(self, length: int = -1) -> bytes:
        start = self.position
        stop = self.size if length < 0 else min(start + length, self.size)
        for first, content in self.pieces:
            if first <= start and stop <= first + len(content):
                self.position = stop
                return bytes(content[start - first : stop - first])
        raise OSError(f"bytes {start} to {stop} were not fetched")
