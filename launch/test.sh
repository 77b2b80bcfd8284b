#!/usr/bin/env bash
# Installs the test extra into .venv and runs the whole suite, a test file on each of up to 4 cores.
#   bash launch/test.sh [ARGUMENTS OF pytest]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/environment.sh
install_into .venv ".[test]"
exec .venv/bin/python -m pytest -n auto --maxprocesses=4 --dist loadfile --no-loadscope-reorder "$@"
