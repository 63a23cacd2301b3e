"""`mm plan`: memory, communication and speed of a run on any number of devices, before it runs."""

from __future__ import annotations

import json as json_module
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.text import Text

from mm.cli.common import (
    PASS_OVERRIDES,
    Overrides,
    console,
    existing_config,
    flatten,
    overrides,
    plain,
    run_config,
    table,
    write_json,
)

app = typer.Typer()

MARK = "predicted, not measured"


@app.command(
    help="Predict what CONFIG takes: parameters, operations, memory, communication, time of a "
    "step, and what binds from one node to a thousand.\n\nNothing is trained and no memory is "
    "taken: the model runs on tensors without content. Every figure is a prediction, and its "
    "known error stands below.",
    context_settings=PASS_OVERRIDES,
)
def plan(
    config: Annotated[
        str, typer.Argument(metavar="CONFIG", help="Run YAML, as for mm train (or a run folder).")
    ],
    changes: Overrides = None,
    gpu: Annotated[
        str, typer.Option(help="a100, h100, h200, b200, l40s, rtx4090, or cpu: this machine's.")
    ] = "h100",
    nodes: Annotated[int, typer.Option(min=1, help="Machines.")] = 1,
    gpus_per_node: Annotated[
        int | None, typer.Option(min=1, help="Devices of a machine; default 8, cpu: 1.")
    ] = None,
    fit: Annotated[
        bool, typer.Option("--fit", help="Propose ZeRO stage, micro-batch and recomputation.")
    ] = False,
    stage: Annotated[int, typer.Option(min=0, help="Stage of the run.")] = 0,
    document: Annotated[
        int | None,
        typer.Option(min=1, metavar="TOKENS", help="Plan without data: length of every document."),
    ] = None,
    ids: Annotated[
        int, typer.Option(min=1, help="With --document: ids of the vocabulary.")
    ] = 32_000,
    longest: Annotated[bool, typer.Option(help="Also find the longest sequence that fits.")] = True,
    launches: Annotated[
        Literal["no", "eager", "compiled"],
        typer.Option(
            help="Kernels that a layer launches on a GPU; compiled, too: some seconds each."
        ),
    ] = "eager",
    json: Annotated[
        Path | None,
        typer.Option("--json", metavar="FILE", help="Also write all of it; - prints that alone."),
    ] = None,
) -> None:
    assignments = overrides(changes)
    path = run_config(Path(config)) if Path(config).is_dir() else existing_config(config)
    from mm.plan.fit import propose
    from mm.plan.gpus import find
    from mm.plan.inputs import Assumed
    from mm.plan.plan import Cluster, make_plan
    from mm.run import Run

    run = Run.load(path, assignments)
    device = find(gpu)
    cluster = Cluster(device, nodes, gpus_per_node or (1 if gpu == "cpu" else 8))
    assumed = Assumed(document, ids) if document else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of libraries, about tensors without content
        found = make_plan(
            run, cluster, index=stage, assumed=assumed, longest=longest,
            launches="no" if gpu == "cpu" else launches,
        )  # fmt: skip
        if fit:
            found["fit"] = propose(run, cluster, index=stage, assumed=assumed)
    if json == Path("-"):
        typer.echo(json_module.dumps(flatten(plain(found)), ensure_ascii=False))
        return
    show(found)
    write_json(json, flatten(plain(found)))


def size(n: float) -> str:
    """Bytes for people, decimal units as data sheets have them."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if abs(n) < 1000 or unit == "TB":
            return f"{n:.3g} {unit}" if unit != "B" else f"{int(n)} B"
        n /= 1000
    raise AssertionError("a terabyte ends the loop")


def count(n: float) -> str:
    """A large number for people."""
    for unit in ("", " k", " M", " G", " T", " P"):
        if abs(n) < 1000 or unit == " P":
            return f"{n:.3g}{unit}"
        n /= 1000
    raise AssertionError("a peta ends the loop")


def duration(seconds: float) -> str:
    """Seconds for people."""
    return f"{seconds:.3g} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"


def show(found: Mapping[str, Any]) -> None:
    """Print a plan in 80 columns."""
    gpu, batch = found["gpu"], found["batch"]
    say = console().print
    say(
        Text(
            f"{found['config']}: {count(found['parameters']['total'])} parameters on "
            f"{found['gpus']} x {gpu['name']}, ZeRO stage {found['zero_stage']}, "
            f"{found['precision']} ({MARK})"
        )
    )
    say(
        Text(
            f"{batch['rows']} x {batch['tokens_a_row']} tokens a micro-batch, "
            f"{batch['micro_batches']} a step and device, {batch['rows_a_step']:,} rows a step; "
            f"documents of {batch['mean_document']:.0f} tokens"
            + (" (assumed)" if batch["assumed"] else "")
        )
    )
    if batch["note"]:
        say(Text(f"note: {batch['note']}"))
    _parts(found)
    _memory(found)
    _time(found)
    for layer in found.get("launches_a_layer", ()):
        again = f", {n} compiled" if (n := layer.get("compiled")) is not None else ""
        say(Text(f"launches a layer, {layer['layer']}: {layer['eager']} eager{again}"))
    _nodes(found)
    if longest := found.get("longest_sequence"):
        say(Text(f"longest document that fits, one row a device: {longest['tokens']:,} tokens"))
    if state := found.get("state_bytes_a_sequence"):
        say(Text(f"state of one sequence of {batch['tokens_a_row']} tokens: {size(state)}"))
    if "fit" in found:
        _fit(found["fit"])
    if found["without_formula"]:
        say(Text(f"not counted, no formula: {', '.join(found['without_formula'])}"))
    for name in ("memory", "collectives", "cpu" if gpu["measured"] else "speed"):
        say(Text(f"known error of {name}: {found['errors'][name]}"))
    say(Text(f"rates: {gpu['source']}"))
    if "offload" in found["step"]["by_part"]:
        say(Text(f"rates of the host: {found['rates_of_host']}"))


def _parts(found: Mapping[str, Any]) -> None:
    flops, by = found["flops_a_token"], found["parameters"]["by_part"]
    ahead, back = flops["forward_by_part"], flops["backward_by_part"]
    rows = [
        (part, count(by.get(part, 0)), count(ahead.get(part, 0)), count(back.get(part, 0)))
        for part in dict.fromkeys([*by, *ahead, *back])
    ]
    rows.append(("all", count(sum(by.values())), count(flops["forward"]), count(flops["backward"])))
    table("Parameters, and operations a token", ("part", "parameters", "forward", "backward"), rows)


def _memory(found: Mapping[str, Any]) -> None:
    held = found["memory"]
    rows = [(part, size(n)) for part, n in held["by_part"].items() if n]
    rows += [("tensors, together", size(held["total_bytes"]))]
    rows += [("allocator, CUDA (assumed)", size(held["reserve_bytes"]))]
    rows += [("the device has", size(held["device_bytes"]))]
    rows += [("fits", "yes" if found["fits"] else "NO")]
    for place in ("host", "disk"):
        rows += [(f"{place}: {part}", size(n)) for part, n in held[f"{place}_by_part"].items()]
        if n := held[f"{place}_bytes_a_node"]:
            rows += [(f"{place} of a node, together", size(n))]
    table(f"Memory a device, most of it in: {held['peak_in']}", ("what", "bytes"), rows)
    if found["recompute"]:
        table(
            "Recomputation",
            ("recompute", "activations", "memory", "fits", "again a token"),
            [
                (
                    r["mode"] + (" (chosen)" if r["chosen"] else ""),
                    size(r["activation_bytes"]),
                    size(r["memory_bytes"]),
                    "yes" if r["fits"] else "NO",
                    count(r["flops_made_again"]),
                )
                for r in found["recompute"]
            ],
        )


def _time(found: Mapping[str, Any]) -> None:
    step = found["step"]
    rows = [
        (part, duration(s), f"{s / step['seconds']:.0%}") for part, s in step["by_part"].items()
    ]
    rows += [("step", duration(step["seconds"]), f"MFU {step['mfu']:.1%}")]
    if hidden := step["network_hidden_seconds"]:
        rows += [("network beside all this", duration(hidden), "hidden")]
    rows += [
        (f"{name} a step", size(n), "whole messages") for name, n in found["collectives"].items()
    ]
    table(f"A step; {step['binds']} binds", ("what", "takes", "share"), rows)


def _nodes(found: Mapping[str, Any]) -> None:
    rows = [
        (
            r["gpus"],
            count(r["rows_a_step"]),
            size(r["memory_bytes"]) + ("" if r["fits"] else " NO"),
            duration(r["seconds"]),
            count(r["tokens_per_second"]),
            f"{r['mfu']:.1%}",
            r["binds"],
        )
        for r in found["by_nodes"]
    ]
    columns = ("devices", "rows", "memory", "step", "tokens/s", "MFU", "binds")
    table("More devices, at least one micro-batch each", columns, rows, left=0)


def _fit(fit: Mapping[str, Any]) -> None:
    rows = [
        (
            t["zero_stage"],
            t["recompute"] or "–",
            t["rows"],
            size(t["memory_bytes"]) + ("" if t["fits"] else " NO"),
            count(t["tokens_per_second"]),
            f"{t['mfu']:.1%}",
        )
        for t in fit["tried"]
    ]
    columns = ("stage", "recompute", "rows", "memory", "tokens/s", "MFU")
    table("What fits: the best number of rows of each", columns, rows, left=2)
    console().print(Text("proposed: " + " ".join(fit["overrides"])))
