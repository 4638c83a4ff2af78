"""Captions: joined as designed, and batched without repeats; test_published_captions.py has the published form."""

import pytest
import torch
from transformers import BertTokenizerFast

from modeling_fvlm.captions import (
    caption_hash,
    compose_caption,
    encode_captions,
    normal_caption,
    strip_normal_prefix,
)

ORGANS = ["lung", "heart", "aorta"]
WORDS = [
    "lung",
    "heart",
    "aorta",
    "shows",
    "no",
    "significant",
    "abnormalities",
    ".",
    "nodule",
    "emphysema",
    "effusion",
    "small",
    "large",
    "cardiomegaly",
]


@pytest.fixture(scope="module")
def tokenizer():
    vocab = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    return BertTokenizerFast(vocab={word: index for index, word in enumerate(vocab)})


def test_impression_comes_before_findings():
    caption = compose_caption("lung", ["Emphysema."], ["A small nodule. ", "No effusion."])
    assert caption == "Emphysema. A small nodule. No effusion."
    assert compose_caption("lung", None, "No effusion.") == "No effusion."
    assert compose_caption("lung", "Emphysema.", []) == "Emphysema."


@pytest.mark.parametrize("nothing", [None, "", "  ", [], [""], ["", " "]])
def test_nothing_said_gives_the_normal_sentence(nothing):
    assert compose_caption("heart", nothing, nothing) == "heart shows no significant abnormalities."


def test_the_normal_sentence_is_stripped_unless_alone():
    normal = normal_caption("lung")
    assert strip_normal_prefix(normal, "lung") == normal
    assert strip_normal_prefix(normal + "Both lungs are normal.", "lung") == "Both lungs are normal."
    assert strip_normal_prefix(f"{normal} Seen. {normal}", "lung") == "Seen."  # every occurrence, as published
    assert strip_normal_prefix(normal + normal, "lung") == normal + normal
    assert strip_normal_prefix(normal, "heart") == normal
    assert strip_normal_prefix(".", "lung") == "."


def test_hashes_are_equal_iff_captions_are_and_in_every_process():
    keys = [(text, flag) for text in ("Emphysema.", "emphysema.", "Emphysema. ", "") for flag in (True, False)]
    hashes = [caption_hash(*key) for key in keys]
    assert len(set(hashes)) == len(keys) and all(-(2**63) <= value < 2**63 for value in hashes)
    assert hashes == [caption_hash(*key) for key in keys]
    # A fixed number: another process, machine or release must give the same one.
    assert caption_hash("Emphysema.", True) == 4279422953443337856
    assert torch.tensor(hashes).tolist() == hashes, "they fit int64"


def test_a_batch_encodes_each_caption_once(tokenizer):
    batch = [
        {"lung": ("emphysema .", True), "heart": (normal_caption("heart"), False)},
        {"lung": ("emphysema .", False), "heart": (normal_caption("heart"), False), "aorta": ("small nodule .", True)},
        {"lung": ("emphysema .", True)},
        {},
    ]
    encoded = encode_captions(batch, ORGANS, tokenizer, max_length=32)
    assert encoded["caption_index"].tolist() == [[0, 1, -1], [2, 1, 3], [0, -1, -1], [-1, -1, -1]]
    assert encoded["organ_is_abnormal"].tolist() == [
        [True, False, False],
        [False, False, True],
        [True, False, False],
        [False] * 3,
    ]
    expected = tokenizer(["emphysema .", normal_caption("heart"), "emphysema .", "small nodule ."], padding=True)
    assert encoded["input_ids"].tolist() == expected["input_ids"]
    assert encoded["attention_mask"].tolist() == expected["attention_mask"]
    assert set(encoded) == {"input_ids", "attention_mask", "caption_index", "caption_hash", "organ_is_abnormal"}
    for row, captions in enumerate(batch):
        for column, organ in enumerate(ORGANS):
            value = caption_hash(*captions[organ]) if organ in captions else 0
            assert encoded["caption_hash"][row, column] == value
    for name in ("caption_index", "caption_hash", "input_ids"):
        assert encoded[name].dtype == torch.int64


def test_plain_texts_follow_the_published_rule(tokenizer):
    stripped = normal_caption("lung") + "small nodule ."
    encoded = encode_captions(
        [{"lung": stripped, "heart": "cardiomegaly ."}, {"lung": "small nodule ."}], ORGANS, tokenizer, 32
    )
    assert encoded["organ_is_abnormal"].tolist() == [[False, True, False], [True, False, False]]
    # The text encoder reads the same words for both lungs, yet they are not equal captions.
    assert encoded["input_ids"][0].tolist() == encoded["input_ids"][2].tolist()
    assert encoded["caption_hash"][0, 0] != encoded["caption_hash"][1, 0]


def test_padding_is_to_the_longest_and_cut_at_the_limit(tokenizer):
    long = " ".join(["small", "large"] * 40)
    assert encode_captions([{"lung": (long, True)}], ORGANS, tokenizer, 20)["input_ids"].shape == (1, 20)
    cut = encode_captions([{"lung": (long, True)}], ORGANS, tokenizer, 20)["input_ids"][0]
    assert cut[1:19].tolist() == tokenizer("small large " * 9, add_special_tokens=False)["input_ids"], "the tail is cut"
    assert encode_captions([{"lung": ("nodule", True)}], ORGANS, tokenizer, 20)["input_ids"].shape == (1, 3)


def test_a_batch_without_captions_still_has_one_text(tokenizer):
    encoded = encode_captions([{}, {}], ORGANS, tokenizer, 32)
    assert encoded["input_ids"].shape[0] == 1 and encoded["attention_mask"].any()
    assert (encoded["caption_index"] == -1).all() and encoded["caption_index"].shape == (2, 3)


def test_a_caption_of_an_unknown_organ_is_refused(tokenizer):
    with pytest.raises(ValueError, match="scan 1: organ 'lungs' is not in config.organs"):
        encode_captions([{}, {"lungs": ("nodule", True)}], ORGANS, tokenizer, 32)
