"""The benchmarks of preparation and input: both ways come to the same on a small scan, and say what they found."""

import json

import nibabel
import numpy as np
import pyarrow.parquet as pq
import pytest

from benchmarks import input as benchmark_input
from benchmarks import prepare
from benchmarks.worker import memory_of_a_worker
from modeling_fvlm.processed_split import decode_volume


@pytest.fixture(autouse=True)
def small_sizes(monkeypatch):
    monkeypatch.setattr(prepare, "SHAPE", (40, 60, 70))
    monkeypatch.setattr(prepare, "PIXEL_MM", 6.0)
    monkeypatch.setattr(prepare, "SPACING", (20.0, 7.0, 8.0))
    monkeypatch.setattr(prepare, "MARGIN", (1, 2, 3))
    for name, value in (("SPACING", (24, 8, 8)), ("MARGIN", (1, 2, 2)), ("VOLUME_SIZE", (12, 32, 32)), ("WORKERS", 1)):
        monkeypatch.setattr(benchmark_input, name, value)


def test_a_scan_is_cut_and_padded_in_the_middle(monkeypatch):
    monkeypatch.setattr(prepare, "SHAPE", (4, 3, 2))
    array = np.arange(1, 41).reshape(2, 5, 4)
    fitted = prepare.fit(array, 0)
    assert fitted.shape == (4, 3, 2) and not fitted[0].any() and not fitted[3].any()
    np.testing.assert_array_equal(fitted[1:3], array[:, 1:4, 1:3])


def test_both_ways_prepare_the_same_scan(tmp_path):
    organ_set, small_scan = "body_24", prepare.write_scan(tmp_path)
    folders = tmp_path / "theirs", tmp_path / "ours"
    for folder in folders:
        folder.mkdir()
    files = prepare.published_steps(*small_scan, organ_set, folders[0], np.float64)
    theirs, their_mask = (np.asarray(nibabel.load(path).dataobj).T for path in files)
    settings = prepare.our_settings(organ_set, tmp_path)
    row = pq.read_table(prepare.one_pass(*small_scan, settings, folders[1])).to_pylist()[0]
    ours, our_mask = decode_volume(row)
    assert len(np.unique(our_mask)) > 3 and theirs.std() > 100
    np.testing.assert_array_equal(our_mask, their_mask)
    assert np.abs(ours - theirs).max() <= 0.5 + 1e-3


def test_the_whole_comparison_and_its_json(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "in_fresh_process", lambda function, *job: (1.0, 3.0))
    assert prepare.main(["--organs", "4", "--repeats", "1", "--json", str(tmp_path / "out.json")]) == 0
    (result,) = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    assert result["name"] == "prepare/4" and result["masks_are_equal"] and result["max_hu_difference"] <= 0.501
    assert result["baseline_peak_mb"] == 3.0 and result["ours_written_mb"] > 0 and result["inflate_s"] > 0
    assert result["ratio"] == result["baseline_s"] / result["ours_s"]
    assert 30 < result["ours_start_mb"] < result["ours_peak_mb"] < 400, "a worker imports more than it needs"


def test_a_worker_that_fails_is_no_measurement(tmp_path):
    case = prepare.as_case(tmp_path / "none.nii.gz", tmp_path / "none_mask.nii.gz")
    with pytest.raises(RuntimeError, match="the volume file was there when the build began"):
        memory_of_a_worker(case, prepare.our_settings("chest_4", tmp_path))


def test_input_reads_the_same_samples_from_all_places(tmp_path):
    arguments = ["--patients", "2", "--repeats", "1", "--json", str(tmp_path / "out.json")]
    assert benchmark_input.main(arguments) == 0
    results = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    assert [result["name"] for result in results] == [
        "input/parquet_float32",
        "input/parquet_int16",
        "input/cache_int16",
    ]
    assert all(0 < result["max_rel_diff"] < 3.4e-4 and result["ratio"] > 0 for result in results)
