"""SurFree (Maho, Furon, Le Merrer: SurFree: a fast surrogate-free black-box attack, CVPR 2021).

No row is spent on an estimate of the boundary's normal. From the boundary point x_b at distance d in direction u from the
source x, every iteration draws one direction v, orthogonal to u and to the last directions, and walks on the circle

    z(a) = x + d cos(a) (cos(a) u + sin(a) v),   z(0) = x_b,   |z(a) - x| = d cos(a),

in their plane. By Thales, where the boundary is a straight line in this plane, z(a) is adversarial from 0 to one angle a*,
positive or negative, and z(a*) is the point of the boundary nearest to x. So an iteration

1. asks z(s a), s = 1, -1, (T-1)/T, -(T-1)/T, ..., 1/T, -1/T, until one succeeds, where a is the largest angle in force. Where
   none does, v is given up and a shrinks; else a grows, to 80 degrees at most, and
2. finds a*: a success at s = +-1 is doubled until it fails; then the bracket is halved;
3. with `interpolate`: finds the boundary's distance at a*/2 by a line search, lays a parabola through the distances at 0, a*/2
   and a*, and asks the point where that is least.

Directions are drawn in the frequency domain, v = A r: r is -1, 0 or 1 at random on each of the lowest frequencies of the DCT of
the image or of its 8 x 8 blocks, and A is 1 (`constant`) or tanh of what the image holds there (`tanh`).

Query cost of an iteration: at most 2 T rows; after a success `halvings` more, and at s = +-1 about 1 to double the angle;
`interpolate` takes about `halvings` + 1. The start search (`starts.find_start`) and one line search come first.

The knob `angle` is the least angle of a row in degrees, 1 to 80: no step turns by less, and no bracket is halved below it. A
step that is drawn again takes another v. After a refusal the largest angle grows, as after a success.

Deviations from the paper's algorithm:

- The start is a bounded search, and targeted starts are raced along their lines to x, where the paper takes white noise.
- The largest angle starts at 10 degrees and is adapted by rho = 0.9, with T = 1, where the paper has 30, 0.98 and 3: on images
  of 32 pixels a* is a few degrees, and the way down there would take hundreds of rows. One halving suffices.
- v is orthogonal to u itself, and to each of the last directions; the authors' code takes off the first one many times over.
- Where answers are stochastic, every iteration first asks x_b again and steps outward while it fails (`moves.hold`).
- Where an image lacks a frequency it still has a little weight: flat images have directions, too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import ClassVar, get_args

import torch
from torch import Tensor

from robustbox.errors import InputError, unknown_name
from robustbox.protocol import Answer, Attack, Knob, Norm, Query, Search, Task

from .cgba import semicircle
from .directions import Basis, Directions, Weights, proposal
from .moves import bisect_arc, bisect_line, hold
from .noise import Drawn
from .starts import find_start

Path = Callable[[float], Tensor]

TOLERANCE = 0.01
"""Of the first line search, over the distance: any point beyond the boundary will do to turn from."""
LARGEST, LEAST = 80.0, 0.01
"""Bounds of the angle in force, in degrees; at 90 the point is the source itself."""


@dataclass(frozen=True)
class SurFree(Attack):
    """SurFree: turn the perturbation by the largest adversarial angle in random planes. Minimises l2, knows labels only.

    Args:
        angle: largest angle that is asked at first, in degrees; adapted from there.
        rho: the largest angle is multiplied by it after a failure and divided by it after a success.
        tries: T, the angles that are asked in both senses of a plane before it is given up.
        halvings: of the bracket around the angle a* after a success.
        memory: earlier directions to which a new one is orthogonal; at most half of the dimensions, and what 16 MiB hold.
        basis: where directions are drawn: dct (of the whole image) or dct-8x8 (of its blocks of 8 x 8 pixels).
        frequencies: share of the frequencies that are used, lowest first.
        weights: constant (all frequencies alike) or tanh (those that the image holds).
        interpolate: lay a parabola through three boundary points after each success.
    """

    name: ClassVar[str] = "surfree"
    norms: ClassVar[tuple[Norm, ...]] = ("l2",)
    knobs: ClassVar[tuple[str, ...]] = ("angle",)
    takes_start: ClassVar[bool] = True

    angle: float = 10.0
    rho: float = 0.9
    tries: int = 1
    halvings: int = 1
    memory: int = 100
    basis: Basis = "dct-8x8"
    frequencies: float = 0.5
    weights: Weights = "constant"
    interpolate: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.angle <= LARGEST:
            raise InputError(f"angle must be positive and at most {LARGEST:g} degrees, got {self.angle}")
        for option, share in (("rho", self.rho), ("frequencies", self.frequencies)):
            if not 0 < share <= 1:
                raise InputError(f"{option} must be positive and at most 1, got {share}")
        for option, number, least in (
            ("tries", self.tries, 1),
            ("halvings", self.halvings, 0),
            ("memory", self.memory, 0),
        ):
            if number < least:
                raise InputError(f"{option} must be at least {least}, got {number}")
        if self.basis not in get_args(Basis):
            raise unknown_name("basis", self.basis, get_args(Basis))
        if self.weights not in get_args(Weights):
            raise unknown_name("weights", self.weights, get_args(Weights))

    def search(self, task: Task) -> Search:
        directions = Directions(task.image, *proposal(task, self.basis, self.frequencies, self.weights), self.memory)
        knob = Knob("angle", 1.0, LARGEST, lambda value, n: task.image.expand(n, *task.image.shape))
        point = yield from find_start(task)
        if point is None:
            return
        point = yield from bisect_line(task, point, TOLERANCE * float(torch.dist(point, task.image)))
        angle = self.angle
        while True:
            point = yield from hold(task, point)
            plane = Plane(task.image, point, directions)
            if plane.radius == 0:
                return
            knob.draw = plane.propose
            bracket, refused = yield from self._bracket(task, plane, angle, knob)
            angle = min(max(angle / self.rho if bracket or refused else angle * self.rho, LEAST), LARGEST)
            if bracket:
                good, bad = bracket
                tolerance = max(abs(bad - good) / 2**self.halvings, knob.value or 0.0)
                good = yield from bisect_arc(task, plane.turn, good, bad, tolerance)
                point = plane.turn(good)
                if self.interpolate:
                    point = yield from self._interpolate(task, plane, good, point)

    def _bracket(
        self, task: Task, plane: Plane, angle: float, knob: Knob
    ) -> Generator[Query, Answer, tuple[tuple[float, float] | None, bool]]:
        """An adversarial angle and a larger one, between which a* is to be sought, if any; and whether a row was refused."""
        refused, larger = False, 0.0
        for k in range(self.tries):
            for sign in (1, -1):

                def size(share: float = 1 - k / self.tries, sign: int = sign) -> float:
                    return sign * max(share * angle, knob.value or 0.0)

                def again(_: int, size: Callable[[], float] = size) -> Tensor:
                    return plane.renew().ask(size())

                row = Drawn(plane.ask(size()), again)
                answer = yield row.query("step", (knob,))
                refused |= bool(answer.status.any())
                if task.reached_any(answer):
                    good = plane.asked
                    return (good, sign * larger) if larger else (yield from self._double(task, plane, good)), refused
            larger = abs(plane.asked)
            if larger <= (knob.value or 0.0):
                break  # the smaller ones would be the same
        return None, refused

    def _double(self, task: Task, plane: Plane, good: float) -> Generator[Query, Answer, tuple[float, float]]:
        """The last of the angles good, 2 good, 4 good, ... that is adversarial, and the next one."""
        while 2 * abs(good) <= LARGEST:
            answer = yield Query(plane.turn(2 * good), "line")
            if not task.reached_any(answer):
                return good, 2 * good
            good *= 2
        return good, math.copysign(LARGEST, good)

    def _interpolate(self, task: Task, plane: Plane, good: float, point: Tensor) -> Generator[Query, Answer, Tensor]:
        """The nearest of `point`, which is z(good), the boundary at good / 2, and, if adversarial, the vertex."""
        h, d = math.radians(good), plane.radius
        near, far = d * math.cos(h), d * math.cos(h / 2)
        delta = yield from bisect_arc(task, plane.ray(good / 2), far, near, (far - near) / 2**self.halvings)
        if delta < near:
            near, point = delta, plane.ray(good / 2)(delta)
        slope = (4 * delta - d * (math.cos(h) + 3)) / h
        bend = 2 * (d * (math.cos(h) + 1) - 2 * delta) / h**2
        if bend > 0 and (vertex := d - slope**2 / (4 * bend)) < near:
            # Half-way to the vertex, for on the parabola itself the chances are even.
            row = plane.ray(math.degrees(-slope / (2 * bend)))((vertex + near) / 2)
            answer = yield Query(row, "line")
            if task.reached_any(answer):
                return row
        return point


class Plane:
    """The circle z of the module's docstring, in the plane of u and a random direction v that can be drawn again.

    Args:
        image: the source [C,H,W].
        point: the boundary point [1,C,H,W].
        directions: where v comes from; each v is remembered there.

    Attributes:
        radius: |x_b - x|; where it is 0, nothing else is of use.
        asked: the last angle of `ask`.
    """

    def __init__(self, image: Tensor, point: Tensor, directions: Directions) -> None:
        self._image, self._point, self._directions = image, point, directions
        self._ray = point - image
        self.radius = float(torch.linalg.vector_norm(self._ray))
        self.asked = 0.0
        self.renew()

    def renew(self) -> Plane:
        """Draw another v."""
        self._v = self._directions.draw(self._ray, 1)
        self._directions.remember(self._v)
        self._path = semicircle(self._image, self._point, self._v)
        return self

    def ask(self, angle: float) -> Tensor:
        """z at an angle in degrees [1,C,H,W], clipped to the box; the angle is noted."""
        self.asked = angle
        return self.turn(angle)

    def turn(self, angle: float) -> Tensor:
        """z at an angle in degrees [1,C,H,W], clipped to the box."""
        return self._path(math.radians(angle))

    def ray(self, angle: float) -> Path:
        """The points at an angle in degrees: from a distance to the image to a row [1,C,H,W], clipped to the box."""
        a = math.radians(angle)
        direction = math.cos(a) / self.radius * self._ray + math.sin(a) * self._v
        return lambda r: torch.add(self._image, direction, alpha=r).clamp_(0, 1)

    def propose(self, angle: float, n: int) -> Tensor:
        """z at an angle in degrees in n other planes [n,C,H,W], not remembered (`Knob.draw`)."""
        drawn = self._directions.draw(self._ray, n)
        return torch.cat([semicircle(self._image, self._point, v[None])(math.radians(angle)) for v in drawn])
