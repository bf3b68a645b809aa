#!/usr/bin/env bash
# Trains, resumes, evaluates and predicts on real JPEG files: real_data.sh DIR, the folder of the image archives.
set -euo pipefail
archives=$(cd "${1:?usage: real_data.sh DIR}" && pwd)
cd "$(dirname "$0")/.."
python=.venv/bin/python
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

tar -xJf "$archives/imagenet10-64.tar.xz" -C "$work"
data=$work/imagenet10-64
one_class=$(find "$data/val" -mindepth 1 -maxdepth 1 -print -quit)
common=(--dataset folder --data "$data" --arch resnet20 --split_factor 2 --crop_size 32 --workers 2 --seed 1)
common+=(--model_dir "$work/run" --epochs 5)

# a run that stops half-way, then its rest: the same command with --resume auto
$python train_split.py "${common[@]}" --max_steps 100 >/dev/null
$python train_split.py "${common[@]}" --resume auto | tail -n 1 >"$work/trained.json"
$python eval.py --resume "$work/run/model_best.pth.tar" --data "$data" --workers 2 | tail -n 1 >"$work/evaluated.json"
$python eval.py --resume "$work/run/model_best.pth.tar" --predict "$one_class" --workers 2 | tail -n 1 >"$work/predicted.json"

$python - "$work" <<'PYTHON'
import json
import pathlib
import sys

work = pathlib.Path(sys.argv[1])
trained, evaluated, predicted = (
    json.loads((work / f"{name}.json").read_text()) for name in ("trained", "evaluated", "predicted")
)
assert trained["steps"] == 5 * (5000 // 128), trained["steps"]
assert trained["ensemble_acc1"] > 25, "ten classes of real images must be learnt better than by chance"
assert evaluated["images"] == 500, evaluated["images"]
assert abs(evaluated["ensemble_acc1"] - trained["best_ensemble_acc1"]) < 3, "the checkpoint evaluates as it was trained"
assert predicted["images"] == 50, predicted["images"]
print(
    f"real images: {trained['ensemble_acc1']:.1f} % after {trained['steps']} steps "
    f"at {trained['images_per_second']:.0f} images/s"
)
PYTHON
