"""The text side of a new model: a tokenizer learned from the captions, or a pretrained encoder with its own."""

from collections import Counter
from collections.abc import Iterable
from typing import Any

from transformers import AutoModel, AutoTokenizer, BertTokenizerFast, PreTrainedModel, PreTrainedTokenizerBase

from .arguments import SettingsError

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


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


def load_text_encoder(name: str, revision: str | None) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    """Tokenizer and weights of a pretrained text encoder, a folder or a Hub id; safetensors only, never a pickle.

    Raises:
        SettingsError: If there are none.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision)
        return tokenizer, AutoModel.from_pretrained(name, revision=revision, use_safetensors=True)
    except OSError as error:
        raise SettingsError(f"model.text_encoder.pretrained {name} cannot be loaded: {error}") from error


def put_text_encoder(text_model: PreTrainedModel, pretrained: PreTrainedModel) -> None:
    """Copy pretrained weights into the model's text encoder.

    Raises:
        ValueError: If some weight of `text_model` has no pretrained value; extra ones (a pooler) are left out.
    """
    missing = text_model.load_state_dict(pretrained.state_dict(), strict=False).missing_keys
    if missing:
        raise ValueError(f"the pretrained text encoder lacks {len(missing)} weights, among them {missing[:3]}.")
