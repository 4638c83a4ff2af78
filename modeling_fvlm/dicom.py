"""Read a CT series from DICOM: a folder, a zip archive or one multi-frame file, to the `Volume` any other file gives.

    (1) headers   every file is looked at, its pixels are not; what is no DICOM file is counted and left alone
    (2) choice    the series that shows a CT volume; of several the caller names one by `series_uid`
    (3) places    slices are ordered by their position along the normal, never by name or number; holes are refused
    (4) pixels    slice by slice to HU, each by its own slope and intercept
    (5) grid      a tilted gantry and uneven slices are interpolated onto an even grid with right angles

Of a header only geometry, pixel format and what tells series apart are read: no name, no date, no free text. Messages
speak of series numbers and of millimetres along the slice normal, never of files inside the place, which exports like
to name after patients. An archive is never unpacked: members are read in memory, and their names are labels alone.
"""

import errno
import io
import logging
import math
import re
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import BinaryIO

import numpy as np

from .geometry import AIR_HU, MAX_AXIS_COSINE, BadVolumeError
from .reading import Volume, tell, volume_from_array

MIN_SLICES = 5  # fewer are no volume but a few pictures
# A whole-body scan has about 4000 slices of 512 x 512, 2^30 voxels.
MAX_VOXELS = 1 << 32
# One file of an archive: an Enhanced CT of 4000 slices.
MAX_MEMBER_BYTES = 1 << 31
# Deflate halves a CT; nothing of this size shrinks two hundredfold but a bomb.
MAX_INFLATION, ALWAYS_PLAUSIBLE_BYTES = 200, 1 << 24
# The grid of a tilted scan grows by what its slices are shifted; 30 degrees, the most a gantry does, double it.
MAX_GROWTH = 4

SAME_PLACE_MM = 0.01  # the thinnest slices lie 0.2 mm apart
# Direction cosines are often rounded to three decimals.
MAX_DIRECTION_DIFFERENCE = 2e-3
# Slices lie evenly if none is further than this part of the spacing from where the mean spacing puts it. Up to the
# second limit this is rounding (positions of two decimals) and not worth a note.
MAX_JITTER, MAX_QUIET_JITTER = 0.1, 0.02
MAX_QUIET_JITTER_MM = 0.01
# A gap this much wider than the gaps around it is a hole, unless as many gaps in a row are that wide: scanners change
# the spacing for a region (1.25 mm, then 2.5 mm), lost files leave one gap here and one there.
HOLE_FACTOR, MIN_RUN = 1.75, 3
# Declared padding above this HU stands for a value that tissue has as well.
MAX_PADDING_HU = -900

CT_CLASSES = {
    "1.2.840.10008.5.1.4.1.1.2",  # CT image
    "1.2.840.10008.5.1.4.1.1.2.1",  # Enhanced CT image
    "1.2.840.10008.5.1.4.1.1.2.2",  # Legacy converted enhanced CT image
}
DICOMDIR_CLASS = "1.2.840.10008.1.3.10"
BIG_ENDIAN, DEFLATED, RLE = "1.2.840.10008.1.2.2", "1.2.840.10008.1.2.1.99", "1.2.840.10008.1.2.5"
NATIVE_SYNTAXES = {"1.2.840.10008.1.2", "1.2.840.10008.1.2.1", BIG_ENDIAN}

# All that is ever read of a header. The two sequences hold an Enhanced CT's geometry.
PIXEL_FORMAT = (
    *("SamplesPerPixel", "PhotometricInterpretation", "Rows", "Columns", "BitsAllocated", "BitsStored", "HighBit"),
    "PixelRepresentation",
)
HEADER = (
    *("SOPClassUID", "Modality", "ImageType", "SeriesInstanceUID", "SeriesNumber", "NumberOfFrames", *PIXEL_FORMAT),
    *("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "RescaleSlope", "RescaleIntercept"),
    *("RescaleType", "PixelPaddingValue", "PixelPaddingRangeLimit"),
    *("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"),
)
PIXELS = (*PIXEL_FORMAT, "NumberOfFrames", "PixelData", "ExtendedOffsetTable", "ExtendedOffsetTableLengths")


@dataclass(frozen=True)
class DicomSeries:
    """What a place holds of one series, from headers alone.

    Attributes:
        place: The folder, archive or file.
        series_uid: What `read_dicom` takes to choose it.
        files: Names inside the place. They may tell a patient's name: keep them out of messages.
        number: The series number, if it has one.
        modality: "CT", "MR", ...
        num_slices: Images of the series without its scouts; those of a multi-frame file are counted one by one.
        shape: Rows and columns of the first image.
        spacing: mm between (slices, rows, columns), None where the headers do not tell. Uneven slices: the median.
        unusable: Why it is no CT volume, or None. Holes and differing copies show only in `read_dicom`.
    """

    place: Path
    series_uid: str
    files: tuple[str, ...] = field(repr=False)
    number: int | None
    modality: str
    num_slices: int
    shape: tuple[int, int]
    spacing: tuple[float, float, float] | None
    unusable: str | None

    @property
    def description(self) -> str:
        """`series 3 (CT, 120 slices of 512 x 512, 1.25 x 0.7 x 0.7 mm)`."""
        number = "a series without number" if self.number is None else f"series {self.number}"
        images = f"{self.num_slices} slice{'s' * (self.num_slices != 1)} of {self.shape[0]} x {self.shape[1]}"
        spacing = "" if self.spacing is None else f", {' x '.join(f'{edge:.4g}' for edge in self.spacing)} mm"
        return f"{number} ({self.modality}, {images}{spacing})"


def find_series(place: str | Path) -> list[DicomSeries]:
    """List the series of a folder (with all folders below it), of a zip archive, or of one file; headers only.

    Returns:
        Series in the order of their numbers; empty where there is no DICOM file.

    Raises:
        FileNotFoundError: If there is no such place.
        BadVolumeError: If an archive is damaged, encrypted or would inflate to far more than scans do.
    """
    place = Path(place)
    with _named(place), _opened(place) as source:
        contents = _read_headers(source)
    return [_describe(place, uid, slices) for uid, slices in contents.in_order()]


def read_dicom(place: str | Path, series_uid: str | None = None) -> Volume:
    """Read one CT series.

    Args:
        place: Folder (searched with all folders below it), zip archive, or a multi-frame file.
        series_uid: Which series to read, where a place holds several CT volumes; from `find_series`.

    Returns:
        int16 HU by the files' own rescale. `notes` tells what was done to it: padding replaced, copies dropped, slices
        interpolated.

    Raises:
        FileNotFoundError: If there is no such place.
        ImportError: If pydicom is not installed.
        BadVolumeError: If no series, or more than one, can be read; if slices are missing, differ in size or
            orientation, or lie twice at one place with different pixels; if pixels are damaged.
    """
    place = Path(place)
    with _named(place), _opened(place) as source:
        contents = _read_headers(source)  # (1)
        slices, notes = _choose(place, contents, series_uid)  # (2)
        stack = _order(slices)  # (3)
        _check_places(stack)
        hu = _read_pixels(source, stack, notes)  # (4)
        hu, affine = _straighten(hu, stack, notes)  # (5)
    told = tell(str(place), *notes)
    volume = volume_from_array(hu, affine, name=str(place))
    return replace(volume, notes=(*volume.notes, *told))


# (1) Headers


@dataclass(frozen=True)
class _Slice:
    """One image: a file, or a frame of a multi-frame file. None stands for what its header does not tell."""

    file: str
    frame: int
    sop_class: str
    modality: str
    series_number: int | None
    is_localizer: bool
    samples: int
    rows: int
    columns: int
    position: tuple[float, ...] | None
    orientation: tuple[float, ...] | None
    pixel_spacing: tuple[float, ...] | None  # between rows, between columns
    rescale: tuple[float, ...] | None
    rescale_type: str
    padding: tuple[int, int] | None  # the lowest and the highest stored value that stand for padding


@dataclass
class _Contents:
    """What was found in a place: slices by series uid, files that are no DICOM images, and files that are damaged."""

    series: dict[str, list[_Slice]]
    num_others: int = 0
    num_damaged: int = 0

    def in_order(self) -> list[tuple[str, list[_Slice]]]:
        def key(item: tuple[str, list[_Slice]]) -> tuple:
            number = item[1][0].series_number
            return (number is None, number or 0, item[0])

        return sorted(self.series.items(), key=key)


@dataclass(frozen=True)
class _Source:
    """Files of a place: their names, and what opens one."""

    names: tuple[str, ...]
    open: Callable[[str], BinaryIO]


@contextmanager
def _named(place: Path) -> Iterator[None]:
    """Put the place before every message, and keep what pydicom and the system tell of files to ourselves."""
    if not place.exists():
        raise FileNotFoundError(f"{place}: no such file or folder.")
    log = logging.getLogger("pydicom")  # it prints header values and whole tracebacks
    was_disabled, log.disabled = log.disabled, True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except BadVolumeError as error:
        raise BadVolumeError(f"{place}: {error}") from None
    except OSError as error:
        raise OSError(error.errno, f"cannot be read ({error.strerror or type(error).__name__})", str(place)) from None
    finally:
        log.disabled = was_disabled


@contextmanager
def _opened(place: Path) -> Iterator[_Source]:
    """The files of a folder, the members of an archive, or the one file."""
    if place.is_dir():
        paths = {path.relative_to(place).as_posix(): path for path in sorted(place.rglob("*")) if path.is_file()}
        yield _Source(tuple(paths), lambda name: paths[name].open("rb"))
        return
    with place.open("rb") as file:
        is_archive = file.read(4) in (b"PK\3\4", b"PK\5\6")
    if not is_archive:
        yield _Source((place.name,), lambda name: place.open("rb"))
        return
    try:
        archive = zipfile.ZipFile(place)
    except Exception as error:  # zipfile seeks and unpacks whatever a damaged directory says
        if _is_of_the_disk(error):
            raise
        raise BadVolumeError("the archive is cut short or damaged. Fetch it again.") from None
    with archive:
        yield _Source(_checked_members(archive), archive.open)


def _checked_members(archive: zipfile.ZipFile) -> tuple[str, ...]:
    members = [member for member in archive.infolist() if not member.is_dir()]
    names = tuple(member.filename for member in members)
    if len(set(names)) < len(names):
        raise BadVolumeError("the archive holds several files of one name. Pack the series again.")
    if any(member.flag_bits & 1 for member in members):
        raise BadVolumeError("the archive is encrypted. Unpack it and give the folder.")
    if any(member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) for member in members):
        # Also because the other methods inflate a block at once, however large it is.
        raise BadVolumeError("the archive is packed by a rare method. Pack it as a plain zip (deflate).")
    sizes = [(member.compress_size, member.file_size) for member in members]
    for packed, unpacked in sizes:
        if unpacked > MAX_MEMBER_BYTES:
            raise _bomb("a file in the archive", packed, unpacked)
    # The sum as well: members of a crafted archive may share their packed bytes.
    in_all = Path(archive.filename).stat().st_size, sum(unpacked for _, unpacked in sizes)
    for packed, unpacked in (*sizes, in_all):
        if unpacked > max(ALWAYS_PLAUSIBLE_BYTES, MAX_INFLATION * packed):
            raise _bomb("the archive" if (packed, unpacked) == in_all else "a file in the archive", packed, unpacked)
    return names


def _bomb(what: str, packed: int, unpacked: int) -> BadVolumeError:
    return BadVolumeError(
        f"{what} would inflate from {packed} to {unpacked} bytes, far more than scans do. If that is meant, unpack it "
        "and give the folder."
    )


def _pydicom():
    """pydicom with the parts used here. Inside `try`: the Hub's loader asks for every other import at once."""
    try:
        import pydicom
        import pydicom.dataset
        import pydicom.encaps
        import pydicom.filereader
        import pydicom.pixels
        import pydicom.tag
        import pydicom.uid
    except ImportError as error:
        raise ImportError("DICOM is read with pydicom: `pip install 'pydicom>=3.0'`.") from error
    return pydicom


def _is_of_the_disk(error: Exception) -> bool:
    """Whether reading itself failed (a file is gone, the disk broken). EINVAL: an archive led to a place before it."""
    return isinstance(error, OSError) and error.errno != errno.EINVAL


def _read_headers(source: _Source) -> _Contents:
    contents = _Contents({})
    for name in source.names:
        try:
            with source.open(name) as file:
                found = _read_header(file, name)
        except (ImportError, BadVolumeError):
            raise
        except Exception as error:  # a damaged file makes the parser fail in any of a dozen ways
            if _is_of_the_disk(error):
                raise
            contents.num_damaged += 1
            continue
        if found is None:
            contents.num_others += 1
            continue
        for uid, item in found:
            contents.series.setdefault(uid, []).append(item)
    return contents


def _read_header(file: BinaryIO, name: str) -> list[tuple[str, _Slice]] | None:
    """Series uid and slice of every frame of a file; None if it is no DICOM file, or one that belongs to no series."""
    head = file.read(132)
    if head[128:] != b"DICM":
        if isinstance(file, zipfile.ZipExtFile):
            while file.read(1 << 20):  # to the checksum: a damaged slice must not pass for some other file
                pass
        return None
    pydicom = _pydicom()
    meta = pydicom.filereader.read_dataset(
        file, is_implicit_VR=False, is_little_endian=True, stop_when=lambda tag, vr, length: tag >> 16 != 2
    )
    if meta.get("MediaStorageSOPClassUID") == DICOMDIR_CLASS:
        return []
    if meta.get("TransferSyntaxUID") == DEFLATED:  # pydicom would inflate it without a bound
        raise BadVolumeError(
            "it holds files that are deflated as a whole (Deflated Explicit VR Little Endian), which are not read. "
            "Convert them first, for example with `dcmconv +te`."
        )
    has_pixels = False

    def is_at_pixels(tag: int, vr: str | None, length: int) -> bool:
        nonlocal has_pixels
        has_pixels = tag >> 16 == 0x7FE0
        return has_pixels

    file.seek(0)
    tags = [pydicom.tag.Tag(keyword) for keyword in HEADER]
    header = pydicom.filereader.read_partial(file, stop_when=is_at_pixels, specific_tags=tags)
    uid = str(header.get("SeriesInstanceUID") or "")
    sop_class = str(header.get("SOPClassUID") or meta.get("MediaStorageSOPClassUID") or "")
    if not sop_class or (sop_class in CT_CLASSES and not (uid and has_pixels)):
        raise EOFError("the header ends early")
    if not uid:
        return None

    frames = header.get("PerFrameFunctionalGroupsSequence") or [None]
    if sop_class in CT_CLASSES and (_integer(header, "NumberOfFrames") or 1) != len(frames):
        raise ValueError("frames and their geometry differ in number")
    shared = _first(header, "SharedFunctionalGroupsSequence")
    return [(uid, _slice_of(header, shared, groups, name, frame, sop_class)) for frame, groups in enumerate(frames)]


def _slice_of(header, shared, groups, name: str, frame: int, sop_class: str) -> _Slice:
    def holder(sequence: str):
        """Where an element stands: with the frame, with all frames, or, in a single-frame file, in the header."""
        for place in (groups, shared):
            if place is not None and _first(place, sequence) is not None:
                return _first(place, sequence)
        return header

    rescale = holder("PixelValueTransformationSequence")
    slope, intercept = _numbers(rescale, "RescaleSlope", 1), _numbers(rescale, "RescaleIntercept", 1)
    frame_type = _words(holder("CTImageFrameTypeSequence"), "FrameType")
    return _Slice(
        file=name,
        frame=frame,
        sop_class=sop_class,
        modality=next((word for word in _words(header, "Modality") if re.fullmatch("[A-Z]{2,10}", word)), "unknown"),
        series_number=_integer(header, "SeriesNumber"),
        is_localizer="LOCALIZER" in _words(header, "ImageType") + frame_type,
        samples=_integer(header, "SamplesPerPixel") or 1,
        rows=_integer(header, "Rows") or 0,
        columns=_integer(header, "Columns") or 0,
        position=_numbers(holder("PlanePositionSequence"), "ImagePositionPatient", 3),
        orientation=_numbers(holder("PlaneOrientationSequence"), "ImageOrientationPatient", 6),
        pixel_spacing=_numbers(holder("PixelMeasuresSequence"), "PixelSpacing", 2),
        rescale=slope + intercept if slope and intercept else None,
        rescale_type=(_words(rescale, "RescaleType") or [""])[0],
        padding=_padding(header),
    )


def _first(dataset, sequence: str):
    items = dataset.get(sequence)
    return items[0] if items else None


def _numbers(dataset, keyword: str, count: int) -> tuple[float, ...] | None:
    """`count` numbers of an element, NaN where it says so; None where it is missing or is something else."""
    try:
        value = dataset.get(keyword)
        numbers = tuple(float(number) for number in (value if _is_multiple(value) else [value]))
    except (TypeError, ValueError, ArithmeticError, NotImplementedError):
        return None
    return numbers if len(numbers) == count else None


def _integer(dataset, keyword: str) -> int | None:
    number = _numbers(dataset, keyword, 1)
    return int(number[0]) if number and math.isfinite(number[0]) else None


def _words(dataset, keyword: str) -> list[str]:
    value = dataset.get(keyword) or []
    return [str(word).strip().upper() for word in (value if _is_multiple(value) else [value])]


def _is_multiple(value) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes))


def _padding(header) -> tuple[int, int] | None:
    """Stored values that stand for padding, signed or not as the pixels are: writers often declare the other way."""
    first, bits = _integer(header, "PixelPaddingValue"), _integer(header, "BitsAllocated")
    if first is None or bits not in (8, 16, 32):
        return None
    second = _integer(header, "PixelPaddingRangeLimit")
    ends = [value % (1 << bits) for value in (first, first if second is None else second)]
    if _integer(header, "PixelRepresentation") == 1:
        ends = [value - (1 << bits) if value >> (bits - 1) else value for value in ends]
    return min(ends), max(ends)


# (2) Choice


def _describe(place: Path, uid: str, slices: list[_Slice]) -> DicomSeries:
    images = _without_localizers(slices)
    first = images[0]
    spacing = None
    unusable = _why_unusable(images)
    if unusable is None:
        along = _order(images).places[:, 0]
        spacing = (float(np.median(np.diff(along))), *first.pixel_spacing) if len(along) > 1 else None
    return DicomSeries(
        place=place,
        series_uid=uid,
        files=tuple(dict.fromkeys(item.file for item in slices)),
        number=first.series_number,
        modality=first.modality,
        num_slices=len(images),
        shape=(first.rows, first.columns),
        spacing=spacing,
        unusable=unusable,
    )


def _choose(place: Path, contents: _Contents, series_uid: str | None) -> tuple[list[_Slice], list[str]]:
    """The slices to read and the first notes on them."""
    if contents.num_damaged:
        raise BadVolumeError(
            f"{_count(contents.num_damaged, 'DICOM file')} cut short or damaged, and slices would be missing unseen. "
            "Export the series again."
        )
    if not contents.series:
        raise BadVolumeError(
            f"there is no DICOM image among its {contents.num_others} files. Give a folder or zip of DICOM files."
        )
    series = [_describe(place, uid, slices) for uid, slices in contents.in_order()]
    usable = [item for item in series if item.unusable is None]
    if series_uid is not None:
        usable = [item for item in series if item.series_uid == series_uid]
        if not usable:
            raise BadVolumeError(
                f"no series has the series_uid that was asked for. It holds {_listed(series)}; find_series tells "
                "their uids, and the column series of the folder builder's table takes their numbers, too."
            )
        if usable[0].unusable is not None:
            raise BadVolumeError(f"{usable[0].description} is no CT volume: {usable[0].unusable}")
    if not usable:
        reasons = [f"{item.description}: {item.unusable}" for item in series]
        raise BadVolumeError(f"it holds no CT volume. {' '.join(reasons[:8])}{' ...' if len(reasons) > 8 else ''}")
    if len(usable) > 1:
        numbers = {item.number for item in usable}
        name = "number" if len(numbers) == len(usable) and None not in numbers else "SeriesInstanceUID"
        raise BadVolumeError(
            f"it holds {len(usable)} CT volumes: {_listed(usable)}. Name one (by its {name} in the column series of "
            "the folder builder's table; in Python by series_uid, which find_series of modeling_fvlm tells), or give "
            "each its own place."
        )
    chosen = usable[0]
    notes = []
    passed_over = [item for item in series if item is not chosen]
    if passed_over and series_uid is None:
        others = _count(len(passed_over), "other series", "other series")
        notes.append(f"{others} no CT volume: {_listed(passed_over)}.")
    if contents.num_others:
        notes.append(f"{_count(contents.num_others, 'file')} no DICOM image and passed over.")
    slices = contents.series[chosen.series_uid]
    images = _without_localizers(slices)
    if len(images) < len(slices):
        notes.append(f"{_count(len(slices) - len(images), 'localizer image')} left out.")
    if any(item.rescale is None for item in images):
        notes.append("the headers hold no rescale slope and intercept: stored values are taken for HU.")
    return images, notes


def _count(number: int, what: str, plural: str | None = None) -> str:
    """`1 file is`, `3 files are`."""
    return f"1 {what} is" if number == 1 else f"{number} {plural or what + 's'} are"


def _listed(series: Sequence[DicomSeries]) -> str:
    return ", ".join(item.description for item in series[:8]) + (" ..." if len(series) > 8 else "")


def _without_localizers(slices: list[_Slice]) -> list[_Slice]:
    """The slices of a series; a scout that a scanner filed under it would lie across them."""
    return [item for item in slices if not item.is_localizer] or slices


def _why_unusable(slices: list[_Slice]) -> str | None:
    """Why slices of one series are no CT volume, as a sentence, or None if their headers speak for one."""
    first, count = slices[0], len(slices)
    if other := {item.modality for item in slices} - {"CT"}:
        return f"modality {', '.join(sorted(other))}, not CT."
    if any(item.samples != 1 for item in slices):
        return "colour pictures (secondary capture), not HU."
    if any(item.sop_class not in CT_CLASSES for item in slices):
        return "secondary captures or other derived objects, not CT images."
    if first.is_localizer:
        return "a localizer (scout view), not slices of a volume."
    for keyword, name in (("position", "ImagePositionPatient"), ("orientation", "ImageOrientationPatient")):
        values = [getattr(item, keyword) for item in slices]
        if missing := sum(value is None or not np.isfinite(value).all() for value in values):
            return f"{name} is missing or unreadable in {missing} of {count} slices; export the original series."
    for item in slices:
        edges = item.pixel_spacing
        if edges is None or not all(math.isfinite(edge) and edge > 0 for edge in edges):
            told = "missing" if edges is None else f"{edges[0]:g} x {edges[1]:g} mm"
            return f"PixelSpacing is {told}; repair the header or export the original series."
        if item.rescale is not None and (not np.isfinite(item.rescale).all() or item.rescale[0] == 0):
            return f"rescale slope {item.rescale[0]:g} and intercept {item.rescale[1]:g} cannot be used."
        if item.rescale_type not in ("", "HU", "HU_MOD", "US"):  # US: unspecified
            return "its values are no HU (RescaleType says otherwise), as of a dual-energy map."
    if sizes := {(item.rows, item.columns) for item in slices} - {(first.rows, first.columns)}:
        other = min(sizes)
        return (
            f"slices of {first.rows} x {first.columns} and of {other[0]} x {other[1]} are mixed; export them as series "
            "of their own."
        )
    if count * first.rows * first.columns > MAX_VOXELS or 0 in (first.rows, first.columns):
        return f"its headers tell of {count} slices of {first.rows} x {first.columns}, which is no size of a CT."
    orientations = np.array([item.orientation for item in slices])
    along_rows, along_columns = orientations[0].reshape(2, 3)
    lengths = np.linalg.norm(orientations[0].reshape(2, 3), axis=1)
    if np.abs(lengths - 1).max() > 0.01 or abs(along_rows @ along_columns) > 0.01:
        return "ImageOrientationPatient spans no plane with right angles; repair the header."
    if np.abs(orientations - orientations[0]).max() > MAX_DIRECTION_DIFFERENCE:
        return "slices of several orientations are mixed; export them as series of their own."
    edges = np.array([item.pixel_spacing for item in slices])
    if np.abs(edges / edges[0] - 1).max() > 1e-3:
        return "slices of several pixel spacings are mixed; export them as series of their own."
    if count < MIN_SLICES:
        return f"only {count} slices, a volume has at least {MIN_SLICES}."
    return None


# (3) Places


@dataclass(frozen=True)
class _Stack:
    """Slices in their order in space.

    Attributes:
        groups: Slices at each place; more than one are copies, or contradict each other.
        places: mm `(places, 3)` along the slice normal, down the columns and along the rows.
        axes: These three directions as rows, unit vectors in LPS.
        pixel_spacing: mm between rows, between columns.
    """

    groups: list[list[_Slice]]
    places: np.ndarray
    axes: np.ndarray
    pixel_spacing: np.ndarray


def _order(slices: list[_Slice]) -> _Stack:
    """Order slices along their normal; slices at one place become one group."""
    along_rows, down_columns = np.array(slices[0].orientation).reshape(2, 3)
    along_rows = along_rows / np.linalg.norm(along_rows)
    down_columns = down_columns - (down_columns @ along_rows) * along_rows
    down_columns = down_columns / np.linalg.norm(down_columns)
    axes = np.stack([np.cross(along_rows, down_columns), down_columns, along_rows])
    pixel_spacing = np.array(slices[0].pixel_spacing)
    places = np.array([item.position for item in slices]) @ axes.T
    order = np.argsort(places[:, 0], kind="stable")
    groups: list[list[int]] = []
    for index in order.tolist():
        if groups and places[index, 0] - places[groups[-1][0], 0] < SAME_PLACE_MM:
            groups[-1].append(index)
        else:
            groups.append([index])
    return _Stack(
        groups=[[slices[index] for index in group] for group in groups],
        places=places[[group[0] for group in groups]],
        axes=axes,
        pixel_spacing=pixel_spacing,
    )


def _check_places(stack: _Stack) -> None:
    """Check that slices lie behind one another, and none is missing between the first and the last.

    Raises:
        BadVolumeError: Naming each hole, and how many slices it lacks.
    """
    along = stack.places[:, 0]
    for group, place in zip(stack.groups, stack.places):
        aside = (np.array([item.position for item in group]) @ stack.axes.T - place)[:, 1:] / stack.pixel_spacing
        if np.abs(aside).max() > 0.5:
            raise BadVolumeError(
                f"slices lie side by side in one plane (at {place[0]:.2f} mm). Export them as series of their own."
            )
    if len(along) < MIN_SLICES:
        raise BadVolumeError(
            f"its slices lie at {len(along)} different places; a volume has at least {MIN_SLICES}. Export the whole "
            "series."
        )
    if _jitter(along).max() <= MAX_JITTER:
        return
    gaps = np.diff(along)
    usual = np.quantile(gaps, 0.25, method="lower")  # even where every second gap is a hole
    runs = np.split(np.arange(len(gaps)), np.flatnonzero(np.abs(np.diff(gaps)) > 0.1 * usual) + 1)
    regions = [run for run in runs if len(run) >= MIN_RUN]
    holes = []
    for run in runs:
        if len(run) >= MIN_RUN:
            continue
        before = [gaps[region].mean() for region in regions if region[0] < run[0]][-1:]
        behind = [gaps[region].mean() for region in regions if region[0] > run[0]][:1]
        around = max(before + behind, default=usual)
        holes += [(index, gaps[index] / around) for index in run.tolist() if gaps[index] > HOLE_FACTOR * around]
    if not holes:
        return
    told = []
    for index, times in holes[:5]:
        is_whole = abs(times - round(times)) < 0.15
        missing = f"{round(times) - 1} missing" if is_whole else f"{gaps[index]:.4g} mm without a slice"
        told.append(f"{missing} between {along[index]:.2f} and {along[index + 1]:.2f} mm")
    raise BadVolumeError(
        f"the series has {'a hole' if len(holes) == 1 else f'{len(holes)} holes'}: {', '.join(told)}"
        f"{' ...' if len(holes) > 5 else ''}; the other slices lie {usual:.4g} mm apart. Export the series again; if "
        "it is two scans, as series of their own."
    )


def _jitter(along: np.ndarray) -> np.ndarray:
    """How far each slice lies from where the mean spacing puts it, in parts of that spacing."""
    even = np.linspace(along[0], along[-1], len(along))
    return np.abs(along - even) / (even[1] - even[0])


# (4) Pixels


def _read_pixels(source: _Source, stack: _Stack, notes: list[str]) -> np.ndarray:
    """int16 HU `(places, rows, columns)` of all slices, with what was found told in `notes`."""
    first = stack.groups[0][0]
    hu = np.empty((len(stack.groups), first.rows, first.columns), dtype=np.int16)
    reader = _PixelReader(source)
    num_copies, contradictions = 0, []
    for index, group in enumerate(stack.groups):
        along = float(stack.places[index, 0])
        hu[index] = reader.read(group[0], along)
        for item in group[1:]:
            if np.array_equal(reader.read(item, along), hu[index]):
                num_copies += 1
            elif along not in contradictions:
                contradictions.append(along)
    if contradictions:
        raise BadVolumeError(
            f"different slices lie at one place, {len(contradictions)} times (first at {contradictions[0]:.2f} mm): "
            "several phases or reconstructions in one series. Export them as series of their own."
        )
    if num_copies:
        notes.append(f"{_count(num_copies, 'slice')} a copy of another and dropped.")
    if reader.num_padded:
        notes.append(f"{reader.num_padded} voxels of padding were set to {AIR_HU} HU.")
    if reader.num_unclear:
        notes.append(
            f"the declared padding stands for a value that tissue has too; {reader.num_unclear} voxels of it are kept."
        )
    return hu


class _PixelReader:
    """HU of one slice after the other.

    The file read last is kept: a multi-frame file holds all slices.
    """

    def __init__(self, source: _Source):
        self.source = source
        self.num_padded = 0
        self.num_unclear = 0
        self._name: str | None = None
        self._dataset = None

    def read(self, item: _Slice, along: float) -> np.ndarray:
        """int16 HU `(rows, columns)`."""
        where = f"the slice at {along:.2f} mm"
        dataset = self._open(item.file, where)
        words, stored = _stored_values(dataset, item, where)
        slope, intercept = item.rescale or (1.0, 0.0)
        limits = np.iinfo(np.int16)
        hu = np.clip(np.rint(stored * np.float64(slope) + intercept), limits.min, limits.max).astype(np.int16)
        if item.padding is not None:
            is_padding = (words >= item.padding[0]) & (words <= item.padding[1])
            # Bits beyond BitsStored: such a word stands for no HU at all.
            is_replaced = is_padding & ((hu < AIR_HU) | (words != stored))
            hu[is_replaced] = AIR_HU
            self.num_padded += int(np.count_nonzero(is_replaced))
            self.num_unclear += int(np.count_nonzero(is_padding & (hu > MAX_PADDING_HU)))
        return hu

    def _open(self, name: str, where: str):
        if self._name != name:
            self._name, self._dataset = None, None  # before the next is read: one file in memory at a time
            pydicom = _pydicom()
            try:
                with self.source.open(name) as file:
                    content = io.BytesIO(file.read())  # an archive checks its checksum at the end
                self._dataset = pydicom.dcmread(content, specific_tags=list(PIXELS))
            except Exception as error:
                if _is_of_the_disk(error) or isinstance(error, MemoryError):
                    raise
                raise BadVolumeError(f"{where} is cut short or damaged. Export the series again.") from None
            self._name = name
        return self._dataset


def _stored_values(dataset, item: _Slice, where: str) -> tuple[np.ndarray, np.ndarray]:
    """Pixels of a slice: words as they are allocated, and the values in their stored bits; both `(rows, columns)`."""
    rows, columns = _integer(dataset, "Rows"), _integer(dataset, "Columns")
    bits, used = _integer(dataset, "BitsAllocated") or 0, _integer(dataset, "BitsStored") or 0
    high = _integer(dataset, "HighBit")
    high = used - 1 if high is None else high
    if bits not in (8, 16, 32) or not 0 < used <= high + 1 <= bits or (rows, columns) != (item.rows, item.columns):
        raise BadVolumeError(
            f"{where}: {used} bits stored of {bits}, highest {high}, is no format of pixels that is read. Export the "
            "series again."
        )
    if "PixelData" not in dataset:
        raise BadVolumeError(f"{where} has no pixels. Export the series again.")
    kind = "i" if _integer(dataset, "PixelRepresentation") == 1 else "u"
    syntax = str(dataset.file_meta.get("TransferSyntaxUID") or "1.2.840.10008.1.2.1")
    if syntax not in NATIVE_SYNTAXES:
        stored = _decode(dataset, item, where)
        return stored, stored
    order = ">" if syntax == BIG_ENDIAN else "<"
    content = dataset.PixelData
    size = rows * columns * bits // 8
    if len(content) < (item.frame + 1) * size:
        held = max(0, len(content) - item.frame * size)
        raise BadVolumeError(f"{where} holds {held} of {size} bytes of pixels: cut short. Export the series again.")
    words = np.frombuffer(content, f"{order}{kind}{bits // 8}", count=rows * columns, offset=item.frame * size)
    words = words.reshape(rows, columns).astype(f"={kind}{bits // 8}", copy=False)
    # Other bits of a word may hold anything, such as an overlay; shifting back copies the sign.
    return words, words if used == bits else (words << (bits - 1 - high)) >> (bits - used)


def _decode(dataset, item: _Slice, where: str) -> np.ndarray:
    """The stored values of a compressed slice, by whatever decoder is installed."""
    pydicom = _pydicom()
    syntax = pydicom.uid.UID(dataset.file_meta.TransferSyntaxUID)
    # pydicom itself knows RLE; what it cannot read of it is damaged, and GDCM would make something of it.
    decoders = [_decode_with_pydicom] if syntax == RLE else [_decode_with_pydicom, _decode_with_simpleitk]
    name = syntax.name if syntax.name != syntax else "by an unknown method"
    failed = []
    for decode in decoders:
        try:
            stored = decode(pydicom, dataset, item.frame)
        except Exception:  # what one decoder cannot read another may: Pillow knows no JPEG of 12 bits
            failed.append(decode)
            continue
        if stored is not None and stored.shape == (item.rows, item.columns) and stored.dtype.kind in "iu":
            return stored
    if failed:
        raise BadVolumeError(f"{where} is compressed ({name}) and damaged. Export the series again.")
    raise BadVolumeError(
        f"{where} is compressed ({name}), and nothing that decodes it is installed: `pip install SimpleITK`, or "
        "convert the series to Explicit VR Little Endian."
    )


def _decode_with_pydicom(pydicom, dataset, frame: int) -> np.ndarray | None:
    try:
        decoder = pydicom.pixels.get_decoder(dataset.file_meta.TransferSyntaxUID)
    except NotImplementedError:
        return None
    return decoder.as_array(dataset, index=frame, raw=True)[0] if decoder.is_available else None


def _decode_with_simpleitk(pydicom, dataset, frame: int) -> np.ndarray | None:
    """By GDCM, which reads files alone: one with the pixels and their format, and nothing else of the header."""
    try:
        import SimpleITK
    except ImportError:
        return None
    pixels = pydicom.dataset.Dataset()
    for keyword in PIXEL_FORMAT:
        setattr(pixels, keyword, dataset[keyword].value)
    pixels.SOPClassUID = min(CT_CLASSES)
    pixels.SOPInstanceUID = pydicom.uid.generate_uid()
    pixels.file_meta = pydicom.dataset.FileMetaDataset()
    pixels.file_meta.TransferSyntaxUID = dataset.file_meta.TransferSyntaxUID
    coded = pydicom.encaps.get_frame(
        dataset.PixelData, frame, number_of_frames=_integer(dataset, "NumberOfFrames") or 1
    )
    pixels.PixelData = pydicom.encaps.encapsulate([coded])
    pixels["PixelData"].is_undefined_length = True
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "slice.dcm")
        pydicom.dcmwrite(path, pixels, enforce_file_format=True)
        image = SimpleITK.ReadImage(path, imageIO="GDCMImageIO")
    return SimpleITK.GetArrayFromImage(image).reshape(image.GetSize()[1::-1])


# (5) Grid


def _straighten(hu: np.ndarray, stack: _Stack, notes: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """HU on an even grid with right angles, and the affine of its (slice, row, column) indices, mm in RAS+.

    Slices that lie so already are not touched.
    """
    along, aside = stack.places[:, 0], stack.places[:, 1:] - stack.places[0, 1:]
    gaps = np.diff(along)
    extent = along[-1] - along[0]
    count = len(along)
    is_even = _jitter(along).max() <= MAX_JITTER
    if not is_even:
        # As fine as the finest region, within reason: one odd gap shall not make a thousand slices.
        count = min(round(extent / gaps.min()), 4 * count) + 1
        notes.append(
            f"slices lie {gaps.min():.4g} to {gaps.max():.4g} mm apart; they were interpolated to {count} slices, "
            f"{extent / (count - 1):.4g} mm apart."
        )
    elif np.abs(along - np.linspace(along[0], along[-1], count)).max() > max(
        MAX_QUIET_JITTER * extent / (count - 1), MAX_QUIET_JITTER_MM
    ):
        notes.append(
            f"slices lie {gaps.min():.4g} to {gaps.max():.4g} mm apart; the mean, {gaps.mean():.4g} mm, is taken."
        )

    step = (stack.places[-1] - stack.places[0]) / (count - 1)
    # How far slices lie from the straight line from the first to the last, in voxels.
    wander = np.abs(aside - np.outer((along - along[0]) / extent, aside[-1])) / stack.pixel_spacing
    tilt = math.atan(float(np.linalg.norm(aside[-1])) / extent)
    is_straight = math.sin(tilt) <= MAX_AXIS_COSINE and wander.max() <= 0.5
    if is_straight and is_even:
        return hu, _affine(stack, stack.places[0], step)
    if is_straight:
        aside = np.zeros_like(aside)  # the slices of a grid that leans less than this follow its axis
        origin = stack.places[0]
    else:
        origin = np.array([along[0], *stack.places[:, 1:].min(axis=0)])
        aside = stack.places[:, 1:] - origin[1:]
        step = np.array([step[0], 0.0, 0.0])
        leaning = (
            f"the slices lean by {math.degrees(tilt):.1f} degrees (gantry tilt)"
            if wander.max() <= 0.5
            else f"slices lie up to {np.linalg.norm(aside, axis=1).max():.4g} mm aside of one another"
        )
        notes.append(f"{leaning}; they were moved onto a grid with right angles, and what none covers is {AIR_HU} HU.")
    if is_even:
        along = np.linspace(along[0], along[-1], count)
    return _resample(hu, along, aside / stack.pixel_spacing, count), _affine(stack, origin, step)


def _affine(stack: _Stack, origin: np.ndarray, step: np.ndarray) -> np.ndarray:
    """(slice, row, column) to mm in RAS+; origin and step from slice to slice in the coordinates of `places`."""
    rows, columns = stack.pixel_spacing
    affine = np.eye(4)
    affine[:3, :3] = (np.array([step, [0.0, rows, 0.0], [0.0, 0.0, columns]]) @ stack.axes).T
    affine[:3, 3] = origin @ stack.axes
    affine[:2] *= -1  # LPS -> RAS+
    return affine


def _resample(hu: np.ndarray, along: np.ndarray, aside: np.ndarray, count: int) -> np.ndarray:
    """Move every slice within its plane, then interpolate between slices; linear, in float32, rounded at the end.

    Args:
        hu: int16 `(slices, rows, columns)`.
        along: mm of each slice along the normal, ascending.
        aside: `(slices, 2)`: by how many rows and columns, not negative, each slice lies further than the new grid.
        count: Slices of the result, from the first slice to the last.
    """
    shape = np.array(hu.shape[1:]) + np.ceil(aside.max(axis=0) - 1e-3).astype(int)
    if np.prod(shape, dtype=float) > MAX_GROWTH * hu[0].size:
        raise BadVolumeError(
            "its slices lie too far aside of one another to be one volume. Export the original series."
        )
    output = np.empty((count, *shape), dtype=np.int16)
    moved: dict[int, np.ndarray] = {}  # the slices between which the current one lies
    for index, place in enumerate(np.linspace(along[0], along[-1], count)):
        below = min(int(np.searchsorted(along, place, side="right")) - 1, len(along) - 2)
        weight = np.float32((place - along[below]) / (along[below + 1] - along[below]))
        moved = {z: moved[z] if z in moved else _move(hu[z], aside[z], shape) for z in (below, below + 1)}
        output[index] = np.rint(moved[below] + weight * (moved[below + 1] - moved[below]))
    return output


def _move(plane: np.ndarray, aside: np.ndarray, shape: np.ndarray) -> np.ndarray:
    """A slice, shifted by parts of voxels, on a larger grid; float32, air where it has no voxel."""
    moved = plane.astype(np.float32)
    for axis, (shift, new_size, size) in enumerate(zip(aside, shape, plane.shape)):
        place = np.arange(new_size) - shift
        lower = np.clip(np.floor(place), 0, size - 1).astype(np.intp)
        upper = np.minimum(lower + 1, size - 1)
        weight = np.clip(place - lower, 0, 1).astype(np.float32)
        start = moved.take(lower, axis)
        moved = start + (moved.take(upper, axis) - start) * (weight[:, None] if axis == 0 else weight)
        is_outside = (place < -0.5) | (place > size - 0.5)  # voxels are cells
        moved[is_outside if axis == 0 else (slice(None), is_outside)] = AIR_HU
    return moved
