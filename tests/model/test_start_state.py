"""Learned beginnings: an initial State, keys and values, a prompt; against what they must equal."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from generation_toys import VOCABULARY, V

from mm.batch import Batch
from mm.errors import UserError
from mm.layout import Doc, Layout
from mm.model.layer import init_weights
from mm.registry import NETWORKS
from mm.run import Stage
from mm.trainer.trainable import set_trainable

HYBRID = "gated_deltanet attention mamba2"


def model(start: Any, pattern: str = HYBRID, seed: int = 0) -> Any:
    config = {
        "kind": "lm",
        "d_model": 32,
        "backbone": {"kind": "stack", "pattern": pattern},
        "start": start,
    }
    net = NETWORKS.parse(config).build(VOCABULARY)
    torch.manual_seed(seed)
    init_weights(net)
    return net.eval()


def moved(net: Any) -> Any:
    """With a beginning that is not what it was built with."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in net.start.leaves:
            p.add_(0.5 * torch.randn(p.shape, generator=generator))
    return net


def ids_of(*lengths: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(lengths))
    return torch.randint(16, V, (1, sum(lengths)), generator=generator)


def hidden(net: Any, ids: torch.Tensor, layout: Layout, **more: Any) -> torch.Tensor:
    return net(Batch.of_ids(ids, layout), loss=False, heads=(), **more).hidden


@pytest.mark.parametrize("pattern", [HYBRID, "mlstm", "rwkv6", "rg_lru"])
def test_an_initial_state_of_nothing_is_the_base_and_trains_alone(pattern: str) -> None:
    base, net = model(None, pattern), model({"kind": "state"}, pattern)
    own = {k: t for k, t in net.state_dict().items() if not k.startswith("start.")}
    assert own.keys() == base.state_dict().keys()
    net.load_state_dict(base.state_dict(), strict=False)
    ids, layout = ids_of(7, 5), Layout.from_rows([[Doc(7), Doc(5)]])
    torch.testing.assert_close(hidden(net, ids, layout), hidden(base, ids, layout))

    set_trainable(net, Stage.model_construct(train=None, freeze=()), "stages.0")
    assert {n for n, p in net.named_parameters() if p.requires_grad} == {
        n for n, _ in net.named_parameters() if n.startswith("start.")
    }
    hidden(net, ids, layout).square().sum().backward()
    assert all(p.grad is None for p in net.parameters() if not p.requires_grad)
    grads = [p.grad for p in net.start.leaves if p.grad is not None]
    assert len(grads) >= len(net.start.leaves) / 2 and all(g.isfinite().all() for g in grads)
    assert sum(float(g.abs().sum()) for g in grads) > 0


def test_its_parameters_are_the_recurrent_layers_state() -> None:
    net = model({"kind": "state"})
    states = net.backbone.initial_state(1, 4).parts
    wanted = sum(t.numel() for i in (0, 2) for t in states[i].leaves())
    assert sum(p.numel() for p in net.start.parameters()) == wanted
    with pytest.raises(UserError, match=r"model\.start: state: no layer has such a state"):
        model({"kind": "state"}, "attention")


@pytest.mark.parametrize("kind", ["state", "prefix", "prompt"])
def test_packed_chunked_and_stepped_begin_alike(kind: str) -> None:
    """Documents that share a row, alone, in chunks and token by token; a slot that is used anew."""
    net = moved(model({"kind": kind, "length": 3}))
    ids = ids_of(7, 5)
    packed = hidden(net, ids, Layout.from_rows([[Doc(7), Doc(5)]]))
    for first, stop in ((0, 7), (7, 12)):
        part, n = ids[:, first:stop], stop - first
        wanted = packed[:, first:stop]
        torch.testing.assert_close(hidden(net, part, Layout.plain(1, n)), wanted)
        for sizes in ([3, n - 3], [1] * n):
            state, at, got = net.initial_state(1, n), 0, []
            for size in sizes:
                doc = Doc(size, slot=0, fresh=at == 0, start=at)
                batch = Batch.of_ids(part[:, at : at + size], Layout.from_rows([[doc]]))
                out = net(batch, loss=False, heads=(), state=state)
                state, at = out.state, at + size
                got.append(out.hidden)
            torch.testing.assert_close(torch.cat(got, 1), wanted)
        again = Layout.from_rows([[Doc(n, slot=0)]])  # the slot's State is of another document
        used = Batch.of_ids(ids[:, :4], Layout.from_rows([[Doc(4, slot=0)]]))
        state = net(used, loss=False, state=net.initial_state(1, n)).state
        torch.testing.assert_close(hidden(net, part, again, state=state), wanted)


def test_a_prefix_is_read_as_further_keys_and_values() -> None:
    """Softmax by hand over the prefix and the tokens of one layer of attention."""
    net = moved(model({"kind": "prefix", "length": 3}, "attention"))
    T, ids, seen = 6, ids_of(6), {}
    mixer = net.backbone.layers[0].mixer
    mixer.out.register_forward_pre_hook(lambda m, args: seen.update(o=args[0]))
    mixer.register_forward_pre_hook(lambda m, args: seen.update(x=args[0], ctx=args[1]))
    hidden(net, ids, Layout.plain(1, T))
    (q, k, v), _ = mixer.project(seen["x"], seen["ctx"], None, False)
    H, K = q.shape[2:]
    keys, values = (torch.cat([p, t[0]]) for p, t in zip(net.start.leaves, (k, v), strict=True))
    for t in range(T):
        for h in range(H):
            g = h // (H // keys.shape[1])
            weights = (keys[: 3 + t + 1, g] @ q[0, t, h] * K**-0.5).softmax(0)
            wanted = weights @ values[: 3 + t + 1, g]
            torch.testing.assert_close(seen["o"][0, t].view(H, -1)[h], wanted)


def test_a_prompt_is_read_as_vectors_before_the_document() -> None:
    """The backbone over prompt and tokens in one row, without any State."""
    net = moved(model({"kind": "prompt", "length": 4}))
    ids, T = ids_of(6), 6
    plain = model(None)
    plain.load_state_dict({k: t for k, t in net.state_dict().items() if "start." not in k})
    plain.backbone.register_forward_pre_hook(
        lambda m, args: (torch.cat([net.start.leaves[0][None], args[0][:, 4:]], 1), *args[1:])
    )
    row = torch.cat([torch.full((1, 4), 20), ids], 1)
    wanted = hidden(plain, row, Layout.plain(1, 4 + T))[:, 4:]
    torch.testing.assert_close(hidden(net, ids, Layout.plain(1, T)), wanted)


def test_noise_of_embeddings_is_that_of_the_paper_and_of_training_alone() -> None:
    config = {"kind": "lm", "d_model": 32, "embedder": {"kind": "sum", "noise": 5.0}}
    net = NETWORKS.parse(config).build(VOCABULARY)
    init_weights(net)
    seen: list[torch.Tensor] = []
    net.embedder.register_forward_hook(lambda m, args, out: seen.append(out.y.detach()))
    ids, layout = ids_of(9, 4), Layout.from_rows([[Doc(9), Doc(4)]], 15)
    batch = Batch.of_ids(torch.nn.functional.pad(ids, (0, 2)), layout)
    for training, seed in ((False, 0), (True, 1), (True, 1), (True, 2)):
        net.train(training)(batch, loss=False, heads=(), seed=seed)
    clean, first, again, other = seen
    assert torch.equal(first, again) and not torch.equal(first, other)
    for start, stop, length in ((0, 9, 9), (9, 13, 4)):
        drawn = (first - clean)[:, start:stop] * (length * 32) ** 0.5 / 5.0
        assert 0.9 < float(drawn.abs().max()) <= 1.0 + 1e-5 and abs(float(drawn.mean())) < 0.2
    assert torch.equal(first[:, 13:], clean[:, 13:]), "padding stays as it is"
