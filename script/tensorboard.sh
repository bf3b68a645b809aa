#!/usr/bin/env bash
# Show the curves of one or more runs: tensorboard.sh [DIR] [PORT]; every run below DIR is found.
set -euo pipefail
# shellcheck source=/dev/null
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

usage() {
  cat <<'TEXT'
usage: tensorboard.sh [MODEL_DIR] [PORT] [-- flags of tensorboard]
The same as environment variables: MODEL_DIR (./model_dir) and PORT (6006). DRY_RUN=1 prints the command.
TEXT
}

settings="MODEL_DIR PORT"
parse_settings "$settings" "$@"
if interactive "$settings" && [ ${#EXTRA[@]} -eq 0 ]; then
  ask MODEL_DIR "folder of the runs" ./model_dir
  ask PORT "port" 6006
fi
MODEL_DIR=${MODEL_DIR:-./model_dir}
[ -d "$MODEL_DIR" ] || fail "$MODEL_DIR is not a folder: give the folder of a run, or one that holds several."
python=$(find_python)
run "$python" -m tensorboard.main --logdir "$MODEL_DIR" --port "${PORT:-6006}" "${EXTRA[@]}"
