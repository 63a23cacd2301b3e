"""The tables that end a training: losses beside held-out ones and chance, speed, time by phase."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mm.cli.common import console, number, table

# Phases of the trainer as a reader calls them; the others are all "start".
PHASES = {
    "data": "waiting for data",
    "step": "steps",
    "held_out": "held-out losses",
    "report": "log and samples",
    "save": "checkpoints",
    "export": "saved model",
    "evaluate": "tasks",
}


def print_trained(title: str, result: Mapping[str, Any]) -> None:
    """Print what `Trainer.fit` returned, without its tasks."""
    summary = result.get("summary")
    if not summary:  # nothing was left to do
        console().print(f"{title}: all {number(result.get('step'))} steps were done before")
        return
    if rows := loss_rows(summary["means"], summary["held_out"]):
        unit = ", nats a token" if any("loss_chance" in k for k in summary["held_out"]) else ""
        columns = [f"loss{unit}", f"training, last {summary['steps']} steps"]
        columns += ["held-out", "chance"] if summary["held_out"] else []
        table(title, columns, [row[: len(columns)] for row in rows])
    table("", ("figure", "value"), figure_rows(result, summary["means"]))
    best = result.get("best")
    if best:
        step, value, *name = best
        what = name[0] if name else "held-out loss"
        console().print(f"best {what}: {number(value)} at step {step}")
    seconds: dict[str, float] = {}
    for phase, taken in summary["seconds"].items():
        name = PHASES.get(phase, "start")
        seconds[name] = seconds.get(name, 0.0) + taken
    spent = ", ".join(f"{name} {taken:.1f}" for name, taken in seconds.items() if taken >= 0.05)
    console().print(f"seconds: {spent}; {result['seconds']:.1f} in all")


def loss_rows(means: Mapping[str, float], held_out: Mapping[str, float]) -> list[list[str]]:
    """Name, mean in training, held out and by chance, of every loss and its bits per byte."""
    of_training = {k.removeprefix("loss/"): v for k, v in means.items() if k.startswith("loss/")}
    of_held_out = {
        k.removeprefix("val/").removesuffix("loss").rstrip("/") or "total": v
        for k, v in held_out.items()
        if k.endswith("/loss")
    }
    bits = {k.removeprefix("bits_per_byte/"): v for k, v in means.items() if "bits_per_byte/" in k}
    names = [n for n in dict.fromkeys([*of_training, *of_held_out]) if n != "total"]
    rows = []
    for name in [*names, "total"]:
        chance = held_out.get(f"val/{name}/loss_chance")
        title = "total, as weighted" if name == "total" else name
        rows.append([title, of_training.get(name), of_held_out.get(name), chance])
        key = f"val/{name}/bits_per_byte"
        if name in bits or key in held_out:
            found = [bits.get(name), held_out.get(key), held_out.get(f"{key}_chance")]
            rows.append([f"{name}, bits per byte", *found])
    return [[name, *(number(v) for v in values)] for name, *values in rows]


def figure_rows(result: Mapping[str, Any], means: Mapping[str, float]) -> list[tuple[str, str]]:
    """What else a reader wants, each with its unit; what does not apply is left out."""
    rows: list[tuple[str, str]] = []

    def add(name: str, key: str, unit: str = "", factor: float = 1.0) -> None:
        if key in means:
            rows.append((name, f"{number(factor * means[key])} {unit}".rstrip()))

    resumed = result["resumed_from"]
    done = f"{number(result['step'])}"
    rows.append(("steps", done + (f", {number(result['new_steps'])} of them now" * bool(resumed))))
    add("epochs", "data/epoch")
    for unit in ("tokens", "items"):
        add(f"{unit} seen", f"{unit}/seen")
        add("speed", f"perf/{unit}_per_second", f"{unit} a second")
    add("time of a step", "perf/step_seconds", "s")
    add("of it waiting for data", "data/wait_seconds", "s")
    add("padding", "data/padding_share", "%", 100)
    for key in means:
        if key.startswith("codebook") and key.endswith("/usage"):
            name = key.removeprefix("codebook").removesuffix("/usage").strip("/")
            add(f"codes in use {name}".rstrip(), key, "%", 100)
    add("gradient norm", "optim/grad_norm")
    for key, value in means.items():
        if key.startswith("data/rejects/") and value:
            rows.append((f"left out: {key.rpartition('/')[2]}", f"{number(int(value))} samples"))
    if means.get("skipped"):
        rows.append(("steps not applied", number(int(means["skipped"]))))
    return rows
