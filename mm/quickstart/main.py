"""The quickstart: the ordinary commands in order, timed and safe to re-run.

Each is echoed so that it can be copied.
"""

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

DEFAULT_OUT = Path("runs/quickstart")

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
    """Runs commands, echoes them, and keeps `commands.json` up to date."""

    def __init__(self, out: Path):
        self.out, self.console = out, Console(highlight=False, soft_wrap=True)
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
            raise UserError(
                f"quickstart stopped at: {command} (exit code {code}); mend it and run mm "
                "quickstart again"
            )
        self.record(command, time.monotonic() - start)

    def launch(self, processes: int, *words: str | Path) -> None:
        """Run ``mm WORDS`` in several gloo processes, or here when there is one core.

        Raises:
            UserError: a process failed; what it said stands above.
        """
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
            raise UserError(
                f"quickstart stopped at: {command} (exit code {code}); mend it and run mm "
                "quickstart again"
            ) from error
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
                                f"quickstart stopped at: {command}: {' | '.join(said[-3:])} (all "
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


def quickstart(
    out: str | Path = DEFAULT_OUT,
    *,
    config: str = "configs/quickstart/hybrid.yaml",
    seed: int = 0,
    scale: float = 1.0,
) -> dict[str, Any]:
    """Build data, train tokenizers and backbone, evaluate and report.

    Args:
        out: run folder; everything is written below it.
        config: the backbone's run YAML; ``configs/quickstart/backbone.yaml`` is attention only.
        seed: of all trainings; the data split does not depend on it.
        scale: share of every training budget (CI runs a fraction; figures then mean little).
    Returns:
        the content of ``results.json``.
    Raises:
        UserError: a step failed; running the same command again goes on there.
    """
    from mm import config as configs
    from mm.quickstart.source import make_source

    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    steps, start = Steps(out), time.monotonic()
    data, tokens, tokenizers = out / "data", out / "tokens", out / "tokenizers"

    folder = out / "source"
    source = f"python -m mm.quickstart.source {shlex.quote(str(folder))}"
    steps.echo(source)
    before = time.monotonic()
    counts = make_source(folder)
    steps.console.print(
        "  ".join(
            f"{s}: {c['triples']} image+audio+caption, {c['texts']} texts"
            for s, c in counts.items()
        )
    )
    steps.record(source, time.monotonic() - before)

    steps.run("data", "pack", out / "source" / "manifest.jsonl", "--out", data / "digits")
    steps.run("data", "pack", out / "source" / "text.jsonl", "--out", data / "text")
    steps.run(
        "tokenizer",
        "train",
        "configs/quickstart/text.yaml",
        "--data",
        data / "text",
        "--out",
        tokenizers / "text",
    )
    jobs = []
    for modality in ("image", "audio"):
        file, folder = f"configs/quickstart/{modality}.yaml", tokenizers / modality
        budget = configs.read(file)["stages"][0]["budget"]["steps"]
        n = max(2, round(budget * scale))
        words = ["tokenizer", "train", file, "--data", str(data / "digits"), "--out", str(folder)]
        words += [f"seed={seed}"] * (seed != 0) + [f"stages.0.budget.steps={n}"] * (n != budget)
        jobs.append(([words, _report(folder, data / "digits")], folder, n))
    steps.run_side_by_side(jobs)
    steps.run(*_report(tokenizers / "text", data / "text"))
    # Workers would start torch anew, which takes longer than they save here.
    steps.run(
        "data", "pack", data / "digits", "--tokenizers", tokenizers, "--out", tokens / "digits",
        "--workers", "1",
    )  # fmt: skip
    steps.run(
        "data", "pack", data / "text", "--tokenizers", tokenizers,
        "--vocabulary", tokens / "digits" / "vocabulary.json",
        "--out", tokens / "text", "--workers", "1",
    )  # fmt: skip
    changes = _backbone_changes(configs.read(config), out, seed, scale)
    steps.launch(min(2, cores()), "train", config, *changes)
    steps.launch(min(2, cores()), "eval", out, "--json", out / "results.json")
    results = json.loads((out / "results.json").read_text())
    results["figures"] += _tokenizer_figures(tokenizers)
    results["seconds"]["total"] = round(time.monotonic() - start, 1)
    (out / "results.json").write_text(json.dumps(results, indent=1))
    steps.run("report", out)
    steps.console.print(
        f"\ndone in {time.monotonic() - start:.0f} s; open {out / 'report' / 'index.html'}"
    )
    return results


def _report(tokenizer: Path, shards: Path) -> list[str]:
    """Words of the command that measures a tokenizer on held-out data."""
    return [
        "tokenizer", "eval", str(tokenizer), "--data", str(shards), "--split", "test",
        "--out", str(tokenizer / "eval"), "--json", str(tokenizer / "eval.json"),
    ]  # fmt: skip


def _tokenizer_figures(tokenizers: Path) -> list[dict[str, Any]]:
    """Rows for results.json from what `mm tokenizer eval` wrote, beside their bars."""
    rows: list[dict[str, Any]] = []

    def add(
        modality: str, name: str, value: float, unit: str, bar: float | None = None, **beside: Any
    ) -> None:
        rows.append(
            {
                "name": f"{modality}_tokenizer_{name}",
                "value": value,
                "unit": unit,
                "bar": bar,
                **beside,
            }
        )

    for modality in ("text", "image", "audio"):
        found = json.loads((tokenizers / modality / "eval.json").read_text())
        if modality == "text":
            add(modality, "bytes_per_token", found["bytes_per_token"], "bytes", n=found["items"])
            continue
        usage = found["codebook_usage_share"]
        lowest = min(usage) if isinstance(usage, list) else usage
        if modality == "image":
            add(modality, "psnr_db", found["psnr_db"], "dB", 24.0, n=found["items"])
            add(modality, "codebook_usage_share", lowest, "share", 0.9)
        else:
            ratio = found["mel_distance_ratio"]
            add(modality, "mel_distance_ratio", ratio, "ratio", 0.5, n=found["items"],
                lower_is_better=True)  # fmt: skip
            add(modality, "codebook_usage_share", lowest, "share", 0.5)
    return rows


def _backbone_changes(values: dict[str, Any], out: Path, seed: int, scale: float) -> list[str]:
    """Overrides that move the YAML's paths to ``out`` and set seed and budget."""
    home = str(Path(values.get("out", "runs")) / values["name"])
    changes = []

    def move(node: Any, path: str) -> None:
        if isinstance(node, dict):
            for key, value in node.items():
                move(value, f"{path}.{key}" if path else str(key))
        elif isinstance(node, list):
            for i, value in enumerate(node):
                move(value, f"{path}.{i}")
        elif isinstance(node, str) and node.startswith(home + "/"):
            changes.append(f"{path}={out}{node[len(home) :]}")

    if str(out) != home:
        move(values, "")
        changes += [f"name={out.name}", f"out={out.parent}"]
    if seed:
        changes.append(f"seed={seed}")
    budget = values["stages"][0]["budget"]["steps"]
    if scale != 1.0:
        changes.append(f"stages.0.budget.steps={max(2, round(budget * scale))}")
    return changes
