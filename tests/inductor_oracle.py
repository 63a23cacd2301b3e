"""Inductor's code for a GPU run on the CPU: its wrapper as it is, its kernels interpreted.

    on_host = first_calls(run, vocabulary, micro, torch.device("cpu"))
    for call, graph in zip(on_host, compiled(run, vocabulary, micro), strict=True):
        with interpreted():
            y = graph(call)  # autograd's: its backward is Inductor's, too

The graphs are those of device cuda, made of fake tensors. What a wrapper asks of CUDA (memory,
streams, devices) the CPU gives, so the checks that it holds are made: sizes, strides, dtypes and
alignment of what every operator of this project returns. Operators ``mm::..`` run their Triton
kernels, interpreted; products run on the CPU in their dtypes.
"""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import itertools
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton.language as tl
from torch import Tensor
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.runtime import triton_helpers, triton_heuristics

from mm.batch import Batch
from mm.model.layer import Block
from mm.plan import fake_step
from mm.plan.fake_card import Graph, compiled_graphs, fake_card
from mm.plan.fake_cuda import CUDA, Reads, fake_cuda
from mm.plan.launches import MOST as MOST_EAGER
from mm.plan.launches import kind_of, layer_launches, outer_blocks
from mm.run import Run
from mm.vocabulary import Vocabulary

MOST = 1024  # elements of a tile a dimension
HEURISTICS = ("pointwise", "reduction", "persistent_reduction", "split_scan", "foreach")


class _Libdevice:
    """Device functions of CUDA, by Triton's own as the interpreter has them at the time."""

    def __getattr__(self, name: str) -> Any:
        return getattr(tl, name)

    def pow(self, x: Any, y: Any) -> Any:
        return tl.exp2(y * tl.log2(x))  # of what is positive

    def log1p(self, x: Any) -> Any:
        return tl.log(1.0 + x)

    def expm1(self, x: Any) -> Any:
        return tl.exp(x) - 1.0

    def tanh(self, x: Any) -> Any:
        return 2.0 * tl.sigmoid(2.0 * x) - 1.0

    def signbit(self, x: Any) -> Any:
        return x < 0

    def isnan(self, x: Any) -> Any:
        return x != x


class Kernel:
    """A kernel that Inductor wrote, launched as its own launcher would."""

    def __init__(self, source: str, folder: str):
        path = Path(folder) / f"kernel_{next(_NUMBER)}.py"
        path.write_text(source)
        with contextlib.ExitStack() as stack:
            for name in HEURISTICS:
                keep = lambda **meta: lambda fn: SimpleNamespace(fn=fn, **meta)
                stack.enter_context(mock.patch.object(triton_heuristics, name, keep))
            stack.enter_context(
                mock.patch.object(triton_helpers, "set_driver_to_gpu", lambda: None)
            )
            stack.enter_context(mock.patch.object(triton_helpers, "libdevice", _Libdevice()))
            made = _load(path)
        (self.told,) = [x for x in vars(made).values() if isinstance(x, SimpleNamespace)]

    def run(self, *given: Any, stream: Any) -> None:
        fn, meta = self.told.fn, self.told.inductor_meta
        blocks = {n: self._block(n) for n in fn.arg_names if n.endswith("BLOCK")}
        names = [n for n in fn.arg_names if n not in blocks]
        values = {**dict(zip(names, given, strict=True)), **blocks}
        grid = triton_heuristics.GridExpr.from_meta(meta, blocks)
        fn.run(**values, grid=grid.eval_slow(values))

    def _block(self, name: str) -> int:
        hint = self.told.size_hints.get(name.removesuffix("BLOCK").lower(), MOST)
        return min(hint, 8 if name == "XBLOCK" and "reduction_hint" in vars(self.told) else MOST)


_NUMBER = itertools.count()


def _load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


class _Enough(Exception):
    """Every kind of block was called: what follows is of no interest."""


class Call(NamedTuple):
    """A block, and the arguments that a training step calls it with."""

    block: Block
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def names(self) -> dict[str, Any]:
        """The local names of the call."""
        call = inspect.signature(type(self.block).__call__)
        bound = call.bind(self.block, *self.args, **self.kwargs)
        bound.apply_defaults()
        return dict(bound.arguments)


def first_calls(
    run: Run, vocabulary: Vocabulary | None, micro: Batch, where: torch.device
) -> list[Call]:
    """The first call of a block of each kind in a step on a device."""
    found: list[Call] = []
    with mock.patch.object(fake_step, "CUDA", where):
        stage = fake_step.build_stage(run, 0, vocabulary)
    kinds: dict[Any, Block] = {}
    for engine in stage.engines.values():
        for block in outer_blocks(engine.raw):
            kinds.setdefault(kind_of(block), block)

    def keep(block: Any, args: Any, kwargs: Any) -> None:
        if all(block is not call.block for call in found):
            found.append(Call(block, args, kwargs))
        if len(found) == len(kinds) and where != CUDA:
            raise _Enough

    hooks = [b.register_forward_pre_hook(keep, with_kwargs=True) for b in kinds.values()]
    # On the host without gradients: what blocks hand on has no history.
    with contextlib.suppress(_Enough), torch.set_grad_enabled(where == CUDA):
        fake_step.train_step(Reads(), stage, 0, [micro], vocabulary)
    for hook in hooks:
        hook.remove()
    return found


def load(source: str) -> Callable[[list[Any]], Any]:
    """A wrapper of Inductor, to be called on tensors of the CPU inside `interpreted`."""
    folder = tempfile.TemporaryDirectory()
    path = Path(folder.name) / f"wrapper_{next(_NUMBER)}.py"
    path.write_text(source.replace("device(type='cuda', index=0)", "device(type='cpu')"))
    made: list[ModuleType] = []

    def call(given: list[Any]) -> Any:
        with contextlib.ExitStack() as stack:
            patch = lambda *a: stack.enter_context(mock.patch.object(*a))
            kernel = lambda self, name, source, device_str: Kernel(source, folder.name)
            patch(AsyncCompile, "triton", kernel)
            patch(AsyncCompile, "wait", lambda self, scope: None)
            patch(torch.cuda, "_DeviceGuard", lambda index: contextlib.nullcontext())
            patch(torch.cuda, "set_device", lambda index: None)
            if not made:
                made.append(_load(path))
            module: Any = made[0]
            module.empty_strided_cuda = module.empty_strided_cpu
            module.get_raw_stream = lambda index: 0
            return module.call(given)

    return call


def _laid_out(x: Tensor, like: Tensor) -> Tensor:
    """In the dtype and with the strides of what the graph was made for."""
    if x.dtype == like.dtype and x.stride() == like.stride():
        return x
    made = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=x.device)
    return made.copy_(x)


def compiled(
    run: Run, vocabulary: Vocabulary | None, micro: Batch, options: Mapping[str, bool]
) -> list[Callable[[Call], Any] | None]:
    """Of each kind of block what runs its graph on the values of a call on the CPU.

    None for a block that launches more than `MOST_EAGER` kernels: one that walks over the tokens.
    """

    def read(graph: Graph, fake: Call, call: Call) -> Any:
        given = []
        for origin in graph.inputs:
            x, like = (eval(origin, {"L": each.names()}) for each in (call, fake))
            given.append(_laid_out(x, like) if isinstance(x, Tensor) else x)
        made = graph.call(*given)  # what the block publishes, too
        return next(y for y in made if y.shape == call.args[0].shape)

    found: list[Callable[[Call], Any] | None] = []
    with fake_cuda(), fake_card():
        for call in first_calls(run, vocabulary, micro, CUDA):
            if layer_launches(*call, 1, None).eager > MOST_EAGER:
                found.append(None)
                continue

            def step(block: Any, call: Call = call) -> Any:
                x, *others = call.args
                with torch.autocast("cuda", torch.bfloat16):
                    return block(x.detach().requires_grad_(), *others, **call.kwargs)

            (graph,) = compiled_graphs(call.block, step, options, load)
            found.append(partial(read, graph, call))
    return found
