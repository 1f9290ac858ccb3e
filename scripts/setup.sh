#!/usr/bin/env bash
# Makes .venv with robustbox (editable) and its development tools; skipped while pyproject.toml and the constraints are
# what they were. PYTHON names another interpreter than python3 (3.11 or newer).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${PYTHON:-python3}
stamp=.venv/.set-up-for
wanted=$({ pwd && cat pyproject.toml scripts/constraints.txt; } |
    "$python" -c 'import hashlib, sys; print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest())')
if [[ -f $stamp && $(<"$stamp") == "$wanted" ]]; then
    exit 0
fi
echo "set-up: installing robustbox and its tools into .venv (some minutes the first time)" >&2
"$python" -m venv .venv
.venv/bin/python -m pip install -qq --constraint scripts/constraints.txt --editable '.[dev]'
echo "$wanted" >"$stamp"
