#!/bin/bash
# Prepare a data set on a SLURM cluster: many tasks, each with a part of the shards, then one that finishes the split.
#
#   sbatch --array=1-32 hub_configs/slurm/prepare.sh ct_rate --source /data/CT-RATE --out /data/processed
#   sbatch --dependency=afterok:JOBID --cpus-per-task=1 hub_configs/slurm/prepare.sh merge --out /data/processed
#
# JOBID is what the first command prints. --out lies on a disk that all nodes share; every shard has one owner, so
# nothing is locked. A task that is requeued goes on where it was stopped. One that ran out of time, or whose source
# went away, ends with status 2, and the merge waits for it: submit the first command again (what is finished stays),
# then the second. `merge` compares the sha256 of every shard, and names those that are missing or damaged.
# Only some tasks of the 32 again:
#   FVLM_TASKS=32 sbatch --array=7,9 hub_configs/slurm/prepare.sh ct_rate ... (the same options)
# A file that was broken and has been fetched again: both commands once more; only its shard is built.
#
# All nodes run one environment: shards of other versions of pyarrow or zstandard are refused, as their bytes differ.
# Hashed ids (the default of `folder`): the first task writes the salt beside --out, as OUT.salt, and the others take it.
# Tasks that cannot share --out (merge --out SPLIT PART PART ...) need one --id_salt FILE on a disk that they share:
# under other salts they have other ids and other shards, and all their work is for nothing.
# The source may be remote: log in once on the head node (`hf auth login`), and set TMPDIR to a disk with room for a
# volume and its mask per worker. The commit is that of the first task; name one (--source ...@COMMIT) where tasks do
# not share --out. Other schedulers: give task I of N the same options and --shard I/N.

#SBATCH --job-name=fvlm-prepare
#SBATCH --cpus-per-task=8
#SBATCH --mem-per-cpu=1500M
#SBATCH --time=12:00:00
#SBATCH --requeue
#SBATCH --signal=B:TERM@120
#SBATCH --output=prepare-%A_%a.log

set -euo pipefail
export OMP_NUM_THREADS=1  # a worker is one process on one core

if [ "${1:?name a builder and its options}" = merge ]; then
    exec python -m data_builders "$@"
fi
# exec: the signal before the time limit then reaches the builder itself, which stops cleanly.
exec python -m data_builders "$@" \
    --shard "${SLURM_ARRAY_TASK_ID:?submit an array, sbatch --array=1-32}/${FVLM_TASKS:-$SLURM_ARRAY_TASK_COUNT}" --workers "$SLURM_CPUS_PER_TASK"
