"""Captions in the published form: every text, flag and batch of the published data, wrong ports, and the default."""

import json

import pytest
from tiny_scan import tiny_tokenizer

from modeling_fvlm import FVLMConfig, captions
from modeling_fvlm.captions import compose_caption, encode_captions, is_abnormal_caption, normal_caption


@pytest.fixture(scope="module")
def golden(shared_dir):
    return json.loads((shared_dir / "golden" / "captions" / "outputs.json").read_text(encoding="utf-8"))


def entries(golden):
    """(scan, organ, impression or None, findings or None, published caption); None: no such entry in the file."""
    for scan, of_scan in golden["annotation"].items():
        for organ, expected in of_scan.items():
            impression, findings = (golden[name].get(scan, {}).get(organ) for name in ("conc_info", "desc_info"))
            yield scan, organ, impression, findings, expected


def composed(golden):
    """Our published captions, scan by scan."""
    texts = {}
    for scan, organ, impression, findings, _ in entries(golden):
        texts.setdefault(scan, {})[organ] = captions.compose_caption(organ, impression, findings, published=True)
    return texts


def test_every_caption_is_the_published_one(golden):
    assert composed(golden) == golden["annotation"]
    assert sum(len(of_scan) for of_scan in golden["annotation"].values()) == 16


def test_every_item_has_the_published_texts_and_flags(golden):
    items = golden["items"]
    assert [item["text_input"] for item in items] == list(composed(golden).values())
    for item in items:
        flags = [is_abnormal_caption(item["text_input"][organ], organ) for organ in golden["organs"]]
        assert flags == item["organ_abnormal_flags"]
    assert [sum(item["organ_abnormal_flags"]) for item in items] == [1, 1, 0, 1]


def test_a_batch_carries_the_published_texts_and_flags(golden):
    """Bare texts, as the published collater hands them on: the flags come from the beginning of each."""
    batch = [item["text_input"] for item in golden["items"]]
    encoded = encode_captions(batch, golden["organs"], tiny_tokenizer(), max_length=24)
    flags = [item["organ_abnormal_flags"] for item in golden["items"]]
    assert encoded["organ_is_abnormal"].tolist() == flags
    collated = golden["collated"]["text_input"]
    for column, organ in enumerate(golden["organs"]):
        for row, text in enumerate(collated[organ]):
            assert batch[row][organ] == text
            same = encoded["caption_hash"][row, column] == encoded["caption_hash"][1 - row, column]
            assert bool(same) == (text == collated[organ][1 - row])


def test_text_goes_to_the_tokenizer_as_it_is(golden):
    """The published text processor, which would add a Chinese full stop, is never called."""
    assert golden["text_processor_called_by_dataset"] is False
    assert all("。" in text for text in golden["text_processor_if_it_were_called"].values())
    assert not any("。" in text for of_scan in composed(golden).values() for text in of_scan.values())


def test_the_crop_is_the_published_one(golden):
    size = FVLMConfig().vision_config.volume_size
    assert list(size) == golden["RandSpatialCrop"]["roi_size"] and not golden["RandSpatialCrop"]["random_size"]
    for item in golden["items"]:
        assert item["image_shape"] == [1, *size] and item["seg_shape"] == list(size)
    assert golden["transforms"] == ["RandSpatialCropd", *["RandFlipd"] * 3, "ToTensord"], "the crop before three flips"


# Wrong ports: what they do to (organ, impression, findings), and the scan and organ that tell.


def cleaned(text):
    text = text.translate(str.maketrans("", "", "\"'()"))
    return text if text.endswith(".") else text + "."


def joined(organ, impression, findings):
    """The published form once more, from which each wrong port departs in one thing."""
    return (normal_caption(organ) if impression is None else cleaned(impression)) + cleaned(findings or "")[
        : None if findings is not None else 0
    ]


WRONG_PORTS = {
    "a space between the sections": (
        lambda o, i, f: " ".join(filter(None, [joined(o, i, None), f and cleaned(f)])),
        ("train_1_a", "heart"),
    ),
    "findings first": (lambda o, i, f: (cleaned(f) if f else "") + joined(o, i, None), ("train_1_a", "heart")),
    "no sentence in front of findings alone": (
        lambda o, i, f: cleaned(f) if i is None and f else joined(o, i, f),
        ("train_1_a", "lung"),
    ),
    "an empty impression is none": (lambda o, i, f: joined(o, i or None, f), ("train_4_a", "lung")),
    "apostrophes kept": (
        lambda o, i, f: joined(o, i, f).replace("Hearts", "Heart's"),
        ("train_1_a", "heart"),
    ),
    "white space at the end taken off": (
        lambda o, i, f: joined(o, i and i.strip(), f and f.strip()),
        ("train_2_a", "lung"),
    ),
}


@pytest.mark.parametrize("port", WRONG_PORTS)
def test_a_wrong_port_is_seen(golden, monkeypatch, port):
    wrong, (scan, organ) = WRONG_PORTS[port]
    monkeypatch.setattr(captions, "compose_caption", lambda o, i, f, published: wrong(o, i, f))
    assert composed(golden)[scan][organ] != golden["annotation"][scan][organ]


def test_the_wrong_ports_depart_from_a_right_one(golden, monkeypatch):
    monkeypatch.setattr(captions, "compose_caption", lambda o, i, f, published: joined(o, i, f))
    assert composed(golden) == golden["annotation"]


# Where the default departs


def test_by_default_an_empty_impression_says_nothing(golden):
    for scan, organ in (("train_4_a", "lung"),):
        assert golden["annotation"][scan][organ] == "." and is_abnormal_caption(".", organ)
        caption = compose_caption(organ, golden["conc_info"][scan][organ], None)
        assert caption == normal_caption(organ) and not is_abnormal_caption(caption, organ)


def test_by_default_sentences_stay_as_they_are(golden):
    default = {
        (scan, organ): compose_caption(organ, impression, findings)
        for scan, organ, impression, findings, _ in entries(golden)
    }
    assert default["train_1_a", "heart"] == "Cardiomegaly Heart's size is normal."
    assert default["train_1_a", "lung"] == 'Both lungs are "normal" (no nodule)', "no sentence in front"
    assert default["train_2_a", "lung"] == "Emphysema. Mild emphysema  in both   lungs."
    alone = [key for key, (*_, text) in zip(default, entries(golden)) if default[key] == text]
    assert alone and all(default[scan, organ] == normal_caption(organ) for scan, organ in alone)
