"""`by_modality` against a loop over its groups, with modalities that the laws' layouts lack.

B rows, T tokens, D model, M groups.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from generation_toys import VOCABULARY, V
from torch import Tensor

from mm.batch import Batch
from mm.errors import UserError
from mm.layout import Doc, Layout
from mm.mask import Causal, Full
from mm.model.context import Ctx
from mm.model.layer import init_weights
from mm.model.linears.by_modality import ByModality
from mm.registry import BACKBONES, LINEARS, MIXERS, NETWORKS
from mm.trainer.fit_weights import for_linears

D = 8
GROUPS = [["text"], ["image"], ["audio", "deep"]]
LENGTHS = (7, 5, 1, 9)
# Numbers of the vocabulary, 0: control tokens; by document.
MODALITIES = [torch.randint(5, (n,), generator=torch.Generator().manual_seed(n)) for n in LENGTHS]


def matrix(groups: Any = GROUPS, d_out: int = 6, **settings: Any) -> ByModality:
    torch.manual_seed(0)
    part: Any = LINEARS.parse({"kind": "by_modality", "groups": groups, **settings}).build(
        D, d_out, "qkv"
    )
    init_weights(part)
    part.read_vocabulary(VOCABULARY)
    return part.double()


def layout_of(rows: list[list[int]], T: int | None = None, **doc: Any) -> Layout:
    """Documents by their numbers, whole."""
    made = [[Doc(LENGTHS[i], modality=MODALITIES[i].numpy(), **doc) for i in row] for row in rows]
    return Layout.from_rows(made, T)


@pytest.mark.parametrize("bias", [False, True])
def test_it_is_a_loop_over_groups_with_all_gradients(bias: bool) -> None:
    part = matrix([["text"], ["audio", "image"]], bias=bias)  # `deep` is named by none
    layout = layout_of([[0, 1], [2, 3]], 13)
    modality = layout.fields.modality
    assert {*modality.flatten().tolist()} == {0, 1, 2, 3, 4}
    if bias:
        torch.nn.init.normal_(part.bias)  # type: ignore[arg-type]
    x = torch.randn(2, 13, D, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, 13, 6, dtype=torch.float64)
    y = part(x, Ctx(layout, Causal()))
    group = {0: 0, 1: 0, 2: 1, 3: 1, 4: 0}
    rows = []
    for at, m in zip(x.flatten(0, 1), modality.flatten().tolist(), strict=True):
        g = group[m]
        rows.append(part.weight[g] @ at + (part.bias.view(2, 6)[g] if bias else 0))  # type: ignore
    wanted = torch.stack(rows).view(2, 13, 6)
    torch.testing.assert_close(y, wanted, rtol=1e-12, atol=1e-12)
    leaves = [x, *part.parameters()]
    got, expected = (torch.autograd.grad((a * weight).sum(), leaves) for a in (y, wanted))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_what_no_token_chose_has_a_gradient_of_zeros() -> None:
    """A rank whose rows hold text alone has all gradients: ZeRO reduces the same ones on all."""
    part = matrix(bias=True)
    text = Layout.from_rows([[Doc(4, modality=1)]])
    part(torch.randn(1, 4, D, dtype=torch.float64), Ctx(text, Causal())).sum().backward()
    for p in part.parameters():
        own, *others = p.grad.view(3, -1)  # type: ignore[union-attr]
        assert own.abs().min() > 0 and all(torch.equal(o, torch.zeros_like(o)) for o in others)


def test_a_token_costs_one_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of all groups together: the tokens, and at most 15 more a group."""
    from mm.kernels import grouped_linear as kernel

    seen: list[int] = []
    ranges = kernel._ranges

    def counted(ends: Tensor, rows: int) -> Any:
        found = ranges(ends, rows)
        seen.append(sum(b - a for _, a, b in found))
        return found

    monkeypatch.setattr(kernel, "_ranges", counted)
    part = matrix()
    layout = Layout.from_rows([[Doc(200, modality=torch.arange(200).numpy() % 5)]])
    part(torch.randn(1, 200, D, dtype=torch.float64), Ctx(layout, Causal()))
    assert len(seen) == 1 and 200 <= seen[0] <= 200 + 3 * 15


LAYERS: dict[str, Callable[[Any], Any]] = {
    "attention": lambda linear: MIXERS.parse({"kind": "attention", "heads": 2}).build(D, linear),
    "delta_rule": lambda linear: MIXERS.get("delta_rule").smallest().build(D, linear),
    "own keys": lambda linear: BACKBONES.parse(
        {"kind": "decoder_decoder", "own_keys": True, "lower": None, "upper": 1, "heads": 2}
    ).build(D, linear),
    "linformer": lambda linear: MIXERS.get("linformer").smallest().build(D, linear),
    "nystromformer": lambda linear: MIXERS.get("nystromformer").smallest().build(D, linear),
}


def layer(name: str) -> Any:
    torch.manual_seed(0)
    made = LAYERS[name](LINEARS.parse({"kind": "by_modality", "groups": GROUPS}).build)
    init_weights(made)
    found = [m for m in made.modules() if isinstance(m, ByModality)]
    for part in found:
        part.read_vocabulary(VOCABULARY)
    assert found
    return made.double()


@pytest.mark.parametrize("name", LAYERS)
def test_packed_and_served_are_as_alone(name: str) -> None:
    """Tokens of all modalities: rows of several documents, and one token of each at a time."""
    mixer = layer(name)
    causal = mixer.caps.causal
    mask = Causal() if causal else Full()
    g = torch.Generator().manual_seed(1)
    docs = [torch.randn(n, D, dtype=torch.float64, generator=g) for n in LENGTHS]
    alone = [mixer(x[None], Ctx(layout_of([[i]]), mask)).y[0] for i, x in enumerate(docs)]
    packed = layout_of([[0, 1], [2, 3]], 13)
    x = torch.full((2, 13, D), 1e3, dtype=torch.float64)
    x[0, :12], x[1, :10] = torch.cat(docs[:2]), torch.cat(docs[2:])
    y = mixer(x, Ctx(packed, mask)).y
    whole = [*y[0, :12].split(LENGTHS[:2]), *y[1, :10].split(LENGTHS[2:])]
    for got, wanted in zip(whole, alone, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-10)
    if not causal:
        return
    state = mixer.initial_state(4, 16)
    done: list[list[Tensor]] = [[] for _ in docs]
    for t in range(max(LENGTHS)):
        here = [i for i, n in enumerate(LENGTHS) if t < n]
        steps = [
            Doc(1, modality=MODALITIES[i][t : t + 1].numpy(), slot=i, fresh=t == 0, start=t)
            for i in here
        ]
        out = mixer(
            torch.stack([docs[i][t] for i in here])[None],
            Ctx(Layout.from_rows([steps]), mask),
            state,
        )
        state = out.state
        for i, y in zip(here, out.y[0], strict=True):
            done[i].append(y)
    for got, wanted in zip(done, alone, strict=True):
        torch.testing.assert_close(torch.stack(got), wanted, rtol=1e-9, atol=1e-10)


def lm(linear: Any, **backbone: Any) -> Any:
    stack = {"kind": "stack", "pattern": "attention", "depth": 2, **backbone}
    made = NETWORKS.parse({"kind": "lm", "d_model": 32, "backbone": stack, "linear": linear})
    net = made.build(VOCABULARY)
    init_weights(net, 1)
    return net.eval()


def batch(T: int = 32) -> Batch:
    ids = torch.randint(V, (2, T), generator=torch.Generator().manual_seed(0))
    modality = VOCABULARY.modality_of(ids.numpy())
    assert len({*modality.flatten().tolist()}) > 3
    return Batch.of_ids(ids, Layout.from_rows([[Doc(T, modality=m)] for m in modality]))


@pytest.mark.parametrize("bias", [False, ["qkv"]])
def test_a_dense_model_goes_on_as_it_is(bias: Any) -> None:
    """Upcycled, as `init_from` reads it: the same bits; of a bias, which is added, to rounding."""
    old = lm({"kind": "dense", "bias": bias})
    if bias:
        for p in old.parameters():
            torch.nn.init.normal_(p, std=0.1) if p.dim() == 1 else None
    new = lm({"kind": "by_modality", "groups": GROUPS, "bias": bias})
    assert not torch.equal(new(batch(), heads=()).hidden, old(batch(), heads=()).hidden)
    taken = for_linears(new, old.state_dict())
    new.load_state_dict({name: taken[name] for name in taken})
    got, wanted = new(batch(), heads=()).hidden, old(batch(), heads=()).hidden
    assert torch.equal(got, wanted) or bias
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
    again = for_linears(new, new.state_dict())  # its own tensors stay what they are
    assert all(torch.equal(again[name], t) for name, t in new.state_dict().items())


def test_what_it_cannot_be_is_refused_in_one_line() -> None:
    with pytest.raises(UserError, match=r"linear\.groups.*'imgae'.*did you mean 'image'"):
        lm({"kind": "by_modality", "groups": [["text"], ["imgae"]]})
    for groups, why in (([["text"], ["text"]], "twice"), ([["text"], []], "without a name")):
        with pytest.raises((UserError, ValueError), match=why):
            LINEARS.parse({"kind": "by_modality", "groups": groups})
    net = lm({"kind": "by_modality", "groups": GROUPS}, pattern="lem", depth=1)
    with pytest.raises(UserError, match=r"^backbone\.layers\.0\.mixer\.inner: .*linear\.targets"):
        net(batch())
    targeted = {"kind": "by_modality", "groups": GROUPS, "targets": ["out", "gate_up"]}
    net = lm(targeted, pattern="lem", depth=1)
    kinds = {type(m).__name__ for m in net.backbone.layers[0].mixer.modules()}
    assert {"Dense", "ByModality"} <= kinds and torch.isfinite(net(batch()).hidden).all()
