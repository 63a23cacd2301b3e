"""Wider feed-forwards and more heads that at first add nothing. H heads, G key heads, K width."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field
from torch import Tensor, nn

from mm.errors import UserError
from mm.model.mixers.attention.attention import Attention
from mm.registry import SURGERIES
from mm.surgery.base import Operated, Surgery, network_of, own_tensors, stack_of, with_stack
from mm.vocabulary import Vocabulary

FEED_FORWARDS = ("mlp", "swiglu")


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
        old = network_of(before)
        new = network_of(Operated(config, {}, before.vocabulary), seed=1)
        taken, own = old.state_dict(), own_tensors(new)
        out = {name: t.clone() for name, t in taken.items() if own[name].shape == t.shape}
        for path, part in old.named_modules():
            its = new.get_submodule(path)
            for name in ("gate_up", "up", "qkv", "out", "gate"):
                if isinstance(getattr(part, name, None), nn.Module):
                    _grow(out, taken, own, f"{path}.{name}.weight", name, part, its)
            for name, tensor in part.state_dict(prefix=f"{path}.").items():
                if isinstance(part, Attention) and name not in out and name in own:
                    grown_tensor = own[name]  # one a head
                    grown_tensor[: len(tensor)] = tensor
                    out[name] = grown_tensor
        return Operated(config, {**own, **out}, before.vocabulary)

    def _heads(self, H: int, G: int, K: int) -> dict[str, int]:
        assert self.heads is not None
        if self.heads < H or (self.heads * G) % H:
            raise UserError(
                f"surgery 'widen': heads {self.heads} is no multiple of {H // G}, or few"
            )
        return {"heads": self.heads, "kv_heads": self.heads * G // H, "head_dim": K}


def _grow(
    out: dict[str, Tensor],
    old: dict[str, Tensor],
    new: dict[str, Tensor],
    name: str,
    word: str,
    part: nn.Module,
    its: nn.Module,
) -> None:
    """Put a matrix into the wider one: blocks of rows at their beginnings, or zero columns."""
    if name not in old or name in out:
        return
    was, grown = old[name], new[name].clone()
    if grown.dim() != 2 or min(b - a for a, b in zip(was.shape, grown.shape, strict=True)) < 0:
        raise UserError(f"surgery 'widen': {name} is {tuple(was.shape)}, and cannot shrink")
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
    out[name] = grown
