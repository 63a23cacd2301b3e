"""Training steps and decoding of 300 M and 1 B models, for `make gpu`."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from mm.engine_config import EngineConfig
from mm.trainer.stage import compile_blocks

ROOT = Path(__file__).resolve().parents[1]
Row = dict[str, Any]
SIZES = {"300M": (1024, 24), "1B": (2048, 20), "7B": (4096, 39)}  # d_model, depth
TRAINED = ("300M", "1B")  # on one card
PATTERNS = {"dense": "attention", "hybrid": "3*gated_deltanet attention"}
IDS, TOKENS = 32_000, 8192
DOCUMENTS = {"plain": TOKENS, "packed": TOKENS // 12}  # tokens of a document
STEPS, WARM = 6, 3


def run_of(size: str, shape: str) -> Any:
    """The run: one row of 8,192 tokens a step, heads of 128, 4 key heads."""
    from mm.run import Run

    d_model, depth = SIZES[size]
    heads = d_model // 128
    mixers = {"attention": {"heads": heads, "kv_heads": min(4, heads)}}
    backbone = {"kind": "stack", "depth": depth, "pattern": PATTERNS[shape], "mixers": mixers}
    data = {"kind": "packed", "sources": [{"path": "absent"}], "seq_len": TOKENS, "batch_size": 1}
    return Run.model_validate(
        {
            "name": f"{size}-{shape}",
            "vocabulary": "absent",
            "model": {"kind": "lm", "d_model": d_model, "backbone": backbone},
            "stages": [{"data": data, "objective": "next_token", "optimizer": "adamw"}],
            "engine": {"precision": "auto"},
        }
    )


# How blocks run that are compiled: settings of the engine.
COMPILED: dict[str, dict[str, bool]] = {
    "compiled": {},
    "CUDA graphs": {"cuda_graphs": True},
    "combo kernels": {"combo_kernels": True},
}


def cases() -> list[tuple[str, str, str, str]]:
    """Size, pattern, documents and how blocks run, by worth."""
    every = [(s, p, d, "eager") for s in TRAINED for p in PATTERNS for d in DOCUMENTS]
    # Inductor takes a minute
    every += [("1B", "dense", "plain", "compiled"), ("1B", "dense", "packed", "CUDA graphs")]
    every += [("1B", "dense", "plain", "combo kernels")]
    worth = lambda case: (
        case[3] != "eager",
        case[3] == "combo kernels",
        case[1] != "dense",
        case[2] != "plain",
        case[0] != "1B",
    )
    return sorted(every, key=worth)


def predicted(size: str, shape: str, documents: str, card: str) -> dict[str, Any]:
    """What `mm plan` says of it on one card."""
    from mm.plan.gpus import find
    from mm.plan.inputs import Assumed
    from mm.plan.plan import Cluster, make_plan

    run, cluster = run_of(size, shape), Cluster(find(card), 1, 1)
    assumed = Assumed(DOCUMENTS[documents], IDS)
    return make_plan(run, cluster, assumed=assumed, longest=False, variants=False)


def card_here() -> str:
    """The data sheet of the GPU that is here; an H100's where it has none."""
    from mm.trainer.data_sheets import like

    card = like(torch.cuda.get_device_name(0))
    return "h100" if card is None else card.name


def stage_of(size: str, shape: str, documents: str) -> tuple[Any, Any]:
    """The model on the GPU, and its batch."""
    from mm.plan.inputs import Assumed, open_subject
    from mm.trainer.stage import make_module

    run = run_of(size, shape)
    subject = open_subject(run, 0, "autocast_bf16", Assumed(DOCUMENTS[documents], IDS))
    module = make_module(run.model, subject.vocabulary, 0, torch.device("cuda"))
    return module, subject.batches(1)[0]


def train_rows(out: Path) -> Iterator[Row]:
    """Steps of a fused AdamW under bf16 autocast; predicted and measured, then dearest kernels.

    ``out``: the folder of the traces of one step each.
    """
    from gpu_predictions import stored

    card = card_here()
    for size, shape, documents, blocks in cases():
        row: Row = {"model": size, "pattern": shape, "documents": documents, "blocks": blocks}
        try:
            plan = predicted(size, shape, documents, card)
            module, batch = stage_of(size, shape, documents)
            if blocks != "eager":
                engine = EngineConfig(compile=True, **COMPILED[blocks])
                compile_blocks(module, engine.compile_options("cuda"))
            optimizer = run_of(size, shape).stages[0].optimizer.build(module.train())
            step = lambda m=module, b=batch, o=optimizer: _step(m, b, o)
            seconds = _seconds(step)
            flops = plan["flops_a_token"]["total"] * plan["batch"]["tokens"]
            told = stored(f"{size}-{shape}", card, blocks) if documents == "plain" else {}
            row |= {
                "parameters": plan["parameters"]["total"],
                "predicted s": told.get("step ms", 1e3 * plan["step"]["seconds"]) / 1e3,
                "measured s": seconds,
                "predicted MFU": told.get("MFU", plan["step"]["mfu"]),
                "measured MFU": flops / seconds / plan["gpu"]["bf16"],
                "tokens/s": plan["batch"]["tokens"] / seconds,
                "GiB": torch.cuda.max_memory_allocated() / 2**30,
            }
            if COMPILED.get(blocks):
                row["gradients"] = beside_eager(module, batch)
            yield row
            trace = out / f"{size}-{shape}-{documents}-{blocks}.trace.json.gz"
            events = kernels_of(step, trace)
            launched = {"launches": sum(e.count for e in events), "trace": name_of(trace)}
            yield dict.fromkeys(row, "") | {
                "model": size, "pattern": shape, "documents": documents, "blocks": blocks,
                "predicted launches": told.get("launches", ""), **launched,
            }  # fmt: skip
            yield from (dict.fromkeys(row, "") | {"model": size, "pattern": shape, **k}
                        for k in dearest(events))  # fmt: skip
        except Exception as error:
            yield row | {"state": f"{type(error).__name__}: {error}".splitlines()[0][:160]}
        module = batch = optimizer = step = None
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def beside_eager(module: Any, batch: Any) -> str:
    """Gradients of compiled blocks beside eager mode, and how many Inductor would not capture."""
    from torch._dynamo.utils import counters

    found = []
    for stance in ("default", "force_eager"):
        module.zero_grad()
        torch.compiler.cudagraph_mark_step_begin()
        with torch.compiler.set_stance(stance):
            _gradients(module, batch)
            found.append(_gradients(module, batch))  # sums into those of the first micro-batch
    left = counters["inductor"]["cudagraph_skips"]
    error = float((found[0] - found[1]).norm() / found[1].norm())
    said = "ok" if error < 3e-2 and not left else "WRONG"
    return f"{said}: gradients differ by {error:.1e}, {left} graphs left out"


def _gradients(module: Any, batch: Any) -> torch.Tensor:
    """All gradients after one more micro-batch."""
    device = next(module.parameters()).device
    with torch.autocast(device.type, torch.bfloat16):
        loss = module(batch.to(device), seed=1).heads["tokens"].nll.mean()
    loss.backward()
    grads = [p.grad.flatten() for p in module.parameters() if p.grad is not None]
    return torch.cat([g.float() for g in grads])


def _step(module: Any, batch: Any, optimizer: Any) -> None:
    torch.compiler.cudagraph_mark_step_begin()
    with torch.autocast("cuda", torch.bfloat16):
        nll = module(batch.to("cuda"), seed=1).heads["tokens"].nll
    nll.mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def _seconds(step: Any) -> float:
    for _ in range(WARM):
        step()
    torch.cuda.synchronize()
    begun = time.perf_counter()
    for _ in range(STEPS):
        step()
    torch.cuda.synchronize()
    return (time.perf_counter() - begun) / STEPS


def kernels_of(step: Any, trace: Path) -> list[Any]:
    """What a step launched, by kernel (without a GPU: its operators); its Chrome trace is written.

    The trace is for chrome://tracing or Perfetto.
    """
    from torch.autograd import DeviceType

    from mm.trainer.callbacks.profile import begin, finish

    on_gpu = torch.cuda.is_available()
    found = begin(on_gpu)
    try:
        step()
    finally:
        finish(found, trace, on_gpu)
    device = DeviceType.CUDA if on_gpu else DeviceType.CPU
    return [e for e in found.key_averages() if e.device_type == device]


def name_of(file: Path) -> str:
    """Its path from this checkout, where it is inside."""
    return str(file.relative_to(ROOT) if file.is_relative_to(ROOT) else file)


def dearest(events: list[Any], n: int = 10) -> Iterator[Row]:
    """The kernels that take most of a step."""
    whole = sum(e.self_device_time_total for e in events)
    for e in sorted(events, key=lambda e: -e.self_device_time_total)[:n]:
        share = e.self_device_time_total / whole
        yield {"kernel": e.key[:60], "calls": e.count, "share of step": float(share)}


def predicted_lines() -> Iterator[str]:
    """What would run, with predictions for an H100; and a step of the smallest on fake tensors."""
    for size, shape, documents, blocks in cases():
        if documents == "plain" and blocks == "eager":
            plan = predicted(size, shape, documents, "h100")
            step, count = plan["step"], plan["parameters"]["total"]
            yield (
                f"{size} {shape}: {count / 1e6:.0f} M parameters, predicted on an H100 (mm plan): "
                f"{step['seconds']:.3f} s a step, MFU {step['mfu']:.0%}"
            )
    for size, shape, documents, blocks in cases():
        if COMPILED.get(blocks):
            yield f"{size} {shape}, {documents}: compiled, {blocks}; gradients beside eager mode"
    yield f"{len(cases())} runs of {WARM + STEPS} steps, {len(cases())} Chrome traces"


SLOTS, NEW = (1, 16, 128), 64


def decode_rows() -> Iterator[Row]:
    """Greedy decoding of the dense and the hybrid 300 M model from prompts of 512 ids."""
    for shape in PATTERNS:
        module, _ = stage_of("300M", shape, "plain")
        for slots in SLOTS:
            row: Row = {"model": f"300M {shape}", "sequences": slots}
            try:
                decode(module.bfloat16().eval(), slots, prompt=512, new=8)
                torch.cuda.synchronize()
                begun = time.perf_counter()
                decode(module, slots, prompt=512, new=NEW)
                torch.cuda.synchronize()
                seconds = time.perf_counter() - begun
                yield row | {"tokens/s": slots * NEW / seconds, "ms a step": 1e3 * seconds / NEW}
            except Exception as error:
                yield row | {"state": f"{type(error).__name__}: {error}".splitlines()[0][:160]}


def decode(model: Any, slots: int, prompt: int, new: int) -> int:
    """Generate; returns how many steps there were."""
    import numpy as np

    from mm.decoders.generate import stream_tokens
    from mm.specs import Segment

    words = model.vocabulary
    first = words.modalities[0]
    ids = lambda i: np.arange(prompt, dtype=np.int32) + i
    prompts = [[Segment(first, ids(i), role="target")] for i in range(slots)]
    steps = stream_tokens(model, words, prompts, first, temperature=0, max_tokens=new)
    return sum(1 for _ in steps)


def decode_lines() -> Iterator[str]:
    """What would run; two steps of a small model on fake tensors, which count what is read."""
    from mm.plan.fake_cuda import CUDA, fake_cuda
    from mm.plan.inputs import Assumed, open_subject
    from mm.trainer.stage import make_module

    yield f"{' and '.join(PATTERNS)} 300 M model, {SLOTS} sequences, {NEW} new ids each"
    for shape in PATTERNS:
        run = run_of("300M", shape)
        backbone = run.model.backbone.model_copy(update={"depth": None})  # one period
        config = run.model.model_copy(update={"backbone": backbone})
        words = open_subject(run, 0, "fp32", Assumed(TOKENS, IDS)).vocabulary
        with fake_cuda() as reads:
            model = make_module(config, words, 0, CUDA)
            reads.places.clear()
            steps = decode(model.eval(), 2, prompt=4, new=3)
        yield f"{shape}: {len(reads.places)} reads of the device in {steps} steps"
