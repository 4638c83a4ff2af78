"""Which organ of a model each organ of another set starts from: `--init_from` with other organs than the split's.

An organ of the same name keeps its query and its projection. One that the model does not know takes those of the
nearest organ it knows; the first of these rules that finds one decides:

(1) classes: the organ made of the most of the same TotalSegmentator classes (`lung_left` of `lung`);
(2) centres: the organ whose centre of mass lies nearest in the split's own masks, by the mean distance in mm over the
    scans that show both. Only organs that the split has as well can be measured: by their name, or by rule (1);
(3) levels: the organ whose classes lie nearest along the spine by the table below, bones and muscles from bones and
    muscles first. For organs that no mask shows, and for sets with nothing in common.

Where all three are silent (classes of one's own, in a set that shares none) the organ starts afresh.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import ndimage

from modeling_fvlm.processed_split import Scratch, decode_volume

from .data import ProcessedSplit

# Masks measured for rule (2), spread evenly over the split.
NUM_SCANS = 32
# Of a mask this many voxels along each axis are read; a centre needs no more.
VOXELS_ALONG_AXIS = 128

# Vertebra at whose height the middle of a structure lies in an adult, counted from C1 = 1: T1 = 8, L1 = 20, S1 = 25.
# Textbook anatomy, to half a vertebra at best; TotalSegmentator's names without side and number.
LEVELS = {
    **{"brain": -2, "skull": -1, "face": 0, "thyroid_gland": 6, "common_carotid_artery": 6},
    **{"subclavian_artery": 8, "brachiocephalic_trunk": 9, "brachiocephalic_vein": 9, "clavicula": 9, "trachea": 10},
    **{"scapula": 11, "superior_vena_cava": 11, "humerus": 12, "pulmonary_artery": 12, "pulmonary_vein": 13},
    **{"atrial_appendage": 13, "lung_upper_lobe": 12, "lung_middle_lobe": 14, "lung_lower_lobe": 15, "lung": 13},
    **{"esophagus": 13, "sternum": 13, "spinal_cord": 13, "heart": 14, "heart_myocardium": 15, "heart_atrium": 14},
    **{"heart_ventricle": 15, "rib": 14, "costal_cartilages": 16, "aorta": 17, "liver": 18, "spleen": 18},
    **{"stomach": 19, "adrenal_gland": 19, "autochthon": 19, "portal_vein_and_splenic_vein": 19.5, "pancreas": 20.5},
    **{"gallbladder": 20.5, "inferior_vena_cava": 20, "kidney": 21, "kidney_cyst": 21, "duodenum": 21.5, "colon": 22},
    **{"small_bowel": 23, "iliac_artery": 24.5, "iliac_vena": 24.5, "iliopsoas": 25, "sacrum": 26, "hip": 27},
    **{"gluteus_maximus": 28, "gluteus_medius": 26, "gluteus_minimus": 27, "urinary_bladder": 29, "prostate": 30},
    "femur": 32,
}
_FIRST_VERTEBRA = {"C": 1, "T": 8, "L": 20, "S": 25}
# What bears the body; the rest are its viscera and vessels.
BONES_AND_MUSCLES = re.compile(
    "skull|face|vertebrae|clavicula|scapula|humerus|sternum|rib|costal|autochthon|iliopsoas|sacrum|hip|gluteus|femur"
)


@dataclass(frozen=True)
class Origin:
    """Where one organ starts from.

    Attributes:
        organ: Of the new set.
        source: Organ of the old set whose query and projection it takes; None: fresh ones.
        reason: Why, for people.
    """

    organ: str
    source: str | None
    reason: str

    @property
    def is_kept(self) -> bool:
        """True if the organ is of both sets."""
        return self.organ == self.source

    def __str__(self) -> str:
        return f"{self.organ} from {self.source or 'fresh weights'} ({self.reason})"


def organ_origins(
    old: Mapping[str, Any], new: Mapping[str, Any], measure: Callable[[], np.ndarray] | None = None
) -> list[Origin]:
    """Find for every organ of the new set the one it starts from.

    Args:
        old, new: organ -> its classes as in a config's `organ_classes`; an organ without classes has its name alone.
        measure: Gives the organs' centres in the new set's masks (`measure_centres`). Called only where a class does
            not decide; None: nothing can be measured.

    Returns:
        One origin for each organ of `new`, in its order.
    """
    old_names = {organ: class_names(organ, classes) for organ, classes in old.items()}
    new_names = {organ: class_names(organ, classes) for organ, classes in new.items()}
    origins: dict[str, Origin | None] = {}
    for organ in new:
        if organ in old:
            origins[organ] = Origin(organ, organ, "same name")
        else:
            origins[organ] = _by_classes(organ, new_names[organ], old_names)
    if any(origin is None for origin in origins.values()):
        # Where the old organs lie in the new masks: at the organ of their name, or of most of their classes.
        places = {}
        for source, of_source in old_names.items():
            if source in new:
                places[source] = source
            elif (found := _by_classes(source, of_source, new_names)) is not None:
                places[source] = found.source
        distances = _mean_distances(measure()) if measure is not None and places else None
        order = list(new)
        for organ in (organ for organ, origin in origins.items() if origin is None):
            origin = None if distances is None else _by_centres(organ, order, places, *distances)
            origins[organ] = origin or _by_levels(organ, new_names[organ], old_names)
    return [origins[organ] for organ in new]


def class_names(organ: str, classes: Any) -> set[str]:
    """The class names of an organ in any numbering; its own name where it has none."""
    lists = classes.values() if isinstance(classes, Mapping) else [classes or ()]
    return {str(name) for names in lists for name in names} or {organ}


def measure_centres(
    dataset: ProcessedSplit, num_organs: int, spacing: Sequence[float], num_scans: int = NUM_SCANS
) -> np.ndarray:
    """Centres of mass of the organs in some of a split's masks.

    Args:
        dataset: The split.
        num_organs: Of its masks.
        spacing: mm between voxel centres along (depth, height, width).
        num_scans: Rows measured, spread evenly over the split.

    Returns:
        `(scans, organs, 3)` in mm along (depth, height, width), from the first voxel; NaN where a scan lacks an organ.
    """
    scratch = Scratch()
    rows = np.unique(np.linspace(0, len(dataset) - 1, num_scans).astype(int))
    centres = np.full((len(rows), num_organs, 3), np.nan)
    for number, row in enumerate(rows):
        _, mask = decode_volume(dataset[int(row)], scratch)
        steps = [max(1, size // VOXELS_ALONG_AXIS) for size in mask.shape]
        mask = mask[tuple(slice(None, None, step) for step in steps)]
        present = np.unique(mask[(mask > 0) & (mask <= num_organs)])
        if len(present):
            found = np.array(ndimage.center_of_mass(mask > 0, mask, present))  # (present, 3) in voxels
            centres[number, present.astype(int) - 1] = found * steps * np.asarray(spacing)
    return centres


def _by_classes(organ: str, names: set[str], candidates: Mapping[str, set[str]]) -> Origin | None:
    """(1) The candidate with the largest share of classes in common."""
    shares = {source: len(names & of_source) / len(names | of_source) for source, of_source in candidates.items()}
    source = max(shares, key=shares.get, default=None)
    if source is None or not shares[source]:
        return None
    common = len(names & candidates[source])
    return Origin(organ, source, f"{common} of {len(names)} TotalSegmentator classes in common")


def _mean_distances(centres: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean distance in mm between any two organs, and the number of scans that show both; each `(organs, organs)`."""
    distances = np.linalg.norm(centres[:, :, None] - centres[:, None], axis=-1)
    counts = np.isfinite(distances).sum(0)
    return np.nansum(distances, axis=0) / np.maximum(counts, 1), counts


def _by_centres(
    organ: str, order: list[str], places: Mapping[str, str], distances: np.ndarray, counts: np.ndarray
) -> Origin | None:
    """(2) The candidate whose centre is nearest."""
    index = order.index(organ)
    known = {
        source: (distances[index, order.index(place)], counts[index, order.index(place)])
        for source, place in places.items()
        if counts[index, order.index(place)]
    }
    if not known:
        return None
    source = min(known, key=lambda name: known[name][0])
    distance, count = known[source]
    return Origin(organ, source, f"centres {distance:.0f} mm apart in {count} scans")


def _by_levels(organ: str, names: set[str], candidates: Mapping[str, set[str]]) -> Origin:
    """(3) The candidate at the nearest height of the spine, of the organ's own kind if there is one."""
    is_support, level = _level(names)
    ranks = {}
    for source, of_source in candidates.items():
        source_is_support, source_level = _level(of_source)
        if level is not None and source_level is not None:
            ranks[source] = source_is_support != is_support, abs(source_level - level)
    if not ranks:
        return Origin(organ, None, "nothing tells where it lies")
    source = min(ranks, key=ranks.get)
    return Origin(organ, source, f"{ranks[source][1]:.1f} vertebrae apart by the table of levels")


def _level(names: set[str]) -> tuple[bool, float | None]:
    """Whether an organ of these classes is bone or muscle, and the mean level of those the table knows."""
    levels = [level for name in sorted(names) if (level := _level_of_class(name)) is not None]
    is_support = any(BONES_AND_MUSCLES.match(name) for name in names)
    return is_support, sum(levels) / len(levels) if levels else None


def _level_of_class(name: str) -> float | None:
    if vertebra := re.fullmatch(r"vertebrae_([CTLS])(\d+)", name):
        return _FIRST_VERTEBRA[vertebra[1]] + int(vertebra[2]) - 1
    if rib := re.fullmatch(r"rib_(?:left|right)_(\d+)", name):
        return _FIRST_VERTEBRA["T"] + int(rib[1])  # it slopes down from its vertebra
    return LEVELS.get(re.sub(r"_(left|right)(?=_|$)", "", name))
