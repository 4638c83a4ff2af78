"""Reading ahead while the tower runs: that it happens, that it is bounded, and that late results are the same; whole
volumes, mean-pooled organs and texts against the slow way."""

import copy
import threading
import weakref

import numpy as np
import pytest
import torch
from datasets import Dataset
from evaluation_samples import ORGANS, tiny_config, tiny_dataset, tiny_model, tiny_rows, tiny_tokenizer

from evaluation_fvlm import embedding
from evaluation_fvlm.embedding import embed_scans, embed_split, embed_split_texts, mean_of_organs
from evaluation_fvlm.errors import EvaluationError
from evaluation_fvlm.windows import WindowRule
from modeling_fvlm import FVLMModel
from modeling_fvlm.geometry import AIR_HU
from modeling_fvlm.processed_split import decode_volume, encode_array

PATIENCE_S = 20


class WatchedRows:
    """Rows of one window each that say when each of them is read."""

    def __init__(self, count: int):
        self.row, self.count = tiny_rows()[0], count
        self.is_read = [threading.Event() for _ in range(count)]

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, position: int) -> dict:
        self.is_read[position].set()
        return self.row | {"recon_id": f"r{position}"}

    @property
    def num_read(self) -> int:
        return sum(event.is_set() for event in self.is_read)


@pytest.mark.parametrize("num_workers", [1, 3])
def test_next_scans_are_read_while_the_tower_runs_and_no_more(num_workers, monkeypatch):
    rows, model = WatchedRows(12), tiny_model()
    forward, num_forwards = model.get_organ_features, 0

    def slow_forward(**inputs):
        """Return only once the next scans are read: without threads that would never be."""
        nonlocal num_forwards
        num_forwards += 1
        for position in range(min(num_forwards + num_workers, len(rows))):
            assert rows.is_read[position].wait(PATIENCE_S), f"scan {position} is not read while the tower runs"
        assert rows.num_read <= num_forwards + num_workers + 1, "more scans in memory than promised"
        return forward(**inputs)

    monkeypatch.setattr(model, "get_organ_features", slow_forward)
    result = embed_split(model, rows, batch_size=1, num_workers=num_workers)
    assert num_forwards == rows.num_read == 12
    assert result.scans["recon_id"].tolist() == [f"r{n}" for n in range(12)]
    np.testing.assert_array_equal(result.image_embeds, np.repeat(result.image_embeds[:1], 12, axis=0))


def test_results_are_fetched_one_batch_late(monkeypatch):
    order = []
    for name in ("_launch", "_collect"):
        original = getattr(embedding, name)
        monkeypatch.setattr(embedding, name, lambda *args, f=original, n=name: (order.append(n[1]), f(*args))[1])
    embed_split(tiny_model(), Dataset.from_list(tiny_rows()[:2] * 2), batch_size=1)
    assert "".join(order) == "llclclcc"


def test_an_error_in_a_thread_comes_out_and_ends_the_run():
    rows = tiny_rows()
    rows[3]["mask"] = rows[3]["mask"][:-5]
    with pytest.raises(Exception, match="zstd|frame|decompress"):
        embed_split(tiny_model(), Dataset.from_list(rows), batch_size=1)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("ThreadPoolExecutor")]


def branch_model(volume_pooling: str, token_selection: str = "all") -> FVLMModel:
    """The tiny model with a global branch beside the same organs."""
    config = tiny_config(token_selection)
    config.volume_pooling = volume_pooling
    model = FVLMModel(config)
    model.load_state_dict(tiny_model(token_selection).state_dict(), strict=False)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith("volume_") and parameter.ndim > 1:
                parameter.normal_(0, 0.5, generator=torch.Generator().manual_seed(7))
    return model.eval()


def rows_with_an_empty_scan() -> list[dict]:
    rows = tiny_rows()
    volume, mask = decode_volume(rows[1])
    return [*rows, rows[1] | {"recon_id": "empty", "mask": encode_array(np.zeros_like(mask))}]


def slow_volume_embed(model: FVLMModel, row: dict, size=(4, 12, 32)) -> np.ndarray:
    """The middle of the scan, padded with air, in one forward of its own."""
    volume, mask = decode_volume(row)
    for axis, wanted in enumerate(size):
        extent = mask.shape[axis]
        if extent > wanted:
            start = (extent - wanted) // 2
            volume, mask = (array.take(range(start, start + wanted), axis) for array in (volume, mask))
        else:
            pads = [(0, 0)] * 3
            pads[axis] = ((wanted - extent) // 2, wanted - extent - (wanted - extent) // 2)
            volume, mask = np.pad(volume, pads, constant_values=AIR_HU), np.pad(mask, pads)
    with torch.no_grad():
        features = model.get_organ_features(
            volume=torch.from_numpy(volume)[None], organ_mask=torch.from_numpy(mask.astype(np.int64))[None]
        )
    return features.volume_embeds[0].numpy()


@pytest.mark.parametrize("token_selection", ["all", "organs"])
@pytest.mark.parametrize("pooling", ["mean", "attention"])
def test_a_global_branch_embeds_the_middle_of_every_scan(pooling, token_selection):
    model, rows = branch_model(pooling, token_selection), rows_with_an_empty_scan()
    result = embed_split(model, Dataset.from_list(rows), batch_size=3, with_volume=True)
    expected = np.stack([slow_volume_embed(model, row) for row in rows])
    np.testing.assert_allclose(result.volume_embeds, expected, atol=2e-6)
    # The fifth scan's organs lie in a corner, beyond the window in its middle; the sixth has none.
    np.testing.assert_allclose(np.linalg.norm(expected, axis=1), [1, 1, 1, 1, 0, 0], atol=1e-6)
    assert np.std(expected[:4], axis=0).min() > 0.01, "scans that are all alike would compare nothing"
    assert f"global branch ({pooling})" in result.volume_pooling
    plain = embed_split(model, Dataset.from_list(rows), batch_size=3)
    assert plain.volume_embeds is None and plain.num_windows < result.num_windows
    np.testing.assert_allclose(result.image_embeds, plain.image_embeds, atol=2e-6)


def test_organs_that_are_not_asked_are_seen_by_the_global_branch():
    model = branch_model("mean")
    whole, part = (embed_split(model, tiny_dataset(), organs=organs, with_volume=True) for organs in (None, ["aorta"]))
    np.testing.assert_allclose(part.volume_embeds, whole.volume_embeds, atol=2e-6)
    assert part.asked_organs == ["aorta"] and whole.asked_organs == ORGANS


def test_a_model_without_a_branch_gives_the_mean_of_its_organs():
    result = embed_split(tiny_model(), Dataset.from_list(rows_with_an_empty_scan()), with_volume=True)
    for volume, organs, is_present in zip(result.volume_embeds, result.image_embeds, result.is_present):
        mean = organs[is_present].mean(axis=0) if is_present.any() else np.zeros(8)
        np.testing.assert_allclose(volume, mean / max(np.linalg.norm(mean), 1e-9), atol=1e-6)
    assert not result.volume_embeds[5].any() and "mean of the embeddings" in result.volume_pooling
    opposite = np.stack([np.eye(4)[:2], -np.eye(4)[:2]], axis=1).reshape(2, 2, 4)
    assert not mean_of_organs(opposite, np.ones((2, 2), bool)).any(), "organs that cancel out have no direction"


@pytest.mark.parametrize("token_selection", ["all", "organs"])
def test_mean_pooling_is_attention_of_a_query_that_sees_no_difference(token_selection):
    model = tiny_model(token_selection)
    with torch.no_grad():
        model.organ_pooling.in_proj_bias.normal_(0, 0.5, generator=torch.Generator().manual_seed(3))
    result = embed_split(model, tiny_dataset(), batch_size=2, with_mean_pooling=True)
    even = copy.deepcopy(model)
    with torch.no_grad():
        even.organ_pooling.query_tokens.zero_()
        even.organ_pooling.in_proj_bias[: even.organ_pooling.query_tokens.shape[1]] = 0
    expected = embed_split(even, tiny_dataset(), batch_size=2)
    np.testing.assert_allclose(result.mean_pooled_embeds, expected.image_embeds, atol=2e-6)
    moved = np.abs(result.mean_pooled_embeds - result.image_embeds)[result.is_present]
    assert moved.max() > 0.01 and not result.mean_pooled_embeds[~result.is_present].any()
    assert not model.organ_pooling._forward_hooks


def test_scans_are_handed_over_when_they_are_whole_and_not_kept():
    """All scans of the stream live at once would be the whole split in memory."""
    rows, expected = WatchedRows(40), embed_split(tiny_model(), WatchedRows(1), with_volume=True)
    alive, seen = [], []

    def keep(scan):
        np.testing.assert_array_equal(scan.image_embeds, expected.image_embeds[0])
        np.testing.assert_array_equal(scan.volume_embed, expected.volume_embeds[0])
        seen.append(scan.position)
        alive.append(weakref.ref(scan))
        assert sum(reference() is not None for reference in alive) <= 4

    run = embed_scans(tiny_model(), rows, keep, batch_size=1, with_volume=True)
    assert sorted(seen) == list(range(40)) and run.num_batches == run.num_windows == 40


CAPTIONS = ["there is nodule.", "lung shows no significant abnormalities.", "big.", "big.", "not seen."]


def rows_with_texts() -> list[dict]:
    """Captions of lung and heart, reports: one repeated, one empty; all is in the tiny vocabulary or unknown."""
    rows = tiny_rows()
    for n, (row, caption) in enumerate(zip(rows, CAPTIONS)):
        entries = [{"organ": "lung", "caption": caption, "is_abnormal": n != 1, "is_mentioned": n != 1}]
        if n % 2:
            prefix = "heart shows no significant abnormalities."
            entries.append({"organ": "heart", "caption": prefix + "big.", "is_abnormal": True, "is_mentioned": True})
        report = {0: ("big nodule.", "there is no big heart."), 3: ("big nodule.", "there is no big heart.")}
        impression, findings = report.get(n, (None, None) if n == 1 else ("", f"small {'nodule ' * n}."))
        row |= {"captions": entries, "impression": impression, "findings": findings}
    return rows


def test_every_different_text_is_embedded_once():
    model, tokenizer, rows = tiny_model(), tiny_tokenizer(), rows_with_texts()
    texts = embed_split_texts(model, tokenizer, Dataset.from_list(rows), batch_size=2)
    read = [
        CAPTIONS[0],
        CAPTIONS[1],
        "big.",
        "not seen.",
    ]  # a normal sentence stays where it is alone
    assert texts.captions == read
    assert texts.caption_index.tolist() == [[0, -1, -1], [1, 2, -1], [2, -1, -1], [2, 2, -1], [3, -1, -1]]
    assert texts.is_abnormal[:, 0].tolist() == [True, False, True, True, True]
    assert texts.is_mentioned.sum() == 6 and not texts.is_abnormal[:, 2].any()
    assert texts.reports == [
        "big nodule. there is no big heart.", "small nodule nodule .", "small nodule nodule nodule nodule ."
    ]  # fmt: skip
    assert texts.report_index.tolist() == [0, -1, 1, 0, 2]
    for embeds, all_of_kind in ((texts.caption_embeds, texts.captions), (texts.report_embeds, texts.reports)):
        assert len(embeds) == len(all_of_kind)
        for values, text in zip(embeds, all_of_kind):
            tokens = tokenizer(text, return_tensors="pt", return_token_type_ids=False)
            with torch.no_grad():
                np.testing.assert_allclose(values, model.get_text_features(**tokens)[0], atol=2e-6)
    assert (texts.num_cut_captions, texts.num_cut_reports) == (0, 0)


def test_texts_longer_than_the_encoder_reads_are_counted():
    model, rows = tiny_model(), rows_with_texts()
    model.config.max_text_length, model.config.max_report_length = 6, 8
    texts = embed_split_texts(model, tiny_tokenizer(), Dataset.from_list(rows))
    # [CLS], words and stops, [SEP]: the normal sentence has 8; reports 12, 6 and 8
    assert (texts.num_cut_captions, texts.num_cut_reports) == (1, 1)
    assert len({embeds.tobytes() for embeds in texts.report_embeds}) == 3


def test_a_caption_of_an_organ_the_model_lacks_is_refused():
    rows = rows_with_texts()
    rows[2]["captions"][0]["organ"] = "liver"
    with pytest.raises(EvaluationError, match="valid_1_a_1: it has a caption of 'liver'.*organ set"):
        embed_split_texts(tiny_model(), tiny_tokenizer(), Dataset.from_list(rows))


def test_a_text_or_volume_that_is_not_finite_is_named():
    model = branch_model("mean")
    with torch.no_grad():
        model.volume_projection.bias.fill_(float("nan"))
    with pytest.raises(EvaluationError, match="valid_0_a_1: the embedding of the whole volume is not finite"):
        embed_split(model, tiny_dataset(), with_volume=True)
    with torch.no_grad():
        model.text_projection.bias.fill_(float("nan"))
    with pytest.raises(EvaluationError, match=r"embedding of the text 1 of \d+ is not finite"):  # without its words
        embed_split_texts(model, tiny_tokenizer(), Dataset.from_list(rows_with_texts()))


def test_published_windows_of_a_whole_volume_are_padded_to_patches_behind():
    window = embedding.volume_window((3, 14, 60), WindowRule((4, 12, 32), (2, 4, 8), published=True))
    assert window.crop == ((0, 3), (1, 13), (14, 46)) and window.size == (4, 12, 32) and window.padded_behind


@pytest.mark.gpu
def test_gpu_gives_what_the_cpu_gives():
    model, dataset = tiny_model(), tiny_dataset()
    expected = embed_split(model, dataset, batch_size=2)
    got = embed_split(model.to("cuda"), dataset, batch_size=2, num_workers=3)
    np.testing.assert_allclose(got.image_embeds, expected.image_embeds, atol=1e-4)
    assert torch.cuda.is_available() and expected.is_present.any()
