#!/usr/bin/env bash
# A family from one trajectory: a trunk that shrinks at a constant learning rate, and for each size a
# short branch that anneals from the checkpoint where the trunk has come to it, while the trunk goes on.
#
#   CONFIG=my_trunk.yaml SIZES=2.0e9,1.6e9 bash examples/family.sh [--dry-run] [key.sub=value ...]
#
#   CONFIG       the trunk: schedule.lr_decay_style WSD, and checkpoints that are kept
#                (checkpoint.every_tokens, keep_every_tokens); default: examples/configs/family.yaml
#   SIZES        parameters of the branches, with commas between, largest first; the trunk itself ends
#                with the smallest model, that of its prune.target; default: 2.4e9,2.0e9,1.6e9
#   COOLDOWN=0.1 tokens of a branch, as a share of those that the trunk had consumed
#
# Everything else is launch.sh's: Slurm or this machine's GPUs. The same call again starts those
# branches whose checkpoint is there by now, and leaves alone what has a run folder already.
# --dry-run prints what would be started.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

export CONFIG=${CONFIG:-examples/configs/family.yaml}
sizes=${SIZES:-2.4e9,2.0e9,1.6e9}
dry_run=0
overrides=()
for argument in "$@"; do
    if [[ $argument == --dry-run ]]; then dry_run=1; else overrides+=("$argument"); fi
done

export PYTHONSAFEPATH=1
venv=${MEGATRON_IDEA_VENV:-$PWD/.venv}
if [[ -x $venv/bin/megatron-idea ]]; then export PATH="$venv/bin:$PATH"; fi
command -v megatron-idea >/dev/null || bash examples/setup.sh
export PATH="$venv/bin:$PATH"

branches=$(python examples/family.py "$CONFIG" --sizes "$sizes" --cooldown "${COOLDOWN:-0.1}" \
    "${overrides[@]}")

value() { # KEY: of the branch's overrides
    printf '%s\n' "${of_branch[@]}" | sed -n "s/^$1=//p"
}

call() { # OVERRIDE...: as one would type it
    printf 'CONFIG=%q bash examples/launch.sh' "$CONFIG"
    if (($#)); then printf ' %q' "$@"; fi
}

start() { # RUN_DIR OVERRIDE...: unless it is there already
    local run_dir=$1
    shift
    if [[ -e $run_dir ]]; then
        echo "family: $run_dir is there: $(call "$@") goes on with it" >&2
    elif ((dry_run)); then
        call "$@"
        echo
    else
        bash examples/launch.sh "$@" </dev/null # the loop below reads its lines from there
    fi
}

# A checkpoint is complete when its state is there; which one a branch begins at is for train to say.
reached() { # RUN@TOKENS
    python - "$1" <<'PYTHON'
import sys

from megatron_idea.checkpoint.branch import named
from megatron_idea.errors import UserError

try:
    named(sys.argv[1])
except UserError:
    sys.exit(1)
PYTHON
}

trunk=$(megatron-idea train "$CONFIG" --dry-run "${overrides[@]}" | sed -n 's/^run_dir: //p')
start "$trunk" "${overrides[@]}"
while IFS=$'\t' read -r -a of_branch; do
    size=${of_branch[0]}
    of_branch=("${of_branch[@]:1}")
    if ((dry_run)) || reached "$(value start_from)"; then
        start "$(value run_dir)" "${overrides[@]}" "${of_branch[@]}"
    else
        echo "family: the trunk has not come to $size yet: call this again" >&2
    fi
done <<<"$branches"
