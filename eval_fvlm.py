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

Written to --out:
    metrics.json    macro_auc, num_findings, num_patients, per_finding, per_organ, what was left out and why, protocol
    scores.csv      one row per task, scan and finding: score (probability), label, is_complete; empty = not known
    roc.png         one ROC curve per finding, best first
    auc_bars.png    the AUCs grouped by organ, with the line of chance
--protocol published adds `published` to metrics.json (evaluation_fvlm/published_metrics.py says how it is counted) and
    published_scores.csv    the scores in the published column form, one row per volume

A scan whose mask lacks the organ is not scored; a scan whose label is unknown is not measured; both are counted.
Research only, not for diagnosis.
"""

import argparse
import sys
import time
from pathlib import Path

import torch
from transformers import PreTrainedModel, ProcessorMixin

from evaluation_fvlm.errors import EvaluationError
from evaluation_fvlm.prompts import default_cache
from evaluation_fvlm.published_metrics import format_published_table
from evaluation_fvlm.results import format_table, library_versions, task_protocol, window_protocol, write_results
from evaluation_fvlm.split import LEVELS, check_split_matches, open_split, read_manifest, select_scans
from evaluation_fvlm.tasks import available_tasks, check_task_organs, load_task
from evaluation_fvlm.windows import WindowRule
from evaluation_fvlm.zero_shot import evaluate_split
from modeling_fvlm.configuration_fvlm import ATTENTIONS
from modeling_fvlm.gemm import BACKENDS, BLAS, gemm_backend, pick_gemm_backend
from modeling_fvlm.modeling_fvlm import load_whole_model, set_attention
from modeling_fvlm.processing_fvlm import FVLMProcessor

# What a protocol sets where the command line does not; None: no default (tasks), the model's size (window_size).
PROTOCOLS = {
    "standard": {"tasks": None, "level": "scan", "window_size": None, "published_windows": False},
    "published": {
        "tasks": ["ct_rate_16"],
        "level": "reconstruction",
        "window_size": [112, 288, 352],
        "published_windows": True,
    },
}
DTYPES = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_argument_group("what is scored")
    what.add_argument("--model", required=True, help="Folder or Hub id of a saved model with its processor.")
    what.add_argument("--revision", help="Commit, tag or branch of a model on the Hub; the protocol names it.")
    what.add_argument("--data", required=True, help="Processed split: folder or Hub id (see python -m data_builders).")
    what.add_argument("--data_revision", help="Commit, tag or branch of a data set on the Hub.")
    what.add_argument("--split", default="validation", help="Split to score (default: %(default)s).")
    what.add_argument(
        "--protocol",
        choices=PROTOCOLS,
        default="standard",
        help="published: --tasks ct_rate_16 --level reconstruction --window_size 112 288 352 --published_windows, each "
        "unless given, and the published metrics beside ours: threshold chosen on the test labels, absent organs "
        "scored 0 (default: %(default)s).",
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
    what.add_argument("--limit", type=int, help="Only the first so many rows: a quick look, no result.")
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
        "Every organ stays whole, but its surroundings change, and so do the scores; metrics.json says so. Not with "
        "published windows.",
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
    for name in ("batch_size", "num_workers", "limit"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name} {getattr(args, name)} must be at least 1.")
    return args


def load_model(path: str, revision: str | None, device: str) -> tuple[PreTrainedModel, ProcessorMixin]:
    """A saved model in evaluation mode on its device, and its processor.

    Weights are float32 however they were saved, else a bfloat16 checkpoint would be scored in bfloat16 under the name
    of float32; `--dtype` casts from there.

    Raises:
        EvaluationError: If there is no model, or its weights are not those of its config: what is missing would be
            filled with random numbers.
    """
    if Path(path).is_dir() and not (Path(path) / "config.json").is_file():
        raise EvaluationError(
            f"{path} holds no config.json: it is no saved model. Give the folder that training wrote."
        )
    try:
        model = load_whole_model(path, revision=revision or "main")
        processor = FVLMProcessor.from_pretrained(path, revision=revision or "main")
    except OSError as error:
        raise EvaluationError(f"--model {path} cannot be loaded: {error}") from error
    except ValueError as error:
        raise EvaluationError(f"--model {path}: {error}") from error
    return model.eval().to(device), processor


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
            f"--level reconstruction, but {args.data} was built with the first reconstruction of every scan alone. For "
            "the published count build it with `python -m data_builders ct_rate --reconstructions all`."
        )
    if args.protocol == "published" and settings.get("preprocessing", "standard") == "standard":
        warnings.append(
            f"--protocol published, but {args.data} and the model are of preprocessing 'standard': the scans are not "
            "those of the published evaluation. For these build and convert with `--preprocessing published`."
        )
    return warnings


def run(args: argparse.Namespace) -> dict:
    """The evaluation of one command line; returns the content of metrics.json."""
    start = time.perf_counter()
    # What can be wrong in a file is found before weights or volumes are loaded.
    tasks = [load_task(task) for task in args.tasks]
    names = [task.name for task in tasks]
    if len(set(names)) < len(names):
        raise EvaluationError(
            f"--tasks {args.tasks}: two prompt sets share a name ({names}); results are kept by name."
        )
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    model, processor = load_model(args.model, args.revision, device)
    set_checked_attention(model, args.attn_implementation, args.dtype)
    for task in tasks:
        check_task_organs(task, model.config.organs)
    vision = model.config.vision_config
    rule = WindowRule(
        tuple(args.window_size or vision.volume_size),
        tuple(vision.patch_size),
        published=bool(args.published_windows),
        shared=args.shared_windows,
    )
    prompt_cache = args.prompt_cache
    if prompt_cache is None and not args.no_prompt_cache and torch.device(device).type == "cpu":
        prompt_cache = default_cache()
    manifest = read_manifest(args.data, args.data_revision)
    check_split_matches(manifest, model.config, args.data)
    warnings = protocol_warnings(args, manifest["settings"])
    for warning in warnings:  # before the long part, and with --quiet too
        print(f"WARNING: {warning}", file=sys.stderr)
    dataset = select_scans(open_split(args.data, args.split, args.data_revision), args.level, args.limit)

    backend, gemm_check = gemm_backend_of(args, model)
    if gemm_check is not None:
        print(gemm_check, file=sys.stderr)
    with gemm_backend(backend or BLAS):
        scores = evaluate_split(
            model,
            processor,
            dataset,
            tasks,
            batch_size=args.batch_size,
            rule=rule,
            num_workers=args.num_workers,
            dtype=DTYPES[args.dtype],
            progress=not args.quiet,
            prompt_cache=prompt_cache,
        )
    published = args.protocol == "published"
    protocol = {
        "name": args.protocol,
        "set_by": args.set_by,
        "tasks": [task_protocol(task) for task in tasks],
        "model": {"path": args.model, "revision": args.revision, "commit": getattr(model.config, "_commit_hash", None)},
        "data": {
            "path": args.data,
            "revision": args.data_revision,
            "split": args.split,
            "preprocessing": manifest["settings"].get("preprocessing", "standard"),
            "reconstructions": manifest["settings"].get("options", {}).get("reconstructions"),  # None: not told
        },
        "level": level_name(args.level, manifest["settings"]),
        "warnings": warnings,
        "limit": args.limit,
        "organs": {"set": model.config.organ_set, "names": list(model.config.organs)},
        "windows": window_protocol(rule, scores),
        "prompt_embeddings": "read from the prompt cache" if scores.prompts_are_cached else "computed",
        "score": "mean over prompt pairs of softmax([negative, positive] / temperature)",
        "temperature": 1.0 / scores.logit_scale,
        "absent_organs": "not scored; counted as 0 under `published`" if published else "not scored",
        "incomplete_organs": "scored",
        "device": str(model.device),
        "dtype": args.dtype,
        "gemm_backend": backend,
        "gemm_check": gemm_check,
        "attention": {
            "image": model.vision_model.config._attn_implementation,
            "text": model.text_model.config._attn_implementation,
        },
        "batch_size": args.batch_size,
        "versions": library_versions(),
    }
    metrics, paths = write_results(scores, protocol, args.out, published=published)
    if not args.quiet:
        print(format_table(metrics))
        for name, others in metrics["other_tasks"].items():
            print(f"\n{name}\n{format_table(others)}")
        for name, summary in {metrics["task"]: metrics, **metrics["other_tasks"]}.items() if published else ():
            print(f"\n{name}, published metrics\n{format_published_table(summary['published'])}")
    print(
        f"{metrics['num_reconstructions']} volumes in {time.perf_counter() - start:.1f} s "
        f"({scores.embeddings.num_windows} windows in {scores.embeddings.num_batches} batches on {device}). Written:"
    )
    for path in paths:
        print(f"  {path}")
    return metrics


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
