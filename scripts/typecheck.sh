#!/usr/bin/env bash
# mypy over the four packages under the names that they install as: a tree of links gives them those names.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
root=$PWD tree=build/typecheck
rm -rf "$tree"
mkdir -p "$tree/robustbox"
ln -s "$root"/robustbox/* "$root"/{attacks,defenses,models} "$tree/robustbox/"
cd "$tree"
exec "$root/.venv/bin/python" -m mypy --config-file "$root/pyproject.toml" --cache-dir "$root/build/mypy" --package robustbox "$@"
