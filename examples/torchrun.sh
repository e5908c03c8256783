#!/usr/bin/env bash
# Training on several machines without a scheduler. Type on each of them, in the same folder (a shared disk, or copies):
#
#   examples/torchrun.sh NODES RANK MASTER --config configs/vit-b32.yaml --data.train shards/train …
#
#   NODES   how many machines there are
#   RANK    which of them this is: 0, 1, …
#   MASTER  name or address of machine 0, as the others reach it; its port 29500 must be free (MASTER_PORT names another)
#
# All GPUs of each machine are used; DEVICES says how many otherwise. data.batch_size stays the batch over all of them, and the
# weights are those that one machine would train. If a process dies, the others end within minutes and say so; type the same on
# each machine with --ckpt_path last.
set -euo pipefail
if [ $# -lt 3 ]; then
    sed -n '2,12p' "$0" >&2
    exit 2
fi
nodes=$1 rank=$2 master=$3
shift 3
devices=${DEVICES:-$(nvidia-smi --list-gpus | wc -l)}
exec python -m torch.distributed.run --nnodes "$nodes" --node-rank "$rank" --nproc-per-node "$devices" \
    --master-addr "$master" --master-port "${MASTER_PORT:-29500}" \
    train.py fit --trainer.num_nodes "$nodes" --trainer.devices "$devices" --trainer.strategy "${STRATEGY:-ddp}" "$@"
