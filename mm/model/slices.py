"""Tensors that several processes wrote, each its own slices: which file has what, and ranges of it.

    index.json                                   shapes, dtypes and cuts; no place of a byte
    <name>.safetensors                           of one process
    <name>-00001-of-00004.safetensors, ...       of four

A cut is said once a tensor, not once a process: what process r holds follows from it, so the index
does not grow with their number.
"""

from __future__ import annotations

import json
import math
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mm.errors import Damaged, UserError
from mm.model.tensor_file import DTYPES
from mm.reading import parse_json

INDEX = "index.json"
OPEN = 16  # files that are open at once
KINDS = {name: dtype for dtype, name in DTYPES.items()}

_Count = Annotated[int, Field(ge=0, lt=2**53, strict=True)]


class Slice(NamedTuple):
    """Elements ``start : start + n`` of a flattened tensor, at ``at`` of a process's shard."""

    start: int
    at: int
    n: int


def slice_of(rank: int, numel: int, first: int, size: int, each: bool) -> Slice:
    """What ``rank`` holds of a flattened tensor that is cut as `Placed` says; n = 0: nothing."""
    start = rank * size if each else max(0, rank * size - first)
    stop = (rank + 1) * size - (0 if each else first)
    n = max(0, min(numel, stop) - start)
    return Slice(start, first + (0 if each else start - rank * size), n)


@dataclass(frozen=True)
class Placed:
    """Where the elements of a flattened tensor are.

    Whole with ``rank``, or cut: ``each`` process has a slice of ``size`` of it (ZeRO stage 3); else
    the concatenation of many tensors is cut into shards of ``size``, and ``first`` is this one's
    place in it (stages 1 and 2).
    """

    shape: tuple[int, ...]
    dtype: str  # as safetensors calls it
    rank: int | None = None
    first: int = 0
    size: int = 0
    each: bool = False

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def n_bytes(self) -> int:
        return self.numel * KINDS[self.dtype].itemsize

    def on(self, rank: int) -> Slice:
        """The slice that ``rank`` holds; n = 0 when it holds none."""
        if self.rank is not None:
            return Slice(0, 0, self.numel if rank == self.rank else 0)
        return slice_of(rank, self.numel, self.first, self.size, self.each)

    def holders(self, start: int, n: int) -> range:
        """Ranks that hold elements ``start : start + n``; n > 0."""
        if self.rank is not None:
            return range(self.rank, self.rank + 1)
        before = 0 if self.each else self.first
        return range((before + start) // self.size, (before + start + n - 1) // self.size + 1)

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        cut = {"first": self.first, "size": self.size, "each": self.each}
        where = cut if self.rank is None else {"rank": self.rank}
        return {"shape": list(self.shape), "dtype": self.dtype, **where}


def file_name(name: str, rank: int, world: int) -> str:
    """File with the tensors of ``rank``."""
    return f"{name}{f'-{rank + 1:05}-of-{world:05}' if world > 1 else ''}.safetensors"


def index_text(files: Mapping[str, Mapping[str, Placed]], world: int) -> str:
    """`index.json`."""
    table = {f: {n: p.to_dict() for n, p in placed.items()} for f, placed in files.items()}
    return json.dumps({"world": world, "files": table}, indent=1)


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid")

    shape: list[_Count]
    dtype: str
    rank: _Count | None = None
    first: _Count = 0
    size: _Count = 0
    each: bool = False

    def place(self, world: int) -> Placed:
        whole = self.rank is not None
        if self.dtype not in KINDS or (self.rank or 0) >= world:
            raise ValueError(f"no dtype {self.dtype[:20]}, or no process {self.rank}")
        place = Placed(tuple(self.shape), self.dtype, self.rank, self.first, self.size, self.each)
        if not whole and (self.size < 1 or self._end(place) > world * self.size):
            raise ValueError(f"{world} shards of {self.size} do not hold {place.numel}")
        return place

    def _end(self, place: Placed) -> int:
        return place.numel + (0 if self.each else self.first)


class _Index(BaseModel):
    model_config = ConfigDict(extra="forbid")

    world: Annotated[int, Field(ge=1, lt=2**20, strict=True)]
    files: dict[str, dict[str, _Entry]]


class Lazy(Mapping[str, Tensor]):
    """Tensors that are read when they are asked for.

    Args:
        shapes: of each by name.
        read: a tensor by its name.
        like: shapes, dtypes and ties (one object under several names) on the meta device, where
            they are known.
    """

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, ...]],
        read: Callable[[str], Tensor],
        like: Mapping[str, Tensor] | None = None,
    ):
        self.shapes, self._read, self.like = shapes, read, like

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.shapes:
            raise KeyError(name)
        return self._read(name)

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> Lazy:
        """These, with ``tensors`` beside them or in the place of those of their names."""
        shapes = {**self.shapes, **{name: tuple(t.shape) for name, t in tensors.items()}}
        like = self.like and {**self.like, **{n: t.detach().to("meta") for n, t in tensors.items()}}
        return Lazy(shapes, lambda n: tensors[n] if n in tensors else self._read(n), like)

    def __contains__(self, name: object) -> bool:  # the inherited one would read it
        return name in self.shapes

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def shapes_of(tensors: Mapping[str, Tensor]) -> Mapping[str, tuple[int, ...]]:
    """Shapes by name; nothing is read for them."""
    if isinstance(tensors, Lazy):
        return tensors.shapes
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


class Slices:
    """The tensors of a folder with an index; whole ones and ranges of them are read.

    Raises UserError where the index is none.

    Attributes:
        n_read: values read so far.
    """

    def __init__(self, folder: Path):
        self.folder, self.n_read = folder, 0
        self._open: OrderedDict[str, Any] = OrderedDict()
        try:
            found = _Index.model_validate(parse_json((folder / INDEX).read_bytes()))
            self.world = found.world
            self.files = {
                f: {n: entry.place(found.world) for n, entry in entries.items()}
                for f, entries in found.files.items()
            }
        except (OSError, ValidationError, ValueError) as error:
            why = str(error).splitlines()[0][:160]
            raise UserError(f"{folder / INDEX}: is no index of tensors ({why})") from error

    def paths(self, file: str) -> list[str]:
        """Names of the files that have some of ``file``, by process."""
        return [file_name(file, rank, self.world) for rank in sorted(self._ranks(file))]

    def _ranks(self, file: str) -> set[int]:
        placed = [p for p in self.files[file].values() if p.numel or p.rank is not None]
        return {r for p in placed for r in p.holders(0, p.numel)}

    def must_hold(self, path: str) -> dict[str, tuple[tuple[int, ...], str]] | None:
        """Shape and dtype of every tensor that a file must have; None: the index has no such file.

        A whole tensor has its shape, a slice is flat.
        """
        for file, table in self.files.items():
            for rank in range(self.world) if path.startswith(file) else ():
                if path != file_name(file, rank, self.world):
                    continue
                parts = {n: (p, p.on(rank).n) for n, p in table.items()}
                return {
                    n: (p.shape if k == p.numel else (k,), p.dtype)
                    for n, (p, k) in parts.items()
                    if k or p.rank == rank
                }
        return None

    def read(self, file: str, name: str, start: int = 0, n: int | None = None) -> Tensor:
        """Elements ``start : start + n`` of a flattened tensor, `(n,)`; default all.

        Only they are read. Raises UserError on a missing or damaged file, naming it.
        """
        placed = self.files[file][name]
        n = placed.numel - start if n is None else n
        if start < 0 or start + n > placed.numel:
            raise UserError(
                f"{self.folder}: '{name}' of {file} has {placed.numel} values, asked for are "
                f"{start} to {start + n}: it is another model's; use another run name: name=..."
            )
        out = torch.empty(n, dtype=KINDS[placed.dtype])
        for rank in placed.holders(start, n) if n else ():
            part = placed.on(rank)
            low, high = max(start, part.start), min(start + n, part.start + part.n)
            if low < high:
                path = file_name(file, rank, self.world)
                got = self._read(path, name, low - part.start, high - part.start, placed.dtype)
                out[low - start : high - start] = got
        self.n_read += n
        return out

    def tensors(self, file: str) -> Lazy:
        """Whole tensors of ``file`` by name; none when there is no such file."""
        table = self.files.get(file, {})
        shapes = {name: placed.shape for name, placed in table.items()}
        like = {
            name: torch.empty(placed.shape, dtype=KINDS[placed.dtype], device="meta")
            for name, placed in table.items()
        }
        return Lazy(shapes, lambda name: self.read(file, name).view(shapes[name]), like)

    def _read(self, path: str, name: str, low: int, high: int, dtype: str) -> Tensor:
        """Elements of a flattened tensor of one file."""
        try:
            file = self._file(path)
            part = file.get_slice(name)
            shape = part.get_shape()
            if part.get_dtype() != dtype or math.prod(shape) < high:
                raise ValueError(f"'{name}' is {part.get_dtype()} {shape}")
            if not shape:
                return file.get_tensor(name).reshape(1)
            row = math.prod(shape[1:])
            first = low // row
            return part[first : -(-high // row)].reshape(-1)[low - first * row : high - first * row]
        except (SafetensorError, OSError, ValueError) as error:
            raise Damaged(
                f"{self.folder / path}: missing or damaged ({str(error)[:160]}); copy it again, or "
                "remove its folder to go on from the checkpoint before it"
            ) from error

    def _file(self, path: str) -> Any:
        if path not in self._open:
            while len(self._open) >= OPEN:
                self._open.popitem(last=False)
            self._open[path] = safe_open(str(self.folder / path), framework="pt")
        self._open.move_to_end(path)
        return self._open[path]
