"""Build a processed split from RAD-ChestCT: npz volumes, 84 abnormalities by location, no reports.

An evaluation split (imgvalid and imgtest become `validation`, imgtrain `train`), with masks made beforehand:
    python -m data_builders rad_chest_ct --source RAD-ChestCT --masks masks --out out/rad_chest_ct --organs chest_4

TotalSegmentator reads no npz. This writes the volumes as NIfTI into --out, by the geometry below, and stops (if it was
broken off, the same command continues):
    python -m data_builders rad_chest_ct --source RAD-ChestCT --out scans --nifti

All scans in one split, as a test set for models that were trained on something else:
    python -m data_builders rad_chest_ct --source RAD-ChestCT --masks masks --out out/rad_chest_ct \\
        --train_sets --validation_sets imgtrain imgvalid imgtest

The source (a folder, or where fsspec finds one) holds, at any depth:
    trn00001.npz, val00001.npz, tst00001.npz, ...                int16 array `ct`, named by NoteAcc_DEID
    img{train,valid,test}_Abnormality_and_Location_Labels.csv    NoteAcc_DEID, then <abnormality>*<location>, 0 or 1
    Summary_3630.csv                                             NoteAcc_DEID, MRN_DEID: whose scan it is
Masks are found by the id in their names: one multilabel file of TotalSegmentator, or a folder with one file per
structure. The labels become the 84 abnormalities, each the highest of its locations, and sixteen findings under
CT-RATE's names (hub_configs/labels/rad_chest_ct.yaml). The release has no reports: every organ's caption says that it
is not spoken of. That serves evaluation by labels; for training there is nothing to contrast.

Geometry. An npz has none; this is what the release's own preprocessing does, and what is assumed:
    axes (slices, rows, columns), growing to inferior (the head comes first), posterior and left: option
    --stored_orientation IPL; 0.8 mm along each: --stored_spacing 0.8 0.8 0.8; HU, clipped to [-1000, 1000]
The first voxel is put at 0 mm. A mask keeps its own header, so it must have been made on volumes with that header (as
--nifti writes them), or with a blank one: then its voxels are taken in the order of the volume's.
Whether the axes are right is looked up in a few volumes (--check): slices must be square, and the table must lie
behind the patient. Left and right cannot be told from the voxels, and neither are head and feet: nothing but the
assumption says which is which. Look at the previews: the heart belongs to the left, the liver to the right.
Source of the geometry: https://github.com/rachellea/ct-volume-preprocessing (preprocess_volumes.py), and the columns of
the release's Extrema CSV (sup_axis0min, ant_axis1min, rig_axis2min).
"""

import argparse
import csv
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
import yaml

from modeling_fvlm.organs import NUMBERINGS, STRUCTURE_NAMES
from modeling_fvlm.reading import BadVolumeError, Volume, notes_alone, read_volume

from .build import add_build_arguments, build, console, settings_from_args
from .cases import Case, check_columns, counted, nearest, read_csv, read_label
from .folder_files import find_mask, list_archive
from .progress import is_disk_full, open_source, stopping_cleanly
from .run_cases import STRUCTURES, SourceWatch, temporary_disk_is_full, vanished
from .segment import as_stored
from .shards import BuiltRow, replace_durably
from .sources import RemoteFile, Source, SourceGoneError, local_copy

SETS = ("imgtrain", "imgvalid", "imgtest")
LABEL_TABLE = "{}_Abnormality_and_Location_Labels.csv"
SUMMARY_TABLE = "Summary_3630.csv"
ID, PATIENT = "NoteAcc_DEID", "MRN_DEID"
PLAIN_ID = re.compile(r"[A-Za-z0-9][\w-]*")  # no dot and no slash: it becomes a file name
LABEL_MAP = Path(__file__).resolve().parent.parent / "hub_configs" / "labels" / "rad_chest_ct.yaml"

# Letter of an orientation -> world axis (x, y, z of RAS+) and sign.
DIRECTIONS = {"R": (0, 1), "L": (0, -1), "A": (1, 1), "P": (1, -1), "S": (2, 1), "I": (2, -1)}

# The look for the table. Air is below MATTER_HU, whatever its noise.
PLANES_TO_LOOK_AT = 24
MATTER_HU = -600
LEAST_TABLE = 1 / 8  # pixels in a plane, as a part of the body's width in pixels: crumbs are no table
LEAST_PLANES = 1 / 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("source")
    group.add_argument("--source", required=True, help="Folder of the release, or an address that fsspec reads.")
    group.add_argument("--masks", type=Path, help="Folder of masks, named by the ids of the scans.")
    group.add_argument(
        "--numbering",
        choices=list(NUMBERINGS),
        default="totalsegmentator_v2",
        help="Numbering of multilabel masks (default: totalsegmentator_v2).",
    )
    group.add_argument(
        "--train_sets",
        nargs="*",
        choices=SETS,
        default=["imgtrain"],
        help="Label files whose scans become the split train (default: imgtrain); no name for none.",
    )
    group.add_argument(
        "--validation_sets",
        nargs="*",
        choices=SETS,
        default=["imgvalid", "imgtest"],
        help="Label files whose scans become the split validation (default: imgvalid imgtest).",
    )
    group.add_argument(
        "--stored_orientation",
        default="IPL",
        metavar="LETTERS",
        help="Where the axes of the stored arrays grow to, one letter of R/L, A/P, S/I for each (default: IPL).",
    )
    group.add_argument(
        "--stored_spacing",
        type=float,
        nargs=3,
        default=(0.8, 0.8, 0.8),
        metavar="MM",
        help="mm between voxels along the axes of the stored arrays (default: 0.8 0.8 0.8).",
    )
    group.add_argument(
        "--check",
        type=int,
        default=3,
        help="Volumes in which the orientation is looked up before the build begins; 0 for none (default: 3).",
    )
    group.add_argument(
        "--nifti",
        action="store_true",
        help="Write the volumes as NIfTI into --out, for TotalSegmentator, and stop. Files that are there are kept.",
    )
    add_build_arguments(parser, organs="chest_4")


# Labels


@dataclass(frozen=True)
class LabelMap:
    """The release's abnormalities, and which of them stand for a finding of CT-RATE."""

    name: str
    abnormalities: tuple[str, ...]
    findings: dict[str, tuple[str, ...]]


def load_label_map(path: Path = LABEL_MAP) -> LabelMap:
    """Read the label map.

    Raises:
        ValueError: If a finding is made of an abnormality that is not listed.
    """
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    known = tuple(content["abnormalities"])
    findings = {finding: tuple(names) for finding, names in content["findings"].items()}
    for finding, names in findings.items():
        for name in names:
            if name not in known:
                raise ValueError(f"{path.name}: {finding!r} is made of {name!r}, no abnormality{nearest(name, known)}.")
    return LabelMap(f"{content['name']} {content['version']}", known, findings)


def read_label_table(path: Path, label_map: LabelMap) -> dict[str, tuple[tuple[str, int], ...]]:
    """Id -> labels: the 84 abnormalities, each the highest of its locations, then the findings made of them.

    Row by row: with 84 x 52 columns, a table of cells as text would take gigabytes.

    Raises:
        ValueError: If the file is not UTF-8, a column is missing or of another form, a cell is no label, a row is too
            short or long, or an id comes twice or could not be a file name.
    """
    labels: dict[str, tuple[tuple[str, int], ...]] = {}
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file)
            columns = [name.strip() for name in next(reader, [])]
            check_columns(path, columns[:1], [ID])
            places = places_of_abnormalities(path, columns, label_map)
            for row in reader:
                place = f"{path.name}, line {reader.line_num}"
                if len(row) != len(columns):
                    raise ValueError(f"{place}: {len(row)} cells under {len(columns)} columns; fetch the file again.")
                scan = row[0].strip()
                if not PLAIN_ID.fullmatch(scan):
                    raise ValueError(f"{place}: {ID} {scan!r} is no plain name, so no file can be named after it.")
                if scan in labels:
                    raise ValueError(f"{place}: the {ID} {scan!r} comes twice.")
                values = {name: highest_label(row, indices, columns, place) for name, indices in places.items()}
                for finding, members in label_map.findings.items():
                    values[finding] = max(values[member] for member in members)
                labels[scan] = tuple(values.items())
    except UnicodeDecodeError as error:
        raise ValueError(f"{path.name} is not UTF-8 ({error}); save it as UTF-8.") from None
    return labels


def highest_label(row: Sequence[str], indices: Sequence[int], columns: Sequence[str], place: str) -> int:
    """The highest label of a row in some of its columns; each different cell is read once."""
    column_of = {row[index].strip(): columns[index] for index in indices}
    return max(read_label(cell, f"{place}, column {column!r}") for cell, column in column_of.items())


def places_of_abnormalities(path: Path, columns: Sequence[str], label_map: LabelMap) -> dict[str, list[int]]:
    """Abnormality -> its columns, one for each location."""
    places: dict[str, list[int]] = {name: [] for name in label_map.abnormalities}
    for index, column in enumerate(columns[1:], start=1):
        abnormality, star, location = column.partition("*")
        if not (star and location and abnormality in places):
            raise ValueError(
                f"{path.name}: column {column!r} is not <abnormality>*<location> with one of the "
                f"{len(places)} abnormalities{nearest(abnormality, places)}."
            )
        places[abnormality].append(index)
    missing = [name for name, indices in places.items() if not indices]
    if missing:
        raise ValueError(
            f"{path.name} has no column '{missing[0]}*<location>' ({len(missing)} of {len(places)} abnormalities are "
            "missing); fetch the file again."
        )
    return places


def read_patients(path: Path) -> dict[str, str]:
    """Id -> patient.

    Raises:
        ValueError: If a column is missing, or a scan belongs to nobody or to two patients.
    """
    _, rows = read_csv(path, [ID, PATIENT])
    patients: dict[str, str] = {}
    for row in rows:
        if not row[PATIENT]:
            raise ValueError(f"{path.name}, line {row.line}: {PATIENT} is empty; splits are by patient.")
        if patients.setdefault(row[ID], row[PATIENT]) != row[PATIENT]:
            raise ValueError(f"{path.name}, line {row.line}: the scan {row[ID]!r} belongs to two patients.")
    return patients


# Geometry


def affine_of(orientation: str, spacing: Sequence[float]) -> tuple[tuple[float, ...], ...]:
    """Stored indices to mm in RAS+, the first voxel at 0 mm.

    Args:
        orientation: Where the stored axes grow to, e.g. "IPL".
        spacing: mm along the stored axes.

    Raises:
        ValueError: If the letters do not name three different axes, or a spacing is not above 0.
    """
    letters = orientation.upper()
    if len(letters) != 3 or sorted(DIRECTIONS.get(letter, (-1, 0))[0] for letter in letters) != [0, 1, 2]:
        raise ValueError(f"--stored_orientation {orientation!r} must have one letter of each of R/L, A/P and S/I.")
    if not all(0 < step < np.inf for step in spacing):
        raise ValueError(f"--stored_spacing {list(spacing)}: every step must be above 0 mm.")
    affine = np.zeros((4, 4))
    affine[3, 3] = 1
    for axis, (letter, step) in enumerate(zip(letters, spacing)):
        world, sign = DIRECTIONS[letter]
        affine[world, axis] = sign * step
    return tuple(tuple(float(value) for value in line) for line in affine)


def check_geometry(cases: Sequence[Case], orientation: str, count: int) -> str:
    """Look in the first volumes whether their axes are what they are taken for; returns what was seen, in words.

    Raises:
        ValueError: If slices are not square, or most tables would lie before the patients.
    """
    sides = []
    for case in [case for case in cases if case.skip_reason is None][:count]:
        try:
            with notes_alone(), local_copy(case.volume) as path:
                volume = read_volume(path, np.array(case.affine))
        except (BadVolumeError, SourceGoneError):  # the build says it of this case
            continue
        _, height, width = volume.array.shape
        if height != width:
            raise ValueError(
                f"{case.volume.name}: with --stored_orientation {orientation} the slices are {height} x {width} "
                "voxels, but the release's are square: the axes stand in another order. Give it, or --check 0."
            )
        sides.append(table_side(volume))
    seen, before = sum(side != 0 for side in sides), sum(side < 0 for side in sides)
    if 2 * before > seen:
        raise ValueError(
            f"in {before} of {seen} volumes the table lies before the patient: in --stored_orientation {orientation}, "
            "P and A are exchanged (or depth and height are). Give another one, or --check 0 if these patients lie on "
            "their belly."
        )
    if not sides:
        return "No volume was looked at."
    return f"Of {len(sides)} volumes looked at, {seen} show the table, {seen - before} of them behind the patient."


def table_side(volume: Volume) -> int:
    """Where the table lies: 1 at the high end of the height axis, as LPS has it; -1 at the low end; 0 if not seen.

    In a plane, the table is matter apart from the body, and wholly above or below it. (The spine tells less: in scans
    with contrast, and in narrow fields of view, most of what is as dense lies before it.)
    """
    from scipy import ndimage

    planes = volume.array[:: max(1, volume.array.shape[0] // PLANES_TO_LOOK_AT)]
    sides = []
    for plane in planes:
        pieces, _ = ndimage.label(plane > MATTER_HU)
        sizes = np.bincount(pieces.ravel())
        sizes[0] = 0  # air
        if not sizes.any():
            continue
        rows, columns = np.nonzero(pieces == sizes.argmax())
        others = np.nonzero((pieces > 0) & (pieces != sizes.argmax()))[0]
        below, above = (others > rows.max()).sum(), (others < rows.min()).sum()
        if max(below, above) >= LEAST_TABLE * np.ptp(columns):
            sides.append(1 if below > above else -1)
    return int(np.sign(sum(sides))) if len(sides) >= LEAST_PLANES * len(planes) else 0


# Cases


def find_cases(
    source: Source,
    masks: Path | None,
    splits: Mapping[str, Sequence[str]],
    label_map: LabelMap,
    affine: tuple[tuple[float, ...], ...],
    numbering: str = "totalsegmentator_v2",
    is_hashed: bool = False,
) -> list[Case]:
    """The scans of the release.

    Args:
        source: The release.
        masks: Folder of masks, or None where none are needed (yet).
        splits: Split -> its sets, of `SETS`.
        label_map: From `load_label_map`.
        affine: Of the stored arrays, from `affine_of`.
        numbering: Of multilabel masks.
        is_hashed: Whether the ids are going to be hashed: reasons then speak of "its id", and name none.

    Raises:
        ValueError: If a table is missing or broken.
    """
    by_name: dict[str, list[str]] = {}
    files = source.files("")
    for name in files:
        by_name.setdefault(PurePosixPath(name).name, []).append(name)
    archive = list_archive(masks) if masks is not None else None
    summary = the_file(SUMMARY_TABLE, by_name, files, is_needed=False)
    patients = None
    if summary is not None:
        with local_copy(summary) as path:
            patients = read_patients(path)

    cases: dict[str, Case] = {}
    for split, sets in splits.items():
        for name_of_set in sets:
            with local_copy(the_file(LABEL_TABLE.format(name_of_set), by_name, files)) as path:
                labels = read_label_table(path, label_map)
            for name, values in labels.items():
                if name in cases:
                    raise ValueError(
                        f"{LABEL_TABLE.format(name_of_set)}: the {ID} {name!r} stands in another set, too."
                    )
                places = by_name.get(f"{name}.npz", [])
                mask, no_mask = None, None
                if archive is not None:
                    found = find_mask(None, name, archive, None, is_hashed, has_table=False)
                    mask, no_mask = found.place, found.reason
                reasons = {
                    "volume file is missing: no .npz file is named as its id": not places,
                    f"{len(places)} .npz files are named as its id; leave one": len(places) > 1,
                    f"{SUMMARY_TABLE} does not say whose scan it is": patients is not None and name not in patients,
                    no_mask: no_mask is not None,
                }
                cases[name] = Case(
                    split=split,
                    patient_id=name if patients is None else patients.get(name, name),
                    scan_id=name,
                    recon_id=name,
                    volume=files[places[0]] if places else None,
                    mask=mask,
                    numbering=STRUCTURES if mask is not None and mask.is_dir() else numbering,
                    labels=values,
                    skip_reason=next((reason for reason, holds in reasons.items() if holds), None),
                    affine=affine,
                )
    return list(cases.values())


def the_file(
    name: str, by_name: Mapping[str, list[str]], files: Mapping[str, Path | RemoteFile], is_needed: bool = True
) -> Path | RemoteFile | None:
    """The one file of that name in the source.

    Raises:
        ValueError: If there are several, or none where one is needed.
    """
    places = by_name.get(name, [])
    if len(places) > 1:
        raise ValueError(f"--source holds {name} {len(places)} times: {places[:4]}; leave one.")
    if not places and is_needed:
        others = {LABEL_TABLE.format(name_of_set) for name_of_set in SETS}
        tables = [other for other in by_name if other.endswith(".csv") and other not in others]
        raise ValueError(
            f"--source: there is no file {name}{nearest(name, tables)}. Fetch it, or leave its set out of --train_sets "
            "and --validation_sets."
        )
    return files[places[0]] if places else None


def write_nifti(cases: Sequence[Case], folder: Path) -> int:
    """Write volumes as NIfTI under their ids; returns the exit status. What is there is not written again.

    Raises:
        BuildStopped: If a disk is full or the source is gone; the same command continues.
    """
    from rich.progress import track

    folder.mkdir(parents=True, exist_ok=True)
    written, told = 0, {case.recon_id: case.skip_reason for case in cases if case.skip_reason is not None}
    watch = SourceWatch(cases)
    for case in track(cases, "writing NIfTI", console=console):
        target = folder / f"{case.recon_id}.nii.gz"
        if case.recon_id in told or target.exists():
            continue
        item, volume = read_for_nifti(case)
        watch.check(item)
        if volume is None:
            told[case.recon_id] = item.skip_reason
            continue
        save_nifti(volume, target)
        written += 1
        for note in volume.notes:
            console.print(f"  check {case.recon_id}: {note}", style="yellow", markup=False)
    for name, reason in told.items():
        console.print(f"  skipped {name}: {reason}", style="yellow", markup=False)
    console.print(
        f"{counted(written, 'volume')} written to {folder}, {len(told):,} skipped; segment them, and give the masks as "
        "--masks",
        soft_wrap=True,
        markup=False,
    )
    return 0 if any(folder.glob("*.nii.gz")) else 1


def read_for_nifti(case: Case) -> tuple[BuiltRow, Volume | None]:
    """What came of reading one volume, told as a build tells it, and the volume."""
    try:
        with notes_alone(), local_copy(case.volume) as place:
            folder = f"{place.parent}{os.sep}"
            return BuiltRow(case.recon_id), read_volume(place, np.array(case.affine))
    except SourceGoneError:
        return vanished(case, "volume"), None
    except ValueError as error:
        return BuiltRow(case.recon_id, skip_reason=str(error).replace(folder, "")), None
    except OSError as error:
        if is_disk_full(error):  # of the copy from a remote source: --out is not written to here
            return BuiltRow(case.recon_id, stop_reason=temporary_disk_is_full()), None
        return BuiltRow(case.recon_id, stop_reason=f"{case.recon_id}: {error}"), None


def save_nifti(volume: Volume, target: Path) -> None:
    """Write a volume so that it is there whole or not at all."""
    import nibabel

    temporary = target.with_name(f".{target.name}")  # must end in .nii.gz, or nibabel does not compress
    try:
        nibabel.save(nibabel.Nifti1Image(np.ascontiguousarray(volume.array.T), as_stored(volume.affine)), temporary)
        replace_durably(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def run(args: argparse.Namespace) -> int:
    if both := sorted(set(args.train_sets) & set(args.validation_sets)):
        raise ValueError(f"{both[0]} stands in --train_sets and in --validation_sets; its scans can be in one split.")
    if args.masks is None and not args.nifti:
        raise ValueError("give --masks; the release has none. --nifti writes the volumes for TotalSegmentator.")
    if args.masks is not None and not args.masks.is_dir():
        raise ValueError(f"--masks: there is no folder {args.masks}.")
    if args.check < 0:
        raise ValueError(f"--check {args.check} must be at least 0.")
    affine = affine_of(args.stored_orientation, args.stored_spacing)
    label_map = load_label_map()
    source = open_source(args.source, args.out)
    splits = {"train": args.train_sets, "validation": args.validation_sets}
    cases = find_cases(source, args.masks, splits, label_map, affine, args.numbering, args.ids == "hashed")
    if args.nifti:
        with stopping_cleanly(args.out):
            # Before days of segmentation, not after them.
            console.print(check_geometry(cases, args.stored_orientation, args.check), soft_wrap=True)
            return write_nifti(cases, args.out)
    numberings: dict = {args.numbering: args.numbering}
    if any(case.numbering == STRUCTURES for case in cases):
        numberings[STRUCTURES] = dict(enumerate(STRUCTURE_NAMES, start=1))
    options = {
        "sets": {split: sorted(sets) for split, sets in splits.items()},
        "stored_orientation": args.stored_orientation.upper(),
        "stored_spacing": list(args.stored_spacing),
        "label_map": label_map.name,
    }
    if not source.is_local:
        options |= {"source": source.label, "revision": source.revision}
    if all(case.patient_id == case.recon_id for case in cases):  # there is no table of patients
        options["splits_by"] = "id"
    settings = settings_from_args(args, "rad_chest_ct", numberings=numberings, **options)
    spacing = " x ".join(f"{step:g}" for step in args.stored_spacing)
    console.print(
        f"The volumes carry no geometry; taken as {args.stored_orientation.upper()}, {spacing} mm.",
        check_geometry(cases, args.stored_orientation, args.check),
        "Left and right cannot be told from voxels: look at the previews.",
        soft_wrap=True,
    )
    return build(cases, settings, args)
