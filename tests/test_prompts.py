"""Prompt embeddings and their cache: what it gives is what would be computed, or it gives nothing."""

import logging
import threading

import numpy as np
import pytest
import torch
from evaluation_samples import WORDS, tiny_dataset, tiny_model, tiny_tokenizer
from transformers import BertTokenizer

from evaluation_fvlm import prompts
from evaluation_fvlm.errors import EvaluationError
from evaluation_fvlm.prompts import embed_prompts

SENTENCES = ["There is nodule.", "No nodule.", "Big.", "Not big.", "Small is seen."]


@pytest.fixture
def model():
    return tiny_model()


def embed(model, cache, sentences=SENTENCES, tokenizer=None, **options) -> prompts.PromptEmbeddings:
    return embed_prompts(model, tokenizer or tiny_tokenizer(), sentences, cache=cache, **options)


def assert_equal(one: prompts.PromptEmbeddings, other: prompts.PromptEmbeddings) -> None:
    assert one.by_prompt.keys() == other.by_prompt.keys() == set(SENTENCES)
    for prompt, values in one.by_prompt.items():
        np.testing.assert_array_equal(values, other.by_prompt[prompt])


@pytest.mark.parametrize("batch_size", [2, 64])
def test_embeddings_equal_one_sentence_at_a_time(model, batch_size):
    result = embed(model, None, batch_size=batch_size)
    assert not result.are_cached and list(result.by_prompt) == sorted(SENTENCES, key=len)
    for prompt, values in result.by_prompt.items():
        tokens = tiny_tokenizer()(prompt, return_tensors="pt")
        with torch.no_grad():
            alone = model.get_text_features(tokens["input_ids"], tokens["attention_mask"])[0]
        np.testing.assert_allclose(values, alone, atol=1e-6)


def test_second_run_reads_what_the_first_computed(model, tmp_path, monkeypatch):
    cache = tmp_path / "not" / "yet" / "made"
    first = embed(model, cache)
    assert not first.are_cached
    assert [path.suffix for path in cache.iterdir()] == [".safetensors"]
    monkeypatch.setattr(type(model), "get_text_features", None)  # nothing may be embedded again
    second = embed(tiny_model(), cache)
    assert second.are_cached
    assert_equal(first, second)


def change_nothing(model):
    return {}


def change_a_weight(model):
    with torch.no_grad():
        list(model.text_model.parameters())[-1].view(-1)[-1] += 1e-6
    return {}


def change_the_projection(model):
    with torch.no_grad():
        model.text_projection.bias[0] += 1e-6
    return {}


def change_the_organ_side(model):
    with torch.no_grad():
        model.organ_pooling.query_tokens += 1
    return {}


def change_the_pooling(model):
    model.config.text_pooling = "mean"
    return {}


def change_the_text_config(model):
    model.config.text_config.layer_norm_eps = 1e-3
    return {}


def change_the_tokenizer(model):
    swapped = WORDS[:-1] + ["other"]  # "nodule" becomes unknown
    return {"tokenizer": BertTokenizer(vocab={word: n for n, word in enumerate(swapped)})}


def change_the_maximum_length(model):
    model.config.max_text_length = 4
    return {}


@pytest.mark.parametrize(
    "change, is_another",
    [
        (change_nothing, False),
        (change_the_organ_side, False),
        (change_a_weight, True),
        (change_the_projection, True),
        (change_the_pooling, True),
        (change_the_text_config, True),
        (change_the_tokenizer, True),
        (change_the_maximum_length, True),
        (lambda model: {"dtype": torch.bfloat16}, True),
        (lambda model: {"sentences": [*SENTENCES[:-1], "Small is not seen."]}, True),
    ],
)
def test_what_makes_an_embedding_makes_its_key(model, tmp_path, change, is_another):
    embed(model, tmp_path)
    options = change(model)
    assert embed(model, tmp_path, **options).are_cached != is_another
    assert len(list(tmp_path.iterdir())) == 1 + is_another


def test_weights_that_were_trained_on_are_never_stale(model, tmp_path):
    """An evaluation after every step: each has its own embeddings, and they are those without a cache."""
    optimizer = torch.optim.SGD(model.text_projection.parameters(), lr=0.5)
    seen = []
    for _ in range(3):
        cached = embed(model, tmp_path)
        assert not cached.are_cached
        assert_equal(cached, embed(model, None))
        seen.append(cached.by_prompt["Big."])
        model.get_text_features(torch.tensor([[2, 11, 3]])).sum().backward()
        optimizer.step()
    assert not np.allclose(seen[0], seen[1]) and not np.allclose(seen[1], seen[2])


def cut_off(path):
    path.write_bytes(path.read_bytes()[:-10])


def empty(path):
    path.write_bytes(b"")


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[-3] ^= 1  # in the numbers: safetensors itself would not notice
    path.write_bytes(content)


def put_another_there(path):
    other = path.with_name("other")
    prompts.write_cached(other, np.ones((2, 8), np.float32))
    other.rename(path)


def put_other_tensors_there(path):
    prompts.save_file({"other": np.ones((5, 8), np.float32)}, path)


@pytest.mark.parametrize("damage", [cut_off, empty, flip_a_bit, put_another_there, put_other_tensors_there])
def test_a_damaged_file_is_computed_anew_with_a_warning(model, tmp_path, caplog, damage):
    first = embed(model, tmp_path)
    (path,) = tmp_path.iterdir()
    damage(path)
    with caplog.at_level(logging.WARNING):
        second = embed(model, tmp_path)
    assert not second.are_cached and path.name in caplog.text and "computed anew" in caplog.text
    assert_equal(first, second)
    assert embed(model, tmp_path).are_cached, "the damaged file has been replaced"


def test_writers_at_once_leave_one_whole_file(model, tmp_path):
    results = []
    threads = [threading.Thread(target=lambda: results.append(embed(tiny_model(), tmp_path))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (path,) = tmp_path.iterdir()  # and no .part beside it
    assert len(results) == 4 and embed(model, tmp_path).are_cached
    for result in results:
        assert_equal(result, results[0])


def test_a_writer_that_is_killed_leaves_no_file_that_counts(model, tmp_path, monkeypatch):
    def killed(source, target):
        raise KeyboardInterrupt

    monkeypatch.setattr(prompts.os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        embed(model, tmp_path)
    monkeypatch.undo()
    assert not list(tmp_path.glob("*.safetensors"))
    assert not embed(model, tmp_path).are_cached


def test_a_cache_that_cannot_be_written_to_is_left_alone(model, tmp_path, caplog):
    (tmp_path / "file").write_bytes(b"")
    with caplog.at_level(logging.WARNING):
        result = embed(model, tmp_path / "file" / "cache")
    assert not result.are_cached and "cannot be kept" in caplog.text
    assert_equal(result, embed(model, None))


def test_embeddings_that_are_not_finite_are_not_kept(model, tmp_path):
    with torch.no_grad():
        model.text_projection.weight[:] = torch.nan
    with pytest.raises(EvaluationError, match="the embedding of the prompt '.*' is not finite"):
        embed(model, tmp_path)
    assert not list(tmp_path.iterdir())


def test_an_evaluation_keeps_nothing_unless_asked(model, tmp_path, monkeypatch):
    """As during training: no hash, no file."""
    from evaluation_samples import TASK

    from evaluation_fvlm.tasks import Item, Task
    from evaluation_fvlm.zero_shot import evaluate_split

    monkeypatch.setattr(prompts, "cache_key", None)
    monkeypatch.setattr(prompts.constants, "HF_HOME", str(tmp_path))
    item = Item(TASK["items"][1]["finding"], "heart", ("Big.",), ("Not big.",))
    scores = evaluate_split(model, tiny_tokenizer(), tiny_dataset(), [Task("t", 1, "made up", (item,))])
    assert scores.frame["score"].notna().any() and not scores.prompts_are_cached and not list(tmp_path.iterdir())
