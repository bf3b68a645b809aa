#!/usr/bin/env bash
# The method's claim on one data set: S = 1, 2, 4 at one budget and one recipe over several seeds, then one table
# (claim.md) and one picture (claim.png). Runs that are complete are kept and a killed one goes on, so start it again
# after any interruption, or with more seeds.
set -euo pipefail
# shellcheck source=/dev/null
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

usage() {
  cat <<'TEXT'
usage: claim.sh DATA [EPOCHS] [SEEDS] [--dataset NAME] [--arch NAME] [--split_factors 1,2,4] [--images N] [--out DIR]
                [-- flags of train_split.py]
DATA: folder of the data set. EPOCHS (300), SEEDS (1,2,3), --dataset (folder), --arch (resnet20), --out (./runs/claim).
--images N, for --dataset folder: train on the first N images only, as many of every class. Every figure is of the last
epoch. The same as environment variables: DATA EPOCHS SEEDS DATASET ARCH SPLIT_FACTORS IMAGES OUT.
TEXT
}

parse_settings "DATA EPOCHS SEEDS DATASET ARCH SPLIT_FACTORS IMAGES OUT" "$@"
[ -n "${DATA:-}" ] || fail "which data? Give the folder: claim.sh DATA."
epochs=${EPOCHS:-300} seeds=${SEEDS:-1,2,3} split_factors=${SPLIT_FACTORS:-1,2,4}
mkdir -p "${OUT:=./runs/claim}"
out=$(realpath "$OUT")
python=$(find_python)

if [ -n "${IMAGES:-}" ]; then
  [ "${DATASET:-folder}" = folder ] || fail "--images needs --dataset folder."
  classes=("$DATA"/train/*/)
  [ -d "${classes[0]}" ] || fail "$DATA/train holds no class folders."
  part=$out/data_$IMAGES
  if [ ! -d "$part" ]; then
    rm -rf "$part.partial"
    for class in "${classes[@]}"; do
      mkdir -p "$part.partial/train/$(basename "$class")"
      mapfile -t images < <(find "$(realpath "$class")" -type f | sort)
      ln -s -t "$part.partial/train/$(basename "$class")" "${images[@]:0:IMAGES/${#classes[@]}}"
    done
    for split in val test; do
      [ ! -d "$DATA/$split" ] || ln -s "$(realpath "$DATA/$split")" "$part.partial/$split"
    done
    mv "$part.partial" "$part"
  fi
  DATA=$part
fi

runs=()
# seed by seed, so that an interrupted comparison is fair as far as it goes
for seed in ${seeds//,/ }; do
  for split_factor in ${split_factors//,/ }; do
    folder=$out/S$split_factor-seed$seed
    runs+=("$folder")
    [ ! -f "$folder/eval/results.json" ] || continue
    mkdir -p "$folder"
    echo "S = $split_factor, seed $seed …" >&2
    "$python" "$PROJECT/train_split.py" --dataset "${DATASET:-folder}" --data "$DATA" --arch "${ARCH:-resnet20}" \
      --split_factor "$split_factor" --epochs "$epochs" --eval_per_epoch "$epochs" --seed "$seed" --resume auto \
      --model_dir "$folder" "${EXTRA[@]}" >/dev/null
    "$python" "$PROJECT/eval.py" --resume "$folder/checkpoint_$epochs.pth.tar" >/dev/null
  done
done
cd "$PROJECT"
exec "$python" -m script.claim_table "$out" "${runs[@]}"
