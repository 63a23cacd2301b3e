"""Every registered linear inside mixers and feed-forwards: trains, saves, is packed as alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from generation_toys import VOCABULARY, V

from mm.batch import Batch
from mm.errors import UserError
from mm.layout import Doc, Layout
from mm.mask import Causal
from mm.model.context import Ctx
from mm.model.layer import Linear, init_weights
from mm.model.linears.lora import (
    Lora,
    LoraConfig,
    loras_in,
    merge_adapters,
    save_adapters,
    unmerge_adapters,
)
from mm.model.linears.nf4 import LEVELS, Nf4, Nf4Config
from mm.model.linears.ternary import TernaryConfig
from mm.model.model import Model
from mm.registry import LINEARS, NETWORKS
from mm.trainer.fit_weights import adapters

FORMS: dict[str, Any] = {kind: LINEARS.get(kind).smallest().to_dict() for kind in LINEARS} | {
    "dora": {"kind": "lora", "rank": 2, "dora": True, "dropout": 0.2},
    "qlora": {"kind": "lora", "base_layer": {"kind": "nf4", "double": True}, "rs": True},
    "targeted": {"kind": "lora", "targets": ["qkv", "gate*"]},
    "upon": {"kind": "lora", "base_layer": "by_modality"},
}
INSIDE = ("attention swiglu", "mamba mlp", "delta_rule swiglu", "rg_lru moe")


def model(linear: Any, inside: str, seed: int = 1) -> Model:
    torch.manual_seed(seed)
    mixer, ffn = inside.split()
    backbone = {"kind": "stack", "depth": 2, "pattern": mixer, "ffn": ffn}
    made = NETWORKS.parse({"kind": "lm", "d_model": 32, "backbone": backbone, "linear": linear})
    net = made.build(VOCABULARY)
    init_weights(net)
    return net


def batch(*rows: list[int], seed: int = 0) -> Batch:
    layout = Layout.from_rows([[Doc(n) for n in row] for row in rows])
    ids = torch.randint(V, layout.shape, generator=torch.Generator().manual_seed(seed))
    return Batch.of_ids(ids, layout)


def loss(net: Model, b: Batch, **kw: Any) -> torch.Tensor:
    nll = net(b, **kw).heads["tokens"].nll
    assert nll is not None
    return nll.mean()


@pytest.mark.parametrize("form", sorted(FORMS))
@pytest.mark.parametrize("inside", INSIDE)
def test_a_linear_trains_saves_and_is_packed_as_alone(
    form: str, inside: str, tmp_path: Path
) -> None:
    net = model(FORMS[form], inside)
    b = batch([9, 7], [16])
    learned = [p for p in net.parameters() if p.requires_grad]
    before = [p.detach().clone() for p in net.parameters()]
    optimizer = torch.optim.AdamW(learned, lr=1e-2)
    first = loss(net, b).item()
    for step in range(8):
        optimizer.zero_grad()
        loss(net.train(), b, seed=step).backward()
        optimizer.step()
    net.eval()
    assert loss(net, b).item() < first - 0.1
    moved = [not torch.equal(a, p) for a, p in zip(before, net.parameters(), strict=True)]
    assert all(moved), "a parameter without a gradient"
    net.save_pretrained(tmp_path / "saved")
    again = Model.from_pretrained(tmp_path / "saved")
    assert torch.equal(net(b, heads=()).hidden, again(b, heads=()).hidden)
    net = net.double()
    whole = net(b, heads=()).hidden
    ids = b.ids[0, :9, :].squeeze(-1)[None]
    alone = net(Batch.of_ids(ids, Layout.from_rows([[Doc(9)]])), heads=()).hidden
    torch.testing.assert_close(whole[0, :9], alone[0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("form", sorted(FORMS))
def test_its_declarations_hold(form: str) -> None:
    """Wide matrices and adapters are its own parameters; dense tensors become its own, all."""
    config = LINEARS.parse(FORMS[form])
    part = config.build(24, 16, "qkv").eval()
    init_weights(part)
    ctx = Ctx(Layout.plain(1, 5), Causal())
    own = dict(part.named_parameters(recurse=False))
    assert {*part.wide_parameters, *part.adapter_parameters} <= own.keys()
    assert all(p.dim() < 2 or n in (*part.wide_parameters, "lora_b") for n, p in own.items())
    weight = torch.randn(16, 24, generator=torch.Generator().manual_seed(3))
    taken = part.from_dense({"weight": weight})
    rest = part.state_dict().keys() - taken.keys()
    assert rest <= {*part.adapter_parameters}, "what no dense matrix gives is an adapter"
    part.load_state_dict(taken, strict=False)
    x = torch.randn(1, 5, 24)
    y = part(x, ctx)
    if part.exact or "by_modality" in str(FORMS[form]):  # of tokens of one group
        two = part(2 * x, ctx) - y
        torch.testing.assert_close(two, y, rtol=1e-4, atol=1e-5)
        error = (y - x @ weight.T).norm() / (x @ weight.T).norm()
        assert error < (0.15 if "nf4" in str(FORMS[form]) else 1e-6)
    part.rescale(0.5)
    torch.testing.assert_close(part(x, ctx), y / 2, rtol=2e-2, atol=2e-2)
    assert config.build(24, 16, "out").ends_branch
    ends = [m for m in config.build(24, 16, "out").modules() if isinstance(m, Linear)]
    assert sum(m.ends_branch for m in ends) == 1, "depth would scale it twice"


@pytest.mark.parametrize("form", ["lora", "dora", "qlora", "targeted"])
def test_adapters_begin_as_nothing_and_stand_apart(form: str, tmp_path: Path) -> None:
    """The output is the base's, bit by bit; afterwards they are saved without it."""
    net = model(FORMS[form], "attention swiglu").eval()
    b = batch([9, 7])
    bases = [part.base for part in loras_in(net)]
    assert len(bases) == (4 if form == "targeted" else 8)
    with_adapters = net(b, heads=()).hidden
    for layer in net.backbone.modules():
        for name, part in list(layer.named_children()):
            if isinstance(part, Lora):
                setattr(layer, name, part.base)
    assert torch.equal(net(b, heads=()).hidden, with_adapters)
    net = model(FORMS[form], "attention swiglu").eval()
    save_adapters(net, tmp_path / "adapters.safetensors")
    from mm.model.folder import load_tensors

    saved = load_tensors(tmp_path / "adapters.safetensors")
    assert saved.keys() == set(adapters(net)) and len(saved) == len(bases) * (
        3 if form == "dora" else 2
    )
    with pytest.raises(UserError, match="no adapters"):
        save_adapters(model("dense", "attention swiglu"), tmp_path / "none")


@pytest.mark.parametrize("form", ["lora", "dora", "targeted"])
def test_merged_is_as_adapted_and_comes_apart_again(form: str) -> None:
    net = model(FORMS[form], "attention swiglu").eval()
    b = batch([9, 7])
    with torch.no_grad():
        for part in loras_in(net):
            part.lora_b.normal_(std=0.3)
            if part.magnitude is not None:
                part.magnitude.mul_(torch.linspace(0.5, 1.5, len(part.magnitude)))
    wanted, state = net(b, heads=()).hidden, {k: v.clone() for k, v in net.state_dict().items()}
    merge_adapters(net)
    merge_adapters(net)
    torch.testing.assert_close(net(b, heads=()).hidden, wanted, rtol=1e-5, atol=1e-5)
    with pytest.raises(RuntimeError, match="unmerge_adapters"):
        net.state_dict()
    unmerge_adapters(net)
    for name, value in net.state_dict().items():
        torch.testing.assert_close(value, state[name], rtol=1e-5, atol=1e-5)
    for part in loras_in(net):
        x = torch.randn(3, part.lora_a.shape[1])
        torch.testing.assert_close(x @ part.dense_weight().T, part(x), rtol=1e-4, atol=1e-5)


def test_scales_of_lora_and_rslora() -> None:
    assert LoraConfig(rank=16, alpha=8).build(4, 4).scale == 0.5  # type: ignore[union-attr]
    assert LoraConfig(rank=16, alpha=8, rs=True).build(4, 4).scale == 2  # type: ignore[union-attr]
    with pytest.raises(UserError, match="dora needs a base that is a plain matrix"):
        LoraConfig(base_layer=TernaryConfig(), dora=True).build(4, 4)
    for base in (Nf4Config(), TernaryConfig()):
        part = LoraConfig(base_layer=base).build(64, 4)
        init_weights(part)
        with pytest.raises(UserError, match="dense matrix"):
            part.merge()  # type: ignore[union-attr]


def test_a_direction_keeps_its_learned_length_in_dora() -> None:
    """Rows of what multiplies are as long as the magnitudes say, whatever the adapter adds."""
    part = LoraConfig(dora=True, rank=2).build(12, 8)
    init_weights(part)
    assert isinstance(part, Lora) and part.magnitude is not None
    with torch.no_grad():
        part.lora_b.normal_()
        part.magnitude.copy_(torch.arange(1.0, 9.0))
    torch.testing.assert_close(part(torch.eye(12)).T.norm(dim=1), part.magnitude.detach())


def test_ternary_by_hand() -> None:
    """Eq. 1-3 of BitNet b1.58: mean magnitude 1, so 0.4 -> 0, 1.6 -> 1; gradients pass."""
    part = TernaryConfig(norm=False).build(4, 1)
    with torch.no_grad():
        part.weight.copy_(torch.tensor([[0.4, -1.6, 1.2, -0.8]]))
    assert torch.equal(part.rounded_weight(), torch.tensor([[0.0, -1.0, 1.0, -1.0]]))
    x = torch.tensor([[127.0, 3.2, -60.4, 0.0]], requires_grad=True)
    y = part(x)
    torch.testing.assert_close(y, torch.tensor([[-3.0 - 60.0]]))
    y.sum().backward()
    assert torch.equal(x.grad, part.rounded_weight())  # type: ignore[arg-type]
    torch.testing.assert_close(part.weight.grad, torch.tensor([[127.0, 3.0, -60.0, 0.0]]))
    wide = TernaryConfig().build(64, 32)
    init_weights(wide)
    scale = wide.weight.abs().mean()  # type: ignore[union-attr]
    assert len((wide.rounded_weight() / scale).mul(1e5).round().unique()) == 3


@pytest.mark.parametrize("double", [False, True])
def test_nf4_by_hand(double: bool) -> None:
    """Its levels are kept exactly; of a normal matrix under 1 % of the variance is lost."""
    part = Nf4Config(double=double).build(16, 8)
    assert isinstance(part, Nf4)
    weight = 3 * torch.tensor(LEVELS).repeat(8, 1)
    part._set(weight)
    torch.testing.assert_close(part.matrix(), weight, rtol=1e-6, atol=1e-6)
    odd = Nf4Config(double=double).build(37, 501)  # no whole number of blocks
    assert isinstance(odd, Nf4)
    weight = torch.randn(501, 37, generator=torch.Generator().manual_seed(0))
    odd._set(weight)
    lost = (odd.matrix() - weight).square().mean() / weight.square().mean()
    assert 0.005 < lost < 0.01
    bits = 8 * sum(b.numel() for b in odd.buffers()) / weight.numel()
    assert bits < (4.14 if double else 4.51)
    assert torch.equal(odd.bfloat16().matrix(), odd.float().matrix()), "scales are bytes"


def test_a_step_keeps_the_four_bits_of_nf4_and_no_matrix() -> None:
    part = Nf4Config(double=True).build(256, 128)
    init_weights(part)
    x = torch.randn(3, 256, generator=torch.Generator().manual_seed(0), requires_grad=True)
    kept: dict[int, int] = {}

    def note(t: torch.Tensor) -> torch.Tensor:
        kept[t.data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        y = part(x)
    assert sum(kept.values()) < 0.52 * 256 * 128  # bytes
    wanted = torch.nn.functional.linear(x, part.matrix())
    assert torch.equal(y, wanted)
    out = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    (one,), (two,) = (torch.autograd.grad(z, x, out) for z in (y, wanted))
    torch.testing.assert_close(one, two)
