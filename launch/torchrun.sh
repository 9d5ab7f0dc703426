#!/usr/bin/env bash
# Training on this machine under torchrun: one process a GPU, or PROCESSES=N. Arguments go to `megatron-lcl train`, which
# does the same without torchrun; docs/launching.md says when to use which.
set -eu
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
find_python
# SIGUSR1 and SIGTERM are passed on, and the processes have ten minutes to save (torch 2.11 ignores the variable, and
# refuses the option --shutdown-timeout that 2.12 has for it)
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=600
exec "$python" -m torch.distributed.run --standalone --nproc-per-node="${PROCESSES:-auto}" \
  --signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 -m megatron_lcl train "$@"
