"""A scan prepared slice by slice equals the same scan read whole: arrays, spacing, notes and messages."""

import dataclasses
import errno
import gzip
import tracemalloc
import weakref

import nibabel
import numpy as np
import pytest
from test_ready_captions import settings_of

from data_builders import run_cases
from data_builders.cases import Case
from modeling_fvlm import image_files, one_pass
from modeling_fvlm.geometry import BadVolumeError, resample_mask
from modeling_fvlm.one_pass import can_be_streamed, prepare_files
from modeling_fvlm.organs import UNKNOWN_LABEL
from modeling_fvlm.preparation import prepare_scan
from modeling_fvlm.reading import read_mask, read_volume

SHAPE = (21, 18, 15)  # as stored; no two edges alike
STEP_MM = (1.7, 1.3, 2.6)
TABLE = np.array([0, 2, 1, 0, 3] + [UNKNOWN_LABEL] * 251, dtype=np.uint8)
MARGIN = (1, 2, 3)


def write_pair(folder, seed=0, order=(0, 1, 2), signs=(-1, -1, 1), ending=".nii.gz", highest=4):
    """A volume of soft tissue in air and a mask of boxes; the axis `order` and `signs` are those of the files."""
    generator = np.random.default_rng(seed)
    volume = generator.normal(-1000, 20, SHAPE)
    volume[3:-3, 3:-3] = generator.normal(40, 60, SHAPE)[3:-3, 3:-3]
    mask = np.zeros(SHAPE, dtype=np.uint8)
    for label in (1, 2, 3, highest):
        start = [int(generator.integers(2, size - 6)) for size in SHAPE]
        mask[tuple(slice(low, low + int(generator.integers(2, 6))) for low in start)] = label
    affine = np.eye(4)
    affine[:3, :3] = np.diag(np.multiply(STEP_MM, signs))[:, list(order)]
    affine[:3, 3] = (12, -7, 30)
    paths = folder / f"ct{ending}", folder / f"seg{ending}"
    for array, dtype, path in ((volume, np.int16, paths[0]), (mask, np.uint8, paths[1])):
        stored = np.asfortranarray(array.transpose(order).astype(dtype))
        nibabel.save(nibabel.Nifti1Image(stored, affine), path)
    return paths


def read_whole(volume, mask, spacing, margin=MARGIN):
    volume = read_volume(volume)
    return prepare_scan(volume, read_mask(mask), TABLE, spacing, margin), volume.notes


def assert_equal(one, other):
    (scan, notes), (whole, whole_notes) = one, other
    for name in ("volume", "mask"):
        ours, theirs = getattr(scan, name), getattr(whole, name)
        assert ours.dtype == theirs.dtype and ours.flags["C_CONTIGUOUS"]
        np.testing.assert_array_equal(ours, theirs)
    assert len(np.unique(whole.mask)) == 4 and whole.volume.std() > 100, "empty arrays would agree as well"
    assert (scan.spacing, scan.box, notes) == (whole.spacing, whole.box, whole_notes)


@pytest.mark.parametrize("spacing", [(3.0, 1.0, 1.0), (1.0, 2.0, 3.1), (2.6, 1.3, 1.7), (2.6, 1.0, 5.0)])
@pytest.mark.parametrize("signs", [(-1, -1, 1), (1, 1, 1), (-1, 1, -1), (1, -1, -1)])
def test_slices_give_what_the_whole_file_gives(tmp_path, spacing, signs):
    paths = write_pair(tmp_path, seed=sum(signs) + 5, signs=signs)
    assert can_be_streamed(*paths)
    assert_equal(prepare_files(*paths, TABLE, spacing, MARGIN), read_whole(*paths, spacing))


@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
@pytest.mark.parametrize("margin", [(0, 0, 0), (99, 99, 99)])
def test_exchanged_axes_in_the_slice_and_margins_beyond_the_scan(tmp_path, ending, margin):
    paths = write_pair(tmp_path, order=(1, 0, 2), ending=ending)
    assert can_be_streamed(*paths)
    spacing = (3.0, 1.1, 0.9)
    assert_equal(prepare_files(*paths, TABLE, spacing, margin), read_whole(*paths, spacing, margin))


def test_a_scan_that_lies_aslant_is_noted_both_ways(tmp_path):
    paths = write_pair(tmp_path)
    angle, turn = np.radians(30), np.eye(4)
    turn[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    for path in paths:
        image = nibabel.load(path)
        nibabel.save(nibabel.Nifti1Image(np.asarray(image.dataobj), turn @ image.affine), path)
    slices = prepare_files(*paths, TABLE, (3.0, 1.0, 1.0), MARGIN)
    assert_equal(slices, read_whole(*paths, (3.0, 1.0, 1.0)))
    assert [note for note in slices[1] if "turned by 30 degrees" in note]


def test_the_files_are_not_read_whole(tmp_path, monkeypatch):
    paths = write_pair(tmp_path)
    largest = []
    fill = image_files.fill

    def watch(file, buffer):
        largest.append(len(buffer))
        fill(file, buffer)

    monkeypatch.setattr(one_pass, "fill", watch)
    prepare_files(*paths, TABLE, (3.0, 1.0, 1.0), MARGIN)
    assert len(largest) == 2 * SHAPE[2] and max(largest) == SHAPE[0] * SHAPE[1] * 2


@pytest.mark.parametrize("order", [(2, 1, 0), (0, 2, 1), (1, 2, 0), (2, 0, 1)])
def test_other_orders_of_the_axes_are_left_to_the_whole_file(tmp_path, order):
    assert not can_be_streamed(*write_pair(tmp_path, order=order))


def test_a_whole_mask_is_given_back_before_its_volume_is_read(tmp_path, monkeypatch):
    """Of what cannot be streamed, one file is in memory at a time: the mask's part on the model's grid is small."""
    volume, mask = write_pair(tmp_path, order=(2, 1, 0))
    settings = dataclasses.replace(settings_of("body_24"), spacing=(3.0, 1.0, 1.0))
    masks = []

    def reading_mask(*arguments):
        read = read_mask(*arguments)
        masks.append(weakref.ref(read.array if read.array.base is None else read.array.base))
        return read

    def reading_volume(*arguments, **more):
        assert masks and masks[0]() is None, "the mask's voxels are still in memory"
        return read_volume(*arguments, **more)

    monkeypatch.setattr(run_cases, "read_mask", reading_mask)
    monkeypatch.setattr(run_cases, "read_volume", reading_volume)
    case = Case("train", "p", "p", "p", volume, mask, findings="Clear.")
    scan, _ = run_cases.read_scan(case, settings, volume, mask)
    assert scan.mask.any()


def test_a_mask_in_another_order_of_axes_is_resampled_without_a_copy_of_it():
    """np.take on a view copies the whole of it first."""
    mask = np.ones((60, 90, 80), dtype=np.uint8, order="F")[:, ::-1]
    tracemalloc.start()
    labels = resample_mask(mask, (1.0, 1.0, 1.0), (5.0, 5.0, 5.0))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert labels.all() and labels.shape == (12, 18, 16) and peak < mask.nbytes / 4


def test_other_types_scales_and_formats_are_left_to_the_whole_file(tmp_path):
    volume, mask = write_pair(tmp_path)
    image = nibabel.load(volume)
    for name, array, scale in (
        ("float", image.get_fdata(dtype=np.float32), (1, 0)),
        ("wide", np.asarray(image.dataobj, dtype=np.int32), (1, 0)),
        ("scaled", np.asarray(image.dataobj), (1, -1024)),
    ):
        other = nibabel.Nifti1Image(array, image.affine)
        other.header.set_slope_inter(*scale)
        nibabel.save(other, tmp_path / f"{name}.nii.gz")
        assert not can_be_streamed(tmp_path / f"{name}.nii.gz", mask), name
    assert not can_be_streamed(volume, volume)
    assert not can_be_streamed(tmp_path, mask)
    pair = tmp_path / "two.img"
    nibabel.save(nibabel.Nifti1Pair(np.asarray(image.dataobj), image.affine), pair)
    assert not can_be_streamed(pair, mask)


def message_of(function, *arguments):
    with pytest.raises(BadVolumeError) as caught:
        function(*arguments)
    return str(caught.value)


def test_both_ways_refuse_alike(tmp_path):
    """A wrong label that resampling steps over, another grid, no organ, HU shifted by 1024."""
    spacing = (3.0, 1.0, 1.0)

    def same_message(volume, mask):
        ours = message_of(prepare_files, volume, mask, TABLE, spacing, MARGIN)
        assert ours == message_of(read_whole, volume, mask, spacing)
        return ours

    volume, mask = write_pair(tmp_path)
    image = nibabel.load(mask)
    labels = np.asarray(image.dataobj).copy()
    hidden = labels.copy()
    hidden[0, 0, 0] = 77
    for name, array, affine in (
        ("hidden", hidden, image.affine),
        ("moved", labels, image.affine + np.diag([0, 0, 0, 0]) + np.pad([[0, 0, 0, 3.0]], ((0, 3), (0, 0)))),
        ("empty", labels * 0, image.affine),
    ):
        nibabel.save(nibabel.Nifti1Image(array, affine), tmp_path / f"{name}.nii.gz")
    assert "label 77 is outside the numbering" in same_message(volume, tmp_path / "hidden.nii.gz")
    assert "not on one grid" in same_message(volume, tmp_path / "moved.nii.gz")
    assert "holds no organ of the set" in same_message(volume, tmp_path / "empty.nii.gz")
    ct = nibabel.load(volume)
    shifted = tmp_path / "shifted.nii.gz"
    nibabel.save(nibabel.Nifti1Image(np.asarray(ct.dataobj) + np.int16(1024), ct.affine), shifted)
    assert "never applied" in same_message(shifted, mask)


@pytest.mark.parametrize("inflation", [gzip, image_files.inflation])
def test_damage_is_found_where_it_is(tmp_path, monkeypatch, inflation):
    monkeypatch.setattr(image_files, "inflation", inflation)
    volume, mask = write_pair(tmp_path)
    content = volume.read_bytes()
    for name, damaged in (
        ("cut", content[: len(content) // 2]),
        ("checksum", content[:-8] + bytes(8)),
        ("noise", content[:2000] + bytes(200) + content[2200:]),
    ):
        path = tmp_path / f"{name}.nii.gz"
        path.write_bytes(damaged)
        text = message_of(prepare_files, path, mask, TABLE, (3.0, 1.0, 1.0), MARGIN)
        assert f"{name}.nii.gz" in text and "Fetch the file again" in text
    bomb = tmp_path / "bomb.nii.gz"
    bomb.write_bytes(gzip.compress(gzip.decompress(content) + bytes(1 << 25)))
    assert "behind the last voxel" in message_of(prepare_files, bomb, mask, TABLE, (3.0, 1.0, 1.0), MARGIN)


def test_a_disk_that_fails_is_no_damaged_file(tmp_path, monkeypatch):
    volume, mask = write_pair(tmp_path)

    def fail(file, buffer):
        raise OSError(errno.EIO, "Input/output error")

    for module in (one_pass, image_files):
        monkeypatch.setattr(module, "fill", fail)
    for read in (lambda: prepare_files(volume, mask, TABLE, (3.0, 1.0, 1.0), MARGIN), lambda: read_volume(volume)):
        with pytest.raises(OSError, match="Input/output error"):
            read()


def test_real_scans(shared_dir):
    """Every pair of the samples that can be streamed, on the model's spacing."""
    from modeling_fvlm.organs import load_organ_set, organ_label_table

    organs = load_organ_set("body_24")
    table = organ_label_table(organs, organs.organs, "totalsegmentator_v2")
    folder, streamed = shared_dir / "ct_samples", 0
    for name in ("abdomen_pelvis", "abdomen_slab", "chest_cta"):
        pair = folder / f"{name}_ct.nii.gz", folder / f"{name}_seg_v2.nii.gz"
        if can_be_streamed(*pair):
            streamed += 1
            scan, notes = prepare_files(*pair, table, (3.0, 1.0, 1.0), (5, 20, 20))
            volume = read_volume(pair[0])
            whole = prepare_scan(volume, read_mask(pair[1]), table, (3.0, 1.0, 1.0), (5, 20, 20))
            np.testing.assert_array_equal(scan.volume, whole.volume)
            np.testing.assert_array_equal(scan.mask, whole.mask)
            assert notes == volume.notes
    assert streamed
