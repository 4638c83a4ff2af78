"""The gold reports: sentences stand in their section, organs are of the set, the parts are alike and share no text."""

import json
import re
from collections import Counter
from itertools import combinations
from pathlib import Path

import pytest

from modeling_fvlm.organs import load_organ_set

FOLDER = Path(__file__).parent / "data" / "reports_gold"
ORGANS = load_organ_set("body_24").organs
SECTIONS = ("findings", "impression")
PARTS = ("tuning", "final", "final_hospitals")


def reports_of(part: str) -> list[dict]:
    files = sorted((FOLDER / part).glob("*.json"))
    return [report for path in files for report in json.loads(path.read_text(encoding="utf-8"))]


def words(text: str) -> str:
    return " ".join(text.split())


@pytest.fixture(scope="module", params=PARTS)
def reports(request):
    return reports_of(request.param)


def test_a_part_has_reports_enough_of_every_organ(reports):
    assert len(reports) >= 30 and len({report["id"] for report in reports}) == len(reports)
    abnormal = Counter(organ for report in reports for organ, said in report["organs"].items() if said["abnormal"])
    normal = Counter(organ for report in reports for organ, said in report["organs"].items() if not said["abnormal"])
    assert set(abnormal) == set(ORGANS), "every organ is abnormal somewhere"
    assert len(normal) > len(ORGANS) / 2


def test_gold_sentences_stand_in_their_section(reports):
    checked = 0
    for report in reports:
        assert set(report) == {"id", "style", "findings", "impression", "organs"}, report["id"]
        assert list(report["organs"]) == [organ for organ in ORGANS if organ in report["organs"]], report["id"]
        for organ, said in report["organs"].items():
            assert set(said) == {*SECTIONS, "abnormal"} and isinstance(said["abnormal"], bool), (report["id"], organ)
            assert said["findings"] or said["impression"], (report["id"], organ)
            for section in SECTIONS:
                text, place = words(report[section]), 0
                assert len(set(said[section])) == len(said[section]), (report["id"], organ, "a sentence twice")
                for sentence in said[section]:
                    assert sentence == words(sentence) and sentence in text, (report["id"], organ, sentence)
                    found = text.find(sentence, place)
                    assert found >= 0, (report["id"], organ, "out of order", sentence)
                    place, checked = found + 1, checked + 1
                    assert not re.match(r"\(?\d{1,2}[.)]\s|[-•*]\s", sentence), (report["id"], "a list mark", sentence)
    assert checked > 300


def test_gold_sentences_are_whole(reports):
    """A gold sentence starts at the start of a sentence, a line or a list mark, and stops where one of these stops."""
    starts, stops = r"(?:^|\n|[.?!:]\s)\s*(?:[\w(]{1,3}[.)]{1,2}\s+|\d-|[-•]\s+)?", r"\s*(?:\n|$)"
    for report in reports:
        for section in SECTIONS:
            for sentence in {sentence for said in report["organs"].values() for sentence in said[section]}:
                body = r"\s+".join(map(re.escape, sentence.split()))
                end = r"(?=\s|$)" if re.search(r"[.?!:]$", sentence) else stops
                assert re.search(starts + body + end, report[section]), (report["id"], sentence)


def test_the_parts_share_no_long_sentence():
    said = [
        {words(sentence).lower() for report in reports_of(part) for section in SECTIONS
         for sentence in re.split(r"(?<=[.?!])\s+", report[section])}
        for part in PARTS
    ]  # fmt: skip
    common = {sentence for one, other in combinations(said, 2) for sentence in one & other if len(sentence.split()) > 8}
    assert min(map(len, said)) > 300 and not common
