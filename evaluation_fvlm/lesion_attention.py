"""Whether an organ's attention goes to the lesion: its mass in the lesion's patches against what chance puts there.

A case is one finding of one scan, with a mask of where it lies. With the organ's map (attention.py) and the patches in
which the lesion has a voxel of the organ:

(1) `mass`          part of the attention that falls into these patches
(2) `volume_share`  part of the organ's voxels that are lesion
(3) `patch_share`   part of the organ's patches that these are: the mass of a map without preference. (1) above (3) says
                    more than (1) above (2): a small lesion's patches hold healthy tissue as well
(4) `twin_mass`     attention into the same patches of the same scan without the lesion, where there is such a twin:
                    what the organ's query prefers of that place anyway

A lesion that takes up more than --most of its organ (a fatty liver) has no other place to look at. Such cases are
counted and left out of the figures, as are those whose organ the model does not have or the mask does not hold. Means
are over cases; 95 % intervals are of a bootstrap over patients.

Of the synthetic set, after `python -m data_builders lesions --source runs/demo/source --seed 0 --twins`:
    python -m evaluation_fvlm lesion_attention --model runs/demo/model \\
        --cases runs/demo/source/dataset/lesions/validation_lesions.csv --num_cases 100 --out out/lesion_attention

Any CSV will do with columns patient_id, finding, organ, volume, mask and lesion (files relative to the CSV), and
perhaps twin_volume and twin_mask. Written to --out: lesion_attention.json, cases.csv, and pictures of the first cases.
Research only, not for diagnosis.
"""

from __future__ import annotations

import argparse
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from transformers import PreTrainedModel

from evaluation_fvlm.attention import OUTSIDE, SourceGrid, attention_maps, source_grid
from evaluation_fvlm.bootstrap import draw_patients, figure
from evaluation_fvlm.errors import EvaluationError
from evaluation_fvlm.json_files import write_json
from evaluation_fvlm.loading import load_model
from evaluation_fvlm.overlays import overlay_png
from evaluation_fvlm.places import place_name, weights_digest
from modeling_fvlm.geometry import BadVolumeError, resample_mask
from modeling_fvlm.organs import NUMBERINGS, organ_label_table
from modeling_fvlm.preparation import PreparedScan
from modeling_fvlm.processing_fvlm import FVLMProcessor
from modeling_fvlm.reading import Volume, check_same_grid, read_mask, read_volume

COLUMNS = ["patient_id", "finding", "organ", "volume", "mask", "lesion"]
TWIN_COLUMNS = ["twin_volume", "twin_mask"]
FIGURES = ["mass", "volume_share", "patch_share", "twin_mass"]
NUM_BOOTSTRAPS = 1000


@dataclass
class _Scan:
    """One scan of a case, read and prepared."""

    volume: Volume
    labels: Volume  # of the segmentation
    grid: SourceGrid
    prepared: PreparedScan


def read_scan(processor: FVLMProcessor, volume_path: Path, mask_path: Path, numbering: str) -> _Scan:
    volume, labels = read_volume(volume_path), read_mask(mask_path)
    prepared = processor.image_processor.prepare(volume, labels, numbering=numbering)
    return _Scan(volume, labels, source_grid(volume_path, volume), prepared)


def measure(
    model: PreTrainedModel, scan: _Scan, twin: _Scan | None, organ: str, lesion: Volume, table: np.ndarray
) -> dict | str:
    """The figures of one case.

    Args:
        model: An `FVLMModel`.
        scan, twin: With the lesion, and the same without it.
        organ: Whose map is looked at.
        lesion: Its mask, on the scan's grid.
        table: Label of the segmentation -> organ label.

    Returns:
        `FIGURES`, `is_hit` (the heaviest patch is one of the lesion's), `patches`, and `map` and `is_lesion` on the
        prepared scan; or why there are none.
    """
    check_same_grid(scan.volume, lesion)
    organ_index = list(model.config.organs).index(organ)
    is_organ = table[scan.labels.array] == organ_index + 1
    is_lesion = (lesion.array > 0) & is_organ
    if not is_organ.any():
        return "the mask does not hold the organ"
    if not is_lesion.any():
        return "no voxel of the lesion lies in the organ"
    organ_map = attention_maps(model, scan.prepared.volume, scan.prepared.mask, [organ]).get(organ)
    if organ_map is None:
        return "the prepared mask does not hold the organ"
    patches = patches_of(is_lesion, scan, organ_map)
    figures = {
        "mass": float(organ_map.weights[patches].sum()),
        "volume_share": float(is_lesion.sum() / is_organ.sum()),
        "patch_share": float((patches & organ_map.is_organ).sum() / organ_map.is_organ.sum()),
        "twin_mass": np.nan,
        "is_hit": bool(patches[np.unravel_index(organ_map.weights.argmax(), patches.shape)]),
        "patches": int(patches.sum()),
        "map": organ_map,
        "is_lesion": is_lesion,
    }
    if twin is not None:
        check_same_grid(scan.volume, twin.volume)
        twin_map = attention_maps(model, twin.prepared.volume, twin.prepared.mask, [organ]).get(organ)
        if twin_map is not None:
            figures["twin_mass"] = float(twin_map.weights[patches_of(is_lesion, twin, twin_map)].sum())
    return figures


def patches_of(is_lesion: np.ndarray, scan: _Scan, organ_map) -> np.ndarray:
    """The patches of a map, `(grid depth, height, width)` bool, that hold a voxel of a region of the source."""
    patches = np.zeros(organ_map.weights.shape, bool)
    places = [along[at] for along, at in zip(scan.grid.patch_of_voxel(scan.prepared, organ_map), np.nonzero(is_lesion))]
    is_inside = np.all([along != OUTSIDE for along in places], axis=0)
    patches[tuple(along[is_inside] for along in places)] = True
    return patches


def read_cases(path: Path) -> pd.DataFrame:
    """The rows of a CSV of cases; files become absolute.

    Raises:
        EvaluationError: If it cannot be read, lacks a column, or has no row.
    """
    try:
        cases = pd.read_csv(path, dtype=str, keep_default_na=False)
    except (OSError, ValueError) as error:
        raise EvaluationError(f"--cases {path} cannot be read: {error}") from error
    missing = [column for column in COLUMNS if column not in cases]
    if missing or cases.empty:
        raise EvaluationError(
            f"--cases {path}: " + (f"the columns {missing} are missing." if missing else "it holds no case.")
            + " `python -m data_builders lesions --help` writes such a file for the synthetic set."
        )  # fmt: skip
    for column in ("volume", "mask", "lesion", *TWIN_COLUMNS):
        if column in cases:
            cases[column] = [str(path.parent / name) if name else "" for name in cases[column]]
    return cases


def in_order(cases: pd.DataFrame, is_drawn: bool, seed: int) -> pd.DataFrame:
    """Cases as the file has them, where a scan's findings follow one another, or in a random order to draw from."""
    return cases.iloc[np.random.default_rng(seed).permutation(len(cases))] if is_drawn else cases


def summarize_cases(rows: pd.DataFrame, most: float, seed: int = 0) -> dict:
    """Means over cases with intervals.

    Args:
        rows: As `run` writes them to cases.csv, `reason` empty where a case counts.
        most: The part of its organ above which a lesion was left out.
        seed: Of the bootstrap.

    Returns:
        Counts, `left_out` by reason, `figures` of all cases that count (None if none does) and `per_finding`. Each
        figure has value, low and high; `mass_over_NAME` is the mean mass over the mean of NAME.
    """
    counted = rows[rows["reason"] == ""]
    summary = {"cases": len(rows), "counted": len(counted), "patients": int(counted["patient_id"].nunique())}
    summary |= {"most_of_the_organ": most, "left_out": dict(Counter(rows["reason"][rows["reason"] != ""]))}
    if counted.empty:
        return summary | {"figures": None, "per_finding": {}}
    patients = pd.factorize(counted["patient_id"])[0]
    weights = np.ones((1 + NUM_BOOTSTRAPS, len(counted)))  # the cases as they are, then of each resample
    weights[1:] = draw_patients(summary["patients"], NUM_BOOTSTRAPS, seed)[:, patients]
    columns = {name: counted[name].to_numpy(float) for name in (*FIGURES, "is_hit")}

    def means_of(name: str, among: np.ndarray) -> np.ndarray:
        total = weights[:, among].sum(1)  # 0 in a resample without any of these cases
        return np.divide(weights[:, among] @ columns[name][among], total, np.full_like(total, np.nan), where=total > 0)

    def with_interval(means: np.ndarray) -> dict:
        return figure(means[0], means[1:] if summary["patients"] > 1 else None)

    def figures_of(among: np.ndarray) -> dict:
        figures = {}
        for name, values in columns.items():
            known = among & np.isfinite(values)
            if not known.any():
                continue
            means = means_of(name, known)
            figures[name] = with_interval(means)
            if name not in ("mass", "is_hit"):
                mass = means_of("mass", known)  # of the cases that have both
                ratio = np.divide(mass, means, np.full_like(means, np.nan), where=means > 0)
                figures[f"mass_over_{name}"] = with_interval(ratio)
        return figures

    per_finding = {}
    for finding in sorted(counted["finding"].unique()):
        among = (counted["finding"] == finding).to_numpy()
        counts = {"organ": counted["organ"][among].iloc[0], "cases": int(among.sum())}
        per_finding[finding] = counts | figures_of(among)
    return summary | {"figures": figures_of(np.ones(len(counted), bool)), "per_finding": per_finding}


# The command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="Folder or Hub id of a saved model with its processor.")
    parser.add_argument("--cases", required=True, type=Path, help="CSV of cases, see above.")
    parser.add_argument("--num_cases", type=int, help="Draw cases at random until so many count (default: take all).")
    parser.add_argument("--seed", type=int, default=0, help="Of that draw and of the intervals (default: %(default)s).")
    parser.add_argument(
        "--most",
        type=float,
        default=0.5,
        help="Part of its organ above which a lesion is left out (default: %(default)s).",
    )
    parser.add_argument(
        "--numbering",
        choices=sorted(NUMBERINGS),
        default="totalsegmentator_v2",
        help="What the labels of the masks mean (default: %(default)s).",
    )
    parser.add_argument("--pictures", type=int, default=12, help="Cases to draw (default: %(default)s).")
    parser.add_argument("--out", required=True, type=Path, help="Folder to write; made if missing.")
    parser.add_argument("--device", default="cpu", help="Default: %(default)s.")


def run(args: argparse.Namespace) -> int:
    """Measure the cases of a CSV; raises EvaluationError where the arguments cannot be met."""
    from tqdm import tqdm

    if args.num_cases is not None and args.num_cases < 1:
        raise EvaluationError(f"--num_cases {args.num_cases} must be at least 1.")
    if args.seed < 0:  # told now, not by the bootstrap at the end
        raise EvaluationError(f"--seed {args.seed} must be 0 or more.")
    cases = read_cases(args.cases)
    model, processor = load_model(args.model, device=args.device)
    config = model.config
    if config.preprocessing == "published":
        raise EvaluationError(
            "a model of preprocessing 'published' reads scans as they are stored; lesions are compared in LPS. Take a "
            "model of preprocessing 'standard'."
        )
    table = np.asarray(organ_label_table(config.organ_classes, config.organs, args.numbering))
    args.out.mkdir(parents=True, exist_ok=True)
    has_twins = set(TWIN_COLUMNS) <= set(cases)
    rows, examples, known, num_counted = [], [], ("", None), 0
    wanted = args.num_cases or len(cases)
    for case in tqdm(in_order(cases, args.num_cases is not None, args.seed).to_dict("records"), unit="case"):
        if num_counted == wanted:
            break
        row = {column: case[column] for column in ("patient_id", "finding", "organ")} | {"reason": ""}
        if case["organ"] not in config.organs:
            rows.append(row | {"reason": "the model does not have the organ"})
            continue
        try:
            if known[0] != case["volume"]:  # a scan's findings follow one another
                known = (case["volume"], read_scan(processor, case["volume"], case["mask"], args.numbering))
            twin = None
            if has_twins and case["twin_volume"] and case["twin_mask"]:
                twin = read_scan(processor, case["twin_volume"], case["twin_mask"], args.numbering)
            found = measure(model, known[1], twin, case["organ"], read_mask(case["lesion"]), table)
        except (BadVolumeError, OSError) as error:
            raise EvaluationError(f"{case['patient_id']}, {case['finding']}: {error}") from error
        if isinstance(found, str):
            rows.append(row | {"reason": found})
            continue
        organ_map, is_lesion = found.pop("map"), found.pop("is_lesion")
        if found["volume_share"] > args.most:
            row["reason"] = f"the lesion takes up more than {args.most:g} of the organ"
        rows.append(row | found)
        num_counted += not row["reason"]
        if not row["reason"] and len(examples) < args.pictures:
            examples.append(draw(case, known[1], organ_map, is_lesion, found, processor.image_processor, args.out))
    frame = pd.DataFrame(rows, columns=["patient_id", "finding", "organ", "reason", *FIGURES, "is_hit", "patches"])
    frame.to_csv(args.out / "cases.csv", index=False, float_format="%.6g")
    summary = {"model": place_name(args.model), "weights": weights_digest(args.model)}
    summary |= {"available": len(cases), "seed": args.seed}
    summary |= summarize_cases(frame, args.most, args.seed) | {"examples": examples}
    write_json(summary, args.out / "lesion_attention.json")
    print(format_summary(summary))
    return 0


def draw(case: dict, scan: _Scan, organ_map, is_lesion: np.ndarray, found: dict, processor, folder: Path) -> dict:
    """Draw the planes through the middle of a lesion into `folder`; returns what stands below the picture."""
    prepared = scan.prepared
    # What is smaller than the prepared voxels, and between their centres, is not lost.
    on_scan = resample_mask(is_lesion, scan.volume.spacing, processor.spacing, prepared.box).astype(bool)
    places = [along[at] for along, at in zip(scan.grid.voxels_in(prepared), np.nonzero(is_lesion))]
    is_inside = np.all([along != OUTSIDE for along in places], axis=0)
    on_scan[tuple(along[is_inside] for along in places)] = True
    is_organ = prepared.mask == processor.organs.index(case["organ"]) + 1
    voxels = np.argwhere(on_scan)
    middle = voxels[np.square(voxels - voxels.mean(0)).sum(1).argmin()]
    name = re.sub(r"[^A-Za-z0-9_-]", "_", f"{case['patient_id']}_{case['finding']}") + ".png"
    title = f"{case['patient_id']}: {case['finding']} ({case['organ']})"
    picture = overlay_png(
        prepared.volume, organ_map.on_scan(), is_organ, prepared.spacing, middle, is_lesion=on_scan, title=title
    )
    (folder / name).write_bytes(picture)
    return {"picture": name} | {key: case[key] for key in ("patient_id", "finding", "organ")} | found


def format_summary(summary: dict) -> str:
    """The figures as text for a terminal."""
    lines = [f"{summary['counted']} of {summary['cases']} cases counted, {summary['patients']} patients"]
    lines += [f"  left out: {count} ({reason})" for reason, count in summary["left_out"].items()]
    if summary["figures"] is None:
        return "\n".join([*lines, "  nothing to measure"])

    def told(name: str) -> str:
        figure = summary["figures"][name]
        interval = "" if figure["low"] is None else f" ({figure['low']:.3f} to {figure['high']:.3f})"
        return f"{figure['value']:.3f}{interval}"

    words = {
        "mass": "attention in the lesion's patches",
        "volume_share": "lesion's part of the organ's volume",
        "patch_share": "lesion's part of the organ's patches",
        "twin_mass": "attention there without the lesion",
        "is_hit": "heaviest patch is one of the lesion's",
        "mass_over_volume_share": "attention / volume",
        "mass_over_patch_share": "attention / patches",
        "mass_over_twin_mass": "attention / attention without the lesion",
    }
    lines += [f"  {text:<42} {told(name)}" for name, text in words.items() if name in summary["figures"]]
    return "\n".join(lines)
