"""Score a model's zero-shot findings on a processed split: no label is trained on, each finding is a pair of sentences.

The demo's model on its own validation patients, and the same with a prompt set of your own:
    python eval_fvlm.py --model runs/demo/model --data runs/demo/processed --tasks synthetic --out runs/demo/eval
    python eval_fvlm.py --model runs/demo/model --data runs/demo/processed --tasks synthetic own.yaml --out runs/eval2

Weights of the published kind on CT-RATE, by the published protocol with its windows, metrics and faults, on a GPU:
    python eval_fvlm.py --protocol published --model DIR --data data/ct_rate_chest_4 --batch_size 16 --num_workers 8 \\
        --out runs/ct_rate_eval

Of the same protocol only windows and level, in bfloat16:
    python eval_fvlm.py --model DIR --data data/ct_rate_chest_4 --tasks ct_rate_16 --level reconstruction \\
        --window_size 112 288 352 --published_windows --dtype bfloat16 --batch_size 16 --num_workers 8 \\
        --out runs/ct_rate_eval_bfloat16

A quicker look at many organs, each scan in as few windows as hold them all; other surroundings, so other scores:
    python eval_fvlm.py --model DIR --data DIR --tasks own.yaml --shared_windows --out runs/quick_eval

Two models on the same scans, with tests of the difference; decisions at thresholds from patients of another split:
    python eval_fvlm.py --model DIR --model OTHER_DIR --data DIR --tasks own.yaml --threshold development \\
        --development_split train --out runs/comparison

All that there is to measure, with the embeddings kept for `python -m evaluation_fvlm probe` and the like:
    python eval_fvlm.py --model DIR --data DIR --tasks own.yaml --retrieval --diagnostics --save_embeddings \\
        --out runs/all

Written to --out:
    metrics.json    macro_auc, num_findings, num_patients, per_finding, per_organ, what was left out and why, protocol;
                    `wording`: how far AUCs hang on the choice of sentences; `evaluation`: every metric with its 95 %
                    interval, thresholds and how they were chosen, calibration, curves (evaluation_fvlm/protocols.py)
    scores.csv      one row per task, scan and finding: score (probability), label, is_complete; empty = not known
    published_scores.csv    the same in the published column form, one row per volume
    dropped.csv     every case that is not measured, with the reason
    roc.png         one ROC curve per finding, best first
    auc_bars.png    the AUCs grouped by organ, with the line of chance
    report.html     all of it on one page that needs no network, with the worst errors and where the model looked; its
                    pictures lie in examples/. It holds ids and pictures of the split
    command.txt     the command line as typed, with the paths of this machine. No other file has them: model and data
                    are named by Hub id or the last part of their path, with digests of weights and shards beside
    retrieval.json, diagnostics.json, embeddings/    where asked for
With several models each has its folder, a, b, ..., and comparison.json holds the differences to a.
--protocol published adds `published` to metrics.json (evaluation_fvlm/published_metrics.py says how it is counted).

A scan whose mask lacks the organ is not scored; a scan whose label is unknown is not measured; both are counted. Where
a part of a task cannot be measured (a finding without labels, or with one class), `warnings` in metrics.json and the
last lines on stderr name it, and the exit status is 0 all the same: a script looks at num_findings, num_findings_asked.
Research only, not for diagnosis.
"""

import argparse
import shlex
import string
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd
import torch
from datasets import Dataset
from transformers import PreTrainedConfig, PreTrainedModel, ProcessorMixin

from evaluation_fvlm.diagnostics import diagnose
from evaluation_fvlm.embedding import SplitTexts, embed_split_texts
from evaluation_fvlm.embedding_files import StoredEmbeddings, save_embeddings
from evaluation_fvlm.equal_reports import DUPLICATES
from evaluation_fvlm.errors import EvaluationError
from evaluation_fvlm.examples import collect_examples
from evaluation_fvlm.html_report import write_report
from evaluation_fvlm.loading import load_model
from evaluation_fvlm.model_index import write_model_index
from evaluation_fvlm.places import distinct_names, place_name, split_digest, weights_digest
from evaluation_fvlm.prompts import default_cache
from evaluation_fvlm.protocols import PARTIAL, Protocol, partial_warnings
from evaluation_fvlm.published_metrics import format_published_table
from evaluation_fvlm.results import (
    compare_runs,
    format_comparison,
    format_table,
    library_versions,
    remove_earlier_results,
    task_protocol,
    window_protocol,
    write_results,
)
from evaluation_fvlm.retrieval import nearest_texts, retrieve
from evaluation_fvlm.split import BEYOND_LIMIT, LEVELS, check_split_matches, choose_scans, open_split, read_manifest
from evaluation_fvlm.tasks import Task, available_tasks, check_task_organs, load_task
from evaluation_fvlm.thresholds import SOURCES
from evaluation_fvlm.windows import WindowRule
from evaluation_fvlm.zero_shot import ZeroShotScores, evaluate_split
from modeling_fvlm.configuration_fvlm import ATTENTIONS
from modeling_fvlm.gemm import BACKENDS, BLAS, gemm_backend, pick_gemm_backend
from modeling_fvlm.modeling_fvlm import set_attention

# What a protocol sets where the command line does not; None: no default (tasks), the model's size (window_size).
PROTOCOLS = {
    "standard": {
        "tasks": None,
        "level": "scan",
        "window_size": None,
        "published_windows": False,
        "threshold": "cross_validation",
    },
    "published": {
        "tasks": ["ct_rate_16"],
        "level": "reconstruction",
        "window_size": [112, 288, 352],
        "published_windows": True,
        "threshold": "test_labels",
    },
}
COMMAND = "command.txt"  # the one file of the results that holds paths of this machine
NUM_RETRIEVAL_EXAMPLES = 4
DTYPES = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_argument_group("what is scored")
    what.add_argument(
        "--model",
        required=True,
        action="append",
        help="Folder or Hub id of a saved model with its processor. Given again, the others are compared with the "
        "first, on the same scans.",
    )
    what.add_argument(
        "--revision",
        action="append",
        help="Commit, tag or branch of a model on the Hub; the protocol names it. With several models one for each.",
    )
    what.add_argument("--data", required=True, help="Processed split: folder or Hub id (see python -m data_builders).")
    what.add_argument("--data_revision", help="Commit, tag or branch of a data set on the Hub.")
    what.add_argument("--split", default="validation", help="Split to score (default: %(default)s).")
    what.add_argument(
        "--protocol",
        choices=PROTOCOLS,
        default="standard",
        help="published: --tasks ct_rate_16 --level reconstruction --window_size 112 288 352 --published_windows "
        "--threshold test_labels, each unless given, absent organs scored 0, and the published metrics beside ours "
        "(default: %(default)s).",
    )
    what.add_argument(
        "--tasks",
        nargs="+",
        metavar="TASK",
        help=f"Prompt sets: {', '.join(available_tasks())}, or paths of YAML files. The first one's figures head "
        f"metrics.json. Required, but for --protocol published.",
    )
    what.add_argument(
        "--level",
        choices=LEVELS,
        help="scan: the first reconstruction of every scan (default); reconstruction: all of them, as the published "
        "CT-RATE numbers count, though they repeat a patient.",
    )
    what.add_argument(
        "--duplicates",
        choices=DUPLICATES,
        default="keep",
        help="Scans with equal reports. within_patients: of one patient's only the first is scored, for their labels "
        "are one observation; everywhere: only the first of all, also of other patients (of normal reports one is "
        "left); dropped.csv names the others. As in python -m evaluation_fvlm score (default: %(default)s).",
    )
    what.add_argument("--limit", type=int, help="Only the first so many rows: a quick look, no result.")
    figures = parser.add_argument_group("how figures are made")
    figures.add_argument(
        "--threshold",
        type=threshold_of,
        metavar="SOURCE",
        help="Where decision metrics (F1, accuracy, ...) take their threshold from: cross_validation (default: on the "
        "other folds of patients), development (on --development_split), test_labels (as published: flatters), or a "
        "number. AUC and average precision need none.",
    )
    figures.add_argument(
        "--development_split",
        metavar="NAME",
        help="Split of other patients for --threshold development; scored like the other.",
    )
    figures.add_argument(
        "--num_bootstraps",
        type=int,
        default=1000,
        help="Resamples of patients for the 95 %% intervals; 0: no intervals (default: %(default)s).",
    )
    figures.add_argument(
        "--num_folds", type=int, default=5, help="Of patients, for cross-validation (default: %(default)s)."
    )
    figures.add_argument("--seed", type=int, default=0, help="Of resamples and folds (default: %(default)s).")
    windows = parser.add_argument_group("how organs are shown to the network")
    windows.add_argument(
        "--window_size",
        type=int,
        nargs=3,
        metavar=("DEPTH", "HEIGHT", "WIDTH"),
        help="Voxels around each organ's centre, multiples of the patch (default: the size the model was trained on).",
    )
    windows.add_argument(
        "--published_windows",
        action=argparse.BooleanOptionalAction,
        help="Make windows as the published evaluation does: padded to whole patches only, behind the end, with "
        "hu_min, boxes one voxel short (default: padded evenly with air to the window size, as in training).",
    )
    windows.add_argument(
        "--shared_windows",
        action="store_true",
        help="Show organs that fit together into one window in one, centred on them all, so that a scan takes fewer "
        "forwards (default: every organ in the middle of its own window; equal windows are computed once in any case). "
        "Every organ stays whole, but its surroundings change, and so do the scores; metrics.json says so. How they "
        "fit hangs on which are embedded: those that prompts ask for, but with --retrieval, --diagnostics or "
        "--save_embeddings all, so each of these moves the scores once more. Not with published windows.",
    )
    beside = parser.add_argument_group("beside the scores")
    beside.add_argument(
        "--retrieval",
        action="store_true",
        help="Does a report find its volume, a volume its report, an organ its sentences? R@k, median rank and MRR, "
        "with chance beside. Embeds every organ and the split's texts; with --shared_windows that moves scores.",
    )
    beside.add_argument(
        "--diagnostics",
        action="store_true",
        help="Alignment, uniformity, effective rank, modality gap and collapse of texts, per organ; attention against "
        "mean pooling of the same tokens. Embeds every organ and the split's texts; with --shared_windows that moves "
        "scores.",
    )
    beside.add_argument(
        "--save_embeddings",
        action="store_true",
        help="Write the embeddings to OUT/embeddings as Parquet, so that probes, retrieval and diagnostics need no "
        "second pass (python -m evaluation_fvlm --help). Embeds every organ and the split's texts; with "
        "--shared_windows that moves scores.",
    )
    beside.add_argument(
        "--report",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="Draw report.html; a forward for each of up to 18 cases (default: draw it).",
    )
    beside.add_argument(
        "--show_text",
        action="store_true",
        help="Let sentences of the split's reports into report.html and into what it is drawn from, and into the saved "
        "embeddings (default: no sentence leaves the split).",
    )
    beside.add_argument(
        "--update_card",
        action="store_true",
        help="Write the results into the README.md of the model's folder, into its model-index and its text, in place "
        "of earlier ones of the same prompt set and data (default: leave the model as it is). Not with --limit: "
        "results of a part would take the place of those of the whole split.",
    )
    running = parser.add_argument_group("running")
    running.add_argument("--out", required=True, type=Path, help="Folder for the results; made if missing.")
    running.add_argument("--device", help="cuda, cuda:1, cpu ... (default: cuda if there is one, else cpu).")
    running.add_argument(
        "--dtype",
        choices=DTYPES,
        default="float32",
        help="Arithmetic of the towers (default: %(default)s); bfloat16 is several times faster and moves scores in "
        "the third digit.",
    )
    running.add_argument(
        "--gemm_backend",
        choices=("auto", *BACKENDS),
        default="auto",
        help="Library of the linear layers, in float32 on a CPU only: PyTorch's own blas, or onednn, faster on some "
        "processors. auto measures both for a large model (seconds) and takes oneDNN if it is faster and rounds as "
        "float32 must; metrics.json tells (default: %(default)s).",
    )
    running.add_argument(
        "--attn_implementation",
        choices=ATTENTIONS,
        default="sdpa",
        help="Attention of both towers; flash attention needs a GPU, --dtype bfloat16 or float16 and the flash-attn "
        "package, and has not been run yet (default: %(default)s).",
    )
    running.add_argument("--batch_size", type=int, default=4, help="Windows per forward (default: %(default)s).")
    running.add_argument(
        "--num_workers",
        type=int,
        default=1,
        help="Threads that decode scans ahead; one scan more than this lies in memory (default: %(default)s).",
    )
    cache = running.add_mutually_exclusive_group()
    cache.add_argument(
        "--prompt_cache",
        type=Path,
        metavar="DIR",
        help="Keep prompt embeddings there, named by a hash of text weights, token ids and settings, so that other "
        "weights never meet them (default: fvlm/prompts in the Hugging Face cache on a CPU; none on other devices, "
        "where embedding costs no more than the hash).",
    )
    cache.add_argument("--no_prompt_cache", action="store_true", help="Embed the prompts anew and keep nothing.")
    running.add_argument("--quiet", action="store_true", help="No progress bar and no table.")
    args = parser.parse_args(arguments)
    args.typed = sys.argv[1:] if arguments is None else list(arguments)
    args.set_by = {}
    for name, value in PROTOCOLS[args.protocol].items():
        args.set_by[name] = "protocol" if getattr(args, name) is None else "command line"
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.shared_windows and args.published_windows:
        parser.error(
            "--shared_windows: published windows are one per organ. Leave it out, or add --no-published_windows."
        )
    if args.tasks is None:
        parser.error("the following arguments are required: --tasks (only --protocol published brings its own).")
    args.revision = args.revision or [None] * len(args.model)
    if len(args.revision) != len(args.model):
        parser.error(f"--revision: {len(args.revision)} for {len(args.model)} models; give one for each, or none.")
    if len(args.model) > len(string.ascii_lowercase):
        parser.error(f"--model: {len(args.model)} models; compare at most {len(string.ascii_lowercase)} in one run.")
    if (args.threshold == "development") != (args.development_split is not None):
        parser.error("--threshold development and --development_split NAME belong together: give both or neither.")
    if args.update_card and args.limit is not None:
        parser.error(
            f"--update_card with --limit {args.limit}: results of a part of the split would take the place of those of "
            "the whole in the model's card. Leave out one of the two."
        )
    for name in ("batch_size", "num_workers", "limit"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name} {getattr(args, name)} must be at least 1.")
    return args


def threshold_of(text: str) -> str | float:
    """A source of thresholds, or a number."""
    if text in SOURCES:
        return text
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor one of {', '.join(SOURCES)}.") from None


@dataclass
class Data:
    """The rows of a split that are scored, and what must be said of them."""

    dataset: Dataset
    dropped: pd.DataFrame  # the other rows, with the reason
    development: Dataset | None
    settings: dict  # how the split was built
    digest: str | None  # of its shards
    warnings: list[str]


@dataclass
class ModelRun:
    """What became of one model."""

    path: str
    model: PreTrainedModel
    folder: Path
    scores: ZeroShotScores
    development: ZeroShotScores | None
    figures: Protocol
    metrics: dict  # the content of metrics.json
    parts: dict[str, dict]  # retrieval, diagnostics
    paths: list[Path]  # files written


def set_checked_attention(model: PreTrainedModel, name: str, dtype: str) -> None:
    """Let both towers attend by the named implementation.

    Raises:
        EvaluationError: If it cannot run here, is not installed, or a tower does not know it.
    """
    if name.startswith("flash") and (model.device.type == "cpu" or dtype == "float32"):
        raise EvaluationError(
            f"--attn_implementation {name} needs a GPU and --dtype bfloat16 or float16, not {dtype} on "
            f"{model.device.type}: take sdpa."
        )
    try:
        set_attention(model, name)
    except ValueError as error:
        raise EvaluationError(f"--attn_implementation {name}: {error}") from error


def gemm_backend_of(args: argparse.Namespace, model: PreTrainedModel) -> tuple[str | None, str | None]:
    """The backend of the linear layers, None where no float32 is computed on a CPU; and what was measured, in words.

    Raises:
        EvaluationError: If the backend asked for is not there.
    """
    if model.device.type != "cpu" or args.dtype != "float32":
        if args.gemm_backend == "auto":
            return None, None
        return None, f"WARNING: --gemm_backend has no effect in {args.dtype} on {model.device.type}."
    name = None if args.gemm_backend == "auto" else args.gemm_backend
    try:
        return pick_gemm_backend(name, sum(parameter.numel() for parameter in model.parameters()))
    except ValueError as error:
        raise EvaluationError(f"--gemm_backend {args.gemm_backend}: {error}") from error


def level_name(level: str, settings: dict) -> str:
    """What was counted, in words; `settings` as below."""
    if level == "scan":
        return "first reconstruction of every scan"
    if holds_first_alone(settings):
        return "first reconstruction of every scan (the split holds no other)"
    return "every reconstruction"


def holds_first_alone(settings: dict) -> bool:
    """Whether a split was built with one reconstruction of every scan."""
    return settings.get("options", {}).get("reconstructions") == "first"


def protocol_warnings(args: argparse.Namespace, settings: dict) -> list[str]:
    """What keeps the numbers of this command line from being what its protocol's name says.

    Args:
        settings: How the split was built, from its manifest.
    """
    warnings = []
    if args.level == "reconstruction" and holds_first_alone(settings):
        warnings.append(
            "--level reconstruction, but the split was built with the first reconstruction of every scan alone. For "
            "the published count build it with `python -m data_builders ct_rate --reconstructions all`."
        )
    if args.protocol == "published" and settings.get("preprocessing", "standard") == "standard":
        warnings.append(
            "--protocol published, but split and model are of preprocessing 'standard': the scans are not "
            "those of the published evaluation. For these build and convert with `--preprocessing published`."
        )
    return warnings


def check_model(args: argparse.Namespace, model: PreTrainedModel, tasks: list[Task], manifest: dict) -> None:
    """Refuse a model that cannot answer the tasks, or of another kind than the split, before anything runs.

    Raises:
        EvaluationError: If so.
    """
    set_checked_attention(model, args.attn_implementation, args.dtype)
    for task in tasks:
        check_task_organs(task, model.config.organs)
    window_rule(args, model.config)
    check_split_matches(manifest, model.config, args.data)


def open_data(args: argparse.Namespace, manifest: dict) -> Data:
    """The rows to score.

    Args:
        manifest: Of the split.

    Raises:
        EvaluationError: If there is no such split, or it shares patients with the development split.
    """
    rows = open_split(args.data, args.split, args.data_revision)
    dataset, dropped = choose_scans(rows, args.level, duplicates=args.duplicates, limit=args.limit)
    warnings = protocol_warnings(args, manifest["settings"])
    if cut := int((dropped["reason"] == BEYOND_LIMIT).sum()):
        told = f"{PARTIAL}: the first {len(dataset)} rows of {len(dataset) + cut} (--limit), a look, no result."
        warnings.insert(0, told)
    for warning in warnings:  # before the long part, and with --quiet too
        print(f"WARNING: {warning}", file=sys.stderr)
    development = None
    if args.development_split is not None:
        rows = open_split(args.data, args.development_split, args.data_revision)
        development, _ = choose_scans(rows, args.level, duplicates=args.duplicates)
        shared = sorted(set(dataset["patient_id"]) & set(development["patient_id"]))
        if shared:
            raise EvaluationError(
                f"--development_split {args.development_split}: {len(shared)} of its patients are in '{args.split}' "
                f"too (first: {shared[0]}); thresholds may not be chosen on the patients that they are judged by."
            )
    return Data(dataset, dropped, development, manifest["settings"], split_digest(manifest), warnings)


def window_rule(args: argparse.Namespace, config: PreTrainedConfig) -> WindowRule:
    vision = config.vision_config
    return WindowRule(
        tuple(args.window_size or vision.volume_size),
        tuple(vision.patch_size),
        published=bool(args.published_windows),
        shared=args.shared_windows,
    )


def score(
    args: argparse.Namespace,
    model: PreTrainedModel,
    processor: ProcessorMixin,
    dataset: Dataset,
    tasks: list[Task],
    *,
    for_more: bool,
) -> ZeroShotScores:
    """The scores of one model on chosen rows; `for_more`: with all embeddings that retrieval and the like want."""
    prompt_cache = args.prompt_cache
    if prompt_cache is None and not args.no_prompt_cache and model.device.type == "cpu":
        prompt_cache = default_cache()
    return evaluate_split(
        model,
        processor,
        dataset,
        tasks,
        batch_size=args.batch_size,
        rule=window_rule(args, model.config),
        num_workers=args.num_workers,
        dtype=DTYPES[args.dtype],
        progress=not args.quiet,
        prompt_cache=prompt_cache,
        every_organ=for_more,
        with_volume=for_more,
        with_mean_pooling=for_more and (args.diagnostics or args.save_embeddings),
    )


def measure_embeddings(args: argparse.Namespace, scores: ZeroShotScores, texts: SplitTexts) -> dict[str, dict]:
    """What was asked of the embeddings themselves, by name."""
    stored = StoredEmbeddings(scores.embeddings, texts, scores.prompt_embeds, {"logit_scale": scores.logit_scale})
    parts = {}
    options = {"num_bootstraps": args.num_bootstraps, "seed": args.seed}
    if args.retrieval:
        parts["retrieval"] = retrieve(stored.embeddings, texts, **options)
        if args.show_text:
            rows = range(min(NUM_RETRIEVAL_EXAMPLES, len(stored.embeddings.scans)))
            parts["retrieval"]["examples"] = nearest_texts(stored.embeddings, texts, rows)
    if args.diagnostics:
        parts["diagnostics"] = diagnose(stored, task=scores.tasks[0], with_probe=False, **options)
    return parts


def figures_protocol(args: argparse.Namespace, scores: ZeroShotScores | None = None) -> tuple[Protocol, list[str]]:
    """The protocol of the figures as the command line has it, and what has to be said of it.

    Cross-validation by default, not by wish, gives way where `scores` have too few patients for it.
    """
    protocol = Protocol(
        level=args.level,
        threshold=args.threshold,
        absent="zero" if args.protocol == "published" else "excluded",
        duplicates=args.duplicates,
        num_bootstraps=args.num_bootstraps,
        num_folds=args.num_folds,
        seed=args.seed,
    )
    if scores is None or args.threshold != "cross_validation" or args.set_by["threshold"] == "command line":
        return protocol, []
    counted = scores.frame[scores.frame["score"].notna() & scores.frame["label"].notna()]
    num_patients = min((len(set(rows["patient_id"])) for _, rows in counted.groupby("task")), default=0)
    if num_patients >= args.num_folds:
        return protocol, []
    warning = (
        f"{num_patients} patients with a score and a label are too few for thresholds from {args.num_folds} folds: the "
        "threshold is 0.5. Set --threshold or --num_folds."
    )
    return replace(protocol, threshold=0.5), [warning]


def protocol_of(
    args: argparse.Namespace,
    number: int,
    model: PreTrainedModel,
    data: Data,
    scores: ZeroShotScores,
    figures: Protocol,
    warnings: list[str],
    backend: tuple[str | None, str | None],
) -> dict:
    """Everything that a reader needs to get the same numbers."""
    return {
        "name": args.protocol,
        "set_by": args.set_by,
        "tasks": [task_protocol(task) for task in scores.tasks],
        "model": {
            "name": place_name(args.model[number]),
            "weights": weights_digest(args.model[number]),
            "revision": args.revision[number],
            "commit": getattr(model.config, "_commit_hash", None),
        },
        "data": {
            "name": place_name(args.data),
            "digest": data.digest,
            "revision": args.data_revision,
            "split": args.split,
            "development_split": args.development_split,
            "preprocessing": data.settings.get("preprocessing", "standard"),
            "reconstructions": data.settings.get("options", {}).get("reconstructions"),  # None: not told
        },
        "level": level_name(args.level, data.settings),
        "duplicates": figures.duplicates,
        "dropped_rows": data.dropped["reason"].value_counts().to_dict(),
        "figures": figures.described(),
        "warnings": warnings,
        "limit": args.limit,
        "organs": {"set": model.config.organ_set, "names": list(model.config.organs)},
        "windows": window_protocol(window_rule(args, model.config), scores),
        "prompt_embeddings": "read from the prompt cache" if scores.prompts_are_cached else "computed",
        "score": "mean over prompt pairs of softmax([negative, positive] / temperature)",
        "temperature": 1.0 / scores.logit_scale,
        "absent_organs": "not scored; counted as 0 under `published` and `evaluation`"
        if args.protocol == "published"
        else "not scored",
        "incomplete_organs": "scored",
        "device": str(model.device),
        "dtype": args.dtype,
        "gemm_backend": backend[0],
        "gemm_check": backend[1],
        "attention": {
            "image": model.vision_model.config._attn_implementation,
            "text": model.text_model.config._attn_implementation,
        },
        "batch_size": args.batch_size,
        "versions": library_versions(),
    }


def evaluate_model(
    args: argparse.Namespace, number: int, loaded: tuple, data: Data, tasks: list[Task], folder: Path
) -> ModelRun:
    """Score one of the models and write its results."""
    start = time.perf_counter()
    model, processor = loaded
    backend = gemm_backend_of(args, model)
    if backend[1] is not None:
        print(backend[1], file=sys.stderr)
    for_more = args.retrieval or args.diagnostics or args.save_embeddings
    development = texts = None
    with gemm_backend(backend[0] or BLAS):
        scores = score(args, model, processor, data.dataset, tasks, for_more=for_more)
        if data.development is not None:
            development = score(args, model, processor, data.development, tasks, for_more=False)
        if for_more:
            texts = embed_split_texts(
                model, processor.tokenizer, data.dataset, dtype=DTYPES[args.dtype], progress=not args.quiet
            )
    figures, warnings = figures_protocol(args, scores)
    for warning in warnings:
        print(f"WARNING: {warning}", file=sys.stderr)
    protocol = protocol_of(args, number, model, data, scores, figures, data.warnings + warnings, backend)
    saved = []
    if args.save_embeddings:
        info = {"logit_scale": scores.logit_scale, "protocol": protocol}
        kept = {"text": texts, "prompts": scores.prompt_embeds, "keep_texts": args.show_text}
        saved.append(save_embeddings(folder / "embeddings", scores.embeddings, info=info, **kept))
    parts = measure_embeddings(args, scores, texts) if for_more else {}
    metrics, paths = write_results(
        scores,
        protocol,
        folder,
        published=args.protocol == "published",
        dropped=data.dropped,
        evaluation=figures,
        development=development,
        parts=parts,
    )
    if not args.quiet:
        print_tables(args, number, metrics)
    print(
        f"{metrics['num_reconstructions']} volumes in {time.perf_counter() - start:.1f} s "
        f"({scores.embeddings.num_windows} windows in {scores.embeddings.num_batches} batches on {model.device})."
    )
    return ModelRun(args.model[number], model, folder, scores, development, figures, metrics, parts, [*paths, *saved])


def summaries(metrics: dict) -> dict[str, dict]:
    """Task -> its part of metrics.json."""
    return {metrics["task"]: metrics, **metrics["other_tasks"]}


def print_tables(args: argparse.Namespace, number: int, metrics: dict) -> None:
    if len(args.model) > 1:
        print(f"\n{string.ascii_lowercase[number]}: {args.model[number]}")
    print(format_table(metrics))
    for name, others in metrics["other_tasks"].items():
        print(f"\n{name}\n{format_table(others)}")
    if args.protocol == "published":
        for name, summary in summaries(metrics).items():
            print(f"\n{name}, published metrics\n{format_published_table(summary['published'])}")


def draw_report(args: argparse.Namespace, run: ModelRun, data: Data, comparisons: list[dict]) -> Path:
    """report.html of one model, with the cases that are worth a look."""
    examples = collect_examples(
        run.model,
        data.dataset,
        run.scores.frame,
        run.folder,
        rule=window_rule(args, run.model.config),
        embedded=run.scores.embeddings.asked_organs,
        with_text=args.show_text,
    )
    results = run.metrics | run.parts | ({"comparisons": comparisons} if comparisons else {})
    return write_report(run.folder, results, frame=run.scores.frame, examples=examples, show_text=args.show_text)


def run(args: argparse.Namespace) -> list[ModelRun]:
    """The evaluation of one command line, model by model."""
    # What can be wrong in a file or an option is found before weights or volumes are loaded.
    tasks = [load_task(task) for task in args.tasks]
    names = [task.name for task in tasks]
    if len(set(names)) < len(names):
        raise EvaluationError(
            f"--tasks {args.tasks}: two prompt sets share a name ({names}); results are kept by name."
        )
    figures_protocol(args)
    for path in args.model if args.update_card else ():
        if not Path(path).is_dir():
            raise EvaluationError(
                f"--update_card: {path} is no folder on this machine. Leave it out, and write the results into a copy "
                "with `python -m evaluation_fvlm card --results OUT --model COPY`."
            )
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    loaded = [load_model(path, revision, device) for path, revision in zip(args.model, args.revision)]
    manifest = read_manifest(args.data, args.data_revision)
    for path, (model, _) in zip(args.model, loaded):
        try:
            check_model(args, model, tasks, manifest)
        except EvaluationError as error:
            raise EvaluationError(f"--model {path}: {error}") from error
    data = open_data(args, manifest)

    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / COMMAND).write_text(shlex.join(["python", "eval_fvlm.py", *args.typed]) + "\n", encoding="utf-8")
    folders = [args.out]
    if len(loaded) > 1:
        folders = [args.out / letter for letter in string.ascii_lowercase[: len(loaded)]]
        remove_earlier_results(args.out)  # of one model, or of another comparison
    runs = [evaluate_model(args, n, loaded[n], data, tasks, folder) for n, folder in enumerate(folders)]
    paths = [path for one in runs for path in one.paths]
    comparisons = []
    if len(runs) > 1:
        named = zip(distinct_names(args.model, args.revision), runs)
        scored = [(name, one.scores, one.development) for name, one in named]
        comparisons, path = compare_runs(scored, runs[0].figures, args.out)
        paths.append(path)
        for comparison in () if args.quiet else comparisons:
            print(f"\n{comparison['task']}: a {comparison['a']}, b {comparison['b']}\n{format_comparison(comparison)}")
    if args.update_card:
        paths += [write_model_index(one.path, one.metrics, retrieval=one.parts.get("retrieval")) for one in runs]
    if args.report:
        paths += [draw_report(args, one, data, comparisons) for one in runs]
    print("Written:")
    for path in [*paths, args.out / COMMAND]:
        print(f"  {path}")
    for warning in partial_warnings(
        summary["evaluation"] for one in runs for summary in summaries(one.metrics).values()
    ):
        print(f"WARNING: {warning}", file=sys.stderr)
    return runs


def main(arguments: list[str] | None = None) -> int:
    args = parse_arguments(arguments)
    try:
        run(args)
    except EvaluationError as error:  # the user's to mend: the message says how, a traceback would hide it
        print(f"eval_fvlm.py: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
