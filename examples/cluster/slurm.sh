#!/bin/bash
# zotune train on several machines of a Slurm cluster:  sbatch examples/cluster/slurm.sh CONFIG.yaml OUTPUT
# OUTPUT lies on a disk that all machines see. A job that Slurm puts back into its queue goes on where it was.
#SBATCH --job-name=zotune
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=12:00:00
#SBATCH --requeue
#SBATCH --signal=TERM@120
set -euo pipefail

config=$1 output=$2
read -r first < <(scontrol show hostnames "$SLURM_JOB_NODELIST")

export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 # else torch 2.13 lets a torchrun that comes later wait for ever

# one torchrun a machine, a worker a card; the first machine is where they meet, and has to stay
exec srun --kill-on-bad-exit=0 torchrun \
    --nnodes "$SLURM_NNODES" --nproc-per-node "${SLURM_GPUS_ON_NODE:-1}" --max-restarts 10 \
    --rdzv-backend c10d --rdzv-endpoint "$first:29500" --rdzv-id "$SLURM_JOB_ID" \
    -m zotune train --config "$config" --output "$output" --resume
