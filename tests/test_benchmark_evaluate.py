"""The evaluation benchmark: its baseline gives our embeddings, its scans are bodies, its counts those of the run."""

import json

import numpy as np
import pytest
import torch
from evaluation_samples import tiny_dataset, tiny_model, tiny_rows

from benchmarks import evaluate
from benchmarks.measure import Peak
from evaluation_fvlm.embedding import embed_split
from evaluation_fvlm.windows import WindowRule, organ_boxes, window_of_organ
from modeling_fvlm.gemm import GemmChoice
from modeling_fvlm.processed_split import decode_volume

RULE = WindowRule((4, 12, 32), (2, 4, 8))


def test_the_baseline_embeds_alike_by_materialised_attention():
    model, used = tiny_model(), set()
    torch.nn.init.normal_(model.organ_pooling.query_tokens, std=0.5)
    tokens = []
    for block in model.vision_model.blocks:
        block.register_forward_hook(lambda *_: used.add(model.vision_model.config._attn_implementation))
        block.mlp.register_forward_hook(lambda module, args, output: tokens.append(output.shape[1]))
    ours = embed_split(model, tiny_dataset())
    assert used == {"sdpa"}
    used.clear(), tokens.clear()
    for scan, row in enumerate(tiny_rows()):
        volume, mask = decode_volume(row)
        for organ_index, box in enumerate(organ_boxes(mask, 3)):
            if box is not None:
                window = window_of_organ(box, mask.shape, RULE)
                embeds = evaluate.embed_organ(model, volume, mask, organ_index, window)
                np.testing.assert_allclose(embeds, ours.image_embeds[scan, organ_index], atol=2e-6)
    blocks = len(model.vision_model.blocks)
    assert all(tokens[::blocks] == tokens[n::blocks] for n in range(blocks)), "every token, in every block"
    assert used == {"eager"} and np.std(ours.image_embeds[ours.is_present], axis=0).min() > 0.01


def test_compare_counts_and_compares_what_it_ran(monkeypatch):
    monkeypatch.setattr(evaluate, "choose_gemm_backend", lambda: GemmChoice("blas", {}))
    model, dataset = tiny_model(), tiny_dataset()
    results = evaluate.compare(model, dataset, RULE, "evaluate/3", baseline_organs=99, repeats=1, peak=Peak(1e9))
    assert [result.name for result in results] == [
        "evaluate/3/fp32",
        "evaluate/3/best_fp32",
        "evaluate/3/shared_windows",
    ]
    exact, best, shared = results
    assert exact.max_rel_diff < 1e-5 and best.max_rel_diff < 1e-5 and shared.max_rel_diff is None
    expected = embed_split(model, dataset, rule=RULE)
    for result in results:
        assert result.extra["organs_per_scan"] == expected.is_present.sum() / 5
        assert result.baseline == exact.baseline and result.baseline.cpu > 0 and result.ours.cpu > 0
    assert exact.extra["windows_per_scan"] == expected.num_windows / 5 >= shared.extra["windows_per_scan"]
    assert 0.5 < shared.extra["least_cosine"] <= shared.extra["mean_cosine"] <= 1 + 1e-6
    assert f"baseline timed on {expected.is_present.sum()} organs" in exact.note

    # Windows that are not computed twice are not counted twice.
    assert exact.bound_s > shared.bound_s > 0 or expected.num_windows == shared.extra["windows_per_scan"] * 5
    assert best.ours == exact.ours, "the same code"


def test_a_part_of_the_baseline_stands_for_all_organs_of_its_window_size(monkeypatch):
    """Every organ's forward takes 2 s of a false clock: 11 organs of 5 scans are 22 s, however few are run."""
    ran = []
    monkeypatch.setattr(evaluate, "choose_gemm_backend", lambda: GemmChoice("blas", {}))
    monkeypatch.setattr(
        evaluate, "embed_organ", lambda model, volume, mask, organ, window: ran.append(organ) or torch.ones(8)
    )

    def two_seconds_an_organ(ways, repeats):
        times = {}
        for name, way in ways.items():
            ran.clear()
            way()
            times[name] = evaluate.Times(2.0 * len(ran), 2.0 * len(ran))
        return times

    monkeypatch.setattr(evaluate, "in_turns", two_seconds_an_organ)
    found = int(embed_split(tiny_model(), tiny_dataset()).is_present.sum())
    for baseline_organs in (1, 2, 99):
        results = evaluate.compare(tiny_model(), tiny_dataset(), RULE, "evaluate/3", baseline_organs, 1, Peak(1e9))
        assert results[0].baseline.cpu == pytest.approx(2.0 * found / 5)
        assert results[0].max_rel_diff > 0.1, "false embeddings are seen"


def test_scans_are_bodies_cut_to_their_organs(monkeypatch, tmp_path, capsys):
    volume, mask = evaluate.phantom_scan("chest_4", "chest", 1, coarse=(2, 4, 4))
    assert volume.shape == mask.shape and volume.dtype == np.int16 and mask.dtype == np.uint8
    assert set(np.unique(mask)) == {0, 1, 2, 3, 4}
    for axis in (1, 2):  # along depth the scan itself may end within the margin
        planes = mask.any(axis=tuple({0, 1, 2} - {axis}))
        assert planes[20] and planes[-21] and not planes[:20].any() and not planes[-20:].any()
    assert volume[mask == 1].mean() < -500 < 0 < volume[mask == 2].mean()  # lung, heart

    # The command from scans to file, all but the model and the clock.
    monkeypatch.setattr(evaluate, "CASES", {4: ("chest_4", "chest")})
    monkeypatch.setattr(evaluate, "COVERAGES", ["chest"])
    monkeypatch.setattr(evaluate, "SURVEYED", 1)
    monkeypatch.setattr(evaluate, "phantom_scan", lambda *given: (volume[:, ::4, ::4], mask[:, ::4, ::4]))
    monkeypatch.setattr(evaluate, "measure_peak", lambda: Peak(1e12))
    seen = {}

    def compare(model, dataset, rule, name, *_):
        seen.update(name=name, size=rule.size, mode=model.training, shape=decode_volume(dataset[0])[1].shape)
        return [evaluate.Result(f"{name}/fp32", evaluate.Times(2, 2), evaluate.Times(1, 1), 0.0)]

    monkeypatch.setattr(evaluate, "compare", compare)
    monkeypatch.setattr(evaluate, "make_model", lambda organs: tiny_model())
    assert evaluate.main(["--organs", "4", "--patients", "2", "--json", str(tmp_path / "r.json")]) == 0
    assert seen["name"] == "evaluate/4" and seen["size"] == (4, 12, 32) and not seen["mode"]
    (written,) = json.loads((tmp_path / "r.json").read_text())
    assert written["name"] == "evaluate/4/fp32" and written["windows_of_coverages"]["chest"]["organs"] == 4
    assert "4 organs" in capsys.readouterr().out
