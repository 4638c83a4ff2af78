"""The organs of the procedural body and their findings, painted from the outside in.

Numbers are millimetres `(z, y, x)` in the frame of phantom.py and Hounsfield units. Places and sizes are those of an
adult on the back, rounded: organ volumes land in the ranges that tests/test_phantom.py states. Where two solids meet,
the later one wins, so the order of the calls in `paint_body` is part of the anatomy.

Numbers drawn for the healthy organ come from the stream "anatomy", always as many and in the same order; those of a
finding come from the finding's own stream. So a finding changes no voxel but its own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .phantom_canvas import LABELS, Canvas, Profile, label_table

if TYPE_CHECKING:
    from .phantom import Detail, Patient

LEFT_AND_RIGHT = ((1, "left"), (-1, "right"))  # sign of x, ending of the class name

INSIDE = 255  # label of chest and abdomen between the organs while the body is painted, 0 in the end
RIGID = ("rib_", "vertebrae_", "hip_", "sacrum", "autochthon_")
LUNG = label_table([name for name in LABELS if name.startswith("lung_")])
HEART = label_table(["heart", "atrial_appendage_left"])
NOTHING = label_table([], background=True)
# What a solid may be painted over, as a table over the labels.
CAVITY = ~(LUNG | HEART | NOTHING | label_table([name for name in LABELS if name.startswith(RIGID)]))
CAVITY_OR_WALL = CAVITY | NOTHING  # kidneys and psoas lie behind the cavity
FREE = NOTHING.copy()  # no organ yet: wall and fat
FREE[INSIDE] = True
LUNG_OR_FREE = LUNG | FREE
BRAIN, TRACHEA, GALLBLADDER = (label_table([name]) for name in ("brain", "trachea", "gallbladder"))
LIVER, SACRUM = label_table(["liver"]), label_table(["sacrum", "vertebrae_S1"])
COLON, STOMACH, AORTA = label_table(["colon"]), label_table(["stomach"]), label_table(["aorta"])
HIP = label_table(["hip_left", "hip_right"])

TRUNK = Profile(  # muscle of the trunk without the fat under the skin
    [
        (-8, 10, 0, 80, 150),
        (40, 8, 0, 95, 160),
        (90, 5, 0, 105, 166),
        (160, 4, 0, 98, 158),
        (225, 2, 0, 92, 142),
        (300, 2, 0, 96, 138),
        (380, 2, 0, 103, 144),
        (450, 3, 0, 108, 150),
        (520, 5, 0, 100, 158),
        (565, 10, 0, 82, 158),
        (590, 15, 0, 68, 112),
        (615, 22, 0, 58, 64),
        (640, 24, 0, 56, 56),
    ]
)
NECK = Profile([(625, 24, 0, 56, 56), (660, 22, 0, 56, 54), (720, 20, 0, 60, 58)])
ABDOMEN = Profile(  # inside of the abdominal wall and the pelvis
    [
        (62, 0, 0, 48, 62),
        (110, -12, 0, 66, 90),
        (170, -14, 0, 68, 112),
        (225, -14, 0, 68, 120),
        (300, -8, 0, 80, 122),
        (400, -4, 0, 86, 124),
    ]
)
CAGE = Profile(  # inside of the ribs
    [
        (318, 3, 0, 90, 128),
        (350, 3, 0, 92, 131),
        (400, 4, 0, 95, 134),
        (450, 5, 0, 93, 130),
        (500, 8, 0, 84, 116),
        (550, 13, 0, 66, 88),
        (585, 18, 0, 43, 56),
        (606, 22, 0, 22, 26),
    ]
)
SPINE = [(178, 38), (240, 30), (300, 34), (360, 48), (430, 58), (500, 60), (560, 50), (610, 38), (660, 30), (725, 26)]
SPINE_Z, SPINE_Y = np.array(SPINE, dtype=float).T
VERTEBRAE = (  # class, lower end
    [(f"vertebrae_L{5 - i}", 178 + 33 * i) for i in range(5)]
    + [(f"vertebrae_T{12 - i}", 343 + 22 * i) for i in range(12)]
    + [(f"vertebrae_C{7 - i}", 607 + 16 * i) for i in range(7)]
)
VERTEBRAE_TOP = 719
VERTEBRAL_BODIES = Profile(
    [(min(z, VERTEBRAE_TOP), y, 0, 16 - max(0, z - 350) * 0.016, 23 - max(0, z - 300) * 0.025) for z, y in SPINE]
)


def back_muscle() -> Profile:
    """The muscles on one side of the spinous processes, from the sacrum to the neck, thickest in the loin."""
    z = np.arange(84, 606, 12.0)
    ends = np.clip((z - 80) / 40, 0.35, 1) * np.clip((620 - z) / 60, 0.4, 1)
    loin = np.clip((360 - z) / 100, 0, 1)
    size_y, size_x = ends * (15 + 5 * loin), ends * (23 + 4 * loin)
    y = np.minimum(np.interp(z, SPINE_Z, SPINE_Y) + 46, 96 - size_y)
    return Profile(np.stack([z, y, np.full_like(z, 31), size_y, size_x], axis=1))


BACK_MUSCLE = back_muscle()
AORTA_PATH = np.array(
    [(468, -12, 4), (492, -26, -10), (515, -20, -12), (530, 0, 2), (522, 22, 20), (495, 38, 25), (440, 40, 25)]
    + [(390, 34, 20), (345, 22, 12), (290, 8, 6), (228, 4, 4)],
    dtype=float,
)
AORTA_RADII = np.array([15, 15, 14, 13, 13, 12.5, 12, 11.5, 11, 10, 9])
COLON_PATHS = (
    [(135, -22, -96), (150, -18, -100), (190, -5, -103), (230, 2, -104), (262, 0, -102), (280, -22, -95)],
    [(280, -22, -95), (262, -56, -78), (250, -72, -40), (244, -76, 0), (254, -72, 40), (288, -52, 80), (318, -20, 103)],
    [(318, -20, 103), (300, 18, 106), (262, 24, 106), (220, 16, 104), (178, 6, 100)],
    [(178, 6, 100), (146, -22, 76), (128, -12, 44), (138, 6, 14), (128, 30, -2), (96, 44, 0), (62, 46, 0)],
)


class Scene:
    """The canvas, the patient on it, and the HU of tissues that several organs share."""

    def __init__(self, canvas: Canvas, patient: Patient):
        self.canvas, self.patient = canvas, patient
        self.rng = patient.stream("anatomy")
        uniform, enhanced = self.rng.uniform, float(patient.is_enhanced)
        self.enhanced = enhanced
        self.fat = uniform(-112, -92)
        self.muscle = uniform(47, 58) + 8 * enhanced
        self.blood = uniform(36, 45) + enhanced * uniform(95, 150)
        self.bone = uniform(400, 540)  # shell of a bone and its inside
        self.marrow = uniform(140, 220)

    def found(self, finding: str) -> Detail | None:
        return self.patient.findings.get(finding)

    def draws(self, finding: str) -> np.random.Generator:
        """Stream of a finding, behind the three numbers that `draw_detail` took."""
        rng = self.patient.stream(finding)
        rng.random(3)
        return rng

    def jitter(self, *ranges_mm: float) -> np.ndarray:
        """A shift along (z, y, x), uniform within plus or minus each range."""
        return self.rng.uniform(-1, 1, len(ranges_mm)) * ranges_mm


def paint_body(canvas: Canvas, patient: Patient) -> None:
    """Paint the patient; later organs are painted over earlier ones."""
    scene = Scene(canvas, patient)
    paint_limbs(scene)
    paint_trunk(scene)
    paint_head(scene)
    paint_spine_and_back(scene)
    paint_lungs(scene)
    paint_trachea_and_esophagus(scene)
    paint_heart(scene)
    paint_bowel(scene)
    paint_stomach(scene)
    paint_spleen(scene)
    paint_liver_and_gallbladder(scene)
    paint_pancreas(scene)
    paint_kidneys(scene)
    paint_aorta(scene)
    paint_pelvis(scene)
    paint_shoulders(scene)
    paint_ribs(scene)
    np.copyto(canvas.mask, np.uint8(0), where=canvas.mask == INSIDE)


def paint_trunk(scene: Scene) -> None:
    """Fat under the skin, muscle, and the cavity of the abdomen as fat that later organs fill."""
    canvas, fat_mm = scene.canvas, scene.patient.fat_mm
    for profile, grow in ((TRUNK, fat_mm), (NECK, 0.4 * fat_mm)):
        canvas.column(profile, scene.fat, grow_mm=grow)
    for profile in (TRUNK, NECK):
        canvas.column(profile, scene.muscle)
    canvas.column(ABDOMEN, scene.fat, INSIDE)


def paint_limbs(scene: Scene) -> None:
    """Thighs and arms, the humerus in them; painted before the trunk, which covers their roots."""
    canvas, fat_mm, muscle = scene.canvas, scene.patient.fat_mm, scene.muscle
    bone, marrow = scene.rng.uniform(520, 700), scene.rng.uniform(60, 140)
    for sign, side in LEFT_AND_RIGHT:
        thigh = [(-140, 4, sign * 82), (45, 8, sign * 92)]
        canvas.tube(thigh, 66 + fat_mm, scene.fat)
        canvas.tube(thigh, 68, muscle)
        shift = scene.jitter(4, 8, 3)
        if scene.patient.arms_are_raised:
            upper = np.array([(562, 8, sign * 172), (640, 10, sign * 168), (840, 0, sign * 130)]) + shift
            fore = np.array([(840, 0, sign * 130), (870, -20, sign * 40)])
        else:
            upper = np.array([(562, 8, sign * 176), (500, 14, sign * 196), (262, 12, sign * 213)]) + shift
            fore = np.array([upper[-1], (60, -30, sign * 224)])
        shoulder = upper[0] + (-4, 0, sign * 4)
        canvas.ellipsoid(shoulder, np.array((44, 46, 42)) + 0.4 * fat_mm, scene.fat)
        canvas.tube(upper, np.array((42, 38, 36)) + 0.3 * fat_mm, scene.fat)
        canvas.tube(fore, np.array((36, 27)) + 0.2 * fat_mm, scene.fat)
        canvas.ellipsoid(shoulder, (42, 44, 38), muscle)
        canvas.tube(upper, (38, 35, 34), muscle)
        canvas.tube(fore, (34, 25), muscle)
        canvas.tube(fore, 9, bone)
        name = f"humerus_{side}"
        canvas.ellipsoid(upper[0], (23, 23, 23), bone - 250, name)
        canvas.tube(upper, (14, 12, 13), bone, name)
        canvas.tube(upper, 5, marrow)


def paint_head(scene: Scene) -> None:
    """Skull, brain and face. Sinusitis: fluid instead of air in the maxillary sinuses."""
    canvas, rng = scene.canvas, scene.rng
    brain, skull = rng.uniform(33, 39), rng.uniform(800, 1000)
    bumps = rng.random(6)
    canvas.ellipsoid((776, -4, 0), (84, 98, 80), scene.fat + 90)
    canvas.ellipsoid((700, -42, 0), (72, 62, 66), scene.muscle - 15)
    canvas.ellipsoid((782, 0, 0), (72, 92, 75), skull, "skull")
    # Facial bones: a block with sinuses, nose and orbits in it, and the lower jaw.
    bone = rng.uniform(260, 380)
    canvas.ellipsoid((714, -52, 0), (36, 44, 58), bone, "skull", bumps=bumps)
    jaw = [(715, 0, -50), (668, -28, -46), (655, -84, -14), (655, -84, 14), (668, -28, 46), (715, 0, 50)]
    canvas.tube(jaw, 9, bone + 300, "skull")
    canvas.ellipsoid((782, 0, 0), (64, 84, 67), brain, "brain")
    canvas.ellipsoid((728, 46, 0), (26, 30, 44), brain + 2, "brain")
    sinusitis = scene.found("Sinusitis")
    width = rng.uniform(26, 34)
    gas = rng.uniform(-985, -940)
    for sign, _ in LEFT_AND_RIGHT:
        radii = np.array((17, 17, width / 2)) * rng.uniform(0.94, 1.06)
        center = np.array((708, -62, sign * 26)) + scene.jitter(1, 2, 1)
        value = gas
        if sinusitis and sign in sinusitis.signs:
            value = scene.draws("Sinusitis").uniform(12, 42)
            radii *= 1.0 + 0.006 * (sinusitis.size_mm - 30)
        canvas.ellipsoid(center, radii, value, "skull")
        canvas.ellipsoid((742, -70, sign * 31), (15, 16, 16), 10)  # orbit
    canvas.tube([(728, -78, 0), (702, -40, 0)], 7, gas)
    paint_ventricles_and_blood(scene)


def paint_ventricles_and_blood(scene: Scene) -> None:
    """Ventriculomegaly: `size_mm` is the width of a lateral ventricle. Hemorrhage: a dense clot in a rim of edema."""
    canvas, rng = scene.canvas, scene.rng
    wide, bleeding = scene.found("Ventriculomegaly"), scene.found("Intracranial hemorrhage")
    width, length, csf = rng.uniform(9, 13), rng.uniform(26, 34), rng.uniform(2, 9)
    if wide:
        width, length = wide.size_mm, length + 18
    for sign, _ in LEFT_AND_RIGHT:
        center = (794, -4 + rng.uniform(-2, 2), sign * (7 + width / 2))
        canvas.ellipsoid(center, (5 + 0.75 * width, length, width / 2), csf, only=BRAIN)
    canvas.ellipsoid((772, 0, 0), (12, 15 + 0.4 * width, 0.28 * width), csf, only=BRAIN)
    if bleeding:
        draws = scene.draws("Intracranial hemorrhage")
        sign = bleeding.signs[0]
        center = (788 + draws.uniform(-14, 18), draws.uniform(-36, 36), sign * draws.uniform(30, 38))
        radii = bleeding.size_mm / 2 * np.array((0.8, 1.0, 0.8))
        canvas.ellipsoid(center, radii + 3, 22, only=BRAIN, bumps=draws.random(6))  # edema
        canvas.ellipsoid(center, radii, draws.uniform(66, 84), only=BRAIN, bumps=draws.random(6))


def paint_spine_and_back(scene: Scene) -> None:
    """Vertebrae, spinal cord and the muscles beside them. Atrophy: fat in place of muscle."""
    canvas, rng = scene.canvas, scene.rng
    atrophy = scene.found("Paraspinal muscle atrophy")
    bulk_mm = rng.uniform(-1.5, 1.5)
    muscle, streaks = scene.muscle, rng.random((10, 4))
    if atrophy:
        muscle = scene.draws("Paraspinal muscle atrophy").uniform(-55, -15)
    for sign, side in LEFT_AND_RIGHT:
        canvas.column(BACK_MUSCLE, muscle, f"autochthon_{side}", grow_mm=bulk_mm, mirror=sign)
    for t, side, dy, dx in streaks:
        at = 110 + 440 * t
        center = (at, np.interp(at, SPINE_Z, SPINE_Y) + 46 + 8 * (dy - 0.5), (1 if side < 0.5 else -1) * (24 + 12 * dx))
        canvas.ellipsoid(center, (24, 3, 4), scene.fat if atrophy else scene.fat + 60)
    body = rng.uniform(180, 280)
    region = canvas.column_region(VERTEBRAL_BODIES)
    if region is not None:
        box, inside = region
        heights = canvas.axes_mm[0][box[0]]
        lower = np.array([low for _, low in VERTEBRAE])
        level = np.clip(np.searchsorted(lower, heights, side="right") - 1, 0, len(VERTEBRAE) - 1)
        labels = np.array([LABELS[name] for name, _ in VERTEBRAE], dtype=np.uint8)[level]
        is_disc = heights - lower[level] < 5
        np.copyto(canvas.mask[box], labels[:, None, None], where=inside)
        np.copyto(canvas.volume[box], np.where(is_disc, 85, body).astype(np.float32)[:, None, None], where=inside)
    path = np.array([(z, y, 0) for z, y in SPINE])
    canvas.tube(path + (0, 42, 0), 6, body + 150, only=FREE)  # spinous processes as a ridge
    canvas.tube(path + (0, 25, 0), 8, 20, "spinal_cord")


def paint_lungs(scene: Scene) -> None:
    """Five lobes above the diaphragm with vessels in them. Emphysema: less density, bullae, a lower diaphragm."""
    canvas, rng = scene.canvas, scene.rng
    emphysema = scene.found("Emphysema")
    level = rng.uniform(-865, -805)
    domes = {-1: 398 + rng.uniform(-9, 9), 1: 388 + rng.uniform(-9, 9)}
    if emphysema:
        level = scene.draws("Emphysema").uniform(-955, -925)
        domes = {sign: dome - 10 for sign, dome in domes.items()}
    region = canvas.column_region(CAGE, grow_mm=-3)
    vessels = rng.random((2, 7, 4))
    if region is None:
        return
    box, inside = region
    canvas.fill(box, inside, scene.fat, INSIDE, FREE)
    z, y, x = canvas.grid(box)
    # A dome on each side that falls off to the recess between diaphragm and ribs.
    fall = (np.where(y > -12, 64, 10) * np.square((y + 12) / 86)).astype(np.float32)
    for sign, dome in domes.items():
        floor = np.maximum(dome - fall - 42 * np.square((x - sign * 66) / 72), 340)
        inside &= (z > floor) | ((x > 0) != (sign > 0))
    half_width = np.interp(z, [340, 450, 500, 560, 610], [24, 25, 30, 28, 14]).astype(np.float32)
    inside &= np.abs(x - 3) > half_width + 6 * (y > 35)
    inside &= (np.abs(x) > 15) | (y < 80)
    fissure = 462 + 0.9 * y
    lower = z < fissure
    middle_or_upper = np.where(z < 472, LABELS["lung_middle_lobe_right"], LABELS["lung_upper_lobe_right"])
    right = np.where(lower, LABELS["lung_lower_lobe_right"], middle_or_upper)
    left = np.where(lower, LABELS["lung_lower_lobe_left"], LABELS["lung_upper_lobe_left"])
    np.copyto(canvas.mask[box], np.where(x > 0, left, right).astype(np.uint8), where=inside)
    gravity = 0.28 * y  # the back of the lung carries more blood
    np.copyto(canvas.volume[box], (level + gravity).astype(np.float32), where=inside)
    vessel_hu = -420 if emphysema else -350
    for (sign, _), rows in zip(LEFT_AND_RIGHT, vessels):
        for a, b, c, d in rows:
            root = np.array((478 - 25 * d, 8, sign * 32))
            tip = np.array((400 + 160 * a, -60 + 130 * b, sign * (55 + 55 * c)))
            canvas.tube([root, 0.5 * (root + tip) + (0, 6, 0), tip], (5.5, 3, 1.8), vessel_hu, only=LUNG)
    if emphysema:
        draws = scene.draws("Emphysema")
        draws.random()
        for _ in range(emphysema.count):
            center = lung_point(draws, draws.choice((-1, 1)), upper=True)
            canvas.ellipsoid(center, draws.uniform(10, 20, 3), -995, only=LUNG)
    paint_lung_lesions(scene)


def lung_point(draws: np.random.Generator, sign: int, upper: bool = False) -> np.ndarray:
    """A place well inside the lung of one side."""
    z = draws.uniform(450 if upper else 400, 545)
    y, x = draws.uniform(-1, 1), draws.uniform(0, 1)
    shrink = np.clip((625 - z) / 150, 0.45, 1)
    return np.array((z, 8 + 52 * y * shrink, sign * (44 + 52 * x * shrink)))


def paint_lung_lesions(scene: Scene) -> None:
    """Consolidation, nodules on both sides, and effusion, whose `size_mm` is its depth behind the lung."""
    canvas = scene.canvas
    nodules, consolidation = scene.found("Lung nodule"), scene.found("Consolidation")
    effusion = scene.found("Pleural effusion")
    if consolidation:
        draws = scene.draws("Consolidation")
        for sign in consolidation.signs:
            center = lung_point(draws, sign) - (20, 0, 0)
            radii = consolidation.size_mm / 2 * draws.uniform(0.85, 1.15, 3)
            canvas.ellipsoid(center, radii, draws.uniform(15, 55), only=LUNG, bumps=draws.random(6))
            for _ in range(3):  # air bronchograms
                tip = center + draws.uniform(-0.7, 0.7, 3) * radii
                canvas.tube([center, tip], 2.2, -700, only=LUNG)
    if nodules:
        draws = scene.draws("Lung nodule")
        for index in range(nodules.count):
            center = lung_point(draws, (-1, 1)[index % 2])
            radius = nodules.size_mm / 2 * (1 if index == 0 else draws.uniform(0.7, 1))
            canvas.ellipsoid(center, (radius, radius, radius), draws.uniform(40, 110), only=LUNG)
    if effusion:
        draws = scene.draws("Pleural effusion")
        value, rise = draws.uniform(2, 16), draws.uniform(0.3, 0.6)
        box = canvas.box((330, -120, -150), (600, 130, 150))
        if box is not None:
            z, y, x = canvas.grid(box)
            # Lies behind, deepest above the diaphragm, thinner towards the apex.
            surface = 98 - effusion.size_mm + rise * np.maximum(z - 430, 0)
            inside = (y > surface) & np.logical_or.reduce([np.sign(x) == sign for sign in effusion.signs])
            canvas.fill(box, inside, value, None, LUNG)


def paint_trachea_and_esophagus(scene: Scene) -> None:
    """Secretions: `size_mm` of the lumen filled. Hiatal hernia: a pouch behind the heart, with fluid and often air."""
    canvas, rng = scene.canvas, scene.rng
    secretions, hernia = scene.found("Tracheal secretions"), scene.found("Hiatal hernia")
    radius = rng.uniform(9.5, 11.5)
    shift = scene.jitter(0, 2, 3)
    windpipe = np.array([(606, 10, 0), (560, 14, 0), (486, 20, -2)]) + shift
    wall = scene.muscle - 5
    for sign, _ in LEFT_AND_RIGHT:
        canvas.tube([windpipe[-1], (462, 20, sign * 34)], 9, wall)
        canvas.tube([windpipe[-1], (462, 20, sign * 34)], 6, -980, only=FREE)
    canvas.tube(windpipe, radius + 3, wall, only=FREE)
    canvas.tube(windpipe, radius, -985, "trachea")
    if secretions:
        draws = scene.draws("Tracheal secretions")
        start = draws.uniform(490, 596 - secretions.size_mm)
        ends = [
            np.array((z, np.interp(-z, -windpipe[:, 0], windpipe[:, 1]) + 2, windpipe[0, 2]))
            for z in (start, start + secretions.size_mm)
        ]
        canvas.tube(ends, radius * draws.uniform(0.8, 1.0), draws.uniform(5, 35), only=TRACHEA)
    gullet = np.array([(614, 24, 0), (560, 36, 3), (500, 40, 5), (430, 34, 7), (372, 14, 18)]) + shift
    canvas.tube(gullet, rng.uniform(7.5, 9), scene.muscle - 12, "esophagus")
    if rng.random() < 0.5:
        canvas.tube(gullet[1:4], 2.6, -600)
    if hernia:
        draws = scene.draws("Hiatal hernia")
        size = hernia.size_mm / 2
        center = np.array((410, 27, 15)) + draws.uniform(-1, 1, 3) * (6, 3, 8)
        canvas.ellipsoid(center, (0.85 * size, 0.78 * size, size), scene.muscle - 5, "esophagus", bumps=draws.random(6))
        canvas.ellipsoid(center, (0.7 * size, 0.62 * size, 0.82 * size), draws.uniform(8, 25))
        if draws.random() < 0.7:
            canvas.ellipsoid(center - (0, 0.3 * size, 0), (0.5 * size, 0.28 * size, 0.55 * size), -850)


def paint_heart(scene: Scene) -> None:
    """Cardiomegaly: all radii grow. Pericardial effusion: a shell of fluid `size_mm` thick. Calcified coronaries."""
    canvas, rng = scene.canvas, scene.rng
    large, effusion = scene.found("Cardiomegaly"), scene.found("Pericardial effusion")
    calcified = scene.found("Coronary artery wall calcification")
    size = rng.uniform(0.93, 1.06)
    if large:
        size = scene.draws("Cardiomegaly").uniform(1.19, 1.3)
    center = np.array((438 + 6 * (size - 1), -28, 22 + 16 * (size - 1))) + scene.jitter(4, 2, 4)
    radii = np.array((54, 47, 60)) * size
    bumps = rng.random(6)
    if effusion:
        thickness = effusion.size_mm
        fluid = scene.draws("Pericardial effusion").uniform(3, 16)
        canvas.ellipsoid(center, radii + thickness, fluid, "heart", bumps=bumps)
    canvas.ellipsoid(center, radii, 42 + 55 * scene.enhanced, "heart", bumps=bumps)
    canvas.ellipsoid(center + radii * (0.1, 0.15, 0.36), radii * (0.62, 0.5, 0.4), scene.blood, "heart")
    canvas.ellipsoid(center + radii * (0.1, -0.15, -0.38), radii * (0.65, 0.55, 0.42), scene.blood, "heart")
    canvas.tube([center + radii * (0.7, 0.1, 0.5), center + radii * (0.85, -0.25, 0.75)], 9, scene.blood,
                "atrial_appendage_left")  # fmt: skip
    canvas.tube([(560, -2, -24), (470, -8, -34)], 9, scene.blood, "superior_vena_cava")
    canvas.tube([(488, -14, 14), (478, 12, 44)], 11, scene.blood)  # pulmonary arteries
    canvas.tube([(488, -10, 8), (476, 12, -44)], 11, scene.blood)
    if calcified:
        draws = scene.draws("Coronary artery wall calcification")
        for index in range(calcified.count):
            # Along the groove between the ventricles and along the ring between atria and ventricles.
            t = draws.uniform(-1, 1)
            angle = 1.25 * t if index % 2 else 2.2 + 0.9 * t
            place = np.array((0.5 * np.cos(1.5 * t) - 0.1 * t, -0.8 * np.cos(angle), 0.78 * np.sin(angle)))
            canvas.ellipsoid(
                center + 0.95 * radii * place, draws.uniform(3, 6, 3), draws.uniform(650, 1100), only=HEART
            )


def paint_bowel(scene: Scene) -> None:
    """Small bowel and colon. Fecal loading: a wider colon full of stool instead of gas and some fluid."""
    canvas, rng = scene.canvas, scene.rng
    loaded = scene.found("Fecal loading")
    for t in rng.random((12, 4)):
        center = (105 + 145 * t[0], -54 + 66 * t[1], -66 + 132 * t[2])
        canvas.ellipsoid(center, (19, 20, 36), 34 + 25 * scene.enhanced, "small_bowel")
        canvas.ellipsoid(center, (14, 15, 29), 14 if t[3] < 0.8 else -700)
    radius = rng.uniform(17.5, 20.5)
    shift = scene.jitter(5, 3, 2)
    contents = rng.random((4, 6, 2))
    if loaded:
        radius *= scene.draws("Fecal loading").uniform(1.22, 1.32)
    for path in COLON_PATHS:
        path = np.array(path, dtype=float) + shift
        canvas.tube(path, radius, 42 + 25 * scene.enhanced, "colon", only=CAVITY)
    for path, rows in zip(COLON_PATHS, contents):
        path = np.array(path, dtype=float) + shift
        values = [-960 + 150 * b if a < 0.68 else 8 + 22 * b for a, b in rows[: len(path) - 1]]
        if loaded:
            values = [42 + 40 * b for _, b in rows[: len(path) - 1]]
        canvas.tube(path, radius - 3.5, values, only=COLON)
        if loaded:  # gas between the lumps
            draws = scene.draws("Fecal loading")
            draws.random()
            for start, stop in zip(path[:-1], path[1:]):
                center = start + draws.uniform(0.1, 0.9) * (stop - start) + draws.uniform(-6, 6, 3)
                canvas.ellipsoid(center, draws.uniform(3, 5, 3), -350, only=COLON)


def paint_stomach(scene: Scene) -> None:
    """Wall thickening: `size_mm` of wall at the cost of the lumen. Distension: a wider stomach."""
    canvas, rng = scene.canvas, scene.rng
    thick, wide = scene.found("Gastric wall thickening"), scene.found("Gastric distension")
    path = np.array([(368, 18, 62), (345, -8, 74), (315, -36, 68), (290, -48, 40), (288, -42, 8), (292, -30, -16)])
    radii = np.array((33, 34, 30, 24, 20, 12)) * rng.uniform(0.93, 1.06)
    wall = np.full(6, rng.uniform(4, 6))
    wall_hu = 42 + 30 * scene.enhanced
    content = rng.uniform(5, 25)
    gas_share = rng.uniform(0.15, 0.5)
    if wide:
        radii = radii * scene.draws("Gastric distension").uniform(1.38, 1.5)
        path = path + (-14, -4, 4)
    if thick:
        wall = np.minimum(thick.size_mm * np.array((0.6, 0.9, 1, 1, 1, 0.7)), radii - 4)
        radii, wall_hu = radii + 3, wall_hu + scene.draws("Gastric wall thickening").uniform(8, 20)
    path = path + scene.jitter(5, 4, 4)
    canvas.tube(path, radii, wall_hu, "stomach", only=CAVITY)
    canvas.tube(path, radii - wall, content, only=STOMACH)
    # Gas collects in front; the lumen is what was painted with this content a moment ago.
    box = canvas.box(path.min(0) - radii.max(), path.max(0) + radii.max())
    if box is not None:
        y = canvas.grid(box)[1]
        lumen = (canvas.mask[box] == LABELS["stomach"]) & (canvas.volume[box] == np.float32(content))
        surface = path[:, 1].min() - radii.max() + gas_share * 1.2 * radii.max()
        canvas.fill(box, lumen & (y < surface), -920, None, None)


def paint_pancreas(scene: Scene) -> None:
    """Atrophy: thinner and fatty. Cyst: in body or tail."""
    canvas, rng = scene.canvas, scene.rng
    cyst, atrophy = scene.found("Pancreatic cyst"), scene.found("Pancreatic atrophy")
    path = np.array([(280, -2, -30), (296, -14, -12), (303, -22, 8), (310, -12, 38), (322, 16, 74)])
    path = path + scene.jitter(4, 3, 3)
    radii = np.array((15, 13, 11, 12, 11)) * rng.uniform(0.93, 1.07)
    value = rng.uniform(37, 46) + scene.enhanced * rng.uniform(42, 60)
    if atrophy:
        draws = scene.draws("Pancreatic atrophy")
        radii, value = radii * draws.uniform(0.62, 0.74), draws.uniform(-62, -28)
    canvas.tube(path, radii + 3, scene.fat)
    canvas.tube(path, radii, value, "pancreas")
    if cyst:
        draws = scene.draws("Pancreatic cyst")
        t = draws.uniform(0, 0.85)
        center = path[3] + t * (path[4] - path[3]) - (0, 4, 0)
        size = cyst.size_mm / 2
        canvas.ellipsoid(center, np.array((0.9, 1, 1)) * size, 40 + 30 * scene.enhanced, "pancreas")
        canvas.ellipsoid(center, np.array((0.9, 1, 1)) * (size - 2.5), draws.uniform(0, 12), "pancreas")


def paint_kidneys(scene: Scene) -> None:
    """Cyst: bulges out of the contour. Hydronephrosis: pelvis (`size_mm` long) and calyces full of urine. Stones."""
    canvas, rng = scene.canvas, scene.rng
    stones, cyst, wide = (scene.found(name) for name in ("Kidney stone", "Kidney cyst", "Hydronephrosis"))
    value = rng.uniform(30, 37) + scene.enhanced * rng.uniform(95, 150)
    size = rng.uniform(0.94, 1.06)
    draws = {name: scene.draws(name) for name in ("Kidney stone", "Kidney cyst", "Hydronephrosis")}
    for sign, side in LEFT_AND_RIGHT:
        name = f"kidney_{side}"
        center = np.array((300 + 4 * sign, 46, sign * 62)) + scene.jitter(5, 3, 3)
        radii = np.array((53, 27, 28)) * size * rng.uniform(0.97, 1.03)
        canvas.ellipsoid(center, radii + 8, scene.fat, only=FREE)
        canvas.ellipsoid(center, radii, value, name)
        hilum = center - (0, 4, sign * 12)
        canvas.ellipsoid(hilum, (13, 4, 5), scene.fat + 50, name)
        if cyst and sign in cyst.signs:
            rng_cyst = draws["Kidney cyst"]
            angle, height = rng_cyst.uniform(-0.6, 1.2), rng_cyst.uniform(-0.75, 0.75)
            radius = cyst.size_mm / 2
            place = center + (height * radii[0], -0.8 * radii[1] * np.sin(angle), sign * 0.8 * radii[2] * np.cos(angle))
            canvas.ellipsoid(place, (radius, radius, radius), rng_cyst.uniform(-2, 10), name, only=CAVITY_OR_WALL)
        if wide and sign in wide.signs:
            rng_wide = draws["Hydronephrosis"]
            half, fluid = wide.size_mm / 2, rng_wide.uniform(0, 9)
            canvas.ellipsoid(hilum, (half, 0.62 * half, 0.72 * half), fluid, name)
            for height in (-0.9, 0, 0.9):  # calyces
                calyx = center + (height * half, 0, sign * 8)
                canvas.ellipsoid(calyx, (12, 11, 13), fluid, name)
            canvas.tube([hilum - (10, 6, sign * 8), (250, 22, sign * 44), (215, 10, sign * 40)], 7, fluid)  # ureter
        if stones and sign in stones.signs:
            rng_stone = draws["Kidney stone"]
            for index in range(stones.count):
                radius = stones.size_mm / 2 * (1 if index == 0 else rng_stone.uniform(0.6, 1))
                place = center + rng_stone.uniform(-1, 1, 3) * (32, 8, 6) - (0, 0, sign * 4)
                canvas.ellipsoid(place, (radius, radius, radius), rng_stone.uniform(700, 1300), name)


def paint_spleen(scene: Scene) -> None:
    """Splenomegaly: `size_mm` is the length from pole to pole."""
    canvas, rng = scene.canvas, scene.rng
    large = scene.found("Splenomegaly")
    radii = np.array((55, 39, 30)) * rng.uniform(0.92, 1.07)
    center = np.array((332, 36, 88)) + scene.jitter(5, 4, 3)
    if large:
        radii = np.array((0.5, 0.36, 0.29)) * large.size_mm
        center = center + (-12, -14, -14)
    value = rng.uniform(44, 52) + scene.enhanced * rng.uniform(52, 75)
    canvas.ellipsoid(center, radii, value, "spleen", only=CAVITY, bumps=rng.random(6))


def paint_liver_and_gallbladder(scene: Scene) -> None:
    """Steatosis: lower HU of the whole liver. Cysts in the right lobe. Gallstones on the floor of the gallbladder."""
    canvas, rng = scene.canvas, scene.rng
    fatty, cysts, stones = (scene.found(name) for name in ("Hepatic steatosis", "Liver cyst", "Gallstones"))
    value = rng.uniform(54, 66) + scene.enhanced * rng.uniform(42, 58)
    if fatty:
        value = scene.draws("Hepatic steatosis").uniform(14, 28) + 20 * scene.enhanced
    size = rng.uniform(0.95, 1.05)
    right = np.array((335, -6, -62)) + scene.jitter(4, 3, 2)
    radii = np.array((76, 74, 70)) * size
    bumps = rng.random((2, 6))
    canvas.ellipsoid(right, radii, value, "liver", only=CAVITY, bumps=bumps[0])
    canvas.ellipsoid(right + (24, -34, 66), np.array((36, 34, 62)) * size, value, "liver", only=CAVITY, bumps=bumps[1])
    for tip in rng.uniform(-1, 1, (5, 3)):  # hepatic and portal veins
        canvas.tube(
            [right + (10, 6, 34), right + tip * (50, 45, 45)], (6, 3), value + 3 + 22 * scene.enhanced, only=LIVER
        )
    if cysts:
        draws = scene.draws("Liver cyst")
        for index in range(cysts.count):
            radius = cysts.size_mm / 2 * (1 if index == 0 else draws.uniform(0.6, 0.95))
            center = right + draws.uniform(-0.52, 0.52, 3) * radii
            canvas.ellipsoid(center, (radius, radius, radius), draws.uniform(-10, 2), only=LIVER)
    bile = rng.uniform(4, 16)
    center = np.array((284, -50, -52)) + scene.jitter(4, 3, 4)
    radii = np.array((28, 17, 17)) * rng.uniform(0.92, 1.1)
    canvas.ellipsoid(center, radii + 2, 40 + 20 * scene.enhanced, "gallbladder")
    canvas.ellipsoid(center, radii, bile, "gallbladder")
    if stones:
        draws = scene.draws("Gallstones")
        for index in range(stones.count):
            radius = stones.size_mm / 2 * (1 if index == 0 else draws.uniform(0.6, 1))
            place = center + draws.uniform(-1, 1, 3) * (0.55, 0.2, 0.5) * radii + (0, 0.35 * radii[1], 0)
            canvas.ellipsoid(place, (radius, radius, radius), draws.uniform(250, 700), only=GALLBLADDER)


def paint_aorta(scene: Scene) -> None:
    """Dilatation: to `size_mm` in the ascending, descending or abdominal part. Calcification: plaques in the wall."""
    canvas, rng = scene.canvas, scene.rng
    wide, calcified = scene.found("Aortic dilatation"), scene.found("Arterial wall calcification")
    scale = rng.uniform(0.93, 1.07)
    path, radii = AORTA_PATH + scene.jitter(3, 2, 2), AORTA_RADII * scale
    value = scene.blood + 12 * scene.enhanced
    canvas.tube([(375, 22, -22), (228, 14, -20)], 10, scene.blood, "inferior_vena_cava", only=CAVITY_OR_WALL)
    for sign, side in LEFT_AND_RIGHT:
        canvas.tube([(228, 4, 4), (190, 6, sign * 30), (130, -20, sign * 62)], 6, value, f"iliac_artery_{side}")
    if wide:
        draws = scene.draws("Aortic dilatation")
        first, last = ((0, 2), (5, 7), (7, 10))[int(draws.integers(3))]  # ascending, descending, abdominal
        radii = radii.copy()
        radii[first : last + 1] = wide.size_mm / 2 * np.where(np.arange(first, last + 1) == last, 0.75, 1)
        path = path.copy()
        path[first : last + 1, 1] -= 0.5 * (wide.size_mm / 2 - 12)  # the spine does not give way
        path[first : last + 1, 2] += 0.35 * (wide.size_mm / 2 - 12) * (-1 if first == 0 else 1)
    canvas.tube(path, radii, value, "aorta")
    if calcified:
        draws = scene.draws("Arterial wall calcification")
        for _ in range(calcified.count):
            piece, share, angle = draws.integers(len(path) - 1), draws.random(), draws.uniform(0, 6.28)
            center = path[piece] + share * (path[piece + 1] - path[piece])
            radius = 0.88 * (radii[piece] + share * (radii[piece + 1] - radii[piece]))
            place = center + (0, radius * np.sin(angle), radius * np.cos(angle))
            canvas.ellipsoid(place, draws.uniform(3, 5.5, 3), draws.uniform(650, 1100), only=AORTA)


def paint_pelvis(scene: Scene) -> None:
    """Hip bones, femur, sacrum, gluteal muscles and iliopsoas with their findings; the bladder."""
    canvas, rng = scene.canvas, scene.rng
    atrophy, sclerosis = scene.found("Gluteal muscle atrophy"), scene.found("Sclerotic lesion")
    abscess, mass = scene.found("Psoas abscess"), scene.found("Sacral mass")
    gluteal = psoas = scene.muscle
    if atrophy:
        gluteal = scene.draws("Gluteal muscle atrophy").uniform(-62, -22)
    bulk, bone, marrow = rng.uniform(0.93, 1.06), scene.bone, scene.marrow
    bladder = np.array((30, 34, 38)) * rng.uniform(0.8, 1.15)
    canvas.ellipsoid((92, -34, 0), bladder, rng.uniform(0, 10), "urinary_bladder")
    for sign, side in LEFT_AND_RIGHT:
        bumps = rng.random(6)
        canvas.ellipsoid(
            (85, 72, sign * 74), np.array((84, 32, 52)) * bulk, gluteal, f"gluteus_maximus_{side}", bumps=bumps
        )
        canvas.ellipsoid((155, 22, sign * 124), np.array((56, 46, 20)) * bulk, gluteal, f"gluteus_medius_{side}",
                         tilt=(2, 1, -0.35 * sign))  # fmt: skip
        canvas.ellipsoid((135, 4, sign * 112), np.array((38, 30, 11)) * bulk, gluteal, f"gluteus_minimus_{side}")
        path = np.array([(335, 34, 24), (262, 26, 42), (190, 8, 60), (120, -28, 82), (70, -36, 96), (22, -8, 106)])
        path = path * (1, 1, sign)
        canvas.tube(path, np.array((9, 20, 23, 20, 17, 10)) * bulk, psoas, f"iliopsoas_{side}")
        canvas.ellipsoid((168, 4, sign * 84), np.array((44, 34, 14)) * bulk, psoas, f"iliopsoas_{side}",
                         tilt=(2, 1, -0.5 * sign))  # fmt: skip
        # Iliac wing from the sacrum outwards and forwards, socket, ischium, pubis: a dense shell round marrow.
        name = f"hip_{side}"
        wing = {"center": (158, 22, sign * 92), "tilt": (2, 1, -0.62 * sign)}
        canvas.ellipsoid(radii=(62, 56, 11), hu=bone, label=name, **wing)
        canvas.ellipsoid((82, -2, sign * 94), (34, 30, 28), bone, name)
        canvas.tube([(70, 20, sign * 80), (18, 34, sign * 58)], (16, 15), bone, name)
        canvas.tube([(84, -24, sign * 80), (66, -58, sign * 8)], 9, bone, name)
        canvas.ellipsoid(radii=(56, 50, 7), hu=marrow, label=None, only=HIP, **wing)
        canvas.ellipsoid((82, -2, sign * 94), (28, 24, 23), marrow, only=HIP)
        canvas.tube([(70, 20, sign * 80), (18, 34, sign * 58)], (11, 10), marrow, only=HIP)
        name = f"femur_{side}"
        shaft = [(56, 12, sign * 132), (20, 8, sign * 124), (-140, 2, sign * 108)]
        canvas.tube([(82, -2, sign * 94), (60, 8, sign * 126)], (23, 16), bone - 120, name)
        canvas.ellipsoid((52, 14, sign * 132), (22, 20, 18), bone - 80, name)
        canvas.tube(shaft, 14, bone + 300, name)
        canvas.tube(shaft, 6, marrow - 80)
    if sclerosis:
        draws = scene.draws("Sclerotic lesion")
        for sign in sclerosis.signs:
            for index in range(sclerosis.count):
                radius = sclerosis.size_mm / 2 * (1 if index == 0 else draws.uniform(0.7, 1))
                y = draws.uniform(-20, 52)
                place = (draws.uniform(112, 198), y, sign * (92 - 0.62 * (y - 22)))
                canvas.ellipsoid(place, (radius, radius, radius), draws.uniform(900, 1250), only=HIP)
    if abscess:
        draws = scene.draws("Psoas abscess")
        sign, side = abscess.signs[0], "left" if abscess.signs[0] > 0 else "right"
        t = draws.uniform(0, 1)
        center = np.array((262, 22, sign * 46)) * (1 - t) + np.array((190, 4, sign * 64)) * t
        radii = abscess.size_mm / 2 * np.array((1.0, 0.72, 0.72))
        canvas.ellipsoid(center, radii, 60 + 20 * scene.enhanced, f"iliopsoas_{side}", only=CAVITY_OR_WALL)
        canvas.ellipsoid(center, radii - 2.5, draws.uniform(0, 14), only=label_table([f"iliopsoas_{side}"]))
    for name, center, radii in (("sacrum", (122, 66, 0), (48, 20, 50)), ("vertebrae_S1", (176, 46, 0), (19, 19, 46))):
        canvas.ellipsoid(center, radii, bone - 60, name)
        canvas.ellipsoid(center, np.array(radii) - 5, marrow, name)
    if mass:
        draws = scene.draws("Sacral mass")
        size = mass.size_mm / 2
        center = np.array((132, 62, 0)) + draws.uniform(-1, 1, 3) * (10, 3, 12)
        canvas.ellipsoid(
            center, (0.85 * size, 0.75 * size, size), draws.uniform(25, 50), only=SACRUM, bumps=draws.random(6)
        )


def paint_shoulders(scene: Scene) -> None:
    """Scapula, clavicle, sternum."""
    canvas, rng = scene.canvas, scene.rng
    bone = scene.bone
    lift = rng.uniform(-3, 5)
    for sign, side in LEFT_AND_RIGHT:
        name = f"scapula_{side}"
        blade = {"center": (508, 78, sign * 98), "tilt": (1, 2, -0.5 * sign)}
        canvas.ellipsoid(radii=(72, 7, 46), hu=bone - 80, label=name, only=FREE, **blade)
        canvas.tube([(560, 62, sign * 104), (578, 22, sign * 158)], 8, bone, name)  # spine and acromion
        canvas.ellipsoid((556, 22, sign * 146), (16, 12, 10), bone - 60, name)  # glenoid
        path = np.array([(572, -46, sign * 14), (576 + lift, -44, sign * 60), (584 + lift, 4, sign * 150)])
        canvas.tube(path, 6.5, bone + 80, f"clavicula_{side}")
    canvas.tube([(565, -62, 0), (510, -84, 0), (430, -97, 0)], (10, 10, 8), bone - 150, "sternum", only=FREE)


def paint_ribs(scene: Scene) -> None:
    """Ribs as bands of the cage's shell that fall off to the front; in front of that their cartilage.

    Fracture: a gap with callus around it, in several ribs.
    """
    canvas, rng = scene.canvas, scene.rng
    fractures = scene.found("Rib fracture")
    bone, phase = rng.uniform(340, 460), rng.uniform(0, 22)
    outer, inner = canvas.column_region(CAGE, grow_mm=6.5), canvas.column_region(CAGE, grow_mm=-2.5)
    if outer is None:
        return
    box, shell = outer
    if inner is not None:
        offset = tuple(slice(i.start - o.start, i.stop - o.start) for i, o in zip(inner[0], box))
        shell[offset] &= ~inner[1]
    z, y, x = canvas.grid(box)
    pitch = 22.0
    height = z + 0.55 * (80 - y) - phase  # of the rib's root at the spine
    number = np.floor((592 - height) / pitch).astype(np.int16) + 1
    is_bone = (np.mod(592 - height, pitch) < 0.52 * pitch) & (number >= 1) & (number <= 12)
    in_front = y < -50 + 3 * np.clip(number - 6, 0, 6)
    floating = (number > 10) & (y < 30)
    free = LUNG_OR_FREE[canvas.mask[box]] & shell & is_bone & ~floating & (np.abs(x) > 22)
    cartilage, rib = free & in_front & (number <= 10), free & ~in_front
    labels = np.where(x > 0, LABELS["rib_left_1"], LABELS["rib_right_1"]) + np.clip(number, 1, 12) - 1
    np.copyto(canvas.mask[box], labels.astype(np.uint8), where=rib)
    np.copyto(canvas.volume[box], np.float32(bone), where=rib)
    np.copyto(canvas.mask[box], np.uint8(LABELS["costal_cartilages"]), where=cartilage)
    np.copyto(canvas.volume[box], np.float32(100), where=cartilage)
    if fractures:
        draws = scene.draws("Rib fracture")
        for index in range(fractures.count):
            sign = fractures.signs[index % len(fractures.signs)]
            at, angle = draws.uniform(385, 540), draws.uniform(-0.5, 0.8)
            cy, _, ry, rx = (float(values[0]) for values in CAGE.at(np.array([at])))
            place = np.array((at, cy + (ry + 2) * np.sin(angle), sign * (rx + 2) * np.cos(angle)))
            number = int(np.clip((592 - (at + 0.55 * (80 - place[1]) - phase)) // pitch + 1, 1, 10))
            name = f"rib_{'left' if sign > 0 else 'right'}_{number}"
            canvas.ellipsoid(place, (13, 12, 12), draws.uniform(850, 1150), name)
            canvas.ellipsoid(place, (5, 3.5, 3.5), 40)  # the gap
