"""A save that processes make together: each its own slices, no word of one taken for another's.

The processes are threads with one store; `test_other_world` and ``mm faults`` have real ones.
"""

from __future__ import annotations

import errno
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed import HashStore  # pyright: ignore[reportPrivateImportUsage]

from mm.errors import UserError
from mm.model.slices import Placed, Slices, file_name
from mm.trainer.checkpoint import check, held, meeting, save
from mm.trainer.checkpoint import format as checkpoint
from mm.trainer.checkpoint.held import ANY, Held, spread
from mm.trainer.checkpoint.meeting import Meeting
from mm.trainer.checkpoint.save import Moment

SHAPES = {"embed": (7, 5), "norm": (3,), "up": (4, 2, 3), "scale": (), "gone": (0, 4)}
FULL = {n: torch.randn(s, generator=torch.Generator().manual_seed(1)) for n, s in SHAPES.items()}


def placed(how: str, world: int) -> dict[str, Placed]:
    """As ZeRO cuts: "flat" (stages 1 and 2), "each" (stage 3), "alike" (stage 0)."""
    out, first = {}, 0
    shard = -(-sum(t.numel() for t in FULL.values()) // world)
    for name, t in FULL.items():
        if how == "alike" or not t.numel():
            out[name] = Placed(tuple(t.shape), "F32", ANY)
        elif how == "flat":
            out[name] = Placed(tuple(t.shape), "F32", None, first, shard, False)
        else:
            out[name] = Placed(tuple(t.shape), "F32", None, 0, -(-t.numel() // world), True)
        first += t.numel()
    return out


def moment(how: str, rank: int, world: int, step: int = 2) -> Moment:
    def mine(name: str, place: Placed) -> Tensor | None:
        if place.rank == ANY:
            return FULL[name]
        part = place.on(rank)
        if part.n == place.numel:
            return FULL[name]
        return FULL[name].reshape(-1)[part.start : part.start + part.n] if part.n else None

    table = {n: Held(p, mine(n, p)) for n, p in placed(how, world).items()}
    state = {"step": step, "stage": 0, "data": {"rows": [rank]}, "optimizers": {"model": {}}}
    merge = lambda states: {"rows": [r for s in states for r in s["rows"]]}
    return Moment(state, spread({"model": table}, rank, world), merge)


def together(
    root: Path, world: int, how: str = "flat", step: int = 2, absent: int | None = None, **keep: Any
) -> list[Exception | None]:
    """Save with ``world`` threads, without the ``absent`` one; what each raised."""
    store, raised = HashStore(), [None] * world
    keep = {"keep_last": 9} | keep

    def work(rank: int) -> None:
        try:
            words = Meeting(rank, world, store, f"{step}")
            save.save(root, moment(how, rank, world, step), meeting=words, **keep)
        except Exception as error:  # noqa: BLE001
            raised[rank] = error  # type: ignore[call-overload]

    threads = [threading.Thread(target=work, args=(r,)) for r in range(world) if r != absent]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return raised


@pytest.mark.parametrize("how", ["flat", "each", "alike"])
@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_each_writes_its_own_and_any_range_is_read_back(
    tmp_path: Path, how: str, world: int
) -> None:
    assert together(tmp_path, world, how) == [None] * world
    found = checkpoint.newest(tmp_path)
    assert found is not None and found.state["data"] == {"rows": list(range(world))}
    sizes = [
        (found.folder / file_name("model", rank, world)).stat().st_size
        for rank in range(world)
        if (found.folder / file_name("model", rank, world)).is_file()
    ]
    payload = sum(t.numel() for t in FULL.values()) * 4
    header = 8 + 1200
    assert max(sizes) <= payload / world + header + 4 * 35 * (how == "alike")
    for name, want in FULL.items():
        assert torch.equal(found.tensors("model")[name], want)
        for low in range(want.numel()):
            for high in range(low, want.numel()):
                before = found.slices.n_read
                got = found.read("model", name, low, high - low)
                assert torch.equal(got, want.reshape(-1)[low:high])
                assert found.slices.n_read - before == high - low


def broken(monkeypatch: pytest.MonkeyPatch, rank: int, fault: Callable[[Path], Any]) -> None:
    """What process ``rank`` writes meets a ``fault``."""
    real = save.write_tensors

    def write(path: Path, tensors: Any) -> str:
        hit = f"-{rank + 1:05}-of" in path.name and "000004" in path.parent.name
        if hit and (found := fault(path)) is not None:
            raise found
        sha256 = real(path, tensors)
        if hit:
            fault(path)
        return sha256

    monkeypatch.setattr(save, "write_tensors", write)


@pytest.mark.parametrize("rank", [0, 2])
def test_a_full_disk_of_one_is_told_by_all_and_leaves_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank: int
) -> None:
    together(tmp_path, 4)
    broken(monkeypatch, rank, lambda path: OSError(errno.ENOSPC, "No space left on device"))
    told = together(tmp_path, 4, step=4)
    for error in told:
        assert isinstance(error, UserError)
        assert f"process {rank}: No space left on device; the checkpoints before" in str(error)
    assert checkpoint.newest(tmp_path).state["step"] == 2  # type: ignore[union-attr]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step_000002"]


def test_a_disk_of_one_that_comes_back_is_tried_again_by_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    faults = [OSError(errno.ESTALE, "Stale file handle")]
    broken(monkeypatch, 1, lambda path: faults.pop() if faults else None)
    monkeypatch.setattr(save, "RETRY_S", (0.01,))
    assert together(tmp_path, 3, step=4) == [None] * 3
    assert checkpoint.newest(tmp_path).state["step"] == 4  # type: ignore[union-attr]


@pytest.mark.parametrize("absent", [0, 1, 3])
def test_without_the_word_of_one_there_is_no_mark(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, absent: int
) -> None:
    """It was killed, perhaps with its file half written: the others give up by name."""
    together(tmp_path, 4)
    monkeypatch.setattr(meeting, "TIMEOUT_S", 0.3)
    told = together(tmp_path, 4, step=4, absent=absent)
    said = [str(e) for r, e in enumerate(told) if r != absent]
    assert all(isinstance(e, UserError) for r, e in enumerate(told) if r != absent)
    assert any(f"process {absent} did not finish its part" in text for text in said)
    assert checkpoint.newest(tmp_path).state["step"] == 2  # type: ignore[union-attr]


def test_one_that_came_and_died_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Long before the time that one has to come: its beat stops. One that beats is waited for."""
    monkeypatch.setattr(meeting, "BEAT_S", 0.05)
    monkeypatch.setattr(meeting, "SILENT_S", 0.5)
    store = HashStore()
    here, other = Meeting(0, 2, store, "x"), Meeting(1, 2, store, "x")
    threading.Timer(1.5, other.tell, ("slow", "done")).start()
    assert here.hear("slow", [1]) == ["done"]
    other._over.set()  # as its process ends
    with pytest.raises(meeting.Gone, match="process 1 is gone: it showed no life"):
        here.hear("never", [1])


@pytest.mark.parametrize("fault", ["changed", "removed"])
def test_what_is_not_on_the_disk_as_it_was_written_gets_no_mark(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    def harm(path: Path) -> None:
        if not path.is_file():
            return
        if fault == "removed":
            path.unlink()
        else:
            data = path.read_bytes()
            path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))

    broken(monkeypatch, 1, harm)
    monkeypatch.setattr(save, "RETRY_S", ())
    told = together(tmp_path, 3, step=4)
    assert all(isinstance(error, UserError) for error in told), told
    assert checkpoint.newest(tmp_path) is None


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_a_missing_or_damaged_slice_is_named(
    tmp_path: Path, rank: int, caplog: pytest.LogCaptureFixture
) -> None:
    together(tmp_path, 3)
    together(tmp_path, 3, step=4)
    path = tmp_path / "step_000004" / file_name("model", rank, 3)
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    found = [check.fault_of(path.parent, (r, 3)) for r in range(3)]
    assert sum(fault is not None for fault in found) == 1, "each looks into its share"
    assert checkpoint.newest(tmp_path).state["step"] == 2  # type: ignore[union-attr]
    assert f"{path.name} does not match" in caplog.text
    path.unlink()
    assert check.fault_of(path.parent) == f"{path.name} is missing"
    with pytest.raises(UserError, match=path.name):
        dict(Slices(path.parent).tensors("model"))


def test_an_older_layout_is_refused_in_one_line(tmp_path: Path) -> None:
    together(tmp_path, 1)
    folder = tmp_path / "step_000002"
    (folder / "index.json").unlink()
    state = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps(state | {"schema": 1}))
    names = [p.name for p in folder.iterdir() if p.name != check.MARK]
    hashes = {name: check.digest(folder / name) for name in names}
    (folder / check.MARK).write_text(json.dumps(hashes))
    with pytest.raises(UserError, match=r"older version of this program \(schema 1\)"):
        checkpoint.newest(tmp_path)


def test_large_tensors_that_all_have_alike_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each process has an even share, whatever the largest tensor is; all of them have all."""
    monkeypatch.setattr(held, "UNCUT", 8)
    sizes = {"table": 1000, "b": 300, "c": 11, "scale": 1, "d": 2}
    full = {n: torch.arange(float(k)) for n, k in sizes.items()}
    table = {n: Held(Placed((k,), "F32", ANY), full[n]) for n, k in sizes.items()}
    parts: dict[str, list[Tensor]] = {n: [] for n in sizes}
    loads = []
    for rank in range(4):
        given = spread({"model": table}, rank, 4)["model"]
        mine = {n: h.mine for n, h in given.items() if h.mine is not None}
        assert {n for n, h in given.items() if h.placed.on(rank).n} == {*mine}
        loads.append(sum(t.numel() for t in mine.values()))
        for name, tensor in mine.items():
            assert tensor.data_ptr() >= full[name].data_ptr(), "a view, no copy"
            assert torch.equal(tensor, full[name][tensor[0].int() :][: len(tensor)])
            parts[name].append(tensor)
    assert max(loads) <= 1.125 * sum(sizes.values()) / 4
    assert all(torch.equal(torch.cat(parts[n]), t) for n, t in full.items())
    alone = spread({"model": table}, 0, 1)["model"]
    assert all(h.placed.rank == 0 for h in alone.values()), "one process writes whole tensors"


def test_what_all_have_alike_is_spread_by_size() -> None:
    sizes = {"a": 8, "b": 5, "c": 4, "d": 3}
    table = {n: Held(Placed((k,), "F32", ANY), torch.zeros(k)) for n, k in sizes.items()}
    for rank in range(2):
        given = spread({"model": table}, rank, 2)["model"]
        owners = {n: h.placed.rank for n, h in given.items()}
        assert owners == {"a": 0, "b": 1, "c": 1, "d": 0}
        assert {n for n, h in given.items() if h.mine is not None} == {
            n for n, owner in owners.items() if owner == rank
        }
