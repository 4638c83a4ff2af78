"""Organ sets, and the way from a segmentation's label values to organ indices.

An organ set maps organ -> names of TotalSegmentator classes. Label values are never typed: they follow from the names
through the numbering the mask was made with, because the same value means different things in different releases
(aorta is 7 in v1 and 52 in v2; 57 is the colon in v1 and a carotid artery in v2).

    organ_set = load_organ_set("body_24")
    table = organ_label_table(organ_set, organ_set.organs, "totalsegmentator_v2")
    organ_mask = table[label_map]      # 0 background, organ_index + 1 otherwise
"""

import difflib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

logger = logging.getLogger(__name__)

ORGAN_SETS = Path(__file__).resolve().parent.parent / "hub_configs" / "organs"

# Value in the label table for a label the numbering does not know. It is above every organ and no background, so a
# mask read with the wrong numbering cannot pass for an empty one.
UNKNOWN_LABEL = 255
MAX_ORGANS = 64  # organ_token_mask keeps one bit per organ in a 64-bit word


def _sides(*names: str) -> list[str]:
    return [f"{name}_{side}" for name in names for side in ("left", "right")]


def _ribs() -> list[str]:
    return [f"rib_{side}_{number}" for side in ("left", "right") for number in range(1, 13)]


def _vertebrae_upwards() -> list[str]:
    """L5 .. L1, T12 .. T1, C7 .. C1: both releases count from the pelvis to the head."""
    return [
        f"vertebrae_{part}{number}" for part, last in (("L", 5), ("T", 12), ("C", 7)) for number in range(last, 0, -1)
    ]


# Class names in label order (value = position + 1). Facts of the TotalSegmentator releases, as listed in the class
# details of https://github.com/wasserth/TotalSegmentator (Apache-2.0): v1 has 104 classes, the task "total" of v2 has
# 117. "Left" does not always come before "right", so no pair may be swapped for the sake of order.
TOTALSEGMENTATOR_V1: tuple[str, ...] = (
    *("spleen", "kidney_right", "kidney_left", "gallbladder", "liver", "stomach", "aorta", "inferior_vena_cava"),
    *("portal_vein_and_splenic_vein", "pancreas", "adrenal_gland_right", "adrenal_gland_left"),
    *("lung_upper_lobe_left", "lung_lower_lobe_left"),
    *("lung_upper_lobe_right", "lung_middle_lobe_right", "lung_lower_lobe_right"),
    *_vertebrae_upwards(),
    *("esophagus", "trachea"),
    *("heart_myocardium", "heart_atrium_left", "heart_ventricle_left", "heart_atrium_right", "heart_ventricle_right"),
    *("pulmonary_artery", "brain", *_sides("iliac_artery", "iliac_vena"), "small_bowel", "duodenum", "colon"),
    *_ribs(),
    *_sides("humerus", "scapula", "clavicula", "femur", "hip"),
    *("sacrum", "face"),
    *_sides("gluteus_maximus", "gluteus_medius", "gluteus_minimus", "autochthon", "iliopsoas"),
    "urinary_bladder",
)

TOTALSEGMENTATOR_V2: tuple[str, ...] = (
    *("spleen", "kidney_right", "kidney_left", "gallbladder", "liver", "stomach", "pancreas"),
    *("adrenal_gland_right", "adrenal_gland_left", "lung_upper_lobe_left", "lung_lower_lobe_left"),
    *("lung_upper_lobe_right", "lung_middle_lobe_right", "lung_lower_lobe_right"),
    *("esophagus", "trachea", "thyroid_gland", "small_bowel", "duodenum", "colon", "urinary_bladder", "prostate"),
    *_sides("kidney_cyst"),
    *("sacrum", "vertebrae_S1", *_vertebrae_upwards()),
    *("heart", "aorta", "pulmonary_vein", "brachiocephalic_trunk"),
    *("subclavian_artery_right", "subclavian_artery_left"),
    *("common_carotid_artery_right", "common_carotid_artery_left"),
    *_sides("brachiocephalic_vein"),
    *("atrial_appendage_left", "superior_vena_cava", "inferior_vena_cava", "portal_vein_and_splenic_vein"),
    *_sides("iliac_artery", "iliac_vena", "humerus", "scapula", "clavicula", "femur", "hip"),
    "spinal_cord",
    *_sides("gluteus_maximus", "gluteus_medius", "gluteus_minimus", "autochthon", "iliopsoas"),
    *("brain", "skull"),
    *_ribs(),
    *("sternum", "costal_cartilages"),
)

NUMBERINGS: dict[str, tuple[str, ...]] = {
    "totalsegmentator_v1": TOTALSEGMENTATOR_V1,
    "totalsegmentator_v2": TOTALSEGMENTATOR_V2,
}

# Every class of any release, for masks that come as one file per structure: label = place in this tuple + 1.
STRUCTURE_NAMES: tuple[str, ...] = tuple(sorted(set().union(*NUMBERINGS.values())))


@dataclass(frozen=True)
class OrganSet:
    """Organs in the order of the model's organ axis, and the segmentation classes each is made of.

    Attributes:
        name: Name of the set, written into the model's config.
        organs: Organ names; the place in this tuple is the `organ_index`, the label in a prepared mask is one more.
        classes: organ -> {numbering: [class names]}. An empty list says that this numbering has no such structure:
            the organ is then absent from every mask of that numbering.
    """

    name: str
    organs: tuple[str, ...]
    classes: dict[str, dict[str, list[str]]]


def nearest_name(name: str, known: Sequence[str]) -> str:
    """The hint of an error message: `; nearest: 'esophagus'`, or nothing where nothing is near."""
    matches = difflib.get_close_matches(str(name), [str(candidate) for candidate in known], n=1)
    return f"; nearest: {matches[0]!r}" if matches else ""


def load_organ_set(name_or_path: str | Path) -> OrganSet:
    """Read an organ set: one of ours by name, or a YAML file of the user's.

    The file holds `name`, `version` and `organs: {organ: [classes]}`, or `{organ: {numbering: [classes]}}` where
    the numberings differ. A plain list stands for every numbering.

    Raises:
        ValueError: If there is no such set, the file is not of that form, or a class name is unknown.
    """
    import yaml

    path = Path(name_or_path)
    if path.suffix not in (".yaml", ".yml"):
        known = sorted(file.stem for file in ORGAN_SETS.glob("*.yaml"))
        if str(name_or_path) not in known:
            raise ValueError(
                f"organ set {str(name_or_path)!r} is not one of {known}{nearest_name(str(name_or_path), known)}. "
                "Give one of these names, or the path of a .yaml file of your own."
            )
        path = ORGAN_SETS / f"{name_or_path}.yaml"
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict) or not isinstance(content.get("organs"), dict) or not content["organs"]:
        raise ValueError(f"{path}: an organ set needs a key 'organs' with entries 'organ: [class names]'.")
    classes = {str(organ): _classes_by_numbering(organ, entry, path) for organ, entry in content["organs"].items()}
    for organ, entry in content["organs"].items():
        # The names of a plain list are checked when a table is made: a set for the user's own masks may name anything.
        for numbering, names in entry.items() if isinstance(entry, Mapping) else ():
            for name in names:
                _check_class(name, organ, numbering)
    return OrganSet(name=str(content.get("name", path.stem)), organs=tuple(classes), classes=classes)


def _classes_by_numbering(organ: str, entry, where: str | Path) -> dict[str, list[str]]:
    """Bring one entry of an organ set or of a config's `organ_classes` to {numbering: [class names]}."""
    if isinstance(entry, (list, tuple)) and entry and all(isinstance(name, str) for name in entry):
        return {numbering: list(entry) for numbering in NUMBERINGS}
    if not isinstance(entry, Mapping) or not any(entry.values()):
        raise ValueError(
            f"{where}: organ {organ!r} needs a list of class names, or such a list for each of {sorted(NUMBERINGS)}; "
            f"got {entry!r}."
        )
    for numbering in entry:
        if numbering not in NUMBERINGS:
            raise ValueError(
                f"{where}: organ {organ!r}: numbering {numbering!r} is not one of {sorted(NUMBERINGS)}"
                f"{nearest_name(numbering, list(NUMBERINGS))}."
            )
    return {numbering: list(names) for numbering, names in entry.items()}


def _check_class(name: str, organ: str, numbering: str) -> None:
    if name not in NUMBERINGS[numbering]:
        raise ValueError(
            f"organ {organ!r}: {numbering} has no class {name!r}{nearest_name(name, NUMBERINGS[numbering])}. Correct "
            "the name, or give the organ's classes for each numbering (an empty list where one has none)."
        )


def organ_label_table(
    organ_set_or_classes: OrganSet | Mapping[str, Mapping[str, Sequence[str]] | Sequence[str]],
    organs: Sequence[str],
    numbering: str | Mapping[int, str | None],
) -> np.ndarray:
    """Make the lookup table from a segmentation's label values to organ labels.

    Args:
        organ_set_or_classes: The set, or its `classes` as they stand in a model's config.
        organs: Organ names in the order of the model's organ axis.
        numbering: A key of `NUMBERINGS`, or the numbering of the user's own masks as {label value: class name}. In
            that case an organ takes the labels named like one of its classes of any numbering or like the organ
            itself; a label to be left out maps to None.

    Returns:
        uint8 array of 256 entries: 0 for background and classes of no organ, `organ_index + 1` for the classes of an
        organ, `UNKNOWN_LABEL` for values the numbering does not hold.

    Raises:
        ValueError: If an organ, class or numbering is unknown (naming the nearest), if one class is claimed by two
            organs, or if there are more than 64 organs.
    """
    classes = organ_set_or_classes.classes if isinstance(organ_set_or_classes, OrganSet) else organ_set_or_classes
    if len(organs) > MAX_ORGANS:
        raise ValueError(f"{len(organs)} organs are too many: {MAX_ORGANS} is the most a model can tell apart.")
    if len(set(organs)) != len(organs):
        raise ValueError(f"organs holds a name twice: {list(organs)}.")
    own_names = not isinstance(numbering, str)
    for organ in organs:
        if organ not in classes and not own_names:
            raise ValueError(
                f"organ {organ!r} is not in the organ set {list(classes)}{nearest_name(organ, list(classes))}."
            )
    label_names = _named_labels(numbering)

    table = np.full(256, UNKNOWN_LABEL, dtype=np.uint8)
    table[[0, *label_names]] = 0
    claimed: dict[str, str] = {}
    for organ_index, organ in enumerate(organs):
        names = _own_class_names(organ, classes) if own_names else _class_names(organ, classes[organ], numbering)
        for label, name in label_names.items():
            if name not in names:
                continue
            if table[label]:
                raise ValueError(
                    f"class {name!r} belongs to {claimed[name]!r} and to {organ!r}; a voxel can belong to one organ."
                )
            table[label] = organ_index + 1
            claimed[name] = organ
        if not own_names and not names:
            _warn_once(f"{numbering} has no class for organ {organ!r}: it is absent from every such mask.")
    if own_names:
        known = set().union(*NUMBERINGS.values(), *(_own_class_names(organ, classes) for organ in (*organs, *classes)))
        for label, name in label_names.items():
            if name is not None and name not in known:
                raise ValueError(
                    f"numbering: label {label} is called {name!r}, which is neither an organ of the set nor one of "
                    f"its classes{nearest_name(name, sorted(known))}. Map the label to None to leave it out."
                )
    return table


@cache
def _warn_once(message: str) -> None:
    logger.warning(message)


def _named_labels(numbering: str | Mapping[int, str | None]) -> dict[int, str | None]:
    """{label value: class name} of a named or of the user's own numbering."""
    if isinstance(numbering, str):
        if numbering not in NUMBERINGS:
            raise ValueError(
                f"numbering {numbering!r} is not one of {sorted(NUMBERINGS)}"
                f"{nearest_name(numbering, list(NUMBERINGS))}. For masks of your own give {{label value: class name}}."
            )
        return dict(enumerate(NUMBERINGS[numbering], start=1))
    labels = {int(label): name for label, name in numbering.items()}  # keys read from JSON are strings
    for label in labels:
        if not 0 < label < 256:
            raise ValueError(f"numbering: label {label} ({labels[label]!r}) is not within 1..255.")
    return labels


def _class_names(organ: str, entry, numbering: str) -> list[str]:
    by_numbering = _classes_by_numbering(organ, entry, "organ_classes")
    if numbering not in by_numbering:
        raise ValueError(
            f"organ {organ!r} has classes for {sorted(by_numbering)} but not for {numbering}; add them to the organ "
            "set (an empty list if this numbering has no such structure)."
        )
    for name in by_numbering[numbering]:
        _check_class(name, organ, numbering)
    return by_numbering[numbering]


def _own_class_names(organ: str, classes: Mapping) -> set[str]:
    """What the user's own numbering may call an organ: its name, or a class of it in any numbering."""
    if organ not in classes:
        return {organ}
    return {organ}.union(*_classes_by_numbering(organ, classes[organ], "organ_classes").values())
