"""The parts of `make gpu`: what each finds on a GPU, and what of it can be checked without one.

python benchmarks/gpu_parts.py PART FILE: runs a part and adds a JSON line a row to FILE.
"""

from __future__ import annotations

import copy
import functools
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
Row = dict[str, Any]
BOUNDS = {"fp32": 1e-3, "bf16": 5e-2}  # relative root mean square error of outputs and gradients
TOKENS = 8192


# ---- every op and mixer ----


def words() -> list[str]:
    """Mixers by worth: presets (the named systems), then kinds that no preset has."""
    from mm.model.backbones.stack import presets
    from mm.registry import MIXERS

    return list(dict.fromkeys(["attention", "gated_deltanet", "mamba2", *presets(), *MIXERS]))


def layer_of(word: str, d_model: int) -> Any:
    """A mixer by its word: a preset as it is, a kind in its smallest form."""
    from mm.model.backbones.stack import StackConfig, presets
    from mm.registry import MIXERS

    named = word in presets() or word == "attention"
    config = StackConfig(pattern=word).mixer(word) if named else MIXERS.get(word).smallest()
    return config.build(d_model)


def ops(out: Path) -> Iterator[Row]:
    """Every implementation of every op against its reference in float64, then every mixer."""
    from gpu_page import K, T, import_kernels
    from op_calls import Sizes, op_rows

    import_kernels()
    yield from op_rows("cuda", Sizes(), T, K)
    yield from mixers()


def mixers() -> Iterator[Row]:
    """Each mixer on the GPU against itself in float64 on the CPU, where every op is the reference.

    The self-check of ops is on: what it refuses is in the row.
    """
    from mm.kernels.op import Op
    from mm.model.layer import init_weights

    torch.backends.cuda.matmul.allow_tf32 = False
    for word in words():
        try:
            torch.manual_seed(0)
            layer = layer_of(word, 256)
            init_weights(layer)
            exact = copy.deepcopy(layer).double()
            layer = layer.cuda()
        except Exception as error:
            yield {"mixer": word, "state": f"not built: {error}"}
            continue
        for op in Op.every.values():
            op._checked.clear()
        for precision, bound in BOUNDS.items():
            row: Row = {"mixer": word, "precision": precision}
            try:
                errors = differences(layer, exact, precision)
                row |= errors | {"state": "ok" if max(errors.values()) <= bound else "WRONG"}
            except Exception as error:
                row["state"] = f"{type(error).__name__}: {error}".splitlines()[0][:120]
            ran = {kind[0] for op in Op.every.values() for kind in op._checked}
            refused = {
                f"{op.name}: {kind[0]}"
                for op in Op.every.values()
                for kind, chosen in op._checked.items()
                if chosen != kind[0]
            }
            yield row | {"ran": " ".join(sorted(ran)), "refused": ", ".join(sorted(refused))}


def differences(layer: Any, exact: Any, precision: str) -> dict[str, float]:
    """Relative errors of outputs, of the input's gradient and the worst of the parameters'."""
    from mm.layout import Doc, Layout
    from mm.mask import Causal, Full
    from mm.model.context import Ctx

    T = 320  # rows so long that attention is left to its kernels
    layout = Layout.from_rows([[Doc(130), Doc(123)], [Doc(T)]], T, max_documents=4)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, T, 256, generator=generator, dtype=torch.float64)
    dy = torch.randn(2, T, 256, generator=generator, dtype=torch.float64)
    mask = Causal() if layer.caps.causal else Full()

    def results(module: Any, device: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, list[Any]]:
        module.zero_grad()
        given = x.to(device, dtype).requires_grad_()
        there = layout.to(device)
        ids = torch.zeros(2, T, 1, dtype=torch.int32, device=device)
        low = precision == "bf16" and device == "cuda"
        with torch.autocast(device, torch.bfloat16, enabled=low):
            y = module(given, Ctx(there, mask, ids)).y
        real = (there.fields.document > 0)[..., None]
        (y * dy.to(y) * real).sum().backward()
        assert given.grad is not None
        return y * real, given.grad * real, [p.grad for p in module.parameters()]

    right, found = results(exact, "cpu", torch.float64), results(layer, "cuda", torch.float32)
    pairs = [(a, b) for a, b in zip(found[2], right[2], strict=True) if b is not None]
    top = max((float(b.norm()) for _, b in pairs), default=0.0)
    return {
        "output": error_of(found[0], right[0]),
        "input gradient": error_of(found[1], right[1]),
        "worst gradient": max((error_of(a, b, 1e-3 * top) for a, b in pairs), default=0.0),
    }


def error_of(found: Tensor | None, right: Tensor, floor: float = 0.0) -> float:
    """Norm of the difference over that of what is right, inf where it is absent or not finite."""
    if found is None:
        return float("inf")
    error = float((found.detach().cpu().double() - right).norm() / (right.norm() + floor + 1e-12))
    return error if error < float("inf") else float("inf")


def dry_ops() -> Iterator[str]:
    from gpu_page import K, T, import_kernels
    from op_calls import PRECISIONS, able, op_calls

    from mm.kernels.op import Op
    from mm.plan.fake_card import fake_card
    from mm.plan.fake_cuda import CUDA, fake_cuda

    import_kernels()
    ways = 0
    with fake_cuda(), fake_card():
        for op_name, call in op_calls(CUDA).values():
            for dtype in PRECISIONS.values():
                given, op = call(T, dtype, K), Op.every[op_name]
                ways += len(able(op, given, op.pick(*given)))
    names = {op_name for op_name, _ in op_calls(CUDA).values()}
    yield f"{len(names)} ops in {len(op_calls(CUDA))} calls; {ways} comparisons"
    failed = []
    for word in words():
        try:
            with torch.device("meta"):
                layer_of(word, 256)
        except ValueError as error:
            failed.append(f"{word} ({error})")
    yield f"{len(words())} mixers build; {2 * len(words())} comparisons"
    if failed:
        raise ValueError(f"cannot be built at width 256: {', '.join(failed)}")


# ---- attention against the peers ----


def attention_ways() -> dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]]:
    """(B, T, H, K) queries, keys, values -> causal attention, by who does it."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    import mm.kernels.attention as ours
    from mm.kernels.attention.spec import MaskSpec

    heads_first = lambda *x: [t.transpose(1, 2) for t in x]
    found: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {}

    def by_torch(backend: Any) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with sdpa_kernel(backend):
                return torch.nn.functional.scaled_dot_product_attention(
                    *heads_first(q, k, v), is_causal=True, enable_gqa=True
                ).transpose(1, 2)

        return run

    for name, backend in (
        ("SDPA flash", SDPBackend.FLASH_ATTENTION),
        ("SDPA cuDNN", SDPBackend.CUDNN_ATTENTION),
    ):
        found[name] = by_torch(backend)

    def by_flex(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        T = q.shape[1]
        mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, T, T, device=q.device.type)
        return flex(*heads_first(q, k, v), block_mask=mask, enable_gqa=True).transpose(1, 2)

    flex: Any = torch.compile(flex_attention)
    found["FlexAttention"] = by_flex

    def by_us(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with ours.attention.using("triton"):
            return ours.attention(q, k, v, MaskSpec(causal=True))

    found["mm Triton"] = by_us
    found["mm, as picked"] = lambda q, k, v: ours.attention(q, k, v, MaskSpec(causal=True))
    return found


def attention(out: Path) -> Iterator[Row]:
    """Forward and backward at 8,192 tokens, 16 heads of 64, 128 and 256 on 4 key heads, bf16."""
    for width in (128, 64, 256):
        shapes = [(1, TOKENS, heads, width) for heads in (16, 4, 4)]
        made = lambda s: torch.randn(s, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        q, k, v = map(made, shapes)
        operations = 2 * 2 * TOKENS**2 * 16 * width / 2
        for name, run in attention_ways().items():
            row: Row = {"head": width, "by": name, "table TFLOP/s": said_of(name, q, k, v)}
            try:
                forward = seconds_of(functools.partial(run, q, k, v))
                both = seconds_of(functools.partial(both_ways, run, q, k, v))
                row |= {
                    "forward ms": 1e3 * forward,
                    "forward TFLOP/s": operations / forward / 1e12,
                    "both ms": 1e3 * both,
                    "both TFLOP/s": 3.5 * operations / both / 1e12,
                }
            except Exception as error:
                row["state"] = f"{type(error).__name__}: {error}".splitlines()[0][:100]
            yield row
    from gpu_ops import rows

    yield from rows(seconds_of)


IMPLEMENTATIONS = {"SDPA flash": "sdpa", "SDPA cuDNN": "cudnn", "mm Triton": "triton"}


def said_of(name: str, q: Tensor, k: Tensor, v: Tensor) -> str:
    """What the table of `mm.kernels.attention.rates` says, both ways, and how it knows."""
    from mm.kernels.attention import attention, rates
    from mm.kernels.attention.spec import PLAIN_SCORE, MaskSpec

    causal = MaskSpec(causal=True)
    way = IMPLEMENTATIONS.get(name)
    if name == "mm, as picked":
        way = attention.pick(q, k, v, causal)
    found = rates.rate(way, q, v, causal, PLAIN_SCORE) if way else None
    if found is None:
        return ""
    chosen = f"{way}, " if name == "mm, as picked" else ""
    return f"{found.tflops:g} ({chosen}{found.source.partition(':')[0]})"


def both_ways(run: Callable[..., Tensor], *given: Tensor) -> None:
    run(*given).sum().backward()


def seconds_of(run: Callable[[], Any], times: int = 5) -> float:
    """Median time of a call on the GPU, after two that are not counted."""
    taken = []
    for i in range(times + 2):
        begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begun.record()
        run()
        ended.record()
        torch.cuda.synchronize()
        if i > 1:
            taken.append(begun.elapsed_time(ended) / 1e3)
    return sorted(taken)[len(taken) // 2]


def dry_attention() -> Iterator[str]:
    from mm.plan.fake_card import fake_card
    from mm.plan.fake_cuda import CUDA, fake_cuda

    ways = attention_ways()
    yield f"{', '.join(ways)} at heads of 64, 128 and 256"
    with fake_cuda(), fake_card():
        half: Any = {"dtype": torch.bfloat16, "device": CUDA}
        q, k = (torch.empty(1, 512, heads, 128, **half) for heads in (16, 4))
        assert ways["mm, as picked"](q, k, k).shape == q.shape
        said = {name: said_of(name, q, k, k) for name in ways}
    yield "; ".join(f"{name}: {figure} TFLOP/s" for name, figure in said.items() if figure)
    from gpu_ops import lines

    yield from lines()


# ---- training steps and decoding: gpu_models.py ----


def training(out: Path) -> Iterator[Row]:
    from gpu_models import train_rows

    return train_rows(out)


def dry_training() -> Iterator[str]:
    from gpu_models import predicted_lines

    return predicted_lines()


def decode(out: Path) -> Iterator[Row]:
    from gpu_models import decode_rows

    return decode_rows()


def dry_decode() -> Iterator[str]:
    from gpu_models import decode_lines

    return decode_lines()


# ---- whole runs: gpu_runs.py ----


def quickstart(out: Path) -> Iterator[Row]:
    from gpu_runs import quickstart as rows

    return rows()


def dry_quickstart() -> Iterator[str]:
    from mm.run import Run

    run = Run.load(ROOT / "configs" / "quickstart" / "hybrid.yaml")
    bars = [t.bar for t in run.stages[0].tasks if getattr(t, "bar", None)]
    yield f"mm quickstart --out DIR --json FILE: {len(bars)} bars, {bars}"


def resume(out: Path) -> Iterator[Row]:
    from gpu_runs import resume as rows

    return rows()


def dry_resume() -> Iterator[str]:
    from gpu_runs import resume_lines

    return resume_lines()


RUN: dict[str, Callable[[Path], Iterator[Row]]] = {  # of the folder that files go to
    "ops": ops,
    "quickstart": quickstart,
    "attention": attention,
    "training": training,
    "resume": resume,
    "decode": decode,
}
DRY: dict[str, Callable[[], Iterator[str]]] = {
    "ops": dry_ops,
    "quickstart": dry_quickstart,
    "attention": dry_attention,
    "training": dry_training,
    "resume": dry_resume,
    "decode": dry_decode,
}


def main(part: str, file: str) -> None:
    """Run a part; every row is on disk before the next one is begun, its files lie beside it."""
    with open(file, "a", encoding="utf-8") as out:
        for row in RUN[part](Path(file).resolve().parent):
            out.write(json.dumps(row) + "\n")
            out.flush()


if __name__ == "__main__":
    main(*sys.argv[1:3])
