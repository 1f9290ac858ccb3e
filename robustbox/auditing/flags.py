"""What the pre-flight has to say of a black box: each flag says when it is raised, what that means, and what to do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Flag:
    """A warning.

    Args:
        code: its short name.
        raised_if: the condition under which it is raised.
        meaning: what that says about the numbers of the audit.
        what_to_do: advice.
        seen: what was seen this time.
    """

    code: str
    raised_if: str
    meaning: str
    what_to_do: str
    seen: str = ""

    def plain(self) -> dict[str, str]:
        """For audit.json."""
        return asdict(self)


_TEXTS = {
    "fails": (
        "the black box raised, or answered NaN or another number of rows, when it was first asked",
        "nothing can be said about it: its cells are not run",
        "mend the model, or its entry in the audit's file, and start the audit again",
    ),
    "chance": (
        "it is right about the pre-flight's images no more often than a guess would be (binomial test, p > 0.05)",
        "labels, classes or the preparation of images are probably wrong; robust accuracy will be low for no attack's merit",
        "check that labels and classes have the model's order, and that it takes images in [0, 1] as they are",
    ),
    "box": (
        "it is right about significantly more images when they are prepared in another way (McNemar's test, p < 0.05)",
        "the model is not asked what it was trained for: normalised twice or not at all, 0 to 255, or channels reversed",
        "put the preparation into the model, so that it takes RGB images in [0, 1]",
    ),
    "stochastic": (
        "the same rows were answered differently, or it says of itself that they may be",
        "one query proves nothing: successes are confirmed on 25 fresh draws, and single answers mislead an attack",
        "give the attacks `eot`, 5 or more; without an attack under EOT robust accuracy is an overestimate",
    ),
    "undeclared-noise": (
        "the same rows were answered differently, though it does not say of itself that they may be",
        "successes are confirmed by one answer only, and are partly luck",
        "set `stochastic = True` on the black box; for a module in evaluation mode look for dropout left on",
    ),
    "rounded-scores": (
        "all scores that are neither 0 nor 1 are whole multiples of one power of ten",
        "differences between close images vanish in the rounding: attacks by finite differences (nes, bandits) see nothing",
        "judge it by label attacks too, and by score attacks that take large steps (square)",
    ),
    "label-only": (
        "answers hold labels and no scores",
        "score attacks cannot be run",
        "use label attacks: cgba, surfree, hop-skip-jump, rays",
    ),
    "refuses-near-duplicates": (
        "near copies of one image were refused when one account sent them",
        "attacks that do not adapt are stopped by the refusals, which says little about attackers who know of the gate",
        "add `oars:NAME` attacks and more than one account; look at the false positives on natural images",
    ),
    "silent-history": (
        "it says that its answers depend on earlier queries, but refused none of the near copies",
        "it looks for something else, looks later, or watches in silence: its detections are not in the answers",
        "raise `preflight.copies`, and read its statistics in the cells' results",
    ),
    "refuses-benign": (
        "natural images, each sent once, were refused",
        "honest users meet refusals; the interval is beside the number",
        "weigh it against the detections, and set a threshold on `false-positives`",
    ),
    "no-eot": (
        "it answers at random, and no attack of the audit asks a row more than once",
        "the attacks do not adapt to the defense: robust accuracy is an overestimate",
        "add an attack with `eot` of 5 or more",
    ),
    "no-adaptive-attack": (
        "its answers depend on earlier queries, and no attack of the audit adapts to that",
        "robust accuracy is an overestimate",
        "add `oars:NAME` or `rehearsed:NAME` attacks",
    ),
    "few-images": (
        "fewer than 100 images are attacked",
        "intervals are wide: 20 images leave 95 % intervals of up to 40 points",
        "name a larger data set with `data` and raise `images`",
    ),
}


def flag(code: str, seen: str = "") -> Flag:
    """The flag of a code, with what was seen."""
    return Flag(code, *_TEXTS[code], seen)


CODES = tuple(_TEXTS)


def flags_of(raised: Mapping[str, Sequence[Mapping[str, str]]]) -> list[dict[str, Any]]:
    """Each flag once, its `where` a list of the places where it was raised, with what was seen there."""
    found: dict[str, dict[str, Any]] = {}
    for place, flags in raised.items():
        for each in flags:
            its = found.setdefault(each["code"], {**each, "where": []})
            its["where"].append(f"{place} ({each['seen']})" if each["seen"] else place)
    return list(found.values())
