"""Load a finished demo run back as a stranger would, and say where to look.

    python -m evaluation_fvlm.tour --run runs/demo

(1) The saved folder is loaded by `pipeline(..., trust_remote_code=True)`: the code that runs is the copy beside the
weights, nothing of this checkout. (2) It reads one held-out CT from its NIfTI file and states its findings next to
what the patient was drawn with. (3) The scores and the pictures of the run are named.
"""

import argparse
import csv
import json
import sys
from pathlib import Path

import yaml
from transformers import pipeline

PROMPTS = Path(__file__).resolve().parent.parent / "hub_configs" / "prompts" / "synthetic.yaml"


def held_out_scan(source: Path, number: int) -> tuple[Path, Path, dict[str, str]]:
    """Volume, mask and labels of the `number`-th row of the validation labels."""
    with open(source / "dataset" / "multi_abnormality_labels" / "valid_predicted_labels.csv", newline="") as file:
        labels = list(csv.DictReader(file))[number]
    name = labels.pop("VolumeName").removesuffix(".nii.gz")
    scan, patient = name.rsplit("_", 1)[0], name.rsplit("_", 2)[0]
    place = Path("valid_fixed") / patient / scan / f"{name}.nii.gz"
    return source / "dataset" / place, source / "dataset" / "ts_seg" / "ts_total" / place, labels


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--run", type=Path, required=True, help="Folder of `make demo`: source, processed, model, eval."
    )
    parser.add_argument("--scan", type=int, default=0, help="Which held-out scan to read, from 0.")
    options = parser.parse_args(arguments)
    run: Path = options.run
    metrics = json.loads((run / "eval" / "metrics.json").read_text(encoding="utf-8"))
    steps = json.loads((run / "model" / "run.json").read_text(encoding="utf-8"))["steps"]

    # (1)
    pipe = pipeline("ct-zero-shot", model=str(run / "model"), trust_remote_code=True)
    items = yaml.safe_load(PROMPTS.read_text(encoding="utf-8"))["items"]
    # (2)
    volume, mask, labels = held_out_scan(run / "source", options.scan)
    answers = pipe({"volume": str(volume), "mask": str(mask)}, findings=items)
    answers = [answer for answer in answers if answer["probability"] is not None]
    answers.sort(key=lambda answer: -answer["probability"])
    print(f"\nThe saved model, loaded back, reads {volume.name}:\n")
    print(f"  {'finding':34} {'organ':12} {'probability':>11}   drawn with it")
    for answer in answers:
        is_present = labels.get(answer["finding"]) == "1"
        if is_present or answer["probability"] > 0.5:
            print(
                f"  {answer['finding']:34} {answer['organ']:12} {answer['probability']:11.2f}   "
                f"{'yes' if is_present else 'no'}"
            )
    # (3)
    print(
        f"\nmacro AUC {metrics['macro_auc']:.3f} over {metrics['num_findings']} findings on {metrics['num_patients']} "
        f"held-out patients, learned from captions alone in {steps:,} steps\n\nLook at\n"
        f"  {run / 'processed' / 'previews'}   what the network was given\n"
        f"  {run / 'model' / 'loss_curves.png'}   the loss of every organ against chance\n"
        f"  {run / 'eval'}   report.html, roc.png, auc_bars.png, scores.csv, metrics.json\n"
        f"  {run / 'model' / 'README.md'}   the model card\n"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
