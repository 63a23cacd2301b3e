"""Run the cases and write what came of them."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mm.errors import UserError, did_you_mean
from mm.faults.bench import Bench
from mm.faults.cases import CASES, Case

Row = dict[str, Any]


def chosen(only: Sequence[str]) -> list[Case]:
    """The cases whose names hold one of the words; all when there are none. Raises UserError."""
    for word in only:
        if not any(word.lower() in case.name.lower() for case in CASES):
            raise UserError(f"no fault '{word}'{did_you_mean(word, [c.name for c in CASES])}")
    return [c for c in CASES if not only or any(w.lower() in c.name.lower() for w in only)]


def inject(
    quick: bool, only: Sequence[str] = (), done: Callable[[Row], None] = lambda row: None
) -> list[Row]:
    """Inject the faults; one row each: fault, outcome, tries, survived, lost, seconds."""
    cases = chosen(only)
    # In memory where there is one: a thousand small saves, each synced, would measure the disk.
    shared = Path("/dev/shm")
    root = Path(tempfile.mkdtemp(prefix="mm-faults-", dir=shared if shared.is_dir() else None))
    rows = []
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
                "tries": len(lost),
                "survived": sum(not what for what in lost),
                "lost": "; ".join(sorted({what for what in lost if what})) or "nothing",
                "seconds": round(time.monotonic() - begun, 1),
            }
            rows.append(row)
            done(row)
    finally:
        shutil.rmtree(root, ignore_errors=True)
    return rows


def markdown(rows: Sequence[Row], quick: bool) -> str:
    """The page docs/reliability.md."""
    command = "mm faults" + (" --quick" if quick else "") + " --write docs/reliability.md"
    tries, survived = (sum(row[key] for row in rows) for key in ("tries", "survived"))
    lines = [
        "# Faults injected, and what was lost",
        "",
        f"Written by `{command}`; do not edit. Each fault is injected into a small multi-modal",
        "run (text and images, a recurrent and an attention layer) in real processes on CPU and",
        "gloo. *Same bits*: every loss, the last weights, the optimizer's states and the data",
        "position equal those of a run that nothing happened to.",
        "",
        f"{survived} of {tries} tries survived.",
        "",
        "| fault | must happen | tries | survived | lost |",
        "|---|---|---:|---:|---|",
    ]
    tried = {row["fault"] for row in rows}
    rows = [
        *rows,
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
