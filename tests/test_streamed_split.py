"""A split that is read where it lies: the rows of a local one, byte for byte, and no byte more than they take."""

import json
import logging
import os
import pickle

import huggingface_hub.constants
import numpy as np
import pytest
import torch
from hub_stand_in import hub_stand_in
from tiny_split import tiny_row, write_tiny_split
from tiny_training import tiny_trainer
from torch.utils.data import DataLoader

from modeling_fvlm.processed_split import encode_array
from train_fvlm import pin_data
from training_fvlm import streaming
from training_fvlm.arguments import DataArguments, SettingsError
from training_fvlm.data import ProcessedSplit, RowError, caption_rows_of_other_patients, load_split, read_description
from training_fvlm.durable import plain_message
from training_fvlm.streaming import open_streamed_split

REPO = "owner/split"


def noisy_row(number: int) -> dict:
    """A row whose volume does not compress: longer than the gaps that are fetched along."""
    row = tiny_row(number)
    noise = np.random.default_rng(number).integers(-1000, 1000, (30, 40, 50)).astype(np.int16)
    return row | {
        "volume": encode_array(noise),
        "mask": encode_array(np.ones(noise.shape, np.uint8)),
        "shape": [30, 40, 50],
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two shards of five and three rows for training, and four rows that are long."""
    folder = tmp_path_factory.mktemp("streamed") / "split"
    write_tiny_split(folder, rows={"train": [tiny_row(number) for number in range(5)]})
    for split, rows in {"more": [tiny_row(number) for number in range(5, 8)], "long": map(noisy_row, range(4))}.items():
        write_tiny_split(folder.with_name(split), rows={split: list(rows)})
        volumes = folder.with_name(split) / "volumes"
        name = "train-00001-of-00002" if split == "more" else "long-00000-of-00001"
        (volumes / f"{split}-00000-of-00001.parquet").rename(folder / "volumes" / f"{name}.parquet")
    (folder / "volumes" / "train-00000-of-00001.parquet").rename(folder / "volumes" / "train-00000-of-00002.parquet")
    return folder


@pytest.fixture
def hub(folder, monkeypatch, tmp_path):
    """A Hub that holds the split; retries do not wait."""
    with hub_stand_in() as hub:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.endpoint)
        monkeypatch.setattr(streaming, "RETRY_SECONDS", (0, 0, 0))
        monkeypatch.setattr(huggingface_hub.constants, "HF_HOME", str(tmp_path / "home"))
        files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        hub.put_all("dataset", REPO, files)
        yield hub


def local(folder, split="train", **options) -> ProcessedSplit:
    return ProcessedSplit(load_split(str(folder), split), data=str(folder), split=split, **options)


def content(row: dict) -> dict:
    """A row of a local split in a form that can be compared."""
    names = ("patient_id", "scan_id", "shape", "captions", "epoch", "row")
    return {name: row[name] for name in names} | {name: bytes(row[name]) for name in ("volume", "mask")}


def losses(trainer) -> list[dict]:
    return [line for line in trainer.state.log_history if "loss" in line]


def test_rows_are_those_of_the_local_split(folder, hub):
    ours, streamed = local(folder), open_streamed_split(REPO, "train")
    assert len(streamed) == len(ours) == 8
    for key in [(0, 7), (3, 0), 5, *range(8)]:
        assert content(streamed[key]) == content(ours[key])
    assert streamed.patient_ids() == ours.patient_ids() and streamed.scan_id(6) == ours.scan_id(6) == "train_6_a"
    assert list(streamed.caption_texts()) == list(ours.caption_texts())
    assert [row["captions"] for row in streamed.captions] == [row["captions"] for row in ours.captions]
    assert streamed.place_of(6).endswith("/volumes/train-00001-of-00002.parquet, row group 1")
    assert ours.place_of(6) == "volumes/train-00001-of-00002.parquet, row 1"
    shuffled = caption_rows_of_other_patients(ours.patient_ids(), seed=0)
    ours.caption_rows = streamed.caption_rows = shuffled
    assert (
        content(streamed[2]) == content(ours[2])
        and content(ours[2])["captions"] != content(local(folder)[2])["captions"]
    )
    assert read_description(str(folder)) == read_description(f"file://{folder}")


def test_only_the_bytes_of_the_asked_rows_are_fetched(folder, hub, monkeypatch):
    monkeypatch.setattr(streaming, "TAIL_BYTES", 20_000)
    path = "volumes/long-00000-of-00001.parquet"
    streamed, size = open_streamed_split(REPO, "long"), (folder / path).stat().st_size
    index_bytes = hub.sent[path]
    assert size > 300_000 and index_bytes < 40_000, "footer and light columns alone"
    hub.sent.clear(), hub.requests.clear()
    row = streamed[(0, 2)]
    needed = len(row["volume"]) + len(row["mask"])
    assert needed <= hub.sent[path] < needed + 500 and len(hub.requests) == 1
    hub.sent.clear()
    streamed.patient_ids(), list(streamed.caption_texts()), streamed.captions[3], len(streamed)
    assert not hub.sent, "captions and patients lie here"
    again = open_streamed_split(REPO, "long")
    assert not hub.sent and content(again[1]) == content(streamed[1]), "the index is read once"


def test_a_footer_longer_than_the_first_read(folder, hub, monkeypatch):
    monkeypatch.setattr(streaming, "TAIL_BYTES", 100)
    assert content(open_streamed_split(REPO, "train")[4]) == content(local(folder)[4])


@pytest.mark.parametrize("max_rows", [3, 5, 6, 100])
def test_the_first_rows_of_a_split(folder, max_rows, tmp_path):
    streamed = open_streamed_split(str(folder), "train", max_rows=max_rows, cache=tmp_path)
    assert streamed.patient_ids() == local(folder).patient_ids()[:max_rows]
    last = len(streamed) - 1
    assert content(streamed[last]) == content(local(folder)[last])


def test_a_push_in_between_changes_nothing(folder, hub):
    streamed = open_streamed_split(REPO, "train")
    first = content(streamed[0])
    path = "volumes/train-00000-of-00002.parquet"
    hub.put("dataset", REPO, path, (folder / "volumes" / "train-00001-of-00002.parquet").read_bytes())
    assert content(streamed[0]) == first
    newer = open_streamed_split(REPO, "train")
    assert len(newer) == 6 and newer.patient_ids()[0] == "train_5"


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_read_by_themselves(folder, hub, workers):
    streamed = open_streamed_split(REPO, "train")
    assert content(streamed[0])  # a connection that the workers must not share
    loader = DataLoader(
        streamed, batch_size=2, num_workers=workers, collate_fn=lambda rows: [content(row) for row in rows]
    )
    assert [row for rows in loader for row in rows] == [content(local(folder)[row]) for row in range(8)]


def test_no_worker_uses_the_connection_of_another(folder, monkeypatch, tmp_path):
    class Remote(streaming.Remote):
        def __init__(self, root):
            super().__init__(root)
            self.process = os.getpid()

    monkeypatch.setattr(streaming, "Remote", Remote)
    streamed = open_streamed_split(str(folder), "train", cache=tmp_path)
    assert streamed[0] and streamed.index.remote.process == os.getpid()
    loader = DataLoader(streamed, num_workers=2, collate_fn=lambda rows: (os.getpid(), streamed.index.remote.process))
    processes = list(loader)
    assert len(set(processes)) == 2 and all(one == other != os.getpid() for one, other in processes)


def test_a_copy_opens_its_own_files(folder, tmp_path):
    streamed = open_streamed_split(str(folder), "train", cache=tmp_path)
    copy = pickle.loads(pickle.dumps(streamed))
    assert content(copy[3]) == content(streamed[3]) and len(pickle.dumps(streamed)) < 5000


@pytest.mark.parametrize("faults", [["status 503", "cut"], ["cut", "status 500", "status 429"]])
def test_passing_faults_are_waited_out(folder, hub, faults, caplog):
    streamed = open_streamed_split(REPO, "train")
    hub.break_next("volumes/train-00001-of-00002.parquet", *faults)
    with caplog.at_level(logging.WARNING):
        assert content(streamed[5]) == content(local(folder)[5])
    assert caplog.text.count("again in 0 s") == len(faults)


def test_lasting_faults_name_the_row(folder, hub):
    streamed = open_streamed_split(REPO, "train")
    hub.break_next("volumes/train-00001-of-00002.parquet", *["status 503"] * 4)
    message = (
        r"row 6 \(scan 'train_6_a', hf://.*train-00001-of-00002.parquet, row group 1\) cannot be read: bytes \d+ to"
    )
    with pytest.raises(RowError, match=message + ".*4 times"):
        streamed[6]
    hub.remove("dataset", REPO, "volumes/train-00001-of-00002.parquet", everywhere=True)
    hub.requests.clear()
    with pytest.raises(RowError, match=r"row 5 \(.*404"):
        streamed[5]
    assert len(hub.requests) == 1, "a file that is gone is not asked for again"


def test_what_cannot_be_streamed_is_refused(folder, hub, tmp_path):
    with pytest.raises(SettingsError, match="has no split 'test'"):
        open_streamed_split(REPO, "test")
    with pytest.raises(SettingsError, match="cannot be read from the Hub"):
        open_streamed_split("owner/nothing", "train")
    import pyarrow.parquet as pq

    (tmp_path / "other" / "volumes").mkdir(parents=True)
    table = pq.read_table(folder / "volumes" / "train-00000-of-00002.parquet")
    path = tmp_path / "other" / "volumes" / "train-00000-of-00001.parquet"
    pq.write_table(table, path)  # all rows in one group
    with pytest.raises(SettingsError, match="row group 0 of .* holds 5 rows"):
        open_streamed_split(str(tmp_path / "other"), "train", cache=tmp_path / "cache")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(SettingsError, match="no Parquet file, or only the beginning"):
        open_streamed_split(str(tmp_path / "other"), "train", cache=tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir()), "no index of what is none"


@pytest.mark.parametrize("workers", [0, 2])
def test_training_on_a_streamed_split_is_training_on_the_local_one(folder, hub, tmp_path, workers):
    rows = [tiny_row(number) for number in range(8)]
    settings = {
        "max_steps": 6,
        "save_strategy": "steps",
        "save_steps": 3,
        "dropout": 0.1,
        "dataloader_num_workers": workers,
    }
    settings |= {"per_device_train_batch_size": 2, "logging_steps": 2}

    def trained(split, checkpoint=None):
        trainer = tiny_trainer(tmp_path / type(split).__name__, rows, **settings)
        trainer.train_dataset = split
        trainer.train(resume_from_checkpoint=checkpoint)
        return trainer

    ours, streamed = trained(local(folder)), trained(open_streamed_split(REPO, "train"))
    assert len(losses(ours)) == 3 and losses(streamed) == losses(ours)
    # In the middle of an epoch and of a log line.
    resumed = trained(open_streamed_split(REPO, "train"), str(tmp_path / "StreamedSplit" / "checkpoint-3"))
    assert losses(resumed) == losses(ours)
    weights = resumed.model.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in ours.model.state_dict().items())


def test_a_fault_ends_the_run_with_the_row_named(folder, hub, tmp_path):
    trainer = tiny_trainer(
        tmp_path / "run", [tiny_row(number) for number in range(8)], max_steps=4, dataloader_num_workers=1,
        save_strategy="steps", save_steps=1,
    )  # fmt: skip
    trainer.train_dataset = open_streamed_split(REPO, "train")
    trainer.train_dataset.index._remote = None
    hub.remove("dataset", REPO, "volumes/train-00001-of-00002.parquet", everywhere=True)
    with pytest.raises(RowError) as caught:
        trainer.train()
    message = plain_message(caught.value)
    assert "Traceback" not in message and "train-00001-of-00002.parquet, row group" in message
    assert "Read for step" in message


def test_the_manifest_of_any_address(folder, tmp_path):
    import fsspec

    memory = fsspec.filesystem("memory")
    for path in folder.rglob("*"):
        if path.is_file():
            memory.pipe(f"/split/{path.relative_to(folder)}", path.read_bytes())
    assert read_description("memory://split").organs == ("lung", "heart", "aorta")
    streamed = open_streamed_split("memory://split", "train", cache=tmp_path)
    assert content(streamed[7]) == content(local(folder)[7])
    with pytest.raises(SettingsError, match="no manifest.json there"):
        read_description("memory://nothing")
    assert json.loads((next(tmp_path.iterdir()) / "footers.json").read_text())[0] == 0


def test_a_run_stays_at_one_commit_also_of_a_named_branch(folder, hub):
    first = hub.repositories["dataset", REPO].head
    asked = [DataArguments(data=REPO), DataArguments(data=REPO, data_revision="main")]
    for data in asked:
        pin_data(data, checkpoint=None)
    hub.put("dataset", REPO, "more.txt", b"pushed while the run lasts")
    assert [data.data_revision for data in asked] == [first, first] != hub.repositories["dataset", REPO].head
    pin_data(asked[0], checkpoint=None)
    assert asked[0].data_revision == first, "a commit stays what it is"
    here = DataArguments(data=str(folder))
    pin_data(here, checkpoint=None)
    assert here.data_revision is None
