#!/bin/bash
# Train with the deepspeed launcher, which logs in to the nodes of a hostfile by ssh (lines such as "node-a slots=8").
#   HOSTFILE=hosts configs/launch/deepspeed.sh --config configs/padchest108.yaml
# Without ssh, start it on every node with its line in the hostfile, from 0, and the address of the first:
#   HOSTFILE=hosts NODE_RANK=1 MASTER=node-a configs/launch/deepspeed.sh --config configs/padchest108.yaml
# --dry_run prints what each rank would do. Each run has a PORT (29500) of its own.
set -euo pipefail
if [ -n "${NODE_RANK:-}" ]; then
    login=(--no_ssh --node_rank="$NODE_RANK" --master_addr="${MASTER:?the first node}")
fi
exec deepspeed --hostfile="${HOSTFILE:?lines of node and slots}" --master_port="${PORT:-29500}" ${login[@]+"${login[@]}"} \
    --module --no_local_rank pspg.engine train "$@"
