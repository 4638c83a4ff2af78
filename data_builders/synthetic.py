"""Write the synthetic set: procedural CTs with masks, reports and labels in the layout of CT-RATE.

A train and a validation split, about 590,000 voxels a scan:
    python -m data_builders synthetic --patients 2400 --validation 300 --out data/synthetic --seed 0

What lies under `--out` is what `python -m data_builders ct_rate --source` reads:
    dataset/{train,valid}_fixed/train_1/train_1_a/train_1_a_1.nii.gz          int16 HU
    dataset/ts_seg/ts_total/{train,valid}_fixed/.../train_1_a_1.nii.gz        TotalSegmentator v2 classes
    dataset/radiology_text_reports/{train,validation}_reports.csv
    dataset/multi_abnormality_labels/{train,valid}_predicted_labels.csv       the painted findings, 0 or 1
    dataset/metadata/{train,validation}_metadata.csv, no_chest_{train,valid}.txt
    dataset/synthetic_gold/{train,validation}_gold.json                       which organ every sentence speaks of

Every patient hangs on (seed, split, number) alone, so the number of workers and of patients changes no scan, and the
same seed gives the same bytes. The metadata follow the release down to the rescale intercept of its original volumes:
volumes in the `_fixed` folders are in HU already and must not be rescaled again.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import io
import json
import sys
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import nibabel
import numpy as np

from .phantom import Patient, draw_patient, load_findings, render
from .phantom_reports import load_phrases, write_report

SPLITS = {"train": "train", "validation": "valid"}  # the release uses both spellings of the second one
SPACING = (20.0, 4.0, 4.0)  # mm; default of the release and of all that must find its scans again
ORIENTATIONS = ("LPS", "LPS", "RAS", "LAS")  # drawn with equal chance
GZIP_LEVEL = 1  # a higher one costs more time than the noise of a CT can repay
REPORT_COLUMNS = ("VolumeName", "ClinicalInformation_EN", "Technique_EN", "Findings_EN", "Impressions_EN")
# fmt: off
METADATA_COLUMNS = (
    "VolumeName", "Manufacturer", "SeriesDescription", "ManufacturerModelName", "PatientSex", "PatientAge",
    "ReconstructionDiameter", "DistanceSourceToDetector", "DistanceSourceToPatient", "GantryDetectorTilt",
    "TableHeight", "RotationDirection", "ExposureTime", "XRayTubeCurrent", "Exposure", "FilterType",
    "GeneratorPower", "FocalSpots", "ConvolutionKernel", "PatientPosition", "RevolutionTime",
    "SingleCollimationWidth", "TotalCollimationWidth", "TableSpeed", "TableFeedPerRotation", "SpiralPitchFactor",
    "DataCollectionCenterPatient", "ReconstructionTargetCenterPatient", "ExposureModulationType", "CTDIvol",
    "ImagePositionPatient", "ImageOrientationPatient", "SliceLocation", "SamplesPerPixel",
    "PhotometricInterpretation", "Rows", "Columns", "XYSpacing", "RescaleIntercept", "RescaleSlope", "RescaleType",
    "NumberofSlices", "ZSpacing", "StudyDate",
)
# fmt: on


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("synthetic set")
    group.add_argument("--out", type=Path, required=True, help="Folder to write; must hold no `dataset` yet.")
    group.add_argument("--patients", type=int, required=True, help="Patients of the train split, one scan each.")
    group.add_argument("--validation", type=int, required=True, help="Patients of the validation split.")
    group.add_argument("--seed", type=int, required=True, help="Same seed, same bytes; write it beside every result.")
    group.add_argument(
        "--spacing",
        type=float,
        nargs=3,
        metavar=("DEPTH", "HEIGHT", "WIDTH"),
        default=SPACING,
        help="mm between voxels (default: 20 4 4); every scan departs from it by up to a tenth.",
    )
    group.add_argument("--workers", type=int, default=2, help="Processes (default: 2); no scan depends on it.")


def draw_spacing(patient: Patient, nominal: tuple[float, float, float]) -> tuple[float, float, float]:
    """Spacing of one scan, mm, `(depth, height, width)`: scanners and protocols differ."""
    rng = patient.stream("file")
    slices, pixels = rng.uniform(0.9, 1.1), rng.uniform(0.925, 1.075)
    return tuple(round(float(step * factor), 4) for step, factor in zip(nominal, (slices, pixels, pixels)))


def nifti_bytes(array: np.ndarray, spacing: tuple[float, float, float], origin: np.ndarray, orientation: str) -> bytes:
    """A compressed NIfTI file of an LPS array; equal arguments give equal bytes.

    Args:
        array: `(depth, height, width)`, LPS axes.
        spacing: mm, the same order.
        origin: LPS position `(x, y, z)` in mm of the centre of voxel (0, 0, 0) of `array`.
        orientation: Directions in which the stored axes (x, y, z) grow, e.g. "RAS".
    """
    step = np.array(spacing[::-1])  # (x, y, z)
    affine = np.diag([-step[0], -step[1], step[2], 1.0])  # LPS axes in NIfTI's RAS world
    affine[:3, 3] = origin * (-1, -1, 1)
    stored = array.T  # (x, y, z)
    for axis, (letter, lps) in enumerate(zip(orientation, "LPS")):
        if letter != lps:
            stored = np.flip(stored, axis)
            affine[:3, 3] += affine[:3, axis] * (stored.shape[axis] - 1)
            affine[:3, axis] *= -1
    image = nibabel.Nifti1Image(np.asfortranarray(stored), affine)
    image.header.set_xyzt_units("mm")
    image.header.set_slope_inter(1, 0)
    buffer = io.BytesIO()
    # No file name and no time in the header of the archive: they would change the bytes.
    with gzip.GzipFile(filename="", mode="wb", fileobj=buffer, compresslevel=GZIP_LEVEL, mtime=0) as archive:
        archive.write(image.to_bytes())
    return buffer.getvalue()


def draw_job(job: tuple[str, int], seed: int) -> Patient:
    """The patient of a split and a number."""
    split, number = job
    return draw_patient((seed, list(SPLITS).index(split), number))


def draw_placement(patient: Patient) -> tuple[np.ndarray, str, np.random.Generator]:
    """Origin `(x, y, z)` and orientation of a patient's files, and the generator that goes on from there."""
    rng = patient.stream("file")
    rng.random(2)  # taken by draw_spacing
    orientation = ORIENTATIONS[int(rng.integers(len(ORIENTATIONS)))]
    return np.round(rng.uniform(-300, 100, 3), 2), orientation, rng


def place_of(job: tuple[str, int]) -> Path:
    """Where the release keeps a patient's volume; its mask lies at the same place under `ts_seg/ts_total`."""
    folder = SPLITS[job[0]]
    patient_id = f"{folder}_{job[1]}"
    return Path(f"{folder}_fixed", patient_id, f"{patient_id}_a", f"{patient_id}_a_1.nii.gz")


def write_patient(job: tuple[str, int], root: Path, seed: int, nominal: tuple[float, float, float]) -> dict:
    """Draw, render and write one patient; returns its rows of the tables."""
    patient = draw_job(job, seed)
    spacing = draw_spacing(patient, nominal)
    volume, mask = render(patient, spacing)
    origin, orientation, rng = draw_placement(patient)
    place = place_of(job)
    name, scan_id = place.name, place.parent.name
    for array, path in ((volume, root / place), (mask, root / "ts_seg" / "ts_total" / place)):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(nifti_bytes(array, spacing, origin, orientation))
    report = write_report(patient)
    return {
        "report": (name, clinical_information(rng), technique(patient), report.findings, report.impression),
        "labels": (name, *(int(row.finding in patient.findings) for row in load_findings())),
        "metadata": metadata_row(name, patient, spacing, volume.shape, origin, rng),
        "gold": {
            "id": scan_id,
            "findings": report.findings,
            "impression": report.impression,
            "organs": report.by_organ(),
        },
        "shows_no_chest": patient.coverage == "head",
    }


def clinical_information(rng: np.random.Generator) -> str:
    """A reason for the scan that gives no finding away."""
    reasons = load_phrases()["clinical"]
    return reasons[int(rng.integers(len(reasons)))] if rng.random() < 0.8 else "Not given."


def technique(patient: Patient) -> str:
    if patient.is_enhanced:
        return "Images were taken in the portal venous phase after intravenous contrast."
    return "Images were taken without contrast."


def metadata_row(name, patient, spacing, shape, origin, rng) -> tuple:
    """The 44 columns of the release; what no phantom has is constant."""
    values = {
        "VolumeName": name,
        "Manufacturer": "fVLM phantom",
        "SeriesDescription": patient.coverage,
        "ManufacturerModelName": "procedural body",
        "PatientSex": patient.sex,
        "PatientAge": f"{patient.age:03d}Y",
        "ReconstructionDiameter": round(spacing[2] * shape[2], 1),
        "GantryDetectorTilt": 0,
        "RotationDirection": "CW",
        "XRayTubeCurrent": int(rng.integers(100, 400)),
        "ConvolutionKernel": "B30f",
        "PatientPosition": "HFS" if rng.random() < 0.5 else "FFS",
        "ImagePositionPatient": str([float(value) for value in origin]),
        "ImageOrientationPatient": "[1.0, 0.0, 0.0, 0.0, 1.0, 0.0]",
        "SliceLocation": float(origin[2]),
        "SamplesPerPixel": 1,
        "PhotometricInterpretation": "MONOCHROME2",
        "Rows": shape[1],
        "Columns": shape[2],
        "XYSpacing": str([spacing[1], spacing[2]]),
        "RescaleIntercept": -1024,
        "RescaleSlope": 1,
        "RescaleType": "HU",
        "NumberofSlices": shape[0],
        "ZSpacing": spacing[0],
        "StudyDate": 20240101,
    }
    return tuple(values.get(column, "") for column in METADATA_COLUMNS)


def write_csv(path: Path, columns: tuple[str, ...], rows: list[tuple]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(rows)


def write_tables(root: Path, split: str, patients: list[dict]) -> None:
    """Reports, labels, metadata, the list of scans without a chest, and the gold split of the reports."""
    folder = SPLITS[split]
    labels = ("VolumeName", *(row.finding for row in load_findings()))
    reports = root / "radiology_text_reports" / f"{split}_reports.csv"
    write_csv(reports, REPORT_COLUMNS, [patient["report"] for patient in patients])
    label_file = root / "multi_abnormality_labels" / f"{folder}_predicted_labels.csv"
    write_csv(label_file, labels, [patient["labels"] for patient in patients])
    metadata = root / "metadata" / f"{split}_metadata.csv"
    write_csv(metadata, METADATA_COLUMNS, [patient["metadata"] for patient in patients])
    no_chest = [patient["report"][0] for patient in patients if patient["shows_no_chest"]]
    (root / "metadata" / f"no_chest_{folder}.txt").write_text("".join(f"{name}\n" for name in no_chest))
    gold = root / "synthetic_gold" / f"{split}_gold.json"
    gold.parent.mkdir(parents=True, exist_ok=True)
    gold.write_text(json.dumps([patient["gold"] for patient in patients], indent=1) + "\n", encoding="utf-8")


def write_readme(root: Path, args: argparse.Namespace) -> None:
    spacing = " ".join(f"{value:g}" for value in args.spacing)
    (root / "README.md").write_text(
        "# Synthetic set of fVLM\n\n"
        "Procedural bodies: no patient data, no clinical use. Layout of CT-RATE, TotalSegmentator v2 classes.\n\n"
        f"    python -m data_builders synthetic --patients {args.patients} --validation {args.validation} "
        f"--seed {args.seed} --spacing {spacing} --out DIR\n",
        encoding="utf-8",
    )


def run(args: argparse.Namespace) -> int:
    """Write the set. Raises ValueError where the arguments cannot be met."""
    from tqdm import tqdm

    root = args.out / "dataset"
    if args.patients < 0 or args.validation < 0 or args.patients + args.validation == 0:
        raise ValueError(f"--patients {args.patients} --validation {args.validation}: ask for at least one patient.")
    if min(args.spacing) <= 0:
        raise ValueError(f"--spacing {args.spacing}: every step must be above 0 mm.")
    if args.workers < 1:
        raise ValueError(f"--workers {args.workers}: at least one process is needed.")
    if args.seed < 0:
        raise ValueError(f"--seed {args.seed}: must be 0 or above.")
    if root.exists():
        raise ValueError(f"--out: {root} exists; scans of two sets would mix. Remove it or name another folder.")
    root.mkdir(parents=True)
    counts = {"train": args.patients, "validation": args.validation}
    jobs = [(split, number) for split, count in counts.items() for number in range(1, count + 1)]
    write = partial(write_patient, root=root, seed=args.seed, nominal=tuple(args.spacing))
    if args.workers == 1:
        rows = list(tqdm(map(write, jobs), total=len(jobs), unit="scan"))
    else:
        with get_context().Pool(args.workers) as pool:
            rows = list(tqdm(pool.imap(write, jobs, chunksize=4), total=len(jobs), unit="scan"))
    for split in SPLITS:
        chosen = [row for (name, _), row in zip(jobs, rows) if name == split]
        write_tables(root, split, chosen)
    write_readme(root, args)
    return 0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m data_builders.synthetic",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_arguments(parser)
    try:
        return run(parser.parse_args(argv))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    raise SystemExit(main())
