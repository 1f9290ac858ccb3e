"""What Blacklight sees of attacks that end at its first refusal, and whether any threshold could have seen more.

    python scripts/eval_abort.py                                     five attacks, three seeds, three forms of Blacklight
    python scripts/eval_abort.py --attacks surfree --radius 1        in another ball

The setting is that of eval_stateful.py, whose mode `abort` it is; images are attacked one by one, behind a gate of their own.
The forms of the gate: `keyed` is the default, `sha256` hashes every window as published and decides alike (more than 25 of 50),
`oars` is the form of the OARS authors (channel by channel, an integer salt, at least 25 of 50).

For attacks that came through: the most hashes that any of their rows shared with an earlier one, up to the first success.
Unrelated CIFAR-10 images share up to `NATURAL`: a threshold that lies lower refuses honest users too.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench_cgba import load
from eval_stateful import ATTACKS, FREE, markdown

from robustbox import run_attack
from robustbox.boxes import as_black_box
from robustbox.defenses.blacklight import Blacklight, Secret, SketchMemory
from robustbox.defenses.index import Tokens
from robustbox.defenses.memory import Memory, Verdict

FORMS: dict[str, dict[str, Any]] = {
    "keyed": {},
    "sha256": {"hash": "sha256"},
    "oars": {"hash": "sha256", "layout": "chw", "salt": "integer", "rule": "least"},
}


NATURAL = 21
"""The most hashes that two of the 9,000 CIFAR-10 images of docs/stateful.md share."""


class Told(SketchMemory):
    """Blacklight's memory, which keeps how many hashes each stored row shared with the one before it that it resembles most."""

    def __init__(self, least: int, likeness: list[int]) -> None:
        super().__init__(least)
        self._likeness = likeness

    def store(self, print: Tokens, verdict: Verdict) -> int:
        self._likeness.append(verdict.likeness)
        return super().store(print, verdict)


class TellingBlacklight(Blacklight):
    """Blacklight, with the `likeness` of the rows that it judged, in order; the evaluator's are not stored."""

    def memory(self, secret: Secret) -> Memory:
        self.__dict__.setdefault("likeness", [])
        return Told(self.threshold + (self.rule == "more"), self.__dict__["likeness"])

    def options(self) -> dict[str, object]:
        return {name: value for name, value in super().options().items() if name != "likeness"}


@dataclass(frozen=True)
class Outcome:
    """One attack: the row of its first success (0: none), the row that was refused (0: none), the likeness of each row."""

    success: int
    refused: int
    likeness: list[int]

    @property
    def nearest(self) -> int:
        """The most hashes that a row up to the first success shared with an earlier one."""
        return max(self.likeness[: self.success], default=0)


def outcomes(attack: str, form: str, seed: int, images: int, radius: float | None) -> list[Outcome]:
    """An attack under `abort` on each image, behind one form of the gate."""
    model, clean, labels, pool = load(images)
    goal, found = ATTACKS[attack], []
    for image, label in zip(clean.split(1), labels.split(1), strict=True):
        defense = TellingBlacklight(**FORMS[form])
        result = run_attack(
            defense.wrap(as_black_box(model, "auto"), seed),
            image,
            label,
            f"abort:{attack}",
            norm=goal.norm,
            epsilon=radius or goal.epsilon,
            targets=(label + 1) % 10 if goal.targeted else None,
            budget=5000,
            seed=seed,
            pool=pool,
        )
        likeness = defense.__dict__.get("likeness", [])
        found.append(Outcome(int(result.first_success[0]), int(result.first_rejected[0]), likeness))
    return found


def line(found: list[Outcome]) -> list[str]:
    """One row of the table."""
    through = [each for each in found if each.success]
    late = [each for each in through if each.success > FREE]
    seen = sorted(each.refused for each in found if each.refused)
    return [
        f"{len(through)} of {len(found)}",
        str(len(through) - len(late)),
        str(len(late)),
        f"{sum(each.success for each in late) / len(late):.0f}" if late else "-",
        f"{max(each.nearest for each in late)}" if late else "-",
        f"{sum(each.nearest <= NATURAL for each in late)}" if late else "-",
        f"{seen[len(seen) // 2]}" if seen else "-",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description="Attacks that end at Blacklight's first refusal.")
    parser.add_argument("--images", type=int, default=20)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--attacks", nargs="+", choices=list(ATTACKS), default=[a for a in ATTACKS if a != "boundary"])
    parser.add_argument("--forms", nargs="+", choices=list(FORMS), default=list(FORMS))
    parser.add_argument("--radius", type=float, help="of the ball, instead of that of eval_stateful.py")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for attack in args.attacks:
        for form in args.forms:
            found = [each for seed in args.seeds for each in outcomes(attack, form, seed, args.images, args.radius)]
            rows.append([attack, form, *line(found)])
            print(*rows[-1], file=sys.stderr, flush=True)
    header = ["attack", "Blacklight", "through", f"within {FREE} rows", "later", "rows until then, mean"]
    print(
        "\n".join(
            markdown(
                [*header, "nearest row, of 50 hashes", f"nearest at most {NATURAL}", "refused at row, median"], rows
            )
        )
    )


if __name__ == "__main__":
    main()
