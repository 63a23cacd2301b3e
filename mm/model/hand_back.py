"""Statistics of a step on their way back to the modules that reported them."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from mm.batch import Sum


def hand_back(root: nn.Module, stats: Mapping[str, Sum]) -> None:
    """Call `after_step` of every module that reported statistics, with its own by short name.

    Args:
        root: the network that `name_layers` named.
        stats: by qualified name, as `Layer.report` made them, summed over micro-batches and ranks.
    """
    own: dict[str, dict[str, Sum]] = {}
    for key, value in stats.items():
        path, _, name = key.rpartition(".")
        own.setdefault(path, {})[name] = value
    for name, module in root.named_modules():
        after = getattr(module, "after_step", None)
        if name in own and name and callable(after):
            after(own[name])
