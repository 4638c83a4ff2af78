"""`FVLMImageProcessor`: CT volumes and organ masks, from files or arrays, to what `FVLMModel` reads.

Organs, spacing, margin and HU windows are those of the model's config; a scan takes the same path as in a data builder:

    (1) read, turn to LPS, check           reading
    (2) labels -> organs, resample, box    preparation
    (3) crop or pad to `volume_size`       geometry
    (4) window the HU                      geometry, or the model itself when `window=False`

With `preprocessing="published"` steps (1) and (2) are those of published_preparation: nothing is turned to LPS, the
scan comes padded to `volume_size`, and what (3) pads is the lower edge of the windows, not air.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from os import PathLike
from pathlib import Path

import numpy as np
import torch
from transformers import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor

from .configuration_fvlm import DEFAULT_WINDOW, FVLMConfig, FVLMVisionConfig
from .geometry import crop_inside, crop_or_pad, crop_start, organ_box, organs_in_crop, resample_volume, window_volume
from .image_files import file_kind
from .organs import STRUCTURE_NAMES, UNKNOWN_LABEL, nearest_name, organ_label_table
from .preparation import PreparedScan, padding_hu, prepare_scan
from .published_preparation import as_stored, prepare_published_scan, resize_volume, resized_shape
from .reading import (
    mask_from_array,
    read_affine,
    read_mask,
    read_nifti,
    read_nifti_mask,
    read_structures,
    read_volume,
    volume_from_array,
)

# Numbering of masks whose labels are the model's own, `organ_index + 1`.
MODEL_LABELS = "organs"


class FVLMImageProcessor(BaseImageProcessor):
    """Prepare scans for `FVLMModel`. Defaults are those of the config.

    Args:
        organs: Organ names in the order of the model's organ axis.
        organ_classes: organ -> {numbering: [class names]} (or a plain list), as in an organ set.
        spacing: mm between voxel centres along (depth, height, width).
        windows: HU windows, one a channel: {hu_min, hu_max, mean, std}.
        volume_size: Crop in voxels along (depth, height, width).
        patch_size: Patch edges in voxels; every edge of a crop is a multiple of its patch.
        margin_voxels: Margin around the box of all organs, in voxels of `spacing`.
        completeness, min_organ_voxels: The model's rule for organs that count as whole.
        preprocessing: "standard", or "published" to prepare scans as the published weights saw them, faults included.
    """

    model_input_names = ["pixel_values", "organ_mask", "organ_is_complete"]

    def __init__(
        self,
        organs: Sequence[str] | None = None,
        organ_classes: Mapping | None = None,
        spacing: Sequence[float] = FVLMConfig.spacing,
        windows: Sequence[Mapping[str, float]] = (DEFAULT_WINDOW,),
        volume_size: Sequence[int] = FVLMVisionConfig.volume_size,
        patch_size: Sequence[int] = FVLMVisionConfig.patch_size,
        margin_voxels: Sequence[int] = FVLMConfig.margin_voxels,
        completeness: str = FVLMConfig.completeness,
        min_organ_voxels: int = FVLMConfig.min_organ_voxels,
        preprocessing: str = FVLMConfig.preprocessing,
        **kwargs,
    ):
        super().__init__(**kwargs)
        if not organs:
            raise ValueError("organs is missing: make the processor with FVLMImageProcessor.from_config(model.config).")
        if preprocessing not in ("standard", "published"):
            raise ValueError(f"preprocessing must be 'standard' or 'published', got {preprocessing!r}.")
        # Lists, as they come back from JSON: a saved and loaded processor equals its origin.
        self.organs = list(organs)
        self.organ_classes = dict(organ_classes or {})
        self.spacing = [float(edge) for edge in spacing]
        self.windows = [dict(window) for window in windows]
        self.volume_size = list(volume_size)
        self.patch_size = list(patch_size)
        self.margin_voxels = list(margin_voxels)
        self.completeness = completeness
        self.min_organ_voxels = min_organ_voxels
        self.preprocessing = preprocessing

    @classmethod
    def from_config(cls, config) -> "FVLMImageProcessor":
        """Make the processor that belongs to a model."""
        return cls(
            organs=config.organs,
            organ_classes=config.organ_classes,
            spacing=config.spacing,
            windows=config.windows,
            volume_size=config.vision_config.volume_size,
            patch_size=config.vision_config.patch_size,
            margin_voxels=config.margin_voxels,
            completeness=config.completeness,
            min_organ_voxels=config.min_organ_voxels,
            preprocessing=config.preprocessing,
        )

    def __call__(self, volumes, masks=None, **kwargs) -> BatchFeature:
        """As `preprocess`."""
        return self.preprocess(volumes, masks, **kwargs)

    def preprocess(
        self,
        volumes,
        masks=None,
        affines=None,
        numbering: str | Mapping[int, str | None] = "totalsegmentator_v2",
        window: bool = True,
        center: str | Sequence[int] | None = None,
        return_tensors: str = "pt",
    ) -> BatchFeature:
        """Prepare one scan or a list of scans, each cut or padded to `volume_size`.

        Args:
            volumes: Path of a NIfTI, NRRD or MetaImage file, or of a DICOM series (folder, zip archive or multi-frame
                file; of several series take `read_dicom`'s `Volume`), 3-D array of HU in any orientation, or `Volume`;
                or a list of these. Under preprocessing "published" axes are taken as they are stored: files must be
                NIfTI, and a `Volume`, which has been turned, is refused.
            masks: Segmentations of the volumes, likewise, but for DICOM, or folders with one file per structure, as
                TotalSegmentator writes them. An array is taken to lie on the stored array of its volume.
            affines: For arrays and .npz files: 4 x 4 voxel-to-mm (RAS+), one or a list. For other files: used instead
                of the header's; not for DICOM.
            numbering: What the labels of the masks mean: a numbering's name, {label value: class or organ name}, or
                "organs" for the model's own, `organ_index + 1`. Of a folder of structures the names are what counts:
                TotalSegmentator's of any release, those of the dict, or the organs'.
            window: Apply the HU windows here. Otherwise the HU are handed over as int16 (a quarter of the memory), and
                the model applies its own windows.
            center: Where the crop lies in a scan that is larger: None for the middle, an organ's name for the middle of
                its box, or a voxel of the prepared scan.
            return_tensors: "pt" or "np".

        Returns:
            `pixel_values` float32 (batch, channels, depth, height, width), or without `window` `volume` int16 (batch,
            depth, height, width); `organ_mask` uint8 (batch, depth, height, width) with `organ_index + 1`;
            `organ_is_complete` bool (batch, organs), where the scan's own faces cut an organ just as the crop's do (not
            under "published", where padding hides the scan's own faces).
            `model.get_organ_features(**features)` takes them as they are.

        Raises:
            BadVolumeError: With the file's name, if a scan cannot be used. No scan is skipped.
        """
        if return_tensors not in ("pt", "np"):
            raise ValueError(f"return_tensors must be 'pt' or 'np', got {return_tensors!r}.")
        volumes = _as_list(volumes)
        masks = [None] * len(volumes) if masks is None else _as_list(masks)
        affines = _as_affines(affines, len(volumes))
        if len(masks) != len(volumes):
            raise ValueError(f"{len(volumes)} volumes came with {len(masks)} masks; give one mask a volume.")
        crops, organ_masks, complete = [], [], []
        for volume, mask, affine in zip(volumes, masks, affines):
            scan = self.prepare(volume, mask, affine, numbering)  # (1), (2)
            crop, organ_mask, is_complete = self.crop(scan, center)  # (3)
            crops.append(window_volume(crop, self.windows) if window else crop)  # (4)
            organ_masks.append(organ_mask)
            complete.append(is_complete)
        features = {
            "pixel_values" if window else "volume": np.stack(crops),
            "organ_mask": np.stack(organ_masks),
            "organ_is_complete": np.stack(complete),
        }
        if return_tensors == "pt":
            features = {name: torch.from_numpy(array) for name, array in features.items()}
        return BatchFeature(features)

    def prepare(
        self,
        volume,
        mask,
        affine: np.ndarray | None = None,
        numbering: str | Mapping[int, str | None] = "totalsegmentator_v2",
    ) -> PreparedScan:
        """Read one scan and bring it to the model's spacing, cut to the box of its organs; as in `preprocess`.

        Under "published" the scan is also padded to `volume_size`.
        """
        if mask is None:
            raise ValueError(
                "masks is missing: fVLM looks at a scan organ by organ. Segment the volume first, for example with "
                "`TotalSegmentator -i ct.nii.gz -o mask.nii.gz --ml`, and give that file."
            )
        is_published = self.preprocessing == "published"
        self._check_is_stored(volume=volume, mask=mask)
        is_folder = _is_path(mask) and Path(mask).is_dir()
        if is_folder and is_published:
            raise ValueError(
                f"{mask}: preprocessing 'published' takes one multilabel mask, not a folder with a file per structure: "
                "it goes by the order in which a file stores its voxels."
            )
        if is_folder:
            names = self._structure_names(numbering)
            if numbering != MODEL_LABELS:
                numbering = dict(enumerate(names, start=1))
        table = self.label_table(numbering)
        scan = self._read_scan(volume, affine)
        if is_folder:
            labels = read_structures(mask, names)
        elif _is_path(mask):
            labels = self._read(read_nifti_mask if is_published else read_mask, mask, None)
        elif _is_volume(mask):
            labels = mask
        else:
            if affine is None and _is_path(volume):
                affine = _affine_of(volume)
            labels = self._read(mask_from_array, _as_array(mask), _needed(affine, "mask"))
        geometry = (scan, labels, table, self.spacing, self.margin_voxels)
        if is_published:
            return prepare_published_scan(*geometry, self.volume_size, self.windows)
        return prepare_scan(*geometry)

    def prepare_volume(self, volume, affine: np.ndarray | None = None) -> np.ndarray:
        """Read one scan without a mask and bring it to the model's spacing, whole: int16 HU `(depth, height, width)`.

        Args:
            volume, affine: One of the `volumes` and `affines` of `preprocess`.
        """
        self._check_is_stored(volume=volume)
        scan = self._read_scan(volume, affine)
        if self.preprocessing == "published":
            new_shape = resized_shape(scan.array.shape, scan.affine, self.spacing, scan.name)
            return np.rint(resize_volume(scan.array, new_shape)).astype(np.int16)
        return resample_volume(scan.array, scan.spacing, self.spacing)

    def label_table(self, numbering: str | Mapping[int, str | None]) -> np.ndarray:
        """Lookup from the labels of a mask to those of the model, `organ_index + 1`; see `organ_label_table`."""
        if numbering == MODEL_LABELS:
            table = np.full(256, UNKNOWN_LABEL, dtype=np.uint8)
            table[: len(self.organs) + 1] = np.arange(len(self.organs) + 1)
            return table
        return organ_label_table(self.organ_classes, self.organs, numbering)

    def _structure_names(self, numbering: str | Mapping[int, str | None]) -> Sequence[str]:
        """What the files of a folder of structures are called, by the numbering that came with it."""
        if isinstance(numbering, Mapping):
            return list(dict.fromkeys(name for name in numbering.values() if name is not None))
        return self.organs if numbering == MODEL_LABELS else STRUCTURE_NAMES

    def _check_is_stored(self, **values) -> None:
        """Refuse what has been turned, where the preparation goes by the stored axes."""
        for name, value in values.items() if self.preprocessing == "published" else ():
            if _is_volume(value):
                raise ValueError(
                    f"{name}: a `Volume` has been turned to LPS, but preprocessing 'published' takes the axes as "
                    "the file stores them. Give the path, or array and affine."
                )

    def _read_scan(self, volume, affine: np.ndarray | None):
        """A `Volume` of HU from any of the forms that `preprocess` takes."""
        if _is_path(volume):
            return self._read(read_nifti if self.preprocessing == "published" else read_volume, volume, affine)
        if _is_volume(volume):
            return volume
        return self._read(volume_from_array, _as_array(volume), _needed(affine, "volume"))

    def _read(self, read, source, affine: np.ndarray | None):
        """A `Volume` from a path or an array, turned by its affine, or left as stored for the published preparation."""
        if self.preprocessing == "published":
            # Nothing is refused here for its values: the published release holds volumes that its rescale spoiled.
            read = partial(read, rescale_mode="apply") if read is read_nifti else read
            return as_stored(read, source, read_affine(source) if affine is None else affine)
        return read(source, affine)

    def crop(
        self, scan: PreparedScan, center: str | Sequence[int] | None = None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Cut or pad a prepared scan to `volume_size`: int16 HU, uint8 organ labels, and which organs are whole."""
        if isinstance(center, str):
            center = self._organ_center(scan, center)
        start = crop_start(scan.mask.shape, self.volume_size, center)
        inside = crop_inside(scan.mask.shape, start, self.volume_size)
        outside = padding_hu(self.windows, self.preprocessing == "published")
        return (
            crop_or_pad(scan.volume, start, self.volume_size, outside),
            crop_or_pad(scan.mask, start, self.volume_size, 0),
            organs_in_crop(scan.mask, inside, len(self.organs), self.completeness, self.min_organ_voxels),
        )

    def _organ_center(self, scan: PreparedScan, organ: str) -> list[int]:
        if organ not in self.organs:
            raise ValueError(f"center: organ {organ!r} is not one of {self.organs}{nearest_name(organ, self.organs)}.")
        is_organ = scan.mask == self.organs.index(organ) + 1
        if not is_organ.any():
            raise ValueError(f"center: the scan has no {organ}; take another organ, or None for the middle.")
        return [(part.start + part.stop) // 2 for part in organ_box(is_organ)]


def _is_path(value) -> bool:
    return isinstance(value, (str, PathLike))


def _is_volume(value) -> bool:
    # By its parts, not its class: code loaded from the Hub has its own copy of `Volume`.
    return all(hasattr(value, name) for name in ("array", "spacing", "affine"))


def _as_list(values) -> list:
    """One scan or several: a list or tuple is several, anything else one."""
    return list(values) if isinstance(values, (list, tuple)) else [values]


def _as_affines(affines, count: int) -> list:
    if affines is None:
        return [None] * count
    if not isinstance(affines, (list, tuple)) or (len(affines) and np.ndim(affines[0]) == 1):  # one 4 x 4
        affines = [affines] * count
    if len(affines) != count:
        raise ValueError(
            f"{count} volumes came with {len(affines)} affines; give one a volume, or a single one for all."
        )
    return list(affines)


def _as_array(value) -> np.ndarray:
    return value.numpy(force=True) if isinstance(value, torch.Tensor) else np.asanyarray(value)


def _affine_of(path) -> np.ndarray:
    if file_kind(path) == "dicom":
        raise ValueError(
            "a mask given as an array cannot be placed on a DICOM series, whose slices have no stored order. Give the "
            "mask as a file, or as a `Volume`: mask_from_array(array, affine)."
        )
    return read_affine(path)


def _needed(affine, what: str) -> np.ndarray:
    if affine is None:
        raise ValueError(
            f"a {what} given as an array needs `affines`: voxel indices to mm in RAS+, as nibabel's `image.affine`. "
            "Without it nobody knows which end of an axis is the patient's left."
        )
    return _as_array(affine)


# Saving then writes `auto_map` and this code beside the weights.
FVLMImageProcessor.register_for_auto_class()
