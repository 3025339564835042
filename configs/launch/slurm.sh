#!/bin/bash
#SBATCH --job-name=pspg
#SBATCH --nodes=2
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=64
#SBATCH --requeue
# Train under SLURM, one torchrun a node:
#   sbatch configs/launch/slurm.sh --config configs/padchest108.yaml
# A job that is requeued goes on from its last checkpoint.
set -euo pipefail
MASTER=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
exec srun --kill-on-bad-exit=1 torchrun --nnodes="$SLURM_JOB_NUM_NODES" --nproc_per_node="${SLURM_GPUS_ON_NODE:-8}" \
    --rdzv_backend=c10d --rdzv_id="$SLURM_JOB_ID" --rdzv_endpoint="$MASTER:${PORT:-29500}" \
    -m pspg.engine train --resume latest "$@"
