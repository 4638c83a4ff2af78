"""The lexicon: organs of any set lead to terms, spellings come together, misprints are mended and words left alone."""

import pickle

import pytest
import yaml

from data_builders.decompose import decompose
from data_builders.lexicon import LEXICONS, Part, fold, load_lexicon, singular
from modeling_fvlm.organs import NUMBERINGS, OrganSet, load_organ_set

LEXICON = load_lexicon("english")


@pytest.mark.parametrize("numbering", NUMBERINGS)
def test_every_class_of_totalsegmentator_leads_to_terms(numbering):
    for name in NUMBERINGS[numbering]:
        assert LEXICON.resolve(name), name
        for part in LEXICON.resolve(name):
            assert part.organ in LEXICON.terms and LEXICON.terms[part.organ]
            assert ("left" in name) == (part.side == "left") and ("right" in name) == (part.side == "right")


def test_sides_parts_and_numbers():
    assert LEXICON.resolve("rib_left_4") == (Part("rib", "left", "", 4),)
    assert LEXICON.resolve("vertebrae_L3") == (Part("lumbar_vertebrae", "", "", 3),)
    assert LEXICON.resolve("lung_upper_lobe_right") == (Part("lung", "right", "lung_upper_lobe"),)
    assert LEXICON.resolve("oesophagus") == (Part("esophagus"),)
    assert LEXICON.resolve("placenta") == ()


@pytest.mark.parametrize(
    ("sentence", "expected"),
    [
        ("A nodule is seen in the left upper lobe.", {"lung_upper_lobe_left"}),
        ("Bibasilar atelectasis.", {"lung_lower_lobe_left", "lung_lower_lobe_right"}),
        ("The lungs are clear.", {"lung_upper_lobe_left", "lung_lower_lobe_left", "lung_lower_lobe_right"}),
        ("Cyst in the right kidney.", {"kidney_right", "kidney_cyst_right"}),
        ("Both kidneys are normal.", {"kidney_left", "kidney_right"}),
        ("Right hydronephrosis; the left kidney is normal.", {"kidney_left", "kidney_right"}),
        ("Fractures of the left 4th to 6th ribs.", {"rib_left_4", "rib_left_5"}),
        ("No rib fracture.", {"rib_left_4", "rib_left_5", "rib_right_5"}),
        ("Compression fracture of L1-L3.", {"vertebrae_L1", "vertebrae_L2"}),
        ("Lumbar spondylosis.", {"vertebrae_L1", "vertebrae_L2", "vertebrae_L5"}),
        ("Schmorl node at T12.", {"vertebrae_T12"}),
        ("Goiter.", {"thyroid_gland"}),
        ("The left atrium is dilated.", {"heart_atrium_left", "atrial_appendage_left"}),
        ("Enlarged prostate.", {"prostate"}),
        ("The subclavian arteries are patent.", {"subclavian_artery_left", "subclavian_artery_right"}),
        ("The right subclavian artery is stenosed.", {"subclavian_artery_right"}),
    ],
)
def test_a_set_of_classes(sentence, expected):
    classes = (
        *("lung_upper_lobe_left", "lung_lower_lobe_left", "lung_lower_lobe_right", "kidney_left", "kidney_right"),
        *(
            "kidney_cyst_right",
            "rib_left_4",
            "rib_left_5",
            "rib_right_5",
            "vertebrae_L1",
            "vertebrae_L2",
            "vertebrae_L5",
        ),
        *("vertebrae_T12", "thyroid_gland", "heart_atrium_left", "atrial_appendage_left", "prostate"),
        *("subclavian_artery_left", "subclavian_artery_right"),
    )
    assert set(decompose(sentence, "", classes, LEXICON)) == expected


@pytest.mark.parametrize(
    ("sentence", "left", "right"),
    [
        ("Left renal cyst, right kidney normal.", True, False),
        ("Right hydronephrosis; the left kidney is normal.", False, True),
        ("Both kidneys contain stones.", True, True),
        ("Left kidney is normal, and the right kidney is atrophic.", False, True),
        ("The kidneys are normal.", False, False),
    ],
)
def test_a_finding_is_of_its_side(sentence, left, right):
    texts = decompose(sentence, "", ("kidney_left", "kidney_right"), LEXICON)
    assert (texts["kidney_left"].is_abnormal, texts["kidney_right"].is_abnormal) == (left, right)


@pytest.mark.parametrize(
    ("sentence", "expected"),
    [
        ("The skull base is intact.", {"skull"}),
        ("Depressed fracture of the calvarium.", {"skull"}),
        ("Fracture of the temporal bone.", {"skull"}),
        ("Fluid in the maxillary sinus.", {"face", "skull"}),
        ("Fracture of the nasal bone.", {"face", "skull"}),
        ("Proptosis of the left eye.", {"face"}),
        ("Right frontal craniotomy.", {"brain", "skull"}),
        ("Skull base meningioma.", {"brain", "skull"}),
    ],
)
def test_base_and_vault_of_the_skull_are_not_the_face(sentence, expected):
    assert set(decompose(sentence, "", ("face", "brain", "skull"), LEXICON)) == expected


def test_an_organ_of_the_users_own_is_known_by_its_classes():
    organ_set = OrganSet(
        "mine",
        ("left_sided_ribs", "liver"),
        {"left_sided_ribs": {"v2": ["rib_left_1", "rib_left_2"]}, "liver": {"v2": ["liver"]}},
    )
    with pytest.raises(ValueError, match="no terms for organ 'left_sided_ribs'"):
        LEXICON.check_covers(organ_set.organs)
    lexicon = LEXICON.for_organ_set(organ_set)
    lexicon.check_covers(organ_set.organs)
    texts = decompose(
        "Fracture of the left 2nd rib. Fracture of the right 2nd rib. The liver is normal.",
        "",
        organ_set.organs,
        lexicon,
    )
    assert texts["left_sided_ribs"].findings == ("Fracture of the left 2nd rib.",)
    assert not texts["liver"].is_abnormal
    assert LEXICON.for_organ_set(load_organ_set("body_36")) is LEXICON


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Oesophagus", "esophagus"), ("haemorrhage", "hemorrhage"), ("caecum", "cecum"), ("tumours", "tumor"),
        ("calibre", "caliber"), ("vertebrae", "vertebra"), ("sub-pleural", "subpleural"),
        ("Gall Bladder", "gall bladders"), ("pneurnothorax", "pneumothorax"), ("k1dney", "kidney"),
        ("pancraes", "pancreas"), ("hydronephrosls", "hydronephrosis"), ("metastases", "metastasis"),
        ("peri-cardial", "pericardial"), ("ga11b1adder", "gallbladder"), ("hydronefrosis", "hydronephrosis"),
        ("kidnies", "kidney"), ("speen", "spleen"), ("arteries", "artery"),
    ],
)  # fmt: skip
def test_spellings_that_are_one(one, other):
    assert LEXICON.words(one) == LEXICON.words(other)


@pytest.mark.parametrize(
    "word", ["spiral", "infusion", "stricture", "evacuated", "staple", "thorough", "opacify", "coastal"]
)
def test_words_that_are_no_misprints(word):
    assert LEXICON.words(word) == [word]


def test_folding_keeps_places():
    text = "İleal œdema – ﬁ × Müller’s"
    assert len(fold(text)) == len(text) and fold(text).startswith("ileal edema -")


@pytest.mark.parametrize("word", ["pancreas", "humerus", "pelvis", "gas", "stenosis"])
def test_singular_is_singular(word):
    assert singular(singular(word)) == singular(word)


def test_what_was_found_out_is_not_sent_to_workers():
    LEXICON.words("pneurnothorax")
    copy = pickle.loads(pickle.dumps(LEXICON))
    assert copy == LEXICON and "_mended" not in vars(copy)
    assert copy.words("pneurnothorax") == ["pneumothorax"]


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda content: content.pop("landmarks"), "not in the form of .*landmarks"),
        (lambda content: content["cues"].update(normal=["(open"]), "a cue is no regular expression"),
        (
            lambda content: content["parts"].update(x={"of": "livr", "terms": ["a"]}),
            "parts.x is of 'livr'.*nearest: 'liver'",
        ),
        (lambda content: content.update(elsewhere=[True]), "elsewhere must be a list of texts"),
    ],
)
def test_a_file_that_is_none(tmp_path, change, match):
    content = yaml.safe_load((LEXICONS / "english.yaml").read_text(encoding="utf-8"))
    change(content)
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    with pytest.raises(ValueError, match=match):
        load_lexicon(str(path))
