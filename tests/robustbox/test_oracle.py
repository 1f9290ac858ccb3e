"""The oracle: what it lets through, what it counts, and what it hides."""

from __future__ import annotations

import pytest
import torch

from robustbox import InputError, ModelError, run_attack
from robustbox.oracle import Oracle, check_knowledge
from robustbox.protocol import Answer, Query, Search, Task
from tests.toys import Failing, HalfSpace, NeedsScores, Scripted, Walk, images

LOGITS = torch.tensor([[2.0, 1.0, -1.0, 0.5], [0.0, 3.0, 1.0, -2.0]])


class Fixed(HalfSpace):
    """Answers the same four logits whatever it is asked."""

    def of(self, rows: torch.Tensor) -> Answer:
        return Answer.of(LOGITS.argmax(1), LOGITS.clone())


def visible(knowledge: str) -> torch.Tensor | None:
    oracle = Oracle(Fixed(), knowledge)
    return oracle.visible(oracle.ask(torch.zeros(2, 1, 2, 2), torch.zeros(2, dtype=torch.int64), {"attack": 2})).scores


def test_labels_only() -> None:
    assert visible("label") is None


def test_scores_are_probabilities_and_logits_are_what_the_model_gave() -> None:
    assert torch.equal(visible("logit"), LOGITS)
    torch.testing.assert_close(visible("score"), LOGITS.softmax(1))


@pytest.mark.parametrize("k", [1, 2, 3, 4, 9])
def test_top_k_hides_all_but_the_k_likeliest(k: int) -> None:
    shown, full = visible(f"top-{k}"), LOGITS.softmax(1)
    assert (shown > 0).sum(1).tolist() == [min(k, 4)] * 2
    torch.testing.assert_close(shown[shown > 0], full[shown > 0])
    assert shown[shown > 0].min() >= full[shown == 0].max() if k < 2 else True
    assert torch.equal(shown.argmax(1), LOGITS.argmax(1))


def test_knowledge_is_the_least_that_an_attack_needs_and_more_only_when_granted() -> None:
    saw: list[object] = []

    def script(task: Task) -> Search:
        saw.append((yield Query(task.image[None])).scores)

    run_attack(HalfSpace(), images(1), [0], Scripted(script), budget=1)
    assert saw == [None]
    needy = NeedsScores()
    run_attack(HalfSpace(), images(1), [0], needy, budget=1)
    assert needy.saw[0].sum().item() == pytest.approx(1)


@pytest.mark.parametrize(
    ("knowledge", "needed", "gives", "says"),
    [
        ("secret", "label", "logit", "unknown knowledge level 'secret'"),
        ("top-0", "label", "logit", "unknown knowledge level"),
        ("label", "score", "logit", "needs scores"),
        ("score", "score", "none", "answers labels only"),
        ("logit", "label", "probability", "cannot grant logits"),
    ],
)
def test_knowledge_that_cannot_be_is_refused_before_any_query(
    knowledge: str, needed: str, gives: str, says: str
) -> None:
    box = HalfSpace()
    box.scores = gives  # type: ignore[assignment]
    with pytest.raises(InputError, match=says):
        check_knowledge(knowledge, needed, box)
    attack = NeedsScores() if needed == "score" else Walk()
    with pytest.raises(InputError, match=says):
        run_attack(box, images(1), [0], attack, knowledge=knowledge)
    assert box.rows == 0


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -1e-9, 1 + 1e-6])
def test_one_value_outside_the_box_is_found_exactly(value: float) -> None:
    rows = torch.rand(5, 1, 4, 4)
    oracle = Oracle(HalfSpace())
    assert oracle.inadmissible(rows) == []
    rows[3, 0, 2, 1] = value
    assert oracle.inadmissible(rows) == [3]
    assert oracle.inadmissible(torch.tensor([0.0, 1.0]).view(2, 1, 1, 1)) == []


@pytest.mark.parametrize("levels", [2, 16, 256])
def test_the_model_sees_only_grey_levels(levels: int) -> None:
    box = HalfSpace()
    result = run_attack(box, images(3), [0] * 3, Walk(), budget=40, levels=levels)
    seen = torch.cat(box.seen) * (levels - 1)
    torch.testing.assert_close(seen, seen.round(), rtol=0, atol=1e-4)
    found = result.adversarials[torch.from_numpy(result.success)]
    assert torch.equal(found, Oracle(box, levels=levels).round(found))


def test_distances_are_between_rounded_images() -> None:
    def script(task: Task) -> Search:
        yield Query((task.image + 0.5).clamp(0, 1)[None])

    rows = images(1) + 1e-4  # off the grid
    result = run_attack(HalfSpace(), rows, [0], Scripted(script), norm="linf", budget=1, levels=256)
    on_grid = (rows * 255).round() / 255
    assert result.distance[0] == pytest.approx((result.adversarials - on_grid).abs().max().item())
    assert result.distance[0] * 255 == pytest.approx(round(result.distance[0] * 255), abs=1e-4)


WRONG = {
    "NaN": lambda a: Answer(a.labels, a.scores * torch.nan, a.status),
    "infinite": lambda a: Answer(a.labels, a.scores + torch.inf, a.status),
    "asked": lambda a: Answer(a.labels[1:], a.scores[1:], a.status[1:]),
    "classes from -1 to": lambda a: Answer(a.labels - 1, a.scores, a.status),
    "to 9, and has 2": lambda a: Answer(torch.full_like(a.labels, 9), a.scores, a.status),
    "planted": lambda a: 1 / 0,
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_model_that_fails_in_mid_run_stops_it_and_nothing_found_is_lost(wrong: str) -> None:
    def fail(answer: Answer) -> Answer:
        if wrong == "planted":
            raise RuntimeError("planted")
        return WRONG[wrong](answer)

    box = Failing(60, fail)
    with pytest.raises(ModelError, match=wrong) as stop:
        run_attack(box, images(4), [0] * 4, Walk(), budget=100, max_rows=8)
    result = stop.value.result
    assert result is not None
    assert box.rows == sum(result.ledger.values())
    assert result.success.all()
    assert set(result.stop_reasons) == {"stopped"}
    assert HalfSpace().of(result.adversarials).labels.all()


def test_a_model_that_fails_at_once_is_a_clear_error() -> None:
    with pytest.raises(ModelError, match="the model failed on 2 rows: ZeroDivisionError"):
        run_attack(Failing(0, WRONG["planted"]), images(2), [0, 0], Walk())
