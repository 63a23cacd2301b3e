"""The parts of `make gpu`: what each finds on a GPU, and what of it can be checked without one.

python benchmarks/gpu_parts.py PART FILE: runs a part and adds a JSON line a row to FILE.
"""

from __future__ import annotations

import copy
import functools
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
Row = dict[str, Any]
BOUNDS = {"fp32": 1e-3, "bf16": 5e-2}  # relative root mean square error of outputs and gradients
TOKENS = 8192


# ---- every mixer ----


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


def ops() -> Iterator[Row]:
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

    layout = Layout.from_rows([[Doc(100), Doc(93)], [Doc(256)]], 256, max_documents=4)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 256, 256, generator=generator, dtype=torch.float64)
    dy = torch.randn(2, 256, 256, generator=generator, dtype=torch.float64)
    mask = Causal() if layer.caps.causal else Full()

    def results(module: Any, device: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, list[Any]]:
        module.zero_grad()
        given = x.to(device, dtype).requires_grad_()
        there = layout.to(device)
        ids = torch.zeros(2, 256, 1, dtype=torch.int32, device=device)
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


def attention() -> Iterator[Row]:
    """Forward and backward at 8,192 tokens, 16 heads of 64, 128 and 256 on 4 key heads, bf16."""
    for width in (128, 64, 256):
        shapes = [(1, TOKENS, heads, width) for heads in (16, 4, 4)]
        made = lambda s: torch.randn(s, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        q, k, v = map(made, shapes)
        operations = 2 * 2 * TOKENS**2 * 16 * width / 2
        for name, run in attention_ways().items():
            row: Row = {"head": width, "by": name}
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
    from mm.plan.fake_cuda import CUDA, fake_cuda

    ways = attention_ways()
    yield f"{', '.join(ways)} at heads of 64, 128 and 256"
    with fake_cuda():
        q, k = (torch.empty(1, 512, heads, 128, device=CUDA) for heads in (16, 4))
        assert ways["mm, as picked"](q, k, k).shape == q.shape


# ---- training steps and decoding: gpu_models.py ----


def training() -> Iterator[Row]:
    from gpu_models import train_rows

    return train_rows()


def dry_training() -> Iterator[str]:
    from gpu_models import predicted_lines

    return predicted_lines()


def decode() -> Iterator[Row]:
    from gpu_models import decode_rows

    return decode_rows()


def dry_decode() -> Iterator[str]:
    from gpu_models import decode_lines

    return decode_lines()


# ---- commands of mm ----


def command(*given: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mm", *given], cwd=ROOT, capture_output=True, text=True
    )


def quickstart() -> Iterator[Row]:
    """The whole quickstart; each task beside its bar."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "found.json"
        ended = command("quickstart", "--out", f"{folder}/run", "--json", str(file))
        if ended.returncode or not file.is_file():
            yield {"figure": "quickstart", "state": (ended.stderr or ended.stdout)[-300:]}
            return
        for name, value in json.loads(file.read_text()).items():
            if isinstance(value, (int, float)):
                yield {"figure": name, "value": float(value)}


def dry_quickstart() -> Iterator[str]:
    from mm.run import Run

    run = Run.load(ROOT / "configs" / "quickstart" / "hybrid.yaml")
    bars = [t.bar for t in run.stages[0].tasks if getattr(t, "bar", None)]
    yield f"mm quickstart --out DIR --json FILE: {len(bars)} bars, {bars}"


def resume() -> Iterator[Row]:
    """Kills and a signal: the run afterwards is the unbroken one, bit by bit."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "found.json"
        only = [word for name in chosen_faults() for word in ("--only", name)]
        ended = command("faults", "--quick", *only, "--json", str(file))
        rows = json.loads(file.read_text()) if file.is_file() else []
        yield from ({k: r[k] for k in ("fault", "tries", "survived", "lost")} for r in rows)
        if not rows:
            yield {"fault": "mm faults", "lost": (ended.stderr or ended.stdout)[-300:]}


def chosen_faults() -> list[str]:
    """The faults of a kill, by name."""
    from mm.faults.cases import CASES

    return [
        case.name for case in CASES if case.name.startswith(("kill -9 at", "kill -9 in a step"))
    ]


def dry_resume() -> Iterator[str]:
    names = chosen_faults()
    if not names:
        raise ValueError("mm faults has no kill")
    yield f"mm faults --quick: {', '.join(names)}"


RUN: dict[str, Callable[[], Iterator[Row]]] = {
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
    """Run a part; every row is on disk before the next one is begun."""
    with open(file, "a", encoding="utf-8") as out:
        for row in RUN[part]():
            out.write(json.dumps(row) + "\n")
            out.flush()


if __name__ == "__main__":
    main(*sys.argv[1:3])
