"""Several commands of `mm` in order: each is echoed so that it can be copied, and timed."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from mm.errors import UserError
from mm.launch.environment import cores

# Several command lines in one process: each start of torch takes seconds.
JOB = """
import json, shlex, sys
from mm.cli.main import run
for words in json.loads(sys.argv[1]):
    print("$", shlex.join(["mm", *words]), flush=True)
    if code := run(words):
        sys.exit(code)
"""


class Steps:
    """Runs commands, echoes them, and keeps ``commands.json`` of a folder up to date.

    Args:
        out: the folder; a run's, so that its report shows the commands.
        again: words after ``mm`` of what the user calls again after a failure.
    """

    def __init__(self, out: Path, again: str):
        self.out, self.console = out, Console(highlight=False, soft_wrap=True)
        self.again = again
        self.done: list[dict[str, Any]] = []

    def record(self, command: str, seconds: float) -> None:
        self.done.append({"command": command, "seconds": round(seconds, 1)})
        (self.out / "commands.json").write_text(json.dumps(self.done, indent=1))

    def echo(self, command: str) -> None:
        self.console.print(f"\n[bold cyan]$ {command}[/]", markup=True)

    def run(self, *words: str | Path) -> None:
        """Run ``mm WORDS`` in this process.

        Importing torch anew for each would take longer than the work.

        Raises:
            UserError: the command failed; what it said stands above.
        """
        from mm.cli.main import run

        arguments = [str(w) for w in words]
        command = shlex.join(["mm", *arguments])
        self.echo(command)
        start = time.monotonic()
        code = run(arguments)
        if code != 0:
            raise self._stopped(command, code)
        self.record(command, time.monotonic() - start)

    def _stopped(self, command: str, code: int) -> UserError:
        return UserError(
            f"stopped at: {command} (exit code {code}); mend it and run mm {self.again} again"
        )

    def launch(self, most: int, *words: str | Path) -> None:
        """Run ``mm WORDS`` in ``most`` processes, or as many as there are GPUs, else cores.

        One runs here.

        Raises:
            UserError: a process failed; what it said stands above.
        """
        from mm.trainer.engine.process_group import processes_here

        processes = processes_here(most, cores())
        if processes == 1:
            return self.run(*words)
        from torch.distributed import run as torchrun  # here: another start of torch takes seconds
        from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

        arguments = ["--standalone", f"--nproc_per_node={processes}", "-m", "mm"]
        arguments += map(str, words)
        command = shlex.join(["torchrun", *arguments])
        self.echo(command)
        start = time.monotonic()
        # One thread each: at this size two processes are 1.3 times as fast as two threads
        # (docs/lab-notes.md).
        before = os.environ.get("OMP_NUM_THREADS")
        os.environ["OMP_NUM_THREADS"] = "1"
        try:
            torchrun.main(arguments)
        except ChildFailedError as error:
            code = error.get_first_failure()[1].exitcode
            raise self._stopped(command, code) from error
        finally:
            del os.environ["OMP_NUM_THREADS"]
            if before is not None:
                os.environ["OMP_NUM_THREADS"] = before
        self.record(command, time.monotonic() - start)

    def run_side_by_side(self, jobs: list[tuple[list[list[str]], Path, int]]) -> None:
        """Run independent trainings side by side, one process and an equal share of the cores each.

        Args:
            jobs: commands one after the other (words after ``mm``), run folder of the first one
                (its metrics.jsonl drives the bar), its number of steps.
        Raises:
            UserError: one failed; its last lines are in the message.
        """
        threads = str(max(1, cores() // len(jobs)))
        environment = os.environ | {"OMP_NUM_THREADS": threads}
        running = []
        for commands, folder, steps in jobs:
            lines = [shlex.join(["mm", *words]) for words in commands]
            for line in lines:
                self.echo(line)
            log = (self.out / f"{folder.name}.log").open("wb")
            process = subprocess.Popen(
                [sys.executable, "-c", JOB, json.dumps(commands)],
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
            )
            running.append((process, log, " && ".join(lines), folder, steps, time.monotonic()))
        columns = (
            TextColumn("{task.description:>8}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
        )
        try:
            with Progress(*columns, console=self.console) as bars:
                rows = {r[3]: bars.add_task(r[3].name, total=r[4]) for r in running}
                waiting = list(running)
                while waiting:
                    time.sleep(0.1)
                    for one in list(waiting):
                        process, log, command, folder, steps, start = one
                        bars.update(rows[folder], completed=_last_step(folder / "metrics.jsonl"))
                        if process.poll() is None:
                            continue
                        waiting.remove(one)
                        log.close()
                        said = Path(log.name).read_text(errors="replace").splitlines()
                        if process.returncode != 0:
                            raise UserError(
                                f"stopped at: {command}: {' | '.join(said[-3:])} (all "
                                f"of it: {log.name})"
                            )
                        self.record(command, time.monotonic() - start)
                        begins = [n for n, line in enumerate(said) if line.startswith("$ mm ")]
                        self.console.print(Text("\n".join(said[begins[-1] :])))
        finally:
            for process, log, *_ in running:
                if process.poll() is None:
                    process.terminate()
                    process.wait()
                log.close()


def _last_step(file: Path) -> int:
    """The newest step in a metrics.jsonl that is being written; 0 before the first."""
    try:
        with file.open("rb") as f:
            f.seek(max(0, file.stat().st_size - 4096))
            lines = f.read().splitlines()
    except OSError:
        return 0
    for line in reversed(lines):
        try:
            return int(json.loads(line)["step"])
        except (ValueError, KeyError, TypeError):
            continue
    return 0
