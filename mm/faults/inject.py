"""The faults as callbacks: each breaks something when its moment of the run has come."""

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

import torch

from mm.batch import Batch
from mm.launch import environment
from mm.trainer.callbacks.base import Callback, Training

Options = Mapping[str, Any]
FIRST = ("start", "stage", "evaluate")  # phases that belong to no step: the first one counts


class AtPhase(Callback):
    """Acts once, when ``options["phase"]`` of optimizer step ``options["step"]`` begins."""

    def __init__(self, options: Options, act: Callable[[], Any]):
        self.options, self.act = options, act
        self.done = False

    def on_phase(self, trainer: Training, name: str, step: int, keys: Sequence[str] = ()) -> None:
        here = name == self.options["phase"] and (name in FIRST or step == self.options["step"])
        if here and not self.done:
            self.done = True
            self.act()


def send_signal(options: Options) -> Callback:
    number = getattr(signal, options["signal"])
    return AtPhase(options, lambda: os.kill(os.getpid(), number))


def sleep(options: Options) -> Callback:
    return AtPhase(options, lambda: time.sleep(600))


class Gone(AtPhase):
    """The checkpoint folder goes away before a save, and a file stands in its place."""

    def __init__(self, options: Options):
        super().__init__({"phase": "save", **options}, self.go)

    def on_stage_start(self, trainer: Training) -> None:
        self.root = trainer.folder / "checkpoints"

    def go(self) -> None:
        self.root.rename(self.root.with_name("away"))
        self.root.write_text("")


class KillInSave(Callback):
    """SIGKILL after ``share`` of what this rank writes of the save of ``step``.

    The file is cut there. All saves of a run are equally large: the one before says how many bytes
    that is.
    """

    def __init__(self, options: Options):
        self.name = f"step_{options['step']:06d}"
        self.share = options["share"]
        self.before = self.written = 0
        self.folder = ""

    def on_file(self, path: Path) -> None:
        if path.is_dir():
            return
        if path.parent.name != self.folder:
            self.before, self.written, self.folder = self.written, 0, path.parent.name
        size = path.stat().st_size
        self.written += size
        left = self.share * self.before - self.written
        if self.name in self.folder and left <= 0:
            os.truncate(path, max(0, int(size + left)))
            os.kill(os.getpid(), signal.SIGKILL)


class SmallFiles(AtPhase):
    """From a save on, the kernel refuses this rank files above some ``bytes``: a quota."""

    def __init__(self, options: Options):
        super().__init__({"phase": "save", **options}, self.limit)

    def limit(self) -> None:
        import resource

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.options["bytes"], -1))


class KillBeforePointer(Callback):
    """SIGKILL once the folder of ``step`` has its name, before ``latest`` says so."""

    def __init__(self, options: Options):
        self.name = f"step_{options['step']:06d}"

    def on_file(self, path: Path) -> None:
        if path.name == self.name:
            os.kill(os.getpid(), signal.SIGKILL)


class Nan(Callback):
    """Weights of the targets become NaN on this rank, from ``step`` on for ``times`` steps."""

    def __init__(self, options: Options):
        self.step, self.left = options["step"], options.get("times", 1)

    def pre_step(self, trainer: Training, batches: list[Batch]) -> None:
        if self.left and trainer.step + 1 >= self.step:
            self.left -= 1
            batches[:] = [replace(b, weight=b.weight * float("nan")) for b in batches]


class Memory(Callback):
    """The allocator itself refuses an optimizer step."""

    def __init__(self, options: Options):
        self.step = options["step"]

    def pre_step(self, trainer: Training, batches: list[Batch]) -> None:
        if trainer.step + 1 == self.step:
            torch.empty(2**60, dtype=torch.uint8)


class Past(Callback):
    """Once, the data of the stage that begins after ``step`` go on past some ``batches``."""

    def __init__(self, options: Options):
        self.step, self.left = options["step"], options["batches"]

    def on_stage_start(self, trainer: Training) -> None:
        while self.left and trainer.step == self.step:
            trainer.stream.next()
            self.left -= 1


class WandbDown(AtPhase):
    """The server that the run was started with goes down."""

    def __init__(self, options: Options):
        from mm.trainer.log.sinks import wandb_sink

        wandb_sink.INIT_TIMEOUT_S = 120.0  # a slow machine is not the fault that is tried here
        super().__init__({"phase": "step", **options}, self.down)

    def on_stage_start(self, trainer: Training) -> None:
        tracker: Any = trainer.tracker
        self.tracked = tracker.wait_until_open(120)

    def down(self) -> None:
        from urllib.request import urlopen

        if not self.tracked:
            raise RuntimeError("the run was not tracked before the server went down")
        urlopen(self.options["url"], timeout=30).read()


def wandb_killed(options: Options) -> Callback:
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

    return AtPhase({"phase": "step", **options}, kill)


class Halves(Callback):
    """Rank 0 of 2 sees text only, rank 1 images only; a single process sees both."""

    def __init__(self, options: Options):
        self.options = options

    def on_stage_start(self, trainer: Training) -> None:
        from mm.data.streams.packed import PackedConfig

        me = environment.ranks()
        trainer.stream.close()
        streams = [
            PackedConfig.model_validate(self.options[modality]).build(
                vocabulary=trainer.vocabulary, seed=trainer.run.seed, rank=0, world=1
            )
            for modality in ("text", "image")
        ]
        mine = streams if me.world == 1 else [streams[me.rank]]
        trainer.stream.next = lambda: [b for stream in mine for b in stream.next()]


class Meter(Callback):
    """Resident memory, open files and threads every ``every`` steps, to ``file``."""

    def __init__(self, options: Options):
        self.every = options["every"]
        self.file = open(options["file"], "w")  # noqa: SIM115

    def post_step(self, trainer: Training, step: int, metrics: dict[str, Any]) -> None:
        if step % self.every:
            return
        status = Path("/proc/self/status").read_text()
        field = lambda name: int(status.split(f"{name}:")[1].split()[0])
        row = {
            "step": step,
            "rss_kb": field("VmRSS"),
            "files": len(os.listdir("/proc/self/fd")),
            "threads": field("Threads"),
        }
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()


INJECT: dict[str, Callable[[Options], Callback]] = {
    "signal": send_signal,
    "sleep": sleep,
    "kill_in_save": KillInSave,
    "small_files": SmallFiles,
    "kill_before_pointer": KillBeforePointer,
    "nan": Nan,
    "memory": Memory,
    "past": Past,
    "gone": Gone,
    "wandb_killed": wandb_killed,
    "wandb_down": WandbDown,
    "halves": Halves,
    "meter": Meter,
}
