"""What a mask is worth: the pipeline's zero-shot scores of the same scans with and without one, as AUC.

    python -m benchmarks.without_mask --model runs/demo/model --data runs/demo/processed \\
        --release runs/demo/source/dataset --task synthetic

Scans are read from a release in CT-RATE's layout, labels from the split that was built from it; patients are those of
its validation split. Without a mask every organ is pooled from the whole volume (modeling_fvlm/whole_volume.py).
"""

import argparse
import json
from pathlib import Path

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from evaluation_fvlm.protocols import Protocol, compare_frames
from evaluation_fvlm.split import open_split
from evaluation_fvlm.tasks import PROMPTS_DIR, load_task
from evaluation_fvlm.zero_shot import SCORE_COLUMNS
from modeling_fvlm import FVLMModel, FVLMProcessor, FVLMZeroShotPipeline


def scores(pipe: FVLMZeroShotPipeline, dataset, release: Path, task: str) -> list[pd.DataFrame]:
    """Tables of `SCORE_COLUMNS`: with masks, and without.

    Args:
        pipe: Made with the findings to ask.
        dataset: Rows of the split.
        release: Folder with valid_fixed/ and ts_seg/.
        task: Its name in the tables.
    """
    tables: list[list[tuple]] = [[], []]
    for row in tqdm(dataset, disable=None):
        place = Path("valid_fixed", row["patient_id"], row["scan_id"], f"{row['recon_id']}.nii.gz")
        volume, mask = release / place, release / "ts_seg" / "ts_total" / place
        labels = {label["finding"]: label["value"] for label in row["labels"]}
        for table, scan in zip(tables, ({"volume": volume, "mask": mask}, {"volume": volume})):
            for answer in pipe(scan):
                label = labels.get(answer["finding"], -1)
                score = np.nan if answer["probability"] is None else answer["probability"]
                names = (task, row["patient_id"], row["scan_id"], row["recon_id"], answer["finding"], answer["organ"])
                table.append((*names, score, label if label in (0, 1) else np.nan, bool(answer["is_complete"])))
    return [pd.DataFrame(table, columns=SCORE_COLUMNS) for table in tables]


def main(arguments: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="Folder of a trained model.")
    parser.add_argument("--data", required=True, help="Processed split, for its labels.")
    parser.add_argument("--release", type=Path, required=True, help="Folder of the release it was built from.")
    parser.add_argument("--task", default="synthetic", help="Prompt set (default: %(default)s).")
    parser.add_argument("--limit", type=int, help="Only the first so many scans.")
    parser.add_argument("--json", type=Path, help="Write the comparison.")
    args = parser.parse_args(arguments)
    task = load_task(args.task)
    path = args.task if str(args.task).endswith((".yaml", ".yml")) else PROMPTS_DIR / f"{args.task}.yaml"
    dataset = open_split(args.data, "validation").select_columns(["patient_id", "scan_id", "recon_id", "labels"])
    if args.limit is not None:
        dataset = dataset.select(range(min(args.limit, len(dataset))))
    pipe = FVLMZeroShotPipeline(
        model=FVLMModel.from_pretrained(args.model),
        processor=FVLMProcessor.from_pretrained(args.model),
        device="cpu",
        findings=path,
    )
    tables = scores(pipe, dataset, args.release, task.name)
    # The threshold plays no part: AUCs are compared.
    result = compare_frames(*tables, Protocol(level="reconstruction", threshold=0.5))
    auc = result["macro"]["auc"]
    difference = auc["difference"]
    print(f"{'finding':<40} {'organ':<12} {'mask':>6} {'none':>6}")
    for finding, entry in result["per_finding"].items():
        if entry["auc"]["a"] is not None:
            print(f"{finding:<40} {entry['organ']:<12} {entry['auc']['a']:6.3f} {entry['auc']['b']:6.3f}")
    print(
        f"macro AUC of {result['num_findings']} findings, {result['num_reconstructions']} scans: {auc['a']:.3f} with "
        f"masks, {auc['b']:.3f} without; difference {difference['value']:.3f} "
        f"[{difference['low']:.3f}, {difference['high']:.3f}]"
    )
    if args.json is not None:
        args.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return result


if __name__ == "__main__":
    main()
