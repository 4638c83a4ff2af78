"""Text embeddings of the prompts, once per run, and once per model where a cache is given.

(1) Sentences are tokenised, in batches of similar length.
(2) With a cache the batches' embeddings are looked up under a key of everything that makes them.
(3) What is not found is embedded, checked to be finite, and stored.

The key is a 128-bit hash (xxh3) of the bytes of the text tower's weights, of the token ids and their masks, and of
dtype, device kind, GEMM backend, precision settings, text config and library versions. Tokenizer, sentences and maximum
length enter through the ids, which are all that the tower sees of them. So weights that were trained on make another
key. Adapters (peft) are switched without a change of weights: a model that carries them is not cached. Hashing a
BERT-base (440 MB) took 0.03 s of CPU time where embedding 32 prompts took 1.7 s.

On a GPU the weights would have to come back to the host for that, while the embedding takes a moment: the command
uses a cache there only where one is asked for.
"""

from __future__ import annotations

import json
import logging
import os
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import transformers
import xxhash
from huggingface_hub import constants
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from transformers import BatchEncoding, PreTrainedModel, PreTrainedTokenizerBase

from evaluation_fvlm.embedding import inference
from evaluation_fvlm.errors import EvaluationError
from modeling_fvlm.gemm import active_gemm_backend

logger = logging.getLogger(__name__)

KEY_VERSION = 1  # up when the way from prompt to embedding changes here or in modeling_fvlm
TENSOR = "prompt_embeds"


@dataclass
class PromptEmbeddings:
    """`by_prompt`: `(dim,)` float32 of unit length for each prompt. `are_cached`: read from a file, not computed."""

    by_prompt: dict[str, np.ndarray]
    are_cached: bool


def default_cache() -> Path:
    """Where prompt embeddings are kept if no folder is named: in the home of the Hugging Face caches."""
    return Path(constants.HF_HOME) / "fvlm" / "prompts"


def embed_prompts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    batch_size: int = 64,
    dtype: torch.dtype | None = None,
    cache: Path | None = None,
) -> PromptEmbeddings:
    """Embed prompts.

    Args:
        model: An `FVLMModel`; its mode is restored.
        tokenizer: Of its processor.
        prompts: Different sentences.
        batch_size: Sentences per forward.
        dtype: Autocast to this.
        cache: Folder of the files that hold embeddings, one for each key; made if missing. None: neither read nor
            written. A file that cannot be read is computed anew, a folder that cannot be written to left alone, both
            with a warning.

    Raises:
        EvaluationError: If an embedding is not finite; names the prompt.
    """
    by_length = sorted(prompts, key=len)  # sentences of one batch are padded to its longest
    batches = [  # (1)
        tokenizer(
            by_length[start : start + batch_size],
            padding=True,
            truncation=True,
            max_length=model.config.max_text_length,
            return_tensors="pt",
        )
        for start in range(0, len(by_length), batch_size)
    ]
    if cache is not None and has_adapters(model):
        logger.warning("prompt embeddings are not kept: adapters switch on and off without a change of any weight.")
        cache = None
    path = None if cache is None else Path(cache) / f"{cache_key(model, batches, dtype)}.safetensors"  # (2)
    embeds = None if path is None else read_cached(path, (len(by_length), model.config.projection_dim))
    if embeds is not None:
        return PromptEmbeddings(dict(zip(by_length, embeds)), are_cached=True)

    with inference(model, dtype):  # (3)
        parts = [
            model.get_text_features(tokens["input_ids"].to(model.device), tokens["attention_mask"].to(model.device))
            for tokens in batches
        ]
        embeds = torch.cat(parts).float().cpu().numpy()  # (prompts, dim)
    for prompt, values in zip(by_length, embeds):
        if not np.isfinite(values).all():
            raise EvaluationError(
                f"the embedding of the prompt {prompt!r} is not finite. The weights may be those of a run that "
                "diverged; otherwise compute in float32."
            )
    if path is not None:
        write_cached(path, embeds)
    return PromptEmbeddings(dict(zip(by_length, embeds)), are_cached=False)


def has_adapters(model: PreTrainedModel) -> bool:
    """Whether the text tower carries adapters (peft), whose state no weight tells."""
    modules = [*model.text_model.modules(), *model.text_projection.modules()]
    return any(hasattr(module, "active_adapters") and hasattr(module, "base_layer") for module in modules)


def cache_key(model: PreTrainedModel, batches: Sequence[BatchEncoding], dtype: torch.dtype | None) -> str:
    """Name of what `model` says of these batches: 32 hexadecimal digits."""
    text_config = {key: value for key, value in model.config.text_config.to_dict().items() if key != "_name_or_path"}
    made_by = {
        "version": KEY_VERSION,
        "dtype": str(dtype),
        "device": model.device.type,
        "attention": model.text_model.config._attn_implementation,
        "text_config": text_config,
        "text_pooling": model.config.text_pooling,
        "text_token_types": model.config.text_token_types,
        "libraries": [torch.__version__, transformers.__version__],
        "gemm": active_gemm_backend(),
        # What lets float32 be computed in less: a run that was warned of it must not serve one that is clean.
        "precision": [
            torch.get_float32_matmul_precision(),
            torch.backends.mkldnn.fp32_precision,
            os.environ.get("ONEDNN_DEFAULT_FPMATH_MODE", ""),
            torch.backends.cuda.matmul.allow_tf32,
        ],
        "batches": [[tokens["input_ids"].tolist(), tokens["attention_mask"].tolist()] for tokens in batches],
    }
    digest = xxhash.xxh3_128(json.dumps(made_by, sort_keys=True, default=str).encode())
    for module in (model.text_model, model.text_projection):
        for name, tensor in module.state_dict().items():
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def read_cached(path: Path, shape: tuple[int, int]) -> np.ndarray | None:
    """The embeddings of a file, or None if there is none, or none that is whole."""
    try:
        if not path.is_file():
            return None
        with safe_open(path, framework="numpy") as file:
            embeds, content = file.get_tensor(TENSOR), (file.metadata() or {}).get("content")
    except (OSError, SafetensorError) as error:
        logger.warning("prompt embeddings %s cannot be read (%s): computed anew.", path, error)
        return None
    is_whole = embeds.shape == shape and embeds.dtype == np.float32 and content == _digest(embeds)
    if not is_whole or not np.isfinite(embeds).all():
        logger.warning("prompt embeddings %s are damaged: computed anew.", path)
        return None
    return embeds


def write_cached(path: Path, embeds: np.ndarray) -> None:
    """Store embeddings under a name of their own first: a reader, or a second writer, never meets half a file."""
    unfinished = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Not a temporary file of the library's, which nobody else may read: a cache may be shared.
        unfinished = path.with_name(f"{path.stem}.{uuid.uuid4().hex}.part")
        save_file({TENSOR: embeds}, unfinished, metadata={"content": _digest(embeds)})
        os.replace(unfinished, path)
    except (OSError, SafetensorError) as error:
        logger.warning("prompt embeddings cannot be kept in %s (%s); they are computed in every run.", path, error)
    finally:
        if unfinished is not None:  # not renamed
            unfinished.unlink(missing_ok=True)


def _digest(embeds: np.ndarray) -> str:
    return xxhash.xxh3_128(np.ascontiguousarray(embeds)).hexdigest()
