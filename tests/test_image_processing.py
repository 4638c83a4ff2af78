"""FVLMImageProcessor: the chain of the ground, whatever form a scan comes in, saved and loaded, and its refusals."""

import json

import numpy as np
import pytest
import torch
from tiny_scan import AFFINE, HEART, tiny_config, tiny_scan, write_scan

from modeling_fvlm import FVLMConfig, FVLMImageProcessor, FVLMModel
from modeling_fvlm.geometry import AIR_HU, window_volume
from modeling_fvlm.reading import read_nifti, read_nifti_mask


@pytest.fixture(scope="module")
def processor():
    return FVLMImageProcessor.from_config(tiny_config())


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    return write_scan(tmp_path_factory.mktemp("scan"))


def same(features, others):
    return features.keys() == others.keys() and all(torch.equal(features[name], others[name]) for name in features)


def test_a_scan_by_hand(processor):
    """At unchanged spacing nothing is interpolated, so every voxel can be followed by hand."""
    hu, labels = tiny_scan()
    features = processor(hu, labels, affines=AFFINE)
    assert features["pixel_values"].shape == (1, 1, 8, 12, 32) and features["pixel_values"].dtype == torch.float32
    assert features["organ_mask"].shape == (1, 8, 12, 32) and features["organ_mask"].dtype == torch.uint8
    # LAS on disk: x already grows to the left, y has to be turned, z is depth.
    turned, organs = hu[:, ::-1].transpose(2, 1, 0), labels[:, ::-1].transpose(2, 1, 0)
    # Box of all organs: depth 0..8, height 14-9..14-3, width 4..54; with margin 0..9, 3..13, 2..56.
    turned, organs = turned[0:9, 3:13, 2:56], organs[0:9, 3:13, 2:56]
    # Crop of (8, 12, 32): depth 9 starts at 0, height 10 is padded by one on each side, width 54 starts at 11.
    expected = np.full((8, 12, 32), AIR_HU)
    expected[:, 1:11] = turned[0:8, :, 11:43]
    expected_mask = np.zeros((8, 12, 32), dtype=int)
    expected_mask[:, 1:11] = organs[0:8, :, 11:43]
    np.testing.assert_allclose(features["pixel_values"][0, 0], np.clip((expected + 1150) / 1500, 0, 1), atol=1e-6)
    assert np.array_equal(features["organ_mask"][0] == 2, expected_mask == HEART) and (expected_mask == HEART).any()
    assert sorted(features["organ_mask"].unique().tolist()) == [0, 2], "lung and aorta lie outside the middle"
    assert features["organ_is_complete"].tolist() == [[False, True, False, False]]


def test_every_form_of_input_is_the_same_scan(processor, paths):
    hu, labels = tiny_scan()
    expected = processor(*paths)
    assert same(expected, processor(hu, labels, affines=AFFINE))
    assert same(expected, processor([hu], [labels], affines=[AFFINE]))
    assert same(expected, processor(torch.from_numpy(hu), torch.from_numpy(labels), affines=torch.from_numpy(AFFINE)))
    assert same(expected, processor(hu, labels, affines=AFFINE.tolist()))
    assert same(expected, processor(read_nifti(paths[0]), read_nifti_mask(paths[1])))
    assert same(expected, processor(str(paths[0]), str(paths[1])))
    assert same(expected, processor(paths[0], labels)), "a mask array lies on the stored array of its volume"
    assert same(expected, processor.preprocess(volumes=paths[0], masks=paths[1]))
    assert same(expected, processor(hu.astype(np.float32), labels.astype(np.int64), affines=AFFINE))
    own = {10: "lung", 51: "heart", 52: "aorta"}
    assert same(expected, processor(*paths, numbering=own))
    arrays = processor(*paths, return_tensors="np")
    assert all(
        isinstance(arrays[name], np.ndarray) and np.array_equal(arrays[name], expected[name]) for name in expected
    )


def test_a_batch_is_its_scans_in_order(processor, tmp_path):
    scans = [write_scan(tmp_path, depth, seed) for depth, seed in ((10, 0), (14, 1), (7, 2))]
    batch = processor([volume for volume, _ in scans], [mask for _, mask in scans])
    for row, (volume, mask) in enumerate(scans):
        single = processor(volume, mask)
        assert all(torch.equal(batch[name][row], single[name][0]) for name in single)
    assert not torch.equal(batch["pixel_values"][0], batch["pixel_values"][1])


def test_windowing_may_be_left_to_the_model(processor, paths):
    raw, windowed = processor(*paths, window=False), processor(*paths)
    assert raw["volume"].dtype == torch.int16 and raw["volume"].shape == (1, 8, 12, 32)
    again = window_volume(raw["volume"][0].numpy(), processor.windows)
    assert np.array_equal(again, windowed["pixel_values"][0])
    model = FVLMModel(tiny_config()).eval()
    with torch.no_grad():
        left, right = model.get_organ_features(**raw), model.get_organ_features(**windowed)
    assert left.image_embeds.abs().sum() > 0
    torch.testing.assert_close(left.image_embeds, right.image_embeds, atol=1e-5, rtol=1e-5)
    assert torch.equal(left.organ_is_complete, raw["organ_is_complete"])


def test_several_windows_become_channels(paths):
    windows = [
        {"hu_min": -1150.0, "hu_max": 350.0, "mean": 0.0, "std": 1.0},
        {"hu_min": -160.0, "hu_max": 240.0, "mean": 0.5, "std": 0.25},
    ]
    vision = {**tiny_config().vision_config.to_dict(), "num_channels": 2}
    features = FVLMImageProcessor.from_config(tiny_config(windows=windows, vision_config=vision))(*paths)
    assert features["pixel_values"].shape[1] == 2
    raw = FVLMImageProcessor.from_config(tiny_config())(*paths, window=False)["volume"][0]
    expected = (((raw.float() + 160) / 400).clip(0, 1) - 0.5) / 0.25
    torch.testing.assert_close(features["pixel_values"][0, 1], expected)


def test_the_crop_follows_an_organ_or_a_voxel(processor, paths):
    aorta = processor(*paths, center="aorta")
    assert (aorta["organ_mask"] == 4).sum() == 4 * 2 * 2 and aorta["organ_is_complete"][0].tolist() == [
        False,
        False,
        False,
        True,
    ]
    scan = processor.prepare(*paths)
    middle = [int(place) for place in np.argwhere(scan.mask == 4).mean(axis=0).round()]
    voxel = processor(*paths, center=middle)
    assert (voxel["organ_mask"] == 4).sum() == 16
    lung = processor(*paths, center="lung")
    assert (lung["organ_mask"] == 1).sum() == 8 * 6 * 5
    assert lung["organ_is_complete"][0].tolist() == [False, True, False, False], "the scan's lowest slice cuts the lung"


def test_padding_does_not_hide_that_the_scan_cuts_an_organ(tmp_path):
    """In a crop larger than the scan no organ touches a face, yet the lung was cut by the scanner."""
    config = tiny_config(vision_config={**tiny_config().vision_config.to_dict(), "volume_size": (16, 16, 64)})
    features = FVLMImageProcessor.from_config(config)(*write_scan(tmp_path))
    lung = features["organ_mask"][0] == 1
    assert lung.any() and not any(lung.movedim(axis, 0)[face].any() for axis in range(3) for face in (0, -1))
    assert features["organ_is_complete"].tolist() == [[False, True, False, True]]
    relaxed = FVLMImageProcessor.from_config(
        FVLMConfig.from_dict({**config.to_dict(), "completeness": "min_voxels", "min_organ_voxels": 17})
    )
    assert relaxed(*write_scan(tmp_path))["organ_is_complete"].tolist() == [[True, True, False, False]]


def test_every_preprocessing_constant_is_the_configs():
    config = tiny_config(margin_voxels=(3, 4, 5), min_organ_voxels=7, completeness="min_voxels", spacing=(2.5, 0.9, 1))
    processor = FVLMImageProcessor.from_config(config)
    for name in ("organs", "organ_classes", "windows", "completeness", "min_organ_voxels"):
        assert getattr(processor, name) == getattr(config, name), name
    for name in ("spacing", "margin_voxels"):
        assert tuple(getattr(processor, name)) == tuple(getattr(config, name)), name
    for name in ("volume_size", "patch_size"):
        assert tuple(getattr(processor, name)) == tuple(getattr(config.vision_config, name)), name
    # And the defaults of both are one.
    defaults = FVLMImageProcessor.from_config(FVLMConfig())
    bare = FVLMImageProcessor(organs=defaults.organs, organ_classes=defaults.organ_classes)
    assert bare.to_dict() == defaults.to_dict()


def test_saved_and_loaded_it_is_the_same(processor, paths, tmp_path):
    processor.save_pretrained(tmp_path)
    loaded = FVLMImageProcessor.from_pretrained(tmp_path)
    saved = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert saved["spacing"] == [4.0, 3.0, 2.0] and saved["organs"] == ["lung", "heart", "esophagus", "aorta"]
    assert all(getattr(loaded, name) == value for name, value in vars(processor).items() if not name.startswith("_"))
    assert same(loaded(*paths), processor(*paths))


def test_what_cannot_be_processed_is_refused(processor, paths, tmp_path):
    hu, labels = tiny_scan()
    with pytest.raises(ValueError, match="masks is missing: fVLM looks at a scan organ by organ.*TotalSegmentator"):
        processor(paths[0])
    with pytest.raises(ValueError, match="a volume given as an array needs `affines`.*left"):
        processor(hu, labels)
    with pytest.raises(ValueError, match="1 volumes came with 2 masks"):
        processor(paths[0], [paths[1], paths[1]])
    with pytest.raises(ValueError, match="2 volumes came with 1 affines"):
        processor([hu, hu], [labels, labels], affines=[AFFINE])
    with pytest.raises(ValueError, match="organ 'hart' is not one of .*nearest: 'heart'"):
        processor(*paths, center="hart")
    with pytest.raises(ValueError, match="the scan has no esophagus"):
        processor(*paths, center="esophagus")
    with pytest.raises(ValueError, match="numbering 'v2' is not one of"):
        processor(*paths, numbering="v2")
    with pytest.raises(ValueError, match="organs is missing.*from_config"):
        FVLMImageProcessor()
    with pytest.raises(ValueError, match="return_tensors must be 'pt' or 'np'"):
        processor(*paths, return_tensors="tf")
    broken = tmp_path / "broken.nii.gz"
    broken.write_bytes(paths[0].read_bytes()[:-40])
    with pytest.raises(ValueError, match="broken.nii.gz: .*Fetch the file again"):
        processor([paths[0], broken], [paths[1], paths[1]])
