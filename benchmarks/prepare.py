"""A CT and its mask from two .nii.gz files to what a trainer reads: one pass against the published four steps.

    python -m benchmarks.prepare
    python -m benchmarks.prepare --organs 24 --json prepare.json

`prepare/N`: a scan of 512 x 512 x 300 voxels with a TotalSegmentator mask, resampled to 3 x 1 x 1 mm and cut to the
organs of chest_4 or body_24. The baseline goes the published way, each step from files to files, written here with
nibabel and PyTorch: (1) values rescaled to HU, (2) labels merged organ by organ, (3) whole volume and mask resampled,
(4) both cut to the box of the organs; every result a .nii.gz at nibabel's own level of compression. It resamples on our
grid, or the two could not be compared; the window, which the published step (4) applies, is left to the model in both.
Ours is a worker of `python -m data_builders`: two files in, one row of a Parquet shard out.

Masks are compared bit for bit; `max_rel_diff` is the largest difference in HU over the largest |HU|, to the baseline in
float64 (ours is rounded to int16). The bound is zlib's inflation of the two files, nothing else; where `isal` is
installed ours inflates with that, and can go below. Peak memory is the largest resident size of a fresh process (VmHWM,
Linux), all imports included; what these alone take stands beside it. The baseline's prepares the scan once, ours is a
worker that does it three times; the process that writes the shards holds one more scan. The same scan stored in another
order of axes, which cannot be read slice by slice, is measured as well.
"""

import argparse
import gzip
import tempfile
from pathlib import Path

import nibabel
import numpy as np
import pyarrow.parquet as pq
import torch
from torch.nn import functional as F

from benchmarks.measure import Result, add_arguments, console, in_turns, parse_arguments, report
from benchmarks.memory import in_fresh_process, memory_gb
from benchmarks.worker import memory_of_a_worker
from data_builders.build import Settings, settings_from_args
from data_builders.cases import Case
from data_builders.ct_rate import add_arguments as add_builder_arguments
from data_builders.phantom import draw_patient, render
from data_builders.run_cases import prepare_case
from data_builders.shards import BuiltRow, Shard, write_shard
from modeling_fvlm.organs import NUMBERINGS, load_organ_set
from modeling_fvlm.processed_split import decode_volume

SHAPE = (300, 512, 512)  # depth, height, width
PIXEL_MM = 0.85
SPACING, MARGIN = (3.0, 1.0, 1.0), (5, 20, 20)
ORGAN_SETS = {4: "chest_4", 24: "body_24"}
CHUNK = 1 << 20  # bytes
MB = 1e6


def write_scan(folder: Path) -> tuple[Path, Path]:
    """A procedural chest CT of `SHAPE` with its TotalSegmentator mask, stored in LPS as CT-RATE's are."""
    patient = draw_patient((0, 0, 0), "chest")
    depth_mm = (patient.range_mm[1] - patient.range_mm[0]) / SHAPE[0]
    volume, mask = render(patient, (depth_mm, PIXEL_MM, PIXEL_MM))
    affine = np.diag([-PIXEL_MM, -PIXEL_MM, depth_mm, 1.0])
    paths = folder / "scan.nii.gz", folder / "segmentation.nii.gz"
    for array, outside, path in ((volume, -1000, paths[0]), (mask, 0, paths[1])):
        nibabel.save(nibabel.Nifti1Image(np.asfortranarray(fit(array, outside).T), affine), path)
    return paths


def turned(path: Path) -> Path:
    """The same scan, stored with the depth axis first in the file; weakly compressed, for memory alone."""
    image = nibabel.load(path)
    other = path.with_name(f"turned_{path.name}")
    affine = image.affine[:, [2, 1, 0, 3]]
    turned_image = nibabel.Nifti1Image(np.asfortranarray(np.asarray(image.dataobj).T), affine)
    with gzip.open(other, "wb", compresslevel=1) as file:
        turned_image.to_stream(file)
    return other


def fit(array: np.ndarray, outside: int) -> np.ndarray:
    """Cut or pad in the middle to `SHAPE`."""
    for axis, size in enumerate(SHAPE):
        missing = size - array.shape[axis]
        if missing > 0:
            widths = [(0, 0)] * 3
            widths[axis] = (missing // 2, missing - missing // 2)
            array = np.pad(array, widths, constant_values=outside)
        else:
            array = array.take(range(-missing // 2, -missing // 2 + size), axis)
    return array


# (1) to (4): the published way


def save(array: np.ndarray, affine: np.ndarray, path: Path) -> None:
    nibabel.save(nibabel.Nifti1Image(array, affine), path)


def fix(source: Path, target: Path) -> None:
    """(1) Stored values -> HU."""
    image = nibabel.load(source)
    slope, intercept = np.int16(1), np.int16(0)
    save(np.asarray(image.dataobj) * slope + intercept, image.affine, target)


def merge(source: Path, organ_set: str, target: Path) -> None:
    """(2) The segmentation's labels -> organ labels, one structure after the other."""
    image = nibabel.load(source)
    labels = np.asarray(image.dataobj)
    names = NUMBERINGS["totalsegmentator_v2"]
    organs = load_organ_set(organ_set)
    merged = np.zeros(labels.shape, np.uint8)
    for organ_id, organ in enumerate(organs.organs, start=1):
        for name in organs.classes[organ]["totalsegmentator_v2"]:
            merged[labels == names.index(name) + 1] = organ_id
    save(merged, image.affine, target)


def resize(source: Path, mode: str, target: Path, dtype: type = np.float32) -> None:
    """(3) The whole array on the model's spacing."""
    image = nibabel.load(source)
    array = torch.from_numpy(np.asarray(image.dataobj, dtype=dtype))
    old = np.abs(np.diag(image.affine)[:3])
    size = [int(np.floor(edge * step / new + 1e-3)) for edge, step, new in zip(array.shape, old, SPACING[::-1])]
    array = F.interpolate(array[None, None], size=size, mode=mode)[0, 0].numpy()
    affine = np.diag([-SPACING[2], -SPACING[1], SPACING[0], 1.0])
    save(array.astype(np.uint8) if mode != "trilinear" else array, affine, target)


def cut(volume: Path, mask: Path, targets: tuple[Path, Path]) -> None:
    """(4) Both cut to the box of all organs and its margin."""
    labels = np.asarray(nibabel.load(mask).dataobj)
    occupied = np.where(labels > 0)
    box = tuple(
        slice(max(0, int(places.min()) - margin), min(size, int(places.max()) + 1 + margin))
        for places, size, margin in zip(occupied, labels.shape, MARGIN[::-1])
    )
    for source, target in zip((volume, mask), targets):
        image = nibabel.load(source)
        save(np.asarray(image.dataobj)[box], image.affine, target)


def published_steps(
    volume: Path, mask: Path, organ_set: str, folder: Path, dtype: type = np.float32
) -> tuple[Path, Path]:
    """All four, file by file; the last two files. The volume is resampled in `dtype`."""
    names = ("fixed", "merged", "resized", "resized_mask", "processed", "processed_mask")
    files = {name: folder / f"{name}.nii.gz" for name in names}
    fix(volume, files["fixed"])
    merge(mask, organ_set, files["merged"])
    resize(files["fixed"], "trilinear", files["resized"], dtype)
    # nearest-exact, not the published nearest: the voxel whose cell holds the centre, as in ours
    resize(files["merged"], "nearest-exact", files["resized_mask"])
    cut(files["resized"], files["resized_mask"], (files["processed"], files["processed_mask"]))
    return files["processed"], files["processed_mask"]


# Ours


def our_settings(organ_set: str, folder: Path) -> Settings:
    """Settings of the builder as its command line makes them."""
    parser = argparse.ArgumentParser()
    add_builder_arguments(parser)
    arguments = ["--source", folder, "--out", folder / "split", "--organs", organ_set]
    arguments += ["--spacing", *SPACING, "--margin", *MARGIN]
    return settings_from_args(parser.parse_args([str(word) for word in arguments]), "ct_rate")


def as_case(volume: Path, mask: Path) -> Case:
    return Case("train", "p", "p_a", "p_a_1", volume, mask, findings="The lungs are clear.")


def one_pass(volume: Path, mask: Path, settings: Settings, folder: Path) -> Path:
    """As a worker and the writer of a builder do it; the Parquet file."""
    case = as_case(volume, mask)
    built: BuiltRow = prepare_case(case, settings)
    if built.skip_reason:
        raise RuntimeError(built.skip_reason)
    shard = Shard("train", "volumes/train-00000-of-00001.parquet", (case,))
    (folder / "volumes").mkdir(exist_ok=True)
    write_shard(folder, shard, [built])
    return folder / shard.file


def inflate(*paths: Path) -> None:
    """Read .nii.gz files to their end with zlib and keep nothing."""
    buffer = bytearray(CHUNK)
    for path in paths:
        with gzip.open(path) as file:
            while file.readinto(buffer):
                pass


def memory_of_the_baseline(*arguments) -> tuple[float, float]:
    """Resident MB of this process before one run of the published steps, and its largest ever."""
    before = memory_gb("VmRSS")
    published_steps(*arguments)
    return before * 1000, memory_gb("VmHWM") * 1000


def compare(num_organs: int, repeats: int, volume: Path, mask: Path, folder: Path) -> Result:
    """Time and compare one organ set."""
    organ_set = ORGAN_SETS[num_organs]
    places = {name: folder / name / organ_set for name in ("baseline", "ours")}
    for place in places.values():
        place.mkdir(parents=True)
    ways = {"baseline": organ_set, "ours": our_settings(organ_set, folder)}
    jobs = {name: (volume, mask, ways[name], place) for name, place in places.items()}
    files = published_steps(*jobs["baseline"], np.float64)
    theirs, their_mask = (np.asarray(nibabel.load(path).dataobj).T for path in files)
    row = pq.read_table(one_pass(*jobs["ours"])).to_pylist()[0]
    ours, our_mask = decode_volume(row)
    if theirs.shape != ours.shape or not np.array_equal(their_mask, our_mask):
        raise RuntimeError("the two ways do not come to the same mask.")
    difference = float(np.abs(ours - theirs).max())

    times = in_turns(
        {
            "baseline": lambda: published_steps(*jobs["baseline"]),
            "ours": lambda: one_pass(*jobs["ours"]),
            "inflate": lambda: inflate(volume, mask),
        },
        repeats,
    )
    peaks = {
        "baseline": in_fresh_process(memory_of_the_baseline, *jobs["baseline"]),
        "ours": memory_of_a_worker(as_case(volume, mask), ways["ours"]),
        "turned": memory_of_a_worker(as_case(turned(volume), turned(mask)), ways["ours"]),
    }
    written = {name: sum(file.stat().st_size for file in place.rglob("*.*")) / MB for name, place in places.items()}
    inflate_s, ours_s = times["inflate"].cpu, times["ours"].cpu
    extra = {"max_hu_difference": difference, "masks_are_equal": True, "inflate_s": inflate_s}
    for name, (before, peak) in peaks.items():
        extra |= {f"{name}_peak_mb": peak, f"{name}_start_mb": before}
    extra |= {f"{name}_written_mb": size for name, size in written.items()}
    note = (
        f"masks bit-equal, HU within {difference:.2f}; peak {peaks['ours'][1]:.0f} MB (imports "
        f"{peaks['ours'][0]:.0f}; {peaks['turned'][1]:.0f} with the axes stored in another order) against "
        f"{peaks['baseline'][1]:.0f} MB, written {written['ours']:.0f} MB against "
        f"{written['baseline']:.0f} MB; zlib's inflation alone is {inflate_s:.2f} s, {inflate_s / ours_s:.0%} of ours"
    )
    scale = float(np.abs(theirs).max())
    return Result(f"prepare/{num_organs}", times["baseline"], times["ours"], difference / scale, note, inflate_s, extra)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--organs",
        type=int,
        nargs="+",
        choices=list(ORGAN_SETS),
        default=list(ORGAN_SETS),
        help="Numbers of organs (default: 4 24).",
    )
    add_arguments(parser, repeats=1)
    options = parse_arguments(parser, arguments)
    torch.set_num_threads(options.threads or 1)  # a worker of a builder has one core
    with tempfile.TemporaryDirectory() as folder:
        console.print(f"painting a scan of {' x '.join(map(str, SHAPE))} voxels")
        volume, mask = write_scan(Path(folder))
        results = [compare(number, options.repeats, volume, mask, Path(folder)) for number in options.organs]
    report(results, options.json)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
