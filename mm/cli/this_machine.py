"""What this machine offers and which kernels it would run; what is wrong comes with its mend.

Every check stands alone: a missing or broken package is a row of the table, never the end of it.
"""

from __future__ import annotations

import importlib
import importlib.metadata as metadata
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from mm.launch.environment import cores, cpu_has_bf16

GIB = 1024**3


class Finding(NamedTuple):
    """One row: ``mend`` is the command or key that mends it, empty when it is fine."""

    check: str
    found: str
    light: str = "ok"  # ok, warning (works, but worse), broken (something will fail)
    mend: str = ""


def examine() -> Iterator[Finding]:
    """Run all checks; one that fails itself becomes a finding."""
    for check in (
        _python,
        _packages,
        _torch,
        _links,
        _tools,
        _cpu,
        _memory,
        _disk,
        _threads,
        _wandb,
        _kernels,
    ):
        try:
            yield from check()
        except Exception as error:  # the doctor must outlive every disease
            yield Finding(
                check.__name__.strip("_"),
                f"{type(error).__name__}: {error}",
                "broken",
                "mm --debug doctor",
            )


def _python() -> Iterator[Finding]:
    ok = sys.version_info >= (3, 11)
    yield Finding(
        "python",
        f"{platform.python_version()} ({sys.prefix})",
        "ok" if ok else "broken",
        "" if ok else "install Python 3.11 or newer",
    )


def _packages() -> Iterator[Finding]:
    """Every dependency that pyproject.toml declares: present, and inside its range."""
    try:
        from packaging.requirements import Requirement

        requirements = [Requirement(text) for text in metadata.requires("mm-stack") or ()]
    except (ImportError, metadata.PackageNotFoundError) as error:
        yield Finding("packages", str(error), "broken", "pip install -e .")
        return
    fine = []
    for need in requirements:
        if need.marker is not None and not need.marker.evaluate({"extra": ""}):
            continue
        try:
            version = metadata.version(need.name)
        except metadata.PackageNotFoundError:
            yield Finding(need.name, "missing", "broken", f'pip install "{need}"')
            continue
        # A local label such as +cpu is no other version.
        if need.specifier.contains(version.split("+")[0], prereleases=True):
            fine.append(f"{need.name} {version}")
        else:
            yield Finding(
                need.name, f"{version}, needed {need.specifier}", "broken", f'pip install "{need}"'
            )
    yield Finding("packages", ", ".join(fine))
    place = importlib.util.find_spec("tokenizers")
    if place is not None and place.origin and not _installed(place.origin):
        yield Finding(
            "import path",
            f"'import tokenizers' finds {place.origin}",
            "broken",
            "unset PYTHONPATH, or start python outside the repository: its folder must not "
            "hide Hugging Face's package",
        )


def _installed(origin: str) -> bool:
    return "site-packages" in origin or "dist-packages" in origin


def _torch() -> Iterator[Finding]:
    try:
        import torch
    except Exception as error:  # a broken binary raises OSError, a half-installed one anything
        yield Finding(
            "torch",
            f"{type(error).__name__}: {error}",
            "broken",
            "pip install --force-reinstall torch",
        )
        return
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU build"
    yield Finding("torch", f"{torch.__version__} ({build}), {torch.get_num_threads()} threads")
    if torch.cuda.is_available():
        from mm.kernels import device

        cards = range(torch.cuda.device_count())
        abilities = [device.capability(i) or 0 for i in cards]
        told = [
            f"{torch.cuda.get_device_name(i)} (compute capability {n // 10}.{n % 10})"
            for i, n in zip(cards, abilities, strict=True)
        ]
        old = any(n < device.OLDEST for n in abilities)
        yield Finding(
            "accelerator",
            ", ".join(told),
            "warning" if old else "ok",
            "Triton kernels and bf16 need 8.0 (A100, RTX 30): on an older card PyTorch's own "
            "operators run, in fp32"
            if old
            else "",
        )
    else:
        driver = shutil.which("nvidia-smi") is not None
        yield Finding(
            "accelerator",
            "none, training runs on the CPU",
            "warning" if driver else "ok",
            "nvidia-smi is here but torch sees no GPU: check the driver's CUDA version with "
            "nvidia-smi"
            if driver
            else "",
        )


def _links() -> Iterator[Finding]:
    """The folders that the package reaches by links; an archive or Windows may have lost them."""
    package = Path(__file__).resolve().parents[1]
    lost = [
        name
        for name in ("tokenizers", "data", "kernels", "launch", "configs")
        if not (package / name).is_dir()
    ]
    if lost:
        yield Finding(
            "package",
            f"mm/{', mm/'.join(lost)} lost",
            "broken",
            "git config core.symlinks true && git checkout -- mm",
        )
    else:
        yield Finding("package", str(package))


def _tools() -> Iterator[Finding]:
    compiler = next(
        (c for c in (os.environ.get("CXX"), "c++", "g++", "clang++") if c and shutil.which(c)), None
    )
    if compiler is None:
        yield Finding(
            "C++ compiler",
            "none: kernels run as plain PyTorch, slower",
            "warning",
            "apt-get install -y g++",
        )
    else:
        said = subprocess.run(
            [compiler, "--version"], capture_output=True, text=True, timeout=20
        ).stdout
        yield Finding("C++ compiler", said.splitlines()[0] if said else compiler)
    for tool, why in (
        ("git", "the commit of a run is not recorded"),
        ("make", "make quickstart and make test need it"),
    ):
        if shutil.which(tool) is None:
            yield Finding(tool, f"none: {why}", "warning", f"apt-get install -y {tool}")


def _cpu() -> Iterator[Finding]:
    text = _read("/proc/cpuinfo")
    name = re.search(r"model name\s*:\s*(.+)", text)
    flags = set((re.search(r"(?:flags|Features)\s*:\s*(.+)", text) or ["", ""])[1].split())
    known = [
        f
        for f in ("avx2", "fma", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "sve", "bf16")
        if f in flags
    ]
    yield Finding(
        "CPU",
        f"{name[1] if name else platform.processor() or platform.machine()}: "
        f"{' '.join(known) or 'no known vector flags'}",
    )
    quota, _, period = _read("/sys/fs/cgroup/cpu.max").strip().partition(" ")
    limit = (
        f", limited to {int(quota) / int(period):.1f} by the container"
        if quota.isdigit() and period.isdigit()
        else ""
    )
    yield Finding("cores", f"{cores()} usable of {os.cpu_count()}{limit}")
    yield Finding(
        "precision",
        "auto takes bf16: the CPU multiplies it in hardware"
        if cpu_has_bf16()
        else "auto takes fp32 on this CPU",
    )


def _memory() -> Iterator[Finding]:
    fields = dict(re.findall(r"(\w+):\s+(\d+) kB", _read("/proc/meminfo")))
    if "MemTotal" not in fields:
        return
    total, free = (int(fields.get(k, 0)) * 1024 / GIB for k in ("MemTotal", "MemAvailable"))
    cap = _read("/sys/fs/cgroup/memory.max").strip()
    if cap.isdigit():
        total = min(total, int(cap) / GIB)
    low = min(total, free) < 3
    yield Finding(
        "memory",
        f"{total:.1f} GiB, {free:.1f} GiB available",
        "warning" if low else "ok",
        "the quickstart wants about 3 GiB: close other programs, or train with "
        "stages.0.data.micro_batch_size=1"
        if low
        else "",
    )
    if Path("/dev/shm").is_dir():
        shared = shutil.disk_usage("/dev/shm").total / GIB
        if shared < 0.06:
            yield Finding(
                "shared memory",
                f"{shared:.2f} GiB",
                "warning",
                "start the container with --shm-size=1g: several processes need it",
            )


def _disk() -> Iterator[Finding]:
    free = shutil.disk_usage(Path.cwd()).free / GIB
    yield Finding(
        "disk",
        f"{free:.1f} GiB free here",
        "ok" if free > 2 else "warning",
        ""
        if free > 2
        else "free some space: checkpoints are written whole before the old one goes",
    )


def _threads() -> Iterator[Finding]:
    names = (
        "OMP_NUM_THREADS",
        "OMP_WAIT_POLICY",
        "GOMP_SPINCOUNT",
        "MKL_NUM_THREADS",
        "TORCH_EXTENSIONS_DIR",
    )
    said = ", ".join(f"{name}={os.environ[name]}" for name in names if name in os.environ)
    active = os.environ.get("OMP_WAIT_POLICY", "").upper() == "ACTIVE"
    yield Finding(
        "threads",
        said or "no settings",
        "warning" if active else "ok",
        "unset OMP_WAIT_POLICY: spinning threads slow a shared machine down" if active else "",
    )
    asked = os.environ.get("OMP_NUM_THREADS", "")
    if asked.isdigit() and int(asked) > cores():
        yield Finding(
            "OMP_NUM_THREADS",
            f"{asked} on {cores()} cores",
            "warning",
            f"export OMP_NUM_THREADS={cores()}",
        )


def _wandb() -> Iterator[Finding]:
    mode = os.environ.get("WANDB_MODE")
    signed_in = bool(os.environ.get("WANDB_API_KEY"))
    yield Finding(
        "W&B",
        f"WANDB_MODE={mode}"
        if mode
        else "a key is set: online unless the config says otherwise"
        if signed_in
        else "no key set: runs are kept offline",
    )


def _kernels() -> Iterator[Finding]:
    """The implementation of every Op that a small float32 call takes, and why not the others.

    On the GPU if there is one.
    """
    package = Path(__file__).resolve().parents[1] / "kernels"
    for folder in sorted(p for p in package.iterdir() if (p / "__init__.py").is_file()):
        try:
            importlib.import_module(f"mm.kernels.{folder.name}")
        except Exception as error:
            yield Finding(
                f"kernel {folder.name}",
                f"{type(error).__name__}: {error}",
                "broken",
                f"MM_{folder.name.upper()}=reference mm ...",
            )
    from mm.kernels.op import Op

    examples = _examples()
    for name, op in sorted(Op.every.items()):
        example = examples.get(name)
        if example is None:
            yield Finding(f"kernel {name}", f"has {', '.join(op.implementations)}")
            continue
        args, kw = example()
        chosen = op.pick(*args, **kw)
        others = {n: why(*args, **kw) for n, (_, why) in op.implementations.items() if n != chosen}
        reasons = "; ".join(f"{n}: {reason}" for n, reason in others.items() if reason)
        yield Finding(f"kernel {name}", chosen + (f" ({reasons})" if reasons else ""))


def _examples() -> dict[str, Callable[[], tuple[tuple[Any, ...], dict[str, Any]]]]:
    """A small call of every Op that ships."""
    import torch

    from mm.kernels.attention.spec import MaskSpec

    device = "cuda" if torch.cuda.is_available() else "cpu"
    new = lambda *shape: torch.zeros(*shape, device=device)
    return {
        "attention": lambda: (
            (new(1, 8, 2, 16), new(1, 8, 1, 16), new(1, 8, 1, 16)),
            {"mask": MaskSpec(causal=True)},
        ),
        "rms_norm": lambda: ((new(2, 8, 32), new(32)), {}),
        "linear_scan": lambda: ((new(1, 8, 16), new(1, 8, 16)), {}),
        "linear_cross_entropy": lambda: ((new(8, 16), new(32, 16), new(8).long()), {}),
    }


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""
