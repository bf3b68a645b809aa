#!/usr/bin/env bash
# Run the project in a container: builds the image once, then starts a command (by default a shell at a terminal).
set -euo pipefail
# shellcheck source=/dev/null
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

usage() {
  cat <<'TEXT'
usage: run_docker.sh [--data DIR] [--model_dir DIR] [--gpus all|0,1|cpu] [--image NAME] [-- command]
The same as environment variables: DATA MODEL_DIR GPUS IMAGE; REBUILD=1 builds the image anew.
DIRs are seen in the container as /data and /runs. Example:
  run_docker.sh --data ~/cifar --model_dir ~/runs -- python train_split.py --data /data --model_dir /runs/first
Without any of them at a terminal it asks. DRY_RUN=1 prints the command.
TEXT
}

settings="DATA MODEL_DIR GPUS IMAGE"
parse_settings "$settings" "$@"
if interactive "$settings" && [ ${#EXTRA[@]} -eq 0 ]; then
  ask DATA "folder of the data" ./data_dir
  ask MODEL_DIR "folder for the runs" ./model_dir
  ask GPUS "GPUs (all, 0,1 or cpu)" all
fi
IMAGE=${IMAGE:-divide-and-co-training}
DATA=${DATA:-./data_dir}
MODEL_DIR=${MODEL_DIR:-./model_dir}
if [ "${DRY_RUN:-0}" != 1 ]; then
  command -v docker >/dev/null || fail "docker is not installed."
  mkdir -p "$DATA" "$MODEL_DIR"
  if [ "${REBUILD:-0}" = 1 ] || ! docker image inspect "$IMAGE" >/dev/null 2>&1; then
    docker build -t "$IMAGE" "$PROJECT"
  fi
fi
# results belong to who started the container; decoding workers share memory
command=(docker run --rm --ipc=host --user "$(id -u):$(id -g)" -e HOME=/tmp -w /workspace -v "$PROJECT:/workspace")
command+=(-v "$(realpath -m "$DATA"):/data" -v "$(realpath -m "$MODEL_DIR"):/runs")
case "${GPUS:-all}" in
  cpu) ;;
  all) command+=(--gpus all) ;;
  *) command+=(--gpus "\"device=$GPUS\"") ;;
esac
if [ -t 0 ] && [ -t 1 ]; then command+=(-it); fi
[ ${#EXTRA[@]} -gt 0 ] || EXTRA=(bash)
run "${command[@]}" "$IMAGE" "${EXTRA[@]}"
