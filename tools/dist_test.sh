#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Evaluate on the GPUs of one node or more: tools/dist_test.sh CONFIG CHECKPOINT GPUS [--out ...]
# On several nodes run it on each with NNODES, NODE_RANK and MASTER_ADDR set (and PORT, if taken).
set -euo pipefail
if [ $# -lt 3 ]; then
    echo "usage: $0 CONFIG CHECKPOINT GPUS [options of test.py]" >&2
    exit 2
fi

PROCESSES="${3}"
export PYTHONPATH="$(dirname "$0")/..:${PYTHONPATH:-}"
exec python -m torch.distributed.run \
    --nnodes="${NNODES:-1}" \
    --node_rank="${NODE_RANK:-0}" \
    --nproc_per_node="$PROCESSES" \
    --master_addr="${MASTER_ADDR:-127.0.0.1}" \
    --master_port="${PORT:-29500}" \
    "$(dirname "$0")/test.py" "$1" "$2" --launcher pytorch "${@:4}"
