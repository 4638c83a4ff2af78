"""`--init_from` with another organ set: who keeps query and projection, and whose a new organ takes."""

import json
import logging
import re

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from test_init_from import description, start_from
from test_published_model import load_golden
from tiny_split import ORGANS, TINY_RECIPE, tiny_row, write_tiny_split
from tiny_training import dataset_of, tiny_model, tiny_rows

import train_fvlm
from modeling_fvlm import FVLMConfig, FVLMModel, FVLMProcessor, load_organ_set
from modeling_fvlm.organs import STRUCTURE_NAMES
from modeling_fvlm.pipeline_fvlm import save_for_hub
from modeling_fvlm.processed_split import decode_volume, encode_array
from training_fvlm import convert
from training_fvlm.arguments import SettingsError
from training_fvlm.build import build_model
from training_fvlm.data import SplitDescription
from training_fvlm.organ_origins import Origin, _level_of_class, measure_centres, organ_origins
from training_fvlm.start import read_start

CHEST_4, BODY_24, BODY_36 = (load_organ_set(name) for name in ("chest_4", "body_24", "body_36"))


# The rules


def sources(origins: list[Origin]) -> dict[str, str | None]:
    return {origin.organ: origin.source for origin in origins}


def test_a_name_decides_first_then_classes_then_centres_then_levels():
    old = {"lung": ["lung_upper_lobe_left", "lung_upper_lobe_right"], "heart": ["heart"], "aorta": ["aorta"]}
    new = {
        "aorta": {"totalsegmentator_v2": ["aorta"]},
        "left_lung": {"totalsegmentator_v1": ["lung_upper_lobe_left"], "totalsegmentator_v2": []},
        "heart": ["trachea"],  # other classes, the same name
        "kidney": ["kidney_left"],  # 20 mm from the aorta, 4 mm from the heart
        "spleen": ["spleen"],  # in no scan
        "tumour": None,  # in no scan, and of no class
    }
    centres = np.full((2, 6, 3), np.nan)
    centres[0, [0, 2, 3]] = (0, 0, 0), (0, 16, 0), (0, 20, 0)
    centres[1, [0, 3]] = (0, 0, 0), (0, 20, 0)
    origins = organ_origins(old, new, lambda: centres)
    assert sources(origins) == {
        **{"aorta": "aorta", "left_lung": "lung", "heart": "heart", "kidney": "heart"},
        **{"spleen": "aorta", "tumour": None},
    }
    assert [origin.organ for origin in origins if origin.is_kept] == ["aorta", "heart"]
    reasons = {origin.organ: origin.reason for origin in origins}
    assert reasons["left_lung"] == "1 of 1 TotalSegmentator classes in common"
    assert reasons["kidney"] == "centres 4 mm apart in 1 scans"
    assert reasons["spleen"] == "1.0 vertebrae apart by the table of levels"
    assert str(origins[-1]) == "tumour from fresh weights (nothing tells where it lies)"


def test_of_two_organs_with_common_classes_the_nearer_in_kind_is_taken():
    old = {"thorax": ["lung_upper_lobe_left", "heart", "aorta", "trachea"], "lung": ["lung_upper_lobe_left"]}
    assert sources(organ_origins(old, {"apex": ["lung_upper_lobe_left"]})) == {"apex": "lung"}


def test_an_old_organ_of_another_name_is_measured_where_its_classes_lie():
    old = {"lungs": ["lung_upper_lobe_left"], "heart": ["heart"]}
    new = {"lung": ["lung_upper_lobe_left"], "heart": ["heart"], "liver": ["liver"]}
    centres = np.array([[(0, 0, 0), (0, 0, 90), (10, 0, 0)]], float)
    assert sources(organ_origins(old, new, lambda: centres)) == {"lung": "lungs", "heart": "heart", "liver": "lungs"}


def test_nothing_is_measured_where_names_and_classes_decide():
    def never():
        raise AssertionError("masks were read")

    assert sources(organ_origins(BODY_24.classes, CHEST_4.classes, never)) == {organ: organ for organ in CHEST_4.organs}
    sides = {"lung_left": ["lung_upper_lobe_left"], "lung_right": ["lung_upper_lobe_right"]}
    assert set(sources(organ_origins(CHEST_4.classes, sides, never)).values()) == {"lung"}


def test_without_a_common_organ_the_table_of_levels_decides_for_every_structure():
    assert all(_level_of_class(name) is not None for name in STRUCTURE_NAMES)
    found = sources(organ_origins(BODY_24.classes, BODY_36.classes))
    assert {organ: found[organ] for organ in BODY_24.organs} == {organ: organ for organ in BODY_24.organs}
    assert found["duodenum"] == "kidney" and found["small_bowel"] == "colon" and found["thoracic_vertebrae"] == "rib"
    assert None not in sources(organ_origins(CHEST_4.classes, BODY_36.classes)).values()


def test_centres_are_those_of_a_walk_over_the_voxels():
    rows, spacing = tiny_rows(5), (3.0, 1.0, 0.5)
    mask = np.zeros((8, 18, 36), np.uint8)
    mask[1:3, 4:7, 2:9] = 2  # one organ of three
    rows[3] |= {"mask": encode_array(mask), "volume": encode_array(mask.astype(np.int16)), "shape": list(mask.shape)}
    centres = measure_centres(dataset_of(rows), len(ORGANS), spacing, num_scans=99)
    assert centres.shape == (5, 3, 3) and np.isnan(centres[3, [0, 2]]).all()
    for row, of_scan in zip(rows, centres):
        _, mask = decode_volume(row)
        for index, centre in enumerate(of_scan):
            if np.isfinite(centre).all():
                voxels = np.argwhere(mask == index + 1)
                assert len(voxels) and centre == pytest.approx(voxels.mean(0) * spacing, abs=1e-9)
    some = measure_centres(dataset_of(rows), len(ORGANS), spacing, num_scans=2)
    np.testing.assert_array_equal(some, centres[[0, 4]])


def test_large_masks_are_thinned_out_and_the_centres_stay():
    mask = np.zeros((300, 12, 700), np.uint8)
    mask[100:260, 3:9, 40:640], mask[20:60, 2:4, 100:300] = 1, 2
    row = tiny_row(0) | {"mask": encode_array(mask), "volume": encode_array(mask.astype(np.int16))}
    row["shape"] = list(mask.shape)
    (centres,) = measure_centres(dataset_of([row]), 2, (1.0, 2.0, 1.0))
    assert np.abs(centres - [(179.5, 11, 339.5), (39.5, 5, 199.5)]).max() < 3


# Weights


def split_of(organ_set) -> SplitDescription:
    return SplitDescription(organ_set.name, organ_set.organs, organ_set.classes, (3.0, 1.0, 1.0), (5, 20, 20))


def body_row(number: int) -> dict:
    """A scan with boxes for the organs of body_24, from head to thigh; the kidneys beside the aorta."""
    generator = np.random.default_rng(number)
    mask = np.zeros((52, 12, 40), np.uint8)
    for index in range(len(BODY_24.organs)):
        depth = 49 - 2 * index + int(generator.integers(0, 2))
        mask[depth - 1 : depth + 1, 2:8, 3 + index : 6 + index] = index + 1
    aorta = BODY_24.organs.index("aorta") + 1
    depth, height, width = (int(coordinates.mean()) for coordinates in np.nonzero(mask == aorta))
    mask[mask == BODY_24.organs.index("kidney") + 1] = 0
    mask[depth - 1 : depth + 1, height, width + 2] = BODY_24.organs.index("kidney") + 1
    captions = [
        {"organ": organ, "caption": f"{organ} is here.", "is_abnormal": False, "is_mentioned": True}
        for organ in BODY_24.organs
    ]
    arrays = {"mask": encode_array(mask), "volume": encode_array(mask.astype(np.int16)), "shape": list(mask.shape)}
    return tiny_row(number) | arrays | {"captions": captions}


@pytest.fixture(scope="module")
def converted(shared_dir, tmp_path_factory):
    """The published tiny model of chest_4, converted, and its batch and outputs."""
    golden, folder = load_golden(shared_dir / "golden", "tiny-train"), tmp_path_factory.mktemp("converted")
    texts = json.loads((shared_dir / "golden" / "tiny-train" / "texts.json").read_text())
    (folder / "vocab.txt").write_text("\n".join(texts["vocab"]))
    torch.save({"model": golden.weights}, folder / "fvlm.pth")
    heads = ["--vision_heads", "4", "--text_heads", "4", "--max_text_length", "48"]
    files = ["--weights", str(folder / "fvlm.pth"), "--vocab", str(folder / "vocab.txt"), "--out", str(folder / "m")]
    assert convert.main([*files, *heads]) == 0
    return golden, folder / "m"


def started(folder, organ_set, rows, section=None) -> tuple[FVLMModel, list[Origin]]:
    split = split_of(organ_set)
    start = read_start(str(folder), section or {}, split)
    model, processor = build_model(section or {}, split, dataset_of(rows), window_volumes=2, start=start)
    assert processor.organs == model.config.organs == list(organ_set.organs)
    return model, start.origins


def test_published_chest_weights_start_a_body_model(converted, tmp_path, caplog):
    golden, folder = converted
    rows = [body_row(number) for number in range(3)]
    with caplog.at_level(logging.WARNING):
        model, origins = started(folder, BODY_24, rows)
    assert model.config.organ_set == "body_24" and model.config.organ_classes == BODY_24.classes
    said = caplog.text
    assert "4 of the model's 4 organs are of the split and keep query and projection: esophagus, lung, heart" in said
    assert re.search(r"new organ: kidney from aorta \(centres [2-5] mm apart in 3 scans\)", said)
    assert "are dropped" not in said
    took = sources(origins)
    assert {organ for organ, source in took.items() if organ == source} == set(CHEST_4.organs)
    assert took["kidney"] == "aorta" and set(took.values()) <= set(CHEST_4.organs)

    # Every tensor: an organ's are its source's, all others are the folder's.
    old, new = load_file(folder / "model.safetensors"), model.state_dict()
    shared = [name for name in old if not name.startswith("organ_projection.") and "query_tokens" not in name]
    assert len(shared) > 50 and all(torch.equal(new[name], old[name]) for name in shared)
    names = {name for name in new if name.startswith("organ_projection.")}
    assert names == {f"organ_projection.{kind}_{index}" for kind in ("weight", "bias") for index in range(24)}
    queries = "organ_pooling.query_tokens"
    assert new[queries].shape[0] == 24 and old[queries].shape[0] == 4
    for index, organ in enumerate(BODY_24.organs):
        place = CHEST_4.organs.index(took[organ])
        assert torch.equal(new[queries][index], old[queries][place])
        for kind in ("weight", "bias"):
            assert torch.equal(new[f"organ_projection.{kind}_{index}"], old[f"organ_projection.{kind}_{place}"])
    assert not torch.equal(old[queries][0], old[queries][1]), "organs that are alike would compare nothing"

    # Outputs: those of the published code for the organs that stayed.
    places = torch.tensor([BODY_24.organs.index(organ) for organ in CHEST_4.organs])
    table = torch.cat([torch.zeros(1, dtype=torch.long), places + 1])
    inputs = {"pixel_values": golden.inputs["pixel_values"], "organ_mask": table[golden.inputs["organ_mask"].long()]}
    with torch.no_grad():
        here = model.eval().get_organ_features(**inputs)
        reference = FVLMModel.from_pretrained(folder).eval()
        there = reference.get_organ_features(inputs["pixel_values"], golden.inputs["organ_mask"])
    assert torch.equal(here.organ_is_complete[:, places], there.organ_is_complete) and there.organ_is_complete.any()
    torch.testing.assert_close(here.image_embeds[:, places], there.image_embeds, rtol=1e-5, atol=1e-6)

    # Saved, it is a model as any other.
    model.save_pretrained(tmp_path / "saved")
    again = FVLMModel.from_pretrained(tmp_path / "saved")
    assert all(torch.equal(value, new[name]) for name, value in again.state_dict().items())


def test_a_body_model_starts_a_chest_model(converted, tmp_path, caplog):
    golden, folder = converted
    body, _ = started(folder, BODY_24, [body_row(number) for number in range(2)])
    with torch.no_grad():  # every organ other than its source
        for parameter in body.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(5)), alpha=0.01)
    tokenizer = FVLMProcessor.from_pretrained(folder).tokenizer
    save_for_hub(body, FVLMProcessor.from_config(body.config, tokenizer), tmp_path / "body")
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        chest, origins = started(tmp_path / "body", CHEST_4, tiny_rows(2))
    assert all(origin.is_kept for origin in origins) and len(origins) == 4
    assert "4 of the model's 24 organs are of the split" in caplog.text and "new organ" not in caplog.text
    assert "organs that the split lacks are dropped: face, brain, trachea, kidney" in caplog.text
    for index, organ in enumerate(CHEST_4.organs):
        place = BODY_24.organs.index(organ)
        assert torch.equal(chest.organ_pooling.query_tokens[index], body.organ_pooling.query_tokens[place])
        pairs = zip(chest.organ_projection.organ_parameters()[index], body.organ_projection.organ_parameters()[place])
        assert all(torch.equal(one, other) for one, other in pairs)
    weights = body.state_dict()
    for name, value in chest.state_dict().items():
        if not name.startswith("organ_"):
            assert torch.equal(value, weights[name]), name


def test_learned_variances_go_with_their_organs(tmp_path):
    model, processor = tiny_model(tiny_rows(6), organ_reduction="uncertainty")
    with torch.no_grad():
        model.organ_variances.log_variances.copy_(torch.tensor([0.1, 0.2, 0.3]))
    save_for_hub(model, processor, tmp_path / "saved")
    split = description(organs=("aorta", "spleen", "lung"))
    there, _ = start_from(tmp_path / "saved", {"organ_reduction": "uncertainty"}, split)
    assert there.organ_variances.log_variances.tolist() == pytest.approx([0.3, 0.3, 0.1])
    plain, _ = start_from(tmp_path / "saved", {"organ_reduction": "mean"}, split)
    assert not hasattr(plain, "organ_variances")


def test_a_global_branch_may_be_added_and_not_exchanged(tmp_path, caplog):
    model, processor = tiny_model(tiny_rows(6))
    save_for_hub(model, processor, tmp_path / "saved")
    torch.manual_seed(3)
    with caplog.at_level(logging.WARNING):
        there, _ = start_from(tmp_path / "saved", {"volume_pooling": "attention"})
    assert "has no global branch: model.volume_pooling starts afresh" in caplog.text
    weights = model.state_dict()
    fresh = {name for name in there.state_dict() if name not in weights}
    assert {name.split(".")[0] for name in fresh} == {"volume_pooling", "volume_projection"}
    assert all(torch.equal(value, weights[name]) for name, value in there.state_dict().items() if name in weights)
    assert 0 < there.volume_projection.weight.std() < 0.1 and not there.volume_pooling.query_tokens.any()
    save_for_hub(there, processor, tmp_path / "global")
    for asked in ("mean", "none"):
        with pytest.raises(SettingsError, match=f"model.volume_pooling: '{asked}' here, 'attention' in --init_from"):
            start_from(tmp_path / "global", {"volume_pooling": asked})


# The command


def test_the_command_trains_on_other_organs_and_says_which_took_which(tmp_path, caplog):
    rows = tiny_rows(6)
    model, processor = tiny_model(rows, seed=3)
    save_for_hub(model, processor, tmp_path / "saved")
    renamed = {"lung": "spleen", "heart": "heart", "aorta": "lung"}
    train = [tiny_row(number) for number in range(12)]
    for row in train:
        row["captions"] = [entry | {"organ": renamed[entry["organ"]]} for entry in row["captions"]]
    write_tiny_split(tmp_path / "split", rows={"train": train})
    manifest = json.loads((tmp_path / "split" / "manifest.json").read_text())
    organs = list(renamed.values())
    manifest["settings"]["organ_set"] = {"name": "mine", "organs": organs, "classes": {organ: {} for organ in organs}}
    (tmp_path / "split" / "manifest.json").write_text(json.dumps(manifest))
    recipe = yaml.safe_load(TINY_RECIPE)
    recipe["model"] = {"organ_reduction": "mean"}
    recipe["training"] |= {"max_steps": 3, "save_steps": 2, "eval_strategy": "no", "logging_steps": 1}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    command = ["--recipe", str(tmp_path / "recipe.yaml"), "--data", str(tmp_path / "split")]
    command += ["--init_from", str(tmp_path / "saved")]
    assert train_fvlm.main([*command, "--output_dir", str(tmp_path / "run")]) == 0

    facts = json.loads((tmp_path / "run" / "run.json").read_text())["organs"]
    assert facts["kept"] == ["heart", "lung"] and facts["dropped"] == ["aorta"]
    # In the split the organs stand in a row: the spleen, where tiny rows have their lung, next to the heart.
    assert facts["new"]["spleen"]["from"] == "heart" and "mm apart in 12 scans" in facts["new"]["spleen"]["because"]
    card = (tmp_path / "run" / "README.md").read_text()
    assert "| organs it knew and kept | heart, lung |" in card and "| organs it knew and lost | aorta |" in card
    assert "| new organs, and what they started from | spleen from heart (centres " in card
    assert FVLMConfig.from_pretrained(tmp_path / "run").organs == organs
    resume = ["--resume_from_checkpoint", str(tmp_path / "run" / "checkpoint-2")]
    assert train_fvlm.main([*command, *resume, "--output_dir", str(tmp_path / "again")]) == 0
    whole, again = (load_file(tmp_path / name / "model.safetensors") for name in ("run", "again"))
    assert whole.keys() == again.keys() and all(torch.equal(whole[name], again[name]) for name in whole)
    spleen, heart = whole["organ_pooling.query_tokens"][:2]
    assert not torch.equal(spleen, heart), "from one start, two organs went two ways"


def test_an_organ_of_the_same_name_and_other_classes_is_asked_about(tmp_path, caplog):
    model, processor = tiny_model(tiny_rows(6), organ_classes={"heart": {"totalsegmentator_v2": ["heart"]}})
    save_for_hub(model, processor, tmp_path / "saved")
    classes = {"lung": {}, "heart": {"totalsegmentator_v2": ["liver"]}}
    split = SplitDescription("mine", ("lung", "heart"), classes, (3.0, 1.0, 1.0), (1, 2, 2))
    with caplog.at_level(logging.WARNING):
        start_from(tmp_path / "saved", split=split)
    assert "heart is made of other structures in the split (liver) than in the model (heart)" in caplog.text
    assert "lung is made of" not in caplog.text


def test_geometry_must_still_be_the_models(tmp_path):
    model, processor = tiny_model(tiny_rows(6))
    save_for_hub(model, processor, tmp_path / "saved")
    with pytest.raises(SettingsError, match="was trained with spacing"):
        start_from(tmp_path / "saved", split=description(organs=("lung", "spleen"), spacing=(3.0, 1.0, 1.5)))
