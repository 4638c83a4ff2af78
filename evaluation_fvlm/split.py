"""Opening a processed split for evaluation, choosing its rows, and refusing one that was made for another model.

Rows that are not scored are named with their reason, so that a count can be checked case by case (dropped.csv).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd
from datasets import Dataset
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from transformers import PreTrainedConfig

from evaluation_fvlm.equal_reports import DUPLICATES, REASONS, repeats_a_report, report_key
from evaluation_fvlm.errors import EvaluationError
from modeling_fvlm.organs import NUMBERINGS
from modeling_fvlm.preparation import padding_hu
from modeling_fvlm.processed_split import load_rows, natural_key

LEVELS = ("scan", "reconstruction")
SAME_ROW = "the split holds this reconstruction twice"
NOT_FIRST = "another reconstruction of the scan is scored"
BEYOND_LIMIT = "beyond --limit"
REPORT_COLUMNS = ("impression", "findings")
DROPPED_COLUMNS = ["patient_id", "scan_id", "recon_id", "reason"]


def open_split(data: str, split: str, revision: str | None = None) -> Dataset:
    """The rows of config `volumes` of a processed split, from a folder or the Hub.

    Raises:
        EvaluationError: If the folder is no processed split, or has no split of that name.
    """
    folder = Path(data)
    if folder.is_dir() and not (folder / "README.md").is_file():
        raise EvaluationError(
            f"{folder} is no processed split: it has no README.md that names its configs. Build one with "
            f"`python -m data_builders --help`."
        )
    try:
        return load_rows(data, split, revision)
    except ValueError as error:  # datasets names the splits or configs that exist
        raise EvaluationError(f"{data}, config 'volumes', split '{split}': {error}") from error


def read_manifest(data: str, revision: str | None = None) -> dict:
    """`manifest.json` of a processed split: without it the meaning of a mask's labels is not known.

    Raises:
        EvaluationError: If there is none.
    """
    path = Path(data) / "manifest.json"
    if not Path(data).is_dir():
        try:
            path = Path(hf_hub_download(data, "manifest.json", repo_type="dataset", revision=revision))
        except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
            raise EvaluationError(
                f"{data} is no folder, and no data set on the Hub with a manifest.json: {error}"
            ) from error
    elif not path.is_file():
        raise EvaluationError(
            f"{data} has no manifest.json, so its organs cannot be checked against the model's. Give the folder that "
            f"`python -m data_builders ... --out` wrote, the one that holds README.md and volumes/."
        )
    return json.loads(path.read_text(encoding="utf-8"))


def check_split_matches(manifest: dict, config: PreTrainedConfig, where: str) -> None:
    """Refuse a split whose organs, spacing, margin, preprocessing or padding are not the model's.

    With other organs, or organs of other classes, its labels would mean others; prepared another way its scans are not
    what the model knows. What an older manifest does not tell is not compared.

    Raises:
        EvaluationError: Naming the first difference and both values.
    """
    settings = manifest["settings"]
    organs, expected = list(settings["organ_set"]["organs"]), list(config.organs)
    if organs != expected:
        place = next((n for n, (a, b) in enumerate(zip(organs, expected)) if a != b), min(len(organs), len(expected)))
        raise EvaluationError(
            f"{where} was prepared for {len(organs)} organs, the model has {len(expected)}; they differ from label "
            f"{place + 1} on: {organs[place : place + 3]} against {expected[place : place + 3]}. Build the split with "
            f"the model's organ set '{config.organ_set}', or choose a model trained on these organs."
        )
    built = settings["organ_set"].get("classes") or {}
    for organ in expected:
        there, here = (_classes_by_numbering(classes.get(organ)) for classes in (built, config.organ_classes))
        for numbering in sorted(there.keys() & here.keys()):
            if there[numbering] != here[numbering]:
                raise EvaluationError(
                    f"{where}: its organ '{organ}' is made of {sorted(there[numbering])} ({numbering}), the model's of "
                    f"{sorted(here[numbering])}. Build the split with the model's organ set '{config.organ_set}'."
                )
    if not np.allclose(settings["spacing"], config.spacing, rtol=0, atol=1e-3):
        raise EvaluationError(
            f"{where} was prepared at spacing {list(settings['spacing'])} mm (depth, height, width), the model reads "
            f"{list(config.spacing)}. Build the split at the model's spacing."
        )
    margin = settings.get("margin_voxels")
    if margin is not None and not np.array_equal(margin, config.margin_voxels):
        raise EvaluationError(
            f"{where} was prepared with a margin of {list(margin)} voxels (depth, height, width), the model reads "
            f"{list(config.margin_voxels)}. Build the split with `--margin {' '.join(map(str, config.margin_voxels))}`."
        )
    prepared = settings.get("preprocessing", "standard")  # splits from before there was a choice are standard
    if prepared != config.preprocessing:
        raise EvaluationError(
            f"{where} was prepared with preprocessing '{prepared}', the model reads '{config.preprocessing}'. Build "
            f"the split with `--preprocessing {config.preprocessing}`."
        )
    if prepared == "published":
        volume_size, lowest = list(config.vision_config.volume_size), padding_hu(config.windows, is_published=True)
        for name, reads, unit in (("padded_to", volume_size, "voxels"), ("padding_hu", lowest, "HU")):
            if name in settings and settings[name] != reads:
                raise EvaluationError(
                    f"{where}: {name} is {settings[name]} {unit}, the model's processor pads to {reads}. The "
                    "builders pad for the published crop and HU window; a model of others cannot read this split."
                )


def _classes_by_numbering(entry: Mapping | list[str] | None) -> dict[str, set[str]]:
    """Classes of one organ per numbering; a plain list stands for every numbering."""
    if not isinstance(entry, Mapping):
        entry = dict.fromkeys(NUMBERINGS, entry) if entry else {}
    return {numbering: set(names) for numbering, names in entry.items()}


def select_scans(dataset: Dataset, level: str = "scan", limit: int | None = None) -> Dataset:
    """Rows to score: `choose_scans` with duplicates kept, without what was left out."""
    return choose_scans(dataset, level, limit=limit)[0]


def choose_scans(
    dataset: Dataset, level: str = "scan", *, duplicates: str = "keep", limit: int | None = None
) -> tuple[Dataset, pd.DataFrame]:
    """Rows to score: the first reconstruction of every scan, or every reconstruction; and the others, with the reason.

    A scan's reconstructions show one examination; scored one by one they count a patient several times and make the
    AUC look surer than it is. "First" is by `recon_id` (x_2 before x_10), so the choice does not hang on the order of
    the shards. Scans of two patients are two, whatever they are called.

    A row that the split holds twice is scored once.

    Args:
        level: "scan" (one row each) or "reconstruction" (all; what the published CT-RATE numbers count).
        duplicates: Which scans with equal reports (impression and findings) are scored, see equal_reports.py.
        limit: Only the first so many rows of the choice, in the split's order.

    Returns:
        The rows, and a table with a row for each one left out (`DROPPED_COLUMNS`).

    Raises:
        EvaluationError: If level or duplicates are none of these, or reports are to be compared and the split holds
            none.
    """
    for name, value, known in (("level", level, LEVELS), ("duplicates", duplicates, DUPLICATES)):
        if value not in known:
            raise EvaluationError(f"{name} '{value}' is not one of {list(known)}.")
    identity = pd.DataFrame({name: dataset[name][:] for name in DROPPED_COLUMNS[:-1]})
    reason = pd.Series("", index=identity.index)
    order = sorted(identity.index, key=lambda row: natural_key(identity["recon_id"][row]))  # equal names: split's order
    repeated = identity.duplicated()
    reason[repeated] = SAME_ROW
    if level == "scan":
        repeated = identity.loc[[row for row in order if not reason[row]]].duplicated(["patient_id", "scan_id"])
        reason[repeated.index[repeated]] = NOT_FIRST
    if duplicates != "keep":
        if not set(REPORT_COLUMNS) & set(dataset.column_names):
            raise EvaluationError(
                f"--duplicates {duplicates} compares reports, but the split has neither the column 'findings' nor "
                "'impression'. Keep duplicates, or build the split with its reports."
            )
        repeated = repeats_a_report(identity.assign(report=_reports(dataset))[reason == ""], duplicates)
        reason[repeated.index[repeated]] = REASONS[duplicates]
    rows = np.flatnonzero(reason == "")
    reason[rows[limit:] if limit is not None else rows[:0]] = BEYOND_LIMIT
    dropped = identity.assign(reason=reason)[reason != ""].reset_index(drop=True)
    return dataset.select(rows[:limit]), dropped


def _reports(dataset: Dataset) -> list[str]:
    parts = (dataset[name][:] if name in dataset.column_names else [None] * len(dataset) for name in REPORT_COLUMNS)
    return [report_key(impression, findings) for impression, findings in zip(*parts)]
