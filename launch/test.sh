#!/usr/bin/env bash
# Installs the test extra into .venv and runs the whole suite, two test files at a time.
#   bash launch/test.sh [ARGUMENTS OF pytest]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/environment.sh
install_into .venv ".[test]"
exec .venv/bin/python -m pytest -n 2 --dist loadfile "$@"
