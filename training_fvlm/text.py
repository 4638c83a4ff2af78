"""The text side of a new model: a tokenizer learned from the captions, or a pretrained encoder with its own."""

import inspect
import pickle
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModel,
    AutoTokenizer,
    BertConfig,
    BertTokenizerFast,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from .arguments import SettingsError
from .checkpoint_file import listed

logger = logging.get_logger(__name__)
SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
# A config that has these describes a BERT, whatever its model type is called.
BERT_SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
# Parts of a saved encoder that no caption reads.
UNREAD_OF_ENCODER = ("pooler.", "embeddings.position_ids", "embeddings.token_type_ids")
# Embedding tables are padded up to a multiple of this, for speed; rows beyond that belong to tokens that are missing.
VOCABULARY_PADDING = 128


def train_tokenizer(texts: Iterable[str], vocab_size: int, max_length: int) -> PreTrainedTokenizerBase:
    """Learn a lower-case WordPiece vocabulary, the same one for the same texts on every run and every rank.

    Args:
        texts: Training captions; repeated ones count as often as they come.
        vocab_size: Word pieces, special tokens and single characters included.
        max_length: Longest caption in tokens, written into the tokenizer.

    Returns:
        A BERT tokenizer ([CLS] caption [SEP]).
    """
    from tokenizers import Tokenizer
    from tokenizers.models import WordPiece
    from tokenizers.normalizers import BertNormalizer
    from tokenizers.pre_tokenizers import BertPreTokenizer
    from tokenizers.trainers import WordPieceTrainer

    counts = Counter(texts)
    tokenizer = Tokenizer(WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = BertPreTokenizer()
    words = [
        word
        for text in counts
        for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(tokenizer.normalizer.normalize_str(text))
    ]
    # The trainer numbers characters in the order of a hash table that differs from process to process, and breaks ties
    # between equally frequent pairs by those numbers. Given as special tokens they are numbered before it starts.
    characters = sorted({character for word in words for character in word})
    reserved = [*SPECIAL_TOKENS, *characters, *(f"##{character}" for character in characters)]
    trainer = WordPieceTrainer(
        vocab_size=max(vocab_size, len(reserved)), special_tokens=reserved, show_progress=False, min_frequency=2
    )
    tokenizer.train_from_iterator((text for text in sorted(counts) for _ in range(counts[text])), trainer)
    return BertTokenizerFast(vocab=tokenizer.get_vocab(), do_lower_case=True, model_max_length=max_length)


def text_config_from_scratch(
    fields: dict[str, Any], tokenizer: PreTrainedTokenizerBase, max_text_length: int
) -> dict[str, Any]:
    """Fields of a fresh text encoder's config: the recipe's, fitted to the tokenizer and the longest caption."""
    return {
        "model_type": "bert",
        "max_position_embeddings": max_text_length,
        **fields,
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.cls_token_id,
        "eos_token_id": tokenizer.sep_token_id,
    }


@dataclass(frozen=True)
class PretrainedText:
    """A text encoder as its makers left it.

    Attributes:
        tokenizer: Its tokenizer.
        model: The encoder, without pooler and heads.
        left_behind: Weights of the checkpoint that the encoder does not have: pooler, language-model and other heads.
            (The constant `position_ids` of older releases is passed over by transformers and not listed.)
    """

    tokenizer: PreTrainedTokenizerBase
    model: PreTrainedModel
    left_behind: list[str]


def load_text_encoder(name: str, revision: str | None) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    """Tokenizer and weights of a pretrained text encoder; see `read_text_encoder`."""
    text = read_text_encoder(name, revision)
    if text.left_behind:
        logger.info("%s: not read by any caption: %s", name, ", ".join(text.left_behind))
    return text.tokenizer, text.model


def read_text_encoder(name: str, revision: str | None = None) -> PretrainedText:
    """Load a pretrained text encoder, a folder or a Hub id, whole: no weight is missing, none of its own is left out.

    Any encoder that transformers knows. One of another model type is taken as a BERT, if config and weights are a
    BERT's: microsoft/BiomedVLP-CXR-BERT-specialized and microsoft/BiomedVLP-BioViL-T are BERTs under the type
    "cxr-bert" (their extra heads serve joint training on X-rays). No code of the repository is run, and a pickle may
    hold tensors only.

    Raises:
        SettingsError: If there is no such encoder, some weight of it is missing or of another shape, or its tokenizer
            is not that of its weights.
    """
    where = f"text encoder {name}"
    try:
        config, is_known = _read_config(name, revision, where)
        if is_known:
            tokenizer = AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=False)
        else:
            tokenizer = BertTokenizerFast.from_pretrained(name, revision=revision)
        model_class = AutoModel._model_mapping[type(config)]
        has_pooler = "add_pooling_layer" in inspect.signature(model_class).parameters
        model, loading = model_class.from_pretrained(
            name,
            revision=revision,
            config=config,
            dtype=torch.float32,
            output_loading_info=True,
            **({"add_pooling_layer": False} if has_pooler else {}),
        )
    except SettingsError:
        raise
    except Exception as error:
        raise _not_loaded(where, error) from error

    if missing := sorted(loading["missing_keys"]):
        raise SettingsError(
            f"{where} has no weights for {listed(missing)}: it is no whole {config.model_type} encoder."
        )
    left_behind = sorted(loading["unexpected_keys"])
    # Saved under the encoder's prefix, or without one under the names of its parts.
    base = f"{model.base_model_prefix}."
    starts = (base, *(f"{part}." for part, _ in model.named_children()))
    own = [
        key
        for key in left_behind
        if key.startswith(starts) and not key.removeprefix(base).startswith(UNREAD_OF_ENCODER)
    ]
    if own:
        raise SettingsError(f"{where} has weights that a {config.model_type} encoder does not: {listed(own)}.")
    check_vocabulary(tokenizer, where, config.vocab_size)
    return PretrainedText(tokenizer, model, left_behind)


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, where: str, num_rows: int | None = None) -> None:
    """Refuse a tokenizer without words: where its files are missing, transformers makes one of special tokens alone.

    Args:
        tokenizer: As loaded.
        where: Begins the message: the option, and the folder or Hub id the tokenizer is from.
        num_rows: Word embeddings of the encoder it belongs to; None: not known here.

    Raises:
        SettingsError: If it has only special tokens, more tokens than rows, or fewer by more than padding explains.
    """
    num_tokens = len(tokenizer)
    if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):
        raise SettingsError(
            f"{where}: there is no vocabulary there, only {num_tokens} special tokens. Put tokenizer.json or vocab.txt "
            "beside it, as its makers published them."
        )
    if num_rows is not None and not num_tokens <= num_rows <= num_tokens + -num_tokens % VOCABULARY_PADDING:
        raise SettingsError(
            f"{where}: its tokenizer has {num_tokens} tokens, its word embeddings {num_rows} rows. Put the tokenizer "
            "of these weights there."
        )


def read_text_config(name: str, revision: str | None = None) -> PreTrainedConfig:
    """The config of what `read_text_encoder` loads.

    Raises:
        SettingsError: If there is none, or it is not that of a text encoder.
    """
    where = f"text encoder {name}"
    try:
        return _read_config(name, revision, where)[0]
    except SettingsError:
        raise
    except Exception as error:
        raise _not_loaded(where, error) from error


def _read_config(name: str, revision: str | None, where: str) -> tuple[PreTrainedConfig, bool]:
    """A text encoder's config, and whether transformers knows its model type; as a BERT's if not."""
    fields, _ = PreTrainedConfig.get_config_dict(name, revision=revision)
    if not fields:
        raise SettingsError(f"{where} cannot be loaded: there is no config.json.")
    if fields.get("model_type") in CONFIG_MAPPING:
        return AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=False), True
    return _bert_config(fields, where), False


def _not_loaded(where: str, error: Exception) -> SettingsError:
    """The message for an error of any kind: strict dataclasses, tokenizers and safetensors raise their own."""
    reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
    if isinstance(error, pickle.UnpicklingError):
        reason = "its weights are a damaged file, or a pickle that would run code"
    return SettingsError(f"{where} cannot be loaded: {reason}")


def _bert_config(fields: dict[str, Any], where: str) -> BertConfig:
    """A BERT's config from one of a derived type: the fields a BERT has."""
    if missing := [field for field in BERT_SIZES if field not in fields]:
        raise SettingsError(
            f"{where}: transformers does not know the model type {fields.get('model_type')!r}, and its config is not "
            f"that of a BERT: it has no {listed(missing)}."
        )
    known = set(BertConfig().to_dict()) - {"model_type", "architectures", "transformers_version", "dtype"}
    return BertConfig(**{field: value for field, value in fields.items() if field in known})


def put_text_encoder(text_model: PreTrainedModel, pretrained: PreTrainedModel) -> None:
    """Copy pretrained weights into the model's text encoder.

    Raises:
        ValueError: If some weight of `text_model` has no pretrained value; extra ones (a pooler) are left out.
    """
    missing = text_model.load_state_dict(pretrained.state_dict(), strict=False).missing_keys
    if missing:
        raise ValueError(f"the pretrained text encoder lacks {len(missing)} weights, among them {missing[:3]}.")
