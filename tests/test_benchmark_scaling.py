"""The scaling benchmark: what is timed, what the step is held against, and the picture."""

import json

import pytest
from benchmark_model import narrow_model

from benchmarks import scaling
from benchmarks.inputs import Batch, make_batch
from benchmarks.measure import Peak, Times
from benchmarks.scaling import Point, Points


class LinearPoints(Points):
    """Points of a made-up clock: 10 s, 1 s an organ's pooling, 0.25 s a caption, twice that for captions of 52."""

    def __init__(self, pooling: float = 0.0):
        super().__init__(1, Peak(1.0))
        self.pooling, self.asked = pooling, []

    def at(self, num_organs: int, batch_size: int = 2, mean_tokens: int = 26) -> Point:
        self.asked.append((num_organs, batch_size, mean_tokens))
        captions = 0.25 * num_organs * batch_size * mean_tokens / 26
        step = 5.0 * batch_size + self.pooling * num_organs + captions
        tokens = num_organs * batch_size * mean_tokens
        return Point(Times(step, step / 2), Times(captions, captions / 2), tokens, step / 3, captions / 3)


def test_organs_may_cost_what_their_captions_cost():
    for pooling in (0.0, 1.0):
        one, more = scaling.against_organs(LinearPoints(pooling), [1, 24])
        assert one.name == "scaling/organs/1" and one.ratio == 1.0
        assert more.name == "scaling/organs/24" and more.baseline.cpu == pytest.approx(10.5 + pooling + 11.5)
        assert more.ratio == pytest.approx((22 + pooling) / (22 + 24 * pooling))
        assert (more.ratio == pytest.approx(1.0)) == (pooling == 0.0)
        assert f"{11.5 + 23 * pooling:+.2f} CPU seconds over 1 organs, the captions alone +11.50" in more.note
        assert ("image side +7.67 at" in more.note) == (pooling == 1.0)
        assert more.extra["captions_s"] == 12.0 and more.distance == pytest.approx(3.0)


def test_patients_and_tokens_are_held_against_their_number():
    points = LinearPoints()
    small, large = scaling.against_batch(points, [2, 8])
    assert points.asked == [(4, 2, 26), (4, 2, 26), (4, 8, 26)]
    assert (small.name, large.name) == ("scaling/batch/2", "scaling/batch/8")
    assert large.baseline.cpu == pytest.approx(4 * small.ours.cpu) and large.ratio == pytest.approx(1.0)

    points = LinearPoints()
    short, long = scaling.against_length(points, [13, 52])
    assert points.asked == [(24, 2, 13), (24, 2, 13), (24, 2, 52)]
    assert short.ours.cpu == 16.0 and long.ours.cpu == 34.0 == long.baseline.cpu, "10 s, and four times 6 s of captions"


def test_captions_grow_with_their_mean():
    batches = {mean: make_batch(24, mean_tokens=mean) for mean in (13, 26, 104)}
    lengths = {mean: [len(caption) for rows in batch.token_ids for caption in rows] for mean, batch in batches.items()}
    for mean, each in lengths.items():
        assert len(each) == 48 and 0.75 * mean < sum(each) / 48 < 1.25 * mean
        assert min(each) >= 5 and max(each) <= min(384, 120 * mean // 26)
    assert batches[26].token_ids == make_batch(24).token_ids


def small_batch(num_organs: int, batch_size: int, mean_tokens: int) -> Batch:
    return make_batch(num_organs, batch_size, mean_tokens=mean_tokens)


def test_points_are_measured_once(monkeypatch):
    monkeypatch.setattr(scaling, "require_memory", lambda needed_gb, what: None)
    ran = []
    for owner, name in ((scaling.OurStep, "step"), (scaling.FVLMModel, "get_text_features")):
        function = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *given, f=function, n=name, **more: ran.append(n) or f(*given, **more))
    points = Points(2, Peak(1e9), (narrow_model, small_batch))
    point = points.at(3)
    # Counted first, then two turns of two; every step encodes its captions, and they are encoded alone.
    turn = 2 * ["step", "get_text_features"] + 2 * ["get_text_features"]
    assert ran == ["step", "get_text_features", "get_text_features"] + 2 * turn
    assert points.at(3, 2, 26) is point and len(ran) == 15
    assert point.tokens == sum(len(caption) for rows in small_batch(3, 2, 26).token_ids for caption in rows)
    assert point.step.cpu > point.captions.cpu > 0 and point.bound_s > 0
    attention = 2 * 2 * 7 * (2 * 1232**2 * 16)  # patients, blocks, products, keys and values of the image tower
    assert point.image_bound_s * 1e9 > attention > point.captions_bound_s * 1e9 > 0
    other = points.at(3, batch_size=3)
    assert other.bound_s > 1.3 * point.bound_s and len(points.points) == 2


def test_the_command_writes_file_and_picture(monkeypatch, tmp_path):
    monkeypatch.setattr(scaling, "measure_peak", lambda: Peak(1.0))
    monkeypatch.setattr(scaling, "Points", lambda repeats, peak: LinearPoints())
    files = [str(tmp_path / "out" / name) for name in ("r.json", "r.png")]
    assert scaling.main(["--json", files[0], "--plot", files[1]]) == 0
    written = json.loads((tmp_path / "out" / "r.json").read_text())
    assert [each["name"].split("/", 1)[1] for each in written] == [
        *(f"organs/{number}" for number in (1, 4, 12, 24, 36)),
        *(f"batch/{number}" for number in (2, 4, 8)),
        *(f"length/{number}" for number in (13, 26, 52, 104)),
    ]
    assert all(each["ratio"] >= 1 - 1e-9 and each["bound_s"] > 0 for each in written)
    assert (tmp_path / "out" / "r.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(SystemExit):
        scaling.main(["--batches", "1"])
