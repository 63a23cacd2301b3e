"""Causal one-dimensional layers with an optional streaming memory.

G items, C channels, T steps, D features.

Every layer takes ``stream``: None runs the whole signal at once; a dict (empty at the start of a
stream) carries the left context from chunk to chunk, keyed by layer, so that chunked output equals
offline output.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

Stream = dict[nn.Module, Tensor]


def with_left(x: Tensor, n: int, layer: nn.Module, stream: Stream | None) -> Tensor:
    """Prefix (..., T) with ``n`` steps of context: what ``stream`` kept, zeros at the start."""
    if n == 0:
        return x
    if stream is None:
        return nnf.pad(x, (n, 0))
    x = torch.cat([stream.get(layer, x.new_zeros(*x.shape[:-1], n)), x], dim=-1)
    stream[layer] = x[..., -n:]
    return x


class CausalConv1d(nn.Module):
    """Convolution whose output step t sees input steps < (t + 1) * stride only.

    EnCodec pads by reflection; zeros are used here because a reflected border needs samples that a
    stream has not seen.
    """

    def __init__(
        self,
        c_in: int,
        c_out: int,
        kernel: int,
        stride: int = 1,
        dilation: int = 1,
        groups: int = 1,
    ):
        super().__init__()
        self.kernel, self.stride, self.dilation, self.groups = kernel, stride, dilation, groups
        self.weight = nn.Parameter(torch.empty(c_out, c_in // groups, kernel))
        self.bias = nn.Parameter(torch.empty(c_out))

    def init_weights(self) -> None:
        fan_in = self.weight.shape[1] * self.kernel
        nn.init.trunc_normal_(self.weight, std=1 / math.sqrt(fan_in))
        nn.init.zeros_(self.bias)

    def forward(self, x_GCT: Tensor, stream: Stream | None = None) -> Tensor:
        """(G, C, T) -> (G, C', T / stride); T must be a multiple of ``stride``."""
        left = (self.kernel - 1) * self.dilation + 1 - self.stride
        x = with_left(x_GCT, left, self, stream)
        return nnf.conv1d(x, self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


class CausalConvTranspose1d(nn.Module):
    """Transposed convolution, kernel 2 * stride: output step t sees input steps <= t / stride."""

    def __init__(self, c_in: int, c_out: int, stride: int):
        super().__init__()
        self.stride = stride
        self.weight = nn.Parameter(torch.empty(c_in, c_out, 2 * stride))
        self.bias = nn.Parameter(torch.empty(c_out))

    def init_weights(self) -> None:
        # two taps of every input channel meet in one output sample
        nn.init.trunc_normal_(self.weight, std=1 / math.sqrt(2 * self.weight.shape[0]))
        nn.init.zeros_(self.bias)

    def forward(self, x_GCT: Tensor, stream: Stream | None = None) -> Tensor:
        """(G, C, T) -> (G, C', T * stride)."""
        # one step of left context, then drop the steps before the signal and the tail that future
        # input would add to
        y = nnf.conv_transpose1d(
            with_left(x_GCT, 1, self, stream), self.weight, self.bias, self.stride
        )
        return y[..., self.stride : -self.stride]


class LayerNorm(nn.LayerNorm):
    """Layer norm that fills its own weights (``init_weights``).

    Without affine it is a plain normalisation.
    """

    def init_weights(self) -> None:
        if self.elementwise_affine:
            nn.init.ones_(self.weight)
            nn.init.zeros_(self.bias)


class Dense(nn.Linear):
    """Linear layer with truncated-normal weights of variance 1 / fan-in and zero bias."""

    def init_weights(self) -> None:
        nn.init.trunc_normal_(self.weight, std=1 / math.sqrt(self.in_features))
        nn.init.zeros_(self.bias)


class ConvNeXt(nn.Module):
    """Causal ConvNeXt block: depthwise convolution, layer norm, two-layer MLP, scaled residual.

    Source: Siuzdak, "Vocos" (2306.00814) section 3.2, made causal by padding on the left only.
    """

    def __init__(self, d: int, d_hidden: int, kernel: int = 7):
        super().__init__()
        self.depthwise = CausalConv1d(d, d, kernel, groups=d)
        self.norm = LayerNorm(d)
        self.up = Dense(d, d_hidden)
        self.down = Dense(d_hidden, d)
        self.scale = nn.Parameter(torch.empty(d))

    def init_weights(self) -> None:
        nn.init.constant_(self.scale, 0.3)

    def forward(self, x_GTD: Tensor, stream: Stream | None = None) -> Tensor:
        """(G, T, D) -> (G, T, D)."""
        h = self.depthwise(x_GTD.transpose(1, 2), stream).transpose(1, 2)
        return x_GTD + self.scale * self.down(nnf.gelu(self.up(self.norm(h))))
