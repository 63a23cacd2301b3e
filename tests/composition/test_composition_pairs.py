"""Composed = alone for all pairs of the registries. B rows, T tokens, D model."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from composition_cases import ITEMS, MARKED, TEXT, lay, packed_rows
from composition_checks import first_fault, outputs, run
from composition_configs import (
    ITEM,
    Case,
    D,
    Refused,
    all_mixers,
    build,
    builds,
    fixed,
    layers,
    registry_of,
    smallest,
    variants,
    wrapped,
    wrappers,
)
from composition_shrink import report
from laws import context
from thinned import every

from mm.errors import UserError
from mm.layout import Layout
from mm.model.layer import init_weights
from mm.registry import (
    ADAPTERS,
    BACKBONES,
    BLOCKS,
    EMBEDDERS,
    FFNS,
    HEADS,
    MIXERS,
    POSITIONS,
    Registry,
)

FILLED = {ITEM: smallest(ADAPTERS, next(iter(ADAPTERS)))}


def holds(*cases: Case, chunks: bool = False) -> None:
    """The first of ``cases`` that the product does not refuse keeps the law; without one: skip."""
    for case in cases:
        try:
            fault = first_fault(case, chunks)
        except Refused:
            continue
        if fault is not None:
            pytest.fail(report(case, fault), pytrace=False)
        return
    pytest.skip("refused under every mask")


def under_masks(wrapper: str, mixer: dict[str, Any], *masks: str) -> list[Case]:
    """The wrapper after its own mixer, which shares with it what may be shared.

    Or alone, where the mixer does not run under the mask.
    """
    documents = {"causal": TEXT, "prefix": MARKED, "full": MARKED}
    return [
        fixed({"backbone": backbone}, mask, documents[mask])
        for mask in masks
        for backbone in (layers(mixer, wrapped(wrapper, mixer)), layers(wrapped(wrapper, mixer)))
    ]


PAIRS = [
    (wrapper, name)
    for wrapper in wrappers()
    for name, mixer in all_mixers().items()
    if builds(wrapped(wrapper, mixer))
]


def pairs(slow: bool) -> list[Any]:
    """Presets and masks beyond the first that a pair runs under belong to the slow suite."""
    return [pytest.param(*p, id="-".join(p)) for p in PAIRS if slow or "preset" not in p[1]]


def turns(params: list[Any]) -> list[Any]:
    first, second = ([*dict.fromkeys(p.values[i] for p in params)] for i in (0, 1))
    place = lambda p: first.index(p.values[0]) + second.index(p.values[1])
    return [p for p in params if place(p) % 3 == 0]


def test_there_are_wrappers_and_most_take_most_mixers() -> None:
    assert len(wrappers()) >= 4 and len(pairs(False)) > 2 * len([*MIXERS])


# Every third pair, so that each wrapper and each mixer has its turn; the slow suite takes all.
@pytest.mark.parametrize("wrapper,mixer", turns(pairs(False)))
def test_wrapper_and_mixer(wrapper: str, mixer: str) -> None:
    holds(*under_masks(wrapper, all_mixers()[mixer], "prefix", "causal", "full"))


@pytest.mark.slow
@pytest.mark.parametrize("mask", ["causal", "prefix", "full"])
@pytest.mark.parametrize("wrapper,mixer", pairs(True))
def test_wrapper_and_mixer_under_every_mask(wrapper: str, mixer: str, mask: str) -> None:
    holds(*under_masks(wrapper, all_mixers()[mixer], mask), chunks=True)


# Every third by default: `test_contract` and the wrappers run each mixer on its own.
@pytest.mark.parametrize(
    "mixer",
    every(6, MIXERS),
)
def test_block_and_mixer_and_feed_forward(mixer: str) -> None:
    """One stack: a layer for every block, feed-forwards in turn, so that each pair is there.

    The switches of a feed-forward are turned from mixer to mixer.
    """
    blocks, turn = variants(BLOCKS), [*MIXERS].index(mixer)
    by_kind = [[v for v in variants(FFNS) if v["kind"] == kind] for kind in FFNS]
    ffns = [*(each[turn % len(each)] for each in by_kind), None]
    count = max(len(blocks), len(ffns))
    words = [f"m{i}" for i in range(count)]
    halves = []
    for ffn in ffns:
        mine = [i for i in range(count) if ffns[i % len(ffns)] == ffn]
        backbone = layers(*[smallest(MIXERS, mixer)] * len(mine), **{FFNS.name: ffn})
        backbone["blocks"] = {words[j]: blocks[i % len(blocks)] for j, i in enumerate(mine)}
        halves.append(backbone)
    for backbone in halves:
        cases = [
            fixed({"backbone": backbone}, mask, TEXT if mask == "causal" else MARKED)
            for mask in ("causal", "full")
        ]
        holds(*cases)


@pytest.mark.parametrize("backbone", [*BACKBONES])
def test_backbone_and_block(backbone: str) -> None:
    masks = ("causal", "prefix", "full")
    for i, block in enumerate(variants(BLOCKS)):
        mask = masks[i % len(masks)]
        values = smallest(BACKBONES, backbone) | {"block": block}
        holds(fixed({"backbone": values}, mask, TEXT if mask == "causal" else MARKED))


@pytest.mark.parametrize("backbone", [*BACKBONES])
def test_backbone_and_head(backbone: str) -> None:
    """Heads of the last hidden states and of earlier ones, also where an adapter moves tokens."""
    for head in variants(HEADS):
        fields = HEADS.get(head["kind"]).model_fields.items()
        early = head | {name: "hidden.1" for name, f in fields if f.default == "hidden"}
        model = {"backbone": smallest(BACKBONES, backbone), "heads": {"tokens": head, "b": early}}
        holds(fixed(model | {"adapters": FILLED}, "causal", ITEMS))


@pytest.mark.parametrize("backbone", [*BACKBONES])
def test_backbone_and_path(backbone: str) -> None:
    """A layer visited again has a State of its own for each visit, in the order of visits."""
    case = fixed({"backbone": smallest(BACKBONES, backbone)}, "causal", TEXT)
    n = len(cast(Any, build(case).backbone).layers)
    holds(case | {"path": [0, 1, 0, *range(2, n)]}, chunks=True)


def placed(registry: Registry) -> list[tuple[str, str]]:
    """Entries of a registry that hold a position: kind and field."""
    return [
        (kind, name)
        for kind in registry
        for name in registry.get(kind).model_fields
        if registry_of(getattr(registry.get(kind).smallest(), name)) is POSITIONS
    ]


def where_placed(*registries: Registry) -> list[Any]:
    return [
        pytest.param(registry, *place, position, id=f"{'-'.join(place)}-{position['kind']}")
        for registry in registries
        for place in placed(registry)
        for position in (smallest(POSITIONS, kind) for kind in POSITIONS)
    ]


# Embedders share what adds positions.
PLACED = [*where_placed(MIXERS, BACKBONES), *every(4, where_placed(EMBEDDERS))]


def with_position(registry: Registry, kind: str, name: str, position: dict[str, Any]) -> Case:
    part = smallest(registry, kind) | {name: position}
    home = {MIXERS.name: "backbone", EMBEDDERS.name: "embedder", BACKBONES.name: "backbone"}
    value = layers(part) if registry is MIXERS else part
    return fixed({home[registry.name]: value}, "causal", MARKED[::-1])


@pytest.mark.parametrize("registry,kind,name,position", PLACED)
def test_position_and_what_holds_it(
    registry: Registry, kind: str, name: str, position: dict[str, Any]
) -> None:
    """Refused, or used: no position is taken and then ignored."""
    case = with_position(registry, kind, name, position)
    holds(case)
    without = with_position(registry, kind, name, {"kind": "none"})
    try:
        model, plain = build(case), build(without)
    except Refused:
        return
    if position["kind"] == "none":
        return
    plain.load_state_dict(model.state_dict(), strict=False)
    call = lay(case, packed_rows(case))
    y, other = (outputs(run(m, case, call), call)[0] for m in (model, plain))
    assert not torch.equal(y, other), "the position is taken and ignored"


@pytest.mark.slow
@pytest.mark.parametrize("registry,kind,name,position", PLACED)
def test_position_and_what_holds_it_by_every_switch(
    registry: Registry, kind: str, name: str, position: dict[str, Any]
) -> None:
    for each in variants(POSITIONS):
        if each["kind"] == position["kind"]:
            holds(with_position(registry, kind, name, each), chunks=True)


def refused_early(mixers: list[dict[str, Any]], mask: str) -> None:
    refused = 0
    for mixer in mixers:
        case = fixed({"backbone": layers(mixer)}, mask, TEXT)
        try:
            model = build(case)
        except Refused:
            refused += 1
            continue
        call = lay(case, packed_rows(case))
        try:
            run(model, case, call)
        except UserError as error:
            pytest.fail(f"refused only when it runs: {mixer}: {error}", pytrace=False)
    assert refused


@pytest.mark.parametrize("mask", ["causal", "prefix", "full"])
def test_a_mask_that_does_not_fit_is_refused_when_the_config_is_read(mask: str) -> None:
    refused_early([smallest(MIXERS, kind) for kind in MIXERS], mask)


@pytest.mark.slow
@pytest.mark.parametrize("mask", ["causal", "prefix", "full"])
def test_a_mask_that_does_not_fit_presets_and_what_is_wrapped_is_refused_early(mask: str) -> None:
    every = all_mixers()
    refused_early([*every.values(), *(wrapped(w, every[m]) for w, m in PAIRS)], mask)


def reads_ids(mixer: dict[str, Any]) -> bool:
    """Its output depends on the ids of its tokens."""
    torch.manual_seed(0)
    layer = cast(Any, MIXERS.parse(mixer)).build(D)
    init_weights(layer)
    x, layout = torch.randn(1, 6, D), Layout.plain(1, 6)
    few = torch.tensor([[1, 2, 1, 2, 1, 2]])[..., None]
    y, other = (
        layer(x, context(layer, x, layout, ids=ids)).y
        for ids in (few, torch.arange(6).view(1, 6, 1))
    )
    return not torch.equal(y, other)


@pytest.fixture(scope="module")
def readers() -> dict[str, dict[str, Any]]:
    return {name: mixer for name, mixer in all_mixers().items() if reads_ids(mixer)}


@pytest.mark.parametrize("adapter", [*ADAPTERS])
def test_adapter_and_mixer_that_reads_ids(adapter: str, readers: dict[str, dict[str, Any]]) -> None:
    assert readers
    for mixer in readers.values():
        around = [wrapped(w, mixer) for w in wrappers()]
        for each in (mixer, *(w for w in around if builds(w))):
            model = {"adapters": {ITEM: smallest(ADAPTERS, adapter)}, "backbone": layers(each)}
            holds(fixed(model, "causal", ITEMS), chunks=True)


MASKS = ("causal", "prefix", "full", "window")
# By default each adapter under each mask once, with one embedder after another.
THREE = [
    pytest.param(adapter, mask, [*EMBEDDERS][(i + j + k) % len([*EMBEDDERS])])
    for i, adapter in enumerate(ADAPTERS)
    for j, mask in enumerate(MASKS)
    for k, _ in enumerate(EMBEDDERS)
]


@pytest.mark.parametrize("adapter,mask,embedder", every(len([*EMBEDDERS]), THREE))
def test_adapter_and_mask_and_embedder(adapter: str, mask: str, embedder: str) -> None:
    """Also without the field that the mask names: nobody has a prefix then."""
    model = {
        "adapters": {ITEM: smallest(ADAPTERS, adapter)},
        "embedder": smallest(EMBEDDERS, embedder),
        "backbone": layers(smallest(MIXERS, "attention")),
    }
    holds(fixed(model, mask, ITEMS), chunks=True)
    holds(fixed(model, mask, TEXT), chunks=True)
    if mask != "window":
        marked = [ITEMS[0] | {"blocks": [[0, 4]]}, *MARKED[1:]]
        holds(fixed(model, mask, marked), chunks=True)
