"""A run's folder: `config.yaml`, `results.json` (docs/results.md is its schema) and `adversarials.safetensors`.

The folder is claimed before the first query and filled when the run ends, however it ends. Every file appears whole or
not at all, results.json last: where it stands, the folder is complete.
"""

from __future__ import annotations

import json
import math
import os
import platform
import sys
import tomllib
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from robustbox.errors import InputError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from robustbox.results import AttackResult

SCHEMA = 1
"""The version of results.json; it changes when a field changes its meaning or goes."""
CONFIG, RESULTS, ADVERSARIALS = "config.yaml", "results.json", "adversarials.safetensors"
_PACKAGES = ("torchvision", "timm", "numpy", "scipy", "safetensors", "foolbox")


class RunFolder:
    """Where one run is written; as a context manager it gives the folder back if the run ended before it had a result.

    Args:
        path: the folder, or None for a run that is not written.
        config: what would run it again, written at once: it marks the folder as taken.

    Raises:
        InputError: the folder holds another run, or cannot be written to.
    """

    def __init__(self, path: Path | None, config: Mapping[str, Any]) -> None:
        self.path = path
        self.written = False
        if path is None:
            return
        self._new = not path.exists()
        try:
            path.mkdir(parents=True, exist_ok=True)
            taken = [name for name in (CONFIG, RESULTS, ADVERSARIALS) if (path / name).exists()]
            if taken:
                raise FileExistsError
            with (path / CONFIG).open("x", encoding="utf-8") as file:  # "x": of two runs at once, one gets it
                file.write(_yaml(config))
        except FileExistsError:
            what = "holds another run" if path.is_dir() else "is a file"
            raise InputError(f"the output folder {path} {what}: choose another one, or remove it first") from None
        except OSError as error:
            raise InputError(f"the output folder {path} cannot be written to: {error.strerror}") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.path is not None and not self.written:
            (self.path / CONFIG).unlink(missing_ok=True)
            if self._new and self.path.exists() and not any(self.path.iterdir()):
                self.path.rmdir()

    def write(self, result: AttackResult) -> None:
        """Write what was found, also by a run that ended early; results.json comes last."""
        if self.path is None:
            return
        from safetensors.torch import save

        document = document_of(result)
        hashes = json.dumps([image["sha256"] for image in document["images"]])
        tensors = {"adversarials": result.adversarials.detach().cpu().contiguous()}
        replace_file(self.path / ADVERSARIALS, save(tensors, {"schema": str(SCHEMA), "sha256_of_originals": hashes}))
        replace_file(self.path / RESULTS, (json.dumps(document, indent=1, allow_nan=False) + "\n").encode())
        self.written = True


def open_run(out: RunFolder | str | os.PathLike[str] | None, config: Mapping[str, Any]) -> RunFolder:
    """Claim the folder of a run before its first query; one that is open already (the command line's) is taken as it is.

    Raises:
        InputError: the folder holds another run, or cannot be written to.
    """
    return out if isinstance(out, RunFolder) else RunFolder(None if out is None else Path(out), config)


def read_run(path: str | os.PathLike[str]) -> tuple[dict[str, Any], Tensor]:
    """The results (as docs/results.md describes them) and the adversarials [N,C,H,W] (NaN where none) of a folder.

    Raises:
        InputError: the folder holds no complete run, or one of another schema.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = Path(path)
    try:
        document: dict[str, Any] = json.loads((folder / RESULTS).read_text(encoding="utf-8"))
        adversarials = load_file(folder / ADVERSARIALS)["adversarials"]
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise InputError(f"{folder} holds no complete run: {error}") from error
    if (found := document.get("schema")) != SCHEMA:
        raise InputError(f"{folder} was written by schema {found}, this robustbox reads schema {SCHEMA}")
    return document, adversarials


def document_of(result: AttackResult) -> dict[str, Any]:
    """results.json as plain JSON values; NaN and infinity become null."""
    from robustbox.results import REPLAYS, share_of

    run = dict(result.meta)
    images = [
        {
            "index": i,
            **identity,
            "clean_correct": bool(result.clean_correct[i]),
            "success": bool(result.success[i]),
            "success_any": bool(result.success_any[i]),
            "success_fresh": bool(result.success_fresh[i]),
            "success_clean": bool(result.success_clean[i]),
            "success_strict": bool(result.success_strict[i]),
            "success_undefended": bool(result.success_undefended[i]),
            "fresh": share_of(int(result.fresh_fooled[i]), int(result.fresh_draws[i])),
            "replay_risk": {str(n): float(result.replay_risk(n)[i]) for n in REPLAYS},
            "distance": float(result.distance[i]),
            "queries": int(result.queries[i]),
            "first_success": int(result.first_success[i]),
            "rejected": int(result.rejected[i]),
            "first_rejected": int(result.first_rejected[i]),
            "refusals": result.refusals[i],
            "accounts_burnt": int(result.accounts_burnt[i]),
            "stop_reason": result.stop_reasons[i],
            "error": result.errors[i],
            "trace": result.traces[i],
        }
        for i, identity in enumerate(run.pop("images"))
    ]
    written = datetime.now(UTC).isoformat(timespec="seconds")
    document = {"schema": SCHEMA, "written": written, **run, "summary": result.summary(), "images": images}
    return finite(document)  # type: ignore[no-any-return]


def environment(device: torch.device) -> dict[str, Any]:
    """Versions and hardware that a result depends on. It names no machine and no person."""
    import torch

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    return {
        "robustbox": version(),
        "python": platform.python_version(),
        "packages": {"torch": torch.__version__, **{package: _version_of(package) for package in _PACKAGES}},
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": str(device),
        "device_name": name,
    }


def version() -> str:
    """The version of robustbox; a checkout speaks for itself."""
    project = Path(__file__).resolve().parent.parent / "pyproject.toml"
    if project.is_file():
        return str(tomllib.loads(project.read_text(encoding="utf-8"))["project"]["version"])
    return metadata.version("robustbox")


def _version_of(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    """The processor's model, as far as the system tells."""
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _yaml(config: Mapping[str, Any]) -> str:
    import yaml

    return yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True)


def replace_file(path: Path, content: bytes) -> None:
    """Write a file so that at every moment the old one or the new one stands there whole."""
    part = path.with_name(f".{path.name}.part")
    part.write_bytes(content)
    os.replace(part, path)


def finite(value: Any) -> Any:
    """The value with null for every NaN and infinity: JSON has neither."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value
