"""What a sentence states, denies, could not see or only suspects, organ by organ and clause by clause."""

from pathlib import Path

import pytest

from data_builders.decompose import Analysis, decompose, is_abnormal_sentence
from data_builders.lexicon import load_lexicon
from modeling_fvlm.organs import load_organ_set

LEXICON = load_lexicon("english")
ORGANS = load_organ_set("body_24").organs

# organ+ is abnormal, organ- is not; organs that are not listed are not spoken of.
CASES = """
The liver is enlarged and the spleen is normal. | liver+ spleen-
The liver is normal and the spleen is enlarged. | liver- spleen+
The liver, spleen and pancreas are unremarkable. | liver- spleen- pancreas-
The pancreas is atrophic, the spleen and the adrenals are unremarkable. | pancreas+ spleen-
Unremarkable gallbladder, liver, and enlarged spleen. | gallbladder- liver- spleen+
Cysts in the liver, spleen and kidneys. | liver+ spleen+ kidney+
Heart normal, lungs clear, small left effusion. | heart- lung+
Liver, spleen, pancreas: normal; gallbladder: stones. | liver- spleen- pancreas- gallbladder+
The liver, which is enlarged, and the spleen, which is normal. | liver+ spleen-
Apart from a small renal cyst, the liver, pancreas and kidneys are normal. | liver- pancreas- kidney+
The liver is normal except for a 1 cm cyst. | liver+
A nasogastric tube runs along the esophagus and its tip is in the stomach. | esophagus+ stomach+
No pneumothorax or effusion, mild bibasilar atelectasis. | lung+
No consolidation, effusion, or pneumothorax. | lung-
No acute intracranial hemorrhage, midline shift or hydrocephalus. | brain-
There is no evidence of pneumonia, but a small effusion is noted in the left pleural space. | lung+
Fractures of the ribs, the scapula or the clavicle are not identified. | rib- scapula- clavicula-
The right kidney contains a stone, and hydronephrosis is not seen. | kidney+
Neither kidney shows hydronephrosis. | kidney-
Pericardial effusion: none. | heart-
Stones in both kidneys without hydronephrosis. | kidney+
No change in the cyst of the liver. | liver+
The heart is not enlarged. | heart-
Malignancy cannot be excluded in the pancreatic head. | pancreas+
Possible thickening of the gastric antrum versus underdistension. | stomach+
The previously seen pleural effusion has resolved. | lung-
The consolidation in the right lower lobe has nearly completely resolved. | lung+
Hiatal hernia is no longer seen. | esophagus- stomach-
Gallstones were described on ultrasound but are not visible on CT. | gallbladder-
The prior study showed a hepatic lesion, which is not visible today. | liver-
A pleural effusion that was not present on the previous examination. | lung+
The left kidney is absent. | kidney+
Emphysema is absent. | lung-
The gallbladder is surgically absent. | gallbladder+
The endotracheal tube has been removed. | trachea-
The right lung has been removed. | lung+
The spleen could not be assessed because of streak artifact from the spinal hardware. | spleen-
The gallbladder is contracted and could not be evaluated. | gallbladder-
The pancreas is obscured by unopacified bowel and cannot be evaluated. | pancreas-
Without oral contrast, gastric lesions cannot be ruled out. | stomach-
The ascending aorta measures 36 mm in diameter. | aorta-
The ascending aorta measures 45 mm in diameter. | aorta+
Spleen 11 cm | spleen-
Spleen 15 cm | spleen+
The spleen is larger than normal. | spleen+
The trachea is in the midline. | trachea-
The kidneys enhance symmetrically. | kidney-
The gastric fundus lies above the diaphragm. | stomach+
Heart size is stable. | heart-
Cirrhosis without splenomegaly. | liver+ spleen-
Pleural effusion without cardiomegaly. | lung+ heart-
Liver, pancreas and kidneys without injury. | liver- pancreas- kidney-
The stomach and the colon are without injury. | stomach- colon-
No stones are seen in the gallbladder, which is distended. | gallbladder+
No gallstones, gallbladder wall is thickened. | gallbladder+
No gallstones or biliary sludge is seen. | gallbladder-
The lungs, which show no nodules, are hyperinflated. | lung+
The mass does not invade the aorta. | aorta-
The aneurysm of the aorta does not compress the esophagus. | aorta+ esophagus-
No follow-up needed for the lung nodule. | lung+
No treatment required for the hepatic hemangioma. | liver+
Liver: nil significant. | liver-
No liver lesion save a simple cyst. | liver+
Pneumothorax has not recurred. | lung-
The lungs fail to show any nodule. | lung-
No effusion, emphysema in the upper lobes. | lung+
No effusion, mild emphysema in both upper lobes. | lung+
No hydronephrosis, stones in the left kidney up to 5 mm. | kidney+
No gallstones, wall thickening of 6 mm in the gallbladder. | gallbladder+
No ground glass, diffuse mosaic attenuation, large cysts, nor consolidation in the lungs. | lung-
No lung nodule, mass in the upper lobes. | lung-
No stones in the right kidney, left kidney or ureters. | kidney-
No aneurysm, dissection of the abdominal aorta. | aorta-
No embolism, large right effusion with atelectasis or consolidation. | lung+
No effusion, diffuse hepatic steatosis, stones in the gallbladder or duct. | liver+ gallbladder+
No effusion, multiple liver cysts of 3 cm or less. | liver+
Post-treatment CT: the liver is normal. | liver-
Post-treatment change of the liver. | liver+
A duplex sonography of the normal liver is advised. | liver-
The stomach, small and large bowel are not dilated. | stomach- colon-
Resolution of the right and left lower lobe opacities. | lung-
Spleen, pancreas and both kidneys have not changed and are normal. | spleen- pancreas- kidney-
Scapular fracture, clavicle spared. | scapula+ clavicula-
The liver and spleen show nothing of note. | liver- spleen-
Gallbladder not identified, probably contracted. | gallbladder-
The right hip joint is congruent. | hip-
Undisplaced # of the left clavicle. | clavicula+
Coronary calcium score is 0. | heart-
Agatston score: 0. | heart-
The coronary calcium score is 42. | heart+
Borderline heart size. | heart+
The heart is at the upper limits of normal in size. | heart-
CABG. | heart+
Solitary right kidney. | kidney+
Both kidneys excrete contrast promptly. | kidney-
Acute cholecystitis is less likely. | gallbladder-
Interval clearing of the left lower lobe consolidation. | lung-
Near-complete interval clearing of the left effusion. | lung+
Marked regression of the hepatic lesions. | liver+
No longer seen is the nodule in the lingula. | lung-
Stable post-radiation change in the left upper lobe. | lung+
Zero calcium score. | heart-
The RV/LV ratio is 0.9. | heart-
The RV/LV ratio is 1.4. | heart+
No suspicious features in the known renal cyst. | kidney+
No known renal cyst. | kidney-
The known renal cyst is no longer seen. | kidney-
No definite rib fracture, although subtle fractures may be missed. | rib-
The gallbladder is normally distended without stones. | gallbladder-
The right hip is replaced. | hip+
The right kidney is small/contracted in size. | kidney+
Gallbladder adequately distended, wall thin. | gallbladder-
Thin left frontal extradural measuring 4 mm. | brain+
No subdural. | brain-
Physiological tracer distribution in the brain. | brain-
The right upper lobe primary measures 4 cm. | lung+
Resolved pneumonia. | lung-
Resolving pneumonia. | lung+
"""


def parsed(line):
    sentence, _, expected = line.rpartition(" | ")
    return sentence, {word[:-1]: word[-1] == "+" for word in expected.split()}


@pytest.mark.parametrize(("sentence", "expected"), list(map(parsed, CASES.strip().splitlines())))
def test_organs_and_whether_they_are_abnormal(sentence, expected):
    assert {organ: text.is_abnormal for organ, text in decompose(sentence, "", ORGANS, LEXICON).items()} == expected


def test_sentences_of_many_kinds():
    """Diseases, devices, injuries and tumours of every organ, in the words of several schools."""
    lines = (Path(__file__).parent / "data" / "sentences.txt").read_text(encoding="utf-8").splitlines()
    cases = [parsed(f"{line} ") for line in lines if " |" in line]
    assert len(cases) > 300 and {organ for _, expected in cases for organ in expected} == set(ORGANS)
    wrong = []
    for sentence, expected in cases:
        found = {organ: text.is_abnormal for organ, text in decompose(sentence, "", ORGANS, LEXICON).items()}
        if found != expected:
            wrong.append((sentence, found))
    assert not wrong


def test_a_sentence_as_a_whole():
    assert is_abnormal_sentence("The liver is enlarged and the spleen is normal.", LEXICON)
    assert not is_abnormal_sentence("The liver and the spleen are normal.", LEXICON)


@pytest.mark.parametrize(
    ("sentence", "word", "denied", "uncertain", "historical"),
    [
        ("No effusion, mild atelectasis.", "effusion", True, False, False),
        ("No effusion, mild atelectasis.", "atelectasis", False, False, False),
        ("Effusion is seen, atelectasis is not seen.", "effusion", False, False, False),
        ("Effusion is seen, atelectasis is not seen.", "atelectasis", True, False, False),
        ("Aspiration pneumonia?", "pneumonia", False, True, False),
        ("Possible pneumonia; stones in the kidney.", "pneumonia", False, True, False),
        ("Possible pneumonia; stones in the kidney.", "stones", False, False, False),
        ("History of pneumonia.", "pneumonia", False, False, True),
        ("Pneumonia cannot be excluded.", "pneumonia", False, True, False),
        ("Opacities, suspicious for pneumonia.", "opacities", False, False, False),
        ("Opacities, suspicious for pneumonia.", "pneumonia", False, True, False),
        ("Opacities which may represent infection.", "opacities", False, False, False),
        ("Pneumonia may be present.", "pneumonia", False, True, False),
        ("Pneumonia is possible.", "pneumonia", False, True, False),
    ],
)
def test_how_a_word_is_spoken_of(sentence, word, denied, uncertain, historical):
    assertions = Analysis(sentence, LEXICON).assertions
    start = assertions.text.index(word)
    assert assertions.is_denied(start, start + len(word)) is denied
    assert assertions.is_uncertain(start, start + len(word)) is uncertain
    assert assertions.is_historical(start) is historical
