"""`file:PATH`: what torch.export and TorchScript wrote comes back; pickles, damage and hidden objects are refused."""

from __future__ import annotations

import io
import json
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import pytest
import torch
from torch import nn

import robustbox as rb
from robustbox.boxes import as_black_box
from robustbox.errors import InputError

ROWS = torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def network(dropout: float = 0.5) -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(dropout), nn.Flatten(), nn.Linear(144, 10)
    return nn.Sequential(*layers).eval()


def exported(path: Path, model: nn.Module, rows: torch.Tensor = ROWS, batch: Any = torch.export.Dim.DYNAMIC) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(model, (rows,), dynamic_shapes=None if batch is None else ({0: batch},))
        torch.export.save(program, path)
    return path


def scripted(path: Path, model: nn.Module, freeze: bool = False) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        script = torch.jit.script(model)
        torch.jit.save(torch.jit.freeze(script) if freeze else script, path)
    return path


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported(tmp_path_factory.mktemp("program") / "m.pt2", network())


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return scripted(tmp_path_factory.mktemp("script") / "m.pt", network())


class TestRoundTrips:
    @pytest.mark.parametrize("kind", ["program", "script", "frozen", "script in training mode"])
    def test_answers_as_the_model_did(self, kind: str, program: Path, tmp_path: Path) -> None:
        path = {
            "program": lambda: program,
            "script": lambda: scripted(tmp_path / "m.pt", network()),
            "frozen": lambda: scripted(tmp_path / "m.pt", network(), freeze=True),
            "script in training mode": lambda: scripted(tmp_path / "m.pt", network().train()),
        }[kind]()
        model = rb.load_model(f"file:{path}")
        box = as_black_box(model)
        for n in (1, 6, 4):
            scores = box.answer(ROWS[:n], torch.arange(n)).scores
            with torch.no_grad():
                torch.testing.assert_close(scores, network()(ROWS[:n]), atol=1e-5, rtol=1e-5)
        assert box.scores == "logit"
        assert box.name == f"file:{path.name}"
        assert len(str(box.describe()["weights_sha256"])) == 64

    def test_a_program_states_its_shapes(self, program: Path) -> None:
        box = as_black_box(f"file:{program}", "cpu")
        assert (box.input_shape, box.classes) == ((1, 8, 8), 10)

    def test_probabilities_are_recognised(self, tmp_path: Path) -> None:
        path = exported(tmp_path / "m.pt2", nn.Sequential(network(), nn.Softmax(1)).eval())
        box = as_black_box(f"file:{path}", "cpu")
        box.answer(ROWS, torch.arange(6))
        assert box.scores == "probability"

    def test_a_program_with_one_output_has_two_classes(self, tmp_path: Path) -> None:
        model = nn.Sequential(network()[:5], nn.Linear(144, 1), nn.Sigmoid()).eval()
        box = as_black_box(f"file:{exported(tmp_path / 'm.pt2', model)}", "cpu")
        assert box.classes == 2
        answer = box.answer(ROWS, torch.arange(6))
        assert answer.labels.tolist() == (model(ROWS)[:, 0] > 0.5).long().tolist()


class TestRefusals:
    @pytest.mark.parametrize("zipped", [True, False])
    def test_pickles(self, zipped: bool, tmp_path: Path) -> None:
        torch.save(network(), tmp_path / "m.pt", _use_new_zipfile_serialization=zipped)
        with pytest.raises(InputError, match=r"m\.pt is a pickle, which could run any code"):
            rb.load_model(f"file:{tmp_path / 'm.pt'}")

    @pytest.mark.parametrize("kind", ["program", "script"])
    def test_truncated_and_damaged_files(self, kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
        content = request.getfixturevalue(kind).read_bytes()
        weight = content.index(network()[5].bias.detach().numpy().tobytes())  # type: ignore[union-attr,operator]
        flipped = content[:weight] + bytes([content[weight] ^ 1]) + content[weight + 1 :]
        for damaged in (content[:-1], content[: len(content) // 2], content[:100], flipped):
            (tmp_path / "m").write_bytes(damaged)
            with pytest.raises(InputError, match="is truncated or damaged") as caught:
                rb.load_model(f"file:{tmp_path / 'm'}")
            assert "\n" not in str(caught.value)

    def test_other_files(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="cannot be read: No such file"):
            rb.load_model(f"file:{tmp_path / 'm'}")
        (tmp_path / "m").write_text("def model(): ...")
        with pytest.raises(InputError, match="is neither an exported program nor TorchScript"):
            rb.load_model(f"file:{tmp_path / 'm'}")
        with ZipFile(tmp_path / "m", "w") as archive:
            archive.writestr("notes.txt", "no model")
        with pytest.raises(InputError, match="is neither an exported program nor TorchScript"):
            rb.load_model(f"file:{tmp_path / 'm'}")

    def test_a_program_for_one_batch_size(self, tmp_path: Path) -> None:
        path = exported(tmp_path / "m.pt2", network(), batch=None)
        with pytest.raises(InputError, match=r"only takes batches of 6: export it with dynamic_shapes"):
            rb.load_model(f"file:{path}")

    def test_a_program_in_training_mode(self, tmp_path: Path) -> None:
        path = exported(tmp_path / "m.pt2", network(0.0).train())
        with pytest.raises(InputError, match="was exported in training mode"):
            rb.load_model(f"file:{path}")


class Bomb:
    """Writes a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


def torch_pickle(thing: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(thing, buffer)
    return buffer.getvalue()


def in_sample_inputs(parts: dict[str, bytes], bomb: Bomb) -> None:
    parts["m/data/sample_inputs/model.pt"] = torch_pickle(((bomb,), {}))


def in_a_weight(parts: dict[str, bytes], bomb: Bomb) -> None:
    config = json.loads(parts["m/data/weights/model_weights_config.json"])
    entry = next(iter(config["config"].values()))
    entry["use_pickle"] = True
    parts[f"m/data/weights/{entry['path_name']}"] = torch_pickle(bomb)
    parts["m/data/weights/model_weights_config.json"] = json.dumps(config).encode()


def in_a_constant(parts: dict[str, bytes], bomb: Bomb) -> None:
    entry = {"path_name": "opaque_obj_0", "is_param": False, "use_pickle": True, "tensor_meta": None}
    parts["m/data/constants/model_constants_config.json"] = json.dumps({"config": {"c": entry}}).encode()
    parts["m/data/constants/opaque_obj_0"] = pickle.dumps(bomb)


def in_weights_of_the_old_format(parts: dict[str, bytes], bomb: Bomb) -> None:
    parts["m/data/weights/model.pt"] = torch_pickle({"w": bomb})


def in_state_of_the_older_format(parts: dict[str, bytes], bomb: Bomb) -> None:
    parts["version"] = b"8.8"
    parts["serialized_state_dict.json"] = torch_pickle({"w": bomb})


def in_another_case(parts: dict[str, bytes], bomb: Bomb) -> None:
    parts["m/DATA/Weights/Model.PT"] = torch_pickle({"w": bomb})


def as_compiled_code(parts: dict[str, bytes], bomb: Bomb) -> None:
    parts["m/data/aotinductor/model/model.so"] = b"\x7fELF"


@pytest.mark.parametrize(
    "hide",
    [
        in_sample_inputs,
        in_a_weight,
        in_a_constant,
        in_weights_of_the_old_format,
        in_state_of_the_older_format,
        in_another_case,
        as_compiled_code,
    ],
)
def test_objects_hidden_in_a_program_are_not_unpickled(
    hide: Callable[[dict[str, bytes], Bomb], None], program: Path, tmp_path: Path
) -> None:
    mark = tmp_path / "mark"
    with ZipFile(program) as archive:
        parts = {part: archive.read(part) for part in archive.namelist()}
    hide(parts, Bomb(mark))
    with ZipFile(tmp_path / "m.pt2", "w") as archive:
        for part, content in parts.items():
            archive.writestr(part, content)
    with pytest.raises(InputError, match="holds more than tensors and a graph"):
        rb.load_model(f"file:{tmp_path / 'm.pt2'}")
    assert not mark.exists()


def test_the_bombs_are_live(program: Path, tmp_path: Path) -> None:
    """Were it not for the checks, torch would have run the code: otherwise the test above shows nothing."""
    mark = tmp_path / "mark"
    with ZipFile(program) as archive:
        parts = {part: archive.read(part) for part in archive.namelist()}
    in_sample_inputs(parts, Bomb(mark))
    with ZipFile(tmp_path / "m.pt2", "w") as archive:
        for part, content in parts.items():
            archive.writestr(part, content)
    with pytest.raises(Exception):  # noqa: B017, PT011  (what it makes of the bomb is no input)
        torch.export.load(tmp_path / "m.pt2").module()(ROWS)
    assert mark.exists()


def test_a_part_that_stands_twice_is_refused(program: Path, tmp_path: Path) -> None:
    path = tmp_path / "m.pt2"
    path.write_bytes(program.read_bytes())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with ZipFile(path, "a") as archive:
            archive.writestr("m/data/sample_inputs/model.pt", torch_pickle(((ROWS,), {})))
    with pytest.raises(InputError, match="a part stands in it twice"):
        rb.load_model(f"file:{path}")
