"""Learned absolute positions. B rows, T tokens, D model, P places."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from mm.config import Config
from mm.layout import Fields
from mm.model.positions.base import Position
from mm.registry import POSITIONS


class Learned(nn.Module, Position):
    """Add ``table[position]`` to the vectors.

    Of the embedder (the classical form), or to the input of one attention layer.

    Source: Gehring et al. 2017 (arXiv:1705.03122), section 3.1; Radford et al. 2018 (GPT).
    """

    length_general = False

    def __init__(self, d_model: int, max_length: int):
        super().__init__()
        self.table = nn.Parameter(torch.empty(max_length, d_model))

    def init_weights(self) -> None:
        nn.init.normal_(self.table, std=0.02)

    def embed(self, x_BTD: Tensor, f: Fields) -> Tensor:
        """``x`` with its places added.

        Raises:
            ValueError: on the CPU, when a place lies beyond the table (elsewhere the check would
                synchronise; the device itself stops there).
        """
        place = f.position[..., 0].long()
        if place.device.type == "cpu" and not torch.compiler.is_compiling() and place.numel():
            if int(place.max()) >= self.table.shape[0]:
                raise ValueError(
                    f"position {int(place.max())} lies beyond the {self.table.shape[0]} learned"
                    " ones; raise max_length"
                )
        return x_BTD + nn.functional.embedding(place, self.table).to(x_BTD.dtype)


@POSITIONS.register("learned")
class LearnedConfig(Config):
    """A learned vector a place."""

    kind: Literal["learned"] = "learned"
    max_length: Annotated[int, Field(gt=0, description="places; later ones are refused")] = 2048

    def build(self, head_dim: int, heads: int = 1, d_model: int = 0) -> Learned:
        return Learned(d_model or head_dim * heads, self.max_length)
