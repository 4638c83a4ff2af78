"""One training sample from disk to the crop that the network reads: processed split and its cache against two .nii.gz.

    python -m benchmarks.input
    python -m benchmarks.input --patients 4 --repeats 5 --json input.json

A sample is volume and mask of one scan at 3 x 1 x 1 mm, cut to the organs of body_24, of which the middle
112 x 256 x 352 voxels are taken. The baseline reads them as the published loader does: a .nii.gz of the windowed
float32 volume and one of the uint8 mask (nibabel, its own level of compression). The published volumes were never
rounded to HU, so a random fraction of a HU is added to those written here. Ours reads rows as the trainer does, through
`datasets`:

    input/parquet_float32    Parquet, zstd -> float32, windowed
    input/parquet_int16      Parquet, zstd -> int16: what the trainer hands on; the model makes floats of it
    input/cache_int16        the memory-mapped cache (`python -m data_builders cache`) -> int16

Masks are equal, and so are the volumes to half a HU, 1/3000 of the window; those of the integer ways are windowed for
that comparison alone. Times are per sample, over procedural chest and whole-body scans in turns, files in the
page cache. The bound is a copy of the int16 crop and its mask, memory to memory.
"""

import argparse
import contextlib
import io
import tempfile
from pathlib import Path

import nibabel
import numpy as np
import torch

from benchmarks.inputs import VOLUME_SIZE
from benchmarks.measure import Result, add_arguments, console, in_turns, parse_arguments, report
from data_builders.__main__ import main as build
from modeling_fvlm.configuration_fvlm import DEFAULT_WINDOW
from modeling_fvlm.geometry import AIR_HU, crop_or_pad, crop_start, window_volume
from modeling_fvlm.processed_split import Scratch, decode_volume, load_rows, row_of_table

SPLIT = "train"
SPACING, MARGIN = (3, 1, 1), (5, 20, 20)  # mm; voxels around the organs: the model's own
WORKERS = 2  # to make the data


def run_builder(*words: object) -> None:
    """A command of data_builders, quietly."""
    with contextlib.redirect_stdout(io.StringIO()):
        status = build([str(word) for word in words])
    if status:
        raise RuntimeError(f"python -m data_builders {' '.join(map(str, words))} ended with status {status}.")


def make_split(folder: Path, patients: int) -> tuple[Path, Path]:
    """A processed split of procedural patients at 3 x 1 x 1 mm, and its cache."""
    release, split, cache = (folder / name for name in ("release", "split", "cache"))
    people = ("--patients", patients, "--validation", 1, "--seed", 0)
    run_builder("synthetic", "--out", release, *people, "--spacing", *SPACING, "--workers", WORKERS)
    common = ("--spacing", *SPACING, "--margin", *MARGIN, "--previews", 0, "--workers", WORKERS)
    run_builder("ct_rate", "--source", release, "--out", split, "--splits", SPLIT, *common)
    run_builder("cache", "--data", split, "--out", cache)
    return split, cache


def windowed(volume: np.ndarray) -> np.ndarray:
    """HU -> float32 in [0, 1], as the model does it."""
    return window_volume(volume, [DEFAULT_WINDOW])[0]


def write_nifti(dataset, folder: Path) -> list[tuple[Path, Path]]:
    """The rows as the published preparation leaves them: windowed float32 volume and uint8 mask, .nii.gz."""
    folder.mkdir()
    files, generator = [], np.random.default_rng(0)
    for number, row in enumerate(dataset):
        pair = folder / f"volume_{number}.nii.gz", folder / f"mask_{number}.nii.gz"
        volume, mask = decode_volume(row)
        volume = volume + generator.uniform(-0.5, 0.5, volume.shape).astype(np.float32)
        for array, path in zip((windowed(volume), mask), pair):
            nibabel.save(nibabel.Nifti1Image(array.T, np.diag([-1.0, -1.0, 3.0, 1.0])), path)
        files.append(pair)
    return files


def cropped(volume: np.ndarray, mask: np.ndarray, outside: float) -> tuple[np.ndarray, np.ndarray]:
    """The middle of both, at the network's size."""
    start = crop_start(volume.shape, VOLUME_SIZE)
    return crop_or_pad(volume, start, VOLUME_SIZE, outside), crop_or_pad(mask, start, VOLUME_SIZE, 0)


def read_files(volume: Path, mask: Path) -> tuple[np.ndarray, np.ndarray]:
    """A sample of the baseline."""
    air = float(windowed(np.full((1, 1, 1), AIR_HU, np.int16))[0, 0, 0])
    return cropped(*(np.asarray(nibabel.load(path).dataobj).T for path in (volume, mask)), air)


def read_row(table, as_float: bool, scratch: Scratch) -> tuple[np.ndarray, np.ndarray]:
    """A sample of ours, as the trainer's split and collator read it."""
    volume, mask = cropped(*decode_volume(row_of_table(table), scratch), AIR_HU)
    return windowed(volume) if as_float else volume, mask


def compare(folder: Path, patients: int, repeats: int) -> list[Result]:
    """Make the data, check that all ways give the same, and time them."""
    split, cache = make_split(folder, patients)
    rows, mapped = load_rows(split, SPLIT), load_rows(cache, SPLIT)
    files = write_nifti(rows, folder / "nifti")
    tables, mapped = rows.with_format("arrow"), mapped.with_format("arrow")
    scratch = Scratch()
    readers = {
        "parquet_float32": lambda number: read_row(tables[number], True, scratch),
        "parquet_int16": lambda number: read_row(tables[number], False, scratch),
        "cache_int16": lambda number: read_row(mapped[number], False, scratch),
    }
    difference = dict.fromkeys(readers, 0.0)
    samples = []
    for number, pair in enumerate(files):
        volume, mask = read_files(*pair)
        for name, read in readers.items():
            ours, our_mask = read(number)
            if not np.array_equal(our_mask, mask):
                raise RuntimeError(f"{name}: the masks of sample {number} are not equal.")
            as_float = ours if ours.dtype == np.float32 else windowed(ours)
            difference[name] = max(difference[name], float(np.abs(as_float - volume).max() / np.abs(volume).max()))
        samples.append((ours, our_mask))

    ways = {"baseline": lambda: [read_files(*pair) for pair in files]}
    ways |= {name: lambda read=read: [read(number) for number in range(len(files))] for name, read in readers.items()}
    ways["copy"] = lambda: [(volume.copy(), mask.copy()) for volume, mask in samples]
    times = {name: each * (1 / len(files)) for name, each in in_turns(ways, repeats).items()}
    bytes_on_disk = {
        "baseline": sum(path.stat().st_size for pair in files for path in pair),
        "parquet": sum(path.stat().st_size for path in split.rglob("*.parquet")),
        "cache": sum(path.stat().st_size for path in cache.rglob("*.arrow")),
    }
    results = []
    for name in readers:
        size = bytes_on_disk[name.split("_")[0]]
        note = (
            f"{len(files)} scans; on disk {size / len(files) / 1e6:.0f} MB a scan, the two .nii.gz "
            f"{bytes_on_disk['baseline'] / len(files) / 1e6:.0f} MB"
        )
        results.append(
            Result(f"input/{name}", times["baseline"], times[name], difference[name], note, times["copy"].cpu)
        )
    return results


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--patients", type=int, default=4, help="Scans of the split (default: %(default)s).")
    add_arguments(parser, repeats=5)
    options = parse_arguments(parser, arguments)
    torch.set_num_threads(options.threads or 1)  # a worker of a data loader has one core
    with tempfile.TemporaryDirectory() as folder:
        console.print(f"building a split of {options.patients} procedural patients at 3 x 1 x 1 mm")
        results = compare(Path(folder), options.patients, options.repeats)
    report(results, options.json)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
