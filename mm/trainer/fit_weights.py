"""Trained tensors and a network that they were not made for: what is taken, new and left."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mm.init_from import InitFrom
from mm.model.layer import Linear
from mm.model.slices import Lazy, shapes_of
from mm.model.start_state import StartState
from mm.vocabulary import RESERVED, Vocabulary

SHOWN = 3  # names that a line tells of each kind


@dataclass
class Fitted:
    """What became of every tensor.

    Attributes:
        taken: names of tensors that the network begins with.
        partial: those of which only some rows were taken, with how many.
        new: names that begin fresh.
        left: names of the folder that nothing takes.
    """

    taken: list[str] = field(default_factory=list)
    partial: dict[str, str] = field(default_factory=dict)
    new: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {"taken": self.taken, "partial": self.partial, "new": self.new, "left": self.left}


class Rows(NamedTuple):
    """Rows of a table of ids that go into another one.

    Attributes:
        tensor: the table that has them.
        rows: places there and here.
    """

    tensor: Tensor
    rows: Sequence[tuple[slice, slice]]

    def put(self, into: Tensor) -> None:
        """Copy them."""
        for there, here in self.rows:
            into[here] = self.tensor[there].to(into)


def fit_weights(
    module: nn.Module,
    weights: Mapping[str, Tensor],
    asked: InitFrom,
    rows: Sequence[tuple[slice, slice]] | None,
    sizes: tuple[int, int],
) -> tuple[Lazy, Fitted, dict[str, list[str]]]:
    """The tensors of ``weights`` as ``module`` takes them, those that begin fresh left out.

    Args:
        module: built, perhaps on the meta device: none of its values is read.
        weights: by name, as another network had them.
        asked: what need not fit.
        rows: of a table with a row an id: places there and here; None: both vocabularies are one.
        sizes: ids of the vocabulary there and here.
    Returns:
        The tensors, each read when it is asked for, `Rows` of some; what became of each, and names
        of what is not allowed, by its key.
    """
    own, first = module.state_dict(), _first_names(module)
    added = set(adapters(module))  # an adapter changes nothing as it begins
    shapes, sources = shapes_of(weights), dict[str, str]()
    out: dict[str, tuple[int, ...]] = {}
    told = Fitted()
    mismatched: list[str] = []
    for name, there in shapes.items():
        fresh, target = own.get(name), first.get(name, name)
        tied = target != name and target in shapes
        if fresh is None or (tied and not _is_same(weights[target], weights[name])):
            told.left.append(name)  # of another layer, or two matrices there that are one here
        elif rows is not None and _is_table(there, fresh.shape, sizes):
            sources[target], out[target] = name, tuple(fresh.shape)
            n = sum(there.stop - there.start for there, _ in rows)
            told.partial[name] = f"{n:,} of {len(fresh):,} rows"
        elif tuple(fresh.shape) == tuple(there):
            sources[target], out[target] = name, there
            told.taken.append(name)
        else:
            mismatched.append(name)

    def read(target: str) -> Any:
        name = sources[target]
        if rows is not None and name in told.partial:
            return Rows(weights[name], rows)
        return weights[name]

    told.new = [name for name in own if first.get(name, name) not in out]
    missing = [n for n in told.new if n not in weights and first.get(n, n) == n]
    faults = {
        "allow_missing": [n for n in missing if not matches(n, (*asked.allow_missing, *added))],
        "allow_mismatched": [n for n in mismatched if not matches(n, asked.allow_mismatched)],
        "allow_unexpected": [n for n in told.left if not matches(n, asked.allow_unexpected)],
    }
    return Lazy(out, read), told, {k: v for k, v in faults.items() if v}


def for_linears(module: nn.Module, weights: Mapping[str, Tensor]) -> Lazy:
    """The tensors with those of dense matrices as the linears of ``module`` hold them.

    Only what is made of those matrices is in memory, all else is read when it is asked for.
    """
    shapes, own = dict(shapes_of(weights)), module.state_dict()
    made: dict[str, Tensor] = {}
    for path, part in module.named_modules():
        names = [n for n in ("weight", "bias") if f"{path}.{n}" in shapes]
        if not isinstance(part, Linear) or "weight" not in names:
            continue
        at = own.get(f"{path}.weight")
        if at is None or at.dim() != len(shapes[f"{path}.weight"]):  # a stack has an axis more
            dense = {n: weights[f"{path}.{n}"] for n in names}
            for n in names:
                del shapes[f"{path}.{n}"]
            for name, value in part.from_dense(dense).items():
                if f"{path}.{name}" not in shapes:  # those of a saved adapter are given
                    made[f"{path}.{name}"] = value
    return Lazy(shapes, weights.__getitem__).with_tensors(made)


def adapters(module: nn.Module) -> Iterator[str]:
    """Names of parameters that adapt a network which stays as it is."""
    for path, part in module.named_modules():
        for name in part.adapter_parameters if isinstance(part, (Linear, StartState)) else ():
            yield f"{path}.{name}"


def _first_names(module: nn.Module) -> dict[str, str]:
    """Every name of a parameter -> the first name of the same one."""
    seen: dict[int, str] = {}
    named = module.named_parameters(remove_duplicate=False)
    return {name: seen.setdefault(id(p), name) for name, p in named}


def _is_same(a: Tensor, b: Tensor) -> bool:
    return a is b or (a.shape == b.shape and torch.equal(a, b))


def _size(x: Tensor) -> str:
    return str(tuple(x.shape))


def _is_table(there: Sequence[int], here: Sequence[int], sizes: tuple[int, int]) -> bool:
    """Whether both have a row for each id of their vocabularies, and rows of one shape."""
    same = len(there) == len(here) > 0 and tuple(there[1:]) == tuple(here[1:])
    return same and (there[0], here[0]) == sizes


def refusal(
    key: str, faults: Mapping[str, Sequence[str]], module: nn.Module, weights: Mapping[str, Tensor]
) -> str:
    """What does not fit, and the keys below ``key`` that allow it."""
    own = module.state_dict()
    parts = []
    if names := faults.get("allow_missing"):
        parts.append(f"it has no {some(names)}")
    if names := faults.get("allow_mismatched"):
        each = [f"'{n}' is {_size(weights[n])} there and {_size(own[n])} here" for n in names]
        parts.append("; ".join(each[:SHOWN]) + _more(names))
    if names := faults.get("allow_unexpected"):
        parts.append(f"nothing takes its {some(names)}")
    everything = {*own, *weights}
    keys = [
        f"{key}.{name}=[{','.join(patterns(given, everything - {*given}))}]"
        for name, given in faults.items()
    ]
    return f"{'; '.join(parts)}; set model: as it is there, or allow it: {' '.join(keys)}"


def some(names: Sequence[str]) -> str:
    """The first names, quoted, and how many more there are."""
    return ", ".join(f"'{n}'" for n in names[:SHOWN]) + _more(names)


def _more(names: Sequence[str]) -> str:
    return f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""


def patterns(names: Iterable[str], others: Collection[str]) -> list[str]:
    """Globs that match ``names`` and none of ``others``: the shortest beginnings that do."""
    found: dict[str, None] = {}
    for name in names:
        parts = name.split(".")
        heads = (".".join(parts[:i]) for i in range(1, len(parts)))
        head = next((h for h in heads if not any(o.startswith(f"{h}.") for o in others)), None)
        found[name if head is None else f"{head}.*"] = None
    return list(found)


def matches(name: str, globs: Iterable[str]) -> bool:
    """Whether a name fits one of some globs."""
    return any(fnmatchcase(name, glob) for glob in globs)


def rows_of(old: Vocabulary, new: Vocabulary, how: str) -> list[tuple[slice, slice]] | None:
    """Where rows of ids stand in both vocabularies; None where nothing moves or is added.

    Raises:
        ValueError: ``how`` is "extended" and ids of the old one would mean something else.
    """
    if old == new:
        return None
    if old.is_prefix_of(new):
        return [(slice(0, old.size), slice(0, old.size))]
    if how == "extended":
        raise ValueError("does not begin with the old one")
    rows = [(slice(0, RESERVED), slice(0, RESERVED))]
    for spec in old.ranges:
        if spec in new.ranges:
            a, b = old.range(spec.modality), new.range(spec.modality)
            rows.append((slice(a.begin, a.stop), slice(b.begin, b.stop)))
    return rows
