"""CERTIFY against what is known in closed form, and the folder that the command line writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import beta, norm
from torch import Tensor

from robustbox import certify
from robustbox.certificates import ABSTAINED, Certificate, Certifier, certified_share, lower_bound, radius
from robustbox.defense_file import write_defense
from robustbox.defenses.bit_depth import BitDepth
from robustbox.errors import InputError
from robustbox.folder import locked
from robustbox.oracle import Oracle
from robustbox.protocol import REJECTED, Answer, BlackBox
from tests.schema import check_document


class Coin(BlackBox):
    """Class 1 with probability p, else 0, whatever is asked; refuses every row where `refuses`."""

    name, classes = "coin", 2

    def __init__(self, p: float, refuses: bool = False) -> None:
        self.p, self.refuses, self.rows = p, refuses, 0
        self.chance = torch.Generator().manual_seed(5)

    def answer(self, rows: Tensor, accounts: Tensor) -> Answer:
        self.rows += len(rows)
        labels = (torch.rand(len(rows), generator=self.chance) < self.p).long()
        status = torch.full((len(rows),), REJECTED if self.refuses else 0, dtype=torch.uint8)
        return Answer(labels.masked_fill(status > 0, -1), None, status)


class Half(BlackBox):
    """Class 1 where the first value exceeds a threshold: a plane at a known l2 distance from every image."""

    name, classes = "half", 2

    def __init__(self, threshold: float) -> None:
        self.threshold = threshold
        self.seen: list[Tensor] = []

    def answer(self, rows: Tensor, accounts: Tensor) -> Answer:
        self.seen.append(rows.clone())
        return Answer.of((rows[:, 0, 0, 0] > self.threshold).long())


IMAGE = torch.full((1, 2, 2), 0.5)


@pytest.mark.parametrize(
    ("hits", "n", "expected"),
    [
        (9000, 10_000, 0.307),
        (9900, 10_000, 0.553),
        (9990, 10_000, 0.705),
        (10_000, 10_000, 0.7996),
        (5100, 10_000, 0.0),
        (1000, 1000, 0.616),
        (100_000, 100_000, 0.953),
        (0, 100, 0.0),
    ],
)
def test_radii_are_the_known_ones(hits: int, n: int, expected: float) -> None:
    assert radius(hits, n, 0.25, 0.001) == pytest.approx(expected, abs=5e-4)


@pytest.mark.parametrize(("hits", "n"), [(1, 7), (6, 7), (993, 1000), (1000, 1000)])
def test_the_bound_is_one_sided(hits: int, n: int) -> None:
    assert lower_bound(hits, n, 0.01) == pytest.approx(beta.ppf(0.01, hits, n - hits + 1), rel=1e-9)


def test_a_constant_classifier_has_the_largest_radius_at_exactly_so_many_rows() -> None:
    box = Coin(1.0)
    certifier, oracle = Certifier(n0=7, n=1234, batch=100, sigma=0.5), Oracle(box)
    found = certifier.certify(oracle, IMAGE)
    assert found == Certificate(1, pytest.approx(0.5 * norm.ppf(0.001 ** (1 / 1234))), 1234)
    assert found.radius == certifier.largest
    assert box.rows == 7 + 1234
    assert dict(oracle.ledger) == {"certify": 7 + 1234}


def test_a_fair_coin_abstains() -> None:
    certifier, oracle = Certifier(n0=10, n=200), Oracle(Coin(0.5))
    found = [certifier.certify(oracle, IMAGE) for _ in range(300)]
    assert sum(c.predicted == ABSTAINED and c.radius == 0 for c in found) >= 297


def test_no_certificate_of_a_plane_goes_beyond_it_more_often_than_alpha() -> None:
    margin, alpha = 0.2, 0.2
    exact = margin  # the smoothed plane is the plane
    images = IMAGE + torch.linspace(-0.1, 0.1, 400).view(-1, 1, 1, 1) * torch.tensor([0.0, 1, 1, 1]).view(1, 1, 2, 2)
    certifier, oracle = Certifier(n0=20, n=300, alpha=alpha), Oracle(Half(0.5 + margin))
    radii = np.array([certifier.certify(oracle, image).radius for image in images])
    wrong = int((radii > exact).sum())
    assert 0.1 * alpha * 400 < wrong < alpha * 400 + 3 * (alpha * (1 - alpha) * 400) ** 0.5  # tight, and sound
    assert np.median(radii) > 0.8 * exact


def test_the_noise_is_what_it_claims_and_fresh_and_the_images_own() -> None:
    box = Half(9.0)
    Certifier(sigma=0.3, n0=500, n=2000).certify(Oracle(box), IMAGE)
    noise = torch.cat(box.seen) - IMAGE
    assert float(noise.std()) == pytest.approx(0.3, rel=0.03)
    assert float(noise.mean()) == pytest.approx(0, abs=0.01)
    assert len(noise.flatten(1).unique(dim=0)) == 2500
    again, other = Half(9.0), Half(9.0)
    Certifier(sigma=0.3, n0=500, n=2000).certify(Oracle(again), IMAGE)
    Certifier(sigma=0.3, n0=500, n=2000).certify(Oracle(other), IMAGE * 0.9)
    assert all(torch.equal(a, b) for a, b in zip(box.seen, again.seen, strict=True))
    assert not torch.allclose(other.seen[0] - IMAGE * 0.9, box.seen[0] - IMAGE)


def test_clipping_and_rounding_are_part_of_what_is_certified() -> None:
    box = Half(9.0)
    Certifier(sigma=2.0, n0=50, n=50, clip=True).certify(Oracle(box, levels=3), IMAGE)
    assert sorted(torch.cat(box.seen).unique().tolist()) == [0, 0.5, 1]


def test_a_wrong_guess_spends_no_more_rows_where_the_class_is_known() -> None:
    for truth, rows in ((None, 150), (1, 150), (0, 50)):
        box = Coin(1.0)
        certificate = Certifier(n0=50, n=100).certify(Oracle(box), IMAGE, truth)
        assert box.rows == rows
        assert (certificate.predicted == 1, certificate.hits) == ((False, 0) if truth == 0 else (True, 100))


def test_refused_rows_certify_nothing() -> None:
    assert Certifier(n0=5, n=50).certify(Oracle(Coin(1.0, refuses=True)), IMAGE) == Certificate(ABSTAINED, 0.0, 0)


def test_what_cannot_be_certified_is_refused_before_a_row() -> None:
    box = Half(0.7)
    box.stateful = True
    with pytest.raises(InputError, match="depends on what was asked before"):
        Certifier().check(Oracle(box))
    box.stateful, box.levels = False, 256
    with pytest.raises(InputError, match="256 grey levels only"):
        Certifier().check(Oracle(box, levels=256))
    Certifier(clip=True).check(Oracle(box, levels=256))
    for wrong in ({"sigma": 0.0}, {"alpha": 0.5}, {"n": 0}, {"n0": 1.5}, {"sigma": float("inf")}):
        with pytest.raises(InputError):
            Certifier(**wrong)


def test_certified_accuracy_falls_with_the_radius_and_an_abstention_is_never_right() -> None:
    found = [Certificate(0, 0.3, 90), Certificate(ABSTAINED, 0.0, 50), Certificate(1, 0.5, 99), Certificate(1, 0.1, 70)]
    labels = [0, 0, 1, 0]
    shares = [certified_share(found, labels, at)[0] for at in (0, 0.3, 0.31, 0.5, 0.51)]
    assert shares == [2, 2, 1, 1, 0]


ARGUMENTS = ["--model", "digits-cnn", "--images", "4", "--n0", "20", "--n", "200", "--batch", "200", "--quiet"]


def test_the_folder_is_as_documented_and_goes_on_where_it_was_cut_off(tmp_path: Path, root: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert certify.main([*ARGUMENTS, "--out", str(whole)]) == 0
    assert certify.main([*ARGUMENTS, "--out", str(cut)]) == 0
    document = json.loads((whole / "certified.json").read_text())
    accuracies = document["summary"]["certified_accuracy"]
    plain = {at.replace(".", "_"): share for at, share in accuracies.items()}  # a path of the documentation has no dots
    summary = {**document["summary"], "certified_accuracy": plain}
    check_document({**document, "summary": summary}, root / "docs" / "smoothing.md", least=20)
    lines = (cut / "images.jsonl").read_text().splitlines(keepends=True)
    (cut / "certified.json").unlink()
    (cut / "images.jsonl").write_text("".join(lines[:2]) + lines[2][:4])  # killed while it wrote the third
    assert certify.main([*ARGUMENTS, "--out", str(cut)]) == 0
    again = json.loads((cut / "certified.json").read_text())
    assert document["summary"].pop("ledger") == {"certify": 4 * 220}
    assert again["summary"].pop("ledger") == {"certify": 6 * 220}  # two images were asked twice
    assert again == document


@pytest.mark.parametrize(("refuses", "rows"), [(False, 4 * 220), (True, 4 * 20)])
def test_a_dry_run_says_the_most_that_it_can_cost(
    refuses: bool, rows: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where all guesses are refused, the draws that would bound their probability are not asked."""
    box = Coin(1.0, refuses)
    box.classes = 10
    monkeypatch.setattr(certify, "as_black_box", lambda *_: box)
    words = [*ARGUMENTS, "--data", "digits", "--out", str(tmp_path / "out")]
    assert certify.main([*words, "--dry-run"]) == 0
    assert capsys.readouterr().out == "4 images, at most 880 rows on the certify ledger; no row was asked\n"
    assert (box.rows, (tmp_path / "out").exists()) == (0, False)
    assert certify.main(words) == 0
    document = json.loads((tmp_path / "out" / "certified.json").read_text())
    assert document["summary"]["ledger"] == {"certify": rows} == {"certify": box.rows}


def test_rows_of_an_image_that_was_interrupted_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, real = [0], Oracle.ask

    def counting(self: Oracle, *args: Any) -> Answer:
        asked[0] += len(args[0])
        answer = real(self, *args)
        if asked[0] == 2 * 220 + 20:  # in the third image
            raise KeyboardInterrupt
        return answer

    monkeypatch.setattr(Oracle, "ask", counting)
    assert certify.main([*ARGUMENTS, "--out", str(tmp_path)]) == 130
    assert certify.main([*ARGUMENTS, "--out", str(tmp_path)]) == 0
    assert json.loads((tmp_path / "certified.json").read_text())["summary"]["ledger"] == {"certify": asked[0]}
    assert asked[0] == 4 * 220 + 20


def test_certificates_of_another_defense_or_other_images_are_not_taken_for_these(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, data = tmp_path / "own.safetensors", tmp_path / "own.npz"
    draw = np.random.default_rng(0)

    def written(bits: int, images: np.ndarray[Any, Any]) -> list[str]:
        write_defense(file, BitDepth(bits=bits), {})
        np.savez(data, images=images, labels=np.zeros(2, dtype=np.int64))
        return [
            *ARGUMENTS,
            "--images",
            "2",
            "--defense",
            str(file),
            "--data",
            f"npz:{data}",
            "--out",
            str(tmp_path / "out"),
        ]

    images = draw.random((2, 1, 8, 8), dtype=np.float32)
    assert certify.main(written(7, images)) == 0
    for last in ([], ["--dry-run"]):
        assert certify.main([*written(2, images), *last]) == 2
        assert "holds certificates of other defenses: choose another one" in capsys.readouterr().err
        assert certify.main([*written(7, 1 - images), *last]) == 2
        assert "holds certificates of other images: choose another one" in capsys.readouterr().err
        assert certify.main([*written(7, images), *last]) == 0


@pytest.mark.parametrize("last", [[], ["--dry-run"]])
def test_folders_are_refused_before_anything_is_made_there(
    last: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    taken, file, running, other = (tmp_path / name for name in ("taken", "file", "running", "other"))
    taken.mkdir()
    (taken / "letter").touch()
    file.touch()
    assert certify.main([*ARGUMENTS, "--n", "100", "--out", str(other)]) == 0
    with locked(running, "certification"):
        for folder, complaint in (
            (taken, "holds something else"),
            (file, "cannot be written to"),
            (file / "below", "cannot be written to"),
            (running, "another certification is running"),
            (other, "holds another certification"),
        ):
            assert certify.main([*ARGUMENTS, *last, "--out", str(folder)]) == 2
            error = capsys.readouterr().err
            assert complaint in error
            assert error.count("\n") == 1
    assert [path.name for path in taken.iterdir()] == ["letter"]


def test_bad_input_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    for words, complaint in (
        (["--sigma", "0"], "sigma must be a positive number"),
        (["--sigam", "1"], "did you mean --sigma"),
        (["--defense", "blacklight"], "depends on what was asked before"),
        (["--images", "0"], "--images must be from 1"),
        (["--radii", "[0.5, -1]"], "radii must be numbers of at least 0, not -1"),
        (["--radii", "[.inf]"], "radii must be numbers of at least 0, not inf"),
    ):
        assert certify.main([*ARGUMENTS, *words]) == 2
        error = capsys.readouterr().err
        assert complaint in error
        assert error.count("\n") == 1
