"""Checkpoints without a training: who waits for whom, who reads what, what is kept."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from test_run_folder_by_hand import checkpoint
from torch import Tensor, nn
from torch.distributed import HashStore  # pyright: ignore[reportPrivateImportUsage]

from mm.errors import UserError
from mm.run import EngineConfig
from mm.trainer.checkpoint import folder, meeting, resume_check, writer
from mm.trainer.checkpoint.check import MARK, fault_of
from mm.trainer.checkpoint.collect import collect
from mm.trainer.checkpoint.folder import require_space, retain
from mm.trainer.checkpoint.format import Saved
from mm.trainer.checkpoint.meeting import Gone, Meeting
from mm.trainer.checkpoint.save import Moment, _Try
from mm.trainer.checkpoint.writer import Writer


def waiting(
    monkeypatch: pytest.MonkeyPatch, main_lives: bool, looks: list[float], then: Callable[[], None]
) -> Meeting:
    """Process 0 of two that looks at these seconds, before the last one of which `then` is done."""
    ahead = iter(looks)
    clock = SimpleNamespace(now=next(ahead))

    def sleep(seconds: float) -> None:
        clock.now = next(ahead)
        if clock.now == looks[-1]:
            then()

    fake = SimpleNamespace(monotonic=lambda: clock.now, sleep=sleep)
    monkeypatch.setattr(meeting, "time", fake)
    main = SimpleNamespace(is_alive=lambda: main_lives)
    monkeypatch.setattr(meeting, "threading", SimpleNamespace(main_thread=lambda: main))
    made = Meeting.__new__(Meeting)
    made.rank, made.world, made.name, made._own, made._seen = 0, 2, "x", {}, {}
    made._store = HashStore()
    return made


@pytest.mark.parametrize(("main_lives", "longest"), [(True, 1800.0), (False, 20.0)])
def test_others_are_waited_for_as_long_as_it_says(
    monkeypatch: pytest.MonkeyPatch, main_lives: bool, longest: float
) -> None:
    """Half an hour; 20 s where the process is about to end."""
    late = lambda: other.tell("word", "done")
    for last, fits in ((1 + longest, True), (1.5 + longest, False)):
        here = waiting(monkeypatch, main_lives, [1.0, 1.5, last, last + 0.5], late)
        other = Meeting.__new__(Meeting)
        other.rank, other.name, other._own, other._store = 1, "x", {}, here._store
        if fits:
            assert here.hear("word", [1]) == ["done"]
        else:
            with pytest.raises(Gone, match="process 1 did not finish its part"):
                here.hear("word", [1])


def test_whether_others_live_is_asked_once_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    """The store is one process's: thousands that ask at every look would keep it busy."""
    looks = [1.0, 1.5, 2.0, 2.25, 3.0, 3.5, 4.0]
    here = waiting(monkeypatch, True, looks, lambda: here.tell("word", "done"))
    asked: list[tuple[float, list[int]]] = []
    now = meeting.time.monotonic
    monkeypatch.setattr(here, "_look_at", lambda ranks: asked.append((now(), list(ranks))))
    assert here.hear("word", [0]) == ["done"]
    assert asked == [(2.25, [0]), (3.5, [0])]


def test_a_checkpoint_that_cannot_be_removed_ends_no_run(tmp_path: Path) -> None:
    """Here one that was put on another disk: a link to a folder is no folder to remove."""
    other = tmp_path / "disk"
    other.mkdir()
    (other / MARK).write_text("{}")
    root = tmp_path / "checkpoints"
    root.mkdir()
    (root / "step_000004").symlink_to(other)
    for step in (1, 2, 3, 5, 6):
        (root / f"step_{step:06d}").mkdir()
        (root / f"step_{step:06d}" / MARK).write_text("{}")
    retain(root, keep_last=1, keep_every=3, best=1)
    left = {int(path.name[-1]) for path in root.iterdir()}
    assert left == {6, 4, 3, 1}  # the last, the link, of every third, the best
    assert (other / MARK).is_file()


class Words:
    """A meeting of three in which this one is the second, and all have said what they wrote."""

    rank, world, name = 1, 3, "x"

    def __init__(self, wrote: dict[int, Any]) -> None:
        self.wrote = wrote
        self.told: dict[str, Any] = {}

    def tell(self, about: str, value: Any) -> None:
        self.told[about] = value

    def hear(self, about: str, ranks: Iterable[int]) -> list[Any]:
        return [self.wrote[rank] for rank in ranks] if about == "wrote0" else [{}]

    def forget(self, words: Iterable[str]) -> None: ...

    def leave(self, last: str) -> None: ...


def test_each_process_reads_back_what_the_next_one_wrote(tmp_path: Path) -> None:
    """So no process vouches for its own disk."""
    part = tmp_path / ".part_step_000004_x_0"
    part.mkdir()
    wrote: dict[int, Any] = {}
    for rank in range(3):
        (part / f"of_{rank}").write_bytes(b"abc")
        wrote[rank] = {"files": {f"of_{rank}": [hashlib.sha256(b"abc").hexdigest(), 3]}}
    moment = Moment.of({"step": 4}, {"model": {"w": torch.ones(2)}})
    for damaged in range(3):
        (part / f"of_{damaged}").write_bytes(b"abd")
        words: Any = Words(wrote)
        one = _Try(tmp_path, moment, words, 0, lambda path: None)
        assert one(lambda: None) is None
        assert ("why" in words.told["read0"]) == (damaged == 2)
        (part / f"of_{damaged}").write_bytes(b"abc")


def test_a_change_of_a_stage_is_a_warning_and_another_model_no_way_on(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """All else, and how activations are kept, may change: told, but not as a warning."""
    config: dict[str, Any] = {
        "name": "run",
        "seed": 0,
        "model": {"d": 8, "recompute": "none"},
        "stages": [{"lr": 0.5}],
        "stages_kept": 1,
    }
    state = {"step": 4, "stage": 0, "world": 1, "vocabulary": "abc", "config": config}
    state |= {"data": {}, "optimizers": {}, "bytes_per_token": {}}
    saved: Any = SimpleNamespace(state=state, origin="x", folder=Path("x"))
    new = config | {"name": "other", "stages": [{"lr": 0.25}], "stages_kept": 2}
    new["model"] = {"d": 8, "recompute": "all"}
    with caplog.at_level(logging.INFO, "mm.trainer"):
        Saved.require(saved, new, "abc")
    since = "config changed since step 4: "
    assert {r.getMessage().removeprefix(since): r.levelname for r in caplog.records} == {
        "stages.0.lr: 0.5 -> 0.25": "WARNING",
        "model.recompute: none -> all": "INFO",
        "name: run -> other": "INFO",
        "stages_kept: 1 -> 2": "INFO",
    }
    for change in ({"seed": 1}, {"model": {"d": 9, "recompute": "none"}}):
        with pytest.raises(UserError, match=r"(seed|model\.d)' was . and is . now; it cannot"):
            Saved.require(saved, config | change, "abc")
    with pytest.raises(UserError, match="was trained with vocabulary abc, this run has abd"):
        Saved.require(saved, config, "abd")


def test_what_a_checkpoint_has_not_is_called_by_its_name() -> None:
    """A run that goes on with another optimizer is told which state is not there."""

    class Slices:
        files: ClassVar = {"model.optimizer": {"exp_avg/w": ()}}

        def read(self, file: str, name: str, start: int, n: int) -> Tensor:
            assert name in self.files[file]
            return torch.arange(start, start + n)

    saved: Any = SimpleNamespace(slices=Slices())
    assert Saved.read(saved, "model.optimizer", "exp_avg/w", 2, 3).tolist() == [2, 3, 4]
    for file in ("model.optimizer", "critic.optimizer"):
        with pytest.raises(KeyError, match="'momentum/w'"):
            Saved.read(saved, file, "momentum/w", 0, 1)


def test_all_have_written_before_one_waits_for_the_mark(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the thread of one would wait half an hour for a process that is gone."""
    order: list[str] = []
    monkeypatch.setattr(writer, "meet", lambda: order.append("meet"))
    saves = Writer(background=True)
    saves.wait()
    assert order == [], "nothing is under way"
    saves._wrote.set()
    saves._thread = SimpleNamespace(join=lambda: order.append("end"))  # type: ignore[assignment]
    saves.wait()
    saves.wait()
    assert order == ["meet", "end"]


def test_each_process_looks_into_files_of_its_own(tmp_path: Path) -> None:
    """By the order of their names, which is the same everywhere, so that none is left out."""
    names = "abcdefgh"
    made = checkpoint(tmp_path, **{name: name.encode() for name in names})
    for i, name in enumerate(names):
        (made / name).write_bytes(b"other")
        found = [fault_of(made, (rank, 4)) for rank in range(4)]
        at = [rank for rank, fault in enumerate(found) if f"{name} does not match" in str(fault)]
        assert at == [i % 4]
        (made / name).write_bytes(name.encode())


def test_the_hash_of_weights_is_that_of_their_files(tmp_path: Path) -> None:
    """Of one that the mark vouches for; of several the hash of theirs, by process."""
    (tmp_path / MARK).write_text('{"a": "0123", "b": "4567"}')
    paths = {"one": ["a"], "two": ["a", "b"], "swapped": ["b", "a"]}
    saved: Any = SimpleNamespace(folder=tmp_path, slices=SimpleNamespace(paths=paths.__getitem__))
    assert Saved.sha256(saved, "one") == "0123"
    assert Saved.sha256(saved, "two") == hashlib.sha256(b"01234567").hexdigest()
    assert Saved.sha256(saved, "swapped") == hashlib.sha256(b"45670123").hexdigest()


def test_losses_of_the_kept_batch_are_compared_after_tensors_were_cut_anew(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A save from before there were sequence groups had one process a sequence."""
    kept = {"batch": {"value": 1}, "losses": {"x": 2.0}, "precision": "fp32"}
    state = {"probe": kept, "step": 4, "world": 2, "config": {"engine": {"zero_stage": 1}}}
    snapshot: Any = SimpleNamespace(state=state, origin="x", tensors=lambda file: {})
    stage: Any = SimpleNamespace(env=SimpleNamespace(precision="fp32", device=None))
    monkeypatch.setattr(resume_check, "on_main", lambda work, device: work())
    asked: list[int] = []
    found = {"x": 2.0}
    monkeypatch.setattr(resume_check, "losses", lambda *a: asked.append(a[1]) or found)
    check = lambda world, **engine: resume_check.check(
        stage, snapshot, world, EngineConfig(**{"zero_stage": 1, **engine})
    )
    check(2)
    assert asked == []
    for world, engine in ((4, {}), (2, {"zero_stage": 2}), (2, {"sequence": 2})):
        check(world, **engine)
    assert asked == [4] * 3
    found["x"] = 2.0 + 1.5 * 2e-4
    with pytest.raises(UserError, match="was 2 and is 2.0003 after the change from 2 proc"):
        check(4)
    found["x"] = 2.0 + 0.5 * 2e-4  # within 1e-4 of 2
    check(4)


def test_a_disk_must_have_room_for_a_save_and_a_twentieth(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = SimpleNamespace(free=105 * 2**20)
    monkeypatch.setattr(folder.shutil, "disk_usage", lambda path: free)
    require_space(tmp_path, 100 * 2**20)
    free.free -= 1
    with pytest.raises(UserError, match="needs 100 MiB, the disk has 105 MiB free"):
        require_space(tmp_path, 100 * 2**20)


def test_a_checkpoint_holds_carried_states_and_no_network_that_a_folder_gives() -> None:
    rows = {"x": object()}
    stage: Any = SimpleNamespace(
        engines={},
        frozen={"given": nn.Linear(1, 1), "copy": nn.Linear(1, 1, bias=False)},
        from_folders=("given",),
        nets=SimpleNamespace(carried=SimpleNamespace(own_rows=lambda: rows)),
    )
    files, scalars = collect(stage)
    assert files.keys() == {"copy", "carried_states"} and files["carried_states"] is rows
    assert files["copy"].keys() == {"weight"} and scalars == {}
