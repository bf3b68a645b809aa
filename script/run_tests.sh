#!/usr/bin/env bash
# Every check of the project: lint, format, types, shell scripts, tests. Fails if one of them fails; the last line is
# pytest's. Makes or completes .venv first. Arguments go to pytest.
set -euo pipefail
# shellcheck source=/dev/null
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

python=$(make_environment dev)
bin=$(dirname "$python")
cd "$PROJECT"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}  # several tests at a time share the cores
failed=()

check() {
  echo "== $1"
  shift
  "$@" || failed+=("$(basename "$1") ${2:-}")
}

check "lint" "$bin/ruff" check .
check "format" "$bin/ruff" format --check .
check "types" "$bin/mypy"
check "shell scripts" "$bin/shellcheck" script/*.sh
output=$(mktemp)
trap 'rm -f "$output"' EXIT
echo "== tests"
"$python" -m pytest -n "${PYTEST_PROCESSES:-2}" "$@" 2>&1 | tee "$output" || failed+=(pytest)

if [ ${#failed[@]} -gt 0 ]; then echo "failed: ${failed[*]}"; fi
tail -n 1 "$output"
[ ${#failed[@]} -eq 0 ]
