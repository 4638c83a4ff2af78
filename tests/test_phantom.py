"""The procedural body: solids against closed forms, anatomy against tables, findings against the healthy patient."""

from dataclasses import replace

import numpy as np
import pytest
from scipy.ndimage import map_coordinates

from data_builders import phantom
from data_builders.phantom import COVERAGES, ORGAN_RANGE_MM, Detail, draw_detail, draw_patient, load_findings, render
from data_builders.phantom_canvas import LABELS, Canvas, Profile
from modeling_fvlm.organs import TOTALSEGMENTATOR_V2, load_organ_set, organ_label_table

SPACING = (20.0, 4.0, 4.0)
ORGAN_SET = load_organ_set("body_24")
ORGANS = list(ORGAN_SET.organs)
TABLE = organ_label_table(ORGAN_SET, ORGANS, "totalsegmentator_v2")
FINDINGS = {row.finding: row for row in load_findings()}

# Plausible volumes of healthy organs in an adult, ml (both sides together). Only the part of the femur in a body scan.
VOLUME_RANGE_ML = {
    "face": (500, 1300),
    "brain": (1000, 1800),
    "esophagus": (20, 80),
    "trachea": (15, 60),
    "lung": (2200, 6000),
    "heart": (400, 900),
    "kidney": (200, 420),
    "stomach": (150, 650),
    "liver": (1000, 2000),
    "gallbladder": (15, 80),
    "pancreas": (35, 130),
    "spleen": (80, 320),
    "colon": (300, 1500),
    "aorta": (120, 330),
    "rib": (200, 600),
    "humerus": (200, 600),
    "scapula": (120, 350),
    "clavicula": (30, 110),
    "femur": (150, 500),
    "hip": (350, 800),
    "sacrum": (130, 420),
    "gluteus": (800, 2300),
    "iliopsoas": (400, 1200),
    "autochthon": (500, 1500),
}

# What a finding does to the voxels of its organ: HU up or down where they change, or the volume of the organ.
EFFECTS = {
    "Sinusitis": "brighter",
    "Intracranial hemorrhage": "brighter",
    "Ventriculomegaly": "darker",
    "Hiatal hernia": "larger",
    "Tracheal secretions": "brighter",
    "Emphysema": "darker",
    "Consolidation": "brighter",
    "Lung nodule": "brighter",
    "Pleural effusion": "brighter",
    "Cardiomegaly": "larger",
    "Pericardial effusion": "larger",
    "Coronary artery wall calcification": "brighter",
    "Aortic dilatation": "larger",
    "Arterial wall calcification": "brighter",
    "Gastric wall thickening": "brighter",
    "Gastric distension": "larger",
    "Hepatic steatosis": "darker",
    "Liver cyst": "darker",
    "Gallstones": "brighter",
    "Pancreatic cyst": "larger",
    "Pancreatic atrophy": "smaller",
    "Splenomegaly": "larger",
    "Kidney stone": "brighter",
    "Kidney cyst": "larger",
    "Hydronephrosis": "darker",
    "Fecal loading": "larger",
    "Rib fracture": "brighter",
    "Sclerotic lesion": "brighter",
    "Sacral mass": "darker",
    "Gluteal muscle atrophy": "darker",
    "Psoas abscess": "darker",
    "Paraspinal muscle atrophy": "darker",
}


def healthy(number: int):
    return replace(draw_patient((3, 0, number), "whole"), findings={})


@pytest.fixture(scope="module")
def bodies():
    """Three whole bodies without a finding: patient, volume, organ labels (organ_index + 1)."""
    scans = []
    for number in range(3):
        patient = healthy(number)
        volume, mask = render(patient, SPACING)
        scans.append((patient, volume, TABLE[mask]))
    return scans


def axes(extent_mm, step_mm):
    return [np.arange(-extent_mm / 2 + step / 2, extent_mm / 2, step) for step in step_mm]


# --------------------------------------------------------------------------------------------------------------- solids
def test_ellipsoid_has_the_volume_of_its_formula():
    canvas = Canvas(axes(100, (2, 1, 1)))
    canvas.ellipsoid((3, -5, 8), (20, 30, 10), 77, "liver")
    expected = 4 / 3 * np.pi * 20 * 30 * 10
    inside = canvas.mask == LABELS["liver"]
    assert inside.sum() * 2 == pytest.approx(expected, rel=0.02)
    assert (canvas.volume[inside] == 77).all() and (canvas.volume[~inside] == -1000).all()
    center = [axis[indices].mean() for axis, indices in zip(canvas.axes_mm, np.nonzero(inside))]
    assert center == pytest.approx((3, -5, 8), abs=0.5)  # each axis its own: a swapped one fails


def test_tube_has_the_volume_of_a_capsule_and_of_a_cone():
    start, stop = np.array((-20.0, -10.0, -15.0)), np.array((15.0, 20.0, 5.0))
    length = np.linalg.norm(stop - start)
    canvas = Canvas(axes(120, (1, 1, 1)))
    canvas.tube([start, stop], 8, 1)
    assert (canvas.volume == 1).sum() == pytest.approx(np.pi * 64 * length + 4 / 3 * np.pi * 512, rel=0.02)
    canvas = Canvas(axes(120, (1, 1, 1)))
    canvas.tube([start, stop], (10, 2), 1)
    frustum = np.pi / 3 * length * (100 + 20 + 4)
    ends = 2 / 3 * np.pi * (1000 + 8)
    assert (canvas.volume == 1).sum() == pytest.approx(frustum + ends, rel=0.03)


def test_column_follows_its_profile():
    canvas = Canvas(axes(200, (4, 1, 1)))
    canvas.column(Profile([(-48, 10, 5, 20, 10), (48, 10, 5, 20, 10)]), 1, mirror=-1)
    inside = np.nonzero(canvas.volume == 1)
    assert len(inside[0]) * 4 == pytest.approx(np.pi * 20 * 10 * 96, rel=0.03)
    assert canvas.axes_mm[2][inside[2]].mean() == pytest.approx(-5, abs=0.5)  # on the other side
    assert canvas.axes_mm[1][inside[1]].mean() == pytest.approx(10, abs=0.5)


@pytest.mark.parametrize("z", np.linspace(-20, 20, 9))
def test_the_smallest_thing_is_met_by_a_slice(z):
    for paint in (
        lambda canvas: canvas.ellipsoid((z, 1.7, -3.1), (1, 1, 1), 500),
        lambda canvas: canvas.tube([(z, 0, 0), (z, 3, 30)], 0.5, 500),
    ):
        canvas = Canvas(axes(120, SPACING))
        paint(canvas)
        assert (canvas.volume == 500).any()


def test_only_protects_other_labels():
    canvas = Canvas(axes(60, (2, 2, 2)))
    canvas.ellipsoid((0, 0, 0), (20, 20, 20), 50, "liver")
    canvas.ellipsoid((0, 15, 0), (10, 10, 10), 5, "gallbladder", only=np.arange(256) == LABELS["liver"])
    y = canvas.axes_mm[1][np.nonzero(canvas.mask == LABELS["gallbladder"])[1]]
    assert y.min() >= 5 and y.max() <= 20  # what lies beyond the liver stays air
    canvas.ellipsoid((900, 0, 0), (20, 20, 20), 50, "liver")  # far outside: nothing happens
    assert (canvas.mask == LABELS["liver"]).sum() > 0


def test_texture_is_linear_between_lattice_points():
    axes_mm = [np.array([-3.0, 31.0, 200.0]), np.linspace(-90, 80, 5), np.linspace(-100, 110, 7)]
    texture = phantom.Texture(axes_mm, np.random.default_rng(5))
    rng = np.random.default_rng(5)
    shape = [int((stop - start) / 40) + 1 for start, stop in phantom.TEXTURE_EXTENT_MM]
    lattice = rng.standard_normal(shape, dtype=np.float32) * np.float32(rng.uniform(4, 9))
    places = [(axis - start) / 40 for axis, (start, _) in zip(axes_mm, phantom.TEXTURE_EXTENT_MM)]
    expected = map_coordinates(lattice, np.meshgrid(*places, indexing="ij"), order=1)
    assert np.std(expected) > 1
    np.testing.assert_allclose(np.stack([texture.plane(i) for i in range(3)]), expected, atol=1e-3)


# -------------------------------------------------------------------------------------------------------------- anatomy
def test_every_organ_is_there_in_a_plausible_volume(bodies):
    for patient, _, mask in bodies:
        millilitres = np.bincount(mask.ravel(), minlength=25)[1:] * np.prod(SPACING) / 1000
        for organ, value in zip(ORGANS, millilitres):
            low, high = VOLUME_RANGE_ML[organ]
            assert low <= value <= high, f"{organ}: {value:.0f} ml, patient {patient.entropy}"


def test_organs_lie_where_they_belong(bodies):
    for _, volume, mask in bodies:
        center = {organ: np.argwhere(mask == ORGANS.index(organ) + 1).mean(0) for organ in ORGANS}
        middle = center["sacrum"][2]
        assert center["liver"][2] < middle and center["spleen"][2] > middle  # width grows to the patient's left
        assert center["gallbladder"][2] < middle < center["heart"][2]
        assert middle < center["stomach"][2]
        assert center["heart"][1] < center["aorta"][1] < center["autochthon"][1]  # height grows to the back
        assert center["face"][1] < center["brain"][1] and center["gallbladder"][1] < center["kidney"][1]
        order = ["femur", "sacrum", "colon", "liver", "heart", "clavicula", "face", "brain"]
        heights = [center[organ][0] for organ in order]
        assert heights == sorted(heights)  # depth grows to the head
        hu = {organ: np.median(volume[mask == ORGANS.index(organ) + 1]) for organ in ORGANS}
        assert -900 < hu["lung"] < -750 and hu["trachea"] < -600
        assert 20 < hu["brain"] < 50 and 40 < hu["liver"] < 130 and -10 < hu["gallbladder"] < 40
        assert 30 < hu["gluteus"] < 80 and hu["femur"] > 150 and hu["rib"] > 150 and hu["hip"] > 120


def test_organs_stay_in_their_ranges_and_off_the_sides(bodies):
    """The ranges decide which findings a cut scan may have: an organ outside of its range would be cut unseen."""
    for patient, _, mask in bodies:
        z = patient.range_mm[0] + (np.arange(len(mask)) + 0.5) * SPACING[0]
        for index, organ in enumerate(ORGANS):
            if organ == "femur":
                continue
            planes = np.nonzero((mask == index + 1).any((1, 2)))[0]
            bottom, top = (end * patient.scale[0] for end in ORGAN_RANGE_MM[organ])
            assert z[planes[0]] > bottom - 14 and z[planes[-1]] < top + 14, (organ, z[planes[[0, -1]]], bottom, top)
        inner = np.zeros_like(mask, dtype=bool)
        inner[1:-1, 1:-1, 1:-1] = True
        cut = set(np.unique(mask[~inner])) - {0}
        assert cut == {ORGANS.index("femur") + 1}  # every other organ is whole


def test_labels_are_those_of_totalsegmentator():
    mask = render(healthy(0), SPACING)[1]
    names = {TOTALSEGMENTATOR_V2[label - 1] for label in np.unique(mask) if label}  # an IndexError is a false label
    for side in ("left", "right"):
        assert {f"kidney_{side}", f"hip_{side}", f"gluteus_medius_{side}", f"rib_{side}_5"} <= names
    assert {"lung_middle_lobe_right", "vertebrae_S1", "sacrum", "skull"} <= names
    assert {"vertebrae_L3", "spinal_cord", "urinary_bladder", "small_bowel"} <= names  # not of body_24


def test_volumes_hardly_depend_on_the_grid():
    patient = healthy(1)
    coarse, fine = (render(patient, spacing)[1] for spacing in (SPACING, (7.0, 3.0, 3.0)))
    for organ in ("brain", "lung", "liver", "spleen", "heart", "kidney", "gluteus", "iliopsoas"):
        values = []
        for mask, step in ((coarse, SPACING), (fine, (7.0, 3.0, 3.0))):
            values.append((TABLE[mask] == ORGANS.index(organ) + 1).sum() * np.prod(step) / 1000)
        assert values[0] == pytest.approx(values[1], rel=0.15), organ


# ------------------------------------------------------------------------------------------------------------- findings
def test_the_table_of_effects_is_complete():
    assert set(EFFECTS) == set(FINDINGS)
    assert len(FINDINGS) >= 24 and len({row.organ for row in FINDINGS.values()}) >= 12
    assert all(row.organ in ORGANS and set(row.also) <= set(ORGANS) for row in FINDINGS.values())
    assert all(0.05 <= row.prevalence <= 0.4 for row in FINDINGS.values())


@pytest.mark.parametrize("finding", list(EFFECTS))
def test_a_finding_changes_its_organ_and_nothing_far_from_it(finding, bodies):
    patient, without, mask_without = bodies[0]
    row = FINDINGS[finding]
    ill = replace(patient, findings={finding: draw_detail(patient, row)})
    volume, mask = render(ill, SPACING)
    mask = TABLE[mask]
    label = ORGANS.index(row.organ) + 1
    organ, organ_without = mask == label, mask_without == label
    changed = volume != without
    assert changed.sum() >= 40, "too small to be seen"
    # The rest of the scan has the same anatomy, texture and noise, voxel for voxel.
    assert changed.mean() < 0.05
    near = np.zeros_like(changed)
    for z, y, x in np.argwhere(organ | organ_without):
        near[max(0, z - 1) : z + 2, max(0, y - 8) : y + 9, max(0, x - 8) : x + 9] = True
    assert changed[near].sum() > 0.9 * changed.sum(), "changes lie away from the organ"
    effect = EFFECTS[finding]
    if effect in ("brighter", "darker"):
        difference = (volume.astype(int) - without)[organ & organ_without]
        brighter, darker = (difference > 15).sum(), (difference < -15).sum()
        more, less = (brighter, darker) if effect == "brighter" else (darker, brighter)
        assert more >= 30 and more > 2 * less, (more, less)
    else:
        ratio = organ.sum() / organ_without.sum()
        assert ratio > 1.1 if effect == "larger" else ratio < 0.85, ratio


def test_side_is_the_patients():
    """ "left" in the report is where width is large."""
    patient = healthy(2)
    without = render(patient, SPACING)[0].astype(int)
    for finding in ("Pleural effusion", "Kidney cyst", "Psoas abscess"):
        detail = draw_detail(patient, FINDINGS[finding])
        centers = []
        for side in ("right", "left"):
            ill = replace(patient, findings={finding: replace(detail, side=side)})
            changed = np.abs(render(ill, SPACING)[0] - without) > 20
            centers.append(np.nonzero(changed)[2].mean() - changed.shape[2] / 2)
        assert centers[0] < -3 and centers[1] > 3, (finding, centers)


def test_size_is_painted():
    patient = replace(draw_patient((3, 0, 0), "abdomen"), findings={})
    without = render(patient, (6.0, 4.0, 4.0))[0]
    changed = []
    for size in (30, 48):
        ill = replace(patient, findings={"Liver cyst": Detail(size_mm=size, count=1)})
        changed.append((render(ill, (6.0, 4.0, 4.0))[0] != without).sum())
    assert changed[1] / changed[0] == pytest.approx((48 / 30) ** 3, rel=0.25)


def test_prevalence():
    patients = [draw_patient((9, 1, number), "whole") for number in range(800)]
    for row in FINDINGS.values():
        share = np.mean([row.finding in patient.findings for patient in patients])
        assert share == pytest.approx(row.prevalence, abs=4 * np.sqrt(row.prevalence * (1 - row.prevalence) / 800))
    per_patient = [len(patient.findings) for patient in patients]
    assert 4 < np.mean(per_patient) < 9


# --------------------------------------------------------------------------------------------------- patients and scans
def test_a_patient_depends_on_its_own_numbers_alone():
    first = draw_patient((4, 0, 7))
    draw_patient((4, 0, 8))
    assert draw_patient((4, 0, 7)) == first
    assert len({draw_patient((4, 0, number)).scale for number in range(20)}) == 20
    assert draw_patient((5, 0, 7)).scale != first.scale != draw_patient((4, 1, 7)).scale


def test_patients_and_scans_vary():
    patients = [draw_patient((6, 0, number)) for number in range(400)]
    shares = {name: np.mean([patient.coverage == name for patient in patients]) for name in COVERAGES}
    assert shares["whole"] == pytest.approx(0.76, abs=0.09) and min(shares.values()) > 0
    assert 0.4 < np.mean([patient.is_enhanced for patient in patients]) < 0.6
    assert np.std([patient.scale for patient in patients], axis=0).min() > 0.01


@pytest.mark.parametrize("coverage", [name for name in COVERAGES if name != "whole"])
def test_a_cut_scan_cuts_and_has_findings_of_whole_organs_only(coverage):
    gone = {"trunk": "brain", "chest": "femur", "abdomen": "trachea", "head": "liver"}[coverage]
    for number in range(2):
        patient = draw_patient((8, 0, number), coverage)
        mask = TABLE[render(patient, SPACING)[1]]
        assert not (mask == ORGANS.index(gone) + 1).any()
        assert patient.covered_organs and gone not in patient.covered_organs
        for organ in patient.covered_organs:
            planes = np.nonzero((mask == ORGANS.index(organ) + 1).any((1, 2)))[0]
            assert planes[0] > 0 and planes[-1] < len(mask) - 1, organ
    patients = [draw_patient((8, 0, number), coverage) for number in range(60)]
    assert any(patient.findings for patient in patients)
    for patient in patients:
        assert {FINDINGS[name].organ for name in patient.findings} <= set(patient.covered_organs)


def test_a_scan_of_thin_slices_is_the_same_body():
    """At 3 x 3 mm in plane and 10 mm slices the trachea still runs from the neck to its fork, one tube."""
    mask = TABLE[render(healthy(0), (10.0, 3.0, 3.0))[1]] == ORGANS.index("trachea") + 1
    planes = np.nonzero(mask.any((1, 2)))[0]
    assert len(planes) >= 9 and (np.diff(planes) == 1).all()
