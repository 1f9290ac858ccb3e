"""OARS around any attack (Feng, Hooda, Mangaokar, Fawaz, Jha, Prakash: Stateful Defenses for Machine Learning Models Are Not
Yet Secure Against Black-box Attacks, CCS 2023): the refusals of a stateful gate are an oracle that tells how to evade it.

A gate refuses a row that is too similar to an earlier one. In two stages, for every attack whose queries say how they were
drawn (`Query.knobs`, `Query.redraw`):

    adapt     find the least scale of the attack's proposals at which the gate refuses at most a share of them
    resample  draw a refused row again from the same distribution, up to `rounds` times; after a refused step go further

parity="wide" (default) differs from the paper's code in this:

- It adapts in flight. The attack's own scale comes first, and as long as that passes nothing is changed and nothing spent. Once
  it is refused, the rows that the attack asks anyway are drawn at the values of a bisection on a logarithmic scale, between
  the ends of the knob's range, where the paper's lower bounds already are the answer. A trial ends at the first decisive count.
- A value that was found goes on to follow the gate, upwards (`calibration.py`). Where accounts are banned, every refusal
  counts, trials lean to the safe side, and few rows are asked at a time.
- Rows that cannot be drawn again (line searches, most steps) are guarded (`spacing.py`): moved by a little noise where they
  would come too near to earlier ones, or not asked at all. So attacks without knobs pass, too. Not in l0, where noise
  would change every pixel: there such rows are asked as they are.
- With `scatter` probes differ in scale and come in random order. Probes that are drawn independently at one scale make steps
  whose cosines crowd at -1/2; at scales that differ the cosines spread as those of unrelated images do, at no cost.
- With `scout` the search for a value has rows and an account of its own: on decoys, images of the pool, so that the
  neighbourhood of the attacked image stays empty of them.

parity="reference" is the paper's: linear bisection in the bounds of its CIFAR-10 settings, or ImageNet's from 64 pixels a side
on, around the image itself, all samples of each trial, once; no guard. An attack or knob without bounds there is not adapted:
the paper's Boundary attack adapts within itself.

Query cost: that of the attack, and what is refused; a search in flight has about 2 refusals a bad trial, of 6 to 8 trials in
all. Searches apart (`scout`, reference) cost at most `trial` rows a trial, and its decoy. Rows asked while a knob is in search
stand on the ledger `calibrate`. The attack is ended when `give_up` rows in a row were refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Literal

from robustbox.errors import InputError
from robustbox.protocol import Search, Task

from .passage import Passage
from .spacing import Guard
from .wrapper import Wrapper, wrapped


@dataclass(frozen=True, kw_only=True)
class OARS(Wrapper):
    """OARS: adapt an attack's scales by a gate's refusals, draw refused rows again, keep others apart.

    Args:
        parity: wide (search each knob's whole range, in flight, when its own scale is refused), or reference (the paper's).
        tolerated: share of refused rows at which a scale is kept.
        trial: rows by which a scale is judged.
        chunk: rows asked at a time while a scale is in doubt.
        rounds: times that a refused row is drawn again, and a row that cannot be is moved.
        give_up: refused rows in a row after which the search ends.
        guard: what becomes of rows that cannot be drawn again and come too near to earlier ones: jitter (moved by noise; off in
            l0), skip (not asked; the attack is told that they were refused), or off.
        scout: search for scales on an account and on images of its own, apart from the attack.
        scatter: draw each probe at a scale of its own, this being the standard deviation of the scales' logarithm, and send
            them in random order: against gates that watch how queries move (`gwad`, which 0.35 blinds).
    """

    parity: Literal["wide", "reference"] = "wide"
    tolerated: float = 0.05
    trial: int = 20
    chunk: int = 4
    rounds: int = 20
    give_up: int = 300
    guard: Guard = "jitter"
    scout: bool = False
    scatter: float = 0.0

    def __post_init__(self) -> None:
        if self.parity not in ("wide", "reference"):
            raise InputError(f"parity must be wide or reference, got {self.parity}")
        if self.guard not in ("jitter", "skip", "off"):
            raise InputError(f"guard must be jitter, skip or off, got {self.guard}")
        if not 0 <= self.tolerated < 1:
            raise InputError(f"tolerated must be at least 0 and less than 1, got {self.tolerated}")
        if not 0 <= self.scatter <= 2:
            raise InputError(f"scatter must be between 0 and 2, got {self.scatter}")
        for name, least in (("trial", 1), ("chunk", 1), ("rounds", 0), ("give_up", 1)):
            if getattr(self, name) < least:
                raise InputError(f"{name} must be at least {least}, got {getattr(self, name)}")
        super().__post_init__()

    def search(self, task: Task) -> Search:
        return Passage(self, task).run(self.inner().search(task))


@cache
def load(name: str) -> type[OARS]:
    """OARS around any attack, by its name: `oars:hop-skip-jump` adapts it to a gate that refuses similar queries."""
    return wrapped(OARS, "oars", name)
