"""Findings in every form that the pipeline takes become the same list."""

from pathlib import Path

import pytest
import yaml

from evaluation_fvlm.tasks import PROMPTS_DIR, available_tasks, load_task
from modeling_fvlm.findings import TEMPLATE, read_findings

ORGANS = ["lung", "heart"]


@pytest.mark.parametrize("name", available_tasks())
def test_a_task_file_is_read_as_the_evaluation_reads_it(name):
    task = load_task(name)
    organs = list(dict.fromkeys(item.organ for item in task.items))
    expected = [
        {"finding": item.finding, "organ": item.organ, "positive": [*item.positive], "negative": [*item.negative]}
        for item in task.items
    ]
    path = PROMPTS_DIR / f"{name}.yaml"
    assert expected and read_findings(str(path), organs) == read_findings(path, organs) == expected


def test_one_sentence_serves_for_all_of_the_other_side(tmp_path):
    item = {"finding": "Wide", "organ": "heart", "positive": ["Wide.", "Dilated."], "negative": "Normal."}
    (expected,) = read_findings([item], ORGANS)
    assert expected["positive"] == ["Wide.", "Dilated."] and expected["negative"] == ["Normal.", "Normal."]
    path = tmp_path / "mine.yml"
    path.write_text(yaml.safe_dump({"name": "mine", "items": [item]}))
    assert read_findings(path, ORGANS) == [expected]
    (task_item,) = load_task(path).items
    assert [*task_item.negative] == expected["negative"]


def test_names_become_the_published_prompts():
    wanted = {"finding": "Emphysema", "organ": "lung", "positive": ["Emphysema."], "negative": ["Not Emphysema."]}
    wanted["template"] = "{}. / Not {}."
    assert read_findings({"lung": ["Emphysema"]}, ORGANS) == [wanted]
    assert read_findings({"lung": "Emphysema"}, ORGANS) == [wanted]
    assert read_findings([{"finding": "Emphysema", "organ": "lung"}], ORGANS) == [wanted]
    every = [wanted, {**wanted, "organ": "heart"}]
    assert read_findings("Emphysema", ORGANS) == read_findings(["Emphysema"], ORGANS) == every
    published = {item.positive + item.negative for item in load_task("ct_rate_16").items}
    assert tuple(text.replace("{}", "Emphysema") for text in TEMPLATE) in published


def test_a_template_of_ones_own():
    (found,) = read_findings({"heart": ["Large heart."]}, ORGANS, ("There is {}.", "There is no {}."))
    assert (found["positive"], found["negative"]) == (["There is Large heart."], ["There is no Large heart."])
    assert found["finding"] == "Large heart." and found["template"] == "There is {}. / There is no {}."
    mixed = [{"finding": "A", "organ": "lung", "positive": "a", "negative": "b"}, "B"]
    found = read_findings(mixed, ORGANS)
    assert [item.get("template") for item in found] == [None, "{}. / Not {}.", "{}. / Not {}."]


@pytest.mark.parametrize(
    ("findings", "message"),
    [
        ([], "non-empty list"),
        ({}, "non-empty list"),
        (3, "non-empty list"),
        ([3], r"findings\[0\] is 3"),
        ([" . "], r"findings\[0\] is an empty name"),
        ([{"finding": "a", "organ": "lung", "positive": ["A."], "negative": [False]}], r"\(a\): False is no sentence"),
        ([{"finding": "a", "organ": "lung", "positive": None, "negative": "No."}], r"\(a\): None is no sentence"),
        ({"lung": None}, r"findings\['lung'\] is None: give a name or a list of names"),
        ({"lung": ["a", None]}, r"findings\[1\]: None is no name of a finding"),
        ([{"finding": "a", "organ": None}], r"\(a\): organ None is not in config.organs"),
        ({"lungs": ["a"]}, r"findings\[0\] \(a\): organ 'lungs' is not in config.organs .*nearest: 'lung'"),
        ([{"finding": "a"}], r"findings\[0\] lacks \['organ'\]"),
        ([{"finding": "a", "organ": "lung", "negative": "b"}], r"findings\[0\] lacks \['positive'\]"),
        ("nowhere.yaml", "nowhere.yaml: no such task file"),
        (Path("nowhere"), "nowhere: no such task file"),
    ],
)
def test_what_is_no_finding_is_refused(findings, message):
    with pytest.raises(ValueError, match=message):
        read_findings(findings, ORGANS)


@pytest.mark.parametrize("content", ["items: {a: b}", "- a", "name: x", "items: [a: {"])
def test_a_file_that_is_no_task_is_refused(tmp_path, content):
    path = tmp_path / "mine.yaml"
    path.write_text(content)
    with pytest.raises(ValueError, match="mine.yaml(: a task file has a list `items`| is not readable YAML)"):
        read_findings(path, ORGANS)


@pytest.mark.parametrize("template", ["{}", ("{}.",), ("{}.", "no"), ("{}.", "Not {}.", "{}")])
def test_a_template_without_a_place_for_the_name_is_refused(template):
    with pytest.raises(ValueError, match="template must be \\(positive, negative\\)"):
        read_findings(["a"], ORGANS, template)
