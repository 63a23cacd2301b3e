"""What `mm launch local --rehearse N` prints."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from mm.cli.common import console, table
from mm.cli.plan import duration, size


def show(name: str, found: Mapping[str, Any]) -> None:
    """Print the figures of a rehearsal, and what they do not hold."""
    n = found["processes"]
    table(f"{name}: rank 0 of {n} over a fake process group", ("what", "is"), _rows(found), left=2)
    say = console().print
    say(
        "losses are not shown: a fake group sends nothing, so sums and gathered weights lack what "
        "the other ranks have"
    )
    say("not in the seconds of a step: communication, and waiting for slower ranks")
    if found["steps_not_applied"]:
        say(
            f"{found['steps_not_applied']} of {found['steps']} steps were not applied: gathered "
            "weights of a fake group gave no finite loss; memory is not touched by that"
        )
    if found["stages"] > 1:
        say(f"stages.0 was stepped; the others ({found['stages'] - 1}) were only checked")


def _rows(found: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, count in found["parameters"].items():
        yield f"parameters of '{name}'", count
    yield "device, precision", f"{found['device']}, {found['precision']}"
    if found["rows"]:
        yield "rows a step: rank 0, all", f"{found['rows']:,}, {found['rows_of_all']:,}"
    shapes = [
        ", ".join(f"{name} {' x '.join(map(str, shape))}" for name, shape in micro.items())
        for micro in found["shapes"]
    ]
    for shape in dict.fromkeys(shapes):
        yield "micro-batches of rank 0", f"{shapes.count(shape)} of {shape}"
    yield (
        "tokens a step: rank 0, all (about)",
        f"{found['tokens']:,.0f}, {found['tokens_of_all']:,.0f}",
    )
    yield "seconds a step", duration(found["step_seconds"])
    yield "of it, waiting for data", duration(found["data_seconds"])
    yield "peak memory: tensors", size(found["peak_tensor_bytes"])
    yield "peak memory: process", size(found["peak_resident_bytes"])
    if "peak_allocated_bytes" in found:
        told = found["peak_allocated_bytes"], found["peak_reserved_bytes"]
        yield "peak memory: GPU, allocated and reserved", ", ".join(map(size, told))
    for part, held in found["cut"].items():
        told = f"{size(held['rank'])} of {size(held['whole'])}"
        yield f"ZeRO stage {found['zero_stage']}: {part} of rank 0", told
    for kind, n in found["collectives"].items():
        yield f"{kind} a step, whole messages", size(n)
