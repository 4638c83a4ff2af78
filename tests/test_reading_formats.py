"""Volumes and masks in every format, told by content; files that lie about their size; one file per structure."""

import gzip
import io
import pickle
import struct
import tracemalloc
import zipfile

import nibabel
import numpy as np
import pytest
import SimpleITK
import zstandard
from oriented_files import ORIENTATIONS, turned, write_itk, write_nifti

from modeling_fvlm import dicom, image_files
from modeling_fvlm.image_files import MAX_EXTRA_BYTES, file_kind
from modeling_fvlm.organs import NUMBERINGS, STRUCTURE_NAMES, load_organ_set, organ_label_table
from modeling_fvlm.processed_split import MASK_DTYPE, VOLUME_DTYPE, decode_array, encode_array
from modeling_fvlm.reading import (
    BadVolumeError,
    Volume,
    read_affine,
    read_mask,
    read_nifti,
    read_nifti_mask,
    read_structures,
    read_volume,
)

RAS = np.array([[1.5, 0, 0, -20], [0, 2.0, 0, 5], [0, 0, 3.0, 100], [0, 0, 0, 1]])
MIB = 1 << 20


@pytest.fixture
def hu():
    """HU (right, anterior, superior), with air in it."""
    return np.random.default_rng(0).integers(-1000, 900, (6, 7, 5)).astype(np.int16)


@pytest.fixture
def expected(tmp_path, hu):
    return read_nifti(write_nifti(tmp_path / "expected.nii", hu, RAS))


def check_equal(volume, expected):
    assert volume.array.dtype == expected.array.dtype and np.array_equal(volume.array, expected.array)
    assert volume.spacing == pytest.approx(expected.spacing)
    np.testing.assert_allclose(volume.affine, expected.affine, atol=1e-4)


# Formats


@pytest.mark.parametrize("is_compressed", [False, True])
@pytest.mark.parametrize("ending", ["nrrd", "nhdr", "mha", "mhd"])
def test_nrrd_and_metaimage_are_read_like_nifti(tmp_path, hu, expected, ending, is_compressed):
    for number in (0, 11, 30, 45):
        array, affine = turned(hu, RAS, *ORIENTATIONS[number])
        path = write_itk(tmp_path / f"ct_{number}.{ending}", array, affine, is_compressed)
        assert file_kind(path) == {"n": "nrrd", "m": "metaimage"}[ending[0]]
        volume = read_volume(path)
        check_equal(volume, expected)
        assert volume.name == str(path)
        np.testing.assert_allclose(read_affine(path), affine, atol=1e-9)


@pytest.mark.parametrize("dtype", ["uint8", "int32", "uint16", "float32", "float64"])
@pytest.mark.parametrize("ending", ["nrrd", "mha"])
def test_other_number_types(tmp_path, hu, ending, dtype):
    values = (hu + 1000 if dtype.startswith("u") else hu).clip(0, 255 if dtype == "uint8" else None).astype(dtype)
    volume = read_volume(write_itk(tmp_path / f"ct.{ending}", values, RAS), rescale_mode="apply")
    assert np.array_equal(volume.array, values[::-1, ::-1].transpose(2, 1, 0).astype(np.int16))


@pytest.mark.parametrize("ending", ["nrrd", "mha"])
def test_masks_in_other_formats(tmp_path, hu, ending):
    labels = (np.arange(hu.size).reshape(hu.shape) % 118).astype(np.uint8)
    mask = read_mask(write_itk(tmp_path / f"seg.{ending}", labels, RAS))
    check_equal(mask, read_nifti_mask(write_nifti(tmp_path / "seg.nii.gz", labels, RAS)))
    with pytest.raises(BadVolumeError, match="mask labels must be whole numbers"):
        read_mask(write_itk(tmp_path / f"half.{ending}", labels + np.float32(0.5), RAS))


def nrrd(path, array, *lines, encoding="raw", content=None):
    """An NRRD written by hand, field by field; the voxels of `array` behind it unless `content` is given."""
    types = {"int16": "short", "uint8": "uchar"}
    header = [
        "NRRD0004",
        f"type: {types[str(array.dtype)]}",
        f"dimension: {array.ndim}",
        f"sizes: {' '.join(map(str, array.shape))}",
        f"encoding: {encoding}",
        "endian: little",
        *lines,
    ]
    if content is None:
        content = array.tobytes(order="F")
        content = gzip.compress(content, mtime=0) if encoding == "gzip" else content
    path.write_bytes("\n".join([*header, "", ""]).encode() + content)
    return path


@pytest.mark.parametrize(
    ("space", "signs"),
    [
        ("left-posterior-superior", (-1, -1)),
        ("LPS", (-1, -1)),
        ("right-anterior-superior", (1, 1)),
        ("RAS", (1, 1)),
        ("left-anterior-superior", (-1, 1)),
        ("LAS", (-1, 1)),
    ],
)
def test_every_space_of_an_nrrd_that_is_known(tmp_path, hu, expected, space, signs):
    x, y = signs
    path = nrrd(
        tmp_path / "ct.nrrd",
        hu,
        f"space: {space}",
        f"space directions: ({1.5 * x},0,0) (0,{2 * y},0) (0,0,3)",
        f"space origin: ({-20 * x},{5 * y},100)",
        "# a comment",
        "patient:=not for us",
        encoding="gzip",
    )
    check_equal(read_volume(path), expected)


@pytest.mark.parametrize("directions", ["none (0,2,0) (0,0,3)", "(1,0) (0,2,0) (0,0,3)", "(1,0,x) (0,2,0) (0,0,3)"])
def test_an_nrrd_in_las_whose_directions_are_no_numbers_is_refused(tmp_path, hu, directions):
    path = nrrd(tmp_path / "ct.nrrd", hu, "space: LAS", f"space directions: {directions}")
    with pytest.raises(BadVolumeError):
        read_volume(path)


@pytest.mark.parametrize(
    "lines",
    [
        [],
        ["spacings: 1.5 2 3"],
        ["space dimension: 3", "space directions: (1.5,0,0) (0,2,0) (0,0,3)"],
        ["space: scanner-xyz", "space directions: (1.5,0,0) (0,2,0) (0,0,3)"],
    ],
)
def test_an_nrrd_without_orientation_needs_an_affine(tmp_path, hu, expected, lines):
    path = nrrd(tmp_path / "ct.nrrd", hu, *lines)
    with pytest.raises(BadVolumeError, match="ct.nrrd: the header holds no orientation.*left and right.*affine"):
        read_volume(path)
    check_equal(read_volume(path, RAS), expected)


def metaimage(path, array, *lines, data="LOCAL", content=None):
    header = ["ObjectType = Image", f"NDims = {array.ndim}", "BinaryData = True", "BinaryDataByteOrderMSB = False"]
    header += [*lines, f"DimSize = {' '.join(map(str, array.shape))}", "ElementType = MET_SHORT"]
    content = array.tobytes(order="F") if content is None else content
    path.write_bytes("\n".join([*header, f"ElementDataFile = {data}", ""]).encode() + content)
    return path


def test_a_metaimage_without_orientation_needs_an_affine(tmp_path, hu, expected):
    path = metaimage(tmp_path / "ct.mha", hu, "ElementSpacing = 1.5 2 3")
    with pytest.raises(BadVolumeError, match="ct.mha: the header holds no orientation.*TransformMatrix"):
        read_volume(path)
    check_equal(read_volume(path, RAS), expected)


def test_the_content_counts_not_the_ending(tmp_path, hu, expected):
    plain = write_nifti(tmp_path / "a.nii", hu, RAS).read_bytes()
    for name, content in (("plain.nii.gz", plain), ("packed.nii", gzip.compress(plain)), ("scan.bin", plain)):
        (tmp_path / name).write_bytes(content)
        check_equal(read_volume(tmp_path / name), expected)
        check_equal(read_nifti(tmp_path / name), expected)
    image = nibabel.Nifti2Image(hu, RAS)
    nibabel.save(image, tmp_path / "second.nii.gz")
    check_equal(read_volume(tmp_path / "second.nii.gz"), expected)
    nibabel.save(nibabel.Nifti1Pair(hu, RAS), tmp_path / "pair.hdr")
    check_equal(read_volume(tmp_path / "pair.img"), expected)
    swapped = nibabel.Nifti1Image(hu.astype(">i2"), RAS, nibabel.Nifti1Header(endianness=">"))
    nibabel.save(swapped, tmp_path / "swapped.nii.gz")
    assert (tmp_path / "swapped.nii.gz").stat().st_size and read_nifti(tmp_path / "swapped.nii.gz").array.any()
    check_equal(read_volume(tmp_path / "swapped.nii.gz"), expected)


@pytest.mark.parametrize("content", [b"", b"plain text\n" * 200, bytes(2000), b"\x89PNG\r\n\x1a\n" + bytes(100)])
def test_what_is_of_no_known_format_is_named(tmp_path, content):
    (tmp_path / "scan.bin").write_bytes(content)
    for read in (read_volume, read_mask):
        with pytest.raises(
            BadVolumeError, match="scan.bin: its content is none of NIfTI, NRRD, MetaImage, .npz and DICOM"
        ):
            read(tmp_path / "scan.bin")
        with pytest.raises(FileNotFoundError, match="none.nrrd: no such file"):
            read(tmp_path / "none.nrrd")


def test_an_nrrd_packed_as_a_whole(tmp_path, hu):
    path = nrrd(tmp_path / "ct.nrrd", hu, "space: RAS", "space directions: (1,0,0) (0,1,0) (0,0,1)")
    path.write_bytes(gzip.compress(path.read_bytes()))
    with pytest.raises(BadVolumeError, match="ct.nrrd: packed as a whole with gzip; unpack it first"):
        read_volume(path)


# .npz


def test_the_array_of_an_npz(tmp_path, hu, expected):
    for name, save in (("plain", np.savez), ("packed", np.savez_compressed)):
        save(tmp_path / f"{name}.npz", ct=hu, spacing=np.array([1.5, 2, 3]))
        check_equal(read_volume(tmp_path / f"{name}.npz", RAS), expected)
    np.savez(tmp_path / "fortran.npz", np.asfortranarray(hu))
    check_equal(read_volume(tmp_path / "fortran.npz", affine=RAS), expected)
    np.savez(tmp_path / "raw.npz", ct=(hu + 1024).astype(np.uint16))
    check_equal(read_volume(tmp_path / "raw.npz", RAS, (1, -1024)), expected)


def npz(path, name, header_shape, dtype="<i2", content=b"", compression=zipfile.ZIP_DEFLATED):
    """An .npz by hand, whose numpy header may lie."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        file, {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": header_shape}
    )
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr(f"{name}.npy", file.getvalue() + content)
    return path


def test_npz_files_that_cannot_be_used(tmp_path, hu):
    path = tmp_path / "ct.npz"
    np.savez(path, ct=hu)
    with pytest.raises(BadVolumeError, match="ct.npz: an .npz file holds no orientation.*Give the affine"):
        read_volume(path)
    with pytest.raises(BadVolumeError, match="ct.npz: its arrays are not placed by a header"):
        read_affine(path)
    with pytest.raises(BadVolumeError, match="ct.npz: a mask is read from a NIfTI"):
        read_mask(path)
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(BadVolumeError, match="ct.npz: cut short or damaged.*Fetch the file again"):
        read_volume(path, RAS)
    np.savez(path, ct=hu, other=hu)
    with pytest.raises(BadVolumeError, match=r"ct.npz: needs one 3-D array, found 2: \['ct', 'other'\]"):
        read_volume(path, RAS)
    np.savez(path, ct=hu[0])
    with pytest.raises(BadVolumeError, match="ct.npz: needs one 3-D array, found 0"):
        read_volume(path, RAS)
    with pytest.raises(BadVolumeError, match=r"ct.npz: the header tells of \(512, 512, 999\).*cut short or damaged"):
        read_volume(npz(path, "ct", (512, 512, 999), content=bytes(100)), RAS)
    with pytest.raises(BadVolumeError, match=r"ct.npz: the header tells of \(9000, 9000, 9000\) .*more than the 8 GB"):
        read_volume(npz(path, "ct", (9000, 9000, 9000)), RAS)
    with pytest.raises(BadVolumeError, match="ct.npz: cut short or damaged"):
        read_volume(npz(path, "ct", (5, 6, 7), content=bytes(100)), RAS)


def test_a_pickle_in_an_npz_is_not_run(tmp_path):
    class Trap:
        def __reduce__(self):
            return (exec, ("raise SystemExit('the pickle was run')",))

    path = npz(tmp_path / "ct.npz", "ct", (1, 1, 1), dtype=object, content=pickle.dumps(Trap()))
    with pytest.raises(BadVolumeError, match="ct.npz: .*pickled objects are not read"):
        read_volume(path, RAS)


# DICOM: what is in dicom.py is tested there


def test_folders_archives_and_dicom_files_go_to_the_dicom_reader(tmp_path, hu, expected, monkeypatch):
    asked = []

    def read_dicom(place, series_uid=None):
        asked.append(place)
        return expected

    monkeypatch.setattr(dicom, "read_dicom", read_dicom)
    (tmp_path / "series").mkdir()
    with zipfile.ZipFile(tmp_path / "series.zip", "w") as archive:
        archive.writestr("1.dcm", bytes(128) + b"DICM")
    (tmp_path / "one").write_bytes(bytes(128) + b"DICM" + bytes(20))
    (tmp_path / "old.dcm").write_bytes(bytes(300))
    places = [tmp_path / name for name in ("series", "series.zip", "one", "old.dcm")]
    for place in places:
        assert file_kind(place) == "dicom" and read_volume(place) is expected
    assert asked == places
    for wrong in ({"affine": RAS}, {"rescale": (1, -1024)}, {"rescale_mode": "skip"}):
        with pytest.raises(ValueError, match="series: DICOM files bring their own affine and rescale"):
            read_volume(tmp_path / "series", **wrong)
    with pytest.raises(BadVolumeError, match="series: a mask is read from"):
        read_mask(tmp_path / "series")


def test_a_dicom_series_is_judged_by_its_voxels(tmp_path, shared_dir, monkeypatch):
    volume = read_nifti(shared_dir / "ct_samples" / "chest_cta_ct.nii.gz")
    twice = Volume(volume.array - np.int16(1024), volume.spacing, volume.affine)
    monkeypatch.setattr(dicom, "read_dicom", lambda *_: twice)
    with pytest.raises(BadVolumeError, match=f"{tmp_path.name}: the values lie about 1024 below HU"):
        read_volume(tmp_path)
    assert read_volume(tmp_path, rescale_mode="apply") is twice


# Files that lie about their size


def peak_bytes(call) -> int:
    """Memory that a call takes at most; numpy's arrays and gzip's buffers are counted."""
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def refused(read, path, message, at_most=4 * MIB):
    def call():
        with pytest.raises(BadVolumeError, match=message):
            read(path)

    assert peak_bytes(call) < at_most


def nifti_bytes(hu, **fields) -> bytearray:
    """An uncompressed NIfTI with some header fields changed as nibabel would not write them."""
    image = nibabel.Nifti1Image(hu, RAS)
    header = image.header.copy()
    header["magic"], header["vox_offset"] = b"n+1", 352
    for name, value in fields.items():
        header[name] = value
    return bytearray(header.binaryblock + bytes(4) + hu.tobytes(order="F"))


def test_a_gz_bomb_behind_a_small_header(tmp_path, hu):
    path = tmp_path / "bomb.nii.gz"
    path.write_bytes(gzip.compress(bytes(nifti_bytes(hu)) + bytes(MAX_EXTRA_BYTES + 40 * MIB), mtime=0))
    assert path.stat().st_size < MIB // 8
    for read in (read_volume, read_nifti, read_mask, read_nifti_mask):
        refused(read, path, "bomb.nii.gz: the file goes on for more than 16 MB behind the last voxel.*fill memory")


def test_a_few_bytes_behind_the_last_voxel_do_no_harm(tmp_path, hu, expected):
    path = tmp_path / "ct.nii.gz"
    path.write_bytes(gzip.compress(bytes(nifti_bytes(hu)) + bytes(1000), mtime=0))
    check_equal(read_volume(path), expected)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        (
            (512, 512, 3000),
            r"the header tells of \(512, 512, 3000\) voxels of type int16, more than \d+ compressed bytes",
        ),
        ((32767, 32767, 32767), r"\(32767, 32767, 32767\) voxels of type int16, more than the 8 GB that are read"),
        ((512, 512, 300, 200), r"\(512, 512, 300, 200\) voxels of type int16, more than the 8 GB that are read"),
        ((6, 7, -5), r"the array is empty: shape \(6, 7, -5\)"),
    ],
)
@pytest.mark.parametrize("ending", ["nii", "nii.gz"])
def test_a_header_that_tells_of_more_than_there_is(tmp_path, hu, shape, message, ending):
    dim = np.ones(8, dtype=np.int16)
    dim[: len(shape) + 1] = (len(shape), *shape)
    content = bytes(nifti_bytes(hu, dim=dim))
    path = tmp_path / f"liar.{ending}"
    path.write_bytes(gzip.compress(content) if ending == "nii.gz" else content)
    message = message if ending == "nii.gz" else message.replace("compressed ", "")
    refused(read_nifti, path, rf"liar.{ending}: .*{message}.*etch the file again")


def test_voxels_that_start_far_away(tmp_path, hu):
    path = tmp_path / "far.nii.gz"
    for offset in (1e12, 5e8):
        path.write_bytes(gzip.compress(bytes(nifti_bytes(hu, vox_offset=offset)), mtime=0))
        refused(read_nifti, path, "far.nii.gz: the voxels are said to start at byte .*Fetch the file again")
    path.write_bytes(gzip.compress(bytes(nifti_bytes(hu, vox_offset=np.nan)), mtime=0))
    refused(read_nifti, path, "far.nii.gz: the header is damaged")


def test_an_extension_of_the_header_is_stepped_over_not_read(tmp_path, hu, expected):
    content = nifti_bytes(hu, vox_offset=352 + 1024)
    extension = struct.pack("<ii", 2**31 - 16, 6) + bytes(1016)  # says that it is 2 GB long
    content[348:352] = b"\1\0\0\0"
    path = tmp_path / "ct.nii.gz"
    path.write_bytes(gzip.compress(bytes(content[:352] + extension + content[352:]), mtime=0))
    assert peak_bytes(lambda: check_equal(read_volume(path), expected)) < 4 * MIB


def test_inflating_holds_one_copy(tmp_path):
    hu = np.tile(np.random.default_rng(0).integers(-1000, 900, (64, 64, 8)).astype(np.int16), (4, 4, 16))
    path = write_nifti(tmp_path / "ct.nii.gz", hu, RAS)
    assert peak_bytes(lambda: read_nifti(path)) < hu.nbytes + 8 * MIB  # the sample of the guard is a part of it


PLACED = ["space: RAS", "space directions: (1.5,0,0) (0,2,0) (0,0,3)", "space origin: (-20,5,100)"]


@pytest.mark.parametrize("encoding", ["raw", "gzip"])
def test_nrrd_files_that_lie_about_their_size(tmp_path, hu, encoding):
    huge = np.broadcast_to(np.int16(0), (512, 512, 3000))
    content = gzip.compress(hu.tobytes(), mtime=0) if encoding == "gzip" else hu.tobytes()
    path = nrrd(tmp_path / "liar.nrrd", huge, *PLACED, encoding=encoding, content=content)
    refused(
        read_volume, path, r"liar.nrrd: the header tells of \(512, 512, 3000\) .*int16, more than .* bytes can hold"
    )
    huge = np.broadcast_to(np.int16(0), (60000, 60000, 60000))
    path = nrrd(tmp_path / "liar.nrrd", huge, *PLACED, encoding=encoding, content=content)
    refused(read_volume, path, "liar.nrrd: the header tells of .* more than the 8 GB that are read")


def test_a_gz_bomb_in_an_nrrd_takes_no_memory(tmp_path, hu):
    bomb = gzip.compress(hu.tobytes(order="F") + bytes(60 * MIB), mtime=0)
    path = nrrd(tmp_path / "bomb.nrrd", hu, *PLACED, encoding="gzip", content=bomb)
    before = max_resident_bytes()
    try:
        read_volume(path)  # what is behind the last voxel is not looked at
    except BadVolumeError as error:
        assert "Fetch the file again" in str(error)
    assert max_resident_bytes() - before < 40 * MIB


def max_resident_bytes() -> int:
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@pytest.mark.parametrize("kept", [0.4, 0.9])
@pytest.mark.parametrize(("ending", "is_compressed"), [("nrrd", False), ("nrrd", True), ("mha", False), ("mha", True)])
def test_truncated_nrrd_and_metaimage_are_named(tmp_path, ending, is_compressed, kept):
    array = np.random.default_rng(0).integers(-1000, 900, (40, 40, 30)).astype(np.int16)
    path = write_itk(tmp_path / f"cut.{ending}", array, RAS, is_compressed)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * kept)])
    with pytest.raises(BadVolumeError, match=f"cut.{ending}: .*(cut short|end early|damaged).*Fetch the file again"):
        read_volume(path)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("../secret.raw", "is said|said to lie in"),
        ("/etc/hostname", "must lie beside the header"),
        ("C:\\secret.raw", "must lie beside the header"),
        ("sub/../../secret.raw", "must lie beside the header"),
        ("LIST", "lie in several files"),
        ("slice%03d.raw 1 30 1", "lie in several files"),
        ("gone.raw", "the file 'gone.raw' with its voxels is missing; put it beside the header"),
    ],
)
def test_a_detached_header_names_a_file_beside_it(tmp_path, hu, name, told):
    folder = tmp_path / "scans"
    folder.mkdir()
    (tmp_path / "secret.raw").write_bytes(hu.tobytes())
    placed = "TransformMatrix = 1 0 0 0 1 0 0 0 1"
    for path in (
        nrrd(folder / "ct.nhdr", hu, *PLACED, f"data file: {name}", content=b""),
        metaimage(folder / "ct.mhd", hu, placed, data=name, content=b""),
    ):
        with pytest.raises(BadVolumeError, match=f"{path.name}: its voxels.*{told}|{told}"):
            read_volume(path)


def test_geometry_and_kinds_that_are_no_volume(tmp_path, hu):
    def message(path) -> str:
        with pytest.raises(BadVolumeError) as caught:
            read_volume(path)
        assert path.name in str(caught.value) and str(caught.value).count(path.name) == 1
        return str(caught.value)

    flat = SimpleITK.GetImageFromArray(hu[0])
    SimpleITK.WriteImage(flat, str(tmp_path / "flat.mha"))
    assert "needs a 3-D array, got 2-D" in message(tmp_path / "flat.mha")
    series = SimpleITK.JoinSeries([SimpleITK.GetImageFromArray(hu)] * 2)
    for ending in ("mha", "nrrd"):
        SimpleITK.WriteImage(series, str(tmp_path / f"series.{ending}"))
    assert "needs a 3-D array, got 4-D" in message(tmp_path / "series.mha")
    colour = SimpleITK.GetImageFromArray(np.zeros((4, 5, 6, 3), np.uint8), isVector=True)
    for ending in ("mha", "nrrd"):
        SimpleITK.WriteImage(colour, str(tmp_path / f"rgb.{ending}"))
        assert "3 values a voxel, not one number; colour images" in message(tmp_path / f"rgb.{ending}")

    place = "space origin: (0,0,0)"
    sheared = nrrd(tmp_path / "tilted.nrrd", hu, "space: RAS", "space directions: (1,0,0) (0,1,0.4) (0,0,3)", place)
    assert "sheared" in message(sheared)
    zero = nrrd(tmp_path / "zero.nrrd", hu, "space: RAS", "space directions: (1,0,0) (0,0,0) (0,0,3)", place)
    assert "zero spacing" in message(zero) or "header is damaged" in message(zero)
    nan = nrrd(tmp_path / "nan.nrrd", hu, "space: RAS", "space directions: (1,0,0) (0,nan,0) (0,0,3)", place)
    assert "nan.nrrd: " in message(nan)
    zero = metaimage(tmp_path / "zero.mha", hu, "TransformMatrix = 1 0 0 0 1 0 0 0 1", "ElementSpacing = 1 0 3")
    assert "zero spacing" in message(zero) or "header is damaged" in message(zero)
    garbage = nrrd(tmp_path / "odd.nrrd", hu, *PLACED)
    garbage.write_bytes(garbage.read_bytes().replace(b"sizes: 6 7 5", b"sizes: six 7"))
    assert "the header is damaged" in message(garbage)
    for path in (tmp_path / "rgb.nrrd", garbage):
        assert "0x" not in message(path), "no address of this run: the manifest must be the same after a restart"


def test_nifti_geometry_that_cannot_be_used(tmp_path, hu):
    affine = RAS.copy()
    affine[1, 1] = np.nan
    image = nibabel.Nifti1Image(hu, RAS)
    image.header.set_sform(affine, code=1)
    content = nifti_bytes(hu, sform_code=1, srow_y=affine[1])
    (tmp_path / "nan.nii").write_bytes(bytes(content))
    with pytest.raises(BadVolumeError, match="nan.nii: the affine must be 4 x 4 and finite, .*repair the header"):
        read_volume(tmp_path / "nan.nii")
    (tmp_path / "odd.nii").write_bytes(bytes(nifti_bytes(hu, datatype=77)))
    with pytest.raises(BadVolumeError, match="odd.nii: the header is damaged"):
        read_volume(tmp_path / "odd.nii")
    assert read_volume(tmp_path / "nan.nii", RAS).spacing == (3.0, 2.0, 1.5), "the caller's affine mends it"


def test_blobs_of_a_split_are_bounded(hu):
    blob = encode_array(hu)
    assert np.array_equal(decode_array(blob, hu.shape, VOLUME_DTYPE), hu)
    bomb = zstandard.ZstdCompressor().compress(bytes(64 * MIB))
    unsized = zstandard.ZstdCompressor(write_content_size=False)
    unsized_bomb = unsized.compress(bytes(64 * MIB))

    def call():
        for content in (
            bomb,
            unsized_bomb,
            unsized.compress(bytes(3)),
            b"",
            b"no zstd",
            blob[:-9],
        ):
            with pytest.raises(ValueError, match="the row is damaged"):
                decode_array(content, (6, 7, 5), MASK_DTYPE)
        for shape in ((6, 7, 6), (6, 7, 0), (-6, -7, 5)):
            with pytest.raises(ValueError, match="the row is damaged"):
                decode_array(blob, shape, VOLUME_DTYPE)

    assert np.array_equal(decode_array(unsized.compress(hu.tobytes()), hu.shape, VOLUME_DTYPE), hu)
    assert peak_bytes(call) < MIB


# One file per structure


@pytest.fixture
def structures(tmp_path):
    """Three structures of which two share voxels, in different orientations, and a file of no structure."""
    folder = tmp_path / "segmentations"
    folder.mkdir()
    masks = {name: np.zeros((6, 7, 5), np.uint8) for name in ("liver", "aorta", "spleen")}
    masks["liver"][0:3, 1:4, 1:3] = 1
    masks["aorta"][2:5, 2:5, 2:4] = 1
    masks["spleen"][5, 6, 4] = 255
    for number, (name, mask) in enumerate(masks.items()):
        write_nifti(folder / f"{name}.nii.gz", *turned(mask, RAS, *ORIENTATIONS[5 * number]))
    (folder / "statistics.json").write_text("{}")
    return folder, masks


def test_structures_become_one_label_map(structures):
    folder, masks = structures
    names = ["spleen", "kidney_left", "liver", "aorta"]
    mask = read_structures(folder, names)
    expected = np.zeros((6, 7, 5), np.uint8)
    expected[masks["aorta"] > 0] = 4
    expected[masks["liver"] > 0] = 3  # named before the aorta
    expected[masks["spleen"] > 0] = 1
    assert np.array_equal(mask.array, expected[::-1, ::-1].transpose(2, 1, 0)) and mask.array.dtype == np.uint8
    assert mask.spacing == pytest.approx((3.0, 2.0, 1.5)) and mask.name == str(folder)
    shared = np.count_nonzero((masks["liver"] > 0) & (masks["aorta"] > 0))
    assert shared and mask.notes == (f"{shared} voxels belong to two structures; the one named first keeps them.",)
    other = read_structures(folder, names[::-1])
    assert (other.array == 1).sum() == (masks["aorta"] > 0).sum(), "now the aorta keeps them"
    assert read_structures(folder, ["liver", "spleen"]).notes == (
        "1 files belong to no known structure and were left out.",
    )


def test_structures_in_other_formats_and_with_a_given_affine(tmp_path):
    mask = np.zeros((6, 7, 5), np.uint8)
    mask[1:3, 2:5, 3] = 1
    write_itk(tmp_path / "liver.nrrd", mask, RAS)
    write_itk(tmp_path / "aorta.mha", np.roll(mask, 2, axis=0), RAS)
    labels = read_structures(tmp_path, ["aorta", "liver"])
    assert [(labels.array == label).sum() for label in (1, 2)] == [6, 6]
    moved = read_structures(tmp_path, ["aorta", "liver"], affine=np.diag([1.0, 1.0, 1.0, 1.0]))
    assert moved.spacing == (1.0, 1.0, 1.0)


def test_a_multilabel_mask_taken_apart_comes_back(tmp_path, shared_dir):
    """The organs of a real scan, from TotalSegmentator's one file and from one file per structure."""
    path = shared_dir / "ct_samples" / "abdomen_slab_seg_v2.nii.gz"
    image = nibabel.load(path)
    labels = np.asarray(image.dataobj)
    for label, name in enumerate(NUMBERINGS["totalsegmentator_v2"], start=1):
        if (labels == label).any() or name == "brain":
            write_nifti(tmp_path / f"{name}.nii.gz", (labels == label).astype(np.uint8), image.affine)
    whole, parts = read_nifti_mask(path), read_structures(tmp_path, STRUCTURE_NAMES)
    organ_set = load_organ_set("body_24")
    tables = [
        organ_label_table(organ_set, organ_set.organs, numbering)
        for numbering in ("totalsegmentator_v2", dict(enumerate(STRUCTURE_NAMES, start=1)))
    ]
    organs = tables[0][whole.array]
    assert len(np.unique(organs)) > 5 and np.array_equal(tables[1][parts.array], organs)
    assert parts.notes == ()


def test_structure_names_cover_every_release():
    assert tuple(sorted(STRUCTURE_NAMES)) == STRUCTURE_NAMES and len(set(STRUCTURE_NAMES)) == len(STRUCTURE_NAMES)
    assert set(STRUCTURE_NAMES) == {name for names in NUMBERINGS.values() for name in names}
    assert 117 < len(STRUCTURE_NAMES) <= 254, "one label each, and 255 means unknown"


def test_structures_that_cannot_be_used(structures, tmp_path):
    folder, masks = structures
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder"):
        read_structures(tmp_path / "nowhere", ["liver"])
    with pytest.raises(
        BadVolumeError, match=r"segmentations: holds no file of a structure, such as brain.nii.gz; it has \['aorta"
    ):
        read_structures(folder, ["brain"])
    with pytest.raises(ValueError, match="300 structures cannot be told apart.*1 to 254"):
        read_structures(folder, [str(number) for number in range(300)])
    write_nifti(folder / "colon.nii.gz", 2 * masks["liver"] + masks["aorta"], RAS)
    with pytest.raises(BadVolumeError, match="colon.nii.gz: holds several labels, but a file of this folder is one"):
        read_structures(folder, ["liver", "colon"])
    for array, affine in ((masks["liver"][:-1], RAS), (masks["liver"], RAS + np.diag([0, 0, 0.5, 0]))):
        write_nifti(folder / "colon.nii.gz", array, affine)
        with pytest.raises(BadVolumeError, match="colon.nii.gz: not on one grid with the structures before it"):
            read_structures(folder, ["liver", "colon"])
    write_itk(folder / "colon.nrrd", masks["liver"], RAS)
    with pytest.raises(BadVolumeError, match="colon.nii.gz and colon.nrrd are one structure; remove one"):
        read_structures(folder, ["liver", "colon"])
    (folder / "colon.nrrd").unlink()
    (folder / "colon.nii.gz").write_bytes((folder / "liver.nii.gz").read_bytes()[:-20])
    with pytest.raises(BadVolumeError, match="colon.nii.gz: .*Fetch the file again"):
        read_structures(folder, ["liver", "colon"])


def test_structures_hold_one_structure_at_a_time(tmp_path):
    shape = (256, 256, 160)
    for number in range(6):
        mask = np.zeros(shape, np.uint8)
        mask[:, :, 20 * number : 20 * number + 30] = 1
        write_nifti(tmp_path / f"s{number}.nii.gz", mask, RAS)
    size = int(np.prod(shape))
    assert peak_bytes(lambda: read_structures(tmp_path, [f"s{number}" for number in range(6)])) < 2 * size + 4 * MIB


def test_simpleitk_is_asked_for_by_name_where_it_is_missing(tmp_path, hu, monkeypatch):
    path = write_itk(tmp_path / "ct.nrrd", hu, RAS)
    monkeypatch.setitem(__import__("sys").modules, "SimpleITK", None)
    with pytest.raises(ImportError, match="ct.nrrd: reading NRRD and MetaImage needs SimpleITK: pip install SimpleITK"):
        image_files.read_stored(path)
