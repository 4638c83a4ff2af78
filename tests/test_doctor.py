"""The doctor: figures against a slow count, and splits spoiled on purpose, each to be told from a sound one."""

import copy
import json
import re
import shutil
from dataclasses import replace
from itertools import permutations, product

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from phantom_split import ORGANS, build_split, render_scans

from data_builders import doctor
from data_builders.__main__ import main
from data_builders.doctor import HISTOGRAM_EDGES, Examination, RowPlace, examine, measure_organs, measure_row, spread
from data_builders.doctor_findings import READINGS, Finding, best_readings, find, ml_text, volume_outliers
from data_builders.inspection import cases_to_draw
from modeling_fvlm.captions import normal_caption
from modeling_fvlm.processed_split import decode_volume, encode_array

TRAIN, VALIDATION = 9, 8


@pytest.fixture(scope="module")
def scans(tmp_path_factory):
    return render_scans(tmp_path_factory.mktemp("scans"), TRAIN, VALIDATION)


@pytest.fixture(scope="module")
def split(scans, tmp_path_factory):
    return build_split(scans, tmp_path_factory.mktemp("split") / "out")


@pytest.fixture(scope="module")
def manifest(split):
    return json.loads((split / "manifest.json").read_text(encoding="utf-8"))


def rows_of(folder) -> dict[str, list[dict]]:
    return {
        name: [row for path in sorted(folder.glob(f"volumes/{name}-*")) for row in pq.read_table(path).to_pylist()]
        for name in ("train", "validation")
    }


@pytest.fixture(scope="module")
def sound_rows(split):
    return rows_of(split)


@pytest.fixture(scope="module")
def sound_measures(sound_rows):
    return {name: [measured(row, name, i) for i, row in enumerate(rows)] for name, rows in sound_rows.items()}


def measured(row, split, index):
    return measure_row(row, RowPlace(split, index, f"volumes/{split}.parquet", index, 0), ORGANS)


def examination(manifest, measures) -> Examination:
    """As `examine` would gather them, without a file."""
    rows = [row for of_split in measures.values() for row in of_split]
    histogram = np.sum([row.histogram for row in rows], axis=0)
    num_rows = {name: len(of_split) for name, of_split in measures.items()}
    return Examination(manifest, ORGANS, num_rows, rows, histogram=histogram)


@pytest.fixture
def diagnose(manifest, sound_rows, sound_measures):
    """Findings by key of a split in which `spoil` changed the rows (dicts, in place) or `adjust` the measures."""

    def run(spoil=None, adjust=None, only=lambda split, index: True, organs_of=manifest):
        measures = {
            name: [
                measured(spoil(dict(row)), name, i) if spoil and only(name, i) else copy.copy(sound_measures[name][i])
                for i, row in enumerate(rows)
            ]
            for name, rows in sound_rows.items()
        }
        if adjust:
            adjust(measures)
        return {finding.key: finding for finding in find(examination(organs_of, measures))}

    return run


def with_arrays(row, volume, mask) -> dict:
    volume, mask = np.ascontiguousarray(volume, np.int16), np.ascontiguousarray(mask, np.uint8)
    return row | {"volume": encode_array(volume), "mask": encode_array(mask), "shape": list(volume.shape)}


def change_hu(change):
    def spoil(row):
        volume, mask = decode_volume(row)
        return with_arrays(row, np.clip(change(volume.astype(np.int32)), -32768, 32767), mask)

    return spoil


def loud(found) -> set[str]:
    return {key for key, finding in found.items() if finding.level == "loud"}


# -------------------------------------------------------------------------------------------------------------- figures
def test_a_row_is_measured_as_a_slow_count_has_it(sound_rows, monkeypatch):
    row = sound_rows["train"][0]
    volume, mask = decode_volume(row)
    monkeypatch.setattr(doctor, "SLAB_VOXELS", 3 * mask[0].size + 1)  # several slabs, the last one shorter
    found = measured(row, "train", 0)
    assert sum(found.voxels > 0) == len(ORGANS), "an empty mask would compare nothing"
    for index, organ in enumerate(ORGANS):
        inside = mask == index + 1
        assert found.voxels[index] == inside.sum()
        values = np.sort(volume[inside])
        assert found.median_hu[index] == values[(len(values) - 1) // 2]
        center = np.argwhere(inside).mean(axis=0) * row["spacing"]
        assert found.center_mm[index] == pytest.approx(center, rel=1e-5), organ
        faces = [inside.take(place, axis) for axis in range(3) for place in (0, -1)]
        assert found.is_cut[index] == any(face.any() for face in faces)
        expected = np.histogram(np.clip(values, HISTOGRAM_EDGES[0], HISTOGRAM_EDGES[-1] - 1), HISTOGRAM_EDGES)[0]
        assert np.array_equal(found.histogram[index + 1], expected)
    assert found.histogram.sum() == volume.size and found.hu_range == (volume.min(), volume.max())
    assert found.caption_words[0] == len(row["captions"][0]["caption"].split())
    assert found.labels == {"Nodule": 0} and found.report_words == 3


def test_a_median_beyond_the_ordinary_range_is_exact():
    volume = np.full((4, 5, 6), -8200, dtype=np.int16)
    volume[0] = -32768
    voxels, median, center, histogram = measure_organs(volume, np.ones((4, 5, 6), np.uint8), 2)
    assert voxels.tolist() == [120, 0] and median[0] == -8200 and np.isnan(median[1]) and np.isnan(center[1]).all()
    assert center[0].tolist() == [1.5, 2, 2.5]
    assert histogram[1, 0] == 120 and histogram[[0, 2]].sum() == 0  # the first bin holds what lies below


def test_figures_of_a_split(split, manifest, sound_rows):
    exam = examine(split, manifest)
    assert exam.num_rows == {"train": TRAIN, "validation": VALIDATION} and not exam.is_partial
    assert [row.recon_id for row in exam.rows] == [row["recon_id"] for name in sound_rows for row in sound_rows[name]]
    assert [row.place.index for row in exam.rows] == [*range(TRAIN), *range(VALIDATION)]
    for organ, counts in manifest["splits"]["train"]["organs"].items():
        index = ORGANS.index(organ)
        assert exam.is_present[:TRAIN, index].sum() == counts["present"] == TRAIN
        assert exam.is_abnormal[:TRAIN, index].sum() == counts["abnormal"] > 0
    ml = exam.volume_ml[:, ORGANS.index("liver")]
    assert ((ml > 900) & (ml < 2100)).all()
    assert all(row.histogram is None for row in exam.rows) and exam.histogram.sum() == sum(
        np.prod(row.shape) for row in exam.rows
    )


def test_the_sound_split_has_no_loud_finding(split, manifest):
    found = find(examine(split, manifest))
    assert [finding.key for finding in found if finding.level == "loud"] == []
    assert [finding.key for finding in found if finding.level == "warning"] == ["tiny_split"]


def test_a_limit_spreads_the_rows_evenly(split, manifest):
    assert spread(list("abcdefghijk"), 3) == ["a", "f", "k"]
    assert spread(list("abc"), 3) == spread(list("abc"), 9) == ["a", "b", "c"]
    exam = examine(split, manifest, limit=5)
    assert exam.is_partial and [(row.place.split, row.place.index) for row in exam.rows] == [
        *(("train", 0), ("train", 4), ("train", 8)),
        *(("validation", 3), ("validation", 7)),
    ]
    assert "never_abnormal" not in {finding.key for finding in find(exam)}, "the manifest knows of the other rows"


@pytest.mark.slow  # each of the processes imports torch
def test_several_processes_find_the_same(split, manifest):
    one, two = examine(split, manifest), examine(split, manifest, workers=2)
    assert find(one) == find(two) and np.array_equal(one.histogram, two.histogram)
    assert [row.place for row in one.rows] == [row.place for row in two.rows]


# ----------------------------------------------------------------------------------------------------------------- axes
def turn(row, order, signs):
    return replace(row, center_mm=row.center_mm[:, order] * np.array(signs))


def check_turned_back(before, turned, places):
    """The readings found bring the centres back to where they were."""
    for place, row, sound in zip(places, turned, before):
        back = turn(row, READINGS[place].order, READINGS[place].signs)
        assert np.allclose(back.center_mm, sound.center_mm, equal_nan=True), str(READINGS[place])


def replace_rows(exam, rows):
    return Examination(exam.manifest, exam.organs, {"train": len(rows)}, rows)


def test_each_of_the_48_orientations_is_undone(manifest, sound_measures):
    """Turn the centres of a body every way; the reading that is found must bring them back."""
    assert len(set(READINGS)) == 48 and READINGS[0].order == (0, 1, 2) and READINGS[0].signs == (1, 1, 1)
    sound = [row for of_split in sound_measures.values() for row in of_split][:4]
    for order, signs in product(permutations(range(3)), product((1, -1), repeat=3)):
        turned = [turn(row, order, signs) for row in sound]
        places, is_judged = best_readings(examination(manifest, {"train": turned}))
        assert is_judged.all()
        check_turned_back(sound, turned, places)


@pytest.mark.parametrize(
    ("order", "flipped", "key", "words"),
    [
        ((0, 1, 2), (2,), "mirrored_axes", "left and right are exchanged"),
        ((0, 1, 2), (0,), "mirrored_axes", "head and feet are exchanged"),
        ((0, 1, 2), (1, 2), "mirrored_axes", "front and back and left and right are exchanged"),
        ((2, 1, 0), (), "swapped_axes", "are the body's (width, height, depth)"),
        ((0, 2, 1), (), "swapped_axes", "are the body's (depth, width, height)"),
        ((1, 2, 0), (), "swapped_axes", "are the body's (height, width, depth)"),
    ],
)
def test_wrong_axes_are_found_and_named(diagnose, order, flipped, key, words):
    """Volume and mask alike, as a builder that believes a wrong affine would store them."""

    def spoil(row):
        volume, mask = (np.flip(array.transpose(order), flipped) for array in decode_volume(row))
        return with_arrays(row, volume, mask)

    finding = diagnose(spoil)[key]
    assert finding.level == "loud" and finding.count == finding.total == TRAIN + VALIDATION
    assert finding.title.endswith(words) and finding.examples[0] == "p_0"


def test_some_mirrored_scans_are_found_among_sound_ones(diagnose):
    def spoil(row):
        volume, mask = decode_volume(row)
        return with_arrays(row, volume[..., ::-1], mask[..., ::-1])

    finding = diagnose(spoil, only=lambda split, index: split == "train" and index in (2, 5))["mirrored_axes"]
    assert (finding.level, finding.count, finding.examples) == ("loud", 2, ("p_2", "p_5"))


def test_a_mirrored_chest_is_found_by_lung_and_heart_alone(manifest, sound_measures):
    """The four organs of the published weights must do."""
    chest = [ORGANS.index(organ) for organ in ("lung", "heart", "esophagus", "aorta")]
    for axis in range(3):
        sign = np.where(np.arange(3) == axis, -1, 1)
        rows = [
            replace(
                row, center_mm=row.center_mm * sign, voxels=np.where(np.isin(range(len(ORGANS)), chest), row.voxels, 0)
            )
            for row in sound_measures["train"]
        ]
        places, _ = best_readings(examination(manifest, {"train": rows}))
        assert {READINGS[place].signs[axis] for place in places} == {-1}, axis
        sound = [replace(row, center_mm=row.center_mm * sign) for row in rows]
        assert not best_readings(examination(manifest, {"train": sound}))[0].any()


# ------------------------------------------------------------------------------------------------------------------- HU
@pytest.mark.parametrize(("shift", "mend"), [(1024, "-1024"), (-1024, "+1024"), (-8192, "+8192"), (8192, "-8192")])
def test_shifted_hu_are_found_with_their_shift(diagnose, shift, mend):
    found = diagnose(change_hu(lambda hu: hu + shift))
    finding = found["hu_shifted"]
    assert finding.level == "loud" and finding.count == finding.total == TRAIN + VALIDATION
    assert f"off by {shift:+d}: with {mend} " in finding.title
    assert "wrong_numbering" not in found and "hu_implausible" not in found, "one cause, one finding"


def test_a_few_shifted_scans_are_found(diagnose):
    found = diagnose(change_hu(lambda hu: hu + 1024), only=lambda split, index: split == "train" and index == 3)
    assert found["hu_shifted"].count == 1 and found["hu_shifted"].examples[0].startswith("p_3 (")


def test_doubled_constant_and_foreign_hu_are_found(diagnose):
    assert diagnose(change_hu(lambda hu: 2 * hu))["hu_doubled"].count == TRAIN + VALIDATION
    constant = diagnose(change_hu(lambda hu: hu * 0))
    assert constant["hu_constant"].level == "loud" and "lung: " in constant["hu_implausible"].seen

    def soft_lung(row):  # the mask of another scan lies where no air is
        volume, mask = decode_volume(row)
        return with_arrays(row, np.where(mask == ORGANS.index("lung") + 1, 45, volume), mask)

    finding = diagnose(soft_lung)["hu_implausible"]
    assert finding.level == "loud" and "45 HU" in finding.seen and finding.seen.startswith("lung: ")


# ---------------------------------------------------------------------------------------------------------------- masks
def test_masks_of_v1_read_as_v2_are_found(scans, tmp_path):
    out = build_split(scans, tmp_path / "out", masks="v1")
    found = {f.key: f for f in find(examine(out, json.loads((out / "manifest.json").read_text(encoding="utf-8"))))}
    finding = found["wrong_numbering"]
    assert finding.level == "loud" and finding.count == finding.total == TRAIN + VALIDATION
    assert "-8" in finding.seen.split("esophagus: ")[1].split(";")[0], "it holds the air of a lung"
    assert "esophagus = lung_upper_lobe_right" in finding.mend and "in totalsegmentator_v1" in finding.mend
    assert loud(found) == {"wrong_numbering"}


def test_a_wrong_spacing_is_told_from_a_wrong_numbering(diagnose):
    def shrink(row):  # centimetres read as millimetres
        return row | {"spacing": [edge / 10 for edge in row["spacing"]]}

    found = diagnose(shrink)
    factor = float(re.search(r"are (\S+) times", found["organs_scaled"].title).group(1))
    assert found["organs_scaled"].level == "loud" and 5e-4 < factor < 2e-3
    assert found["spacing_far"].count == TRAIN + VALIDATION and "wrong_numbering" not in found


def test_outliers_and_drift_of_volumes(diagnose, manifest, sound_measures):
    heart = ORGANS.index("heart")

    def swell(measures):
        row = measures["train"][4]
        row.voxels = np.where(np.arange(len(ORGANS)) == heart, 8 * row.voxels, row.voxels)

    found = diagnose(adjust=swell)
    assert any(example.startswith("heart of p_4: ") for example in found["volume_outliers"].examples)
    assert "volume_drift" not in found

    def drift(measures):
        for row in measures["validation"]:
            row.voxels = np.where(np.arange(len(ORGANS)) == heart, 2 * row.voxels, row.voxels)

    finding = diagnose(adjust=drift)["volume_drift"]
    assert finding.count == 1 and finding.examples[0].startswith("heart: ")
    assert volume_outliers(examination(manifest, sound_measures)).get("heart") is None


# --------------------------------------------------------------------------------------------------- what the loss uses
def set_captions(row, organ, **changes) -> dict:
    return row | {"captions": [caption | (changes if caption["organ"] == organ else {}) for caption in row["captions"]]}


def test_an_organ_that_is_never_abnormal_is_loud(diagnose):
    normal = {"caption": normal_caption("liver"), "is_abnormal": False}
    found = diagnose(lambda row: set_captions(row, "liver", **normal))
    assert found["never_abnormal"].examples == (f"liver (whole in {TRAIN} of {TRAIN})",) and loud(found) == {
        "never_abnormal"
    }
    # Only in validation: training has patients who are.
    assert "never_abnormal" not in diagnose(
        lambda row: set_captions(row, "liver", **normal), only=lambda split, index: split == "validation"
    )


def test_abnormal_only_where_it_is_cut_off_is_never_trained_either(diagnose):
    stomach = ORGANS.index("stomach")

    def cut(measures):
        for row in measures["train"]:
            row.is_cut = row.is_cut | ((np.arange(len(ORGANS)) == stomach) & row.is_abnormal)

    assert diagnose(adjust=cut)["never_abnormal"].examples[0].startswith("stomach (whole in 6 of 9)")


def test_absent_and_cut_organs(diagnose):
    brain, hip = ORGANS.index("brain"), ORGANS.index("hip")

    def remove(measures):
        for row in [row for of_split in measures.values() for row in of_split]:
            row.voxels = np.where(np.arange(len(ORGANS)) == brain, 0, row.voxels)
            row.is_cut = row.is_cut | (np.arange(len(ORGANS)) == hip)

    found = diagnose(adjust=remove)
    assert found["never_present"].examples == ("brain",)
    assert "always: hip" in found["mostly_cut_off"].title and "hip (100% of 9)" in found["mostly_cut_off"].examples


def test_equal_captions_are_loud(diagnose):
    found = diagnose(lambda row: set_captions(row, "aorta", caption="Calcified.", is_abnormal=True))
    assert loud(found) == {"captions_equal"} and found["captions_equal"].examples == ("aorta (100.0% of 9)",)


def test_few_patients(diagnose):
    def drop(measures):
        del measures["train"][7:]

    assert diagnose(adjust=drop)["tiny_split"].level == "loud" and diagnose()["tiny_split"].level == "warning"


# --------------------------------------------------------------------------------------------------- patients and texts
def test_a_patient_in_both_splits_is_loud(diagnose):
    def leak(measures):
        measures["validation"][1].patient_id = "person_3"

    found = diagnose(adjust=leak)
    assert loud(found) == {"patient_leak"} and found["patient_leak"].examples == ("person_3",)


def test_duplicates(diagnose):
    def twice(measures):
        measures["train"].append(replace(measures["train"][2], place=replace(measures["train"][2].place, index=9)))

    found = diagnose(adjust=twice)
    assert loud(found) == {"duplicate_ids"} and found["duplicate_ids"].examples == ("p_2 (train row 2, train row 9)",)
    assert "duplicate_volumes" not in found and "duplicate_reports" not in found, "told once, by its id"

    def renamed(measures):
        measures["train"].append(replace(measures["train"][2], recon_id="x", scan_id="x", patient_id="x"))

    found = diagnose(adjust=renamed)
    assert found["duplicate_volumes"].examples == ("p_2 = x",) and found["duplicate_reports"].examples == ("p_2 = x",)
    assert not loud(found)

    def across(measures):
        row = replace(measures["train"][2], recon_id="x", scan_id="x", patient_id="x")
        measures["validation"].append(replace(row, place=replace(row.place, split="validation")))

    found = diagnose(adjust=across)
    assert found["duplicate_volumes_across_splits"].level == "loud"
    assert "1 of these texts stand in several splits" in found["duplicate_reports"].title


def test_reconstructions_of_a_patient_share_a_report_in_peace(diagnose):
    def second_kernel(measures):
        row = measures["train"][2]
        measures["train"].append(replace(row, recon_id="p_2_b", volume_hash=row.volume_hash + 1))

    assert not {"duplicate_reports", "duplicate_volumes", "duplicate_ids"} & diagnose(adjust=second_kernel).keys()


def test_empty_reports_and_one_sided_labels(diagnose):
    found = diagnose(lambda row: row | {"findings": " ", "impression": "", "labels": [{"finding": "A", "value": 0}]})
    assert found["empty_reports"].count == TRAIN + VALIDATION and found["empty_reports"].level == "warning"
    assert found["one_sided_labels"].examples == (f"A (0 positive, {VALIDATION} negative)",)


def test_what_the_build_left_out_is_told(diagnose, manifest):
    told = copy.deepcopy(manifest)
    told["skipped"] = [{"split": "train", "case": f"p_{n}", "reason": "ct.nii.gz: 2-D"} for n in range(20, 25)]
    told["warnings"] = [{"split": "train", "case": "p_1", "warning": text} for text in ("lung: 30 HU", "lies aslant")]
    told["privacy_concerns"] = {"date": 3}
    found = diagnose(organs_of=told)
    assert found["skipped_cases"].level == "warning" and found["skipped_cases"].examples[0] == "p_20: ct.nii.gz: 2-D"
    assert found["build_warnings"].count == 1, "of one case there are two"
    assert found["personal_texts"].shown_examples == "date: 3"
    assert found["personal_texts"].how_many == "3 of 3 places that the build found"
    told["skipped"] = [entry | {"is_excluded": True} for entry in told["skipped"]]
    assert "skipped_cases" not in diagnose(organs_of=told), "left out on purpose is no fault"


def test_reports_that_name_a_person_are_told_by_their_cases(diagnose, manifest, sound_rows):
    told = copy.deepcopy(manifest)
    told["privacy_concerns"] = {"date": 2, "name": 1}

    def dated(row):
        return row | {"findings": f"{row['findings']} Compared with Dr. Smith's reading of 2021-03-04."}

    found = diagnose(dated, only=lambda split, index: split == "train" and index in (0, 4), organs_of=told)
    finding = found["personal_texts"]
    assert finding.how_many == f"2 of {TRAIN + VALIDATION} reports that were looked at"
    names = [sound_rows["train"][index]["recon_id"] for index in (0, 4)]
    assert finding.shown_examples == ", ".join(f"{name} (date, name)" for name in names)
    assert "The build's output names the cases" in finding.mend and "into a new --out" in finding.mend
    assert "Smith" not in str(finding) and "date: 2, name: 1" in finding.seen
    assert "personal_texts" not in diagnose()


def test_counts_and_examples_read_as_they_should(diagnose):
    def one_patient(measures):
        for row in measures["train"]:
            row.patient_id = "p_0"

    assert diagnose(adjust=one_patient)["tiny_split"].title == "split 'train' has 1 patient"
    finding = Finding("k", "note", "t", 5, 9, "scans", ("a: cut short. Fetch it again.", "b: empty."), "", "")
    assert finding.shown_examples == "a: cut short. Fetch it again; b: empty and 3 more"
    assert replace(finding, examples=("a", "b")).shown_examples == "a, b and 3 more"
    assert replace(finding, num_examples=2).shown_examples == "a: cut short. Fetch it again; b: empty"
    assert [ml_text(value) for value in (0.5, 26.34, 1581.2)] == ["0.5", "26.3", "1,581"]


def test_pictures_show_what_looks_wrong(manifest, sound_measures, sound_rows):
    def mirrored(row):
        volume, mask = decode_volume(row)
        return with_arrays(row, volume[..., ::-1], mask[..., ::-1])

    measures = {
        name: [
            measured(mirrored(dict(row)), name, place) if name == "train" and place in (4, 6) else sound
            for place, (row, sound) in enumerate(zip(rows, sound_measures[name]))
        ]
        for name, rows in sound_rows.items()
    }
    exam = examination(manifest, measures)
    findings = find(exam)
    assert cases_to_draw(exam, findings, 1) == [0, TRAIN, 4], "the first of each split, and one that looks wrong"
    assert cases_to_draw(exam, findings, 2) == [0, 1, TRAIN, TRAIN + 1, 4, 6]
    assert cases_to_draw(exam, findings, 0) == cases_to_draw(exam, [], 0) == []
    mirror = next(finding for finding in findings if finding.key == "mirrored_axes")
    assert mirror.rows == (4, 6) and mirror.examples == ("p_4", "p_6")


# --------------------------------------------------------------------------------------------------------------- damage
def rewrite(split, folder, change):
    """A copy of the split whose first shard holds the rows that `change` makes of its rows."""
    shutil.copytree(split, folder)
    path = sorted((folder / "volumes").glob("train-*.parquet"))[0]
    schema = pq.read_schema(path)
    rows = change(pq.read_table(path).to_pylist())
    with pq.ParquetWriter(path, schema, compression="none") as writer:
        for row in rows:
            writer.write_table(pa.Table.from_pylist([row], schema=schema))
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    shard = next(shard for shard in manifest["shards"] if path.name in shard["file"])
    shard["bytes"] = path.stat().st_size
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    return folder, manifest


DAMAGES = {
    "truncated": lambda row: row | {"volume": row["volume"][:-200]},
    "not zstd": lambda row: row | {"mask": b"rubbish" * 40},
    "another shape": lambda row: row | {"shape": [1, 2, 3]},
    "no blob": lambda row: row | {"volume": None},
    "a strange label": lambda row: row | {"mask": encode_array(np.full(row["shape"], 99, np.uint8))},
    "a strange organ": lambda row: row | {"captions": [row["captions"][0] | {"organ": "tail"}]},
    "no spacing": lambda row: row | {"spacing": [0.0, 1.0, 1.0]},
}


def test_damaged_rows_are_listed_and_the_others_measured(split, tmp_path):
    def change(rows):
        return [DAMAGES[name](row) for name, row in zip(DAMAGES, rows)]

    folder, manifest = rewrite(split, tmp_path / "out", change)
    exam = examine(folder, manifest)
    assert [damage.recon_id for damage in exam.damaged] == [f"p_{n}" for n in range(6)]
    assert len(exam.rows) == TRAIN + VALIDATION - 6 and not exam.is_partial
    finding = find(exam)[0]
    assert finding.key == "damaged_rows" and finding.level == "loud" and finding.count == 6
    assert "row 0 of the split (p_0): " in finding.examples[0] and str(tmp_path) not in "".join(finding.examples)
    reasons = [damage.reason for damage in exam.damaged]
    assert "its shape (1, 2, 3)" in reasons[2]
    assert "label 99" in reasons[4] and "'tail'" in reasons[5]


@pytest.mark.parametrize("name", DAMAGES)
def test_each_damage_raises_what_is_caught(sound_rows, name):
    with pytest.raises(doctor.DAMAGE):
        measured(DAMAGES[name](dict(sound_rows["train"][0])), "train", 0)


def test_a_frame_that_claims_more_than_memory_is_not_unpacked(sound_rows):
    """Content size 2^50 in the header of the frame: refused before any memory is asked for."""
    bomb = bytes.fromhex("28b52ffd") + bytes([0b11100000]) + (2**50).to_bytes(8, "little") + b"\x01\x00\x00"
    with pytest.raises(ValueError, match="1125899906842624 bytes"):
        measured(sound_rows["train"][0] | {"volume": bomb}, "train", 0)


def test_missing_and_broken_shards(split, manifest, tmp_path):
    shutil.copytree(split, tmp_path / "out")
    first, second, *_ = sorted((tmp_path / "out" / "volumes").glob("*.parquet"))
    first.unlink()
    second.write_bytes(second.read_bytes()[:-100])
    exam = examine(tmp_path / "out", manifest)
    found = {finding.key: finding for finding in find(exam)}
    assert found["incomplete_copy"].count == 2 and first.name in found["incomplete_copy"].examples[0]
    assert second.name in found["damaged_rows"].examples[0] and "the file" in found["damaged_rows"].examples[0]
    assert exam.num_rows == {"train": 0, "validation": VALIDATION}
    shutil.rmtree(tmp_path / "out" / "volumes")
    assert {finding.key for finding in find(examine(tmp_path / "out", manifest))} >= {"no_rows", "incomplete_copy"}


# -------------------------------------------------------------------------------------------------------------- command
def test_the_command_tells_and_its_status_is_strict_when_asked(split, tmp_path, capsys):
    shutil.copytree(split, tmp_path / "out")
    assert main(["inspect", str(tmp_path / "out"), "--cases", "0", "--workers", "1", "--strict"]) == 0
    told = capsys.readouterr().out
    assert "Looked at 17 of 17 rows" in told and "WARNING: split 'train' has 9 patients" in told
    page = (tmp_path / "out" / "doctor.html").read_text(encoding="utf-8")
    assert "Doctor: out" in page

    def spoil(rows):
        return [change_hu(lambda hu: hu + 1024)(row) for row in rows]

    folder, _ = rewrite(split, tmp_path / "spoiled", spoil)
    command = ["inspect", "--data", str(folder), "--cases", "0", "--workers", "1", "--out", str(tmp_path / "page.html")]
    assert main(command) == 0 and main([*command, "--strict"]) == 1
    assert "LOUD: HU are off by +1024" in capsys.readouterr().out
    assert (tmp_path / "page.html").is_file() and not (folder / "doctor.html").exists()
    assert main([*command, "--limit", "4"]) == 0
    assert "Looked at 4 of 17 rows" in capsys.readouterr().out
    assert "Only some rows were looked at" in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_the_command_refuses_what_it_cannot_read(split, tmp_path, capsys):
    assert main(["inspect"]) == 2 and main(["inspect", str(split), "--data", str(split)]) == 2
    assert "inspect DIR" in capsys.readouterr().err
    assert main(["inspect", str(tmp_path)]) == 2
    assert "no manifest.json" in capsys.readouterr().err
    assert main(["inspect", str(split), "--limit", "0"]) == 2
    assert "--limit 0" in capsys.readouterr().err


def test_a_damaged_row_does_not_stop_the_command(split, tmp_path, capsys):
    folder, _ = rewrite(split, tmp_path / "out", lambda rows: [DAMAGES["truncated"](rows[0]), *rows[1:]])
    assert main(["inspect", str(folder), "--cases", "1", "--workers", "1"]) == 0
    assert "LOUD: rows or shards cannot be read (1 of 17 rows)" in capsys.readouterr().out
    assert sorted(path.name for path in (folder / "previews").iterdir()) == [
        "train-001-p_1.png",  # the first one that can be read
        "validation-000-p_9.png",
    ]


# ------------------------------------------------------------------------------------------------------------- real CTs
@pytest.mark.slow
def test_real_scans_have_sound_axes_hu_and_numbering(shared_dir, tmp_path):
    """RAS and LPS files, both numberings: nothing may cry wolf. Read with the wrong numbering, the same scan must."""
    samples = json.loads((shared_dir / "ct_samples" / "samples.json").read_text())
    lines = ["id,patient_id,volume,mask,numbering,findings,split"]
    for sample in samples:
        for mask in sample["masks"]:
            version = "totalsegmentator_v1" if "v1" in mask["class_numbering"] else "totalsegmentator_v2"
            name = f"{sample['id']}_{version[-2:]}"
            lines.append(f"{name},{name},{sample['image']},{mask['file']},{version},Report of {name}.,train")
    (tmp_path / "right.csv").write_text("\n".join(lines), encoding="utf-8")
    wrong = "\n".join(line for line in lines if "abdomen_pelvis_v1" in line or line.startswith("id,"))
    (tmp_path / "wrong.csv").write_text(wrong.replace("totalsegmentator_v1", "totalsegmentator_v2"), encoding="utf-8")
    found = {}
    for name in ("right", "wrong"):
        command = [
            "folder",
            "--volumes",
            shared_dir / "ct_samples",
            "--table",
            tmp_path / f"{name}.csv",
            "--ids",
            "kept",
        ]
        command += ["--previews", 0, "--workers", 1, "--out", tmp_path / name]
        assert main([str(word) for word in command]) == 0
        manifest = json.loads((tmp_path / name / "manifest.json").read_text(encoding="utf-8"))
        exam = examine(tmp_path / name, manifest)
        found[name] = {finding.key: finding for finding in find(exam)}
        if name == "right":
            readings, is_judged = best_readings(exam)
            assert len(exam.rows) == 4 and is_judged.all() and not readings.any()
            abdomens = [row for row in exam.rows if row.recon_id.startswith("abdomen")]
            for reading in READINGS:
                turned = [turn(row, reading.order, reading.signs) for row in abdomens]
                check_turned_back(abdomens, turned, best_readings(replace_rows(exam, turned))[0])
    suspicious = {
        *("mirrored_axes", "swapped_axes", "hu_shifted", "hu_doubled", "hu_implausible", "hu_constant"),
        *("wrong_numbering", "organs_scaled", "volume_implausible", "damaged_rows"),
    }
    assert not suspicious & found["right"].keys()
    assert found["wrong"]["wrong_numbering"].level == "loud"
