"""HiPPO matrices and how a state space becomes a recurrence.

N states, D channels.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from mm.model.layer_config import LayerConfig

Measure = Literal["legs", "legt", "lmu", "lagt", "fourier"]
Discretisation = Literal["bilinear", "zoh", "euler", "backward"]


class StepsConfig(LayerConfig):
    """Of a layer that learns time steps."""

    step_min: Annotated[float, Field(gt=0)] = 0.001
    step_max: Annotated[float, Field(gt=0, description="time steps begin in this range")] = 0.1

    @model_validator(mode="after")
    def _steps(self) -> Self:
        if self.step_min > self.step_max:
            raise ValueError(f"step_min {self.step_min} is above step_max {self.step_max}")
        return self

    def draw_steps(self, log_step: Tensor) -> None:
        """Fill with logarithms of steps, evenly."""
        nn.init.uniform_(log_step, math.log(self.step_min), math.log(self.step_max))


def hippo(measure: Measure, n: int) -> tuple[Tensor, Tensor]:
    """State matrix `(N, N)` and input vector `(N,)`, float64, of ``h' = A h + B u``.

    The state holds coefficients of the past of u: ``legs`` of all of it (stretched: the exact
    projection divides both by t), ``legt`` of the last unit of time in orthonormal Legendre
    polynomials, ``lmu`` the same in the scale of the Legendre memory unit, ``lagt`` of
    all of it in Laguerre functions, which fade exponentially, ``fourier`` of the last unit of time
    in sines and cosines (n even).

    Source: Gu et al. 2020, HiPPO (arXiv:2008.07669), theorem 1 (LegT, LagT) and theorem 2 (LegS);
    LMU: Voelker et al. 2019, eq. 2; Fourier: Gu et al. 2022 (arXiv:2206.12037), section 3 (FouT).
    """
    k = torch.arange(n, dtype=torch.float64)
    row, column = k[:, None], k[None, :]
    if measure == "legs":
        p = (2 * k + 1).sqrt()
        a = torch.where(row > column, p[:, None] * p, torch.diag(k + 1))
        return -a, p
    if measure == "lagt":
        return -torch.ones(n, n, dtype=torch.float64).tril() + 0.5 * torch.eye(
            n, dtype=torch.float64
        ), torch.ones_like(k)
    if measure == "fourier":
        if n % 2:
            raise ValueError(f"hippo: fourier has pairs of states, {n} is odd")
        # Orthonormal on [0, 1]: 1, 0, then sqrt 2 cos and sin in turn.
        b = torch.zeros(n, dtype=torch.float64)
        b[0::2] = 2**0.5
        b[0] = 1.0
        rotation = torch.zeros(n, n, dtype=torch.float64)
        for j in range(1, n // 2):
            rotation[2 * j, 2 * j + 1] = -2 * torch.pi * j
            rotation[2 * j + 1, 2 * j] = 2 * torch.pi * j
        return rotation - 2 * torch.outer(b, b), 2 * b
    # Not (-1.0) ** n: torch.compile with backend "eager" writes it down as -(1.0 ** n).
    parity = lambda exponent: 1 - 2 * (exponent % 2)
    sign = torch.where(row < column, parity(row - column), torch.ones_like(row - column))
    if measure == "lmu":
        sign = torch.where(row < column, -torch.ones_like(sign), parity(row - column + 1))
        return (2 * row + 1) * sign, (2 * k + 1) * parity(k)
    p = (2 * k + 1).sqrt()
    return -sign * torch.outer(p, p), p


def nplr_legs(n: int) -> tuple[Tensor, Tensor, Tensor]:
    """LegS as ``V (diag(L) - P P^*) V^*``: L, P and ``V^* B``, each `(N / 2,)` complex128.

    One of each conjugate pair: the other half are their conjugates. N is even.

    Source: Gu et al. 2021, S4 (arXiv:2111.00396), section 3.2 and appendix C.1.
    """
    a, b = hippo("legs", n)
    p = (torch.arange(n, dtype=torch.float64) + 0.5).sqrt()
    normal = a + torch.outer(p, p)  # -1/2 I + a skew matrix
    skew = (normal - normal.T) / 2
    frequency, v = torch.linalg.eigh(-1j * skew)
    half = slice(n // 2, None)
    rotated = v[:, half].mH
    return (
        torch.complex(torch.full_like(frequency[half], -0.5), frequency[half]),
        rotated @ p.to(v.dtype),
        rotated @ b.to(v.dtype),
    )


def discretise(
    a: Tensor, b: Tensor, dt: Tensor, how: Discretisation = "bilinear"
) -> tuple[Tensor, Tensor]:
    """Matrices of ``h_t = A h_{t-1} + B u_t`` from ``h' = a h + b u`` over steps ``dt``.

    Args:
        a: `(N, N)` or `(D, N, N)`.
        b: `(N,)` or `(D, N)`.
        dt: `(D,)` step sizes.
        how: the generalised bilinear transform with 0 (euler), 1/2 (bilinear) or 1 (backward), or
            zoh: the exact answer to inputs that are constant between steps.
    Returns:
        `(D, N, N)` and `(D, N)`.
    Source: Gu et al. 2021, LSSL (arXiv:2110.13985), eq. 3; zoh: Voelker et al. 2019, section 2.
    """
    D, N = dt.shape[0], a.shape[-1]
    a, b = dt[:, None, None] * a, (dt[:, None] * b)[..., None]
    if how == "zoh":  # exp of [[a, b], [0, 0]] holds both, also of a singular a
        both = torch.cat((torch.cat((a, b), -1), a.new_zeros(D, 1, N + 1)), 1)
        both = torch.linalg.matrix_exp(both)
        return both[:, :N, :N], both[:, :N, N]
    share = {"euler": 0.0, "bilinear": 0.5, "backward": 1.0}[how]
    eye = torch.eye(N, dtype=a.dtype, device=a.device)
    solved = torch.linalg.solve(eye - share * a, torch.cat((eye + (1 - share) * a, b), -1))
    return solved[..., :N], solved[..., N]
