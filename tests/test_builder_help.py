"""The commands in the manuals of the builders run as they are written there; the manuals name every option's effect."""

import argparse
import importlib
import importlib.util
import json
import re
import shlex

import pytest
from dicom_series import write_series
from test_bad_input import AFFINE
from tiny_release import REPORT, arrays, ct_rate_release, save_nifti, write_csv

from data_builders.__main__ import COMMANDS, main

FAST = ["--previews", "0", "--workers", "1"]  # the only thing that is added to a command


def commands_in(name: str) -> list[list[str]]:
    """The example commands of a builder's manual, as words."""
    text = importlib.import_module(f"data_builders.{COMMANDS[name][0]}").__doc__
    found = re.findall(r"^    python -m data_builders ((?:.*\\\n)*.*)$", text, re.MULTILINE)
    return [shlex.split(command.replace("\\\n", " ")) for command in found]


def write_inputs(root, command: list[str]) -> None:
    """Everything that the examples of `folder` name, with two cases."""
    names = ("p_1", "p_2")
    for seed, name in enumerate(names):
        volume, mask = arrays(seed)
        save_nifti(volume, root / "scans" / f"{name}.nii.gz")
        save_nifti(mask, root / "masks" / f"{name}.nii.gz")
        write_series(root / "dicom" / name, volume, AFFINE)
    columns = {"id": "id", "findings": "findings"}
    if "--columns" in command:
        columns |= dict(pair.split("=") for pair in command[command.index("--columns") + 1 :] if "=" in pair)
    write_csv(root / "reports.csv", [{columns["id"]: n, columns["findings"]: REPORT["findings"]} for n in names])
    (root / "reports.json").write_text(json.dumps(dict.fromkeys(names, REPORT)))
    write_csv(root / "cases.csv", [{"id": name, "volume": f"{name}.nii.gz", "report": name} for name in names])
    (root / "desc_info.json").write_text(json.dumps({n: {"Findings": "Clear.", "lung": "Clear."} for n in names}))
    (root / "conc_info.json").write_text(json.dumps({n: {"Conclusion": "None."} for n in names}))


@pytest.mark.parametrize("number", range(6))
def test_examples_of_folder_run_as_written(tmp_path, monkeypatch, capsys, number):
    commands = commands_in("folder")
    assert len(commands) == 6, "an example more or less: tell this test"
    command = commands[number]
    write_inputs(tmp_path, command)
    monkeypatch.chdir(tmp_path)
    status = main([*command, *FAST])
    if "--segment" in command and importlib.util.find_spec("totalsegmentator") is None:
        assert status == 2 and 'pip install "fvlm[segment]"' in capsys.readouterr().err
        return
    assert status == 0
    manifest = json.loads((tmp_path / "out" / "split" / "manifest.json").read_text())
    assert manifest["skipped"] == [] and sum(split["rows"] for split in manifest["splits"].values()) == 2


def test_examples_of_ct_rate_run_as_written(tmp_path, monkeypatch):
    ct_rate_release(tmp_path / "CT-RATE", ("train_1_a_1", "valid_1_a_1"))
    monkeypatch.chdir(tmp_path)
    for name, scan in (("desc_info", "train_1_a"), ("conc_info", "valid_1_a")):
        (tmp_path / f"{name}.json").write_text(json.dumps({scan: {"lung": "Clear."}}))
    commands = commands_in("ct_rate")
    assert len(commands) == 3
    for number, command in enumerate(commands):
        # The Hub is not asked here: the same release lies in a folder.
        words = ["CT-RATE" if word == "hf://datasets/ibrahimhamamci/CT-RATE" else word for word in command]
        out = words.index("--out") + 1
        words[out] = f"{words[out]}_{number}"
        assert main([*words, *FAST]) == 0
        splits = json.loads((tmp_path / words[out] / "manifest.json").read_text())["splits"]
        assert all(split["rows"] == 1 for split in splits.values()) and len(splits) == 2 - ("--splits" in words)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_of_a_builder_says_what_it_does(name, capsys):
    """And gives its default, where it has one that is not nothing."""
    module = importlib.import_module(f"data_builders.{COMMANDS[name][0]}")
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)
    for action in parser._actions:
        assert action.help and len(action.help) > 5, action.dest
        is_told = "default" in action.help or action.required
        assert is_told or action.default in (None, False, [], "==SUPPRESS=="), f"{name} --{action.dest}: which default?"
    with pytest.raises(SystemExit) as stopped:
        main([name, "--help"])
    assert stopped.value.code == 0 and f"python -m data_builders {name}" in capsys.readouterr().out
