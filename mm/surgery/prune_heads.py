"""Attention without some of its heads, beside a recurrence that learns what they did."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from mm.errors import UserError, did_you_mean
from mm.model.mixers.attention.attention import Attention
from mm.registry import MIXERS, SURGERIES, MixerField
from mm.surgery.base import (
    LAYERS,
    Operated,
    Surgery,
    assemble,
    empty_network,
    stack_of,
    with_stack,
)
from mm.surgery.rank_heads import table_without_heads
from mm.vocabulary import Vocabulary


@SURGERIES.register("prune_heads")
class PruneHeads(Surgery):
    """Layers of `attention` become `mixed_heads`: the heads that stay, and a fresh mixer beside.

    Which heads look nearby alone say `recency_ratios` and `most_recent` of
    `mm.surgery.rank_heads`.

    Source: Yan et al. 2024, RecurFormer (arXiv:2410.12850).
    """

    kind: Literal["prune_heads"] = "prune_heads"
    heads: dict[str, tuple[int, ...]] = Field(
        default={}, description="layer, such as backbone.layers.0.mixer -> heads that it gives up"
    )
    beside: MixerField = Field(default="rg_lru", validate_default=True)

    def apply(self, before: Operated, wanted: Vocabulary | None) -> Operated:
        stack = stack_of(before.config, self.kind)
        module = empty_network(before.config, before.vocabulary)
        layers = {path for path, m in module.named_modules() if isinstance(m, Attention)}
        mixers: dict[str, Any] = {word: m.to_dict() for word, m in stack.mixers.items()}
        words = stack.words()
        for path, gone in self.heads.items():
            if path not in layers or not path.startswith(LAYERS):
                raise UserError(
                    f"surgery 'prune_heads': '{path}' is no attention layer"
                    f"{did_you_mean(path, layers)}"
                )
            at = int(path.removeprefix(LAYERS).split(".")[0])
            was = stack.mixer(words[at])
            stay = was.heads - len({*gone})
            if stay < 1 or not all(0 <= h < was.heads for h in gone):
                raise UserError(f"surgery 'prune_heads': {path} has heads 0 to {was.heads - 1}")
            _, _, K = was.sizes(before.config.d_model)
            kept = was.to_dict() | {"heads": stay, "kv_heads": None, "head_dim": K}
            words[at] = f"{words[at]}_{stay}_heads"
            parts = [kept, self.beside.to_dict()]
            mixers[words[at]] = MIXERS.parse({"kind": "mixed_heads", "parts": parts}).to_dict()
        config = with_stack(before.config, pattern=" ".join(words), depth=None, mixers=mixers)
        given_up = {path: [*gone] for path, gone in self.heads.items()}
        return assemble(before, config, table_without_heads(module, before.tensors, given_up))
