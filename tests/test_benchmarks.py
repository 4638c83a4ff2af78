"""The benchmarks' own parts: the baseline gives the model's numbers, ways take turns, results are written out."""

import json

import pytest
import torch
from torch.nn import functional as F

from benchmarks import measure, published
from benchmarks.pooling import our_flags
from modeling_fvlm import FVLMConfig, FVLMModel
from modeling_fvlm.loss import organ_contrastive_loss

ORGANS, PATCH = 5, (4, 4, 8)


def tiny_model() -> FVLMModel:
    vision = {"volume_size": (16, 16, 32), "patch_size": PATCH, "hidden_size": 16, "num_hidden_layers": 2}
    vision |= {"num_attention_heads": 2, "intermediate_size": 32, "feature_levels": [0]}
    text = {"model_type": "bert", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text |= {"intermediate_size": 32, "vocab_size": 60}
    torch.manual_seed(0)
    config = FVLMConfig(
        organs=[f"organ_{number}" for number in range(ORGANS)],
        vision_config=vision,
        text_config=text,
        pooling_num_heads=2,
        projection_dim=8,
    )
    model = FVLMModel(config).eval()
    torch.nn.init.normal_(model.organ_pooling.query_tokens, std=0.5)
    return model


def tiny_mask() -> torch.Tensor:
    mask = torch.zeros(2, 16, 16, 32, dtype=torch.uint8)
    mask[0, 2:9, 3:9, 4:20], mask[0, 0:3, 3:9, 22:30] = 1, 2  # organ 2 is cut
    mask[1, 2:5, 10:14, 1:31], mask[1, 9:14, 2:9, 9:17], mask[1, 10, 10, 20] = 3, 1, 5
    return mask


def test_the_baseline_finds_the_same_flags():
    for ours, theirs in zip(our_flags(tiny_mask(), ORGANS, PATCH), published.organ_flags(tiny_mask(), ORGANS, PATCH)):
        assert torch.equal(ours, theirs) and theirs.any() and not theirs.all()


def test_the_baseline_pools_and_embeds_captions_alike():
    model = tiny_model()
    organ_tokens, _ = our_flags(tiny_mask(), ORGANS, PATCH)
    levels = [torch.randn(2, organ_tokens.shape[2], 16, generator=torch.Generator().manual_seed(n)) for n in range(2)]
    ours = model.organ_pooling(tuple(levels), organ_tokens)[0]
    theirs = published.pool_organs(model, published.pooling_attention(model), levels, organ_tokens)
    is_present = organ_tokens.any(-1)
    torch.testing.assert_close(ours[is_present], theirs[is_present], rtol=1e-5, atol=1e-6)

    ids = torch.randint(1, 60, (ORGANS, 2, 12), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[:, 0, 7:] = 0
    theirs = published.embed_captions(model, ids, mask)
    ours = model.get_text_features(ids.flatten(0, 1), mask.flatten(0, 1)).view(ORGANS, 2, -1).transpose(0, 1)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_the_baseline_has_the_same_loss():
    generator = torch.Generator().manual_seed(5)
    image, text = (F.normalize(torch.randn(6, 3, 8, generator=generator), dim=-1) for _ in range(2))
    captions = [["a", "b", "a", "c", "n", "n"], ["n"] * 6, ["a", "n", "b", "n", "n", "c"]]
    is_abnormal = torch.tensor([[caption != "n" for caption in row] for row in captions]).T
    is_valid = torch.rand(6, 3, generator=generator) > 0.3
    caption_id = torch.tensor([[ord(caption) for caption in row] for row in captions]).T
    theirs = published.organ_losses(image, text, captions, is_abnormal, is_valid, torch.tensor(0.07))
    ours = organ_contrastive_loss(image, text, caption_id, is_abnormal, is_valid, 1 / 0.07)
    torch.testing.assert_close(ours.organ_losses, theirs, rtol=1e-5, atol=1e-6)
    assert ours.organ_is_active.tolist() == [True, False, True]


def test_ways_take_turns_each_warmed_up():
    order = []
    times = measure.in_turns({"baseline": lambda: order.append("A"), "ours": lambda: order.append("B")}, repeats=2)
    assert "".join(order) == "AABBAABB" and list(times) == ["baseline", "ours"]
    whole = times["ours"] * 2 + times["ours"]
    assert abs(whole.wall - 3 * times["ours"].wall) < 1e-12


def test_results_are_written_as_a_list_of_objects(tmp_path):
    result = measure.Result("text/4", measure.Times(8.0, 9.0), measure.Times(2.0, 3.0), 1e-6, "a note", bound_s=0.5)
    measure.report([result], tmp_path / "out" / "r.json")
    (written,) = json.loads((tmp_path / "out" / "r.json").read_text())
    promised = {"name": "text/4", "baseline_s": 8.0, "ours_s": 2.0, "ratio": 4.0, "max_rel_diff": 1e-6}
    promised |= {"bound_s": 0.5, "distance": 4.0, "baseline_wall_s": 9.0}
    assert promised.items() <= written.items()


def test_differences_are_relative_to_the_baseline():
    one, other = torch.tensor([1.0, -20.0]), torch.tensor([1.0, -10.0])
    assert measure.relative_difference([one], [other]) == 1.0
    assert measure.relative_difference([torch.tensor([float("nan"), 1])], [torch.tensor([1.0, 1])]) == float("inf")
    for ours, baseline in (([], []), ([torch.ones(2)], [torch.ones(1)])):
        with pytest.raises(ValueError, match="compare"):
            measure.relative_difference(ours, baseline)
    assert measure.relative_difference([torch.tensor([3e-9])], [torch.tensor([1e-9])]) < 1e-8, "noise is not divided"


def test_operations_are_counted_and_bound_the_time():
    one = torch.ones(8, 16)
    assert measure.count_flop(lambda: one @ one.T) == 2 * 8 * 16 * 8
    query = torch.ones(2, 3, 5, 4, requires_grad=True)
    attend = lambda: F.scaled_dot_product_attention(query, query, query).sum().backward()  # noqa: E731
    one_product = 2 * 2 * 3 * 5 * 5 * 4
    assert measure.count_flop(attend) == 7 * one_product, "two forward, five backward: the logits are made again"
    assert measure.Peak(100.0).seconds(250) == 2.5
    assert measure.measure_peak(edge=64).flop_per_cpu_s > 0
