"""Several next tokens from one place: further heads that are drafts, and a training signal.

P places, D model, N ids, K heads besides the first.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn

from mm.batch import Sum
from mm.kernels.cross_entropy import linear_cross_entropy
from mm.model.context import Ctx
from mm.model.heads.softmax import Categorical, Softmax, SoftmaxConfig
from mm.model.layer import HeadOut
from mm.registry import HEADS
from mm.state import State

DRAFTS = "drafts"  # the intermediate that asks for them


class Drafts(NamedTuple):
    """The distribution, and logits `(P, K, N)` of the tokens after it."""

    logits: Tensor
    drafts: Tensor

    log_prob = Categorical.log_prob
    sample = Categorical.sample


class MultiToken(Softmax):
    """The softmax head, and ``ahead`` further ones: head k predicts the token k places later.

    One feed-forward layer of ``ahead`` parts, each added to the hidden state, in front of the same
    matrix to the ids. Their loss is reported as ``multi_token``: the objective's aux_weights weigh
    it. Source: Stern et al. 2018 (arXiv:1811.03115), section 6: a hidden layer of k times the
    width, k outputs with residual connections, one projection.
    """

    def __init__(self, d_model: int, n_ids: int, config: MultiTokenConfig):
        super().__init__(d_model, n_ids, config)
        self.ahead = config.ahead
        self.up = nn.Linear(d_model, config.ahead * config.hidden)
        self.down = nn.Parameter(torch.empty(config.ahead, config.hidden, d_model))

    def init_weights(self) -> None:
        super().init_weights()
        nn.init.normal_(self.up.weight, std=self.up.weight.shape[1] ** -0.5)
        nn.init.zeros_(self.up.bias)
        nn.init.normal_(self.down, std=0.1 * self.down.shape[1] ** -0.5)

    def states(self, h_PD: Tensor) -> Tensor:
        """`(K, P, D)` hidden states of the further heads."""
        P = h_PD.shape[0]
        up = nn.functional.relu(self.up(h_PD))
        up = up.view(P, self.ahead, self.down.shape[1]).transpose(0, 1)
        return h_PD + up @ self.down.to(up.dtype)

    def forward(
        self,
        h_BTD: Tensor,
        ctx: Ctx,
        places_P: Tensor,
        target: Any = None,
        state: State | None = None,
    ) -> HeadOut:
        out = super().forward(h_BTD, ctx, places_P, target, state)
        flat, first = h_BTD.flatten(0, 1), places_P.long()
        if target is None:
            if DRAFTS not in ctx.return_intermediates:
                return out
            states = self.narrow(self.states(flat.index_select(0, first)))
            drafts = nn.functional.linear(states, self.weight.to(states.dtype)).transpose(0, 1)
            assert out.dist is not None and out.dist.logits is not None
            return HeadOut(None, Drafts(out.dist.logits, drafts))
        document = ctx.layout.fields.document.flatten()
        ids = (target[:, self.stream] if target.dim() == 2 else target).long()
        which = torch.full((len(flat) + self.ahead,), -1, device=first.device)
        which[first] = torch.arange(len(first), device=first.device)
        states = self.narrow(self.states(flat.index_select(0, first)))
        total, count = flat.new_zeros((), dtype=torch.float32), torch.zeros((), device=flat.device)
        for k in range(1, self.ahead + 1):
            # The place k later, where it is one of the places and of the same document.
            later = which[first + k]
            there = first[later.clamp_min(0)]
            known = (later >= 0) & (document[there] == document[first])
            nll = linear_cross_entropy(
                states[k - 1],
                self.weight,
                torch.where(known, ids[later.clamp_min(0)], 0),
                z_loss=0.0,
                softcap=self.softcap,
            )
            total = total + (nll.float() * known).sum()
            count = count + known.sum()
        return out._replace(aux={**out.aux, "multi_token": Sum(total, count.detach())})


@HEADS.register("multi_token")
class MultiTokenConfig(SoftmaxConfig):
    """Softmax of the next token, and ``ahead`` heads of the ones after it.

    Give `objective.aux_weights` a `multi_token`, else they do not learn.
    """

    kind: Literal["multi_token"] = "multi_token"  # type: ignore[assignment]
    ahead: Annotated[int, Field(gt=0, le=64, description="heads besides the first")] = 3
    hidden: Annotated[int, Field(gt=0, description="width of each one's hidden layer")] = 256

    def build(self, d_model: int, n_ids: int) -> MultiToken:
        return MultiToken(d_model, n_ids, self)

    small = {"ahead": 2, "hidden": 8}
