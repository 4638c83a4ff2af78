"""Sections and sentences of reports: headers, lists, wrapped lines, capitals, and text that is none."""

import time

import pytest

from data_builders.report_sentences import clean, find_sentences, report_sentences, split_sentences


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The liver is normal.The spleen measures 12 cm.No cyst.", 3),
        ("LIVER NORMAL.SPLEEN ENLARGED.", 2),
        ("the liver is normal. the spleen is large. no ascites.", 3),
        ("lungs : no nodule . minimal scar at the base . heart : normal .", 3),
        ("Disc bulge at L4-5. Facet arthrosis at L5-S1.", 2),
        ("Fracture of the left 6. and 7. rib.", 1),
        ("Nodule of 5 x 3 mm. Cyst of 2,5 cm. Type B dissection.", 3),
        ("Hepatitis C. The liver is small.", 2),
        ("Nodule of 23 mm (prev. 19 mm) in series no. 4, cf. Fig. 3.", 1),
        ("Bilat. effusions, ant. to the liver, approx. 4 mm.", 1),
        ("The vessels and the heart IV. It could not be evaluated.", 1),
        ("Without IV. Contrast would tell more.", 1),
        ("Cyst in segment IV. The spleen is normal.", 2),
        ("Cysts in segments II, IV. The spleen is normal.", 2),
        ("Renal cyst, Bosniak III-IV. The spleen is normal.", 2),
        ("A nodule is seen; it is stable; no effusion.", 1),  # semicolons end clauses
        ("Emphysema in both lungs  Coronary calcification  Hiatal hernia", 3),  # a wide gap for a full stop
        ("Consolidation?Follow-up.", 1),
        ("1.) Cyst.\n2.) Stone.", 2),
        ("a) Cyst b", 1),
        ("Impression of the study: 1. Cyst. 2. Stone.", 3),
        ("l. Cyst.\n2. Stone.", 2),  # a scanned 1
    ],
)
def test_how_many_sentences(text, expected):
    sentences = split_sentences(text)
    assert len(sentences) == expected, sentences
    for sentence in sentences:  # verbatim, and nothing comes twice
        assert sentence in " ".join(text.split()) and any(map(str.isalpha, sentence))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The nodule in the\nright lower lobe is stable.\nThe liver is normal.", 2),
        ("A fracture of the\nT12 vertebra and of the 6th\nrib.", 1),
        ("LIVER: NORMAL IN SIZE AND\nCONTOUR. NO MASS.\nSPLEEN: ENLARGED\nPANCREAS: NORMAL", 4),
        ("Lungs clear; no effusion\nTrachea midline\nHeart enlarged", 3),
        ("* Cyst\n• Stone\n– Mass\n> Hernia", 4),
        ("Lesions measuring\n12 and 14 mm.", 1),
        ("CHEST WALL: Seroma of 8 cm,\nBONES: No lesion.\nPLEURA: Fluid in the\nLYMPH NODES: None.", 4),
    ],
)
def test_wrapped_lines_and_lines_of_their_own(text, expected):
    assert len(split_sentences(text)) == expected, split_sentences(text)


def texts_of(sentences):
    return [sentence.text for sentence in sentences]


def test_headers_inside_one_text():
    report = (
        "CLINICAL HISTORY: Known emphysema.\nTECHNIQUE: CT without contrast.\nCOMPARISON: None.\n"
        "FINDINGS: The lungs are clear. Comparison was made with 2019.\n\nIMPRESSION:\n1. Normal lungs."
        "\n2. No effusion."
    )
    found = report_sentences(report, "")
    assert texts_of(found.findings) == ["The lungs are clear.", "Comparison was made with 2019."]
    assert texts_of(found.impression) == ["Normal lungs.", "No effusion."]
    # Without a header of findings they begin with the next line.
    found = report_sentences("TECHNIQUE: CT with\ncontrast.\nLUNGS: Clear.\nCONCLUSION\nNormal.", "")
    assert texts_of(found.findings) == ["LUNGS: Clear."] and texts_of(found.impression) == ["Normal."]
    assert texts_of(report_sentences("Cyst.\nComment: Stone.", "").impression) == ["Stone."]
    found = report_sentences("FINDlNGS: Cyst.\nIMPRESSlON: Stone.", "")
    assert texts_of(found.findings) == ["Cyst."] and texts_of(found.impression) == ["Stone."]
    # "Other findings" are not where they begin.
    found = report_sentences("Comparison: CT of May.\nTarget lesions:\n- Cyst of 2 cm.\nOther findings:\nStone.", "")
    assert texts_of(found.findings) == ["Target lesions:", "Cyst of 2 cm.", "Stone."]
    # A text of the impression may hold findings; words in a sentence are no headers.
    found = report_sentences("Findings consistent with cysts.", "Findings: Cyst. Impression: Benign.")
    assert texts_of(found.findings) == ["Findings consistent with cysts.", "Cyst."]
    assert texts_of(found.impression) == ["Benign."]


def test_how_a_sentence_stands():
    sentences = find_sentences("LIVER:\nNormal. No mass.\n\nAll else is normal.")
    assert [(s.is_line, s.begins_block, s.begins_line) for s in sentences] == [
        (True, True, True), (False, False, True), (False, False, False), (False, True, True),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "expected", "notes"),
    [
        ("<p>Liver &lt; 5 mm</p><br/>x", "\nLiver < 5 mm\n\nx", {"html": 4}),
        ("a < b and <5 mm", "a < b and <5 mm", {}),
        ("<script>alert('liver')</script>Spleen<style>x{}</style>.", "Spleen.", {}),
        ("Li\x00ver\x07 \u200bnormal", "Li ver   normal", {"control_characters": 3}),
        ("**Liver:** normal\n## Lungs", "Liver: normal\nLungs:", {}),
        ("a\r\nb\rc_x000D_\nd\\.br\\e", "a\nb\nc\nd\ne", {}),
    ],
)
def test_what_is_no_language_goes(text, expected, notes):
    cleaned, found = clean(text)
    assert cleaned == expected
    assert set(found) == set(notes)
    if "control_characters" in notes:
        assert found == notes


@pytest.mark.parametrize(
    "text", ["abc. ", "abc ", "1. ", "<", "<script>", "Findings ", "A\n", "no no no, ", "(", "e.g. "]
)
def test_time_grows_with_the_length_and_not_with_its_square(text):
    seconds = []
    for length in (15_000, 150_000):
        start = time.process_time()
        cleaned, _ = clean(text * (length // len(text)))
        report_sentences(cleaned, "")
        seconds.append(time.process_time() - start)
    # Ten times the text takes ten times as long, by its square a hundred times.
    assert seconds[1] < 40 * max(seconds[0], 0.02)
