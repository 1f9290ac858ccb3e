"""Keeps the state of a training on disk, so that a killed one goes on with an equal result and every row is counted."""

from __future__ import annotations

import io
import json
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from robustbox.errors import InputError, StorageError
from robustbox.folder import replace_file
from robustbox.protocol import Answer
from robustbox.trainer import Workshop

_SECONDS = 20.0
"""Time between two checkpoints."""


class Checkpoint:
    """The state of stage 2 in `shop.checkpoint`, and beside it the rows that were announced since.

    Args:
        shop: where the checkpoint stands; its ledger is restored too.
        recipe: what must be equal for a training to go on.
    """

    def __init__(self, shop: Workshop, recipe: Mapping[str, object]) -> None:
        self._shop, self._path = shop, shop.checkpoint
        self._recipe = json.dumps(
            {**recipe, "seed": shop.seed, "model": shop.box.describe()}, sort_keys=True, default=str
        )
        self._saved = time.monotonic()
        self._log: Any = None

    @property
    def _rows(self) -> Path:
        assert self._path is not None
        return self._path.with_name(self._path.name + ".rows")

    def announce(self, step: int, rows: int) -> None:
        """Note, before a step is taken, the rows that it asks: where it is taken again they were asked twice.

        Raises:
            StorageError: the note cannot be written.
        """
        if self._path is None:
            return
        with self._storing():
            if self._log is None:
                self._log = self._rows.open("a", encoding="utf-8", buffering=1)
            self._log.write(f"{step} {rows}\n")

    def keep(self, stage: Any, step: int) -> None:
        """Save the state after so many steps, where it is time.

        Raises:
            StorageError: it cannot be written.
        """
        if time.monotonic() - self._saved >= _SECONDS:
            self._save(stage, step)

    def _save(self, stage: Any, step: int) -> None:
        if self._path is None:
            return
        state = {
            "recipe": self._recipe,
            "step": step,
            "ledger": dict(self._shop.oracle.ledger),
            "guard": stage.guard.state_dict(),
            "kept": stage.kept,
            "optimizer": stage.optimizer.state_dict(),
            "generators": [stage.noise.get_state(), stage.order.get_state()],
            "best": stage.best,
            "trend": stage.trend,
            "flat": stage.flat,
            "agreed": [stage.agreed.labels, stage.agreed.scores, stage.agreed.status],
        }
        torch.save(state, content := io.BytesIO())
        with self._storing():
            replace_file(self._path, content.getvalue())
        self._saved = time.monotonic()

    def restore(self, stage: Any) -> int:
        """Go on where an interrupted training stood; returns the steps that are done.

        Rows that were asked after the last checkpoint are asked again: the ledger holds them twice (a step that was cut
        short counts whole), and the record says how many.

        Raises:
            InputError: the checkpoint is another training's, or it cannot be read.
        """
        if self._path is None:
            return 0
        announced = self._announced()
        step = 0
        if self._path.exists():
            try:
                state: dict[str, Any] = torch.load(self._path, map_location=self._shop.box.device, weights_only=True)
            except Exception as error:  # a damaged pickle has many ways to fail
                raise InputError(f"the checkpoint {self._path} cannot be read: remove it to begin again") from error
            if state["recipe"] != self._recipe:
                raise InputError(
                    f"{self._path} is the checkpoint of another training: remove it, or choose another --out"
                )
            stage.guard.load_state_dict(state["guard"])
            stage.optimizer.load_state_dict(state["optimizer"])
            for generator, value in zip((stage.noise, stage.order), state["generators"], strict=True):
                generator.set_state(value.cpu())
            stage.kept, stage.best, stage.trend = state["kept"], state["best"], state["trend"]
            stage.flat, step = state["flat"], state["step"]
            labels, scores, status = state["agreed"]
            stage.agreed = Answer(_host(labels), scores, _host(status))
            self._shop.oracle.ledger = Counter(state["ledger"])
        done = sum(announced)
        repeated = done - step * stage.cost
        # The rows of an earlier life that the checkpoint does not hold; those of a step before are counted as announced.
        if repeated > 0:
            self._shop.record["repeated_rows"] = repeated
            self._shop.oracle.ledger["train"] = step * stage.cost + repeated
        if step:
            self._shop.report(f"going on after step {step}")
        return step

    def close(self, stage: Any, step: int) -> None:
        """The training is done after so many steps: its last state stays until its owner has written the defense."""
        self._save(stage, step)
        if self._log is not None:
            self._log.close()
        if self._path is not None:
            self._rows.unlink(missing_ok=True)

    def _announced(self) -> list[int]:
        """The rows of each step that was announced; a note that a full disk cut short is dropped: its step was not taken."""
        if not self._rows.exists():
            return []
        text = self._rows.read_text(encoding="utf-8")
        whole = text[: text.rfind("\n") + 1]
        if whole != text:
            self._rows.write_text(whole, encoding="utf-8")
        return [int(line.split()[1]) for line in whole.splitlines()]

    @contextmanager
    def _storing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise StorageError(
                f"the checkpoint {self._path} cannot be written: {error.strerror}; "
                "make room, then give the same command again to go on from the last one"
            ) from error


def _host(tensor: Tensor) -> Tensor:
    return tensor.cpu()
