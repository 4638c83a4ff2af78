"""Files of checkpoints: whole or not there, whatever happens; what is kept, deleted and put aside."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from training_fvlm import checkpoints
from training_fvlm.checkpoints import (
    OLD,
    PARTIAL,
    REMOVED,
    begin_checkpoint,
    clear_away,
    complete_checkpoints,
    finish_checkpoint,
    is_complete,
    is_disk_full,
    keep_newest,
    load_state,
    newest_checkpoint,
    put_later_ones_aside,
    remnant,
    save_state,
    sync_files,
    why_not_written,
)


def write(run: Path, step: int, text: str = "{}") -> None:
    folder = begin_checkpoint(run, step)
    (folder / "weights").write_text(text)
    (folder / "trainer_state.json").write_text("{}")
    sync_files(folder)
    finish_checkpoint(run, step)


def names(run: Path) -> list[str]:
    return sorted(path.name for path in run.iterdir())


def test_half_a_checkpoint_is_none(tmp_path):
    assert newest_checkpoint(tmp_path / "nothing") is None
    write(tmp_path, 3), write(tmp_path, 20)
    (tmp_path / "checkpoint-100").mkdir()  # as another program may leave it
    (tmp_path / "checkpoint-100" / "model.safetensors").write_text("half")
    (tmp_path / "checkpoint-x").mkdir()
    half = begin_checkpoint(tmp_path, 21)
    (half / "trainer_state.json").write_text("{}")  # complete but for its name
    assert newest_checkpoint(tmp_path) == str(tmp_path / "checkpoint-20") and not is_complete(half)
    assert [path.name for path in complete_checkpoints(tmp_path)] == ["checkpoint-3", "checkpoint-20"]
    assert clear_away(tmp_path) == ["_checkpoint-21.partial"]
    assert names(tmp_path) == ["checkpoint-100", "checkpoint-20", "checkpoint-3", "checkpoint-x"]
    assert clear_away(tmp_path / "nothing") == []


def test_the_oldest_go_but_never_the_newest_and_the_best(tmp_path):
    for step in (2, 4, 10, 12):
        write(tmp_path, step)
    keep_newest(tmp_path, None)
    keep_newest(tmp_path, 0)
    assert len(names(tmp_path)) == 4
    keep_newest(tmp_path, 3, best=tmp_path / "checkpoint-2")
    assert names(tmp_path) == ["checkpoint-10", "checkpoint-12", "checkpoint-2"]
    keep_newest(tmp_path, 1, best=tmp_path / "checkpoint-2")
    assert names(tmp_path) == ["checkpoint-12", "checkpoint-2"]
    keep_newest(tmp_path, 1)
    assert names(tmp_path) == ["checkpoint-12"]


def test_a_checkpoint_is_replaced_by_another_of_its_step(tmp_path):
    write(tmp_path, 2, "first"), write(tmp_path, 2, "second")
    assert names(tmp_path) == ["checkpoint-2"] and (tmp_path / "checkpoint-2" / "weights").read_text() == "second"


@pytest.mark.parametrize("limit", [1, 2])
def test_killed_before_every_change_of_the_folder(tmp_path, limit, monkeypatch):
    """Write a checkpoint, replace one, delete one: at each moment there is the old or the new one, and it is whole."""

    class Killed(BaseException):
        pass

    def script(run: Path) -> None:
        write(run, 2, "old two")
        keep_newest(run, limit)
        write(run, 4, "old four")
        keep_newest(run, limit)
        write(run, 4, "new four")
        keep_newest(run, limit)

    def run_until(moment: int, run: Path) -> int:
        count = 0

        def counted(function):
            def call(*args, **options):
                nonlocal count
                count += 1
                if count == moment:
                    raise Killed
                return function(*args, **options)

            return call

        with monkeypatch.context() as patch:
            for name in ("rename", "mkdir", "rmdir", "unlink", "fsync", "open"):
                patch.setattr(os, name, counted(getattr(os, name)))
            try:
                script(run)
            except Killed:
                return 0
        return count

    (tmp_path / "whole").mkdir()
    total = run_until(-1, tmp_path / "whole")
    assert total > 20
    newest = []
    for moment in range(1, total + 1):
        run = tmp_path / str(moment)
        run.mkdir()
        assert run_until(moment, run) == 0
        found = newest_checkpoint(run)
        clear_away(run)
        if found is not None:
            text = (Path(found) / "weights").read_text()
            newest.append(f"{Path(found).name} {text}")
            assert text in ("old two", "old four", "new four") and all(is_complete(path) for path in run.iterdir())
        else:
            assert not newest, "once there was a checkpoint there always is one"
    assert list(dict.fromkeys(newest)) == ["checkpoint-2 old two", "checkpoint-4 old four", "checkpoint-4 new four"]


def test_what_was_to_be_replaced_is_taken_back(tmp_path):
    write(tmp_path, 4, "old")
    os.rename(tmp_path / "checkpoint-4", remnant(tmp_path, 4, OLD))
    begin_checkpoint(tmp_path, 4)
    remnant(tmp_path, 2, REMOVED).mkdir()
    assert newest_checkpoint(tmp_path) == str(tmp_path / "checkpoint-4")
    assert clear_away(tmp_path) == [f"_checkpoint-2.{REMOVED}", f"_checkpoint-4.{PARTIAL}"]
    assert names(tmp_path) == ["checkpoint-4"]


def test_checkpoints_of_a_run_that_was_given_up_are_put_aside(tmp_path):
    for step in (2, 4, 6):
        write(tmp_path, step)
    assert put_later_ones_aside(tmp_path, 2) == ["checkpoint-4", "checkpoint-6"]
    assert newest_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")
    assert names(tmp_path) == ["_superseded-checkpoint-4", "_superseded-checkpoint-6", "checkpoint-2"]
    write(tmp_path, 4)
    assert put_later_ones_aside(tmp_path, 2) == ["checkpoint-4"], "an older one of that name makes room"


def test_a_state_comes_back_as_it_was(tmp_path):
    shared = torch.randn(3, 4)
    state = {
        "weights": {
            "a.b": shared,
            "tied": shared,
            "half": torch.ones(2, dtype=torch.bfloat16),
            "empty": torch.zeros(0),
        },
        "transposed": shared.T,
        "scalar": torch.tensor(0.1, dtype=torch.float64),
        "steps": [3, 0.1, "x", None, True, torch.arange(3)],
        "broken": math.nan,
    }
    save_state(tmp_path, "teacher", state)
    back = load_state(tmp_path, "teacher")
    assert back.keys() == state.keys() and math.isnan(back.pop("broken"))
    for name, tensor in state["weights"].items():
        assert torch.equal(back["weights"][name], tensor) and back["weights"][name].dtype == tensor.dtype
    assert torch.equal(back["transposed"], shared.T) and back["scalar"].item() == 0.1
    assert back["steps"][:5] == state["steps"][:5] and back["steps"][5].tolist() == [0, 1, 2]
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json", ".safetensors"], "no pickle"
    save_state(tmp_path, "plain", {"step": 3})
    assert load_state(tmp_path, "plain") == {"step": 3} and load_state(tmp_path, "other") is None


@pytest.mark.parametrize(
    ("state", "message"),
    [({"a": {1: 2}}, "keys of a state must be strings, got 1 at a"), ({"a": [object()]}, "got object at a/0")],
)
def test_what_is_no_state_is_refused(tmp_path, state, message):
    with pytest.raises(TypeError, match=message):
        save_state(tmp_path, "x", state)


FULL = """
import resource, sys, torch
from safetensors.torch import save_file
from training_fvlm.checkpoints import is_disk_full, why_not_written
limit = 100_000
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
run = sys.argv[1]
tensor = torch.zeros(100_000)
writers = {
    "safetensors": lambda: save_file({"a": tensor}, f"{run}/a"),
    "torch": lambda: torch.save({"a": tensor}, f"{run}/b"),
    "many": lambda: torch.save({str(number): torch.zeros(1000) for number in range(100)}, f"{run}/c"),
    "text": lambda: open(f"{run}/d", "w").write("a" * 1_000_000),
}
for name, write in writers.items():
    try:
        write()
    except Exception as error:
        print(name, is_disk_full(error))
"""


def test_a_full_disk_is_known_by_what_each_library_says_of_it(tmp_path):
    line = [sys.executable, "-c", FULL, str(tmp_path)]
    root = Path(__file__).resolve().parents[1]
    run = subprocess.run(line, capture_output=True, text=True, cwd=root, env={**os.environ, "PYTHONPATH": str(root)})
    assert run.stdout.split("\n")[:4] == ["safetensors True", "torch True", "many True", "text True"], run.stderr
    assert not is_disk_full(ValueError("something else")) and not is_disk_full(FileNotFoundError(2, "no such file"))


def test_the_message_says_what_is_safe_and_what_to_do(tmp_path):
    assert "there is none before it" in why_not_written(tmp_path, 3, ["OSError: broken"], is_full=False)
    write(tmp_path, 2)
    text = why_not_written(tmp_path, 4, [], is_full=True)
    for part in ("step 4", "is full", "checkpoint-2 is whole", "GB are free", "--save_total_limit", "auto"):
        assert part in text


def test_disks_without_fsync(tmp_path, monkeypatch):
    def unknown(descriptor):
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr(os, "fsync", unknown)
    write(tmp_path, 2)

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write(tmp_path, 4)
    assert newest_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")
