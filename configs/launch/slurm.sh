#!/bin/bash
#SBATCH --job-name=pspg
#SBATCH --nodes=2
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --output=%x-%j.log
#SBATCH --requeue
# Train under SLURM, one torchrun a node, with all CPUs and GPUs of the nodes:
#   ACTIVATE=.venv/bin/activate sbatch --account=A --partition=P configs/launch/slurm.sh --config configs/padchest108.yaml
# ACTIVATE is a file to source on every node (modules, a virtual environment). Options of sbatch win over those above;
# SBATCH_ACCOUNT and SBATCH_PARTITION do as well. --dry_run prints what each rank would do.
# A job that is requeued goes on from its last checkpoint.
set -euo pipefail
if [ -n "${ACTIVATE:-}" ]; then
    set +u # many such files read variables that are not set
    source "$ACTIVATE"
    set -u
fi
MASTER=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
# Jobs that share a node do not share a port.
exec srun --kill-on-bad-exit=1 --cpus-per-task="$SLURM_CPUS_ON_NODE" torchrun \
    --nnodes="$SLURM_JOB_NUM_NODES" --nproc_per_node="${SLURM_GPUS_ON_NODE:-8}" --rdzv_backend=c10d \
    --rdzv_id="$SLURM_JOB_ID" --rdzv_endpoint="$MASTER:${PORT:-$((20000 + SLURM_JOB_ID % 20000))}" \
    -m pspg.engine train --resume latest "$@"
