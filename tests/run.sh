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

bash examples/setup.sh --dev
export PATH="${MEGATRON_IDEA_VENV:-$PWD/.venv}/bin:$PATH"

# Tests start several ranks on one machine: one thread each, as torchrun sets it.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

ruff check
ruff format --check
mypy
exec pytest --durations=10 "$@"
