"""Windows, embeddings and scores against the slow way: one scan, one organ, one prompt at a time."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from datasets import Dataset
from evaluation_samples import ORGANS, TASK, tiny_dataset, tiny_model, tiny_rows, tiny_tokenizer, write_tiny_split
from safetensors.torch import load_file
from transformers import BertTokenizer

import eval_fvlm
from evaluation_fvlm.embedding import embed_split
from evaluation_fvlm.errors import EvaluationError
from evaluation_fvlm.split import select_scans
from evaluation_fvlm.tasks import load_task
from evaluation_fvlm.windows import Window, WindowRule, organ_boxes, organ_windows, window_of_organ
from evaluation_fvlm.zero_shot import evaluate_split, pair_probability
from modeling_fvlm import FVLMConfig, FVLMModel
from modeling_fvlm.geometry import AIR_HU, window_volume
from modeling_fvlm.pipeline_fvlm import FVLMZeroShotPipeline, save_for_hub
from modeling_fvlm.processed_split import decode_volume, encode_array
from modeling_fvlm.processing_fvlm import FVLMProcessor
from modeling_fvlm.reading import Volume
from training_fvlm.published_weights import convert_published_state_dict

RULE = WindowRule((4, 12, 32), (2, 4, 8))


@pytest.fixture
def task(tmp_path):
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(TASK))
    return load_task(path)


def slow_window(mask, organ_index, size, patch_size):
    """Try every start: the window that lies inside the volume and whose middle is nearest to the organ's middle."""
    voxels = np.argwhere(mask == organ_index + 1)
    crop, padded = [], []
    for axis in range(3):
        first, last = voxels[:, axis].min(), voxels[:, axis].max()
        length = min(max(size[axis], last - first + 1), mask.shape[axis])
        starts = range(mask.shape[axis] - length + 1)
        start = min(starts, key=lambda start, f=first, last=last, n=length: abs((2 * start + n - 1) - (f + last)))
        crop.append((start, start + length))
        padded.append(int(np.ceil(max(length, size[axis]) / patch_size[axis])) * patch_size[axis])
    return crop, padded


def slow_scores(model, tokenizer, rows, task, size=(4, 12, 32)):
    """finding -> score per row (None: absent), each organ forwarded alone in its own window, windowed outside."""
    scores = {item.finding: [] for item in task.items}
    config = model.config
    for row in rows:
        volume, mask = decode_volume(row)
        for item in task.items:
            organ_index = ORGANS.index(item.organ)
            if not (mask == organ_index + 1).any():
                scores[item.finding].append(None)
                continue
            crop, padded = slow_window(mask, organ_index, size, config.vision_config.patch_size)
            part = tuple(slice(*edges) for edges in crop)
            before = [(p - (b - a)) // 2 for p, (a, b) in zip(padded, crop)]
            pads = [(n, p - (b - a) - n) for n, p, (a, b) in zip(before, padded, crop)]
            hu = np.pad(volume[part], pads, constant_values=AIR_HU)
            pixel_values = torch.from_numpy(window_volume(hu, config.windows))[None]
            organ_mask = torch.from_numpy(np.pad(mask[part], pads).astype(np.int64))[None]
            with torch.no_grad():
                image_embeds = model.get_organ_features(pixel_values, organ_mask).image_embeds[0, organ_index]
                logits = []
                for positive, negative in zip(item.positive, item.negative):
                    embeds = [
                        model.get_text_features(**tokenizer(text, return_tensors="pt", return_token_type_ids=False))[0]
                        for text in (negative, positive)
                    ]
                    logits.append(torch.stack(embeds) @ image_embeds / model.temperature.value)
            scores[item.finding].append(float(torch.stack(logits).softmax(1)[:, 1].mean()))
    return scores


@pytest.mark.parametrize("token_selection", ["all", "organs"])
@pytest.mark.parametrize("batch_size, num_workers", [(1, 1), (3, 2), (64, 1)])
def test_scores_equal_one_organ_at_a_time(task, token_selection, batch_size, num_workers):
    model, tokenizer = tiny_model(token_selection), tiny_tokenizer()
    expected = slow_scores(model, tokenizer, tiny_rows(), task)
    known = np.array([score for scores in expected.values() for score in scores if score is not None])
    assert known.std() > 0.05, "near-equal scores would compare nothing"
    assert any(None in scores for scores in expected.values())

    model.train()  # evaluate_split must switch dropout off, and back on
    scores = evaluate_split(model, tokenizer, tiny_dataset(), [task], batch_size=batch_size, num_workers=num_workers)
    assert model.training
    assert len(scores.frame) == len(expected) * 5
    for finding, rows in scores.frame.groupby("finding", sort=False):
        wanted = np.array([np.nan if score is None else score for score in expected[finding]])
        np.testing.assert_allclose(rows["score"].to_numpy(), wanted, rtol=2e-5, err_msg=finding)


def test_table_says_who_what_and_why(task):
    frame = evaluate_split(tiny_model(), tiny_tokenizer(), tiny_dataset(), [task]).frame
    assert frame["recon_id"].tolist()[:5] == [row["recon_id"] for row in tiny_rows()]
    heart = frame[frame["finding"] == "Big heart"].set_index("recon_id")
    np.testing.assert_array_equal(heart["label"], [1, 0, 0, np.nan, 1])  # -1 is unknown
    np.testing.assert_array_equal(heart["score"].isna(), [False, True, False, False, False])
    np.testing.assert_array_equal(heart["is_complete"], [True, False, True, True, False])  # absent; in the corner
    assert frame[frame["finding"] == "Small heart"]["label"].isna().all()  # the split has no such label
    aorta = frame[frame["finding"] == "Big aorta"]
    np.testing.assert_array_equal(aorta["is_complete"], [False, False, True, False, True])
    np.testing.assert_array_equal(aorta["score"].isna(), [True, False, False, True, False])  # cut is scored, absent not


def test_equal_windows_are_forwarded_once():
    whole = Dataset.from_list(tiny_rows()[:2])  # no larger than the window: one for all organs
    result = embed_split(tiny_model(), whole, batch_size=8)
    assert result.num_windows == 2 and result.num_batches == 1
    assert result.is_present.tolist() == [[True, True, False], [True, False, True]]
    norms = np.linalg.norm(result.image_embeds, axis=-1)
    np.testing.assert_allclose(norms, result.is_present.astype(float), atol=1e-6)
    asked = embed_split(tiny_model(), tiny_dataset(), organs=["heart"], batch_size=8)
    assert asked.is_present.any(axis=0).tolist() == [False, True, False]


def test_odd_window_sizes_do_not_pile_up():
    """Every scan with an organ of another length: no two windows share a size, and none may be lost."""
    rows = []
    for n in range(12):
        shape = (4 + 2 * n, 12, 32)
        mask = np.zeros(shape, np.uint8)
        mask[:, 2:5, 3:9] = 1
        rows.append(tiny_rows()[0] | {"volume": encode_array(mask.astype(np.int16)), "mask": encode_array(mask)})
        rows[-1] |= {"shape": list(shape), "recon_id": f"r{n}"}
    result = embed_split(tiny_model(), Dataset.from_list(rows), batch_size=2)
    assert result.num_windows == 12 and result.num_batches == 12
    np.testing.assert_allclose(np.linalg.norm(result.image_embeds[:, 0], axis=-1), 1, atol=1e-6)


@pytest.mark.parametrize("seed", range(30))
def test_window_holds_its_organ_and_stays_inside(seed):
    rng = np.random.default_rng(seed)
    shape = tuple(int(edge) for edge in rng.integers(2, 60, 3))
    mask = np.zeros(shape, np.uint8)
    for organ_id in (1, 2, 3):
        low = rng.integers(0, shape)
        high = np.minimum(low + rng.integers(1, 40, 3), shape)
        mask[tuple(slice(a, b) for a, b in zip(low, high))] = organ_id
    boxes = organ_boxes(mask, 3)
    windows = organ_windows(boxes, shape, RULE)
    served = sorted(organ for organs in windows.values() for organ in organs)
    assert served == [organ for organ in range(3) if (mask == organ + 1).any()]
    for window, organs in windows.items():
        taken = window.take(mask, 0)
        assert taken.shape == window.size
        assert all(size % patch == 0 for size, patch in zip(window.size, RULE.patch_size))
        assert all(size >= wanted for size, wanted in zip(window.size, RULE.size))
        for organ in organs:
            assert (taken == organ + 1).sum() == (mask == organ + 1).sum() > 0  # no voxel of the organ is lost
            crop, size = slow_window(mask, organ, RULE.size, RULE.patch_size)
            assert (list(window.crop), list(window.size)) == (crop, size)


def test_published_window_loses_the_last_layer_of_a_long_organ():
    rule = WindowRule((4, 12, 32), (2, 4, 8), published=True)
    box = (slice(2, 9), slice(3, 7), slice(0, 5))
    window = window_of_organ(box, (10, 10, 40), rule)
    assert window == Window(((2, 8), (0, 10), (0, 32)), (6, 12, 32), padded_behind=True)
    array = np.arange(10 * 10 * 40).reshape(10, 10, 40)
    taken = window.take(array, -1)
    assert (taken[:, :10] == array[2:8, :, :32]).all() and (taken[:, 10:] == -1).all()


def test_window_size_must_fit_the_patches():
    with pytest.raises(ValueError, match="window height 13 is not a multiple of the model's patch 4; take 16"):
        WindowRule((4, 13, 32), (2, 4, 8))


def test_pair_probability_is_the_mean_of_softmaxes():
    rng = np.random.default_rng(0)
    image, positive, negative = rng.normal(size=(5, 4)), rng.normal(size=(3, 4)), rng.normal(size=(3, 4))
    expected = np.zeros(5)
    for n in range(5):
        for p, q in zip(positive, negative):
            logits = np.exp([10 * image[n] @ q, 10 * image[n] @ p])
            expected[n] += logits[1] / logits.sum() / 3
    np.testing.assert_allclose(pair_probability(image, positive, negative, 10.0), expected, rtol=1e-10)
    assert expected.std() > 0.05
    extreme = pair_probability(np.array([[1.0], [-1.0], [0.0]]), np.array([[1.0]]), np.array([[-1.0]]), 1e4)
    np.testing.assert_array_equal(extreme, [1.0, 0.0, 0.5])  # no overflow


def test_bfloat16_scores_stay_close(task):
    model, tokenizer, dataset = tiny_model(), tiny_tokenizer(), tiny_dataset()
    exact = evaluate_split(model, tokenizer, dataset, [task]).frame["score"]
    rough = evaluate_split(model, tokenizer, dataset, [task], dtype=torch.bfloat16).frame["score"]
    assert (exact != rough).any(), "autocast did nothing"
    np.testing.assert_allclose(rough, exact, atol=0.05)


@pytest.mark.parametrize("row_index", [0, 2, 4])
def test_pipeline_and_evaluation_agree(task, row_index):
    """Two roads to one number: a user's scan through the pipeline, and the same scan as a row of a split."""
    model = tiny_model()
    processor = FVLMProcessor.from_config(model.config, tiny_tokenizer())
    row = tiny_rows()[row_index]
    volume, mask = (Volume(array, (3.0, 1.0, 1.0), np.diag([3.0, 1.0, 1.0, 1.0])) for array in decode_volume(row))
    numbering = {n + 1: organ for n, organ in enumerate(ORGANS)}
    scan = processor.image_processor.prepare(volume, mask, numbering=numbering)
    row |= {"volume": encode_array(scan.volume), "mask": encode_array(scan.mask), "shape": list(scan.mask.shape)}
    frame = evaluate_split(model, processor, Dataset.from_list([row]), [task]).frame

    pipeline = FVLMZeroShotPipeline(model=model, processor=processor)
    findings = [vars(item) for item in task.items]
    answers = pipeline({"volume": volume, "mask": mask, "numbering": numbering}, findings=findings)
    assert [answer["finding"] for answer in answers] == frame["finding"].tolist()
    wanted = np.array([answer["probability"] for answer in answers], float)
    np.testing.assert_allclose(frame["score"].to_numpy(float), wanted, rtol=2e-5)
    assert [answer["is_complete"] for answer in answers] == frame["is_complete"].tolist()
    assert np.isfinite(wanted).any()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"spacing": [1.5, 1.0, 1.0]}, r"valid_0_a_1: stored at spacing \[1.5, 1.0, 1.0\] mm"),
        ({"mask": encode_array(np.full((4, 10, 30), 4, np.uint8))}, "holds label 4, but the model knows 3 organs"),
    ],
)
def test_row_made_for_another_model_is_refused(task, change, message):
    rows = tiny_rows()
    rows[0] |= change
    with pytest.raises(ValueError, match=message):
        evaluate_split(tiny_model(), tiny_tokenizer(), Dataset.from_list(rows), [task])


def test_row_spacing_may_differ_by_the_voxel_that_resampling_rounds_off(task):
    rows = tiny_rows()
    rows[0]["spacing"] = [3.0 * 5.9 / 5, 1.0, 1.0]  # 17.7 mm on five whole voxels, four of them stored
    evaluate_split(tiny_model(), tiny_tokenizer(), Dataset.from_list(rows), [task])
    rows[0]["spacing"] = [2.5, 1.0, 1.0]  # what does not fit is cut off: voxels only grow
    with pytest.raises(EvaluationError, match=r"stored at spacing \[2.5, 1.0, 1.0\] mm"):
        evaluate_split(tiny_model(), tiny_tokenizer(), Dataset.from_list(rows), [task])


def test_first_reconstruction_of_every_scan():
    ids = [("b", "b_2"), ("a", "a_1"), ("b", "b_1"), ("a", "a_2"), ("c", "c_2")]
    dataset = Dataset.from_list([{"patient_id": scan, "scan_id": scan, "recon_id": recon} for scan, recon in ids])
    assert select_scans(dataset)["recon_id"][:] == ["a_1", "b_1", "c_2"]
    assert select_scans(dataset, limit=2)["recon_id"][:] == ["a_1", "b_1"]
    assert select_scans(dataset, "reconstruction", limit=4)["recon_id"][:] == ["b_2", "a_1", "b_1", "a_2"]
    with pytest.raises(ValueError, match="level 'patient' is not one of"):
        select_scans(dataset, "patient")
    ids = [("p", "s", "x_10"), ("p", "s", "x_2"), ("q", "s", "x_11"), ("q", "s", "y_1")]  # both call their visit s
    dataset = Dataset.from_list([{"patient_id": p, "scan_id": scan, "recon_id": recon} for p, scan, recon in ids])
    assert select_scans(dataset)["recon_id"][:] == ["x_2", "x_11"]


def test_embeddings_that_are_not_finite_are_no_absent_organs(task):
    model = tiny_model()
    with torch.no_grad():
        model.organ_projection.weight_0.fill_(torch.nan)
    with pytest.raises(EvaluationError, match=r"valid_0_a_1: the embedding of \['lung'.*is not finite"):
        evaluate_split(model, tiny_tokenizer(), tiny_dataset(), [task], batch_size=1)
    model = tiny_model()
    with torch.no_grad():
        model.text_projection.weight[:] = torch.nan
    with pytest.raises(EvaluationError, match="the embedding of the prompt '.*' is not finite"):
        evaluate_split(model, tiny_tokenizer(), tiny_dataset(), [task])


def test_published_protocol_gives_the_published_result_file(shared_dir, tmp_path, monkeypatch):
    """The authors' evaluate() on two volumes larger and smaller than the window, with released-style weights.

    Ours goes the whole way: a saved model, a split on disk, and the command with nothing but `--protocol published`.
    """
    import nibabel

    folder = shared_dir / "golden" / "tiny-zeroshot"
    golden, outputs = (json.loads((folder / name).read_text()) for name in ("config.json", "outputs.json"))
    vocabulary = json.loads((folder / "texts.json").read_text())["vocab"]
    text = {name: golden["text"][name] for name in ("vocab_size", "hidden_size", "num_hidden_layers")}
    text |= {name: golden["text"][name] for name in ("num_attention_heads", "intermediate_size")}
    config = FVLMConfig(
        vision_config={
            "hidden_size": golden["vit"]["hidden_size"],
            "intermediate_size": golden["vit"]["mlp_dim"],
            "num_hidden_layers": golden["vit"]["num_layers"],
            "num_attention_heads": golden["vit"]["num_heads"],
        },
        text_config={"model_type": "bert", **text},
        organs=golden["organs"],
        text_token_types=False,
        # The golden images are k / 255 for whole k, so k as HU in this window is the same input to the last bit.
        windows=[{"hu_min": 0.0, "hu_max": 255.0, "mean": 0.0, "std": 1.0}],
        spacing=(1.0, 1.0, 1.0),
    )
    model = FVLMModel(config)
    model.load_state_dict(convert_published_state_dict(load_file(folder / "weights.safetensors"), config))
    tokenizer = BertTokenizer(vocab={word: n for n, word in enumerate(vocabulary)})
    save_for_hub(model, FVLMProcessor.from_config(config, tokenizer), tmp_path / "model")
    task = load_task("ct_rate_16")
    assert [[i.organ, i.finding, *i.negative, *i.positive] for i in task.items] == outputs["test_items"]

    rows = []
    for value, name in enumerate(name.removesuffix(".nii.gz") for name in outputs["order_of_volumes"]):
        image, mask = (
            np.asarray(nibabel.load(folder / f"{name}.{kind}.nii.gz").dataobj) for kind in ("images", "masks")
        )
        rows.append(
            {"patient_id": name, "scan_id": name, "recon_id": name}
            | {
                "volume": encode_array(np.rint(image * 255).astype(np.int16)),
                "mask": encode_array(mask.astype(np.uint8)),
            }
            | {"shape": image.shape, "spacing": [1.0] * 3}
            | {"labels": [{"finding": finding, "value": value} for finding in task.findings]}
        )
    organ_set = {"name": "chest_4", "organs": golden["organs"], "classes": {}}
    write_tiny_split(tmp_path / "data", rows, organ_set=organ_set, spacing=[1.0] * 3)

    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "home"))
    places = ["--model", tmp_path / "model", "--data", tmp_path / "data", "--out", tmp_path / "out"]
    command = [*map(str, places), "--protocol", "published", "--device", "cpu", "--batch_size", "1"]
    command += ["--no-report", "--num_bootstraps", "20"]
    assert eval_fvlm.main(command) == 0
    ours, theirs = (
        pd.read_csv(path, dtype=str, keep_default_na=False)
        for path in (tmp_path / "out" / "published_scores.csv", folder / "result.csv")
    )
    assert ours.columns.tolist() == theirs.columns.tolist()
    assert ours["file_name"].tolist() == theirs["file_name"].tolist()
    ours, theirs = (table.iloc[:, 1:].replace("", "nan").to_numpy(float) for table in (ours, theirs))
    assert np.isnan(theirs).sum() == 1  # the aorta of one volume is absent: an empty cell, in both
    np.testing.assert_allclose(ours, theirs, atol=2e-6)

    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["protocol"]["windows"]["size"] == golden["roi_size"]
    assert metrics["protocol"]["windows"]["rule"] == "published"
    assert metrics["protocol"]["set_by"] == dict.fromkeys(
        ["tasks", "level", "window_size", "published_windows", "threshold"], "protocol"
    )
    # The absent aorta is that of the only positive volume: left out by our metrics, a sure "no" by the published ones.
    assert metrics["per_finding"]["Arterial wall calcification"]["auc"] is None
    assert metrics["published"]["per_finding"]["Arterial wall calcification"]["auc"] == 0.0
    assert metrics["published"]["num_nan_as_zero"] == 1
