"""Causal one-dimensional layers with an optional streaming memory.

G items, C channels, T steps, D features.

Every layer takes ``stream``: None runs the whole signal at once; a dict (empty at the start of a
stream) carries the left context from chunk to chunk, keyed by layer, so that chunked output equals
offline output.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from mm.errors import UserError

Stream = dict[nn.Module, Any]
Padding = Literal["zeros", "reflect", "replicate"]


def pad(x_GCT: Tensor, left: int, right: int, padding: Padding = "zeros") -> Tensor:
    """(G, C, T) -> (G, C, left + T + right).

    A signal too short to be reflected is first made long enough by zeros, as in EnCodec's code.
    """
    if padding == "zeros":
        return nnf.pad(x_GCT, (left, right))
    short = max(0, max(left, right) + 1 - x_GCT.shape[-1]) if padding == "reflect" else 0
    y = nnf.pad(nnf.pad(x_GCT, (0, short)), (left, right), mode=padding)
    return y[..., : y.shape[-1] - short]


def with_left(
    x_GCT: Tensor, n: int, layer: nn.Module, stream: Stream | None, padding: Padding = "zeros"
) -> Tensor:
    """Prefix (G, C, T) with ``n`` steps of context: what ``stream`` kept, padding at the start.

    Raises:
        UserError: a stream begins with fewer steps than its reflected border needs.
    """
    if n == 0:
        return x_GCT
    if stream is None:
        return pad(x_GCT, n, 0, padding)
    if layer not in stream and padding == "reflect" and x_GCT.shape[-1] <= n:
        raise UserError(
            f"stream: a layer that reflects its border needs more than {n} steps of a first chunk, "
            f"this one gives {x_GCT.shape[-1]}: begin with a longer chunk"
        )
    kept = stream.get(layer)
    x = pad(x_GCT, n, 0, padding) if kept is None else torch.cat([kept, x_GCT], dim=-1)
    stream[layer] = x[..., -n:]
    return x


class CausalConv1d(nn.Module):
    """Convolution whose output step t sees input steps < (t + 1) * stride only.

    ``padding``: what stands before a signal, and behind one that is no multiple of ``stride``.
    EnCodec reflects, for which a stream must begin with a chunk long enough.
    """

    def __init__(
        self,
        c_in: int,
        c_out: int,
        kernel: int,
        stride: int = 1,
        dilation: int = 1,
        groups: int = 1,
        padding: Padding = "zeros",
        bias: bool = True,
    ):
        super().__init__()
        self.kernel, self.stride, self.dilation, self.groups = kernel, stride, dilation, groups
        self.padding: Padding = padding
        self.weight = nn.Parameter(torch.empty(c_out, c_in // groups, kernel))
        self.bias = nn.Parameter(torch.empty(c_out)) if bias else None

    @property
    def context(self) -> int:
        """Steps that it reads besides the ``stride`` of an output step."""
        return (self.kernel - 1) * self.dilation + 1 - self.stride

    def init_weights(self) -> None:
        fan_in = self.weight.shape[1] * self.kernel
        nn.init.trunc_normal_(self.weight, std=1 / math.sqrt(fan_in))
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x_GCT: Tensor, stream: Stream | None = None) -> Tensor:
        """(G, C, T) -> (G, C', ceil(T / stride)).

        Chunks of a stream are multiples of ``stride``; one that is not is its last.
        """
        extra = -x_GCT.shape[-1] % self.stride
        if stream is None:
            x = pad(x_GCT, self.context, extra, self.padding)
        else:
            x = with_left(x_GCT, self.context, self, stream, self.padding)
            x = pad(x, 0, extra, self.padding) if extra else x
        return nnf.conv1d(x, self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


class CentredConv1d(CausalConv1d):
    """The same, which reads half of its context ahead: no part of a stream."""

    def forward(self, x_GCT: Tensor, stream: Stream | None = None) -> Tensor:
        refuse_stream(stream)
        ahead, extra = self.context // 2, -x_GCT.shape[-1] % self.stride
        x = pad(x_GCT, self.context - ahead, ahead + extra, self.padding)
        return nnf.conv1d(x, self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


class CausalConvTranspose1d(nn.Module):
    """Transposed convolution, kernel 2 * stride: output step t sees input steps <= t / stride."""

    def __init__(self, c_in: int, c_out: int, stride: int, groups: int = 1, bias: bool = True):
        super().__init__()
        self.stride, self.groups = stride, groups
        self.weight = nn.Parameter(torch.empty(c_in, c_out // groups, 2 * stride))
        self.bias = nn.Parameter(torch.empty(c_out)) if bias else None

    def init_weights(self) -> None:
        # two taps of every input channel meet in one output sample
        fan_in = 2 * self.weight.shape[0] // self.groups
        nn.init.trunc_normal_(self.weight, std=1 / math.sqrt(fan_in))
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x_GCT: Tensor, stream: Stream | None = None) -> Tensor:
        """(G, C, T) -> (G, C', T * stride)."""
        # one step of left context, then drop the steps before the signal and the tail that future
        # input would add to
        return self._spread(with_left(x_GCT, 1, self, stream))[..., self.stride : -self.stride]

    def _spread(self, x_GCT: Tensor) -> Tensor:
        return nnf.conv_transpose1d(x_GCT, self.weight, self.bias, self.stride, groups=self.groups)


class CentredConvTranspose1d(CausalConvTranspose1d):
    """The same, whose border steps of output are dropped on both sides."""

    def forward(self, x_GCT: Tensor, stream: Stream | None = None) -> Tensor:
        refuse_stream(stream)
        right = self.stride // 2
        y = self._spread(x_GCT)
        return y[..., self.stride - right : y.shape[-1] - right]


def refuse_stream(stream: Stream | None) -> None:
    """Raise UserError where a layer that looks ahead is asked for chunks."""
    if stream is not None:
        raise UserError("stream: this codec looks ahead (causal: false); encode the whole signal")


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
