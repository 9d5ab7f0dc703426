#!/usr/bin/env bash
#SBATCH --job-name=lcl_vitb32 --nodes=4 --gpus-per-node=8 --exclusive --mem=0 --time=2-00:00:00 --signal=USR1@600 --requeue --open-mode=append --output=%x-%j.log
here=$(scontrol show job "${SLURM_JOB_ID:-none}" 2>/dev/null | sed -n 's|^ *Command=\(.*\)/lcl_vitb32\.sh.*|\1|p' | head -n 1)
source "${here:=$(dirname "$0")}/slurm.sh" lcl_vitb32_interleaved "$@"
