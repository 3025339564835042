#!/bin/bash
# Train with torchrun; arguments are those of `pspg-engine train`. Start it on every node.
#   one node:   GPUS=8 configs/launch/torchrun.sh --config configs/padchest108.yaml
#   two nodes:  NODES=2 GPUS=8 MASTER=node-a configs/launch/torchrun.sh --config configs/padchest108.yaml
# --dry_run prints what each rank would do. PORT (29500) and RUN (pspg) are the same on all nodes, and each run has its own;
# ADDRESS is that of this node, where the others cannot reach it by its name.
set -euo pipefail
GPUS=${GPUS:-$(nvidia-smi --list-gpus 2> /dev/null | wc -l || true)}
if [ "$GPUS" = 0 ]; then
    echo "torchrun.sh: GPUS: nvidia-smi lists none; give the processes of a node" >&2
    exit 2
fi
if [ "${NODES:-1}" = 1 ]; then
    rendezvous=(--standalone)
else
    rendezvous=(--nnodes="$NODES" --rdzv_backend=c10d --rdzv_id="${RUN:-pspg}" ${ADDRESS:+--local_addr="$ADDRESS"}
        --rdzv_endpoint="${MASTER:?the first node}:${PORT:-29500}")
fi
exec torchrun "${rendezvous[@]}" --nproc_per_node="$GPUS" -m pspg.engine train "$@"
