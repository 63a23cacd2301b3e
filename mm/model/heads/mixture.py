"""Mixtures of densities over vectors of values. P places, D model, K components, C features."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from mm.config import Config
from mm.model.context import Ctx
from mm.model.layer import Head, HeadOut
from mm.registry import HEADS
from mm.state import State

LEAST_DF = 2.0  # of Student's t: below it has no variance
LOG_2PI = math.log(2 * math.pi)


class MixtureOfDensities:
    """Parameter-free distribution over `(P, C)` values; the features of a component are apart.

    Args:
        weight: `(P, K)` logits.
        loc: `(P, K, C)`.
        scale: `(P, K, C)` positive.
        df: `(P, K, C)` of Student's t, else None.
        density: "gaussian", "student_t" or "logistic".
    """

    logits: Tensor | None = None  # no finite support

    def __init__(self, weight: Tensor, loc: Tensor, scale: Tensor, df: Tensor | None, density: str):
        self.weight, self.loc, self.scale, self.df, self.density = weight, loc, scale, df, density

    @property
    def mean(self) -> Tensor:
        """`(P, C)`."""
        return (self.weight.softmax(-1)[..., None] * self.loc).sum(-2)

    def log_prob(self, value: Tensor) -> Tensor:
        """`(P,)` log density of values `(P, C)`."""
        z = (value[:, None].to(self.loc.dtype) - self.loc) / self.scale
        if self.density == "gaussian":
            each = -0.5 * (z**2 + LOG_2PI)
        elif self.density == "logistic":
            each = -z - 2 * nn.functional.softplus(-z)
        else:
            assert self.df is not None
            half = (self.df + 1) / 2
            each = half.lgamma() - (self.df / 2).lgamma() - 0.5 * (self.df * math.pi).log()
            each = each - half * (z**2 / self.df).log1p()
        of_component = (each - self.scale.log()).sum(-1)
        return (self.weight.log_softmax(-1) + of_component).logsumexp(-1)

    def sample(self, generator: torch.Generator, temperature: float = 1.0) -> Tensor:
        """`(P, C)`; ``temperature`` scales the spread of the drawn component, 0 gives the mean.

        Source: variance scaling of GIVT, section 3.4.
        """
        if temperature == 0:
            return self.mean
        drawn = torch.multinomial(self.weight.softmax(-1), 1, generator=generator)
        at = drawn[..., None].expand(-1, -1, self.loc.shape[-1])
        pick = lambda t: t.gather(1, at)[:, 0]
        loc, scale = pick(self.loc), pick(self.scale) * temperature
        draw = lambda like: torch.rand(
            like.shape, generator=generator, dtype=like.dtype, device=like.device
        ).clamp(1e-6, 1 - 1e-6)
        if self.density == "logistic":
            return loc + scale * draw(loc).logit()
        normal = torch.special.ndtri(draw(loc))
        if self.density == "gaussian":
            return loc + scale * normal
        assert self.df is not None
        # Student's t: a normal over the root of a gamma variable (Bailey 1994's polar form).
        df, u = pick(self.df), draw(loc)
        radius = (df * (u ** (-2 / df) - 1)).sqrt()
        return loc + scale * radius * (2 * math.pi * draw(loc)).cos()


class Mixture(Head):
    """A linear layer to the parameters of a mixture; its nll is that of a whole vector.

    Sources: Gaussians with diagonal covariance: Tschannen et al. 2023 (GIVT, arXiv:2312.02116),
    section 3.3; Student's t for series with outliers: Das et al. / Rasul et al. 2023
    (arXiv:2310.08278), section 4.3; logistic: Salimans et al. 2017 (arXiv:1701.05517), section 2.1.
    """

    predicts_ids = False

    def __init__(self, d_model: int, config: MixtureConfig):
        super().__init__()
        self.config, self.reads = config, config.reads
        self.n_parts = 2 + (config.density == "student_t")  # parameters of a feature
        width = config.components * (1 + self.n_parts * config.d_out)
        self.weight = nn.Parameter(torch.empty(width, d_model))
        self.bias = nn.Parameter(torch.empty(width))

    def init_weights(self) -> None:
        c = self.config
        nn.init.normal_(self.weight, std=0.25 * self.weight.shape[1] ** -0.5)
        nn.init.zeros_(self.bias)
        with torch.no_grad():  # components begin apart: equal ones get equal gradients for ever
            spread = torch.linspace(-1, 1, c.components) if c.components > 1 else torch.zeros(1)
            locs = self.bias[c.components : c.components * (1 + c.d_out)]
            locs.copy_(spread.repeat_interleave(c.d_out).to(locs))

    def _distribution(self, h: Tensor) -> MixtureOfDensities:
        c, (P, _) = self.config, h.shape
        wide = torch.promote_types(h.dtype, torch.float32)
        raw = nn.functional.linear(h, self.weight.to(h.dtype)).to(wide) + self.bias.to(wide)
        weight, rest = raw[:, : c.components], raw[:, c.components :]
        parts: Any = rest.view(P, self.n_parts, c.components, c.d_out).unbind(1)
        scale = nn.functional.softplus(parts[1] + math.log(math.e - 1)) + c.least_scale
        df = LEAST_DF + nn.functional.softplus(parts[2]) if len(parts) > 2 else None
        return MixtureOfDensities(weight, parts[0], scale, df, c.density)

    def forward(
        self,
        h_BTD: Tensor,
        ctx: Ctx,
        places_P: Tensor,
        target: Any = None,
        state: State | None = None,
    ) -> HeadOut:
        """``target`` `(P, C)` values, or None for the distribution."""
        h = h_BTD.flatten(0, 1).index_select(0, places_P.long())
        dist = self._distribution(h)
        if target is None:
            return HeadOut(None, dist)
        values = target.to(dist.loc.dtype)
        if target.dtype == torch.uint8:
            values = values * (2 / 255) - 1
        return HeadOut(-dist.log_prob(values), None)


@HEADS.register("mixture")
class MixtureConfig(Config):
    """A mixture of ``components`` densities over ``d_out`` values a place.

    The head's name in `model.heads` is the modality whose values it predicts.
    """

    kind: Literal["mixture"] = "mixture"
    d_out: Annotated[int, Field(gt=0, description="values of a place, as its tokenizer gives")] = 1
    components: Annotated[int, Field(gt=0, le=1024, description="of the mixture")] = 4
    density: Annotated[
        Literal["gaussian", "student_t", "logistic"], Field(description="of each component")
    ] = "gaussian"
    least_scale: Annotated[
        float, Field(gt=0, description="floor of the spread: data without noise have no bound")
    ] = 1e-3
    reads: Annotated[str, Field(description="hidden states that it reads")] = "hidden"

    def example(self, n: int) -> Tensor:
        """Targets of ``n`` places, for plans."""
        return torch.zeros(n, self.d_out)

    def build(self, d_model: int, n_ids: int) -> Mixture:
        return Mixture(d_model, self)

    small = {"d_out": 3, "components": 2}
