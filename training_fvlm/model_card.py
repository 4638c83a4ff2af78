"""README.md of a trained or converted model: where it comes from, how to feed it, and what it is not for.

Everything that preprocessing depends on is written from the config, so that card and weights cannot disagree.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from modeling_fvlm.configuration_fvlm import FVLMConfig
from modeling_fvlm.gemm import ONEDNN

from .organ_losses import OrganLossRow

LIMITS = "Research only, not for diagnosis."
PUBLISHED_CODE = "alibaba-damo-academy/fvlm, commit d768ec1"
METHOD = "Shui et al., ICLR 2025, https://openreview.net/forum?id=nYpPAT4L3D"
APACHE = ("license: apache-2.0",)
# Weights keep the licence they were published under, whatever was trained on top of them.
OF_THE_SOURCE = ("license: other", "license_name: that-of-the-source-weights")


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
    training = run["training"]
    started_from = [f"{what} `{name}`" for what, name in run["started_from"].items() if name is not None]
    card = [
        *opening(OF_THE_SOURCE if started_from else APACHE),
        f"A 3D vision-language model with {run['num_parameters']:,} parameters that compares each of "
        f"{len(config.organs)} organs of a CT with sentences about that organ. It was trained on pairs of an organ and "
        f"the caption a report gives it, without labels ({METHOD}).",
        "",
        *usage(),
        *preprocessing(config),
        "## Training",
        "",
        *table(
            ("what", "value"),
            [
                ("recipe", _recipe(run["recipe"])),
                ("started from", ", ".join(started_from) or "random weights"),
                *_organs(run.get("organs")),
                ("data", f"{run['data_name']}, splits by patient"),
                ("rows", ", ".join(f"{count:,} {split}" for split, count in run["data_rows"].items())),
                ("captions", "SHUFFLED between patients: a control" if run["data"]["shuffle_captions"] else "own"),
                ("flips", _flips(run["data"])),
                *_adapting(run.get("adapting"), training, run["num_parameters"]),
                ("steps", f"{run['steps']:,} of {run['group_size']} patients"),
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
        *([] if not started_from else [
            "The weights it started from keep their licence, and it applies to this folder too. Only the code beside "
            "them is Apache-2.0.",
            "",
        ]),
        "## Losses",
        "",
        *_loss_table(config.organs, train_rows, eval_rows),
        "",
        *_alarms(run.get("alarms") or []),
        *_zero_shot(final_metrics),
        "## Limits",
        "",
        f"{LIMITS} The model says how well an image agrees with a sentence, not what a patient has. It was "
        "trained on the data named above and knows no other scanners, populations, languages or wordings; the data is "
        "not part of this repository. It needs a segmentation of the organs, and an organ cut by the scan or by the "
        "crop is embedded from the part that is there. Scores are not calibrated probabilities.",
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
        *opening(OF_THE_SOURCE),
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


def opening(license_lines: Sequence[str]) -> list[str]:
    """What every card begins with: the front matter the Hub reads, the title, and what the model is not for."""
    return [
        "---",
        *license_lines,
        "library_name: transformers",
        "pipeline_tag: zero-shot-image-classification",
        "tags: [ct, radiology, vision-language, fvlm]",
        "---",
        "",
        "# fVLM: a CT volume and sentences, organ by organ",
        "",
        f"**{LIMITS}**",
        "",
    ]


def usage() -> list[str]:
    """The section that says how to load model and processor."""
    return [
        "## Use",
        "",
        "```python",
        "from transformers import AutoModel, AutoProcessor",
        "",
        'model = AutoModel.from_pretrained("PATH_OR_HUB_ID", trust_remote_code=True)',
        'processor = AutoProcessor.from_pretrained("PATH_OR_HUB_ID", trust_remote_code=True)',
        'inputs = processor(volumes=["ct.nii.gz"], masks=["totalsegmentator.nii.gz"])',
        "organs = model.get_organ_features(**inputs)",
        "organs.image_embeds  # (1, organs, projection_dim), unit length, in the order below",
        "```",
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
        return ["No log line was written: fewer steps than `logging_steps`."]
    text = [
        "Contrastive loss in nats at the end of training (mean of the last five log lines), for each organ. Chance is "
        "ln(patients contrasted): what a model gets that cannot tell patients apart. The floor is what a perfect one "
        "gets; it is not 0, because patients with equal or normal captions are positives of each other.",
        "",
        "![Loss curves](loss_curves.png)",
        "",
    ]
    rows = []
    for organ in organs:
        row, held_out = train_rows.get(organ), eval_rows.get(organ)
        numbers = [f"{value:.3f}" for value in (row.loss, row.chance, row.floor)] if row else ["never active", "", ""]
        rows.append((organ, *numbers, f"{held_out.loss:.3f}" if held_out else ""))
    return text + table(("organ", "training loss", "chance", "floor", "evaluation loss"), rows)


def _alarms(alarms: Sequence[dict[str, Any]]) -> list[str]:
    """What the run said of organs that did not learn."""
    if not alarms:
        return []
    lines = []
    for alarm in alarms:
        since = ", ".join(f"{organ} (step {step:,})" for organ, step in alarm["learned_since"].items())
        kind = "Alarm" if alarm["is_alarm"] else "Note"
        lines.append(f"- {kind}: {alarm['text']}" + (f" Below chance since: {since}." if since else ""))
    return ["## Organs that did not learn", "", "As the run said while it went on:", "", *lines, ""]


def _zero_shot(metrics: dict[str, float]) -> list[str]:
    scores = {name.removeprefix("eval_"): value for name, value in metrics.items() if name.endswith("macro_auc")}
    if not scores:
        return []
    lines = [f"{name}: {value:.3f} on the evaluation split." for name, value in scores.items()]
    return ["## Zero-shot", "", *lines, ""]
