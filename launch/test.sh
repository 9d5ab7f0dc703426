#!/usr/bin/env bash
# Installs what the tests need into the checkout's virtual environment (and, where root may, Debian's Slurm for the tests
# of the sbatch scripts), then formatting, lint, types, import rules, tests.
# Arguments go to pytest, e.g. `bash launch/test.sh -m "not slow"`, `--soak`, `-k contrastive`.
set -eu
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
make_venv dev
if ! PATH=$PATH:/usr/sbin command -v slurmctld >/dev/null && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
  echo "installing slurm-wlm …" >&2
  slurm() { DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends slurm-wlm munge; }
  { slurm || { apt-get update && slurm; }; } >/dev/null 2>&1 || echo "no Slurm could be installed; its tests skip" >&2
fi
cd "$root"
"$venv/bin/ruff" format --check --quiet .
"$venv/bin/ruff" check --quiet .
"$venv/bin/shellcheck" launch/*.sh
"$venv/bin/mypy"
"$venv/bin/lint-imports" --no-cache >/dev/null || "$venv/bin/lint-imports" --no-cache
exec "$venv/bin/python" -m pytest "$@"
