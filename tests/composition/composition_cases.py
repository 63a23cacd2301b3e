"""Compositions as plain values: what a model is made of, and the documents that it reads.

A case is YAML: `model` (a language model's config), `mask`, `path`, `seed` and `documents`. B rows,
T tokens, D model, A axes, G items.
"""

from __future__ import annotations

import functools
import itertools
import json
import random
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mm.batch import Batch, Values
from mm.config import Config, validate
from mm.errors import UserError
from mm.layout import Doc, Grid, Layout
from mm.mask import Causal, Full, Mask, Prefix, Window
from mm.model.backbones.stack import StackConfig, presets
from mm.model.layer import init_weights
from mm.model.model import LmConfig, Model
from mm.registry import ADAPTERS, BACKBONES, BLOCKS, EMBEDDERS, FFNS, HEADS, MIXERS, Registry
from mm.specs import TokenSpec
from mm.vocabulary import RESERVED, Vocabulary

D, WINDOW = 16, 3
ITEM = "image"  # the adapter's modality
VOCABULARY = Vocabulary().add(TokenSpec("text", 5))
MASKS: dict[str, Mask] = {
    "causal": Causal(),
    "full": Full(),
    "prefix": Prefix(),
    "window": Window(WINDOW),
}
Case = dict[str, Any]


# ---- configs as plain values ----


def registry_of(value: Any) -> Registry | None:
    """The registry that a Config is an entry of."""
    kind = getattr(value, "kind", None)
    for registry in Registry.every.values():
        if isinstance(value, Config) and kind in registry and registry.get(kind) is type(value):
            return registry
    return None


def plain(config: Config) -> dict[str, Any]:
    """``config`` as YAML values: its kind, and what is not the default."""

    def value_of(value: Any) -> Any:
        if isinstance(value, Config):
            return plain(value)
        if isinstance(value, Mapping):
            return {k: value_of(v) for k, v in value.items()}
        if isinstance(value, list | tuple):
            return [value_of(v) for v in value]
        return value

    made = {"kind": config.kind} if hasattr(config, "kind") else {}
    for name, field in type(config).model_fields.items():
        default = field.get_default(call_default_factory=True)
        value = getattr(config, name)
        if name != "kind" and value_of(value) not in (value_of(default), default):
            made[name] = value_of(value)
    return made


def wrappers() -> list[str]:
    """Mixers that hold other mixers."""
    return [kind for kind in MIXERS if inner_fields(MIXERS.get(kind).smallest())]


def inner_fields(config: Config) -> dict[str, int | None]:
    """Fields of ``config`` that hold mixers: name -> how many (None: one, not in a list)."""
    found: dict[str, int | None] = {}
    for name in type(config).model_fields:
        value = getattr(config, name)
        if registry_of(value) is MIXERS:
            found[name] = None
        elif isinstance(value, list | tuple) and value and registry_of(value[0]) is MIXERS:
            found[name] = len(value)
    return found


def smallest(registry: Registry, kind: str) -> dict[str, Any]:
    return plain(registry.get(kind).smallest())


def preset(word: str) -> dict[str, Any]:
    return plain(StackConfig(pattern=word).mixer(word))


def wrapped(kind: str, inner: dict[str, Any]) -> dict[str, Any]:
    """The wrapper ``kind`` around copies of one mixer."""
    config = MIXERS.get(kind).smallest()
    made = plain(config)
    for name, count in inner_fields(config).items():
        made[name] = inner if count is None else [inner] * count
    return made


# ---- random compositions ----


def _bare(annotation: Any) -> list[Any]:
    """The alternatives of an annotation, without Annotated and None."""
    if typing.get_origin(annotation) is Annotated:
        return _bare(typing.get_args(annotation)[0])
    if typing.get_origin(annotation) is typing.Union or isinstance(annotation, type(int | None)):
        return [a for each in typing.get_args(annotation) for a in _bare(each)]
    return [] if annotation is type(None) else [annotation]


def varied(rng: random.Random, cls: type[Config], values: dict[str, Any], times: int) -> None:
    """Set ``times`` settings that are switches, words or optional numbers to other values."""
    options: dict[str, list[Any]] = {}
    for name, field in cls.model_fields.items():
        hints = _bare(field.annotation)
        optional = type(None) in typing.get_args(field.annotation)
        made: list[Any] = [None] if optional else []
        for hint in hints:
            if hint is bool:
                made += [True, False]
            elif typing.get_origin(hint) is Literal and name != "kind":
                made += [*typing.get_args(hint)]
            elif hint is int and optional:
                made += [2, 3, 4]
            elif hint is float and optional:
                made += [0.5, 2.0, 8.0]
        if made:
            options[name] = made
    for name in rng.sample(sorted(options), min(times, len(options))):
        values[name] = rng.choice(options[name])


@functools.lru_cache(maxsize=None)
def _builds(text: str) -> bool:
    try:
        with torch.device("meta"):
            MIXERS.parse(json.loads(text)).build(D)
    except (UserError, ValueError):
        return False
    return True


def builds(mixer: dict[str, Any]) -> bool:
    """The product takes this mixer."""
    return _builds(json.dumps(mixer, sort_keys=True))


def any_mixer(rng: random.Random, nested: int = 2) -> dict[str, Any]:
    """A random mixer that the product takes; wrappers nest up to ``nested`` deep."""
    for _ in range(8):
        if builds(made := any_of(rng, MIXERS, nested)):
            return made
    return smallest(MIXERS, rng.choice([*MIXERS]))


def any_of(rng: random.Random, registry: Registry, nested: int = 2) -> dict[str, Any]:
    """A random entry of ``registry``, its parts random entries of theirs; mixers nest up to
    ``nested`` deep.
    """
    if registry is MIXERS:
        kinds, deep = [*MIXERS], wrappers()
        if nested and rng.random() < 0.35:
            kind = rng.choice(deep)
        elif rng.random() < 0.3:
            return preset(rng.choice(presets()))
        else:
            kind = rng.choice([k for k in kinds if k not in deep])
    else:
        kind = rng.choice([*registry])
    cls = registry.get(kind)
    if cls is StackConfig:
        return stack(rng)
    config = cls.smallest()
    values = plain(config)
    for name in cls.model_fields:
        value = getattr(config, name)
        part = registry_of(value)
        many = isinstance(value, list | tuple) and value and registry_of(value[0])
        if part is MIXERS:
            inner = any_mixer(rng, nested - 1)
            if builds(wrapped_in := {**values, name: inner}):
                values = wrapped_in
        elif many is MIXERS:
            values[name] = [any_mixer(rng, nested - 1) for _ in value]
        elif isinstance(value, StackConfig):
            values[name] = stack(rng)
        elif part is not None and rng.random() < 0.5:
            values[name] = any_of(rng, part, nested)
    if rng.random() < 0.5:
        varied(rng, cls, values, rng.choice([1, 1, 2]))
    return values


def stack(rng: random.Random) -> dict[str, Any]:
    words = [f"m{i}" for i in range(rng.choice([1, 1, 2, 2, 3]))]
    made: dict[str, Any] = {"kind": "stack", "pattern": " ".join(words)}
    made["mixers"] = {word: any_mixer(rng) for word in words}
    made[FFNS.name] = any_of(rng, FFNS) if rng.random() < 0.5 else None
    if rng.random() < 0.5:
        made["block"] = any_of(rng, BLOCKS)
    if rng.random() < 0.2:
        made["blocks"] = {words[0]: any_of(rng, BLOCKS)}
    if rng.random() < 0.2:
        made["recompute"] = rng.choice(["full", "selective"])
    return made


def any_case(seed: int, mask: str | None = None) -> Case:
    """The random composition of a seed."""
    rng = random.Random(seed)
    mask = mask or rng.choice(["causal", "causal", "prefix", "prefix", "full", "window"])
    backbone = stack(rng) if rng.random() < 0.8 else any_of(rng, BACKBONES)
    model: dict[str, Any] = {"kind": "lm", "d_model": D, "backbone": backbone}
    if mask in ("full", "prefix"):
        model["mask"] = mask
    if rng.random() < 0.3:
        model["embedder"] = any_of(rng, EMBEDDERS)
    items = rng.random() < 0.35
    if items:
        model["adapters"] = {ITEM: any_of(rng, ADAPTERS)}
    if rng.random() < 0.3:
        model["heads"] = {"tokens": any_of(rng, HEADS)}
    if rng.random() < 0.15:
        second = any_of(rng, HEADS)
        reads = [n for n, f in HEADS.get(second["kind"]).model_fields.items()
                 if f.default == "hidden"]  # fmt: skip
        model["heads"] = {"tokens": "softmax", "other": second | {n: "hidden.0" for n in reads}}
    case: Case = {"model": model, "mask": mask, "seed": seed}
    depth = len(backbone["pattern"].split()) if "pattern" in backbone else 0
    if depth and rng.random() < 0.15:
        case["path"] = [rng.randrange(depth) for _ in range(rng.choice([2, 3]))]
    grids = rng.random() < (0.5 if mask in ("full", "prefix") else 0.15)
    bare = rng.random() < 0.2  # nothing is marked: the batch has no such field
    case["documents"] = [
        any_document(rng, "causal" if bare else mask, items, grids)
        for _ in range(rng.choice([2, 3, 4]))
    ]
    return case


def any_document(rng: random.Random, mask: str, items: bool, grids: bool) -> dict[str, Any]:
    length = rng.randint(1, 9)
    made: dict[str, Any] = {"length": length}
    if grids and length >= 4 and rng.random() < 0.7:
        shape = rng.choice([(2, 2), (2, 2), (1, 3), (2, 3)])
        cells = shape[0] * shape[1]
        if cells <= length:
            made["grid"] = [rng.randint(0, length - cells), *shape]
    if mask == "prefix" and rng.random() < 0.7:
        end = rng.randint(1, length)
        if "grid" in made and rng.random() < 0.7:
            end = max(end, made["grid"][0] + made["grid"][1] * made["grid"][2])
        made["blocks"] = [[0, end]]
        if end + 2 < length and rng.random() < 0.5:
            made["blocks"].append([rng.randint(end + 1, length - 1), length])
    if items and length >= 2 and rng.random() < 0.7:
        n = rng.randint(1, min(3, length))
        made["item"] = [rng.randint(0, length - n), n, n + rng.choice([0, 1, 2])]
    return made


# ---- documents and batches ----


class Piece(NamedTuple):
    """Content places ``start .. stop - 1`` of a document, for one call."""

    document: int
    start: int
    stop: int
    slot: int = -1


@dataclass(frozen=True)
class Call:
    """A batch, and where the content of each piece lies in it."""

    batch: Batch
    pieces: tuple[Piece, ...]
    at: tuple[Tensor, ...]  # flat places of each piece


@dataclass(frozen=True)
class Content:
    """What a document says, whatever room is kept for it."""

    ids: np.ndarray  # (length,), -1 where an item stands
    position: np.ndarray  # (length, A)
    block: np.ndarray  # (length,) groups that see both ways
    item: tuple[int, int, int] | None  # first place, vectors, room
    grid: tuple[int, int, int] | None  # first place, rows, columns
    features: np.ndarray  # (vectors, ...)

    def atoms(self) -> list[tuple[int, int]]:
        """Ranges that no call may cut."""
        found = [(self.item[0], self.item[0] + self.item[1])] if self.item else []
        for number in sorted({*self.block} - {0}):
            inside = np.flatnonzero(self.block == number)
            found.append((int(inside[0]), int(inside[-1]) + 1))
        return found

    def borders(self) -> list[int]:
        """Places where a call may end: after 0 .. length tokens."""
        inside = {n for a, b in self.atoms() for n in range(a + 1, b)}
        return [n for n in range(len(self.ids) + 1) if n not in inside]


@functools.lru_cache(maxsize=None)
def item_shape(adapter: str) -> tuple[int, ...]:
    """Shape of one vector that an adapter takes."""
    return tuple(ADAPTERS.parse(json.loads(adapter)).build(D).zero(torch.device("cpu")).shape[2:])


def contents(case: Case) -> list[Content]:
    """The documents of a case; the same numbers for document i however others change."""
    axes = 3 if any(d.get("grid") for d in case["documents"]) else 1
    adapter = case["model"].get("adapters", {}).get(ITEM)
    shape = item_shape(json.dumps(adapter, sort_keys=True)) if adapter else ()
    made = []
    for i, d in enumerate(case["documents"]):
        rng, n = np.random.default_rng([case["seed"], i]), d["length"]
        ids = rng.integers(RESERVED + 2, RESERVED + 5, 64)[:n]  # few, so that they recur
        grid, item = d.get("grid"), d.get("item")
        position = np.repeat(np.arange(n, dtype=np.int32)[:, None], axes, 1)
        if grid is not None:
            at, Y, X = grid
            cells = np.unravel_index(np.arange(Y * X), (Y, X))
            for axis, cell in enumerate(cells, 1):
                position[at : at + Y * X, axis] = at + cell
        block = np.zeros(n, np.int32)
        for number, (a, b) in enumerate(d.get("blocks") or [], 1):
            block[a:b] = number
        features = rng.standard_normal((item[1] if item else 0, *shape))
        if item:
            ids[item[0] : item[0] + item[1]] = -1
        made.append(
            Content(ids, position, block, tuple(item) if item else None,
                    tuple(grid) if grid else None, features)
        )  # fmt: skip
    return made


def lay(case: Case, rows: Sequence[Sequence[Piece]], *, pad: int = 0, spare: bool = True) -> Call:
    """One call's batch. ``spare``: items have the room that the case says, else what they need."""
    documents, fields = contents(case), []
    marked = any(d.get("blocks") for d in case["documents"])
    ids_rows, where, values = [], [], []
    for row in rows:
        docs, ids, at = [], [], []
        for p in row:
            c = documents[p.document]
            place, extra = np.arange(p.stop - p.start), 0
            index = np.arange(p.start, p.stop)
            if c.item is not None and p.start <= c.item[0] < p.stop:
                first, n, room = c.item
                extra = room - n if spare else 0
                after = first + n - p.start
                index = np.insert(index, after, [first + n - 1] * extra)
                place = place + np.where(place >= after, extra, 0)
                values.append((len(ids_rows), len(ids) + first - p.start, n + extra, c.features))
            grids = []
            if c.grid is not None and p.start <= c.grid[0]:
                cells = c.grid[0] + np.arange(c.grid[1] * c.grid[2])
                whole = cells[-1] < p.stop and len(cells) == len(
                    index[(index >= cells[0]) & (index <= cells[-1])]
                )
                if whole:
                    grids.append(Grid(int(place[c.grid[0] - p.start]), c.grid[1:]))
            named = {"prefix": c.block[index]} if marked else {}
            docs.append(
                Doc(len(index), c.position[index], extra=named, slot=p.slot, fresh=p.start == 0,
                    start=p.start, grids=grids)
            )  # fmt: skip
            at.append(len(ids) + place)
            ids += [int(v) for v in c.ids[index]]
        fields.append(docs)
        ids_rows.append(ids)
        where.append(at)
    T = max((len(ids) for ids in ids_rows), default=0) + pad
    layout = Layout.from_rows(fields, T, axes=documents[0].position.shape[1] if documents else 1)
    ids = np.full((len(rows), T), RESERVED + 2, np.int64)
    for b, row in enumerate(ids_rows):
        ids[b, : len(row)] = row
    batch = Batch.of_ids(torch.from_numpy(ids), layout)
    if values:
        number = lambda *n: torch.tensor(n, dtype=torch.int32)
        longest = max(len(v[3]) for v in values)
        data = np.full((len(values), longest, *values[0][3].shape[1:]), 1e3)
        for g, (_, _, _, features) in enumerate(values):
            data[g, : len(features)] = features
        made = Values(
            torch.from_numpy(data),
            number(*(len(v[3]) for v in values)),
            number(*(b * T + at for b, at, _, _ in values)),
            number(*(room for _, _, room, _ in values)),
        )
        batch = replace(batch, values={ITEM: made})
    flat = [torch.from_numpy(b * T + at) for b, row in enumerate(where) for at in row]
    return Call(batch, tuple(p for row in rows for p in row), tuple(flat))


def packed_rows(case: Case) -> list[list[Piece]]:
    """All documents whole, in two rows."""
    docs = [Piece(i, 0, d["length"]) for i, d in enumerate(case["documents"])]
    half = -(-len(docs) // 2)
    return [row for row in (docs[:half], docs[half:]) if row]


class Step(NamedTuple):
    """One call of a plan: rows of pieces, and after a draft how many tokens each slot accepts."""

    rows: list[list[Piece]]
    accepted: list[int] | None = None


def steps(case: Case, rng: random.Random) -> Iterator[Step]:
    """Calls that feed all documents to their ends, cut at random; some have a row for each
    document, and some are drafts of which a part is accepted (drafts come after what no call may
    cut).
    """
    documents = contents(case)
    done, n = [0] * len(documents), len(documents)
    whole = [max((b for _, b in c.atoms()), default=0) for c in documents]
    while any(at < len(c.ids) for at, c in zip(done, documents, strict=True)):
        aligned, draft = rng.random() < 0.4, rng.random() < 0.25
        row: list[Piece] = []
        for i, c in enumerate(documents):
            ends = [at for at in c.borders() if at > done[i]]
            takes = ends and rng.random() < 0.7 and not (draft and done[i] < whole[i])
            stop = rng.choice(ends[:3]) if takes else done[i]
            if aligned or stop > done[i]:
                row.append(Piece(i, done[i], stop, i))
        if not any(p.stop > p.start for p in row):
            continue
        accepted = [0] * n
        for p in row:
            size = p.stop - p.start
            accepted[p.slot] = rng.randint(0, size) if draft else size
            done[p.document] += accepted[p.slot]
        if aligned:
            rows = [[p] for p in row]
        else:
            rng.shuffle(row)
            cut = rng.randint(0, len(row))
            rows = [part for part in (row[:cut], row[cut:]) if part]
        yield Step(rows, accepted if draft else None)


# ---- models ----


class Refused(Exception):
    """The product refuses this composition when its config is read or built."""


def build(case: Case) -> Model:
    """The model of a case, every parameter away from its special initial value (zeros, ones).

    Raises:
        Refused: the config is refused by one clear line.
    """
    torch.manual_seed(7)
    try:
        model = validate(LmConfig, case["model"], "case").build(VOCABULARY)
    except (UserError, ValueError) as error:
        if not str(error).strip() or "\n" in str(error).strip():
            lines = str(error).strip().splitlines()
            if not lines or any(not line.startswith("case: ") for line in lines):
                raise AssertionError(f"not refused by a clear line: {error!r}") from error
        raise Refused(str(error)) from error
    init_weights(model)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model.double()


def variants(registry: Registry) -> list[dict[str, Any]]:
    """Every entry of a registry with every choice of its switches that it accepts."""
    made = []
    for kind in registry:
        cls = registry.get(kind)
        switches = {
            name: [True, False] if hint is bool else [*typing.get_args(hint)]
            for name, field in cls.model_fields.items()
            for hint in _bare(field.annotation)[:1]
            if hint is bool or (typing.get_origin(hint) is Literal and name != "kind")
        }
        for chosen in itertools.product(*switches.values()):
            values = smallest(registry, kind) | dict(zip(switches, chosen, strict=True))
            try:
                made.append(plain(registry.parse(values)))
            except (UserError, ValueError):
                continue
    return made


def all_mixers() -> dict[str, dict[str, Any]]:
    """Every mixer in its smallest form, and every preset."""
    made = {kind: smallest(MIXERS, kind) for kind in MIXERS}
    return made | {f"preset {word}": preset(word) for word in presets()}


def fixed(model: dict[str, Any], mask: str, documents: list[dict[str, Any]]) -> Case:
    """A case that nobody drew."""
    base = {"kind": "lm", "d_model": D}
    base |= {"mask": mask} if mask in ("full", "prefix") else {}
    return {"model": base | model, "mask": mask, "seed": 0, "documents": documents}


def layers(*mixers: dict[str, Any], **settings: Any) -> dict[str, Any]:
    """A backbone of these mixers, without feed-forwards if ``settings`` name none."""
    words = [f"m{i}" for i in range(len(mixers))]
    made = {"kind": "stack", "pattern": " ".join(words)}
    made["mixers"] = dict(zip(words, mixers, strict=True))
    return made | {FFNS.name: None} | settings


TEXT = [{"length": 7}, {"length": 1}, {"length": 5}]
MARKED = [
    {"length": 7, "blocks": [[0, 3]]},
    {"length": 1},
    {"length": 6, "blocks": [[0, 5]], "grid": [1, 2, 2]},
]
ITEMS = [{"length": 6, "item": [2, 2, 4]}, {"length": 3}, {"length": 5, "item": [0, 1, 2]}]
