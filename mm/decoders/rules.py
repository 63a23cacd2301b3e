"""Rules on logits `(N, V)`: span grammar, temperature, top-k, top-p. Forbidden = -inf."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mm.decoders.base import Rule, Session, is_fixed
from mm.errors import UserError

NEVER = float("-inf")
COLDEST, HOTTEST = 1e-4, 1e4  # temperatures; far beyond, logits are all equal or not finite


def span_grammar(logits: Tensor, session: Session) -> Tensor:
    """Keep what may stand next in a span of ``session.to``; the rest has probability exactly 0.

    - only ids of that modality, and its end;
    - several codebooks: place p takes ids of book p % n_codebooks, the end stands at frame borders
      only;
    - a grid: the end stands after exactly prod(grid) * n_codebooks ids;
    - no grid: at least one frame, and from ``session.limit`` on the end is the only choice.
    """
    tables = session.memo.get("span_grammar")
    if tables is None:
        tables = session.memo["span_grammar"] = _book_tables(session, logits)
    spec, ids = session.spec, session.range
    total = is_fixed(spec)
    must_end_N = session.length >= (session.limit if total is None else total)
    may_end_N = session.length >= (1 if total is None else total)
    if spec.n_codebooks > 1:
        phase_N = session.length % spec.n_codebooks
        tables = tables[phase_N]
        must_end_N, may_end_N = must_end_N & (phase_N == 0), may_end_N & (phase_N == 0)
    never_NV = tables | must_end_N[:, None]
    never_NV[:, ids.end] = ~(may_end_N | must_end_N)
    return logits.masked_fill(never_NV, NEVER)


def _book_tables(session: Session, like: Tensor) -> Tensor:
    """`(n_codebooks, V)` bool: ids that may not stand at each place of a frame."""
    spec, ids = session.spec, session.range
    tables = torch.ones(spec.n_codebooks, like.shape[-1], dtype=torch.bool, device=like.device)
    for book in range(spec.n_codebooks):
        first = ids.first + book * spec.vocab_size
        tables[book, first : first + spec.vocab_size] = False
    return tables


def temperature(t: float) -> Rule:
    """Divide logits by ``t``. Raises ValueError unless t > 0 (0: the decoder takes the argmax)."""
    if not t > 0:
        raise ValueError(f"temperature must be above 0, not {t}")
    return lambda logits, session: logits / t


def top_k(k: int) -> Rule:
    """Keep the ``k`` largest logits of a row (and any that equal the k-th)."""
    if k < 1:
        raise ValueError(f"top_k must be at least 1, not {k}")

    def rule(logits: Tensor, session: Session) -> Tensor:
        if k >= logits.shape[-1]:
            return logits
        least = logits.topk(k, dim=-1).values[:, -1:]
        return logits.masked_fill(logits < least, NEVER)

    return rule


def top_p(p: float) -> Rule:
    """Keep the smallest set of most likely ids whose probability reaches ``p``, at least one.

    Source: Holtzman et al. 2020 (arXiv:1904.09751), section 3.1.
    """
    if not 0 < p <= 1:
        raise ValueError(f"top_p must be in (0, 1], not {p}")

    def rule(logits: Tensor, session: Session) -> Tensor:
        if p == 1:
            return logits
        ordered, place = logits.sort(dim=-1, descending=True)
        prob = torch.softmax(ordered.double(), -1)
        # The mass BEFORE an id decides: the one that crosses p is kept, and the first one always.
        drop = prob.cumsum(-1) - prob >= p
        return logits.masked_fill(torch.zeros_like(drop).scatter(-1, place, drop), NEVER)

    return rule


def sampling(
    t: float, k: int, p: float, cfg_scale: float, extra: Sequence[Rule] = ()
) -> list[Rule]:
    """All rules of one call in their order: the grammar, ``extra``, temperature, top-k, top-p.

    Raises UserError on a setting out of range, NaN among them.
    """
    if t != 0 and not COLDEST <= t <= HOTTEST:
        raise UserError(f"temperature must be 0 (greedy) or {COLDEST:g} to {HOTTEST:g}, not {t}")
    if k < 0:
        raise UserError(f"top_k must be 0 (off) or more, not {k}")
    if not 0 < p <= 1:
        raise UserError(f"top_p must be in (0, 1], not {p}")
    if not abs(cfg_scale) <= HOTTEST:
        raise UserError(f"cfg_scale must be -{HOTTEST:g} to {HOTTEST:g}, not {cfg_scale}")
    rules: list[Rule] = [span_grammar, *extra]
    if t > 0:
        rules.append(temperature(t))
        if k:
            rules.append(top_k(k))
        if p < 1:
            rules.append(top_p(p))
    return rules
