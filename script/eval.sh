#!/usr/bin/env bash
# Evaluate a checkpoint or classify images with it. Asks for the checkpoint where nothing is given at a terminal.
set -euo pipefail
# shellcheck source=/dev/null
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

usage() {
  cat <<'TEXT'
usage: eval.sh [CHECKPOINT] [--resume CHECKPOINT] [--predict PATH] [--data DIR] [--dataset NAME] [--arch NAME]
               [--split_factor S] [--model_dir DIR] [--gpus 0,1|cpu] [--nproc N] [-- flags of eval.py]
The same as environment variables: RESUME PREDICT DATA DATASET ARCH SPLIT_FACTOR MODEL_DIR GPUS NPROC.
--dataset, --arch and --split_factor are needed for released checkpoints only. DRY_RUN=1 prints the command.
TEXT
}

settings="RESUME PREDICT DATA DATASET ARCH SPLIT_FACTOR MODEL_DIR GPUS NPROC"
parse_settings "$settings" "$@"

if interactive "$settings" && [ ${#EXTRA[@]} -eq 0 ]; then
  newest=$(find . -name model_best.pth.tar -not -path './.venv/*' -printf '%T@ %p\n' 2>/dev/null | sort -n | tail -n 1 | cut -d ' ' -f 2-)
  ask RESUME "checkpoint" "${newest:-model_dir/model_best.pth.tar}"
  ask PREDICT "images to classify (an image, a folder, a .npy; empty: evaluate)" ""
  [ -n "$PREDICT" ] || ask DATA "folder of the data (empty: as in training)" ""
fi

case " ${EXTRA[*]} " in *" --resume"*) ;; *) [ -n "${RESUME:-}" ] || fail "which checkpoint? Give --resume PATH." ;; esac
flags=()
for name in RESUME PREDICT DATA DATASET ARCH SPLIT_FACTOR MODEL_DIR; do
  [ -z "${!name:-}" ] || flags+=("--${name,,}" "${!name}")
done
start eval.py "${flags[@]}"
