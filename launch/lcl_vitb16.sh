#!/usr/bin/env bash
#SBATCH --job-name=lcl_vitb16 --nodes=8 --gpus-per-node=8 --exclusive --mem=0 --time=2-00:00:00 --signal=USR1@600 --requeue --open-mode=append --output=%x-%j.log
# Slurm runs a copy of this; its controller, which knows where this is, may not answer at once
told='' tries=0
while [ -n "${SLURM_JOB_ID:-}" ] && ! told=$(scontrol show job "$SLURM_JOB_ID" 2>&1); do
  [[ ! $told =~ Invalid|denied|not\ found ]] && [ $((tries += 1)) -lt 120 ] || break
  [ $tries -gt 1 ] || echo "$told; asking again for ten minutes" >&2
  sleep 5
done
here=$(sed -n 's|^ *Command=\(.*\)/lcl_vitb16\.sh.*|\1|p' <<<"$told" | head -n 1)
[ -e "${here:=$(dirname "$0")}/slurm.sh" ] || { echo "scontrol does not say where lcl_vitb16.sh is: $told" >&2 && exit 71; }
source "$here/slurm.sh" lcl_vitb16_interleaved "$@"
