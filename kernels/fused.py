"""Declare a kernel once: its `torch.library` ops, gradients, C++ and Triton forms follow."""

from __future__ import annotations

import functools
import importlib
import inspect
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import _get_current_dispatch_mode

from mm.kernels import compiler, device
from mm.kernels.op import Op

Pair = tuple[Callable[..., Any], Callable[..., Any]]
_OWN = frozenset((Tensor, torch.nn.Parameter, bool, int, float, str, type(None)))
_SCHEMA = {"Tensor | None": "Tensor?"}  # what a schema calls otherwise than an annotation


def register_kernel(
    op: Op,
    outputs: str,
    empties: Callable[..., Any],
    *,
    saved: str,
    gradients: str,
    kept: str = "",
    only: Mapping[str, str] | None = None,
    shared: Mapping[str, str] | None = None,
    dense: bool = True,
    like: str | None = None,
    wide: str = "",
    own: str = "",
    strided: str = "",
    prepare: Callable[..., tuple[Any, ...]] | None = None,
    result: Callable[..., Any] | None = None,
    trivial: Callable[..., bool] | None = None,
    why_not: Callable[..., str | None] | None = None,
    plain: Mapping[str, Pair] | None = None,
    cpp: str | None = None,
    arguments: Callable[..., tuple[Any, ...]] = lambda *given: given,
    typed: int = 1,
    triton: str | None = None,
) -> None:
    """Register implementations of ``op`` that write into empty outputs and have a gradient.

    Their inputs are the arguments of the reference, without the letters of shapes (``a_BTD`` is
    ``a``). Lists of names are words in one string.

    Args:
        outputs, empties, saved, gradients, kept, only, shared, dense: as `differentiable` takes
            them.
        like: the input whose dtype decides; default the first.
        wide: inputs that become float32 or wider, as ``like`` does.
        own: inputs that Triton reads in their own dtype and all others in float32 or wider.
        strided: inputs whose strides the implementations heed, "*" = all; others are contiguous.
        prepare: takes and returns all inputs, before the above.
        result: takes the arguments of the call, then all outputs, and returns what the reference
            would; default ``outputs``.
        trivial: calls that the reference does.
        why_not: takes the name of an implementation and a call; reason why it cannot, or None.
        plain: functions in plain PyTorch by the name of their implementation: one takes the inputs
            and the empty outputs, one what is saved, the outputs' gradients and empty gradients.
        cpp: file without its ending, which has functions ``<cpp>_<dtype>_forward`` and
            ``.._backward`` that take the same.
        arguments: turns these into arguments in C.
        typed: floating-point tensors among them whose dtypes stand in the name.
        triton: module of the package, with functions ``forward`` and ``backward`` that take the
            same. It is imported by the first call and must not be before: Triton may be absent.
    """
    reference = op.implementations["reference"][0]
    parameters = inspect.signature(reference).parameters.values()
    kinds = {}
    for p in parameters:
        kind = "str" if p.annotation.startswith("Literal") else p.annotation
        kinds[_plain(p.name)] = _SCHEMA.get(kind, kind)
    names = list(kinds)
    position = {p.name: i for i, p in enumerate(parameters)}
    defaults = [p.default for p in parameters]
    required = defaults.count(inspect.Parameter.empty)
    of = names.index(like) if like else 0
    number = len(outputs.split())

    def register(way: str, pair: Pair, has: Callable[..., str | None]) -> None:
        run = differentiable(
            f"{op.name}_{way}", kinds, outputs, empties, *pair,
            saved=saved, gradients=gradients, kept=kept, only=only, shared=shared, dense=dense,
            fill=True,
        )  # fmt: skip
        tensors = [n for n in names if kinds[n].startswith("Tensor")]
        widened = [*wide.split(), *(own.split() if way != "triton" else ())]
        # In one order in every process: ZeRO joins gradients in the order of their backward.
        widen = sorted({names.index(n) for n in widened})
        pack = [names.index(n) for n in tensors if strided != "*" and n not in strided.split()]

        def call(*args: Any, **kw: Any) -> Any:
            if len(args) < required or not kw.keys() <= position.keys():
                return reference(*args, **kw)  # which says what is missing or unknown
            given = [*args, *defaults[len(args) :]]
            for name, value in kw.items():
                given[position[name]] = value
            if trivial and trivial(*given):
                return reference(*args, **kw)
            values = list(prepare(*given)) if prepare else given.copy()
            if widen:
                dtype = torch.promote_types(values[of].dtype, torch.float32)
                for i in widen:
                    if values[i] is not None:
                        values[i] = values[i].to(dtype)
            for i in pack:
                if values[i] is not None:
                    values[i] = values[i].contiguous()
            made = run(*values)
            if result:
                return result(*given, *(made if isinstance(made, (tuple, list)) else (made,)))
            if number > 1:
                return tuple(made[:number])
            return made[0] if isinstance(made, (tuple, list)) else made

        refuse = functools.partial(why_not, way) if why_not else None
        reason = lambda *args, **kw: (refuse and refuse(*args, **kw)) or has(*args, **kw)
        op.register(way, reason)(call)

    for way, pair in (plain or {}).items():
        register(way, pair, lambda *args, **kw: None)
    if cpp:
        source = Path(str(sys.modules[op.__module__].__file__)).with_name(f"{cpp}.cpp")

        def in_c(direction: str) -> Callable[..., None]:
            def run(*given: Any) -> None:
                suffix = compiler.suffix(given, typed)
                compiler.call(source, f"{cpp}_{suffix}_{direction}", *arguments(*given))

            return run

        has = functools.partial(compiler.why_not, source)
        register("cpp", (in_c("forward"), in_c("backward")), has)
    if triton:
        module = f"{op.__module__}.{triton}"
        late = lambda direction: lambda *a: getattr(importlib.import_module(module), direction)(*a)
        register("triton", (late("forward"), late("backward")), device.why_not)


def _plain(name: str) -> str:
    """A parameter's name without the letters of its shape."""
    head, _, letters = name.rpartition("_")
    return head if head and letters.isupper() else name


def differentiable(
    name: str,
    inputs: Mapping[str, str],
    outputs: str,
    empties: Callable[..., Any],
    forward: Callable[..., Any],
    backward: Callable[..., Any],
    *,
    saved: str,
    gradients: str,
    kept: str = "",
    only: Mapping[str, str] | None = None,
    shared: Mapping[str, str] | None = None,
    dense: bool = True,
    ask: bool = False,
    fill: bool = False,
) -> Callable[..., Any]:
    """Define ``mm::<name>`` and ``mm::<name>_backward`` and return the call that has a gradient.

    A call that nothing traces goes past `torch.library`, whose dispatch in Python costs a small
    model more than its kernels do. Lists of names are words in one string.

    Args:
        name: of the op.
        inputs: types in a schema by name, in order: "Tensor", "Tensor?", "bool", "float", ...
        outputs: names of the outputs that have gradients.
        empties: takes the inputs and returns empty outputs: the rule of shapes when tracing.
        forward: takes the inputs and returns the outputs.
        backward: takes what is saved, the gradients of ``outputs`` and, with ``ask``, which of
            ``gradients`` are asked for; returns these, of size 0 where the input is None, and
            anything where they are not asked for.
        saved: names of the inputs and outputs that the backward needs.
        gradients: names of the inputs that have gradients, shaped as the inputs, which are saved;
            ``b:h`` is shaped as the saved ``h``, ``x:dy`` as the gradient of ``y``.
        kept: names of further outputs, for the backward alone.
        only: saved names, each with the input of type bool without which it is not saved.
        shared: inputs, each with one that has the same gradient: where the backward returns one
            of size 0 for them, they get that.
        dense: gradients of ``outputs`` that nothing gives are zeros, else None.
        fill: ``forward`` and ``backward`` also take the empty tensors that they write into.
    """
    made, extra, only = outputs.split(), kept.split(), only or {}
    every, save = [*inputs, *made, *extra], saved.split()
    wrt, likes = zip(*(g.partition(":")[::2] for g in gradients.split()), strict=True)
    taken = [*save, *(f"d{y}" for y in made)]
    like = [taken.index(other or own) for own, other in zip(wrt, likes, strict=True)]
    kinds = [inputs.get(n, "Tensor") + "?" * (n in only) for n in save]
    above_kinds = ["Tensor" if dense else "Tensor?"] * len(made)
    anchor = [*kinds, *above_kinds].index("Tensor")  # one that is always there
    # What follows runs in every call of a small model: positions, not names, and few of them.
    tensors = [i for i, kind in enumerate(kinds) if kind.startswith("Tensor")]
    others = [i for i in range(len(kinds)) if i not in tensors]
    order = [[*tensors, *others].index(i) for i in range(len(kinds))]
    tensors, others = ([every.index(save[i]) for i in some] for some in (tensors, others))
    unless = {every.index(n): every.index(flag) for n, flag in only.items()}
    positions = [every.index(n) for n in wrt]
    alike = [(every.index(n), every.index(other)) for n, other in (shared or {}).items()]

    def empty_gradients(*given: Any) -> Any:
        found = []
        for j, i in enumerate(like):
            x = given[i] if not ask or given[-1][j] else None
            if x is None:
                found.append(given[anchor].new_empty(0))
            else:
                found.append(torch.empty_like(x, memory_format=torch.contiguous_format))
        return tuple(found) if len(found) > 1 else found[0]

    if fill:
        forward, backward = _filled(empties, forward), _filled(empty_gradients, backward)
    schema = [f"{kind} {n}" for n, kind in inputs.items()]
    op, traceable = define(name, schema, len(made) + len(extra), empties, forward)
    schema = [f"{kind} {n}" for n, kind in zip(save, kinds, strict=True)]
    schema += [f"{kind} d{y}" for kind, y in zip(above_kinds, made, strict=True)]
    schema += ["bool[] ask"] * ask

    def run_backward(*given: Any) -> Any:
        """Return what `empty_gradients` promises a trace."""
        found = backward(*given)
        if not ask:
            return found
        pairs = zip(found, given[-1], strict=True)
        return tuple(x if wanted else given[anchor].new_empty(0) for x, wanted in pairs)

    name = f"{name}_backward"
    _, traceable_backward = define(name, schema, len(wrt), empty_gradients, run_backward)

    def setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        values = inputs + output if isinstance(output, tuple) else (*inputs, output)
        if unless:
            hidden = [i for i, flag in unless.items() if not values[flag]]
            values = [None if i in hidden else x for i, x in enumerate(values)]
        ctx.save_for_backward(*[values[i] for i in tensors])
        ctx.settings = [values[i] for i in others]
        ctx.given = [inputs[i] is not None for i in positions]
        # The only gradient is always there; zeros for what is kept would be a launch each.
        if not dense or len(made) == 1:
            ctx.set_materialize_grads(False)

    def grads(ctx: Any, *above: Tensor | None, by: Callable = traceable_backward) -> Any:
        pool = [*ctx.saved_tensors, *ctx.settings]
        values = [pool[i] for i in order]
        for g in above[: len(made)]:
            values.append(g if g is None else g.contiguous())
        wanted = [ctx.needs_input_grad[i] for i in positions] if ask else ctx.given
        found = by(*values, wanted) if ask else by(*values)
        found = found if isinstance(found, (tuple, list)) else (found,)
        back: list[Tensor | None] = [None] * len(inputs)
        for i, x, on in zip(positions, found, wanted, strict=True):
            back[i] = x if on else None
        for i, other in alike:
            if (g := back[i]) is not None and not g.numel():
                back[i] = back[other]
        return tuple(back)

    op.register_autograd(grads, setup_context=setup)

    class Direct(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:
            output = forward(*inputs)
            setup(ctx, inputs, output)
            return output

        @staticmethod
        @once_differentiable
        def backward(ctx: Any, *above: Tensor | None) -> Any:
            return grads(ctx, *above, by=backward)

    def call(*inputs: Any) -> Any:
        if is_traced(inputs):
            return traceable(*inputs)
        # A graph that nobody asked for costs a step of decoding more than a small kernel.
        return Direct.apply(*inputs) if torch.is_grad_enabled() else forward(*inputs)

    return call


def define(
    name: str, parameters: list[str], results: int, empties: Callable, run: Callable
) -> tuple[Any, Callable]:
    """The custom op of ``run``, and its call."""
    returns = "Tensor" if results == 1 else f"({', '.join(['Tensor'] * results)})"
    schema = f"({', '.join(parameters)}) -> {returns}"
    op = torch.library.custom_op(f"mm::{name}", run, mutates_args=(), schema=schema)
    op.register_fake(empties)
    return op, getattr(torch.ops.mm, name)


def _filled(empties: Callable[..., Any], fill: Callable[..., None]) -> Callable[..., Any]:
    def run(*given: Any) -> Any:
        outs = empties(*given)
        fill(*given, *(outs if isinstance(outs, tuple) else (outs,)))
        return outs

    return run


def is_traced(args: tuple[Any, ...]) -> bool:
    """Return whether anything but plain autograd looks at a call.

    That is a compiler, a mode, a transform or a tensor of a class of its own.
    """
    if (
        torch.compiler.is_compiling()
        or _get_current_dispatch_mode() is not None
        or torch._C._functorch.peek_interpreter_stack() is not None  # type: ignore[attr-defined]
    ):
        return True
    others = set(map(type, args)) - _OWN
    return any(issubclass(kind, Tensor) for kind in others)
