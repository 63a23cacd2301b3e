"""Which device a model is run on."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import torch

from mm.errors import UserError
from mm.launch import environment

log = logging.getLogger("mm")

BEST = "auto"


def choose_device(asked: str = BEST) -> torch.device:
    """The device that ``asked`` names: auto, cpu, cuda or cuda:N.

    "auto" is the best there is: this process's GPU, else the CPU, with one line where the machine
    has a GPU that cannot be used. "cuda" is this process's GPU, too.

    Raises UserError where it is not there.
    """
    if asked == BEST and not torch.cuda.is_available():
        warn_of_driver("running on the CPU")
        return torch.device("cpu")
    try:
        device = torch.device("cuda" if asked == BEST else asked)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device {asked}: auto, cpu, cuda or cuda:N")
    if device.type == "cpu":
        return device
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device.index is None:
        device = torch.device("cuda", environment.ranks().local_rank if count > 1 else 0)
    if device.index >= count:
        why = why_no_gpu() or f"torch sees {count} GPUs"
        raise UserError(f"--device {asked}: {why}; see: mm doctor")
    return device


def why_no_gpu() -> str | None:
    """Why PyTorch sees none of this machine's GPUs; None where it does or there is no driver."""
    driver = shutil.which("nvidia-smi") is not None or Path("/dev/nvidiactl").exists()
    if torch.cuda.is_available() or not driver:
        return None
    if not torch.version.cuda:
        return "this PyTorch is a CPU build"
    why = f"PyTorch was built for CUDA {torch.version.cuda}"
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        why += f" and says: {str(error).strip().splitlines()[0][:160]}"
    return why


def warn_of_driver(then: str) -> None:
    """Say once when the machine has a GPU that PyTorch cannot use. ``then``: what happens."""
    if why := why_no_gpu():
        log.warning(
            "this machine has an NVIDIA driver, but PyTorch sees no GPU (%s): %s; for more: "
            "mm doctor",
            why,
            then,
        )
