"""Tangent Attack (Ma, Guo, Chen, Yong, Wang: Finding Optimal Tangent Points for Reducing Distortions of Hard-label Attacks,
NeurIPS 2021): TA on a hemisphere, G-TA on a semi-ellipsoid.

It is HopSkipJump but for the step: of all points of a ball around the boundary point x_t, the one from which a straight line
leads to the boundary nearest to the source x is not the foremost along the normal u, but the one at which a line from x touches
the ball on the adversarial side. In the plane of u and x - x_t = a e - b u, e orthogonal to u, both of length 1, iteration t

1. estimates u at x_t, at distance R_t from x, from floor(n0 sqrt(t)) noisy rows;
2. steps to the tangent point of the ellipse with half axes S along e and L along u, from L = R_t / sqrt(t) on, halved until
   the point reaches the goal; the ellipse becomes a circle where lengths along e are divided by S and along u by L:

       k = x_t + S cos(g) e + L sin(g) u,   g = arccos(1 / |p|) - atan2(b / L, a / S),   p = (a / S, b / L),

   with S = L / ratio: ratio = 1 is TA's ball, ratio > 1 G-TA, which suits boundaries that bend towards the adversarial side;
3. comes back to the boundary by bisection on the line from x to k.

Query cost of iteration t: floor(n0 sqrt(t)) + s + about ceil(log2(1 / theta)) rows, where s is 1 + the halvings, at most
`STEPS`; the start search (`starts.find_start`) and one bisection come first.

Deviations from the paper's algorithm: those of `hop_skip_jump`; and L is at most R_t / sqrt(2), for the tangent point of the
first L, R_1 itself, is x.

The knob `radius` is the l2 length of a row's noise in the estimates, whose rows can be drawn again; the step is not random. A
step that is refused is lengthened, not halved.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from robustbox.errors import InputError
from robustbox.protocol import Answer, Norm, Query, Task

from .hop_skip_jump import FURTHER, STEPS, HopSkipJump


@dataclass(frozen=True)
class Tangent(HopSkipJump):
    """Tangent Attack: HopSkipJump that steps to tangent points of a ball around the boundary point. Minimises l2.

    Args:
        n0: rows of the first estimate; estimate t takes floor(n0 sqrt(t)).
        theta: tolerance of bisections over the distance, which also sets the noise; default: 1 / (20 sqrt(d)).
        ratio: of the ellipsoid's half axis along the normal to the others; 1 is a ball (TA), the paper's G-TA has 1.1.
    """

    name: ClassVar[str] = "tangent"
    norms: ClassVar[tuple[Norm, ...]] = ("l2",)

    ratio: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.ratio >= 1:
            raise InputError(f"ratio must be at least 1, got {self.ratio}")

    def _step(self, task: Task, point: Tensor, normal: Tensor, xi: float) -> Generator[Query, Answer, Tensor | None]:
        """The first adversarial of the tangent points for L = xi, xi / 2, ..., or None where none was found."""
        tangent = tangent_points(task.image, point, normal, self.ratio)
        largest = float(torch.dist(point, task.image)) / math.sqrt(2)
        for _ in range(STEPS):
            xi = min(xi, largest)
            end = tangent(xi)
            answer = yield Query(end, "step")
            if task.reached_any(answer):
                return end
            xi *= FURTHER if answer.status.any() else 0.5
        return None


def tangent_points(image: Tensor, point: Tensor, normal: Tensor, ratio: float) -> Callable[[float], Tensor]:
    """The points k of the module's docstring, clipped to the box: from L to a row [1,C,H,W].

    Args:
        image: the source x [C,H,W].
        point: the boundary point x_t [1,C,H,W], not the source.
        normal: the direction into the adversarial side [1,C,H,W], of any length; where it is 0 or parallel to point - image,
            the points lie between the two.
        ratio: L / S; L is at most the distance of the two.
    """
    inward = image - point
    u = F.normalize(normal.flatten(), dim=0).view_as(point)
    b = -torch.sum(inward * u)
    across = inward + b * u
    length = torch.linalg.vector_norm(inward)
    # The floor of the length keeps what rounding leaves of a parallel normal from becoming a direction.
    e = across / torch.linalg.vector_norm(across).clamp_min(1e-3 * length)
    along, down = float(torch.sum(inward * e)), float(b)

    def tangent(long: float) -> Tensor:
        short = long / ratio
        x, z = along / short, down / long
        g = math.acos(min(1 / max(math.hypot(x, z), 1.0), 1.0)) - math.atan2(z, x)
        return torch.add(point, e, alpha=short * math.cos(g)).add_(u, alpha=long * math.sin(g)).clamp_(0, 1)

    return tangent
