"""Speed and memory goals on the CPU, each a ratio within one interleaved run on one thread.

python benchmarks/cpu.py [--only P4 --only P7] [--seconds 60] [--keep-memory] [--json FILE]

Times are processor time of this process; a figure is the median of the ratios of neighbouring
runs, with its 95 % interval (measure.py). Peers (transformers, litgpt, mambapy,
flash-linear-attention's plain PyTorch, webdataset) are optional: a goal says which one it lacks.
B rows, T tokens, D model, H heads, K key width.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from cpu_ops import heads, p4, p5, p6, p7, sdpa  # noqa: E402
from cpu_peers import (  # noqa: E402
    HEADS,
    HIDDEN,
    IDS,
    LAYERS,
    D,
    PlainGPT,
    litgpt,
    llama,
    qwen3_next,
    transformers,
)
from host import p12, p13  # noqa: E402
from measure import (  # noqa: E402
    PATIENCE,
    Children,
    Figure,
    Missing,
    Ratio,
    Work,
    at_least,
    at_most,
    backward,
    backward_of,
    fastest,
    ratios,
)
from torch import Tensor, nn  # noqa: E402
from torch.nn.attention import SDPBackend, sdpa_kernel  # noqa: E402

from mm.batch import Batch  # noqa: E402
from mm.bench.memory import MIB, available_mib, peak_mib  # noqa: E402
from mm.kernels.attention import attention as attention_op  # noqa: E402
from mm.kernels.attention.spec import MaskSpec  # noqa: E402
from mm.kernels.cross_entropy import linear_cross_entropy  # noqa: E402
from mm.launch.environment import keep_freed_memory  # noqa: E402
from mm.layout import Doc, Layout  # noqa: E402
from mm.mask import Causal  # noqa: E402
from mm.model.context import Ctx
from mm.model.layer import init_weights  # noqa: E402
from mm.model.model import LmConfig  # noqa: E402
from mm.registry import MIXERS  # noqa: E402
from mm.specs import TokenSpec  # noqa: E402
from mm.vocabulary import RESERVED, Vocabulary  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]


# ---- whole models: P1, P2, P3, P8 ----


def ours(pattern: str, mixers: dict[str, Any]) -> nn.Module:
    ffn = {"kind": "swiglu", "hidden": HIDDEN}
    stack = {"kind": "stack", "pattern": pattern, "mixers": mixers, "ffn": ffn}
    vocabulary = Vocabulary().add(TokenSpec("text", IDS - RESERVED - 2))
    model = LmConfig(d_model=D, backbone=stack).build(vocabulary)
    torch.manual_seed(0)
    init_weights(model)
    return model


def step(model: nn.Module, B: int, T: int, bf16: bool) -> Work:
    """Forward, backward and AdamW on random ids; ours and the peers' models alike."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    ids = torch.randint(IDS, (B, T), generator=torch.Generator().manual_seed(0))
    after = ids.roll(-1, 1)
    batch = Batch(
        Layout.plain(B, T), ids.int()[..., None], after.int()[..., None], torch.ones(B, T)
    )
    is_ours = isinstance(getattr(model, "_orig_mod", model), type(ours("attention", {})))

    def work() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            if is_ours:
                loss = model(batch).heads["tokens"].nll.mean()
            elif hasattr(model, "lm_head") and not hasattr(model, "transformer"):
                loss = model(input_ids=ids, labels=ids).loss
            else:  # litgpt returns logits
                loss = F.cross_entropy(model(ids).flatten(0, 1).float(), after.flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return work


def decoder() -> nn.Module:
    return ours(f"{LAYERS}*attention", {"attention": {"heads": HEADS, "qk_norm": False}})


def p1() -> Iterator[Figure]:
    """The fastest of the peers that are here."""
    models = {"HF Llama sdpa": lambda: llama("sdpa"), "nanoGPT's form": PlainGPT, "litgpt": litgpt}
    peers: dict[str, Work] = {}
    for name, build in models.items():
        with contextlib.suppress(Missing):
            peers[name] = step(build(), 2, 512, True)
    name, found = fastest(step(decoder(), 2, 512, True), peers, repeats=15)
    yield at_most("P1", f"decoder step / {name}, bf16", 1.02, "0.93-1.05", found)


def p2() -> Iterator[Figure]:
    compiled = torch.compile(decoder())
    (found,) = ratios(step(compiled, 2, 512, True), step(llama("eager"), 2, 512, True), repeats=15)
    yield at_most("P2", "compiled decoder step / HF Llama eager, bf16", 0.80, "0.74", found)


def p3() -> Iterator[Figure]:
    n, T = 1024, 512
    for bf16, bar, anchor in ((False, 0.72, ".79"), (True, 0.42, ".44")):
        kind = torch.bfloat16 if bf16 else torch.float32
        a, b = torch.randn(n, n).to(kind), torch.randn(n, n).to(kind)
        model = decoder()
        products = lambda a=a, b=b: [a @ b for _ in range(8)]
        (found,) = ratios(products, step(model, 2, T, bf16))
        weights = sum(p.numel() for p in model.parameters()) - IDS * D  # the lookup is no product
        attended = LAYERS * 2 * T * D  # multiplications a token for scores and values, half masked
        flops = 2 * T * (6 * weights + 3 * attended)
        share = Ratio(*(x * flops / (16 * n**3) for x in found))
        yield at_least(
            "P3", f"share of the GEMM peak, {'bf16' if bf16 else 'fp32'}", bar, anchor, share
        )


def p8() -> Iterator[Figure]:
    linear = {"heads": HEADS, "key_dim": 64, "value_dim": 64}
    for B, T, bar, anchor in ((4, 512, 1.0, "1.03"), (1, 8192, 0.80, ".75")):
        attention = {"heads": HEADS, "position": {"kind": "rope", "fraction": 0.25}}
        model = ours(
            "2*(2*gated_deltanet gated_attention)",
            {"gated_deltanet": linear, "gated_attention": attention},
        )
        theirs = step(qwen3_next(), B, T, True)
        (found,) = ratios(step(model, B, T, True), theirs, repeats=7)
        yield at_most("P8", f"2:1 hybrid step / HF Qwen3-Next, {B}x{T}, bf16", bar, anchor, found)


# ---- kernels: P4 to P7, P9 to P11 ----


def p9() -> Iterator[Figure]:
    B, T = 2, 512
    layer = MIXERS.get("mamba")().build(D)
    init_weights(layer)
    ctx = Ctx(Layout.plain(B, T), Causal())
    x, missing = torch.randn(B, T, D), []
    mine = backward_of(lambda x: layer(x, ctx).y, layer, x)
    if importlib.util.find_spec("mambapy") is not None:
        from mambapy.mamba import MambaBlock, MambaConfig  # type: ignore[import-not-found]

        block = MambaBlock(MambaConfig(d_model=D, n_layers=1))
        (found,) = ratios(mine, backward_of(block, block, x))
        what = "mambapy layer / Mamba layer, 2x512"
        yield at_least("P9", what, 5, "8 (estimate)", found.inverse())
    else:
        missing.append("mambapy")
    try:
        peer = transformers()
        config = peer.MambaConfig(
            hidden_size=D, num_hidden_layers=1, vocab_size=8, use_associative_scan=False
        )
        mixer = peer.MambaModel(config).layers[0].mixer
        mine()
        (found,) = ratios(mine, backward_of(mixer, mixer, x), repeats=1, warm=False)
        yield at_least("P9", "HF slow path / Mamba layer, 2x512", 40, "60", found.value**-1)
    except Missing as error:
        missing.append(str(error))
    if missing:
        raise Missing(", ".join(missing))


class _Pass(nn.Module):
    """A matrix of ones on the diagonal: what is left of a mixer is the mixing."""

    def forward(self, x: Tensor, ctx: Ctx | None = None) -> Tensor:
        return x


def p10() -> Iterator[Figure]:
    T, H, K = 4096, 6, 64
    fused = torch.randn(1, T, 3 * H * K)
    place = torch.arange(T)
    causal = place[:, None] >= place
    document = place // (T // 4)
    cases = {
        "window 256": (256, Layout.plain(1, T), causal & (place[:, None] - place < 256), ".11-.14"),
        "4 documents": (
            None,
            Layout.from_rows([[Doc(T // 4) for _ in range(4)]]),
            causal & (document[:, None] == document),
            ".17-.19",
        ),
    }
    for name, (window, layout, mask, anchor) in cases.items():
        config = MIXERS.get("attention")(heads=H, window=window, qk_norm=False, position="none")
        layer = config.build(H * K, lambda *_: _Pass())
        ctx = Ctx(layout, Causal())
        mine = backward(lambda x, layer=layer, ctx=ctx: layer(x, ctx).y, fused)

        def dense(x: Tensor, mask: Tensor = mask) -> Tensor:
            q, k, v = x.view(1, T, 3 * H, K).transpose(1, 2).split(H, dim=1)
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

        (found,) = ratios(mine, backward(dense, fused))
        yield at_most("P10", f"attention, {name} / SDPA with a mask, T=4096", 0.20, anchor, found)
    q, k, v, _ = heads(T)

    def by(kind: SDPBackend) -> Work:
        def run(*x: Tensor) -> Tensor:
            with sdpa_kernel(kind):
                return sdpa(*x)

        return backward(run, q, k, v)

    mine = backward(lambda *x: attention_op(*x, MaskSpec(causal=True)), q, k, v)
    variants = {"flash": by(SDPBackend.FLASH_ATTENTION), "plain": by(SDPBackend.MATH)}
    name, best = fastest(mine, variants, repeats=15)
    what = f"attention, causal / SDPA ({name}), T=4096: end of the interval"
    yield at_most("P10", what, 1.05, "1.0", best.high)


def p11() -> Iterator[Figure]:
    """Rows of width 64: the products are small beside the logits, which is the harder case."""
    N, D = 131072, 64
    rows = 4096 if available_mib(torch.device("cpu")) > 12288 else 512
    g = torch.Generator().manual_seed(0)
    h = torch.randn(rows, D, generator=g).requires_grad_()
    w = (torch.randn(N, D, generator=g) * D**-0.5).requires_grad_()
    y = torch.randint(N, (rows,), generator=g)
    mine = lambda: torch.autograd.grad(linear_cross_entropy(h, w, y).sum(), (h, w))
    plain = lambda: torch.autograd.grad(F.cross_entropy(h @ w.T, y, reduction="sum"), (h, w))
    (found,) = ratios(mine, plain, repeats=5)
    yield at_most("P11", f"fused cross-entropy / plain, time, {rows}x131072", 1.0, ".96", found)
    own = (h.numel() + w.numel()) * 4 / MIB  # the gradients, which both return
    cpu = torch.device("cpu")
    peaks = [peak_mib(work, cpu) for work in (mine, plain)]
    if peaks[0] is None or peaks[1] is None:
        raise Missing("/proc/self/clear_refs, which tells the peak memory")
    share = (peaks[0] - own) / (peaks[1] - own)
    yield at_most("P11", f"the same, peak memory beyond gradients, {rows} rows", 0.15, ".14", share)


# ---- GPU code without a GPU: P14, P15 ----


def suite(goal: str, what: str, chosen: str, bar: float) -> Iterator[Figure]:
    """Processor seconds of the tests that pytest's ``-k`` chooses; infinite when one fails."""
    if importlib.util.find_spec("triton") is None:
        raise Missing("triton")
    folder = ROOT / "tests"
    files = sorted({*folder.glob("test_triton_*.py"), *folder.glob("test_kernel_*.py")})
    command = [sys.executable, "-m", "pytest", "-q", "--timeout", "0", "-k", chosen]
    with Children() as spent:
        done = subprocess.run(
            [*command, *map(str, files)], cwd=ROOT, capture_output=True, text=True
        )
    failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    taken = spent.seconds if done.returncode == 0 else math.inf
    yield at_most(goal, "; ".join((f"{what}, processor seconds", *failed)), bar, "-", taken)


def p14() -> Iterator[Figure]:
    yield from suite("P14", "ahead-of-time compilation for sm_90", "hopper", 60)


def p15() -> Iterator[Figure]:
    yield from suite("P15", "Triton kernels in the interpreter", "triton and not hopper", 90)


_GOALS = (p1, p2, p3, p4, p5, p6, p7, p8, p9, p10, p11, p12, p13, p14, p15)
GOALS = {f.__name__.upper(): f for f in _GOALS}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", action="append", choices=list(GOALS), metavar="GOAL")
    parser.add_argument("--seconds", type=float, default=60.0, help="of one comparison")
    keep = "let the allocator keep freed memory, for us and the peers, as training does for us"
    parser.add_argument("--keep-memory", action="store_true", help=keep)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    if asked.keep_memory:
        keep_freed_memory()
    PATIENCE[0] = asked.seconds
    load = f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"
    print(f"torch {torch.__version__}, one thread, {load}", flush=True)
    found = []
    for goal in asked.only or GOALS:
        try:
            for f in GOALS[goal]():
                found.append(f._asdict())
                range_ = "" if f.low is None else f"[{f.low:.3f}, {f.high:.3f}]"
                line = f"{f.goal:4} {'met   ' if f.met else 'MISSED'} {f.figure:8.3f} {range_:16}"
                print(f"{line} goal {f.bar:7} anchor {f.anchor:12} {f.what}", flush=True)
        except Missing as error:
            print(f"{goal:4} skipped: needs {error}", flush=True)
    if asked.json is not None:
        asked.json.write_text(json.dumps({"torch": torch.__version__, "figures": found}, indent=1))


if __name__ == "__main__":
    main()
