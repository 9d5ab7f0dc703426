#!/usr/bin/env bash
# Installs what the tests need into the checkout's virtual environment (and, where root may, Debian's Slurm for the tests
# of the sbatch scripts and Chromium for those of pages), then formatting, lint, types, import rules, tests.
# Arguments go to pytest, e.g. `bash launch/test.sh -m "not slow"`, `--soak`, `-k contrastive`; `-n 0` runs all tests in one
# process, `-n 4` in four. Without it tests/conftest.py chooses by cores and memory.
set -eu
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
get() {  # the command that tells whether it is there, the packages that have it
  PATH=$PATH:/usr/sbin command -v "$1" >/dev/null && return
  [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null || return 0
  echo "installing ${*:2} …" >&2
  install() { DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends "$@"; }
  log=$({ install "${@:2}" || { apt-get update && install "${@:2}"; }; } 2>&1) ||
    printf '%s\n' "$(tail -n 5 <<<"$log")" "${*:2} could not be installed; tests that need it skip" >&2
}
{ get slurmctld slurm-wlm munge; get chromium chromium; } & # while packages are installed
trap wait EXIT
make_venv dev
wait
cd "$root"
"$venv/bin/mypy" & types=$!
# while mypy works, what each of many processes would do again: Python's bytecode, and the asserts as pytest rewrites them,
# of all that tests import; numba's functions
unset PYTHONDONTWRITEBYTECODE
compile() {
  "$venv/bin/python" -m compileall -q megatron_lcl tests
  PYTHONPATH=tests "$venv/bin/python" tests/compile_numba.py & numba=$!
  "$venv/bin/python" -m pytest --collect-only -q -n 0 >/dev/null || true # the tests will say why
  wait "$numba"
}
compile & compiled=$!
"$venv/bin/ruff" format --check --quiet .
"$venv/bin/ruff" check --quiet .
"$venv/bin/shellcheck" launch/*.sh
"$venv/bin/lint-imports" --no-cache >/dev/null || "$venv/bin/lint-imports" --no-cache
wait "$types"
wait "$compiled"
exec "$venv/bin/python" -m pytest -n auto --dist loadfile --no-loadscope-reorder --durations 25 "$@"
