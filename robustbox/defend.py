"""`python -m robustbox.defend TRAINER`: train or calibrate a defense for a model, write a file that `--defense` reads.

    python -m robustbox.defend zo-ae-ds --model digits-cnn --data digits:train --out zo.safetensors
    python -m robustbox.attack --model digits-cnn --defense zo.safetensors

Exit codes as those of `python -m robustbox.attack`. A long training that was interrupted goes on when the same command is
given again, where its trainer keeps checkpoints.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentParser

from robustbox import inputs, registry
from robustbox.api import load_data
from robustbox.boxes import as_black_box
from robustbox.config import add_options, canonical, explained, spelled_out
from robustbox.defense_file import claim_file, write_defense
from robustbox.environment import environment
from robustbox.errors import InputError, ModelError, StorageError
from robustbox.identity import sha256
from robustbox.oracle import Oracle
from robustbox.trainer import Trainer, Workshop, silent

PROGRAM = "python -m robustbox.defend"


@dataclass(frozen=True, kw_only=True)
class DefendConfig:
    """What to defend, with which images.

    Args:
        model: a zoo name, timm:NAME, torchvision:NAME or file:PATH.
        data: the defender's images, never those that are attacked later: digits:train, npz:PATH, folder:PATH and so on
            (see python -m robustbox.attack --list).
        images: use the first so many images of the data set; default: all.
        defense: a defense that already stands around the model: a name or a file; or a list, outermost first.
        levels: round rows to so many grey levels before the model sees them.
        seed: every random number comes from it.
        device: auto, cpu, cuda, cuda:1 and so on.
        out: the file to write; default: TRAINER-MODEL.safetensors.
        quiet: say nothing.
    """

    model: str = "cifar10-resnet20"
    data: str | None = None
    images: int | None = None
    defense: str | list[str] | None = None
    levels: int | None = None
    seed: int = 0
    device: str = "auto"
    out: str | None = None
    quiet: bool = False


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    try:
        config, trainer = parse(list(sys.argv[1:] if argv is None else argv))
        run(config, trainer)
    except (InputError, ModelError, StorageError) as error:
        print(f"{PROGRAM}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{PROGRAM}: interrupted", file=sys.stderr)
        return 130
    return 0


def parse(words: list[str]) -> tuple[DefendConfig, Trainer]:
    """The configuration and the trainer that a command line asks for; `--help` prints and exits.

    Raises:
        InputError: no trainer, an unknown one, or an unknown option.
    """
    if not words or words[0].startswith("-"):
        known = ", ".join(registry.names("trainers"))
        if words and words[0] in ("-h", "--help"):
            print(f"usage: {PROGRAM} TRAINER [--model NAME] --data NAME [--OPTION VALUE ...]\n\ntrainers: {known}")
            raise SystemExit(0)
        raise InputError(f"name a trainer first, as {PROGRAM} TRAINER --help; known: {known}")
    factory = registry.load("trainers", words[0])
    parser = ArgumentParser(
        prog=f"{PROGRAM} {words[0]}",
        description=(factory.__doc__ or "").strip(),
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_class_arguments(DefendConfig, None)
    add_options(parser, factory, "", f"options of {words[0]}")
    switches = {f"--{f.name}" for kind in (DefendConfig, factory) for f in fields(kind) if f.type in ("bool", bool)}
    plain = [canonical(word) for word in words[1:]]
    try:
        given: dict[str, Any] = parser.parse_args(spelled_out(plain, switches)).as_dict()
    except argparse.ArgumentError as error:
        raise explained(error, parser) from None
    own = {f.name for f in fields(DefendConfig)}
    trainer = factory(**{name: value for name, value in given.items() if name not in own})
    return DefendConfig(**{name: given[name] for name in own}), trainer


def run(config: DefendConfig, trainer: Trainer) -> Path:
    """Train, and write the file; returns its path.

    Raises:
        InputError: bad input, or a file that cannot be written, before a row is asked.
        ModelError: the black box failed.
        StorageError: the file can no longer be written.
    """
    stem = re.sub(r"[^\w.-]+", "-", f"{trainer.name}-{config.model}")
    out = Path(config.out or f"{stem}.safetensors")
    if out.suffix != ".safetensors":
        raise InputError(f"--out must end in .safetensors, by which --defense knows a file; not {out.name}")
    if config.data is None:
        raise InputError("name the defender's images with --data: not those that are attacked later")
    box = as_black_box(config.model, config.device)
    for recipe in reversed(inputs.resolve_defenses(config.defense, None)):
        box = recipe.wrap(box, config.seed)
    everything, classes = load_data(config.data, box)[:2]
    if config.images is not None and not 1 <= config.images <= len(everything):
        raise InputError(f"--images must be from 1 to {len(everything)}, the size of the data set; not {config.images}")
    images = inputs.check_images(everything[: config.images], box)
    labels = inputs.check_labels(classes[: config.images], len(images), box.classes)
    inputs.check_threat("l2", None, config.levels)
    claim_file(out)
    shop = Workshop(
        oracle=Oracle(box, "score", config.levels),
        images=images,
        labels=labels,
        seed=config.seed,
        checkpoint=out.with_suffix(".checkpoint"),
        report=silent if config.quiet else _say,
    )
    write_defense(out, defense := trainer.train(shop), made(shop, trainer, config))
    assert shop.checkpoint
    shop.checkpoint.unlink(missing_ok=True)
    shop.report(f"{defense.name} written to {out}; rows asked: {dict(shop.oracle.ledger) or 'none'}")
    return out


def made(shop: Workshop, trainer: Trainer, config: DefendConfig) -> dict[str, object]:
    """How the defense was made, for its file: plain JSON values."""
    return {
        "trainer": {"name": trainer.name, "options": trainer.options()},
        "model": shop.box.describe(),
        "data": {"name": config.data, "images": len(shop.images), "first": sha256(shop.images[0])},
        "levels": config.levels,
        "seed": config.seed,
        "ledger": dict(shop.oracle.ledger),
        "environment": environment(shop.box.device),
        **shop.record,
    }


def _say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    torch.set_flush_denormal(True)  # weights that decay to nothing cost no time
    sys.exit(main())
