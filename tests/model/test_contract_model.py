"""The laws of tests/test_contract.py that belong to a whole model and to the Context."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from laws import (
    MAX_LEN,
    TOL,
    VOCABULARY,
    build,
    documents,
    packed,
)

from mm.batch import Batch
from mm.layout import Doc, Layout
from mm.mask import Causal
from mm.model.context import Ctx
from mm.model.layer import Backbone, init_weights
from mm.registry import (
    BACKBONES,
    NETWORKS,
)

# ---- full == chunked == packed serving == step == drafted ----


# ---- the whole model keeps the laws of its parts ----


def test_backbones_own_one_state_per_visit() -> None:
    for kind in BACKBONES:
        layer = build(f"backbone:{kind}")
        assert isinstance(layer, Backbone)
        path = [0, 1, 1, 0]
        x, layout = packed([[(0, documents(6)[0], 0)]])
        whole = layer(x, Ctx(layout, Causal()), None, path).y
        with torch.no_grad():
            state = layer.initial_state(1, MAX_LEN, path=path)  # type: ignore[call-arg]
            got = []
            for t in range(6):
                one, layout = packed([[(0, x[0, t : t + 1], t)]])
                out = layer(one, Ctx(layout, Causal()), state, path)
                state = out.state
                got.append(out.y[0])
        torch.testing.assert_close(torch.cat(got), whole[0], **TOL)


def test_a_model_served_from_slots_equals_the_model_on_whole_documents() -> None:
    config = NETWORKS.get("lm").smallest()
    torch.manual_seed(0)
    model = config.build(VOCABULARY)
    init_weights(model)
    model.double()
    ids = torch.randint(VOCABULARY.size, (1, 8))
    whole = model(Batch.of_ids(ids), loss=False).heads["tokens"].dist.logits
    state = model.initial_state(1, 8)
    with torch.no_grad():
        for t in range(8):
            layout = Layout.from_rows([[Doc(1, slot=0, fresh=t == 0, start=t)]])
            out = model(Batch.of_ids(ids[:, t : t + 1], layout), state=state, loss=False)
            state = out.state
            torch.testing.assert_close(out.heads["tokens"].dist.logits[0], whole[t], **TOL)


def test_a_context_is_immutable() -> None:
    ctx = Ctx(Layout.plain(1, 1), Causal())
    with pytest.raises(AttributeError):
        ctx.visit = 3  # type: ignore[misc]
    assert replace(ctx, visit=3).visit == 3 and ctx.visit == 0
