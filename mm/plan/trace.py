"""One micro-batch, forward and backward, on fake tensors: what lives, what is computed, where.

The model has no memory and takes no time here, whatever its size; the same code runs as in
training, so a new mixer is covered the day it is registered. The layout of the documents is real:
layers look at lengths on the host.
"""

from __future__ import annotations

import bisect
import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._C._autograd import _get_sequence_nr
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.nn.modules import module as hooks
from torch.utils._python_dispatch import TorchDispatchMode

from mm.model.layer import Adapter, Embedder, FeedForward, Head, Layer, Mixer
from mm.plan.flops import flops_of
from mm.plan.tally import LiveBytes, tensors_in

REAL = 1 << 22  # elements of a result of real tensors alone up to which it is computed
GRADIENTS = "gradients"


class Work(NamedTuple):
    """What one operator did."""

    part: str
    phase: str  # "forward", "backward" or "recompute"
    name: str
    flops: float
    bytes: int  # read and written, each argument and result once
    dtype: torch.dtype


@dataclass
class Trace:
    """What a micro-batch takes.

    Attributes:
        work: every operator that is no view.
        saved: bytes kept for the backward when the forward ends, by part of the model.
        forward_peak: of activations in the forward.
        peak: of activations and all gradients together.
        peak_released: of activations and the gradient that is being made, others given away.
        gradients: bytes of all gradients.
        tokens: that are no padding.
        unknown: operators without a formula.
        passed: bytes of whole messages to processes that share rows: "heads" and "states".
    """

    work: list[Work] = field(default_factory=list)
    saved: Counter[str] = field(default_factory=Counter)
    forward_peak: int = 0
    peak: int = 0
    peak_released: int = 0
    gradients: int = 0
    tokens: int = 0
    unknown: set[str] = field(default_factory=set)
    passed: Counter[str] = field(default_factory=Counter)

    def flops(self, *phases: str) -> dict[str, float]:
        """Operations by part, of some phases or of all."""
        out: dict[str, float] = {}
        for w in self.work:
            if not phases or w.phase in phases:
                out[w.part] = out.get(w.part, 0.0) + w.flops
        return out


class TraceMode(TorchDispatchMode):
    """Above a FakeTensorMode: computes what is real and small, tallies everything."""

    def __init__(self, trace: Trace, labels: Mapping[nn.Module, str]):
        super().__init__()
        self.trace, self.labels = trace, labels
        self.live = LiveBytes()
        self.stack: list[str] = []
        self.peak_released = 0
        self._began: list[int] = []  # sequence numbers of autograd at which a part began
        self._parts: list[str] = []

    def part(self) -> tuple[str, str]:
        """Part of the model and phase of the operator that runs."""
        node = torch._C._current_autograd_node()
        if self.stack:
            part = self.stack[-1]
            at = _get_sequence_nr()
            if not self._parts or self._parts[-1] != part:
                self._began.append(max(at - 1, self._began[-1] if self._began else 0))
                self._parts.append(part)
            return part, "recompute" if node is not None else "forward"
        if node is None:
            return "other", "forward"
        at = bisect.bisect_right(self._began, node._sequence_nr()) - 1
        return (self._parts[at] if at >= 0 else "other"), "backward"

    def add(self, x: Tensor, label: str) -> None:
        if self.live.add(x, label):
            held = self.live.now - self.live.by[GRADIENTS]
            self.peak_released = max(self.peak_released, held)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = tensors_in(args, kwargs)
        if not any(isinstance(x, FakeTensor) for x in given):
            real = self._real(func, args, kwargs, bool(given))
            if real is not None:
                for x in tensors_in(real):
                    self.add(x, "layout")
                return real
        made = func(*args, **kwargs)
        part, phase = self.part()
        before = {x.untyped_storage()._cdata for x in given}
        results = tensors_in(made)
        for x in results:
            self.add(x, part)
        fresh = [x for x in results if x.untyped_storage()._cdata not in before]
        if not (fresh or func._schema.is_mutable):
            return made
        flops = flops_of(func, args, kwargs, made)
        if flops is None:
            self.trace.unknown.add(func.name())
        moved = sum(x.numel() * x.element_size() for x in (*given, *fresh))
        floats = [x.dtype for x in (*fresh, *given) if x.is_floating_point()]
        kind = min(floats, key=lambda d: d.itemsize, default=torch.float32)
        self.trace.work.append(Work(part, phase, func.name(), flops or 0.0, moved, kind))
        return made

    def _real(self, func: Any, args: Any, kwargs: Any, given: bool) -> Any:
        """The real result of real arguments; None where it is large, or of floats from nothing."""
        shaped = func(*args, **kwargs)
        fakes = tensors_in(shaped)
        if any(x.numel() > REAL for x in fakes):
            return None
        if not given and any(x.is_floating_point() for x in fakes):
            return None
        with unset_fake_temporarily():
            return func(*args, **kwargs)

    @contextlib.contextmanager
    def parts(self) -> Iterator[None]:
        """Follow which part of the model runs."""

        def enter(module: nn.Module, args: Any) -> None:
            if module in self.labels:
                self.stack.append(self.labels[module])

        def leave(module: nn.Module, args: Any, result: Any) -> None:
            if module in self.labels and self.stack:
                self.stack.pop()

        before = hooks.register_module_forward_pre_hook(enter)
        after = hooks.register_module_forward_hook(leave, always_call=True)
        try:
            yield
        finally:
            before.remove()
            after.remove()


def part_labels(modules: Mapping[str, nn.Module]) -> dict[nn.Module, str]:
    """What the parts of networks are called: kinds of mixers and feed-forwards, embedder, heads."""
    out: dict[nn.Module, str] = {}
    for name, network in modules.items():
        out[network] = "other" if name == "model" else name
        for module in network.modules():
            if isinstance(module, Head):
                out[module] = "head"
            elif isinstance(module, Embedder):
                out[module] = "embedder"
            elif isinstance(module, Adapter):
                out[module] = "adapter"
            elif isinstance(module, Mixer | FeedForward):
                out[module] = module.kind or type(module).__name__.lower()
            elif isinstance(module, Layer) and module not in out:
                out[module] = "blocks"
    return out


def parameters_by_part(modules: Mapping[str, nn.Module]) -> Counter[str]:
    """Parameters by part, tied ones once."""
    labels, out, seen = part_labels(modules), Counter[str](), set[nn.Parameter]()

    def walk(module: nn.Module, part: str) -> None:
        part = labels.get(module, part)
        for p in module.parameters(recurse=False):
            if p not in seen:
                seen.add(p)
                out[part] += p.numel()
        for child in module.children():
            walk(child, part)

    for network in modules.values():
        walk(network, "other")
    return out


@contextlib.contextmanager
def fake_mode() -> Iterator[FakeTensorMode]:
    """Tensors that are made in the block have shapes and no memory."""
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        yield mode


def to_dtype(module: nn.Module, dtype: torch.dtype) -> None:
    """Give a network of fake tensors floats of another dtype; `nn.Module.to` cannot swap these."""
    made: dict[Tensor, Any] = {}
    for part in module.modules():
        for name, p in part._parameters.items():
            if p is not None and p.is_floating_point():
                if p not in made:
                    made[p] = nn.Parameter(p.detach().to(dtype), p.requires_grad)
                part._parameters[name] = made[p]
        for name, b in part._buffers.items():
            if b is not None and b.is_floating_point():
                part._buffers[name] = b.to(dtype)


def trace_step(
    fake: FakeTensorMode,
    modules: Mapping[str, nn.Module],
    losses: Callable[[], Iterator[Tensor]],
    tokens: int,
    linear: Callable[..., Tensor] | None = None,
) -> Trace:
    """Trace forward and backward of one micro-batch.

    Args:
        fake: mode under which ``modules`` were built.
        modules: networks that train, with fake parameters.
        losses: scalar losses in the order in which they are stepped.
        tokens: of the micro-batch that are no padding.
        linear: what takes the place of `torch.nn.functional.linear`, as DeepSpeed has it at
            ZeRO stage 3.
    """
    trace = Trace(tokens=tokens)
    mode = TraceMode(trace, part_labels(modules))
    handles = []
    for network in modules.values():
        for b in network.buffers():
            mode.live.ignore(b)
        for p in network.parameters():
            mode.live.ignore(p)
            if p.requires_grad:
                handles.append(
                    p.register_post_accumulate_grad_hook(
                        lambda p: mode.live.relabel(p.grad, GRADIENTS)
                    )
                )
    plain = torch.nn.functional.linear
    torch.nn.functional.linear = linear or plain
    try:
        with fake, mode, mode.parts():
            for loss in losses():
                if not trace.saved:
                    trace.forward_peak = mode.live.peak
                    trace.saved = Counter({k: v for k, v in mode.live.by.items() if v})
                loss.backward()
                del loss
        trace.peak, trace.peak_released = mode.live.peak, mode.peak_released
        trace.gradients = sum(
            p.grad.numel() * p.grad.element_size()
            for network in modules.values()
            for p in network.parameters()
            if p.grad is not None
        )
    finally:
        torch.nn.functional.linear = plain
        for handle in handles:
            handle.remove()
        for network in modules.values():
            network.zero_grad()
    return trace
