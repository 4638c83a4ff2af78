"""The zero-shot pipeline against its formula, its windows, and one folder loaded by strangers in a fresh process."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from tiny_scan import AFFINE, tiny_config, tiny_scan, tiny_tokenizer, write_scan
from transformers import pipeline

from modeling_fvlm import FVLMModel, FVLMProcessor, FVLMZeroShotPipeline, save_for_hub

FINDINGS = [
    {"finding": "Emphysema", "organ": "lung", "positive": "Emphysema.", "negative": "Not emphysema."},
    {
        "finding": "Cardiomegaly",
        "organ": "heart",
        "positive": ["Cardiomegaly.", "Dilated heart."],
        "negative": ["Not cardiomegaly.", "Not dilated."],
    },
    {"finding": "Hiatal hernia", "organ": "esophagus", "positive": "Nodule.", "negative": "Not nodule."},
    {"finding": "Dilated aorta", "organ": "aorta", "positive": "Dilated aorta.", "negative": "Not dilated aorta."},
]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = FVLMModel(tiny_config())
    # Fresh weights answer 0.5 whatever the scan: make the queries and the text tower speak up.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.3)
    return model.eval()


@pytest.fixture(scope="module")
def processor():
    return FVLMProcessor.from_config(tiny_config(), tiny_tokenizer())


@pytest.fixture(scope="module")
def pipe(model, processor):
    return FVLMZeroShotPipeline(model=model, processor=processor, device="cpu")


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    return write_scan(tmp_path_factory.mktemp("scan"))


@torch.no_grad()
def slow_probability(model, processor, paths, item):
    """One finding, one prompt pair after the other, with a crop around the organ from the image processor."""
    features = processor.image_processor(*paths, center=item["organ"])
    image = model.get_organ_features(features["pixel_values"], features["organ_mask"]).image_embeds[0]
    image = image[model.config.organs.index(item["organ"])]
    sides = [[item[side]] if isinstance(item[side], str) else item[side] for side in ("negative", "positive")]
    scores = []
    for negative, positive in zip(*sides):
        texts = [model.get_text_features(**processor(text=text))[0] for text in (negative, positive)]
        scores.append((torch.stack(texts) @ image / model.temperature.value).softmax(0)[1].item())
    return sum(scores) / len(scores)


def test_probabilities_follow_the_formula(pipe, model, processor, paths):
    result = pipe({"volume": str(paths[0]), "mask": str(paths[1])}, findings=FINDINGS)
    assert [(item["finding"], item["organ"]) for item in result] == [
        (item["finding"], item["organ"]) for item in FINDINGS
    ]
    assert [item["is_complete"] for item in result] == [False, True, False, True]
    assert result[2]["probability"] is None, "an absent organ has no probability"
    for item, answer in zip(FINDINGS, result):
        if answer["probability"] is not None:
            assert answer["probability"] == pytest.approx(slow_probability(model, processor, paths, item), abs=1e-5)
    assert all(abs(result[place]["probability"] - 0.5) > 0.01 for place in (0, 1, 3)), "the formula must be at work"
    json.dumps(result)  # plain Python values


def test_arrays_and_own_numbering_give_the_same(pipe, paths):
    expected = pipe({"volume": paths[0], "mask": paths[1]}, findings=FINDINGS)
    hu, labels = tiny_scan()
    own = {10: "lung", 51: "heart", 52: "aorta"}
    assert pipe({"volume": hu, "mask": labels, "affine": AFFINE, "numbering": own}, findings=FINDINGS) == expected


def test_equal_windows_are_forwarded_once_and_prompts_once(pipe, paths, tmp_path, monkeypatch):
    forwards, texts = [], []
    get_organ_features, get_text_features = pipe.model.get_organ_features, pipe.model.get_text_features
    monkeypatch.setattr(
        pipe.model, "get_organ_features", lambda **inputs: forwards.append(inputs) or get_organ_features(**inputs)
    )
    monkeypatch.setattr(
        pipe.model, "get_text_features", lambda *inputs: texts.append(inputs) or get_text_features(*inputs)
    )
    findings = [{**item, "positive": f"Large {number}."} for item in FINDINGS[:1] for number in range(3)]
    scans = [{"volume": paths[0], "mask": paths[1]}, {"volume": paths[0], "mask": paths[1]}]
    results = pipe(scans, findings=[*findings, FINDINGS[3], FINDINGS[2]])
    assert len(forwards) == 4, "two scans, each with a window for the lung and one for the aorta"
    assert len(texts) == 1 and results[0] == results[1]
    assert all(inputs["volume"].shape == (1, 8, 12, 32) for inputs in forwards)


def test_a_long_organ_is_seen_whole(pipe, tmp_path):
    """A lung longer than the crop along depth gets a longer window, not a part of itself."""
    hu, labels = tiny_scan(depth=20)
    labels[4:12, 3:9, 2:17] = 10
    seen = []
    original = pipe.model.get_organ_features
    pipe.model.get_organ_features = lambda **inputs: seen.append(inputs) or original(**inputs)
    try:
        scan = {"volume": hu, "mask": labels, "affine": AFFINE, "numbering": "totalsegmentator_v2"}
        result = pipe(scan, findings=FINDINGS[:1])
    finally:
        del pipe.model.get_organ_features
    assert seen[0]["volume"].shape == (1, 18, 12, 32), "17 slices, padded to whole patches of 2"
    assert int((seen[0]["organ_mask"] == 1).sum()) == int((labels == 10).sum())
    assert 0 < result[0]["probability"] < 1


def test_a_model_in_training_mode_answers_without_dropout(processor, model, paths):
    training = FVLMModel(tiny_config())
    training.load_state_dict(model.state_dict())
    training.train()
    pipe = FVLMZeroShotPipeline(model=training, processor=processor, device="cpu")
    scan = {"volume": paths[0], "mask": paths[1]}
    assert pipe(scan, findings=FINDINGS) == pipe(scan, findings=FINDINGS)


def test_the_task_is_known_after_the_import(model, processor, paths):
    pipe = pipeline("ct-zero-shot", model=model, processor=processor, device="cpu")
    assert isinstance(pipe, FVLMZeroShotPipeline)
    assert len(pipe({"volume": paths[0], "mask": paths[1]}, findings=FINDINGS)) == 4


@pytest.mark.parametrize(
    ("findings", "message"),
    [
        (None, "findings is missing"),
        ([], "non-empty list"),
        (FINDINGS[0], "non-empty list"),
        ([{"finding": "x", "organ": "lung", "positive": "a"}], r"findings\[0\] lacks \['negative'\]"),
        ([{**FINDINGS[0], "organ": "lungs"}], r"findings\[0\] \(Emphysema\): organ 'lungs' .*nearest: 'lung'"),
        (
            [{**FINDINGS[0], "positive": ["a", "b"], "negative": ["c"] * 3}],
            "2 positive and 3 negative prompts; they are compared in pairs",
        ),
        ([{**FINDINGS[0], "positive": [], "negative": []}], "0 positive and 0 negative"),
    ],
)
def test_wrong_findings_are_refused(pipe, paths, findings, message):
    arguments = {} if findings is None else {"findings": findings}
    with pytest.raises(ValueError, match=message):
        pipe({"volume": paths[0], "mask": paths[1]}, **arguments)


def test_wrong_scans_are_refused(pipe, paths):
    with pytest.raises(ValueError, match='a scan is the path of its volume, or {"volume"'):
        pipe({"mask": paths[1]}, findings=FINDINGS)
    with pytest.raises(ValueError, match=r"does not have \['masks'\]"):
        pipe({"volume": paths[0], "mask": paths[1], "masks": 1}, findings=FINDINGS)
    with pytest.raises(TypeError, match=r"does not know \['prompts'\]"):
        pipe({"volume": paths[0], "mask": paths[1]}, prompts=FINDINGS)


STRANGER = """
import json, sys
from transformers import AutoModel, AutoProcessor, pipeline

folder, volume, mask, findings = sys.argv[1:]
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
pipe = pipeline("ct-zero-shot", model=folder, trust_remote_code=True, device="cpu")
untasked = pipeline(model=folder, trust_remote_code=True, device="cpu")
assert "modeling_fvlm" not in sys.modules, "nothing of ours may be imported"
model = AutoModel.from_pretrained(folder, trust_remote_code=True)
features = processor(volumes=volume, masks=mask, captions=[{"heart": "cardiomegaly ."}])
scan = {"volume": volume, "mask": mask}
print(json.dumps({
    "classes": [type(value).__module__.split(".")[0] for value in (processor, processor.image_processor, pipe, model)],
    "findings": pipe(scan, findings=json.loads(findings)),
    "untasked": untasked(scan, findings=json.loads(findings)),
    "pixel_sum": float(features["pixel_values"].double().sum()),
    "image_embeds": model(**features, return_loss=False).image_embeds.tolist(),
}))
"""


def test_a_folder_for_the_hub_loads_in_a_fresh_process(model, processor, pipe, paths, tmp_path):
    """From another directory, nothing of ours imported: model, processor and pipeline by trust_remote_code alone."""
    folder = tmp_path / "tiny-fvlm"
    save_for_hub(model, processor, folder)
    modes = {path.name: oct(path.stat().st_mode) for path in (folder / "config.json", folder / "model.safetensors")}
    assert len(set(modes.values())) == 1, f"who may read the config may read the weights: {modes}"
    (tmp_path / "elsewhere").mkdir()
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment.update(HF_HUB_OFFLINE="1", HF_MODULES_CACHE=str(tmp_path / "modules"), OMP_NUM_THREADS="1")
    run = subprocess.run(
        [sys.executable, "-P", "-c", STRANGER, str(folder), *map(str, paths), json.dumps(FINDINGS)],
        cwd=tmp_path / "elsewhere",
        env=environment,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    found = json.loads(run.stdout.strip().splitlines()[-1])
    assert found["classes"] == ["transformers_modules"] * 4
    expected = pipe({"volume": paths[0], "mask": paths[1]}, findings=FINDINGS)
    for answers in (found["findings"], found["untasked"]):
        for answer, item in zip(answers, expected, strict=True):
            assert answer == {**item, "probability": answer["probability"]}
            assert answer["probability"] == pytest.approx(item["probability"], abs=1e-6)
    features = processor(*paths)
    assert found["pixel_sum"] == pytest.approx(float(features["pixel_values"].double().sum()))
    with torch.no_grad():
        image_embeds = model.get_organ_features(**features).image_embeds
    np.testing.assert_allclose(found["image_embeds"], image_embeds, atol=1e-6)


def test_saving_twice_and_again_from_the_folder(model, processor, tmp_path):
    folder = tmp_path / "again-fvlm"
    save_for_hub(model, processor, folder)
    first = {path.name: path.read_bytes() for path in folder.iterdir()}
    save_for_hub(FVLMModel.from_pretrained(folder), FVLMProcessor.from_pretrained(folder), folder)
    second = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert first.keys() == second.keys() >= {"pipeline_fvlm.py", "model.safetensors", "processor_config.json"}
    assert not [name for name in first if name.endswith((".bin", ".pt", ".pkl"))]
    config = json.loads(second["config.json"])
    assert config["custom_pipelines"]["ct-zero-shot"]["impl"] == "pipeline_fvlm.FVLMZeroShotPipeline"
    assert {name: first[name] for name in first if name.endswith((".py", ".safetensors"))} == {
        name: second[name] for name in second if name.endswith((".py", ".safetensors"))
    }
