"""The README's ten lines run, and what it names exists."""

import re
import subprocess
import sys
from pathlib import Path

import torch

from data_builders.__main__ import main as data_builders
from modeling_fvlm import FVLMConfig, FVLMModel, FVLMProcessor, load_organ_set
from modeling_fvlm.pipeline_fvlm import save_for_hub
from training_fvlm.text import text_config_from_scratch, train_tokenizer

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def ten_lines() -> str:
    return code_blocks()[0]


def code_blocks() -> list[str]:
    ten, streaming = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    return [ten, streaming]


def save_tiny_body_model(folder: Path) -> None:
    """A model of the demo's geometry and organs with a few thousand random weights."""
    organ_set = load_organ_set("body_24")
    tokenizer = train_tokenizer(["Splenomegaly. No splenomegaly. No pericardial effusion is seen."], 100, 24)
    text = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    vision = {"volume_size": (48, 96, 128), "patch_size": (4, 16, 16), "hidden_size": 16, "num_hidden_layers": 1}
    vision |= {"num_attention_heads": 2, "intermediate_size": 32, "feature_levels": [0], "token_selection": "organs"}
    torch.manual_seed(0)
    config = FVLMConfig(
        vision_config=vision,
        text_config=text_config_from_scratch(text, tokenizer, 24),
        organ_set=organ_set.name,
        organs=list(organ_set.organs),
        organ_classes=organ_set.classes,
        spacing=(20.0, 4.0, 4.0),
        margin_voxels=(1, 4, 4),
        projection_dim=8,
        pooling_num_heads=2,
        max_text_length=24,
    )
    save_for_hub(FVLMModel(config), FVLMProcessor.from_config(config, tokenizer), folder)


def test_ten_lines_run_beside_a_demo_run_without_this_checkout(tmp_path):
    lines = [line for line in ten_lines().splitlines() if line.strip()]
    assert len(lines) <= 14, "the ten lines have grown"
    source = ["--out", str(tmp_path / "runs/demo/source"), "--patients", "1", "--validation", "1", "--seed", "0"]
    assert data_builders(["synthetic", *source, "--workers", "1"]) == 0
    save_tiny_body_model(tmp_path / "runs/demo/model")
    # -I and another folder: no file of this checkout lies beside it; the code comes from the model's folder.
    run = subprocess.run(
        [sys.executable, "-I", "-c", ten_lines()], capture_output=True, text=True, cwd=tmp_path, timeout=250
    )
    assert run.returncode == 0, run.stderr[-3000:]
    shape, *findings = run.stdout.strip().splitlines()
    assert re.fullmatch(r"\(1, 24, 8\) \d+ organs are whole", shape), shape
    assert [line.rsplit(" ", 1)[0] for line in findings] == ["Pericardial effusion", "Splenomegaly"]
    assert all(re.fullmatch(r"0\.\d+", line.rsplit(" ", 1)[1]) for line in findings), findings


def test_what_the_readme_names_exists():
    for path in set(re.findall(r"`((?:hub_configs|tests|docs|benchmarks)/[\w./-]+)`", README)):
        assert (ROOT / path).exists(), path
    for target in set(re.findall(r"`make ([\w-]+)", README)) | set(re.findall(r"^make ([\w-]+)", README, re.MULTILINE)):
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE), target
    for recipe in re.findall(r"--recipe ([\w-]+)", README):
        assert (ROOT / "hub_configs" / "recipes" / f"{recipe}.yaml").is_file(), recipe
    for target in re.findall(r"]\((?!https?:)([^)]+)\)", README):  # pictures and pages
        assert (ROOT / target).is_file(), target


def test_what_the_table_of_departures_names_exists():
    page = (ROOT / "docs" / "published.md").read_text(encoding="utf-8")
    for path in set(re.findall(r"`((?:tests|hub_configs)/[\w./-]+)`", page)):
        assert (ROOT / path).is_file(), path
    rooms = ("training_fvlm", "evaluation_fvlm", "data_builders")
    sources = [ROOT / "eval_fvlm.py", *(path for room in rooms for path in (ROOT / room).glob("*.py"))]
    code = "\n".join(path.read_text(encoding="utf-8") for path in sources)
    options = set(re.findall(r"--([a-z_]{4,})", page)) - {"weight_decay", "max_grad_norm"}  # the Trainer's own
    assert len(options) >= 8
    for option in options:
        assert re.search(rf'"--{option}"|^    {option}: ', code, re.MULTILINE), option


def test_placeholders_are_gone():
    assert not re.findall(r"@[A-Z_]+@", README)


def test_streaming_lines_run_on_a_local_release(tmp_path, capsys):
    source = ["--out", str(tmp_path / "release"), "--patients", "1", "--validation", "1", "--seed", "0"]
    assert data_builders(["synthetic", *source, "--workers", "1"]) == 0
    capsys.readouterr()
    lines = code_blocks()[1].replace("hf://datasets/ibrahimhamamci/CT-RATE", str(tmp_path / "release"))
    exec(lines, {})
    rows = capsys.readouterr().out.strip().splitlines()
    assert rows and all(re.match(r"train_1_a_1 (lung|heart|esophagus|aorta) \(\d+, \d+, \d+\) \S", row) for row in rows)
