"""An objective: next-token prediction that gives up on hopeless targets.

A wrong caption then teaches nothing. P places.

    mm train configs/quickstart/backbone.yaml "imports=[examples.objective_truncated]" \
        stages.0.objective.kind=truncated_next_token stages.0.objective.cap=6.0
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Literal

from pydantic import Field

from mm.batch import Batch
from mm.model.layer import ModelOut
from mm.objectives.next_token import NextToken, NextTokenConfig
from mm.objectives.objective import Env, LossTerm
from mm.registry import OBJECTIVES
from mm.vocabulary import Vocabulary


class TruncatedNextToken(NextToken):
    """Sums of ``weight * min(nll, cap)``: beyond the cap there is no gradient.

    Source: after Kang & Hashimoto 2020 (arXiv:2004.14589), section 4; by token, fixed cap.
    """

    config: TruncatedNextTokenConfig

    def terms(
        self, micros: Sequence[Batch], nets: Mapping[str, Callable[..., ModelOut]], env: Env
    ) -> Iterator[LossTerm]:
        for i, b in enumerate(micros):
            nll = nets["model"](b).heads[self.config.head].nll
            assert nll is not None  # targets were given
            places = b.places[self.config.head]
            capped = nll.float().clamp(max=self.config.cap) * b.weight.flatten()[places]
            yield LossTerm(self._split(b, capped, places), step=i == len(micros) - 1)


@OBJECTIVES.register("truncated_next_token")
class TruncatedNextTokenConfig(NextTokenConfig):
    """Next-token prediction with a capped loss."""

    kind: Literal["truncated_next_token"] = "truncated_next_token"  # type: ignore[assignment]
    cap: Annotated[float, Field(gt=0, description="nats")] = 8.0

    def build(self, vocabulary: Vocabulary | None = None) -> TruncatedNextToken:
        plain = super().build(vocabulary)  # its checks
        assert vocabulary is not None and isinstance(plain, NextToken)
        return TruncatedNextToken(self, vocabulary)
