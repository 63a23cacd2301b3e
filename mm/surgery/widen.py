"""Wider feed-forwards and more heads that at first add nothing. H heads, G key heads, K width."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from mm.errors import UserError
from mm.model.mixers.attention.attention import Attention
from mm.registry import SURGERIES
from mm.surgery.base import (
    FreshWeights,
    Operated,
    Source,
    Surgery,
    assemble,
    empty_network,
    stack_of,
    with_stack,
)
from mm.vocabulary import Vocabulary

FEED_FORWARDS = ("mlp", "swiglu")
SEED = 1  # of what is new


@SURGERIES.register("widen")
class Widen(Surgery):
    """New hidden units and heads begin as in a fresh model, but what they put out is times zero.

    The width of the residual stream stays.

    Source: Gesmundo and Maile 2023 (arXiv:2308.06103), section 3.
    """

    kind: Literal["widen"] = "widen"
    hidden: Annotated[int, Field(gt=0, description="units of mlp and swiglu")] | None = None
    heads: (
        Annotated[int, Field(gt=0, description="of each `attention`; key heads grow as they do")]
        | None
    ) = None

    keeps_function: ClassVar[bool] = True
    small = {"hidden": 96}

    def apply(self, before: Operated, wanted: Vocabulary | None) -> Operated:
        stack, changes = stack_of(before.config, self.kind), {}
        width = before.config.d_model
        if self.hidden is not None:
            if getattr(stack.ffn, "kind", None) not in FEED_FORWARDS:
                raise UserError(f"surgery 'widen': hidden is of {' and '.join(FEED_FORWARDS)}")
            changes["ffn"] = stack.ffn.to_dict() | {"hidden": self.hidden}
        if self.heads is not None:
            mixers = {word: stack.mixer(word) for word in stack.words()}
            grown = {w: m for w, m in mixers.items() if m.kind == "attention"}
            if not grown:
                raise UserError("surgery 'widen': heads: there is no `attention` layer")
            changes["mixers"] = {word: m.to_dict() for word, m in stack.mixers.items()} | {
                word: m.to_dict() | self._heads(*m.sizes(width)) for word, m in grown.items()
            }
        config = with_stack(before.config, **changes)
        old, new = (empty_network(c, before.vocabulary) for c in (before.config, config))
        taken, own = old.state_dict(), new.state_dict()
        fresh, given = FreshWeights(config, before.vocabulary, SEED), before.tensors
        table: dict[str, Source] = {n: n for n, t in taken.items() if own[n].shape == t.shape}
        for path, part in old.named_modules():
            its = new.get_submodule(path)
            for word in ("gate_up", "up", "qkv", "out", "gate"):
                name = f"{path}.{word}.weight"
                if name in taken and name not in table and _holds(part, word):
                    _require_growth(name, taken[name].shape, own[name].shape)
                    table[name] = lambda n=name, word=word, part=part, its=its: _grow(
                        given[n], fresh[n].clone(), word, part, its
                    )
            for name in part.state_dict(prefix=f"{path}."):
                if isinstance(part, Attention) and name not in table and name in own:
                    table[name] = lambda n=name: _one_a_head(given[n], fresh[n].clone())
        return assemble(before, config, table, seed=SEED)

    def _heads(self, H: int, G: int, K: int) -> dict[str, int]:
        assert self.heads is not None
        if self.heads < H or (self.heads * G) % H:
            raise UserError(
                f"surgery 'widen': heads {self.heads} is no multiple of {H // G}, or few"
            )
        return {"heads": self.heads, "kv_heads": self.heads * G // H, "head_dim": K}


def _holds(part: nn.Module, word: str) -> bool:
    return isinstance(getattr(part, word, None), nn.Module)


def _require_growth(name: str, was: torch.Size, grown: torch.Size) -> None:
    if len(grown) != 2 or min(b - a for a, b in zip(was, grown, strict=True)) < 0:
        raise UserError(f"surgery 'widen': {name} is {tuple(was)}, and cannot shrink")


def _one_a_head(was: Tensor, grown: Tensor) -> Tensor:
    grown[: len(was)] = was
    return grown


def _grow(was: Tensor, grown: Tensor, word: str, part: Any, its: Any) -> Tensor:
    """A matrix in the wider one: blocks of rows at their beginnings, or zero columns."""
    if word == "out":
        grown.zero_()
        grown[:, : was.shape[1]] = was
    elif word == "qkv":
        at = [0, 0]
        for wide in ("heads", "kv_heads", "kv_heads"):
            a, b = (getattr(m, wide) * m.head_dim for m in (part, its))
            grown[at[1] : at[1] + a] = was[at[0] : at[0] + a]
            at = [at[0] + a, at[1] + b]
    else:
        n = 2 if word == "gate_up" else 1
        a, b = len(was) // n, len(grown) // n
        for i in range(n):
            grown[i * b : i * b + a] = was[i * a : i * a + a]
    return grown
