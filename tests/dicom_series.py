"""Write CT series as DICOM files: from an array and its affine, in any orientation, whole or broken in chosen ways.

Every file carries a patient's name, number and birthday, so that a test can look for them where they must not be.
"""

import tempfile
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pydicom
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate, generate_frames
from pydicom.uid import (
    CTImageStorage,
    EnhancedCTImageStorage,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLosslessSV1,
    RLELossless,
    SecondaryCaptureImageStorage,
    generate_uid,
)

PATIENT = {"PatientName": "Mustermann^Erika", "PatientID": "PID-4711", "PatientBirthDate": "19310427"}
FREE_TEXT = {"SeriesDescription": "Thorax Mustermann", "StudyDescription": "Frau Mustermann", "StudyDate": "20190812"}
SECRETS = ("mustermann", "erika", "4711", "19310427", "20190812", "thorax")
SYNTAXES = {
    "explicit": ExplicitVRLittleEndian,
    "implicit": ImplicitVRLittleEndian,
    "big": ExplicitVRBigEndian,
    "rle": RLELossless,
    "jpeg2000": JPEG2000Lossless,
    "jpeg": JPEGLosslessSV1,
}


def slices_of_nifti(image) -> tuple[np.ndarray, np.ndarray]:
    """Array `(slice, row, column)` of a NIfTI image, and its affine to mm in RAS+."""
    array = np.asarray(image.dataobj).transpose(2, 1, 0)
    return array, image.affine[:, [2, 1, 0, 3]]


def positions_of(affine: np.ndarray, count: int) -> np.ndarray:
    """ImagePositionPatient (LPS, mm) of every slice of an affine `(slice, row, column)` -> RAS+."""
    ras = affine[:3, 3] + np.arange(count)[:, None] * affine[:3, 0]
    return ras * [-1, -1, 1]


def write_series(
    folder: Path,
    array: np.ndarray,
    affine: np.ndarray,
    rescale: tuple[float, float] | Sequence[tuple[float, float]] = (1, -1024),
    dtype: str = "int16",
    syntax: str = "explicit",
    number: int = 3,
    uid: str | None = None,
    positions: np.ndarray | None = None,
    names: Sequence[str] | None = None,
    edit: Callable[[Dataset, int], None] | None = None,
) -> str:
    """Write one file a slice; returns the series uid.

    Args:
        folder: Made if it does not exist.
        array: HU `(slice, row, column)`.
        affine: Its indices to mm in RAS+; the directions of rows and columns, and the first position, are its own.
        rescale: (slope, intercept), one for all slices or one each; stored values are made by it.
        dtype: Of the stored values.
        syntax: Key of `SYNTAXES`.
        number, uid: Of the series; the uid is drawn if None.
        positions: LPS mm `(slices, 3)`, instead of the affine's.
        names: Of the files; by default without ending, and in an order that is not that of the slices.
        edit: Changes each dataset before it is written; gets its number.
    """
    folder.mkdir(parents=True, exist_ok=True)
    uid = uid or generate_uid()
    count = len(array)
    positions = positions_of(affine, count) if positions is None else positions
    if names is None:
        names = [f"IM{place:05d}" for place in np.random.default_rng(7).permutation(count)]
    for index, (plane, position, name) in enumerate(zip(array, positions, names)):
        slope, intercept = rescale if np.ndim(rescale) == 1 else rescale[index]
        dataset = _header(CTImageStorage, uid, number, plane.shape, dtype)
        dataset.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
        dataset.InstanceNumber = (index * 17) % count + 1  # says nothing of the order
        dataset.ImagePositionPatient = _decimals(position)
        dataset.ImageOrientationPatient = _decimals(_orientation(affine))
        dataset.PixelSpacing = _decimals(np.linalg.norm(affine[:3, 1:3], axis=0))
        dataset.RescaleSlope, dataset.RescaleIntercept, dataset.RescaleType = slope, intercept, "HU"
        _set_pixels(dataset, _stored(plane, slope, intercept, dtype)[None], syntax)
        if edit is not None:
            edit(dataset, index)
        _save(dataset, folder / name, syntax)
    return uid


def write_enhanced(
    path: Path, array: np.ndarray, affine: np.ndarray, rescale=(1, -1024), dtype="int16", syntax="explicit", edit=None
) -> str:
    """Write one multi-frame Enhanced CT whose frames are in no order; returns the series uid."""
    path.parent.mkdir(parents=True, exist_ok=True)
    uid = generate_uid()
    dataset = _header(EnhancedCTImageStorage, uid, 4, array.shape[1:], dtype)
    dataset.ImageType = ["ORIGINAL", "PRIMARY", "VOLUME", "NONE"]
    dataset.NumberOfFrames = len(array)
    shared = Dataset()
    shared.PlaneOrientationSequence = [_item(ImageOrientationPatient=_decimals(_orientation(affine)))]
    shared.PixelMeasuresSequence = [_item(PixelSpacing=_decimals(np.linalg.norm(affine[:3, 1:3], axis=0)))]
    dataset.SharedFunctionalGroupsSequence = [shared]
    order = np.random.default_rng(5).permutation(len(array))
    positions, frames, stored = positions_of(affine, len(array)), [], []
    for index in order:
        slope, intercept = rescale if np.ndim(rescale) == 1 else rescale[index]
        groups = Dataset()
        groups.PlanePositionSequence = [_item(ImagePositionPatient=_decimals(positions[index]))]
        groups.PixelValueTransformationSequence = [
            _item(RescaleSlope=slope, RescaleIntercept=intercept, RescaleType="HU")
        ]
        groups.FrameContentSequence = [_item(FrameComments="Frame of Mustermann")]
        frames.append(groups)
        stored.append(_stored(array[index], slope, intercept, dtype))
    dataset.PerFrameFunctionalGroupsSequence = frames
    _set_pixels(dataset, np.stack(stored), syntax)
    if edit is not None:
        edit(dataset)
    _save(dataset, path, syntax)
    return uid


def write_localizer(folder: Path, uid: str | None = None, number: int = 1) -> None:
    """A scout view from the side, in a series of its own or of the given uid."""
    affine = np.array([[1.0, 0, 0, 0], [0, 0, -2.0, 250], [0, -2.0, 0, 80], [0, 0, 0, 1]])

    def edit(dataset: Dataset, index: int) -> None:
        dataset.ImageType = ["ORIGINAL", "PRIMARY", "LOCALIZER"]

    plane = np.zeros((1, 40, 50), dtype=np.int16)
    write_series(folder, plane, affine, uid=uid, number=number, names=["scout"], edit=edit)


def write_colour_capture(folder: Path, count: int = 1, number: int = 99) -> None:
    """Secondary captures in colour: a dose report, or a rendering."""
    folder.mkdir(parents=True, exist_ok=True)
    uid = generate_uid()
    for index in range(count):
        dataset = _header(SecondaryCaptureImageStorage, uid, number, (20, 30), "uint8")
        dataset.SamplesPerPixel, dataset.PhotometricInterpretation, dataset.PlanarConfiguration = 3, "RGB", 0
        dataset.PixelData = bytes(20 * 30 * 3)
        _save(dataset, folder / f"capture{index}", "explicit")


def zip_folder(folder: Path, path: Path, method: int = zipfile.ZIP_DEFLATED, prefix: str = "") -> Path:
    """Pack a folder, with all folders below it."""
    with zipfile.ZipFile(path, "w", method) as archive:
        for file in sorted(folder.rglob("*")):
            if file.is_file():
                archive.write(file, prefix + file.relative_to(folder).as_posix())
    return path


def _header(sop_class: str, uid: str, number: int, shape: tuple[int, int], dtype: str) -> Dataset:
    dataset = Dataset()
    for keyword, value in {**PATIENT, **FREE_TEXT}.items():
        setattr(dataset, keyword, value)
    dataset.SOPClassUID, dataset.SOPInstanceUID = sop_class, generate_uid()
    dataset.StudyInstanceUID, dataset.SeriesInstanceUID = generate_uid(), uid
    dataset.Modality, dataset.SeriesNumber = "CT", number
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.Rows, dataset.Columns = shape
    bits = 8 * np.dtype(dtype).itemsize
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = bits, bits, bits - 1
    dataset.PixelRepresentation = int(np.dtype(dtype).kind == "i")
    return dataset


def _item(**values) -> Dataset:
    item = Dataset()
    for keyword, value in values.items():
        setattr(item, keyword, value)
    return item


def _orientation(affine: np.ndarray) -> np.ndarray:
    """Direction along a row, then down a column, LPS."""
    lps = affine[:3, :3] * [[-1], [-1], [1]]
    return np.concatenate([lps[:, axis] / np.linalg.norm(lps[:, axis]) for axis in (2, 1)])


def _decimals(values) -> list[pydicom.valuerep.DSfloat]:
    return [pydicom.valuerep.DSfloat(float(value), auto_format=True) for value in values]


def _stored(plane: np.ndarray, slope: float, intercept: float, dtype: str) -> np.ndarray:
    stored = np.rint((plane.astype(np.float64) - intercept) / slope)
    limits = np.iinfo(dtype)
    assert limits.min <= stored.min() and stored.max() <= limits.max, "these HU do not fit the stored type"
    return stored.astype(dtype)


def _set_pixels(dataset: Dataset, stored: np.ndarray, syntax: str) -> None:
    """Pixels of all frames `(frames, rows, columns)`, compressed where the syntax says so."""
    if syntax == "rle":
        encoder = pydicom.pixels.get_encoder(RLELossless)
        frames = [bytes(encoder.encode(frame, **_format(dataset))) for frame in stored]
    elif syntax in ("jpeg2000", "jpeg"):
        frames = [_encode_by_gdcm(frame, syntax) for frame in stored]
    else:
        order = ">" if syntax == "big" else "<"
        dataset.PixelData = stored.astype(stored.dtype.newbyteorder(order)).tobytes()
        dataset["PixelData"].VR = "OW"
        return
    dataset.PixelData = encapsulate(frames)
    dataset["PixelData"].VR = "OB"
    dataset["PixelData"].is_undefined_length = True


def _format(dataset: Dataset) -> dict:
    return {
        "rows": dataset.Rows,
        "columns": dataset.Columns,
        "number_of_frames": 1,
        "samples_per_pixel": 1,
        "bits_allocated": dataset.BitsAllocated,
        "bits_stored": dataset.BitsStored,
        "pixel_representation": dataset.PixelRepresentation,
        "photometric_interpretation": "MONOCHROME2",
    }


def _encode_by_gdcm(frame: np.ndarray, syntax: str) -> bytes:
    """JPEG 2000 or lossless JPEG, by the library that SimpleITK carries."""
    import SimpleITK

    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "frame.dcm")
        writer = SimpleITK.ImageFileWriter()
        writer.SetImageIO("GDCMImageIO")
        writer.SetFileName(path)
        writer.UseCompressionOn()
        writer.SetCompressor({"jpeg2000": "JPEG2000", "jpeg": "JPEG"}[syntax])
        writer.Execute(SimpleITK.GetImageFromArray(frame))
        coded = pydicom.dcmread(path)
    assert coded.file_meta.TransferSyntaxUID == SYNTAXES[syntax], coded.file_meta.TransferSyntaxUID
    return next(generate_frames(coded.PixelData, number_of_frames=1))


def _save(dataset: Dataset, path: Path, syntax: str) -> None:
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = SYNTAXES[syntax]
    pydicom.dcmwrite(path, dataset, enforce_file_format=True)
