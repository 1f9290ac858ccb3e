#!/usr/bin/env bash
# Sets up where needed and runs the tests; arguments go to pytest (`scripts/test.sh -n 0 -k budget`).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh
exec .venv/bin/python -m pytest -n 2 --dist worksteal "$@"
