"""Published checkpoints become folders of ours and go back, bit by bit; what is not understood is refused whole."""

import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from test_published_model import load_golden
from tiny_scan import WORDS, tiny_config, tiny_tokenizer, write_scan
from transformers import BertConfig

from modeling_fvlm import FVLMModel, FVLMProcessor
from training_fvlm import convert
from training_fvlm.checkpoint_file import CheckpointError, read_state_dict
from training_fvlm.published_weights import to_published_state_dict

VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
HEADS = ["--vision_heads", "2", "--text_heads", "2", "--pooling_heads", "2"]
SIZES = [*HEADS, "--feature_levels", "0", "--volume_size", "8", "12", "32", "--max_text_length", "24"]
LEFTOVERS = {
    "text_encoder.cls.predictions.decoder.weight": torch.ones(19, 16),
    "text_encoder.cls.predictions.bias": torch.ones(19),
    "text_encoder.pooler.dense.weight": torch.ones(16, 16),
    "text_encoder.embeddings.position_ids": torch.arange(64)[None],
    "text_encoder.embeddings.token_type_embeddings.weight": torch.ones(2, 16),
}


@pytest.fixture(scope="module")
def config():
    text = tiny_config().text_config.to_dict() | {"vocab_size": len(VOCABULARY), "layer_norm_eps": 1e-12}
    return tiny_config(text_config=text, text_token_types=False, spacing=(3.0, 1.0, 1.0), margin_voxels=(5, 20, 20))


@pytest.fixture(scope="module")
def published(config):
    """A tiny state dict under published names, every tensor random, with the leftovers real checkpoints carry."""
    torch.manual_seed(0)
    model = FVLMModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
        model.temperature.value.fill_(0.07)
    weights = {name: tensor.clone() for name, tensor in to_published_state_dict(model.state_dict()).items()}
    return weights | {name: tensor.clone() for name, tensor in LEFTOVERS.items()}


@pytest.fixture
def vocab(tmp_path):
    path = tmp_path / "vocab.txt"
    path.write_text("\n".join(VOCABULARY) + "\n")
    return path


def save_as_trainer(state_dict, path, **how):
    """As the published trainer saves: the weights beside much else."""
    optimizer = {"state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.zeros(4)}}, "param_groups": [{"lr": 1e-4}]}
    content = {"model": state_dict, "optimizer": optimizer, "config": {"run": {"seed": 42}}, "scaler": None, "epoch": 3}
    torch.save(content, path, **how)


FORMATS = {
    "trainer.pth": save_as_trainer,
    "old_format.pth": lambda weights, path: save_as_trainer(weights, path, _use_new_zipfile_serialization=False),
    "bare.pth": torch.save,
    "parallel.pth": lambda weights, path: save_as_trainer({f"module.{n}": t for n, t in weights.items()}, path),
    "plain.safetensors": save_file,
    "parallel.safetensors": lambda weights, path: save_file({f"module.{n}": t for n, t in weights.items()}, path),
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_folder_and_goes_back_bit_by_bit(name, config, published, vocab, tmp_path, capsys):
    source, out, back = tmp_path / name, tmp_path / "made" / "here", tmp_path / "back.safetensors"
    FORMATS[name](published, source)
    assert convert.main(["--weights", str(source), "--vocab", str(vocab), "--out", str(out), *SIZES]) == 0
    printed = capsys.readouterr().out
    assert all(leftover in printed for leftover in LEFTOVERS)

    model = FVLMModel.from_pretrained(out)
    ours = to_published_state_dict(model.state_dict())
    assert ours.keys() == published.keys() - LEFTOVERS.keys()
    assert all(torch.equal(tensor, published[name]) for name, tensor in ours.items())
    for field in ("vision_config", "text_config"):
        differing = {
            key: (value, getattr(config, field).to_dict()[key])
            for key, value in getattr(model.config, field).to_dict().items()
            if value != getattr(config, field).to_dict()[key] and key not in ("architectures", "dtype", "_name_or_path")
        }
        assert not differing
    for field in ("organs", "organ_classes", "projection_dim", "pooling_num_heads", "max_text_length", "windows"):
        assert getattr(model.config, field) == getattr(config, field), field
    assert model.config.text_token_types is False and model.config.spacing == [3.0, 1.0, 1.0]

    assert convert.main(["--back", str(out), "--out", str(back)]) == 2  # two blocks: no published depth
    assert "num_hidden_layers 2 (published: 12)" in capsys.readouterr().err and not back.exists()


def test_the_golden_weights_give_the_golden_loss_and_go_back_bit_by_bit(shared_dir, tmp_path):
    golden = load_golden(shared_dir / "golden", "tiny-train")
    texts = json.loads((shared_dir / "golden" / "tiny-train" / "texts.json").read_text())
    (tmp_path / "vocab.txt").write_text("\n".join(texts["vocab"]))
    source, out, back = tmp_path / "fvlm.pth", tmp_path / "model", tmp_path / "back.safetensors"
    save_as_trainer(golden.weights, source)
    heads = ["--vision_heads", "4", "--text_heads", "4", "--max_text_length", "48"]
    vocab = ["--vocab", str(tmp_path / "vocab.txt")]
    assert convert.main(["--weights", str(source), *vocab, "--out", str(out), *heads]) == 0
    model = FVLMModel.from_pretrained(out).eval()
    processor = FVLMProcessor.from_pretrained(out)
    captions = [
        dict(zip(golden.config.organs, row))
        for row in zip(*(texts["captions"][organ] for organ in golden.config.organs))
    ]
    encoded = processor(captions=captions)
    assert torch.equal(encoded["input_ids"], golden.inputs["input_ids"])
    with torch.no_grad():
        assert model(**golden.inputs).loss.item() == pytest.approx(golden.outputs["loss"], rel=1e-5)

    assert convert.main(["--back", str(out), "--out", str(back)]) == 0
    again = load_file(back)
    left = golden.weights.keys() - again.keys()
    assert left == {name for name in golden.weights if ".cls." in name or name.endswith("position_ids")} and left
    assert all(torch.equal(tensor, golden.weights[name]) for name, tensor in again.items())


STRANGER = """
import json, sys
import torch
from transformers import AutoModel, AutoProcessor, pipeline
folder, volume, mask = sys.argv[1:]
model = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
assert type(model).__module__.startswith("transformers_modules")
with torch.no_grad():
    organs = model.get_organ_features(**processor(volumes=[volume], masks=[mask], center="lung")).image_embeds
    texts = model.get_text_features(**processor(text=["Lung nodule.", "No emphysema."]))
pipe = pipeline("ct-zero-shot", model=folder, trust_remote_code=True)
finding = {"finding": "Emphysema", "organ": "lung", "positive": "Emphysema.", "negative": "Not emphysema."}
answers = pipe({"volume": volume, "mask": mask}, findings=[finding])
print(json.dumps([organs.tolist(), texts.tolist(), answers[0]["probability"]]))
"""


def test_strangers_load_the_folder_and_it_tells_nothing_of_this_machine(config, published, vocab, tmp_path):
    """In a fresh process elsewhere: AutoModel, AutoProcessor, pipeline, with nothing of ours installed."""
    source, out = tmp_path / "fvlm.pth", tmp_path / "converted-fvlm"
    save_as_trainer(published, source)
    assert convert.main(["--weights", str(source), "--vocab", str(vocab), "--out", str(out), *SIZES]) == 0
    (tmp_path / "scan").mkdir()
    paths = write_scan(tmp_path / "scan")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment.update(HF_HUB_OFFLINE="1", HF_MODULES_CACHE=str(tmp_path / "modules"), OMP_NUM_THREADS="1")
    run = subprocess.run(
        [sys.executable, "-P", "-c", STRANGER, str(out), *map(str, paths)],
        cwd=tmp_path / "scan",
        env=environment,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    organs, texts, probability = json.loads(run.stdout.strip().splitlines()[-1])
    model = FVLMModel.from_pretrained(out).eval()
    processor = FVLMProcessor.from_pretrained(out)
    with torch.no_grad():
        expected = model.get_organ_features(
            **processor(volumes=[paths[0]], masks=[paths[1]], center="lung")
        ).image_embeds
        expected_texts = model.get_text_features(**processor(text=["Lung nodule.", "No emphysema."]))
    assert expected.any() and 0 < probability < 1
    torch.testing.assert_close(torch.tensor(organs), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(torch.tensor(texts), expected_texts, rtol=0, atol=1e-6)

    for path in out.iterdir():
        assert str(tmp_path).encode() not in path.read_bytes(), path.name
    card = (out / "README.md").read_text()
    assert yaml.safe_load(card.split("---")[1])["license"] == "other"
    digest = re.search(r"`([0-9a-f]{64})`", card)[1]
    assert subprocess.run(["sha256sum", source], capture_output=True, text=True).stdout.startswith(digest)
    assert f"| `fvlm.pth` | `{digest}` | {len(published)} | {len(LEFTOVERS)} |" in card
    assert all(f"- `{name}`" in card for name in LEFTOVERS)
    assert "Research only, not for diagnosis." in card and "8 x 12 x 32 voxels, patches of 2 x 4 x 8" in card


def test_a_tokenizer_folder_serves_as_well_as_a_vocabulary(published, vocab, tmp_path):
    save_file(published, tmp_path / "fvlm.safetensors")
    tiny_tokenizer().save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "cxr").mkdir()  # as the text encoder's own repository: a vocabulary beside a config of unknown type
    (tmp_path / "cxr" / "vocab.txt").write_text(vocab.read_text())
    auto_map = {"AutoConfig": "configuration_cxrbert.CXRBertConfig", "AutoModel": "modeling_cxrbert.CXRBertModel"}
    (tmp_path / "cxr" / "config.json").write_text(json.dumps({"model_type": "cxr-bert", "auto_map": auto_map}))
    vocabularies = []
    for number, options in enumerate((["--vocab", vocab], ["--tokenizer", "tokenizer"], ["--tokenizer", "cxr"])):
        options = [options[0], str(tmp_path / options[1])]
        out = tmp_path / f"out{number}"
        weights = ["--weights", str(tmp_path / "fvlm.safetensors")]
        assert convert.main([*weights, *options, "--out", str(out), *SIZES]) == 0
        tokenizer = FVLMProcessor.from_pretrained(out).tokenizer
        vocabularies.append((tokenizer.get_vocab(), tokenizer("Lung NODULE.")["input_ids"]))
    assert vocabularies[0] == vocabularies[1] == vocabularies[2]


def test_half_precision_stays_as_it_is(published, vocab, tmp_path):
    half = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in published.items()}
    save_file(half, tmp_path / "half.safetensors")
    weights = ["--weights", str(tmp_path / "half.safetensors"), "--vocab", str(vocab)]
    assert convert.main([*weights, "--out", str(tmp_path / "out"), *SIZES]) == 0
    ours = to_published_state_dict(load_file(tmp_path / "out" / "model.safetensors"))
    assert ours and all(torch.equal(tensor, half[name]) for name, tensor in ours.items())


class Hostile:
    """What a pickle can do to who opens it."""

    def __reduce__(self):
        return os.mkdir, ("code_was_run",)


def bad_file(kind, published, path):
    """Write a checkpoint with one fault."""
    weights = dict(published)
    if kind == "no file":
        return
    if kind == "folder":
        path.mkdir()
        return
    if kind == "cut off":
        save_as_trainer(weights, path)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        return
    if kind == "old and cut off":
        save_as_trainer(weights, path, _use_new_zipfile_serialization=False)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        return
    if kind == "text":
        path.write_text("<html>404: not found</html>")
        return
    if kind == "code":
        torch.save({"model": weights, "config": Hostile()}, path)
        return
    if kind == "bare pickle with code":
        path.write_bytes(pickle.dumps(Hostile(), protocol=2))
        return
    if kind == "no weights":
        torch.save({"optimizer": {}, "epoch": 3}, path)
        return
    if kind == "resnet":
        weights = {"conv1.weight": torch.ones(64, 3, 7, 7), "bn1.bias": torch.ones(64), "fc.weight": torch.ones(9, 64)}
    elif kind == "unknown":
        weights["momentum_encoder.weight"] = torch.ones(3)
    elif kind == "unknown in the tower":
        weights["visual_encoder.blocks.0.norm_cross_attn.weight"] = torch.ones(16)
    elif kind == "missing":
        del weights["visual_encoder.blocks.1.attn.qkv.bias"]
    elif kind == "misshapen":
        weights["text_encoder.encoder.layer.0.attention.self.key.weight"] = torch.ones(16, 15)
    elif kind == "flat patches":
        weights["visual_encoder.patch_embedding.patch_embeddings.weight"] = torch.ones(16, 64)
    elif kind == "fewer projections":
        del weights["vision_projs.3.weight"]
    elif kind == "mixed types":
        weights["text_proj.bias"] = weights["text_proj.bias"].half()
    elif kind == "our name beside":
        weights["visual_encoder.blocks.0.attention.qkv.weight"] = torch.ones(48, 16)
    elif kind == "our patches beside":
        weights["visual_encoder.embeddings.projection.bias"] = torch.ones(16)
    elif kind == "token types":
        weights["text_encoder.embeddings.token_type_embeddings.weight"] = torch.tensor(1.0)
    elif kind == "not a number":
        weights["text_proj.bias"] = weights["text_proj.bias"] * float("nan")
    elif kind == "sparse":
        weights["query_tokens"] = weights["query_tokens"].to_sparse()
    elif kind == "program":
        torch.jit.script(torch.nn.Linear(2, 2)).save(str(path))
        return
    elif kind == "numpy":
        torch.save({"model": weights, "best": np.float64(3)}, path)
        return
    save_as_trainer(weights, path)


BAD = {
    "no file": ([], "bad.pth is not there"),
    "folder": ([], "bad.pth is a folder"),
    "cut off": ([], "bad.pth is cut off"),
    "old and cut off": ([], "bad.pth is damaged"),
    "text": ([], "bad.pth is damaged, or "),
    "code": ([], r"bad.pth is a pickle that asks for \S*mkdir, which is no tensor .* not opened"),
    "bare pickle with code": ([], r"bad.pth is a pickle that asks for \S*mkdir, which is no tensor .* not opened"),
    "numpy": ([], r"bad.pth is a pickle that asks for numpy\S*scalar, which is no tensor or plain value"),
    "program": ([], r"bad.pth is a TorchScript archive, .* `torch.save\(model.state_dict\(\), FILE\)`"),
    "no weights": ([], "bad.pth holds a dict with the entries optimizer, epoch; expected named tensors"),
    "resnet": ([], "bad.pth: this is no published fVLM .* has no query_tokens.*3 tensors, conv1.weight, bn1.bias"),
    "unknown": ([], "bad.pth: momentum_encoder.weight: no parameter of a published fVLM"),
    "unknown in the tower": ([], "not of this architecture: visual_encoder.blocks.0.norm_cross_attn.weight"),
    "missing": ([], "missing: visual_encoder.blocks.1.attn.qkv.bias"),
    "misshapen": ([], r"layer.0.attention.self.key.weight is \(16, 15\), expected \(16, 16\)"),
    "flat patches": ([], r"patch_embeddings.weight has the shape \(16, 64\); the published architecture has 5 axes"),
    "fewer projections": ([], r"vision_projs.N.weight for N in \[0, 1, 2\]"),
    "mixed types": ([], "number types differ: .*text_proj.bias is torch.float16"),
    "our name beside": ([], "bad.pth: visual_encoder.blocks.0.attention.qkv.weight: no parameter of a published"),
    "our patches beside": ([], "bad.pth: visual_encoder.embeddings.projection.bias: no parameter of a published"),
    "token types": ([], r"token_type_embeddings.weight has the shape \(\); the published architecture has 2 axes"),
    "not a number": ([], "bad.pth: text_proj.bias: NaN or infinite weights"),
    "sparse": ([], "bad.pth: query_tokens: sparse tensors"),
    "organs": (["--organs", "body_24"], "query_tokens has 4 rows, one per organ, but --organs body_24 names 24"),
    "organ set": (["--organs", "chest_5"], "--organs chest_5: organ set 'chest_5' is not one of .*nearest: 'chest_4'"),
    "organs file": (["--organs", "broken.yaml"], "--organs broken.yaml: while parsing"),
    "positions": (["--volume_size", "8", "12", "40"], r"position_embeddings holds 48 patches, .*4 x 3 x 5 = 60"),
    "no multiple": (["--volume_size", "8", "12", "33"], "volume_size width 33 is no multiple of patch_size width 8"),
    "heads": (["--vision_heads", "3"], "hidden_size 16 is no multiple of num_attention_heads 3"),
    "text heads": (["--text_heads", "5"], "--text_heads 5 does not divide 16, the width of text_encoder"),
    "depth": (["--feature_levels", "3", "6", "9"], r"feature_levels \[3, 6, 9\] must be"),
    "length": (["--max_text_length", "65"], "--max_text_length 65 is more than the text encoder's 64 positions"),
    "vocabulary": (["--vocab", "short.txt"], r"word_embeddings.weight has 19 rows, the vocabulary of short.txt has 18"),
    "no vocabulary": (["--vocab", "bad.txt"], r"--vocab bad.txt is no vocabulary of a BERT: it lacks \[PAD\]"),
    "out in use": (["--out", "used"], "--out used is in use"),
    "out below a file": (["--out", "vocab.txt/deep/out"], "--out vocab.txt/deep/out: .*vocab.txt is a file"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_input_is_named_and_leaves_nothing_behind(kind, published, vocab, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    options, message = BAD[kind]
    bad_file(kind, published, tmp_path / "bad.pth")
    (tmp_path / "short.txt").write_text("\n".join(VOCABULARY[:-1]))
    (tmp_path / "bad.txt").write_text("lung\nheart\n")
    (tmp_path / "broken.yaml").write_text("a: [1\n b: {")
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "kept.txt").write_text("mine")
    before = {str(path): path.stat().st_size for path in tmp_path.rglob("*")}
    given = ["--weights", "bad.pth", "--vocab", "vocab.txt", "--out", "new/deep/out", *SIZES]
    assert convert.main([*given, *options]) == 2  # argparse lets the last of two equal options win
    error = capsys.readouterr().err
    assert re.search(message, error), error
    assert "Traceback" not in error and "weights_only" not in error and error.startswith("error: ")
    assert {str(path): path.stat().st_size for path in tmp_path.rglob("*")} == before


def test_a_conversion_that_dies_leaves_nothing_behind(published, vocab, tmp_path, monkeypatch):
    save_file(published, tmp_path / "fvlm.safetensors")
    before = set(tmp_path.rglob("*"))

    def dies(model, processor, folder):
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"half of it")
        raise KeyboardInterrupt

    monkeypatch.setattr(convert, "save_for_hub", dies)
    weights = ["--weights", str(tmp_path / "fvlm.safetensors"), "--vocab", str(vocab)]
    with pytest.raises(KeyboardInterrupt):
        convert.main([*weights, "--out", str(tmp_path / "new" / "out"), *SIZES])
    assert set(tmp_path.rglob("*")) == before

    for error in (OSError(28, "No space left on device"), SafetensorError("I/O error: No space left on device")):

        def full(model, processor, folder, error=error):
            folder.mkdir()
            raise error

        monkeypatch.setattr(convert, "save_for_hub", full)
        assert convert.main([*weights, "--out", str(tmp_path / "new" / "out"), *SIZES]) == 2
        assert set(tmp_path.rglob("*")) == before

    def told_to_end(model, processor, folder):
        folder.mkdir()
        os.kill(os.getpid(), signal.SIGTERM)

    def own_handler(number, frame):
        raise AssertionError("the signal reached the caller")

    monkeypatch.setattr(convert, "save_for_hub", told_to_end)
    previous = signal.signal(signal.SIGTERM, own_handler)
    try:
        with pytest.raises(SystemExit, match="143"):
            convert.main([*weights, "--out", str(tmp_path / "new" / "out"), *SIZES])
        assert signal.getsignal(signal.SIGTERM) is own_handler, "the caller's own handling comes back"
    finally:
        signal.signal(signal.SIGTERM, previous)
    assert set(tmp_path.rglob("*")) == before


def test_one_tensor_under_two_names_is_written_twice(published, vocab, tmp_path):
    layer = "text_encoder.encoder.layer.0.attention.self"
    tied = {**published, f"{layer}.key.weight": published[f"{layer}.query.weight"]}
    both = torch.stack([published["text_proj.bias"], published["text_proj.bias"] + 1])
    tied["text_proj.bias"] = both[1]  # part of a larger block of memory
    torch.save({"model": tied}, tmp_path / "tied.pth")
    weights = ["--weights", str(tmp_path / "tied.pth"), "--vocab", str(vocab)]
    assert convert.main([*weights, "--out", str(tmp_path / "out"), *SIZES]) == 0
    ours = to_published_state_dict(load_file(tmp_path / "out" / "model.safetensors"))
    assert ours.keys() == tied.keys() - LEFTOVERS.keys()
    assert all(torch.equal(tensor, tied[name]) for name, tensor in ours.items())


def test_a_tokenizer_without_a_vocabulary_is_refused(published, tmp_path, capsys):
    save_file(published, tmp_path / "fvlm.safetensors")
    tiny_tokenizer().save_pretrained(tmp_path / "strange")
    (tmp_path / "strange" / "tokenizer.json").write_text('{"model": {"type": "of tomorrow"}}')
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.json").write_text('{"model_type": "cxr-bert"}')
    for name, message in (("empty", "no vocabulary there, only 5 special tokens"), ("strange", "cannot be loaded")):
        given = ["--weights", str(tmp_path / "fvlm.safetensors"), "--tokenizer", str(tmp_path / name), *SIZES]
        assert convert.main([*given, "--out", str(tmp_path / "out")]) == 2
        assert f"{name}" in (error := capsys.readouterr().err) and message in error
        assert not (tmp_path / "out").exists()


def test_a_vocabulary_ends_its_lines_where_a_file_does(published, vocab, tmp_path):
    save_file(published, tmp_path / "fvlm.safetensors")
    words = [*VOCABULARY[:-1], "a\u2028b"]  # a line separator within a token
    vocab.write_text("\n".join(words) + "\n", encoding="utf-8")
    weights = ["--weights", str(tmp_path / "fvlm.safetensors"), "--vocab", str(vocab)]
    assert convert.main([*weights, "--out", str(tmp_path / "out"), *SIZES]) == 0
    assert FVLMProcessor.from_pretrained(tmp_path / "out").tokenizer.get_vocab()["a\u2028b"] == len(words) - 1


def test_back_refuses_what_the_published_code_would_run_as_another_model(published, vocab, tmp_path, capsys):
    vision = {"num_hidden_layers": 12, "feature_levels": (3, 6, 9)}
    base = {"text_token_types": False}
    cases = {
        r"text_pooling 'mean' \(published: 'cls'\)": {**base, "text_pooling": "mean"},
        r"vision_config.token_selection 'organs'": {**base, "vision": {"token_selection": "organs"}},
        r"vision_config.feature_levels \[3, 6\]": {**base, "vision": {"feature_levels": (3, 6)}},
        r"vision_config.hidden_act 'gelu_pytorch_tanh'": {**base, "vision": {"hidden_act": "gelu_pytorch_tanh"}},
        r"vision_config.layer_norm_eps 1e-06 \(published: 1e-05\)": {**base, "vision": {"layer_norm_eps": 1e-6}},
        "row 0 is not zero": {"text_token_types": True},
    }
    for number, (message, changes) in enumerate(cases.items()):
        tower = {**tiny_config().vision_config.to_dict(), **vision, **changes.pop("vision", {})}
        folder = tmp_path / str(number)
        FVLMModel(tiny_config(vision_config=tower, **changes)).save_pretrained(folder)
        assert convert.main(["--back", str(folder), "--out", str(tmp_path / "back.safetensors")]) == 2
        error = capsys.readouterr().err
        assert re.search(message, error), error
    (tmp_path / "there.safetensors").touch()
    assert convert.main(["--back", str(folder), "--out", str(tmp_path / "there.safetensors")]) == 2
    assert convert.main(["--back", str(tmp_path), "--out", str(tmp_path / "back.safetensors")]) == 2
    BertConfig().save_pretrained(tmp_path / "bert")
    save_file({"weight": torch.ones(2)}, tmp_path / "bert" / "model.safetensors")
    assert convert.main(["--back", str(tmp_path / "bert"), "--out", str(tmp_path / "back.safetensors")]) == 2
    assert "holds a model of type 'bert', not fvlm" in capsys.readouterr().err
    assert not (tmp_path / "back.safetensors").exists()


def test_back_writes_the_whole_model_or_nothing(tmp_path, capsys):
    tower = tiny_config().vision_config.to_dict() | {"num_hidden_layers": 12, "feature_levels": (3, 6, 9)}
    text = tiny_config().text_config.to_dict() | {"layer_norm_eps": 1e-12}
    model = FVLMModel(tiny_config(vision_config=tower, text_config=text, text_token_types=False))
    model.save_pretrained(tmp_path / "shards", max_shard_size="40KB")
    shards = sorted((tmp_path / "shards").glob("model-*.safetensors"))
    assert len(shards) > 2
    expected = to_published_state_dict(model.state_dict())
    (tmp_path / "shards" / "model-of-before.safetensors").write_bytes(b"stale")  # not in the index

    def back(name):
        out = tmp_path / f"{name}.safetensors"
        return convert.main(["--back", str(tmp_path / name), "--out", str(out)]), out, capsys.readouterr()

    status, out, printed = back("shards")
    weights = load_file(out)
    assert status == 0 and weights.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights.items())
    assert "vision 12, text 12, pooling 4" in printed.out
    assert "warning: this model has vision 2, text 2, pooling 2" in printed.err

    shutil.copytree(tmp_path / "shards", tmp_path / "lost")
    (tmp_path / "lost" / shards[-1].name).unlink()
    shutil.copytree(tmp_path / "shards", tmp_path / "less")
    (first := tmp_path / "less" / shards[0].name).write_bytes(first.read_bytes())
    kept = load_file(first)
    dropped = sorted(kept)[0]
    save_file({name: tensor for name, tensor in kept.items() if name != dropped}, first, metadata={"format": "pt"})
    shutil.copytree(tmp_path / "shards", tmp_path / "broken")
    (tmp_path / "broken" / "config.json").write_text("{broken")
    for name, message in (
        ("lost", f"{shards[-1].name} of model.safetensors.index.json is not there"),
        ("less", "the tensors are not those of the model. missing: "),
        ("broken", "config.json cannot be read"),
    ):
        status, out, printed = back(name)
        assert status == 2 and not out.exists() and message in printed.err and printed.err.startswith("error: ")
    # One file beside the shards of an earlier save: transformers reads the file, and so does this.
    with torch.no_grad():
        model.text_projection.bias.add_(1)
    save_file(model.state_dict(), tmp_path / "shards" / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "shards.safetensors").unlink()
    status, out, _ = back("shards")
    assert status == 0 and torch.equal(load_file(out)["text_proj.bias"], model.text_projection.bias)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "one of the arguments --weights --mae --back is required"),
        (["--weights", "a.pth"], "exactly one of --tokenizer and --vocab"),
        (["--weights", "a.pth", "--vocab", "v.txt", "--tokenizer", "b"], "exactly one of --tokenizer and --vocab"),
        (["--weights", "a.pth", "--mae", "m.pth"], "not allowed with argument"),
        (["--mae", "m.pth"], "--mae needs --text_encoder"),
        (["--weights", "a.pth", "--vocab", "v.txt", "--text_encoder", "b"], "--text_encoder goes with --mae only"),
        (["--back", "folder", "--vocab", "v.txt"], "--vocab goes with --weights only"),
        (["--back", "folder", "--vision_heads", "-4"], "'-4' is no whole number from 1 on"),
        (["--back", "folder", "--pooling_heads", "0"], "'0' is no whole number from 1 on"),
        (["--back", "folder", "--max_text_length", "0"], "'0' is no whole number from 1 on"),
        (["--back", "folder", "--min_organ_voxels", "-3"], "'-3' is no whole number from 1 on"),
    ],
)
def test_options_that_do_not_go_together(words, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        convert.main([*words, "--out", "out"])
    assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_help_teaches_with_commands_that_parse(capsys):
    with pytest.raises(SystemExit) as stopped:
        convert.main(["--help"])
    text = capsys.readouterr().out
    assert stopped.value.code == 0
    joined = text.replace("\\\n", " ")
    commands = re.findall(r"python -m training_fvlm\.convert (--.*)", joined)
    assert len(commands) == 5
    for command in commands:
        convert.parse_arguments(command.split())


def test_a_namespace_beside_the_weights_is_no_code(published, tmp_path):
    """MAE's trainer saves its command line so."""
    import argparse

    torch.save({"model": published, "args": argparse.Namespace(lr=1e-4)}, tmp_path / "mae.pth")
    assert read_state_dict(tmp_path / "mae.pth").keys() == published.keys()
    torch.save({"model": published, "args": pickle.PickleBuffer}, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match="PickleBuffer"):
        read_state_dict(tmp_path / "other.pth")
