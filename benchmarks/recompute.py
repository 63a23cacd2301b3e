"""Memory and time of a training step under activation checkpointing and torch.compile, on the CPU.

python benchmarks/recompute.py [--tokens 1024] [--rows 2] [--depth 8] [--compile] [--json FILE]

One stack (rg_lru and attention layers), forward and backward of one batch, each mode in a process
of its own: peak memory above the model's own, processor time of a step (median of `--repeats`), and
whether loss and gradients equal the plain ones. `--compile` adds torch.compile of every block (a
minute or more at its first step, which is not counted).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported

MODES = ("none", "full", "selective")


def child(asked: argparse.Namespace) -> dict[str, Any]:
    """Figures of one mode."""
    import torch

    from mm.batch import Batch
    from mm.bench.memory import peak_mib
    from mm.layout import Doc, Layout
    from mm.model.layer import init_weights
    from mm.model.model import LmConfig
    from mm.trainer.stage import compile_blocks

    torch.set_num_threads(1)
    torch.manual_seed(0)
    mode, _, compiled = asked.child.partition("+")
    backbone = {"kind": "stack", "pattern": "2*rg_lru attention", "depth": asked.depth}
    backbone |= {"recompute": mode, "mixers": {"attention": {"heads": 4}}}
    model = LmConfig.model_validate({"d_model": asked.d_model, "backbone": backbone}).build()
    init_weights(model)
    model.train()
    if compiled:
        compile_blocks(model)
    T = asked.tokens
    rows = [[Doc(T // 2), Doc(T // 2)] for _ in range(asked.rows)]
    ids = torch.randint(0, 256, (asked.rows, T, 1), dtype=torch.int32)
    layout = Layout.from_rows(rows, T)
    batch = Batch(layout, ids, ids.roll(-1, 1), torch.ones(asked.rows, T))
    found: list[float] = []

    def step() -> None:
        model.zero_grad()
        nll = model(batch, seed=1).heads["tokens"].nll
        assert nll is not None
        loss = nll.sum()
        loss.backward()
        found.append(float(loss.detach()))

    step()  # kernels are chosen, blocks compiled, gradients allocated
    peak = peak_mib(step, torch.device("cpu"))
    seconds = []
    for _ in range(asked.repeats):
        begun = time.process_time()
        step()
        seconds.append(time.process_time() - begun)
    bits = hashlib.sha256()
    for p in model.parameters():
        if p.grad is not None:
            bits.update(p.grad.numpy().tobytes())
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    return {
        "mode": asked.child,
        "peak_mib": peak,
        "cpu_seconds": statistics.median(seconds),
        "loss": found[-1],
        "grad_norm": float(norm),
        "grad_sha256": bits.hexdigest(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0] if __doc__ else "")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--depth", type=int, default=8)
    parser.add_argument("--d-model", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--compile", action="store_true", help="also with torch.compile")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.child:
        sys.stdout.write(json.dumps(child(asked)) + "\n")
        return
    rows: list[dict[str, Any]] = []
    for mode in (*MODES, *(f"{m}+compile" for m in MODES if asked.compile)):
        command = [sys.executable, __file__, *sys.argv[1:], "--child", mode]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        row = json.loads(done.stdout.splitlines()[-1])
        rows.append(row)
        plain = rows[0]
        same = "same bits" if row["grad_sha256"] == plain["grad_sha256"] else (
            f"gradient norm {row['grad_norm'] / plain['grad_norm'] - 1:+.1e}"
        )  # fmt: skip
        peak = "–" if row["peak_mib"] is None else f"{row['peak_mib']:.0f} MiB"
        share = "" if row["peak_mib"] is None else f" ({row['peak_mib'] / plain['peak_mib']:.2f}x)"
        print(
            f"{mode:>18}: peak {peak}{share}, {row['cpu_seconds']:.2f} s of processor time "
            f"({row['cpu_seconds'] / plain['cpu_seconds']:.2f}x), {same}",
            flush=True,
        )
        if asked.json:
            asked.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
