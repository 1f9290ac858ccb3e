"""`python -m robustbox.certify`: certify a smoothed model, with whatever defenses stand before it, image by image.

    python -m robustbox.certify --model digits-cnn --images 200 --sigma 0.25 --out runs/certified

Writes a folder: `config.yaml`, `identity.json` (what its names stood for: weights, options, images), one line an image in
`images.jsonl` as soon as it is certified, `rows.txt` (the rows asked, before they are), and `certified.json`
(docs/smoothing.md is its schema) at the end. The same command on a folder that was interrupted goes on with the next image.
Exit codes as those of `python -m robustbox.attack`.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser
from tqdm import tqdm

from robustbox import inputs, setting
from robustbox.api import load_data
from robustbox.boxes import as_black_box
from robustbox.certificates import Certificate, Certifier, certified_share
from robustbox.claim import ASKED, CERTIFIED, IMAGES, KIND, asked, check_claim, claim
from robustbox.config import canonical, explained, spelled_out
from robustbox.environment import environment
from robustbox.errors import InputError, ModelError, StorageError
from robustbox.evaluator import undefended
from robustbox.folder import locked
from robustbox.identity import sha256
from robustbox.ledger import WrittenLedger
from robustbox.oracle import Oracle
from robustbox.provenance import record_of
from robustbox.statistics import wilson

PROGRAM = "python -m robustbox.certify"
SCHEMA = 1


@dataclass(frozen=True, kw_only=True)
class CertifyConfig:
    """What to certify on what.

    Args:
        model: a zoo name, timm:NAME, torchvision:NAME, file:PATH or an address.
        data: digits, foolbox:NAME, npz:PATH, folder:PATH and so on; default: the model's own sample images.
        images: certify the first so many images of the data set; default: 20, or all where there are fewer.
        defense: a name, a file that robustbox.defend wrote, or a list, outermost first: a part of what is smoothed.
        sigma: standard deviation of the noise, in units of images in [0, 1].
        n0: draws that guess the class.
        n: fresh draws that bound its probability.
        alpha: probability that a certificate may be wrong.
        radii: l2 radii at which certified accuracy is summed up.
        clip: clip noisy rows to [0, 1], for a model that takes nothing else.
        levels: round noisy rows to so many grey levels before the model sees them.
        batch: rows a pass; the noise depends on it.
        seed: every random number comes from it.
        device: auto, cpu, cuda, cuda:1 and so on.
        out: the folder to write; default: certified-MODEL.
        quiet: no progress bar and no table.
        dry_run: check everything, say how many rows it would cost at most, ask none.
    """

    model: str = "cifar10-resnet20"
    data: str | None = None
    images: int | None = None
    defense: str | list[str] | None = None
    sigma: float = 0.25
    n0: int = 100
    n: int = 10_000
    alpha: float = 0.001
    radii: list[float] | None = None
    clip: bool = False
    levels: int | None = None
    batch: int = 500
    seed: int = 0
    device: str = "auto"
    out: str | None = None
    quiet: bool = False
    dry_run: bool = False

    def certifier(self) -> Certifier:
        """What certifies.

        Raises:
            InputError: a number that means nothing.
        """
        if wrong := [radius for radius in self.radii or [] if not 0 <= radius < math.inf]:
            raise InputError(f"radii must be numbers of at least 0, not {wrong[0]}")
        return Certifier(self.sigma, self.n0, self.n, self.alpha, self.clip, self.batch, self.seed)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    try:
        config = parse(list(sys.argv[1:] if argv is None else argv))
        run(config)
    except (InputError, ModelError, StorageError) as error:
        print(f"{PROGRAM}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{PROGRAM}: interrupted; the same command goes on", file=sys.stderr)
        return 130
    return 0


def parse(words: list[str]) -> CertifyConfig:
    """The configuration that a command line asks for; `--help` prints and exits.

    Raises:
        InputError: an unknown option, or a value of the wrong type.
    """
    parser = ArgumentParser(
        prog=PROGRAM, description="Certify a smoothed model.", exit_on_error=False, allow_abbrev=False
    )
    parser.add_class_arguments(CertifyConfig, None)
    switches = {f"--{f.name}" for f in fields(CertifyConfig) if f.type == "bool"}
    words = spelled_out([canonical(word) for word in words], switches)
    try:
        return CertifyConfig(**parser.parse_args(words).as_dict())
    except argparse.ArgumentError as error:
        raise explained(error, parser) from None


def run(config: CertifyConfig) -> dict[str, Any]:
    """Certify as the configuration says; returns what `certified.json` holds.

    Raises:
        InputError: bad input, before a row is asked.
        ModelError: the black box failed; the images that were certified until then stand in the folder.
        StorageError: the folder can no longer be written to.
    """
    certifier = config.certifier()
    box = as_black_box(config.model, config.device)
    chain = inputs.resolve_defenses(config.defense, None)
    for recipe in reversed(chain):
        box = recipe.wrap(box, config.seed)
    inputs.check_threat("l2", None, config.levels)
    oracle = Oracle(box, levels=config.levels)
    certifier.check(oracle)
    name = config.data or setting.own_data(config.model)
    everything, classes = load_data(name, box)[:2]
    n = setting.count(config.images, len(everything))
    images = inputs.check_images(everything[:n], box)
    labels = inputs.check_labels(classes[:n], n, box.classes)
    rows = n * (config.n0 + config.n)
    folder = Path(config.out or f"certified-{config.model.replace(':', '-').replace('/', '-')}")
    recipes = record_of(chain)
    model = undefended(oracle).box.describe()
    hashes = [sha256(image) for image in images]
    identity = {"weights": model.get("weights_sha256"), "defenses": recipes, "images": hashes}
    command = _command(config, name, n)
    check_claim(folder, command, identity)
    if config.dry_run:
        print(f"{n} images, at most {rows} rows on the certify ledger; no row was asked")
        return {}
    with locked(folder, KIND), tqdm(total=n, disable=config.quiet or None) as bar:
        done = claim(folder, command, identity)
        bar.update(len(done))
        before = asked(folder, len(done) * (config.n0 + config.n))
        oracle.ledger = WrittenLedger(folder / ASKED, lambda now: str(before + now["certify"]).encode())
        with (folder / IMAGES).open("a", encoding="utf-8") as book:
            for i in range(len(done), n):
                found = certifier.certify(oracle, images[i])
                done.append(found)
                book.write(json.dumps(found) + "\n")
                book.flush()
                bar.update()
    document = {
        "schema": SCHEMA,
        "model": model,
        "defense": recipes,
        **{key: getattr(config, key) for key in ("sigma", "n0", "n", "alpha", "clip", "levels", "batch", "seed")},
        "norm": "l2",
        "data": name,
        "environment": environment(box.device),
        "summary": summary(done, labels, config.radii or _radii(certifier), before + oracle.ledger["certify"]),
        "images": [
            {"index": i, "sha256": sha, "label": label, **c._asdict(), "correct": c.predicted == label}
            for i, (c, label, sha) in enumerate(zip(done, labels, hashes, strict=True))
        ],
    }
    part = folder / f".{CERTIFIED}.part"
    part.write_text(json.dumps(document, indent=1, default=str) + "\n", encoding="utf-8")
    part.replace(folder / CERTIFIED)
    if not config.quiet:
        show(document, print)
        print(f"written to {folder}")
    return document


def summary(certificates: list[Certificate], labels: list[int], radii: Sequence[float], rows: int) -> dict[str, Any]:
    """Certified accuracy at each radius with its 95 % Wilson interval, abstentions and rows; plain JSON values."""
    accuracy = {}
    for at in radii:
        hits, of = certified_share(certificates, labels, at)
        low, high = wilson(hits, of)
        accuracy[f"{at:g}"] = {"hits": hits, "of": of, "share": hits / of if of else None, "low": low, "high": high}
    abstained = sum(c.predicted < 0 for c in certificates)
    return {"certified_accuracy": accuracy, "abstained": abstained, "ledger": {"certify": rows}}


def show(document: dict[str, Any], line: Callable[[str], None]) -> None:
    """The certified accuracies, a line each."""
    for at, share in document["summary"]["certified_accuracy"].items():
        interval = f"95 % interval {share['low']:.1%} to {share['high']:.1%}"
        line(f"certified at l2 {at}: {share['hits']} of {share['of']} = {share['share']:.1%} ({interval})")
    line(f"abstained: {document['summary']['abstained']}; rows: {document['summary']['ledger']['certify']}")


def _radii(certifier: Certifier) -> list[float]:
    """Sigma, 2 sigma and so on up to the largest radius that n draws can show, and 0."""
    return [k * certifier.sigma for k in range(int(certifier.largest / certifier.sigma) + 1)]


def _command(config: CertifyConfig, data: str, n: int) -> str:
    """What is certified and how, with what was left to defaults, as `config.yaml` says it."""
    import yaml

    wanted = {**asdict(config), "data": data, "images": n}
    wanted = {key: value for key, value in wanted.items() if key not in ("out", "quiet", "dry_run", "radii")}
    return yaml.safe_dump(wanted, sort_keys=False)


if __name__ == "__main__":
    sys.exit(main())
