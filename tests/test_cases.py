"""Cases: their order, what must not stand beside each other, and the hash by which a source is known again."""

import dataclasses
import os
import shutil
import time
from pathlib import Path

import pytest

from data_builders.cases import (
    Case,
    OrganText,
    has_changed_since,
    names_and_sizes,
    read_label,
    sort_cases,
    source_fingerprint,
    with_digests,
)
from data_builders.sources import RemoteFile


def case(number: int = 1, **changes) -> Case:
    name = f"train_{number}"
    return dataclasses.replace(Case("train", name, f"{name}_a", f"{name}_a_1", findings="Clear."), **changes)


@pytest.fixture
def files(tmp_path):
    volume, mask = tmp_path / "ct" / "x.nii.gz", tmp_path / "seg" / "x.nii.gz"
    for path, size in ((volume, 100), (mask, 10)):
        path.parent.mkdir()
        path.write_bytes(bytes(size))
    return volume, mask


def test_the_order_is_that_of_a_person_and_hangs_on_nothing_else():
    cases = [case(10), case(2), case(1, split="validation"), case(3), case(2, recon_id="train_2_a_2")]
    expected = ["train_2_a_1", "train_2_a_2", "train_3_a_1", "train_10_a_1", "train_1_a_1"]
    for order in (cases, cases[::-1], sorted(cases, key=lambda c: c.recon_id)):
        assert [c.recon_id for c in sort_cases(order)] == expected


@pytest.mark.parametrize(
    ("second", "told"),
    [
        (case(1), "'train_1_a_1' comes twice"),
        (case(1, recon_id="other", split="validation"), "splits are by patient"),
        (case(2, scan_id="train_1_a"), "stands under the patients"),
    ],
)
def test_cases_that_cannot_stand_beside_each_other(second, told):
    with pytest.raises(ValueError, match=told):
        sort_cases([case(1), second])


# What changes the bytes of a split, or could: each must be seen when a build is continued.
CHANGES = {
    "split": {"split": "validation"},
    "patient": {"patient_id": "x"},
    "scan": {"scan_id": "x"},
    "reconstruction": {"recon_id": "x"},
    "findings": {"findings": "Not clear."},
    "impression": {"impression": "Nodule."},
    "captions": {"organ_texts": {"lung": OrganText((), ("Clear.",), False)}},
    "abnormality": {"organ_texts": {"lung": OrganText((), ("Clear.",), True)}},
    "labels": {"labels": (("Nodule", 1),)},
    "numbering": {"numbering": "totalsegmentator_v1"},
    "reason": {"skip_reason": "report is empty"},
    "affine": {"affine": ((1.0, 0.0, 0.0, 0.0), (0.0, 1.0, 0.0, 0.0), (0.0, 0.0, 1.0, 0.0), (0.0, 0.0, 0.0, 1.0))},
    "rescale": {"rescale": (1.0, -1024.0)},
    "other rescale": {"rescale": (1.0, -8192.0)},
    "series": {"series_uid": "1.2.3"},
    "duplicate": {"duplicate_of": "train_7_a_1"},
    "remote": {"volume": RemoteFile("s3://b/x.nii.gz", 101)},
    "remote size": {"volume": RemoteFile("s3://b/x.nii.gz", 102)},
    "remote version": {"volume": RemoteFile("s3://b/x.nii.gz", 101, (), "abc")},
}


def test_the_fingerprint_sees_every_change(files):
    volume, mask = files
    plain = case(volume=volume, mask=mask)
    hashes = {name: source_fingerprint([dataclasses.replace(plain, **change)]) for name, change in CHANGES.items()}
    hashes["none"] = source_fingerprint([plain])
    hashes["one more"] = source_fingerprint([plain, case(2)])
    mask.write_bytes(bytes(11))
    hashes["size"] = source_fingerprint([plain])
    mask.unlink()
    hashes["gone"] = source_fingerprint([plain])
    assert len(set(hashes.values())) == len(hashes)


def test_the_fingerprint_does_not_hang_on_places_times_and_keys(files, tmp_path):
    volume, mask = files
    moved = Path(shutil.copytree(tmp_path / "ct", tmp_path / "elsewhere")) / volume.name
    os.utime(moved, (0, 0))
    places = [volume, moved, RemoteFile("s3://a/x.nii.gz", 100)]
    places.append(RemoteFile("memory://b/c/x.nii.gz", 100, (("token", "secret"),)))
    assert len({source_fingerprint([case(volume=place, mask=mask)]) for place in places}) == 1


def test_what_came_later_leaves_the_fingerprint_of_older_sources_as_it_was(files):
    """The hash of a case from before there were affines, series and duplicates: a build from then is continued."""
    fingerprint = source_fingerprint([case(volume=files[0], mask=files[1], labels=(("Nodule", 1),))])
    assert fingerprint == "2a8fa9f756367c842845e2b8886551e4c02d683fbfc1005d91cf22778185b08b"


def test_the_digest_of_a_case_sees_what_goes_into_its_row(files):
    """All but whose report it shares: that hangs on other cases, and its row is the same."""
    plain = case(volume=files[0], mask=files[1])
    digests = {name: digest_of(dataclasses.replace(plain, **change)) for name, change in CHANGES.items()}
    assert digests.pop("duplicate") == digest_of(plain)
    assert len({digest_of(plain), *digests.values()}) == len(digests) + 1
    assert digest_of(plain, "salt") != digest_of(plain) != digest_of(plain, "other salt")
    alone, others = with_digests([plain])[0], with_digests([case(2), plain])[0]
    assert alone[0] == others[1] and alone[0].digest != others[0].digest


def digest_of(case, salt: str = "") -> str:
    return with_digests([case], salt)[0][0].digest


def test_files_that_were_replaced_since_a_moment(files, tmp_path):
    volume, mask = files
    slices = tmp_path / "series" / "sub"
    slices.mkdir(parents=True)
    (slices / "1.dcm").write_bytes(b"1")
    link = tmp_path / "link.nii.gz"
    link.symlink_to(volume)
    cases = {"file": case(volume=volume, mask=mask), "folder": case(volume=slices.parent), "link": case(volume=link)}
    cases |= {"remote": case(volume=RemoteFile("s3://a/x.nii.gz", 100)), "nothing": case(volume=tmp_path / "gone")}

    def changed() -> set[str]:
        return {name for name, item in cases.items() if has_changed_since(item, moment)}

    moment = time.time() + 0.05
    assert changed() == set()
    time.sleep(0.1)
    old = shutil.copy2(mask, tmp_path / "old.nii.gz")
    os.utime(old, (0, 0))
    os.replace(old, mask)
    assert changed() == {"file"}, "its own time is that of 1970, but its place was taken just now"
    (slices / "1.dcm").unlink()
    assert changed() == {"file", "folder"}
    link.unlink()
    link.symlink_to(volume)
    assert changed() == {"file", "folder", "link"}
    moment = link.lstat().st_ctime
    assert "link" in changed(), "the clock may have stood still since"
    moment = time.time() + 0.05
    assert changed() == set()


def test_a_folder_is_known_by_all_that_lies_in_it(tmp_path):
    folder = tmp_path / "structures"
    for name, size in (("liver.nii.gz", 5), ("sub/aorta.nii.gz", 7)):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(bytes(size))
    assert names_and_sizes(folder) == [["structures/liver.nii.gz", 5], ["structures/sub/aorta.nii.gz", 7]]
    assert names_and_sizes(tmp_path / "nothing") == []
    before = source_fingerprint([case(mask=folder)])
    (folder / "spleen.nii.gz").write_bytes(b"x")
    assert source_fingerprint([case(mask=folder)]) != before


@pytest.mark.parametrize(("cell", "value"), [("1", 1), ("0.0", 0), ("-1", -1), ("", -1)])
def test_labels(cell, value):
    assert read_label(cell, "here") == value


@pytest.mark.parametrize("cell", ["2", "yes", "nan", "0.5"])
def test_labels_that_are_none(cell):
    with pytest.raises(ValueError, match=r"labels.csv, x: label .* is none of 1, 0, -1"):
        read_label(cell, "labels.csv, x")
