"""`python -m robustbox.defend` and the files that it writes: a trainer that learns a planted number through the oracle."""

from __future__ import annotations

import errno
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any, ClassVar, Self

import pytest
import torch
from torch import Tensor, nn

import robustbox as rb
from robustbox import defense_file, registry
from robustbox.attack import main as attack
from robustbox.defend import main
from robustbox.defense_file import read_defense, read_record
from robustbox.errors import InputError
from robustbox.protocol import Answer, BlackBox, Defense
from robustbox.trainer import Trainer, Workshop


class Brightened(BlackBox):
    """A black box that sees rows with a learnt image added."""

    def __init__(self, inner: BlackBox, light: Tensor) -> None:
        self.inner: BlackBox = inner
        self.device, self.classes, self.scores, self.input_shape = inner.device, inner.classes, inner.scores, None
        self.light = light

    def answer(self, rows: Tensor, accounts: Tensor) -> Answer:
        assert self.inner is not None
        return self.inner.answer((rows + self.light).clamp(0, 1), accounts)


@dataclass(frozen=True)
class Brighten(Defense):
    """Adds an image that it learnt, `gain` times."""

    name: ClassVar[str] = "brighten"

    light: Tensor
    gain: float = 1.0

    def options(self) -> dict[str, object]:
        return {"gain": self.gain}

    def tensors(self) -> dict[str, Tensor]:
        return {"light": self.light}

    @classmethod
    def from_tensors(cls, options: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Self:
        return cls(tensors["light"], **options)

    def wrap(self, box: BlackBox, seed: int) -> BlackBox:
        return Brightened(box, self.gain * self.light)


@dataclass(frozen=True)
class Brightener(Trainer):
    """Learns the mean of its images.

    Args:
        gain: how much of it is added.
        twice: ask every image twice.
    """

    name: ClassVar[str] = "brightener"

    gain: float = 0.5
    twice: bool = False

    def train(self, shop: Workshop) -> Defense:
        answer = shop.ask(shop.images)
        assert answer.scores is not None
        if self.twice:
            shop.ask(shop.images)
        shop.record["right"] = int((answer.labels == torch.tensor(shop.labels)).sum())
        defense = Brighten(shop.images.mean(dim=0), self.gain)
        shop.ask(shop.images[:5], "verify", defense)
        return defense


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    known = registry._entries

    def entries(group: str) -> dict[str, EntryPoint]:
        own = {"robustbox.defenses": Brighten, "robustbox.trainers": Brightener}
        if group not in own:
            return known(group)
        kind = own[group]
        found = EntryPoint(kind.name, f"{__name__}:{kind.__name__}", group)
        monkeypatch.setattr(EntryPoint, "load", lambda entry: own[group] if entry is found else load(entry))
        return known(group) | {kind.name: found}

    load = EntryPoint.load
    monkeypatch.setattr(registry, "_entries", entries)


def test_a_defense_is_trained_written_read_and_attacked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "d.safetensors"
    words = ["brightener", "--model", "digits-cnn", "--data", "digits:train", "--images", "40", "--out", str(path)]
    assert main([*words, "--gain", "0.25", "--twice"]) == 0
    assert "rows asked: {'train': 80, 'verify': 5}" in capsys.readouterr().out

    images, labels = rb.load_data("digits:train")[:2]
    defense = read_defense(path)
    assert isinstance(defense, Brighten)
    assert defense.gain == 0.25
    assert torch.equal(defense.light, images[:40].mean(dim=0))
    record = read_record(path)
    assert record["ledger"] == {"train": 80, "verify": 5}
    assert record["trainer"] == {"name": "brightener", "options": {"gain": 0.25, "twice": True}}
    module: nn.Module = rb.load_model("digits-cnn")
    assert record["right"] == int((module(images[:40]).argmax(1) == labels[:40]).sum())

    assert main(words) == 2
    assert "exists" in capsys.readouterr().err
    options = ["--model", "digits-cnn", "--attack", "random", "--budget", "20", "--images", "5", "--quiet"]
    assert attack([*options, "--defense", str(path), "--out", str(tmp_path / "run")]) == 0
    result = rb.run_attack("digits-cnn", images[:5], labels[:5], attack="random", budget=20, defense=str(path))
    assert result.meta["defense"] == [{"name": "brighten", "options": {"gain": 0.25}}]
    chain = ["smoothing", str(path)]
    smooth = rb.run_attack(
        *("digits-cnn", images[:2], labels[:2]),
        attack="random",
        budget=20,
        defense=chain,
        defense_options={"n": 3, "alpha": None},
    )
    assert [recipe["name"] for recipe in smooth.meta["defense"]] == ["smoothing", "brighten"]
    assert smooth.meta["defense"][0]["options"]["n"] == 3
    direct = rb.run_attack("digits-cnn", images[:5], labels[:5], attack="random", budget=20, defense=defense)
    assert result.traces == direct.traces


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "name a trainer first"),
        (["brighttener"], "did you mean brightener"),
        (["brightener"], "--data"),
        (["brightener", "--gian", "1"], "--gain"),
        (["brightener", "--data", "digits:tran"], "did you mean train"),
        (["brightener", "--data", "digits", "--out", "d.bin"], "safetensors"),
        (["brightener", "--data", "digits", "--images", "0"], "from 1 to 360"),
    ],
)
def test_bad_commands_are_one_line(words: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*words, *(["--model", "digits-cnn"] if words else [])]) == 2
    told = capsys.readouterr().err
    assert says in told
    assert told.count("\n") == 1


@pytest.mark.parametrize("out", ["/proc/d.safetensors", "{folder}/file/d.safetensors", "{folder}/{long}.safetensors"])
def test_a_file_that_cannot_be_written_is_refused_before_a_row(
    out: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(Brightener, "train", lambda *_: pytest.fail("rows were asked"))
    words = ["brightener", "--model", "digits-cnn", "--data", "digits", "--out"]
    assert main([*words, out.format(folder=tmp_path, long="d" * 250)]) == 2
    told = capsys.readouterr().err
    assert "cannot be written" in told
    assert told.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_disk_that_fills_up_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, content: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(defense_file, "replace_file", full)
    words = ["brightener", "--model", "digits-cnn", "--data", "digits", "--out", str(tmp_path / "d.safetensors")]
    assert main(words) == 2
    told = capsys.readouterr().err
    assert "cannot be written: No space left on device" in told
    assert told.count("\n") == 1


def test_bad_files(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    with pytest.raises(InputError, match="cannot be read"):
        read_defense(tmp_path / "none.safetensors")
    save_file({"light": torch.zeros(1)}, path := tmp_path / "weights.safetensors")
    with pytest.raises(InputError, match="holds no defense"):
        rb.run_attack("digits-cnn", torch.zeros(1, 1, 8, 8), [0], defense=str(path))
    metadata = {"schema": "1", "robustbox_defense": "input-noise", "options": '{"sigma": 0.1}'}
    save_file({"light": torch.zeros(1)}, path, metadata)
    with pytest.raises(InputError, match="no input-noise that"):
        read_defense(path)
    with pytest.raises(InputError, match="options go with the name"):
        rb.run_attack("digits-cnn", torch.zeros(1, 1, 8, 8), [0], defense=str(path), defense_options={"sigma": 1.0})
