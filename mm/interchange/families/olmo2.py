"""OLMo 2: norms behind each branch, queries and keys normed over all heads."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from mm.interchange.families.decoder import Decoder
from mm.registry import FAMILIES


@FAMILIES.register("olmo2")
class Olmo2(Decoder):
    """OLMo 2 (arXiv:2501.00656), section 2."""

    kind: Literal["olmo2"] = "olmo2"
    architecture: ClassVar[str] = "Olmo2ForCausalLM"
    qk_norm: ClassVar[Any] = "full"
    eps: ClassVar[float] = 1e-5
    norms: ClassVar[tuple[str | None, ...]] = (
        None,
        "post_attention_layernorm",
        None,
        "post_feedforward_layernorm",
    )
