#!/usr/bin/env bash
# Every check, as CI runs it: lint, format, types, tests. Arguments go to pytest.
#
#   bash tests/run.sh
#   bash tests/run.sh tests/test_schedule.py -x
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# The tests see what a user has installed, and no folder of the repository but tests/.
unset PYTHONPATH
export PYTHONSAFEPATH=1
# Some images set it: each of a thousand processes would compile all that it imports, for 4 s.
unset PYTHONDONTWRITEBYTECODE
# A build of csrc/ that failed must not hide behind PyTorch, which does its work where it is absent.
export MEGATRON_IDEA_EXTENSION=require

# A Slurm for tests/test_slurm.py, and a linter for the scripts: without them those tests are skipped.
install_packages() {
    local packages=(slurmctld slurmd slurm-client munge shellcheck)
    if [[ ${CI:-} != true || $EUID -ne 0 || ! -f /etc/debian_version ]]; then return; fi
    if ! dpkg -s "${packages[@]}" >/dev/null 2>&1; then
        (apt-get update -qq && DEBIAN_FRONTEND=noninteractive timeout 180 \
            apt-get install -qq -y --no-install-recommends "${packages[@]}") >/dev/null 2>&1 ||
            echo "tests: Slurm cannot be installed here; its tests are skipped"
    fi
}
install_packages &
installing=$!

bash examples/setup.sh --dev
venv="${MEGATRON_IDEA_VENV:-$PWD/.venv}"
export PATH="$venv/bin:$PATH"

# Tests start several ranks on one machine: one thread each, as torchrun sets it.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

# megatron-core decorates functions with torch.compile, which then imports its compiler: a quarter of
# the 5 s of CPU that every process takes to start. Our layers call none of these functions.
export TORCHDYNAMO_DISABLE="${TORCHDYNAMO_DISABLE:-1}"

# A stand-in for a CUDA device, for tests/test_cuda_path.py, which waits for it or says what is wrong.
python tests/cuda_stand_in/build.py >/dev/null 2>&1 &

ruff check
ruff format --check
types=$(mktemp)
mypy >"$types" 2>&1 &
checking=$!

# With the newest megatron-core in place of the one that pip has for this Python: it is imported
# without Triton, trains, compacts, saves and resumes as the other does.
with_newest_core() {
    local newest installed
    newest=$(cd "$venv" && pwd)/megatron-core-newest
    installed=$(python -c 'from importlib.metadata import version; print(version("megatron-core"))')
    if [[ ! -d $newest ]]; then
        echo "tests: SKIPPED: equality and checkpoints with the newest megatron-core, not installed" >&2
    elif [[ ! -d $newest/megatron_core-$installed.dist-info ]]; then
        echo "tests: and with $(basename "$newest"/megatron_core-*.dist-info .dist-info)"
        PYTHONPATH=$newest pytest --durations=5 \
            tests/test_core_versions.py tests/test_doctor.py \
            tests/test_checkpoint.py tests/test_parallel.py \
            -k "core_versions or doctor or metadata or tp2_bf16 or dp2_overlapped or pp2_interleaved"
    fi
}
wait "$installing"
if (($# == 0)); then
    output=$(mktemp)
    with_newest_core >"$output" 2>&1 &
    newest=$!
fi

# Files side by side, in the order of conftest.py. -n0 among the arguments runs one after the other,
# with output as it comes.
status=0
pytest --numprocesses 3 --dist loadfile --no-loadscope-reorder --durations=15 "$@" || status=$?
if (($# == 0)); then
    wait "$newest" || status=$?
    cat "$output"
    rm "$output"
fi
wait "$checking" || status=$?
cat "$types"
rm "$types"
exit "$status"
