#!/usr/bin/env bash
# Installs this repository, editable, into .venv; does nothing when that is up to date.
#
#   bash examples/setup.sh          what the examples need
#   bash examples/setup.sh --dev    and what tests/run.sh needs
#
# PYTHON               interpreter to build on; default: the first fitting one on PATH
# MEGATRON_IDEA_VENV   where to install; default: .venv
#
# With an NVIDIA GPU the torch of that interpreter is used and never replaced. Without one the CPU
# build is installed first and held there: pip would otherwise bring the newest CUDA build.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

TORCH=2.13.0 # installed where the interpreter brings none
venv=${MEGATRON_IDEA_VENV:-.venv}
newest_core="$venv/megatron-core-newest"
case ${1:-} in
    "") extra="" ;;
    --dev) extra="[dev]" ;;
    *) echo "usage: bash examples/setup.sh [--dev]" >&2 && exit 2 ;;
esac

has_gpu() { nvidia-smi -L >/dev/null 2>&1; }

# step WHAT COMMAND...: one line with the seconds it took; the command's output only if it fails.
step() {
    local what=$1 start=$SECONDS output
    shift
    if ! output=$("$@" 2>&1); then
        printf '%s\nsetup: failed: %s\n' "$output" "$what" >&2
        return 1
    fi
    printf 'setup: %-50s %4d s\n' "$what" "$((SECONDS - start))"
}

pick_python() {
    # The CPU build of torch is offered for 3.11 wherever we looked, for newer ones not everywhere.
    local candidates=(python3.11 python3.12 python3) candidate
    if has_gpu; then candidates=(python3 python3.12 python3.11); fi
    if [[ -n ${PYTHON:-} ]]; then candidates=("$PYTHON"); fi
    for candidate in "${candidates[@]}"; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "setup: needs Python 3.11 or newer, tried ${candidates[*]}; set PYTHON=<path>" >&2
    return 1
}

make_venv() {
    local python options=("$venv")
    python=$(pick_python)
    if has_gpu && "$python" -c 'import torch; assert torch.version.cuda' 2>/dev/null; then
        options+=(--system-site-packages)
    fi
    step "$venv on $("$python" -V)" "$python" -m venv "${options[@]}"
}

# Modules are compiled when they are first imported, and most never are: half of what pip would take.
# Where Python may not write down what it has compiled, it would do so in every process.
compile=(--no-compile)
if [[ -n ${PYTHONDONTWRITEBYTECODE:-} ]]; then compile=(--compile); fi
install() { PIP_CONSTRAINT="" "$venv/bin/python" -m pip install --quiet "${compile[@]}" "$@"; }

# The version that the environment sees; fails when it sees none.
torch_version() {
    "$venv/bin/python" -c 'from importlib.metadata import version; print(version("torch"))' \
        2>/dev/null
}

install_torch() {
    if ! has_gpu && [[ $(uname) == Linux ]]; then
        if step "torch $TORCH, CPU build" install "torch==$TORCH+cpu" 2>/dev/null; then return; fi
        echo "setup: pip finds no CPU build of torch $TORCH here and takes the CUDA build," \
            "several GB (PIP_EXTRA_INDEX_URL can name PyTorch's own CPU index)"
    fi
    step "torch $TORCH" install "torch==$TORCH"
}

# Python 3.11 has megatron-core 0.16.1 for its newest. tests/run.sh tries the newest of all beside
# it: its Python sources run there, and pip compiles its dataset helper from source.
install_newest_core() {
    local bound
    bound=$(sed -n 's/^ *"\(megatron-core[^"]*\)",.*/\1/p' pyproject.toml)
    if ! step "newest $bound, for tests" install --no-deps --no-build-isolation \
        --ignore-requires-python --target "$newest_core" "$bound"; then
        echo "setup: tests/run.sh will SKIP its part with the newest megatron-core" >&2
    fi
}

# Whatever asks for another installation when it changes.
fingerprint() {
    { cat pyproject.toml setup.py csrc/*.h csrc/*.cpp && "$venv/bin/python" -VV && torch_version && pwd; } | cksum
}

[[ -x $venv/bin/pip ]] || make_venv
torch_version >/dev/null || install_torch

stamp="$venv/megatron_idea$extra.stamp"
fresh() { [[ -f $1 && $(<"$1") == "$(fingerprint)" ]]; }
# What [dev] installed is enough without it.
if ! fresh "$stamp" && ! fresh "$venv/megatron_idea[dev].stamp"; then
    echo "torch==$(torch_version)" >"$venv/constraints.txt"
    step "megatron-idea$extra" install -c "$venv/constraints.txt" -e ".$extra"
    rm -rf "$newest_core"
    fingerprint >"$stamp"
fi
if [[ $extra == "[dev]" && ! -d $newest_core ]]; then install_newest_core; fi
