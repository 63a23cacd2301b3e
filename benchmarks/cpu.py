"""Speed and memory goals on the CPU, each a ratio within one interleaved run on one thread.

python benchmarks/cpu.py [--only P4 --only P7] [--seconds 60] [--json FILE]

Times are processor time of this process, so that other jobs on the machine matter little; each
figure is the ratio of two medians of interleaved repeats. Peers (transformers, litgpt, mambapy,
flash-linear-attention's plain PyTorch) are optional: a goal says which one it lacks.
B rows, T tokens, D model, H heads, K key width.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

for _name, _value in {"OMP_NUM_THREADS": "1", "USE_HUB_KERNELS": "NO"}.items():
    os.environ[_name] = _value  # before torch and transformers are imported
for _name in ("fla", "mamba_ssm", "causal_conv1d"):
    sys.modules[_name] = None  # type: ignore[assignment]  # peers run their own PyTorch code

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from mm.batch import Batch  # noqa: E402
from mm.bench.memory import MIB, available_mib, peak_mib  # noqa: E402
from mm.bench.mixers import Bench, names  # noqa: E402
from mm.kernels.attention import attention as attention_op  # noqa: E402
from mm.kernels.cross_entropy import linear_cross_entropy  # noqa: E402
from mm.kernels.delta_rule import delta_rule  # noqa: E402
from mm.kernels.linear_attention import linear_attention  # noqa: E402
from mm.kernels.linear_scan import linear_scan  # noqa: E402
from mm.layout import Doc, Layout  # noqa: E402
from mm.mask import Causal  # noqa: E402
from mm.model.layer import Ctx, init_weights  # noqa: E402
from mm.model.model import LmConfig  # noqa: E402
from mm.registry import MIXERS  # noqa: E402
from mm.specs import TokenSpec  # noqa: E402
from mm.vocabulary import RESERVED, Vocabulary  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
IDS, D, LAYERS, HEADS, HIDDEN = 8192, 384, 6, 6, 1024  # the decoder of kernels.md: 16.9M parameters
Work = Callable[[], object]


class Missing(Exception):
    """A peer that is not installed, or a part that this tree lacks."""


class Figure(NamedTuple):
    goal: str
    what: str
    bar: str
    anchor: str
    figure: float
    met: bool


def at_most(goal: str, what: str, bar: float, anchor: str, figure: float) -> Figure:
    return Figure(goal, what, f"<= {bar:g}", anchor, figure, figure <= bar)


def at_least(goal: str, what: str, bar: float, anchor: str, figure: float) -> Figure:
    return Figure(goal, what, f">= {bar:g}", anchor, figure, figure >= bar)


PATIENCE = [60.0]  # seconds of processor time for one comparison


def timed(work: Work) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def seconds(*works: Work, repeats: int = 7, warm: bool = True) -> list[float]:
    """Median processor seconds of each, run in turns until ``repeats`` or the patience is over."""
    spent = sum(timed(work) for work in works) if warm else 0.0
    taken: list[list[float]] = [[] for _ in works]
    while len(taken[0]) < repeats and (not taken[0] or spent < PATIENCE[0]):
        for kept, work in zip(taken, works, strict=True):
            kept.append(timed(work))
            spent += kept[-1]
    return [statistics.median(kept) for kept in taken]


def backward(f: Callable[..., Tensor], *inputs: Tensor) -> Work:
    """Forward and backward of ``f`` on leaves that need gradients."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    with torch.no_grad():
        dy = torch.randn_like(f(*leaves))
    return lambda: torch.autograd.grad(f(*leaves), leaves, dy)


def transformers() -> Any:
    try:
        import transformers as peer
    except ImportError:
        raise Missing("transformers") from None
    return peer


# ---- whole models: P1, P2, P3, P8 ----


def ours(pattern: str, mixers: dict[str, Any]) -> nn.Module:
    channel = {"kind": "swiglu", "hidden": HIDDEN}
    stack = {"kind": "stack", "pattern": pattern, "mixers": mixers, "channel": channel}
    vocabulary = Vocabulary().add(TokenSpec("text", IDS - RESERVED - 2))
    model = LmConfig(d_model=D, backbone=stack).build(vocabulary)
    torch.manual_seed(0)
    init_weights(model)
    return model


def llama(kind: str) -> nn.Module:
    peer = transformers()
    config = peer.LlamaConfig(
        hidden_size=D,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        intermediate_size=HIDDEN,
        vocab_size=IDS,
        use_cache=False,
        attn_implementation=kind,
    )
    return peer.LlamaForCausalLM(config)


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


def litgpt() -> nn.Module:
    try:
        from litgpt import GPT, Config  # type: ignore[import-not-found]
    except ImportError:
        raise Missing("litgpt") from None
    config = Config(
        padded_vocab_size=IDS,
        norm_class_name="RMSNorm",
        mlp_class_name="LLaMAMLP",
        **{"block_size": 512, "n_layer": LAYERS, "n_head": HEADS, "n_embd": D},
        **{"rotary_percentage": 1.0, "bias": False, "intermediate_size": HIDDEN},
    )
    return GPT(config)


def p1() -> Iterator[Figure]:
    """The fastest of the peers that are here (nanoGPT is no package: never among them)."""
    peers = {"HF Llama sdpa": llama("sdpa")}
    try:
        peers["litgpt"] = litgpt()
    except Missing:
        pass
    mine, *others = seconds(
        step(decoder(), 2, 512, True), *(step(m, 2, 512, True) for m in peers.values())
    )
    fastest = min(zip(others, peers, strict=True))
    yield at_most("P1", f"decoder step / {fastest[1]}, bf16", 1.02, "0.93-1.05", mine / fastest[0])


def p2() -> Iterator[Figure]:
    compiled = torch.compile(decoder())
    mine, theirs = seconds(step(compiled, 2, 512, True), step(llama("eager"), 2, 512, True))
    yield at_most("P2", "compiled decoder step / HF Llama eager, bf16", 0.80, "0.74", mine / theirs)


def p3() -> Iterator[Figure]:
    n, T = 1024, 512
    for bf16, bar, anchor in ((False, 0.72, ".79"), (True, 0.42, ".44")):
        kind = torch.bfloat16 if bf16 else torch.float32
        a, b = torch.randn(n, n).to(kind), torch.randn(n, n).to(kind)
        model = decoder()
        taken, gemm = seconds(step(model, 2, T, bf16), lambda a=a, b=b: [a @ b for _ in range(8)])
        weights = sum(p.numel() for p in model.parameters()) - IDS * D  # the lookup is no product
        attended = LAYERS * 2 * T * D  # multiplications a token for scores and values, half masked
        flops = 2 * T * (6 * weights + 3 * attended)
        share = flops / taken / (16 * n**3 / gemm)
        yield at_least(
            "P3", f"share of the GEMM peak, {'bf16' if bf16 else 'fp32'}", bar, anchor, share
        )


def p8() -> Iterator[Figure]:
    peer = transformers()
    linear = {"heads": HEADS, "key_dim": 64, "value_dim": 64}
    for B, T, bar, anchor in ((4, 512, 1.0, "1.03"), (1, 8192, 0.80, ".75")):
        attention = {"heads": HEADS, "position": {"kind": "rope", "fraction": 0.25}}
        model = ours(
            "2*(2*gated_deltanet gated_attention)",
            {"gated_deltanet": linear, "gated_attention": attention},
        )
        config = peer.Qwen3NextConfig(
            hidden_size=D,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            num_key_value_heads=HEADS,
            head_dim=D // HEADS,
            linear_num_key_heads=HEADS,
            linear_num_value_heads=HEADS,
            linear_key_head_dim=64,
            linear_value_head_dim=64,
            intermediate_size=HIDDEN,
            mlp_only_layers=list(range(LAYERS)),
            num_experts=0,
            full_attention_interval=3,
            vocab_size=IDS,
            use_cache=False,
        )
        theirs = peer.Qwen3NextForCausalLM(config)
        a, b = seconds(step(model, B, T, True), step(theirs, B, T, True), repeats=5)
        yield at_most("P8", f"2:1 hybrid step / HF Qwen3-Next, {B}x{T}, bf16", bar, anchor, a / b)


# ---- kernels: P4 to P7, P9 to P11 ----


def heads(T: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queries, keys, values `(1, T, 4, 64)` and log decays `(1, T, 4)`."""
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, T, 4, 64, generator=g) for _ in range(3))
    return q, F.normalize(k, dim=-1), v, -0.1 * torch.rand(1, T, 4, generator=g)


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def p4() -> Iterator[Figure]:
    transformers()
    from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

    for T, bar, anchor in ((4096, 0.60, ".55"), (16384, 0.20, ".14")):
        q, k, v, g = heads(T)
        beta = torch.rand_like(g)
        ours = lambda q, k, v, g, b: delta_rule(q, k, v, b, g, scale=0.125)[0]
        theirs = lambda q, k, v, g, b: torch_chunk_gated_delta_rule(q, k, v, g, b)[0]
        a, b = seconds(backward(ours, q, k, v, g, beta), backward(theirs, q, k, v, g, beta))
        yield at_most("P4", f"gated delta / HF chunked form, T={T}", bar, anchor, a / b)


def fla_simple_gla() -> Callable[..., Any]:
    """flash-linear-attention's plain PyTorch file, without importing its package (Triton)."""
    hidden = sys.modules.pop("fla", None)
    found = importlib.util.find_spec("fla")
    sys.modules["fla"] = hidden  # type: ignore[assignment]
    if found is None or not found.submodule_search_locations:
        raise Missing("flash-linear-attention (pip install fla-core)")
    file = Path(found.submodule_search_locations[0]) / "ops" / "simple_gla" / "naive.py"
    spec = importlib.util.spec_from_file_location("fla_naive", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.naive_chunk_simple_gla


def p5() -> Iterator[Figure]:
    scalar = lambda q, k, v, g: linear_attention(q * 0.125, k, v, g)[0]
    q, k, v, g = heads(16384)
    by_channel = g[..., None].expand(-1, -1, -1, 64).contiguous()
    a, b, c = seconds(
        backward(scalar, q, k, v, g), backward(scalar, q, k, v, by_channel), backward(sdpa, q, k, v)
    )
    yield at_least("P5", "causal SDPA / scalar decay, T=16384", 20, "29.6", c / a)
    yield at_least("P5", "causal SDPA / vector decay, T=16384", 20, "8 to 21", c / b)
    peer = fla_simple_gla()
    for T, bar, anchor in ((4096, 0.45, ".37"), (16384, 0.15, ".11")):
        q, k, v, g = heads(T)
        theirs = backward(lambda *x: peer(*x)[0], q, k, v, g)
        a, b = seconds(backward(scalar, q, k, v, g), theirs)
        yield at_most("P5", f"scalar decay / fla's chunked form, T={T}", bar, anchor, a / b)


def p6() -> Iterator[Figure]:
    """Every mixer whose state does not grow with length, but those that say they are sequential."""
    bench = Bench([1024, 16384])
    for name in names():
        layer = bench.build(name)
        if getattr(layer.caps, "sequential", False) or not layer.caps.causal:
            continue
        if layer.state_bytes(1, 4096) > layer.state_bytes(1, 2048):
            continue
        short, _ = bench.cell(layer, 1024, warm=True)
        if short * 16 > PATIENCE[0]:  # not said to be sequential, and yet too slow to be measured
            yield at_most("P6", f"growth 1k-16k: {name}, too slow", 1.10, "1.03-1.07", math.inf)
            continue
        long, _ = bench.cell(layer, 16384, warm=False)
        bar = 1.15 if getattr(layer, "window", None) else 1.10
        growth = math.log(long / short) / math.log(16)
        yield at_most("P6", f"growth 1k-16k: {name}", bar, "1.03-1.07", growth)


def p7() -> Iterator[Figure]:
    if importlib.util.find_spec("mambapy") is None:
        raise Missing("mambapy")
    from mambapy.pscan import pscan  # type: ignore[import-not-found]

    for T in (1024, 4096):
        a, b = 0.9 + 0.1 * torch.rand(4, T, 512), torch.randn(4, T, 512)
        theirs = backward(lambda a, b: pscan(a[..., None], b[..., None])[..., 0], a, b)
        mine = lambda a, b: linear_scan(a, b)[0]
        plain = lambda a, b: linear_scan.implementations["reference"][0](a, b)[0]
        x, y, z = seconds(backward(mine, a, b), backward(plain, a, b), theirs)
        yield at_most("P7", f"linear scan / mambapy, 4x{T}x512", 0.30, ".15-.26", x / z)
        yield at_most("P7", f"its plain PyTorch / mambapy, 4x{T}x512", 1.0, ".39-.58", y / z)


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
        a, b = seconds(mine, backward_of(block, block, x))
        yield at_least("P9", "mambapy layer / Mamba layer, 2x512", 5, "8 (estimate)", b / a)
    else:
        missing.append("mambapy")
    try:
        peer = transformers()
        config = peer.MambaConfig(
            hidden_size=D, num_hidden_layers=1, vocab_size=8, use_associative_scan=False
        )
        mixer = peer.MambaModel(config).layers[0].mixer
        a, b = seconds(mine, backward_of(mixer, mixer, x), repeats=1, warm=False)
        yield at_least("P9", "HF slow path / Mamba layer, 2x512", 40, "60", b / a)
    except Missing as error:
        missing.append(str(error))
    if missing:
        raise Missing(", ".join(missing))


def backward_of(f: Callable[[Tensor], Tensor], module: nn.Module, x: Tensor) -> Work:
    """Forward and backward to the input and every parameter."""
    x = x.detach().requires_grad_()
    wanted = [x, *module.parameters()]
    dy = torch.randn_like(x)
    return lambda: torch.autograd.grad(f(x), wanted, dy, allow_unused=True)


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

        a, b = seconds(mine, backward(dense, fused), repeats=5)
        yield at_most("P10", f"attention, {name} / SDPA with a mask, T=4096", 0.20, anchor, a / b)
    q, k, v, _ = heads(T)
    ratio = seconds(
        backward(lambda *x: attention_op(*x, causal=True), q, k, v), backward(sdpa, q, k, v)
    )
    yield at_most("P10", "attention, causal / SDPA, T=4096", 1.05, "1.0", ratio[0] / ratio[1])


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
    a, b = seconds(mine, plain, repeats=3)
    yield at_most("P11", f"fused cross-entropy / plain, time, {rows}x131072", 1.0, ".96", a / b)
    own = (h.numel() + w.numel()) * 4 / MIB  # the gradients, which both return
    cpu = torch.device("cpu")
    peaks = [peak_mib(work, cpu) for work in (mine, plain)]
    if peaks[0] is None or peaks[1] is None:
        raise Missing("/proc/self/clear_refs, which tells the peak memory")
    share = (peaks[0] - own) / (peaks[1] - own)
    yield at_most("P11", f"the same, peak memory beyond gradients, {rows} rows", 0.15, ".14", share)


# ---- GPU code without a GPU: P14, P15 ----


def suite(goal: str, what: str, chosen: str, bar: float) -> Iterator[Figure]:
    """Wall seconds of the tests that pytest's ``-k`` chooses; infinite when one fails."""
    if importlib.util.find_spec("triton") is None:
        raise Missing("triton")
    folder = ROOT / "tests"
    files = sorted({*folder.glob("test_triton_*.py"), *folder.glob("test_kernel_*.py")})
    start = time.perf_counter()
    command = [sys.executable, "-m", "pytest", "-q", "-k", chosen, *map(str, files)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    taken = time.perf_counter() - start if done.returncode == 0 else math.inf
    yield at_most(goal, f"{what}, seconds of wall time", bar, "-", taken)


def p14() -> Iterator[Figure]:
    yield from suite("P14", "ahead-of-time compilation for sm_90", "hopper", 60)


def p15() -> Iterator[Figure]:
    yield from suite("P15", "Triton kernels in the interpreter", "triton and not hopper", 90)


GOALS = {f.__name__.upper(): f for f in (p1, p2, p3, p4, p5, p6, p7, p8, p9, p10, p11, p14, p15)}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", action="append", choices=list(GOALS), metavar="GOAL")
    parser.add_argument("--seconds", type=float, default=60.0, help="of one comparison")
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    PATIENCE[0] = asked.seconds
    load = f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"
    print(f"torch {torch.__version__}, one thread, {load}", flush=True)
    found = []
    for goal in asked.only or GOALS:
        try:
            for f in GOALS[goal]():
                found.append(f._asdict())
                line = f"{f.goal:4} {'met   ' if f.met else 'MISSED'} {f.figure:8.3f}"
                print(f"{line}  goal {f.bar:7} anchor {f.anchor:12} {f.what}", flush=True)
        except Missing as error:
            print(f"{goal:4} skipped: needs {error}", flush=True)
    if asked.json is not None:
        asked.json.write_text(json.dumps({"torch": torch.__version__, "figures": found}, indent=1))


if __name__ == "__main__":
    main()
