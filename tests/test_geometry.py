"""Geometry against slow, obvious versions, scipy, SimpleITK and the published preprocessing."""

from itertools import permutations, product

import nibabel
import numpy as np
import pytest
import SimpleITK
from scipy import ndimage

from modeling_fvlm.geometry import (
    AIR_HU,
    BadVolumeError,
    crop_inside,
    crop_or_pad,
    crop_start,
    oblique_note,
    organ_bookkeeping,
    organ_box,
    organ_is_complete,
    organ_token_mask,
    organ_voxels,
    organ_window,
    organs_in_crop,
    orient_to_lps,
    resample_mask,
    resample_volume,
    resampled_shape,
    resampled_spacing,
    window_volume,
)

SPACING = (3.0, 0.8, 1.25)  # no two alike: a swapped axis fails


def random_volume(shape=(5, 7, 9), seed=0):
    return np.random.default_rng(seed).integers(-1000, 1500, shape).astype(np.int16)


def sparse_mask(shape, num_organs, seed, density=0.1):
    generator = np.random.default_rng(seed)
    mask = generator.integers(0, num_organs + 1, shape).astype(np.uint8)
    mask[generator.random(shape) > density] = 0
    return mask


def lps_affine(spacing=SPACING, origin=(11.0, -7.0, 30.0)):
    """(depth, height, width) indices to RAS+ mm for a straight LPS array."""
    affine = np.zeros((4, 4))
    affine[2, 0], affine[1, 1], affine[0, 2] = spacing[0], -spacing[1], -spacing[2]
    affine[:3, 3], affine[3, 3] = origin, 1
    return affine


def stored(array, affine, order, flips):
    """The same scan as another writer would store it: axes in `order`, those in `flips` reversed."""
    turned, matrix = array.transpose(order), affine[:, [*order, 3]].copy()
    for axis in range(3):
        if flips[axis]:
            turned = np.flip(turned, axis)
            matrix[:3, 3] += matrix[:3, axis] * (turned.shape[axis] - 1)
            matrix[:3, axis] *= -1
    return turned, matrix


# Orientation

ALL_48 = list(product(permutations(range(3)), product((False, True), repeat=3)))


@pytest.mark.parametrize(("order", "flips"), ALL_48)
def test_every_orientation_gives_the_same_lps_array(order, flips):
    volume, affine = random_volume(), lps_affine()
    array, matrix = stored(volume, affine, order, flips)
    turned, spacing, new_affine = orient_to_lps(array, matrix)
    assert np.array_equal(turned, volume)
    assert spacing == pytest.approx(SPACING)
    np.testing.assert_allclose(new_affine, affine, atol=1e-9)
    assert np.shares_memory(turned, array), "turning is free: nothing is copied"


def test_axes_point_left_posterior_and_superior():
    """In words, independent of the helper above: RAS+ voxel (i, j, k) = (right, anterior, superior)."""
    array = np.zeros((4, 5, 6), dtype=np.int16)  # x, y, z
    array[0, 4, 5] = 7  # leftmost, most anterior, highest
    turned, spacing, _ = orient_to_lps(array, np.diag([1.0, 2.0, 3.0, 1.0]))
    assert turned.shape == (6, 5, 4) and spacing == (3.0, 2.0, 1.0)
    assert turned[5, 0, 3] == 7  # top, front, the left end of an axis that grows to the left


@pytest.mark.parametrize("degrees", [5, 15, -15])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_small_rotation_goes_to_the_closest_axes(axis, degrees):
    angle = np.radians(degrees)
    first, second = [other for other in range(3) if other != axis]
    rotation = np.eye(4)
    rotation[[first, second, first, second], [first, second, second, first]] = (
        *(np.cos(angle), np.cos(angle)),
        *(-np.sin(angle), np.sin(angle)),
    )
    volume = random_volume()
    array, matrix = stored(volume, lps_affine(), (2, 0, 1), (True, False, True))
    turned, spacing, new_affine = orient_to_lps(array, rotation @ matrix)
    assert np.array_equal(turned, volume)
    assert spacing == pytest.approx(SPACING)
    np.testing.assert_allclose(new_affine, rotation @ lps_affine(), atol=1e-9)


@pytest.mark.parametrize("plane", [(0, 1), (1, 2), (0, 2)])
def test_a_large_rotation_is_told(plane):
    first, second = plane
    for degrees in (-30, 19, 21, 44):
        angle, rotation = np.radians(degrees), np.eye(4)
        rotation[first, first] = rotation[second, second] = np.cos(angle)
        rotation[first, second], rotation[second, first] = -np.sin(angle), np.sin(angle)
        for order, flips in (((0, 1, 2), (False, False, False)), ((2, 0, 1), (True, False, True))):
            array, matrix = stored(random_volume(), lps_affine(), order, flips)
            note = oblique_note(orient_to_lps(array, rotation @ matrix)[2])
            told = f"turned by {abs(degrees)} degrees"
            assert (note is None) == (degrees == 19) and (note is None or told in note), (degrees, note)


def test_the_turned_affine_leads_every_voxel_to_its_old_place():
    array, matrix = stored(random_volume((3, 4, 5)), lps_affine(), (1, 2, 0), (True, True, False))
    array = np.arange(array.size).reshape(array.shape)  # every voxel its own value
    turned, _, new_affine = orient_to_lps(array, matrix)
    for index in np.ndindex(array.shape):
        place = np.argwhere(turned == array[index])[0]
        np.testing.assert_allclose(new_affine @ [*place, 1], matrix @ [*index, 1], atol=1e-9)


@pytest.mark.parametrize(
    ("shape", "affine", "message"),
    [
        ((4, 5), np.eye(4), "needs a 3-D array, got 2-D .*stack the slices"),
        ((4, 5, 6, 2), np.eye(4), "needs a 3-D array, got 4-D .*pick one"),
        ((4, 0, 6), np.eye(4), "array is empty"),
        ((4, 5, 6), np.diag([1.0, 0.0, 1.0, 1.0]), "zero spacing"),
        ((4, 5, 6), np.diag([1.0, np.nan, 1.0, 1.0]), "4 x 4 and finite"),
        ((4, 5, 6), np.eye(3), "4 x 4 and finite"),
        ((4, 5, 6), np.array([[1, 0.1, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]), "sheared.*84.3 degrees"),
        ((4, 5, 6), np.array([[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]), "sheared"),  # singular
    ],
)
def test_unusable_arrays_and_affines_are_refused(shape, affine, message):
    with pytest.raises(BadVolumeError, match=message):
        orient_to_lps(np.zeros(shape, dtype=np.int16), affine)


def test_rounded_headers_are_no_shear():
    rotation = np.array([[0.998, 0.063, 0, 0], [-0.063, 0.998, 0, 0], [0, 0, 2.5, 0], [0, 0, 0, 1]])  # three decimals
    orient_to_lps(random_volume(), rotation)


# Resampling


def slow_resample(volume, spacing, new_spacing):
    """One output voxel at a time, from the definition: cells keep the extent, eight neighbours, float64."""
    new_shape = resampled_shape(volume.shape, spacing, new_spacing)
    output = np.empty(new_shape)
    for index in np.ndindex(*new_shape):
        position = [(i + 0.5) * size / new - 0.5 for i, size, new in zip(index, volume.shape, new_shape)]
        total = 0.0
        for corner in product((0, 1), repeat=3):
            weight, place = 1.0, []
            for value, step, size in zip(position, corner, volume.shape):
                lower = int(np.floor(value))
                fraction = value - lower
                weight *= fraction if step else 1 - fraction
                place.append(min(max(lower + step, 0), size - 1))
            total += weight * volume[tuple(place)]
        output[index] = total
    return output


def slow_nearest(mask, new_shape):
    output = np.empty(new_shape, dtype=np.uint8)
    for index in np.ndindex(*new_shape):
        output[index] = mask[tuple(int((i + 0.5) * size / new) for i, size, new in zip(index, mask.shape, new_shape))]
    return output


NEW_SPACINGS = [(3.0, 1.0, 1.0), (1.3, 0.8, 2.0), (6.0, 2.0, 0.7), (3.0, 0.8, 1.0), (50.0, 50.0, 50.0)]


@pytest.mark.parametrize("new_spacing", NEW_SPACINGS)
def test_resampling_equals_the_slow_version(new_spacing):
    volume = random_volume((6, 9, 8))
    output = resample_volume(volume, SPACING, new_spacing)
    assert output.dtype == np.int16 and output.shape == resampled_shape(volume.shape, SPACING, new_spacing)
    assert np.abs(output - slow_resample(volume, SPACING, new_spacing)).max() < 0.5 + 1e-3  # rounding alone
    mask = sparse_mask((6, 9, 8), 5, seed=1, density=0.5)
    nearest = resample_mask(mask, SPACING, new_spacing)
    assert nearest.dtype == np.uint8
    assert np.array_equal(nearest, slow_nearest(mask, output.shape))


@pytest.mark.parametrize("new_spacing", NEW_SPACINGS)
@pytest.mark.parametrize("seed", range(4))
def test_a_box_before_resampling_equals_cropping_afterwards(new_spacing, seed):
    generator = np.random.default_rng(seed)
    volume, mask = random_volume((11, 14, 13), seed), sparse_mask((11, 14, 13), 3, seed, 0.5)
    for array, resample in ((volume, resample_volume), (mask, resample_mask)):
        array = np.flip(array, 1)  # views with negative strides come from orientation
        whole = resample(array, SPACING, new_spacing)
        starts = [int(generator.integers(0, size)) for size in whole.shape]
        stops = [int(generator.integers(start + 1, size + 1)) for start, size in zip(starts, whole.shape)]
        box = tuple(slice(start, stop) for start, stop in zip(starts, stops))
        part = resample(array, SPACING, new_spacing, box)
        assert part.size and np.array_equal(part, whole[box])


def test_resampling_equals_scipy_and_simpleitk():
    # Smooth, so that the rounding of positions cannot matter; SimpleITK has no voxels beyond the outer centres.
    volume = np.round(ndimage.gaussian_filter(random_volume((12, 15, 17)).astype(float), 1.5)).astype(np.int16)
    new_spacing = (2.0, 1.0, 1.0)
    output = resample_volume(volume, SPACING, new_spacing)
    steps = [size / new for size, new in zip(volume.shape, output.shape)]
    grid = np.meshgrid(*[(np.arange(n) + 0.5) * s - 0.5 for n, s in zip(output.shape, steps)], indexing="ij")
    expected = ndimage.map_coordinates(volume.astype(float), grid, order=1, mode="nearest")
    assert np.abs(output - expected).max() < 0.501

    image = SimpleITK.GetImageFromArray(volume.astype(np.float64))
    image.SetSpacing(SPACING[::-1])
    exact = resampled_spacing(volume.shape, SPACING, new_spacing)
    filter_ = SimpleITK.ResampleImageFilter()
    filter_.SetSize(output.shape[::-1])
    filter_.SetOutputSpacing(exact[::-1])
    filter_.SetOutputOrigin([(new - old) / 2 for new, old in zip(exact[::-1], SPACING[::-1])])  # outer faces agree
    filter_.SetDefaultPixelValue(-9999)
    reference = SimpleITK.GetArrayFromImage(filter_.Execute(image))
    inside = reference != -9999
    assert inside.mean() > 0.6
    assert np.abs(output - reference)[inside].max() < 0.501


def test_unchanged_spacing_is_a_copy():
    volume = random_volume()
    output = resample_volume(volume, SPACING, SPACING)
    assert np.array_equal(output, volume) and not np.shares_memory(output, volume)
    box = (slice(1, 4), slice(2, 7), slice(0, 5))
    assert np.array_equal(resample_volume(volume, SPACING, SPACING, box), volume[box])
    assert np.array_equal(resample_mask(volume.astype(np.uint8), SPACING, SPACING, box), volume.astype(np.uint8)[box])


def test_extreme_hu_are_neither_wrapped_nor_clipped():
    volume = np.full((4, 4, 4), 32767, dtype=np.int16)
    volume[:2] = -32768
    output = resample_volume(volume, (1, 1, 1), (0.5, 1, 1))
    assert output.min() == -32768 and output.max() == 32767
    assert (np.diff(output[:, 0, 0].astype(int)) >= 0).all()


def test_resampled_shape_forgives_float32_headers_and_keeps_the_extent():
    assert resampled_shape((120, 3, 1), (1.4999999, 0.3, 0.2), (1.0, 1.0, 1.0)) == (180, 1, 1)
    assert resampled_shape((122, 101, 30), (1.6, 1.6, 3.4), (1.0, 1.0, 3.0)) == (195, 161, 34)
    shape, spacing, new = (10, 11, 12), (3.0, 0.7, 0.9), (2.0, 1.0, 1.0)
    exact = resampled_spacing(shape, spacing, new)
    for size, old, new_size, value in zip(shape, spacing, resampled_shape(shape, spacing, new), exact):
        assert size * old == pytest.approx(new_size * value)


@pytest.mark.parametrize("spacing", [(0.0, 1.0, 1.0), (1.0, -1.0, 1.0), (1.0, 1.0), (np.nan, 1.0, 1.0)])
def test_impossible_spacing_is_refused(spacing):
    with pytest.raises(BadVolumeError, match="spacing must be three positive numbers in mm"):
        resample_volume(random_volume(), spacing, (1.0, 1.0, 1.0))


def test_a_box_outside_the_grid_is_refused():
    with pytest.raises(ValueError, match="box height .* does not lie within the 7 voxels"):
        resample_volume(random_volume(), SPACING, SPACING, (slice(0, 5), slice(0, 8), slice(0, 9)))


def test_resampling_equals_the_published_output(shared_dir):
    """Sample 1 of the released preprocessing; samples 2 and 3 show its faults (swapped x and y, |diag| spacing)."""
    folder = shared_dir / "golden" / "preprocess"
    name = "train_1/train_1_a/train_1_a_1.nii.gz"
    image = nibabel.load(folder / "train_fixed" / name)
    volume, spacing, _ = orient_to_lps(np.asarray(image.dataobj), image.affine)
    published = np.asarray(nibabel.load(folder / "resized_train_images" / name).dataobj).T
    output = resample_volume(volume, spacing, (3.0, 1.0, 1.0))
    assert output.shape == published.shape
    # float32 positions of the published resize: 0.005 HU beside our rounding.
    assert np.abs(output - published).max() < 0.51


# Boxes and crops


@pytest.mark.parametrize("margin", [(0, 0, 0), (1, 2, 3), (99, 99, 99)])
@pytest.mark.parametrize("seed", range(10))
def test_box_keeps_all_organs_and_stays_inside(seed, margin):
    mask = sparse_mask((6, 9, 13), 5, seed, density=0.01)
    mask[seed % 6, 0, -1] = 1  # always one voxel on the border
    box = organ_box(mask, margin)
    assert (mask[box] > 0).sum() == (mask > 0).sum()
    assert all(0 <= part.start < part.stop <= edge for part, edge in zip(box, mask.shape))
    tight = organ_box(mask)
    assert all(np.moveaxis(mask[tight], axis, 0)[face].any() for axis in range(3) for face in (0, -1))
    for part, inner, edge, voxels in zip(box, tight, mask.shape, margin):
        assert (part.start, part.stop) == (max(0, inner.start - voxels), min(edge, inner.stop + voxels))


def test_box_of_an_empty_mask_is_refused():
    with pytest.raises(BadVolumeError, match="no organ"):
        organ_box(np.zeros((3, 4, 5), dtype=np.uint8))


def slow_crop(array, start, size, value):
    output = np.full(size, value, dtype=array.dtype)
    for index in np.ndindex(*size):
        place = tuple(i + s for i, s in zip(index, start))
        if all(0 <= i < edge for i, edge in zip(place, array.shape)):
            output[index] = array[place]
    return output


@pytest.mark.parametrize("size", [(3, 4, 5), (8, 9, 12), (3, 12, 9), (5, 7, 9)])
@pytest.mark.parametrize("mode", ["middle", "center", "random"])
def test_crop_equals_the_slow_version_and_loses_nothing(size, mode):
    volume = random_volume()
    generator = np.random.default_rng(3) if mode == "random" else None
    start = crop_start(volume.shape, size, center=(4, 0, 8) if mode == "center" else None, generator=generator)
    crop = crop_or_pad(volume, start, size, AIR_HU)
    assert crop.shape == size and crop.dtype == volume.dtype
    assert np.array_equal(crop, slow_crop(volume, start, size, AIR_HU))
    for first, edge, extent in zip(start, size, volume.shape):
        if edge <= extent:
            assert 0 <= first <= extent - edge, "no padding where the scan is large enough"
        else:
            before, after = -first, first + edge - extent
            assert 0 <= after - before <= 1, "the scan stands in the middle"
    inside = crop_inside(volume.shape, start, size)
    assert (crop != AIR_HU).sum() == (volume[inside] != AIR_HU).sum()
    crop[...] = 0
    assert volume.any(), "the crop is a copy"


def test_crop_is_centred_on_the_wanted_voxel():
    start = crop_start((50, 60, 70), (10, 11, 12), center=(25, 30, 35))
    assert start == (20, 25, 29)
    assert crop_start((50, 60, 70), (10, 11, 12), center=(1, 59, 35)) == (0, 49, 29)
    assert crop_start((50, 60, 70), (10, 11, 12)) == (20, 24, 29)


def test_random_crops_reach_every_place_and_repeat_with_their_seed():
    def draw(seed, times=200):
        generator = np.random.default_rng(seed)
        return [crop_start((6, 5, 9), (4, 5, 4), generator=generator) for _ in range(times)]

    starts = draw(0)
    assert starts == draw(0) != draw(1)
    assert {start[0] for start in starts} == {0, 1, 2}
    assert {start[1] for start in starts} == {0}
    assert {start[2] for start in starts} == set(range(6))


def test_a_crop_beside_the_array_is_refused():
    with pytest.raises(ValueError, match="crop lies outside the array: depth"):
        crop_or_pad(random_volume(), (9, 0, 0), (2, 2, 2), 0)


def test_channels_are_kept_by_a_crop():
    stacked = np.stack([random_volume(), random_volume(seed=1)])
    crop = crop_or_pad(stacked, (-1, 2, 0), (7, 4, 9), 0)
    assert crop.shape == (2, 7, 4, 9)
    assert all(np.array_equal(crop[i], slow_crop(stacked[i], (-1, 2, 0), (7, 4, 9), 0)) for i in range(2))


def test_organ_window_shows_the_organ_whole_and_central():
    generator = np.random.default_rng(0)
    size, patch_size = (8, 16, 24), (4, 8, 8)
    seen = set()
    for _ in range(300):
        shape = tuple(int(generator.integers(edge // 2, 2 * edge + 5)) for edge in size)
        starts = [int(generator.integers(0, edge)) for edge in shape]
        box = tuple(slice(s, int(generator.integers(s + 1, edge + 1))) for s, edge in zip(starts, shape))
        window, padded = organ_window(box, shape, size, patch_size)
        for part, roi, extent, wanted, total, patch in zip(window, box, shape, size, padded, patch_size):
            length = part.stop - part.start
            assert length == min(extent, max(wanted, roi.stop - roi.start))
            assert 0 <= part.start <= roi.start and roi.stop <= part.stop <= extent, "an organ is seen whole"
            off_centre = (roi.start + roi.stop) / 2 - (part.start + part.stop) / 2
            assert abs(off_centre) <= 0.5 or part.start == 0 or part.stop == extent, "moved only by the border"
            assert total % patch == 0 and max(length, wanted) <= total < max(length, wanted) + patch
            seen.update({"longer"} if length > wanted else {"shorter"} if length < wanted else {"equal"})
    assert seen == {"longer", "shorter", "equal"}


# What the network reads


def test_windows_become_channels():
    volume = np.array([[[-2000, -1150, -400, 350, 4000]]], dtype=np.int16)
    windows = [
        {"hu_min": -1150.0, "hu_max": 350.0, "mean": 0.0, "std": 1.0},
        {"hu_min": -400, "hu_max": 350, "mean": 0.25, "std": 0.5},
    ]
    output = window_volume(volume, windows)
    assert output.dtype == np.float32 and output.shape == (2, 1, 1, 5)
    np.testing.assert_allclose(output[0, 0, 0], [0, 0, 0.5, 1, 1], rtol=1e-6)
    np.testing.assert_allclose(output[1, 0, 0], [-0.5, -0.5, -0.5, 1.5, 1.5], rtol=1e-6)
    assert volume.tolist() == [[[-2000, -1150, -400, 350, 4000]]]
    with pytest.raises(ValueError, match="hu_min must lie below hu_max"):
        window_volume(volume, [{"hu_min": 3, "hu_max": 3, "mean": 0, "std": 1}])


def slow_organ_token_mask(mask, num_organs, patch_size):
    """Visit every patch and look for every organ in it: slow, and hard to get wrong."""
    starts = product(*(range(0, size, patch) for size, patch in zip(mask.shape, patch_size)))
    patches = [mask[tuple(slice(s, s + patch) for s, patch in zip(start, patch_size))] for start in starts]
    return np.array([[bool((patch == organ + 1).any()) for patch in patches] for organ in range(num_organs)])


@pytest.mark.parametrize("num_organs", [1, 4, 9, 24, 40, 64])  # every word size
@pytest.mark.parametrize("patch_size", [(1, 1, 1), (2, 4, 8), (4, 2, 2)])
def test_token_mask_equals_a_walk_over_patches(patch_size, num_organs):
    mask = sparse_mask((4, 12, 32), num_organs, seed=num_organs, density=0.05)
    mask[-1, -1, -1] = num_organs  # the highest bit is used
    expected = slow_organ_token_mask(mask, num_organs, patch_size)
    assert expected.any() and not expected.all(), "an all-equal mask would compare nothing"
    result = organ_token_mask(mask, num_organs, patch_size)
    assert result.dtype == bool and np.array_equal(result, expected)


def test_token_mask_refuses_what_it_cannot_mean():
    mask = np.zeros((4, 8, 8), dtype=np.uint8)
    with pytest.raises(ValueError, match="mask height 8 is not a multiple of patch 3; pad it to 9"):
        organ_token_mask(mask, 4, (2, 3, 4))
    mask[0, 0, 0] = 5
    with pytest.raises(ValueError, match=r"labels 0\.\.5; with 4 organs they end at 4.*organ_label_table"):
        organ_token_mask(mask, 4, (2, 4, 4))
    with pytest.raises(ValueError, match="one scan at a time"):
        organ_token_mask(mask[None], 5, (2, 4, 4))
    with pytest.raises(ValueError, match="labels -1"):
        organ_token_mask(mask.astype(np.int16) - 1, 5, (2, 4, 4))
    with pytest.raises(ValueError, match="whole numbers, got float32; convert it to uint8"):
        organ_token_mask(mask.astype(np.float32), 5, (2, 4, 4))
    with pytest.raises(ValueError, match="within 1..64"):
        organ_token_mask(mask, 65, (2, 4, 4))


@pytest.mark.parametrize("num_organs", [4, 40])
def test_token_mask_of_views_and_other_integer_types(num_organs):
    mask = sparse_mask((4, 12, 32), num_organs, seed=1, density=0.05)
    mask[0, 0, 0] = num_organs
    expected = slow_organ_token_mask(mask, num_organs, (2, 4, 8))
    for dtype in (np.int8, np.uint16, np.int64):
        assert np.array_equal(organ_token_mask(mask.astype(dtype), num_organs, (2, 4, 8)), expected)
    for axes in [(0,), (1,), (2,), (0, 1, 2)]:
        flipped = np.flip(mask, axes)
        assert not flipped.flags.c_contiguous
        expected = slow_organ_token_mask(np.ascontiguousarray(flipped), num_organs, (2, 4, 8))
        assert np.array_equal(organ_token_mask(flipped, num_organs, (2, 4, 8)), expected)
    every_second = np.repeat(mask, 2, axis=2)[..., ::2]
    expected = slow_organ_token_mask(mask, num_organs, (2, 4, 8))
    assert np.array_equal(organ_token_mask(every_second, num_organs, (2, 4, 8)), expected)


def slow_is_complete(mask, num_organs, min_voxels):
    result = []
    for organ in range(num_organs):
        places = np.argwhere(mask == organ + 1)
        on_face = [any(i in (0, edge - 1) for i, edge in zip(place, mask.shape)) for place in places]
        result.append(len(places) >= min_voxels and not any(on_face))
    return np.array(result)


@pytest.mark.parametrize("min_voxels", [1, 4])
@pytest.mark.parametrize("seed", range(8))
def test_completeness_equals_the_slow_version(seed, min_voxels):
    num_organs = 30
    mask = np.zeros((8, 12, 13), dtype=np.uint8)
    mask[1:-1, 1:-1, 1:-1] = sparse_mask((6, 10, 11), num_organs, seed, density=0.2)
    cut = np.random.default_rng(seed).integers(0, 13, 4)  # four organs also lie on a face
    mask[:4, 0, 0], mask[-1, 3, cut], mask[2, cut % 12, -1] = cut, cut + 1, cut + 2
    expected = slow_is_complete(mask, num_organs, min_voxels)
    assert expected.any() and not expected.all()
    assert np.array_equal(organ_is_complete(mask, num_organs, min_voxels), expected)
    assert organ_voxels(mask, num_organs).tolist() == [int((mask == organ + 1).sum()) for organ in range(num_organs)]


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("face", [0, -1])
def test_each_face_cuts(axis, face):
    mask = np.zeros((5, 6, 7), dtype=np.uint8)
    mask[2:4, 2:4, 2:4] = 1
    assert organ_is_complete(mask, 2).tolist() == [True, False]  # the second is absent
    np.moveaxis(mask, axis, 0)[face][3, 3] = 1
    assert organ_is_complete(mask, 2).tolist() == [False, False]


def test_organs_in_a_crop():
    """Organ 1: two kidneys, one outside the crop. Organ 2: cut by the scan. Organ 3: whole in the crop."""
    mask = np.zeros((6, 8, 20), dtype=np.uint8)
    mask[2:4, 2:4, 2:4] = mask[2:4, 2:4, 14:16] = 1
    mask[0, 3:5, 4:6] = 2
    mask[3:5, 5:7, 5:8] = 3
    size = (10, 8, 10)  # padded in depth: the padding must not hide that the scan cuts organ 2
    start = crop_start(mask.shape, size, center=(3, 4, 5))
    inside = crop_inside(mask.shape, start, size)
    assert organs_in_crop(mask, inside, 4).tolist() == [False, False, True, False]
    assert organ_is_complete(crop_or_pad(mask, start, size, 0), 4).tolist() == [True, True, True, False]
    whole = crop_inside(mask.shape, (0, 0, 0), mask.shape)
    assert organs_in_crop(mask, whole, 4).tolist() == [True, False, True, False]
    assert organs_in_crop(mask, whole, 4, min_voxels=13).tolist() == [True, False, False, False]
    assert organs_in_crop(mask, inside, 4, "min_voxels", 5).tolist() == [True, False, True, False]


def slow_in_crop(mask, start, size, organ_id, completeness, min_voxels):
    """Walk over the organ's voxels."""
    places = np.argwhere(mask == organ_id)
    low = [max(0, first) for first in start]
    high = [min(extent, first + edge) for extent, first, edge in zip(mask.shape, start, size)]
    is_inside = [all(a <= i < b for a, i, b in zip(low, place, high)) for place in places]
    on_face = [any(i in (a, b - 1) for a, i, b in zip(low, place, high)) for place in places]
    is_enough = sum(is_inside) >= max(1, min_voxels)
    return is_enough and (completeness == "min_voxels" or (all(is_inside) and not any(on_face)))


@pytest.mark.parametrize("min_voxels", [1, 3])
@pytest.mark.parametrize("num_organs", [3, 8, 9, 16, 17, 24, 33, 64])  # both sides of every word size
@pytest.mark.parametrize("shape", [(8, 12, 24), (12, 16, 40), (5, 12, 30)])  # as the crop, larger, shorter in depth
def test_bookkeeping_equals_a_walk_over_voxels(shape, num_organs, min_voxels):
    size, patch_size = (8, 12, 24), (2, 4, 8)
    generator = np.random.default_rng(num_organs)
    outcomes = set()
    for _ in range(3):
        mask = np.zeros(shape, np.uint8)
        for organ_id in range(1, num_organs + 1):  # 1 to 8 voxels each; some on faces, some across the crop's border
            low = [int(generator.integers(0, edge)) for edge in shape]
            mask[tuple(slice(i, i + int(generator.integers(1, 3))) for i in low)] = organ_id
        mask[generator.random(shape) < 0.001] = num_organs
        start = crop_start(shape, size, generator=generator)
        crop = slow_crop(mask, start, size, 0)
        for completeness in ("border", "min_voxels"):
            tokens, is_whole = organ_bookkeeping(
                mask, start, size, num_organs, patch_size, completeness=completeness, min_voxels=min_voxels
            )
            assert np.array_equal(tokens, slow_organ_token_mask(crop, num_organs, patch_size))
            expected = [
                slow_in_crop(mask, start, size, organ_id, completeness, min_voxels)
                for organ_id in range(1, num_organs + 1)
            ]
            assert is_whole.dtype == bool and is_whole.tolist() == expected
            inside = crop_inside(shape, start, size)
            assert organs_in_crop(mask, inside, num_organs, completeness, min_voxels).tolist() == expected
            outcomes |= {(completeness, outcome) for outcome in expected}
    # Nothing but whole organs, or none, would compare nothing (three organs are too few to ask it of).
    assert num_organs < 8 or {("border", False), ("border", True), ("min_voxels", True)} <= outcomes


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("place", [0, -1])
def test_one_voxel_beyond_any_side_of_the_crop_takes_an_organ_out(axis, place):
    mask = np.zeros((8, 10, 12), np.uint8)
    mask[3:5, 4:6, 5:7], mask[3:5, 4:6, 7:9] = 1, 2
    corner = [4, 5, 6]
    corner[axis] = place
    mask[tuple(corner)] = 1
    assert organ_bookkeeping(mask, (2, 2, 2), (4, 6, 8), 2, (2, 2, 2))[1].tolist() == [False, True]


def test_micrometres_for_millimetres_are_refused_before_memory_is_taken():
    with pytest.raises(BadVolumeError, match=r"44\.8 m long: \(64, 64, 32\) voxels of \[700\.0, .*micrometres"):
        orient_to_lps(np.zeros((64, 64, 32), np.int16), np.diag([700.0, 700.0, 1000.0, 1.0]))
    with pytest.raises(BadVolumeError, match="finer than any CT's.*in metres"):
        orient_to_lps(np.zeros((64, 64, 32), np.int16), np.diag([0.0007, 0.0007, 0.001, 1.0]))
