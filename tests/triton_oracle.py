"""Triton without a GPU: an interpreter that computes what the GPU would, and builds.

    with interpreted():                       # CPU tensors, forward and backward
        with linear_scan.using("triton"):
            h, _ = linear_scan(a, b)
            h.sum().backward()

    with recorded() as launches:              # nothing runs; outputs hold garbage
        with linear_scan.using("triton"):
            linear_scan(a, b)                 # real sizes: uninitialised memory costs nothing
    for launch in launches:
        built(launch).check(dot=False)        # no spills, shared memory, matrix instructions

A launch is recorded with the tiles of a card, ``recorded(80)``, and built for it.

Both work in any process and in any order (never one inside the other): kernels stay ordinary
``triton.jit`` functions, whose launch is replaced inside the block. ``TRITON_INTERPRET`` must not
be set. What `interpreted` mends in Triton 3.8, each of it silently wrong or useless as
shipped: bf16 (kept there as raw 16-bit integers) in arithmetic, comparison, ``tl.dot``, constants
and rounding; ``tl.dot``'s tf32 operands (there exact: here rounded, so that a kernel needs
``input_precision="ieee"`` or ``"tf32x3"`` where a GPU does); scans and reductions by a Python call
an element (here one call a step); autotuning (here the first configuration that is not pruned);
the patched language leaking out of nested functions; the interpreter's globals added to a kernel's
module.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import functools
import re
import subprocess
import tempfile
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import triton
import triton.language as tl
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime import interpreter
from triton.runtime.autotuner import Autotuner
from triton.runtime.jit import JITFunction, create_function_from_signature

from mm.kernels import device

Handle = interpreter.TensorHandle
# Kilobytes of shared memory a block may use, by compute capability.
# Source: CUDA C++ Programming Guide, table "Technical Specifications per Compute Capability".
SHARED_LIMIT = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
assert {*map(device.card_like, SHARED_LIMIT)} == {*device.CARDS}


def _widened(bits: np.ndarray) -> np.ndarray:
    """bf16 bits as float32."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def _rounded(x: np.ndarray, kept: int, nearest: bool = True) -> np.ndarray:
    """float32 with its mantissa cut to the upper ``kept`` bits of the word, to nearest even."""
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    low = np.uint32(32 - kept)
    if nearest:
        half = np.uint32((1 << (31 - kept)) - 1)
        bits = np.where(np.isfinite(x), bits + ((bits >> low) & np.uint32(1)) + half, bits)
    return (bits >> low << low).view(np.float32)


def _narrowed(x: np.ndarray, nearest: bool = True) -> np.ndarray:
    """float32 as bf16 bits."""
    x = np.asarray(x, dtype=np.float32)
    bits = (_rounded(x, 16, nearest).view(np.uint32) >> np.uint32(16)).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FC0), bits)


def _is_bf16(handle: Any) -> bool:
    return handle.dtype.scalar == tl.bfloat16


def _values(handle: Any) -> np.ndarray:
    return _widened(handle.data) if _is_bf16(handle) else handle.data


class _Builder(interpreter.InterpreterBuilder):
    """The interpreter's operations with bf16 as numbers and tf32 as rounded operands."""

    def _through_float(self, operation: Callable, *handles: Any) -> Any:
        """``operation`` on float32 copies of bf16 operands; a bf16 result unless it compares."""
        wide = [Handle(_values(h), tl.float32) if _is_bf16(h) else h for h in handles]
        out = operation(*wide)
        return out if out.data.dtype == np.bool_ else Handle(_narrowed(out.data), tl.bfloat16)

    def unary_op(self, arg, op):
        plain = super().unary_op
        return self._through_float(lambda x: plain(x, op), arg) if _is_bf16(arg) else plain(arg, op)

    def binary_op(self, lhs, rhs, op):
        plain = super().binary_op
        if _is_bf16(lhs) or _is_bf16(rhs):
            return self._through_float(lambda a, b: plain(a, b, op), lhs, rhs)
        return plain(lhs, rhs, op)

    def ternary_op(self, lhs, rhs, other, op):
        if op is np.where or not _is_bf16(other):
            return super().ternary_op(lhs, rhs, other, op)
        plain = super().ternary_op
        return self._through_float(lambda a, b, c: plain(a, b, c, op), lhs, rhs, other)

    def create_fma(self, x, y, z):
        if _is_bf16(z):
            return self._through_float(super().create_fma, x, y, z)
        return super().create_fma(x, y, z)

    def create_rsqrt(self, arg):
        plain = super().create_rsqrt
        return self._through_float(plain, arg) if _is_bf16(arg) else plain(arg)

    def get_bf16(self, value):
        return Handle(_narrowed(np.array([value])), tl.bfloat16)

    def cast_impl(self, src, dst_type):
        source, target = src.dtype.scalar, dst_type.scalar
        if source == target or tl.bfloat16 not in (source, target):
            return super().cast_impl(src, dst_type)
        if target == tl.bfloat16:
            return Handle(_narrowed(src.data), target)
        return Handle(_values(src).astype(interpreter._get_np_dtype(dst_type)), target)

    def create_fp_to_fp(self, src, dst_type, rounding_mode):
        if {src.dtype.scalar, dst_type.scalar} == {tl.float32, tl.bfloat16}:
            if _is_bf16(src):
                return Handle(_widened(src.data), tl.float32)
            toward_zero = rounding_mode == interpreter._ir.ROUNDING_MODE.RTZ
            return Handle(_narrowed(src.data, nearest=not toward_zero), tl.bfloat16)
        return super().create_fp_to_fp(src, dst_type, rounding_mode)

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        if 8 in (a.dtype.primitive_bitwidth, b.dtype.primitive_bitwidth):
            return super().create_dot(a, b, d, input_precision, max_num_imprecise_acc)
        x, y = _values(a), _values(b)
        tf32 = input_precision == interpreter._ir.INPUT_PRECISION.TF32
        if tf32 and a.dtype.scalar == b.dtype.scalar == tl.float32:
            x, y = _rounded(x, 19), _rounded(y, 19)
        kind = d.data.dtype if d.data.dtype != np.uint16 else np.dtype(np.float32)
        total = np.matmul(x.astype(kind), y.astype(kind)) + _values(d)
        return Handle(_narrowed(total) if _is_bf16(d) else total, d.dtype.scalar)

    def create_atomic_rmw(self, rmwOp, ptr, val, mask, sem, scope):
        if not _is_bf16(val):
            return super().create_atomic_rmw(rmwOp, ptr, val, mask, sem, scope)
        assert rmwOp == interpreter._ir.ATOMIC_OP.FADD, f"{rmwOp} of bf16"
        before = np.zeros_like(val.data)
        for i in np.ndindex(val.data.shape):  # each sum is rounded, in this order
            if mask.data[i]:
                at = ctypes.c_uint16.from_address(int(ptr.data[i]))
                before[i] = at.value
                pair = _widened(np.array([at.value, val.data[i]], dtype=np.uint16))
                at.value = _narrowed(pair.sum()).item()
        return Handle(before, tl.bfloat16)


BUILDER = _Builder()
# What `tl.dot` refuses on the GPU: there the interpreter takes any depth.
BUILDER.codegen_fns["min_dot_size"] = lambda lhs, rhs: (1, 1, 16)
SEMANTIC = interpreter.TritonSemantic(BUILDER)


def _steps(self: Any, inputs: Any, axis: int) -> Iterator[tuple[np.ndarray, ...]]:
    """The running combination along ``axis``, one slice after another."""
    parts = [np.moveaxis(one.handle.data, axis, 0) for one in inputs]
    kinds = [one.dtype for one in inputs]
    shape = parts[0].shape[1:]
    total: tuple[Any, ...] = ()
    for slices in zip(*parts, strict=True):
        here = tuple(self.to_tensor(x, kind) for x, kind in zip(slices, kinds, strict=True))
        if total:
            made = self.combine_fn.fn(*total, *here)
            here = made if isinstance(made, tuple) else (made,)
        total = here
        yield tuple(np.asarray(one.handle.data).reshape(shape) for one in total)


def _scan(self: Any, inputs: Any) -> list[Any]:
    columns = zip(*_steps(self, inputs, self.axis), strict=True)
    return [
        self.to_tensor(np.stack(column, axis=self.axis), one.dtype)
        for column, one in zip(columns, inputs, strict=True)
    ]


def _reduce(self: Any, inputs: Any) -> list[Any]:
    dims = inputs[0].handle.data.ndim
    flat, axis = self.unravel(inputs, self.axis)
    (last,) = deque(_steps(self, flat, axis), maxlen=1)
    if self.keep_dims:
        last = tuple(
            np.expand_dims(x, tuple(range(dims)) if self.axis is None else axis) for x in last
        )
    return [self.to_tensor(x, one.dtype) for x, one in zip(last, inputs, strict=True)]


class _Rewriter(interpreter.FunctionRewriter):
    """Compile the rewritten function in a copy of its module's names, which stay as they are."""

    def _compile_and_exec(self, transformed_ast):
        names = {**self.fn.__globals__, "interpreter_semantic": SEMANTIC}
        made: dict[str, Any] = {}
        exec(compile(transformed_ast, self.filename, "exec"), names, made)
        return made[self.fn.__name__]


@functools.cache
def _python(fn: Callable) -> Callable:
    """The kernel's source as a Python function over interpreted tensors."""
    return _Rewriter(fn).rewrite_ast()


def _launch(self: JITFunction, *args: Any, grid: Any, warmup: bool = False, **options: Any) -> None:
    if not warmup:
        interpreter.GridExecutor(_python(self.fn), self.arg_names, grid)(*args, **options)


def _first(self: Autotuner, *args: Any, **options: Any) -> Any:
    """In place of autotuning: the first configuration that is left."""
    self.nargs = dict(zip(self.arg_names, args, strict=False))
    config = self.prune_configs(options)[0]
    if config.pre_hook is not None:
        config.pre_hook({**self.nargs, **options, **config.all_kwargs()})
    return self.fn.run(*args, **options, **config.all_kwargs())


@contextlib.contextmanager
def interpreted(card: int = 90) -> Iterator[None]:
    """Run Triton kernels on CPU tensors inside the block, with a card's tiles, as said above."""
    assert not knobs.runtime.interpret, "unset TRITON_INTERPRET: kernels must be ordinary here"
    swaps: list[tuple[Any, str, Any]] = [
        (interpreter, "interpreter_builder", BUILDER),
        (interpreter, "interpreter_semantic", SEMANTIC),
        (interpreter.ScanOps, "generic_scan", _scan),
        (interpreter.ReduceOps, "generic_reduce", _reduce),
        (JITFunction, "run", _launch),
        (JITFunction, "__call__", lambda self, *a, **k: _python(self.fn)(*a, **k)),
        (Autotuner, "run", _first),
        (device, "KIND", "cpu"),
        (device, "CARD", device.card_like(card)),
    ]
    with contextlib.ExitStack() as stack:
        for owner, name, value in swaps:
            stack.enter_context(mock.patch.object(owner, name, value))
        sees_all = SimpleNamespace(__globals__={"tl": tl, "core": tl.core})
        scope = interpreter._patch_lang(sees_all)
        stack.callback(scope.restore)
        # The language is patched for the whole block: a launch or a nested call has nothing to do.
        empty = mock.patch.object(
            interpreter, "_patch_lang", lambda fn: interpreter._LangPatchScope()
        )
        stack.enter_context(empty)
        yield


@dataclass
class Launch:
    """A launch that was asked for: the kernel and all that its binary depends on."""

    kernel: JITFunction
    args: tuple[Any, ...]
    options: dict[str, Any]
    grid: tuple[int, ...] = ()
    card: int = 90


@contextlib.contextmanager
def recorded(card: int = 90) -> Iterator[list[Launch]]:
    """Collect launches on a card, by its compute capability, in place of running them.

    Of an autotuned kernel: one a configuration.
    """
    launches: list[Launch] = []

    def record(
        self: JITFunction, *args: Any, grid: Any, warmup: bool = False, **options: Any
    ) -> None:
        bound = {**dict(zip(self.arg_names, args, strict=False)), **options}
        size: Any = grid(bound) if callable(grid) else tuple(grid)
        launches.append(Launch(self, args, options, size, card))

    def every(self: Autotuner, *args: Any, **options: Any) -> None:
        self.nargs = dict(zip(self.arg_names, args, strict=False))
        for config in self.prune_configs(options):
            self.fn.run(*args, **options, **config.all_kwargs())

    with (
        mock.patch.object(JITFunction, "run", record),
        mock.patch.object(Autotuner, "run", every),
        mock.patch.object(device, "KIND", "cpu"),
        mock.patch.object(device, "CARD", device.card_like(card)),
    ):
        yield launches


@dataclass
class Built:
    """What a kernel's binary for one card holds."""

    name: str
    registers: int  # a thread
    spills: int  # bytes of local memory a thread
    shared: int  # bytes a block
    wgmma: int  # warp-group matrix instructions
    mma: int  # warp matrix instructions, and those of tensor memory (sm_100)
    dots: int  # `tl.dot` in it
    tall: int  # those of them that have 64 rows and more of 16 bits: what `wgmma` multiplies
    grid: tuple[int, ...] = ()
    card: int = 90

    def check(self, dot: bool = False) -> Built:
        """Assert no spills, shared memory that fits, matrix instructions where there are products.

        There must be some with ``dot``.
        """
        assert self.spills == 0, f"{self.name} spills: {self}"
        fits = self.shared <= 1024 * SHARED_LIMIT[self.card]
        assert fits, f"{self.name} needs too much shared memory: {self}"
        if dot or self.dots:
            assert self.wgmma + self.mma > 0, f"{self.name} has no matrix instruction: {self}"
        if self.card == 90 and self.tall:
            assert self.wgmma > 0, f"{self.name} has no instruction of a warp group: {self}"
        # A large grid dimension fails at launch only.
        assert all(size <= 65535 for size in self.grid[1:]), f"{self.name}: grid {self.grid}"
        return self


BINARIES: dict[tuple[str, str], Built] = {}  # made in this process, by source and options


def built(launch: Launch) -> Built:
    """Compile a recorded launch for its card, as a launch there would, and read its binary."""
    source, target, options = _source(launch)
    key = source.hash(), f"{target} {sorted(options.items())}"
    if key not in BINARIES:
        BINARIES[key] = _built(launch.kernel.__name__, source, target, options)
    return dataclasses.replace(BINARIES[key], grid=launch.grid)


def _source(launch: Launch) -> tuple[ASTSource, GPUTarget, dict[str, Any]]:
    """What a launch's binary is made of."""
    target = GPUTarget("cuda", launch.card, 32)
    kernel, backend = launch.kernel, make_backend(target)
    binder = create_function_from_signature(kernel.signature, kernel.params, backend)
    keywords = {"debug": False, "instrumentation_mode": "", **launch.options}
    bound, specialization, rest = binder(*launch.args, **keywords)
    options, signature, constants, attrs = kernel._pack_args(
        backend, keywords, bound, specialization, rest
    )
    return ASTSource(kernel, signature, constants, attrs), target, dict(options.__dict__)


def _built(name: str, source: ASTSource, target: GPUTarget, options: dict[str, Any]) -> Built:
    made = triton.compile(source, target, options)
    usage = _usage(made.asm["cubin"])
    figure = lambda key: int((re.search(rf"{key}:(\d+)", usage) or [0, 0])[1])
    count = lambda pattern: len(re.findall(pattern, made.asm["ptx"]))
    dots = re.findall(r"tt\.dot .*: tensor<(?:\d+x)?(\d+)x\d+x(\w+)", made.asm["ttir"])
    return Built(
        name=name,
        registers=figure("REG"),
        spills=max(figure("STACK"), figure("LOCAL")),
        shared=int(made.metadata.shared),
        wgmma=count(r"\bwgmma\.mma_async\b"),
        mma=count(r"\bmma\.sync\b|\btcgen05\.mma\b"),
        dots=len(dots),
        tall=len([rows for rows, kind in dots if int(rows) >= 64 and kind in ("bf16", "f16")]),
        card=int(target.arch),
    )


def _usage(cubin: bytes) -> str:
    """Registers, stack and local memory of a binary, by a tool of Triton's wheel.

    Machine code is not read: its disassembly takes as long as the build, holds the matrix
    instructions that PTX has, and loads of local memory only where there is a stack.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", str(path)]
        run = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
        return run.stdout
