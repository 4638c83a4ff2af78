"""Pretrained text encoders load whole, in every layout they are published in, and run no code of theirs."""

import json
import os

import pytest
import torch
from tiny_scan import tiny_config, tiny_tokenizer
from tiny_text import random_bert, save_cxr_bert
from transformers import BertForMaskedLM, BertModel, DistilBertConfig, DistilBertModel

from modeling_fvlm import FVLMModel
from training_fvlm.arguments import SettingsError
from training_fvlm.text import check_vocabulary, load_text_encoder, put_text_encoder, read_text_encoder

SENTENCES = ["No lung nodule.", "Heart.", "Emphysema shows no significant abnormalities."]


def embed(model, tokenizer):
    encoded = tokenizer(SENTENCES, padding=True, return_tensors="pt", return_token_type_ids=False)
    with torch.no_grad():
        return model.eval()(**encoded).last_hidden_state


def save_bert(folder):
    model = random_bert(BertModel)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return model


def save_masked_lm(folder):
    model = random_bert(BertForMaskedLM)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return model.bert


def save_distilbert(folder):
    torch.manual_seed(2)
    model = DistilBertModel(DistilBertConfig(vocab_size=19, dim=16, n_layers=1, n_heads=2, hidden_dim=32))
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return model.eval()


HEAD = {"cls.predictions.bias", "cls.predictions.transform.dense.weight", "cls.predictions.transform.dense.bias"}
HEAD |= {"cls.predictions.transform.LayerNorm.weight", "cls.predictions.transform.LayerNorm.bias"}
PROJECTION = {"cls_projection_head.LayerNorm.bias", "cls_projection_head.dense_to_hidden.weight"}
LAYOUTS = {
    "cxr_bert": (save_cxr_bert, HEAD | PROJECTION),
    "bert": (save_bert, {"pooler.dense.weight", "pooler.dense.bias"}),
    "masked_lm": (save_masked_lm, HEAD),
    "distilbert": (save_distilbert, set()),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("token_types", [True, False])
def test_an_encoder_loads_whole_and_embeds_as_its_makers_did(layout, token_types, tmp_path):
    save, left_behind = LAYOUTS[layout]
    original = save(tmp_path / "encoder")
    text = read_text_encoder(str(tmp_path / "encoder"))
    assert left_behind <= set(text.left_behind) and bool(left_behind) == bool(text.left_behind)
    ours = text.model.state_dict()
    assert ours and all(torch.equal(tensor, original.state_dict()[name]) for name, tensor in ours.items())
    unused = original.state_dict().keys() - ours.keys()
    assert all(name.startswith("pooler.") for name in unused)
    tokenizer, model = load_text_encoder(str(tmp_path / "encoder"), None)
    assert tokenizer("Lung NODULE.")["input_ids"] == tiny_tokenizer()("Lung nodule.")["input_ids"]
    torch.testing.assert_close(embed(model, tokenizer), embed(original, tiny_tokenizer()), rtol=0, atol=1e-6)

    config = tiny_config(text_config=model.config.to_dict(), text_token_types=token_types)
    fvlm = FVLMModel(config)
    put_text_encoder(fvlm.text_model, model)
    if not token_types and layout != "distilbert":
        with torch.no_grad():
            original.embeddings.token_type_embeddings.weight.zero_()
    torch.testing.assert_close(embed(fvlm.text_model, tokenizer), embed(original, tokenizer), rtol=0, atol=1e-6)


def test_what_is_not_whole_is_refused(tmp_path):
    key = "bert.encoder.layer.1.attention.self.key.weight"
    save_cxr_bert(tmp_path / "missing", without=(key,))
    with pytest.raises(SettingsError, match=f"no weights for {key.removeprefix('bert.')}"):
        read_text_encoder(str(tmp_path / "missing"))
    save_cxr_bert(tmp_path / "deeper", extra={"bert.encoder.layer.2.output.dense.bias": torch.ones(16)})
    with pytest.raises(SettingsError, match="encoder does not: bert.encoder.layer.2.output.dense.bias"):
        read_text_encoder(str(tmp_path / "deeper"))
    save_cxr_bert(tmp_path / "misshapen", extra={key: torch.ones(16, 15)})
    with pytest.raises(SettingsError, match="misshapen cannot be loaded|are of another shape"):
        read_text_encoder(str(tmp_path / "misshapen"))
    save_cxr_bert(tmp_path / "small", vocab_size=19)
    with open(tmp_path / "small" / "vocab.txt", "a") as file:
        file.write("\nextra")
    with pytest.raises(SettingsError, match="its tokenizer has 20 tokens, its word embeddings 19 rows"):
        read_text_encoder(str(tmp_path / "small"))


def test_layers_beyond_the_config_are_not_lost_where_names_have_no_prefix(tmp_path):
    random_bert(BertModel, num_hidden_layers=3).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 2}))
    with pytest.raises(SettingsError, match="encoder does not: encoder.layer.2.attention.output.LayerNorm.bias"):
        read_text_encoder(str(tmp_path))


def test_an_encoder_without_its_vocabulary_is_refused(tmp_path):
    save_cxr_bert(tmp_path / "cxr")
    (tmp_path / "cxr" / "vocab.txt").unlink()
    random_bert(BertModel).save_pretrained(tmp_path / "bert")
    for name in ("cxr", "bert"):
        with pytest.raises(SettingsError, match=f"{name}: there is no vocabulary there, only 5 special tokens"):
            read_text_encoder(str(tmp_path / name))
    save_cxr_bert(tmp_path / "padded", vocab_size=19)
    tokenizer = read_text_encoder(str(tmp_path / "padded")).tokenizer
    check_vocabulary(tokenizer, "here", 128)  # a table padded for speed
    with pytest.raises(SettingsError, match="here: its tokenizer has 19 tokens, its word embeddings 129 rows"):
        check_vocabulary(tokenizer, "here", 129)


def test_broken_configs_and_tokenizers_are_named(tmp_path):
    save_bert(tmp_path)
    tokenizer, config = (tmp_path / name for name in ("tokenizer.json", "config.json"))
    for file, words in (
        (tokenizer, '{"model": {"type": "of tomorrow"}}'),
        (config, json.dumps(json.loads(config.read_text()) | {"num_attention_heads": "two"})),
        (config, "[]"),
    ):
        before = file.read_text()
        file.write_text(words)
        with pytest.raises(SettingsError, match="cannot be loaded: "):
            read_text_encoder(str(tmp_path))
        file.write_text(before)
    read_text_encoder(str(tmp_path))


def test_an_unknown_model_type_that_is_no_bert_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llm-of-tomorrow", "hidden_size": 16}')
    with pytest.raises(SettingsError, match="does not know the model type 'llm-of-tomorrow'.*no vocab_size, num_hid"):
        read_text_encoder(str(tmp_path))
    with pytest.raises(SettingsError, match="text encoder .*nowhere cannot be loaded"):
        read_text_encoder(str(tmp_path / "nowhere"))


class Hostile:
    def __reduce__(self):
        return os.mkdir, ("code_was_run",)


def test_no_code_is_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_cxr_bert(tmp_path / "hostile", extra={"cls.predictions.bias": Hostile()})
    with pytest.raises(SettingsError, match="a pickle that would run code|cannot be loaded"):
        read_text_encoder(str(tmp_path / "hostile"))
    save_cxr_bert(tmp_path / "cut")
    weights = tmp_path / "cut" / "pytorch_model.bin"
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(SettingsError, match="cut cannot be loaded"):
        read_text_encoder(str(tmp_path / "cut"))
    assert not (tmp_path / "code_was_run").exists()
