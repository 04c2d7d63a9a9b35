#!/bin/sh
# Several nodes without a scheduler: run this on each, with the same first node.
#   FIRST_NODE=10.0.0.1 NODES=4 GPUS=8 rethinker/recipes/launch/torchrun.sh qwen2_5_vl_32b --run.name stage1
# After a lost rank all ranks start again from the newest checkpoint; run.dir must be a folder that all nodes share.
set -eu
recipe=${1:?name a recipe, as qwen2_5_vl_32b}
shift
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 # a store of its own for every start: no addresses of dead ranks
exec torchrun --nnodes "${NODES:-1}" --nproc-per-node "${GPUS:-8}" --max-restarts 3 \
    --rdzv-backend c10d --rdzv-endpoint "${FIRST_NODE:-localhost}:29500" --rdzv-id "${RUN_ID:-rethinker}" \
    -m rethinker train "$recipe" --resume auto "$@"
