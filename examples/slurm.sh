#!/usr/bin/env bash
# Training on a cluster with SLURM, one task for each GPU:
#
#   sbatch examples/slurm.sh --config configs/vit-b32.yaml --data.train shards/train … --name mine
#
# SLURM signals the job two minutes before its time is up. The run then finishes its step, saves, and requeues itself; the
# same command resumes it (--ckpt_path last begins a run that is new). data.batch_size is the batch over all GPUs of all
# nodes.
#SBATCH --job-name=miniclip
#SBATCH --nodes=2
#SBATCH --gpus-per-node=4
#SBATCH --ntasks-per-node=4
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=SIGUSR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.txt
set -euo pipefail
srun python train.py fit --trainer.num_nodes "$SLURM_JOB_NUM_NODES" --trainer.devices "$SLURM_NTASKS_PER_NODE" \
    --trainer.strategy "${STRATEGY:-ddp}" --ckpt_path last "$@"
