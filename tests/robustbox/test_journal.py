"""The journal: a run stopped anywhere goes on as if it had never stopped, and buys no row twice but those in flight."""

from __future__ import annotations

import json
import shutil
import sqlite3
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from robustbox.api import run_attack
from robustbox.defenses.blacklight import Blacklight
from robustbox.defenses.input_noise import InputNoise
from robustbox.defenses.random_features import RandomFeatures
from robustbox.errors import InputError, ModelError, StorageError
from robustbox.events import EventLog
from robustbox.folder import read_run
from robustbox.journal import Journal
from robustbox.journaled import digest, fingerprints, packed, unpacked
from robustbox.protocol import Answer, Task
from tests.schema import without_times
from tests.toys import Failing, HalfSpace, Scripted, Search, Walk, images

SHAPE = (3, 8, 8)
GATE = Blacklight(action="ban", strikes=3)


class Photographed(HalfSpace):
    """A half-space that copies the run's folder while it is asked: what a kill at that moment leaves on the disk."""

    def __init__(self, folder: Path, copies: Path) -> None:
        super().__init__()
        self.folder, self.copies = folder, copies

    def answer(self, rows: Tensor, accounts: Tensor) -> Answer:
        shutil.copytree(self.folder, self.copies / f"{len(self.passes):03d}")
        return super().answer(rows, accounts)


def attack_it(box: Any, out: Path | None, **changes: Any) -> Any:
    setting: dict[str, Any] = {"attack": "cgba", "budget": 40, "max_rows": 7, "seed": 5, **changes}
    count = setting.pop("count", 3)
    return run_attack(box, setting.pop("images", images(count)), setting.pop("labels", [0] * count), out=out, **setting)


def outcome(folder: Path) -> tuple[dict[str, Any], bytes]:
    """What a run found, without when and how fast, and in how many sessions."""
    document, adversarials = read_run(folder)
    return without_times(document), adversarials.numpy().tobytes()


SETTINGS: dict[str, dict[str, Any]] = {
    "labels": {},
    "scores": {"attack": "square", "epsilon": 0.1, "norm": "linf", "knowledge": "score"},
    "eot": {"eot": 3, "levels": 256},
    "noise in this process": {"defense": InputNoise(0.02)},
    "a gate in this process": {"defense": GATE, "accounts": None},
    "noise behind a gate of all clients": {"defense": [Blacklight(scope="global"), InputNoise(0.02)]},
    "a decoy": {"defense": Blacklight(action="decoy")},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_run_killed_at_any_pass_goes_on_as_if_it_had_not_been(name: str, tmp_path: Path) -> None:
    setting = SETTINGS[name]
    whole = Photographed(tmp_path / "run", tmp_path / "killed")
    attack_it(whole, tmp_path / "run", **setting)
    bare = HalfSpace()
    attack_it(bare, None, **setting)
    assert bare.passes == whole.passes  # a journal changes nothing
    copies = sorted((tmp_path / "killed").iterdir())
    assert len(copies) == len(whole.passes) > 8
    for asked, copy in list(enumerate(copies))[:: max(len(copies) // 4, 1)]:
        box = HalfSpace()
        attack_it(box, copy, **setting)
        assert outcome(copy) == outcome(tmp_path / "run")
        assert box.passes == whole.passes[asked:]  # the first of them was in flight
        for mine, theirs in zip(box.seen, whole.seen[asked:], strict=True):
            torch.testing.assert_close(mine, theirs, rtol=0, atol=0)
        document = read_run(copy)[0]
        assert document["complete"]
        assert document["journal"] == {"sessions": 2, "in_flight": whole.passes[asked]}


def test_noise_in_the_network_goes_on_where_it_was(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 16), torch.nn.ReLU(), torch.nn.Linear(16, 2))
    labels = network.eval()(images(3)).argmax(dim=1).tolist()
    calls, limit = 0, 10**9

    def kill(*_: object) -> None:
        nonlocal calls
        calls += 1
        if calls > limit:
            raise SystemExit

    network.register_forward_pre_hook(kill)
    setting: dict[str, Any] = {"defense": RandomFeatures(at="1", nu=0.3), "labels": labels}
    attack_it(network, tmp_path / "whole", **setting)
    whole, calls = calls, 0
    for stop in (5, 12, 10**9):
        limit = stop
        try:
            attack_it(network, tmp_path / "run", **setting)
        except SystemExit:
            calls -= 1  # in flight
    assert calls == whole
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")
    assert read_run(tmp_path / "run")[0]["journal"]["sessions"] == 3


def test_a_run_killed_again_and_again(tmp_path: Path) -> None:
    whole, service = HalfSpace(), HalfSpace()
    attack_it(whole, tmp_path / "whole")
    sessions = 0

    def kill(box: HalfSpace, allowed: int) -> Callable[[Tensor, Tensor], Answer]:
        def answer(rows: Tensor, accounts: Tensor) -> Answer:
            nonlocal allowed
            allowed -= 1
            got = HalfSpace.answer(box, rows, accounts)
            if allowed < 0:
                raise SystemExit  # answered and paid for, but lost
            return got

        return answer

    while not (tmp_path / "run" / "results.json").exists():
        sessions += 1
        service.answer = kill(service, sessions)  # type: ignore[method-assign]
        try:
            attack_it(service, tmp_path / "run")
        except SystemExit:
            continue
    assert sessions > 4
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")
    document = read_run(tmp_path / "run")[0]
    assert document["journal"]["sessions"] == sessions
    assert service.rows == whole.rows + document["journal"]["in_flight"]
    assert len(service.passes) == len(whole.passes) + sessions - 1


def test_sizes_learnt_from_the_clock_are_learnt_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draws = np.random.default_rng(0)
    time = 0.0

    def clock() -> float:
        nonlocal time
        time += float(draws.exponential())
        return time

    monkeypatch.setattr("time.perf_counter", clock)
    setting = {"max_rows": "auto", "budget": 300, "attack": Walk(size=20), "count": 4}
    whole = Photographed(tmp_path / "run", tmp_path / "killed")
    first = attack_it(whole, tmp_path / "run", **setting)
    sizes = set(whole.passes)
    assert len({size for size in sizes if size & (size - 1) == 0}) > 2  # it tried several
    for asked in (1, 5, 11, len(whole.passes) - 1):
        box, copy = HalfSpace(), tmp_path / "killed" / f"{asked:03d}"
        again = attack_it(box, copy, **{**setting, "attack": Walk(size=20)})
        known = whole.passes[:asked]
        assert box.passes[0] == whole.passes[asked]
        assert sum(known) + sum(box.passes) == whole.rows
        assert again.distance.tolist() == first.distance.tolist()
        with sqlite3.connect(copy / "journal.sqlite") as file:
            times = b"".join(row[0] for row in file.execute("SELECT times FROM events ORDER BY id"))
        readings = np.frombuffer(times)
        assert (np.diff(readings) >= 0).all()
        assert sum(read_run(copy)[0]["seconds"].values()) == pytest.approx(readings[-1] - readings[0])
    time = -1e6  # the clock of another machine
    box = HalfSpace()
    attack_it(box, tmp_path / "killed" / "006", **{**setting, "attack": Walk(size=20)})
    assert min(read_run(tmp_path / "killed" / "006")[0]["seconds"].values()) >= 0


def test_a_service_that_answers_at_random_is_not_asked_again(tmp_path: Path) -> None:
    """Its draws are its own and go on in the service; the run is stopped where nothing is in flight."""

    class Service(HalfSpace):
        stochastic = True

        def __init__(self) -> None:
            super().__init__()
            self.generator = torch.Generator().manual_seed(1)

        def of(self, rows: Tensor) -> Answer:
            answer = super().of(rows)
            return Answer.of(answer.labels ^ (torch.rand(len(rows), generator=self.generator) < 0.1).long())

    class Killed(BaseException):
        pass

    whole, service = Service(), Service()
    attack_it(whole, tmp_path / "whole")

    def kill(state: Any) -> None:
        if state.rows > 50:
            raise Killed

    with pytest.raises(Killed):
        attack_it(service, tmp_path / "run", progress=kill)
    assert 0 < service.rows < whole.rows
    attack_it(service, tmp_path / "run")
    assert service.passes == whole.passes
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")


def test_a_model_with_a_stream_of_its_own_is_told_what_it_is_not_asked(tmp_path: Path) -> None:
    class Drawing(Photographed):
        stochastic = True
        draws = 0

        def answer(self, rows: Tensor, accounts: Tensor) -> Answer:
            answer = super().answer(rows, accounts) if self.folder.exists() else HalfSpace.answer(self, rows, accounts)
            self.draws += len(rows)
            flips = torch.arange(self.draws - len(rows), self.draws) % 7 == 0
            return Answer.of(answer.labels ^ flips.long())

        def skip(self, rows: Tensor, accounts: Tensor, answered: bool) -> None:
            self.draws += len(rows) * answered

    attack_it(Drawing(tmp_path / "run", tmp_path / "killed"), tmp_path / "run")
    box = Drawing(tmp_path / "no", tmp_path)
    attack_it(box, tmp_path / "killed" / "009")
    assert outcome(tmp_path / "killed" / "009") == outcome(tmp_path / "run")


def test_a_pass_that_the_device_could_not_hold_is_halved_again(tmp_path: Path) -> None:
    class Small(Photographed):
        def answer(self, rows: Tensor, accounts: Tensor) -> Answer:
            if len(rows) > 4:
                raise torch.OutOfMemoryError
            return super().answer(rows, accounts)

    setting = {"attack": Walk(size=6), "budget": 30, "count": 2, "max_rows": 8}
    whole = Small(tmp_path / "run", tmp_path / "killed")
    attack_it(whole, tmp_path / "run", **setting)
    box = HalfSpace()  # a larger device
    attack_it(box, tmp_path / "killed" / "007", **{**setting, "attack": Walk(size=6)})
    assert box.passes == whole.passes[7:]
    assert read_run(tmp_path / "killed" / "007")[0]["journal"]["in_flight"] == whole.passes[7]
    assert read_run(tmp_path / "run")[0]["journal"]["in_flight"] == 0


@pytest.mark.parametrize(
    ("wrong", "lost"),
    {
        "it raises": (lambda answer: 1 / 0, True),
        "NaN": (lambda answer: Answer.of(answer.labels, answer.scores * torch.nan), True),
        "too few": (lambda answer: Answer.of(answer.labels[1:]), True),
    }.values(),
)
def test_a_model_on_a_bad_day_is_asked_again(tmp_path: Path, wrong: Any, lost: bool) -> None:
    whole = HalfSpace()
    attack_it(whole, tmp_path / "whole")
    box = Failing(30, wrong)
    with pytest.raises(ModelError):
        attack_it(box, tmp_path / "run")
    document = read_run(tmp_path / "run")[0]
    assert not document["complete"]
    asked, box.after = box.passes.copy(), 10**9
    attack_it(box, tmp_path / "run")
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")
    assert read_run(tmp_path / "run")[0]["journal"] == {"sessions": 2, "in_flight": asked[-1]}
    assert box.passes == [*asked, *whole.passes[len(asked) - 1 :]]


def started(tmp_path: Path, at: int = 6) -> Path:
    """The folder of a run that was killed while pass number `at` was in flight."""
    attack_it(Photographed(tmp_path / "run", tmp_path / "killed"), tmp_path / "run")
    return tmp_path / "killed" / f"{at:03d}"


FOREIGN: dict[str, dict[str, Any]] = {
    "seed": {"seed": 6},
    "budget": {"budget": 41},
    "attack": {"attack": "surfree"},
    "attack .": {"attack_options": {"n0": 11}},
    "images": {"images": images(3, seed=1)},
    "images .": {"images": images(3).flip(0)},
    "images, targeted": {"targets": 1},
    "defense": {"defense": InputNoise(0.01)},
    "knowledge": {"knowledge": "score"},
    "max_rows": {"max_rows": 8},
    "eot": {"eot": 2},
    "pool": {"pool": (images(4, seed=3), [0] * 4)},
    "total_budget": {"total_budget": 100},
}


@pytest.mark.parametrize("name", FOREIGN)
def test_another_runs_journal_is_refused(tmp_path: Path, name: str) -> None:
    folder, box = started(tmp_path), HalfSpace()
    before = sorted(path.name for path in folder.iterdir())
    with pytest.raises(InputError, match=f"another run .its {name.split(' ')[0].strip(',')}"):
        attack_it(box, folder, **FOREIGN[name])
    assert box.rows == 0
    assert {*before} >= {path.name for path in folder.iterdir()} >= {"config.yaml", "journal.sqlite"}
    attack_it(box, folder)  # and is as good as before
    assert outcome(folder) == outcome(tmp_path / "run")


def test_another_model_is_another_run(tmp_path: Path) -> None:
    class Other(HalfSpace):
        name = "another half-space"

    with pytest.raises(InputError, match="its model differ"):
        attack_it(Other(), started(tmp_path))


def test_a_run_that_asks_other_rows_than_before_is_stopped(tmp_path: Path) -> None:
    def asks(value: float) -> Scripted:
        def script(task: Task) -> Search:
            from robustbox.protocol import Query

            for step in (0.0, 0.01, value):
                yield Query((task.image + step).clamp(0, 1)[None])

        return Scripted(script)

    attack_it(Photographed(tmp_path / "run", tmp_path / "killed"), tmp_path / "run", attack=asks(0.02), max_rows=1)
    box = HalfSpace()
    with pytest.raises(InputError, match="asks other rows than it did before"):
        attack_it(box, tmp_path / "killed" / "011", attack=asks(0.03), max_rows=1)
    assert box.rows == 0


@pytest.mark.parametrize("where", ["file", "log"])
def test_a_flipped_byte_is_found_or_harmless(tmp_path: Path, where: str) -> None:
    folder, whole = started(tmp_path, 12), HalfSpace()
    attack_it(whole, None)
    passes = whole.passes
    if where == "file":  # fold the log into the file
        sqlite3.connect(folder / "journal.sqlite").execute("PRAGMA wal_checkpoint(TRUNCATE)").connection.close()
    name = {"file": "journal.sqlite", "log": "journal.sqlite-wal"}[where]
    sound = (folder / name).read_bytes()
    found = 0
    for position in range(3, len(sound), 211 if where == "file" else 2501):
        copy = shutil.copytree(folder, tmp_path / f"{position}")
        (copy / name).write_bytes(sound[:position] + bytes([sound[position] ^ 0x55]) + sound[position + 1 :])
        box = HalfSpace()
        complaint = None
        try:
            attack_it(box, copy)
        except InputError as error:
            complaint = str(error)
        if complaint is not None:
            assert "is damaged" in complaint or "has format" in complaint
            assert "\n" not in complaint
            assert box.rows == 0
            found += 1
        else:  # in bytes that hold nothing, or in the last event, which then looks like one that was never written
            assert outcome(copy) == outcome(tmp_path / "run")
            assert box.passes in (passes[11:], passes[12:])
        shutil.rmtree(copy)
    assert found > 10


def test_a_log_cut_anywhere_is_a_kill_a_little_earlier(tmp_path: Path) -> None:
    folder, whole = started(tmp_path, 12), HalfSpace()
    attack_it(whole, None)
    log = (folder / "journal.sqlite-wal").read_bytes()
    asked = []
    for size in range(33, len(log), len(log) // 9):
        copy, box = shutil.copytree(folder, tmp_path / f"{size}"), HalfSpace()
        (copy / "journal.sqlite-wal").write_bytes(log[:size])
        attack_it(box, copy)
        assert outcome(copy) == outcome(tmp_path / "run")
        asked.append(box.rows)
    assert all(later <= earlier for earlier, later in pairwise(asked))


def test_a_truncated_journal_is_damaged(tmp_path: Path) -> None:
    folder = started(tmp_path)
    attack_it(HalfSpace(), folder)
    content = (folder / "journal.sqlite").read_bytes()
    for size in (100, 4096, len(content) // 2 // 4096 * 4096, len(content) - 512):
        (folder / "journal.sqlite").write_bytes(content[:size])
        with pytest.raises(InputError, match="is damaged"):
            attack_it(HalfSpace(), folder)
    attack_it(HalfSpace(), folder, fresh=True)
    assert outcome(folder) == outcome(tmp_path / "run")


@pytest.mark.parametrize("state", ["killed", "complete", "damaged", "foreign"])
def test_starting_over_has_to_be_said(tmp_path: Path, state: str) -> None:
    folder, box = started(tmp_path), HalfSpace()
    if state == "complete":
        attack_it(HalfSpace(), folder)
    elif state == "damaged":
        (folder / "journal.sqlite").write_bytes(b"no database at all" * 400)
        (folder / "journal.sqlite-wal").unlink()  # which holds it all
    elif state == "foreign":
        attack_it(HalfSpace(), folder, seed=6, fresh=True)
    if state != "killed":
        with pytest.raises(InputError, match=r"fresh=True"):
            attack_it(HalfSpace(), folder)
    attack_it(box, folder, fresh=True)
    assert outcome(folder) == outcome(tmp_path / "run")
    assert read_run(folder)[0]["journal"] == {"sessions": 1, "in_flight": 0}
    assert box.rows == sum(read_run(folder)[0]["summary"]["ledger"].values())


def test_of_two_runs_in_one_folder_the_second_is_told(tmp_path: Path) -> None:
    box, told = HalfSpace(), []

    def second(state: Any) -> None:
        for fresh in () if told else (False, True):
            with pytest.raises(InputError, match="another run is writing to") as error:
                attack_it(box, tmp_path / "run", fresh=fresh)
            told.append(error)

    attack_it(HalfSpace(), tmp_path / "run", attack=Walk(size=40), progress=second)
    assert told
    assert box.rows == 0
    assert read_run(tmp_path / "run")[0]["complete"]


def test_a_full_disk_ends_the_run_and_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, box = HalfSpace(), HalfSpace()
    attack_it(whole, tmp_path / "whole")
    append, left = EventLog.append, 15

    def full(self: EventLog, event: Any) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            self._database.execute("PRAGMA max_page_count = 1")
            self._database.execute("PRAGMA query_only = 1")  # as SQLite answers where it cannot write
        append(self, event)

    monkeypatch.setattr(EventLog, "append", full)
    with pytest.raises(StorageError, match="cannot be written"):
        attack_it(box, tmp_path / "run")
    assert not (tmp_path / "run" / "results.json").exists()
    monkeypatch.undo()
    attack_it(box, tmp_path / "run")
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")
    assert box.rows == whole.rows + read_run(tmp_path / "run")[0]["journal"]["in_flight"]


def test_results_that_cannot_be_written_cost_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    box, write = HalfSpace(), Path.write_bytes

    def full(self: Path, content: bytes) -> int:
        if "results" in self.name:
            raise OSError(28, "No space left on device")
        return write(self, content)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(StorageError, match="No space left on device"):
        attack_it(box, tmp_path / "run")
    monkeypatch.undo()
    asked = box.rows
    attack_it(box, tmp_path / "run")
    assert box.rows == asked
    assert read_run(tmp_path / "run")[0]["complete"]


def test_bad_input_after_the_clean_check_leaves_no_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no image is classified correctly"):
        attack_it(HalfSpace(), tmp_path / "run", labels=[1, 1, 1])
    assert not (tmp_path / "run").exists()


def test_a_defended_model_of_the_callers_is_his_again_afterwards(tmp_path: Path) -> None:
    model = Photographed(tmp_path / "run", tmp_path / "killed")
    defended = GATE.wrap(model, 3)
    attack_it(defended, tmp_path / "run", accounts=None)
    assert defended.inner is model
    attack_it(GATE.wrap(HalfSpace(), 3), tmp_path / "killed" / "008", accounts=None)
    assert outcome(tmp_path / "killed" / "008") == outcome(tmp_path / "run")


# Its parts.


@settings(max_examples=50)
@given(st.data())
def test_answers_come_back_bit_by_bit(data: st.DataObject) -> None:
    n, k = data.draw(st.integers(1, 5)), data.draw(st.integers(2, 4))
    labels = torch.tensor(
        data.draw(
            st.lists(st.integers(-1, data.draw(st.sampled_from([100, 999, 40000, 2**40]))), min_size=n, max_size=n)
        )
    )
    status = torch.tensor(data.draw(st.lists(st.integers(0, 2), min_size=n, max_size=n)), dtype=torch.uint8)
    dtype = data.draw(st.sampled_from([None, torch.float16, torch.bfloat16, torch.float32, torch.float64]))
    scores = None if dtype is None else torch.randn(n, k, generator=torch.Generator().manual_seed(n)).to(dtype)
    box = HalfSpace(classes=data.draw(st.sampled_from([2, 1000])))
    back, kind, classes = unpacked(packed(Answer(labels, scores, status), box, True), n, torch.device("cpu"))
    assert (kind, classes) == (box.scores, box.classes)
    assert back.labels.tolist() == labels.tolist()
    assert back.labels.dtype == torch.int64
    assert back.status.tolist() == status.tolist()
    assert back.status.dtype == torch.uint8
    if scores is None:
        assert back.scores is None
    else:
        assert back.scores is not None
        assert back.scores.dtype == dtype
        assert torch.equal(back.scores, scores)


@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 3, 3), (1, 1, 1), (3, 5, 7)])
def test_every_bit_of_a_row_counts_and_no_neighbour(shape: tuple[int, int, int]) -> None:
    rows = torch.rand(4, *shape, generator=torch.Generator().manual_seed(0))
    all_of_them = fingerprints(rows)
    assert all_of_them.unique().numel() == 4
    for k in range(4):
        assert fingerprints(rows[k : k + 1]).item() == all_of_them[k]
    values = rows[0].flatten().numpy().view(np.int32)
    for position in range(0, len(values), max(len(values) // 9, 1)):
        for bit in range(32):
            changed = values.copy()
            changed[position] ^= np.int32(np.uint32(1 << bit).view(np.int32))
            row = torch.from_numpy(changed.view(np.float32).reshape(1, *shape))
            assert fingerprints(row).item() != all_of_them[0]


def test_two_pixels_of_few_grey_levels_do_not_cancel() -> None:
    grey = torch.tensor([0.0, 0.5, 1.0])[
        torch.randint(0, 3, (4000, 1, 4, 4), generator=torch.Generator().manual_seed(0))
    ]
    distinct = grey.flatten(1).unique(dim=0).shape[0]
    assert fingerprints(grey).unique().numel() == distinct


def test_order_and_senders_count() -> None:
    rows, accounts = images(3), torch.tensor([4, 5, 6])
    seen = {
        digest(rows, accounts),
        digest(rows.flip(0), accounts),
        digest(rows, accounts.flip(0)),
        digest(rows[:2], accounts[:2]),
    }
    assert len(seen) == 4
    assert digest(rows.clone(), accounts.clone()) in seen


def test_labels_alone_cost_few_bytes() -> None:
    answer = Answer.of(torch.randint(0, 100, (1000,)), torch.rand(1000, 100))
    assert len(packed(answer, HalfSpace(classes=100), False)) < 1020


def test_the_clock_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([*range(100, 120), *range(7, 30)])
    monkeypatch.setattr("time.perf_counter", lambda: float(next(clock)))
    journal = Journal(tmp_path / "journal.sqlite")
    journal.begin({"seed": 1})
    told = [journal.now(), journal.now()]
    journal.send(b"x", 3)
    journal.receive(b"answer", 3)
    told += [journal.now(), journal.now()]
    journal.send(b"y", 2)
    journal.now()  # known to nobody: no event came after it
    journal.close()
    journal = Journal(tmp_path / "journal.sqlite")
    assert (journal.sessions, journal.sent, journal.answered, journal.in_flight) == (1, 5, 3, 2)
    journal.begin({"seed": 1})
    assert [journal.now(), journal.now()] == told[:2]
    assert journal.replay(b"x", 3) == (b"answer", 1)
    assert [journal.now(), journal.now()] == told[2:]
    assert journal.replay(b"y", 2) == (None, 1)
    journal.send(b"y", 2)
    journal.receive(b"later", 2)
    assert told[-1] < journal.now() < told[-1] + 3
    journal.end()
    journal.close()
    assert Journal(tmp_path / "journal.sqlite").finished
    assert json.dumps(told) == json.dumps(sorted(told))
