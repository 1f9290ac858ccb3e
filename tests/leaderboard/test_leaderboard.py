"""The command from runs to pages, and the verification of a row: on real runs of the zoo's smallest model."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from urllib.parse import unquote

import pytest
import torch
from safetensors.torch import load_file, save_file

from robustbox import load_data
from robustbox.attack import main as attack
from robustbox.leaderboard.__main__ import main
from robustbox.leaderboard.rebuild import cost
from robustbox.leaderboard.sources import file_sha256, find
from tests.leaderboard.planted import plant


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs on the bare model, one on a gate, one on noise."""
    folder = tmp_path_factory.mktemp("runs")
    common = ["--model", "digits-cnn", "--images", "4", "--budget", "120", "--epsilon", "1.5", "--quiet"]
    for name, more in {
        "bare": ["--attack", "cgba"],
        "random": ["--attack", "random"],
        "gate": ["--attack", "oars:hop-skip-jump", "--defense", "blacklight"],
        "noise": ["--attack", "cgba", "--defense", "input-noise", "--eot", "2"],
    }.items():
        assert attack([*common, *more, "--out", str(folder / name)]) == 0
    return folder


@pytest.fixture(scope="module")
def site(runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pages of these runs."""
    out = tmp_path_factory.mktemp("site")
    assert main([str(runs), "--out", str(out)]) == 0
    return out


def test_pages_and_entries_are_written(site: Path) -> None:
    names = ["digits-cnn", "digits-cnn+blacklight", "digits-cnn+input-noise"]
    assert sorted(path.stem for path in (site / "entries").iterdir()) == names
    assert sorted(path.stem for path in site.glob("*.html")) == [*names, "index"]
    assert len(list((site / "runs").iterdir())) == 4
    index = (site / "index.html").read_text()
    assert "digits-cnn behind blacklight" in index
    assert "no EOT" not in index
    entry = json.loads((site / "entries" / "digits-cnn+input-noise.json").read_text())
    assert entry["cost"]["passes_per_query"] == 1
    assert str(site.parent) not in "".join(path.read_text() for path in site.rglob("*.*") if path.is_file())


def test_the_same_runs_make_the_same_files_and_pages_can_be_made_of_entries_alone(site: Path, runs: Path) -> None:
    before = {path: path.read_text() for path in site.rglob("*.*") if path.is_file()}
    note = site / "entries" / "digits-cnn.json"
    edited = json.loads(before[note])
    edited["about"]["note"] = "by hand"
    note.write_text(json.dumps(edited))
    assert main([str(runs), "--out", str(site)]) == 0
    assert json.loads(note.read_text()) == edited  # what people wrote stays
    note.write_text(before[note])
    assert main([str(runs), "--out", str(site)]) == 0
    assert {path: path.read_text() for path in before} == before
    alone = site.parent / "alone"
    assert main([str(site / "entries"), "--out", str(alone)]) == 0
    assert (alone / "index.html").read_text() == before[site / "index.html"]


def test_a_defense_that_stood_on_every_image_has_a_cost(runs: Path, tmp_path: Path) -> None:
    """No adversarial was found: the images themselves are asked."""
    shutil.copytree(runs / "gate", tmp_path / "gate")
    path = tmp_path / "gate" / "adversarials.safetensors"
    save_file({"adversarials": torch.full_like(load_file(path)["adversarials"], torch.nan)}, path)
    (run,) = find([tmp_path]).runs
    found = cost(run)
    assert found is not None
    assert found["passes_per_query"] == 1
    assert found["milliseconds_per_query"] > 0


def test_rows_of_one_board_are_told_apart(tmp_path: Path) -> None:
    """By the files of their defenses; where these tell nothing, by their names, which have digits of a hash then."""

    def trained(name: str, file: str | None, weights: str) -> None:
        defense = [{"name": "zo-ae-ds", "options": {"layout": {"width": [8] * 30}, "weights": weights}}]
        folder = plant(tmp_path / "runs" / name, [[(3, 0.5)]], defense=defense)
        (folder / "config.yaml").write_text(json.dumps({"model": "planted", "defense": file}))

    def titles(out: str) -> dict[str, str]:
        """By the entry's name, as the board has them, and the entries' own pages too."""
        assert main([str(tmp_path / "runs"), "--out", str(tmp_path / out), "--no-cost"]) == 0
        index = (tmp_path / out / "index.html").read_text()
        found = {unquote(name): title for name, title in re.findall(r'href="([^"]+).html">([^<]+)</a>', index)}
        assert all(
            f"<h1>{title}</h1>" in (tmp_path / out / f"{name}.html").read_text() for name, title in found.items()
        )
        return found

    trained("one", "made/plain.safetensors", "1")
    assert [*titles("alone").values()] == ["planted behind zo-ae-ds"]
    trained("two", "made/deep.safetensors", "2")
    assert sorted(titles("files").values()) == ["planted behind zo-ae-ds [deep]", "planted behind zo-ae-ds [plain]"]
    trained("three", "other/deep.safetensors", "3")
    trained("four", None, "4")
    names = titles("names")
    plain = next(name for name, title in names.items() if title == "planted behind zo-ae-ds [plain]")
    assert len(names) == 4
    assert all(title == f"planted behind zo-ae-ds [{name}]" for name, title in names.items() if name != plain)


def test_an_entry_does_not_take_the_place_of_one_about_something_else(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whether it is made of runs or given; each keeps its name and what was written into it when its runs come again."""

    def counts(board: str) -> dict[str, int]:
        """Images by the entry's name."""
        its = (json.loads(path.read_text()) for path in (tmp_path / board / "entries").iterdir())
        return {entry["name"]: entry["images"]["count"] for entry in its}

    def make(board: str, *sources: str) -> int:
        return main([*(str(tmp_path / each) for each in sources), "--out", str(tmp_path / board), "--no-cost"])

    for images in (1, 2):
        plant(tmp_path / f"runs-{images}" / "run", [[(3, 0.5)]] * images)
        assert make("board", f"runs-{images}") == 0
        assert make(f"board-{images}", f"runs-{images}") == 0
    apart = next(name for name in counts("board") if name != "planted")
    assert counts("board") == {"planted": 1, apart: 2}
    assert re.fullmatch(r"planted-[0-9a-f]{8}", apart)
    assert (tmp_path / "board" / f"{apart}.html").exists()
    path = tmp_path / "board" / "entries" / f"{apart}.json"
    edited = json.loads(path.read_text())
    edited["about"]["note"] = "by hand"
    path.write_text(json.dumps(edited))
    assert make("board", "runs-2") == make("board", "runs-1", "runs-2") == 0
    assert counts("board") == {"planted": 1, apart: 2}
    assert json.loads(path.read_text()) == edited
    assert make("given", "board-1", "board-2") == 0
    assert counts("given") == {"planted": 1, apart: 2}
    assert capsys.readouterr().err == ""


def test_entries_about_the_same_that_differ_are_refused_unless_runs_decide(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for board, traces, name in (("one", [[(3, 0.5)], []], "cgba"), ("two", [[(3, 0.5)], [(3, 0.5)]], "surfree")):
        plant(tmp_path / "all" / name, traces, name)
        assert main([str(tmp_path / "all"), "--out", str(tmp_path / board), "--no-cost"]) == 0
    boards = [str(tmp_path / "one"), str(tmp_path / "two")]
    capsys.readouterr()
    assert main([*boards, "--out", str(tmp_path / "both")]) == 2
    told = capsys.readouterr().err
    assert "the entries planted and planted are of the same model, defenses and images, and differ: keep one" in told
    assert told.count("\n") == 1
    assert not (tmp_path / "both").exists()
    assert main([*boards, str(tmp_path / "all"), "--out", str(tmp_path / "both"), "--no-cost"]) == 0
    assert capsys.readouterr().err == ""
    assert main([str(tmp_path / "all" / "cgba"), "--out", str(tmp_path / "both"), "--no-cost"]) == 0
    assert capsys.readouterr().err == "planted is made again without 1 of the runs that it named before\n"


def test_an_entry_that_is_none_is_refused_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "entries").mkdir()
    (tmp_path / "entries" / "own.json").write_text(json.dumps({"kind": "robustbox leaderboard entry"}))
    assert main([str(tmp_path), "--out", str(tmp_path / "site")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_runs_that_began_from_given_rows_are_passed_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plant(tmp_path / "whole", [[(3, 0.5)]], starts=0)
    plant(tmp_path / "given", [[(1, 0.2)]], starts=1)
    assert [run.name for run in find([tmp_path]).runs] == ["whole"]
    assert "given: it began from given rows, whose cost is not known" in capsys.readouterr().err


def test_runs_whose_images_a_total_budget_cut_short_are_passed_over(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plant(tmp_path / "cut", [[(3, 0.5)], []])
    results = tmp_path / "cut" / "results.json"
    document = json.loads(results.read_text())
    document["images"][1]["stop_reason"] = "total-budget"
    results.write_text(json.dumps(document))
    assert find([tmp_path]).runs == []
    assert "its total budget ended before its images' own" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["digits-cnn", "digits-cnn+blacklight", "digits-cnn+input-noise"])
def test_a_true_entry_is_verified(site: Path, runs: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--verify", str(site / "entries" / f"{name}.json"), "--runs", str(runs)]) == 0
    assert capsys.readouterr().out == f"{name}: everything is as the entry says\n"


def test_roots_may_overlap_and_their_folders_may_have_one_name(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for root, name in (("one", "bare"), ("two", "random")):
        shutil.copytree(runs / name, tmp_path / root / "run")
    roots = [str(tmp_path / root) for root in ("one", "two", "one/run")]
    assert len(find(map(Path, roots)).runs) == 2
    assert main([*roots, "--out", str(tmp_path / "site"), "--no-cost"]) == 0
    capsys.readouterr()
    assert main(["--verify", str(tmp_path / "site" / "entries" / "digits-cnn.json"), *roots]) == 0
    assert capsys.readouterr().out == "digits-cnn: everything is as the entry says\n"


def test_images_that_stood_against_pixels_are_verified(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--model", "digits-cnn", "--images", "6", "--attack", "random-pixels", "--epsilon", "1", "--budget", "8"]
    assert attack([*words, "--quiet", "--out", str(tmp_path / "runs" / "pixels")]) == 0
    result = json.loads((tmp_path / "runs" / "pixels" / "results.json").read_text())
    assert any(image["distance"] is None for image in result["images"])
    assert main([str(tmp_path / "runs"), "--out", str(tmp_path / "site"), "--no-cost"]) == 0
    capsys.readouterr()
    entry = str(tmp_path / "site" / "entries" / "digits-cnn.json")
    assert main(["--verify", entry, "--runs", str(tmp_path / "runs")]) == 0
    assert "everything is as the entry says" in capsys.readouterr().out


def test_a_figure_that_its_runs_do_not_make_is_found(
    site: Path, runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    entry = json.loads((site / "entries" / "digits-cnn.json").read_text())
    entry["threats"][0]["attacks"][0]["queries"] += 1
    (tmp_path / "entry.json").write_text(json.dumps(entry))
    assert main(["--verify", str(tmp_path / "entry.json"), "--runs", str(runs)]) == 1
    assert "threats[0].attacks[0].queries" in capsys.readouterr().out


def test_an_adversarial_that_is_none_is_found(
    site: Path, runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The images themselves in place of the adversarials, with the hash of the forged file in the entry."""
    shutil.copytree(runs, tmp_path / "runs")
    path = tmp_path / "runs" / "bare" / "adversarials.safetensors"
    tensors = load_file(path)["adversarials"]
    tensors = torch.where(tensors.isnan(), tensors, load_data("digits")[0][:4])
    entry = (site / "entries" / "digits-cnn.json").read_text()
    true = file_sha256(path)
    save_file({"adversarials": tensors}, path)
    (tmp_path / "entry.json").write_text(entry)
    command = ["--verify", str(tmp_path / "entry.json"), "--runs", str(tmp_path / "runs")]
    assert main(command) == 1
    assert "adversarials_sha256 of" in capsys.readouterr().out
    (tmp_path / "entry.json").write_text(entry.replace(true, file_sha256(path)))
    assert main(command) == 1
    told = capsys.readouterr().out
    assert "its adversarial is at" in told
    assert "does not fool the defended model" in told


def test_a_lost_run_is_named(site: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--verify", str(site / "entries" / "digits-cnn.json"), "--runs", str(tmp_path)]) == 1
    assert "bare: no run with its hashes was found" in capsys.readouterr().out


def test_bad_input_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "other.json").write_text("{}")
    for words, complaint in [
        ([str(tmp_path), "--out", str(tmp_path / "site")], "no complete run and no entry"),
        ([str(tmp_path / "absent"), "--out", str(tmp_path / "site")], "there is no"),
        ([str(tmp_path)], "--out DIR"),
        *(
            ([str(tmp_path), "--out", "x", "--epsilon", word], f"NORM=VALUE, as l2=1.0; not {word}")
            for word in ("l3=1", "l2=0", "l2=nan", "linf=inf")
        ),
        (["--verify", str(tmp_path / "other.json")], "no entry of a leaderboard"),
    ]:
        assert main(words) == 2
        told = capsys.readouterr().err
        assert complaint in told
        assert told.count("\n") == 1
    assert not (tmp_path / "site").exists()
