#!/usr/bin/env bash
# Runs a command on the cores and, while there is room, in the memory of the NUMA node next to this task's GPU:
#   SRUN_ARGS=--cpu-bind=none TASK_PREFIX="bash $PWD/launch/numa.sh" sbatch launch/lcl_vitg.sh …
# Where there is no GPU, or the machine does not tell its node, the command runs unbound, and stderr says so.
set -eu
IFS=, read -ra visible <<<"${CUDA_VISIBLE_DEVICES:-}"
task=${LOCAL_RANK:-${SLURM_LOCALID:-0}}
unbound() { # why, and the command
  echo "numa.sh: $1 on $(uname -n); unbound" >&2
  exec "${@:2}"
}
if ! command -v nvidia-smi >/dev/null; then
  [ "$task" = 0 ] || exec "$@" # the first task says it for the machine
  unbound "no nvidia-smi" "$@"
fi
bus=$(nvidia-smi --id="${visible[task]:-$task}" --query-gpu=pci.bus_id --format=csv,noheader) || unbound "nvidia-smi finds no GPU ${visible[task]:-$task}" "$@"
printf -v bus '%04x:%s' "0x${bus%%:*}" "${bus#*:}" # 00000000:1B:00.0 is 0000:1b:00.0 to Linux
node=$(cat "/sys/bus/pci/devices/${bus,,}/numa_node" 2>/dev/null || echo -1)
[ "$node" -ge 0 ] || unbound "the NUMA node of GPU $bus is unknown" "$@"
command -v numactl >/dev/null || { echo "numa.sh: numactl is not installed on $(uname -n) (or in its container); install it, or unset TASK_PREFIX" >&2 && exit 2; }
exec numactl --all --cpunodebind="$node" --preferred="$node" -- "$@"
