"""Names in place of paths: results are handed on, and a path may hold a person's name."""

import hashlib

import pytest

from evaluation_fvlm.places import distinct_names, entry_name, place_name, split_digest, weights_digest


@pytest.mark.parametrize(
    ("place", "name"),
    [
        ("owner/ct-model", "owner/ct-model"),
        ("/home/jane_doe/runs/model", "model"),
        ("runs/demo/model/", "model"),
        ("./model", "model"),
        ("../model", "model"),
        ("plain", "plain"),
        ("C:\\Users\\jane_doe\\model", "model"),  # of results that were made on another machine
    ],
)
def test_a_hub_id_stays_and_a_path_gives_its_last_part(place, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert place_name(place) == place_name(name) == name, "and a name stays what it is"
    assert entry_name({"path": place}) == entry_name({"name": name}) == name


def test_a_folder_that_looks_like_an_id_is_a_folder(tmp_path, monkeypatch):
    (tmp_path / "owner" / "ct").mkdir(parents=True)
    (tmp_path / "alias").symlink_to(tmp_path / "owner" / "ct")
    monkeypatch.chdir(tmp_path)
    assert place_name("owner/ct") == "ct" and place_name("alias") == "alias"
    monkeypatch.chdir(tmp_path / "owner" / "ct")
    assert place_name(".") == "ct"
    assert entry_name(None) == entry_name({}) == ""


def test_weights_are_known_again_wherever_they_lie(tmp_path):
    for place, content in (("a/model", b"1"), ("b/model", b"1"), ("c/model", b"2"), ("d/other", b"2")):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "model.safetensors").write_bytes(content)
    places = [str(tmp_path / place) for place in ("a/model", "b/model", "c/model", "d/other")]
    first, again, second, other = map(weights_digest, places)
    assert first == again != second == other
    assert first == hashlib.sha256(hashlib.sha256(b"1").digest()).hexdigest()[:16]
    assert weights_digest("owner/on-the-hub") is None
    named = distinct_names([*places[1:], "owner/one", "owner/one"], [None, None, None, "v1", "refs/pr/2"])
    assert named == [f"model, weights {again}", f"model, weights {second}", "other", *named[3:]]
    assert named[3:] == ["owner/one, revision v1", "owner/one, revision refs/pr/2"]
    assert [place_name(name) for name in named] == named, "as the page of a comparison has them"


def test_a_split_is_known_by_the_checksums_of_its_shards():
    shards = [{"file": "b", "sha256": "2", "rows": 3}, {"file": "a", "sha256": "1", "rows": 9}]
    digest = split_digest({"shards": shards})
    assert digest == split_digest({"shards": shards[::-1]}) and len(digest) == 16
    assert digest != split_digest({"shards": [shards[0] | {"sha256": "3"}, shards[1]]})
    assert split_digest({"settings": {}}) is None
