"""Captions: joined as designed, and batched without repeats; test_published_captions.py has the published form."""

import pytest
import torch
from transformers import BertTokenizerFast

from modeling_fvlm.captions import (
    caption_hash,
    compose_caption,
    compose_report,
    encode_captions,
    normal_caption,
    report_hash,
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
    names = {"input_ids", "attention_mask", "text_hash", "caption_index", "caption_hash", "organ_is_abnormal"}
    assert set(encoded) == names
    for row, captions in enumerate(batch):
        for column, organ in enumerate(ORGANS):
            value = caption_hash(*captions[organ]) if organ in captions else 0
            assert encoded["caption_hash"][row, column] == value
            if organ in captions:
                assert encoded["text_hash"][encoded["caption_index"][row, column]] == value
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
    assert encoded["text_hash"].tolist() == [0]


def test_reports_follow_the_captions_each_once(tokenizer):
    nodule, effusion = "small nodule .", "large effusion . lung shows no significant abnormalities ."
    batch = [{"lung": (nodule, True)}, {}, {}, {"heart": (nodule, True)}]
    alone = encode_captions(batch, ORGANS, tokenizer, max_length=32)
    encoded = encode_captions(batch, ORGANS, tokenizer, 32, reports=[effusion, "", nodule, effusion])
    assert encoded["report_index"].tolist() == [1, -1, 2, 1]
    hashes = [report_hash(effusion), 0, report_hash(nodule), report_hash(effusion)]
    assert encoded["report_hash"].tolist() == hashes and encoded["report_hash"].dtype == torch.int64
    # The caption and the report of patient 2 are the same words, and yet two texts.
    assert encoded["text_hash"].tolist() == [caption_hash(nodule, True), *hashes[:1], *hashes[2:3]]
    assert len(set(encoded["text_hash"].tolist())) == 3
    expected = tokenizer([nodule, effusion, nodule], padding=True)
    for name in ("input_ids", "attention_mask"):
        assert encoded[name].tolist() == expected[name]
    for name in ("caption_index", "caption_hash", "organ_is_abnormal"):
        assert torch.equal(encoded[name], alone[name])
    with pytest.raises(ValueError, match="4 scans came with 3 reports"):
        encode_captions(batch, ORGANS, tokenizer, 32, reports=[nodule] * 3)
    only_empty = encode_captions([{}], ORGANS, tokenizer, 32, reports=[""])
    assert only_empty["report_index"].tolist() == [-1] and only_empty["text_hash"].tolist() == [0]


@pytest.mark.parametrize("lengths", [(6, 9), (9, 6), (6, 6)])
def test_reports_have_a_limit_of_their_own(tokenizer, lengths):
    long = " ".join(["small", "large"] * 40)
    batch = [{"lung": (long, True)}, {"lung": ("nodule", True)}]
    encoded = encode_captions(batch, ORGANS, tokenizer, lengths[0], ["nodule", long], max_report_length=lengths[1])
    assert encoded["attention_mask"].sum(1).tolist() == [lengths[0], 3, 3, lengths[1]]
    assert encoded["input_ids"].shape == (4, max(lengths))
    plain = encode_captions(batch, ORGANS, tokenizer, lengths[0])["input_ids"]
    assert encoded["input_ids"][:2, : lengths[0]].tolist() == plain.tolist()
    assert not encoded["input_ids"][encoded["attention_mask"] == 0].any(), "padding is [PAD]"


def test_a_report_is_impression_before_findings():
    assert compose_report("Emphysema. ", " A small nodule.") == "Emphysema. A small nodule."
    assert compose_report("", "A small nodule.") == "A small nodule." and compose_report(None, " ") == ""


def test_a_caption_that_is_none_or_of_an_unknown_organ_is_refused(tokenizer):
    for entry in (None, 3, ("Nodule.",), (None, True)):
        with pytest.raises(ValueError, match=r"scan 0: that of 'lung' is .*; give a text"):
            encode_captions([{"lung": entry}], ["lung"], tokenizer, 32)
    with pytest.raises(ValueError, match="scan 1: organ 'lungs' is not in config.organs"):
        encode_captions([{}, {"lungs": ("nodule", True)}], ORGANS, tokenizer, 32)
