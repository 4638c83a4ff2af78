"""Train fVLM on CT volumes, organ masks and organ captions.

Ten steps on a processed split, CPU:
    python train_fvlm.py --recipe synthetic_demo --data out/split --output_dir out/run --max_steps 10

Four GPUs (more ways in docs/scaling.md), a smaller projection, the control with captions shuffled between patients:
    accelerate launch --config_file hub_configs/accelerate/four_gpus.yaml train_fvlm.py --recipe synthetic \\
        --data out/split --output_dir out/control --model.projection_dim 64 --shuffle_captions

From published weights (or an earlier run's folder), with its architecture, text encoder and tokenizer:
    python -m training_fvlm.convert --weights published.pth --vocab vocab.txt --preprocessing published \\
        --out out/published
    python train_fvlm.py --recipe published_chest_4 --init_from out/published --data out/split --output_dir out/run

Continue a run that was stopped, exactly where its last checkpoint was:
    python train_fvlm.py --recipe synthetic_demo --data out/split --output_dir out/run --resume_from_checkpoint true

A run that gets SIGTERM or SIGUSR1 finishes its step, writes a checkpoint and exits with status 75, which asks a script
to start it again (hub_configs/slurm/train.sh). A split on the Hub, read row by row without downloading it:
    python train_fvlm.py --recipe synthetic_demo --data owner/name --streaming --output_dir out/run

Push every checkpoint to a private repository of the Hub, each time a whole model that loads by its name (by hand:
`python -m training_fvlm.push`):
    python train_fvlm.py --recipe synthetic_demo --data out/split --output_dir out/run --push_to_hub \\
        --hub_model_id owner/name --model_license cc-by-nc-4.0

Settings come from the recipe (hub_configs/recipes); what stands on the command line wins. The output folder ends up
with the model, its processor and code (loadable by `AutoModel.from_pretrained(..., trust_remote_code=True)`),
README.md, run.json, organ_losses.csv and loss_curves.png.
"""

import json
import os
import platform
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate.utils import broadcast_object_list
from transformers import AutoTokenizer, PreTrainedModel, ProcessorMixin, set_seed
from transformers.utils import logging

from modeling_fvlm import FVLMConfig
from modeling_fvlm.gemm import BLAS, gemm_backend, pick_gemm_backend
from modeling_fvlm.modeling_fvlm import set_attention
from training_fvlm.adapt import plan_adapting
from training_fvlm.arguments import DataArguments, Settings, SettingsError, parse_settings
from training_fvlm.broken_steps import BrokenStep
from training_fvlm.build import build_model, centre_projections, outline_model
from training_fvlm.callbacks import CurveCallback
from training_fvlm.card_facts import data_licence, measured_energy
from training_fvlm.checkpoints import CheckpointError, is_disk_full
from training_fvlm.co_teaching import PeerTrainer, peer_arguments, peer_collator
from training_fvlm.collator import FVLMCollator, objective_options
from training_fvlm.curves import draw_if_logged
from training_fvlm.data import (
    ProcessedSplit,
    RowError,
    SplitRows,
    caption_rows_of_other_patients,
    check_against_recipe,
    load_split,
    read_description,
)
from training_fvlm.durable import plain_message
from training_fvlm.hub import prepare_repository
from training_fvlm.label_task import LabelTask, check_labels, read_label_task
from training_fvlm.model_card import render_card
from training_fvlm.objective_settings import OBJECTIVE_FIELDS, organ_numbers
from training_fvlm.organ_losses import last_rows
from training_fvlm.overfit import Overfit, without_dropout
from training_fvlm.scaling import built_whole, check_launch, check_sharding, describe_launch
from training_fvlm.signals import EXIT_STATUS, StopRequested, StopSignals
from training_fvlm.start import Start, read_start
from training_fvlm.streaming import commit_of, open_streamed_split
from training_fvlm.text import check_vocabulary
from training_fvlm.trainer import FVLMTrainer

logger = logging.get_logger("train_fvlm")
RUN_FILE = "run.json"
PACKAGES = ("fvlm", "torch", "transformers", "datasets", "accelerate", "peft", "tokenizers", "numpy")
# An absolute path within a text: at its start, or behind white space, a quote, a bracket, a comma or `=`.
CREDENTIALS = re.compile(r"(?<=://)[^/\s@]+@")  # name and password within an address
ABSOLUTE_PATH = re.compile(r"""(?<![^\s=,'"(\[{])(?:file:/)?/[^\s,'")\]}]*""")
# What the order of rows, the crops, the contrast and the steps hang on, by the place in run.json. The number of steps
# or epochs is not among them: a run may be made longer. Nor is what may save a broken one: learning rate, clipping and
# precision.
RESUMED_SETTINGS = (
    "data_name",
    "processes",
    *(f"data.{name}" for name in ("data_revision", "train_split", "max_train_rows", "shuffle_captions")),
    *(f"data.{name}" for name in ("random_crop", "flip_axes", "flip_probability")),
    *(f"training.{name}" for name in ("seed", "data_seed", "train_sampling_strategy", "per_device_train_batch_size")),
    *(f"training.{name}" for name in ("contrastive_batch_size", "micro_batch_size")),
    *(f"training.{name}" for name in ("gradient_accumulation_steps", "lr_schedule", "warmup_start_lr", "min_lr")),
    *(f"training.{name}" for name in ("lr_scheduler_type", "warmup_steps", "optim", "weight_decay")),
    *(f"training.{name}" for name in ("adam_beta1", "adam_beta2", "adam_epsilon")),
    *(f"training.{name}" for name in ("weight_decay_everywhere", "skip_inactive_organs", "published_gradient_scale")),
    *(f"training.{name}" for name in ("lora", "lora_rank", "lora_alpha", "lora_dropout", "lora_targets", "freeze")),
    *(f"training.{name}" for name in ("layer_lr_decay", "vision_lr_scale", "text_lr_scale")),
    *(f"training.{name}" for name in OBJECTIVE_FIELDS),
    "training.attn_implementation",
)


def main(argv: list[str] | None = None) -> int:
    """Train as the command line says; returns the exit status."""
    try:
        settings = parse_settings(sys.argv[1:] if argv is None else argv, description=__doc__)
        with StopSignals() as signals:
            return train(settings, signals)
    except SettingsError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except StopRequested as stop:
        tell(f"{stop} Start it again with --resume_from_checkpoint auto (exit status {EXIT_STATUS}).")
        if dist.is_initialized():  # a launcher ends the others when the first one is gone
            dist.barrier()
            dist.destroy_process_group()
        return EXIT_STATUS
    except (RowError, BrokenStep, CheckpointError) as error:
        tell(f"error: {plain_message(error)}")
        return 1
    except OSError as error:
        if not is_disk_full(error):
            raise
        tell(f"error: a disk is full: {error}. Free some space and go on with --resume_from_checkpoint auto.")
        return 1


def train(settings: Settings, signals: StopSignals | None = None) -> int:
    """Arguments -> datasets -> model -> FVLMTrainer -> save, card, push; returns the exit status."""
    args, data = settings.training, settings.data
    logging.set_verbosity(args.get_process_log_level())
    check_launch(args)
    check_sharding(data, args)
    if args.process_index == 0:
        logger.warning("%s", describe_launch(args))
        if args.resume_from_checkpoint:
            logger.warning("the run goes on from %s", args.resume_from_checkpoint)
    if args.push_to_hub:
        prepare_repository(args)
    set_seed(args.seed)
    pin_data(data, args.resume_from_checkpoint)
    if args.resume_from_checkpoint:
        check_same_run(settings, args.resume_from_checkpoint)

    # Data
    description = read_description(data.data, data.data_revision)
    check_against_recipe(description, settings.model, data.data)
    start = None if data.init_from is None else read_start(data.init_from, settings.model, description)
    if args.adapts:  # what --lora, --freeze and the rates name must be there: asked before a volume is read
        with built_whole(args):
            plan_adapting(outline_model(settings.model, description, start), args)
    label_task = read_objective(settings, description.organs)
    train_dataset, eval_dataset = load_datasets(settings, start, label_task)

    # Model
    resumed = args.resume_from_checkpoint
    tokenizer = None
    if resumed:
        tokenizer = AutoTokenizer.from_pretrained(resumed)
        check_vocabulary(tokenizer, f"--resume_from_checkpoint {resumed}")
    with built_whole(args):
        model, processor = build_model(
            settings.model,
            description,
            train_dataset,
            window_volumes=data.window_volumes,
            tokenizer=tokenizer,
            start=start,
        )
    crop = {"tokenizer": processor.tokenizer, "config": model.config, "seed": args.seed}
    if resumed:
        check_same_model(model.config, resumed)
    elif data.centring_rows:
        # Every process reads the same rows with the same weights, and comes to the same start.
        centre_projections(model, FVLMCollator(is_random=False, **crop), train_dataset, data.centring_rows)
    # After the centring, which runs in float32 where the model was built: flash attention could not.
    try:
        set_attention(model, args.attn_implementation)
    except ValueError as error:
        raise SettingsError(f"--attn_implementation {args.attn_implementation}: {error}") from error

    if args.overfit is not None:
        without_dropout(model)

    # Trainer
    flips = {"flip_axes": data.flip_axes, "flip_probability": data.flip_probability}
    train_collator = FVLMCollator(
        is_random=data.random_crop, **flips, **crop, **objective_options(args, model.config, label_task)
    )
    peer = None
    if args.uses("co_teaching"):
        section = settings.model | {"windows": model.config.windows}  # as they were measured
        build_second = partial(
            build_model,
            section,
            description,
            train_dataset,
            window_volumes=data.window_volumes,
            tokenizer=processor.tokenizer,
            start=start,
        )
        peer = make_peer(settings, build_second, train_dataset, train_collator, label_task)
    trainer = FVLMTrainer(
        model,
        args,
        train_dataset=train_dataset,
        train_collator=train_collator,
        eval_dataset=eval_dataset,
        eval_collator=FVLMCollator(is_random=False, **crop),
        processor=processor,
        zero_shot=zero_shot_evaluation(settings, model.config, processor) if data.eval_tasks else None,
        base=public_name(data.init_from) if data.init_from else "",
        label_task=label_task,
        peer=peer,
        callbacks=[CurveCallback()],
    )
    trainer.signals = signals
    overfit = None if args.overfit is None else Overfit(trainer)
    backend = gemm_backend_of_run(trainer)
    run = describe_run(settings, trainer, backend)
    run["organs"] = None if start is None else start.describe_organs()
    if not trainer.adaptation.is_whole:
        logger.warning("%s", trainer.adaptation)
    trainer.write_card = lambda: write_card(trainer, run)
    trainer.alarm.listener = lambda: write_progress(trainer, run)
    if trainer.is_world_process_zero():
        write_run(run, args.output_dir)

    with gemm_backend(backend or BLAS):
        trainer.train(resume_from_checkpoint=resumed)
        if overfit is not None:
            return end_overfit(trainer, run, overfit)
        if eval_dataset is not None and not was_just_evaluated(trainer):
            trainer.evaluate()

    # Save
    trainer.save_state()
    trainer.save_model(_internal_call=True)  # on all processes: each may hold a part of the weights
    if trainer.is_world_process_zero():
        draw_if_logged(args.output_dir)
        trainer.write_card()
        logger.warning("trained %d steps in %.0f s: %s", run["steps"], run["train_seconds"], args.output_dir)
        if any(line.get("train_loss") == 0 for line in trainer.state.log_history):  # what no organ enters is exactly 0
            logger.warning(
                "NOTHING WAS LEARNED: no organ entered the loss in any step. An organ enters when it is whole in the "
                "crops of two patients of a batch or more, with captions that differ and one that is abnormal. Look at "
                "`python -m data_builders inspect` on the data, or take a larger --contrastive_batch_size."
            )
    if args.push_to_hub:
        trainer.push_to_hub()  # the output folder without its checkpoints; the data set is never part of it
    trainer.end()
    return 0


def end_overfit(trainer: FVLMTrainer, run: dict[str, Any], overfit: Overfit) -> int:
    """The verdict of --overfit: a sentence, and the exit status."""
    is_learned, sentence = overfit.verdict()
    if trainer.is_world_process_zero():
        run["overfit"] = {"is_learned": is_learned, "verdict": sentence}
        write_progress(trainer, run)
        draw_if_logged(trainer.args.output_dir)
        look = f" Look at `python -m training_fvlm.curves {shlex.quote(trainer.args.output_dir)}`, organ by organ."
        logger.warning("%s%s", sentence, "" if is_learned else look)
    trainer.end()
    return 0 if is_learned else 1


def read_objective(settings: Settings, organs: Sequence[str]) -> LabelTask | None:
    """See that what the objective names of organs is there, before any data is read; the findings of --label_task."""
    args = settings.training
    try:
        for option in ("organ_label_smoothing", "organ_token_dropout"):
            organ_numbers(getattr(args, option), organs, f"--{option}")
    except ValueError as error:
        raise SettingsError(str(error)) from error
    return read_label_task(args.label_task, organs) if args.uses("labels") else None


def load_datasets(
    settings: Settings, start: Start | None = None, label_task: LabelTask | None = None
) -> tuple[SplitRows, SplitRows | None]:
    """The training rows, captions shuffled in the control, and the evaluation rows unless --eval_strategy is no."""
    args, data = settings.training, settings.data
    model = settings.model if start is None else start.model
    reports = ["findings", "impression"] if model.get("volume_pooling", "none") != "none" else []
    more = reports + (["labels"] if label_task is not None else [])
    # The first process converts Parquet to a memory-mapped table, or reads an index; the others then find it.
    with args.main_process_first(desc="loading the data set"):
        rows = open_split(data, data.train_split, data.max_train_rows, more)
        eval_rows = None
        if args.eval_strategy != "no":
            try:
                eval_rows = open_split(data, data.eval_split, data.max_eval_rows)
            except SettingsError as error:
                raise SettingsError(f"{error} To train without evaluation: --eval_strategy no.") from error
    if len(rows) < args.group_size:
        raise SettingsError(
            f"{data.data}, split {data.train_split}: {len(rows)} rows do not fill one batch of {args.group_size} "
            "(--contrastive_batch_size, or --per_device_train_batch_size times processes). Lower that, or give the "
            "split more training patients: a smaller --validation_fraction when it is built, for instance."
        )
    where = f"{data.data}, split {data.train_split}"
    if reports and not any(row["findings"] or row["impression"] for row in rows.captions):
        raise SettingsError(f"{where} has no report: leave --model.volume_pooling out.")
    if label_task is not None:
        check_labels(label_task, (row["labels"] for row in rows.captions), where)
    if data.shuffle_captions:
        rows.caption_rows = caption_rows_of_other_patients(rows.patient_ids(), args.seed)
    return rows, eval_rows


def open_split(data: DataArguments, split: str, max_rows: int | None, more: Sequence[str] = ()) -> SplitRows:
    """A split of --data, `more` columns included: a memory-mapped table here, or with --streaming where it lies."""
    options = {"revision": data.data_revision, "max_rows": max_rows}
    if not data.streaming:
        return ProcessedSplit(load_split(data.data, split, **options, more=more), data=data.data, split=split)
    rows = open_streamed_split(data.data, split, **options)
    if missing := [name for name in more if name not in rows.captions.column_names]:
        raise SettingsError(f"{data.data}, split {split}: columns {missing} are missing.")
    return rows


def pin_data(data: DataArguments, checkpoint: str | None) -> None:
    """Stay at one commit of a data set on the Hub: what is pushed while a run lasts must not change its rows."""
    if Path(data.data).is_dir() or "://" in data.data:
        return
    asked = data.data_revision
    if checkpoint and asked is None:
        commit = [recorded_run(checkpoint).get("data", {}).get("data_revision")]
    else:  # a branch or tag may move as well
        commit = [commit_of(data.data, asked) or asked]
    broadcast_object_list(commit)
    data.data_revision = commit[0]


def make_peer(
    settings: Settings,
    build: Callable[[], tuple[PreTrainedModel, ProcessorMixin]],
    train_dataset: SplitRows,
    train_collator: FVLMCollator,
    label_task: LabelTask | None,
) -> PeerTrainer:
    """The second model of --targets co_teaching, from another seed, and its trainer.

    Args:
        settings: Of the run.
        build: Makes the model.
        train_dataset, train_collator, label_task: Those of the first model.
    """
    args, data = settings.training, settings.data
    of_peer = peer_arguments(args)
    set_seed(of_peer.seed)
    model, processor = build()
    if data.centring_rows and not args.resume_from_checkpoint:
        centred = FVLMCollator(processor.tokenizer, model.config, is_random=False)
        centre_projections(model, centred, train_dataset, data.centring_rows)
    set_attention(model, args.attn_implementation)
    if data.init_from is not None:
        logger.warning("--targets co_teaching: both models start from --init_from; only their data's order differs.")
    set_seed(args.seed)
    return PeerTrainer(
        model,
        of_peer,
        train_dataset=train_dataset,
        train_collator=peer_collator(train_collator, of_peer),
        base=public_name(data.init_from) if data.init_from else "",
        label_task=label_task,
    )


def zero_shot_evaluation(
    settings: Settings, config: FVLMConfig, processor: ProcessorMixin
) -> Callable[[PreTrainedModel], dict[str, float]]:
    """Zero-shot scores during training: the prompt sets of --eval_tasks on the evaluation split.

    Wired here because the training and evaluation rooms do not know each other. What does not fit is refused before
    the first step.
    """
    from evaluation_fvlm.errors import EvaluationError
    from evaluation_fvlm.metrics import summarize
    from evaluation_fvlm.split import open_split, select_scans
    from evaluation_fvlm.tasks import check_task_labels, check_task_organs, load_task
    from evaluation_fvlm.zero_shot import evaluate_split

    data = settings.data
    try:
        tasks = [load_task(name) for name in data.eval_tasks]
        scans = select_scans(open_split(data.data, data.eval_split, data.data_revision), limit=data.max_eval_rows)
        labelled = {label["finding"] for labels in scans["labels"] for label in labels or []}
        for task in tasks:
            check_task_organs(task, config.organs)
            if missing := check_task_labels(task, labelled):
                logger.warning("--eval_tasks %s: split %s has no label for %s", task.name, data.eval_split, missing)
    except EvaluationError as error:
        raise SettingsError(f"--eval_tasks: {error}") from error

    args = settings.training
    # float32 as the weights are, but for flash attention, which has none.
    half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(args.computed_precision)
    dtype = half if args.attn_implementation.startswith("flash") else None

    def evaluate(model: PreTrainedModel) -> dict[str, float]:
        try:
            scores = evaluate_split(model, processor, scans, tasks, batch_size=args.eval_batch_size, dtype=dtype)
            frame = scores.frame
        except EvaluationError as error:
            raise SettingsError(f"--eval_tasks: {error}") from error
        scores = {task.name: summarize(frame[frame["task"] == task.name])["macro_auc"] for task in tasks}
        return {f"{name}_macro_auc": score for name, score in scores.items() if score is not None}

    return evaluate


def gemm_backend_of_run(trainer: FVLMTrainer) -> str | None:
    """The backend of the run's linear layers, the same on all processes; None where it computes no float32 on a CPU.

    What --gemm_backend names, else what the run that is resumed used, else what the first process measures.

    Raises:
        SettingsError: If that backend is not there.
    """
    args = trainer.args
    if args.device.type != "cpu" or args.computed_precision != "fp32":
        if args.gemm_backend != "auto":
            where = f"{args.computed_precision} on {args.device.type}"
            logger.warning("--gemm_backend %s has no effect in %s.", args.gemm_backend, where)
        return None
    recorded = None
    if args.resume_from_checkpoint and (run := recorded_run(args.resume_from_checkpoint)):
        recorded = run.get("gemm_backend", BLAS)  # a run.json from before there was a choice does not name it
    name = recorded if args.gemm_backend == "auto" else args.gemm_backend
    if recorded not in (None, name):
        logger.warning(
            "--gemm_backend %s, but the run that is resumed used %s: its weights will differ in the last digits.",
            name,
            recorded,
        )
    chosen = [name]
    try:
        with gemm_backend(name or BLAS):  # all processes ask whether it is there: none waits for one that has stopped
            pass
        if trainer.is_world_process_zero():
            chosen[0], line = pick_gemm_backend(name, sum(weight.numel() for weight in trainer.model.parameters()))
            if line is not None:
                logger.warning("%s", line)
    except ValueError as error:
        hint = ""
        if args.gemm_backend == "auto":
            hint = f" The run that is resumed used it: --gemm_backend {BLAS} goes on, but not to the same digits."
        raise SettingsError(f"--gemm_backend {args.gemm_backend}: {error}{hint}") from error
    broadcast_object_list(chosen)
    return chosen[0]


def check_same_model(config: FVLMConfig, checkpoint: str) -> None:
    """Refuse to resume a checkpoint with settings that make another model than the one it holds."""
    saved, now = (_flat(each.to_dict()) for each in (FVLMConfig.from_pretrained(checkpoint), config))
    differing = [
        f"{name}: {now.get(name)!r} here, {saved.get(name)!r} there"
        for name in sorted(set(saved) | set(now))
        if saved.get(name) != now.get(name)
    ]
    if differing:
        raise SettingsError(
            f"{checkpoint} was trained with another model section ({'; '.join(differing)}). Resume with the settings "
            "in its run.json, or start anew in another --output_dir."
        )


def check_same_run(settings: Settings, checkpoint: str) -> None:
    """Refuse to resume with settings under which the steps to come would not be those of the run that was stopped.

    The run's own settings stand in run.json beside its checkpoints; a folder without one is taken as it is, and so is
    a setting that an older run.json does not hold.
    """
    saved = _flat(recorded_run(checkpoint))
    now = _flat(without_folders(json.loads(json.dumps(resolved_settings(settings), default=str))))
    options = {"data_name": "--data", "processes": "number of processes"}
    differing = [
        f"{options.get(name) or '--' + name.partition('.')[2]}: {now[name]!r} here, {saved[name]!r} there"
        for name in RESUMED_SETTINGS
        if name in saved and saved[name] != now[name]
    ]
    if differing:
        raise SettingsError(
            f"{checkpoint} belongs to a run with other settings ({'; '.join(differing)}). Resume with those in "
            f"{RUN_FILE} beside it, or start anew in another --output_dir."
        )


def recorded_run(checkpoint: str) -> dict[str, Any]:
    """Content of the run.json beside a checkpoint; nothing if there is none."""
    path = Path(checkpoint).resolve().parent / RUN_FILE
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """A config's entries by dotted name, without those that saving adds."""
    added = ("architectures", "auto_map", "custom_pipelines", "dtype", "transformers_version", "_name_or_path")
    flat: dict[str, Any] = {}
    for name, value in config.items():
        if name in added:
            continue
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = list(value) if isinstance(value, tuple) else value
    return flat


def was_just_evaluated(trainer: FVLMTrainer) -> bool:
    """True if the last step's evaluation is in the log already."""
    return any("eval_loss" in line and line["step"] == trainer.state.global_step for line in trainer.state.log_history)


def tell(text: str) -> None:
    """Say on stderr what ended the run; of several processes the first one speaks."""
    if os.environ.get("RANK", "0") == "0":
        print(text, file=sys.stderr)


def public_name(name: str) -> str:
    """What a data set or model may be called in public: the last part of a folder, a Hub id as it is."""
    return Path(name).resolve().name if Path(name).is_dir() else name


def package_version(name: str) -> str:
    """Version of an installed package; our own may run from a checkout without being installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def public_command(argv: Sequence[str]) -> str:
    """The command line without the value of any option with `token` in its name.

    `--model.token_selection` and its kind are no secrets.
    """
    words, is_secret = ["train_fvlm.py"], False
    for word in argv:
        if word.startswith("--"):
            flag, is_joined, value = word.partition("=")
            is_secret = "token" in flag.lower() and not flag.startswith("--model.")
            words.append(f"{flag}={without_folders(value)}" if is_joined and not is_secret else flag)
        elif not is_secret:
            words.append(without_folders(word))
    return " ".join(words)


def without_folders(value: Any) -> Any:
    """Any JSON value with the absolute paths in it cut to their last component, and addresses without a password."""
    if isinstance(value, dict):
        return {key: without_folders(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [without_folders(entry) for entry in value]
    if not isinstance(value, str):
        return value
    if os.path.isabs(value):  # the whole of it, blanks included
        return Path(value).name
    return ABSOLUTE_PATH.sub(lambda match: Path(match[0]).name, CREDENTIALS.sub("", value))


def resolved_settings(settings: Settings) -> dict[str, Any]:
    """The entries of run.json that the settings make by themselves."""
    return {
        "data": asdict(settings.data),
        "training": settings.training.to_sanitized_dict(),
        "data_name": public_name(settings.data.data),
        "processes": settings.training.world_size,
    }


def describe_run(settings: Settings, trainer: FVLMTrainer, backend: str | None) -> dict[str, Any]:
    """Content of run.json: resolved settings, sizes, library versions and the command that made the run."""
    args = settings.training
    datasets = {settings.data.train_split: trainer.train_dataset}
    if trainer.eval_dataset is not None:
        datasets[settings.data.eval_split] = trainer.eval_dataset
    # A folder to start from brings its text encoder: the recipe's is not read then.
    init_from = settings.data.init_from
    text_encoder = None if init_from else (settings.model.get("text_encoder") or {}).get("pretrained")
    run = {
        "command": public_command(settings.argv),
        "recipe": settings.recipe,
        "model": json.loads(trainer.model.config.to_json_string()),
        **resolved_settings(settings),
        "started_from": {
            "model": init_from and public_name(init_from),
            "text encoder": text_encoder and public_name(text_encoder),
        },
        "data_rows": {split: len(rows) for split, rows in datasets.items()},
        "data_patients": {split: len(set(rows.patient_ids())) for split, rows in datasets.items()},
        "model_terms": args.model_terms,
        "repository": args.hub_model_id if args.push_to_hub else None,
        "objective": {name: getattr(args, name) for name in OBJECTIVE_FIELDS},
        "data_licence": data_licence(settings.data.data, settings.data.data_revision),
        "num_parameters": trainer.adaptation.num_parameters,
        "adapting": trainer.adaptation.describe(args),
        "group_size": args.group_size,
        "device": torch.cuda.get_device_name() if args.device.type == "cuda" else args.device.type,
        "precision": args.computed_precision,
        "gemm_backend": backend,
        "versions": {"python": platform.python_version(), **{name: package_version(name) for name in PACKAGES}},
        "steps": 0,
        "alarms": [],
    }
    # The folder of the run may be published: whose machine it was is nobody's business.
    return without_folders(json.loads(json.dumps(run, default=str)))


def write_run(run: dict[str, Any], output_dir: str) -> None:
    """Write run.json."""
    path = Path(output_dir) / RUN_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    # At once: another process of a resumed run may still be reading the file that stood here.
    unfinished = path.with_name(path.name + ".part")
    unfinished.write_text(json.dumps(run, indent=2) + "\n", encoding="utf-8")
    os.replace(unfinished, path)


def write_progress(trainer: FVLMTrainer, run: dict[str, Any]) -> None:
    """Write run.json with how far the run has come, and what the alarm has said so far."""
    run |= {
        "steps": trainer.state.global_step,
        "max_steps": trainer.state.max_steps,
        "is_finished": not trainer.is_in_train,
        "train_seconds": round(trainer.clock.seconds, 1),
        "energy": measured_energy(trainer.args.output_dir),
        "alarms": trainer.alarm.entries(),
    }
    write_run(run, trainer.args.output_dir)


def write_card(trainer: FVLMTrainer, run: dict[str, Any]) -> None:
    """Write README.md from the config, the run's settings and its last losses; and run.json, as both stand now."""
    write_progress(trainer, run)
    evaluations = [line for line in trainer.state.log_history if "eval_loss" in line]
    card = render_card(
        trainer.accelerator.unwrap_model(trainer.model).config,
        run,
        last_rows(trainer.train_file.read(), num_windows=5),
        last_rows(trainer.eval_file.read()) if evaluations else {},
        evaluations[-1] if evaluations else {},
    )
    (Path(trainer.args.output_dir) / "README.md").write_text(card, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
