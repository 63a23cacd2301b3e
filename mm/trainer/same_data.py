"""The same data on all ranks, before the first step: machines may hold other copies of them."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from mm.config import Config
from mm.data.shards.manifest import read_manifest
from mm.data.streams.shuffle import key_of
from mm.errors import UserError
from mm.launch import environment
from mm.run import Run
from mm.vocabulary import Vocabulary


class Seen(NamedTuple):
    """What a rank has of a source: what must be the same on all, and where it lies there."""

    fingerprint: str
    place: str = ""


def found_here(run: Run, vocabulary: Vocabulary | None, first: int) -> dict[str, Seen]:
    """What this machine has of the data of a run, by key of its config.

    Of packed data from the manifests alone, so it costs a moment.

    Args:
        first: number of the first stage that will train.
    """
    found: dict[str, Seen] = {}
    if vocabulary is not None:
        found["vocabulary"] = Seen(vocabulary.fingerprint[:16], str(run.vocabulary))
    for number in range(first, len(run.stages)):
        for key, path in _sources(run.stages[number].data, f"stages.{number}.data"):
            try:
                splits = read_manifest(path)["splits"]
            except UserError:  # who builds the stream says why
                found[key] = Seen("no packed data", str(path))
                continue
            shards = {s: [shard["sha256"] for shard in splits[s]["shards"]] for s in splits}
            text = json.dumps(shards, sort_keys=True)
            found[key] = Seen(f"{key_of(text):016x}", str(path))
    return found


def of_plan(stream: Any) -> dict[str, Seen]:
    """What the order of a stream depends on, as this rank read it."""
    return {key: Seen(repr(value)) for key, value in getattr(stream, "plan", {}).items()}


def require_same(found: Mapping[str, Seen], device: torch.device) -> None:
    """Check that all ranks found the same, by key. Call on all ranks.

    Two numbers travel; what every rank found does where they differ.

    Raises:
        UserError: on all ranks, naming the first key that differs, two ranks and their machines.
    """
    me = environment.ranks()
    if me.world == 1:
        return
    number = key_of(sorted((key, seen.fingerprint) for key, seen in found.items())) >> 1
    ends = torch.tensor([number, -number], device=device)
    dist.all_reduce(ends, dist.ReduceOp.MAX)
    if int(ends[0]) == -int(ends[1]):
        return
    everyone: list[Any] = [None] * me.world
    dist.all_gather_object(everyone, (socket.gethostname(), dict(found)))
    none = Seen("nothing")
    for rank, (host, theirs) in enumerate(everyone):
        for key in [*everyone[0][1], *theirs]:
            ours = everyone[0][1].get(key, none), theirs.get(key, none)
            if ours[0].fingerprint == ours[1].fingerprint:
                continue
            say = [f"{seen.fingerprint}{seen.place and f' at {seen.place}'}" for seen in ours]
            raise UserError(
                f"{key}: the data are not the same on all machines: rank 0 on {everyone[0][0]} has "
                f"{say[0]}, rank {rank} on {host} has {say[1]}; copy them from one to the other"
            )


def _sources(value: Any, key: str) -> Iterator[tuple[str, str | Path]]:
    """Keys and places of packed data anywhere in a config."""
    if isinstance(value, Config):
        path = getattr(value, "path", None)
        if isinstance(path, (str, Path)):
            yield key, path
        for name in type(value).model_fields:
            yield from _sources(getattr(value, name), f"{key}.{name}")
    elif isinstance(value, (list, tuple)):
        for number, item in enumerate(value):
            yield from _sources(item, f"{key}.{number}")
