"""Write where the findings of a synthetic release lie: a mask for each finding of a patient, beside the release.

The release itself is left as it is, byte for byte; its patients are drawn again from the same seed:
    python -m data_builders lesions --source out/release --seed 0 --splits validation

With the same scans as they would be without each finding, for comparison:
    python -m data_builders lesions --source out/release --seed 0 --splits validation --twins

What is written under dataset/lesions of the source:
    valid_fixed/valid_1/valid_1_a/valid_1_a_1/Kidney_cyst.nii.gz     1 where the finding changed what was painted
    .../Kidney_cyst_twin.nii.gz, .../Kidney_cyst_twin_mask.nii.gz    with --twins: the scan without it, and its mask
    validation_lesions.csv     a row a finding: patient_id, finding, organ, voxels, and the files, relative to the CSV

A lesion is all that its finding changes: of a cyst the cyst, of emphysema most of the lung. Noise and partial volume
are not in it. `python -m evaluation_fvlm lesion_attention` reads the CSV.
"""

from __future__ import annotations

import argparse
import csv
import io
import os
import re
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from modeling_fvlm.geometry import BadVolumeError
from modeling_fvlm.reading import read_nifti_mask

from .phantom import lesion_mask, load_findings, paint, render, without
from .shards import write_text
from .synthetic import SPACING, SPLITS, draw_job, draw_placement, draw_spacing, nifti_bytes, place_of

COLUMNS = ("patient_id", "finding", "organ", "voxels", "volume", "mask", "lesion")
TWIN_COLUMNS = ("twin_volume", "twin_mask")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("lesions")
    group.add_argument("--source", type=Path, required=True, help="The `--out` of `python -m data_builders synthetic`.")
    group.add_argument("--seed", type=int, required=True, help="The seed of that command; another one is noticed.")
    group.add_argument(
        "--spacing",
        type=float,
        nargs=3,
        metavar=("DEPTH", "HEIGHT", "WIDTH"),
        default=SPACING,
        help="The spacing of that command, in mm (default: 20 4 4).",
    )
    group.add_argument(
        "--splits", nargs="+", choices=list(SPLITS), default=["validation"], help="Splits (default: validation)."
    )
    group.add_argument("--limit", type=int, help="Only the first so many patients of a split.")
    group.add_argument("--twins", action="store_true", help="Write each scan without each of its findings as well.")
    group.add_argument("--workers", type=int, default=2, help="Processes (default: 2); no file depends on it.")


def write_lesions(
    job: tuple[str, int], root: Path, seed: int, nominal: tuple[float, float, float], twins: bool
) -> list[dict]:
    """Write the lesions of one patient; returns a row for each.

    Raises:
        ValueError: If the scan of the release is not the one that this seed draws.
    """
    patient, place = draw_job(job, seed), place_of(job)
    spacing = draw_spacing(patient, nominal)
    canvas = paint(patient, spacing)
    mask_place = Path("ts_seg", "ts_total") / place
    try:
        is_same = np.array_equal(read_nifti_mask(root / mask_place).array, canvas.mask)
    except BadVolumeError as error:
        raise ValueError(str(error)) from error
    if not is_same:
        told = " ".join(f"{edge:g}" for edge in nominal)
        raise ValueError(
            f"{root / mask_place} is not what --seed {seed} --spacing {told} draws. Give the numbers of the command "
            "that wrote the release; its README.md names them."
        )
    origin, orientation, _ = draw_placement(patient)
    organ_of = {row.finding: row.organ for row in load_findings()}
    folder = Path("lesions") / place.parent / place.name.removesuffix(".nii.gz")
    rows = []
    for finding in patient.findings:
        lesion = lesion_mask(patient, finding, spacing, canvas)
        stem = re.sub(r"[^A-Za-z0-9]+", "_", finding)
        arrays = {"lesion": (lesion.astype(np.uint8), f"{stem}.nii.gz")}
        if twins:
            volume, mask = render(without(patient, finding), spacing)
            arrays |= {"twin_volume": (volume, f"{stem}_twin.nii.gz"), "twin_mask": (mask, f"{stem}_twin_mask.nii.gz")}
        row = {"patient_id": place.parent.parent.name, "finding": finding, "organ": organ_of[finding]}
        row |= {"voxels": int(lesion.sum()), "volume": place, "mask": mask_place}
        for column, (array, name) in arrays.items():
            path = root / folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(nifti_bytes(array, spacing, origin, orientation))
            row[column] = folder / name
        # As seen from the CSV.
        rows.append(
            {
                column: Path(os.path.relpath(value, "lesions")).as_posix() if isinstance(value, Path) else value
                for column, value in row.items()
            }
        )
    return rows


def run(args: argparse.Namespace) -> int:
    """Write the lesions of a release. Raises ValueError where the arguments cannot be met."""
    from tqdm import tqdm

    root = args.source / "dataset"
    if not root.is_dir():
        raise ValueError(f"--source: {root} does not exist. Give the `--out` of `python -m data_builders synthetic`.")
    for name in ("limit", "workers"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise ValueError(f"--{name} {getattr(args, name)}: must be at least 1.")
    write = partial(write_lesions, root=root, seed=args.seed, nominal=tuple(args.spacing), twins=args.twins)
    for split in args.splits:
        numbers = sorted(int(path.name.split("_")[1]) for path in (root / f"{SPLITS[split]}_fixed").glob("*_*"))
        jobs = [(split, number) for number in numbers[: args.limit]]
        if not jobs:
            raise ValueError(f"--splits {split}: {root} holds no patient of it.")
        if args.workers == 1:
            rows = list(tqdm(map(write, jobs), total=len(jobs), unit="scan"))
        else:
            with get_context().Pool(args.workers) as pool:
                rows = list(tqdm(pool.imap(write, jobs, chunksize=4), total=len(jobs), unit="scan"))
        text = io.StringIO()
        columns = (*COLUMNS, *TWIN_COLUMNS) if args.twins else COLUMNS
        writer = csv.DictWriter(text, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(row for of_patient in rows for row in of_patient)
        write_text(root / "lesions" / f"{split}_lesions.csv", text.getvalue())
    return 0
