"""Places in networks: by name and by role, on nine architectures, and what passes there."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from robustbox.defenses.layers import blocks, find, intercepted, stages
from robustbox.errors import InputError
from robustbox.models.networks import CifarResNet, DigitsCNN, seeded


def mlp() -> nn.Module:
    layers = [nn.Flatten(), nn.Linear(48, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 10)]
    return nn.Sequential(*layers)


def vgg() -> nn.Module:
    from timm.models.vgg import VGG

    return VGG([8, "M", 16, "M", 16, 16, "M"], num_classes=10, norm_layer=nn.BatchNorm2d, mlp_ratio=1 / 64)


def resnet() -> nn.Module:
    from timm.models.resnet import BasicBlock, ResNet

    return ResNet(BasicBlock, (1, 1, 1, 1), num_classes=10, channels=(8, 8, 16, 16), stem_width=8)


def mixer() -> nn.Module:
    from timm.models.mlp_mixer import MlpMixer

    network = MlpMixer(num_classes=10, img_size=32, patch_size=8, num_blocks=3, embed_dim=32)
    nn.init.normal_(network.head.weight)  # timm starts it at zero
    return network


def timm(name: str, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import timm

        return timm.create_model(name, pretrained=False, num_classes=10, **options)

    return build


_SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2}
NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, int, int], int, int]] = {
    # name: (how to build it, shape of its images, its stages, its blocks)
    "cifar-resnet20": (CifarResNet, (3, 32, 32), 3, 9),
    "digits-cnn": (DigitsCNN, (1, 8, 8), 1, 1),
    "mlp": (mlp, (3, 4, 4), 2, 2),
    "resnet": (resnet, (3, 32, 32), 4, 4),
    "vgg-bn": (vgg, (3, 32, 32), 3, 3),
    "vit": (timm("vit_tiny_patch16_224", **_SMALL), (3, 32, 32), 3, 3),
    "deit": (timm("deit_tiny_distilled_patch16_224", **_SMALL), (3, 32, 32), 3, 3),
    "swin": (
        timm("swin_tiny_patch4_window7_224", img_size=32, window_size=4, embed_dim=16, depths=(1, 2), num_heads=(2, 4)),
        (3, 32, 32),
        2,
        3,
    ),
    "mobilenet": (timm("mobilenetv3_small_050"), (3, 32, 32), 6, 12),
    "efficientnet": (timm("tf_efficientnet_lite0"), (3, 32, 32), 7, 16),
    "mixer": (mixer, (3, 32, 32), 3, 3),
}


@cache
def built(name: str) -> tuple[nn.Module, Tensor]:
    with seeded():
        network = NETWORKS[name][0]().eval()
    shape = NETWORKS[name][1]
    return network, torch.rand(4, *shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", NETWORKS)
def test_every_role_is_found_and_passed_row_by_row_on_every_architecture(name: str) -> None:
    network, x = built(name)
    _, _, n_stages, n_blocks = NETWORKS[name]
    assert (len(stages(network)), len(blocks(network))) == (n_stages, n_blocks)
    roles = ["input", "stem", "stage:1", "stage:-1", "block:0", "block:-1", "linear:0", "penultimate", "logits"]
    shapes: dict[str, torch.Size] = {}
    for role in roles:
        (place,) = find(network, [role])

        def see(_: int, h: Tensor, role: str = role) -> None:
            shapes.setdefault(role, h.shape)

        with torch.no_grad(), intercepted([place], see):
            network(x)
    assert list(shapes) == roles
    assert all(shape[0] % len(x) == 0 for shape in shapes.values())
    assert shapes["logits"] == (4, 10)
    assert shapes["input"][1:].numel() == x[0].numel()
    assert len(find(network, ["stage:*"])) == n_stages
    assert len(find(network, ["block:*"])) == n_blocks


def test_a_resnets_places_are_those_of_the_paper() -> None:
    """After the stem, after the first three layers, never after the fourth (unless it is asked for)."""
    network, _ = built("resnet")
    names = [place.name for place in find(network, ["stem", "stage:0", "stage:1", "stage:3", "block:1", "layer2"])]
    assert names == ["pre:layer1", "post:layer1", "post:layer3", "pre:layer2.0", "post:layer2"]
    vit, _ = built("vit")
    assert [place.name for place in find(vit, ["block:0", "block:2"])] == ["pre:blocks.0", "pre:blocks.2"]
    conv, _ = built("vgg-bn")
    assert [place.name for place in find(conv, ["conv:0", "conv:2"])] == ["pre:features.0", "pre:features.8"]


def test_sides_may_be_stated() -> None:
    network, _ = built("cifar-resnet20")
    assert [p.name for p in find(network, ["pre:layer2", "post:block:0", "pre:stage:-1"])] == [
        "pre:layer2",
        "post:layer1.0",
        "pre:layer3",
    ]


@pytest.mark.parametrize("text", ["stage:4", "stage:-4", "layer9", "block:", "stage:x", "", "pre:"])
def test_what_is_not_there_is_refused_with_what_is(text: str) -> None:
    with pytest.raises(InputError, match=r"stage:1 to 3, block:0 to 8.*layer1"):
        find(built("cifar-resnet20")[0], [text])


def test_a_network_without_layers() -> None:
    with pytest.raises(InputError, match="stem"):
        find(nn.Flatten(), ["stem"])
    assert find(nn.Flatten(), ["logits"])[0].name == "post:"


class Odd(nn.Module):
    """Passes a dict and a keyword between its parts."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.unused = Pair(), Sum(), nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        total: Tensor = self.second(parts=self.first(x))
        return total


class Pair(nn.Module):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"index": torch.arange(len(x)), "h": x.flatten(1), "other": -x.flatten(1)}


class Sum(nn.Module):
    def forward(self, parts: dict[str, Tensor]) -> Tensor:
        return parts["h"] + 0 * parts["other"]


def test_the_first_floating_tensor_of_a_structure_is_edited_and_nothing_else() -> None:
    network, x = Odd(), torch.rand(3, 1, 2, 2)
    with intercepted(find(network, ["first"]), lambda _, h: h + 1):
        assert torch.equal(network(x), x.flatten(1) + 1)
    with intercepted(find(network, ["pre:second"]), lambda _, h: 2 * h):
        assert torch.equal(network(x), 2 * x.flatten(1))
    assert torch.equal(network(x), x.flatten(1))
    assert not network.first._forward_hooks


def test_hooks_act_in_their_own_thread_only_and_are_gone_afterwards() -> None:
    network, x = built("mlp")
    clean = network(x)
    elsewhere: list[Tensor] = []
    with intercepted(find(network, ["stage:1"]), lambda _, h: h + 1):
        thread = threading.Thread(target=lambda: elsewhere.append(network(x)))
        thread.start()
        thread.join()
        assert not torch.equal(network(x), clean)
    assert torch.equal(elsewhere[0], clean)
    assert torch.equal(network(x), clean)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())


def test_hooks_are_gone_after_an_error_too() -> None:
    network, x = built("mlp")
    with pytest.raises(RuntimeError, match="stop"), intercepted(find(network, ["stage:1", "penultimate"]), _stop):
        network(x)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())


def _stop(_: int, h: Tensor) -> Tensor:
    raise RuntimeError("stop")
