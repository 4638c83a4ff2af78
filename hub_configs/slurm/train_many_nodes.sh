#!/bin/bash
# Train on several nodes of a SLURM cluster: one task per node, whose launcher starts one process per GPU. For the
# launcher's configurations, sharding above all; without them train.sh serves several nodes as well.
#
#   sbatch --nodes=2 --gpus-per-node=4 hub_configs/slurm/train_many_nodes.sh \
#       --recipe full_size --data /data/split --output_dir /runs/first --bf16
#
# The options are those of train_fvlm.py; --output_dir and the environment lie on a disk that all nodes share. Patients
# are contrasted over all GPUs of all nodes: the first line of the log says how many. The configuration is four_gpus.yaml
# or FVLM_ACCELERATE=hub_configs/accelerate/fsdp2.yaml (zero1.yaml, zero3.yaml); its number of processes is not used.
#
# Five minutes before the time limit every process is told to stop. The run then writes a checkpoint, the job goes back
# into the queue, and goes on from there: with `--time=01:00:00` as well as with a day. A step and a checkpoint must fit
# into these minutes (--signal). A job that fails by itself is not started again.

#SBATCH --job-name=fvlm-train
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=B:USR1@300
#SBATCH --open-mode=append
#SBATCH --output=train-%j.log

set -euo pipefail

first_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
gpus=${SLURM_GPUS_ON_NODE:?ask for GPUs with --gpus-per-node}
export OMP_NUM_THREADS=$((SLURM_CPUS_PER_TASK > gpus ? SLURM_CPUS_PER_TASK / gpus : 1))

is_stopping=
stop() {
    trap '' USR1
    is_stopping=yes
    scancel --signal=USR1 "$SLURM_JOB_ID"  # the processes of all nodes, not this shell
}
trap stop USR1

# Expanded on each node: its number in the job, and the launcher deaf to signals that are for the processes it started.
launch='trap "" USR1 TERM; exec accelerate launch --machine_rank "$SLURM_NODEID" "$@"'
srun bash -c "$launch" launch \
    --config_file "${FVLM_ACCELERATE:-hub_configs/accelerate/four_gpus.yaml}" \
    --num_machines "$SLURM_NNODES" --num_processes "$((SLURM_NNODES * gpus))" \
    --main_process_ip "$first_node" --main_process_port "$((20000 + SLURM_JOB_ID % 20000))" \
    --deepspeed_multinode_launcher standard \
    train_fvlm.py "$@" --resume_from_checkpoint auto &
training=$!

status=0
wait "$training" || status=$?
if [ -n "$is_stopping" ]; then  # the signal ended the first wait, not the training
    status=0
    wait "$training" || status=$?
    if [ "$status" -ne 0 ]; then
        exec scontrol requeue "$SLURM_JOB_ID"
    fi
fi
exit "$status"
