"""The YAML root: one Run is data, networks and stages, from which everything else is derived."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from mm.config import Config
from mm.engine_config import EngineConfig
from mm.init_from import InitFromField, with_saved_model
from mm.names import PlainName
from mm.registry import (
    CallbackField,
    NetworkField,
    ObjectiveField,
    OptimizerField,
    SinkField,
    StreamField,
    TaskField,
)
from mm.schedule import Budget, Ema, Schedule

EVALUATIONS = 20  # held-out losses of a stage, about
CHEAP = 10  # steps for each batch of a held-out loss


class BestBy(Config):
    """A task's figure in place of the held-out loss, where the best step is asked for."""

    task: Annotated[str, Field(description="name of a task of the stage that has `every`")]
    figure: Annotated[str, Field(description="one of its figures, as after eval/<task>/")]
    goal: Annotated[Literal["highest", "lowest"], Field(description="which value is best")] = (
        "highest"
    )

    @property
    def name(self) -> str:
        return f"{self.task}/{self.figure}"

    def score(self, value: float) -> float:
        """Of which less is better; `score` of that is the value again."""
        return -value if self.goal == "highest" else value


class Stage(Config):
    """The only place where parameters, networks or the optimizer change."""

    data: Annotated[
        StreamField, Field(description="what is read, how it is mixed, and the size of a batch")
    ]
    objective: Annotated[ObjectiveField, Field(description="what is learned: the loss")]
    optimizer: Annotated[OptimizerField, Field(description="its kind and `lr`")] = Field(
        default="adamw", validate_default=True
    )
    schedule: Annotated[Schedule, Field(description="the learning rate over the steps")] = (
        Schedule()
    )
    budget: Annotated[Budget, Field(description="how long the stage lasts")] = Budget()
    train: Annotated[
        tuple[str, ...] | None,
        Field(
            description="parameters of the model that train, as globs over their names, such as "
            "`heads.*`; default: all, or those of its adapters (`linear: lora`) alone"
        ),
    ] = None
    freeze: Annotated[
        tuple[str, ...],
        Field(description="parameters that do not train, taken from those of `train`"),
    ] = ()
    train_rows: Annotated[
        tuple[str, ...],
        Field(
            description="modalities: of tables with a row an id the rows of their ids alone train, "
            "without weight decay; default: all rows"
        ),
    ] = ()
    mask: Annotated[
        str | None,
        Field(description="who sees whom in this stage and what it leaves; default: model.mask"),
    ] = None
    ema: Annotated[
        Ema | None, Field(description="a moving average of the weights; null = none")
    ] = None
    eval_every: Annotated[
        int | None,
        Field(
            ge=0,
            description="steps between held-out losses, on the split `val` of the data; default: a "
            "twentieth of the stage, at least 10; 0 = never",
        ),
    ] = None
    eval_batches: Annotated[
        int | None,
        Field(
            gt=0,
            description="batches of `batch_size` that a held-out loss is the mean of, always the "
            "same ones; default: a tenth of eval_every, at most 32; never more than the split has",
        ),
    ] = None
    early_stop: Annotated[
        int | None,
        Field(gt=0, description="held-out losses without a new best after which the stage ends"),
    ] = None
    best_by: Annotated[
        BestBy | None,
        Field(description="what keep_best, early_stop and export: best go by; null = loss"),
    ] = None
    tasks: Annotated[
        tuple[TaskField, ...], Field(description="figures that are measured on held-out data")
    ] = ()
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

    @model_validator(mode="after")
    def _early_stop_has_losses(self) -> Stage:
        if self.early_stop is not None and self.eval_every == 0 and self.best_by is None:
            raise ValueError("early_stop: it needs held-out losses; eval_every is 0")
        return self

    @model_validator(mode="after")
    def _names_of_tasks_differ(self) -> Stage:
        given = [task.name for task in self.tasks if task.name]
        for name in given:
            if given.count(name) > 1:
                raise ValueError(f"tasks: two are called '{name}': give each a name of its own")
        return self

    @property
    def held_out_every(self) -> int:
        """Steps between held-out losses; 0 = never."""
        if self.eval_every is None:
            return max(CHEAP, self.budget.steps // EVALUATIONS)
        return self.eval_every

    @property
    def held_out_batches(self) -> int:
        """Batches of a held-out loss, where the split has as many.

        A forward takes about a third of a step's time: a tenth of the steps between is 3 % of it.
        """
        return self.eval_batches or min(32, max(1, self.held_out_every // CHEAP))


class Checkpoints(Config):
    """When to save and what to keep."""

    every: Annotated[int, Field(ge=0, description="steps; 0 = only at the end")] = 500
    keep_last: Annotated[int, Field(ge=1, description="newest checkpoints that are kept")] = 2
    keep_every: Annotated[int, Field(ge=0, description="steps kept for good; 0 = none")] = 0
    keep_best: Annotated[
        bool,
        Field(
            description="every new best held-out loss is saved, and stays until there is a better "
            "one; `export: best` sets it"
        ),
    ] = False
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
    spike: Annotated[
        Literal["off", "warn", "rollback"], Field(description="what a spike of the loss does")
    ] = "warn"
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
    """Where metrics.jsonl is mirrored to, and how a run is filed there.

    WANDB_MODE wins over `mode`; without a key the default is offline.
    """

    sinks: Annotated[
        tuple[SinkField, ...], Field(description="`wandb`, `tensorboard`, `mlflow`; [] = none")
    ] = Field(default=("wandb",), validate_default=True)
    project: Annotated[
        str, Field(description="project of Weights & Biases, experiment of MLflow")
    ] = "mm"
    mode: Annotated[
        Literal["auto", "online", "offline", "disabled"],
        Field(description="auto: online with a key, else offline"),
    ] = "auto"
    entity: Annotated[str | None, Field(description="user or team; default: the key's own")] = None
    group: Annotated[
        str | None, Field(description="runs that belong together, such as seeds of one trial")
    ] = None
    job_type: Annotated[str | None, Field(description="such as tokenizer, pretrain")] = None
    notes: Annotated[str | None, Field(description="what the run is for, in a sentence")] = None
    tags: Annotated[tuple[str, ...], Field(description="tags of the run")] = ()
    upload: Annotated[
        tuple[Literal["model", "data"], ...],
        Field(
            description="what is sent besides figures and samples; all else is only referred to by "
            "its path"
        ),
    ] = ()


class Run(Config):
    """Everything that `mm train` needs."""

    name: Annotated[PlainName, Field(description="of the run's folder below `out`")]
    out: Annotated[Path, Field(description="folder of runs")] = Path("runs")
    seed: Annotated[int, Field(ge=0, lt=2**63, description="of weights, data order and noise")] = 0
    imports: Annotated[
        tuple[str, ...], Field(description="Python modules that register kinds of your own")
    ] = ()
    vocabulary: Annotated[
        Path | None,
        Field(description="vocabulary.json of the token shards; tokenizer training has none"),
    ] = None
    tokenizers: Annotated[
        dict[str, Path],
        Field(description="modality -> folder, for samples, generation and the saved model"),
    ] = {}
    init_from: Annotated[
        InitFromField | None,
        Field(
            description="a run, or a saved model, whose weights this new run begins with; also its "
            "vocabulary and tokenizers, where none are named. A mapping says what need not fit"
        ),
    ] = None
    model: Annotated[NetworkField, Field(description="what is trained: `lm`, or a tokenizer's net")]
    stages: Annotated[
        tuple[Stage, ...],
        Field(description="trained one after the other, each with its own data"),
    ]
    engine: Annotated[EngineConfig, Field(description="ZeRO, precision, threads")] = EngineConfig()
    checkpoints: Annotated[Checkpoints, Field(description="when to save, what to keep")] = (
        Checkpoints()
    )
    guard: Annotated[GuardConfig, Field(description="what to do when a run goes wrong")] = (
        GuardConfig()
    )
    tracking: Annotated[Tracking, Field(description="Weights & Biases and others")] = Field(
        default_factory=Tracking
    )
    callbacks: Annotated[
        tuple[CallbackField, ...], Field(description="samples and other work while training")
    ] = ()
    evaluate: Annotated[
        bool, Field(description="run every stage's tasks at its end, on what it leaves")
    ] = True

    export: Annotated[
        Literal["last", "best"],
        Field(
            description="the weights of the saved model: those of the last step, or of the last "
            "stage's best held-out loss"
        ),
    ] = "last"

    @property
    def keeps_best(self) -> bool:
        """Whether every new best held-out loss is saved."""
        return self.checkpoints.keep_best or self.export == "best"

    @model_validator(mode="after")
    def _parts_fit(self) -> Run:
        if not self.stages:
            raise ValueError("stages: at least one is needed")
        for i, stage in enumerate(self.stages):
            refusal = getattr(stage.optimizer, "refusal", None)
            why = (
                refusal(self.engine.effective_zero_stage, stage.schedule.shape) if refusal else None
            )
            if why:
                raise ValueError(f"stages.{i}: {why}")
            goes_on = getattr(stage.data, "continues_documents", False)
            if goes_on and self.engine.cuda_graphs:
                raise ValueError(
                    f"stages.{i}.data: '{stage.data.kind}' keeps states from step to step, whose "
                    "memory a CUDA graph writes into again; set engine.cuda_graphs to false"
                )
            whole = getattr(self.model, "needs_whole_documents", None)
            if goes_on and whole and (why := whole(stage.mask)):
                raise ValueError(
                    f"stages.{i}.data: '{stage.data.kind}' cuts documents, and {why} in one piece; "
                    "take packed or bucketed, or model.mask causal"
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
    def load(cls, path: str | Path, overrides: Any = (), *, trust_code: bool = True) -> Run:
        """Read a run YAML; its `imports:` are imported first. Raises UserError.

        Args:
            trust_code: False for a file that nobody chose by name, as that of a run's folder.
        """
        from mm import config

        values = config.override(config.read(path), overrides)
        config.import_modules(values, str(path), trust_code)
        return config.validate(cls, with_saved_model(values), str(path))
