#!/usr/bin/env bash
# Train S networks together. Asks what to train where nothing is given at a terminal; see --help.
set -euo pipefail
# shellcheck source=/dev/null
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

usage() {
  cat <<'TEXT'
usage: train_split.sh [--arch NAME] [--dataset NAME] [--split_factor S] [--data DIR] [--model_dir DIR]
                      [--epochs N] [--gpus 0,1|cpu] [--nproc N] [-- flags of train_split.py]
The same as environment variables: ARCH DATASET SPLIT_FACTOR DATA MODEL_DIR EPOCHS GPUS NPROC.
Without any of them at a terminal it asks. DRY_RUN=1 prints the command.
TEXT
}

settings="ARCH DATASET SPLIT_FACTOR DATA MODEL_DIR EPOCHS GPUS NPROC"
parse_settings "$settings" "$@"

if interactive "$settings" && [ ${#EXTRA[@]} -eq 0 ]; then
  ask DATASET "data set (digits, cifar10, cifar100, svhn, imagenet, folder)" digits
  case "$DATASET" in
    digits) suggested=resnet20 ;;
    imagenet) suggested=resnet50 ;;
    *) suggested=wide_resnet28_10 ;;
  esac
  ask ARCH "backbone (train_split.py --help lists all)" "$suggested"
  ask SPLIT_FACTOR "split factor S" 2
  [ "$DATASET" = digits ] || ask DATA "folder of the data" ./data_dir
  ask MODEL_DIR "run directory" "./model_dir/${DATASET}_${ARCH}_S${SPLIT_FACTOR}"
  ask GPUS "GPUs (as 0,1; cpu; empty: all)" ""
fi

DATASET=${DATASET:-digits}
ARCH=${ARCH:-resnet20}
SPLIT_FACTOR=${SPLIT_FACTOR:-2}
flags=(--dataset "$DATASET" --arch "$ARCH" --split_factor "$SPLIT_FACTOR")
flags+=(--model_dir "${MODEL_DIR:-./model_dir/${DATASET}_${ARCH}_S${SPLIT_FACTOR}}")
[ -z "${DATA:-}" ] || flags+=(--data "$DATA")
[ -z "${EPOCHS:-}" ] || flags+=(--epochs "$EPOCHS")
start train_split.py "${flags[@]}"
