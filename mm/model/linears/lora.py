"""Low-rank adapters on matrices that stay as they are. R rank."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from mm.config import Config
from mm.errors import UserError
from mm.model import folder as files
from mm.model.context import Ctx
from mm.model.layer import Linear
from mm.model.linears.dense import Dense
from mm.model.noise import dropout
from mm.registry import LINEARS, LinearField


class Lora(Linear):
    """``base(x) + scale * B A x``, B zeros at first; by default A and B alone train.

    With ``magnitude`` each row of ``W + scale * B A`` keeps its direction and takes a length that
    is learned; the norm that it is divided by counts as a constant of the backward pass. A bias of
    the base is added after that, as it is.

    Source: Hu et al. 2021, LoRA (arXiv:2106.09685), section 4.1; the scale ``alpha / sqrt(R)``:
    Kalajdzievski 2023, rsLoRA (arXiv:2312.03732); magnitude: Liu et al. 2024, DoRA
    (arXiv:2402.09353), eq. 5 and section 4.3.
    """

    wide_parameters = ("lora_a",)

    def __init__(self, d_in: int, d_out: int, name: str, config: LoraConfig):
        super().__init__()
        self.name = name
        self.base: Linear = config.base_layer.build(d_in, d_out, name)
        self.base.name = ""  # it is no end of a branch of its own
        R = config.rank
        self.scale = config.alpha / (math.sqrt(R) if config.rs else R)
        self.dropout, self.merged = config.dropout, False
        self.lora_a = nn.Parameter(torch.empty(R, d_in))
        self.lora_b = nn.Parameter(torch.empty(d_out, R))
        self.magnitude = nn.Parameter(torch.empty(d_out)) if config.dora else None
        self.adapter_parameters = ("lora_a", "lora_b", *(["magnitude"] if config.dora else []))
        if config.dora and not self.base.exact:
            raise ValueError("dora needs a base that is a plain matrix: dense or nf4")
        self.register_state_dict_pre_hook(_refuse_merged)

    def init_weights(self) -> None:
        nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))
        nn.init.zeros_(self.lora_b)
        self._measure()

    def rescale(self, factor: float) -> None:
        self.base.rescale(factor)
        with torch.no_grad():
            self.lora_b.mul_(factor)
            if self.magnitude is not None:
                self.magnitude.mul_(factor)

    @torch.no_grad()
    def _measure(self) -> None:
        """Set the lengths of rows to those of the base."""
        if self.magnitude is not None:
            self.magnitude.copy_(_norm(self.base_matrix()))

    def from_dense(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The base's tensors, and the lengths of its rows."""
        base = self.base.from_dense(tensors)
        out = {f"base.{name}": value for name, value in base.items()}
        if self.magnitude is not None and isinstance(self.base, Dense):
            out["magnitude"] = _norm(tensors["weight"])
        elif self.magnitude is not None:
            self.base.load_state_dict(base)
            out["magnitude"] = _norm(self.base_matrix())
        return out

    def base_matrix(self) -> Tensor:
        """`(d_out, d_in)` of the base, read through its forward: ZeRO-3 has it nowhere else."""
        at = next(t.device for t in (*self.base.buffers(), self.lora_a))  # which may be empty yet
        one = torch.eye(self.lora_a.shape[1], dtype=self.lora_a.dtype, device=at)
        with torch.no_grad(), torch.autocast(one.device.type, enabled=False):
            y = self.base(one)
            bias = self._base_bias(one)
            return (y if bias is None else y - bias).T.contiguous()

    def _base_bias(self, x: Tensor) -> Tensor | None:
        """`(1, d_out)` of the base, read through its forward as `base_matrix` is."""
        if getattr(self.base, "bias", None) is None:
            return None
        return self.base(x.new_zeros(1, x.shape[-1]))

    def update(self) -> Tensor:
        """`(d_out, d_in)`: what the adapter adds to the base's matrix."""
        return self.scale * (self.lora_b @ self.lora_a)

    def forward(self, x: Tensor, ctx: Ctx | None = None) -> Tensor:
        y = self.base(x, ctx)
        if self.merged:
            return y
        if self.dropout and self.training and ctx is not None:
            x = dropout(x, self.dropout, ctx, self, "lora")
        inner = F.linear(x, self.lora_a) * self.scale
        if self.magnitude is None:
            return _add_product(y, inner, self.lora_b)
        low = F.linear(inner, self.lora_b)
        with torch.no_grad():
            norm = _norm(self.base_matrix() + self.update())
        scale = (self.magnitude / norm).to(y.dtype)
        bias = self._base_bias(x)
        return (y + low) * scale if bias is None else (y - bias + low) * scale + bias

    @torch.no_grad()
    def dense_weight(self) -> Tensor:
        """`(d_out, d_in)`: the one matrix that does what base and adapter do.

        Raises:
            UserError: the base is no plain matrix.
        """
        self.require_one_matrix()
        whole = self.base_matrix() + self.update()
        if self.magnitude is not None:
            whole = whole * (self.magnitude / _norm(whole))[:, None]
        return whole

    def require_one_matrix(self) -> None:
        """Raise UserError where the base is no plain matrix."""
        if not self.base.exact:
            raise UserError(f"{self.path}: its base is no one matrix: adapters cannot be merged")

    @torch.no_grad()
    def merge(self) -> None:
        """Put the adapter into the base's matrix, so that a forward costs what the base's does."""
        if not isinstance(self.base, Dense):
            raise UserError(f"{self.path}: only adapters of a dense matrix can be merged in place")
        if not self.merged:
            whole = self.dense_weight()
            self._length = _norm(self.base_matrix() + self.update())
            self.base.weight.copy_(whole)
            self.merged = True

    @torch.no_grad()
    def unmerge(self) -> None:
        """Take the adapter out again; the base is as it was but for rounding."""
        if not self.merged or not isinstance(self.base, Dense):
            return
        whole = self.base.weight
        if self.magnitude is not None:  # rows of W + BA: their length is not in the merged matrix
            whole = whole * (self._length / self.magnitude)[:, None]
        self.base.weight.copy_(whole - self.update())
        self.merged = False


def _add_product(y: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """``y + x @ weight.T`` in one pass over ``y``; autocast and mixed types take two."""
    if y.dim() < 2 or not y.dtype == x.dtype == weight.dtype or not y.is_contiguous():
        return y + F.linear(x, weight)
    return torch.addmm(y.flatten(0, -2), x.flatten(0, -2), weight.t()).view(y.shape)


def _norm(weight: Tensor) -> Tensor:
    """Lengths of rows, `(d_out,)`; a row of zeros stays one whatever it is divided by."""
    return weight.norm(dim=1).clamp_min(torch.finfo(torch.float32).tiny)


def _refuse_merged(module: Any, prefix: str, keep_vars: bool) -> None:
    if module.merged:
        raise RuntimeError(f"{prefix}: merged adapters are not saved; call unmerge_adapters first")


@LINEARS.register("lora")
class LoraConfig(Config):
    """An adapter of low rank on every matrix whose name fits ``targets``."""

    kind: Literal["lora"] = "lora"
    base_layer: LinearField = Field(
        default="dense", validate_default=True, description="what is adapted: dense, nf4 (QLoRA)"
    )
    rank: Annotated[int, Field(gt=0, description="inner width of the adapter")] = 8
    alpha: Annotated[float, Field(gt=0, description="times the adapter, over the rank")] = 16.0
    rs: Annotated[bool, Field(description="over the root of the rank instead (rsLoRA)")] = False
    dropout: Annotated[float, Field(ge=0, lt=1, description="of what the adapter reads")] = 0.0
    dora: Annotated[
        bool, Field(description="learn the length of each row apart from its direction (DoRA)")
    ] = False
    targets: Annotated[
        tuple[str, ...],
        Field(description="globs over names of matrices, such as qkv, out, gate_up; others stay"),
    ] = ("*",)

    small: ClassVar[Mapping[str, Any]] = {"rank": 2}

    def build(self, d_in: int, d_out: int, name: str = "") -> Linear:
        if any(fnmatchcase(name, glob) for glob in self.targets):
            return Lora(d_in, d_out, name, self)
        return self.base_layer.build(d_in, d_out, name)


def loras_in(model: nn.Module) -> Iterator[Lora]:
    """Every matrix of a network that has an adapter."""
    return (part for part in model.modules() if isinstance(part, Lora))


def merge_adapters(model: nn.Module) -> None:
    """Put all adapters into their matrices, for generation. Raises UserError where it cannot."""
    for part in loras_in(model):
        part.merge()


def unmerge_adapters(model: nn.Module) -> None:
    """Take all adapters out of their matrices again."""
    for part in loras_in(model):
        part.unmerge()


def adapter_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of all adapters, by their names in the network; {} without any."""
    paths = {id(part): path for path, part in model.named_modules()}
    return {
        f"{paths[id(part)]}.{name}".lstrip("."): getattr(part, name).detach()
        for part in loras_in(model)
        for name in part.adapter_parameters
    }


def save_adapters(model: nn.Module, path: str | Path) -> None:
    """Write the adapters alone as safetensors. Raises UserError where there is none."""
    tensors = adapter_tensors(model)
    if not tensors:
        raise UserError(f"{path}: the model has no adapters to save; set model.linear: lora")
    files.save_tensors(Path(path), tensors)
