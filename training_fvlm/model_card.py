"""README.md of a trained or converted model: where it comes from, how to feed it, and what it is not for.

Everything that preprocessing depends on is written from the config, so that card and weights cannot disagree. What is
measured also goes into the header as `model-index`, where the Hub looks for results.
"""

import math
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, fields
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from modeling_fvlm.configuration_fvlm import FVLMConfig
from modeling_fvlm.gemm import ONEDNN

from .objective_settings import ObjectiveSettings
from .organ_losses import OrganLossRow

LIMITS = "Research only, not for diagnosis."
PUBLISHED_CODE = "alibaba-damo-academy/fvlm, commit d768ec1"
METHOD = "Shui et al., ICLR 2025, https://openreview.net/forum?id=nYpPAT4L3D"
TITLE = "fVLM: a CT volume and sentences, organ by organ"
TASK = "zero-shot-image-classification"
# Weights keep the licence they were published under, whatever was trained on top of them.
OF_THE_SOURCE = {"license": "other", "license_name": "that-of-the-source-weights"}
NOT_STATED = {"license": "unknown"}
ANY_PLACE = "PATH_OR_HUB_ID"
CITATION = """```bibtex
@inproceedings{shui2025fvlm,
  title     = {Large-scale and Fine-grained Vision-language Pre-training for Enhanced {CT} Image Understanding},
  author    = {Shui, Zhongyi and others},
  booktitle = {International Conference on Learning Representations},
  year      = {2025},
  url       = {https://arxiv.org/abs/2501.14548}
}
```"""


@dataclass(frozen=True)
class Source:
    """A file or model that went into a converted folder: a row of its card."""

    role: str
    name: str
    digest: str
    num_tensors: int
    left_behind: list[str]


def render_card(
    config: FVLMConfig,
    run: dict[str, Any],
    train_rows: dict[str, OrganLossRow],
    eval_rows: dict[str, OrganLossRow],
    final_metrics: dict[str, float],
) -> str:
    """Write the card.

    Args:
        config: The model's config.
        run: Content of run.json: `recipe`, `data`, `training`, `started_from`, `versions`, `num_parameters` ...
        train_rows, eval_rows: Last losses of each organ (`organ_losses.last_rows`); evaluation may be empty.
        final_metrics: Numbers of the last evaluation, for the zero-shot lines.
    """
    training, data = run["training"], run["data"]
    started_from = {what: name for what, name in run["started_from"].items() if name is not None}
    is_control = data["shuffle_captions"]
    card = [
        *opening(
            **(run.get("model_terms") or (OF_THE_SOURCE if started_from else NOT_STATED)),
            **_references(run),
            **_emissions(run),
            **_results(config, run, eval_rows, final_metrics),
        ),
        f"A 3D vision-language model with {run['num_parameters']:,} parameters that compares each of "
        f"{len(config.organs)} organs of a CT with sentences about that organ. It was trained on pairs of an organ and "
        f"the caption a report gives it, without labels ({METHOD}).",
        "",
        *([] if run.get("is_finished", True) else [
            f"**Training goes on**: these are the weights after {run['steps']:,} of {run['max_steps']:,} steps.",
            "",
        ]),
        *(["**A control**: captions were shuffled between patients. It cannot have learned what they say.", ""]
          if is_control else []),
        *usage(run.get("repository") or ANY_PLACE),
        *preprocessing(config),
        "## Data",
        "",
        *table(
            ("what", "value"),
            [
                ("data", f"`{run['data_name']}`, split by patient"),
                ("rows", _counts(run["data_rows"], run.get("data_patients") or {})),
                ("licence of the data", run.get("data_licence") or "not stated in their card"),
                ("captions", "SHUFFLED between patients: a control" if is_control else "own"),
            ],
        ),
        "",
        "The data are not part of this repository.",
        "",
        "## Training",
        "",
        *table(
            ("what", "value"),
            [
                ("recipe", _recipe(run["recipe"])),
                ("started from", _started_from(started_from)),
                *_organs(run.get("organs")),
                ("flips", _flips(data)),
                *_adapting(run.get("adapting"), training, run["num_parameters"]),
                ("objective", _objective(run.get("objective") or {}, config)),
                ("steps", f"{run['steps']:,} of {_contrast(run)}"),
                ("optimizer", f"{training['optim']}, learning rate {training['learning_rate']:g}, "
                              f"weight decay {training['weight_decay']:g}{_decayed(training)}, {_schedule(training)}"),
                ("precision", run["precision"] + _backend(run["gemm_backend"])),
                ("seed", str(training["seed"])),
                ("versions", ", ".join(f"{name} {version}" for name, version in run["versions"].items())),
            ],
        ),
        "",
        "All settings are in `run.json`.",
        "",
        "## Results",
        "",
        *_loss_table(config.organs, train_rows, eval_rows),
        "",
        *_alarms(run.get("alarms") or []),
        *_zero_shot(final_metrics),
        *_time_and_energy(run),
        "## Limits",
        "",
        f"{LIMITS} The model says how well an image agrees with a sentence, not what a patient has. It was "
        "trained on the data named above and knows no other scanners, populations, languages or wordings. It needs a "
        "segmentation of the organs, and an organ cut by the scan or by the crop is embedded from the part that is "
        "there. Scores are not calibrated probabilities.",
        "",
        "## Licence",
        "",
        *_licence(run.get("model_terms") or {}, bool(started_from)),
        "",
        "## Citation",
        "",
        CITATION,
        "",
    ]  # fmt: skip
    return "\n".join(card)


def render_converted_card(config: FVLMConfig, sources: Sequence[Source], is_trained: bool) -> str:
    """README.md of a converted folder: where the weights are from, what was left behind, how to feed the model.

    Args:
        config: The model's config.
        sources: What the weights were read from.
        is_trained: False for a start, whose organ queries and projections are fresh.
    """
    if is_trained:
        state = (
            "The weights are those of a published checkpoint under other names, bit by bit. For the same crop and "
            f"caption the model gives what the published code ({PUBLISHED_CODE}) gives."
        )
    else:
        state = (
            "**Not trained.** The image tower starts from MAE weights inflated to 3D, the text encoder from its own. "
            "Patch embedding, organ queries (zeros), pooling and projections are random: embeddings mean nothing "
            "before training."
        )
    card = [
        *opening(**OF_THE_SOURCE),
        f"{state} The method: {METHOD}.",
        "",
        "## Where the weights are from",
        "",
        *table(
            ("what", "name", "sha256 or revision", "tensors", "of these left behind"),
            [
                (source.role, f"`{source.name}`", f"`{source.digest}`", str(source.num_tensors),
                 str(len(source.left_behind)))
                for source in sources
            ],
        ),
        "",
        "Made by `python -m training_fvlm.convert`. Left behind, since no embedding reads them:",
        "",
        *(f"- `{name}` ({source.role})" for source in sources for name in source.left_behind),
        *([] if any(source.left_behind for source in sources) else ["- nothing"]),
        "",
        "The weights keep the licence they were published under; it applies to this folder too. Only the code beside "
        "them is Apache-2.0.",
        "",
        *usage(),
        *preprocessing(config),
        "## Limits",
        "",
        f"{LIMITS} The model says how well an image agrees with a sentence, not what a patient has. It needs a "
        "segmentation of the organs, and an organ cut by the scan or by the crop is embedded from the part that is "
        "there. Scores are not calibrated probabilities.",
        "",
    ]  # fmt: skip
    return "\n".join(card)


def opening(**header: Any) -> list[str]:
    """What every card begins with: the front matter the Hub reads, the title, and what the model is not for.

    Args:
        header: Fields of `ModelCardData` beside those that every model of ours has.
    """
    front = ModelCardData(
        library_name="transformers", pipeline_tag=TASK, tags=["ct", "radiology", "vision-language", "fvlm"], **header
    )
    return ["---", *front.to_yaml(line_break="\n").splitlines(), "---", "", f"# {TITLE}", "", f"**{LIMITS}**", ""]


def usage(place: str = ANY_PLACE) -> list[str]:
    """The section that says how to load model and processor from a folder or repository."""
    return [
        "## Use",
        "",
        "```python",
        "from transformers import AutoModel, AutoProcessor",
        "",
        f'model = AutoModel.from_pretrained("{place}", trust_remote_code=True)',
        f'processor = AutoProcessor.from_pretrained("{place}", trust_remote_code=True)',
        'inputs = processor(volumes=["ct.nii.gz"], masks=["totalsegmentator.nii.gz"])',
        "organs = model.get_organ_features(**inputs)",
        "organs.image_embeds  # (1, organs, projection_dim), unit length, in the order below",
        "```",
        "",
        f'Findings from prompts: `pipeline("ct-zero-shot", model="{place}", trust_remote_code=True)`, called '
        'with `{"volume": "ct.nii.gz", "mask": "totalsegmentator.nii.gz"}` and `findings`, a list of `{"finding", '
        '"organ", "positive", "negative"}`.',
        "",
    ]


def preprocessing(config: FVLMConfig) -> list[str]:
    """The section that says what the processor does, and the organs."""
    vision = config.vision_config
    rows = [
        ("axis order", "(depth, height, width), LPS: depth to superior, height to posterior, width to left"),
        ("spacing", f"{_edges(config.spacing)} mm along (depth, height, width)"),
        ("margin around the organs' box", f"{_edges(config.margin_voxels)} voxels"),
        ("crop", f"{_edges(vision.volume_size)} voxels, patches of {_edges(vision.patch_size)}"),
        ("patches read", "those that hold an organ" if vision.token_selection == "organs" else "all"),
        *((f"HU window {number}", _window(window)) for number, window in enumerate(config.windows, start=1)),
        ("text", f"{config.text_config.model_type}, at most {config.max_text_length} tokens"),
    ]
    return [
        "## Preprocessing",
        "",
        "The processor does all of this; the numbers are part of the weights.",
        "",
        *table(("what", "value"), rows),
        "",
        _preparation(config),
        "",
        f"Organs (set `{config.organ_set}`): {', '.join(config.organs)}.",
        "",
    ]


def _preparation(config: FVLMConfig) -> str:
    """By which geometry a scan is prepared, and what the published data had there."""
    faults = (
        "the published preparation scripts swap the two in-plane spacings and rescale HU in int16, which shows "
        "where these spacings differ or the rescale slope is not 1"
    )
    if config.preprocessing == "published":
        return f"Scans are prepared with the published faults (`preprocessing: published`): {faults}."
    return f"Scans are prepared by their own geometry (`preprocessing: standard`); {faults}."


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return ["| " + " | ".join(line) + " |" for line in lines]


def _edges(values: Sequence[float]) -> str:
    return " x ".join(f"{value:g}" for value in values)


def _window(window: dict[str, float]) -> str:
    return (
        f"[{window['hu_min']:g}, {window['hu_max']:g}] HU -> [0, 1], then minus {window['mean']:g}, "
        f"divided by {window['std']:g}"
    )


def _licence(terms: dict[str, str], has_source: bool) -> list[str]:
    """What the licence of the weights is: `terms` as the header has them, empty where none was given."""
    name = terms.get("license_name", terms.get("license"))
    link = f" ({terms['license_link']})" if "license_link" in terms else ""
    source = (
        "The weights it started from keep their licence, and it applies to this folder too. Only the code beside them "
        "is Apache-2.0."
    )
    if not terms:
        return [source if has_source else "None was stated for the weights. The code beside them is Apache-2.0."]
    weights = f"Weights: {name}{link}. The code beside them is Apache-2.0."
    return [weights, *(["", source] if has_source else [])]


def _is_hub_id(name: str) -> bool:
    """Whether a name is that of a repository: those of folders are cut to their last part."""
    return name.count("/") == 1 and "://" not in name


def _references(run: dict[str, Any]) -> dict[str, list[str]]:
    """Data set and models it goes back to, as far as they are on the Hub."""
    models = [name for name in run["started_from"].values() if name is not None and _is_hub_id(name)]
    references = {"base_model": models} if models else {}
    return references | ({"datasets": [run["data_name"]]} if _is_hub_id(run["data_name"]) else {})


def _emissions(run: dict[str, Any]) -> dict[str, Any]:
    """What was measured, as the Hub's header has it, in grams."""
    energy = run.get("energy")
    if not energy:
        return {}
    emissions = {
        "emissions": round(1000 * energy["co2_kg"], 3),
        "source": "codecarbon",
        "hardware_used": _hardware(run),
    }
    return {"co2_eq_emissions": emissions | {"training_type": "fine-tuning" if _references(run) else "pre-training"}}


def _results(
    config: FVLMConfig, run: dict[str, Any], eval_rows: dict[str, OrganLossRow], final_metrics: dict[str, float]
) -> dict[str, Any]:
    """`model-index`: what was measured on the evaluation split; nothing without one."""
    measured = [
        ("roc_auc", f"{name.removeprefix('eval_').removesuffix('_macro_auc')}: macro AUC, zero-shot", value)
        for name, value in final_metrics.items()
        if name.endswith("macro_auc")
    ]
    for organ in config.organs:
        if row := eval_rows.get(organ):
            measured.append(("contrastive_loss", f"{organ}: loss in nats (chance {row.chance:.3f})", row.loss))
            guess = f"{organ}: nearest caption is right (guess {row.retrieval_chance:.3f})"
            measured.append(("retrieval_at_1", guess, row.retrieval))
    data = {"dataset_type": run["data_name"], "dataset_name": run["data_name"]}
    results = [
        EvalResult(
            task_type=TASK, **data, dataset_split=run["data"].get("eval_split"),
            metric_type=kind, metric_name=name, metric_value=round(float(value), 5),
        )
        for kind, name, value in measured
        if math.isfinite(value)
    ]  # fmt: skip
    return {"model_name": TITLE, "eval_results": results} if results else {}


def _counts(rows: dict[str, int], patients: dict[str, int]) -> str:
    return ", ".join(
        f"{count:,} {split}" + (f" (of {patients[split]:,} patients)" if split in patients else "")
        for split, count in rows.items()
    )


def _started_from(started_from: dict[str, str]) -> str:
    return ", ".join(f"{what} `{name}`" for what, name in started_from.items()) or "random weights"


def _objective(objective: dict[str, Any], config: FVLMConfig) -> str:
    """Targets, how organs are combined, and what else is not the published objective."""
    words = [f"targets: {', '.join(objective.get('targets') or ['published'])}"]
    words.append(f"loss over organs: {config.organ_reduction}")
    if config.volume_pooling != "none":
        words.append(f"whole volume against whole report, pooled by {config.volume_pooling}")
    for entry in fields(ObjectiveSettings):
        default = entry.default if entry.default_factory is MISSING else entry.default_factory()
        value = objective.get(entry.name, default)
        if entry.name != "targets" and value != default:
            words.append(f"{entry.name} {' '.join(map(str, value)) if isinstance(value, list) else value}")
    return "; ".join(words)


def _contrast(run: dict[str, Any]) -> str:
    """How many patients a step contrasts, and how they get through memory."""
    training = run["training"]
    number = training.get("gradient_accumulation_steps") or 1
    accumulated = f", the mean of {number} contrasts" if number > 1 else ""
    is_cached = isinstance(training.get("contrastive_batch_size"), int)
    chunks = f", in chunks of {training['micro_batch_size']} (gradient cache)" if is_cached else ""
    return f"{run['group_size']} patients{accumulated}{chunks}"


def _hardware(run: dict[str, Any]) -> str:
    number = run.get("processes", 1)
    return f"{number} x {run['device']}" if number > 1 else str(run["device"])


def _time_and_energy(run: dict[str, Any]) -> list[str]:
    """How long it took on what; energy only where something measured it."""
    seconds = run.get("train_seconds")
    if not seconds:
        return []
    hours = seconds / 3600
    rows = [
        ("hardware", _hardware(run)),
        ("training time", f"{hours:.1f} h" if hours >= 2 else f"{seconds / 60:.1f} min"),
        ("device-hours", f"{hours * run.get('processes', 1):.3g}"),
    ]
    if energy := run.get("energy"):
        rows.append(("energy", f"{energy['kwh']:.3g} kWh, as codecarbon estimates it for the machine"))
        rows.append(("emissions", f"{energy['co2_kg']:.3g} kg CO2e, on the grid that codecarbon took it to be on"))
        text = "With another grid in mind: emissions = energy x its carbon intensity (kg CO2e per kWh)."
    else:
        text = (
            "Energy was not measured (`--report_to codecarbon` would have). By hand: energy in kWh = device-hours x "
            "watts of a device under load / 1000 x PUE of the site; emissions in kg CO2e = energy x carbon intensity "
            "of its grid in kg CO2e per kWh."
        )
    return ["## Time and energy", "", *table(("what", "value"), rows), "", text, ""]


def _organs(organs: dict[str, Any] | None) -> list[tuple[str, str]]:
    """Rows on where the organs' queries and projections are from; none where they are those it started from."""
    if organs is None:
        return []
    rows = [("organs it knew and kept", ", ".join(organs["kept"]) or "none")]
    if organs["new"]:
        new = (f"{organ} from {origin['from'] or 'fresh weights'} ({origin['because']})"
               for organ, origin in organs["new"].items())  # fmt: skip
        rows.append(("new organs, and what they started from", "; ".join(new)))
    if organs["dropped"]:
        rows.append(("organs it knew and lost", ", ".join(organs["dropped"])))
    return rows


def _adapting(adapting: dict[str, Any] | None, training: dict[str, Any], num_parameters: int) -> list[tuple[str, str]]:
    """Rows on what was trained, where that is not everything alike."""
    rows = []
    if adapting is not None:
        count = adapting["trained_parameters"]
        parts = ", ".join(f"{part} {trained:,}" for part, trained in adapting["by_part"].items() if trained)
        rows.append(("trained", f"{count:,} parameters, {100 * count / num_parameters:.2f} %: {parts}"))
        if (lora := adapting["lora"]) is not None:
            towers = f"{lora['targets']} layers of {' and '.join(lora['towers'])}"
            sizes = f"rank {lora['rank']}, alpha {lora['alpha']}, dropout {lora['dropout']:g}"
            rows.append(("LoRA", f"{towers}, {sizes}; merged into these weights, and by itself in `adapter/`"))
    if (decay := training.get("layer_lr_decay", 1)) != 1:
        rows.append(("learning rate of a block", f"{decay:g} of that of the block above it"))
    for tower in ("vision", "text"):
        if (scale := training.get(f"{tower}_lr_scale", 1)) != 1:
            rows.append((f"learning rate of the {tower} tower", f"{scale:g} of the others'"))
    return rows


def _flips(data: dict[str, Any]) -> str:
    if not data["flip_axes"]:
        return "none"
    return f"along {', '.join(data['flip_axes'])}, each with probability {data['flip_probability']:g}"


def _decayed(training: dict[str, Any]) -> str:
    return " on everything" if training["weight_decay_everywhere"] else ""


def _backend(name: str | None) -> str:
    return ", linear layers by oneDNN" if name == ONEDNN else ""


def _schedule(training: dict[str, Any]) -> str:
    if training["lr_schedule"] == "published":
        return f"published schedule from {training['warmup_start_lr']:g} to {training['min_lr']:g}"
    return str(training["lr_scheduler_type"])


def _recipe(recipe: dict[str, Any]) -> str:
    if "name" not in recipe:
        return "none (command line only)"
    return f"{recipe['name']}, version {recipe['version']}" if "version" in recipe else str(recipe["name"])


def _loss_table(
    organs: Sequence[str], train_rows: dict[str, OrganLossRow], eval_rows: dict[str, OrganLossRow]
) -> list[str]:
    if not train_rows:
        return ["No log line was written (`--logging_strategy no`), or no organ ever entered the loss."]
    has_retrieval = any(math.isfinite(row.retrieval) for row in eval_rows.values())
    text = [
        "Contrastive loss in nats (training: mean of the last five log lines), for each organ. Chance is ln(patients "
        "contrasted): what a model gets that cannot tell patients apart. The floor is what a perfect one gets; it is "
        "not 0, because patients with equal or normal captions are positives of each other."
        + (" Retrieval@1 is how often the caption nearest to an organ's image is one of its own, in groups of the "
           "training's size, with what a guess would get in brackets." if has_retrieval else ""),
        "",
        "![Loss curves](loss_curves.png)",
        "",
    ]  # fmt: skip
    rows = []
    for organ in organs:
        row, held_out = train_rows.get(organ), eval_rows.get(organ)
        numbers = [f"{value:.3f}" for value in (row.loss, row.chance, row.floor)] if row else ["never active", "", ""]
        numbers += [f"{value:.3f}" for value in (held_out.loss, held_out.chance)] if held_out else ["", ""]
        if has_retrieval:
            is_known = held_out is not None and math.isfinite(held_out.retrieval)
            numbers.append(f"{held_out.retrieval:.2f} ({held_out.retrieval_chance:.2f})" if is_known else "")
        rows.append((organ, *numbers))
    retrieval = ["retrieval@1 (guess)"] * has_retrieval
    evaluation = ("evaluation loss", "its chance", *retrieval)
    return text + table(("organ", "training loss", "chance", "floor", *evaluation), rows)


def _alarms(alarms: Sequence[dict[str, Any]]) -> list[str]:
    """What the run said of organs that did not learn."""
    if not alarms:
        return []
    lines = []
    for alarm in alarms:
        since = ", ".join(f"{organ} (step {step:,})" for organ, step in alarm["learned_since"].items())
        kind = "Alarm" if alarm["is_alarm"] else "Note"
        lines.append(f"- {kind}: {alarm['text']}" + (f" Below chance since: {since}." if since else ""))
    return ["### Organs that did not learn", "", "As the run said while it went on:", "", *lines, ""]


def _zero_shot(metrics: dict[str, float]) -> list[str]:
    scores = {name.removeprefix("eval_"): value for name, value in metrics.items() if name.endswith("macro_auc")}
    if not scores:
        return []
    lines = [f"{name}: {value:.3f} on the evaluation split." for name, value in scores.items()]
    return ["### Zero-shot", "", *lines, ""]
