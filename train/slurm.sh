#!/bin/bash
# Trains a recipe on several machines under SLURM. Change the four numbers, then:
#   sbatch train/slurm.sh RECIPE [KEY=VALUE ...]
# The same command again goes on where the run was: requeue it freely.
#SBATCH --job-name=mmlm
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=B:TERM@300

set -euo pipefail

head_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export OMP_NUM_THREADS=4

# One launcher on each machine; five minutes before the end SLURM sends TERM, upon which the
# run ends its step, saves and stops. `--out` must be on a disk that all machines share.
srun torchrun \
    --nnodes "$SLURM_JOB_NUM_NODES" \
    --nproc-per-node "$SLURM_GPUS_ON_NODE" \
    --rdzv-id "$SLURM_JOB_ID" \
    --rdzv-backend c10d \
    --rdzv-endpoint "$head_node:29500" \
    -m mmlm train "$@" &
trap 'kill -TERM $!' TERM
wait $! || wait $!
