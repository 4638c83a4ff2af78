"""Prompt sets: those that ship are consistent with organs and findings; a broken file is refused with the reason."""

import copy
from pathlib import Path

import pytest
import yaml
from evaluation_samples import TASK

from data_builders.decompose import is_abnormal_sentence, load_lexicon, organs_of_sentences
from evaluation_fvlm.tasks import Item, available_tasks, check_task_labels, check_task_organs, load_task
from modeling_fvlm.organs import load_organ_set

HUB_CONFIGS = Path(__file__).resolve().parent.parent / "hub_configs"
CT_RATE_LABELS = [  # the columns of CT-RATE's multi_abnormality_labels files
    *("Medical material", "Arterial wall calcification", "Cardiomegaly", "Pericardial effusion"),
    *("Coronary artery wall calcification", "Hiatal hernia", "Lymphadenopathy", "Emphysema", "Atelectasis"),
    *("Lung nodule", "Lung opacity", "Pulmonary fibrotic sequela", "Pleural effusion"),
    *("Mosaic attenuation pattern", "Peribronchial thickening", "Consolidation", "Bronchiectasis"),
    "Interlobular septal thickening",
]


def written(tmp_path, **changes) -> Path:
    """The tiny task with some of its keys replaced; None drops a key."""
    content = copy.deepcopy(TASK) | changes
    path = tmp_path / "task.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in content.items() if value is not None}))
    return path


def item(**changes) -> list[dict]:
    return [{"finding": "F", "organ": "lung", "positive": "F.", "negative": "No F."} | changes]


def test_task_is_read_as_written(tmp_path):
    task = load_task(written(tmp_path))
    assert (task.name, task.version, task.findings[:2]) == ("tiny", 1, ["Nodule", "Big heart"])
    assert task.items[0].positive == ("Nodule.", "There is nodule.")
    # One negative sentence serves for both positive ones.
    assert task.items[2] == Item("Small heart", "heart", ("Small.", "Small is seen."), ("Not small.", "Not small."))
    assert len(task.prompts) == len(set(task.prompts)) == 11
    for it in task.items:
        assert {*it.positive, *it.negative} <= set(task.prompts)


def test_digest_follows_what_moves_a_score(tmp_path):
    digest = load_task(written(tmp_path)).digest
    assert load_task(written(tmp_path, source="elsewhere", version=2, changes={2: "nothing"})).digest == digest
    items = copy.deepcopy(TASK["items"])
    items[1]["positive"] = "Bigger."
    assert load_task(written(tmp_path, items=items)).digest != digest
    # Results of these sets are published by digest: it must not move while their sentences stand.
    assert load_task("ct_rate_16").digest == "9f538290ca215315"
    assert load_task("synthetic").digest == "6a1bdc7be01c0501"


def test_paraphrases_are_wordings_and_no_part_of_the_score(tmp_path):
    pair = {"positive": "Nodule is seen.", "negative": "No nodule is seen."}
    items = [TASK["items"][0] | {"paraphrases": [pair]}, *TASK["items"][1:]]
    task, plain = load_task(written(tmp_path, items=items)), load_task(written(tmp_path))
    assert (task.items[0].positive, task.items[0].negative) == (plain.items[0].positive, plain.items[0].negative)
    assert task.items[0].wordings == [
        ("Nodule.", "No nodule."),
        ("There is nodule.", "There is no nodule."),
        ("Nodule is seen.", "No nodule is seen."),
    ]
    assert set(task.prompts) - set(plain.prompts) == set(pair.values())
    assert task.digest != plain.digest and len(plain.items[0].wordings) == 2


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"items": None}, r"the keys \['items'\] are missing. It should look like"),
        ({"findings": []}, r"unknown key 'findings'.*(?s:.*)positive: "),
        ({"version": "1"}, "version '1' must be a whole number"),
        ({"version": 2}, "changes must say what version 2 changed"),
        ({"sauce": "x"}, "unknown key 'sauce'; nearest: 'source'"),
        ({"items": []}, "at least one finding"),
        ({"name": "../mine"}, "name '../mine' becomes part of file names"),
        ({"items": item() * 2}, r"findings \['F'\] appear more than once"),
        ({"items": item(negative=False)}, r"item 1 \('F'\): negative False is not a text; put it in quotes"),
        ({"items": item(positive=["F.", 3])}, "positive 3 is not a text"),
        ({"items": item(positive=[])}, "positive is an empty list"),
        (
            {"items": item(positive=["a.", "b.", "c."], negative=["d.", "e."])},
            "3 positive against 2 negative sentences",
        ),
        ({"items": item(positive=["a.", "a."], negative="b.")}, "appears more than once"),
        ({"items": item(positive="No F.")}, "'No F.' stands as positive and as negative"),
        ({"items": item(prompt="F.")}, "unknown key 'prompt'"),
        ({"items": item(paraphrase=[])}, "unknown key 'paraphrase'; nearest: 'paraphrases'"),
        ({"items": item(paraphrases=[])}, r"item 1 \('F'\): paraphrases must be a list of pairs"),
        (
            {"items": item(paraphrases=["F is there."])},
            r"paraphrase 1: expected a mapping with the keys \['negative', 'pos",
        ),
        ({"items": item(paraphrases=[{"positive": "x"}])}, r"paraphrase 1: the keys \['negative'\] are missing"),
        (
            {"items": item(paraphrases=[{"positive": "x", "negative": False}])},
            "paraphrase 1: negative False is not a te",
        ),
        ({"items": item(paraphrases=[{"positive": "F.", "negative": "No F."}])}, "appears more than once"),
        ({"items": item(paraphrases=[{"positive": "x", "negative": "x"}])}, "'x' stands as positive and as negative"),
        ({"items": ["F"]}, "item 1: expected a mapping"),
    ],
)
def test_broken_task_is_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        load_task(written(tmp_path, **changes))


def test_a_user_needs_a_name_and_items_alone(tmp_path):
    task = load_task(written(tmp_path, version=None, source=None, changes=None))
    assert (task.version, task.source, len(task.items)) == (1, "not stated", len(TASK["items"]))


def test_bare_no_is_no_text(tmp_path):
    """YAML reads a bare `no` as False; it must not become the prompt "False"."""
    path = tmp_path / "task.yaml"
    text = "name: t\nversion: 1\nsource: s\nchanges: {1: first}\nitems:\n"
    path.write_text(text + "- {finding: F, organ: lung, positive: yes, negative: no}\n")
    with pytest.raises(ValueError, match="positive True is not a text; put it in quotes"):
        load_task(path)


def test_unknown_names_are_answered_with_the_nearest(tmp_path):
    with pytest.raises(ValueError, match="no prompt set named 'ct_rate16'.*nearest: 'ct_rate_16'"):
        load_task("ct_rate16")
    with pytest.raises(ValueError, match="mine.yaml does not exist"):
        load_task(tmp_path / "mine.yaml")
    (tmp_path / "mine.yaml").write_text("name: [")
    with pytest.raises(ValueError, match="not readable YAML"):
        load_task(tmp_path / "mine.yaml")
    task = load_task(written(tmp_path))
    with pytest.raises(
        ValueError, match="finding 'Big aorta': organ 'aorta' is not in config.organs.*nearest: 'aortae'"
    ):
        check_task_organs(task, ["lung", "heart", "aortae"])
    check_task_organs(task, ["aorta", "heart", "liver", "lung"])
    assert check_task_labels(task, ["Big aorta", "Nodule", "Fracture"]) == ["Big heart", "Small heart"]
    with pytest.raises(ValueError, match="none of its findings is among the split's 1 labels.*nearest: 'nodule'"):
        check_task_labels(task, ["nodule"])


@pytest.mark.parametrize(
    "name, organ_set",
    [
        ("ct_rate_16", "chest_4"),
        ("ct_rate_18", "chest_4"),
        ("rad_chest_ct_16", "chest_4"),
        ("body_24_findings", "body_24"),
        ("body_24_findings", "body_36"),
        ("synthetic", "body_24"),
    ],
)
def test_shipped_tasks_fit_their_organs(name, organ_set):
    task = load_task(name)
    assert task.name == name and name in available_tasks()
    content = yaml.safe_load((HUB_CONFIGS / "prompts" / f"{name}.yaml").read_text())
    assert {"version", "source", "changes"} <= set(content), "a shipped set says where it is from and what changed"
    check_task_organs(task, load_organ_set(organ_set).organs)


def test_ct_rate_16_is_spelt_as_the_labels_are():
    task = load_task("ct_rate_16")
    assert check_task_labels(task, CT_RATE_LABELS) == [] and len(task.items) == 16
    for it in task.items:
        assert it.negative == (f"Not {it.positive[0]}",)


def test_synthetic_task_covers_the_set_in_words_of_its_reports():
    """Every finding in the organ it is painted in; every prompt a pattern of the reports filled with a noun."""
    definition = yaml.safe_load((HUB_CONFIGS / "synthetic" / "findings.yaml").read_text())
    task = load_task("synthetic")
    assert [(it.finding, it.organ) for it in task.items] == [(f["finding"], f["organ"]) for f in definition["findings"]]
    assert len(task.items) >= 30
    for it, finding in zip(task.items, definition["findings"]):
        said = {"positive": set(), "negative": set()}
        for noun in finding["nouns"]:
            words = {"n": noun, "N": noun[0].upper() + noun[1:]}
            words["be"] = "are" if noun in finding.get("plural", []) else "is"
            for kind, sentences in said.items():
                sentences |= {pattern.format(**words) for pattern in definition[kind]}
        assert set(it.positive) <= said["positive"], it.finding
        assert set(it.negative) <= said["negative"], it.finding


def test_ct_rate_18_is_ct_rate_16_and_the_two_findings_without_an_organ():
    task, published = load_task("ct_rate_18"), load_task("ct_rate_16")
    scored = [(it.finding, it.organ, it.positive, it.negative) for it in task.items]
    assert scored[:16] == [(it.finding, it.organ, it.positive, it.negative) for it in published.items]
    assert [(finding, organ) for finding, organ, *_ in scored[16:]] == [
        ("Medical material", "heart"),
        ("Lymphadenopathy", "lung"),
    ]
    assert sorted(task.findings) == sorted(CT_RATE_LABELS)
    assert all(len(it.paraphrases) == 3 for it in task.items)


def test_rad_chest_ct_16_asks_what_its_labels_hold():
    labels = yaml.safe_load((HUB_CONFIGS / "labels" / "rad_chest_ct.yaml").read_text())["findings"]
    task = load_task("rad_chest_ct_16")
    assert task.findings == list(labels) and len(labels) == 16
    of_ct_rate = {it.finding: it for it in load_task("ct_rate_18").items}
    assert all(it == of_ct_rate[it.finding] for it in task.items)


def test_body_24_findings_cover_every_organ_in_several_wordings():
    task = load_task("body_24_findings")
    assert len(task.items) >= 54 and {it.organ for it in task.items} == set(load_organ_set("body_24").organs)
    for it in task.items:
        assert len(set(it.positive)) == len(set(it.negative)) == 4, it.finding
    sentences = [text for it in task.items for text in (*it.positive, *it.negative)]
    assert len(set(sentences)) == len(sentences), "a sentence serves one finding on one side only"
    # Spelt alike, a finding is asked of the same organ: splits of either origin can be scored with this set.
    organ_of = {it.finding: it.organ for name in ("ct_rate_16", "synthetic") for it in load_task(name).items}
    shared = [it for it in task.items if it.finding in organ_of]
    assert len(shared) >= 35 and all(it.organ == organ_of[it.finding] for it in shared)


@pytest.mark.parametrize("name", ["body_24_findings", "ct_rate_18"])
def test_sentences_written_here_read_as_they_are_meant(name):
    """The rules that make captions find in the sentences their organ, and a finding in the positive ones alone.

    Rules and prompt sets are written apart, so the rules may miss a few.
    """
    lexicon = load_lexicon("english")
    tells_no_organ = {"Medical material", "Lymphadenopathy", "Arterial wall calcification"}
    count, misread, misplaced = 0, [], []
    for it in load_task(name).items:
        for pair in it.paraphrases or zip(it.positive, it.negative):
            for sentence, is_abnormal, organs in zip(pair, (True, False), organs_of_sentences(pair, lexicon)):
                count += 1
                if is_abnormal_sentence(sentence, lexicon) != is_abnormal:
                    misread.append(sentence)
                if it.organ not in organs and it.finding not in tells_no_organ:
                    misplaced.append(sentence)
    assert count > 100
    assert len(misread) <= 0.02 * count and len(misplaced) <= 0.02 * count, (misread, misplaced)
