"""docs/evaluation.md names what exists, counts what is there, and its lines for Python run."""

import argparse
import importlib.util
import re
from importlib import import_module
from pathlib import Path

import pytest
import torch
import yaml
from dicom_series import write_series
from tiny_scan import AFFINE, tiny_config, tiny_scan, tiny_tokenizer, write_scan

import eval_fvlm
from benchmarks import coverage
from evaluation_fvlm.__main__ import COMMANDS
from evaluation_fvlm.binary_metrics import METRICS
from evaluation_fvlm.calibration import NUM_BINS
from evaluation_fvlm.protocols import CALIBRATIONS
from evaluation_fvlm.tasks import available_tasks, load_task
from evaluation_fvlm.thresholds import SOURCES
from modeling_fvlm import FVLMModel, FVLMProcessor, save_for_hub

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")


def options_of(command: str) -> set[str]:
    parser = argparse.ArgumentParser()
    import_module(f"evaluation_fvlm.{COMMANDS[command][0]}").add_arguments(parser)
    return {option for action in parser._actions for option in action.option_strings}


def test_the_prompt_sets_are_counted():
    rows = re.findall(r"^\| `(\w+)` \| (\d+) \| (\d+) \| (\d+) \|", PAGE, flags=re.MULTILINE)
    found = {name: tuple(map(int, counts)) for name, *counts in rows}
    tasks = {name: load_task(name) for name in available_tasks()}
    assert found == {
        name: (
            len(task.items),
            len({item.organ for item in task.items}),
            sum(len(item.positive) for item in task.items),
        )
        for name, task in tasks.items()
    }


def test_what_the_page_names_exists():
    for path in set(re.findall(r"`((?:tests|hub_configs)/[\w./-]+)`", PAGE)):
        assert (ROOT / path).exists(), path
    for target in re.findall(r"]\((?!https?:|#)([^)]+)\)", PAGE):
        assert (ROOT / "docs" / target).is_file(), target
    for anchor in re.findall(r"]\(#([\w-]+)\)", PAGE):
        headings = [line.lstrip("# ").lower() for line in PAGE.splitlines() if line.startswith("#")]
        assert anchor in {re.sub(r"[^\w -]", "", heading).replace(" ", "-") for heading in headings}, anchor


def test_commands_and_their_options_exist():
    of_eval = set(re.findall(r'"(--\w+)"', Path(eval_fvlm.__file__).read_text(encoding="utf-8")))
    known = {"eval_fvlm.py": of_eval} | {name: options_of(name) for name in COMMANDS}
    lines = re.findall(r"`(python [^`]+)`", PAGE)  # some go over the end of a line
    assert len(lines) >= 8
    for line in lines:
        words = line.split()
        if words[2] in ("training_fvlm.push", "benchmarks.without_mask", "benchmarks.coverage"):
            assert importlib.util.find_spec(words[2]), line
            continue  # commands of other rooms
        name = words[1] if words[1] == "eval_fvlm.py" else words[3]
        assert name in known, line
        assert {word for word in words if word.startswith("--")} <= known[name], line
    options = set(re.findall(r"`(--\w+)`", PAGE)) | set(re.findall(r"`(--\w+) ", PAGE))
    of_coverage = set(re.findall(r'"(--\w+)"', Path(coverage.__file__).read_text(encoding="utf-8")))
    everywhere = of_coverage.union(*known.values())
    assert len(options) > 8 and options <= everywhere, options - everywhere


def test_figures_and_thresholds_have_their_rows():
    for name in (*METRICS, *CALIBRATIONS, *SOURCES):
        assert f"`{name}`" in PAGE, name
    assert f"over {NUM_BINS} bins" in PAGE


def test_placeholders_are_gone():
    assert not re.findall(r"@[A-Z_]+@", PAGE)


def test_the_lines_for_python_run(tmp_path, monkeypatch, capsys):
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    hu, _ = tiny_scan()
    volume, mask = write_scan(tmp_path)
    volume.rename(tmp_path / "ct.nii.gz")
    mask.rename(tmp_path / "totalsegmentator.nii.gz")
    write_series(tmp_path / "dicom_folder", hu.transpose(2, 1, 0), AFFINE[:, [2, 1, 0, 3]])
    item = {"finding": "Nodule", "organ": "lung", "positive": "Nodule.", "negative": "No nodule."}
    (tmp_path / "my_findings.yaml").write_text(yaml.safe_dump({"name": "mine", "items": [item]}))
    torch.manual_seed(0)
    config = tiny_config()
    save_for_hub(FVLMModel(config), FVLMProcessor.from_config(config, tiny_tokenizer()), tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    exec(code, {})
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["Emphysema", "Nodule", "Cardiomegaly"]
    assert all(line.endswith(" organ") and 0 < float(line.split()[1]) < 1 for line in lines)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_on_the_page(command):
    assert re.search(rf"evaluation_fvlm {command}\b|`{command}`", PAGE), command
