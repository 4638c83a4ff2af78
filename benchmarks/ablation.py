"""What the size of the contrast, the targets, the balance of the organs and the way of adapting do: one table.

    python -m benchmarks.ablation --data runs/ablation/processed --out runs/ablation
    python -m benchmarks.ablation --data ... --out ... --rows contrast-2 contrast-8 --seeds 0

Each row is a training on the synthetic set through `train_fvlm.py` and a zero-shot evaluation of its held-out patients
through `eval_fvlm.py`, on the 32 findings of the prompt set `synthetic`. Labels are read in training by the row of the
label targets alone. The rows of the contrast run with three seeds, the others with one. What is finished is not run
again, so the command goes on where it was stopped. Two runs of one thread each go side by side (--jobs).

    equal patients  every row sees --patients patients; a larger contrast therefore makes fewer steps
    equal steps     every row makes --steps steps; a larger contrast therefore sees more patients
    the rest        at a contrast of 8 and equal patients; the rows of adapting go on from the row `contrast-8`

The learning rate is that of the recipe in every row: none was tuned for it. The table goes between the marks of
docs/ablation.md.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

from .measure import console
from .results import START, STOP, put_between_marks

HOME = Path(__file__).resolve().parent.parent
DOCUMENT = HOME / "docs" / "ablation.md"
CONTRASTS = (2, 8, 32, 128)
LARGEST_CHUNK = 8  # patients in one graph; a larger contrast goes through the gradient cache
BASE = "contrast-8"


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        name: Folder of its runs.
        group, label: Where it stands in the table, and what stands there.
        contrast: Patients contrasted.
        steps: Optimizer steps.
        options: Further words for train_fvlm.py.
        has_seeds: Whether it runs with every seed, or the first alone.
        start: Row from whose model it goes on.
    """

    name: str
    group: str
    label: str
    contrast: int
    steps: int
    options: tuple[str, ...] = ()
    has_seeds: bool = False
    start: str | None = None


def rows(patients: int, steps: int) -> list[Row]:
    """The table's lines."""
    table = [
        Row(f"contrast-{size}", "equal patients", f"contrast {size}", size, patients // size, has_seeds=True)
        for size in CONTRASTS
    ]
    table += [
        Row(f"steps-{size}", "equal steps", f"contrast {size}", size, steps, has_seeds=True)
        for size in CONTRASTS
        if patients // size != steps  # that one stands above already
    ]
    at_8 = {"contrast": 8, "steps": patients // 8}
    targets = {
        "momentum": ("--targets", "momentum"),
        "co-teaching": ("--targets", "co_teaching"),
        "labels": ("--targets", "labels", "--label_task", "synthetic"),
    }
    table += [Row(f"targets-{name}", "targets", name, options=words, **at_8) for name, words in targets.items()]
    balance = {
        "sum": ("--model.organ_reduction", "sum"),
        "uncertainty": ("--model.organ_reduction", "uncertainty"),
        "dynamic weight average": ("--model.organ_reduction", "dwa"),
        "balanced sampling": ("--organ_sampling", "balanced"),
        "curriculum by frequency": ("--curriculum", "frequency"),
        "curriculum by difficulty": ("--curriculum", "difficulty"),
        "small organs: smoothing 0.05, token dropout 0.2": (
            *("--organ_label_smoothing", "0.05"),
            *("--organ_token_dropout", "0.2"),
        ),
    }
    table += [
        Row(f"balance-{name.split(':')[0].replace(' ', '-')}", "balance", name, options=words, **at_8)
        for name, words in balance.items()
    ]
    table += [
        Row(
            f"global-{kind}",
            "global branch",
            label,
            # Reports are longer than captions.
            options=("--model.volume_pooling", kind, "--model.max_report_length", "384"),
            **at_8,
        )
        for kind, label in (("mean", "mean over tokens"), ("attention", "attention pooling"))
    ]
    # Both go on from the model of `contrast-8`, with as many patients again.
    adapting = {
        "full": ("everything", ()),
        "lora": ("LoRA of rank 16 in both towers", ("--lora", "vision", "text")),
        "heads": ("pooling and projections alone", ("--freeze", "vision_model", "text_model")),
    }
    table += [
        Row(f"adapt-{name}", "adapting", label, options=("--centring_rows", "0", *words), start=BASE, **at_8)
        for name, (label, words) in adapting.items()
    ]
    return table


def train_command(row: Row, seed: int, options: argparse.Namespace) -> list[str]:
    """Words of one training."""
    words = [sys.executable, str(HOME / "train_fvlm.py"), "--recipe", options.recipe, "--data", str(options.data)]
    words += ["--output_dir", str(options.out / run_name(row, seed) / "model"), "--seed", str(seed), "--use_cpu"]
    words += [
        "--contrastive_batch_size",
        str(row.contrast),
        "--micro_batch_size",
        str(min(row.contrast, LARGEST_CHUNK)),
    ]
    words += ["--max_steps", str(row.steps), "--logging_steps", str(max(1, row.steps // 20)), "--save_strategy", "no"]
    words += ["--disable_tqdm", "true", "--eval_strategy", "no", *(["--bf16"] if options.bf16 else [])]
    if row.start is not None:
        words += ["--init_from", str(options.out / f"{row.start}-seed{seed}" / "model")]
    return [*words, *row.options]


def run_name(row: Row, seed: int) -> str:
    """Folder of one run."""
    return f"{row.name}-seed{seed}"


def run(row: Row, seed: int, options: argparse.Namespace) -> str | None:
    """Train and evaluate, unless that is done; what went wrong, or None."""
    folder = options.out / run_name(row, seed)
    if (folder / "eval" / "metrics.json").is_file():
        return None
    folder.mkdir(parents=True, exist_ok=True)
    evaluate = [
        sys.executable,
        str(HOME / "eval_fvlm.py"),
        "--model",
        str(folder / "model"),
        "--data",
        str(options.data),
    ]
    evaluate += ["--split", "validation", "--tasks", options.task, "--out", str(folder / "eval")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    start = time.time()
    with (folder / "log.txt").open("w", encoding="utf-8") as log:
        for command in (train_command(row, seed, options), evaluate):
            finished = subprocess.run(command, env=environment, stdout=log, stderr=subprocess.STDOUT, cwd=HOME)
            if finished.returncode:
                return f"{run_name(row, seed)} ended with status {finished.returncode}: see {folder / 'log.txt'}"
    (folder / "seconds.json").write_text(json.dumps(round(time.time() - start)) + "\n", encoding="utf-8")
    return None


def table_of(lines: Sequence[Row], seeds: Sequence[int], options: argparse.Namespace) -> str:
    """Markdown of what is finished."""
    text = ["| | macro AUC | findings at 0.90 or more | steps | patients seen | minutes |"]
    text += ["| --- | ---: | ---: | ---: | ---: | ---: |"]
    group = None
    for row in lines:
        metrics, minutes = [], []
        for seed in seeds if row.has_seeds else seeds[:1]:
            folder = options.out / run_name(row, seed)
            if (folder / "eval" / "metrics.json").is_file():
                metrics.append(json.loads((folder / "eval" / "metrics.json").read_text(encoding="utf-8")))
                if (folder / "seconds.json").is_file():
                    minutes.append(json.loads((folder / "seconds.json").read_text(encoding="utf-8")) / 60)
        if not metrics:
            continue
        if row.group != group:
            group = row.group
            text.append(f"| **{group}** | | | | | |")
        aucs = [entry["macro_auc"] for entry in metrics]
        high = [sum((auc or 0) >= 0.9 for auc in aucs_of(entry)) for entry in metrics]
        auc = f"{statistics.mean(aucs):.3f}"
        if len(aucs) > 1:
            auc += f" ({', '.join(f'{each:.3f}' for each in aucs)})"
        time_taken = f"{statistics.mean(minutes):.1f}" if minutes else ""
        cells = (row.label, auc, f"{statistics.mean(high):.0f}", row.steps, row.steps * row.contrast, time_taken)
        text.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(text) + "\n"


def aucs_of(metrics: dict) -> list[float | None]:
    """AUC of every finding."""
    return [entry["auc"] for entry in metrics["per_finding"].values()]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="Processed split of the synthetic set.")
    parser.add_argument("--out", type=Path, required=True, help="Folder of the runs.")
    parser.add_argument("--recipe", default="ablation", help="Recipe of every row (default: %(default)s).")
    parser.add_argument("--task", default="synthetic", help="Prompt set (default: %(default)s).")
    parser.add_argument(
        "--patients", type=int, default=3200, help="Seen by the rows of equal patients (default: 3200)."
    )
    parser.add_argument("--steps", type=int, default=100, help="Of the rows of equal steps (default: 100).")
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[0, 1, 2], help="Of the contrast rows (default: 0 1 2)."
    )
    parser.add_argument("--rows", nargs="+", help="Names of rows to run (default: all).")
    parser.add_argument("--jobs", type=int, default=2, help="Runs side by side, one thread each (default: 2).")
    parser.add_argument("--bf16", action="store_true", help="Train in bfloat16 (processors that have it).")
    parser.add_argument("--into", type=Path, default=DOCUMENT, help="Markdown file for the table.")
    options = parser.parse_args(arguments)
    table = rows(options.patients, options.steps)
    known = [row.name for row in table]
    for name in options.rows or ():
        if name not in known:
            parser.error(f"--rows {name} is none of {', '.join(known)}.")
    chosen = [row for row in table if not options.rows or row.name in options.rows]
    # The first seed of every row before the second of any: a run that is broken off leaves a whole table.
    tasks = [(row, seed) for seed in options.seeds for row in chosen if row.has_seeds or seed == options.seeds[0]]
    faults = []
    # Those that go on from another row's model come when that is there.
    for stage in ([task for task in tasks if task[0].start is None], [task for task in tasks if task[0].start]):
        with ThreadPoolExecutor(options.jobs) as pool:
            futures = {pool.submit(run, row, seed, options): run_name(row, seed) for row, seed in stage}
            for done, future in enumerate(as_completed(futures), start=1):
                fault = future.result()
                console.print(f"{done} of {len(stage)}: {fault or futures[future]}", markup=False, soft_wrap=True)
                faults += [fault] if fault else []
    text = table_of(table, options.seeds, options)
    console.print(text, markup=False, soft_wrap=True)
    before = options.into.read_text(encoding="utf-8") if options.into.is_file() else f"{START}\n{STOP}\n"
    options.into.parent.mkdir(parents=True, exist_ok=True)
    options.into.write_text(put_between_marks(before, "\n" + text + "\n"), encoding="utf-8")
    return 1 if faults else 0


if __name__ == "__main__":
    raise SystemExit(main())
