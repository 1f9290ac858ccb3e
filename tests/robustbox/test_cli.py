"""The command line: what it runs, what it writes, and that bad input ends in one line before a query is spent."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

import robustbox.attack as cli
from robustbox import registry
from robustbox.config import PROGRAM, AttackConfig, parse
from robustbox.errors import InputError
from robustbox.loop import Progress
from robustbox.protocol import Answer
from robustbox.setting import SAMPLES
from tests.schema import check_document
from tests.toys import Failing, HalfSpace, images

N, SHAPE = 6, (3, 8, 8)


class World:
    """What the names `spy` (a model) and `planted` (data) stand for in a test; every other name is the real thing."""

    def __init__(self) -> None:
        self.box = HalfSpace(classes=4)
        self.images = images(10, SHAPE)
        self.labels = torch.zeros(10, dtype=torch.int64)


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[World]:
    """A planted world, and a working folder of the test's own."""
    planted, as_black_box, load_data = World(), cli.as_black_box, cli.load_data

    def box(name: str, device: str) -> Any:
        return planted.box if name == "spy" else as_black_box(name, device)

    def data(name: str, model: Any = None) -> Any:
        return (planted.images, planted.labels) if name == "planted" else load_data(name, model)

    monkeypatch.setattr(cli, "as_black_box", box)
    monkeypatch.setattr(cli, "load_data", data)
    monkeypatch.chdir(tmp_path)
    return planted


def run(*words: str, n: int | None = N) -> int:
    """Run the command line on the planted world; later words override earlier ones."""
    few = [] if n is None else ["--images", str(n)]
    return cli.main(["--model", "spy", "--data", "planted", "--attack", "random", "--budget", "30", *few, *words])


def results(folder: str | Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((Path(folder) / "results.json").read_text())
    return document


# What it runs


def test_without_options_it_is_the_main_job() -> None:
    config = parse([]).config
    assert (config.model, config.attack, config.budget, config.seed) == ("cifar10-resnet20", "cgba", 1000, 0)
    assert (config.norm, config.epsilon, config.targets, config.defense) == (None, None, None, None)


def test_a_run_counts_shows_and_writes(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--attack", "cgba", "--budget", "120", "--out", "one") == 0
    document = results("one")
    assert sum(document["summary"]["ledger"].values()) == world.box.rows
    assert document["summary"]["ledger"] == {"verify": 2 * N, "attack": 120 * N}
    assert [image["success"] for image in document["images"]] == [True] * N
    optimum = [(0.6 - float(image.mean())) * 192**0.5 for image in world.images[:N]]
    found = [image["distance"] for image in document["images"]]
    assert all(best <= distance for best, distance in zip(optimum, found, strict=True))
    adversarials = load_file("one/adversarials.safetensors")["adversarials"]
    assert bool((adversarials.flatten(1).mean(dim=1) > 0.6).all())
    shown = capsys.readouterr().out
    assert f"{N} of {N} = 100.0%" in shown
    assert f"attack {120 * N}" in shown
    assert f"{found[0]:.4g}" in shown
    assert "written to one" in shown


def test_what_a_run_writes_is_what_the_documentation_says(world: World, root: Path) -> None:
    words = ["--model", "digits-cnn", "--data", "digits", "--attack", "cgba", "--budget", "60", "--targets", "next"]
    words += ["--defense", "[blacklight, random-features]", "--levels", "256"]
    assert run(*words, "--out", "one") == 0
    check_document(results("one"), root / "docs" / "results.md")


def test_a_run_can_be_run_again_from_its_folder(world: World) -> None:
    options = ["--attack", "cgba", "--attack.n0", "7", "--epsilon", "2.5", "--keep-going", "--targets", "1"]
    assert run(*options, "--seed", "5", "--levels", "256", "--budget", "90", "--out", "one") == 0
    assert cli.main(["--config", "one/config.yaml", "--out", "two"]) == 0
    assert results("two")["images"] == results("one")["images"]
    assert results("two")["attack"] == results("one")["attack"]
    first, second = (load_file(f"{folder}/adversarials.safetensors")["adversarials"] for folder in ("one", "two"))
    torch.testing.assert_close(first, second, rtol=0, atol=0, equal_nan=True)
    assert cli.main(["--config", "one/config.yaml", "--seed", "6", "--out", "three"]) == 0
    assert results("three")["images"] != results("one")["images"]


def test_another_attack_or_defense_takes_the_place_of_a_configurations_with_its_options(world: World) -> None:
    options = ["--attack", "cgba", "--attack.n0", "7", "--defense", "blacklight", "--defense.action", "silent"]
    assert run(*options, "--budget", "20", "--out", "one") == 0
    for words, attack, defenses in (
        (["--attack", "surfree"], "surfree", ["blacklight"]),
        (["--defense", "null"], "cgba", []),
        (["--defense", "input-noise", "--attack", "cgba"], "cgba", ["input-noise"]),
    ):
        out = "-".join(["two", *words])
        assert cli.main(["--config", "one/config.yaml", *words, "--out", out, "--quiet"]) == 0
        document = results(out)
        assert document["attack"]["name"] == attack
        assert [recipe["name"] for recipe in document["defense"]] == defenses
        if attack == "cgba":
            assert document["attack"]["options"]["n0"] == 7
        if defenses == ["blacklight"]:
            assert document["defense"][0]["options"]["action"] == "silent"


def test_a_dry_run_sees_where_the_run_would_be_written(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--out", "one") == 0
    capsys.readouterr()
    Path("file").touch()
    Path("audit").mkdir()
    (Path("audit") / "audit.yaml").touch()
    for out, says in (
        ("one", "holds a complete run"),
        ("file/run", "cannot be written to"),
        ("audit", "holds an audit"),
    ):
        assert run("--out", out, "--dry-run") == 2
        assert says in capsys.readouterr().err
    assert run("--out", "one", "--fresh", "--dry-run") == 0
    assert run("--out", "new", "--dry-run") == 0
    assert not Path("new").exists()


def test_a_run_begins_from_the_adversarials_of_another(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    """By the images that they belong to: another number of them, another attack and another threat model."""
    assert run("--attack", "hop-skip-jump", "--budget", "60", "--out", "one", n=3) == 0
    assert run("--attack", "cgba", "--levels", "256", "--starts", "one", "--out", "two") == 0
    assert "3 of 6" in capsys.readouterr().out
    one, two = results("one"), results("two")
    assert two["starts"] == 3
    assert one["starts"] == 0
    firsts = [image["first_success"] for image in two["images"]]
    assert firsts[:3] == [1, 1, 1]
    for before, after in zip(one["images"], two["images"], strict=False):
        assert after["distance"] <= before["distance"] + 0.03  # of its rows on 256 levels
    assert cli.main(["--config", "two/config.yaml", "--out", "three"]) == 0
    assert results("three")["images"] == two["images"]
    assert "3 images begun from given rows" in Path("two/report.html").read_text()
    assert "begun from given rows" not in Path("one/report.html").read_text()


def test_a_run_begins_from_rows_of_a_file(world: World) -> None:
    """A file that nobody's run wrote: a row for each image, in their order."""
    rows = torch.stack([torch.full(SHAPE, 0.7), torch.full(SHAPE, torch.nan), torch.full(SHAPE, 0.1)])
    save_file({"adversarials": rows}, "mine.safetensors")
    assert run("--attack", "cgba", "--starts", "mine.safetensors", "--out", "one", n=3) == 0
    document = results("one")
    assert document["starts"] == 2
    assert document["images"][0]["first_success"] == 1
    assert document["images"][2]["first_success"] > 1  # 0.1 is not beyond the half-space


PROBLEMS = {
    "no file": "cannot be read as adversarials",
    "another tensor": "cannot be read as adversarials",
    "no hashes": "cannot be read as adversarials",
    "too many hashes": "must have the shape [N,C,H,W], and N hashes if any, not the shape [2, 3, 8, 8] and 3 hashes",
    "other images": "has adversarials of other images",
    "another number": f"has 2 rows and does not say for which images; {N} are attacked",
    "flat": "must have the shape [N,C,H,W], and N hashes if any, not the shape [2, 3]",
}


@pytest.mark.parametrize("problem", PROBLEMS)
def test_starts_that_cannot_be_read_cost_nothing(
    problem: str, world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    hashes = {
        "no hashes": "[",
        "too many hashes": json.dumps(["0" * 64] * 3),
        "other images": json.dumps(["0" * 64] * 2),
    }
    if problem != "no file":
        name = "rows" if problem == "another tensor" else "adversarials"
        metadata = {"sha256_of_originals": hashes[problem]} if problem in hashes else None
        rows = torch.rand(2, 3) if problem == "flat" else torch.rand(2, *SHAPE)
        save_file({name: rows}, "a.safetensors", metadata)
    assert run("--attack", "cgba", "--starts", "a.safetensors", "--out", "one") == 2
    message = capsys.readouterr().err
    assert PROBLEMS[problem] in message
    assert message.count("\n") == 1
    assert world.box.rows == 0
    assert not Path("one").exists()


def test_config_yaml_spells_out_every_default(world: World) -> None:
    assert run("--out", "one", n=None) == 0
    config = yaml.safe_load(Path("one/config.yaml").read_text())
    expected = set(AttackConfig.__dataclass_fields__) - {"out", "defense_options"}  # no defense, no options of one
    assert set(config) == expected
    assert config["images"] == 10
    assert config["data"] == "planted"
    assert config["attack_options"] == results("one")["attack"]["options"]


def test_printed_config_is_what_a_run_reads(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    words = ["--attack", "cgba-h", "--attack.n0", "9", "--defense", "input-noise", "--defense.sigma", "0.1"]
    with pytest.raises(SystemExit) as end:
        parse([*words, "--print_config"])
    assert end.value.code == 0
    file = tmp_path / "config.yaml"
    file.write_text(capsys.readouterr().out)
    assert parse(["--config", str(file)]).config == parse(words).config
    assert parse(words).config.attack_options["n0"] == 9
    assert parse(words).config.defense_options == {"sigma": 0.1, "clip": False}


def test_options_go_with_the_only_name_beside_files() -> None:
    words = ["--defense", "[smoothing, a.safetensors]", "--defense.n", "7"]
    config = parse(words).config
    assert config.defense == ["smoothing", "a.safetensors"]
    assert config.defense_options["n"] == 7
    for chain in ("[input-noise, smoothing]", "a.safetensors", "[a.safetensors, b.safetensors]"):
        with pytest.raises(InputError, match=r"unknown option '--defense.n'"):
            parse(["--defense", chain, "--defense.n", "7"])


def test_hyphens_and_underscores_mean_the_same() -> None:
    hyphens = parse(["--keep-going", "--max-rows", "64", "--total-budget=50", "--dry-run"])
    assert hyphens == parse(["--keep_going", "--max_rows", "64", "--total_budget=50", "--dry_run"])
    assert hyphens == parse(["--keep-going", "true", "--max-rows=64", "--total-budget", "50", "--dry-run"])
    assert (hyphens.config.keep_going, hyphens.config.max_rows, hyphens.dry_run) == (True, 64, True)


@pytest.mark.parametrize(
    ("words", "expected"),
    [(["2"], 2), (["next"], "next"), (["random"], "random"), (["[1, 2]"], [1, 2]), (["null"], None)],
)
def test_targets_are_read_as_what_they_are(words: list[str], expected: object) -> None:
    assert parse(["--targets", *words]).config.targets == expected


def test_targets_reach_the_attack(world: World) -> None:
    world.labels[3] = 0
    assert run("--targets", "next", "--out", "next") == 0
    assert [image["target"] for image in results("next")["images"]] == [1] * N
    assert run("--targets", "[1, 2, 3, 1, 2, 3]", "--out", "list") == 0
    assert [image["target"] for image in results("list")["images"]] == [1, 2, 3, 1, 2, 3]
    assert run("--targets", "random", "--out", "random") == 0
    drawn = [image["target"] for image in results("random")["images"]]
    assert set(drawn) <= {1, 2, 3}
    assert len(set(drawn)) > 1
    world.images = world.images.flip(0)  # an image's target goes with the image, not with its place
    assert run("--targets", "random", "--out", "flipped", n=10) == 0
    flipped = {image["sha256"]: image["target"] for image in results("flipped")["images"]}
    assert [flipped[image["sha256"]] for image in results("random")["images"]] == drawn


def test_the_pool_is_the_rest_without_copies_of_the_attacked(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.images[8] = world.images[2]
    pools: list[tuple[Tensor, Tensor] | None] = []
    real = cli.run_attack

    def note(*args: Any, **options: Any) -> Any:
        pools.append(options["pool"])
        return real(*args, **options)

    monkeypatch.setattr(cli, "run_attack", note)
    assert run("--out", "one") == 0
    assert pools[0] is not None
    torch.testing.assert_close(pools[0][0], world.images[[6, 7, 9]])
    assert run("--out", "all", n=10) == 0
    assert pools[1] is None


def test_every_model_of_the_zoo_comes_with_images() -> None:
    assert set(SAMPLES) == set(registry.names("models"))
    assert {len(cli.load_data(data)[0]) for data in SAMPLES.values()} == {20, 360}


def test_images_default_to_twenty_or_all(world: World) -> None:
    assert run("--out", "few", n=None) == 0
    assert len(results("few")["images"]) == 10
    world.images, world.labels = images(25, SHAPE), torch.zeros(25, dtype=torch.int64)
    assert run("--out", "many", n=None) == 0
    assert len(results("many")["images"]) == 20


def test_without_out_every_run_gets_a_folder_of_its_own(world: World) -> None:
    assert run("--attack", "foolbox:InversionAttack") == 0
    folders = list(Path("runs").iterdir())
    assert len(folders) == 1
    assert re.fullmatch(r"\d{8}-\d{6}-spy-foolbox-InversionAttack", folders[0].name)
    assert results(folders[0])["attack"]["name"] == "foolbox:InversionAttack"


def test_quiet_prints_nothing(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--quiet", "--out", "one") == 0
    assert capsys.readouterr() == ("", "")


# What it shows


@pytest.mark.parametrize(
    ("words", "rows"),
    [
        (["--attack", "cgba", "--budget", "60"], 60 * N),
        (["--total-budget", "100"], 100),
        (["--defense", "input-noise"], 30 * N),
        (["--epsilon", "9"], 30 * N),
    ],
)
def test_dry_run_bounds_the_run_and_asks_nothing(
    world: World, capsys: pytest.CaptureFixture[str], words: list[str], rows: int
) -> None:
    assert run("--dry-run", "--out", "one", *words) == 0
    assert world.box.rows == 0
    assert not Path("one").exists()
    shown = capsys.readouterr().out
    bounds = {phase: int(rows) for phase, rows in re.findall(r"^  (\w[\w ]*?)   +(\d+) *$", shown, re.MULTILINE)}
    assert run("--out", "one", *words) == 0
    ledger = results("one")["summary"]["ledger"]
    total = bounds.pop("in all")
    assert set(ledger) <= set(bounds)
    assert all(count <= bounds[phase] for phase, count in ledger.items())
    assert bounds["attack"] == rows
    assert total == sum(bounds.values())
    if "cgba" in words:  # which spends its whole budget, and succeeds on every image
        assert ledger == bounds


def test_the_list_names_everything(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--list"]) == 0
    shown = capsys.readouterr().out
    for kind in ("attacks", "defenses", "models", "data"):
        assert kind in shown
        names = [*registry.names(kind), *(f"{scheme}:" for scheme in registry.schemes(kind))]
        assert names
        assert [name for name in names if not re.search(rf"^  {re.escape(name)}\S*   +\S", shown, re.MULTILINE)] == []


@pytest.mark.parametrize("name", [*registry.names("attacks"), "foolbox:HopSkipJumpAttack"])
def test_help_shows_the_options_of_the_attack_and_what_they_mean(capsys: pytest.CaptureFixture[str], name: str) -> None:
    with pytest.raises(SystemExit) as end:
        parse(["--attack", name, "--help"])
    assert end.value.code == 0
    shown = capsys.readouterr().out
    options = parse(["--attack", name]).config.attack_options
    for option in options:
        entry = re.search(rf"--attack\.{option} .*?\n +(\S.*?)(?=\n  --|\Z)", shown, re.DOTALL)
        assert entry, option
        if ":" not in name:  # foolbox documents only some of its options
            assert not entry[1].startswith("(type:"), f"--attack.{option} has no meaning"
    assert "options" not in options


@pytest.mark.parametrize("name", registry.names("defenses"))
def test_help_shows_the_options_of_the_defense(capsys: pytest.CaptureFixture[str], name: str) -> None:
    with pytest.raises(SystemExit):
        parse(["--defense", name, "--help"])
    shown = capsys.readouterr().out
    assert all(f"--defense.{option} " in shown for option in parse(["--defense", name]).config.defense_options)


def test_the_bar_shows_rows_and_running_success() -> None:
    class Terminal(list[str]):
        def write(self, text: str) -> None:
            self.append(text)

        def flush(self) -> None:
            pass

    screen = Terminal()
    with cli.Bar(screen, disable=False) as bar:  # type: ignore[arg-type]  # as much of a stream as tqdm asks for
        bar(Progress(rows=50, total=200, live=3, done=1, succeeded=2))
    last = screen[-1] if screen[-1].strip() else screen[-2]
    assert re.search(r"50/200 .* rows/s, 2 of 4 succeeded", last), screen


# Bad input: one line, exit code 2, no query


def pickled(folder: Path) -> str:
    torch.save({"weights": torch.zeros(3)}, folder / "model.pt")
    return f"file:{folder / 'model.pt'}"


def truncated(folder: Path) -> str:
    traced = torch.jit.trace(torch.nn.Flatten(), torch.zeros(1, *SHAPE))
    traced.save(str(folder / "model.pt"))
    content = (folder / "model.pt").read_bytes()
    (folder / "model.pt").write_bytes(content[: len(content) // 2])
    return f"file:{folder / 'model.pt'}"


BAD_WORDS: dict[str, tuple[list[str], str]] = {
    "model": (["--model", "cifar10-resnet2O"], "unknown model 'cifar10-resnet2O': did you mean cifar10-resnet20"),
    "model scheme": (["--model", "tim:resnet18"], "unknown model 'tim:resnet18'.*timm"),
    "attack": (["--attack", "cbga"], "unknown attack 'cbga': did you mean cgba"),
    "foreign attack": (["--attack", "foolbox:HopSkipJump"], "did you mean foolbox:HopSkipJumpAttack"),
    "data": (["--data", "foolbox:cifar1O"], "cifar10"),
    "no such data scheme": (["--data", "nzp:x"], "unknown data set 'nzp:x'.*npz"),
    "missing file": (["--data", "npz:nowhere.npz"], "nowhere.npz"),
    "defense": (["--defense", "input-nose"], "unknown defense 'input-nose': did you mean input-noise"),
    "option": (["--buget", "5"], "unknown option '--buget': did you mean --budget"),
    "attack option": (["--attack", "cgba", "--attack.toleranse", "1"], "did you mean --attack.tolerance"),
    "defense option": (["--defense", "input-noise", "--defense.sigm", "1"], "did you mean --defense.sigma"),
    "type": (["--budget", "many"], "--budget: expected int, got many"),
    "fraction": (["--budget", "10.5"], "--budget: expected int, got 10.5"),
    "type of an attack option": (["--attack", "cgba", "--attack.n0", "few"], "--attack.n0: expected int, got few"),
    "norm": (["--norm", "l3"], "--norm: expected one of .*, got l3"),
    "targets": (["--targets", "nxt"], "--targets: expected .*, got nxt"),
    "part of what has none": (["--model.x", "3"], "unknown option '--model.x': did you mean --model"),
    "stray word": (["cgba"], "'cgba' belongs to no option"),
    "nothing after an option": (["--budget"], "--budget"),
    "config file": (["--config", "nowhere.yaml"], "nowhere.yaml"),
    "budget 0": (["--budget", "0"], "budget must be a whole number of at least 1, not 0"),
    "negative budget": (["--budget", "-5"], "budget must be a whole number of at least 1, not -5"),
    "total budget": (["--total-budget", "0"], "total_budget must be"),
    "max rows": (["--max-rows", "0"], "max_rows must be"),
    "epsilon": (["--epsilon", "-1"], "epsilon must be"),
    "epsilon nan": (["--epsilon", "nan"], "--epsilon: expected float, null, got nan"),
    "levels": (["--levels", "1"], "levels must be"),
    "epsilon of less than a level": (
        ["--attack", "rays", "--norm", "linf", "--epsilon", "0.0038", "--levels", "256"],
        "epsilon=0.0038 is less than one of 256 grey levels",
    ),
    "knowledge": (["--knowledge", "all"], "unknown knowledge level 'all'"),
    "images 0": (["--images", "0"], "--images must be from 1 to 10"),
    "too many images": (["--images", "11"], "--images must be from 1 to 10"),
    "norm that the attack has not": (["--attack", "cgba", "--norm", "linf"], "attack cgba works in l2, not in linf"),
    "scores against labels": (
        ["--attack", "foolbox:GenAttack", "--knowledge", "label", "--norm", "linf", "--epsilon", "1", "--targets", "1"],
        "needs scores",
    ),
    "target is the label": (["--targets", "0"], "target of image 0 is its own label 0"),
    "target out of range": (["--targets", "4"], "targets must be 0 to 3, but number 0 is 4"),
    "number of targets": (["--targets", "[1, 2]"], "targets must be 6 integers"),
    "option without a defense": (["--defense.sigma", "1"], "unknown option '--defense.sigma'"),
    "no data": (["--data", "null"], "model spy comes with no images of its own: name some with --data"),
    "device": (["--model", "digits-cnn", "--device", "gpuu"], "gpuu"),
}


def assert_one_line(captured: tuple[str, str], expected: str) -> None:
    out, err = captured
    assert out == ""
    assert err.count("\n") == 1, err
    assert err.startswith(f"{PROGRAM}: ")
    assert re.search(expected, err), err


@pytest.mark.parametrize("case", BAD_WORDS)
def test_bad_words_end_in_one_line(world: World, capsys: pytest.CaptureFixture[str], case: str) -> None:
    words, expected = BAD_WORDS[case]
    assert run(*words, "--out", "one") == 2
    assert_one_line(capsys.readouterr(), expected)
    assert world.box.rows == 0
    assert not Path("one").exists()


def outside(world: World) -> None:
    world.images[3, 0, 0, 0] = 1.5


def below(world: World) -> None:
    world.images[3, 0, 0, 0] = -0.01


def holed(world: World) -> None:
    world.images[2, 1, 1, 1] = torch.nan


def eight_bit(world: World) -> None:
    world.images = (world.images * 255).byte()


def grey(world: World) -> None:
    world.box.input_shape, world.images = SHAPE, world.images[:, :1]


def small(world: World) -> None:
    world.box.input_shape, world.images = SHAPE, world.images[:, :, :4]


def too_high(world: World) -> None:
    world.labels[1] = 4


def negative(world: World) -> None:
    world.labels[1] = -1


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (outside, r"must lie in \[0, 1\], but number 3"),
        (below, r"must lie in \[0, 1\], but number 3"),
        (holed, "number 2 has NaN"),
        (eight_bit, "divide 8-bit values by 255"),
        (grey, "images are 1 x 8 x 8, the model takes 3 x 8 x 8"),
        (small, "images are 3 x 4 x 8, the model takes 3 x 8 x 8"),
        (too_high, "labels must be 0 to 3, but number 1 is 4"),
        (negative, "labels must be 0 to 3, but number 1 is -1"),
    ],
)
def test_bad_data_ends_in_one_line(
    world: World, capsys: pytest.CaptureFixture[str], spoil: Callable[[World], None], expected: str
) -> None:
    spoil(world)
    assert run("--out", "one") == 2
    assert_one_line(capsys.readouterr(), expected)
    assert world.box.rows == 0
    assert not Path("one").exists()


@pytest.mark.filterwarnings("ignore:.torch.jit.trace")
@pytest.mark.parametrize("spoil", [pickled, truncated])
def test_a_file_that_is_no_model_ends_in_one_line(
    world: World, capsys: pytest.CaptureFixture[str], tmp_path: Path, spoil: Callable[[Path], str]
) -> None:
    assert run("--model", spoil(tmp_path), "--out", "one") == 2
    assert_one_line(capsys.readouterr(), re.escape(str(tmp_path / "model.pt")))


def test_no_image_classified_correctly_ends_before_the_attack(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    world.labels += 1
    assert run("--out", "one") == 2
    assert_one_line(capsys.readouterr(), "no image is classified correctly")
    assert world.box.rows == N  # the evaluator's clean check
    assert not Path("one").exists()


def test_a_folder_with_another_run_ends_in_one_line(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--out", "one", "--quiet") == 0
    spent, written = world.box.rows, Path("one/results.json").read_text()
    assert run("--out", "one", "--seed", "1") == 2
    assert_one_line(capsys.readouterr(), "one holds a complete run")
    assert world.box.rows == spent
    assert Path("one/results.json").read_text() == written


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("budgte: 5\n", "unknown option '--budgte': did you mean --budget"),
        ("budget: many\n", "expected int, got many"),
        ("attack: cgba\nattack_options:\n  nn0: 3\n", "unknown option '--attack.nn0': did you mean --attack.n0"),
        ("attack_options: 3\n", "must hold options by name"),
        ("attack: nothing-like-it\n", "unknown attack 'nothing-like-it'"),
        ("- a\n- b\n", "must hold options by name"),
        ("a: [1\n", "is not YAML"),
        ("!!python/object/apply:os.system ['touch planted']\n", "is not YAML"),
    ],
)
def test_a_bad_config_file_ends_in_one_line(
    world: World, capsys: pytest.CaptureFixture[str], content: str, expected: str
) -> None:
    Path("bad.yaml").write_text(content)
    assert cli.main(["--config", "bad.yaml", "--model", "spy", "--data", "planted"]) == 2
    assert_one_line(capsys.readouterr(), expected)
    assert world.box.rows == 0
    assert not Path("planted").exists()


# In mid-run: the line, and everything found so far


def raising(answer: Answer) -> Answer:
    raise OSError("the service hung up")


def holey(answer: Answer) -> Answer:
    assert answer.scores is not None
    return Answer.of(answer.labels, torch.full_like(answer.scores, torch.nan))


def short(answer: Answer) -> Answer:
    return Answer.of(answer.labels[:-1])


def interrupting(answer: Answer) -> Answer:
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("wrong", "code", "expected"),
    [
        (raising, 2, "the service hung up"),
        (holey, 2, "NaN"),
        (short, 2, "rows"),
        (interrupting, 130, "interrupted"),
    ],
)
def test_what_was_found_before_the_end_is_in_the_folder(
    world: World, capsys: pytest.CaptureFixture[str], wrong: Callable[[Answer], Answer], code: int, expected: str
) -> None:
    world.box = Failing(400, wrong)
    assert run("--attack", "cgba", "--budget", "200", "--max-rows", "8", "--out", "one") == code
    assert_one_line(capsys.readouterr(), f"{expected}.*what was found until then is in one")
    document = results("one")
    assert document["summary"]["ledger"]["attack"] + N == world.box.rows
    assert {image["stop_reason"] for image in document["images"]} == {"stopped"}
    found = [image for image in document["images"] if image["trace"]]
    assert found
    adversarials = load_file("one/adversarials.safetensors")["adversarials"]
    missing = [image["distance"] is None for image in document["images"]]
    assert adversarials.isnan().flatten(1).any(dim=1).tolist() == missing
    assert yaml.safe_load(Path("one/config.yaml").read_text())["budget"] == 200


# As a user types it


def test_the_real_thing(root: Path, tmp_path: Path) -> None:
    words = ["--model", "digits-cnn", "--images", "3", "--budget", "60", "--out", str(tmp_path / "run")]
    command = [sys.executable, "-m", "robustbox.attack", *words]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    document = results(tmp_path / "run")
    assert document["model"]["name"] == "digits-cnn"
    assert all(image["queries"] == 60 * image["clean_correct"] for image in document["images"])


def test_a_bad_word_shows_no_traceback(root: Path) -> None:
    command = [sys.executable, "-m", "robustbox.attack", "--attack", "cbga"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"{PROGRAM}: unknown attack 'cbga': did you mean cgba or cgba-h or qeba?\n"


def test_an_unknown_name_is_an_input_error() -> None:
    with pytest.raises(InputError, match="did you mean"):
        parse(["--attack", "cbga"])
