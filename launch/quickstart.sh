#!/usr/bin/env bash
# From a fresh Debian or Ubuntu machine to a pre-trained vision encoder in Hugging Face format, in six to seven minutes
# on two cores. No root. Arguments go to `megatron-lcl quickstart`: --html DIR (your own pages), --output DIR, --steps N.
set -eu
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
make_venv hf,demo
exec "$venv/bin/megatron-lcl" quickstart "$@"
