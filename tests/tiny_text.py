"""Text encoders of a few thousand weights, in the folders that BERT's descendants come in."""

import json
from pathlib import Path

import torch
from tiny_scan import tiny_tokenizer
from transformers import BertConfig, BertForMaskedLM, BertModel

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
SIZES |= {"vocab_size": 19, "max_position_embeddings": 64, "hidden_dropout_prob": 0.0, "layer_norm_eps": 1e-12}


def random_bert(model_class=BertModel, **changes):
    """A BERT whose every weight is random, token types included."""
    torch.manual_seed(1)
    model = model_class(BertConfig(**{**SIZES, **changes})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model


def save_cxr_bert(folder: Path, extra: dict | None = None, without: tuple[str, ...] = (), **fields) -> BertModel:
    """Write a folder as CXR-BERT's and BioViL-T's: their own model type and code, `bert.*` and heads in a pickle.

    Args:
        folder: Made here.
        extra, without: Weights to add and to leave out, by name.
        fields: Further fields of config.json.

    Returns:
        The encoder inside.
    """
    folder.mkdir()
    model = random_bert(BertForMaskedLM)
    weights = dict(model.state_dict())
    weights["bert.embeddings.position_ids"] = torch.arange(64)[None]
    weights["cls_projection_head.dense_to_hidden.weight"] = torch.ones(8, 16)
    weights["cls_projection_head.LayerNorm.bias"] = torch.ones(8)
    weights |= extra or {}
    torch.save({name: t for name, t in weights.items() if name not in without}, folder / "pytorch_model.bin")
    auto_map = {"AutoConfig": "configuration_cxrbert.CXRBertConfig", "AutoModel": "modeling_cxrbert.CXRBertModel"}
    config = {"model_type": "cxr-bert", "architectures": ["CXRBertModel"], "auto_map": auto_map}
    config |= {"projection_size": 8, "torch_dtype": "float32", "pad_token_id": 0, **SIZES, **fields}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "configuration_cxrbert.py").write_text("raise RuntimeError('remote code was run')\n")
    (folder / "modeling_cxrbert.py").write_text("raise RuntimeError('remote code was run')\n")
    words = sorted(tiny_tokenizer().get_vocab().items(), key=lambda item: item[1])
    (folder / "vocab.txt").write_text("\n".join(word for word, _ in words))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "CXRBertTokenizer", "do_lower_case": True})
    )
    return model.bert
