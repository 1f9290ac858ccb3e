"""What models return: probabilities of any precision, and one output where there could be two."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from robustbox import ModelError, run_attack
from robustbox.attacks.losses import losses
from robustbox.boxes import CallableBox, ModuleBox
from robustbox.models.cards import Card, carded
from robustbox.models.remote import RemoteBox
from robustbox.models.service_file import ServiceFile
from robustbox.protocol import Answer
from robustbox.scores import maybe_truncated, recognise, tolerance
from tests.attacks.analytic import task
from tests.services import served
from tests.toys import NeedsScores, images

HALVES = [torch.bfloat16, torch.float16]


def logits(classes: int, dtype: torch.dtype, spread: float = 3.0) -> Tensor:
    """Logits [n,K]."""
    n = 64 if classes < 10_000 else 8
    return (torch.randn(n, classes, generator=torch.Generator().manual_seed(0)) * spread).to(dtype)


def by_hand(z: Tensor) -> Tensor:
    """Probabilities as models compute them that have no softmax, each step rounded."""
    e = (z - z.amax(dim=1, keepdim=True)).exp()
    return e / e.sum(dim=1, keepdim=True)


def kind(scores: Tensor) -> Any:
    return recognise(scores, "model", "so")


@pytest.mark.parametrize("classes", [2, 10, 100, 1000, 21841])
@pytest.mark.parametrize("dtype", [*HALVES, torch.float32, torch.float64])
def test_probabilities_of_any_precision_are_probabilities(dtype: torch.dtype, classes: int) -> None:
    for spread in (0.01, 1.0, 5.0, 20.0):
        for made in (torch.softmax(logits(classes, dtype, spread), 1), by_hand(logits(classes, dtype, spread))):
            assert kind(made) == "probability"
            assert maybe_truncated(made).all()


@pytest.mark.parametrize("classes", [2, 10, 1000])
@pytest.mark.parametrize("dtype", [*HALVES, torch.float32, torch.float64])
def test_what_sums_to_more_or_less_than_precision_explains_are_logits(dtype: torch.dtype, classes: int) -> None:
    p = logits(classes, torch.float64, 1.0).softmax(dim=1) * 0.8
    for off in (-1.5, 1.5):
        scores = p.clone()
        scores[:, 0] += 0.2 + off * tolerance(p.to(dtype))
        assert kind(scores.to(dtype)) == "logit"
    assert kind(logits(classes, dtype)) == "logit"


def test_single_precision_may_be_off_by_what_it_could_before() -> None:
    for dtype in (torch.float32, torch.float64):
        assert {tolerance(torch.zeros(1, k, dtype=dtype)) for k in (2, 10, 1000, 21841)} == {1e-3}


@pytest.mark.parametrize("dtype", HALVES)
def test_a_score_attack_is_told_the_probabilities_that_the_model_gave(dtype: torch.dtype) -> None:
    box = CallableBox(lambda rows: by_hand(20 * (rows.flatten(1)[:, :30] - 0.4).to(dtype)))
    rows = images(40)
    labels = box.answer(rows, torch.zeros(40)).labels
    saw = NeedsScores()
    run_attack(box, rows, labels, saw, budget=1, knowledge="score")
    assert box.scores == "probability"
    found = torch.cat([part for part in saw.saw if part is not None])
    assert torch.equal(found, box.function(rows))


@pytest.mark.parametrize("dtype", HALVES)
def test_losses_read_them_as_probabilities(dtype: torch.dtype) -> None:
    of = task(torch.zeros(1, 2, 2), "l0", label=1)
    p = torch.cat([by_hand(logits(10, dtype, spread)) for spread in (0.5, 2.0)])
    got = losses(of, Answer.of(p.argmax(dim=1), p), "probability")
    np.testing.assert_allclose(got.float(), p[:, 1].float(), rtol=0.03, atol=1e-3)


# One output


def z(rows: Tensor) -> Tensor:
    """A logit a row [n], of brightness; each by itself, so that it does not depend on its batch."""
    return torch.stack([20 * (row.double().mean() - 0.6) for row in rows]).float()


def p(rows: Tensor) -> Tensor:
    return z(rows).sigmoid()


def ask(box: CallableBox, rows: Tensor) -> Answer:
    return box.answer(rows, torch.zeros(len(rows), dtype=torch.long))


def of(values: list[float], dtype: torch.dtype = torch.float32, **options: Any) -> tuple[CallableBox, Answer]:
    """A black box that returned these values first."""
    box = CallableBox(lambda rows: torch.tensor(values, dtype=dtype), **options)
    return box, ask(box, images(len(values)))


@pytest.mark.parametrize("form", [lambda t: t, lambda t: t[:, None], lambda t: t.numpy(), lambda t: t.tolist()])
@pytest.mark.parametrize("n", [1, 5])
def test_one_output_is_two_classes_in_whatever_form_it_comes(form: Any, n: int) -> None:
    rows = torch.cat([images(3), images(2, mean=0.9)])[-n:]
    for function, found in ((z, "logit"), (p, "probability")):
        box = CallableBox(lambda rows, function=function: form(function(rows)))
        answer = ask(box, rows)
        assert (box.scores, box.classes) == (found, 2)
        assert answer.labels.tolist() == (z(rows) > 0).long().tolist()
        assert answer.scores is not None
        chances = answer.scores.softmax(dim=1) if found == "logit" else answer.scores
        torch.testing.assert_close(chances.float(), torch.stack((1 - p(rows), p(rows)), dim=1))


def test_a_row_whose_axes_were_squeezed_away_is_one_row() -> None:
    box = CallableBox(lambda rows: z(rows).squeeze())
    assert ask(box, images(1, mean=0.9)).labels.tolist() == [1]


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32, torch.float64])
def test_ties_are_of_class_0_and_their_neighbours_are_not(dtype: torch.dtype) -> None:
    least = torch.finfo(dtype).eps
    assert of([0.5, 0.5 + least, 0.5 - least, 1.0, 0.0], dtype)[1].labels.tolist() == [0, 1, 0, 1, 0]
    assert of([0.0, least, -least, 9.0], dtype)[1].labels.tolist() == [0, 1, 0, 1]


def test_what_the_first_answer_showed_stays() -> None:
    box, _ = of([-0.1, 0.4])
    box.function = lambda rows: torch.tensor([0.4, 0.6])
    answer = ask(box, images(2))
    assert box.scores == "logit"
    assert answer.labels.tolist() == [1, 1]
    box, _ = of([0.1, 0.4])
    box.function = lambda rows: torch.tensor([0.4, 1.25])
    with pytest.raises(
        ModelError, match=r"returned 1.25, and .* declare that \(CallableBox\(\.\.\., scores='logit'\)\)"
    ) as caught:
        ask(box, images(2))
    assert "\n" not in str(caught.value)


def test_a_declaration_decides() -> None:
    box, answer = of([0.1, 0.4], scores="logit")
    assert (box.scores, answer.labels.tolist()) == ("logit", [1, 1])
    assert of([0.0, 1.0], scores="probability")[1].labels.tolist() == [0, 1]
    with pytest.raises(ModelError, match="returned 3, "):
        of([0.1, 3.0], scores="probability")
    with pytest.raises(ModelError, match="returned scores where labels were due"):
        of([0.1, 3.0], scores="none")


@pytest.mark.parametrize("values", [[0.0, 1.0, 2.0], [1.0, 0.0, 0.0], [1.0], [-3.0, 4.0]])
def test_whole_numbers_are_not_taken_for_scores_unless_declared(values: list[float]) -> None:
    with pytest.raises(ModelError, match="whole numbers only: labels must be integers") as caught:
        of(values)
    assert "\n" not in str(caught.value)
    of(values, scores="logit")
    box, _ = of([0.3])
    box.function = lambda rows: torch.tensor([1.0, 0.0])  # saturated
    assert ask(box, images(2)).labels.tolist() == [1, 0]


def test_nan_shows_nothing() -> None:
    box, answer = of([torch.nan, torch.nan])
    assert answer.scores is not None
    assert answer.scores.isnan().all()
    assert (box.scores, answer.scores.shape) == (None, (2, 2))
    box.function = lambda rows: torch.tensor([0.2, torch.nan])
    ask(box, images(2))
    assert box.scores == "probability"


def test_a_module_and_its_card_may_speak_of_one_output() -> None:
    class Bright(torch.nn.Module):
        def forward(self, rows: Tensor) -> Tensor:
            return rows.flatten(1).mean(dim=1, keepdim=True)

    box = ModuleBox(carded(Bright(), Card("bright", "brightness", classes=1)))
    assert (box.classes, box.scores) == (2, "logit")
    rows = images(3)
    assert box.answer(rows, torch.arange(3)).labels.tolist() == [1, 1, 1]
    box = ModuleBox(carded(Bright(), Card("bright", "brightness", classes=1)), scores="probability")
    assert box.answer(rows, torch.arange(3)).labels.tolist() == [0, 0, 0]


def both(rows: Tensor) -> Tensor:
    return torch.stack((1 - p(rows), p(rows)), dim=1)


@pytest.mark.parametrize(
    ("attack", "knowledge", "options"),
    [
        ("cgba", "label", {}),
        ("hop-skip-jump", "label", {}),
        ("square", "score", {"norm": "linf", "epsilon": 0.5, "keep_going": True}),
        ("nes", "score", {"norm": "l2", "epsilon": 3.0, "keep_going": True}),
        ("sign-hunter", "score", {"norm": "linf", "epsilon": 0.05, "keep_going": True}),
        ("nes", "logit", {"norm": "l2", "epsilon": 3.0, "keep_going": True}),
    ],
)
def test_attacks_see_what_they_would_see_of_two_outputs_and_are_counted_alike(
    attack: str, knowledge: str, options: dict[str, Any]
) -> None:
    rows = torch.cat([images(3, mean=0.59), images(2, mean=0.61, seed=1)])
    models = (z, lambda rows: torch.stack((-z(rows) / 2, z(rows) / 2), dim=1)) if knowledge == "logit" else (p, both)
    results = []
    for model in models:
        seen: list[int] = []

        def counted(rows: Tensor, model: Any = model, seen: list[int] = seen) -> Tensor:
            seen.append(len(rows))
            return model(rows)

        result = run_attack(
            counted, rows, [0] * 3 + [1] * 2, attack, budget=80, knowledge=knowledge, max_rows=8, **options
        )
        assert sum(seen) == sum(result.ledger.values())
        assert (result.queries <= 80).all()
        results.append(result)
    one, two = results
    assert one.clean_correct.all()
    assert one.success.any()
    assert one.traces == two.traces
    assert one.ledger == two.ledger
    assert torch.equal(one.adversarials.nan_to_num(-1), two.adversarials.nan_to_num(-1))


def test_a_logit_that_hides_among_probabilities_ends_the_run_and_keeps_what_was_paid_for() -> None:
    def steep(rows: Tensor) -> Tensor:
        return 10 * z(rows)

    near = torch.full((1, 3, 8, 8), 0.602)  # its logit is 0.4
    with pytest.raises(ModelError, match="declare that") as caught:
        run_attack(steep, near, [0], "cgba", budget=50)
    assert caught.value.result is not None
    result = run_attack(CallableBox(steep, scores="logit"), near, [1], "cgba", budget=50)
    assert result.success.all()


def test_a_model_with_one_output_is_served_as_two_classes() -> None:
    box = CallableBox(p)
    with served(box) as (address, service):
        there = run_attack(
            RemoteBox(ServiceFile(url=address), "there"), images(2), [0, 0], "cgba", budget=40, max_rows=8
        )
        assert sum(service.rows.values()) == sum(there.ledger.values())
    here = run_attack(p, images(2), [0, 0], "cgba", budget=40, max_rows=8)
    assert there.traces == here.traces
