"""Kernels that a training step launches on a GPU, counted on fake tensors: a layer, a whole step.

Python issues each of them in eager mode; where kernels are short, the GPU waits for it.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from mm.batch import Batch
from mm.model.backbones.pattern import parse
from mm.model.layer import Block
from mm.plan.fake_card import compiled_graphs, fake_card
from mm.plan.fake_cuda import backward, body_of, fake_cuda, without_launches
from mm.plan.fake_step import build_stage, train_step
from mm.plan.flops import flops_of
from mm.plan.tally import tensors_in
from mm.plan.trace import Work
from mm.run import Run
from mm.vocabulary import Vocabulary

GOAL = 45  # compiled, a layer
MOST = 1500  # in eager mode of what is compiled: a loop over tokens becomes a graph without end
NONE = {
    "aten::detach", "aten::alias", "aten::_unsafe_view", "aten::lift_fresh", "aten::empty",
    "aten::empty_like", "aten::empty_strided", "aten::new_empty", "aten::new_empty_strided",
    "aten::set_", "aten::resize_", "aten::record_stream",
}  # fmt: skip


def _attends_backward(*given: Any) -> int:
    """dO . O, the products, dQ to its dtype; and sums over the queries that share a key."""
    return 3 if given[1].shape[-3] == given[2].shape[-3] else 5


def _multi_tensor(*given: Any) -> int:
    """Launches over lists of tensors: 36 tensors or 320 chunks of 65,536 elements each at most.

    Source: torch, aten/src/ATen/native/cuda/MultiTensorApply.cuh, four lists.
    """
    sizes = [x.numel() for x in given[0]]
    return max(math.ceil(len(sizes) / 36), math.ceil(sum(-(-n // 65_536) for n in sizes) / 320))


# Operators of torch that launch more than one kernel: what their CUDA source launches at least.
SEVERAL: Mapping[str, int | Callable[..., int]] = {
    "aten::_scaled_dot_product_flash_attention_backward": _attends_backward,
    "aten::_scaled_dot_product_cudnn_attention_backward": 3,
    "aten::_scaled_dot_product_efficient_attention_backward": 2,
    "aten::_flash_attention_backward": _attends_backward,
    "torch_attn::_varlen_attn_backward": 3,
    "aten::native_layer_norm_backward": 2,  # of the input, of weight and bias
    "aten::_fused_rms_norm_backward": 2,
    "aten::convolution_backward": 2,  # of the input, of the weight
    "aten::_grouped_mm": 2,  # pointers of the groups, products
    "aten::embedding_dense_backward": 6,  # a sort of the ids, segments, sums
    "aten::_index_put_impl_": 6,
    "aten::sort": 4,
    "aten::argsort": 4,
    "aten::topk": 2,
    "aten::nonzero": 4,
    "aten::logsumexp": 5,
    "aten::constant_pad_nd": 2,  # fill, copy
    "aten::select_backward": 2,  # zeros, copy
    "aten::slice_backward": 2,
    "aten::index_add": 2,  # copy, write
    "aten::index_copy": 2,
    "aten::index_put": 2,
    "aten::scatter": 2,
    "aten::scatter_add": 2,
    "aten::slice_scatter": 2,
    "aten::select_scatter": 2,
    "aten::masked_fill": 2,
    "aten::_foreach_norm": 2,
    "aten::_fused_adamw_": _multi_tensor,
    "aten::_fused_adam_": _multi_tensor,
}


class Launches(TorchDispatchMode):
    """Counts kernels by operator; those of this project's operators by running what they launch.

    Attributes:
        kernels: launches by operator.
        each: launches of one call of an operator, as last seen.
        work: every operator that launches; one of this project's by its parts.
        flops: by the formulas of `mm.plan.flops`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0.0
        self.kernels: Counter[str] = Counter()
        self.each: dict[str, int] = {}
        self.work: list[Work] = []

    @property
    def total(self) -> int:
        return self.kernels.total()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.name().partition(".")[0]
        given, inside = tensors_in(args, kwargs), None
        if name.startswith("mm::") and any(x.is_cuda for x in given):
            made, inside = _within(func, args, kwargs)
        else:
            made = func(*args, **kwargs)
        results = tensors_in(made)
        changes = func._schema.is_mutable
        if func.is_view or name in NONE or not (results or changes):
            return made
        if any(x.is_cuda for x in (*given, *results)):
            flops = flops_of(func, args, kwargs, made) or 0.0
            if inside is not None:
                count, work = inside.share(name, flops)
            else:
                several = SEVERAL.get(name, 1)
                count = several if isinstance(several, int) else several(*args)
                writes = [
                    x
                    for a, x in zip(func._schema.arguments, args, strict=False)
                    if a.alias_info and a.alias_info.is_write
                ]
                work = [_work(name, flops, given, results, tensors_in(writes))]
            self.each[name] = count
            self.kernels[name] += count
            self.work += work
            self.flops += flops
        return made


def _work(name: str, flops: float, given: list[Tensor], made: list[Tensor], also: Any = ()) -> Work:
    """A call as `mm.plan.trace` has it: each argument and result once; those written into twice."""
    moved = [*{id(x): x for x in (*given, *made)}.values(), *also]
    floats = [x.dtype for x in (*made, *given) if x.is_floating_point()]
    dtype = min(floats, key=lambda d: d.itemsize, default=torch.float32)
    return Work("", "", name, flops, sum(x.numel() * x.element_size() for x in moved), dtype)


class _Inside(NamedTuple):
    """What one call of an operator ``mm::name`` launches: by Triton, and by torch around that."""

    triton: list[Work]
    torch: Launches

    def share(self, name: str, flops: float) -> tuple[int, list[Work]]:
        """Kernels, and their work: products of torch count as they are; else all is Triton's."""
        passes = [w._replace(name=name) for w in self.triton]
        work = [w._replace(name=name) for w in self.torch.work]
        count = len(passes) + self.torch.total
        if any(w.flops for w in work):
            return count, work + passes
        dtype = min(
            (w.dtype for w in (*passes, *work)), key=lambda d: d.itemsize, default=torch.float32
        )
        moved = sum(w.bytes for w in (*passes, *work))
        return count, [Work("", "", name, flops, moved, dtype)]


def _within(func: Any, args: Any, kwargs: Any) -> tuple[Any, _Inside]:
    """The result of a call of an operator of this project, and what it launches."""
    found = _Inside([], Launches())
    note = lambda given: found.triton.append(_work("", 0.0, tensors_in(given), []))
    with without_launches(note), found.torch:
        return body_of(func)(*args, **kwargs), found


@dataclass(frozen=True)
class LayerLaunches:
    """Kernels of one block in a training step.

    Attributes:
        forward, backward, optimizer: in eager mode.
        kernels: by operator, forward and backward.
        compiled: forward and backward of `torch.compile`; None: not asked, or over `MOST`.
        graphs: that it was compiled to, forward and backward in each; between them runs what no
            graph holds and nobody counts.
        generated: of ``compiled``, kernels that Inductor writes; the rest are products and
            operators that it calls.
        traffic: bytes that these kernels read and write.
        refusals: of Inductor to capture these graphs as CUDA graphs.
        work: in eager mode.
    """

    name: str
    layers: int
    forward: int
    backward: int
    optimizer: int
    kernels: Counter[str] = field(repr=False)
    work: list[Work] = field(repr=False)
    compiled: int | None = None
    generated: int = 0
    graphs: int = 0
    traffic: int = 0
    refusals: tuple[str, ...] = ()

    @property
    def eager(self) -> int:
        return self.forward + self.backward

    def describe(self) -> str:
        compiled = "" if self.compiled is None else f", {self.compiled} compiled"
        return f"{self.name}: {self.eager} eager{compiled}"


def kind_of(block: nn.Module) -> tuple[Any, ...]:
    """What blocks have in common that launch the same: classes, shapes, settings."""
    plain = (bool, int, float, type(None), tuple)
    return tuple(
        (
            type(m).__name__,
            tuple(tuple(p.shape) for p in m.parameters(recurse=False)),
            tuple(sorted((k, str(v)) for k, v in vars(m).items() if isinstance(v, plain))),
        )
        for m in block.modules()
    )


def outer_blocks(module: nn.Module) -> Iterator[Block]:
    """Blocks that lie in no other one."""
    for child in module.children():
        if isinstance(child, Block):
            yield child
        else:
            yield from outer_blocks(child)


def name_of(block: nn.Module) -> str:
    """Mixer and feed-forward of a block by their kinds."""
    parts = [p for name in ("mixer", "ffn") if (p := getattr(block, name, None)) is not None]
    kinds = [getattr(p, "kind", None) or type(p).__name__ for p in parts]
    if parts and (window := getattr(parts[0], "window", None)):
        kinds[0] += f" (window {window})"
    return " + ".join(kinds) or type(block).__name__


def one_of_each(backbone: Any) -> Any:
    """A backbone with one layer of each mixer that it names."""
    if backbone is None or not hasattr(backbone, "pattern"):
        parts = backbone or {}
        change = {name: one_of_each(part) for name, part in parts if hasattr(part, "pattern")}
        change |= {"upper": 1} if hasattr(backbone, "upper") else {}
        return backbone and backbone.model_copy(update=change)
    words = " ".join(dict.fromkeys(parse(backbone.pattern)))
    return backbone.model_copy(update={"pattern": words, "depth": None})


def step_launches(
    run: Run, index: int, vocabulary: Vocabulary | None, micro: Batch, compiled: bool = True,
    whole: bool = False,
) -> tuple[list[LayerLaunches], Launches]:  # fmt: skip
    """Kernels of each kind of block of the trained networks; of the second step, if ``whole``.

    Args:
        run: a stage of it takes a step with one micro-batch under bf16 autocast.
        micro: on the host.
        compiled: also let Inductor write the code of every kind of block, as the engine asks.
    """
    step = Launches()
    options = run.engine.model_copy(update={"cuda_graphs": False}).compile_options("cuda")
    with fake_cuda() as reads, fake_card():
        stage = build_stage(run, index, vocabulary)
        kinds: dict[Any, list[Block]] = {}
        for engine in stage.engines.values():
            for block in outer_blocks(engine.raw):
                kinds.setdefault(kind_of(block), []).append(block)
        calls: dict[nn.Module, tuple[Any, Any]] = {}
        hooks = [
            blocks[0].register_forward_pre_hook(
                lambda block, args, kw: calls.setdefault(block, (args, kw)) and None,
                with_kwargs=True,
            )
            for blocks in kinds.values()
        ]
        train_step(reads, stage, 0, [micro], vocabulary)
        for hook in hooks:
            hook.remove()
        if whole:
            with step:
                train_step(reads, stage, 1, [micro], vocabulary)
        layers = [
            layer_launches(blocks[0], *calls[blocks[0]], len(blocks), options if compiled else None)
            for blocks in kinds.values()
            if blocks[0] in calls
        ]
    return layers, step


def layer_launches(
    block: Block, args: tuple[Any, ...], kwargs: Mapping[str, Any], layers: int,
    options: Mapping[str, bool] | None,
) -> LayerLaunches:  # fmt: skip
    """Kernels of one block, called once more as it was called. Call in `fake_cuda`.

    Args:
        options: of Inductor; None: not compiled.
    """
    fresh = lambda x: x.detach().requires_grad_() if isinstance(x, Tensor) else x
    read, *others = args

    def run(call: Callable[..., Any]) -> Tensor:
        with torch.autocast("cuda", torch.bfloat16):
            return call(fresh(read), *others, **kwargs).y

    ahead, back = Launches(), Launches()
    with ahead:
        y = run(block)
    above = torch.empty_like(y)
    for p in block.parameters():
        p.grad = None
    with back:
        backward(y, above)
    for p in block.parameters():
        p.grad = None
    trained = [p for p in block.parameters() if p.requires_grad]
    found = LayerLaunches(
        name_of(block), layers, ahead.total, back.total, _multi_tensor(trained) if trained else 0,
        ahead.kernels + back.kernels, ahead.work + back.work,
    )  # fmt: skip
    if options is None or found.eager > MOST:
        return found
    graphs = compiled_graphs(block, run, options)
    each = ahead.each | back.each
    codes = [code for graph in graphs for code in graph.codes]
    total = sum((launches_of(code.source, each) for code in codes), Counter[str]())
    written = sum(n for name, n in total.items() if name.startswith("triton_"))
    return dataclasses.replace(
        found, compiled=total.total(), generated=written, graphs=len(graphs),
        traffic=sum(code.traffic for code in codes),
        refusals=tuple(dict.fromkeys(code.refusal for code in codes if code.refusal)),
    )  # fmt: skip


_LAUNCH = re.compile(
    r"(?:^|= )(triton_\w+)\.run\(|extern_kernels\.(\w+)\(|torch\.ops\.(\w+)\.(\w+)"
)


def launches_of(source: str, each: Mapping[str, int]) -> Counter[str]:
    """Launches that a wrapper of Inductor makes, by kernel or operator.

    Args:
        source: its Python code.
        each: launches of one call of an operator that it calls.
    """
    found: Counter[str] = Counter()
    for line in source.rpartition("def call(")[2].splitlines():
        line = line.strip()
        if line.startswith(("#", "assert")):
            continue
        if launch := _LAUNCH.search(line):
            generated, extern, space, name = launch.groups()
            if space:
                name = f"{space}::{name}"
                if name not in NONE:
                    found[name] += each.get(name, 1)
            else:
                found[generated or extern] += 1
        elif ".copy_(" in line:
            found["copy_"] += 1
    return found
