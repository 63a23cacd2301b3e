"""The arithmetic of the global batch: rows of a step, of a process, of a pass."""

from __future__ import annotations

from mm.errors import UserError
from mm.run import Run


def batch_arithmetic(run: Run, world: int) -> list[str]:
    """A line a stage: how the rows of one step fall on ``world`` processes.

    Raises UserError when they do not divide, with the numbers of processes that do.
    """
    lines, share = [], run.engine.sequence
    require_groups(world, share)
    world //= share  # groups of processes that have rows of their own
    groups = "processes" if share == 1 else f"groups of {share} processes"
    for i, stage in enumerate(run.stages):
        rows = getattr(stage.data, "batch_size", None)
        if rows is None:
            lines.append(f"stages.{i}: {stage.data.kind}: its rows are its own business")  # pyright: ignore[reportAttributeAccessIssue]
            continue
        if rows % world:
            fits = [n for n in range(1, rows + 1) if rows % n == 0]
            raise UserError(
                f"stages.{i}.data.batch_size: {rows} rows do not divide over {world} {groups}; "
                f"numbers of {groups} that do: {', '.join(map(str, fits))}; or say "
                f"stages.{i}.data.batch_size={-(-rows // world) * world}"
            )
        mine = rows // world
        micro = min(getattr(stage.data, "micro_batch_size", None) or mine, mine)
        passes = -(-mine // micro)
        length = getattr(stage.data, "seq_len", None)
        tokens = f", {rows} x {length} = {rows * length:,} tokens at most" if length else ""
        last = "" if mine % micro == 0 else f" (the last micro-batch has {mine % micro})"
        lines.append(
            f"stages.{i}: global batch = {micro} rows a micro-batch x {passes} accumulated x "
            f"{world} {groups} = {rows} rows a step{tokens}{last}"
        )
    return lines


def require_groups(world: int, share: int) -> None:
    """Check that ``world`` processes divide into groups of ``share`` that share rows.

    Raises:
        UserError: they do not; with the numbers of processes next to it that do and the command.
    """
    if world % share == 0:
        return
    below, above = world // share * share, -(-world // share) * share
    fits = " or ".join(str(n) for n in (below, above) if n)
    divisors = [n for n in range(1, world + 1) if world % n == 0]
    raise UserError(
        f"engine.sequence {share} does not divide {world} processes; start {fits}: torchrun "
        f"--nproc_per_node {above} -m mm train CONFIG; or set engine.sequence to one of {divisors}"
    )


def keep_micro_batches(run: Run, before: int, now: int) -> list[str]:
    """Overrides with which ``now`` processes take no more rows at a time than ``before`` did.

    The rows of a step stay, so fewer processes take more passes.
    """
    before, now = before // run.engine.sequence, now // run.engine.sequence
    out = []
    for i, stage in enumerate(run.stages):
        rows = getattr(stage.data, "batch_size", None)
        if rows is None or not hasattr(stage.data, "micro_batch_size") or now >= before:
            continue
        most = min(stage.data.micro_batch_size or rows // before, rows // before)  # pyright: ignore[reportAttributeAccessIssue]
        mine = rows // now
        micro = next(m for m in range(min(most, mine), 0, -1) if mine % m == 0)
        out.append(f"stages.{i}.data.micro_batch_size={micro}")
    return out
