#!/usr/bin/env bash
# From a fresh clone to a trained, evaluated encoder: makes .venv, installs, runs the main job on
# the embedded default (3 to 6 minutes on 2 CPU cores, 3 to 9 with the installation).
#   bash launch/quickstart.sh [ARGUMENTS OF ssrl_jax.main]
# Run again, it finds the environment and the run, goes on where that stopped, and reports again.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/environment.sh
install_into .venv "."
exec .venv/bin/python -m ssrl_jax.main --config=configs/digits.py "$@"
