"""The benchmark of the gradient cache: it compares what it says, and its figures come from the ways it names."""

import pytest
import torch

from benchmarks import gradient_cache
from benchmarks.measure import Times


def test_patients_are_the_same_however_they_are_read():
    together, apart = gradient_cache.read("small", 3, 2), [gradient_cache.read("small", 3 + n, 1) for n in range(2)]
    for name in ("volume", "organ_token_mask", "organ_is_complete", "caption_hash", "organ_is_abnormal", "row"):
        assert torch.equal(together[name], torch.cat([part[name] for part in apart])), name
    assert len(set(together["caption_hash"].flatten().tolist())) == len(together["text_hash"])


def test_cached_gradients_are_those_of_one_graph():
    threads = torch.get_num_threads()
    assert gradient_cache.gradient_difference(contrast=3, micro=2, threads=None) < 1e-4
    assert torch.get_num_threads() == threads


def test_memory_is_compared_with_the_smallest_contrast(monkeypatch, capsys):
    asked = []

    def measured(function, size, contrast, micro, threads):
        asked.append((size, contrast, micro))
        return (9.0 if micro is None else 1.0 + contrast / 100), Times(contrast, contrast)

    monkeypatch.setattr(gradient_cache, "in_fresh_process", measured)
    assert gradient_cache.main(["--parts", "memory", "full", "--contrasts", "64", "2"]) == 0
    assert asked == [
        *[("small", 2, 2), ("small", 2, None), ("small", 64, 2)],  # 64 in one graph would not fit everywhere
        *[("full", 4, None), ("full", 32, 2)],
    ]
    printed = capsys.readouterr().out
    assert "1.64" in printed and "32 against 32 CPU seconds" in " ".join(printed.split())


def test_an_unknown_part_is_refused():
    with pytest.raises(SystemExit):
        gradient_cache.main(["--parts", "speed"])
