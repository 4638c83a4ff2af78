"""Tiles hold every voxel of a scan once, and the pooling over them is attention over all their tokens."""

import itertools

import numpy as np
import pytest
import torch
from tiny_scan import tiny_config
from torch import nn
from torch.nn import functional as F

from modeling_fvlm import FVLMModel
from modeling_fvlm.geometry import AIR_HU, crop_or_pad
from modeling_fvlm.whole_volume import cover_with_tiles, embed_whole_volume

SIZE, PATCH = (8, 12, 32), (2, 4, 8)


def model_of(token_selection="all"):
    torch.manual_seed(0)
    vision = {**tiny_config().vision_config.to_dict(), "token_selection": token_selection}
    model = FVLMModel(tiny_config(vision_config=vision)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.3)
    return model


def scan_of(shape, seed=0):
    return np.random.default_rng(seed).integers(-1000, 500, shape).astype(np.int16)


def tensors_of(scan):
    tiles = cover_with_tiles(scan.shape, SIZE, PATCH)
    crops = np.stack([crop_or_pad(scan, tile.start, SIZE, AIR_HU) for tile in tiles])
    return torch.from_numpy(crops), torch.from_numpy(np.stack([tile.token_mask for tile in tiles]))


@pytest.mark.parametrize(
    "shape", [(8, 12, 32), (5, 11, 3), (9, 13, 33), (1, 1, 1), (16, 30, 70), (23, 12, 64), (8, 25, 31)]
)
def test_every_voxel_is_kept_once(shape):
    counts = np.zeros(shape, int)
    for tile in cover_with_tiles(shape, SIZE, PATCH):
        grid = [edge // patch for edge, patch in zip(SIZE, PATCH)]
        kept = [cell for cell in itertools.product(*map(range, grid)) if tile.token_mask.reshape(grid)[cell]]
        assert kept, "a tile that is forwarded for nothing"
        for cell in kept:
            first = [start + patch * place for start, patch, place in zip(tile.start, PATCH, cell)]
            part = tuple(slice(max(0, low), max(0, low + patch)) for low, patch in zip(first, PATCH))
            assert counts[part].size, "a patch that holds nothing but padding"
            counts[part] += 1
    assert (counts == 1).all()


def test_a_scan_of_the_tiles_size_is_one_tile_and_longer_ones_overlap():
    (tile,) = cover_with_tiles(SIZE, SIZE, PATCH)
    assert tile.start == (0, 0, 0) and tile.token_mask.all()
    first, second = cover_with_tiles((10, 12, 32), SIZE, PATCH)
    assert (first.start, second.start) == ((0, 0, 0), (2, 0, 0))
    kept = first.token_mask.reshape(4, 3, 4).all(axis=(1, 2)), second.token_mask.reshape(4, 3, 4).all(axis=(1, 2))
    assert [list(each) for each in kept] == [[True, True, True, False], [False, False, True, True]]


@pytest.mark.parametrize("token_selection", ["all", "organs"])
def test_one_tile_is_the_models_own_answer_for_organs_that_own_everything(token_selection):
    model, scan = model_of(token_selection), scan_of(SIZE)
    everything = torch.ones(1, len(model.config.organs), 48, dtype=torch.bool)
    with torch.no_grad():
        expected = model.get_organ_features(
            volume=torch.from_numpy(scan)[None], organ_token_mask=everything, organ_is_complete=everything.any(-1)
        ).image_embeds[0]
        torch.testing.assert_close(embed_whole_volume(model, *tensors_of(scan)), expected, rtol=0, atol=1e-6)
    assert (expected - expected[:1]).abs().max() > 0.1, "organs that answer alike would compare nothing"


def slow_embeds(model, tiles, token_masks):
    """Organ by organ with PyTorch's own attention, over the tokens of all tiles and levels side by side."""
    pooling, hidden = model.organ_pooling, model.config.vision_config.hidden_size
    attention = nn.MultiheadAttention(hidden, pooling.num_heads, batch_first=True).eval()
    attention.load_state_dict(
        {
            "in_proj_weight": pooling.in_proj_weight,
            "in_proj_bias": pooling.in_proj_bias,
            "out_proj.weight": pooling.out_proj.weight,
            "out_proj.bias": pooling.out_proj.bias,
        }
    )
    tokens = []
    for tile, token_mask in zip(tiles, token_masks):
        levels = model.vision_model(tile[None, None], windows=model.config.windows).feature_levels
        tokens += [level[0][token_mask] for level in levels]
    tokens = torch.cat(tokens)[None]
    embeds = []
    for query, (weight, bias) in zip(pooling.query_tokens, model.organ_projection.organ_parameters()):
        pooled, _ = attention(query[None, None], tokens, tokens)
        embeds.append(F.normalize(F.linear(pooled[0, 0], weight, bias), dim=-1))
    return torch.stack(embeds)


@pytest.mark.parametrize("shape", [(10, 14, 60), (5, 25, 20)])
def test_tiles_are_pooled_together(shape):
    model = model_of()
    tiles, token_masks = tensors_of(scan_of(shape))
    assert len(tiles) > 1
    with torch.no_grad():
        found = embed_whole_volume(model, tiles, token_masks)
        torch.testing.assert_close(found, slow_embeds(model, tiles, token_masks), rtol=0, atol=1e-5)
        one = embed_whole_volume(model, tiles[:1], token_masks[:1])
    assert (found - one).abs().max() > 1e-3, "the other tiles must be at work"


@pytest.mark.parametrize("token_selection", ["all", "organs"])
def test_tiles_may_share_a_forward(token_selection):
    model = model_of(token_selection)
    tiles, token_masks = tensors_of(scan_of((10, 14, 60)))
    with torch.no_grad():
        alone = embed_whole_volume(model, tiles, token_masks)
        for batch_size in (3, 8):
            together = embed_whole_volume(model, tiles, token_masks, batch_size)
            torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)


def test_padding_says_nothing():
    """A scan smaller than the tile: what stands in patches of padding alone is not pooled."""
    model = model_of("organs")
    scan = scan_of((4, 12, 32))
    tiles, token_masks = tensors_of(scan)
    assert token_masks.sum() == 24
    with torch.no_grad():
        expected = embed_whole_volume(model, tiles, token_masks)
        tiles[:, 0] = 500
        tiles[:, -1] = -300
        torch.testing.assert_close(embed_whole_volume(model, tiles, token_masks), expected, rtol=0, atol=0)
