# shellcheck shell=bash
# Sourced by the scripts beside it: `make_venv EXTRAS` makes (or reuses) the checkout's virtual environment; `find_python`
# sets $python to that of an environment which is there.
# PYTHON chooses the interpreter (default python3, 3.11 or newer), VENV the environment's folder (default .venv).
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=${VENV:-$root/.venv}

make_venv() {
  local extras=$1 python=${PYTHON:-python3} wanted
  command -v "$python" >/dev/null || { echo "$python not found; install Python 3.11 or newer, or set PYTHON" >&2; exit 2; }
  "$python" -c 'import sys; raise SystemExit(sys.version_info < (3, 11))' ||
    { echo "$("$python" --version) is too old; install Python 3.11 or newer, or set PYTHON" >&2; exit 2; }
  if [ ! -x "$venv/bin/python" ]; then
    "$python" -m venv "$venv" 2>/dev/null || {
      rm -rf "$venv"
      echo "this Python cannot make virtual environments; as root: apt-get install python3-venv" >&2
      exit 2
    }
  fi
  # what is installed already for the same files is not installed again
  wanted=$("$venv/bin/python" - "$root" "$extras" <<'PY'
import hashlib, sys
root, extras = sys.argv[1:]
print(hashlib.sha256(open(f"{root}/pyproject.toml", "rb").read() + f"{root} {extras}".encode()).hexdigest())
PY
  )
  if [ "$(cat "$venv/installed" 2>/dev/null)" != "$wanted" ]; then
    echo "installing into $venv …" >&2
    {
      "$venv/bin/python" -m pip install --disable-pip-version-check --upgrade pip setuptools wheel &&
        "$venv/bin/python" -m pip install --disable-pip-version-check --editable "${root}[$extras]"
    } >"$venv/install.log" 2>&1 || { tail -n 20 "$venv/install.log" >&2; exit 2; }
    echo "$wanted" >"$venv/installed"
  fi
}

find_python() {
  python=$venv/bin/python
  # without the checkout's environment: what is active, be it a module, conda or another virtual environment
  [ -x "$python" ] || [ -n "${VENV:-}" ] || python=$(command -v python3 || echo "$python")
  [ -x "$python" ] || { echo "no Python at $python; set VENV to an environment with megatron_lcl" >&2 && exit 2; }
  export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
}
