"""CPU kernels: compile a C++ file once, and call it through ctypes.

The compiler is the machine's own.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

FLAGS = (
    "-O3",
    "-march=native",
    "-fopenmp-simd",
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fPIC",
    "-pthread",
    "-shared",
    "-std=c++17",
)


def cache_folder() -> Path:
    """Where compiled kernels lie: ``MM_KERNEL_CACHE``, else the user's cache folder."""
    given = os.environ.get("MM_KERNEL_CACHE")
    home = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(given) if given else Path(home) / "mm" / "kernels"


@functools.cache
def _machine() -> str:
    """What `-march=native` means here: a cache shared by unlike nodes must not mix their code."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(
            (line for line in lines if line.startswith(("flags", "Features"))), platform.processor()
        )
    except OSError:
        return f"{platform.machine()} {platform.processor()}"


@functools.cache
def load(source: Path) -> tuple[ctypes.CDLL | None, str | None]:
    """Return the library compiled from ``source``, or None and the reason why there is none.

    The file name is a hash of source, headers, flags, compiler and processor; it appears by rename,
    so that concurrent processes
    never load half a file.
    """
    compiler = next(
        (c for c in (os.environ.get("CXX"), "c++", "g++", "clang++") if c and shutil.which(c)), None
    )
    if compiler is None:
        return None, "no C++ compiler (install g++)"
    try:
        version = subprocess.run(
            [compiler, "--version"], capture_output=True, text=True, timeout=60, check=True
        ).stdout
        headers = [path.read_text() for path in sorted(Path(__file__).parent.glob("*.h"))]
        key = hashlib.sha256(
            "\0".join((source.read_text(), *headers, *FLAGS, version, _machine())).encode()
        ).hexdigest()[:24]
        folder = cache_folder()
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError:
            folder = Path(tempfile.gettempdir()) / f"mm-kernels-{os.getuid()}"
            folder.mkdir(mode=0o700, exist_ok=True)
        library = folder / f"{source.stem}-{key}.so"
        if not library.is_file():
            with tempfile.NamedTemporaryFile(dir=folder, suffix=".so", delete=False) as part:
                temporary = Path(part.name)
            try:
                command = [compiler, *FLAGS, "-o", str(temporary), str(source)]
                done = subprocess.run(command, capture_output=True, text=True, timeout=300)
                if done.returncode:
                    said = done.stderr.strip().splitlines() or ["no message"]
                    return None, f"{compiler} failed: {said[-1]}"
                temporary.chmod(0o755)
                temporary.replace(library)
            finally:
                temporary.unlink(missing_ok=True)
        return ctypes.CDLL(str(library)), None
    except (OSError, subprocess.SubprocessError) as error:
        return None, f"{compiler}: {error}"


SUFFIX = {torch.float32: "f32", torch.float64: "f64", torch.bfloat16: "bf16"}


def why_not(source: Path, *args: object, **kw: object) -> str | None:
    """Reason why the library of ``source`` cannot take these arguments, or None.

    What is no tensor is skipped.
    """
    for t in (*args, *kw.values()):
        if isinstance(t, Tensor) and t.device.type != "cpu":
            return f"tensors are on {t.device.type}"
        if isinstance(t, Tensor) and t.is_floating_point() and t.dtype not in SUFFIX:
            return f"no {t.dtype}"
    # A compiler cannot be started inside a trace: what is traced has run, or runs, eagerly with the
    # same answer.
    return None if torch.compiler.is_compiling() else load(source)[1]


def suffix(arguments: Iterable[object], number: int = 1) -> str:
    """Part of a function's name: the dtypes of the first ``number`` floating-point tensors."""
    found: list[str] = []
    for x in arguments:
        if isinstance(x, Tensor) and x.dtype in SUFFIX:
            found.append(SUFFIX[x.dtype])
            if len(found) == number:
                break
    return "_".join(found)


def call(source: Path, function: str, *arguments: Tensor | int | float | None) -> None:
    """Call a function that the source names by `EXPORT`.

    Tensors become pointers, ints int64, floats double, None a null pointer.
    """
    # Made once for each pattern of types: objects of all arguments cost more than a small call.
    run, tensors = _function(source, function, tuple(map(type, arguments)))
    values: list[Any] = list(arguments)
    for i in tensors:
        values[i] = values[i].data_ptr()
    run(*values)


@functools.cache
def _function(
    source: Path, name: str, kinds: tuple[type, ...]
) -> tuple[Callable[..., None], tuple[int, ...]]:
    """A function for arguments of these types, and which of them are tensors."""
    library, reason = load(source)
    if library is None:
        raise RuntimeError(f"{source.name}: {reason}")
    pointer = ctypes.c_void_p.in_dll(library, name).value
    assert pointer is not None
    tensors = tuple(i for i, kind in enumerate(kinds) if issubclass(kind, Tensor))
    types = {type(None): ctypes.c_void_p, float: ctypes.c_double}
    given = [
        ctypes.c_void_p if i in tensors else types.get(kind, ctypes.c_int64)
        for i, kind in enumerate(kinds)
    ]
    return ctypes.CFUNCTYPE(None, *given)(pointer), tensors
