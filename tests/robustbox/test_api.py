"""run_attack: verdicts of the evaluator, and bad input that costs no query."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from robustbox import InputError, ModelError, list_attacks, run_attack
from robustbox.protocol import Answer, BlackBox, Defense, Query, Search, Task
from tests.toys import Failing, HalfSpace, Scripted, Walk, images


class Coin(BlackBox):
    """Around a black box: answers the other of two classes with a given probability."""

    stochastic = True

    def __init__(self, inner: BlackBox, p: float) -> None:
        self.inner, self.p = inner, p
        self.classes, self.scores = inner.classes, inner.scores
        self.generator = torch.Generator().manual_seed(0)

    def answer(self, rows: torch.Tensor, accounts: torch.Tensor) -> Answer:
        answer = self.inner.answer(rows, accounts)
        flip = torch.rand(len(rows), generator=self.generator) < self.p
        return Answer(torch.where(flip, 1 - answer.labels, answer.labels), answer.scores, answer.status)


@dataclass(frozen=True)
class CoinDefense(Defense):
    p: float
    name: ClassVar[str] = "coin"

    def wrap(self, box: BlackBox, seed: int) -> BlackBox:
        return Coin(box, self.p)


def bright(far: float) -> Scripted:
    def script(task: Task) -> Search:
        while True:
            yield Query((task.image + far).clamp(0, 1)[None])

    return Scripted(script)


def test_every_row_that_the_model_sees_stands_in_a_ledger_with_a_deterministic_black_box() -> None:
    box = HalfSpace()
    result = run_attack(box, torch.cat([images(3), images(2, mean=0.9)]), [0] * 5, bright(0.3), budget=4)
    assert result.ledger == {"verify": 5 + 3, "attack": 12}
    assert box.rows == 20
    assert result.clean_correct.tolist() == [True] * 3 + [False] * 2
    assert result.stop_reasons[3:] == ["misclassified"] * 2
    assert result.success_fresh.tolist() == result.success_undefended.tolist() == [True] * 3 + [False] * 2


def test_a_lucky_draw_is_no_success_of_a_stochastic_black_box() -> None:
    box = HalfSpace()
    result = run_attack(box, images(8), [0] * 8, bright(0.1), budget=40, defense=CoinDefense(0.2))  # not adversarial
    assert result.success_any.all()
    assert not result.success_fresh.any()
    assert not result.success_undefended.any()
    assert not result.success.any()
    assert result.summary()["unconfirmed"] == 8
    assert np.isinf(result.distance_at(40)).all()  # what was not confirmed is a failure in every figure
    assert not result.success_at(40).any()
    assert result.summary()["median_queries_to_success"] == np.inf
    assert result.ledger == {"verify": 8 * 25 + 8 * 25 + 8, "attack": 320}
    assert box.rows == sum(result.ledger.values())


def test_success_that_the_noise_only_veils_is_found_on_fresh_draws_and_undefended() -> None:
    result = run_attack(HalfSpace(), images(8), [0] * 8, bright(0.3), budget=10, defense=[CoinDefense(0.2)])
    assert result.success.all()
    assert result.success_undefended.all()


def test_noise_only_success_is_told_from_a_real_one() -> None:
    class Flips(Coin):
        """Calls every bright image the other class, whatever is behind it."""

        def answer(self, rows: torch.Tensor, accounts: torch.Tensor) -> Answer:
            answer = self.inner.answer(rows, accounts)
            labels = (rows.mean(dim=(1, 2, 3)) > 0.45).long()
            return Answer(labels, answer.scores, answer.status)

    @dataclass(frozen=True)
    class FlipsDefense(CoinDefense):
        def wrap(self, box: BlackBox, seed: int) -> BlackBox:
            return Flips(box, 0)

    result = run_attack(HalfSpace(), images(4), [0] * 4, bright(0.1), budget=3, defense=FlipsDefense(0))
    assert result.success.all()
    assert not result.success_undefended.any()


def test_curves_and_summary_count_failures() -> None:
    def script(task: Task) -> Search:
        far = 0.5
        while True:
            yield Query((task.image + far).clamp(0, 1)[None])
            far *= 0.9

    rows = torch.cat([images(3), images(2, mean=0.05, seed=1), images(1, mean=0.9)])  # two can not be reached
    result = run_attack(HalfSpace(), rows, [0] * 6, Scripted(script), norm="linf", budget=60)
    assert result.success.tolist() == [True] * 3 + [False] * 3
    assert np.isinf(result.distance_at(0)[:5]).all()
    assert np.isinf(result.distance_at(60)[3:5]).all()
    assert np.isnan(result.distance_at(60)[5])
    np.testing.assert_allclose(result.distance_at(2)[:3], 0.45, rtol=1e-5)
    assert result.success_at(60, epsilon=0.46).sum() == 3
    assert result.success_at(1, epsilon=0.46).sum() == 0
    assert result.success_at(60, epsilon=0.01).sum() == 0
    summary = result.summary()
    assert summary["success"] == {"hits": 3, "of": 5, "share": 0.6, **_interval(summary["success"])}
    assert summary["clean_accuracy"]["hits"] == 5
    assert summary["robust_accuracy"] == {"hits": 2, "of": 6, "share": 1 / 3, **_interval(summary["robust_accuracy"])}
    assert summary["misclassified"] == 1
    assert list(summary["median_distance"]) == ["50", "60"]
    assert summary["median_distance"]["60"] == sorted(result.distance_at(60)[:5])[2]
    assert summary["queries"] == 300


def _interval(share: dict[str, Any]) -> dict[str, float]:
    assert share["low"] < share["share"] < share["high"]
    return {"low": share["low"], "high": share["high"]}


def test_an_adversarial_of_a_failed_image_is_nan_and_never_the_clean_image() -> None:
    result = run_attack(HalfSpace(), images(3), [0] * 3, bright(0.01), budget=5)
    assert not result.success.any()
    assert result.adversarials.isnan().all()
    assert np.isnan(result.distance).all()


def test_numpy_input_and_one_target_for_all() -> None:
    result = run_attack(
        HalfSpace(classes=3), images(2).numpy().astype(np.float64), np.array([0, 0]), bright(0.3), targets=1, budget=2
    )
    assert result.success.all()


def test_stop_by_the_user_keeps_what_was_found(tmp_path) -> None:
    def interrupt(state: object) -> None:
        if state.rows > 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_attack(HalfSpace(), images(4), [0] * 4, bright(0.3), budget=100, progress=interrupt, out=tmp_path / "run")
    from robustbox.folder import read_run

    document, adversarials = read_run(tmp_path / "run")
    assert [image["stop_reason"] for image in document["images"]] == ["stopped"] * 4
    assert not adversarials.isnan().any()


ONE = images(1)
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "unknown attack": ({"attack": "cgbaa"}, "unknown attack 'cgbaa': did you mean cgba"),
    "unknown option": ({"attack": "cgba", "attack_options": {"n1": 3}}, "unknown option of attack cgba 'n1'"),
    "options of an object": ({"attack_options": {"n0": 3}}, "go with the name"),
    "unknown defense": ({"defense": "input-nose"}, "unknown defense 'input-nose': did you mean input-noise"),
    "unknown norm": ({"norm": "l3"}, "unknown norm"),
    "norm that the attack has not": ({"attack": "cgba", "norm": "linf"}, "works in l2, not in linf"),
    "budget 0": ({"budget": 0}, "budget must be a whole number of at least 1"),
    "budget negative": ({"budget": -5}, "budget must be"),
    "budget half": ({"budget": 0.5}, "budget must be"),
    "total budget": ({"total_budget": 0}, "total_budget must be"),
    "max rows": ({"max_rows": 0}, "max_rows must be"),
    "epsilon 0": ({"epsilon": 0.0}, "epsilon must be a positive number"),
    "epsilon NaN": ({"epsilon": float("nan")}, "epsilon must be"),
    "levels": ({"levels": 1}, "levels must be"),
    "epsilon of less than a level": (
        {"epsilon": 0.0038, "levels": 256},
        r"^epsilon=0\.0038 is less than one of 256 grey levels: no row .* epsilon must be at least 1/255",
    ),
    "above one": ({"images": ONE * 255}, "must lie in .0, 1."),
    "below zero": ({"images": ONE - 0.5}, "must lie in .0, 1."),
    "NaN image": ({"images": ONE * torch.nan}, "number 0 has NaN"),
    "integers": ({"images": (ONE * 255).byte()}, "divide 8-bit values by 255"),
    "three axes": ({"images": ONE[0]}, r"must have the shape \[N,C,H,W\]"),
    "no image": ({"images": ONE[:0], "labels": []}, "no image to attack"),
    "label out of range": ({"labels": [2]}, "labels must be 0 to 1, but number 0 is 2"),
    "label negative": ({"labels": [-1]}, "labels must be 0 to 1"),
    "label float": ({"labels": [0.5]}, "must be integers"),
    "too many labels": ({"labels": [0, 0]}, "labels must be 1 integers"),
    "target is label": ({"targets": [0]}, "the target of image 0 is its own label"),
    "target out of range": ({"targets": [7]}, "targets must be 0 to 1"),
    "pool holds an attacked image": ({"pool": (ONE, [0])}, "pool image 0 is one of the attacked images"),
    "target out of range, a number of numpy's": ({"targets": np.int64(7)}, "targets must be 0 to 1"),
    "pool holds an image as it is sent": (
        {"pool": (ONE, [0]), "levels": 256},
        "pool image 0 is one of the attacked images",
    ),
    "pool of another size": (
        {"pool": (ONE[..., 1:], [0])},
        r"pool images are 3 x 8 x 7, the attacked images 3 x 8 x 8 \(C x H x W\)",
    ),
    "pool of another kind": ({"pool": (ONE[:, :1], [0])}, "pool images are 1 x 8 x 8"),
    "seed": ({"seed": 0.5}, "seed must be a whole number"),
    "no pixel": ({"images": ONE[..., :0]}, "no image to attack"),
    "scores of labels": ({"knowledge": "logits"}, "unknown knowledge level"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_clear_line_and_costs_no_query(case: str) -> None:
    changes, says = BAD[case]
    box = HalfSpace()
    arguments = {"images": ONE, "labels": [0], "attack": Walk(), **changes}
    with pytest.raises(InputError, match=says) as error:
        run_attack(box, arguments.pop("images"), arguments.pop("labels"), **arguments)
    assert "\n" not in str(error.value)
    assert box.rows == 0


def test_the_wrong_size_is_refused_where_the_model_says_its_own() -> None:
    box = HalfSpace()
    box.input_shape = (3, 32, 32)
    with pytest.raises(InputError, match="images are 3 x 8 x 8, the model takes 3 x 32 x 32"):
        run_attack(box, ONE, [0], Walk())


def test_no_image_classified_correctly_is_an_error() -> None:
    with pytest.raises(InputError, match="no image is classified correctly"):
        run_attack(HalfSpace(), images(3), [1] * 3, Walk())


def test_numbers_of_numpy_are_numbers(tmp_path: Path) -> None:
    plain: dict[str, Any] = {"budget": 40, "seed": 3, "levels": 256, "epsilon": 0.25, "targets": 1}
    numpy: dict[str, Any] = {
        **{name: np.int64(plain[name]) for name in ("budget", "seed", "levels", "targets")},
        "epsilon": np.float32(0.25),
    }
    rows = images(2)
    results = [
        run_attack(HalfSpace(), rows, [0, 0], "cgba", attack_options={"n0": n0}, out=tmp_path / name, **setting)
        for name, n0, setting in (("plain", 11, plain), ("numpy", np.int64(11), numpy))
    ]
    assert results[0].traces == results[1].traces
    one, two = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("plain", "numpy"))
    for name in ("budget", "seed", "levels", "epsilon", "attack"):
        assert one[name] == two[name]
    same = (tmp_path / name / "config.yaml" for name in ("plain", "numpy"))
    assert len({file.read_text() for file in same}) == 1


def test_arrays_with_reversed_axes_are_images() -> None:
    rows = images(2)
    turned = run_attack(HalfSpace(), rows.numpy()[..., ::-1], [0, 0], Walk(), budget=6)
    assert turned.traces == run_attack(HalfSpace(), rows.flip(3), [0, 0], Walk(), budget=6).traces


@pytest.mark.parametrize(
    ("wrong", "says"),
    [({"targets": 7}, "targets must be 0 to 1"), ({"pool": (images(2, seed=5), [0, 9])}, "pool labels")],
)
def test_classes_that_a_first_answer_shows_are_checked_before_the_attack(wrong: dict[str, Any], says: str) -> None:
    box = HalfSpace()
    asked: list[int] = []

    def callable_(rows: torch.Tensor) -> Any:
        asked.append(len(rows))
        return box.of(rows).scores

    with pytest.raises(InputError, match=says):
        run_attack(callable_, ONE, [0], Walk(), **wrong)
    assert sum(asked) == 1  # the clean check's


def test_what_was_found_comes_with_a_model_that_fails_in_the_clean_check(tmp_path: Path) -> None:
    with pytest.raises(ModelError) as stop:
        run_attack(Failing(1, lambda answer: 1 / 0), images(2), [0, 0], Walk(), out=tmp_path)  # type: ignore[arg-type, return-value]
    assert stop.value.result is not None
    assert stop.value.result.stop_reasons == ["stopped"] * 2
    assert not json.loads((tmp_path / "results.json").read_text())["complete"]


def test_what_was_paid_for_stays_when_a_defense_finds_bad_input_in_the_middle(tmp_path: Path) -> None:
    def refuses(answer: Answer) -> Answer:
        raise InputError("planted")

    with pytest.raises(InputError, match="planted"):
        run_attack(Failing(20, refuses), images(2), [0, 0], Walk(), out=tmp_path, max_rows=4)
    box = HalfSpace()
    whole = run_attack(HalfSpace(), images(2), [0, 0], Walk(), max_rows=4)
    assert run_attack(box, images(2), [0, 0], Walk(), out=tmp_path, max_rows=4).traces == whole.traces
    assert box.rows < sum(whole.ledger.values())  # what was answered before is not asked again


def test_attacks_are_listed() -> None:
    assert {"cgba", "cgba-h", "random"} <= set(list_attacks())
