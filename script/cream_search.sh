#!/usr/bin/env bash
# A whole Cream search: find a network, retrain it from scratch, evaluate its averaged weights; see --help.
set -euo pipefail
# shellcheck source=/dev/null
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

usage() {
  cat <<'TEXT'
usage: cream_search.sh [--config FILE] [--dataset NAME] [--data DIR] [--out DIR] [--epochs N] [--ema_decay X] [--seed N]
                       [--gpus 0,1|cpu] [--nproc N] [-- flags of train_split.py, for both runs]
The same as environment variables: CONFIG DATASET DATA OUT EPOCHS EMA_DECAY SEED GPUS NPROC.
--config is the search [script/cream/tiny.yaml, digits, about a minute]. --epochs and --ema_decay are of the retraining:
the recipe's on imagenet, elsewhere [30] and [0.99]. Below --out [./runs/cream]: search/ with board.json, found.yaml and
their pictures, and retrain/ with the network and, in eval/, its test. An interrupted command goes on where it stopped.
DRY_RUN=1 prints the commands.
TEXT
}

parse_settings "CONFIG DATASET DATA OUT EPOCHS EMA_DECAY SEED GPUS NPROC" "$@"

CONFIG=${CONFIG:-$PROJECT/script/cream/tiny.yaml}
OUT=${OUT:-./runs/cream}
[ -f "$CONFIG" ] || fail "--config $CONFIG: no such file."
DATASET=${DATASET:-$(sed -n 's/^dataset: *//p' "$CONFIG")}
[ -n "$DATASET" ] || fail "--config $CONFIG names no data set: give --dataset NAME."

data=(--dataset "$DATASET")
[ -z "${DATA:-}" ] || data+=(--data "$DATA")
training=(--seed "${SEED:-1}" --resume auto)
if [ "$DATASET" != imagenet ]; then
  EPOCHS=${EPOCHS:-30}
  EMA_DECAY=${EMA_DECAY:-0.99}
fi
retraining=()
[ -z "${EPOCHS:-}" ] || retraining+=(--epochs "$EPOCHS")
[ -z "${EMA_DECAY:-}" ] || retraining+=(--ema_decay "$EMA_DECAY")

exec 3>/dev/null # the figures of the two runs are in their folders
[ "${DRY_RUN:-0}" != 1 ] || exec 3>&1

(start train_split.py --config "$CONFIG" "${data[@]}" "${training[@]}" --model_dir "$OUT/search") >&3
[ "${DRY_RUN:-0}" = 1 ] || [ -f "$OUT/search/found.yaml" ] || fail "the search found nothing; $OUT/search/train.log says why."
(start train_split.py --config "$OUT/search/found.yaml" "${data[@]}" "${training[@]}" "${retraining[@]}" \
  --model_dir "$OUT/retrain") >&3
# shellcheck disable=SC2034 # lib.sh reads it
EXTRA=()
start eval.py --resume "$OUT/retrain/model_best.pth.tar" --weights ema "${data[@]}"
