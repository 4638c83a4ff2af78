"""The memory benchmark: each way in a process of its own, its peak seen whole, the baseline continued on a line."""

import json
import os

import pytest
import torch
from benchmark_model import narrow_model

from benchmarks import memory
from benchmarks.inputs import make_batch
from benchmarks.measure import Times
from benchmarks.memory import Usage

NARROW = (narrow_model, make_batch)


def peak_of(gigabytes: float) -> tuple[int, Usage]:
    """Usage of a process whose first step holds so much for a moment."""
    sizes = [int(gigabytes * 1e9) // 4, 1, 1]
    return os.getpid(), memory.measure_steps(lambda: torch.ones(sizes.pop(0)).sum(), repeats=2)


def test_a_process_of_its_own_and_its_largest_size():
    process, usage = memory.in_fresh_process(peak_of, 0.5)
    assert process != os.getpid()
    # Freed again before the last step, and before the process is asked.
    assert 0.5 <= usage.peak_gb - usage.start_gb < 0.7 and usage.start_gb > 0.1
    with pytest.raises(MemoryError, match="killed"):
        memory.in_fresh_process(os.abort)


def test_every_way_takes_its_steps(monkeypatch):
    """In this process, whose memory says nothing: what runs, with which dropout and which checkpointing."""
    seen, enabled = [], []
    measured = memory.measure_steps
    monkeypatch.setattr(memory, "measure_steps", lambda step, repeats: seen.append(repeats) or measured(step, repeats))
    monkeypatch.setattr(
        memory.OurStep, "__init__", recording(memory.OurStep.__init__, lambda model: enabled.append(blocks(model)))
    )
    steps = []
    monkeypatch.setattr(memory.OurStep, "step", lambda self, attention_dropout: steps.append(attention_dropout))
    monkeypatch.setattr(memory.PublishedStep, "step", lambda self: steps.append(self.text_organs))
    for way in (memory.PLAIN, memory.CHECKPOINTING, memory.BASELINE):
        usage = memory.measure_way(way, 3, 2, 1, None, NARROW)
        assert usage.peak_gb >= usage.start_gb > 0
    assert steps == [True, True, True, True, 2, 2] and seen == [1, 1, 1]
    assert enabled == [{False}, {True}], "the blocks of both towers"


def recording(function, record):
    """`function` of a step and its model, which is recorded."""

    def called(step, model, batch):
        record(model)
        function(step, model, batch)

    return called


def blocks(model) -> set[bool]:
    """Whether the blocks of the two towers are computed again."""
    towers = [*model.vision_model.blocks, *model.text_model.encoder.layer]
    assert len(towers) == 4
    return {block.gradient_checkpointing for block in towers}


def test_checkpointing_has_the_same_gradients_under_dropout(monkeypatch):
    assert memory.checkpointing_difference(3, None, NARROW) < 1e-6
    monkeypatch.setattr(memory.torch, "manual_seed", lambda seed: None)
    assert memory.checkpointing_difference(3, None, NARROW) > 1e-3, "another dropout is seen"


def test_the_baseline_is_continued_on_a_line(monkeypatch):
    asked, free = [], []

    def run(function, way, num_organs, text_organs, *_):
        asked.append((way, num_organs, text_organs))
        return Usage(1.0, 5.0 + text_organs, Times(10.0 + 3 * text_organs, 20.0 + text_organs))

    monkeypatch.setattr(memory, "in_fresh_process", run)
    monkeypatch.setattr(memory, "require_memory", lambda needed_gb, what: free.append(needed_gb))
    usage, note = memory.measure_baseline(24, (4, 2), 1, None)
    assert asked == [("baseline", 24, 2), ("baseline", 24, 4)] and free[0] < free[1]
    assert usage.peak_gb == pytest.approx(29.0) and usage.time.cpu == pytest.approx(82.0)
    assert usage.time.wall == pytest.approx(44.0)
    assert "2 and 4 organs, 7.00 and 9.00 GB" in note and "straight line to 24" in note

    asked.clear()
    usage, note = memory.measure_baseline(4, (2, 4), 1, None)
    assert asked == [("baseline", 4, 4)] and usage.peak_gb == 9.0 and "straight line" not in note


def test_what_would_not_fit_is_refused(monkeypatch):
    monkeypatch.setattr(memory, "memory_gb", lambda field, path: {"MemAvailable": 3.2}[field])
    memory.require_memory(3.0, "a step")
    with pytest.raises(MemoryError, match="a step needs about 16 GB and 3.2 GB are free: end other programs"):
        memory.require_memory(16.0, "a step")


def test_a_missing_report_is_named(tmp_path):
    (tmp_path / "status").write_text("Name:\tpython\nVmHWM:\t  2000 kB\n")
    assert memory.memory_gb("VmHWM", str(tmp_path / "status")) == pytest.approx(0.002048)
    with pytest.raises(RuntimeError, match="no line VmRSS: this benchmark needs Linux"):
        memory.memory_gb("VmRSS", str(tmp_path / "status"))


def test_the_file_holds_gigabytes_and_their_ratio(monkeypatch, tmp_path, capsys):
    peaks = {"baseline": 30.0, "fp32": 6.0, "checkpointing": 5.0}

    def run(function, *arguments):
        if function is memory.checkpointing_difference:
            return 0.0
        way, num_organs, text_organs = arguments[:3]
        return Usage(1.0, peaks[way] * (text_organs / 24 if way == "baseline" else 1), Times(2.0, 1.0))

    monkeypatch.setattr(memory, "in_fresh_process", run)
    monkeypatch.setattr(memory, "require_memory", lambda needed_gb, what: None)
    monkeypatch.setenv("MALLOC_MMAP_MAX_", "0")
    monkeypatch.delenv("MALLOC_TRIM_THRESHOLD_", raising=False)  # `make test` sets both
    assert memory.main(["--json", str(tmp_path / "r.json")]) == 0
    plain, checkpointing = json.loads((tmp_path / "r.json").read_text())
    assert (plain["name"], checkpointing["name"]) == ("memory/24/fp32", "memory/24/checkpointing")
    assert plain["baseline_gb"] == pytest.approx(30.0) and plain["ours_gb"] == 6.0
    assert plain["ratio"] == pytest.approx(5.0) and checkpointing["ratio"] == pytest.approx(6.0)
    assert plain["max_rel_diff"] is None and checkpointing["max_rel_diff"] == 0.0
    assert plain["baseline_s"] == plain["ours_s"] == pytest.approx(2.0), "seconds stay beside the memory"
    assert "MALLOC_MMAP_MAX_ set" in plain["note"] and "straight line" in plain["note"]
    assert "30.00" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        memory.main(["--baseline_organs", "4", "4"])
