"""A checkpoint of the published size: converted within twice its own memory, and the published forward on a real CT."""

import subprocess
import sys
import time

import pytest
import torch
from published_forward import organ_embeddings, published_layout, text_embedding
from tiny_scan import WORDS

from modeling_fvlm import FVLMModel, FVLMProcessor

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

FULL_SIZE = {"width": 768, "text_width": 768, "dim": 256, "organs": 4, "patch": (16, 16, 32), "grid": (7, 16, 11)}
FULL_SIZE |= {"vocab": 30522, "text_layers": 12}
SENTENCES = ["Aorta dilated.", "No lung nodule. Heart shows no significant abnormalities."]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Random weights, of the size of trained ones, in the published layout, and a vocabulary of their size."""
    folder = tmp_path_factory.mktemp("full")
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for name, shape in published_layout(FULL_SIZE).items():
        weights[name] = torch.empty(shape).normal_(std=0.03, generator=generator)
        if "norm" in name.lower() and name.endswith("weight"):
            weights[name] += 1
    weights["query_tokens"] *= 30  # attention far from uniform
    weights["temp"] = torch.tensor(0.07)
    weights["text_encoder.embeddings.position_ids"] = torch.arange(512)[None]
    torch.save({"model": weights, "config": {"run": {}}, "scaler": None, "epoch": 29}, folder / "fvlm.pth")
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    fill = [f"word{index}" for index in range(FULL_SIZE["vocab"] - len(special) - len(WORDS))]
    (folder / "vocab.txt").write_text("\n".join([*special, *WORDS, *fill]))
    return folder, weights


# The child's own peak: VmHWM is what its memory held at most, pages mapped from the file included.
CHILD = """
import sys
from training_fvlm.convert import main
status = main(sys.argv[1:])
(peak,) = [line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")]
print("peak kB", peak)
sys.exit(status)
"""


@pytest.fixture(scope="module")
def converted(checkpoint):
    folder, _ = checkpoint
    start = time.perf_counter()
    words = ["--weights", str(folder / "fvlm.pth"), "--vocab", str(folder / "vocab.txt"), "--out", str(folder / "out")]
    run = subprocess.run([sys.executable, "-c", CHILD, *words], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    size = (folder / "fvlm.pth").stat().st_size
    peak = 1024 * int(run.stdout.split("peak kB")[1])
    seconds = time.perf_counter() - start
    print(f"{size / 1e6:.0f} MB in {seconds:.1f} s, peak {peak / 1e6:.0f} MB = {peak / size:.2f}x")
    return folder / "out", peak / size


def test_the_peak_is_at_most_twice_the_file(converted):
    assert converted[1] <= 2


def test_embeddings_of_a_real_ct_are_those_of_the_published_forward(checkpoint, converted, shared_dir):
    _, weights = checkpoint
    samples = shared_dir / "ct_samples"
    model, processor = FVLMModel.from_pretrained(converted[0]).eval(), FVLMProcessor.from_pretrained(converted[0])
    files = samples / "chest_cta_ct.nii.gz", samples / "chest_cta_seg_v2.nii.gz"
    features = processor(volumes=[files[0]], masks=[files[1]])
    with torch.no_grad():
        organs = model.get_organ_features(**features)
        crop, mask = features["pixel_values"][0], features["organ_mask"][0]
        expected = organ_embeddings(weights, crop, mask, 12, 4, FULL_SIZE["grid"])
        present = [embedding is not None for embedding in expected]
        assert organs.organ_is_present[0].tolist() == present and sum(present) >= 3
        for organ, embedding in enumerate(expected):
            if embedding is not None:
                torch.testing.assert_close(organs.image_embeds[0, organ], embedding, rtol=0, atol=1e-5)
        first, second = [embedding for embedding in expected if embedding is not None][:2]
        assert (first - second).abs().max() > 1e-2, "embeddings all alike would compare nothing"

        encoded = processor(text=SENTENCES)
        texts = model.get_text_features(**encoded)
        for text, ids, mask in zip(texts, encoded["input_ids"], encoded["attention_mask"], strict=True):
            torch.testing.assert_close(text, text_embedding(weights, ids, mask, 12), rtol=0, atol=1e-5)
        assert (texts[0] - texts[1]).abs().max() > 1e-2
