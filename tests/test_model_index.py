"""Results in a model's card: what the header and the text say, what stays, what is replaced, and how it reads back."""

import json
import math
import shutil

import numpy as np
import pandas as pd
import pytest
import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from evaluation_fvlm.__main__ import main
from evaluation_fvlm.errors import EvaluationError
from evaluation_fvlm.model_index import Data, data_of, eval_results, write_model_index
from evaluation_fvlm.places import weights_digest
from evaluation_fvlm.protocols import Protocol, evaluate_frame
from evaluation_fvlm.retrieval import retrieve_pairs

DATA = Data("CT-RATE", "validation")
FINDINGS = {"Emphysema": "lung", "Nodule | small": "lung", "Never": "heart"}
OTHER = EvalResult("text-generation", "other/data", "Other", "bleu", 0.5, metric_name="BLEU", dataset_split="test")


def frame(task="tiny", seed=0):
    rng = np.random.default_rng(seed)
    rows = []
    for finding, organ in FINDINGS.items():
        labels = (rng.random(80) < 0.4).astype(float) * (finding != "Never")
        scores = np.clip(0.3 * labels + rng.normal(0.4, 0.2, 80), 0, 1)
        scores[:5] = np.nan
        for n in range(80):
            rows.append((task, f"p{n // 2}", f"s{n}", f"r{n}", finding, organ, scores[n], labels[n], True))
    names = ["task", "patient_id", "scan_id", "recon_id", "finding", "organ", "score", "label", "is_complete"]
    return pd.DataFrame(rows, columns=names)


@pytest.fixture(scope="module")
def evaluation():
    return evaluate_frame(frame(), Protocol(level="reconstruction", num_bootstraps=50))


@pytest.fixture(scope="module")
def retrieval():
    rng = np.random.default_rng(0)
    texts = rng.normal(size=(12, 8)).astype(np.float32)
    images = texts + rng.normal(0, 0.5, texts.shape).astype(np.float32)
    texts, images = (array / np.linalg.norm(array, axis=1, keepdims=True) for array in (texts, images))
    found = retrieve_pairs(images, texts, np.arange(12), np.arange(12), num_bootstraps=20, recall_at=(1, 5))
    macro = {"report_to_volume": {"recall@1": {"value": 0.75, "chance": 0.1}}}
    return {"global": found, "per_organ": {}, "macro": macro}


def trained_card(folder, **header):
    """As training writes one: losses in the header, sections in the text."""
    results = [
        EvalResult("zero-shot-image-classification", "CT-RATE", "CT-RATE", kind, value, metric_name=name,
                   dataset_split="validation")
        for kind, name, value in (
            ("roc_auc", "tiny: macro AUC, zero-shot", 0.61),
            ("contrastive_loss", "lung: loss in nats (chance 2.079)", 1.25),
        )
    ]  # fmt: skip
    data = ModelCardData(
        library_name="transformers",
        license="mit",
        tags=["ct"],
        model_name="mine",
        eval_results=[*results, OTHER],
        **header,
    )
    text = "# Title\n\n## Use\n\nSo.\n\n## Limits\n\nResearch only.\n"
    (folder / "README.md").write_text(f"---\n{data.to_yaml()}\n---\n\n{text}")


def entries(folder):
    return {entry.metric_name: entry for entry in ModelCard.load(folder / "README.md").data.eval_results}


def test_every_figure_is_named_with_its_interval(tmp_path, evaluation):
    trained_card(tmp_path)
    write_model_index(tmp_path, evaluation, DATA)
    found = entries(tmp_path)
    for name, figure, kind, words in (
        ("tiny: macro AUC, zero-shot", evaluation["macro"]["auc"], "roc_auc", ""),
        ("tiny: macro average precision, zero-shot", evaluation["macro"]["average_precision"], "average_precision", ""),
        (
            "tiny: macro F1 of the finding, zero-shot",
            evaluation["macro"]["f1"],
            "f1",
            ", thresholds by cross-validation",
        ),
        ("tiny: Emphysema, AUC, zero-shot", evaluation["per_finding"]["Emphysema"]["auc"], "roc_auc", ""),
    ):
        assert figure["low"] < figure["high"]
        whole = f"{name}{words} (95 % interval {figure['low']:.3f} to {figure['high']:.3f})"
        assert found[whole].metric_type == kind and found[whole].metric_value == round(figure["value"], 4)
        assert (found[whole].dataset_type, found[whole].dataset_split) == ("CT-RATE", "validation")
    assert not any("Never" in name for name in found), "a finding without a figure has no entry"
    assert all(math.isfinite(entry.metric_value) for entry in found.values())


def test_what_stands_there_stays_and_the_same_is_replaced(tmp_path, evaluation):
    trained_card(tmp_path, base_model="a/b")
    write_model_index(tmp_path, evaluation, DATA)
    once = (tmp_path / "README.md").read_bytes()
    found = entries(tmp_path)
    assert "tiny: macro AUC, zero-shot" not in found, "what training measured of the same prompt set is replaced"
    assert found["lung: loss in nats (chance 2.079)"].metric_value == 1.25 and found["BLEU"] == OTHER
    header = yaml.safe_load(once.decode().split("---")[1])
    assert (header["license"], header["tags"], header["base_model"]) == ("mit", ["ct"], "a/b")
    assert header["model-index"][0]["name"] == "mine"
    write_model_index(tmp_path, evaluation, DATA)
    assert (tmp_path / "README.md").read_bytes() == once, "writing again doubles nothing"

    other = evaluate_frame(frame(seed=5), Protocol(level="reconstruction", num_bootstraps=50, threshold=0.5))
    write_model_index(tmp_path, other, DATA)
    again, text = entries(tmp_path), (tmp_path / "README.md").read_text()
    assert len(again) == len(found) and not set(found) & set(again) - {"BLEU", "lung: loss in nats (chance 2.079)"}
    assert any("threshold 0.5 (95 %" in name for name in again)
    assert text.count("### Zero-shot") == 1 and "fixed at 0.5" in text and "by cross-validation" not in text


def test_other_data_splits_and_prompt_sets_stand_beside(tmp_path, evaluation):
    trained_card(tmp_path)
    places = [DATA, Data("CT-RATE", "test"), Data("owner/other", "validation", "abc123")]
    for place in places:
        write_model_index(tmp_path, evaluation, place)
    another = evaluate_frame(frame("tiny_2"), Protocol(level="reconstruction", num_bootstraps=0))
    write_model_index(tmp_path, another, DATA)
    found = ModelCard.load(tmp_path / "README.md").data.eval_results
    of_tiny = [entry for entry in found if entry.metric_name.startswith("tiny: macro AUC")]
    assert {(e.dataset_type, e.dataset_split, e.dataset_revision) for e in of_tiny} == {
        (place.name, place.split, place.revision) for place in places
    }
    assert [e.metric_name for e in found if "tiny_2: macro AUC" in e.metric_name] == ["tiny_2: macro AUC, zero-shot"]
    text = (tmp_path / "README.md").read_text()
    assert text.count("## Evaluation\n") == 1 and text.count("### Zero-shot") == 4
    headings = [line for line in text.splitlines() if line.startswith("## ")]
    assert headings == ["## Use", "## Evaluation", "## Limits"]
    assert text.endswith("## Limits\n\nResearch only.\n")


def test_the_text_tells_figures_protocol_and_what_was_left_out(tmp_path, evaluation):
    trained_card(tmp_path)
    write_model_index(tmp_path, evaluation, DATA)
    text = (tmp_path / "README.md").read_text()
    auc = evaluation["per_finding"]["Emphysema"]["auc"]
    positives = evaluation["per_finding"]["Emphysema"]["positives"]
    row = f"| Emphysema | lung | {auc['value']:.3f} | {auc['low']:.3f} to {auc['high']:.3f} | {positives} |"
    assert row in text and "| Nodule \\| small | lung |" in text
    assert "| Never | heart | not measured | - | 0 | 75 | 5 |" in text
    assert "- threshold: chosen by cross-validation" in text and "- left out: 15 pairs of case and finding" in text
    for warning in evaluation["warnings"]:
        assert f"- **{warning}**" in text


def metrics_json(evaluation, **protocol):
    """The form of eval_fvlm.py."""
    summary = {"task": "tiny", "per_finding": {}, "evaluation": evaluation}
    second = {"task": "second", "per_finding": {}, "evaluation": evaluation}
    return summary | {"other_tasks": {"second": second}, "protocol": protocol}


def test_a_metrics_json_names_its_data_without_their_place(tmp_path, evaluation, monkeypatch):
    data = {"path": str(tmp_path / "somebody" / "processed"), "revision": None, "split": "validation"}
    assert data_of(metrics_json(evaluation, data=data)) == Data("processed", "validation")
    hub = {"path": "owner/ct", "revision": "main", "split": "test"}
    assert data_of(metrics_json(evaluation, data=hub)) == Data("owner/ct", "test", "main")
    assert data_of(evaluation) is None
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "ct").mkdir(parents=True)  # a folder, though it looks like an id
    assert data_of(metrics_json(evaluation, data=hub)) == Data("ct", "test", "main")


def test_a_run_without_intervals_has_figures_all_the_same(evaluation):
    old = {
        **{"task": "tiny", "macro_auc": 0.75, "macro_average_precision": None, "num_findings": 1},
        "per_finding": {"Emphysema": {"organ": "lung", "auc": 0.75, "positives": 3, "negatives": 4, "excluded": {}}},
    }
    names = [entry.metric_name for entry in eval_results(old, DATA)]
    assert names == ["tiny: macro AUC, zero-shot", "tiny: Emphysema, AUC, zero-shot"]


def test_a_look_at_the_first_cases_takes_no_result_s_place(tmp_path, evaluation):
    trained_card(tmp_path)
    write_model_index(tmp_path, metrics_json(evaluation, limit=None), DATA)
    before = (tmp_path / "README.md").read_bytes()
    with pytest.raises(EvaluationError, match=r"first 7 cases alone \(--limit\)"):
        write_model_index(tmp_path, metrics_json(evaluation, limit=7), DATA)
    assert (tmp_path / "README.md").read_bytes() == before


def test_retrieval_is_named_with_its_chance(tmp_path, evaluation, retrieval):
    trained_card(tmp_path)
    write_model_index(tmp_path, evaluation, DATA, retrieval)
    figure = retrieval["global"]["pools"]["deduplicated"]["report_to_volume"]["recall"]["1"]
    found = entries(tmp_path)
    name = (
        f"retrieval: recall@1, report to volume, whole volumes (95 % interval {figure['low']:.3f} to "
        f"{figure['high']:.3f}; chance {figure['chance']:.3f})"
    )
    assert found[name].metric_type == "recall_at_1" and found[name].metric_value == round(figure["value"], 4)
    assert "retrieval: recall@1, report to volume, mean over organs (chance 0.100)" in found
    text = (tmp_path / "README.md").read_text()
    assert "### Retrieval on CT-RATE, split validation" in text
    assert "| recall@1, report to volume, mean over organs | 0.750 | - | 0.100 |" in text


@pytest.mark.parametrize("card", [None, "# Mine\n\nText.\n", "---\nlicense: mit\n---\r\n# Mine\r\n\r\nText.\r\n"])
def test_a_card_without_header_or_none_at_all(tmp_path, evaluation, card):
    if card is not None:
        (tmp_path / "README.md").write_bytes(card.encode())
    write_model_index(tmp_path, evaluation, DATA)
    content = (tmp_path / "README.md").read_bytes().decode()
    assert entries(tmp_path) and "## Evaluation" in content
    assert card is None or "Text." in content
    assert ("\r\n" in content) == (card is not None and "\r\n" in card)
    assert card is None or "license" not in card or "license: mit" in content
    name = ModelCard(content).data.model_name
    assert name == (tmp_path.name if card is None else "Mine"), "the title, or the folder's name where there is none"
    assert not list(tmp_path.glob("*.part"))


def test_the_command(tmp_path, evaluation, retrieval, capsys):
    model, results = tmp_path / "model", tmp_path / "eval"
    model.mkdir()
    (model / "model.safetensors").write_bytes(b"weights")
    results.mkdir()
    trained_card(model)
    data = {"name": "processed", "revision": None, "split": "validation"}
    content = metrics_json(evaluation, data=data, model={"name": "mine", "weights": weights_digest(model)})
    (results / "metrics.json").write_text(json.dumps(content))
    (results / "retrieval.json").write_text(json.dumps(retrieval))
    assert main(["card", "--results", str(results), "--model", str(model)]) == 0
    told = capsys.readouterr()
    assert f"python -m training_fvlm.push {model} --repo owner/name" in told.out and not told.err
    found = entries(model)
    assert {entry.dataset_type for entry in found.values()} == {"processed", "CT-RATE", "other/data"}
    assert any(name.startswith("retrieval: ") for name in found) and any(name.startswith("second: ") for name in found)
    assert str(tmp_path) not in (model / "README.md").read_text()

    (tmp_path / "score.json").write_text(json.dumps(evaluation))  # of `score`: names no data
    assert main(["card", "--results", str(tmp_path / "score.json"), "--model", str(model)]) == 2
    assert "name it with --dataset" in capsys.readouterr().err
    options = ["--dataset", "owner/other", "--split", "test", "--data_revision", "abc"]
    assert main(["card", "--results", str(tmp_path / "score.json"), "--model", str(model), *options]) == 0
    assert any(entry.dataset_revision == "abc" for entry in entries(model).values())

    shutil.copytree(model, tmp_path / "copy")
    assert main(["card", "--results", str(results), "--model", str(tmp_path / "copy")]) == 0
    assert not capsys.readouterr().err, "the same weights, wherever they lie"
    (tmp_path / "copy" / "model.safetensors").write_bytes(b"other weights")
    earlier = metrics_json(evaluation, data=data, model={"path": str(model)})  # before there were digests
    for told, name in ((content, "mine"), (earlier, "model")):
        (results / "metrics.json").write_text(json.dumps(told))
        assert main(["card", "--results", str(results), "--model", str(tmp_path / "copy")]) == 0
        warning = f"WARNING: these are results of {name}, of other weights than {tmp_path / 'copy'}"
        assert warning in capsys.readouterr().err


def test_what_cannot_be_written_is_said(tmp_path, evaluation, capsys):
    with pytest.raises(EvaluationError, match="no folder: give the one that holds the model"):
        write_model_index(tmp_path / "nowhere", evaluation, DATA)
    with pytest.raises(EvaluationError, match="do not say what they were measured on"):
        write_model_index(tmp_path, evaluation)
    empty = evaluate_frame(frame().query("finding == 'Never'"), Protocol(level="reconstruction", num_bootstraps=0))
    with pytest.raises(EvaluationError, match="the results hold no figure"):
        write_model_index(tmp_path, empty, DATA)
    for header in ("model-index:\n- name: x\n  results:\n  - task: 3", "a: [", "- a"):
        (tmp_path / "README.md").write_text(f"---\n{header}\n---\n# Mine\n")
        before = (tmp_path / "README.md").read_bytes()
        with pytest.raises(EvaluationError, match="the header cannot be read"):
            write_model_index(tmp_path, evaluation, DATA)
        assert (tmp_path / "README.md").read_bytes() == before
    for name, content in (("no.json", "{"), ("list.json", "[]"), ("other.json", '{"a": 1}')):
        (tmp_path / name).write_text(content)
        assert main(["card", "--results", str(tmp_path / name), "--model", str(tmp_path)]) == 2
    told = capsys.readouterr().err
    assert "no.json cannot be read" in told and "list.json holds no results" in told and "it has ['a']" in told
