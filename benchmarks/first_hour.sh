#!/usr/bin/env bash
# What a first session on a GPU should do, in order of value: build, test, train, measure. Each part has
# a time of its own, and what it has printed and written stays whatever comes after it.
#
#   OUT=results bash benchmarks/first_hour.sh            # 25 minutes; one GPU
#   SMALL=1 OUT=results bash benchmarks/first_hour.sh    # the same parts on tiny shapes, anywhere
#
#   OUT          folder for everything: PART.log, summary.txt, JSON results, runs
#   MINUTES=25   of all parts together; parts for which no time is left are named
#   PARTS        some of them, with spaces between; default: all, in their order
#   PYTHON=python
# Needs what examples/setup.sh installs, or an image that has it (the Dockerfile); nothing is
# downloaded. It ends with status 0 if every part that was begun has succeeded.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit

OUT=${OUT:-runs/first_hour}
MINUTES=${MINUTES:-25}
SMALL=${SMALL:-0}
PYTHON=${PYTHON:-python}
PARTS=${PARTS:-build doctor train tests one_gpu kernels compare}
mkdir -p "$OUT"
OUT=$(cd "$OUT" && pwd)
export PYTHONSAFEPATH=1
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
    "$PYTHON" -m pip install --no-deps --no-build-isolation -e . || return
    "$PYTHON" -c 'import megatron_idea._C; print("megatron_idea._C is built")'
    nvidia-smi 2>/dev/null || echo "no nvidia-smi here"
}

doctor() { idea doctor; }

# The whole way in one process over NCCL: bf16, all compactions, resumed once, evaluated, exported.
train() {
    local data=$OUT/data run=$OUT/train steps=400
    ((SMALL)) && steps=24
    idea corpus "$data/corpus.jsonl" &&
        idea tokenize "$data/corpus.jsonl" --out "$data/corpus" --tokenizer byte || return
    local settings=(run_dir="$run" data.tokenizer=byte "data.train=[{prefix: $data/corpus_train}]"
        "data.validation=[{prefix: $data/corpus_heldout}]" model.vocab_size=264
        parallel.tensor_model_parallel_size=1 training.precision=bf16 evaluation.every_tokens=0
        "evaluation.sample_prompts=[]" schedule.prune_warmup_fraction=0.3 "${small[@]}")
    local batch=$((4 * 256))
    ((SMALL)) && batch=$((4 * 32))
    settings+=(schedule.total_tokens=$((steps * batch)))
    idea train examples/configs/quickstart.yaml "${settings[@]}" --nproc 1 &&
        idea evaluate "$run" && idea export "$run" "$OUT/export"
}

tests() { # those that need a GPU; without one they are skipped
    "$PYTHON" -m pytest -q -n0 -m gpu -p no:cacheprovider tests
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
    local options=()
    ((SMALL)) && options=(--quick)
    "$PYTHON" -W ignore benchmarks/kernels.py "${options[@]}" || return
    cp -p benchmarks/results/kernels-* "$OUT" 2>/dev/null || echo "no result was kept"
}

compare() { # a comparison of runs, as far as the time goes: the same call goes on
    local options=()
    ((SMALL)) && options=(--seeds 0 schedule.total_tokens=131072 evaluation.every_tokens=0)
    mkdir -p data/micro
    if [[ ! -f data/micro/corpus_train.idx ]]; then
        idea corpus data/micro/corpus.jsonl &&
            idea tokenize data/micro/corpus.jsonl --out data/micro/corpus --tokenizer byte || return
    fi
    idea compare examples/suites/laptop.yaml --out "$OUT/laptop" "${options[@]}"
}

case ${1:-} in
    "") ;;
    build) build ;;
    doctor) doctor ;;
    train) train ;;
    tests) tests ;;
    one_gpu) one_gpu ;;
    kernels) kernels ;;
    compare) compare ;;
    *)
        echo "first_hour: no part is called $1" >&2
        exit 2
        ;;
esac
status=$?
if (($#)); then exit "$status"; fi

# ---- one after the other --------------------------------------------------------------------------

declare -A limit_s=([build]=180 [doctor]=120 [train]=300 [tests]=300 [one_gpu]=400 [kernels]=500
    [compare]=900)
end=$((SECONDS + MINUTES * 60)) failed=0
: >"$OUT/summary.txt"
note() { printf '%-9s %s\n' "$1" "$2" | tee -a "$OUT/summary.txt"; }

export OUT SMALL PYTHON
for part in $PARTS; do
    left=$((end - SECONDS)) begin=$SECONDS
    if ((left < 20)); then
        note "$part" "no time left"
        continue
    fi
    seconds=$((${limit_s[$part]:-60} < left ? ${limit_s[$part]:-60} : left))
    timeout --kill-after=30 "$seconds" bash benchmarks/first_hour.sh "$part" >"$OUT/$part.log" 2>&1
    status=$?
    case $status in
        0) note "$part" "done in $((SECONDS - begin)) s" ;;
        124 | 137) note "$part" "stopped after $seconds s; what it had until then is kept" ;;
        *)
            note "$part" "failed with status $status after $((SECONDS - begin)) s: $OUT/$part.log"
            failed=1
            ;;
    esac
done
exit "$failed"
