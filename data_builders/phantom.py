"""A procedural body with the organs of body_24, described in millimetres and painted on any voxel grid.

No patient data and no trained model goes in: organs are ellipsoids, tubes and columns of plausible place, size and HU,
so the truth of every voxel and every finding is known. It is a test bed for training and evaluation, not a simulator.

(1) `draw_patient`  seed -> `Patient`: size, fat, contrast phase, part of the body that is scanned, findings with side,
                    size and number. No voxel grid enters here.
(2) `render`        `Patient` and a spacing -> volume in HU and mask of TotalSegmentator v2 classes.
(3) `lesion_mask`   where one finding of the patient was painted, by comparison with the patient without it.

Every random choice hangs on a stream of its own (`Patient.stream`): anatomy, each finding, texture and noise draw from
different generators. The same patient with one finding less differs in the voxels of that finding alone.

Frame of the body: millimetres along `(z, y, x)`, z to the head from the seat (ischial tuberosity = 0, vertex = 860), y
to the back from the middle of the trunk, x to the patient's left from the midline: axis order and directions of every
array in this project. A `Canvas` holds the voxel centres in this frame, divided by the patient's scale.

What the masks hold where usage differs: pleural and pericardial effusion stay in the masks of lung and heart, a hiatal
hernia counts as esophagus, cysts and a dilated pelvis as kidney, aerated and filled maxillary sinuses as skull.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

import numpy as np
import yaml

from .phantom_anatomy import paint_body
from .phantom_canvas import Canvas

FINDINGS_FILE = Path(__file__).resolve().parent.parent / "hub_configs" / "synthetic" / "findings.yaml"

SIDES = {"right": -1, "left": 1}  # sign of x

# Lowest and highest z of every organ in the frame of the body, mm. A finding is drawn only where the scan holds it all.
ORGAN_RANGE_MM = {
    "face": (640, 860),
    "brain": (720, 855),
    "esophagus": (365, 620),
    "trachea": (480, 610),
    "lung": (335, 610),
    "heart": (370, 515),
    "kidney": (240, 370),
    "stomach": (245, 420),
    "liver": (250, 415),
    "gallbladder": (250, 320),
    "pancreas": (265, 345),
    "spleen": (265, 420),
    "colon": (40, 365),
    "aorta": (220, 550),
    "rib": (320, 600),
    "humerus": (240, 590),
    "scapula": (425, 595),
    "clavicula": (560, 600),
    "femur": (-400, 110),  # always cut: no scan reaches the knees
    "hip": (0, 225),
    "sacrum": (70, 200),
    "gluteus": (-5, 225),
    "iliopsoas": (10, 345),
    "autochthon": (85, 605),
}
RANGE_MARGIN_MM = 24.0  # more than one of the thickest slices between an organ and the end of the scan

# Share of scans and the range of the lower and the upper end, mm. None: the end of a whole-body scan.
COVERAGES = {
    "whole": (0.76, None, None),
    "trunk": (0.06, None, (615, 650)),
    "chest": (0.08, (210, 330), (615, 660)),
    "abdomen": (0.08, None, (410, 490)),
    "head": (0.02, (540, 620), None),
}
WHOLE_BODY_MM = (-52.0, 890.0)
FIELD_OF_VIEW_MM = (384.0, 512.0)  # height, width
TEXTURE_LATTICE_MM = 40.0
TEXTURE_EXTENT_MM = ((-120.0, 1000.0), (-320.0, 320.0), (-360.0, 360.0))


@dataclass(frozen=True)
class Finding:
    """A row of hub_configs/synthetic/findings.yaml; the file's head says what the fields mean."""

    finding: str
    organ: str
    prevalence: float
    nouns: tuple[str, ...]
    described: tuple[str, ...]
    plural: tuple[str, ...] = ()
    sides: tuple[str, ...] = ()
    size_mm: tuple[int, int] | None = None
    count: tuple[int, int] | None = None
    also: tuple[str, ...] = ()


@dataclass(frozen=True)
class Detail:
    """One finding of one patient: what is painted and what the report may say."""

    side: str | None = None  # "left", "right", "both" or None for an unpaired organ
    size_mm: int | None = None
    count: int | None = None

    @property
    def signs(self) -> tuple[int, ...]:
        """Signs of x of the affected sides; an unpaired organ has none."""
        if self.side is None:
            return ()
        return (-1, 1) if self.side == "both" else (SIDES[self.side],)


@dataclass(frozen=True)
class Patient:
    """Everything that decides a scan apart from its voxel grid. Lengths in mm, triples along `(z, y, x)`."""

    entropy: tuple[int, ...]
    sex: str
    age: int
    scale: tuple[float, float, float]
    offset_mm: tuple[float, float]  # of the body in the field of view along (y, x)
    fat_mm: float
    is_enhanced: bool
    coverage: str
    range_mm: tuple[float, float]  # lower and upper end of the scan
    field_of_view_mm: tuple[float, float]  # height, width
    findings: dict[str, Detail] = field(default_factory=dict)

    def stream(self, name: str) -> np.random.Generator:
        """Generator of one purpose. The streams of two purposes, or of two patients, are independent."""
        return np.random.default_rng([*self.entropy, _stream_number(name)])

    @property
    def covered_organs(self) -> tuple[str, ...]:
        """Organs that lie wholly inside the scan."""
        low, high = (end / self.scale[0] for end in self.range_mm)
        return tuple(
            organ
            for organ, (bottom, top) in ORGAN_RANGE_MM.items()
            if low + RANGE_MARGIN_MM <= bottom
            and top + RANGE_MARGIN_MM <= high
            and not (organ == "humerus" and self.arms_are_raised)
        )

    @property
    def arms_are_raised(self) -> bool:
        return self.coverage in ("chest", "abdomen")


@cache
def load_findings() -> tuple[Finding, ...]:
    """The findings of the synthetic set, in the order of the label CSV's columns."""
    rows = yaml.safe_load(FINDINGS_FILE.read_text(encoding="utf-8"))["findings"]
    tuples = ("nouns", "described", "plural", "sides", "size_mm", "count", "also")
    return tuple(Finding(**{key: tuple(row[key]) if key in tuples else row[key] for key in row}) for row in rows)


@cache
def _stream_number(name: str) -> int:
    purposes = ("patient", "findings", "anatomy", "texture", "noise", "report", "file")
    return (*purposes, *(row.finding for row in load_findings())).index(name)


def draw_patient(entropy: Sequence[int], coverage: str | None = None) -> Patient:
    """Draw body, scan and findings of a patient.

    Args:
        entropy: Whole numbers that name the patient, e.g. (seed of the set, split, number in the split). Patients with
            other numbers are independent, whatever the order in which they are drawn.
        coverage: A key of `COVERAGES` to force what is scanned; drawn if None.
    """
    entropy = tuple(int(number) for number in entropy)
    start = Patient(entropy, "F", 0, (1, 1, 1), (0, 0), 0, False, "whole", (0, 0), (0, 0))
    rng = start.stream("patient")
    sex = "M" if rng.random() < 0.55 else "F"
    age = int(np.clip(rng.normal(58, 15), 20, 92))
    height = np.clip(rng.normal(0.97 if sex == "M" else 0.945, 0.015), 0.92, 1.0)
    girth = np.clip(rng.normal(1.0, 0.04), 0.92, 1.07)
    scale = (height, girth * rng.uniform(0.97, 1.03), girth * rng.uniform(0.985, 1.015))
    offset_mm = (rng.uniform(-12, 12), rng.uniform(-7, 7))
    fat_mm = rng.uniform(8, 26)
    is_enhanced = bool(rng.random() < 0.5)
    drawn = str(rng.choice(list(COVERAGES), p=[share for share, _, _ in COVERAGES.values()]))
    ends = rng.random(2)
    coverage = coverage or drawn
    whole = (WHOLE_BODY_MM[0], WHOLE_BODY_MM[1] * height)
    limits = COVERAGES[coverage][1:]
    range_mm = tuple(
        float(end) if limit is None else float(height * (limit[0] + share * (limit[1] - limit[0])))
        for end, limit, share in zip(whole, limits, ends)
    )
    field_of_view_mm = (FIELD_OF_VIEW_MM[0] + rng.uniform(-10, 10), FIELD_OF_VIEW_MM[1] + rng.uniform(-8, 0))
    patient = Patient(
        entropy,
        sex,
        age,
        tuple(map(float, scale)),
        offset_mm,
        fat_mm,
        is_enhanced,
        coverage,
        range_mm,
        field_of_view_mm,
    )
    chances = patient.stream("findings").random(len(load_findings()))
    covered = patient.covered_organs
    for row, chance in zip(load_findings(), chances):
        if chance < row.prevalence and row.organ in covered:
            patient.findings[row.finding] = draw_detail(patient, row)
    return patient


def draw_detail(patient: Patient, row: Finding) -> Detail:
    """Side, size and number of a finding in this patient; the rest of its stream is left to the painter."""
    rng = patient.stream(row.finding)
    side, size, count = rng.random(3)
    whole_number = lambda share, limits: int(limits[0] + share * (limits[1] - limits[0] + 1))  # noqa: E731
    return Detail(
        side=row.sides[int(side * len(row.sides))] if row.sides else None,
        size_mm=whole_number(size, row.size_mm) if row.size_mm else None,
        count=whole_number(count, row.count) if row.count else None,
    )


# ------------------------------------------------------------------------------------------------------------ rendering
def render(patient: Patient, spacing: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Paint a patient on a voxel grid.

    Args:
        patient: From `draw_patient`.
        spacing: `(depth, height, width)` in mm.

    Returns:
        Volume in HU, int16, and mask of TotalSegmentator v2 labels, uint8; both `(depth, height, width)`, LPS axes.
    """
    canvas = paint(patient, spacing)
    return finish(canvas, patient), canvas.mask


def paint(patient: Patient, spacing: Sequence[float]) -> Canvas:
    """The patient as painted: mask as of `render`, HU before partial volume, texture and noise."""
    spacing = np.asarray(spacing, dtype=np.float64)
    height_mm, width_mm = patient.field_of_view_mm
    extent = np.array((patient.range_mm[1] - patient.range_mm[0], height_mm, width_mm))
    shape = np.maximum(np.rint(extent / spacing), 2).astype(int)
    starts = (patient.range_mm[0], -height_mm / 2 - patient.offset_mm[0], -width_mm / 2 - patient.offset_mm[1])
    axes_mm = [
        (start + (np.arange(size) + 0.5) * step) / scale
        for start, size, step, scale in zip(starts, shape, spacing, patient.scale)
    ]
    canvas = Canvas(axes_mm)
    paint_body(canvas, patient)
    return canvas


def without(patient: Patient, finding: str) -> Patient:
    """The same patient with one finding less."""
    return replace(patient, findings={name: detail for name, detail in patient.findings.items() if name != finding})


def lesion_mask(patient: Patient, finding: str, spacing: Sequence[float], canvas: Canvas | None = None) -> np.ndarray:
    """The voxels of one finding: those whose painted HU or class are others without it.

    A finding that changes a whole organ (steatosis) or its outline (splenomegaly) is all that it changes.

    Args:
        patient: With the finding.
        finding: A key of `patient.findings`.
        spacing: As for `render`.
        canvas: Of `paint`, if it is there already.

    Returns:
        bool `(depth, height, width)`.
    """
    canvas = canvas or paint(patient, spacing)
    other = paint(without(patient, finding), spacing)
    return (canvas.volume != other.volume) | (canvas.mask != other.mask)


def finish(canvas: Canvas, patient: Patient) -> np.ndarray:
    """Painted HU -> scanned HU, int16: partial volume in plane, texture and noise, slice by slice."""
    texture = Texture(canvas.axes_mm, patient.stream("texture"))
    noise = patient.stream("noise")
    sigma = np.float32(noise.uniform(9, 18))
    scanned = np.empty(canvas.volume.shape, dtype=np.int16)
    for index, plane in enumerate(canvas.volume):  # a slice stays in the cache through all steps
        for values in (plane, plane.T):  # (1, 2, 1) / 4 along height, then width
            middle = values[:-2] + values[2:]
            middle *= 0.25
            middle += 0.5 * values[1:-1]
            values[1:-1] = middle
        plane += texture.plane(index)
        grain = noise.standard_normal(plane.shape, dtype=np.float32)
        grain *= sigma
        plane += grain
        np.clip(plane, -1024, 3071, out=plane)
        scanned[index] = np.rint(plane, out=plane)
    return scanned


class Texture:
    """Uneven HU of a few units, about 40 mm wide: random values on a lattice of the body's frame, linear in between."""

    def __init__(self, axes_mm: Sequence[np.ndarray], rng: np.random.Generator):
        shape = [int((stop - start) / TEXTURE_LATTICE_MM) + 1 for start, stop in TEXTURE_EXTENT_MM]
        values = rng.standard_normal(shape, dtype=np.float32) * np.float32(rng.uniform(4, 9))
        for axis in (2, 1):
            lower, share = self._place(axes_mm, axis, shape)
            share = share.reshape([-1 if a == axis else 1 for a in range(3)])
            values = np.take(values, lower, axis) * (1 - share) + np.take(values, lower + 1, axis) * share
        self.values = values  # (lattice depth, height, width)
        self.lower, self.share = self._place(axes_mm, 0, shape)

    @staticmethod
    def _place(axes_mm, axis: int, shape: list[int]) -> tuple[np.ndarray, np.ndarray]:
        place = np.clip((axes_mm[axis] - TEXTURE_EXTENT_MM[axis][0]) / TEXTURE_LATTICE_MM, 0, shape[axis] - 1.001)
        lower = place.astype(int)
        return lower, (place - lower).astype(np.float32)

    def plane(self, index: int) -> np.ndarray:
        """Texture `(height, width)` of one slice."""
        lower, share = self.lower[index], self.share[index]
        return (1 - share) * self.values[lower] + share * self.values[lower + 1]
