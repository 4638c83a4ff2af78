"""Read CT volumes and label maps from NIfTI files, checked and turned to LPS.

A volume leaves here as int16 HU and a mask as uint8 labels, both `(depth, height, width)` LPS with spacing in mm. What
cannot be used raises `BadVolumeError` with the file's name; what looks odd but may be meant is logged.
"""

import gzip
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from transformers.utils import logging

from .geometry import AXES, BadVolumeError, orient_to_lps

logger = logging.get_logger(__name__)

INFLATE_BYTES = 1 << 24
# Two grids are one if no corner voxel moves by more than this part of a voxel: headers round to a few decimals.
MAX_GRID_SHIFT_VOXELS = 0.25
# Air is about -1000 HU. A scan whose darkest voxel is above this was most likely never rescaled to HU.
MIN_HU_OF_AIR = -200
# Metal reaches 20000 HU on extended scales, padding outside the field of view -8192.
USUAL_HU = (-8192, 20000)


@dataclass
class Volume:
    """One array with its geometry.

    Attributes:
        array: int16 HU or uint8 labels `(depth, height, width)` LPS; may be a view with negative strides.
        spacing: Voxel size in mm along (depth, height, width).
        affine: 4 x 4, (depth, height, width) indices to mm in RAS+.
        name: What messages call it: a path, or the user's word.
    """

    array: np.ndarray
    spacing: tuple[float, float, float]
    affine: np.ndarray
    name: str = "volume"


def read_nifti(
    path: str | Path, affine: np.ndarray | None = None, rescale: tuple[float, float] | None = None
) -> Volume:
    """Read a CT volume.

    Args:
        path: `.nii` or `.nii.gz`.
        affine: Voxel-to-mm (RAS+) to use instead of the header's, for releases whose headers are blank.
        rescale: (slope, intercept) to use instead of the header's, for stored values that are no HU yet.

    Raises:
        FileNotFoundError: If there is no such file.
        BadVolumeError: If the file is no NIfTI, is cut short, is not 3-D, has NaN voxels or no usable geometry.
    """
    array, header_affine, header_rescale = _load(path, affine)
    return volume_from_array(array, header_affine, name=str(path), rescale=rescale or header_rescale)


def read_nifti_mask(path: str | Path, affine: np.ndarray | None = None) -> Volume:
    """Read a label map; labels must be whole numbers within 0..255. Otherwise as `read_nifti`."""
    array, header_affine, (slope, intercept) = _load(path, affine)
    if (slope, intercept) != (1.0, 0.0):
        array = array * slope + intercept
    return mask_from_array(array, header_affine, name=str(path))


def read_affine(path: str | Path) -> np.ndarray:
    """The affine of a NIfTI file's voxels as they are stored, for a mask that was made on the file's array."""
    return np.asarray(_open(Path(path)).affine)


def volume_from_array(
    array: np.ndarray,
    affine: np.ndarray,
    name: str = "volume",
    rescale: tuple[float, float] = (1.0, 0.0),
) -> Volume:
    """Make a `Volume` of int16 HU from an array in any orientation and its RAS+ affine (`np.diag` for plain axes).

    int16 input is not copied. Other types are rescaled, rounded and clipped to int16.
    """
    array = np.asanyarray(array)
    _check_is_real(array, name)
    turned, spacing, new_affine = _oriented(array, affine, name)
    turned = _as_hu(turned, rescale, name)
    low, high = int(turned.min()), int(turned.max())
    if low < USUAL_HU[0] or high > USUAL_HU[1]:
        logger.warning(f"{name}: values from {low} to {high} lie far outside a CT's HU; they are kept as they are.")
    if low > MIN_HU_OF_AIR:
        logger.warning(
            f"{name}: the lowest value is {low}, but air is near -1000 HU. The rescale slope and intercept were "
            "probably never applied; give rescale=(slope, intercept) or repair the file."
        )
    return Volume(turned, spacing, new_affine, name)


def mask_from_array(array: np.ndarray, affine: np.ndarray, name: str = "mask") -> Volume:
    """Make a `Volume` of uint8 labels from an array in any orientation and its RAS+ affine."""
    array = np.asanyarray(array)
    _check_is_real(array, name)
    if array.dtype == bool:
        array = array.view(np.uint8)
    turned, spacing, new_affine = _oriented(array, affine, name)
    if turned.dtype != np.uint8:
        _check_is_finite(turned, name)
        if turned.dtype.kind == "f" and (turned != np.rint(turned)).any():
            raise BadVolumeError(f"{name}: mask labels must be whole numbers; resample the mask by nearest neighbour.")
        if turned.min() < 0 or turned.max() > 255:
            raise BadVolumeError(f"{name}: mask labels must be within 0..255, got {turned.min()}..{turned.max()}.")
        turned = turned.astype(np.uint8)
    return Volume(turned, spacing, new_affine, name)


def check_same_grid(volume: Volume, mask: Volume, name: str | None = None) -> None:
    """Check that a volume and its mask, each turned by its own affine, lie on one grid.

    Raises:
        BadVolumeError: If shapes differ or a corner of the mask lies elsewhere in space, naming how far.
    """
    name = name or volume.name
    mend = "Resample the mask onto the volume's affine (nearest neighbour)."
    if volume.array.shape != mask.array.shape:
        raise BadVolumeError(
            f"{name}: volume {volume.array.shape} and mask {mask.array.shape} ({mask.name}) are not on one grid. {mend}"
        )
    last = np.array(volume.array.shape) - 1
    corners = np.array([[z, y, x, 1] for z in (0, last[0]) for y in (0, last[1]) for x in (0, last[2])], dtype=float)
    # The voxel indices of the volume at which the mask's corners lie.
    in_volume = corners @ mask.affine.T @ np.linalg.inv(volume.affine).T
    moved = np.abs(in_volume - corners)[:, :3].max(axis=0)
    if moved.max() > MAX_GRID_SHIFT_VOXELS:
        axis = int(moved.argmax())
        raise BadVolumeError(
            f"{name}: volume and mask ({mask.name}) are not on one grid: the shapes agree, but along {AXES[axis]} "
            f"they lie up to {moved[axis]:.1f} voxels apart (spacing {_rounded(volume.spacing)} and "
            f"{_rounded(mask.spacing)} mm). {mend}"
        )


def _load(path: str | Path, affine: np.ndarray | None) -> tuple[np.ndarray, np.ndarray, tuple[float, float]]:
    """Stored values as they are on disk, the affine, and (slope, intercept). Nothing is scaled or widened here."""
    path = Path(path)
    image = _open(path, needs_orientation=affine is None)
    if affine is None:
        affine = image.affine
    try:
        array = _inflate(path, image.dataobj) if path.suffix == ".gz" else image.dataobj.get_unscaled()
    except (EOFError, OSError, ValueError, zlib.error) as error:
        raise BadVolumeError(
            f"{path}: the voxels end early or are damaged ({_one_line(error)}). Fetch the file again."
        ) from error
    except (MemoryError, OverflowError) as error:
        raise BadVolumeError(
            f"{path}: the header tells of {image.shape} voxels of type {image.get_data_dtype()}, more than memory "
            "holds. If that is no size of a CT the header is damaged: fetch the file again."
        ) from error
    if array.ndim > 3 and all(size == 1 for size in array.shape[3:]):
        array = array.reshape(array.shape[:3], order="F")  # one volume stored as a series of one
    slope, intercept = image.dataobj.slope, image.dataobj.inter
    return array, affine, (1.0 if slope is None else float(slope), 0.0 if intercept is None else float(intercept))


def _inflate(path: Path, stored) -> np.ndarray:
    """The voxels of a .nii.gz, inflated into their array: one copy, and read to the end of the file.

    nibabel stops at the last voxel and so never sees the checksum behind it: a damaged stream that still inflates would
    pass for a scan.
    """
    array = np.empty(stored.shape, dtype=stored.dtype, order="F")
    content = memoryview(array.reshape(-1, order="F").view(np.uint8))
    with gzip.open(path) as file:
        file.seek(stored.offset)
        filled = 0
        while filled < len(content):
            count = file.readinto(content[filled : filled + INFLATE_BYTES])
            if not count:
                raise EOFError(f"{len(content) - filled} of {len(content)} bytes are missing")
            filled += count
        while file.read(INFLATE_BYTES):  # the checksum stands at the end
            pass
    return array


def _open(path: Path, needs_orientation: bool = True):
    """The nibabel image of a file: its header is read, its voxels are not."""
    import nibabel

    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file.")
    try:
        image = nibabel.load(path)
    except (nibabel.filebasedimages.ImageFileError, nibabel.spatialimages.HeaderDataError) as error:
        raise BadVolumeError(
            f"{path}: not a NIfTI file ({_one_line(error)}). Convert the series to .nii.gz first."
        ) from error
    except (EOFError, OSError, zlib.error) as error:
        raise BadVolumeError(f"{path}: cut short or damaged ({_one_line(error)}). Fetch the file again.") from error
    if not isinstance(image, nibabel.Nifti1Pair):
        raise BadVolumeError(f"{path}: a {type(image).__name__}, not a NIfTI file. Convert it to .nii.gz first.")
    if needs_orientation and not (image.header["sform_code"] or image.header["qform_code"]):
        raise BadVolumeError(
            f"{path}: the header holds no orientation (sform_code and qform_code are 0): left and right are unknown. "
            "Take the release with corrected headers (for CT-RATE: *_fixed), or give the affine."
        )
    return image


def _oriented(array: np.ndarray, affine: np.ndarray, name: str):
    try:
        return orient_to_lps(array, affine)
    except BadVolumeError as error:
        raise BadVolumeError(f"{name}: {error}") from error


def _check_is_real(array: np.ndarray, name: str) -> None:
    if array.dtype.kind not in "biuf":
        raise BadVolumeError(f"{name}: voxels are of type {array.dtype}, not numbers; colour images cannot be used.")


def _check_is_finite(array: np.ndarray, name: str) -> None:
    if array.dtype.kind != "f":
        return
    count = sum(int(plane.size - np.count_nonzero(np.isfinite(plane))) for plane in array)
    if count:
        raise BadVolumeError(
            f"{name}: {count} of {array.size} voxels are NaN or infinite. Set them to -1024 (air) if they lie outside "
            "the field of view, or export the series again."
        )


def _as_hu(array: np.ndarray, rescale: Sequence[float], name: str) -> np.ndarray:
    """int16 HU; slice by slice, so that no float copy of the whole scan is ever held."""
    slope, intercept = rescale
    if not (np.isfinite(slope) and np.isfinite(intercept)) or slope == 0:
        raise BadVolumeError(
            f"{name}: rescale slope {slope} and intercept {intercept} cannot be used; repair the header."
        )
    if array.dtype == np.int16 and (slope, intercept) == (1.0, 0.0):
        return array
    _check_is_finite(array, name)
    limits = np.iinfo(np.int16)
    output = np.empty(array.shape, dtype=np.int16)
    for target, plane in zip(output, array):
        # float64: in the released code int16 times a slope of 0.5 stays int16 and collapses to the intercept.
        target[...] = np.clip(np.rint(plane * np.float64(slope) + intercept), limits.min, limits.max)
    return output


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _rounded(values: Sequence[float]) -> tuple[float, ...]:
    return tuple(round(value, 3) for value in values)
