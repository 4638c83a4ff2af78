"""Build a processed split from CT-RATE: its Hub repository, a mirror anywhere fsspec reaches, or a folder.

Two recon kernels of a scan say the same, so the first of each scan is taken by default:
    python -m data_builders ct_rate --source CT-RATE --out out/ct_rate --organs body_24

Straight from the Hub (accept the terms there and `hf auth login` first), the best reconstruction of each scan:
    python -m data_builders ct_rate --source hf://datasets/ibrahimhamamci/CT-RATE --out out/ct_rate \\
        --splits validation --reconstructions best

Captions by organ of the published release in the place of ours, and labels from the reports where they are missing:
    python -m data_builders ct_rate --source CT-RATE --out out/ct_rate --organs chest_4 --desc_info desc_info.json \\
        --conc_info conc_info.json --labels ct_rate_18 --unmentioned absent

The source holds `dataset/` as on the Hub (or is that folder itself):
    {train,valid}_fixed/train_1/train_1_a/train_1_a_1.nii.gz               volumes with corrected headers
    {train,valid}/train_1/train_1_a/train_1_a_1.nii.gz                     original volumes, for --volumes original
    ts_seg/ts_total/{train,valid}_fixed/.../train_1_a_1.nii.gz             masks, TotalSegmentator v2 numbering
    radiology_text_reports/{train,validation}_reports.csv                  reports
    multi_abnormality_labels/{train,valid}_predicted_labels.csv            labels (may be absent, see --labels)
    metadata/no_chest_{train,valid}.txt                                    volumes that show no chest (may be absent)
    metadata/{train,validation}_metadata.csv                               for --volumes original, and for "best"
A volume or mask that is missing is skipped, counted and listed in the manifest. What is left out on purpose (a volume
that shows no chest, a reconstruction that was not chosen) is listed there as well, and marked `is_excluded`.
Licence of the source: CC BY-NC-SA 4.0, and its gate forbids handing it on; that holds for what is built from it.

--volumes original: the headers of these files are blank and their values are no HU yet. Both come from the metadata.
The affine is the one that the corrected release carries (`repair_header` of modeling_fvlm/published_preparation.py),
because the masks were made on that release: an original volume has the same voxels in the same stored order as its
corrected file, so it lies on the mask's grid, and the build still checks that by the mask's own header. The corrected
release writes the two in-plane directions as rows where columns are meant. For a patient who lies straight, or is
mirrored along axes, that is the same; a small turn goes the other way round, without a consequence for arrays that are
read along the closest axes; a scan turned by more than 30 degrees would come out on other axes than it was taken, and
is skipped. Slope and intercept are declared, not imposed: `--rescale auto` applies them where the voxels are no HU yet.

--reconstructions best, decided from the metadata, in this order:
    (1) complete: covers at least nine tenths of the longest reconstruction of the scan (NumberofSlices x ZSpacing)
    (2) slices that fit the voxels of the split: from a third of --spacing's depth up to it. Thinner ones are noise and
        reading time that resampling throws away, and come second; thicker ones lose what the voxels could show
    (3) a soft-tissue kernel before one that is not known, and that before a sharp one (lung, bone)
    (4) of thin enough slices the thinnest, of too thin or too thick ones those nearest to the voxels; then the first
The manifest says of every other reconstruction which one is better and why. Without metadata the first is taken.
"""

import argparse
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path, PurePosixPath

import numpy as np

from modeling_fvlm.defaults import DEFAULT_SPACING
from modeling_fvlm.geometry import MAX_AXIS_COSINE, BadVolumeError
from modeling_fvlm.processed_split import natural_key
from modeling_fvlm.published_preparation import repair_header

from .build import add_build_arguments, add_label_arguments, build, settings_from_args
from .cases import SPLITS, Case, OrganText, Row, counted, read_csv, read_label
from .folder_reports import check_ready_captions, read_ready_captions
from .progress import open_source
from .sources import Source, local_copy

logger = logging.getLogger(__name__)

FOLDER_OF_SPLIT = {"train": "train", "validation": "valid"}  # the Hub mixes both spellings, see split_cases below
VOLUMES = ("fixed", "original")
RECONSTRUCTIONS = ("first", "all", "best")
VOLUME_NAME = re.compile(r"((?:train|valid)_\d+)_([a-zA-Z]+)_(\d+)\.nii\.gz")
REPORT_COLUMNS = ("VolumeName", "Findings_EN", "Impressions_EN")
NOT_GIVEN = {"", "not given", "not given.", "nan"}  # how an empty section is written there
# Not in dataset/ts_seg of the release itself.
MISSING_MASKS = {"train_1267_a_4", "train_11755_a_3", "train_11755_a_4"}

# Column -> how many numbers stand in a cell.
HEADER_COLUMNS = {
    "XYSpacing": 2,
    "ZSpacing": 1,
    "ImageOrientationPatient": 6,
    "ImagePositionPatient": 3,
    "RescaleSlope": 1,
    "RescaleIntercept": 1,
}
QUALITY_COLUMNS = ("ZSpacing", "NumberofSlices", "ConvolutionKernel")

LEAST_COVERAGE = 0.9  # of the longest reconstruction: kernels differ by a few slices at the ends
THINNEST_USEFUL = 1 / 3  # of the voxel's depth
KERNEL_RANK = {"soft": 0, "unknown": 1, "sharp": 2}
SHARP_WORDS = ("lung", "bone", "sharp", "edge", "detail")
SOFT_WORDS = ("soft", "stand", "std", "mediast", "chst")
SIEMENS_KERNEL = re.compile(r"[BHIJQTU]([a-z]?)(\d\d)[a-z]*")  # B30f, I31f, Br40d, Bl57d: family, sharpness, variant
CANON_KERNEL = re.compile(r"FC(\d\d)[A-Z]*")
PHILIPS_KERNELS = {
    **dict.fromkeys(("A", "B", "SA", "SB"), "soft"),
    **dict.fromkeys(("D", "E", "L", "YC", "YD", "YL"), "sharp"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("source")
    group.add_argument(
        "--source",
        required=True,
        help="Folder in CT-RATE's layout, or where fsspec finds one: hf://datasets/ibrahimhamamci/CT-RATE (a revision "
        "as ...CT-RATE@REVISION), s3://bucket/CT-RATE, ... Volumes of a remote source are fetched one at a time.",
    )
    group.add_argument(
        "--splits",
        nargs="+",
        choices=list(FOLDER_OF_SPLIT),
        default=list(FOLDER_OF_SPLIT),
        help="Splits to build (default: both); CT-RATE's `valid` becomes `validation`.",
    )
    group.add_argument(
        "--reconstructions",
        choices=RECONSTRUCTIONS,
        default="first",
        help="Of each scan the first reconstruction whose files are there, all, or the best by the metadata, as told "
        "above (default: first).",
    )
    group.add_argument(
        "--volumes",
        choices=VOLUMES,
        default="fixed",
        help="fixed: the volumes with corrected headers. original: the uncorrected ones, with geometry and rescale "
        "from the metadata, as told above (default: fixed).",
    )
    group.add_argument(
        "--desc_info",
        type=Path,
        metavar="FILE",
        help="desc_info.json of the published release: what the findings of a scan say of each organ, in the place of "
        "our rules. Needs --conc_info. A scan that neither file has is skipped.",
    )
    group.add_argument(
        "--conc_info",
        type=Path,
        metavar="FILE",
        help="conc_info.json: what the impression says of each organ. An organ it speaks of is abnormal.",
    )
    add_label_arguments(parser)
    add_build_arguments(parser, organs="body_24")


# Tables of the release


def section(text: str) -> str:
    """A section of a report, empty where CT-RATE writes that it was not given."""
    return "" if text.strip().lower() in NOT_GIVEN else text.strip()


def release_root(source: Source) -> str:
    """What stands before every name of the release: "dataset/", or nothing where the source is that folder itself."""
    return "dataset/" if source.has_folder("dataset") else ""


def read_table(source: Source, name: str, required: Sequence[str] = ()) -> tuple[list[str], list[Row]]:
    """Columns and rows of a CSV file of the release; as `read_csv`."""
    file = source.file(name)
    if file is None:
        raise ValueError(f"--source ({source.label}): there is no file {name}.")
    with local_copy(file) as path:
        return read_csv(path, required)


def read_labels(source: Source, name: str) -> dict[str, tuple[tuple[str, int], ...]]:
    """Volume name -> its labels in the order of the columns; empty where the release was fetched without labels."""
    if source.file(name) is None:
        return {}
    columns, rows = read_table(source, name, ["VolumeName"])
    findings = [column for column in columns if column != "VolumeName"]
    file_name = PurePosixPath(name).name
    return {
        row["VolumeName"]: tuple(
            (finding, read_label(row[finding], f"{file_name}, line {row.line}, column {finding!r}"))
            for finding in findings
        )
        for row in rows
    }


def read_no_chest(source: Source, name: str) -> set[str]:
    """Names of volumes that show no chest, without ending; the list may carry folders in front of the names."""
    file = source.file(name)
    if file is None:
        return set()
    with local_copy(file) as path:
        try:
            words = path.read_text(encoding="utf-8").split()
        except UnicodeDecodeError as error:
            raise ValueError(f"{path.name} is not UTF-8 ({error}); save it as UTF-8.") from None
    names = (PurePosixPath(word.strip(",\"'")).name for word in words)
    return {name.removesuffix(".gz").removesuffix(".nii") for name in names}


def read_metadata(source: Source, name: str, columns: Iterable[str]) -> dict[str, dict[str, str] | None]:
    """Volume name -> its cells in these columns; None where two rows of one volume contradict each other."""
    columns = list(columns)
    _, rows = read_table(source, name, ["VolumeName", *columns])
    metadata: dict[str, dict[str, str] | None] = {}
    for row in rows:
        cells = {column: row[column] for column in columns}
        volume = row["VolumeName"]
        metadata[volume] = cells if metadata.get(volume, cells) == cells else None
    return metadata


def numbers(cell: str) -> list[float]:
    """The numbers of a cell: "-1024", or a list as Python writes it, "[0.34, 0.34]"; empty where one is none."""
    try:
        return [float(part.strip(" '\"")) for part in cell.strip(" []()").split(",")]
    except ValueError:
        return []


def header_of(row: Mapping[str, str]) -> tuple[tuple[tuple[float, ...], ...], tuple[float, float]]:
    """What the blank header of an original volume should say.

    Args:
        row: The columns `HEADER_COLUMNS` of its metadata.

    Returns:
        The affine, 4 x 4, stored indices (x, y, z) to mm in RAS+, as the corrected release has it; and the declared
        (slope, intercept).

    Raises:
        BadVolumeError: If a value is missing or impossible, or the scan is turned so far that the corrected release
            (on which its mask was made) has it on the wrong axes.
    """
    values = {}
    for column, count in HEADER_COLUMNS.items():
        values[column] = numbers(row[column])
        if len(values[column]) != count or not np.isfinite(values[column]).all():
            wanted = "a finite number" if count == 1 else f"{count} finite numbers"
            raise BadVolumeError(f"{column} is {row[column]!r}, not {wanted}")
    for column in ("XYSpacing", "ZSpacing"):
        if min(values[column]) <= 0:
            raise BadVolumeError(f"{column} is {row[column]}; it must be above 0 mm")
    (slope,), (intercept,), (z_spacing,) = values["RescaleSlope"], values["RescaleIntercept"], values["ZSpacing"]
    if slope == 0:
        raise BadVolumeError("RescaleSlope is 0")
    orientation = values["ImageOrientationPatient"]
    along_x, along_y = np.reshape(orientation, (2, 3))
    directions = np.stack([along_x, along_y, np.cross(along_x, along_y)])  # rows
    if np.abs(directions @ directions.T - np.eye(3)).max() > MAX_AXIS_COSINE:
        raise BadVolumeError(f"ImageOrientationPatient is {orientation}, not two directions at right angles")
    if (np.rint(directions) != np.rint(directions.T)).any():
        raise BadVolumeError(
            f"ImageOrientationPatient is {orientation}: the scan is turned by more than 30 degrees, and the corrected "
            "release, on which its mask was made, turns such a scan the wrong way"
        )
    # The voxels are not here yet. They have no part in the affine.
    _, affine = repair_header(
        np.zeros((1, 1, 1), np.int16),
        rescale_slope=1,
        rescale_intercept=0,
        xy_spacing=values["XYSpacing"],
        z_spacing=z_spacing,
        orientation=orientation,
        position=values["ImagePositionPatient"],
    )
    return tuple(tuple(float(value) for value in line) for line in affine), (slope, intercept)


# Cases


def find_cases(
    source: Source,
    splits: Sequence[str] = SPLITS,
    reconstructions: str = "first",
    volumes: str = "fixed",
    slice_mm: float = DEFAULT_SPACING[0],
) -> list[Case]:
    """The cases of a release: one listing per folder, no volume is opened and none is asked for by itself.

    Args:
        source: Holds `dataset/`, or is that folder.
        splits: Of "train" and "validation".
        reconstructions: Of each scan "first", "all" or "best".
        volumes: "fixed" (corrected headers) or "original" (geometry and rescale from the metadata).
        slice_mm: Depth of the voxels that will be made, for "best".

    Raises:
        ValueError: If a table or a folder of volumes is missing or broken.
    """
    cases = [case for split in splits for case in split_cases(source, split, reconstructions, volumes, slice_mm)]
    return mark_duplicates(cases)


def split_cases(
    source: Source | Path,
    split: str,
    reconstructions: str,
    volumes: str = "fixed",
    slice_mm: float = DEFAULT_SPACING[0],
) -> list[Case]:
    """The cases of one split, from the rows of its reports file; a plain folder will do as the source."""
    for name, value, known in (("reconstructions", reconstructions, RECONSTRUCTIONS), ("volumes", volumes, VOLUMES)):
        if value not in known:
            raise ValueError(f"{name} {value!r} is none of {list(known)}.")
    source = source if isinstance(source, Source) else Source(source)
    root, folder = release_root(source), FOLDER_OF_SPLIT[split]
    is_original = volumes == "original"
    volume_folder = f"{root}{folder}" if is_original else f"{root}{folder}_fixed"
    if not source.has_folder(volume_folder):
        mend = f"Fetch it, or leave {split!r} out of --splits."
        other = f"{root}{folder}_fixed" if is_original else f"{root}{folder}"
        if source.has_folder(other):
            headers, choice = ("corrected", "fixed") if is_original else ("blank", "original")
            mend = f"{other}/ holds the volumes with {headers} headers: give --volumes {choice}. {mend}"
        raise ValueError(f"--source ({source.label}): there is no folder {volume_folder}. {mend}")
    # Reports and metadata say "validation"; volumes, masks, labels and the list of scans without a chest say "valid".
    report_file = f"{root}radiology_text_reports/{split}_reports.csv"
    metadata_file = f"{root}metadata/{split}_metadata.csv"
    _, reports = read_table(source, report_file, REPORT_COLUMNS)
    labels = read_labels(source, f"{root}multi_abnormality_labels/{folder}_predicted_labels.csv")
    no_chest = read_no_chest(source, f"{root}metadata/no_chest_{folder}.txt")
    metadata: dict[str, dict[str, str] | None] = {}
    if is_original or (reconstructions == "best" and source.file(metadata_file) is not None):
        columns = [*(HEADER_COLUMNS if is_original else ()), *(QUALITY_COLUMNS if reconstructions == "best" else ())]
        metadata = read_metadata(source, metadata_file, dict.fromkeys(columns))
    volume_files = source.files(volume_folder)
    mask_files = source.files(f"{root}ts_seg/ts_total/{folder}_fixed")

    cases = {}
    for row in reports:
        name = row["VolumeName"]
        place = f"{PurePosixPath(report_file).name}: VolumeName {name!r}"
        match = VOLUME_NAME.fullmatch(name)
        if match is None:
            raise ValueError(f"{place} is not of the form train_1_a_1.nii.gz.")
        if name in cases:
            raise ValueError(f"{place} comes twice; every reconstruction needs its own row.")
        patient_id, recon_id = match[1], name.removesuffix(".nii.gz")
        scan_id = f"{patient_id}_{match[2]}"
        inside = f"{patient_id}/{scan_id}/{name}"
        findings, impression = section(row["Findings_EN"]), section(row["Impressions_EN"])
        affine, rescale, no_header = None, None, None
        if is_original:
            affine, rescale, no_header = declared_header(metadata, name)
        is_never_masked = recon_id in MISSING_MASKS and inside not in mask_files
        reasons = {
            "shows no chest (listed in the release)": recon_id in no_chest,
            "report is empty": not findings and not impression,
            "volume file is missing": inside not in volume_files,
            "mask is missing in the release": is_never_masked,
            "mask file is missing": inside not in mask_files,
            f"{PurePosixPath(metadata_file).name}: {no_header}": no_header is not None,
        }
        cases[name] = Case(
            split=split,
            patient_id=patient_id,
            scan_id=scan_id,
            recon_id=recon_id,
            volume=volume_files.get(inside),
            mask=mask_files.get(inside),
            numbering="totalsegmentator_v2",
            findings=findings,
            impression=impression,
            labels=labels.get(name, ()),
            skip_reason=next((reason for reason, holds in reasons.items() if holds), None),
            is_excluded=recon_id in no_chest or is_never_masked,
            affine=affine,
            rescale=rescale,
        )
    found = list(cases.values())
    if reconstructions == "best":
        return best_reconstructions(found, metadata, slice_mm)
    return found if reconstructions == "all" else first_reconstructions(found)


def declared_header(metadata: Mapping[str, Mapping[str, str] | None], name: str):
    """Affine, rescale and None of an original volume, or None, None and why there are none."""
    row = metadata.get(name)
    if row is None:
        why = "two rows of this volume contradict each other" if name in metadata else "there is no row of this volume"
        return None, None, why
    try:
        return *header_of(row), None
    except BadVolumeError as error:
        return None, None, str(error)


def first_reconstructions(cases: list[Case]) -> list[Case]:
    """Of each scan the first reconstruction that can be built; those before it keep their reasons, the others after it
    are left out.
    """
    chosen, served = [], {}
    for case in sorted(cases, key=lambda case: natural_key(case.recon_id)):
        if case.scan_id in served:
            reason = f"another reconstruction of this scan, {served[case.scan_id]!r}, comes first"
            case = left_out(case, reason)
        elif case.skip_reason is None:
            served[case.scan_id] = case.recon_id
        chosen.append(case)
    return chosen


def left_out(case: Case, reason: str) -> Case:
    """A case that is not built because another one was chosen; its files are not looked at."""
    return replace(case, skip_reason=reason, is_excluded=True, volume=None, mask=None)


# The best reconstruction


@dataclass(frozen=True)
class Quality:
    """How well a reconstruction serves: the lower `rank`, the better; `words` say why."""

    rank: tuple
    words: str


def kernel_kind(kernel: str) -> str:
    """How sharp a convolution kernel is, by its maker's name for it: "soft", "sharp" or "unknown".

    Siemens and Canon number them (B30f, Br40d, FC08; lung and bone from 50 on, FC30 to FC39 likewise; Bl57d is for the
    lung by its letter), Philips has letters, GE and others words.
    """
    name = re.split(r"[\\/,]", kernel.strip(" []()'\""))[0].strip(" '\"")
    siemens, canon = SIEMENS_KERNEL.fullmatch(name), CANON_KERNEL.fullmatch(name)
    if siemens:
        return "sharp" if siemens[1] == "l" or int(siemens[2]) >= 50 else "soft"
    if canon:
        return "sharp" if 30 <= int(canon[1]) < 40 or int(canon[1]) >= 50 else "soft"
    lowered = name.lower()
    if any(word in lowered for word in SHARP_WORDS):
        return "sharp"
    if any(word in lowered for word in SOFT_WORDS):
        return "soft"
    return PHILIPS_KERNELS.get(name, "unknown")


def extent_mm(row: Mapping[str, str] | None) -> float:
    """What a reconstruction covers along the body; 0 where the metadata do not say."""
    count, step = (numbers(row[column]) if row else [] for column in ("NumberofSlices", "ZSpacing"))
    extent = count[0] * step[0] if len(count) == len(step) == 1 else 0.0
    return extent if 0 < extent < np.inf else 0.0


def quality_of(row: Mapping[str, str] | None, longest_mm: float, slice_mm: float) -> Quality | None:
    """Judge a reconstruction by its metadata, as told at the head of this file; None where these say too little.

    Args:
        row: The columns `QUALITY_COLUMNS`.
        longest_mm: Extent of the longest reconstruction of the scan.
        slice_mm: Depth of the voxels of the split.
    """
    step = numbers(row["ZSpacing"]) if row else []
    if len(step) != 1 or not 0 < step[0] < np.inf:
        return None
    covered = extent_mm(row)
    is_partial = covered < LEAST_COVERAGE * longest_mm
    if step[0] > slice_mm * 1.01:  # 3.0000001 mm in a header are 3 mm
        slices = (2, step[0])
    elif step[0] < slice_mm * THINNEST_USEFUL / 1.01:
        slices = (1, -step[0])
    else:
        slices = (0, step[0])
    kernel = kernel_kind(row["ConvolutionKernel"])
    words = f"{step[0]:g} mm slices, {kernel} kernel"
    if is_partial:
        words += f", {covered:.0f} of {longest_mm:.0f} mm" if covered else ", unknown extent"
    return Quality((is_partial, slices[0], KERNEL_RANK[kernel], slices[1]), words)  # (1) (2) (3) (4)


def best_reconstructions(
    cases: Iterable[Case], metadata: Mapping[str, Mapping[str, str] | None], slice_mm: float
) -> list[Case]:
    """Of each scan the best reconstruction that can be built; the others are excluded, each with its reason."""
    chosen, without_metadata = [], 0
    ordered = sorted(cases, key=lambda case: natural_key(case.recon_id))
    for _, group in groupby(ordered, key=lambda case: case.scan_id):
        members = list(group)
        usable = [case for case in members if case.skip_reason is None]
        rows = {case.recon_id: metadata.get(f"{case.recon_id}.nii.gz") for case in usable}
        longest_mm = max(map(extent_mm, rows.values()), default=0.0)
        judged = {recon_id: quality_of(row, longest_mm, slice_mm) for recon_id, row in rows.items()}
        # min takes the first of equals; what has no metadata comes after all that have.
        best = min(
            usable,
            key=lambda case: (0, judged[case.recon_id].rank) if judged[case.recon_id] else (1, ()),
            default=None,
        )
        if len(usable) > 1 and judged[best.recon_id] is None:
            without_metadata += 1
        for case in members:
            if case.skip_reason is None and case is not best:
                reason = why_better(best.recon_id, judged[best.recon_id], judged[case.recon_id])
                case = left_out(case, reason)
            chosen.append(case)
    if without_metadata:
        told = counted(without_metadata, "scan that has", "scans that have")
        logger.warning(
            f"--reconstructions best: there are no metadata of {told} several reconstructions; the first one is taken."
        )
    return chosen


def why_better(recon_id: str, best: Quality | None, other: Quality | None) -> str:
    """Why another reconstruction of a scan was taken."""
    # The id in quotes: where ids are hashed, what stands in quotes is left out of a reason.
    taken = f"another reconstruction of this scan, {recon_id!r}, is"
    if best is None:
        return f"{taken} the first, and there are no metadata to choose by"
    if other is None:
        return f"{taken} taken ({best.words}); of this one there are no metadata"
    if best.rank == other.rank:
        return f"{taken} as good and comes first ({best.words})"
    return f"{taken} better ({best.words}; here {other.words})"


def mark_duplicates(cases: Sequence[Case]) -> list[Case]:
    """The cases in their order; one whose report has the words of another scan's names the first case with them.

    Reconstructions of one scan share its report, and are no duplicates.
    """
    first: dict[tuple[str, str], Case] = {}
    for case in sorted(cases, key=lambda case: (SPLITS.index(case.split), natural_key(case.recon_id))):
        if case.skip_reason is None:
            first.setdefault(words_of(case), case)
    marked = []
    for case in cases:
        origin = first.get(words_of(case)) if case.skip_reason is None else None
        is_duplicate = origin is not None and origin.scan_id != case.scan_id
        marked.append(replace(case, duplicate_of=origin.recon_id) if is_duplicate else case)
    return marked


def words_of(case: Case) -> tuple[str, str]:
    """Both sections of a report without differences of white space."""
    return " ".join(case.findings.split()), " ".join(case.impression.split())


def with_ready_captions(
    cases: Iterable[Case], captions: Mapping[str, Mapping[str, OrganText]], files: Sequence[Path]
) -> list[Case]:
    """The cases with captions that are ready, by their scan; one whose scan has none is skipped."""
    reason = f"there are no captions of its scan in {' and '.join(file.name for file in files)}"
    return [
        replace(case, organ_texts=dict(captions[case.scan_id]))
        if case.scan_id in captions
        else replace(case, skip_reason=case.skip_reason or reason)
        for case in cases
    ]


def run(args: argparse.Namespace, source: Source | None = None) -> int:
    """Build the split; a `source` that is open already (with a token of its own, say) stands for --source."""
    check_ready_captions(args)
    source = source or open_source(args.source, args.out)
    ready = [path for path in (args.desc_info, args.conc_info) if path is not None]
    options = {"splits": sorted(args.splits), "reconstructions": args.reconstructions}
    # Only what departs from a folder of corrected volumes, so that a build begun before these came can be continued.
    if args.volumes != "fixed":
        options["volumes"] = args.volumes
    if not source.is_local:
        options |= {"source": source.label, "revision": source.revision}
    if ready:
        options["ready_captions"] = [path.name for path in ready]
    settings = settings_from_args(args, "ct_rate", **options)
    captions = read_ready_captions(*ready, settings.organ_set.organs) if ready else None
    cases = find_cases(source, args.splits, args.reconstructions, args.volumes, args.spacing[0])
    if captions is not None:
        cases = with_ready_captions(cases, captions, ready)
    return build(cases, settings, args)
