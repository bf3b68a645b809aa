#!/usr/bin/env bash
# Parameters and multiply-adds: summary.sh ARCH [DATASET] [S], or summary.sh all for every backbone and division.
set -euo pipefail
# shellcheck source=/dev/null
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

usage() {
  cat <<'TEXT'
usage: summary.sh ARCH [DATASET] [S] [-- flags of train_split.py]
       summary.sh all [-- flags of script/summarise_zoo.py]
The same as environment variables: ARCH DATASET SPLIT_FACTOR. Without any at a terminal it asks.
DRY_RUN=1 prints the command.
TEXT
}

settings="ARCH DATASET SPLIT_FACTOR"
parse_settings "$settings" "$@"

if interactive "$settings" && [ ${#EXTRA[@]} -eq 0 ]; then
  ask ARCH "backbone, or all" wide_resnet28_10
  if [ "$ARCH" != all ]; then
    ask DATASET "data set (digits, cifar10, cifar100, svhn, imagenet)" cifar100
    ask SPLIT_FACTOR "split factor S" 2
  fi
fi

[ -n "${ARCH:-}" ] || fail "which backbone? summary.sh ARCH [DATASET] [S], or summary.sh all."
if [ "$ARCH" = all ]; then
  export PYTHONPATH=$PROJECT${PYTHONPATH:+:$PYTHONPATH}
  python=$(find_python)
  run "$python" -m script.summarise_zoo "${EXTRA[@]}"
else
  start train_split.py --is_summary 1 --arch "$ARCH" --dataset "${DATASET:-cifar10}" --split_factor "${SPLIT_FACTOR:-1}"
fi
