"""How far a correct run may be from the reference: rounding, and nothing else.

One result rounded to a format with unit roundoff u is wrong by up to u of its size, and the errors
of K results that depend on each other add up like a random walk, to about u * sqrt(K) (Higham,
Accuracy and Stability of Numerical Algorithms, 2nd edition, sections 2.8 and 4.5). What is counted:

- fp32 (u = 2**-24): sums over tokens, micro-batches and processes in another order, once for every
  weight matrix between a parameter and the loss: K = tokens of a step * matrices.
- bf16, under autocast too (u = 2**-9): products are summed in fp32, but each result is stored with
  8 bits, forward and backward: K = 2 * matrices. Tokens average it out, they do not add to it.

`SAFETY` times that is allowed. A sum in place of a mean over N processes is wrong by N - 1, a rank
that is left out by about 1 / N: both are far over it.
"""

from __future__ import annotations

import math

SAFETY = 4.0
ROUNDOFF = {"fp32": 2.0**-24, "autocast_bf16": 2.0**-9, "bf16": 2.0**-9}
# Optimizers are given the same gradients, and compute in fp32 in every setting: what is left is the
# order of sums over whole parameters (Adafactor, Muon), and of the weights themselves.
UPDATE = SAFETY * ROUNDOFF["fp32"] * 64


def rounding(precision: str, tokens: int, matrices: int) -> float:
    """Relative difference that is allowed of a loss or of a parameter's gradient.

    Args:
        precision: as it is resolved, not "auto".
        tokens: of one step, over all processes.
        matrices: parameters of two and more dimensions of the network.
    """
    results = max(1, tokens) if precision == "fp32" else 2
    return SAFETY * ROUNDOFF[precision] * math.sqrt(results * max(1, matrices))
