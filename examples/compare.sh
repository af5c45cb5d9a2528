#!/usr/bin/env bash
# Does it help? Trains the arms of a suite on this machine, resumes what was interrupted, and says with
# error bars which is better.
#
#   bash examples/compare.sh                                       # examples/suites/laptop.yaml
#   bash examples/compare.sh examples/suites/methods.yaml --parallel 2
#
# Arguments are those of `megatron-idea compare`; paths count from the repository's root. Suites on
# examples/configs/micro.yaml read the text that every Python brings along, as bytes: it is made here.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash examples/setup.sh
# Without the safe path, the folder kernels/ here would be importable under that name.
export PYTHONSAFEPATH=1
export PATH="${MEGATRON_IDEA_VENV:-$PWD/.venv}/bin:$PATH"

data=data/micro
if [[ ! -f $data/corpus.jsonl ]]; then
    megatron-idea corpus $data/corpus.jsonl
fi
if [[ ! -f $data/corpus_train.idx || ! -f $data/corpus_heldout.idx ]]; then
    megatron-idea tokenize $data/corpus.jsonl --out $data/corpus --tokenizer byte
fi

if (($# == 0)); then set -- examples/suites/laptop.yaml; fi
exec megatron-idea compare "$@"
