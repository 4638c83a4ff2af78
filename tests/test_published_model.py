"""FVLMModel against the published implementation: its weights and inputs, its losses, embeddings and gradients.

The outputs in ../shared/golden were made by alibaba-damo-academy/fvlm d768ec1 (and, for the 24 organs with their
100-voxel rule, gktpmuhammed/fvlm 169f6fa) on CPU, dropout off. Tolerances are those of golden/README.md.
"""

import copy
import json
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import BertTokenizer

from modeling_fvlm import FVLMConfig, FVLMModel, encode_captions
from modeling_fvlm.modeling_fvlm import organ_occupancy
from training_fvlm.published_weights import convert_published_state_dict, to_published_state_dict

CASES = ["tiny-train", "tiny-train-24", pytest.param("tiny-train-fullgrid", marks=pytest.mark.slow)]
LEVELS_AFTER = [4, 7, 10, 12]  # hidden_states after blocks 3, 6, 9, and the normed last


@dataclass
class Golden:
    name: str
    config: FVLMConfig
    weights: dict
    inputs: dict  # of FVLMModel.forward
    outputs: dict
    tensors: dict
    grads: dict


@pytest.fixture(scope="module", params=CASES)
def golden(request, shared_dir) -> Golden:
    return load_golden(shared_dir / "golden", request.param)


def load_golden(root, name) -> Golden:
    folder = root / name
    published = json.loads((folder / "config.json").read_text())
    texts = json.loads((folder / "texts.json").read_text())
    if (folder / "inputs.npz").exists():
        arrays = {key: torch.from_numpy(array) for key, array in np.load(folder / "inputs.npz").items()}
    else:
        arrays = load_file(folder / "inputs.safetensors")
    vit, text, organs = published["vit"], published["text"], published["organs"]
    is_fork = name == "tiny-train-24"
    config = FVLMConfig(
        organs=organs,
        vision_config={
            "volume_size": vit["img_size_for_pos_embed"],
            "patch_size": vit["patch_size"],
            "hidden_size": vit["hidden_size"],
            "intermediate_size": vit["mlp_dim"],
            "num_hidden_layers": vit["num_layers"],
            "num_attention_heads": vit["num_heads"],
            "layer_norm_eps": vit["layer_norm_eps"],
        },
        text_config={key: value for key, value in text.items() if key not in ("add_type_embeddings", "do_lower_case")},
        text_token_types=text["add_type_embeddings"],
        max_text_length=published["max_txt_len"],
        pooling_num_heads=published["roi_attention_heads"],
        completeness="min_voxels" if is_fork else "border",
        min_organ_voxels=100 if is_fork else 1,
    )
    vocabulary = texts.get("vocab") or json.loads((root / "tiny-train" / "texts.json").read_text())["vocab"]
    tokenizer = BertTokenizer(vocab={word: index for index, word in enumerate(vocabulary)}, do_lower_case=True)
    is_abnormal = arrays["organ_abnormal_flags"]
    captions = [
        {organ: (texts["captions"][organ][patient], bool(is_abnormal[patient, i])) for i, organ in enumerate(organs)}
        for patient in range(len(is_abnormal))
    ]
    inputs = encode_captions(captions, organs, tokenizer, config.max_text_length)
    inputs["pixel_values"] = arrays["image_u8"].float() / 255
    inputs["organ_mask"] = arrays["seg_u8"]
    assert torch.equal(inputs["organ_is_abnormal"], is_abnormal)
    return Golden(
        name,
        config,
        load_file(folder / "weights.safetensors"),
        inputs,
        json.loads((folder / "outputs.json").read_text()),
        load_file(folder / "outputs.safetensors"),
        load_file(folder / "grads.safetensors"),
    )


@pytest.fixture(scope="module")
def model(golden) -> FVLMModel:
    model = FVLMModel(golden.config)
    model.load_state_dict(convert_published_state_dict(golden.weights, golden.config), strict=True)
    return model.eval()


@pytest.fixture(scope="module")
def output(golden, model):
    output = model(**golden.inputs, output_hidden_states=True)
    output.loss.backward()
    return output


def test_captions_reach_the_tokenizer_as_published(golden):
    compared = 0
    for organ, entry in golden.outputs["per_organ"].items():
        index = golden.inputs["caption_index"][entry["patient_ids"], golden.config.organs.index(organ)]
        ids, mask = golden.inputs["input_ids"][index], golden.inputs["attention_mask"][index]
        published_ids, published_mask = golden.tensors[f"{organ}.input_ids"], golden.tensors[f"{organ}.attention_mask"]
        length = ids.shape[1]
        assert torch.equal(ids, published_ids[:, :length]) and torch.equal(mask, published_mask[:, :length])
        assert not published_mask[:, length:].any()
        compared += len(ids)
    assert compared > 6


def test_hidden_levels_are_the_published(golden, output):
    assert len(output.hidden_states) == 13
    for level, place in enumerate(LEVELS_AFTER):
        hidden = output.hidden_states[place]
        expected = {
            "all_tokens_first4channels": hidden[..., :4],
            "first3tokens_all_channels": hidden[:, :3],
            "mean_over_tokens": hidden.mean(1),
        }
        for kind, ours in expected.items():
            torch.testing.assert_close(ours, golden.tensors[f"hidden.{level}.{kind}"], rtol=0, atol=1e-4)


def test_occupancy_and_completeness_are_the_published(golden, output):
    patch_size = golden.config.vision_config.patch_size
    counts, _ = organ_occupancy(golden.inputs["organ_mask"], len(golden.config.organs), patch_size)
    is_complete = golden.tensors["organ_mask_flags"]
    assert torch.equal(output.organ_is_complete, is_complete)
    # The published code wipes the tokens of incomplete organs; ours keep them, for they can still be embedded.
    assert torch.equal((counts > 0) & is_complete[..., None], golden.tensors["organ_token_flags"])


def test_losses_and_embeddings_are_the_published(golden, output):
    per_organ = golden.outputs["per_organ"]
    assert sum(not entry["skipped_at_unique_check"] for entry in per_organ.values()) >= 2
    for index, organ in enumerate(golden.config.organs):
        entry = per_organ.get(organ)
        if entry is None or entry["skipped_at_unique_check"]:
            assert not output.organ_is_active[index] and output.organ_losses[index] == 0
        else:
            assert output.organ_is_active[index] and output.num_contrasted[index] == len(entry["patient_ids"])
            assert output.organ_losses[index].item() == pytest.approx(entry["loss"], rel=1e-5)
        if entry is not None:
            patients = entry["patient_ids"]
            text_embeds = output.text_embeds[golden.inputs["caption_index"][patients, index]]
            for kind, ours in (("image_feat", output.image_embeds[patients, index]), ("text_feat", text_embeds)):
                torch.testing.assert_close(ours, golden.tensors[f"{organ}.{kind}"], rtol=0, atol=1e-5)
    assert output.loss.item() == pytest.approx(golden.outputs["loss"], rel=1e-5)


def test_every_gradient_is_the_published(golden, model, output):
    ours = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert all(grad is not None for grad in ours.values()), "a parameter outside the graph stops DDP"
    ours = to_published_state_dict(ours)
    compared = 0
    for name, expected in golden.grads.items():
        if expected.norm() < 1e-4:  # attention key biases: zero in theory
            continue
        error = (ours[name] - expected).abs().max() / expected.norm()
        assert error < 1e-4, f"{name}: {error:.1e} of the gradient's norm"
        compared += 1
    assert compared > 150
    for name in ours.keys() - golden.grads.keys():  # organs that never entered
        assert name.startswith("vision_projs.") and not ours[name].any()


def test_eager_attention_gives_the_published_loss(golden, model):
    model.set_attn_implementation("eager")
    with torch.no_grad():
        loss = model(**golden.inputs).loss
    model.set_attn_implementation("sdpa")
    assert loss.item() == pytest.approx(golden.outputs["loss"], rel=1e-5)


def test_conversion_round_trip_is_exact(golden, model):
    published = to_published_state_dict(model.state_dict())
    left_behind = golden.weights.keys() - published.keys()
    assert all(name.startswith("text_encoder.cls.") or name.endswith(".position_ids") for name in left_behind)
    assert published.keys() <= golden.weights.keys()
    for name, tensor in published.items():
        assert torch.equal(tensor, golden.weights[name]), name
    again = convert_published_state_dict(published, golden.config)
    assert again.keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, again[name]) for name, tensor in model.state_dict().items())


def test_conversion_refuses_what_it_does_not_know(golden):
    with pytest.raises(ValueError, match="momentum_encoder.weight: no parameter of a published"):
        convert_published_state_dict({**golden.weights, "momentum_encoder.weight": torch.zeros(1)}, golden.config)
    fewer = {name: tensor for name, tensor in golden.weights.items() if not name.startswith("vision_projs.1.")}
    with pytest.raises(ValueError, match="Give the organs the checkpoint was trained on"):
        convert_published_state_dict(fewer, golden.config)


def test_a_saved_token_type_table_is_never_added(golden, model, output):
    """Newer releases save one all the same. Without a table, or with ours (zeros), captions embed alike."""
    width = golden.config.text_config.hidden_size
    saved = {**golden.weights, "text_encoder.embeddings.token_type_embeddings.weight": torch.ones(2, width)}
    assert convert_published_state_dict(saved, golden.config).keys() == model.state_dict().keys()

    with_table = copy.deepcopy(golden.config)
    with_table.text_token_types = True
    other = FVLMModel(with_table).eval()
    other.load_state_dict(convert_published_state_dict(saved, with_table), strict=True)
    captions = golden.inputs["input_ids"], golden.inputs["attention_mask"]
    torch.testing.assert_close(other.get_text_features(*captions), output.text_embeds, rtol=0, atol=1e-6)
