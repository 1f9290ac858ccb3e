"""Measure what certification costs beside the model's own forward time, in one run.

    python scripts/bench_certify.py                      200 digits images at n = 10,000: about 2 million rows a side

Both sides answer the same number of rows in passes of the same size, image by image in turn, and are timed by the processor
time of this process: `bare` is the module alone on noisy rows that stand ready; `certify` draws the noise, asks through the
oracle, counts and bounds. The ratio is what is to be at most 1.15.
"""

from __future__ import annotations

import argparse
import time

import torch

import robustbox as rb
from robustbox.boxes import as_black_box
from robustbox.certificates import Certifier
from robustbox.oracle import Oracle


def main() -> None:
    """Measure, and print one line."""
    parser = argparse.ArgumentParser(description="Certification beside the bare model.")
    parser.add_argument("--model", default="digits-cnn")
    parser.add_argument("--data", default="digits")
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--n", type=int, default=10_000)
    parser.add_argument("--batch", type=int, default=500)
    options = parser.parse_args()
    module = rb.load_model(options.model)
    images = rb.load_data(options.data)[0][: options.images]
    certifier = Certifier(n=options.n, batch=options.batch)
    oracle = Oracle(as_black_box(module))
    spent = {"bare": 0.0, "certify": 0.0}
    for image in images:
        ready = image + certifier.sigma * torch.randn(options.batch, *image.shape)
        begin = time.process_time()
        with torch.no_grad():
            for n in (certifier.n0, certifier.n):
                for start in range(0, n, options.batch):
                    module(ready[: n - start])
        middle = time.process_time()
        certifier.certify(oracle, image)
        spent["bare"] += middle - begin
        spent["certify"] += time.process_time() - middle
    rows = oracle.ledger["certify"]
    per_row = {side: 1e6 * seconds / rows for side, seconds in spent.items()}
    print(
        f"{options.model}, {len(images)} images, {rows} rows, passes of {options.batch}: bare {per_row['bare']:.1f} us a row, "
        f"certify {per_row['certify']:.1f}: ratio {spent['certify'] / spent['bare']:.3f}"
    )


if __name__ == "__main__":
    main()
