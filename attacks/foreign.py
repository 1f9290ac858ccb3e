"""foolbox's query attacks through our oracle: any of them by name, with an exact budget and the count that they lack.

`foolbox:CLASS` runs foolbox's own, unchanged code (Rauber et al. 2017, "Foolbox: a Python toolbox to benchmark the
robustness of machine learning models"; classes and options as in foolbox 3.3.4) on one image at a time. A foolbox
attack is a blocking call on a model; `guest.py` makes a generator of queries of it.

Every row that foolbox asks for costs one query: its start search, its assertions, its last check (of the point clipped
to epsilon, where one is given). Nothing is left out, and nothing is asked on its behalf but a start (below). An attack
that stops by itself (`steps`) leaves the rest of the budget unspent. With d = C H W:

    class                                       norms         queries
    HopSkipJumpAttack                           l2, linf      start + 3 + B + sum over steps k of (100 sqrt k + B + 3),
                                                              B = 1.5 log2 d in l2, 2 log2 d in linf
    BoundaryAttack                              l2            start + 1.1 steps + 2
    PointwiseAttack                             l0, l2        start + 2 + d for each l0 sweep + 11 d for each l2 sweep
    SaltAndPepperNoiseAttack                    l2            steps + 2
    LinearSearchBlendedUniformNoiseAttack       any           at most directions + steps + 2
    LinearSearchContrastReductionAttack         any           at most steps + 1
    BinarySearchContrastReductionAttack         any           binary_search_steps + 1
    GaussianBlurAttack                          any           at most steps + 2
    SpatialAttack                               any           at most num_rotations num_translations^2 + 2
    InversionAttack                             any           1
    BinarizationRefinementAttack                any           start + 3
    L2ContrastReductionAttack                   l2            1, epsilon needed
    L2[ClippingAware]Additive*NoiseAttack       l2            1, epsilon needed
    LinfAdditiveUniformNoiseAttack              linf          1, epsilon needed
    L2[ClippingAware]Repeated*NoiseAttack       l2            at most repeats + 2, epsilon needed
    LinfRepeatedAdditiveUniformNoiseAttack      linf          at most repeats + 2, epsilon needed
    GenAttack                                   linf          at most steps population + 1, epsilon and target needed

"any": the class follows a fixed path that no norm bends; its points are measured in the norm of the run. The untargeted
start is foolbox's own: at most 1000 directions + 51 (PointwiseAttack: 1001). GenAttack sees scores, all others labels.
Not supported: classes that need gradients, which a model that can only be queried does not give, and DatasetAttack,
which draws nothing from what it is fed when it attacks one image at a time.

What this adapter decides:

- Label attacks see one bit a row: whether the goal is reached. A row that was not answered reads as one that did not
  reach it. GenAttack sees the logarithm of probabilities (or logits, where granted), since foolbox expects logits.
- Rows are clamped to [0, 1]: foolbox leaves the box by rounding (-3e-8). A row with NaN ends the image with an error:
  foolbox divides 0 by 0 where its iterate falls on the image. No supported class can loop without asking, so the
  budget ends the loops that have no other end.
- A targeted search starts where our own attacks do (`starts.find_start`; foolbox asks its user for `starting_points`),
  unless `init_attack` is given: the name of a foolbox class, or a foolbox object. So do BinarizationRefinementAttack, and
  all that take `starting_points` where a start is brought.
- The norm of the run sets `constraint` and `distance`. `tensorboard` is no option: it writes outside the run's folder.
- What foolbox raises ends the image with that message: no start was found, or an assertion failed that does not expect
  a random model. What was found until then counts.

While an image is attacked it keeps foolbox's arrays: for HopSkipJumpAttack several times 100 sqrt(k) images at step k.
"""

from __future__ import annotations

import dataclasses
import inspect
from functools import cache
from typing import Any, ClassVar

import foolbox.attacks
import torch
from foolbox.attacks.base import Attack as FoolboxAttack
from foolbox.attacks.base import FixedEpsilonAttack, FlexibleDistanceMinimizationAttack
from foolbox.criteria import Criterion, TargetedMisclassification
from foolbox.distances import l0, l2, linf
from torch import Tensor

from robustbox.errors import InputError, unknown_name
from robustbox.protocol import NORMS, Attack, Norm, Search, Task

from .foreign_model import ForeignModel, Reached
from .guest import Ask, Guest, Randomness
from .starts import find_start

_L2: tuple[Norm, ...] = ("l2",)
_LINF: tuple[Norm, ...] = ("linf",)
QUERY_ATTACKS: dict[str, tuple[Norm, ...]] = {
    "BinarizationRefinementAttack": NORMS,
    "BinarySearchContrastReductionAttack": NORMS,
    "BoundaryAttack": _L2,
    "GaussianBlurAttack": NORMS,
    "GenAttack": _LINF,
    "HopSkipJumpAttack": ("l2", "linf"),
    "InversionAttack": NORMS,
    "L2AdditiveGaussianNoiseAttack": _L2,
    "L2AdditiveUniformNoiseAttack": _L2,
    "L2ClippingAwareAdditiveGaussianNoiseAttack": _L2,
    "L2ClippingAwareAdditiveUniformNoiseAttack": _L2,
    "L2ClippingAwareRepeatedAdditiveGaussianNoiseAttack": _L2,
    "L2ClippingAwareRepeatedAdditiveUniformNoiseAttack": _L2,
    "L2ContrastReductionAttack": _L2,
    "L2RepeatedAdditiveGaussianNoiseAttack": _L2,
    "L2RepeatedAdditiveUniformNoiseAttack": _L2,
    "LinearSearchBlendedUniformNoiseAttack": NORMS,
    "LinearSearchContrastReductionAttack": NORMS,
    "LinfAdditiveUniformNoiseAttack": _LINF,
    "LinfRepeatedAdditiveUniformNoiseAttack": _LINF,
    "PointwiseAttack": ("l0", "l2"),
    "SaltAndPepperNoiseAttack": _L2,
    "SpatialAttack": NORMS,
}
"""foolbox's attacks that need no gradient, and the norms that each keeps small (or that it does not care about)."""
NUMPY_ATTACKS = frozenset({"GenAttack", "PointwiseAttack", "SpatialAttack"})
"""Those of them that draw from numpy's random state as well as from torch's."""
_REFUSED = {"DatasetAttack": "draws nothing from its data set when it attacks one image at a time"}
_STARTS = "starting_points"
_DISTANCES = {"l0": l0, "l2": l2, "linf": linf}


@cache
def load(name: str) -> type[ForeignAttack]:
    """One of foolbox's decision and score attacks, by its class: `foolbox:HopSkipJumpAttack`.

    It comes as a frozen dataclass whose fields are foolbox's options.

    Raises:
        InputError: foolbox has no such attack (with the nearest names), or one that a black box cannot serve (and why).
    """
    found: Any = getattr(foolbox.attacks, name, None)
    if name not in QUERY_ATTACKS:
        if name in _REFUSED:
            raise InputError(f"foolbox:{name} {_REFUSED[name]}: take another attack")
        if inspect.isclass(found) and issubclass(found, FoolboxAttack) and not inspect.isabstract(found):
            raise InputError(f"foolbox:{name} needs gradients, and a model that can only be queried has none")
        raise unknown_name("attack", f"foolbox:{name}", [f"foolbox:{known}" for known in QUERY_ATTACKS])
    namespace = {
        "__doc__": inspect.getdoc(found),
        "name": f"foolbox:{name}",
        "knowledge": "score" if name == "GenAttack" else "label",
        "norms": QUERY_ATTACKS[name],
        "needs_epsilon": issubclass(found, FixedEpsilonAttack),
        "foreign": found,
        "takes_start": _STARTS in inspect.signature(found.run).parameters,
    }
    bases = (ForeignAttack,)
    return dataclasses.make_dataclass(name, _fields(found), bases=bases, namespace=namespace, frozen=True, kw_only=True)


def _fields(found: Any) -> list[tuple[str, Any, Any]]:
    """The parameters of a foolbox class as dataclass fields, but for those that the run decides."""
    fields = []
    for parameter in inspect.signature(found).parameters.values():
        kind, default = parameter.annotation, parameter.default
        if parameter.name == "constraint":
            kind, default = str | None, None  # None: the norm of the run, where foolbox would say l2
        if parameter.name not in ("distance", "tensorboard"):
            fields.append((parameter.name, kind, dataclasses.field(default=default)))
    return fields


class ForeignAttack(Attack):
    """One of foolbox's attacks; `load` makes a frozen dataclass for each.

    Attributes:
        foreign: the foolbox class.
    """

    foreign: ClassVar[Any]

    def __post_init__(self) -> None:
        try:
            self._build(self.norms[0])
        except (AssertionError, NotImplementedError, TypeError, ValueError) as error:
            raise InputError(f"{self.name} refuses its options {self.options()}: {error}".rstrip(": ")) from error

    def options(self) -> dict[str, object]:
        """The hyper-parameters, for the record; a foolbox object stands as foolbox writes it."""
        return {key: repr(value) if isinstance(value, FoolboxAttack) else value for key, value in vars(self).items()}

    def check(self, task: Task) -> None:
        """Refuse another norm than its own option asks for, and an untargeted task where it can only aim."""
        constraint = self.options().get("constraint")
        if constraint not in (None, task.norm):
            raise InputError(f"{self.name} with constraint={constraint} does not keep {task.norm} small: leave it out")
        if task.target is None and self.knowledge == "score":
            raise InputError(f"{self.name} is targeted only: give targets")

    def search(self, task: Task) -> Search:
        """Run the foolbox attack on one image."""
        start = None
        if self._wants_start(task):
            start = yield from find_start(task)
            if start is None:
                return
        draws_numpy = self.foreign.__name__ in NUMPY_ATTACKS or self.options().get("init_attack") is not None
        yield from Guest(lambda ask: self._call(task, ask, start), Randomness(task.generator, draws_numpy)).search()

    def _wants_start(self, task: Task) -> bool:
        """Whether foolbox takes a starting point and would not find one itself."""
        if not self.takes_start:
            return False
        options = self.options()
        given = task.start is not None or (task.target is not None and options.get("init_attack") is None)
        return given or "init_attack" not in options

    def _call(self, task: Task, ask: Ask, start: Tensor | None) -> None:
        """The foolbox call. Its result is not needed: whatever it found was asked, and stands in the books."""
        criterion: Criterion = Reached()
        if self.knowledge == "score":
            criterion = TargetedMisclassification(torch.tensor([task.target], device=task.image.device))
        attack, model = self._build(task.norm), ForeignModel(ask, task, self.knowledge)
        epsilon = None if task.norm == "l0" else task.epsilon  # foolbox cannot clip in l0
        extra = {} if start is None else {_STARTS: start}
        try:
            attack(model, task.image[None], criterion, epsilons=epsilon, **extra)
        except AssertionError as error:  # they carry no message
            raise RuntimeError("foolbox asked a point again, and its assertion on the answer failed") from error

    def _build(self, norm: Norm) -> Any:
        """The foolbox object."""
        options = dict(vars(self))
        if "constraint" in options:
            options["constraint"] = options["constraint"] or norm
        if isinstance(options.get("init_attack"), str):
            options["init_attack"] = load(options["init_attack"])()._build(norm)
        attack = self.foreign(**options)
        if isinstance(attack, FlexibleDistanceMinimizationAttack):
            attack._distance = _DISTANCES[norm]  # set here because PointwiseAttack needs one and takes none
        return attack
