"""A model that is asked through a journal: what the journal knows is not asked again.

The journal stands right before the model, behind all defenses. Only the model's answers are replayed; gates and noise that
live in this process are run again, row by row, and so come back into the state in which they were.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from robustbox.evaluator import undefended
from robustbox.journal import Journal
from robustbox.oracle import Oracle, unusable
from robustbox.protocol import Answer, BlackBox, Scores

_KINDS: tuple[Scores | None, ...] = (None, "none", "probability", "logit")
_LABELS = tuple(np.dtype(f"i{width}") for width in (1, 2, 4, 8))
_SCORES = (None, torch.float16, torch.bfloat16, torch.float32, torch.float64)
_HEAD = struct.Struct("<BBBBII")


@contextmanager
def journaled(oracle: Oracle, journal: Journal | None, identity: dict[str, Any]) -> Iterator[None]:
    """Let an oracle's model be asked through a journal, and its clock be the journal's, for a while; None changes nothing.

    The journal takes the place of the model's own `answer`: the model stays the object that it is, for whatever stands
    around it, and everything that asks it asks the journal first.

    Raises:
        InputError: the journal is another run's.
    """
    model = undefended(oracle).box
    if journal is None:
        model.resume("")
        yield
        return
    journal.begin(identity, durable=model.paid)
    model.resume(journal.key)
    own, oracle.journal = dict(vars(model)), journal
    vars(model)["answer"] = _through(journal, model, scores=model is not oracle.box or oracle.knowledge != "label")
    try:
        yield
    finally:
        for name in ("answer", "replayed"):
            vars(model).pop(name, None)
            vars(model).update({name: own[name]} if name in own else {})


def _through(journal: Journal, model: BlackBox, scores: bool) -> Callable[[Tensor, Tensor], Answer]:
    """The model's `answer` by way of a journal, which has every answer before anybody sees it.

    Args:
        journal: where the answers are kept.
        model: the model.
        scores: whether its scores are kept too; without, replayed answers have none.
    """
    ask = model.answer

    def answer(rows: Tensor, accounts: Tensor) -> Answer:
        n, request = len(rows), digest(rows, accounts)
        known, sent = journal.replay(request, n)
        model.replayed = known is not None
        for time in range(sent):
            model.skip(rows, accounts, answered=model.replayed and time == sent - 1)
        if known is not None:
            told, model.scores, model.classes = unpacked(known, n, model.device)
            return told
        journal.send(request, n)
        try:
            told = ask(rows, accounts)
        except torch.OutOfMemoryError:
            journal.too_large(n)
            raise
        if _sound(told, n):  # the oracle refuses others; the next session shall ask again
            journal.receive(packed(told, model, scores), n)
        return told

    return answer


def digest(rows: Tensor, accounts: Tensor) -> bytes:
    """What tells a pass from others: 16 bytes from rows [n,C,H,W], bit by bit, and accounts [n], in their order."""
    each = fingerprints(rows).cpu().numpy()
    head = f"{rows.dtype} {list(rows.shape)}".encode()
    return hashlib.blake2b(head + each.tobytes() + accounts.cpu().numpy().tobytes(), digest_size=16).digest()


def fingerprints(rows: Tensor) -> Tensor:
    """int64 [n] on the rows' device: a function of each row's bits, the same on every device and for every batch.

    The row's values as 32-bit words, each times an odd 64-bit number of its own, summed. It is meant to tell apart what a run
    asks, not what an adversary makes up; a cryptographic hash of every row would cost more than the journal may.
    """
    words = rows.detach().flatten(1).contiguous().view(torch.int32)
    return (words * _multipliers(words.shape[1], words.device)).sum(dim=1)


@lru_cache(maxsize=8)
def _multipliers(n: int, device: torch.device) -> Tensor:
    return torch.from_numpy((np.random.PCG64(0).random_raw(n) | 1).view(np.int64)).to(device)


def packed(answer: Answer, box: BlackBox, scores: bool) -> bytes:
    """An answer, and what the model then says of its scores, in as few bytes as hold them exactly."""
    labels, status = answer.labels.cpu().numpy(), answer.status.cpu().numpy()
    low, high = int(labels.min(initial=0)), int(labels.max(initial=0))
    width = next(k for k, kind in enumerate(_LABELS) if np.iinfo(kind).min <= low and high <= np.iinfo(kind).max)
    kept = answer.scores if scores else None
    kind, classes = (0, 0) if kept is None else (_SCORES.index(kept.dtype), kept.shape[1])
    refused = bool(status.any())
    head = _HEAD.pack(width, refused, _KINDS.index(box.scores), kind, classes, box.classes or 0)
    values = b"" if kept is None else kept.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
    return head + labels.astype(_LABELS[width]).tobytes() + (status.tobytes() if refused else b"") + values


def unpacked(content: bytes, n: int, device: torch.device) -> tuple[Answer, Scores | None, int | None]:
    """The answer to n rows, and what the model then said of its scores: their kind, and the number of classes."""
    width, refused, known, kind, k, classes = _HEAD.unpack_from(content)
    labels = np.frombuffer(content, _LABELS[width], n, _HEAD.size)
    at = _HEAD.size + labels.nbytes
    status = np.frombuffer(content, np.uint8, n, at) if refused else np.zeros(n, np.uint8)
    scores = None
    if dtype := _SCORES[kind]:
        values = bytearray(content[at + n * refused :])
        scores = torch.frombuffer(values, dtype=dtype).view(n, k).to(device)
    held = torch.from_numpy(labels.astype(np.int64)).to(device), torch.from_numpy(status.copy()).to(device)
    return Answer(held[0], scores, held[1]), _KINDS[known], classes or None


def _sound(answer: Answer, n: int) -> bool:
    """Whether each of n rows has its answer, and no answered one scores that are NaN or infinite."""
    scores = answer.scores
    whole = {len(answer.labels), len(answer.status), n if scores is None else len(scores)} == {n}
    return whole and not bool(unusable(answer).any())
