"""A straightforward reading of the published forward, under the published names: plain torch, organ by organ.

Slow and obvious on purpose; nothing of ours is used. What the published code does that is easily ported wrong: the
text encoder adds no token types and masks with -10000; the levels are raw outputs of blocks 3, 6, 9 and the normed
last; an organ's query sees that organ's tokens of all four; position embeddings are trilinear on other grids.
"""

import math

import torch
from torch import nn
from torch.nn import functional as F


def linear(weights, name, x):
    return F.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])


def norm(weights, name, x, eps):
    return F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], eps)


def attend(query, key, value, num_heads, bias=0.0):
    """Attention of `(tokens, width)` arrays, head by head."""
    size = query.shape[1] // num_heads
    heads = []
    for head in range(num_heads):
        part = slice(head * size, (head + 1) * size)
        logits = query[:, part] @ key[:, part].T / math.sqrt(size) + bias
        heads.append(logits.softmax(-1) @ value[:, part])
    return torch.cat(heads, dim=1)


def vision_levels(weights, crop, num_heads, position_grid):
    """The four levels of one crop `(1, depth, height, width)`, windowed: each `(tokens, width)`."""
    name = "visual_encoder.patch_embedding"
    kernel = weights[f"{name}.patch_embeddings.weight"]
    tokens = F.conv3d(crop[None], kernel, weights[f"{name}.patch_embeddings.bias"], stride=kernel.shape[2:])
    positions = weights[f"{name}.position_embeddings"]
    if tokens.shape[2:] != torch.Size(position_grid):
        volume = positions[0].T.reshape(1, -1, *position_grid)
        volume = F.interpolate(volume, size=tokens.shape[2:], mode="trilinear", align_corners=False)
        positions = volume.flatten(2).transpose(1, 2)
    x = (tokens.flatten(2).transpose(1, 2) + positions)[0]
    num_blocks = 1 + max(int(name.split(".")[2]) for name in weights if name.startswith("visual_encoder.blocks."))
    levels = []
    for index in range(num_blocks):
        block = f"visual_encoder.blocks.{index}"
        query, key, value = linear(weights, f"{block}.attn.qkv", norm(weights, f"{block}.norm1", x, 1e-5)).chunk(3, 1)
        x = x + linear(weights, f"{block}.attn.out_proj", attend(query, key, value, num_heads))
        hidden = F.gelu(linear(weights, f"{block}.mlp.linear1", norm(weights, f"{block}.norm2", x, 1e-5)))
        x = x + linear(weights, f"{block}.mlp.linear2", hidden)
        if index in (3, 6, 9):
            levels.append(x)
    return [*levels, norm(weights, "visual_encoder.norm", x, 1e-5)]


def organ_embeddings(weights, crop, mask, num_heads, pooling_heads, position_grid):
    """Embedding of every organ in a label map `(depth, height, width)`, None where absent."""
    levels = vision_levels(weights, crop, num_heads, position_grid)
    width = levels[0].shape[1]
    attention = nn.MultiheadAttention(width, pooling_heads, batch_first=True).eval()
    prefix = "attention."
    attention.load_state_dict({n.removeprefix(prefix): t for n, t in weights.items() if n.startswith(prefix)})
    patch = weights["visual_encoder.patch_embedding.patch_embeddings.weight"].shape[2:]
    embeddings = []
    for organ in range(len(weights["query_tokens"])):
        held = F.max_pool3d((mask == organ + 1).float()[None], tuple(patch)).flatten().bool()
        if not held.any():
            embeddings.append(None)
            continue
        tokens = torch.cat([level[held] for level in levels])[None]
        pooled, _ = attention(weights["query_tokens"][organ][None, None], tokens, tokens)
        embeddings.append(F.normalize(linear(weights, f"vision_projs.{organ}", pooled[0, 0]), dim=-1))
    return embeddings


def text_embedding(weights, input_ids, attention_mask, num_heads):
    """Embedding of one caption: ids and mask `(tokens,)`."""
    embeddings = "text_encoder.embeddings"
    x = weights[f"{embeddings}.word_embeddings.weight"][input_ids]
    x = x + weights[f"{embeddings}.position_embeddings.weight"][: len(input_ids)]
    x = norm(weights, f"{embeddings}.LayerNorm", x, 1e-12)
    bias = (1.0 - attention_mask.float()) * -10000.0
    index = 0
    while f"text_encoder.encoder.layer.{index}.output.dense.weight" in weights:
        layer = f"text_encoder.encoder.layer.{index}"
        query, key, value = (linear(weights, f"{layer}.attention.self.{n}", x) for n in ("query", "key", "value"))
        context = linear(weights, f"{layer}.attention.output.dense", attend(query, key, value, num_heads, bias))
        x = norm(weights, f"{layer}.attention.output.LayerNorm", context + x, 1e-12)
        hidden = linear(weights, f"{layer}.output.dense", F.gelu(linear(weights, f"{layer}.intermediate.dense", x)))
        x = norm(weights, f"{layer}.output.LayerNorm", hidden + x, 1e-12)
        index += 1
    return F.normalize(linear(weights, "text_proj", x[0]), dim=-1)


def published_layout(sizes: dict) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a published checkpoint; `sizes` as in FULL_SIZE of test_convert_full_size."""
    width, text, dim, organs = sizes["width"], sizes["text_width"], sizes["dim"], sizes["organs"]
    layout = {"temp": (), "query_tokens": (organs, width)}
    layout |= {"attention.in_proj_weight": (3 * width, width), "attention.in_proj_bias": (3 * width,)}

    def add(name, out, into):
        layout.update({f"{name}.weight": (out, into), f"{name}.bias": (out,)})

    def add_norm(name, size):
        layout.update({f"{name}.weight": (size,), f"{name}.bias": (size,)})

    add("attention.out_proj", width, width)
    for organ in range(organs):
        add(f"vision_projs.{organ}", dim, width)
    add("text_proj", dim, text)
    patch = "visual_encoder.patch_embedding"
    layout[f"{patch}.patch_embeddings.weight"] = (width, 1, *sizes["patch"])
    layout[f"{patch}.patch_embeddings.bias"] = (width,)
    layout[f"{patch}.position_embeddings"] = (1, math.prod(sizes["grid"]), width)
    for index in range(12):
        block = f"visual_encoder.blocks.{index}"
        add(f"{block}.attn.qkv", 3 * width, width)
        add(f"{block}.attn.out_proj", width, width)
        add(f"{block}.mlp.linear1", 4 * width, width)
        add(f"{block}.mlp.linear2", width, 4 * width)
        add_norm(f"{block}.norm1", width)
        add_norm(f"{block}.norm2", width)
    add_norm("visual_encoder.norm", width)
    embeddings = "text_encoder.embeddings"
    layout[f"{embeddings}.word_embeddings.weight"] = (sizes["vocab"], text)
    layout[f"{embeddings}.position_embeddings.weight"] = (512, text)
    add_norm(f"{embeddings}.LayerNorm", text)
    for index in range(sizes["text_layers"]):
        layer = f"text_encoder.encoder.layer.{index}"
        for name in ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"):
            add(f"{layer}.{name}", text, text)
        add_norm(f"{layer}.attention.output.LayerNorm", text)
        add(f"{layer}.intermediate.dense", 4 * text, text)
        add(f"{layer}.output.dense", text, 4 * text)
        add_norm(f"{layer}.output.LayerNorm", text)
    add("text_encoder.cls.predictions.decoder", sizes["vocab"], text)
    return layout
