"""Turn cases into a processed split: the part that every builder shares.

(1) the cases are sorted, and those known to be unusable set aside with their reason
(2) the settings and a hash of the source are compared with those of a build begun in the same folder
(3) volumes are read, turned, resampled and cropped in parallel, and written shard by shard in the sorted order
(4) dataset card, previews and manifest are written, and the summary is printed
A broken case is skipped, counted and listed; with --strict the first one stops the build. None is ever replaced.
"""

import argparse
import dataclasses
import json
import multiprocessing
import os
import re
import shutil
import textwrap
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn
from rich.table import Table

from modeling_fvlm.configuration_fvlm import DEFAULT_WINDOW, FVLMConfig, FVLMVisionConfig
from modeling_fvlm.geometry import AXES
from modeling_fvlm.organs import OrganSet, load_organ_set, organ_label_table
from modeling_fvlm.preparation import PreparedScan, padding_hu, prepare_scan
from modeling_fvlm.processed_split import encode_array
from modeling_fvlm.published_preparation import as_stored, prepare_published_scan
from modeling_fvlm.reading import read_affine, read_nifti, read_nifti_mask

from .card import write_card
from .cases import Case, sort_cases, source_fingerprint
from .decompose import Lexicon, caption_rows, load_lexicon
from .previews import write_previews
from .shards import (
    PROGRESS_FOLDER,
    BuiltRow,
    ShardRecord,
    plan_shards,
    read_record,
    write_json,
    write_record,
    write_shard,
)

FORMAT_VERSION = 1  # up when the columns, or the meaning of one, change

# Settings that came after the first builds, and what these were built with.
LATER_SETTINGS = {"preprocessing": "standard"}
# Published scans are padded for the published model: no other has seen such scans.
PADDED_TO, PADDING_WINDOWS = FVLMVisionConfig.volume_size, (DEFAULT_WINDOW,)

# Median HU that a healthy or a diseased organ can have. Outside of it the HU were probably rescaled wrongly, or the
# mask was read with the wrong numbering or belongs to another scan: silent otherwise, and fatal for training.
PLAUSIBLE_MEDIAN_HU = {"lung": (-980, -200), "liver": (-60, 250), "autochthon": (-120, 150)}
FEWEST_VOXELS_FOR_A_MEDIAN = 1000  # in thick slices a small organ is mostly edge, mixed with what lies beside it

console = Console()


@dataclass(frozen=True)
class Settings:
    """What decides the bytes of a processed split, besides its source.

    Attributes:
        builder: Name of the subcommand.
        organ_set: Organs in the order of the labels in the masks, and their classes.
        numberings: numbering as it stands in the cases -> a key of NUMBERINGS, or {label: class name}.
        spacing: Voxel size in mm along (depth, height, width).
        margin_voxels: Voxels of that size kept around the organs.
        preprocessing: "standard" or "published", as in the model's config.
        rows_per_shard: Rows of a full shard.
        lexicon: Terms by which sentences find their organs.
        options: The builder's own settings, as they go into the manifest.
    """

    builder: str
    organ_set: OrganSet
    numberings: dict[str, str | dict[int, str | None]]
    spacing: tuple[float, float, float]
    margin_voxels: tuple[int, int, int]
    preprocessing: str
    rows_per_shard: int
    lexicon: Lexicon
    options: dict

    def as_json(self) -> dict:
        """The settings as the manifest tells them."""
        content = {
            "format_version": FORMAT_VERSION,
            "builder": self.builder,
            "organ_set": dataclasses.asdict(self.organ_set),
            "numberings": self.numberings,
            "spacing": self.spacing,
            "margin_voxels": self.margin_voxels,
            "preprocessing": self.preprocessing,
            "rows_per_shard": self.rows_per_shard,
            "lexicon": {"name": self.lexicon.name, "version": self.lexicon.version, "sha256": self.lexicon.sha256},
            "options": self.options,
        }
        if self.preprocessing == "published":
            content |= {"padded_to": PADDED_TO, "padding_hu": padding_hu(PADDING_WINDOWS, is_published=True)}
        return json.loads(json.dumps(content))


def add_build_arguments(parser: argparse.ArgumentParser, organs: str) -> None:
    """The options that every builder has."""
    group = parser.add_argument_group("processed split")
    group.add_argument(
        "--out",
        type=Path,
        required=True,
        help="Folder to write. A build that was killed continues there; other settings or another source are refused.",
    )
    group.add_argument(
        "--organs", default=organs, help="Organ set: chest_4, body_24, body_36 or a YAML file (default: %(default)s)."
    )
    group.add_argument(
        "--spacing",
        type=float,
        nargs=3,
        default=FVLMConfig.spacing,
        metavar=("DEPTH", "HEIGHT", "WIDTH"),
        help="Voxel size in mm to resample to (default: 3 1 1).",
    )
    group.add_argument(
        "--margin",
        type=int,
        nargs=3,
        default=FVLMConfig.margin_voxels,
        metavar=("DEPTH", "HEIGHT", "WIDTH"),
        help="Voxels kept around the box of all organs; what lies outside is cut off (default: 5 20 20).",
    )
    group.add_argument(
        "--preprocessing",
        choices=["standard", "published"],
        default="standard",
        help="published: scans and captions as the published weights saw them, faults included, padded to the "
        "published crop; for models whose config says so (default: standard).",
    )
    group.add_argument(
        "--lexicon", default="english", help="Terms for report -> organ captions: english, or a YAML file."
    )
    group.add_argument(
        "--rows_per_shard",
        type=int,
        default=64,
        help="Rows of a Parquet shard (default: 64). Ranks times loader workers should not outnumber the shards.",
    )
    group.add_argument("--previews", type=int, default=6, help="Cases drawn per split into previews/ (default: 6).")
    group.add_argument(
        "--workers",
        type=int,
        default=None,
        help="Processes that prepare volumes; each holds one scan in memory (default: one per core).",
    )
    group.add_argument("--strict", action="store_true", help="Stop at the first broken case instead of skipping it.")


def settings_from_args(
    args: argparse.Namespace,
    builder: str,
    numberings: dict[str, str | dict[int, str | None]] | None = None,
    **options,
) -> Settings:
    """Check the common options and resolve organ set and lexicon, before any data is touched.

    Raises:
        ValueError: If a value is out of range or a name unknown.
    """
    if min(args.spacing) <= 0:
        raise ValueError(f"--spacing {list(args.spacing)}: every edge must be above 0 mm.")
    if min(args.margin) < 0:
        raise ValueError(f"--margin {list(args.margin)}: no margin can be negative.")
    for name in ("rows_per_shard", "workers"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name} {value} must be at least 1.")
    settings = Settings(
        builder=builder,
        organ_set=load_organ_set(args.organs),
        numberings=numberings or {"totalsegmentator_v2": "totalsegmentator_v2"},
        spacing=tuple(float(edge) for edge in args.spacing),
        margin_voxels=tuple(args.margin),
        preprocessing=args.preprocessing,
        rows_per_shard=args.rows_per_shard,
        lexicon=load_lexicon(args.lexicon),
        options=options,
    )
    settings.lexicon.check_covers(settings.organ_set.organs)
    label_tables(settings)  # an unknown organ, class or numbering fails here, not in a worker
    return settings


def label_tables(settings: Settings) -> dict[str, np.ndarray]:
    """For each numbering in use the table from label values to organ labels."""
    return {
        name: organ_label_table(settings.organ_set, settings.organ_set.organs, numbering)
        for name, numbering in settings.numberings.items()
    }


# Set once per process: a case sent to a worker should not carry the organ set and the lexicon with it.
_settings: Settings | None = None
_tables: dict[str, np.ndarray] = {}


def start_worker(settings: Settings) -> None:
    """Give this process what all cases share."""
    global _settings, _tables
    _settings, _tables = settings, label_tables(settings)


def build_row(case: Case) -> BuiltRow:
    """Read and prepare one case. A case that cannot be used comes back with its reason; anything else is our bug."""
    organs = _settings.organ_set.organs
    try:
        scan = read_scan(case)
    except (ValueError, FileNotFoundError) as error:
        # No folder of this machine in the manifest: it says nothing to its reader, and the bytes would hang on it.
        reason = str(error).replace(f"{case.volume.parent}{os.sep}", "").replace(f"{case.mask.parent}{os.sep}", "")
        return BuiltRow(case.recon_id, skip_reason=reason)
    row = {
        "patient_id": case.patient_id,
        "scan_id": case.scan_id,
        "recon_id": case.recon_id,
        "volume": encode_array(scan.volume),
        "mask": encode_array(scan.mask),
        "shape": list(scan.volume.shape),
        "spacing": list(scan.spacing),
        "captions": caption_rows(
            case.findings,
            case.impression,
            organs,
            _settings.lexicon,
            case.organ_texts,
            published=_settings.preprocessing == "published",
        ),
        "findings": case.findings,
        "impression": case.impression,
        "labels": [{"finding": finding, "value": value} for finding, value in case.labels],
    }
    voxels = np.bincount(scan.mask.ravel(), minlength=len(organs) + 1)
    present = tuple(organ for organ, count in zip(organs, voxels[1:]) if count)
    return BuiltRow(case.recon_id, row, present, warning=implausible_hu(scan.volume, scan.mask, organs, voxels))


def read_scan(case: Case) -> PreparedScan:
    """Volume and mask of one case, prepared as the settings say."""
    geometry = (_tables[case.numbering], _settings.spacing, _settings.margin_voxels)
    if _settings.preprocessing == "published":
        volume = as_stored(read_nifti, case.volume, read_affine(case.volume))
        mask = as_stored(read_nifti_mask, case.mask, read_affine(case.mask))
        return prepare_published_scan(volume, mask, *geometry, PADDED_TO, PADDING_WINDOWS)
    return prepare_scan(read_nifti(case.volume), read_nifti_mask(case.mask), *geometry)


def implausible_hu(volume: np.ndarray, mask: np.ndarray, organs: Sequence[str], voxels: np.ndarray) -> str | None:
    """Name the organs whose median HU no such organ has, or None."""
    strange = []
    for organ, (lowest, highest) in PLAUSIBLE_MEDIAN_HU.items():
        label = organs.index(organ) + 1 if organ in organs else 0
        if label and voxels[label] >= FEWEST_VOXELS_FOR_A_MEDIAN:
            median = int(np.median(volume[mask == label]))
            if not lowest <= median <= highest:
                strange.append(f"{organ} has a median of {median} HU, expected {lowest} to {highest}")
    if not strange:
        return None
    return f"{'; '.join(strange)}: look at rescale slope and intercept, and at numbering and patient of the mask"


def num_cores() -> int:
    """Cores this process may use (a container or a batch system often lends fewer than the machine has)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def built_rows(cases: Sequence[Case], settings: Settings, workers: int) -> Iterator[BuiltRow]:
    """Rows in the order of `cases`, prepared by `workers` processes."""
    if workers == 1 or len(cases) < 2:
        start_worker(settings)
        yield from map(build_row, cases)
        return
    # Not "fork": the libraries of this process may hold threads and locks. A pool of multiprocessing would wait for
    # ever when the system kills a worker for its memory; the executor raises.
    methods = multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
    if context.get_start_method() == "forkserver":
        context.set_forkserver_preload([__name__])  # one import for all workers
    with ProcessPoolExecutor(workers, context, initializer=start_worker, initargs=(settings,)) as pool:
        pending: deque[Future] = deque()
        try:
            for case in cases:
                pending.append(pool.submit(build_row, case))
                if len(pending) > 4 * workers:  # bounds the finished rows that wait in memory behind a slow one
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()


def build(cases: Iterable[Case], settings: Settings, args: argparse.Namespace) -> int:
    """Write the processed split into `args.out`; returns the exit status (1 if not one row was written).

    Raises:
        ValueError: If there are no cases, the folder holds something else, or another build was begun there.
    """
    folder = args.out
    cases = sort_cases(cases)  # (1)
    if not cases:
        raise ValueError("the source holds no case: no row of its table could be matched with a volume.")
    for case in cases if args.strict else ():
        if case.skip_reason is not None and not case.is_excluded:
            raise ValueError(f"{case.recon_id}: {case.skip_reason}")
    identity = {"settings": settings.as_json(), "source_sha256": source_fingerprint(cases)}
    continue_or_begin(folder, identity)  # (2)
    shards = plan_shards(cases, settings.rows_per_shard)
    done = {shard.file: read_record(folder, shard) for shard in shards}
    todo = [shard for shard in shards if done[shard.file] is None]
    waiting = [case for shard in todo for case in shard.cases]
    if len(todo) < len(shards):
        console.print(f"{len(shards) - len(todo)} of {len(shards)} shards are complete; building the rest.")
    workers = min(args.workers or num_cores(), max(1, len(waiting)))
    rows = built_rows(waiting, settings, workers)  # (3)
    columns = (*Progress.get_default_columns()[:-1], MofNCompleteColumn(), TimeRemainingColumn())
    try:
        with Progress(*columns, console=console, transient=True) as progress:
            task = progress.add_task(f"preparing volumes ({workers} workers)", total=len(waiting))
            for shard in todo:
                members = (stop_or_pass(next(rows), args.strict) for _ in shard.cases)
                tracked = (progress.advance(task) or item for item in members)
                done[shard.file] = write_shard(folder, shard, tracked)
    finally:
        rows.close()

    manifest = make_manifest(cases, identity, [done[shard.file] for shard in shards])  # (4)
    if sum(split["rows"] for split in manifest["splits"].values()):
        write_card(folder, manifest)
        for split, content in manifest["splits"].items():
            if content["rows"]:
                write_previews(folder, split, args.previews, folder / "previews")
    write_json(folder / "manifest.json", manifest)
    shutil.rmtree(folder / PROGRESS_FOLDER, ignore_errors=True)
    print_summary(manifest)
    if not any(split["rows"] for split in manifest["splits"].values()):
        console.print("[red]Nothing was written: every case was skipped.[/red]")
        return 1
    console.print(f"written to {folder}; look at {folder / 'previews'} before training", soft_wrap=True)
    return 0


def stop_or_pass(item: BuiltRow, strict: bool) -> BuiltRow:
    if strict and item.skip_reason is not None:
        raise ValueError(f"{item.recon_id}: {item.skip_reason}")
    return item


def continue_or_begin(folder: Path, identity: dict) -> None:
    """Make the folder ready for a new build, or for what is missing of one that was begun there.

    Raises:
        ValueError: If something else lies in the folder, or a build with other settings or of another source.
    """
    begun = folder / PROGRESS_FOLDER / "identity.json"
    finished = folder / "manifest.json"
    before = next((json.loads(path.read_text(encoding="utf-8")) for path in (begun, finished) if path.is_file()), None)
    if before is None:
        if folder.is_dir() and any(folder.iterdir()):
            raise ValueError(f"--out {folder} is not empty and holds no processed split; name a new folder.")
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"--out {folder} is a file; name a folder.")
    else:
        mend = "Name another --out, or delete that folder to build anew."
        changed = differences({**LATER_SETTINGS, **before.get("settings", {})}, identity["settings"])
        if changed:
            raise ValueError(f"--out {folder} was begun with other settings ({'; '.join(changed)}). {mend}")
        if before.get("source_sha256") != identity["source_sha256"]:
            raise ValueError(
                f"--out {folder} was begun from another state of the source: reports, labels, or names and sizes of "
                f"its files have changed since. {mend}"
            )
    (folder / "volumes").mkdir(parents=True, exist_ok=True)
    write_json(begun, identity)
    if finished.is_file():
        for content in json.loads(finished.read_text(encoding="utf-8"))["shards"]:
            write_record(folder, ShardRecord(**content))
        finished.unlink()  # it comes back when every shard is there


def differences(before: dict, now: dict, place: str = "") -> list[str]:
    """`spacing: [3.0, 1.0, 1.0] there, [2.0, 1.0, 1.0] here` for every entry that is not the same."""
    found = []
    for key in sorted(before.keys() | now.keys()):
        there, here = before.get(key), now.get(key)
        if there == here:
            continue
        if isinstance(there, dict) and isinstance(here, dict):
            found += differences(there, here, f"{place}{key}.")
        else:
            found.append(
                f"{place}{key}: {textwrap.shorten(str(there), 80)} there, {textwrap.shorten(str(here), 80)} here"
            )
    return found


def make_manifest(cases: Sequence[Case], identity: dict, records: Sequence[ShardRecord]) -> dict:
    """Everything a reader of the split may ask: settings, counts, every skipped case with its reason."""
    settings = identity["settings"]
    skipped = [
        {"split": case.split, "case": case.recon_id, "reason": case.skip_reason} for case in cases if case.skip_reason
    ]
    skipped += [entry for record in records for entry in record.skipped]
    left_out = {entry["case"] for entry in skipped}
    splits = {}
    for split in dict.fromkeys(case.split for case in cases):
        members = [case for case in cases if case.split == split]
        written = [case for case in members if case.recon_id not in left_out]
        organs: dict[str, Counter] = {organ: Counter() for organ in settings["organ_set"]["organs"]}
        for record in records:
            for organ, counts in record.counts.items() if record.split == split else ():
                organs[organ].update(counts)
        splits[split] = {
            "cases": len(members),
            "rows": len(written),
            "scans": len({case.scan_id for case in written}),
            "patients": len({case.patient_id for case in written}),
            "organs": {
                organ: {kind: count[kind] for kind in ("present", "mentioned", "abnormal")}
                for organ, count in organs.items()
            },
        }
    return {
        "tool": f"fVLM data_builders, format {FORMAT_VERSION}",
        **identity,
        "splits": splits,
        "skipped": skipped,
        "warnings": [{"split": "all", "case": "all", "warning": warning} for warning in general_warnings(settings)]
        + [entry for record in records for entry in record.warnings],
        "shards": [vars(record) for record in records],
    }


def general_warnings(settings: dict) -> list[str]:
    """What looks wrong with the whole split, from its settings as they stand in the manifest."""
    warnings = []
    if settings["options"].get("splits_by") == "id":
        warnings.append(
            "splits are by id, because the table has no column patient_id: scans of one patient may stand in several "
            "splits, which makes validation look better than it is"
        )
    bare = [axis for axis, margin in zip(AXES, settings["margin_voxels"]) if margin == 0]
    if bare:
        warnings.append(
            f"the margin is 0 along {', '.join(bare)}: organs that touch the box of all organs lie on the edge of the "
            "volume, and count as cut off in training under the border rule"
        )
    return warnings


def kind_of(reason: str) -> str:
    """A skip reason without what differs from case to case: the file in front, names in quotes, numbers."""
    kind = re.sub(r"^\S+: ", "", reason)
    return textwrap.shorten(re.sub(r"'[^']*'|\[[^\]]*\]|\([^)]*\)|[\d.]*\d", "..", kind), 72, placeholder=" ...")


def print_summary(manifest: dict) -> None:
    """Counts per split and organ, what was skipped, and what looks wrong."""
    splits = manifest["splits"]
    table = Table(title="processed split")
    table.add_column("")
    for split in splits:
        table.add_column(split, justify="right")
    for kind in ("cases", "rows", "scans", "patients"):
        table.add_row(kind, *(str(content[kind]) for content in splits.values()))
    console.print(table)

    organs = Table(title="organs: in the mask / mentioned / abnormal")
    organs.add_column("")
    for split in splits:
        organs.add_column(split, justify="right")
    for organ in manifest["settings"]["organ_set"]["organs"]:
        counts = [content["organs"][organ] for content in splits.values()]
        organs.add_row(organ, *(f"{c['present']} / {c['mentioned']} / {c['abnormal']}" for c in counts))
    console.print(organs)

    if manifest["skipped"]:
        kinds = Counter(kind_of(entry["reason"]) for entry in manifest["skipped"])
        skipped = Table("cases", "skipped because", title=f"{len(manifest['skipped'])} skipped")
        for kind, count in kinds.most_common(12):
            skipped.add_row(str(count), kind)
        console.print(skipped)
        for entry in manifest["skipped"][:8]:
            console.print(f"  skipped {entry['case']}: {entry['reason']}", style="yellow", markup=False)
        if len(manifest["skipped"]) > 8:
            console.print("  ... all of them in manifest.json, key `skipped`", style="yellow", markup=False)
    for entry in manifest["warnings"][:8]:
        console.print(f"  check {entry['case']}: {entry['warning']}", style="red", markup=False)
    if len(manifest["warnings"]) > 8:
        console.print("  ... all of them in manifest.json, key `warnings`", style="red", markup=False)
    never = [
        o
        for o in manifest["settings"]["organ_set"]["organs"]
        if not any(c["organs"][o]["present"] for c in splits.values())
    ]
    if never and any(content["rows"] for content in splits.values()):
        console.print(
            f"in no mask: {', '.join(never)}. Right if the scans show another region; else the numbering is wrong.",
            style="yellow",
            markup=False,
        )
