"""Black boxes from modules, callables and names: what they read off an answer, and what they leave alone."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from robustbox.boxes import CallableBox, ModuleBox, as_black_box
from robustbox.errors import InputError, ModelError
from robustbox.protocol import Answer

ROWS = torch.rand(5, 3, 4, 4, generator=torch.Generator().manual_seed(0))
ACCOUNTS = torch.arange(5)
WEIGHTS = torch.randn(48, 7, generator=torch.Generator().manual_seed(1))


def logits(rows: Tensor) -> Tensor:
    return rows.flatten(1) @ WEIGHTS


def ask(function: Any, **options: Any) -> tuple[CallableBox, Answer]:
    box = CallableBox(function, **options)
    return box, box.answer(ROWS, ACCOUNTS)


class TestScores:
    """The first answer shows what a callable returns."""

    def test_logits(self) -> None:
        box, answer = ask(logits)
        assert (box.scores, box.classes) == ("logit", 7)
        assert answer.scores is not None
        torch.testing.assert_close(answer.scores, logits(ROWS))
        assert answer.labels.tolist() == logits(ROWS).argmax(1).tolist()
        assert answer.status.tolist() == [0] * 5

    def test_probabilities(self) -> None:
        box, _ = ask(lambda rows: logits(rows).softmax(1))
        assert (box.scores, box.classes) == ("probability", 7)

    @pytest.mark.parametrize(
        ("excess", "kind"), [(8e-4, "probability"), (-8e-4, "probability"), (3e-3, "logit"), (-3e-3, "logit")]
    )
    def test_the_sum_of_probabilities_may_be_off_by_a_thousandth(self, excess: float, kind: str) -> None:
        assert ask(lambda rows: logits(rows).softmax(1) * (1 + excess))[0].scores == kind

    def test_one_row_that_is_no_distribution_makes_them_logits(self) -> None:
        def mixed(rows: Tensor) -> Tensor:
            scores = logits(rows).softmax(1)
            scores[3] += torch.tensor([-1.0, 1.0, 0, 0, 0, 0, 0])  # the sum is still 1
            return scores

        assert ask(mixed)[0].scores == "logit"

    def test_a_declaration_is_not_overruled(self) -> None:
        assert ask(lambda rows: logits(rows).softmax(1), scores="logit")[0].scores == "logit"
        box, _ = ask(logits, scores="probability")
        assert (box.scores, box.classes) == ("probability", 7)

    def test_later_answers_do_not_change_it(self) -> None:
        box, _ = ask(logits)
        box.function = lambda rows: logits(rows).softmax(1)
        box.answer(ROWS, ACCOUNTS)
        assert box.scores == "logit"

    def test_nan_and_wrong_row_counts_are_left_to_the_oracle(self) -> None:
        _, answer = ask(lambda rows: logits(rows)[:3] * torch.nan)
        assert answer.scores is not None
        assert answer.scores.shape == (3, 7)
        assert answer.scores.isnan().all()

    def test_an_object_with_logits(self) -> None:
        _, answer = ask(lambda rows: SimpleNamespace(logits=logits(rows), hidden=None))
        assert answer.scores is not None
        torch.testing.assert_close(answer.scores, logits(ROWS))


class TestLabels:
    @pytest.mark.parametrize("convert", [lambda t: t, lambda t: t.int(), lambda t: t.numpy(), lambda t: t.tolist()])
    def test_labels_as_tensor_array_or_list(self, convert: Any) -> None:
        box, answer = ask(lambda rows: convert(logits(rows).argmax(1)))
        assert (box.scores, box.classes, answer.scores) == ("none", None, None)
        assert answer.labels.dtype == torch.int64
        assert answer.labels.tolist() == logits(ROWS).argmax(1).tolist()

    def test_a_numpy_model_is_called_with_a_tensor_that_numpy_takes(self) -> None:
        _, answer = ask(lambda rows: np.asarray(rows).reshape(len(rows), -1) @ WEIGHTS.numpy())
        assert answer.labels.tolist() == logits(ROWS).argmax(1).tolist()

    @pytest.mark.parametrize("kind", [torch.from_numpy, np.asarray])
    def test_a_model_may_write_its_next_answer_where_its_last_one_stands(self, kind: Any) -> None:
        held = np.zeros((len(ROWS), 7), dtype=np.float32)

        def reusing(rows: Tensor) -> Any:
            held[: len(rows)] = logits(rows)
            return kind(held[: len(rows)])

        box, first = ask(reusing)
        box.answer(1 - ROWS, ACCOUNTS)
        torch.testing.assert_close(first.scores, logits(ROWS))

    def test_another_number_of_classes_is_an_error(self) -> None:
        box = CallableBox(lambda rows: logits(rows)[:, : len(rows)])
        box.answer(ROWS, ACCOUNTS)
        with pytest.raises(ModelError, match="returned scores of 3 classes, and has 5"):
            box.answer(ROWS[:3], ACCOUNTS[:3])

    def test_changing_its_mind_is_an_error(self) -> None:
        box, _ = ask(logits)
        box.function = lambda rows: logits(rows).argmax(1)
        with pytest.raises(ModelError, match="returned labels where scores were due"):
            box.answer(ROWS, ACCOUNTS)
        with pytest.raises(ModelError, match="returned scores where labels were due"):
            ask(logits, scores="none")


@pytest.mark.parametrize(
    ("returned", "what"),
    [
        (torch.rand(3, 1), r"float32 \[3, 1\]"),
        (torch.rand(7), r"float32 \[7\]"),
        (torch.rand(()), r"float32 \[\]"),
        (torch.rand(5, 7, 1), r"float32 \[5, 7, 1\]"),
        (torch.ones(5, 7, dtype=torch.long), r"int64 \[5, 7\]"),
        (torch.ones(5, dtype=torch.bool), r"bool \[5\]"),
        (torch.ones(5, 7, dtype=torch.complex64), r"complex64 \[5, 7\]"),
        (np.array(3), r"int64 \[\]"),
        (None, "NoneType"),
        ("cat", "str"),
        ((torch.rand(5, 7), torch.rand(5, 3)), "tuple"),
    ],
)
def test_anything_else_is_one_clear_line(returned: Any, what: str) -> None:
    with pytest.raises(ModelError, match=f"returned {what} for 5 rows: it must return float scores") as caught:
        ask(lambda rows: returned)
    assert "\n" not in str(caught.value)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Flatten(), nn.Linear(16, 7))


class TestModules:
    def test_is_asked_in_evaluation_mode_and_put_back_as_it_was(self) -> None:
        model = network()
        model[1].eval()  # its owner has frozen this one
        flags = [part.training for part in model.modules()]
        before = {name: value.clone() for name, value in model.state_dict().items()}
        answer = ModuleBox(model).answer(ROWS, ACCOUNTS)
        assert [part.training for part in model.modules()] == flags
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        with torch.no_grad():
            assert answer.scores is not None
            torch.testing.assert_close(answer.scores, model.eval()(ROWS))

    def test_is_put_back_after_a_failure(self) -> None:
        model = network()
        with pytest.raises(RuntimeError):
            ModuleBox(model).answer(ROWS[:, :2], ACCOUNTS)
        assert all(part.training for part in model.modules())

    def test_a_model_in_evaluation_mode_keeps_the_dropout_that_its_owner_left_on(self) -> None:
        model = network().eval()
        model[2].train()
        first, second = (ModuleBox(model).answer(ROWS, ACCOUNTS).scores for _ in range(2))
        assert first is not None
        assert second is not None
        assert not torch.equal(first, second)

    def test_answers_hold_no_graph_and_are_no_inference_tensors(self) -> None:
        scores = ModuleBox(network()).answer(ROWS, ACCOUNTS).scores
        assert scores is not None
        assert not scores.requires_grad
        assert not scores.is_inference()
        assert torch.is_grad_enabled()

    @pytest.mark.parametrize("holds", [1, 3, 5])
    def test_a_pass_that_the_device_cannot_hold_is_answered_in_parts(self, holds: int) -> None:
        class Small(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.held: list[int] = []

            def forward(self, rows: Tensor) -> Tensor:
                if len(rows) > holds:
                    raise torch.OutOfMemoryError("planted")
                self.held.append(len(rows))
                return logits(rows)

        rows = torch.cat([ROWS, ROWS, ROWS[:1]])
        box = ModuleBox(Small())
        for _ in range(2):
            answer = box.answer(rows, torch.zeros(11, dtype=torch.long))
            torch.testing.assert_close(answer.scores, logits(rows))
        assert sum(box.module.held) == 22

    def test_a_row_that_the_device_cannot_hold_is_one_clear_line(self) -> None:
        class Smaller(nn.Module):
            def forward(self, rows: Tensor) -> Tensor:
                raise torch.OutOfMemoryError("planted")

        with pytest.raises(ModelError, match="cannot hold one row"):
            ModuleBox(Smaller()).answer(ROWS, ACCOUNTS)

    def test_describe(self) -> None:
        model, same, other = network(), network(), network()
        with torch.no_grad():
            other[1].running_var += 1e-3
        said = [ModuleBox(m).describe() for m in (model, same, other)]
        assert said[0] == said[1]
        assert said[0]["weights_sha256"] != said[2]["weights_sha256"]
        assert said[0] | {"weights_sha256": ""} == {
            "name": "Sequential",
            "stochastic": False,
            "kind": "module",
            "weights_sha256": "",
            "parameters": 3 * 4 * 9 + 4 + 4 + 4 + 16 * 7 + 7,
        }

    def test_its_card_speaks_for_it(self) -> None:
        model = network()
        card: Any = SimpleNamespace(name="n", input_shape=(3, 4, 4), classes=7, scores="logit", sha256="ab")
        model.card = card
        box = ModuleBox(model)
        assert (box.name, box.input_shape, box.classes, box.scores) == ("n", (3, 4, 4), 7, "logit")
        assert box.describe()["weights_sha256"] == "ab"

    def test_a_module_without_tensors_stands_on_the_cpu(self) -> None:
        assert as_black_box(nn.Flatten()).device == torch.device("cpu")


class TestAsBlackBox:
    def test_a_black_box_is_its_own(self) -> None:
        box = CallableBox(logits)
        assert as_black_box(box) is box

    def test_modules_and_callables(self) -> None:
        assert isinstance(as_black_box(network()), ModuleBox)
        box = as_black_box(logits)
        assert isinstance(box, CallableBox)
        assert box.describe() == {"name": "logits", "stochastic": False, "kind": "callable"}

    def test_names(self) -> None:
        box = as_black_box("digits-cnn", "cpu")
        assert (box.name, box.input_shape, box.classes, box.scores) == ("digits-cnn", (1, 8, 8), 10, "logit")

    @pytest.mark.parametrize(
        ("model", "message"),
        [
            ("digits-cmm", "unknown model 'digits-cmm': did you mean digits-cnn"),
            ("ftp://host/model", "unknown model"),
            (nn.Flatten, "model is the class Flatten: pass an instance"),
            (7, "must be a name, a torch module or a callable, not int"),
        ],
    )
    def test_what_is_no_model(self, model: Any, message: str) -> None:
        with pytest.raises(InputError, match=message):
            as_black_box(model)

    @pytest.mark.parametrize("device", ["warp", "cuda:99"])
    def test_a_device_that_is_not_there(self, device: str) -> None:
        for model in (network(), logits):
            with pytest.raises(InputError, match=f"device '{device}' is not to be had") as caught:
                as_black_box(model, device)
            assert "\n" not in str(caught.value)
