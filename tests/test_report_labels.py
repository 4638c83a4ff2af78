"""Labels from text: present, absent, uncertain, over a report; and files of rules that are none."""

import pytest
import yaml

from data_builders.decompose import decompose_report
from data_builders.lexicon import load_lexicon
from data_builders.report_labels import LABELS, label_values, load_finding_rules

LEXICON = load_lexicon("english")
RULES = load_finding_rules("ct_rate_18", LEXICON)
# The columns of CT-RATE's label files.
FINDINGS = [
    *("Medical material", "Arterial wall calcification", "Cardiomegaly", "Pericardial effusion"),
    *("Coronary artery wall calcification", "Hiatal hernia", "Lymphadenopathy", "Emphysema", "Atelectasis"),
    *("Lung nodule", "Lung opacity", "Pulmonary fibrotic sequela", "Pleural effusion", "Mosaic attenuation pattern"),
    *("Peribronchial thickening", "Consolidation", "Bronchiectasis", "Interlobular septal thickening"),
]


def labels_of(findings, impression="", rules=RULES):
    return decompose_report(findings, impression, ["lung", "heart"], LEXICON, rules=rules).labels


def test_the_findings_are_those_of_ct_rate():
    assert list(RULES.findings) == FINDINGS


@pytest.mark.parametrize("finding", FINDINGS)
def test_every_finding_is_stated_denied_and_suspected_by_its_first_term(finding):
    content = yaml.safe_load((LABELS / "ct_rate_18.yaml").read_text(encoding="utf-8"))
    term = content["findings"][finding]["terms"][0]
    assert labels_of(f"There is {term}.")[finding] == "present"
    assert labels_of(f"No {term} is seen.") == {finding: "absent"} | labels_of(f"No {term} is seen.")
    assert labels_of(f"No {term} is seen.")[finding] == "absent"
    assert labels_of(f"Possible {term}.")[finding] == "uncertain"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Calcified plaques in the coronary arteries and the aortic arch.",
         {"Coronary artery wall calcification": "present", "Arterial wall calcification": "present"}),
        ("Aortic valve calcification.", {}),
        ("Heart contour and size are natural. Pericardial effusion-thickening was not observed.",
         {"Cardiomegaly": "absent", "Pericardial effusion": "absent"}),
        ("The heart is enlarged.", {"Cardiomegaly": "present"}),
        ("Subcutaneous emphysema is seen.", {}),
        ("A nodule is seen in the thyroid gland.", {}),
        ("A 5 mm nodule is seen in the right upper lobe.", {"Lung nodule": "present"}),
        ("No enlarged lymph node is seen in the mediastinum.", {"Lymphadenopathy": "absent"}),
        ("The pleural effusion has resolved.", {"Pleural effusion": "absent"}),
        ("No change in the pleural effusion.", {"Pleural effusion": "present"}),
        ("Mild cardiomegaly, possible pericardial effusion.",
         {"Cardiomegaly": "present", "Pericardial effusion": "uncertain"}),
        ("Consolidation, aspiration?", {"Consolidation": "uncertain"}),
        ("History of emphysema.", {}),
        ("No effusion. Small pleural effusion on the left.", {"Pleural effusion": "present"}),
        ("No effusion, mild emphysema in both upper lobes.",
         {"Pleural effusion": "absent", "Emphysema": "present"}),
        ("Bilat pl eff, no consol, minor atx.",
         {"Pleural effusion": "present", "Consolidation": "absent", "Atelectasis": "present"}),
        ("Coronary calcium score is 0.", {"Coronary artery wall calcification": "absent"}),
        ("Coronary calcium score: 0 in LAD, 120 in RCA.", {}),  # not absent
        ("Zero calcium stones in the kidney.", {}),
        ("Coronary calcium score of 40.", {"Coronary artery wall calcification": "present"}),
        ("Heart size is at the upper limits of normal.", {"Cardiomegaly": "absent"}),
        ("The thoracic aorta is normal.", {}),
        ("Interlobular septa are thickened; frosted glass densities.",
         {"Interlobular septal thickening": "present", "Lung opacity": "present"}),
    ],
)  # fmt: skip
def test_labels_of_a_text(text, expected):
    assert labels_of(text) == expected


def test_present_comes_before_uncertain_before_absent():
    assert labels_of("No hiatal hernia.", "Possible hiatal hernia.") == {"Hiatal hernia": "uncertain"}
    assert labels_of("Hiatal hernia.", "Possible hiatal hernia. No hiatal hernia.") == {"Hiatal hernia": "present"}


def test_findings_of_the_users_own(tmp_path):
    path = tmp_path / "mine.yaml"
    rules = {
        "Gallstones": {"terms": ["gallstone", "cholelithiasis"]},
        "Renal cyst": {"weak": ["cyst"], "organs": ["kidney"]},
    }
    path.write_text(yaml.safe_dump({"name": "mine", "version": 1, "findings": rules}))
    mine = load_finding_rules(str(path), LEXICON)
    labels = labels_of("Cholelithiasis. Cyst in the liver. No cyst in the kidneys.", rules=mine)
    assert labels == {"Gallstones": "present", "Renal cyst": "absent"}
    assert label_values(labels, mine.findings) == (("Gallstones", 1), ("Renal cyst", 0))
    assert label_values({"Gallstones": "uncertain"}, mine.findings) == (("Gallstones", -1), ("Renal cyst", -1))
    assert label_values({}, mine.findings, unmentioned=0) == (("Gallstones", 0), ("Renal cyst", 0))


@pytest.mark.parametrize(
    ("rule", "match"),
    [
        ({}, "needs `terms`, `together` or `weak`"),
        ({"terms": [True]}, "terms must be a list of texts"),
        ({"terms": ["a"], "trems": ["b"]}, "'trems' is none of"),
        ({"weak": ["cyst"]}, "`weak` terms need `organs`"),
        ({"weak": ["cyst"], "organs": ["livr"]}, "no terms for organ 'livr'; nearest: 'liver'"),
        ({"terms": ["a"], "normal": ["(b"]}, r"findings\.X\.normal"),
    ],
)
def test_rules_that_are_none(tmp_path, rule, match):
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({"name": "mine", "version": 1, "findings": {"X": rule}}))
    with pytest.raises(ValueError, match=match):
        load_finding_rules(str(path), LEXICON)


def test_a_file_that_is_not_there():
    with pytest.raises(ValueError, match=r"neither a YAML file nor one of \['ct_rate_18'\]"):
        load_finding_rules("ct_rate", LEXICON)
