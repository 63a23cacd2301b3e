"""What optimizers share: settings, groups, a base for whole parameters and ZeRO's shards alike."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase
from math import prod
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from mm.config import Config
from mm.errors import UserError
from mm.trainer.engine.zero_shards import Shards

Beta = Annotated[float, Field(ge=0, lt=1, description="share of the old average kept")]
Needs = Literal["elements", "gather", "tensors"]
# Attribute of a parameter of which some rows train alone: they, as slices.
TRAINED_ROWS = "trained_rows"


class OptimizerConfig(Config):
    """Settings of every optimizer."""

    lr: Annotated[
        float, Field(gt=0, description="peak learning rate; the schedule multiplies it")
    ] = 1e-3
    weight_decay: Annotated[float, Field(ge=0, description="decoupled, times the rate")] = 0.1
    decay: Annotated[
        Literal["matrices", "all"],
        Field(description="what decays; matrices: no norm, bias or embedding"),
    ] = "matrices"

    rates: Annotated[
        dict[str, Annotated[float, Field(gt=0)]],
        Field(
            description="multiples of `lr` by globs over names of parameters, such as {'*.lora_b': "
            "16} (LoRA+) or {'backbone.layers.0.*': 0.5}; of several that fit, their product"
        ),
    ] = {}

    # Rates of muP are known for update rules whose step has the same size whatever the gradient's.
    mup: ClassVar[bool] = False
    own_schedule: ClassVar[bool] = False  # it takes the place of a falling rate

    @property
    def needs(self) -> Needs:
        """What it needs of a shard.

        "elements" (element by element, or sums over a parameter), "gather" (whole tensors, which it
        gathers itself) or "tensors" (whole ones in place: ZeRO stage 0 only).
        """
        return "elements"

    def average(self, weight: Tensor, states: Mapping[str, Tensor]) -> Tensor | None:
        """The weight to evaluate, elementwise from the trained one and its states; None: this."""
        return None

    def refusal(self, zero_stage: int, schedule: str) -> str | None:
        """Why a stage with this ZeRO stage and schedule cannot run, or None."""
        kind = getattr(self, "kind", type(self).__name__)
        if self.needs == "tensors" and zero_stage:
            return (
                f"optimizer '{kind}' as set needs whole tensors, and ZeRO stage {zero_stage} "
                "gives it flat slices: set engine.zero_stage=0 (and no engine.precision=bf16)"
            )
        if self.own_schedule and schedule != "constant":
            return (
                f"optimizer '{kind}' averages in place of a falling rate: set its stage's "
                f"schedule.shape to constant (it is {schedule})"
            )
        return None

    def groups(
        self, module: nn.Module, rule: Callable[[str, nn.Parameter], str] = lambda name, p: ""
    ) -> list[dict[str, Any]]:
        """Trainable parameters by (``rule``, weight decay, rate), decayed ones first.

        A module with `rates` (muP) says which multiple of the rate each parameter takes; `rates` of
        the settings come upon that, and upon the decay, which is times the rate. What trains in
        some of its rows alone does not decay: the others would.

        Raises UserError where a glob of `rates` fits no parameter that trains.

        Source: a higher rate of B than of A: Hayou et al. 2024, LoRA+ (arXiv:2402.12354), section
        3; rates by layer: Howard & Ruder 2018, ULMFiT (arXiv:1801.06146), section 3.2.
        """
        rates = module.rates() if hasattr(module, "rates") else {}  # type: ignore[operator]
        if rates and not self.mup:
            kind = getattr(self, "kind", type(self).__name__)
            raise ValueError(f"optimizer '{kind}' has no muP rates: use adamw or lion")
        found: dict[tuple[str, float, float], list[nn.Parameter]] = {}
        trained = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
        for glob in self.rates:
            if not any(fnmatchcase(name, glob) for name, _ in trained):
                raise UserError(f"optimizer.rates: no parameter that trains is called '{glob}'")
        for name, p in trained:
            decays = self.decay == "all" or (p.dim() > 1 and "embed" not in name.lower())
            decays = decays and not hasattr(p, TRAINED_ROWS)
            rate = rates.get(name, 1.0)
            # decay is times the rate: divided here, so that muP leaves it as it is
            decay = self.weight_decay / rate if decays else 0.0
            rate *= prod(factor for glob, factor in self.rates.items() if fnmatchcase(name, glob))
            found.setdefault((rule(name, p), -decay, -rate), []).append(p)
        return [
            {"params": found[key], "rule": key[0], "weight_decay": -key[1], "lr": -key[2] * self.lr}
            for key in sorted(found)
        ]


class ShardOptimizer(torch.optim.Optimizer):
    """A torch optimizer whose tensors are whole parameters or flat shards of ZeRO.

    The engine sets ``shards`` before the first step. Every state is a float (the same for all
    tensors), a tensor of the shape of its tensor (elementwise: it can be cut anew for another world
    size), one named in ``per_parameter`` `(spans,)`, or, where whole tensors are needed, of any
    shape.
    """

    per_parameter: ClassVar[tuple[str, ...]] = ()

    def __init__(self, groups: Iterable[dict[str, Any]], **defaults: Any):
        super().__init__(list(groups), defaults)
        names = {p: str(i) for i, p in enumerate(p for g in self.param_groups for p in g["params"])}
        self.shards = Shards.from_groups(self.param_groups, names)

    def init_state(self, x: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        """States before the first step; ``step`` is added."""
        return {}

    def update(self, x: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        """Change ``x`` in place; ``state["step"]`` counts from 1.

        Collectives are called for every tensor in the same order on all ranks.
        """
        raise NotImplementedError

    def prepare(self, x: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        """The state of ``x``, made when it is missing."""
        state = self.state[x]
        if not state:
            state["step"] = 0
            state.update(self.init_state(x, group))
        return state

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for x in group["params"]:
                if x.grad is not None:
                    state = self.prepare(x, group)
                    state["step"] += 1
                    self.update(x, x.grad, state, group)


def adamw_update(
    x: Tensor, g: Tensor, state: dict[str, Any], lr: float, betas: tuple[float, float], eps: float
) -> None:
    """One Adam step without decay, in place. States ``step, exp_avg, exp_avg_sq``."""
    t, m, v = state["step"], state["exp_avg"], state["exp_avg_sq"]
    m.lerp_(g, 1 - betas[0])
    v.mul_(betas[1]).addcmul_(g, g, value=1 - betas[1])
    denominator = v.sqrt().div_((1 - betas[1] ** t) ** 0.5).add_(eps)
    x.addcdiv_(m, denominator, value=-lr / (1 - betas[0] ** t))
