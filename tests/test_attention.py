"""Attention maps against PyTorch's own attention, against a walk over voxels, and on the grid of the source file."""

import argparse
import io
import json

import nibabel
import numpy as np
import pytest
import tiny_scan
import torch
from dicom_series import slices_of_nifti, write_series
from evaluation_samples import ORGANS, tiny_dataset, tiny_model, tiny_rows
from oriented_files import turned, write_itk, write_nifti
from PIL import Image
from scipy import ndimage
from torch import nn
from torch.nn import functional as F

from evaluation_fvlm import attention
from evaluation_fvlm.attention import OUTSIDE, attention_maps, read_source, spread
from evaluation_fvlm.embedding import embed_split
from evaluation_fvlm.errors import EvaluationError
from evaluation_fvlm.overlays import HEAT_OPACITY, outline, overlay_png, plane_of
from evaluation_fvlm.windows import WindowRule, organ_boxes, organ_windows, window_of_organ
from modeling_fvlm import FVLMModel, FVLMProcessor, save_for_hub
from modeling_fvlm.processed_split import decode_volume

SIZE, PATCH = (4, 12, 32), (2, 4, 8)


@torch.no_grad()
def textbook_pooling(model, levels, organ_index, tokens):
    """`nn.MultiheadAttention` of one organ's query over its own tokens of all levels: embedding and weights."""
    pooling = model.organ_pooling
    attention = nn.MultiheadAttention(levels[0].shape[-1], pooling.num_heads, batch_first=True).eval()
    attention.in_proj_weight.copy_(pooling.in_proj_weight)
    attention.in_proj_bias.copy_(pooling.in_proj_bias)
    attention.out_proj.load_state_dict(pooling.out_proj.state_dict())
    keys = torch.cat([level[:, tokens] for level in levels], dim=1)
    pooled, weights = attention(pooling.query_tokens[None, organ_index, None].view(1, 1, -1), keys, keys)
    weight, bias = model.organ_projection.organ_parameters()[organ_index]
    return F.normalize(F.linear(pooled[0, 0], weight, bias), dim=-1), weights[0, 0]


@pytest.mark.parametrize("token_selection", ["all", "organs"])
def test_a_map_is_what_the_model_pools_by(token_selection, monkeypatch):
    """Embedding and weights come out of the same textbook call; the embedding is the one that is scored."""
    model, rows = tiny_model(token_selection), tiny_rows()
    scored = embed_split(model, tiny_dataset())
    seen = []
    monkeypatch.setattr(model.organ_pooling, "forward", seen_by(model.organ_pooling.forward, seen))
    checked = 0
    for position, row in enumerate(rows):
        volume, mask = decode_volume(row)
        for organ_index, organ in enumerate(ORGANS):
            seen.clear()
            maps = attention_maps(model, volume, mask, [organ])
            assert list(maps) == [organ] * bool((mask == organ_index + 1).any())
            if not maps:
                continue
            ((levels, token_mask),) = seen
            embeds, weights = textbook_pooling(model, levels, organ_index, token_mask[0, organ_index])
            np.testing.assert_allclose(embeds, scored.image_embeds[position, organ_index], atol=2e-5)
            by_level = weights.view(len(levels), -1).numpy()
            np.testing.assert_allclose(maps[organ].weights[maps[organ].is_organ], by_level.sum(0), atol=1e-5)
            np.testing.assert_allclose(maps[organ].level_shares, by_level.sum(1), atol=1e-5)
            assert maps[organ].weights.sum() == pytest.approx(1, abs=1e-12)
            assert not maps[organ].weights[~maps[organ].is_organ].any()
            checked += by_level.shape[1] > 2 and np.ptp(by_level.sum(0)) > 0.01
    assert checked > 3, "maps of one patch, or uniform ones, compare nothing"


def seen_by(forward, seen):
    def watched(levels, token_mask, output_attentions=False):
        seen.append((levels, token_mask))
        return forward(levels, token_mask, output_attentions)

    return watched


def slow_map_on_scan(weights, window, shape):
    """Follow every voxel through the window: it has its own number, and is looked for there."""
    numbers = np.arange(np.prod(shape), dtype=np.int32).reshape(shape)
    shown = window.take(numbers, -1)
    patch_of = {int(shown[at]): tuple(a // b for a, b in zip(at, PATCH)) for at in np.ndindex(shown.shape)}
    counts = {}
    for number, patch in patch_of.items():
        counts[patch] = counts.get(patch, 0) + (number >= 0)
    output = np.zeros(shape)
    for at in np.ndindex(shape):
        patch = patch_of.get(int(numbers[at]))
        output[at] = 0 if patch is None else weights[patch] / counts[patch]
    return output


def test_in_shared_windows_the_map_is_of_the_window_in_which_the_organ_was_scored():
    """Two neighbours fit into one window; alone, an organ would stand in the middle of another."""
    rule = WindowRule((4, 12, 40), PATCH, shared=True)
    volume, mask = (np.pad(array, ((0, 0), (0, 0), (0, 45))) for array in decode_volume(tiny_rows()[3]))
    alone = attention_maps(tiny_model(), volume, mask, ["heart"], rule)["heart"]
    together = attention_maps(tiny_model(), volume, mask, ["heart"], rule, ["lung", "heart"])
    assert list(together) == ["heart"]
    ((window, organs),) = organ_windows(organ_boxes(mask, len(ORGANS)), mask.shape, rule).items()
    assert organs == [0, 1] and together["heart"].window == window != alone.window


@pytest.mark.parametrize("rule", [WindowRule(SIZE, PATCH), WindowRule(SIZE, PATCH, published=True)])
@pytest.mark.parametrize("row", range(5))
def test_a_map_on_the_scan_equals_a_walk_over_voxels(row, rule):
    volume, mask = decode_volume(tiny_rows()[row])
    maps = attention_maps(tiny_model(), volume, mask, rule=rule)
    assert set(maps) == {ORGANS[label - 1] for label in np.unique(mask) if label}
    for organ, organ_map in maps.items():
        is_organ = mask == ORGANS.index(organ) + 1
        box = organ_boxes(mask, len(ORGANS))[ORGANS.index(organ)]
        assert organ_map.window == window_of_organ(box, mask.shape, rule), "not the window in which it is scored"
        on_scan = organ_map.on_scan()
        np.testing.assert_allclose(
            on_scan, slow_map_on_scan(organ_map.weights, organ_map.window, mask.shape), atol=1e-7
        )
        assert on_scan.sum() == pytest.approx(1, abs=1e-5)
        peak = organ_map.peak_voxel(is_organ)
        places = tuple(int(along[at]) for along, at in zip(organ_map.patch_of_voxel(), peak))
        assert is_organ[peak] and organ_map.weights[places] == organ_map.weights.max()


def test_no_weight_is_lost_on_a_grid_coarser_than_the_patches():
    weights = np.array([[[0.1, 0.2, 0.3, 0.4]]])
    coarse = [np.array([0]), np.array([0]), np.array([OUTSIDE, 0, 3, OUTSIDE])]  # no voxel's centre in patches 1 and 2
    np.testing.assert_allclose(spread(weights, coarse), [[[0, 0.1, 0.9, 0]]], rtol=1e-6)
    np.testing.assert_allclose(spread(weights, [*coarse[:2], np.array([0, 0, 1, 2])])[0, 0], [0.05, 0.05, 0.2, 0.7])


# On the grid of the source


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = FVLMModel(tiny_scan.tiny_config())
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.3)
    return model.eval()


@pytest.fixture(scope="module")
def processor():
    return FVLMProcessor.from_config(tiny_scan.tiny_config(), tiny_scan.tiny_tokenizer()).image_processor


def fine_scan():
    """`tiny_scan` with voxels of half the height and a third of the width: its preparation resamples."""
    hu, labels = (np.repeat(np.repeat(array, 3, axis=0), 2, axis=1) for array in tiny_scan.tiny_scan())
    affine = tiny_scan.AFFINE.copy()
    affine[:3, 0] /= 3
    affine[:3, 1] /= 2
    return hu, labels, affine


@pytest.mark.parametrize("name", ["scan.nii.gz", "scan.nrrd"])
@pytest.mark.parametrize("order, flips", [((0, 1, 2), (0, 0, 0)), ((2, 0, 1), (1, 0, 1)), ((1, 2, 0), (0, 1, 0))])
def test_the_file_lies_on_the_source_voxel_by_voxel(model, processor, tmp_path, name, order, flips):
    """Same shape and affine as the source, whatever its orientation; values follow the voxels' places in mm."""
    hu, labels, affine = fine_scan()
    write = write_nifti if name.endswith("gz") else write_itk
    stored, stored_affine = turned(hu, affine, order, flips)
    path = write(tmp_path / name, stored, stored_affine)
    mask_path = write_nifti(tmp_path / "mask.nii.gz", *turned(labels, affine, order, flips))
    volume, grid = read_source(path, is_published=False)
    scan = processor.prepare(volume, mask_path)
    maps = attention_maps(model, scan.volume, scan.mask, ["lung", "aorta"])
    assert set(maps) == {"lung", "aorta"}
    for organ_map in maps.values():
        array = spread(organ_map.weights, grid.patch_of_voxel(scan, organ_map))
        attention.write_nifti(array, grid, tmp_path / "map.nii.gz")
        image = nibabel.load(tmp_path / "map.nii.gz")
        written = image.get_fdata()
        assert written.shape == stored.shape and written.sum() == pytest.approx(1, abs=1e-4)
        np.testing.assert_allclose(image.affine, stored_affine, atol=1e-5)
        np.testing.assert_allclose(image.header.get_qform(), stored_affine, atol=1e-4)
        np.testing.assert_allclose(written, slow_map_on_source(organ_map, scan, stored.shape, stored_affine), atol=1e-7)


def slow_map_on_source(organ_map, scan, shape, affine):
    """Through space: the place of a voxel in mm, the cell of the prepared grid around it, its patch."""
    per_axis = np.sort(np.abs(affine[:3, :3]), axis=1)[:, -1]  # of x, y, z
    corners = [affine @ [*(np.array(index) * (np.array(shape) - 1)), 1] for index in np.ndindex((2, 2, 2))]
    corners = np.transpose(corners)
    # The outer face of the scan where the axes of (depth, height, width) begin: feet, front, right; in RAS+ mm.
    x = corners[0].max() + per_axis[0] / 2
    y = corners[1].max() + per_axis[1] / 2
    z = corners[2].min() - per_axis[2] / 2
    patches, patch_of_voxel = {}, organ_map.patch_of_voxel()
    for index in np.ndindex(shape):
        place = affine @ [*index, 1]
        from_face = np.array([place[2] - z, y - place[1], x - place[0]])
        voxel = [int(mm / edge) - part.start for mm, edge, part in zip(from_face, scan.spacing, scan.box)]
        if all(0 <= at < size for at, size in zip(voxel, scan.mask.shape)):
            patch = tuple(int(along[at]) for along, at in zip(patch_of_voxel, voxel))
            if OUTSIDE not in patch:
                patches[index] = patch
    counts = {}
    for patch in patches.values():
        counts[patch] = counts.get(patch, 0) + 1
    output = np.zeros(shape)
    for index, patch in patches.items():
        output[index] = organ_map.weights[patch] / counts[patch]
    return output


def test_the_peak_is_told_in_millimetres_of_the_source(model, processor, tmp_path):
    hu, labels, affine = fine_scan()
    volume, grid = read_source(write_nifti(tmp_path / "a.nii.gz", hu, affine), is_published=False)
    scan = processor.prepare(volume, write_nifti(tmp_path / "m.nii.gz", labels, affine))
    for organ, label in (("heart", tiny_scan.HEART), ("aorta", tiny_scan.AORTA)):
        organ_map = attention_maps(model, scan.volume, scan.mask, [organ])[organ]
        peak = organ_map.peak_voxel(scan.mask == model.config.organs.index(organ) + 1)
        index = np.linalg.solve(affine, [*grid.position_mm(scan, peak), 1])[:3]
        assert labels[tuple(np.rint(index).astype(int))] == label


def test_on_a_real_ct_the_map_covers_the_organ_of_the_file(shared_dir, tmp_path):
    """In the file's own voxels: all of the organ lies in patches that hold it, and these reach no further."""
    vision = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    vision |= {"volume_size": (48, 64, 64), "patch_size": (4, 8, 8), "feature_levels": ()}
    config = tiny_scan.tiny_config(vision_config=vision, spacing=(3.0, 2.0, 2.0), margin_voxels=(2, 4, 4))
    model = FVLMModel(config).eval()
    processor = FVLMProcessor.from_config(config, tiny_scan.tiny_tokenizer()).image_processor
    paths = [shared_dir / "ct_samples" / f"chest_cta_{name}.nii.gz" for name in ("ct", "seg_v2")]
    volume, grid = read_source(paths[0], is_published=False)
    scan = processor.prepare(volume, paths[1])
    organ_map = attention_maps(model, scan.volume, scan.mask, ["heart"])["heart"]
    attention.write_nifti(spread(organ_map.weights, grid.patch_of_voxel(scan, organ_map)), grid, tmp_path / "m.nii.gz")
    source, written = nibabel.load(paths[0]), nibabel.load(tmp_path / "m.nii.gz")
    assert written.shape == source.shape
    np.testing.assert_allclose(written.affine, source.affine, atol=1e-4)
    is_heart = np.isin(np.asarray(nibabel.load(paths[1]).dataobj), (51, 61))  # heart, atrial_appendage_left
    is_shown = written.get_fdata() > 0
    assert is_heart.sum() > 10_000 and is_shown[is_heart].mean() > 0.995, "one voxel beside the border at most"
    reach = ndimage.distance_transform_edt(~is_heart, sampling=np.abs(np.diag(source.affine)[:3]))
    assert reach[is_shown].max() <= np.linalg.norm((4 * 3, 8 * 2, 8 * 2)) + 3


def test_a_scan_prepared_as_published_keeps_its_grid_too(tmp_path):
    config = tiny_scan.tiny_config(preprocessing="published")
    torch.manual_seed(0)
    model = FVLMModel(config).eval()
    processor = FVLMProcessor.from_config(config, tiny_scan.tiny_tokenizer()).image_processor
    hu, labels, affine = fine_scan()
    paths = [write_nifti(tmp_path / f"{n}.nii.gz", array, affine) for n, array in enumerate((hu, labels))]
    _, grid = read_source(paths[0], is_published=True)
    scan = processor.prepare(*paths)
    assert scan.mask.shape[0] > scan.box[0].stop - scan.box[0].start - 1, "the padding is what is tested here"
    organ_map = attention_maps(model, scan.volume, scan.mask, ["heart"])["heart"]
    attention.write_nifti(
        spread(organ_map.weights, grid.patch_of_voxel(scan, organ_map)), grid, tmp_path / "map.nii.gz"
    )
    image = nibabel.load(tmp_path / "map.nii.gz")
    np.testing.assert_allclose(image.affine, affine, atol=1e-5)
    values, is_heart = image.get_fdata(), labels == tiny_scan.HEART
    assert values.shape == hu.shape and values.sum() == pytest.approx(1, abs=1e-4)
    assert (values[is_heart] > 0).mean() > 0.9, "its mask lies up to half a voxel off, no more"
    assert (values > 0).mean() < 0.3


def test_a_dicom_series_gets_a_grid_of_its_own(model, processor, tmp_path):
    """Its slices have no stored order: the map lies on straight axes, at the places it has over the NIfTI file."""
    hu, labels, affine = fine_scan()
    write_series(tmp_path / "series", *slices_of_nifti(nibabel.Nifti1Image(hu, affine)))
    mask = write_nifti(tmp_path / "mask.nii.gz", labels, affine)
    places = []
    for source in (tmp_path / "series", write_nifti(tmp_path / "a.nii.gz", hu, affine)):
        volume, grid = read_source(source, is_published=False)
        scan = processor.prepare(volume, mask)
        organ_map = attention_maps(model, scan.volume, scan.mask, ["aorta"])["aorta"]
        array = spread(organ_map.weights, grid.patch_of_voxel(scan, organ_map))
        attention.write_nifti(array, grid, tmp_path / "map.nii.gz")
        image = nibabel.load(tmp_path / "map.nii.gz")
        values = image.get_fdata()
        center = [(values * at).sum() / values.sum() for at in np.indices(values.shape)]
        places.append((image.affine @ [*center, 1])[:3])
        assert values.sum() == pytest.approx(1, abs=1e-4)
    np.testing.assert_allclose(*places, atol=0.05)


# Pictures


def test_planes_stand_as_a_radiologist_reads_them():
    array = np.zeros((4, 5, 6), dtype=int)
    array[3, 0, 5] = 1  # head, front, left
    assert plane_of(array, "axial", (3, 2, 2))[0, 5] == 1
    assert plane_of(array, "coronal", (1, 0, 1))[0, 5] == 1
    assert plane_of(array, "sagittal", (1, 1, 5))[0, 0] == 1


def test_an_outline_runs_between_the_pixels():
    region = np.zeros((5, 6), bool)
    region[1:3, 2:6] = True  # to the right border
    region[1, 3] = False  # a dent in its upper side
    edges = outline(region)
    assert len(edges) == 2 * (4 + 2) + 2 and np.allclose(np.abs(edges[:, 1] - edges[:, 0]).sum(1), 1)
    for (x0, y0), (x1, y1) in edges:
        middle = np.array([(x0 + x1) / 2, (y0 + y1) / 2])
        across = np.array([0.5, 0]) if x0 == x1 else np.array([0, 0.5])
        sides = [tuple(np.rint(middle + step * across).astype(int)) for step in (-1, 1)]
        is_inside = [0 <= x < 6 and 0 <= y < 5 and region[y, x] for x, y in sides]
        assert sum(is_inside) == 1
    assert len(outline(region & False)) == 0


def test_a_picture_shows_heat_where_the_map_is_hot():
    rng = np.random.default_rng(0)
    volume = rng.integers(-100, 100, (20, 40, 40)).astype(np.int16)
    heat, is_organ = np.zeros(volume.shape, np.float32), np.zeros(volume.shape, bool)
    is_organ[4:16, 8:32, 8:32] = True
    heat[8:12, 10:20, 22:30] = 1  # to the patient's left, in front
    arguments = (volume, heat, is_organ, (8.0, 4.0, 4.0), (10, 15, 25))
    picture = overlay_png(*arguments, title="a $ in a name")
    assert picture == overlay_png(*arguments, title="a $ in a name")
    with Image.open(io.BytesIO(picture)) as image:
        pixels = np.asarray(image.convert("RGB")).astype(int)
    colored = np.ptp(pixels, axis=2) > 60
    rows, columns = np.nonzero(colored & (pixels[..., 0] > pixels[..., 2] + 40))  # warm
    axial = columns < pixels.shape[1] / 3
    panel = pixels.shape[1] / 3
    assert axial.sum() > 200 and columns[axial].mean() > panel / 2, "the patient's left is on the viewer's right"
    assert rows[axial].mean() < pixels.shape[0] / 2 + 20, "the front is above"
    cyan = (pixels[..., 2] > 180) & (pixels[..., 0] < 110) & (pixels[..., 1] > 150)
    assert cyan.sum() > 150 and 0 < HEAT_OPACITY < 1
    without = overlay_png(volume, heat * 0, is_organ, (8.0, 4.0, 4.0), (10, 15, 25))
    with Image.open(io.BytesIO(without)) as image:
        cold = np.asarray(image.convert("RGB")).astype(int)
    assert ((cold[..., 0] > cold[..., 2] + 40).sum()) == 0


# The command


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    save_for_hub(model, FVLMProcessor.from_config(model.config, tiny_scan.tiny_tokenizer()), folder)
    return folder


def arguments_of(saved, paths, out, *more):
    parser = argparse.ArgumentParser()
    attention.add_arguments(parser)
    options = ["--model", saved, "--volume", paths[0], "--mask", paths[1], "--out", out, *more]
    return parser.parse_args([str(option) for option in options])


def test_the_command_writes_maps_pictures_and_figures(saved, tmp_path, capsys):
    paths = tiny_scan.write_scan(tmp_path)
    assert attention.run(arguments_of(saved, paths, tmp_path / "out", "--organs", "heart", "lung")) == 0
    told = capsys.readouterr().out
    assert "heart:" in told and "aorta" not in told
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {f"attention_{organ}.{kind}" for organ in ("heart", "lung") for kind in ("nii.gz", "png")} | {
        "attention.json"
    }
    figures = json.loads((tmp_path / "out" / "attention.json").read_text())["organs"]["heart"]
    assert 1 <= figures["effective_patches"] <= figures["patches"]
    assert sum(figures["level_shares"]) == pytest.approx(1)
    source = nibabel.load(paths[0])
    for organ in ("heart", "lung"):
        image = nibabel.load(tmp_path / "out" / f"attention_{organ}.nii.gz")
        assert image.shape == source.shape and image.get_fdata().sum() == pytest.approx(1, abs=1e-4)
        np.testing.assert_allclose(image.affine, source.affine)
        assert Image.open(tmp_path / "out" / f"attention_{organ}.png").width > 300


@pytest.mark.parametrize(
    ("organs", "message"),
    [(["hart"], "'hart' is not in config.organs .*nearest: 'heart'"), (["esophagus"], "no voxel of .*it holds.*heart")],
)
def test_organs_that_are_not_there_are_refused(saved, tmp_path, organs, message):
    paths = tiny_scan.write_scan(tmp_path)
    with pytest.raises(EvaluationError, match=message):
        attention.run(arguments_of(saved, paths, tmp_path / "out", "--organs", *organs))
    assert not (tmp_path / "out").exists()


def test_a_missing_file_is_told(saved, tmp_path):
    with pytest.raises(EvaluationError, match="no such file"):
        attention.run(arguments_of(saved, (tmp_path / "none.nii.gz", tmp_path / "none.nii.gz"), tmp_path / "out"))
