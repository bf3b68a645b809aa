#!/usr/bin/env bash
# One training over several machines: run this on each of them with the same HOST (the first machine) and its own RANK.
# A machine that fails is waited for: torchrun starts all processes anew, up to RESTARTS times, and they continue from
# the newest checkpoint. --model_dir must lie on a file system that all machines share.
#
# NODES: how many machines. RANK: number of this one, from 0. HOST: name or address of machine 0. PORT (29400).
# NPROC: processes per machine (its GPUs). RESTARTS (3). Flags of train_split.py follow.
set -euo pipefail
# shellcheck source=/dev/null
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

for name in NODES RANK HOST; do
  [ -n "${!name:-}" ] || fail "$name is not set. NODES=2 RANK=0 HOST=first-machine $0 --dataset … --model_dir …"
done
python=$(find_python)
run "$python" -m torch.distributed.run --nnodes "$NODES" --node_rank "$RANK" \
  --rdzv_backend c10d --rdzv_id splitnet --rdzv_endpoint "$HOST:${PORT:-29400}" \
  --nproc_per_node "${NPROC:-gpu}" --max_restarts "${RESTARTS:-3}" \
  "$PROJECT/train_split.py" "$@" --resume auto
