#!/usr/bin/env bash
# Pretrains on this computer: makes .venv, then trains the tiny model on the built-in cohort.
# Arguments go to alice_jax.train: launch/local.sh --config=configs/pretrain.py --config.data.store=DIR
set -euo pipefail
source "$(dirname "$0")/environment.sh"
make_environment ""
case " $*" in
  *" --config="* | *" --config "*) ;;
  *) set -- --config=configs/pretrain.py:tiny "$@" ;;
esac
exec .venv/bin/python -m alice_jax.train "$@"
