"""What the zero-shot pipeline takes: files, DICOM, arrays, masks of every kind or none, and what it then answers."""

import json
import logging
import os
import subprocess
import sys

import nibabel
import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from dicom_series import write_series, zip_folder
from tiny_scan import AFFINE, AORTA, HEART, LUNG, tiny_config, tiny_scan, tiny_tokenizer, write_scan

import eval_fvlm
from data_builders.__main__ import main as data_builders
from modeling_fvlm import FVLMModel, FVLMProcessor, FVLMZeroShotPipeline, save_for_hub
from modeling_fvlm.geometry import AIR_HU, BadVolumeError
from modeling_fvlm.organs import TOTALSEGMENTATOR_V1
from modeling_fvlm.reading import mask_from_array, read_mask, volume_from_array
from modeling_fvlm.whole_volume import cover_with_tiles

FINDINGS = [
    {"finding": "Emphysema", "organ": "lung", "positive": "Emphysema.", "negative": "Not emphysema."},
    {"finding": "Cardiomegaly", "organ": "heart", "positive": ["Cardiomegaly.", "Dilated."], "negative": "No nodule."},
    {"finding": "Nodule", "organ": "esophagus", "positive": "Nodule.", "negative": "Not nodule."},
    {"finding": "Dilated aorta", "organ": "aorta", "positive": "Dilated aorta.", "negative": "Not dilated aorta."},
]


def noisy(model):
    """Weights that speak up: fresh ones answer 0.5 whatever the scan."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.3, generator=generator)
    return model.eval()


@pytest.fixture(scope="module")
def model():
    return noisy(FVLMModel(tiny_config()))


@pytest.fixture(scope="module")
def processor():
    return FVLMProcessor.from_config(tiny_config(), tiny_tokenizer())


@pytest.fixture
def pipe(model, processor):
    return FVLMZeroShotPipeline(model=model, processor=processor, device="cpu")


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    return write_scan(tmp_path_factory.mktemp("scan"))


@pytest.fixture(scope="module")
def answers(model, processor, paths):
    pipe = FVLMZeroShotPipeline(model=model, processor=processor, device="cpu")
    return pipe({"volume": paths[0], "mask": paths[1]}, findings=FINDINGS)


def as_lps(array):
    """(depth, height, width), depth upward, height to the back, width to the left."""
    return np.ascontiguousarray(volume_from_array(array, AFFINE).array)


def model_labels(labels):
    """Of v2 labels: `organ_index + 1` of lung, heart, esophagus, aorta."""
    return np.select([labels == LUNG, labels == HEART, labels == AORTA], [1, 2, 4]).astype(np.uint8)


# Masks


def masks_of(folder, labels):
    """The same segmentation in every form: name -> (mask, numbering or None)."""

    def saved(name, array):
        path = folder / f"{name}.nii.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        nibabel.save(nibabel.Nifti1Image(array.astype(np.uint8), AFFINE), path)
        return path

    v1 = {10: "lung_upper_lobe_left", 51: "heart_myocardium", 52: "aorta"}
    v1_labels = sum((labels == value) * (TOTALSEGMENTATOR_V1.index(name) + 1) for value, name in v1.items())
    for structure, value in {"lung_lower_lobe_right": LUNG, "heart": HEART, "aorta": AORTA}.items():
        saved(f"structures/{structure}", labels == value)
    for organ, value in {"lung": LUNG, "heart": HEART, "aorta": AORTA}.items():
        saved(f"organs/{organ}", labels == value)
    own = {1: "lung", 2: "heart", 4: "aorta"}
    return {
        "v1 file": (saved("v1", v1_labels), "totalsegmentator_v1"),
        "file of the model's labels": (saved("own", model_labels(labels)), "organs"),
        "file of own labels": (saved("own", model_labels(labels)), own),
        "folder of structures": (folder / "structures", None),
        "folder of organs": (str(folder / "organs"), "organs"),
        "folder of own names": (folder / "organs", {7: "heart", 3: "lung", 9: "aorta"}),
        "array": (model_labels(labels), "organs"),
        "tensor": (torch.from_numpy(model_labels(labels)), "organs"),
        "array of v2": (labels, "totalsegmentator_v2"),
        "Volume": (mask_from_array(labels, AFFINE), None),
    }


def test_a_mask_of_every_form_gives_the_same(pipe, paths, answers, tmp_path):
    assert [item["region"] for item in answers] == ["organ"] * 4
    assert [item["is_complete"] for item in answers] == [False, True, False, True]
    assert answers[2]["probability"] is None
    found = {
        name: pipe({"volume": paths[0], "mask": mask} | ({"numbering": n} if n else {}), findings=FINDINGS)
        for name, (mask, n) in masks_of(tmp_path, tiny_scan()[1]).items()
    }
    assert len(found) == 10
    for name, each in found.items():
        assert each == answers, name


def test_a_mask_of_the_wrong_labels_is_refused(pipe, paths, tmp_path):
    hu, labels = tiny_scan()
    with pytest.raises(BadVolumeError, match="label 52 is outside the numbering, whose labels end at 4"):
        pipe({"volume": hu, "mask": labels, "affine": AFFINE, "numbering": "organs"}, findings=FINDINGS)
    with pytest.raises(ValueError, match='mask given as an array needs "numbering": "organs" where'):
        pipe({"volume": hu, "mask": labels, "affine": AFFINE}, findings=FINDINGS)
    with pytest.raises(BadVolumeError, match="holds no file of a structure"):
        (tmp_path / "empty").mkdir()
        pipe({"volume": paths[0], "mask": tmp_path / "empty"}, findings=FINDINGS)
    with pytest.raises(ValueError, match="numbering 'organ' is not one of"):
        pipe({"volume": paths[0], "mask": paths[1], "numbering": "organ"}, findings=FINDINGS)


# Volumes


def test_a_volume_of_every_form_gives_the_same_without_a_mask(pipe, paths, tmp_path):
    hu, _ = tiny_scan()
    expected = pipe(str(paths[0]), findings=FINDINGS)
    assert [item["region"] for item in expected] == ["whole volume"] * 4
    assert [item["is_complete"] for item in expected] == [None] * 4
    assert all(0 < item["probability"] < 1 and abs(item["probability"] - 0.5) > 1e-3 for item in expected)
    json.dumps(expected)
    write_series(tmp_path / "series", hu.transpose(2, 1, 0), AFFINE[:, [2, 1, 0, 3]])
    scans = {
        "path": paths[0],
        "DICOM folder": tmp_path / "series",
        "DICOM archive": zip_folder(tmp_path / "series", tmp_path / "series.zip"),
        "dict": {"volume": str(tmp_path / "series"), "mask": None},
        "array": {"volume": hu, "affine": AFFINE},
        "tensor": {"volume": torch.from_numpy(hu), "affine": torch.from_numpy(AFFINE)},
        "array in LPS": {"volume": as_lps(hu), "spacing": (4.0, 3.0, 2.0)},
        "tensor in LPS": {"volume": torch.from_numpy(as_lps(hu)), "spacing": [4, 3, 2]},
        "Volume": volume_from_array(hu, AFFINE),
    }
    for name, scan in scans.items():
        assert pipe(scan, findings=FINDINGS) == expected, name


def test_an_array_with_its_spacing_takes_a_mask(pipe, answers):
    hu, labels = tiny_scan()
    scan = {"volume": as_lps(hu), "mask": model_labels(as_lps(labels)), "spacing": (4.0, 3.0, 2.0)}
    scan["numbering"] = "organs"
    assert pipe(scan, findings=FINDINGS) == answers


def test_without_a_mask_every_organ_sees_all_tiles(pipe, model, processor, paths):
    """The scan is longer than a crop along every axis: 10 x 14 x 60 voxels, tiles of 8 x 12 x 32."""
    scan = processor.image_processor.prepare_volume(paths[0])
    assert scan.shape == (10, 14, 60) and len(cover_with_tiles(scan.shape, (8, 12, 32), (2, 4, 8))) == 8
    seen, original = [], model.vision_model.forward
    model.vision_model.forward = lambda volume, **rest: seen.append(volume) or original(volume, **rest)
    try:
        found = pipe(paths[0], return_embeds=True)
    finally:
        del model.vision_model.forward
    assert torch.cat(seen).shape == (8, 1, 8, 12, 32)
    shown = torch.cat(seen).flatten().tolist()
    assert set(scan.ravel().tolist()) <= set(shown)
    hu, _ = tiny_scan()
    hu[-1, -1, -1] += 400  # the last corner of all
    other = pipe({"volume": hu, "affine": AFFINE}, return_embeds=True)
    for before, after in zip(found, other, strict=True):
        moved = np.abs(np.array(before["image_embeds"]) - after["image_embeds"]).max()
        assert moved > 1e-7, f"{before['organ']} does not see the whole scan"


@pytest.mark.parametrize(("preprocessing", "outside"), [("standard", AIR_HU), ("published", -1151)])
def test_what_lies_outside_a_scan_without_a_mask_is_what_training_pads_with(preprocessing, outside):
    windows = [{"hu_min": -1150.5, "hu_max": 350.0, "mean": 0.0, "std": 1.0}]
    config = tiny_config(preprocessing=preprocessing, windows=windows, spacing=(4.0, 2.0, 2.0))
    pipe = FVLMZeroShotPipeline(
        model=FVLMModel(config), processor=FVLMProcessor.from_config(config, tiny_tokenizer()), device="cpu"
    )
    hu = np.random.default_rng(0).integers(-900, 500, (5, 10, 30)).astype(np.int16)
    (tile,) = pipe.preprocess({"volume": hu, "spacing": (4.0, 2.0, 2.0)}, return_embeds=True)["tiles"].numpy()
    assert tile.shape == (8, 12, 32)
    inside = np.zeros(tile.shape, bool)
    inside[1:6, 1:11, 1:31] = True  # 3 and 2 and 2 voxels are missing, the odd one behind
    assert (tile[inside].reshape(hu.shape) == hu).all() and (tile[~inside] == outside).all()


def test_one_warning_tells_of_a_missing_mask(pipe, paths, caplog):
    with caplog.at_level(logging.WARNING):
        pipe([paths[0], paths[0]], findings=FINDINGS)
        pipe(paths[0], findings=FINDINGS)
    told = [record.getMessage() for record in caplog.records if "no mask" in record.getMessage()]
    assert len(told) == 1 and "whole volume" in told[0] and "TotalSegmentator" in told[0]
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        pipe({"volume": paths[0], "mask": paths[1]}, findings=FINDINGS)
    assert not caplog.records


def test_published_scans_are_taken_as_stored(tmp_path):
    config = tiny_config(preprocessing="published")
    pipe = FVLMZeroShotPipeline(
        model=noisy(FVLMModel(config)), processor=FVLMProcessor.from_config(config, tiny_tokenizer()), device="cpu"
    )
    hu, labels = tiny_scan()
    affine = np.diag([-2.0, -2.0, 4.0, 1.0])  # what the published preparation takes for LPS
    path, mask = tmp_path / "ct.nii.gz", tmp_path / "mask.nii.gz"
    nibabel.save(nibabel.Nifti1Image(hu, affine), path)
    nibabel.save(nibabel.Nifti1Image(labels, affine), mask)
    for scan in (path, {"volume": path, "mask": mask}):
        answers = pipe(scan, findings=FINDINGS)
        assert 0 < answers[0]["probability"] < 1
        arrays = {"volume": np.ascontiguousarray(hu.T), "spacing": (4.0, 2.0, 2.0)}
        if isinstance(scan, dict):
            arrays |= {"mask": np.ascontiguousarray(labels.T), "numbering": "totalsegmentator_v2"}
        assert pipe(arrays, findings=FINDINGS) == answers
    with pytest.raises(ValueError, match="volume: a `Volume` has been turned"):
        pipe(volume_from_array(hu, affine), findings=FINDINGS)
    with pytest.raises(ValueError, match="published' takes one multilabel mask, not a folder"):
        pipe({"volume": path, "mask": tmp_path}, findings=FINDINGS)


@pytest.mark.parametrize(
    ("scan", "message"),
    [
        ({"mask": "mask.nii.gz"}, "a scan is the path of its volume, or"),
        ({"volume": np.zeros((4, 4, 4))}, "a volume given as an array needs"),
        ({"volume": np.zeros((4, 4, 4))}, 'an array needs "affine".* or "spacing"'),
        ({"volume": "ct.nii.gz", "spacing": (1, 1, 1)}, "spacing is for arrays without an affine"),
        ({"volume": np.zeros((4, 4, 4)), "affine": AFFINE, "spacing": (1, 1, 1)}, "spacing is for arrays without"),
        ({"volume": np.zeros((4, 4, 4)), "spacing": (1, 1)}, "spacing must be three positive mm"),
        ({"volume": np.zeros((4, 4, 4)), "spacing": (1, 0, 1)}, "spacing must be three positive mm"),
        ({"volume": "ct.nii.gz", "numbering": "organs"}, "but there is no mask"),
        ({"volume": "ct.nii.gz", "labels": 1}, r"does not have \['labels'\]"),
    ],
)
def test_a_scan_that_does_not_fit_is_refused(pipe, scan, message):
    with pytest.raises(ValueError, match=message):
        pipe(scan, findings=FINDINGS)


def test_a_missing_file_is_named(pipe, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.nii.gz"):
        pipe(tmp_path / "nowhere.nii.gz", findings=FINDINGS)


# Findings, embeddings, batches


def test_findings_of_every_form(pipe, paths, answers, tmp_path):
    scan = {"volume": paths[0], "mask": paths[1]}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({"name": "mine", "items": FINDINGS}))
    assert pipe(scan, findings=str(tmp_path / "mine.yaml")) == pipe(scan, findings=tmp_path / "mine.yaml") == answers
    named = pipe(scan, findings={"lung": ["Nodule"], "heart": "Nodule"})
    written = [
        {"finding": "Nodule", "organ": organ, "positive": "Nodule.", "negative": "Not Nodule."}
        for organ in ("lung", "heart")
    ]
    assert [item.pop("template") for item in named] == ["{}. / Not {}."] * 2
    assert named == pipe(scan, findings=written)
    every = pipe(scan, findings=["Nodule"])
    assert [item["organ"] for item in every] == ["lung", "heart", "esophagus", "aorta"]
    other = pipe(scan, findings={"lung": ["Nodule"]}, template=("{} shows.", "no {} shows."))[0]
    assert other["template"] == "{} shows. / no {} shows." and other["probability"] != every[0]["probability"]
    with pytest.raises(ValueError, match="template makes prompts of findings"):
        pipe(scan, template=("{}", "no {}"))


def test_findings_may_be_given_once(model, processor, paths, answers):
    pipe = FVLMZeroShotPipeline(model=model, processor=processor, device="cpu", findings=FINDINGS)
    assert pipe({"volume": paths[0], "mask": paths[1]}) == answers


def test_embeddings_are_those_of_the_model(pipe, model, processor, paths, answers):
    scan = {"volume": paths[0], "mask": paths[1]}
    found = pipe(scan, return_embeds=True)
    assert [set(item) for item in found] == [{"organ", "is_complete", "region", "image_embeds"}] * 4
    assert found[2]["image_embeds"] is None
    for place in (0, 1, 3):
        features = processor.image_processor(*paths, center=found[place]["organ"])
        with torch.no_grad():
            expected = model.get_organ_features(features["pixel_values"], features["organ_mask"]).image_embeds
        np.testing.assert_allclose(found[place]["image_embeds"], expected[0, place], atol=1e-6)
    both = pipe(scan, findings=FINDINGS, return_embeds=True)
    assert [item.pop("image_embeds") for item in both] == [item["image_embeds"] for item in found]
    assert both == answers
    json.dumps(found)


def test_a_list_of_scans_is_answered_scan_by_scan(pipe, paths, tmp_path):
    other = write_scan(tmp_path, depth=14, seed=3)
    scans = [
        {"volume": paths[0], "mask": paths[1]},
        str(other[0]),
        {"volume": other[0], "mask": other[1]},
        paths[0],
    ]
    alone = [pipe(scan, findings=FINDINGS, return_embeds=True) for scan in scans]
    assert pipe(scans, findings=FINDINGS, return_embeds=True) == alone
    assert list(pipe((scan for scan in scans), findings=FINDINGS, return_embeds=True)) == alone
    sizes, original = [], pipe.model.vision_model.forward
    pipe.model.vision_model.forward = lambda volume, **rest: sizes.append(len(volume)) or original(volume, **rest)
    try:
        batched = pipe(scans, findings=FINDINGS, return_embeds=True, batch_size=3)
    finally:
        del pipe.model.vision_model.forward
    assert max(sizes) == 3
    for found, expected in zip(batched, alone, strict=True):
        for item, wanted in zip(found, expected, strict=True):
            assert {**item, "probability": 0, "image_embeds": 0} == {**wanted, "probability": 0, "image_embeds": 0}
            if wanted["probability"] is not None:
                assert item["probability"] == pytest.approx(wanted["probability"], abs=1e-5)
                np.testing.assert_allclose(item["image_embeds"], wanted["image_embeds"], atol=1e-5)


# The evaluation's scores, and strangers


def test_the_score_is_that_of_the_evaluation(model, processor, paths, tmp_path, monkeypatch):
    """The same files through a builder, a split and eval_fvlm.py, and through the saved model's pipeline."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    source = tmp_path / "source"
    for folder in ("ct", "seg"):
        (source / folder).mkdir(parents=True)
    scans = {}
    for seed, name in enumerate(("p_1", "p_2")):
        hu, labels = tiny_scan(10 + 4 * seed, seed)
        scans[name] = {"volume": source / "ct" / f"{name}.nii.gz", "mask": source / "seg" / f"{name}.nii.gz"}
        for path, array in zip(scans[name].values(), (hu, labels)):
            nibabel.save(nibabel.Nifti1Image(array, AFFINE), path)
    table = pd.DataFrame({"id": list(scans), "findings": ["Heart is normal."] * 2, "impression": [""] * 2})
    for number, item in enumerate(FINDINGS):
        table[f"label:{item['finding']}"] = [number % 2, 1]
    table.to_csv(source / "reports.csv", index=False)
    options = ["--volumes", source / "ct", "--masks", source / "seg", "--reports", source / "reports.csv"]
    options += ["--organs", "chest_4", "--spacing", 4, 3, 2, "--margin", 1, 2, 2, "--validation_fraction", 0]
    options += ["--ids", "kept", "--previews", 0, "--workers", 1, "--out", tmp_path / "split"]
    assert data_builders(["folder", *map(str, options)]) == 0
    save_for_hub(model, processor, tmp_path / "model")
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({"name": "mine", "items": FINDINGS}))
    places = {"model": "model", "data": "split", "tasks": "mine.yaml", "out": "eval"}
    command = [str(part) for name, place in places.items() for part in (f"--{name}", tmp_path / place)]
    assert eval_fvlm.main([*command, "--split", "train", "--device", "cpu", "--no_prompt_cache", "--quiet"]) == 0
    scores = pd.read_csv(tmp_path / "eval" / "scores.csv").set_index(["recon_id", "finding"])
    pipe = FVLMZeroShotPipeline(model=model, processor=processor, device="cpu")
    num_scored = 0
    for name, scan in scans.items():
        for item in pipe(scan, findings=tmp_path / "mine.yaml"):
            row = scores.loc[(name, item["finding"])]
            assert item["is_complete"] == row["is_complete"]
            if item["probability"] is None:
                assert np.isnan(row["score"])
            else:
                assert item["probability"] == pytest.approx(row["score"], abs=1e-5)
                num_scored += 1
    assert num_scored == 6 and scores["score"].std() > 0.01


STRANGER = """
import importlib.util, json, sys
import numpy as np
from transformers import pipeline

folder, volume, mask, task, series, arrays = sys.argv[1:]
pipe = pipeline("ct-zero-shot", model=folder, trust_remote_code=True, device="cpu", findings=task)
assert "modeling_fvlm" not in sys.modules, "nothing of ours may be imported"
scan = np.load(arrays)
scans = [
    {"volume": volume, "mask": mask},
    volume,
    series,
    {"volume": scan["volume"], "mask": scan["mask"], "spacing": scan["spacing"].tolist(), "numbering": "organs"},
]
print(json.dumps([pipe(scans, return_embeds=True), pipe(volume, findings={"heart": ["Nodule"]})]))
"""


def test_strangers_ask_without_a_mask_and_with_a_task_file(pipe, model, processor, paths, tmp_path):
    """A saved folder in a fresh process elsewhere: what is new here must be among the copied files."""
    hu, labels = tiny_scan()
    save_for_hub(model, processor, tmp_path / "asked-fvlm")
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({"name": "mine", "items": FINDINGS}))
    write_series(tmp_path / "series", hu.transpose(2, 1, 0), AFFINE[:, [2, 1, 0, 3]])
    arrays = {"volume": as_lps(hu), "mask": model_labels(as_lps(labels)), "spacing": (4.0, 3.0, 2.0)}
    np.savez(tmp_path / "scan.npz", **arrays)
    (tmp_path / "elsewhere").mkdir()
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment.update(HF_HUB_OFFLINE="1", HF_MODULES_CACHE=str(tmp_path / "modules"), OMP_NUM_THREADS="1")
    given = [tmp_path / "asked-fvlm", *paths, tmp_path / "mine.yaml", tmp_path / "series", tmp_path / "scan.npz"]
    run = subprocess.run(
        [sys.executable, "-P", "-c", STRANGER, *map(str, given)],
        cwd=tmp_path / "elsewhere",
        env=environment,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert "no mask: every organ is pooled from the whole volume" in run.stderr
    found, named = json.loads(run.stdout.strip().splitlines()[-1])
    with_mask, without = (
        pipe(scan, findings=FINDINGS, return_embeds=True)
        for scan in ({"volume": paths[0], "mask": read_mask(paths[1])}, paths[0])
    )
    for answers, expected in zip(found, (with_mask, without, without, with_mask), strict=True):
        for item, wanted in zip(answers, expected, strict=True):
            assert item.keys() == wanted.keys()
            assert [item[name] for name in ("organ", "region", "is_complete")] == [
                wanted[name] for name in ("organ", "region", "is_complete")
            ]
            assert item["probability"] == pytest.approx(wanted["probability"], abs=1e-6)
            np.testing.assert_allclose(item["image_embeds"] or 0, wanted["image_embeds"] or 0, atol=1e-6)
    assert named[0]["template"] == "{}. / Not {}." and named[0]["region"] == "whole volume"
