#!/bin/bash
# Prepare a data set on a SLURM cluster: many tasks, each with a part of the shards, then one that finishes the split.
#
#   sbatch --array=1-32 hub_configs/slurm/prepare.sh ct_rate --source /data/CT-RATE --out /data/processed
#   sbatch --dependency=afterok:JOBID --cpus-per-task=1 hub_configs/slurm/prepare.sh merge --out /data/processed
#
# JOBID is what the first command prints. --out lies on a disk that all nodes share; every shard has one owner, so
# nothing is locked. A task that is requeued goes on where it was stopped; `merge` names the shards that are missing.
# Only some tasks of the 32 again:
#   FVLM_TASKS=32 sbatch --array=7,9 hub_configs/slurm/prepare.sh ct_rate ... (the same options)
# The source may be remote: log in once on the head node (`hf auth login`), and set TMPDIR to a disk with room for a
# volume and its mask per worker. Other schedulers: give task I of N the same options and --shard I/N.

#SBATCH --job-name=fvlm-prepare
#SBATCH --cpus-per-task=8
#SBATCH --mem-per-cpu=1500M
#SBATCH --time=12:00:00
#SBATCH --requeue
#SBATCH --signal=B:TERM@120
#SBATCH --output=prepare-%A_%a.log

set -euo pipefail
export OMP_NUM_THREADS=1  # a worker is one process on one core

if [ "$1" = merge ]; then
    exec python -m data_builders "$@"
fi
# exec: the signal before the time limit then reaches the builder itself, which stops cleanly.
exec python -m data_builders "$@" \
    --shard "$SLURM_ARRAY_TASK_ID/${FVLM_TASKS:-$SLURM_ARRAY_TASK_COUNT}" --workers "$SLURM_CPUS_PER_TASK"
