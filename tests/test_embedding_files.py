"""Embeddings written and read back: the same arrays, whatever the order of writing, and nothing that is broken."""

import json

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset
from evaluation_samples import tiny_model, tiny_rows, tiny_tokenizer
from test_embedding import branch_model, rows_with_an_empty_scan, rows_with_texts

from evaluation_fvlm import embedding_files
from evaluation_fvlm.diagnostics import diagnose
from evaluation_fvlm.embedding import ScanEmbedding, SplitEmbeddings, embed_scans, embed_split, embed_split_texts
from evaluation_fvlm.embedding_files import EmbeddingWriter, embed_to_files, load_embeddings, save_embeddings
from evaluation_fvlm.errors import EvaluationError
from evaluation_fvlm.retrieval import retrieve

ARRAYS = ("image_embeds", "is_present", "is_complete", "volume_embeds", "mean_pooled_embeds")
TEXT_ARRAYS = ("caption_embeds", "caption_index", "is_abnormal", "is_mentioned", "report_embeds", "report_index")


@pytest.fixture(scope="module")
def split():
    """Embeddings and texts of five scans, with everything that can be asked for."""
    dataset, model = Dataset.from_list(rows_with_texts()), branch_model("attention")
    embeddings = embed_split(model, dataset, with_volume=True, with_mean_pooling=True)
    return embeddings, embed_split_texts(model, tiny_tokenizer(), dataset)


def check_equal(loaded, split, **tolerance) -> None:
    for got, expected, names in ((loaded.embeddings, split[0], ARRAYS), (loaded.texts, split[1], TEXT_ARRAYS)):
        for name in names:
            assert getattr(got, name).dtype == getattr(expected, name).dtype
            np.testing.assert_allclose(getattr(got, name), getattr(expected, name), err_msg=name, **tolerance)
    pd.testing.assert_frame_equal(loaded.embeddings.scans, split[0].scans, check_dtype=False)
    assert loaded.embeddings.labels == split[0].labels and any(split[0].labels)
    assert (loaded.texts.captions, loaded.texts.reports) == (split[1].captions, split[1].reports)


def test_what_is_saved_is_what_is_loaded(split, tmp_path):
    prompts = {"Nodule.": split[1].caption_embeds[0], "No nodule.": -split[1].caption_embeds[0]}
    save_embeddings(tmp_path / "e", *split, prompts=prompts, info={"model": {"path": "m"}, "logit_scale": 2.0})
    loaded = load_embeddings(tmp_path / "e")
    check_equal(loaded, split, rtol=0, atol=0)
    assert loaded.prompt_embeds.keys() == prompts.keys()
    np.testing.assert_array_equal(loaded.prompt_embeds["No nodule."], prompts["No nodule."])
    assert loaded.info["model"] == {"path": "m"} and loaded.info["logit_scale"] == 2.0
    assert loaded.info["volume_pooling"] == loaded.embeddings.volume_pooling == split[0].volume_pooling
    assert loaded.embeddings.organs == loaded.embeddings.asked_organs == split[0].organs


def test_half_the_size_keeps_three_digits(split, tmp_path):
    save_embeddings(tmp_path, *split, dtype="float16")
    check_equal(load_embeddings(tmp_path), split, rtol=1e-3, atol=1e-3)
    assert pq.read_schema(tmp_path / "scans.parquet").field("image_embeds/lung").type == pa.list_(pa.float16())
    with pytest.raises(EvaluationError, match="one of .*float16.*, not 'bfloat16'"):
        save_embeddings(tmp_path, *split, dtype="bfloat16")


def test_anybody_reads_the_table_with_pandas_alone(split, tmp_path):
    save_embeddings(tmp_path, *split)
    scans = pd.read_parquet(tmp_path / "scans.parquet", columns=["recon_id", "image_embeds/heart"]).dropna()
    assert scans["recon_id"].tolist() == split[0].scans["recon_id"][split[0].is_present[:, 1]].tolist()
    np.testing.assert_array_equal(
        np.stack(scans["image_embeds/heart"]), split[0].image_embeds[split[0].is_present[:, 1], 1]
    )
    texts = pd.read_parquet(tmp_path / "texts.parquet").set_index("text")
    rows = pd.read_parquet(tmp_path / "scans.parquet")
    assert texts.loc[rows["report_index"][3], "content"] == "big nodule. there is no big heart."
    assert texts.loc[[index[1] for index in rows["caption_index"] if index[1] >= 0], "content"].tolist() == ["big."] * 2


@pytest.mark.parametrize("rows_per_group", [2, 512])
def test_scans_are_written_as_they_come_and_read_in_order(split, tmp_path, rows_per_group, monkeypatch):
    monkeypatch.setattr(embedding_files, "ROWS_PER_GROUP", rows_per_group)
    dataset, model = Dataset.from_list(rows_with_texts()), branch_model("attention")
    order, most = [], 0
    info = {"volume_pooling": split[0].volume_pooling}
    options = {"with_volume": True, "with_mean_pooling": True}
    with EmbeddingWriter(tmp_path, split[0].organs, 8, info, texts=split[1], **options) as writer:

        def keep(scan: ScanEmbedding) -> None:
            nonlocal most
            order.append(scan.position)
            writer.add(scan)
            most = max(most, len(writer._rows))

        embed_scans(model, dataset, keep, batch_size=3, **options)
        assert not (tmp_path / "embeddings.json").exists(), "it says that all is there"
    assert order != sorted(order), "in the split's order nothing would be sorted"
    assert most < rows_per_group
    assert pq.ParquetFile(tmp_path / "scans.parquet").num_row_groups == -(-5 // rows_per_group)
    check_equal(load_embeddings(tmp_path), split, rtol=0, atol=2e-6)


def test_a_split_of_any_size_goes_scan_by_scan_to_the_files(split, tmp_path):
    dataset, model = Dataset.from_list(rows_with_texts()), branch_model("attention")
    run = embed_to_files(
        tmp_path, model, tiny_tokenizer(), dataset, info={"logit_scale": 2.0}, batch_size=3, with_mean_pooling=True
    )
    loaded = load_embeddings(tmp_path)
    check_equal(loaded, split, rtol=0, atol=2e-6)
    assert loaded.info["num_windows"] == run.num_windows == loaded.embeddings.num_windows > 5
    assert loaded.embeddings.volume_pooling == split[0].volume_pooling and loaded.info["logit_scale"] == 2.0


def test_a_split_whose_rows_have_no_texts_has_none_to_search(tmp_path):
    dataset, model = Dataset.from_list(tiny_rows()), tiny_model()
    texts = embed_split_texts(model, tiny_tokenizer(), dataset)
    save_embeddings(tmp_path, embed_split(model, dataset, with_volume=True), texts)
    loaded = load_embeddings(tmp_path)
    assert loaded.texts.captions == loaded.texts.reports == [] and (loaded.texts.report_index == -1).all()
    found = retrieve(loaded.embeddings, loaded.texts, num_bootstraps=0)
    assert found["global"]["pools"] is None and found["macro"]["num_organs"] == 0
    figures = diagnose(loaded)["per_organ"]["lung"]
    assert figures["alignment"] is None and figures["image_effective_rank"] > 1


def test_texts_can_stay_out(split, tmp_path):
    save_embeddings(tmp_path, *split, prompts={"Nodule.": split[1].caption_embeds[0]}, keep_texts=False)
    table = pq.read_table(tmp_path / "texts.parquet")
    assert [text for text in table["content"].to_pylist() if text is not None] == ["Nodule."]
    loaded = load_embeddings(tmp_path)
    np.testing.assert_array_equal(loaded.texts.report_embeds, split[1].report_embeds)
    assert loaded.texts.reports == [None] * 3 and list(loaded.prompt_embeds) == ["Nodule."]


def test_scans_without_organs_and_splits_without_texts(tmp_path):
    dataset = Dataset.from_list(rows_with_an_empty_scan())
    embeddings = embed_split(tiny_model(), dataset, organs=["heart"], with_volume=True)
    save_embeddings(tmp_path, embeddings)
    loaded = load_embeddings(tmp_path)
    assert loaded.texts is None and loaded.prompt_embeds == {} and loaded.embeddings.mean_pooled_embeds is None
    np.testing.assert_array_equal(loaded.embeddings.image_embeds, embeddings.image_embeds)
    assert not loaded.embeddings.is_present[5].any() and not loaded.embeddings.volume_embeds[5].any()
    assert loaded.embeddings.asked_organs == ["heart"], "lungs were not asked: their absence says nothing"


def test_a_run_that_was_broken_off_is_not_taken_for_a_whole_one(split, tmp_path):
    save_embeddings(tmp_path, *split)
    with pytest.raises(RuntimeError, match="tower"), EmbeddingWriter(tmp_path, split[0].organs, 8, {}):
        raise RuntimeError("the tower fell")
    with pytest.raises(EvaluationError, match="broken off while they were written"):
        load_embeddings(tmp_path)
    with pytest.raises(EvaluationError, match="holds no embeddings.*--save_embeddings"):
        load_embeddings(tmp_path / "elsewhere")


def altered(folder, name: str, change) -> None:
    """Put another column in the place of one of scans.parquet."""
    table = pq.read_table(folder / "scans.parquet")
    place = table.column_names.index(name)
    values = pa.array(change(table[name].to_pylist()), table.schema.field(name).type)
    pq.write_table(table.set_column(place, name, values), folder / "scans.parquet")


def with_value(row: int, value):
    return lambda values: [value if n == row else old for n, old in enumerate(values)]


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("image_embeds/lung", with_value(2, [float("nan")] + [0.3] * 7), "image_embeds/lung.*valid_1_a.*is not finite"),
        ("image_embeds/lung", with_value(2, [0.5] * 8), "valid_1_a.*length 1.414 instead of 1"),
        ("image_embeds/lung", with_value(2, [1.0] + [0.0] * 4), "valid_1_a.*has 5 numbers instead of 8"),
        ("image_embeds/lung", with_value(2, None), "valid_1_a.*the embedding is missing"),
        ("image_embeds/aorta", with_value(0, [1.0] + [0.0] * 7), "valid_0_a.*is there though the organ is absent"),
        ("volume_embeds", with_value(1, [2.0] + [0.0] * 7), "volume_embeds.*valid_0_b.*length 2"),
        ("row", with_value(3, 1), "a row of the split twice: 1"),
        ("is_present", with_value(3, [True]), "not one value for each of the 3 organs"),
        ("caption_index", with_value(0, [0, 9, -1]), "points at caption 9, but there are 4"),
        ("report_index", with_value(0, 7), "points at report 3, but there are 3"),
    ],
)  # fmt: skip
def test_damaged_files_are_refused(split, tmp_path, name, change, message):
    save_embeddings(tmp_path, *split)
    load_embeddings(tmp_path)
    altered(tmp_path, name, change)
    with pytest.raises(EvaluationError, match=message):
        load_embeddings(tmp_path)


def test_a_scan_that_is_there_twice_is_refused(split, tmp_path):
    save_embeddings(tmp_path, *split)
    for name in ("patient_id", "scan_id", "recon_id"):
        altered(tmp_path, name, lambda values: [*values[:4], values[2]])
    with pytest.raises(EvaluationError, match="holds a scan twice: .*'valid_1_a_1'"):
        load_embeddings(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "format 2, this version reads 1"),
        ({"num_scans": 6}, "has 5 scans, embeddings.json speaks of 6"),
        ({"dim": 16}, "has 8 numbers instead of 16"),
        ({"organs": ["lung", "heart", "liver"]}, r"lacks the columns \['image_embeds/liver'"),
    ],
)
def test_an_info_file_of_another_run_is_refused(split, tmp_path, change, message):
    save_embeddings(tmp_path, *split)
    info = json.loads((tmp_path / "embeddings.json").read_text()) | change
    (tmp_path / "embeddings.json").write_text(json.dumps(info))
    with pytest.raises(EvaluationError, match=message):
        load_embeddings(tmp_path)
    (tmp_path / "embeddings.json").write_text("{")
    with pytest.raises(EvaluationError, match="is no JSON"):
        load_embeddings(tmp_path)


def test_what_does_not_belong_together_is_refused_before_it_is_written(split, tmp_path):
    embeddings, texts = split
    arrays = (getattr(embeddings, name)[:4] for name in ARRAYS[:3])
    short = SplitEmbeddings(embeddings.organs, embeddings.scans[:4], embeddings.labels[:4], *arrays)
    with pytest.raises(EvaluationError, match="those of 5 rows, the embeddings of 4"):
        save_embeddings(tmp_path, short, texts)
    with pytest.raises(EvaluationError, match=r"info has the keys \['dim'\]"):
        save_embeddings(tmp_path, embeddings, texts, info={"dim": 3})
    with pytest.raises(EvaluationError, match="1 prompts with embeddings of shape"):
        save_embeddings(tmp_path, embeddings, texts, prompts={"Nodule.": np.ones(5, np.float32)})
    with pytest.raises(EvaluationError, match="are of 3 organs, the scans of 2"):
        EmbeddingWriter(tmp_path, ["lung", "heart"], 8, {}, texts=texts)
    scan = ScanEmbedding(
        0, {"recon_id": "r0"}, {}, embeddings.image_embeds[0], embeddings.is_present[0], embeddings.is_complete[0]
    )
    with (
        pytest.raises(EvaluationError, match="r0: it has no volume_embed"),
        EmbeddingWriter(tmp_path, embeddings.organs, 8, {}, with_volume=True) as writer,
    ):
        writer.add(scan)
    with (
        pytest.raises(EvaluationError, match=r"r0: embeddings of shape \(3, 8\), the file is of \(3, 4\)"),
        EmbeddingWriter(tmp_path, embeddings.organs, 4, {}) as writer,
    ):
        writer.add(scan)


def test_a_folder_that_cannot_be_made_is_told(split, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(EvaluationError, match="cannot be written to"):
        save_embeddings(tmp_path / "file" / "e", *split)
