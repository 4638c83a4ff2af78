"""No name, date, id or header text leaves the source; what a report says of a person is told by place and kind."""

import csv
import dataclasses
import gzip
import hashlib
import hmac
import io
import json
import random
import stat
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nibabel
import numpy as np
import pyarrow.parquet as pq
import pytest
import zstandard
from PIL import Image
from tiny_release import REPORT, SPACING, arrays, save_nifti, write_csv

from data_builders import privacy
from data_builders.__main__ import main
from data_builders.cases import Case, OrganText, sort_cases
from data_builders.personal_text import given_names, kinds_in_id, kinds_in_text
from data_builders.phantom import draw_patient
from data_builders.phantom_reports import write_report
from data_builders.privacy import (
    PSEUDONYM,
    concern_lines,
    default_salt_file,
    pseudonymise,
    read_salt,
    salt_check,
    scan_reports,
    scrub,
    write_key,
)
from data_builders.sources import RemoteFile
from modeling_fvlm.reading import read_volume

SALT = "5f" * 32


def case(name: str, patient: str | None = None, scan: str | None = None, **fields) -> Case:
    return Case("train", patient or name, scan or name, name, **fields)


# ---- pseudonyms


def test_pseudonyms_are_keyed_hashes_that_stay_together():
    cases = [
        case("7", "P", "7"),
        case("8", "P", "7", duplicate_of="7"),
        case("9", "Q", "8", duplicate_of="7"),
    ]
    hashed = pseudonymise(cases, SALT)
    for before, after in zip(cases, hashed):
        for level, letter in (("patient_id", "p"), ("scan_id", "s"), ("recon_id", "r")):
            text = f"{level} {getattr(before, level)}"
            digest = hmac.new(SALT.encode(), text.encode(), hashlib.sha256).hexdigest()
            assert getattr(after, level) == letter + digest[:16]
            assert PSEUDONYM.fullmatch(getattr(after, level))
    first, second, third = hashed
    assert first.patient_id == second.patient_id != third.patient_id
    assert first.scan_id == second.scan_id != third.scan_id
    assert second.duplicate_of == third.duplicate_of == first.recon_id and first.duplicate_of is None
    # An id that is a patient's, a scan's and a reconstruction's: three pseudonyms that have no digits in common.
    assert len({hashed[0].recon_id[1:], hashed[0].scan_id[1:]}) == 2
    other = pseudonymise(cases, "a0" * 32)
    assert not {c.recon_id for c in other} & {c.recon_id for c in hashed}
    assert [dataclasses.replace(c, patient_id="", scan_id="", recon_id="", duplicate_of=None) for c in hashed] == [
        dataclasses.replace(c, patient_id="", scan_id="", recon_id="", duplicate_of=None) for c in cases
    ]


def test_order_of_the_source_neither_matters_nor_shows():
    cases = [case(f"train_{number}") for number in range(60)]
    shuffled = random.Random(3).sample(cases, len(cases))
    of_id = {c.recon_id: new.recon_id for c, new in zip(cases, pseudonymise(cases, SALT))}
    assert {c.recon_id: new.recon_id for c, new in zip(shuffled, pseudonymise(shuffled, SALT))} == of_id
    sorted_hashes = [c.recon_id for c in sort_cases(pseudonymise(cases, SALT))]
    assert sorted_hashes == [c.recon_id for c in sort_cases(pseudonymise(shuffled, SALT))]
    places = [sorted_hashes.index(of_id[c.recon_id]) for c in cases]  # where the source's order has come to
    assert abs(np.corrcoef(places, range(len(places)))[0, 1]) < 0.4


def test_a_collision_is_refused(monkeypatch):
    monkeypatch.setattr(privacy, "_digest", lambda salt, text: "0" * 64)
    with pytest.raises(ValueError, match="same pseudonym; use another salt"):
        pseudonymise([case("a"), case("b")], SALT)


# ---- salt and key


def test_salt_is_made_once_beside_the_split_for_its_owner_alone(tmp_path):
    out = tmp_path / "new" / "split"
    place = default_salt_file(out)
    assert place == tmp_path / "new" / "split.salt"
    salt = read_salt(place, out)
    assert len(bytes.fromhex(salt)) == 32 and len(set(bytes.fromhex(salt))) > 8
    assert stat.S_IMODE(place.stat().st_mode) == 0o600
    assert read_salt(place, out) == salt
    assert [path.name for path in place.parent.iterdir()] == ["split.salt"], "a temporary file is left"
    other = read_salt(tmp_path / "other.salt", out)
    assert other != salt and salt_check(other) != salt_check(salt)
    assert len(salt_check(salt)) == 8 and salt_check(salt) not in salt


def test_processes_that_begin_at_once_share_one_salt(tmp_path):
    out = tmp_path / "split"
    with ThreadPoolExecutor(8) as pool:
        salts = set(pool.map(lambda _: read_salt(tmp_path / "split.salt", out), range(40)))
    assert len(salts) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["split.salt"]


def test_salt_never_lies_inside_the_split(tmp_path):
    out = tmp_path / "split"
    out.mkdir()
    (tmp_path / "link").symlink_to(out)
    for inside in (out / "salt", tmp_path / "split" / "deep" / "salt", tmp_path / "link" / "salt"):
        with pytest.raises(ValueError, match="lies inside the processed split"):
            read_salt(inside, out)
        with pytest.raises(ValueError, match="lies inside the processed split"):
            write_key(inside, out, [], [])
    assert not list(out.rglob("*"))


@pytest.mark.parametrize("content", [b"", b"patient,report\n", b"\xff\xfe", b"5f" * 31, b"5F" * 32])
def test_a_file_that_is_no_salt_is_refused_and_kept(tmp_path, content):
    path = tmp_path / "reports.csv"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="is no salt file"):
        read_salt(path, tmp_path / "split")
    assert path.read_bytes() == content


@pytest.mark.parametrize("begun", [".building/identity.json", "manifest.json"])
def test_a_lost_salt_is_not_replaced(tmp_path, begun):
    path = tmp_path / "split" / begun
    path.parent.mkdir(parents=True)
    path.write_text("{}")
    with pytest.raises(ValueError, match="no salt file .* a build was begun"):
        read_salt(tmp_path / "split.salt", tmp_path / "split")
    assert not (tmp_path / "split.salt").exists()


def test_key_file_is_the_owners_table(tmp_path):
    cases = [case("r,10", "p", "s"), case("r2", "p", "s")]
    hashed = pseudonymise(cases, SALT)
    path = tmp_path / "key.csv"
    for _ in range(2):  # a build that is continued writes it again
        write_key(path, tmp_path / "split", cases, hashed)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["level"], row["source_id"]) for row in rows] == [
        *(("patient_id", "p"), ("scan_id", "s")),
        *(("recon_id", "r2"), ("recon_id", "r,10")),
    ]
    assert {row["source_id"]: row["pseudonym"] for row in rows} == {
        "p": hashed[0].patient_id,
        "s": hashed[0].scan_id,
        "r,10": hashed[0].recon_id,
        "r2": hashed[1].recon_id,
    }
    assert [file.name for file in tmp_path.iterdir()] == ["key.csv"]
    other = tmp_path / "reports.csv"
    other.write_text("id,findings\n")
    with pytest.raises(ValueError, match="no table of pseudonyms"):
        write_key(other, tmp_path / "split", cases, hashed)
    assert other.read_text() == "id,findings\n"


# ---- skip reasons and warnings


@pytest.mark.parametrize(
    "reason, expected",
    [
        (
            "volume file is missing: none is named Doe_1.nii.gz or Doe_1_*.nii.gz",
            "volume file is missing: none is named",
        ),
        ("volume file Doe John/ct 1.nii.gz is missing; nearest: 'Doe_2.nii.gz'", "volume file is missing; nearest: '"),
        ("several files fit as mask: ['Roe_1.nii', 'Doe_1_b.nii']; name one in a column 'mask'", "a column 'mask'"),
        ("there is no report 'Doe 4711' in DoeReports.csv; nearest: 'Roe'", "there is no report '...' in"),
        ("Doe_1: volume (20, 24, 32) and mask (20, 24, 30) are not on one grid.", "(20, 24, 32) and mask (20, 24, 30)"),
        ("hospital/Doe_1.nii.gz: compressed data ends early at byte 1048576", ": compressed data ends early at byte"),
        ("organ 'lung_upper_lobe_left' of 'totalsegmentator_v2' is not in it", "'lung_upper_lobe_left' of 'totalseg"),
        ("no series 1.2.840.113619.2.55.3.4711 of 12.03.2019 (Doe^John)", "no series "),
        ("mask folder Doe John holds no structure, but ['Doe']", "mask folder holds no structure, but ['"),
        ("hf://datasets/doe/john@main/x.nii.gz did not answer", "... did not answer"),
    ],
)
def test_skip_reasons_keep_their_sense_and_lose_their_names(reason, expected):
    cases = [case("Doe_1", "Doe^John", "visit Doe", skip_reason=reason), case("Roe")]
    hashed = pseudonymise(cases, SALT)[0]
    assert expected in hashed.skip_reason, hashed.skip_reason
    for name in ("doe", "john", "roe", "4711", "2019", "113619", "hospital"):
        assert name not in hashed.skip_reason.lower(), hashed.skip_reason


def test_names_of_a_cases_files_become_its_pseudonym(tmp_path):
    slices = tmp_path / "Doe John" / "DICOM"
    slices.mkdir(parents=True)
    (slices / "DOE0001").write_bytes(b"")
    archive = tmp_path / "Roe.zip"
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("Doe/IMG7", b"")
    hashed = pseudonymise([case("x1", volume=slices.parent, mask=archive)], SALT)[0]
    new = hashed.recon_id
    text = f"{slices.parent}: slice DOE0001 of Doe John differs from IMG7 in {archive.name}; 2 slices"
    assert scrub(text, hashed) == f"{new}: slice {new} of {new} differs from {new} in {new}; 2 slices"
    remote = dataclasses.replace(hashed, volume=RemoteFile("hf://datasets/o/n@c/Doe_9.nii.gz", 5), mask=None)
    assert scrub("Doe_9.nii.gz: 4 of 5 bytes", remote) == f"{new}: 4 of 5 bytes"


def test_a_short_number_is_an_id_only_where_it_stands_as_one():
    hashed = pseudonymise([case("12", skip_reason="12: the volume has 12 slices, '12' is its id")], SALT)[0]
    new = hashed.recon_id
    assert hashed.skip_reason == f"{new}: the volume has 12 slices, '{new}' is its id"


def test_another_case_in_quotes_is_named_by_its_pseudonym():
    """Also where its id begins with an id of this one: a reconstruction begins with its scan."""
    reason = "another reconstruction of this scan, 'train_1_a_1', comes first"
    cases = [
        case("train_1_a_1", "train_1", "train_1_a"),
        case("train_1_a_2", "train_1", "train_1_a", skip_reason=reason),
    ]
    first, second = pseudonymise(cases, SALT)
    assert second.skip_reason == f"another reconstruction of this scan, '{first.recon_id}', comes first"


def test_a_reason_without_names_stays_as_it_is(tmp_path):
    mask = tmp_path / "mask"
    mask.mkdir()
    (mask / "liver.nii.gz").write_bytes(b"")
    hashed = pseudonymise([case("train_1", volume=tmp_path / "volume.nii.gz", mask=mask)], SALT)[0]
    for reason in (
        "mask is empty: no voxel is one of the organs ['lung', 'liver']",
        "liver.nii.gz: the structure has another grid than its folder",
        "the volume has spacing (0.0, 1.0, 1.0) mm; every edge must be above 0 mm",
        "lung has a median of -2024 HU, expected -980 to -200: look at rescale slope and intercept, and at numbering",
        "the scan's axes and the mask's axes differ by 3/4 of a voxel; T12 is cut at 1.2.3",
    ):
        assert scrub(reason, hashed) == reason


# ---- what a report says of a person

SAYS = [
    *[
        (text, "date")
        for text in ("CT of 2021-03-12.", "Compared with 12.03.2021.", "prior from 3/12/2021", "12-03-2021")
    ],
    *[
        (text, "date")
        for text in ("12 March 2021", "March 12, 2021", "12th of April", "on April 3", "Mar 2019", "12-Mar-21")
    ],
    *[
        (text, "date")
        for text in ("12. März 2021", "3. Oktober", "Voraufnahme vom 12.03.", "im Mai 2020", "12.03.21 CT")
    ],
    *[(text, "date") for text in ("in 03/2019", "study 20210312", "DOB: 1950-02-01", "geb. am 1.2.1950", "3/12/19 CT")],
    *[(text, "name") for text in ("Dr. Smith was called.", "Prof. Dr. med. Anna Weber", "Mrs. Jones", "Herr Müller")],
    *[(text, "name") for text in ("Patient: Doe, John", "PATIENT NAME: DOE", "Name: Doe", "Nachname: Müller")],
    *[(text, "name") for text in ("Electronically signed by the reader", "Dictated by Jane Roe", "befundet von Weber")],
    *[(text, "name") for text in ("DOE^JOHN", "Radiologist: Roe", "J. Roe. John Smith, MD", "seen by Maria Lopez")],
    *[(text, "number") for text in ("MRN 1234567", "Accession: CT-20190", "Patient ID: A00123", "SSN 123-45-6789")],
    *[(text, "number") for text in ("Fallnummer 778899", "series 1.2.840.113619.2.55.3", "accession number 998877")],
    *[(text, "contact") for text in ("call 555-123-4567", "Tel.: 030 1234567", "roe@example.org", "+49 30 123456")],
]
SAYS_NOT = [
    *(
        "3/4 of the lobe",
        "T12 and L4/5",
        "12.5 x 8.4 mm",
        "section 1.2.3",
        "segments 5/6/7",
        "ribs 10/11/12",
        "Th11/12",
    ),
    *(
        "in segment 2. May represent a cyst.",
        "nodules 3 may be seen",
        "march fracture",
        "since 2015",
        "size 12/8/10 mm",
    ),
    *("HU of -1024", "0.5-1.25 mm", "series 3 image 120", "120 kV, 250 mAs", "18x14 mm, 2.3 cm", "7 x 5 x 12 mm"),
    *("MR angiography", "MS lesions", "DR Chest", "Dr", "Miss nothing", "patient is supine", "Patient: Male, 54 years"),
    *("The patient: No change.", "Study name: Thorax", "Thomas splint", "Baker cyst", "Virchow-Robin spaces"),
    *(
        "verified by PET",
        "read by the resident",
        "case 12",
        "accession none",
        "phone booth",
        "Bosniak IIF",
        "BI-RADS 4",
    ),
    *("Fleischner Society 2017", "grade 1-2", "5.2010 mm", "2021", "100 to 200 mm", "August", "L1-L2-L3", "C5/6/7"),
    *("1. Nodule. 2. Cyst. 3. Stone.", "Segment 4a/4b", "10.5.3 Hounsfield", "MRN", "Lung-RADS 2 (2022)"),
]


@pytest.mark.parametrize("text, kind", SAYS)
def test_what_names_a_person_is_found_once(text, kind):
    assert kinds_in_text(text) == ((kind, 1),)
    assert kinds_in_text(f"The lungs are clear. {text}\nNo effusion.") == ((kind, 1),)


@pytest.mark.parametrize("text", SAYS_NOT)
def test_what_names_nobody_is_left_alone(text):
    assert kinds_in_text(text) == ()


def test_kinds_are_counted():
    text = "Dr. Roe compared 12.03.2021 with 1 May 2020. MRN 4711471, DOB: 01.02.1950. Ask Dr. Doe."
    assert kinds_in_text(text) == (("date", 3), ("name", 2), ("number", 1))


def test_reports_that_name_nobody_raise_no_concern(shared_dir):
    """Ten invented reports and 200 of the procedural body: not one concern."""
    samples = json.loads((shared_dir / "reports_samples.json").read_text(encoding="utf-8"))
    reports = [(sample["findings"], sample["impression"]) for sample in samples]
    for number in range(200):
        report = write_report(draw_patient((11, 0, number)))
        reports.append((report.findings, report.impression))
    assert len(reports) == 210 and sum(len(findings) for findings, _ in reports) > 100_000
    cases = [
        case(f"train_{number}_a_1", f"train_{number}", f"train_{number}_a", findings=findings, impression=impression)
        for number, (findings, impression) in enumerate(reports)
    ]
    assert scan_reports(cases) == []


@pytest.mark.parametrize(
    "name, kinds",
    [
        *((name, ("name",)) for name in ("DOE^JOHN", "doe_john_2", "Müller, Anna", "Maria-Lopez", "Roe,Xaver")),
        *((name, ("date",)) for name in ("19700101", "ct_2021-03-12", "12.03.2021_a", "31121999", "2021_03_12")),
        *((name, ("number",)) for name in ("1.2.840.113619.2.55.3.604688",)),
        *((name, ()) for name in ("train_53_a_1", "trn00001", "LIDC-IDRI-0001", "20191345", "v1.2.3", "NSCLC_Thorax")),
        *((name, ()) for name in ("s0123456789abcdef", "4711", "scan_2021", "123456789012")),
        ("Anna_19340506", ("date", "name")),
    ],
)
def test_ids_that_tell_a_name_or_a_day(name, kinds):
    assert kinds_in_id(name) == kinds


def test_given_names_are_lower_case_words():
    names = given_names(False)
    assert len(names) > 150 and all(len(name) >= 4 and name == name.lower() and name.isalpha() for name in names)
    assert given_names(True) < names


def test_concerns_tell_where_and_what_kind_never_the_text():
    texts = {"lung": OrganText(("Seen by Dr. Roe.",), ("Stable since 12.03.2021.",), False)}
    cases = [
        case("DOE^JOHN", findings="Seen on 12.03.2021 and 13.03.2021.", impression="Clear.", organ_texts=texts),
        case("a", "p", "s", findings="Dr. Smith.", skip_reason="not written, so not looked at"),
        case(
            "b", "19700101", "s1", impression="Mrs. Jones.", organ_texts={"lung": OrganText(("Mrs. Jones.",), (), True)}
        ),
    ]
    concerns = scan_reports(cases)
    assert [(item.recon_id, item.field, item.kind, item.count) for item in concerns] == [
        ("DOE^JOHN", "findings", "date", 2),
        ("DOE^JOHN", "captions", "date", 1),
        ("DOE^JOHN", "captions", "name", 1),
        ("DOE^JOHN", "patient_id", "name", 1),  # the same word on three levels
        ("b", "impression", "name", 1),  # a caption that repeats the report adds nothing
        ("b", "patient_id", "date", 1),
    ]
    hashed = scan_reports(pseudonymise(cases, SALT))
    assert [item.field for item in hashed] == ["findings", "captions", "captions", "impression"]
    lines = "\n".join(concern_lines(hashed))
    assert "2 cases" in lines and "date in texts: 3" in lines and "name in texts: 2" in lines
    assert hashed[0].recon_id in lines
    assert not any(word in lines for word in ("2021", "Roe", "Smith", "Jones", "DOE"))
    assert concern_lines([]) == []
    assert scan_reports([case("r19700101abcdef0a")]) == [], "a pseudonym may hold any digits"


# ---- the whole way: whatever a source holds, nothing of it is in the split or on the screen

NAMES = "quaxi"  # in every id, file and folder name, whatever its case
HEADERS = "quoxa"  # in every text of a header
NUMBERS = ("19341103", "20170523", "3680043.10.4711")  # birthday, day of the scan, root of the UIDs
UID = "1.2.826.0.1.3680043.10.4711"


def save_with_texts(array: np.ndarray, path: Path) -> Path:
    """A NIfTI file with every free text that its header can hold."""
    image = nibabel.load(save_nifti(array, path))
    image = nibabel.Nifti1Image(np.asarray(image.dataobj), image.affine, image.header)
    for name in ("descrip", "aux_file", "intent_name", "db_name", "data_type"):
        image.header[name] = b"quoxa 0815"
    image.header.extensions.append(nibabel.nifti1.Nifti1Extension("comment", b"quoxa, born 19341103"))
    nibabel.save(image, path)
    stored = nibabel.load(path)
    assert b"quoxa" in stored.header["descrip"].tobytes() and len(stored.header.extensions) == 1
    return path


def save_dicom(volume: np.ndarray, folder: Path, left_out: tuple[int, ...] = ()) -> np.ndarray:
    """A series whose every text, day and UID is to be looked for; returns its affine `(slice, row, column)`."""
    from dicom_series import write_series

    affine = np.zeros((4, 4))
    affine[[2, 1, 0, 3], [0, 1, 2, 3]] = [SPACING[0], -SPACING[1], -SPACING[2], 1]
    affine[:3, 3] = (60.0, 50.0, -100.0)

    def edit(dataset, index: int) -> None:
        for keyword in ("PatientName", "ReferringPhysicianName", "OperatorsName"):
            setattr(dataset, keyword, "Quoxa^Alma")
        for keyword in ("InstitutionName", "StudyDescription", "SeriesDescription", "ProtocolName", "StationName"):
            setattr(dataset, keyword, "Quoxa")
        for keyword in ("PatientComments", "ImageComments", "InstitutionAddress"):
            setattr(dataset, keyword, "Quoxa, 19341103")
        dataset.PatientID, dataset.AccessionNumber, dataset.StudyID = "QUOXA0815", "QUOXA77", "QUOXA1"
        dataset.PatientBirthDate = "19341103"
        dataset.StudyDate = dataset.SeriesDate = dataset.ContentDate = "20170523"
        dataset.StudyInstanceUID, dataset.SOPInstanceUID = f"{UID}.1", f"{UID}.2.{index + 1}"
        dataset.FrameOfReferenceUID = f"{UID}.3"
        dataset.add_new((0x0029, 0x0010), "LO", "QUOXA PRIVATE")
        dataset.add_new((0x0029, 0x1001), "LO", "Quoxa privat")

    write_series(
        folder,
        volume,
        affine,
        uid=f"{UID}.4",
        names=[f"QUAXI{index:04d}" for index in range(len(volume))],
        edit=edit,
    )
    for index in left_out:
        (folder / f"QUAXI{index:04d}").unlink()
    return affine


@pytest.fixture(scope="module")
def canary_source(tmp_path_factory):
    """A folder of a made-up hospital: names, days and numbers wherever a file can hold one."""
    root = tmp_path_factory.mktemp("source")
    scans, masks = root / "scans", root / "masks"
    volume, mask = arrays()
    ward = scans / "Quaxi^Berta 19341103"
    for name in ("Quaxi^Alma", "quaxi_nomask", "quaxi_grid", "quaxi_structures", "QUAXI_unused_Clara"):
        save_with_texts(volume, ward / f"{name}.nii.gz")
    for name in ("quaxi_twice_1", "quaxi_twice_2"):
        save_with_texts(volume, scans / f"{name}.nii.gz")
    whole = save_with_texts(volume, scans / "quaxi_broken.nii.gz")
    whole.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    save_with_texts(mask, masks / "Quaxi^Alma_Quaxi.nii.gz")
    for name in ("quaxi_broken", "quaxi_hole", "quaxi_twice", "quaxi_gone", "quaxi_silent"):
        save_with_texts(mask, masks / f"{name}.nii.gz")
    save_with_texts(volume, ward / "quaxi_silent.nii.gz")
    save_with_texts(mask[:, :-2], masks / "quaxi_grid.nii.gz")
    (masks / "quaxi_structures").mkdir()
    save_with_texts(mask, masks / "quaxi_structures" / "Quaxi_Struktur.nii.gz")
    affine = save_dicom(volume, scans / "Quaxi_DICOM 0815")
    save_dicom(volume, scans / "quaxi_hole", left_out=(9, 10))
    image = nibabel.Nifti1Image(np.ascontiguousarray(mask.transpose(2, 1, 0)), affine[:, [2, 1, 0, 3]])
    nibabel.save(image, masks / "Quaxi_DICOM 0815.nii.gz")
    rows = [
        {"id": "Quaxi^Alma", "patient_id": "Quaxi, Otto", "scan_id": "Quaxi 20170523"},
        {"id": "Quaxi_DICOM 0815", "patient_id": "QUAXI0815"},
        *({"id": f"quaxi_{name}", "patient_id": "Quaxi 19341103"} for name in ("broken", "hole", "twice", "nomask")),
        *({"id": f"quaxi_{name}", "patient_id": "Quaxi"} for name in ("grid", "structures")),
        {"id": "quaxi_gone", "patient_id": "Quaxi", "volume": "Quaxi^Berta 19341103/Quaxi verschwunden.nii.gz"},
        {"id": "quaxi_silent", "patient_id": "Quaxi", "report": "Quaxi Bericht 0815"},
    ]
    reports = [{"id": row["id"], **REPORT} for row in rows if row["id"] != "quaxi_silent"]
    table = [{"volume": "", "report": "", "scan_id": row["id"], **row} for row in rows]
    write_csv(root / "table.csv", [{key: row[key] for key in sorted(row)} for row in table])
    write_csv(root / "reports.csv", reports)
    return root


def build(source: Path, out: Path, *arguments: str, previews: int = 0) -> int:
    settings = ["--spacing", "3", "4", "4", "--margin", "2", "3", "3", "--workers", "1", "--validation_fraction", "0"]
    settings += ["--volumes", source / "scans", "--masks", source / "masks", "--table", source / "table.csv"]
    settings += ["--reports", source / "reports.csv", "--configs", "volumes", "organ_crops", "--previews", previews]
    return main(["folder", "--out", str(out), *map(str, settings), *arguments])


def everything_in(folder: Path) -> dict[str, bytes]:
    """All bytes of a processed split: names, files, unpacked blobs of Parquet rows, texts of pictures."""
    found = {"file names": "\n".join(str(path.relative_to(folder)) for path in folder.rglob("*")).encode()}
    for path in folder.rglob("*"):
        if path.is_dir():
            continue
        name, content = str(path.relative_to(folder)), path.read_bytes()
        found[name] = content
        if path.suffix == ".parquet":
            for index, row in enumerate(pq.read_table(path).to_pylist()):
                blobs = [row.pop(key) for key in ("volume", "mask")]
                found[f"{name} row {index}"] = repr(row).encode()
                for place, blob in enumerate(blobs):
                    found[f"{name} row {index} blob {place}"] = zstandard.ZstdDecompressor().decompress(blob)
        if path.suffix == ".png":
            with Image.open(io.BytesIO(content)) as picture:
                found[f"{name} texts"] = repr(picture.info).encode()
    return found


def leaks(content: bytes, names: tuple[str, ...]) -> list[str]:
    """Which of the names stand in some bytes, in either case, as UTF-8 or UTF-16, broken by a line end or not."""
    plain = content.lower()
    forms = (plain, plain.replace(b"\0", b""), b"".join(plain.split()))
    return [name for name in names if any(name.lower().encode() in form for form in forms)]


def test_nothing_of_the_source_is_in_the_split_or_on_the_screen(canary_source, tmp_path, capfd):
    out, key = tmp_path / "split", tmp_path / "key.csv"
    assert build(canary_source, out, "--id_key", str(key), previews=1) == 0
    printed = "".join(capfd.readouterr())
    manifest = json.loads((out / "manifest.json").read_text(encoding="utf-8"))
    assert sum(split["rows"] for split in manifest["splits"].values()) == 2, manifest["skipped"]
    assert len(manifest["skipped"]) == 8, manifest["skipped"]
    assert all(len(entry["reason"]) > 10 and PSEUDONYM.fullmatch(entry["case"]) for entry in manifest["skipped"])
    found = everything_in(out)
    assert any(name.endswith("blob 0") for name in found) and any(name.endswith(".png") for name in found)
    assert any(name.startswith("organ_crops/") for name in found)
    salt = default_salt_file(out).read_text().strip()
    forbidden = (NAMES, HEADERS, *NUMBERS, salt, str(canary_source))
    for name, content in {**found, "screen": printed.encode()}.items():
        assert leaks(content, forbidden) == [], f"{name}: {content[:2000]!r}"
    with key.open(newline="", encoding="utf-8") as file:
        pseudonym_of = {(row["level"], row["source_id"]): row["pseudonym"] for row in csv.DictReader(file)}
    files = sorted((out / "volumes").glob("*.parquet"))
    rows = {row["recon_id"]: row for file in files for row in pq.read_table(file).to_pylist()}
    alma = rows[pseudonym_of["recon_id", "Quaxi^Alma"]]
    assert alma["patient_id"] == pseudonym_of["patient_id", "Quaxi, Otto"]
    assert alma["scan_id"] == pseudonym_of["scan_id", "Quaxi 20170523"]
    assert pseudonym_of["recon_id", "Quaxi_DICOM 0815"] in rows


def test_the_search_finds_what_is_there_and_headers_are_never_copied(canary_source, tmp_path, capfd):
    """With ids kept the names of the files are in the split, as asked for; texts of headers are not even then."""
    out = tmp_path / "split"
    assert build(canary_source, out, "--ids", "kept", previews=1) == 0
    capfd.readouterr()
    found = everything_in(out)
    assert {name for name, content in found.items() if leaks(content, (NAMES,))} >= {"file names", "manifest.json"}
    assert any("row 0" in name and leaks(content, (NAMES,)) for name, content in found.items())
    for name, content in found.items():
        assert leaks(content, (HEADERS, "3680043.10.4711")) == [], name
    packed = gzip.compress(b"Quoxa")
    assert leaks(gzip.decompress(packed), (HEADERS,)) and not leaks(packed, (HEADERS,))
    assert leaks("Quaxi".encode("utf-16"), (NAMES,)) and leaks(b"Qua\n  xi", (NAMES,))


@pytest.mark.parametrize("ids", ["hashed", "kept"])
def test_what_is_odd_about_a_file_is_told_in_the_manifest_and_not_logged(tmp_path, capfd, caplog, ids):
    """A log line of the reader has the whole path in it."""
    source, out = tmp_path / "source", tmp_path / "split"
    volume, mask = arrays()
    volume[0, 0, 0] = 30000  # metal
    for name, dtype in (("quaxi_1", np.int16), ("quaxi_2", np.int32)):  # read slice by slice, and as a whole
        path = save_nifti(volume.astype(dtype), source / "scans" / f"{name}.nii.gz")
        save_nifti(mask, source / "masks" / f"{name}.nii.gz")
    write_csv(source / "table.csv", [{"id": "quaxi_1"}, {"id": "quaxi_2"}])
    write_csv(source / "reports.csv", [{"id": name, **REPORT} for name in ("quaxi_1", "quaxi_2")])
    assert build(source, out, "--ids", ids) == 0
    printed = capfd.readouterr()
    assert [record for record in caplog.records if record.levelname == "WARNING"] == []
    assert str(tmp_path) not in printed.err and leaks(printed.err.encode(), (NAMES,)) == []
    warnings = json.loads((out / "manifest.json").read_text(encoding="utf-8"))["warnings"]
    told = [entry["case"] for entry in warnings if "far outside a CT's HU" in entry["warning"]]
    assert len(told) == 2 and "far outside a CT's HU" in printed.out
    assert all(PSEUDONYM.fullmatch(case) if ids == "hashed" else case.startswith("quaxi_") for case in told)
    read_volume(path)
    assert path.name in caplog.text, "who reads a file himself is told"


def test_a_build_is_not_continued_with_another_salt(tmp_path, capfd):
    source, out = tmp_path / "source", tmp_path / "split"
    volume, mask = arrays()
    save_nifti(volume, source / "scans" / "p_1.nii.gz")
    save_nifti(mask, source / "masks" / "p_1.nii.gz")
    write_csv(source / "table.csv", [{"id": "p_1"}])
    write_csv(source / "reports.csv", [{"id": "p_1", **REPORT}])
    assert build(source, out) == 0
    before = (out / "manifest.json").read_bytes()
    assert salt_check(default_salt_file(out).read_text().strip()).encode() in before
    assert build(source, out) == 0  # the same salt: nothing to do
    assert (out / "manifest.json").read_bytes() == before
    capfd.readouterr()
    assert build(source, out, "--id_salt", str(tmp_path / "other.salt")) == 2
    (tmp_path / "new.salt").write_text("ab" * 32)
    assert build(source, out, "--id_salt", str(tmp_path / "new.salt")) == 2
    errors = capfd.readouterr().err
    assert "there is no salt file" in errors and "other settings" in errors
    assert (out / "manifest.json").read_bytes() == before
