"""What lies in an image file: voxels as they are stored, their affine, and the rescale that the header declares.

NIfTI is read here, NRRD and MetaImage by SimpleITK, .npz by numpy. The format is told by the file's content. Before
memory is taken, the size that a header tells of is compared with what the file can hold; a stream is inflated into its
array piece by piece, and not far beyond it. Nothing is turned, rescaled or widened here.
"""

import errno
import math
import re
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import BinaryIO

import numpy as np

from .geometry import BadVolumeError

try:  # ISA-L inflates to the same bytes in half the time (`python -m benchmarks.prepare`)
    from isal import igzip as inflation
    from isal.isal_zlib import error as inflation_error
except ImportError:
    import gzip as inflation
    from zlib import error as inflation_error

# Of reading itself, where they say nothing of the file's content: no rights, a folder, a seek before the start.
OF_THE_FILE = (None, errno.EINVAL, errno.EACCES, errno.EPERM, errno.EISDIR)
DAMAGED = (EOFError, OSError, zlib.error, inflation_error)  # what reading a stream that was cut or changed raises
INFLATE_BYTES = 1 << 20  # larger pieces are no faster, and gzip makes each of them before it is copied
# 1024 x 1024 x 2000 voxels of float32, far above a CT. It keeps a few kilobytes of zeros from filling the memory.
MAX_ARRAY_BYTES = 1 << 33
# No deflate stream (gzip, zip, zlib) grows by more, https://zlib.net/zlib_tech.html: a header that needs more lies.
MAX_DEFLATE_RATIO = 1032
# So much may stand before the first voxel (extensions of the header) and behind the last one.
MAX_EXTRA_BYTES = 1 << 24
MAX_TEXT_HEADER_BYTES = 1 << 20
LAS_SPACES = ("left-anterior-superior", "las")
NRRD_SPACES = ("left-posterior-superior", "lps", "right-anterior-superior", "ras", *LAS_SPACES)
DEFLATE_ENCODINGS, RAW_ENCODINGS = ("gzip", "gz"), ("raw",)
FETCH_AGAIN = "Fetch the file again."


@dataclass
class StoredImage:
    """The content of one file.

    Attributes:
        array: As on disk, its axes in the order of the affine's columns.
        affine: 4 x 4, array indices to mm in RAS+.
        rescale: (slope, intercept) of the header; (1, 0) where it has none.
    """

    array: np.ndarray
    affine: np.ndarray
    rescale: tuple[float, float] = (1.0, 0.0)


def file_kind(path: str | Path) -> str:
    """One of "nifti", "nrrd", "metaimage", "npz", "dicom" (a folder, a zip archive or one file) and "unknown".

    Raises:
        FileNotFoundError: If there is no such file or folder.
    """
    path = Path(path)
    if path.is_dir():
        return "dicom"
    start = _first_bytes(path, 1024)
    if start.startswith(b"NRRD"):
        return "nrrd"
    if start[128:132] == b"DICM" or path.suffix.lower() in (".dcm", ".ima"):
        return "dicom"
    if start.startswith(b"PK"):
        return "npz" if _is_npz(path) else "dicom"
    if _nifti_header_class(start) is not None or re.search(r"\.(nii|hdr|img)(\.gz)?$", path.name.lower()):
        return "nifti"
    is_header = re.match(rb"\s*\w+[ \t]*[=:]", start) and re.search(rb"^[ \t]*NDims[ \t]*[=:]", start, re.MULTILINE)
    return "metaimage" if is_header else "unknown"


def read_stored(path: str | Path, affine: np.ndarray | None = None) -> StoredImage:
    """Read the voxels of a NIfTI, NRRD, MetaImage or .npz file as they are stored.

    Args:
        path: The file. Of a .nhdr or .mhd file the voxels lie in a second file beside it.
        affine: Array indices to mm (RAS+), to use instead of the header's.

    Raises:
        FileNotFoundError: If there is no such file.
        BadVolumeError: If the file is of another kind, damaged, cut short, larger than any CT, holds no single array,
            or has no orientation and none is given.
    """
    path = Path(path)
    kind = file_kind(path)
    if kind in ("nrrd", "metaimage"):
        return _read_itk(path, kind, affine)
    if kind == "npz":
        return _read_npz(path, affine)
    if kind == "unknown":
        raise BadVolumeError(
            f"{path}: its content is none of NIfTI, NRRD, MetaImage, .npz and DICOM. Convert it to .nii.gz first."
        )
    return read_stored_nifti(path, affine)


def stored_affine(path: str | Path) -> np.ndarray:
    """The affine of a file's voxels as they are stored; the voxels are not read.

    Raises:
        BadVolumeError: If the header holds no orientation.
    """
    path = Path(path)
    kind = file_kind(path)
    if kind in ("nrrd", "metaimage"):
        return _open_itk(path, kind, needs_orientation=True)[1]
    if kind in ("npz", "dicom"):
        raise BadVolumeError(f"{path}: its arrays are not placed by a header; give the affine.")
    return np.asarray(open_nifti(path).affine)


# NIfTI


@dataclass
class NiftiHeader:
    """What is needed of a NIfTI header.

    Attributes:
        shape, dtype: Of the stored array; its first axis runs fastest in the file.
        affine: 4 x 4, array indices to mm in RAS+; NaN if it was not asked for.
        rescale: (slope, intercept); (1, 0) where the header has none.
        offset: Byte at which the voxels start, in the inflated file.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    affine: np.ndarray
    rescale: tuple[float, float]
    offset: int


def read_stored_nifti(path: str | Path, affine: np.ndarray | None = None) -> StoredImage:
    """`read_stored` for a file that must be NIfTI: one file, or a pair .hdr and .img."""
    path = Path(path)
    header = open_nifti(path, needs_orientation=affine is None)
    try:
        if _nifti_header_class(_first_bytes(path, 540)) is None:
            array = _load_other(path).dataobj.get_unscaled()  # a pair
        elif is_gzip(path):
            array = _inflate(path, header)
        else:
            array = np.memmap(path, header.dtype, "c", header.offset, header.shape, "F")
    except (*DAMAGED, ValueError) as error:
        if isinstance(error, BadVolumeError) or is_of_the_disk(error):
            raise
        raise BadVolumeError(
            f"{path}: the voxels end early or are damaged ({_one_line(error)}). {FETCH_AGAIN}"
        ) from error
    except (MemoryError, OverflowError) as error:
        raise _too_large(path, header.shape, header.dtype, "memory holds") from error
    return StoredImage(_without_last_axes(array), header.affine if affine is None else affine, header.rescale)


def open_nifti(path: str | Path, needs_orientation: bool = True) -> NiftiHeader:
    """Read and check a NIfTI header; the voxels are not read.

    Raises:
        FileNotFoundError: If there is no such file.
        BadVolumeError: If the file is no NIfTI, tells of more voxels than it can hold, or lacks an orientation.
    """
    import nibabel

    path = Path(path)
    start = _first_bytes(path, 540)
    if not path.stat().st_size:
        raise BadVolumeError(f"{path}: the file is empty. {FETCH_AGAIN}")
    header_class = _nifti_header_class(start)
    try:
        if header_class is None:
            header = _load_other(path).header
        else:
            # Not nibabel.load: it reads a header's extensions whole, however long they say they are.
            header = header_class(start[: header_class.template_dtype.itemsize])
        has_orientation = bool(header["sform_code"] or header["qform_code"])
        affine = np.full((4, 4), np.nan)
        if needs_orientation and has_orientation:
            affine = np.asarray(header.get_best_affine())
        shape, dtype = tuple(int(size) for size in header.get_data_shape()), header.get_data_dtype()
        offset = max(header.get_data_offset(), 0 if header_class is None else header_class.single_vox_offset)
        slope, intercept = header.get_slope_inter()
    except (nibabel.spatialimages.HeaderDataError, ValueError, OverflowError) as error:
        if isinstance(error, BadVolumeError):
            raise
        raise BadVolumeError(f"{path}: the header is damaged ({_one_line(error)}). {FETCH_AGAIN}") from error
    if needs_orientation and not has_orientation:
        raise BadVolumeError(
            f"{path}: the header holds no orientation (sform_code and qform_code are 0): left and right are unknown. "
            "Take the release with corrected headers (for CT-RATE: *_fixed), write the orientation into the file, or "
            "give the affine in Python."
        )
    if offset > MAX_EXTRA_BYTES:
        raise BadVolumeError(f"{path}: the voxels are said to start at byte {offset}: damaged. {FETCH_AGAIN}")
    check_size(path, shape, dtype, path.stat().st_size if header_class else None, is_gzip(path))
    rescale = (1.0, 0.0) if slope is None else (float(slope), float(intercept))
    return NiftiHeader(shape, dtype, affine, rescale, offset)


def is_single_nifti(path: str | Path) -> bool:
    """Whether a path is a NIfTI of one file, and not one half of a pair, a folder or another format.

    Raises:
        FileNotFoundError: If there is no such file or folder.
    """
    return file_kind(path) == "nifti" and _nifti_header_class(_first_bytes(Path(path), 540)) is not None


def is_of_the_disk(error: Exception) -> bool:
    """Whether reading itself failed (a share that dropped, a disk that broke), so that the file may be a good one."""
    return isinstance(error, OSError) and error.errno not in OF_THE_FILE


def is_gzip(path: str | Path) -> bool:
    with Path(path).open("rb") as file:
        return file.read(2) == b"\x1f\x8b"


def open_voxels(path: str | Path, header: NiftiHeader) -> BinaryIO:
    """A single-file NIfTI as a stream of bytes, inflated as it is read, standing at its first voxel."""
    file = (inflation.open if is_gzip(path) else open)(path, "rb")
    file.seek(header.offset)
    return file


def fill(file: BinaryIO, buffer: memoryview | bytearray) -> None:
    """Fill a buffer from a stream.

    Raises:
        EOFError: If the stream ends before.
    """
    content = memoryview(buffer).cast("B")
    filled = 0
    while filled < len(content):
        count = file.readinto(content[filled : filled + INFLATE_BYTES])
        if not count:
            raise EOFError(f"{len(content) - filled} of {len(content)} bytes are missing")
        filled += count


def read_to_the_end(file: BinaryIO, path: str | Path) -> None:
    """Read what stands behind the last voxel: only there does gzip compare its checksum.

    nibabel stops at the last voxel, and a damaged stream that still inflates would pass for a scan.

    Raises:
        BadVolumeError: If far more follows than a writer's padding, as in a gzip bomb.
    """
    rest = 0
    while count := len(file.read(1 << 20)):
        rest += count
        if rest > MAX_EXTRA_BYTES:
            raise BadVolumeError(
                f"{path}: the file goes on for more than {MAX_EXTRA_BYTES >> 20} MB behind the last voxel of its "
                "header. The header is wrong, or the file was made to fill memory; it is not read further."
            )


def check_size(
    path: str | Path, shape: Sequence[int], dtype: np.dtype, stored_bytes: int | None, is_deflated: bool
) -> None:
    """Refuse a header that tells of more voxels than any CT has, or than its file can hold, before memory is taken.

    Args:
        path: For messages.
        shape, dtype: As the header tells.
        stored_bytes: Size of the file that holds the voxels; None if nothing is known of how they are stored.
        is_deflated: Whether they are compressed with deflate.
    """
    if min(shape, default=0) < 1:
        raise BadVolumeError(f"{path}: the array is empty: shape {tuple(shape)}. {FETCH_AGAIN}")
    size = math.prod(shape) * dtype.itemsize
    if size > MAX_ARRAY_BYTES:
        raise _too_large(path, shape, dtype, f"the {MAX_ARRAY_BYTES >> 30} GB that are read")
    if stored_bytes is not None and size > stored_bytes * (MAX_DEFLATE_RATIO if is_deflated else 1):
        raise BadVolumeError(
            f"{path}: the header tells of {tuple(shape)} voxels of type {dtype}, more than {stored_bytes} "
            f"{'compressed ' if is_deflated else ''}bytes can hold: cut short or damaged. {FETCH_AGAIN}"
        )


def _too_large(path: Path, shape: Sequence[int], dtype: np.dtype, limit: str) -> BadVolumeError:
    return BadVolumeError(
        f"{path}: the header tells of {tuple(shape)} voxels of type {dtype}, more than {limit}. If that is no size of "
        "a CT the header is damaged: fetch the file again."
    )


def _inflate(path: Path, header: NiftiHeader) -> np.ndarray:
    """The voxels of a .nii.gz, inflated into their array: one copy, and read to the end of the file."""
    array = np.empty(header.shape, dtype=header.dtype, order="F")
    with open_voxels(path, header) as file:
        fill(file, array.reshape(-1, order="F").view(np.uint8))
        read_to_the_end(file, path)
    return array


def _nifti_header_class(start: bytes):
    """nibabel's header class for a single-file NIfTI that starts so, or None."""
    import nibabel

    header_size = {int.from_bytes(start[:4], order) for order in ("little", "big")}
    if 348 in header_size and start[344:347] == b"n+1" and len(start) >= 348:
        return nibabel.Nifti1Header
    if 540 in header_size and start[4:7] == b"n+2" and len(start) >= 540:
        return nibabel.Nifti2Header
    return None


def _load_other(path: Path):
    """The nibabel image of a NIfTI pair; for all that is none, the error that says what it is instead."""
    import nibabel

    try:
        image = nibabel.load(path)
    except (nibabel.filebasedimages.ImageFileError, nibabel.spatialimages.HeaderDataError) as error:
        raise BadVolumeError(
            f"{path}: not a NIfTI file ({_one_line(error)}). Convert the series to .nii.gz first."
        ) from error
    except (EOFError, OSError, zlib.error) as error:
        if is_of_the_disk(error):
            raise
        raise BadVolumeError(f"{path}: cut short or damaged ({_one_line(error)}). {FETCH_AGAIN}") from error
    if not isinstance(image, nibabel.Nifti1Pair):
        raise BadVolumeError(f"{path}: a {type(image).__name__}, not a NIfTI file. Convert it to .nii.gz first.")
    return image


# NRRD and MetaImage


def _read_itk(path: Path, kind: str, affine: np.ndarray | None) -> StoredImage:
    reader, own_affine = _open_itk(path, kind, needs_orientation=affine is None)
    try:
        array = _simple_itk(path).GetArrayFromImage(reader.Execute())
    except RuntimeError as error:
        raise BadVolumeError(
            f"{path}: the voxels end early or are damaged, SimpleITK cannot read them. {FETCH_AGAIN}"
        ) from error
    return StoredImage(_without_last_axes(array.T), own_affine if affine is None else affine)


def _open_itk(path: Path, kind: str, needs_orientation: bool):
    """A SimpleITK reader that has read the header, and the affine if it is asked for; the voxels are not read."""
    if is_gzip(path):
        raise BadVolumeError(f"{path}: packed as a whole with gzip; unpack it first (gunzip).")
    header = _text_header(path)
    if kind == "nrrd":
        named, encoding = header.get("data file", header.get("datafile")), header.get("encoding", "").lower()
        has_orientation = "space directions" in header and header.get("space", "").lower() in NRRD_SPACES
    else:
        if "elementdatafile" not in header:  # ITK may read on where we stopped, and open any file it names
            raise BadVolumeError(f"{path}: the header names no ElementDataFile: cut short or damaged. {FETCH_AGAIN}")
        named = header["elementdatafile"]
        named = None if named.upper() == "LOCAL" else named
        encoding = "gzip" if header.get("compresseddata", "false").lower() == "true" else "raw"
        has_orientation = any(name in header for name in ("transformmatrix", "rotation", "orientation"))
    voxels = path if named is None else _data_file(path, named)
    if needs_orientation and not has_orientation:
        raise BadVolumeError(
            f"{path}: the header holds no orientation (NRRD: 'space directions' in a 'space' of LPS, RAS or LAS; "
            "MetaImage: 'TransformMatrix'): left and right are unknown. Export the series again, or give the affine in "
            "Python."
        )
    SimpleITK = _simple_itk(path)
    reader = SimpleITK.ImageFileReader()
    reader.SetImageIO({"nrrd": "NrrdImageIO", "metaimage": "MetaImageIO"}[kind])
    reader.SetFileName(str(path))
    try:
        reader.ReadImageInformation()
        if reader.GetNumberOfComponents() != 1:
            raise BadVolumeError(
                f"{path}: {reader.GetNumberOfComponents()} values a voxel, not one number; colour images and vector "
                "fields cannot be used."
            )
        dtype = SimpleITK.GetArrayFromImage(SimpleITK.Image([1, 1, 1], reader.GetPixelID())).dtype
    except RuntimeError as error:  # its text holds addresses of this run
        raise BadVolumeError(f"{path}: the header is damaged, SimpleITK cannot read it. {FETCH_AGAIN}") from error
    is_deflated = encoding in DEFLATE_ENCODINGS
    stored_bytes = voxels.stat().st_size if is_deflated or encoding in RAW_ENCODINGS else None
    check_size(path, reader.GetSize(), dtype, stored_bytes, is_deflated)
    if not needs_orientation:
        return reader, None
    affine = _itk_affine(path, reader)
    if kind == "nrrd" and header["space"].lower() in LAS_SPACES and len(reader.GetSize()) > 2:
        affine = _las_affine(path, header)
    return reader, affine


def _simple_itk(path: Path):
    # Inside `try`: the Hub's loader asks for every other import at once, and only these two formats need it.
    try:
        import SimpleITK
    except ImportError as error:
        raise ImportError(f"{path}: reading NRRD and MetaImage needs SimpleITK: pip install SimpleITK.") from error
    return SimpleITK


def _itk_affine(path: Path, reader) -> np.ndarray:
    """Array indices to mm in RAS+; SimpleITK's own are LPS."""
    num_axes = len(reader.GetSize())
    if num_axes < 3:
        return np.eye(4)  # refused where the array is turned
    spacing, origin = np.array(reader.GetSpacing()[:3]), np.array(reader.GetOrigin()[:3])
    if not (spacing > 0).all():
        raise BadVolumeError(f"{path}: zero spacing: voxel sizes {spacing.tolist()} mm; repair the header.")
    affine = np.eye(4)
    affine[:3, :3] = np.reshape(reader.GetDirection(), (num_axes, num_axes))[:3, :3] * spacing
    affine[:3, 3] = origin
    affine[:2] *= -1
    return affine


def _las_affine(path: Path, header: dict[str, str]) -> np.ndarray:
    """Array indices to mm in RAS+ of an NRRD in LAS, by its header: SimpleITK up to 2.5.5 takes it for RPS."""
    try:
        columns = re.findall(r"\([^()]*\)|none", header["space directions"])[:3]
        columns.append(header.get("space origin", "(0,0,0)"))
        affine = np.eye(4)
        affine[:3] = np.transpose([[float(number) for number in column.strip("() ").split(",")] for column in columns])
    except ValueError as error:
        raise BadVolumeError(
            f"{path}: 'space directions' {header['space directions']!r} and 'space origin' "
            f"{header.get('space origin')!r} are not three numbers for each of three axes; repair the header."
        ) from error
    affine[0] *= -1
    return affine


def _text_header(path: Path) -> dict[str, str]:
    """Fields of an NRRD ("name: value", to the first empty line) or MetaImage header ("name = value"), names small."""
    fields: dict[str, str] = {}
    with path.open("rb") as file:
        is_nrrd = file.readline(MAX_TEXT_HEADER_BYTES).startswith(b"NRRD")
        if not is_nrrd:
            file.seek(0)
        while file.tell() < MAX_TEXT_HEADER_BYTES:
            line = file.readline(MAX_TEXT_HEADER_BYTES)
            separators = ":" if is_nrrd else "[=:]"  # ITK takes both in a MetaImage
            name, *rest = re.split(separators, line.decode("utf-8", "replace"), maxsplit=1)
            separator, value = bool(rest), "".join(rest)
            if not line.strip() or not separator and not line.startswith(b"#"):
                break
            if not line.startswith(b"#") and not value.startswith("="):  # "name:=value" is the user's own
                fields[name.strip().lower()] = value.strip()
            if name.strip().lower() == "elementdatafile":
                break
    return fields


def _data_file(path: Path, name: str) -> Path:
    """The file of a detached header. A header from elsewhere must not name any file of this machine."""
    if PurePosixPath(name).is_absolute() or PureWindowsPath(name).anchor or ".." in PureWindowsPath(name).parts:
        raise BadVolumeError(f"{path}: its voxels are said to lie in {name!r}; they must lie beside the header.")
    if name.upper().startswith("LIST") or "%" in name:
        raise BadVolumeError(f"{path}: its voxels lie in several files ({name!r}); write them into one file first.")
    voxels = path.parent / name
    if not voxels.is_file():
        raise BadVolumeError(f"{path}: the file {name!r} with its voxels is missing; put it beside the header.")
    return voxels


# .npz


def _is_npz(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (OSError, zipfile.BadZipFile):
        return path.suffix.lower() == ".npz"  # damaged: the reader says so
    return bool(names) and all(name.endswith(".npy") for name in names)


def _read_npz(path: Path, affine: np.ndarray | None) -> StoredImage:
    """The one 3-D array of an .npz file."""
    if affine is None:
        raise BadVolumeError(
            f"{path}: an .npz file holds no orientation: left and right are unknown. Give the affine, or write a "
            ".nii.gz with one."
        )
    try:
        with zipfile.ZipFile(path) as archive:
            found = {}
            for member in archive.infolist():
                with archive.open(member) as file:
                    shape, dtype = _npy_header(file)
                if len(shape) == 3:
                    is_known = member.compress_type in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
                    stored_bytes = member.compress_size if is_known else None
                    found[member.filename.removesuffix(".npy")] = (shape, dtype, stored_bytes)
        if len(found) != 1:
            raise BadVolumeError(f"{path}: needs one 3-D array, found {len(found)}: {sorted(found)[:5]}.")
        ((name, (shape, dtype, stored_bytes)),) = found.items()
        if dtype.hasobject:
            raise BadVolumeError(f"{path}: voxels are of type {dtype}, not numbers; pickled objects are not read.")
        check_size(path, shape, dtype, stored_bytes, is_deflated=True)
        with np.load(path, allow_pickle=False) as content:
            array = content[name]
    except (EOFError, OSError, ValueError, zipfile.BadZipFile, zlib.error, RuntimeError) as error:
        if isinstance(error, BadVolumeError) or is_of_the_disk(error):
            raise
        raise BadVolumeError(f"{path}: cut short or damaged ({_one_line(error)}). {FETCH_AGAIN}") from error
    except MemoryError as error:
        raise _too_large(path, shape, dtype, "memory holds") from error
    return StoredImage(array, affine)


def _npy_header(file: BinaryIO) -> tuple[tuple[int, ...], np.dtype]:
    """Shape and type of an array in numpy's format."""
    version = np.lib.format.read_magic(file)
    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}.get(version)
    if read is None:
        raise ValueError(f"numpy format {version} holds no plain array")
    shape, _, dtype = read(file)
    return shape, dtype


# Parts of all


def _first_bytes(path: Path, count: int) -> bytes:
    """The start of a file, inflated if it is gzip; less than `count` bytes if the file or its stream ends before."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file.")
    with path.open("rb") as file:
        if not is_gzip(path):
            return file.read(count)
        try:  # not by gzip.open, which gives nothing of a stream that is cut short
            return zlib.decompressobj(wbits=zlib.MAX_WBITS | 16).decompress(file.read(1 << 16), count)
        except zlib.error:
            return b""


def _without_last_axes(array: np.ndarray) -> np.ndarray:
    """One volume stored as a series of one loses the axes behind the third."""
    is_one = array.ndim > 3 and all(size == 1 for size in array.shape[3:])
    return array[(slice(None),) * 3 + (0,) * (array.ndim - 3)] if is_one else array


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
