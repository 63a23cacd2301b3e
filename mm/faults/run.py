"""Run the cases and write what came of them."""

from __future__ import annotations

import json
import platform
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mm.errors import UserError, did_you_mean
from mm.faults.bench import Bench
from mm.faults.cases import CASES, Case
from mm.launch import environment

DAMAGED = "\n## Damaged files"  # heading of what `make fuzz` found, written by hand
Row = dict[str, Any]


def select_cases(only: Sequence[str]) -> list[Case]:
    """The cases whose names hold one of the words; all when there are none. Raises UserError."""
    for word in only:
        if not any(word.lower() in case.name.lower() for case in CASES):
            raise UserError(f"no fault '{word}'{did_you_mean(word, [c.name for c in CASES])}")
    return [c for c in CASES if not only or any(w.lower() in c.name.lower() for w in only)]


def read(path: Path, quick: bool) -> list[Row]:
    """Rows that an earlier part of the same tries wrote; none where there is no such file.

    Raises:
        UserError: the file holds something else, or the other count of tries.
    """
    if not path.is_file():
        return []
    try:
        rows: list[Row] = json.loads(path.read_text())
        counts = {bool(row["quick"]) for row in rows if row["fault"] and "tries" in row}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path}: no rows of mm faults ({error}); give another --json FILE"
        ) from error
    if counts - {quick}:
        had = "all tries" if quick else "--quick"
        raise UserError(f"{path}: was written with {had}: go on like that, or give another file")
    return rows


def inject(
    quick: bool,
    only: Sequence[str] = (),
    done: Callable[[list[Row]], None] = lambda rows: None,
    before: Sequence[Row] = (),
) -> list[Row]:
    """Inject the faults; one row each: fault, outcome, quick, tries, survived, lost, seconds.

    Args:
        quick: one or two tries of each.
        only: words that the names of the faults must hold; default all faults.
        done: called after each fault with all rows so far.
        before: rows of faults that were tried before; those are not tried again.
    """
    cases = [c for c in select_cases(only) if c.name not in {row["fault"] for row in before}]
    rows = list(before)
    if not cases:
        return rows
    # In memory where there is one: a thousand small saves, each synced, would measure the disk.
    shared = Path("/dev/shm")
    root = Path(tempfile.mkdtemp(prefix="mm-faults-", dir=shared if shared.is_dir() else None))
    try:
        bench = Bench(root / "bench")
        for case in cases:
            begun = time.monotonic()
            try:
                lost = list(case.tries(bench, quick))
            except Exception as error:  # the bench broke, not the run: that is no survival
                lost = [f"{type(error).__name__}: {error}"]
            row: Row = {
                "fault": case.name,
                "outcome": case.outcome,
                "quick": quick,
                "tries": len(lost),
                "survived": sum(not what for what in lost),
                "lost": "; ".join(sorted({what for what in lost if what})) or "nothing",
                "seconds": round(time.monotonic() - begun, 1),
            }
            rows.append(row)
            done(rows)
    finally:
        shutil.rmtree(root, ignore_errors=True)
    return rows


def versions() -> str:
    """What the run was made with, in one line."""
    found = [f"{name} {version(name)}" for name in ("mm-stack", "torch", "deepspeed")]
    machine = f"{platform.system()} {platform.machine()}, {environment.cores()} CPU cores"
    return f"{', '.join(found)}, Python {platform.python_version()}, {machine}"


def beside(page: Path) -> str:
    """What a page says that this command does not write: from the heading `DAMAGED` on."""
    if not page.is_file():
        return ""
    _, heading, rest = page.read_text(encoding="utf-8").partition(DAMAGED)
    return heading + rest


def markdown(rows: Sequence[Row], quick: bool) -> str:
    """The page docs/reliability.md."""
    command = "mm faults" + (" --quick" if quick else "") + " --write docs/reliability.md"
    tries, survived = (sum(row[key] for row in rows) for key in ("tries", "survived"))
    lost = [row["fault"] for row in rows if row["survived"] < row["tries"]]
    minutes = sum(row.get("seconds", 0.0) for row in rows) / 60
    lines = [
        "# Faults injected, and what was lost",
        "",
        f"**{survived} of {tries} tries survived"
        + ("; not: " + ", ".join(lost) + ".**" if lost else ", with nothing lost.**"),
        "",
        f"Written by `{command}` on {date.today().isoformat()} in {minutes:.0f} minutes; do not",
        f"edit. {versions()}.",
        "",
        "Each fault is injected into a small multi-modal run (text and images, a recurrent and an",
        "attention layer, dropout) in real processes on CPU and gloo. Then the same command is run",
        "again, and what it leaves is compared with an unbroken run of the same config.",
        "",
        "- *must happen*: what counts as survival. *Same bits*: every loss, the last weights, the",
        "  optimizer's states and the data position equal those of the unbroken run, bit by bit.",
        "- *tries*: how often the fault was injected, in how many forms (phases, shares of a",
        "  save, ZeRO stages, processes). *survived*: how often that came out. *lost*: what did",
        "  not.",
        "- Exit codes: 0 done; 2 an error the user can mend, in one line; 75 stopped by a signal",
        "  and saved; 76 a hang, with its stacks.",
        "",
    ]
    if quick:
        lines += [
            "**This is the reduced count** (`--quick`): one try or a few of each fault, ZeRO",
            "stages 0 and 3 instead of 0-3, 200 soak steps instead of 1,000. The full count is",
            "`mm faults` (twenty kills at each share of a save, every phase, both signals; about",
            "an hour on two cores).",
            "",
        ]
    lines += [
        "| fault | must happen | tries | survived | lost |",
        "|---|---|---:|---:|---|",
    ]
    tried = {row["fault"] for row in rows}
    place = {case.name: n for n, case in enumerate(CASES)}  # those of --resume came first
    rows = [
        *sorted(rows, key=lambda row: place.get(row["fault"], len(place))),
        *(
            {"fault": c.name, "outcome": c.outcome, "tries": 0, "survived": 0, "lost": "not tried"}
            for c in CASES
            if c.name not in tried
        ),
    ]
    cell = lambda text: " ".join(str(text).split()).replace("|", "/")[:300]
    for row in rows:
        lines.append(
            f"| {row['fault']} | {row['outcome']} | {row['tries']} | {row['survived']} | "
            f"{cell(row['lost'])} |"
        )
    lines += [
        "",
        "Not here, because it needs more than a CPU: ECC and Xid errors, NCCL timeouts, a Slurm",
        "scheduler that preempts. A CPU's own out-of-memory is a kill by the kernel (first rows).",
        "",
    ]
    return "\n".join(lines)
