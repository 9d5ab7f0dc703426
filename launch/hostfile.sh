#!/usr/bin/env bash
# Training on the machines of a hostfile (one `NAME slots=GPUS` a line), started by DeepSpeed over pdsh and ssh:
#   bash launch/hostfile.sh HOSTFILE --config configs/lcl_vitl14_pairs.yaml …
# The checkout, the environment and the working folder have the same paths, without spaces, on every machine.
set -eu
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
[ -r "${1:-}" ] || { echo "usage: bash $0 HOSTFILE [arguments of megatron-lcl train]; cannot read '${1:-}'" >&2 && exit 2; }
hostfile=$1
shift
find_python
exec "$python" -m deepspeed.launcher.runner --hostfile "$hostfile" --no_local_rank --module megatron_lcl train "$@"
