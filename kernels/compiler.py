"""Compile one C++ file with the machine's own compiler, once, and load it with ctypes."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

FLAGS = ("-O3", "-march=native", "-fopenmp-simd", "-ffp-contract=fast", "-fno-math-errno", "-fPIC", "-shared", "-std=c++17")


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
        return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
    except OSError:
        return f"{platform.machine()} {platform.processor()}"


@functools.cache
def load(source: Path) -> tuple[ctypes.CDLL | None, str | None]:
    """Return the library compiled from ``source``, or None and the reason why there is none.

    The file name is a hash of source, flags, compiler and processor; it appears by rename, so that concurrent processes
    never load half a file.
    """
    compiler = next((c for c in (os.environ.get("CXX"), "c++", "g++", "clang++") if c and shutil.which(c)), None)
    if compiler is None:
        return None, "no C++ compiler (install g++)"
    try:
        version = subprocess.run([compiler, "--version"], capture_output=True, text=True, timeout=60, check=True).stdout
        key = hashlib.sha256("\0".join((source.read_text(), *FLAGS, version, _machine())).encode()).hexdigest()[:24]
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
                    return None, f"{compiler} failed: {(done.stderr.strip().splitlines() or ['no message'])[-1]}"
                temporary.chmod(0o755)
                temporary.replace(library)
            finally:
                temporary.unlink(missing_ok=True)
        return ctypes.CDLL(str(library)), None
    except (OSError, subprocess.SubprocessError) as error:
        return None, f"{compiler}: {error}"
