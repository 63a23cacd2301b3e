"""A small language model and ids for it."""

from __future__ import annotations

import torch
from torch import Tensor

from mm.config import validate
from mm.model.layer import init_weights
from mm.model.model import LmConfig, Model
from mm.specs import TokenSpec
from mm.vocabulary import Vocabulary

VOCABULARY = (
    Vocabulary().add(TokenSpec("text", 11)).add(TokenSpec("image", 7)).add(TokenSpec("audio", 5, 2))
)


N = VOCABULARY.size


def make(seed: int = 0, **settings: object) -> Model:
    config = validate(
        LmConfig,
        {
            "d_model": 16,
            "backbone": {
                "kind": "stack",
                "pattern": "attention",
                "depth": 2,
                "mixers": {"attention": {"heads": 2}},
            },
            **settings,
        },
        "test",
    )
    torch.manual_seed(seed)
    model = config.build(VOCABULARY)
    init_weights(model)
    return model


def ids(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(N, shape, generator=torch.Generator().manual_seed(seed))
