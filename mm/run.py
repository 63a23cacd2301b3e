"""The YAML root: one Run is data, networks and stages, from which everything else is derived."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from mm.config import Config
from mm.names import PlainName
from mm.registry import (
    CallbackField,
    NetworkField,
    ObjectiveField,
    OptimizerField,
    StreamField,
    TaskField,
)


class Budget(Config):
    """How long a stage lasts."""

    steps: Annotated[int, Field(gt=0, description="optimizer steps")] = 1000


class Schedule(Config):
    """Learning-rate multiplier as a pure function of the step."""

    shape: Literal["constant", "cosine", "linear", "wsd"] = "wsd"
    warmup: Annotated[int, Field(ge=0, description="steps of linear warm-up from 0")] = 50
    decay: Annotated[
        float,
        Field(
            ge=0,
            le=1,
            description="wsd: last share of the run over which the rate falls to `floor`",
        ),
    ] = 0.5
    floor: Annotated[float, Field(ge=0, le=1)] = 0.0

    def __call__(self, step: int, steps: int) -> float:
        """Multiplier of update number ``step`` (from 0) of ``steps``."""
        import math

        up = min(1.0, (step + 1) / self.warmup) if self.warmup else 1.0
        if self.shape == "constant":
            return up
        if self.shape == "wsd":
            tail = max(1, round(self.decay * steps))
            share = min(1.0, max(0.0, (steps - step) / tail))
        else:
            t = min(1.0, max(0.0, (step - self.warmup) / max(1, steps - self.warmup)))
            share = 0.5 * (1 + math.cos(math.pi * t)) if self.shape == "cosine" else 1 - t
        return up * (self.floor + (1 - self.floor) * share)


class Ema(Config):
    """Exponential moving average of every network's parameters, cut as ZeRO cuts them."""

    decay: Annotated[float, Field(gt=0, lt=1)] = 0.999
    export: Annotated[
        bool, Field(description="it is what the stage leaves: saved model, next stage")
    ] = True

    def keep(self, updates: int) -> float:
        """Share of the old average after ``updates`` updates: rises to ``decay`` from 0.1."""
        return min(self.decay, (1 + updates) / (10 + updates))


class Stage(Config):
    """The only place where parameters, networks or the optimizer change."""

    data: StreamField
    objective: ObjectiveField
    optimizer: OptimizerField = Field(default="adamw", validate_default=True)
    schedule: Schedule = Schedule()
    budget: Budget = Budget()
    ema: Ema | None = None
    tasks: tuple[TaskField, ...] = ()
    allow_left_out: Annotated[
        float,
        Field(
            ge=0,
            le=1,
            description="share of a source's samples, or of its tokens, that may not fit or be "
            "filtered out; more stops the run before its first step",
        ),
    ] = 0.1
    allow_empty: Annotated[
        tuple[str, ...],
        Field(description="modalities, tasks of any_to_any and sources that may get nothing"),
    ] = ()


class EngineConfig(Config):
    """DeepSpeed settings; its JSON is derived from these (mm/trainer/engine/deepspeed.py)."""

    zero_stage: Literal[0, 1, 2, 3] = 1
    precision: Annotated[
        Literal["auto", "fp32", "autocast_bf16", "bf16"],
        Field(description="bf16: the weights, too; ZeRO stage 0 is stage 1 then"),
    ] = "auto"
    grad_clip: Annotated[float, Field(ge=0, description="global gradient norm; 0 = off")] = 1.0
    max_skips: Annotated[
        int, Field(ge=0, description="non-finite steps tolerated in `guard.window`")
    ] = 3
    threads: int | None = None  # CPU threads a process; default: cores / processes on this machine
    compile: Annotated[
        bool, Field(description="torch.compile of every block; a minute or more at the start")
    ] = False

    @property
    def effective_zero_stage(self) -> int:
        """The ZeRO stage that runs.

        Weights in bf16 have masters in fp32, which DeepSpeed splits over ranks at stage 0 as well,
        by other code than stage 1's: there is one way here.
        """
        return self.zero_stage or int(self.precision == "bf16")


class Checkpoints(Config):
    """When to save and what to keep."""

    every: Annotated[int, Field(ge=0, description="steps; 0 = only at the end")] = 500
    keep_last: Annotated[int, Field(ge=1)] = 2
    keep_every: Annotated[int, Field(ge=0, description="steps kept for good; 0 = none")] = 0
    background: Annotated[
        bool, Field(description="write while training goes on; needs memory for one more copy")
    ] = False


class GuardConfig(Config):
    """What to do when a run goes wrong: skip a step, go back to a checkpoint, stop; and hangs."""

    window: Annotated[
        int, Field(gt=0, description="steps that `engine.max_skips` and spikes look back on")
    ] = 100
    max_rollbacks: Annotated[
        int,
        Field(
            ge=0,
            description="returns to the newest checkpoint, past the bad batches, before the run "
            "is stopped",
        ),
    ] = 2
    spike: Literal["off", "warn", "rollback"] = "warn"
    spike_sigma: Annotated[
        float,
        Field(gt=0, description="a loss this many deviations over the median is a spike"),
    ] = 12.0
    spike_steps: Annotated[
        int, Field(gt=0, description="spikes in a row before `spike: rollback` goes back")
    ] = 3
    hang_s: Annotated[
        float,
        Field(ge=0, description="seconds in one phase of a step that count as a hang; 0 = never"),
    ] = 1500.0


class Tracking(Config):
    """Weights & Biases mirror of metrics.jsonl.

    WANDB_MODE wins over `mode`; without a key the default is offline.
    """

    project: str = "mm"
    mode: Literal["auto", "online", "offline", "disabled"] = "auto"
    tags: tuple[str, ...] = ()


class Run(Config):
    """Everything that `mm train` needs."""

    name: PlainName
    out: Path = Path("runs")
    seed: int = 0
    imports: tuple[str, ...] = ()
    vocabulary: Path | None = (
        None  # vocabulary.json of the token shards; tokenizer training has none
    )
    tokenizers: dict[
        str, Path
    ] = {}  # modality -> folder, for samples, generation and `save_pretrained`
    init_from: Annotated[
        Path | None,
        Field(
            description="a run, or a saved model, whose weights this new run begins with; also its "
            "vocabulary and tokenizers, where none are named"
        ),
    ] = None
    model: NetworkField
    stages: tuple[Stage, ...]
    engine: EngineConfig = EngineConfig()
    checkpoints: Checkpoints = Checkpoints()
    guard: GuardConfig = GuardConfig()
    tracking: Tracking = Tracking()
    callbacks: tuple[CallbackField, ...] = ()
    evaluate: Annotated[
        bool, Field(description="run the last stage's tasks at the end of training")
    ] = True

    @model_validator(mode="after")
    def _parts_fit(self) -> Run:
        for i, stage in enumerate(self.stages):
            refusal = getattr(stage.optimizer, "refusal", None)
            why = (
                refusal(self.engine.effective_zero_stage, stage.schedule.shape) if refusal else None
            )
            if why:
                raise ValueError(f"stages.{i}: {why}")
            goes_on = getattr(stage.data, "continues_documents", False)
            if getattr(self.model, "mask", None) == "prefix" and goes_on:
                raise ValueError(
                    f"stages.{i}.data: '{stage.data.kind}' cuts documents, and a prefix is read in "
                    "one piece; take packed or bucketed, or model.mask causal"
                )
        if self.engine.compile and self.engine.zero_stage == 3:
            raise ValueError(
                "engine.compile: ZeRO stage 3 gathers weights inside every module, which cuts "
                "the graphs to pieces; set engine.zero_stage to 0, 1 or 2"
            )
        return self

    @property
    def folder(self) -> Path:
        return self.out / self.name

    @classmethod
    def load(cls, path: str | Path, overrides: Any = ()) -> Run:
        """Read a run YAML; its `imports:` are imported first. Raises UserError."""
        import importlib

        from mm import config

        values = config.override(config.read(path), overrides)
        for name in values.get("imports", ()):
            importlib.import_module(name)
        return config.validate(cls, values, str(path))
