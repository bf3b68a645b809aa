#!/usr/bin/env bash
# The checks of the project: lint, format, types, shell scripts, tests. Fails if one of them fails; the last line is
# pytest's, above it stand the slowest tests. Makes or completes .venv first. On two cores:
#
#   script/run_tests.sh --quick   minutes: without what is marked `slow` or `long`
#   script/run_tests.sh           without what is marked `long`
#   script/run_tests.sh --long    about 48 minutes: every test
#
# Further arguments go to pytest. DRY_RUN=1 prints the commands.
set -euo pipefail
# shellcheck source=/dev/null
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

suite=(-m "not long")
case "${1:-}" in
  --quick)
    suite=(-m "not slow and not long")
    shift
    ;;
  --long)
    suite=()
    shift
    ;;
esac

if [ "${DRY_RUN:-0}" = 1 ]; then python=$(find_python); else python=$(make_environment dev); fi
bin=$(dirname "$python")
cd "$PROJECT"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}  # several tests at a time share the cores
failed=()

check() {
  echo "== $1"
  shift
  if [ "${DRY_RUN:-0}" = 1 ]; then
    run "$@"
    return
  fi
  "$@" || failed+=("$(basename "$1") ${2:-}")
}

check "lint" "$bin/ruff" check .
check "format" "$bin/ruff" format --check .
check "types" "$bin/mypy"
check "shell scripts" "$bin/shellcheck" script/*.sh
tests=("$python" -m pytest -n "${PYTEST_PROCESSES:-2}" --durations=20 "${suite[@]}" "$@")
echo "== tests"
if [ "${DRY_RUN:-0}" = 1 ]; then run "${tests[@]}" && exit; fi
output=$(mktemp)
trap 'rm -f "$output"' EXIT
"${tests[@]}" 2>&1 | tee "$output" || failed+=(pytest)

if [ ${#failed[@]} -gt 0 ]; then echo "failed: ${failed[*]}"; fi
tail -n 1 "$output"
[ ${#failed[@]} -eq 0 ]
