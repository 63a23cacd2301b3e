"""Replaced token detection: a small generator fills in hidden ids, the model says which are its.

B rows, T tokens, P places, N ids.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from mm.batch import Batch
from mm.errors import UserError
from mm.model.heads.binary import Binary
from mm.model.layer import ModelOut
from mm.objectives.masked import NOISE, Masked, MaskedConfig, Noise
from mm.objectives.objective import Env, LossTerm, Network
from mm.registry import OBJECTIVES, NetworkField
from mm.vocabulary import Vocabulary

GENERATOR, REPLACED = "generator", "replaced"
DRAWN = "drawn"  # label: `(B, T)` float32 in [0, 1), which says what is drawn at a place


@OBJECTIVES.register("replaced_token")
class ReplacedTokenConfig(MaskedConfig):
    """Hidden codes are drawn from a generator; the model judges every token."""

    kind: Literal["replaced_token"] = "replaced_token"  # type: ignore[assignment]
    generator: NetworkField = Field(
        description="a smaller language model, which learns masked modelling"
    )
    weight: Annotated[float, Field(ge=0, description="factor of the judging loss")] = 50.0
    predicted_at: Literal["own"] = "own"

    small = {
        "generator": {
            "kind": "lm",
            "d_model": 8,
            "backbone": {"kind": "stack", "depth": 1, "mixers": {"attention": {"heads": 2}}},
        },
        "rate": 0.5,
    }

    def build(self, vocabulary: Vocabulary | None = None) -> ReplacedToken:
        """Make the objective. Raises UserError as that of `masked`."""
        super().build(vocabulary)
        assert vocabulary is not None  # the base refused that
        return ReplacedToken(self, vocabulary)


class ReplacedToken(Masked):
    """``L_MLM(generator) + weight * L_Disc(model)``, over all tokens of documents.

    ``L_Disc = -sum_t 1[x'_t = x_t] log D(x', t) + 1[x'_t != x_t] log(1 - D(x', t))``, where ``x'``
    has draws of the generator at the hidden places, without a gradient; one that is the true id by
    chance counts as real. Here the model's head gives the logit of "replaced", ``1 - D``.

    Source: Clark et al. 2020, ELECTRA (arXiv:2003.10555), section 2; weight 50 and 0.15 hidden:
    its appendix A. The networks share no embeddings, and what is drawn is a code of the place's
    modality.
    """

    config: ReplacedTokenConfig

    def __init__(self, config: ReplacedTokenConfig, vocabulary: Vocabulary):
        super().__init__(config, vocabulary)
        self.networks = {GENERATOR: Network(config.generator)}

    def check_model(self, model: nn.Module) -> None:
        super().check_model(model)
        heads = getattr(model, "heads", {})
        if list(heads) != [REPLACED] or not isinstance(heads[REPLACED], Binary):
            raise UserError(
                f"objective 'replaced_token' trains a model whose only head is '{REPLACED}': set "
                f"model.heads={{{REPLACED}: binary}}"
            )

    def corrupt(self, b: Batch, rng: Any, scheduled: Mapping[str, float]) -> Batch:
        drawn = Noise(int(scheduled[NOISE]), b).uniform(DRAWN)
        b = super().corrupt(b, rng, scheduled)
        return dataclasses.replace(b, labels={**b.labels, DRAWN: drawn})

    def counts(self, b: Batch) -> dict[str, Tensor]:
        return super().counts(b) | {REPLACED: (b.layout.fields.document > 0).sum().float()}

    def held_out(self, n: Mapping[str, Any]) -> tuple[str, ...]:
        """The judging loss: the model that is kept has no other."""
        return (REPLACED,)

    def scales(self, n: Mapping[str, Tensor]) -> Mapping[str, Tensor | float]:
        own = {k: v for k, v in n.items() if k != REPLACED}
        factors = dict(super().scales(own)) if own else {}
        return factors | ({REPLACED: self.config.weight} if REPLACED in n else {})

    def terms(
        self, micros: Sequence[Batch], nets: Mapping[str, Callable[..., ModelOut]], env: Env
    ) -> Iterator[LossTerm]:
        head, last, judged = self.config.head, len(micros) - 1, []
        for i, b in enumerate(micros):
            out = nets[GENERATOR](b, mask=self.pass_mask, loss=False, heads=(head,))
            dist = out.heads[head].dist
            assert dist is not None
            logits, places = dist.logits.float(), b.places[head].long()  # type: ignore[attr-defined]
            true = b.targets[..., 0].flatten()[places].long()
            nll = torch.nn.functional.cross_entropy(logits, true, reduction="none")
            judged.append(self._filled_in(b, logits.detach(), places))
            losses = self._split(b, nll * b.weight.flatten()[places], places)
            yield LossTerm(losses, GENERATOR, i == last)
        for i, b in enumerate(judged):
            out = nets["model"](b, mask=self.pass_mask, heads=(REPLACED,))
            nll = out.heads[REPLACED].nll
            assert nll is not None
            real = (b.layout.fields.document > 0).flatten()
            losses = {REPLACED: (nll * real).sum()}
            yield LossTerm(losses | self.aux_losses(out, b), step=i == last)

    def _filled_in(self, b: Batch, logits_PN: Tensor, places_P: Tensor) -> Batch:
        """The batch with draws at its hidden places, and which of them are other ids."""
        modality = b.layout.fields.modality.flatten()[places_P].long()
        first, stop = (t.to(logits_PN.device)[modality, None] for t in (self.first, self.stop))
        ids = torch.arange(logits_PN.shape[1], device=logits_PN.device)
        logits = logits_PN.masked_fill((ids < first) | (ids >= stop), float("-inf"))
        share = logits.softmax(-1).nan_to_num(0.0).cumsum(-1)  # NaN of no code: it is not hidden
        u = b.labels[DRAWN].flatten()[places_P, None] * share[:, -1:]
        drawn = torch.minimum((share <= u).sum(-1), stop[:, 0] - 1)
        true = b.targets[..., 0].flatten()
        hidden = b.weight.flatten()[places_P] > 0
        shown = true.clone()
        shown[places_P] = torch.where(hidden, drawn.to(true.dtype), true[places_P])
        other = (shown != true).float()
        made = torch.cat((shown.view_as(b.targets[..., 0])[..., None], b.ids[..., 1:]), -1)
        every = {REPLACED: torch.arange(len(other), device=other.device, dtype=torch.int32)}
        return dataclasses.replace(b, ids=made, head_targets={REPLACED: other}, places=every)
