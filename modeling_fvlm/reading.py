"""Read CT volumes and label maps of any format, checked and turned to LPS.

A volume leaves here as int16 HU and a mask as uint8 labels, both `(depth, height, width)` LPS with spacing in mm. What
cannot be used raises `BadVolumeError` with the file's name; what looks odd but may be meant is logged, and stands in
the `notes` of the volume.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from .geometry import AXES, BadVolumeError, oblique_note, orient_to_lps
from .hounsfield import (
    RESCALE_MODES,
    check_rescale_mode,
    choose_rescale,
    how_to_rescale,
    padding,
    sample_voxels,
    wrong_hu,
)
from .image_files import StoredImage, file_kind, read_stored, read_stored_nifti, stored_affine

__all__ = [
    "RESCALE_MODES",
    "BadVolumeError",
    "Volume",
    "check_same_grid",
    "judge_hu",
    "mask_from_array",
    "notes_alone",
    "read_affine",
    "read_mask",
    "read_nifti",
    "read_nifti_mask",
    "read_structures",
    "read_volume",
    "tell",
    "volume_from_array",
]

logger = logging.getLogger(__name__)

# Two grids are one if no corner voxel moves by more than this part of a voxel: headers round to a few decimals.
MAX_GRID_SHIFT_VOXELS = 0.25
# Air is about -1000 HU. A scan whose darkest voxel is above this was most likely never rescaled to HU.
MIN_HU_OF_AIR = -200
# Metal reaches 20000 HU on extended scales, padding outside the field of view -8192.
USUAL_HU = (-8192, 20000)
# A lone lowest value below this is no clipped air but padding outside the field of view (-2000, -3024, -8192).
PADDING_BELOW_HU = -1100
# Label 255 means "outside the numbering" once labels are looked up.
MAX_STRUCTURES = 254
STRUCTURE_ENDINGS = (".nii.gz", ".nii", ".nrrd", ".nhdr", ".mha", ".mhd")


_is_logged: ContextVar[bool] = ContextVar("is_logged", default=True)


@contextmanager
def notes_alone() -> Iterator[None]:
    """Inside, what looks odd about a file stands in the `notes` alone, and is not logged under the file's path.

    For who tells the notes himself, and under other names: a path may name a patient.
    """
    token = _is_logged.set(False)
    try:
        yield
    finally:
        _is_logged.reset(token)


def tell(name: str, *notes: str | None) -> tuple[str, ...]:
    """Log what looks odd about a volume, unless inside `notes_alone`; returns the notes that are some."""
    told = tuple(note for note in notes if note)
    for note in told if _is_logged.get() else ():
        logger.warning(f"{name}: {note}")
    return told


@dataclass
class Volume:
    """One array with its geometry.

    Attributes:
        array: int16 HU or uint8 labels `(depth, height, width)` LPS; may be a view with negative strides.
        spacing: Voxel size in mm along (depth, height, width).
        affine: 4 x 4, (depth, height, width) indices to mm in RAS+.
        name: What messages call it: a path, or the user's word.
        notes: What the user should know of it, such as a rescale that was refused; no file name in them.
    """

    array: np.ndarray
    spacing: tuple[float, float, float]
    affine: np.ndarray
    name: str = "volume"
    notes: tuple[str, ...] = ()


def read_volume(
    path: str | Path,
    affine: np.ndarray | None = None,
    rescale: tuple[float, float] | None = None,
    rescale_mode: str = "auto",
    series_uid: str | None = None,
) -> Volume:
    """Read a CT volume of whatever format, told by the content: NIfTI, NRRD, MetaImage, .npz or DICOM.

    Args:
        path: A file, or for DICOM also a folder or zip archive with one series. An .npz file holds one 3-D array.
        affine: Voxel-to-mm (RAS+) to use instead of the header's; needed for .npz, not taken for DICOM.
        rescale: (slope, intercept) to use instead of the header's, for stored values that are no HU yet; not for DICOM.
        rescale_mode: "auto" follows the declared rescale unless the voxels are HU already, and refuses a volume that
            is plainly not in HU afterwards; "apply" follows it always, "skip" never, and both only note what is odd.
        series_uid: Which series, where a DICOM place holds several.

    Raises:
        FileNotFoundError: If there is no such file.
        BadVolumeError: If the file is of no known format, damaged, cut short, not 3-D, has NaN voxels, no usable
            geometry or, under "auto", values that are not HU.
    """
    check_rescale_mode(rescale_mode)
    if file_kind(path) == "dicom":
        return _read_dicom(path, affine, rescale, rescale_mode, series_uid)
    stored = read_stored(path, affine)
    return volume_from_array(stored.array, stored.affine, str(path), rescale or stored.rescale, rescale_mode)


def read_nifti(
    path: str | Path,
    affine: np.ndarray | None = None,
    rescale: tuple[float, float] | None = None,
    rescale_mode: str = "auto",
) -> Volume:
    """`read_volume` for a file that must be NIfTI."""
    check_rescale_mode(rescale_mode)
    stored = read_stored_nifti(path, affine)
    return volume_from_array(stored.array, stored.affine, str(path), rescale or stored.rescale, rescale_mode)


def read_mask(path: str | Path, affine: np.ndarray | None = None) -> Volume:
    """Read a label map from a NIfTI, NRRD or MetaImage file; labels must be whole numbers within 0..255."""
    kind = file_kind(path)
    if kind in ("dicom", "npz"):
        raise BadVolumeError(
            f"{path}: a mask is read from a NIfTI, NRRD or MetaImage file; a folder with one file per structure by "
            "read_structures."
        )
    return _mask(read_stored(path, affine), path)


def read_nifti_mask(path: str | Path, affine: np.ndarray | None = None) -> Volume:
    """`read_mask` for a file that must be NIfTI."""
    return _mask(read_stored_nifti(path, affine), path)


def read_structures(folder: str | Path, names: Sequence[str], affine: np.ndarray | None = None) -> Volume:
    """Read masks that come as one file per structure, as TotalSegmentator writes them, into one label map.

    Only the label map and one structure are in memory at a time.

    Args:
        folder: With files such as `liver.nii.gz`; a structure without a file is absent from the scan.
        names: Structure names; the place in it plus one is the label.
        affine: Voxel-to-mm (RAS+) to use instead of the files' own.

    Returns:
        uint8 labels. A voxel of two structures belongs to the one named first; their number is noted, and so are files
        that belong to no name.

    Raises:
        FileNotFoundError: If there is no such folder.
        BadVolumeError: If it holds none of the structures, or one that cannot be read, lies on another grid than the
            others or has several labels.
    """
    folder = Path(folder)
    if not 1 <= len(names) <= MAX_STRUCTURES:
        raise ValueError(f"{len(names)} structures cannot be told apart in one label map; 1 to {MAX_STRUCTURES} can.")
    files = _structure_files(folder)
    labels, num_shared = None, 0
    for label, name in enumerate(names, start=1):
        if name not in files:
            continue
        structure = read_mask(files[name], affine)
        if labels is None:
            labels = replace(structure, array=np.zeros(structure.array.shape, dtype=np.uint8), name=str(folder))
        try:
            check_same_grid(labels, structure)
        except BadVolumeError as error:
            raise BadVolumeError(
                f"{structure.name}: not on one grid with the structures before it; every file of a folder must lie on "
                "the scan's grid. Segment the scan again."
            ) from error
        num_shared += _add_structure(labels.array, structure, label)
        del structure  # before the next one is read
    if labels is None:
        raise BadVolumeError(
            f"{folder}: holds no file of a structure, such as {names[0]}.nii.gz; it has {sorted(files)[:5]}."
        )
    notes = []
    if num_shared:
        notes.append(f"{num_shared} voxels belong to two structures; the one named first keeps them.")
    if num_unknown := len(set(files) - set(names)):
        notes.append(f"{num_unknown} files belong to no known structure and were left out.")
    return replace(labels, notes=tuple(notes))


def read_affine(path: str | Path) -> np.ndarray:
    """The affine of a file's voxels as they are stored, for a mask that was made on the file's array."""
    return stored_affine(path)


def volume_from_array(
    array: np.ndarray,
    affine: np.ndarray,
    name: str = "volume",
    rescale: tuple[float, float] = (1.0, 0.0),
    rescale_mode: str = "apply",
) -> Volume:
    """Make a `Volume` of int16 HU from an array in any orientation and its RAS+ affine (`np.diag` for plain axes).

    int16 input is not copied. Other types are rescaled, rounded and clipped to int16. By default the caller's rescale
    is taken at its word; `rescale_mode` as in `read_volume`.
    """
    array = np.asanyarray(array)
    _check_is_real(array, name)
    _check_rescale(rescale, name)
    turned, spacing, new_affine = _oriented(array, affine, name)
    rescale, note = choose_rescale(turned, rescale, rescale_mode)
    turned = _as_hu(turned, rescale, name)
    notes = tell(name, note)
    notes += judge_hu(sample_voxels(turned), int(turned.min()), int(turned.max()), name, rescale_mode)
    notes += tell(name, oblique_note(new_affine))
    return Volume(turned, spacing, new_affine, name, notes)


def judge_hu(sample: np.ndarray, low: int, high: int, name: str, rescale_mode: str = "auto") -> tuple[str, ...]:
    """Tell what is odd about the values of a volume that should be in HU.

    Args:
        sample: Some of its values after the rescale, evenly drawn (`sample_voxels`).
        low, high: The lowest and highest value of all.
        name: For messages.
        rescale_mode: Under "auto" a volume that is plainly not in HU is refused; otherwise this is noted.

    Returns:
        Notes for the user; all but the one on padding are logged as well.

    Raises:
        BadVolumeError: Under "auto", if all voxels are equal, or the values lie off the HU scale as a rescale leaves
            them that was not applied, or applied twice.
    """
    wrong = f"every voxel is {low}: there is no scan in it. Export the series again." if low == high else None
    wrong = wrong or wrong_hu(sample)
    if wrong and rescale_mode == "auto":
        raise BadVolumeError(f"{name}: {wrong}")
    notes = [wrong] if wrong else []
    if low < USUAL_HU[0] or high > USUAL_HU[1]:
        notes.append(f"values from {low} to {high} lie far outside a CT's HU; they are kept as they are.")
    if low > MIN_HU_OF_AIR and not wrong:
        notes.append(
            f"the lowest value is {low}, but air is near -1000 HU. The rescale slope and intercept were probably never "
            f"applied. {how_to_rescale('SLOPE', 'INTERCEPT')}"
        )
    tell(name, *notes)
    found = padding(sample)
    if found and found[0] < PADDING_BELOW_HU:
        notes.append(f"{found[1]:.0%} of the voxels are padding of {found[0]:.0f} HU around the scan; it is kept.")
    return tuple(notes)


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


def _mask(stored: StoredImage, path: str | Path) -> Volume:
    array, (slope, intercept) = stored.array, stored.rescale
    if (slope, intercept) != (1.0, 0.0):
        array = array * slope + intercept
    return mask_from_array(array, stored.affine, name=str(path))


def _read_dicom(path: str | Path, affine, rescale, rescale_mode: str, series_uid: str | None) -> Volume:
    """A DICOM series; its files say themselves where they lie and how they are rescaled."""
    from .dicom import read_dicom

    if affine is not None or rescale is not None or rescale_mode == "skip":
        raise ValueError(
            f"{path}: DICOM files bring their own affine and rescale, and without the rescale they are not HU. Give "
            "neither, and a rescale mode of 'auto' or 'apply'."
        )
    volume = read_dicom(path, series_uid)
    if rescale_mode == "auto":
        with notes_alone():  # they were told, and stand in the volume already
            judge_hu(sample_voxels(volume.array), int(volume.array.min()), int(volume.array.max()), str(path))
    return volume


def _structure_files(folder: Path) -> dict[str, Path]:
    """Structure name -> its file."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder.")
    files: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        ending = next((ending for ending in STRUCTURE_ENDINGS if path.name.lower().endswith(ending)), None)
        if ending is None or not path.is_file():
            continue
        other = files.setdefault(path.name[: -len(ending)], path)
        if other != path:
            raise BadVolumeError(f"{folder}: {other.name} and {path.name} are one structure; remove one of them.")
    return files


def _add_structure(labels: np.ndarray, structure: Volume, label: int) -> int:
    """Give a structure's voxels their label where none has them yet; returns how many another one has."""
    value, num_shared = structure.array.max(), 0
    for target, plane in zip(labels, structure.array):  # no temporary array is larger than a slice
        if not plane.any():
            continue
        is_inside = plane == value
        if np.count_nonzero(is_inside) != np.count_nonzero(plane):
            raise BadVolumeError(
                f"{structure.name}: holds several labels, but a file of this folder is one structure. Give a "
                "multilabel mask as one file, with the numbering it was made with."
            )
        is_free = target == 0
        num_shared += int(np.count_nonzero(is_inside & ~is_free))
        target[is_inside & is_free] = label
    return num_shared


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


def _check_rescale(rescale: Sequence[float], name: str) -> None:
    slope, intercept = rescale
    if not (np.isfinite(slope) and np.isfinite(intercept)) or slope == 0:
        raise BadVolumeError(
            f"{name}: rescale slope {slope} and intercept {intercept} cannot be used; repair the header."
        )


def _as_hu(array: np.ndarray, rescale: Sequence[float], name: str) -> np.ndarray:
    """int16 HU; slice by slice, so that no float copy of the whole scan is ever held."""
    slope, intercept = rescale
    if array.dtype == np.int16 and (slope, intercept) == (1.0, 0.0):
        return array
    _check_is_finite(array, name)
    limits = np.iinfo(np.int16)
    output = np.empty(array.shape, dtype=np.int16)
    for target, plane in zip(output, array):
        # float64: in the released code int16 times a slope of 0.5 stays int16 and collapses to the intercept.
        target[...] = np.clip(np.rint(plane * np.float64(slope) + intercept), limits.min, limits.max)
    return output


def _rounded(values: Sequence[float]) -> tuple[float, ...]:
    return tuple(round(value, 3) for value in values)
