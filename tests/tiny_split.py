"""A processed split of a few kilobytes in the form the data builders write, for tests of whoever reads one.

Three organs in volumes of some 10 x 18 x 36 voxels. A patient's organ is abnormal when its brightness says so, and the
caption names the brightness: a model can learn it, and a shuffled control cannot.
"""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from modeling_fvlm.captions import normal_caption
from modeling_fvlm.processed_split import encode_array

ORGANS = ("lung", "heart", "aorta")
SPACING = (3.0, 1.0, 1.0)
MARGIN = (1, 2, 2)
SIZE = (8, 16, 32)  # the crop of the model the tests train
FINDINGS = {"lung": ("Nodule.", "Effusion."), "heart": ("Enlarged.", "Calcified."), "aorta": ("Wide.", "Dissected.")}

_CAPTION = pa.struct(
    [("organ", pa.string()), ("caption", pa.string()), ("is_abnormal", pa.bool_()), ("is_mentioned", pa.bool_())]
)
_LABEL = pa.struct([("finding", pa.string()), ("value", pa.int8())])
SCHEMA = pa.schema(
    [
        *((name, pa.string()) for name in ("patient_id", "scan_id", "recon_id")),
        *((name, pa.binary()) for name in ("volume", "mask")),
        ("shape", pa.list_(pa.int32(), 3)),
        ("spacing", pa.list_(pa.float32(), 3)),
        ("captions", pa.list_(_CAPTION)),
        *((name, pa.string()) for name in ("findings", "impression")),
        ("labels", pa.list_(_LABEL)),
    ]
)
CARD = """---
configs:
- config_name: volumes
  default: true
  data_files:
  - {split: train, path: volumes/train-*.parquet}
  - {split: validation, path: volumes/validation-*.parquet}
---
# Tiny split for tests
"""


def tiny_row(number: int, *, seed: int = 0, cut: bool = False) -> dict:
    """One reconstruction. With `cut` its lung reaches the volume's first slice, as if the scan had ended there."""
    generator = np.random.default_rng((seed, number))
    shape = tuple(int(size + extra) for size, extra in zip(SIZE, generator.integers(0, 5, 3)))
    volume = generator.normal(-400, 60, shape).clip(-1024, 3000).astype(np.int16)
    mask = np.zeros(shape, np.uint8)
    captions, labels = [], []
    for organ_index, organ in enumerate(ORGANS):
        start = (2 + int(generator.integers(0, 2)), 3 + int(generator.integers(0, 4)), 3 + 9 * organ_index)
        box = tuple(slice(low, low + extent) for low, extent in zip(start, (3, 7, 7)))
        if cut and organ == "lung":
            box = (slice(0, 4), *box[1:])
        kind = int(generator.integers(0, 3))  # 0 is normal
        mask[box] = organ_index + 1
        volume[box] = (-100, 250, 900)[kind] + generator.normal(0, 30, volume[box].shape)
        caption = normal_caption(organ) if kind == 0 else FINDINGS[organ][kind - 1]
        captions.append({"organ": organ, "caption": caption, "is_abnormal": kind > 0, "is_mentioned": kind > 0})
        labels += [
            {"finding": f"{organ} {name}".rstrip("."), "value": int(kind == value)}
            for value, name in enumerate(FINDINGS[organ], start=1)
        ]
    return {
        "patient_id": f"train_{number}",
        "scan_id": f"train_{number}_a",
        "recon_id": f"train_{number}_a_1",
        "volume": encode_array(volume),
        "mask": encode_array(mask),
        "shape": list(shape),
        "spacing": list(SPACING),
        "captions": captions,
        "findings": " ".join(entry["caption"] for entry in captions),
        "impression": "",
        "labels": labels,
    }


def write_tiny_split(
    folder: Path, train: int = 24, validation: int = 8, rows: dict[str, list[dict]] | None = None
) -> Path:
    """Write a split of so many patients (or of the given `rows` per split) into a folder and return it."""
    rows = rows or {
        "train": [tiny_row(number) for number in range(train)],
        "validation": [tiny_row(number, seed=1) for number in range(validation)],
    }
    (folder / "volumes").mkdir(parents=True)
    for split, of_split in rows.items():
        path = folder / "volumes" / f"{split}-00000-of-00001.parquet"
        with pq.ParquetWriter(path, SCHEMA, compression="none") as writer:
            for row in of_split:
                writer.write_table(pa.Table.from_pylist([row], schema=SCHEMA))
    (folder / "README.md").write_text(CARD, encoding="utf-8")
    settings = {
        "organ_set": {"name": "tiny", "organs": list(ORGANS), "classes": {organ: {} for organ in ORGANS}},
        "spacing": SPACING,
        "margin_voxels": MARGIN,
    }
    (folder / "manifest.json").write_text(json.dumps({"tool": "test", "settings": settings}), encoding="utf-8")
    return folder


TINY_RECIPE = """
name: tiny
version: 1
model:
  projection_dim: 8
  pooling_num_heads: 2
  pooling_dropout: 0.0
  text_pooling: mean
  organ_reduction: mean
  max_text_length: 24
  windows:
    - {hu_min: -1150, hu_max: 350, mean: auto, std: auto}
    - {hu_min: 100, hu_max: 1600, mean: auto, std: auto}
  vision_config: {volume_size: [8, 16, 32], patch_size: [2, 4, 8], hidden_size: 16, num_hidden_layers: 2,
    num_attention_heads: 2, intermediate_size: 32, feature_levels: [0], token_selection: organs, hidden_dropout: 0.0,
    attention_dropout: 0.0}
  text_encoder:
    vocab_size: 120
    from_scratch: {hidden_size: 16, num_hidden_layers: 1, num_attention_heads: 2, intermediate_size: 32,
      hidden_dropout_prob: 0.1, attention_probs_dropout_prob: 0.0}
training: {per_device_train_batch_size: 4, per_device_eval_batch_size: 3, max_steps: 6, learning_rate: 2e-3,
  warmup_steps: 0.1, logging_steps: 2, save_steps: 3, eval_strategy: steps, eval_steps: 3, use_cpu: true,
  disable_tqdm: true, seed: 0}
"""
