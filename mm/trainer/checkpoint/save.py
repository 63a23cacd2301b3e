"""A save that all processes make together, each writing what it holds.

Every process writes its files, hashed on the way and synced, and says so; it reads back what the
next process wrote. When all are there and right, the main process writes the state, the index and
the mark, and gives the folder its name. A process that is killed, or whose disk is full, leaves no
mark: the checkpoint before stays the newest.
"""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from mm.disk import disk_error, is_full
from mm.errors import UserError
from mm.hashes import digest
from mm.model.slices import INDEX, file_name, index_text
from mm.model.tensor_file import Planned, write_file
from mm.trainer.checkpoint.check import MARK, SCHEMA, STATE
from mm.trainer.checkpoint.folder import BEST, LATEST, PART, point, require_space, retain, sync
from mm.trainer.checkpoint.held import Files, mine, whole
from mm.trainer.checkpoint.meeting import Gone, Meeting

log = logging.getLogger("mm.trainer")

RETRY_S = (0.2, 1.0, 5.0)  # pauses before another try, when the folder cannot be written


@dataclass(frozen=True)
class Moment:
    """What this process saves of one step.

    Attributes:
        state: JSON-able values, with "step" and "stage"; "data" is this process's own.
        files: its tensors by file, and where those of all are.
        merge: what makes one "data" of those of all processes.
        fill: called before the files are read; what it raises is a fault of the save, on all ranks.
    """

    state: Mapping[str, Any]
    files: Files
    merge: Callable[[list[Any]], Any] = field(default=lambda states: states[0])
    fill: Callable[[], None] = field(default=lambda: None)

    @classmethod
    def of(cls, state: Mapping[str, Any], files: Mapping[str, Mapping[str, Tensor]]) -> Moment:
        """Of whole tensors that one process has."""
        held = {f: {n: whole(t, 0) for n, t in table.items()} for f, table in files.items()}
        return cls(state, held)

    @property
    def n_bytes(self) -> int:
        """Of the tensors of all processes."""
        return sum(h.placed.n_bytes for table in self.files.values() for h in table.values())


def save(
    root: Path,
    moment: Moment,
    keep_last: int,
    keep_every: int = 0,
    on_file: Callable[[Path], Any] = lambda path: None,
    best: int | None = None,
    meeting: Meeting | None = None,
    wrote: Callable[[], Any] = lambda: None,
) -> Path:
    """Write ``root/step_NNNNNN`` and move ``latest`` to it; then remove what need not be kept.

    A folder that cannot be written (a network disk that went away) is tried again by all, then
    given up. Call on all ranks.

    Args:
        root: the run's ``checkpoints`` folder.
        moment: what to write.
        keep_last: complete checkpoints to keep.
        keep_every: those of steps that it divides stay for good; 0 = none.
        on_file: called with every file of tensors that this process has written, then with the
            folder, by the main process when it has its name.
        best: step whose checkpoint stays, too; ``root/best`` names it.
        meeting: the processes; None: this one is alone.
        wrote: called when this process has written its files, before it waits for others.
    Raises:
        UserError: on all ranks; a disk is full or cannot be written. The checkpoints before are
            intact.
    """
    meeting = meeting or Meeting()
    try:
        _save_together(root, moment, meeting, on_file, wrote)
    finally:
        meeting.end()
    final = root / f"step_{moment.state['step']:06d}"
    if meeting.rank == 0:
        if best == moment.state["step"]:
            point(root, BEST, final.name)
        retain(root, keep_last, keep_every, best)
    return final


def _save_together(
    root: Path,
    moment: Moment,
    meeting: Meeting,
    on_file: Callable[[Path], Any],
    wrote: Callable[[], Any],
) -> None:
    """Try until a folder has its name. Raises UserError."""
    step = moment.state["step"]
    for number, pause in enumerate((*RETRY_S, None)):
        one = _Try(root, moment, meeting, number, on_file)
        fault = one(wrote)
        if fault is None:
            return
        if pause is None or fault["last"]:
            if one.own is not None:
                raise one.own
            raise UserError(
                f"{root}: step {step} could not be saved ({moment.n_bytes / 2**20:.0f} MiB): "
                f"{fault['why']}; the checkpoints before it are intact. "
                + fault.get("mend", "Mend the disk and run again")
            ) from one.cause
        if meeting.rank == 0:
            log.warning("%s: %s; trying again in %.1f s", root, fault["why"], pause)
        time.sleep(pause)


class _Try:
    """One try of all processes."""

    cause: Exception | None = None  # of this process
    own: Exception | None = None  # that, where it is no word of the disk

    def __init__(
        self,
        root: Path,
        moment: Moment,
        meeting: Meeting,
        number: int,
        on_file: Callable[[Path], Any],
    ):
        self.root, self.moment, self.meeting, self.on_file = root, moment, meeting, on_file
        self.number = number
        self.name = f"step_{moment.state['step']:06d}"
        # The same on all processes, and of no other save.
        self.part = root / f"{PART}{self.name}_{meeting.name}_{number}"

    def __call__(self, wrote: Callable[[], Any]) -> dict[str, Any] | None:
        """Make it; what went wrong, the same on all processes, or None."""
        me, meeting = self.meeting.rank, self.meeting
        said = self._said(self._write)
        meeting.tell(f"wrote{self.number}", said)
        wrote()
        try:
            following = (me + 1) % meeting.world
            (theirs,) = meeting.hear(f"wrote{self.number}", [following])
            meeting.tell(f"read{self.number}", self._said(lambda: self._read_back(theirs)))
            if me == 0:
                verdict = self._said(self._finish)
                if "why" in verdict:
                    shutil.rmtree(self.part, ignore_errors=True)
                meeting.tell(f"verdict{self.number}", verdict)
            (verdict,) = meeting.hear(f"verdict{self.number}", [0])
            meeting.forget([f"wrote{self.number}", f"read{self.number}"])
            meeting.leave(f"verdict{self.number}")
        except Gone as gone:
            return {"why": str(gone), "last": True, "mend": "Run again"}
        return verdict if "why" in verdict else None

    def _said(self, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What ``work`` gives, or its fault as JSON."""
        try:
            return work()
        except Gone:
            raise
        except _Fault as fault:
            return fault.told
        except Exception as error:  # noqa: BLE001  told to the others, and raised by `save`
            reason = disk_error(error)
            self.cause = error
            told = isinstance(error, UserError)
            if reason is None:
                self.own = error
            why = reason or (str(error) if told else f"{type(error).__name__}: {error}")
            if self.meeting.world > 1:
                why = f"process {self.meeting.rank}: {why}"
            return {"why": why, "last": reason is None or is_full(reason)}

    def _write(self) -> dict[str, Any]:
        """Write the own files; their hashes and sizes."""
        self.moment.fill()
        self.root.mkdir(parents=True, exist_ok=True)
        if self.meeting.rank == 0:
            require_space(self.root, self.moment.n_bytes)
        self.part.mkdir(exist_ok=True)
        tables: dict[str, dict[str, Tensor]] = {}
        for file, name, tensor in mine(self.moment.files):
            tables.setdefault(file, {})[name] = tensor
        hashes = {}
        for file, table in tables.items():
            path = self.part / file_name(file, self.meeting.rank, self.meeting.world)
            hashes[path.name] = [write_tensors(path, table), path.stat().st_size]
            self.on_file(path)
        return {"files": hashes, "data": self.moment.state.get("data")}

    def _read_back(self, theirs: Mapping[str, Any]) -> dict[str, Any]:
        """Compare what another process wrote with the hashes that it made while writing."""
        for name, (found, _) in theirs.get("files", {}).items():
            if digest(self.part / name) != found:
                raise _Fault(f"{name} read back differs from what was written", False)
        return {}

    def _finish(self) -> dict[str, Any]:
        """Write state, index and mark when every process's files are there and right."""
        everyone = range(self.meeting.world)
        wrote = self.meeting.hear(f"wrote{self.number}", everyone)
        read = self.meeting.hear(f"read{self.number}", everyone)
        for said in (*wrote, *read):
            if "why" in said:
                raise _Fault(said["why"], said["last"])
        hashes = {}
        for rank, said in enumerate(wrote):
            for name, (found, size) in said["files"].items():
                if not (self.part / name).is_file() or (self.part / name).stat().st_size != size:
                    raise _Fault(f"{name} of process {rank} is missing", False)
                hashes[name] = found
        state = {"schema": SCHEMA, **self.moment.state}
        if state.get("data") is not None:
            state["data"] = self.moment.merge([said["data"] for said in wrote])
        placed = {f: {n: h.placed for n, h in t.items()} for f, t in self.moment.files.items() if t}
        texts = {STATE: json.dumps(state, indent=1), INDEX: index_text(placed, len(everyone))}
        for name, text in texts.items():
            (self.part / name).write_text(text)
            sync(self.part / name)
            hashes[name] = digest(self.part / name)
        for path in self.part.iterdir():
            if path.name not in hashes:  # of a save that was killed
                path.unlink()
        (self.part / MARK).write_text(json.dumps(hashes, indent=1))
        sync(self.part / MARK)
        sync(self.part)
        final = self.root / self.name
        # a damaged one of the same step: it was passed over at the start
        shutil.rmtree(final, ignore_errors=True)
        self.part.rename(final)
        self.on_file(final)
        point(self.root, LATEST, final.name)
        return {}


class _Fault(Exception):
    def __init__(self, why: str, last: bool):
        super().__init__(why)
        self.told = {"why": why, "last": last}


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """Write a file of tensors onto the disk; its SHA-256, made on the way."""
    plan = [
        Planned(n, tuple(t.shape), t.dtype, lambda t=t: t)
        for n, t in sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    ]
    return write_file(path, plan, {}, sync=True)
