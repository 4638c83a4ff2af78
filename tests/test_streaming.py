"""CTRateBuilder: organ crops while volumes stream from a Hub, each once, in bounded memory, resumed exactly."""

import gzip
import json
import pickle
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from datasets import Features
from datasets.distributed import split_dataset_by_node
from hub_stand_in import hub_stand_in
from tiny_release import SHAPE, arrays, ct_rate_release, save_nifti

import data_builders
from data_builders import CTRateBuilder, ct_rate, skips, streaming
from data_builders.__main__ import main
from data_builders.card import features
from data_builders.shards import SCHEMA
from data_builders.sources import SourceError
from modeling_fvlm.geometry import organ_box
from modeling_fvlm.organs import load_organ_set
from modeling_fvlm.processed_split import decode_volume

REPO = "owner/ct"
TRAIN = [f"train_{number}_a_1" for number in (1, 2, 3, 10, 11)]
NAMES = (*TRAIN, "valid_1_a_1")
GEOMETRY = {"spacing": (3.0, 4.0, 4.0), "margin": (2, 3, 3)}
ORGANS = ("lung", "liver", "aorta")  # what tiny_release's patients have of body_24


@pytest.fixture(scope="module")
def release(tmp_path_factory) -> Path:
    return ct_rate_release(tmp_path_factory.mktemp("release"), NAMES)


@pytest.fixture
def hub(release, monkeypatch):
    """A Hub with the release; `hub.fetched()` counts how often each volume was fetched."""
    with hub_stand_in() as hub:
        files = {
            path.relative_to(release).as_posix(): path.read_bytes() for path in release.rglob("*.*") if path.is_file()
        }
        hub.put_all("dataset", REPO, files)
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        yield hub


def fetched(hub, kind: str = "dataset/train_fixed") -> Counter:
    """recon_id -> how often its volume (or its mask) was fetched from the stand-in."""
    return Counter(
        Path(request).name.removesuffix(".nii.gz")
        for request in hub.requests
        if request.startswith("GET") and "/resolve/" in request and f"/{kind}/" in request
    )


def make(tmp_path, config: str = "organ_crops", **options) -> CTRateBuilder:
    options = {"source": f"hf://datasets/{REPO}", **GEOMETRY, **options}
    return CTRateBuilder(config_name=config, cache_dir=str(tmp_path / "cache"), **options)


def built(release, out, *more) -> dict[str, dict]:
    """recon_id -> row of the processed split that the command makes of the same release."""
    words = ["--spacing", "3", "4", "4", "--margin", "2", "3", "3", "--previews", "0", "--workers", "1", *more]
    assert main(["ct_rate", "--source", str(release), "--out", str(out), *words]) == 0
    rows = [row for file in sorted((out / "volumes").glob("*.parquet")) for row in pq.read_table(file).to_pylist()]
    return {row["recon_id"]: row for row in rows}


def place(name: str, kind: str = "train_fixed") -> str:
    patient, scan, _ = name.rsplit("_", 2)
    return f"dataset/{kind}/{patient}/{patient}_{scan}/{name}.nii.gz"


def keys(rows) -> list[tuple[str, str]]:
    return [(row["recon_id"], row["organ"]) for row in rows]


EXPECTED = [(name, organ) for name in TRAIN for organ in ORGANS]


def test_organ_crops_are_cut_from_the_rows_of_the_builder(hub, release, tmp_path):
    volumes = built(release, tmp_path / "out")
    organs = load_organ_set("body_24").organs
    rows = list(make(tmp_path).as_streaming_dataset(split="train"))
    assert sorted(keys(rows), key=EXPECTED.index) == keys(rows) and set(keys(rows)) == set(EXPECTED)
    for row in rows:
        source = volumes[row["recon_id"]]
        volume, mask = decode_volume(source)
        is_organ = mask == organs.index(row["organ"]) + 1
        box = organ_box(is_organ, GEOMETRY["margin"])
        crop, organ_mask = decode_volume(row)
        np.testing.assert_array_equal(crop, volume[box])
        np.testing.assert_array_equal(organ_mask, is_organ[box])
        assert organ_mask.any() and crop.size < volume.size
        [caption] = [entry for entry in source["captions"] if entry["organ"] == row["organ"]]
        assert {name: row[name] for name in caption} == caption
        assert row["labels"] == source["labels"] and row["spacing"] == source["spacing"]


def test_volumes_are_the_rows_of_the_builder(hub, release, tmp_path):
    expected = built(release, tmp_path / "out")
    builder = make(tmp_path, "volumes")
    streamed = {row["recon_id"]: row for split in builder.as_streaming_dataset().values() for row in split}
    assert streamed == expected and set(streamed) == set(NAMES)
    assert builder.info.features == Features.from_arrow_schema(SCHEMA)
    assert builder.info.features._to_yaml_list() == yaml.safe_load(yaml.safe_dump(features(SCHEMA)))


def test_the_first_sample_comes_before_the_second_volume_is_asked_for(hub, tmp_path):
    builder = make(tmp_path)
    stream = builder.as_streaming_dataset(split="train")
    assert not fetched(hub), "listing needs no volume"
    rows = iter(stream)
    for _ in ORGANS:
        next(rows)
        assert fetched(hub) == {TRAIN[0]: 1} and fetched(hub, "ts_total/train_fixed") == {TRAIN[0]: 1}
    assert next(rows)["recon_id"] == TRAIN[1]
    assert fetched(hub) == {TRAIN[0]: 1, TRAIN[1]: 1}


@pytest.mark.parametrize(("ranks", "workers"), [(2, 2), (3, 0), (1, 2)])
def test_ranks_and_workers_see_each_sample_once_and_share_the_fetching(hub, tmp_path, ranks, workers):
    """Five cases for two or three ranks: no multiple of either."""
    from torch.utils.data import DataLoader

    stream = make(tmp_path).as_streaming_dataset(split="train")
    assert stream.num_shards >= len(TRAIN)
    seen = []
    for rank in range(ranks):
        part = split_dataset_by_node(stream, rank=rank, world_size=ranks)
        mine = keys(DataLoader(part, batch_size=None, num_workers=workers))
        assert mine, f"rank {rank} got nothing"
        seen += mine
    assert Counter(seen) == Counter(EXPECTED)
    assert fetched(hub) == dict.fromkeys(TRAIN, 1), "a volume was fetched for a rank that did not use it"


@pytest.mark.parametrize("taken", [0, 1, 3, 7, 15])
def test_a_stream_is_resumed_exactly(hub, tmp_path, taken):
    """After nothing, inside a case, between two cases, at the end; by a builder of its own."""
    stream = make(tmp_path).as_streaming_dataset(split="train")
    rows = iter(stream)
    before = keys(next(rows) for _ in range(taken))
    state = json.loads(json.dumps(stream.state_dict() if taken else None))
    hub.requests.clear()
    resumed = make(tmp_path).as_streaming_dataset(split="train")
    if state is not None:
        resumed.load_state_dict(state)
    assert before + keys(resumed) == EXPECTED
    current = max(0, taken - 1) // len(ORGANS)  # the case of the last row that was taken is prepared again
    assert fetched(hub) == dict.fromkeys(TRAIN[current:], 1)


def test_shuffled_epochs_differ_and_hold_every_sample(hub, tmp_path):
    stream = make(tmp_path).as_streaming_dataset(split="train").shuffle(seed=1, buffer_size=1)
    orders = []
    for epoch in range(2):
        stream.set_epoch(epoch)
        orders.append(keys(stream))
        assert Counter(orders[-1]) == Counter(EXPECTED)
    assert orders[0] != orders[1]


@pytest.fixture
def broken(hub, tmp_path):
    """Three of the five cases cannot be used: one is known to be missing, two turn out to be broken."""
    files = hub.files("dataset", REPO)
    other_grid = save_nifti(arrays()[1][:-1], tmp_path / "mask.nii.gz").read_bytes()
    hub.remove("dataset", REPO, place("train_2_a_1"))
    hub.put("dataset", REPO, place("train_3_a_1"), files[place("train_3_a_1")][:-3000])
    hub.put("dataset", REPO, place("train_11_a_1", "ts_seg/ts_total/train_fixed"), other_grid)
    return hub


@pytest.mark.parametrize("workers", [0, 2])
def test_unusable_cases_are_skipped_counted_and_told_once(broken, tmp_path, monkeypatch, workers):
    from torch.utils.data import DataLoader

    logged = []
    monkeypatch.setattr(skips.logger, "warning", logged.append)
    monkeypatch.setattr(streaming.logger, "warning", logged.append)
    builder = make(tmp_path)
    stream = builder.as_streaming_dataset(split="train")
    assert builder.skipped == {"train_2_a_1": "volume file is missing"}
    for _ in range(2):  # a second epoch tells nothing new
        rows = keys(DataLoader(stream, batch_size=None, num_workers=workers))
        assert set(rows) == {(name, organ) for name in ("train_1_a_1", "train_10_a_1") for organ in ORGANS}
    assert set(builder.skipped) == {"train_2_a_1", "train_3_a_1", "train_11_a_1"}
    assert "damaged" in builder.skipped["train_3_a_1"] or "early" in builder.skipped["train_3_a_1"]
    assert "not on one grid" in builder.skipped["train_11_a_1"]
    assert str(tmp_path) not in str(builder.skipped) and "/fvlm-" not in str(builder.skipped)
    if not workers:  # workers log in their own process
        assert Counter(text.split(":")[0] for text in logged) == {
            "train": 1,
            "skipped train_3_a_1": 1,
            "skipped train_11_a_1": 1,
        }


def test_a_source_that_closes_stops_the_stream(hub, tmp_path):
    stream = make(tmp_path, token=False).as_streaming_dataset(split="train")
    rows = iter(stream)
    for _ in ORGANS:
        next(rows)
    hub.gate(REPO)
    with pytest.raises(SourceError, match="Accept them at"):
        next(rows)


def test_a_repository_that_moves_does_not_change_the_stream(hub, tmp_path):
    builder = make(tmp_path, "volumes")
    stream = builder.as_streaming_dataset(split="train")
    before = [row["volume"] for row in stream]
    other = save_nifti((arrays()[0] + 1).astype(np.int16), tmp_path / "other.nii.gz").read_bytes()
    hub.put_all("dataset", REPO, {place(name): other for name in TRAIN})
    assert [row["volume"] for row in stream] == before
    copy = pickle.loads(pickle.dumps(builder))  # as a worker process has it
    assert [row["volume"] for row in copy.as_streaming_dataset(split="train")] == before
    assert all(row["volume"] not in before for row in make(tmp_path, "volumes").as_streaming_dataset(split="train"))


def test_what_goes_to_workers_does_not_hold_the_release(hub, tmp_path):
    builder = make(tmp_path)
    builder.as_streaming_dataset()
    assert len(builder.cases) == len(NAMES)
    assert b"train_10_a_1" not in pickle.dumps(builder)


@pytest.mark.parametrize("num_proc", [None, 2])
def test_the_cache_of_datasets_is_filled_once(hub, tmp_path, num_proc):
    builder = make(tmp_path)
    expected = list(builder.as_streaming_dataset(split="train"))
    hub.requests.clear()
    builder.download_and_prepare(num_proc=num_proc)
    assert list(builder.as_dataset(split="train")) == expected
    assert fetched(hub) == dict.fromkeys(TRAIN, 1)
    again = make(tmp_path)
    again.download_and_prepare()
    assert list(again.as_dataset(split="train")) == expected
    assert fetched(hub) == dict.fromkeys(TRAIN, 1), "fetched again in spite of the cache"
    assert len(again.as_dataset(split="validation")) == len(ORGANS)


def test_the_cache_knows_settings_source_and_code(hub, release, tmp_path, monkeypatch):
    caches = {make(tmp_path).cache_dir, make(tmp_path).cache_dir}
    assert len(caches) == 1
    caches |= {make(tmp_path, margin=(1, 3, 3)).cache_dir, make(tmp_path, "volumes").cache_dir}
    hub.put("dataset", REPO, "dataset/other.txt", b"another commit")
    caches.add(make(tmp_path).cache_dir)
    monkeypatch.setattr(streaming, "code_digest", lambda: "other code")
    caches.add(make(tmp_path).cache_dir)
    assert len(caches) == 5
    local = make(tmp_path, source=release).cache_dir
    report = release / "dataset" / "radiology_text_reports" / "train_reports.csv"
    before = report.read_text()
    report.write_text(before.replace("12 mm", "13 mm"))
    try:
        assert make(tmp_path, source=release).cache_dir not in {local, *caches}
    finally:
        report.write_text(before)
    assert make(tmp_path, source=release).cache_dir == local


def test_it_writes_the_same_processed_split_as_the_command(hub, release, tmp_path):
    expected = built(release, tmp_path / "local")
    assert make(tmp_path).write(tmp_path / "out", workers=1, previews=0) == 0
    assert expected
    for file in sorted((tmp_path / "local" / "volumes").iterdir()):
        assert (tmp_path / "out" / "volumes" / file.name).read_bytes() == file.read_bytes()
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert REPO in json.dumps(manifest["settings"]) and manifest["splits"]["train"]["rows"] == len(TRAIN)


def test_a_local_folder_is_a_source_too(release, tmp_path):
    stream = make(tmp_path, source=release, organs="chest_4").as_streaming_dataset(split="validation")
    assert keys(stream) == [("valid_1_a_1", "lung"), ("valid_1_a_1", "aorta")]


def test_a_synthetic_release_streams_over_the_hub(hub, tmp_path):
    """With all its tables, on a coarse grid: as many crops of each organ as the builder counts."""
    synthetic = ["synthetic", "--patients", "2", "--validation", "1", "--seed", "0", "--spacing", "40", "12", "12"]
    assert main([*synthetic, "--workers", "1", "--out", str(tmp_path / "release")]) == 0
    files = [path for path in (tmp_path / "release").rglob("*") if path.is_file()]
    content = {path.relative_to(tmp_path / "release").as_posix(): path.read_bytes() for path in files}
    hub.put_all("dataset", "owner/synthetic", content)
    coarse = {"source": "hf://datasets/owner/synthetic", "spacing": (40, 12, 12), "margin": (1, 2, 2)}
    builder = make(tmp_path, **coarse)
    crops = {split: Counter(row["organ"] for row in rows) for split, rows in builder.as_streaming_dataset().items()}
    assert builder.write(tmp_path / "out", workers=1, previews=0) == 0
    counted = json.loads((tmp_path / "out" / "manifest.json").read_text())["splits"]
    for split, organs in crops.items():
        present = {organ: count["present"] for organ, count in counted[split]["organs"].items()}
        assert organs == {organ: count for organ, count in present.items() if count}
    assert sum(crops["train"].values()) > 20


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"organ": "chest_4"}, "CTRateBuilder has no option 'organ'; it has .*; nearest: 'organs'"),
        ({"organs": "chest_5"}, "chest_5"),
        ({"reconstructions": "second"}, "reconstructions: invalid choice: 'second'"),
        ({"spacing": (3.0, 0.0, 1.0)}, "above 0 mm"),
        ({"splits": ("test",)}, "splits: invalid choice: 'test'"),
        ({"source": "hf://datasets/owner/none"}, "the Hub shows no such repository"),
    ],
)
def test_wrong_options_are_told_before_anything_is_read(hub, tmp_path, options, told):
    with pytest.raises(ValueError, match=told):
        make(tmp_path, **options)
    assert not fetched(hub)


def test_an_unknown_config_is_told(hub, tmp_path):
    with pytest.raises(ValueError, match="invalid choice: 'crops'.*volumes.*organ_crops"):
        make(tmp_path, "crops")


def test_the_options_are_those_of_the_command(tmp_path):
    """The same words say the same: nothing of a config is lost on its way to the settings."""
    config = streaming.CTRateConfig(
        organs="chest_4", spacing=(2.0, 1.5, 1.0), margin=(1, 2, 3), reconstructions="best", splits=("validation",),
        volumes="original", rescale="apply", labels="ct_rate_18", unmentioned="absent",
    )  # fmt: skip
    args = streaming.parsed(streaming.ct_rate_arguments(config))
    assert (args.organs, args.spacing, args.margin) == ("chest_4", [2.0, 1.5, 1.0], [1, 2, 3])
    assert (args.reconstructions, args.splits, args.volumes, args.rescale) == (
        "best",
        ["validation"],
        "original",
        "apply",
    )
    assert (args.labels, args.unmentioned) == ("ct_rate_18", "absent")
    parser = streaming.Options()
    ct_rate.add_arguments(parser)
    defaults = parser.parse_args(["--source", "x", "--out", "y"])
    plain = streaming.parsed(streaming.ct_rate_arguments(streaming.CTRateConfig()))
    for name in ("organs", "reconstructions", "splits", "volumes", "rescale", "lexicon", "labels", "unmentioned"):
        assert getattr(plain, name) == getattr(defaults, name), name
    assert tuple(plain.spacing) == tuple(defaults.spacing) and tuple(plain.margin) == tuple(defaults.margin)


def test_code_is_known_by_its_text(monkeypatch):
    texts = {}
    monkeypatch.setattr(streaming.pkgutil, "get_data", lambda package, name: texts.get((package, name), b"same"))
    before = streaming.code_digest.__wrapped__()
    assert streaming.code_digest.__wrapped__() == before
    for module in (("modeling_fvlm", "geometry.py"), ("data_builders", "decompose.py")):
        texts = {module: b"other"}
        assert streaming.code_digest.__wrapped__() != before, module


def test_importing_the_builders_stays_light():
    code = (
        "import sys, data_builders\n"
        "heavy = {'torch', 'datasets', 'pyarrow', 'transformers', 'huggingface_hub', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])
    assert data_builders.CTRateBuilder is streaming.CTRateBuilder
    with pytest.raises(AttributeError, match="has no attribute 'RadChestBuilder'"):
        data_builders.RadChestBuilder  # noqa: B018


# Memory

FINE = (1.0, 0.7, 0.7)  # mm: the tiny patients become scans of 5 million bytes


def resident_bytes() -> int:
    """Memory of this process that lies in RAM."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def put_many(hub, folder: Path, count: int) -> int:
    """Serve one large scan under many names; returns the bytes of its volume and mask."""
    volume, mask = (np.kron(array, np.ones((3, 6, 6), array.dtype)) for array in arrays())
    names = [f"train_{number}_a_1" for number in range(1, count + 1)]
    rows = "".join(f"{name}.nii.gz,The aorta is wide.,Wide aorta.\n" for name in names)
    table = f"VolumeName,Findings_EN,Impressions_EN\n{rows}"
    files = {"dataset/radiology_text_reports/train_reports.csv": table.encode()}
    for kind, array in (("train_fixed", volume), ("ts_seg/ts_total/train_fixed", mask)):
        image = save_nifti(array, folder / f"{array.dtype}.nii", spacing=FINE)
        content = gzip.compress(image.read_bytes(), 1)
        files |= {place(name, kind): content for name in names}
    hub.put_all("dataset", "owner/many", files)
    return volume.nbytes + mask.nbytes


def check_memory(hub, tmp_path, count: int) -> None:
    size = put_many(hub, tmp_path, count)
    builder = make(tmp_path, "volumes", source="hf://datasets/owner/many", splits=("train",), spacing=FINE)
    levels = []
    for row in builder.as_streaming_dataset(split="train"):
        assert np.prod(row["shape"]) > np.prod(SHAPE) * 20
        levels.append(resident_bytes())
    assert len(levels) == count
    growth = max(levels[-5:]) - max(levels[3:8])  # what libraries keep for themselves is there after a few
    # Every scan kept would be 12 times that and more; the threads of the stand-in, in this process, take some, too.
    assert growth < 3 * size, f"{growth / 2**20:.0f} MiB more after {count} scans of {size / 2**20:.0f} MiB"


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads the memory of this process as Linux tells it")
def test_memory_does_not_grow_over_20_volumes(hub, tmp_path):
    check_memory(hub, tmp_path, 20)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads the memory of this process as Linux tells it")
def test_memory_does_not_grow_over_200_volumes(hub, tmp_path):
    check_memory(hub, tmp_path, 200)
