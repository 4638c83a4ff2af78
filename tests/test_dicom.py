"""DICOM series against the NIfTI they were made of; every kind of broken series with its message; nothing private."""

import re
import shutil
import struct
import zipfile
from itertools import permutations, product

import nibabel
import numpy as np
import pydicom
import pytest
from dicom_series import (
    SECRETS,
    positions_of,
    slices_of_nifti,
    write_colour_capture,
    write_enhanced,
    write_localizer,
    write_series,
    zip_folder,
)
from pydicom.dataset import Dataset, FileMetaDataset
from tiny_scan import AFFINE, tiny_config, tiny_scan, tiny_tokenizer, write_scan

from modeling_fvlm import FVLMImageProcessor, FVLMModel, FVLMProcessor, FVLMZeroShotPipeline
from modeling_fvlm import dicom as dicom_module
from modeling_fvlm.dicom import find_series, read_dicom
from modeling_fvlm.geometry import AIR_HU, BadVolumeError
from modeling_fvlm.reading import read_nifti, volume_from_array

# (slice, row, column) to mm in RAS+: axial slices, rows to the patient's left, columns to the back.
AXIAL = np.array([[0.0, 0, -2.0, 30], [0, -1.5, 0, 25], [3.0, 0, 0, -100], [0, 0, 0, 1]])


@pytest.fixture(autouse=True)
def nothing_private(capfd, caplog):
    """No test may leave a patient's name on the screen or in the log."""
    yield
    printed = capfd.readouterr()
    told = (printed.out + printed.err + caplog.text).lower()
    assert not any(secret in told for secret in SECRETS), told


@pytest.fixture(scope="module")
def hu():
    """Air, a body of water and an odd corner: no two axes alike, HU as a scanner gives them."""
    array = np.random.default_rng(0).integers(-30, 90, (12, 20, 26)).astype(np.int16)
    array[:, :3] = array[:, :, :4] = -1000
    array[2:5, 5:9, 20:] = 700
    array[0, 0, 0] = -1024
    return array


def message_of(place, series_uid=None) -> str:
    """What `read_dicom` raises, on one line; it must name the place and nobody."""
    with pytest.raises(BadVolumeError) as raised:
        read_dicom(place, series_uid)
    told = str(raised.value)
    assert told.startswith(f"{place}: ")
    told = told.removeprefix(f"{place}: ")
    assert not any(secret in told.lower() for secret in SECRETS) and "IM0" not in told and "\n" not in told
    assert raised.value.__cause__ is None and raised.value.__suppress_context__, "a traceback would show header values"
    return told


def same(volume, expected) -> bool:
    np.testing.assert_allclose(volume.affine, expected.affine, atol=1e-4)
    assert volume.spacing == pytest.approx(expected.spacing, abs=1e-5)
    return volume.array.dtype == np.int16 and np.array_equal(volume.array, expected.array)


# Whole series


def test_a_series_of_a_real_ct_is_the_nifti_from_folder_shuffled_and_zip(shared_dir, tmp_path):
    path = shared_dir / "ct_samples" / "abdomen_slab_ct.nii.gz"
    expected = read_nifti(path)
    array, affine = slices_of_nifti(nibabel.load(path))
    write_series(tmp_path / "dicom" / "a" / "b", array, affine, names=[f"{place}.dcm" for place in range(30)])
    volume = read_dicom(tmp_path / "dicom")
    assert same(volume, expected) and expected.array.shape == (30, 101, 122)
    assert volume.name == str(tmp_path / "dicom") and volume.notes == expected.notes
    write_series(tmp_path / "shuffled", array, affine)
    assert same(read_dicom(str(tmp_path / "shuffled")), expected)
    assert same(read_dicom(zip_folder(tmp_path / "dicom", tmp_path / "deflated.zip")), expected)
    assert same(read_dicom(zip_folder(tmp_path / "dicom", tmp_path / "stored", zipfile.ZIP_STORED)), expected)


@pytest.mark.parametrize("orientation", ["RAS", "LPS", "PSR", "SLA", "AIL", "IRP"])
def test_a_real_ct_acquired_axial_sagittal_or_coronal(shared_dir, tmp_path, orientation):
    """The last letter is the direction of the slices: S and I axial, R and L sagittal, A and P coronal."""
    image = nibabel.load(shared_dir / "ct_samples" / "abdomen_slab_ct.nii.gz").slicer[20:80, 30:75, :]
    turn = nibabel.orientations.ornt_transform(
        nibabel.io_orientation(image.affine), nibabel.orientations.axcodes2ornt(tuple(orientation))
    )
    array, affine = slices_of_nifti(image.as_reoriented(turn))
    write_series(tmp_path / "series", array, affine)
    expected = volume_from_array(np.asarray(image.dataobj), image.affine)
    assert same(read_dicom(tmp_path / "series"), expected)


def test_every_orientation_of_the_slices_gives_one_volume(tmp_path, hu):
    small = np.ascontiguousarray(hu[:6, 4:12, 16:23])
    image = nibabel.Nifti1Image(small.transpose(2, 1, 0), AXIAL[:, [2, 1, 0, 3]])
    expected = volume_from_array(small, AXIAL)
    for number, (order, flips) in enumerate(product(permutations(range(3)), product((1, -1), repeat=3))):
        turned = image.as_reoriented(np.array(list(zip(order, flips))))
        write_series(tmp_path / str(number), *slices_of_nifti(turned))
        assert same(read_dicom(tmp_path / str(number)), expected)
    assert number == 47


def test_an_oblique_series_keeps_its_place(tmp_path, hu):
    angle = np.radians(8)
    turn = np.eye(4)
    turn[1:3, 1:3] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    write_series(tmp_path / "series", hu, turn @ AXIAL)
    volume = read_dicom(tmp_path / "series")
    assert same(volume, volume_from_array(hu, turn @ AXIAL)) and abs(volume.affine[1, 0]) > 0.3 and not volume.notes


@pytest.mark.parametrize("syntax", ["explicit", "implicit", "big", "rle", "jpeg2000", "jpeg"])
@pytest.mark.parametrize("dtype", ["int16", "uint16"])
def test_every_coding_of_the_pixels_gives_the_same(tmp_path, hu, syntax, dtype):
    if syntax.startswith("jpeg"):
        pytest.importorskip("SimpleITK")
    hu = hu[:6]
    expected = volume_from_array(hu, AXIAL)
    write_series(tmp_path / "series", hu, AXIAL, dtype=dtype, syntax=syntax)
    assert same(read_dicom(tmp_path / "series"), expected)
    write_enhanced(tmp_path / "enhanced", hu, AXIAL, dtype=dtype, syntax=syntax)
    assert same(read_dicom(tmp_path / "enhanced"), expected)
    assert same(read_dicom(zip_folder(tmp_path / "series", tmp_path / "packed.zip")), expected)


def test_compressed_without_a_decoder_tells_what_to_install(tmp_path, hu, monkeypatch):
    pytest.importorskip("SimpleITK")
    write_series(tmp_path / "series", hu, AXIAL, syntax="jpeg")
    monkeypatch.setattr(dicom_module, "_decode_with_simpleitk", lambda *arguments: None)
    assert re.search(r"compressed \(JPEG Lossless.*pip install SimpleITK", message_of(tmp_path / "series"))


def test_without_pydicom_it_is_told(tmp_path, hu, monkeypatch):
    write_series(tmp_path / "series", hu, AXIAL)
    monkeypatch.setitem(__import__("sys").modules, "pydicom", None)
    with pytest.raises(ImportError, match="pip install 'pydicom"):
        read_dicom(tmp_path / "series")


def test_each_slice_has_its_own_rescale(tmp_path, hu):
    """PET-CT scanners choose slope and intercept by slice."""
    even = hu // 2 * 2
    rescale = [(1, -1024), (2, -1000), (0.5, -500.5), (1, 0)] * 3
    write_series(tmp_path / "series", even + 0, AXIAL, rescale=rescale)
    write_enhanced(tmp_path / "enhanced", even + 0, AXIAL, rescale=rescale)
    stored = [np.rint((plane - intercept) / slope) for plane, (slope, intercept) in zip(even, rescale)]
    expected = np.stack([np.rint(plane * slope + intercept) for plane, (slope, intercept) in zip(stored, rescale)])
    expected = volume_from_array(expected.astype(np.int16), AXIAL)
    assert same(read_dicom(tmp_path / "series"), expected) and same(read_dicom(tmp_path / "enhanced"), expected)


def test_an_intercept_of_8192(tmp_path, hu):
    write_series(tmp_path / "series", hu, AXIAL, rescale=(1, -8192), dtype="uint16")
    assert same(read_dicom(tmp_path / "series"), volume_from_array(hu, AXIAL))


@pytest.mark.parametrize(("dtype", "intercept"), [("uint16", -1024), ("int16", 0)])
def test_only_the_stored_bits_count(tmp_path, hu, dtype, intercept):
    """12 of 16 bits; the other four hold an overlay."""

    def edit(dataset, index):
        words = np.frombuffer(dataset.PixelData, "<u2") & 0x0FFF
        words = words | ((np.arange(words.size) % 16) << 12).astype(np.uint16)
        dataset.PixelData, dataset.BitsStored, dataset.HighBit = words.tobytes(), 12, 11

    write_series(tmp_path / "series", hu, AXIAL, rescale=(1, intercept), dtype=dtype, edit=edit)
    assert same(read_dicom(tmp_path / "series"), volume_from_array(hu, AXIAL))


def test_values_in_the_high_bits(tmp_path, hu):
    def edit(dataset, index):
        words = np.frombuffer(dataset.PixelData, "<u2") << 4
        dataset.PixelData, dataset.BitsStored, dataset.HighBit = words.tobytes(), 12, 15

    write_series(tmp_path / "series", hu, AXIAL, dtype="uint16", edit=edit)
    assert same(read_dicom(tmp_path / "series"), volume_from_array(hu, AXIAL))


# Padding


@pytest.mark.parametrize(("dtype", "value"), [("int16", -2000), ("int16", 63536), ("uint16", 63536)])
def test_padding_becomes_air_with_a_note(tmp_path, hu, dtype, value):
    """Writers declare -2000 as 63536 and the other way round."""
    padded = hu.copy()
    padded[:, -2:, -3:] = AIR_HU

    def edit(dataset, index):
        stored = np.frombuffer(dataset.PixelData, dtype).reshape(hu.shape[1:]).copy()
        stored[-2:, -3:] = np.uint16(63536).astype(dtype)
        dataset.PixelData, dataset.PixelPaddingValue = stored.tobytes(), value if value > 0 else -2000
        if dtype == "uint16":
            dataset.BitsStored, dataset.HighBit = 12, 11  # 63536 would be a dense 2096 in twelve bits

    def as_unsigned(dataset, index):
        edit(dataset, index)
        dataset["PixelPaddingValue"].VR = "US" if value > 0 else "SS"

    write_series(tmp_path / "series", hu, AXIAL, dtype=dtype, edit=as_unsigned)
    volume = read_dicom(tmp_path / "series")
    assert same(volume, volume_from_array(padded, AXIAL))
    assert f"{12 * 6} voxels of padding were set to -1024 HU." in volume.notes


def test_a_range_of_padding(tmp_path, hu):
    def edit(dataset, index):
        stored = np.frombuffer(dataset.PixelData, np.int16).reshape(hu.shape[1:]).copy()
        stored[-1, -2:] = -2000, -1990
        dataset.PixelData, dataset.PixelPaddingValue, dataset.PixelPaddingRangeLimit = stored.tobytes(), -2000, -1985

    write_series(tmp_path / "series", hu, AXIAL, edit=edit)
    volume = read_dicom(tmp_path / "series")
    assert (volume.array[:, -1, -2:] == AIR_HU).all() and volume.notes[-1].startswith("24 voxels of padding")


def test_padding_that_says_water_is_left_alone(tmp_path, hu):
    """A padding value of 0 HU is a writer's default, and would turn all of the water into air."""

    def edit(dataset, index):
        dataset.PixelPaddingValue = 1024

    write_series(tmp_path / "series", hu, AXIAL, edit=edit)
    volume = read_dicom(tmp_path / "series")
    assert same(volume, volume_from_array(hu, AXIAL)) and (hu == 0).any()
    assert volume.notes[-1].endswith(f"tissue has too; {np.count_nonzero(hu == 0)} voxels of it are kept.")


# Several series, and what is none


def test_of_several_series_one_is_named(tmp_path, hu):
    thin = write_series(tmp_path / "a", hu, AXIAL, number=2)
    write_series(tmp_path / "b", hu[::2], AXIAL @ np.diag([2.0, 1, 1, 1]), number=10)
    told = message_of(tmp_path)
    assert told.startswith(
        "it holds 2 CT volumes: series 2 (CT, 12 slices of 20 x 26, 3 x 1.5 x 2 mm), series 10 (CT, 6"
    )
    assert "6 x 1.5 x 2 mm" in told and "series_uid" in told
    series = find_series(tmp_path)
    assert [(item.number, item.num_slices, item.shape) for item in series] == [(2, 12, (20, 26)), (10, 6, (20, 26))]
    assert series[0].spacing == pytest.approx((3.0, 1.5, 2.0)) and series[0].series_uid == thin
    assert series[1].unusable is None and len(series[1].files) == 6 and series[1].files[0].startswith("b/IM")
    assert same(read_dicom(tmp_path, thin), volume_from_array(hu, AXIAL))
    assert read_dicom(tmp_path, series[1].series_uid).spacing[0] == pytest.approx(6.0)
    assert message_of(tmp_path, "1.2.3").startswith(
        "no series has the series_uid that was asked for. It holds series 2"
    )
    assert find_series(zip_folder(tmp_path, tmp_path.parent / f"{tmp_path.name}.zip"))[1].number == 10


def test_two_series_whose_files_lie_mixed_in_one_folder(tmp_path, hu):
    first = write_series(tmp_path, hu, AXIAL, number=2, names=[f"{index}a" for index in range(12)])
    second = write_series(tmp_path, -hu - 1000, AXIAL, number=3, names=[f"{index}b" for index in range(12)])
    assert "it holds 2 CT volumes" in message_of(tmp_path)
    assert same(read_dicom(tmp_path, first), volume_from_array(hu, AXIAL))
    assert same(read_dicom(tmp_path, second), volume_from_array(-hu - 1000, AXIAL))


def test_scouts_dose_reports_and_other_files_are_passed_over_and_counted(tmp_path, hu):
    uid = write_series(tmp_path / "ct", hu, AXIAL)
    write_localizer(tmp_path / "scout")
    write_localizer(tmp_path / "ct", uid)
    write_colour_capture(tmp_path / "dose")
    (tmp_path / "README.txt").write_text("Mustermann")
    (tmp_path / "empty").write_bytes(b"")
    volume = read_dicom(tmp_path)
    assert same(volume, volume_from_array(hu, AXIAL))
    assert "2 files are no DICOM image and passed over." in volume.notes
    assert "1 localizer image is left out." in volume.notes
    assert (
        "2 other series are no CT volume: series 1 (CT, 1 slice of 40 x 50), series 99 (CT, 1 slice of 20 x 30)."
        in volume.notes
    )
    reasons = [item.unusable for item in find_series(tmp_path)]
    assert reasons[0].startswith("a localizer") and reasons[1] is None and reasons[2].startswith("colour pictures")
    assert not any(secret in repr(find_series(tmp_path)).lower() for secret in SECRETS)
    assert "a localizer (scout view)" in message_of(tmp_path, find_series(tmp_path)[0].series_uid)


def test_the_dicomdir_is_ignored(tmp_path, hu):
    write_series(tmp_path / "ct", hu, AXIAL)
    entry = Dataset()
    entry.DirectoryRecordType, entry.PatientName = "PATIENT", "Mustermann^Erika"
    directory = Dataset()
    directory.DirectoryRecordSequence = [entry]
    directory.file_meta = FileMetaDataset()
    directory.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2.1"
    directory.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.1.3.10"
    directory.file_meta.MediaStorageSOPInstanceUID = "1.2.3"
    pydicom.dcmwrite(tmp_path / "DICOMDIR", directory, enforce_file_format=True)
    volume = read_dicom(tmp_path)
    assert same(volume, volume_from_array(hu, AXIAL)) and not volume.notes


def test_one_multi_frame_file_by_itself(tmp_path, hu):
    write_enhanced(tmp_path / "scan", hu, AXIAL)
    assert same(read_dicom(tmp_path / "scan"), volume_from_array(hu, AXIAL))
    assert find_series(tmp_path / "scan")[0].files == ("scan",)


@pytest.mark.parametrize("content", ["nothing", "text"])
def test_a_place_without_dicom(tmp_path, content):
    if content == "text":
        (tmp_path / "Mustermann.txt").write_text("x")
    assert find_series(tmp_path) == []
    assert "no DICOM image among its" in message_of(tmp_path)
    with pytest.raises(FileNotFoundError, match="nowhere: no such file or folder"):
        read_dicom(tmp_path / "nowhere")


# Places of the slices


@pytest.mark.parametrize(
    ("left_out", "told"),
    [
        ([5], r"has a hole: 1 missing between -88\.00 and -82\.00 mm; the other slices lie 3 mm apart"),
        ([4, 5, 6], r"a hole: 3 missing between -91\.00 and -79\.00 mm"),
        ([2, 7], r"2 holes: 1 missing between -97\.00 and -91\.00 mm, 1 missing between -82\.00 and -76\.00 mm"),
        ([1], r"1 missing between -100\.00 and -94\.00 mm"),
        ([10], r"1 missing between -73\.00 and -67\.00 mm"),
        ([1, 4, 7, 10], r"4 holes: 1 missing between"),
    ],
)
def test_missing_slices_are_counted_and_placed(tmp_path, hu, left_out, told):
    shifted = AXIAL.copy()
    kept = [index for index in range(12) if index not in left_out]
    write_series(tmp_path, hu[kept], shifted, positions=positions_of(shifted, 12)[kept])
    assert re.search(told, message_of(tmp_path))


def test_two_stacks_far_apart_are_no_volume(tmp_path, hu):
    positions = positions_of(AXIAL, 12)
    positions[6:, 2] += 37.5
    write_series(tmp_path, hu, AXIAL, positions=positions)
    assert "a hole: 40.5 mm without a slice between -85.00 and -44.50 mm" in message_of(tmp_path)


@pytest.mark.parametrize(("jitter", "is_noted"), [(0.004, False), (0.2, True)])
def test_jitter_becomes_the_mean_spacing(tmp_path, hu, jitter, is_noted):
    positions = positions_of(AXIAL, 12)
    positions[1:-1, 2] += np.resize([jitter, -jitter, 0], 10)
    write_series(tmp_path, hu, AXIAL, positions=positions)
    volume = read_dicom(tmp_path)
    assert same(volume, volume_from_array(hu, AXIAL))
    assert [note.endswith("the mean, 3 mm, is taken.") for note in volume.notes] == [True] * is_noted


def test_uneven_slices_are_interpolated_to_even_ones(tmp_path):
    """1.25 mm, then 2.5 mm; HU that grow linearly with height come out exact."""
    z = np.concatenate([np.arange(8) * 1.25, 8.75 + np.arange(1, 8) * 2.5])
    plane = np.add.outer(np.arange(10) * 3, np.arange(12) * 5)
    array = np.rint(plane - 300 + 16 * z[:, None, None]).astype(np.int16)  # whole numbers at every 1.25 mm
    positions = np.stack([np.full(15, -30.0), np.full(15, -25.0), z - 100], axis=1)
    write_series(tmp_path, array, AXIAL, positions=positions)
    volume = read_dicom(tmp_path)
    assert volume.spacing == pytest.approx((1.25, 1.5, 2.0)) and volume.array.shape == (22, 10, 12)
    expected = plane - 300 + 16 * 1.25 * np.arange(22)[:, None, None]
    assert np.array_equal(volume.array, np.rint(expected))
    np.testing.assert_allclose(volume.affine[:3, 3], [30, 25, -100], atol=1e-4)
    assert "slices lie 1.25 to 2.5 mm apart; they were interpolated to 22 slices, 1.25 mm apart." in volume.notes


def test_one_odd_gap_does_not_make_a_thousand_slices(tmp_path, hu):
    positions = positions_of(AXIAL, 12)
    positions[6:, 2] -= 2.98
    write_series(tmp_path, hu, AXIAL, positions=positions)
    assert read_dicom(tmp_path).array.shape[0] == 49


def test_copies_are_dropped_and_contradictions_refused(tmp_path, hu):
    uid = write_series(tmp_path, hu, AXIAL)
    copies = [index for index in range(12) if index % 4 == 1]
    names = [f"copy{index}" for index in copies]
    write_series(tmp_path, hu[copies], AXIAL, uid=uid, positions=positions_of(AXIAL, 12)[copies], names=names)
    volume = read_dicom(tmp_path)
    assert same(volume, volume_from_array(hu, AXIAL)) and "3 slices are a copy of another and dropped." in volume.notes
    other = hu[copies].copy()
    other[0, 3, 3] += 1
    write_series(tmp_path, other, AXIAL, uid=uid, positions=positions_of(AXIAL, 12)[copies], names=names)
    assert message_of(tmp_path).startswith("different slices lie at one place, 1 times (first at -97.00 mm)")


def test_slices_side_by_side(tmp_path, hu):
    positions = positions_of(AXIAL, 12)
    positions[3] = positions[4] + [40, 0, 0]
    write_series(tmp_path, hu, AXIAL, positions=positions)
    assert "side by side in one plane (at -88.00 mm)" in message_of(tmp_path)


# Gantry tilt


def smooth_hu(points):
    """HU in closed form at any point (RAS+, mm)."""
    x, y, z = np.moveaxis(points, -1, 0)
    return 400 * np.sin(x / 17 + 0.4) * np.cos(y / 13) + 300 * np.sin(z / 19 + y / 23) - 100


def points_of(shape, affine):
    indices = np.stack([*np.meshgrid(*map(np.arange, shape), indexing="ij"), np.ones(shape)], axis=-1)
    return (indices @ affine.T)[..., :3]


@pytest.mark.parametrize("degrees", [12.0, -20.0, 2.0])
@pytest.mark.parametrize("is_uneven", [False, True])
def test_a_tilted_gantry_against_a_truth_in_closed_form(tmp_path, degrees, is_uneven):
    """Planes lean by the tilt, the table moves along the body: every voxel must show the truth at its place."""
    angle = np.radians(degrees)
    count, rows, columns = 14, 40, 30
    down = np.array([0, -np.cos(angle), np.sin(angle)])
    z = np.arange(count) * 2.0
    if is_uneven:
        z[7:] = z[6] + np.arange(1, 8) * 3.5
    affine = np.eye(4)
    affine[:3, 0], affine[:3, 1], affine[:3, 2] = (0, 0, 2.0), down * 1.1, (-1.3, 0, 0)
    affine[:3, 3] = 20, 18, -60
    positions = (affine[:3, 3] + z[:, None] * [0, 0, 1]) * [-1, -1, 1]
    points = points_of((1, rows, columns), affine) + z[:, None, None, None] * [0, 0, 1]
    write_series(tmp_path, np.rint(smooth_hu(points)).astype(np.int16), affine, positions=positions)
    volume = read_dicom(tmp_path)
    note = next(note for note in volume.notes if "gantry tilt" in note)
    assert f"lean by {abs(degrees):.1f} degrees" in note and "-1024 HU" in note
    axes = volume.affine[:3, :3] / np.linalg.norm(volume.affine[:3, :3], axis=0)
    np.testing.assert_allclose(axes.T @ axes, np.eye(3), atol=1e-6)
    assert volume.spacing == pytest.approx((2.0 * np.cos(angle), 1.1, 1.3), rel=0.02)
    truth = smooth_hu(points_of(volume.array.shape, volume.affine))
    is_inside = volume.array != AIR_HU
    assert is_inside.mean() > 0.6 and (~is_inside).any()
    difference = np.abs(volume.array - truth)[is_inside]
    # Linear interpolation of this function errs by 3 HU at most within a cell; half a cell at the rim is held constant.
    # Between uneven slices of which one ends earlier, the rim is mixed with air.
    assert np.quantile(difference, 0.9) < 4 and (is_uneven or difference.max() < 40)


def test_a_tilt_by_whole_voxels_is_undone_exactly(shared_dir, tmp_path):
    """Each slice of a real CT is cut one row further down: moved back, the voxels are those of the CT."""
    array, affine = slices_of_nifti(nibabel.load(shared_dir / "ct_samples" / "abdomen_slab_ct.nii.gz"))
    rows = 60
    sheared = np.stack([array[index, index : index + rows] for index in range(30)])
    down = affine[:3, 1]
    positions = (affine[:3, 3] + np.arange(30)[:, None] * (affine[:3, 0] + down)) * [-1, -1, 1]
    write_series(tmp_path, sheared, affine, positions=positions)
    volume = read_dicom(tmp_path)
    expected = np.full((30, rows + 29, array.shape[2]), AIR_HU, dtype=np.int16)
    for index in range(30):
        expected[index, index : index + rows] = sheared[index]
    assert same(volume, volume_from_array(expected, affine)) and (expected != AIR_HU).mean() > 0.5


def test_one_slice_aside_is_moved_back(tmp_path, hu):
    positions = positions_of(AXIAL, 12)
    positions[5] += [4.0, 0, 0]  # two columns to the left
    moved = hu.copy()
    moved[5, :, :-2] = hu[5, :, 2:]
    write_series(tmp_path, moved, AXIAL, positions=positions)
    volume = read_dicom(tmp_path)
    assert volume.array.shape == (12, 20, 28) and np.array_equal(volume.array[5, :, 2:26], hu[5, :, 2:])
    assert np.array_equal(volume.array[6, :, :26], hu[6]) and (volume.array[6, :, 26:] == AIR_HU).all()
    assert any("up to 4 mm aside" in note for note in volume.notes)


def test_slices_far_aside_are_refused(tmp_path, hu):
    positions = positions_of(AXIAL, 12)
    positions[5] += [4000.0, 0, 0]
    write_series(tmp_path, hu, AXIAL, positions=positions)
    assert "too far aside" in message_of(tmp_path)


# Broken series


def changed(**values):
    """An edit of every slice."""

    def edit(dataset, index):
        for keyword, value in values.items():
            setattr(dataset, keyword, value)

    return edit


def of_slice_4(edit):
    return lambda dataset, index: edit(dataset, index) if index == 4 else None


def without(keyword):
    return lambda dataset, index: delattr(dataset, keyword)


def raw(keyword, value):
    """An element whose text is no number."""

    def edit(dataset, index):
        tag = pydicom.tag.Tag(keyword)
        dataset[tag] = pydicom.dataelem.RawDataElement(tag, "DS", len(value), value, 0, False, True)

    return edit


def short_pixels(dataset, index):
    dataset.PixelData = dataset.PixelData[:100]


@pytest.mark.parametrize(
    ("edit", "told"),
    [
        (changed(Modality="MR"), "it holds no CT volume. series 3 (MR, 12 slices of 20 x 26): modality MR, not CT."),
        (changed(Modality="PT"), "modality PT, not CT."),
        (changed(SOPClassUID="1.2.840.10008.5.1.4.1.1.7"), "secondary captures or other derived objects"),
        (changed(ImageType=["DERIVED", "PRIMARY", "LOCALIZER"]), "a localizer (scout view)"),
        (without("ImagePositionPatient"), "ImagePositionPatient is missing or unreadable in 12 of 12 slices"),
        (of_slice_4(without("ImagePositionPatient")), "ImagePositionPatient is missing or unreadable in 1 of 12"),
        (of_slice_4(raw("ImagePositionPatient", b"1\\2\\Mustermann")), "ImagePositionPatient is missing or unreadab"),
        (raw("ImagePositionPatient", b"1\\2\\nan "), "ImagePositionPatient is missing or unreadable in 12 of 12"),
        (without("ImageOrientationPatient"), "ImageOrientationPatient is missing or unreadable in 12 of 12"),
        (changed(ImageOrientationPatient=[0, 0, 0, 0, 0, 0]), "spans no plane with right angles"),
        (changed(ImageOrientationPatient=[1, 0, 0, 1, 0, 0]), "spans no plane with right angles"),
        (changed(PixelSpacing=[0, 1.5]), "PixelSpacing is 0 x 1.5 mm; repair the header"),
        (raw("PixelSpacing", b"nan\\1.5 "), "PixelSpacing is nan x 1.5 mm"),
        (changed(PixelSpacing=[-1, 1.5]), "PixelSpacing is -1 x 1.5 mm"),
        (without("PixelSpacing"), "PixelSpacing is missing"),
        (of_slice_4(changed(PixelSpacing=[3, 3])), "slices of several pixel spacings are mixed"),
        (of_slice_4(changed(ImageOrientationPatient=[1, 0, 0, 0, 0, -1])), "slices of several orientations are mixed"),
        (of_slice_4(changed(Rows=10)), "slices of 20 x 26 and of 10 x 26 are mixed"),
        (changed(RescaleSlope=0), "rescale slope 0 and intercept -1024 cannot be used"),
        (changed(RescaleType="Z_EFF"), "its values are no HU"),
        (changed(Rows=65535, Columns=65535), "12 slices of 65535 x 65535, which is no size of a CT"),
        (changed(Rows=0), "12 slices of 0 x 26, which is no size of a CT"),
        (of_slice_4(short_pixels), "the slice at -88.00 mm holds 100 of 1040 bytes of pixels: cut short"),
        (of_slice_4(changed(BitsStored=20)), "the slice at -88.00 mm: 20 bits stored of 16"),
    ],
)  # fmt: skip
def test_a_broken_series_is_refused_with_its_reason(tmp_path, hu, edit, told):
    write_series(tmp_path, hu, AXIAL, edit=edit)
    assert told in message_of(tmp_path)


def test_colour_pictures_are_refused(tmp_path):
    write_colour_capture(tmp_path, count=8)
    assert "series 99 (CT, 8 slices of 20 x 30): colour pictures (secondary capture), not HU." in message_of(tmp_path)


def test_a_few_slices_are_no_volume(tmp_path, hu):
    write_series(tmp_path / "few", hu[:4], AXIAL)
    assert "only 4 slices, a volume has at least 5" in message_of(tmp_path / "few")
    positions = positions_of(AXIAL, 12)
    positions[3:] = positions[3]
    write_series(tmp_path / "copies", np.repeat(hu[:1], 12, axis=0), AXIAL, positions=positions)
    assert "at 4 different places; a volume has at least 5" in message_of(tmp_path / "copies")


def test_no_rescale_is_told(tmp_path, hu):
    def edit(dataset, index):
        del dataset.RescaleSlope, dataset.RescaleIntercept, dataset.RescaleType

    write_series(tmp_path, hu, AXIAL, rescale=(1, 0), edit=edit)
    volume = read_dicom(tmp_path)
    assert same(volume, volume_from_array(hu, AXIAL))
    assert "the headers hold no rescale slope and intercept: stored values are taken for HU." in volume.notes


@pytest.mark.parametrize("length", [140, 200, 700, -300])
def test_a_file_cut_short_is_never_a_missing_last_slice(tmp_path, hu, length):
    """Cut in the header, it would be passed over as no DICOM file, and the volume would end a slice early."""
    names = [f"slice{index:02d}" for index in range(12)]
    write_series(tmp_path, hu, AXIAL, names=names)
    path = tmp_path / names[-1]
    path.write_bytes(path.read_bytes()[:length])
    assert "cut short" in message_of(tmp_path)


@pytest.mark.parametrize("syntax", ["rle", "jpeg2000"])
def test_damaged_compressed_pixels(tmp_path, hu, syntax):
    if syntax == "jpeg2000":
        pytest.importorskip("SimpleITK")

    def edit(dataset, index):
        if index == 4:
            coded = bytearray(dataset.PixelData)
            coded[24:] = bytes(len(coded) - 24)  # behind the offset table and the head of the frame
            dataset.PixelData = bytes(coded)
            dataset["PixelData"].is_undefined_length = True

    write_series(tmp_path, hu, AXIAL, syntax=syntax, edit=edit)
    assert re.match(r"the slice at -88\.00 mm is compressed .* and damaged", message_of(tmp_path))


def test_frames_and_their_geometry_must_agree(tmp_path, hu):
    def edit(dataset):
        dataset.NumberOfFrames = 2_000_000_000

    write_enhanced(tmp_path / "scan", hu, AXIAL, edit=edit)
    assert "1 DICOM file is cut short or damaged" in message_of(tmp_path)


def test_files_deflated_as_a_whole_are_refused(tmp_path, hu):
    write_series(tmp_path, hu[:6], AXIAL)
    for path in list(tmp_path.iterdir()):
        dataset = pydicom.dcmread(path)
        dataset.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2.1.99"
        pydicom.dcmwrite(path, dataset)
    assert "deflated as a whole" in message_of(tmp_path) and "dcmconv" in message_of(tmp_path)


# Archives


def test_members_that_point_outside_are_read_and_never_written(tmp_path, hu):
    write_series(tmp_path / "series", hu, AXIAL)
    packed = zip_folder(tmp_path / "series", tmp_path / "x.zip", prefix="../../../")
    shutil.rmtree(tmp_path / "series")
    before = sorted(tmp_path.parent.rglob("*"))
    assert same(read_dicom(packed), volume_from_array(hu, AXIAL))
    assert sorted(tmp_path.parent.rglob("*")) == before


def test_a_bomb_is_refused_before_it_is_inflated(tmp_path):
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("IM1", bytes(128) + b"DICM" + bytes(1 << 25))
    assert re.search(
        r"would inflate from \d{5} to 33554564 bytes, far more than scans do", message_of(tmp_path / "bomb.zip")
    )
    with pytest.raises(BadVolumeError, match="would inflate"):
        find_series(tmp_path / "bomb.zip")


def test_an_archive_that_claims_a_huge_member(tmp_path):
    """The directory at the end of the archive lies about the size."""
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("IM1", bytes(128) + b"DICM" + bytes(1000))
    content = bytearray((tmp_path / "bomb.zip").read_bytes())
    entry = content.index(b"PK\1\2")
    content[entry + 20 : entry + 28] = struct.pack("<II", 1 << 29, (1 << 32) - 2)
    (tmp_path / "bomb.zip").write_bytes(content)
    assert "to 4294967294 bytes" in message_of(tmp_path / "bomb.zip")


@pytest.mark.parametrize(
    ("breaking", "told"),
    [
        (lambda content: content[:-40], "the archive is cut short or damaged"),
        (lambda content: content[:60] + bytes([content[60] ^ 255]) + content[61:], "cut short or damaged"),
        (lambda content: content[:4000] + bytes(40) + content[4040:], "cut short or damaged"),
        (lambda content: content[:500] + content[540:], "cut short or damaged"),  # members now begin before the file
    ],
)
def test_damaged_archives(tmp_path, hu, breaking, told):
    write_series(tmp_path / "series", hu, AXIAL)
    packed = zip_folder(tmp_path / "series", tmp_path / "x.zip")
    packed.write_bytes(breaking(packed.read_bytes()))
    assert told in message_of(packed)


def test_a_file_that_vanishes_is_told_without_its_name(tmp_path, hu, monkeypatch):
    write_series(tmp_path, hu, AXIAL, names=[f"Mustermann{index}" for index in range(12)])
    check = dicom_module._check_places
    monkeypatch.setattr(
        dicom_module, "_check_places", lambda stack: check(stack) or (tmp_path / "Mustermann7").unlink()
    )
    with pytest.raises(FileNotFoundError, match="cannot be read") as raised:
        read_dicom(tmp_path)
    assert str(tmp_path) in str(raised.value) and "Mustermann" not in str(raised.value)


def test_other_packings_are_refused(tmp_path, hu):
    write_series(tmp_path / "series", hu[:6], AXIAL)
    packed = zip_folder(tmp_path / "series", tmp_path / "bz2.zip", zipfile.ZIP_BZIP2)
    assert "packed by a rare method" in message_of(packed)
    packed = zip_folder(tmp_path / "series", tmp_path / "encrypted.zip")
    content = bytearray(packed.read_bytes())
    content[content.index(b"PK\1\2") + 8] |= 1
    packed.write_bytes(content)
    assert "the archive is encrypted" in message_of(packed)


# Where scans are processed


def test_processor_and_pipeline_take_a_folder_or_an_archive(tmp_path):
    volume, mask = write_scan(tmp_path)
    hu, _ = tiny_scan()
    series = tmp_path / "series"
    write_series(series, hu.transpose(2, 1, 0), AFFINE[:, [2, 1, 0, 3]])
    packed = zip_folder(series, tmp_path / "series.zip")
    images = FVLMImageProcessor.from_config(tiny_config())
    expected = images(volume, mask)
    for place in (series, str(series), packed):
        features = images(place, mask)
        assert all((features[name] == expected[name]).all() for name in expected)
    pipe = FVLMZeroShotPipeline(
        model=FVLMModel(tiny_config()),
        processor=FVLMProcessor.from_config(tiny_config(), tiny_tokenizer()),
        device="cpu",
    )
    findings = [{"finding": "Nodule", "organ": "heart", "positive": "Nodule.", "negative": "Not nodule."}]
    answers = [pipe({"volume": place, "mask": mask}, findings=findings) for place in (volume, series, packed)]
    assert answers[0][0]["probability"] is not None and answers[0] == answers[1] == answers[2]
    with pytest.raises(ValueError, match="mask given as an array cannot be placed on a DICOM series"):
        images(series, tiny_scan()[1])
    with pytest.raises(BadVolumeError, match="it holds 2 CT volumes"):
        write_series(tmp_path / "series" / "second", hu.transpose(2, 1, 0), AFFINE[:, [2, 1, 0, 3]])
        images(series, mask)
