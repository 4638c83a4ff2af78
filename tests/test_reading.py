"""Reading NIfTI: every orientation, every number type, and each kind of bad file with its message."""

import gzip
from itertools import permutations, product

import nibabel
import numpy as np
import pytest

from modeling_fvlm.reading import (
    BadVolumeError,
    Volume,
    check_same_grid,
    mask_from_array,
    read_affine,
    read_nifti,
    read_nifti_mask,
    volume_from_array,
)

RAS = np.array([[1.5, 0, 0, -20], [0, 2.0, 0, 5], [0, 0, 3.0, 100], [0, 0, 0, 1]])


@pytest.fixture
def hu():
    """HU (right, anterior, superior), with air in it."""
    return np.random.default_rng(0).integers(-1000, 1200, (6, 7, 5)).astype(np.int16)


def write(path, array, affine=RAS, dtype=None, slope=None, inter=None):
    image = nibabel.Nifti1Image(array, affine)
    if dtype is not None:
        image.set_data_dtype(dtype)
    if slope is not None:
        image.header.set_slope_inter(slope, inter)
    nibabel.save(image, path)
    return path


def turned(array, affine, order, flips):
    image = nibabel.Nifti1Image(array, affine)
    orientation = np.array([[axis, -1 if flip else 1] for axis, flip in zip(order, flips)])
    return image.as_reoriented(orientation)


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_reads_hu_spacing_and_place(tmp_path, hu, suffix):
    volume = read_nifti(write(tmp_path / f"ct{suffix}", hu))
    assert volume.array.dtype == np.int16 and volume.spacing == (3.0, 2.0, 1.5)
    for x, y, z in np.ndindex(*hu.shape):
        assert volume.array[z, 6 - y, 5 - x] == hu[x, y, z]  # RAS -> LPS: right and anterior turn round
    np.testing.assert_allclose(volume.affine @ [0, 0, 0, 1], RAS @ [5, 6, 0, 1])
    assert volume.name.endswith(f"ct{suffix}")


def test_every_orientation_on_disk_gives_one_volume(tmp_path, hu):
    expected = read_nifti(write(tmp_path / "ras.nii", hu))
    shapes = set()
    for number, (order, flips) in enumerate(product(permutations(range(3)), product((False, True), repeat=3))):
        image = turned(hu, RAS, order, flips)
        shapes.add(image.shape)
        path = tmp_path / f"{number}.nii"
        nibabel.save(image, path)
        volume = read_nifti(path)
        assert np.array_equal(volume.array, expected.array)
        assert volume.spacing == pytest.approx(expected.spacing)
        np.testing.assert_allclose(volume.affine, expected.affine, atol=1e-4)
    assert number == 47 and len(shapes) == 6


def test_a_mask_stored_in_another_orientation_lies_on_the_grid(tmp_path, hu):
    labels = np.arange(hu.size).reshape(hu.shape) % 100
    nibabel.save(turned(labels.astype(np.uint8), RAS, (2, 0, 1), (True, False, True)), tmp_path / "mask.nii.gz")
    volume, mask = read_nifti(write(tmp_path / "ct.nii.gz", hu)), read_nifti_mask(tmp_path / "mask.nii.gz")
    check_same_grid(volume, mask)
    assert mask.array.dtype == np.uint8
    assert mask.array[2, 6 - 1, 5 - 4] == labels[4, 1, 2]


def test_the_qform_is_enough(tmp_path, hu):
    image = nibabel.Nifti1Image(hu, None)
    image.set_qform(RAS, code=1)
    nibabel.save(image, tmp_path / "q.nii")
    assert read_nifti(tmp_path / "q.nii").spacing == pytest.approx((3.0, 2.0, 1.5))


@pytest.mark.parametrize("dtype", ["int32", "float32", "float64", ">i2", "int8", "uint16"])
def test_other_number_types_become_rounded_int16(tmp_path, hu, dtype):
    low, high = (-128, 127) if dtype == "int8" else (0, 65535) if dtype == "uint16" else (-(2**31), 2**31 - 1)
    values = np.clip(hu.astype(np.int64) * (40 if dtype in ("int32", "uint16") else 1), low, high)
    values = values + (0.6 if dtype.startswith("float") else 0)
    volume = read_nifti(write(tmp_path / "ct.nii", values.astype(dtype)))
    expected = np.clip(np.rint(values), -32768, 32767).astype(np.int16)
    assert volume.array.dtype == np.int16 and volume.array.dtype.isnative
    assert np.array_equal(volume.array, expected[::-1, ::-1].transpose(2, 1, 0))
    if dtype in ("int32", "uint16"):
        assert (expected == 32767).any(), "clipping must have happened"


def test_slope_and_intercept_are_applied_in_float(tmp_path):
    """The released code multiplies int16 by a slope of 0.5 in int16: everything collapses to the intercept."""
    stored = np.arange(-50, 2950, 50, dtype=np.int16).reshape(3, 4, 5)
    volume = read_nifti(write(tmp_path / "ct.nii", stored, slope=0.5, inter=-1000))
    image = nibabel.load(tmp_path / "ct.nii")
    assert (image.dataobj.slope, image.dataobj.inter) == (0.5, -1000)
    expected = np.rint(image.get_fdata())[::-1, ::-1].transpose(2, 1, 0)
    assert len(np.unique(expected)) == 60 and np.array_equal(volume.array, expected)


def test_rescale_and_affine_of_the_caller_replace_the_headers(tmp_path):
    stored = np.arange(0, 3000, 50, dtype=np.int16).reshape(3, 4, 5)
    nibabel.save(nibabel.Nifti1Image(stored, None), tmp_path / "blank.nii.gz")  # as CT-RATE's original release
    volume = read_nifti(tmp_path / "blank.nii.gz", affine=np.diag([-0.7, -0.7, 1.5, 1]), rescale=(1, -1024))
    assert volume.spacing == pytest.approx((1.5, 0.7, 0.7))
    assert np.array_equal(volume.array, (stored - 1024).transpose(2, 1, 0))


def test_int16_is_not_copied(hu):
    assert np.shares_memory(volume_from_array(hu, RAS).array, hu)


# Bad files


def test_a_missing_file_says_so(tmp_path):
    with pytest.raises(FileNotFoundError, match="none.nii.gz: no such file"):
        read_nifti(tmp_path / "none.nii.gz")


@pytest.mark.parametrize("kept", [0.2, 0.6, 0.95, -1])
def test_a_truncated_gz_is_named(tmp_path, kept):
    array = np.random.default_rng(0).integers(-1000, 1000, (40, 40, 30)).astype(np.int16)
    path = write(tmp_path / "cut.nii.gz", array)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * kept) if kept > 0 else kept])
    with pytest.raises(BadVolumeError, match="cut.nii.gz: .*(end early|cut short|damaged).*Fetch the file again"):
        read_nifti(path)


def test_a_damaged_gz_is_named(tmp_path, hu):
    path = write(tmp_path / "bad.nii.gz", np.tile(hu, (5, 5, 5)))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(BadVolumeError, match="bad.nii.gz: .*damaged.*Fetch the file again"):
        read_nifti(path)


def test_a_truncated_nii_is_named(tmp_path, hu):
    path = write(tmp_path / "cut.nii", hu)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(BadVolumeError, match="cut.nii: .*(end early|cut short).*Fetch the file again"):
        read_nifti(path)


@pytest.mark.parametrize(
    "content",
    [b"", b"hello", b"\0" * 1000, gzip.compress(b"not a scan" * 100, mtime=0)],
    ids=["empty", "text", "zeros", "gzip"],
)
@pytest.mark.parametrize("name", ["x.nii.gz", "x.nii", "x.png"])
def test_what_is_no_nifti_is_named(tmp_path, content, name):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(BadVolumeError, match=f"{name}: "):
        read_nifti(tmp_path / name)


def test_another_image_format_is_refused(tmp_path, hu):
    nibabel.save(nibabel.MGHImage(hu, RAS), tmp_path / "ct.mgz")
    with pytest.raises(BadVolumeError, match="ct.mgz: a MGHImage, not a NIfTI file"):
        read_nifti(tmp_path / "ct.mgz")


def test_shapes_that_are_no_volume(tmp_path, hu):
    with pytest.raises(BadVolumeError, match="flat.nii: needs a 3-D array, got 2-D"):
        read_nifti(write(tmp_path / "flat.nii", hu[:, :, 0]))
    with pytest.raises(BadVolumeError, match="series.nii: needs a 3-D array, got 4-D .*pick one"):
        read_nifti(write(tmp_path / "series.nii", np.stack([hu, hu], axis=-1)))
    one = read_nifti(write(tmp_path / "one.nii", hu[..., None]))
    assert np.array_equal(one.array, read_nifti(write(tmp_path / "ct.nii", hu)).array)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nan_voxels_are_counted(tmp_path, hu, value):
    values = hu.astype(np.float32)
    values[0, 0, :3] = value
    with pytest.raises(BadVolumeError, match="ct.nii: 3 of 210 voxels are NaN or infinite.*-1024"):
        read_nifti(write(tmp_path / "ct.nii", values))


def test_unusable_geometry_is_named(tmp_path, hu):
    shear = RAS.copy()
    shear[0, 1] = 0.4
    with pytest.raises(BadVolumeError, match="tilted.nii: the affine is sheared"):
        read_nifti(write(tmp_path / "tilted.nii", hu, shear))
    zero = RAS.copy()
    zero[2, 2] = 0
    image = nibabel.Nifti1Image(hu, RAS)
    image.header.set_sform(zero, code=1)
    image.header["pixdim"][3] = 0
    (tmp_path / "zero.nii").write_bytes(raw_bytes(image, hu))
    with pytest.raises(BadVolumeError, match="zero.nii: zero spacing"):
        read_nifti(tmp_path / "zero.nii")
    nibabel.save(nibabel.Nifti1Image(hu, None), tmp_path / "blank.nii")
    with pytest.raises(BadVolumeError, match="blank.nii: the header holds no orientation.*left and right.*affine"):
        read_nifti(tmp_path / "blank.nii")


def raw_bytes(image, array):
    """A file as a careless writer makes it: nibabel would repair such a header on saving."""
    header = image.header.copy()
    header["vox_offset"], header["magic"] = 352, b"n+1"
    return header.binaryblock + b"\0" * 4 + array.tobytes(order="F")


def test_colour_images_are_refused(tmp_path):
    colours = np.zeros((4, 4, 4), dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")])
    with pytest.raises(BadVolumeError, match="not numbers; colour images"):
        read_nifti(write(tmp_path / "rgb.nii", colours))


def test_a_slope_of_nothing_is_refused(hu):
    with pytest.raises(BadVolumeError, match="ct: rescale slope 0"):
        volume_from_array(hu, RAS, "ct", rescale=(0, -1024))


def test_odd_hu_are_noted_and_kept(hu, caplog):
    with caplog.at_level("WARNING"):
        assert volume_from_array(hu, RAS, "plain").array.min() >= -1000
        assert not caplog.records
        metal = hu.copy()
        metal[0, 0, 0] = 30000
        assert volume_from_array(metal, RAS, "metal").array.max() == 30000
        assert volume_from_array(hu + 1024, RAS, "raw").array.min() >= 0
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 2
    assert messages[0].startswith("metal: values from") and "kept as they are" in messages[0]
    assert messages[1].startswith("raw: the lowest value is") and "rescale" in messages[1]


# Masks


@pytest.mark.parametrize("dtype", [bool, np.uint8, np.int16, np.int64, np.float32])
def test_mask_types(dtype):
    labels = (np.arange(60).reshape(3, 4, 5) % (2 if dtype is bool else 118)).astype(dtype)
    mask = mask_from_array(labels, RAS)
    assert mask.array.dtype == np.uint8
    assert np.array_equal(mask.array, labels[::-1, ::-1].transpose(2, 1, 0).astype(np.uint8))


def test_scaled_masks_are_read_by_their_values(tmp_path):
    labels = np.arange(60, dtype=np.uint8).reshape(3, 4, 5)
    mask = read_nifti_mask(write(tmp_path / "mask.nii", labels, slope=2, inter=1))
    assert sorted(mask.array.ravel().tolist()) == sorted(
        np.rint(nibabel.load(tmp_path / "mask.nii").get_fdata()).ravel()
    )


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (0.5, "organs: mask labels must be whole numbers.*nearest neighbour"),
        (300, r"organs: mask labels must be within 0..255, got 0\S*..300"),
        (-1, r"organs: mask labels must be within 0..255, got -1"),
        (np.nan, "organs: 1 of 60 voxels are NaN"),
    ],
)
def test_wrong_labels_are_refused(value, message):
    labels = np.zeros((3, 4, 5), dtype=np.float32)
    labels[1, 1, 1] = value
    with pytest.raises(BadVolumeError, match=message):
        mask_from_array(labels, RAS, "organs")


# One grid


def grid(shape=(4, 5, 6), shift=(0, 0, 0), scale=1.0):
    affine = np.diag([2.0 * scale, 2.0, 2.0, 1.0])
    affine[:3, 3] = shift
    return Volume(np.zeros(shape, dtype=np.uint8), (2.0, 2.0, 2.0 * scale), affine, "case")


def test_rounded_headers_are_one_grid():
    check_same_grid(grid(), grid(shift=(0.01, -0.2, 0.3), scale=1.0005))


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (grid(shape=(4, 5, 7)), r"case: volume \(4, 5, 6\) and mask \(4, 5, 7\).*not on one grid.*Resample the mask"),
        (grid(shift=(2.0, 0, 0)), "case: volume and mask .*not on one grid.*depth they lie up to 1.0 voxels apart"),
        (grid(shift=(0, -6.0, 0)), "not on one grid.*height they lie up to 3.0 voxels apart"),
        (grid(scale=1.5), "not on one grid.*depth they lie up to 1.5 voxels apart"),
    ],
)
def test_another_grid_is_refused(other, message):
    with pytest.raises(BadVolumeError, match=message):
        check_same_grid(grid(), other)


def test_read_affine_is_that_of_the_stored_array(tmp_path, hu):
    np.testing.assert_allclose(read_affine(write(tmp_path / "ct.nii.gz", hu)), RAS)


def test_real_samples(shared_dir):
    samples = {"abdomen_pelvis": (112, 101, 122), "abdomen_slab": (30, 101, 122), "chest_cta": (164, 126, 120)}
    for name, shape in samples.items():
        volume = read_nifti(shared_dir / "ct_samples" / f"{name}_ct.nii.gz")
        mask = read_nifti_mask(shared_dir / "ct_samples" / f"{name}_seg_v2.nii.gz")
        check_same_grid(volume, mask)
        assert volume.array.shape == shape
        # Anatomy, with v2 labels: right is at small width, the back at large height, the head at large depth.
        labels = {label: np.argwhere(mask.array == label).mean(axis=0) for label in np.unique(mask.array)[1:]}
        if name.startswith("abdomen"):
            liver, spleen, back_muscle, lung, colon = (labels[label] for label in (5, 1, 86, 14, 20))
            assert liver[2] < spleen[2] and liver[1] < back_muscle[1] and colon[0] < lung[0]
        else:
            left_lung, right_lung, heart, aorta = (labels[label] for label in (10, 12, 51, 52))
            assert right_lung[2] < left_lung[2] and heart[0] < aorta[0] and heart[1] < aorta[1]
