"""Test-time training: the hidden state is a model trained on the tokens.

B rows, T tokens, D model, H heads, K head width, R rows of one document, C tokens of a mini-batch.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from mm.model.context import Ctx
from mm.model.layer import LinearFactory, Out
from mm.model.layer_config import EvenHeadsConfig
from mm.model.mixers.test_time.base import Learner, Tensors
from mm.registry import MIXERS
from mm.state import State

EPS = 1e-6  # of the norms
EXPAND = 4  # hidden width of the inner network / K


class TTT(Learner):
    """``z_t = f(q_t; W_t)``, ``W_t = W_{t-1} - eta_t grad l(W; k_t, v_t)``; the first W is learned.

    ``l = |f(k_t; W) - v_t|^2 / 2``, gradients at the last border of mini-batches; ``f(x) = x +
    LN(g(x; W))`` with g linear or a network of two layers.

    Dual form: no W_t but those at borders is ever made; within a mini-batch
    ``q_t W_t = q_t W - sum_{s <= t} eta_s (q_t k_s) d_s`` with d the gradient of g's output.

    Source: Sun et al. 2024 (arXiv:2407.04620): the dual form, the inner models and the learned
    eta are theirs. eta = base * sigmoid(w x) / K absorbs the 2 of the paper's loss.
    """

    def __init__(self, d_model: int, config: TTTConfig, linear: LinearFactory):
        super().__init__()
        self.config, self.batch, self.heads = config, config.mini_batch, config.heads
        self.head_dim = K = d_model // config.heads
        H = config.heads
        self.qkv = linear(d_model, 3 * d_model, "qkv")
        self.rate = linear(d_model, H, "rate")
        self.out = linear(d_model, d_model, "out")
        self.rate_bias = nn.Parameter(torch.empty(H))
        self.post_norm = nn.Parameter(torch.empty(d_model))
        widths = [K, K] if config.inner == "linear" else [K, EXPAND * K, K]
        sizes = list(zip(widths[:-1], widths[1:], strict=True))
        self.matrices = nn.ParameterList(torch.empty(H, *size) for size in sizes)
        self.biases = nn.ParameterList(torch.empty(H, 1, size[1]) for size in sizes)
        self.norm_weight = nn.Parameter(torch.empty(H, 1, K)) if config.inner_norm else None
        self.norm_bias = nn.Parameter(torch.empty(H, 1, K)) if config.inner_norm else None

    def init_weights(self) -> None:
        for matrix in self.matrices:
            nn.init.normal_(matrix, std=0.02)
        for bias in (*self.biases, self.rate_bias):
            nn.init.zeros_(bias)
        nn.init.ones_(self.post_norm)
        if self.norm_weight is not None and self.norm_bias is not None:
            nn.init.ones_(self.norm_weight)
            nn.init.zeros_(self.norm_bias)

    def forward(self, x_BTD: Tensor, ctx: Ctx, state: State | None = None) -> Out:
        B, T, _ = x_BTD.shape
        wide = torch.promote_types(self.rate_bias.dtype, torch.float32)
        qkv = self.qkv(x_BTD, ctx).to(wide).view(B, T, 3, self.heads, self.head_dim)
        rate = (self.rate(x_BTD, ctx).to(wide) + self.rate_bias.to(wide)).sigmoid()
        eta = rate * (self.config.rate / self.head_dim)
        with torch.autocast(x_BTD.device.type, enabled=False):
            z, after = self.learn_documents((*qkv.unbind(2), eta[..., None]), ctx, state)
            z = z.flatten(2)
            z = F.layer_norm(z, z.shape[-1:], eps=EPS) * self.post_norm.to(wide)
        return Out(self.out(z.to(x_BTD.dtype), ctx), after)

    def start(self) -> Tensors:
        wide = torch.promote_types(self.rate_bias.dtype, torch.float32)
        return tuple(w.to(wide) for w in (*self.matrices, *self.biases))

    def feature_shapes(self) -> tuple[tuple[int, ...], ...]:
        one = (self.heads, self.head_dim)
        return (one, one, one, (self.heads, 1))

    def learn(self, weights: Tensors, features: Tensors) -> tuple[Tensor, Tensors]:
        q, k, v, eta = (f.transpose(1, 2) for f in features)  # (R, H, C, .)
        n = len(self.matrices)
        matrices, biases = weights[:n], weights[n:]
        # Biases are the weights of an input of 1; a bare inner model keeps them as they are.
        one = float(self.config.inner_norm)
        inputs, sums, x = [], [], k
        for i in range(n):
            inputs.append(x)
            sums.append(x @ matrices[i] + biases[i])
            x = F.gelu(sums[i], approximate="tanh") if i < n - 1 else sums[i]
        grads = [self._loss_grad(sums[-1], k, v)]
        for i in reversed(range(1, n)):
            back = grads[0] @ matrices[i].transpose(-1, -2)
            grads.insert(0, back * _gelu_slope(sums[i - 1]))
        grads = [eta * g for g in grads]
        x = q
        for i in range(n):
            reads = (x @ inputs[i].transpose(-1, -2) + one).tril()
            x = x @ matrices[i] + biases[i] - reads @ grads[i]
            x = F.gelu(x, approximate="tanh") if i < n - 1 else x
        moved = [
            m - a.transpose(-1, -2) @ g for m, a, g in zip(matrices, inputs, grads, strict=True)
        ]
        shifted = [b - one * g.sum(-2, keepdim=True) for b, g in zip(biases, grads, strict=True)]
        return self._residual(q, x).transpose(1, 2), (*moved, *shifted)

    def _residual(self, x: Tensor, g: Tensor) -> Tensor:
        """f of x, from the inner model's output g."""
        if self.norm_weight is None or self.norm_bias is None:
            return g
        normed = F.layer_norm(g, g.shape[-1:], eps=EPS)
        return x + normed * self.norm_weight.to(g) + self.norm_bias.to(g)

    def _loss_grad(self, g: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Of the loss, to the inner model's output."""
        d = self._residual(k, g) - v
        if self.norm_weight is None:
            return d
        centred = g - g.mean(-1, keepdim=True)
        scale = (centred.square().mean(-1, keepdim=True) + EPS).rsqrt()
        normed, d = centred * scale, d * self.norm_weight.to(g)
        return (d - d.mean(-1, keepdim=True) - normed * (d * normed).mean(-1, keepdim=True)) * scale


def _gelu_slope(x: Tensor) -> Tensor:
    """Derivative of the tanh approximation of GELU."""
    c, cubic = (2 / torch.pi) ** 0.5, 0.044715
    t = (c * (x + cubic * x**3)).tanh()
    return 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * c * (1 + 3 * cubic * x * x)


@MIXERS.register("ttt")
class TTTConfig(EvenHeadsConfig):
    """Test-time training with a linear or two-layer inner model, in dual form."""

    kind: Literal["ttt"] = "ttt"
    inner: Literal["linear", "mlp"] = "linear"
    mini_batch: Annotated[int, Field(gt=0, description="tokens of an inner step")] = 16
    rate: float = Field(default=1.0, gt=0, description="largest inner learning rate * head width")
    inner_norm: bool = Field(
        default=True, description="residual and layer norm around the inner model; its biases learn"
    )

    layer = TTT
    small = {"heads": 2, "mini_batch": 3}
