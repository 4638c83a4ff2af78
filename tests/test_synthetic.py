"""The synthetic set on disk: bytes, layout, geometry, and reports that say what was painted."""

import argparse
import csv
import json

import numpy as np
import pytest
from tiny_release import contents

from data_builders import synthetic
from data_builders.phantom import FINDINGS_FILE, draw_patient, load_findings, render
from data_builders.phantom_reports import load_phrases, write_report
from modeling_fvlm.organs import load_organ_set
from modeling_fvlm.reading import read_nifti, read_nifti_mask

ORGANS = list(load_organ_set("body_24").organs)
FINDINGS = {row.finding: row for row in load_findings()}
SPACING = (24.0, 8.0, 8.0)  # coarse: a scan in milliseconds


def build(out, patients=4, validation=2, seed=0, workers=1, spacing=SPACING):
    args = argparse.Namespace(
        out=out, patients=patients, validation=validation, seed=seed, workers=workers, spacing=spacing
    )
    assert synthetic.run(args) == 0
    return out / "dataset"


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return build(tmp_path_factory.mktemp("set"))


def rows(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


# ---------------------------------------------------------------------------------------------------------------- bytes
def test_same_seed_same_bytes_whatever_the_number_of_workers(dataset, tmp_path):
    first, second = contents(dataset), contents(build(tmp_path / "again", workers=2))
    assert len(first) == 2 * 6 + 2 * 5 + 1
    assert first == second
    other = contents(build(tmp_path / "other", seed=1))
    assert other.keys() == first.keys()
    volumes = [name for name in first if name.endswith(".nii.gz")]
    assert all(first[name] != other[name] for name in volumes)
    assert len({first[name] for name in volumes}) == len(volumes)  # nor are two patients alike


def test_more_patients_leave_the_first_ones_alone(dataset, tmp_path):
    more, few = contents(build(tmp_path, patients=5, validation=3)), contents(dataset)
    shared = [name for name in few if name.endswith(".nii.gz")]
    assert shared and all(more[name] == few[name] for name in shared)


def test_archives_carry_neither_time_nor_name(dataset):
    for path in dataset.rglob("*.nii.gz"):
        head = path.read_bytes()[:10]
        assert head[3] == 0 and head[4:8] == bytes(4)  # no optional field, time 0


# --------------------------------------------------------------------------------------------------------------- layout
def test_layout_is_that_of_the_release(dataset):
    names = set(contents(dataset))
    for folder, split, count in (("train", "train", 4), ("valid", "validation", 2)):
        for number in range(1, count + 1):
            place = f"{folder}_fixed/{folder}_{number}/{folder}_{number}_a/{folder}_{number}_a_1.nii.gz"
            assert {place, f"ts_seg/ts_total/{place}"} <= names
        assert f"radiology_text_reports/{split}_reports.csv" in names
        assert f"multi_abnormality_labels/{folder}_predicted_labels.csv" in names
        assert {f"metadata/{split}_metadata.csv", f"metadata/no_chest_{folder}.txt"} <= names
        expected = [f"{folder}_{number}_a_1.nii.gz" for number in range(1, count + 1)]
        for table in (f"radiology_text_reports/{split}_reports.csv", f"metadata/{split}_metadata.csv"):
            assert [row["VolumeName"] for row in rows(dataset / table)] == expected


def test_columns_are_those_of_the_release(dataset, shared_dir):
    formats = (shared_dir / "FORMATS.md").read_text()
    for table in ("radiology_text_reports/train_reports.csv", "metadata/validation_metadata.csv"):
        header = (dataset / table).read_text().splitlines()[0]
        assert f"`{header}`" in formats, table
    header = (dataset / "multi_abnormality_labels" / "train_predicted_labels.csv").read_text().splitlines()[0]
    assert header == "VolumeName," + ",".join(FINDINGS)


@pytest.mark.parametrize("folder, split", [("train", 0), ("valid", 1)])
def test_files_hold_the_rendered_patient(dataset, folder, split):
    """Through the reader of the project: orientation, spacing and labels survive the way to disk and back."""
    orientations = set()
    for path in sorted((dataset / f"{folder}_fixed").rglob("*.nii.gz")):
        number = int(path.name.split("_")[1])
        patient = draw_patient((0, split, number))
        spacing = synthetic.draw_spacing(patient, SPACING)
        volume, mask = render(patient, spacing)
        stored = read_nifti(path)
        stored_mask = read_nifti_mask(dataset / "ts_seg" / "ts_total" / path.relative_to(dataset))
        np.testing.assert_array_equal(stored.array, volume)
        np.testing.assert_array_equal(stored_mask.array, mask)
        assert stored.spacing == pytest.approx(spacing, rel=1e-4)
        assert spacing != SPACING and all(0.89 < a / b < 1.11 for a, b in zip(spacing, SPACING))
        np.testing.assert_allclose(stored.affine, stored_mask.affine)
        orientations.add(tuple(np.sign(np.diag(read_affine(path))[:2])))
    if folder == "train":
        assert len(orientations) > 1, "all scans have one orientation on disk: nothing was tested"


def read_affine(path):
    import nibabel

    return nibabel.load(path).affine


def test_orientation_on_disk_moves_no_voxel_in_space():
    array = np.arange(24, dtype=np.int16).reshape(2, 3, 4)
    origin, places = np.array((10.0, 20.0, 30.0)), []
    for orientation in ("LPS", "RAS", "LAS", "RPI"):
        image = load_bytes(synthetic.nifti_bytes(array, (5.0, 2.0, 1.0), origin, orientation))
        import nibabel

        assert "".join(nibabel.aff2axcodes(image.affine)) == orientation
        index = np.argwhere(np.asarray(image.dataobj) == array[1, 2, 3])[0]
        places.append(image.affine @ [*index, 1])
    # voxel (1, 2, 3): LPS (10 + 3, 20 + 4, 30 + 5), and RAS turns the first two round
    np.testing.assert_allclose(places, [[-13, -24, 35, 1]] * 4)


def load_bytes(data):
    import gzip

    import nibabel

    return nibabel.Nifti1Image.from_bytes(gzip.decompress(data))


def test_metadata_describe_the_files(dataset):
    for row in rows(dataset / "metadata" / "train_metadata.csv"):
        scan = row["VolumeName"].removesuffix("_1.nii.gz")
        volume = read_nifti(dataset / "train_fixed" / scan[:-2] / scan / row["VolumeName"])
        assert volume.array.shape == (int(row["NumberofSlices"]), int(row["Rows"]), int(row["Columns"]))
        assert volume.spacing[0] == pytest.approx(float(row["ZSpacing"]), rel=1e-4)
        assert volume.spacing[1:] == pytest.approx(json.loads(row["XYSpacing"]), rel=1e-4)


def test_the_builder_of_the_release_reads_it(dataset):
    from data_builders.ct_rate import split_cases

    cases = split_cases(dataset, "train", "first")
    assert len(cases) == 4
    for case in cases:
        patient = draw_patient((0, 0, int(case.patient_id.split("_")[1])))
        assert (case.skip_reason is not None) == (patient.coverage == "head")
        assert dict(case.labels) == {name: int(name in patient.findings) for name in FINDINGS}
        assert case.findings and case.impression


def test_scans_of_the_head_are_listed_as_without_chest(tmp_path, monkeypatch):
    draw = synthetic.draw_patient
    monkeypatch.setattr(
        synthetic, "draw_patient", lambda entropy: draw(entropy, "head" if entropy[2] == 2 else "chest")
    )
    listed = (build(tmp_path, 3, 0) / "metadata" / "no_chest_train.txt").read_text()
    assert listed == "train_2_a_1.nii.gz\n"


# -------------------------------------------------------------------------------------------------------------- reports
@pytest.fixture(scope="module")
def reports():
    patients = [draw_patient((1, 0, number)) for number in range(200)]
    return [(patient, write_report(patient)) for patient in patients]


def test_gold_sentences_are_verbatim_and_cover_the_report(reports):
    for _, report in reports:
        for section in ("findings", "impression"):
            text = getattr(report, section)
            sentences = [sentence.text for sentence in getattr(report, f"{section}_sentences")]
            assert text and sentences
            rest = text
            for sentence in sentences:
                assert sentence in rest
                rest = rest.replace(sentence, "", 1)
            assert not any(letter.isalpha() for letter in rest), rest  # list marks alone are left
        for entry in report.by_organ().values():
            assert all(sentence in report.findings for sentence in entry["findings"])
            assert all(sentence in report.impression for sentence in entry["impression"])


def test_reports_state_what_was_painted_and_nothing_else(reports):
    for patient, report in reports:
        ill = {organ for name in patient.findings for organ in (FINDINGS[name].organ, *FINDINGS[name].also)}
        gold = report.by_organ()
        assert {organ for organ, entry in gold.items() if entry["abnormal"]} == ill
        spoken_of = set(gold) - {"femur"} - ill  # `also` may name an organ that is not whole
        assert spoken_of <= set(patient.covered_organs)
        stated = " ".join(s.text for s in report.findings_sentences + report.impression_sentences if s.is_abnormal)
        for name in FINDINGS.keys() - patient.findings.keys():
            assert not any(noun in stated.lower() for noun in FINDINGS[name].nouns), (name, stated)
        for name, detail in patient.findings.items():
            if detail.side in ("left", "right"):
                wrong = {"left": "right", "right": "left"}[detail.side]
                for sentence in report.findings_sentences + report.impression_sentences:
                    if sentence.is_abnormal and any(noun in sentence.text.lower() for noun in FINDINGS[name].nouns):
                        assert f"the {wrong}" not in sentence.text, sentence


def test_every_finding_is_stated_in_its_words(reports):
    """A positive sentence has a noun or a description of each finding of the patient."""
    for patient, report in reports:
        texts = [s for s in report.findings_sentences + report.impression_sentences if s.is_abnormal]
        for name in patient.findings:
            assert any(FINDINGS[name].organ in sentence.organs for sentence in texts), name


def test_reports_vary_as_reports_do(reports):
    lengths = [len(report.findings_sentences) for _, report in reports]
    assert 10 <= np.median(lengths) <= 25
    sentences = [s for _, report in reports for s in report.findings_sentences + report.impression_sentences]
    texts = [sentence.text for sentence in sentences]
    assert len(set(texts)) > 600
    assert sum(text.startswith(("No ", "There is no", "There are no")) for text in texts) > 300
    assert any(len(s.organs) == 2 and not s.is_abnormal for s in sentences)
    assert any(len(s.organs) == 2 and s.is_abnormal for s in sentences)
    assert any(not s.organs for s in sentences)
    whole = [report for patient, report in reports if patient.coverage == "whole"]
    mentioned = [len(report.by_organ()) for report in whole]
    assert 8 < np.mean(mentioned) < 22 and min(mentioned) < 16  # many organs are not spoken of
    stated = [any(s.is_abnormal for s in report.impression_sentences) for p, report in reports if len(p.findings) > 2]
    assert np.mean(stated) > 0.95
    styles = [report.impression[:1] for _, report in reports]
    assert {"1", "-"} < set(styles)


def test_impression_holds_most_findings(reports):
    named = total = 0
    for patient, report in reports:
        for name in patient.findings:
            total += 1
            named += any(s.is_abnormal and FINDINGS[name].organ in s.organs for s in report.impression_sentences)
    assert 0.82 < named / total < 0.97


def test_gold_file_has_the_form_of_the_samples(dataset, shared_dir):
    gold = json.loads((dataset / "synthetic_gold" / "train_gold.json").read_text())
    sample = json.loads((shared_dir / "reports_samples.json").read_text())[0]
    assert [entry["id"] for entry in gold] == [f"train_{number}_a" for number in range(1, 5)]
    texts = rows(dataset / "radiology_text_reports" / "train_reports.csv")
    for entry, text in zip(gold, texts):
        assert entry.keys() == sample.keys()
        assert (entry["findings"], entry["impression"]) == (text["Findings_EN"], text["Impressions_EN"])
        assert entry["organs"] and set(entry["organs"]) <= set(ORGANS)
        assert all(organ.keys() == sample["organs"]["lung"].keys() for organ in entry["organs"].values())


def test_phrases_fit_the_organs():
    phrases = load_phrases()
    assert set(phrases["normal"]) == set(ORGANS), FINDINGS_FILE
    assert all(set(entry["organs"]) <= set(ORGANS) for entry in phrases["normal_pairs"])
    assert all(set(entry["findings"]) <= set(FINDINGS) for entry in phrases["joint"])
    for row in FINDINGS.values():
        assert len(row.nouns) >= 2 and set(row.plural) <= set(row.nouns) and len(row.described) >= 3
        assert row.size_mm or not any("{mm}" in text for text in row.described)
        assert row.count or not any("{count}" in text for text in row.described)
        assert row.sides or not any("{side}" in text for text in row.described)


# --------------------------------------------------------------------------------------------------------- command line
@pytest.mark.parametrize(
    "change, message",
    [
        ({"patients": 0, "validation": 0}, "at least one patient"),
        ({"spacing": (20, 0, 4)}, "above 0 mm"),
        ({"workers": 0}, "at least one process"),
        ({"seed": -1}, "0 or above"),
    ],
)
def test_impossible_arguments_say_so(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        build(tmp_path, **change)
    assert not (tmp_path / "dataset").exists()


def test_a_folder_that_holds_a_set_is_left_alone(dataset, capsys):
    before = contents(dataset)
    assert synthetic.main(["--patients", "1", "--validation", "0", "--seed", "5", "--out", str(dataset.parent)]) == 2
    assert "would mix" in capsys.readouterr().err
    assert contents(dataset) == before
