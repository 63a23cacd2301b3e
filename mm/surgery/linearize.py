"""Attention layers that go on as recurrent ones with their projections."""

from __future__ import annotations

from typing import Any, Literal

import torch

from mm.errors import UserError
from mm.model.mixers.attention.attention import Attention
from mm.registry import SURGERIES
from mm.surgery.base import Operated, Surgery, network_of, own_tensors, stack_of, with_stack
from mm.vocabulary import Vocabulary

FEATURES = Literal["elu1", "relu", "taylor", "softmax"]


@SURGERIES.register("linearize")
class Linearize(Surgery):
    """Every `attention` layer becomes a `linear_attention` with its queries, keys, values and out.

    Key heads are repeated for the heads that share them; norms, gates and positions of the
    attention are left behind. It computes something else, and is trained on: with `distil` and the
    old model as teacher.

    Source: Kasai et al. 2021, T2R (arXiv:2103.13076), section 2.
    """

    kind: Literal["linearize"] = "linearize"
    feature: FEATURES = "elu1"

    def apply(self, before: Operated, wanted: Vocabulary | None) -> Operated:
        stack = stack_of(before.config, self.kind)
        mixers: dict[str, Any] = {word: m.to_dict() for word, m in stack.mixers.items()}
        found = [w for w in dict.fromkeys(stack.words()) if stack.mixer(w).kind == "attention"]
        if not found:
            raise UserError("surgery 'linearize': this model has no `attention` layer")
        for word in found:
            H, _, K = stack.mixer(word).sizes(before.config.d_model)
            mixers[word] = {
                "kind": "linear_attention",
                "heads": H,
                "key_dim": K,
                "expand_value": H * K / before.config.d_model,
                "feature": self.feature,
                "scale": True,
            }
        config = with_stack(before.config, mixers=mixers)
        old = network_of(before)
        tensors = dict(before.tensors)
        for path, part in old.named_modules():
            if not isinstance(part, Attention):
                continue
            H, G, K = part.heads, part.kv_heads, part.head_dim
            name = f"{path}.qkv.weight"
            if name not in tensors or len(tensors[name]) != (H + 2 * G) * K:
                raise UserError(f"surgery 'linearize': {path}: only a dense qkv can be taken")
            kept = {n: tensors[n] for n in (name, f"{path}.out.weight")}
            tensors = {k: t for k, t in tensors.items() if not k.startswith(f"{path}.")} | kept
            qkv = tensors[name].unflatten(0, (H + 2 * G, K)).split((H, G, G))
            heads = [qkv[0], *(t.repeat_interleave(H // G, 0) for t in qkv[1:])]
            tensors[name] = torch.cat(heads).flatten(0, 1)
        module = network_of(Operated(config, tensors, before.vocabulary))
        return Operated(config, own_tensors(module), before.vocabulary)
