"""Feed-forward layer whose first hidden units are a narrower one, and those again.

B rows, T tokens, D model, F hidden, G granularities.
"""

from __future__ import annotations

from functools import partial
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from mm.model.context import Ctx
from mm.model.ffn.mlp import ACTIVATIONS, MLP, MlpConfig, gated_product
from mm.model.layer import Linear, LinearFactory
from mm.model.linears.dense import Dense
from mm.model.noise import drawn_of_step
from mm.registry import FFNS


class NestedMatrix(Dense):
    """A dense matrix of which a call takes the first hidden units; costs are those of the part."""

    def __init__(self, d_in: int, d_out: int, name: str, bias: bool, blocks: int):
        super().__init__(d_in, d_out, name, bias)
        self.blocks = blocks  # of rows, each with all hidden units: gate and up

    def part(self, reads: int, units: int | None) -> tuple[Tensor, Tensor | None]:
        """The matrix and bias of the first ``reads`` columns and ``units`` rows of each block."""
        weight, bias = self.weight[:, :reads], self.bias
        if units is not None:
            weight = weight.unflatten(0, (self.blocks, -1))[:, :units].flatten(0, 1)
            if bias is not None:
                bias = bias.unflatten(0, (self.blocks, -1))[:, :units].flatten()
        return weight.contiguous(), bias  # laid out as in a model of that width: the same bits

    def forward(self, x: Tensor, ctx: Ctx | None = None, units: int | None = None) -> Tensor:
        return F.linear(x, *self.part(x.shape[-1], units))


class Nested(MLP):
    """An `mlp` whose first F / 2, F / 4, .. hidden units are trained to do alone, too.

    While it trains, one of G widths is drawn a step, each as often: the same in all layers, on all
    ranks, in every micro-batch and when it is recomputed, as the paper draws one sub-model a step
    (`mm.model.noise.drawn_of_step`, so not by the layer's path). A pass that no trainer seeds, an
    evaluation and serving run at full width, or at ``eval_hidden`` of this layer; widths that
    differ by layer are the paper's Mix'n'Match. The surgery `slice_nested` leaves a layer of that
    width alone. Matrices that are not dense (adapters, ternary) are multiplied whole and what is
    behind the width is dropped: no time is saved.

    Source: Devvrit et al. 2023, MatFormer (arXiv:2310.07707), section 3.1, eq. 1-2; drawing and
    Mix'n'Match: section 3.2 and 3.3.
    """

    def __init__(self, d_model: int, config: NestedConfig, linear: LinearFactory):
        super().__init__(d_model, config, partial(_nested_or_whole, linear))
        F_, G = config.width(d_model), config.granularities
        if F_ % 2 ** (G - 1):
            raise ValueError(
                f"nested: hidden {F_} is no multiple of {2 ** (G - 1)}, which {G} granularities "
                "halve it to"
            )
        if config.eval_hidden is not None and config.eval_hidden > F_:
            raise ValueError(f"nested: eval_hidden {config.eval_hidden} is more than hidden {F_}")
        self.widths = tuple(F_ >> (G - 1 - level) for level in range(G))
        self.eval_hidden = config.eval_hidden or F_
        self._key = f"nested level of {G}"

    def _level(self, ctx: Ctx) -> int:
        drawn = drawn_of_step(ctx, "nested")
        return len(self.widths) - 1 if drawn is None else int(drawn * len(self.widths))

    def prefetch(self, ctx: Ctx, serving: bool) -> None:
        if self.training:
            ctx.layout.memo[self._key] = self._level(ctx)

    def units(self, ctx: Ctx) -> int:
        """Hidden units of this pass."""
        if not self.training:
            return self.eval_hidden
        if torch.compiler.is_compiling():  # a graph of its own for each width, not for each step
            return self.widths[ctx.layout.memo.get(self._key, len(self.widths) - 1)]
        return self.widths[self._level(ctx)]

    def hidden_units(self, x_BTD: Tensor, ctx: Ctx) -> Tensor:
        """`(B, T, units)` that the last matrix reads; zeros behind them where it is not dense."""
        n, first = self.units(ctx), self.gate_up if self.gated else self.up
        if isinstance(first, NestedMatrix):
            made = first(x_BTD, ctx, n)
        else:
            whole = first(x_BTD, ctx).unflatten(-1, (-1, self.widths[-1]))
            made = whole[..., :n].flatten(-2)
        if self.gated:
            gate, up = made.chunk(2, dim=-1)
            hidden = gated_product(gate, up, self.activation)
        else:
            hidden = ACTIVATIONS[self.activation](made)
        if isinstance(self.out, NestedMatrix):
            return hidden
        return F.pad(hidden, (0, self.widths[-1] - n))


def _nested_or_whole(linear: LinearFactory, d_in: int, d_out: int, name: str) -> Linear:
    """What ``linear`` makes, but of a plain matrix one that can be cut."""
    made = linear(d_in, d_out, name)
    if type(made) is not Dense:
        return made
    return NestedMatrix(d_in, d_out, name, made.bias is not None, 2 if name == "gate_up" else 1)


@FFNS.register("nested")
class NestedConfig(MlpConfig):
    """An `mlp` that can be cut to narrower ones after training, layer by layer (MatFormer)."""

    kind: Literal["nested"] = "nested"  # type: ignore[assignment]
    granularities: Annotated[
        int, Field(ge=2, le=16, description="widths that train: hidden, a half of it, a quarter..")
    ] = 4
    eval_hidden: (
        Annotated[int, Field(gt=0, description="units in evaluation and serving; default: all")]
        | None
    ) = None

    layer = Nested
