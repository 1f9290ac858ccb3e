"""`timm:NAME` and `torchvision:NAME`: normalised as the library says, random weights only when asked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import robustbox as rb
from robustbox.errors import InputError

ROWS = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Empty caches, and libraries that may not reach the network."""

    def unreachable(*_: Any, **__: Any) -> None:
        raise OSError("no network\nand a second line")

    monkeypatch.setattr("timm.models._hub.hf_hub_download", unreachable)
    monkeypatch.setattr("torch.hub.urlopen", unreachable)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))


def refused(name: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        rb.load_model(name)
    assert "\n" not in str(caught.value)


class TestRandomWeights:
    @pytest.mark.parametrize(
        ("name", "mean", "std", "size"),
        [
            ("timm:test_vit", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), 160),
            ("torchvision:squeezenet1_1", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), 224),
        ],
    )
    def test_normalise_as_the_library_states(self, name: str, mean: Any, std: Any, size: int) -> None:
        state = torch.get_rng_state()
        model, again = rb.load_model(f"{name}?weights=random"), rb.load_model(f"{name}?weights=random")
        assert torch.equal(torch.get_rng_state(), state)
        assert (model.card.mean, model.card.std, model.card.input_shape) == (mean, std, (3, size, size))
        assert (model.card.classes, model.card.source) == (1000, "random weights, seed 0")
        assert not any(part.training for part in model.modules())
        rows = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            normal = (rows - torch.tensor(mean).view(-1, 1, 1)) / torch.tensor(std).view(-1, 1, 1)
            torch.testing.assert_close(model(rows), model[1](normal))
            torch.testing.assert_close(model(rows), again(rows))

    def test_describe_hashes_the_weights(self) -> None:
        from robustbox.boxes import as_black_box

        box = as_black_box("torchvision:squeezenet1_1?weights=random", "cpu")
        assert box.name == "torchvision:squeezenet1_1?weights=random"
        assert len(str(box.describe()["weights_sha256"])) == 64


@pytest.mark.usefixtures("no_network")
class TestPretrained:
    @pytest.mark.parametrize(
        "name", ["timm:resnet10t", "torchvision:resnet18", "torchvision:resnet50?weights=IMAGENET1K_V1"]
    )
    def test_a_failed_download_is_one_line_that_says_what_to_do(self, name: str) -> None:
        library, _, model = name.partition("?")[0].partition(":")
        refused(
            name, rf"{library} cannot load the weights of {model} \(.*\): connect .* {library}:{model}\?weights=random"
        )

    def test_a_model_without_weights_does_not_come_with_random_ones(self) -> None:
        refused("timm:coatnet_0_224", "timm has no weights for coatnet_0_224: .*weights=random")

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("timm:resnet_18", "unknown model of timm 'resnet_18': did you mean"),
            ("timm:resnet18?weights=best", "weights can only be random"),
            ("timm:resnet18?weight=random", "unknown option of resnet18 'weight': did you mean weights"),
            ("torchvision:resnet_18", "unknown model of torchvision 'resnet_18': did you mean resnet"),
            ("torchvision:fcn_resnet50", "unknown model of torchvision"),
            ("timm:zzz", r"unknown model of timm 'zzz': known: (\w+, ){39}\w+ and \d+ more$"),
            ("torchvision:resnet50?weights=IMAGENET1K_V3", "did you mean IMAGENET1K_V"),
        ],
    )
    def test_unknown_names(self, name: str, message: str) -> None:
        refused(name, message)
