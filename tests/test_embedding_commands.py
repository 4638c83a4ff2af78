"""Commands on saved embeddings: what they print and write is what the functions say, and errors are told in words."""

import json

import pytest
import yaml
from test_diagnostics import stored_of

from evaluation_fvlm.__main__ import main
from evaluation_fvlm.diagnostics import diagnose
from evaluation_fvlm.embedding_files import load_embeddings, save_embeddings
from evaluation_fvlm.probes import mean_pooled, probe_frames
from evaluation_fvlm.retrieval import retrieve
from evaluation_fvlm.tasks import load_task

TASK = {
    "name": "two",
    "version": 1,
    "source": "made up",
    "changes": {1: "first"},
    "items": [
        {"finding": "Nodule", "organ": "lung", "positive": "Nodule.", "negative": "No nodule."},
        {"finding": "Big heart", "organ": "heart", "positive": "Big.", "negative": "Not big."},
    ],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Saved embeddings of 60 patients, and the task beside them."""
    folder = tmp_path_factory.mktemp("run")
    stored = stored_of(signal=4.0)
    info = {"model": {"path": "some/model"}, **stored.info}
    save_embeddings(folder / "e", stored.embeddings, stored.texts, prompts=stored.prompt_embeds, info=info)
    (folder / "two.yaml").write_text(yaml.safe_dump(TASK))
    return folder


def run(folder, *words) -> dict:
    """One command; the content of its JSON file."""
    path = folder / "out" / "result.json"
    command, *others = [str(word) for word in words]
    assert main([command, "--embeddings", str(folder / "e"), "--json", str(path), "--bootstraps", "20", *others]) == 0
    return json.loads(path.read_text())


def test_retrieval_writes_what_retrieve_says(folder, capsys):
    result = run(folder, "retrieval", "--examples", 2)
    stored = load_embeddings(folder / "e")
    expected = json.loads(json.dumps(retrieve(stored.embeddings, stored.texts, num_bootstraps=20)))
    assert {name: result[name] for name in expected} == expected
    assert result["embeddings"]["model"] == {"path": "some/model"} and len(result["examples"]) == 2
    printed = capsys.readouterr().out
    assert "text -> volume" in printed and "volume, all pairs" in printed
    assert "chance: candidates in random order" in printed
    recall = expected["global"]["pools"]["whole"]["report_to_volume"]["recall"]["10"]
    assert f"{100 * recall['value']:.3g} ({100 * recall['chance']:.3g})" in printed
    assert "lung: 5 scans left out: no caption" in printed and "own report" in printed


def test_diagnostics_compare_poolings_where_a_task_is_named(folder, capsys):
    plain = run(folder, "diagnostics")
    expected = json.loads(json.dumps(diagnose(load_embeddings(folder / "e"))))
    assert {name: plain[name] for name in expected} == expected and plain["pooling"] is None
    assert f"{expected['macro']['alignment']:.3f}" in capsys.readouterr().out
    result = run(folder, "diagnostics", "--task", folder / "two.yaml")["pooling"]
    assert result["zero_shot"]["macro"]["attention"] > result["zero_shot"]["macro"]["mean"] > 0.5
    printed = capsys.readouterr().out
    assert "AUC on the same frozen tokens, zero-shot" in printed and "frozen tokens, linear probe" in printed
    assert f"{result['zero_shot']['macro']['attention']:.3f}" in printed
    quick = run(folder, "diagnostics", "--task", folder / "two.yaml", "--no_probe", "--quiet")["pooling"]
    assert quick["linear_probe"] is None and quick["zero_shot"] == result["zero_shot"]
    assert not capsys.readouterr().out


def nodule_auc(frame) -> float:
    rows = frame[frame["finding"] == "Nodule"]
    scores, labels = rows["score"].to_numpy(), rows["label"].to_numpy()
    return float((scores[labels == 1][:, None] > scores[labels == 0]).mean())


def test_probe_learns_from_the_files_alone(folder, capsys):
    result = run(folder, "probe", "--task", folder / "two.yaml", "--kinds", "linear", "--strengths", 0.1, "--folds", 3)
    stored, task = load_embeddings(folder / "e"), load_task(folder / "two.yaml")
    frame = probe_frames(stored.embeddings, task, kinds=("linear",), strengths=(0.1,), num_folds=3).frames["linear"]
    auc = nodule_auc(frame)
    assert result["linear"]["per_finding"]["Nodule"]["auc"]["value"] == pytest.approx(auc)
    assert "knn" not in result and result["strengths"] == {"Nodule": [0.1] * 3, "Big heart": [0.1] * 3}
    printed = capsys.readouterr().out
    assert "linear AUC [95 % interval]" in printed and f"{auc:.3f} [" in printed
    mean = run(folder, "probe", "--task", folder / "two.yaml", "--kinds", "linear", "--mean_pooled", "--folds", 3)
    other = probe_frames(mean_pooled(stored.embeddings), task, kinds=("linear",), num_folds=3).frames["linear"]
    assert mean["linear"]["per_finding"]["Nodule"]["auc"]["value"] == pytest.approx(nodule_auc(other))
    assert nodule_auc(other) != pytest.approx(auc)
    assert run(folder, "probe")["linear"]["per_finding"]["Nodule"]["organ"] == "whole volume"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["retrieval", "--embeddings", "{}/elsewhere"], "holds no embeddings"),
        (["retrieval", "--embeddings", "{}/e", "--bootstraps", "-1"], "--bootstraps -1 must be 0 or more"),
        (["diagnostics", "--embeddings", "{}/e", "--seed", "-1"], "--seed -1 must be 0 or more"),
        (["retrieval", "--embeddings", "{}/no_texts"], "holds no texts"),
        (["retrieval", "--embeddings", "{}/unkept", "--examples", "1", "--bootstraps", "0"], "texts were not kept"),
        (["diagnostics", "--embeddings", "{}/e", "--max_points", "1"], "must be at least 2"),
        (["diagnostics", "--embeddings", "{}/no_texts", "--task", "{}/two.yaml"], "compares two poolings, but .* one"),
        (["probe", "--embeddings", "{}/e", "--mean_pooled"], "name a --task"),
        (["probe", "--embeddings", "{}/e", "--folds", "61"], "61 folds of 60 patients"),
        (["probe", "--embeddings", "{}/e", "--task", "chest"], "chest"),
        (["probe", "--embeddings", "{}/e", "--json", "{}"], "is a folder"),
    ],
)
def test_errors_are_told_without_a_traceback(folder, words, message, capsys):
    stored = stored_of()
    if any("unkept" in word for word in words):
        save_embeddings(folder / "unkept", stored.embeddings, stored.texts, keep_texts=False)
    stored.embeddings.mean_pooled_embeds = None
    save_embeddings(folder / "no_texts", stored.embeddings)
    assert main([word.format(folder) for word in words]) == 2
    assert message.split(".*")[0] in (error := capsys.readouterr().err) and message.split(".*")[-1] in error
