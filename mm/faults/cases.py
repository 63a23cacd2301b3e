"""The faults of processes, disks and memory, and the list of all cases.

A case is a generator of tries. A try is "" when the fault was survived with nothing lost (the run
afterwards is bitwise the unbroken one, unless the case says otherwise), else what was lost.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from mm.faults.bench import Bench
from mm.faults.case import KILLED, USER_ERROR, Case, resume_and_compare
from mm.faults.compare import differences
from mm.faults.data_cases import bombs, pickles, truncated_shards
from mm.faults.stage_cases import (
    border_with_ema,
    border_with_schedule_free,
    rollback_across_border,
)
from mm.faults.wandb_server import DOWN, wandb_server
from mm.model.slices import Slices
from mm.trainer.checkpoint import format as checkpoint
from mm.trainer.health.heartbeat import HUNG
from mm.trainer.health.signals import INTERRUPTED


def _kills_in_save(bench: Bench, quick: bool) -> Iterator[str]:
    for share in (0.1, 0.5, 0.9):
        for _ in range(1 if quick else 20):
            config = bench.config(bench.fresh("kill"))
            ended = bench.train(config, faults={"kill_in_save": {"step": 4, "share": share}})
            saved = checkpoint.newest(bench.folder(config) / "checkpoints")
            if saved is None or saved.state["step"] != 2:
                yield f"killed at {share:.0%}: the checkpoint before is lost"
                continue
            yield resume_and_compare(bench, config, ended, KILLED)


def _kills_in_background(bench: Bench, quick: bool) -> Iterator[str]:
    for share in (0.5,) if quick else (0.1, 0.5, 0.9):
        keep = {"every": 2, "keep_last": 9, "background": True}
        config = bench.config(bench.fresh("background"), checkpoints=keep)
        ended = bench.train(config, faults={"kill_in_save": {"step": 4, "share": share}})
        yield resume_and_compare(bench, config, ended, KILLED)


def _one_dies_in_save(bench: Bench, quick: bool) -> Iterator[str]:
    """One rank of two, while the other writes; in the foreground and in the background."""
    for background in (False, True):
        for rank in (1,) if quick else (0, 1):
            for share in (0.5,) if quick else (0.1, 0.5, 0.9):
                keep = {"every": 2, "keep_last": 9, "background": background}
                config = bench.config(bench.fresh("one"), zero=3, checkpoints=keep)
                fault = {"kill_in_save": {"step": 4, "share": share, "rank": rank}}
                ended = bench.train(config, world=2, faults=fault, timeout_s=300)
                saved = checkpoint.newest(bench.folder(config) / "checkpoints")
                if saved is None or saved.state["step"] != 2 or ended.codes[1 - rank] in (0, -9):
                    yield f"rank {rank} at {share:.0%}: {ended.codes}: {ended.said[-300:]}"
                else:
                    yield resume_and_compare(bench, config, ended, KILLED, world=2)


def _one_disk_full(bench: Bench, quick: bool) -> Iterator[str]:
    """One rank of two gets no room: told by both, and by name."""
    for background in (False, True):
        for rank in (1,) if quick else (0, 1):
            keep = {"every": 2, "keep_last": 9, "background": background}
            config = bench.config(bench.fresh("quota"), zero=1, checkpoints=keep)
            fault = {"small_files": {"step": 4, "bytes": 2**14, "rank": rank}}
            ended = bench.train(config, world=2, faults=fault, timeout_s=300)
            saved = checkpoint.newest(bench.folder(config) / "checkpoints")
            told = f"process {rank}: File too large" in ended.said
            if saved is None or saved.state["step"] != 2 or not told:
                yield f"rank {rank}: exit codes {ended.codes}: {ended.said[-300:]}"
            else:
                yield resume_and_compare(bench, config, ended, USER_ERROR, world=2)


def _kill_before_pointer(bench: Bench, quick: bool) -> Iterator[str]:
    for _ in range(1 if quick else 5):
        config = bench.config(bench.fresh("pointer"))
        ended = bench.train(config, faults={"kill_before_pointer": {"step": 4}})
        saved = checkpoint.newest(bench.folder(config) / "checkpoints")
        if saved is None or saved.state["step"] != 4:
            yield "the renamed checkpoint is not found"
        else:
            yield resume_and_compare(bench, config, ended, KILLED)


def _kills_in_step(bench: Bench, quick: bool) -> Iterator[str]:
    """Every ZeRO stage, both mixers, with gradient accumulation."""
    for zero in (0, 3) if quick else (0, 1, 2, 3):
        for pattern in ("hybrid",) if quick else ("attention", "hybrid"):
            for micro in (2,) if quick else (None, 2):
                config = bench.config(bench.fresh("step"), zero=zero, pattern=pattern, micro=micro)
                fault = {"signal": "SIGKILL", "phase": "step", "step": 4}
                yield resume_and_compare(
                    bench, config, bench.train(config, faults={"signal": fault}), KILLED
                )


def _kill_in_evaluation(bench: Bench, quick: bool) -> Iterator[str]:
    config = bench.config(bench.fresh("evaluation"))
    fault = {"signal": "SIGKILL", "phase": "evaluate", "step": 0}
    yield resume_and_compare(bench, config, bench.train(config, faults={"signal": fault}), KILLED)


def _signals(bench: Bench, quick: bool) -> Iterator[str]:
    """To rank 1 of 2 only."""
    phases = ("start", "stage", "data", "step", "save", "report", "evaluate")
    if quick:
        phases = ("stage", "data", "save", "evaluate")
    for phase in phases:
        for name in ("SIGTERM",) if quick else ("SIGTERM", "SIGUSR1"):
            config = bench.config(bench.fresh(f"signal-{phase}"))
            fault = {"signal": name, "phase": phase, "step": 4, "rank": 1}
            ended = bench.train(config, world=2, faults={"signal": fault})
            if ended.codes != [INTERRUPTED] * 2:
                yield f"{name} in {phase}: exit codes {ended.codes}: {ended.said[-300:]}"
            else:
                yield resume_and_compare(bench, config, ended, INTERRUPTED, world=2)


def _disk(fault: str) -> Callable[[Bench, bool], Iterator[str]]:
    def tries(bench: Bench, quick: bool) -> Iterator[str]:
        for _ in range(1 if quick else 3):
            config = bench.config(bench.fresh(fault))
            whole = bench.whole(config)
            config["out"] = str(bench.root / f"disk-{config['name']}")
            ended = bench.call(config, "disk", fault, str(whole))
            yield "" if ended.codes == [0] else f"exit code {ended.codes}: {ended.said[-300:]}"

    return tries


def _folder_gone(bench: Bench, quick: bool) -> Iterator[str]:
    config = bench.config(bench.fresh("gone"))
    ended = bench.train(config, faults={"gone": {"step": 4}})
    root = bench.folder(config) / "checkpoints"
    root.unlink()
    root.with_name("away").rename(root)
    yield resume_and_compare(bench, config, ended, USER_ERROR)


def _damage(bench: Bench, quick: bool) -> Iterator[str]:
    """Of the newest checkpoint: the one before is used."""

    def flip(path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)

    damages: list[Callable[[Path], Any]] = [flip, Path.unlink, lambda p: p.write_bytes(b"")]
    tensors = ("model.safetensors", "model.optimizer.safetensors")
    files = (*tensors, "state.json", "index.json", "COMPLETE")
    for damage in damages[:2] if quick else damages:
        for name in files[1:2] if quick else files:
            config = bench.config(bench.fresh("damage"))
            fault = {"signal": "SIGKILL", "phase": "step", "step": 6}
            ended = bench.train(config, faults={"signal": fault})
            damage(bench.folder(config) / "checkpoints" / "step_000004" / name)
            yield resume_and_compare(bench, config, ended, KILLED)


def _nan(bench: Bench, quick: bool) -> Iterator[str]:
    """One step is left out on all ranks; with it the weights of the checkpoint before it."""
    for zero in (0, 3) if quick else (0, 1, 2, 3):
        keep = {"every": 1, "keep_last": 9}
        config = bench.config(bench.fresh("nan"), zero=zero, checkpoints=keep)
        ended = bench.train(config, world=2, faults={"nan": {"step": 3, "rank": 1}})
        root = bench.folder(config) / "checkpoints"
        if ended.codes != [0, 0]:
            yield f"stage {zero}: exit codes {ended.codes}: {ended.said[-300:]}"
            continue
        two, three = (Slices(root / f"step_00000{step}").tensors("model") for step in (2, 3))
        same = two.keys() == three.keys() and all(torch.equal(two[n], three[n]) for n in two)
        row = json.loads((bench.folder(config) / "skipped.jsonl").read_text().splitlines()[0])
        last = json.loads((bench.folder(config) / "metrics.jsonl").read_text().splitlines()[-1])
        good = same and row["step"] == 2 and last["skipped"] == 1 and last["loss/total"] is not None
        yield "" if good else f"stage {zero}: weights changed, or the skip was not counted"


def _dead_rank(bench: Bench, quick: bool) -> Iterator[str]:
    for phase in ("step",) if quick else ("data", "step", "save"):
        config = bench.config(bench.fresh("dead"))
        fault = {"signal": "SIGKILL", "phase": phase, "step": 4, "rank": 1}
        ended = bench.train(config, world=2, faults={"signal": fault}, timeout_s=120)
        told = "rank 1 (" in ended.said and "is dead" in ended.said
        if ended.codes[0] in (0, KILLED) or not told:
            yield f"killed in {phase}: the other rank ended with {ended.codes[0]}, verdict: {told}"
        else:
            yield resume_and_compare(bench, config, ended, KILLED, world=2)


def _hung_rank(bench: Bench, quick: bool) -> Iterator[str]:
    for phase in ("step",) if quick else ("data", "step"):
        config = bench.config(bench.fresh("hung"), guard={"hang_s": 15.0})
        fault = {"phase": phase, "step": 4, "rank": 1}
        ended = bench.train(config, world=2, faults={"sleep": fault}, timeout_s=180)
        if HUNG not in ended.codes or "hang: rank 1 (" not in ended.said or 0 in ended.codes:
            yield f"asleep in {phase}: exit codes {ended.codes}: {ended.said[-400:]}"
        else:
            yield resume_and_compare(bench, config, ended, HUNG, world=2)


def _two_modalities(bench: Bench, quick: bool) -> Iterator[str]:
    """Losses as of one process that sees both, to rounding."""
    half = {name: bench.data(name, rows=4) for name in ("text", "image")}
    for zero in (0, 3) if quick else (0, 1, 2, 3):
        model = bench.config("")["model"]
        model["backbone"]["block"]["dropout"] = 0.0  # noise is drawn by rank
        config = bench.config(bench.fresh("halves"), zero=zero, model=model)
        whole = bench.whole(
            {**config, "engine": {**config["engine"], "zero_stage": 0}}, faults={"halves": half}
        )
        ended = bench.train(config, world=2, faults={"halves": half})
        if ended.codes != [0, 0]:
            yield f"stage {zero}: exit codes {ended.codes}: {ended.said[-300:]}"
        else:
            yield differences(whole, bench.folder(config), rel=1e-5)


def _worlds(bench: Bench, quick: bool) -> Iterator[str]:
    """Losses as of the unbroken run on one process, to rounding; indivisible sizes are refused."""
    pairs = ((2, 1), (1, 2)) if quick else ((2, 1), (1, 2), (2, 4), (4, 2))
    for zero in (3,) if quick else (0, 1, 2, 3):
        for old, new in pairs:
            model = bench.config("")["model"]
            model["backbone"]["block"]["dropout"] = 0.0
            config = bench.config(bench.fresh("world"), zero=zero, model=model)
            whole = bench.whole(config)
            fault = {"signal": "SIGTERM", "phase": "step", "step": 3}
            ended = bench.train(config, world=old, faults={"signal": fault})
            again = bench.train(config, world=new)
            if set(ended.codes) != {INTERRUPTED} or set(again.codes) != {0}:
                yield f"{old} to {new}: {ended.codes}, {again.codes}: {again.said[-300:]}"
            else:
                yield differences(whole, bench.folder(config), rel=1e-5)
    config = bench.config(bench.fresh("three"))
    ended = bench.train(config, world=3)
    told = "does not divide over 3 processes; possible: [1, 2, 4, 8]" in ended.said
    yield (
        "" if told and set(ended.codes) == {USER_ERROR} else f"3: {ended.codes} {ended.said[-300:]}"
    )


def _wandb(bench: Bench, quick: bool) -> Iterator[str]:
    online = {"WANDB_MODE": "online", "WANDB_API_KEY": "x" * 40}
    down = {**online, "WANDB_BASE_URL": "http://127.0.0.1:9"}  # the discard port: nothing listens
    with wandb_server() as server:
        there = {**online, "WANDB_BASE_URL": server.url}
        situations: tuple[tuple[dict[str, str], dict[str, Any]], ...] = (
            (down, {}),
            (there, {"wandb_down": {"step": 3, "url": server.url + DOWN}}),
            ({"WANDB_MODE": "offline"}, {"wandb_killed": {"step": 3}}),
        )
        for env, faults in situations:
            config = bench.config(bench.fresh("wandb"))
            ended = bench.train(config, faults=faults, env=env)
            if ended.codes != [0]:
                yield f"exit codes {ended.codes}: {ended.said[-300:]}"
            else:
                yield differences(bench.whole(config), bench.folder(config))


def _two_jobs(bench: Bench, quick: bool) -> Iterator[str]:
    from mm.trainer.folder import lock

    config = bench.config(bench.fresh("two"))
    with lock(bench.folder(config)):
        ended = bench.train(config)
    if "trains here already" not in ended.said:
        yield f"the second job was not refused: {ended.codes} {ended.said[-300:]}"
    else:
        yield resume_and_compare(bench, config, ended, USER_ERROR)


def _memory(bench: Bench, quick: bool) -> Iterator[str]:
    config = bench.config(bench.fresh("memory"))
    ended = bench.train(config, faults={"memory": {"step": 4}})
    if "ran out of memory" not in ended.said or "longest: " not in ended.said:
        yield f"not told: {ended.codes} {ended.said[-300:]}"
    else:
        yield resume_and_compare(bench, config, ended, USER_ERROR)


def _soak(bench: Bench, quick: bool) -> Iterator[str]:
    """Resident memory within 2 % of itself, files and threads equal, after the first quarter."""
    steps = 200 if quick else 1000
    file = bench.root / bench.fresh("meter")
    config = bench.config(bench.fresh("soak"), steps=steps, checkpoints={"every": 50})
    meter = {"file": str(file), "every": steps // 20}
    ended = bench.train(config, faults={"meter": meter}, timeout_s=590)
    if ended.codes != [0]:
        yield f"exit codes {ended.codes}: {ended.said[-300:]}"
        return
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    first, later = rows[len(rows) // 4], rows[len(rows) // 4 :]
    grown = max(row["rss_kb"] for row in later) / first["rss_kb"] - 1
    files = max(row["files"] for row in later) - first["files"]
    threads = max(row["threads"] for row in later) - first["threads"]
    flat = grown <= 0.02 and files <= 0 and threads <= 0
    yield "" if flat else f"memory {grown:+.1%}, open files {files:+d}, threads {threads:+d}"


CASES = (
    Case("kill -9 at 10, 50, 90 % of a save", "same bits after a resume", _kills_in_save),
    Case("kill -9 in a background save", "same bits after a resume", _kills_in_background),
    Case("kill -9 of one rank in a save of two", "same bits after a resume", _one_dies_in_save),
    Case("disk of one rank full in a save", "told by all; same bits", _one_disk_full),
    Case("kill -9 between rename and pointer", "the new checkpoint is used", _kill_before_pointer),
    Case("kill -9 in a step, ZeRO 0-3", "same bits after a resume", _kills_in_step),
    Case("kill -9 before the evaluation", "same bits, then evaluated", _kill_in_evaluation),
    Case("stopped at the border of two stages, EMA", "same bits", border_with_ema),
    Case("stopped at the border, schedule-free", "same bits", border_with_schedule_free),
    Case(
        "rollback across the border of two stages",
        "same bits as without the bad batches",
        rollback_across_border,
    ),
    Case("signal to one rank of two, every phase", "all ranks exit 75, same bits", _signals),
    Case("disk full in a save", "told; the one before intact; same bits", _disk("full")),
    Case("checkpoint folder read-only", "told after retries; same bits", _disk("readonly")),
    Case("checkpoint folder vanishes", "told after retries; same bits", _folder_gone),
    Case("flipped byte, deleted or empty file", "the checkpoint before; same bits", _damage),
    Case("truncated tar of the data", "refused by name; same bits once restored", truncated_shards),
    Case("image and audio bombs", "quarantined, the rest is packed", bombs),
    Case("NaN batch on one rank, ZeRO 0-3", "step left out on all ranks, counted", _nan),
    Case("dead rank", "the other ends and names it; same bits", _dead_rank),
    Case("rank that hangs", "stacks, verdict, exit 76; same bits", _hung_rank),
    Case("text-only beside image-only rank", "losses as of one process", _two_modalities),
    Case("another number of processes", "losses as unbroken; 3 is refused", _worlds),
    Case("W&B down at the start or in the run, or killed", "same bits", _wandb),
    Case("two jobs in one folder", "the second is refused; same bits", _two_jobs),
    Case("hostile pickles", "not read, refused; no code runs", pickles),
    Case("out of memory in a step", "lengths are told; same bits", _memory),
    Case("soak of 1,000 steps (quick: 200)", "memory, files, threads flat", _soak),
)
