"""One scan stored with its axes in any order and direction, as NIfTI, NRRD or MetaImage."""

from itertools import permutations, product
from pathlib import Path

import nibabel
import numpy as np
import SimpleITK

# (order of the axes, which of the new axes are flipped): 24 of them right-handed, 24 mirrored.
ORIENTATIONS = [
    (order, flips) for order in permutations(range(3)) for flips in product((False, True), repeat=3)
]  # fmt: skip


def turned(array: np.ndarray, affine: np.ndarray, order, flips) -> tuple[np.ndarray, np.ndarray]:
    """The same voxels at the same places, stored otherwise: array and its RAS+ affine."""
    array, affine = array.transpose(order), affine[:, [*order, 3]].copy()
    for axis, is_flipped in enumerate(flips):
        if is_flipped:
            array = np.flip(array, axis)
            affine[:3, 3] += affine[:3, axis] * (array.shape[axis] - 1)
            affine[:3, axis] *= -1
    return array, affine


def write_nifti(path: Path, array: np.ndarray, affine: np.ndarray) -> Path:
    nibabel.save(nibabel.Nifti1Image(np.asfortranarray(array), affine), path)
    return path


def write_itk(path: Path, array: np.ndarray, affine: np.ndarray, is_compressed: bool = False) -> Path:
    """Write by SimpleITK, whose places are LPS and whose arrays have the first index last."""
    image = SimpleITK.GetImageFromArray(np.ascontiguousarray(array.T))
    axes = np.diag([-1.0, -1.0, 1.0]) @ affine[:3, :3]
    spacing = np.linalg.norm(axes, axis=0)
    image.SetSpacing(spacing.tolist())
    image.SetDirection((axes / spacing).ravel().tolist())
    image.SetOrigin((np.array([-1.0, -1.0, 1.0]) * affine[:3, 3]).tolist())
    SimpleITK.WriteImage(image, str(path), is_compressed)
    return path
