"""Which variables of the environment travel to the nodes, and which are never shown."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping

from mm.launch.environment import prepare

PREFIXES = ("WANDB_", "NCCL_", "GLOO_", "HF_", "TORCH_", "CUDA_", "OMP_", "MM_")
# They are what the launcher itself decides for each node.
OWN = ("CUDA_VISIBLE_DEVICES",)
_SECRET = re.compile(r"KEY|TOKEN|SECRET|PASSW|CREDENTIAL", re.IGNORECASE)


def is_secret(name: str) -> bool:
    """True for a variable whose value is shown to nobody and written nowhere."""
    return _SECRET.search(name) is not None


def variables_to_forward(
    extra: Iterable[str] = (), environ: Mapping[str, str] | None = None
) -> dict[str, str]:
    """Variables of this process that travel: those of `PREFIXES`, and of ``extra`` prefixes."""
    environ = os.environ if environ is None else environ
    prefixes, defaults = (*PREFIXES, *extra), {}
    prepare(defaults)  # what this process has set for itself; each node does so, too
    found = {
        name: value
        for name, value in environ.items()
        if name.startswith(prefixes) and name not in OWN and defaults.get(name) != value
    }
    return dict(sorted(found.items()))


def public(variables: Mapping[str, str]) -> dict[str, str]:
    """Those that may be written into a file."""
    return {name: value for name, value in variables.items() if not is_secret(name)}


def secrets(variables: Mapping[str, str]) -> dict[str, str]:
    """Those that may not."""
    return {name: value for name, value in variables.items() if is_secret(name)}


def mask_secrets(variables: Mapping[str, str]) -> dict[str, str]:
    """As they are printed: of a secret only that it is set."""
    return {name: "***" if is_secret(name) else value for name, value in variables.items()}
