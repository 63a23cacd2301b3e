"""CUDA without a GPU: whole steps on fake tensors of device cuda, which have shapes and no values.

Layers, objectives and optimizers run the code that they run on a GPU; what they choose by device is
chosen. Nothing is launched. Tensors of two devices in one operator, an operator that has no fake
form and a size that depends on values fail by name; what reads the device from the host is noted.
"""

from __future__ import annotations

import contextlib
import traceback
import unittest.mock
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode

from mm.plan.tally import tensors_in

CUDA = torch.device("cuda", 0)
ROOT = Path(__file__).parents[2]
aten = torch.ops.aten
TRUTH = aten.is_nonzero.default
# The first is what the others become, but within an operator.
SCALARS = (aten._local_scalar_dense.default, aten.item.default, TRUTH)
COPIES = (aten._to_copy.default, aten.copy_.default)
MOVES = tuple(getattr(aten.to, name) for name in aten.to.overloads() if not name.startswith("prim"))


def _gru_cell(gates: Tensor, hidden: Tensor, h: Tensor, *bias: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(h), h.new_empty(h.shape[0], 5 * h.shape[1])


def _gru_cell_backward(dh: Tensor, kept: Tensor, has_bias: bool) -> tuple[Tensor | None, ...]:
    gates = [dh.new_empty(dh.shape[0], 3 * dh.shape[1]) for _ in range(2)]
    bias = [dh.new_empty(3 * dh.shape[1]) if has_bias else None for _ in range(2)]
    return *gates, torch.empty_like(dh), *bias


# What torch has no fake form of.
CELLS: dict[Any, Callable[..., Any]] = {
    aten._thnn_fused_gru_cell.default: _gru_cell,
    aten._thnn_fused_gru_cell_backward.default: _gru_cell_backward,
}


def _is_own(file: str) -> bool:
    """Whether a file is of this project and not this one."""
    path = Path(file)
    if file == __file__ or not path.is_relative_to(ROOT):
        return False
    return not path.relative_to(ROOT).parts[0].startswith(".")


def _place(what: str) -> str:
    """The line of this project that runs, and what happens there."""
    own = [f for f in traceback.extract_stack() if _is_own(f.filename)]
    path = Path(own[-1].filename).relative_to(ROOT)
    return f"{path}:{own[-1].lineno} {what}: {own[-1].line}"


class Reads(TorchDispatchMode):
    """Notes what the host reads of a device: values, which are 0, and copies.

    Attributes:
        places: file, line and operator of each read, in order.
        kernels: calls by operator of what is no view; an operator may launch several.
        sends: as ``places``, copies from the host within operators of this project: a CUDA graph
            holds none.
    """

    def __init__(self) -> None:
        super().__init__()
        self.places: list[str] = []
        self.kernels: Counter[str] = Counter()
        self.sends: list[str] = []
        self._within = self._in_body = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = tensors_in(args, kwargs)
        fake = [x for x in given if isinstance(x, FakeTensor)]
        if not fake and torch.device(kwargs.get("device") or "cpu").type == "cpu":
            with unset_fake_temporarily():  # of the host alone
                return func(*args, **kwargs)
        if func in SCALARS and args[0].is_cuda:
            self.note("a value")
            kind = args[0].dtype
            return (
                False
                if kind == torch.bool or func is TRUTH
                else 0.0
                if kind.is_floating_point
                else 0
            )
        if self._in_body and func in MOVES:  # below autograd nothing has taken it apart
            with self:
                return func.decompose(*args, **kwargs)
        made = self._run(func, args, kwargs)
        results = tensors_in(made)
        if not results:
            return made
        if func in COPIES and not results[0].is_cuda:
            if any(x.is_cuda for x in fake):
                self.note("a copy")
        elif func in COPIES and self._in_body and any(not x.is_cuda for x in given):
            self.sends.append(_place("a copy from the host"))
        elif results[0].is_cuda and not func.is_view and func is not aten.detach.default:
            self.kernels[func.name()] += 1
        return made

    def _run(self, func: Any, args: Any, kwargs: Any) -> Any:
        """The result; an operator of this project does what it does on a GPU."""
        if func.namespace != "mm":
            return CELLS[func](*args) if func in CELLS else func(*args, **kwargs)
        outer, before = self.kernels.copy(), self._in_body
        self._in_body = True
        try:
            with without_launches(), self:
                return body_of(func)(*args, **kwargs)
        finally:
            self.kernels, self._in_body = outer, before  # an operator is one here

    def note(self, what: str) -> None:
        """Note a read, once for all values of a `tolist`."""
        if self._within:
            return
        self.places.append(_place(what))

    def tolist(self, x: Tensor) -> Any:
        """`Tensor.tolist`: one copy of all values."""
        if x.is_cuda:
            self.note("a list")
        self._within = True
        try:
            return torch.zeros(x.shape, dtype=x.dtype, device="cpu").tolist()
        finally:
            self._within = False


def body_of(func: Any) -> Callable[..., Any]:
    """What an operator ``mm::..`` runs, not the rule of its shapes; without gradients."""
    from torch._library.custom_ops import OPDEFS

    return torch.no_grad()(OPDEFS[func.name().partition(".")[0]]._init_fn)


@contextlib.contextmanager
def without_launches(note: Callable[[Any], Any] = lambda given: None) -> Iterator[None]:
    """In the block a kernel of Triton is not launched: ``note`` is told what it was given."""
    from torch._inductor.runtime import triton_compat

    kernel_class: Any = vars(triton_compat)["JITFunction"]
    launch = lambda kernel, *given, **_: note(given)
    with unittest.mock.patch.object(kernel_class, "run", launch):
        yield


@contextlib.contextmanager
def fake_cuda() -> Iterator[Reads]:
    """In the block tensors of device cuda are fake; those of the host are real.

    Networks are built on `CUDA` as the trainer builds them: no default device is set here.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)  # imports much of torch, as it is
    with contextlib.ExitStack() as stack:
        patch = lambda *a: stack.enter_context(unittest.mock.patch.object(*a))
        stack.enter_context(unittest.mock.patch.dict("os.environ", {"MM_SELF_CHECK": "0"}))
        # Else autocast turns itself off, or refuses bf16, where it sees no driver.
        patch(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
        patch(torch.cuda, "is_bf16_supported", lambda *_, **__: True)
        # cuDNN's recurrent cells ask the driver; torch's own have a fake form
        stack.enter_context(torch.backends.cudnn.flags(enabled=False))
        patch(FakeTensorMode, "avoid_device_init", True)  # copies of constants would ask it
        # generators and streams of CUDA ask it, too
        patch(torch, "Generator", lambda device="cpu", make=torch.Generator: make("cpu"))
        patch(torch.autograd, "grad", grad)
        patch(torch._C, "_current_graph_task_id", lambda: 0)
        patch(torch.autograd.function.FunctionCtx, "set_materialize_grads", _remember)
        patch(torch.autograd.Function, "apply", classmethod(_apply_function))
        stack.enter_context(mode)
        reads = stack.enter_context(Reads())
        patch(FakeTensor, "tolist", lambda x: reads.tolist(x))
        yield reads


def _remember(ctx: Any, value: bool) -> None:
    ctx.materialize_grads = value
    ctx.takes_none = not value  # the attribute above cannot be read


def _apply_function(cls: Any, *args: Any, **kw: Any) -> Any:
    """`Function.apply`; its node remembers which arguments were tensors."""
    made = super(torch.autograd.Function, cls).apply(*args, **kw)  # type: ignore[misc]
    for x in made if isinstance(made, tuple) else (made,):
        node = getattr(x, "grad_fn", None)
        if type(node) is cls._backward_cls:
            node.of_tensors = [isinstance(a, Tensor) for a in args]  # type: ignore[attr-defined]
    return made


# ---- autograd: its engine asks the driver for streams, its formulas do not ----


def backward(loss: Tensor, gradient: Tensor | None = None) -> None:
    """`loss.backward()`, every formula called from here."""
    _walk([loss], [torch.ones_like(loss) if gradient is None else gradient], ())


def grad(
    outputs: Any, inputs: Any, grad_outputs: Any = None, retain_graph: Any = None,
    create_graph: bool = False, allow_unused: Any = None, is_grads_batched: bool = False,
    materialize_grads: bool = False,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """`torch.autograd.grad` of leaves and of results."""
    listed = lambda x: [x] if isinstance(x, Tensor) else list(x)
    outs, wanted = listed(outputs), listed(inputs)
    given = [None] * len(outs) if grad_outputs is None else listed(grad_outputs)
    given = [torch.ones_like(o) if g is None else g for o, g in zip(outs, given, strict=True)]
    with torch.set_grad_enabled(create_graph):
        found = _walk(outs, given, wanted)
    if materialize_grads:
        found = [
            torch.zeros_like(x) if g is None else g for x, g in zip(wanted, found, strict=True)
        ]
    return tuple(found)


def _node(x: Tensor) -> Any:
    """The node that a gradient of ``x`` goes to; of a leaf what accumulates it."""
    return x.grad_fn or torch.autograd.graph.get_gradient_edge(x).node


def _walk(
    outputs: Sequence[Tensor], gradients: Sequence[Tensor], wanted: Sequence[Tensor]
) -> list[Tensor | None]:
    """Gradients of ``wanted``, or of every leaf, which accumulates it."""
    waits: Counter[Any] = Counter()
    roots = [_node(x) for x in outputs]
    above: defaultdict[Any, list[Any]] = defaultdict(list)
    found, stack = set[Any](), list(roots)
    while stack:
        node = stack.pop()
        if node not in found:
            found.add(node)
            below = [n for n, _ in node.next_functions if n is not None]
            waits.update(below)
            stack += below
            for n in below:
                above[n].append(node)
    leads, stack = set[Any](), [n for x in wanted for n in above[_node(x)]]
    while stack:  # what stands on the way to a wanted one; the engine runs no others
        node = stack.pop()
        if node not in leads:
            leads.add(node)
            stack += above[node]
    sums: defaultdict[Any, dict[int, Tensor]] = defaultdict(dict)
    for x, node, g in zip(outputs, roots, gradients, strict=True):
        _add(sums[node], node, x.output_nr, g)
    ready = [node for node in dict.fromkeys(roots) if not waits[node]]
    ends = {(_node(x), x.output_nr): i for i, x in enumerate(wanted)}
    result: list[Tensor | None] = [None] * len(wanted)
    while ready:
        node = ready.pop()
        given = sums.pop(node, {})
        for (end, at), i in ends.items():
            if end is node:
                result[i] = given.get(at)
        runs = given and (not wanted or node in leads)
        made = _apply(node, given, accumulate=not wanted) if runs else ()
        none = [None] * len(node.next_functions)
        for (below, at), g in zip(node.next_functions, made or none, strict=True):
            if below is None:
                continue
            if g is not None:
                _add(sums[below], below, at, g)
            waits[below] -= 1
            if not waits[below]:
                ready.append(below)
    return result


def _add(into: dict[int, Tensor], node: Any, at: int, g: Tensor) -> None:
    """Add a gradient, in the shape and dtype of what it is of, as the engine does."""
    like = node._input_metadata[at]
    if g.device.type != like.device.type:
        raise RuntimeError(
            f"{node.name()}: a gradient is on {g.device}, its value on {like.device}"
        )
    if tuple(g.shape) != tuple(like.shape):
        g = g.sum_to_size(tuple(like.shape))
    if g.dtype != like.dtype:
        g = g.to(like.dtype)
    into[at] = into[at] + g if at in into else g


def _apply(node: Any, given: dict[int, Tensor], accumulate: bool) -> Sequence[Tensor | None]:
    """Gradients that a node hands down."""
    if hasattr(node, "variable"):
        if accumulate:
            x, g = node.variable, given[0]
            x.grad = g if x.grad is None else x.grad + g
            for hook in (getattr(x, "_post_accumulate_grad_hooks", None) or {}).values():
                hook(x)
        return ()
    above: list[Tensor | None] = [given.get(i) for i in range(len(node._input_metadata))]
    if hasattr(node, "saved_tensors"):  # of a Function in Python
        if not getattr(node, "takes_none", False):
            above = [
                _zeros(node._input_metadata[i]) if g is None else g for i, g in enumerate(above)
            ]
        made = node.apply(*above)
        made = made if isinstance(made, tuple) else (made,)
        kept = getattr(node, "of_tensors", [True] * len(made))
        return [g for g, is_tensor in zip(made, kept, strict=False) if is_tensor]
    made = node(*above)
    return made if isinstance(made, (tuple, list)) else (made,)


def _zeros(like: Any) -> Tensor:
    return torch.zeros(tuple(like.shape), dtype=like.dtype, device=like.device)
