"""What looks wrong in a processed split, the loudest first: each with how many, examples, effect, and how to mend it.

Silent faults are looked for by what must be true of a body, whatever the scanner: the liver lies to the right of the
spleen and below the lungs, the heart in front of the back muscles, lungs hold air, a liver has one to two litres. A
rule speaks only where its evidence is clear, because a doctor who cries wolf is not read.

    loud      training on it is wasted or wrong
    warning   look at it before training
    note      known from now on, often all right
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import permutations, product

import numpy as np

from modeling_fvlm.captions import normal_caption
from modeling_fvlm.geometry import AXES
from modeling_fvlm.organs import NUMBERINGS

from .cases import SPLITS, counted
from .doctor import Examination, text_hash
from .run_cases import PLAUSIBLE_MEDIAN_HU
from .summary import skipped_and_excluded

LEVELS = ("loud", "warning", "note")
TRAIN = SPLITS[0]
NUM_EXAMPLES = 8

# Volume of a whole organ of an adult as a segmentation cuts it, ml, both sides together: (lowest, highest). Facts: the
# reference masses of ICRP Publication 89 (Ann. ICRP 32 (3-4), 2002; brain 1450 / 1300 g, heart with blood 840 / 620,
# liver 1800 / 1400, stomach with contents 400 / 370, spleen 150 / 130, kidneys 310 / 275, pancreas 140 / 120,
# gallbladder with bile 68 / 56, esophagus 40 / 35, adrenals 14 / 13, man / woman), air in the lungs by the total lung
# capacity of adults (4 to 8 l), muscles and bones by what TotalSegmentator finds in whole-body scans. The ranges are
# these made three to ten times as wide: atrophy, splenomegaly, ascites, a full bladder, one kidney, a scan in
# expiration lie within, an organ read under the wrong number mostly does not.
ADULT_VOLUME_ML = {
    "face": (100, 2500),
    "brain": (700, 1900),
    "esophagus": (8, 200),
    "trachea": (8, 120),
    "lung": (800, 10000),
    "heart": (250, 2000),
    "kidney": (60, 1200),
    "stomach": (40, 3000),
    "liver": (500, 4500),
    "gallbladder": (2, 300),
    "pancreas": (8, 250),
    "spleen": (20, 2500),
    "colon": (100, 5000),
    "aorta": (40, 800),
    "rib": (100, 1000),
    "humerus": (50, 700),
    "scapula": (60, 500),
    "clavicula": (10, 150),
    "femur": (50, 1600),
    "hip": (250, 1300),
    "sacrum": (80, 600),
    "gluteus": (300, 3500),
    "iliopsoas": (150, 1500),
    "autochthon": (250, 2500),
    "adrenal_gland": (1, 60),
    "duodenum": (10, 300),
    "iliac_artery": (5, 150),
    "iliac_vein": (5, 200),
    "inferior_vena_cava": (15, 300),
    "portal_and_splenic_vein": (5, 150),
    "pulmonary_artery": (15, 300),
    "small_bowel": (80, 3000),
    "urinary_bladder": (10, 2000),
    "cervical_vertebrae": (20, 300),
    "thoracic_vertebrae": (150, 900),
    "lumbar_vertebrae": (120, 800),
}

# Median HU that the organ can have, ill or healthy, with or without contrast: builder's own three, and more, equally
# wide. Organs that hold gas, stool or contrast by turns (stomach, bowel, bladder) tell nothing and are left out.
MEDIAN_HU = PLAUSIBLE_MEDIAN_HU | {
    "trachea": (-1040, 0),
    "esophagus": (-450, 400),
    "heart": (-50, 650),
    "aorta": (-50, 1000),
    "spleen": (-60, 400),
    "kidney": (-60, 500),
    "brain": (-50, 160),
    "gluteus": (-120, 180),
    "iliopsoas": (-120, 180),
    "hip": (-20, 900),
    "inferior_vena_cava": (-50, 700),
}
FEWEST_VOXELS_FOR_A_MEDIAN = 200  # the ranges are wide enough for an organ that is partly edge
# What is added to mend HU that went wrong: not rescaled, rescaled twice, or with the other intercept of CT-RATE.
SHIFTS = {
    -1024: "never rescaled",
    1024: "rescaled twice",
    -8192: "never rescaled, with an intercept of -8192",
    8192: "rescaled twice, with an intercept of -8192",
}
LOWEST_DOUBLED_LUNG_HU = -1100  # no lung is below air: there, halved values are tried

# Of each pair the second lies further along the axis: depth to the head, height to the back, width to the left. The
# centres differ mostly along that axis, so a pair also tells which axis of the array it is.
PAIRS = {
    "depth": (
        *(("hip", "liver"), ("hip", "kidney"), ("hip", "lung"), ("sacrum", "liver"), ("sacrum", "kidney")),
        *(("femur", "liver"), ("femur", "kidney"), ("gluteus", "liver"), ("gluteus", "kidney")),
        *(("urinary_bladder", "liver"), ("urinary_bladder", "kidney"), ("liver", "lung"), ("kidney", "lung")),
        *(("liver", "heart"), ("kidney", "heart"), ("heart", "trachea"), ("lung", "trachea"), ("heart", "clavicula")),
        *(("heart", "esophagus"), ("liver", "brain"), ("lung", "brain"), ("heart", "brain"), ("lung", "face")),
        *(("hip", "brain"),),
    ),
    "height": (
        *(("heart", "autochthon"), ("liver", "autochthon"), ("stomach", "autochthon"), ("pancreas", "autochthon")),
        *(("heart", "esophagus"), ("heart", "lung"), ("heart", "thoracic_vertebrae"), ("stomach", "kidney")),
        *(("pancreas", "kidney"), ("gallbladder", "kidney"), ("liver", "kidney"), ("urinary_bladder", "sacrum")),
        *(("small_bowel", "lumbar_vertebrae"),),
    ),
    "width": (
        *(("liver", "spleen"), ("liver", "stomach"), ("gallbladder", "spleen"), ("gallbladder", "stomach")),
        *(("liver", "heart"), ("lung", "heart")),
    ),
}
FEWEST_VOXELS_FOR_A_PLACE = 50
NEAREST_MM = 10.0  # centres closer than that say nothing about direction
CLEARLY_BETTER = 0.2  # mean cosine by which another reading of the axes must beat the stored one
CLEARLY_RIGHT = 0.4  # and the least mean cosine of a reading that is believed
AS_GOOD = 0.08  # readings this close to the best are not told apart: the simplest of them is named
DIRECTIONS = {"depth": "head and feet", "height": "front and back", "width": "left and right"}

MANY = 0.1  # share of scans from which a fault is the split's, not some scans'
FEWEST_PATIENTS, FEW_PATIENTS = 8, 100
SPACING_TOLERANCE = 0.25
OUTLIER_Z = 5.0
FEWEST_FOR_STATISTICS = 8


@dataclass(frozen=True)
class Finding:
    """One thing that looks wrong.

    Attributes:
        key: Name of the rule and its outcome, e.g. "mirrored_axes".
        level: One of LEVELS.
        title: What, in one sentence.
        count, total, unit: How many of how many of what.
        examples: Ids of scans, or organs with their numbers; at most NUM_EXAMPLES.
        effect: What it does to training.
        mend: What to do.
        seen: The figures it rests on, where the title does not hold them.
        num_examples: How many examples there are in all, where they are not what is counted.
        rows: Places in `exam.rows` of scans to look at; at most NUM_EXAMPLES.
    """

    key: str
    level: str
    title: str
    count: int
    total: int
    unit: str
    examples: tuple[str, ...]
    effect: str
    mend: str
    seen: str = ""
    num_examples: int | None = None
    rows: tuple[int, ...] = ()

    @property
    def how_many(self) -> str:
        return f"{self.count:,} of {self.total:,} {self.unit}"

    @property
    def shown_examples(self) -> str:
        more = (self.count if self.num_examples is None else self.num_examples) - len(self.examples)
        are_sentences = any(example.endswith(".") for example in self.examples)
        text = ("; " if are_sentences else ", ").join(example.rstrip(".") for example in self.examples)
        return text + (f" and {more:,} more" if more > 0 and self.examples else "")


def find(exam: Examination) -> list[Finding]:
    """All findings, the loudest first; among equals the one that concerns the larger share."""
    found = [finding for rule in RULES for finding in (rule(exam) if exam.rows or rule in RULES_WITHOUT_ROWS else ())]
    return sorted(found, key=lambda finding: (LEVELS.index(finding.level), -finding.count / max(1, finding.total)))


def level_of(share: float) -> str:
    return "loud" if share >= MANY else "warning"


def ids(exam: Examination, is_member: np.ndarray) -> tuple[str, ...]:
    """The first ids of the rows for which it is true."""
    return tuple(exam.recon_id[is_member][:NUM_EXAMPLES])


def first_rows(is_member: np.ndarray) -> tuple[int, ...]:
    """The places of the first rows for which it is true."""
    return tuple(np.flatnonzero(is_member)[:NUM_EXAMPLES].tolist())


def ml_text(value: float) -> str:
    """A volume in ml, or another count, with three digits at least: `1,580`, `26.3`."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


# Rows and shards


def unreadable(exam: Examination) -> Iterator[Finding]:
    if exam.damaged:
        rows = sum(exam.num_rows.values())
        yield Finding(
            "damaged_rows",
            "loud",
            "rows or shards cannot be read",
            len(exam.damaged),
            max(rows, len(exam.damaged)),
            "rows",
            tuple(map(str, exam.damaged[:NUM_EXAMPLES])),
            "Training stops, or skips, when it comes to them.",
            "Copy these shards again, or build the split again.",
        )
    if exam.wrong_shards:
        yield Finding(
            "incomplete_copy",
            "loud",
            "shards are missing or of another size than they were written with",
            len(exam.wrong_shards),
            len(exam.manifest["shards"]),
            "shards",
            tuple(exam.wrong_shards[:NUM_EXAMPLES]),
            "The split is not the one its manifest and card describe; patients are missing in silence.",
            "Copy the folder again; `sha256` of each shard stands in manifest.json.",
        )
    if not exam.rows and not exam.damaged:
        yield Finding(
            "no_rows",
            "loud",
            "the split holds no row",
            0,
            0,
            "rows",
            (),
            "There is nothing to train on.",
            "manifest.json, key `skipped`, says why each case was left out.",
        )


# Axes


@dataclass(frozen=True)
class Reading:
    """A way to read stored axes: body axis `a` is stored axis `order[a]`, reversed where `signs[a]` is -1."""

    order: tuple[int, int, int]
    signs: tuple[int, int, int]

    @property
    def num_changes(self) -> int:
        return sum(axis != place for place, axis in enumerate(self.order)) + sum(sign < 0 for sign in self.signs)

    def __str__(self) -> str:
        if self.num_changes == 0:
            return "the axes are as they should be"
        flips = [DIRECTIONS[axis] for axis, sign in zip(AXES, self.signs) if sign < 0]
        if self.order == (0, 1, 2):
            return " and ".join(flips) + " are exchanged"
        stored = ", ".join(AXES[self.order.index(axis)] for axis in range(3))
        text = f"the stored axes (depth, height, width) are the body's ({stored})"
        return text + (f", with {' and '.join(flips)} exchanged" if flips else "")


READINGS = sorted(
    (Reading(order, signs) for order in permutations(range(3)) for signs in product((1, -1), repeat=3)),
    key=lambda reading: reading.num_changes,
)  # as stored first, then the simple mistakes


def reading_scores(exam: Examination) -> np.ndarray:
    """How well each reading of the axes agrees with anatomy.

    For each pair of organs that a scan holds, the cosine between the line from one centre to the other and the axis
    along which it should run; averaged over the pairs of an axis, then over the axes that have pairs.

    Returns:
        `(48, rows)`, in the order of READINGS; NaN where no pair is present.
    """
    centers = exam.stacked("center_mm").astype(np.float64)
    centers[exam.stacked("voxels") < FEWEST_VOXELS_FOR_A_PLACE] = np.nan
    centers[implausible_organs(exam)[0]] = np.nan  # what is no such organ may lie anywhere
    index_of = {organ: index for index, organ in enumerate(exam.organs)}
    if "heart" in index_of:  # an abdominal scan shows the bottom of a heart: its centre is no heart's centre
        centers[exam.stacked("is_cut")[:, index_of["heart"]], index_of["heart"]] = np.nan
    sums, num_axes = np.zeros((len(READINGS), len(exam.rows))), np.zeros(len(exam.rows))
    for axis, name in enumerate(AXES):
        pairs = [(index_of[a], index_of[b]) for a, b in PAIRS[name] if a in index_of and b in index_of]
        if not pairs:
            continue
        first, second = np.array(pairs).T
        lines = centers[:, second] - centers[:, first]  # (rows, pairs, 3)
        length = np.linalg.norm(lines, axis=2)
        counts = length >= NEAREST_MM  # False where one of the two is absent
        cosines = np.where(counts[..., None], lines / np.where(counts, length, 1)[..., None], 0)
        along = cosines.sum(axis=1) / np.maximum(counts.sum(axis=1), 1)[:, None]  # (rows, 3): mean over the pairs
        for index, reading in enumerate(READINGS):
            sums[index] += reading.signs[axis] * along[:, reading.order[axis]]
        num_axes += counts.any(axis=1)
    return np.where(num_axes, sums / np.maximum(num_axes, 1), np.nan)


def best_readings(exam: Examination) -> tuple[np.ndarray, np.ndarray]:
    """For each row the reading of its axes that anatomy speaks for.

    Returns:
        Place in READINGS, `(rows,)`, 0 where the stored axes are as good as any; and whether the row could be judged.
    """
    scores = reading_scores(exam)
    is_judged = ~np.isnan(scores[0])
    scores = np.nan_to_num(scores, nan=-1.0)
    best = scores.max(axis=0)
    is_open = is_judged & (best >= CLEARLY_RIGHT) & (best - scores[0] > CLEARLY_BETTER)
    readings = np.zeros(len(exam.rows), dtype=int)
    is_candidate = (scores >= best - AS_GOOD) & (scores - scores[0] > CLEARLY_BETTER)
    while is_open.any():
        # The simplest candidate of most rows explains all rows it is clearly better for: one mistake, one finding.
        chosen = Counter(np.argmax(is_candidate[:, is_open], axis=0).tolist()).most_common(1)[0][0]
        explained = is_open & (scores[chosen] - scores[0] > CLEARLY_BETTER) & (scores[chosen] >= best - 3 * AS_GOOD)
        readings[explained] = chosen
        is_open &= ~explained
    return readings, is_judged


def wrong_axes(exam: Examination) -> Iterator[Finding]:
    readings, is_judged = best_readings(exam)
    for place, count in Counter(readings[readings > 0].tolist()).most_common():
        reading, is_member = READINGS[place], readings == place
        is_mirrored = reading.order == (0, 1, 2)
        level = "loud" if count > 1 or count >= MANY * is_judged.sum() else "warning"
        yield Finding(
            "mirrored_axes" if is_mirrored else "swapped_axes",
            level,
            f"by the places of the organs, {reading}",
            count,
            int(is_judged.sum()),
            "scans whose organs tell",
            ids(exam, is_member),
            "The model learns a body that does not exist, and meets the right one at inference: left and right, above "
            "and below in captions say the opposite of the picture, and patches are as thick as they should be wide.",
            "Look at the pictures below (head up, the patient's left on the viewer's right). The affine of these files "
            "is wrong or was lost; correct it at the source, or give it to the builder, and build again."
            + (" One scan alone may be a situs inversus." if count == 1 else ""),
            rows=first_rows(is_member),
        )


# HU


def hu_verdicts(exam: Examination) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Compare the organs' median HU with what such an organ can have, and try what would mend them.

    Returns:
        `shift` `(rows,)`: HU to add so that the organs become plausible, 0 where nothing is to be mended or nothing
        helps; `is_doubled` `(rows,)`; `is_bad` `(rows, organs)`: implausible after such mending.
    """
    low, high = (np.array([MEDIAN_HU.get(organ, (np.nan, np.nan))[end] for organ in exam.organs]) for end in (0, 1))
    is_judged = (exam.stacked("voxels") >= FEWEST_VOXELS_FOR_A_MEDIAN) & ~np.isnan(low)

    def outside(median: np.ndarray) -> np.ndarray:
        return is_judged & ((median < low) | (median > high))

    with np.errstate(invalid="ignore"):  # NaN of absent organs
        is_bad = outside(exam.median_hu)
        num_bad, num_judged = is_bad.sum(axis=1), is_judged.sum(axis=1)
        is_sick = num_bad > num_judged / 2
        shift = np.zeros(len(exam.rows), dtype=int)
        least = num_bad / 3  # a shift counts only if it mends most of them
        for candidate in SHIFTS:
            left = outside(exam.median_hu + candidate).sum(axis=1)
            is_better = is_sick & (left <= least)
            shift[is_better], least = candidate, np.where(is_better, left - 0.5, least)
        is_bad = outside(exam.median_hu + shift[:, None])
        is_doubled = np.zeros(len(exam.rows), dtype=bool)
        if "lung" in exam.organs:
            lung = exam.organs.index("lung")
            is_doubled = is_judged[:, lung] & (exam.median_hu[:, lung] < LOWEST_DOUBLED_LUNG_HU) & (shift == 0)
            is_doubled &= ~outside(exam.median_hu / 2).any(axis=1)
            is_bad[is_doubled] = False
    return shift, is_doubled, is_bad


HU_EFFECT = (
    "The HU window cuts off the wrong values: whole organs become black or white, and the model learns from outlines "
    "alone."
)


def wrong_hu(exam: Examination) -> Iterator[Finding]:
    shift, is_doubled, _ = hu_verdicts(exam)
    for value in sorted(set(shift.tolist()) - {0}):
        is_member = shift == value
        examples = [median_example(exam, row) for row in np.flatnonzero(is_member)[:NUM_EXAMPLES]]
        yield Finding(
            "hu_shifted",
            "loud",
            f"HU are off by {-value:+d}: with {value:+d} the organs become plausible ({SHIFTS[value]})",
            int(is_member.sum()),
            len(exam.rows),
            "scans",
            tuple(examples),
            HU_EFFECT,
            "Build these scans again with the right rescale: `--rescale` of the builder, the columns rescale_slope and "
            "rescale_intercept of the table of `folder`, or RescaleSlope and RescaleIntercept of their source.",
            rows=first_rows(is_member),
        )
    if is_doubled.any():
        yield Finding(
            "hu_doubled",
            "loud",
            "HU are twice what they should be: halved, the organs become plausible",
            int(is_doubled.sum()),
            len(exam.rows),
            "scans",
            tuple(median_example(exam, row) for row in np.flatnonzero(is_doubled)[:NUM_EXAMPLES]),
            HU_EFFECT,
            "The slope was applied twice, or is wrong in the source; correct it and build again.",
            rows=first_rows(is_doubled),
        )
    is_constant = np.array([row.hu_range[0] == row.hu_range[1] for row in exam.rows])
    if is_constant.any():
        yield Finding(
            "hu_constant",
            "loud",
            "every voxel of the volume has the same value",
            int(is_constant.sum()),
            len(exam.rows),
            "scans",
            ids(exam, is_constant),
            "There is no picture to learn from; the captions are contrasted with noise.",
            "The file is damaged or an intermediate of another tool; leave these scans out, or get them again.",
            rows=first_rows(is_constant),
        )


def median_example(exam: Examination, row: int) -> str:
    """`train_1_a_1 (lung -1874, liver -964 HU)`."""
    known = [index for index, organ in enumerate(exam.organs) if organ in MEDIAN_HU]
    largest = sorted(known, key=lambda index: -exam.rows[row].voxels[index])[:3]
    medians = [f"{exam.organs[i]} {exam.median_hu[row, i]:.0f}" for i in largest if exam.is_present[row, i]]
    return f"{exam.recon_id[row]} ({', '.join(medians)} HU)"


# Volumes, numbering


def scale_factors(exam: Examination) -> np.ndarray:
    """By what factor all whole organs of a scan are larger than an adult's, `(rows,)`; 1 where this is not clear.

    Only where at least two whole organs agree, and by a factor of 6 or more (a one-year-old's are a quarter).
    """
    middle = np.array([np.sqrt(np.prod(ADULT_VOLUME_ML.get(organ, (np.nan, np.nan)))) for organ in exam.organs])
    factors = np.ones(len(exam.rows))
    for index, (volumes, is_whole) in enumerate(zip(exam.volume_ml, exam.is_whole)):
        logs = np.log(volumes[is_whole & ~np.isnan(middle)] / middle[is_whole & ~np.isnan(middle)])
        # Organs under the wrong numbers scatter to both sides.
        if len(logs) >= 2 and abs(np.median(logs)) > np.log(6) and (np.sign(logs) == np.sign(np.median(logs))).all():
            factors[index] = np.exp(np.median(logs))
    return factors


def implausible_organs(exam: Examination) -> tuple[np.ndarray, np.ndarray]:
    """Which organs are too large, too small, or of an HU that no such organ has; and which could be judged.

    Returns:
        Two boolean arrays `(rows, organs)`. Rows whose organs all are off by one factor are not judged by volume.
    """
    low, high = (
        np.array([ADULT_VOLUME_ML.get(organ, (np.nan, np.nan))[end] for organ in exam.organs]) for end in (0, 1)
    )
    by_volume = exam.is_whole & ~np.isnan(low) & (scale_factors(exam) == 1)[:, None]
    by_hu = (exam.stacked("voxels") >= FEWEST_VOXELS_FOR_A_MEDIAN) & np.isin(exam.organs, list(MEDIAN_HU))
    is_bad = (by_volume & ((exam.volume_ml < low) | (exam.volume_ml > high))) | hu_verdicts(exam)[2]
    return is_bad, by_volume | by_hu


def wrong_masks(exam: Examination) -> Iterator[Finding]:
    factors = scale_factors(exam)
    is_scaled = factors != 1
    if is_scaled.any():
        yield Finding(
            "organs_scaled",
            level_of(is_scaled.mean()),
            f"all organs are {np.median(factors[is_scaled]):.2g} times an adult's in volume",
            int(is_scaled.sum()),
            len(exam.rows),
            "scans",
            ids(exam, is_scaled),
            "A wrong spacing stretches the body: resampling, margins and crop size then mean something else.",
            "Look at the spacing of the source files (metres or centimetres instead of millimetres, a lost header). "
            "Small children are a reason too: then nothing is wrong.",
            rows=first_rows(is_scaled),
        )
    is_bad, is_judged = implausible_organs(exam)
    num_bad, num_judged = is_bad.sum(axis=1), is_judged.sum(axis=1)
    is_strange = (num_bad >= 2) & (num_bad >= num_judged / 3)
    if is_strange.any():
        shares = is_bad[is_strange].mean(axis=0)
        worst = [int(index) for index in np.argsort(-shares, kind="stable") if shares[index] > 0][:NUM_EXAMPLES]
        yield Finding(
            "wrong_numbering",
            level_of(is_strange.sum() / max(1, (num_judged > 0).sum())),
            "many organs at once are no such organs, by volume or HU: masks of another numbering, or of other scans",
            int(is_strange.sum()),
            int((num_judged > 0).sum()),
            "scans",
            ids(exam, is_strange),
            "Captions are paired with the wrong part of the body; the loss of these organs stays at chance.",
            "Give the numbering the masks were made with (`--numbering`, or the column `numbering`) and build again."
            + other_numbering(exam, worst),
            "; ".join(organ_example(exam, index, is_strange & is_bad[:, index]) for index in worst[:4]),
            rows=first_rows(is_strange),
        )
    # What is left: one organ, or organs of few scans.
    _, _, hu_is_bad = hu_verdicts(exam)
    hu_is_bad = hu_is_bad & ~is_strange[:, None]
    has_median = exam.stacked("voxels") >= FEWEST_VOXELS_FOR_A_MEDIAN
    shares = hu_is_bad.sum(axis=0) / np.maximum(has_median.sum(axis=0), 1)
    if hu_is_bad.any():
        of_organs = [int(index) for index in np.argsort(-shares, kind="stable") if shares[index] > 0]
        yield Finding(
            "hu_implausible",
            "loud" if ((shares >= 0.25) & (hu_is_bad.sum(axis=0) > 1)).any() else "warning",
            "organs have a median HU that no such organ has, and no shift mends it",
            int(hu_is_bad.any(axis=1).sum()),
            len(exam.rows),
            "scans",
            ids(exam, hu_is_bad.any(axis=1)),
            "The mask does not lie on its organ, so the model looks beside it; or the HU are no HU.",
            "Look whether mask and volume are of one scan and turned alike, and at the rescale of the source.",
            "; ".join(organ_example(exam, index, hu_is_bad[:, index]) for index in of_organs[:4]),
            rows=first_rows(hu_is_bad.any(axis=1)),
        )
    low, high = (np.array([ADULT_VOLUME_ML.get(organ, (0, np.inf))[end] for organ in exam.organs]) for end in (0, 1))
    is_judged = exam.is_whole & ~is_scaled[:, None] & ~is_strange[:, None]
    is_off = is_judged & ((exam.volume_ml < low) | (exam.volume_ml > high))
    of_organs = [
        index
        for index in range(len(exam.organs))
        if is_off[:, index].sum() >= 2 and is_off[:, index].sum() > is_judged[:, index].sum() / 2
    ]
    if of_organs:
        yield Finding(
            "volume_implausible",
            "warning",
            "organs have a volume that no whole organ of an adult has",
            len(of_organs),
            len(exam.organs),
            "organs",
            tuple(organ_example(exam, index, is_off[:, index]) for index in of_organs[:NUM_EXAMPLES]),
            "The caption speaks of the organ, the mask shows something else, or a part.",
            "Compare the classes of the organ set with those of the segmentation; look at the pictures.",
            rows=first_rows(is_off[:, of_organs].any(axis=1)),
        )


def organ_example(exam: Examination, index: int, is_member: np.ndarray) -> str:
    """`esophagus: 812 ml, -851 HU` over the rows of `is_member`; volume where it is whole."""
    whole = is_member & exam.is_whole[:, index]
    volume = f"{ml_text(np.median(exam.volume_ml[whole, index]))} ml, " if whole.any() else ""
    return f"{exam.organs[index]}: {volume}{np.nanmedian(exam.median_hu[is_member, index]):.0f} HU"


def other_numbering(exam: Examination, worst: Sequence[int]) -> str:
    """What the labels of these organs mean in the other release of TotalSegmentator, as a sentence; "" if unknown."""
    settings = exam.manifest["settings"]
    used = {name for name in settings.get("numberings", {}).values() if isinstance(name, str) and name in NUMBERINGS}
    if len(used) != 1:
        return ""
    here = used.pop()
    other = next(name for name in NUMBERINGS if name != here)
    meanings = []
    for index in worst:
        classes = settings["organ_set"].get("classes", {}).get(exam.organs[index], {})
        labels = [NUMBERINGS[here].index(name) for name in classes.get(here, ()) if name in NUMBERINGS[here]]
        names = [NUMBERINGS[other][label] for label in labels if label < len(NUMBERINGS[other])]
        if names:
            meanings.append(f"{exam.organs[index]} = {', '.join(names[:2])}{' ...' if len(names) > 2 else ''}")
    if not meanings:
        return ""
    return f" They were read as {here}; in {other} the same labels are: {'; '.join(meanings[:5])}."


def volume_outliers(exam: Examination) -> dict[str, list[tuple[str, float]]]:
    """organ -> (recon_id, ml) of whole organs far from the others: robust z over OUTLIER_Z on the logarithm."""
    outliers = {}
    for index, organ in enumerate(exam.organs):
        rows = np.flatnonzero(exam.is_whole[:, index])
        if len(rows) < FEWEST_FOR_STATISTICS:
            continue
        logs = np.log(exam.volume_ml[rows, index])
        far = np.abs(logs - np.median(logs))
        # No spread below 2 %: scans of one phantom would make each other outliers.
        strange = rows[0.6745 * far / max(np.median(far), 0.02) > OUTLIER_Z]
        if len(strange):
            outliers[organ] = [(str(exam.recon_id[row]), float(exam.volume_ml[row, index])) for row in strange]
    return outliers


def strange_volumes(exam: Examination) -> Iterator[Finding]:
    outliers = volume_outliers(exam)
    if outliers:
        listed = [f"{organ} of {name}: {ml_text(ml)} ml" for organ, found in outliers.items() for name, ml in found]
        yield Finding(
            "volume_outliers",
            "note",
            f"organs are far larger or smaller than in the other scans (robust z of log volume above {OUTLIER_Z:g})",
            len(listed),
            int(exam.is_whole.sum()),
            "whole organs",
            tuple(listed[:NUM_EXAMPLES]),
            "Disease, or a segmentation that failed: then the caption speaks of what the mask does not show.",
            "Look at these scans: `data_builders.previews.draw_case` draws any row.",
        )
    names = exam.splits()
    if len(names) < 2:
        return
    first, others = names[0], names[1:]
    drifted = []
    for index, organ in enumerate(exam.organs):
        for other in others:
            logs = [
                np.log(exam.volume_ml[(exam.split == name) & exam.is_whole[:, index], index]) for name in (first, other)
            ]
            if min(map(len, logs)) < FEWEST_FOR_STATISTICS:
                continue
            medians = [np.median(values) for values in logs]
            spread = np.median(np.concatenate([np.abs(v - m) for v, m in zip(logs, medians)])) / 0.6745
            error = 1.2533 * spread * np.sqrt(sum(1 / len(values) for values in logs))  # of a difference of medians
            difference = medians[1] - medians[0]
            if abs(difference) > max(4 * error, np.log(1.3)):
                told = [f"{ml_text(np.exp(median))} ml in {name}" for median, name in zip(medians, (first, other))]
                drifted.append(f"{organ}: {', '.join(told)}")
    if drifted:
        yield Finding(
            "volume_drift",
            "warning",
            "organs differ in volume between the splits",
            len(drifted),
            len(exam.organs) * len(others),
            "organs",
            tuple(drifted[:NUM_EXAMPLES]),
            "Validation then measures other patients, or another segmentation, than training sees.",
            "Compare scanners, contrast phases, segmentation version and body region of the splits.",
        )


# What the loss can use


def trainable(exam: Examination) -> Iterator[Finding]:
    in_train = exam.split == TRAIN
    if not in_train.any():
        return
    whole, abnormal = exam.is_whole[in_train], exam.is_abnormal[in_train]
    present = exam.is_present[in_train]
    # Of rows that were not looked at, the manifest knows the counts.
    counts = exam.manifest.get("splits", {}).get(TRAIN, {}).get("organs", {}) if exam.is_partial else {}
    known = {
        kind: np.array([counts.get(organ, {}).get(kind, 0) for organ in exam.organs])
        for kind in ("present", "abnormal")
    }
    is_present = present.any(axis=0) | (known["present"] > 0)
    # Both together, unless only some rows were looked at: an organ that is abnormal only where it is cut off never
    # enters either.
    is_trained = (whole & abnormal).any(axis=0) | (known["abnormal"] > 0)
    never = [i for i in range(len(exam.organs)) if whole[:, i].any() and not is_trained[i]]
    if never:
        yield Finding(
            "never_abnormal",
            "loud",
            "organs are never abnormal where they are whole, so they are never trained",
            len(never),
            len(exam.organs),
            "organs",
            tuple(f"{exam.organs[i]} (whole in {whole[:, i].sum()} of {len(whole)})" for i in never[:NUM_EXAMPLES]),
            "The loss leaves out an organ without an abnormal patient in the batch: its query and projection keep "
            "their random start, and its zero-shot scores mean nothing.",
            "Take these organs out of the organ set, add patients, or look at lexicon and captions: perhaps the "
            "reports speak of them in other words.",
        )
    absent = [i for i in range(len(exam.organs)) if not is_present[i]]
    if absent:
        yield Finding(
            "never_present",
            "warning",
            "organs are in no mask",
            len(absent),
            len(exam.organs),
            "organs",
            tuple(exam.organs[i] for i in absent[:NUM_EXAMPLES]),
            "They are never trained.",
            "Right if the scans show another region: then take them out of the organ set. Else the numbering is wrong.",
        )
    num_present = present.sum(axis=0)
    cut_share = (present & ~whole).sum(axis=0) / np.maximum(num_present, 1)
    cut = [i for i in np.argsort(-cut_share, kind="stable") if cut_share[i] > 0.5]
    if cut:
        never_whole = [exam.organs[i] for i in cut if cut_share[i] == 1]
        yield Finding(
            "mostly_cut_off",
            "warning",
            "organs are cut off by the edge of the scan in more than half of the scans that hold them"
            + (f"; always: {', '.join(never_whole)}" if never_whole else ""),
            len(cut),
            len(exam.organs),
            "organs",
            tuple(f"{exam.organs[i]} ({cut_share[i]:.0%} of {num_present[i]})" for i in cut[:NUM_EXAMPLES]),
            "Under the rule `completeness: border` an organ that is cut off does not enter the loss; one that always "
            "is, is never trained.",
            "Usual for thighs and arms. Else look at --margin and at the field of view, take the organ out of the set, "
            "or train with `completeness: min_voxels`.",
        )


def equal_captions(exam: Examination) -> Iterator[Finding]:
    in_train = exam.split == TRAIN
    same, nearly = [], []
    for index, organ in enumerate(exam.organs):
        usable = in_train & exam.is_present[:, index]
        share, is_normal, num = most_frequent_caption(exam, index, usable)
        if num < 2 or not exam.is_abnormal[usable, index].any():
            continue  # never abnormal is a finding of its own
        line = f"{organ} ({share:.1%} of {num}{', the normal sentence' if is_normal else ''})"
        if share == 1:
            same.append(line)
        elif share >= 0.98 and num >= 20:
            nearly.append(line)
    effect = "Equal captions are positives of each other: there is little or nothing to contrast."
    if same:
        yield Finding(
            "captions_equal",
            "loud",
            "all captions of an organ are equal",
            len(same),
            len(exam.organs),
            "organs",
            tuple(same[:NUM_EXAMPLES]),
            effect,
            "Look at the reports (one template for all?) and at how captions are made of them.",
        )
    if nearly:
        yield Finding(
            "captions_nearly_equal",
            "warning",
            "nearly all captions of an organ are equal",
            len(nearly),
            len(exam.organs),
            "organs",
            tuple(nearly[:NUM_EXAMPLES]),
            effect,
            "Balance the organs in training, or add abnormal patients.",
        )


def most_frequent_caption(exam: Examination, index: int, is_member: np.ndarray) -> tuple[float, bool, int]:
    """Share of the most frequent caption of an organ, whether it is the normal sentence, and of how many captions."""
    hashes = exam.caption_hashes[is_member, index]
    hashes = hashes[hashes != 0]
    if not len(hashes):
        return 0.0, False, 0
    values, counts = np.unique(hashes, return_counts=True)
    most = int(values[counts.argmax()])
    return counts.max() / len(hashes), most == text_hash(normal_caption(exam.organs[index])), len(hashes)


def split_sizes(exam: Examination) -> Iterator[Finding]:
    if TRAIN not in exam.num_rows:
        return
    told = exam.manifest.get("splits", {}).get(TRAIN, {}).get("patients", 0) if exam.is_partial else 0
    patients = max(told, len({row.patient_id for row in exam.rows if row.place.split == TRAIN}))
    if patients < FEW_PATIENTS:
        yield Finding(
            "tiny_split",
            "loud" if patients < FEWEST_PATIENTS else "warning",
            f"split {TRAIN!r} has {counted(patients, 'patient')}",
            patients,
            FEW_PATIENTS,
            "patients that a contrast should have",
            (),
            "Each organ is contrasted with the same organ of the other patients of a batch: with so few, chance does "
            "well, and the model learns the patients by heart.",
            "More patients; for a trial of the code this is enough.",
        )


def wrong_spacing(exam: Examination) -> Iterator[Finding]:
    wanted = np.array(exam.manifest["settings"]["spacing"], dtype=np.float64)
    is_far = (np.abs(exam.spacing / wanted - 1) > SPACING_TOLERANCE).any(axis=1)
    if is_far.any():
        rows = np.flatnonzero(is_far)[:NUM_EXAMPLES]
        yield Finding(
            "spacing_far",
            "loud" if is_far.mean() >= 0.05 else "warning",
            f"the spacing is not the {' x '.join(f'{edge:g}' for edge in wanted)} mm of the split's settings",
            int(is_far.sum()),
            len(exam.rows),
            "scans",
            tuple(f"{exam.recon_id[i]} ({' x '.join(f'{edge:.3g}' for edge in exam.spacing[i])} mm)" for i in rows),
            "Organs of one size come in different sizes; a crop shows more or less of the body than the model is told.",
            "Rows of other builds were mixed in, or the scans have so few voxels that rounding changes the spacing.",
            rows=first_rows(is_far),
        )


# Patients and texts


def leaks(exam: Examination) -> Iterator[Finding]:
    splits_of: dict[str, set[str]] = {}
    for row in exam.rows:
        splits_of.setdefault(row.patient_id, set()).add(row.place.split)
    leaking = [patient for patient, splits in splits_of.items() if len(splits) > 1]
    if leaking:
        yield Finding(
            "patient_leak",
            "loud",
            "patients stand in several splits",
            len(leaking),
            len(splits_of),
            "patients",
            tuple(leaking[:NUM_EXAMPLES]),
            "Validation measures how well patients are remembered, not how well new ones are understood.",
            "Move all scans of a patient to one split and build again.",
        )


def duplicates(exam: Examination) -> Iterator[Finding]:
    for pairs, key, level, title, mend in (
        (
            repeated(exam, [row.recon_id for row in exam.rows]),
            "duplicate_ids",
            "loud",
            "a reconstruction stands in the split more than once",
            "Leave one of them; shards of two builds may have been mixed in this folder.",
        ),
        (
            repeated(exam, [row.volume_hash for row in exam.rows], across=True),
            "duplicate_volumes_across_splits",
            "loud",
            "one volume stands in several splits",
            "Remove it from one of them, and look whether the patients' ids are right.",
        ),
        (
            repeated(exam, [row.volume_hash for row in exam.rows], across=False),
            "duplicate_volumes",
            "warning",
            "one volume stands under several ids",
            "Remove all but one. It counts several times in training, and contrasts the scan with itself.",
        ),
    ):
        if pairs:
            yield Finding(
                key,
                level,
                title,
                len(pairs),
                len(exam.rows),
                "scans",
                tuple(pairs[:NUM_EXAMPLES]),
                "Equal pictures with unlike captions cannot be told apart; across splits they make validation look "
                "better than it is.",
                mend,
            )
    # All reconstructions of a scan share one report: only texts of different patients are compared.
    texts: dict[int, dict[str, int]] = {}
    for index, row in enumerate(exam.rows):
        if row.report_hash is not None:
            texts.setdefault(row.report_hash, {}).setdefault(row.patient_id, index)
    shared = [list(members.values()) for members in texts.values() if len(members) > 1]
    if shared:
        count = sum(len(members) for members in shared)
        across = sum(len({exam.split[i] for i in members}) > 1 for members in shared)
        is_much = count > MANY * len({row.patient_id for row in exam.rows})
        yield Finding(
            "duplicate_reports",
            "warning" if is_much else "note",
            "patients share the same report" + (f"; {across} of these texts stand in several splits" if across else ""),
            count,
            len({row.patient_id for row in exam.rows}),
            "patients",
            tuple(" = ".join(exam.recon_id[i] for i in members[:3]) for members in shared[:NUM_EXAMPLES]),
            "Usual where everything is normal; else one report was given to scans it does not describe.",
            "Look at some; a template that stands for many reports teaches nothing.",
            num_examples=len(shared),
        )


def repeated(exam: Examination, values: Sequence, across: bool | None = None) -> list[str]:
    """`a = b` for every row whose value came before; `across`: only (True), or only not (False), in another split.

    A recon_id that comes twice is the same text on both sides: its split and place are told instead.
    """
    first: dict = {}
    found = []
    for index, value in enumerate(values):
        before = first.setdefault(value, index)
        if before == index or (across is not None and (exam.split[before] != exam.split[index]) != across):
            continue
        names = exam.recon_id[before], exam.recon_id[index]
        if names[0] == names[1]:
            if across is False:
                continue  # the row repeated as a whole is told by its id
            places = [exam.rows[i].place for i in (before, index)]
            found.append(f"{names[0]} ({', '.join(f'{place.split} row {place.index}' for place in places)})")
        else:
            found.append(" = ".join(names))
    return found


def texts(exam: Examination) -> Iterator[Finding]:
    is_empty = np.array([row.report_hash is None for row in exam.rows])
    if is_empty.any():
        yield Finding(
            "empty_reports",
            "warning" if is_empty.mean() >= 0.5 else "note",
            "findings and impression are both empty",
            int(is_empty.sum()),
            len(exam.rows),
            "scans",
            ids(exam, is_empty),
            "Right if captions were given by organ. Else every organ of these scans is called normal.",
            "Look at the columns of the reports, and at their ids.",
        )
    names = exam.splits()
    if len(names) > 1:
        one_sided = [
            f"{finding} ({of_split[names[-1]][1]} positive, {of_split[names[-1]][0]} negative)"
            for finding, of_split in exam.label_counts().items()
            if sum(of_split[names[-1]].values()) and not (of_split[names[-1]][1] and of_split[names[-1]][0])
        ]
        if one_sided:
            yield Finding(
                "one_sided_labels",
                "note",
                f"findings are only positive, only negative or unknown in split {names[-1]!r}",
                len(one_sided),
                len(exam.label_counts()),
                "findings",
                tuple(one_sided[:NUM_EXAMPLES]),
                "No AUC can be computed for them.",
                "More patients in that split, or leave these findings out of the evaluation.",
            )


# What the build said


def build_notes(exam: Examination) -> Iterator[Finding]:
    skipped, _ = skipped_and_excluded(exam.manifest)
    warnings = exam.manifest.get("warnings", ())
    splits = exam.manifest.get("splits", {}).values()
    cases = sum(content.get("cases", 0) - content.get("excluded", 0) for content in splits)
    if skipped:
        yield Finding(
            "skipped_cases",
            "warning" if len(skipped) > MANY * cases else "note",
            "the build left out cases",
            len(skipped),
            max(cases, len(skipped)),
            "cases",
            tuple(f"{entry['case']}: {entry['reason']}" for entry in skipped[:NUM_EXAMPLES]),
            "What is left out may be of one kind: one scanner, one hospital, the sickest.",
            "manifest.json, key `skipped`, has the reason of each; many can be mended at the source.",
        )
    if warnings:
        warned = {entry["case"] for entry in warnings}  # of one case there may be several
        count = cases if "all" in warned else len(warned)
        yield Finding(
            "build_warnings",
            "warning",
            "the build warned",
            count,
            max(cases, count),
            "cases",
            tuple(f"{entry['case']}: {entry['warning']}" for entry in warnings[:NUM_EXAMPLES]),
            "As each says.",
            "manifest.json, key `warnings`.",
        )


def personal_texts(exam: Examination) -> Iterator[Finding]:
    concerns = exam.manifest.get("privacy_concerns", {})
    if not concerns:
        return
    named = [f"{row.recon_id} ({', '.join(row.personal_kinds)})" for row in exam.rows if row.personal_kinds]
    told = tuple(f"{kind}: {count}" for kind, count in concerns.items())
    # The build looks at ids as well, and this at the rows that were measured: perhaps none of them.
    count, total, unit = len(named), len(exam.rows), "reports that were looked at"
    if not named:
        count = total = sum(concerns.values())
        unit = "places that the build found"
    yield Finding(
        "personal_texts",
        "warning",
        "reports seem to hold dates, names or numbers of persons",
        count,
        total,
        unit,
        tuple(named[:NUM_EXAMPLES]) or told[:NUM_EXAMPLES],
        "None; but whoever gets the split, or a page like this one, gets them.",
        "The build's output names the cases. Take out at the source what is there, and build the split into a new "
        "--out: what was written is not changed. Do not hand the split on before.",
        seen=f"the build counted, in all reports and ids: {', '.join(told)}",
        num_examples=len(named or told),
    )


RULES: tuple[Callable[[Examination], Iterator[Finding]], ...] = (
    *(unreadable, wrong_axes, wrong_hu, wrong_masks, trainable, equal_captions, split_sizes, leaks, duplicates),
    *(wrong_spacing, strange_volumes, texts, build_notes, personal_texts),
)
RULES_WITHOUT_ROWS = (unreadable, build_notes, personal_texts)
