"""Which cells may be cut, how they are put together again, and that a cut stays as it was begun."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from robustbox.auditing.cells import Cell, run_cell
from robustbox.auditing.world import World
from robustbox.boxes import CallableBox
from robustbox.config import AttackConfig
from robustbox.folder import finite, read_run
from robustbox.shards import cut, merge, result_of, run_shard
from tests.schema import without_times
from tests.toys import images


def bright(rows: Any) -> Any:
    margin = torch.stack([row.double().mean() for row in rows]) - 0.6
    return torch.stack([-margin, margin], dim=1).float()


GREY = images(6)
TWICE = torch.cat([GREY[:5], GREY[:1]])
LABELS = [0] * 6


def cell(folder: Path, **changes: Any) -> Cell:
    setting = {"model": "toy", "data": "grey", "images": 6, "budget": 30, "epsilon": 0.9, **changes}
    config = AttackConfig(out=str(folder / "cells" / "one"), **setting)
    return Cell("one", "toy", "none", "cgba", "l2", 30, config)


def world(model: Any = bright) -> World:
    return World({"toy": model}, {"grey": (GREY, LABELS), "twice": (TWICE, LABELS)})


def random_box() -> CallableBox:
    box = CallableBox(bright)
    box.stochastic = True
    return box


@pytest.mark.parametrize(
    ("changes", "model", "pieces"),
    {
        "plain": ({}, bright, 3),
        "a gate that tells accounts apart": ({"defense": "blacklight"}, bright, 3),
        "a gate of all clients": ({"defense": "blacklight", "defense_options": {"scope": "global"}}, bright, 0),
        "a total budget": ({"total_budget": 50}, bright, 0),
        "chance of the model's own": ({}, random_box(), 0),
        "an image that comes twice": ({"data": "twice"}, bright, 0),
        "few images": ({"images": 2}, bright, 0),
        "an attack that learns apart": ({"attack": "waterfill"}, bright, 3),
        "an attack that learns from all images": (
            {"attack": "waterfill", "attack_options": {"share_prior": True}},
            bright,
            0,
        ),
        "such an attack, wrapped: it never shares": (
            {"attack": "oars:waterfill", "attack_options": {"share_prior": True}},
            bright,
            3,
        ),
    }.values(),
)
def test_a_cell_is_cut_where_its_images_share_nothing(
    tmp_path: Path, changes: dict[str, Any], model: Any, pieces: int
) -> None:
    shards = cut(cell(tmp_path, **changes), world(model), 2)
    assert [(shard.start, shard.stop) for shard in shards] == [(0, 2), (2, 4), (4, 6)][:pieces]


def test_a_cut_stays_as_it_was_begun_and_a_begun_cell_whole(tmp_path: Path) -> None:
    assert len(cut(cell(tmp_path), world(), 4)) == 2
    assert len(cut(cell(tmp_path), world(), 1)) == 2
    begun = cell(tmp_path / "begun")
    begun.folder.mkdir(parents=True)
    (begun.folder / "journal.sqlite").touch()
    assert cut(begun, world(), 2) == []


def test_shards_are_put_together_and_can_be_read_back(tmp_path: Path) -> None:
    whole = cell(tmp_path)
    shards = cut(whole, world(), 4)
    for shard in shards:
        run_shard(shard, world())
        run_shard(shard, world(lambda rows: 1 / 0))  # done: it is not asked again
    merge(whole, shards, world())
    document, adversarials = read_run(whole.folder)
    assert document["complete"]
    assert [image["index"] for image in document["images"]] == list(range(6))
    assert not (tmp_path / "shards").exists()
    again = result_of(document, adversarials)
    assert finite(again.summary()) == document["summary"]
    assert sum(again.ledger.values()) == sum(document["summary"]["ledger"].values())


def test_what_a_gate_saw_is_added_up(tmp_path: Path) -> None:
    gated = {"defense": "blacklight", "defense_options": {"action": "silent"}, "max_rows": 8}
    whole, apart = cell(tmp_path / "whole", **gated), cell(tmp_path / "apart", **gated)
    assert run_cell(whole, world()).error is None
    shards = cut(apart, world(), 2)
    for shard in shards:
        run_shard(shard, world())
    merge(apart, shards, world())
    (one, _), (two, _) = (read_run(each.folder) for each in (whole, apart))
    assert one["summary"]["hits"] > 0
    for what in ("hits", "first_hit"):
        assert [image[what] for image in one["images"]] == [image[what] for image in two["images"]]
    seen, summed = (without_times(document)["pipeline"][0]["statistics"] for document in (one, two))
    assert seen["hits"] == one["summary"]["hits"] == sum(image["hits"] for image in one["images"])
    assert summed == seen
