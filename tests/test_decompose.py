"""Reports to organ captions: sentences, terms, cues, and how far the plain rule comes on reports split by hand."""

import json
from pathlib import Path

import pytest
import yaml

from data_builders.cases import OrganText
from data_builders.decompose import (
    Analysis,
    caption_rows,
    decompose,
    is_abnormal_sentence,
    organs_of_sentences,
    split_sentences,
)
from data_builders.lexicon import load_lexicon, singular
from modeling_fvlm.organs import NUMBERINGS, load_organ_set

HUB_CONFIGS = Path(__file__).resolve().parents[1] / "hub_configs"
LEXICON = load_lexicon("english")
BODY_24 = load_organ_set("body_24").organs


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A 5.2 mm nodule. No effusion.", ["A 5.2 mm nodule.", "No effusion."]),
        ("1. First thing. 2. Second thing.", ["First thing.", "Second thing."]),
        ("1. First\n2. Second", ["First", "Second"]),
        ("1) Cyst. 2) Stone.", ["Cyst.", "Stone."]),
        ("- Coronary plaques.\n- Aorta of 4.1 cm.", ["Coronary plaques.", "Aorta of 4.1 cm."]),
        ("A cyst is seen in segment 7. A second is small.", ["A cyst is seen in segment 7.", "A second is small."]),
        ("As in the view of Dr. Smith. Normal.", ["As in the view of Dr. Smith.", "Normal."]),
        ("It measures approx. 5 mm. Stable.", ["It measures approx. 5 mm.", "Stable."]),
        ("Metastasis? Follow-up is advised.", ["Metastasis?", "Follow-up is advised."]),
        ("The nodule\nis stable. The liver is normal.", ["The nodule is stable.", "The liver is normal."]),
        ("Cardiomegaly; effusion, decreased.  Wide aorta.", ["Cardiomegaly; effusion, decreased.", "Wide aorta."]),
        ("1. Only one item, of 2. grade.", ["Only one item, of 2. grade."]),
        ("  \n ", []),
        ("...", []),
    ],
)  # fmt: skip
def test_sentences(text, expected):
    assert split_sentences(text) == expected


@pytest.mark.parametrize(
    ("word", "expected"),
    [("arteries", "artery"), ("vertebrae", "vertebra"), ("masses", "mass"), ("sinuses", "sinus"), ("ribs", "rib"),
     ("pancreas", "pancrea"), ("humerus", "humerus"), ("pelvis", "pelvis"), ("gas", "gas")],
)  # fmt: skip
def test_plurals(word, expected):
    assert singular(word) == expected
    assert singular(singular(word)) == expected


def slow_mentions(words, lexicon) -> set[str]:
    """Try every term at every place of the joined words, longest first."""
    text = " ".join(words) + " "
    terms = {}
    for organ, phrases in lexicon.terms.items():
        for phrase in phrases:
            terms.setdefault(" ".join(lexicon.words(phrase)), set()).add(organ)
    for phrase in (*lexicon.lists["elsewhere"], *lexicon.lists["ignored"]):
        terms.setdefault(" ".join(lexicon.words(phrase)), set())
    weak = {" ".join(lexicon.words(phrase)) for phrases in lexicon.weak_terms.values() for phrase in phrases}
    everything = sorted({*terms, *weak}, key=lambda term: -len(term.split()))
    found, position = set(), 0
    while position < len(text):
        term = next((term for term in everything if text.startswith(f"{term} ", position)), None)
        found |= terms.get(term, set())
        position = position + len(term) + 1 if term else text.find(" ", position) + 1
    return found


def test_terms_are_found_as_a_slow_search_finds_them():
    sentences = [
        "The aortic valve is calcified and the aorta is dilated.",
        "Subcutaneous emphysema of the chest wall; the lungs are clear.",
        "Stones in the gall bladder, and the urinary bladder is empty.",
        "The hepatic flexure and the splenic flexure of the colon.",
        "Left anterior descending and circumflex arteries, pulmonary artery, portal vein.",
        "Bilateral sacro-iliac and sacroiliac joints, femoral heads, iliac crests, iliac arteries.",
    ]
    for sentence in sentences:
        expected = slow_mentions(LEXICON.words(sentence), LEXICON)
        assert expected, sentence
        assert Analysis(sentence, LEXICON).organs == expected, sentence


@pytest.mark.parametrize(
    ("sentence", "expected"),
    [
        ("The aortic valve is calcified.", {"heart"}),  # not the aorta: the longest term wins
        ("A nodule is seen.", {"lung"}),  # a weak term alone
        ("A nodule is seen in the thyroid gland.", set()),  # a weak term, but another place is named
        ("A nodule is seen in the liver.", {"liver"}),
        ("Subcutaneous emphysema is seen.", set()),
        ("Cholelithiasis.", {"gallbladder"}),
        ("A lymph node lies to the right of the aorta, near the pancreas.", set()),  # where it lies, and no more
        ("A mass lies to the right of the aorta.", set()),  # the aorta is a landmark
        ("A cyst lies at the level of the pancreas.", {"pancreas"}),  # the place itself
        ("Nodules at the level of the carina.", {"lung"}),
        ("Lumbar spondylosis.", set()),
        ("No perigastric, peripancreatic or hepatic hilar lymphadenopathy.", set()),
        ("The liver is normal, and no lymph node is seen in the hepatic hilum.", {"liver"}),
        ("Aortic and mitral valves are calcified.", {"heart"}),  # the noun is shared
        ("A fistula between the trachea and the esophagus.", {"trachea", "esophagus"}),
        ("A nodule adjacent to the aorta and the esophagus.", {"lung"}),
        ("Oesophageal wall and peri-cardial oedema.", {"esophagus", "heart"}),
        ("The pancraes and the k1dneys.", {"pancreas", "kidney"}),
        ("The esophagus is displaced, adjacent to the aorta.", {"esophagus"}),  # the aorta is a landmark
        ("Hiatal hernia.", {"esophagus", "stomach"}),
        ("BILATERAL PLEURAL EFFUSIONS", {"lung"}),
        ("Contrast was given.", set()),
    ],
)
def test_organs_of_a_sentence(sentence, expected):
    assert organs_of_sentences([sentence], LEXICON)[0] & set(BODY_24) == expected


@pytest.mark.parametrize(
    ("sentences", "expected"),
    [
        (["The cerebellum is normal.", "No hemorrhage.", "Ventricles are dilated."], ["brain", "brain", "brain"]),
        (["Normal pons.", "Normal thalami.", "Clear sinuses.", "No hemorrhage."], ["brain", "brain", "face", "brain"]),
        (["The liver is normal.", "No hemorrhage."], ["liver", ""]),
        (["Calcified mitral valve.", "The liver is normal.", "Ventricles are dilated."], ["heart", "liver", "heart"]),
        (["The lungs are clear.", "The brain is normal.", "Edema is seen."], ["lung", "brain", "brain"]),
        (["The lungs are clear.", "The liver is normal.", "Edema is seen."], ["lung", "liver", "lung"]),
        (["Aneurysm of the abdominal aorta.", "The sac measures 5 cm."], ["aorta", "aorta"]),
        (["Head: the brain is normal.", "Chest: the parenchyma is normal."], ["brain", "lung"]),
        (["Pleural sinuses are clear.", "The kidneys are normal.", "CVA tenderness."], ["lung", "kidney", ""]),
    ],
)  # fmt: skip
def test_what_a_report_is_about_tells_what_some_terms_mean(sentences, expected):
    found = [" ".join(sorted(organs & set(BODY_24))) for organs in organs_of_sentences(sentences, LEXICON)]
    assert found == expected


@pytest.mark.parametrize(
    ("sentences", "expected"),
    [
        (["The heart (CTR: 0.54) is normal.", "Perforated ulcer is suspected."], ["heart", ""]),  # no heading
        (["ABDOMEN: The liver is normal.", "Nodules are seen."], ["liver", "lung"]),  # a region is no place
        (["Abdomen: laceration of segment 5/6."], ["liver"]),
        (["ORBITS: normal.", "Vessels: no stenosis."], ["face", ""]),
        (["Parenchyma: the pons and thalami are normal.", "Basal frontal contusion."], ["brain", "brain"]),
        (["ORBITS: normal.", "Bones: See face section."], ["face", ""]),
        (["LUNGS: Nodules.", "Suggest follow-up."], ["lung", ""]),
        (["LUNGS: Nodules.", "The effusion of the last examination is not seen."], ["lung", "lung"]),
        (["Tumor of the rectum.", "Length: 5.5 cm"], ["colon", "colon"]),
        (["The lungs are clear.", "Parenchymal calcification at the level of liver segment 7."], ["lung", "liver"]),
        (["The trachea is open.", "Both hemithorax are symmetrical."], ["trachea", "lung"]),
        (["A lesion of the pancreas.", "This is seen on series 5.", "It measures 1 cm."], ["pancreas"] * 3),
        (["Filling defects in the segmental branches of the right upper, middle and lower lobes."], [""]),
        (["Filling defects in the right lower lobe segmental and left upper lobe subsegmental branches."], [""]),
        (["The lungs are clear.", "The heart is normal.", "Right basal infarct."], ["lung", "heart", "lung"]),
        (["The liver is large.", "No focal SOL."], ["liver", "liver"]),
        (["Metastasis of the rib.", "This does not breach the pleura."], ["rib", "lung rib"]),
        (["CT HEAD WITHOUT CONTRAST", "LOW DOSE CT LUNG SCREENING"], ["", ""]),
        (["CT of the brain shows an infarct."], ["brain"]),
    ],
)
def test_headings_references_and_titles(sentences, expected):
    found = [" ".join(sorted(organs & set(BODY_24))) for organs in organs_of_sentences(sentences, LEXICON)]
    assert found == expected


def test_a_region_on_a_line_of_its_own_is_no_heading():
    text = "ABDOMEN\nThe appendix is dilated.\nNo perforation.\n\nBONES\nNo focal lesion."
    assert decompose(text, "", BODY_24, LEXICON)["colon"].findings == ("The appendix is dilated.", "No perforation.")


def test_it_stays_what_it_was():
    sentences = ["The left lung contains a mass.", "It does not invade the trachea.", "It measures 5 cm."]
    assert organs_of_sentences(sentences, LEXICON) == [{"lung"}, {"lung", "trachea"}, {"lung"}]


def test_a_sentence_may_speak_of_the_one_before():
    sentences = ["A cyst is seen in the left kidney.", "It measures 3 cm.", "Contrast was given.", "It was tolerated."]
    assert [set(organs) for organs in organs_of_sentences(sentences, LEXICON)] == [{"kidney"}, {"kidney"}, set(), set()]
    headed = ["Liver: normal size.", "Density is normal.", "Spleen: 14 cm.", "Enlarged."]
    assert [set(organs) for organs in organs_of_sentences(headed, LEXICON)] == [{"liver"}] * 2 + [{"spleen"}] * 2


@pytest.mark.parametrize(
    ("sentence", "expected"),
    [
        ("The liver is normal.", False),
        ("No pleural effusion or pneumothorax was detected.", False),
        ("Pericardial thickening or effusion was not observed.", False),
        ("The trachea is open, and no fistula was detected.", False),
        ("There is a 5 mm nodule without calcification.", True),
        ("No pleural effusion, but a nodule is seen in the right lung.", True),
        ("No change in the nodule of the right lung.", True),
        ("The pleural effusion has resolved.", False),
        ("The spleen could not be evaluated.", False),
        ("The gallbladder was not observed (cholecystectomy).", True),
        ("Status post right pneumonectomy without recurrence.", True),
        ("Heart size is normal, pericardial effusion is present.", True),
        ("The aorta is tortuous.", True),
        ("The heart is enlarged and the lungs are clear.", True),
        ("Cardiomegaly is not seen.", False),
        ("Emphysema is absent.", False),
        ("The ground-glass areas in both lungs are no longer visible.", False),
    ],
)
def test_cues(sentence, expected):
    assert is_abnormal_sentence(sentence, LEXICON) is expected


def test_caption_rows_name_every_organ_once_in_the_order_of_the_set():
    rows = caption_rows("The lungs are clear. The lungs show no nodule.", "Normal lungs.", ("heart", "lung"), LEXICON)
    normal, lungs = (
        "heart shows no significant abnormalities.",
        "Normal lungs. The lungs are clear. The lungs show no nodule.",
    )
    assert rows == [
        {"organ": "heart", "caption": normal, "is_abnormal": False, "is_mentioned": False},
        {"organ": "lung", "caption": lungs, "is_abnormal": False, "is_mentioned": True},
    ]


@pytest.mark.parametrize("is_abnormal", [False, True])
def test_a_blank_ready_text_says_nothing(is_abnormal):
    """Flagged or not, and in either section; in the published form its "." is abnormal, and says as little."""
    for text in (OrganText(("",), (), is_abnormal), OrganText((), (" ", "\n"), is_abnormal)):
        (row,) = caption_rows("", "", ["lung"], LEXICON, {"lung": text})
        normal = "lung shows no significant abnormalities."
        assert row == {"organ": "lung", "caption": normal, "is_abnormal": False, "is_mentioned": False}
    (row,) = caption_rows("", "", ["lung"], LEXICON, {"lung": OrganText(("",), (), is_abnormal)}, published=True)
    assert row == {"organ": "lung", "caption": ".", "is_abnormal": True, "is_mentioned": False}


def micro_f1(shared_dir) -> tuple[float, int, int]:
    """F1 over (report, organ, section, sentence), and how many organs spoken of are judged as by hand."""
    ours, gold, judged, right = set(), set(), 0, 0
    for report in json.loads((shared_dir / "reports_samples.json").read_text()):
        texts = decompose(report["findings"], report["impression"], BODY_24, LEXICON)
        for organ, text in texts.items():
            ours |= {(report["id"], organ, "findings", sentence) for sentence in text.findings}
            ours |= {(report["id"], organ, "impression", sentence) for sentence in text.impression}
        for organ, said in report["organs"].items():
            gold |= {(report["id"], organ, part, line) for part in ("findings", "impression") for line in said[part]}
            if organ in texts:
                judged += 1
                right += texts[organ].is_abnormal == said["abnormal"]
    assert len(gold) > 100
    return 2 * len(ours & gold) / (len(ours) + len(gold)), judged, right


def test_reports_split_by_hand(shared_dir):
    """Measured: F1 1.000, 87 of 87 organs judged alike. The lexicon was written with these ten reports at hand."""
    f1, judged, right = micro_f1(shared_dir)
    assert f1 >= 0.97
    assert judged >= 80 and right >= 0.95 * judged


def test_sentences_of_the_synthetic_set():
    """Another author's sentences for its findings: organ and abnormality of each. Measured: all of them."""
    content = yaml.safe_load((HUB_CONFIGS / "synthetic" / "findings.yaml").read_text(encoding="utf-8"))
    wrong, count = [], 0
    for finding in content["findings"]:
        organs = {finding["organ"], *finding.get("also", [])}
        positives = [f"There is {noun}." for noun in finding["nouns"]]
        negatives = [pattern.format(noun) for noun in finding["nouns"] for pattern in ("No {}.", "No {} is seen.")]
        described = [text.format(side="left", mm=12, count=3) for text in finding["described"]]
        for is_abnormal, sentences in ((True, positives + described), (False, negatives)):
            for sentence in sentences:
                named = organs_of_sentences([sentence], LEXICON)[0] & set(BODY_24)
                count += 1
                if named != organs or is_abnormal_sentence(sentence, LEXICON) != is_abnormal:
                    wrong.append((sentence, sorted(named)))
    assert count > 200
    assert len(wrong) <= 0.02 * count, wrong


def test_the_lexicon_covers_every_organ_of_the_largest_set_and_stays_text():
    organs = load_organ_set("body_36").organs
    LEXICON.check_covers(organs)
    classes = {class_name for names in NUMBERINGS.values() for class_name in names}
    reached = {part.organ for name in (*organs, *classes) for part in LEXICON.resolve(name)}
    assert set(LEXICON.terms) == reached, "a misspelt organ in the lexicon would never be found"
    for organ in organs:  # the organ's own name leads to it
        assert organ in organs_of_sentences([f"The {organ.replace('_', ' ')} is seen."], LEXICON)[0], organ
    with pytest.raises(ValueError, match="no terms for organ 'lunge'; nearest: 'lung'"):
        LEXICON.check_covers(["lunge"])


def test_a_lexicon_of_the_users_own(tmp_path):
    path = tmp_path / "mine.yaml"
    content = yaml.safe_load((HUB_CONFIGS / "lexicon" / "english.yaml").read_text())
    content["organs"]["placenta"] = {"terms": ["placenta", "placental"]}
    path.write_text(yaml.safe_dump(content))
    texts = decompose("Placental calcification.", "", ("placenta",), load_lexicon(str(path)))
    assert texts["placenta"].findings == ("Placental calcification.",) and texts["placenta"].is_abnormal
    content["organs"]["placenta"] = {"terms": [True]}
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(ValueError, match=r"organs\.placenta\.terms must be a list of texts"):
        load_lexicon(str(path))
    with pytest.raises(ValueError, match="neither a YAML file nor one of"):
        load_lexicon("klingon")
