"""What an import costs: builders load neither PyTorch nor transformers, and the Auto classes know fVLM all the same."""

import argparse
import ast
import json
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
from tiny_release import ct_rate_release

import modeling_fvlm
from data_builders.__main__ import COMMANDS
from data_builders.build import add_build_arguments
from data_builders.run_cases import PADDED_TO, PADDING_WINDOWS
from modeling_fvlm import FVLMConfig

ROOT = Path(__file__).resolve().parent.parent
HEAVY = {"torch", "transformers", "datasets", "matplotlib"}
LOADED = "import json, sys; print(json.dumps(sorted({name.split('.')[0] for name in sys.modules})))"
# What the Auto classes and the pipelines know of fVLM; nothing is taken from modeling_fvlm for it.
KNOWN = """
from transformers import CONFIG_MAPPING, MODEL_MAPPING
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
from transformers.pipelines import PIPELINE_REGISTRY

def known():
    names = [CONFIG_MAPPING[name].__name__ for name in ("fvlm", "fvlm_vision_model") if name in CONFIG_MAPPING]
    for name, mappings in (("fvlm", (MODEL_MAPPING, PROCESSOR_MAPPING)), ("fvlm_vision_model", (MODEL_MAPPING,))):
        if name in CONFIG_MAPPING:
            names += [mapping[CONFIG_MAPPING[name]].__name__ for mapping in mappings]
    if "fvlm" in CONFIG_MAPPING:
        names += [item.__name__ for item in IMAGE_PROCESSOR_MAPPING[CONFIG_MAPPING["fvlm"]].values() if item]
    return names + [task for task in PIPELINE_REGISTRY.supported_tasks if task == "ct-zero-shot"]
"""
ALL_KNOWN = ["FVLMConfig", "FVLMVisionConfig", "FVLMModel", "FVLMProcessor", "FVLMVisionModel", "FVLMImageProcessor"]
ALL_KNOWN += ["ct-zero-shot"]


def in_fresh_process(code: str, *arguments) -> list:
    """The last line that code prints in a new Python process, read as JSON."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=250)
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout.splitlines()[-1])


def test_a_worker_imports_neither_torch_nor_transformers():
    loaded = in_fresh_process(f"import data_builders.run_cases, data_builders.build; {LOADED}")
    assert "modeling_fvlm" in loaded and "numpy" in loaded
    assert not HEAVY & set(loaded)


def test_preparing_scans_imports_neither_torch_nor_transformers(tmp_path):
    release = ct_rate_release(tmp_path / "release", ["train_1_a_1", "valid_1_a_1"])
    options = ["--spacing", 3, 4, 4, "--workers", 1, "--previews", 0, "--configs", "volumes", "organ_crops"]
    code = f"import sys; from data_builders.__main__ import main; assert main(sys.argv[1:]) == 0; {LOADED}"
    loaded = in_fresh_process(code, "ct_rate", "--source", release, "--out", tmp_path / "split", *options)
    assert (tmp_path / "split" / "manifest.json").is_file() and "nibabel" in loaded
    assert not HEAVY & set(loaded)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_quick(command):
    arguments = [sys.executable, "-X", "importtime", "-m", "data_builders", command, "--help"]
    run = subprocess.run(arguments, capture_output=True, text=True, cwd=ROOT, timeout=250)
    assert run.returncode == 0 and "--help" in run.stdout, run.stderr[-3000:]
    loaded = {line.rsplit("|", 1)[1].strip().split(".")[0] for line in run.stderr.splitlines() if "|" in line}
    assert "data_builders" in loaded
    assert not HEAVY & loaded


@pytest.mark.parametrize(
    "imports", ["from modeling_fvlm import FVLMModel", "from transformers import AutoModel; import modeling_fvlm"]
)
def test_the_auto_classes_know_fvlm(imports):
    assert in_fresh_process(f"{imports}\n{KNOWN}\nimport json; print(json.dumps(known()))") == ALL_KNOWN


def test_with_transformers_last_any_name_makes_fvlm_known(tmp_path):
    code = "import json, sys; from modeling_fvlm.configuration_fvlm import FVLMConfig; import modeling_fvlm"
    code += f"\n{KNOWN}\nFVLMConfig().save_pretrained(sys.argv[1])\nbefore = known()\nmodeling_fvlm.AIR_HU"
    assert in_fresh_process(f"{code}\nprint(json.dumps([before, known()]))", tmp_path) == [[], ALL_KNOWN]
    # A class that is taken from its module, and not from the package, is saved with its code all the same.
    saved = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert saved["auto_map"] == {"AutoConfig": "configuration_fvlm.FVLMConfig"}
    assert {"configuration_fvlm.py", "defaults.py", "organs.py"} <= {path.name for path in tmp_path.iterdir()}


def test_while_another_thread_imports_transformers_a_reader_is_there_at_once():
    """Nothing can be registered yet: half of transformers would answer that it has no AutoConfig."""
    half = """
import sys, types
from importlib.machinery import ModuleSpec
sys.modules["transformers"] = types.ModuleType("transformers")
sys.modules["transformers"].__spec__ = ModuleSpec("transformers", None)
sys.modules["transformers"].__spec__._initializing = True
from modeling_fvlm import read_volume
del sys.modules["transformers"]
import json, transformers
from modeling_fvlm import OrganSet
"""
    assert in_fresh_process(f"{half}{KNOWN}\nprint(json.dumps(known()))") == ALL_KNOWN


def test_every_name_is_there():
    for name in modeling_fvlm.__all__:
        value = getattr(import_module(f"modeling_fvlm.{modeling_fvlm._MODULE_OF[name]}"), name)
        assert getattr(modeling_fvlm, name) is value, name
    assert set(modeling_fvlm.__all__) <= set(dir(modeling_fvlm))
    for module in modeling_fvlm._NAMES:
        assert getattr(modeling_fvlm, module) is sys.modules[f"modeling_fvlm.{module}"]
    with pytest.raises(AttributeError, match="FVLMModle"):
        modeling_fvlm.FVLMModle  # noqa: B018


def test_editors_are_told_the_same_names():
    tree = ast.parse(Path(modeling_fvlm.__file__).read_text(encoding="utf-8"))
    (block,) = (node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    told = {node.module: tuple(alias.name for alias in node.names) for node in block.body}
    assert told == modeling_fvlm._NAMES
    assert sorted(modeling_fvlm._MODULE_OF) == sorted(modeling_fvlm.__all__)


def test_builders_and_configuration_start_from_the_same_numbers():
    parser = argparse.ArgumentParser()
    add_build_arguments(parser, organs="chest_4")
    options, config = parser.parse_args(["--out", "split"]), FVLMConfig()
    assert tuple(options.spacing) == tuple(config.spacing)
    assert tuple(options.margin) == tuple(config.margin_voxels)
    assert tuple(config.vision_config.volume_size) == tuple(PADDED_TO) and config.windows == list(PADDING_WINDOWS)
