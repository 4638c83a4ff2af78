"""Zero-shot scores: how much closer an organ's embedding lies to "there is X" than to "there is no X".

For a finding of organ o, with unit-length embeddings and the model's temperature t (Shui et al., ICLR 2025):

    score = mean over prompt pairs i of softmax([v_o . n_i, v_o . p_i] / t)[1]

Each pair's own probability is kept beside it, that of a set's paraphrases too: wording.py tells how far they disagree.

(1) Every sentence of every task is embedded once (prompts.py). (2) The image tower runs once over the split
(embedding.py). (3) Scores are then a product of two small matrices. A scan whose organ is absent gets NO score, never a
zero; a scan whose label is unknown keeps its score and has no label. Both stay in the table and are counted by
metrics.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from evaluation_fvlm.embedding import SplitEmbeddings, embed_split
from evaluation_fvlm.errors import EvaluationError
from evaluation_fvlm.prompts import embed_prompts
from evaluation_fvlm.tasks import Item, Task, check_task_labels, check_task_organs
from evaluation_fvlm.windows import WindowRule

SCORE_COLUMNS = [
    "task", "patient_id", "scan_id", "recon_id", "finding", "organ", "score", "label", "is_complete"
]  # fmt: skip


@dataclass
class ZeroShotScores:
    """The scores of a split and what they were made from.

    `frame` has one row per task, scan and finding (`SCORE_COLUMNS`): `score` is a probability, NaN where the organ is
    absent; `label` is 1.0 or 0.0, NaN where the split does not know; `is_complete` is False where the organ is absent
    or touches the border of the stored volume.
    """

    frame: pd.DataFrame
    tasks: list[Task]
    embeddings: SplitEmbeddings
    logit_scale: float
    unlabelled: dict[str, list[str]]  # task -> its findings that no scan of the split has a label for
    prompts_are_cached: bool = False  # their embeddings were read from a cache, not computed
    # (task, finding) -> (scans, wordings), the probability of every pair of `Item.wordings`; NaN as in `frame`.
    by_wording: dict[tuple[str, str], np.ndarray] = field(default_factory=dict)
    prompt_embeds: dict[str, np.ndarray] = field(default_factory=dict)  # sentence -> (dim,)

    @property
    def seconds(self) -> float:
        return self.embeddings.seconds


def evaluate_split(
    model: PreTrainedModel,
    processor: ProcessorMixin | PreTrainedTokenizerBase,
    dataset: Dataset,
    tasks: Sequence[Task],
    *,
    batch_size: int = 4,
    rule: WindowRule | None = None,
    num_workers: int = 1,
    dtype: torch.dtype | None = None,
    progress: bool = False,
    prompt_cache: Path | None = None,
    every_organ: bool = False,
    with_volume: bool = False,
    with_mean_pooling: bool = False,
) -> ZeroShotScores:
    """Score every finding of every task on every row of a processed split.

    Args:
        model: An `FVLMModel` (unwrapped), on the device to use; its mode is restored.
        processor: An `FVLMProcessor`, or only its tokenizer.
        dataset: Rows to score, already narrowed by `split.select_scans`.
        tasks: Prompt sets from `tasks.load_task`.
        batch_size, rule, num_workers, dtype, progress: As for `embedding.embed_split`.
        prompt_cache: Folder of prompt embeddings, see `prompts.embed_prompts`. None, the default, keeps none: during
            training every evaluation has weights of its own.
        every_organ: Embed the organs that no task asks for as well; only with shared windows does it move scores.
        with_volume, with_mean_pooling: As for `embedding.embed_split`.

    Raises:
        EvaluationError: Before any forward, if a task asks for an organ the model lacks, or the split labels none of
            its findings; and as `embed_split` does.
    """
    for task in tasks:
        check_task_organs(task, model.config.organs)
    findings = {label["finding"] for labels in dataset["labels"] for label in labels or []}
    unlabelled = {task.name: check_task_labels(task, findings) for task in tasks}
    asked = {item.organ for task in tasks for item in task.items}
    organs = [organ for organ in model.config.organs if every_organ or organ in asked]
    tokenizer = getattr(processor, "tokenizer", processor)
    prompts = list(dict.fromkeys(prompt for task in tasks for prompt in task.prompts))
    prompt_embeds = embed_prompts(model, tokenizer, prompts, dtype=dtype, cache=prompt_cache)  # (1)
    embeddings = embed_split(  # (2)
        model,
        dataset,
        organs=organs,
        rule=rule,
        batch_size=batch_size,
        num_workers=num_workers,
        dtype=dtype,
        progress=progress,
        with_volume=with_volume,
        with_mean_pooling=with_mean_pooling,
    )
    logit_scale = 1.0 / model.temperature.value.item()  # as it stands: it is put into its limits in training only
    if not np.isfinite(logit_scale):
        raise EvaluationError(f"the model's temperature {model.temperature.value.item()} makes no finite score.")
    frames = [score_task(task, embeddings, prompt_embeds.by_prompt, logit_scale) for task in tasks]  # (3)
    return ZeroShotScores(
        frame=pd.concat(frames, ignore_index=True),
        tasks=list(tasks),
        embeddings=embeddings,
        logit_scale=logit_scale,
        unlabelled=unlabelled,
        prompts_are_cached=prompt_embeds.are_cached,
        by_wording={
            (task.name, item.finding): score_wordings(item, embeddings, prompt_embeds.by_prompt, logit_scale)
            for task in tasks
            for item in task.items
        },
        prompt_embeds=prompt_embeds.by_prompt,
    )


def pair_probability(
    image_embeds: np.ndarray, positive: np.ndarray, negative: np.ndarray, logit_scale: float
) -> np.ndarray:
    """Probability of the finding per scan, `(scans,)`: the mean of `pair_probabilities` over the pairs."""
    return pair_probabilities(image_embeds, positive, negative, logit_scale).mean(axis=1)


def pair_probabilities(
    image_embeds: np.ndarray, positive: np.ndarray, negative: np.ndarray, logit_scale: float
) -> np.ndarray:
    """Probability of the finding per scan and pair, `(scans, pairs)`: a softmax over (negative, positive).

    Args:
        image_embeds: `(scans, dim)`, one organ.
        positive, negative: `(pairs, dim)` prompt embeddings.
        logit_scale: 1 / temperature.
    """
    # A softmax over two logits is the logistic function of their difference; tanh does not overflow.
    direction = (positive - negative).astype(np.float64)  # (pairs, dim)
    margin = logit_scale * image_embeds.astype(np.float64) @ direction.T  # (scans, pairs)
    return 0.5 * (1.0 + np.tanh(0.5 * margin))


def score_wordings(
    item: Item, embeddings: SplitEmbeddings, prompt_embeds: dict[str, np.ndarray], logit_scale: float
) -> np.ndarray:
    """What every pair of `item.wordings` says alone, `(scans, wordings)`; NaN where the organ is absent."""
    organ_index = embeddings.organs.index(item.organ)
    positive, negative = (np.stack([prompt_embeds[text] for text in texts]) for texts in zip(*item.wordings))
    scores = pair_probabilities(embeddings.image_embeds[:, organ_index], positive, negative, logit_scale)
    return np.where(embeddings.is_present[:, organ_index, None], scores, np.nan)


def score_task(
    task: Task, embeddings: SplitEmbeddings, prompt_embeds: dict[str, np.ndarray], logit_scale: float
) -> pd.DataFrame:
    """The rows of one task in a `ZeroShotScores.frame`, findings in the task's order, scans in the split's."""
    parts = []
    for item in task.items:
        organ_index = embeddings.organs.index(item.organ)
        score = pair_probability(
            embeddings.image_embeds[:, organ_index],
            np.stack([prompt_embeds[text] for text in item.positive]),
            np.stack([prompt_embeds[text] for text in item.negative]),
            logit_scale,
        )
        known = [labels.get(item.finding, -1) for labels in embeddings.labels]
        part = embeddings.scans.copy()
        part["task"] = task.name
        part["finding"] = item.finding
        part["organ"] = item.organ
        part["score"] = np.where(embeddings.is_present[:, organ_index], score, np.nan)
        part["label"] = [float(value) if value in (0, 1) else np.nan for value in known]
        part["is_complete"] = embeddings.is_complete[:, organ_index]
        parts.append(part[SCORE_COLUMNS])
    return pd.concat(parts, ignore_index=True)
