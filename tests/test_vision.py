"""The 3D ViT against a tower written out with torch's own layers, and packed tokens against each patient alone."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from modeling_fvlm import FVLMVisionConfig, FVLMVisionModel, vision
from modeling_fvlm.vision import all_patches, chosen_patches, select_tokens, token_grid, window_patches

WINDOWS = [
    {"hu_min": -1150, "hu_max": 350, "mean": 0.3, "std": 0.25},
    {"hu_min": -60.0, "hu_max": 140.0, "mean": 0.5, "std": 0.4},
]
GRID = (2, 3, 4)  # no two edges alike: a swapped axis fails
VOLUME_SIZE, PATCH_SIZE = (4, 12, 32), (2, 4, 8)


def make_tower(attention="sdpa", **fields):
    fields = {
        "volume_size": VOLUME_SIZE,
        "patch_size": PATCH_SIZE,
        "num_channels": 2,
        "hidden_size": 16,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "intermediate_size": 24,
        "feature_levels": (0, 1),
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        **fields,
    }
    config = FVLMVisionConfig(**fields)
    config._attn_implementation = attention
    torch.manual_seed(0)
    tower = FVLMVisionModel(config)
    with torch.no_grad():  # weights of a size at which every part of the tower shows in the output
        for parameter in tower.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return tower


def slow_positions(tower, grid):
    """Trilinear interpolation, one new position at a time: the centres of both grids' cells are aligned."""
    old, learned = tower.embeddings.position_grid, tower.embeddings.position_embeddings
    rows = []
    for cell in [(z, y, x) for z in range(grid[0]) for y in range(grid[1]) for x in range(grid[2])]:
        total = 0
        places = [min(max((c + 0.5) * o / g - 0.5, 0), o - 1) for c, o, g in zip(cell, old, grid)]
        for corner in [(z, y, x) for z in (0, 1) for y in (0, 1) for x in (0, 1)]:
            weight, index = 1.0, []
            for place, side, edge in zip(places, corner, old):
                low = int(place)
                weight *= place - low if side else 1 - (place - low)
                index.append(min(low + side, edge - 1))
            total = total + weight * learned[(index[0] * old[1] + index[1]) * old[2] + index[2]]
        rows.append(total)
    return torch.stack(rows)


def slow_levels(tower, pixel_values, tokens=None):
    """The tower over one patient with torch's conv3d, nn.MultiheadAttention and nothing packed: `tokens` cut out."""
    embeddings, config = tower.embeddings, tower.config
    hidden = F.conv3d(pixel_values[None], embeddings.projection.weight, embeddings.projection.bias, PATCH_SIZE)
    grid = tuple(hidden.shape[2:])
    hidden = hidden[0].flatten(1).T + slow_positions(tower, grid)
    hidden = hidden if tokens is None else hidden[tokens]
    levels = []
    for index, block in enumerate(tower.blocks):
        attention = nn.MultiheadAttention(config.hidden_size, config.num_attention_heads, batch_first=True)
        parameters = {
            "in_proj_weight": block.attention.qkv.weight,
            "in_proj_bias": block.attention.qkv.bias,
            "out_proj.weight": block.attention.out_proj.weight,
            "out_proj.bias": block.attention.out_proj.bias,
        }
        normed = block.norm1(hidden)
        hidden = hidden + torch.func.functional_call(attention, parameters, (normed, normed, normed))[0]
        hidden = hidden + block.mlp.linear2(F.gelu(block.mlp.linear1(block.norm2(hidden))))
        if index in config.feature_levels:
            levels.append(hidden)
    return [*levels, tower.norm(hidden)]


def gradients(tower, levels):
    """Gradients of a weighted sum in which no token and no level counts like another."""
    total = sum((level * torch.arange(1, level.numel() + 1).view_as(level).cos()).sum() for level in levels)
    names, parameters = zip(*tower.named_parameters())
    return dict(zip(names, torch.autograd.grad(total, parameters, retain_graph=True)))


def assert_same_gradients(ours, theirs):
    assert ours.keys() == theirs.keys() and all(grad.any() for grad in theirs.values())
    for name, grad in theirs.items():
        error = (ours[name] - grad).abs().max()
        assert error <= 1e-5 * grad.norm() + 1e-6, f"{name}: {error} off, norm {grad.norm()}"


@pytest.fixture
def pixel_values():
    return torch.randn(3, 2, *VOLUME_SIZE, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def organ_token_mask():
    """Three patients with 9 different, 4 shared and no tokens over two organs."""
    mask = torch.zeros(3, 2, 24, dtype=torch.bool)
    mask[0, 0, [1, 5, 6, 7, 23]] = True
    mask[0, 1, [0, 5, 11, 12, 13]] = True
    mask[1, :, [2, 3, 19, 22]] = True
    return mask


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_levels_and_gradients_equal_the_tower_written_out(pixel_values, attention):
    tower = make_tower(attention)
    output = tower(pixel_values, output_hidden_states=True)
    slow = [torch.stack(level) for level in zip(*(slow_levels(tower, patient) for patient in pixel_values))]
    assert len(output.feature_levels) == len(slow) == 3 and slow[0].shape == (3, 24, 16)
    for ours, theirs in zip(output.feature_levels, slow):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert_same_gradients(gradients(tower, output.feature_levels), gradients(tower, slow))

    assert len(output.hidden_states) == 4 and output.token_index is None
    for ours, level in zip((output.hidden_states[1], output.hidden_states[2], output.hidden_states[-1]), slow):
        torch.testing.assert_close(ours, level, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_tokens_equal_each_patient_alone_with_only_its_tokens(pixel_values, organ_token_mask, attention):
    tower = make_tower(attention, token_selection="organs")
    output = tower(pixel_values, organ_token_mask)
    kept = [[0, 1, 5, 6, 7, 11, 12, 13, 23], [2, 3, 19, 22], [0]]  # a patient without organs keeps the first token
    assert output.token_is_real.tolist() == [[place < len(tokens) for place in range(9)] for tokens in kept]
    for patient, tokens in enumerate(kept):
        assert output.token_index[patient, : len(tokens)].tolist() == tokens
    slow = [slow_levels(tower, patient, tokens) for patient, tokens in zip(pixel_values, kept)]
    ours = [level[output.token_is_real] for level in output.feature_levels]
    theirs = [torch.cat(level) for level in zip(*slow)]
    for our_level, their_level in zip(ours, theirs):
        torch.testing.assert_close(our_level, their_level, rtol=1e-4, atol=1e-5)
    assert_same_gradients(gradients(tower, ours), gradients(tower, theirs))


def test_equal_numbers_of_tokens_need_no_mask(pixel_values):
    mask = torch.zeros(3, 2, 24, dtype=torch.bool)
    for patient in range(3):
        mask[patient, 0, patient : patient + 5] = True
    tower = make_tower(token_selection="organs")
    output = tower(pixel_values, mask)
    assert output.token_is_real is None and output.feature_levels[0].shape == (3, 5, 16)
    slow = torch.stack([slow_levels(tower, pixel_values[i], list(range(i, i + 5)))[-1] for i in range(3)])
    torch.testing.assert_close(output.feature_levels[-1], slow, rtol=1e-4, atol=1e-5)


def test_organ_selection_without_a_mask_is_refused(pixel_values):
    with pytest.raises(ValueError, match="needs organ_token_mask"):
        make_tower(token_selection="organs")(pixel_values)


def test_padded_attention_runs_in_the_fused_kernel(pixel_values, organ_token_mask):
    """The padding mask must not send attention to the path that materialises it: here that path is forbidden."""
    tower = make_tower(token_selection="organs").train()
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        tower(pixel_values, organ_token_mask).feature_levels[-1].sum().backward()


@pytest.mark.parametrize("volume_size", [(2, 4, 8), (6, 16, 24), (4, 12, 64)])
def test_other_grids_interpolate_positions(volume_size):
    tower = make_tower()
    grid = token_grid(volume_size, PATCH_SIZE)
    expected = slow_positions(tower, grid)
    torch.testing.assert_close(tower.embeddings.interpolated_positions(grid), expected, rtol=1e-5, atol=1e-6)
    pixel_values = torch.randn(2, *volume_size, generator=torch.Generator().manual_seed(2))
    output = tower(pixel_values[None]).feature_levels[-1][0]
    torch.testing.assert_close(output, slow_levels(tower, pixel_values)[-1], rtol=1e-4, atol=1e-5)


def test_trained_grid_uses_positions_as_they_are():
    embeddings = make_tower().embeddings
    assert embeddings.interpolated_positions(GRID) is embeddings.position_embeddings


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("dtype", [torch.int16, torch.float32])
def test_patches_are_cut_as_a_walk_over_the_grid_cuts_them(channels, dtype):
    volume = torch.randint(-1000, 1000, (2, channels, *VOLUME_SIZE), generator=torch.Generator().manual_seed(3)).to(
        dtype
    )
    walk = [
        patient[:, z : z + 2, y : y + 4, x : x + 8].reshape(channels, -1)
        for patient in volume
        for z in range(0, 4, 2)
        for y in range(0, 12, 4)
        for x in range(0, 32, 8)
    ]
    patches = all_patches(volume, PATCH_SIZE)
    assert torch.equal(patches, torch.stack(walk))
    token_index = torch.tensor([[3, 0, 23], [7, 8, 8]])
    expected = torch.stack([walk[i] for i in (3, 0, 23, 24 + 7, 24 + 8, 24 + 8)])
    assert torch.equal(chosen_patches(volume, PATCH_SIZE, token_index), expected)
    strided = volume.transpose(3, 4).contiguous().transpose(3, 4)  # the same values in another memory order
    assert torch.equal(chosen_patches(strided, PATCH_SIZE, token_index), expected)


@pytest.mark.parametrize("seed", range(3))
def test_selected_tokens_are_those_with_an_organ(seed):
    mask = torch.rand(6, 3, 24, generator=torch.Generator().manual_seed(seed)) < 0.1
    token_index, token_is_real = select_tokens(mask)
    expected = [[token for token in range(24) if patient[:, token].any()] for patient in mask]
    assert len({len(tokens) for tokens in expected}) > 1, "equal numbers would test no padding"
    assert [row[real].tolist() for row, real in zip(token_index, token_is_real)] == expected


def test_volume_in_hu_is_windowed_inside(organ_token_mask):
    volume = torch.randint(
        -1500, 2000, (3, 1, *VOLUME_SIZE), generator=torch.Generator().manual_seed(4), dtype=torch.int16
    )
    channels = [
        (((volume.double() - w["hu_min"]) / (w["hu_max"] - w["hu_min"])).clamp(0, 1) - w["mean"]) / w["std"]
        for w in WINDOWS
    ]
    pixel_values = torch.cat(channels, 1).float()
    patches = window_patches(all_patches(volume, PATCH_SIZE), WINDOWS, torch.float32)
    torch.testing.assert_close(patches, all_patches(pixel_values, PATCH_SIZE), rtol=1e-6, atol=1e-6)
    for selection in ("all", "organs"):
        tower = make_tower(token_selection=selection)
        ours = tower(volume, organ_token_mask, windows=WINDOWS).feature_levels[-1]
        torch.testing.assert_close(ours, tower(pixel_values, organ_token_mask).feature_levels[-1], rtol=1e-4, atol=1e-5)


def test_checkpointed_blocks_give_the_same_gradients(pixel_values, organ_token_mask):
    tower = make_tower(token_selection="organs").train()
    plain = gradients(tower, tower(pixel_values, organ_token_mask).feature_levels)
    tower.activation_checkpointing_enable()
    calls = []
    tower.blocks[0].norm1.register_forward_hook(lambda *_: calls.append(1))
    checkpointed = gradients(tower, tower(pixel_values, organ_token_mask).feature_levels)
    assert len(calls) == 2, "the block was not run again in the backward pass: nothing was checkpointed"
    assert_same_gradients(checkpointed, plain)


@pytest.mark.parametrize("kind", ["hidden_dropout", "attention_dropout"])
def test_dropout_acts_in_training_alone(pixel_values, kind):
    tower = make_tower(**{kind: 0.3}).eval()
    assert torch.equal(*(tower(pixel_values).feature_levels[-1] for _ in range(2)))
    tower.train()
    assert not torch.equal(*(tower(pixel_values).feature_levels[-1] for _ in range(2)))


def test_a_crop_that_does_not_fit_the_patches_is_refused():
    with pytest.raises(ValueError, match="height 13 is no positive multiple of patch 4; pad it to 16"):
        make_tower()(torch.zeros(1, 2, 4, 13, 32))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_last_block_computes_the_organs_tokens_alone(attention):
    """Levels at organ tokens, and what flows back from them, are those of the whole block."""
    tower = make_tower(attention).train()
    generator = torch.Generator().manual_seed(4)
    pixel_values = torch.randn(2, 2, *VOLUME_SIZE, generator=generator)
    organ_token_mask = torch.zeros(2, 3, 24, dtype=torch.bool)
    organ_token_mask[0, 0, [2, 5, 23]] = organ_token_mask[0, 2, [5, 6]] = organ_token_mask[1, 1, 20] = True
    direction = torch.randn(2, 24, 16, generator=generator) * organ_token_mask.any(1)[..., None]
    rows = []
    tower.blocks[-1].mlp.linear1.register_forward_hook(lambda module, args, output: rows.append(output.shape[1]))
    results = []
    for few in (True, False):
        levels = tower(pixel_values, organ_token_mask if few else None).feature_levels
        gradients = torch.autograd.grad((levels[-1] * direction).sum(), list(tower.parameters()))
        results.append([*levels[:-1], levels[-1] * organ_token_mask.any(1)[..., None], *gradients])
    assert rows == [4, 24], "the longest sample has four tokens in organs"
    for few, whole in zip(*results):
        torch.testing.assert_close(few, whole, rtol=1e-5, atol=1e-5)
    tower(pixel_values, torch.ones(2, 1, 24, dtype=torch.bool))
    tower(pixel_values, organ_token_mask, output_hidden_states=True)
    assert rows[2:] == [24, 24], "too many tokens, or somebody reads all"


@pytest.mark.parametrize("selection", ["all", "organs"])
def test_attention_with_dropout_is_wired_as_attention_without(selection, monkeypatch):
    """At a rate that rounds to nothing the kernel with dropout runs and drops nothing: masks and scaling must agree."""
    calls = []
    kernel = vision.attention_with_dropout
    monkeypatch.setattr(vision, "attention_with_dropout", lambda *given: calls.append(1) or kernel(*given))
    tower = make_tower(attention_dropout=1e-7, token_selection=selection)
    organ_token_mask = torch.zeros(2, 1, 24, dtype=torch.bool)
    organ_token_mask[0, 0, [2, 5, 23]] = organ_token_mask[1, 0, 20] = True
    pixel_values = torch.randn(2, 2, *VOLUME_SIZE, generator=torch.Generator().manual_seed(4))
    results = []
    for is_training in (True, False):
        output = tower.train(is_training)(pixel_values, organ_token_mask)
        level = output.feature_levels[-1]
        if selection == "organs":
            level = level * output.token_is_real[..., None]
        results.append([level, *torch.autograd.grad(level.square().sum(), list(tower.parameters()))])
    assert len(calls) == 3, "in training, once for every block"
    for dropped, plain in zip(*results):
        torch.testing.assert_close(dropped, plain, rtol=1e-4, atol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        tower.train()(pixel_values, organ_token_mask)
    assert len(calls) == 3, "what is not float32 goes to PyTorch"
