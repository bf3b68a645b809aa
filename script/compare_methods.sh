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
       compare_methods.sh --budget equal [--methods "ENTRY ..."] [--budget_of both|params|macs]
                          [--equal_training epochs|macs] [--latency 0|1] [the others as above]
The same as environment variables: METHODS ARCH NETWORKS DATASET DATA EPOCHS SEEDS RECIPE OUT GPUS NPROC BUDGET
BUDGET_OF EQUAL_TRAINING LATENCY.
Every method trains NETWORKS full networks of the backbone [2], or as many as stand behind its name. Without --methods:
independent co_training dml dks:1 l_mcl. --recipe shared [default] gives all of them the same optimiser, schedule and
augmentation (crop and flip); own leaves each its published recipe.
Runs are below --out [./runs/compare]; a finished one is skipped, an interrupted one goes on where it stopped, so the
same command can be given again; other settings need another --out. At the end compare.md, compare.tex, compare.csv and
compare.png stand there. DRY_RUN=1 prints the commands.

--budget equal: what else could be made of the undivided --arch, with its parameters and MACs. An ENTRY is
METHOD[:N][@RULE][+flag=value...]: N members or networks; RULE says what of the undivided network they cost together
(both [default], params, macs, or asis: nothing is solved), and stage widths are solved for it; flags are the method's
own. Default: independent:1 independent:4@both co_training:4@both packed:4 mimo batch_ensemble:4@macs
batch_ensemble:4@params mc_dropout:10@params snapshot:4@both one kd. A row within 2 % in both is equal (--budget_of: in
one). All rows train alike, with the shared recipe; --equal_training macs gives each the epochs that cost the multiply-
adds of the first. The teacher of kd is the undivided network's run of the same seed. --latency 1 [default] times one
run of every entry by eval.py --benchmark. Folders hold entry, settings (a hash) and seed, so any other list, budget or
width can go into the same --out. DRY_RUN=1 also prints the solved widths and what they cost.
TEXT
}

parse_settings "METHODS ARCH NETWORKS DATASET DATA EPOCHS SEEDS RECIPE OUT GPUS NPROC BUDGET BUDGET_OF EQUAL_TRAINING LATENCY" "$@"

if [ -n "${BUDGET:-}" ]; then
  [ "$BUDGET" = equal ] || fail "--budget $BUDGET: expected equal."
  [ -z "${NETWORKS:-}" ] || fail "--networks $NETWORKS cannot go with --budget equal: write METHOD:N."
  [ "${RECIPE:-shared}" = shared ] || fail "--recipe $RECIPE cannot go with --budget equal: all rows train alike."
  case "${LATENCY:=1}" in 0 | 1) ;; *) fail "--latency $LATENCY: expected 0 or 1." ;; esac
else
  [ -z "${BUDGET_OF:-}" ] || fail "--budget_of $BUDGET_OF is for --budget equal: add it, or leave the flag away."
  [ -z "${EQUAL_TRAINING:-}" ] || fail "--equal_training $EQUAL_TRAINING is for --budget equal: add it."
  [ -z "${LATENCY:-}" ] || fail "--latency $LATENCY is for --budget equal: add it, or leave the flag away."
  METHODS=${METHODS:-independent co_training dml dks:1 l_mcl}
fi
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
export PYTHONPATH=$PROJECT${PYTHONPATH:+:$PYTHONPATH}
python=$(find_python)

# equal_budget: the rows that script/equal_budget.py plans, one after another, and their table
equal_budget() {
  local plan kind name folder rest words=()
  plan=$("$python" -m script.equal_budget ${METHODS:+--methods "$METHODS"} --arch "$ARCH" --seeds "$SEEDS" --out "$OUT" \
    ${BUDGET_OF:+--budget_of "$BUDGET_OF"} ${EQUAL_TRAINING:+--equal_training "$EQUAL_TRAINING"} \
    -- "${common[@]}" -- "${EXTRA[@]}") || exit $?
  EXTRA=() # they are in the plan
  while IFS=$'\t' read -r kind name folder rest; do
    case "$kind" in
      plan) if [ "${DRY_RUN:-0}" = 1 ]; then echo "# $name"; else echo "$name" >&2; fi ;;
      run)
        if [ -f "$folder/results.json" ]; then
          echo "finished already: $folder" >&2
          continue
        fi
        echo "== $folder" >&2
        eval "words=($rest)"
        (start train_split.py "${words[@]}" </dev/null) >&3
        ;;
      time)
        if [ "$LATENCY" = 0 ] || [ -f "$folder/latency/latency.json" ]; then continue; fi
        echo "== how fast: $name" >&2
        (start eval.py --resume "$rest" --benchmark --model_dir "$folder/latency" </dev/null) >&3
        ;;
      compare)
        eval "words=($name)"
        run "$python" -m utils.compare "${words[@]}" </dev/null
        ;;
    esac
  done <<<"$plan"
}

if [ -n "${BUDGET:-}" ]; then
  equal_budget
  exit
fi

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

run "$python" -m utils.compare --out "$OUT/compare" "${folders[@]}"
