"""The benchmark of the mask's worth asks the same scans twice, and compares what the pipeline answers."""

import json

import numpy as np
import pytest
import torch
from test_readme import save_tiny_body_model

from benchmarks import without_mask
from data_builders.__main__ import main as data_builders
from evaluation_fvlm.split import open_split
from evaluation_fvlm.tasks import PROMPTS_DIR
from modeling_fvlm import FVLMModel, FVLMProcessor, FVLMZeroShotPipeline


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    folder = tmp_path_factory.mktemp("without_mask")
    source = ["--out", folder / "source", "--patients", 1, "--validation", 8, "--seed", 0, "--workers", 1]
    assert data_builders(["synthetic", *map(str, source)]) == 0
    options = ["--source", folder / "source", "--organs", "body_24", "--spacing", 20, 4, 4, "--margin", 1, 4, 4]
    options += ["--previews", 0, "--workers", 1, "--out", folder / "processed"]
    assert data_builders(["ct_rate", *map(str, options)]) == 0
    save_tiny_body_model(folder / "model")
    model = FVLMModel.from_pretrained(folder / "model")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.3, generator=generator)
    model.save_pretrained(folder / "model")
    return folder


def test_the_same_scans_with_and_without_masks(places, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    arguments = ["--model", places / "model", "--data", places / "processed"]
    arguments += ["--release", places / "source" / "dataset", "--json", tmp_path / "out.json"]
    result = without_mask.main([str(word) for word in arguments])
    assert json.loads((tmp_path / "out.json").read_text())["macro"] == result["macro"]
    told = capsys.readouterr().out
    auc = result["macro"]["auc"]
    assert f"{auc['a']:.3f} with masks, {auc['b']:.3f} without" in told and auc["a"] != auc["b"]

    pipe = FVLMZeroShotPipeline(
        model=FVLMModel.from_pretrained(places / "model"),
        processor=FVLMProcessor.from_pretrained(places / "model"),
        device="cpu",
        findings=PROMPTS_DIR / "synthetic.yaml",
    )
    dataset = open_split(str(places / "processed"), "validation").select(range(2))
    with_masks, without = without_mask.scores(pipe, dataset, places / "source" / "dataset", "synthetic")
    for table, has_mask in ((with_masks, True), (without, False)):
        name = table["recon_id"].iloc[-1]
        place = f"valid_fixed/{dataset[1]['patient_id']}/{dataset[1]['scan_id']}/{name}.nii.gz"
        scan = {"volume": places / "source" / "dataset" / place}
        if has_mask:
            scan["mask"] = places / "source" / "dataset" / "ts_seg" / "ts_total" / place
        expected = [np.nan if answer["probability"] is None else answer["probability"] for answer in pipe(scan)]
        np.testing.assert_allclose(table["score"][table["recon_id"] == name], expected, atol=1e-6)
    labels = {label["finding"]: label["value"] for label in dataset[0]["labels"]}
    first = with_masks[with_masks["recon_id"] == dataset[0]["recon_id"]].set_index("finding")["label"]
    assert {finding: value for finding, value in labels.items() if value in (0, 1)} == first.dropna().to_dict()
