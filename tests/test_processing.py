"""FVLMProcessor: scans, captions and text in one call, and the same after saving and loading."""

import pytest
import torch
from tiny_scan import tiny_config, tiny_tokenizer, write_scan
from transformers import AutoProcessor

from modeling_fvlm import FVLMImageProcessor, FVLMModel, FVLMProcessor

CAPTIONS = {"lung": ("emphysema .", True), "heart": ("heart shows no significant abnormalities .", False)}


@pytest.fixture(scope="module")
def processor():
    return FVLMProcessor.from_config(tiny_config(), tiny_tokenizer())


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    return write_scan(tmp_path_factory.mktemp("scan"))


def test_scans_and_captions_are_a_training_batch(processor, paths):
    features = processor(
        volumes=[paths[0]] * 2, masks=[paths[1]] * 2, captions=[CAPTIONS, {"heart": ("cardiomegaly", True)}]
    )
    alone = processor.image_processor([paths[0]] * 2, [paths[1]] * 2)
    assert all(torch.equal(features[name], alone[name]) for name in alone)
    assert features["caption_index"].tolist() == [[0, 1, -1, -1], [-1, 2, -1, -1]]
    assert set(features) == set(processor.model_input_names)
    model = FVLMModel(tiny_config())
    output = model(**features)
    assert output.loss.requires_grad and output.num_contrasted.tolist() == [0, 2, 0, 0], "the lung is cut by the crop"
    assert output.loss > 0


def test_volume_options_reach_the_image_processor(processor, paths):
    features = processor(*paths, captions=CAPTIONS, window=False, center="aorta")
    alone = processor.image_processor(*paths, window=False, center="aorta")
    assert "volume" in features and all(torch.equal(features[name], alone[name]) for name in alone)


def test_captions_and_text_alone(processor):
    captions = processor(captions=CAPTIONS)
    assert captions["caption_index"].tolist() == [[0, 1, -1, -1]] and "organ_mask" not in captions
    text = processor(text=["emphysema .", "not emphysema ."])
    assert set(text) == {"input_ids", "attention_mask"} and text["attention_mask"].sum(1).tolist() == [4, 5]
    assert processor(text="emphysema .")["input_ids"].tolist() == text["input_ids"][:1, :4].tolist()
    assert processor(text="nodule " * 100)["input_ids"].shape == (1, 24), "cut at max_text_length"


def test_wrong_calls_say_what_is_meant(processor, paths):
    with pytest.raises(ValueError, match="nothing to process"):
        processor()
    with pytest.raises(ValueError, match="give captions .* or text .*not both"):
        processor(captions=CAPTIONS, text="emphysema")
    with pytest.raises(ValueError, match="1 scans came with 2 dicts of captions"):
        processor(*paths, captions=[CAPTIONS, CAPTIONS])
    with pytest.raises(ValueError, match=r"\['masks'\] came without volumes"):
        processor(masks=paths[1], text="emphysema")
    with pytest.raises(ValueError, match=r"\['center'\] came without volumes"):
        processor(captions=CAPTIONS, center="heart")
    with pytest.raises(ValueError, match="torch tensors only"):
        processor(text="emphysema", return_tensors="np")
    with pytest.raises(ValueError, match="masks is missing"):
        processor(volumes=paths[0])
    with pytest.raises(ValueError, match="are not those of the image processor"):
        FVLMProcessor(FVLMImageProcessor.from_config(tiny_config()), tiny_tokenizer(), organs=["aorta", "lung"])


def test_saved_and_loaded_it_is_the_same(processor, paths, tmp_path):
    processor.save_pretrained(tmp_path)
    for loaded in (
        FVLMProcessor.from_pretrained(tmp_path),
        AutoProcessor.from_pretrained(tmp_path, trust_remote_code=True),
    ):
        assert type(loaded).__name__ == "FVLMProcessor"
        assert loaded.organs == processor.organs and loaded.max_text_length == 24
        assert loaded.image_processor.to_dict() == processor.image_processor.to_dict()
        expected, features = processor(*paths, captions=CAPTIONS), loaded(*paths, captions=CAPTIONS)
        assert expected.keys() == features.keys()
        assert all(torch.equal(expected[name], features[name]) for name in expected)
