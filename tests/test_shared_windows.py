"""Few windows for many organs: each organ whole, never more windows than one each, the same ones every time."""

import numpy as np
import pytest
from datasets import Dataset
from evaluation_samples import tiny_model, tiny_rows, tiny_scan

from evaluation_fvlm.embedding import embed_split
from evaluation_fvlm.errors import EvaluationError
from evaluation_fvlm.windows import WindowRule, organ_boxes, organ_windows, shared_windows
from modeling_fvlm.processed_split import encode_array

EXACT = WindowRule((4, 12, 32), (2, 4, 8))
SHARED = WindowRule((4, 12, 32), (2, 4, 8), shared=True)


def random_mask(seed: int, num_organs: int = 6) -> np.ndarray:
    """Organs in boxes, later ones over earlier ones, some longer than a window, some covered up."""
    rng = np.random.default_rng(seed)
    shape = tuple(int(edge) for edge in rng.integers(2, (14, 40, 90)))
    mask = np.zeros(shape, np.uint8)
    for organ in range(num_organs):
        low = rng.integers(0, shape)
        high = np.minimum(low + rng.integers(1, (7, 18, 40) if organ == 0 else (5, 13, 25)), shape)
        mask[tuple(slice(a, b) for a, b in zip(low, high))] = organ + 1
    return mask


def fewest_windows(boxes, shape) -> int:
    """Try every way to put the organs into groups whose common box fits a window: slow, and hard to get wrong."""
    lengths = [min(edge, extent) for edge, extent in zip(EXACT.size, shape)]

    def fits(group) -> bool:
        return all(
            max(box[axis].stop for box in group) - min(box[axis].start for box in group) <= lengths[axis]
            for axis in range(3)
        )

    def groups(rest) -> int:
        if not rest:
            return 0
        first, others = rest[0], rest[1:]
        best = len(rest)
        for choice in range(2 ** len(others)):
            group = [first, *(box for n, box in enumerate(others) if choice >> n & 1)]
            if fits(group):
                best = min(best, 1 + groups([box for n, box in enumerate(others) if not choice >> n & 1]))
        return best

    boxes = [box for box in boxes if box is not None]
    long = [box for box in boxes if not fits([box])]
    return groups([box for box in boxes if fits([box])]) + len(organ_windows(long, shape, EXACT))


def test_every_organ_is_whole_in_few_windows():
    saved = best = 0
    for seed in range(60):
        mask = random_mask(seed)
        boxes = organ_boxes(mask, 6)
        exact, shared = organ_windows(boxes, mask.shape, EXACT), organ_windows(boxes, mask.shape, SHARED)
        assert len(shared) <= len(exact)
        assert list(shared.items()) == list(organ_windows(boxes, mask.shape, SHARED).items())
        served = sorted(organ for organs in shared.values() for organ in organs)
        assert served == [organ for organ in range(6) if (mask == organ + 1).any()]
        own = {organ: window for window, organs in exact.items() for organ in organs}
        for window, organs in shared.items():
            taken = window.take(mask, 0)
            assert taken.shape == window.size
            for organ in organs:
                assert (taken == organ + 1).sum() == (mask == organ + 1).sum() > 0
                # Longer than a window: the organ keeps its own; else the network sees the size that it was trained on.
                assert window == own[organ] if own[organ].size != EXACT.size else window.size == EXACT.size
        saved += len(exact) - len(shared)
        best += len(shared) == fewest_windows(boxes, mask.shape)
    assert saved > 60 and best >= 55, (saved, best)


def test_centred_windows_stay_where_the_greedy_search_saves_nothing():
    """It takes the small organs of both groups first and leaves two large ones: three windows where two are exact."""
    edges = [(4, 36), (19, 21), (19, 21), (28, 60), (43, 45), (43, 45)]
    boxes = [(slice(0, 2), slice(0, 2), slice(*ends)) for ends in edges]
    exact = organ_windows(boxes, (4, 12, 90), EXACT)
    assert sorted(exact.values()) == [[0, 1, 2], [3, 4, 5]]
    assert len(shared_windows(boxes, (4, 12, 90), SHARED)) == 3
    assert organ_windows(boxes, (4, 12, 90), SHARED) == exact
    apart = [(slice(0, 2), slice(0, 2), slice(start, start + 3)) for start in (0, 40, 80)]
    assert organ_windows(apart, (4, 12, 90), SHARED) == organ_windows(apart, (4, 12, 90), EXACT)


def test_a_shared_window_is_centred_on_its_organs():
    boxes = [None, (slice(3, 5), slice(10, 12), slice(40, 44)), (slice(4, 6), slice(14, 17), slice(50, 56))]
    (window,) = organ_windows(boxes, (9, 30, 90), SHARED)
    assert window.crop == ((2, 6), (7, 19), (32, 64))  # around ((3, 6), (10, 17), (40, 56)), rounded down


def test_embeddings_come_from_the_shared_windows():
    far = {
        "lung": ((1, 4), (2, 9), (3, 12)),
        "heart": ((3, 5), (5, 11), (20, 30)),
        "aorta": ((0, 3), (20, 26), (60, 66)),
    }
    volume, mask = tiny_scan((9, 30, 70), far, seed=7)
    row = tiny_rows()[0] | {"volume": encode_array(volume), "mask": encode_array(mask), "shape": list(mask.shape)}
    model, dataset = tiny_model(), Dataset.from_list([*tiny_rows()[:2], row])
    exact, shared = (embed_split(model, dataset, rule=rule) for rule in (EXACT, SHARED))
    assert (shared.num_windows, exact.num_windows) == (4, 5)
    np.testing.assert_array_equal(shared.is_present, exact.is_present)
    np.testing.assert_array_equal(shared.is_complete, exact.is_complete)
    np.testing.assert_allclose(np.linalg.norm(shared.image_embeds, axis=-1), exact.is_present, atol=1e-6)
    difference = np.abs(shared.image_embeds - exact.image_embeds).max(axis=2)
    assert difference[2, :2].min() > 1e-3 and difference[2, 2] < 1e-6, "the aorta has its window for itself"
    np.testing.assert_allclose(shared.image_embeds[:2], exact.image_embeds[:2], atol=1e-6)  # one window in any case


def test_published_windows_are_not_shared():
    with pytest.raises(EvaluationError, match="as published, one per organ, or shared"):
        WindowRule((4, 12, 32), (2, 4, 8), published=True, shared=True)
