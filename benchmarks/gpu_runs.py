"""Whole runs of `mm` on the GPU, for `make gpu`: the quickstart beside its bars, kills and resumes.

Both say on which device they trained: that a GPU was there does not mean that it was used.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
Row = dict[str, Any]
# Killed without a word, as by a lost machine: in a step, and in the middle of a save.
KILLS: dict[str, Mapping[str, Any]] = {
    "kill -9 in step 4": {"signal": {"signal": "SIGKILL", "phase": "step", "step": 4}},
    "kill -9 at half of a save": {"kill_in_save": {"step": 4, "share": 0.5}},
}


# ---- the quickstart ----


def quickstart(scale: float = 1.0) -> Iterator[Row]:
    """The whole quickstart: seconds, device and every figure beside its bar."""
    with tempfile.TemporaryDirectory() as folder:
        run, file = Path(folder) / "run", Path(folder) / "found.json"
        words = ["quickstart", "--out", str(run), "--json", str(file), "--scale", str(scale)]
        begun = time.monotonic()
        ended = subprocess.run(
            [sys.executable, "-m", "mm", *words], cwd=ROOT, capture_output=True, text=True
        )
        if ended.returncode or not file.is_file():
            yield {"figure": "quickstart", "met": (ended.stderr or ended.stdout)[-300:]}
            return
        yield {"figure": f"whole, on {device_of(run)}", "value": time.monotonic() - begun} | SECONDS
        yield from steps_of(json.loads((run / "commands.json").read_text()))
        yield from figures_of(json.loads(file.read_text()))


SECONDS = {"unit": "s", "bar": "", "met": ""}


def device_of(run: Path) -> str:
    """What a run says that it trained on, or that it does not say it."""
    try:
        return str(json.loads((run / "environment.json").read_text())["device"])
    except (OSError, ValueError, KeyError):
        return "a device that it does not tell"


def steps_of(commands: Sequence[Mapping[str, Any]]) -> Iterator[Row]:
    """The seconds of the backbone's training and of its evaluation, alone or under torchrun."""
    for one in commands:
        if found := re.match(r"(?:torchrun .*-m )?mm (train|eval) ", one["command"]):
            yield {"figure": f"mm {found[1]}", "value": one["seconds"]} | SECONDS


def figures_of(results: Mapping[str, Any]) -> Iterator[Row]:
    """Every figure of a results.json beside its bar, and whether the bar is met."""
    for figure in results["figures"]:
        value, bar = figure["value"], figure.get("bar")
        row: Row = {"figure": figure["name"], "value": value, "unit": figure.get("unit", "")}
        if bar is None:
            yield row | {"bar": "", "met": ""}
            continue
        lower = bool(figure.get("lower_is_better"))
        met = value is not None and (value <= bar if lower else value >= bar)
        yield row | {"bar": f"{'≤' if lower else '≥'} {bar:g}", "met": "yes" if met else "NO"}


# ---- kills and resumes ----


def resume(kills: Mapping[str, Mapping[str, Any]] = KILLS) -> Iterator[Row]:
    """A small run is killed on the GPU (without one on the CPU) and started again.

    Every loss, the last weights, the optimizer's states and the data position must be those of a
    run that nobody killed, bit by bit. Where they are not, that run is trained once more: a device
    that does not give the same bits twice is told apart from a resume that loses something.
    """
    from mm.faults.bench import Bench
    from mm.faults.case import KILLED, resume_and_compare
    from mm.faults.compare import differences

    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder) / "bench", on_gpu=True)
        for name, fault in kills.items():
            config, begun = bench.config(bench.fresh("killed")), time.monotonic()
            lost = resume_and_compare(bench, config, bench.train(config, faults=fault), KILLED)
            whole = bench.whole(config)
            row: Row = {
                "fault": name,
                "device": device_of(whole),
                "resumed": lost or "same bits",
                "seconds": time.monotonic() - begun,
            }
            if lost:
                again = bench.config(bench.fresh("again"))
                ended = bench.train(again)
                other = (
                    differences(whole, bench.folder(again)) if ended.codes == [0] else ended.said
                )
                row["unbroken, twice"] = other[-300:] or "same bits"
            yield row


def resume_lines() -> Iterator[str]:
    """What would run."""
    from mm.faults.inject import INJECT

    for name, fault in KILLS.items():
        for kind, options in fault.items():
            INJECT[kind](options)
        yield f"a small hybrid run, {name}, the same command again: the bits of an unbroken run"
