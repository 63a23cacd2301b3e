"""Connectionist temporal classification: a label of a whole document without an alignment.

P documents, F frames of the longest, L ids of the longest label, D model, N ids.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn

from mm.batch import Sum
from mm.config import Config
from mm.model.context import Ctx
from mm.model.layer import Head, HeadOut
from mm.registry import HEADS
from mm.state import State
from mm.vocabulary import PAD

BLANK = PAD  # no label holds it
NEVER = -1e30  # log-probability of what cannot be: an infinite one has no gradient


class Alignments(NamedTuple):
    """Parameter-free distribution over id sequences, ``-1`` past the end of each.

    Args:
        log_probs: `(P, F, N)` of the frames, blank = id 0.
        length: `(P,)` frames of each document.
    """

    log_probs: Tensor
    length: Tensor

    @property
    def logits(self) -> None:
        """Of whole sequences there are too many."""

    def log_prob(self, value: Tensor) -> Tensor:
        """`(P,)` log-probability of ids `(P, L)`, over all alignments; -inf: of too few frames."""
        sizes, ids = (value >= 0).sum(-1), value.long().clamp_min(0)
        if self.log_probs.device.type != "cpu":  # torch's own asks the device for the lengths
            return sum_alignments(self.log_probs, ids, self.length, sizes)
        frames = self.log_probs.transpose(0, 1)
        nll = nn.functional.ctc_loss(frames, ids, self.length, sizes, BLANK, "none", True)
        twice = (value[:, 1:] == value[:, :-1]) & (value[:, 1:] >= 0)  # a blank between them
        return torch.where(self.length < sizes + twice.sum(-1), -torch.inf, -nll)

    def sample(self, generator: torch.Generator, temperature: float = 0.0) -> Tensor:
        """`(P, F)` ids of the alignment that is likeliest (0) or drawn, collapsed."""
        if temperature == 0:
            frames = self.log_probs.argmax(-1)
        else:
            p = (self.log_probs / temperature).softmax(-1)
            frames = torch.multinomial(p.flatten(0, 1), 1, generator=generator).view(p.shape[:2])
        new = frames != torch.nn.functional.pad(frames, (1, 0), value=BLANK)[:, :-1]
        at = torch.arange(frames.shape[1], device=frames.device)
        kept = new & (frames != BLANK) & (at < self.length[:, None])
        order = (~kept).to(torch.int8).argsort(dim=1, stable=True)
        return torch.where(kept, frames, -1).gather(1, order)


def sum_alignments(log_probs: Tensor, ids: Tensor, length: Tensor, sizes: Tensor) -> Tensor:
    """`(P,)` log-probability of all alignments, frame after frame; -inf where there is none.

    Source: Graves et al. 2006, section 4.1: the forward variables over labels between blanks.
    """
    P, F, _ = log_probs.shape
    L = ids.shape[1]
    states = ids.new_full((P, 2 * L + 1), BLANK)
    states[:, 1::2] = ids
    said = log_probs.gather(2, states[:, None].expand(-1, F, -1))
    # A label may follow the one before it without a blank, where the two differ.
    skips = torch.zeros_like(states, dtype=torch.bool)
    skips[:, 3::2] = ids[:, 1:] != ids[:, :-1]
    at = torch.arange(2 * L + 1, device=ids.device)
    alpha = torch.where(at < 2, said[:, 0], NEVER)
    back = lambda a, n: nn.functional.pad(a, (n, 0), value=NEVER)[:, : a.shape[1]]
    for f in range(1, F):
        two = torch.where(skips, back(alpha, 2), NEVER)
        new = torch.stack((alpha, back(alpha, 1), two)).logsumexp(0) + said[:, f]
        alpha = torch.where((f < length)[:, None], new, alpha)
    last = 2 * sizes[:, None]
    ends = torch.cat((alpha.gather(1, last), alpha.gather(1, (last - 1).clamp_min(0))), 1)
    only = torch.where(
        (sizes == 0)[:, None] & (torch.arange(2, device=ids.device) == 1), NEVER, ends
    )
    total = only.logsumexp(1)
    return torch.where(total > NEVER / 2, total, -torch.inf)


class Ctc(Head):
    """A linear layer from every place of a document to ids and blank; sums over alignments.

    Its place is the first of each document that has a label. Sources: Graves et al. 2006; on the
    states of a decoder-only model: Wu et al. 2023 (arXiv:2307.03917); ``split``, k frames of a
    place: Libovický and Helcl 2018 (arXiv:1811.04719), section 3.
    """

    predicts_ids = False

    def __init__(self, d_model: int, n_ids: int, config: CtcConfig):
        super().__init__()
        self.reads, self.split = config.reads, config.split
        self.expand = nn.Linear(d_model, config.split * d_model) if config.split > 1 else None
        self.weight = nn.Parameter(torch.empty(n_ids, d_model))
        self.bias = nn.Parameter(torch.empty(n_ids))

    def init_weights(self) -> None:
        nn.init.normal_(self.weight, std=0.25 * self.weight.shape[1] ** -0.5)
        nn.init.zeros_(self.bias)
        if self.expand is not None:
            nn.init.normal_(self.expand.weight, std=self.expand.weight.shape[1] ** -0.5)
            nn.init.zeros_(self.expand.bias)

    def forward(
        self,
        h_BTD: Tensor,
        ctx: Ctx,
        places_P: Tensor,
        target: Any = None,
        state: State | None = None,
    ) -> HeadOut:
        """``target`` `(P, L)` ids, -1 past the end; None for the distribution.

        Reports ``too_short``: the share of documents with too few frames for their label, which
        cost nothing.
        """
        first, flat = places_P.long(), h_BTD.flatten(0, 1)
        document = ctx.layout.fields.document.flatten().long()
        sizes = torch.zeros(
            ctx.layout.slot.shape[0] + 1, dtype=torch.long, device=document.device
        ).index_add_(0, document, torch.ones_like(document))
        length = sizes[document[first]] * self.split
        at = torch.arange(max(1, ctx.layout.max_seqlen), device=first.device)
        frames = flat[(first[:, None] + at).clamp_max(flat.shape[0] - 1)]
        if self.expand is not None:
            frames = self.expand(frames).view(len(first), len(at) * self.split, -1)
        logits = nn.functional.linear(frames, self.weight.to(frames.dtype))
        wide = torch.promote_types(logits.dtype, torch.float32)
        log_probs = (logits.to(wide) + self.bias.to(wide)).log_softmax(-1)
        dist = Alignments(log_probs, length)
        if target is None:
            return HeadOut(None, dist)
        if not target.shape[1]:  # no document has a label: its parameters get zeros
            nll = log_probs.sum((1, 2)) * 0.0
            return HeadOut(nll, None, aux={"too_short": Sum(nll.sum(), nll.detach().sum())})
        nll = -dist.log_prob(target)
        lost = ~torch.isfinite(nll.detach())
        aux = {"too_short": Sum(lost.float().sum(), torch.ones_like(nll).sum().detach())}
        return HeadOut(torch.where(lost, nll.new_zeros(()), nll), None, aux=aux)


@HEADS.register("ctc")
class CtcConfig(Config):
    """CTC over the vocabulary; its name in `model.heads` is the modality of the label.

    The transform `to_label` makes the label.
    """

    kind: Literal["ctc"] = "ctc"
    split: Annotated[
        int, Field(gt=0, le=16, description="frames of a place, for labels longer than the input")
    ] = 1
    reads: Annotated[str, Field(description="hidden states that it reads")] = "hidden"

    def example(self, n: int) -> Tensor:
        """Targets of ``n`` places, for plans."""
        return torch.full((n, 2), PAD + 1)

    def build(self, d_model: int, n_ids: int) -> Ctc:
        return Ctc(d_model, n_ids, self)
