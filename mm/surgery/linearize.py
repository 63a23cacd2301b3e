"""Attention layers that go on as recurrent ones with their projections."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from mm.errors import UserError
from mm.model.mixers.attention.attention import Attention
from mm.model.slices import shapes_of
from mm.registry import SURGERIES
from mm.surgery.base import (
    LAYERS,
    Operated,
    Source,
    Surgery,
    assemble,
    empty_network,
    stack_of,
    with_stack,
)
from mm.vocabulary import Vocabulary

FEATURES = Literal["elu1", "relu", "taylor", "softmax"]


@SURGERIES.register("linearize")
class Linearize(Surgery):
    """An `attention` layer becomes a `linear_attention` with its queries, keys, values and out.

    All of them do, or those of ``layers``, which makes a hybrid whose pattern says
    ``linear_attention`` where it said ``attention``. Key heads are repeated for the heads that
    share them; norms, gates and positions of the attention are left behind. It computes something
    else, and is trained on: with `distil` and the old model as teacher.

    Source: Kasai et al. 2021, T2R (arXiv:2103.13076), section 2; some layers alone: Wang et al.
    2024, The Mamba in the Llama (arXiv:2408.15237), section 2.
    """

    kind: Literal["linearize"] = "linearize"
    feature: FEATURES = "elu1"
    layers: Annotated[
        tuple[int, ...] | None,
        Field(min_length=1, description="numbers from 0; default: all layers of attention"),
    ] = None

    def apply(self, before: Operated, wanted: Vocabulary | None) -> Operated:
        stack = stack_of(before.config, self.kind)
        words = stack.words()
        by_word = {key: stack.to_dict()[key] for key in ("mixers", "blocks", "ffns")}
        found = [i for i, word in enumerate(words) if stack.mixer(word).kind == "attention"]
        if not found:
            raise UserError("surgery 'linearize': this model has no `attention` layer")
        chosen = found if self.layers is None else sorted({*self.layers})
        if {*chosen} - {*found}:
            raise UserError(
                f"surgery 'linearize': of the layers {chosen} only {found} are `attention`"
            )
        new = {}  # the word of a layer that it becomes
        for word in dict.fromkeys(words[i] for i in chosen):
            stays = any(w == word for i, w in enumerate(words) if i not in chosen)
            new[word] = _free(f"linear_{word}", {*words, *stack.mixers}) if stays else word
            H, _, K = stack.mixer(word).sizes(before.config.d_model)
            for own in by_word.values():
                own.update({new[word]: own[word]} if word in own else {})
            by_word["mixers"][new[word]] = {
                "kind": "linear_attention",
                "heads": H,
                "key_dim": K,
                "expand_value": H * K / before.config.d_model,
                "feature": self.feature,
                "scale": True,
            }
        pattern = [new[word] if i in chosen else word for i, word in enumerate(words)]
        changed = {} if pattern == words else {"pattern": " ".join(pattern), "depth": None}
        config = with_stack(before.config, **by_word, **changed)
        old, shapes = empty_network(before.config, before.vocabulary), shapes_of(before.tensors)
        table: dict[str, Source] = {name: name for name in before.tensors}
        for path, part in old.named_modules():
            if not isinstance(part, Attention) or _layer(path) not in chosen:
                continue
            H, G, K = part.heads, part.kv_heads, part.head_dim
            name = f"{path}.qkv.weight"
            if name not in table or shapes[name][0] != (H + 2 * G) * K:
                raise UserError(f"surgery 'linearize': {path}: only a dense qkv can be taken")
            table = {k: v for k, v in table.items() if not k.startswith(f"{path}.")}
            table[f"{path}.out.weight"] = f"{path}.out.weight"
            table[name] = lambda n=name, H=H, G=G, K=K: _each_its_own(before.tensors[n], H, G, K)
        return assemble(before, config, table)


def _each_its_own(qkv: Tensor, H: int, G: int, K: int) -> Tensor:
    """`((H + 2 G) K, D)` to `(3 H K, D)`: keys and values once a head that shares them."""
    parts = qkv.unflatten(0, (H + 2 * G, K)).split((H, G, G))
    heads = [parts[0], *(t.repeat_interleave(H // G, 0) for t in parts[1:])]
    return torch.cat(heads).flatten(0, 1)


def _free(word: str, taken: set[str]) -> str:
    """``word``, or a longer one that no layer is called by."""
    return _free(f"{word}_", taken) if word in taken else word


def _layer(path: str) -> int:
    """The number of the layer in which a module stands; -1 of none."""
    number = path.removeprefix(LAYERS).partition(".")[0]
    return int(number) if path.startswith(LAYERS) else -1
