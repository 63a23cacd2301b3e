"""Mixture of experts.

B rows, T tokens, D model, F hidden units of an expert, E experts, K chosen ones, R = B T,
P = K R choices.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from mm.batch import Sum
from mm.model.context import Ctx
from mm.model.ffn.experts import Plan, StackedLinear, from_experts, make_plan, to_experts
from mm.model.ffn.mlp import ACTIVATIONS, MLP, Activation, MlpConfig, gated_product
from mm.model.layer import FeedForward, Linear, LinearFactory, Out
from mm.model.layer_config import LayerConfig
from mm.registry import FFNS
from mm.state import State


class Router(Linear):
    """``x @ weight.T`` in float32 or wider, whatever autocast says: `(R, E)`."""

    name = "router"

    def __init__(self, d_model: int, n: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n, d_model))

    def init_weights(self) -> None:
        nn.init.normal_(self.weight, std=self.weight.shape[1] ** -0.5)

    def rescale(self, factor: float) -> None:
        with torch.no_grad():
            self.weight.mul_(factor)

    def forward(self, x: Tensor, ctx: Ctx | None = None) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.to(wide), self.weight.to(wide))


class MoE(FeedForward):
    """``shared(x) + sum over the K best e of g_e(x) expert_e(x)``, g the gates of the router.

    A token's experts depend on that token alone, so no token is dropped, and training, packing and
    serving agree. With ``capacity`` an expert takes that many times its even share of a training
    pass, first choices first; what is over passes by in the residual (GShard). Evaluation and
    serving drop nothing.

    The load is evened by a bias that only chooses: after a step an expert with less than the mean
    load gets ``bias_rate`` more, one with more gets less. Or by the losses that it reports, for the
    objective's ``aux_weights``: ``balance``, E times the sum over experts of their share of choices
    and their mean gate (1 when even), of a micro-batch; ``router_z``, the mean square of the
    router's log-sum-exp. Statistics: ``load`` (choices by expert), ``load_max`` (of the fullest, in
    even shares), ``router_entropy`` (nats of a token), ``dropped`` (share of choices).

    Source: Shazeer et al. 2017 (arXiv:1701.06538), eq. 1; balance: Fedus et al. 2021, Switch
    (arXiv:2101.03961), eq. 4-6; capacity: Lepikhin et al. 2020, GShard (arXiv:2006.16668), section
    2.2; router_z: Zoph et al. 2022, ST-MoE (arXiv:2202.08906), eq. 5; bias, shared experts and
    sigmoid gates: DeepSeek-V3 (arXiv:2412.19437), eq. 12-16; gated shared experts: Qwen2
    (arXiv:2407.10671), section 2.2.2, as in its code.
    """

    bias: Tensor | None

    def __init__(self, d_model: int, config: MoeConfig, linear: LinearFactory):
        super().__init__()
        c = self.config = config
        # The kept choices of a pass depend on all of its tokens.
        whole = None if c.capacity else "local"
        self.caps = dataclasses.replace(type(self).caps, exact=not c.capacity, shard=whole)
        width = c.width(d_model)
        self.router = Router(d_model, c.experts)
        first = 2 * width if c.gated else width
        self.up = StackedLinear(c.experts, d_model, first, "gate_up" if c.gated else "up")
        self.out = StackedLinear(c.experts, width, d_model, "out")
        self.shared = self.shared_gate = None
        if c.shared:
            like = MlpConfig(hidden=c.shared * width, activation=c.activation, gated=c.gated)
            self.shared = MLP(d_model, like, linear)
            self.shared_gate = linear(d_model, 1, "shared_gate") if c.shared_gate else None
        self.register_buffer("bias", torch.empty(c.experts) if c.bias_rate else None)

    def init_weights(self) -> None:
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Move like any module, but the bias never below float32: its steps are small."""
        old = self.bias
        super()._apply(fn, recurse)
        if old is not None and self.bias is not None and self.bias.dtype.itemsize < 4:
            self.bias = old.to(self.bias.device)
        return self

    def after_step(self, stats: Mapping[str, Sum]) -> None:
        if self.bias is None or "load" not in stats:
            return
        load = stats["load"].total.to(self.bias)
        with torch.no_grad():
            self.bias.add_((load.mean() - load).sign(), alpha=self.config.bias_rate)

    def forward(self, x_BTD: Tensor, ctx: Ctx, state: State | None = None) -> Out:
        x = x_BTD.flatten(0, 1)
        real = ctx.layout.fields.document.flatten() > 0
        training = self.training and torch.is_grad_enabled()
        logits = self.router(x)
        score = logits.softmax(-1) if self.config.gate == "softmax" else logits.sigmoid()
        plan, gate = self._choose(score, real, training)
        hidden = self.up(to_experts(x, plan), plan.ends)
        if self.config.gated:
            first, second = hidden.chunk(2, dim=-1)
            hidden = gated_product(first, second, self.config.activation)
        else:
            hidden = ACTIVATIONS[self.config.activation](hidden)
        given = from_experts(self.out(hidden, plan.ends), plan).unflatten(0, (-1, x.shape[0]))
        y = (given.to(gate.dtype) * gate[..., None]).sum(0).to(given.dtype).view(x_BTD.shape)
        if self.shared is not None:
            always = self.shared(x_BTD, ctx).y
            if self.shared_gate is not None:
                always = always * self.shared_gate(x_BTD, ctx).sigmoid().to(always.dtype)
            y = y + always
        return Out(y, aux=self._report(logits, score, real, plan) if training else {})

    def _choose(self, score_RE: Tensor, real_R: Tensor, training: bool) -> tuple[Plan, Tensor]:
        """Where choices lie, and their gates `(K, R)`."""
        c = self.config
        ranked = score_RE.detach() if self.bias is None else score_RE.detach() + self.bias
        best_RK = ranked.topk(c.top_k, dim=-1).indices
        gate = score_RE.gather(-1, best_RK)
        if c.normalise:
            gate = gate / gate.sum(-1, keepdim=True).clamp_min(1e-20)
        chosen = best_RK.masked_fill(~real_R[:, None], c.experts).T.flatten()  # first choices first
        most = None
        if c.capacity and training:
            even = real_R.sum() * (c.top_k / c.experts)
            most = (c.capacity * even).ceil().long()
        return make_plan(chosen, c.experts, most), gate.T * c.scale

    def _report(
        self, logits_RE: Tensor, score_RE: Tensor, real_R: Tensor, plan: Plan
    ) -> dict[str, Sum]:
        c, n = self.config, real_R.sum().to(logits_RE.dtype)
        probability = score_RE / score_RE.sum(-1, keepdim=True).clamp_min(1e-20)
        total = lambda each_R: each_R.masked_fill(~real_R, 0).sum()
        load = plan.load.to(logits_RE.dtype)
        share = load / (c.top_k * n).clamp_min(1)
        gates = probability.masked_fill(~real_R[:, None], 0).sum(0)
        with torch.no_grad():
            entropy = total(torch.special.entr(probability).sum(-1))
            dropped = load.sum() - plan.kept.sum()
        return self.report(
            balance=Sum(c.experts * (share * gates).sum(), n),
            router_z=Sum(total(logits_RE.logsumexp(-1).square()), n),
            load=Sum(load, n),
            load_max=Sum(c.experts * share.max() * n, n),
            router_entropy=Sum(entropy, n),
            dropped=Sum(dropped, c.top_k * n),
        )


@FFNS.register("moe")
class MoeConfig(LayerConfig):
    """Routed experts; ``hidden`` None makes all that a token uses as wide as `mlp` by default."""

    kind: Literal["moe"] = "moe"
    experts: Annotated[int, Field(gt=1)] = 8
    top_k: Annotated[int, Field(gt=0, description="experts of a token")] = 2
    shared: int = Field(default=0, ge=0, description="experts that every token uses")
    shared_gate: bool = Field(
        default=False, description="sigmoid gate, one a token, of what the shared experts give"
    )
    hidden: Annotated[int, Field(gt=0)] | None = Field(default=None, description="of one expert")
    activation: Activation = "silu"
    gated: bool = True
    gate: Literal["softmax", "sigmoid"] = Field(
        default="sigmoid", description="sigmoid: what a bias evens well; softmax: with losses"
    )
    normalise: bool = Field(default=True, description="gates of the chosen experts sum to 1")
    scale: Annotated[float, Field(gt=0, description="of the routed experts' sum")] = 1.0
    capacity: float = Field(
        default=0.0, ge=0, description="of an expert in a training pass, in even shares; 0: no end"
    )
    bias_rate: float = Field(
        default=1e-3, ge=0, description="step of the bias that evens the load; 0: no bias"
    )

    layer = MoE
    small = {"experts": 4, "hidden": 8, "shared": 1}

    @model_validator(mode="after")
    def _can_choose(self) -> MoeConfig:
        if self.top_k > self.experts:
            raise ValueError(f"moe: top_k {self.top_k} is more than experts {self.experts}")
        if self.top_k == 1 and self.normalise:
            raise ValueError("moe: top_k 1 needs normalise: false, or its router learns nothing")
        if self.shared_gate and not self.shared:
            raise ValueError("moe: shared_gate needs shared experts")
        return self

    def width(self, d_model: int) -> int:
        """Hidden units F of one expert."""
        if self.hidden is not None:
            return self.hidden
        whole = MlpConfig(gated=self.gated).width(d_model)
        return -(-whole // (8 * (self.top_k + self.shared))) * 8
