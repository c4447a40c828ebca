#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Train under Slurm: GPUS=16 tools/slurm_train.sh PARTITION JOB_NAME CONFIG WORK_DIR
# GPUS (8) is the number of processes, GPUS_PER_NODE (8), CPUS_PER_TASK (5) and SRUN_ARGS as for srun.
set -euo pipefail
if [ $# -lt 4 ]; then
    echo "usage: $0 PARTITION JOB_NAME CONFIG WORK_DIR [options of train.py]" >&2
    exit 2
fi

export PYTHONPATH="$(dirname "$0")/..:${PYTHONPATH:-}"
read -ra SRUN_OPTIONS <<< "${SRUN_ARGS:-}"
exec srun \
    --partition="$1" \
    --job-name="$2" \
    --gres=gpu:"${GPUS_PER_NODE:-8}" \
    --ntasks="${GPUS:-8}" \
    --ntasks-per-node="${GPUS_PER_NODE:-8}" \
    --cpus-per-task="${CPUS_PER_TASK:-5}" \
    --kill-on-bad-exit=1 \
    ${SRUN_OPTIONS[@]+"${SRUN_OPTIONS[@]}"} \
    python -u "$(dirname "$0")/train.py" "$3" --work-dir "$4" --launcher slurm "${@:5}"
