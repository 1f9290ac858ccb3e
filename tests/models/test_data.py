"""Data by name: images and labels arrive whole, in order and in [0, 1], or one line says why not."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_digits
from torch import nn

import robustbox as rb
from robustbox.auditing.world import World
from robustbox.boxes import as_black_box
from robustbox.errors import InputError
from robustbox.inputs import resolve_defenses
from robustbox.models.cards import Card, carded
from robustbox.models.data import CIFAR10_CLASSES, digits

RNG = np.random.default_rng(0)
COLOUR: NDArray[np.uint8] = RNG.integers(0, 256, (4, 5, 6, 3), dtype=np.uint8)  # [N,H,W,C]
LABELS = np.array([2, 0, 1, 2])


def refused(name: str, message: str) -> None:
    """Loading the data ends with one line that matches."""
    with pytest.raises(InputError, match=message) as caught:
        rb.load_data(name)
    assert "\n" not in str(caught.value)


class TestDigits:
    def test_train_and_test_part_the_set(self) -> None:
        train, test = digits(train=True), digits()
        assert (len(train.labels), len(test.labels)) == (1437, 360)
        assert torch.bincount(test.labels).sub(36).abs().max() <= 1
        images = torch.cat([train.images, test.images])
        whole = torch.from_numpy(load_digits().images).float()[:, None] / 16
        assert sorted(map(tuple, images.flatten(1).tolist())) == sorted(map(tuple, whole.flatten(1).tolist()))

    def test_the_registered_name_gives_the_test_part(self) -> None:
        data = rb.load_data("digits")
        assert torch.equal(data.images, digits().images)
        assert (data.images.dtype, data.images.shape[1:], data.labels.dtype) == (torch.float32, (1, 8, 8), torch.int64)
        assert (data.name, data.classes) == ("digits", tuple("0123456789"))


class TestFoolbox:
    @pytest.mark.parametrize(
        ("name", "shape"), [("cifar10", (3, 32, 32)), ("mnist", (1, 28, 28)), ("imagenet", (3, 224, 224))]
    )
    def test_twenty_images_with_the_labels_of_their_files(self, name: str, shape: tuple[int, ...]) -> None:
        import foolbox

        data = rb.load_data(f"foolbox:{name}")
        assert data.images.shape == (20, *shape)
        folder = Path(foolbox.__file__).parent / "data"
        for index, (image, label) in enumerate(zip(data.images, data.labels.tolist(), strict=True)):
            (file,) = folder.glob(f"{name}_{index:02d}_{label}.*")
            content = Image.open(file)
            if name == "imagenet":
                content = content.resize((224, 224))
            stored = torch.from_numpy(np.array(content)).reshape(*shape[1:], -1).permute(2, 0, 1)
            torch.testing.assert_close(image, stored / 255, atol=1e-6, rtol=0)
        assert data.classes is not None
        assert len(data.classes) == (1000 if name == "imagenet" else 10)

    def test_the_names_of_the_classes_fit(self) -> None:
        data = rb.load_data("foolbox:imagenet")
        assert data.classes[99] == "goose"
        assert (data.labels == 99).sum() == 1

    def test_an_unknown_set(self) -> None:
        refused("foolbox:cifar", "unknown data set of foolbox 'cifar': did you mean cifar10")


class TestNpz:
    def save(self, folder: Path, **arrays: Any) -> str:
        np.savez(folder / "d.npz", **arrays)
        return f"npz:{folder / 'd.npz'}"

    @pytest.mark.parametrize(
        "images",
        [COLOUR, COLOUR.transpose(0, 3, 1, 2), COLOUR.transpose(0, 3, 1, 2) / np.float32(255), COLOUR / 255.0],
        ids=["uint8 HWC", "uint8 CHW", "float CHW", "float HWC"],
    )
    def test_every_layout_gives_the_same_images(self, images: NDArray[Any], tmp_path: Path) -> None:
        data = rb.load_data(self.save(tmp_path, images=images, labels=LABELS, classes=["a", "b", "c"]))
        torch.testing.assert_close(data.images, torch.from_numpy(COLOUR).permute(0, 3, 1, 2) / 255)
        assert data.images.dtype == torch.float32
        assert data.images.is_contiguous()
        assert data.labels.tolist() == LABELS.tolist()
        assert data.classes == ("a", "b", "c")

    def test_grey(self, tmp_path: Path) -> None:
        data = rb.load_data(self.save(tmp_path, images=COLOUR[..., 0], labels=LABELS))
        torch.testing.assert_close(data.images[:, 0], torch.from_numpy(COLOUR[..., 0]) / 255)
        assert data.classes is None

    def test_where_both_orders_are_possible_the_type_decides(self, tmp_path: Path) -> None:
        images: NDArray[np.uint8] = RNG.integers(0, 256, (4, 3, 5, 3), dtype=np.uint8)
        assert rb.load_data(self.save(tmp_path, images=images, labels=LABELS)).images.shape == (4, 3, 3, 5)
        assert rb.load_data(self.save(tmp_path, images=images / 255, labels=LABELS)).images.shape == (4, 3, 5, 3)

    @pytest.mark.parametrize(
        ("arrays", "message"),
        [
            ({"images": COLOUR}, "lacks the array 'labels'"),
            ({"images": COLOUR, "labels": LABELS[:3]}, r"labels is int64 \[3\]: it must be 4 integers"),
            ({"images": COLOUR, "labels": LABELS / 2}, r"labels is float64 \[4\]"),
            ({"images": COLOUR, "labels": LABELS - 1}, "labels has -1 to 1: classes are numbered 0 or more"),
            ({"images": COLOUR, "labels": LABELS, "classes": ["a", "b"]}, "labels has 0 to 2: .* from 0 to 1"),
            ({"images": COLOUR[:0], "labels": LABELS[:0]}, "holds no images"),
            ({"images": COLOUR.astype(int), "labels": LABELS}, "images is int64: it must be uint8, or float in"),
            ({"images": COLOUR.astype(float), "labels": LABELS}, r"images has values from 0 to 255"),
            ({"images": COLOUR * np.nan, "labels": LABELS}, "images has values from nan to nan"),
            ({"images": COLOUR[..., :2], "labels": LABELS}, r"images is \[4, 5, 6, 2\]"),
            ({"images": COLOUR[0, 0], "labels": LABELS}, r"images is \[6, 3\]"),
        ],
    )
    def test_other_arrays(self, arrays: dict[str, Any], message: str, tmp_path: Path) -> None:
        refused(self.save(tmp_path, **arrays), message)

    def test_pickled_objects_and_damage(self, tmp_path: Path) -> None:
        name = self.save(tmp_path, images=COLOUR.astype(object), labels=LABELS)
        refused(name, "not a sound .npz archive of plain arrays: .*allow_pickle=False")
        name = self.save(tmp_path, images=COLOUR, labels=LABELS)
        content = (tmp_path / "d.npz").read_bytes()
        for damaged in (content[:-1], content[:200], b"", b"\x80\x04N."):
            (tmp_path / "d.npz").write_bytes(damaged)
            refused(name, "not a sound .npz archive")
        refused(f"npz:{tmp_path / 'other.npz'}", "there is no such file")
        np.save(tmp_path / "d.npy", COLOUR)
        refused(f"npz:{tmp_path / 'd.npy'}", "not a sound .npz archive")


class TestFolder:
    def write(self, path: Path, image: NDArray[np.uint8], mode: str | None = None) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image, mode).save(path)

    def test_a_folder_a_class(self, tmp_path: Path) -> None:
        for file, image in zip(("dog/a.png", "cat/b.png", "cat/a.PNG", "emu/x.bmp"), COLOUR, strict=True):
            self.write(tmp_path / file, image)
        (tmp_path / "cat" / "notes.txt").write_text("not an image")
        (tmp_path / ".hidden").mkdir()
        data = rb.load_data(f"folder:{tmp_path}")
        assert data.classes == ("cat", "dog", "emu")
        assert data.labels.tolist() == [0, 0, 1, 2]
        torch.testing.assert_close(data.images, torch.from_numpy(COLOUR[[2, 1, 0, 3]]).permute(0, 3, 1, 2) / 255)

    def test_class_numbers_in_file_names(self, tmp_path: Path) -> None:
        for file, image in zip(
            ("0007_n1_cock.png", "0950_orange.png", "0004_x.png", "readme.png"), COLOUR, strict=True
        ):
            self.write(tmp_path / file, image)
        data = rb.load_data(f"folder:{tmp_path}")
        assert data.labels.tolist() == [4, 7, 950]
        assert data.classes is None
        torch.testing.assert_close(data.images, torch.from_numpy(COLOUR[[2, 0, 1]]).permute(0, 3, 1, 2) / 255)

    def test_folders_named_as_the_models_classes_get_its_numbers(self, tmp_path: Path) -> None:
        """Two classes of CIFAR-10 have no sample; the model's numbers hold all the same, behind defenses too."""
        known = rb.load_data("foolbox:cifar10")
        for i, (image, label) in enumerate(zip(known.images, known.labels.tolist(), strict=True)):
            picture = (image.permute(1, 2, 0) * 255).round().to(torch.uint8).numpy()
            self.write(tmp_path / CIFAR10_CLASSES[label] / f"{i:02d}.png", picture)
        name, model = f"folder:{tmp_path}", rb.load_model("cifar10-resnet20")
        data = rb.load_data(name, model)
        assert data.classes == CIFAR10_CLASSES
        assert sorted(data.labels.tolist()) == sorted(known.labels.tolist())
        assert float((model(data.images).argmax(1) == data.labels).float().mean()) > 0.8
        assert int(rb.load_data(name).labels.max()) == 7
        behind = resolve_defenses("median", None)[0].wrap(as_black_box(model), 0)
        assert torch.equal(rb.load_data(name, behind).labels, data.labels)
        assert torch.equal(World().everything(name, as_black_box(model))[1], data.labels)

    def test_names_that_the_model_has_in_part_or_twice(self, tmp_path: Path) -> None:
        def named(*names: str) -> nn.Module:
            return carded(nn.Flatten(), Card("toy", "nothing", classes=len(names), class_names=names))

        for kind in ("ant", "bee", "cat"):
            self.write(tmp_path / kind / "1.png", COLOUR[0])
        name = f"folder:{tmp_path}"
        for unknown in (("x", "y", "z"), ("ant", "bee", "kitten")):  # the model's numbers are these as they are
            assert rb.load_data(name, named(*unknown)).labels.tolist() == [0, 1, 2]
        assert rb.load_data(name, named("cat", "bee", "ant")).labels.tolist() == [2, 1, 0]
        with pytest.raises(InputError, match="class 'bee' is number 2 of toy, which has no class 'cat'"):
            rb.load_data(name, named("ant", "auk", "bee", "kitten"))
        with pytest.raises(InputError, match="more than one class 'bee'"):
            rb.load_data(name, named("ant", "bee", "bee", "cat"))

    def test_grey_where_all_are(self, tmp_path: Path) -> None:
        self.write(tmp_path / "a" / "1.png", COLOUR[0, ..., 0])
        self.write(tmp_path / "b" / "1.png", COLOUR[1, ..., 0])
        assert rb.load_data(f"folder:{tmp_path}").images.shape == (2, 1, 5, 6)
        self.write(tmp_path / "b" / "2.png", COLOUR[1])
        data = rb.load_data(f"folder:{tmp_path}")
        assert data.images.shape == (3, 3, 5, 6)
        assert torch.equal(data.images[0, 0], data.images[0, 2])

    def test_the_image_of_another_size_is_named(self, tmp_path: Path) -> None:
        for index, image in enumerate(COLOUR):
            self.write(tmp_path / "a" / f"{index}.png", image[:, :4] if index == 2 else image)
        refused(f"folder:{tmp_path}", r"a/2\.png is 4x5, most are 6x5 \(width x height\): all must have one size")

    def test_what_holds_no_images(self, tmp_path: Path) -> None:
        refused(f"folder:{tmp_path / 'none'}", "there is no such folder")
        refused(f"folder:{tmp_path}", "holds no images: it must hold CLASS/FILE, or")
        (tmp_path / "a").mkdir()
        (tmp_path / "a" / "x.png").write_bytes(b"\x89PNG no image")
        refused(f"folder:{tmp_path}", r"a/x\.png cannot be read as an image")
        Image.fromarray(np.zeros((4, 4), np.uint16)).save(tmp_path / "a" / "x.png")
        refused(f"folder:{tmp_path}", "more than 8 bits a channel")


class TestTorchvision:
    def test_the_test_part_of_a_set_on_disk(self, tmp_path: Path) -> None:
        raw = tmp_path / "MNIST" / "raw"
        raw.mkdir(parents=True)
        images: NDArray[np.uint8] = RNG.integers(0, 256, (7, 28, 28), dtype=np.uint8)
        for part, rows in (("train", images[:4]), ("t10k", images[4:])):
            labels = np.arange(len(rows), dtype=np.uint8)
            (raw / f"{part}-images-idx3-ubyte").write_bytes(
                struct.pack(">4i", 2051, len(rows), 28, 28) + rows.tobytes()
            )
            (raw / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">2i", 2049, len(rows)) + labels.tobytes())
        data = rb.load_data(f"torchvision:MNIST?root={tmp_path}")
        torch.testing.assert_close(data.images, torch.from_numpy(images[4:, None]) / 255)
        assert data.labels.tolist() == [0, 1, 2]
        assert data.name == "torchvision:MNIST"
        assert data.classes is not None
        assert len(data.classes) == 10

    def test_a_set_that_is_not_there_is_not_downloaded(self, tmp_path: Path) -> None:
        for name in ("CIFAR10", "SVHN", "STL10"):
            refused(
                f"torchvision:{name}?root={tmp_path}",
                f"torchvision:{name} cannot be had from the folder .*&download=yes",
            )
        assert not list(tmp_path.iterdir())

    def test_options(self) -> None:
        refused("torchvision:CIFAR", "unknown data set of torchvision 'CIFAR': did you mean CIFAR10")
        refused("torchvision:CIFAR10?rot=x", "unknown option of CIFAR10 'rot': did you mean root")
        refused("torchvision:CIFAR10?root", "must look like NAME.root=VALUE")
        refused("torchvision:CIFAR10?download=maybe", "download must be yes or no")
