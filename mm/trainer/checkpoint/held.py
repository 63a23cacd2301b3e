"""What this process holds of a checkpoint's tensors: its own slices, and where all others are.

Nothing is gathered and nothing copied: a slice is a view of what trains. The places follow from
how ZeRO cuts, so every process knows those of all.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mm.model.slices import Placed
from mm.model.tensor_file import DTYPES
from mm.trainer.engine.deepspeed import Engine
from mm.trainer.engine.on_disk import slice_in_memory
from mm.trainer.engine.zero_shards import Shards, Span


class Held(NamedTuple):
    """A tensor of a checkpoint.

    Attributes:
        placed: where its elements are.
        mine: those of this process, whole in its shape or flat; None: it has none.
        steady: nothing but an optimizer's step changes them.
    """

    placed: Placed
    mine: Tensor | None
    steady: bool = False


Files = Mapping[str, Mapping[str, Held]]
NONE: Mapping[str, Tensor] = {}
UNCUT = 2**20  # bytes of a tensor that one process writes: a slice is an entry of many files
UNEVEN = 1 / 8  # of an even share: a tensor that is more is cut
ANY = -1  # rank of what all processes have alike: `spread` says who writes it


def whole(tensor: Tensor, rank: int = ANY, me: int | None = None) -> Held:
    """All of a tensor, which ``rank`` writes; ``me``: this process, where only that one has it."""
    tensor = tensor.detach()
    place = Placed(tuple(tensor.shape), DTYPES[tensor.dtype], rank)
    return Held(place, tensor if me in (None, rank) else None)


def place_of(span: Span, dtype: torch.dtype) -> Placed:
    """Where the slices of a parameter, or of a state that is like it, are."""
    return Placed(tuple(span.shape), DTYPES[dtype], None, span.first, span.size, span.each)


def cut(shards: Shards, value: Tensor, span: Span) -> Held:
    """This rank's slice of one parameter in ``value``, which is like its shard."""
    place, part = place_of(span, value.dtype), span.on(shards.rank)
    return Held(place, _view(value.detach().reshape(-1)[part.at : part.at + part.n], place))


def _view(flat: Tensor, place: Placed) -> Tensor | None:
    if not flat.numel():
        return None
    return flat.view(place.shape) if flat.numel() == place.numel else flat


def masters(engine: Engine) -> dict[str, Held]:
    """fp32 parameters and persistent buffers of a network, by their names."""
    shards = engine.shards
    replicated = engine.zero_stage == 0
    out: dict[str, Held] = {}
    for x, spans in shards.spans.items():
        with engine.in_memory(x) as borrowed:
            mine = x.detach().clone() if borrowed else x
        for span in spans:
            held = whole(mine) if replicated else cut(shards, mine, span)
            out[span.name] = held._replace(steady=True)
    return out | still(engine.raw, engine.frozen, out)


def still(
    module: nn.Module, kept: Mapping[str, Tensor] = NONE, others: Collection[str] = ()
) -> dict[str, Held]:
    """Parameters that do not train and persistent buffers of a network, whole or cut.

    Args:
        kept: fp32 of those that are bf16 in the network.
        others: names of parameters that are left out.
    """
    names = {name: p for name, p in module.named_parameters() if name not in others}
    out = {name: _still(p, kept.get(name)) for name, p in names.items()}
    lasting = module.state_dict(keep_vars=True).keys()  # without the non-persistent buffers
    return out | {n: whole(b) for n, b in module.named_buffers() if n in lasting}


def _still(p: nn.Parameter, kept: Tensor | None) -> Held:
    if not hasattr(p, "ds_tensor"):
        return whole(p if kept is None else kept)
    with slice_in_memory(p) as borrowed:
        part: Tensor = p.ds_tensor if kept is None else kept  # type: ignore[attr-defined]
        part = part.clone() if borrowed and kept is None else part
    size, shape = p.partition_numel(), tuple(p.ds_shape)  # type: ignore[attr-defined]
    place = Placed(shape, DTYPES[part.dtype], None, 0, size, True)
    return Held(place, _view(part.detach().reshape(-1)[: place.on(dist.get_rank()).n], place))


def states(engine: Engine) -> tuple[dict[str, Held], dict[str, float]]:
    """Elementwise optimizer states as ``key/parameter name``, the EMA among them; scalar ones."""
    shards = engine.shards
    listed = getattr(engine.base, "per_parameter", ())
    tensors: dict[str, Held] = {}
    scalars: dict[str, float] = {}
    for x, spans in shards.spans.items():
        with engine.in_memory(x) as borrowed:
            found, shape = engine.states(x), x.shape
            if borrowed:
                found = {k: v.clone() if isinstance(v, Tensor) else v for k, v in found.items()}
        for key, value in found.items():
            if not isinstance(value, Tensor) or value.dim() == 0:
                scalars[key] = float(value)
                continue
            for i, span in enumerate(spans):
                if key in listed:
                    held = whole(value[i])
                elif engine.zero_stage == 0 or value.shape != shape:
                    held = whole(value)
                else:
                    held = cut(shards, value, span)
                tensors[f"{key}/{span.name}"] = held._replace(steady=True)
    if engine.ema is not None:
        scalars["ema_updates"] = engine.updates
    return tensors, scalars


def spread(files: Mapping[str, Mapping[str, Held]], rank: int, world: int) -> Files:
    """Give what all processes have alike to one of them each, the largest first, evenly.

    Large tensors are cut first, one after the other, as stages 1 and 2 cut theirs. The same on
    every process, which keeps only what it writes.
    """
    alike = {(f, n): h for f, table in files.items() for n, h in table.items() if _is_any(h)}
    size = lambda key: alike[key].placed.n_bytes
    large = _cut_large(alike, world)
    loads = [0] * world
    for place in large.values():
        for to in place.holders(0, place.numel):
            loads[to] += place.on(to).n * place.n_bytes // place.numel
    owner: dict[tuple[str, str], int] = {}
    for key in sorted(alike.keys() - large.keys(), key=lambda key: (-size(key), key)):
        owner[key] = loads.index(min(loads))
        loads[owner[key]] += size(key)

    def given(file: str, name: str, held: Held) -> Held:
        if not _is_any(held):
            return held
        if (place := large.get((file, name))) is not None:
            part = place.on(rank)
            flat = None if held.mine is None else held.mine.reshape(-1)
            mine = None if flat is None else flat[part.start : part.start + part.n]
            return held._replace(placed=place, mine=None if mine is None else _view(mine, place))
        to, was = owner[file, name], held.placed
        place = Placed(was.shape, was.dtype, to)
        return held._replace(placed=place, mine=held.mine if to == rank else None)

    return {f: {n: given(f, n, h) for n, h in table.items()} for f, table in files.items()}


def _cut_large(alike: Mapping[tuple[str, str], Held], world: int) -> dict[tuple[str, str], Placed]:
    """Where the slices of tensors are that would make the shares of processes uneven."""
    share = sum(held.placed.n_bytes for held in alike.values()) / world
    most = max(UNCUT, UNEVEN * share) if world > 1 else float("inf")
    large = [
        key
        for key, held in sorted(alike.items())
        if held.placed.n_bytes > most and (held.mine is None or held.mine.is_contiguous())
    ]
    out: dict[tuple[str, str], Placed] = {}
    for dtype in {alike[key].placed.dtype: None for key in large}:
        keys = [key for key in large if alike[key].placed.dtype == dtype]
        length = -(-sum(alike[key].placed.numel for key in keys) // world)
        first = 0
        for key in keys:
            was = alike[key].placed
            out[key] = Placed(was.shape, dtype, None, first, length)
            first += was.numel
    return out


def _is_any(held: Held) -> bool:
    return held.placed.rank == ANY


def mine(files: Files) -> Iterator[tuple[str, str, Tensor]]:
    """File, name and elements of what this process writes."""
    for file, table in files.items():
        for name, held in table.items():
            if held.mine is not None:
                yield file, name, held.mine


class Copies:
    """Host memory for what a process writes while it trains on; kept from save to save."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, str], Tensor] = {}

    def of(self, files: Files) -> tuple[dict[str, dict[str, Held]], Callable[[], None]]:
        """``files`` with copies on the host in place of what trains.

        Returns:
            The copies, and what fills those of `Held.steady`: any thread may call it while the next
            step runs forward and backward; the optimizer's step waits for it. It raises
            RuntimeError where something else changed them.
        """
        old, self._buffers = self._buffers, {}
        out = {file: dict(table) for file, table in files.items()}
        now: list[tuple[Tensor, Tensor]] = []
        later: list[tuple[Tensor, Tensor]] = []
        for file, name, tensor in mine(files):
            buffer = old.get((file, name))
            if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
                buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            held = files[file][name]
            (later if held.steady else now).append((buffer, tensor))
            self._buffers[file, name] = buffer
            out[file][name] = held._replace(mine=buffer)
        fill(now)
        versions = [tensor._version for _, tensor in later]
        stream = torch.cuda.Stream() if any(t.is_cuda for _, t in later) else None
        if stream is not None:  # what it copies is made on the stream that trains
            stream.wait_stream(torch.cuda.current_stream())

        def finish() -> None:
            with torch.cuda.stream(stream):
                fill(later)
            if versions != [tensor._version for _, tensor in later]:
                raise RuntimeError("weights or optimizer states were changed outside a step")

        return out, finish


def fill(pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Copy each (buffer on the host, tensor), and wait for it.

    In one call: a thread that asks for the interpreter's lock once a tensor waits for it as often.
    """
    for on_device in (False, True):
        some = [pair for pair in pairs if pair[1].is_cuda is on_device]
        if some:
            buffers, tensors = ([*each] for each in zip(*some, strict=True))
            copy = torch._foreach_copy_  # pyright: ignore[reportPrivateImportUsage]
            copy(buffers, tensors, non_blocking=on_device)
            if on_device:
                torch.cuda.current_stream().synchronize()
