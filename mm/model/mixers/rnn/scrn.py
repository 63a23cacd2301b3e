"""Structurally constrained recurrent network.

R rows of one document, L their length, W hidden units, C context units.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from mm.kernels.linear_scan import linear_scan
from mm.model.layer import LinearFactory
from mm.model.layer_config import LayerConfig
from mm.model.mixers.rnn.base import Recurrence
from mm.registry import MIXERS


class SCRN(Recurrence):
    """A simple recurrent network beside slow linear units. Sequential.

    ``s_t = (1 - a) B x_t + a s_{t-1}``, ``h_t = sigmoid(P s_t + A x_t + R h_{t-1})``, output ``U
    h_t + V s_t``.

    Source: Mikolov et al. 2015 (arXiv:1412.7753), section 3; a by unit: its adaptive form.
    """

    overwrites = True

    def __init__(self, d_model: int, config: SCRNConfig, linear: LinearFactory):
        width, context = config.width or d_model, config.context
        super().__init__(width + context, width + context)
        self.units, self.context, self.decay = width, context, config.decay
        self.slow = linear(d_model, context, "slow")  # B
        self.weight_ih = nn.Parameter(torch.empty(width, context + d_model))  # P, A
        self.weight_hh = nn.Parameter(torch.empty(width, width))  # R
        self.rate = nn.Parameter(torch.empty(context)) if config.adaptive else None
        self.out = linear(self.width, d_model, "out")  # U, V

    def init_weights(self) -> None:
        nn.init.normal_(self.weight_ih, std=self.weight_ih.shape[1] ** -0.5)
        self.weight_hh.detach().copy_(nn.init.orthogonal_(torch.empty(self.weight_hh.shape)))
        if self.rate is not None:
            logit = torch.tensor(self.decay).logit()
            nn.init.constant_(self.rate, float(logit))

    def states(self, x_RLD: Tensor, before_RS: Tensor) -> tuple[Tensor, Tensor]:
        h, s = before_RS.split((self.units, self.context), -1)
        u = self.slow(x_RLD).to(self.memory.dtype)
        a = u.new_full((), self.decay) if self.rate is None else self.rate.to(u).sigmoid()
        slow, _ = linear_scan(a.expand_as(u), (1 - a) * u, None, s.contiguous())
        slow = slow.to(u)
        # sigmoid(p) = (1 + tanh(p / 2)) / 2, so with g = 2 h - 1 this is a tanh network, for which
        # torch has a kernel: g_t = tanh(p_t / 2 + R 1 / 4 + R g_{t-1} / 4).
        R = self.weight_hh.to(u) / 4
        bias = R.sum(1)
        weights = [self.weight_ih.to(u) / 2, R, bias, torch.zeros_like(bias)]
        read, first = torch.cat((slow, x_RLD.to(u)), -1), (2 * h - 1).contiguous()[None]
        train = torch.is_grad_enabled()
        g, _ = torch.rnn_tanh(read, first, weights, True, 1, 0.0, train, False, True)
        states = torch.cat(((g + 1) / 2, slow), -1)
        return states, states


@MIXERS.register("scrn")
class SCRNConfig(LayerConfig):
    """Simple recurrent network beside slow context units, sequential in time."""

    kind: Literal["scrn"] = "scrn"
    width: Annotated[int, Field(gt=0, description="hidden units; default d_model")] | None = None
    context: Annotated[int, Field(gt=0, description="slow units")] = 40
    decay: Annotated[float, Field(gt=0, lt=1, description="of the slow units")] = 0.95
    adaptive: Annotated[bool, Field(description="learn the decay of each slow unit")] = False

    layer = SCRN
    small = {"width": 6, "context": 3, "adaptive": True}
