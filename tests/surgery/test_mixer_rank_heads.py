"""Heads ranked on data, and the model that goes on without some of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from generation_toys import VOCABULARY, V
from laws import TOL, D, alone, documents
from torch import Tensor

from mm.batch import Batch
from mm.errors import UserError
from mm.layout import Doc, Layout
from mm.mask import Causal
from mm.model.context import Ctx
from mm.model.layer import init_weights
from mm.model.mixers.attention.attention import Attention
from mm.registry import MIXERS, NETWORKS
from mm.surgery.pool_heads import mean_pooled
from mm.surgery.rank_heads import most_recent, nearby_share, recency_ratios, without_heads

PRO = {"forget_gate": True, "qk_norm": "heads", "gate": True, "token_shift": True, "sinks": True}


def layer_of(**settings: Any) -> Attention:
    torch.manual_seed(3)
    layer = MIXERS.get("attention")(**{"heads": 4, "head_dim": 4, **settings}).build(D)
    init_weights(layer)
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return layer.double()


def model(mixer: dict[str, Any], depth: int = 1) -> Any:
    torch.manual_seed(1)
    backbone = {"kind": "stack", "depth": depth, "pattern": "own", "mixers": {"own": mixer}}
    made = NETWORKS.parse({"kind": "lm", "d_model": D, "backbone": backbone}).build(VOCABULARY)
    init_weights(made)
    return made.double()


def batch(*rows: list[int]) -> Batch:
    layout = Layout.from_rows([[Doc(n) for n in row] for row in rows])
    ids = torch.randint(V, layout.shape, generator=torch.Generator().manual_seed(0))
    return Batch.of_ids(ids, layout)


@pytest.mark.parametrize("settings", [{}, PRO, {"kv_heads": 2, "window": 5}])
def test_weights_are_those_that_attention_applies(settings: dict[str, Any]) -> None:
    layer, layout = layer_of(**settings), Layout.from_rows([[Doc(7), Doc(5)], [Doc(9)]], 13)
    x = torch.randn(2, 13, D, dtype=torch.float64)
    ctx = Ctx(layout, Causal())
    p = layer.weights(x, ctx)
    (_, _, v, *_), _ = layer.project(x, ctx, None, False)
    y = torch.einsum("bths,bshk->bthk", p, v.repeat_interleave(4 // layer.kv_heads, 2)).flatten(2)
    if layer.gate is not None:
        y = y * layer.gate(x, ctx).sigmoid()
    torch.testing.assert_close(layer.out(y, ctx), layer(x, ctx).y, **TOL)
    if "sinks" not in settings:
        seen = (layout.fields.document > 0).double()
        torch.testing.assert_close(p.sum(-1), seen[..., None].expand(-1, -1, 4), **TOL)


def test_a_local_head_has_ratio_one_and_a_global_head_none() -> None:
    layout = Layout.from_rows([[Doc(20), Doc(12)]])
    p = torch.zeros(1, 32, 3, 32)
    at = torch.arange(32)
    begin = torch.where(at < 20, 0, 20)
    p[0, at, 0, (at - 2).clamp_min(0)] = 1  # the token before the last
    p[0, at, 1, begin] = 1  # the first token of its document
    p[0, at, 2, (begin + at) // 2] = 1  # halfway back
    ctx = Ctx(layout, Causal())
    total, n = nearby_share(p, ctx, near=3, first=0)
    assert n == 17 + 9 and (total / n).tolist()[0] == 1 and total[1] == 0
    total, n = nearby_share(p, ctx, near=3, first=1)
    assert n == 16 + 8 and (total / n).tolist()[:2] == [1, 1] and total[2] / n < 0.35


def test_uniform_heads_have_the_share_that_they_see() -> None:
    net = model({"kind": "attention", "heads": 4, "head_dim": 4, "position": "none"})
    attention = net.backbone.layers[0].mixer
    with torch.no_grad():
        attention.q_norm.weight[:] = 0
    ratios = recency_ratios(net, [batch([9, 3], [6]), batch([8])], near=2, first=1)
    expected = [3 / (t + 1) for n in (9, 6, 8) for t in range(3, n)]
    (ratio,) = ratios.values()
    torch.testing.assert_close(ratio, torch.full((4,), sum(expected) / len(expected)).double())
    with pytest.raises(UserError, match="near"):
        recency_ratios(net, [batch([3])], near=2, first=1)
    with pytest.raises(UserError, match="no attention"):
        recency_ratios(model({"kind": "rg_lru", "width": 8, "heads": 2}), [batch([9])])


def test_the_ranking_takes_the_heads_that_look_nearby() -> None:
    ratios = {"a": torch.tensor([0.2, 0.9, 0.5, 0.8]), "b": torch.tensor([0.9, 0.1, 0.2, 0.3])}
    assert most_recent(ratios, 2) == {"a": [1, 3], "b": [0, 3]}
    with pytest.raises(UserError, match="cannot give up 4"):
        most_recent(ratios, 4)


@pytest.mark.parametrize("settings", [{}, PRO])
def test_heads_that_stay_keep_their_weights(settings: dict[str, Any]) -> None:
    """Where the heads given up put nothing out, the smaller model is the same."""
    own = {"kind": "attention", "heads": 4, "head_dim": 4, **settings}
    net = model(own, depth=2)
    gone = {"backbone.layers.0.mixer": [0, 2], "backbone.layers.1.mixer": [1, 3]}
    with torch.no_grad():
        for name, heads in gone.items():
            out = net.get_submodule(name).out.weight.view(D, 4, 4)
            out[:, heads] = 0
    recurrent = {"kind": "rg_lru", "width": 8, "heads": 2}
    small = model({"kind": "mixed_heads", "parts": [{**own, "heads": 2}, recurrent]}, depth=2)
    missing = small.load_state_dict(without_heads(net, gone), strict=False)
    assert not missing.unexpected_keys
    assert all(".parts.1." in name for name in missing.missing_keys)
    with torch.no_grad():
        for layer in small.backbone.layers:
            layer.mixer.parts[1].out.weight.zero_()
    b = batch([9, 4], [7])
    torch.testing.assert_close(small(b, heads=()).hidden, net(b, heads=()).hidden, **TOL)
    kept = small.backbone.layers[0].mixer.parts[0].state_bytes(1, 1000)
    assert kept < 0.6 * net.backbone.layers[0].mixer.state_bytes(1, 1000), "half of the cache"
    with pytest.raises(UserError, match="share"):
        shared = model({**own, "kv_heads": 2})
        without_heads(shared, {"backbone.layers.0.mixer": [0]})


def test_norms_and_shifts_of_key_heads_are_pooled_with_them() -> None:
    layer, (x,) = layer_of(**PRO), documents(6)
    with torch.no_grad():  # every pair of key heads alike: pooling changes nothing
        qkv = layer.qkv.weight.view(12, 4, D)
        for part in (qkv[4:8], qkv[8:], layer.k_norm.weight):  # type: ignore[union-attr]
            part[1::2] = part[::2]
        gates = layer.shift.gates.weight  # type: ignore[union-attr]
        gates[1::2] = gates[::2].clone()
    small = layer_of(**PRO, kv_heads=2)
    small.load_state_dict(mean_pooled(layer, 2))
    got: Tensor = alone(small, x)
    torch.testing.assert_close(got, alone(layer, x), **TOL)
