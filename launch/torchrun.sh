#!/usr/bin/env bash
# Start k2train on the GPUs of this node, or as one of NUM_NODES nodes.
#
#   launch/torchrun.sh experiment=laptop                                  one node
#   NUM_NODES=32 NODE_RANK=$i HEAD_NODE=node0 launch/torchrun.sh experiment=k2 layout.nodes=32
#
# NUM_NODES   nodes of the run (1)            NODE_RANK   this node's number, from 0 (0)
# HEAD_NODE   host of node 0 (localhost)      HEAD_PORT   a free port on it (29400)
# RANKS       ranks a node (one a GPU; 4 where there is none)
set -euo pipefail

# shellcheck source=launch/started_by.sh
source "$(dirname "${BASH_SOURCE[0]}")/started_by.sh"
NODE=""
# Each node has its own number, so the line that every node is started by again cannot hold one.
# shellcheck disable=SC2016
[[ "${NUM_NODES:-1}" -eq 1 ]] || NODE='NODE_RANK=$i '
started_by "$NODE$0"

if [[ -z "${RANKS:-}" ]]; then
  RANKS=$({ nvidia-smi --list-gpus 2>/dev/null || true; } | wc -l)
  [[ "$RANKS" -gt 0 ]] || RANKS=4
fi

# shellcheck source=launch/env.sh
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
# One intra-op thread a rank: ranks share the cores.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
# A mistake in the config is told once and ends with status 2, before any rank has started.
WORLD_SIZE=$((${NUM_NODES:-1} * RANKS)) python -m k2train train --check "$@"
exec torchrun \
  --nnodes="${NUM_NODES:-1}" --node-rank="${NODE_RANK:-0}" --nproc-per-node="$RANKS" \
  --rdzv-backend=c10d --rdzv-id="${RUN_ID:-k2train}" --rdzv-endpoint="${HEAD_NODE:-localhost}:${HEAD_PORT:-29400}" \
  -m k2train train "$@"
