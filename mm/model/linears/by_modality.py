"""A matrix for each group of modalities. M groups, B rows, T tokens, R = B T."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, field_validator
from torch import Tensor, nn

from mm.config import Config
from mm.errors import UserError, did_you_mean
from mm.model.context import Ctx
from mm.model.ffn.experts import Plan, StackedLinear, from_experts, make_plan, to_experts
from mm.model.layer import Linear
from mm.model.linears.dense import DenseConfig
from mm.registry import LINEARS
from mm.vocabulary import Vocabulary


class ByModality(StackedLinear):
    """``x @ weight[m].T``, m the group of the token's own modality; all in one `(M, d_out, d_in)`.

    The first group's matrix is also that of padding, of control tokens and of modalities that no
    group names, so that ``groups: [[text], [image]]`` is an expert of images beside what there was.
    The paper has norms by modality, too; here it is matrices alone.

    Tokens are laid out group by group (`mm.model.ffn.experts`, once for all matrices of a pass), so
    each is multiplied by one matrix: the products are a dense matrix's and at most 15 rows of zeros
    a group, and rows are copied there and back. A stacked weight is one parameter, in use whatever
    a batch holds: what no token chose has a gradient of zeros, so all ranks of ZeRO run alike. Muon
    leaves it to AdamW, as it does experts.

    Source: Liang et al. 2024, Mixture-of-Transformers (arXiv:2411.04996), section 3, eq. 1-3;
    images alone apart: Wang et al. 2023, CogVLM (arXiv:2311.03079), section 2.1, visual expert.
    """

    exact = False
    bias: Tensor | None

    def __init__(
        self, d_in: int, d_out: int, name: str, groups: tuple[tuple[str, ...], ...], bias: bool
    ):
        super().__init__(len(groups), d_in, d_out, name)
        self.groups = groups
        # One axis, so that it is no matrix to decay and to Muon.
        self.bias = nn.Parameter(torch.empty(len(groups) * d_out)) if bias else None
        self.group_of: tuple[tuple[int, int], ...] = ()  # (modality's number, group), sorted

    def init_weights(self) -> None:
        super().init_weights()
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def read_vocabulary(self, vocabulary: Vocabulary) -> None:
        numbers, found = vocabulary.numbers, {}
        for group, names in enumerate(self.groups):
            for name in names:
                if name not in numbers:
                    raise UserError(
                        f"model.linear.groups: the vocabulary has no modality '{name}'"
                        f"{did_you_mean(name, [*numbers])}"
                    )
                found[numbers[name]] = group
        self.group_of = tuple(sorted(found.items()))

    def from_dense(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The dense matrix for every group: at first the same function."""
        M = len(self.groups)
        out = {"weight": tensors["weight"].expand(M, -1, -1).clone()}
        if "bias" in tensors:
            out["bias"] = tensors["bias"].repeat(M)
        return out

    def _group(self, modality_BT: Tensor) -> Tensor:
        """`(R,)` int64."""
        modality = modality_BT.flatten()
        group = torch.zeros_like(modality, dtype=torch.int64)
        for number, m in self.group_of:
            group = torch.where(modality == number, m, group)
        return group

    def _plan(self, ctx: Ctx) -> Plan:
        make = lambda: make_plan(self._group(ctx.layout.fields.modality), len(self.groups))
        return ctx.layout.cached(make, "by_modality", len(self.groups), self.group_of)

    def forward(self, x: Tensor, ctx: Ctx | None = None) -> Tensor:  # type: ignore[override]
        """`(B, T, d_out)` of the tokens `(B, T, d_in)` of ``ctx.layout``.

        Raises:
            UserError: ``x`` holds no tokens of a batch, in its order.
        """
        if ctx is None or x.dim() != 3 or x.shape[:2] != ctx.layout.shape:
            raise UserError(
                f"{self.path or self.name}: by_modality goes by the modality of each token, and "
                f"this layer multiplies something else by '{self.name}': let linear.targets name "
                "other matrices, or take another layer"
            )
        plan = self._plan(ctx)
        y = from_experts(super().forward(to_experts(x.flatten(0, 1), plan), plan.ends), plan)
        if self.bias is not None:  # a product, whose gradient is the same each time
            one_hot = F.one_hot(self._group(ctx.layout.fields.modality), len(self.groups))
            y = y + one_hot.to(y.dtype) @ self.bias.view(len(self.groups), -1).to(y.dtype)
        return y.unflatten(0, x.shape[:2])


@LINEARS.register("by_modality")
class ByModalityConfig(Config):
    """Weights of their own for groups of modalities, as in Mixture-of-Transformers."""

    kind: Literal["by_modality"] = "by_modality"
    groups: Annotated[
        tuple[tuple[str, ...], ...],
        Field(min_length=2, description="names of modalities; the first one's is the rest's, too"),
    ] = (("text",), ("image", "audio"))
    targets: Annotated[
        tuple[str, ...],
        Field(description="globs over names of matrices, such as qkv, out; others are dense"),
    ] = ("*",)
    bias: bool | list[str] = Field(
        default=False, description="a list: names of the matrices that have one, such as [qkv]"
    )

    @field_validator("groups")
    @classmethod
    def _each_name_once(cls, groups: tuple[tuple[str, ...], ...]) -> tuple[tuple[str, ...], ...]:
        names = [name for group in groups for name in group]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice or not all(groups):
            raise ValueError(f"'{twice[0]}' is there twice" if twice else "a group without a name")
        return groups

    def build(self, d_in: int, d_out: int, name: str = "") -> Linear:
        if not any(fnmatchcase(name, glob) for glob in self.targets):
            return DenseConfig(bias=self.bias).build(d_in, d_out, name)
        bias = self.bias if isinstance(self.bias, bool) else name in self.bias
        return ByModality(d_in, d_out, name, self.groups, bias)
