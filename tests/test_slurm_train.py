"""hub_configs/slurm/train.sh with stand-ins for SLURM's commands: what it starts, and when it asks for a requeue."""

import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "hub_configs" / "slurm" / "train.sh"
STAND_INS = {
    "scontrol": 'if [ "$1" = show ]; then printf "node1\\nnode2\\n"; else echo "$@" >> "$TOLD"; fi',
    # Two tasks; the status of all is the highest.
    "srun": """while [[ "$1" == --* ]]; do shift; done
        SLURM_PROCID=0 SLURM_LOCALID=0 "$@"; first=$?
        SLURM_PROCID=1 SLURM_LOCALID=1 "$@"; second=$?
        exit $((first > second ? first : second))""",
    "python": """echo "$RANK/$WORLD_SIZE on $MASTER_ADDR:$MASTER_PORT, $OMP_NUM_THREADS threads: $*" >> "$TOLD"
        exit $STATUS""",
}


@pytest.mark.parametrize("status", [0, 1, 75, 137])
def test_only_a_run_that_saved_itself_is_queued_again(tmp_path, status):
    for name, text in STAND_INS.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    told = tmp_path / "told"
    slurm = {"SLURM_JOB_ID": "12345", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_NTASKS": "2"}
    slurm |= {"SLURM_NTASKS_PER_NODE": "2", "SLURM_CPUS_PER_TASK": "8"}
    path = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "TOLD": str(told), "STATUS": str(status)}
    run = subprocess.run(["bash", str(SCRIPT), "--recipe", "full size"], env={**os.environ, **slurm, **path})
    assert run.returncode == status
    words = "train_fvlm.py --recipe full size --resume_from_checkpoint auto"
    expected = [f"{rank}/2 on node1:32345, 8 threads: {words}" for rank in range(2)]
    assert told.read_text().splitlines() == expected + (["requeue 12345"] if status == 75 else [])
