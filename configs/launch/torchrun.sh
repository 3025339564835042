#!/bin/bash
# Train with torchrun; arguments are those of `pspg-engine train`. Start it on every node.
#   one node:   GPUS=8 configs/launch/torchrun.sh --config configs/padchest108.yaml
#   two nodes:  NODES=2 GPUS=8 MASTER=node-a configs/launch/torchrun.sh --config configs/padchest108.yaml
set -euo pipefail
GPUS=${GPUS:-$(nvidia-smi --list-gpus | wc -l)}
if [ "${NODES:-1}" = 1 ]; then
    rendezvous=(--standalone)
else
    rendezvous=(--nnodes="$NODES" --rdzv_backend=c10d --rdzv_id=pspg --rdzv_endpoint="${MASTER:?the first node}:${PORT:-29500}")
fi
exec torchrun "${rendezvous[@]}" --nproc_per_node="$GPUS" -m pspg.engine train "$@"
