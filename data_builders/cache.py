"""Unpack a processed split into memory-mapped Arrow files: more disk, and reading costs no more than a copy.

    python -m data_builders cache --data out/split --out /fast/disk/split

The new folder takes the place of the split (`train_fvlm.py --data`, `eval_fvlm.py --data`); it holds
    {train,validation}/data-*.arrow    the rows of config `volumes`; volumes as plain int16, masks as plain uint8
    dataset_dict.json, state.json, ... what `datasets.load_from_disk` wants
    manifest.json                      of the split, unchanged
It takes 3 bytes a voxel, two to three times the split. A run that was killed is continued by the same command. When the
split is built again the cache is refused: delete it and make it anew.
"""

import argparse
import hashlib
import json
import math
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from rich.progress import Progress

from modeling_fvlm.processed_split import CACHE_FILE, decode_volume

from .progress import is_disk_full, stopping_cleanly
from .shards import PROGRESS_FOLDER, SCHEMA, replace_durably, sha256_of, write_json, write_text
from .summary import console

BYTES_PER_VOXEL = 3  # int16 and uint8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", type=Path, required=True, help="Folder of a processed split with config `volumes`.")
    parser.add_argument("--out", type=Path, required=True, help="Folder to write, best on a local disk.")


def run(args: argparse.Namespace) -> int:
    manifest = read_manifest(args.data)
    with stopping_cleanly(args.out):
        begin(args.out, content_of(manifest))
        shards = {
            split: [entry for entry in manifest["shards"] if entry["split"] == split and entry["sha256"]]
            for split, content in manifest["splits"].items()
            if content["rows"]
        }
        jobs = [
            (entry, args.out / split / data_file(index, len(entries)))
            for split, entries in shards.items()
            for index, entry in enumerate(entries)
        ]
        waiting = [(entry, target) for entry, target in jobs if not target.is_file()]
        check_space(args.out, args.data, [entry for entry, _ in waiting])
        if len(waiting) < len(jobs):
            then = "making the rest" if waiting else "nothing is left to make"
            console.print(f"{len(jobs) - len(waiting)} of {len(jobs)} files are there; {then}.")
        with Progress(console=console, transient=True) as progress:
            for entry, target in progress.track(waiting, description="unpacking shards"):
                check_content(args.data, entry)
                unpack_shard(args.data / entry["file"], target)
        finish(args.out, manifest, {split: len(entries) for split, entries in shards.items()})
    console.print(f"written to {args.out}; give it as --data in place of {args.data}", soft_wrap=True)
    return 0


def read_manifest(folder: Path) -> dict:
    """The manifest of a processed split that has volumes.

    Raises:
        ValueError: If there is none.
    """
    path = folder / "manifest.json"
    if not path.is_file():
        raise ValueError(
            f"--data {folder}: there is no manifest.json; the build was not completed, or this is no split."
        )
    if (folder / CACHE_FILE).is_file():
        raise ValueError(f"--data {folder} is a cache; name the processed split that it was made of.")
    manifest = json.loads(path.read_text(encoding="utf-8"))
    if "volumes" not in manifest["settings"].get("configs", ["volumes"]):
        raise ValueError(f"--data {folder} has no config `volumes`; build it with --configs volumes.")
    return manifest


def content_of(manifest: dict) -> str:
    """A hash that changes with anything the manifest tells, the bytes of the shards among it."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def begin(folder: Path, content: str) -> None:
    """Make the folder ready for a new cache, or for what is missing of one that was begun of the same split.

    Raises:
        ValueError: If something else lies in the folder, or the cache of another state of the split.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--out {folder} is a file; name a folder.")
    paths = (folder / CACHE_FILE, folder / PROGRESS_FOLDER / CACHE_FILE)
    before = next((json.loads(path.read_text(encoding="utf-8")) for path in paths if path.is_file()), None)
    if before is None:
        if folder.is_dir() and any(entry.name != PROGRESS_FOLDER for entry in folder.iterdir()):
            raise ValueError(f"--out {folder} is not empty and holds no cache; name a new folder.")
    elif before["content"] != content:
        raise ValueError(
            f"--out {folder} is the cache of another split, or of an earlier state of this one. Delete that folder to "
            "make it anew, or name another."
        )
    write_json(paths[1], {"content": content})
    for unfinished in (*folder.glob("*.tmp"), *folder.glob("*/*.tmp")):
        unfinished.unlink(missing_ok=True)


def data_file(index: int, count: int) -> str:
    """The name that `datasets` gives to the files of a saved data set."""
    return f"data-{index:05d}-of-{count:05d}.arrow"


def check_content(folder: Path, entry: dict) -> None:
    """Raise a ValueError where a shard is not what the manifest tells: its rows would be damaged, or of another build.

    Its bytes are read for the rows anyway, and lie in memory then.
    """
    if sha256_of(folder / entry["file"]) != entry["sha256"]:
        raise is_damaged(folder, entry, "its sha256 is not the manifest's")


def is_damaged(folder: Path, entry: dict, why: str) -> ValueError:
    """The error that names a shard which cannot be unpacked."""
    return ValueError(
        f"{entry['file']} in {folder}: {why}. Delete it and run the builder again, it writes it anew; then run this "
        "again."
    )


def check_space(folder: Path, data: Path, entries: Sequence[dict]) -> None:
    """Raise a ValueError where the disk cannot take what is to come: better now than after an hour."""
    wanted = 0
    for entry in entries:
        try:
            shapes = pq.read_table(data / entry["file"], columns=["shape"]).to_pylist()
        except (FileNotFoundError, pa.ArrowException) as error:
            raise is_damaged(data, entry, f"missing or damaged ({type(error).__name__})") from error
        wanted += sum(BYTES_PER_VOXEL * math.prod(row["shape"]) for row in shapes)
    free = shutil.disk_usage(folder).free
    if wanted > free:
        raise ValueError(
            f"--out {folder} needs {wanted / 1e9:.1f} GB more and its disk has {free / 1e9:.1f} GB free; name another."
        )


def unpack_shard(source: Path, target: Path) -> None:
    """Write one Parquet shard as an Arrow stream, a row at a time; the file appears when it is complete."""
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_name(target.name + ".tmp")
    try:
        with pa.OSFile(str(unfinished), "wb") as file, pa.ipc.new_stream(file, SCHEMA) as stream:
            for row in unpacked_rows(source):
                stream.write_batch(pa.RecordBatch.from_pylist([row], schema=SCHEMA))
    except (OSError, pa.ArrowException) as error:
        if is_disk_full(error):
            unfinished.unlink(missing_ok=True)
        raise
    replace_durably(unfinished, target)


def unpacked_rows(source: Path) -> Iterator[dict]:
    """The rows of a shard with plain volumes and masks, one in memory at a time."""
    with pq.ParquetFile(source) as file:
        for index in range(file.num_row_groups):
            for row in file.read_row_group(index).to_pylist():
                volume, mask = decode_volume(row)
                yield {**row, "volume": volume.tobytes(), "mask": mask.tobytes()}


def finish(folder: Path, manifest: dict, num_files: dict[str, int]) -> None:
    """Write what `datasets` wants beside the files and, last, the marks that the cache is complete."""
    content = content_of(manifest)
    for split, count in num_files.items():
        info = {"features": json_features(), "splits": None}
        state = {
            "_data_files": [{"filename": data_file(index, count)} for index in range(count)],
            "_fingerprint": content[:16],
            "_format_columns": None,
            "_format_kwargs": {},
            "_format_type": None,
            "_output_all_columns": False,
            "_split": split,
        }
        write_json(folder / split / "dataset_info.json", info)
        write_json(folder / split / "state.json", state)
    write_json(folder / "dataset_dict.json", {"splits": list(num_files)})
    write_text(folder / "README.md", CARD)
    write_json(folder / "manifest.json", manifest)
    write_json(folder / CACHE_FILE, {"content": content})
    shutil.rmtree(folder / PROGRESS_FOLDER, ignore_errors=True)


def json_features() -> dict:
    """The columns in the form of dataset_info.json."""
    from datasets import Features

    return Features.from_arrow_schema(SCHEMA).to_dict()


CARD = """\
# Memory-mapped cache of a processed split

Made by `python -m data_builders cache` for speed in training, from the split that `manifest.json` describes; its card
says what the columns mean. `volume` is plain little-endian int16, `mask` plain uint8, both in C order of `shape`.
`datasets.load_from_disk` opens this folder without a copy. The terms of the split hold for it as well.
"""
