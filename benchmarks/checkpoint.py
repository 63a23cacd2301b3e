"""What build, save and resume cost each of several processes: memory, bytes sent, seconds.

    python benchmarks/checkpoint.py --processes 4 --stages 0 1 2 3 --out runs/checkpoint
    python benchmarks/checkpoint.py --processes 2 --small --out runs/checkpoint

A decoder of about 100 M parameters in fp32 (``--small``: 2 M) takes steps of AdamW on this
repository's own files and saves after some; then it goes on from the last checkpoint, with nine
saves in the background. Measured is the save itself (of the last step, and by the process that
needs most; seconds are medians of all but the first), without the forward pass whose losses are
kept beside a checkpoint; in the background with what the next update waits for the copies.
``more`` is what the resident memory of a process grew by while it saved. Of a build and of a resume
it is the peak of live tensors until the network is filled, and until the engine has its states;
read is what a process read of the checkpoint. Then what a 70 B model costs 512 processes, on paper,
by the code that places the tensors. A line of bars closes each stage, and the exit code is 1 where
one is missed. That of the stall is judged at full size alone: a save of some MiB takes no time.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from zero_stages import prepare

HERE = Path(__file__).resolve()
EVERY, MB = 3, 2**20
SIZE = ["model.d_model=768", "model.backbone.depth=14", "model.backbone.pattern=attention"]
TINY = ["model.d_model=128", "model.backbone.depth=8", "model.backbone.pattern=attention"]
ROWS = ["stages.0.data.seq_len=32", "stages.0.data.batch_size=4", "stages.0.eval_every=0"]


class Collectives(TorchDispatchMode):
    """Bytes of the tensors that collectives were given."""

    n_bytes = 0

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        from mm.plan.tally import COLLECTIVES, tensors_in

        if op.namespace == "c10d" and op._schema.name.split("::")[1] in COLLECTIVES:
            self.n_bytes += sum(t.numel() * t.element_size() for t in tensors_in(args[0]))
        return op(*args, **(kwargs or {}))


def memory(key: str) -> int:
    """Bytes of ``VmRSS`` or ``VmHWM`` of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def measure_build(facts: dict[str, Any]) -> None:
    """Put peaks of live tensors, values of the network and bytes read into ``facts``."""
    from mm.model.by_module import units
    from mm.model.slices import Slices
    from mm.plan.tally import Measure
    from mm.trainer import loop, stage

    n_read = 0
    enter, engine, read = loop.enter_stage, stage.Engine, Slices.read
    found = Measure()

    def begun(module: Any, *args: Any) -> Any:
        size = lambda p: 4 * getattr(p, "ds_numel", p.numel())
        parts = [
            {p for _, m in u.parts for p in m.parameters(recurse=False)} for u in units(module)
        ]
        facts["weights"] = sum(size(p) for p in module.parameters())
        facts["largest"] = max(sum(map(size, part)) for part in parts)
        facts["filled"] = found.live.peak - facts["before"]
        return engine(module, *args)

    def measured(*args: Any) -> Any:
        begin = time.perf_counter()
        before = n_read
        with found:
            facts["before"] = found.live.now
            made = enter(*args)
        facts["read"] = n_read - before
        facts["built"] = found.live.peak - facts["before"]
        facts["seconds"] = time.perf_counter() - begin
        return made

    def counted(*args: Any) -> Any:
        nonlocal n_read
        out = read(*args)
        n_read += out.numel() * out.element_size()
        return out

    loop.enter_stage, stage.Engine, Slices.read = measured, begun, counted  # type: ignore


def child(config: str, changes: list[str]) -> None:
    """In one process: train, and write what its start and each save cost it."""
    from mm.run import Run
    from mm.trainer.checkpoint.writer import Writer
    from mm.trainer.loop import Trainer

    start: dict[str, Any] = {}
    measure_build(start)
    rows: list[dict[str, Any]] = []
    plain = Writer.__call__

    def measured(self: Writer, root: Path, moment: Any, **keep: Any) -> None:
        held = [h.mine for table in moment.files.values() for h in table.values()]
        own = sum(t.numel() * t.element_size() for t in held if t is not None)
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
        before, begun = memory("VmRSS"), time.perf_counter()
        with Collectives() as found:
            plain(self, root, moment, **keep)
        seconds = time.perf_counter() - begun
        more = memory("VmHWM") - before
        rows.append({"own": own, "more": more, "sent": found.n_bytes, "seconds": seconds})

    def waited(self: Writer) -> None:
        begun = time.perf_counter()
        settle(self)
        if rows:
            rows[-1]["seconds"] += time.perf_counter() - begun

    settle, Writer.settle = Writer.settle, waited  # type: ignore[method-assign]
    Writer.__call__ = measured  # type: ignore[method-assign]
    run = Run.load(config, changes)
    Trainer(run).fit()
    (run.out / f"{run.name}.{os.environ['RANK']}.json").write_text(json.dumps([start, rows]))


Ranks = list[tuple[dict[str, Any], list[dict[str, Any]]]]


def trained(config: Path, out: Path, processes: int, name: str, changes: list[str]) -> Ranks:
    """Train in processes; what each of them measured of its start and of its saves."""
    changes = [f"name={name}", f"out={out}", "engine.precision=fp32", *changes]
    changes += ["checkpoints.keep_last=1", "tracking.mode=disabled"]
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    done = subprocess.run(
        [sys.executable, *launch, str(HERE), "--child", str(config), *changes, *ROWS],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    if done.returncode:
        raise SystemExit(f"{name}: {done.stderr[-2000:]}")
    return [json.loads((out / f"{name}.{r}.json").read_text()) for r in range(processes)]


def saves(found: Ranks) -> dict[str, Any]:
    """Of the last save of a run: the dearest process; and the median seconds of all but one."""
    ranks = [rows for _, rows in found]
    last = [rows[-1] for rows in ranks]
    most = max(last, key=lambda row: row["more"] - row["own"])
    times = [max(rows[i]["seconds"] for rows in ranks) for i in range(1, len(ranks[0]))]
    return {**most, "sent": max(row["sent"] for row in last), "stall": statistics.median(times)}


def starts(found: Ranks) -> str:
    """Of a start: the dearest process, in words."""
    most = {key: max(start[key] for start, _ in found) / MB for key in found[0][0]}
    return (
        f"weights {most['weights']:.0f} MiB, largest module {most['largest']:.0f}, peak until "
        f"filled {most['filled']:.0f}, until the engine is there {most['built']:.0f}, "
        f"read {most['read']:.0f}, {MB * most['seconds']:.1f} s"
    )


def judged(bars: dict[str, tuple[float, float]]) -> bool:
    """Print (figure, bar) by name, with a verdict; True where every figure is within its bar."""
    missed = [name for name, (figure, bar) in bars.items() if figure > bar]
    told = [f"{name} {figure:.4g} of {bar:.4g}" for name, (figure, bar) in bars.items()]
    print(f"  bars: {', '.join(told)}: {'MISSED: ' + ', '.join(missed) if missed else 'met'}")
    return not missed


def bars_of(
    wait: dict[str, Any], back: dict[str, Any], first: Ranks, stage: int, small: bool
) -> dict[str, tuple[float, float]]:
    """Figures and bars of a stage: MiB beside the slices, bytes sent, a stall's share, a build."""
    n = len(first)
    more = max((row["more"] - row["own"]) / MB for row in (wait, back))
    out: dict[str, tuple[float, float]] = {}
    out |= {
        "MiB beside the slices": (more, 256),
        "bytes sent": (max(wait["sent"], back["sent"]), 0),
    }
    if not small:
        out["stall, % of a save"] = (100 * back["stall"] / wait["stall"], 5)
    if stage == 3:
        most = {key: max(start[key] for start, _ in first) / MB for key in first[0][0]}
        bar = most["weights"] / n + most["largest"] + 64
        out["MiB of the build until filled"] = (most["filled"], bar)
    return out


def on_paper() -> None:
    """Llama-2's 70 B shapes and AdamW's two states on 512 processes, a node of 8."""
    from mm.trainer.checkpoint.cost import cost, files_of

    d, wide, few = 8192, 28672, 1024
    shapes: dict[str, tuple[int, ...]] = {"embed": (32000, d), "head": (32000, d), "norm": (d,)}
    for i in range(80):
        shapes |= {f"{i}.qkv": (d + 2 * few, d), f"{i}.out": (d, d), f"{i}.down": (d, wide)}
        shapes |= {f"{i}.gate_up": (2 * wide, d), f"{i}.norm": (d,), f"{i}.ffn_norm": (d,)}
    for stage in range(4):
        c = cost(files_of(shapes, stage, 512, ("exp_avg", "exp_avg_sq")), 512)
        print(
            f"70 B x 512, stage {stage}: {c.total / 1e9:.0f} GB, at most {c.most / 1e9:.2f} GB a "
            f"process, {c.files} files, {c.seconds(1e9, 8):.1f} s at 1 GB/s a node"
        )


def main() -> int:
    """Print figures and bars of each stage; 1 where a bar is missed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--stages", type=int, nargs="+", default=[0, 1, 2, 3])
    parser.add_argument("--out", type=Path, default=Path("runs/checkpoint"))
    parser.add_argument("--small", action="store_true", help="2 M parameters: does it run?")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args, changes = parser.parse_known_args()
    if args.child:
        child(args.child, changes)
        return 0
    out, n = args.out.resolve(), args.processes
    config, size, every = prepare(out), SIZE, EVERY
    if args.small:
        size, every = TINY, 1
    on_paper()
    missed = 0
    for stage in args.stages:
        name = f"stage{stage}"
        shutil.rmtree(out / name, ignore_errors=True)
        changes = [f"engine.zero_stage={stage}", *size, f"checkpoints.every={every}"]
        ends = [f"stages.0.budget.steps={k * every}" for k in (3, 12)]
        modes = [f"checkpoints.background={word}" for word in ("false", "true")]
        first, again = (
            trained(config, out, n, name, [*changes, end, mode])
            for end, mode in zip(ends, modes, strict=True)
        )
        wait, back = saves(first), saves(again)
        shutil.rmtree(out / name)
        print(
            f"stage {stage}: slices {wait['own'] / MB:.0f} MiB, more {wait['more'] / MB:.0f} MiB, "
            f"collectives {wait['sent']} bytes, save {wait['stall']:.2f} s, stall in the "
            f"background {back['stall']:.2f} s ({back['stall'] / wait['stall']:.1%})\n"
            f"  build: {starts(first)}\n  resume: {starts(again)}",
            flush=True,
        )
        missed += not judged(bars_of(wait, back, first, stage, args.small))
    return int(missed > 0)


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
