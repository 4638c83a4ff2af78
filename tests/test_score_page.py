"""The page of misplaced sentences: each is there, in its place, with the organs that lack it or have it wrongly."""

import copy
from pathlib import Path

import pytest
from html_page import check_stands_alone, in_browser

from data_builders.__main__ import main
from data_builders.decompose_score import score
from data_builders.decomposition_files import organs_of, read_decompositions
from data_builders.score_page import NOWHERE, confusion_counts, score_page, with_context

GOLD = Path(__file__).parent / "data" / "reports_gold" / "tuning"
EVIL = "<script>alert('x')</script><b>&\"' </style>"


def result_of(gold, split, organs):
    return {"gold": "gold.json", "method": "rules", "organ_set": "body_24", **score(gold, split, organs)}


@pytest.fixture(scope="module")
def scored():
    """Gold, and a split in which the pancreas has what is the spleen's, the liver lost all, and a flag turned."""
    gold = read_decompositions(GOLD)
    _, organs = organs_of(gold, None)
    split = copy.deepcopy(gold)
    for entry in split:
        entry["organs"].pop("liver", None)
        if "spleen" in entry["organs"] and "pancreas" not in entry["organs"]:
            entry["organs"]["pancreas"] = entry["organs"].pop("spleen")
        if "heart" in entry["organs"]:
            entry["organs"]["heart"]["abnormal"] = True
    split[0]["organs"]["lung"] = {"findings": ["Honeycombing."], "impression": [], "abnormal": True}
    return gold, result_of(gold, split, organs)


def test_the_page_stands_alone_and_names_every_misplaced_sentence(scored):
    gold, result = scored
    page = score_page(gold, result)
    parsed = check_stands_alone(page)
    assert len(result["misplaced"]) > 40 and len(parsed.text["strong"]) == len(result["misplaced"])
    assert set(parsed.text["strong"]) == {one["sentence"] for one in result["misplaced"]}
    told = " ".join(parsed.text["span"])
    assert "liver lacks it" in told and "pancreas has it wrongly" in told and "spleen has it wrongly" not in told
    assert f"{result['micro_f1']:.3f}" in parsed.text["td"] and "Honeycombing." in parsed.text["td"]
    assert sum(one["organ"] == "heart" for one in result["wrong_flags"]) > 5


def test_a_split_that_is_gold_has_a_page(scored):
    gold, _ = scored
    page = score_page(gold, result_of(gold, gold, organs_of(gold, None)[1]))
    assert "No sentence is misplaced." in page and not check_stands_alone(page).text.get("strong")


def test_confusion_by_hand():
    misplaced = [
        {"missing": ["spleen"], "extra": ["pancreas"]},
        {"missing": ["spleen"], "extra": ["pancreas", "liver"]},
        {"missing": ["liver"], "extra": []},
        {"missing": [], "extra": ["liver"]},
    ]
    assert confusion_counts(misplaced) == {
        ("spleen", "pancreas"): 2,
        ("spleen", "liver"): 1,
        ("liver", NOWHERE): 1,
        (NOWHERE, "liver"): 1,
    }


def test_what_stands_before_a_sentence_is_shown():
    one = {"id": "a", "section": "findings", "sentence": "It is large.", "predicted": ["lung"], "missing": ["liver"],
           "extra": ["lung"]}  # fmt: skip
    shown = with_context(one, {("a", "findings"): "A cyst is seen\nin the liver. It  is large. No node."})
    assert shown["before"] == "A cyst is seen in the liver."
    assert shown["organs"] == [("missing", "liver"), ("extra", "lung")]
    far = with_context(one, {("a", "findings"): f"{'word ' * 100}It is large."})
    assert far["before"].startswith("... ") and len(far["before"]) < 170


def test_every_text_is_escaped():
    said = {"findings": [EVIL, "gone " + EVIL], "impression": [], "abnormal": True}
    gold = [{"id": EVIL, "findings": f"{EVIL} {EVIL}", "impression": "", "organs": {EVIL: said}}]
    split = [{"id": EVIL, "organs": {"lung": said, EVIL: {"findings": [EVIL], "impression": [], "abnormal": False}}}]
    result = result_of(gold, split, (EVIL, "lung")) | {"method": EVIL, "gold": EVIL}
    assert result["misplaced"] and result["wrong_flags"] and result["invented"]
    page = score_page(gold, result)
    parsed = check_stands_alone(page)
    assert not parsed.of("b") and page.count("</style>") == 1 and page.count("alert(") > 8


def test_the_command_writes_the_page(tmp_path):
    out = tmp_path / "score.html"
    split = tmp_path / "split.json"
    split.write_text('[{"id": "tuning_02", "organs": {}}]')
    files = ["--gold", str(GOLD), "--predicted", str(split), "--json", str(tmp_path / "s.json"), "--page", str(out)]
    assert main(["decompose-score", *files]) == 0
    page = out.read_text(encoding="utf-8")
    assert f"{len(read_decompositions(GOLD))} reports" in page and "split.json" in page


@pytest.mark.slow
@pytest.mark.parametrize("width", [500, 1400])
def test_a_browser_lays_the_page_out(scored, tmp_path, width):
    """Wide tables scroll in their own boxes; nothing else sticks out."""
    probe = (
        "[document.documentElement.scrollWidth, innerWidth, "
        "[...document.querySelectorAll('td')].filter(cell => cell.clientHeight > 10).length].join(' ')"
    )
    page = score_page(*scored)
    wide, inner, cells = map(int, in_browser(page, tmp_path, width, probe).split())
    assert inner == pytest.approx(width, abs=20) and wide <= inner
    assert cells == len(check_stands_alone(page).of("td")) > 200
