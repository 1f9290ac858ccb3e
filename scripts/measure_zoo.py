"""Count the images that a model labels correctly: the figures on the cards of the zoo.

    python scripts/measure_zoo.py cifar10-resnet20 foolbox:cifar10

MODEL and DATA are any names that robustbox knows.
"""

from __future__ import annotations

import argparse
import sys

import torch
from tqdm import tqdm

import robustbox as rb
from robustbox.boxes import as_black_box
from robustbox.errors import InputError, ModelError


def count_right(model: str, data: str, batch: int = 32) -> tuple[int, int]:
    """How many images of the data the model labels correctly, and how many there are; one query an image."""
    box = as_black_box(model)
    images, labels = rb.load_data(data)[:2]
    right = 0
    for rows in tqdm(torch.arange(len(labels)).split(batch), disable=None, leave=False):
        answer = box.answer(images[rows].to(box.device), rows)
        right += int((answer.labels.cpu() == labels[rows]).sum())
    return right, len(labels)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("data", metavar="DATA")
    options = parser.parse_args()
    try:
        right, of = count_right(options.model, options.data)
    except (InputError, ModelError) as error:
        sys.exit(f"measure_zoo.py: {error}")
    print(f"{options.model} on {options.data}: {right} of {of} right, {right / of:.2%}")


if __name__ == "__main__":
    main()
