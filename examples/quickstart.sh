#!/usr/bin/env bash
# The whole pipeline on this machine, in minutes: install, make a corpus out of the documentation
# that Python brings along, train an enlarged model, prune it on the way, print what came out.
#
#   bash examples/quickstart.sh
#   bash examples/quickstart.sh runs/short schedule.total_tokens=4e5
#
# The first argument is the run folder (default: $RUN_DIR, else runs/quickstart), the others are
# overrides of examples/configs/quickstart.yaml. Paths are relative to the repository's root.
# The same call again resumes an unfinished run.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

run_dir=${RUN_DIR:-runs/quickstart}
if [[ $# -gt 0 && $1 != *=* && $1 != -* ]]; then
    run_dir=$1
    shift
fi

bash examples/setup.sh
# Without the safe path, the folder kernels/ here would be importable under that name.
export PYTHONSAFEPATH=1
export PATH="${MEGATRON_IDEA_VENV:-$PWD/.venv}/bin:$PATH"

data=data/quickstart
if [[ ! -f $data/corpus.jsonl ]]; then
    megatron-idea corpus $data/corpus.jsonl
fi
if [[ ! -f $data/corpus_train.idx || ! -f $data/corpus_heldout.idx ]]; then
    megatron-idea tokenize $data/corpus.jsonl --out $data/corpus \
        --tokenizer $data/tokenizer.json --train-tokenizer 2048
fi

# The configuration asks for two tensor-parallel ranks: two processes, or two GPUs.
case $(python -c 'import torch; print(torch.cuda.device_count())') in
    0) ;;
    1) set -- training.precision=bf16 parallel.tensor_model_parallel_size=1 "$@" ;;
    *) set -- training.precision=bf16 "$@" ;;
esac

exec megatron-idea train examples/configs/quickstart.yaml run_dir="$run_dir" "$@"
