# Sourced by local.sh and test.sh: makes .venv in the project with Python 3.11 or newer, once for each requirements.txt.
# shellcheck shell=bash

cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit

find_python() {
  local name
  for name in "${PYTHON:-}" python3.13 python3.12 python3.11 python3; do
    if [ -n "$name" ] && "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      echo "$name"
      return
    fi
  done
  echo "error: no Python 3.11 or newer found; install one or name it: PYTHON=/path/to/python $0" >&2
  return 1
}

# make_environment EXTRAS: installs the project with these extras, unless that was done for the same files.
make_environment() {
  local python stamp
  stamp="$1 $(cat requirements.txt setup.cfg | cksum)"
  if [ ! -x .venv/bin/python ]; then
    python=$(find_python)
    echo "making .venv with $("$python" --version)"
    "$python" -m venv .venv
  fi
  if ! grep -qxF "$stamp" .venv/installed 2>/dev/null; then
    echo "installing the project and requirements.txt into .venv"
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -e ".${1:+[$1]}"
    echo "$stamp" >> .venv/installed
  fi
}
