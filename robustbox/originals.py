"""The images that a run attacked, found again by their hashes in the data that its config names."""

from __future__ import annotations

from pathlib import Path

import torch
import yaml
from torch import Tensor

from robustbox.api import load_data
from robustbox.distances import rounded
from robustbox.errors import InputError
from robustbox.folder import CONFIG, read_run
from robustbox.identity import sha256


def originals_of(folder: Path) -> Tensor | None:
    """The images [N,C,H,W] of a run, rounded as they were attacked; None where its data is not named or not these images."""
    document = read_run(folder)[0]
    config = yaml.safe_load((folder / CONFIG).read_text(encoding="utf-8"))
    try:
        everything: Tensor = load_data(config["data"])[0]
    except (KeyError, TypeError, InputError):
        return None
    levels = document["levels"]
    wanted = [image["sha256"] for image in document["images"]]
    found: dict[str, Tensor] = {}
    for image in everything:
        sent = rounded(image, levels)
        if (name := sha256(sent)) in wanted:
            found[name] = sent
    return torch.stack([found[name] for name in wanted]) if set(wanted) <= set(found) else None
