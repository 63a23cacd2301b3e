"""A training process with a fault in it: what the forked children of `mm faults` run."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mm.errors import UserError

USER_ERROR = 2  # exit code of the command line for a UserError


def run(spec: Mapping[str, Any], rank: int) -> None:
    """Train ``spec["run"]`` as one of ``spec["world"]`` processes, with ``spec["faults"]``.

    The exit code is the command line's: 0, 2 (UserError, its text in ``spec["said"]``), 75, 76.
    """
    sys.stdout = sys.stderr = open(f"{spec['said']}.{rank}", "w", buffering=1)  # noqa: SIM115
    os.dup2(sys.stderr.fileno(), 2)
    world = spec["world"]
    os.environ |= spec["env"]
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(spec["port"]),
    }
    import logging

    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, force=True)
    from mm.run import Run
    from mm.trainer.loop import Trainer

    try:
        trainer = Trainer(Run.model_validate(spec["run"]))
        for name, options in spec["faults"].items():
            if options.get("rank", rank) == rank:
                INJECT[name](trainer, options)
        trainer.fit()
    except UserError as error:
        sys.stderr.write(f"UserError: {error}\n")
        sys.exit(USER_ERROR)


def call(spec: Mapping[str, Any], name: str, *args: Any) -> None:
    """Run one function of this module with its prints in ``spec["said"]``."""
    sys.stdout = sys.stderr = open(f"{spec['said']}.0", "w", buffering=1)  # noqa: SIM115
    os.environ |= spec["env"]
    globals()[name](spec, *args)


# ---- faults -----------------------------------------------------------------


def _before(trainer: Any, phase: str, step: int, act: Callable[[], None]) -> None:
    """Call ``act`` once, when ``phase`` of optimizer step ``step`` (from 1) begins."""
    done: list[int] = []

    def once() -> None:
        if not done:
            done.append(1)
            act()

    if phase == "data":
        enter = trainer._enter

        def entered(*args: Any) -> None:
            enter(*args)
            following = trainer.stream.next

            def wait() -> Any:
                if trainer.step + 1 == step:
                    once()
                return following()

            trainer.stream.next = wait

        trainer._enter = entered
        return
    if phase in ("start", "index"):
        name = {"start": "_open", "index": "_enter"}[phase]
        following = getattr(trainer, name)

        def begin(*args: Any) -> None:
            once()
            following(*args)

        setattr(trainer, name, begin)
        return
    if phase == "evaluate":
        from mm.trainer import final_eval

        evaluate = final_eval.evaluate

        def evaluated(*args: Any) -> Any:
            once()
            return evaluate(*args)

        final_eval.evaluate = evaluated
        return
    name, offset = {"step": ("_optimizer_step", 1), "save": ("_save", 0), "report": ("_report", 0)}[
        phase
    ]
    real = getattr(trainer, name)

    def wrapped(*args: Any) -> Any:
        if trainer.step + offset == step:
            once()
        return real(*args)

    setattr(trainer, name, wrapped)


def _signal(trainer: Any, options: Mapping[str, Any]) -> None:
    number = getattr(signal, options["signal"])
    _before(trainer, options["phase"], options["step"], lambda: os.kill(os.getpid(), number))


def _sleep(trainer: Any, options: Mapping[str, Any]) -> None:
    _before(trainer, options["phase"], options["step"], lambda: time.sleep(600))


def _kill_in_save(trainer: Any, options: Mapping[str, Any]) -> None:
    """SIGKILL after ``share`` of the bytes of the save of step ``step``; the file is cut there."""
    from mm.trainer.checkpoint import format as checkpoint

    write, save = checkpoint._write_tensors, checkpoint.save
    left: list[float] = []

    def counted(root: Path, step: int, state: Any, networks: Any, *rest: Any) -> Path:
        if step == options["step"]:
            parts = [t for pair in networks.values() for part in pair for t in part.values()]
            left.append(options["share"] * sum(t.numel() * t.element_size() for t in parts))
        return save(root, step, state, networks, *rest)

    def cut(path: Path, tensors: Any) -> None:
        write(path, tensors)
        if left:
            left[0] -= sum(t.numel() * t.element_size() for t in tensors.values())
            if left[0] <= 0:
                os.truncate(path, max(0, int(path.stat().st_size + left[0])))
                os.kill(os.getpid(), signal.SIGKILL)

    checkpoint.save, checkpoint._write_tensors = counted, cut


def _kill_before_pointer(trainer: Any, options: Mapping[str, Any]) -> None:
    from mm.trainer.checkpoint import format as checkpoint

    point = checkpoint._point

    def killed(root: Path, name: str) -> None:
        if name.endswith(f"{options['step']:06d}"):
            os.kill(os.getpid(), signal.SIGKILL)
        point(root, name)

    checkpoint._point = killed


def _nan(trainer: Any, options: Mapping[str, Any]) -> None:
    """The weights of one step's targets become NaN on this rank."""
    real = trainer._optimizer_step

    def spoilt(batches: Sequence[Any]) -> Any:
        if trainer.step + 1 == options["step"]:
            batches = [replace(b, weight=b.weight * float("nan")) for b in batches]
        return real(batches)

    trainer._optimizer_step = spoilt


def _memory(trainer: Any, options: Mapping[str, Any]) -> None:
    import torch

    real = trainer._optimizer_step

    def greedy(batches: Sequence[Any]) -> Any:
        if trainer.step + 1 == options["step"]:
            torch.empty(2**60, dtype=torch.uint8)  # the allocator itself refuses
        return real(batches)

    trainer._optimizer_step = greedy


def _gone(trainer: Any, options: Mapping[str, Any]) -> None:
    """The checkpoint folder goes away before a save, and a file stands in its place."""
    root = trainer.folder / "checkpoints"

    def go() -> None:
        root.rename(root.with_name("away"))
        root.write_text("")

    _before(trainer, "save", options["step"], go)


def _wandb_killed(trainer: Any, options: Mapping[str, Any]) -> None:
    """SIGKILL to every child process (wandb's service)."""

    def kill() -> None:
        found = []
        for stat in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError, ValueError):
                fields = stat.read_text().rpartition(")")[2].split()
                if int(fields[1]) == os.getpid():
                    found.append(int(stat.parent.name))
        sys.stderr.write(f"killed {len(found)} children\n")
        for pid in found:
            os.kill(pid, signal.SIGKILL)

    _before(trainer, "step", options["step"], kill)


def _wandb_down(trainer: Any, options: Mapping[str, Any]) -> None:
    """The server that the run was started with goes down."""
    from urllib.request import urlopen

    from mm.trainer.log import tracker

    tracker.INIT_TIMEOUT_S = 120.0  # a slow machine is not the fault that is tried here

    def down() -> None:
        if trainer.tracker.id is None:
            raise RuntimeError("the run was not tracked before the server went down")
        urlopen(options["url"], timeout=30).read()

    _before(trainer, "step", options["step"], down)


def _halves(trainer: Any, options: Mapping[str, Any]) -> None:
    """Rank 0 of 2 sees text only, rank 1 images only; a single process sees both."""
    from mm.data.streams.packed import PackedConfig
    from mm.launch import environment
    from mm.trainer.stage import build

    me, enter = environment.ranks(), trainer._enter

    def entered(*args: Any) -> None:
        enter(*args)
        trainer.stream.close()
        streams = [
            build(
                PackedConfig.model_validate(options[modality]),
                vocabulary=trainer.vocabulary,
                transform=trainer.objective.transform,
                seed=trainer.run.seed,
                rank=0,
                world=1,
            )
            for modality in ("text", "image")
        ]
        mine = streams if me.world == 1 else [streams[me.rank]]
        trainer.stream.next = lambda: [b for stream in mine for b in stream.next()]

    trainer._enter = entered


def _meter(trainer: Any, options: Mapping[str, Any]) -> None:
    """Sample resident memory, open files and threads every ``every`` steps, to ``file``."""
    report, file = trainer._report, open(options["file"], "w")  # noqa: SIM115

    def sampled(*args: Any) -> None:
        report(*args)
        if trainer.step % options["every"] == 0:
            status = Path("/proc/self/status").read_text()
            field = lambda name: int(status.split(f"{name}:")[1].split()[0])
            row = {
                "step": trainer.step,
                "rss_kb": field("VmRSS"),
                "files": len(os.listdir("/proc/self/fd")),
                "threads": field("Threads"),
            }
            file.write(json.dumps(row) + "\n")
            file.flush()

    trainer._report = sampled


INJECT: dict[str, Callable[[Any, Mapping[str, Any]], None]] = {
    "signal": _signal,
    "sleep": _sleep,
    "kill_in_save": _kill_in_save,
    "kill_before_pointer": _kill_before_pointer,
    "nan": _nan,
    "memory": _memory,
    "gone": _gone,
    "wandb_killed": _wandb_killed,
    "wandb_down": _wandb_down,
    "halves": _halves,
    "meter": _meter,
}


# ---- a disk of its own ------------------------------------------------------

_NEW_NS, _NEW_USER, _RDONLY, _REMOUNT, _BIND, _PRIVATE = 0x20000, 0x10000000, 1, 32, 4096, 1 << 18
NO_MOUNT = 77  # this machine lets nobody mount


def _mount(what: str, at: Path, kind: str, flags: int, data: str) -> None:
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(what.encode(), str(at).encode(), kind.encode(), flags, data.encode()):
        raise OSError(ctypes.get_errno(), f"mount {at}")


def _own_mounts() -> None:
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    flags = _NEW_NS if os.geteuid() == 0 else _NEW_NS | _NEW_USER
    try:
        if libc.unshare(flags):
            raise OSError(ctypes.get_errno(), "unshare")
        _mount("none", Path("/"), "", 0x4000 | _PRIVATE, "")
    except OSError:
        sys.exit(NO_MOUNT)


def disk(spec: Mapping[str, Any], fault: str, whole: str) -> None:
    """Train on a small disk that fills up (``full``) or turns read-only, mend it, train on.

    Exits with 0 when the first part ended in a UserError that names the disk, the checkpoint before
    was intact, and the second part ended as the unbroken run in the folder ``whole``.
    """
    from mm.faults.bench import differences
    from mm.run import Run
    from mm.trainer.checkpoint import format as checkpoint
    from mm.trainer.loop import Trainer

    _own_mounts()
    run = Run.model_validate(spec["run"])
    run.out.mkdir(parents=True, exist_ok=True)
    root, filler = run.folder / "checkpoints", run.out / "filler"
    try:
        _mount("none", run.out, "tmpfs", 0, "size=24m")
    except OSError:
        sys.exit(NO_MOUNT)

    def break_it() -> None:
        if fault == "full":
            with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
                while True:
                    file.write(bytes(2**16))
        else:
            _mount(str(root), root, "", _BIND, "")
            _mount(str(root), root, "", _BIND | _REMOUNT | _RDONLY, "")

    trainer = Trainer(run)
    _before(trainer, "save", 4, break_it)
    try:
        trainer.fit()
    except UserError as error:
        sys.stderr.write(f"UserError: {error}\n")
        if str(root) not in str(error):
            sys.exit(3)
    else:
        sys.exit(4)
    saved = checkpoint.newest(root)
    if saved is None or saved.state["step"] != 2:
        sys.exit(5)
    if fault == "full":
        filler.unlink()
    else:
        import ctypes

        ctypes.CDLL(None).umount2(str(root).encode(), 2)
    Trainer(run).fit()
    found = differences(Path(whole), run.folder)
    sys.stderr.write(f"{found}\n")
    sys.exit(6 if found else 0)
