#!/usr/bin/env bash
# Sets up an environment and runs the tests. Arguments go to pytest:
#   bash dev/test.sh                 everything
#   bash dev/test.sh -m "not slow"   without the slow tests
# Files are dealt to a process per core, eight at most; -n 0 runs all in one.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=dev/setup.sh
source dev/setup.sh
setup_environment dev
exec "$PY" -m pytest -n auto --maxprocesses=8 --dist loadfile "$@"
