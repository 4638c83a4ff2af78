"""Uploads to the Hub: private unless asked otherwise, under a licence, whole, and nothing but the split."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from hub_stand_in import hub_stand_in
from tiny_release import REPORT, arrays, save_nifti, write_csv

from data_builders import push
from data_builders.__main__ import main
from data_builders.shards import SCHEMA

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # huggingface_hub's way to upload

REPO = "owner/tiny-split"
LICENCE = ["--license", "cc-by-4.0"]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A processed split of three patients with pictures and both configs."""
    folder = tmp_path_factory.mktemp("built")
    rows = []
    for seed, name in enumerate(("case_1", "case_2", "case_3")):
        volume, mask = arrays(seed)
        save_nifti(volume, folder / "ct" / f"{name}.nii.gz")
        save_nifti(mask, folder / "seg" / f"{name}.nii.gz")
        rows.append({"id": name, "patient_id": name, "split": "validation" if seed == 2 else "train", **REPORT})
    write_csv(folder / "reports.csv", rows)
    arguments = ["--volumes", folder / "ct", "--masks", folder / "seg", "--reports", folder / "reports.csv"]
    arguments += ["--out", folder / "split", "--spacing", 3, 4, 4, "--margin", 2, 3, 3, "--previews", 0]
    arguments += ["--workers", 1, "--rows_per_shard", 1, "--configs", "volumes", "organ_crops"]
    assert main(["folder", *map(str, arguments)]) == 0
    (folder / "split" / "previews").mkdir(exist_ok=True)
    first = pq.read_table(min((folder / "split" / "volumes").glob("train-*")), columns=["recon_id"])["recon_id"][0]
    (folder / "split" / "previews" / f"train-000-{first}.png").write_bytes(b"picture")  # to draw one takes seconds
    return folder / "split"


@pytest.fixture
def split(built, tmp_path):
    """A copy that a test may spoil."""
    return Path(shutil.copytree(built, tmp_path / "split"))


@pytest.fixture
def hub(monkeypatch):
    """A Hub at which this process is logged in."""
    with hub_stand_in() as stand_in:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", stand_in.endpoint)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", "hf_test")
        yield stand_in


def upload(split: Path, *arguments: str, licence=LICENCE) -> int:
    return main(["push", "--data", str(split), "--repo", REPO, *licence, *arguments])


def files_of(split: Path) -> dict[str, bytes]:
    """What a repository should hold: every file of a fresh split."""
    return {path.relative_to(split).as_posix(): path.read_bytes() for path in split.rglob("*") if path.is_file()}


def header_of(card: bytes) -> dict:
    _, header, _ = card.decode().split("---\n", 2)
    return yaml.safe_load(header)


def edit_manifest(split: Path, **settings) -> None:
    path = split / "manifest.json"
    manifest = json.loads(path.read_text(encoding="utf-8"))
    manifest["settings"] |= settings
    path.write_text(json.dumps(manifest), encoding="utf-8")


def test_split_arrives_whole_private_and_loadable(hub, split, tmp_path):
    (split / "previews" / ".hidden.png").write_bytes(b"secret")
    (split / ".env").write_bytes(b"secret")
    (split / "split.salt").write_bytes(b"secret")
    (split / "volumes" / "notes.csv").write_bytes(b"secret")
    shutil.copy(next((split / "volumes").glob("*.parquet")), split / "volumes" / "train-00009-of-00010.parquet")
    own = set(files_of(split)) - {"previews/.hidden.png", ".env", "split.salt", "volumes/notes.csv"}
    own -= {"volumes/train-00009-of-00010.parquet"}
    assert upload(split) == 0
    assert hub.is_private("dataset", REPO)
    there = hub.files("dataset", REPO)
    assert there.keys() == own and len([name for name in own if name.endswith(".parquet")]) == 6
    assert any(name.startswith("previews/") for name in there)
    assert all(content == (split / name).read_bytes() for name, content in there.items() if name != "README.md")
    assert b"secret" not in b"".join(there.values())
    header, before = header_of(there["README.md"]), header_of((split / "README.md").read_bytes())
    assert header["license"] == "cc-by-4.0" and header["pretty_name"] == "tiny-split"
    assert header["size_categories"] == ["n<1K"] and header["task_categories"] and "ct" in header["tags"]
    assert {key: header[key] for key in before} == before and "license" not in before
    assert REPO in there["README.md"].decode()

    code = """
import json, sys
from datasets import load_dataset
rows = [row["recon_id"] for row in load_dataset(sys.argv[1], "volumes", split="train", streaming=True)]
crops = load_dataset(sys.argv[1], "organ_crops", split="validation")
print(json.dumps([rows, crops.num_rows, crops.column_names]))
"""
    environment = {**os.environ, "HF_ENDPOINT": hub.endpoint, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path)}
    environment |= {"HF_TOKEN": "hf_test", "HF_HUB_OFFLINE": "0", "HF_DATASETS_OFFLINE": "0"}
    run = subprocess.run(
        [sys.executable, "-c", code, REPO], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=280
    )
    assert run.returncode == 0, run.stderr[-3000:]
    rows, num_crops, columns = json.loads(run.stdout.strip().splitlines()[-1])
    files = [pq.read_table(path) for path in sorted((split / "volumes").glob("train-*-of-00002.parquet"))]
    assert rows == [name for table in files for name in table["recon_id"].to_pylist()] and len(rows) == 2
    (crops,) = (split / "organ_crops").glob("validation-*.parquet")
    assert num_crops == pq.read_metadata(crops).num_rows > 1 and "organ" in columns


def test_pictures_of_cases_that_are_no_longer_there_stay_here(hub, split, capfd):
    """A patient was taken out and the split built anew in its folder; who was the second row is the first now."""
    (picture,) = (split / "previews").glob("*.png")
    names = {
        split: [name for path in sorted((split_folder / "volumes").glob(f"{split}-*.parquet"))
                for name in pq.read_table(path, columns=["recon_id"])["recon_id"].to_pylist()]
        for split_folder, split in ((split, "train"), (split, "validation"))
    }  # fmt: skip
    own = [f"train-001-{names['train'][1]}.png", f"validation-000-{names['validation'][0]}.png"]
    others = [f"train-001-{names['train'][0]}.png", "train-000-r0000000000000000.png", "train-002-DOE.png", "x.png"]
    for name in (*own, *others):
        (split / "previews" / name).write_bytes(b"picture")
    assert upload(split) == 0
    there = {name for name in hub.files("dataset", REPO) if name.startswith("previews/")}
    assert there == {f"previews/{name}" for name in (picture.name, *own)}
    assert "4 pictures in previews/ not uploaded: no row of this split" in " ".join(capfd.readouterr().out.split())


@pytest.mark.parametrize(
    "licence, message",
    [
        (["--license", "cc-by-nc-4"], "nearest: 'cc-by-nc-4.0'"),
        (["--license", "unknown"], "is no licence id"),
        (["--license", "other"], "needs --license_name"),
        (["--license", "other", "--license_name", "Our Terms"], "lower-case letters"),
        (["--license", "other", "--license_name", "our-terms"], "needs --license_link"),
        (["--license", "mit", "--license_name", "our-terms"], "go with --license other"),
    ],
)
def test_a_licence_that_says_nothing_is_refused(hub, split, capfd, licence, message):
    assert upload(split, licence=licence) == 2
    assert message in capfd.readouterr().err
    assert hub.requests == []


def test_licence_is_required(split, capfd):
    with pytest.raises(SystemExit):
        upload(split, licence=[])
    assert "--license" in capfd.readouterr().err


def test_own_terms_and_other_spellings(hub, split):
    link = "https://example.org/terms"
    terms = ["--license", "other", "--license_name", "our-terms", "--license_link", link]
    assert upload(split, "--pretty_name", "Our scans", licence=terms) == 0
    header = header_of(hub.files("dataset", REPO)["README.md"])
    assert [header[key] for key in ("license", "license_name", "license_link")] == ["other", "our-terms", link]
    assert header["pretty_name"] == "Our scans"
    assert upload(split, licence=["--license", "CC-BY-NC-SA-4.0"]) == 0  # as SPDX writes it
    header = header_of(hub.files("dataset", REPO)["README.md"])
    assert header["license"] == "cc-by-nc-sa-4.0" and "license_name" not in header


def test_a_public_repository_is_refused_unless_asked_for(hub, split, capfd):
    hub.put("dataset", REPO, ".gitattributes", b"")
    assert upload(split) == 2
    assert "is a public repository" in capfd.readouterr().err
    assert hub.files("dataset", REPO).keys() == {".gitattributes"}
    assert upload(split, "--public") == 0
    assert "README.md" in hub.files("dataset", REPO) and not hub.is_private("dataset", REPO)


def test_public_makes_new_repositories_public_and_no_others(hub, split, capfd):
    assert upload(split, "--public") == 0
    assert not hub.is_private("dataset", REPO)
    hub.repositories["dataset", REPO].is_private = True
    assert upload(split, "--public") == 2
    assert "whole history would come to light" in " ".join(capfd.readouterr().err.split())
    assert hub.is_private("dataset", REPO)


def test_a_repository_made_public_against_our_will_gets_nothing(hub, split, capfd, monkeypatch):
    create = push.HfApi.create_repo
    monkeypatch.setattr(push.HfApi, "create_repo", lambda self, repo_id, private, **more: create(self, repo_id, **more))
    assert upload(split) == 2
    assert "although it was asked not to" in capfd.readouterr().err
    assert hub.files("dataset", REPO) == {} and not hub.blobs


def test_what_may_not_be_handed_on_stays_private(hub, split, capfd):
    edit_manifest(split, builder="ct_rate")
    assert upload(split, "--public") == 2
    assert "terms of access forbid" in capfd.readouterr().err
    assert hub.requests == []
    assert upload(split) == 0
    assert "terms of access forbid" in " ".join(capfd.readouterr().out.split())
    assert hub.is_private("dataset", REPO)
    del hub.repositories["dataset", REPO]
    assert upload(split, "--public", "--i_have_the_right") == 0
    assert not hub.is_private("dataset", REPO)


def test_an_unfinished_build_is_refused(hub, split, capfd):
    (split / ".building").mkdir()
    assert upload(split) == 2
    (split / ".building").rmdir()
    (split / "manifest.json").unlink()
    assert upload(split) == 2
    assert capfd.readouterr().err.count("holds no finished build") == 2
    assert hub.requests == []


@pytest.mark.parametrize("config", ["volumes", "organ_crops"])
def test_a_damaged_or_missing_shard_is_named(hub, split, capfd, config):
    shard = sorted((split / config).glob("*.parquet"))[1]
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    assert upload(split) == 2
    assert f"{config}/{shard.name} is damaged" in capfd.readouterr().err
    shard.unlink()
    assert upload(split) == 2
    assert f"{config}/{shard.name} is missing" in capfd.readouterr().err
    assert not hub.repositories


def rewrite_report(split: Path, findings: str) -> None:
    """Put other words into a shard, and its new hash into the manifest."""
    shard = min((split / "volumes").glob("*.parquet"))
    rows = pq.read_table(shard).to_pylist()
    rows[0]["findings"] = findings
    pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), shard)
    path = split / "manifest.json"
    manifest = json.loads(path.read_text(encoding="utf-8"))
    for record in manifest["shards"]:
        if record["file"] == f"volumes/{shard.name}":
            record |= {"bytes": shard.stat().st_size, "sha256": hashlib.sha256(shard.read_bytes()).hexdigest()}
    path.write_text(json.dumps(manifest), encoding="utf-8")


def test_reports_that_name_somebody_are_told_and_need_a_yes(hub, split, capfd):
    rewrite_report(split, "Seen by Dr. Roe on 12.03.2021.")
    assert upload(split) == 2
    output = capfd.readouterr()
    told = " ".join((output.out + output.err).split())
    assert "date in texts: 1, name in texts: 1" in told and "--yes" in told and "findings: name" in told
    assert "Roe" not in told and "2021" not in told
    assert not hub.repositories
    assert upload(split, "--yes") == 0
    assert "README.md" in hub.files("dataset", REPO)


def test_ids_of_the_source_need_a_yes_before_they_become_public(hub, split, capfd):
    edit_manifest(split, ids="kept")
    assert upload(split, "--public") == 2
    assert "--ids hashed" in capfd.readouterr().out
    assert upload(split) == 0


def test_an_upload_that_broke_off_is_continued(hub, split, capfd, monkeypatch):
    create_commit, num_commits = push.HfApi.create_commit, []

    def breaking(self, *positional, **more):
        num_commits.append(1)
        if len(num_commits) == 2:  # the shards are there, the card is not
            raise push.hub_errors.HTTPError("connection lost")
        return create_commit(self, *positional, **more)

    monkeypatch.setattr(push.HfApi, "create_commit", breaking)
    assert upload(split) == 2
    assert "run the same command again" in capfd.readouterr().err
    there = hub.files("dataset", REPO)
    assert "README.md" not in there and len([name for name in there if name.endswith(".parquet")]) == 6
    monkeypatch.undo()
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.endpoint)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    hub.requests.clear()
    assert upload(split) == 0
    assert not [request for request in hub.requests if request.startswith("PUT")], "a shard was sent twice"
    assert {"README.md", "manifest.json"} <= hub.files("dataset", REPO).keys()


def test_a_new_split_takes_the_place_of_the_old_one(hub, split):
    assert upload(split) == 0
    hub.put_all("dataset", REPO, {"LICENSE": b"terms", "volumes/train-00007-of-00008.parquet": b"old"})
    hub.put("dataset", REPO, "previews/train-000-old.png", b"old")
    assert upload(split) == 0
    there = hub.files("dataset", REPO)
    assert "volumes/train-00007-of-00008.parquet" not in there and "previews/train-000-old.png" not in there
    assert there["LICENSE"] == b"terms"
    assert there.keys() - {"LICENSE"} == files_of(split).keys()


def test_a_repository_of_something_else_is_left_alone(hub, split, capfd):
    hub.put("dataset", REPO, "volumes/mine.csv", b"mine")
    hub.repositories["dataset", REPO].is_private = True
    assert upload(split) == 2
    assert "holds something else (volumes/mine.csv" in capfd.readouterr().err
    assert hub.files("dataset", REPO) == {"volumes/mine.csv": b"mine"}


def test_without_token_or_owner_nothing_is_asked(hub, split, capfd, monkeypatch):
    monkeypatch.setattr(push, "get_token", lambda: None)
    assert upload(split) == 2
    assert "hf auth login" in capfd.readouterr().err
    assert main(["push", "--data", str(split), "--repo", "tiny-split", *LICENCE]) == 2
    assert "must be owner/name" in capfd.readouterr().err
    assert hub.requests == []


class RecordingApi:
    """Notes on which revision each call works."""

    endpoint = "https://hub"

    def __init__(self):
        self.calls = []

    def __getattr__(self, name):
        def call(*positional, **more):
            self.calls.append((name, more.get("branch") or more.get("revision")))
            return []

        return call


@pytest.mark.parametrize("revision, makes_branch", [("trial", True), ("refs/pr/3", False), (None, False)])
def test_every_step_works_on_the_revision(split, revision, makes_branch):
    api = RecordingApi()
    args = Namespace(repo=REPO, data=split, public=False, revision=revision)
    push.upload(api, object(), [], push.DatasetCard("---\nlicense: mit\n---\ntext"), args)
    steps = ["upload_folder", "list_repo_files", "create_commit"]
    assert api.calls == [(name, revision) for name in ["create_branch"] * makes_branch + steps]
