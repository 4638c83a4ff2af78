"""The command from saved model and split to files; and the combinations that it refuses before it works."""

import csv
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from evaluation_samples import ORGANS, TASK, tiny_dataset, tiny_model, tiny_rows, tiny_tokenizer, write_tiny_split
from safetensors.torch import load_file, save_file

import eval_fvlm
from evaluation_fvlm import results
from evaluation_fvlm.embedding_files import load_embeddings
from evaluation_fvlm.errors import EvaluationError
from evaluation_fvlm.metrics import summarize
from evaluation_fvlm.plots import plot_auc_bars, plot_roc_curves
from evaluation_fvlm.published_metrics import published_finding_metrics
from evaluation_fvlm.tasks import load_task
from evaluation_fvlm.zero_shot import evaluate_split, score_task
from modeling_fvlm import gemm
from modeling_fvlm.gemm import BLAS, ONEDNN, GemmCheck, GemmChoice
from modeling_fvlm.pipeline_fvlm import save_for_hub
from modeling_fvlm.processing_fvlm import FVLMProcessor


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    """model/ as training saves it, data/ as the builders write it, task.yaml and other.yaml."""
    folder = tmp_path_factory.mktemp("eval")
    model = tiny_model()
    save_for_hub(model, FVLMProcessor.from_config(model.config, tiny_tokenizer()), folder / "model")
    rows = tiny_rows()
    second = rows[0] | {"recon_id": "valid_0_a_2"}  # another reconstruction of the first scan
    write_tiny_split(folder / "data", [*rows, second])
    (folder / "task.yaml").write_text(yaml.safe_dump(TASK))
    other = TASK | {"name": "other", "items": [TASK["items"][1] | {"positive": "Not small."}]}
    (folder / "other.yaml").write_text(yaml.safe_dump(other))
    return folder


def arguments(workplace: Path, out: Path, **options) -> list[str]:
    given = {"model": workplace / "model", "data": workplace / "data", "tasks": workplace / "task.yaml", "out": out}
    given |= {"device": "cpu", "num_bootstraps": 20} | options
    return [
        "--no-report",
        *(str(part) for name, value in given.items() for part in ([f"--{name}", *np.atleast_1d(value)])),
    ]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Arrow copies of the datasets library and prompt embeddings lie below the test's folder, not in the user's."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "home"))


def test_command_writes_what_it_promises(workplace, tmp_path, capsys):
    assert eval_fvlm.main(arguments(workplace, tmp_path / "eval")) == 0
    metrics = json.loads((tmp_path / "eval" / "metrics.json").read_text())
    with open(tmp_path / "eval" / "scores.csv") as file:
        rows = list(csv.DictReader(file))

    # The files say what the functions say.
    task = load_task(workplace / "task.yaml")
    frame = evaluate_split(tiny_model(), tiny_tokenizer(), tiny_dataset(), [task]).frame
    assert [row["recon_id"] for row in rows] == frame["recon_id"].tolist()  # one row per scan: valid_0_a_2 is left out
    assert [row["finding"] for row in rows] == frame["finding"].tolist()
    scores = [float(row["score"]) if row["score"] else np.nan for row in rows]
    np.testing.assert_allclose(scores, frame["score"], rtol=1e-5)
    summary = summarize(frame)
    assert summary["macro_auc"] is not None and not 0 < summary["macro_auc"] < 1e-9
    for key in ("num_findings", "num_patients", "num_scans", "per_organ", "excluded"):
        assert metrics[key] == summary[key], key
    assert metrics["macro_auc"] == pytest.approx(summary["macro_auc"])
    assert metrics["per_finding"].keys() == summary["per_finding"].keys()
    assert {"organ", "auc", "average_precision", "positives", "negatives", "excluded"} <= set(
        metrics["per_finding"]["Nodule"]
    )
    assert metrics["findings_without_labels"] == ["Small heart"]
    figures = metrics["evaluation"]
    assert figures["per_finding"].keys() == summary["per_finding"].keys()
    for finding, known in summary["per_finding"].items():
        assert figures["per_finding"][finding]["auc"]["value"] == pytest.approx(known["auc"], abs=1e-6), finding
    assert figures["macro_auc"] == pytest.approx(summary["macro_auc"])
    nodule = metrics["per_finding"]["Nodule"]["wording"]
    assert nodule["num_wordings"] == 2 and [pair["in_score"] for pair in nodule["pairs"]] == [True, True]
    assert metrics["per_finding"]["Big heart"]["wording"] is None  # one pair
    assert metrics["wording"]["num_findings"] == 1
    assert (metrics["num_patients"], metrics["num_scans"], metrics["num_reconstructions"]) == (3, 5, 5)

    protocol = metrics["protocol"]
    assert protocol["tasks"][0]["digest"] == task.digest and protocol["tasks"][0]["version"] == 1
    assert protocol["windows"]["size"] == [4, 12, 32] and protocol["temperature"] == pytest.approx(0.5)
    assert protocol["data"]["split"] == "validation" and protocol["versions"]["torch"]
    assert metrics["seconds"] > 0
    for name in ("roc.png", "auc_bars.png"):
        assert (tmp_path / "eval" / name).read_bytes().startswith(b"\x89PNG")
    told = capsys.readouterr()
    printed = told.out
    # What could not be measured is the last that is said.
    (missing,) = [warning for warning in figures["warnings"] if warning.startswith("ONLY A PART WAS MEASURED")]
    reason = "no case among the 0 scored and labelled"
    assert f"1 of the 4 findings of tiny have no figure ({reason}: Small heart)" in missing
    assert told.err.endswith(f"WARNING: {missing}\n")
    assert "macro AUC" in printed and "metrics.json" in printed and "not measured: no scan" in printed
    assert "AUC by wording" in printed and "wording: best and worst" in printed and "AUC, 95 %" in printed


def test_what_is_not_measured_is_named_case_by_case(workplace, tmp_path):
    """Rows that were not chosen, organs that a mask lacks, labels that are unknown, findings without any label."""
    assert eval_fvlm.main([*arguments(workplace, tmp_path / "eval", limit=4), "--quiet"]) == 0
    dropped = pd.read_csv(tmp_path / "eval" / "dropped.csv", keep_default_na=False)
    assert dropped.columns.tolist() == ["patient_id", "scan_id", "recon_id", "task", "finding", "reason"]
    rows = dropped[dropped["finding"] == ""].set_index("recon_id")["reason"].to_dict()
    assert rows == {"valid_2_a_1": "beyond --limit", "valid_0_a_2": "another reconstruction of the scan is scored"}
    findings = {tuple(row) for row in dropped[dropped["finding"] != ""][["recon_id", "finding", "reason"]].to_numpy()}
    assert findings == {
        ("valid_0_b_1", "Big heart", "organ absent from the mask"),
        ("valid_0_a_1", "Big aorta", "organ absent from the mask"),
        ("valid_1_b_1", "Big aorta", "organ absent from the mask"),
        ("valid_1_b_1", "Big heart", "label unknown"),
        ("", "Small heart", "no row of the split has a label for this finding"),
    }
    metrics = json.loads((tmp_path / "eval" / "metrics.json").read_text())
    of_limit, _ = metrics["protocol"]["warnings"]  # the other: too few patients for folds
    assert "the first 4 rows of 5 (--limit)" in of_limit and of_limit in metrics["evaluation"]["warnings"]
    counted = {reason: sum(reason == one[2] for one in findings) for reason in ("organ absent from the mask",)}
    small_heart = metrics["per_finding"]["Small heart"]["excluded"].get("organ absent from the mask", 0)
    assert metrics["excluded"]["organ absent from the mask"] - small_heart == counted["organ absent from the mask"]
    assert metrics["protocol"]["dropped_rows"] == dict.fromkeys(rows.values(), 1)
    assert metrics["evaluation"]["dropped_cases"] == {
        reason: {"count": 1, "cases": [recon_id]} for recon_id, reason in rows.items()
    }


def test_equal_reports_of_a_patient_are_dropped_if_asked(workplace, tmp_path, capsys):
    reports = ["A", "A ", "B", "C", "B"]  # the two scans of the first patient; scans of two other patients
    rows = [row | {"findings": text, "impression": ""} for row, text in zip(tiny_rows(), reports)]
    write_tiny_split(tmp_path / "data", rows)
    options = {"data": tmp_path / "data", "duplicates": "within_patients"}
    assert eval_fvlm.main([*arguments(workplace, tmp_path / "eval", **options), "--quiet"]) == 0
    metrics = json.loads((tmp_path / "eval" / "metrics.json").read_text())
    assert metrics["num_scans"] == 4 and metrics["protocol"]["duplicates"] == "within_patients"
    for protocol in (metrics["protocol"]["figures"], metrics["evaluation"]["protocol"]):
        assert protocol["in_words"]["duplicates"] == "of one patient's scans with equal reports the first"
    assert metrics["protocol"]["dropped_rows"] == {"report equal to that of an earlier scan of the patient": 1}
    assert pd.read_csv(tmp_path / "eval" / "dropped.csv")["recon_id"][0] == "valid_0_b_1"
    capsys.readouterr()
    assert eval_fvlm.main(arguments(workplace, tmp_path / "none", duplicates="everywhere")) == 1
    assert "the split has neither the column 'findings' nor 'impression'" in capsys.readouterr().err


def test_thresholds_come_from_where_the_command_says(workplace, tmp_path, capsys):
    train = [
        row | {name: f"train_{row[name]}" for name in ("patient_id", "scan_id", "recon_id")} for row in tiny_rows()
    ]
    write_tiny_split(tmp_path / "data", train=train)

    def run(name: str, *flags: str) -> tuple[dict, str]:
        given = arguments(workplace, tmp_path / name, data=tmp_path / "data")
        assert eval_fvlm.main([*given, "--quiet", *flags]) == 0
        metrics = json.loads((tmp_path / name / "metrics.json").read_text())
        return metrics, capsys.readouterr().err

    metrics, printed = run("default")
    assert "3 patients with a score and a label are too few for thresholds from 5 folds" in printed
    assert metrics["evaluation"]["protocol"]["threshold"] == 0.5 and metrics["protocol"]["warnings"]
    metrics, printed = run("folds", "--num_folds", "2")
    assert metrics["evaluation"]["protocol"]["threshold"] == "cross_validation" and printed.count("WARNING") == 1
    assert metrics["protocol"]["figures"]["num_bootstraps"] == 20
    on_test, _ = run("test", "--threshold", "test_labels")
    assert "on the test labels" in on_test["protocol"]["figures"]["in_words"]["threshold"]
    number, _ = run("number", "--threshold", "0.25")
    assert number["evaluation"]["per_finding"]["Nodule"]["threshold"]["value"] == 0.25
    assert number["protocol"]["set_by"]["threshold"] == "command line"
    # The development split holds the same scans under other names: the thresholds are those of the test labels.
    metrics, _ = run("development", "--threshold", "development", "--development_split", "train")
    assert metrics["protocol"]["data"]["development_split"] == "train"
    youden, _ = run("same", "--threshold", "0.5")
    assert (
        metrics["evaluation"]["per_finding"]["Nodule"]["youden"]["value"]
        >= (youden["evaluation"]["per_finding"]["Nodule"]["youden"]["value"])
    )
    assert {m["per_finding"]["Nodule"]["auc"] for m in (metrics, number, on_test, youden)} == {
        metrics["per_finding"]["Nodule"]["auc"]
    }

    given = arguments(workplace, tmp_path / "no", data=tmp_path / "data")
    for flags, message in (
        (["--threshold", "development"], "belong together: give both or neither"),
        (["--development_split", "train"], "belong together: give both or neither"),
        (["--threshold", "youden"], "'youden' is neither a number nor one of cross_validation"),
    ):
        with pytest.raises(SystemExit):
            eval_fvlm.main([*given, *flags])
        assert message in capsys.readouterr().err
    flags = ["--threshold", "development", "--development_split", "validation"]
    assert eval_fvlm.main([*given, *flags]) == 1
    assert "3 of its patients are in 'validation' too (first: valid_0)" in capsys.readouterr().err
    assert eval_fvlm.main([*given, "--num_bootstraps", "-1"]) == 1
    assert "num_bootstraps -1 must be at least 0" in capsys.readouterr().err


def test_everything_that_is_measured_comes_out_of_one_run(workplace, tmp_path, capsys):
    """Retrieval, diagnostics, embeddings, the page and the model's card, of two models that are compared."""
    rows = []
    for n, row in enumerate(tiny_rows()):
        captions = [
            {"organ": organ, "caption": f"{organ} {n}.", "is_abnormal": True, "is_mentioned": True} for organ in ORGANS
        ]
        rows.append(row | {"captions": captions, "findings": f"Nodule {n} seen.", "impression": ""})
    write_tiny_split(tmp_path / "data", rows)
    shutil.copytree(workplace / "model", tmp_path / "model")
    given = arguments(workplace, tmp_path / "out", model=tmp_path / "model", data=tmp_path / "data", num_folds=2)
    flags = ["--retrieval", "--diagnostics", "--save_embeddings", "--report", "--update_card", "--no_prompt_cache"]
    assert eval_fvlm.main([*given, "--model", str(workplace / "model"), *flags[:4], flags[5], "--quiet"]) == 0
    out = tmp_path / "out" / "a"
    retrieval, diagnostics = (json.loads((out / f"{name}.json").read_text()) for name in ("retrieval", "diagnostics"))
    assert retrieval["global"]["num_pairs"] == 5 and set(retrieval["per_organ"]) == set(ORGANS)
    assert "examples" not in retrieval, "sentences of reports are asked for with --show_text"
    assert diagnostics["pooling"]["zero_shot"]["per_finding"].keys() == {item["finding"] for item in TASK["items"]}
    stored = load_embeddings(out / "embeddings")
    assert stored.embeddings.organs == ORGANS and stored.embeddings.is_present.sum() == 11
    assert stored.info["protocol"]["tasks"][0]["name"] == "tiny" and stored.embeddings.volume_embeds is not None
    frame = score_task(load_task(workplace / "task.yaml"), stored.embeddings, stored.prompt_embeds, 2.0)
    written = pd.read_csv(out / "scores.csv")
    np.testing.assert_allclose(frame["score"].to_numpy(float), written["score"], rtol=1e-5)
    pages = [(tmp_path / "out" / letter / "report.html").read_text() for letter in "ab"]
    assert all("Retrieval" in page and "DeLong" in page and "Nodule 3 seen" not in page for page in pages)
    texts = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    with_path = [path.name for path, text in texts.items() if str(tmp_path.parent.parent).encode() in text]
    assert with_path == ["command.txt"], "results are handed on: no other file tells where somebody's files lie"
    assert (
        f"--model {tmp_path / 'model'} --data {tmp_path / 'data'} " in texts[tmp_path / "out" / "command.txt"].decode()
    )
    assert stored.info["protocol"]["model"]["weights"] in pages[0]
    examples = json.loads((out / "examples" / "examples.json").read_text())
    assert examples and all((out / example["picture"]).is_file() and "text" not in example for example in examples)
    assert (
        not (tmp_path / "model" / "README.md").is_file()
        or "roc_auc" not in (tmp_path / "model" / "README.md").read_text()
    )

    # One model, without the page, with sentences and the card; what the other run left is gone.
    shutil.copytree(out, tmp_path / "one")
    given = arguments(workplace, tmp_path / "one", model=tmp_path / "model", data=tmp_path / "data", num_folds=2)
    capsys.readouterr()
    assert eval_fvlm.main([*given, "--retrieval", "--update_card", "--show_text", "--quiet"]) == 0
    assert "README.md" in capsys.readouterr().out
    card = (tmp_path / "model" / "README.md").read_text()
    assert "tiny: macro AUC, zero-shot" in card and "recall@5" in card
    retrieval = json.loads((tmp_path / "one" / "retrieval.json").read_text())
    assert retrieval["examples"][0]["text"] == "Nodule 0 seen."
    for name in ("report.html", "diagnostics.json", "examples/examples.json"):
        assert not (tmp_path / "one" / name).exists(), name
    assert eval_fvlm.main([*given, "--model", "someone/model", "--update_card"]) == 1
    assert "--update_card: someone/model is no folder" in capsys.readouterr().err


def test_two_models_are_compared_on_the_same_scans(workplace, tmp_path, capsys):
    other = tiny_model(seed=1)
    save_for_hub(other, FVLMProcessor.from_config(other.config, tiny_tokenizer()), tmp_path / "other")
    given = arguments(workplace, tmp_path / "out")
    assert eval_fvlm.main([*given, "--model", str(tmp_path / "other")]) == 0
    printed = capsys.readouterr().out
    assert "p DeLong" in printed and "macro AUC" in printed and "comparison.json" in printed
    metrics = [json.loads((tmp_path / "out" / name / "metrics.json").read_text()) for name in "ab"]
    assert [entry["protocol"]["model"]["name"] for entry in metrics] == ["model", "other"]
    (comparison,) = json.loads((tmp_path / "out" / "comparison.json").read_text())["comparisons"]
    assert (comparison["task"], comparison["a"], comparison["b"]) == ("tiny", "model", "other")
    for finding in ("Nodule", "Big heart"):
        auc = comparison["per_finding"][finding]["auc"]
        assert [auc["a"], auc["b"]] == pytest.approx([entry["per_finding"][finding]["auc"] for entry in metrics])
        assert auc["difference"]["value"] == pytest.approx(auc["b"] - auc["a"])
    assert metrics[0]["per_finding"]["Nodule"] != metrics[1]["per_finding"]["Nodule"]
    # A later run of one model leaves no comparison behind.
    assert eval_fvlm.main([*arguments(workplace, tmp_path / "out"), "--quiet"]) == 0
    assert not (tmp_path / "out" / "comparison.json").exists()
    with pytest.raises(SystemExit):
        eval_fvlm.main([*given, "--model", str(tmp_path / "other"), "--revision", "main"])
    assert "--revision: 1 for 2 models" in capsys.readouterr().err


def test_options_reach_the_evaluation(workplace, tmp_path):
    """Every reconstruction, larger windows, a second task, a limit: each changes what it should and nothing else."""

    def metrics_of(name: str, **options) -> dict:
        assert eval_fvlm.main([*arguments(workplace, tmp_path / name, **options), "--quiet"]) == 0
        return json.loads((tmp_path / name / "metrics.json").read_text())

    plain = metrics_of("plain")
    assert metrics_of("all", level="reconstruction")["num_reconstructions"] == 6
    assert metrics_of("two", limit=2)["num_scans"] == 2
    large = metrics_of("large", window_size=[10, 32, 72])
    assert large["protocol"]["windows"]["num_windows"] == 5 < plain["protocol"]["windows"]["num_windows"]
    both = metrics_of("both", tasks=[workplace / "task.yaml", workplace / "other.yaml"])
    assert both["macro_auc"] == plain["macro_auc"] and both["task"] == "tiny"
    other = both["other_tasks"]["other"]["per_finding"]["Big heart"]
    assert other["organ"] == "heart" and other["auc"] is not None
    assert (tmp_path / "both" / "roc_other.png").is_file()
    frame = pd.read_csv(tmp_path / "both" / "scores.csv")
    assert frame.groupby("task").size().to_dict() == {"tiny": 20, "other": 5}


def test_shared_windows_change_the_context_and_say_so(workplace, tmp_path, capsys):
    def metrics_of(name: str, *flags: str) -> dict:
        assert eval_fvlm.main([*arguments(workplace, tmp_path / name, window_size=[4, 12, 40]), "--quiet", *flags]) == 0
        return json.loads((tmp_path / name / "metrics.json").read_text())

    plain, shared = metrics_of("plain"), metrics_of("shared", "--shared_windows")
    assert "here all (3 of 3): --retrieval" in shared["protocol"]["windows"]["context"]
    assert plain["protocol"]["windows"]["context"].startswith("centred")
    assert shared["protocol"]["windows"]["context"].startswith("shared")
    assert shared["protocol"]["windows"]["num_windows"] < plain["protocol"]["windows"]["num_windows"]
    frames = [pd.read_csv(tmp_path / name / "scores.csv") for name in ("plain", "shared")]
    assert frames[0]["score"].isna().equals(frames[1]["score"].isna())
    assert frames[0]["is_complete"].equals(frames[1]["is_complete"])
    assert (frames[0]["score"] - frames[1]["score"]).abs().max() > 1e-6
    for flags in (["--published_windows"], ["--protocol", "published"]):
        with pytest.raises(SystemExit):
            eval_fvlm.main([*arguments(workplace, tmp_path / "no"), "--shared_windows", *flags])
        assert "published windows are one per organ" in capsys.readouterr().err


@pytest.mark.skipif(not gemm.onednn_is_available(), reason="this PyTorch carries no oneDNN")
def test_the_backend_of_linear_layers_is_measured_and_named(workplace, tmp_path, monkeypatch, capsys):
    for name in ("plot_roc_curves", "plot_auc_bars"):
        monkeypatch.setattr(results, name, lambda frame, summary, path: path.write_bytes(b"x"))
    sent, apply = [], gemm._OneDNNLinear.apply
    monkeypatch.setattr(gemm._OneDNNLinear, "apply", lambda *tensors: sent.append(1) or apply(*tensors))

    def run(name: str, *flags: str) -> dict:
        given = [*arguments(workplace, tmp_path / name), "--quiet", "--no_prompt_cache"]
        assert eval_fvlm.main([*given, *flags]) == 0
        return json.loads((tmp_path / name / "metrics.json").read_text())["protocol"]

    monkeypatch.setattr(gemm, "choose_gemm_backend", lambda **sizes: pytest.fail("measured"))
    protocol = run("small")
    assert (protocol["gemm_backend"], protocol["gemm_check"]) == (BLAS, None)
    assert protocol["attention"] == {"image": "sdpa", "text": "sdpa"}
    assert run("half", "--dtype", "bfloat16")["gemm_backend"] is None and not sent

    choice = GemmChoice(ONEDNN, {BLAS: GemmCheck(50.0, 0.1), ONEDNN: GemmCheck(100.0, 0.1)})
    monkeypatch.setattr(gemm, "choose_gemm_backend", lambda **sizes: choice)
    monkeypatch.setattr(gemm, "MIN_PARAMETERS_TO_MEASURE", 100)
    capsys.readouterr()
    protocol = run("large", "--attn_implementation", "eager")
    assert (protocol["gemm_backend"], protocol["gemm_check"]) == (ONEDNN, choice.describe())
    assert (
        protocol["attention"] == {"image": "eager", "text": "eager"}
        and sent
        and choice.describe() in capsys.readouterr().err
    )
    scores = [pd.read_csv(tmp_path / name / "scores.csv")["score"] for name in ("small", "large")]
    np.testing.assert_allclose(*scores, rtol=1e-5)

    # A backend that is named is not timed, but checked; a setting that lowers float32 itself is told, and no crash.
    rounds = GemmChoice(BLAS, choice.checks | {ONEDNN: GemmCheck(100.0, 30.0)})
    monkeypatch.setattr(gemm, "choose_gemm_backend", lambda **sizes: rounds)
    protocol = run("named", "--gemm_backend", "onednn")
    assert protocol["gemm_backend"] == ONEDNN and "WARNING: GEMM backend onednn rounds 30" in protocol["gemm_check"]

    def lowered(**sizes):
        raise gemm.LowPrecisionError("undo torch.set_float32_matmul_precision")

    monkeypatch.setattr(gemm, "choose_gemm_backend", lowered)
    assert run("lowered")["gemm_backend"] == BLAS
    assert "WARNING: undo torch.set_float32_matmul_precision" in capsys.readouterr().err
    monkeypatch.setattr(gemm, "onednn_is_available", lambda: False)
    for flags, message in (
        (["--gemm_backend", "onednn"], "--gemm_backend onednn: GEMM backend 'onednn' is not among"),
        (["--attn_implementation", "flash_attention_2"], "needs a GPU and --dtype bfloat16 or float16, not float32 on"),
    ):
        assert eval_fvlm.main([*arguments(workplace, tmp_path / "no"), *flags]) == 1
        assert message in capsys.readouterr().err


def test_prompt_embeddings_are_kept_between_runs_unless_refused(workplace, tmp_path, monkeypatch, capsys):
    for name in ("plot_roc_curves", "plot_auc_bars"):
        monkeypatch.setattr(results, name, lambda frame, summary, path: path.write_bytes(b"x"))

    def run(name: str, *flags: str) -> str:
        assert eval_fvlm.main([*arguments(workplace, tmp_path / name), "--quiet", *flags]) == 0
        return json.loads((tmp_path / name / "metrics.json").read_text())["protocol"]["prompt_embeddings"]

    home = tmp_path / "home" / "fvlm" / "prompts"
    assert run("none", "--no_prompt_cache") == "computed" and not home.exists()
    assert run("first") == "computed" and len(list(home.iterdir())) == 1
    assert run("second") == "read from the prompt cache"
    assert run("again", "--no_prompt_cache") == "computed"
    assert run("own", "--prompt_cache", str(tmp_path / "own")) == "computed"
    assert [path.name for path in (tmp_path / "own").glob("*.safetensors")] == [path.name for path in home.iterdir()]
    scores = {name: (tmp_path / name / "scores.csv").read_bytes() for name in ("none", "first", "second", "own")}
    assert len(set(scores.values())) == 1
    with pytest.raises(SystemExit):
        run("both", "--no_prompt_cache", "--prompt_cache", str(tmp_path))
    assert "not allowed with" in capsys.readouterr().err


def test_published_protocol_through_the_command(workplace, tmp_path, capsys):
    def run(name: str, *flags: str) -> tuple[dict, str]:
        given = arguments(workplace, tmp_path / name, tasks=[workplace / "task.yaml", workplace / "other.yaml"])
        assert eval_fvlm.main([*given, *flags]) == 0
        return json.loads((tmp_path / name / "metrics.json").read_text()), capsys.readouterr().out

    metrics, printed = run("published", "--protocol", "published")
    protocol, published = metrics["protocol"], metrics["published"]
    assert protocol["name"] == "published" and protocol["level"] == "every reconstruction"
    assert protocol["windows"]["size"] == [112, 288, 352] and protocol["windows"]["rule"] == "published"
    assert protocol["data"]["preprocessing"] == "standard" and "counted as 0" in protocol["absent_organs"]
    assert protocol["set_by"].pop("tasks") == "command line" and set(protocol["set_by"].values()) == {"protocol"}
    assert len(protocol["set_by"]) == 4
    figures = metrics["evaluation"]
    assert figures["protocol"]["threshold"] == "test_labels" and figures["protocol"]["absent"] == "zero"
    for finding, counted in published["per_finding"].items():
        if counted["auc"] is not None:
            for ours, theirs in (("auc", "auc"), ("weighted_f1", "weighted_f1"), ("recall", "sensitivity")):
                assert figures["per_finding"][finding][ours]["value"] == pytest.approx(counted[theirs], abs=1e-9)

    # The published file holds what scores.csv holds, in the published form.
    table = pd.read_csv(tmp_path / "published" / "published_scores.csv")
    scores = pd.read_csv(tmp_path / "published" / "scores.csv").query("task == 'tiny'")
    assert table["file_name"].tolist() == [f"{row['recon_id']}.nii.gz" for row in tiny_rows()] + ["valid_0_a_2.nii.gz"]
    assert table.columns.tolist() == [
        "file_name",
        "lung_Nodule_No nodule. | There is no nodule._Nodule. | There is nodule.",
        "heart_Big heart_Not big._Big.",
        "heart_Small heart_Not small._Small. | Small is seen.",
        "aorta_Big aorta_Big is not seen._Big is seen.",
    ]
    for column in table.columns[1:]:
        finding = column.split("_")[1]
        rows = scores[scores["finding"] == finding]
        np.testing.assert_allclose(table[column], rows["score"], rtol=1e-8)
        counted = published["per_finding"][finding]
        assert counted["num_nan_as_zero"] == (table[column].isna() & rows["label"].notna().to_numpy()).sum()
        assert counted == {"organ": column.split("_")[0]} | published_finding_metrics(table[column], rows["label"])
    assert published["num_nan_as_zero"] == sum(m["num_nan_as_zero"] for m in published["per_finding"].values()) > 2
    assert "threshold chosen on the test labels, as published" in published["faults"]
    assert set(metrics["other_tasks"]["other"]["published"]["per_finding"]) == {"Big heart"}
    assert (tmp_path / "published" / "published_scores_other.csv").is_file()
    for text in ("tiny, published metrics", "other, published metrics", *published["faults"]):
        assert text in printed
    assert f"{published['num_nan_as_zero']} scores of absent organs (NaN) counted as 0" in printed

    # What the protocol sets gives way to the command line, and all of it together is the standard run.
    flags = ["--level", "scan", "--window_size", "4", "12", "32", "--no-published_windows"]
    flags += ["--threshold", "cross_validation", "--num_folds", "2"]
    both, _ = run("both", "--protocol", "published", *flags)
    assert set(both["protocol"]["set_by"].values()) == {"command line"}
    standard, printed = run("standard")
    assert standard["protocol"]["set_by"] == protocol["set_by"] | {"tasks": "command line"}
    for key in ("per_finding", "num_reconstructions"):
        assert both[key] == standard[key] != metrics[key], key
    assert "published" not in standard and "published metrics" not in printed
    assert (tmp_path / "standard" / "published_scores.csv").is_file()


def test_nothing_of_an_earlier_run_stays(tmp_path, monkeypatch):
    """A published run of two tasks, then a standard one of one, then one that is killed: all in one folder."""
    (tmp_path / "task.yaml").write_text(yaml.safe_dump(TASK))
    (tmp_path / "other.yaml").write_text(yaml.safe_dump(TASK | {"name": "other"}))
    tasks = [load_task(tmp_path / name) for name in ("task.yaml", "other.yaml")]
    for name in ("plot_roc_curves", "plot_auc_bars"):
        monkeypatch.setattr(results, name, lambda frame, summary, path: path.write_bytes(b"x"))
    model, tokenizer, dataset = tiny_model(), tiny_tokenizer(), tiny_dataset()
    both, one = (evaluate_split(model, tokenizer, dataset, some) for some in (tasks, tasks[:1]))
    out = tmp_path / "out"
    out.mkdir()
    (out / "roc_of_mine.png").write_bytes(b"mine")
    results.remove_earlier_results(out)
    assert (out / "roc_of_mine.png").is_file(), "no run has been here"
    (out / "roc_of_mine.png").rename(out / "my_roc.png")
    results.write_results(both, {"name": "published"}, out, published=True)
    assert len(list(out.iterdir())) == 10 and (out / "published_scores_other.csv").is_file()
    results.write_results(one, {"name": "standard"}, out)
    assert sorted(path.name for path in out.iterdir()) == sorted(
        ["auc_bars.png", "dropped.csv", "metrics.json", "my_roc.png", "published_scores.csv", "roc.png", "scores.csv"]
    )

    def killed(frame, summary, path):
        raise KeyboardInterrupt

    monkeypatch.setattr(results, "plot_roc_curves", killed)
    with pytest.raises(KeyboardInterrupt):
        results.write_results(one, {"name": "third"}, out)
    left = ["dropped.csv", "my_roc.png", "published_scores.csv", "scores.csv"]
    assert sorted(path.name for path in out.iterdir()) == left


def test_a_split_that_is_not_what_the_protocol_says_is_told(workplace, tmp_path, monkeypatch, capsys):
    write_tiny_split(tmp_path / "data", options={"reconstructions": "first"})
    for name in ("plot_roc_curves", "plot_auc_bars"):
        monkeypatch.setattr(results, name, lambda frame, summary, path: path.write_bytes(b"x"))

    def run(name: str, *flags: str, **options) -> tuple[dict, str]:
        given = arguments(workplace, tmp_path / name, num_folds=2, **options)
        assert eval_fvlm.main([*given, "--quiet", *flags]) == 0
        return json.loads((tmp_path / name / "metrics.json").read_text())["protocol"], capsys.readouterr().err

    protocol, printed = run("first", "--level", "reconstruction", data=tmp_path / "data")
    assert protocol["level"] == "first reconstruction of every scan (the split holds no other)"
    assert protocol["data"]["reconstructions"] == "first"
    (warning,) = protocol["warnings"]
    assert "--reconstructions all" in warning and f"WARNING: {warning}" in printed
    protocol, printed = run("plain", data=tmp_path / "data")
    assert protocol["warnings"] == [] and printed.count("WARNING") == 1  # of the part that was not measured
    protocol, printed = run("published", "--protocol", "published", data=tmp_path / "data", window_size=[4, 12, 32])
    assert len(protocol["warnings"]) == printed.count("WARNING") - 1 == 2
    assert "preprocessing 'standard'" in protocol["warnings"][1]
    # They go into a model's card, where no path of this machine belongs.
    assert not any(str(tmp_path) in warning for warning in protocol["warnings"])


@pytest.mark.parametrize("kind", ["missing keys", "unexpected keys", "mismatched keys", "cannot be loaded"])
def test_weights_of_another_form_are_refused(tmp_path, capsys, kind):
    model = tiny_model()
    save_for_hub(model, FVLMProcessor.from_config(model.config, tiny_tokenizer()), tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    weights = load_file(file)
    if kind == "missing keys":
        del weights["organ_projection.weight_0"]
    elif kind == "unexpected keys":
        weights["organ_projection.weight"] = torch.zeros(3)
    else:
        weights["organ_projection.weight_0"] = torch.zeros(2, 2)
    save_file(weights, file, metadata={"format": "pt"})
    if kind == "cannot be loaded":
        file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(EvaluationError, match=kind):
        eval_fvlm.load_model(str(tmp_path / "model"), None, "cpu")


@pytest.mark.parametrize(
    "settings, message",
    [
        (
            {"organ_set": {"name": "other", "organs": ["lung", "aorta", "heart"]}},
            r"they differ from label 2 on: \['aorta', 'heart'\] against \['heart', 'aorta'\]",
        ),
        ({"organ_set": {"name": "other", "organs": ["lung", "heart"]}}, "prepared for 2 organs, the model has 3"),
        (
            {"spacing": [1.5, 1.0, 1.0]},
            r"prepared at spacing \[1.5, 1.0, 1.0\] mm .* the model reads \[3.0, 1.0, 1.0\]",
        ),
    ],
)
def test_split_of_another_kind_is_refused(workplace, tmp_path, capsys, settings, message):
    write_tiny_split(tmp_path / "data", **settings)
    assert eval_fvlm.main(arguments(workplace, tmp_path / "out", data=tmp_path / "data")) == 1
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


def test_refusals_say_how_to_mend(workplace, tmp_path, capsys):
    wrong_organ = TASK | {"items": [TASK["items"][0] | {"organ": "lungs"}]}
    (tmp_path / "wrong.yaml").write_text(yaml.safe_dump(wrong_organ))
    (tmp_path / "empty").mkdir()
    for options, message in [
        ({"tasks": tmp_path / "wrong.yaml"}, "organ 'lungs' is not in config.organs"),
        ({"tasks": "syntetic"}, "nearest: 'synthetic'"),
        ({"tasks": [workplace / "task.yaml"] * 2}, "two prompt sets share a name"),
        ({"model": tmp_path / "empty"}, "holds no config.json"),
        ({"data": tmp_path / "empty"}, "no manifest.json"),
        ({"split": "test"}, "split 'test'"),
        ({"window_size": [4, 13, 32]}, "window height 13 is not a multiple"),
    ]:
        assert eval_fvlm.main(arguments(workplace, tmp_path / "out", **options)) == 1
        assert message in capsys.readouterr().err, options
    with pytest.raises(SystemExit):
        eval_fvlm.main(arguments(workplace, tmp_path / "out", batch_size=0))
    capsys.readouterr()
    with pytest.raises(SystemExit):
        eval_fvlm.main([*arguments(workplace, tmp_path / "out", limit=2), "--update_card"])
    assert "--update_card with --limit 2: results of a part of the split" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        eval_fvlm.main(["--model", "m", "--data", "d", "--out", "o"])
    assert "required: --tasks (only --protocol published brings its own)" in capsys.readouterr().err
    # Of two models the one that is meant is named, and before the other has run.
    renamed = tiny_model()
    renamed.config.organs = ["lung", "heart", "liver"]
    save_for_hub(renamed, FVLMProcessor.from_config(renamed.config, tiny_tokenizer()), tmp_path / "renamed")
    assert eval_fvlm.main([*arguments(workplace, tmp_path / "out"), "--model", str(tmp_path / "renamed")]) == 1
    printed = capsys.readouterr()
    assert f"--model {tmp_path / 'renamed'}: task 'tiny', finding 'Big aorta': organ 'aorta' is not in" in printed.err
    assert "scans" not in printed.err and not (tmp_path / "out").exists()
    # The published prompts ask for organs that this model lacks.
    places = ["--model", workplace / "model", "--data", workplace / "data", "--out", tmp_path / "out"]
    assert eval_fvlm.main([*map(str, places), "--device", "cpu", "--protocol", "published"]) == 1
    assert "organ 'esophagus' is not in config.organs" in capsys.readouterr().err


def test_float32_is_float32_however_the_weights_were_saved(tmp_path):
    model = tiny_model()
    processor = FVLMProcessor.from_config(model.config, tiny_tokenizer())
    save_for_hub(model.to(torch.bfloat16), processor, tmp_path / "half")
    loaded, _ = eval_fvlm.load_model(str(tmp_path / "half"), None, "cpu")
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}


def test_plots_of_no_and_one_finding(tmp_path):
    """Nothing measurable still makes a picture that says so."""
    columns = ["patient_id", "scan_id", "recon_id", "finding", "organ", "score", "label", "is_complete"]
    rows = [("p", "s", f"r{n}", "F", "lung", 0.1 * n, float(n == 2), True) for n in range(3)]
    for name, kept in (("one", rows), ("none", rows[:2])):
        frame = pd.DataFrame(kept, columns=columns).assign(task="t")
        for plot in (plot_roc_curves, plot_auc_bars):
            plot(frame, summarize(frame), tmp_path / f"{name}_{plot.__name__}.png")
            assert (tmp_path / f"{name}_{plot.__name__}.png").stat().st_size > 1000


@pytest.mark.parametrize("count, num_lines", [(4, 4), (5, 1)])
def test_many_findings_without_a_figure_take_one_line(count, num_lines):
    columns = ["patient_id", "scan_id", "recon_id", "finding", "organ", "score", "label", "is_complete"]
    rows = [
        (f"p{n}", "s", f"r{n}", finding, "lung", 0.1 * n, np.nan if finding != "Known" else float(n > 1), True)
        for finding in ["Known", *(f"Unknown {number}" for number in range(count))]
        for n in range(4)
    ]
    table = results.format_table(summarize(pd.DataFrame(rows, columns=columns).assign(task="t")))
    lines = [line for line in table.splitlines() if "not measured: no scan among the 0 scored and labelled" in line]
    assert len(lines) == num_lines and "Unknown 0" in lines[0] and "1.000" in table
    assert num_lines > 1 or "5 findings" in lines[0]


def test_help_teaches(capsys):
    with pytest.raises(SystemExit) as stopped:
        eval_fvlm.parse_arguments(["--help"])
    assert stopped.value.code == 0
    printed = capsys.readouterr().out
    assert "\n    python eval_fvlm.py --model runs/demo/model" in printed  # the docstring keeps its lines
    assert " ".join(printed.split()).count("with --shared_windows that moves scores") == 3
    assert "body_24_findings, ct_rate_16, ct_rate_18, rad_chest_ct_16, synthetic" in " ".join(printed.split())
