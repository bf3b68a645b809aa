#!/usr/bin/env bash
# The last stage of a run: its networks teach one student, on the same data with the same recipe and seed, and one table
# shows both. It is a second run: a killed one goes on when the same command is given again.
set -euo pipefail
# shellcheck source=/dev/null
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

usage() {
  cat <<'TEXT'
usage: distill.sh RUN_DIR [EPOCHS] [--student undivided|one] [--plain RUN_DIR] [--out DIR]
                  [-- flags of train_split.py, such as --kd_temperature 2]
RUN_DIR: a finished run; its best checkpoint teaches. EPOCHS: of the student [as the run]. --student: the undivided
network [undivided], or one of the run's divided ones. --plain: a run of the student's network without a teacher, for
the table. --out [RUN_DIR/distill]: the student's run; distill.md beside it. The same as environment variables:
RUN EPOCHS STUDENT PLAIN OUT.
TEXT
}

parse_settings "RUN EPOCHS STUDENT PLAIN OUT" "$@"
[ -n "${RUN:-}" ] || fail "which run? Give its folder: distill.sh RUN_DIR."
run=$(realpath "$RUN") && out=$(realpath -m "${OUT:-$run/distill}")
plain=${PLAIN:+$(realpath "$PLAIN")}
python=$(find_python)

(cd "$PROJECT" && "$python" -m script.distill plan "$run" "$out" "${EPOCHS:-}" "${STUDENT:-undivided}")
"$python" "$PROJECT/train_split.py" --config "$out/distill.yaml" --model_dir "$out" --resume auto "${EXTRA[@]}" >/dev/null

rows=()
evaluated() { # evaluated LABEL RUN_DIR NAME: the figures and latency of its best checkpoint, once
  local folder=$out/eval_$3
  # latency.json comes last: an evaluation that was killed before it has results without times
  [ -f "$folder/latency.json" ] || "$python" "$PROJECT/eval.py" --resume "$2/model_best.pth.tar" --benchmark \
    --model_dir "$folder" >/dev/null
  rows+=("$1=$2:$folder")
}
evaluated teacher "$run" teacher
evaluated student "$out" student
[ -z "$plain" ] || evaluated "without a teacher" "$plain" plain
cd "$PROJECT"
"$python" -m script.distill table "${rows[@]}" | tee "$out/distill.md"
