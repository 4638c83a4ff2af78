"""Where the findings of the synthetic set lie: the voxels that were painted, beside a release that stays as it is."""

import argparse
import csv

import numpy as np
import pytest
from tiny_release import contents

from data_builders import lesions, synthetic
from data_builders.phantom import draw_patient, lesion_mask, load_findings, paint, render, without
from data_builders.phantom_canvas import LABELS
from modeling_fvlm.reading import check_same_grid, read_nifti, read_nifti_mask

SPACING = (24.0, 8.0, 8.0)  # coarse: a scan in milliseconds


def release(out):
    args = argparse.Namespace(out=out, patients=1, validation=3, seed=5, workers=1, spacing=SPACING)
    assert synthetic.run(args) == 0
    return out


def write(source, *more):
    parser = argparse.ArgumentParser()
    lesions.add_arguments(parser)
    spacing = [f"{edge:g}" for edge in SPACING]
    options = ["--source", str(source), "--spacing", *spacing, "--workers", "1", "--seed", "5", *more]
    return lesions.run(parser.parse_args(options))


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A release with its lesions and twins, and what the release held before."""
    source = release(tmp_path_factory.mktemp("release") / "set")
    before = contents(source)
    assert write(source, "--twins") == 0
    return source, before


def rows_of(source):
    path = source / "dataset" / "lesions" / "validation_lesions.csv"
    with path.open(newline="", encoding="utf-8") as file:
        return path.parent, list(csv.DictReader(file))


def test_the_release_stays_as_it_is_byte_for_byte(written):
    source, before = written
    after = contents(source)
    assert before and {name: after[name] for name in before} == before
    assert all(name.startswith("dataset/lesions/") for name in set(after) - set(before))


def test_every_finding_has_its_file_on_the_grid_of_its_scan(written):
    folder, rows = rows_of(written[0])
    drawn = {f"valid_{number}": draw_patient((5, 1, number)) for number in (1, 2, 3)}
    expected = [(name, finding) for name, patient in drawn.items() for finding in patient.findings]
    assert [(row["patient_id"], row["finding"]) for row in rows] == expected and len(expected) > 5
    organ_of = {row.finding: row.organ for row in load_findings()}
    for row in rows:
        volume, lesion = read_nifti(folder / row["volume"]), read_nifti_mask(folder / row["lesion"])
        check_same_grid(volume, lesion)
        check_same_grid(volume, read_nifti_mask(folder / row["mask"]))
        patient = drawn[row["patient_id"]]
        spacing = synthetic.draw_spacing(patient, SPACING)
        np.testing.assert_array_equal(lesion.array.astype(bool), lesion_mask(patient, row["finding"], spacing))
        assert lesion.array.max() == 1 and int(row["voxels"]) == lesion.array.sum() > 0
        assert row["organ"] == organ_of[row["finding"]]
        # The twin is the same scan but near the lesion: partial volume carries it a voxel further, in the slice.
        twin, near = read_nifti(folder / row["twin_volume"]).array, lesion.array.astype(bool)
        for axis in (1, 2):
            near = near | np.roll(near, 1, axis) | np.roll(near, -1, axis)
        assert (twin != volume.array)[lesion.array > 0].any()
        np.testing.assert_array_equal(twin[~near], volume.array[~near])


def test_a_cyst_is_where_the_cyst_was_painted():
    patient = next(
        patient for patient in (draw_patient((9, 0, n), "whole") for n in range(100))
        if "Liver cyst" in patient.findings and "Hepatic steatosis" not in patient.findings
    )  # fmt: skip
    lesion = lesion_mask(patient, "Liver cyst", (10.0, 4.0, 4.0))
    canvas = paint(patient, (10.0, 4.0, 4.0))
    assert (canvas.mask[lesion] == LABELS["liver"]).all() and lesion.any()
    is_liver = canvas.mask == LABELS["liver"]
    assert lesion.sum() < 0.5 * is_liver.sum()
    assert canvas.volume[lesion].max() < 3 < np.median(canvas.volume[is_liver & ~lesion]), "fluid in the liver"


def test_one_finding_less_is_one_finding_less():
    patient = draw_patient((9, 0, 1), "whole")
    assert len(patient.findings) > 1
    finding = next(iter(patient.findings))
    other = without(patient, finding)
    assert set(other.findings) == set(patient.findings) - {finding} and other.entropy == patient.entropy
    assert not np.array_equal(render(other, SPACING)[0], render(patient, SPACING)[0])


def test_another_seed_is_noticed(written):
    with pytest.raises(ValueError, match="is not what --seed 6 --spacing 24 8 8 draws"):
        write(written[0], "--seed", "6")


def test_what_cannot_be_met_is_told(tmp_path, written):
    with pytest.raises(ValueError, match="does not exist"):
        write(tmp_path)
    with pytest.raises(ValueError, match="--limit 0"):
        write(written[0], "--limit", "0")


def test_one_patient_without_twins(tmp_path):
    source = release(tmp_path / "set")
    assert write(source, "--limit", "1") == 0
    folder, rows = rows_of(source)
    assert {row["patient_id"] for row in rows} == {"valid_1"} and "twin_volume" not in rows[0]
    assert not list(folder.rglob("*twin*"))
