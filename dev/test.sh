#!/usr/bin/env bash
# Sets up an environment and runs the tests. Arguments go to pytest:
#   bash dev/test.sh                 everything
#   bash dev/test.sh -m "not slow"   without the slow tests
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=dev/setup.sh
source dev/setup.sh
setup_environment dev
exec "$PY" -m pytest "$@"
