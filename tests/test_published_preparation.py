"""The published preparation: every stage against the published outputs, and where the standard one departs from it."""

import ast
import csv
import functools
import json

import nibabel
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset
from evaluation_samples import tiny_manifest
from tiny_release import arrays, save_nifti
from tiny_scan import AFFINE, tiny_config, tiny_scan, tiny_tokenizer
from tiny_split import ORGANS, SPACING

from data_builders.__main__ import main
from evaluation_fvlm.embedding import embed_split
from evaluation_fvlm.errors import EvaluationError
from evaluation_fvlm.split import check_split_matches
from modeling_fvlm import FVLMConfig, FVLMImageProcessor, FVLMModel, FVLMProcessor, published_preparation
from modeling_fvlm.geometry import AIR_HU, BadVolumeError, crop_or_pad, organ_box, resampled_shape, window_volume
from modeling_fvlm.organs import load_organ_set, organ_label_table
from modeling_fvlm.pipeline_fvlm import FVLMZeroShotPipeline
from modeling_fvlm.preparation import padding_hu
from modeling_fvlm.processed_split import decode_volume, encode_array
from modeling_fvlm.reading import read_nifti_mask, volume_from_array
from training_fvlm.arguments import SettingsError
from training_fvlm.data import SplitDescription, check_against_recipe, check_padding, read_description

NUMBERS = (1, 2, 3)  # plain; unequal spacings in the plane; turned on the table, with a slope of 0.5
CONFIG = FVLMConfig(preprocessing="published")
SIZE = tuple(CONFIG.vision_config.volume_size)


def golden_path(shared_dir, stage, number):
    return shared_dir / "golden" / "preprocess" / stage / f"train_{number}" / f"train_{number}_a" / name_of(number)


def name_of(number):
    return f"train_{number}_a_1.nii.gz"


@functools.cache
def golden(shared_dir, stage, number):
    """Array as stored, and affine, of one published file."""
    image = nibabel.load(golden_path(shared_dir, stage, number))
    return np.asarray(image.dataobj), image.affine


@functools.cache
def golden_part(shared_dir, kind, number):
    """Box and content of what is not 0 in a published file of the last stage, which is stored (z, y, x).

    The rest is the padding of a small scan: nothing under a mask, and 0 after windowing, where no voxel of these scans
    lies as low.
    """
    image = nibabel.load(golden_path(shared_dir, f"processed_train_{kind}", number))
    return occupied(np.asarray(image.dataobj))


def occupied(array):
    assert array.shape == SIZE
    box = organ_box(array)
    return box, np.ascontiguousarray(array[box])


def metadata(shared_dir, number) -> dict:
    """The arguments of `repair_header` from the metadata CSV."""
    with (shared_dir / "golden" / "preprocess" / "metadata" / "train_metadata.csv").open(newline="") as file:
        row = next(row for row in csv.DictReader(file) if row["VolumeName"] == name_of(number))
    return {
        "rescale_slope": float(row["RescaleSlope"]),
        "rescale_intercept": float(row["RescaleIntercept"]),
        "xy_spacing": ast.literal_eval(row["XYSpacing"]),
        "z_spacing": float(row["ZSpacing"]),
        "orientation": ast.literal_eval(row["ImageOrientationPatient"]),
        "position": ast.literal_eval(row["ImagePositionPatient"]),
    }


def is_same(array, expected, tolerance=0.0):
    return array.shape == expected.shape and np.abs(array.astype(np.float32) - expected).max() <= tolerance


# Every stage starts from the published result of the one before.


def is_rescaled(shared_dir, number):
    hu, _ = published_preparation.repair_header(golden(shared_dir, "train", number)[0], **metadata(shared_dir, number))
    return hu.dtype == np.int16 and np.array_equal(hu, golden(shared_dir, "train_fixed", number)[0])


def is_placed(shared_dir, number):
    stored = golden(shared_dir, "train", number)[0]
    _, affine = published_preparation.repair_header(stored, **metadata(shared_dir, number))
    return np.array_equal(affine, golden(shared_dir, "train_fixed", number)[1])


def is_merged(shared_dir, number):
    table = organ_label_table(load_organ_set("chest_4"), CONFIG.organs, "totalsegmentator_v2")
    labels = golden(shared_dir, "train_mask", number)[0]
    return np.array_equal(table[labels], golden(shared_dir, "merged_train_masks", number)[0])


def stored_volume(shared_dir, number):
    return published_preparation.as_stored(volume_from_array, *golden(shared_dir, "train_fixed", number))


def new_shape(volume):
    return published_preparation.resized_shape(volume.array.shape, volume.affine, CONFIG.spacing)


def is_volume_resized(shared_dir, number):
    volume = stored_volume(shared_dir, number)
    ours = published_preparation.resize_volume(volume.array, new_shape(volume))
    return is_same(ours, golden(shared_dir, "resized_train_images", number)[0].transpose(2, 1, 0), 1e-3)


def is_mask_resized(shared_dir, number):
    volume = stored_volume(shared_dir, number)
    sizes = zip(volume.array.shape, new_shape(volume))
    merged = golden(shared_dir, "merged_train_masks", number)[0].transpose(2, 1, 0)
    ours = merged[np.ix_(*(published_preparation.nearest_indices(*of_axis) for of_axis in sizes))]
    return np.array_equal(ours, golden(shared_dir, "resized_train_masks", number)[0].transpose(2, 1, 0))


def boxed(shared_dir, number, kind):
    """The resized volume (windowed) or mask, cut to its box and padded."""
    resized, organs = (
        golden(shared_dir, f"resized_train_{each}", number)[0].transpose(2, 1, 0) for each in ("images", "masks")
    )
    box = published_preparation.box_of_organs(organs, CONFIG.margin_voxels)
    part = window_volume(resized[box], CONFIG.windows)[0] if kind == "images" else organs[box].astype(np.uint8)
    return published_preparation.crop_or_pad(part, published_preparation.crop_start(part.shape, SIZE), SIZE, 0)


def is_volume_boxed(shared_dir, number):
    (box, part), (golden_box, expected) = (
        occupied(boxed(shared_dir, number, "images")),
        golden_part(shared_dir, "images", number),
    )
    return box == golden_box and is_same(part, expected, 1e-6)


def is_mask_boxed(shared_dir, number):
    (box, part), (golden_box, expected) = (
        occupied(boxed(shared_dir, number, "masks")),
        golden_part(shared_dir, "masks", number),
    )
    return box == golden_box and np.array_equal(part, expected)


def is_prepared(shared_dir, number):
    """The whole way in one call, as int16: half a HU of rounding, and no more."""
    scan = prepare(shared_dir, number)
    assert scan.volume.dtype == np.int16 and scan.mask.dtype == np.uint8
    box, expected = golden_part(shared_dir, "images", number)
    mask_box, mask = golden_part(shared_dir, "masks", number)
    return (
        organ_box(scan.volume != -1150) == box
        and organ_box(scan.mask) == mask_box
        and np.array_equal(scan.mask[mask_box], mask)
        and is_same(window_volume(scan.volume[box], CONFIG.windows)[0], expected, 0.5 / 1500 + 1e-6)
    )


STAGES = {
    "rescale": is_rescaled,
    "affine": is_placed,
    "merge": is_merged,
    "resize volume": is_volume_resized,
    "resize mask": is_mask_resized,
    "box of the volume": is_volume_boxed,
    "box of the mask": is_mask_boxed,
    "prepared": is_prepared,
}


def prepare(shared_dir, number, config=CONFIG):
    """The whole way, from the files."""
    paths = (golden_path(shared_dir, stage, number) for stage in ("train_fixed", "train_mask"))
    return FVLMImageProcessor.from_config(config).prepare(*paths)


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_is_the_published_one(shared_dir, stage):
    assert [number for number in NUMBERS if not STAGES[stage](shared_dir, number)] == []


def test_the_resampled_volume_is_published_to_the_bit(shared_dir):
    for number in NUMBERS:
        stored, expected = (golden(shared_dir, stage, number)[0] for stage in ("train_fixed", "resized_train_images"))
        ours = published_preparation.resize_volume(stored.transpose(2, 1, 0), expected.shape[::-1])
        assert ours.dtype == np.float32 and np.array_equal(ours.transpose(2, 1, 0), expected)


@pytest.fixture(scope="module")
def prepared(shared_dir):
    """Published and standard scans by number, prepared once.

    Standard from arrays: the file of scan 3, collapsed to one value, is refused (test_the_collapsed_file_is_refused).
    """
    standard = FVLMImageProcessor.from_config(FVLMConfig())
    scans = {}
    for number in NUMBERS:
        (volume, affine), (mask, _) = (golden(shared_dir, stage, number) for stage in ("train_fixed", "train_mask"))
        scans[number] = prepare(shared_dir, number), standard.prepare(volume, mask, affine)
    return scans


def test_the_collapsed_file_is_refused(shared_dir):
    with pytest.raises(BadVolumeError, match="train_3_a_1.nii.gz: every voxel is -512: there is no scan in it"):
        prepare(shared_dir, 3, FVLMConfig())


def test_the_raw_volume_goes_the_whole_way_as_an_array(shared_dir, prepared):
    """Stored values and metadata -> header repair -> processor: the numbers of the repaired file."""
    for number in NUMBERS:
        stored = golden(shared_dir, "train", number)[0]
        hu, affine = published_preparation.repair_header(stored, **metadata(shared_dir, number))
        labels = golden(shared_dir, "train_mask", number)[0]
        scan = FVLMImageProcessor.from_config(CONFIG).prepare(hu, labels, affine)
        expected, _ = prepared[number]
        assert np.array_equal(scan.volume, expected.volume) and np.array_equal(scan.mask, expected.mask)


def test_spacing_is_the_true_one(shared_dir, prepared):
    for number in NUMBERS:
        affine = golden(shared_dir, "resized_train_images", number)[1]
        expected = np.linalg.norm(affine[:3, :3], axis=0)[::-1]  # the header's columns are x, y, z
        np.testing.assert_allclose(prepared[number][0].spacing, expected, rtol=1e-5)
    assert prepared[2][0].spacing[2] == pytest.approx(0.8), "1.2 mm in x were resampled by the 1.5 mm of y"


def test_the_evaluation_takes_published_scans(shared_dir, prepared):
    """Their voxels are not of the config's size, on purpose; a standard split of such voxels would be refused."""
    rows = [
        {"patient_id": "p", "scan_id": "s", "recon_id": name_of(number), "labels": [], "spacing": list(scan.spacing)}
        | {"volume": encode_array(scan.volume), "mask": encode_array(scan.mask), "shape": list(scan.volume.shape)}
        for number, (scan, _) in prepared.items()
        if number in (2, 3)
    ]
    sizes = {"volume_size": SIZE, "patch_size": (16, 16, 32), "feature_levels": (0,)}
    tiny = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    settings = {"vision_config": {**sizes, **tiny}, "spacing": (3.0, 1.0, 1.0), "margin_voxels": (5, 20, 20)}
    torch.manual_seed(0)
    model = FVLMModel(tiny_config(preprocessing="published", **settings))
    embeddings = embed_split(model, Dataset.from_list(rows))
    assert embeddings.is_present.any(axis=1).all() and np.abs(embeddings.image_embeds).sum() > 0
    model = FVLMModel(tiny_config(**settings))
    with pytest.raises(EvaluationError, match=r"stored at spacing \[3.0, 1.2521, 0.8\] mm"):
        embed_split(model, Dataset.from_list(rows))


def test_what_repair_header_cannot_cut_off_is_refused(shared_dir):
    stored, row = np.zeros((2, 3, 4), np.int16), metadata(shared_dir, 1)
    published_preparation.repair_header(stored.astype(">i2"), **row)
    for dtype in (np.float32, np.int32, np.uint16):
        with pytest.raises(BadVolumeError, match=f"stored is {np.dtype(dtype)}, not int16"):
            published_preparation.repair_header(stored.astype(dtype), **row)
    for name, value in (("rescale_slope", np.nan), ("position", [0, np.inf, 0]), ("orientation", [1, 0, 0])):
        with pytest.raises(BadVolumeError, match=f"{name} must be . finite, got"):
            published_preparation.repair_header(stored, **{**row, name: value})


# Plausible wrong ports. Each must be seen, in the stage and the volume that can tell.


def rescale_in_float(stored, rescale_slope, rescale_intercept, **rest):
    hu = np.rint(stored * rescale_slope + rescale_intercept).astype(np.int16)
    return hu, published_preparation_repair(stored, rescale_slope, rescale_intercept, **rest)[1]


def directions_as_columns(stored, orientation, **rest):
    hu, affine = published_preparation_repair(stored, orientation=orientation, **rest)
    affine[0, 1], affine[1, 0] = affine[1, 0], affine[0, 1]
    return hu, affine


published_preparation_repair = published_preparation.repair_header


def shape_by(spacing_of, whole=int):
    return lambda shape, affine, new, name="": tuple(
        whole(size * old / edge) for size, old, edge in zip(shape, spacing_of(affine), new)
    )


def diagonal(affine):
    return [abs(affine[2 - axis, axis]) for axis in range(3)]


def exchanged(affine):
    return [diagonal(affine)[axis] for axis in (0, 2, 1)]


def edges(affine):
    return [np.linalg.norm(affine[:3, :3], axis=0)[axis] for axis in (0, 2, 1)]


def nearest_at_the_centre(size, new_size):
    return np.minimum(((np.arange(new_size) + 0.5) * size / new_size).astype(int), size - 1)


def corners_aligned(volume, new_shape):
    stored = torch.from_numpy(volume.astype(np.float32))[None, None]
    return torch.nn.functional.interpolate(stored, new_shape, mode="trilinear", align_corners=True)[0, 0].numpy()


def one_voxel_more_below(shape, size):
    return tuple(-((edge - extent + 1) // 2) for extent, edge in zip(shape, size))


def small_margin_below(organs, margin):
    return tuple(
        slice(max(0, part.start - edge + 1), min(size, part.stop + edge))
        for part, size, edge in zip(organ_box(organs), organs.shape, margin)
    )


def pad_with_air(array, start, size, value):
    return crop_or_pad(array, start, size, AIR_HU if array.dtype == np.int16 else value)


WRONG_PORTS = {
    "slope applied in float": ("repair_header", rescale_in_float, 3, "rescale"),
    "directions as columns": ("repair_header", directions_as_columns, 3, "affine"),
    "spacing not exchanged": ("resized_shape", shape_by(diagonal), 2, "resize volume"),
    "spacing from the length of the axes": ("resized_shape", shape_by(edges), 3, "resize volume"),
    "size rounded, not cut off": ("resized_shape", shape_by(exchanged, round), 1, "resize volume"),
    "corners aligned": ("resize_volume", corners_aligned, 1, "resize volume"),
    "nearest voxel by its centre": ("nearest_indices", nearest_at_the_centre, 1, "resize mask"),
    "equal margins": ("box_of_organs", organ_box, 1, "box of the volume"),
    "smaller margin on the other side": ("box_of_organs", small_margin_below, 1, "box of the volume"),
    "odd voxel of padding below": ("crop_start", one_voxel_more_below, 2, "box of the mask"),
    "padding of air": ("crop_or_pad", pad_with_air, 2, "prepared"),
}


@pytest.mark.parametrize("port", WRONG_PORTS)
def test_a_wrong_port_is_seen(shared_dir, monkeypatch, port):
    name, wrong, number, stage = WRONG_PORTS[port]
    monkeypatch.setattr(published_preparation, name, wrong)
    assert not STAGES[stage](shared_dir, number)


def test_the_exchange_alone_is_what_the_wrong_shapes_lack(shared_dir, monkeypatch):
    """The helper of the wrong ports above is right but for what their names say."""
    monkeypatch.setattr(published_preparation, "resized_shape", shape_by(exchanged))
    assert all(is_volume_resized(shared_dir, number) for number in NUMBERS)


# Where the standard preparation departs


def test_standard_keeps_one_more_voxel_above(shared_dir):
    organs = golden(shared_dir, "resized_train_masks", 1)[0].transpose(2, 1, 0)
    published = published_preparation.box_of_organs(organs, CONFIG.margin_voxels)
    standard = organ_box(organs, CONFIG.margin_voxels)
    assert published == (slice(0, 34), slice(8, 145), slice(0, 189))  # clipped in depth, and below in width
    assert standard == (slice(0, 34), slice(8, 146), slice(0, 190))
    published = published_preparation.box_of_organs(np.pad(organs, ((9, 9), (0, 0), (0, 0))), CONFIG.margin_voxels)
    assert published[0] == slice(4, 9 + 34 + 4)


def test_standard_pads_nothing_and_takes_the_centres_of_the_mask(prepared):
    published, standard = prepared[1]
    np.testing.assert_allclose(published.spacing, standard.spacing, rtol=1e-6)
    assert standard.volume.shape == tuple(part.stop - part.start for part in standard.box)
    assert published.volume.shape == SIZE
    # On the grid of the whole scan, where both boxes are.
    common = [slice(max(a.start, b.start), min(a.stop, b.stop)) for a, b in zip(published.box, standard.box)]
    padding = [(size - (part.stop - part.start)) // 2 for size, part in zip(SIZE, published.box)]
    inside = tuple(
        slice(part.start - box.start + low, part.stop - box.start + low)
        for part, box, low in zip(common, published.box, padding)
    )
    other = tuple(slice(part.start - box.start, part.stop - box.start) for part, box in zip(common, standard.box))
    assert np.abs(published.volume[inside].astype(int) - standard.volume[other]).max() <= 1, "only sums round apart"
    apart = published.mask[inside] != standard.mask[other]
    assert 0.001 < apart.mean() < 0.02, "another nearest voxel along the edges of organs"
    assert (published.volume[: padding[0]] == -1150).all()


def test_standard_keeps_the_proportions_that_the_exchange_breaks(shared_dir, prepared):
    published, standard = prepared[2]
    np.testing.assert_allclose(standard.spacing, (3, 1, 1), rtol=0.01)
    np.testing.assert_allclose(published.spacing, (3, 1.252, 0.8), rtol=1e-3)
    # 101 voxels of 1.5 mm in height and 122 of 1.2 mm in width, each resampled by the other's spacing.
    stored = golden(shared_dir, "train_fixed", 2)[0].shape[::-1]
    assert resampled_shape(stored, (1.7, 1.5, 1.2), CONFIG.spacing) == (17, 151, 146)
    assert new_shape(stored_volume(shared_dir, 2)) == (17, 121, 183)


def test_standard_applies_a_slope_of_one_half(shared_dir):
    stored = golden(shared_dir, "train", 3)[0]
    row = metadata(shared_dir, 3)
    hu, affine = published_preparation.repair_header(stored, **row)
    assert np.unique(hu).tolist() == [-512], "the published volume has collapsed to its intercept"
    standard = volume_from_array(stored, affine, rescale=(row["rescale_slope"], row["rescale_intercept"]))
    expected = np.rint(stored * 0.5 - 512)
    assert standard.array.std() > 100 and sorted(np.unique(standard.array)) == sorted(np.unique(expected))


def test_standard_measures_a_turned_scan_along_its_axes(prepared):
    published, standard = prepared[3]
    # 2.5 mm voxels, turned by 8.6 degrees: the diagonal says 2.47 mm, and voxels come out too large.
    np.testing.assert_allclose(standard.spacing, (3, 1, 1), rtol=1e-4)
    np.testing.assert_allclose(published.spacing, (3, 1.0135, 1.0121), rtol=1e-4)


def test_standard_does_not_take_an_organ_for_whole_that_the_scan_cuts(prepared):
    published, standard = (FVLMImageProcessor.from_config(CONFIG).crop(scan)[2] for scan in prepared[1])
    assert published.all()
    assert not standard.all(), "an organ on the first or last slice was cut by the scanner"


def test_standard_turns_files_and_published_leaves_them(tmp_path):
    hu, labels = tiny_scan()
    turned = AFFINE.copy()
    turned[:3, 3] += turned[:3, 1] * (hu.shape[1] - 1)
    turned[:3, 1] *= -1
    for preprocessing, is_turned in (("standard", True), ("published", False)):
        processor = FVLMImageProcessor.from_config(tiny_config(preprocessing=preprocessing))
        scan, other = processor.prepare(hu, labels, AFFINE), processor.prepare(hu[:, ::-1], labels[:, ::-1], turned)
        assert np.array_equal(scan.volume, other.volume) == is_turned
    # By hand, on the spacing whose exchange changes nothing: the stored array, only reversed.
    square = np.diag([-2.0, 2.0, 4.0, 1.0])
    config = tiny_config(preprocessing="published", spacing=(4.0, 2.0, 2.0))
    scan = FVLMImageProcessor.from_config(config).prepare(hu, labels, square)
    assert scan.box == (slice(0, 8), slice(1, 10), slice(2, 55))  # of organs 0..7, 3..8 and 4..53
    expected = np.full((8, 12, 53), -1150)
    expected[:, 1:10] = hu.transpose(2, 1, 0)[scan.box]
    assert np.array_equal(scan.volume, expected), "wider than the crop of 32: not padded there, and not cut"


# The preset where people meet it


def test_the_preset_travels_with_config_and_processor(tmp_path):
    config = FVLMConfig(preprocessing="published")
    assert FVLMConfig.from_dict(config.to_dict()).preprocessing == "published"
    older = {name: value for name, value in config.to_dict().items() if name != "preprocessing"}
    assert FVLMConfig.from_dict(older).preprocessing == FVLMConfig().preprocessing == "standard"
    with pytest.raises(Exception, match="preprocessing"):
        FVLMConfig(preprocessing="publisht")
    processor = FVLMImageProcessor.from_config(config)
    processor.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "preprocessor_config.json").read_text())["preprocessing"] == "published"
    assert FVLMImageProcessor.from_pretrained(tmp_path).preprocessing == "published"
    with pytest.raises(ValueError, match="preprocessing must be 'standard' or 'published', got 'publisht'"):
        FVLMImageProcessor(organs=["lung"], preprocessing="publisht")


def test_what_the_preset_cannot_read_is_refused(tmp_path):
    hu, labels = tiny_scan()
    processor = FVLMImageProcessor.from_config(tiny_config(preprocessing="published"))
    with pytest.raises(BadVolumeError, match="no voxel along .*preprocessing 'standard'"):
        processor.prepare(hu, labels, AFFINE[:, [1, 0, 2, 3]])  # height stored before width: a diagonal of zeros
    for bad in (np.diag([np.nan, 1, 1, 1]), np.diag([0.0, 1, 1, 1]), np.eye(3)):
        with pytest.raises(BadVolumeError, match="spans no grid; repair the header"):
            processor.prepare(hu, labels, bad)
    with pytest.raises(BadVolumeError, match="not on one grid"):
        processor.prepare(hu, labels[:-1], AFFINE)
    with pytest.raises(BadVolumeError, match="holds no organ of the set"):
        processor.prepare(hu, np.zeros_like(labels), AFFINE)


def test_a_volume_that_has_been_turned_is_refused(tmp_path):
    hu, labels = tiny_scan()
    processor = FVLMImageProcessor.from_config(tiny_config(preprocessing="published"))
    mask = nibabel.Nifti1Image(labels, AFFINE)
    nibabel.save(mask, tmp_path / "mask.nii.gz")
    for name, pair in (
        ("volume", (volume_from_array(hu, AFFINE), labels)),
        ("mask", (hu, read_nifti_mask(tmp_path / "mask.nii.gz"))),
    ):
        with pytest.raises(ValueError, match=f"{name}: a `Volume` has been turned.*Give the path, or array and affine"):
            processor.prepare(*pair, AFFINE)


def test_what_lies_outside_a_published_scan_is_nothing_wherever_it_is_cut():
    """Crop, pipeline and evaluation: padding is 0 after windowing. Air is not, and stays the standard's."""
    windows = [{"hu_min": -1150.5, "hu_max": 350.0, "mean": 0.0, "std": 1.0}]
    assert [padding_hu(windows, is_published) for is_published in (True, False)] == [-1151, AIR_HU]
    hu, labels = tiny_scan()
    for preprocessing, outside in (("published", -1151), ("standard", AIR_HU)):
        config = tiny_config(preprocessing=preprocessing, windows=windows, spacing=(4.0, 2.0, 2.0))
        processor = FVLMProcessor.from_config(config, tiny_tokenizer())
        affine = np.diag([-2.0, -2.0, 4.0, 1.0])
        scan = processor.image_processor.prepare(hu, labels, affine)
        # As a scan of another crop would come, smaller than this one.
        part = tuple(slice(0, edge) for edge in (5, 12, 32))
        scan = type(scan)(scan.volume[part], scan.mask[part], scan.spacing, scan.box)
        crop, _, _ = processor.image_processor.crop(scan)
        assert (crop[0] == outside).all() and crop.shape == (8, 12, 32)
        is_zero = bool((window_volume(crop, windows)[0, 0] == 0).all())
        assert is_zero == (preprocessing == "published")

        pipe = FVLMZeroShotPipeline(model=FVLMModel(config), processor=processor)
        processor.image_processor.prepare = lambda *_, scan=scan: scan
        findings = [{"finding": "F", "organ": "heart", "positive": ["nodule"], "negative": ["no nodule"]}]
        given = {"volume": hu, "mask": labels, "affine": affine, "numbering": "totalsegmentator_v2"}
        (window,) = pipe.preprocess(given, findings)["crops"]
        assert (window["volume"][0, 0] == outside).all()

        row = {"patient_id": "p", "scan_id": "s", "recon_id": "r", "labels": [], "spacing": list(config.spacing)}
        row |= {"volume": encode_array(np.ascontiguousarray(scan.volume)), "shape": list(scan.volume.shape)}
        row |= {"mask": encode_array(np.ascontiguousarray(scan.mask))}
        model, seen = FVLMModel(config), []
        forward = model.get_organ_features

        def watched(volume, forward=forward, seen=seen, **rest):
            seen.append(volume)
            return forward(volume=volume, **rest)

        model.get_organ_features = watched
        embed_split(model, Dataset.from_list([row]), organs=["heart"])
        assert (seen[0][0, 0] == outside).all()


def published_source(folder):
    """Two scans in LPS for the folder builder; the second's mask is stored upside down."""
    volume, mask = arrays()
    for number, orientation in ((1, "LPS"), (2, "LPI")):
        save_nifti(volume, folder / "volumes" / f"p{number}.nii.gz", "LPS")
        save_nifti(mask, folder / "masks" / f"p{number}.nii.gz", orientation)
    organs = {"lung": {"impression": [""], "findings": ["It's clear (no nodule)"]}, "aorta": {"findings": ["Wide."]}}
    (folder / "reports.json").write_text(json.dumps({f"p{number}": {"organs": organs} for number in (1, 2)}))
    return [f"--{name}={folder / place}" for name, place in (("volumes", "volumes"), ("masks", "masks"))] + [
        f"--reports={folder / 'reports.json'}"
    ]


def test_a_builder_prepares_and_captions_as_published_and_says_so(tmp_path, capsys):
    options = [*published_source(tmp_path), "--organs=chest_4", "--previews=0", "--workers=1"]
    options += ["--ids", "kept", "--validation_fraction", "0", "--out", str(tmp_path / "out")]
    assert main(["folder", *options, "--preprocessing", "published"]) == 0
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["settings"]["preprocessing"] == "published"
    assert (manifest["settings"]["padded_to"], manifest["settings"]["padding_hu"]) == (list(SIZE), -1150)
    described = read_description(str(tmp_path / "out"))
    assert (described.preprocessing, described.padded_to, described.padding_hu) == ("published", SIZE, -1150)
    assert [(entry["case"], "not on one grid" in entry["reason"]) for entry in manifest["skipped"]] == [("p2", True)]
    (row,) = pq.read_table(tmp_path / "out" / "volumes" / "train-00000-of-00001.parquet").to_pylist()
    paths = [tmp_path / folder / "p1.nii.gz" for folder in ("volumes", "masks")]
    scan = FVLMImageProcessor.from_config(CONFIG).prepare(*paths)
    volume, mask = decode_volume(row)
    assert volume.shape == SIZE and np.array_equal(volume, scan.volume) and np.array_equal(mask, scan.mask)
    assert row["spacing"] == pytest.approx(scan.spacing)
    captions = {entry["organ"]: (entry["caption"], entry["is_abnormal"]) for entry in row["captions"]}
    assert captions == {
        "lung": (".Its clear no nodule.", True),
        "heart": ("heart shows no significant abnormalities.", False),
        "esophagus": ("esophagus shows no significant abnormalities.", False),
        "aorta": ("aorta shows no significant abnormalities.Wide.", False),
    }
    card = (tmp_path / "out" / "README.md").read_text()
    assert "preprocessing: published" in card and "one less above" in card
    assert "padded to\n  112 x 256 x 352 voxels with -1150 HU" in card
    # The same folder cannot be continued the other way.
    assert main(["folder", *options]) != 0
    assert "preprocessing: published there, standard here" in " ".join(capsys.readouterr().err.split())
    options[-1] = str(tmp_path / "right")
    assert main(["folder", *options]) == 0
    manifest = json.loads((tmp_path / "right" / "manifest.json").read_text())
    assert manifest["settings"]["preprocessing"] == "standard" and not manifest["skipped"]
    assert "padded_to" not in manifest["settings"]
    (row, _) = pq.read_table(tmp_path / "right" / "volumes" / "train-00000-of-00001.parquet").to_pylist()
    captions = {entry["organ"]: (entry["caption"], entry["is_abnormal"]) for entry in row["captions"]}
    assert captions["lung"] == ("It's clear (no nodule)", False) and captions["aorta"][0] == "Wide."
    assert "one less above" not in (tmp_path / "right" / "README.md").read_text()


def test_a_recipe_or_a_model_of_the_other_way_is_refused():
    built = {name: SplitDescription("tiny", ORGANS, {}, SPACING, (1, 2, 2), name) for name in ("standard", "published")}
    check_against_recipe(built["standard"], {}, "split")
    check_against_recipe(built["standard"], {"preprocessing": "standard"}, "split")
    check_against_recipe(built["published"], {"preprocessing": "published"}, "split")
    with pytest.raises(SettingsError, match="recipe's preprocessing is 'published', the split's is 'standard'.*--pre"):
        check_against_recipe(built["standard"], {"preprocessing": "published"}, "split")
    for silent in ({}, {"preprocessing": "standard"}):
        with pytest.raises(SettingsError, match="--model.preprocessing published"):
            check_against_recipe(built["published"], silent, "split")

    organs = tiny_manifest()["settings"]["organ_set"]["organs"]
    geometry = {"organs": organs, "spacing": (3.0, 1.0, 1.0), "margin_voxels": (5, 20, 20)}
    config = {name: tiny_config(preprocessing=name, **geometry) for name in built}
    check_split_matches(tiny_manifest(), config["standard"], "split")  # a manifest from before there was a choice
    for name in built:
        check_split_matches(tiny_manifest(preprocessing=name), config[name], "split")
    with pytest.raises(EvaluationError, match="split was prepared with preprocessing 'standard'.*--preprocessing pub"):
        check_split_matches(tiny_manifest(), config["published"], "split")
    with pytest.raises(EvaluationError, match="prepared with preprocessing 'published', the model reads 'standard'"):
        check_split_matches(tiny_manifest(preprocessing="published"), config["standard"], "split")


def test_a_split_padded_for_another_model_is_refused():
    built = SplitDescription("tiny", ORGANS, {}, SPACING, (1, 2, 2), "published", SIZE, -1150)
    check_against_recipe(built, {"preprocessing": "published"}, "split")
    small = {"preprocessing": "published", "vision_config": {"volume_size": [8, 16, 32]}}
    with pytest.raises(SettingsError, match=r"pads to \(8, 16, 32\) voxels.*padded_to \(112, 256, 352\)"):
        check_against_recipe(built, small, "split")
    bone = {"preprocessing": "published", "windows": [{"hu_min": -1000, "hu_max": 1600, "mean": "auto", "std": "auto"}]}
    with pytest.raises(SettingsError, match="pads to -1000 HU.*padding_hu -1150"):
        check_against_recipe(built, bone, "split")
    standard = SplitDescription("tiny", ORGANS, {}, SPACING, (1, 2, 2))
    check_padding(standard, (8, 16, 32), bone["windows"], "a model")

    organs = tiny_manifest()["settings"]["organ_set"]["organs"]
    geometry = {"organs": organs, "spacing": (3.0, 1.0, 1.0), "margin_voxels": (5, 20, 20)}
    manifest = tiny_manifest(preprocessing="published", padded_to=list(SIZE), padding_hu=-1150)
    check_split_matches(manifest, FVLMConfig(preprocessing="published", **geometry), "split")
    with pytest.raises(EvaluationError, match=r"padded_to is \[112, 256, 352\] voxels.* pads to \[8, 12, 32\]"):
        check_split_matches(manifest, tiny_config(preprocessing="published", **geometry), "split")
    with pytest.raises(EvaluationError, match="padding_hu is -1150 HU.* pads to -1000"):
        windows = [{"hu_min": -1000.0, "hu_max": 350.0, "mean": 0.0, "std": 1.0}]
        check_split_matches(manifest, FVLMConfig(preprocessing="published", windows=windows, **geometry), "split")


def test_a_split_of_another_margin_or_other_classes_is_refused():
    organ_set = load_organ_set("chest_4")
    config = FVLMConfig()

    def manifest(classes=organ_set.classes, **settings):
        named = {"name": "chest_4", "organs": list(organ_set.organs), "classes": classes}
        return tiny_manifest(organ_set=named, **settings)

    check_split_matches(manifest(), config, "split")
    old = manifest(classes={})
    del old["settings"]["margin_voxels"], old["settings"]["organ_set"]["classes"]
    check_split_matches(old, config, "split")
    with pytest.raises(EvaluationError, match=r"margin of \[0, 20, 20\] voxels .*--margin 5 20 20"):
        check_split_matches(manifest(margin_voxels=[0, 20, 20]), config, "split")
    # A plain list stands for every numbering; the order of classes means nothing.
    plain = {**organ_set.classes, "esophagus": ["esophagus"]}
    check_split_matches(manifest(plain), config, "split")
    check_split_matches(
        manifest({**organ_set.classes, "lung": {key: names[::-1] for key, names in organ_set.classes["lung"].items()}}),
        config,
        "split",
    )
    part = {**organ_set.classes, "lung": ["lung_upper_lobe_left"]}
    with pytest.raises(EvaluationError, match="organ 'lung' is made of .'lung_upper_lobe_left'. .*the model's of"):
        check_split_matches(manifest(part), config, "split")
