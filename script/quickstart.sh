#!/usr/bin/env bash
# From a fresh clone to a result: makes .venv, trains two small networks together on scikit-learn's digits, then the one
# network they were divided from, and prints one table. Needs Python 3.11 or newer, nothing else; no GPU, no data.
#
# QUICKSTART_DIR: where the runs go (./runs/quickstart). PYTHON: the Python that .venv is made with.
set -euo pipefail
# shellcheck source=/dev/null
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

python=$(make_environment)
parent=${QUICKSTART_DIR:-$PROJECT/runs/quickstart}
mkdir -p "$parent"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # on 16-pixel images more threads cost more than they bring
folder=$(mktemp -d "$parent/$(date +%Y%m%d-%H%M%S)-XXX")

for split_factor in 2 1; do
  "$python" "$PROJECT/train_split.py" --dataset digits --arch resnet20 --split_factor "$split_factor" \
    --seed 1 --model_dir "$folder/S$split_factor" "$@" >/dev/null
done
cd "$PROJECT"
"$python" -m script.quickstart_table "$folder/S2" "$folder/S1"
