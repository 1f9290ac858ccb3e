#!/usr/bin/env bash
# The main job on real input: CGBA, 1000 queries an image, on 20 CIFAR-10 images; the run is written to runs/demo.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh
rm -rf runs/demo
exec .venv/bin/python -m robustbox.attack --out runs/demo "$@"
