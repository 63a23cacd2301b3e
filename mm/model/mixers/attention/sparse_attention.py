"""Factorised sparse attention.

R rows of one document, L tokens, S keys, H heads, G key heads, K head width, n blocks of b tokens.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor

from mm.kernels.attention import attention
from mm.kernels.attention.spec import MaskSpec
from mm.model.layer import LinearFactory
from mm.model.mixers.attention.indexed import IndexedAttention, IndexedConfig, read_all
from mm.registry import MIXERS


class SparseAttention(IndexedAttention):
    """Causal attention over two sparse patterns whose product reaches every earlier token.

    * ``strided``: the latest ``b + 1`` tokens; and those whole strides ``b`` back.
    * ``fixed``: the own block of ``b`` tokens; and the last ``c`` tokens of every block.

    ``use``: the first pattern in one half of the heads and the second in the other (``heads``), the
    union (``merged``), or one of them, for layers that take turns. A query that sees nothing (the
    second ``fixed`` pattern, early on) gets zeros. Whole documents cost ``L * (2 b + L / b)``
    scores; no `(L, L)` mask or score exists.

    Source: Child et al. 2019 (arXiv:1904.10509), sections 4.2 and 4.3.
    """

    def __init__(self, d_model: int, config: SparseAttentionConfig, linear: LinearFactory):
        super().__init__(d_model, config, linear)
        self.pattern, self.use = config.pattern, config.use
        self.stride, self.columns = config.stride, config.columns

    # ---- the patterns as predicates on indices: the specification, and what decoding reads ----

    def sees(self, at_RL: Tensor, of_RS: Tensor, use: str) -> Tensor:
        """`(R, L, S)` bool of the first, the second or (``merged``) both patterns."""
        i, j, b = at_RL[:, :, None], of_RS[:, None], self.stride
        if self.pattern == "strided":
            first, second = i - j <= b, (i - j) % b == 0
        else:
            first, second = i // b == j // b, (j % b >= b - self.columns).expand_as(i - j)
        chosen = {"first": first, "second": second, "merged": first | second}[use]
        return chosen & read_all(at_RL, of_RS)

    def read(
        self, q_RLHK: Tensor, k_RSGK: Tensor, v_RSGK: Tensor, at_RL: Tensor, of_RS: Tensor
    ) -> Tensor:
        done = [
            attention(q, k, v, MaskSpec(self.sees(at_RL, of_RS, use)))
            for use, q, k, v in self._shares(q_RLHK, k_RSGK, v_RSGK)
        ]
        return torch.cat(done, dim=2)

    def _shares(self, q: Tensor, k: Tensor, v: Tensor) -> list[tuple[str, Tensor, Tensor, Tensor]]:
        """Which heads read which pattern."""
        if self.use != "heads":
            return [(self.use, q, k, v)]
        (qa, qb), shared = q.chunk(2, dim=2), k.shape[2] == 1
        (ka, kb), (va, vb) = ((t, t) if shared else t.chunk(2, dim=2) for t in (k, v))
        return [("first", qa, ka, va), ("second", qb, kb, vb)]

    # ---- whole documents, block by block ----

    def rows(self, q_RLHK: Tensor, k_RLGK: Tensor, v_RLGK: Tensor) -> Tensor:
        return torch.cat([self._blocks(*s) for s in self._shares(q_RLHK, k_RLGK, v_RLGK)], dim=2)

    def _blocks(self, use: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        (R, L, H, K), G, b = q.shape, k.shape[2], self.stride
        n = -(-L // b)
        narrow, wide = v.dtype, torch.promote_types(v.dtype, torch.float32)
        # Padding comes after every real query, so that causality hides it.
        q, k, v = (F.pad(t.to(wide), (0, 0, 0, 0, 0, n * b - L)) for t in (q, k, v))
        q = q.view(R, n, b, G, H // G, K) * K**-0.5
        k, v = k.view(R, n, b, G, K), v.view(R, n, b, G, K)
        block, inner = torch.arange(n, device=q.device), torch.arange(b, device=q.device)
        with torch.autocast(q.device.type, enabled=False):
            logits, values = [], []
            if use != "second":
                near = inner[:, None] >= inner  # (b, b)
                ka, va = k, v
                if self.pattern == "strided":
                    # Keys of two blocks: the block before is seen from the same column on.
                    ka, va = (torch.cat((_before(t), t), dim=2) for t in (k, v))
                    near = torch.cat((inner[:, None] <= inner, near), dim=1)
                    near = near & (
                        (block > 0)[:, None, None] | (torch.arange(2 * b, device=q.device) >= b)
                    )
                a = torch.einsum("rnqghk,rnsgk->rnqghs", q, ka)
                logits.append(_hide(a, near.expand(n, b, -1)))
                values.append((va, "rnqghs,rnsgk->rnqghk"))
            if use != "first" and self.pattern == "strided":
                # Merged, strides 0 and 1 back are in the first pattern already.
                far = block[:, None] - block >= (2 if use == "merged" else 0)
                a = torch.einsum("rnqghk,rmqgk->rnqghm", q, k)
                logits.append(_hide(a, far[:, None].expand(n, b, n)))
                values.append((v, "rnqghm,rmqgk->rnqghk"))
            elif use != "first":
                c = self.columns
                kc, vc = (t[:, :, b - c :].flatten(1, 2) for t in (k, v))  # (R, n c, G, K)
                of = (block[:, None] * b + inner[b - c :]).flatten()
                at = (block[:, None] * b + inner)[..., None]
                seen = (at // b > of // b) if use == "merged" else at >= of
                a = torch.einsum("rnqghk,rsgk->rnqghs", q, kc)
                logits.append(_hide(a, seen))
                values.append((vc, "rnqghs,rsgk->rnqghk"))
            p = torch.cat(logits, dim=-1)
            none = p.detach().amax(-1, keepdim=True) == -math.inf  # sees nothing: zeros, not NaN
            p = p.masked_fill(none, 0).softmax(-1).masked_fill(none, 0)
            y = torch.stack(
                [
                    torch.einsum(how, part, value)
                    for part, (value, how) in zip(
                        p.split([a.shape[-1] for a in logits], -1), values, strict=True
                    )
                ]
            ).sum(0)
        return y.reshape(R, n * b, H, K)[:, :L].to(narrow)


def _before(blocks: Tensor) -> Tensor:
    """The block before each, zeros before the first. `(R, n, ...)`."""
    return torch.cat((torch.zeros_like(blocks[:, :1]), blocks[:, :-1]), dim=1)


def _hide(logits: Tensor, seen_nqs: Tensor) -> Tensor:
    return logits.masked_fill(~seen_nqs[None, :, :, None, None], -math.inf)


@MIXERS.register("sparse_attention")
class SparseAttentionConfig(IndexedConfig):
    """Sparse Transformer patterns."""

    kind: Literal["sparse_attention"] = "sparse_attention"
    pattern: Literal["strided", "fixed"] = "strided"
    use: Literal["heads", "merged", "first", "second"] = "heads"
    stride: Annotated[int, Field(gt=0, description="about the root of the length")] = 64
    columns: Annotated[int, Field(gt=0, description="c of the fixed pattern")] = 8

    layer = SparseAttention

    @model_validator(mode="after")
    def _fits(self) -> SparseAttentionConfig:
        if self.columns > self.stride and self.pattern == "fixed":
            raise ValueError(f"columns {self.columns} do not fit a block of {self.stride}")
        if self.use == "heads" and (
            self.heads % 2 or (self.kv_heads or 2) % 2 > (self.kv_heads == 1)
        ):
            raise ValueError(
                "use 'heads' gives each pattern half of the heads and key heads: make"
                " both numbers even"
            )
        return self

    small = {"heads": 2, "stride": 3, "use": "heads"}
