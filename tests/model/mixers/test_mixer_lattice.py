"""Lattice against autograd of its own loss, and what makes its update special."""

from __future__ import annotations

import pytest
import torch
from laws import TOL, D, alone, documents
from torch import Tensor

from mm.model.layer import init_weights
from mm.model.mixers.test_time.lattice import Lattice
from mm.registry import MIXERS


def build(objective: str, batch: int) -> Lattice:
    torch.manual_seed(4)
    config = MIXERS.get("lattice")(heads=2, slots=3, objective=objective, mini_batch=batch)
    layer = config.build(D)
    init_weights(layer)
    return layer.double()


def steps(layer: Lattice, x: Tensor) -> Tensor:
    """Gradient steps on the stated loss, by autograd, gradients at the last border: `(T, D)`."""
    T, H, C = len(x), layer.heads, layer.batch
    codes = (x @ layer.codes.weight.T).view(T, 2, H, -1)
    q, k = (codes / codes.norm(dim=-1, keepdim=True)).unbind(1)
    v = (x @ layer.value.weight.T).view(T, H, -1)
    alpha, eta = ((x @ layer.gates.weight.T).view(T, 2, H) + layer.gate_bias).sigmoid().unbind(1)
    s = border = layer.slots
    out = []
    for t in range(T):
        if t % C == 0:
            border = s

        def loss(slots: Tensor, t: int = t) -> Tensor:
            u = slots / slots.norm(dim=-1, keepdim=True)
            read = (k[t][..., None] * u).sum(1)
            if layer.config.objective == "similarity":
                return -(read * v[t]).sum()
            return (read - v[t]).square().sum() / 2

        (grad,) = torch.autograd.grad(loss(at := border.detach().requires_grad_()), at)
        s = alpha[t][:, None, None] * s - eta[t][:, None, None] * grad
        out.append((q[t][..., None] * s / s.norm(dim=-1, keepdim=True)).sum(1).flatten())
    return torch.stack(out) @ layer.out.weight.T


@pytest.mark.parametrize("objective", ["regression", "similarity"])
@pytest.mark.parametrize("batch", [1, 4])
def test_lattice_takes_gradient_steps_on_normalised_slots(objective: str, batch: int) -> None:
    layer, (x,) = build(objective, batch), documents(11)
    torch.testing.assert_close(alone(layer, x), steps(layer, x), rtol=1e-8, atol=1e-9)


def test_a_slot_takes_up_only_what_is_orthogonal_to_it() -> None:
    layer, g = build("similarity", 1), torch.Generator().manual_seed(0)
    slots = torch.randn(1, 2, 3, 8, dtype=torch.float64, generator=g)
    k = torch.randn(1, 1, 2, 3, dtype=torch.float64, generator=g)
    ones = torch.ones(1, 1, 2, 2, dtype=torch.float64)  # nothing fades
    v = torch.randn(1, 1, 2, 8, dtype=torch.float64, generator=g)
    _, (after,) = layer.learn((slots,), (k, k, v, ones))
    assert ((after - slots) * slots).sum(-1).abs().max() < 1e-9 < (after - slots).abs().max()
    along = 3 * slots[:, :, 1][:, None]  # parallel to slot 1 of each head
    _, (after,) = layer.learn((slots,), (k, k, along, ones))
    torch.testing.assert_close(after[:, :, 1], slots[:, :, 1], **TOL)
    assert (after[:, :, 0] - slots[:, :, 0]).abs().max() > 1e-3
