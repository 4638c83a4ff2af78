"""The page of reports by organ: every sentence in its organ's colour, nothing lost, nothing run."""

import copy
import html
import json
import re
from pathlib import Path

import pytest
from html_page import check_stands_alone, in_browser, luminance

from data_builders.__main__ import main
from data_builders.decomposition_files import SECTIONS, organs_of, read_decompositions
from data_builders.report_page import page_colors, pieces_of, report_page

GOLD = Path(__file__).parent / "data" / "reports_gold" / "tuning"
EVIL = "<script>alert('x')</script><b>&\"' </style>"


@pytest.fixture(scope="module")
def gold():
    entries = read_decompositions(GOLD)
    return entries, organs_of(entries, None)[1]


@pytest.fixture(scope="module")
def page(gold):
    return report_page("tuning", *gold)


def test_the_page_stands_alone_and_holds_every_text(page, gold):
    parsed = check_stands_alone(page)
    plain = html.unescape(re.sub(r"<[^>]+>", "", re.sub(r"<sup>.*?</sup>", "", page)))
    for entry in gold[0]:
        for section in SECTIONS:
            assert entry[section] in plain, (entry["id"], section)
    assert len(parsed.of("article")) == len(gold[0]) and "Not in this section" not in page
    assert len(parsed.of("input")) == len(gold[1]) + 1


def test_every_sentence_has_its_organs(gold):
    entries, organs = gold
    checked = 0
    for entry in entries:
        for section in SECTIONS:
            found = pieces_of(entry, section, organs)
            assert "".join(piece.text for piece in found.pieces) == entry[section] and not found.invented
            for organ in organs:
                said = [" ".join(piece.text.split()) for piece in found.pieces if organ in piece.organs]
                wanted = entry["organs"].get(organ, {}).get(section, [])
                assert said == wanted, (entry["id"], organ)
                checked += len(wanted)
            assert all(piece.is_end == bool(piece.organs) for piece in found.pieces)
    assert checked > 400


def test_overlapping_and_repeated_sentences():
    entry = {
        "id": "a",
        "findings": "Normal. Heart normal;\n lungs  clear. Normal.",
        "organs": {
            "lung": {"findings": ["lungs clear.", "Normal."], "impression": [], "abnormal": False},
            "heart": {"findings": ["Heart normal; lungs clear.", "Normal.", "Normal.", "Gone."], "abnormal": False},
        },
        "uncertain": ["Heart normal; lungs clear."],
    }
    found = pieces_of(entry, "findings", ("lung", "heart"))
    seen = [(piece.text, piece.organs, piece.is_uncertain, piece.is_end) for piece in found.pieces]
    assert seen == [
        ("Normal.", ("heart",), False, True),
        (" ", (), False, False),
        ("Heart normal;\n ", ("heart",), True, False),
        ("lungs  clear.", ("lung", "heart"), True, True),
        (" ", (), False, False),
        ("Normal.", ("lung", "heart"), False, True),  # the sentences of an organ come in the order of the text
    ]
    assert found.invented == [("heart", "Gone.")]
    page = report_page("x", [entry], ("lung", "heart"))
    assert "Not in this section" in page and "Gone." in page and "said h1 uncertain o1" in page
    assert "dashed line" in page


def test_a_sentence_has_no_more_places_than_the_text():
    entry = {"id": "a", "findings": "Normal. Clear. Normal.", "organs": {"lung": {"findings": ["Normal."] * 3}}}
    found = pieces_of(entry, "findings", ("lung",))
    assert [piece.text for piece in found.pieces if piece.organs] == ["Normal."] * 2
    assert found.invented == [("lung", "Normal.")]


def test_a_report_of_a_megabyte():
    sentences = [f"Nodule {number} of the lung." for number in range(30_000)]
    entry = {"id": "a", "findings": " ".join(sentences), "organs": {"lung": {"findings": sentences}}}
    entry["uncertain"] = sentences[::2]
    found = pieces_of(entry, "findings", ("lung", "heart"))
    assert [piece.text for piece in found.pieces if piece.organs == ("lung",)] == sentences and not found.invented


def test_whose_a_sentence_is_stands_behind_it(page, gold):
    parsed = check_stands_alone(page)
    labels = " ".join(parsed.text["sup"] + parsed.text["b"])
    assert all(organ in labels for organ in gold[1])
    entry = next(entry for entry in gold[0] if entry["id"] == "tuning_02")
    assert {organ for organ, said in entry["organs"].items() if said["abnormal"]} == {
        "kidney",
        "liver",
        "colon",
        "aorta",
    }
    assert "<sup><b>kidney</b></sup>" in page and "<sup>pancreas, spleen</sup>" in page


@pytest.mark.parametrize("num_organs", [1, 4, 24, 36, 117])
def test_text_is_legible_on_every_colour(num_organs):
    colors = page_colors([str(place) for place in range(num_organs)])
    assert len(set(colors)) == num_organs
    for color in colors:
        assert (luminance(color) + 0.05) / (luminance("#1b1b1b") + 0.05) >= 6


def test_every_text_is_escaped():
    said = {"findings": [EVIL, f"gone {EVIL}"], "impression": [], "abnormal": True}
    entry = {"id": EVIL, "findings": f"{EVIL} and more", "impression": "", "organs": {EVIL: said, "lung": said}}
    page = report_page(EVIL, [entry], (EVIL, "lung"))
    parsed = check_stands_alone(page)
    assert not parsed.of("script") and EVIL not in page and page.count("alert(") > 4
    assert page.count("</style>") == 1


def test_the_command_shows_the_first_and_says_so(tmp_path, capsys, gold):
    out = tmp_path / "out" / "page.html"
    assert main(["report-page", "--split", str(GOLD), "--page", str(out), "--most", "3"]) == 0
    page = out.read_text(encoding="utf-8")
    assert len(check_stands_alone(page).of("article")) == 3 and f"The first 3 of {len(gold[0])} reports" in page
    assert f"3 of {len(gold[0])} reports" in capsys.readouterr().out
    assert main(["report-page", "--split", str(GOLD), "--page", str(out), "--most", "0"]) == 2


def test_texts_may_come_from_a_table(tmp_path, gold):
    entries = copy.deepcopy(gold[0][:2])
    lines = ["id;findings;impression"]
    for entry in entries:
        quoted = ['"' + entry.pop(section).replace('"', '""') + '"' for section in SECTIONS]
        lines.append(";".join([entry["id"], *quoted]))
    (tmp_path / "split.json").write_text(json.dumps(entries))
    (tmp_path / "reports.csv").write_text("\n".join(lines))
    files = ["--split", str(tmp_path / "split.json"), "--page", str(tmp_path / "page.html"), "--organs", "body_24"]
    assert main(["report-page", *files]) == 2
    lines[0] = "id;Befund;impression"
    (tmp_path / "theirs.csv").write_text("\n".join(lines))
    theirs = ["--reports", str(tmp_path / "theirs.csv"), "--columns", "findings=Befund"]
    assert main(["report-page", *files, *theirs]) == 0
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert main(["report-page", *files, "--reports", str(tmp_path / "reports.csv")]) == 0
    assert (tmp_path / "page.html").read_text(encoding="utf-8") == page
    assert (tmp_path / "page.html").read_text(encoding="utf-8").count("<sup>") > 10


@pytest.mark.slow
@pytest.mark.parametrize("width", [500, 1400])
def test_a_browser_lays_the_page_out(page, gold, tmp_path, width):
    """Nothing sticks out; colours are drawn; an organ that is chosen takes the colour from the others."""
    place = gold[1].index("liver")
    probe = (
        "(() => { const coloured = () => [...document.querySelectorAll('.said')].filter(e => { const s = "
        "getComputedStyle(e); return s.backgroundImage != 'none' || s.backgroundColor != 'rgba(0, 0, 0, 0)' }).length; "
        f"const all = coloured(); document.getElementById('c{place}').checked = true; const one = coloured(); "
        "return [document.documentElement.scrollWidth, innerWidth, all, one].join(' ') })()"
    )
    wide, inner, num_all, num_liver = map(int, in_browser(page, tmp_path, width, probe).split())
    assert inner == pytest.approx(width, abs=20) and wide <= inner
    spans = [span["class"].split() for span in check_stands_alone(page).of("span") if "said" in span["class"]]
    assert num_all == len(spans) and num_liver == sum(f"h{place}" in classes for classes in spans) > 10
