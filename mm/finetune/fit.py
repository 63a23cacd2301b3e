"""Which method fits this device, and for how many steps: `mm plan` of the config before it runs."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mm.config import override, validate
from mm.errors import UserError
from mm.finetune.choose import Said, keep_reasons
from mm.finetune.method import Method
from mm.init_from import with_saved_model
from mm.own_data.plan import Chosen, plain
from mm.plan.fit import propose
from mm.plan.gpus import find
from mm.plan.plan import Cluster, make_plan
from mm.run import Run
from mm.trainer.data_sheets import GPUS, Gpu, like
from mm.trainer.warm_start import resolve

LEAST_STEPS = 20
SHARE = 0.7  # of the minutes, for the steps: figures and starts take the rest


def this_device() -> Gpu:
    """The device that `mm train` would take, with the memory that it has."""
    import torch

    if not torch.cuda.is_available():
        return find("cpu")
    name = torch.cuda.get_device_name()
    memory = torch.cuda.get_device_properties(0).total_memory
    return dataclasses.replace(like(name) or GPUS["a100"], name=name, memory=memory)


def fit_device(
    methods: Sequence[Method],
    config_of: Callable[[Method], Said],
    minutes: float,
    changes: Sequence[str],
) -> tuple[dict[str, Any], list[Chosen]]:
    """The config of the first method that fits this device, and what to tell.

    Args:
        config_of: method -> its config.
        minutes: for all of it.
        changes: what the user set: it is not changed here.
    Raises:
        UserError: none fits, or a key that the user set is wrong.
    """
    cluster = Cluster(this_device(), 1, 1)
    why = ""
    for how in methods:
        config, a_pass = config_of(how)
        try:
            config, found = _fit(config, cluster)
        except UserError as error:
            if not str(error).startswith("nothing fits"):
                raise
            why = str(error)
            continue
        gb = found["memory_bytes"] / 1e9
        of = cluster.gpu.memory / 1e9
        notes = [
            Chosen("method", f"{how.name}: {how.why}"),
            Chosen("memory", f"{gb:.2g} of {of:.3g} GB ({cluster.gpu.name}), predicted"),
        ]
        config, time = _in_time(config, found["seconds"], a_pass, minutes, changes)
        return config, [*notes, time]
    raise UserError(f"{why}; or take a smaller base, or rows: stages.0.data.seq_len=256")


def _fit(config: dict[str, Any], cluster: Cluster) -> tuple[dict[str, Any], Mapping[str, Any]]:
    """The config as it fits, with the memory and the seconds of a step."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of libraries, about tensors without content
        run = run_of(config)
        plan = make_plan(run, cluster, longest=False, variants=False)
        if plan["fits"]:
            memory, seconds = plan["memory"]["total_bytes"], plan["step"]["seconds"]
            return config, {"memory_bytes": memory, "seconds": seconds}
        found = propose(run, cluster)
    chosen = found["chosen"]
    new = override(plain(config), found["overrides"])
    why = f"so that it fits {cluster.gpu.memory / 1e9:.3g} GB"
    tokens = plan["batch"]["tokens_a_row"] * chosen["rows_a_step"]
    seconds = tokens / chosen["tokens_per_second"]
    return _because(keep_reasons(config, new), why), {**chosen, "seconds": seconds}


def run_of(config: Mapping[str, Any]) -> Run:
    """The config as `mm train` would take it. Raises UserError."""
    run = validate(Run, with_saved_model(plain(config)), "mm finetune")
    return resolve(run)


def _because(node: Any, why: str) -> Any:
    """``node`` where what was changed says ``why`` it was."""
    if isinstance(node, Chosen):
        return Chosen(node.value, why) if node.why == "as you said" else node
    if isinstance(node, dict):
        return {key: _because(value, why) for key, value in node.items()}
    return [_because(value, why) for value in node] if isinstance(node, list) else node


def _in_time(
    config: dict[str, Any], step: float, a_pass: int, minutes: float, changes: Sequence[str]
) -> tuple[dict[str, Any], Chosen]:
    """Fewer steps where the minutes hold no more."""
    stage = config["stages"][0]
    steps = int(plain(stage["budget"]["steps"]))
    most = max(LEAST_STEPS, int(60 * minutes * SHARE / step))
    if most < steps and not any(word.startswith("stages.0.budget") for word in changes):
        steps = most
        passes = f"{steps / a_pass:.2g} passes" if a_pass < steps else "less than a pass"
        why = f"what {minutes:g} minutes hold at {step:.2g} s a step, {passes}: --minutes"
        stage = {**stage, "budget": {"steps": Chosen(steps, why)}}
        config = {**config, "stages": [stage, *config["stages"][1:]]}
    told = f"about {steps * step / 60:.2g} minutes of steps, predicted to a factor of 2.5"
    return config, Chosen("time", told)
