"""Organ sets and label tables: official class tables, the sets' organs, real masks of both numberings, and errors."""

import json

import nibabel
import numpy as np
import pytest

from modeling_fvlm.organs import (
    NUMBERINGS,
    TOTALSEGMENTATOR_V1,
    TOTALSEGMENTATOR_V2,
    UNKNOWN_LABEL,
    load_organ_set,
    organ_label_table,
)

V1, V2 = "totalsegmentator_v1", "totalsegmentator_v2"
BODY_24 = [
    "face",
    "brain",
    "esophagus",
    "trachea",
    "lung",
    "heart",
    "kidney",
    "stomach",
    "liver",
    "gallbladder",
    "pancreas",
    "spleen",
    "colon",
    "aorta",
    "rib",
    "humerus",
    "scapula",
    "clavicula",
    "femur",
    "hip",
    "sacrum",
    "gluteus",
    "iliopsoas",
    "autochthon",
]
MORE_OF_BODY_36 = [
    "adrenal_gland",
    "duodenum",
    "iliac_artery",
    "iliac_vein",
    "inferior_vena_cava",
    "portal_and_splenic_vein",
    "pulmonary_artery",
    "small_bowel",
    "urinary_bladder",
    "cervical_vertebrae",
    "thoracic_vertebrae",
    "lumbar_vertebrae",
]


def masks_of(shared_dir):
    """(numbering, label counts of the file, entry of samples.json) for every sample mask."""
    samples = json.loads((shared_dir / "ct_samples" / "samples.json").read_text())
    for sample in samples:
        for mask in sample["masks"]:
            labels = np.asarray(nibabel.load(shared_dir / "ct_samples" / mask["file"]).dataobj)
            yield V1 if "v1" in mask["class_numbering"] else V2, np.bincount(labels.ravel(), minlength=256), mask


def test_tables_have_the_official_lengths_and_known_values():
    assert len(TOTALSEGMENTATOR_V1) == len(set(TOTALSEGMENTATOR_V1)) == 104
    assert len(TOTALSEGMENTATOR_V2) == len(set(TOTALSEGMENTATOR_V2)) == 117
    known = {  # name: (v1 value, v2 value), None where the release has no such class
        **{"spleen": (1, 1), "aorta": (7, 52), "colon": (57, 20), "rib_left_9": (66, 100), "rib_right_12": (81, 115)},
        **{"vertebrae_L5": (18, 27), "vertebrae_C1": (41, 50), "vertebrae_S1": (None, 26), "esophagus": (42, 15)},
        **{"heart_myocardium": (44, None), "heart_ventricle_right": (48, None), "pulmonary_artery": (49, None)},
        **{"heart": (None, 51), "pulmonary_vein": (None, 53), "atrial_appendage_left": (None, 61)},
        **{"subclavian_artery_right": (None, 55), "brachiocephalic_vein_left": (None, 59), "skull": (None, 91)},
        **{"face": (93, None), "brain": (50, 90), "sacrum": (92, 25), "kidney_cyst_left": (None, 23)},
        **{"urinary_bladder": (104, 21), "iliopsoas_right": (103, 89), "costal_cartilages": (None, 117)},
    }
    for name, values in known.items():
        for table, value in zip((TOTALSEGMENTATOR_V1, TOTALSEGMENTATOR_V2), values):
            assert (table.index(name) + 1 if name in table else None) == value, name


def test_every_class_count_of_the_real_masks_is_found_under_its_name(shared_dir):
    checked = set()
    for numbering, counts, mask in masks_of(shared_dir):
        named = {NUMBERINGS[numbering][label - 1]: int(count) for label, count in enumerate(counts) if label and count}
        assert named == mask["class_voxels"], mask["file"]
        checked.update((numbering, name) for name in named)
    assert len(checked) > 110, "both numberings must have been compared on most of their abdominal classes"


def test_organ_counts_of_the_real_masks(shared_dir):
    organ_set = load_organ_set("body_24")
    compared = 0
    for numbering, counts, mask in masks_of(shared_dir):
        table = organ_label_table(organ_set, organ_set.organs, numbering)
        for organ_index, organ in enumerate(organ_set.organs):
            expected = mask["organ_voxels"].get(organ, 0)
            if organ == "sacrum":  # samples.json counts the class alone, the organ takes S1 as well
                expected += mask["class_voxels"].get("vertebrae_S1", 0)
            if organ == "heart":  # samples.json leaves the appendage out in some masks
                expected = sum(
                    count for name, count in mask["class_voxels"].items() if "heart" in name or "atrial" in name
                )
            assert counts[table == organ_index + 1].sum() == expected, (mask["file"], organ)
            compared += expected > 0
    assert compared > 40


def test_sets_hold_the_designed_organs_in_order():
    assert load_organ_set("chest_4").organs == ("lung", "heart", "esophagus", "aorta")
    assert load_organ_set("body_24").organs == tuple(BODY_24)
    assert load_organ_set("body_36").organs == (*BODY_24, *MORE_OF_BODY_36)
    assert [load_organ_set(name).name for name in ("chest_4", "body_24", "body_36")] == [
        "chest_4",
        "body_24",
        "body_36",
    ]


@pytest.mark.parametrize("numbering", [V1, V2])
def test_body_24_takes_the_right_classes(numbering):
    organ_set = load_organ_set("body_24")
    table = organ_label_table(organ_set, organ_set.organs, numbering)
    names = {organ: set() for organ in organ_set.organs}
    for label, name in enumerate(NUMBERINGS[numbering], start=1):
        if table[label]:
            names[organ_set.organs[table[label] - 1]].add(name)
    assert {organ: len(found) for organ, found in names.items() if len(found) != 1} == {
        **{"lung": 5, "heart": 5 if numbering == V1 else 2, "kidney": 2, "rib": 24, "humerus": 2, "scapula": 2},
        **{"clavicula": 2, "femur": 2, "hip": 2, "gluteus": 6, "iliopsoas": 2, "autochthon": 2},
        **({"sacrum": 2} if numbering == V2 else {}),
    }
    assert names["face"] == ({"face"} if numbering == V1 else {"skull"})
    assert names["kidney"] == {"kidney_left", "kidney_right"}, "the cysts of v2 are no kidney"
    assert names["heart"] >= ({"heart_myocardium"} if numbering == V1 else {"heart", "atrial_appendage_left"})
    assert all(name.startswith("lung_") for name in names["lung"])


def test_body_36_vertebrae_and_the_artery_v2_lacks():
    organ_set = load_organ_set("body_36")
    v2 = organ_label_table(organ_set, organ_set.organs, V2)
    for organ, count in {"cervical_vertebrae": 7, "thoracic_vertebrae": 12, "lumbar_vertebrae": 5}.items():
        assert (v2 == organ_set.organs.index(organ) + 1).sum() == count
    artery = organ_set.organs.index("pulmonary_artery") + 1
    assert not (v2 == artery).any(), "v2 'total' has a pulmonary vein only"
    assert np.flatnonzero(organ_label_table(organ_set, organ_set.organs, V1) == artery).tolist() == [49]


def test_table_follows_the_given_order_and_marks_unknown_labels():
    organ_set = load_organ_set("chest_4")
    table = organ_label_table(organ_set, ["aorta", "lung"], V2)
    assert table.dtype == np.uint8 and table.shape == (256,)
    for label in range(256):
        name = TOTALSEGMENTATOR_V2[label - 1] if 0 < label <= 117 else None
        expected = 0 if label <= 117 else UNKNOWN_LABEL
        expected = 1 if name == "aorta" else 2 if name and name.startswith("lung") else expected
        assert table[label] == expected, label


def test_classes_from_json_give_the_same_table():
    organ_set = load_organ_set("body_24")
    classes = json.loads(json.dumps(organ_set.classes))
    expected = organ_label_table(organ_set, organ_set.organs, V1)
    assert np.array_equal(organ_label_table(classes, list(organ_set.organs), V1), expected)


def test_own_numbering_by_class_or_organ_name():
    organ_set = load_organ_set("chest_4")
    numbering = {"3": "aorta", 5: "lung", 6: "lung_upper_lobe_left", 9: None, 11: "spleen", 12: "heart_myocardium"}
    table = organ_label_table(organ_set, organ_set.organs, numbering)
    assert {label: int(table[label]) for label in (0, 3, 5, 6, 9, 11, 12)} == {
        0: 0,
        3: 4,
        5: 1,
        6: 1,
        9: 0,
        11: 0,
        12: 2,
    }
    assert (np.delete(table, [0, 3, 5, 6, 9, 11, 12]) == UNKNOWN_LABEL).all()
    prepared = organ_label_table({}, ["tumour", "lung"], {1: "tumour", 2: "lung"})  # organs without any classes
    assert prepared[:3].tolist() == [0, 1, 2]


def test_own_yaml_file(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("name: mine\nversion: 3\norgans:\n  bladder: [urinary_bladder]\n  tumour: [tumour_core]\n")
    organ_set = load_organ_set(path)
    assert (organ_set.name, organ_set.organs) == ("mine", ("bladder", "tumour"))
    assert organ_label_table(organ_set, ["bladder"], V1)[104] == 1
    assert organ_label_table(organ_set, organ_set.organs, {7: "tumour_core"})[7] == 2
    with pytest.raises(ValueError, match="totalsegmentator_v2 has no class 'tumour_core'"):
        organ_label_table(organ_set, organ_set.organs, V2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("organs: [lung, heart]", "needs a key 'organs'"),
        ("name: x", "needs a key 'organs'"),
        ("organs: {lung: lung_upper_lobe_left}", "'lung' needs a list of class names"),
        ("organs: {lung: []}", "'lung' needs a list of class names"),
        ("organs: {lung: {totalsegmentator_v3: [lung]}}", "nearest: 'totalsegmentator_v[12]'"),
        ("organs: {bowel: {totalsegmentator_v2: [colonn]}}", "no class 'colonn'; nearest: 'colon'"),
    ],
)
def test_a_broken_set_is_named(tmp_path, text, message):
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        load_organ_set(path)


@pytest.mark.parametrize(
    ("organs", "numbering", "message"),
    [
        (["lung", "oesophagus"], V2, "organ 'oesophagus' is not in the organ set .*nearest: 'esophagus'"),
        (["lung", "lung"], V2, "holds a name twice"),
        (["lung"], "totalsegmentor_v2", "numbering 'totalsegmentor_v2' is not one of .*nearest: 'totalsegmentator_v2'"),
        (["lung"], {300: "lung"}, "label 300 .* is not within 1..255"),
        (
            ["esophagus"],
            {1: "oesophagus"},
            "label 1 is called 'oesophagus'.*nearest: 'esophagus'.*None to leave it out",
        ),
    ],
)
def test_wrong_names_raise_with_the_nearest(organs, numbering, message):
    with pytest.raises(ValueError, match=message):
        organ_label_table(load_organ_set("chest_4"), organs, numbering)


def test_other_impossible_tables():
    with pytest.raises(ValueError, match="organ set 'body_42' is not one of .*nearest: 'body_24'"):
        load_organ_set("body_42")
    with pytest.raises(ValueError, match="class 'heart' belongs to 'heart' and to 'pump'"):
        organ_label_table({"heart": ["heart"], "pump": ["heart"]}, ["heart", "pump"], V2)
    with pytest.raises(ValueError, match="has classes for .* but not for totalsegmentator_v1"):
        organ_label_table({"heart": {V2: ["heart"]}}, ["heart"], V1)
    many = {name: [name] for name in TOTALSEGMENTATOR_V2}
    with pytest.raises(ValueError, match="117 organs are too many: 64"):
        organ_label_table(many, list(many), V2)
