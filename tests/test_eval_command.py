"""The command from saved model and split to files; and the combinations that it refuses before it works."""

import csv
import json
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from evaluation_samples import TASK, tiny_dataset, tiny_model, tiny_rows, tiny_tokenizer, write_tiny_split
from safetensors.torch import load_file, save_file

import eval_fvlm
from evaluation_fvlm import results
from evaluation_fvlm.errors import EvaluationError
from evaluation_fvlm.metrics import summarize
from evaluation_fvlm.plots import plot_auc_bars, plot_roc_curves
from evaluation_fvlm.published_metrics import published_finding_metrics
from evaluation_fvlm.tasks import load_task
from evaluation_fvlm.zero_shot import evaluate_split
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
    given |= {"device": "cpu"} | options
    return [str(part) for name, value in given.items() for part in ([f"--{name}", *np.atleast_1d(value)])]


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
    assert (metrics["num_patients"], metrics["num_scans"], metrics["num_reconstructions"]) == (3, 5, 5)

    protocol = metrics["protocol"]
    assert protocol["tasks"][0]["digest"] == task.digest and protocol["tasks"][0]["version"] == 1
    assert protocol["windows"]["size"] == [4, 12, 32] and protocol["temperature"] == pytest.approx(0.5)
    assert protocol["data"]["split"] == "validation" and protocol["versions"]["torch"]
    assert metrics["seconds"] > 0
    for name in ("roc.png", "auc_bars.png"):
        assert (tmp_path / "eval" / name).read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "macro AUC" in printed and "metrics.json" in printed and "not measured: no scan" in printed


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
    assert len(protocol["set_by"]) == 3

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
    both, _ = run("both", "--protocol", "published", *flags)
    assert set(both["protocol"]["set_by"].values()) == {"command line"}
    standard, printed = run("standard")
    assert standard["protocol"]["set_by"] == protocol["set_by"] | {"tasks": "command line"}
    for key in ("per_finding", "num_reconstructions"):
        assert both[key] == standard[key] != metrics[key], key
    assert "published" not in standard and "published metrics" not in printed
    assert not (tmp_path / "standard" / "published_scores.csv").exists()


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
    assert len(list(out.iterdir())) == 9 and (out / "published_scores_other.csv").is_file()
    results.write_results(one, {"name": "standard"}, out)
    assert sorted(path.name for path in out.iterdir()) == sorted(
        ["auc_bars.png", "metrics.json", "my_roc.png", "roc.png", "scores.csv"]
    )

    def killed(frame, summary, path):
        raise KeyboardInterrupt

    monkeypatch.setattr(results, "plot_roc_curves", killed)
    with pytest.raises(KeyboardInterrupt):
        results.write_results(one, {"name": "third"}, out)
    assert sorted(path.name for path in out.iterdir()) == ["my_roc.png", "scores.csv"]


def test_a_split_that_is_not_what_the_protocol_says_is_told(workplace, tmp_path, monkeypatch, capsys):
    write_tiny_split(tmp_path / "data", options={"reconstructions": "first"})
    for name in ("plot_roc_curves", "plot_auc_bars"):
        monkeypatch.setattr(results, name, lambda frame, summary, path: path.write_bytes(b"x"))

    def run(name: str, *flags: str, **options) -> tuple[dict, str]:
        given = arguments(workplace, tmp_path / name, **options)
        assert eval_fvlm.main([*given, "--quiet", *flags]) == 0
        return json.loads((tmp_path / name / "metrics.json").read_text())["protocol"], capsys.readouterr().err

    protocol, printed = run("first", "--level", "reconstruction", data=tmp_path / "data")
    assert protocol["level"] == "first reconstruction of every scan (the split holds no other)"
    assert protocol["data"]["reconstructions"] == "first"
    (warning,) = protocol["warnings"]
    assert "--reconstructions all" in warning and f"WARNING: {warning}" in printed
    protocol, printed = run("plain", data=tmp_path / "data")
    assert protocol["warnings"] == [] and "WARNING" not in printed
    protocol, printed = run("published", "--protocol", "published", data=tmp_path / "data", window_size=[4, 12, 32])
    assert len(protocol["warnings"]) == printed.count("WARNING") == 2
    assert "preprocessing 'standard'" in protocol["warnings"][1]


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
    with pytest.raises(SystemExit):
        eval_fvlm.main(["--model", "m", "--data", "d", "--out", "o"])
    assert "required: --tasks (only --protocol published brings its own)" in capsys.readouterr().err
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


def test_help_teaches(capsys):
    with pytest.raises(SystemExit) as stopped:
        eval_fvlm.parse_arguments(["--help"])
    assert stopped.value.code == 0
    printed = capsys.readouterr().out
    assert "\n    python eval_fvlm.py --model runs/demo/model" in printed  # the docstring keeps its lines
    assert "ct_rate_16, synthetic" in " ".join(printed.split())
