#!/usr/bin/env bash
# Makes .venv with everything that the tests need, and runs them; arguments go to pytest (--slow adds the long ones).
set -euo pipefail
source "$(dirname "$0")/environment.sh"
make_environment dev,torch
.venv/bin/ruff check .
.venv/bin/ruff format --check --quiet . || { echo "error: run .venv/bin/ruff format ."; exit 1; }
.venv/bin/mypy
exec .venv/bin/python -m pytest -q "$@"
