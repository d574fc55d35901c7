#!/usr/bin/env bash
# Everything a change must pass: lint, format, types, import rules, and the default tests. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh dev

export PATH="$PWD/.venv/bin:$PATH"
ruff check .
ruff format --check .
basedpyright
lint-imports
pytest -n auto --maxprocesses 4 --dist loadfile "$@"
