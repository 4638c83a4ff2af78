"""Build a processed split from your own CT volumes, organ masks, and reports or captions.

Reports in a CSV with the columns id, findings, impression; volume and mask are found by the id in their names:
    python -m data_builders folder --volumes scans --masks masks --reports reports.csv --out out/split

Other column names, and one tenth of the patients for validation:
    python -m data_builders folder --volumes scans --masks masks --reports reports.csv --out out/split \\
        --columns id=accession findings=report_text --validation_fraction 0.1 --seed 1

Reports as JSON, and a table that says which volume, mask and report belong together:
    python -m data_builders folder --volumes scans --masks masks --reports reports.json --table cases.csv \\
        --out out/split

DICOM series without masks, which TotalSegmentator makes first (pip install "fvlm[segment]"):
    python -m data_builders folder --volumes dicom --segment --reports reports.csv --out out/split

Captions by organ as the published release has them:
    python -m data_builders folder --volumes scans --masks masks --desc_info desc_info.json \\
        --conc_info conc_info.json --organs chest_4 --out out/split

Labels of CT-RATE's 18 findings out of the reports, for evaluation and for training with --targets labels:
    python -m data_builders folder --volumes scans --masks masks --reports reports.csv --labels ct_rate_18 \\
        --out out/split

Volumes: NIfTI (.nii, .nii.gz), NRRD (.nrrd, .nhdr), MetaImage (.mha, .mhd), and DICOM series as folder or zip. Masks:
one multilabel file of the first three formats, or a folder with one file per structure under TotalSegmentator's names
(p_1/liver.nii.gz or p_1/segmentations/liver.nii.gz); names that are no structure's are left out. Each is turned by its
own header; volume and mask have to lie on one grid, the order of their axes may differ. Volumes are stored in HU: the
window belongs to the model, and stands in its config.

Columns of the table (--table, or the CSV of reports itself); only `id` or `volume` must be there:
    id            name of the case; default: file name of the volume without ending
    volume, mask  file or folder inside --volumes and --masks; default: the one file, zip or folder named as the id, or
                  what a folder named as the id holds, or the same for names that go on after the id
    series        of a DICOM folder or zip with several CT series the one to read: SeriesInstanceUID or series number
    patient_id, scan_id     default: the id. Splits are by patient; without a column patient_id, by id
    split         train or validation; without this column --validation_fraction of the patients, drawn by --seed
    numbering     how the mask's labels are numbered, where this differs from case to case; default: --numbering.
                  A .yaml file lies in the folder of the table
    findings, impression    the report
    rescale_slope, rescale_intercept    what turns the volume's values into HU, where its file says nothing or the
                  wrong thing; both or neither, and not for DICOM. Subject to --rescale
    report        id of the report in --reports, or of the scan in the files of captions; default: the id or scan_id
    caption:lung, abnormal:lung    ready caption of an organ, and 1 or 0 (default: judged from the caption's words)
    label:Pleural effusion         1, 0, -1 or empty unknown; of other findings --labels looks into the report
Ids may be file names, with their ending. CSV: UTF-8, separated by commas, semicolons or tabs. What is told of broken
input, and how each kind is mended, stands in docs/bad_input.md.
JSON: a list of {"id", "findings", "impression"}, or {id: {...}}; with "organs": {organ: {"findings": [sentences],
"impression": [sentences], "abnormal": true or false}} the captions are taken from there, and with "labels": {finding:
"present", "absent", "uncertain", or 1, 0, -1} the labels: the files of `decompose` are such.
"""

import argparse
import contextlib
import math
import os
import random
import re
from collections import Counter
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import yaml

from modeling_fvlm.dicom import DicomSeries, find_series
from modeling_fvlm.organs import NUMBERINGS, STRUCTURE_NAMES, load_organ_set
from modeling_fvlm.processed_split import natural_key
from modeling_fvlm.reading import BadVolumeError, read_affine

from . import segment
from .build import Settings, add_build_arguments, add_label_arguments, build, settings_from_args
from .cases import SPLITS, Case, Row, counted, nearest, read_label, resolve_inside, sort_cases
from .folder_files import (
    STRUCTURES,
    Archive,
    find_mask,
    find_volume,
    hint,
    is_zip,
    list_archive,
    stem_of,
    without_ending,
)
from .folder_reports import (
    Report,
    captions_of_row,
    check_caption_columns,
    check_ready_captions,
    check_texts,
    read_all_info,
    read_ready_reports,
    read_reports,
    read_table,
    rows_of_names,
)
from .progress import stopping_cleanly
from .run_cases import STRUCTURES as STRUCTURES_NUMBERING
from .run_cases import label_tables
from .summary import console

SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
}
SERIES_UID = re.compile(r"\d+(\.\d+)+")
CASES_TO_COMPARE = 8  # headers read to see whether volumes and masks store their axes in one order


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("source")
    group.add_argument(
        "--volumes",
        type=Path,
        required=True,
        metavar="DIR",
        help="Folder of CT volumes: NIfTI, NRRD, MetaImage, DICOM; see above.",
    )
    group.add_argument(
        "--masks",
        type=Path,
        metavar="DIR",
        help="Folder of masks, multilabel or by structure (default: the folder of the volumes).",
    )
    group.add_argument("--reports", type=Path, metavar="FILE", help="CSV or JSON with reports or captions; see above.")
    group.add_argument(
        "--table",
        type=Path,
        metavar="FILE",
        help="CSV that says what belongs together (default: the CSV of reports).",
    )
    group.add_argument(
        "--columns",
        nargs="+",
        default=[],
        metavar="OURS=YOURS",
        help="Your names of the columns above, e.g. id=accession findings=report_text.",
    )
    group.add_argument(
        "--desc_info",
        type=Path,
        metavar="FILE",
        help="desc_info.json of the published release: what the findings say of each organ. Needs --conc_info.",
    )
    group.add_argument(
        "--conc_info",
        type=Path,
        metavar="FILE",
        help="conc_info.json: what the impression says of each organ. An organ it speaks of is abnormal.",
    )
    group.add_argument(
        "--all_info", type=Path, metavar="FILE", help="Both in one file, as a fork of the release has them."
    )
    group.add_argument(
        "--numbering",
        default="totalsegmentator_v2",
        metavar="NAME",
        help=f"Numbering of the masks: {', '.join(NUMBERINGS)}, or a YAML file of 'label: class or organ name' "
        "(default: totalsegmentator_v2). The wrong one gives wrong organs: look at the previews.",
    )
    group.add_argument(
        "--validation_fraction",
        type=float,
        default=0.1,
        metavar="PART",
        help="Part of the patients that goes to validation where the table has no column split (default: 0.1).",
    )
    group.add_argument("--seed", type=int, default=0, metavar="N", help="Seed of that draw (default: 0).")
    segment.add_arguments(parser)
    add_label_arguments(parser)
    add_build_arguments(parser, organs="body_24", ids="hashed")


@dataclass(frozen=True)
class Texts:
    """Where the texts of a case are looked up.

    Attributes:
        reports: Of --reports by their id; None where the table's rows hold them.
        captions: Of the files of the published release by scan; None without such files.
        report_file, caption_files: Their names, for messages.
    """

    reports: dict[str, Report] | None
    captions: dict[str, Report] | None
    report_file: str
    caption_files: str


def run(args: argparse.Namespace) -> int:
    check_arguments(args)
    ready = [path for path in (args.desc_info, args.conc_info, args.all_info) if path is not None]
    captions = read_captions(args, load_organ_set(args.organs).organs) if ready else None
    table_path = args.table or args.reports or ready[0]
    has_table = args.table is not None or args.reports is not None
    columns, rows = read_table(table_path, args.columns) if has_table else rows_of_names(list(captions))
    check_rows(rows, table_path)
    settings = settings_from_args(
        args,
        "folder",
        numberings=read_numberings(rows, args.numbering, table_path),
        validation_fraction=None if "split" in columns else args.validation_fraction,
        seed=None if "split" in columns else args.seed,
        **({} if "patient_id" in columns else {"splits_by": "id"}),
        **({"ready_captions": [path.name for path in ready]} if ready else {}),
    )
    # A CSV of reports that is the table itself has its texts in the rows; everything else is looked up by id.
    has_own_reports = args.reports is not None and (args.table is not None or args.reports.suffix.lower() == ".json")
    reports = read_reports(args.reports, settings) if has_own_reports else None
    if reports is None and captions is None:
        check_texts(columns, table_path)
    check_caption_columns(columns, table_path, settings)
    check_label_columns(columns, table_path, settings)
    if captions is not None and any(name.startswith("caption:") for name in columns):
        raise ValueError(f"{table_path.name} has columns caption:ORGAN beside {ready[0].name}; give captions once.")

    without = [args.out, *([args.segment_out] if args.segment else [])]
    volumes = list_archive(args.volumes, without)
    masks = volumes if args.masks in (None, args.volumes) else list_archive(args.masks, without)
    if not volumes.files and not volumes.slice_folders:
        raise ValueError(
            f"--volumes: there is no .nii.gz, .nrrd, .mha or zip file in {args.volumes}, and no folder of DICOM slices "
            "(slices need a folder of their own inside it, named as the case)."
        )
    validation = validation_patients(rows, args.validation_fraction, args.seed)
    texts = Texts(reports, captions, (args.reports or table_path).name, " and ".join(path.name for path in ready))
    cases = [read_case(row, args, settings, texts, volumes, masks, validation, table_path) for row in rows]
    cases = without_shared_volumes(cases, {case_id(row) for row in rows if row.get("volume")})
    tell_what_was_found(cases, volumes, masks, table_path, is_hashed=args.ids == "hashed")
    settings = with_numberings_in_use(settings, cases)
    if args.segment:
        sort_cases(cases)  # an id that comes twice is told before hours of segmentation, not after
        with stopping_cleanly(args.segment_out):
            cases = segment.make_masks(cases, args)
    return build(cases, settings, args)


def check_label_columns(columns: Sequence[str], table_path: Path, settings: Settings) -> None:
    """Raise a ValueError where a column and a finding of --labels are one but for their case: a row would have both."""
    findings = () if settings.finding_rules is None else settings.finding_rules.findings
    by_rules = {finding.casefold(): finding for finding in findings}
    for column in columns:
        name = column.removeprefix("label:")
        finding = by_rules.get(name.casefold(), name)
        if column.startswith("label:") and finding != name:
            raise ValueError(f"{table_path.name}: name the column {column!r} as --labels does: 'label:{finding}'.")


def without_shared_volumes(cases: Sequence[Case], named: Container[str]) -> list[Case]:
    """Skip cases that took another case's volume: p_1 without a file of its own finds p_1_2.nii.gz.

    Args:
        cases: All cases.
        named: Ids of those whose volume the table names; two masks of one volume may be meant.
    """
    owners = Counter((case.volume, case.series_uid) for case in cases)
    reason = "another case has the same volume file {!r}; name each one's own in a column 'volume'"
    return [
        replace(case, skip_reason=reason.format(case.volume.name))
        if case.skip_reason is None
        and case.recon_id not in named
        and case.recon_id != stem_of(case.volume)
        and owners[case.volume, case.series_uid] > 1
        else case
        for case in cases
    ]


def check_arguments(args: argparse.Namespace) -> None:
    """Fail on impossible combinations before any file is read."""
    check_ready_captions(args)
    if args.all_info is not None and args.desc_info is not None:
        raise ValueError("--all_info holds what --desc_info and --conc_info hold: give the one or the others.")
    if not any((args.reports, args.table, args.desc_info, args.all_info)):
        raise ValueError(
            "give --reports (CSV or JSON), --table (CSV) with the reports or captions in its columns, or captions that "
            "are ready (--desc_info and --conc_info)."
        )
    for name in ("volumes", "masks"):
        path = getattr(args, name)
        if path is not None and not path.is_dir():
            raise ValueError(f"--{name}: there is no folder {path}.")
    if not 0 <= args.validation_fraction < 1:
        raise ValueError(f"--validation_fraction {args.validation_fraction} must be at least 0 and below 1.")
    if args.table is not None and args.table.suffix.lower() == ".json":
        raise ValueError(f"--table {args.table} must be a CSV; a JSON of reports goes to --reports.")
    segment.check_arguments(args)


def read_captions(args: argparse.Namespace, organs: Sequence[str]) -> dict[str, Report]:
    """Captions that are ready, by scan."""
    if args.all_info is not None:
        return read_all_info(args.all_info, organs)
    return read_ready_reports(args.desc_info, args.conc_info, organs)


def read_numberings(rows: Sequence[Row], default: str, table_path: Path) -> dict[str, str | dict[int, str | None]]:
    """Every numbering in use, under the name that `numbering_key` gives it."""
    from_cells = {row["numbering"]: row for row in reversed(rows) if row.get("numbering") not in ("", None, default)}
    if numbering_key(default, default) in from_cells:
        raise ValueError(f"--numbering {default} and a file of the column numbering have one name; rename one of them.")
    numberings = {}
    for name, row in sorted(from_cells.items()):
        with telling_the_cell(row, "numbering", table_path):
            numberings[name] = read_numbering(name, table_path.parent)
    if not all(row.get("numbering") not in ("", None, default) for row in rows):
        numberings[numbering_key(default, default)] = read_numbering(default, None)
    return numberings


def numbering_key(name: str, default: str) -> str:
    """A numbering's name in the manifest: as the table has it; of --numbering no folder, which is of this machine."""
    return Path(name).name if name == default else name


def read_numbering(name: str, folder: Path | None) -> str | dict[int, str | None]:
    """A numbering by its name, or from a YAML file `label: class name`.

    The file lies inside `folder`; None for a path that the user gave, which may lie anywhere.
    """
    if not name.lower().endswith((".yaml", ".yml")):
        if name not in NUMBERINGS:
            raise ValueError(
                f"numbering {name!r} is neither one of {list(NUMBERINGS)} nor a .yaml file{nearest(name, NUMBERINGS)}."
            )
        return name
    path = Path(name) if folder is None else resolve_inside(folder, name)
    if not path.is_file():
        raise ValueError(f"numbering: there is no file {path}.")
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict) or not all(isinstance(label, int) for label in content):
        raise ValueError(f"numbering {path.name} must hold lines 'label: class or organ name', such as '5: liver'.")
    return content


def validation_patients(rows: Sequence[dict[str, str]], fraction: float, seed: int) -> set[str]:
    """The patients drawn for validation; the draw hangs on their ids and the seed, not on the order of the rows."""
    patients = sorted({patient_of(row) for row in rows}, key=natural_key)
    random.Random(seed).shuffle(patients)
    count = round(fraction * len(patients))
    if fraction > 0 and len(patients) > 1:
        count = max(1, count)  # a validation asked for should not come out empty
    return set(patients[:count])


def case_id(row: dict[str, str]) -> str:
    return stem_of(Path(row.get("id") or row.get("volume", "")))


def check_rows(rows: Sequence[Row], path: Path) -> None:
    """Raise a ValueError where an id comes twice, or the column patient_id has an empty cell: nobody knows whose scan
    that is.
    """
    line_of: dict[str, int] = {}
    for row in rows:
        name = case_id(row)
        if name and line_of.setdefault(name, row.line) != row.line:
            raise ValueError(
                f"{path.name}, line {row.line}: the id {name!r} comes twice (first in line {line_of[name]}); every "
                "reconstruction needs its own id."
            )
        if row.get("patient_id") == "":
            raise ValueError(
                f"{path.name}, line {row.line}: patient_id is empty; splits are by patient, so every row needs one."
            )


def patient_of(row: dict[str, str]) -> str:
    return row.get("patient_id") or case_id(row)


@contextlib.contextmanager
def telling_the_cell(row: Row, column: str, table_path: Path) -> Iterator[None]:
    """Put line and column before what is wrong with a cell."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{table_path.name}, line {row.line}, column {column!r}: {error}") from None


def read_case(row, args, settings, texts, volumes, masks, validation, table_path) -> Case:
    """One row of the table as a case; what is missing becomes its skip reason."""
    name = case_id(row)
    if not name:
        raise ValueError(f"{table_path.name}, line {row.line}: the row has neither id nor volume.")
    split = SPLIT_NAMES.get(row["split"].lower()) if "split" in row else None
    if "split" in row and split is None:
        raise ValueError(f"{table_path.name}, line {row.line}: split {row['split']!r} is none of {list(SPLITS)}.")
    is_hashed = args.ids == "hashed"
    with telling_the_cell(row, "volume", table_path):
        volume = find_volume(row.get("volume"), name, volumes, is_hashed)
    with telling_the_cell(row, "mask", table_path):
        mask = find_mask(row.get("mask"), name, masks, volume.place, is_hashed)
    numbering = numbering_key(row.get("numbering") or args.numbering, args.numbering)
    if mask.is_absent and args.segment:
        mask = mask._replace(place=args.segment_out / f"{name}.nii.gz", reason=None)
        numbering = segment.NUMBERING
    elif mask.place is not None and mask.place.is_dir():
        numbering = STRUCTURES_NUMBERING
    series_uid, no_series = None, None
    if row.get("series") and volume.place is not None:
        series_uid, no_series = find_series_uid(row["series"], volume.place)

    rescale = read_rescale(row, table_path)
    if rescale is not None and volume.place is not None and (volume.place.is_dir() or is_zip(volume.place)):
        no_series = no_series or (
            f"rescale_slope and rescale_intercept are given, but the volume {volume.place.name!r} is DICOM, whose "
            "files have their own; leave them empty"
        )
    report, no_report = find_report(row, name, settings, texts, table_path)
    labels = tuple(
        (column.removeprefix("label:"), read_label(cell, f"{table_path.name}, line {row.line}, column {column!r}"))
        for column, cell in row.items()
        if column.startswith("label:")
    )
    return Case(
        split=split or ("validation" if patient_of(row) in validation else "train"),
        patient_id=patient_of(row),
        scan_id=row.get("scan_id") or name,
        recon_id=name,
        volume=volume.place,
        mask=mask.place,
        numbering=numbering,
        findings=report.findings,
        impression=report.impression,
        organ_texts=report.organ_texts,
        labels=labels + labels_of_report(report, [finding for finding, _ in labels], settings),
        skip_reason=volume.reason or mask.reason or no_series or no_report,
        rescale=rescale,
        series_uid=series_uid,
    )


def read_rescale(row: Row, table_path: Path) -> tuple[float, float] | None:
    """Slope and intercept out of the columns rescale_slope and rescale_intercept, or None where both are empty.

    Raises:
        ValueError: If one of them is empty or no finite number, or the slope is 0.
    """
    cells = {name: row.get(name, "") for name in ("rescale_slope", "rescale_intercept")}
    if not any(cells.values()):
        return None
    values = []
    for name, cell in cells.items():
        try:
            values.append(float(cell))
        except ValueError:
            values.append(math.nan)
        if not math.isfinite(values[-1]) or (name == "rescale_slope" and values[-1] == 0):
            raise ValueError(
                f"{table_path.name}, line {row.line}: {name} is {cell!r}; write a number"
                f"{' other than 0' if name == 'rescale_slope' else ''}, such as 1 and -1024, or leave both empty."
            )
    return values[0], values[1]


def find_series_uid(cell: str, place: Path) -> tuple[str | None, str | None]:
    """The SeriesInstanceUID that a cell of the column series means, or None and the reason."""
    if not (place.is_dir() or is_zip(place)):
        return None, f"the column series holds {cell!r}, but the volume {place.name!r} is no DICOM folder or zip"
    if SERIES_UID.fullmatch(cell):
        return cell, None  # reading tells if it is not there
    if not cell.isdecimal():
        return None, f"the column series holds {cell!r}, which is neither a SeriesInstanceUID nor a series number"
    try:
        present = find_series(place)
    except BadVolumeError as error:
        return None, str(error).replace(f"{place.parent}{os.sep}", "")
    numbered = [series for series in present if series.number == int(cell)]
    usable = [series for series in numbered if series.unusable is None] or numbered
    if len(usable) == 1:
        return usable[0].series_uid, None
    if usable:
        return None, (
            f"{len(usable)} series have the number {int(cell)} in {place.name!r}: {listed(usable)}. Give the "
            "SeriesInstanceUID instead; find_series of modeling_fvlm tells it of each in Python"
        )
    return None, f"no series has the number {int(cell)} in {place.name!r}; it holds {listed(present)}"


def listed(present: Sequence[DicomSeries]) -> str:
    return ", ".join(series.description for series in present[:8]) or "no DICOM series"


def find_report(row: Row, name: str, settings: Settings, texts: Texts, table_path: Path) -> tuple[Report, str | None]:
    """What is said of the scan of a row, and the reason if that is nothing."""
    report = Report(row.get("findings", ""), row.get("impression", ""), captions_of_row(row, table_path, settings))
    names = [row["report"]] if row.get("report") else [row.get("id"), name, row.get("scan_id")]
    wanted = list(dict.fromkeys(without_ending(key) for key in names if key))
    has_own = bool(report.findings or report.impression or report.organ_texts)
    no_report = None
    if texts.reports is not None and not has_own:
        found = next((texts.reports[key] for key in wanted if key in texts.reports), None)
        if found is None:
            no_report = f"there is no report {wanted[0]!r} in {texts.report_file}{hint(wanted[0], texts.reports)}"
        report = found or report
    if texts.captions is not None:
        found = next((texts.captions[key] for key in wanted if key in texts.captions), None)
        if found is None:
            near = hint(wanted[0], texts.captions)
            return report, f"there are no captions of {wanted[0]!r} in {texts.caption_files}{near}"
        whole = report if report.findings or report.impression else found
        return replace(found, findings=whole.findings, impression=whole.impression, labels=report.labels), None
    if no_report is None and not (report.findings or report.impression or report.organ_texts):
        no_report = "report is empty"
    return report, no_report


def labels_of_report(report: Report, others: Container[str], settings: Settings) -> tuple[tuple[str, int], ...]:
    """Labels that the JSON of reports brings, of findings that are not among the `others`."""
    if report.labels is None:
        return ()
    values, findings = report.labels
    by_rules = () if settings.finding_rules is None else settings.finding_rules.findings  # they look into the report
    return tuple(
        (name, values.get(name, settings.unmentioned))
        for name in findings
        if name not in others and (name in values or name not in by_rules)
    )


def with_numberings_in_use(settings: Settings, cases: Sequence[Case]) -> Settings:
    """The settings with the numberings that show only when the masks are found: of structures, and of masks we make."""
    in_use = {case.numbering for case in cases if case.skip_reason is None} - settings.numberings.keys()
    found = {}
    for name in sorted(in_use):
        is_structures = name == STRUCTURES_NUMBERING
        found[name] = dict(enumerate(STRUCTURE_NAMES, start=1)) if is_structures else name
    settings = replace(settings, numberings={**settings.numberings, **found}) if found else settings
    label_tables(settings)  # as in settings_from_args: what does not fit the organ set fails here, not in a worker
    return settings


def tell_what_was_found(
    cases: Sequence[Case], volumes: Archive, masks: Archive, table_path: Path, is_hashed: bool
) -> None:
    """Print what lies there and is not used, and what is used otherwise than it lies there."""
    used = [path for case in cases for path in (case.volume, case.mask)]
    unused = volumes.unused(used)
    if unused:
        names = "" if is_hashed else f", e.g. {unused[0].relative_to(volumes.root)}"
        told = counted(len(unused), "file or folder in --volumes belongs", "files and folders in --volumes belong")
        tell(f"{told} to no row of {table_path.name}{names}")
    left_out = Counter(name for case in cases for name in masks.structures.get(case.mask, ()) if name not in STRUCTURES)
    if left_out:
        names = [
            f"{name} in {counted(count, 'case')}{nearest(name, STRUCTURE_NAMES)}"
            for name, count in left_out.most_common(8)
        ]
        tell(f"left out of the mask folders, as no structure of TotalSegmentator has that name: {', '.join(names)}")
    compared = turned = 0
    for case in cases:
        if case.skip_reason is None and case.mask.is_file() and case.volume.is_file() and not is_zip(case.volume):
            try:
                turned += axes_of(case.volume) != axes_of(case.mask)
            except (ValueError, OSError, ImportError):  # the build says what is wrong with it
                continue
            compared += 1
            if compared == CASES_TO_COMPARE:
                break
    if turned:
        tell(
            f"in {turned} of {counted(compared, 'case')} looked at, volume and mask store their axes in different "
            "orders: each is turned by its own header, nothing has to be mended. Where their grids differ the case "
            "will be skipped."
        )


def tell(text: str) -> None:
    console.print(text, markup=False, soft_wrap=True)  # a file name may hold brackets


def axes_of(path: Path) -> tuple[str, ...]:
    """The order of a file's axes by its header, such as ("R", "A", "S")."""
    import nibabel

    return nibabel.aff2axcodes(read_affine(path))
