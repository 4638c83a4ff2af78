"""Attention in a lesion's patches: against a walk over the network's window, and what counts as a case."""

import argparse
import csv
import json

import nibabel
import numpy as np
import pandas as pd
import pytest
import tiny_scan
import torch
from PIL import Image

from evaluation_fvlm import lesion_attention
from evaluation_fvlm.attention import attention_maps, load_model
from evaluation_fvlm.errors import EvaluationError
from evaluation_fvlm.lesion_attention import FIGURES, in_order, summarize_cases
from modeling_fvlm import FVLMModel, FVLMProcessor, save_for_hub

PATCH = (2, 4, 8)
LUNG_BOX = (slice(4, 12), slice(3, 9), slice(0, 5))  # (x, y, z) as tiny_scan writes it
# (organ, finding, box of the lesion)
LESIONS = [
    ("lung", "Nodule", (slice(5, 8), slice(4, 6), slice(1, 3))),
    ("lung", "Emphysema", LUNG_BOX),  # all of it
    ("heart", "Scar", (slice(18, 24), slice(5, 7), slice(3, 5))),  # half of it beyond the heart
    ("heart", "Elsewhere", (slice(30, 33), slice(5, 7), slice(3, 5))),
    ("esophagus", "Hernia", (slice(20, 22), slice(5, 7), slice(3, 5))),  # no esophagus in the mask
    ("spleen", "Cyst", (slice(20, 22), slice(5, 7), slice(3, 5))),  # an organ that the model lacks
]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    torch.manual_seed(0)
    model = FVLMModel(tiny_scan.tiny_config())
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.6)
    folder = tmp_path_factory.mktemp("model")
    save_for_hub(model, FVLMProcessor.from_config(model.config, tiny_scan.tiny_tokenizer()), folder)
    return folder


def write_cases(folder, lesions=LESIONS, twins=True):
    volume, mask = tiny_scan.write_scan(folder)
    twin, _ = tiny_scan.write_scan(folder, seed=1)
    rows = []
    for organ, finding, box in lesions:
        lesion = np.zeros(nibabel.load(volume).shape, np.uint8)
        lesion[box] = 1
        nibabel.save(nibabel.Nifti1Image(lesion, tiny_scan.AFFINE), folder / f"{finding}.nii.gz")
        row = {"patient_id": "p", "finding": finding, "organ": organ, "volume": volume.name, "mask": mask.name}
        row |= {"lesion": f"{finding}.nii.gz"}
        rows.append(row | ({"twin_volume": twin.name, "twin_mask": mask.name} if twins else {}))
    path = folder / "cases.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return path


def measure(saved, cases, out, *more):
    parser = argparse.ArgumentParser()
    lesion_attention.add_arguments(parser)
    args = parser.parse_args([str(word) for word in ("--model", saved, "--cases", cases, "--out", out, *more)])
    assert lesion_attention.run(args) == 0
    frame = pd.read_csv(out / "cases.csv", keep_default_na=False, na_values=dict.fromkeys(FIGURES, ""))
    return frame.set_index("finding"), json.loads((out / "lesion_attention.json").read_text())


@pytest.fixture(scope="module")
def measured(saved, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cases")
    return (*measure(saved, write_cases(folder), folder / "out"), folder)


def slow_shares(saved, folder, volume_name, organ, box):
    """On the model's own grid, where the scan lies: what the network's window shows of the lesion, patch by patch."""
    model, processor = load_model(str(saved))
    scan = processor.image_processor.prepare(folder / volume_name, folder / "mask_10_0.nii.gz")
    stored = np.zeros(nibabel.load(folder / volume_name).shape, np.uint8)
    stored[box] = 1
    turned = stored[:, ::-1].transpose(2, 1, 0)[scan.box]  # AFFINE: width to the left, height turned
    organ_map = attention_maps(model, scan.volume, scan.mask, [organ])[organ]
    is_organ = scan.mask == model.config.organs.index(organ) + 1
    shown = organ_map.window.take((turned.astype(bool) & is_organ).astype(np.uint8), 0)
    mass = patches = 0
    for place in np.ndindex(organ_map.weights.shape):
        part = tuple(slice(at * edge, (at + 1) * edge) for at, edge in zip(place, PATCH))
        if shown[part].any():
            mass, patches = mass + organ_map.weights[place], patches + 1
    inside = turned.astype(bool) & is_organ
    return mass, inside.sum() / is_organ.sum(), patches / organ_map.is_organ.sum()


@pytest.mark.parametrize("place", [0, 2])
def test_shares_equal_a_walk_over_the_window(saved, measured, place):
    frame, _, folder = measured
    organ, finding, box = LESIONS[place]
    row = frame.loc[finding]
    mass, volume_share, patch_share = slow_shares(saved, folder, "ct_10_0.nii.gz", organ, box)
    assert row["mass"] == pytest.approx(mass, rel=1e-4) and 0 < mass < 1
    assert row["volume_share"] == pytest.approx(volume_share, rel=1e-4) and 0 < volume_share < 0.5
    assert row["patch_share"] == pytest.approx(patch_share, rel=1e-4) and 0 < patch_share < 1
    assert abs(mass - patch_share) > 0.01, "a uniform map would compare nothing"
    twin_mass, _, _ = slow_shares(saved, folder, "ct_10_1.nii.gz", organ, box)
    assert row["twin_mass"] == pytest.approx(twin_mass, rel=1e-4) and abs(twin_mass - mass) > 1e-3


def test_cases_that_tell_nothing_are_counted_by_reason(measured):
    frame, summary, _ = measured
    assert summary["cases"] == 6 and summary["counted"] == 2
    assert summary["left_out"] == {
        "the lesion takes up more than 0.5 of the organ": 1,
        "no voxel of the lesion lies in the organ": 1,
        "the mask does not hold the organ": 1,
        "the model does not have the organ": 1,
    }
    assert frame.loc["Emphysema", "mass"] == pytest.approx(1) and frame.loc["Emphysema", "volume_share"] == 1
    assert set(summary["per_finding"]) == {"Nodule", "Scar"}
    assert summary["figures"]["mass"]["low"] is None, "one patient has no interval"
    assert summary["figures"]["mass"]["value"] == pytest.approx(frame.loc[["Nodule", "Scar"], "mass"].mean(), rel=1e-4)


def test_counted_cases_are_drawn(measured):
    _, summary, folder = measured
    pictures = [example["picture"] for example in summary["examples"]]
    assert pictures == ["p_Nodule.png", "p_Scar.png"]
    with Image.open(folder / "out" / "p_Nodule.png") as picture:
        pixels = np.asarray(picture.convert("RGB")).astype(int)
    green = (pixels[..., 1] > 170) & (pixels[..., 0] < 130) & (pixels[..., 2] < 130)
    assert green.sum() > 20, "the outline of the lesion"


def test_means_and_intervals_of_a_made_up_table():
    rng = np.random.default_rng(0)
    count = 200
    rows = pd.DataFrame(
        {
            "patient_id": [f"p{n // 2}" for n in range(count)],
            "finding": np.where(np.arange(count) % 4 < 2, "a", "b"),
            "organ": "liver",
            "reason": "",
            "mass": rng.beta(4, 6, count),
            "volume_share": rng.beta(1, 19, count),
            "patch_share": rng.beta(2, 8, count),
            "twin_mass": np.where(np.arange(count) < 100, 0.2, np.nan),
            "is_hit": rng.random(count) < 0.3,
        }
    )
    summary = summarize_cases(rows, 0.5)
    assert summary["counted"] == count and summary["patients"] == 100
    figures = summary["figures"]
    for name in ("mass", "volume_share", "patch_share", "is_hit"):
        assert figures[name]["value"] == pytest.approx(rows[name].mean())
    by_patient = rows.groupby("patient_id")["mass"].mean()
    half = 1.96 * by_patient.std() / 10
    assert figures["mass"]["low"] == pytest.approx(by_patient.mean() - half, abs=0.005)
    assert figures["mass"]["high"] == pytest.approx(by_patient.mean() + half, abs=0.005)
    assert figures["mass_over_patch_share"]["value"] == pytest.approx(rows["mass"].mean() / rows["patch_share"].mean())
    # Compared with the twins is what has twins.
    assert figures["mass_over_twin_mass"]["value"] == pytest.approx(rows["mass"][:100].mean() / 0.2)
    of_a = rows[rows["finding"] == "a"]
    assert summary["per_finding"]["a"]["mass"]["value"] == pytest.approx(of_a["mass"].mean())
    assert summary == summarize_cases(rows, 0.5) != summarize_cases(rows, 0.5, seed=1)


def test_without_a_case_there_are_no_figures():
    rows = pd.DataFrame({"patient_id": ["p"], "finding": ["a"], "organ": ["liver"], "reason": ["none"]})
    summary = summarize_cases(rows, 0.5)
    assert summary["figures"] is None and summary["left_out"] == {"none": 1}
    assert "nothing to measure" in lesion_attention.format_summary(summary)


def test_cases_are_drawn_until_enough_count(saved, tmp_path):
    cases = pd.DataFrame({"finding": np.arange(50)})
    drawn = in_order(cases, True, 0)["finding"].tolist()
    assert sorted(drawn) == list(range(50)) and drawn != list(range(50))
    assert drawn == in_order(cases, True, 0)["finding"].tolist() != in_order(cases, True, 1)["finding"].tolist()
    assert in_order(cases, False, 0)["finding"].tolist() == list(range(50))
    path = write_cases(tmp_path, twins=False)
    _, summary = measure(saved, path, tmp_path / "out", "--num_cases", "1", "--pictures", "0")
    assert summary["counted"] == 1 and summary["cases"] == 1 + sum(summary["left_out"].values()) < 6
    _, summary = measure(saved, path, tmp_path / "out", "--num_cases", "9", "--pictures", "0")
    assert summary["counted"] == 2 and summary["cases"] == summary["available"] == 6


def test_without_twins_there_is_nothing_to_compare(saved, tmp_path):
    frame, summary = measure(
        saved, write_cases(tmp_path, LESIONS[:1], twins=False), tmp_path / "out", "--pictures", "0", "--num_cases", "1"
    )
    assert "twin_mass" not in summary["figures"] and frame["twin_mass"].isna().all() and summary["examples"] == []


def test_what_cannot_be_read_is_told(saved, tmp_path):
    with pytest.raises(EvaluationError, match="cannot be read"):
        measure(saved, tmp_path / "none.csv", tmp_path / "out")
    (tmp_path / "bare.csv").write_text("finding,organ\nNodule,lung\n")
    with pytest.raises(EvaluationError, match="patient_id.*are missing"):
        measure(saved, tmp_path / "bare.csv", tmp_path / "out")
    cases = write_cases(tmp_path, LESIONS[:1])
    with pytest.raises(EvaluationError, match="--seed -1 must be 0 or more"):
        measure(saved, cases, tmp_path / "out", "--seed", "-1")
    moved = tiny_scan.AFFINE.copy()
    moved[2, 3] += 12
    lesion = nibabel.load(tmp_path / "Nodule.nii.gz")
    nibabel.save(nibabel.Nifti1Image(np.asarray(lesion.dataobj), moved), tmp_path / "Nodule.nii.gz")
    with pytest.raises(EvaluationError, match="p, Nodule: .*not on one grid"):
        measure(saved, cases, tmp_path / "out")
    (tmp_path / "Nodule.nii.gz").unlink()
    with pytest.raises(EvaluationError, match="p, Nodule: .*no such file"):
        measure(saved, cases, tmp_path / "out")
