"""A scan, a tokenizer and a config so small that a test with a model takes milliseconds. No two edges are alike."""

from pathlib import Path

import nibabel
import numpy as np
from transformers import BertTokenizerFast

from modeling_fvlm import FVLMConfig

WORDS = [
    "lung",
    "heart",
    "esophagus",
    "aorta",
    "shows",
    "no",
    "significant",
    "abnormalities",
    ".",
    "not",
    "emphysema",
    "nodule",
    "cardiomegaly",
    "dilated",
]
# LAS on disk: width already grows to the left, height has to be turned.
AFFINE = np.array([[-2.0, 0, 0, 30], [0, 3.0, 0, -10], [0, 0, 4.0, 7], [0, 0, 0, 1]])
LUNG, HEART, AORTA = 10, 51, 52  # labels of TotalSegmentator v2


def tiny_config(**changes) -> FVLMConfig:
    settings = {
        "vision_config": {
            **{"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32},
            **{"volume_size": (8, 12, 32), "patch_size": (2, 4, 8), "feature_levels": (0,)},
        },
        "text_config": {
            **{"model_type": "bert", "vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1},
            **{"num_attention_heads": 2, "intermediate_size": 32, "max_position_embeddings": 64},
        },
        **{"organ_set": "chest_4", "projection_dim": 8, "pooling_num_heads": 2, "max_text_length": 24},
        **{"spacing": (4.0, 3.0, 2.0), "margin_voxels": (1, 2, 2)},
    }
    return FVLMConfig(**{**settings, **changes})


def tiny_tokenizer() -> BertTokenizerFast:
    vocab = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    return BertTokenizerFast(vocab={word: index for index, word in enumerate(vocab)})


def tiny_scan(depth: int = 10, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """HU and v2 labels as stored (x, y, z), on the spacing of `tiny_config`.

    A lung that the scan's lowest slice cuts, a heart inside, an aorta far to the left and high up, no esophagus.
    """
    hu = np.random.default_rng(seed).integers(-1100, 500, (60, 14, depth)).astype(np.int16)
    labels = np.zeros(hu.shape, dtype=np.uint8)
    labels[4:12, 3:9, 0:5] = LUNG
    labels[14:20, 4:8, 2:6] = HEART
    labels[50:54, 5:7, depth - 4 : depth - 2] = AORTA
    return hu, labels


def write_scan(folder: Path, depth: int = 10, seed: int = 0) -> tuple[Path, Path]:
    """The same as two NIfTI files: volume and mask."""
    hu, labels = tiny_scan(depth, seed)
    paths = folder / f"ct_{depth}_{seed}.nii.gz", folder / f"mask_{depth}_{seed}.nii.gz"
    for path, array in zip(paths, (hu, labels)):
        nibabel.save(nibabel.Nifti1Image(array, AFFINE), path)
    return paths
