"""Op: the decorated plain-PyTorch function IS the reference.

Exact faster implementations register beside it.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch

from mm.errors import UserError
from mm.kernels import check

log = logging.getLogger("mm.kernels")


NOTHING = contextlib.nullcontext()
REMEMBERED = 4096  # calls of one op whose implementation is known at once
PLAIN = frozenset((bool, int, float, str, type(None)))


def signature(args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """What decides which implementation runs a call without gradients; None: it is asked anew."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return None
    found: list[Any] = ["same"]
    for x in args:
        kind = type(x)
        if kind is torch.Tensor or kind is torch.nn.Parameter:
            found += (x.dtype, x.device, x.shape, x.stride())
        elif kind in PLAIN:
            found.append(x)
        elif isinstance(x, tuple) and PLAIN.issuperset(map(type, x)):
            found.append(tuple(x))
        else:
            return None
    return tuple(found)


def exact(f: Callable) -> Callable:
    """Decorator: run ``f`` outside autocast, which would round the operands of its products."""

    @functools.wraps(f)
    def run(*args: Any, **kw: Any) -> Any:
        device = next(a.device.type for a in args if isinstance(a, torch.Tensor))
        with without_autocast(device):
            return f(*args, **kw)

    return run


def without_autocast(device: str) -> AbstractContextManager[Any]:
    """A block outside autocast; where there is none, entering costs nothing."""
    if torch.is_autocast_enabled(device) or torch.compiler.is_compiling():
        return torch.autocast(device, enabled=False)
    return NOTHING


class KernelUnavailable(UserError, RuntimeError):
    """An implementation was forced that cannot run this call."""


class Op:
    """A kernel with one signature and several implementations.

    `@Op` decorates the reference (fp32 or wider inside). `@op.register(name, why_not)` adds an
    exact implementation;
    ``why_not(*args, **kw)`` returns the reason why it cannot run this call, or None. Later
    registrations are preferred, or those that ``op.order`` puts first.
    The choice is logged once. `op.using(name)` or the environment variable ``MM_<OP>=name`` forces
    one. One that is not forced is compared with the reference when it first meets a kind of call
    (`mm.kernels.check`); where it is wrong, the next one runs, and a warning says so.
    """

    every: dict[str, Op] = {}
    # Told of every call outside compiled code, with its arguments and result; None: nobody looks.
    observer: Callable[[Op, tuple[Any, ...], dict[str, Any], Any], None] | None = None
    # Name of the implementation that every op runs, whatever else is forced; None: each its own.
    everywhere: str | None = None

    def __init__(self, reference: Callable):
        functools.update_wrapper(self, reference)
        self.name = reference.__name__
        self.implementations: dict[str, tuple[Callable, Callable[..., str | None]]] = {
            "reference": (reference, lambda *a, **k: None)
        }
        # Of a call: names, the fastest first, all that may take it; None: the last registered.
        self.order: Callable[..., Sequence[str] | None] = lambda *args, **kw: None
        # Of an implementation and a call: what spoke for it; "": its place among the registered.
        self.why: Callable[..., str] = lambda name, *args, **kw: ""
        self._forced: str | None = os.environ.get(f"MM_{self.name.upper()}")
        self._logged: set[str] = set()
        self._checked: dict[tuple[Any, ...], str] = {}
        Op.every[self.name] = self

    def register(
        self, name: str, why_not: Callable[..., str | None]
    ) -> Callable[[Callable], Callable]:
        def bind(f: Callable) -> Callable:
            self.implementations[name] = (f, why_not)
            return f

        return bind

    @property
    def by_name(self) -> str | None:
        """Name of the implementation that every call takes; None: each call its own."""
        return Op.everywhere or self._forced

    def candidates(self, *args: Any, **kw: Any) -> Sequence[str]:
        """Names of implementations, the best for this call first."""
        return self.order(*args, **kw) or list(reversed(self.implementations))

    def pick(self, *args: Any, **kw: Any) -> str:
        """Name of the implementation that runs this call.

        Raises KernelUnavailable when the forced one cannot.
        """
        forced = self.by_name
        if forced is not None:
            if forced not in self.implementations:
                have = ", ".join(self.implementations)
                raise KernelUnavailable(f"{self.name}: no implementation '{forced}' ({have})")
            reason = self.implementations[forced][1](*args, **kw)
            if reason:
                raise KernelUnavailable(f"{self.name}: {forced}: {reason}")
            return forced
        for name in self.candidates(*args, **kw):
            if self.implementations[name][1](*args, **kw) is None:
                return name
        raise AssertionError("the reference runs everything")

    def __call__(self, *args: Any, **kw: Any) -> Any:
        # Decoding: the same small calls, over and over.
        same = None if kw or Op.everywhere or self._forced or Op.observer else signature(args)
        if same is not None and (known := self._checked.get(same)) is not None:
            return self.implementations[known][0](*args)
        name = self.pick(*args, **kw)
        if not torch.compiler.is_compiling() and name not in self._logged:
            self._logged.add(name)
            others = {n: w(*args, **kw) for n, (_, w) in self.implementations.items() if n != name}
            reasons = ", ".join(f"{n}: {r}" for n, r in others.items() if r)
            chosen = ", ".join(filter(None, (name, self.why(name, *args, **kw))))
            log.info("%s: using %s%s", self.name, chosen, f" ({reasons})" if reasons else "")
        if self._forced is None and name != "reference" and check.is_checkable(args):
            name = self._trusted(name, args, kw)
            if same is not None and len(self._checked) < REMEMBERED:
                self._checked[same] = name
        result = self.implementations[name][0](*args, **kw)
        if Op.observer is not None:
            Op.observer(self, args, kw, result)
        return result

    def _trusted(self, name: str, args: tuple[Any, ...], kw: dict[str, Any]) -> str:
        """``name``, or the first one after it that equals the reference on calls of this kind."""
        kind = (name, *check.kind(args, kw))
        if kind not in self._checked:
            order = list(self.candidates(*args, **kw))
            for candidate in order[order.index(name) :]:
                f, why_not = self.implementations[candidate]
                if candidate == "reference" or why_not(*args, **kw):
                    continue
                problem = check.problem(self.implementations["reference"][0], f, args, kw)
                if problem is None:
                    break
                log.warning(
                    "%s: %s IS WRONG HERE AND IS NOT USED: %s", self.name, candidate, problem
                )
            else:
                candidate = "reference"
            self._checked[kind] = candidate
        return self._checked[kind]

    @contextlib.contextmanager
    def using(self, name: str) -> Iterator[None]:
        """Force an implementation inside a with-block."""
        before, self._forced = self._forced, name
        try:
            yield
        finally:
            self._forced = before
