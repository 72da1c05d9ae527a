#!/usr/bin/env bash
# Sets up an environment and runs the tests. Arguments go to pytest:
#   bash dev/test.sh                 everything
#   bash dev/test.sh -m "not slow"   without the slow tests
# Files are distributed over a process per core, eight at most; -n 0 runs all in one.
# Where it may install what tests need, a test that should run and is skipped fails (NO_SKIPS=1: everywhere).
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=dev/setup.sh
source dev/setup.sh
setup_environment dev
flags=(-n auto --maxprocesses=8 --dist loadfile)
if setup_chromium; then
  flags+=(--no-skips)
elif [ -n "${NO_SKIPS:-}" ]; then
  die "the tests of the chat page need Chromium, which is not here and could not be installed. Install it, or name it with CHROMIUM=PATH"
fi
exec "$PY" -m pytest "${flags[@]}" "$@"
