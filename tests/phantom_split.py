"""A processed split of procedural bodies, built by the folder builder from NIfTI files: what the doctor is tested on.

Whole bodies on a coarse grid with eleven organs, each of them abnormal in some patient: nothing is wrong with it.
"""

import csv
from dataclasses import replace
from pathlib import Path

import numpy as np
from tiny_release import save_nifti

from data_builders.__main__ import main
from data_builders.phantom import draw_patient, render
from modeling_fvlm.captions import normal_caption
from modeling_fvlm.organs import TOTALSEGMENTATOR_V1, TOTALSEGMENTATOR_V2

# No two edges of a voxel alike, and no axis so coarse that the esophagus is lost.
SPACING = (12.0, 5.0, 6.0)
ORGANS = (
    *("lung", "heart", "esophagus", "aorta", "liver", "spleen", "kidney", "stomach", "autochthon", "hip", "brain"),
)
ORGAN_SET = """
name: doctor
version: 1
organs:
  lung: [lung_upper_lobe_left, lung_lower_lobe_left, lung_upper_lobe_right, lung_middle_lobe_right,
    lung_lower_lobe_right]
  heart:
    totalsegmentator_v1: [heart_myocardium, heart_atrium_left, heart_ventricle_left, heart_atrium_right,
      heart_ventricle_right]
    totalsegmentator_v2: [heart, atrial_appendage_left]
  esophagus: [esophagus]
  aorta: [aorta]
  liver: [liver]
  spleen: [spleen]
  kidney: [kidney_left, kidney_right]
  stomach: [stomach]
  autochthon: [autochthon_left, autochthon_right]
  hip: [hip_left, hip_right]
  brain: [brain]
"""
NAMES_IN_V1 = {
    **{"heart": "heart_myocardium", "atrial_appendage_left": "heart_atrium_left", "skull": "face"},
    **{"vertebrae_S1": "sacrum"},
}


def v1_table() -> np.ndarray:
    """Label of v2 -> label that a mask of v1 has there, 0 where v1 has no such class."""
    table = np.zeros(256, dtype=np.uint8)
    for label, name in enumerate(TOTALSEGMENTATOR_V2, start=1):
        name = NAMES_IN_V1.get(name, name)
        if name in TOTALSEGMENTATOR_V1:
            table[label] = TOTALSEGMENTATOR_V1.index(name) + 1
    return table


def render_scans(folder: Path, train: int, validation: int) -> Path:
    """Write volumes, masks of both numberings and the table of that many patients; returns the folder."""
    table = []
    to_v1 = v1_table()
    for number in range(train + validation):
        patient = replace(draw_patient((5, 0, number), "whole"), findings={})
        volume, mask = render(patient, SPACING)
        name = f"p_{number}"
        for kind, array in (("ct", volume), ("v2", mask), ("v1", to_v1[mask])):
            save_nifti(array, folder / kind / f"{name}.nii.gz", "RAS" if number % 2 else "LPS", SPACING)
        row = {"id": name, "patient_id": f"person_{number}", "split": "train" if number < train else "validation"}
        row |= {"findings": f"Report number {number}.", "impression": ""}
        for index, organ in enumerate(ORGANS):
            is_abnormal = (number + index) % 3 == 0
            row[f"caption:{organ}"] = f"Lesion {number} of the {organ}." if is_abnormal else normal_caption(organ)
            row[f"abnormal:{organ}"] = int(is_abnormal)
        row["label:Nodule"] = number % 2
        table.append(row)
    with (folder / "cases.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(table[0]))
        writer.writeheader()
        writer.writerows(table)
    (folder / "organs.yaml").write_text(ORGAN_SET, encoding="utf-8")
    return folder


def build_split(scans: Path, out: Path, masks: str = "v2", previews: int = 0) -> Path:
    """Build the split, from masks of the numbering named; they are read as v2, whatever they are."""
    command = ["folder", "--volumes", scans / "ct", "--masks", scans / masks, "--table", scans / "cases.csv"]
    command += ["--organs", scans / "organs.yaml", "--spacing", *SPACING, "--margin", 2, 3, 3, "--ids", "kept"]
    command += ["--previews", previews, "--workers", 1, "--rows_per_shard", 6, "--out", out]
    assert main([str(word) for word in command]) == 0
    return out
