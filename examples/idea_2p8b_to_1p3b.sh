#!/usr/bin/env bash
# IDEA Prune at the scale of the paper's main experiment: 2.8B parameters trained, 1.3B shipped.
#
#   bash examples/idea_2p8b_to_1p3b.sh --dry-run
#   PARTITION=gpu ACCOUNT=me bash examples/idea_2p8b_to_1p3b.sh \
#       data.tokenizer=data/tokenizer.json 'data.train=[{prefix: data/web_train}]'
#
# Submits itself to Slurm; on a machine with GPUs and without Slurm it trains there; elsewhere it
# prints the plan. All variables are launch.sh's; those below differ from its defaults.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

export CONFIG=${CONFIG:-examples/configs/2p8b_to_1p3b.yaml}
if command -v sbatch >/dev/null || ! nvidia-smi -L >/dev/null 2>&1; then
    export NODES=${NODES:-32}
    export NPROC_PER_NODE=${NPROC_PER_NODE:-8} # 256 GPUs: TP 2 x DP 128
fi

exec bash examples/launch.sh "$@"
