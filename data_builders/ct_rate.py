"""Build a processed split from a folder in CT-RATE's layout (corrected volumes, TotalSegmentator masks, reports).

Two recon kernels of a scan say the same, so the first of each scan is taken by default:
    python -m data_builders ct_rate --source CT-RATE --out out/ct_rate --organs body_24

The folder holds `dataset/` as on the Hub (or is that folder itself):
    {train,valid}_fixed/train_1/train_1_a/train_1_a_1.nii.gz               volumes with corrected headers
    ts_seg/ts_total/{train,valid}_fixed/.../train_1_a_1.nii.gz             masks, TotalSegmentator v2 numbering
    radiology_text_reports/{train,validation}_reports.csv                  reports
    multi_abnormality_labels/{train,valid}_predicted_labels.csv            labels (may be absent)
    metadata/no_chest_{train,valid}.txt                                    volumes that show no chest (may be absent)
A volume or mask that is missing, and a volume that shows no chest, is skipped, counted and listed in the manifest.
Licence of the source: CC BY-NC-SA 4.0, and its gate forbids handing it on; that holds for what is built from it.
"""

import argparse
import re
from pathlib import Path

from modeling_fvlm.processed_split import natural_key

from .build import add_build_arguments, build, settings_from_args
from .cases import Case, read_csv, read_label

FOLDER_OF_SPLIT = {"train": "train", "validation": "valid"}  # the Hub mixes both spellings, see report_file below
VOLUME_NAME = re.compile(r"((?:train|valid)_\d+)_([a-zA-Z]+)_(\d+)\.nii\.gz")
REPORT_COLUMNS = ("VolumeName", "Findings_EN", "Impressions_EN")
NOT_GIVEN = {"", "not given", "not given.", "nan"}  # how an empty section is written there


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("source")
    group.add_argument("--source", type=Path, required=True, help="Folder in CT-RATE's layout.")
    group.add_argument(
        "--splits",
        nargs="+",
        choices=list(FOLDER_OF_SPLIT),
        default=list(FOLDER_OF_SPLIT),
        help="Splits to build (default: both); CT-RATE's `valid` becomes `validation`.",
    )
    group.add_argument(
        "--reconstructions",
        choices=["first", "all"],
        default="first",
        help="Of each scan the first reconstruction whose files are there, or all (default: first).",
    )
    add_build_arguments(parser, organs="body_24")


def section(text: str) -> str:
    """A section of a report, empty where CT-RATE writes that it was not given."""
    return "" if text.strip().lower() in NOT_GIVEN else text.strip()


def read_labels(path: Path) -> dict[str, tuple[tuple[str, int], ...]]:
    """Volume name -> its labels in the order of the columns; empty where the release was fetched without labels."""
    if not path.is_file():
        return {}
    columns, rows = read_csv(path, ["VolumeName"])
    findings = [name for name in columns if name != "VolumeName"]
    return {
        row["VolumeName"]: tuple(
            (name, read_label(row[name], f"{path.name}, {row['VolumeName']}")) for name in findings
        )
        for row in rows
    }


def read_no_chest(path: Path) -> set[str]:
    """Names of volumes that show no chest, without ending; the list may carry folders in front of the names."""
    if not path.is_file():
        return set()
    names = (Path(word.strip(",\"'")).name for word in path.read_text(encoding="utf-8").split())
    return {name.removesuffix(".gz").removesuffix(".nii") for name in names}


def split_cases(root: Path, split: str, reconstructions: str) -> list[Case]:
    """The cases of one split, from the rows of its reports file."""
    folder = FOLDER_OF_SPLIT[split]
    report_file = root / "radiology_text_reports" / f"{split}_reports.csv"  # "validation" here, "valid" elsewhere
    volume_root = root / f"{folder}_fixed"
    mask_root = root / "ts_seg" / "ts_total" / f"{folder}_fixed"
    if not volume_root.is_dir():
        original = root / folder
        hint = f" {original.name}/ holds the volumes with blank headers: fetch the corrected ones." * original.is_dir()
        raise ValueError(f"--source: there is no folder {volume_root}.{hint} Or leave {split!r} out of --splits.")
    _, reports = read_csv(report_file, REPORT_COLUMNS)
    labels = read_labels(root / "multi_abnormality_labels" / f"{folder}_predicted_labels.csv")
    no_chest = read_no_chest(root / "metadata" / f"no_chest_{folder}.txt")

    cases = []
    for row in reports:
        name = row["VolumeName"]
        match = VOLUME_NAME.fullmatch(name)
        if match is None:
            raise ValueError(f"{report_file.name}: VolumeName {name!r} is not of the form train_1_a_1.nii.gz.")
        patient_id, recon_id = match[1], name.removesuffix(".nii.gz")
        scan_id = f"{patient_id}_{match[2]}"
        place = Path(patient_id, scan_id, name)
        findings, impression = section(row["Findings_EN"]), section(row["Impressions_EN"])
        reasons = {
            "shows no chest (listed in the release)": recon_id in no_chest,
            "report is empty": not findings and not impression,
            "volume file is missing": not (volume_root / place).is_file(),
            "mask file is missing": not (mask_root / place).is_file(),
        }
        cases.append(
            Case(
                split=split,
                patient_id=patient_id,
                scan_id=scan_id,
                recon_id=recon_id,
                volume=volume_root / place,
                mask=mask_root / place,
                numbering="totalsegmentator_v2",
                findings=findings,
                impression=impression,
                labels=labels.get(name, ()),
                skip_reason=next((reason for reason, holds in reasons.items() if holds), None),
                is_excluded=recon_id in no_chest,
            )
        )
    return cases if reconstructions == "all" else first_reconstructions(cases)


def first_reconstructions(cases: list[Case]) -> list[Case]:
    """Of each scan the first reconstruction that can be built, and those before it that cannot, with their reasons."""
    chosen, served = [], set()
    for case in sorted(cases, key=lambda case: natural_key(case.recon_id)):
        if case.scan_id not in served:
            chosen.append(case)
            if case.skip_reason is None:
                served.add(case.scan_id)
    return chosen


def run(args: argparse.Namespace) -> int:
    root = args.source / "dataset" if (args.source / "dataset").is_dir() else args.source
    if not root.is_dir():
        raise ValueError(f"--source: there is no folder {args.source}.")
    cases = [case for split in args.splits for case in split_cases(root, split, args.reconstructions)]
    settings = settings_from_args(args, "ct_rate", splits=sorted(args.splits), reconstructions=args.reconstructions)
    return build(cases, settings, args)
