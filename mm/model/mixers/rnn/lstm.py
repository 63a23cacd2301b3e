"""Long short-term memory.

R rows of one document, L their length, W width.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from mm.kernels.linear_scan import linear_scan
from mm.model.mixers.rnn.base import RNN, RNNConfig
from mm.registry import MIXERS


class LSTM(RNN):
    """``c_t = f * c_{t-1} + i * g``, ``h_t = o * tanh(c_t)``. Sequential.

    All gates read ``x_t`` and ``h_{t-1}``.

    Source: Hochreiter & Schmidhuber 1997 (Neural Computation 9:1735) with the forget gate of Gers
    et al. 2000 (Neural Computation 12:2451), whose bias begins at 1 (Jozefowicz et al. 2015).
    """

    gates = 4
    parts = 2

    def init_weights(self) -> None:
        super().init_weights()
        with torch.no_grad():
            self.bias_ih[self.width : 2 * self.width] = 1.0

    def _kernel(self, x: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
        h, c = (part.contiguous()[None] for part in before.chunk(2, -1))
        train = torch.is_grad_enabled()
        y, _, last = torch.lstm(x, (h, c), self.weights(), True, 1, 0.0, train, False, True)
        return y, last[0]

    def outputs(self, x_RLD: Tensor, before_RS: Tensor) -> Tensor:
        return self._kernel(x_RLD, before_RS)[0]

    def states(self, x_RLD: Tensor, before_RS: Tensor) -> tuple[Tensor, Tensor]:
        y, last = self._kernel(x_RLD, before_RS)
        if x_RLD.shape[1] == 1:
            return y, torch.cat((y, last[:, None]), -1)
        # The kernel returns one cell state, each row needs that of its own last token. Once every h
        # is known, the cells follow from a scan.
        h, c = before_RS.chunk(2, -1)
        previous = torch.cat((h[:, None], y[:, :-1]), 1)
        gates = F.linear(x_RLD, self.weight_ih, self.bias_ih)
        gates = gates + F.linear(previous, self.recurrent(), self.bias_hh)
        i, f, g, _ = gates.chunk(4, -1)
        cells, _ = linear_scan(f.sigmoid(), i.sigmoid() * g.tanh(), None, c)
        return y, torch.cat((y, cells.to(y.dtype)), -1)


@MIXERS.register("lstm")
class LSTMConfig(RNNConfig):
    """Long short-term memory, sequential in time."""

    kind: Literal["lstm"] = "lstm"

    layer = LSTM
