#!/usr/bin/env bash
# The method's claim on one data set: S = 1, 2, 4 at one budget and one recipe over several seeds, then two tables
# (claim.md) and one picture (claim.png). Runs that are complete are kept and a killed one goes on, so start it again
# after any interruption, or with more seeds.
set -euo pipefail
# shellcheck source=/dev/null
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

usage() {
  cat <<'TEXT'
usage: claim.sh DATA [EPOCHS] [SEEDS] [--dataset NAME] [--arch NAME] [--split_factors 1,2,4] [--images N]
                [--test_images N] [--side N] [--jobs N] [--runs FILE.csv,…] [--out DIR] [-- flags of train_split.py]
       claim.sh --dataset digits
DATA: folder of the data set. EPOCHS (300), SEEDS (1,2,3), --dataset (folder), --arch (resnet20), --out (./runs/claim).
--split_factors: S, or NAME:S, where NAME is independent (the same networks without co-training) or another backbone.
The first is what the others are compared with, seed by seed.
--images N, for --dataset folder: train on the first N images only, as many of every class; --test_images N the same for
what is tested on. --side N: images box-filtered to N x N pixels. --jobs N: runs side by side (1).
--runs: claim.csv of the same comparison, made earlier or on another machine: what is asked for and there is not run.
--dataset digits needs no DATA and has its own defaults: 80 epochs, seeds 1 to 24, 287 training images (--val_fraction
0.8), bf16, two runs side by side. Every figure is of the last epoch, on the test images. The same as environment
variables: DATA EPOCHS SEEDS DATASET ARCH SPLIT_FACTORS IMAGES TEST_IMAGES SIDE JOBS RUNS OUT. DRY_RUN=1 prints the
commands.
TEXT
}

parse_settings "DATA EPOCHS SEEDS DATASET ARCH SPLIT_FACTORS IMAGES TEST_IMAGES SIDE JOBS RUNS OUT" "$@"
dataset=${DATASET:-folder}
recipe=()
if [ "$dataset" = digits ]; then
  EPOCHS=${EPOCHS:-80} SEEDS=${SEEDS:-$(seq -s, 24)} JOBS=${JOBS:-2}
  recipe=(--val_fraction 0.8 --amp_dtype bf16 --workers 0 --print_freq 1000)
else
  [ -n "${DATA:-}" ] || fail "which data? Give the folder: claim.sh DATA."
fi
epochs=${EPOCHS:-300} seeds=${SEEDS:-1,2,3} entries=${SPLIT_FACTORS:-1,2,4} jobs=${JOBS:-1}
for entry in ${entries//,/ }; do
  case "${entry##*:}" in *[!0-9]* | "" | 0) fail "--split_factors $entry: expected S or NAME:S." ;; esac
done
for number in "$epochs" "$jobs" ${IMAGES:-1} ${TEST_IMAGES:-1} ${SIDE:-1}; do
  case "$number" in *[!0-9]* | "" | 0) fail "$number: expected a number of 1 or more." ;; esac
done
earlier=()
RUNS=${RUNS:-}
for file in ${RUNS//,/ }; do
  [ -f "$file" ] || fail "--runs $file: there is no such file."
  earlier+=("$(realpath "$file")")
done
mkdir -p "${OUT:=./runs/claim}"
out=$(realpath "$OUT")
python=$(find_python)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # runs side by side share the cores

if [ -n "${IMAGES:-}${TEST_IMAGES:-}${SIDE:-}" ]; then
  [ "$dataset" = folder ] || fail "--images, --test_images and --side need --dataset folder."
  part=$out/data_${IMAGES:-all}${TEST_IMAGES:+_$TEST_IMAGES}${SIDE:+_side$SIDE}
  source=$(realpath "$DATA")
  (cd "$PROJECT" && "$python" -m script.small_images "$source" "$part" --train "${IMAGES:-0}" \
    --test "${TEST_IMAGES:-0}" --side "${SIDE:-0}")
  DATA=$part
fi

# one_run FOLDER SEED ARCH METHOD S: trained where it is not, evaluated at its last epoch
one_run() {
  local folder=$1 seed=$2 arch=$3 method=$4 split_factor=$5
  mkdir -p "$folder"
  (run "$python" "$PROJECT/train_split.py" --dataset "$dataset" ${DATA:+--data "$DATA"} --arch "$arch" --method "$method" \
    --split_factor "$split_factor" --epochs "$epochs" --eval_per_epoch "$epochs" --seed "$seed" --resume auto \
    --model_dir "$folder" "${recipe[@]}" "${EXTRA[@]}") >&3
  (run "$python" "$PROJECT/eval.py" --resume "$folder/checkpoint_$epochs.pth.tar") >&3
}

exec 3>/dev/null # the figures of single runs are in their folders
[ "${DRY_RUN:-0}" != 1 ] || exec 3>&1
end_runs() {
  local running
  mapfile -t running < <(jobs -p)
  [ ${#running[@]} -eq 0 ] || kill -- "${running[@]/#/-}" 2>/dev/null || true # with what they have started
}
trap end_runs EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

runs=()
# seed by seed, so that an interrupted comparison is fair as far as it goes
for seed in ${seeds//,/ }; do
  for entry in ${entries//,/ }; do
    name=${entry%:*} split_factor=${entry##*:} arch=${ARCH:-resnet20} method=co_training
    folder=$out/S$split_factor-seed$seed
    if [ "$name" != "$entry" ]; then
      folder=$out/${name//\//-}-S$split_factor-seed$seed
      if [ "$name" = independent ]; then method=independent; else arch=$name; fi
    fi
    if grep -qs "^$split_factor,$method,$arch,$seed," "${earlier[@]}" /dev/null; then
      runs+=("$split_factor,$method,$arch,$seed")
      continue
    fi
    runs+=("$folder")
    [ ! -f "$folder/eval/results.json" ] || continue
    while [ "$(jobs -rp | wc -l)" -ge "$jobs" ]; do wait -n || fail "a run failed; what it said stands above."; done
    echo "S = $split_factor, $method, $arch, seed $seed …" >&2
    set -m # a process group for each run
    one_run "$folder" "$seed" "$arch" "$method" "$split_factor" &
    set +m
  done
done
while [ -n "$(jobs -p)" ]; do wait -n || fail "a run failed; what it said stands above."; done
cd "$PROJECT"
run "$python" -m script.claim_table "$out" "${earlier[@]}" "${runs[@]}"
