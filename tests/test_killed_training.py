"""Trainings that are killed at any moment, a checkpoint's writing included, end in the very weights of one that is not.

Also the command itself under real signals, with one process and with two of which one alone is told.
"""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from dying import run
from launching import environment, free_port
from tiny_split import TINY_RECIPE, tiny_row, write_tiny_split

import train_fvlm
from training_fvlm.organ_losses import TRAIN_FILE
from training_fvlm.signals import EXIT_STATUS

ROOT = Path(__file__).resolve().parents[1]
STEPS = 12
# 24 rows in batches of 4, 6 steps an epoch; a checkpoint every 2 steps, a log line every 3.
SETTINGS = ["--max_steps", str(STEPS), "--save_steps", "2", "--logging_steps", "3", "--save_total_limit", "2"]


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("killed")
    write_tiny_split(folder / "split")
    (folder / "tiny.yaml").write_text(TINY_RECIPE, encoding="utf-8")
    return folder


def command(work: Path, out: Path, *words: str) -> list[str]:
    recipe = ["--recipe", str(work / "tiny.yaml"), "--data", str(work / "split"), "--output_dir", str(out)]
    return [*recipe, "--resume_from_checkpoint", "auto", "--eval_strategy", "no", *SETTINGS, *words]


def outcome(out: Path) -> dict:
    """What must not hang on where a run was killed: weights and losses."""
    state = json.loads((out / "trainer_state.json").read_text())
    times = ("_runtime", "_per_second", "train_loss")
    log = [{key: value for key, value in line.items() if not key.endswith(times)} for line in state["log_history"]]
    weights = {
        name: (out / name).read_bytes() for name in ("model.safetensors", f"checkpoint-{STEPS}/model.safetensors")
    }
    return {"log": log, "table": (out / TRAIN_FILE).read_text(), **weights}


@pytest.fixture(scope="module")
def undisturbed(work):
    assert run(command(work, work / "undisturbed")) == 0
    found = outcome(work / "undisturbed")
    assert len(found["log"]) == STEPS // 3 + 2 and len(found["model.safetensors"]) > 10_000
    return found


MOMENTS = {
    "half of the optimizer's state": ("half", "optimizer.pt", 3),
    "before a complete checkpoint gets its name": ("rename", "checkpoint-6", 1),
    "half of a generator's state": ("half", "rng_state.pth", 1),
    "before the last file is on the disk": ("fsync", "trainer_state.json", 4),
    "before the oldest is deleted": ("rename", "_checkpoint-2.removed", 1),
    "while the oldest is deleted": ("rmtree", "_checkpoint-4.removed", 2),
    "before the first": ("rename", "checkpoint-2", 1),
}
FAST = ("half of the optimizer's state", "before the oldest is deleted")


@pytest.mark.parametrize(
    "moment", [pytest.param(name, marks=[] if name in FAST else [pytest.mark.slow]) for name in MOMENTS]
)
def test_killed_while_a_checkpoint_is_written(work, undisturbed, tmp_path, moment):
    assert run(command(work, tmp_path), *MOMENTS[moment]) == -signal.SIGKILL
    left = [path.name for path in tmp_path.iterdir() if path.name.startswith("_checkpoint")]
    assert bool(left) == (moment != "before the oldest is deleted")
    assert run(command(work, tmp_path)) == 0
    assert outcome(tmp_path) == undisturbed
    assert not list(tmp_path.glob("_*")) and len(list(tmp_path.glob("checkpoint-*"))) == 2


def line(work: Path, out: Path, *words: str) -> list[str]:
    return [sys.executable, str(ROOT / "train_fvlm.py"), *command(work, out, *words)]


@pytest.fixture
def start():
    """Starts commands; those that a failed test leaves behind are ended."""
    processes = []

    def start(words: list[str], **more: str) -> subprocess.Popen:
        options = {"stderr": subprocess.PIPE, "text": True, "start_new_session": True}
        processes.append(subprocess.Popen(words, env=environment(**more), **options))
        return processes[-1]

    yield start
    for process in processes:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


def wait_for(condition, *processes: subprocess.Popen, seconds: float = 200) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        for process in processes:
            assert process.poll() is None, f"ended with {process.returncode} too early: {process.stderr.read()[-3000:]}"
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.005)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_ten_random_kills_of_the_command(work, undisturbed, tmp_path):
    """SIGKILL of the command and its loader's workers, half of the times while a checkpoint lies there unfinished."""
    seed = random.SystemRandom().randrange(2**32)
    draw, kills, midway, folders = random.Random(seed), 0, 0, [tmp_path / "run_0"]
    while True:
        out = folders[-1]
        words = line(work, out, "--dataloader_num_workers", str(draw.randrange(3)))
        process = subprocess.Popen(words, env=environment(), stderr=subprocess.DEVNULL, start_new_session=True)
        if kills < 10:
            # Most of a run is the start of Python: the clock is set when something can be seen.
            is_writing = kills % 2 == 0
            pattern = "_checkpoint-*.partial" if is_writing else "checkpoint-*"
            before = set() if is_writing else set(out.glob(pattern))
            while process.poll() is None and not set(out.glob(pattern)) - before:
                time.sleep(0.002)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(draw.uniform(0, 0.02 if is_writing else 0.3))
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                kills += 1
                midway += any(out.glob("_checkpoint-*"))
        status = process.wait(600)
        if status == -signal.SIGKILL:
            continue
        assert status == 0, f"seed {seed}: after {kills} kills"
        assert outcome(out) == undisturbed, f"seed {seed}: after {kills} kills"
        if kills == 10:
            break
        shutil.rmtree(out)
        folders.append(tmp_path / f"run_{len(folders)}")
    assert midway >= 2, f"seed {seed}: no checkpoint was being written"


# ------------------------------------------------------------------------------------------------------- real signals
LONG = ["--max_steps", "100000", "--lr_scheduler_type", "constant", "--warmup_steps", "0", "--save_strategy", "no"]
LONG += ["--logging_steps", "1"]


def stopped_step(out: Path) -> int:
    (checkpoint,) = out.glob("checkpoint-*")
    return int(checkpoint.name.removeprefix("checkpoint-"))


@pytest.mark.parametrize(
    ("number", "whom"),
    [(signal.SIGUSR1, "process"), pytest.param(signal.SIGTERM, "group", marks=pytest.mark.slow)],
)
def test_the_command_stops_for_a_requeue(work, tmp_path, start, number, whom):
    """In the group are the workers of the data loader, too: they must not die of it."""
    words = line(work, tmp_path, *LONG, "--dataloader_num_workers", "1")
    process = start(words)
    table = tmp_path / TRAIN_FILE
    wait_for(lambda: table.is_file() and len(table.read_text().splitlines()) > 4, process)
    (os.kill if whom == "process" else os.killpg)(process.pid, number)
    _, said = process.communicate(timeout=120)
    assert process.returncode == EXIT_STATUS == 75, said
    step = stopped_step(tmp_path)
    assert f"{number.name}: stopped after step {step} with" in said and "--resume_from_checkpoint auto" in said
    assert not (tmp_path / "README.md").exists(), "the run has not come to its end"
    more = ["--max_steps", str(step + 2)]
    assert run(command(work, tmp_path, *LONG, *more)) == 0
    assert run(command(work, tmp_path / "whole", *LONG, *more)) == 0
    assert (tmp_path / TRAIN_FILE).read_text() == (tmp_path / "whole" / TRAIN_FILE).read_text()
    weights = [(folder / "model.safetensors").read_bytes() for folder in (tmp_path, tmp_path / "whole")]
    assert weights[0] == weights[1]


@pytest.mark.parametrize("number", [signal.SIGUSR1, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_two_processes_of_which_one_is_told(work, tmp_path, start, number):
    """As a batch system starts them, without a launcher; the second process alone gets the signal."""
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    shared |= {"ACCELERATE_USE_CPU": "true"}
    words = line(work, tmp_path, *LONG, "--per_device_train_batch_size", "2")
    processes = [start(words, RANK=str(rank), LOCAL_RANK=str(rank), **shared) for rank in range(2)]
    table = tmp_path / TRAIN_FILE
    wait_for(lambda: table.is_file() and len(table.read_text().splitlines()) > 4, *processes)
    processes[1].send_signal(number)
    said = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [EXIT_STATUS, EXIT_STATUS], said
    step = stopped_step(tmp_path)
    assert f"{number.name}: stopped after step {step}" in said[0] and "stopped after" not in said[1]
    state = tmp_path / f"checkpoint-{step}"
    assert {"rng_state_0.pth", "rng_state_1.pth", "trainer_state.json"} <= {path.name for path in state.iterdir()}


# -------------------------------------------------------------------------------------------- the command's last words
def test_a_damaged_row_is_named_by_the_command(work, tmp_path, capsys):
    rows = [tiny_row(number) for number in range(8)]
    volume = bytearray(rows[5]["volume"])
    volume[len(volume) // 2] ^= 1
    rows[5]["volume"] = bytes(volume)
    write_tiny_split(tmp_path / "split", rows={"train": rows})
    words = [*command(work, tmp_path / "run"), "--data", str(tmp_path / "split"), "--streaming"]
    assert train_fvlm.main([*words, "--model.windows", "[{hu_min: -1150, hu_max: 350, mean: 0, std: 1}]"]) == 1
    said = capsys.readouterr().err
    assert (
        "error: row 5 (scan 'train_5_a', " in said
        and "train-00000-of-00001.parquet, row group 5) cannot be used" in said
    )
    assert "Traceback" not in said


def test_a_streamed_folder_gives_the_weights_of_a_local_one(work, undisturbed, tmp_path):
    assert run([*command(work, tmp_path), "--streaming"]) == 0
    assert outcome(tmp_path) == undisturbed


HUB_RUN = """
import json, os, subprocess, sys
from pathlib import Path
sys.path.insert(0, "tests")
from hub_stand_in import hub_stand_in
split, line = Path(sys.argv[1]), json.loads(sys.argv[2])
with hub_stand_in() as hub:
    files = {str(path.relative_to(split)): path.read_bytes() for path in split.rglob("*") if path.is_file()}
    first = hub.put_all("dataset", "owner/split", files)
    environment = {**os.environ, "HF_ENDPOINT": hub.endpoint}
    assert subprocess.run([*line, "--max_steps", "6"], env=environment).returncode == 0
    # Another commit, without a row of the first one.
    shard = "volumes/train-00000-of-00001.parquet"
    hub.put("dataset", "owner/split", shard, files["volumes/validation-00000-of-00001.parquet"])
    assert subprocess.run(line, env=environment).returncode == 0
    told = json.loads((Path(sys.argv[3]) / "run.json").read_text())
    assert told["data"]["data_revision"] == first, told["data"]
    print("bytes sent", hub.sent[shard], "of", len(files[shard]))
"""


@pytest.mark.slow
def test_a_streamed_run_stays_at_its_commit(work, undisturbed, tmp_path):
    """From a Hub over HTTP: the run goes on with the rows it began with, whatever was pushed in between."""
    constant = ["--lr_scheduler_type", "constant", "--warmup_steps", "0", "--data", "owner/split", "--streaming"]
    words = line(work, tmp_path / "run", *constant)
    arguments = [str(work / "split"), json.dumps(words), str(tmp_path / "run")]
    online = environment(HF_HUB_OFFLINE="0", HF_HOME=str(tmp_path / "home"), HF_HUB_DISABLE_XET="1")
    done = subprocess.run(
        [sys.executable, "-c", HUB_RUN, *arguments], env=online, cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert run(command(work, tmp_path / "whole", *constant[:4])) == 0
    found, expected = outcome(tmp_path / "run"), outcome(tmp_path / "whole")
    assert found["log"] == expected["log"] and found["table"] == expected["table"]
    assert found["model.safetensors"] == expected["model.safetensors"]
