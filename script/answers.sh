#!/usr/bin/env bash
# The goals of answers, A1 to A8 (miscs/answers.md): trains, tunes, times, exports and distils over several seeds, then
# one table (goals.md) and a picture for each set of images. What is done is kept and a killed one goes on, so start it
# again after any interruption, or with more seeds. One thing at a time, so that times are worth something.
set -euo pipefail
# shellcheck source=/dev/null
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

usage() {
  cat <<'TEXT'
usage: answers.sh [DATA] [SEEDS] [--sets digits,cifar,small] [--digits_epochs N] [--epochs N] [--small_epochs N]
                  [--images N] [--out DIR] [-- flags of train_split.py]
DATA: CIFAR-10 as a folder of images, for the sets cifar and small; without it digits alone. SEEDS (1,2,3). --sets:
digits (resnet20, S = 4; 80 epochs, 287 training images), cifar (resnet20, S = 2; --epochs 60), small (CIFAR-10 at
16 x 16 pixels, WRN-16-4, S = 4, 500 training images a class, tuned on the next 200; --small_epochs 60; the runs are
those of claim.sh --side 16, miscs/results.md). --images: part of cifar's training images (all). --out
(./runs/answers). Timed are --timed 1024 test images. The same as environment variables: DATA SEEDS SETS DIGITS_EPOCHS
EPOCHS SMALL_EPOCHS IMAGES TIMED OUT. DRY_RUN=1 prints the commands.
TEXT
}

parse_settings "DATA SEEDS SETS DIGITS_EPOCHS EPOCHS SMALL_EPOCHS IMAGES TIMED OUT" "$@"
sets=${SETS:-digits${DATA:+,cifar,small}} seeds=${SEEDS:-1,2,3}
for set in ${sets//,/ }; do
  case "$set" in
    digits) ;;
    cifar | small) [ -n "${DATA:-}" ] || fail "--sets $set: which data? Give the folder: answers.sh DATA." ;;
    *) fail "--sets $set: expected digits, cifar or small." ;;
  esac
done
for number in ${seeds//,/ } "${DIGITS_EPOCHS:-80}" "${EPOCHS:-60}" "${SMALL_EPOCHS:-60}" "${IMAGES:-1}" "${TIMED:-1}"; do
  case "$number" in *[!0-9]* | "" | 0) fail "$number: expected a number of 1 or more." ;; esac
done
mkdir -p "${OUT:=./runs/answers}"
out=$(realpath "$OUT")
python=$(find_python)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
cd "$PROJECT"

exec 3>/dev/null # the figures of single steps are in their folders
[ "${DRY_RUN:-0}" != 1 ] || exec 3>&1

# step MARKER COMMAND...: run it unless an earlier start has
step() {
  local marker=$1
  shift
  [ ! -e "$marker" ] || return 0
  (run "$@") >&3
  if [ "${DRY_RUN:-0}" != 1 ]; then mkdir -p "$(dirname "$marker")" && touch "$marker"; fi
}

# folder of images: part NAME FLAGS...
part() {
  local target=$out/data_$1
  shift
  (run "$python" -m script.small_images "$data" "$target" "$@") >&3
  data_flags=(--dataset folder --data "$target")
}

plain=(--batch_size 64 --lr 0.1 --lr_mode cos --slow_start_epochs -1 --is_autoaugment 0 --is_mixup 0 --is_cutout 0)
plain+=(--amp_dtype bf16 --workers 0 --print_freq 1000)
data=${DATA:+$(realpath "$DATA")}
has_onnx=1
"$python" -c 'import sys, importlib.util as i; sys.exit(not all(map(i.find_spec, sys.argv[1:])))' \
  onnx onnxscript onnxruntime || { has_onnx=0 && echo "no A5: onnx, onnxscript, onnxruntime are not installed" >&2; }

for seed in ${seeds//,/ }; do
  for set in ${sets//,/ }; do
    arch=resnet20 split_factor=4 epochs=${EPOCHS:-60} recipe=("${plain[@]}") tune_on=()
    case "$set" in
      digits)
        epochs=${DIGITS_EPOCHS:-80} data_flags=(--dataset digits)
        recipe=(--val_fraction 0.8 --amp_dtype bf16 --workers 0 --print_freq 1000)
        ;;
      cifar)
        split_factor=2 data_flags=(--dataset folder --data "$data") recipe+=(--val_fraction 0.1)
        [ -z "${IMAGES:-}" ] || part "cifar$IMAGES" --train "$IMAGES"
        ;;
      small)
        arch=wide_resnet16_4 epochs=${SMALL_EPOCHS:-60}
        recipe+=(--padding 2 --eval_per_epoch "$epochs") # no epoch is chosen
        part small_held_out --skip 5000 --train 2000 --side 16
        tune_on=(--tune_on "$out/data_small_held_out/train")
        part small --train 5000 --test 5000 --side 16
        ;;
    esac
    here=$out/$set-seed$seed
    divided=$here/divided/model_best.pth.tar undivided=$here/undivided/model_best.pth.tar
    echo "$set, seed $seed …" >&2
    for name in undivided divided; do
      count=$split_factor
      [ "$name" = divided ] || count=1
      step "$here/$name.done" "$python" train_split.py "${data_flags[@]}" --arch "$arch" --split_factor "$count" \
        --epochs "$epochs" --seed "$seed" --resume auto --model_dir "$here/$name" "${recipe[@]}" "${EXTRA[@]}"
    done
    for confidence in margin max_prob entropy; do
      step "$here/$confidence.done" "$python" eval.py --resume "$divided" --tune calibration,cascade \
        "${tune_on[@]}" --cascade_confidence "$confidence" --large "$undivided" --model_dir "$here/$confidence"
    done
    step "$here/window.done" "$python" eval.py --resume "$divided" --tune calibration,cascade --cascade_kind window \
      "${tune_on[@]}" --uncertainty 1 --model_dir "$here/window"
    # the ensemble's MACs are 1.03 of the undivided network's
    [ "$set" != small ] || step "$here/half.done" "$python" eval.py --resume "$divided" --tune calibration,cascade \
      "${tune_on[@]}" --cascade_target budget --cascade_budget 0.48 --large "$undivided" --model_dir "$here/half"
    tuned=$here/margin/model_best.tuned.pth.tar
    if [ "$has_onnx" = 1 ]; then
      step "$here/ensemble.onnx.done" "$python" script/export.py "$tuned" --out "$here/ensemble.onnx"
      step "$here/cascade.onnx.done" "$python" script/export.py "$tuned" --answer cascade --out "$here/cascade.onnx"
    fi
    step "$here/times.done" "$python" -m script.answers_times "$here" "${TIMED:-1024}"
    if [ "$set" != small ]; then
      step "$here/distill.done" script/distill.sh "$here/divided" --plain "$here/undivided" --out "$here/distill"
    fi
  done
done
run "$python" -m script.answers_table "$out"
