"""Cases to look at: the surest mistakes of a run and findings it was right about, with the attention behind the score.

(1) Cases are chosen from the table of scores (chosen_cases.py).
(2) Each is drawn through its organ's heaviest patch (attention.py, overlays.py), in the window in which it was scored.
(3) What the report says of the organ stands beside it, if it may.

Pictures and examples.json lie in the folder `examples` of the results, where the HTML report finds them. The sentences
are kept in examples.json with `with_text` alone, or of the synthetic set.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from datasets import Dataset
from transformers import PreTrainedModel

from evaluation_fvlm.attention import attention_maps
from evaluation_fvlm.chosen_cases import is_synthetic, surest_hits, worst_errors
from evaluation_fvlm.json_files import write_json
from evaluation_fvlm.overlays import overlay_png
from evaluation_fvlm.windows import WindowRule
from modeling_fvlm.processed_split import decode_volume

FOLDER = "examples"
KEYS = ("task", "patient_id", "scan_id", "recon_id", "finding", "organ")


def collect_examples(
    model: PreTrainedModel,
    dataset: Dataset,
    frame: pd.DataFrame,
    folder: Path | str,
    *,
    rule: WindowRule | None = None,
    embedded: Sequence[str] | None = None,
    num_errors: int = 12,
    num_hits: int = 6,
    with_text: bool = False,
) -> list[dict]:
    """Draw the cases of a run and write them into `folder`/examples; what an earlier run left there goes.

    Args:
        model: The `FVLMModel` that gave the scores; its mode is restored.
        dataset: The rows that were scored.
        frame: Their scores.
        folder: Of the results.
        rule: Of the windows, as they were scored.
        embedded: The organs that were embedded together (`attention_maps`).
        num_errors, num_hits: Cases at most.
        with_text: Keep what the report says of the organ; of the synthetic set it is kept in any case.

    Returns:
        A dict for each: `KEYS`, kind, score, label, picture (relative to `folder`), peak_weight, patches,
        effective_patches, and text where it is kept.
    """
    folder, keeps_text = Path(folder), with_text or is_synthetic(frame)
    out = folder / FOLDER
    out.mkdir(parents=True, exist_ok=True)
    for path in [out / "examples.json", *out.glob("[0-9][0-9][0-9]-*.png")]:
        path.unlink(missing_ok=True)
    place_of = {key: place for place, key in enumerate(zip(dataset["patient_id"], dataset["recon_id"]))}
    examples = []
    cases = pd.concat([worst_errors(frame, num_errors), surest_hits(frame, num_hits)])
    for number, case in enumerate(cases.to_dict("records"), start=1):
        row = dataset[place_of[case["patient_id"], case["recon_id"]]]
        example = {key: case[key] for key in KEYS}
        example |= {"kind": case["kind"], "score": float(case["score"]), "label": int(case["label"])}
        words = re.sub(r"[^A-Za-z0-9._-]", "_", f"{case['recon_id']}-{case['finding']}")
        name = f"{number:03d}-{words[:100]}.png"
        example |= draw(model, row, case, rule, embedded, out / name) | {"picture": f"{FOLDER}/{name}"}
        if keeps_text:
            example["text"] = caption_of(row, case["organ"])
        examples.append(example)
    write_json(examples, out / "examples.json")
    return examples


def draw(
    model: PreTrainedModel,
    row: dict,
    case: dict,
    rule: WindowRule | None,
    embedded: Sequence[str] | None,
    path: Path,
) -> dict:
    """Write the picture of one case; returns the figures of its map."""
    volume, mask = decode_volume(row)
    organ_map = attention_maps(model, volume, mask, [case["organ"]], rule, embedded)[case["organ"]]
    is_organ = mask == list(model.config.organs).index(case["organ"]) + 1
    title = f"{case['recon_id']}: {case['finding']} ({case['organ']}), score {case['score']:.2f}"
    peak = organ_map.peak_voxel(is_organ)
    path.write_bytes(overlay_png(volume, organ_map.on_scan(), is_organ, row["spacing"], peak, title=title))
    return {
        "peak_weight": float(organ_map.weights.max()),
        "patches": int(organ_map.is_organ.sum()),
        "effective_patches": organ_map.effective_patches,
    }


def caption_of(row: dict, organ: str) -> str:
    """What the report says of an organ; "" where it says nothing."""
    captions: Sequence[dict] = row.get("captions") or ()
    return next((caption["caption"] for caption in captions if caption["organ"] == organ), "")
