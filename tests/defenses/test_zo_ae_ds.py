"""ZO-AE-DS: the chain rule through a black box, the books, what is trained and what is frozen, resumption, and the order
undefended < ZO-DS < ZO-AE-DS with its control."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import robustbox as rb
from robustbox.boxes import ModuleBox
from robustbox.defense_file import read_defense, read_record, write_defense
from robustbox.defenses import zo_checkpoint, zo_training
from robustbox.defenses.zo_ae_ds import ZOAEDS
from robustbox.defenses.zo_estimators import CGE
from robustbox.defenses.zo_networks import ARCHITECTURES, AutoEncoder, DnCNN, Guard
from robustbox.defenses.zo_stage2 import Stage2
from robustbox.defenses.zo_training import ZOTrainer
from robustbox.errors import InputError, StorageError
from robustbox.oracle import Oracle
from robustbox.protocol import Answer, BlackBox
from robustbox.trainer import Workshop


class Counting(ModuleBox):
    """Counts the rows that the module sees, and stops the run after some."""

    def __init__(self, module: nn.Module, after: int | None = None) -> None:
        super().__init__(module)
        self.rows, self.after = 0, after

    def answer(self, rows: Tensor, accounts: Tensor) -> Answer:
        assert not rows.requires_grad
        self.rows += len(rows)
        if self.after is not None and self.rows > self.after:
            raise KeyboardInterrupt
        return super().answer(rows, accounts)


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, list[int]]:
    images, labels = rb.load_data("digits:train")[:2]
    return images[:400], labels[:400].tolist()


def test_an_auto_encoder_of_dark_images_learns(real_data: Path) -> None:
    """From grey, the first steps would drive all to black, and the ReLUs of the paper's latent would die on the way."""
    images = torch.from_numpy(np.load(real_data / "mnist_test_dev.npz")["images"][:1500]).float()[:, None] / 255
    box = ModuleBox(nn.Sequential(nn.Flatten(), nn.Linear(784, 2)))
    options: dict[str, Any] = {"variant": "ae-only", "autoencoder": "mnist-192", "ae_epochs": 4}
    _, shop = trained(box, (images, [0] * 1500), **options)
    assert shop.record["ae_mse"] < 0.5 * float(images.var(dim=0).mean())
    assert shop.oracle.ledger == {}


SMALL: dict[str, Any] = {"ae_epochs": 2, "depth": 3, "width": 8, "batch": 20}


def trained(
    box: BlackBox, data: tuple[Tensor, list[int]], path: Path | None = None, seed: int = 0, **options: Any
) -> tuple[ZOAEDS, Workshop]:
    shop = Workshop(Oracle(box, "score"), *data, seed=seed, checkpoint=path)
    defense = ZOTrainer(**{**SMALL, **options}).train(shop)
    assert isinstance(defense, ZOAEDS)
    return defense, shop


@pytest.mark.parametrize("name", list(ARCHITECTURES))
def test_decoders_mirror_encoders(name: str) -> None:
    architecture = ARCHITECTURES[name]
    network = AutoEncoder(architecture)
    images = torch.rand(2, *architecture.shape)
    assert network.encoder(images)[0].numel() == architecture.latent == int(name.rpartition("-")[2])
    assert network(images).shape == images.shape
    assert bool(((network(images) >= 0) & (network(images) <= 1)).all())


def test_an_untrained_denoiser_is_the_identity() -> None:
    images = torch.rand(3, 3, 16, 16)
    assert torch.equal(DnCNN(3, 5, 8)(images), images)
    assert sum(isinstance(layer, nn.Conv2d) for layer in DnCNN(3).noise) == 17


def test_one_backward_pass_is_the_chain_rule() -> None:
    """The gradient of the weights by CGE and the surrogate against that of autograd: equal direction and equal length."""
    torch.manual_seed(0)
    guard, model = Guard(1, 3, 8, "digits-16").double(), nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).double()
    nn.init.normal_(guard.denoiser.noise[-1].weight, std=0.1)  # type: ignore[index, union-attr]
    images, goal = torch.rand(8, 1, 8, 8).double(), torch.arange(8)
    weights = [*guard.denoiser.parameters(), *guard.encoder.parameters()]
    z = guard.latent(images)
    exact = torch.autograd.grad(F.cross_entropy(model(guard.decoder(z)), goal), weights, retain_graph=True)

    def loss(points: Tensor) -> Tensor:
        with torch.no_grad():
            scores = model(guard.decoder(points.reshape(-1, *z.shape[1:])))
        return F.cross_entropy(scores, goal.repeat_interleave(points.shape[1]), reduction="none").view(8, -1)

    a, _ = CGE(mu=1e-3).estimate(loss, z.detach().flatten(1), torch.Generator())
    estimated = torch.autograd.grad((z.flatten(1) * a).sum(1).mean(), weights)
    one, other = (torch.cat([part.flatten() for part in parts]) for parts in (exact, estimated))
    assert torch.cosine_similarity(one, other, 0) > 0.999
    assert 0.99 < one.norm() / other.norm() < 1.01


@pytest.mark.parametrize(
    ("options", "an_image"),
    [
        ({"estimator": "cge"}, 1 + 2 * 16),
        ({"estimator": "cge-forward"}, 1 + 17),
        ({"estimator": "rge", "q": 5}, 1 + 1 + 5),
        ({"estimator": "two-point", "q": 5, "kick": 0.01}, 1 + 10),
        ({"variant": "ds", "estimator": "cge"}, 1 + 128),
        ({"estimator": "rge", "q": 5, "truth": True}, 6),
        ({"order": "first"}, 2),
    ],
)
def test_the_books_are_exact(options: dict[str, Any], an_image: int, digits: tuple[Tensor, list[int]]) -> None:
    """The `train` ledger is steps times batch times the stated rows; the box sees them all and is left as it was."""
    box = Counting(rb.load_model("digits-cnn"))
    before = {name: value.clone() for name, value in box.module.state_dict().items()}
    rows = 20 * an_image * 3 + 7  # three steps, and not enough for a fourth
    _, shop = trained(box, digits, rows=rows, **options)
    assert shop.oracle.ledger["train"] == 20 * an_image * 3
    assert shop.record["steps"] == 3
    unseen = 3 * 20 if options.get("order") == "first" else 0  # through the module itself
    assert box.rows == sum(shop.oracle.ledger.values()) - unseen
    assert all(parameter.grad is None for parameter in box.module.parameters())
    assert all(torch.equal(value, before[name]) for name, value in box.module.state_dict().items())


def test_the_control_costs_nothing(digits: tuple[Tensor, list[int]]) -> None:
    box = Counting(rb.load_model("digits-cnn"))
    control, shop = trained(box, digits, variant="ae-only")
    assert box.rows == 0 == sum(shop.oracle.ledger.values())
    assert control.guard is not None
    assert torch.equal(control.guard.denoiser(digits[0][:9]), digits[0][:9])


def test_the_other_control_denoises_and_costs_nothing(digits: tuple[Tensor, list[int]]) -> None:
    box = Counting(rb.load_model("digits-cnn"))
    control, shop = trained(box, digits, variant="ds-only", pretrain=5)
    assert box.rows == 0 == sum(shop.oracle.ledger.values())
    assert control.guard is not None
    clean = rb.load_data("digits")[0][:50]
    noisy = clean + 0.25 * torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    assert (control.guard(noisy) - clean).square().mean() < 0.5 * (noisy - clean).square().mean()


@pytest.mark.parametrize(
    ("options", "moved"),
    [
        ({}, {"denoiser", "encoder"}),
        ({"parts": "denoiser"}, {"denoiser"}),
        ({"order": "first", "parts": "whole-plus"}, {"denoiser", "encoder", "decoder"}),
    ],
)
def test_stage_2_moves_what_it_should(
    options: dict[str, Any], moved: set[str], digits: tuple[Tensor, list[int]]
) -> None:
    """The decoder is a part of the black box: its bytes stay."""
    torch.manual_seed(0)
    recipe, guard = ZOTrainer(**SMALL, **options), Guard(1, 3, 8, "digits-16")
    shop = Workshop(Oracle(ModuleBox(rb.load_model("digits-cnn")), "score"), *digits)
    stage = Stage2(recipe, guard, shop, torch.arange(300), torch.arange(300, 400))
    before = {name: value.clone() for name, value in guard.state_dict().items()}
    for _ in range(2):
        stage._step()
    after = guard.state_dict()
    assert {name.partition(".")[0] for name in before if not torch.equal(before[name], after[name])} == moved


def test_a_killed_training_goes_on_to_the_same_weights(
    tmp_path: Path, digits: tuple[Tensor, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(zo_checkpoint, "_SECONDS", 0.0)
    options: dict[str, Any] = {"rows": 20 * 33 * 8}
    whole, shop = trained(ModuleBox(rb.load_model("digits-cnn")), digits, **options)
    path = tmp_path / "d.checkpoint"
    box = Counting(rb.load_model("digits-cnn"), after=20 * 33 * 4)
    with pytest.raises(KeyboardInterrupt):
        trained(box, digits, path, **options)
    with pytest.raises(InputError, match="another training"):
        trained(box, digits, path, **{**options, "sigma": 0.3})
    again = Counting(rb.load_model("digits-cnn"))
    resumed, books = trained(again, digits, path, **options)
    assert all(torch.equal(value, resumed.tensors()[name]) for name, value in whole.tensors().items())
    assert again.rows < sum(shop.oracle.ledger.values())
    repeated = books.record["repeated_rows"]
    assert repeated == 20 * 33  # the step that was cut short counts whole
    assert books.oracle.ledger["train"] == shop.oracle.ledger["train"] + repeated


def test_a_training_whose_file_could_not_be_written_is_not_taken_again(
    tmp_path: Path, digits: tuple[Tensor, list[int]]
) -> None:
    """Its last state stays until the defense is written, and asks no row."""
    path, options = tmp_path / "d.checkpoint", {"rows": 20 * 33 * 3}
    whole, shop = trained(ModuleBox(rb.load_model("digits-cnn")), digits, path, **options)
    again = Counting(rb.load_model("digits-cnn"))
    read, books = trained(again, digits, path, **options)
    assert again.rows == 0
    assert (books.oracle.ledger, books.record) == (shop.oracle.ledger, shop.record)
    assert all(torch.equal(value, read.tensors()[name]) for name, value in whole.tensors().items())


def test_a_checkpoint_that_cannot_be_written_or_read_is_one_line(
    tmp_path: Path, digits: tuple[Tensor, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(zo_checkpoint, "_SECONDS", 0.0)
    box, options = ModuleBox(rb.load_model("digits-cnn")), {"rows": 20 * 33 * 3}
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="cannot be written: Not a directory"):
        trained(box, digits, tmp_path / "file" / "d.checkpoint", **options)
    (rows := tmp_path / "d.checkpoint.rows").write_text("0 660\n1 6")  # a full disk cut it short

    def full(path: Path, content: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(zo_checkpoint, "replace_file", full)
        with pytest.raises(StorageError, match="No space left on device; make room"):
            trained(box, digits, tmp_path / "d.checkpoint", **options)
    assert rows.read_text() == "0 660\n0 660\n"
    (tmp_path / "d.checkpoint").write_bytes(b"half")
    with pytest.raises(InputError, match="cannot be read: remove it"):
        trained(box, digits, tmp_path / "d.checkpoint", **options)


def test_a_defense_goes_through_its_file(tmp_path: Path, digits: tuple[Tensor, list[int]]) -> None:
    box = ModuleBox(rb.load_model("digits-cnn"))
    defense, shop = trained(box, digits, rows=20 * 129 * 2, variant="ds")
    write_defense(path := tmp_path / "zo.safetensors", defense, shop.record)
    read = read_defense(path)
    rows, accounts = digits[0][:9], torch.arange(9)
    ours, theirs = (each.wrap(box, 0).answer(rows, accounts).scores for each in (defense, read))
    assert ours is not None
    assert theirs is not None
    assert torch.equal(ours, theirs)
    assert read_record(path)["steps"] == 2
    result = rb.run_attack(box, digits[0][:9], digits[1][:9], attack="random", budget=10, defense=str(path))
    assert result.meta["defense"][0]["options"] == defense.options()
    with pytest.raises(InputError, match="must be trained"):
        rb.run_attack(box, digits[0][:3], digits[1][:3], defense="zo-ae-ds")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"rows": 100}, "do not pay for one step"),
        ({"autoencoder": "cifar-192"}, "no auto-encoder for images"),
        ({"parts": "whole-plus"}, "needs order=first"),
        ({"batch": 300}, "two batches"),
        ({"variant": "ds-only"}, "by --pretrain"),
        ({"rows": -10}, "rows of zo-ae-ds must be a whole number of at least 1, not -10"),
        ({"batch": 0}, "batch of zo-ae-ds must be a whole number of at least 1"),
        ({"estimator": "rge", "q": 0}, "q of zo-ae-ds must be a whole number of at least 1"),
        ({"ae_epochs": -1}, "ae_epochs of zo-ae-ds must be a whole number of at least 0"),
        ({"pretrain": -1}, "pretrain of zo-ae-ds must be a whole number of at least 0"),
        ({"depth": 0}, "depth of zo-ae-ds must be a whole number of at least 2"),
        ({"width": 0}, "width of zo-ae-ds must be a whole number of at least 1"),
        ({"rate": -1.0}, "rate of zo-ae-ds must be a positive number"),
        ({"ae_rate": torch.inf}, "ae_rate of zo-ae-ds must be a positive number"),
        ({"mu": 0.0}, "mu of zo-ae-ds must be a positive number"),
        ({"sigma": -1.0}, "sigma of zo-ae-ds must be a finite number of at least 0"),
        ({"kick": -1.0}, "kick of zo-ae-ds must be a finite number of at least 0"),
        ({"lambda_mse": torch.nan}, "lambda_mse of zo-ae-ds must be a number"),
        ({"weight_decay": -1.0}, "weight_decay of zo-ae-ds must be a finite number of at least 0"),
        ({"estimator": "rgee"}, "estimator of zo-ae-ds must be"),
    ],
)
def test_what_cannot_be_trained_is_refused_without_a_row(
    options: dict[str, Any], says: str, digits: tuple[Tensor, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(zo_training, "Guard", lambda **_: pytest.fail("a network was built"))
    box = Counting(rb.load_model("digits-cnn"))
    with pytest.raises(InputError, match=says):
        trained(box, digits, **options)
    assert box.rows == 0


def test_first_order_needs_a_module(digits: tuple[Tensor, list[int]]) -> None:
    with pytest.raises(InputError, match="torch module"):
        trained(rb.boxes.as_black_box(lambda rows: rows.flatten(1)[:, :10]), digits, order="first")  # type: ignore[attr-defined]


def test_first_order_through_one_output_is_that_through_two(digits: tuple[Tensor, list[int]]) -> None:
    torch.manual_seed(0)
    body, last = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU()), nn.Linear(8, 1)
    both = nn.Linear(8, 2)
    with torch.no_grad():
        both.weight.copy_(torch.cat((-last.weight, last.weight)) / 2)
        both.bias.copy_(torch.cat((-last.bias, last.bias)) / 2)
    found = [
        trained(ModuleBox(nn.Sequential(body, head), scores="logit"), digits, rows=20 * 2 * 3, order="first")[0]
        for head in (last, both)
    ]
    for name, value in found[0].tensors().items():
        torch.testing.assert_close(value, found[1].tensors()[name], msg=name)


def _fragile(images: Tensor, labels: Tensor) -> nn.Module:
    """A BatchNorm CNN that is right on clean digits of MNIST, and lost under noise that it never saw."""
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(1, 8, 5, 2, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(8, 16, 3, 1, 1), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 49, 10)),
    )
    optimizer, order = torch.optim.Adam(model.parameters(), 2e-3), torch.Generator().manual_seed(0)
    for epoch in range(4):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * (1 - epoch / 4)
        for part in torch.randperm(len(images), generator=order).split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(images[part]), labels[part]).backward()
            optimizer.step()
    return model.eval()


@pytest.mark.parametrize("seed", [0, 1])
def test_on_a_fragile_model_the_order_is_the_papers(real_data: Path, seed: int) -> None:
    """At equal rows, under noise of sigma 0.5: undefended < ZO-DS < ZO-AE-DS, and the control < ZO-AE-DS."""
    data = np.load(real_data / "mnist_test_dev.npz")
    images, labels = torch.from_numpy(data["images"]).float()[:, None] / 255, torch.from_numpy(data["labels"]).long()
    own, truth, fresh = images[:2500], labels[:2500], images[8000:]
    box = ModuleBox(_fragile(own, truth))
    draws = torch.randn(3, *fresh.shape, generator=torch.Generator().manual_seed(0))
    noisy = [fresh + 0.5 * noise for noise in draws]

    def accuracy(behind: BlackBox, batches: list[Tensor] = noisy) -> float:
        accounts = torch.arange(len(fresh))
        right = [behind.answer(rows, accounts).labels == labels[8000:] for rows in batches]
        return float(torch.stack(right).double().mean())

    assert accuracy(box, [fresh]) > 0.95
    undefended = accuracy(box)
    assert undefended < 0.6
    found = {}
    common: dict[str, Any] = {"sigma": 0.5, "depth": 3, "width": 8, "ae_epochs": 8, "rows": 80_000}
    for name, options in {
        "ae-only": {"variant": "ae-only"},
        "ds": {"variant": "ds", "estimator": "rge", "q": 48, "batch": 64},
        "ae-ds": {"estimator": "cge", "batch": 16, "rate": 2e-3},
    }.items():
        extra = {} if name == "ds" else {"autoencoder": "mnist-32"}
        defense, _ = trained(box, (own, truth.tolist()), seed=seed, **{**common, **extra, **options})
        found[name] = accuracy(defense.wrap(box, 0))
    assert undefended + 0.1 < found["ds"] < found["ae-ds"] - 0.1
    assert found["ae-only"] > 0.85  # a control that is no straw man
    assert found["ae-only"] + 0.015 < found["ae-ds"]
