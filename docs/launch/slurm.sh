#!/usr/bin/env bash
# sbatch slurm.sh distill.yaml, in the folder whose paths the configuration names.
#SBATCH --job-name=deltaconv
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
# Two minutes before the end all processes stop after the same step and save; submit again to go on.
#SBATCH --signal=TERM@120
set -euo pipefail

first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun --kill-on-bad-exit=1 "${PYTHON:-python3}" -m torch.distributed.run \
    --nnodes "$SLURM_JOB_NUM_NODES" \
    --nproc-per-node "${PROCESSES:-gpu}" \
    --rdzv-backend c10d \
    --rdzv-id "$SLURM_JOB_ID" \
    --rdzv-endpoint "$first:${PORT:-29500}" \
    -m comfyui_deltaconv.cli "${COMMAND:-distill}" --config "$1"
