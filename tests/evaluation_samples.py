"""A tiny model, a tokenizer and a tiny processed split, shared by the tests of evaluation_fvlm/ and eval_fvlm.py."""

import json

import numpy as np
import torch
from datasets import Dataset
from transformers import BertTokenizer

from modeling_fvlm import FVLMConfig, FVLMModel
from modeling_fvlm.processed_split import encode_array

ORGANS = ["lung", "heart", "aorta"]
WORDS = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    ".",
    "no",
    "not",
    "there",
    "is",
    "seen",
    "big",
    "small",
    "nodule",
]
TASK = {
    "name": "tiny",
    "version": 1,
    "source": "made up",
    "changes": {1: "first"},
    "items": [
        {
            "finding": "Nodule",
            "organ": "lung",
            "positive": ["Nodule.", "There is nodule."],
            "negative": ["No nodule.", "There is no nodule."],
        },
        {"finding": "Big heart", "organ": "heart", "positive": "Big.", "negative": "Not big."},
        {
            "finding": "Small heart",
            "organ": "heart",
            "positive": ["Small.", "Small is seen."],
            "negative": "Not small.",
        },
        {"finding": "Big aorta", "organ": "aorta", "positive": "Big is seen.", "negative": "Big is not seen."},
    ],
}


def tiny_config(token_selection: str = "all") -> FVLMConfig:
    """Token grid (2, 3, 4), no two edges alike. Windows are trained at (4, 12, 32) voxels."""
    return FVLMConfig(
        vision_config={
            "volume_size": (4, 12, 32),
            "patch_size": (2, 4, 8),
            "num_channels": 2,
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 24,
            "feature_levels": (0,),
            "token_selection": token_selection,
        },
        text_config={
            "model_type": "bert",
            "vocab_size": len(WORDS),
            "hidden_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 24,
            "max_position_embeddings": 32,
        },
        windows=[
            {"hu_min": -1150.0, "hu_max": 350.0, "mean": 0.5, "std": 0.3},
            {"hu_min": -60.0, "hu_max": 140.0, "mean": 0.4, "std": 0.5},
        ],
        organs=ORGANS,
        projection_dim=8,
        pooling_num_heads=2,
        max_text_length=16,
        spacing=(3.0, 1.0, 1.0),
    )


def tiny_model(token_selection: str = "all", seed: int = 0) -> FVLMModel:
    """Random weights large enough that scans, organs and windows get clearly different embeddings."""
    model = FVLMModel(tiny_config(token_selection))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.5, generator=generator)
            elif name == "temperature.value":
                parameter.fill_(0.5)
    return model.eval()


def tiny_tokenizer() -> BertTokenizer:
    return BertTokenizer(vocab={word: n for n, word in enumerate(WORDS)})


def tiny_scan(shape: tuple[int, int, int], boxes: dict[str, tuple], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """HU noise of a different level per organ, and a mask of boxes `organ: ((z0, z1), (y0, y1), (x0, x1))`."""
    rng = np.random.default_rng(seed)
    volume = rng.integers(-300, 100, shape).astype(np.int16)
    mask = np.zeros(shape, np.uint8)
    for organ, box in boxes.items():
        part = tuple(slice(*edges) for edges in box)
        mask[part] = ORGANS.index(organ) + 1
        volume[part] += np.int16(rng.integers(-200, 200))
    return volume, mask


def tiny_rows() -> list[dict]:
    """Five scans: smaller than the window, of its size, larger in every axis; with an organ absent, cut, too long."""
    scans = [
        ((4, 10, 30), {"lung": ((1, 3), (1, 8), (2, 20)), "heart": ((1, 2), (3, 9), (8, 15))}),  # no aorta
        ((4, 12, 32), {"lung": ((1, 3), (2, 9), (3, 9)), "aorta": ((0, 3), (5, 7), (20, 24))}),  # no heart, aorta cut
        (
            (9, 30, 70),
            {
                "lung": ((1, 8), (1, 28), (2, 66)),
                "heart": ((2, 4), (20, 27), (50, 61)),
                "aorta": ((6, 8), (2, 4), (3, 7)),
            },
        ),  # lung longer than the window in every axis
        ((7, 11, 45), {"lung": ((2, 5), (3, 7), (10, 30)), "heart": ((2, 5), (3, 6), (31, 44))}),  # one axis smaller
        ((9, 30, 70), {"heart": ((7, 9), (25, 30), (60, 70)), "aorta": ((1, 3), (2, 5), (30, 33))}),  # in a corner
    ]
    values = {"Nodule": [1, 0, 1, 0, 1], "Big heart": [1, 0, 0, -1, 1], "Big aorta": [0, 0, 1, 1, 0]}
    rows = []
    for n, (shape, boxes) in enumerate(scans):
        volume, mask = tiny_scan(shape, boxes, seed=n)
        rows.append(
            {
                "patient_id": f"valid_{n // 2}",
                "scan_id": f"valid_{n // 2}_{'ab'[n % 2]}",
                "recon_id": f"valid_{n // 2}_{'ab'[n % 2]}_1",
                "volume": encode_array(volume),
                "mask": encode_array(mask),
                "shape": list(shape),
                "spacing": [3.0, 1.0, 1.0],
                "labels": [{"finding": finding, "value": known[n]} for finding, known in values.items()],
            }
        )
    return rows


def tiny_dataset() -> Dataset:
    return Dataset.from_list(tiny_rows())


def tiny_manifest(**settings) -> dict:
    organ_set = {"name": "custom", "organs": ORGANS, "classes": {}}
    return {"settings": {"organ_set": organ_set, "spacing": [3.0, 1.0, 1.0], "margin_voxels": [5, 20, 20]} | settings}


def write_tiny_split(folder, rows: list[dict] | None = None, train: list[dict] | None = None, **settings) -> None:
    """A processed split on disk, as `datasets.load_dataset` and the command read it; `train`: of a second split."""
    (folder / "volumes").mkdir(parents=True)
    card = "configs:\n- config_name: volumes\n  default: true\n  data_files:\n"
    for split, members in {"validation": rows or tiny_rows(), "train": train}.items():
        if members is not None:
            Dataset.from_list(members).to_parquet(folder / "volumes" / f"{split}-00000-of-00001.parquet")
            card += f"  - split: {split}\n    path: volumes/{split}-*.parquet\n"
    (folder / "README.md").write_text(f"---\n{card}---\n")
    (folder / "manifest.json").write_text(json.dumps(tiny_manifest(**settings)))
