"""Whether values are HU already, told from the voxels: scans as releases store them, and as they go wrong."""

import re

import nibabel
import numpy as np
import pytest
from scipy import ndimage

from modeling_fvlm.hounsfield import SAMPLES_PER_AXIS, choose_rescale, looks_like_hu, sample_voxels, wrong_hu
from modeling_fvlm.reading import BadVolumeError, read_nifti, read_volume, volume_from_array

AFFINE = np.diag([-2.0, -2.0, 3.0, 1.0])
DECLARED = [(1.0, -1024.0), (1.0, -8192.0)]


def body(noise=20, radius=0.8, seed=0) -> np.ndarray:
    """HU of a chest: a cylinder of fat and muscle with two lungs and a spine, in air; (x, y, z)."""
    generator = np.random.default_rng(seed)
    x, y, z = np.meshgrid(np.linspace(-1, 1, 60), np.linspace(-1, 1, 50), np.linspace(-1, 1, 30), indexing="ij")
    hu = np.full(x.shape, -1000.0)
    hu[x**2 + y**2 < radius**2] = -100
    hu[x**2 + y**2 < (0.9 * radius) ** 2] = 45
    for side in (-1, 1):
        hu[((x - side * 0.4 * radius) / 0.3) ** 2 + (y / 0.5) ** 2 < radius**2] = -850
    hu[x**2 + (y - 0.6 * radius) ** 2 < (0.15 * radius) ** 2] = 450
    return np.rint(hu + generator.normal(0, noise, hu.shape)).astype(np.int16)


def padded(hu: np.ndarray, value: int, is_smooth: bool = False) -> np.ndarray:
    """A round field of view with `value` outside of it; smooth: as interpolation leaves its border."""
    x, y = np.meshgrid(*(np.linspace(-1, 1, size) for size in hu.shape[:2]), indexing="ij")
    outside = np.broadcast_to((x**2 + y**2 > 1)[..., None], hu.shape)
    if not is_smooth:
        return np.where(outside, value, hu).astype(np.int16)
    share = ndimage.uniform_filter(outside.astype(np.float32), (2, 2, 1))
    return np.rint(share * value + (1 - share) * hu).astype(np.int16)


MADE_UP = {
    "chest": lambda: body(),
    "sharp kernel": lambda: body(noise=90),
    "noise-free": lambda: body(noise=0),
    "clipped air": lambda: np.maximum(body(noise=60), -1024),
    "child in a large field": lambda: body(radius=0.42),
    "padding -2000": lambda: padded(body(), -2000),
    "padding -2048": lambda: padded(body(), -2048),
    "padding -3024": lambda: padded(body(), -3024),
    "padding -8192": lambda: padded(body(), -8192),
    "interpolated padding": lambda: padded(body(), -3024, is_smooth=True),
}
REAL = ("chest_cta", "abdomen_pelvis", "abdomen_slab")
TIGHT = "abdomen without air"


@pytest.fixture(params=[*MADE_UP, *REAL, TIGHT])
def hu(request) -> np.ndarray:
    """int16 HU (x, y, z)."""
    if request.param in MADE_UP:
        return MADE_UP[request.param]()
    folder = request.getfixturevalue("shared_dir") / "ct_samples"
    name = request.param if request.param in REAL else "abdomen_pelvis"
    values = np.asarray(nibabel.load(folder / f"{name}_ct.nii.gz").dataobj).astype(np.int16)
    if request.param == TIGHT:
        # The right flank and back: liver, kidney, muscle, fat and bone, with no gas in them.
        labels = np.asarray(nibabel.load(folder / "abdomen_pelvis_seg_v2.nii.gz").dataobj)
        inside = np.argwhere(np.isin(labels, (2, 5)))
        (x0, y0, z0), (x1, y1, z1) = np.percentile(inside, 25, axis=0), np.percentile(inside, 75, axis=0)
        values = values[int(x0) : int(x1), int(y0) : int(y1), int(z0) : int(z1)]
        values = np.maximum(values, -150)
        assert values.size > 1000 and np.mean(np.abs(values) < 200) > 0.9
    return values


def has_gas(hu) -> bool:
    return np.mean(hu < -500) > 0.02


@pytest.mark.parametrize("declared", DECLARED)
def test_a_second_rescale_is_refused_with_its_reason(hu, declared):
    volume = volume_from_array(hu, AFFINE, "ct", declared, "auto")
    assert np.array_equal(volume.array, volume_from_array(hu, AFFINE).array)
    assert len([note for note in volume.notes if "refused" in note]) == 1
    note = volume.notes[0]
    assert f"HU already, so the declared rescale (slope 1, intercept {declared[1]:g}) was refused" in note
    assert "voxels lie within 200 HU of water" in note


@pytest.mark.parametrize(("declared", "dtype"), [*((d, "int16") for d in DECLARED), (DECLARED[0], "uint16")])
def test_a_rescale_that_is_due_is_applied(hu, declared, dtype):
    stored = hu - np.int64(declared[1])
    if dtype == "uint16":
        stored = np.clip(stored, 0, 4095)
    volume = volume_from_array(stored.astype(dtype), AFFINE, "ct", declared, "auto")
    expected = volume_from_array((stored + np.int64(declared[1])).astype(np.int16), AFFINE)
    assert np.array_equal(volume.array, expected.array)
    assert not any("rescale (" in note for note in volume.notes), "nothing to say of the rescale itself"


def test_values_that_were_never_rescaled_are_refused(hu):
    for shift in (1024, 8192):
        stored = np.maximum(hu + shift, 0)
        with pytest.raises(
            BadVolumeError, match=rf"ct: .*about {shift} above HU .*never applied.*rescale=\(1, -{shift}\)"
        ):
            volume_from_array(stored, AFFINE, "ct", rescale_mode="auto")
        assert any("never applied" in note for note in volume_from_array(stored, AFFINE).notes)


def test_values_that_were_rescaled_twice_are_refused_and_mended(hu):
    for shift in (1024, 8192):
        if not has_gas(hu):
            continue  # air alone in a large field of view looks the same
        with pytest.raises(BadVolumeError, match=rf"about {shift} below HU .*rescaled twice.*rescale=\(1, {shift}\)"):
            volume_from_array(hu - shift, AFFINE, "ct", rescale_mode="auto")
        with pytest.raises(BadVolumeError, match="rescaled twice"):  # a third time is no help
            volume_from_array(hu - 1024, AFFINE, "ct", (1.0, -1024.0), "auto")
        mended = volume_from_array(hu - shift, AFFINE, "ct", (1.0, float(shift)), "auto")
        assert np.array_equal(mended.array, volume_from_array(hu, AFFINE).array)


@pytest.mark.parametrize("name", ["chest", "clipped air", "padding -2000", "padding -2048", "padding -3024"])
def test_a_slope_that_was_applied_twice_is_refused_and_mended(name):
    hu = MADE_UP[name]()
    with pytest.raises(BadVolumeError, match=r"ct: the values are about twice the HU .*rescale=\(0.5, 0\)"):
        volume_from_array(2 * hu, AFFINE, "ct", rescale_mode="auto")
    mended = volume_from_array(2 * hu, AFFINE, "ct", (0.5, 0.0), "auto")
    assert np.array_equal(mended.array, volume_from_array(hu, AFFINE).array)


def test_true_hu_are_not_suspected(hu):
    volume = volume_from_array(hu, AFFINE, "ct", rescale_mode="auto")
    assert np.array_equal(np.sort(volume.array, axis=None), np.sort(hu, axis=None))
    assert all("padding" in note or "the lowest value is" in note for note in volume.notes)


@pytest.mark.parametrize("radius", [0.08, 0.2, 0.35])
@pytest.mark.parametrize("value", [-2000, -2048, -3024, -8192])
def test_a_small_body_among_padding_is_not_taken_for_one_rescaled_twice(value, radius):
    """0.3 to 6 % body: its air alone passes for a body that is 1024 too low, and the padding for that body's air."""
    for noise in (0, 20, 90):
        for is_smooth in (False, True):
            hu = padded(body(noise, radius), value, is_smooth)
            assert np.mean(np.abs(hu) <= 200) < 0.08, "a body large enough is known by itself"
            volume = volume_from_array(hu, AFFINE, "ct", rescale_mode="auto")
            assert np.array_equal(np.sort(volume.array, axis=None), np.sort(hu, axis=None))
            refused = volume_from_array(hu, AFFINE, "ct", (1.0, -1024.0), "auto")
            assert np.array_equal(refused.array, volume.array) and "was refused" in refused.notes[0]
            due = volume_from_array((hu + 1024).astype(np.int16), AFFINE, "ct", (1.0, -1024.0), "auto")
            assert np.array_equal(due.array, volume.array)


def test_a_lung_alone_is_not_taken_for_a_body_rescaled_twice():
    """What is outside the lung is set to one value, and hardly a voxel lies near water."""
    hu = body()
    for outside in (-1024, -2000, -3024):
        lung = np.where((hu > -950) & (hu < -700), hu, outside).astype(np.int16)
        assert wrong_hu(sample_voxels(lung)) is None


@pytest.mark.parametrize("value", [-2000, -2048, -3024, -8192])
def test_padding_is_noted_and_kept(value):
    hu = padded(body(), value)
    volume = volume_from_array(hu, AFFINE, "ct", rescale_mode="auto")
    assert volume.array.min() == value
    (note,) = volume.notes
    told = re.fullmatch(rf"(\d+)% of the voxels are padding of {value} HU around the scan; it is kept.", note)
    assert abs(int(told[1]) - 100 * np.mean(hu == value)) <= 2  # told of a sample
    assert volume_from_array(np.maximum(body(), -1024), AFFINE).notes == (), "clipped air is no padding"


def test_modes(caplog):
    hu = body()
    plain = volume_from_array(hu, AFFINE).array
    with caplog.at_level("WARNING"):
        applied = volume_from_array(hu, AFFINE, "ct", (1.0, -1024.0), "apply")
        skipped = volume_from_array(hu + 1024, AFFINE, "ct", (1.0, -1024.0), "skip")
        refused = volume_from_array(hu, AFFINE, "ct", (1.0, -1024.0), "auto")
    assert np.array_equal(applied.array, plain - 1024) and "rescaled twice" in applied.notes[0]
    assert np.array_equal(skipped.array, plain + 1024) and "was not applied, as was asked" in skipped.notes[0]
    assert "never applied" in skipped.notes[1]
    assert np.array_equal(refused.array, plain)
    messages = [record.getMessage() for record in caplog.records]
    assert messages == [f"ct: {note}" for volume in (applied, skipped, refused) for note in volume.notes]
    with pytest.raises(ValueError, match=r"rescale mode 'aply' is none of \['auto', 'apply', 'skip'\]"):
        read_volume("ct.nii", rescale_mode="aply")


def test_what_the_voxels_do_not_tell_follows_the_header():
    noise = np.random.default_rng(0).integers(0, 4096, (9, 10, 11)).astype(np.int16)
    volume = volume_from_array(noise, AFFINE, "ct", (1.0, -1024.0), "auto")
    assert volume.array.min() < -1000 and volume.array.max() > 3000
    assert volume.notes[0] == (
        "the voxels do not tell whether the declared rescale (slope 1, intercept -1024) is still due; it was applied."
    )


def test_a_rescale_that_changes_little_is_followed():
    hu = body()
    volume = volume_from_array(hu, AFFINE, "ct", (1.01, 3.0), "auto")
    assert np.array_equal(volume.array, np.rint(volume_from_array(hu, AFFINE).array * 1.01 + 3).astype(np.int16))
    assert volume.notes == ()


@pytest.mark.parametrize("value", [0, -1024, 1024])
def test_a_volume_of_one_value_is_refused(tmp_path, value):
    path = tmp_path / "ct.nii.gz"
    nibabel.save(nibabel.Nifti1Image(np.full((4, 5, 6), value, np.int16), AFFINE), path)
    with pytest.raises(BadVolumeError, match=f"ct.nii.gz: every voxel is {value}: there is no scan in it"):
        read_volume(path)
    assert f"every voxel is {value}" in read_volume(path, rescale_mode="apply").notes[0]


def test_headers_of_files_are_guarded(tmp_path):
    """A NIfTI whose scl_inter still stands though the voxels are HU, one where it is due, and one of another scale."""
    hu = body()
    expected = volume_from_array(hu, AFFINE).array
    for name, stored, slope, inter in (
        ("done", hu, 1, -1024),
        ("due", hu + 1024, 1, -1024),
        ("half", 2 * (hu.astype(np.int32) + 1024), 0.5, -1024),
    ):
        image = nibabel.Nifti1Image(stored.astype(np.int16), AFFINE)
        image.header.set_slope_inter(slope, inter)
        nibabel.save(image, tmp_path / f"{name}.nii.gz")
        volume = read_nifti(tmp_path / f"{name}.nii.gz")
        assert np.array_equal(volume.array, expected)
        assert ("refused" in "".join(volume.notes)) == (name == "done")
    # nibabel spreads floats over all of int16, with a slope and an intercept of its own.
    image = nibabel.Nifti1Image(hu.astype(np.float64) / 3, AFFINE)
    image.set_data_dtype(np.int16)
    nibabel.save(image, tmp_path / "spread.nii.gz")
    assert nibabel.load(tmp_path / "spread.nii.gz").dataobj.slope not in (None, 1.0)
    spread = read_nifti(tmp_path / "spread.nii.gz", rescale_mode="apply").array
    assert np.array_equal(read_nifti(tmp_path / "spread.nii.gz").array, spread)
    assert np.abs(spread - expected / 3).max() <= 1


def test_the_callers_rescale_is_guarded_like_the_headers(tmp_path):
    """CT-RATE's metadata declare -1024 or -8192 for volumes of which some have been rescaled."""
    hu = body()
    nibabel.save(nibabel.Nifti1Image(hu, None), tmp_path / "blank.nii.gz")
    volume = read_nifti(tmp_path / "blank.nii.gz", AFFINE, (1.0, -8192.0))
    assert np.array_equal(volume.array, volume_from_array(hu, AFFINE).array) and "refused" in volume.notes[0]
    volume = read_nifti(tmp_path / "blank.nii.gz", AFFINE, (1.0, -8192.0), rescale_mode="apply")
    assert volume.array.max() < -7000


def test_the_sample_is_small_and_spreads_over_the_scan():
    scan = np.broadcast_to(np.arange(1000, dtype=np.int16)[:, None, None], (1000, 513, 700))
    sample = sample_voxels(scan)
    assert sample.size <= SAMPLES_PER_AXIS**3 and sample.min() == 0 and sample.max() > 970
    assert sample_voxels(scan[:5, :6, :7]).size == 210, "a small scan is seen whole"
    with_nan = np.array([[[1.0, np.nan, np.inf]]])
    assert sample_voxels(with_nan).tolist() == [1.0]


def test_nothing_is_decided_without_voxels():
    assert not looks_like_hu(np.empty(0)) and not looks_like_hu(np.zeros(50) - 3000)
    assert wrong_hu(np.zeros(50)) is None and wrong_hu(np.zeros(50) - 3024) is None
    nan = np.full((3, 3, 3), np.nan)
    assert choose_rescale(nan, (1.0, -1024.0))[0] == (1.0, -1024.0)
    with pytest.raises(BadVolumeError, match="27 of 27 voxels are NaN"):
        volume_from_array(nan, AFFINE, "ct", (1.0, -1024.0), "auto")


@pytest.mark.parametrize("padding", [None, -2000, -2048])
def test_a_small_body_in_a_large_field_is_still_rescaled(padding):
    """Stored air (about 24) alone passes for a body; 4 % of the voxels are one."""
    generator = np.random.default_rng(0)
    stored = generator.normal(24, 20, (60, 100, 100))
    stored[:, 40:60, 40:60] = generator.normal(1064, 30, (60, 20, 20))
    if padding is not None:
        stored[:, :10] = padding
    rescale, note = choose_rescale(stored.astype(np.int16), (1.0, -1024.0))
    assert rescale == (1.0, -1024.0) and (note is None or "it was applied" in note)
