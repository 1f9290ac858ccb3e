"""A start found by a hill climb over patterns: wavelets, or pieces of target images (ours).

Far from the image, the boundary's normal tells little of what lies nearer, and a search over the few numbers that make a
pattern is worth more than many labels of noise.

- Untargeted (`Wavelets`): networks of convolutions are weak to single waves of few pixels' length (Tsuzuku and Sato, CVPR
  2019; Yin et al., NeurIPS 2019, for the Fourier basis; Co et al., CCS 2019, for Gabor noise as a black-box attack). What
  networks of smooth normals are weak to is a stroke in the right place: so waves stand in windows, from a stroke's to all.
- Towards a target (`Pieces`): most of the distance to another image lies in its coarse parts and its border, and most of what
  names its class in its edges and its middle.

`climb` asks the patterns that a family starts with, one a row, until one reaches the goal. Then patterns are set at a share
`step` nearer than the best: neighbours of the best, of a random scale, and every few rows a new one. What reaches the goal is
the best and widens the step; what does not narrows it (`nearer.py`).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterator
from typing import ClassVar

import torch
from torch import Tensor

from robustbox.protocol import Answer, Query, Task

from .nearer import nearer, reached
from .noise import Drawn
from .starts import nearest

PERIODS = (2.0, 8.0)
"""Pixels from crest to crest of a new wavelet: from the finest wave there is to the field of view of few layers."""
WINDOWS, PIXELS, OFF = (0.15, 4.0), 2.0, 0.7
"""Width of a new wavelet's window: a standard deviation (half an image is 1), least pixels; how far off the middle it is."""
NEAR, FAR, GROWTH = 1 / 64, 0.5, 1.3
"""The first distance of a wavelet and its last one (a pixel: the root mean square in l2, all in linf), and its growth."""
WAVES = 40
"""Wavelets tried at that last distance towards a target of which there are no images."""
RIVALS = 30
"""Images of the target class, the nearest ones, of which pieces are made."""
CUTS = (0.01, 0.25)
"""Cycles a pixel below which a new piece lacks what its image has."""
STEP, LEAST = 0.15, 0.7
"""How much nearer a pattern is tried: at first, and at the end LEAST / sqrt(d) for d dimensions. The more dimensions there are,
the less does a row of noise tell of a normal, and the longer is a climb worth while."""
SCALES = (0.03, 0.6)
"""How far a neighbour is."""


class Patterns(ABC):
    """A family of directions, each given by a tensor of few numbers.

    At the end stand those that all families have, narrow, middle in y and x, c_1 to c_C: a window
    exp(-max(narrow, 0) |p - middle|^2) over the pixels p, from -1 to 1 along each axis, and amounts c_k of the channels.

    Attributes:
        renewal: every so many-th pattern of a climb is a new one.
        own: how much the numbers of the family itself differ between neighbours, where that does not depend on the pattern.
        usual: that of all numbers.
    """

    renewal: ClassVar[int]
    own: ClassVar[tuple[float, ...]]

    def __init__(self, task: Task) -> None:
        self.image, self.norm, self.generator = task.image, task.norm, task.generator
        self.channels, self.height, self.width = task.image.shape
        self.device = task.image.device
        self._y, self._x = (torch.linspace(-1, 1, n, device=self.device) for n in (self.height, self.width))
        self.down, self.right = (torch.arange(n, dtype=torch.float32, device=self.device) for n in task.image.shape[1:])
        self.wide = torch.tensor([0.0] * 3 + [1.0] * self.channels, device=self.device)
        self.usual = torch.tensor([*self.own, 3.0, 0.5, 0.5] + [1.0] * self.channels, device=self.device)

    @abstractmethod
    def starts(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Patterns to begin with, and their rows [1,C,H,W]."""

    @abstractmethod
    def new(self) -> Tensor:
        """A random pattern, with all channels alike."""

    @abstractmethod
    def spread(self, pattern: Tensor) -> Tensor:
        """How much each number differs between a pattern and its neighbours."""

    @abstractmethod
    def direction(self, pattern: Tensor) -> Tensor:
        """What a pattern adds to the image, of any length, [C,H,W]."""

    def near(self, pattern: Tensor) -> Tensor:
        """A neighbour of a pattern."""
        low, high = SCALES
        scale = torch.pow(high / low, self.uniform(1)).mul_(low) * self.spread(pattern)
        return torch.addcmul(pattern, scale, torch.randn(scale.shape, generator=self.generator, device=self.device))

    def window(self, pattern: Tensor) -> Tensor:
        """The window times the amounts, [C,H,W]."""
        narrow, y, x = pattern[-3 - self.channels : -self.channels].unbind()
        away = (self._y - y).square_()[:, None] + (self._x - x).square_()
        return away.mul_(-narrow.clamp_min(0)).exp_() * pattern[-self.channels :, None, None]

    def uniform(self, n: int) -> Tensor:
        return torch.rand(n, generator=self.generator, device=self.device)

    def row(self, pattern: Tensor, far: Tensor) -> Tensor:
        """The image with a pattern [1,C,H,W], clipped to the box: at a distance [1], or as far as the box allows."""
        direction = self.direction(pattern)
        length = far / self._size(direction)
        for _ in range(3):  # what clipping takes is made up for
            short = far / self._size(self._moved(direction, length).sub_(self.image))
            length = length * short.clamp_(0.5, 4)
        return self._moved(direction, length)[None]

    def _moved(self, direction: Tensor, length: Tensor) -> Tensor:
        return torch.addcmul(self.image, direction, length).clamp_(0, 1)

    def _size(self, difference: Tensor) -> Tensor:
        """Its length in the task's norm: as `distance`, in single precision, for a row is asked each time."""
        size: Tensor = torch.linalg.vector_norm(difference, 2 if self.norm == "l2" else math.inf)
        return size.clamp_min_(1e-9)


class Wavelets(Patterns):
    """Gabor wavelets sin(2 pi <f, p in pixels> + phase), in linf their signs; a new one is grey.

    A pattern begins with f in y and x (cycles a pixel) and the phase. Starts are as wide as the image, for these reach the goal
    most often. A new one in l2 untargeted stands in a window; a sign knows none, and a target is reached from far away.
    """

    renewal, own = 4, (0.0, 0.0, 4.0)

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        self._rates = torch.tensor([1.0, 1.0] + [0.0] * (len(self.usual) - 2), device=self.device)
        self._targeted = task.target is not None
        self._windowed = self.norm == "l2" and not self._targeted
        self._narrowest = min(max(WINDOWS[0], 2 * PIXELS / min(self.height, self.width)), WINDOWS[1])

    def starts(self) -> Iterator[tuple[Tensor, Tensor]]:
        unit = math.sqrt(self.image.numel()) if self.norm == "l2" else 1.0
        growing = range(math.ceil(math.log(FAR / NEAR, GROWTH)))
        for far in [FAR] * WAVES if self._targeted else [NEAR * GROWTH**k for k in growing]:
            wavelet = torch.cat([self._wave(), self.wide])
            yield wavelet, self.row(wavelet, torch.tensor([far * unit], device=self.device))

    def new(self) -> Tensor:
        wave, window = self._wave(), self.wide
        if self._windowed:
            width, y, x = self.uniform(3).unbind()
            width = self._narrowest * torch.pow(WINDOWS[1] / self._narrowest, width)
            place = torch.stack([0.5 / width.square(), OFF * (2 * y - 1), OFF * (2 * x - 1)])
            window = torch.cat([place, window[3:]])
        return torch.cat([wave, window])

    def _wave(self) -> Tensor:
        """A random f in y and x, and a random phase."""
        period, turn, phase = self.uniform(3).unbind()
        rate = torch.pow(PERIODS[0] / PERIODS[1], period) / PERIODS[0]
        return torch.stack([rate * torch.cos(math.pi * turn), rate * torch.sin(math.pi * turn), 2 * math.pi * phase])

    def spread(self, pattern: Tensor) -> Tensor:
        return torch.addcmul(self.usual, self._rates, torch.linalg.vector_norm(pattern[:2]))

    def direction(self, pattern: Tensor) -> Tensor:
        fy, fx, phase = pattern[:3].unbind()
        turns = fy * self.down[:, None] + fx * self.right
        wave = self.window(pattern).mul_(torch.add(phase, turns, alpha=2 * math.pi).sin_())
        return wave.sign() if self.norm == "linf" else wave


class Pieces(Patterns):
    """The difference to an image of the target class without its coarse part: frequencies f are kept to the share
    1 - exp(-(f / cut)^2 / 2). In linf it is cut off at its mean size. A pattern begins with the number of the image, from the
    nearest on, and log cut.

    Args:
        images: images [n,C,H,W] in place of the pool's that are `nearest`.
    """

    renewal, own = 2, (0.0, 2.0)

    def __init__(self, task: Task, images: Tensor | None = None) -> None:
        super().__init__(task)
        if images is None:
            self._images, self._chosen = None if task.pool is None else task.pool[0], nearest(task, RIVALS)
        else:
            self._images, self._chosen = images, torch.arange(len(images), device=images.device)
        fy, fx = (torch.fft.fftfreq(n, device=self.device) for n in (self.height, self.width))
        self._square = fy.square()[:, None] + fx.square()

    def starts(self) -> Iterator[tuple[Tensor, Tensor]]:
        for k in range(len(self._chosen)):
            plain = torch.tensor([k, math.log(CUTS[0])], device=self.device)
            yield torch.cat([plain, self.wide]), self._rival(k)

    def new(self) -> Tensor:
        which, cut = self.uniform(2).unbind()
        low, high = CUTS
        chosen = (which * len(self._chosen)).floor()
        return torch.cat([torch.stack([chosen, math.log(low) + math.log(high / low) * cut]), self.wide])

    def spread(self, pattern: Tensor) -> Tensor:
        return self.usual

    def direction(self, pattern: Tensor) -> Tensor:
        difference = self._rival(int(pattern[0]))[0] - self.image
        kept = 1 - torch.exp(-self._square * torch.exp(-2 * pattern[1]) / 2)
        edges: Tensor = torch.fft.ifft2(torch.fft.fft2(difference) * kept).real * self.window(pattern)
        usual = edges.abs().mean()
        return edges.clamp(-usual, usual) if self.norm == "linf" else edges

    def _rival(self, k: int) -> Tensor:
        assert self._images is not None  # else there are no starts
        return self._images[self._chosen[k : k + 1]].to(self.device)  # one at a time: many searches wait side by side


def climb(
    task: Task, patterns: Patterns | None = None, least: float | None = None
) -> Generator[Query, Answer, Tensor | None]:
    """A point that reaches the goal [1,C,H,W], over wavelets or, towards a target, over pieces of the pool's images of it.

    None where no start reached it: no wavelet, or no image of the target class, which the attacker may own none of.

    Args:
        patterns: other ones.
        least: how much nearer a pattern is tried at the end, a share of the distance. Default: LEAST / sqrt(d).

    Cost: the starts until one reaches the goal (at most 14 wavelets, towards a target `WAVES`, or `RIVALS` images), 1 row each,
    and then as many as pay: log(least / STEP) / log(NARROWER) where nothing nearer is found (24 for 3 x 32 x 32). A refused row
    is drawn again with a step WIDER times as long, and the climb ends at a step as much longer.
    """
    if patterns is None:
        patterns = Wavelets(task) if task.target is None else Pieces(task)
    if least is None:
        least = LEAST / math.sqrt(task.image.numel())
    for best, row in patterns.starts():  # noqa: B007  (where the loop breaks, the climb begins)
        if (yield from reached(task, Drawn(row))):
            break
    else:
        return None

    def propose(k: int, best: Tensor, far: Tensor, step: float) -> tuple[Tensor, Tensor]:
        tried = patterns.near(best) if k % patterns.renewal else patterns.new()
        return tried, patterns.row(tried, far * (1 - step))

    return (yield from nearer(task, propose, best, row, STEP, least))
