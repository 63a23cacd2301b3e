"""The self-check of kernels: an implementation against its reference on a part of a real call."""

from __future__ import annotations

import inspect
import os
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

# What is taken of each dimension, by the letter that names it in the signature (``q_BTHK``): all of
# the widths, a prefix of rows and tokens, so that a reference that holds every state stays small.
PREFIX = {"B": 2, "R": 2, "T": 256, "S": 256, "P": 512}
TOKENS = 512  # of R where the signature has no T: it then counts tokens
# Of the root mean square, by the narrowest type of the call; narrower ones and autocast: 3e-2.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 3e-3}


def is_checkable(args: tuple[Any, ...]) -> bool:
    """Whether this call may be checked: ``MM_SELF_CHECK=0`` says no, a trace cannot be."""
    if torch.compiler.is_compiling() or os.environ.get("MM_SELF_CHECK", "1") == "0":
        return False
    fake = torch._subclasses.FakeTensor
    return not any(isinstance(a, Tensor) and (a.is_meta or isinstance(a, fake)) for a in args)


def kind(args: tuple[Any, ...], kw: dict[str, Any]) -> tuple[Any, ...]:
    """Return what calls have in common that one check stands for.

    That is: types, devices, sizes to the next power of two (1 apart), settings, and whether
    there is a gradient.
    """
    grad = torch.is_grad_enabled()
    out: list[Any] = []
    values = (*args, *kw, *kw.values())
    for value in (x for v in values for x in (v if isinstance(v, tuple) else (v,))):
        if isinstance(value, Tensor):
            sizes = tuple((size - 1).bit_length() if size else -1 for size in value.shape)
            out.append((value.dtype, value.device.type, sizes, grad and value.requires_grad))
        else:
            out.append(value)
    return tuple(out)


def problem(
    reference: Callable, f: Callable, args: tuple[Any, ...], kw: dict[str, Any]
) -> str | None:
    """Say how ``f`` differs from the reference in outputs or gradients on a part of this call.

    Returns:
        None where they agree: root mean square of the difference within `TOLERANCE` of the
        reference's, per output and per gradient, and finite wherever that is.
    """
    part = _part(reference, args, kw)
    # Hooks of our own keep those of activation checkpointing away: it counts what is saved. Its
    # selective form counts operators, too, and no check runs when they are made again.
    with (
        _disable_current_modes(),
        torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x),
    ):
        try:
            names, got = results(f, part)
        except Exception as error:  # a kernel that does not compile or launch is as wrong as any
            return f"{type(error).__name__}: {error}".splitlines()[0]
        expected = results(reference, part)[1]
    values = _flatten(part.arguments).values()
    floats = [v for v in values if isinstance(v, Tensor) and v.is_floating_point()]
    narrowest = min((v.dtype for v in floats), key=lambda d: d.itemsize, default=torch.float32)
    autocast = any(torch.is_autocast_enabled(v.device.type) for v in floats)
    allowed = 3e-2 if autocast else TOLERANCE.get(narrowest, 3e-2)
    # What is zero in exact arithmetic (the gradient of the query of a single key) holds rounding
    # alone: it is measured against a thousandth of the call's largest result.
    floor = 1e-3 * max(map(size, expected), default=0.0)
    for name, value, right in zip(names, got, expected, strict=True):
        error = distance(value, right, floor)
        if not error <= allowed:
            return f"{name} differs from the reference's by {error:.2g} (allowed {allowed:.0e})"
    return None


def _flatten(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments by name, those of a named tuple by the names of its fields."""
    out: dict[str, Any] = {}
    for name, value in arguments.items():
        out |= value._asdict() if hasattr(value, "_fields") else {name: value}
    return out


def _unflatten(flat: Mapping[str, Any], like: Mapping[str, Any]) -> OrderedDict[str, Any]:
    """Inverse of `_flatten`; ``like`` says which arguments are named tuples."""
    fill = lambda name, value: (
        type(value)(*(flat[field] for field in value._fields))
        if hasattr(value, "_fields")
        else flat[name]
    )
    return OrderedDict((name, fill(name, value)) for name, value in like.items())


def _part(reference: Callable, args: tuple[Any, ...], kw: dict[str, Any]) -> inspect.BoundArguments:
    """The call's arguments by the reference's names, cut to `PREFIX`."""
    call = inspect.signature(reference).bind(*args, **kw)
    bound = _flatten(call.arguments)
    letters = {name: name.rpartition("_")[2] for name in bound}
    dims = {
        name: letters[name]
        for name, value in bound.items()
        if isinstance(value, Tensor) and letters[name].isupper()
    }
    named = {n: d for n, d in dims.items() if len(d) == bound[n].dim()}
    sizes = {letter: bound[n].shape[i] for n, d in named.items() for i, letter in enumerate(d)}
    caps = dict(PREFIX, **({} if "T" in sizes else {"R": TOKENS}))
    leading = tuple(sizes[x] for x in "BT" if x in sizes)
    for name, value in bound.items():
        if isinstance(value, Tensor):
            axes = named.get(name, "")
            if not axes and len(leading) == 2 and value.shape[:2] == leading:
                axes = "BT"  # an argument of several forms, as a decay by token or one for all
            for i, letter in enumerate(axes):
                value = value.narrow(i, 0, min(value.shape[i], caps.get(letter, value.shape[i])))
            if axes == "B" and value.dtype in (torch.int32, torch.int64) and "T" in sizes:
                value = value.clamp_max(min(sizes["T"], caps["T"]))  # a row's length
        bound[name] = value
    call.arguments = _unflatten(bound, call.arguments)
    return call


def results(f: Callable, part: inspect.BoundArguments) -> tuple[list[str], list[Tensor]]:
    """Names and values of the outputs and, where the call has them, of all gradients.

    The gradients are those of a weighting of all outputs that is the same for every dtype.
    """
    track = torch.is_grad_enabled()
    arguments, leaves = _flatten(part.arguments), dict[str, Tensor]()
    for name, value in arguments.items():
        if isinstance(value, Tensor) and value.is_floating_point():
            arguments[name] = value.detach()
            if track and value.requires_grad:
                leaves[name] = arguments[name] = value.detach().requires_grad_()
    call = inspect.BoundArguments(part.signature, _unflatten(arguments, part.arguments))
    out = f(*call.args, **call.kwargs)
    outs = list(out) if isinstance(out, tuple) else [out]
    names = [f"output {i}" for i in range(len(outs))]
    # A fixed weighting: the check draws nothing from anyone's random numbers. Every dtype holds it
    # exactly, so that a reference in float64 is asked for the same gradients.
    loss = [
        (o * torch.arange(o.numel(), device=o.device).cos().bfloat16().view(o.shape).to(o)).sum()
        for o in outs
        if o.requires_grad
    ]
    if not leaves or not loss:
        return names, [o.detach() for o in outs]
    grads = torch.autograd.grad(
        sum(loss[1:], loss[0]), list(leaves.values()), allow_unused=True, materialize_grads=True
    )
    values = [*(o.detach() for o in outs), *grads]
    return [*names, *(f"gradient of {name}" for name in leaves)], values


def size(x: Tensor) -> float:
    """Root mean square of what is finite."""
    if not x.numel():
        return 0.0
    return float(torch.where(x.isfinite(), x.double(), 0).square().mean().sqrt())


def distance(value: Tensor, expected: Tensor, floor: float) -> float:
    """Return the relative root mean square of the difference where the reference is finite.

    It is divided by that of the reference, which counts as ``floor`` at least.
    """
    if value.shape != expected.shape:
        return float("inf")
    if not expected.numel():
        return 0.0
    finite = expected.isfinite()
    a, b = (torch.where(finite, x.double(), 0) for x in (value, expected))
    return float((a - b).square().mean().sqrt()) / (max(size(b), floor) + 1e-12)
