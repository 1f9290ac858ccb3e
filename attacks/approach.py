"""How near one comes before any normal is estimated: where `waterfill` begins (ours).

A climb over patterns (`patterns.py`), in linf the flips of rectangles (`flips.py`), and a line search. In linf untargeted the
climb is raced (`race.py`) with RayS (`rays.py`), which then takes its place and that of the flips; towards a target it ends at
the step with which flips begin, since a row of them gains more. Towards a target that no image at hand shows, the climb goes
over wavelets, and where none of them reaches the goal, over pieces of whatever does: plain colours, waves, noise
(`starts.find_start`).

A start that was brought along takes part in the race, and where it is ahead, the climb's place: adversarials of other networks
lie between twice as far as climbs end and half as far.
"""

from __future__ import annotations

from collections.abc import Generator

from torch import Tensor

from robustbox.protocol import Answer, Query, Task

from .flips import START, flip
from .levels import dither
from .moves import inward
from .patterns import Pieces, Wavelets, climb
from .race import Start, race
from .rays import RayS, turn_over
from .starts import brought, find_start


def approach(task: Task, guess: float, precision: float) -> Generator[Query, Answer, Tensor | None]:
    """A point that reaches the goal [1,C,H,W], just beyond the boundary on the way from the image to it; None if nothing did.

    Flips follow a climb or what was brought alone: from what is found without one normals lead on as fast, and RayS has flipped
    every value.

    Args:
        guess: the share of the way to the image that the line search tries first where no climb came before it.
        precision: the bracket at which it ends, over the distance; and the guess after a climb.

    Cost: that of `climb`, or of a `race` of it with `bring` where something was brought and with RayS in linf untargeted; where
    it found nothing of `find_start`, towards a target of `imagine`; of `flip` in linf, unless RayS won; and of `inward`, 1 row
    where nothing nearer is found after a climb, else 7 to 9.
    """
    flips, targeted = task.norm == "linf", task.target is not None
    least = START if flips and targeted else None
    searches: list[Start] = [] if task.start is None else [bring(task, guess, precision, least)]
    searches.append(climb(task, least=least))
    if flips and not targeted:
        searches.append(turn_over(task, RayS.tolerance, once=True))
    if len(searches) == 1:
        point = yield from searches[0]
    else:
        ahead, point = (yield from race(task, searches)) or (0, None)
        flips &= targeted or ahead < len(searches) - 1
    if point is None and targeted:
        point = yield from imagine(task, least)
    climbed = point is not None
    if point is None:
        point = yield from find_start(task, bring=False)
        if point is None:
            return None
    if flips and climbed:
        point = yield from flip(task, point)
    thresholds = dither(task) if task.norm == "linf" else None
    point, _ = yield from inward(task, point, precision if climbed else guess, precision, thresholds)
    return point


def bring(task: Task, guess: float, precision: float, least: float | None) -> Start:
    """What comes of the start that was brought along [1,C,H,W]; None where it does not reach the goal.

    Args: as `approach`, and `least` as `climb`.

    Cost: 1 row, and where that reaches the goal 7 to 9 of a line search, towards a target those of a climb over pieces of it.
    """
    if task.target is not None:
        assert task.start is not None  # else it is not called
        return (yield from climb(task, Pieces(task, task.start[None]), least))
    point = yield from brought(task)
    if point is not None:
        point, _ = yield from inward(task, point, guess, precision)
    return point


def imagine(task: Task, least: float | None) -> Generator[Query, Answer, Tensor]:
    """A point that reaches a target [1,C,H,W] of which no image is at hand, or all have been asked.

    Args:
        least: the step at which its climbs end; None: as `climb` has it.

    Cost: `WAVES` of `patterns.py` and 16 + `WAVES` of `starts.py` rows at a time, the first time 3 more, until one reaches the
    goal or the budget is spent; then that of a climb.
    """
    again = False
    while True:
        point = yield from climb(task, Wavelets(task), least)
        if point is not None:
            return point
        found = yield from find_start(task, rivals=0, again=again, bring=False)
        if found is not None:
            point = yield from climb(task, Pieces(task, found), least)
            return found if point is None else point
        again = True
