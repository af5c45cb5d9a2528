#!/usr/bin/env bash
# What a first session on a GPU should do, in order of value: build, train, test, measure. Each part has
# a time of its own, and what it has printed and written stays whatever comes after it.
#
#   OUT=results bash benchmarks/first_hour.sh            # 25 minutes; one GPU
#   SMALL=1 OUT=results bash benchmarks/first_hour.sh    # the same parts on tiny shapes, anywhere
#
#   OUT          folder for everything: PART.log, summary.txt, JSON results, runs; a relative one
#                counts from the repository's root
#   MINUTES=25   of all parts together; parts for which no time is left are named
#   PARTS        some of them, with spaces between; default: all, in their order
#   PYTHON       default: that of .venv, else python3
# Needs what `bash examples/setup.sh --dev` installs, or a machine that has it; nothing is downloaded.
# It ends with status 1 if a part has failed. One that its time has stopped has not.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit

OUT=${OUT:-runs/first_hour}
MINUTES=${MINUTES:-25}
SMALL=${SMALL:-0}
venv=${MEGATRON_IDEA_VENV:-$PWD/.venv}
if [[ -x $venv/bin/python ]]; then PYTHON=${PYTHON:-$venv/bin/python}; fi
PYTHON=${PYTHON:-python3}
PARTS=${PARTS:-build doctor train tests one_gpu kernels compare}
mkdir -p "$OUT" && OUT=$(cd "$OUT" && pwd) || exit
# Unbuffered: what a part has printed is in its log when it is killed.
export PYTHONSAFEPATH=1 PYTHONUNBUFFERED=1
idea() { "$PYTHON" -W ignore -m megatron_idea "$@"; }

small=()
config=examples/configs/2p8b_to_1p3b.yaml
if ((SMALL)); then
    config=examples/configs/quickstart.yaml
    small=(model.num_layers=2 model.hidden_size=32 model.ffn_hidden_size=128 model.kv_channels=8
        model.vocab_size=264 prune.target.ffn_hidden_size=48 training.seq_length=32)
fi

# ---- parts ----------------------------------------------------------------------------------------

build() { # the C++ extension, and what is here
    timeout 20 nvidia-smi 2>/dev/null || echo "no nvidia-smi here"
    "$PYTHON" -m pip install --no-deps --no-build-isolation -e . &&
        "$PYTHON" -c 'import megatron_idea._C; print("megatron_idea._C is built")'
}

doctor() { idea doctor; }

# A corpus of bytes, for the parts that train: the sources of Python's own library.
corpus() {
    [[ -f $OUT/data/corpus_train.idx && -f $OUT/data/corpus_heldout.idx ]] ||
        { idea corpus "$OUT/data/corpus.jsonl" &&
            idea tokenize "$OUT/data/corpus.jsonl" --out "$OUT/data/corpus" --tokenizer byte; }
}
data=("data.train=[{prefix: '$OUT/data/corpus_train'}]"
    "data.validation=[{prefix: '$OUT/data/corpus_heldout'}]")

# The whole way in one process over NCCL: bf16, all compactions, resumed once, evaluated, exported.
train() {
    local run=$OUT/train steps=400 checkpoints
    ((SMALL)) && steps=24
    corpus || return
    local settings=(run_dir="$run" "${data[@]}" data.tokenizer=byte model.vocab_size=264
        parallel.tensor_model_parallel_size=1 training.precision=bf16 evaluation.every_tokens=0
        "evaluation.sample_prompts=[]" schedule.prune_warmup_fraction=0.3 "${small[@]}")
    local batch=$((4 * 256))
    ((SMALL)) && batch=$((4 * 32))
    settings+=(schedule.total_tokens=$((steps * batch)))
    local call=(train examples/configs/quickstart.yaml "${settings[@]}" --nproc 1)
    idea "${call[@]}" || return
    checkpoints=("$run"/checkpoints/step_*)
    rm -r "${checkpoints[-1]}" # the one before it is of the end of the prune phase
    rm -rf "$OUT/export"       # of an earlier call
    idea "${call[@]}" && idea evaluate "$run" && idea export "$run" "$OUT/export"
}

tests() { # those that need a GPU; without one they are skipped
    # A file whose packages are not here must not keep the others from being run.
    "$PYTHON" -m pytest -v -n0 -m gpu -p no:cacheprovider --continue-on-collection-errors tests
    local status=$?
    ((status == 5 || status == 0)) # 5: none was selected
}

one_gpu() { # MFU of both sizes at sequence length 4096, Transformer Engine on and off, one compaction
    local rounds=10
    ((SMALL)) && rounds=2
    "$PYTHON" -W ignore benchmarks/one_gpu.py "$config" "${small[@]}" --rounds "$rounds" \
        --trace "$OUT/step.trace.json" --json "$OUT/one_gpu.json"
}

kernels() {
    local options=(--json "$OUT/kernels.json")
    ((SMALL)) && options=(--quick)
    "$PYTHON" -W ignore benchmarks/kernels.py "${options[@]}"
}

compare() { # a comparison of runs, as far as the time goes: the same call goes on
    local options=(--parallel 4) # such models leave a GPU idle most of the time
    ((SMALL)) && options=(--seeds 0 schedule.total_tokens=262144 evaluation.every_tokens=0)
    corpus || return
    idea compare examples/suites/laptop.yaml --out "$OUT/laptop" "${options[@]}" "${data[@]}"
}

if (($#)); then
    # Not at once: while what it has called does not end, timeout is still there to kill that.
    trap 'exit 143' TERM
    case $1 in
        build) build ;;
        doctor) doctor ;;
        train) train ;;
        tests) tests ;;
        one_gpu) one_gpu ;;
        kernels) kernels ;;
        compare) compare ;;
        *) echo "first_hour: no part is called $1" >&2 && exit 2 ;;
    esac
    exit
fi

# ---- one after the other --------------------------------------------------------------------------

declare -A limit_s=([build]=180 [doctor]=120 [train]=300 [tests]=300 [one_gpu]=400 [kernels]=500
    [compare]=900)
grace_s=30 # to save and leave after SIGTERM, before SIGKILL
end=$((SECONDS + MINUTES * 60 - grace_s)) failed=0
: >"$OUT/summary.txt"
note() { printf '%-9s %s\n' "$1" "$2" | tee -a "$OUT/summary.txt"; }

export OUT SMALL PYTHON
set -m # else what is begun by & ignores SIGINT, and so would the programs that tests interrupt
# timeout has a process group of its own, which Ctrl-C does not reach.
trap 'kill "$!" 2>/dev/null; wait; exit 130' INT TERM
for part in $PARTS; do
    left=$((end - SECONDS)) begin=$SECONDS
    if ((left < 20)); then
        note "$part" "no time left"
        continue
    fi
    seconds=$((${limit_s[$part]:-60} < left ? ${limit_s[$part]:-60} : left))
    timeout --kill-after="$grace_s" "$seconds" bash benchmarks/first_hour.sh "$part" \
        >"$OUT/$part.log" 2>&1 </dev/null &
    wait "$!"
    status=$? took=$((SECONDS - begin))
    if ((status == 0)); then
        note "$part" "done in $took s"
    elif ((took >= seconds)); then
        note "$part" "stopped after $seconds s; what it had until then is kept"
    else
        note "$part" "failed with status $status after $took s: $OUT/$part.log"
        failed=1
    fi
done
exit "$failed"
