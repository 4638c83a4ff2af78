"""One scan from two NIfTI files to what is stored, slice by slice: neither file is ever held whole.

The result is that of `read_volume`, `read_mask` and `prepare_scan`, bit for bit; memory and time are those of the part
that is kept. Files can be read so whose slices come along the body's axis, one after the other, and whose voxels are
int16 HU and uint8 labels as they stand: CT-RATE's and most others.

(1) both headers are read and checked to lie on one grid
(2) the mask is inflated; of the slices, rows and columns nearest to the model's grid, labels become organs
(3) the box of all organs, widened by a margin, is found
(4) the volume is inflated, and resampled inside that box alone; its values are judged as in reading
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from .geometry import (
    BadVolumeError,
    VolumeResampler,
    nearest_cells,
    oblique_note,
    organ_box,
    resampled_shape,
    resampled_spacing,
    turn_to_lps,
)
from .hounsfield import SAMPLES_PER_AXIS
from .image_files import (
    DAMAGED,
    FETCH_AGAIN,
    fill,
    is_of_the_disk,
    is_single_nifti,
    open_nifti,
    open_voxels,
    read_to_the_end,
)
from .preparation import PreparedScan, organs_of_labels
from .reading import Volume, check_same_grid, judge_hu, tell


class NiftiSlices:
    """A NIfTI file as slices `(height, width)` LPS, in the order of the file.

    Args:
        path: `.nii` or `.nii.gz`.

    Attributes:
        shape, spacing, affine: Of the volume, turned to (depth, height, width) LPS.
        dtype, rescale: Of the stored values.
        is_along_depth: Whether the file holds one slice after the other.

    Raises:
        FileNotFoundError: If there is no such file.
        BadVolumeError: If the header cannot be used.
    """

    def __init__(self, path: str | Path):
        self.path, self.header = Path(path), open_nifti(path)
        self.dtype, self.rescale = self.header.dtype, self.header.rescale
        stored = self.header.shape
        while len(stored) > 3 and stored[-1] == 1:  # one volume stored as a series of one
            stored = stored[:-1]
        try:
            self.turn, self.spacing, self.affine = turn_to_lps(stored, self.header.affine)
        except BadVolumeError as error:
            raise BadVolumeError(f"{self.path}: {error}") from error
        self.stored_shape, self.shape = stored, tuple(stored[axis] for axis in self.turn.order)
        self.is_along_depth = self.turn.order[0] == 2

    def __iter__(self) -> Iterator[tuple[int, np.ndarray]]:
        """(depth index, slice) to the end of the file and its checksum. All slices share one buffer.

        Raises:
            BadVolumeError: If the file is cut short or damaged, or goes on far behind its last voxel.
        """
        rows, columns, slices = self.stored_shape
        buffer = bytearray(rows * columns * self.dtype.itemsize)
        plane = np.frombuffer(buffer, dtype=self.dtype).reshape(rows, columns, order="F").transpose(self.turn.order[1:])
        plane = np.flip(plane, [axis for axis in (0, 1) if self.turn.is_flipped[axis + 1]])
        try:
            with open_voxels(self.path, self.header) as file:
                for number in range(slices):
                    fill(file, buffer)
                    yield (slices - 1 - number if self.turn.is_flipped[0] else number), plane
                read_to_the_end(file, self.path)
        except DAMAGED as error:
            if is_of_the_disk(error):
                raise
            raise BadVolumeError(
                f"{self.path}: the voxels end early or are damaged ({' '.join(str(error).split())}). {FETCH_AGAIN}"
            ) from error

    def as_volume(self) -> Volume:
        """The geometry as a `Volume`; its voxels are all zero and take no memory."""
        return Volume(np.broadcast_to(self.dtype.type(0), self.shape), self.spacing, self.affine, str(self.path))


def can_be_streamed(volume: str | Path, mask: str | Path) -> bool:
    """Whether `prepare_files` can read this pair.

    Raises:
        FileNotFoundError: If a file is not there.
        BadVolumeError: If a header cannot be used.
    """
    for path, dtype in ((volume, np.int16), (mask, np.uint8)):
        if not is_single_nifti(path):
            return False
        slices = NiftiSlices(path)
        # Bytes in another order than the machine's would have to be exchanged.
        if not (slices.is_along_depth and slices.dtype == np.dtype(dtype) and slices.rescale == (1.0, 0.0)):
            return False
    return True


def prepare_files(
    volume: str | Path,
    mask: str | Path,
    table: np.ndarray,
    spacing: Sequence[float],
    margin_voxels: Sequence[int],
    rescale_mode: str = "auto",
) -> tuple[PreparedScan, tuple[str, ...]]:
    """Read and prepare a pair of files for which `can_be_streamed` holds.

    Args:
        volume, mask: `.nii` or `.nii.gz`.
        table: From `organ_label_table`.
        spacing: The model's voxel size in mm along (depth, height, width).
        margin_voxels: Voxels of `spacing` kept around the organs on both sides.
        rescale_mode: As in `read_volume`.

    Returns:
        The scan, and what the user should know of it.

    Raises:
        BadVolumeError: For all that `read_volume`, `read_mask` and `prepare_scan` refuse.
    """
    volume, mask = NiftiSlices(volume), NiftiSlices(mask)
    check_same_grid(volume.as_volume(), mask.as_volume())  # (1)
    labels, highest = _resampled_labels(mask, spacing)  # (2)
    organs = organs_of_labels(labels, highest, table, str(volume.path), str(mask.path))
    box = organ_box(organs, margin_voxels)  # (3)
    resampled, notes = _resampled_volume(volume, spacing, box, rescale_mode)  # (4)
    return PreparedScan(
        volume=resampled,
        mask=np.ascontiguousarray(organs[box]),
        spacing=resampled_spacing(volume.shape, volume.spacing, spacing),
        box=box,
    ), notes


def _resampled_labels(mask: NiftiSlices, spacing: Sequence[float]) -> tuple[np.ndarray, int]:
    """What `resample_mask` gives, and the highest label of the whole file."""
    new_shape = resampled_shape(mask.shape, mask.spacing, spacing)
    depths, rows, columns = (nearest_cells(size, new) for size, new in zip(mask.shape, new_shape))
    labels, highest = np.empty(new_shape, dtype=np.uint8), 0
    for index, plane in mask:
        highest = max(highest, int(plane.max()))
        first, stop = np.searchsorted(depths, (index, index + 1))
        if first < stop:
            labels[first:stop] = plane.take(rows, axis=0).take(columns, axis=1)
    return labels, highest


def _resampled_volume(
    volume: NiftiSlices, spacing: Sequence[float], box: Sequence[slice], rescale_mode: str
) -> tuple[np.ndarray, tuple[str, ...]]:
    """What `resample_volume` gives, and what `read_volume` notes of the values."""
    resampler = VolumeResampler(volume.shape, volume.spacing, spacing, box)
    read = set(resampler.slices_read)
    steps = [max(1, -(-size // SAMPLES_PER_AXIS)) for size in volume.shape]
    sample: list[np.ndarray] = []
    low, high = np.iinfo(np.int16).max, np.iinfo(np.int16).min
    for index, plane in volume:
        low, high = min(low, int(plane.min())), max(high, int(plane.max()))
        if index % steps[0] == 0:
            sample.append(plane[:: steps[1], :: steps[2]].astype(np.float64).ravel())
        if index in read:
            resampler.add(index, plane)
    notes = judge_hu(np.concatenate(sample), low, high, str(volume.path), rescale_mode)
    return resampler.output, (*notes, *tell(str(volume.path), oblique_note(volume.affine)))
