"""The dataset card of a processed split: what `datasets` needs to load it, and all a reader needs to use it.

The card alone is enough: the decoder stands in it, and a test runs the card's code in a process that imports nothing
of ours.
"""

import hashlib
import json
from pathlib import Path

import pyarrow as pa
import yaml

from .shards import schema_of, write_text

DECODER = '''\
import os

import numpy as np
import zstandard
from datasets import load_dataset


def decode(row):
    """A row's volume (int16, HU) and mask (uint8, {labels}): (depth, height, width)."""
    unpack = zstandard.ZstdDecompressor().decompress
    volume = np.frombuffer(unpack(row["volume"]), dtype="<i2").reshape(row["shape"])
    mask = np.frombuffer(unpack(row["mask"]), dtype="u1").reshape(row["shape"])
    return volume, mask


# Streaming reads to the end here on purpose: a program that ends in the middle of a stream may abort while it exits
# (https://github.com/apache/arrow/issues/45214).
folder = os.getcwd()  # run inside this folder, or put its full path here (a plain "." is not understood)
dataset = load_dataset(folder, "{config}", split="{split}", streaming=True)  # False: any row, by a copy in the cache
for row in dataset:
    volume, mask = decode(row)
    print(row["recon_id"], {more}volume.shape, row["spacing"], np.unique(mask).tolist())
'''
# What differs between the configs: the meaning of a mask, and what else tells one row from another.
WORDS = {
    "volumes": {"{labels}": "0 background, else place in `organs` + 1", "{more}": ""},
    "organ_crops": {"{labels}": "1 where the organ is", "{more}": 'row["organ"], '},
}

LICENCES = {
    "ct_rate": (
        "Built from a release in CT-RATE's layout. CT-RATE is under CC BY-NC-SA 4.0 and its terms of access forbid "
        "handing it on; what is built from it falls under the same terms."
    ),
    "rad_chest_ct": (
        "Built from RAD-ChestCT (https://zenodo.org/records/6406114); its terms hold for this folder as well."
    ),
    "folder": "The terms of the scans and reports it was built from hold for this folder as well.",
}


def write_card(folder: Path, manifest: dict) -> None:
    """Write README.md from the manifest."""
    write_text(folder / "README.md", card_text(manifest))


def card_text(manifest: dict) -> str:
    settings = manifest["settings"]
    splits = {name: content for name, content in manifest["splits"].items() if content["rows"]}
    organs = settings["organ_set"]["organs"]
    configs = settings.get("configs", ["volumes"])  # splits from before there was a choice
    header = {
        "configs": [
            {
                "config_name": config,
                **({"default": True} if config == configs[0] else {}),
                # `datasets` keeps one cache for all local folders of one NAME and one card: without a word about the
                # content, a split that was built again would be read from the cache of the old one, in silence.
                "description": f"content {content_digest(manifest)}",
                "data_files": [{"split": name, "path": f"{config}/{name}-*.parquet"} for name in splits],
            }
            for config in configs
        ],
        "dataset_info": [{"config_name": config, "features": features(schema_of(config))} for config in configs],
    }
    lines = [
        "---",
        yaml.safe_dump(header, sort_keys=False).rstrip(),
        "---",
        "",
        "# CT volumes, organ masks and organ captions",
        "",
        f"Written by fVLM's builder `{settings['builder']}`. A row of config `volumes` is one reconstruction: a CT",
        "volume, the mask of its organs, what the report says of each organ, and the report itself. A row of",
        "`organ_crops` is one organ of it: the CT around that organ, its mask and what the report says of it. Here:",
        f"{' and '.join(f'`{config}`' for config in configs)}. For research only, not for diagnosis.",
        "",
        *_table(
            ["split", "rows", "scans", "patients", "skipped", "left out on purpose"],
            [
                [name, *(content[kind] for kind in ("rows", "scans", "patients")), *without_row(content)]
                for name, content in splits.items()
            ],
        ),
        "",
        *(
            [
                "Splits are by id, not by patient: the table of the source has no column `patient_id`; scans of one",
                "patient may stand in several splits, and `patient_id` repeats the id.",
                "",
            ]
            if settings["options"].get("splits_by") == "id"
            else ["Splits are by patient."]
        ),
        "Every case without a row stands in `manifest.json` with its reason; look at `previews/` before use.",
        "",
        "## Geometry and values",
        "",
        *geometry_lines(settings),
        "- `volume` is int16 in Hounsfield units, not windowed. `mask` is uint8: 0 background, else "
        + ("the label below." if configs[0] == "volumes" else "1, the organ of the row."),
        *(
            ["- In `organ_crops` a scan is cut once more, to one organ and the same margin as far as the scan goes."]
            if "organ_crops" in configs
            else []
        ),
        "",
        "## Read it",
        "",
        "Needs `datasets`, `zstandard` and `numpy`, nothing else:",
        "",
        "```python",
        decoder(configs[0], next(iter(splits))),
        "```",
        "",
        *(
            [
                "Config `organ_crops` is read alike, by its name. It has the columns `organ`, `caption`, `is_abnormal`",
                "and `is_mentioned` of one organ, and a mask that is 1 where the organ is.",
                "",
            ]
            if len(configs) > 1
            else []
        ),
        "## Organs",
        "",
        f"Organ set `{settings['organ_set']['name']}`: how many cases hold the organ in their mask, speak of it, and",
        "report a finding there. `captions` has one entry per organ in this order; an organ not spoken of has",
        "`is_mentioned` false and the sentence that nothing is to be seen.",
        "",
        *_table(
            ["label", "organ", *(f"{name}: in mask / mentioned / abnormal" for name in splits)],
            [
                [index, organ, *(" / ".join(map(str, split["organs"][organ].values())) for split in splits.values())]
                for index, organ in enumerate(organs, start=1)
            ],
        ),
        "",
        "Captions: the sentences of the impression that name the organ, then those of the findings"
        + (" (rule and terms: " + f"lexicon `{settings['lexicon']['name']}` {settings['lexicon']['version']}).")
        + " `labels`:",
        "1 present, 0 absent, -1 unknown, under the names of the source.",
        *label_lines(settings.get("labels")),
        "",
        "## Terms",
        "",
        LICENCES.get(settings["builder"], LICENCES["folder"]),
        "",
    ]
    return "\n".join(lines)


def label_lines(labels: dict | None) -> list[str]:
    """Where labels come from that the source does not have."""
    if labels is None:
        return []
    unmentioned = "unknown" if labels["unmentioned"] == -1 else "absent"
    return [
        f"Findings that the source has no label of are labelled by the words of the report (rules `{labels['name']}`",
        f"{labels['version']}; one that is not spoken of counts as {unmentioned}); no radiologist has looked at them.",
    ]


def without_row(content: dict) -> tuple[int, int]:
    """How many cases of a split were skipped, and how many left out on purpose."""
    excluded = content.get("excluded", 0)  # splits from before the two were told apart have none
    return content["cases"] - content["rows"] - excluded, excluded


def decoder(config: str, split: str) -> str:
    """The code that reads a config, with nothing of ours."""
    text = DECODER.rstrip()
    for mark, word in {**WORDS[config], "{config}": config, "{split}": split}.items():
        text = text.replace(mark, word)
    return text


def geometry_lines(settings: dict) -> list[str]:
    """Axes, spacing and extent of the arrays."""
    spacing = " x ".join(f"{edge:g}" for edge in settings["spacing"])
    margin = " / ".join(f"{edge:g}" for edge in settings["margin_voxels"])
    if settings["preprocessing"] == "published":
        return [
            "- `preprocessing: published`: prepared as the published weights saw their scans, faults included. The",
            "  captions are in the published form.",
            "- Arrays are the stored ones, reversed to `(depth, height, width)`: LPS for CT-RATE's files, whatever the",
            "  file had for others.",
            f"- Resampled towards {spacing} mm in that order, with the two spacings in the plane exchanged;",
            "  `spacing` in a row is the true one.",
            f"- Cut to the box of all organs with a margin of {margin} voxels below and one less above, then padded to",
            f"  {' x '.join(map(str, settings['padded_to']))} voxels with {settings['padding_hu']} HU.",
        ]
    return [
        "- Arrays are `(depth, height, width)` in LPS orientation: depth from feet to head, height from front to back,",
        "  width from the patient's right to the patient's left.",
        f"- Resampled to about {spacing} mm in that order; `spacing` in a row is exact.",
        f"- Cut to the box of all organs with a margin of {margin} voxels.",
    ]


def content_digest(manifest: dict) -> str:
    """Sixteen hex digits that change with any byte of any shard."""
    return hashlib.sha256(json.dumps(manifest["shards"], sort_keys=True).encode()).hexdigest()[:16]


def features(schema: pa.Schema) -> list[dict]:
    """The columns in the form `datasets` writes into cards (compared with its own in the tests)."""
    return [{"name": column.name, **_feature(column.type)} for column in schema]


def _feature(kind: pa.DataType) -> dict:
    if pa.types.is_list(kind) or pa.types.is_fixed_size_list(kind):
        inner = _feature(kind.value_type)
        described = {"list": inner.get("struct", inner.get("dtype"))}
        return {**described, "length": kind.list_size} if pa.types.is_fixed_size_list(kind) else described
    if pa.types.is_struct(kind):
        return {"struct": [{"name": column.name, **_feature(column.type)} for column in kind]}
    return {"dtype": {"float": "float32"}.get(str(kind), str(kind))}


def _table(head: list, rows: list[list]) -> list[str]:
    """A Markdown table."""
    return [
        f"| {' | '.join(map(str, head))} |",
        f"|{' --- |' * len(head)}",
        *(f"| {' | '.join(map(str, row))} |" for row in rows),
    ]
