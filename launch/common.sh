# shellcheck shell=bash
# Sourced by the scripts beside it: `make_venv EXTRAS` makes (or reuses) the checkout's virtual environment; `find_python`
# sets $python to that of an environment which is there.
# PYTHON chooses the interpreter (default python3, 3.11 or newer), VENV the environment's folder (default .venv).
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=${VENV:-$root/.venv}

make_venv() {
  local extras=$1 python=${PYTHON:-python3} files installed
  command -v "$python" >/dev/null || { echo "$python not found; install Python 3.11 or newer, or set PYTHON" >&2; exit 2; }
  "$python" -c 'import sys; raise SystemExit(sys.version_info < (3, 11))' ||
    { echo "$("$python" --version) is too old; install Python 3.11 or newer, or set PYTHON" >&2; exit 2; }
  if [ ! -e "$venv/pyvenv.cfg" ] && [ -n "$(ls -A "$venv" 2>/dev/null)" ]; then
    echo "$venv holds other files and is no virtual environment; name a new folder in VENV" >&2
    exit 2
  fi
  [ -x "$venv/bin/python" ] || new_venv
  if [ -n "${PYTHON:-}" ] && [ "$(version "$python")" != "$(version "$venv/bin/python")" ]; then
    echo "$venv has Python $(version "$venv/bin/python"), not $(version "$python"); name a new folder in VENV" >&2
    exit 2
  fi
  # what is installed already for the same files and Python is not installed again; a line for each set of extras
  files=$("$venv/bin/python" - "$root" <<'PY'
import hashlib, sys
root = sys.argv[1]
print(hashlib.sha256(open(f"{root}/pyproject.toml", "rb").read() + f"{root} {sys.version_info[:2]}".encode()).hexdigest())
PY
  )
  if ! grep -qsx "$files $extras" "$venv/installed"; then
    "$venv/bin/python" -m pip --version >/dev/null 2>&1 || new_venv # it was interrupted before pip was in it
    echo "installing into $venv … (log: $venv/install.log)" >&2
    "$venv/bin/python" "$root/launch/install.py" --editable "${root}[$extras]" >"$venv/install.log" 2>&1 ||
      { tail -n 20 "$venv/install.log" >&2; exit 2; }
    installed=$(grep -s "^$files " "$venv/installed" || true)
    printf '%s\n' ${installed:+"$installed"} "$files $extras" >"$venv/installed"
  fi
}

version() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])'; }

# Makes $venv with $python, or completes one that was interrupted or whose Python has gone; nothing in it is deleted but
# links to Pythons that are not there.
new_venv() {
  local log
  "$python" -c 'import ensurepip, venv' 2>/dev/null ||
    { echo "this Python cannot make virtual environments; as root: apt-get install python$(version "$python")-venv" >&2; exit 2; }
  [ ! -d "$venv/bin" ] || find -L "$venv/bin" -maxdepth 1 -name 'python*' -type l -delete
  log=$("$python" -m venv "$venv" 2>&1) || { echo "no virtual environment at $venv: $(tail -n 1 <<<"$log")" >&2; exit 2; }
}

# With `elsewhere` as an argument Python may lie where only a container sees it.
find_python() {
  python=$venv/bin/python3 # which an image's /usr has, too, where `python` may be missing
  # without the checkout's environment: what is active, be it a module, conda or another virtual environment
  [ -x "$python" ] || [ -n "${VENV:-}" ] || python=$(command -v python3 || echo "$python")
  [ "${1:-}" = elsewhere ] || [ -x "$python" ] || { echo "no Python at $python; set VENV to an environment with megatron_lcl" >&2 && exit 2; }
  # the checkout's code, where `python -m` would look in the current folder first
  export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" PYTHONSAFEPATH=1 OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
}
