"""hub_configs/slurm/prepare.sh with a stand-in for Python: which part of the build a task of the array is given."""

import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "hub_configs" / "slurm" / "prepare.sh"
ARRAY = {"SLURM_ARRAY_TASK_ID": "7", "SLURM_ARRAY_TASK_COUNT": "32", "SLURM_CPUS_PER_TASK": "8"}
BUILD = ["ct_rate", "--source", "/data/CT RATE", "--out", "out"]
COMMAND = "1 thread: -m data_builders ct_rate --source /data/CT RATE --out out"


def run(tmp_path, arguments, **slurm) -> subprocess.CompletedProcess:
    (tmp_path / "python").write_text('#!/bin/bash\necho "$OMP_NUM_THREADS thread: $*"\nexit 2\n')
    (tmp_path / "python").chmod(0o755)
    others = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    environment = {**others, "PATH": f"{tmp_path}:{os.environ['PATH']}", **slurm}
    return subprocess.run(["bash", str(SCRIPT), *arguments], env=environment, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("arguments", "slurm", "told"),
    [
        (BUILD, ARRAY, f"{COMMAND} --shard 7/32 --workers 8"),
        (BUILD, {**ARRAY, "SLURM_ARRAY_TASK_COUNT": "2", "FVLM_TASKS": "32"}, f"{COMMAND} --shard 7/32 --workers 8"),
        (["merge", "--out", "out"], {}, "1 thread: -m data_builders merge --out out"),
    ],
)
def test_a_task_builds_its_part(tmp_path, arguments, slurm, told):
    done = run(tmp_path, arguments, **slurm)
    assert done.stdout.strip() == told and done.returncode == 2, "the status of the builder is that of the task"


def test_a_job_that_is_no_array_says_how_to_submit_one(tmp_path):
    done = run(tmp_path, BUILD, SLURM_CPUS_PER_TASK="8")
    assert done.returncode != 0 and not done.stdout and "sbatch --array=1-32" in done.stderr
