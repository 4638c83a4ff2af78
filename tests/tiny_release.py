"""A release of a few tiny patients in CT-RATE's layout, for the tests of the builders.

A patient is boxes in a slab of soft tissue: two lungs of different size (left and right cannot be swapped unseen), a
liver and an aorta, on a grid of 3 x 4 x 4 mm. Files are written in whatever orientation a test asks for.
"""

import csv
from pathlib import Path

import nibabel
import numpy as np

from modeling_fvlm.organs import TOTALSEGMENTATOR_V2

SPACING = (3.0, 4.0, 4.0)  # depth, height, width
SHAPE = (20, 24, 32)
# organ class -> box in (depth, height, width) LPS: width grows to the patient's left, depth to the head.
BOXES = {
    "lung_upper_lobe_left": (slice(9, 17), slice(6, 18), slice(19, 27)),
    "lung_upper_lobe_right": (slice(9, 17), slice(6, 18), slice(5, 15)),
    "liver": (slice(3, 8), slice(6, 17), slice(5, 18)),
    "aorta": (slice(3, 17), slice(18, 20), slice(17, 19)),
}
GEOMETRY = ["--spacing", "3", "4", "4", "--margin", "2", "3", "3"]  # the grid as it is, cut around the organs
HU = {"lung_upper_lobe_left": -850, "lung_upper_lobe_right": -850, "liver": 60, "aorta": 180}
REPORT = {
    "findings": "The left lung is clear. A 12 mm nodule is seen in the right lung. The liver is normal. "
    "The aorta measures 5.2 cm.",
    "impression": "1. Pulmonary nodule. 2. Dilated aorta.",
}


def arrays(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Volume int16 HU and mask uint8 (TotalSegmentator v2), `(depth, height, width)` LPS."""
    volume = np.full(SHAPE, -1000, dtype=np.int16)
    volume[:, 3:21, 3:29] = 40
    mask = np.zeros(SHAPE, dtype=np.uint8)
    for name, box in BOXES.items():
        volume[box] = HU[name]
        mask[box] = TOTALSEGMENTATOR_V2.index(name) + 1
    noise = np.random.default_rng(seed).integers(-20, 21, SHAPE)
    return (volume + noise).astype(np.int16), mask


def save_nifti(array: np.ndarray, path: Path, orientation: str = "RAS", spacing=SPACING) -> Path:
    """Write an LPS `(depth, height, width)` array as NIfTI with the axes of `orientation`."""
    xyz = array.transpose(2, 1, 0)  # LPS as nibabel indexes it: x grows to the left, y to the back, z to the head
    affine = np.diag([-spacing[2], -spacing[1], spacing[0], 1.0])
    affine[:3, 3] = (60.0, 50.0, -100.0)
    image = nibabel.Nifti1Image(np.ascontiguousarray(xyz), affine)
    turn = nibabel.orientations.ornt_transform(
        nibabel.io_orientation(affine), nibabel.orientations.axcodes2ornt(tuple(orientation))
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(image.as_reoriented(turn), path)
    return path


def write_csv(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
    return path


def ct_rate_release(root: Path, names=("train_1_a_1", "train_2_a_1", "train_10_a_1", "valid_1_a_1")) -> Path:
    """Write a release with these reconstructions; returns its folder."""
    reports: dict[str, list[dict]] = {"train": [], "valid": []}
    labels: dict[str, list[dict]] = {"train": [], "valid": []}
    for seed, name in enumerate(names):
        split, number, scan, _ = name.split("_")
        place = Path(f"{split}_{number}", f"{split}_{number}_{scan}", f"{name}.nii.gz")
        volume, mask = arrays(seed)
        save_nifti(volume, root / "dataset" / f"{split}_fixed" / place, "RAS" if seed % 2 else "LPS")
        save_nifti(mask, root / "dataset" / "ts_seg" / "ts_total" / f"{split}_fixed" / place, "LPI")
        reports[split].append(
            {
                "VolumeName": f"{name}.nii.gz",
                "ClinicalInformation_EN": "Not given.",
                "Technique_EN": "Non-contrast CT.",
                "Findings_EN": REPORT["findings"],
                "Impressions_EN": REPORT["impression"] if seed else "Not given.",
            }
        )
        labels[split].append({"VolumeName": f"{name}.nii.gz", "Lung nodule": 1, "Pleural effusion": 0})
    for split, spelt in (("train", "train"), ("valid", "validation")):
        write_csv(root / "dataset" / "radiology_text_reports" / f"{spelt}_reports.csv", reports[split])
        write_csv(root / "dataset" / "multi_abnormality_labels" / f"{split}_predicted_labels.csv", labels[split])
    return root


def volume_of(release: Path, name: str) -> Path:
    """The file of a reconstruction."""
    split, number, scan, _ = name.split("_")
    return release / "dataset" / f"{split}_fixed" / f"{split}_{number}" / f"{split}_{number}_{scan}" / f"{name}.nii.gz"


def mask_of(release: Path, name: str) -> Path:
    """The mask of a reconstruction."""
    return release / "dataset" / "ts_seg" / "ts_total" / volume_of(release, name).relative_to(release / "dataset")


def command(source: Path | str, out: Path, *more: str) -> list[str]:
    """Arguments that build such a release: two rows a shard, one process and no previews, unless `more` says so."""
    options = [*GEOMETRY, "--rows_per_shard", "2", "--workers", "1", "--previews", "0"]
    return ["ct_rate", "--source", str(source), "--out", str(out), *options, *more]


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder, by its relative name."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
