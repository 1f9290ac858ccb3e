"""A run's folder: `config.yaml`, `journal.sqlite`, `results.json` (docs/results.md is its schema) and
`adversarials.safetensors`.

The folder is claimed before the first query and filled when the run ends, however it ends. Every file but the journal
appears whole or not at all, results.json last; the journal tells a run that goes on what was answered before.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from robustbox.errors import InputError, StorageError
from robustbox.journal import Journal

if TYPE_CHECKING:
    from torch import Tensor

    from robustbox.results import AttackResult

SCHEMA = 1
"""The version of results.json; it changes when a field changes its meaning or goes."""
LOCK = ".lock"
CONFIG, JOURNAL, RESULTS, ADVERSARIALS = "config.yaml", "journal.sqlite", "results.json", "adversarials.safetensors"
AUDIT = "audit.yaml"
"""Stands in the folder of an audit, which is no run's."""


class RunFolder:
    """Where one run is written; as a context manager it gives the folder back if bad input ended the run it began.

    A run that was stopped goes on in its folder: `journal` has what was answered.

    Args:
        path: the folder, or None for a run that is not written.
        config: what would run it again, written at once.
        fresh: forget the run that the folder holds.

    Raises:
        InputError: the folder holds a complete run or an audit, or another run is writing to it; its journal is damaged; or
            it cannot be written to.
    """

    def __init__(self, path: Path | None, config: Mapping[str, Any], fresh: bool = False) -> None:
        self.path = path
        self.written = False
        self.journal: Journal | None = None
        if path is None:
            return
        if (path / AUDIT).exists():
            raise InputError(f"the output folder {path} holds an audit: choose another one")
        self._new = not path.exists()
        try:
            path.mkdir(parents=True, exist_ok=True)
            foreign = [name for name in (CONFIG, RESULTS, ADVERSARIALS) if (path / name).exists()]
            if foreign and not fresh and not (path / JOURNAL).exists():
                raise FileExistsError
            self.journal = Journal(path / JOURNAL, fresh)
            self._begun = self.journal.sent == 0
            if self.journal.finished:
                raise InputError(
                    f"the output folder {path} holds a complete run: choose another one, "
                    "or start over with --fresh (fresh=True)"
                )
            if fresh:
                for name in (RESULTS, ADVERSARIALS, "report.html"):
                    (path / name).unlink(missing_ok=True)
            if self._begun:
                replace_file(path / CONFIG, _yaml(config).encode())
        except BaseException as error:
            self._close()
            if isinstance(error, FileExistsError):
                what = "holds another run" if path.is_dir() else "is a file"
                fix = "choose another one, or remove it first"
                raise InputError(f"the output folder {path} {what}: {fix}") from None
            if isinstance(error, OSError):
                raise InputError(f"the output folder {path} cannot be written to: {error.strerror}") from error
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.path is None or self.journal is None:
            return
        unused = self._begun and not self.written and (self.journal.sent == 0 or kind is InputError)
        self._close()
        if unused:
            for name in (CONFIG, JOURNAL):
                (self.path / name).unlink(missing_ok=True)
            if self._new and not any(self.path.iterdir()):
                self.path.rmdir()

    def _close(self) -> None:
        if self.journal is not None:
            self.journal.close()
            self.journal = None

    def write(self, result: AttackResult, complete: bool = True) -> None:
        """Write what was found, also by a run that ended early and may go on; results.json comes last."""
        if self.path is None:
            return
        from safetensors.torch import save

        document = document_of(result, complete)
        hashes = json.dumps([image["sha256"] for image in document["images"]])
        tensors = {"adversarials": result.adversarials.detach().cpu().contiguous()}
        replace_file(self.path / ADVERSARIALS, save(tensors, {"schema": str(SCHEMA), "sha256_of_originals": hashes}))
        replace_file(self.path / RESULTS, (json.dumps(document, indent=1, allow_nan=False) + "\n").encode())
        self.written = True

    def end(self) -> None:
        """Close the folder for good: all that belongs into it is there."""
        if self.journal is not None:
            self.journal.end()

    @contextmanager
    def storing(self) -> Iterator[None]:
        """For as long as files are written.

        Raises:
            StorageError: one cannot be.
        """
        try:
            yield
        except OSError as error:
            raise StorageError(
                f"the results cannot be written to {self.path}: {error.strerror}; "
                "make room, then give the same command again: no row is asked again"
            ) from error


def open_run(
    out: RunFolder | str | os.PathLike[str] | None, config: Mapping[str, Any], fresh: bool = False
) -> RunFolder:
    """Claim the folder of a run before its first query; one that is open already (the command line's) is taken as it is.

    Raises:
        InputError: as `RunFolder`.
    """
    return out if isinstance(out, RunFolder) else RunFolder(None if out is None else Path(out), config, fresh)


def is_complete(path: Path) -> bool:
    """Whether a folder holds a run that came to its end."""
    try:
        return bool(json.loads((path / RESULTS).read_text(encoding="utf-8"))["complete"])
    except (OSError, ValueError, KeyError, TypeError):
        return False


def read_run(path: str | os.PathLike[str]) -> tuple[dict[str, Any], Tensor]:
    """The results (as docs/results.md describes them) and the adversarials [N,C,H,W] (NaN where none) of a folder.

    Raises:
        InputError: the folder holds no complete run, or one of another schema.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = Path(path)
    try:
        document: dict[str, Any] = dict(json.loads((folder / RESULTS).read_text(encoding="utf-8")))
        adversarials = load_file(folder / ADVERSARIALS)["adversarials"]
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise InputError(f"{folder} holds no complete run: {error}") from error
    if (found := document.get("schema")) != SCHEMA:
        raise InputError(f"{folder} was written by schema {found}, this robustbox reads schema {SCHEMA}")
    return document, adversarials


def read_adversarials(path: str | os.PathLike[str]) -> tuple[Tensor, list[str] | None]:
    """The adversarials [N,C,H,W] (NaN where none) of a run's folder, or of such a file, and the sha256 of their originals.

    The hashes are None where the file, which then no run wrote, does not say.

    Raises:
        InputError: there is no such file, or it holds no tensor `adversarials` of four axes.
    """
    from safetensors import SafetensorError, safe_open

    file = Path(path) / ADVERSARIALS if Path(path).is_dir() else Path(path)
    try:
        with safe_open(file, framework="pt") as content:
            rows: Tensor = content.get_tensor("adversarials")
            originals: list[str] | None = json.loads((content.metadata() or {}).get("sha256_of_originals", "null"))
    except (OSError, ValueError, SafetensorError) as error:
        raise InputError(f"{file} cannot be read as adversarials of a run: {error}") from None
    if rows.ndim != 4 or (originals is not None and len(originals) != len(rows)):
        what = f"the shape {list(rows.shape)}" + ("" if originals is None else f" and {len(originals)} hashes")
        raise InputError(f"the adversarials in {file} must have the shape [N,C,H,W], and N hashes if any, not {what}")
    return rows, originals


def document_of(result: AttackResult, complete: bool = True) -> dict[str, Any]:
    """results.json as plain JSON values; NaN and infinity become null. `complete`: the run came to its end."""
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
            "hits": result.hits[i],
            "first_hit": result.first_hits[i],
            "stop_reason": result.stop_reasons[i],
            "error": result.errors[i],
            "trace": result.traces[i],
        }
        for i, identity in enumerate(run.pop("images"))
    ]
    written = datetime.now(UTC).isoformat(timespec="seconds")
    document = {
        "schema": SCHEMA,
        "written": written,
        "complete": complete,
        **run,
        "summary": result.summary(),
        "images": images,
    }
    return finite(document)  # type: ignore[no-any-return]


def _yaml(config: Mapping[str, Any]) -> str:
    import yaml

    return yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True)


def check_free(path: Path, fresh: bool = False) -> None:
    """What `RunFolder` would refuse, as far as it shows without making anything.

    Raises:
        InputError: the folder holds a complete run or an audit, or it cannot be written to.
    """
    if (path / AUDIT).exists():
        raise InputError(f"the output folder {path} holds an audit: choose another one")
    if is_complete(path) and not fresh:
        raise InputError(
            f"the output folder {path} holds a complete run: choose another one, or start over with --fresh"
        )
    check_writable(path, "output")


def check_writable(path: Path, what: str) -> None:
    """Refuse a folder, made or not, that cannot be written to, as far as it shows without making anything.

    Raises:
        InputError: it cannot; `what` says whose folder it is.
    """
    there = next(place for place in (path, *path.absolute().parents) if place.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise InputError(f"the {what} folder {path} cannot be written to")


def check_lockable(path: Path, what: str) -> None:
    """Refuse a folder, made or not, that `locked` would not take now; nothing is made.

    Raises:
        InputError: another process, of the same kind `what`, works in it; or it cannot be written to.
    """
    check_writable(path, f"{what}'s")
    if (path / LOCK).exists():
        with locked(path, what):
            pass


@contextmanager
def locked(folder: Path, what: str) -> Iterator[None]:
    """A folder, made where there is none, for one process alone.

    Raises:
        InputError: another one, of the same kind `what`, works in it; or it cannot be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / LOCK).open("w")
    except OSError as error:
        raise InputError(f"the {what}'s folder {folder} cannot be written to: {error.strerror}") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"another {what} is running in {folder}") from None
        yield


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
