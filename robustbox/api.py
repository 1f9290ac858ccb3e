"""The public face: run an attack on a black box, with the books kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn

from robustbox import inputs, registry
from robustbox.boxes import as_black_box
from robustbox.contest import Contest
from robustbox.errors import InputError, ModelError
from robustbox.evaluator import undefended
from robustbox.folder import RunFolder, open_run
from robustbox.journaled import journaled
from robustbox.loop import Progress
from robustbox.numbering import numbered
from robustbox.oracle import Oracle, check_knowledge
from robustbox.protocol import Attack, BlackBox, Defense
from robustbox.provenance import Rules
from robustbox.report import write_report
from robustbox.results import AttackResult

Model = str | BlackBox | nn.Module | Callable[[Tensor], Any]


def run_attack(
    model: Model,
    images: Tensor | ArrayLike,
    labels: Tensor | ArrayLike,
    attack: str | Attack = "cgba",
    norm: str | None = None,
    epsilon: float | None = None,
    targets: int | Tensor | ArrayLike | None = None,
    budget: int = 1000,
    defense: str | Defense | Sequence[str | Defense] | None = None,
    knowledge: str | None = None,
    levels: int | None = None,
    seed: int = 0,
    device: str | torch.device = "auto",
    attack_options: Mapping[str, Any] | None = None,
    defense_options: Mapping[str, Any] | None = None,
    pool: tuple[Tensor | ArrayLike, Tensor | ArrayLike] | None = None,
    out: str | Path | RunFolder | None = None,
    *,
    starts: Tensor | ArrayLike | None = None,
    total_budget: int | None = None,
    keep_going: bool = False,
    max_rows: int | Literal["auto"] = "auto",
    eot: int = 1,
    accounts: int | None = 1,
    progress: Callable[[Progress], None] | None = None,
    fresh: bool = False,
) -> AttackResult:
    """Attack images on a model that can only be queried, within an exact budget of queries.

    Every row that the black box sees is counted once, on a ledger: `attack` and `calibrate` (the attacker's; at most
    `budget` an image), `verify` (the evaluator's: one row an image for the clean check, one for each adversarial found, and
    one more where a defense stands before the model; 25 instead of one where the black box is stochastic).

    Args:
        model: a zoo name, `timm:NAME`, `torchvision:NAME`, `file:PATH`, `http://...`, `remote:FILE.yaml`, an nn.Module, or
            any callable from a batch float32 [n,C,H,W] to scores [n,K] or labels [n]; one score a row is that of class 1.
        images: float [N,C,H,W] in [0, 1].
        labels: N true classes. Images that the model misclassifies are counted once and not attacked.
        attack: a name (`robustbox.list_attacks()`), `foolbox:CLASS`, or an Attack.
        norm: `l0` (changed pixels), `l2` or `linf`, in the units of the images; None is l2, or the attack's first norm where
            it knows no l2.
        epsilon: radius of the ball in which an attack must succeed, and at whose first success it stops; None minimises
            the distance until the budget is spent.
        targets: classes to reach, N of them or one for all; None is untargeted.
        budget: queries (rows) an image.
        defense: a name, a file that `robustbox.defend` wrote, a Defense, or a list of them, outermost first.
        knowledge: what the attack sees: `label`, `top-K`, `score`, `logit`; None grants the least that it needs.
        levels: grey levels that rows are rounded to before the model sees them (256 for an 8-bit API); images are rounded
            first, and distances are between rounded images.
        seed: the root of all randomness. An image's stream comes from (seed, its sha256, the attack's name).
        device: where a model named by a string runs; "auto" takes CUDA where it is, and leaves modules where they stand.
        attack_options, defense_options: hyper-parameters of an attack or defense given by name.
        pool: (images, labels) that the attacker owns, for targeted starts; never the attacked ones.
        out: a folder for config, journal, results and adversarials. A run that was stopped goes on from the journal when it
            is started again with the same arguments: what was answered is not asked again.
        starts: rows [N,C,H,W] found elsewhere that may reach the goal, one an image (NaN: none): adversarials of another model,
            or of an earlier run. Each is asked first, at one query, and the search begins there if it does.
        total_budget: queries that all images together may cost.
        keep_going: with an epsilon, do not stop at the first success but go on minimising.
        max_rows: rows fused into one forward pass; "auto" learns the fastest.
        eot: answers a row: each row is asked so many times, is charged so many queries, and the attack sees the consensus
            (label of the majority, mean scores); against black boxes that answer at random.
        accounts: accounts that the attacker may use up on one image where a gate bans them; None is any number.
        progress: called once a round with a `Progress`.
        fresh: start over, and forget the run that the folder `out` holds.

    Raises:
        InputError: bad input, before an attack spends a query.
        ModelError: the model failed in mid-run; its `result` holds what was found, and so does the folder `out`.
        StorageError: the folder `out` can no longer be written to.
    """
    contest = prepare(
        model,
        images,
        labels,
        attack=attack,
        norm=norm,
        epsilon=epsilon,
        targets=targets,
        budget=budget,
        defense=defense,
        knowledge=knowledge,
        levels=levels,
        seed=seed,
        device=device,
        attack_options=attack_options,
        defense_options=defense_options,
        pool=pool,
        starts=starts,
        total_budget=total_budget,
        keep_going=keep_going,
        max_rows=max_rows,
        eot=eot,
        accounts=accounts,
    )
    return conduct(contest, out, fresh, progress)


def conduct(
    contest: Contest,
    out: str | Path | RunFolder | None = None,
    fresh: bool = False,
    progress: Callable[[Progress], None] | None = None,
    need_one: bool = True,
) -> AttackResult:
    """Run a contest that is built, from the clean check to the folder: the second half of `run_attack`.

    Args:
        contest, out, fresh, progress: as there.
        need_one: whether it is an error if no image is classified correctly.

    Raises:
        InputError, ModelError, StorageError: as `run_attack`.
    """
    with (
        open_run(out, contest.config(), fresh) as folder,
        journaled(contest.oracle, folder.journal, contest.identity() if folder.journal else {}),
    ):
        paid = False
        try:
            contest.check_clean(need_one)
            check_knowledge(contest.oracle.knowledge, contest.attack.knowledge, contest.oracle.box)  # known by now
            paid = True
            contest.fight(progress)
            contest.verify()
        except (ModelError, InputError, KeyboardInterrupt) as stop:
            if isinstance(stop, InputError) and not paid:  # before the attack: nothing is worth being kept
                raise
            found = _written(folder, contest, complete=False)
            if isinstance(stop, ModelError):
                stop.result = found
            raise
        return _written(folder, contest, complete=True)


def _written(folder: RunFolder, contest: Contest, complete: bool) -> AttackResult:
    """What was found so far, which stands in the folder then; `complete`: the run came to its end."""
    result = contest.result()
    with folder.storing():
        folder.write(result, complete)
        write_report(folder.path, contest.images)
        if complete:
            folder.end()
    return result


def worst_case(model: Model, images: Tensor | ArrayLike, labels: Tensor | ArrayLike, **setting: Any) -> dict[str, int]:
    """The rows that `run_attack` with this setting would cost at most, by ledger; everything is checked, no query asked.

    Raises:
        InputError: as `run_attack`.
    """
    return prepare(model, images, labels, **setting).worst_case()


def prepare(
    model: Model,
    images: Tensor | ArrayLike,
    labels: Tensor | ArrayLike,
    *,
    attack: str | Attack = "cgba",
    norm: str | None = None,
    epsilon: float | None = None,
    targets: int | Tensor | ArrayLike | None = None,
    budget: int = 1000,
    defense: str | Defense | Sequence[str | Defense] | None = None,
    knowledge: str | None = None,
    levels: int | None = None,
    seed: int = 0,
    device: str | torch.device = "auto",
    attack_options: Mapping[str, Any] | None = None,
    defense_options: Mapping[str, Any] | None = None,
    pool: tuple[Tensor | ArrayLike, Tensor | ArrayLike] | None = None,
    starts: Tensor | ArrayLike | None = None,
    total_budget: int | None = None,
    keep_going: bool = False,
    max_rows: int | Literal["auto"] = "auto",
    eot: int = 1,
    accounts: int | None = 1,
) -> Contest:
    """Everything checked and built, nothing asked: the first half of `run_attack`."""
    chosen = inputs.resolve_attack(attack, attack_options)
    defenses = inputs.resolve_defenses(defense, defense_options)
    own = "l2" if "l2" in chosen.norms else chosen.norms[0]
    measured = inputs.check_threat(norm or own, epsilon, levels)
    if measured not in chosen.norms:
        raise InputError(
            f"attack {chosen.name} works in {' and '.join(chosen.norms)}, not in {measured}: choose another norm or attack"
        )
    if epsilon is None and chosen.needs_epsilon:
        raise InputError(f"attack {chosen.name} searches at a fixed radius: give epsilon")
    if targets is not None and not chosen.targeted:
        raise InputError(f"attack {chosen.name} is untargeted only: leave targets out or take another attack")
    if starts is not None and not chosen.takes_start:
        raise InputError(f"attack {chosen.name} begins at the image itself: leave starts out or take another attack")
    budget, eot, seed = inputs.check_count(budget, "budget"), inputs.check_count(eot, "eot"), inputs.check_seed(seed)
    total_budget = None if total_budget is None else inputs.check_count(total_budget, "total_budget")
    accounts = None if accounts is None else inputs.check_count(accounts, "accounts")
    max_rows = "auto" if max_rows == "auto" else inputs.check_count(max_rows, "max_rows")
    epsilon, levels = None if epsilon is None else float(epsilon), None if levels is None else int(levels)

    box = as_black_box(model, device)
    for recipe in reversed(defenses):
        box = recipe.wrap(box, seed)
    oracle = Oracle(box, knowledge or chosen.knowledge, levels, total_budget)
    check_knowledge(oracle.knowledge, chosen.knowledge, box)
    inputs.check_levels(levels, undefended(oracle).box)
    clean = oracle.round(inputs.check_images(images, box))
    truth = inputs.check_labels(labels, len(clean), box.classes)
    aims = inputs.check_targets(targets, truth, box.classes)
    owned = inputs.check_pool(pool, clean, box, levels)
    begun = [None if row is None else oracle.round(row) for row in inputs.check_starts(starts, clean, box)]
    rules = Rules(
        norm=measured,
        epsilon=epsilon,
        budget=budget,
        total_budget=total_budget,
        keep_going=keep_going,
        max_rows=max_rows,
        seed=seed,
        eot=eot,
        accounts=accounts,
    )
    contest = Contest(oracle, chosen, defenses, clean, truth, aims or [None] * len(truth), owned, begun, rules)
    contest.check_task()
    return contest


def load_model(name: str) -> Any:
    """A model by name: an nn.Module in evaluation mode that takes images in [0, 1], normalisation inside."""
    return registry.make("models", name)


def load_data(name: str, model: Model | None = None) -> Any:
    """A data set by name: images float32 [N,C,H,W] in [0, 1], labels int64 [N], and the names of its classes.

    Args:
        name: of the data set.
        model: number the labels as this model does, where both name their classes (`robustbox.numbering`).
    """
    data = registry.make("data", name)
    return data if model is None else numbered(data, as_black_box(model), name)


def list_attacks() -> list[str]:
    """The names that `attack=` takes, without those of schemes such as `foolbox:CLASS`."""
    return registry.names("attacks")
