#!/bin/bash
# Train with the deepspeed launcher, which logs in to the nodes of a hostfile by ssh (lines such as "node-a slots=8").
#   HOSTFILE=hosts configs/launch/deepspeed.sh --config configs/padchest108.yaml
set -euo pipefail
exec deepspeed --hostfile="${HOSTFILE:?lines of node and slots}" --master_port="${PORT:-29500}" \
    --module --no_local_rank pspg.engine train "$@"
