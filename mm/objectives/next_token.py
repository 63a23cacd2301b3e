"""Next-token prediction over interleaved modalities; one named loss a modality."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from mm.batch import Batch
from mm.config import Config
from mm.data.batching.codebooks import CODES
from mm.errors import UserError
from mm.mask_expression import looks_ahead
from mm.model.layer import ModelOut
from mm.objectives.objective import AuxWeights, Env, LossTerm, Objective
from mm.registry import OBJECTIVES, TransformField
from mm.vocabulary import MASK, Vocabulary

MASKED = "masked"  # name of the loss of masked places
VALUES, LABEL = "_values", "_label"  # after a modality: losses of its values, of its labels


@OBJECTIVES.register("next_token")
class NextTokenConfig(Config):
    """Cross-entropy of the next token, summed per modality of the target.

    Where a place has several codebooks, each code is a target.
    Values that are predicted cost ``<modality>_values`` a place, labels of documents
    ``<modality>_label`` an id: each loss is a mean of its own.
    """

    kind: Literal["next_token"] = "next_token"
    transform: TransformField | None = None
    balance: Literal["tokens", "modalities"] = Field(
        "tokens",
        description="tokens: every target counts alike; modalities: every modality's mean does",
    )
    weights: dict[str, float] = Field(
        default={}, description="factor of a modality's loss; default 1"
    )
    masked: float | None = Field(
        default=None, ge=0, description="factor of the mean loss of masked places, if a loss apart"
    )
    aux_weights: AuxWeights = {}
    head: str = "tokens"

    def build(self, vocabulary: Vocabulary | None = None) -> NextToken:
        """Make the objective.

        Raises UserError without a vocabulary: its modalities name the losses.
        """
        if vocabulary is None or not vocabulary.ranges:
            raise UserError(
                "objective 'next_token' needs token shards: set vocabulary: DIR/vocabulary.json"
            )
        names = [m + end for end in ("", VALUES, LABEL) for m in vocabulary.modalities]
        unknown = set(self.weights) - set(names)
        if unknown:
            raise UserError(
                f"objective.weights: the vocabulary has no modality '{min(unknown)}', only "
                f"{', '.join(vocabulary.modalities)}"
            )
        taken = set(self.aux_weights) & {*names, MASKED}
        if taken:
            raise UserError(
                f"objective.aux_weights: '{min(taken)}' is a loss of this objective; set "
                "objective.weights or objective.masked"
            )
        return NextToken(self, vocabulary)


class NextToken(Objective):
    """Sums of ``weight * nll`` over the targets of each modality.

    Names come from the vocabulary, so that it needs no sync with the host.

    With ``masked`` the places of hidden codes (transform `mask_conditions`) are a loss of their
    own. Source: Arora et al. 2024 (arXiv:2407.05483), JRT-RNN: the loss on the prefix.
    """

    reads_codebooks = True

    def __init__(self, config: NextTokenConfig, vocabulary: Vocabulary):
        self.config = config
        self.transform = config.transform
        self.weights, self.aux_weights = config.weights, config.aux_weights
        self.modalities = vocabulary.modalities
        # By number, those that a target can be of
        self.targets = {
            vocabulary.range(s.modality).index: s.modality
            for s in vocabulary.ranges
            if not s.continuous
        }
        # Those of values: targets where the model has a head of that name.
        self.values = {
            vocabulary.range(s.modality).index: s.modality
            for s in vocabulary.ranges
            if s.continuous
        }
        self.names = (*self.modalities, *([MASKED] if config.masked is not None else []))

    def check_model(self, model: nn.Module) -> None:
        mask = getattr(model, "mask", None)
        if mask is None:  # of another network
            return
        heads = getattr(model, "heads", ())
        predicted = {number: m for number, m in self.values.items() if m in heads}
        for number, modality in (self.targets | predicted).items():
            if looks_ahead(mask, number):
                raise UserError(
                    f"the mask {mask.key} shows a target of '{modality}' what it predicts; let "
                    "conditions alone be read both ways, such as: causal | (same_item & prefix)"
                )

    def _split(self, b: Batch, value_P: Tensor, places_P: Tensor) -> dict[str, Tensor]:
        """Sum ``value_P`` (P,) float32 by the modality of the target."""
        index = b.labels["target_modality"].flatten()[places_P].long()
        if self.config.masked is not None:
            hidden = b.ids[..., 0].flatten()[places_P.long()] == MASK
            index = torch.where(hidden, len(self.names), index)
        sums = value_P.new_zeros(len(self.names) + 1).index_add(0, index, value_P)
        return {name: sums[i] for i, name in enumerate(self.names, start=1)}

    def counts(self, b: Batch) -> dict[str, Tensor]:
        places = b.places[self.config.head]
        counts = self._split(b, b.weight.flatten()[places].float(), places)
        if CODES in b.places:
            places = b.places[CODES].long()
            codes = (b.targets.flatten(0, 1)[places, 1:] >= 0).sum(-1)
            of_codes = self._split(b, b.weight.flatten()[places].float() * codes, places)
            counts = {k: n + of_codes[k] for k, n in counts.items()}
        for name, target in b.head_targets.items():
            if target.is_floating_point() or target.dtype == torch.uint8:
                counts[name + VALUES] = b.weight.flatten()[b.places[name]].float().sum()
            else:
                counts[name + LABEL] = (target >= 0).sum().float()
        return counts | self.aux_counts(b)

    def scales(self, n: Mapping[str, Tensor]) -> Mapping[str, Tensor | float]:
        factors: dict[str, Tensor | float] = {**super().scales(n)}
        if self.config.balance == "tokens":
            total = torch.stack([n[k] for k in self.modalities]).sum().clamp_min(1.0)
            factors |= {k: factors[k] * n[k] / total for k in self.modalities}
        if self.config.masked is not None:
            factors[MASKED] = self.config.masked
        return factors

    def run_model(self, model: Callable[..., ModelOut], b: Batch) -> ModelOut:
        """One pass over a micro-batch."""
        return model(b)

    def terms(
        self, micros: Sequence[Batch], nets: Mapping[str, Callable[..., ModelOut]], env: Env
    ) -> Iterator[LossTerm]:
        for i, b in enumerate(micros):
            out = self.run_model(nets["model"], b)
            nll = out.heads[self.config.head].nll
            assert nll is not None  # targets were given
            places = b.places[self.config.head]
            weight = b.weight.flatten()[places]
            losses = self._split(b, nll.float() * weight, places)
            if CODES in b.places:
                nll, places = out.heads[CODES].nll, b.places[CODES]
                assert nll is not None
                of_codes = self._split(b, nll.float() * b.weight.flatten()[places], places)
                losses = {k: v + of_codes[k] for k, v in losses.items()}
            losses |= self._others(out, b)
            yield LossTerm(losses | self.aux_losses(out, b), step=i == len(micros) - 1)

    def _others(self, out: ModelOut, b: Batch) -> dict[str, Tensor]:
        """Sums of the losses of values and labels."""
        losses = {}
        for name, target in b.head_targets.items():
            nll = out.heads[name].nll
            assert nll is not None
            if target.is_floating_point() or target.dtype == torch.uint8:
                weight = b.weight.flatten()[b.places[name]]
                losses[name + VALUES] = (nll.float() * weight).sum()
            else:
                losses[name + LABEL] = nll.float().sum()
        return losses
