#!/bin/bash
# Train on a SLURM cluster, one process per GPU, and go on by itself after a time limit or a preemption.
#
#   sbatch hub_configs/slurm/train.sh --recipe full_size --data /data/processed --output_dir /data/run
#   sbatch --nodes=2 --gpus-per-node=8 --ntasks-per-node=8 hub_configs/slurm/train.sh ... (16 processes)
#
# --output_dir lies on a disk that all nodes share. The arguments are those of train_fvlm.py; sharding comes with
# --fsdp full_shard or --deepspeed FILE, not with a launcher: srun starts the processes itself, so that signals and exit
# statuses pass. Launchers and their configurations: train_many_nodes.sh.
#
# 300 seconds before the time limit every process gets SIGUSR1. The run finishes its step, writes a checkpoint and exits
# with status 75; the job is then put back into the queue, and goes on from there. Give it more seconds than a step and a
# checkpoint take together (organ_losses.csv and the log tell). A preemption sends SIGTERM, which does the same within
# the partition's grace time; SLURM requeues by itself then. Any other status is an error and is not tried again.

#SBATCH --job-name=fvlm-train
#SBATCH --nodes=1
#SBATCH --gpus-per-node=4
#SBATCH --ntasks-per-node=4
#SBATCH --cpus-per-task=8
#SBATCH --time=12:00:00
#SBATCH --signal=USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=train-%j.log

set -uo pipefail
export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
export OMP_NUM_THREADS=${SLURM_CPUS_PER_TASK:-1}

# `exec`: signals reach Python and no shell in between. When one process ends, the others have two minutes: srun's status
# is the highest, and one that srun killed at once would hide the 75.
srun --kill-on-bad-exit=0 --wait=120 bash -c '
    export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS LOCAL_WORLD_SIZE=$SLURM_NTASKS_PER_NODE
    exec python train_fvlm.py "$@" --resume_from_checkpoint auto
' train_fvlm "$@"
status=$?

if [ "$status" -eq 75 ]; then
    echo "stopped with a checkpoint: back into the queue"
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
