#!/usr/bin/env bash
# Train several methods on one backbone, data set and budget with several seeds, and compare them; see --help.
set -euo pipefail
# shellcheck source=/dev/null
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

usage() {
  cat <<'TEXT'
usage: compare_methods.sh [--methods "NAME[:NETWORKS] ..."] [--arch NAME] [--networks N] [--dataset NAME] [--data DIR]
                          [--epochs N] [--seeds "1 2 3"] [--recipe shared|own] [--out DIR] [--gpus 0,1|cpu] [--nproc N]
                          [-- flags of train_split.py, for every run]
The same as environment variables: METHODS ARCH NETWORKS DATASET DATA EPOCHS SEEDS RECIPE OUT GPUS NPROC.
Every method trains NETWORKS full networks of the backbone [2], or as many as stand behind its name. Without --methods:
independent co_training dml dks:1 l_mcl. --recipe shared [default] gives all of them the same optimiser, schedule and
augmentation (crop and flip); own leaves each its published recipe.
Runs are below --out [./runs/compare]; a finished one is skipped, an interrupted one goes on where it stopped, so the
same command can be given again; other settings need another --out. At the end compare.md, compare.csv and compare.png
stand there. DRY_RUN=1 prints the commands.
TEXT
}

parse_settings "METHODS ARCH NETWORKS DATASET DATA EPOCHS SEEDS RECIPE OUT GPUS NPROC" "$@"

METHODS=${METHODS:-independent co_training dml dks:1 l_mcl}
ARCH=${ARCH:-resnet20}
NETWORKS=${NETWORKS:-2}
DATASET=${DATASET:-digits}
SEEDS=${SEEDS:-1 2 3}
OUT=${OUT:-./runs/compare}

common=(--dataset "$DATASET" --resume auto)
[ -z "${DATA:-}" ] || common+=(--data "$DATA")
[ -z "${EPOCHS:-}" ] || common+=(--epochs "$EPOCHS")
case "${RECIPE:-shared}" in
  shared)
    common+=(--is_autoaugment 0 --is_cutout 0 --is_mixup 0 --is_label_smoothing 0 --is_amp 1)
    common+=(--optimizer SGD --lr 0.1 --is_nesterov 1 --weight_decay 5e-4 --is_wd_all 1)
    common+=(--lr_mode cos --slow_start_epochs -1 --end_lr 0)
    ;;
  own) ;;
  *) fail "RECIPE=$RECIPE: expected shared or own." ;;
esac

exec 3>/dev/null # the figures of single runs are in their folders
[ "${DRY_RUN:-0}" != 1 ] || exec 3>&1

networks_of() {
  case "$1" in
    *:*) echo "${1##*:}" ;;
    *) echo "$NETWORKS" ;;
  esac
}

for entry in ${METHODS//,/ }; do
  case "$(networks_of "$entry")" in
    *[!0-9]* | "" | 0) fail "$entry, NETWORKS=$NETWORKS: expected a number of networks." ;;
  esac
done

folders=()
for seed in ${SEEDS//,/ }; do
  for entry in ${METHODS//,/ }; do
    networks=$(networks_of "$entry")
    method=${entry%%:*}
    archs=$ARCH
    for ((i = 1; i < networks; i++)); do archs+=,$ARCH; done
    folder=$OUT/${DATASET}_${ARCH}x${networks}_${method}_seed$seed
    folders+=("$folder")
    if [ -f "$folder/results.json" ]; then
      echo "finished already: $folder" >&2
      continue
    fi
    echo "== $folder" >&2
    (start train_split.py --method "$method" --arch "$archs" "${common[@]}" --seed "$seed" --model_dir "$folder") >&3
  done
done

export PYTHONPATH=$PROJECT${PYTHONPATH:+:$PYTHONPATH}
python=$(find_python)
run "$python" -m utils.compare --out "$OUT/compare" "${folders[@]}"
