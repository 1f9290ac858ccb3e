"""A defense as a file: safetensors with its name, its options and how it was made as JSON in the metadata.

`python -m robustbox.defend` writes such files; wherever a defense is named, the path of one (`....safetensors`) names the
defense in it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from robustbox import registry
from robustbox.errors import InputError, StorageError
from robustbox.folder import replace_file
from robustbox.protocol import Defense

SUFFIX = ".safetensors"
SCHEMA = "1"


def is_file(name: object) -> bool:
    """Whether the name of a defense is the path of a file."""
    return isinstance(name, str) and name.endswith(SUFFIX)


def takes_options(defense: object) -> str | None:
    """The name that options of a defense go with: the only one in its chain, since a file carries its own; else None.

    Args:
        defense: a name, a list of names, or such a list as text (`[smoothing, zo.safetensors]`), as command lines take it.
    """
    if isinstance(defense, str) and defense.startswith("["):
        defense = [word.strip(" '\"") for word in defense.strip("[] ").split(",")]
    chain = list(defense) if isinstance(defense, list | tuple) else [defense]
    open_ones = [each for each in chain if not is_file(each)]
    name = open_ones[0] if len(open_ones) == 1 else None
    return name if isinstance(name, str) and name not in ("", "null", "none") else None


def claim_file(path: Path) -> None:
    """Make the folder of a file that is still to be made, and see that a file can be written there.

    Raises:
        InputError: there is such a file already, or none can be.
    """
    try:
        if path.exists():
            raise InputError(f"{path} exists: choose another file, or remove it first")
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".{path.name}.part")
        part.touch()
        part.unlink()
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror}; choose another file") from error


def write_defense(path: Path, defense: Defense, record: Mapping[str, object]) -> None:
    """Write a defense (its name must be registered) with a record of how it was made, whole or not at all.

    Raises:
        StorageError: the file cannot be written.
    """
    from safetensors.torch import save

    metadata = {
        "schema": SCHEMA,
        "robustbox_defense": defense.name,
        "options": json.dumps(defense.options()),
        "record": json.dumps(dict(record)),
    }
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in defense.tensors().items()}
    try:
        replace_file(path, save(tensors, metadata))
    except OSError as error:
        raise StorageError(f"{path} cannot be written: {error.strerror}") from error


def read_defense(path: str | Path) -> Defense:
    """The defense of a file.

    Raises:
        InputError: no such file, not a defense's, or a defense that is not installed.
    """
    return _read(path)[0]


def read_record(path: str | Path) -> dict[str, Any]:
    """How the defense of a file was made: the trainer and its options, the model, the ledger, what was measured."""
    return _read(path)[1]


def _read(path: str | Path) -> tuple[Defense, dict[str, Any]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (it is no dict)
        name = metadata["robustbox_defense"]
        options, record = json.loads(metadata["options"]), json.loads(metadata.get("record", "{}"))
    except (OSError, SafetensorError) as error:
        raise InputError(f"the defense file {path} cannot be read: {error}") from error
    except (KeyError, ValueError) as error:
        raise InputError(f"{path} holds no defense: write one with python -m robustbox.defend") from error
    if metadata.get("schema") != SCHEMA:
        raise InputError(f"{path} was written by schema {metadata.get('schema')}, this robustbox reads {SCHEMA}")
    kind = registry.load("defenses", name)
    try:
        defense = kind.from_tensors(options, tensors)
    except (TypeError, KeyError, RuntimeError) as error:
        raise InputError(f"{path} is no {name} that this robustbox understands: {error}") from error
    assert isinstance(defense, Defense)
    return defense, record
