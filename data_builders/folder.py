"""Build a processed split from a folder of NIfTI volumes, a folder of multilabel masks, and reports or captions.

Reports in a CSV with the columns id, findings, impression; volume and mask are found by the id in their file names:
    python -m data_builders folder --volumes scans --masks masks --reports reports.csv --out out/split

Other column names, and one tenth of the patients for validation:
    python -m data_builders folder --volumes scans --masks masks --reports reports.csv --out out/split \\
        --columns id=accession findings=report_text --validation_fraction 0.1 --seed 1

Reports as JSON, and a table that says which volume, mask and report belong together:
    python -m data_builders folder --volumes scans --masks masks --reports reports.json --table cases.csv \\
        --out out/split

Columns of the table (--table, or the CSV of reports itself); only `id` or `volume` must be there:
    id            name of the case; default: file name of the volume without ending
    volume, mask  file names inside --volumes and --masks; default: the one file named as the id, or beginning with it
    patient_id, scan_id     default: the id. Splits are by patient; without a column patient_id, by id
    split         train or validation; without this column --validation_fraction of the patients, drawn by --seed
    numbering     how the mask's labels are numbered, where this differs from case to case; default: --numbering.
                  A .yaml file lies in the folder of the table
    findings, impression    the report
    report        id of the report in --reports; default: the id
    caption:lung, abnormal:lung    ready caption of an organ, and 1 or 0 (default: judged from the caption's words)
    label:Pleural effusion         1, 0, -1 unknown, for evaluation
JSON: a list of {"id", "findings", "impression"}, or {id: {...}}; with "organs": {organ: {"findings": [sentences],
"impression": [sentences], "abnormal": true or false}} the captions are taken from there.
"""

import argparse
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from modeling_fvlm.organs import NUMBERINGS
from modeling_fvlm.processed_split import natural_key

from .build import Settings, add_build_arguments, build, console, settings_from_args
from .cases import (
    SPLITS,
    Case,
    OrganText,
    Row,
    check_columns,
    nearest,
    read_csv,
    read_label,
    resolve_inside,
)
from .decompose import is_abnormal_sentence, split_sentences

OWN_COLUMNS = (
    *("id", "volume", "mask", "patient_id", "scan_id", "split", "numbering", "findings", "impression", "report"),
)
PREFIXES = ("caption:", "abnormal:", "label:")
SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
}
TRUE_FALSE = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("source")
    group.add_argument("--volumes", type=Path, required=True, help="Folder of CT volumes, .nii or .nii.gz, in HU.")
    group.add_argument("--masks", type=Path, help="Folder of multilabel masks (default: the folder of the volumes).")
    group.add_argument("--reports", type=Path, help="CSV or JSON with reports or captions; see above.")
    group.add_argument("--table", type=Path, help="CSV that says what belongs together (default: the CSV of reports).")
    group.add_argument(
        "--columns",
        nargs="+",
        default=[],
        metavar="OURS=YOURS",
        help="Your names of the columns above, e.g. id=accession findings=report_text.",
    )
    group.add_argument(
        "--numbering",
        default="totalsegmentator_v2",
        help=f"Numbering of the masks: {', '.join(NUMBERINGS)}, or a YAML file of 'label: class or organ name' "
        "(default: totalsegmentator_v2). The wrong one gives wrong organs: look at the previews.",
    )
    group.add_argument(
        "--validation_fraction",
        type=float,
        default=0.1,
        help="Part of the patients that goes to validation where the table has no column split (default: 0.1).",
    )
    group.add_argument("--seed", type=int, default=0, help="Seed of that draw (default: 0).")
    add_build_arguments(parser, organs="body_24")


@dataclass(frozen=True)
class Report:
    """One report of --reports: its text, and its captions where the file brings them."""

    findings: str
    impression: str
    organ_texts: dict[str, OrganText] | None = None


def run(args: argparse.Namespace) -> int:
    check_arguments(args)
    table_path = args.table or args.reports
    columns, rows = read_table(table_path, args.columns)
    check_patients(rows, table_path)
    numberings = read_numberings(rows, args.numbering, table_path.parent)
    settings = settings_from_args(
        args,
        "folder",
        numberings=numberings,
        validation_fraction=None if "split" in columns else args.validation_fraction,
        seed=None if "split" in columns else args.seed,
        **({} if "patient_id" in columns else {"splits_by": "id"}),
    )
    # A CSV of reports that is the table itself has its texts in the rows; everything else is looked up by id.
    has_own_reports = args.reports is not None and (args.table is not None or args.reports.suffix.lower() == ".json")
    reports = read_reports(args.reports, settings) if has_own_reports else None
    check_texts(columns, table_path, reports)
    check_caption_columns(columns, table_path, settings)
    volumes, masks = nifti_files(args.volumes), nifti_files(args.masks or args.volumes)
    if not volumes:
        raise ValueError(f"--volumes: there is no .nii or .nii.gz file in {args.volumes}.")
    validation = validation_patients(rows, args.validation_fraction, args.seed)
    cases = [read_case(row, args, settings, reports, volumes, masks, validation, table_path) for row in rows]
    used = {case.volume for case in cases} | {case.mask for case in cases}
    unused = [path for path in volumes if path not in used]
    if unused:
        console.print(f"{len(unused)} files in --volumes belong to no row of {table_path.name}, e.g. {unused[0].name}")
    return build(cases, settings, args)


def check_arguments(args: argparse.Namespace) -> None:
    """Fail on impossible combinations before any file is read."""
    if args.reports is None and args.table is None:
        raise ValueError("give --reports (CSV or JSON), or --table (CSV) with the reports or captions in its columns.")
    for name in ("volumes", "masks"):
        path = getattr(args, name)
        if path is not None and not path.is_dir():
            raise ValueError(f"--{name}: there is no folder {path}.")
    if not 0 <= args.validation_fraction < 1:
        raise ValueError(f"--validation_fraction {args.validation_fraction} must be at least 0 and below 1.")
    if args.table is not None and args.table.suffix.lower() == ".json":
        raise ValueError(f"--table {args.table} must be a CSV; a JSON of reports goes to --reports.")


def read_table(path: Path, columns: Sequence[str]) -> tuple[list[str], list[Row]]:
    """Columns and rows under our names; from a JSON of reports one row per entry."""
    if path.suffix.lower() == ".json":
        if columns:
            raise ValueError("--columns renames the columns of a CSV; the keys of a JSON are fixed.")
        return ["id"], [Row({"id": name}, place) for place, name in enumerate(read_json(path), start=1)]
    renamed = {}
    for pair in (pair for argument in columns for pair in argument.split(",")):
        ours, equals, theirs = pair.partition("=")
        if not equals or not theirs or not (ours in OWN_COLUMNS or ours.startswith(PREFIXES)):
            known = [*OWN_COLUMNS, *(f"{prefix}..." for prefix in PREFIXES)]
            raise ValueError(f"--columns {pair!r} is not OURS=YOURS with OURS one of {known}{nearest(ours, known)}.")
        renamed[theirs] = ours
    present, rows = read_csv(path)
    check_columns(path, present, renamed)
    names = [renamed.get(name, name) for name in present]
    if len(set(names)) < len(names):
        raise ValueError(f"--columns gives one name to two columns of {path.name}: {names}.")
    if "id" not in names and "volume" not in names:
        raise ValueError(
            f"{path.name} has neither a column 'id' nor 'volume'; it has {present}{nearest('id', present)}. "
            "Say which it is with --columns id=..."
        )
    return names, [Row({renamed.get(name, name): cell for name, cell in row.items()}, row.line) for row in rows]


def read_json(path: Path) -> dict[str, dict]:
    """Entries of a JSON of reports by their id."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"--reports: there is no file {path}.") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path.name} is no JSON: {error}.") from None
    if isinstance(content, dict):
        content = [{"id": name, **entry} if isinstance(entry, dict) else entry for name, entry in content.items()]
    entries = {}
    for place, entry in enumerate(content if isinstance(content, list) else [content]):
        if not isinstance(entry, dict) or "id" not in entry:
            raise ValueError(f'{path.name}: entry {place} is not of the form {{"id", "findings", "impression"}}.')
        if str(entry["id"]) in entries:
            raise ValueError(f"{path.name}: the id {str(entry['id'])!r} comes twice.")
        entries[str(entry["id"])] = entry
    return entries


def read_reports(path: Path, settings: Settings) -> dict[str, Report]:
    """Reports by their id, from CSV or JSON."""
    reports: dict[str, Report] = {}
    if path.suffix.lower() != ".json":
        columns, rows = read_csv(path, ["id"])
        check_texts(columns, path, None, "rename them in that file (--columns is for the table)")
        check_caption_columns(columns, path, settings)
        for row in rows:
            if row["id"] in reports:
                raise ValueError(f"{path.name}, line {row.line}: the id {row['id']!r} comes twice.")
            texts = captions_of_row(row, path, settings)
            reports[row["id"]] = Report(row.get("findings", ""), row.get("impression", ""), texts)
        return reports
    for name, entry in read_json(path).items():
        texts = None
        if "organs" in entry:
            texts = {}
            for organ, said in entry["organs"].items():
                if is_in_set(organ, f"{path.name}, {name}", settings):
                    impression, findings = (as_sentences(said.get(key)) for key in ("impression", "findings"))
                    abnormal = said.get("abnormal")
                    texts[organ] = organ_text(impression, findings, abnormal, settings)
        reports[name] = Report(str(entry.get("findings") or ""), str(entry.get("impression") or ""), texts)
    return reports


def as_sentences(said: str | Sequence[str] | None) -> tuple[str, ...]:
    """What a report's JSON says of an organ: a list of sentences, or one text."""
    return (said,) if isinstance(said, str) else tuple(said or ())


def organ_text(
    impression: Sequence[str], findings: Sequence[str], abnormal: bool | None, settings: Settings
) -> OrganText:
    """Ready sentences of one organ; judged by the lexicon's cues where the source does not say."""
    if abnormal is None:
        sentences = [sentence for text in (*impression, *findings) for sentence in split_sentences(text)]
        abnormal = any(is_abnormal_sentence(sentence, settings.lexicon) for sentence in sentences)
    return OrganText(tuple(impression), tuple(findings), bool(abnormal))


def is_in_set(organ: str, place: str, settings: Settings) -> bool:
    """Whether captions of this organ are wanted. Organs of other sets are left out; a name nobody knows is an error."""
    if organ in settings.organ_set.organs:
        return True
    if organ in settings.lexicon.terms:
        return False
    organs = list(settings.organ_set.organs)
    raise ValueError(f"{place}: organ {organ!r} is not in the organ set {organs}{nearest(organ, organs)}.")


def check_texts(
    columns: Sequence[str],
    path: Path,
    reports: dict[str, Report] | None,
    mend: str = "say which it is with --columns findings=..., or give --reports",
) -> None:
    """Raise a ValueError where there is nothing to make captions of; `mend` is what to do then."""
    has_text = {"findings", "impression"} & set(columns) or any(name.startswith("caption:") for name in columns)
    if reports is None and not has_text:
        raise ValueError(
            f"{path.name} has no column findings, impression or caption:ORGAN; it has {list(columns)}"
            f"{nearest('findings', columns)}. To mend it, {mend}."
        )


def check_caption_columns(columns: Sequence[str], path: Path, settings: Settings) -> None:
    for name in columns:
        prefix, colon, organ = name.partition(":")
        if colon and f"{prefix}:" in ("caption:", "abnormal:"):
            is_in_set(organ, f"{path.name}, column {name!r}", settings)


def captions_of_row(row: Row, path: Path, settings: Settings) -> dict[str, OrganText] | None:
    """Ready captions out of the columns caption:ORGAN and abnormal:ORGAN, or None where the row has none.

    Raises:
        ValueError: If abnormal:ORGAN is none of 1 and 0, or set for an organ without a caption.
    """
    for name, cell in row.items():
        prefix, _, organ = name.partition(":")
        if prefix == "abnormal" and cell and not row.get(f"caption:{organ}"):
            raise ValueError(f"{path.name}, line {row.line}: {name} is {cell!r}, but there is no caption:{organ}.")
    if not any(cell for name, cell in row.items() if name.startswith("caption:")):
        return None  # the report is decomposed
    texts = {}
    for organ in settings.organ_set.organs:
        caption = row.get(f"caption:{organ}", "")
        if caption:
            cell = row.get(f"abnormal:{organ}", "").lower()
            if cell and cell not in TRUE_FALSE:
                raise ValueError(f"{path.name}, {row.get('id')}: abnormal:{organ} is {cell!r}; write 1 or 0.")
            texts[organ] = organ_text((), (caption,), TRUE_FALSE.get(cell), settings)
    return texts


def read_numberings(rows: Sequence[Row], default: str, folder: Path) -> dict[str, str | dict[int, str | None]]:
    """Every numbering in use, under the name that `numbering_key` gives it."""
    from_cells = {row["numbering"] for row in rows if row.get("numbering")} - {default}
    if numbering_key(default, default) in from_cells:
        raise ValueError(f"--numbering {default} and a file of the column numbering have one name; rename one of them.")
    numberings = {name: read_numbering(name, folder) for name in sorted(from_cells)}
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


def check_patients(rows: Sequence[Row], path: Path) -> None:
    """Raise a ValueError where the column patient_id has an empty cell: nobody knows whose scan that is."""
    for row in rows:
        if row.get("patient_id") == "":
            raise ValueError(
                f"{path.name}, line {row.line}: patient_id is empty; splits are by patient, so every row needs one."
            )


def patient_of(row: dict[str, str]) -> str:
    return row.get("patient_id") or case_id(row)


def read_case(row, args, settings, reports, volumes, masks, validation, table_path) -> Case:
    """One row of the table as a case; what is missing becomes its skip reason."""
    name = case_id(row)
    if not name:
        raise ValueError(f"{table_path.name}, line {row.line}: the row has neither id nor volume.")
    split = SPLIT_NAMES.get(row["split"].lower()) if "split" in row else None
    if "split" in row and split is None:
        raise ValueError(f"{table_path.name}, {name}: split {row['split']!r} is none of {list(SPLITS)}.")
    volume, no_volume = find_file(row.get("volume"), name, args.volumes, volumes, "volume")
    others = [path for path in masks if path != volume]
    mask, no_mask = find_file(row.get("mask"), name, args.masks or args.volumes, others, "mask")
    numbering = numbering_key(row.get("numbering") or args.numbering, args.numbering)

    texts = captions_of_row(row, table_path, settings)
    report = Report(row.get("findings", ""), row.get("impression", ""), texts)
    no_report = None
    if reports is not None and not (report.findings or report.impression or texts):
        wanted = row.get("report") or name
        if wanted in reports:
            report = reports[wanted]
        else:
            no_report = f"there is no report {wanted!r} in {args.reports.name}{nearest(wanted, reports)}"
    if no_report is None and not (report.findings or report.impression or report.organ_texts):
        no_report = "report is empty"
    labels = tuple(
        (column.removeprefix("label:"), read_label(cell, f"{table_path.name}, {name}"))
        for column, cell in row.items()
        if column.startswith("label:")
    )
    return Case(
        split=split or ("validation" if patient_of(row) in validation else "train"),
        patient_id=patient_of(row),
        scan_id=row.get("scan_id") or name,
        recon_id=name,
        volume=volume,
        mask=mask,
        numbering=numbering,
        findings=report.findings,
        impression=report.impression,
        organ_texts=report.organ_texts,
        labels=labels,
        skip_reason=no_volume or no_mask or no_report,
    )


def nifti_files(folder: Path) -> list[Path]:
    """All NIfTI files of a folder and its subfolders."""
    return sorted(path for path in folder.rglob("*") if path.name.lower().endswith((".nii", ".nii.gz")))


def stem_of(path: Path) -> str:
    """File name without .nii or .nii.gz."""
    name = path.name
    for ending in (".nii.gz", ".nii"):
        if name.lower().endswith(ending):
            return name[: -len(ending)]
    return name


def find_file(
    named: str | None, name: str, folder: Path, files: Sequence[Path], what: str
) -> tuple[Path | None, str | None]:
    """The file that a row names, or else the one that is named after the case; or None and the reason.

    Raises:
        ValueError: If the row names a file outside the folder.
    """
    if named:
        path = resolve_inside(folder, named)
        return (path, None) if path.is_file() else (None, f"{what} file {named} is missing{nearest_file(named, files)}")
    exact = [path for path in files if stem_of(path) == name]
    # After the id something that is no letter or digit, or train_1 would take the files of train_10.
    longer = [path for path in files if stem_of(path).startswith(name) and not stem_of(path)[len(name) :][:1].isalnum()]
    found = exact or longer
    if len(found) == 1:
        return found[0], None
    if found:
        names = [path.name for path in found[:4]]
        return None, f"several files fit as {what}: {names}; name one in a column {what!r}"
    return None, f"{what} file is missing: none is named {name}.nii.gz or {name}_*.nii.gz"


def nearest_file(name: str, files: Sequence[Path]) -> str:
    return nearest(name, [path.name for path in files])
