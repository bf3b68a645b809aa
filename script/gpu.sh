#!/usr/bin/env bash
# Everything that a GPU has to tell, in ten minutes, or in as many turns of ten minutes as it takes: gpu.sh [FLAGS].
#   gpu.sh --check      two minutes, one line for each check: is what this GPU computes right
#   gpu.sh              correctness first, then the speeds that are promised; the same line again goes on
# Flags are those of `python -m benchmarks.gpu`: --minutes N, --out DIR, --data DIR, --only PARTS, --list; and with
# --check those of `python -m benchmarks.gpu_check`. DRY_RUN=1 prints the command.
set -euo pipefail
# shellcheck source=/dev/null
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

module=benchmarks.gpu
flags=()
for word in "$@"; do
  if [ "$word" = --check ]; then module=benchmarks.gpu_check; else flags+=("$word"); fi
done
python=$(find_python)
export PYTHONPATH=$PROJECT${PYTHONPATH:+:$PYTHONPATH}
run "$python" -m "$module" "${flags[@]}"
