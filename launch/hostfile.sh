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
# DeepSpeed's own passes on few variables, and to the machines' shells it quotes only arguments with a space in them
runner='
import shlex
from deepspeed.launcher import multinode_runner, runner
runner.EXPORT_ENVS.append("OMP_NUM_THREADS")
multinode_runner.PDSHRunner.parse_user_args = lambda self: [shlex.quote(word) for word in self.args.user_args]
runner.main()'
exec "$python" -c "$runner" --hostfile "$hostfile" --force_multi --no_local_rank --module megatron_lcl train "$@"
