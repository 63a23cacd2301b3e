"""What processes that share a row pass each other in a layer, and the time of it.

python benchmarks/sequence.py [--processes 2] [--width 256] [--tokens 1024,4096,16384]
    [--mixers attention,rg_lru,...] [--repeat 3] [--json FILE]

Gloo processes of one thread each, a row of one document, fp32, one forward and backward a layer.
Bytes: what one process hands to collectives. Seconds: the best of so many, of one process with the
whole row and of all processes with their slices; cores that are shared, and a memory bus that is
full, show in them.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mm.layout import Layout
from mm.mask import Causal
from mm.model.context import Ctx
from mm.model.layer import Layer, init_weights
from mm.registry import MIXERS
from mm.shard import Shard

MIXERS_ASKED = (
    "attention,rg_lru,gated_scan,mamba,linear_attention,delta_rule,mlstm,s4d,rwkv4,short_conv"
)
COLLECTIVES = ("all_to_all_single",)


def count_bytes() -> list[int]:
    """Every collective adds what it is handed."""
    sent: list[int] = []

    def counting(plain: Callable[..., Any]) -> Callable[..., Any]:
        def call(out: Tensor, given: Tensor, *args: Any, **kw: Any) -> Any:
            sent.append(given.numel() * given.element_size())
            return plain(out, given, *args, **kw)

        return call

    for name in COLLECTIVES:
        setattr(dist, name, counting(getattr(dist, name)))
    return sent


def seconds(layer: Layer, x: Tensor, ctx: Ctx, repeat: int) -> float:
    """The best of ``repeat`` forward and backward passes, after one that is not timed."""
    best = float("inf")
    for i in range(repeat + 1):
        if ctx.shard is not None:
            dist.barrier()
        begun = time.perf_counter()
        layer(x, ctx).y.sum().backward()
        if i:
            best = min(best, time.perf_counter() - begun)
    return best


def work(rank: int, args: argparse.Namespace, out: Path) -> None:
    torch.set_num_threads(1)
    store = f"file://{out.parent / 'store'}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=args.processes)
    sent, found = count_bytes(), []
    for kind in args.mixers.split(","):
        torch.manual_seed(0)
        layer = MIXERS.get(kind)().build(args.width)
        init_weights(layer)
        for tokens in map(int, args.tokens.split(",")):
            whole = Layout.plain(1, tokens)
            x = torch.randn(1, tokens, args.width).requires_grad_()
            alone = torch.zeros(1)
            if rank == 0:
                alone[0] = seconds(layer, x, Ctx(whole, Causal()), args.repeat)
            dist.barrier()
            shard, own = Shard.of(whole, rank, args.processes, dist.group.WORLD)
            part = shard.slice(x.detach()).clone().requires_grad_()
            sent.clear()
            shared = seconds(layer, part, Ctx(own, Causal(), shard=shard), args.repeat)
            passed = sum(sent) // (args.repeat + 1)
            row = {"mixer": kind, "tokens": tokens, "bytes": passed}
            found.append(row | {"alone_s": float(alone), "shared_s": shared})
    if rank == 0:
        out.write_text(json.dumps(found))
    dist.barrier()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--tokens", default="1024,4096,16384")
    parser.add_argument("--mixers", default=MIXERS_ASKED)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank is not None:
        work(args.rank, args, args.out)
        return
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.json"
        words = [sys.executable, __file__, *sys.argv[1:], "--out", str(out), "--rank"]
        env = os.environ | {"OMP_NUM_THREADS": "1"}
        children = [
            subprocess.Popen([*words, str(rank)], env=env) for rank in range(args.processes)
        ]
        codes = [child.wait() for child in children]
        if any(codes):
            sys.exit(f"processes ended with {codes}")
        found = json.loads(out.read_text())
    sys.stdout.write(
        f"{'mixer':20}{'tokens':>8}{'KiB passed':>12}{'alone ms':>10}{'shared ms':>10}\n"
    )
    for row in found:
        kib, alone, shared = row["bytes"] / 1024, 1000 * row["alone_s"], 1000 * row["shared_s"]
        sys.stdout.write(
            f"{row['mixer']:20}{row['tokens']:8}{kib:12.1f}{alone:10.1f}{shared:10.1f}\n"
        )
    if args.json:
        args.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
