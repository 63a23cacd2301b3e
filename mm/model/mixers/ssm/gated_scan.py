"""Diagonal recurrences whose gates read the token only.

B rows, T tokens, D model, W width, N slots.

One layer, many papers: `configs/mixer/{min_gru,min_lstm,hgrn,gateloop}.yaml` are its presets.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from mm.kernels.complex_scan import complex_scan
from mm.kernels.linear_scan import linear_scan
from mm.model.context import Ctx
from mm.model.layer import Caps, LinearFactory, Mixer, Out, Provider
from mm.model.layer_config import LayerConfig
from mm.model.mixers.linear_attention.lower_bounds import shared_bound, shared_bounds
from mm.model.mixers.ssm.scan import DiagonalScan
from mm.model.norm import RMSNorm
from mm.registry import MIXERS
from mm.state import State

Gate = Literal["update", "forget", "normalised", "free"]
Activation = Literal["identity", "positive", "tanh", "silu", "sigmoid"]


def positive(x: Tensor) -> Tensor:
    """``x + 0.5`` from 0 on, ``sigmoid(x)`` below: positive and continuous.

    Source: Feng et al. 2024 (arXiv:2410.01201), appendix B.
    """
    return torch.where(x >= 0, x + 0.5, torch.sigmoid(x.clamp_max(0)))


def log_positive(x: Tensor) -> Tensor:
    """Logarithm of `positive`. Source: Feng et al. 2024 (arXiv:2410.01201), appendix B."""
    return torch.where(x >= 0, (x.clamp_min(0) + 0.5).log(), F.logsigmoid(x))


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda x: x,
    "positive": positive,
    "tanh": torch.tanh,
    "silu": F.silu,
    "sigmoid": torch.sigmoid,
}


class GatedScan(Mixer):
    """``out(norm(gate(x) * q(x) * h))`` with ``h_t = a_t e^{i phi_t} h_{t-1} + b_t``.

    ``p`` are the gates' pre-activations and ``c`` the candidate (times a key, if ``keyed``):

    * ``update``: ``a = 1 - sigmoid(p)``, ``b = sigmoid(p) c``
    * ``forget``: ``a = lambda``, ``b = (1 - lambda) c``, ``lambda = g + (1 - g) sigmoid(p)``
    * ``normalised``: ``a = f / (f + i)``, ``b = i / (f + i) c``, ``f, i = sigmoid(p_f, p_i)``
    * ``free``: ``a = g + (1 - g) sigmoid(p)``, ``b = c``

    The lower bound ``g`` is learned per channel, by each layer or in one table for all layers (0
    without one). With ``log_space`` the first and third, of positive candidates, are computed and
    carried as logarithms.

    Source: ``update`` and ``normalised``: Feng et al. 2024 (arXiv:2410.01201), sections 3.1 and
    3.2, in logarithms appendix B; ``forget`` with bound and phase: Qin et al. 2023, HGRN
    (arXiv:2311.04823), section 3; ``free`` with the token's phase: Katsch 2023, GateLoop
    (arXiv:2311.01927), section 3, with heads of width 1.
    """

    caps = Caps(causal=True, step=True, shard="carry")

    def __init__(self, d_model: int, config: GatedScanConfig, linear: LinearFactory):
        super().__init__()
        width = config.width or d_model
        self.config, self.width = config, width
        self.complex = config.phase != "none"
        nothing = -torch.inf if config.log_space else 0.0
        self.scan = DiagonalScan(width * (2 if self.complex else 1), nothing)
        values = 2 if config.complex_values else 1
        self.gates = 2 if config.gate == "normalised" else 1
        sizes = {
            "gate": self.gates,
            "candidate": values,
            "phase": int(config.phase == "token"),
            "key": int(config.keyed),
            "query": int(config.keyed),
            "output": values if config.output_gate else 0,
        }
        self.sizes = {name: n * width for name, n in sizes.items() if n}
        self.inner = linear(d_model, sum(self.sizes.values()), "inner")
        self.out = linear(values * width, d_model, "out")
        self.gate_bias = nn.Parameter(torch.empty(self.gates * width))
        own = isinstance(config.lower_bound, float)
        self.bound = nn.Parameter(torch.empty(width)) if own else None
        self.theta = nn.Parameter(torch.empty(width)) if config.phase == "fixed" else None
        self.norm = RMSNorm(values * width) if config.norm else None

    def init_weights(self) -> None:
        c = self.config
        with torch.no_grad():
            # Positive `remember` means a longer memory, whatever the sign of the gate.
            bias = torch.full((self.gates, self.width), -c.remember)
            bias[0] = -c.remember if c.gate == "update" else c.remember
            self.gate_bias.copy_(bias.flatten())
            if self.bound is not None and isinstance(c.lower_bound, float):
                self.bound.fill_(torch.logit(torch.tensor(c.lower_bound)).item())
            if self.theta is not None:
                channel = torch.arange(self.width) / self.width
                self.theta.copy_(10000.0**-channel)  # as rotary positions

    def provider(self) -> tuple[str, Callable[[int], Provider]] | None:
        return shared_bounds(self.width) if self.config.lower_bound == "shared" else None

    def _room(self, ctx: Ctx | None) -> Tensor | None:
        """`(W,)` what the lower bound leaves of decays: 1 - g. None for a bound of 0."""
        if self.bound is not None:
            return torch.sigmoid(-self.bound)
        bound = shared_bound(self, ctx) if ctx is not None else None
        return None if bound is None else 1 - bound

    def _gated(self, p: Tensor, c: Tensor, ctx: Ctx | None = None) -> tuple[Tensor, Tensor]:
        """Size of the decay and input of the recurrence. ``c`` holds one or two parts a channel."""
        kind = self.config.gate
        if kind == "normalised":
            f, i = p.chunk(2, -1)
            # f / (f + i) = sigmoid(log f - log i), without a quotient of two small numbers.
            odds = F.logsigmoid(f) - F.logsigmoid(i)
            a, rest = torch.sigmoid(odds), torch.sigmoid(-odds)
        elif kind == "update":
            a, rest = torch.sigmoid(-p), torch.sigmoid(p)
        else:
            a, rest = torch.sigmoid(p), torch.sigmoid(-p)
            room = self._room(ctx)
            if room is not None:
                room = room.to(p.dtype)
                a, rest = 1 - room * rest, room * rest
        if kind == "free":
            return a, c
        return a, c * (rest if c.shape[-1] == rest.shape[-1] else rest.repeat(1, 1, 2))

    def _log_gated(self, p: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        """Logarithms of what `_gated` gives, of a candidate before its activation."""
        if self.config.gate == "normalised":
            f, i = p.chunk(2, -1)
            odds = F.logsigmoid(f) - F.logsigmoid(i)
        else:
            odds = -p
        return F.logsigmoid(odds), F.logsigmoid(-odds) + log_positive(c)

    def forward(self, x_BTD: Tensor, ctx: Ctx, state: State | None = None) -> Out:
        cfg = self.config
        parts = dict(
            zip(
                self.sizes,
                self.inner(x_BTD, ctx).split(list(self.sizes.values()), dim=-1),
                strict=True,
            )
        )
        wide = torch.promote_types(x_BTD.dtype, torch.float32)
        c, p = parts["candidate"].to(wide), parts["gate"].to(wide) + self.gate_bias.to(wide)
        scan = complex_scan if self.complex else linear_scan
        if cfg.log_space:
            scan = partial(linear_scan, log=True)
            a, b = self._log_gated(p, c)
        else:
            c = ACTIVATIONS[cfg.candidate](c)
            a, b = self._gated(p, c * parts["key"].to(wide) if cfg.keyed else c, ctx)
        if self.complex:
            phase = self.theta.to(wide) if self.theta is not None else parts["phase"].to(wide)
            a = torch.cat((a * phase.cos(), a * phase.sin()), -1)
            if b.shape[-1] < a.shape[-1]:
                b = torch.cat((b, torch.zeros_like(b)), -1)
        h, after = self.scan(scan, a, b, ctx, state)
        if cfg.log_space:
            h = h.exp()
        if self.complex and not cfg.complex_values:
            h = h[..., : self.width]
        y = h.to(x_BTD.dtype)
        if cfg.keyed:
            y = y * parts["query"]
        if cfg.output_gate:
            y = y * ACTIVATIONS[cfg.output_gate](parts["output"])
        if self.norm is not None:
            y = self.norm(y)
        return Out(self.out(y, ctx), after)


@MIXERS.register("gated_scan")
class GatedScanConfig(LayerConfig):
    """Gated diagonal recurrence; its defaults are minGRU."""

    kind: Literal["gated_scan"] = "gated_scan"
    width: Annotated[int, Field(gt=0, description="channels; default d_model")] | None = None
    gate: Gate = "update"
    candidate: Activation = "positive"
    keyed: Annotated[bool, Field(description="candidate times a key, state times a query")] = False
    phase: Literal["none", "fixed", "token"] = Field(
        default="none",
        description="complex decays: a phase per channel, or one per token and channel",
    )
    complex_values: bool = Field(
        default=False, description="the candidate has an imaginary part and both parts are read"
    )
    lower_bound: (
        Annotated[
            float, Field(gt=0, lt=1, description="initial value of the learned bound of decays")
        ]
        | Literal["shared"]  # with all layers: 0 in the first, growing with depth
        | None
    ) = None
    remember: float = Field(
        default=0.0, description="initial bias of the gates, positive: longer memory"
    )
    log_space: bool = Field(
        default=False, description="of positive candidates: scan and carry logarithms"
    )
    output_gate: Activation | None = None
    norm: bool = False

    @model_validator(mode="after")
    def _fits(self) -> GatedScanConfig:
        if self.complex_values and self.phase == "none":
            raise ValueError("gated_scan: complex_values needs a phase (fixed or token)")
        if self.complex_values and self.keyed:
            raise ValueError("gated_scan: keys and queries are real; unset complex_values")
        if self.lower_bound is not None and self.gate not in ("forget", "free"):
            raise ValueError(f"gated_scan: gate '{self.gate}' has no lower_bound")
        positive_alone = self.candidate == "positive" and not self.keyed and self.phase == "none"
        if self.log_space and not (positive_alone and self.gate in ("update", "normalised")):
            raise ValueError(
                "gated_scan: log_space needs positive numbers: gate update or normalised, "
                "candidate positive, no key and no phase"
            )
        return self

    layer = GatedScan
    small = {"width": 6}
