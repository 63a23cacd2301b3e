"""Statistics arrive at the module that made them, and losses are reported under its name."""

from __future__ import annotations

import copy
from typing import Any, cast

import pytest
import torch
from composition_cases import TEXT
from composition_checks import difference, first_fault, listeners
from composition_configs import (
    D,
    Refused,
    all_mixers,
    builds,
    fixed,
    layers,
    smallest,
    wrapped,
    wrappers,
)
from composition_shrink import report
from thinned import only

from mm.batch import Batch, Values
from mm.errors import UserError
from mm.model.layer import init_weights
from mm.registry import BLOCKS, FFNS, MIXERS, NETWORKS, QUANTIZERS
from mm.tokenizers.quantizers.base import Quantizer


def listening_mixers() -> dict[str, dict[str, Any]]:
    """Mixers that move buffers of their own after a step."""
    found = {}
    for name, mixer in all_mixers().items():
        with torch.device("meta"):
            layer = torch.nn.ModuleList([cast(Any, MIXERS.parse(mixer)).build(D)])
        if listeners(layer):
            found[name] = mixer
    return found


LISTENING = listening_mixers()


def holds(backbone: dict[str, Any], **settings: Any) -> None:
    case = fixed({"backbone": backbone}, "causal", TEXT) | settings
    try:
        fault = first_fault(case, chunks=False)
    except Refused:
        pytest.skip("refused")
    if fault is not None:
        pytest.fail(report(case, fault), pytrace=False)


def test_some_mixers_listen() -> None:
    assert LISTENING


@pytest.mark.parametrize("name", LISTENING)
@pytest.mark.parametrize("recompute", ["none", "full", "selective"])
def test_in_a_stack(name: str, recompute: str) -> None:
    mixer, other = LISTENING[name], {"kind": "attention"}
    holds(layers(mixer, other, mixer, recompute=recompute))


@pytest.mark.parametrize("recompute", only(["none", "full", "selective"], "full"))
@pytest.mark.parametrize("kind", [*FFNS])
def test_in_feed_forwards(kind: str, recompute: str) -> None:
    """Those that listen and those that do not; blocks pass statistics of both parts on."""
    mixer, ffn = LISTENING["transformer_vq"], smallest(FFNS, kind)
    for block in BLOCKS:
        wiring = {"ffn": ffn, "block": smallest(BLOCKS, block), "recompute": recompute}
        holds(layers(mixer, mixer, **wiring))


@pytest.mark.parametrize("name", LISTENING)
def test_every_visit_of_a_path_counts(name: str) -> None:
    holds(layers(LISTENING[name], {"kind": "attention"}), path=[0, 1, 0])


@pytest.mark.parametrize("name", LISTENING)
@pytest.mark.parametrize("outer", wrappers())
def test_in_wrappers_of_wrappers(name: str, outer: str) -> None:
    made = [wrapped(outer, wrapped(inner, LISTENING[name])) for inner in wrappers()]
    taken = [m for m in made if builds(m)]
    if not taken:
        pytest.skip("it takes no such mixer")
    for mixer in taken:
        holds(layers(mixer))


# ---- tokenizers ----

ITEMS = {"image": torch.rand(2, 3, 8, 8), "audio": torch.randn(2, 3200) / 4}


def tokenizers() -> list[tuple[str, str]]:
    return [
        (network, quantizer)
        for network in NETWORKS
        if "quantizer" in NETWORKS.get(network).model_fields
        for quantizer in QUANTIZERS
    ]


@pytest.mark.parametrize("network,quantizer", tokenizers())
def test_in_the_quantizer_of_a_tokenizer(network: str, quantizer: str) -> None:
    small = QUANTIZERS.get(quantizer).smallest()
    try:
        values = NETWORKS.get(network).smallest().to_dict() | {"quantizer": small.to_dict()}
        torch.manual_seed(0)
        net = cast(Any, NETWORKS.parse(values)).build()
    except (UserError, ValueError) as error:
        pytest.skip(f"refused: {error}")
    init_weights(net)
    net.train()
    made: list[Any] = []
    handle = net.quantizer.register_forward_hook(lambda m, args, out: made.append(out))
    batch = Batch.of_values({net.config.modality: Values.items(ITEMS[net.config.modality])})
    out = net(batch)
    handle.remove()
    own = copy.deepcopy(net.quantizer)
    before = [b.clone() for b in own.buffers()]
    own.after_step({k: v.detach() for k, v in made[0].aux.items()})
    net.after_step({k: v.detach() for k, v in out.aux.items()})
    for a, b in zip(net.quantizer.buffers(), own.buffers(), strict=True):
        assert difference(a.reshape(-1, 1), b.reshape(-1, 1)) is None
    moved = any(not torch.equal(a, b) for a, b in zip(before, own.buffers(), strict=True))
    assert moved == (type(own).after_step is not Quantizer.after_step)
