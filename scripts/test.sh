#!/usr/bin/env bash
# Set up and run every check of the project: linter, formatter, types, tests. One command, any machine with Python.
#
#   scripts/test.sh [--fresh] [pytest arguments...]
#
# The first run installs SGLang and its stack (11 GB, minutes) into the user's cache folder; later runs reuse it. Tests that
# need a GPU are skipped with a reason where there is none. --fresh rebuilds the environment.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh

fresh=
[ "${1:-}" = --fresh ] && { fresh=fresh; shift; }
ensure_environment full $fresh

failed=()
step() { # step NAME COMMAND...: run it, remember a failure, go on
  local name=$1 started=$SECONDS; shift
  echo "=== $name"
  "$@" || failed+=("$name")
  echo "    $((SECONDS - started)) s"
}
step "ruff check" ruff check .
step "ruff format" ruff format --check --quiet .
step "mypy" mypy
step "pytest" python -m pytest -q --tb=short "$@"

if [ ${#failed[@]} -gt 0 ]; then
  echo "FAILED: ${failed[*]}"
  exit 1
fi
echo "all checks passed"
