"""The memory-mapped cache of a processed split: the same rows, nothing copied, nothing stale."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from tiny_release import command, contents
from tiny_split import write_tiny_split

from data_builders import cache as cache_module
from data_builders.__main__ import main
from data_builders.shards import sha256_of
from modeling_fvlm.processed_split import (
    CACHE_FILE,
    ZSTD_MAGIC,
    decode_volume,
    encode_array,
    load_rows,
    row_of_table,
)

NAMES = ("train_1_a_1", "train_2_a_1", "train_3_a_1", "valid_1_a_1")


def cached(split: Path, out: Path) -> int:
    return main(["cache", "--data", str(split), "--out", str(out)])


@pytest.fixture(autouse=True)
def hub_cache(tmp_path, monkeypatch):
    """`datasets` keeps its copies in the test's own folder."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "hf"))


@pytest.fixture(scope="module")
def split(release, tmp_path_factory):
    folder = tmp_path_factory.mktemp("split")
    assert main(command(release, folder / "split")) == 0
    return folder / "split"


@pytest.fixture(scope="module")
def cache(split, tmp_path_factory):
    out = tmp_path_factory.mktemp("cache") / "cache"
    assert cached(split, out) == 0
    return out


@pytest.mark.parametrize("name", ["train", "validation"])
def test_rows_are_those_of_the_split(split, cache, name):
    ours, theirs = load_rows(cache, name), load_rows(split, name)
    assert ours.features == theirs.features and len(ours) == len(theirs) > 0
    for row, other in zip(ours, theirs):
        for array, expected in zip(decode_volume(row), decode_volume(other)):
            assert np.array_equal(array, expected) and array.dtype == expected.dtype and not array.flags.writeable
        assert {key: row[key] for key in row if key not in ("volume", "mask")} == {
            key: other[key] for key in other if key not in ("volume", "mask")
        }
        assert len(row["volume"]) == 2 * len(row["mask"]) == 2 * np.prod(row["shape"]), "plain bytes"


def test_rows_are_mapped_and_not_copied(split, cache):
    rows = load_rows(cache, "train")
    assert {Path(entry["filename"]).name for entry in rows.cache_files} == {
        "data-00000-of-00002.arrow",
        "data-00001-of-00002.arrow",
    }
    tables = rows.with_format("arrow")
    before = pa.total_allocated_bytes()
    row = row_of_table(tables[2])
    volume, mask = decode_volume(row)
    assert pa.total_allocated_bytes() - before < mask.nbytes, "neither volume nor mask was brought into memory"
    assert volume.base is not None and np.shares_memory(volume, np.frombuffer(row["volume"], dtype="<i2"))
    for array, expected in zip((volume, mask), decode_volume(rows[2])):
        assert np.array_equal(array, expected)
    assert row["recon_id"] == "train_3_a_1" and row["captions"] == rows[2]["captions"]


def test_a_row_of_the_split_itself_may_come_as_a_table(split):
    rows = load_rows(split, "train")
    for array, expected in zip(
        decode_volume(row_of_table(rows.with_format("arrow")[1])), decode_volume(rows[1]), strict=True
    ):
        assert np.array_equal(array, expected)


def test_datasets_opens_it_with_nothing_of_ours(split, cache):
    from datasets import Dataset, load_from_disk

    opened = load_from_disk(str(cache))
    assert {name: part.num_rows for name, part in opened.items()} == {"train": 3, "validation": 1}
    row = Dataset.from_file(str(cache / "validation" / "data-00000-of-00001.arrow"))[0]
    volume = np.frombuffer(row["volume"], dtype="<i2").reshape(row["shape"])
    assert np.array_equal(volume, decode_volume(load_rows(split, "validation")[0])[0])


def test_the_manifest_is_that_of_the_split(split, cache):
    assert (cache / "manifest.json").read_bytes() == (split / "manifest.json").read_bytes()
    assert (cache / "README.md").is_file(), "evaluation takes a folder without a card for no split"


def test_training_reads_it_in_place_of_the_split(tmp_path):
    """A split of tests/tiny_split.py, with what a manifest of a builder tells."""
    from training_fvlm.data import ProcessedSplit, load_split, read_description

    folder = write_tiny_split(tmp_path / "split")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["splits"] = {name: {"rows": 1} for name in ("train", "validation")}
    files = {name: f"volumes/{name}-00000-of-00001.parquet" for name in manifest["splits"]}
    manifest["shards"] = [
        {"split": name, "file": file, "sha256": sha256_of(folder / file)} for name, file in files.items()
    ]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert cached(folder, tmp_path / "cache") == 0
    ours, theirs = (load_split(str(tmp_path / name), "train") for name in ("cache", "split"))
    assert len(ours) == len(theirs) == 24
    for number in (0, 23):
        for array, expected in zip(
            decode_volume(ProcessedSplit(ours)[number]), decode_volume(ProcessedSplit(theirs)[number])
        ):
            assert np.array_equal(array, expected)
    assert read_description(str(tmp_path / "cache")) == read_description(str(folder))


def test_a_compressed_blob_as_long_as_the_array_is_not_taken_for_a_plain_one():
    """Looked for: a volume of few values whose frame happens to have the length of its array."""
    shape = (3, 4, 5)
    for changes in range(60):
        # Random values cannot be compressed; each that becomes 0 takes a little off the frame.
        volume = np.random.default_rng(0).integers(-(2**15), 2**15, shape).astype(np.int16)
        volume.reshape(-1)[:changes] = 0
        blob = encode_array(volume)
        if len(blob) == volume.nbytes:
            break
    else:
        pytest.fail("no such frame was found: nothing was tested")
    assert blob[:4] == ZSTD_MAGIC
    row = {"volume": blob, "mask": volume.astype(np.uint8).tobytes(), "shape": shape}
    assert np.array_equal(decode_volume(row)[0], volume)
    assert np.array_equal(decode_volume({**row, "volume": pa.py_buffer(blob)})[0], volume)


def test_a_damaged_row_is_told():
    volume = np.zeros((2, 3, 4), np.int16)
    row = {"volume": volume.tobytes()[:-2], "mask": bytes(24), "shape": (2, 3, 4)}
    with pytest.raises(ValueError, match="damaged"):
        decode_volume(row)


def test_a_killed_run_continues_and_ends_in_the_same_bytes(split, cache, tmp_path, monkeypatch, capsys):
    class Killed(BaseException):
        pass

    unpack, done, out = cache_module.unpack_shard, [], tmp_path / "cache"

    def dying(source, target):
        if len(done) == 1:
            target.parent.mkdir(exist_ok=True)
            target.with_name(target.name + ".tmp").write_bytes(b"half")
            raise Killed
        done.append(target)
        unpack(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(cache_module, "unpack_shard", dying)
        with pytest.raises(Killed):
            cached(split, out)
    assert not (out / CACHE_FILE).exists() and not (out / "manifest.json").exists()
    with pytest.raises(ValueError, match="a cache that is not complete"):
        load_rows(out, "train")
    time = done[0].stat().st_mtime_ns
    capsys.readouterr()
    assert cached(split, out) == 0
    assert "files are there; making the rest." in capsys.readouterr().out
    assert done[0].stat().st_mtime_ns == time, "what is there is not made again"
    assert contents(out) == contents(cache)
    assert cached(split, out) == 0, "and a further run finds it complete"
    assert "files are there; nothing is left to make." in capsys.readouterr().out
    assert contents(out) == contents(cache)


def test_a_split_that_was_built_again_refuses_its_old_cache(split, tmp_path, capsys):
    shutil.copytree(split, tmp_path / "split")
    assert cached(tmp_path / "split", tmp_path / "cache") == 0
    before = contents(tmp_path / "cache")
    manifest = json.loads((split / "manifest.json").read_text())
    manifest["shards"][0]["sha256"] = "0" * 64
    (tmp_path / "split" / "manifest.json").write_text(json.dumps(manifest))
    assert cached(tmp_path / "split", tmp_path / "cache") == 2
    assert "of an earlier state of this one" in capsys.readouterr().err
    assert contents(tmp_path / "cache") == before


def test_a_disk_that_is_too_small_is_told_before_anything_is_unpacked(split, tmp_path, capsys, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(cache_module.shutil, "disk_usage", lambda path: usage)
    assert cached(split, tmp_path / "cache") == 2
    assert "more and its disk has 0.0 GB free" in capsys.readouterr().err
    assert not list((tmp_path / "cache").rglob("*.arrow"))


@pytest.mark.parametrize("damage", ["a bit", "cut short", "gone"])
def test_a_damaged_shard_is_named(split, cache, tmp_path, capsys, damage):
    """Its rows may well be readable, and be those of another build."""
    data, name = tmp_path / "split", "volumes/train-00001-of-00002.parquet"
    shutil.copytree(split, data)
    content = bytearray((data / name).read_bytes())
    content[1000] ^= 1
    (data / name).write_bytes(content if damage == "a bit" else content[:500])
    if damage == "gone":
        (data / name).unlink()
    assert cached(data, tmp_path / "cache") == 2
    assert f"{name} in {data}: " in (told := capsys.readouterr().err) and "run the builder again" in told
    assert not (tmp_path / "cache" / CACHE_FILE).exists()
    shutil.copy(split / name, data / name)
    assert cached(data, tmp_path / "cache") == 0
    assert contents(tmp_path / "cache") == contents(cache)


def test_what_is_no_split_or_no_cache_is_left_alone(split, cache, tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("precious")
    for data, out, told in (
        (tmp_path, tmp_path / "cache", "there is no manifest.json"),
        (cache, tmp_path / "cache", "is a cache; name the processed split"),
        (split, tmp_path, "is not empty and holds no cache"),
        (split, tmp_path / "thesis.txt", "is a file"),
    ):
        assert cached(data, out) == 2
        assert told in " ".join(capsys.readouterr().err.split())
    assert (tmp_path / "thesis.txt").read_text() == "precious"
    with pytest.raises(ValueError, match=r"has no split 'test'; it has \['train', 'validation'\]"):
        load_rows(cache, "test")
