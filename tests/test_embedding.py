"""Reading ahead while the tower runs: that it happens, that it is bounded, and that late results are the same."""

import threading

import numpy as np
import pytest
import torch
from datasets import Dataset
from evaluation_samples import tiny_dataset, tiny_model, tiny_rows

from evaluation_fvlm import embedding
from evaluation_fvlm.embedding import embed_split

PATIENCE_S = 20


class WatchedRows:
    """Rows of one window each that say when each of them is read."""

    def __init__(self, count: int):
        self.row, self.count = tiny_rows()[0], count
        self.is_read = [threading.Event() for _ in range(count)]

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, position: int) -> dict:
        self.is_read[position].set()
        return self.row | {"recon_id": f"r{position}"}

    @property
    def num_read(self) -> int:
        return sum(event.is_set() for event in self.is_read)


@pytest.mark.parametrize("num_workers", [1, 3])
def test_next_scans_are_read_while_the_tower_runs_and_no_more(num_workers, monkeypatch):
    rows, model = WatchedRows(12), tiny_model()
    forward, num_forwards = model.get_organ_features, 0

    def slow_forward(**inputs):
        """Return only once the next scans are read: without threads that would never be."""
        nonlocal num_forwards
        num_forwards += 1
        for position in range(min(num_forwards + num_workers, len(rows))):
            assert rows.is_read[position].wait(PATIENCE_S), f"scan {position} is not read while the tower runs"
        assert rows.num_read <= num_forwards + num_workers + 1, "more scans in memory than promised"
        return forward(**inputs)

    monkeypatch.setattr(model, "get_organ_features", slow_forward)
    result = embed_split(model, rows, batch_size=1, num_workers=num_workers)
    assert num_forwards == rows.num_read == 12
    assert result.scans["recon_id"].tolist() == [f"r{n}" for n in range(12)]
    np.testing.assert_array_equal(result.image_embeds, np.repeat(result.image_embeds[:1], 12, axis=0))


def test_results_are_fetched_one_batch_late(monkeypatch):
    order = []
    for name in ("_launch", "_collect"):
        original = getattr(embedding, name)
        monkeypatch.setattr(embedding, name, lambda *args, f=original, n=name: (order.append(n[1]), f(*args))[1])
    embed_split(tiny_model(), Dataset.from_list(tiny_rows()[:2] * 2), batch_size=1)
    assert "".join(order) == "llclclcc"


def test_an_error_in_a_thread_comes_out_and_ends_the_run():
    rows = tiny_rows()
    rows[3]["mask"] = rows[3]["mask"][:-5]
    with pytest.raises(Exception, match="zstd|frame|decompress"):
        embed_split(tiny_model(), Dataset.from_list(rows), batch_size=1)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("ThreadPoolExecutor")]


@pytest.mark.gpu
def test_gpu_gives_what_the_cpu_gives():
    model, dataset = tiny_model(), tiny_dataset()
    expected = embed_split(model, dataset, batch_size=2)
    got = embed_split(model.to("cuda"), dataset, batch_size=2, num_workers=3)
    np.testing.assert_allclose(got.image_embeds, expected.image_embeds, atol=1e-4)
    assert torch.cuda.is_available() and expected.is_present.any()
