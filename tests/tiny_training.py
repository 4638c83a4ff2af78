"""A model of a few thousand weights and its trainer, for tests of training."""

import datasets
import torch
from tiny_split import MARGIN, ORGANS, SIZE, SPACING, tiny_row
from transformers import set_seed

from modeling_fvlm import FVLMConfig, FVLMModel, FVLMProcessor
from training_fvlm.arguments import FVLMTrainingArguments
from training_fvlm.co_teaching import PeerTrainer, peer_arguments, peer_collator
from training_fvlm.collator import FVLMCollator, objective_options
from training_fvlm.data import ProcessedSplit
from training_fvlm.text import text_config_from_scratch, train_tokenizer
from training_fvlm.trainer import FVLMTrainer

WINDOWS = (
    {"hu_min": -1150, "hu_max": 350, "mean": 0.6, "std": 0.2},
    {"hu_min": 0, "hu_max": 1000, "mean": 0, "std": 0.3},
)


def forward_batch(batch: dict) -> dict:
    """A batch of the collator without what only the trainer reads."""
    return {name: value for name, value in batch.items() if name not in ("row", "text_hash", "organ_state")}


def dataset_of(rows: list[dict], caption_rows=None) -> ProcessedSplit:
    """Rows as a split in memory."""
    return ProcessedSplit(datasets.Dataset.from_list(rows), caption_rows)


def tiny_model(
    rows: list[dict], *, seed: int = 0, dropout: float = 0.0, text_dropout: float | None = None, **fields
) -> tuple[FVLMModel, FVLMProcessor]:
    """Model and processor for `tiny_split`'s organs; `fields` are further ones of the config."""
    tokenizer = train_tokenizer([entry["caption"] for row in rows for entry in row["captions"]], 150, 24)
    text = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    text |= {
        "hidden_dropout_prob": dropout if text_dropout is None else text_dropout,
        "attention_probs_dropout_prob": 0.0,
    }
    vision = {"volume_size": SIZE, "patch_size": (2, 4, 8), "num_channels": len(WINDOWS), "hidden_size": 16}
    vision |= {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "feature_levels": [0]}
    vision |= {"hidden_dropout": dropout, "attention_dropout": 0.0, "token_selection": "organs"}
    config = FVLMConfig(
        vision_config=vision,
        text_config=text_config_from_scratch(text, tokenizer, 24),
        **{"organs": list(ORGANS), "spacing": SPACING, "margin_voxels": MARGIN, "windows": list(WINDOWS)},
        **{"projection_dim": 8, "pooling_num_heads": 2, "pooling_dropout": dropout, "text_pooling": "mean"},
        **{"max_text_length": 24, "organ_reduction": "mean", **fields},
    )
    set_seed(seed)
    model = FVLMModel(config)
    with torch.no_grad():  # fresh organ queries are zero, and so would be the gradient of the key weights
        model.organ_pooling.query_tokens.normal_(std=0.5, generator=torch.Generator().manual_seed(seed))
    return model, FVLMProcessor.from_config(config, tokenizer)


def tiny_trainer(
    output_dir,
    rows: list[dict],
    *,
    eval_rows: list[dict] | None = None,
    caption_rows=None,
    is_random: bool = True,
    dropout: float = 0.0,
    text_dropout: float | None = None,
    fields: dict | None = None,
    zero_shot=None,
    callbacks=None,
    finding_task=None,
    **arguments,
) -> FVLMTrainer:
    """A trainer over `rows`; `fields` go to the model's config, `arguments` to the training arguments."""
    model, processor = tiny_model(rows, dropout=dropout, text_dropout=text_dropout, **(fields or {}))
    defaults = {"per_device_train_batch_size": 4, "per_device_eval_batch_size": 3, "max_steps": 2, "logging_steps": 1}
    defaults |= {"learning_rate": 2e-3, "save_strategy": "no", "use_cpu": True, "disable_tqdm": True, "seed": 0}
    defaults |= {"logging_first_step": False}
    args = FVLMTrainingArguments(output_dir=str(output_dir), **(defaults | arguments))
    dataset = dataset_of(rows, caption_rows)
    options = objective_options(args, model.config, finding_task)
    collator = FVLMCollator(processor.tokenizer, model.config, is_random=is_random, **options)
    peer = None
    if args.uses("co_teaching"):
        of_peer = peer_arguments(args)
        second, _ = tiny_model(rows, seed=of_peer.seed, dropout=dropout, text_dropout=text_dropout, **(fields or {}))
        peer = PeerTrainer(
            second,
            of_peer,
            train_dataset=dataset,
            train_collator=peer_collator(collator, of_peer),
            label_task=finding_task,
        )
    return FVLMTrainer(
        model,
        args,
        train_dataset=dataset,
        train_collator=collator,
        eval_dataset=None if eval_rows is None else dataset_of(eval_rows),
        eval_collator=FVLMCollator(processor.tokenizer, model.config, is_random=False),
        processor=processor,
        zero_shot=zero_shot,
        callbacks=callbacks,
        label_task=finding_task,
        peer=peer,
    )


def tiny_rows(count: int, seed: int = 0) -> list[dict]:
    """So many patients."""
    return [tiny_row(number, seed=seed) for number in range(count)]
