#!/usr/bin/env bash
# Installs what the tests need into the checkout's virtual environment, then formatting, lint, types, import rules, tests.
# Arguments go to pytest, e.g. `bash launch/test.sh -m "not slow"`, `--soak`, `-k contrastive`.
set -eu
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
make_venv dev
cd "$root"
"$venv/bin/ruff" format --check --quiet .
"$venv/bin/ruff" check --quiet .
"$venv/bin/mypy"
"$venv/bin/lint-imports" --no-cache >/dev/null || "$venv/bin/lint-imports" --no-cache
exec "$venv/bin/python" -m pytest "$@"
