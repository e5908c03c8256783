#!/usr/bin/env bash
# Trains on several machines without a scheduler. Type on each of them, in the same folder (a shared disk, or copies):
#
#   examples/torchrun.sh NODES RANK MASTER --config configs/vit-b32.yaml --data.train shards/train …
#
#   NODES   how many machines there are
#   RANK    the number of this machine: 0, 1, …
#   MASTER  name or address of machine 0, as the others reach it; its port 29500 must be free (MASTER_PORT names another)
#
# All GPUs of each machine are used, or DEVICES of them. data.batch_size is the batch over all machines, and the weights
# are those that one machine would train. If a process dies, the others end within minutes with a message; to resume, add
# --ckpt_path last to the same command on each machine.
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
