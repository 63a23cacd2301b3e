"""`make gpu`: half an hour of a GPU is rare, so all that only a GPU can say, in nine minutes.

python benchmarks/gpu.py [--seconds 540] [--parts ops,training] [--fresh] [--out DIR]

Parts run in order of worth, each in a process of its own, and what one has found is written at
once: the command may be cut off anywhere, and goes on with what is missing. On a machine without a
GPU it prints what it would run and checks that every part imports and builds; only a GPU writes
docs/gpu-results.md.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
LEAST = 10  # seconds: no part is begun with less
GRACE = 5  # seconds that a part has to end when it is told to
RESULTS = ROOT / "docs" / "gpu-results.md"
SCRIPT = Path(__file__).with_name("gpu_parts.py")
# In order of worth, with the seconds that each may take: nine minutes in all.
PARTS = {
    "ops": ("every op and mixer against the reference, bf16 and fp32, all gradients", 120),
    "quickstart": ("mm quickstart on CUDA, with its bars", 140),
    "attention": ("attention, recurrences against SDPA, Flex, cuDNN, varlen, fla and mamba", 60),
    "training": ("300 M and 1 B training steps: MFU, traces, the ten dearest kernels", 110),
    "resume": ("checkpoint, kill, resume, bitwise, on the GPU", 70),
    "decode": ("decode tokens per second", 40),
}


def main(words: Sequence[str] | None = None) -> int:
    """Run what is missing. Returns 1 where a part failed."""
    parser = argparse.ArgumentParser(prog="make gpu", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=540, help="of the whole")
    parser.add_argument("--parts", default=",".join(PARTS), help="comma-separated")
    parser.add_argument("--fresh", action="store_true", help="do parts again that are done")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu")
    asked = parser.parse_args(words)
    parts = [part for part in asked.parts.split(",") if part]
    if unknown := [part for part in parts if part not in PARTS]:
        parser.error(f"no part {', '.join(unknown)}; parts: {', '.join(PARTS)}")
    import torch

    from mm.processes import unwind_on_sigterm

    if not torch.cuda.is_available():
        return dry_run(parts)
    with unwind_on_sigterm():
        return run(parts, asked.seconds, asked.fresh, asked.out)


def dry_run(parts: Sequence[str]) -> int:
    """Print what would run, and build every part. Returns 1 where one does not build."""
    from gpu_parts import DRY

    failed = 0
    say("no GPU here: this is what one would run. Nothing is measured, nothing is written.")
    for part in parts:
        what, seconds = PARTS[part]
        say(f"{part}: {what} (up to {seconds} s)")
        try:
            for line in DRY[part]():
                say(f"    {line}")
        except Exception as error:  # the others are checked, too
            failed = 1
            say(f"    DOES NOT BUILD: {type(error).__name__}: {error}")
    return failed


def run(parts: Sequence[str], seconds: float, fresh: bool, out: Path) -> int:
    """Run the missing parts on the GPU until the time is over; write what is known after each."""
    out.mkdir(parents=True, exist_ok=True)
    end, commit = time.monotonic() + seconds, commit_of(ROOT)
    for part in parts:
        file = out / f"{part}.json"
        if not fresh and is_done(file, commit):
            say(f"{part}: done before")
            continue
        left = min(end - time.monotonic(), PARTS[part][1])
        if left < LEAST:
            say(f"{part}: no time left; say make gpu again")
            continue
        say(f"{part}: {PARTS[part][0]} (up to {left:.0f} s)")
        found = in_own_process(part, file, left)
        file.write_text(json.dumps({**found, "commit": commit}, indent=1))
        write_results(out, RESULTS)
        say(f"    {found['state']} after {found['seconds']:.0f} s")
    states = [read(out / f"{part}.json").get("state") for part in parts]
    return int(any(state not in ("done", "cut off") for state in states))


def in_own_process(part: str, file: Path, seconds: float) -> dict[str, Any]:
    """Run one part; its rows so far where it fails or its time is over."""
    begun, rows = time.monotonic(), file.with_suffix(".rows")
    rows.unlink(missing_ok=True)
    command = [sys.executable, str(SCRIPT), part, str(rows)]
    where = {"PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    log = file.with_suffix(".log")
    with log.open("wb") as out:
        process = subprocess.Popen(
            command, env=os.environ | where, stdout=out, stderr=out, start_new_session=True
        )
        try:
            code = process.wait(seconds)
            state = "done" if code == 0 else f"failed with code {code}"
        except subprocess.TimeoutExpired:
            state = "cut off"
        finally:
            end_group(process)
    said = log.read_text(errors="replace")[-2000:]
    lines = rows.read_text().splitlines() if rows.is_file() else []
    found = [json.loads(line) for line in lines if line.endswith("}")]
    failed = state.startswith("failed")
    return {
        "state": state,
        "seconds": time.monotonic() - begun,
        "rows": found,
        "device": device(),
    } | ({"said": said} if failed else {})


def end_group(process: subprocess.Popen[bytes]) -> None:
    """End a part and all that it started, which would hold the GPU while the next one is timed."""
    for number in (signal.SIGTERM, signal.SIGKILL):  # torchrun ends its own after the first
        end = time.monotonic() + GRACE
        with contextlib.suppress(ProcessLookupError):  # nobody is left
            os.killpg(process.pid, number)
            while time.monotonic() < end:
                process.poll()
                os.killpg(process.pid, 0)
                time.sleep(0.05)
    process.wait()


def is_done(file: Path, commit: str) -> bool:
    """Whether a part was finished with this code."""
    found = read(file)
    return found.get("state") == "done" and found.get("commit") == commit


def read(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError):
        return {}


def write_results(out: Path, to: Path) -> None:
    """The page of all parts that are known."""
    lines = [
        "# Results on a GPU",
        "",
        "Written by `make gpu` on the card that it names. Predictions are those of `mm plan`, made "
        "without a GPU.",
    ]
    for part, (what, _) in PARTS.items():
        found = read(out / f"{part}.json")
        if not found:
            continue
        lines += ["", f"## {what[:1].upper()}{what[1:]}", ""]
        lines += [f"{found['device']}; {found['state']}, {found['seconds']:.0f} s.", ""]
        lines += table(found["rows"])
        if found.get("said"):
            lines += ["", "```text", *found["said"].splitlines()[-8:], "```"]
    to.write_text("\n".join(lines) + "\n")


def table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Rows as Markdown, one column a key."""
    if not rows:
        return ["Nothing was found."]
    names = list(dict.fromkeys(name for row in rows for name in row))
    cell = lambda v: f"{v:.4g}" if isinstance(v, float) else str(v).replace("|", "/")
    body = [[cell(row.get(name, "")) for name in names] for row in rows]
    return [f"| {' | '.join(line)} |" for line in (names, ["---"] * len(names), *body)]


def device() -> str:
    """Card, versions, date."""
    import torch

    name = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "no GPU"
    version = getattr(torch.version, "cuda", None)
    today = datetime.date.today().isoformat()
    return f"{name}, torch {torch.__version__}, CUDA {version}, {today}"


def commit_of(folder: Path) -> str:
    """The commit of a checkout, with a mark where files differ; "" of none."""
    say_of = lambda *words: subprocess.run(
        ["git", *words], cwd=folder, capture_output=True, text=True
    ).stdout.strip()
    changed = say_of("status", "--porcelain", "--untracked-files=no", "--", ".", ":!docs")
    return say_of("rev-parse", "HEAD") + ("+" if changed else "")


def say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main())
